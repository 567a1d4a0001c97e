//! Who answers at an address, and does it let this client in: one connection, for `doctor`, each stage bounded in time.
//!
//! Without an identity it goes as far as the server's signature and hangs up; the server learns nothing of who asked. With
//! one it goes through the whole handshake and closes.

use core::net::SocketAddr;
use core::time::Duration;
use std::fs::Metadata;
use std::path::Path;
use std::sync::Arc;

use ossicle_core::{
    Ask, Channel, ClientConfig, Connection, Credentials, Error, Event, MAX_RECORD_LEN, PeerError, PublicKey, Reason,
    Received, Settings,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::agent::describe;
use super::kept::{self, Kept};
use super::link::solve;
use super::now;
use crate::crypto::{HostAead, IdentityKey, verify};
use crate::store::home::Profile;

const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// For all addresses of a name together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who answered.
#[derive(Clone, Debug)]
pub struct Probed {
    /// Which of the host's addresses it was.
    pub address: SocketAddr,
    /// The fingerprint of its key, for which it has signed.
    pub fingerprint: [u8; 32],
    /// What it decided when it let the client in.
    pub settings: Option<Settings>,
    /// Whether it did so by the channel that the home keeps, without RSA.
    pub resumed: bool,
}

/// As whom to ask.
#[derive(Clone, Copy)]
pub struct Caller<'c> {
    /// Who its home says it is.
    pub profile: &'c Profile,
    /// Its identity key.
    pub key: &'c Arc<IdentityKey>,
    /// Its home, whose channel is offered: a full handshake would end it. It stays valid beside the one that is issued.
    pub home: &'c Path,
}

/// How far it went, and no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The host has no address.
    Resolve(String),
    /// Nobody takes the connection.
    Connect(String),
    /// Somebody took it and says nothing.
    Silent,
    /// Somebody answers, but not as this protocol does; or the connection broke.
    Foreign(String),
    /// It is a server with another key.
    OtherKey,
    /// It has too much to do, and asks for more work than there is a right to.
    Busy,
    /// It does not want this client.
    Refused(Reason),
    /// This side failed.
    Failed(String),
}

/// Asks who is at `host` and `port`; as `client`, if there is one.
///
/// # Errors
/// [`Obstacle`] names the stage.
pub async fn probe(host: &str, port: u16, client: Option<Caller<'_>>) -> Result<Probed, Obstacle> {
    let found = timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let addresses: Vec<SocketAddr> = match found {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => return Err(Obstacle::Resolve(error.to_string())),
        Err(_) => return Err(Obstacle::Resolve("no answer in time".into())),
    };
    let mut puzzle = None;
    loop {
        let pinned = client.map(|client| fingerprint(&client.profile.server_key)).transpose()?;
        let mut connection = begin(client, pinned)?;
        if let Some(puzzle) = &puzzle {
            connection = solve(connection, puzzle).await.map_err(|error| Obstacle::Failed(describe(&error)))?;
        }
        let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(addresses.as_slice())).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(Obstacle::Connect(error.to_string())),
            Err(_) => return Err(Obstacle::Connect("no answer in time".into())),
        };
        let address = stream.peer_addr().map_err(|error| Obstacle::Connect(error.to_string()))?;
        let mut heard = false;
        let talked = timeout(HANDSHAKE_TIMEOUT, talk(stream, &mut connection, client, pinned, &mut heard)).await;
        // Once: a connection that presents a puzzle has no second one.
        if let asked @ Some(_) = connection.puzzle() {
            puzzle = asked;
            continue;
        }
        let (fingerprint, settings, resumed) = match talked {
            Ok(talked) => talked?,
            Err(_) if heard => return Err(Obstacle::Foreign("it began to answer and did not go on".into())),
            Err(_) => return Err(Obstacle::Silent),
        };
        return Ok(Probed { address, fingerprint, settings, resumed });
    }
}

/// A connection that has not begun: as this client, if there is one.
fn begin(client: Option<Caller<'_>>, pinned: Option<[u8; 32]>) -> Result<Connection<HostAead>, Obstacle> {
    let mut seed = Zeroizing::new([0; 64]);
    getrandom::fill(seed.as_mut()).map_err(|_| Obstacle::Failed("this system has no randomness".into()))?;
    let record_limit = u16::try_from(MAX_RECORD_LEN).unwrap_or(u16::MAX);
    let config = ClientConfig { server: pinned, ask_for_key: pinned.is_none(), record_limit };
    match client.and_then(kept).filter(|kept| Some(kept.server_key) == pinned) {
        Some(channel) => Connection::resume(config, channel, &seed).map_err(obstacle),
        None => Ok(Connection::client(config, &seed)),
    }
}

