//! What commands ask of a home's agent, and the socket over which other processes ask the same.
//!
//! One JSON object a line, both ways. The holder greets with version, process id and command; then each line of the other
//! side is a request with a number, and each line of the holder an answer to the request of that number. The first answer
//! is `Taken`, written before anything is done: who sees the connection end before it can ask somebody else, who saw it
//! cannot know. The last one is final (`Reply::is_final`).

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use ossicle_core::{Reason, Rung};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, oneshot};

use super::agent::Handle;
use super::groups::GroupView;
use super::history::HistoryEntry;
use super::{Failure, Home};
use crate::store::home::LetterId;

const VERSION: u32 = 5;

/// What a command asks of the agent.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Accept or decline an invitation.
    Answer {
        /// What the group is called here.
        group: String,
        /// Whether to join it.
        accept: bool,
    },
    /// The channels that can be resumed.
    Channels,
    /// Close a group for everybody.
    CloseGroup {
        /// What it is called here.
        group: String,
    },
    /// Enrol these devices, all or none.
    Enrol(Vec<NewDevice>),
    /// End all channels, here and at the server.
    ExpireChannels,
    /// The secret that binds statements to the present connection.
    Exporter,
    /// Found a group.
    Found {
        /// Its name.
        name: String,
        /// The names of those who are invited.
        members: Vec<String>,
        /// Whether nobody else may close it.
        creator_closes: bool,
    },
    /// The groups that this client is in, was in, or is invited to.
    Groups,
    /// What was said in chats with somebody, or in a group.
    History {
        /// His name, or what the group is called here.
        with: String,
        /// So many of the latest.
        limit: u32,
        /// Erase all of it instead.
        erase: bool,
    },
    /// Give the reader what is said to everybody, from where it left off.
    Follow,
    /// The keys of this client, pinned now if this is the first contact.
    Peer {
        /// Its name.
        name: String,
    },
    /// Revoke a client.
    Revoke {
        /// Its name.
        name: String,
    },
    /// Replace this client's identity key by the one that [`super::prepare_rotation`] made.
    Rotate,
    /// Say something to everybody: signed, and readable for every member of the network.
    Say {
        /// What.
        #[serde(with = "base64_text")]
        body: Vec<u8>,
        /// Whether it is kept in the history, too.
        keep: bool,
    },
    /// Send a message to one client or to a group. It does no harm to ask again with the same `letter`: it is sent once.
    Send {
        /// The asker's name for it, at random.
        letter: LetterId,
        /// The recipient's name, or what a group is called here. With an `@` before it, a client's name in any case.
        to: String,
        /// The text, or data.
        #[serde(with = "base64_text")]
        body: Vec<u8>,
        /// Whether it carries this client's signature; in a group it always does.
        signed: bool,
        /// The rung with which it is done.
        until: Rung,
        /// Whether it is kept in the history, too.
        #[serde(default)]
        keep: bool,
    },
    /// Who this client is, and how it stands with its server.
    Status,
    /// The safety number with a peer, and whether its key is the pinned one.
    Verify {
        /// Its name.
        name: String,
        /// Pin the key that the directory shows, if it is another one.
        accept: bool,
    },
    /// Those whom a pattern selects, as soon as there is something new about them.
    Watch {
        /// The pattern.
        pattern: String,
        /// What [`Reply::Watched`] said last; 0 at first.
        epoch: u64,
        /// As `epoch`.
        version: u64,
    },
    /// Everybody on the server.
    Who,
    /// Whoever waits for something new is to ask the next holder of the home.
    Yield,
}

