//! What this client sends: letters that are kept until their receipts have come, and one chain per recipient.
//!
//! ```text
//!   post --> queue --seal--> unsent --link--> under way --stored--> resting --delivered--> gone
//!              ^                ^                 |                    |
//!              |                +-- connection ---+                    |
//!              +-------- refused, and a new chain can cure that -------+
//! ```
//!
//! A letter is durable before it leaves, together with the envelope that it leaves as (`store::home`): whichever process
//! holds the home next sends the same bytes again, and a recipient who has them knows them. A refusal that a new chain can
//! cure is cured: the directory is asked anew, a chain started and wrapped, and the letter sealed again, a few times at
//! most. Sending chains live here and nowhere else; of one that a former process had there is left what verifies its
//! receipts and repeats its wrap.

use core::time::Duration;
use std::collections::{BTreeMap, HashMap, VecDeque};

use getrandom::SysRng;
use ossicle_core::{
    Conversation, DirectoryEntry, Lookup, Member, Message, PeerStatus, RECORD_OVERHEAD, Reason, Receipt, Rung, Rungs,
    SIGNED_OVERHEAD, SealError, SendingChain, SignedBundle, Subject, WRAP_LEN,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::agent::{Desk, Ended, Pending};
use super::local::Reply;
use super::peers::{Rejected, admit, check_bundle};
use super::{Failure, KIND_TEXT, MESSAGE_HEAD_LEN, now};
use crate::crypto::HostAead;
use crate::name::Name;
use crate::store::home::{
    HomeStore, HomeStoreError, Letter as KeptLetter, LetterChain, LetterChange, MAX_LETTER_BYTES, MAX_LETTERS,
};

/// New chains that one letter may cost.
const MAX_TRIES: u8 = 3;
/// Letters under way to one recipient: fewer than the keys that a recipient keeps for what it missed.
const WINDOW: usize = 48;
/// Salts that are remembered of a chain beyond those of its letters, to verify cumulative receipts with.
const SALTS: usize = 1024;
const CHAIN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long to wait where a refusal for the rate does not say.
const RATE_PAUSE: Duration = Duration::from_secs(1);
/// How long a letter that nobody waits for rests after a refusal that may pass.
const LULL: Duration = Duration::from_secs(60);
/// Seconds after which a letter that nobody waits for is given up: longer than any server keeps it.
const LETTER_AGE: u64 = 31 * 24 * 3600;
/// Seconds for which a letter is kept that its recipient has and whose sender wanted to know more.
const CURIOSITY: u64 = 3600;
/// Letters that make room at once when there is none.
const EVICTED: usize = 64;
/// Settled letters whose end is remembered, for who comes a moment too late to wait for it.
const REMEMBERED: usize = 64;
/// Bytes of a text that are shown of it.
const SHOWN: usize = 256;

/// Where the answers to a request go.
pub(super) type Replies = mpsc::UnboundedSender<Reply>;

#[derive(Default)]
pub(super) struct Outbox {
    /// By the recipient's normalised name.
    correspondences: HashMap<String, Correspondence>,
    /// Whose chain it is.
    chains: HashMap<[u8; 8], String>,
    ledger: Ledger,
}

/// What is to be made durable, and what leaves and is said once it is.
#[derive(Default)]
struct Ledger {
    /// The row of the next letter.
    next: i64,
    /// Letters that are not settled, and their bytes.
    letters: u64,
    bytes: u64,
    changes: Vec<LetterChange>,
    /// The rungs that the letters among `changes` want that are sealed, in their order.
    wanted: Vec<Rungs>,
    /// Who is told which letter of his is kept.
    kept: Vec<(Replies, i64)>,
    news: Vec<(i64, Settled)>,
    /// Letters that were settled lately.
    settled: VecDeque<(i64, Result<Rung, Reason>)>,
}

/// What became of a letter for whose fate nobody waited any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Its recipient.
    pub to: String,
    /// The beginning of its text.
    pub text: String,
    /// When it was given, in seconds since 1970.
    pub time: u64,
    /// How far it came, or why not further.
    pub outcome: Result<Rung, Reason>,
}

struct Correspondence {
    name: Name,
    /// Bytes of the longest body that the recipient takes.
    max_body: usize,
    /// Whether the directory was asked for the recipient's keys.
    looking: bool,
    /// Whether a letter was stored whose sender waits for more, and whether the directory was asked where the recipient is.
    wonders: bool,
    asking: bool,
    /// The newest last.
    chains: Vec<Chain>,
    /// Letters to be sealed, in the order in which they were given.
    queue: BTreeMap<i64, Letter>,
    /// Nothing is sent before: the server wants that.
    hold: Option<Instant>,
    /// Nothing is sent before, unless somebody gives a new letter.
    lull: Option<Instant>,
    /// How many chains may still be started.
    starts: Starts,
    /// When the next chain may be started that is wanted.
    next_start: Option<Instant>,
}

/// New chains cost both sides public-key operations: so many at once, and then one a minute. What meets the limit waits.
struct Starts {
    left: u32,
    /// Since when the next one is growing.
    since: Instant,
}

impl Starts {
    const AT_ONCE: u32 = 3;
    const EACH: Duration = Duration::from_secs(60);

    const fn new(now: Instant) -> Self {
        Self { left: Self::AT_ONCE, since: now }
    }

    /// When one may be started, if that is not now.
    fn wait(&mut self, now: Instant) -> Option<Instant> {
        self.grow(now);
        (self.left == 0).then(|| self.since + Self::EACH)
    }

    /// A recipient has the wrap of a new one.
    fn count(&mut self, now: Instant) {
        self.grow(now);
        self.left = self.left.saturating_sub(1);
    }

    fn grow(&mut self, now: Instant) {
        while self.left < Self::AT_ONCE && now.duration_since(self.since) >= Self::EACH {
            self.left += 1;
            self.since += Self::EACH;
        }
        if self.left == Self::AT_ONCE {
            self.since = now;
        }
    }
}

