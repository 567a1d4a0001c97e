//! Identity, prekeys and membership: what members agree on before the first message.
//!
//! A client's secrets come in as [`BundleKeys`] and go out as a [`Bundle`] for its identity key to sign; other clients'
//! bundles come in with that signature already verified, and [`BundleView`] refuses those that go back or fork. Here, too,
//! is what names a conversation: its id, the hash over its members, and the decisions that members sign. Nothing here is
//! sent, stored or fetched, and no RSA is computed.

use core::fmt;

use rand_core::TryCryptoRng;

use crate::crypto::{ExchangeKey, HASH_LEN, SIGNATURE_LEN, Secret, SigningKey, Statement, hash, verify};
use crate::error::{ApiMisuse, Error};
use crate::wire::{GroupFlags, ID_LEN, MAX_MEMBERS, Member, Members, Reader};

/// Bytes of an encoded [`Bundle`].
pub const BUNDLE_LEN: usize = ID_LEN + 5 * HASH_LEN + 2 * 4;
/// Former prekeys that a client keeps beside the current one. Counted, so that no clock is needed.
pub const FORMER: usize = 5;

const BUNDLE_CONTEXT: &str = "ossicle bundle";
const MEMBERS_LABEL: &[u8] = b"ossicle members\0";
const DIRECT_LABEL: &[u8] = b"ossicle direct\0";

/// What both ends of a chain must hold alike about the conversation it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The conversation's id.
    pub sid: [u8; ID_LEN],
    /// [`members_hash`] of its present version.
    pub members: [u8; HASH_LEN],
    /// Whether every message must carry its sender's signature. So it is in groups: their members share a key.
    pub signed: bool,
}

impl Conversation {
    /// The conversation of two members; `counter` is 0 until one between them was closed. Signatures are optional.
    pub fn direct(a: &Member, b: &Member, counter: u32) -> Self {
        let sid = direct_sid(&a.id, &b.id, counter);
        Self { sid, members: direct_members_hash(&sid, a, b), signed: false }
    }

    /// A group with these keys of its members, sorted by id, and their [`super::group_version`]. Every message is signed.
    ///
    /// # Errors
    /// Those of [`members_hash`].
    pub fn group(sid: [u8; ID_LEN], version: u32, members: &[Member]) -> Result<Self, Error> {
        Ok(Self { sid, members: members_hash(&sid, version, members)?, signed: true })
    }
}

/// The id of a direct conversation. Both members compute it, so that no server chooses it.
pub fn direct_sid(a: &[u8; ID_LEN], b: &[u8; ID_LEN], counter: u32) -> [u8; ID_LEN] {
    let (first, second) = if a <= b { (a, b) } else { (b, a) };
    let digest = hash(&[DIRECT_LABEL, first, second, &counter.to_be_bytes()]);
    let mut sid = [0; ID_LEN];
    for (to, from) in sid.iter_mut().zip(digest) {
        *to = from;
    }
    sid
}

/// The hash over everybody in version `version` of a conversation, `mh` in PROTOCOL 9.1.
///
/// # Errors
/// [`ApiMisuse::InvalidArgument`] unless there are 1 to [`MAX_MEMBERS`] members, sorted by id, each of them once.
pub fn members_hash(sid: &[u8; ID_LEN], version: u32, members: &[Member]) -> Result<[u8; HASH_LEN], Error> {
    let sorted = members.is_sorted_by(|a, b| a.id < b.id);
    if !sorted || members.is_empty() || members.len() > MAX_MEMBERS {
        return Err(ApiMisuse::InvalidArgument.into());
    }
    let version = version.to_be_bytes();
    let mut parts: [&[u8]; 3 + 2 * MAX_MEMBERS] = [&[]; 3 + 2 * MAX_MEMBERS];
    let head: [&[u8]; 3] = [MEMBERS_LABEL, sid, &version];
    let fields = members.iter().flat_map(|member| [&member.id[..], &member.key[..]]);
    for (to, from) in parts.iter_mut().zip(head.into_iter().chain(fields)) {
        *to = from;
    }
    Ok(hash(&parts))
}

