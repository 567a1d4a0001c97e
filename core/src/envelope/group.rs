//! Groups: what an invitation says, held against the reader's own pins, and the name that only members read.
//!
//! Lists come in as they stood in a record, and pins from the caller; decisions come in as signatures and go out as yes or
//! no. A [`Membership`] exists only where every key in the list is the one that the reader has pinned, so that whoever
//! holds one means the same group as its creator. Nothing here is sent or stored.

use core::fmt;

use rand_core::TryCryptoRng;

use super::bundle::{Bundle, BundleKeys, Conversation, Decision, Prekey, join, listed_members_hash};
use crate::crypto::{HASH_LEN, SIGNATURE_LEN, TAG_LEN, hpke_open, hpke_seal};
use crate::error::{ApiMisuse, Error};
use crate::wire::{GroupFlags, ID_LEN, Invite, MAX_NAME_LEN, Member, Members, SEALED_NAME_LEN};

/// Bytes of an opened name: its length, and the name padded with zeros to the longest one.
const NAME_TEXT_LEN: usize = 1 + MAX_NAME_LEN;
const NAME_INFO_LEN: usize = 19 + ID_LEN + HASH_LEN + ID_LEN + 4;

/// The version of a group: the sum of its members' key epochs. Everybody who has accepted the same keys computes the same
/// one, so that nobody announces it. `None` if the sum is no u32.
pub fn group_version(key_epochs: impl IntoIterator<Item = u32>) -> Option<u32> {
    key_epochs.into_iter().try_fold(0_u32, u32::checked_add)
}

/// What a group was founded on: its members, its creator, its rules. Borrows the list.
///
/// All decisions of its members are about this, also after one of them replaced his identity key; chains are about the
/// present keys ([`Conversation::group`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership<'d> {
    creator: Member,
    flags: GroupFlags,
    members: Members<'d>,
    conversation: Conversation,
}

impl<'d> Membership<'d> {
    /// Holds a list against the reader's pins. `pin` says which identity key the reader has accepted for a client, itself
    /// included, and that key's epoch.
    ///
    /// # Errors
    /// See [`MembershipError`]: the reader must not answer then, but may ask again when the pin has changed.
    pub fn new(
        sid: [u8; ID_LEN],
        creator: &[u8; ID_LEN],
        flags: GroupFlags,
        members: Members<'d>,
        me: &[u8; ID_LEN],
        mut pin: impl FnMut(&[u8; ID_LEN]) -> Option<([u8; HASH_LEN], u32)>,
    ) -> Result<Self, MembershipError> {
        let creator = members.find(creator).ok_or(MembershipError::NoCreator)?;
        if members.find(me).is_none() {
            return Err(MembershipError::NotAMember);
        }
        let mut version = Some(0_u32);
        for member in members.iter() {
            let (key, epoch) = pin(&member.id).ok_or(MembershipError::Unknown(member.id))?;
            if key != member.key {
                return Err(MembershipError::KeyChanged(member.id));
            }
            version = version.and_then(|sum| sum.checked_add(epoch));
        }
        let version = version.ok_or(MembershipError::Version)?;
        Ok(Self::founded(sid, creator, flags, members, version))
    }

    /// [`Membership::new`] of what an invitation says.
    ///
    /// # Errors
    /// Those of [`Membership::new`].
    pub fn of(
        invite: &Invite<'d>,
        me: &[u8; ID_LEN],
        pin: impl FnMut(&[u8; ID_LEN]) -> Option<([u8; HASH_LEN], u32)>,
    ) -> Result<Self, MembershipError> {
        Self::new(invite.sid, &invite.creator, invite.flags, invite.members, me, pin)
    }

    /// What was once checked by [`Membership::new`] and stored since: `creator` is one of `members`, and `version` the sum
    /// of their key epochs then.
    pub fn founded(sid: [u8; ID_LEN], creator: Member, flags: GroupFlags, members: Members<'d>, version: u32) -> Self {
        let conversation = Conversation { sid, members: listed_members_hash(&sid, version, members), signed: true };
        Self { creator, flags, members, conversation }
    }

