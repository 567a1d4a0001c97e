//! The same above the records: wraps, envelopes, bundles and identity pages, bit by bit, and where their counters end.

use std::collections::BTreeSet;

use embedded_io::{ErrorKind, ErrorType, Read, Write};
use ossicle_core::{
    AcceptError, Aead, ApiMisuse, Buffers, Bundle, BundleError, BundleKeys, BundleView, ClientConfig, Conversation,
    DriverError, ENVELOPE_OVERHEAD, Endpoint, GroupPolicy, IdentityPage, MAX_MESSAGES, MAX_PAGE_LEN, Member, OpenError,
    PageError, PageKey, PageOwner, PeerError, Prekey, Reason, ReceivingChain, RustCrypto, SIGNED_OVERHEAD, SealError,
    SendingChain, WRAP_LEN, blocking,
};
use ossicle_tests::{Rng, public, seed};

use crate::counters::Witness;
use crate::errors::variants;
use crate::session::{ALICE, LIMIT, SERVER};

type Receiver = ReceivingChain<8>;

const UNREADABLE: OpenError = OpenError::Refused(Reason::Unreadable);

/// Two clients and their conversation.
struct Friends {
    alice: Member,
    bob: Member,
    keys: [BundleKeys; 2],
    bundles: [Bundle; 2],
    prekey: Prekey,
    conversation: Conversation,
}

impl Friends {
    /// With bundles of this epoch.
    fn new(epoch: u32, is_group: bool) -> Self {
        let (alice, bob) = (Member { id: [1; 16], key: [2; 32] }, Member { id: [3; 16], key: [4; 32] });
        let keys = [1, 2].map(|number| BundleKeys::generate(7, &mut Rng::new(number)).unwrap());
        let bundles = [keys[0].bundle(&alice, epoch, [0; 32]), keys[1].bundle(&bob, epoch, [0; 32])];
        let prekey = keys[1].prekey(&bundles[1]).unwrap();
        let conversation = if is_group {
            Conversation::group([7; 16], 1, &[alice, bob]).unwrap()
        } else {
            Conversation::direct(&alice, &bob, 0)
        };
        Self { alice, bob, keys, bundles, prekey, conversation }
    }

    /// Alice's chain of this epoch: the same one for the same number, as a machine that went back would make it.
    fn chain(&self, epoch: u32, number: u8) -> SendingChain {
        SendingChain::start(&self.alice, &self.conversation, epoch, &mut Rng::new(number)).unwrap()
    }

    fn wrap(&self, chain: &SendingChain) -> Result<Vec<u8>, SealError> {
        let mut wrap = vec![0; WRAP_LEN];
        chain.wrap(&self.keys[0], &self.bundles[0], &self.bob, &self.bundles[1], &mut Rng::new(9), &mut wrap)?;
        Ok(wrap)
    }

    fn accept(&self, wrap: &mut [u8], last_seen: Option<(u32, u32)>) -> Result<Receiver, AcceptError> {
        let accepted =
            Receiver::accept(wrap, &self.prekey, &self.alice, &self.bundles[0], &self.conversation, last_seen);
        assert!(wrap.iter().all(|byte| *byte == 0), "a wrap is erased, whatever comes of it");
        accepted
    }

    fn receiver(&self, chain: &SendingChain) -> Receiver {
        self.accept(&mut self.wrap(chain).unwrap(), None).unwrap()
    }
}

fn seal<A: Aead>(chain: &mut SendingChain, signed: bool, body: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut out = vec![0; body.len() + SIGNED_OVERHEAD];
    let len = chain.seal::<A>(signed, 5, body, &mut out)?.len;
    out.truncate(len);
    Ok(out)
}

fn snapshot(chain: &Receiver) -> Vec<u8> {
    let mut out = vec![0; Receiver::SNAPSHOT_LEN];
    let len = chain.encode(&mut out).unwrap();
    out.truncate(len);
    out
}

