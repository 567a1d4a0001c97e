//! The chains of a group on a device: everybody's in the fewest bytes, and none of what a device can do without.

use rand_core::TryCryptoRng;

use super::{
    AcceptError, CHAIN_ID_LEN, EnvelopeHeader, Incoming, MAX_MESSAGES, OpenError, Opened, Outgoing, Receipt,
    ReceiptVerifier, SALT_LEN, SealError, Sealed, Step, UNREADABLE, VACANT, sealed_parts,
};
use crate::crypto::{Aead, HASH_LEN, Secret};
use crate::envelope::bundle::{Bundle, BundleKeys, Conversation, Prekey};
use crate::error::{ApiMisuse, Error, Reason};
use crate::wire::{ID_LEN, Member, Rung};

/// All chains of one member of a group: its own, and those of `OTHERS` other members, each in a place that the caller
/// gives to its member. A group of five takes 768 bytes ([`GroupChains::LEN`]).
///
/// For devices. What a [`super::ReceivingChain`] can do and this cannot:
///
/// - It holds no keys of skipped messages: a message that comes before the one before it is refused with [`Reason::Gap`],
///   and its sender starts a new chain. Servers keep each sender's order, so that this is rare.
/// - It remembers the salt of the last message of each member. That one is known as a duplicate, or as
///   [`Reason::Rewound`]; what was before it is [`OpenError::Old`].
/// - It makes receipts of single messages.
/// - It is never stored: a device makes its bundle's keys new at each start (PROTOCOL 8.4).
///
/// Ids and pinned keys of the members are not in it, nor is the conversation: a device has them anyway, and gives them to
/// the calls that need them.
pub struct GroupChains<const OTHERS: usize> {
    own: Outgoing,
    others: [Follower; OTHERS],
}

impl<const OTHERS: usize> GroupChains<OTHERS> {
    /// Bytes that it takes, on every platform.
    pub const LEN: usize = size_of::<Self>();

    /// No chains yet: nothing can be sealed or opened.
    pub const fn vacant() -> Self {
        Self { own: Outgoing::vacant(), others: [const { Follower::vacant() }; OTHERS] }
    }

