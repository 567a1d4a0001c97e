//! Whom this home's commands watch: what the server has said of them, and who is to be told what is new to him.
//!
//! Whoever watches asks again and again, each time with what he knows already, and is answered when there is more. So a
//! slow one misses states that did not last and nothing else, and costs no queue. What the server said is kept by client;
//! a lost connection loses none of it: the next one asks anew, and what is different then is what is told.

use core::time::Duration;
use std::collections::HashMap;

use ossicle_core::{Change, Changed, MAX_WATCHED, PeerStatus, Reason, WatchResponse};
use tokio::time::Instant;

use super::Failure;
use super::local::{Reply, Seen};
use super::outbox::Replies;
use crate::name::{Name, Pattern};

/// A pattern that nobody asked about for so long is watched no more.
const LINGER: Duration = Duration::from_secs(30);
/// Clients of one pattern: a directory without end must not fill this machine's memory.
const MAX_SEEN: usize = 1 << 18;

/// See the module.
#[derive(Default)]
pub(super) struct Watches {
    all: Vec<Watched>,
    /// Nobody is answered here any more: he asks whoever holds the home next.
    yielding: bool,
}

/// A pattern, as the server is asked for it next.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) pattern: String,
    pub(super) after: String,
    /// What is answered to an older question is not looked at.
    pub(super) round: u64,
}

struct Watched {
    pattern: Pattern,
    /// Answers under another one say nothing about this one.
    epoch: u64,
    /// Counts what was new.
    version: u64,
    seen: HashMap<[u8; 16], Entry>,
    /// Counts how often the server was asked from the start.
    round: u64,
    /// Where the next page begins, while the server lists; `None` when it has listed all.
    listing: Option<Option<Name>>,
    polls: Vec<Poll>,
    asked: Instant,
}

struct Entry {
    seen: Seen,
    /// When it was new.
    version: u64,
    /// In which round the server named it last.
    round: u64,
}

struct Poll {
    epoch: u64,
    version: u64,
    replies: Replies,
}

impl Watches {
    /// Answers as soon as there is something that is new to whoever knows `version` of `epoch`. What the server is to be
    /// asked for, if it is not asked already.
    pub(super) fn poll(&mut self, pattern: &str, epoch: u64, version: u64, replies: Replies) -> Option<Ask> {
        if self.yielding {
            let _ = replies.send(Reply::Yield);
            return None;
        }
        let pattern = match Pattern::parse(pattern) {
            Ok(pattern) => pattern,
            Err(error) => {
                let _ = replies.send(Reply::Failed(Failure::usage(error.to_string())));
                return None;
            }
        };
        let poll = Poll { epoch, version, replies };
        if let Some(watched) = self.all.iter_mut().find(|watched| watched.pattern == pattern) {
            watched.asked = Instant::now();
            watched.polls.retain(|poll| !poll.replies.is_closed());
            watched.polls.push(poll);
            watched.answer();
            return None;
        }
        if self.all.len() >= MAX_WATCHED {
            let detail = Some(format!("{MAX_WATCHED} patterns are watched with this home already"));
            let _ = poll.replies.send(Reply::Refused { reason: Reason::TooLarge, detail });
            return None;
        }
        let mut watched = Watched {
            pattern,
            epoch: 0,
            version: 0,
            seen: HashMap::new(),
            round: 0,
            listing: None,
            polls: vec![poll],
            asked: Instant::now(),
        };
        watched.renew();
        let ask = watched.begin();
        self.all.push(watched);
        Some(ask)
    }

    /// Asks the server for all of them, from the start.
    pub(super) fn begin(&mut self) -> Vec<Ask> {
        self.all.iter_mut().map(Watched::begin).collect()
    }

    /// Takes in a page that was asked for, and says what is to be asked for next.
    pub(super) fn page(&mut self, asked: &Ask, page: &WatchResponse<'_>) -> Option<Ask> {
        let watched = self.find(asked)?;
        watched.take(page.lines);
        let before = watched.listing.clone().flatten();
        match Name::parse(page.next) {
            // A page that leads nowhere would be asked for without end.
            Ok(next) if before.is_none_or(|before| before.key() < next.key()) && watched.seen.len() <= MAX_SEEN => {
                watched.listing = Some(Some(next));
                Some(watched.ask())
            }
            _ => {
                watched.complete();
                watched.answer();
                None
            }
        }
    }

