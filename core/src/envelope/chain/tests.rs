//! The rules of chains one by one: what must work, and what must be refused without a trace.

use core::cell::Cell;
use std::thread_local;
use std::vec::Vec;

use super::super::testing::{BrokenRng, Client, TestRng};
use super::*;
use crate::crypto::{ExchangeKey, RustCrypto, SigningKey};
use crate::wire::testing::{printed, printed_array};

type Receiver = ReceivingChain<8>;

/// Two clients and a conversation, with the chain of the first.
struct Pair {
    a: Client,
    b: Client,
    conversation: Conversation,
    sender: SendingChain,
}

impl Pair {
    fn direct() -> Self {
        Self::new(|a, b| Conversation::direct(a, b, 0))
    }

    fn group() -> Self {
        Self::new(|a, b| Conversation::group([7; 16], 1, &[*a, *b]).unwrap())
    }

    fn new(conversation: impl Fn(&Member, &Member) -> Conversation) -> Self {
        let (a, b) = (Client::new(1), Client::new(2));
        let conversation = conversation(&a.member, &b.member);
        let sender = SendingChain::start(&a.member, &conversation, 0, &mut TestRng::new(77)).unwrap();
        Self { a, b, conversation, sender }
    }

    fn wrap(&self) -> [u8; WRAP_LEN] {
        let mut wrap = [0xee; WRAP_LEN];
        let len = self
            .sender
            .wrap(&self.a.keys, &self.a.bundle, &self.b.member, &self.b.bundle, &mut TestRng::new(78), &mut wrap)
            .unwrap();
        assert_eq!(len, WRAP_LEN);
        wrap
    }

    fn accept(&self, mut wrap: [u8; WRAP_LEN]) -> Result<Receiver, AcceptError> {
        let accepted = ReceivingChain::accept(
            &mut wrap,
            &self.b.prekey(),
            &self.a.member,
            &self.a.bundle,
            &self.conversation,
            None,
        );
        assert_eq!(wrap, [0; WRAP_LEN], "no secret stays behind");
        accepted
    }

    fn receiver(&self) -> Receiver {
        self.accept(self.wrap()).ok().unwrap()
    }

    fn seal(&mut self, body: &[u8]) -> Vec<u8> {
        seal(&mut self.sender, true, 5, body)
    }

    /// A copy, as a snapshot of a machine would make one.
    fn twin(&self) -> SendingChain {
        let SendingChain { sid, signed, chain: Outgoing { epoch, next, key, signing, receipts } } = &self.sender;
        let (key, signing, receipts) = (key.clone(), signing.clone(), receipts.clone());
        SendingChain {
            sid: *sid,
            signed: *signed,
            chain: Outgoing { epoch: *epoch, next: *next, key, signing, receipts },
        }
    }
}

fn seal(chain: &mut SendingChain, signed: bool, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = std::vec![0xee; body.len() + SIGNED_OVERHEAD];
    let sealed = chain.seal::<RustCrypto>(signed, kind, body, &mut out).unwrap();
    out.truncate(sealed.len);
    assert_eq!(EnvelopeHeader::decode(&out).unwrap().salt, sealed.salt);
    out
}

fn open<const SKIP: usize>(chain: &mut ReceivingChain<SKIP>, envelope: &[u8]) -> Result<Vec<u8>, OpenError> {
    let mut buffer = envelope.to_vec();
    chain.open::<RustCrypto>(&mut buffer).map(|opened| opened.body.to_vec())
}

/// Opens what must be refused: the state stays, and no plaintext is left behind.
fn refuse<const SKIP: usize>(chain: &mut ReceivingChain<SKIP>, envelope: &[u8], secret: &[u8]) -> OpenError {
    let before = snapshot(chain);
    let mut buffer = envelope.to_vec();
    let error = chain.open::<RustCrypto>(&mut buffer).expect_err("must be refused");
    assert_eq!(snapshot(chain), before, "the state has changed");
    for free in chain.skipped.iter().filter(|skipped| skipped.is_free()) {
        assert_eq!(free.key.expose(), &[0; 32], "a key was left in a free place");
    }
    assert!(secret.is_empty() || !buffer.windows(secret.len()).any(|window| window == secret), "plaintext is left");
    error
}

fn snapshot<const SKIP: usize>(chain: &ReceivingChain<SKIP>) -> Vec<u8> {
    let mut out = std::vec![0; ReceivingChain::<SKIP>::SNAPSHOT_LEN];
    let len = chain.encode(&mut out).unwrap();
    out.truncate(len);
    out
}

fn missing<const SKIP: usize>(chain: &ReceivingChain<SKIP>) -> Vec<u32> {
    let mut missing: Vec<_> = chain.missing().collect();
    missing.sort_unstable();
    missing
}

fn salt(envelope: &[u8]) -> [u8; 8] {
    EnvelopeHeader::decode(envelope).unwrap().salt
}

fn set_n(envelope: &[u8], n: u32) -> Vec<u8> {
    let mut other = envelope.to_vec();
    other[8..12].copy_from_slice(&n.to_be_bytes());
    other
}

#[test]
fn sizes_are_those_of_the_specification() {
    assert_eq!((WRAP_LEN, ENVELOPE_OVERHEAD, SIGNED_OVERHEAD, RECEIPT_VERIFIER_LEN), (244, 37, 101, 73));
    assert_eq!(ReceivingChain::<64>::SNAPSHOT_LEN, 165 + 192 + 64 * 36);
    // A device budgets with these. Nothing in them is a pointer, so that they are the same on 32 bits, but for one word.
    assert_eq!(size_of::<ReceivingChain<64>>(), 2672);
    assert_eq!(size_of::<ReceivingChain<256>>(), 9584);
    assert_eq!(size_of::<ReceivingChain<0>>(), 368);
    assert_eq!(size_of::<SendingChain>(), 164);
    assert_eq!([GroupChains::<1>::LEN, GroupChains::<4>::LEN, GroupChains::<63>::LEN], [300, 768, 9972]);
}

#[test]
fn messages_arrive_as_they_were_sent() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let long = [9; 1000];
    let cases: [(bool, u8, &[u8]); 5] =
        [(false, 0, b""), (true, 0x7f, b""), (false, 1, b"12 bytes long"), (true, 2, b"signed"), (false, 3, &long)];
    for (n, (signed, kind, body)) in (0..).zip(cases) {
        let mut envelope = seal(&mut pair.sender, signed, kind, body);
        assert_eq!(envelope.len(), body.len() + if signed { 101 } else { 37 });
        let salt = salt(&envelope);
        let opened = receiver.open::<RustCrypto>(&mut envelope).unwrap();
        assert_eq!(opened, Opened { n, signed, kind, body, salt });
    }
    assert_eq!((receiver.next(), pair.sender.next()), (5, 5));
}