    /// Starts the own chain anew, or for the first time. Nobody can read it before it was wrapped to him; the chains of
    /// the others stand. On an error nothing has changed.
    ///
    /// # Errors
    /// [`Error::Crypto`] if `rng` fails; [`ApiMisuse::InvalidArgument`] after 2^32 chains, or unless `group` is signed.
    pub fn start<R: TryCryptoRng + ?Sized>(
        &mut self,
        me: &Member,
        group: &Conversation,
        rng: &mut R,
    ) -> Result<(), Error> {
        let epoch = match self.own.epoch {
            NEVER => 0,
            before => before.wrapping_add(1),
        };
        if epoch == NEVER || !group.signed {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        self.own = Outgoing::start(me, group, epoch, rng)?;
        Ok(())
    }

    /// Erases the chain in this place, with what was seen of it: only when all of the bundle's keys are made new, too.
    pub fn clear(&mut self, place: usize) {
        if let Some(chain) = self.others.get_mut(place) {
            *chain = Follower::vacant();
        }
    }

    /// Zeros, to be [`reset`](Self::reset) before anything else is done with them.
    pub(crate) const fn blank() -> Self {
        const NOTHING: Secret<HASH_LEN> = Secret::new([0; HASH_LEN]);
        let receipts = ReceiptVerifier { chain_id: [0; CHAIN_ID_LEN], context: [0; HASH_LEN], master: NOTHING };
        Self {
            own: Outgoing { epoch: 0, next: 0, key: NOTHING, signing: NOTHING, receipts },
            others: [const { Follower::blank() }; OTHERS],
        }
    }

    /// Erases all chains: for another group.
    pub fn reset(&mut self) {
        self.own = Outgoing::vacant();
        for chain in &mut self.others {
            *chain = Follower::vacant();
        }
    }

    /// The own chain's name. One that another sender already has is refused by the server: start again.
    pub const fn chain_id(&self) -> &[u8; CHAIN_ID_LEN] {
        self.own.receipts.chain_id()
    }

    /// The number of the next message that is sealed; [`MAX_MESSAGES`] if there is none, and a chain is to be started.
    pub const fn next(&self) -> u32 {
        self.own.next
    }

    /// Wraps the own chain, from its present number on, like [`super::SendingChain::wrap`].
    ///
    /// # Errors
    /// Those of [`super::SendingChain::wrap`].
    pub fn wrap<R: TryCryptoRng + ?Sized>(
        &self,
        group: &Conversation,
        (keys, own): (&BundleKeys, &Bundle),
        (to, to_bundle): (&Member, &Bundle),
        rng: &mut R,
        out: &mut [u8],
    ) -> Result<usize, SealError> {
        self.own.wrap(&group.sid, (keys, own), (to, to_bundle), rng, out)
    }

    /// Seals the next message for everybody, signed, like [`super::SendingChain::seal`].
    ///
    /// # Errors
    /// Those of [`super::SendingChain::seal`].
    pub fn seal<A: Aead>(&mut self, kind: u8, body: &[u8], out: &mut [u8]) -> Result<Sealed, SealError> {
        self.own.seal::<A>(true, kind, body, out)
    }

    /// Verifies that `recipient` made this receipt, like [`super::SendingChain::verify_receipt`].
    ///
    /// # Errors
    /// [`Error::Crypto`] if it did not.
    pub fn verify_receipt(
        &self,
        recipient: &[u8; ID_LEN],
        receipt: &Receipt,
        salt_of_to: &[u8; SALT_LEN],
    ) -> Result<(), Error> {
        self.own.verify_receipt(recipient, receipt, salt_of_to)
    }

    /// Accepts a wrap into the place of `from`, instead of the chain that is there, like
    /// [`super::ReceivingChain::replace`].
    ///
    /// # Errors
    /// Those of [`super::ReceivingChain::accept`]; [`AcceptError::Unreadable`], too, if there is no such place, if `group`
    /// is not signed, or if the chain has the name of the own or of another member's chain.
    pub fn accept(
        &mut self,
        place: usize,
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        group: &Conversation,
    ) -> Result<(), AcceptError> {
        let taken = super::WrapHeader::decode(wrap).is_ok_and(|header| {
            let others = self.others.iter().enumerate().filter(|(other, _)| *other != place);
            header.chain_id == *self.chain_id()
                || others.into_iter().any(|(_, other)| other.chain.is_of(&header.chain_id))
        });
        match self.others.get_mut(place) {
            Some(chain) if group.signed && !taken => chain.take(wrap, prekey, from, from_bundle, group),
            _ => {
                wrap.fill(0);
                Err(AcceptError::Unreadable)
            }
        }
    }

    /// Opens an envelope in place, and says from the member of which place it is.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing has changed then, and `envelope` holds no plaintext.
    pub fn open<'d, A: Aead>(&mut self, envelope: &'d mut [u8]) -> Result<(usize, Opened<'d>), OpenError> {
        let header = EnvelopeHeader::decode(envelope).map_err(|_| UNREADABLE)?;
        let place = self.place_of(&header.chain_id).ok_or(OpenError::Refused(Reason::Rekey))?;
        let chain = self.others.get_mut(place).ok_or(OpenError::Refused(Reason::Rekey))?;
        Ok((place, chain.open::<A>(&header, envelope)?))
    }

    /// Whose chain has this name.
    pub fn place_of(&self, chain_id: &[u8; CHAIN_ID_LEN]) -> Option<usize> {
        self.others.iter().position(|other| other.chain.is_of(chain_id))
    }

    /// The receipt of `me` that message `n` of this place was `delivered` or `opened`; `salt` is the one that it was opened
    /// with. `None` for another rung, for a message that was not opened yet, or a place without a chain.
    pub fn receipt(
        &self,
        place: usize,
        me: &[u8; ID_LEN],
        rung: Rung,
        n: u32,
        salt: &[u8; SALT_LEN],
    ) -> Option<Receipt> {
        let chain = &self.others.get(place)?.chain;
        let rung_is_ours = matches!(rung, Rung::Delivered | Rung::Opened);
        (rung_is_ours && chain.next != VACANT && n < chain.next).then(|| chain.receipt(me, rung, n, n, salt))
    }

    /// The refusal of `me` of one message of this place, as [`GroupChains::open`] said: the salt is the one that it came
    /// with. `None` if there is no chain in this place, which makes a refusal without a tag.
    pub fn refusal(
        &self,
        place: usize,
        me: &[u8; ID_LEN],
        reason: Reason,
        n: u32,
        salt: &[u8; SALT_LEN],
    ) -> Option<Receipt> {
        let chain = &self.others.get(place)?.chain;
        (chain.next != VACANT).then(|| chain.refusal(me, reason, n, salt))
    }
}

