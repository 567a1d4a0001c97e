//! Three members of a group, each with the compact chains of a device, and a server that delivers what it likes to whom it
//! likes: in any order, late, twice, changed, to another place, or not at all.
//!
//! The first member has a twin, as a machine that was restored from a snapshot has one. The model is what PROTOCOL 9.2 and
//! 9.6 say of a recipient without skipped keys that remembers one salt of each sender.

use std::sync::LazyLock;

use ossicle_core::{
    AcceptError, Bundle, BundleKeys, Conversation, EnvelopeHeader, Error, GroupChains, MAX_MESSAGES, Member, OpenError,
    Reason, Receipt, Rung, RustCrypto, SIGNED_OVERHEAD, WRAP_LEN, WrapHeader,
};
use ossicle_tests::Rng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::Reached;

const MEMBERS: usize = 3;
type Chains = GroupChains<{ MEMBERS - 1 }>;
type Salt = [u8; 8];

#[derive(Clone, Debug)]
enum Step {
    /// A member starts its chain anew; the twin does what the first member does.
    Start(usize),
    /// A member wraps its present chain, and the server delivers that at once, changed in a bit or not.
    Wrap(usize, usize, Option<(Index, u8)>),
    /// The server delivers a wrap that was seen before, changed in a bit or not, in the place of the one who is so far on.
    RepeatWrap(Index, usize, Option<(Index, u8)>),
    /// A member says something of so many bytes, and the first one's twin perhaps something else under the same number.
    Say(usize, bool, usize),
    /// The same, and the server delivers all of it to both others at once, first of all changed in a bit or not.
    Talk(usize, bool, Option<(Index, u8)>),
    /// The server delivers anything that was ever said, changed in a bit or not.
    Deliver(Index, usize, Option<(Index, u8)>),
    /// The last but so many.
    DeliverLate(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let who = || 0..MEMBERS;
    let change = || prop::option::weighted(0.4, (any::<Index>(), 0_u8..8));
    let step = prop_oneof![
        2 => who().prop_map(Step::Start),
        6 => (who(), who(), change()).prop_map(|(from, to, change)| Step::Wrap(from, to, change)),
        2 => (any::<Index>(), who(), change()).prop_map(|(which, on, change)| Step::RepeatWrap(which, on, change)),
        8 => (who(), prop::bool::weighted(0.2), 0_usize..40).prop_map(|(who, twin, len)| Step::Say(who, twin, len)),
        6 => (who(), prop::bool::weighted(0.2), change()).prop_map(|(who, twin, change)| Step::Talk(who, twin, change)),
        6 => (any::<Index>(), who(), change()).prop_map(|(which, to, change)| Step::Deliver(which, to, change)),
        8 => (0_usize..3, who()).prop_map(|(below, to)| Step::DeliverLate(below, to)),
    ];
    vec(step, 1..40)
}

struct Party {
    member: Member,
    keys: BundleKeys,
    bundle: Bundle,
}

static PARTIES: LazyLock<[Party; MEMBERS]> = LazyLock::new(|| {
    [1, 2, 3].map(|number: u8| {
        let member = Member { id: [number; 16], key: [number; 32] };
        let keys = BundleKeys::generate(u32::from(number), &mut Rng::new(number)).unwrap();
        let bundle = keys.bundle(&member, 3, [0; 32]);
        Party { member, keys, bundle }
    })
});

/// What somebody said.
struct Text {
    from: usize,
    envelope: Vec<u8>,
    body: Vec<u8>,
}

/// What a member must know of another one's chain.
#[derive(Clone, Copy, Default)]
struct Seen {
    chain: Option<[u8; 8]>,
    epoch: u32,
    next: u32,
    last: Option<Salt>,
}

impl Seen {
    /// Why an envelope of this chain is not opened, if it is one that its sender made.
    fn refusal(&self, header: &EnvelopeHeader) -> Option<OpenError> {
        let n = header.n;
        if n > self.next {
            return Some(OpenError::Refused(Reason::Gap));
        }
        if n == self.next {
            return (n >= MAX_MESSAGES).then_some(OpenError::Refused(Reason::Unreadable));
        }
        Some(match self.last.filter(|_| n + 1 == self.next) {
            Some(salt) if salt == header.salt => OpenError::Duplicate { n },
            Some(_) => OpenError::Refused(Reason::Rewound),
            None => OpenError::Old { n, salt: header.salt },
        })
    }
}

/// The place of `of` among the others of `at`.
fn place(of: usize, at: usize) -> usize {
    if of < at { of } else { of - 1 }
}

struct World<'r> {
    group: Conversation,
    chains: [Chains; MEMBERS],
    twin: Chains,
    started: [u8; MEMBERS],
    /// What each member sealed under the numbers of its present chain.
    salts: [Vec<Salt>; MEMBERS],
    seen: [[Seen; MEMBERS]; MEMBERS],
    wraps: Vec<(usize, usize, Vec<u8>, u32)>,
    said: Vec<Text>,
    reached: &'r Reached,
}