// What PROTOCOL prints was made apart, in another language, from its text.
#[test]
fn bytes_are_those_of_the_specification() {
    let (a, b) = (Member { id: [1; 16], key: [2; 32] }, Member { id: [3; 16], key: [4; 32] });
    let keys = |exchange, prekey, id, signing| {
        BundleKeys::new(
            ExchangeKey::new(Secret::new([exchange; 32])),
            ExchangeKey::new(Secret::new([prekey; 32])),
            id,
            SigningKey::new(Secret::new([signing; 32])),
        )
    };
    let (keys_a, keys_b) = (keys(0x51, 0x52, 10, 0x53), keys(0x61, 0x62, 4, 0x63));
    let (bundle_a, bundle_b) = (keys_a.bundle(&a, 9, [0; 32]), keys_b.bundle(&b, 3, [0; 32]));
    for (bundle, bytes, hash) in [(&bundle_a, "bundle_A", "H(bundle_A)"), (&bundle_b, "bundle_B", "H(bundle_B)")] {
        assert_eq!(bundle.encode(), printed_array("15.3", bytes));
        assert_eq!(bundle.hash(), printed_array("15.3", hash));
    }
    let conversation = Conversation::direct(&a, &b, 5);
    let context = context(&a, &conversation, &[0x44; 8], 7);
    assert_eq!(context, printed_array("15.3", "CTX"));
    let (key, signing) = (Secret::new([0x11; 32]), Secret::new([0x22; 32]));
    let verifying = verifying_key(&signing);
    let announced = announcement(&context, 9, 0, key.expose(), &verifying);
    assert_eq!(announced, printed_array("15.3", "announced"));
    let signature = keys_a.signing_key().sign(&announced);
    assert_eq!(signature, printed_array("15.3", "ann"));
    assert_eq!(wrap_info(&context, &bundle_a.hash(), &bundle_b.hash(), 4), printed_array("15.3", "info"));
    let step = Step::after(&key).unwrap();
    for (name, key) in [("MK_0", step.message), ("SK_0", step.salt), ("CK_1", step.next)] {
        assert_eq!(key.expose(), &printed_array("15.3", name));
    }

    let receipts = ReceiptVerifier { chain_id: [0x44; 8], context, master: Secret::new([0x33; 32]) };
    let mut sender = SendingChain {
        sid: conversation.sid,
        signed: false,
        chain: Outgoing { epoch: 7, next: 0, key: key.clone(), signing, receipts },
    };
    let receipt_key = sender.receipt_key(&b.id);
    assert_eq!(receipt_key.expose(), &printed_array("15.3", "RK"));
    let text: [u8; WRAP_TEXT_LEN] = join(&[&[0; 4], key.expose(), &verifying, receipt_key.expose(), &signature]);
    assert_eq!(text, printed_array("15.3", "text"));
    let mut wrap: [u8; 244] = printed_array("15.3", "wrap");
    assert_eq!(wrap[WRAP_HEAD_LEN..][..32], printed("15.3", "enc"));
    let prekey = keys_b.prekey(&bundle_b).unwrap();
    let mut receiver = Receiver::accept(&mut wrap, &prekey, &a, &bundle_a, &conversation, None).ok().unwrap();
    assert_eq!(receiver.epochs(), (9, 7));

    let first = seal(&mut sender, false, 1, b"hello");
    assert_eq!(first, printed("15.3", "message_0"));
    let second = seal(&mut sender, true, 2, b"");
    assert_eq!(second, printed("15.3", "message_1"));
    assert_eq!(open(&mut receiver, &first), Ok(b"hello".to_vec()));
    assert_eq!(open(&mut receiver, &second), Ok(Vec::new()));

    let delivered = receiver.receipt(&b.id, Rung::Delivered, 0, 1).unwrap();
    assert_eq!(delivered.tag, Some(printed_array("15.3", "tag_delivered")));
    let refused = receiver.refusal(&b.id, Reason::Unreadable, 1, &salt(&second));
    assert_eq!(refused.tag, Some(printed_array("15.3", "tag_refused")));
}

#[test]
fn a_wrap_is_of_one_sender_to_one_recipient_in_one_conversation() {
    let pair = Pair::direct();
    let wrap = pair.wrap();
    let header = WrapHeader::decode(&wrap).unwrap();
    let conversation = &pair.conversation;
    assert_eq!((header.sid, header.chain_id), (conversation.sid, *pair.sender.chain_id()));
    assert_eq!((header.chain_epoch, header.prekey_id), (0, 200));
    assert!(pair.accept(wrap).is_ok());

    let unreadable = |prekey: &Prekey, from: &Member, bundle: &Bundle, conversation: &Conversation| {
        let mut wrap = wrap;
        let error = Receiver::accept(&mut wrap, prekey, from, bundle, conversation, None).err();
        assert_eq!(error, Some(AcceptError::Unreadable));
        assert_eq!(wrap, [0; WRAP_LEN]);
    };
    let (a, prekey) = (&pair.a, &pair.b.prekey());
    // Another recipient, even one who calls his prekey alike; the right half in another bundle; another id.
    let c = Client::new(3);
    unreadable(&Prekey::new(c.prekey().key().clone(), 200, *prekey.bundle()), &a.member, &a.bundle, conversation);
    unreadable(&Prekey::new(prekey.key().clone(), 200, [1; 32]), &a.member, &a.bundle, conversation);
    unreadable(&Prekey::new(prekey.key().clone(), 201, *prekey.bundle()), &a.member, &a.bundle, conversation);
    // Another sender, whether his bundle says so or not; another bundle of the same sender.
    unreadable(prekey, &c.member, &c.bundle, conversation);
    unreadable(prekey, &a.member, &c.bundle, conversation);
    unreadable(prekey, &c.member, &a.bundle, conversation);
    unreadable(prekey, &a.member, &Bundle { epoch: 4, ..a.bundle }, conversation);
    unreadable(prekey, &a.member, &Bundle { verifying: c.bundle.verifying, ..a.bundle }, conversation);
    let changed = Member { key: [8; 32], ..a.member };
    unreadable(prekey, &changed, &Bundle { key: [8; 32], ..a.bundle }, conversation);
    // Another view of the conversation.
    unreadable(prekey, &a.member, &a.bundle, &Conversation { members: [1; 32], ..*conversation });
    unreadable(prekey, &a.member, &a.bundle, &Conversation { sid: [1; 16], ..*conversation });
}

