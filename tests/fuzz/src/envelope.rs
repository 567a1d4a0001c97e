//! Wraps and envelopes, as a recipient gets them from a server that may send anything.
//!
//! An input is a byte of options and a script: a byte a step, with its operands. Bit 0: cryptography is the stub, so that
//! what the server makes up passes. Bit 1: the conversation is a group, whose messages are all signed. The sender and the
//! recipient are honest; between their steps the server delivers what it likes.

use std::sync::OnceLock;

use ossicle_core::{
    AcceptError, Bundle, BundleKeys, Conversation, Decision, EnvelopeHeader, GroupFlags, MAX_KIND, Member, OpenError,
    Opened, Prekey, Reason, Receipt, ReceiptVerifier, ReceivingChain, Rung, RustCrypto, SealError, SendingChain,
    WRAP_LEN, WrapHeader,
};

use crate::script::{Rng, Script, Stub, long};
use crate::{Reached, Target, keys};

/// See the module.
pub const TARGET: Target = Target { name: "envelope", run, states, seeds };

const STUB: u8 = 1;
const GROUP: u8 = 1 << 1;

/// Few, so that a script can fill them.
const SKIP: usize = 4;
const ROOM: usize = 1024;
/// What a script may cost, in steps; a step with curves counts for more.
const EFFORT: u32 = 256;
/// Envelopes that the server keeps back.
const MAX_LATE: usize = 32;

fn states() -> Vec<&'static str> {
    vec![
        "chain stored and read again",
        "duplicate",
        "envelope opened",
        "envelope refused: gap",
        "envelope refused: rekey",
        "envelope refused: rewound",
        "envelope refused: unreadable",
        "forged envelope opened under the stub",
        "late envelope opened",
        "message not sealed",
        "old",
        "receipt refused",
        "receipt verified",
        "signed envelope opened",
        "skipped keys forgotten",
        "snapshot made up",
        "snapshot refused",
        "wrap accepted",
        "wrap refused: replayed",
        "wrap refused: unreadable",
    ]
}

struct Party {
    member: Member,
    keys: BundleKeys,
    bundle: Bundle,
}

impl Party {
    fn new(number: u8, key: &keys::Key) -> Self {
        let member = Member { id: [number; 16], key: key.public().fingerprint() };
        let keys = BundleKeys::generate(u32::from(number), &mut Rng::new(number)).expect("the generator does not fail");
        let bundle = keys.bundle(&member, 3, [0; 32]);
        Self { member, keys, bundle }
    }
}

struct World {
    is_stub: bool,
    effort: u32,
    sender: &'static Party,
    recipient: &'static Party,
    prekey: Prekey,
    conversation: Conversation,
    sending: SendingChain,
    receiving: ReceivingChain<SKIP>,
    rng: Rng,
    /// What was sealed in the present chain: number, envelope, body.
    sealed: Vec<(u32, Vec<u8>, Vec<u8>)>,
    wraps: Vec<Vec<u8>>,
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let _stub = Stub::set(bits & STUB != 0);
    let mut world = World::new(bits);
    while world.effort > 0 && world.step(&mut script, reached).is_some() {}
}

impl World {
    fn new(bits: u8) -> Self {
        // Those of the stub are others: it is on or off by now.
        static PARTIES: [OnceLock<(Party, Party)>; 2] = [const { OnceLock::new() }; 2];
        let (sender, recipient) = PARTIES[usize::from(bits & STUB)]
            .get_or_init(|| (Party::new(1, keys::alice()), Party::new(2, keys::carol())));
        let members = [sender.member, recipient.member];
        let conversation = match bits & GROUP {
            0 => Conversation::direct(&sender.member, &recipient.member, 0),
            _ => Conversation::group([9; 16], 1, &members).expect("sorted"),
        };
        let mut rng = Rng::new(3);
        let sending = SendingChain::start(&sender.member, &conversation, 1, &mut rng).expect("a chain");
        let prekey = recipient.keys.prekey(&recipient.bundle).expect("its own bundle");
        let (sealed, wraps, receiving) = (Vec::new(), Vec::new(), ReceivingChain::vacant());
        let (is_stub, effort) = (bits & STUB != 0, EFFORT);
        Self { is_stub, effort, sender, recipient, prekey, conversation, sending, receiving, rng, sealed, wraps }
    }