async fn talk(
    mut stream: TcpStream,
    connection: &mut Connection<HostAead>,
    client: Option<Caller<'_>>,
    pinned: Option<[u8; 32]>,
    heard: &mut bool,
) -> Result<([u8; 32], Option<Settings>, bool), Obstacle> {
    let mut rx = vec![0; 2 * MAX_RECORD_LEN];
    let mut tx = vec![0; 2 * MAX_RECORD_LEN];
    // A channel is resumed by the pinned server and nobody else, without showing a key.
    let (mut filled, mut server) = (0, pinned.unwrap_or_default());
    loop {
        let len = connection.transmit(&mut tx).map_err(obstacle)?;
        write(&mut stream, tx.get(..len).unwrap_or_default()).await?;
        let (used, settings) = match connection.receive(rx.get_mut(..filled).unwrap_or_default()).map_err(obstacle)? {
            Received::Need(_) | Received::Wait => {
                let room = rx.get_mut(filled..).unwrap_or_default();
                let len = stream.read(room).await.map_err(broken)?;
                if len == 0 {
                    return Err(Obstacle::Foreign("it closes the connection".into()));
                }
                *heard = true;
                filled += len;
                continue;
            }
            Received::Record { used, event: Event::CheckServer(claim) } => {
                let modulus = match (client, claim.key) {
                    (Some(client), _) => client.profile.server_key.as_slice(),
                    (None, Some(key)) => key.modulus(),
                    (None, None) => return Err(Obstacle::Foreign("it does not show its key".into())),
                };
                server = fingerprint(modulus)?;
                if server != claim.fingerprint || !verify(modulus, &claim.statement, claim.signature) {
                    return Err(Obstacle::OtherKey);
                }
                let Some(Caller { profile, key, .. }) = client else {
                    return Ok((server, None, false));
                };
                let credentials =
                    Credentials::Key { id: profile.id, key_epoch: profile.key_epoch, fingerprint: key.fingerprint() };
                connection.verified(&credentials).map_err(obstacle)?;
                let Some(Ask::Sign(statement)) = connection.ask() else {
                    return Err(Obstacle::Failed("the handshake does not go on".into()));
                };
                let key = Arc::clone(key);
                let signed = tokio::task::spawn_blocking(move || key.sign(&statement)).await;
                let failed = || Obstacle::Failed("the identity key does not sign".into());
                let signature = signed.ok().and_then(Result::ok).ok_or_else(failed)?;
                let len = connection.sign_client(&credentials, &signature, &mut tx).map_err(obstacle)?;
                write(&mut stream, tx.get(..len).unwrap_or_default()).await?;
                (used, None)
            }
            Received::Record { used, event: Event::Connected(settings) } => (used, Some(settings)),
            Received::Record { used, .. } => (used, None),
        };
        if settings.is_some() {
            // It has said what was asked: a last word that is not heard does no harm.
            if let Ok(len) = connection.close(None, &mut tx) {
                let _ = write(&mut stream, tx.get(..len).unwrap_or_default()).await;
            }
            return Ok((server, settings, connection.is_resumed()));
        }
        rx.copy_within(used..filled, 0);
        filled -= used;
    }
}

/// The channel that the home keeps, if it is this client's.
fn kept(Caller { profile, key, home }: Caller<'_>) -> Option<Channel> {
    // Looked at first: opening a pipe waits for its writer.
    home.join(kept::FILE).metadata().ok().filter(Metadata::is_file)?;
    let channel = Kept::new(home).offer(now())?;
    let same =
        (channel.client, channel.key_epoch, channel.client_key) == (profile.id, profile.key_epoch, key.fingerprint());
    same.then_some(channel)
}

async fn write(stream: &mut TcpStream, bytes: &[u8]) -> Result<(), Obstacle> {
    stream.write_all(bytes).await.map_err(broken)
}

fn broken(error: std::io::Error) -> Obstacle {
    Obstacle::Foreign(error.to_string())
}

fn obstacle(error: Error) -> Obstacle {
    match error {
        Error::Peer(PeerError::Refused { reason, .. }) => Obstacle::Refused(reason),
        Error::Peer(PeerError::ServerKey) => Obstacle::OtherKey,
        Error::Peer(PeerError::Busy | PeerError::Puzzle { .. }) => Obstacle::Busy,
        error => Obstacle::Foreign(error.to_string()),
    }
}

/// The fingerprint of the key with this modulus.
fn fingerprint(modulus: &[u8]) -> Result<[u8; 32], Obstacle> {
    let key = PublicKey::from_modulus(modulus).map_err(|_| Obstacle::Foreign("it shows no RSA key".into()))?;
    Ok(key.fingerprint())
}