/// [`members_hash`] of a list as it was sent.
pub(super) fn listed_members_hash(sid: &[u8; ID_LEN], version: u32, members: Members<'_>) -> [u8; HASH_LEN] {
    hash(&[MEMBERS_LABEL, sid, &version.to_be_bytes(), members.bytes()])
}

/// [`members_hash`] of a direct conversation, whichever member comes first. Its version is always 0: the hash holds both
/// keys, so that a changed key is a changed hash, and there is nobody who could announce a version.
pub fn direct_members_hash(sid: &[u8; ID_LEN], a: &Member, b: &Member) -> [u8; HASH_LEN] {
    let (first, second) = if a.id <= b.id { (a, b) } else { (b, a) };
    hash(&[MEMBERS_LABEL, sid, &0_u32.to_be_bytes(), &first.id, &first.key, &second.id, &second.key])
}

/// What a member declares about a conversation under the signature of its bundle, relayed unchanged to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Decision {
    /// The initiator founds it with these members and rules.
    Init(GroupFlags),
    /// An invited member joins. Nobody wraps a chain to a member before this was verified.
    Accept,
    /// An invited member stays away.
    Decline,
    /// A member ends it for all. Without this signature it reads "closed by the server".
    Close,
}

impl Decision {
    const MAX_LEN: usize = 16 + ID_LEN + HASH_LEN + 1;

    /// Signs this decision about `conversation` as it was founded ([`super::Membership::conversation`]).
    pub fn sign(self, keys: &BundleKeys, conversation: &Conversation) -> [u8; SIGNATURE_LEN] {
        let mut buffer = [0; Self::MAX_LEN];
        keys.signing.sign(self.message(conversation, &mut buffer))
    }

    /// Verifies that the client with this (verified) bundle decided so; whether it may, [`super::Membership::verify`] knows.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it did not.
    pub fn verify(
        self,
        bundle: &Bundle,
        conversation: &Conversation,
        signature: &[u8; SIGNATURE_LEN],
    ) -> Result<(), Error> {
        let mut buffer = [0; Self::MAX_LEN];
        verify(&bundle.verifying, self.message(conversation, &mut buffer), signature)
    }

    fn message<'b>(self, conversation: &Conversation, buffer: &'b mut [u8; Self::MAX_LEN]) -> &'b [u8] {
        let label: &[u8] = match self {
            Self::Init(_) => b"ossicle init\0",
            Self::Accept => b"ossicle accept\0",
            Self::Decline => b"ossicle decline\0",
            Self::Close => b"ossicle close\0",
        };
        let rules = match self {
            Self::Init(flags) => Some(flags.bits()),
            Self::Accept | Self::Decline | Self::Close => None,
        };
        let mut len = 0;
        let fields = label.iter().chain(&conversation.sid).chain(&conversation.members).chain(&rules);
        for (to, from) in buffer.iter_mut().zip(fields) {
            *to = *from;
            len += 1;
        }
        buffer.get(..len).unwrap_or_default()
    }
}

/// The public keys that an identity certifies for end-to-end use, once per epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The client.
    pub id: [u8; ID_LEN],
    /// SHA-256 of the SubjectPublicKeyInfo of the identity key that signs this bundle.
    pub key: [u8; HASH_LEN],
    /// One more than that of the bundle before.
    pub epoch: u32,
    /// X25519: authenticates this client as the sender of wraps (`IK`).
    pub exchange: [u8; HASH_LEN],
    /// X25519: wraps to this client are sealed to it (`SPK`).
    pub prekey: [u8; HASH_LEN],
    /// Names the prekey in wraps; another for each prekey.
    pub prekey_id: u32,
    /// Ed25519: verifies this client's announcements and decisions (`VK`).
    pub verifying: [u8; HASH_LEN],
    /// [`Bundle::hash`] of the bundle before. Zeros in the first one, and where the client does not know it any more.
    pub previous: [u8; HASH_LEN],
}