    fn step(&mut self, script: &mut Script<'_>, reached: Reached<'_>) -> Option<()> {
        let step = script.u8()? % 14;
        let has_curves = step < 3 || step == 13;
        self.effort = self.effort.saturating_sub(if has_curves && !self.is_stub { EFFORT / 8 } else { 1 });
        match step {
            // The sender wraps its present chain, the server delivers.
            0 => {
                let mut wrap = [0; WRAP_LEN];
                let to = &self.recipient;
                let own = &self.sender;
                let len = self.sending.wrap(&own.keys, &own.bundle, &to.member, &to.bundle, &mut self.rng, &mut wrap);
                assert_eq!(len, Ok(WRAP_LEN));
                let is_newer = (own.bundle.epoch, self.sending.epoch()) > self.receiving.epochs();
                self.wraps.push(wrap.to_vec());
                let accepted = self.accept(&mut wrap, reached);
                assert_eq!(accepted.is_ok(), is_newer, "an honest wrap is accepted once: {accepted:?}");
            }
            // The server makes one up.
            1 => {
                let mut wrap = script.long()?.to_vec();
                let is_known = self.wraps.contains(&wrap);
                let header = WrapHeader::decode(&wrap);
                assert_eq!(header.is_ok(), wrap.len() == WRAP_LEN);
                let accepted = self.accept(&mut wrap, reached);
                assert!(accepted.is_err() || self.is_stub || is_known, "a wrap that nobody made");
                assert!(wrap.iter().all(|byte| *byte == 0) || wrap.len() != WRAP_LEN, "a wrap is erased");
            }
            // The sender starts a new chain.
            2 => {
                let epoch = self.sending.epoch().checked_add(1)?;
                self.sending =
                    SendingChain::start(&self.sender.member, &self.conversation, epoch, &mut self.rng).ok()?;
                self.sealed.clear();
            }
            // The sender seals, the server delivers.
            3 => {
                let (options, body) = (script.u8()?, script.long()?);
                let mut envelope = self.seal(options, body)?;
                if envelope.is_empty() {
                    reached("message not sealed");
                    return Some(());
                }
                let ahead = (self.sending.next() - 1).checked_sub(self.receiving.next());
                let room = SKIP - self.receiving.missing().count();
                let is_due = self.receiving.is_of(self.sending.chain_id())
                    && ahead.is_some_and(|ahead| usize::try_from(ahead).is_ok_and(|ahead| ahead <= room));
                let opened = self.open(&mut envelope, reached);
                assert!(opened.is_ok() || !is_due || self.is_stub, "nothing was in its way: {opened:?}");
            }
            // The sender seals, the server keeps it back.
            4 => {
                let (options, body) = (script.u8()?, script.long()?);
                self.seal(options, body)?;
            }
            // The server delivers what it kept, perhaps with a bit changed.
            5 => {
                let (index, bit) = (usize::from(script.u8()?), usize::from(script.u16()?));
                let (_, envelope, _) = self.sealed.get(index)?;
                let mut envelope = envelope.clone();
                let is_changed = bit != 0;
                if is_changed {
                    let bit = bit % (envelope.len() * 8);
                    envelope[bit / 8] ^= 1 << (bit % 8);
                }
                let opened = self.open(&mut envelope, reached);
                assert!(!is_changed || self.is_stub || opened.is_err(), "a changed envelope");
            }
            // The server makes an envelope up: all of it, or what is behind the name of the present chain.
            6 => {
                let mut envelope = script.long()?.to_vec();
                if self.open(&mut envelope, reached).is_ok() {
                    reached("forged envelope opened under the stub");
                }
            }
            7 => {
                let rest = script.long()?;
                let mut envelope = [&self.receiving.chain_id()[..], rest].concat();
                if self.open(&mut envelope, reached).is_ok() {
                    reached("forged envelope opened under the stub");
                }
            }
            8 => {
                self.receiving.forget_skipped();
                assert_eq!(self.receiving.missing().count(), 0);
                reached("skipped keys forgotten");
            }
            // The recipient restarts.
            9 => {
                let snapshot = self.snapshot();
                match ReceivingChain::decode(&snapshot) {
                    Ok(chain) => {
                        self.receiving = chain;
                        assert_eq!(self.snapshot(), snapshot, "a chain has one form");
                        reached("chain stored and read again");
                    }
                    Err(_) => {
                        assert!(!self.receiving.is_of(self.receiving.chain_id()), "only a vacant chain is not stored")
                    }
                }
            }
            // Its disk is broken.
            10 => {
                let (at, bytes) = (usize::from(script.u16()?), script.long()?);
                let mut snapshot = self.snapshot();
                snapshot.truncate(at);
                snapshot.extend_from_slice(bytes);
                match ReceivingChain::<SKIP>::decode(&snapshot) {
                    Ok(chain) => {
                        let mut again = vec![0; ReceivingChain::<SKIP>::SNAPSHOT_LEN];
                        let len = chain.encode(&mut again).expect("what was read can be written");
                        assert_eq!(again[..len], snapshot, "a chain has one form");
                        reached("snapshot made up");
                        // No oracle holds for it, except under the stub.
                        if self.is_stub {
                            self.receiving = chain;
                        }
                    }
                    Err(_) => reached("snapshot refused"),
                }
            }
            // The recipient acknowledges.
            11 => {
                let (rung, from, to) = (script.u8()?, u32::from(script.u16()?), u32::from(script.u16()?));
                let rung = if rung & 1 == 0 { Rung::Delivered } else { Rung::Opened };
                let me = self.recipient.member.id;
                let receipt = self.receiving.receipt(&me, rung, from, to)?;
                let (_, envelope, _) = self.sealed.iter().find(|(n, ..)| *n == to)?;
                let salt = EnvelopeHeader::decode(envelope).expect("it was sealed").salt;
                if self.receiving.is_of(self.sending.chain_id()) && !self.is_stub {
                    assert_eq!(self.sending.verify_receipt(&me, &receipt, &salt), Ok(()));
                    let verifier = ReceiptVerifier::decode(self.sending.receipts().encode().expose()).expect("stored");
                    assert_eq!(verifier.verify(&me, &receipt, &salt), Ok(()));
                    let longer = Receipt { to: to + 1, ..receipt };
                    assert!(self.sending.verify_receipt(&me, &longer, &salt).is_err(), "no more than was said");
                    reached("receipt verified");
                }
            }
            // The server makes a receipt up.
            12 => {
                let (rung, reason, to, tag) = (script.u8()?, script.u8()?, script.u16()?, script.u16()?);
                let receipt = Receipt {
                    rung: Rung::from_code(rung)?,
                    reason: Reason::from_code(reason),
                    chain: *self.sending.chain_id(),
                    from: 0,
                    to: to.into(),
                    tag: Some(u128::from(tag).to_be_bytes()),
                };
                assert!(self.sending.verify_receipt(&self.recipient.member.id, &receipt, &[0; 8]).is_err());
                reached("receipt refused");
            }
            // And a decision of a member about the conversation.
            _ => {
                let decisions =
                    [Decision::Init(GroupFlags::NONE), Decision::Accept, Decision::Decline, Decision::Close];
                let signature: [u8; 64] = script.long()?.try_into().ok()?;
                for decision in decisions {
                    let verified = decision.verify(&self.sender.bundle, &self.conversation, &signature).is_ok();
                    assert!(!verified || self.is_stub, "the sender never decided");
                }
            }
        }
        Some(())
    }

