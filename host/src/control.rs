//! The operator's door: a socket in the data directory, open to the operator alone while a server runs there.
//!
//! One JSON object a line, one line of answer: `{"revoke":"NAME"}` gets `{"done":true}` or `{"error":"SENTENCE"}`. While
//! no server runs, the same commands work on the store itself. Who can open the socket (mode 0600, in a directory of mode
//! 0700) may do everything: there is no other check.

use core::time::Duration;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use ossicle_core::Reason;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::mailbox::refuse_waiting;
use crate::name::Name;
use crate::server::{Server, now};
use crate::store::{ChannelId, ClientId, ClientRecord, SharedStore, SqliteStore, StoreError};

const MAX_LINE: u64 = 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Command {
    /// List channels: those of this client, or a page of everybody's.
    Channels {
        /// Whose.
        name: Option<String>,
        /// Only clients behind this name.
        after: Option<String>,
    },
    /// End the channels of this client, or of a page of everybody.
    ExpireChannels {
        /// Whose.
        name: Option<String>,
        /// Only clients behind this name.
        after: Option<String>,
    },
    /// End the client with this name for good.
    Revoke(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Channels(Page<Vec<ChannelLine>>),
    Expired(Page<u64>),
    Done(bool),
    Error(String),
}

/// A part of an answer that goes over all clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Page<T> {
    part: T,
    /// The last name of this page, where there are further ones.
    more: Option<String>,
}

/// A channel that its client could resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelLine {
    /// Whose.
    pub name: String,
    /// Its id.
    pub id: ChannelId,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
}

/// Clients of one page: their channels fit into one line.
const PAGE: usize = 8;

/// Who answers: the server that runs, or the store of one that does not.
#[async_trait::async_trait]
trait Channels: Sync {
    fn store(&self) -> &SharedStore;
    async fn of(&self, client: &ClientId) -> Result<Vec<(ChannelId, u64)>, StoreError>;
    async fn end(&self, client: &ClientId) -> Result<u64, StoreError>;
}

#[async_trait::async_trait]
impl Channels for Server {
    fn store(&self) -> &SharedStore {
        &self.store
    }

    async fn of(&self, client: &ClientId) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        self.channels_of(client).await
    }

    async fn end(&self, client: &ClientId) -> Result<u64, StoreError> {
        self.expire_channels(client).await
    }
}

#[async_trait::async_trait]
impl Channels for SharedStore {
    fn store(&self) -> &SharedStore {
        self
    }

    async fn of(&self, client: &ClientId) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        self.channels(client, now()).await
    }

    async fn end(&self, client: &ClientId) -> Result<u64, StoreError> {
        self.drop_channels(client).await
    }
}

/// The client of this name, or those behind `after`, and where the next page begins.
async fn clients(
    store: &SharedStore,
    name: Option<&str>,
    after: Option<&str>,
) -> anyhow::Result<(Vec<ClientRecord>, Option<String>)> {
    if let Some(name) = name {
        let client = store.client_by_name(&Name::parse(name)?).await?;
        let client = client.ok_or_else(|| anyhow!("there is no client named {name} here"))?;
        return Ok((vec![client], None));
    }
    let after = after.map(Name::parse).transpose()?;
    let clients = store.clients(after.as_ref(), PAGE).await?;
    let more = clients.last().filter(|_| clients.len() == PAGE).map(|last| last.name.clone());
    Ok((clients, more))
}

async fn list(at: &impl Channels, name: Option<&str>, after: Option<&str>) -> anyhow::Result<Page<Vec<ChannelLine>>> {
    let (clients, more) = clients(at.store(), name, after).await?;
    let mut part = Vec::new();
    for client in clients {
        let held = at.of(&client.id).await?;
        part.extend(held.into_iter().map(|(id, expires)| ChannelLine { name: client.name.clone(), id, expires }));
    }
    Ok(Page { part, more })
}

async fn expire(at: &impl Channels, name: Option<&str>, after: Option<&str>) -> anyhow::Result<Page<u64>> {
    let (clients, more) = clients(at.store(), name, after).await?;
    let mut part = 0;
    for client in clients {
        part += at.end(&client.id).await?;
    }
    Ok(Page { part, more })
}

/// The channels of this client, or of everybody: at the server that runs on `data`, or in the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn channels(data: &Path, name: Option<&str>) -> anyhow::Result<Vec<ChannelLine>> {
    let door = Door::open(data).await?;
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = match &door {
            Door::Store(store) => list(store, name, after.as_deref()).await?,
            Door::Server(data) => match ask(data, &Command::Channels { name: name.map(str::to_owned), after }).await? {
                Answer::Channels(page) => page,
                _ => bail!("the server's answer is of another version"),
            },
        };
        all.extend(page.part);
        match page.more {
            Some(more) => after = Some(more),
            None => return Ok(all),
        }
    }
}

