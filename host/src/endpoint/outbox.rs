//! What this client sends: one chain per recipient, and letters that wait until their receipts have come.
//!
//! A letter is queued, sealed when its recipient has the chain, and forgotten with the rung that its sender waits for or
//! with a refusal. A refusal that a new chain can cure is cured: the directory is asked anew, a chain started and wrapped,
//! and the letter sealed again, a few times at most. After a broken connection the same wrap and the same envelopes go
//! out again, so that a recipient who has them knows them. Sending chains live here and nowhere else.

use core::time::Duration;
use std::collections::{BTreeMap, HashMap};

use getrandom::SysRng;
use ossicle_core::{
    BUNDLE_LEN, Conversation, DirectoryEntry, Lookup, Member, Message, RECORD_OVERHEAD, Reason, Receipt, Rung, Rungs,
    SIGNED_OVERHEAD, SealError, SendingChain, SignedBundle, Subject, WRAP_LEN,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::agent::{Desk, Ended, Pending};
use super::local::Reply;
use super::peers::{Rejected, admit, check_bundle};
use super::{Failure, KIND_TEXT, MESSAGE_HEAD_LEN};
use crate::crypto::HostAead;
use crate::name::Name;
use crate::store::home::Peer;

/// New chains that one letter may cost.
const MAX_TRIES: u8 = 3;
/// Letters under way to one recipient: fewer than the keys that a recipient keeps for what it missed.
const WINDOW: usize = 48;
/// Salts that are remembered of a chain, to verify receipts with.
const SALTS: usize = 1024;
const CHAIN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long to wait where a refusal for the rate does not say.
const RATE_PAUSE: Duration = Duration::from_secs(1);

/// Where the answers to a request go.
pub(super) type Replies = mpsc::UnboundedSender<Reply>;

#[derive(Default)]
pub(super) struct Outbox {
    /// By the recipient's normalised name.
    correspondences: HashMap<String, Correspondence>,
    /// Whose chain it is.
    chains: HashMap<[u8; 8], String>,
    letters: u64,
}

struct Correspondence {
    name: Name,
    /// Known from the first answer of the directory on.
    peer: Option<Peer>,
    /// Bytes of the longest body that the recipient takes.
    max_body: usize,
    /// Whether the directory was asked.
    looking: bool,
    /// The newest last.
    chains: Vec<Chain>,
    /// Letters to be sealed, in the order in which they were given.
    queue: BTreeMap<u64, Letter>,
    /// Nothing is sent before.
    hold: Option<Instant>,
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
    sealing: SendingChain,
    wrap: [u8; WRAP_LEN],
    /// The bundle of this client that the wrap was made under, and its signature: they travel with it, also when there is
    /// a newer one.
    bundle: [u8; BUNDLE_LEN],
    signature: Vec<u8>,
    /// Whether the server has the wrap, on this connection.
    announced: Announced,
    /// Whether it was counted among those that were started.
    counted: bool,
    /// Whether letters may still be sealed with it.
    current: bool,
    /// Whether its recipient has said anything that only who has its keys can say.
    heard: bool,
    begun: Instant,
    under_way: BTreeMap<u32, Letter>,
    salts: BTreeMap<u32, [u8; 8]>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Announced {
    No,
    Asked,
    Yes,
}

struct Letter {
    order: u64,
    body: Zeroizing<Vec<u8>>,
    signed: bool,
    until: Rung,
    replies: Replies,
    tries: u8,
    reached: Option<Rung>,
    envelope: Vec<u8>,
}

impl Letter {
    fn wanted(&self) -> Rungs {
        let rungs = [Rung::Accepted, Rung::Stored, Rung::Delivered, Rung::Opened];
        // Every rung is told on the way to the one that is waited for. `stored` comes with durable delivery.
        let told = rungs.into_iter().filter(|rung| *rung <= self.until && *rung != Rung::Stored);
        told.fold(Rungs::NONE, Rungs::with)
    }

    fn refuse(self, reason: Reason, detail: Option<String>) {
        let _ = self.replies.send(Reply::Refused { reason, detail });
    }

    fn is_wanted(&self) -> bool {
        !self.replies.is_closed()
    }
}

impl Outbox {
    /// Takes a letter.
    pub(super) fn post(&mut self, name: Name, body: Vec<u8>, signed: bool, until: Rung, replies: Replies) {
        self.letters += 1;
        let order = self.letters;
        let letter = Letter {
            order,
            body: Zeroizing::new(body),
            signed,
            until,
            replies,
            tries: 0,
            reached: None,
            envelope: Vec::new(),
        };
        let key = name.key().to_owned();
        let correspondence = self.correspondences.entry(key).or_insert_with(|| Correspondence::new(name));
        correspondence.queue.insert(order, letter);
    }

    /// The connection has gone, and with it all that was asked over it.
    pub(super) fn disconnected(&mut self) {
        for correspondence in self.correspondences.values_mut() {
            correspondence.looking = false;
            for chain in &mut correspondence.chains {
                chain.announced = Announced::No;
            }
        }
    }

    /// Letters that are not settled yet.
    pub(super) fn waiting(&self) -> u64 {
        let of =
            |it: &Correspondence| it.queue.len() + it.chains.iter().map(|chain| chain.under_way.len()).sum::<usize>();
        let waiting: usize = self.correspondences.values().map(of).sum();
        u64::try_from(waiting).unwrap_or(u64::MAX)
    }

    /// Tells everybody who waits.
    pub(super) fn broadcast(&self, reply: &Reply) {
        for correspondence in self.correspondences.values() {
            let under_way = correspondence.chains.iter().flat_map(|chain| chain.under_way.values());
            for letter in correspondence.queue.values().chain(under_way) {
                let _ = letter.replies.send(reply.clone());
            }
        }
    }

    /// The time before which some correspondence may not go on.
    pub(super) fn held_until(&self) -> Option<Instant> {
        let waits = |correspondence: &Correspondence| [correspondence.hold, correspondence.next_start];
        self.correspondences.values().flat_map(waits).flatten().min()
    }

    /// Sends what can be sent.
    pub(super) fn pump(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for (key, correspondence) in &mut self.correspondences {
            correspondence.pump(key, desk)?;
        }
        Ok(())
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
                correspondence.pump(key, desk)
            }
            Err(rejected) => {
                let (reason, detail) = rejected.told(desk.alarm)?;
                for letter in core::mem::take(&mut correspondence.queue).into_values() {
                    letter.refuse(reason, detail.clone());
                }
                Ok(())
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
        let Some((key, correspondence)) = self.find(chain_id) else {
            return Ok(());
        };
        correspondence.wrapped(desk, chain_id, answer)?;
        correspondence.pump(&key, desk)
    }

    /// What became of letters.
    pub(super) fn told(&mut self, desk: &mut Desk<'_>, receipt: &Receipt) -> Result<(), Ended> {
        let Some((key, correspondence)) = self.find(&receipt.chain) else {
            return Ok(());
        };
        correspondence.told(receipt);
        correspondence.pump(&key, desk)?;
        let kept = &self.correspondences;
        self.chains.retain(|id, key| kept.get(key).is_some_and(|kept| kept.chains.iter().any(|chain| chain.is(id))));
        Ok(())
    }

    /// Whether a recipient says that a present chain of this home is older than what he has had from it: the wrap is refused,
    /// and nothing of the chain has arrived. Without a tag: he has no keys to make one with.
    pub(super) fn is_behind(&self, receipt: &Receipt) -> bool {
        let rewound = receipt.rung == Rung::Refused && receipt.reason == Some(Reason::Rewound) && receipt.tag.is_none();
        let kept = self.chains.get(&receipt.chain).and_then(|key| self.correspondences.get(key));
        let chain = kept.and_then(|kept| kept.chains.iter().find(|chain| chain.is(&receipt.chain)));
        rewound && receipt.to == 0 && chain.is_some_and(|chain| chain.current && !chain.heard)
    }

    /// Whether letters were sealed whose fate is not known yet.
    pub(super) fn is_under_way(&self) -> bool {
        self.correspondences
            .values()
            .flat_map(|correspondence| &correspondence.chains)
            .any(|chain| chain.under_way.values().any(Letter::is_wanted))
    }

    /// This client has another key: every chain begins anew, and what was under way is sealed anew.
    pub(super) fn restart(&mut self) {
        self.chains.clear();
        for correspondence in self.correspondences.values_mut() {
            for chain in correspondence.chains.drain(..) {
                correspondence.queue.extend(chain.under_way.into_values().map(|letter| (letter.order, letter)));
            }
        }
    }

    /// This recipient has another key, which the former one signed: what comes is sealed on a new chain.
    pub(super) fn followed(&mut self, key: &str) {
        for chain in self.correspondences.get_mut(key).into_iter().flat_map(|kept| &mut kept.chains) {
            chain.current = false;
        }
    }

    /// A person has accepted another key of this recipient. What was sealed for the former one is not sealed for the new
    /// one by itself: its sender may not have meant that.
    pub(super) fn rekeyed(&mut self, key: &str) {
        let Some(correspondence) = self.correspondences.get_mut(key) else {
            return;
        };
        for chain in correspondence.chains.drain(..) {
            self.chains.remove(chain.sealing.chain_id());
            for letter in chain.under_way.into_values() {
                let sentence = format!(
                    "refused({}): it went to the former key of {}: send it again if it is meant for the new one",
                    Reason::KeyChanged,
                    correspondence.name
                );
                let _ = letter.replies.send(Reply::Failed(Failure::refused(sentence)));
            }
        }
        correspondence.peer = None;
    }

    fn find(&mut self, chain_id: &[u8; 8]) -> Option<(String, &mut Correspondence)> {
        let key = self.chains.get(chain_id)?.clone();
        let correspondence = self.correspondences.get_mut(&key)?;
        Some((key, correspondence))
    }
}

impl Correspondence {
    fn new(name: Name) -> Self {
        Self {
            name,
            peer: None,
            max_body: 0,
            looking: false,
            chains: Vec::new(),
            queue: BTreeMap::new(),
            hold: None,
            starts: Starts::new(Instant::now()),
            next_start: None,
        }
    }

    fn pump(&mut self, key: &str, desk: &mut Desk<'_>) -> Result<(), Ended> {
        self.queue.retain(|_, letter| letter.is_wanted());
        for chain in &mut self.chains {
            chain.under_way.retain(|_, letter| letter.is_wanted());
            chain.current &= chain.begun.elapsed() < CHAIN_AGE;
        }
        self.chains.retain(|chain| chain.current || !chain.under_way.is_empty());
        if self.hold.is_some_and(|hold| hold > Instant::now()) {
            return Ok(());
        }
        self.hold = None;
        self.announce(desk)?;
        let mut used_up = false;
        if let Some(chain) = self.chains.last_mut().filter(|chain| chain.current && chain.announced == Announced::Yes) {
            while chain.under_way.len() < WINDOW {
                let Some((order, letter)) = self.queue.pop_first() else {
                    break;
                };
                if letter.body.len() > self.max_body {
                    let detail = format!("{} takes at most {} bytes", self.name, self.max_body);
                    letter.refuse(Reason::TooLarge, Some(detail));
                    continue;
                }
                if let Some(unsealed) = chain.seal(desk, letter)? {
                    self.queue.insert(order, unsealed);
                    chain.current = false;
                    used_up = true;
                    break;
                }
            }
        }
        let current = self.chains.last().is_some_and(|chain| chain.current);
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
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        for chain in self.chains.iter_mut().filter(|chain| chain.announced == Announced::No) {
            let is_next = chain.current && !self.queue.is_empty();
            if chain.under_way.is_empty() && !is_next {
                continue;
            }
            let request = desk.requests.open(Pending::Wrap { chain: *chain.sealing.chain_id() });
            let bundle = SignedBundle { bundle: &chain.bundle, signature: &chain.signature };
            desk.link.send(&Message::Wrap { request, to: peer.id, wrap: &chain.wrap, bundle })?;
            chain.announced = Announced::Asked;
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
        let chain_id = *sealing.chain_id();
        for chain in &mut self.chains {
            chain.current = false;
        }
        self.chains.push(Chain {
            sealing,
            wrap,
            bundle: desk.own.bundle.encode(),
            signature: desk.own.signature.clone(),
            announced: Announced::No,
            counted: false,
            current: true,
            heard: false,
            begun: Instant::now(),
            under_way: BTreeMap::new(),
            salts: BTreeMap::new(),
        });
        self.peer = Some(peer);
        Ok(chain_id)
    }

    fn wrapped(
        &mut self,
        desk: &mut Desk<'_>,
        chain_id: &[u8; 8],
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let Some(place) = self.chains.iter().position(|chain| chain.is(chain_id)) else {
            return Ok(());
        };
        match answer {
            Ok(()) => {
                if let Some(chain) = self.chains.get_mut(place) {
                    chain.announced = Announced::Yes;
                    if !core::mem::replace(&mut chain.counted, true) {
                        self.starts.count(Instant::now());
                    }
                    for letter in chain.under_way.values() {
                        desk.link.send(&Message::Send { wanted: letter.wanted(), envelope: &letter.envelope })?;
                    }
                }
            }
            Err((Reason::Rate, pause)) => self.pause(place, pause.map_or(RATE_PAUSE, millis)),
            Err((Reason::Unavailable, Some(pause))) => self.pause(place, millis(pause)),
            Err((reason, _)) => {
                let chain = self.chains.remove(place);
                if chain.current && reason != Reason::NameInUse {
                    for letter in core::mem::take(&mut self.queue).into_values() {
                        letter.refuse(reason, None);
                    }
                }
                for letter in chain.under_way.into_values() {
                    self.again(letter, reason, reason == Reason::NameInUse);
                }
            }
        }
        Ok(())
    }

    fn pause(&mut self, place: usize, pause: Duration) {
        self.hold = Some(Instant::now() + pause);
        if let Some(chain) = self.chains.get_mut(place) {
            chain.announced = Announced::No;
        }
    }

    fn told(&mut self, receipt: &Receipt) {
        let (Some(peer), Some(place)) = (&self.peer, self.chains.iter().position(|chain| chain.is(&receipt.chain)))
        else {
            return;
        };
        let Some(chain) = self.chains.get_mut(place) else {
            return;
        };
        let word = chain.salts.get(&receipt.to).map(|salt| chain.sealing.verify_receipt(&peer.id, receipt, salt));
        // `accepted`, `stored` and some refusals are the server's word and carry no tag; a tag must be right.
        let recipients = matches!(receipt.rung, Rung::Delivered | Rung::Opened);
        if (recipients || receipt.tag.is_some()) && word != Some(Ok(())) {
            tracing::warn!("a receipt for {} ({}) is not {0}'s word: ignored", self.name, receipt.rung);
            return;
        }
        if receipt.from > receipt.to {
            return;
        }
        chain.heard |= receipt.tag.is_some();
        let numbers: Vec<u32> = chain.under_way.range(receipt.from..=receipt.to).map(|(n, _)| *n).collect();
        if receipt.rung != Rung::Refused {
            for n in numbers {
                chain.reach(n, receipt.rung);
            }
            return;
        }
        let reason = receipt.reason.unwrap_or(Reason::Unavailable);
        let curable = matches!(
            reason,
            Reason::Rekey | Reason::Unknown | Reason::Gap | Reason::Rewound | Reason::Unreadable | Reason::NameInUse
        );
        // Also without letters under way: it may be the wrap that is refused.
        chain.current &= !curable;
        let refused: Vec<Letter> = numbers.iter().filter_map(|n| chain.under_way.remove(n)).collect();
        let unused = chain.sealing.next() == 0;
        if reason == Reason::Rate {
            self.hold = Some(Instant::now() + RATE_PAUSE);
        }
        if unused {
            // The wrap itself, before anything was sealed: it counts for those who wait for the chain.
            for letter in core::mem::take(&mut self.queue).into_values() {
                self.again(letter, reason, curable || reason == Reason::Rate);
            }
        }
        for letter in refused {
            self.again(letter, reason, curable || reason == Reason::Rate);
        }
    }

    /// Queues a refused letter again, if that may help and was not tried too often.
    fn again(&mut self, mut letter: Letter, reason: Reason, curable: bool) {
        if !curable || letter.tries >= MAX_TRIES {
            letter.refuse(reason, None);
            return;
        }
        // Waiting for the rate costs no try: the sender's own deadline ends it.
        letter.tries += u8::from(reason != Reason::Rate);
        self.queue.insert(letter.order, letter);
    }
}

impl Chain {
    fn is(&self, id: &[u8; 8]) -> bool {
        self.sealing.chain_id() == id
    }

    /// Seals and sends a letter; gives it back if the chain is used up.
    fn seal(&mut self, desk: &mut Desk<'_>, mut letter: Letter) -> Result<Option<Letter>, Ended> {
        let mut envelope = vec![0; letter.body.len() + SIGNED_OVERHEAD];
        match self.sealing.seal::<HostAead>(letter.signed, KIND_TEXT, &letter.body, &mut envelope) {
            Ok(sealed) => {
                envelope.truncate(sealed.len);
                letter.envelope = envelope;
                desk.link.send(&Message::Send { wanted: letter.wanted(), envelope: &letter.envelope })?;
                self.salts.insert(sealed.n, sealed.salt);
                if self.salts.len() > SALTS {
                    self.salts.pop_first();
                }
                self.under_way.insert(sealed.n, letter);
                Ok(None)
            }
            Err(SealError::Exhausted) => Ok(Some(letter)),
            Err(error) => Err(Failure::refused(format!("a message cannot be sealed: {error}")).into()),
        }
    }

    fn reach(&mut self, n: u32, rung: Rung) {
        let Some(letter) = self.under_way.get_mut(&n) else {
            return;
        };
        if letter.reached.is_some_and(|reached| reached >= rung) {
            return;
        }
        letter.reached = Some(rung);
        let id = message_id(self.sealing.chain_id(), n);
        let _ = letter.replies.send(Reply::Rung { rung, id });
        if rung >= letter.until {
            let _ = letter.replies.send(Reply::Done);
            self.under_way.remove(&n);
        }
    }
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
