//! A real server on port 0, and a client that is no more than core's `Connection` over TCP.
//!
//! The client says what a test tells it to say, right or wrong, and hands back what it hears. Nothing here waits for a
//! time to pass: whatever does not come within a generous deadline fails the test.

use core::future::Future;
use core::net::SocketAddr;
use core::time::Duration;
use std::sync::Arc;

use ossicle::bus::{Bus, Local};
use ossicle::clock::Clock;
use ossicle::crypto::{CryptoPool, IdentityKey, verify};
use ossicle::endpoint::{Home, ServerUrl, initialise};
use ossicle::name::Name;
use ossicle::resumption::ChannelKey;
use ossicle::server::{self, Config, Parts, Policy, Server};
use ossicle::store::{SharedStore, SqliteStore, Token as StoredToken};
use ossicle::world::World;
use ossicle_core::{
    Ask, Bundle, BundleKeys, Channel, ClientConfig, Closed, Connection, Credentials, ENVELOPE_OVERHEAD, Error, Event,
    Fixed, Invite, Login, Member, MemberChanged, Message, PeerError, Post, Puzzle, Reason, Receipt, Received, Rungs,
    Say, Secret, Settings, SignedBundle, Token, ToldBy, WRAP_LEN, token_verifier,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::{keys, public};

/// Nothing that works takes so long.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// What hosts take.
pub const RECORD_LIMIT: u16 = 16_408;

/// `future`, within [`DEADLINE`].
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it comes in time")
}

/// A running server with its own data directory.
pub struct Node {
    /// Where it listens.
    pub address: SocketAddr,
    /// The server itself.
    pub server: Arc<Server>,
    /// Its store.
    pub store: SharedStore,
    /// Its threads for RSA, with what they have signed and verified.
    pub pool: Arc<CryptoPool>,
    /// Its data directory.
    pub directory: TempDir,
    stop: oneshot::Sender<()>,
    running: JoinHandle<()>,
}

/// A configuration for tests: everybody may enrol.
pub fn open() -> Config {
    Config { enrol: Policy::Open, ..Config::default() }
}

impl Node {
    /// A home that is enrolled here under this name, in a directory of its own, and its id.
    pub async fn house(&self, name: &str) -> (TempDir, Home, [u8; 16]) {
        let directory = tempfile::tempdir().expect("a directory");
        let home = Home::new(directory.path().join(name));
        let fingerprint: String = self.server.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
        let url = ServerUrl::parse(&format!("ossicle://{}#{fingerprint}", self.address)).expect("a URL");
        let name = Name::parse(name).expect("a name");
        let profile = initialise(&home, &name, 2048, &url, false).await.expect("the server takes it");
        (directory, home, profile.id)
    }

    /// Starts a server.
    pub async fn start(config: Config) -> Self {
        Self::start_on(TempDir::new().expect("a temporary directory"), config).await
    }

    /// Starts a server on the data of a former one.
    pub async fn start_on(directory: TempDir, config: Config) -> Self {
        let store = SqliteStore::open(directory.path()).expect("a new store");
        Self::start_with(directory, Arc::new(store), config).await
    }

