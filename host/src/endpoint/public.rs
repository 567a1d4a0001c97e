//! The public conversation, as a home lives it: what it says to everybody, and what it reads (PROTOCOL 9.9).
//!
//! Nothing is asked for before a reader wants it. Then a page comes after the other, each when the one before it was shown,
//! so that neither side holds more than a page. What comes counts only under its author's signature, and that only under a
//! pinned key: what is nobody's word, or came before, is dropped, and the reader is told how much. What this home says is
//! durable before it leaves, one after the other, and is sent again with the same bytes until the server has answered.

use core::time::Duration;
use std::collections::{HashMap, HashSet, VecDeque};

use ossicle_core::{
    Bundle, DirectoryEntry, Fixed, Follow, FollowResponse, Lookup, MAX_POST_LEN, Message, Post, Reason, Said, Say,
    Subject,
};
use tokio::time::Instant;

use super::agent::{Desk, Ended, Notice, Pending};
use super::link::LinkError;
use super::local::Reply;
use super::outbox::Replies;
use super::peers::{admit, check_bundle};
use super::{Failure, KIND_TEXT};
use crate::store::home::{HomeStore, HomeStoreError, MAX_OWN_POSTS};

/// What goes before every post that is shown: it is not what a home is for.
pub const PUBLIC_LABEL: &str = "[public, not end-to-end encrypted]";
/// Where the public conversation is named beside people and groups: no name has a slash.
pub const PUBLIC_NAME: &str = "/all";
/// Bundles that are remembered of a connection.
const MAX_BUNDLES: usize = 1024;
/// After this something that the server could not do is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A post that was verified, for a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicPost {
    /// Its number at the server, and which of the server's stores that is of.
    pub seq: u64,
    /// See `seq`.
    pub store_epoch: [u8; 8],
    /// The id of its author.
    pub author: [u8; 16],
    /// The author's count.
    pub number: u64,
    /// His name.
    pub from: String,
    /// When it was said, in seconds since 1970: the author's word.
    pub time: u64,
    /// The author's kind.
    pub kind: u8,
    /// What was said.
    pub body: Vec<u8>,
}

/// A post as it came.
struct Line {
    seq: u64,
    author: [u8; 16],
    number: u64,
    at: u64,
    epoch: u32,
    kind: u8,
    signature: [u8; 64],
    body: Vec<u8>,
    /// Its author's bundle was asked for once more.
    again: bool,
}

/// What becomes of a line.
enum Judged {
    Shown(String),
    Dropped,
    /// Not before the directory has said more of its author.
    Asks,
}

/// See the module.
#[derive(Default)]
pub(super) struct Public {
    /// Somebody reads.
    follows: bool,
    /// The store of the server that the numbers are of, and the last one that was given to the reader or dropped.
    place: Option<([u8; 8], u64)>,
    /// The same, as far as it is durable.
    durable: u64,
    /// A page was asked for; there is more behind the last one.
    asking: bool,
    more: bool,
    /// The server had no page just now: when it is asked again.
    asks_at: Option<Instant>,
    lines: VecDeque<Line>,
    /// Posts that the reader has not shown yet.
    unread: usize,
    /// The last counts of authors whose posts were given to the reader.
    numbers: HashMap<[u8; 16], u64>,
    /// Verified, over this connection.
    bundles: HashMap<[u8; 16], Bundle>,
    asked: HashSet<[u8; 16]>,
    failed: HashSet<[u8; 16]>,
    dropped: u64,
    /// What this home says and the server has not answered.
    saying: Option<u64>,
    held_until: Option<Instant>,
    replies: HashMap<u64, Replies>,
    notices: Vec<Notice>,
}

impl Public {
    /// The connection has gone. What the reader was given stays given.
    pub(super) fn disconnected(&mut self) {
        self.asking = false;
        self.lines.clear();
        self.bundles.clear();
        self.asked.clear();
        self.failed.clear();
        self.saying = None;
    }

