//! The operator's door: a socket in the data directory, open to the operator alone while a server runs there.
//!
//! One JSON object a line, one line of answer: `{"revoke":"NAME"}` gets `{"done":true}` or `{"error":"SENTENCE"}`. While
//! no server runs, the same commands work on the store itself. Who can open the socket (mode 0600, in a directory of mode
//! 0700) may do everything: there is no other check.

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};
use ossicle_core::Reason;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::clock::system_date;
use crate::directory::groups::announce;
use crate::mailbox::refuse_waiting;
use crate::name::Name;
use crate::server::{Policy, Server};
use crate::settings::{Effective, Mistakes, Settings};
use crate::store::{ChannelId, ClientId, ClientRecord, SharedStore, SqliteStore, StoreError, TokenId};

mod account;
mod token;

pub use account::{AccountAction, AccountLine, account, accounts};
pub(crate) use token::{Fresh, dialled, url};
pub use token::{Issued, TokenLine, Wanted, end_token, new_token, tokens};

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
    /// Make or change an account.
    Account {
        /// Its name.
        name: String,
        /// What to do.
        action: AccountAction,
    },
    /// List a page of the accounts.
    Accounts {
        /// Only those behind this name.
        after: Option<String>,
    },
    /// Make a token.
    NewToken(Wanted),
    /// List a page of the tokens that admit somebody.
    Tokens {
        /// Only those behind this id.
        after: Option<TokenId>,
    },
    /// End this token.
    EndToken(TokenId),
    /// Change these settings, and tell them all.
    Settings(BTreeMap<String, String>),
    /// Tell how the server is.
    Status,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Accounts(Page<Vec<AccountLine>>),
    Channels(Page<Vec<ChannelLine>>),
    Expired(Page<u64>),
    Done(bool),
    Error(String),
    /// What is wrong with changes, of which none was made.
    Mistakes(Vec<String>),
    Issued(Issued),
    Settings(Effective),
    Status(Box<ServerStatus>),
    Tokens(Page<Vec<TokenLine>, TokenId>),
}

/// How a server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// What runs.
    pub version: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it serves metrics.
    pub metrics: Option<SocketAddr>,
    /// The fingerprint of its key.
    pub fingerprint: [u8; 32],
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// What time it is there.
    pub now: u64,
    /// Who may enrol: `open`, `token` or `closed`.
    pub enroll: String,
    /// Whether it takes connections.
    pub listening: bool,
    /// Connected clients.
    pub connected: u64,
    /// Those of them that take messages.
    pub online: u64,
    /// Full handshakes, resumptions and refusals since it was started.
    pub handshakes: [u64; 3],
    /// Handshakes and records that came too fast since then.
    pub hasty: [u64; 2],
    /// Messages, wraps and receipts that wait in the store.
    pub waiting: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Clients that they wait for.
    pub waiting_clients: u64,
    /// Bytes of the store's files.
    pub store_bytes: u64,
    /// Why the store does not write.
    pub refusing: Option<String>,
}

/// A server that runs, as its operator sees it.
pub struct Operated {
    server: Arc<Server>,
    settings: Mutex<Settings>,
    address: SocketAddr,
    metrics: Option<SocketAddr>,
}

impl Operated {
    /// This server, which was started with `settings`, listens at `address` and serves metrics at `metrics`.
    pub fn new(server: Arc<Server>, settings: Settings, address: SocketAddr, metrics: Option<SocketAddr>) -> Self {
        Self { server, settings: Mutex::new(settings), address, metrics }
    }

