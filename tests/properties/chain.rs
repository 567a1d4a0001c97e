//! One sender, one recipient, and a server that delivers what it likes: in any order, late, twice, changed, or not at all.
//!
//! The sender has a twin, as a machine that was restored from a snapshot has one: it seals other texts under the same
//! numbers. The recipient restarts, and goes back to older states itself. The model is the table of PROTOCOL 9.6 over the
//! set of numbers that were opened, and says of each envelope, wrap and receipt what must become of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::LazyLock;

use ossicle_core::{
    AcceptError, Bundle, BundleKeys, Conversation, EnvelopeHeader, Error, Member, OpenError, Opened, Prekey, Reason,
    Receipt, ReceiptVerifier, ReceivingChain, Rung, RustCrypto, SIGNED_OVERHEAD, SendingChain, WRAP_LEN,
};
use ossicle_tests::Rng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::Reached;

type Salt = [u8; 8];

/// Salts that a recipient remembers (PROTOCOL 9.6).
const REMEMBERED: usize = 16;
/// Numbers of one chain.
const MAX: u32 = 65_536;

#[derive(Clone, Debug)]
enum Step {
    /// The sender, or its twin, seals a text of so many bytes, signed or not.
    Seal {
        twin: bool,
        signed: bool,
        len: usize,
    },
    /// So many messages, each delivered at once.
    Talk(u8),
    /// The present chain, from its present number on, or a new one in its place; a wrap that was seen before, or changed.
    Wrap,
    NewChain,
    RepeatWrap(Index),
    ChangeWrap(Index, u8),
    /// Of all that was ever sealed.
    Deliver(Index),
    /// The last but so many.
    DeliverLate(usize),
    /// One that was skipped.
    DeliverMissing(Index),
    Change(Index, Index, u8),
    /// The recipient restarts: with its state, with an older one that was kept, or keeps this one.
    Restart,
    Keep,
    GoBack(Index),
    Forget,
    /// A receipt over so many numbers up to the one that is so far below the next.
    Acknowledge {
        rung: Rung,
        count: u32,
        below: u32,
    },
    /// The same, of a message that was opened at any time.
    AcknowledgeOld {
        rung: Rung,
        count: u32,
        which: Index,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let rung = || {
        prop_oneof![
            4 => Just(Rung::Delivered),
            4 => Just(Rung::Opened),
            1 => prop_oneof![Just(Rung::Accepted), Just(Rung::Stored), Just(Rung::Refused)],
        ]
    };
    let index = any::<Index>;
    let seal = || {
        (prop::bool::weighted(0.2), any::<bool>(), 0_usize..40).prop_map(|(twin, signed, len)| Step::Seal {
            twin,
            signed,
            len,
        })
    };
    let step = prop_oneof![
        12 => seal(),
        6 => (0_usize..6).prop_map(Step::DeliverLate),
        6 => index().prop_map(Step::Deliver),
        4 => index().prop_map(Step::DeliverMissing),
        3 => (1_u8..24).prop_map(Step::Talk),
        2 => Just(Step::Wrap),
        2 => Just(Step::NewChain),
        1 => index().prop_map(Step::RepeatWrap),
        2 => (index(), 0_u8..8).prop_map(|(at, bit)| Step::ChangeWrap(at, bit)),
        3 => (index(), index(), 0_u8..8).prop_map(|(which, at, bit)| Step::Change(which, at, bit)),
        2 => Just(Step::Restart),
        2 => Just(Step::Keep),
        1 => index().prop_map(Step::GoBack),
        1 => Just(Step::Forget),
        4 => (rung(), 0_u32..20, 0_u32..20).prop_map(|(rung, count, below)| Step::Acknowledge { rung, count, below }),
        3 => (rung(), 0_u32..20, index())
            .prop_map(|(rung, count, which)| Step::AcknowledgeOld { rung, count, which }),
    ];
    vec(step, 1..60)
}

struct Party {
    member: Member,
    keys: BundleKeys,
    bundle: Bundle,
}

impl Party {
    fn new(number: u8) -> Self {
        let member = Member { id: [number; 16], key: [number; 32] };
        let keys = BundleKeys::generate(u32::from(number), &mut Rng::new(number)).unwrap();
        let bundle = keys.bundle(&member, 3, [0; 32]);
        Self { member, keys, bundle }
    }
}

static SENDER: LazyLock<Party> = LazyLock::new(|| Party::new(1));
static RECIPIENT: LazyLock<Party> = LazyLock::new(|| Party::new(2));

/// What somebody sealed.
struct Text {
    envelope: Vec<u8>,
    signed: bool,
    body: Vec<u8>,
}

/// What the recipient must know.
#[derive(Clone, Default)]
struct Model {
    /// None before the first wrap.
    chain: Option<[u8; 8]>,
    epochs: (u32, u32),
    first: u32,
    next: u32,
    /// The last that were opened, the oldest first.
    remembered: VecDeque<(u32, Salt)>,
    /// Skipped, and their keys are held.
    held: BTreeSet<u32>,
    /// Skipped, and their keys are erased.
    forgotten: BTreeSet<u32>,
    /// Everything that was opened: a host records it, a device has nothing of the kind.
    opened: BTreeMap<u32, Salt>,
}

/// What must become of an envelope.
#[derive(Debug, PartialEq)]
enum Verdict {
    Open,
    Duplicate,
    Old,
    Refuse(Reason),
}

impl Model {
    /// PROTOCOL 9.6, from the top.
    fn verdict(&self, header: &EnvelopeHeader, skip: usize) -> Verdict {
        let n = header.n;
        let salt = self.remembered.iter().find(|(opened, _)| *opened == n).map(|(_, salt)| *salt);
        if self.chain != Some(header.chain_id) {
            Verdict::Refuse(Reason::Rekey)
        } else if n < self.first {
            Verdict::Refuse(Reason::Unreadable)
        } else if salt == Some(header.salt) {
            Verdict::Duplicate
        } else if salt.is_some() {
            Verdict::Refuse(Reason::Rewound)
        } else if self.held.contains(&n) {
            Verdict::Open
        } else if n < self.next {
            Verdict::Old
        } else if (n - self.next) as usize > skip - self.held.len() {
            Verdict::Refuse(Reason::Gap)
        } else if n >= MAX {
            Verdict::Refuse(Reason::Unreadable)
        } else {
            Verdict::Open
        }
    }