#[test]
fn every_byte_of_a_wrap_counts() {
    let pair = Pair::direct();
    let wrap = pair.wrap();
    for i in 0..WRAP_LEN {
        let mut other = wrap;
        other[i] ^= 0x01;
        assert_eq!(pair.accept(other).err(), Some(AcceptError::Unreadable), "byte {i}");
    }
    let mut long = [&wrap[..], &[0]].concat();
    let error =
        Receiver::accept(&mut long, &pair.b.prekey(), &pair.a.member, &pair.a.bundle, &pair.conversation, None).err();
    assert_eq!(error, Some(AcceptError::Unreadable));
    assert_eq!(long, [0; WRAP_LEN + 1]);
}

// A thief of the recipient's prekey can make HPKE Auth open as if from anyone. Here he even holds the sender's exchange
// key: without the sender's Ed25519 key nothing he wraps is accepted.
#[test]
fn a_wrap_without_the_senders_announcement_is_refused() {
    let pair = Pair::direct();
    let thief = SigningKey::new(Secret::new([0x66; 32]));
    let context = context(&pair.a.member, &pair.conversation, &[5; 8], 1);
    let key = Secret::new([1; 32]);
    let honest = announcement(&context, 3, 0, key.expose(), thief.public());
    let of_another_key = announcement(&context, 3, 0, &[2; 32], thief.public());
    let forge = |signature: [u8; 64]| {
        let mut text: [u8; WRAP_TEXT_LEN] = join(&[&[0; 4], key.expose(), thief.public(), &[3; 32], &signature]);
        let info = wrap_info(&context, &pair.a.bundle.hash(), &pair.b.bundle.hash(), 200);
        let exchange = pair.a.keys.exchange_key();
        let (enc, tag) = hpke_seal(exchange, &pair.b.bundle.prekey, &info, &mut text, &mut TestRng::new(1)).unwrap();
        let header =
            WrapHeader { sid: pair.conversation.sid, chain_id: [5; 8], chain_epoch: 1, prekey_id: 200 }.encode();
        pair.accept(join(&[&header, &enc, &text, &tag])).err()
    };
    assert_eq!(forge(thief.sign(&honest)), Some(AcceptError::Unreadable));
    assert_eq!(forge([0; 64]), Some(AcceptError::Unreadable));
    // An announcement that the sender did make, of another chain key.
    assert_eq!(forge(pair.a.keys.signing_key().sign(&of_another_key)), Some(AcceptError::Unreadable));
    // With the sender's word it is a chain: the forgery above fails at the announcement and nowhere else.
    assert_eq!(forge(pair.a.keys.signing_key().sign(&honest)), None);
}

#[test]
fn a_chain_that_has_no_message_left_is_not_accepted() {
    let pair = Pair::direct();
    let (key, signing) = (Secret::new([1; 32]), SigningKey::new(Secret::new([2; 32])));
    let context = context(&pair.a.member, &pair.conversation, &[5; 8], 1);
    let announced = |first: u32| {
        let signature =
            pair.a.keys.signing_key().sign(&announcement(&context, 3, first, key.expose(), signing.public()));
        let mut text: [u8; WRAP_TEXT_LEN] =
            join(&[&first.to_be_bytes(), key.expose(), signing.public(), &[3; 32], &signature]);
        let info = wrap_info(&context, &pair.a.bundle.hash(), &pair.b.bundle.hash(), 200);
        let exchange = pair.a.keys.exchange_key();
        let (enc, tag) = hpke_seal(exchange, &pair.b.bundle.prekey, &info, &mut text, &mut TestRng::new(1)).unwrap();
        let header =
            WrapHeader { sid: pair.conversation.sid, chain_id: [5; 8], chain_epoch: 1, prekey_id: 200 }.encode();
        pair.accept(join(&[&header, &enc, &text, &tag])).map(|receiver| receiver.next())
    };
    assert_eq!(announced(0), Ok(0));
    assert_eq!(announced(MAX_MESSAGES - 1), Ok(MAX_MESSAGES - 1));
    for first in [MAX_MESSAGES, MAX_MESSAGES + 1, VACANT] {
        assert_eq!(announced(first), Err(AcceptError::Unreadable), "{first}");
    }
}

// The thief of a recipient's prekey opens an old wrap, and wraps what was in it, announcement and all, under the newer
// bundle of its sender: its epoch is higher than any seen, but it is not the one that the sender announced.
#[test]
fn an_old_chain_cannot_be_wrapped_again_under_a_newer_bundle() {
    let pair = Pair::direct();
    let newer = pair.a.keys.bundle(&pair.a.member, 4, pair.a.bundle.hash());
    let header = WrapHeader::decode(&pair.wrap()).unwrap();
    let context = pair.sender.chain.receipts.context;
    let info = |bundle: &Bundle| wrap_info(&context, &bundle.hash(), pair.b.prekey().bundle(), pair.b.prekey().id());

    let wrap = pair.wrap();
    let (mut stolen, enc) = ([0; WRAP_TEXT_LEN], wrap[WRAP_HEAD_LEN..][..32].try_into().unwrap());
    stolen.copy_from_slice(&wrap[WRAP_HEAD_LEN + 32..][..WRAP_TEXT_LEN]);
    let tag = wrap[WRAP_LEN - TAG_LEN..].try_into().unwrap();
    hpke_open(pair.b.prekey().key(), &pair.a.bundle.exchange, &info(&pair.a.bundle), enc, &mut stolen, tag).unwrap();

    let again = |text: [u8; WRAP_TEXT_LEN], bundle: &Bundle, last_seen| {
        let mut text = text;
        // HPKE Auth opens for the thief of the prekey as it does for the sender, whose key stands in for him here.
        let exchange = pair.a.keys.exchange_key();
        let rng = &mut TestRng::new(1);
        let (enc, tag) = hpke_seal(exchange, &pair.b.bundle.prekey, &info(bundle), &mut text, rng).unwrap();
        let mut wrap: [u8; WRAP_LEN] = join(&[&header.encode(), &enc, &text, &tag]);
        let prekey = pair.b.prekey();
        Receiver::accept(&mut wrap, &prekey, &pair.a.member, bundle, &pair.conversation, last_seen).err()
    };
    assert_eq!(again(stolen, &pair.a.bundle, Some((3, 0))), Some(AcceptError::Replayed));
    assert_eq!(again(stolen, &newer, Some((3, 0))), Some(AcceptError::Unreadable));
    // It is the announcement that stops him: under its own bundle the wrap is whole, and with the sender's word so is
    // the other one.
    assert_eq!(again(stolen, &pair.a.bundle, None), None);
    let announced =
        announcement(&context, 4, 0, pair.sender.chain.key.expose(), &verifying_key(&pair.sender.chain.signing));
    let mut signed_anew = stolen;
    signed_anew[WRAP_TEXT_LEN - SIGNATURE_LEN..].copy_from_slice(&pair.a.keys.signing_key().sign(&announced));
    assert_eq!(again(signed_anew, &newer, Some((3, 0))), None);
}