    /// Starts a server whose limits go by this clock.
    pub async fn start_by(clock: Clock, config: Config) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let store = SqliteStore::open(directory.path()).expect("a new store");
        Self::start_all(directory, Arc::new(store), config, clock, Arc::new(Local)).await
    }

    /// Starts a server on the data of a former one, by this clock.
    pub async fn start_on_by(directory: TempDir, clock: Clock, config: Config) -> Self {
        let store = SqliteStore::open(directory.path()).expect("a store");
        Self::start_all(directory, Arc::new(store), config, clock, Arc::new(Local)).await
    }

    /// Starts a server on a store of the caller's.
    pub async fn start_with(directory: TempDir, store: SharedStore, config: Config) -> Self {
        Self::start_all(directory, store, config, Clock::system(), Arc::new(Local)).await
    }

    /// Starts one of the servers that share this store, joined by this bus.
    pub async fn start_among(store: SharedStore, bus: Arc<dyn Bus>, config: Config) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        Self::start_all(directory, store, config, Clock::system(), bus).await
    }

    async fn start_all(
        directory: TempDir,
        store: SharedStore,
        config: Config,
        clock: Clock,
        bus: Arc<dyn Bus>,
    ) -> Self {
        let pool = Arc::new(CryptoPool::start().expect("threads"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let server = Server::new(Parts {
            config,
            store: Arc::clone(&store),
            identity: Arc::new(keys::server()),
            channel_key: ChannelKey::open(directory.path()).expect("a key for channels"),
            pool: Arc::clone(&pool),
            world: World { clock, ..World::default() },
            bus,
        });
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server::run(listener, Arc::clone(&server), async {
            let _ = stopped.await;
        }));
        Self { address, server, store, pool, directory, stop, running }
    }

    /// Stops the server, waits until it has, and leaves its data.
    pub async fn stop(self) -> TempDir {
        let _ = self.stop.send(());
        within(self.running).await.expect("the server does not panic");
        self.directory
    }

    /// Ends the server without a word to anybody, as a kill does, and leaves its data.
    pub async fn kill(self) -> TempDir {
        self.running.abort();
        let _ = self.running.await;
        // Its store is held by connections that end with it.
        let Self { server, store, directory, .. } = self;
        drop(server);
        let begun = std::time::Instant::now();
        while Arc::strong_count(&store) > 1 {
            assert!(begun.elapsed() < DEADLINE, "somebody holds on to the store");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        directory
    }

    /// Makes a token that admits so many clients; `None` without end.
    pub async fn token(&self, number: u8, uses: Option<u32>) -> Token {
        let token = Token { id: [number; 8], secret: Secret::new([number; 16]) };
        let stored = StoredToken {
            id: token.id,
            verifier: *token_verifier(&token.secret).expose(),
            name_pattern: None,
            preset_id: None,
            expires: u64::MAX >> 1,
            uses,
            printed: false,
        };
        self.store.add_token(stored).await.expect("a new token");
        token
    }

    /// Enrols a new client under an open policy.
    pub async fn enrol(&self, number: u8, name: &str, key: IdentityKey) -> Client {
        let credentials = Credentials::Enroll { id: [number; 16], name, key: public(&key), token: None };
        Client::connect(self, &credentials, &key).await.expect("a new client is admitted")
    }

    /// Connects a client that was enrolled.
    pub async fn connect(&self, number: u8, key: &IdentityKey) -> Result<Client, Error> {
        Client::connect(self, &enrolled(number, key), key).await
    }
}

/// The credentials of a client that was enrolled.
pub fn enrolled(number: u8, key: &IdentityKey) -> Credentials<'static> {
    enrolled_as([number; 16], key)
}

/// The credentials of the client with this id.
pub fn enrolled_as(id: [u8; 16], key: &IdentityKey) -> Credentials<'static> {
    Credentials::Key { id, key_epoch: 0, fingerprint: key.fingerprint() }
}

/// The error of a client that was refused for good.
pub fn refused(reason: Reason) -> Error {
    PeerError::Refused { reason, retry_after: 0 }.into()
}

/// What a client hears.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// A message's payload.
    Message(Vec<u8>),
    /// The server's close.
    Closed(Option<Reason>),
    /// The end of the stream, without a word.
    Ended,
}

/// A connected client.
pub struct Client {
    /// Its id.
    pub id: [u8; 16],
    /// The settings it got.
    pub settings: Settings,
    /// The engine.
    pub connection: Connection,
    /// The socket.
    pub stream: TcpStream,
    /// Keys of the server that were replaced.
    pub renewals: u32,
    /// The numbers under which what it heard had waited.
    pub waited: Vec<u64>,
    /// Whether it acknowledges what had waited as soon as it has it.
    pub acknowledges: bool,
    /// The first record, as it was sent.
    pub hello: Vec<u8>,
    rx: Vec<u8>,
}

impl Client {
    /// Runs the handshake.
    pub async fn connect(node: &Node, credentials: &Credentials<'_>, key: &IdentityKey) -> Result<Self, Error> {
        Self::connect_with(node, credentials, key, RECORD_LIMIT).await
    }

    /// Runs the handshake as a client that takes no longer records than these.
    pub async fn connect_with(
        node: &Node,
        credentials: &Credentials<'_>,
        key: &IdentityKey,
        record_limit: u16,
    ) -> Result<Self, Error> {
        let mut client = Self::hello(node, record_limit).await;
        client.id = match credentials {
            Credentials::Key { id, .. } | Credentials::Enroll { id, .. } => *id,
        };
        client.authenticate(credentials, key).await?;
        client.settle().await?;
        Ok(client)
    }