    fn opened(&mut self, n: u32, salt: Salt) {
        self.held.extend(self.next..n);
        self.held.remove(&n);
        self.next = self.next.max(n + 1);
        self.remembered.push_back((n, salt));
        if self.remembered.len() > REMEMBERED {
            self.remembered.pop_front();
        }
        assert_eq!(self.opened.insert(n, salt), None, "no message twice");
    }

    /// Whether a receipt may say this of all of them. It may say less than it could: it takes for forgotten whatever lies
    /// between the first and the last that is.
    fn may_say(&self, rung: Rung, from: u32, to: u32) -> bool {
        let are_opened = from <= to && (from..=to).all(|n| self.opened.contains_key(&n));
        let near_forgotten = match (self.forgotten.first(), self.forgotten.last()) {
            (Some(low), Some(high)) => from != to && from <= *high && *low <= to,
            _ => false,
        };
        matches!(rung, Rung::Delivered | Rung::Opened) && are_opened && !near_forgotten
    }
}

struct World<'r, const SKIP: usize> {
    conversation: Conversation,
    prekey: Prekey,
    sending: SendingChain,
    twin: SendingChain,
    rng: Rng,
    /// Of the present chain, by number: what the sender keeps for the receipts.
    salts: BTreeMap<u32, Salt>,
    sealed: Vec<Text>,
    /// Each with the number that its chain begins at.
    wraps: Vec<(Vec<u8>, u32)>,
    receiving: ReceivingChain<SKIP>,
    model: Model,
    kept: Vec<(Vec<u8>, Model)>,
    reached: &'r Reached,
}