#[test]
fn chains_only_go_forward() {
    let mut pair = Pair::direct();
    pair.sender = SendingChain::start(&pair.a.member, &pair.conversation, 5, &mut TestRng::new(1)).unwrap();
    let wrap = pair.wrap();
    let accept = |last_seen| {
        let (mut wrap, a) = (wrap, &pair.a);
        Receiver::accept(&mut wrap, &pair.b.prekey(), &a.member, &a.bundle, &pair.conversation, last_seen).err()
    };
    let replayed = Some(AcceptError::Replayed);
    for (seen, expected) in [
        (None, None),
        (Some((3, 4)), None),
        (Some((2, 9)), None),
        (Some((3, 5)), replayed),
        (Some((3, 6)), replayed),
        (Some((4, 0)), replayed),
    ] {
        assert_eq!(accept(seen), expected, "{seen:?}");
    }
}

#[test]
fn a_chain_is_replaced_in_place_by_a_newer_one_only() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let (wrap, one, three) = (pair.wrap(), pair.seal(b"1"), (pair.seal(b"2"), pair.seal(b"3")).1);
    assert!(open(&mut receiver, &one).is_ok() && open(&mut receiver, &three).is_ok());
    let before = snapshot(&receiver);
    let replace = |receiver: &mut Receiver, pair: &Pair, mut wrap: [u8; WRAP_LEN]| {
        receiver.replace(&mut wrap, &pair.b.prekey(), &pair.a.member, &pair.a.bundle, &pair.conversation)
    };
    assert_eq!(replace(&mut receiver, &pair, wrap), Err(AcceptError::Replayed));
    pair.sender = SendingChain::start(&pair.a.member, &pair.conversation, 1, &mut TestRng::new(2)).unwrap();
    let mut broken = pair.wrap();
    broken[100] ^= 1;
    assert_eq!(replace(&mut receiver, &pair, broken), Err(AcceptError::Unreadable));
    assert_eq!(snapshot(&receiver), before);
    assert_eq!(replace(&mut receiver, &pair, pair.wrap()), Ok(()));
    assert_eq!(snapshot(&receiver), snapshot(&pair.receiver()));
    assert_eq!(refuse(&mut receiver, &one, b""), OpenError::Refused(Reason::Rekey));
    let fresh = pair.seal(b"fresh");
    assert_eq!(open(&mut receiver, &fresh), Ok(b"fresh".to_vec()));
}

#[test]
fn who_comes_later_reads_from_there_on() {
    let mut pair = Pair::group();
    let early = pair.seal(b"before");
    let mut receiver = pair.receiver();
    assert_eq!((receiver.next(), receiver.first), (1, 1));
    assert_eq!(refuse(&mut receiver, &early, b"before"), UNREADABLE);
    let later = pair.seal(b"after");
    assert_eq!(open(&mut receiver, &later), Ok(b"after".to_vec()));
    assert!(receiver.receipt(&[2; 16], Rung::Delivered, 0, 1).is_none());
    assert!(receiver.receipt(&[2; 16], Rung::Delivered, 1, 1).is_some());
}

#[test]
fn every_byte_of_an_envelope_counts() {
    for signed in [false, true] {
        let mut pair = Pair::direct();
        let mut receiver = pair.receiver();
        let body = b"open the valve";
        let envelope = seal(&mut pair.sender, signed, 1, body);
        for i in 0..envelope.len() {
            let mut other = envelope.clone();
            other[i] ^= 0x80;
            let error = refuse(&mut receiver, &other, body);
            let expected = match i {
                0..8 => Reason::Rekey,
                8..12 => Reason::Gap,
                _ => Reason::Unreadable,
            };
            assert_eq!(error, OpenError::Refused(expected), "byte {i}");
        }
        for len in 0..envelope.len() {
            let error = refuse(&mut receiver, &envelope[..len], body);
            assert_eq!(error, UNREADABLE, "{len} bytes");
        }
        let near = set_n(&envelope, 1);
        assert_eq!(refuse(&mut receiver, &near, body), UNREADABLE);
        assert_eq!(open(&mut receiver, &envelope), Ok(body.to_vec()));
    }
}

#[test]
fn messages_may_come_in_any_order_within_reason() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..20_u8).map(|n| pair.seal(&[n])).collect();
    let gap = OpenError::Refused(Reason::Gap);

    assert_eq!(refuse(&mut receiver, &envelopes[9], &[]), gap);
    assert_eq!(open(&mut receiver, &envelopes[8]), Ok(std::vec![8]));
    assert_eq!(missing(&receiver), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(open(&mut receiver, &envelopes[9]), Ok(std::vec![9]));
    assert_eq!(refuse(&mut receiver, &envelopes[11], &[]), gap);
    assert_eq!(open(&mut receiver, &envelopes[3]), Ok(std::vec![3]));
    assert_eq!(open(&mut receiver, &envelopes[0]), Ok(std::vec![0]));
    assert_eq!(open(&mut receiver, &envelopes[12]), Ok(std::vec![12]));
    assert_eq!(missing(&receiver), [1, 2, 4, 5, 6, 7, 10, 11]);
    assert_eq!(refuse(&mut receiver, &envelopes[14], &[]), gap);

    // A skipped key opens its own message and no other, and a forgery does not use it up.
    let mut forged = envelopes[10].clone();
    forged[25] ^= 1;
    assert_eq!(refuse(&mut receiver, &forged, &[]), UNREADABLE);
    assert_eq!(refuse(&mut receiver, &set_n(&envelopes[11], 10), &[]), UNREADABLE);
    assert_eq!(open(&mut receiver, &envelopes[10]), Ok(std::vec![10]));
    assert_eq!(refuse(&mut receiver, &envelopes[10], &[]), OpenError::Duplicate { n: 10 });

    receiver.forget_skipped();
    assert_eq!(missing(&receiver), [0_u32; 0]);
    for skipped in &receiver.skipped {
        assert!(skipped.is_free() && skipped.key.expose() == &[0; 32]);
    }
    let old = OpenError::Old { n: 5, salt: salt(&envelopes[5]) };
    assert_eq!(refuse(&mut receiver, &envelopes[5], &[]), old);
    assert_eq!(open(&mut receiver, &envelopes[14]), Ok(std::vec![14]));
    assert_eq!(missing(&receiver), [13]);
}