struct Chain {
    parts: LetterChain,
    /// Whether the store has that.
    kept: bool,
    /// Whether the server has the wrap, on this connection.
    announced: Announced,
    /// `None` if a former process had it.
    live: Option<Live>,
    /// Sealed, and not sent over this connection.
    unsent: BTreeMap<u32, Letter>,
    /// Sent over this connection, and not stored.
    under_way: BTreeMap<u32, Letter>,
    /// Stored at the server, or further.
    resting: BTreeMap<u32, Letter>,
    /// Of letters that are settled.
    salts: BTreeMap<u32, [u8; 8]>,
}

struct Live {
    sealing: SendingChain,
    /// Whether it was counted among those that were started.
    counted: bool,
    /// Whether letters may still be sealed with it.
    current: bool,
    /// Whether its recipient has said anything that only who has its keys can say.
    heard: bool,
    begun: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Announced {
    No,
    Asked,
    Yes,
}

struct Letter {
    row: i64,
    /// Until the ledger has it.
    body: Option<Zeroizing<Vec<u8>>>,
    len: usize,
    signed: bool,
    until: Rung,
    /// Who waits for it.
    replies: Option<Replies>,
    tries: u8,
    reached: Option<Rung>,
    time: u64,
    /// Of the envelope that it leaves as.
    salt: [u8; 8],
    /// Whether anything was said of it over this connection.
    answered: bool,
    /// Whether whoever waits knows that the recipient is not there.
    away: bool,
}

impl Letter {
    fn wanted(&self) -> Rungs {
        let wanted = Rungs::NONE.with(Rung::Accepted);
        match self.until {
            Rung::Accepted => wanted,
            // Beyond `stored` too: it is kept here until it is delivered.
            Rung::Opened => wanted.with(Rung::Stored).with(Rung::Delivered).with(Rung::Opened),
            _ => wanted.with(Rung::Stored).with(Rung::Delivered),
        }
    }

    fn is_attended(&self) -> bool {
        self.replies.as_ref().is_some_and(|replies| !replies.is_closed())
    }

    fn tell(&self, reply: Reply) {
        if let Some(replies) = &self.replies {
            let _ = replies.send(reply);
        }
    }

    /// Whether nothing more is to be done or heard.
    fn is_finished(&self) -> bool {
        let end = match self.until {
            Rung::Accepted => Rung::Accepted,
            Rung::Opened if self.is_attended() => Rung::Opened,
            _ => Rung::Delivered,
        };
        self.reached.is_some_and(|reached| reached >= end)
    }
}

impl Ledger {
    /// Notes a new letter and its text.
    fn keep(&mut self, name: &Name, letter: &mut Letter) {
        let Some(body) = letter.body.take() else { return };
        let kept = KeptLetter {
            row: letter.row,
            to: name.as_str().to_owned(),
            len: length(letter.len),
            signed: letter.signed,
            until: letter.until,
            reached: None,
            tries: letter.tries,
            time: letter.time,
            sealed: None,
        };
        self.changes.push(LetterChange::Keep(kept, body));
        self.kept.extend(letter.replies.clone().map(|replies| (replies, letter.row)));
    }

    /// The text of a letter.
    fn body(&self, store: &HomeStore, row: i64) -> Result<Zeroizing<Vec<u8>>, HomeStoreError> {
        let pending = self.changes.iter().find_map(|change| match change {
            LetterChange::Keep(letter, body) if letter.row == row => Some(body.clone()),
            _ => None,
        });
        pending.map_or_else(|| store.letter_body(row), Ok)
    }

    /// Whoever waits for a letter learns its end; where nobody does, it is news.
    fn settle(&mut self, name: &Name, mut letter: Letter, outcome: Result<Rung, Reason>, detail: Option<String>) {
        if letter.is_attended() {
            letter.tell(end(outcome, detail));
        } else {
            self.settled.truncate(REMEMBERED - 1);
            self.settled.push_front((letter.row, outcome));
            // Known by its text, which is in the ledger or in the store.
            self.keep(name, &mut letter);
            let (to, text) = (name.as_str().to_owned(), String::new());
            self.news.push((letter.row, Settled { to, text, time: letter.time, outcome }));
        }
        self.erase(&letter);
    }

    fn erase(&mut self, letter: &Letter) {
        self.letters = self.letters.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(length(letter.len));
        if letter.body.is_none() {
            self.changes.push(LetterChange::Settle(letter.row));
        }
    }