/// What the agent answers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The message waits at the server for its recipient, who is not there.
    Away {
        /// When he was last seen, in seconds since 1970.
        last_seen: Option<u64>,
    },
    /// The message waits at the server for this member of the group, who is not there.
    AwayBy {
        /// His name.
        name: String,
        /// When he was last seen, in seconds since 1970.
        last_seen: Option<u64>,
        /// Whether everybody else has it, has refused it, or is not there either.
        last: bool,
    },
    /// How far a message to a group came with one of its members.
    By {
        /// His name.
        name: String,
        /// The rung.
        rung: Rung,
    },
    /// The channels that the server would resume.
    Channels(Vec<HeldChannel>),
    /// It was done.
    Done,
    /// The exporter.
    Exporter([u8; 32]),
    /// It failed.
    Failed(Failure),
    /// The group that was founded or accepted.
    Group(GroupView),
    /// The groups, the oldest first.
    Groups(Vec<GroupView>),
    /// What was said, in its order.
    History(Vec<HistoryEntry>),
    /// The holder of the home has gone without a final answer.
    Gone {
        /// Whether it had begun.
        taken: bool,
    },
    /// The message is in the home's outbox: it is sent, by this process or another, until it is settled.
    Kept,
    /// None of the devices was enrolled.
    NotEnrolled {
        /// The first that was refused, counted from 0.
        index: usize,
        /// Why.
        reason: Reason,
    },
    /// The keys that were asked for.
    Peer(PeerKeys),
    /// It was refused.
    Refused {
        /// Why.
        reason: Reason,
        /// More about it, for a person.
        detail: Option<String>,
    },
    /// A message to a group was refused by one of its members, or for him.
    RefusedBy {
        /// His name.
        name: String,
        /// Why.
        reason: Reason,
        /// More about it, for a person.
        detail: Option<String>,
    },
    /// The identity key was replaced.
    Rotated {
        /// The fingerprint of the key that was replaced.
        former: [u8; 32],
        /// The fingerprint of the key that followed.
        fingerprint: [u8; 32],
    },
    /// How far a message came.
    Rung {
        /// The rung.
        rung: Rung,
        /// The message's id: chain and number; `None` if it came to its end before this was asked.
        id: Option<String>,
    },
    /// Who this client is, and how it stands with its server.
    Status(Status),
    /// The request will be worked on, here and nowhere else.
    Taken,
    /// It takes longer, and why; not final.
    Trouble(String),
    /// The connection ended before there was an answer: it was done or not. It does no harm to ask again.
    Unanswered,
    /// What two people compare.
    Verified(Verification),
    /// What is new about those who are watched.
    Watched {
        /// To be given with the next question.
        epoch: u64,
        /// As `epoch`.
        version: u64,
        /// These are all, and not only who is new or different: whoever is not named is gone.
        whole: bool,
        /// What holds now, in the order in which it was learned.
        lines: Vec<Seen>,
    },
    /// Everybody, by name.
    Who(Vec<Presence>),
    /// The holder of the home makes room for another one: ask that one.
    Yield,
}

impl Reply {
    /// Whether nothing follows.
    pub const fn is_final(&self) -> bool {
        !matches!(
            self,
            Self::Away { .. }
                | Self::AwayBy { .. }
                | Self::By { .. }
                | Self::Kept
                | Self::RefusedBy { .. }
                | Self::Rung { .. }
                | Self::Taken
                | Self::Trouble(_)
        )
    }
}

/// A device to be enrolled.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDevice {
    /// Its id.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// The modulus of its key.
    #[serde(with = "base64_text")]
    pub modulus: Vec<u8>,
    /// Its key's signature over the enrolment statement of the present connection.
    #[serde(with = "base64_text")]
    pub signature: Vec<u8>,
}

/// A channel that the server would resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldChannel {
    /// Its id.
    pub id: [u8; 16],
    /// Seconds for which it can still be resumed.
    pub valid_for: u32,
    /// Whether this home has it, too.
    pub kept: bool,
}

/// The public keys of a client.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerKeys {
    /// Its id.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// The modulus of its identity key.
    #[serde(with = "base64_text")]
    pub modulus: Vec<u8>,
    /// Its bundle.
    #[serde(with = "base64_text")]
    pub bundle: Vec<u8>,
    /// The identity key's signature over the bundle, verified.
    #[serde(with = "base64_text")]
    pub signature: Vec<u8>,
}

/// A client, and its connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: [u8; 16],
    /// The fingerprint of its identity key.
    pub key: [u8; 32],
    /// The server's address.
    pub server: String,
    /// Since when there is a connection, in seconds since 1970.
    pub connected: Option<u64>,
    /// Whether that one resumed a channel, without a signature.
    pub resumed: bool,
    /// Why there is none.
    pub trouble: Option<String>,
    /// Messages that wait for their reader.
    pub waiting: u64,
    /// Messages of this home that are not delivered yet.
    #[serde(default)]
    pub letters: u64,
    /// When its end-to-end keys were made, in seconds since 1970.
    #[serde(default)]
    pub keys_made: u64,
    /// When the full handshake was that the kept channel comes from, if one is kept.
    #[serde(default)]
    pub full_handshake: Option<u64>,
}

/// What is pinned of a peer, and what the directory shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// Its name.
    pub name: String,
    /// The key that was pinned when this was asked, or by the asking if the peer was met for the first time.
    pub pinned: PinnedKey,
    /// The key that the directory shows instead, if it is another one.
    pub shown: Option<PinnedKey>,
    /// Whether `shown` is pinned from now on.
    pub accepted: bool,
}

