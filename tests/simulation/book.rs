//! What everybody in a simulation has done, and what must not be true of it: the trace, the homes of the parties, and every
//! promise that is broken.

use core::fmt;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use ossicle_core::{Channel, Puzzle, Reason, Receipt, Rung, Rungs};

use crate::dice::Dice;

/// Everything that is kept of a run, outside of it.
pub(crate) struct Book {
    pub(crate) now: Duration,
    /// Nothing more is broken, and nobody begins anything new.
    pub(crate) calm: bool,
    /// Everybody closes.
    pub(crate) finish: bool,
    pub(crate) homes: Vec<Home>,
    pub(crate) broken: Vec<String>,
    /// How often what happened.
    pub(crate) reached: BTreeMap<String, usize>,
    /// When the store refused to read or write, the last time: what it refused then, and was sent again since nobody heard of it,
    /// comes behind what it took.
    pub(crate) refusing: Option<Duration>,
    /// How many servers share the store.
    pub(crate) nodes: u16,
    /// Queues are so short that they are full now and then: what is refused goes the same way.
    pub(crate) short: bool,
    /// The store could not look up whose receipts were told, or not take them: senders ask again by sending again.
    pub(crate) unread: bool,
    /// Items may have waited for longer than they may.
    pub(crate) may_expire: bool,
    /// The date was set so often. With the second time, what told a sender that his message has expired may have, too.
    pub(crate) jumps: u32,
    /// All that was noted.
    pub(crate) trace: Vec<String>,
    verbose: bool,
}

/// What one party keeps on its disk.
pub(crate) struct Home {
    pub(crate) id: [u8; 16],
    pub(crate) enrolled: bool,
    pub(crate) channel: Option<Channel>,
    /// The work that a busy server wants.
    pub(crate) puzzle: Option<Puzzle>,
    /// Resumptions in a row that broke.
    pub(crate) breaks: u8,
    /// How often it has started.
    pub(crate) starts: u64,
    pub(crate) record_limit: u16,
    /// By recipient.
    pub(crate) chains: BTreeMap<usize, Chain>,
    /// In the order in which the application wrote them.
    pub(crate) letters: Vec<Letter>,
    /// By chain, which is one sender's: what the application was given, in this order.
    given: BTreeMap<[u8; 8], Vec<u32>>,
    wraps: BTreeSet<[u8; 8]>,
}

pub(crate) struct Chain {
    pub(crate) id: [u8; 8],
    /// The server said that the wrap is done.
    pub(crate) wrapped: bool,
    next: u32,
}

pub(crate) struct Letter {
    pub(crate) to: usize,
    pub(crate) chain: [u8; 8],
    pub(crate) n: u32,
    pub(crate) len: usize,
    pub(crate) wanted: Rungs,
    /// When it left first, and last.
    pub(crate) left: Option<(Duration, Duration)>,
    /// What the sender was told, the best of it.
    pub(crate) told: Option<Rung>,
    pub(crate) refused: Option<Reason>,
}

impl Letter {
    /// The sender waits for nothing any more, and does not send it again.
    pub(crate) fn is_settled(&self) -> bool {
        let last = [Rung::Opened, Rung::Delivered, Rung::Stored, Rung::Accepted]
            .into_iter()
            .find(|rung| self.wanted.contains(*rung));
        match last {
            _ if self.refused.is_some() => true,
            Some(last) => self.told.is_some_and(|told| told >= last),
            None => self.left.is_some(),
        }
    }
}

/// Places of the parties in `homes`, as the first byte of their ids says them.
pub(crate) fn place(id: &[u8; 16]) -> usize {
    usize::from(id[0]) - 1
}

impl Book {
    pub(crate) fn new(seed: u64, parties: usize, verbose: bool) -> Self {
        let mut dice = Dice::new(seed, 1);
        let homes = (0..parties)
            .map(|place| Home {
                id: [place as u8 + 1; 16],
                enrolled: false,
                channel: None,
                puzzle: None,
                breaks: 0,
                starts: 0,
                record_limit: if dice.chance(30) { 1024 } else { 16_408 },
                chains: BTreeMap::new(),
                letters: Vec::new(),
                given: BTreeMap::new(),
                wraps: BTreeSet::new(),
            })
            .collect();
        Self {
            now: Duration::ZERO,
            calm: false,
            finish: false,
            homes,
            broken: Vec::new(),
            reached: BTreeMap::new(),
            refusing: None,
            nodes: 1,
            short: false,
            unread: false,
            may_expire: false,
            jumps: 0,
            trace: Vec::new(),
            verbose,
        }
    }