    /// Makes everything durable, and returns what may leave then.
    fn write(&mut self, store: &mut HomeStore) -> Result<Vec<(Rungs, Vec<u8>)>, HomeStoreError> {
        for place in 0..self.news.len() {
            let Some((row, _)) = self.news.get(place).filter(|(_, news)| news.text.is_empty()) else { continue };
            let body = self.body(store, *row)?;
            let text = String::from_utf8_lossy(body.get(..SHOWN).unwrap_or(&body)).into_owned();
            if let Some((_, news)) = self.news.get_mut(place) {
                news.text = text;
            }
        }
        if self.changes.is_empty() {
            return Ok(Vec::new());
        }
        store.change_letters(&self.changes)?;
        for (replies, letter) in self.kept.drain(..) {
            let _ = replies.send(Reply::Kept { letter });
        }
        let sealed = self.changes.drain(..).filter_map(|change| match change {
            LetterChange::Seal { envelope, .. } => Some(envelope),
            _ => None,
        });
        Ok(self.wanted.drain(..).zip(sealed).collect())
    }
}

impl Outbox {
    /// What former processes left.
    ///
    /// # Errors
    /// [`HomeStoreError`] if the store cannot be read, or holds what no ossicle wrote.
    pub(super) fn load(store: &HomeStore) -> Result<Self, HomeStoreError> {
        let (letters, next) = store.letters()?;
        let mut parts: HashMap<[u8; 8], LetterChain> =
            store.letter_chains()?.into_iter().map(|chain| (*chain.receipts.chain_id(), chain)).collect();
        let mut outbox = Self { ledger: Ledger { next, ..Ledger::default() }, ..Self::default() };
        for kept in letters {
            let name = Name::parse(&kept.to).map_err(|_| HomeStoreError::Damaged)?;
            let letter = Letter {
                row: kept.row,
                body: None,
                len: usize::try_from(kept.len).map_err(|_| HomeStoreError::Damaged)?,
                signed: kept.signed,
                until: kept.until,
                replies: None,
                tries: kept.tries,
                reached: kept.reached,
                time: kept.time,
                salt: kept.sealed.map_or([0; 8], |(_, _, salt)| salt),
                answered: false,
                away: false,
            };
            outbox.ledger.letters += 1;
            outbox.ledger.bytes += kept.len;
            let key = name.key().to_owned();
            let correspondence = outbox.correspondences.entry(key.clone()).or_insert_with(|| Correspondence::new(name));
            let Some((id, n, _)) = kept.sealed else {
                correspondence.queue.insert(letter.row, letter);
                continue;
            };
            if let Some(parts) = parts.remove(&id) {
                correspondence.chains.push(Chain::new(parts, true, None));
                outbox.chains.insert(id, key);
            }
            let chain = correspondence.chains.iter_mut().find(|chain| chain.is(&id)).ok_or(HomeStoreError::Damaged)?;
            let place = if letter.reached >= Some(Rung::Stored) { &mut chain.resting } else { &mut chain.unsent };
            place.insert(n, letter);
        }
        Ok(outbox)
    }

    /// Takes a letter.
    pub(super) fn post(&mut self, name: Name, body: Vec<u8>, signed: bool, until: Rung, replies: Replies) {
        let len = body.len();
        if !self.has_room(length(len)) {
            self.evict();
        }
        if !self.has_room(length(len)) {
            let detail = format!(
                "the outbox of this home is full ({MAX_LETTERS} messages or {} MiB that were not delivered)",
                MAX_LETTER_BYTES >> 20
            );
            let _ = replies.send(Reply::Refused { reason: Reason::QueueFull, detail: Some(detail) });
            return;
        }
        let letter = Letter {
            row: self.ledger.next,
            body: Some(Zeroizing::new(body)),
            len,
            signed,
            until,
            replies: Some(replies),
            tries: 0,
            reached: None,
            time: now(),
            salt: [0; 8],
            answered: false,
            away: false,
        };
        self.ledger.next += 1;
        self.ledger.letters += 1;
        self.ledger.bytes += length(len);
        let key = name.key().to_owned();
        let correspondence = self.correspondences.entry(key).or_insert_with(|| Correspondence::new(name));
        correspondence.lull = None;
        correspondence.queue.insert(letter.row, letter);
    }

    const fn has_room(&self, len: u64) -> bool {
        self.ledger.letters < MAX_LETTERS && self.ledger.bytes.saturating_add(len) <= MAX_LETTER_BYTES
    }

    /// The oldest letters that the server has and nobody waits for make room: `stored` is final for them.
    fn evict(&mut self) {
        let mut resting: Vec<i64> = Vec::new();
        for chain in self.correspondences.values().flat_map(|correspondence| &correspondence.chains) {
            resting.extend(chain.resting.values().filter(|letter| !letter.is_attended()).map(|letter| letter.row));
        }
        resting.sort_unstable();
        resting.truncate(EVICTED);
        for chain in self.correspondences.values_mut().flat_map(|correspondence| &mut correspondence.chains) {
            let evicted = chain.resting.extract_if(.., |_, letter| resting.binary_search(&letter.row).is_ok());
            for (n, letter) in evicted {
                self.ledger.erase(&letter);
                remember(&mut chain.salts, n, letter.salt);
            }
        }
    }

    /// Somebody waits for a letter again.
    pub(super) fn attend(&mut self, row: i64, replies: &Replies) {
        for correspondence in self.correspondences.values_mut() {
            let queued = correspondence.queue.get_mut(&row).map(|letter| (None, letter));
            let mut sealed = correspondence.chains.iter_mut().flat_map(|chain| {
                let id = *chain.id();
                let letters = chain.unsent.iter_mut().chain(&mut chain.under_way).chain(&mut chain.resting);
                letters.map(move |(n, letter)| (Some(message_id(&id, *n)), letter))
            });
            let found = queued.or_else(|| sealed.find(|(_, letter)| letter.row == row));
            let Some((id, letter)) = found else { continue };
            letter.replies = Some(replies.clone());
            letter.tell(Reply::Kept { letter: row });
            if let (Some(rung), Some(id)) = (letter.reached, id) {
                letter.tell(Reply::Rung { rung, id });
                letter.away = false;
                correspondence.wonders |= rung == Rung::Stored;
                if rung >= letter.until {
                    letter.tell(Reply::Done);
                    letter.replies = None;
                }
            }
            return;
        }
        let settled = self.ledger.settled.iter().find(|(settled, _)| *settled == row);
        let _ = replies.send(settled.map_or(Reply::Forgotten, |(_, outcome)| end(*outcome, None)));
    }

    /// The connection has gone, and with it all that was asked over it.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub(super) fn disconnected(&mut self, store: &mut HomeStore) -> Result<(), HomeStoreError> {
        self.save(store)?;
        for correspondence in self.correspondences.values_mut() {
            (correspondence.looking, correspondence.asking) = (false, false);
            for chain in &mut correspondence.chains {
                chain.announced = Announced::No;
                for letter in chain.under_way.values_mut() {
                    letter.answered = false;
                }
                chain.unsent.append(&mut chain.under_way);
            }
        }
        Ok(())
    }

    /// Tells everybody who waits.
    pub(super) fn broadcast(&self, reply: &Reply) {
        for correspondence in self.correspondences.values() {
            let sealed = correspondence.chains.iter().flat_map(Chain::letters);
            for letter in correspondence.queue.values().chain(sealed) {
                letter.tell(reply.clone());
            }
        }
    }

