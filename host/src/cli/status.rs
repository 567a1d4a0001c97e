//! `ossicle status`: how this client stands with its server, or how a server is.

use core::time::Duration;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::{Asking, HomeArg, harmless, json, print, rfc3339, unexpected};
use crate::clock::system_date;
use crate::control::{self, ServerStatus};
use crate::endpoint::{self, Failure, Reply, Request};

/// How long a home that was just opened may take to connect.
const CONNECT: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(50);

/// Show how this client stands with its server, or how a server is
///
/// With a home: whether the server is reached, and what waits on either side. With --data, on the server's machine: the
/// server that runs on it. Exit code 3 if the server is not reached, or does not run.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle status
  ossicle status --data /var/lib/ossicle               the server, by its operator
  ossicle status --data /var/lib/ossicle --json | jq .online

In JSON, times are RFC 3339 and sizes bytes; what there is not is null.")]
pub struct Status {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: act as its operator
    // Not from the environment, as in `revoke`.
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub data: Option<PathBuf>,
    /// Print it as one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct OfClient<'s> {
    name: &'s str,
    id: String,
    key: String,
    server: &'s str,
    connected: bool,
    since: Option<String>,
    resumed: bool,
    trouble: Option<&'s str>,
    waiting: u64,
    letters: u64,
    keys_made: String,
    full_handshake: Option<String>,
}

#[derive(Serialize)]
struct OfServer<'s> {
    version: &'s str,
    address: String,
    metrics: Option<String>,
    fingerprint: String,
    started: String,
    enroll: &'s str,
    listening: bool,
    connected: u64,
    online: u64,
    handshakes: Handshakes,
    rate_limited: RateLimited,
    waiting: Waits,
    store: Stored<'s>,
}

#[derive(Serialize)]
struct Handshakes {
    full: u64,
    resumed: u64,
    refused: u64,
}

#[derive(Serialize)]
struct RateLimited {
    handshakes: u64,
    messages: u64,
}

#[derive(Serialize)]
struct Waits {
    items: u64,
    bytes: u64,
    clients: u64,
}

#[derive(Serialize)]
struct Stored<'s> {
    bytes: u64,
    refusing: Option<&'s str>,
}

impl Status {
    pub(super) async fn run(self) -> Result<(), Failure> {
        match &self.data {
            Some(data) => self.server(data).await,
            None => self.client().await,
        }
    }

    async fn client(&self) -> Result<(), Failure> {
        let home = self.home.open()?;
        let mut asking = Asking::new(&home, "status");
        let until = Instant::now() + CONNECT;
        let status = loop {
            let status = match asking.ask(Request::Status).await {
                Ok(Reply::Status(status)) => status,
                Ok(_) => {
                    asking.close().await;
                    return Err(unexpected());
                }
                Err(failure) => {
                    asking.close().await;
                    return Err(failure);
                }
            };
            // A home that nobody had open connects now.
            if status.connected.is_some() || status.trouble.is_some() || Instant::now() >= until {
                break status;
            }
            sleep(AGAIN).await;
        };
        asking.close().await;
        if self.json {
            print(&json(&of_client(&status))?)?;
        } else {
            for line in client_lines(&status) {
                print(&line)?;
            }
        }
        match (status.connected, status.trouble) {
            (Some(_), _) => Ok(()),
            (None, Some(trouble)) => Err(Failure::unreached(format!("not connected: {trouble}"))),
            (None, None) => Err(Failure::unreached("not connected: the server has not answered yet")),
        }
    }

    async fn server(&self, data: &Path) -> Result<(), Failure> {
        let status = control::status(data).await.map_err(|error| Failure::refused(format!("{error:#}")))?;
        let Some(status) = status else {
            let sentence =
                format!("no server runs on {}: `ossicle doctor --data` looks at what is there", data.display());
            return Err(Failure::unreached(sentence));
        };
        if self.json {
            print(&json(&of_server(&status))?)?;
        } else {
            for line in server_lines(&status) {
                print(&line)?;
            }
        }
        Ok(())
    }
}