    /// Comes back by resuming `channel`; the server must take it.
    pub async fn resume(node: &Node, channel: Channel) -> Result<Self, Error> {
        let mut client = Self::offer(node, channel).await;
        client.finish_resumption().await?;
        client.settle().await?;
        Ok(client)
    }

    /// Takes the server's answer to an offer, and sends {ClientAuth}.
    pub async fn finish_resumption(&mut self) -> Result<(), Error> {
        self.finish_resumption_after(async || {}).await
    }

    /// The same, with something that happens between the two.
    pub async fn finish_resumption_after(&mut self, happens: impl AsyncFnOnce()) -> Result<(), Error> {
        loop {
            match self.connection.receive(&mut self.rx)? {
                Received::Need(_) => self.read().await?,
                Received::Wait => break,
                Received::Record { used, event: Event::Progress } => drop(self.rx.drain(..used)),
                Received::Record { .. } => return Err(Error::Decode),
            }
        }
        happens().await;
        let mut out = [0; 256];
        let len = self.connection.transmit(&mut out)?;
        assert!(len > 0, "the server has resumed");
        self.write(&out[..len]).await;
        Ok(())
    }

    /// The channel that this connection issued, once.
    pub fn take_channel(&mut self) -> Channel {
        self.connection.take_channel().expect("each connection issues one")
    }

    /// Whether a channel was resumed.
    pub fn is_resumed(&self) -> bool {
        self.connection.is_resumed()
    }

    /// A client that has sent its first record.
    pub async fn hello(node: &Node, record_limit: u16) -> Self {
        Self::begin(node, record_limit, None, None).await
    }

    /// A client that has sent its first record, with the offer of a channel.
    pub async fn offer(node: &Node, channel: Channel) -> Self {
        let id = channel.client;
        Self { id, ..Self::begin(node, RECORD_LIMIT, Some(channel), None).await }
    }

    async fn begin(node: &Node, record_limit: u16, channel: Option<Channel>, puzzle: Option<&Puzzle>) -> Self {
        Self::dial(node.address, node.server.fingerprint(), record_limit, channel, puzzle).await
    }

    /// Runs the handshake with a server process, whose key is [`keys::server`].
    pub async fn connect_to(
        address: SocketAddr,
        credentials: &Credentials<'_>,
        key: &IdentityKey,
    ) -> Result<Self, Error> {
        let mut client = Self::dial(address, keys::server().fingerprint(), RECORD_LIMIT, None, None).await;
        client.id = match credentials {
            Credentials::Key { id, .. } | Credentials::Enroll { id, .. } => *id,
        };
        client.authenticate(credentials, key).await?;
        client.settle().await?;
        Ok(client)
    }

    /// A client that has solved this puzzle and sent its first record, with the offer of a channel if it has one.
    pub async fn work(node: &Node, puzzle: &Puzzle, channel: Option<Channel>) -> Self {
        Self::begin(node, RECORD_LIMIT, channel, Some(puzzle)).await
    }

    /// The puzzle that the server has set, in the place of an answer.
    pub async fn puzzle(&mut self) -> Puzzle {
        let error = loop {
            match self.connection.receive(&mut self.rx) {
                Ok(Received::Need(_)) => self.read().await.expect("the server asks for work"),
                Ok(_) => panic!("the server answers"),
                Err(error) => break error,
            }
        };
        assert_eq!(error, PeerError::Retry.into());
        self.connection.puzzle().expect("what it wants")
    }

    async fn dial(
        address: SocketAddr,
        server: [u8; 32],
        record_limit: u16,
        channel: Option<Channel>,
        puzzle: Option<&Puzzle>,
    ) -> Self {
        let mut seed = [0; 64];
        getrandom::fill(&mut seed).expect("the system has randomness");
        let server = Some(server);
        let config = ClientConfig { server, ask_for_key: false, record_limit };
        let mut connection = match channel {
            Some(channel) => Connection::resume(config, channel, &seed).expect("the channel is this server's"),
            None => Connection::client(config, &seed),
        };
        if let Some(puzzle) = puzzle {
            connection.present(puzzle).expect("it has not begun");
            while connection.solve() {}
        }
        Self::dial_as(address, connection).await
    }