    /// The time before which some correspondence may not go on.
    pub(super) fn held_until(&self) -> Option<Instant> {
        let waits = |correspondence: &Correspondence| {
            let Correspondence { hold, lull, next_start, .. } = correspondence;
            [*hold, *lull, *next_start]
        };
        self.correspondences.values().flat_map(waits).flatten().min()
    }

    /// Sends what can be sent.
    pub(super) fn pump(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for (key, correspondence) in &mut self.correspondences {
            correspondence.pump(key, desk, &mut self.ledger)?;
        }
        self.commit(desk)
    }

    /// Makes durable what was noted, then sends what waited for that.
    pub(super) fn commit(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for (wanted, envelope) in self.ledger.write(desk.store)? {
            desk.link.send(&Message::Send { wanted, envelope: &envelope })?;
        }
        for (key, correspondence) in &mut self.correspondences {
            correspondence.ask(key, desk)?;
        }
        Ok(())
    }

    /// Makes durable what was noted.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub(super) fn save(&mut self, store: &mut HomeStore) -> Result<(), HomeStoreError> {
        for correspondence in self.correspondences.values_mut() {
            correspondence.keep(&mut self.ledger);
        }
        // What was sealed and could not leave is sent over the next connection.
        self.ledger.write(store).map(drop)
    }

    /// What became of letters that nobody waited for.
    pub(super) fn take_news(&mut self) -> Vec<Settled> {
        self.ledger.news.drain(..).map(|(_, news)| news).collect()
    }

    /// Letters that are not settled.
    pub(super) const fn letters(&self) -> u64 {
        self.ledger.letters
    }

    /// Letters that nobody can or will send any more are given up.
    pub(super) fn expire(&mut self) {
        let (before, curious) = (now().saturating_sub(LETTER_AGE), now().saturating_sub(CURIOSITY));
        for correspondence in self.correspondences.values_mut() {
            let Correspondence { name, queue, chains, .. } = correspondence;
            let is_old = |letter: &Letter| letter.time < before && !letter.is_attended();
            let mut old: Vec<Letter> = queue.extract_if(.., |_, letter| is_old(letter)).map(|(_, old)| old).collect();
            for chain in chains {
                let is_over =
                    |_: &u32, letter: &mut Letter| is_old(letter) || (letter.is_finished() && letter.time < curious);
                for place in [&mut chain.unsent, &mut chain.under_way, &mut chain.resting] {
                    for (n, letter) in place.extract_if(.., is_over) {
                        remember(&mut chain.salts, n, letter.salt);
                        old.push(letter);
                    }
                }
            }
            for letter in old {
                match letter.is_finished() {
                    true => self.ledger.erase(&letter),
                    false => self.ledger.settle(name, letter, Err(Reason::Expired), None),
                }
            }
        }
    }

    /// The server's store is not the one that took these letters: nobody knows whether it has them.
    pub(super) fn unstored(&mut self) {
        for chain in self.correspondences.values_mut().flat_map(|correspondence| &mut correspondence.chains) {
            chain.announced = Announced::No;
            for (n, mut letter) in chain.resting.extract_if(.., |_, letter| letter.reached == Some(Rung::Stored)) {
                letter.reached = None;
                self.ledger.changes.push(LetterChange::Reach(letter.row, None));
                chain.unsent.insert(n, letter);
            }
        }
    }

    /// The directory has answered.
    pub(super) fn found(
        &mut self,
        desk: &mut Desk<'_>,
        key: &str,
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let Some(correspondence) = self.correspondences.get_mut(key) else {
            return Ok(());
        };
        correspondence.looking = false;
        let begun = match answer {
            Ok(entry) => correspondence.begin(desk, &entry),
            Err(reason) => Err(Rejected::For { reason, detail: None }),
        };
        match begun {
            Ok(chain_id) => {
                self.chains.insert(chain_id, key.to_owned());
                correspondence.pump(key, desk, &mut self.ledger)
            }
            Err(rejected) => {
                let (reason, detail) = rejected.told(desk.alarm)?;
                correspondence.refuse_queue(&mut self.ledger, reason, detail.as_deref());
                Ok(())
            }
        }
    }

    /// The directory has answered whether a recipient is there.
    pub(super) fn located(&mut self, key: &str, answer: Result<DirectoryEntry<'_>, Reason>) {
        let Some(correspondence) = self.correspondences.get_mut(key) else {
            return;
        };
        correspondence.asking = false;
        let Ok(DirectoryEntry { status: PeerStatus::Offline { last_seen }, .. }) = answer else {
            return;
        };
        for letter in correspondence.chains.iter_mut().flat_map(|chain| chain.resting.values_mut()) {
            if letter.reached == Some(Rung::Stored) && !letter.away && letter.is_attended() {
                letter.away = true;
                letter.tell(Reply::Away { last_seen });
            }
        }
    }

    /// The server has answered a wrap.
    pub(super) fn wrapped(
        &mut self,
        desk: &mut Desk<'_>,
        chain_id: &[u8; 8],
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let Some(key) = self.chains.get(chain_id).cloned() else {
            return Ok(());
        };
        let Some(correspondence) = self.correspondences.get_mut(&key) else {
            return Ok(());
        };
        correspondence.wrapped(&mut self.ledger, chain_id, answer);
        correspondence.pump(&key, desk, &mut self.ledger)
    }

    /// What became of letters.
    pub(super) fn told(&mut self, desk: &mut Desk<'_>, receipt: &Receipt) -> Result<(), Ended> {
        let Some(key) = self.chains.get(&receipt.chain).cloned() else {
            return Ok(());
        };
        let Some(correspondence) = self.correspondences.get_mut(&key) else {
            return Ok(());
        };
        correspondence.told(&mut self.ledger, receipt);
        correspondence.pump(&key, desk, &mut self.ledger)?;
        self.forget_chains();
        Ok(())
    }

    /// Whether a recipient says that a present chain of this home is older than what he has had from it: the wrap is refused,
    /// and nothing of the chain has arrived. Without a tag: he has no keys to make one with.
    pub(super) fn is_behind(&self, receipt: &Receipt) -> bool {
        let rewound = receipt.rung == Rung::Refused && receipt.reason == Some(Reason::Rewound) && receipt.tag.is_none();
        let kept = self.chains.get(&receipt.chain).and_then(|key| self.correspondences.get(key));
        let chain = kept.and_then(|kept| kept.chains.iter().find(|chain| chain.is(&receipt.chain)));
        let unheard = |chain: &Chain| chain.live.as_ref().is_some_and(|live| live.current && !live.heard);
        rewound && receipt.to == 0 && chain.is_some_and(unheard)
    }

    fn forget_chains(&mut self) {
        let kept = &self.correspondences;
        self.chains.retain(|id, key| kept.get(key).is_some_and(|kept| kept.chains.iter().any(|chain| chain.is(id))));
    }

    /// Whether letters have left whose fate is not known yet.
    pub(super) fn is_under_way(&self) -> bool {
        let mut chains = self.correspondences.values().flat_map(|correspondence| &correspondence.chains);
        chains.any(|chain| !chain.under_way.is_empty())
    }

    /// This client has another key: every chain begins anew, and what was under way is sealed anew.
    pub(super) fn restart(&mut self) {
        for correspondence in self.correspondences.values_mut() {
            for chain in &mut correspondence.chains {
                chain.live = None;
                chain.unsent.append(&mut chain.under_way);
                for mut letter in core::mem::take(&mut chain.unsent).into_values() {
                    letter.reached = None;
                    self.ledger.changes.push(LetterChange::Unseal { row: letter.row, tries: letter.tries });
                    correspondence.queue.insert(letter.row, letter);
                }
            }
            correspondence.retire(&mut self.ledger);
        }
        self.forget_chains();
    }

    /// This recipient has another key, which the former one signed: what comes is sealed on a new chain.
    pub(super) fn followed(&mut self, key: &str) {
        for chain in self.correspondences.get_mut(key).into_iter().flat_map(|kept| &mut kept.chains) {
            chain.end();
        }
    }

    /// A person has accepted another key of this recipient. What was sealed for the former one is not sealed for the new
    /// one by itself: its sender may not have meant that.
    pub(super) fn rekeyed(&mut self, key: &str) {
        let Some(correspondence) = self.correspondences.get_mut(key) else {
            return;
        };
        for mut chain in correspondence.chains.drain(..) {
            self.chains.remove(chain.id());
            for letter in chain.take_letters() {
                let sentence = format!(
                    "refused({}): it went to the former key of {}: send it again if it is meant for the new one",
                    Reason::KeyChanged,
                    correspondence.name
                );
                if letter.is_attended() {
                    letter.tell(Reply::Failed(Failure::refused(sentence)));
                    self.ledger.erase(&letter);
                } else {
                    self.ledger.settle(&correspondence.name, letter, Err(Reason::KeyChanged), None);
                }
            }
            if chain.kept {
                self.ledger.changes.push(LetterChange::Forget(*chain.id()));
            }
        }
    }
}