fn of_client(status: &endpoint::Status) -> OfClient<'_> {
    OfClient {
        name: &status.name,
        id: uuid::Uuid::from_bytes(status.id).to_string(),
        key: hex::encode(status.key),
        server: &status.server,
        connected: status.connected.is_some(),
        since: status.connected.map(rfc3339),
        resumed: status.resumed,
        trouble: status.trouble.as_deref(),
        waiting: status.waiting,
        letters: status.letters,
        keys_made: rfc3339(status.keys_made),
        full_handshake: status.full_handshake.map(rfc3339),
    }
}

fn client_lines(status: &endpoint::Status) -> Vec<String> {
    let connection = match (status.connected, &status.trouble) {
        (Some(since), _) => {
            let how = if status.resumed { "resumed" } else { "by a full handshake" };
            format!("connected since {}, {how}", rfc3339(since))
        }
        (None, Some(trouble)) => format!("not connected: {trouble}"),
        (None, None) => "not connected yet".to_owned(),
    };
    let channel = match status.full_handshake {
        Some(at) => format!("kept, from the full handshake of {}", rfc3339(at)),
        None => "none: the next connection makes a full handshake".to_owned(),
    };
    let line = |what: &str, text: &str| format!("  {what:<9} {}", harmless(text));
    vec![
        harmless(&status.name),
        line("id", &uuid::Uuid::from_bytes(status.id).to_string()),
        line("key", &hex::encode(status.key)),
        line("server", &status.server),
        line("state", &connection),
        line("channel", &channel),
        line("keys", &format!("end to end, made {}", rfc3339(status.keys_made))),
        line("waiting", &format!("{} messages to be read, {} to be sent", status.waiting, status.letters)),
    ]
}

fn of_server(status: &ServerStatus) -> OfServer<'_> {
    let [full, resumed, refused] = status.handshakes;
    let [handshakes, messages] = status.hasty;
    OfServer {
        version: &status.version,
        address: status.address.to_string(),
        metrics: status.metrics.map(|address| address.to_string()),
        fingerprint: hex::encode(status.fingerprint),
        started: rfc3339(status.started),
        enroll: &status.enroll,
        listening: status.listening,
        connected: status.connected,
        online: status.online,
        handshakes: Handshakes { full, resumed, refused },
        rate_limited: RateLimited { handshakes, messages },
        waiting: Waits { items: status.waiting, bytes: status.waiting_bytes, clients: status.waiting_clients },
        store: Stored { bytes: status.store_bytes, refusing: status.refusing.as_deref() },
    }
}

fn server_lines(status: &ServerStatus) -> Vec<String> {
    let up = humantime::format_duration(Duration::from_secs(system_date().saturating_sub(status.started)));
    let [full, resumed, refused] = status.handshakes;
    let [handshakes, messages] = status.hasty;
    let state = if status.listening { "takes connections" } else { "takes no connections" };
    let store = status.refusing.as_deref().unwrap_or("is written");
    let (waiting, clients) = (status.waiting, status.waiting_clients);
    let line = |what: &str, text: String| format!("  {what:<10} {}", harmless(&text));
    let mut lines = vec![
        format!("ossicle {}", harmless(&status.version)),
        line("address", format!("{}, {state}", status.address)),
        line("key", hex::encode(status.fingerprint)),
        line("up", format!("for {up}, since {}", rfc3339(status.started))),
        line("enrolment", status.enroll.clone()),
        line("clients", format!("{} connected, {} of them online", status.connected, status.online)),
        line("handshakes", format!("{full} full, {resumed} resumed, {refused} refused")),
        line("too fast", format!("{handshakes} handshakes, {messages} messages")),
        line("waiting", format!("{waiting} items of {} bytes for {clients} clients", status.waiting_bytes)),
        line("store", format!("{} bytes, {store}", status.store_bytes)),
    ];
    if let Some(metrics) = status.metrics {
        lines.push(line("metrics", format!("http://{metrics}/metrics")));
    }
    lines
}
