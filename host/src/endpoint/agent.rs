//! The task that is a home's client: it owns the connection and the state, and everybody asks it.
//!
//! Requests and what a reader has read come in over a channel; answers and notices go out. Between them: connect (again,
//! after 1 to 60 seconds with jitter, for as long as anybody asks), authenticate, publish what must be published, send
//! and receive, answer and send signs of life, give up a server that is silent. It says `Listening` only if it was started
//! for a reader. What ends it for good (another key, a refusal, another connection that took over) is said to everybody.

use core::time::Duration;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use ossicle_core::{
    Bundle, BundleKeys, Changed, Channel, ChannelInfo, Channels, ChannelsResponse, Closed as GroupClosed, Credentials,
    Enrol, ExpireChannels, FollowResponse, Invite, Lookup, MAX_ENROL_BATCH, MAX_NAME_LEN, MAX_RECORD_LEN, Member,
    MemberChanged, Message, News, PeerStatus, Reason, Receipt, Rotate, Rotation, Settings, SignedBundle, Subject,
    Successor, SuccessorQuery, ToldBy, Unwatch, Watch, WatchResponse,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::groups::{GroupNews, Groups};
use super::history::{History, HistoryEntry, HistoryError};
use super::home::Opened;
use super::inbox::{Inbox, Waited, opened_receipt};
use super::kept::Kept;
use super::link::{Incoming, Link, LinkError, Server, Target};
use super::local::{HeldChannel, NewDevice, PeerKeys, Presence, Reply, Request, Requested, Status};
use super::outbox::{Outbox, Recipient, Replies, Settled, member};
use super::peers::{Alarm, Rejected, admit, check_bundle, verification};
use super::public::{PUBLIC_NAME, Public, PublicPost};
use super::rotation::{self, Walk};
use super::url::address;
use super::watch::{Ask, Watches};
use super::{Failure, Home, now};
use crate::crypto::{IdentityKey, verify};
use crate::name::{MAX_PATTERN_LEN, Name};
use crate::store::home::groups::Standing;
use crate::store::home::{HomeStore, HomeStoreError, OwnKeys, Profile, Progress, Waiting};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A new prekey is made after so many seconds.
const PREKEY_AGE: u64 = 7 * 24 * 3600;
/// End-to-end keys that were made so few seconds ago are not made anew because somebody says that they are old.
const MADE_LATELY: u64 = 3600;
/// At least so often it is seen whether keys have served their time.
const CARE: Duration = Duration::from_secs(3600);
/// How long a server that said nothing about it may be silent.
const SILENCE: Duration = Duration::from_secs(45);
/// How long an agent that was told to stop may take to say what it owes.
const FAREWELL: Duration = Duration::from_secs(5);
/// The key of this direction is replaced after so long, however little it sealed.
const KEY_AGE: Duration = Duration::from_secs(3600);
/// A connection is replaced by a resumed one after so long, for the sake of a fresh key agreement.
const CONNECTION_AGE: Duration = Duration::from_secs(24 * 3600);
/// Clients of a server that are listed: a directory without end must not fill this machine's memory.
const MAX_LISTED: usize = 1 << 18;
/// What waited at the server and is not acknowledged: the server sends far fewer at a time.
const MAX_UNACKNOWLEDGED: usize = 4096;
/// How long a question about groups waits for what the server has said to have for this client.
const NEWS_COME: Duration = Duration::from_secs(5);
/// The correlation ids of signs of life: ordinary ones, and the one whose answer is the last thing that is waited for.
const ALIVE: u16 = 1;
/// Room for the body of a request to watch: a pattern, a name, and two numbers.
const WATCH_LEN: usize = MAX_PATTERN_LEN + MAX_NAME_LEN + 16;
const LAST: u16 = 0;

/// What an agent tells the command that started it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// There is a connection.
    Connected,
    /// There is no connection at present, and why; the next one is tried.
    Disconnected(String),
    /// There is no connection any more, for good.
    Ended(Failure),
    /// Messages wait for their reader.
    Inbox,
    /// The identity key of a peer is not the pinned one: nothing is sent to it, and nothing taken under the new key, until
    /// a person has accepted that.
    KeyChanged {
        /// The peer's name.
        name: String,
    },
    /// A peer has a new identity key, which the former one signed: it is pinned, and the safety number has changed.
    KeyFollowed {
        /// The peer's name.
        name: String,
    },
    /// A message of this home came to its end, and nobody waited for that any more.
    Settled(Settled),
    /// Something has happened in a group.
    Group {
        /// What it is called here.
        label: String,
        /// What.
        news: GroupNews,
    },
    /// Somebody has said something to everybody. The next page comes once the reader has read all of this one.
    Public(PublicPost),
    /// So many posts are not shown: nobody has signed them, or they were shown before.
    PublicDropped {
        /// How many.
        posts: u64,
    },
}

/// To an agent; cheap to clone.
#[derive(Clone)]
pub(super) struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    /// Why there is no agent any more, where trying again would not cure that.
    failed: Arc<OnceLock<Failure>>,
}

enum Command {
    Request(Request, Replies),
    /// The reader has the message in this row, of so many bytes; it may have to be kept in the history of a conversation.
    Read(i64, usize, Option<(String, HistoryEntry)>, oneshot::Sender<Result<(), Failure>>),
    /// The reader has shown a post, which may have to be kept.
    ReadPost(PublicPost, bool, oneshot::Sender<Result<(), Failure>>),
    Stop(oneshot::Sender<()>),
    Waiting(i64, u32, oneshot::Sender<Result<Vec<Waiting>, Failure>>),
}

impl Handle {
    pub(super) fn request(&self, request: Request) -> Requested {
        let (replies, requested) = mpsc::unbounded_channel();
        if let Err(unsent) = self.commands.send(Command::Request(request, replies))
            && let Command::Request(_, replies) = unsent.0
        {
            // Whoever comes too late for a failure learns of it like those who came in time, and does not begin anew.
            let gone = Reply::Gone { taken: false };
            let _ = replies.send(self.failed.get().map_or(gone, |failure| Reply::Failed(failure.clone())));
        }
        Requested(requested)
    }

    pub(super) async fn waiting(&self, after: i64, limit: u32) -> Result<Vec<Waiting>, Failure> {
        self.ask(|answer| Command::Waiting(after, limit, answer)).await
    }

    pub(super) async fn read(&self, waiting: &Waiting, keep: bool) -> Result<(), Failure> {
        let conversation = match waiting.group {
            Some(_) => of_group(&waiting.message.sid),
            None => of_person(&waiting.from),
        };
        let kept = keep.then(|| (conversation, HistoryEntry::read(waiting)));
        self.ask(|answer| Command::Read(waiting.row, waiting.message.body.len(), kept, answer)).await
    }

    pub(super) async fn read_post(&self, post: PublicPost, keep: bool) -> Result<(), Failure> {
        self.ask(|answer| Command::ReadPost(post, keep, answer)).await
    }

    /// Ends the agent, with a last word to the server. Returns when it has ended.
    pub(super) async fn stop(&self) {
        let (stopped, wait) = oneshot::channel();
        if self.commands.send(Command::Stop(stopped)).is_ok() {
            let _ = wait.await;
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, Failure>>) -> Command) -> Result<T, Failure> {
        let (answer, answered) = oneshot::channel();
        let _ = self.commands.send(command(answer));
        let ended = || Failure::refused("the connection has ended");
        // Whoever comes too late for a failure learns of it all the same.
        answered.await.unwrap_or_else(|_| Err(self.failed.get().cloned().unwrap_or_else(ended)))
    }
}

/// Starts the agent of an opened home. With `listening` it takes messages.
pub(super) fn start(opened: Opened, listening: bool) -> Result<(Handle, mpsc::UnboundedReceiver<Notice>), Failure> {
    let (commands, incoming) = mpsc::unbounded_channel();
    let (notices, notified) = mpsc::unbounded_channel();
    let key = Arc::new(opened.key);
    let me = member(opened.profile.id, key.fingerprint());
    let inbox = Inbox::new(opened.store.backlog()?);
    let outbox = Outbox::load(&opened.store)?;
    let alarm = Alarm::new(listening.then(|| notices.clone()));
    let failed = Arc::<OnceLock<Failure>>::default();
    let agent = Agent {
        failed: Arc::clone(&failed),
        profile: opened.profile,
        me,
        key,
        own: opened.own,
        successor: rotation::pending(&opened.home, &opened.store)?,
        home: opened.home,
        store: opened.store,
        kept: opened.kept,
        listening,
        commands: incoming,
        notices,
        alarm,
        requests: Requests::default(),
        outbox,
        inbox,
        groups: Groups::default(),
        public: Public::default(),
        history: None,
        is_unreadable: false,
        watches: Watches::default(),
        waited: None,
        unacknowledged: VecDeque::new(),
        asked: VecDeque::new(),
        expected: 0,
        early: VecDeque::new(),
        early_until: None,
        stopping: None,
        is_drained: false,
        connected: None,
        trouble: None,
        beat: Beat::of(&Settings::default()),
    };
    tokio::spawn(agent.run());
    Ok((Handle { commands, failed }, notified))
}

/// What outbox and inbox work with.
pub(super) struct Desk<'a> {
    pub(super) link: &'a mut Link,
    pub(super) store: &'a mut HomeStore,
    pub(super) own: &'a OwnKeys,
    pub(super) me: &'a Member,
    pub(super) key_epoch: u32,
    pub(super) requests: &'a mut Requests,
    pub(super) alarm: &'a mut Alarm,
}