    /// Takes in what the server said by itself, and says what is to be asked for anew.
    pub(super) fn changed(&mut self, changed: &Changed<'_>) -> Vec<Ask> {
        for watched in &mut self.all {
            watched.take(changed.lines);
            watched.answer();
        }
        if changed.lost { self.begin() } else { Vec::new() }
    }

    /// The server does not tell: everybody who asked learns why.
    pub(super) fn refused(&mut self, asked: &Ask, reason: Reason) {
        if self.find(asked).is_some() {
            let is_this = |watched: &mut Watched| watched.pattern.as_str() == asked.pattern;
            for poll in self.all.extract_if(.., is_this).flat_map(|watched| watched.polls) {
                let _ = poll.replies.send(Reply::Refused { reason, detail: None });
            }
        }
    }

    /// Tells all who wait.
    pub(super) fn broadcast(&self, reply: &Reply) {
        for poll in self.all.iter().flat_map(|watched| &watched.polls) {
            let _ = poll.replies.send(reply.clone());
        }
    }

    /// Sends all who wait, and who come, to whoever holds the home next.
    pub(super) fn yield_all(&mut self) {
        self.yielding = true;
        for poll in self.all.drain(..).flat_map(|watched| watched.polls) {
            let _ = poll.replies.send(Reply::Yield);
        }
    }

    /// The patterns that nobody asks about any more, which are forgotten.
    pub(super) fn abandoned(&mut self) -> Vec<String> {
        let now = Instant::now();
        let is_abandoned = |watched: &mut Watched| {
            watched.polls.retain(|poll| !poll.replies.is_closed());
            if !watched.polls.is_empty() {
                watched.asked = now;
            }
            watched.asked + LINGER <= now
        };
        self.all.extract_if(.., is_abandoned).map(|watched| watched.pattern.as_str().to_owned()).collect()
    }

    fn find(&mut self, asked: &Ask) -> Option<&mut Watched> {
        let is_this = |watched: &&mut Watched| {
            watched.pattern.as_str() == asked.pattern && watched.round == asked.round && watched.listing.is_some()
        };
        self.all.iter_mut().find(is_this)
    }
}

impl Watched {
    /// From the start, under a number of its own.
    fn begin(&mut self) -> Ask {
        self.round += 1;
        self.listing = Some(None);
        self.ask()
    }

    fn ask(&self) -> Ask {
        let after = self.listing.iter().flatten().next().map(|name| name.as_str().to_owned()).unwrap_or_default();
        Ask { pattern: self.pattern.as_str().to_owned(), after, round: self.round }
    }

    /// Whoever asks with what he knew is told everything.
    fn renew(&mut self) {
        // Without randomness, whoever asks next may be told too much.
        self.epoch = getrandom::u64().unwrap_or_else(|_| self.epoch.wrapping_add(1)) | 1;
        self.seen.retain(|_, entry| !entry.seen.revoked);
    }

    fn take(&mut self, lines: &[u8]) {
        for line in Change::lines(lines).map_while(Result::ok) {
            // A name that is none would not have been admitted by an honest server.
            let Ok(name) = Name::parse(line.name) else { continue };
            if !self.pattern.matches(&name) {
                continue;
            }
            let (online, last_seen) = match line.status {
                Some(PeerStatus::Online) => (true, None),
                Some(PeerStatus::Offline { last_seen }) => (false, last_seen),
                None => (false, None),
            };
            let revoked = line.status.is_none();
            self.put(Seen { id: line.id, name: line.name.to_owned(), online, last_seen, revoked });
        }
    }

    fn put(&mut self, seen: Seen) {
        let round = self.round;
        match self.seen.get_mut(&seen.id) {
            Some(entry) if entry.seen == seen => entry.round = round,
            None if seen.revoked => {}
            _ => {
                self.version += 1;
                self.seen.insert(seen.id, Entry { seen, version: self.version, round });
            }
        }
    }

    /// The server has named everybody: whoever it did not name is gone.
    fn complete(&mut self) {
        self.listing = None;
        let gone = self.seen.values().filter(|entry| entry.round < self.round && !entry.seen.revoked);
        let gone: Vec<Seen> = gone.map(|entry| Seen { online: false, revoked: true, ..entry.seen.clone() }).collect();
        for seen in gone {
            self.put(seen);
        }
        // Who is gone need not be told for ever.
        let gone = self.seen.values().filter(|entry| entry.seen.revoked).count();
        if gone > self.seen.len() / 2 + 1024 {
            self.renew();
        }
    }

