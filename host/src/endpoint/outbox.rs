//! What this client sends: letters that are kept until their receipts have come, and one chain per recipient.
//!
//! ```text
//!   post --> queue --seal--> unsent --link--> under way --stored--> resting --delivered--> gone
//!              ^                ^                 |                    |
//!              |                +-- connection ---+                    |
//!              +-------- refused, and a new chain can cure that -------+
//! ```
//!
//! What the server had and nobody has spoken of since is sent again over a later connection: a server that is killed may
//! lose what a recipient said of it.
//!
//! A letter is durable before it leaves, together with the envelope that it leaves as (`store::home`): whichever process
//! holds the home next sends the same bytes again, and a recipient who has them knows them. A refusal that a new chain can
//! cure is cured: the directory is asked anew, a chain started and wrapped, and the letter sealed again, a few times at
//! most. Sending chains live here and nowhere else; of one that a former process had there is left what verifies its
//! receipts and repeats its wrap.
//!
//! ```text
//!   outbox --> correspondence (one recipient) --> chain --> letter
//!      | \              ^                          ^
//!      |  \             | what one member refused  |
//!      |   +-> gathering (one group) --------------+
//!      +-----------------+--------------------------+-----> ledger --> store::home
//! ```

mod chain;
mod correspondence;
mod gathering;
mod ledger;
mod letter;

use core::time::Duration;
use std::collections::{BTreeMap, HashMap};

use ossicle_core::{DirectoryEntry, Member, Message, PeerStatus, Reason, Receipt, Rung};
use tokio::sync::mpsc;
use tokio::time::Instant;
use zeroize::Zeroizing;

use self::chain::{Announced, Chain, remember};
use self::correspondence::Correspondence;
use self::gathering::{Gathering, Joint};
use self::ledger::{Ledger, Word};
use self::letter::{Letter, Parent, Part, end, length};
use super::agent::{Desk, Ended};
use super::local::Reply;
use super::peers::Rejected;
use super::{Failure, now};
use crate::name::Name;
use crate::store::home::{
    HomeStore, HomeStoreError, LetterChain, LetterChange, LetterId, MAX_LETTER_BYTES, MAX_LETTERS, Outcome,
};

/// Seconds after which a letter that nobody waits for is given up: longer than any server keeps it.
const LETTER_AGE: u64 = 31 * 24 * 3600;
/// Seconds for which a letter is kept that its recipient has and whose sender wanted to know more.
const CURIOSITY: u64 = 3600;
/// Seconds after which a letter that nobody waits for is asked about again.
const UNHEARD_OF: u64 = 24 * 3600;
/// So long after a connection was made, what waited for this client has come.
const RECEIPTS_COME: Duration = Duration::from_secs(10);
/// Letters that make room at once when there is none.
const EVICTED: usize = 64;

/// Where the answers to a request go.
pub(super) type Replies = mpsc::UnboundedSender<Reply>;

#[derive(Default)]
pub(super) struct Outbox {
    /// By the recipient's normalised name; with members of a group who are written to alone, see [`alone`].
    correspondences: HashMap<String, Correspondence>,
    /// By the group's id.
    gatherings: HashMap<[u8; 16], Gathering>,
    /// Whose chain it is.
    chains: HashMap<[u8; 8], Whose>,
    ledger: Ledger,
    /// Whether what the server had to say of groups when the connection was made has come.
    informed: bool,
}

/// Who has a chain.
#[derive(Clone)]
enum Whose {
    /// The recipient in the correspondence with this key.
    One(String),
    /// The members of a group.
    Group([u8; 16]),
}

/// To whom a letter goes.
pub(super) enum Recipient {
    One(Name),
    /// A group, by its id and what it is called here.
    Group([u8; 16], String),
}

/// The key of a correspondence with one member of a group. No name has a slash.
fn alone(sid: &[u8; 16], name: &Name) -> String {
    format!("{}/{}", hex::encode(sid), name.key())
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
    pub outcome: Outcome,
}