/// Ends the channels of this client, or of everybody, and returns how many there were.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn expire_channels(data: &Path, name: Option<&str>) -> anyhow::Result<u64> {
    let door = Door::open(data).await?;
    let (mut all, mut after) = (0, None);
    loop {
        let page = match &door {
            Door::Store(store) => expire(store, name, after.as_deref()).await?,
            Door::Server(data) => {
                match ask(data, &Command::ExpireChannels { name: name.map(str::to_owned), after }).await? {
                    Answer::Expired(page) => page,
                    _ => bail!("the server's answer is of another version"),
                }
            }
        };
        all += page.part;
        match page.more {
            Some(more) => after = Some(more),
            None => return Ok(all),
        }
    }
}

fn path(data: &Path) -> PathBuf {
    data.join("control")
}

/// Opens the operator's socket in `data`, whose lock the caller holds: a socket that is there is a dead server's.
///
/// # Errors
/// Those of the system.
pub fn bind(data: &Path) -> io::Result<UnixListener> {
    let path = path(data);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes the socket away when the server stops. One that stays is in the way of nobody.
pub(crate) fn remove(data: &Path) {
    let _ = fs::remove_file(path(data));
}

/// Does what operators ask for on `listener`. Never returns; drop it to stop.
pub async fn serve(listener: UnixListener, server: Arc<Server>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = Arc::clone(&server);
                tokio::spawn(async move {
                    if let Err(error) = attend(stream, &server).await {
                        warn!(%error, "a command of the operator was broken off");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "the operator's socket takes no connections");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn attend(stream: UnixStream, server: &Server) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(MAX_LINE)).lines();
    while let Some(line) = timeout(PATIENCE, lines.next_line()).await?? {
        let answer = match serde_json::from_str(&line) {
            Ok(Command::Channels { name, after }) => match list(server, name.as_deref(), after.as_deref()).await {
                Ok(page) => Answer::Channels(page),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::ExpireChannels { name, after }) => {
                match expire(server, name.as_deref(), after.as_deref()).await {
                    Ok(page) => Answer::Expired(page),
                    Err(error) => Answer::Error(format!("{error:#}")),
                }
            }
            Ok(Command::Revoke(name)) => match revoke_here(server, &name).await {
                Ok(()) => Answer::Done(true),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Err(_) => Answer::Error("this server does not know that command: is it another version?".into()),
        };
        let mut line = serde_json::to_string(&answer)?;
        line.push('\n');
        timeout(PATIENCE, write.write_all(line.as_bytes())).await??;
    }
    Ok(())
}

async fn revoke_here(server: &Server, name: &str) -> anyhow::Result<()> {
    let id = find(&server.store, name).await?;
    server.revoke(&id).await?;
    info!(name, "revoked by the operator");
    Ok(())
}

async fn find(store: &SharedStore, name: &str) -> anyhow::Result<ClientId> {
    let client = store.client_by_name(&Name::parse(name)?).await?;
    client.map(|client| client.id).ok_or_else(|| anyhow!("there is no client named {name} here"))
}

/// Ends the client with this name for good: through the server that runs on `data`, or on the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn revoke(data: &Path, name: &str) -> anyhow::Result<()> {
    match Door::open(data).await? {
        Door::Server(data) => ask(&data, &Command::Revoke(name.to_owned())).await.map(|_| ()),
        Door::Store(store) => {
            let id = find(&store, name).await?;
            let at = now();
            store.revoke(&id, at, refuse_waiting(Reason::Unknown, at)).await?;
            Ok(())
        }
    }
}

/// Where an operator's command is done.
enum Door {
    /// By the server that runs on this directory.
    Server(PathBuf),
    /// On the store, since none does.
    Store(SharedStore),
}

impl Door {
    async fn open(data: &Path) -> anyhow::Result<Self> {
        match UnixStream::connect(path(data)).await {
            Ok(_) => Ok(Self::Server(data.to_owned())),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(Self::Store(Arc::new(open(data).await?)))
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot reach the server that runs on {}", data.display()))
            }
        }
    }
}

/// One command, one answer, over a connection of its own. An error of the server's is one here.
async fn ask(data: &Path, command: &Command) -> anyhow::Result<Answer> {
    let stream = UnixStream::connect(path(data)).await;
    let stream = stream.with_context(|| format!("cannot reach the server that runs on {}", data.display()))?;
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_string(command)?;
    line.push('\n');
    let mut lines = BufReader::new(read.take(MAX_LINE)).lines();
    let answered = timeout(PATIENCE, async {
        write.write_all(line.as_bytes()).await?;
        lines.next_line().await
    });
    let answer =
        answered.await.context("the server does not answer")??.context("the server ended without an answer")?;
    match serde_json::from_str(&answer).context("the server's answer is of another version")? {
        Answer::Error(sentence) => bail!(sentence),
        answer => Ok(answer),
    }
}

/// The store of a server that does not run. Makes none: an operator who mistypes a directory should learn it.
async fn open(data: &Path) -> anyhow::Result<SqliteStore> {
    if !data.join("store.db").exists() {
        bail!("{} holds no server's data: give its directory with --data", data.display());
    }
    let data = data.to_owned();
    Ok(tokio::task::spawn_blocking(move || SqliteStore::open(&data)).await??)
}