impl<'r> World<'r> {
    fn new(reached: &'r Reached) -> Self {
        let members: Vec<_> = PARTIES.iter().map(|party| party.member).collect();
        let mut world = Self {
            group: Conversation::group([9; 16], 1, &members).unwrap(),
            chains: [const { Chains::vacant() }; MEMBERS],
            twin: Chains::vacant(),
            started: [0; MEMBERS],
            salts: Default::default(),
            seen: Default::default(),
            wraps: Vec::new(),
            said: Vec::new(),
            reached,
        };
        for from in 0..MEMBERS {
            world.start(from);
            // The last one joins later, if ever.
            for to in (0..MEMBERS - 1).filter(|to| *to != from) {
                world.step(Step::Wrap(from, to, None));
            }
        }
        world
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Start(who) => self.start(who),
            Step::Wrap(from, to, change) if from != to => {
                let mut wrap = vec![0; WRAP_LEN];
                let (own, party) = (&PARTIES[from], &PARTIES[to]);
                let (own, other) = ((&own.keys, &own.bundle), (&party.member, &party.bundle));
                self.chains[from].wrap(&self.group, own, other, &mut Rng::new(7), &mut wrap).unwrap();
                let first = self.chains[from].next();
                self.wraps.push((from, to, wrap.clone(), first));
                if let Some((at, bit)) = change {
                    wrap[at.index(WRAP_LEN)] ^= 1 << bit;
                }
                self.accept(to, from, wrap, change.is_none().then_some((from, first)));
            }
            Step::RepeatWrap(which, on, change) if !self.wraps.is_empty() => {
                let (from, to, mut wrap, first) = which.get(&self.wraps).clone();
                if let Some((at, bit)) = change {
                    wrap[at.index(WRAP_LEN)] ^= 1 << bit;
                }
                // As if another member had sent it.
                let claimed = (from + on) % MEMBERS;
                if claimed != to {
                    self.accept(to, claimed, wrap, change.is_none().then_some((from, first)));
                }
            }
            Step::Say(who, twin, len) => self.say(who, twin, len),
            Step::Talk(who, twin, change) => {
                let before = self.said.len();
                self.say(who, twin, 9);
                for to in (0..MEMBERS).filter(|to| *to != who) {
                    if let Some((at, bit)) = change {
                        let mut envelope = self.said[before].envelope.clone();
                        let at = at.index(envelope.len());
                        envelope[at] ^= 1 << bit;
                        self.deliver(to, envelope);
                    }
                    for said in before..self.said.len() {
                        self.deliver(to, self.said[said].envelope.clone());
                    }
                }
            }
            Step::Deliver(which, to, change) if !self.said.is_empty() => {
                let mut envelope = which.get(&self.said).envelope.clone();
                if let Some((at, bit)) = change {
                    let at = at.index(envelope.len());
                    envelope[at] ^= 1 << bit;
                }
                self.deliver(to, envelope);
            }
            Step::DeliverLate(below, to) => {
                if let Some(index) = self.said.len().checked_sub(1 + below) {
                    self.deliver(to, self.said[index].envelope.clone());
                }
            }
            // There is nothing of the kind yet.
            _ => {}
        }
    }

    fn start(&mut self, who: usize) {
        self.started[who] += 1;
        let seed = self.started[who] * 10 + u8::try_from(who).unwrap();
        let me = &PARTIES[who].member;
        self.chains[who].start(me, &self.group, &mut Rng::new(seed)).unwrap();
        if who == 0 {
            self.twin.start(me, &self.group, &mut Rng::new(seed)).unwrap();
        }
        self.salts[who].clear();
    }

    fn say(&mut self, who: usize, twin: bool, len: usize) {
        let (salt, text) = seal(&mut self.chains[who], who, self.said.len(), len);
        self.salts[who].push(salt);
        self.said.push(text);
        if who == 0 {
            let (_, other) = seal(&mut self.twin, who, self.said.len(), len);
            self.said.extend(twin.then_some(other));
        }
    }

    /// The server brings `to` a wrap as one of `claimed`'s; `made` says who made it, and from which number on.
    fn accept(&mut self, to: usize, claimed: usize, mut wrap: Vec<u8>, made: Option<(usize, u32)>) {
        let header = WrapHeader::decode(&wrap).unwrap();
        let (sender, here) = (&PARTIES[claimed], place(claimed, to));
        let prekey = PARTIES[to].keys.prekey(&PARTIES[to].bundle).unwrap();
        let chains = &mut self.chains[to];
        let accepted = chains.accept(here, &mut wrap, &prekey, &sender.member, &sender.bundle, &self.group);
        assert_eq!(wrap, vec![0; WRAP_LEN], "nothing of it is left");
        let names = (0..MEMBERS).filter(|other| *other != claimed && *other != to);
        let is_taken = names.into_iter().any(|other| self.seen[to][other].chain == Some(header.chain_id))
            || header.chain_id == *self.chains[to].chain_id();
        let seen = &mut self.seen[to][claimed];
        let is_old = seen.chain.is_some() && header.chain_epoch <= seen.epoch;
        match made {
            Some((from, first)) if from == claimed && !is_taken && !is_old => {
                assert_eq!(accepted, Ok(()));
                let (chain, epoch) = (Some(header.chain_id), header.chain_epoch);
                *seen = Seen { chain, epoch, next: first, last: None };
                self.reached.note(if first == 0 { "wrap accepted" } else { "wrap accepted, from later on" });
            }
            _ if is_taken => {
                assert_eq!(accepted, Err(AcceptError::Unreadable));
                self.reached.note("the name of another chain refused");
            }
            _ if is_old => {
                assert_eq!(accepted, Err(AcceptError::Replayed));
                self.reached.note("old wrap dropped");
            }
            _ => {
                assert_eq!(accepted, Err(AcceptError::Unreadable));
                self.reached.note("changed wrap, or another's, refused");
            }
        }
    }

    /// The server brings `to` an envelope, perhaps one that nobody sealed.
    fn deliver(&mut self, to: usize, envelope: Vec<u8>) {
        let header = EnvelopeHeader::decode(&envelope).unwrap();
        let text = self.said.iter().find(|text| text.envelope == envelope);
        let from = (0..MEMBERS).find(|from| *from != to && self.seen[to][*from].chain == Some(header.chain_id));
        let mut buffer = envelope.clone();
        let opened = self.chains[to].open::<RustCrypto>(&mut buffer);
        let Some(from) = from else {
            assert_eq!(opened, Err(OpenError::Refused(Reason::Rekey)));
            return self.reached.note("rekey");
        };
        let (here, me) = (place(from, to), &PARTIES[to].member.id);
        let refusal = self.seen[to][from].refusal(&header);
        match (opened, refusal, text) {
            (Ok((at, opened)), None, Some(text)) => {
                assert_eq!((at, from), (here, text.from));
                assert!(opened.signed, "everything in a group is signed");
                assert_eq!((opened.n, opened.kind, opened.body), (header.n, 5, &text.body[..]));
                let seen = &mut self.seen[to][from];
                (seen.next, seen.last) = (header.n + 1, Some(header.salt));
                self.reached.note("opened");
                for rung in [Rung::Delivered, Rung::Opened] {
                    let receipt = self.chains[to].receipt(here, me, rung, header.n, &header.salt).unwrap();
                    self.verify(from, to, receipt, header.salt);
                }
            }
            (Err(error), refusal, text) => {
                assert!(refusal.is_some() || text.is_none(), "nothing was in its way: {error:?}");
                assert_eq!(error, refusal.unwrap_or(OpenError::Refused(Reason::Unreadable)));
                assert!(!buffer.windows(5).any(|window| window == b"text "), "no plaintext is left");
                self.reached.note(match error {
                    OpenError::Duplicate { .. } => "duplicate",
                    OpenError::Old { .. } => "older than remembered",
                    OpenError::Refused(Reason::Gap) => "gap",
                    OpenError::Refused(Reason::Rewound) => "rewound",
                    OpenError::Refused(Reason::Unreadable) => "unreadable",
                    other => panic!("{other:?}"),
                });
                if let OpenError::Refused(reason) = error {
                    let receipt = self.chains[to].refusal(here, me, reason, header.n, &header.salt).unwrap();
                    self.verify(from, to, receipt, header.salt);
                }
            }
            (Ok(_), _, _) => panic!("nobody sealed that, or it comes at the wrong time"),
        }
        let next = self.seen[to][from].next;
        assert!(self.chains[to].receipt(here, me, Rung::Delivered, next, &header.salt).is_none(), "not yet");
    }

    /// A receipt of `by` reaches `sender`, about its present chain or a former one.
    fn verify(&self, sender: usize, by: usize, receipt: Receipt, salt: Salt) {
        let (chains, me) = (&self.chains[sender], &PARTIES[by].member.id);
        let sealed = usize::try_from(receipt.to).ok().and_then(|to| self.salts[sender].get(to));
        let is_word = receipt.chain == *chains.chain_id() && sealed == Some(&salt);
        let expected = if is_word { Ok(()) } else { Err(Error::Crypto) };
        assert_eq!(chains.verify_receipt(me, &receipt, sealed.unwrap_or(&salt)), expected);
        self.reached.note(if is_word { "receipt verified" } else { "receipt about something else refused" });
        let other = &PARTIES[(0..MEMBERS).find(|other| *other != sender && *other != by).unwrap()].member.id;
        assert_eq!(chains.verify_receipt(other, &receipt, &salt), Err(Error::Crypto), "another member's");
    }
}