#[test]
fn a_chain_ends_with_its_last_number_and_seals_no_two_texts_alike() {
    let friends = Friends::new(3, false);
    let mut chain = friends.chain(0, 5);
    let mut receiver = friends.receiver(&chain);
    let mut last_wrap = Vec::new();
    let mut last = Vec::new();
    for n in 0..MAX_MESSAGES {
        if n == MAX_MESSAGES - 1 {
            last_wrap = friends.wrap(&chain).unwrap();
        }
        // The witness fails the test if a key and nonce come twice.
        last = seal::<Witness>(&mut chain, false, b"the same text").unwrap();
        let mut envelope = last.clone();
        let opened = receiver.open::<Witness>(&mut envelope).unwrap();
        assert_eq!((opened.n, opened.body), (n, &b"the same text"[..]));
    }
    assert_eq!((chain.next(), receiver.next()), (MAX_MESSAGES, MAX_MESSAGES));
    assert_eq!(seal::<Witness>(&mut chain, false, b"one more"), Err(SealError::Exhausted));
    assert_eq!(friends.wrap(&chain), Err(SealError::Exhausted));
    // Who came for the last message only, and numbers that there are not.
    let late = friends.accept(&mut last_wrap, None).unwrap();
    assert_eq!(late.next(), MAX_MESSAGES - 1);
    let mut cases = 0;
    for (n, expected) in [
        (MAX_MESSAGES - 1, OpenError::Duplicate { n: MAX_MESSAGES - 1 }),
        (MAX_MESSAGES, UNREADABLE),
        (MAX_MESSAGES + 1, UNREADABLE),
        (MAX_MESSAGES + 8, UNREADABLE),
        (MAX_MESSAGES + 9, OpenError::Refused(Reason::Gap)),
        (u32::MAX - 1, OpenError::Refused(Reason::Gap)),
        (u32::MAX, OpenError::Refused(Reason::Gap)),
    ] {
        let before = snapshot(&receiver);
        let mut envelope = last.clone();
        envelope[8..12].copy_from_slice(&n.to_be_bytes());
        assert_eq!(receiver.open::<Witness>(&mut envelope).err(), Some(expected), "{n}");
        assert_eq!(snapshot(&receiver), before);
        cases += 1;
    }
    println!("{MAX_MESSAGES} messages of one chain, {cases} numbers at its end");
}

#[test]
fn a_chain_that_went_back_seals_no_two_texts_under_one_nonce() {
    const TIMES: u32 = 100;
    let friends = Friends::new(3, false);
    let mut cases = 0;
    let mut receiver = friends.receiver(&friends.chain(0, 6));
    for time in 0..TIMES {
        let mut chain = friends.chain(0, 6);
        for n in 0..20 {
            // The witness fails the test if a key and nonce come twice.
            let mut envelope = seal::<Witness>(&mut chain, false, &time.to_be_bytes()).unwrap();
            let opened = receiver.open::<Witness>(&mut envelope);
            // What the recipient remembers is told apart; what it does not is left to what was recorded.
            match (time, n) {
                (0, _) => assert!(opened.is_ok()),
                (_, 4..) => assert_eq!(opened.err(), Some(OpenError::Refused(Reason::Rewound))),
                _ => assert!(matches!(opened, Err(OpenError::Old { n: old, .. }) if old == n)),
            }
            cases += 1;
        }
    }
    println!("{cases} texts under 20 numbers");
    assert_eq!(cases, 20 * TIMES);
}