    fn answer(&mut self) {
        if self.listing.is_some() {
            return;
        }
        let (epoch, version) = (self.epoch, self.version);
        for poll in self.polls.extract_if(.., |poll| (poll.epoch, poll.version) != (epoch, version)) {
            let whole = poll.epoch != epoch;
            let is_new = |entry: &&Entry| if whole { !entry.seen.revoked } else { entry.version > poll.version };
            let mut new: Vec<&Entry> = self.seen.values().filter(is_new).collect();
            new.sort_by_key(|entry| entry.version);
            let lines = new.into_iter().map(|entry| entry.seen.clone()).collect();
            let _ = poll.replies.send(Reply::Watched { epoch, version, whole, lines });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    fn lines(all: &[(u8, &str, Option<PeerStatus>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (id, name, status) in all {
            let mut room = [0; Change::MAX_LEN];
            let len = Change { id: [*id; 16], name, status: *status }.append(&mut room).unwrap();
            bytes.extend_from_slice(&room[..len]);
        }
        bytes
    }

    const ONLINE: Option<PeerStatus> = Some(PeerStatus::Online);
    const AWAY: Option<PeerStatus> = Some(PeerStatus::Offline { last_seen: Some(9) });

    fn poll(watches: &mut Watches, epoch: u64, version: u64) -> (Option<Ask>, UnboundedReceiver<Reply>) {
        let (replies, answers) = unbounded_channel();
        (watches.poll("s-*", epoch, version, replies), answers)
    }

    /// Epoch, version, and whether it is everything; names with `+`, `-` or `!` for revoked.
    fn told(answers: &mut UnboundedReceiver<Reply>) -> Option<(u64, u64, bool, String)> {
        match answers.try_recv().ok()? {
            Reply::Watched { epoch, version, whole, lines } => {
                let sign = |seen: &Seen| {
                    if seen.revoked {
                        '!'
                    } else if seen.online {
                        '+'
                    } else {
                        '-'
                    }
                };
                let lines: Vec<_> = lines.iter().map(|seen| format!("{}{}", seen.name, sign(seen))).collect();
                Some((epoch, version, whole, lines.join(" ")))
            }
            _ => panic!("another reply"),
        }
    }

    fn page(watches: &mut Watches, ask: &Ask, next: &str, all: &[(u8, &str, Option<PeerStatus>)]) -> Option<Ask> {
        watches.page(ask, &WatchResponse { request: 1, next, lines: &lines(all) })
    }

    fn change(watches: &mut Watches, lost: bool, all: &[(u8, &str, Option<PeerStatus>)]) -> Vec<Ask> {
        watches.changed(&Changed { lost, lines: &lines(all) })
    }

    #[test]
    fn everybody_first_and_then_what_is_new_to_whoever_asks() {
        let mut watches = Watches::default();
        let (ask, mut answers) = poll(&mut watches, 0, 0);
        let ask = ask.unwrap();
        assert_eq!((ask.pattern.as_str(), ask.after.as_str()), ("s-*", ""));
        // A second one asks while the server still lists.
        let (none, mut others) = poll(&mut watches, 0, 0);
        assert!(none.is_none());
        let ask = page(&mut watches, &ask, "s-2", &[(1, "s-1", ONLINE), (2, "s-2", AWAY)]).unwrap();
        assert_eq!(ask.after, "s-2");
        // What is said meanwhile counts, whether the list comes to it later or not.
        assert!(change(&mut watches, false, &[(1, "s-1", AWAY), (9, "alice", ONLINE)]).is_empty());
        assert_eq!(told(&mut answers), None);
        assert!(page(&mut watches, &ask, "", &[(3, "s-3", ONLINE)]).is_none());
        let (epoch, version, whole, lines) = told(&mut answers).unwrap();
        assert_eq!((whole, lines.as_str()), (true, "s-2- s-1- s-3+"));
        assert_eq!(told(&mut others), Some((epoch, version, whole, lines)));
        // Nothing new: he waits.
        let (_, mut answers) = poll(&mut watches, epoch, version);
        change(&mut watches, false, &[(3, "s-3", ONLINE), (9, "alice", AWAY)]);
        assert_eq!(told(&mut answers), None);
        change(&mut watches, false, &[(3, "s-3", None), (4, "s-4", ONLINE), (5, "s-5", None)]);
        let (_, later, whole, lines) = told(&mut answers).unwrap();
        assert_eq!((whole, lines.as_str()), (false, "s-3! s-4+"));
        // Several states while nobody asks are one.
        for status in [AWAY, ONLINE, AWAY] {
            change(&mut watches, false, &[(4, "s-4", status)]);
        }
        let (_, mut answers) = poll(&mut watches, epoch, later);
        assert_eq!(told(&mut answers).unwrap().3, "s-4-");
        // Who knows nothing, or something else, is told everything, and nothing of who is gone.
        let (_, mut answers) = poll(&mut watches, epoch.wrapping_add(2), later);
        let (.., whole, lines) = told(&mut answers).unwrap();
        assert_eq!((whole, lines.as_str()), (true, "s-2- s-1- s-4-"));
    }

    #[test]
    fn what_is_different_after_asking_anew_is_told_and_late_answers_are_not_looked_at() {
        let mut watches = Watches::default();
        let (ask, mut answers) = poll(&mut watches, 0, 0);
        page(&mut watches, &ask.unwrap(), "", &[(1, "s-1", ONLINE), (2, "s-2", ONLINE), (3, "s-3", AWAY)]);
        let (epoch, version, ..) = told(&mut answers).unwrap();
        let (_, mut answers) = poll(&mut watches, epoch, version);
        let [old] = <[Ask; 1]>::try_from(change(&mut watches, true, &[])).ok().unwrap();
        // The connection breaks, and another one asks.
        let [ask] = <[Ask; 1]>::try_from(watches.begin()).ok().unwrap();
        assert!(page(&mut watches, &old, "", &[]).is_none());
        watches.refused(&old, Reason::Unavailable);
        assert_eq!(told(&mut answers), None);
        page(&mut watches, &ask, "", &[(1, "s-1", ONLINE), (3, "s-3", ONLINE)]);
        assert_eq!(told(&mut answers).unwrap().3, "s-3+ s-2!");
    }

    #[test]
    fn a_server_that_lists_without_end_or_refuses_is_not_asked_for_ever() {
        let mut watches = Watches::default();
        let (ask, mut answers) = poll(&mut watches, 0, 0);
        let ask = page(&mut watches, &ask.unwrap(), "s-2", &[]).unwrap();
        assert!(page(&mut watches, &ask, "s-1", &[]).is_none());
        assert_eq!(told(&mut answers).unwrap().3, "");
        let mut watches = Watches::default();
        let (ask, mut answers) = poll(&mut watches, 0, 0);
        watches.refused(&ask.unwrap(), Reason::Unavailable);
        assert!(matches!(answers.try_recv(), Ok(Reply::Refused { reason: Reason::Unavailable, .. })));
        assert!(watches.begin().is_empty());
    }

    #[test]
    fn patterns_that_nobody_asks_about_are_forgotten_and_who_yields_answers_nobody() {
        let mut watches = Watches::default();
        let (ask, answers) = poll(&mut watches, 0, 0);
        assert!(ask.is_some() && watches.abandoned().is_empty());
        drop(answers);
        watches.all[0].asked = Instant::now() - LINGER;
        assert_eq!(watches.abandoned(), ["s-*"]);
        let (_, mut answers) = poll(&mut watches, 0, 0);
        watches.yield_all();
        assert!(matches!(answers.try_recv(), Ok(Reply::Yield)));
        let (ask, mut answers) = poll(&mut watches, 0, 0);
        assert!(ask.is_none() && matches!(answers.try_recv(), Ok(Reply::Yield)));
        let mut watches = Watches::default();
        let (replies, mut answers) = unbounded_channel();
        assert!(watches.poll("", 0, 0, replies).is_none());
        assert!(matches!(answers.try_recv(), Ok(Reply::Failed(_))));
        for n in 0..=MAX_WATCHED {
            let (replies, mut answers) = unbounded_channel();
            assert_eq!(watches.poll(&format!("x{n}"), 0, 0, replies).is_some(), n < MAX_WATCHED);
            assert_eq!(answers.try_recv().is_ok(), n == MAX_WATCHED);
        }
    }
}
