//! How a command gets at its home: as the holder of the lock, with an agent of its own, or through whoever holds it.
//!
//! Nobody takes a home over: who finds the lock taken asks the holder through the socket, and takes the lock himself once
//! the holder has gone. A reader (`listen`, `chat`) must be the holder; a second one is refused by name.

use core::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::agent::{self, Handle, Notice};
use super::local::{Follower, LocalServer, Request, Requested};
use super::{Failure, Home, HomeLock, PublicPost};
use crate::store::home::Waiting;

const AGAIN: Duration = Duration::from_millis(50);
/// How long a holder may take to open its socket, or to leave.
const SILENT_HOLDER: Duration = Duration::from_secs(15);
/// How long those who were let in may take to get their answers.
const FINISH: Duration = Duration::from_secs(60);
/// For so long nobody is told that he waits for another command.
const SHORT: Duration = Duration::from_secs(2);
/// Commands that make room for a reader: they wait for others, and can do so through him.
const YIELDING: [&str; 1] = [WATCHER];
/// The command that watches others.
pub(crate) const WATCHER: &str = "who --watch";
/// Commands that read messages: of these one at a time.
const READERS: [&str; 2] = ["listen", "chat"];

/// A way to a home's agent.
pub struct Access(Inner);

enum Inner {
    /// This process is the holder. Field by field in the order in which they must go: the socket before the lock.
    Holder {
        local: LocalServer,
        handle: Handle,
        notices: mpsc::UnboundedReceiver<Notice>,
        _lock: HomeLock,
    },
    Follower(Follower),
}

impl Access {
    /// Gets at the home for a command that asks something, through another process if one holds it.
    ///
    /// # Errors
    /// [`Failure`] if there is no identity, or the holder does not answer.
    pub async fn open(home: &Home, command: &str) -> Result<Self, Failure> {
        home.check()?;
        let begun = Instant::now();
        loop {
            if let Some(lock) = home.try_lock(command)? {
                return Self::hold(home, command, lock, false);
            }
            if let Some(follower) = Follower::connect(home).await {
                return Ok(Self(Inner::Follower(follower)));
            }
            if begun.elapsed() > SILENT_HOLDER {
                return Err(silent(home));
            }
            sleep(AGAIN).await;
        }
    }

    /// Gets at the home for a command that reads messages; waits for the end of a command that only asks something.
    ///
    /// # Errors
    /// [`Failure`] if there is no identity, or another process reads already.
    pub async fn open_reader(home: &Home, command: &str) -> Result<Self, Failure> {
        home.check()?;
        let (begun, mut told) = (Instant::now(), false);
        loop {
            if let Some(lock) = home.try_lock(command)? {
                return Self::hold(home, command, lock, true);
            }
            if let Some((pid, holder)) = home.holder() {
                if READERS.contains(&holder.as_str()) {
                    return Err(Failure::refused(format!(
                        "another `ossicle {holder}` (pid {pid}) already listens with this home: end it first, \
                         or use another home"
                    )));
                }
                if YIELDING.contains(&holder.as_str())
                    && let Some(follower) = Follower::connect(home).await
                {
                    let _ = timeout(SHORT, follower.request(Request::Yield).done()).await;
                }
                if !told && begun.elapsed() > SHORT {
                    tracing::warn!("waiting for `ossicle {holder}` (pid {pid}), which uses this home, to end");
                    told = true;
                }
            }
            sleep(AGAIN).await;
        }
    }

    fn hold(home: &Home, command: &str, lock: HomeLock, listening: bool) -> Result<Self, Failure> {
        let opened = home.open(&lock)?;
        let (handle, notices) = agent::start(opened, listening)?;
        let local = LocalServer::start(home, command, handle.clone())?;
        Ok(Self(Inner::Holder { local, handle, notices, _lock: lock }))
    }

    /// Asks something. The answers come in the order in which they are made; several requests may be open.
    pub fn request(&self, request: Request) -> Requested {
        match &self.0 {
            Inner::Holder { handle, .. } => handle.request(request),
            Inner::Follower(follower) => follower.request(request),
        }
    }

    /// Who does the work, if it is another process: its id and command.
    pub fn holder(&self) -> Option<(u32, &str)> {
        match &self.0 {
            Inner::Holder { .. } => None,
            Inner::Follower(follower) => Some((follower.pid, &follower.command)),
        }
    }

    /// What the agent has to say, for a reader. Cancel-safe.
    pub async fn notice(&mut self) -> Notice {
        match &mut self.0 {
            Inner::Holder { notices, .. } => {
                let ended = || Notice::Ended(Failure::refused("the connection has ended"));
                notices.recv().await.unwrap_or_else(ended)
            }
            Inner::Follower(_) => core::future::pending().await,
        }
    }

    /// Messages behind row `after` that wait for their reader, at most `limit`.
    ///
    /// # Errors
    /// [`Failure`] if the home's state cannot be read, or this process does not hold it.
    pub async fn waiting(&self, after: i64, limit: u32) -> Result<Vec<Waiting>, Failure> {
        match &self.0 {
            Inner::Holder { handle, .. } => handle.waiting(after, limit).await,
            Inner::Follower(_) => Err(not_the_reader()),
        }
    }

    /// The reader has this message: it is marked, its text erased, its sender told. With `keep` it is in the history then.
    ///
    /// # Errors
    /// As [`Access::waiting`].
    pub async fn read(&self, message: &Waiting, keep: bool) -> Result<(), Failure> {
        match &self.0 {
            Inner::Holder { handle, .. } => handle.read(message, keep).await,
            Inner::Follower(_) => Err(not_the_reader()),
        }
    }

    /// The reader has shown this post: it is not given again. With `keep` it is in the history then.
    ///
    /// # Errors
    /// As [`Access::waiting`].
    pub async fn read_post(&self, post: PublicPost, keep: bool) -> Result<(), Failure> {
        match &self.0 {
            Inner::Holder { handle, .. } => handle.read_post(post, keep).await,
            Inner::Follower(_) => Err(not_the_reader()),
        }
    }

    /// Leaves: a holder first finishes what others asked of it, and says its last word to the server.
    pub async fn close(self) {
        if let Inner::Holder { local, handle, notices, _lock } = self.0 {
            // Whoever watches would never have his last answer.
            local.shut();
            handle.request(Request::Yield).done().await;
            // Who waits longer than this has a deadline of his own behind him.
            let _ = timeout(FINISH, local.finish()).await;
            handle.stop().await;
            drop(notices);
        }
    }
}

fn silent(home: &Home) -> Failure {
    match home.holder() {
        Some((pid, command)) => Failure::refused(format!(
            "`ossicle {command}` (pid {pid}) holds the home {} but does not answer: end it and try again",
            home.directory().display()
        )),
        None => Failure::refused(format!(
            "another process holds the home {} but does not answer: end it and try again",
            home.directory().display()
        )),
    }
}

fn not_the_reader() -> Failure {
    Failure::refused("another process reads this home's messages")
}