impl Bundle {
    /// The bytes that are hashed, signed and sent (PROTOCOL 8.1).
    pub fn encode(&self) -> [u8; BUNDLE_LEN] {
        let (epoch, prekey_id) = (self.epoch.to_be_bytes(), self.prekey_id.to_be_bytes());
        join(&[&self.id, &self.key, &epoch, &self.exchange, &self.prekey, &prekey_id, &self.verifying, &self.previous])
    }

    /// Reads what [`Bundle::encode`] wrote. Says nothing about who wrote it: verify [`Bundle::statement`].
    ///
    /// # Errors
    /// [`Error::Decode`] unless there are exactly [`BUNDLE_LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        let bundle = Self {
            id: reader.array()?,
            key: reader.array()?,
            epoch: reader.u32()?,
            exchange: reader.array()?,
            prekey: reader.array()?,
            prekey_id: reader.u32()?,
            verifying: reader.array()?,
            previous: reader.array()?,
        };
        reader.end()?;
        Ok(bundle)
    }

    /// SHA-256 of the encoded bundle.
    pub fn hash(&self) -> [u8; HASH_LEN] {
        hash(&[&self.encode()])
    }

    /// What the identity key signs to certify this bundle.
    pub fn statement(&self) -> Statement {
        Statement::new(BUNDLE_CONTEXT, self.hash())
    }

    /// Who this is about.
    pub const fn member(&self) -> Member {
        Member { id: self.id, key: self.key }
    }
}

/// What a client remembers of the newest bundle it has seen of a peer (PROTOCOL 8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleView {
    /// The peer, with the identity key that was pinned.
    pub member: Member,
    /// The epoch of its newest bundle.
    pub epoch: u32,
    /// The hash of its newest bundle.
    pub hash: [u8; HASH_LEN],
}

impl BundleView {
    /// The view after a first bundle, whose signature and pin were checked; also after a changed key was accepted.
    pub fn new(bundle: &Bundle) -> Self {
        Self { member: bundle.member(), epoch: bundle.epoch, hash: bundle.hash() }
    }

    /// Takes note of another bundle, whose signature was checked. On an error nothing changes and the bundle must not be
    /// used.
    ///
    /// # Errors
    /// See [`BundleError`]; [`BundleError::Forked`] and [`BundleError::KeyChanged`] are for the user to see.
    pub fn update(&mut self, bundle: &Bundle) -> Result<(), BundleError> {
        if bundle.id != self.member.id {
            return Err(BundleError::OtherMember);
        }
        if bundle.key != self.member.key {
            return Err(BundleError::KeyChanged);
        }
        if bundle.epoch < self.epoch {
            return Err(BundleError::Older);
        }
        let newer = Self::new(bundle);
        let forked = if bundle.epoch == self.epoch {
            newer.hash != self.hash
        } else {
            // The bundle of an epoch names the one of the epoch before: another name is another bundle of that epoch.
            self.epoch.checked_add(1) == Some(bundle.epoch)
                && bundle.previous != self.hash
                && bundle.previous != [0; HASH_LEN]
        };
        if forked {
            return Err(BundleError::Forked);
        }
        *self = newer;
        Ok(())
    }
}

/// Why a peer's bundle is not to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum BundleError {
    /// There are two different bundles of one epoch: somebody shows different keys to different people. An alarm.
    Forked,
    /// It belongs to another identity key than the pinned one. Nothing is sent until the user accepts the new key.
    KeyChanged,
    /// A newer one was seen before.
    Older,
    /// It is somebody else's.
    OtherMember,
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forked => "two different bundles of the same epoch exist",
            Self::KeyChanged => "the identity key changed",
            Self::Older => "a newer bundle was seen before",
            Self::OtherMember => "the bundle belongs to another client",
        })
    }
}

impl core::error::Error for BundleError {}

/// The secrets behind a client's present [`Bundle`].
pub struct BundleKeys {
    exchange: ExchangeKey,
    prekey: ExchangeKey,
    prekey_id: u32,
    signing: SigningKey,
}