    fn seal(&mut self, options: u8, body: &[u8]) -> Option<Vec<u8>> {
        let (is_signed, kind) = (options & 0x80 != 0, options & MAX_KIND);
        let mut out = [0; ROOM];
        let before = self.sending.next();
        match self.sending.seal::<RustCrypto>(is_signed, kind, body, &mut out) {
            Ok(sealed) => {
                assert_eq!((sealed.n, self.sending.next()), (before, before + 1));
                let envelope = out[..sealed.len].to_vec();
                if self.sealed.len() < MAX_LATE {
                    self.sealed.push((sealed.n, envelope.clone(), body.to_vec()));
                }
                Some(envelope)
            }
            Err(error) => {
                let must_sign = self.conversation.signed && !is_signed;
                assert!(must_sign || body.len() + 101 > ROOM || error == SealError::Exhausted, "{error:?}");
                assert_eq!(self.sending.next(), before, "a refused message takes no number");
                Some(Vec::new())
            }
        }
    }

    fn accept(&mut self, wrap: &mut [u8], reached: Reached<'_>) -> Result<(), AcceptError> {
        let before = self.snapshot();
        let (from, bundle) = (&self.sender.member, &self.sender.bundle);
        let accepted = self.receiving.replace(wrap, &self.prekey, from, bundle, &self.conversation);
        match accepted {
            Ok(()) => reached("wrap accepted"),
            Err(error) => {
                assert_eq!(self.snapshot(), before, "a refused wrap changes nothing");
                reached(match error {
                    AcceptError::Replayed => "wrap refused: replayed",
                    _ => "wrap refused: unreadable",
                });
            }
        }
        accepted
    }