// What PROTOCOL 13 says, and what a device counts on.
const _: () = assert!(GroupChains::<4>::LEN == 768, "a group of five");

/// The epoch of no chain.
const NEVER: u32 = u32::MAX;

impl Outgoing {
    /// A chain that seals nothing.
    const fn vacant() -> Self {
        Self {
            epoch: NEVER,
            // Beyond the last number: its keys, which everybody knows, are never used.
            next: MAX_MESSAGES,
            key: Secret::new([0; HASH_LEN]),
            signing: Secret::new([0; HASH_LEN]),
            receipts: ReceiptVerifier {
                chain_id: [0; CHAIN_ID_LEN],
                context: [0; HASH_LEN],
                master: Secret::new([0; HASH_LEN]),
            },
        }
    }
}

/// The chain of another member, of which each message must be the next one.
struct Follower {
    chain: Incoming,
    /// The salt of the last message, zeros as long as none was opened: nothing with such a salt is called a duplicate.
    last: [u8; SALT_LEN],
}

impl Follower {
    const fn vacant() -> Self {
        Self { chain: Incoming::vacant(), last: NO_SALT }
    }

    const fn blank() -> Self {
        let mut follower = Self::vacant();
        follower.chain.next = 0;
        follower
    }

    fn take(
        &mut self,
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        group: &Conversation,
    ) -> Result<(), AcceptError> {
        self.chain.take(wrap, prekey, from, from_bundle, group, Some(self.chain.epochs()))?;
        self.last = NO_SALT;
        Ok(())
    }

    fn open<'d, A: Aead>(&mut self, header: &EnvelopeHeader, envelope: &'d mut [u8]) -> Result<Opened<'d>, OpenError> {
        self.check(header)?;
        let (text, tag) = sealed_parts(envelope).ok_or(UNREADABLE)?;
        let step = Step::after(&self.chain.key).map_err(|_| UNREADABLE)?;
        let parts = self.chain.open_text::<A>(true, &step.message, header, text, tag)?;
        self.chain.key = step.next;
        self.chain.next = header.n + 1;
        self.last = header.salt;
        Ok(parts.opened(header, text))
    }

    /// Whether this is the next message. Costs no cryptography.
    fn check(&self, header: &EnvelopeHeader) -> Result<(), OpenError> {
        let (n, salt) = (header.n, header.salt);
        let last_is_known = n.checked_add(1) == Some(self.chain.next) && self.last != NO_SALT;
        if n < self.chain.next {
            return Err(match last_is_known {
                true if salt == self.last => OpenError::Duplicate { n },
                true => OpenError::Refused(Reason::Rewound),
                false => OpenError::Old { n, salt },
            });
        }
        if n > self.chain.next {
            return Err(OpenError::Refused(Reason::Gap));
        }
        if n >= MAX_MESSAGES { Err(UNREADABLE) } else { Ok(()) }
    }
}