/// An identity key of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedKey {
    /// The id that it belongs to.
    pub id: [u8; 16],
    /// Its fingerprint.
    pub fingerprint: [u8; 32],
    /// The safety number of this client and that key: twelve groups of five digits, a space between them.
    pub safety_number: String,
}

/// Whether somebody is there.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// The name.
    pub name: String,
    /// Whether it is listening.
    pub online: bool,
    /// When it was last seen, in seconds since 1970.
    pub last_seen: Option<u64>,
}

/// A client that is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its id.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// Whether it is listening.
    pub online: bool,
    /// When it was last seen, in seconds since 1970, if it is not online.
    pub last_seen: Option<u64>,
    /// Whether it is no client any more.
    pub revoked: bool,
}

/// The answers to one request.
pub struct Requested(pub(super) mpsc::UnboundedReceiver<Reply>);

impl Requested {
    /// The answers of nobody.
    pub fn gone() -> Self {
        let (replies, requested) = mpsc::unbounded_channel();
        let _ = replies.send(Reply::Gone { taken: false });
        Self(requested)
    }

    /// Waits for the final answer.
    pub(super) async fn done(mut self) {
        while !self.next().await.is_final() {}
    }

    /// The next answer. Cancel-safe.
    pub async fn next(&mut self) -> Reply {
        // An agent answers everything before it ends, so an end without an answer is that of another process.
        self.0.recv().await.unwrap_or(Reply::Gone { taken: true })
    }
}

#[derive(Serialize, Deserialize)]
struct Greeting {
    ossicle: u32,
    pid: u32,
    command: String,
}

#[derive(Serialize, Deserialize)]
struct Question {
    number: u64,
    request: Request,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    number: u64,
    reply: Reply,
}

/// What a holder writes, and what happens once it is written.
struct Outgoing {
    answer: Answer,
    inside: Option<Inside>,
    written: Option<oneshot::Sender<()>>,
}

/// Counts what others asked and still wait for, and lets nobody in any more once it is shut.
#[derive(Default)]
struct Gate {
    shut: AtomicBool,
    inside: AtomicUsize,
    left: Notify,
}

impl Gate {
    fn enter(self: &Arc<Self>) -> Option<Inside> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Inside(Arc::clone(self));
        if self.shut.load(Ordering::SeqCst) { None } else { Some(inside) }
    }
}

struct Inside(Arc<Gate>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
        self.0.left.notify_waiters();
    }
}

/// The holder's side of the socket.
pub(super) struct LocalServer {
    gate: Arc<Gate>,
    accepting: tokio::task::JoinHandle<()>,
    home: Home,
}

impl LocalServer {
    /// Begins to answer others. The caller holds the home's lock, so a socket that is there is a dead one.
    pub(super) fn start(home: &Home, command: &str, handle: Handle) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::refused(format!("cannot make a socket in {}: {error}", home.directory().display()))
        };
        let (path, _open) = home.socket().map_err(failed)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let gate = Arc::new(Gate::default());
        let greeting = Greeting { ossicle: VERSION, pid: std::process::id(), command: command.to_owned() };
        let accepting = tokio::spawn(accept(listener, Arc::new(greeting), handle, Arc::clone(&gate)));
        Ok(Self { gate, accepting, home: home.clone() })
    }

    /// Lets nobody in any more.
    pub(super) fn shut(&self) {
        self.gate.shut.store(true, Ordering::SeqCst);
        self.accepting.abort();
    }

    /// Lets nobody in any more and waits until everybody has his answer.
    pub(super) async fn finish(self) {
        self.shut();
        loop {
            let left = self.gate.left.notified();
            if self.gate.inside.load(Ordering::SeqCst) == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        self.accepting.abort();
        if let Ok((path, _open)) = self.home.socket() {
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn accept(listener: UnixListener, greeting: Arc<Greeting>, handle: Handle, gate: Arc<Gate>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (greeting, handle, gate) = (Arc::clone(&greeting), handle.clone(), Arc::clone(&gate));
                tokio::spawn(async move {
                    // Whoever breaks off has got his answer or does not want it.
                    let _ = serve(stream, &greeting, &handle, &gate).await;
                });
            }
            // Out of file descriptors, most likely: the next one may have better luck.
            Err(_) => tokio::time::sleep(core::time::Duration::from_millis(200)).await,
        }
    }
}