/// Seals the next text, which is like no other.
fn seal(chains: &mut Chains, from: usize, count: usize, len: usize) -> (Salt, Text) {
    let mut body = format!("text {count:05} ").into_bytes();
    body.resize(body.len() + len, b'.');
    let mut envelope = vec![0; body.len() + SIGNED_OVERHEAD];
    let sealed = chains.seal::<RustCrypto>(5, &body, &mut envelope).unwrap();
    assert_eq!((sealed.len, chains.next()), (envelope.len(), sealed.n + 1));
    (sealed.salt, Text { from, envelope, body })
}

const REGRESSIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/properties/group.regressions");

#[test]
fn a_group_hears_each_member_in_order_or_says_why_not() {
    let must_reach = [
        "changed wrap, or another's, refused",
        "duplicate",
        "gap",
        "old wrap dropped",
        "older than remembered",
        "opened",
        "receipt about something else refused",
        "receipt verified",
        "rekey",
        "rewound",
        "the name of another chain refused",
        "unreadable",
        "wrap accepted",
        "wrap accepted, from later on",
    ];
    crate::check(REGRESSIONS, 192, &must_reach, &steps(), |steps, reached| {
        let mut world = World::new(reached);
        steps.into_iter().for_each(|step| world.step(step));
    });
}