impl Correspondence {
    fn new(name: Name) -> Self {
        Self {
            name,
            max_body: 0,
            looking: false,
            wonders: false,
            asking: false,
            chains: Vec::new(),
            queue: BTreeMap::new(),
            hold: None,
            lull: None,
            starts: Starts::new(Instant::now()),
            next_start: None,
        }
    }

    fn pump(&mut self, key: &str, desk: &mut Desk<'_>, ledger: &mut Ledger) -> Result<(), Ended> {
        self.retire(ledger);
        let done = self.send(key, desk, ledger);
        self.keep(ledger);
        done
    }

    /// Nothing is lost from here on.
    fn keep(&mut self, ledger: &mut Ledger) {
        for letter in self.queue.values_mut() {
            ledger.keep(&self.name, letter);
        }
    }

    /// Chains that are too old, and those that nothing is expected of.
    fn retire(&mut self, ledger: &mut Ledger) {
        for live in self.chains.iter_mut().filter_map(|chain| chain.live.as_mut()) {
            live.current &= live.begun.elapsed() < CHAIN_AGE;
        }
        for chain in self.chains.extract_if(.., |chain| !chain.is_current() && chain.is_idle()) {
            if chain.kept {
                ledger.changes.push(LetterChange::Forget(*chain.id()));
            }
        }
    }

    fn send(&mut self, key: &str, desk: &mut Desk<'_>, ledger: &mut Ledger) -> Result<(), Ended> {
        self.hold.take_if(|until| *until <= Instant::now());
        self.lull.take_if(|until| *until <= Instant::now());
        if self.hold.is_some() || self.lull.is_some() {
            return Ok(());
        }
        self.announce(desk)?;
        let mut under_way: usize = self.chains.iter().map(|chain| chain.under_way.len()).sum();
        for chain in self.chains.iter_mut().filter(|chain| chain.announced == Announced::Yes) {
            while under_way < WINDOW
                && let Some((n, letter)) = chain.unsent.pop_first()
            {
                let envelope = desk.store.letter_envelope(letter.row)?;
                desk.link.send(&Message::Send { wanted: letter.wanted(), envelope: &envelope })?;
                chain.under_way.insert(n, letter);
                under_way += 1;
            }
        }
        // What was sealed before goes first, and is heard of before it is overtaken: it may have to be sealed anew.
        let is_first = |chain: &Chain| {
            chain.unsent.is_empty() && (chain.is_current() || chain.under_way.values().all(|letter| letter.answered))
        };
        if !self.chains.iter().all(is_first) {
            return Ok(());
        }
        let mut used_up = false;
        let next = self.chains.last_mut();
        if let Some(chain) = next.filter(|chain| chain.is_current() && chain.announced == Announced::Yes) {
            while under_way < WINDOW {
                let Some((row, letter)) = self.queue.pop_first() else {
                    break;
                };
                if letter.len > self.max_body {
                    let detail = format!("{} takes at most {} bytes", self.name, self.max_body);
                    ledger.settle(&self.name, letter, Err(Reason::TooLarge), Some(detail));
                    continue;
                }
                if let Some(unsealed) = chain.seal(&self.name, desk.store, ledger, letter)? {
                    self.queue.insert(row, unsealed);
                    chain.end();
                    used_up = true;
                    break;
                }
                under_way += 1;
            }
        }
        let current = self.chains.last().is_some_and(Chain::is_current);
        self.next_start = None;
        if (used_up || !current) && !self.queue.is_empty() && !self.looking {
            self.next_start = self.starts.wait(Instant::now());
            if self.next_start.is_some() {
                return Ok(());
            }
            self.looking = true;
            let request = desk.requests.open(Pending::Recipient { key: key.to_owned() });
            let subject = Subject::Name(self.name.as_str());
            desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
        }
        Ok(())
    }

