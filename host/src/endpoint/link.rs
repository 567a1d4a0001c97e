//! One TCP connection to the server: connect, authenticate, then records in and out.
//!
//! The engine is core's `Connection`; here are the socket, the two buffers and the answers to what the engine asks. A
//! server whose key is not the pinned one is never told who calls. Cancel-safe: every wait is a single read or write.

use core::time::Duration;
use std::sync::Arc;

use ossicle_core::{
    Ask, Channel, ClientConfig, Connection, Credentials, Error, Event, HASH_LEN, Login, MAX_RECORD_LEN, Message,
    PeerError, PublicKey, Puzzle, Reason, Received, Secret, ServerClaim, Settings,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::url::address;
use crate::crypto::{HostAead, IdentityKey, verify};

/// A name may resolve to several addresses; each gets so long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a last word may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Room for several records, so that what came together is handled together.
const RECEIVE_LEN: usize = 4 * MAX_RECORD_LEN;

/// Where the server is, and by what it is recognised.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) server: Server,
}

/// By what a server is recognised.
#[derive(Clone)]
pub(super) enum Server {
    /// Its key, pinned.
    Key(Vec<u8>),
    /// The fingerprint of its key; the key itself is asked for.
    Fingerprint([u8; HASH_LEN]),
    /// By nothing: whoever answers is trusted and told so.
    Anyone,
}

/// By what a client enters.
enum Entry<'c> {
    Enrolled(&'c Credentials<'c>),
    Login(&'c Login<'c>),
}

/// An authenticated connection.
pub(super) struct Link {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    connection: Connection<HostAead>,
    rx: Vec<u8>,
    /// What was received and not opened yet.
    received: core::ops::Range<usize>,
    tx: Vec<u8>,
    settings: Settings,
    /// The modulus of the server's key.
    server_key: Vec<u8>,
}

/// What came.
pub(super) enum Incoming {
    /// A payload for `Message::decode`.
    Message(Vec<u8>),
    /// The server has said its last.
    Closed(Option<Reason>),
}

/// Why there is no connection any more, or yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkError {
    /// Nobody answers at that address.
    Unreachable(String),
    /// The server does not want this client.
    Refused { reason: Reason, retry_after: u32 },
    /// It has too much to do for now, as it says itself or somebody in its place.
    Busy(String),
    /// Somebody else answers: the key is not the pinned one.
    OtherServer,
    /// The connection broke, or what came over it is not what the protocol allows.
    Broken(String),
    /// This side failed.
    Failed(String),
}

impl From<Error> for LinkError {
    fn from(error: Error) -> Self {
        match error {
            Error::Peer(PeerError::Refused { reason, retry_after }) => Self::Refused { reason, retry_after },
            Error::Peer(PeerError::ServerKey) => Self::OtherServer,
            Error::Peer(PeerError::Busy | PeerError::Puzzle { .. }) => Self::Busy(error.to_string()),
            error => Self::Broken(error.to_string()),
        }
    }
}

impl Link {
    /// What posts in the public conversation are bound to: the fingerprint of the server's key.
    pub(super) fn network(&self) -> [u8; 32] {
        PublicKey::from_modulus(&self.server_key).map(|key| key.fingerprint()).unwrap_or_default()
    }

    /// Connects and authenticates, by resuming `channel` where that is this client's at this server.
    pub(super) async fn connect(
        target: &Target,
        credentials: &Credentials<'_>,
        key: &Arc<IdentityKey>,
        channel: Option<Channel>,
    ) -> Result<Self, LinkError> {
        Self::enter(target, Entry::Enrolled(credentials), key, channel).await
    }

    /// Connects and enters an account by its password: `key` is the login's.
    pub(super) async fn log_in(target: &Target, login: &Login<'_>, key: &Arc<IdentityKey>) -> Result<Self, LinkError> {
        Self::enter(target, Entry::Login(login), key, None).await
    }

    async fn enter(
        target: &Target,
        entry: Entry<'_>,
        key: &Arc<IdentityKey>,
        channel: Option<Channel>,
    ) -> Result<Self, LinkError> {
        let mut puzzle = None;
        loop {
            let mut connection = begin(target, &entry, channel.clone())?;
            // A server waits for its hello for seconds only.
            if let Some(puzzle) = &puzzle {
                connection = solve(connection, puzzle).await?;
            }
            let stream = dial(&target.host, target.port).await?;
            let late = |_| LinkError::Broken("the server did not finish the handshake in time".into());
            let mut link = Self::new(stream, target, connection);
            let done = timeout(HANDSHAKE_TIMEOUT, link.authenticate(target, &entry, key)).await.map_err(late)?;
            match (done, link.connection.puzzle()) {
                (Ok(()), _) => return Ok(link),
                // Once: a connection that presents a puzzle has no second one.
                (Err(_), asked @ Some(_)) => puzzle = asked,
                (Err(error), None) => return Err(error),
            }
        }
    }