/// Why a connection, or the agent, goes no further.
pub(super) enum Ended {
    /// The connection; a new one may do better.
    Link(LinkError),
    /// The agent.
    Agent(Failure),
    /// Somebody asked it to stop.
    Stopped,
    /// The connection, because of its age or because this client has another key; the next one takes its place at once.
    Aged,
}

impl From<LinkError> for Ended {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Agent(failure)
    }
}

impl From<HomeStoreError> for Ended {
    fn from(error: HomeStoreError) -> Self {
        Self::Agent(error.into())
    }
}

/// What was asked of the server and not answered.
#[derive(Default)]
pub(super) struct Requests {
    last: u16,
    open: HashMap<u16, Pending>,
}

pub(super) enum Pending {
    /// More of the directory.
    List { lines: Vec<Presence>, replies: Replies },
    /// The channels at the server.
    Channels { replies: Replies },
    /// One of a batch of devices. One answer is for all of them.
    Enrol { batch: Arc<()>, index: u16, replies: Replies },
    /// Something that is done or refused.
    Plain { replies: Replies },
    /// A bundle of ours.
    Publish,
    /// The recipient of letters.
    Recipient { key: String },
    /// Whether the recipient of letters is there.
    Whereabouts { key: String },
    /// A member of a group that letters go to.
    Recipients { sid: [u8; 16], member: [u8; 16] },
    /// Whether a member of a group that letters go to is there.
    Members { sid: [u8; 16], member: [u8; 16] },
    /// The sender of a wrap.
    Sender { id: [u8; 16] },
    /// Somebody whom a person invites to a group.
    Invitee { draft: u64, name: Name },
    /// Somebody who is in a group.
    Acquaintance { id: [u8; 16] },
    /// What this home has decided about a group.
    Group { sid: [u8; 16] },
    /// A peer whose keys somebody wants.
    Peer { name: Name, replies: Replies },
    /// A peer whose key somebody wants to be sure of.
    Verify { name: Name, accept: bool, replies: Replies },
    /// The replacement of our identity key.
    Rotate { replies: Replies },
    /// A later key of a peer, before what the directory said is looked at.
    Successor { walk: Box<Walk> },
    /// The author of a post.
    Author { id: [u8; 16] },
    /// What was said to everybody.
    Follow,
    /// Something that this home says to everybody.
    Say { number: u64 },
    /// The end of a watch.
    Unwatch,
    /// A page of those who are watched.
    Watch { ask: Ask },
    /// A wrap of ours.
    Wrap { chain: [u8; 8] },
    /// A wrap of ours to one member of a group.
    GroupWrap { chain: [u8; 8], member: [u8; 16] },
}

impl Pending {
    /// Who waits for it.
    fn replies(&self) -> Option<&Replies> {
        match self {
            Self::List { replies, .. }
            | Self::Enrol { replies, .. }
            | Self::Plain { replies }
            | Self::Channels { replies }
            | Self::Peer { replies, .. }
            | Self::Verify { replies, .. }
            | Self::Rotate { replies } => Some(replies),
            Self::Successor { walk } => walk.then.replies(),
            Self::Publish
            | Self::Recipient { .. }
            | Self::Whereabouts { .. }
            | Self::Recipients { .. }
            | Self::Members { .. }
            | Self::GroupWrap { .. }
            | Self::Sender { .. }
            | Self::Invitee { .. }
            | Self::Acquaintance { .. }
            | Self::Group { .. }
            | Self::Author { .. }
            | Self::Follow
            | Self::Say { .. }
            | Self::Unwatch
            | Self::Watch { .. }
            | Self::Wrap { .. } => None,
        }
    }
}

impl Requests {
    /// A number for a request, by which its answer is known.
    pub(super) fn open(&mut self, pending: Pending) -> u16 {
        loop {
            // 0 names what was no request.
            self.last = self.last.checked_add(1).unwrap_or(1);
            if let std::collections::hash_map::Entry::Vacant(place) = self.open.entry(self.last) {
                place.insert(pending);
                return self.last;
            }
        }
    }
}

struct Agent {
    /// See [`Handle`].
    failed: Arc<OnceLock<Failure>>,
    profile: Profile,
    me: Member,
    key: Arc<IdentityKey>,
    own: OwnKeys,
    home: Home,
    store: HomeStore,
    kept: Kept,
    /// A new identity key that was offered to the server: nobody knows yet whether it has it.
    successor: Option<Arc<IdentityKey>>,
    listening: bool,
    commands: mpsc::UnboundedReceiver<Command>,
    notices: mpsc::UnboundedSender<Notice>,
    alarm: Alarm,
    requests: Requests,
    outbox: Outbox,
    inbox: Inbox,
    groups: Groups,
    public: Public,
    /// What is kept of chats, once something was; and whether none of it can be read.
    history: Option<History>,
    is_unreadable: bool,
    watches: Watches,
    /// Number and time that the server has said of the next delivery, wrap or receipt.
    waited: Waited,
    /// Numbers of what waited at the server and was received over this connection, in the order in which it came, until they
    /// are acknowledged.
    unacknowledged: VecDeque<u64>,
    /// Requests that wait for a connection; letters wait in the outbox.
    asked: VecDeque<(Request, Replies)>,
    /// How much of what waited at the server when the connection was made has not come yet; and questions that an answer
    /// before that would be too early for, until when they wait.
    expected: u32,
    early: VecDeque<(Request, Replies)>,
    early_until: Option<Instant>,
    /// Who waits for its end, and until when it may still say what it owes.
    stopping: Option<(oneshot::Sender<()>, Instant)>,
    /// Whether the server has answered the last sign of life.
    is_drained: bool,
    /// Since when there is a connection, and whether it resumed a channel.
    connected: Option<(u64, bool)>,
    /// Why there is none.
    trouble: Option<String>,
    /// What the server wants of signs of life.
    beat: Beat,
}

/// How often a sign of life is sent, and how long the server may be silent.
struct Beat {
    heartbeat: Duration,
    silence: Duration,
}

impl Beat {
    fn of(settings: &Settings) -> Self {
        let seconds = |seconds: u16| (seconds > 0).then(|| Duration::from_secs(seconds.into()));
        let heartbeat = seconds(settings.heartbeat).unwrap_or(SILENCE / 3);
        Self { heartbeat, silence: seconds(settings.timeout).unwrap_or(SILENCE) }
    }
}