impl BundleKeys {
    /// Makes all three keys new: at first, and whenever chains or prekeys were lost or restored. `prekey_id` is one that
    /// no bundle of this client had before: one more than in the directory, or 0.
    ///
    /// # Errors
    /// [`Error::Crypto`] if `rng` fails.
    pub fn generate<R: TryCryptoRng + ?Sized>(prekey_id: u32, rng: &mut R) -> Result<Self, Error> {
        let mut draw = || Secret::random(&mut *rng).map_err(|_| Error::Crypto);
        let (exchange, prekey, signing) = (draw()?, draw()?, draw()?);
        Ok(Self::new(ExchangeKey::new(exchange), ExchangeKey::new(prekey), prekey_id, SigningKey::new(signing)))
    }

    /// Takes keys that were stored.
    pub const fn new(exchange: ExchangeKey, prekey: ExchangeKey, prekey_id: u32, signing: SigningKey) -> Self {
        Self { exchange, prekey, prekey_id, signing }
    }

    /// The bundle of these keys. The keys must be durable before it is published.
    pub fn bundle(&self, member: &Member, epoch: u32, previous: [u8; HASH_LEN]) -> Bundle {
        Bundle {
            id: member.id,
            key: member.key,
            epoch,
            exchange: *self.exchange.public(),
            prekey: *self.prekey.public(),
            prekey_id: self.prekey_id,
            verifying: *self.signing.public(),
            previous,
        }
    }

    /// Replaces the prekey by a new one with the next id; the other keys stay. The former one lives on in [`Prekeys`].
    ///
    /// # Errors
    /// [`Error::Crypto`] if `rng` fails; [`ApiMisuse::InvalidArgument`] if there is no next id. Nothing changed then.
    pub fn rotate<R: TryCryptoRng + ?Sized>(&mut self, rng: &mut R) -> Result<(), Error> {
        let next = self.prekey_id.checked_add(1).ok_or(ApiMisuse::InvalidArgument)?;
        self.prekey = ExchangeKey::new(Secret::random(rng).map_err(|_| Error::Crypto)?);
        self.prekey_id = next;
        Ok(())
    }

    /// The private half that opens wraps to `bundle`, for [`Prekeys::insert`].
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] if `bundle` is not of these keys.
    pub fn prekey(&self, bundle: &Bundle) -> Result<Prekey, Error> {
        if self.prekey_id != bundle.prekey_id || self.prekey.public() != &bundle.prekey || !self.wraps_for(bundle) {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        Ok(Prekey::new(self.prekey.clone(), bundle.prekey_id, bundle.hash()))
    }

    /// The key that authenticates this client as the sender of wraps.
    pub const fn exchange_key(&self) -> &ExchangeKey {
        &self.exchange
    }

    /// The present prekey, both halves.
    pub const fn prekey_pair(&self) -> &ExchangeKey {
        &self.prekey
    }

    /// The id of the present prekey.
    pub const fn prekey_id(&self) -> u32 {
        self.prekey_id
    }

    /// The key that signs announcements and decisions.
    pub const fn signing_key(&self) -> &SigningKey {
        &self.signing
    }

    /// Whether wraps under `bundle` can be made with these keys; its prekey may be a former one.
    pub(super) fn wraps_for(&self, bundle: &Bundle) -> bool {
        self.exchange.public() == &bundle.exchange && self.signing.public() == &bundle.verifying
    }
}

/// One private half that opens wraps, with what a wrap says about it.
#[derive(Clone)]
pub struct Prekey {
    key: ExchangeKey,
    id: u32,
    bundle: [u8; HASH_LEN],
}

impl Prekey {
    /// Takes a half that was stored: its id, and the hash of the bundle that it was published in.
    pub const fn new(key: ExchangeKey, id: u32, bundle: [u8; HASH_LEN]) -> Self {
        Self { key, id, bundle }
    }