    fn new(stream: TcpStream, target: &Target, connection: Connection<HostAead>) -> Self {
        // Without this, answers wait for the other side's acknowledgement timer.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        Self {
            reader,
            writer,
            connection,
            rx: vec![0; RECEIVE_LEN],
            received: 0..0,
            tx: Vec::new(),
            settings: Settings::default(),
            server_key: match &target.server {
                Server::Key(modulus) => modulus.clone(),
                Server::Fingerprint(_) | Server::Anyone => Vec::new(),
            },
        }
    }

    async fn authenticate(
        &mut self,
        target: &Target,
        entry: &Entry<'_>,
        key: &Arc<IdentityKey>,
    ) -> Result<(), LinkError> {
        let link = self;
        loop {
            link.transmit()?;
            if let Some(Ask::Sign(statement)) = link.connection.ask() {
                let signer = Arc::clone(key);
                let signed = tokio::task::spawn_blocking(move || signer.sign(&statement)).await;
                let failed = || LinkError::Failed("the identity key does not sign".into());
                let signature = signed.ok().and_then(Result::ok).ok_or_else(failed)?;
                link.append(|connection, out| match entry {
                    Entry::Enrolled(credentials) => connection.sign_client(credentials, &signature, out),
                    Entry::Login(login) => connection.sign_login(login, &signature, out),
                })?;
                continue;
            }
            let range = link.received.clone();
            match link.connection.receive(link.rx.get_mut(range).unwrap_or_default())? {
                Received::Record { used, event } => {
                    link.received.start += used;
                    match event {
                        Event::CheckServer(claim) => {
                            link.server_key = check(&claim, target)?;
                            match entry {
                                Entry::Enrolled(credentials) => link.connection.verified(credentials)?,
                                Entry::Login(login) => link.connection.verified_for_login(login)?,
                            }
                        }
                        Event::Connected(settings) => {
                            link.settings = settings;
                            return Ok(());
                        }
                        _ => {}
                    }
                }
                _ => link.io().await?,
            }
        }
    }

    /// What the server decided at the end of the handshake.
    pub(super) const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether a channel was resumed, and nobody signed.
    pub(super) const fn is_resumed(&self) -> bool {
        self.connection.is_resumed()
    }

    /// The channel that this connection issued, once.
    pub(super) const fn take_channel(&mut self) -> Option<Channel> {
        self.connection.take_channel()
    }

    /// The modulus of the server's key, which was verified.
    pub(super) fn server_key(&self) -> &[u8] {
        &self.server_key
    }

    /// Binds statements to this connection.
    pub(super) fn exporter(&self) -> Result<&Secret<HASH_LEN>, LinkError> {
        Ok(self.connection.exporter()?)
    }

    /// Bytes of the longest payload that the server takes.
    pub(super) fn max_payload(&self) -> usize {
        self.connection.max_payload().unwrap_or_default()
    }

    /// Seals a message into what will be written next.
    pub(super) fn send(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        self.append(|connection, out| connection.send(message, out))
    }

    /// Replaces the key of this direction.
    pub(super) fn update_key(&mut self) -> Result<(), LinkError> {
        self.append(Connection::update_key)
    }

    /// Opens the next record of what was received; `None` when there is no whole one.
    pub(super) fn next(&mut self) -> Result<Option<Incoming>, LinkError> {
        loop {
            let range = self.received.clone();
            match self.connection.receive(self.rx.get_mut(range).unwrap_or_default())? {
                Received::Record { used, event } => {
                    let incoming = match event {
                        Event::Message(payload) => Some(Incoming::Message(payload.to_vec())),
                        Event::Closed(reason) => Some(Incoming::Closed(reason)),
                        _ => None,
                    };
                    self.received.start += used;
                    if incoming.is_some() {
                        return Ok(incoming);
                    }
                }
                _ => return Ok(None),
            }
        }
    }

    /// Waits until something was received or written. Cancel-safe.
    pub(super) async fn io(&mut self) -> Result<(), LinkError> {
        self.transmit()?;
        self.rx.copy_within(self.received.clone(), 0);
        self.received = 0..self.received.len();
        let room = self.rx.get_mut(self.received.end..).unwrap_or_default();
        tokio::select! {
            read = self.reader.read(room) => match read {
                Ok(0) => {
                    self.connection.end_of_stream()?;
                    Err(LinkError::Broken("the server closed the connection".into()))
                }
                Ok(len) => {
                    self.received.end += len;
                    Ok(())
                }
                Err(error) => Err(LinkError::Broken(error.to_string())),
            },
            written = self.writer.write(&self.tx), if !self.tx.is_empty() => match written {
                Ok(len) => {
                    self.tx.drain(..len);
                    Ok(())
                }
                Err(error) => Err(LinkError::Broken(error.to_string())),
            },
        }
    }

    /// Says the last word, and writes what is left.
    pub(super) async fn close(mut self) {
        let _ = self.append(|connection, out| connection.close(None, out));
        // Whoever closes has nothing to lose if the other side does not listen.
        let _ = timeout(CLOSE_TIMEOUT, async {
            self.writer.write_all(&self.tx).await?;
            self.writer.shutdown().await
        })
        .await;
    }

    fn transmit(&mut self) -> Result<(), LinkError> {
        self.append(Connection::transmit)
    }

    fn append(
        &mut self,
        seal: impl FnOnce(&mut Connection<HostAead>, &mut [u8]) -> Result<usize, Error>,
    ) -> Result<(), LinkError> {
        let before = self.tx.len();
        // Two records: a key update may come first.
        self.tx.resize(before + 2 * MAX_RECORD_LEN, 0);
        let sealed = seal(&mut self.connection, self.tx.get_mut(before..).unwrap_or_default());
        self.tx.truncate(before + sealed.unwrap_or_default());
        sealed?;
        Ok(())
    }
}