/// Letters from before this date are too old: both clocks have passed it for so long.
fn too_old(ours: u64, servers: u64) -> u64 {
    ours.min(servers).saturating_sub(LETTER_AGE)
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
        outbox.ledger.settled.extend(store.settled_letters()?);
        for kept in letters {
            let parent = kept.sid.zip(kept.parent);
            let parent = parent.map(|(sid, (row, member))| Parent { sid, row, member, replies: None });
            let sid = kept.sid.filter(|_| parent.is_none());
            let part = |(member, kept)| (member, Part { kept, ..Part::default() });
            let mut letter = Letter {
                row: kept.row,
                id: kept.id,
                sid,
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
                parts: BTreeMap::new(),
                parent,
            };
            outbox.ledger.rows.insert(letter.id, letter.row);
            outbox.ledger.letters += 1;
            outbox.ledger.bytes += kept.len;
            if let Some(sid) = sid {
                letter.parts = store.letter_parts(letter.row)?.into_iter().map(part).collect();
                let gathering = outbox.gatherings.entry(sid).or_insert_with(|| Gathering::new(sid, kept.to));
                let sealed = kept.sealed.map(|(id, n, _)| (id, n));
                if let Some(parts) = sealed.and_then(|(id, _)| parts.remove(&id)) {
                    let id = *parts.receipts.chain_id();
                    gathering.chains.push(Joint::kept(parts, store.letter_wraps(&id)?));
                    outbox.chains.insert(id, Whose::Group(sid));
                }
                gathering.take_in(letter, sealed)?;
                continue;
            }
            let name = Name::parse(&kept.to).map_err(|_| HomeStoreError::Damaged)?;
            let with = letter.parent.as_ref().map(|parent| parent.sid);
            let key = with.map_or_else(|| name.key().to_owned(), |sid| alone(&sid, &name));
            let correspondence =
                outbox.correspondences.entry(key.clone()).or_insert_with(|| Correspondence::new(name, with));
            let Some((id, n, _)) = kept.sealed else {
                correspondence.queue.insert(letter.row, letter);
                continue;
            };
            if let Some(parts) = parts.remove(&id) {
                correspondence.chains.push(Chain::new(parts, true, None));
                outbox.chains.insert(id, Whose::One(key));
            }
            let chain = correspondence.chains.iter_mut().find(|chain| chain.is(&id)).ok_or(HomeStoreError::Damaged)?;
            let place = if letter.reached >= Some(Rung::Stored) { &mut chain.resting } else { &mut chain.unsent };
            place.insert(n, letter);
        }
        Ok(outbox)
    }

    /// Takes a letter, or, if it has it already, says what becomes of it. Whether it has taken it now.
    pub(super) fn post(
        &mut self,
        id: LetterId,
        to: Recipient,
        body: Vec<u8>,
        signed: bool,
        until: Rung,
        replies: Replies,
    ) -> bool {
        if let Some(row) = self.ledger.rows.get(&id) {
            self.attend(*row, &replies);
            return false;
        }
        if let Some((_, outcome)) = self.ledger.settled.iter().find(|(settled, _)| *settled == id) {
            if let Ok(rung) = *outcome {
                let _ = replies.send(Reply::Rung { rung, id: None });
            }
            let _ = replies.send(end(*outcome, None));
            return false;
        }
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
            return false;
        }
        let letter = Letter {
            row: self.ledger.next,
            id,
            sid: None,
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
            parts: BTreeMap::new(),
            parent: None,
        };
        self.ledger.enter(&letter);
        match to {
            Recipient::One(name) => {
                let key = name.key().to_owned();
                let correspondence = self.correspondences.entry(key).or_insert_with(|| Correspondence::new(name, None));
                correspondence.lull = None;
                correspondence.queue.insert(letter.row, letter);
            }
            Recipient::Group(sid, label) => {
                let letter = Letter { sid: Some(sid), signed: true, ..letter };
                let gathering = self.gatherings.entry(sid).or_insert_with(|| Gathering::new(sid, label));
                gathering.lull = None;
                gathering.queue.insert(letter.row, letter);
            }
        }
        true
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
        for joint in self.gatherings.values().flat_map(|gathering| &gathering.chains) {
            let letters = joint.chain.resting.values();
            let is_stored = |letter: &&Letter| !letter.is_attended() && letter.reached >= Some(Rung::Stored);
            resting.extend(letters.filter(is_stored).map(|letter| letter.row));
        }
        resting.sort_unstable();
        resting.truncate(EVICTED);
        let joints = self.gatherings.values_mut().flat_map(|gathering| &mut gathering.chains);
        let joints = joints.map(|joint| &mut joint.chain);
        for chain in self.correspondences.values_mut().flat_map(|kept| &mut kept.chains).chain(joints) {
            let evicted = chain.resting.extract_if(.., |_, letter| resting.binary_search(&letter.row).is_ok());
            for (n, letter) in evicted {
                self.ledger.erase(&letter, Ok(Rung::Stored));
                remember(&mut chain.salts, n, letter.salt);
            }
        }
    }

    /// Somebody waits for a letter again.
    fn attend(&mut self, row: i64, replies: &Replies) {
        for gathering in self.gatherings.values_mut() {
            let Some(letter) = gathering.letter(row) else { continue };
            letter.replies = Some(replies.clone());
            letter.tell(Reply::Kept);
            if let Some(rung) = letter.reached {
                letter.tell(Reply::Rung { rung, id: None });
                if rung >= letter.until {
                    letter.tell(Reply::Done);
                    letter.replies = None;
                    return;
                }
            }
            if let Some(letter) = gathering.letters().find(|letter| letter.row == row) {
                gathering.report(letter);
            }
            for kept in self.correspondences.values_mut() {
                let sealed = kept.chains.iter_mut().flat_map(Chain::letters_mut);
                let parents = kept.queue.values_mut().chain(sealed).filter_map(|letter| letter.parent.as_mut());
                for parent in parents.filter(|parent| parent.row == row) {
                    parent.replies = Some(replies.clone());
                }
            }
            return;
        }
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
            letter.tell(Reply::Kept);
            if let (Some(rung), Some(id)) = (letter.reached, id) {
                letter.tell(Reply::Rung { rung, id: Some(id) });
                letter.away = false;
                correspondence.wonders |= rung == Rung::Stored;
                if rung >= letter.until {
                    letter.tell(Reply::Done);
                    letter.replies = None;
                }
            }
            return;
        }
    }

    /// There is a connection. A server that was killed may have lost a recipient's word: once what waits has come, letters
    /// that the server had are sent again, if somebody waits for them or they are old. Whoever has them says so again.
    pub(super) fn connected(&mut self) {
        for gathering in self.gatherings.values_mut() {
            gathering.stale = true;
            if gathering.chains.iter().any(|joint| !joint.chain.resting.is_empty()) {
                gathering.doubt = Some(Instant::now() + RECEIPTS_COME);
            }
        }
        for correspondence in self.correspondences.values_mut() {
            if correspondence.chains.iter().any(|chain| !chain.resting.is_empty()) {
                correspondence.doubt = Some(Instant::now() + RECEIPTS_COME);
            }
        }
    }

    /// The connection has gone, and with it all that was asked over it.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub(super) fn disconnected(&mut self, store: &mut HomeStore) -> Result<(), HomeStoreError> {
        self.save(store)?;
        self.informed = false;
        for gathering in self.gatherings.values_mut() {
            gathering.disconnected();
        }
        for correspondence in self.correspondences.values_mut() {
            (correspondence.looking, correspondence.asking) = (false, false);
            (correspondence.doubt, correspondence.doubts) = (None, false);
            for chain in &mut correspondence.chains {
                chain.announced = Announced::No;
                chain.rest_again();
                for letter in chain.under_way.values_mut().chain(chain.resting.values_mut()) {
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
        for letter in self.gatherings.values().flat_map(Gathering::letters) {
            letter.tell(reply.clone());
        }
    }

    /// The time before which some correspondence may not go on.
    pub(super) fn held_until(&self) -> Option<Instant> {
        let waits = |correspondence: &Correspondence| {
            let Correspondence { hold, lull, next_start, doubt, .. } = correspondence;
            [*hold, *lull, *next_start, *doubt]
        };
        let gatherings = self.gatherings.values().flat_map(Gathering::held_until);
        self.correspondences.values().flat_map(waits).flatten().chain(gatherings).min()
    }

    /// Sends what can be sent.
    pub(super) fn pump(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for sid in self.gatherings.keys().copied().collect::<Vec<_>>() {
            self.gather(desk, &sid)?;
        }
        for (key, correspondence) in &mut self.correspondences {
            correspondence.pump(key, desk, &mut self.ledger)?;
        }
        self.commit(desk)
    }

    /// What the server had to say of groups has come: who is in them is as well known as it can be.
    pub(super) const fn informed(&mut self) -> bool {
        !core::mem::replace(&mut self.informed, true)
    }

    /// Something has happened in a group, or to a key.
    pub(super) fn look_at_groups(&mut self) {
        for gathering in self.gatherings.values_mut() {
            gathering.stale = true;
        }
    }

    /// Does what is to be done in a group.
    fn gather(&mut self, desk: &mut Desk<'_>, sid: &[u8; 16]) -> Result<(), Ended> {
        let Some(gathering) = self.gatherings.get_mut(sid) else { return Ok(()) };
        let is_other = gathering.refresh(desk, &mut self.ledger)?;
        gathering.pump(desk, &mut self.ledger, self.informed)?;
        for joint in &gathering.chains {
            self.chains.entry(*joint.chain.id()).or_insert(Whose::Group(*sid));
        }
        let is_over = gathering.is_over();
        let alone_with = self.take_own()?;
        for kept in self.correspondences.values_mut().filter(|kept| kept.sid.as_ref() == Some(sid)) {
            if is_other {
                kept.chains.iter_mut().for_each(Chain::end);
            }
            if is_over {
                kept.close(&mut self.ledger);
            }
        }
        for key in alone_with {
            if let Some(correspondence) = self.correspondences.get_mut(&key) {
                correspondence.pump(&key, desk, &mut self.ledger)?;
            }
        }
        Ok(())
    }

    /// Gives letters for members alone to the correspondences with them, and returns the keys of those.
    fn take_own(&mut self) -> Result<Vec<String>, HomeStoreError> {
        let mut keys = Vec::new();
        for (sid, gathering) in &mut self.gatherings {
            for (name, letter) in gathering.take_own() {
                let name = Name::parse(&name).map_err(|_| HomeStoreError::Damaged)?;
                let key = alone(sid, &name);
                let new = || Correspondence::new(name, Some(*sid));
                self.correspondences.entry(key.clone()).or_insert_with(new).queue.insert(letter.row, letter);
                keys.push(key);
            }
        }
        Ok(keys)
    }

    /// Tells letters to groups what became of those that brought them to one member alone.
    fn settle_parts(&mut self) {
        for word in core::mem::take(&mut self.ledger.parts) {
            let Word { parent: Parent { sid, .. }, .. } = &word;
            if let Some(gathering) = self.gatherings.get_mut(sid) {
                gathering.word(&mut self.ledger, word);
            }
        }
    }

    /// Makes durable what was noted, then sends what waited for that.
    pub(super) fn commit(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        self.settle_parts();
        for gathering in self.gatherings.values_mut() {
            gathering.ask(desk)?;
        }
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
        self.take_own()?;
        for correspondence in self.correspondences.values_mut() {
            correspondence.keep(&mut self.ledger);
        }
        for gathering in self.gatherings.values_mut() {
            gathering.keep(&mut self.ledger);
        }
        self.settle_parts();
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

    /// Letters that nobody can or will send any more are given up: if they are old by this machine's date and by the
    /// server's, which was `date` when the connection was made, since either may be wrong.
    pub(super) fn expire(&mut self, date: u64) {
        let (before, curious) = (too_old(now(), date), now().saturating_sub(CURIOSITY));
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
                    true => self.ledger.erase(&letter, Ok(Rung::Delivered)),
                    false => self.ledger.settle(name.as_str(), letter, Err(Reason::Expired), None),
                }
            }
        }
        self.settle_parts();
        for gathering in self.gatherings.values_mut() {
            let is_old = |letter: &Letter| letter.time < before && !letter.is_attended();
            gathering.expire(&mut self.ledger, is_old, curious);
        }
    }

    /// The server's store is not the one that took these letters: nobody knows whether it has them.
    pub(super) fn unstored(&mut self) {
        for gathering in self.gatherings.values_mut() {
            gathering.unstored(&mut self.ledger);
        }
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
                self.chains.insert(chain_id, Whose::One(key.to_owned()));
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
    pub(super) fn located(
        &mut self,
        desk: &mut Desk<'_>,
        key: &str,
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let Some(correspondence) = self.correspondences.get_mut(key) else {
            return Ok(());
        };
        correspondence.asking = false;
        // Whom the directory does not know, nothing is sent again to.
        correspondence.doubt(answer.as_ref().map_or(0, |entry| entry.record_limit));
        let Ok(DirectoryEntry { status: PeerStatus::Offline { last_seen }, .. }) = answer else {
            return correspondence.pump(key, desk, &mut self.ledger);
        };
        for letter in correspondence.chains.iter_mut().flat_map(|chain| chain.resting.values_mut()) {
            if letter.reached == Some(Rung::Stored) && !letter.away && letter.is_attended() {
                letter.away = true;
                letter.tell(Reply::Away { last_seen });
            }
        }
        correspondence.pump(key, desk, &mut self.ledger)
    }

    /// The server has answered a wrap.
    pub(super) fn wrapped(
        &mut self,
        desk: &mut Desk<'_>,
        chain_id: &[u8; 8],
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let Some(Whose::One(key)) = self.chains.get(chain_id).cloned() else {
            return Ok(());
        };
        let Some(correspondence) = self.correspondences.get_mut(&key) else {
            return Ok(());
        };
        correspondence.wrapped(&mut self.ledger, chain_id, answer);
        correspondence.pump(&key, desk, &mut self.ledger)
    }

    /// The directory has answered who a member of a group is.
    pub(super) fn found_member(
        &mut self,
        desk: &mut Desk<'_>,
        (sid, member): (&[u8; 16], &[u8; 16]),
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let Some(gathering) = self.gatherings.get_mut(sid) else { return Ok(()) };
        gathering.found(desk, member, answer)?;
        self.gather(desk, sid)
    }

    /// The directory has answered whether a member of a group is there.
    pub(super) fn located_member(
        &mut self,
        desk: &mut Desk<'_>,
        (sid, member): (&[u8; 16], &[u8; 16]),
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let Some(gathering) = self.gatherings.get_mut(sid) else { return Ok(()) };
        gathering.located(member, answer);
        self.gather(desk, sid)
    }

    /// The server has answered a wrap to one member of a group.
    pub(super) fn wrapped_to(
        &mut self,
        desk: &mut Desk<'_>,
        (chain, member): (&[u8; 8], &[u8; 16]),
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let Some(Whose::Group(sid)) = self.chains.get(chain).cloned() else { return Ok(()) };
        let Some(gathering) = self.gatherings.get_mut(&sid) else { return Ok(()) };
        gathering.wrapped(desk, &mut self.ledger, (chain, member), answer)?;
        self.gather(desk, &sid)
    }

    /// What became of letters; of one of several recipients, `by` whom.
    pub(super) fn told(&mut self, desk: &mut Desk<'_>, by: Option<&[u8; 16]>, receipt: &Receipt) -> Result<(), Ended> {
        match self.chains.get(&receipt.chain).cloned() {
            None => return Ok(()),
            Some(Whose::Group(sid)) => {
                let Some(gathering) = self.gatherings.get_mut(&sid) else { return Ok(()) };
                match by {
                    Some(member) => gathering.told_by(desk, &mut self.ledger, member, receipt)?,
                    None => gathering.told(&mut self.ledger, receipt),
                }
                self.gather(desk, &sid)?;
            }
            Some(Whose::One(key)) => {
                let Some(correspondence) = self.correspondences.get_mut(&key) else { return Ok(()) };
                correspondence.told(&mut self.ledger, receipt);
                correspondence.pump(&key, desk, &mut self.ledger)?;
            }
        }
        self.forget_chains();
        Ok(())
    }

    /// Whether a recipient says that a present chain of this home is older than what he has had from it: the wrap is refused,
    /// and nothing of the chain has arrived. Without a tag: he has no keys to make one with.
    pub(super) fn is_behind(&self, receipt: &Receipt) -> bool {
        let rewound = receipt.rung == Rung::Refused && receipt.reason == Some(Reason::Rewound) && receipt.tag.is_none();
        let kept = match self.chains.get(&receipt.chain) {
            Some(Whose::One(key)) => self.correspondences.get(key),
            Some(Whose::Group(sid)) => {
                let is_unheard = |kept: &Gathering| kept.is_unheard(&receipt.chain);
                // A member who is written to alone may have had a later chain of this group: this one is old to him.
                let is_alone = |kept: &Correspondence| kept.sid.as_ref() == Some(sid);
                let may_be_old = self.correspondences.values().any(is_alone);
                return rewound && receipt.to == 0 && !may_be_old && self.gatherings.get(sid).is_some_and(is_unheard);
            }
            None => None,
        };
        let chain = kept.and_then(|kept| kept.chains.iter().find(|chain| chain.is(&receipt.chain)));
        let unheard = |chain: &Chain| chain.live.as_ref().is_some_and(|live| live.current && !live.heard);
        rewound && receipt.to == 0 && chain.is_some_and(unheard)
    }

    fn forget_chains(&mut self) {
        let (kept, gatherings) = (&self.correspondences, &self.gatherings);
        self.chains.retain(|id, whose| match whose {
            Whose::One(key) => kept.get(key).is_some_and(|kept| kept.chains.iter().any(|chain| chain.is(id))),
            Whose::Group(sid) => {
                let has = |gathering: &Gathering| gathering.chains.iter().any(|joint| joint.chain.is(id));
                gatherings.get(sid).is_some_and(has)
            }
        });
    }

    /// Whether letters have left whose fate is not known yet.
    pub(super) fn is_under_way(&self) -> bool {
        let mut chains = self.correspondences.values().flat_map(|correspondence| &correspondence.chains);
        chains.any(|chain| !chain.under_way.is_empty()) || self.gatherings.values().any(Gathering::is_under_way)
    }

    /// This client has another key: every chain begins anew, and what was under way is sealed anew.
    pub(super) fn restart(&mut self) {
        for correspondence in self.correspondences.values_mut() {
            for chain in &mut correspondence.chains {
                chain.live = None;
                chain.rest_again();
                chain.unsent.append(&mut chain.under_way);
                for mut letter in core::mem::take(&mut chain.unsent).into_values() {
                    letter.reached = None;
                    self.ledger.changes.push(LetterChange::Unseal { row: letter.row, tries: letter.tries });
                    correspondence.queue.insert(letter.row, letter);
                }
            }
            correspondence.retire(&mut self.ledger);
        }
        for gathering in self.gatherings.values_mut() {
            gathering.restart(&mut self.ledger);
        }
        self.forget_chains();
    }

    /// This recipient has another key, which the former one signed: what comes is sealed on a new chain.
    pub(super) fn followed(&mut self, key: &str, id: &[u8; 16]) {
        let kept = self.correspondences.values_mut().filter(|kept| kept.name.key() == key);
        for chain in kept.flat_map(|kept| &mut kept.chains) {
            chain.end();
        }
        for gathering in self.gatherings.values_mut() {
            gathering.followed(id);
        }
    }

    /// A person has accepted another key of this recipient. What was sealed for the former one is not sealed for the new
    /// one by itself: its sender may not have meant that.
    pub(super) fn rekeyed(&mut self, key: &str, former: &[u8; 16]) {
        for gathering in self.gatherings.values_mut() {
            gathering.rekeyed(&mut self.ledger, former);
        }
        let kept = self.correspondences.values_mut().filter(|kept| kept.name.key() == key);
        let chains = kept.flat_map(|kept| {
            let name = kept.name.clone();
            kept.chains.drain(..).map(move |chain| (name.clone(), chain))
        });
        for (name, mut chain) in chains {
            self.chains.remove(chain.id());
            for letter in chain.take_letters() {
                let sentence = format!(
                    "refused({}): it went to the former key of {}: send it again if it is meant for the new one",
                    Reason::KeyChanged,
                    name
                );
                if letter.is_attended() && letter.parent.is_none() {
                    letter.tell(Reply::Failed(Failure::refused(sentence)));
                    self.ledger.erase(&letter, Err(Reason::KeyChanged));
                } else {
                    self.ledger.settle(name.as_str(), letter, Err(Reason::KeyChanged), None);
                }
            }
            if chain.kept {
                self.ledger.changes.push(LetterChange::Forget(*chain.id()));
            }
        }
        self.settle_parts();
    }
}