    /// The group as it was founded. Chains begin in it, until a member replaces its identity key.
    pub const fn conversation(&self) -> &Conversation {
        &self.conversation
    }

    /// Who founded it.
    pub const fn creator(&self) -> &Member {
        &self.creator
    }

    /// Its rules.
    pub const fn flags(&self) -> GroupFlags {
        self.flags
    }

    /// Its members, with the keys that they had when it was founded.
    pub const fn members(&self) -> Members<'d> {
        self.members
    }

    /// Verifies that the member with this bundle decided so, and that it may. The bundle was verified under the key that
    /// is pinned now.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it is no member, if it founded nothing, if the rules do not let it close, or if the signature
    /// is another's or about something else.
    pub fn verify(&self, decision: Decision, bundle: &Bundle, signature: &[u8; SIGNATURE_LEN]) -> Result<(), Error> {
        let is_creator = bundle.id == self.creator.id;
        let may = match decision {
            Decision::Init(flags) => is_creator && flags == self.flags,
            Decision::Accept | Decision::Decline => true,
            Decision::Close => is_creator || !self.flags.only_creator_closes(),
        };
        if !may || self.members.find(&bundle.id).is_none() {
            return Err(Error::Crypto);
        }
        decision.verify(bundle, &self.conversation, signature)
    }

    /// Seals the group's name to the invitee with this bundle. `keys` are the creator's.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] unless the name has 1 to [`MAX_NAME_LEN`] bytes and `to` is an invitee;
    /// [`Error::Crypto`] if `rng` fails or the prekey is no key.
    pub fn seal_name<R: TryCryptoRng + ?Sized>(
        &self,
        name: &str,
        keys: &BundleKeys,
        to: &Bundle,
        rng: &mut R,
    ) -> Result<[u8; SEALED_NAME_LEN], Error> {
        let invited = to.id != self.creator.id && self.members.find(&to.id) == Some(to.member());
        let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
        if !invited || name.is_empty() || name.len() > MAX_NAME_LEN {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let mut text = [0; NAME_TEXT_LEN];
        for (to, from) in text.iter_mut().zip([len].iter().chain(name.as_bytes())) {
            *to = *from;
        }
        let info = self.name_info(to.prekey_id);
        let (enc, tag) = hpke_seal(keys.exchange_key(), &to.prekey, &info, &mut text, rng)?;
        Ok(join(&[&to.prekey_id.to_be_bytes(), &enc, &text, &tag]))
    }

    /// Opens the group's name into `room` with the prekey that it names ([`name_prekey_id`]). `creator` is the creator's
    /// verified bundle, whichever it has now.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it was not sealed by the creator, to this prekey, for this group, or is no name. `room` holds
    /// nothing then.
    pub fn open_name<'r>(
        &self,
        sealed: &[u8; SEALED_NAME_LEN],
        prekey: &Prekey,
        creator: &Bundle,
        room: &'r mut [u8; 1 + MAX_NAME_LEN],
    ) -> Result<&'r str, Error> {
        let opened = self.open_name_text(sealed, prekey, creator, room);
        if opened.is_err() {
            room.fill(0);
        }
        opened?;
        let (len, text) = room.split_first().ok_or(Error::Crypto)?;
        let name = text.get(..usize::from(*len)).ok_or(Error::Crypto)?;
        core::str::from_utf8(name).map_err(|_| Error::Crypto)
    }

    fn open_name_text(
        &self,
        sealed: &[u8; SEALED_NAME_LEN],
        prekey: &Prekey,
        creator: &Bundle,
        room: &mut [u8; NAME_TEXT_LEN],
    ) -> Result<(), Error> {
        let (id, rest) = sealed.split_first_chunk::<4>().ok_or(Error::Crypto)?;
        let (enc, rest) = rest.split_first_chunk::<HASH_LEN>().ok_or(Error::Crypto)?;
        let (text, rest) = rest.split_first_chunk::<NAME_TEXT_LEN>().ok_or(Error::Crypto)?;
        let tag = rest.first_chunk::<TAG_LEN>().ok_or(Error::Crypto)?;
        if u32::from_be_bytes(*id) != prekey.id() || creator.id != self.creator.id {
            return Err(Error::Crypto);
        }
        *room = *text;
        hpke_open(prekey.key(), &creator.exchange, &self.name_info(prekey.id()), enc, room, tag)?;
        // What is behind the name must be nothing, so that two lines of one name differ in nothing that is hidden.
        let (len, text) = room.split_first().ok_or(Error::Crypto)?;
        let (name, padding) = text.split_at_checked((*len).into()).ok_or(Error::Crypto)?;
        let is_name = !name.is_empty() && core::str::from_utf8(name).is_ok();
        if is_name && padding.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(Error::Crypto) }
    }

    fn name_info(&self, prekey_id: u32) -> [u8; NAME_INFO_LEN] {
        let Conversation { sid, members, .. } = &self.conversation;
        join(&[b"ossicle group name\0", sid, members, &self.creator.id, &prekey_id.to_be_bytes()])
    }
}