    /// Gives the server the wraps of chains that are needed and that it was not given over this connection.
    fn announce(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for chain in self.chains.iter_mut().filter(|chain| chain.announced == Announced::No) {
            let is_next = chain.is_current() && !self.queue.is_empty();
            if chain.unsent.is_empty() && !is_next {
                continue;
            }
            let request = desk.requests.open(Pending::Wrap { chain: *chain.id() });
            let LetterChain { peer, wrap, bundle, signature, .. } = &chain.parts;
            let bundle = SignedBundle { bundle, signature };
            desk.link.send(&Message::Wrap { request, to: *peer, wrap, bundle })?;
            chain.announced = Announced::Asked;
        }
        Ok(())
    }

    /// Asks whether the recipient is there, for whoever waits for more than that a letter is stored.
    fn ask(&mut self, key: &str, desk: &mut Desk<'_>) -> Result<(), Ended> {
        if self.asking || !core::mem::take(&mut self.wonders) {
            return Ok(());
        }
        let waits = |letter: &Letter| letter.reached == Some(Rung::Stored) && !letter.away && letter.is_attended();
        if self.chains.iter().flat_map(|chain| chain.resting.values()).any(waits) {
            let request = desk.requests.open(Pending::Whereabouts { key: key.to_owned() });
            let subject = Subject::Name(self.name.as_str());
            desk.link.send(&Message::Lookup(Lookup { request, key: false, bundle: false, subject }))?;
            self.asking = true;
        }
        Ok(())
    }

    /// Starts a chain to the client of this entry.
    fn begin(&mut self, desk: &mut Desk<'_>, entry: &DirectoryEntry<'_>) -> Result<[u8; 8], Rejected> {
        let mut peer = admit(desk.store, entry, Some(&self.name))?;
        let Some(signed) = &entry.bundle else {
            let detail = format!("{} was enrolled and never came", peer.name);
            return Err(Rejected::For { reason: Reason::Offline, detail: Some(detail) });
        };
        let bundle = check_bundle(&mut peer, signed)?;
        desk.store.put_peer(&peer)?;
        let payload = desk.link.max_payload().min(usize::from(entry.record_limit).saturating_sub(RECORD_OVERHEAD));
        self.max_body = payload.saturating_sub(MESSAGE_HEAD_LEN + SIGNED_OVERHEAD);

        let to = peer.member();
        let conversation = Conversation::direct(desk.me, &to, 0);
        // Durable before it is used: an epoch is never used twice.
        let epoch = desk.store.next_chain_epoch(&conversation.sid)?;
        let no_chain = |error: &dyn core::fmt::Display| Rejected::For {
            reason: Reason::Unavailable,
            detail: Some(format!("no chain can be started: {error}")),
        };
        let sealing =
            SendingChain::start(desk.me, &conversation, epoch, &mut SysRng).map_err(|error| no_chain(&error))?;
        let mut wrap = [0; WRAP_LEN];
        sealing
            .wrap(&desk.own.keys, &desk.own.bundle, &to, &bundle, &mut SysRng, &mut wrap)
            .map_err(|error| no_chain(&error))?;
        for chain in &mut self.chains {
            chain.end();
        }
        let parts = LetterChain {
            peer: peer.id,
            receipts: sealing.receipts().clone(),
            wrap: wrap.to_vec(),
            bundle: desk.own.bundle.encode().to_vec(),
            signature: desk.own.signature.clone(),
        };
        let chain_id = *sealing.chain_id();
        let live = Live { sealing, counted: false, current: true, heard: false, begun: Instant::now() };
        self.chains.push(Chain::new(parts, false, Some(live)));
        Ok(chain_id)
    }

    fn wrapped(&mut self, ledger: &mut Ledger, chain_id: &[u8; 8], answer: Result<(), (Reason, Option<u32>)>) {
        let Some(place) = self.chains.iter().position(|chain| chain.is(chain_id)) else {
            return;
        };
        match answer {
            Ok(()) => {
                if let Some(chain) = self.chains.get_mut(place) {
                    chain.announced = Announced::Yes;
                    if let Some(live) = &mut chain.live
                        && !core::mem::replace(&mut live.counted, true)
                    {
                        self.starts.count(Instant::now());
                    }
                }
            }
            Err((Reason::Rate, pause)) => self.pause(place, pause.map_or(RATE_PAUSE, millis)),
            Err((Reason::Unavailable, Some(pause))) => self.pause(place, millis(pause)),
            Err((reason, _)) => {
                let mut chain = self.chains.remove(place);
                let curable = reason == Reason::NameInUse;
                if chain.is_current() && !curable {
                    self.refuse_queue(ledger, reason, None);
                }
                let mut left = BTreeMap::new();
                for (n, letter) in core::mem::take(&mut chain.unsent) {
                    if passes(reason) && !letter.is_attended() {
                        left.insert(n, letter);
                    } else {
                        remember(&mut chain.salts, n, letter.salt);
                        self.again(ledger, letter, reason, curable);
                    }
                }
                chain.unsent = left;
                chain.announced = Announced::No;
                if !chain.unsent.is_empty() {
                    self.lull = Some(Instant::now() + LULL);
                }
                if !chain.is_idle() {
                    // Nothing new is sealed with it, and what was is not lost.
                    chain.end();
                    self.chains.insert(0, chain);
                } else if chain.kept {
                    ledger.changes.push(LetterChange::Forget(*chain_id));
                }
            }
        }
    }