    /// Both halves.
    pub const fn key(&self) -> &ExchangeKey {
        &self.key
    }

    /// The id that wraps name it by.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The hash of the bundle that it was published in.
    pub const fn bundle(&self) -> &[u8; HASH_LEN] {
        &self.bundle
    }
}

/// The current and the [`FORMER`] former prekeys of a client. Erasing one is what begins forward secrecy.
#[derive(Default)]
pub struct Prekeys {
    /// Newest first.
    held: [Option<Prekey>; 1 + FORMER],
}

impl Prekeys {
    /// Holds nothing.
    pub const fn new() -> Self {
        Self { held: [const { None }; 1 + FORMER] }
    }

    /// Makes `prekey` the current one and erases what is older than [`FORMER`] others. One with the same id is replaced
    /// where it is.
    pub fn insert(&mut self, prekey: Prekey) {
        let known = self.held.iter_mut().flatten().find(|held| held.id == prekey.id);
        if let Some(held) = known {
            *held = prekey;
            return;
        }
        self.held.rotate_right(1);
        if let Some(newest) = self.held.first_mut() {
            *newest = Some(prekey);
        }
    }

    /// The prekey that a wrap names, if it was not erased yet.
    pub fn find(&self, id: u32) -> Option<&Prekey> {
        self.iter().find(|prekey| prekey.id == id)
    }

    /// Erases one, as hosts do 30 days after it was replaced.
    pub fn forget(&mut self, id: u32) {
        for held in &mut self.held {
            if held.as_ref().is_some_and(|prekey| prekey.id == id) {
                *held = None;
            }
        }
    }

    /// Those that are held, newest first, for whoever stores them.
    pub fn iter(&self) -> impl Iterator<Item = &Prekey> {
        self.held.iter().flatten()
    }
}

