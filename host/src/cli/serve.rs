//! `ossicle serve`: a server on this machine, from its flags to its exit code.
//!
//! Makes what is missing (data directory, key, token), says on standard output how to reach it, and nothing else there;
//! the log goes to standard error. Whatever stands in the way of a start is one sentence that says what to do.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::ValueEnum;
use ossicle_core::{Secret, token_verifier};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use crate::control;
use crate::crypto::{CryptoPool, IdentityKey};
use crate::server::{self, Config, Policy, Server, now};
use crate::store::{SharedStore, SqliteStore, Token, Tokens};

/// Seconds for which the token in the printed URL admits clients.
const TOKEN_AGE: u64 = 24 * 60 * 60;

/// Run a server
///
/// The first line on standard output is the URL that clients need; everything else goes to standard error.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle serve                                   on port 5150, for everybody who has the printed URL
  ossicle serve --bind 127.0.0.1 --port 0         for this machine only, on any free port
  ossicle serve --data /var/lib/ossicle --advertise chat.example.org")]
pub struct Serve {
    /// Directory of the server's data, made if it is not there
    #[arg(long, value_name = "DIR", env = "OSSICLE_DATA", default_value = "./ossicle-data")]
    pub data: PathBuf,
    /// Address to listen on
    #[arg(long, value_name = "ADDR", env = "OSSICLE_BIND", default_value = "0.0.0.0")]
    pub bind: IpAddr,
    /// Port to listen on; 0 takes any free one
    #[arg(long, env = "OSSICLE_PORT", default_value_t = 5150)]
    pub port: u16,
    /// Who may enrol [default: open when bound to loopback only, otherwise token]
    #[arg(long, value_name = "POLICY", env = "OSSICLE_ENROLL")]
    pub enroll: Option<Enroll>,
    /// Bits of the server's key, where a new one is made
    #[arg(long, value_name = "BITS", env = "OSSICLE_RSA", default_value = "3072")]
    pub rsa: Rsa,
    /// Host name or address for the printed URL [default: the bound address, or that of the default route]
    #[arg(long, value_name = "HOST", env = "OSSICLE_ADVERTISE", value_parser = host)]
    pub advertise: Option<String>,
}

/// Who may enrol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Enroll {
    /// Whoever reaches the server
    Open,
    /// Who has the token of the printed URL
    Token,
    /// Nobody
    Closed,
}

/// Bits of an RSA key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rsa {
    /// 2048
    #[value(name = "2048")]
    Bits2048,
    /// 3072
    #[value(name = "3072")]
    Bits3072,
    /// 4096: too long for devices with little memory
    #[value(name = "4096")]
    Bits4096,
}

impl Rsa {
    pub(super) const fn bits(self) -> usize {
        match self {
            Self::Bits2048 => 2048,
            Self::Bits3072 => 3072,
            Self::Bits4096 => 4096,
        }
    }
}

impl Serve {
    /// Serves until the process is told to stop, and returns its exit code: 0 after SIGTERM, 130 after an interrupt.
    ///
    /// # Errors
    /// One sentence for the operator; the exit code is 1 then.
    pub async fn run(self) -> anyhow::Result<u8> {
        log();
        raise_file_limit();
        let data = self.data.clone();
        let store = spawn_blocking(move || SqliteStore::open(&data)).await??;
        let store: SharedStore = Arc::new(store);
        let key = self.data.join("server.key");
        let identity = spawn_blocking(move || identity(&key, self.rsa)).await??;
        let listener = TcpListener::bind((self.bind, self.port)).await.map_err(|error| self.bind_sentence(&error))?;
        let address = listener.local_addr()?;
        let control = control::bind(&self.data).map_err(|error| self.control_sentence(&error))?;
        let pool = CryptoPool::start().context("cannot start threads for RSA")?;

        let enrol = self.policy();
        let token = renew_token(&store, enrol).await?;
        let server = Server::new(Config { enrol, ..Config::default() }, store, Arc::new(identity), Arc::new(pool));
        let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

        let url = url(&self.host(address.ip()), address.port(), &server.fingerprint(), token.as_deref());
        let mut out = io::stdout();
        if let Err(error) = writeln!(out, "{url}").and_then(|()| out.flush()) {
            warn!(%error, "nobody reads where the server is");
        }
        info!(%address, data = %self.data.display(), policy = ?enrol, "serving");

        let mut code = 0;
        let operators = tokio::spawn(control::serve(control, Arc::clone(&server)));
        server::run(listener, Arc::clone(&server), async {
            tokio::select! {
                _ = terminated.recv() => info!("told to stop"),
                _ = interrupted.recv() => {
                    info!("interrupted");
                    code = 130;
                }
            }
        })
        .await;
        operators.abort();
        let _ = operators.await;
        control::remove(&self.data);
        // The store writes out what it holds while it is dropped.
        spawn_blocking(move || drop(server)).await?;
        Ok(code)
    }

    fn policy(&self) -> Policy {
        match self.enroll {
            Some(Enroll::Open) => Policy::Open,
            Some(Enroll::Token) => Policy::Token,
            Some(Enroll::Closed) => Policy::Closed,
            None if self.bind.to_canonical().is_loopback() => Policy::Open,
            None => Policy::Token,
        }
    }

    /// What clients dial.
    fn host(&self, bound: IpAddr) -> String {
        let host = match &self.advertise {
            Some(host) => host.clone(),
            None if bound.is_unspecified() => default_route(bound).to_string(),
            None => bound.to_string(),
        };
        if host.contains(':') { format!("[{host}]") } else { host }
    }