    fn open(&mut self, envelope: &mut [u8], reached: Reached<'_>) -> Result<(), OpenError> {
        let before = self.snapshot();
        let sent = envelope.to_vec();
        let (ahead, was_missing) = (self.receiving.next(), self.receiving.missing().collect::<Vec<_>>());
        let must_sign = self.conversation.signed;
        match self.receiving.open::<RustCrypto>(envelope) {
            Ok(Opened { n, signed, kind, body, salt }) => {
                assert!(signed || !must_sign, "a group's messages are signed");
                assert!(kind <= MAX_KIND);
                assert!(n >= ahead || was_missing.contains(&n), "no message twice");
                assert_eq!(EnvelopeHeader::decode(&sent).map(|header| (header.n, header.salt)), Ok((n, salt)));
                if !self.is_stub {
                    let honest = self
                        .sealed
                        .iter()
                        .any(|(number, sealed, text)| *number == n && *sealed == sent && text == body);
                    assert!(honest || self.sealed.len() == MAX_LATE, "only what the sender sealed opens");
                }
                reached("envelope opened");
                if signed {
                    reached("signed envelope opened");
                }
                if n < ahead {
                    reached("late envelope opened");
                }
                assert!(self.receiving.next() > n && self.receiving.missing().all(|missing| missing != n));
                Ok(())
            }
            Err(error) => {
                assert_eq!(self.snapshot(), before, "a refused envelope changes nothing");
                reached(match error {
                    OpenError::Duplicate { .. } => "duplicate",
                    OpenError::Old { .. } => "old",
                    OpenError::Refused(Reason::Gap) => "envelope refused: gap",
                    OpenError::Refused(Reason::Rekey) => "envelope refused: rekey",
                    OpenError::Refused(Reason::Rewound) => "envelope refused: rewound",
                    OpenError::Refused(Reason::Unreadable) => "envelope refused: unreadable",
                    other => panic!("a refusal that nobody told the targets of: {other:?}"),
                });
                Err(error)
            }
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut snapshot = vec![0; ReceivingChain::<SKIP>::SNAPSHOT_LEN];
        let len = self.receiving.encode(&mut snapshot).expect("there is room for the longest");
        snapshot.truncate(len);
        snapshot
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let send = |options: u8, body: &[u8]| [&[3, options][..], &long(body)].concat();
    let keep = |options: u8, body: &[u8]| [&[4, options][..], &long(body)].concat();
    let late = |index: u8, bit: u16| [&[5, index][..], &bit.to_be_bytes()].concat();
    let receipt = |rung: u8, from: u16, to: u16| [&[11, rung][..], &from.to_be_bytes(), &to.to_be_bytes()].concat();
    let broken = |at: u16, bytes: &[u8]| [&[10][..], &at.to_be_bytes(), &long(bytes)].concat();
    let with_rest = |step: u8, bytes: &[u8]| [&[step][..], &long(bytes)].concat();
    let script = |bits: u8, steps: &[&[u8]]| [&[bits][..], &steps.concat()].concat();
    let [wrap, new_chain, forget, restart] = [[0], [2], [8], [9]];
    let signed = 0x80;

    let direct: &[&[u8]] = &[
        &wrap,
        &send(0, b"21.50C led=0"),
        &send(signed, b"signed"),
        &receipt(0, 0, 1),
        &receipt(1, 1, 1),
        &restart,
        &send(1, b""),
        &wrap,
        &new_chain,
        &send(0, b"not yet wrapped"),
        &wrap,
        &send(0, b"wrapped"),
    ];
    let gaps: &[&[u8]] = &[
        &wrap,
        &keep(0, b"zero"),
        &keep(0, b"one"),
        &send(0, b"two"),
        &late(1, 0),
        &late(1, 0),
        &restart,
        &late(0, 9 * 8),
        &late(0, 12 * 8 + 100),
        &keep(0, b"three"),
        &send(0, b"four"),
        &forget,
        &late(3, 0),
        &keep(0, b"five"),
        &keep(0, b"six"),
        &keep(0, b"seven"),
        &keep(0, b"eight"),
        &keep(0, b"nine"),
        &send(0, b"ten"),
    ];
    // The salt of a message that was opened, changed: the chain went back, or so it looks.
    let rewound: &[&[u8]] = &[&wrap, &send(0, b"zero"), &late(0, 12 * 8), &late(0, 0)];
    let group: &[&[u8]] =
        &[&wrap, &send(signed, b"to all"), &send(0, b"unsigned"), &keep(signed, b"late"), &late(1, 0)];
    let disk: &[&[u8]] = &[
        &wrap,
        &send(0, b"zero"),
        &broken(0, &[]),
        &broken(66, &[0, 0, 0, 1]),
        &broken(0xffff, &[]),
        &[12, 3, 0, 0, 0, 0, 1],
        &[12, 5, 13, 0, 0, 0, 1],
    ];
    let header = [&[0, 0, 0, 2][..], &[7; 8]].concat();
    let made_up = |kind: u8, n: u8| [&[0, 0, 0, n][..], &[7; 8], &[kind], b"made up", &[0x54; 16]].concat();
    let forged: &[&[u8]] = &[
        &with_rest(1, &[1; WRAP_LEN]),
        &with_rest(1, &[1; 9]),
        &with_rest(6, &[6; 60]),
        &wrap,
        &with_rest(7, &header),
        &with_rest(7, &made_up(3, 0)),
        &with_rest(7, &made_up(3, 3)),
        &with_rest(7, &[&made_up(0x83, 4)[..20], &[0x53; 64], &[0x54; 16]].concat()),
        &with_rest(13, &[0x53; 64]),
    ];
    let mut wrap_text = vec![9; 16 + 8];
    wrap_text.extend([0, 0, 0, 8, 0, 0, 0, 2]);
    wrap_text.extend([0x45; 32]);
    wrap_text.extend([0, 0, 0, 1]);
    wrap_text.extend([3; 96]);
    wrap_text.extend([0x53; 64]);
    wrap_text.extend([0x54; 16]);
    let forged_wrap: &[&[u8]] = &[&with_rest(1, &wrap_text), &with_rest(7, &made_up(0x80, 1)), &restart];
    vec![
        ("direct", script(0, direct)),
        ("gaps", script(0, gaps)),
        ("rewound", script(0, rewound)),
        ("group", script(GROUP, group)),
        ("disk", script(0, disk)),
        ("forged", script(0, forged)),
        ("stub-direct", script(STUB, direct)),
        ("stub-gaps", script(STUB, gaps)),
        ("stub-group", script(STUB | GROUP, group)),
        ("stub-disk", script(STUB, disk)),
        ("stub-forged", script(STUB, forged)),
        ("stub-forged-wrap", script(STUB | GROUP, forged_wrap)),
    ]
}