async fn serve(stream: UnixStream, greeting: &Greeting, handle: &Handle, gate: &Arc<Gate>) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    write_line(&mut writer, greeting).await?;
    let (answers, mut outgoing) = mpsc::unbounded_channel::<Outgoing>();
    let writing = tokio::spawn(async move {
        while let Some(Outgoing { answer, inside, written }) = outgoing.recv().await {
            write_line(&mut writer, &answer).await?;
            // Neither has anybody to tell if it fails.
            let _ = written.map(|written| written.send(()));
            drop(inside);
        }
        Ok::<_, std::io::Error>(())
    });
    let mut lines = BufReader::new(reader).lines();
    loop {
        let question = lines.next_line().await.ok().flatten();
        let Some(Question { number, request }) = question.and_then(|line| serde_json::from_str(&line).ok()) else {
            // The other side has gone: nobody waits for what is still open.
            writing.abort();
            return Ok(());
        };
        let Some(inside) = gate.enter() else {
            break;
        };
        // Written before the agent hears of it: see the head of this file.
        let (written, taken) = oneshot::channel();
        let answer = Answer { number, reply: Reply::Taken };
        if answers.send(Outgoing { answer, inside: None, written: Some(written) }).is_err() || taken.await.is_err() {
            break;
        }
        let mut requested = handle.request(request);
        let answers = answers.clone();
        tokio::spawn(async move {
            let mut inside = Some(inside);
            loop {
                let reply = tokio::select! {
                    reply = requested.next() => reply,
                    // Nobody to answer: the agent need not go on.
                    () = answers.closed() => return,
                };
                let last = reply.is_final();
                let pass = if last { inside.take() } else { None };
                let outgoing = Outgoing { answer: Answer { number, reply }, inside: pass, written: None };
                if answers.send(outgoing).is_err() || last {
                    return;
                }
            }
        });
    }
    drop(answers);
    writing.await.unwrap_or(Ok(()))
}

/// The other side: a connection to whoever holds the home.
pub(super) struct Follower {
    pub(super) pid: u32,
    pub(super) command: String,
    questions: mpsc::UnboundedSender<(Request, mpsc::UnboundedSender<Reply>)>,
}

impl Follower {
    /// Connects to the holder; `None` if nobody answers there.
    pub(super) async fn connect(home: &Home) -> Option<Self> {
        let (path, _open) = home.socket().ok()?;
        let stream = UnixStream::connect(&path).await.ok()?;
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        let read = reader.read_line(&mut line);
        tokio::time::timeout(core::time::Duration::from_secs(5), read).await.ok()?.ok()?;
        let greeting: Greeting =
            serde_json::from_str(&line).ok().filter(|greeting: &Greeting| greeting.ossicle == VERSION)?;
        let (questions, incoming) = mpsc::unbounded_channel();
        tokio::spawn(follow(reader, writer, incoming));
        Some(Self { pid: greeting.pid, command: greeting.command, questions })
    }

    pub(super) fn request(&self, request: Request) -> Requested {
        let (replies, requested) = mpsc::unbounded_channel();
        if let Err(unsent) = self.questions.send((request, replies)) {
            let _ = unsent.0.1.send(Reply::Gone { taken: false });
        }
        Requested(requested)
    }
}

async fn follow(
    reader: BufReader<OwnedReadHalf>,
    mut writer: OwnedWriteHalf,
    mut questions: mpsc::UnboundedReceiver<(Request, mpsc::UnboundedSender<Reply>)>,
) {
    let mut open = std::collections::HashMap::new();
    let mut lines = reader.lines();
    let mut number = 0;
    loop {
        tokio::select! {
            line = lines.next_line() => {
                let answer = line.ok().flatten().and_then(|line| serde_json::from_str::<Answer>(&line).ok());
                let Some(Answer { number, reply }) = answer else {
                    break;
                };
                let last = reply.is_final();
                if let Some((replies, taken)) = open.get_mut(&number) {
                    *taken |= matches!(reply, Reply::Taken);
                    let replies: &mpsc::UnboundedSender<Reply> = replies;
                    let _ = replies.send(reply);
                }
                if last {
                    open.remove(&number);
                }
            }
            question = questions.recv() => {
                let Some((request, replies)) = question else {
                    return;
                };
                number += 1;
                open.insert(number, (replies, false));
                if write_line(&mut writer, &Question { number, request }).await.is_err() {
                    // What was answered before the end can still be read.
                    continue;
                }
            }
        }
    }
    for (replies, taken) in open.into_values() {
        let _ = replies.send(Reply::Gone { taken });
    }
    questions.close();
    while let Some((_, replies)) = questions.recv().await {
        let _ = replies.send(Reply::Gone { taken: false });
    }
}

async fn write_line(writer: &mut OwnedWriteHalf, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

mod base64_text {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