/// The concatenation of `parts`, which have `N` bytes together.
pub(super) fn join<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    debug_assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), N, "fields of fixed length");
    let mut joined = [0; N];
    for (to, from) in joined.iter_mut().zip(parts.iter().flat_map(|part| part.iter())) {
        *to = *from;
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::super::testing::{BrokenRng, Client, TestRng};
    use super::*;
    use crate::wire::testing::printed_array;

    #[test]
    fn bundles_round_trip_and_every_byte_counts() {
        let bundle = Client::new(1).bundle;
        let bytes = bundle.encode();
        assert_eq!(bytes.len(), 184);
        assert_eq!(Bundle::decode(&bytes), Ok(bundle));
        assert_eq!(Bundle::decode(&bytes[..183]), Err(Error::Decode));
        assert_eq!(Bundle::decode(&[&bytes[..], &[0]].concat()), Err(Error::Decode));
        for i in 0..bytes.len() {
            let mut other = bytes;
            other[i] ^= 1;
            let other = Bundle::decode(&other).unwrap();
            assert_ne!(other, bundle);
            assert_ne!(other.hash(), bundle.hash());
            assert_ne!(other.statement(), bundle.statement());
        }
    }

    // Computed apart, in another language.
    #[test]
    fn hashes_are_those_of_the_specification() {
        let (a, b) = (Member { id: [1; 16], key: [2; 32] }, Member { id: [3; 16], key: [4; 32] });
        let conversation = Conversation::direct(&b, &a, 5);
        assert_eq!(conversation.sid, printed_array("15.3", "sid"));
        assert_eq!(conversation.members, printed_array("15.3", "mh"));
        let bundle = Bundle {
            id: [1; 16],
            key: [2; 32],
            epoch: 9,
            exchange: [5; 32],
            prekey: [6; 32],
            prekey_id: 10,
            verifying: [7; 32],
            previous: [8; 32],
        };
        assert_eq!(bundle.hash(), printed_array("15.3", "bundle_hash"));
        assert_eq!(bundle.statement().digest(), printed_array("15.3", "bundle_digest"));
    }

    #[test]
    fn a_direct_conversation_is_the_same_from_both_sides() {
        let (a, b) = (Client::new(1).member, Client::new(2).member);
        let conversation = Conversation::direct(&a, &b, 0);
        assert_eq!(conversation, Conversation::direct(&b, &a, 0));
        assert_eq!(members_hash(&conversation.sid, 0, &[a, b]), Ok(conversation.members));
        assert_ne!(Conversation::direct(&a, &b, 1).sid, conversation.sid);
        let changed = Member { key: [9; 32], ..b };
        assert_eq!(Conversation::direct(&a, &changed, 0).sid, conversation.sid);
        assert_ne!(Conversation::direct(&a, &changed, 0).members, conversation.members);
    }

    #[test]
    fn members_are_sorted_and_single() {
        let members: Vec<_> = (0..65).map(|id| Member { id: [id; 16], key: [id; 32] }).collect();
        let wrong = Err(ApiMisuse::InvalidArgument.into());
        let good = members_hash(&[7; 16], 1, &members[..3]).unwrap();
        assert_ne!(members_hash(&[7; 16], 2, &members[..3]), Ok(good));
        assert_ne!(members_hash(&[8; 16], 1, &members[..3]), Ok(good));
        assert_ne!(members_hash(&[7; 16], 1, &members[..4]), Ok(good));
        assert_eq!(members_hash(&[7; 16], 1, &[members[1], members[0]]), wrong);
        assert_eq!(members_hash(&[7; 16], 1, &[members[0], members[0]]), wrong);
        assert_eq!(members_hash(&[7; 16], 1, &[]), wrong);
        let full = members_hash(&[7; 16], 1, &members[..64]).unwrap();
        for last in [Member { id: [99; 16], ..members[63] }, Member { key: [99; 32], ..members[63] }] {
            let other = [&members[..63], &[last]].concat();
            assert_ne!(members_hash(&[7; 16], 1, &other), Ok(full), "the last of all counts");
        }
        assert_eq!(members_hash(&[7; 16], 1, &members), wrong);
        assert!(Conversation::group([7; 16], 1, &members[..3]).unwrap().signed);
    }

    #[test]
    fn a_view_never_goes_back_and_sees_forks() {
        let mut client = Client::new(1);
        let first = client.bundle;
        let mut view = BundleView::new(&first);
        assert_eq!(view.update(&first), Ok(()));

        client.keys.rotate(&mut TestRng::new(9)).unwrap();
        let second = client.keys.bundle(&client.member, 4, first.hash());
        let refuse = |view: &mut BundleView, bundle: Bundle, error| {
            let before = *view;
            assert_eq!(view.update(&bundle), Err(error));
            assert_eq!(*view, before);
        };
        refuse(&mut view, Bundle { epoch: 3, ..second }, BundleError::Forked);
        refuse(&mut view, Bundle { previous: [1; 32], ..second }, BundleError::Forked);
        refuse(&mut view, Bundle { key: [1; 32], ..second }, BundleError::KeyChanged);
        refuse(&mut view, Bundle { id: [9; 16], ..second }, BundleError::OtherMember);
        assert_eq!(view.update(&second), Ok(()));
        refuse(&mut view, first, BundleError::Older);

        let unknowing = Bundle { epoch: 5, previous: [0; 32], ..second };
        assert_eq!(view.update(&unknowing), Ok(()));
        // What lies between was not seen, so nothing can be said about it.
        assert_eq!(view.update(&Bundle { epoch: 9, previous: [1; 32], ..second }), Ok(()));
        let last = Bundle { epoch: u32::MAX, ..second };
        assert_eq!(view.update(&last), Ok(()));
        refuse(&mut view, Bundle { epoch: 0, ..second }, BundleError::Older);
    }

    #[test]
    fn six_prekeys_are_kept_and_the_seventh_is_erased() {
        let mut client = Client::new(1);
        let mut prekeys = Prekeys::new();
        let mut bundle = client.bundle;
        for epoch in 4..11 {
            prekeys.insert(client.keys.prekey(&bundle).unwrap());
            let (exchange, verifying) = (bundle.exchange, bundle.verifying);
            client.keys.rotate(&mut TestRng::new(epoch.into())).unwrap();
            let former = bundle;
            bundle = client.keys.bundle(&client.member, epoch, former.hash());
            assert_eq!((bundle.exchange, bundle.verifying), (exchange, verifying));
            assert_ne!(bundle.prekey, former.prekey);
            assert_eq!(bundle.prekey_id, former.prekey_id + 1);
            assert!(client.keys.prekey(&former).is_err());
        }
        let ids: Vec<_> = prekeys.iter().map(Prekey::id).collect();
        assert_eq!(ids, [106, 105, 104, 103, 102, 101]);
        assert!(prekeys.find(100).is_none());
        let found = prekeys.find(103).unwrap();
        prekeys.insert(Prekey::new(found.key().clone(), 103, [1; 32]));
        assert_eq!(prekeys.iter().count(), 6);
        assert_eq!(prekeys.find(103).unwrap().bundle(), &[1; 32]);
        prekeys.forget(103);
        assert!(prekeys.find(103).is_none());
        assert_eq!(prekeys.iter().count(), 5);
    }

    #[test]
    fn decisions_are_of_one_member_about_one_version() {
        let (a, b) = (Client::new(1), Client::new(2));
        let conversation = Conversation::group([7; 16], 1, &[a.member, b.member]).unwrap();
        let all = [
            Decision::Init(GroupFlags::NONE),
            Decision::Init(GroupFlags::CREATOR_CLOSES),
            Decision::Accept,
            Decision::Decline,
            Decision::Close,
        ];
        for decision in all {
            let signature = decision.sign(&a.keys, &conversation);
            assert_eq!(decision.verify(&a.bundle, &conversation, &signature), Ok(()));
            assert_eq!(decision.verify(&b.bundle, &conversation, &signature), Err(Error::Crypto));
            let other = Conversation::group([7; 16], 2, &[a.member, b.member]).unwrap();
            assert_eq!(decision.verify(&a.bundle, &other, &signature), Err(Error::Crypto));
            let other = Conversation { sid: [8; 16], ..conversation };
            assert_eq!(decision.verify(&a.bundle, &other, &signature), Err(Error::Crypto));
            for other in all.into_iter().filter(|other| *other != decision) {
                assert_eq!(other.verify(&a.bundle, &conversation, &signature), Err(Error::Crypto));
            }
        }
    }

    #[test]
    fn a_broken_source_of_randomness_changes_nothing() {
        assert!(matches!(BundleKeys::generate(0, &mut BrokenRng), Err(Error::Crypto)));
        let mut client = Client::new(1);
        assert_eq!(client.keys.rotate(&mut BrokenRng), Err(Error::Crypto));
        assert!(client.keys.prekey(&client.bundle).is_ok());
    }

    #[test]
    fn keys_have_a_prekey_for_their_own_bundle_only() {
        let (client, other) = (Client::new(1), Client::new(2));
        let bundle = client.bundle;
        assert_eq!((client.keys.prekey_id(), client.keys.prekey(&bundle).unwrap().id()), (100, 100));
        for changed in [
            Bundle { prekey_id: 101, ..bundle },
            Bundle { prekey: other.bundle.prekey, ..bundle },
            Bundle { exchange: other.bundle.exchange, ..bundle },
            Bundle { verifying: other.bundle.verifying, ..bundle },
        ] {
            assert!(
                matches!(client.keys.prekey(&changed), Err(Error::Misuse(ApiMisuse::InvalidArgument))),
                "{changed:?}"
            );
        }
    }

    #[test]
    fn every_error_says_what_it_is() {
        use std::string::ToString;

        let errors = [BundleError::Forked, BundleError::KeyChanged, BundleError::Older, BundleError::OtherMember];
        let texts = errors.map(|error| error.to_string());
        for (index, text) in texts.iter().enumerate() {
            assert!(!text.is_empty() && !texts[..index].contains(text), "{text}");
        }
    }
}