    fn bind_sentence(&self, error: &io::Error) -> anyhow::Error {
        let (bind, port) = (self.bind, self.port);
        match error.kind() {
            io::ErrorKind::AddrInUse => {
                anyhow!("port {port} on {bind} is in use: stop the program that uses it, or choose another with --port")
            }
            io::ErrorKind::AddrNotAvailable => {
                anyhow!("this machine does not have the address {bind}: choose one that it has with --bind")
            }
            io::ErrorKind::PermissionDenied => {
                anyhow!("port {port} needs more rights: choose one above 1023 with --port")
            }
            _ => anyhow!("cannot listen on port {port} of {bind} ({error}): choose others with --bind and --port"),
        }
    }

    fn control_sentence(&self, error: &io::Error) -> anyhow::Error {
        let data = self.data.display();
        match error.kind() {
            io::ErrorKind::InvalidInput => {
                anyhow!("the path of {data} is too long for a socket: choose a shorter one with --data")
            }
            _ => anyhow!("cannot make the operator's socket in {data} ({error}): look at its permissions"),
        }
    }
}

/// A host name or address, without port or brackets.
fn host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let is_name = !bare.is_empty() && bare.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    if is_name || bare.parse::<Ipv6Addr>().is_ok() {
        Ok(bare.to_owned())
    } else {
        Err("give a host name or an address, without a port: the port is --port".into())
    }
}

/// The address that this machine uses towards the rest of the world. Connecting a datagram socket sends nothing.
fn default_route(unspecified: IpAddr) -> IpAddr {
    let (any, far, loopback): (IpAddr, IpAddr, IpAddr) = match unspecified {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(_) => {
            let far = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
            (Ipv6Addr::UNSPECIFIED.into(), far.into(), Ipv6Addr::LOCALHOST.into())
        }
    };
    let found = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(SocketAddr::new(far, 9))?;
        socket.local_addr()
    });
    found.map(|address| address.ip()).ok().filter(|address| !address.is_unspecified()).unwrap_or(loopback)
}

fn url(host: &str, port: u16, fingerprint: &[u8; 32], token: Option<&str>) -> String {
    let fingerprint = hex::encode(fingerprint);
    match token {
        Some(token) => format!("ossicle://{host}:{port}#{fingerprint}.{token}"),
        None => format!("ossicle://{host}:{port}#{fingerprint}"),
    }
}

/// The server's key, made if it is not there yet.
fn identity(path: &Path, rsa: Rsa) -> anyhow::Result<IdentityKey> {
    if fs::exists(path).with_context(|| format!("cannot look for the server's key {}", path.display()))? {
        return Ok(IdentityKey::load(path)?);
    }
    info!(bits = rsa.bits(), path = %path.display(), "making the server's key");
    let key = IdentityKey::generate(rsa.bits())?;
    key.save(path)?;
    Ok(key)
}

/// Ends the token of the former URL, and makes that of the next one where the policy wants one.
async fn renew_token(store: &SharedStore, policy: Policy) -> anyhow::Result<Option<String>> {
    store.end_tokens(Tokens::Printed, now()).await?;
    if policy != Policy::Token {
        return Ok(None);
    }
    let mut bytes = zeroize::Zeroizing::new([0; 24]);
    getrandom::fill(bytes.as_mut()).map_err(|error| anyhow!("this system has no randomness ({error})"))?;
    let (id, secret) = bytes.split_at(8);
    let secret = Secret::new(secret.try_into()?);
    let token = Token {
        id: id.try_into()?,
        verifier: *token_verifier(&secret).expose(),
        name_pattern: None,
        preset_id: None,
        expires: now() + TOKEN_AGE,
        uses: None,
        printed: true,
    };
    store.add_token(token).await?;
    Ok(Some(URL_SAFE_NO_PAD.encode(bytes.as_slice())))
}

/// Each client is an open file, and the usual limit is 1024: take what the system grants without asking.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        warn!(%error, limit = limit.current, "cannot raise the number of open files");
    }
}

/// The log of a server: standard error, `RUST_LOG` or else `info`, colours only on a terminal.
fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // Whoever embeds a server has a log already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(io::stderr).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        serve: Serve,
    }

    fn serve(arguments: &[&str]) -> Serve {
        Cli::try_parse_from([&["serve"], arguments].concat()).unwrap().serve
    }

    #[test]
    fn the_policy_follows_the_address() {
        assert_eq!(serve(&[]).policy(), Policy::Token);
        assert_eq!(serve(&["--bind", "127.0.0.1"]).policy(), Policy::Open);
        assert_eq!(serve(&["--bind", "::1"]).policy(), Policy::Open);
        assert_eq!(serve(&["--bind", "127.0.0.1", "--enroll", "token"]).policy(), Policy::Token);
        assert_eq!(serve(&["--enroll", "closed"]).policy(), Policy::Closed);
    }

    #[test]
    fn the_url_names_a_host_that_can_be_dialled() {
        let bound = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(serve(&[]).host(bound("127.0.0.1")), "127.0.0.1");
        assert_eq!(serve(&[]).host(bound("::1")), "[::1]");
        assert_ne!(serve(&[]).host(bound("0.0.0.0")), "0.0.0.0");
        assert_eq!(serve(&["--advertise", "chat.example.org"]).host(bound("0.0.0.0")), "chat.example.org");
        assert_eq!(serve(&["--advertise", "[2001:db8::1]"]).host(bound("::")), "[2001:db8::1]");
        assert!(Cli::try_parse_from(["serve", "--advertise", "host:5150"]).is_err());
        let fingerprint = "ab".repeat(32);
        assert_eq!(url("h", 5150, &[0xab; 32], None), format!("ossicle://h:5150#{fingerprint}"));
        assert_eq!(url("h", 5150, &[0xab; 32], Some("t")), format!("ossicle://h:5150#{fingerprint}.t"));
    }
}