/// Numbers 0 to 5 without 2 were opened, and 6 is next: every bit and every length of it, signed and not.
#[test]
fn every_flipped_bit_and_every_truncation_of_an_envelope_ends_in_its_error() {
    let (mut cases, mut demanded) = (0, 0);
    for (is_group, signed) in [(false, false), (false, true), (true, true)] {
        let friends = Friends::new(3, is_group);
        let mut chain = friends.chain(0, 7);
        let mut receiver = friends.receiver(&chain);
        for n in 0..6 {
            let mut envelope = seal::<RustCrypto>(&mut chain, signed, b"before").unwrap();
            if n != 2 {
                receiver.open::<RustCrypto>(&mut envelope).unwrap();
            }
        }
        let good = seal::<RustCrypto>(&mut chain, signed, b"the secret text").unwrap();
        assert_eq!(good.len(), 15 + if signed { SIGNED_OVERHEAD } else { ENVELOPE_OVERHEAD });
        demanded += good.len() * 9;
        let before = snapshot(&receiver);
        let mut refuses = |mut hostile: Vec<u8>, expected: OpenError, case: (usize, usize)| {
            assert_eq!(receiver.open::<RustCrypto>(&mut hostile).err(), Some(expected), "{case:?}");
            assert!(!hostile.windows(6).any(|window| window == b"secret"), "{case:?}: no plaintext");
            assert_eq!(snapshot(&receiver), before, "{case:?}: unchanged");
            cases += 1;
        };
        for bit in 0..good.len() * 8 {
            let mut hostile = good.clone();
            hostile[bit / 8] ^= 1 << (bit % 8);
            let expected = match bit / 8 {
                0..8 => OpenError::Refused(Reason::Rekey), // chain id
                8..12 => match u32::from_be_bytes(hostile[8..12].try_into().unwrap()) {
                    7 | 2 => UNREADABLE,                      // one ahead, and the one that is missing: no such message
                    4 => OpenError::Refused(Reason::Rewound), // opened before, with another salt
                    _ => OpenError::Refused(Reason::Gap),     // more ahead than there is room for
                },
                _ => UNREADABLE, // salt, text, tag
            };
            refuses(hostile, expected, (bit / 8, bit % 8));
        }
        for len in 0..good.len() {
            refuses(good[..len].to_vec(), UNREADABLE, (len, 0));
        }
        assert!(receiver.open::<RustCrypto>(&mut good.clone()).is_ok());
        // Now that it was opened, all that it is known by is its header.
        for bit in 0..good.len() * 8 {
            let mut hostile = good.clone();
            hostile[bit / 8] ^= 1 << (bit % 8);
            let expected = match bit / 8 {
                0..12 => continue,
                12..20 => OpenError::Refused(Reason::Rewound),
                _ => OpenError::Duplicate { n: 6 },
            };
            assert_eq!(receiver.open::<RustCrypto>(&mut hostile).err(), Some(expected), "{bit}");
        }
    }
    println!("{cases} envelopes");
    assert!(cases >= demanded, "{cases} of {demanded}");
}

#[test]
fn every_flipped_bit_and_every_truncation_of_a_wrap_ends_in_its_error() {
    let mut cases = 0;
    let friends = Friends::new(3, false);
    let good = friends.wrap(&friends.chain(5, 8)).unwrap();
    let last_seen = Some((3, 4));
    assert!(friends.accept(&mut good.clone(), last_seen).is_ok());
    for bit in 0..WRAP_LEN * 8 {
        let mut hostile = good.clone();
        hostile[bit / 8] ^= 1 << (bit % 8);
        let epoch = u32::from_be_bytes(hostile[24..28].try_into().unwrap());
        let expected = if epoch <= 4 { AcceptError::Replayed } else { AcceptError::Unreadable };
        assert_eq!(friends.accept(&mut hostile, last_seen).err(), Some(expected), "byte {}, bit {}", bit / 8, bit % 8);
        cases += 1;
    }
    for len in 0..WRAP_LEN {
        assert_eq!(friends.accept(&mut good[..len].to_vec(), last_seen).err(), Some(AcceptError::Unreadable), "{len}");
        cases += 1;
    }
    println!("{cases} wraps");
    assert!(cases >= WRAP_LEN * 9);
}