    fn pause(&mut self, place: usize, pause: Duration) {
        self.hold = Some(Instant::now() + pause);
        if let Some(chain) = self.chains.get_mut(place) {
            chain.announced = Announced::No;
        }
    }

    /// Nothing can be sealed. Where nobody waits and that may pass, the letters do.
    fn refuse_queue(&mut self, ledger: &mut Ledger, reason: Reason, detail: Option<&str>) {
        let stays = |letter: &Letter| passes(reason) && !letter.is_attended();
        let refused: Vec<_> = self.queue.extract_if(.., |_, letter| !stays(letter)).collect();
        for (_, letter) in refused {
            ledger.settle(&self.name, letter, Err(reason), detail.map(str::to_owned));
        }
        if !self.queue.is_empty() {
            self.lull = Some(Instant::now() + LULL);
        }
    }

    fn told(&mut self, ledger: &mut Ledger, receipt: &Receipt) {
        let Some(place) = self.chains.iter().position(|chain| chain.is(&receipt.chain)) else {
            return;
        };
        let Some(chain) = self.chains.get_mut(place) else {
            return;
        };
        let LetterChain { peer, receipts, .. } = &chain.parts;
        let word = chain.salt(receipt.to).map(|salt| receipts.verify(peer, receipt, &salt));
        // `accepted`, `stored` and some refusals are the server's word and carry no tag; a tag must be right.
        let recipients = matches!(receipt.rung, Rung::Delivered | Rung::Opened);
        if (recipients || receipt.tag.is_some()) && word != Some(Ok(())) {
            tracing::warn!("a receipt for {} ({}) is not {0}'s word: ignored", self.name, receipt.rung);
            return;
        }
        if receipt.from > receipt.to {
            return;
        }
        if let Some(live) = &mut chain.live {
            live.heard |= receipt.tag.is_some();
        }
        let numbers = chain.numbers(receipt);
        if receipt.rung != Rung::Refused {
            for n in numbers {
                self.wonders |= chain.reach(&self.name, ledger, n, receipt.rung);
            }
            return;
        }
        let reason = receipt.reason.unwrap_or(Reason::Unavailable);
        let curable = matches!(
            reason,
            Reason::Rekey | Reason::Unknown | Reason::Gap | Reason::Rewound | Reason::Unreadable | Reason::NameInUse
        );
        // Also without letters under way: it may be the wrap that is refused.
        if curable {
            chain.end();
        }
        let mut refused = Vec::new();
        for n in numbers {
            // What its recipient has is not refused any more, whoever says so.
            let Some(mut letter) = chain.take(n, |letter| letter.reached < Some(Rung::Delivered)) else { continue };
            if reason == Reason::Rate || (passes(reason) && !letter.is_attended()) {
                if letter.reached.take().is_some_and(|reached| reached >= Rung::Stored) {
                    ledger.changes.push(LetterChange::Reach(letter.row, None));
                }
                if reason != Reason::Rate {
                    self.lull = Some(Instant::now() + LULL);
                }
                letter.answered = false;
                chain.unsent.insert(n, letter);
            } else {
                remember(&mut chain.salts, n, letter.salt);
                refused.push(letter);
            }
        }
        let unused = chain.live.as_ref().is_some_and(|live| live.sealing.next() == 0);
        if reason == Reason::Rate {
            self.hold = Some(Instant::now() + RATE_PAUSE);
        }
        if unused {
            // The wrap itself, before anything was sealed: it counts for those who wait for the chain.
            for letter in core::mem::take(&mut self.queue).into_values() {
                self.again(ledger, letter, reason, curable || reason == Reason::Rate);
            }
        }
        for letter in refused {
            self.again(ledger, letter, reason, curable);
        }
    }

    /// Queues a refused letter again, if that may help and was not tried too often.
    fn again(&mut self, ledger: &mut Ledger, mut letter: Letter, reason: Reason, curable: bool) {
        if !curable || letter.tries >= MAX_TRIES {
            ledger.settle(&self.name, letter, Err(reason), None);
            return;
        }
        // Waiting for the rate costs no try: the sender's own deadline ends it.
        letter.tries += u8::from(reason != Reason::Rate);
        (letter.reached, letter.answered, letter.away) = (None, false, false);
        if letter.body.is_none() {
            ledger.changes.push(LetterChange::Unseal { row: letter.row, tries: letter.tries });
        }
        self.queue.insert(letter.row, letter);
    }
}

impl Chain {
    const fn new(parts: LetterChain, kept: bool, live: Option<Live>) -> Self {
        Self {
            parts,
            kept,
            announced: Announced::No,
            live,
            unsent: BTreeMap::new(),
            under_way: BTreeMap::new(),
            resting: BTreeMap::new(),
            salts: BTreeMap::new(),
        }
    }

    const fn id(&self) -> &[u8; 8] {
        self.parts.receipts.chain_id()
    }

    fn is(&self, id: &[u8; 8]) -> bool {
        self.id() == id
    }