/// The name of a message among all messages: its chain and its number there.
pub(crate) fn message_id(chain: &[u8; 8], n: u32) -> String {
    format!("{}-{n}", hex::encode(chain))
}

/// A member, for whoever has only its parts.
pub(super) const fn member(id: [u8; 16], key: [u8; 32]) -> Member {
    Member { id, key }
}

#[cfg(test)]
mod tests {
    use getrandom::SysRng;
    use ossicle_core::{Conversation, MAX_RECORD_LEN, SendingChain};

    use super::*;
    use crate::store::home::{self as store, HomeStore};

    #[test]
    fn a_letter_is_too_old_if_both_clocks_say_so() {
        let posted = 1_790_000_000;
        let late = posted + LETTER_AGE + 1;
        let is_old = |ours, servers| posted < too_old(ours, servers);
        assert!(is_old(late, late));
        assert!(!is_old(late, posted), "a date of ours that was set forward");
        assert!(!is_old(posted, late) && !is_old(posted, u64::MAX), "a server that is hasty, or lies");
        assert!(!is_old(0, late) && !is_old(late, 0), "a machine that does not know the date yet");
        assert!(!is_old(posted + LETTER_AGE, late));
    }

    #[test]
    fn a_stored_letter_that_is_sent_again_is_not_sealed_anew() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let (alice, bob) = (member([1; 16], [1; 32]), member([2; 16], [2; 32]));
        let conversation = Conversation::direct(&alice, &bob, 0);
        let sealing = SendingChain::start(&alice, &conversation, 0, &mut SysRng).unwrap();
        let (receipts, chain) = (sealing.receipts().clone(), *sealing.chain_id());
        let parts = LetterChain { sid: None, peer: bob.id, receipts, wrap: vec![], bundle: vec![], signature: vec![] };
        let letter = |row| store::Letter {
            row,
            id: [u8::try_from(row).unwrap(); 16],
            to: "bob".into(),
            sid: None,
            parent: None,
            len: 4,
            signed: false,
            until: Rung::Delivered,
            reached: None,
            tries: 0,
            time: now(),
            sealed: None,
        };
        let keep = |row| LetterChange::Keep(letter(row), Zeroizing::new(b"text".to_vec()));
        let seal = |row, n| LetterChange::Seal { row, chain, n, salt: [7; 8], envelope: vec![8; 41] };
        let stored = LetterChange::Reach(1, Some(Rung::Stored));
        store.change_letters(&[LetterChange::Chain(parts), keep(1), seal(1, 0), stored, keep(2), seal(2, 1)]).unwrap();