thread_local! {
    static OPENED: Cell<u32> = const { Cell::new(0) };
}

/// Counts what is opened.
struct Counting(RustCrypto);

impl Aead for Counting {
    fn new(key: &[u8; 32]) -> Self {
        OPENED.set(OPENED.get() + 1);
        Self(RustCrypto::new(key))
    }

    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Result<[u8; 16], Error> {
        self.0.seal(nonce, aad, data)
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; 16]) -> Result<(), Error> {
        self.0.open(nonce, aad, data, tag)
    }
}

#[test]
fn a_number_from_the_network_costs_nothing() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelope = pair.seal(b"text");
    let start = std::time::Instant::now();
    for n in [u32::MAX, u32::MAX - 1, 0x8000_0000, MAX_MESSAGES, 9] {
        let error = receiver.open::<Counting>(&mut set_n(&envelope, n)).unwrap_err();
        assert_eq!(error, OpenError::Refused(Reason::Gap));
    }
    assert_eq!(OPENED.get(), 0);
    // 2^32 steps would take hours.
    assert!(start.elapsed().as_secs() < 10);
    assert!(receiver.open::<Counting>(&mut envelope.clone()).is_ok());
    assert_eq!(OPENED.get(), 1);
}

#[test]
fn a_duplicate_is_told_from_a_chain_that_went_back() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let mut rolled_back = pair.twin();
    let first = pair.seal(b"open the valve");
    let second = pair.seal(b"another");
    assert!(open(&mut receiver, &second).is_ok());
    assert!(open(&mut receiver, &first).is_ok());
    for (n, envelope) in [(0, &first), (1, &second)] {
        assert_eq!(refuse(&mut receiver, envelope, b""), OpenError::Duplicate { n });
    }
    let other = seal(&mut rolled_back, true, 5, b"shut the valve");
    assert_eq!(refuse(&mut receiver, &other, b"shut"), OpenError::Refused(Reason::Rewound));

    let more: Vec<_> = (0..15_u8).map(|n| pair.seal(&[n])).collect();
    for envelope in &more {
        assert!(open(&mut receiver, envelope).is_ok());
    }
    // Sixteen salts: the first to be opened, `second`, is forgotten, the one after it is not.
    assert_eq!(refuse(&mut receiver, &second, b""), OpenError::Old { n: 1, salt: salt(&second) });
    assert_eq!(refuse(&mut receiver, &first, b""), OpenError::Duplicate { n: 0 });
}

#[test]
fn one_state_never_uses_a_nonce_for_two_texts() {
    let mut pair = Pair::direct();
    let (mut one, mut two, mut three) = (pair.twin(), pair.twin(), pair.twin());
    let texts =
        [seal(&mut one, false, 1, b"text"), seal(&mut two, false, 1, b"texU"), seal(&mut three, false, 2, b"text")];
    let same = seal(&mut pair.sender, false, 1, b"text");
    assert_eq!(texts[0], same, "the same text is the same envelope, and a duplicate");
    let nonces = texts.each_ref().map(|envelope| EnvelopeHeader::decode(envelope).unwrap().nonce());
    assert!(nonces[0] != nonces[1] && nonces[0] != nonces[2] && nonces[1] != nonces[2]);
}

#[test]
fn an_insider_cannot_speak_for_the_sender_in_a_group() {
    let mut pair = Pair::group();
    let (mut receiver, mut another) = (pair.receiver(), pair.receiver());
    let aad = message_context(&pair.sender.chain.receipts.context, 0);
    let step = Step::after(&pair.sender.chain.key).unwrap();
    let signed_before = pair.seal(b"mine");
    // Every member holds the message key, so that any text can be sealed; only the sender can sign.
    let forge = |text: &[u8]| {
        let mut text = text.to_vec();
        let header = EnvelopeHeader { chain_id: *pair.sender.chain_id(), n: 0, salt: [1; 8] };
        let tag = RustCrypto::new(step.message.expose()).seal(&header.nonce(), &aad, &mut text).unwrap();
        [&header.encode()[..], &text, &tag].concat()
    };
    let thief = SigningKey::new(Secret::new([0x66; 32]));
    let by_thief = thief.sign(&signed_message(&aad, 0x85, b"forged"));
    let by_sender_of_another_kind = sign(&pair.sender.chain.signing, &signed_message(&aad, 0x86, b"forged"));
    let other_aad = message_context(&pair.sender.chain.receipts.context, 1);
    let by_sender_of_another_number = sign(&pair.sender.chain.signing, &signed_message(&other_aad, 0x85, b"forged"));
    for text in [
        &b"\x05forged"[..],
        b"\x85forged",
        b"",
        b"\x85",
        &[b"\x85forged", &by_thief[..]].concat(),
        &[b"\x85forged", &by_sender_of_another_kind[..]].concat(),
        &[b"\x85forged", &by_sender_of_another_number[..]].concat(),
        // The flag taken away from a text that is signed: the signature would be part of the body.
        &[b"\x05forged", &by_thief[..]].concat(),
    ] {
        assert_eq!(refuse(&mut receiver, &forge(text), b"forged"), UNREADABLE);
    }
    let signature = sign(&pair.sender.chain.signing, &signed_message(&aad, 0x85, b"forged"));
    assert_eq!(open(&mut another, &signed_before), Ok(b"mine".to_vec()));
    assert_eq!(open(&mut receiver, &forge(&[b"\x85forged", &signature[..]].concat())), Ok(b"forged".to_vec()));
}