    fn is_current(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.current)
    }

    /// Whether none of its letters is left.
    fn is_idle(&self) -> bool {
        self.unsent.is_empty() && self.under_way.is_empty() && self.resting.is_empty()
    }

    /// Nothing is sealed with it any more.
    fn end(&mut self) {
        if let Some(live) = &mut self.live {
            live.current = false;
        }
    }

    fn letters(&self) -> impl Iterator<Item = &Letter> {
        self.unsent.values().chain(self.under_way.values()).chain(self.resting.values())
    }

    fn take_letters(&mut self) -> impl Iterator<Item = Letter> {
        let places = [&mut self.unsent, &mut self.under_way, &mut self.resting];
        places.map(core::mem::take).into_iter().flat_map(BTreeMap::into_values)
    }

    /// The letters that a receipt is about.
    fn numbers(&self, receipt: &Receipt) -> Vec<u32> {
        let range = receipt.from..=receipt.to;
        let places = [&self.unsent, &self.under_way, &self.resting];
        places.into_iter().flat_map(|place| place.range(range.clone()).map(|(n, _)| *n)).collect()
    }

    fn take(&mut self, n: u32, which: impl Fn(&Letter) -> bool) -> Option<Letter> {
        let places = [&mut self.unsent, &mut self.under_way, &mut self.resting];
        let place = places.into_iter().find(|place| place.get(&n).is_some_and(&which))?;
        place.remove(&n)
    }

    fn salt(&self, n: u32) -> Option<[u8; 8]> {
        let places = [&self.unsent, &self.under_way, &self.resting];
        let letter = places.into_iter().find_map(|place| place.get(&n));
        letter.map(|letter| letter.salt).or_else(|| self.salts.get(&n).copied())
    }

    /// Seals a letter, which leaves when that is durable; gives it back if the chain is used up.
    fn seal(
        &mut self,
        name: &Name,
        store: &HomeStore,
        ledger: &mut Ledger,
        mut letter: Letter,
    ) -> Result<Option<Letter>, Ended> {
        let Some(live) = &mut self.live else {
            return Ok(Some(letter));
        };
        ledger.keep(name, &mut letter);
        let body = ledger.body(store, letter.row)?;
        let mut envelope = vec![0; body.len() + SIGNED_OVERHEAD];
        match live.sealing.seal::<HostAead>(letter.signed, KIND_TEXT, &body, &mut envelope) {
            Ok(sealed) => {
                envelope.truncate(sealed.len);
                if !core::mem::replace(&mut self.kept, true) {
                    ledger.changes.push(LetterChange::Chain(self.parts.clone()));
                }
                let (row, chain, n, salt) = (letter.row, *self.parts.receipts.chain_id(), sealed.n, sealed.salt);
                ledger.changes.push(LetterChange::Seal { row, chain, n, salt, envelope });
                ledger.wanted.push(letter.wanted());
                letter.salt = salt;
                self.under_way.insert(n, letter);
                Ok(None)
            }
            Err(SealError::Exhausted) => Ok(Some(letter)),
            Err(error) => Err(Failure::refused(format!("a message cannot be sealed: {error}")).into()),
        }
    }

    /// A letter came so far. Whether whoever waits for more may want to know where the recipient is.
    fn reach(&mut self, name: &Name, ledger: &mut Ledger, n: u32, rung: Rung) -> bool {
        let Some(mut letter) = self.take(n, |_| true) else {
            return false;
        };
        letter.answered = true;
        if letter.reached < Some(rung) {
            letter.reached = Some(rung);
            letter.tell(Reply::Rung { rung, id: message_id(self.id(), n) });
            if rung >= letter.until && letter.is_attended() && !letter.is_finished() {
                // It goes on without anybody.
                letter.tell(Reply::Done);
                letter.replies = None;
            }
        }
        if letter.is_finished() {
            remember(&mut self.salts, n, letter.salt);
            ledger.settle(name, letter, Ok(rung), None);
            return false;
        }
        if letter.reached < Some(Rung::Stored) {
            self.under_way.insert(n, letter);
            return false;
        }
        ledger.changes.push(LetterChange::Reach(letter.row, letter.reached));
        let wonders = letter.reached == Some(Rung::Stored) && letter.is_attended();
        self.resting.insert(n, letter);
        wonders
    }
}

/// What is said last of a letter.
fn end(outcome: Result<Rung, Reason>, detail: Option<String>) -> Reply {
    match outcome {
        Ok(_) => Reply::Done,
        Err(reason) => Reply::Refused { reason, detail },
    }
}

/// Whether a refusal may pass by itself.
const fn passes(reason: Reason) -> bool {
    matches!(reason, Reason::Offline | Reason::QueueFull | Reason::Rate | Reason::Unavailable)
}

fn remember(salts: &mut BTreeMap<u32, [u8; 8]>, n: u32, salt: [u8; 8]) {
    salts.insert(n, salt);
    if salts.len() > SALTS {
        salts.pop_first();
    }
}

fn length(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// The name of a message among all messages: its chain and its number there.
pub(crate) fn message_id(chain: &[u8; 8], n: u32) -> String {
    format!("{}-{n}", hex::encode(chain))
}

const fn millis(pause: u32) -> Duration {
    // No server's wish keeps anybody longer than a minute.
    Duration::from_millis(if pause > 60_000 { 60_000 } else { pause as u64 })
}

/// A member, for whoever has only its parts.
pub(super) const fn member(id: [u8; 16], key: [u8; 32]) -> Member {
    Member { id, key }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_chains_start_at_once_and_then_one_a_minute() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut starts = Starts::new(begun);
        for _ in 0..3 {
            assert_eq!(starts.wait(at(100)), None);
            starts.count(at(100));
        }
        for again in [100, 130, 159] {
            assert_eq!(starts.wait(at(again)), Some(at(160)));
        }
        assert_eq!(starts.wait(at(160)), None);
        starts.count(at(160));
        assert_eq!(starts.wait(at(161)), Some(at(220)));
        // What was not used is kept, up to three.
        starts.count(at(285));
        assert_eq!(starts.wait(at(285)), None);
        starts.count(at(285));
        assert_eq!(starts.wait(at(286)), Some(at(340)));
        for _ in 0..3 {
            assert_eq!(starts.wait(at(10_000)), None);
            starts.count(at(10_000));
        }
        assert_eq!(starts.wait(at(10_000)), Some(at(10_060)));
    }
}