impl<'r, const SKIP: usize> World<'r, SKIP> {
    fn new(is_group: bool, reached: &'r Reached) -> Self {
        let members = [SENDER.member, RECIPIENT.member];
        let conversation = match is_group {
            false => Conversation::direct(&members[0], &members[1], 0),
            true => Conversation::group([9; 16], 1, &members).unwrap(),
        };
        let [sending, twin] = [0, 0].map(|epoch| chain(&conversation, epoch));
        Self {
            prekey: RECIPIENT.keys.prekey(&RECIPIENT.bundle).unwrap(),
            conversation,
            sending,
            twin,
            rng: Rng::new(3),
            salts: BTreeMap::new(),
            sealed: Vec::new(),
            wraps: Vec::new(),
            receiving: ReceivingChain::vacant(),
            model: Model::default(),
            kept: Vec::new(),
            reached,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Seal { twin, signed, len } => self.seal(twin, signed, len),
            Step::Talk(count) => {
                for _ in 0..count {
                    self.seal(false, false, 9);
                    self.deliver(self.sealed.last().unwrap().envelope.clone());
                }
            }
            Step::Wrap => {
                let wrap = self.wrap();
                self.wraps.push((wrap.clone(), self.sending.next()));
                self.accept(wrap, Some(self.sending.next()));
            }
            Step::NewChain => {
                let epoch = self.sending.epoch() + 1;
                [self.sending, self.twin] = [epoch; 2].map(|epoch| chain(&self.conversation, epoch));
                self.salts.clear();
            }
            Step::RepeatWrap(which) if !self.wraps.is_empty() => {
                let (wrap, first) = which.get(&self.wraps).clone();
                self.accept(wrap, Some(first));
            }
            Step::ChangeWrap(at, bit) => {
                let mut wrap = self.wrap();
                wrap[at.index(WRAP_LEN)] ^= 1 << bit;
                self.accept(wrap, None);
            }
            Step::Deliver(which) if !self.sealed.is_empty() => {
                self.deliver(which.get(&self.sealed).envelope.clone());
            }
            Step::DeliverLate(below) => {
                if let Some(index) = self.sealed.len().checked_sub(1 + below) {
                    self.deliver(self.sealed[index].envelope.clone());
                }
            }
            Step::DeliverMissing(which) if !self.model.held.is_empty() => {
                let n = *self.model.held.iter().nth(which.index(self.model.held.len())).unwrap();
                let is_it = |text: &&Text| {
                    let header = EnvelopeHeader::decode(&text.envelope).unwrap();
                    (Some(header.chain_id), header.n) == (self.model.chain, n)
                };
                if let Some(text) = self.sealed.iter().find(is_it) {
                    self.deliver(text.envelope.clone());
                }
            }
            Step::Change(which, at, bit) if !self.sealed.is_empty() => {
                let mut envelope = which.get(&self.sealed).envelope.clone();
                let at = at.index(envelope.len());
                envelope[at] ^= 1 << bit;
                self.deliver(envelope);
            }
            Step::Restart => {
                let snapshot = self.snapshot();
                self.restore(&snapshot);
            }
            Step::Keep => self.kept.push((self.snapshot(), self.model.clone())),
            Step::GoBack(which) if !self.kept.is_empty() => {
                let (snapshot, model) = which.get(&self.kept).clone();
                if model.chain.is_some() {
                    self.restore(&snapshot);
                    self.model = model;
                    self.reached.note("went back to an older state");
                }
            }
            Step::Forget => {
                self.receiving.forget_skipped();
                let held = core::mem::take(&mut self.model.held);
                if !held.is_empty() {
                    self.reached.note("forgot what was skipped");
                }
                self.model.forgotten.extend(held);
            }
            Step::Acknowledge { rung, count, below } => {
                let to = self.model.next.saturating_sub(1 + below);
                let from = (to + 1).saturating_sub(count);
                let receipt = self.receiving.receipt(&RECIPIENT.member.id, rung, from, to);
                let is_remembered = self.model.remembered.iter().any(|(n, _)| *n == to);
                assert_eq!(
                    receipt.is_some(),
                    is_remembered && self.model.may_say(rung, from, to),
                    "{rung:?} {from}..={to}"
                );
                self.reached.note(if receipt.is_some() { "receipt given" } else { "receipt not given" });
                if let Some(receipt) = receipt {
                    assert_eq!((receipt.rung, receipt.from, receipt.to, receipt.reason), (rung, from, to, None));
                    self.verify(receipt, self.model.opened[&to]);
                }
            }
            Step::AcknowledgeOld { rung, count, which } if !self.model.opened.is_empty() => {
                let (to, salt) = self.model.opened.iter().nth(which.index(self.model.opened.len())).unwrap();
                let from = (to + 1).saturating_sub(count);
                let receipt = self.receiving.receipt_recorded(&RECIPIENT.member.id, rung, from, *to, salt);
                assert_eq!(receipt.is_some(), self.model.may_say(rung, from, *to), "{rung:?} {from}..={to}");
                if let Some(receipt) = receipt {
                    self.verify(receipt, *salt);
                }
            }
            // There is nothing of the kind yet.
            _ => {}
        }
        self.hold();
    }