#[test]
fn a_direct_message_says_whether_it_is_signed() {
    let pair = Pair::direct();
    let aad = message_context(&pair.sender.chain.receipts.context, 0);
    let step = Step::after(&pair.sender.chain.key).unwrap();
    // Who holds the message key can leave the signature out, and then it shows; he cannot claim one.
    for (text, expected) in [(&b"\x05text"[..], Some(false)), (&[b"\x85text", &[7; 64][..]].concat(), None)] {
        let mut sealed = text.to_vec();
        let header = EnvelopeHeader { chain_id: *pair.sender.chain_id(), n: 0, salt: [1; 8] };
        let tag = RustCrypto::new(step.message.expose()).seal(&header.nonce(), &aad, &mut sealed).unwrap();
        let mut envelope = [&header.encode()[..], &sealed, &tag].concat();
        let mut receiver = pair.receiver();
        assert_eq!(receiver.open::<RustCrypto>(&mut envelope).ok().map(|opened| opened.signed), expected);
    }
}

#[test]
fn what_cannot_be_sealed_changes_nothing() {
    let mut pair = Pair::group();
    let mut out = [0; 200];
    let wrong = Err(SealError::Failed(ApiMisuse::InvalidArgument.into()));
    let full = Err(SealError::Failed(BufferError::TxFull.into()));
    let sender = &mut pair.sender;
    let key = *sender.chain.key.expose();
    assert_eq!(sender.seal::<RustCrypto>(true, 0x80, b"", &mut out), wrong);
    assert_eq!(sender.seal::<RustCrypto>(false, 0, b"", &mut out), wrong);
    assert_eq!(sender.seal::<RustCrypto>(true, 0, &[0; 100], &mut out), full);
    assert_eq!(sender.seal::<RustCrypto>(true, 0, b"", &mut out[..100]), full);
    assert_eq!(out, [0; 200]);
    assert_eq!((sender.next(), *sender.chain.key.expose()), (0, key));
    assert!(sender.seal::<RustCrypto>(true, 0, &[0; 99], &mut out).is_ok());
    assert_ne!(sender.chain.key.expose(), &key);
}

#[test]
fn a_chain_ends_after_65536_messages() {
    let mut pair = Pair::direct();
    pair.sender.chain.next = MAX_MESSAGES - 1;
    let mut receiver = pair.receiver();
    let last = pair.seal(b"last");
    assert_eq!(open(&mut receiver, &last), Ok(b"last".to_vec()));
    assert_eq!(receiver.next(), MAX_MESSAGES);
    assert_eq!(pair.sender.seal::<RustCrypto>(true, 0, b"", &mut [0; 200]), Err(SealError::Exhausted));
    let (a, b) = (&pair.a, &pair.b);
    let wrapped = pair.sender.wrap(&a.keys, &a.bundle, &b.member, &b.bundle, &mut TestRng::new(1), &mut [0; WRAP_LEN]);
    assert_eq!(wrapped, Err(SealError::Exhausted));
    assert_eq!(refuse(&mut receiver, &set_n(&last, MAX_MESSAGES), b""), UNREADABLE);
    assert_eq!(refuse(&mut receiver, &last, b""), OpenError::Duplicate { n: MAX_MESSAGES - 1 });
    assert_eq!(snapshot(&decoded::<8>(&snapshot(&receiver)).unwrap()), snapshot(&receiver));
}

#[test]
fn a_wrap_that_fails_leaves_no_secret() {
    let pair = Pair::direct();
    let (a, b) = (&pair.a, &pair.b);
    let wrap = |own: &Bundle, to: &Member, to_bundle: &Bundle, out: &mut [u8]| {
        pair.sender.wrap(&a.keys, own, to, to_bundle, &mut TestRng::new(1), out)
    };
    let mut out = [0; WRAP_LEN];
    let wrong = Err(SealError::Failed(ApiMisuse::InvalidArgument.into()));
    assert_eq!(wrap(&b.bundle, &b.member, &b.bundle, &mut out), wrong);
    assert_eq!(wrap(&a.bundle, &b.member, &a.bundle, &mut out), wrong);
    assert_eq!(wrap(&a.bundle, &b.member, &Bundle { key: [1; 32], ..b.bundle }, &mut out), wrong);
    let full = Err(SealError::Failed(BufferError::TxFull.into()));
    assert_eq!(wrap(&a.bundle, &b.member, &b.bundle, &mut out[1..]), full);
    // No key at all: the all-zero point.
    let crypto = Err(SealError::Failed(Error::Crypto));
    assert_eq!(wrap(&a.bundle, &b.member, &Bundle { prekey: [0; 32], ..b.bundle }, &mut out), crypto);
    assert_eq!(out, [0; WRAP_LEN]);
    let broken = pair.sender.wrap(&a.keys, &a.bundle, &b.member, &b.bundle, &mut BrokenRng, &mut out);
    assert_eq!(broken, crypto);
    assert_eq!(out, [0; WRAP_LEN]);
    assert!(SendingChain::start(&a.member, &pair.conversation, 0, &mut BrokenRng).is_err());
}

#[test]
fn receipts_are_the_recipients_word() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..3_u8).map(|n| pair.seal(&[n])).collect();
    for envelope in &envelopes {
        assert!(open(&mut receiver, envelope).is_ok());
    }
    let (me, last) = (&pair.b.member.id, salt(&envelopes[2]));
    let sender = &pair.sender;
    for rung in [Rung::Delivered, Rung::Opened] {
        let receipt = receiver.receipt(me, rung, 0, 2).unwrap();
        assert_eq!((receipt.rung, receipt.reason, receipt.from, receipt.to), (rung, None, 0, 2));
        assert_eq!(sender.verify_receipt(me, &receipt, &last), Ok(()));
        let other_rung = if rung == Rung::Opened { Rung::Delivered } else { Rung::Opened };
        let mut tag = receipt.tag.unwrap();
        tag[15] ^= 1;
        for forged in [
            Receipt { tag: None, ..receipt },
            Receipt { tag: Some(tag), ..receipt },
            Receipt { tag: Some([0; 16]), ..receipt },
            Receipt { rung: other_rung, ..receipt },
            Receipt { rung: Rung::Accepted, ..receipt },
            Receipt { rung: Rung::Stored, ..receipt },
            Receipt { rung: Rung::Refused, reason: Some(Reason::Unreadable), ..receipt },
            Receipt { rung: Rung::Refused, ..receipt },
            Receipt { reason: Some(Reason::Gap), ..receipt },
            Receipt { chain: [0; 8], ..receipt },
            Receipt { from: 1, ..receipt },
            Receipt { to: 1, ..receipt },
            Receipt { to: 3, ..receipt },
            Receipt { from: 2, to: 0, ..receipt },
        ] {
            assert_eq!(sender.verify_receipt(me, &forged, &last), Err(Error::Crypto), "{forged:?}");
        }
        // Another member, another text, and one member in another's name.
        assert_eq!(sender.verify_receipt(&[3; 16], &receipt, &last), Err(Error::Crypto));
        assert_eq!(sender.verify_receipt(me, &receipt, &salt(&envelopes[1])), Err(Error::Crypto));
        let in_anothers_name = receiver.receipt(&[3; 16], rung, 0, 2).unwrap();
        assert_eq!(sender.verify_receipt(&[3; 16], &in_anothers_name, &last), Err(Error::Crypto));
    }
    for rung in [Rung::Accepted, Rung::Stored, Rung::Refused] {
        assert_eq!(receiver.receipt(me, rung, 0, 2), None);
    }
    assert_eq!(receiver.receipt(me, Rung::Delivered, 2, 1), None);
    assert_eq!(receiver.receipt(me, Rung::Delivered, 0, 3), None);
    assert_eq!(sender.receipt_key(me).expose(), receiver.chain.receipt_key.expose());
    assert_ne!(sender.receipt_key(&[3; 16]).expose(), receiver.chain.receipt_key.expose());
}