#[test]
fn the_highest_epochs_are_the_last() {
    let mut cases = 0;
    // A chain's, and those of the bundle that it is announced under. Nothing is newer than the highest.
    for bundle_epoch in [1, u32::MAX] {
        let friends = Friends::new(bundle_epoch, false);
        for chain_epoch in [u32::MAX - 1, u32::MAX] {
            let wrap = friends.wrap(&friends.chain(chain_epoch, 9)).unwrap();
            for (seen, expected) in [
                ((bundle_epoch, u32::MAX - 2), None),
                ((bundle_epoch - 1, u32::MAX), None),
                ((bundle_epoch, chain_epoch), Some(AcceptError::Replayed)),
                ((u32::MAX, u32::MAX), Some(AcceptError::Replayed)),
            ] {
                let accepted = friends.accept(&mut wrap.clone(), Some(seen));
                assert_eq!(accepted.as_ref().err(), expected.as_ref(), "{bundle_epoch} {chain_epoch} {seen:?}");
                if let Ok(chain) = accepted {
                    assert_eq!(chain.epochs(), (bundle_epoch, chain_epoch));
                }
                cases += 1;
            }
        }
    }
    // A bundle's.
    let friends = Friends::new(u32::MAX - 1, false);
    let [mut keys, _] = friends.keys;
    let before = friends.bundles[0];
    let last = keys.bundle(&friends.alice, u32::MAX, before.hash());
    let other = keys.bundle(&friends.alice, u32::MAX, [6; 32]);
    let mut view = BundleView::new(&before);
    assert_eq!(view.update(&other), Err(BundleError::Forked), "it names another one before");
    assert_eq!(view.update(&last), Ok(()));
    assert_eq!(view.update(&last), Ok(()), "again");
    assert_eq!(view.update(&other), Err(BundleError::Forked));
    assert_eq!(view.update(&before), Err(BundleError::Older));
    assert_eq!(view.update(&keys.bundle(&friends.alice, 0, [0; 32])), Err(BundleError::Older));
    // A prekey's id.
    for _ in 0..3 {
        keys.rotate(&mut Rng::new(11)).unwrap();
    }
    assert_eq!(keys.prekey_id(), 10);
    let mut keys = BundleKeys::generate(u32::MAX, &mut Rng::new(12)).unwrap();
    let prekey = *keys.prekey_pair().public();
    assert_eq!(keys.rotate(&mut Rng::new(13)), Err(ApiMisuse::InvalidArgument.into()));
    assert_eq!((keys.prekey_id(), *keys.prekey_pair().public()), (u32::MAX, prekey), "nothing has changed");
    println!("{cases} wraps near the last epoch");
    assert_eq!(cases, 2 * 2 * 4);
}

fn page() -> Vec<u8> {
    let friends = Friends::new(3, false);
    let owner =
        PageOwner { id: [1; 16], name: "alice", key: public(&ALICE), bundle: friends.bundles[0], signature: &[5; 256] };
    let page = IdentityPage {
        id: [9; 16],
        name: "sensor-01",
        key: PageKey { d: &[1; 256], p: &[2; 128], q: &[3; 128] },
        address: [10, 0, 2, 2],
        port: 5150,
        server: public(&SERVER),
        owner,
        groups: GroupPolicy::Owner,
    };
    let mut out = vec![0; MAX_PAGE_LEN];
    let len = page.encode(&mut out).unwrap();
    out.truncate(len);
    out
}

#[test]
fn every_flipped_bit_and_every_truncation_of_an_identity_page_ends_in_its_error() {
    let good = page();
    assert!(IdentityPage::decode(&good).is_ok());
    let mut cases = 0;
    let error = |offset| match offset {
        0..8 => PageError::Missing,
        8..10 => PageError::Version,
        _ => PageError::Broken,
    };
    for bit in 0..good.len() * 8 {
        let mut hostile = good.clone();
        hostile[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(IdentityPage::decode(&hostile).err(), Some(error(bit / 8)), "byte {}", bit / 8);
        cases += 1;
    }
    for len in 0..good.len() {
        assert_eq!(IdentityPage::decode(&good[..len]).err(), Some(error(len)), "{len}");
        cases += 1;
    }
    println!("{cases} pages");
    assert!(cases >= good.len() * 9 && good.len() > 1_000);
}

/// A transport that fails, or ends, at once.
struct Broken(bool);

impl ErrorType for Broken {
    type Error = ErrorKind;
}

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> Result<usize, ErrorKind> {
        if self.0 { Err(ErrorKind::ConnectionReset) } else { Ok(0) }
    }
}

impl Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<(), ErrorKind> {
        Ok(())
    }
}