    /// The store does not take something, or keeps it no longer: among several nodes that may be a receipt for somebody who is there,
    /// as it is among all for who is not.
    pub(crate) fn may_lose_receipts(&mut self) {
        self.unread |= self.nodes > 1;
    }

    /// Writes down what somebody does.
    pub(crate) fn note(&mut self, who: impl fmt::Display, what: impl fmt::Display) {
        let line = format!("{:>8.3} {who:<8} {what}", self.now.as_secs_f64());
        if self.verbose {
            println!("{line}");
        }
        self.trace.push(line);
    }

    /// Counts something, to see whether the seeds come to it.
    pub(crate) fn reach(&mut self, what: impl fmt::Display) {
        *self.reached.entry(what.to_string()).or_default() += 1;
    }

    /// A promise is broken.
    pub(crate) fn fail(&mut self, what: impl fmt::Display) {
        self.note("BROKEN", &what);
        self.broken.push(format!("{:.3} s: {what}", self.now.as_secs_f64()));
    }

    /// The application of `from` writes a letter.
    pub(crate) fn write(&mut self, from: usize, to: usize, wanted: Rungs, len: usize) {
        let home = &mut self.homes[from];
        let chain = home.chains.entry(to).or_insert_with(|| {
            let mut id = [0x11; 8];
            (id[0], id[1]) = (from as u8 + 1, to as u8 + 1);
            Chain { id, wrapped: false, next: 0 }
        });
        let n = chain.next;
        chain.next += 1;
        let chain = chain.id;
        home.letters.push(Letter { to, chain, n, len, wanted, left: None, told: None, refused: None });
        self.note(from, format_args!("writes {n} to {to}, {len} bytes, wants {:04b}", wanted.bits()));
    }

    /// A wrap has come to a party.
    pub(crate) fn wrap(&mut self, to: usize, chain: [u8; 8]) {
        if usize::from(chain[1]) != to + 1 {
            self.fail(format_args!("{to} got a wrap of {chain:?}, which is another's"));
        }
        self.homes[to].wraps.insert(chain);
        self.note(to, format_args!("has the wrap of {}", chain[0] - 1));
    }

    /// An envelope has come to a party: what it tells its sender.
    pub(crate) fn deliver(&mut self, to: usize, envelope: &[u8], wanted: Rungs, waited: bool) -> Vec<Receipt> {
        let chain: [u8; 8] = envelope[..8].try_into().expect("a header");
        let n = u32::from_be_bytes(envelope[8..12].try_into().expect("a header"));
        let from = usize::from(chain[0]) - 1;
        if usize::from(chain[1]) != to + 1 {
            self.fail(format_args!("{to} got a message of {chain:?}, which is another's"));
            return Vec::new();
        }
        let Some(letter) = self.homes[from].letters.iter().find(|letter| (letter.chain, letter.n) == (chain, n)) else {
            self.fail(format_args!("{to} got a message of {from} that was never written: {n}"));
            return Vec::new();
        };
        let (changed, refused) = (envelope != seal(letter) || wanted != letter.wanted, letter.refused);
        // What only was to be accepted is lost with the recipient's connection; and what was refused while nobody heard of
        // it goes out again, behind what was not.
        let is_kept = [Rung::Stored, Rung::Delivered, Rung::Opened].into_iter().any(|rung| wanted.contains(rung));
        let excused = !is_kept || self.may_expire || self.short || self.refusing >= letter.left.map(|(first, _)| first);
        if changed {
            self.fail(format_args!("message {n} of {from} came changed to {to}"));
        }
        // What was refused may have come all the same: on its way already, or sent again before the sender knew. But not
        // what found no room in the store and could only come from there, unless another node had it, too.
        if self.nodes == 1 && refused == Some(Reason::QueueFull) && wanted.contains(Rung::Stored) {
            self.fail(format_args!("message {n} of {from} was refused (queue-full) and came to {to}"));
        }
        if !self.homes[to].wraps.contains(&chain) && !self.may_expire {
            self.fail(format_args!("message {n} of {from} came to {to} before the wrap of its chain"));
        }
        let given = self.homes[to].given.entry(chain).or_default();
        let known = given.contains(&n);
        let behind = given.last().is_some_and(|last| *last > n);
        if !known {
            given.push(n);
        }
        self.reach(match (known, waited) {
            (true, true) => "again, waited",
            (true, false) => "again, passed",
            (false, true) => "waited",
            (false, false) => "passed",
        });
        self.note(to, format_args!("gets {n} of {from}{}", if known { " again" } else { "" }));
        if behind && !known && !excused {
            self.fail(format_args!("message {n} of {from} came to {to} behind a later one"));
        }
        let tell = |rung| Receipt { rung, reason: None, chain, from: n, to: n, tag: Some([7; 16]) };
        [Rung::Delivered, Rung::Opened].into_iter().filter(|rung| wanted.contains(*rung)).map(tell).collect()
    }

