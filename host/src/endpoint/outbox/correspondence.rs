//! All that goes to one recipient: the letters in their order, the chains that they are sealed with, and what the server
//! and the recipient say of them.

use core::time::Duration;
use std::collections::BTreeMap;

use getrandom::SysRng;
use ossicle_core::{
    Conversation, DirectoryEntry, Lookup, MAX_RECORD_LEN, Message, RECORD_OVERHEAD, Reason, Receipt, Rung,
    SIGNED_OVERHEAD, SendingChain, SignedBundle, Subject, WRAP_LEN,
};
use tokio::time::Instant;

use super::UNHEARD_OF;
use super::chain::{Announced, Chain, Live, remember};
use super::ledger::Ledger;
use super::letter::{Letter, passes};
use crate::endpoint::agent::{Desk, Ended, Pending};
use crate::endpoint::groups::present;
use crate::endpoint::peers::{Rejected, admit, check_bundle};
use crate::endpoint::{MESSAGE_HEAD_LEN, now};
use crate::name::Name;
use crate::store::home::groups::{GroupMember, Membership};
use crate::store::home::{LetterChain, LetterChange};

/// New chains that one letter may cost.
pub(super) const MAX_TRIES: u8 = 3;
/// Letters under way to one recipient: fewer than the keys that a recipient keeps for what it missed.
pub(super) const WINDOW: usize = 48;
pub(super) const CHAIN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long to wait where a refusal for the rate does not say.
pub(super) const RATE_PAUSE: Duration = Duration::from_secs(1);
/// How long a letter that nobody waits for rests after a refusal that may pass.
pub(super) const LULL: Duration = Duration::from_secs(60);

pub(super) struct Correspondence {
    pub(super) name: Name,
    /// The group in which this member is written to alone.
    pub(super) sid: Option<[u8; 16]>,
    /// Bytes of the longest body that the recipient takes.
    max_body: usize,
    /// Whether the directory was asked for the recipient's keys.
    pub(super) looking: bool,
    /// Whether a letter was stored whose sender waits for more, and whether the directory was asked where the recipient is.
    pub(super) wonders: bool,
    pub(super) asking: bool,
    /// The newest last.
    pub(super) chains: Vec<Chain>,
    /// Letters to be sealed, in the order in which they were given.
    pub(super) queue: BTreeMap<i64, Letter>,
    /// Nothing is sent before: the server wants that.
    pub(super) hold: Option<Instant>,
    /// Nothing is sent before, unless somebody gives a new letter.
    pub(super) lull: Option<Instant>,
    /// When letters that the server had are sent again that nobody has spoken of since.
    pub(super) doubt: Option<Instant>,
    /// That time has come, and the directory is to say first who the recipient is.
    pub(super) doubts: bool,
    /// How many chains may still be started.
    starts: Starts,
    /// When the next chain may be started that is wanted.
    pub(super) next_start: Option<Instant>,
}

/// New chains cost both sides public-key operations: so many at once, and then one a minute. What meets the limit waits.
pub(super) struct Starts {
    left: u32,
    /// Since when the next one is growing.
    since: Instant,
}

impl Starts {
    const AT_ONCE: u32 = 3;
    const EACH: Duration = Duration::from_secs(60);

    pub(super) const fn new(now: Instant) -> Self {
        Self { left: Self::AT_ONCE, since: now }
    }