fn driven(is_broken: bool) -> DriverError<ErrorKind> {
    let (mut rx, mut tx) = ([0; 1_024], [0; 1_024]);
    let config = ClientConfig { server: None, ask_for_key: true, record_limit: LIMIT };
    let mut endpoint = Endpoint::<RustCrypto>::client(config, Buffers { rx: &mut rx, tx: &mut tx }, &seed(1)).unwrap();
    endpoint.poll().unwrap();
    blocking::drive(&mut endpoint, &mut Broken(is_broken)).unwrap_err()
}

#[test]
fn every_error_of_the_rooms_above_is_reached_by_its_name() {
    let friends = Friends::new(3, false);
    let other = friends.bundles[1];
    let changed = friends.keys[0].bundle(&Member { key: [8; 32], ..friends.alice }, 4, [0; 32]);
    let older = friends.keys[0].bundle(&friends.alice, 2, [0; 32]);
    let forked = friends.keys[0].bundle(&friends.alice, 3, [7; 32]);
    let view = |bundle: &Bundle| BundleView::new(&friends.bundles[0]).update(bundle).unwrap_err();
    let mut chain = friends.chain(0, 14);
    let mut receiver = friends.receiver(&chain);
    let envelopes: Vec<Vec<u8>> = (0..20).map(|_| seal::<RustCrypto>(&mut chain, false, b"").unwrap()).collect();
    for envelope in &envelopes {
        receiver.open::<RustCrypto>(&mut envelope.clone()).unwrap();
    }
    let mut open = |envelope: &[u8]| receiver.open::<RustCrypto>(&mut envelope.to_vec()).unwrap_err();
    let wrap = friends.wrap(&chain).unwrap();
    let accept = |wrap: &[u8], seen| friends.accept(&mut wrap.to_vec(), seen).err().unwrap();
    let page = page();
    let decode = |page: &[u8]| IdentityPage::decode(page).err().unwrap();
    let mut used_up = friends.chain(0, 15);
    while used_up.next() < MAX_MESSAGES {
        seal::<crate::session::Clear>(&mut used_up, false, b"").unwrap();
    }
    let failed = chain.seal::<RustCrypto>(false, 0x80, b"", &mut [0; 64]).unwrap_err();
    assert_eq!(failed, SealError::Failed(ApiMisuse::InvalidArgument.into()));
    assert_eq!(driven(false), DriverError::Protocol(PeerError::Truncated.into()));
    let sources = [
        include_str!("../../core/src/envelope/chain.rs"),
        include_str!("../../core/src/envelope/bundle.rs"),
        include_str!("../../core/src/page.rs"),
        include_str!("../../core/src/driver.rs"),
    ]
    .concat();
    let mut count = 0;
    for (name, reached) in [
        (
            "SealError",
            vec![format!("{:?}", seal::<RustCrypto>(&mut used_up, false, b"").unwrap_err()), format!("{failed:?}")],
        ),
        ("AcceptError", vec![format!("{:?}", accept(&wrap, Some((3, 0)))), format!("{:?}", accept(&wrap[1..], None))]),
        (
            "OpenError",
            vec![
                format!("{:?}", open(&envelopes[19])),
                format!("{:?}", open(&envelopes[0])),
                format!("{:?}", open(&envelopes[0][1..])),
            ],
        ),
        ("BundleError", [&other, &changed, &older, &forked].map(|bundle| format!("{:?}", view(bundle))).to_vec()),
        (
            "PageError",
            vec![
                format!("{:?}", decode(&[])),
                format!("{:?}", decode(&page[..8])),
                format!("{:?}", decode(&page[..99])),
            ],
        ),
        ("DriverError", vec![format!("{:?}", driven(false)), format!("{:?}", driven(true))]),
    ] {
        let source = sources.replace(&format!("pub enum {name}<E> {{"), &format!("pub enum {name} {{"));
        let known: BTreeSet<String> = variants(&source, name).into_iter().collect();
        let word = |text: &String| text.chars().take_while(|c| c.is_alphanumeric()).collect::<String>();
        let reached: BTreeSet<String> = reached.iter().map(word).collect();
        println!("{name}: {reached:?}");
        assert_eq!(reached, known, "{name}: each variant is reached here");
        count += known.len();
    }
    println!("{count} errors of the rooms above");
    assert_eq!(count, 2 + 2 + 3 + 4 + 3 + 2);
}