#[test]
fn a_recipient_cannot_vouch_for_what_makes_no_sense() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..3_u8).map(|n| pair.seal(&[n])).collect();
    for envelope in &envelopes {
        assert!(open(&mut receiver, envelope).is_ok());
    }
    let (me, last) = (&pair.b.member.id, salt(&envelopes[2]));
    let receipt = receiver.receipt(me, Rung::Delivered, 2, 2).unwrap();
    let refused = Receipt { rung: Rung::Refused, reason: Some(Reason::Gap), ..receipt };
    for (claimed, expected) in [
        (receipt, Ok(())),
        (refused, Ok(())),
        (Receipt { from: 0, ..receipt }, Ok(())),
        (Receipt { from: 3, ..receipt }, Err(Error::Crypto)),
        (Receipt { reason: Some(Reason::Gap), ..receipt }, Err(Error::Crypto)),
        (Receipt { reason: None, ..refused }, Err(Error::Crypto)),
        (Receipt { rung: Rung::Accepted, ..receipt }, Err(Error::Crypto)),
        (Receipt { rung: Rung::Stored, ..receipt }, Err(Error::Crypto)),
        (Receipt { chain: [0; 8], ..receipt }, Err(Error::Crypto)),
        (Receipt { from: 3, to: 3, ..receipt }, Err(Error::Crypto)),
    ] {
        // Each with the tag that its recipient would make for it.
        let tagged = receiver.chain.tagged(me, claimed, &last);
        assert_eq!(pair.sender.verify_receipt(me, &tagged, &last), expected, "{claimed:?}");
    }
}

#[test]
fn refusals_are_bound_to_their_reason() {
    let mut pair = Pair::direct();
    let receiver = pair.receiver();
    let envelope = pair.seal(b"text");
    let (me, salt) = (&pair.b.member.id, salt(&envelope));
    let refusal = receiver.refusal(me, Reason::Unreadable, 0, &salt);
    assert_eq!((refusal.rung, refusal.reason), (Rung::Refused, Some(Reason::Unreadable)));
    assert_eq!(pair.sender.verify_receipt(me, &refusal, &salt), Ok(()));
    for forged in [
        Receipt { reason: Some(Reason::Gap), ..refusal },
        Receipt { reason: None, ..refusal },
        Receipt { rung: Rung::Delivered, reason: None, ..refusal },
        Receipt { rung: Rung::Delivered, ..refusal },
    ] {
        assert_eq!(pair.sender.verify_receipt(me, &forged, &salt), Err(Error::Crypto));
    }
    // Whoever changed the salt on the way made the recipient refuse another message than the one that was sent.
    let elsewhere = receiver.refusal(me, Reason::Rewound, 0, &[0; 8]);
    assert_eq!(pair.sender.verify_receipt(me, &elsewhere, &salt), Err(Error::Crypto));
}

#[test]
fn no_receipt_covers_what_was_not_opened() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..24_u8).map(|n| pair.seal(&[n])).collect();
    let me = &pair.b.member.id;
    for n in [0, 1, 3, 4] {
        assert!(open(&mut receiver, &envelopes[n]).is_ok());
    }
    let can = |receiver: &Receiver, from, to| receiver.receipt(me, Rung::Delivered, from, to).is_some();
    assert!(can(&receiver, 0, 1) && can(&receiver, 3, 4) && can(&receiver, 4, 4));
    assert!(!can(&receiver, 0, 2) && !can(&receiver, 2, 2) && !can(&receiver, 1, 3) && !can(&receiver, 2, 4));
    assert!(open(&mut receiver, &envelopes[6]).is_ok());
    receiver.forget_skipped();
    // What was forgotten was not opened either: 2 and 5.
    assert!(can(&receiver, 0, 1) && can(&receiver, 6, 6) && can(&receiver, 3, 3));
    assert!(!can(&receiver, 0, 3) && !can(&receiver, 4, 6) && !can(&receiver, 5, 5) && !can(&receiver, 2, 2));
    for envelope in &envelopes[7..22] {
        assert!(open(&mut receiver, envelope).is_ok());
    }
    assert!(can(&receiver, 6, 21));
    assert!(!can(&receiver, 5, 21));
    assert!(open(&mut receiver, &envelopes[22]).is_ok());
    assert!(!can(&receiver, 6, 6), "the salt is forgotten");
    let recorded = |from, to: u8| {
        let salt = salt(&envelopes[usize::from(to)]);
        receiver.receipt_recorded(me, Rung::Opened, from, to.into(), &salt).map(|receipt| (receipt, salt))
    };
    let (receipt, salt) = recorded(6, 6).unwrap();
    assert_eq!(pair.sender.verify_receipt(me, &receipt, &salt), Ok(()));
    assert!(recorded(6, 7).is_some() && recorded(3, 4).is_none() && recorded(23, 23).is_none());
}

#[test]
fn receipts_outlive_their_chain() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelope = pair.seal(b"text");
    assert!(open(&mut receiver, &envelope).is_ok());
    let me = &pair.b.member.id;
    let receipt = receiver.receipt(me, Rung::Opened, 0, 0).unwrap();
    let stored = pair.sender.receipts().encode();
    drop(pair.sender);
    let verifier = ReceiptVerifier::decode(stored.expose()).ok().unwrap();
    assert_eq!(verifier.chain_id(), receiver.chain_id());
    assert_eq!(verifier.verify(me, &receipt, &salt(&envelope)), Ok(()));
    assert_eq!(verifier.verify(me, &receipt, &[0; 8]), Err(Error::Crypto));
    for bad in [&stored.expose()[..72], &[&stored.expose()[..], &[0]].concat(), &[2; 73], &[]] {
        assert!(matches!(ReceiptVerifier::decode(bad), Err(Error::Decode)));
    }
}