/// The id of the prekey that a sealed name was sealed to.
pub fn name_prekey_id(sealed: &[u8; SEALED_NAME_LEN]) -> u32 {
    sealed.first_chunk().map_or(0, |id| u32::from_be_bytes(*id))
}

/// Why an invitation is not to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum MembershipError {
    /// Its creator is no member.
    NoCreator,
    /// The reader is no member.
    NotAMember,
    /// No key is pinned for the client with this id: look it up, and ask again.
    Unknown([u8; ID_LEN]),
    /// The client with this id has another key than the pinned one. Nothing is answered until the user accepts it, and
    /// nothing at all if it was replaced since the group was founded.
    KeyChanged([u8; ID_LEN]),
    /// The members' key epochs have no sum.
    Version,
}

impl fmt::Display for MembershipError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoCreator => "the creator of the group is none of its members",
            Self::NotAMember => "the group is one of others",
            Self::Unknown(_) => "a member of the group is unknown",
            Self::KeyChanged(_) => "a member of the group has another identity key than the pinned one",
            Self::Version => "the key epochs of the members have no sum",
        })
    }
}

impl core::error::Error for MembershipError {}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::super::testing::{BrokenRng, Client, TestRng};
    use super::*;
    use crate::crypto::{ExchangeKey, Secret, SigningKey};
    use crate::wire::testing::{printed, printed_array};
    use crate::wire::{Fixed, Message};

    const SID: [u8; ID_LEN] = [7; ID_LEN];

    fn list(clients: &[&Client]) -> Vec<u8> {
        clients.iter().flat_map(|client| client.member.encode()).collect()
    }

    /// A group of clients 1, 2 and 3 that the first one founded, and everybody's pins.
    struct Group {
        clients: [Client; 3],
        lines: Vec<u8>,
    }

    impl Group {
        fn new() -> Self {
            let clients = [1, 2, 3].map(Client::new);
            let lines = list(&clients.each_ref());
            Self { clients, lines }
        }

        fn membership(&self) -> Membership<'_> {
            self.seen_by(1, GroupFlags::NONE, &self.lines).unwrap()
        }

        /// What the member in this place makes of a list.
        fn seen_by<'d>(
            &self,
            place: usize,
            flags: GroupFlags,
            lines: &'d [u8],
        ) -> Result<Membership<'d>, MembershipError> {
            let members = Members::new(lines).unwrap();
            let creator = self.clients[0].member.id;
            Membership::new(SID, &creator, flags, members, &self.clients[place].member.id, |id| self.pin(id))
        }

        /// Everybody knows everybody, and client 4, who is in no group yet.
        fn pin(&self, id: &[u8; ID_LEN]) -> Option<([u8; HASH_LEN], u32)> {
            let stranger = Client::new(4);
            let known = self.clients.iter().chain([&stranger]).find(|client| client.member.id == *id)?;
            Some((known.member.key, u32::from(id[0])))
        }
    }

    fn open(
        membership: &Membership<'_>,
        sealed: &[u8; SEALED_NAME_LEN],
        reader: &Client,
        creator: &Bundle,
    ) -> Option<Vec<u8>> {
        let mut room = [0xee; 1 + MAX_NAME_LEN];
        let opened =
            membership.open_name(sealed, &reader.prekey(), creator, &mut room).map(|name| name.as_bytes().to_vec());
        if opened.is_err() {
            assert_eq!(room, [0; 1 + MAX_NAME_LEN], "nothing of it is left");
        }
        opened.ok()
    }

    // What PROTOCOL prints was made apart, in another language, from its text.
    #[test]
    fn bytes_are_those_of_the_specification() {
        let keys = |byte: u8, id| {
            let [exchange, prekey, signing] = [byte, byte + 1, byte + 2].map(|byte| Secret::new([byte; 32]));
            BundleKeys::new(ExchangeKey::new(exchange), ExchangeKey::new(prekey), id, SigningKey::new(signing))
        };
        let members = [1, 3, 5].map(|id| Member { id: [id; 16], key: [id + 1; 32] });
        let (a, b, c) = (keys(0x51, 10), keys(0x61, 4), keys(0x81, 7));
        let bundles = [(&a, 9), (&b, 3), (&c, 1)];
        let mut bundles =
            bundles.iter().zip(members).map(|((keys, epoch), member)| keys.bundle(&member, *epoch, [0; 32]));
        let [bundle_a, bundle_b, bundle_c] = [(); 3].map(|()| bundles.next().unwrap());
        assert_eq!(bundle_c.encode(), printed_array("15.6", "bundle_C"));

        let payload = printed("15.6", "Invite");
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("an invitation") };
        let invite = Invite::decode(body).unwrap();
        assert!(invite.members.iter().eq(members));
        let pin = |id: &[u8; 16]| {
            let pinned = members.iter().find(|member| member.id == *id)?;
            Some((pinned.key, u32::from(*id == [1; 16])))
        };
        let membership = Membership::of(&invite, &[3; 16], pin).unwrap();
        assert_eq!(membership.conversation().members, printed_array("15.6", "mh"));
        assert_eq!(membership.conversation(), &Conversation::group([0x70; 16], 1, &members).unwrap());
        assert_eq!((membership.creator(), membership.flags()), (&members[0], GroupFlags::CREATOR_CLOSES));
        let rules = Decision::Init(GroupFlags::CREATOR_CLOSES);
        assert_eq!(invite.signature.0, &printed_array("15.6", "init"));
        for (name, decision, keys, bundle) in [
            ("init", rules, &a, &bundle_a),
            ("accept_B", Decision::Accept, &b, &bundle_b),
            ("decline_C", Decision::Decline, &c, &bundle_c),
            ("close_A", Decision::Close, &a, &bundle_a),
        ] {
            let signature = printed_array("15.6", name);
            assert_eq!(decision.sign(keys, membership.conversation()), signature, "{name}");
            assert_eq!(membership.verify(decision, bundle, &signature), Ok(()), "{name}");
        }
        assert_eq!(membership.name_info(4), printed_array("15.6", "info_B"));
        assert_eq!(name_prekey_id(invite.name.0), 4);
        let mut room = [0; 1 + MAX_NAME_LEN];
        let prekey = b.prekey(&bundle_b).unwrap();
        assert_eq!(membership.open_name(invite.name.0, &prekey, &bundle_a, &mut room), Ok("greenhouse"));
        assert_eq!(room, printed_array("15.6", "text"));
    }

    #[test]
    fn a_list_is_held_against_ones_own_pins() {
        let group = Group::new();
        let [a, b, c] = group.clients.each_ref();
        let membership = group.membership();
        assert_eq!(membership.creator(), &a.member);
        assert_eq!(membership.conversation(), &Conversation::group(SID, 6, &[a.member, b.member, c.member]).unwrap());
        assert_eq!(group_version([1, 2, 3]), Some(6));
        assert_eq!(
            (group_version([]), group_version([u32::MAX, 0]), group_version([u32::MAX, 1])),
            (Some(0), Some(u32::MAX), None)
        );
        for place in 0..3 {
            assert_eq!(group.seen_by(place, GroupFlags::NONE, &group.lines), Ok(membership), "{place}");
        }

        let d = Client::new(4);
        let unknown = Client::new(5);
        let swapped = Client { member: Member { key: [9; 32], ..c.member }, ..Client::new(3) };
        for (clients, error) in [
            (&[b, c][..], MembershipError::NoCreator),
            (&[a, c], MembershipError::NotAMember),
            (&[a, b, &unknown], MembershipError::Unknown([5; 16])),
            (&[a, b, &swapped], MembershipError::KeyChanged([3; 16])),
        ] {
            assert_eq!(group.seen_by(1, GroupFlags::NONE, &list(clients)), Err(error));
        }
        let highest = |id: &[u8; ID_LEN]| Some((group.pin(id)?.0, u32::MAX / 2));
        let sum = Membership::new(SID, &a.member.id, GroupFlags::NONE, membership.members(), &b.member.id, highest);
        assert_eq!(sum, Err(MembershipError::Version));
        // Who is known may be anybody's member: only the creator's signature says that he is one of this group.
        let with_listener = list(&[a, b, c, &d]);
        assert!(group.seen_by(1, GroupFlags::NONE, &with_listener).is_ok());
    }

    #[test]
    fn a_server_that_changes_a_group_is_noticed() {
        let group = Group::new();
        let [a, b, c] = group.clients.each_ref();
        let d = Client::new(4);
        let founded = group.membership();
        let init = Decision::Init(GroupFlags::NONE).sign(&a.keys, founded.conversation());
        let accept = Decision::Accept.sign(&c.keys, founded.conversation());
        let close = Decision::Close.sign(&c.keys, founded.conversation());
        let name = founded.seal_name("greenhouse", &a.keys, &b.bundle, &mut TestRng::new(9)).unwrap();
        assert_eq!(founded.verify(Decision::Init(GroupFlags::NONE), &a.bundle, &init), Ok(()));
        assert_eq!(founded.verify(Decision::Accept, &c.bundle, &accept), Ok(()));
        assert_eq!(founded.verify(Decision::Close, &c.bundle, &close), Ok(()));
        assert_eq!(open(&founded, &name, b, &a.bundle).as_deref(), Some(&b"greenhouse"[..]));

        let (added, exchanged, removed) = (list(&[a, b, c, &d]), list(&[a, b, &d]), list(&[a, b]));
        let mut others: Vec<_> =
            [&added, &exchanged, &removed].map(|lines| group.seen_by(1, GroupFlags::NONE, lines).unwrap()).into();
        others.push(group.seen_by(1, GroupFlags::CREATOR_CLOSES, &group.lines).unwrap());
        others.push(Membership::founded([8; 16], a.member, GroupFlags::NONE, founded.members(), 6));
        others.push(Membership::founded(SID, a.member, GroupFlags::NONE, founded.members(), 7));
        others.push(Membership::founded(SID, c.member, GroupFlags::NONE, founded.members(), 6));
        for (which, shown) in others.iter().enumerate() {
            let rules = Decision::Init(shown.flags());
            assert!(shown.verify(rules, &a.bundle, &init).is_err(), "{which}: the invitation is forged");
            // Rules are the creator's alone; a member who answers means the group, and so does whoever closes it.
            if shown.conversation() != founded.conversation() {
                assert!(shown.verify(Decision::Accept, &c.bundle, &accept).is_err(), "{which}: an answer elsewhere");
                assert!(shown.verify(Decision::Close, &c.bundle, &close).is_err(), "{which}: another group's end");
            }
            if shown.conversation() != founded.conversation() || shown.creator() != founded.creator() {
                assert_eq!(open(shown, &name, b, &a.bundle), None, "{which}: the name is of another group");
            }
        }
    }

    #[test]
    fn nobody_decides_for_another_or_against_the_rules() {
        let group = Group::new();
        let [a, b, _] = group.clients.each_ref();
        let stranger = Client::new(4);
        let (open, closed) = (group.membership(), group.seen_by(1, GroupFlags::CREATOR_CLOSES, &group.lines).unwrap());
        let all = [Decision::Init(GroupFlags::NONE), Decision::Accept, Decision::Decline, Decision::Close];
        for decision in all {
            let by_b = decision.sign(&b.keys, open.conversation());
            let is_init = matches!(decision, Decision::Init(_));
            assert_eq!(open.verify(decision, &b.bundle, &by_b).is_err(), is_init, "{decision:?}");
            assert!(open.verify(decision, &a.bundle, &by_b).is_err(), "{decision:?} for another");
            for other in all.into_iter().filter(|other| *other != decision) {
                assert!(open.verify(other, &b.bundle, &by_b).is_err(), "{decision:?} as {other:?}");
            }
            let by_stranger = decision.sign(&stranger.keys, open.conversation());
            assert!(open.verify(decision, &stranger.bundle, &by_stranger).is_err(), "{decision:?} by a stranger");
        }
        let by = |client: &Client| Decision::Close.sign(&client.keys, closed.conversation());
        assert_eq!(closed.verify(Decision::Close, &a.bundle, &by(a)), Ok(()));
        assert_eq!(closed.verify(Decision::Close, &b.bundle, &by(b)), Err(Error::Crypto));
        // With new keys of his bundle (PROTOCOL 8.4) a member decides anew, and what he said before is nobody's word any more.
        let renewed = BundleKeys::generate(900, &mut TestRng::new(90)).unwrap();
        let bundle = renewed.bundle(&b.member, 4, b.bundle.hash());
        let (before, after) =
            (Decision::Accept.sign(&b.keys, open.conversation()), Decision::Accept.sign(&renewed, open.conversation()));
        assert_eq!(open.verify(Decision::Accept, &bundle, &before), Err(Error::Crypto));
        assert_eq!(open.verify(Decision::Accept, &bundle, &after), Ok(()));
    }

    #[test]
    fn a_name_is_for_one_invitee() {
        let group = Group::new();
        let [a, b, c] = group.clients.each_ref();
        let membership = group.membership();
        let longest = "x".repeat(MAX_NAME_LEN);
        for name in ["g", "Gewächshaus 2", &longest] {
            let sealed = membership.seal_name(name, &a.keys, &b.bundle, &mut TestRng::new(9)).unwrap();
            assert_eq!(name_prekey_id(&sealed), b.bundle.prekey_id);
            assert_eq!(open(&membership, &sealed, b, &a.bundle).as_deref(), Some(name.as_bytes()));
            assert_eq!(open(&membership, &sealed, c, &a.bundle), None, "another member");
            assert_eq!(open(&membership, &sealed, b, &c.bundle), None, "as another member's");
            assert!(!sealed.windows(name.len().max(2)).any(|window| window == name.as_bytes()));
            // A later bundle of the creator's has the same exchange key.
            let mut later = Client::new(1);
            later.keys.rotate(&mut TestRng::new(8)).unwrap();
            let later = later.keys.bundle(&a.member, 4, a.bundle.hash());
            assert_eq!(open(&membership, &sealed, b, &later).as_deref(), Some(name.as_bytes()));
        }
        let sealed = membership.seal_name("greenhouse", &a.keys, &b.bundle, &mut TestRng::new(9)).unwrap();
        for place in 0..SEALED_NAME_LEN {
            let mut other = sealed;
            other[place] ^= 1;
            assert_eq!(open(&membership, &other, b, &a.bundle), None, "byte {place}");
        }
        // A member who is not the creator seals with his own key, whatever he says.
        let forged = membership.seal_name("greenhouse", &c.keys, &b.bundle, &mut TestRng::new(9)).unwrap();
        assert_eq!(open(&membership, &forged, b, &a.bundle), None);
    }

    #[test]
    fn what_is_no_name_is_not_shown() {
        let group = Group::new();
        let [a, b, _] = group.clients.each_ref();
        let membership = group.membership();
        let info = membership.name_info(b.bundle.prekey_id);
        let seal = |text: [u8; NAME_TEXT_LEN]| {
            let mut text = text;
            let sealed =
                hpke_seal(a.keys.exchange_key(), &b.bundle.prekey, &info, &mut text, &mut TestRng::new(9)).unwrap();
            join(&[&b.bundle.prekey_id.to_be_bytes(), &sealed.0, &text, &sealed.1])
        };
        let text = |len: u8, name: &[u8]| {
            let mut text = [0; NAME_TEXT_LEN];
            text[0] = len;
            text[1..=name.len()].copy_from_slice(name);
            text
        };
        assert!(open(&membership, &seal(text(3, b"one")), b, &a.bundle).is_some());
        for (why, bad) in [
            ("no name", text(0, b"")),
            ("a name behind the name", text(3, b"one two")),
            ("a byte at the very end", text(3, &[&b"one"[..], &[0; 60], &[1]].concat())),
            ("longer than all there is", text(65, &[b'x'; 64])),
            ("not UTF-8", text(2, &[0xc3, 0x28])),
            ("cut in a character", text(1, "ä".as_bytes())),
        ] {
            assert_eq!(open(&membership, &seal(bad), b, &a.bundle), None, "{why}");
        }
        let seal = |name: &str, to: &Bundle| membership.seal_name(name, &a.keys, to, &mut TestRng::new(9));
        let wrong = Err(ApiMisuse::InvalidArgument.into());
        assert_eq!(seal("", &b.bundle), wrong);
        assert_eq!(seal(&"x".repeat(65), &b.bundle), wrong);
        assert_eq!(seal(&"x".repeat(300), &b.bundle), wrong);
        assert_eq!(seal("one", &a.bundle), wrong, "to the creator");
        assert_eq!(seal("one", &Client::new(4).bundle), wrong, "to a stranger");
        assert_eq!(seal("one", &Bundle { key: [9; 32], ..b.bundle }), wrong, "to another key");
        assert_eq!(membership.seal_name("one", &a.keys, &b.bundle, &mut BrokenRng), Err(Error::Crypto));
        assert_eq!(seal("one", &Bundle { prekey: [0; 32], ..b.bundle }), Err(Error::Crypto), "to no key");
    }

    #[test]
    fn an_invitation_is_read_as_it_came() {
        let group = Group::new();
        let [a, b, _] = group.clients.each_ref();
        let founded = group.membership();
        let signature = Decision::Init(GroupFlags::NONE).sign(&a.keys, founded.conversation());
        let name = founded.seal_name("greenhouse", &a.keys, &b.bundle, &mut TestRng::new(9)).unwrap();
        let invite = Invite {
            sid: SID,
            creator: a.member.id,
            flags: GroupFlags::NONE,
            signature: Fixed(&signature),
            members: founded.members(),
            name: Fixed(&name),
        };
        let mut buffer = [0; 512];
        let Message::Other(body) = invite.encode(&mut buffer).unwrap() else { panic!("a body") };
        let read = Invite::decode(body).unwrap();
        assert_eq!(Membership::of(&read, &b.member.id, |id| group.pin(id)), Ok(founded));
        assert_eq!(Membership::of(&read, &[9; 16], |id| group.pin(id)), Err(MembershipError::NotAMember));
    }

    #[test]
    fn every_error_says_what_it_is() {
        use std::string::ToString;

        let errors = [
            MembershipError::NoCreator,
            MembershipError::NotAMember,
            MembershipError::Unknown([1; 16]),
            MembershipError::KeyChanged([1; 16]),
            MembershipError::Version,
        ];
        let texts = errors.map(|error| error.to_string());
        for (index, text) in texts.iter().enumerate() {
            assert!(!text.is_empty() && !texts[..index].contains(text), "{text}");
        }
    }
}