    /// There is a connection.
    pub(super) fn connected(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        (self.held_until, self.asks_at) = (None, None);
        self.more = true;
        let store_epoch = desk.link.settings().store_epoch;
        if self.place.is_none_or(|(epoch, _)| epoch != store_epoch) {
            self.durable = desk.store.public_place(&store_epoch)?;
            self.place = Some((store_epoch, self.durable));
        }
        self.pump(desk)?;
        self.ask(desk)
    }

    /// What is to be told to the reader.
    pub(super) fn take_notices(&mut self) -> Vec<Notice> {
        core::mem::take(&mut self.notices)
    }

    /// Until when nothing is said or asked, because the server has had enough.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.held_until.into_iter().chain(self.asks_at).min()
    }

    pub(super) fn broadcast(&self, reply: &Reply) {
        for replies in self.replies.values() {
            let _ = replies.send(reply.clone());
        }
    }

    /// From now on somebody reads.
    pub(super) fn follow(&mut self) {
        self.follows = true;
    }

    /// Asks for a page, if there is more and the reader is done with what there was.
    pub(super) fn ask(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        let Some((_, after)) = self.place else { return Ok(()) };
        if !self.follows || !self.more || self.asking || self.unread > 0 || !self.lines.is_empty() {
            return Ok(());
        }
        if self.asks_at.is_some_and(|at| at > Instant::now()) {
            return Ok(());
        }
        self.asks_at = None;
        (self.asking, self.more) = (true, false);
        let request = desk.requests.open(Pending::Follow);
        Ok(desk.link.send(&Follow { request, after }.encode(&mut [0; 16]).map_err(LinkError::from)?)?)
    }

    /// There is something new.
    pub(super) fn news(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        self.more = true;
        self.ask(desk)
    }

    /// A page has come.
    pub(super) fn page(&mut self, desk: &mut Desk<'_>, page: &FollowResponse<'_>) -> Result<(), Ended> {
        let Some((_, after)) = self.place else { return Ok(()) };
        self.asking = false;
        let mut last = after;
        for said in Said::lines(page.lines) {
            let ordered = said.ok().filter(|said| said.seq > last);
            let Some(Said { seq, author, post }) = ordered else {
                return Err(LinkError::Broken("the server gives posts that make no sense".into()).into());
            };
            last = seq;
            self.lines.push_back(Line {
                seq,
                author,
                number: post.number,
                at: post.at,
                epoch: post.epoch,
                kind: post.kind,
                signature: *post.signature.0,
                body: post.body.to_vec(),
                again: false,
            });
        }
        // A page that brings nothing would be asked for without end. Word of something new may have come before it.
        self.more |= page.more && last > after;
        self.judge(desk)
    }

    /// There is no page.
    pub(super) fn refused(&mut self, desk: &mut Desk<'_>, reason: Reason) -> Result<(), Ended> {
        self.asking = false;
        match (&mut self.place, reason) {
            // The server's store went back.
            (Some((_, after)), Reason::Rewound) if *after > 0 => {
                (*after, self.durable, self.more) = (0, 0, true);
                self.ask(desk)
            }
            // It says nothing of what is new to whom it gave no page.
            (_, Reason::Rate | Reason::Unavailable) => {
                self.more = true;
                self.asks_at = Some(Instant::now() + AGAIN);
                Ok(())
            }
            _ => {
                tracing::warn!("the server gives nothing of the public conversation: {reason}");
                Ok(())
            }
        }
    }

    /// The directory has answered who an author is.
    pub(super) fn located(
        &mut self,
        desk: &mut Desk<'_>,
        id: &[u8; 16],
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        self.asked.remove(id);
        if let Err(reason @ (Reason::Rate | Reason::Unavailable)) = answer {
            let sentence = format!("the server's directory does not say who has said something: {reason}");
            return Err(LinkError::Broken(sentence).into());
        }
        let known = answer.map_err(|reason| super::peers::Rejected::For { reason, detail: None }).and_then(|entry| {
            let malformed = || super::peers::Rejected::For { reason: Reason::Malformed, detail: None };
            let signed = entry.bundle.as_ref().filter(|_| entry.id == *id).ok_or_else(malformed)?;
            let mut peer = admit(desk.store, &entry, None)?;
            let bundle = check_bundle(&mut peer, signed)?;
            desk.store.put_peer(&peer)?;
            Ok(bundle)
        });
        match known {
            Ok(bundle) => {
                if self.bundles.len() >= MAX_BUNDLES {
                    self.bundles.clear();
                }
                self.bundles.insert(*id, bundle);
            }
            Err(rejected) => {
                rejected.told(desk.alarm)?;
                self.failed.insert(*id);
            }
        }
        self.judge(desk)
    }

    /// Judges what came, in its order, as far as enough is known.
    fn judge(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        while let Some(mut line) = self.lines.pop_front() {
            let judged = match line.author == desk.me.id {
                // Whoever has typed it has seen it.
                true => None,
                false => Some(self.judge_one(desk, &mut line)?),
            };
            match judged {
                Some(Judged::Asks) => {
                    if self.asked.insert(line.author) {
                        let request = desk.requests.open(Pending::Author { id: line.author });
                        let subject = Subject::Id(line.author);
                        desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
                    }
                    self.lines.push_front(line);
                    return Ok(());
                }
                Some(Judged::Shown(from)) => {
                    self.unread += 1;
                    self.numbers.insert(line.author, line.number);
                    let Some((store_epoch, _)) = self.place else { return Ok(()) };
                    let Line { seq, author, number, at, kind, body, .. } = line;
                    let post = PublicPost { seq, store_epoch, author, number, from, time: at / 1000, kind, body };
                    self.notices.push(Notice::Public(post));
                }
                Some(Judged::Dropped) => self.dropped += 1,
                None => {}
            }
            if let Some((_, place)) = &mut self.place {
                *place = line.seq;
            }
        }
        self.failed.clear();
        if self.dropped > 0 {
            let posts = core::mem::take(&mut self.dropped);
            tracing::debug!(posts, "posts were dropped: nobody's word, or shown before");
            self.notices.push(Notice::PublicDropped { posts });
        }
        self.settle(desk.store)?;
        self.ask(desk)
    }

    fn judge_one(&mut self, desk: &Desk<'_>, line: &mut Line) -> Result<Judged, Ended> {
        let post = Post {
            number: line.number,
            at: line.at,
            epoch: line.epoch,
            kind: line.kind,
            signature: Fixed(&line.signature),
            body: &line.body,
        };
        if !post.is_proper() || (line.kind == KIND_TEXT && core::str::from_utf8(&line.body).is_err()) {
            return Ok(Judged::Dropped);
        }
        let last = match self.numbers.get(&line.author) {
            Some(last) => Some(*last),
            None => desk.store.last_post_of(&line.author)?,
        };
        if self.failed.contains(&line.author) || last.is_some_and(|last| line.number <= last) {
            return Ok(Judged::Dropped);
        }
        let Some(bundle) = self.bundles.get(&line.author) else { return Ok(Judged::Asks) };
        if post.verify(&desk.link.network(), bundle).is_ok() {
            let pinned = desk.store.peer(&line.author)?.filter(|peer| peer.member() == bundle.member());
            return Ok(pinned.map_or(Judged::Dropped, |peer| Judged::Shown(peer.name)));
        }
        // The bundle may be older than the post.
        if line.epoch > bundle.epoch && !core::mem::replace(&mut line.again, true) {
            return Ok(Judged::Asks);
        }
        Ok(Judged::Dropped)
    }

    /// The reader has shown a post.
    pub(super) fn read(&mut self, store: &mut HomeStore, post: &PublicPost) -> Result<(), HomeStoreError> {
        self.unread = self.unread.saturating_sub(1);
        let Some((store_epoch, _)) = self.place else { return Ok(()) };
        if post.store_epoch == store_epoch {
            self.durable = post.seq;
        }
        store.done_with_post(&store_epoch, self.durable, Some((post.author, post.number)))?;
        self.settle(store)
    }

    /// Makes durable that what was dropped behind the last post which was shown is done with.
    fn settle(&mut self, store: &mut HomeStore) -> Result<(), HomeStoreError> {
        match self.place {
            Some((store_epoch, place)) if self.unread == 0 && place > self.durable => {
                self.durable = place;
                store.done_with_post(&store_epoch, place, None)
            }
            _ => Ok(()),
        }
    }

    /// A person says something to everybody. Whether it was taken in.
    pub(super) fn say(&mut self, store: &mut HomeStore, body: &[u8], replies: Replies) -> Result<bool, HomeStoreError> {
        let failure = match body.len() {
            0 => Failure::usage("there is nothing to say: a text has at least one byte"),
            // Every reader would drop it.
            1..=MAX_POST_LEN if core::str::from_utf8(body).is_err() => {
                Failure::refused(format!("refused({}): what is said to everybody is text, UTF-8", Reason::Malformed))
            }
            1..=MAX_POST_LEN => match store.add_post(milliseconds(), body)? {
                Some(number) => {
                    self.replies.insert(number, replies);
                    return Ok(true);
                }
                None => Failure::refused(format!(
                    "{MAX_OWN_POSTS} texts for everybody wait in this home until the server takes them: try again later"
                )),
            },
            len => Failure::refused(format!(
                "refused({}): {len} bytes, and what is said to everybody has at most {MAX_POST_LEN}",
                Reason::TooLarge
            )),
        };
        let _ = replies.send(Reply::Failed(failure));
        Ok(false)
    }

    /// Says the next that is to be said, if the last was answered. Asks again, if it is time.
    pub(super) fn pump(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        if self.asks_at.is_some_and(|at| at <= Instant::now()) {
            self.asks_at = None;
            self.ask(desk)?;
        }
        if self.saying.is_some() || self.held_until.is_some_and(|until| until > Instant::now()) {
            return Ok(());
        }
        self.held_until = None;
        let Some(next) = desk.store.next_post()? else { return Ok(()) };
        let mut post = Post {
            number: next.number,
            at: next.at,
            epoch: desk.own.bundle.epoch,
            kind: KIND_TEXT,
            signature: Fixed(&[0; 64]),
            body: &next.body,
        };
        let (epoch, signature) = match next.signed {
            Some(signed) => signed,
            None => {
                let sick = |_| Failure::refused("what waits to be said to everybody is damaged in this home");
                let signature = post.sign(&desk.link.network(), desk.me, &desk.own.keys).map_err(sick)?;
                desk.store.sign_post(next.number, Some((post.epoch, signature)))?;
                (post.epoch, signature)
            }
        };
        (post.epoch, post.signature) = (epoch, Fixed(&signature));
        self.saying = Some(next.number);
        let request = desk.requests.open(Pending::Say { number: next.number });
        let mut buffer = [0; 1024];
        Ok(desk.link.send(&Say { request, post }.encode(&mut buffer).map_err(LinkError::from)?)?)
    }

    /// The server has answered what was said.
    pub(super) fn answered(
        &mut self,
        desk: &mut Desk<'_>,
        number: u64,
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        self.saying = None;
        match answer {
            Err((Reason::Rate | Reason::Unavailable, wait)) => {
                let wait = wait.map_or(AGAIN, |wait| Duration::from_millis(wait.into()));
                self.held_until = Some(Instant::now() + wait.min(Duration::from_secs(60)));
                return Ok(());
            }
            // It was signed with keys that this client has replaced since.
            Err((Reason::Unauthorised, _))
                if desk.store.next_post()?.is_some_and(|next| {
                    next.number == number && next.signed.is_some_and(|(epoch, _)| epoch != desk.own.bundle.epoch)
                }) =>
            {
                desk.store.sign_post(number, None)?;
            }
            answer => {
                desk.store.drop_post(number)?;
                let reply = match answer {
                    Ok(()) => Reply::Done,
                    Err((reason @ Reason::Rewound, _)) => {
                        let detail = "another copy of this home has said something under a later number";
                        Reply::Refused { reason, detail: Some(detail.to_owned()) }
                    }
                    Err((reason, _)) => Reply::Refused { reason, detail: None },
                };
                match (self.replies.remove(&number), &reply) {
                    (Some(replies), _) => drop(replies.send(reply)),
                    (None, Reply::Refused { reason, .. }) => {
                        tracing::warn!("refused({reason}): what this home had to say to everybody is given up");
                    }
                    (None, _) => {}
                }
            }
        }
        self.pump(desk)
    }
}

/// Milliseconds since 1970.
fn milliseconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