        for disconnects in [true, false] {
            let mut outbox = Outbox::load(&store).unwrap();
            let (replies, _said) = mpsc::unbounded_channel();
            outbox.post([1; 16], Recipient::One(Name::parse("bob").unwrap()), vec![], false, Rung::Delivered, replies);
            let bob = outbox.correspondences.get_mut("bob").unwrap();
            bob.doubts = true;
            bob.doubt(u16::try_from(MAX_RECORD_LEN).unwrap());
            assert!(bob.chains[0].unsent.contains_key(&0) && bob.chains[0].resting.is_empty());
            if disconnects {
                outbox.disconnected(&mut store).unwrap();
            }
            outbox.restart();
            let bob = &outbox.correspondences["bob"];
            assert!(bob.chains[0].resting.contains_key(&0), "the server has it, under the key that was");
            assert!(bob.queue.keys().eq([&2]), "nobody knows whether the server has that");
        }
    }

    #[test]
    fn who_asks_again_gets_the_same_letter_or_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let ends = [([1; 16], Ok(Rung::Delivered)), ([2; 16], Err(Reason::Expired))];
        let ends = ends.map(|(id, outcome)| LetterChange::Settle { row: 1, id, outcome });
        store.change_letters(&ends).unwrap();

        let mut outbox = Outbox::load(&store).unwrap();
        let mut give = |id: u8| {
            let (replies, mut said) = mpsc::unbounded_channel();
            let bob = Recipient::One(Name::parse("bob").unwrap());
            outbox.post([id; 16], bob, b"text".to_vec(), true, Rung::Delivered, replies);
            let said: Vec<Reply> = core::iter::from_fn(|| said.try_recv().ok()).collect();
            (said, outbox.letters())
        };
        let (said, letters) = give(1);
        assert!(matches!(said[..], [Reply::Rung { rung: Rung::Delivered, id: None }, Reply::Done]));
        assert_eq!(letters, 0);
        assert!(matches!(give(2).0[..], [Reply::Refused { reason: Reason::Expired, .. }]));
        assert_eq!(give(3).1, 1);
        let (said, letters) = give(3);
        assert!(matches!(said[..], [Reply::Kept]));
        assert_eq!(letters, 1);
        assert_eq!(give(4).1, 2);
    }
}