    async fn dial_as(address: SocketAddr, mut connection: Connection) -> Self {
        let mut stream = within(TcpStream::connect(address)).await.expect("the server accepts");
        stream.set_nodelay(true).expect("a socket takes options");
        let mut out = vec![0; 512];
        let len = connection.transmit(&mut out).expect("there is room");
        stream.write_all(&out[..len]).await.expect("the server reads");
        out.truncate(len);
        Self {
            id: [0; 16],
            settings: Settings::default(),
            connection,
            stream,
            renewals: 0,
            waited: Vec::new(),
            acknowledges: true,
            hello: out,
            rx: Vec::new(),
        }
    }

    /// A client that has sent its first record, and takes whoever answers for its server.
    pub async fn hello_to_anyone(node: &Node) -> Self {
        let config = ClientConfig { server: None, ask_for_key: true, record_limit: RECORD_LIMIT };
        Self::dial_as(node.address, Connection::client(config, &[7; 64])).await
    }

    /// Verifies the server and sends {ClientAuth}.
    pub async fn authenticate(&mut self, credentials: &Credentials<'_>, key: &IdentityKey) -> Result<(), Error> {
        self.verify_server().await?;
        self.connection.verified(credentials)?;
        let Some(Ask::Sign(statement)) = self.connection.ask() else { panic!("the client must sign") };
        let signature = key.sign(&statement).expect("the key signs");
        let mut out = vec![0; 2048];
        let len = self.connection.sign_client(credentials, &signature, &mut out)?;
        self.write(&out[..len]).await;
        Ok(())
    }

    /// Verifies the server and sends {ClientAuth} of a login.
    pub async fn log_in(&mut self, login: &Login<'_>, key: &IdentityKey) -> Result<(), Error> {
        self.verify_server().await?;
        self.connection.verified_for_login(login)?;
        let Some(Ask::Sign(statement)) = self.connection.ask() else { panic!("the client must sign") };
        let signature = key.sign(&statement).expect("the key signs");
        let mut out = vec![0; 2048];
        let len = self.connection.sign_login(login, &signature, &mut out)?;
        self.write(&out[..len]).await;
        Ok(())
    }