    /// A receipt has come to a party.
    pub(crate) fn told(&mut self, who: usize, receipt: &Receipt) {
        let Receipt { rung, reason, chain, from, to, .. } = *receipt;
        let what = reason.map_or_else(|| format!("{rung:?}"), |reason| format!("{rung:?} ({reason})"));
        self.note(who, format_args!("is told {what} of {from} to {to} of chain {:?}", &chain[..2]));
        self.reach(&what);
        if usize::from(chain[0]) != who + 1 || from > to {
            self.fail(format_args!("{who} was told of what is not his: {receipt:?}"));
            return;
        }
        let recipient = usize::from(chain[1]) - 1;
        for n in from..=to {
            let given = self.homes[recipient].given.get(&chain).is_some_and(|given| given.contains(&n));
            let Some(letter) = self.homes[who].letters.iter_mut().find(|letter| (letter.chain, letter.n) == (chain, n))
            else {
                self.fail(format_args!("{who} was told of {n}, which it never wrote"));
                return;
            };
            if letter.left.is_none() || !letter.wanted.contains(rung) {
                let (left, wanted) = (letter.left, letter.wanted);
                self.fail(format_args!("{who} was told {rung:?} of {n}, left {left:?}, wanted {wanted:?}"));
                return;
            }
            match reason {
                Some(reason) => {
                    letter.refused = Some(reason);
                    let fine = matches!(reason, Reason::QueueFull | Reason::Unavailable | Reason::TooLarge)
                        || (reason == Reason::Expired && self.may_expire);
                    if !fine {
                        self.fail(format_args!("{who} was refused {n}: {reason}"));
                    }
                }
                None => {
                    letter.told = letter.told.max(Some(rung));
                    if matches!(rung, Rung::Delivered | Rung::Opened) && !given {
                        self.fail(format_args!("{who} was told {rung:?} of {n}, which {recipient} does not have"));
                    }
                }
            }
        }
    }

    /// What somebody still waits for.
    pub(crate) fn open(&self) -> Vec<String> {
        let mut open = Vec::new();
        for (from, home) in self.homes.iter().enumerate() {
            for letter in &home.letters {
                let Letter { to, n, told, refused, .. } = *letter;
                let given = self.homes[to].given.get(&letter.chain).is_some_and(|given| given.contains(&n));
                if !letter.is_settled() {
                    open.push(format!("{from} does not know what became of {n} to {to}, only {told:?}"));
                }
                if told >= Some(Rung::Stored) && !given && refused.is_none() && self.jumps < 2 {
                    open.push(format!("{to} does not have {n} of {from}, who was told {told:?}"));
                }
            }
        }
        open
    }
}

/// A message that only a server would take for one.
pub(crate) fn seal(letter: &Letter) -> Vec<u8> {
    let mut bytes = vec![0xee; letter.len];
    bytes[..8].copy_from_slice(&letter.chain);
    bytes[8..12].copy_from_slice(&letter.n.to_be_bytes());
    bytes[12..20].fill(letter.n as u8);
    bytes
}