    fn wrap(&mut self) -> Vec<u8> {
        let mut wrap = vec![0; WRAP_LEN];
        let (from, to) = (&*SENDER, &*RECIPIENT);
        self.sending.wrap(&from.keys, &from.bundle, &to.member, &to.bundle, &mut self.rng, &mut wrap).unwrap();
        wrap
    }

    fn seal(&mut self, twin: bool, signed: bool, len: usize) {
        let signed = signed || self.conversation.signed;
        // No two texts are alike.
        let mut body = format!("text {:05} ", self.sealed.len()).into_bytes();
        body.resize(body.len() + len, b'.');
        let chain = if twin { &mut self.twin } else { &mut self.sending };
        let mut envelope = vec![0; body.len() + SIGNED_OVERHEAD];
        let n = chain.next();
        let sealed = chain.seal::<RustCrypto>(signed, 5, &body, &mut envelope).unwrap();
        envelope.truncate(sealed.len);
        assert_eq!((sealed.n, chain.next()), (n, n + 1));
        if !twin {
            self.salts.insert(n, sealed.salt);
        }
        self.sealed.push(Text { envelope, signed, body });
    }

    /// The server brings a wrap; `first` is the number that it begins at, if it is one that the sender made.
    fn accept(&mut self, mut wrap: Vec<u8>, first: Option<u32>) {
        let header = ossicle_core::WrapHeader::decode(&wrap).unwrap();
        let epochs = (SENDER.bundle.epoch, header.chain_epoch);
        let before = self.snapshot();
        let accepted =
            self.receiving.replace(&mut wrap, &self.prekey, &SENDER.member, &SENDER.bundle, &self.conversation);
        assert_eq!(wrap, vec![0; WRAP_LEN], "nothing of it is left");
        let expected = match first {
            _ if epochs <= self.model.epochs => Err(AcceptError::Replayed),
            None => Err(AcceptError::Unreadable),
            Some(_) => Ok(()),
        };
        assert_eq!(accepted, expected);
        match (accepted, first) {
            (Ok(()), Some(first)) => {
                let chain = Some(header.chain_id);
                self.model = Model { chain, epochs, first, next: first, ..Model::default() };
                self.reached.note("wrap accepted");
            }
            (error, _) => {
                assert_eq!(self.snapshot(), before, "a refused wrap changes nothing");
                let is_old = error == Err(AcceptError::Replayed);
                self.reached.note(if is_old { "old wrap dropped" } else { "changed wrap refused" });
            }
        }
    }