    async fn verify_server(&mut self) -> Result<(), Error> {
        let server = keys::server();
        loop {
            match self.connection.receive(&mut self.rx)? {
                Received::Need(_) => self.read().await?,
                // The channel was resumed: there is nothing to verify.
                Received::Wait => return Err(Error::Decode),
                Received::Record { used, event } => {
                    let verified = match event {
                        Event::CheckServer(claim) => {
                            assert!(verify(server.modulus(), &claim.statement, claim.signature), "the pinned server");
                            true
                        }
                        _ => false,
                    };
                    self.rx.drain(..used);
                    if verified {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Waits for the settings.
    pub async fn settle(&mut self) -> Result<(), Error> {
        loop {
            match self.connection.receive(&mut self.rx)? {
                Received::Need(_) => self.read().await?,
                Received::Record { used, event: Event::Connected(settings) } => {
                    self.rx.drain(..used);
                    self.settings = settings;
                    return Ok(());
                }
                _ => panic!("settings, a refusal or nothing"),
            }
        }
    }

    async fn read(&mut self) -> Result<(), Error> {
        let mut bytes = [0; 4096];
        // A reset is an end like any other.
        match within(self.stream.read(&mut bytes)).await.unwrap_or(0) {
            0 => Err(PeerError::Truncated.into()),
            len => {
                self.rx.extend_from_slice(&bytes[..len]);
                Ok(())
            }
        }
    }

    /// Writes bytes as they are.
    pub async fn write(&mut self, bytes: &[u8]) {
        // A server that has gone is noticed by reading.
        let _ = within(self.stream.write_all(bytes)).await;
    }

    /// The record of `message`, not yet written.
    pub fn sealed(&mut self, message: &Message<'_>) -> Vec<u8> {
        let mut out = vec![0; 70_000];
        let len = self.connection.send(message, &mut out).expect("the message fits");
        out.truncate(len);
        out
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &Message<'_>) {
        let record = self.sealed(message);
        self.write(&record).await;
    }

    /// The next message, close or end. Signs of life are answered on the way, and what had waited is acknowledged.
    pub async fn hear(&mut self) -> Heard {
        let mut waited = None;
        loop {
            let heard = self.hear_next().await;
            if let Heard::Message(payload) = &heard {
                match Message::decode(payload) {
                    Ok(Message::Status { request }) => {
                        self.send(&Message::StatusResponse { request }).await;
                        continue;
                    }
                    Ok(Message::Waited { seq, .. }) => {
                        assert_eq!(waited.replace(seq), None, "something stands between two announcements");
                        continue;
                    }
                    Ok(message) => {
                        let in_group = [Invite::CODE, MemberChanged::CODE, Closed::CODE, ToldBy::CODE];
                        let is_delivery = match &message {
                            Message::Deliver { .. } | Message::WrapDelivery { .. } | Message::Told(_) => true,
                            Message::Other(body) => in_group.contains(&body.code()),
                            _ => false,
                        };
                        assert!(is_delivery || waited.is_none(), "{message:?} cannot have waited");
                    }
                    Err(_) => {}
                }
            }
            if let Some(seq) = waited {
                self.waited.push(seq);
                if self.acknowledges {
                    self.send(&Message::Acknowledge { seq }).await;
                }
            }
            return heard;
        }
    }

    /// The next message, close or end, and no answer to anything.
    pub async fn hear_next(&mut self) -> Heard {
        loop {
            let (used, heard) = match self.connection.receive(&mut self.rx) {
                // Behind the server's close there is nothing to wait for but the end.
                Ok(Received::Need(_) | Received::Wait) => match self.read().await {
                    Ok(()) => continue,
                    Err(_) => return Heard::Ended,
                },
                Ok(Received::Record { used, event: Event::Message(payload) }) => {
                    (used, Heard::Message(payload.to_vec()))
                }
                Ok(Received::Record { used, event: Event::Closed(reason) }) => (used, Heard::Closed(reason)),
                Ok(Received::Record { used, event: Event::Progress }) => {
                    self.renewals += 1;
                    self.rx.drain(..used);
                    continue;
                }
                other => panic!("an unexpected event or error: {:?}", other.err()),
            };
            self.rx.drain(..used);
            return heard;
        }
    }

    /// The next message's payload, which comes within four times [`DEADLINE`].
    pub async fn message(&mut self) -> Vec<u8> {
        match tokio::time::timeout(DEADLINE * 4, self.hear()).await.expect("a message comes in time") {
            Heard::Message(payload) => payload,
            other => panic!("a message instead of {other:?}"),
        }
    }

    /// The next message, which must be a receipt.
    pub async fn told(&mut self) -> Receipt {
        let payload = self.message().await;
        match Message::decode(&payload) {
            Ok(Message::Told(receipt)) => receipt,
            other => panic!("a receipt instead of {other:?}"),
        }
    }

    /// Asks for a sign of life and returns what comes: an answer, or the end.
    pub async fn ask_alive(&mut self) -> Heard {
        self.send(&Message::Status { request: 4711 }).await;
        self.hear().await
    }

    /// Sends a request and returns what comes back.
    pub async fn ask(&mut self, message: &Message<'_>) -> Vec<u8> {
        self.send(message).await;
        self.message().await
    }

    /// Sends a request that is refused.
    pub async fn refusal(&mut self, message: &Message<'_>) -> Reason {
        let answer = self.ask(message).await;
        match Message::decode(&answer) {
            Ok(Message::Refused { reason, .. }) => reason,
            other => panic!("a refusal instead of {other:?}"),
        }
    }

    /// Sends a request that is done.
    pub async fn done(&mut self, message: &Message<'_>) {
        let answer = self.ask(message).await;
        assert!(matches!(Message::decode(&answer), Ok(Message::Done { .. })), "{:?}", Message::decode(&answer));
    }

    /// Asks for a sign of life: when it has come, everything sent before was dealt with.
    pub async fn sync(&mut self) {
        let answer = self.ask(&Message::Status { request: 0xbeef }).await;
        assert_eq!(Message::decode(&answer), Ok(Message::StatusResponse { request: 0xbeef }));
    }

    /// Takes messages from now on.
    pub async fn listen(&mut self) {
        self.send(&Message::Listening).await;
        self.sync().await;
    }

    /// Sends an envelope that only a server would take for one.
    pub async fn say(&mut self, chain: u8, n: u32, wanted: Rungs) {
        self.send(&Message::Send { wanted, envelope: &envelope(chain, n, ENVELOPE_OVERHEAD + 12) }).await;
    }

    /// Closes, and waits for the server's close.
    pub async fn close(mut self) {
        let mut out = [0; 64];
        let len = self.connection.close(None, &mut out).expect("an open connection closes");
        self.write(&out[..len]).await;
        loop {
            match self.hear().await {
                Heard::Message(_) => {}
                Heard::Closed(reason) => {
                    assert_eq!(reason, None);
                    return;
                }
                Heard::Ended => panic!("the server closes, too"),
            }
        }
    }
}

/// Bytes that a server takes for an envelope.
pub fn envelope(chain: u8, n: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    bytes[..8].copy_from_slice(&[chain; 8]);
    bytes[8..12].copy_from_slice(&n.to_be_bytes());
    bytes
}

/// Bytes that a server takes for the wrap of a chain.
pub fn wrap(chain: u8) -> Vec<u8> {
    let mut bytes = vec![0xdd; WRAP_LEN];
    bytes[16..24].copy_from_slice(&[chain; 8]);
    bytes
}

/// The keys of this client's bundles, with this prekey id.
pub fn bundle_keys(number: u8, prekey_id: u32) -> BundleKeys {
    BundleKeys::new(
        ossicle_core::ExchangeKey::new(Secret::new([number; 32])),
        ossicle_core::ExchangeKey::new(Secret::new([number ^ 0x55; 32])),
        prekey_id,
        ossicle_core::SigningKey::new(Secret::new([number ^ 0xaa; 32])),
    )
}

/// What this client says to everybody under this number, signed by the key of its bundles, for the servers of the tests.
pub fn post(number: u8, key: &IdentityKey, count: u64, body: &[u8]) -> Saying {
    let author = Member { id: [number; 16], key: key.fingerprint() };
    let mut saying =
        Saying { number: count, at: count ^ 0x5a5a, epoch: 1, kind: 0, signature: [0; 64], body: body.to_vec() };
    let network = keys::server().fingerprint();
    saying.signature = saying.post().sign(&network, &author, &bundle_keys(number, 1)).unwrap_or([0; 64]);
    saying
}

/// The fields of a post, which owns its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saying {
    /// The author's count.
    pub number: u64,
    /// When, as the author says.
    pub at: u64,
    /// The epoch of the bundle.
    pub epoch: u32,
    /// The application's kind.
    pub kind: u8,
    /// The author's signature.
    pub signature: [u8; 64],
    /// What is said.
    pub body: Vec<u8>,
}

impl Saying {
    /// As it is sent.
    pub fn post(&self) -> Post<'_> {
        let Self { number, at, epoch, kind, signature, body } = self;
        Post { number: *number, at: *at, epoch: *epoch, kind: *kind, signature: Fixed(signature), body }
    }

    /// The payload of the request.
    pub fn say(&self, request: u16) -> Vec<u8> {
        let (mut scratch, mut payload) = (vec![0; 2048], vec![0; 2048]);
        let message = Say { request, post: self.post() }.encode(&mut scratch).expect("room");
        let len = message.encode(&mut payload).expect("room");
        payload.truncate(len);
        payload
    }
}

/// A client's bundle and its signature.
pub struct Published {
    /// The bundle.
    pub bundle: Vec<u8>,
    /// The signature.
    pub signature: Vec<u8>,
}

impl Published {
    /// A right bundle of this client.
    pub fn new(number: u8, key: &IdentityKey, epoch: u32) -> Self {
        let keys = bundle_keys(number, epoch);
        let member = Member { id: [number; 16], key: key.fingerprint() };
        Self::sign(&keys.bundle(&member, epoch, [0; 32]), key)
    }

    /// Any bundle, signed by any key.
    pub fn sign(bundle: &Bundle, key: &IdentityKey) -> Self {
        let signature = key.sign(&bundle.statement()).expect("the key signs");
        Self { bundle: bundle.encode().to_vec(), signature }
    }

    /// As it is sent.
    pub fn signed(&self) -> SignedBundle<'_> {
        SignedBundle { bundle: &self.bundle, signature: &self.signature }
    }
}