/// A connection that has not begun, by resuming `channel` where that is this client's at this server.
fn begin(target: &Target, entry: &Entry<'_>, channel: Option<Channel>) -> Result<Connection<HostAead>, LinkError> {
    let server = match &target.server {
        Server::Key(modulus) => Some(fingerprint(modulus)?),
        Server::Fingerprint(fingerprint) => Some(*fingerprint),
        Server::Anyone => None,
    };
    let ask_for_key = !matches!(target.server, Server::Key(_));
    let record_limit = u16::try_from(MAX_RECORD_LEN).unwrap_or(u16::MAX);
    let mut seed = Zeroizing::new([0; 64]);
    getrandom::fill(seed.as_mut()).map_err(|_| LinkError::Failed("this system has no randomness".into()))?;
    let config = ClientConfig { server, ask_for_key, record_limit };
    match channel.filter(|channel| is_of(channel, entry)) {
        Some(channel) if server == Some(channel.server_key) => Ok(Connection::resume(config, channel, &seed)?),
        _ => Ok(Connection::client(config, &seed)),
    }
}

/// A connection that presents a puzzle, solved: some hundred thousand hashes, which are nothing for an I/O thread.
pub(super) async fn solve(
    mut connection: Connection<HostAead>,
    puzzle: &Puzzle,
) -> Result<Connection<HostAead>, LinkError> {
    tracing::debug!(bits = puzzle.bits(), "the server has too much to do: working first");
    connection.present(puzzle)?;
    let solved = tokio::task::spawn_blocking(move || {
        while connection.solve() {}
        connection
    });
    solved.await.map_err(|_| LinkError::Failed("this system does no work".into()))
}

/// Whether these credentials are those that the channel was issued to.
fn is_of(channel: &Channel, entry: &Entry<'_>) -> bool {
    match entry {
        Entry::Enrolled(Credentials::Key { id, key_epoch, fingerprint }) => {
            (channel.client, channel.key_epoch, channel.client_key) == (*id, *key_epoch, *fingerprint)
        }
        Entry::Enrolled(Credentials::Enroll { .. }) | Entry::Login(_) => false,
    }
}

async fn dial(host: &str, port: u16) -> Result<TcpStream, LinkError> {
    let unreachable = |what: String| LinkError::Unreachable(format!("cannot reach {}: {what}", address(host, port)));
    let found = timeout(CONNECT_TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let addresses = match found {
        Ok(Ok(addresses)) => addresses,
        Ok(Err(error)) => return Err(unreachable(error.to_string())),
        Err(_) => return Err(unreachable("its name is not resolved in time".into())),
    };
    let mut last = "its name has no address".to_owned();
    for candidate in addresses {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(candidate)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = "it does not answer".to_owned(),
        }
    }
    Err(unreachable(last))
}

/// The modulus of the key that signed, if it is the right one and signed the right thing.
fn check(claim: &ServerClaim<'_>, target: &Target) -> Result<Vec<u8>, LinkError> {
    let modulus = match (&target.server, claim.key) {
        (Server::Key(modulus), _) => modulus.as_slice(),
        (_, Some(key)) => key.modulus(),
        (_, None) => return Err(LinkError::Broken("the server did not show its key".into())),
    };
    if fingerprint(modulus)? != claim.fingerprint || !verify(modulus, &claim.statement, claim.signature) {
        return Err(LinkError::OtherServer);
    }
    Ok(modulus.to_vec())
}

pub(super) fn fingerprint(modulus: &[u8]) -> Result<[u8; HASH_LEN], LinkError> {
    let key = PublicKey::from_modulus(modulus).map_err(|_| LinkError::Broken("this is no RSA key".into()))?;
    Ok(key.fingerprint())
}