fn decoded<const SKIP: usize>(bytes: &[u8]) -> Result<ReceivingChain<SKIP>, Error> {
    ReceivingChain::decode(bytes)
}

#[test]
fn a_receiver_goes_on_where_it_was_stored() {
    let mut pair = Pair::group();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..40_u8).map(|n| pair.seal(&[n])).collect();
    for n in [0, 3, 1, 8, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 27] {
        // At every step a copy that was stored and read again does the same.
        let bytes = snapshot(&receiver);
        let mut restored = decoded::<8>(&bytes).ok().unwrap();
        assert_eq!(snapshot(&restored), bytes);
        assert_eq!(open(&mut restored, &envelopes[n]), open(&mut receiver, &envelopes[n]));
        assert_eq!((restored.next(), missing(&restored)), (receiver.next(), missing(&receiver)));
        assert_eq!(refuse(&mut restored, &envelopes[n], &[]), OpenError::Duplicate { n: n.try_into().unwrap() });
    }
    receiver.forget_skipped();
    let restored = decoded::<8>(&snapshot(&receiver)).ok().unwrap();
    assert!(restored.receipt(&[2; 16], Rung::Delivered, 25, 27).is_none());
    assert!(restored.receipt(&[2; 16], Rung::Delivered, 27, 27).is_some());
}

#[test]
fn a_stored_receiver_still_asks_for_signatures() {
    let mut pair = Pair::group();
    let mut restored = decoded::<8>(&snapshot(&pair.receiver())).ok().unwrap();
    let mut twin = pair.twin();
    twin.signed = false;
    let unsigned = seal(&mut twin, false, 0, b"unsigned");
    assert_eq!(refuse(&mut restored, &unsigned, b"unsigned"), UNREADABLE);
    let signed = pair.seal(b"signed");
    assert_eq!(open(&mut restored, &signed), Ok(b"signed".to_vec()));
}

#[test]
fn a_stored_receiver_still_knows_which_wraps_it_has_seen() {
    let mut pair = Pair::direct();
    let mut start = |epoch| {
        pair.sender =
            SendingChain::start(&pair.a.member, &pair.conversation, epoch, &mut TestRng::new(epoch.into())).unwrap();
        pair.wrap()
    };
    let (former, present, next) = (start(4), start(5), start(6));
    assert_eq!(pair.sender.epoch(), 6);
    let stored = snapshot(&pair.accept(present).ok().unwrap());
    let mut restored = decoded::<8>(&stored).ok().unwrap();
    assert_eq!(restored.epochs(), (3, 5));
    for (mut wrap, expected) in [
        (former, Err(AcceptError::Replayed)),
        (present, Err(AcceptError::Replayed)),
        (next, Ok(())),
        (next, Err(AcceptError::Replayed)),
    ] {
        let (a, b) = (&pair.a, &pair.b);
        assert_eq!(restored.replace(&mut wrap, &b.prekey(), &a.member, &a.bundle, &pair.conversation), expected);
    }
    assert_eq!(restored.epochs(), (3, 6));
}

#[test]
fn a_snapshot_is_bounded_and_checked() {
    let mut pair = Pair::direct();
    let mut receiver = pair.receiver();
    let envelopes: Vec<_> = (0..40_u8).map(|n| pair.seal(&[n])).collect();
    for envelope in &envelopes[..20] {
        assert!(open(&mut receiver, envelope).is_ok());
    }
    assert!(open(&mut receiver, &envelopes[28]).is_ok());
    let bytes = snapshot(&receiver);
    assert_eq!(bytes.len(), Receiver::SNAPSHOT_LEN);
    assert_eq!(receiver.encode(&mut [0; Receiver::SNAPSHOT_LEN - 1]), Err(BufferError::TxFull.into()));
    let refused = |bytes: &[u8]| matches!(decoded::<8>(bytes), Err(Error::Decode));
    for len in 0..bytes.len() {
        assert!(refused(&bytes[..len]), "{len} bytes");
    }
    assert!(refused(&[&bytes[..], &[0]].concat()));
    assert!(matches!(decoded::<7>(&bytes), Err(Error::Decode)), "more keys than fit");
    assert!(decoded::<64>(&bytes).is_ok());
    let with = |at: usize, value: &[u8]| {
        let mut other = bytes.clone();
        other[at..at + value.len()].copy_from_slice(value);
        other
    };
    let (salts, keys) = (SNAPSHOT_FIXED_LEN - 3, SNAPSHOT_FIXED_LEN - 2 + 192);
    for bad in [
        with(0, &[2]),
        with(1, &[2]),
        // Numbers that cannot be: next before first, next beyond the end.
        with(50, &[0, 0, 0, 200]),
        with(54, &[0, 1, 0, 1]),
        // Seventeen salts, one that is ahead, one twice; keys that are ahead, that belong to an opened message, or twice.
        with(salts, &[17]),
        with(salts + 1, &[0, 0, 0, 99]),
        with(salts + 1, &[0, 0, 0, 28]),
        with(keys, &[0, 9]),
        with(keys + 2, &[0, 0, 0, 99]),
        with(keys + 2, &[0, 0, 0, 28]),
        with(keys + 2, &[0, 0, 0, 21]),
        with(keys + 2, &[0xff; 4]),
    ] {
        assert!(refused(&bad));
    }
}

#[test]
fn every_error_says_what_it_is() {
    use std::string::ToString;

    let failed = Error::Crypto;
    let open = [OpenError::Duplicate { n: 7 }, OpenError::Old { n: 8, salt: [0; 8] }, UNREADABLE];
    let texts = [
        SealError::Exhausted.to_string(),
        SealError::from(failed).to_string(),
        AcceptError::Replayed.to_string(),
        AcceptError::Unreadable.to_string(),
        open[0].to_string(),
        open[1].to_string(),
        open[2].to_string(),
    ];
    for (index, text) in texts.iter().enumerate() {
        assert!(!text.is_empty() && !texts[..index].contains(text), "{text}");
    }
    assert_eq!(texts[1], failed.to_string());
    assert!(texts[4].contains('7') && texts[5].contains('8') && texts[6].contains(Reason::Unreadable.as_str()));
}