    /// The server brings an envelope, perhaps one that nobody sealed.
    fn deliver(&mut self, envelope: Vec<u8>) {
        let header = EnvelopeHeader::decode(&envelope).unwrap();
        let text = self.sealed.iter().find(|text| text.envelope == envelope);
        let before = self.snapshot();
        let mut buffer = envelope.clone();
        let expected = self.model.verdict(&header, SKIP);
        let late = header.n < self.model.next;
        match (self.receiving.open::<RustCrypto>(&mut buffer), text) {
            (Ok(Opened { n, signed, kind, body, salt }), Some(text)) => {
                assert_eq!(expected, Verdict::Open);
                assert_eq!((n, salt, signed, kind, body), (header.n, header.salt, text.signed, 5, &text.body[..]));
                self.model.opened(n, salt);
                self.reached.note(if late { "opened late" } else { "opened" });
                return;
            }
            (Ok(_), None) => panic!("nobody sealed that"),
            (Err(error), _) => {
                // What nobody sealed is not opened, and only the table may refuse what somebody did.
                let refused = match expected {
                    Verdict::Open => {
                        assert!(text.is_none(), "nothing was in its way");
                        OpenError::Refused(Reason::Unreadable)
                    }
                    Verdict::Duplicate => OpenError::Duplicate { n: header.n },
                    Verdict::Old => OpenError::Old { n: header.n, salt: header.salt },
                    Verdict::Refuse(reason) => OpenError::Refused(reason),
                };
                assert_eq!(error, refused);
                self.reached.note(match error {
                    OpenError::Duplicate { .. } => "duplicate",
                    OpenError::Old { .. } => "older than remembered",
                    OpenError::Refused(Reason::Gap) => "gap",
                    OpenError::Refused(Reason::Rekey) => "rekey",
                    OpenError::Refused(Reason::Rewound) => "rewound",
                    OpenError::Refused(Reason::Unreadable) => "unreadable",
                    other => panic!("{other:?}"),
                });
                if let (OpenError::Refused(reason), true) = (error, self.model.chain == Some(header.chain_id)) {
                    let me = &RECIPIENT.member.id;
                    self.verify(self.receiving.refusal(me, reason, header.n, &header.salt), header.salt);
                }
            }
        }
        assert_eq!(self.snapshot(), before, "a refused envelope changes nothing");
        assert!(!buffer.windows(5).any(|window| window == b"text "), "no plaintext is left");
    }

    /// The receipt reaches the sender, whose chain it is about or not; `salt` is that of the last message as it arrived.
    fn verify(&self, receipt: Receipt, salt: Salt) {
        let me = &RECIPIENT.member.id;
        let Some(sealed) = self.salts.get(&receipt.to).filter(|_| receipt.chain == *self.sending.chain_id()) else {
            // Of a former chain, or a number that only the twin has come to.
            assert_eq!(self.sending.verify_receipt(me, &receipt, &salt), Err(Error::Crypto));
            return;
        };
        let is_ours = *sealed == salt;
        let verifier = ReceiptVerifier::decode(self.sending.receipts().encode().expose()).unwrap();
        let expected = if is_ours { Ok(()) } else { Err(Error::Crypto) };
        assert_eq!(self.sending.verify_receipt(me, &receipt, sealed), expected);
        assert_eq!(verifier.verify(me, &receipt, sealed), expected);
        self.reached.note(if is_ours { "receipt verified" } else { "receipt for the twin's text refused" });
        let other_rung = match receipt.rung {
            Rung::Delivered => Rung::Opened,
            _ => Rung::Delivered,
        };
        let changed = [
            Receipt { from: receipt.from.wrapping_sub(1), ..receipt },
            Receipt { to: receipt.to + 1, ..receipt },
            Receipt { rung: other_rung, ..receipt },
            Receipt { reason: Some(Reason::QueueFull), ..receipt },
            Receipt {
                tag: receipt.tag.map(|mut tag| {
                    tag[15] ^= 1;
                    tag
                }),
                ..receipt
            },
            Receipt { tag: None, ..receipt },
        ];
        for changed in changed {
            assert_eq!(verifier.verify(me, &changed, sealed), Err(Error::Crypto), "{changed:?}");
        }
        assert_eq!(verifier.verify(&SENDER.member.id, &receipt, sealed), Err(Error::Crypto), "another recipient's");
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut snapshot = vec![0; ReceivingChain::<SKIP>::SNAPSHOT_LEN];
        let len = self.receiving.encode(&mut snapshot).unwrap();
        snapshot.truncate(len);
        snapshot
    }