    async fn status(&self) -> ServerStatus {
        let server = &self.server;
        let (connected, online) = server.router.present();
        let counted = server.metrics();
        // What it refused last may be over.
        let probed = timeout(PATIENCE / 2, server.store.probe()).await;
        let store = server.store.health();
        let refusing = match probed {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the store does not answer".to_owned()),
        };
        ServerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: self.address,
            metrics: self.metrics,
            fingerprint: server.fingerprint(),
            started: server.started(),
            now: server.now(),
            enroll: policy(server.config().enrol).to_owned(),
            listening: server.is_listening(),
            connected,
            online,
            handshakes: [counted.full.total(), counted.resumed.total(), counted.handshakes_refused.total()],
            hasty: [counted.hasty_handshakes.total(), counted.hasty_records.total()],
            waiting: store.waiting,
            waiting_bytes: store.waiting_bytes,
            waiting_clients: store.waiting_clients,
            store_bytes: store.bytes,
            refusing,
        }
    }

    /// The settings as they are now.
    fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes all of these settings, or none.
    fn change(&self, changes: &BTreeMap<String, String>) -> Result<Effective, Mistakes> {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if !changes.is_empty() {
            *settings = settings.changed(changes)?;
            self.server.reconfigure(settings.config.clone());
            for name in changes.keys() {
                let value = settings.named(name).and_then(|chosen| chosen.value.clone());
                info!(name, ?value, "changed by the operator");
            }
        }
        Ok(Effective::new(&settings))
    }
}

/// A policy as it is written.
const fn policy(policy: Policy) -> &'static str {
    match policy {
        Policy::Open => "open",
        Policy::Token => "token",
        Policy::Closed => "closed",
    }
}

/// A part of an answer that goes over all there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Page<T, K = String> {
    part: T,
    /// The last name of this page, where there are further ones.
    more: Option<K>,
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
        self.channels(client, system_date()).await
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
pub async fn serve(listener: UnixListener, operated: Arc<Operated>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let operated = Arc::clone(&operated);
                tokio::spawn(async move {
                    if let Err(error) = attend(stream, &operated).await {
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

async fn attend(stream: UnixStream, operated: &Operated) -> anyhow::Result<()> {
    let server = &*operated.server;
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
            Ok(Command::Account { name, action }) => match account::change_here(server, &name, action).await {
                Ok(()) => Answer::Done(true),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::Accounts { after }) => match account::list(&server.store, after.as_deref()).await {
                Ok(page) => Answer::Accounts(page),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::NewToken(wanted)) => match token::issue_here(operated, &wanted).await {
                Ok(issued) => Answer::Issued(issued),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::Tokens { after }) => match token::list(&server.store, after).await {
                Ok(page) => Answer::Tokens(page),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::EndToken(id)) => match token::end(&server.store, &id).await {
                Ok(()) => Answer::Done(true),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Ok(Command::Settings(changes)) => match operated.change(&changes) {
                Ok(effective) => Answer::Settings(effective),
                Err(Mistakes(mistakes)) => Answer::Mistakes(mistakes),
            },
            Ok(Command::Status) => Answer::Status(Box::new(operated.status().await)),
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
            let at = system_date();
            store.revoke(&id, at, refuse_waiting(Reason::Unknown, at), announce()).await?;
            Ok(())
        }
    }
}

/// Changes settings of the server that runs on `data`, all or none, until it ends; returns all that it has then, or `None`
/// if no server runs there.
///
/// # Errors
/// One sentence that says what is wrong; [`Mistakes`] where it is in the changes.
pub async fn settings(data: &Path, changes: BTreeMap<String, String>) -> anyhow::Result<Option<Effective>> {
    match UnixStream::connect(path(data)).await {
        Ok(_) => match ask(data, &Command::Settings(changes)).await? {
            Answer::Settings(effective) => Ok(Some(effective)),
            Answer::Mistakes(mistakes) => Err(Mistakes(mistakes).into()),
            _ => bail!("the server's answer is of another version"),
        },
        Err(error) if is_nobody(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot reach the server that runs on {}", data.display())),
    }
}

/// How the server is that runs on `data`, or `None` if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn status(data: &Path) -> anyhow::Result<Option<ServerStatus>> {
    match UnixStream::connect(path(data)).await {
        Ok(_) => match ask(data, &Command::Status).await? {
            Answer::Status(status) => Ok(Some(*status)),
            _ => bail!("the server's answer is of another version"),
        },
        Err(error) if is_nobody(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot reach the server that runs on {}", data.display())),
    }
}

/// Whether a socket that cannot be opened is one at which no server is.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
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
            Err(error) if is_nobody(&error) => Ok(Self::Store(Arc::new(open(data).await?))),
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