    /// When one may be started, if that is not now.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Instant> {
        self.grow(now);
        (self.left == 0).then(|| self.since + Self::EACH)
    }

    /// A recipient has the wrap of a new one.
    pub(super) fn count(&mut self, now: Instant) {
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

impl Correspondence {
    pub(super) fn new(name: Name, sid: Option<[u8; 16]>) -> Self {
        Self {
            name,
            sid,
            max_body: 0,
            looking: false,
            wonders: false,
            asking: false,
            chains: Vec::new(),
            queue: BTreeMap::new(),
            hold: None,
            lull: None,
            doubt: None,
            doubts: false,
            starts: Starts::new(Instant::now()),
            next_start: None,
        }
    }

    pub(super) fn pump(&mut self, key: &str, desk: &mut Desk<'_>, ledger: &mut Ledger) -> Result<(), Ended> {
        self.retire(ledger);
        let done = self.send(key, desk, ledger);
        self.keep(ledger);
        done
    }

    /// Nothing is lost from here on.
    pub(super) fn keep(&mut self, ledger: &mut Ledger) {
        for letter in self.queue.values_mut() {
            ledger.keep(self.name.as_str(), letter);
        }
    }

    /// The group is over in which this member is written to: nothing is any more.
    pub(super) fn close(&mut self, ledger: &mut Ledger) {
        let queue = core::mem::take(&mut self.queue).into_values();
        let letters: Vec<Letter> = queue.chain(self.chains.iter_mut().flat_map(Chain::take_letters)).collect();
        for letter in letters {
            ledger.settle(self.name.as_str(), letter, Err(Reason::Closed), None);
        }
        self.chains.iter_mut().for_each(Chain::end);
        self.retire(ledger);
    }

    /// Chains that are too old, and those that nothing is expected of.
    pub(super) fn retire(&mut self, ledger: &mut Ledger) {
        for live in self.chains.iter_mut().filter_map(|chain| chain.live.as_mut()) {
            live.current &= live.begun.elapsed() < CHAIN_AGE;
        }
        for chain in self.chains.extract_if(.., |chain| !chain.is_current() && chain.is_idle()) {
            if chain.kept {
                ledger.changes.push(LetterChange::Forget(*chain.id()));
            }
        }
    }

    pub(super) fn send(&mut self, key: &str, desk: &mut Desk<'_>, ledger: &mut Ledger) -> Result<(), Ended> {
        if self.doubt.take_if(|until| *until <= Instant::now()).is_some() {
            self.doubts = true;
        }
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
                    ledger.settle(self.name.as_str(), letter, Err(Reason::TooLarge), Some(detail));
                    continue;
                }
                if let Some(unsealed) = chain.seal(self.name.as_str(), desk.store, ledger, letter)? {
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

    /// Sends again what the server had before this connection, if somebody waits for it or nothing was heard of it for long.
    /// Not to a recipient that takes small records only: a device remembers little, and would do again what it did long ago.
    pub(super) fn doubt(&mut self, record_limit: u16) {
        if !core::mem::take(&mut self.doubts) || usize::from(record_limit) < MAX_RECORD_LEN {
            return;
        }
        let old = now().saturating_sub(UNHEARD_OF);
        for chain in &mut self.chains {
            let is_doubted = |_: &u32, letter: &mut Letter| {
                !letter.answered
                    && (letter.is_attended() || (letter.reached == Some(Rung::Stored) && letter.time < old))
            };
            let doubted: Vec<_> = chain.resting.extract_if(.., is_doubted).collect();
            chain.unsent.extend(doubted);
        }
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
    pub(super) fn ask(&mut self, key: &str, desk: &mut Desk<'_>) -> Result<(), Ended> {
        if self.asking || !(core::mem::take(&mut self.wonders) || self.doubts) {
            return Ok(());
        }
        let waits = |letter: &Letter| letter.reached == Some(Rung::Stored) && !letter.away && letter.is_attended();
        if self.doubts || self.chains.iter().flat_map(|chain| chain.resting.values()).any(waits) {
            let request = desk.requests.open(Pending::Whereabouts { key: key.to_owned() });
            let subject = Subject::Name(self.name.as_str());
            desk.link.send(&Message::Lookup(Lookup { request, key: false, bundle: false, subject }))?;
            self.asking = true;
        }
        Ok(())
    }

    /// Starts a chain to the client of this entry.
    pub(super) fn begin(&mut self, desk: &mut Desk<'_>, entry: &DirectoryEntry<'_>) -> Result<[u8; 8], Rejected> {
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
        let conversation = match &self.sid {
            Some(sid) => group_with(desk, sid, &to.id)?,
            None => Conversation::direct(desk.me, &to, 0),
        };
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
            sid: None,
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

    pub(super) fn wrapped(
        &mut self,
        ledger: &mut Ledger,
        chain_id: &[u8; 8],
        answer: Result<(), (Reason, Option<u32>)>,
    ) {
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
                    if passes(reason) && letter.reached == Some(Rung::Stored) {
                        chain.resting.insert(n, letter);
                    } else if passes(reason) && !letter.is_attended() {
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
    pub(super) fn refuse_queue(&mut self, ledger: &mut Ledger, reason: Reason, detail: Option<&str>) {
        let stays = |letter: &Letter| passes(reason) && !letter.is_attended();
        let refused: Vec<_> = self.queue.extract_if(.., |_, letter| !stays(letter)).collect();
        for (_, letter) in refused {
            ledger.settle(self.name.as_str(), letter, Err(reason), detail.map(str::to_owned));
        }
        if !self.queue.is_empty() {
            self.lull = Some(Instant::now() + LULL);
        }
    }

    pub(super) fn told(&mut self, ledger: &mut Ledger, receipt: &Receipt) {
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
                self.wonders |= chain.reach(self.name.as_str(), ledger, n, receipt.rung);
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
            let is_servers = receipt.tag.is_none() && passes(reason) && reason != Reason::Rate;
            if is_servers && letter.reached == Some(Rung::Stored) {
                // It has the letter, and does not take it again now.
                letter.answered = true;
                chain.resting.insert(n, letter);
            } else if reason == Reason::Rate || (passes(reason) && !letter.is_attended()) {
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
    pub(super) fn again(&mut self, ledger: &mut Ledger, mut letter: Letter, reason: Reason, curable: bool) {
        if !curable || letter.tries >= MAX_TRIES {
            ledger.settle(self.name.as_str(), letter, Err(reason), None);
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

/// The group in which a member is written to, who is in it.
fn group_with(desk: &Desk<'_>, sid: &[u8; 16], member: &[u8; 16]) -> Result<Conversation, Rejected> {
    let no = |reason| Rejected::For { reason, detail: None };
    let group = desk.store.group(sid)?.filter(|group| group.standing.is_open()).ok_or_else(|| no(Reason::Closed))?;
    let is_in = |held: &GroupMember| held.member.id == *member && held.membership == Membership::Accepted;
    if !group.members.iter().any(is_in) {
        return Err(no(Reason::NotMember));
    }
    present(desk, &group)?.ok_or_else(|| no(Reason::NotMember))
}

pub(super) const fn millis(pause: u32) -> Duration {
    // No server's wish keeps anybody longer than a minute.
    Duration::from_millis(if pause > 60_000 { 60_000 } else { pause as u64 })
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
