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
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::name::Name;
use crate::server::{Server, now};
use crate::store::{ClientId, SharedStore, SqliteStore};

const MAX_LINE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(10);

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Command {
    /// End the client with this name for good.
    Revoke(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Done(bool),
    Error(String),
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
    match UnixStream::connect(path(data)).await {
        Ok(stream) => ask(stream, &Command::Revoke(name.to_owned())).await,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            let store: SharedStore = Arc::new(open(data).await?);
            let id = find(&store, name).await?;
            store.revoke(&id, now()).await?;
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("cannot reach the server that runs on {}", data.display())),
    }
}

async fn ask(stream: UnixStream, command: &Command) -> anyhow::Result<()> {
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
        Answer::Done(_) => Ok(()),
        Answer::Error(sentence) => bail!(sentence),
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