impl Agent {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let ended = match self.session().await {
                Err(ended) => ended,
                Ok(never) => match never {},
            };
            let error = match ended {
                Ended::Stopped => return self.stopped(),
                Ended::Agent(failure) => return self.fail(&failure),
                Ended::Link(_) if self.stopping.is_some() => return self.stopped(),
                Ended::Link(error) => error,
                Ended::Aged => {
                    if let Err(failure) = self.disconnected() {
                        return self.fail(&failure);
                    }
                    continue;
                }
            };
            let mut wait = pause;
            match self.final_failure(&error) {
                Some(failure) => return self.fail(&failure),
                None => {
                    let trouble = describe(&error);
                    tracing::info!("{trouble}");
                    self.tell_everybody(&Reply::Trouble(trouble.clone()));
                    self.tell_reader(Notice::Disconnected(trouble.clone()));
                    (self.connected, self.trouble) = (None, Some(trouble));
                    if let LinkError::Refused { retry_after, .. } = error {
                        wait = wait.max(Duration::from_millis(retry_after.into()).min(LONGEST_PAUSE));
                    }
                }
            }
            if let Err(failure) = self.disconnected() {
                return self.fail(&failure);
            }
            if begun.elapsed() > LONGEST_PAUSE {
                wait = FIRST_PAUSE;
                pause = FIRST_PAUSE;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            match self.pause(jitter(wait)).await {
                Err(Ended::Stopped) => return self.stopped(),
                Err(Ended::Agent(failure)) => return self.fail(&failure),
                Ok(()) | Err(Ended::Link(_) | Ended::Aged) => {}
            }
        }
    }

    fn stopped(mut self) {
        let waiting = self.stopping.take();
        if let Err(error) = self.outbox.save(&mut self.store) {
            tracing::warn!("{error}");
        }
        // The state is closed before anybody else is told that he may have it.
        drop(self);
        if let Some((stopped, _)) = waiting {
            let _ = stopped.send(());
        }
    }

    /// What trying again would not cure, said to a person.
    fn final_failure(&self, error: &LinkError) -> Option<Failure> {
        let server = address(&self.profile.host, self.profile.port);
        let sentence = match error {
            LinkError::OtherServer => format!(
                "the server at {server} has another key than the pinned one: nothing was sent to it; \
                 ask its operator, and make a new home if the change is right"
            ),
            // The server may have taken the new key meanwhile: that is the next to be tried.
            LinkError::Refused { reason: Reason::Unauthorised, .. } if self.successor.is_some() => return None,
            LinkError::Refused { reason: Reason::Unauthorised, .. } => format!(
                "the server at {server} does not let {} in: the identity is unknown there, was revoked, or has \
                 another key since (this home was restored, say); ask its operator",
                self.profile.name
            ),
            LinkError::Refused { reason: Reason::TakenOver, .. } => format!(
                "another connection of {} took over: use one home at a time, and make an identity of its own \
                 for each machine with `ossicle init`",
                self.profile.name
            ),
            LinkError::Refused { reason: Reason::KeyChanged, .. } => format!(
                "somebody has entered the account of {} at {server} by its password, with another key: this home cannot \
                 connect any more. If that was not you, ask the operator to lock the account",
                self.profile.name
            ),
            LinkError::Failed(what) => format!("{what}: see whether the home and this system are in order"),
            _ => return None,
        };
        Some(Failure::refused(sentence))
    }

    fn fail(&mut self, failure: &Failure) {
        let _ = self.failed.set(failure.clone());
        self.tell_everybody(&Reply::Failed(failure.clone()));
        let _ = self.notices.send(Notice::Ended(failure.clone()));
        // Whoever still asks learns it too; the channel closes when the last one has gone.
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Request(_, replies) => drop(replies.send(Reply::Failed(failure.clone()))),
                Command::Read(_, _, _, answer) => drop(answer.send(Err(failure.clone()))),
                Command::ReadPost(_, _, answer) => drop(answer.send(Err(failure.clone()))),
                Command::Waiting(_, _, answer) => drop(answer.send(Err(failure.clone()))),
                Command::Stop(stopped) => drop(stopped.send(())),
            }
        }
    }

    /// Where nobody reads, nobody takes notices either.
    fn tell_reader(&self, notice: Notice) {
        if self.listening {
            let _ = self.notices.send(notice);
        }
    }

    fn tell_everybody(&self, reply: &Reply) {
        self.outbox.broadcast(reply);
        self.watches.broadcast(reply);
        self.public.broadcast(reply);
        self.groups.broadcast(reply);
        for (_, replies) in self.asked.iter().chain(&self.early) {
            let _ = replies.send(reply.clone());
        }
        for replies in self.requests.open.values().filter_map(Pending::replies) {
            let _ = replies.send(reply.clone());
        }
    }

    fn disconnected(&mut self) -> Result<(), Failure> {
        self.outbox.disconnected(&mut self.store)?;
        self.inbox.disconnected();
        self.public.disconnected();
        self.asked.extend(self.groups.disconnected());
        self.asked.append(&mut self.early);
        self.early_until = None;
        self.waited = None;
        self.unacknowledged.clear();
        for (_, pending) in self.requests.open.drain() {
            let pending = match pending {
                Pending::Successor { walk } => walk.then,
                pending => pending,
            };
            match pending {
                Pending::List { replies, .. } => self.asked.push_back((Request::Who, replies)),
                Pending::Peer { name, replies } => {
                    self.asked.push_back((Request::Peer { name: name.as_str().to_owned() }, replies));
                }
                Pending::Verify { name, accept, replies } => {
                    self.asked.push_back((Request::Verify { name: name.as_str().to_owned(), accept }, replies));
                }
                Pending::Channels { replies } => self.asked.push_back((Request::Channels, replies)),
                Pending::Rotate { replies } => self.asked.push_back((Request::Rotate, replies)),
                // What was signed is of no use on another connection.
                Pending::Enrol { replies, .. } => {
                    let _ = replies.send(Reply::Unanswered);
                }
                Pending::Plain { replies } => {
                    let sentence = "the connection broke before the server had answered: do it again";
                    let _ = replies.send(Reply::Failed(Failure::refused(sentence)));
                }
                Pending::Publish
                | Pending::Recipient { .. }
                | Pending::Whereabouts { .. }
                | Pending::Recipients { .. }
                | Pending::Members { .. }
                | Pending::GroupWrap { .. }
                | Pending::Sender { .. }
                | Pending::Invitee { .. }
                | Pending::Acquaintance { .. }
                | Pending::Group { .. }
                // These are asked for, or said, again.
                | Pending::Author { .. }
                | Pending::Follow
                | Pending::Say { .. }
                | Pending::Successor { .. }
                // It is asked for again, from the start.
                | Pending::Watch { .. }
                | Pending::Unwatch
                | Pending::Wrap { .. } => {}
            }
        }
        Ok(())
    }

    /// Waits, and takes commands meanwhile.
    async fn pause(&mut self, pause: Duration) -> Result<(), Ended> {
        let begun = Instant::now();
        let mut until = begun + pause;
        loop {
            tokio::select! {
                () = sleep_until(until) => return Ok(()),
                command = self.commands.recv() => {
                    // Somebody waits now, and the server may be back for long.
                    if matches!(command, Some(Command::Request(..))) {
                        until = until.min(begun + FIRST_PAUSE);
                    }
                    self.command(command, None)?;
                }
            }
            if self.stopping.is_some() {
                return Err(Ended::Stopped);
            }
        }
    }

    /// One connection, from its first byte to its end.
    async fn session(&mut self) -> Result<core::convert::Infallible, Ended> {
        let mut link = self.connect().await?;
        self.beat = Beat::of(link.settings());
        if self.own.restored {
            self.renew(&mut link).await?;
        }
        if self.profile.store_epoch.is_some_and(|known| known != link.settings().store_epoch) {
            self.outbox.unstored();
        }
        (self.connected, self.trouble) = (Some((now(), link.is_resumed())), None);
        self.tell_reader(Notice::Connected);
        self.care(&mut link)?;
        for owed in self.store.untold()? {
            self.tell_opened(&mut link, owed.row)?;
        }
        if self.stopping.is_some() {
            link.close().await;
            return Err(Ended::Stopped);
        }
        self.expected = 0;
        if self.listening {
            self.expected = link.settings().waiting;
            link.send(&Message::Listening)?;
        }
        if self.expected > 0 {
            self.early_until = Some(Instant::now() + NEWS_COME);
        } else {
            self.outbox.informed();
        }
        for (request, replies) in core::mem::take(&mut self.asked) {
            self.request(&mut link, request, replies)?;
        }
        self.outbox.connected();
        self.with_groups(&mut link, |groups, _, desk| groups.connected(desk))?;
        self.with_public(&mut link, Public::connected)?;
        let watched = self.watches.begin();
        self.watch(&mut link, watched)?;
        self.with_desk(&mut link, |outbox, _, desk| outbox.pump(desk))?;

        let (mut heard, mut said) = (Instant::now(), Instant::now());
        let mut fresh_key = Instant::now();
        let mut care = Instant::now() + self.until_care();
        let connected = Instant::now();
        // What came together with the settings: the server may have said its last with it.
        self.take_in(&mut link)?;
        loop {
            let held = self.outbox.held_until();
            let quiet = self.public.held_until();
            tokio::select! {
                progress = link.io() => {
                    progress?;
                    if self.take_in(&mut link)? {
                        heard = Instant::now();
                    }
                }
                command = self.commands.recv() => {
                    self.command(command, Some(&mut link))?;
                    if let Some((_, until)) = &self.stopping {
                        let until = *until;
                        let _ = tokio::time::timeout_at(until, self.take_leave(&mut link)).await;
                        link.close().await;
                        return Err(Ended::Stopped);
                    }
                }
                () = sleep_until(said + self.beat.heartbeat) => {
                    link.send(&Message::Status { request: ALIVE })?;
                    said = Instant::now();
                    for pattern in self.watches.abandoned() {
                        let request = self.requests.open(Pending::Unwatch);
                        let unwatch = Unwatch { request, pattern: &pattern };
                        link.send(&unwatch.encode(&mut [0; WATCH_LEN]).map_err(LinkError::from)?)?;
                    }
                }
                () = sleep_until(care) => {
                    self.care(&mut link)?;
                    care = Instant::now() + self.until_care();
                }
                () = sleep_until(fresh_key + KEY_AGE) => {
                    link.update_key()?;
                    fresh_key = Instant::now();
                }
                () = sleep_until(connected + CONNECTION_AGE), if self.requests.open.is_empty() => {
                    tokio::time::timeout(FAREWELL, self.take_leave(&mut link)).await.unwrap_or(Ok(()))?;
                    self.is_drained = false;
                    link.close().await;
                    return Err(Ended::Aged);
                }
                () = sleep_until(heard + self.beat.silence) => {
                    return Err(LinkError::Broken("the server is silent".into()).into());
                }
                () = sleep_until(self.early_until.unwrap_or(heard)), if self.early_until.is_some() => {
                    // Something of it may never come: it was too long, or given to another connection.
                    self.expected = 0;
                    self.release(&mut link)?;
                }
                () = sleep_until(quiet.unwrap_or(heard)), if quiet.is_some() => {
                    self.with_public(&mut link, Public::pump)?;
                }
                () = sleep_until(held.unwrap_or(heard)), if held.is_some() => {
                    self.with_desk(&mut link, |outbox, _, desk| outbox.pump(desk))?;
                }
            }
        }
    }

    /// Does what was received asks for, and says whether there was anything.
    fn take_in(&mut self, link: &mut Link) -> Result<bool, Ended> {
        let mut came = false;
        while let Some(incoming) = link.next()? {
            came = true;
            self.handle(link, incoming)?;
        }
        self.settle_read(link)?;
        self.tell_news();
        self.release(link)?;
        Ok(came)
    }

    /// Whether what is known of groups is what the server knows.
    fn is_up_to_date(&self) -> bool {
        self.expected == 0 && self.groups.is_idle()
    }

    /// Answers what waited for news of groups.
    fn release(&mut self, link: &mut Link) -> Result<(), Ended> {
        if !(self.is_up_to_date() || self.early_until.is_some_and(|until| until <= Instant::now())) {
            return Ok(());
        }
        self.early_until = None;
        if self.outbox.informed() {
            self.with_desk(link, |outbox, _, desk| outbox.pump(desk))?;
        }
        for (request, replies) in core::mem::take(&mut self.early) {
            self.about_groups(link, request, replies)?;
        }
        Ok(())
    }

    /// Does what somebody wants of groups.
    fn about_groups(&mut self, link: &mut Link, request: Request, replies: Replies) -> Result<(), Ended> {
        match request {
            Request::Answer { group, accept } => {
                self.with_groups(link, |groups, _, desk| groups.answer(desk, &group, accept, replies))
            }
            Request::CloseGroup { group } => {
                self.with_groups(link, |groups, _, desk| groups.close(desk, &group, replies))
            }
            _ => self.list_groups(&replies),
        }
    }

    fn list_groups(&self, replies: &Replies) -> Result<(), Ended> {
        let _ = replies.send(Reply::Groups(Groups::list(&self.store, &self.me.id)?));
        Ok(())
    }

    fn tell_news(&mut self) {
        if self.inbox.take_news() {
            let _ = self.notices.send(Notice::Inbox);
        }
    }

    /// Makes durable what one read brought, and says what waited for that.
    fn settle_read(&mut self, link: &mut Link) -> Result<(), Ended> {
        self.with_desk(link, |outbox, inbox, desk| {
            inbox.commit(desk)?;
            outbox.commit(desk)
        })?;
        self.tell_settled();
        // An acknowledgement says this of all that came before, too.
        let done =
            self.unacknowledged.iter().take_while(|seq| !self.inbox.holds(**seq) && !self.groups.holds(**seq)).count();
        match self.unacknowledged.drain(..done).next_back() {
            Some(seq) => Ok(link.send(&Message::Acknowledge { seq })?),
            None => Ok(()),
        }
    }

    /// Whether what came waited at the server.
    fn take_waited(&mut self) -> Result<Waited, Ended> {
        let waited = self.waited.take();
        self.expected = self.expected.saturating_sub(waited.is_some().into());
        if self.unacknowledged.len() >= MAX_UNACKNOWLEDGED {
            let endless = "the server sends without end what nobody has acknowledged";
            return Err(LinkError::Broken(endless.into()).into());
        }
        self.unacknowledged.extend(waited.map(|(seq, _)| seq));
        Ok(waited)
    }

    /// Says what became of letters that nobody waits for.
    fn tell_settled(&mut self) {
        for settled in self.outbox.take_news() {
            match (self.listening, settled.outcome) {
                (true, _) => self.tell_reader(Notice::Settled(settled)),
                (false, Ok(rung)) => tracing::info!("a message to {} was {rung}", settled.to),
                (false, Err(reason)) => tracing::warn!(
                    "refused({reason}): the message to {} that waited in this home's outbox is given up: {:?}",
                    settled.to,
                    settled.text
                ),
            }
        }
    }

    /// Takes no more messages, and keeps those that are already on their way.
    async fn take_leave(&mut self, link: &mut Link) -> Result<(), Ended> {
        if !self.listening {
            return Ok(());
        }
        link.send(&Message::NotListening)?;
        link.send(&Message::Status { request: LAST })?;
        while !self.is_drained {
            link.io().await?;
            while let Some(incoming) = link.next()? {
                self.handle(link, incoming)?;
            }
            self.settle_read(link)?;
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<Link, Ended> {
        let target = Target {
            host: self.profile.host.clone(),
            port: self.profile.port,
            server: Server::Key(self.profile.server_key.clone()),
        };
        let present = self.dial(&target, Arc::clone(&self.key), self.profile.key_epoch).await;
        let (Err(Ended::Link(LinkError::Refused { reason: Reason::Unauthorised, .. })), Some(next)) =
            (&present, self.successor.clone())
        else {
            return present;
        };
        // The answer to `Rotate` was lost, and the server has the new key, or neither.
        match self.dial(&target, next, self.profile.key_epoch.saturating_add(1)).await {
            Ok(link) => {
                self.succeed()?;
                Ok(link)
            }
            Err(Ended::Link(LinkError::Refused { reason: Reason::Unauthorised, .. })) => {
                self.successor = None;
                present
            }
            Err(ended) => Err(ended),
        }
    }

    async fn dial(&mut self, target: &Target, key: Arc<IdentityKey>, key_epoch: u32) -> Result<Link, Ended> {
        let credentials = Credentials::Key { id: self.profile.id, key_epoch, fingerprint: key.fingerprint() };
        // A channel is bound to the key that it came from.
        let offer = self.kept.offer(now()).filter(|channel| channel.client_key == key.fingerprint());
        let offered = offer.is_some();
        match self.dial_with(target, &credentials, &key, offer).await {
            // The channel may have ended while it was resumed: only a full handshake says whether the client has, too.
            Err(Ended::Link(LinkError::Refused { reason: Reason::Unauthorised, .. })) if offered => {
                self.dial_with(target, &credentials, &key, None).await
            }
            dialled => dialled,
        }
    }

    async fn dial_with(
        &mut self,
        target: &Target,
        credentials: &Credentials<'_>,
        key: &Arc<IdentityKey>,
        offer: Option<Channel>,
    ) -> Result<Link, Ended> {
        let offered = offer.is_some();
        let connecting = Link::connect(target, credentials, key, offer);
        tokio::pin!(connecting);
        loop {
            let until = self.stopping.as_ref().map(|(_, until)| *until);
            tokio::select! {
                connected = &mut connecting => return Ok(self.connected(connected, offered)?),
                command = self.commands.recv(), if until.is_none() => self.command(command, None)?,
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => return Err(Ended::Stopped),
            }
            if self.stopping.is_some() && self.store.untold()?.is_empty() {
                return Err(Ended::Stopped);
            }
        }
    }

    /// What a connection, or its failure, means for the channel.
    fn connected(&mut self, connected: Result<Link, LinkError>, offered: bool) -> Result<Link, LinkError> {
        let mut link = match connected {
            Ok(link) => link,
            Err(error) => {
                match &error {
                    LinkError::Broken(_) if offered => self.kept.broke(),
                    // Said by the server itself, behind its signature.
                    LinkError::Refused { reason: Reason::Unauthorised, .. } => drop(self.kept.forget()),
                    _ => {}
                }
                return Err(error);
            }
        };
        // A resumption leads no further away from the last signature.
        let since = if link.is_resumed() { self.kept.since() } else { Some(now()) };
        match (link.take_channel(), since) {
            (Some(channel), Some(since)) => self.kept.keep(&channel, since),
            // The one that was used is still good, and no other is after a full handshake.
            (None, _) if link.is_resumed() => {}
            _ => drop(self.kept.forget()),
        }
        tracing::debug!(resumed = link.is_resumed(), "connected");
        Ok(link)
    }

    /// The server has the new identity key: from now on it is this client's.
    fn succeed(&mut self) -> Result<(), Ended> {
        let (Some(next), Some(key_epoch)) = (self.successor.take(), self.profile.key_epoch.checked_add(1)) else {
            return Ok(());
        };
        // Before the former key goes, which alone opens it until then.
        if self.store.history_key()?.is_some()
            && self.history().is_ok()
            && let Some(history) = &self.history
        {
            history.belong_to(&self.store, &next).map_err(|error| Failure::refused(error.to_string()))?;
        }
        self.own = self.store.succeed(key_epoch, now())?;
        self.home.adopt_next_key()?;
        let (former, fingerprint) = (self.me.key, next.fingerprint());
        self.me = member(self.profile.id, fingerprint);
        self.key = next;
        self.profile.key_epoch = key_epoch;
        self.inbox.forget_all();
        self.outbox.restart();
        let reply = Reply::Rotated { former, fingerprint };
        self.asked.retain(|(request, replies)| {
            let is_this = *request == Request::Rotate;
            if is_this {
                let _ = replies.send(reply.clone());
            }
            !is_this
        });
        let open = self.requests.open.extract_if(|_, pending| matches!(pending, Pending::Rotate { .. }));
        for (_, pending) in open {
            if let Some(replies) = pending.replies() {
                let _ = replies.send(reply.clone());
            }
        }
        Ok(())
    }

    /// What time asks for, at the beginning of a connection and while it stands: a new prekey each week, and the end of keys
    /// that have served.
    fn care(&mut self, link: &mut Link) -> Result<(), Ended> {
        for prekey in self.store.expire_prekeys(now())? {
            self.own.prekeys.forget(prekey);
        }
        self.with_desk(link, |_, inbox, desk| inbox.forget_skipped(desk))?;
        self.outbox.expire(link.settings().time);
        self.settle_read(link)?;
        let store_epoch = link.settings().store_epoch;
        self.publish(link, &store_epoch)
    }

    /// How long that can wait.
    fn until_care(&self) -> Duration {
        match (self.own.made.saturating_add(PREKEY_AGE + 1)).checked_sub(now()) {
            Some(seconds @ 1..) => Duration::from_secs(seconds).min(CARE),
            // What is due was done, or cannot be done now.
            _ => CARE,
        }
    }

    /// After a restore: new keys, one epoch behind the newest bundle that the directory holds and this identity signed
    /// (PROTOCOL 8.4). Nothing is sent to anybody before.
    async fn renew(&mut self, link: &mut Link) -> Result<(), Ended> {
        let newest = {
            let asking = newest_bundle(link, self.me, Arc::clone(&self.key));
            let late = sleep_until(Instant::now() + SILENCE);
            tokio::pin!(asking, late);
            loop {
                tokio::select! {
                    newest = &mut asking => break newest?,
                    command = self.commands.recv() => self.command(command, None)?,
                    () = &mut late => return Err(LinkError::Broken("the server is silent".into()).into()),
                }
                if self.stopping.is_some() {
                    return Err(Ended::Stopped);
                }
            }
        };
        let last = newest.filter(|newest| newest.epoch >= self.own.bundle.epoch).unwrap_or(self.own.bundle);
        let sick = |_| Failure::refused("no new keys can be made: is there randomness on this system?");
        let prekey_id = last.prekey_id.max(self.own.bundle.prekey_id).wrapping_add(1);
        let keys = BundleKeys::generate(prekey_id, &mut getrandom::SysRng).map_err(sick)?;
        let bundle = keys.bundle(&self.me, last.epoch.saturating_add(1), last.hash());
        let signature = self.key.sign(&bundle.statement()).map_err(Failure::from)?;
        self.store.put_keys(&keys, &bundle, &signature, now())?;
        self.own = self.store.keys()?.ok_or(HomeStoreError::Damaged)?;
        Ok(())
    }

    /// Whether a recipient says that this home is an older copy of itself. He or a server can say so without cause: not for
    /// keys that were made lately.
    fn is_behind(&self, receipt: &Receipt) -> bool {
        let old = now().abs_diff(self.own.made) >= MADE_LATELY;
        old && self.successor.is_none() && self.outbox.is_behind(receipt)
    }

    /// This home went back to an earlier state without being restored, so that its chains are old ones to their recipients: as
    /// if it were restored now, it has new end-to-end keys, whose epoch the next connection settles (PROTOCOL 8.4).
    fn begin_anew(&mut self, link: &mut Link) -> Result<(), Ended> {
        self.with_desk(link, |_, inbox, desk| inbox.commit(desk))?;
        tracing::warn!(
            "this home is an earlier copy of itself to those it writes to: it makes new end-to-end keys, as after `ossicle restore`"
        );
        let sick = |_| Failure::refused("no new keys can be made: is there randomness on this system?");
        let last = self.own.bundle;
        let keys = BundleKeys::generate(last.prekey_id.wrapping_add(1), &mut getrandom::SysRng).map_err(sick)?;
        let bundle = keys.bundle(&self.me, last.epoch.saturating_add(1), last.hash());
        let signature = self.key.sign(&bundle.statement()).map_err(Failure::from)?;
        self.own = self.store.begin_anew(&keys, &bundle, &signature, now())?;
        self.inbox.forget_all();
        self.outbox.restart();
        Err(Ended::Aged)
    }

    /// Publishes the bundle if the server lacks it, and a new one if its prekey is a week old.
    fn publish(&mut self, link: &mut Link, store_epoch: &[u8; 8]) -> Result<(), Ended> {
        // The server takes one epoch after the other, so the present one must have arrived first.
        // And a bundle that was offered with a new identity key stays the one that follows.
        let due = self.own.published && self.successor.is_none();
        // What was made by a clock that ran far ahead would else stay until then.
        if due && now().abs_diff(self.own.made) > PREKEY_AGE {
            let (epoch, previous) = (self.own.bundle.epoch, self.own.bundle.hash());
            let sick = |_| Failure::refused("no new prekey can be made: is there randomness on this system?");
            self.own.keys.rotate(&mut getrandom::SysRng).map_err(sick)?;
            let bundle = self.own.keys.bundle(&self.me, epoch.saturating_add(1), previous);
            let signature = self.key.sign(&bundle.statement()).map_err(Failure::from)?;
            self.store.put_keys(&self.own.keys, &bundle, &signature, now())?;
            self.own = self.store.keys()?.ok_or(HomeStoreError::Damaged)?;
        }
        if !self.own.published || self.profile.store_epoch != Some(*store_epoch) {
            let request = self.requests.open(Pending::Publish);
            let bundle = self.own.bundle.encode();
            let bundle = SignedBundle { bundle: &bundle, signature: &self.own.signature };
            link.send(&Message::Publish { request, bundle })?;
        }
        Ok(())
    }

    fn with_desk<T>(
        &mut self,
        link: &mut Link,
        work: impl FnOnce(&mut Outbox, &mut Inbox, &mut Desk<'_>) -> Result<T, Ended>,
    ) -> Result<T, Ended> {
        let mut desk = Desk {
            link,
            store: &mut self.store,
            own: &self.own,
            me: &self.me,
            key_epoch: self.profile.key_epoch,
            requests: &mut self.requests,
            alarm: &mut self.alarm,
        };
        work(&mut self.outbox, &mut self.inbox, &mut desk)
    }

    fn with_groups<T>(
        &mut self,
        link: &mut Link,
        work: impl FnOnce(&mut Groups, &mut Inbox, &mut Desk<'_>) -> Result<T, Ended>,
    ) -> Result<T, Ended> {
        let mut groups = core::mem::take(&mut self.groups);
        let done = self.with_desk(link, |outbox, inbox, desk| {
            let done = work(&mut groups, inbox, desk)?;
            outbox.look_at_groups();
            outbox.pump(desk)?;
            Ok(done)
        });
        self.groups = groups;
        for (label, news) in self.groups.take_news() {
            self.tell_reader(Notice::Group { label, news });
        }
        done
    }

    fn with_public(
        &mut self,
        link: &mut Link,
        work: impl FnOnce(&mut Public, &mut Desk<'_>) -> Result<(), Ended>,
    ) -> Result<(), Ended> {
        let mut public = core::mem::take(&mut self.public);
        let done = self.with_desk(link, |_, _, desk| work(&mut public, desk));
        self.public = public;
        for notice in self.public.take_notices() {
            self.tell_reader(notice);
        }
        done
    }

    fn command(&mut self, command: Option<Command>, link: Option<&mut Link>) -> Result<(), Ended> {
        match command {
            Some(Command::Request(request, replies)) => self.take(request, replies, link),
            Some(Command::Waiting(after, limit, answer)) => {
                let _ = answer.send(self.store.waiting(after, limit).map_err(Failure::from));
                Ok(())
            }
            Some(Command::Read(row, len, kept, answer)) => {
                self.inbox.read(len);
                if let Some((conversation, entry)) = kept {
                    self.keep(&conversation, &entry)?;
                }
                match link {
                    Some(link) => {
                        self.tell_opened(link, row)?;
                        if self.with_desk(link, |_, inbox, desk| inbox.resume(desk))? {
                            self.settle_read(link)?;
                            self.tell_news();
                        }
                    }
                    None => self.store.mark(row, Progress::Opened)?,
                }
                let _ = answer.send(Ok(()));
                Ok(())
            }
            Some(Command::ReadPost(post, keep, answer)) => {
                if keep {
                    let PublicPost { time, from, body, .. } = &post;
                    let entry =
                        HistoryEntry { time: *time, from: Some(from.clone()), signed: true, body: body.clone() };
                    self.keep(PUBLIC_NAME, &entry)?;
                }
                self.public.read(&mut self.store, &post)?;
                let _ = answer.send(Ok(()));
                link.map_or(Ok(()), |link| self.with_public(link, Public::ask))
            }
            Some(Command::Stop(stopped)) => {
                self.stopping = Some((stopped, Instant::now() + FAREWELL));
                Ok(())
            }
            // Nobody is left who could ask.
            None => Err(Ended::Stopped),
        }
    }

    /// The reader has a message: its sender is told, if he wants to know.
    fn tell_opened(&mut self, link: &mut Link, row: i64) -> Result<(), Ended> {
        let Some(owed) = self.store.owed(row)? else {
            return Ok(());
        };
        if let Some(receipt) = opened_receipt(&owed) {
            link.send(&Message::Tell(receipt))?;
        }
        Ok(self.store.mark(row, Progress::Told)?)
    }

    fn take(&mut self, request: Request, replies: Replies, link: Option<&mut Link>) -> Result<(), Ended> {
        match (request, link) {
            (Request::Send { letter, to, body, signed, until, keep }, link) => {
                let Some((to, conversation)) = self.recipient(&to, signed, &replies)? else {
                    return Ok(());
                };
                let entry = keep.then(|| HistoryEntry { time: now(), from: None, signed, body: body.clone() });
                if self.outbox.post(letter, to, body, signed, until, replies)
                    && let Some(entry) = entry
                {
                    self.keep(&conversation, &entry)?;
                }
                match link {
                    Some(link) => self.with_desk(link, |outbox, _, desk| outbox.pump(desk)),
                    None => Ok(self.outbox.save(&mut self.store)?),
                }
            }
            (Request::Follow, link) => {
                self.public.follow();
                let _ = replies.send(Reply::Done);
                link.map_or(Ok(()), |link| self.with_public(link, Public::ask))
            }
            (Request::Say { body, keep }, link) => {
                if self.public.say(&mut self.store, &body, replies)? && keep {
                    self.keep(PUBLIC_NAME, &HistoryEntry { time: now(), from: None, signed: true, body })?;
                }
                link.map_or(Ok(()), |link| self.with_public(link, Public::pump))
            }
            (Request::Status, _) => {
                let _ = replies.send(Reply::Status(self.status()));
                Ok(())
            }
            (Request::History { with, limit, erase }, _) => {
                let reply = self.recall(&with, limit, erase)?;
                let _ = replies.send(reply);
                Ok(())
            }
            // Without a connection nobody knows more.
            (Request::Groups, None) if self.trouble.is_some() => self.list_groups(&replies),
            (Request::Watch { pattern, epoch, version }, link) => {
                let ask = self.watches.poll(&pattern, epoch, version, replies);
                // Without a connection, the next one asks.
                link.map_or(Ok(()), |link| self.watch(link, ask))
            }
            (Request::Yield, _) => {
                self.watches.yield_all();
                let _ = replies.send(Reply::Done);
                Ok(())
            }
            (request, Some(link)) => self.request(link, request, replies),
            (request, None) => {
                self.asked.push_back((request, replies));
                Ok(())
            }
        }
    }

    /// The history of this home; begun with the first thing that is kept.
    fn history(&mut self) -> Result<&History, HistoryError> {
        match &mut self.history {
            Some(history) => Ok(history),
            none => Ok(none.insert(History::open(&self.store, &self.key)?)),
        }
    }

    /// Keeps something that was said. What cannot be read later is not kept, and said once: nothing else depends on it.
    fn keep(&mut self, conversation: &str, entry: &HistoryEntry) -> Result<(), Ended> {
        if self.is_unreadable {
            return Ok(());
        }
        if let Err(error) = self.history().map(drop) {
            return self.unreadable(error);
        }
        match &self.history {
            Some(history) => match history.keep(&mut self.store, conversation, entry) {
                Ok(()) => Ok(()),
                Err(error) => self.unreadable(error),
            },
            None => Ok(()),
        }
    }

    fn unreadable(&mut self, error: HistoryError) -> Result<(), Ended> {
        match error {
            HistoryError::Home(error) => Err(error.into()),
            error => {
                self.is_unreadable = true;
                tracing::warn!("{error}");
                Ok(())
            }
        }
    }

    /// What was said with somebody, or in a group; or nothing, once it is erased.
    fn recall(&mut self, with: &str, limit: u32, erase: bool) -> Result<Reply, Ended> {
        let conversation = match self.store.group_labelled(with)? {
            Some(group) => of_group(&group.sid),
            None if with == PUBLIC_NAME => PUBLIC_NAME.to_owned(),
            None => of_person(with),
        };
        if erase {
            self.store.erase_history(&conversation)?;
            return Ok(Reply::History(Vec::new()));
        }
        let entries = match self.history() {
            Ok(_) => match &self.history {
                Some(history) => history.latest(&self.store, &conversation, limit),
                None => Ok(Vec::new()),
            },
            Err(error) => Err(error),
        };
        match entries {
            Ok(entries) => Ok(Reply::History(entries)),
            Err(HistoryError::Home(error)) => Err(error.into()),
            Err(error) => Ok(Reply::Failed(Failure::refused(error.to_string()))),
        }
    }

    fn status(&self) -> Status {
        Status {
            name: self.profile.name.clone(),
            id: self.me.id,
            key: self.me.key,
            server: address(&self.profile.host, self.profile.port),
            connected: self.connected.map(|(since, _)| since),
            resumed: self.connected.is_some_and(|(_, resumed)| resumed),
            trouble: self.trouble.clone(),
            waiting: self.inbox.waiting(),
            letters: self.outbox.letters(),
            keys_made: self.own.made,
            full_handshake: self.kept.since(),
        }
    }

    /// To whom a message goes, and what its conversation is kept under: the group that is called so, or else a client.
    fn recipient(
        &self,
        to: &str,
        signed: bool,
        replies: &Replies,
    ) -> Result<Option<(Recipient, String)>, HomeStoreError> {
        let name = to.strip_prefix('@');
        let group = if name.is_some() { None } else { self.store.group_labelled(to)? };
        let is_open = group.as_ref().is_some_and(|group| group.standing.is_open());
        let is_known = || -> Result<bool, HomeStoreError> {
            let Ok(name) = Name::parse(to) else { return Ok(false) };
            Ok(self.store.peer_by_name(name.key())?.is_some())
        };
        match group {
            Some(_) if is_open && !signed => {
                let sentence = "messages to a group are always signed: leave out --no-sign";
                let _ = replies.send(Reply::Failed(Failure::usage(sentence)));
                Ok(None)
            }
            Some(group) if is_open => {
                let conversation = of_group(&group.sid);
                Ok(Some((Recipient::Group(group.sid, group.label()), conversation)))
            }
            // Whoever has the name of a group that is over is meant.
            Some(group) if !is_known()? => {
                let (reason, how) = match group.standing {
                    Standing::Closed => (Reason::Closed, "is closed"),
                    _ => (Reason::NotMember, "goes on without this client"),
                };
                let detail = Some(format!("{} {how}", group.label()));
                let _ = replies.send(Reply::Refused { reason, detail });
                Ok(None)
            }
            _ => Ok(self.other(name.unwrap_or(to), "send to somebody else", replies).map(|name| {
                let conversation = of_person(name.as_str());
                (Recipient::One(name), conversation)
            })),
        }
    }

    /// The name of somebody else.
    fn other(&self, name: &str, remedy: &str, replies: &Replies) -> Option<Name> {
        let failure = match Name::parse(name) {
            Ok(name) if Name::parse(&self.profile.name).is_ok_and(|own| own == name) => {
                Failure::usage(format!("{name} is this home's own name: {remedy}"))
            }
            Ok(name) => return Some(name),
            Err(error) => Failure::usage(error.to_string()),
        };
        let _ = replies.send(Reply::Failed(failure));
        None
    }

    fn request(&mut self, link: &mut Link, request: Request, replies: Replies) -> Result<(), Ended> {
        match request {
            Request::Channels => {
                let request = self.requests.open(Pending::Channels { replies });
                link.send(&Channels { request }.encode(&mut [0; 4]).map_err(LinkError::from)?)?;
            }
            request @ (Request::Answer { .. } | Request::CloseGroup { .. } | Request::Groups) => {
                if self.is_up_to_date() {
                    return self.about_groups(link, request, replies);
                }
                self.early_until.get_or_insert_with(|| Instant::now() + NEWS_COME);
                self.early.push_back((request, replies));
            }
            Request::Found { name, members, creator_closes } => {
                let Ok(own) = Name::parse(&self.profile.name) else { return Ok(()) };
                let what = (name.as_str(), members.as_slice(), creator_closes);
                return self.with_groups(link, |groups, _, desk| groups.found(desk, &own, what, replies));
            }
            Request::ExpireChannels => {
                self.kept.forget();
                let request = self.requests.open(Pending::Plain { replies });
                link.send(&ExpireChannels { request }.encode(&mut [0; 4]).map_err(LinkError::from)?)?;
            }
            Request::Enrol(devices) => return self.enrol(link, &devices, &replies),
            Request::Exporter => {
                let _ = replies.send(Reply::Exporter(*link.exporter()?.expose()));
            }
            Request::Peer { name } => match Name::parse(&name) {
                Ok(name) if Name::parse(&self.profile.name).is_ok_and(|own| own == name) => {
                    let _ = replies.send(Reply::Peer(PeerKeys {
                        id: self.me.id,
                        name: self.profile.name.clone(),
                        modulus: self.key.modulus().to_vec(),
                        bundle: self.own.bundle.encode().to_vec(),
                        signature: self.own.signature.clone(),
                    }));
                }
                Ok(name) => {
                    let given = name.as_str().to_owned();
                    let request = self.requests.open(Pending::Peer { name, replies });
                    let subject = Subject::Name(&given);
                    let lookup = Lookup { request, key: true, bundle: true, subject };
                    link.send(&Message::Lookup(lookup))?;
                }
                Err(error) => {
                    let _ = replies.send(Reply::Failed(Failure::usage(error.to_string())));
                }
            },
            Request::Revoke { name } => {
                let request = self.requests.open(Pending::Plain { replies });
                link.send(&Message::Revoke { request, subject: Subject::Name(&name) })?;
            }
            Request::Rotate => self.rotate(link, replies)?,
            Request::Verify { name, accept } => {
                let Some(name) = self.other(&name, "compare with somebody else", &replies) else {
                    return Ok(());
                };
                let given = name.as_str().to_owned();
                let request = self.requests.open(Pending::Verify { name, accept, replies });
                let subject = Subject::Name(&given);
                link.send(&Message::Lookup(Lookup { request, key: true, bundle: false, subject }))?;
            }
            // None of them waits for a connection.
            Request::Send { .. }
            | Request::Follow
            | Request::Say { .. }
            | Request::Status
            | Request::History { .. }
            | Request::Watch { .. }
            | Request::Yield => {
                return self.take(request, replies, Some(link));
            }
            Request::Who => {
                let request = self.requests.open(Pending::List { lines: Vec::new(), replies });
                link.send(&Message::List { request, after: "" })?;
            }
        }
        Ok(())
    }

    /// Offers the server a batch of devices. The one answer to it names one of the entries.
    fn enrol(&mut self, link: &mut Link, devices: &[NewDevice], replies: &Replies) -> Result<(), Ended> {
        let Some(count) =
            u16::try_from(devices.len()).ok().filter(|count| (1..=MAX_ENROL_BATCH).contains(&(*count).into()))
        else {
            let sentence = format!("a batch is 1 to {MAX_ENROL_BATCH} devices");
            let _ = replies.send(Reply::Failed(Failure::usage(sentence)));
            return Ok(());
        };
        let batch = Arc::new(());
        let mut buffer = [0; MAX_RECORD_LEN];
        for (index, device) in (0..count).zip(devices) {
            let entry = Pending::Enrol { batch: Arc::clone(&batch), index, replies: replies.clone() };
            let request = self.requests.open(entry);
            let NewDevice { id, name, modulus, signature } = device;
            let entry = Enrol { request, index, count, id: *id, name, modulus, signature };
            link.send(&entry.encode(&mut buffer).map_err(LinkError::from)?)?;
        }
        Ok(())
    }

    /// Offers the server the identity key that is to follow the present one.
    fn rotate(&mut self, link: &mut Link, replies: Replies) -> Result<(), Ended> {
        let fail = |sentence: &str| {
            let _ = replies.send(Reply::Failed(Failure::refused(sentence)));
            Ok(())
        };
        let next = match self.home.next_key() {
            Ok(Some(next)) => next,
            Ok(None) => return fail("there is no new key: run `ossicle init --rotate`"),
            Err(failure) => return fail(&failure.sentence),
        };
        if !self.own.published {
            return fail("the server has not taken the present keys yet: try again in a moment");
        }
        if self.outbox.is_under_way() {
            return fail("messages of this home are still under way: try again when they have arrived");
        }
        let Some(key_epoch) = self.profile.key_epoch.checked_add(1) else {
            return fail("this identity has had all the keys that it can have: make a new one with `ossicle init`");
        };
        let offered = rotation::successor_keys(&self.store, &self.own, self.profile.id, &next)?;
        let step = Rotation { id: self.profile.id, former: self.me.key, next: next.fingerprint(), key_epoch };
        let signature = self.key.sign(&step.statement()).map_err(Failure::from)?;
        let proof = next.sign(&step.possession(link.exporter()?)).map_err(Failure::from)?;
        let bundle = offered.bundle.encode();
        let bundle = SignedBundle { bundle: &bundle, signature: &offered.signature };
        let request = self.requests.open(Pending::Rotate { replies });
        let (modulus, signature, proof) = (next.modulus(), signature.as_slice(), proof.as_slice());
        let offer = Rotate { request, key_epoch, modulus, signature, proof, bundle };
        let mut buffer = [0; MAX_RECORD_LEN];
        link.send(&offer.encode(&mut buffer).map_err(LinkError::from)?)?;
        self.successor = Some(Arc::new(next));
        Ok(())
    }

    fn handle(&mut self, link: &mut Link, incoming: Incoming) -> Result<(), Ended> {
        let payload = match incoming {
            Incoming::Message(payload) => payload,
            Incoming::Closed(Some(reason @ Reason::TakenOver)) => {
                return Err(LinkError::Refused { reason, retry_after: 0 }.into());
            }
            Incoming::Closed(Some(reason @ (Reason::KeyChanged | Reason::Unauthorised))) => {
                return Err(LinkError::Refused { reason, retry_after: 0 }.into());
            }
            Incoming::Closed(Some(reason)) => {
                return Err(LinkError::Broken(format!("the server closed the connection: {reason}")).into());
            }
            Incoming::Closed(None) => {
                return Err(LinkError::Broken("the server closed the connection".into()).into());
            }
        };
        let Ok(message) = Message::decode(&payload) else {
            // A newer server may say things that this client does not know.
            tracing::debug!("the server sent a message that is unknown here");
            return Ok(());
        };
        match message {
            Message::Deliver { wanted, envelope } => {
                let waited = self.take_waited()?;
                let mut envelope = envelope.to_vec();
                self.with_desk(link, |_, inbox, desk| inbox.deliver(desk, wanted, &mut envelope, waited))
            }
            Message::WrapDelivery { from, wrap, bundle } => {
                let waited = self.take_waited()?;
                self.with_desk(link, |_, inbox, desk| inbox.wrap(desk, from, wrap, &bundle, waited))
            }
            Message::Told(receipt) => self.told(link, None, &receipt),
            Message::Waited { seq, at } => {
                self.waited = Some((seq, at));
                Ok(())
            }
            Message::Settings(settings) => {
                self.beat = Beat::of(&settings);
                Ok(())
            }
            Message::Status { request } => Ok(link.send(&Message::StatusResponse { request })?),
            Message::StatusResponse { request } => {
                self.is_drained |= request == LAST;
                Ok(())
            }
            Message::Done { request } => self.answered(link, request, Ok(None)),
            Message::Refused { request, reason, retry_after } => {
                self.answered(link, request, Err((reason, retry_after)))
            }
            Message::LookupResponse { request, entry } => match Walk::is_due(&self.store, &entry)? {
                Some(pinned) => {
                    let Some(then) = self.requests.open.remove(&request) else {
                        return Ok(());
                    };
                    self.walk(link, Box::new(Walk::new(pinned, &entry, payload.clone(), then)))
                }
                None => self.answered(link, request, Ok(Some(entry))),
            },
            Message::Other(body) if body.code() == Successor::CODE => {
                let Some(Pending::Successor { mut walk }) = self.requests.open.remove(&body.request()) else {
                    return Ok(());
                };
                let step = Successor::decode(body);
                if step.is_ok_and(|step| walk.step(step.modulus, step.signature)) {
                    self.walk(link, walk)
                } else {
                    self.look_again(link, *walk)
                }
            }
            Message::ListResponse(list) => self.listed(link, &list),
            Message::Other(body) if body.code() == ChannelsResponse::CODE => {
                if let Ok(ChannelsResponse { request, first, second }) = ChannelsResponse::decode(body) {
                    self.told_channels(request, [first, second]);
                }
                Ok(())
            }
            Message::Other(body) if body.code() == WatchResponse::CODE => {
                let (Ok(page), Some(Pending::Watch { ask })) =
                    (WatchResponse::decode(body), self.requests.open.remove(&body.request()))
                else {
                    return Ok(());
                };
                let next = self.watches.page(&ask, &page);
                self.watch(link, next)
            }
            Message::Other(body) if body.code() == Changed::CODE => match Changed::decode(body) {
                Ok(changed) => {
                    let again = self.watches.changed(&changed);
                    self.watch(link, again)
                }
                Err(_) => Ok(()),
            },
            Message::Other(body) if body.code() == ToldBy::CODE => match ToldBy::decode(body) {
                Ok(told) => self.told(link, Some(told.from), &told.receipt),
                Err(_) => self.take_waited().map(drop),
            },
            Message::Other(body) if body.code() == FollowResponse::CODE => {
                let (Ok(page), Some(Pending::Follow)) =
                    (FollowResponse::decode(body), self.requests.open.remove(&body.request()))
                else {
                    return Ok(());
                };
                self.with_public(link, |public, desk| public.page(desk, &page))
            }
            Message::Other(body) if body.code() == News::CODE => self.with_public(link, Public::news),
            Message::Other(body) if [Invite::CODE, MemberChanged::CODE, GroupClosed::CODE].contains(&body.code()) => {
                let waited = self.take_waited()?;
                self.with_groups(link, |groups, inbox, desk| groups.came(desk, inbox, &payload, waited))
            }
            // A newer server may say things that this client does not know; they need not be kept for it.
            _ => self.take_waited().map(drop),
        }
    }

    /// What became of messages of ours.
    fn told(&mut self, link: &mut Link, by: Option<[u8; 16]>, receipt: &Receipt) -> Result<(), Ended> {
        self.take_waited()?;
        if self.is_behind(receipt) {
            return self.begin_anew(link);
        }
        self.with_desk(link, |outbox, _, desk| outbox.told(desk, by.as_ref(), receipt))
    }

    /// Asks the server who is there, and to say whatever becomes of them.
    fn watch(&mut self, link: &mut Link, asks: impl IntoIterator<Item = Ask>) -> Result<(), Ended> {
        for ask in asks {
            let request = self.requests.open(Pending::Watch { ask: ask.clone() });
            let watch = Watch { request, pattern: &ask.pattern, after: &ask.after };
            link.send(&watch.encode(&mut [0; WATCH_LEN]).map_err(LinkError::from)?)?;
        }
        Ok(())
    }

    fn told_channels(&mut self, request: u16, held: [Option<ChannelInfo>; 2]) {
        if !matches!(self.requests.open.get(&request), Some(Pending::Channels { .. })) {
            return;
        }
        let Some(Pending::Channels { replies }) = self.requests.open.remove(&request) else { return };
        let kept = self.kept.channel().map(|channel| channel.id);
        let channels = held.into_iter().flatten().map(|channel| HeldChannel {
            id: channel.id,
            valid_for: channel.valid_for,
            kept: kept == Some(channel.id),
        });
        let _ = replies.send(Reply::Channels(channels.collect()));
    }

    /// Asks for the next step, or pins the key that was reached.
    fn walk(&mut self, link: &mut Link, walk: Box<Walk>) -> Result<(), Ended> {
        let Some(peer) = walk.arrived() else {
            let (id, key_epoch) = walk.next();
            let request = self.requests.open(Pending::Successor { walk });
            let mut buffer = [0; 32];
            let query = SuccessorQuery { request, id, key_epoch }.encode(&mut buffer).map_err(LinkError::from)?;
            return Ok(link.send(&query)?);
        };
        if !walk.is_current(&self.store)? {
            return self.look_again(link, *walk);
        }
        // What came on the former chains is durable before they go.
        self.with_desk(link, |_, inbox, desk| inbox.commit(desk))?;
        self.store.replace_peer(&peer.id, peer)?;
        self.inbox.forget(&peer.id);
        self.outbox.followed(&peer.name_key, &peer.id);
        self.alarm.key_followed(&peer.name);
        self.look_again(link, *walk)
    }

    /// Looks at what the directory said, under what is pinned now.
    fn look_again(&mut self, link: &mut Link, walk: Walk) -> Result<(), Ended> {
        let entry = match Message::decode(&walk.answer) {
            Ok(Message::LookupResponse { entry, .. }) => Ok(Some(entry)),
            _ => Err((Reason::Malformed, None)),
        };
        self.settle(link, walk.then, entry)
    }

    fn answered(
        &mut self,
        link: &mut Link,
        request: u16,
        answer: Result<Option<ossicle_core::DirectoryEntry<'_>>, (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        match self.requests.open.remove(&request) {
            Some(pending) => self.settle(link, pending, answer),
            None => Ok(()),
        }
    }

    fn settle(
        &mut self,
        link: &mut Link,
        pending: Pending,
        answer: Result<Option<ossicle_core::DirectoryEntry<'_>>, (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let entry = || match answer {
            Ok(Some(entry)) => Ok(entry),
            Ok(None) => Err(Reason::Malformed),
            Err((reason, _)) => Err(reason),
        };
        match pending {
            Pending::List { replies, .. } | Pending::Plain { replies } | Pending::Channels { replies } => {
                let reply = match answer {
                    Ok(_) => Reply::Done,
                    Err((reason, _)) => Reply::Refused { reason, detail: None },
                };
                let _ = replies.send(reply);
                Ok(())
            }
            Pending::Enrol { batch, index, replies } => {
                let same = |pending: &Pending| matches!(pending, Pending::Enrol { batch: other, .. } if Arc::ptr_eq(other, &batch));
                self.requests.open.retain(|_, pending| !same(pending));
                let reply = match answer {
                    Ok(_) => Reply::Done,
                    Err((reason, _)) => Reply::NotEnrolled { index: index.into(), reason },
                };
                let _ = replies.send(reply);
                Ok(())
            }
            Pending::Peer { name, replies } => {
                let reply = match entry().map_err(|reason| Rejected::For { reason, detail: None }).and_then(|entry| {
                    let mut peer = admit(&self.store, &entry, Some(&name))?;
                    let Some(signed) = &entry.bundle else {
                        let detail = format!("{name} has not published keys yet");
                        return Err(Rejected::For { reason: Reason::Unknown, detail: Some(detail) });
                    };
                    check_bundle(&mut peer, signed)?;
                    self.store.put_peer(&peer)?;
                    Ok(PeerKeys {
                        id: peer.id,
                        name: peer.name,
                        modulus: peer.modulus,
                        bundle: signed.bundle.to_vec(),
                        signature: signed.signature.to_vec(),
                    })
                }) {
                    Ok(keys) => Reply::Peer(keys),
                    Err(rejected) => {
                        let (reason, detail) = rejected.told(&mut self.alarm)?;
                        Reply::Refused { reason, detail }
                    }
                };
                let _ = replies.send(reply);
                Ok(())
            }
            Pending::Verify { name, accept, replies } => {
                // What came on the former chains is durable before they go.
                self.with_desk(link, |_, inbox, desk| inbox.commit(desk))?;
                let found = entry().map_err(|reason| Rejected::For { reason, detail: None });
                let reply = match found.and_then(|entry| verification(&mut self.store, &self.me, &entry, &name, accept))
                {
                    Ok((verified, replaced)) => {
                        if let (Some(former), Some(shown)) = (replaced, &verified.shown) {
                            self.inbox.forget(&former);
                            self.inbox.forget(&shown.id);
                            self.outbox.rekeyed(name.key(), &former);
                            self.alarm.settled();
                        }
                        Reply::Verified(verified)
                    }
                    Err(rejected) => {
                        let (reason, detail) = rejected.told(&mut self.alarm)?;
                        Reply::Refused { reason, detail }
                    }
                };
                let _ = replies.send(reply);
                Ok(())
            }
            Pending::Publish => match answer {
                Ok(_) => {
                    let store_epoch = link.settings().store_epoch;
                    self.store.published(&store_epoch)?;
                    self.profile.store_epoch = Some(store_epoch);
                    self.own.published = true;
                    Ok(())
                }
                Err((reason, _)) => {
                    tracing::warn!("the server does not take this client's new keys: {reason}");
                    Ok(())
                }
            },
            Pending::Recipient { key } => {
                let answer = entry();
                self.with_desk(link, |outbox, _, desk| outbox.found(desk, &key, answer))
            }
            Pending::Whereabouts { key } => {
                let answer = entry();
                self.with_desk(link, |outbox, _, desk| outbox.located(desk, &key, answer))
            }
            Pending::Recipients { sid, member } => {
                let answer = entry();
                self.with_desk(link, |outbox, _, desk| outbox.found_member(desk, (&sid, &member), answer))
            }
            Pending::Members { sid, member } => {
                let answer = entry();
                self.with_desk(link, |outbox, _, desk| outbox.located_member(desk, (&sid, &member), answer))
            }
            Pending::GroupWrap { chain, member } => {
                let answer = answer.map(|_| ());
                self.with_desk(link, |outbox, _, desk| outbox.wrapped_to(desk, (&chain, &member), answer))
            }
            Pending::Sender { id } => {
                let answer = entry();
                self.with_desk(link, |_, inbox, desk| inbox.found(desk, &id, answer))
            }
            Pending::Invitee { draft, name } => {
                let answer = entry();
                self.with_groups(link, |groups, _, desk| groups.invitee(desk, draft, &name, answer))
            }
            Pending::Acquaintance { id } => {
                let answer = entry();
                self.with_groups(link, |groups, inbox, desk| groups.located(desk, inbox, &id, answer))
            }
            Pending::Group { sid } => {
                let answer = answer.map(drop).map_err(|(reason, _)| reason);
                self.with_groups(link, |groups, inbox, desk| groups.answered(desk, inbox, &sid, answer))
            }
            Pending::Author { id } => {
                let answer = entry();
                self.with_public(link, |public, desk| public.located(desk, &id, answer))
            }
            Pending::Follow => {
                let reason = entry().err().unwrap_or(Reason::Malformed);
                self.with_public(link, |public, desk| public.refused(desk, reason))
            }
            Pending::Say { number } => {
                let answer = answer.map(drop);
                self.with_public(link, |public, desk| public.answered(desk, number, answer))
            }
            Pending::Rotate { replies } => match answer {
                Ok(_) => {
                    // Found by `succeed`, with whoever else waits for it.
                    self.asked.push_back((Request::Rotate, replies));
                    self.with_desk(link, |_, inbox, desk| inbox.commit(desk))?;
                    self.succeed()?;
                    self.kept.forget();
                    Err(Ended::Aged)
                }
                Err((reason, _)) => {
                    // These may pass, or nobody knows what was done; after any other the key will never be taken.
                    if !matches!(reason, Reason::Rate | Reason::Unavailable) {
                        self.successor = None;
                        self.store.drop_successor()?;
                        self.home.discard_next_key()?;
                    }
                    let _ = replies.send(Reply::Refused { reason, detail: None });
                    Ok(())
                }
            },
            // Refused: there is no such step.
            Pending::Successor { walk } => self.look_again(link, *walk),
            Pending::Watch { ask } => {
                if let Err((reason, _)) = answer {
                    self.watches.refused(&ask, reason);
                }
                Ok(())
            }
            Pending::Unwatch => Ok(()),
            Pending::Wrap { chain } => {
                let answer = answer.map(|_| ());
                self.with_desk(link, |outbox, _, desk| outbox.wrapped(desk, &chain, answer))
            }
        }
    }

    fn listed(&mut self, link: &mut Link, list: &ossicle_core::DirectoryList<'_>) -> Result<(), Ended> {
        let Some(Pending::List { mut lines, replies }) = self.requests.open.remove(&list.request()) else {
            return Ok(());
        };
        let before = lines.len();
        for line in list.lines().map_while(Result::ok) {
            let (online, last_seen) = match line.status {
                PeerStatus::Online => (true, None),
                PeerStatus::Offline { last_seen } => (false, last_seen),
            };
            lines.push(Presence { name: line.name.to_owned(), online, last_seen });
        }
        let last = lines.last().map(|line| line.name.clone());
        match last {
            // Nobody waits for it any more.
            _ if replies.is_closed() => {}
            _ if lines.len() > MAX_LISTED => {
                let endless = format!("the server lists more than {MAX_LISTED} clients: ask its operator");
                let _ = replies.send(Reply::Failed(Failure::refused(endless)));
            }
            // A page that brings nothing would be asked for without end.
            Some(last) if list.more() && lines.len() > before => {
                let request = self.requests.open(Pending::List { lines, replies });
                link.send(&Message::List { request, after: &last })?;
            }
            _ => drop(replies.send(Reply::Who(lines))),
        }
        Ok(())
    }
}

/// The bundle of this client that the directory holds, if there is one.
async fn newest_bundle(link: &mut Link, me: Member, key: Arc<IdentityKey>) -> Result<Option<Bundle>, Ended> {
    const REQUEST: u16 = 1;
    let subject = Subject::Id(me.id);
    link.send(&Message::Lookup(Lookup { request: REQUEST, key: false, bundle: true, subject }))?;
    loop {
        while let Some(incoming) = link.next()? {
            let Incoming::Message(payload) = incoming else {
                return Err(LinkError::Broken("the server closed the connection".into()).into());
            };
            match Message::decode(&payload) {
                Ok(Message::Status { request }) => link.send(&Message::StatusResponse { request })?,
                Ok(Message::LookupResponse { request: REQUEST, entry }) => {
                    let Some(signed) = entry.bundle else { return Ok(None) };
                    let bundle = Bundle::decode(signed.bundle).ok();
                    let own = bundle.filter(|bundle| {
                        bundle.member() == me && verify(key.modulus(), &bundle.statement(), signed.signature)
                    });
                    let forged = "the server's directory shows keys of this identity that it never signed: nothing \
                                  was sent; ask its operator";
                    return Ok(Some(own.ok_or_else(|| Failure::refused(forged))?));
                }
                Ok(Message::Refused { request: REQUEST, reason, .. }) => {
                    return Err(LinkError::Broken(format!("the directory refused an answer ({reason})")).into());
                }
                _ => {}
            }
        }
        link.io().await?;
    }
}

/// What the history of a conversation of two is kept under: the other's name, in one spelling; it may have been given with the
/// sign that tells it from a group.
fn of_person(name: &str) -> String {
    let name = name.strip_prefix('@').unwrap_or(name);
    Name::parse(name).map_or_else(|_| format!("@{name}"), |name| format!("@{}", name.key()))
}

/// And that of a group: its id.
fn of_group(sid: &[u8; 16]) -> String {
    hex::encode(sid)
}

pub(super) fn describe(error: &LinkError) -> String {
    match error {
        LinkError::Unreachable(what) | LinkError::Broken(what) | LinkError::Busy(what) | LinkError::Failed(what) => {
            what.clone()
        }
        LinkError::Refused { reason, .. } => format!("the server refused the connection: {reason}"),
        LinkError::OtherServer => "another server answers".to_owned(),
    }
}

/// Half of the pause for certain and half at random, so that many clients do not come back at once.
fn jitter(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or_default();
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}