    fn restore(&mut self, snapshot: &[u8]) {
        match ReceivingChain::decode(snapshot) {
            Ok(chain) => {
                self.receiving = chain;
                assert_eq!(self.snapshot(), snapshot, "a chain has one form");
                self.reached.note("restarted");
            }
            Err(_) => assert_eq!(self.model.chain, None, "only a vacant chain is not stored"),
        }
    }

    /// What holds at all times.
    fn hold(&self) {
        let Some(chain) = self.model.chain else { return };
        assert!(self.receiving.is_of(&chain));
        assert_eq!((self.receiving.epochs(), self.receiving.next()), (self.model.epochs, self.model.next));
        assert_eq!(self.receiving.missing().collect::<BTreeSet<_>>(), self.model.held);
        // Every number is of exactly one kind.
        for n in self.model.first..self.model.next {
            let kinds = [&self.model.held, &self.model.forgotten].map(|kind| usize::from(kind.contains(&n)));
            assert_eq!(kinds[0] + kinds[1] + usize::from(self.model.opened.contains_key(&n)), 1, "{n}");
        }
    }
}

/// The same chain each time that it is started with the same epoch: how a twin comes to be.
fn chain(conversation: &Conversation, epoch: u32) -> SendingChain {
    SendingChain::start(&SENDER.member, conversation, epoch, &mut Rng::new(100 + (epoch % 100) as u8)).unwrap()
}

const REGRESSIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/properties/chain.regressions");

fn run<const SKIP: usize>((is_group, steps): (bool, Vec<Step>), reached: &Reached) {
    let mut world = World::<SKIP>::new(is_group, reached);
    for step in [Step::Wrap].into_iter().chain(steps) {
        world.step(step);
    }
}

#[test]
fn each_envelope_comes_to_what_the_table_says() {
    let must_reach = [
        "changed wrap refused",
        "duplicate",
        "forgot what was skipped",
        "gap",
        "old wrap dropped",
        "older than remembered",
        "opened",
        "opened late",
        "receipt for the twin's text refused",
        "receipt given",
        "receipt not given",
        "receipt verified",
        "rekey",
        "restarted",
        "rewound",
        "unreadable",
        "went back to an older state",
        "wrap accepted",
    ];
    crate::check(REGRESSIONS, 256, &must_reach, &(any::<bool>(), steps()), run::<4>);
}

#[test]
fn a_recipient_without_room_for_skipped_keys_opens_in_order_only() {
    let must_reach = [
        "changed wrap refused",
        "duplicate",
        "gap",
        "old wrap dropped",
        "older than remembered",
        "opened",
        "receipt for the twin's text refused",
        "receipt given",
        "receipt not given",
        "receipt verified",
        "rekey",
        "restarted",
        "rewound",
        "unreadable",
        "went back to an older state",
        "wrap accepted",
    ];
    crate::check(REGRESSIONS, 64, &must_reach, &(any::<bool>(), steps()), run::<0>);
}