const NO_SALT: [u8; SALT_LEN] = [0; SALT_LEN];

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::super::{ReceivingChain, SIGNED_OVERHEAD, SendingChain, WRAP_LEN};
    use super::*;
    use crate::crypto::RustCrypto;
    use crate::envelope::testing::{BrokenRng, Client, TestRng};

    const SID: [u8; ID_LEN] = [7; ID_LEN];

    /// A member with its chains: the others have the places in the order of their ids.
    struct Device {
        client: Client,
        chains: GroupChains<4>,
    }

    fn conversation(ids: impl Iterator<Item = u8>) -> Conversation {
        let members: Vec<_> = ids.map(|id| Client::new(id).member).collect();
        Conversation::group(SID, 0, &members).unwrap()
    }

    /// The place that member `from` has at member `at`; both count from 1.
    fn place(from: usize, at: usize) -> usize {
        if from < at { from - 1 } else { from - 2 }
    }

    impl Device {
        fn new(id: u8) -> Self {
            Self { client: Client::new(id), chains: GroupChains::vacant() }
        }

        fn start(&mut self, group: &Conversation, seed: u64) {
            self.chains.start(&self.client.member, group, &mut TestRng::new(seed)).unwrap();
        }

        fn wrap(&self, group: &Conversation, to: &Client) -> [u8; WRAP_LEN] {
            let mut wrap = [0xee; WRAP_LEN];
            let (own, to) = ((&self.client.keys, &self.client.bundle), (&to.member, &to.bundle));
            let len = self.chains.wrap(group, own, to, &mut TestRng::new(78), &mut wrap);
            assert_eq!(len, Ok(WRAP_LEN));
            wrap
        }

        fn accept(
            &mut self,
            place: usize,
            mut wrap: [u8; WRAP_LEN],
            from: &Client,
            group: &Conversation,
        ) -> Result<(), AcceptError> {
            let prekey = self.client.prekey();
            let taken = self.chains.accept(place, &mut wrap, &prekey, &from.member, &from.bundle, group);
            assert_eq!(wrap, [0; WRAP_LEN], "no secret stays behind");
            taken
        }

        fn seal(&mut self, kind: u8, body: &[u8]) -> Vec<u8> {
            let mut out = std::vec![0xee; body.len() + SIGNED_OVERHEAD];
            let sealed = self.chains.seal::<RustCrypto>(kind, body, &mut out).unwrap();
            assert_eq!(sealed.len, out.len());
            out
        }

        fn open(&mut self, envelope: &[u8]) -> Result<(usize, Vec<u8>), OpenError> {
            let mut buffer = envelope.to_vec();
            self.chains.open::<RustCrypto>(&mut buffer).map(|(place, opened)| {
                assert!(opened.signed, "everything in a group is signed");
                (place, opened.body.to_vec())
            })
        }

        /// Opens what must be refused: the state stays, and no plaintext is left behind.
        fn refuse(&mut self, envelope: &[u8], secret: &[u8]) -> OpenError {
            let before = state(&self.chains);
            let mut buffer = envelope.to_vec();
            let error = self.chains.open::<RustCrypto>(&mut buffer).expect_err("must be refused");
            assert_eq!(state(&self.chains), before, "the state has changed");
            assert!(secret.is_empty() || !buffer.windows(secret.len()).any(|window| window == secret));
            error
        }
    }

    /// All that the chains of others consist of.
    fn state(chains: &GroupChains<4>) -> Vec<Vec<u8>> {
        let line = |follower: &Follower| {
            let Incoming { context, chain_id, bundle_epoch, chain_epoch, next, key, verifying, receipt_key } =
                &follower.chain;
            let numbers = [bundle_epoch, chain_epoch, next].map(|number| number.to_be_bytes()).concat();
            let keys = [&context[..], key.expose(), verifying, receipt_key.expose(), chain_id, &follower.last].concat();
            [numbers, keys].concat()
        };
        chains.others.iter().map(line).collect()
    }

    /// Two members, and the envelope-for-envelope way between them.
    fn pair() -> (Device, Device, Conversation) {
        let group = conversation(1..=5);
        let (mut a, mut b) = (Device::new(1), Device::new(2));
        a.start(&group, 50);
        let wrap = a.wrap(&group, &b.client);
        b.accept(0, wrap, &a.client, &group).unwrap();
        (a, b, group)
    }

    #[test]
    fn a_group_of_five_fits_and_works() {
        assert_eq!(GroupChains::<4>::LEN, 768);
        assert_eq!((size_of::<Outgoing>(), size_of::<Follower>()), (144, 156));

        let group = conversation(1..=5);
        let mut all: Vec<_> = (1..=5).map(Device::new).collect();
        for (seed, device) in (50..).zip(&mut all) {
            device.start(&group, seed);
        }
        for from in 1..=5 {
            for at in (1..=5).filter(|at| *at != from) {
                let wrap = all[from - 1].wrap(&group, &Client::new(at.try_into().unwrap()));
                let sender = Client::new(from.try_into().unwrap());
                all[at - 1].accept(place(from, at), wrap, &sender, &group).unwrap();
            }
        }
        for round in 0..3_u32 {
            for from in 1..=5 {
                let body = [b'm', from.try_into().unwrap()];
                let envelope = all[from - 1].seal(5, &body);
                assert_eq!(envelope.len(), 2 + 101);
                let salt = EnvelopeHeader::decode(&envelope).unwrap().salt;
                for at in (1..=5).filter(|at| *at != from) {
                    let here = place(from, at);
                    assert_eq!(all[at - 1].open(&envelope), Ok((here, body.to_vec())));
                    let me = all[at - 1].client.member.id;
                    for rung in [Rung::Delivered, Rung::Opened] {
                        let receipt = all[at - 1].chains.receipt(here, &me, rung, round, &salt).unwrap();
                        let sender = &all[from - 1].chains;
                        assert_eq!(sender.verify_receipt(&me, &receipt, &salt), Ok(()));
                        assert!(sender.verify_receipt(&[9; 16], &receipt, &salt).is_err(), "it is one member's word");
                        assert!(all[at - 1].chains.receipt(here, &me, rung, round + 1, &salt).is_none());
                    }
                    assert!(all[at - 1].chains.receipt(here, &me, Rung::Accepted, round, &salt).is_none());
                    let refused = all[at - 1].chains.refusal(here, &me, Reason::QueueFull, round, &salt).unwrap();
                    assert_eq!(all[from - 1].chains.verify_receipt(&me, &refused, &salt), Ok(()));
                }
            }
        }
        for (device, id) in all.iter().zip(1..) {
            assert_eq!(device.chains.next(), 3);
            for other in (1..=5).filter(|other| *other != id) {
                assert_eq!(device.chains.place_of(all[other - 1].chains.chain_id()), Some(place(other, id)));
            }
        }
    }

    #[test]
    fn hosts_and_devices_understand_each_other() {
        let (mut device, host, group) = (Device::new(1), Client::new(2), conversation(1..=5));
        device.start(&group, 50);
        let mut wrap = device.wrap(&group, &host);
        let (from, prekey) = (&device.client, host.prekey());
        let mut held: ReceivingChain<8> =
            ReceivingChain::accept(&mut wrap, &prekey, &from.member, &from.bundle, &group, None).ok().unwrap();
        let mut envelope = device.seal(3, b"from the device");
        let opened = held.open::<RustCrypto>(&mut envelope).unwrap();
        assert_eq!((opened.signed, opened.kind, opened.body), (true, 3, &b"from the device"[..]));

        let mut sender = SendingChain::start(&host.member, &group, 4, &mut TestRng::new(60)).unwrap();
        let to = Client::new(1);
        let mut wrap = [0; WRAP_LEN];
        sender.wrap(&host.keys, &host.bundle, &to.member, &to.bundle, &mut TestRng::new(61), &mut wrap).unwrap();
        device.accept(0, wrap, &host, &group).unwrap();
        let mut out = [0; 256];
        let sealed = sender.seal::<RustCrypto>(true, 4, b"from the host", &mut out).unwrap();
        assert_eq!(device.open(&out[..sealed.len]), Ok((0, b"from the host".to_vec())));
        // Who comes later reads from there on.
        sender.wrap(&host.keys, &host.bundle, &to.member, &to.bundle, &mut TestRng::new(62), &mut wrap).unwrap();
        let mut later = Device::new(1);
        later.accept(0, wrap, &host, &group).unwrap();
        assert_eq!(later.refuse(&out[..sealed.len], b"from"), OpenError::Old { n: 0, salt: sealed.salt });
        let sealed = sender.seal::<RustCrypto>(true, 4, b"the next", &mut out).unwrap();
        assert_eq!(later.open(&out[..sealed.len]), Ok((0, b"the next".to_vec())));
    }

    #[test]
    fn messages_come_in_order_or_not_at_all() {
        let (mut a, mut b, _) = pair();
        let envelopes: Vec<_> = (0..5_u8).map(|n| a.seal(0, &[n; 9])).collect();
        let salt = |n: usize| EnvelopeHeader::decode(&envelopes[n]).unwrap().salt;
        assert_eq!(b.refuse(&envelopes[1], &[1; 9]), OpenError::Refused(Reason::Gap));
        assert_eq!(b.open(&envelopes[0]), Ok((0, std::vec![0; 9])));
        assert_eq!(b.refuse(&envelopes[0], &[0; 9]), OpenError::Duplicate { n: 0 });
        let mut other = envelopes[0].clone();
        other[12] ^= 1;
        assert_eq!(b.refuse(&other, &[0; 9]), OpenError::Refused(Reason::Rewound));
        assert_eq!(b.refuse(&envelopes[2], &[2; 9]), OpenError::Refused(Reason::Gap));
        assert_eq!(b.open(&envelopes[1]), Ok((0, std::vec![1; 9])));
        assert_eq!(b.open(&envelopes[2]), Ok((0, std::vec![2; 9])));
        // Only the last one is known.
        assert_eq!(b.refuse(&envelopes[0], &[0; 9]), OpenError::Old { n: 0, salt: salt(0) });
        assert_eq!(b.refuse(&envelopes[1], &[1; 9]), OpenError::Old { n: 1, salt: salt(1) });
        assert_eq!(b.refuse(&envelopes[2], &[2; 9]), OpenError::Duplicate { n: 2 });
        let mut far = envelopes[3].clone();
        far[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(b.refuse(&far, &[3; 9]), OpenError::Refused(Reason::Gap));
        let mut strange = envelopes[3].clone();
        strange[0] ^= 1;
        assert_eq!(b.refuse(&strange, &[3; 9]), OpenError::Refused(Reason::Rekey));
        for len in 0..37 {
            assert_eq!(b.refuse(&envelopes[3][..len], &[]), UNREADABLE, "{len} bytes");
        }
        for byte in 12..envelopes[3].len() {
            let mut other = envelopes[3].clone();
            other[byte] ^= 1;
            assert_eq!(b.refuse(&other, &[3; 9]), UNREADABLE, "byte {byte}");
        }
        assert_eq!(b.open(&envelopes[3]), Ok((0, std::vec![3; 9])));
        assert_eq!(b.open(&envelopes[4]), Ok((0, std::vec![4; 9])));
    }

    #[test]
    fn a_salt_of_zeros_claims_nothing() {
        let (mut a, mut b, _) = pair();
        let envelope = a.seal(0, b"zero");
        let mut claimed = envelope.clone();
        claimed[12..20].fill(0);
        // Nothing was opened yet, and there is no number before the first one.
        claimed[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(b.refuse(&claimed, b"zero"), OpenError::Refused(Reason::Gap));
        b.open(&envelope).unwrap();
        let wrap = a.wrap(&conversation(1..=5), &b.client);
        let mut later = Device::new(2);
        later.accept(0, wrap, &a.client, &conversation(1..=5)).unwrap();
        claimed[8..12].copy_from_slice(&0_u32.to_be_bytes());
        assert_eq!(later.refuse(&claimed, b"zero"), OpenError::Old { n: 0, salt: NO_SALT });
    }

    #[test]
    fn nobody_speaks_for_another_and_nothing_is_unsigned() {
        let (mut a, mut b, group) = pair();
        // What a member who holds A's chain can make of it: everything but A's signature.
        let mut out = [0; 256];
        let unsigned = a.chains.own.seal::<RustCrypto>(false, 0, b"unsigned", &mut out).unwrap();
        assert_eq!(b.refuse(&out[..unsigned.len], b"unsigned"), UNREADABLE);
        let mut forger = Device::new(1);
        forger.start(&group, 50);
        forger.chains.own.signing = Secret::new([0x66; 32]);
        let forged = forger.seal(0, b"forged");
        assert_eq!(b.refuse(&forged, b"forged"), UNREADABLE);
        let mut honest = Device::new(1);
        honest.start(&group, 50);
        let envelope = honest.seal(0, b"honest");
        assert_eq!(b.open(&envelope), Ok((0, b"honest".to_vec())));
    }

    #[test]
    fn a_server_that_adds_a_member_gets_nothing() {
        let (group, with_listener) = (conversation(1..=5), conversation(1..=6));
        let (mut a, mut b, mut listener) = (Device::new(1), Device::new(2), Device::new(6));
        a.start(&group, 50);
        b.start(&with_listener, 51);
        // B was shown another list than A: nothing of one opens at the other.
        let (to_b, to_a) = (a.wrap(&group, &b.client), b.wrap(&with_listener, &a.client));
        assert_eq!(b.accept(0, to_b, &a.client, &with_listener), Err(AcceptError::Unreadable));
        assert_eq!(a.accept(0, to_a, &b.client, &group), Err(AcceptError::Unreadable));
        // Wraps and messages of A's that the server copies to the listener are none for it.
        let envelope = a.seal(0, b"among five");
        for view in [&group, &with_listener] {
            let wrap = a.wrap(&group, &b.client);
            assert_eq!(listener.accept(0, wrap, &a.client, view), Err(AcceptError::Unreadable));
        }
        assert_eq!(listener.refuse(&envelope, b"among five"), OpenError::Refused(Reason::Rekey));
    }

    #[test]
    fn chains_have_names_of_their_own_and_only_go_forward() {
        let (mut a, mut b, group) = pair();
        b.open(&a.seal(0, b"first")).unwrap();
        let again = a.wrap(&group, &b.client);
        assert_eq!(b.accept(0, again, &a.client, &group), Err(AcceptError::Replayed));
        assert_eq!(b.accept(1, again, &a.client, &group), Err(AcceptError::Unreadable), "in another's place");
        assert_eq!(b.accept(4, again, &a.client, &group), Err(AcceptError::Unreadable), "in no place");
        let mine = Device { client: Client::new(1), chains: GroupChains::vacant() };
        let mut mirrored = Device { client: Client::new(2), ..mine };
        mirrored.start(&group, 50);
        assert_eq!(mirrored.accept(0, again, &a.client, &group), Err(AcceptError::Unreadable), "under the own name");
        let direct = Conversation { signed: false, ..group };
        assert_eq!(b.accept(0, again, &a.client, &direct), Err(AcceptError::Unreadable), "no group");

        let before = *a.chains.chain_id();
        a.start(&group, 60);
        assert_eq!((a.chains.own.epoch, a.chains.next()), (1, 0));
        assert_ne!(*a.chains.chain_id(), before);
        let wrap = a.wrap(&group, &b.client);
        b.accept(0, wrap, &a.client, &group).unwrap();
        assert_eq!(b.open(&a.seal(0, b"anew")), Ok((0, b"anew".to_vec())));
        assert_eq!(b.chains.place_of(&before), None);
        assert_eq!(b.accept(0, again, &a.client, &group), Err(AcceptError::Replayed), "the former one");
        b.chains.clear(0);
        b.chains.clear(9);
        assert_eq!(b.refuse(&a.seal(0, b"gone"), b"gone"), OpenError::Refused(Reason::Rekey));
    }

    #[test]
    fn without_a_chain_nothing_is_done() {
        let (group, b) = (conversation(1..=5), Client::new(2));
        let mut a = Device::new(1);
        let mut out = [0; 256];
        assert_eq!(a.chains.seal::<RustCrypto>(0, b"x", &mut out), Err(SealError::Exhausted));
        let (own, to) = ((&a.client.keys, &a.client.bundle), (&b.member, &b.bundle));
        let wrapped = a.chains.wrap(&group, own, to, &mut TestRng::new(1), &mut [0; WRAP_LEN]);
        assert_eq!((wrapped, a.chains.next()), (Err(SealError::Exhausted), MAX_MESSAGES));
        assert_eq!(a.refuse(&[0; 37], &[]), OpenError::Refused(Reason::Rekey), "the name of no chain");
        for place in [0, 3, 4] {
            assert!(a.chains.receipt(place, &[1; 16], Rung::Delivered, 0, &[1; 8]).is_none());
            assert!(a.chains.refusal(place, &[1; 16], Reason::Gap, 0, &[1; 8]).is_none());
        }
        let me = a.client.member;
        assert_eq!(a.chains.start(&me, &group, &mut BrokenRng), Err(Error::Crypto));
        let direct = Conversation { signed: false, ..group };
        assert_eq!(a.chains.start(&me, &direct, &mut TestRng::new(1)), Err(ApiMisuse::InvalidArgument.into()));
        assert_eq!(a.chains.own.epoch, NEVER);
        a.start(&group, 1);
        assert_eq!(a.chains.own.epoch, 0);
        a.chains.own.epoch = NEVER - 1;
        assert_eq!(a.chains.start(&me, &group, &mut TestRng::new(1)), Err(ApiMisuse::InvalidArgument.into()));

        let (mut a, mut b, _) = pair();
        a.chains.own.next = MAX_MESSAGES - 1;
        b.chains.others[0].chain.next = MAX_MESSAGES - 1;
        let last = a.seal(0, b"the last");
        assert_eq!(a.chains.seal::<RustCrypto>(0, b"x", &mut out), Err(SealError::Exhausted));
        assert_eq!(b.open(&last), Ok((0, b"the last".to_vec())));
        assert_eq!(b.refuse(&last, b"the last"), OpenError::Duplicate { n: MAX_MESSAGES - 1 });
        let mut beyond = last.clone();
        beyond[8..12].copy_from_slice(&MAX_MESSAGES.to_be_bytes());
        assert_eq!(b.refuse(&beyond, b"the last"), UNREADABLE);
    }
}
