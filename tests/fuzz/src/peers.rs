//! The two ends of a connection as targets drive them: a client and a server that answer what their engine asks, note what
//! they are told, and check what must always hold.

use ossicle_core::{
    Ask, Channel, ClaimKind, ClientClaim, ClientConfig, Connection, Credentials, Error, Event, HEADER_LEN, Login,
    MAX_RECORD_LEN, Message, Password, PeerError, PublicKey, Puzzle, Reason, Received, Secret, ServerConfig, Settings,
    Statement, Token, token_verifier,
};

use crate::script::seed;
use crate::{Reached, keys};

/// The server's id.
pub const SERVER_ID: [u8; 16] = [0x5e; 16];
/// The client's id.
pub const CLIENT_ID: [u8; 16] = [0xc1; 16];
/// Admits a new client.
const TOKEN: Token = Token { id: [7; 8], secret: Secret::new([9; 16]) };
/// A name that a new client wants.
const NAME: &str = "sensor-01";
/// The password of an account.
const PASSWORD: &[u8] = b"correct horse";
/// Room for whatever one call appends.
const ROOM: usize = 4096;

/// The cookie of a busy server.
const COOKIE: &[u8] = b"a cookie";
/// The zero bits that it asks for.
const BITS: u8 = 4;

/// A HelloRetry that asks for so many bits, without its header.
pub fn asked(bits: u8) -> Vec<u8> {
    [&[bits, 8], COOKIE].concat()
}

/// What a client was asked for before.
fn puzzle() -> Puzzle {
    let config = ClientConfig { server: None, ask_for_key: true, record_limit: 16_408 };
    let mut client: Connection = Connection::client(config, &seed(9));
    client.transmit(&mut [0; 256]).expect("room");
    let mut record = [&[1, 0, 1, 0x20, 0, 18, 0, 0][..], &asked(BITS)].concat();
    assert!(client.receive(&mut record).is_err());
    client.puzzle().expect("what was asked for")
}

/// A signature by the owner of `key`, without the time that RSA takes: the engine only carries it. Nothing else gives these
/// bytes, unless cryptography is the stub: then they are a constant.
fn sign(key: PublicKey<'_>, statement: &Statement, is_stub: bool) -> Vec<u8> {
    let digest = if is_stub { [0x53; 32] } else { statement.digest() };
    let mask = |byte: usize| if is_stub { 0 } else { key.modulus()[byte % 32] };
    (0..key.signature_len()).map(|index| digest[index % 32] ^ mask(index)).collect()
}

/// The channel that both ends keep before a resumption.
pub fn channel() -> Channel {
    Channel {
        id: [0xcc; 16],
        secret: Secret::new([0x77; 32]),
        client: CLIENT_ID,
        client_key: keys::alice().public().fingerprint(),
        key_epoch: 0,
        server: SERVER_ID,
        server_key: keys::server().public().fingerprint(),
    }
}

/// How an end behaves.
#[derive(Clone, Copy, Default)]
pub struct Options {
    /// Cryptography is the stub.
    pub stub: bool,
    /// Records are given to the engine in as few bytes as it asks for.
    pub chunked: bool,
    /// Client: enrol, with a token. Server: refuse whoever comes.
    pub other_way: bool,
    /// Client: enter an account by its password.
    pub login: bool,
    /// Client: ask for the server's key.
    pub ask_for_key: bool,
    /// Client: trust any key.
    pub trust: bool,
    /// Client: it was asked for work before, and has done it. Server: strangers have to work.
    pub work: bool,
}

enum Role {
    Client,
    Server {
        /// The channel that can be resumed.
        held: Option<Channel>,
    },
}

/// One end.
pub struct Peer {
    role: Role,
    options: Options,
    /// The engine.
    pub connection: Connection,
    rx: Vec<u8>,
    /// What was written and not taken yet.
    pub tx: Vec<u8>,
    /// The payloads that came.
    pub received: Vec<Vec<u8>>,
    /// The peer has closed.
    pub closed: bool,
    /// Why the engine gave up.
    pub failure: Option<Error>,
    /// What the handshake issued.
    pub issued: Option<Channel>,
    /// The handshake had finished.
    pub was_connected: bool,
}

impl Peer {
    /// A client's end that has said hello; with a channel, one that offers it.
    pub fn client(options: Options, channel: Option<Channel>, number: u8) -> Self {
        let server = (!options.trust).then(|| keys::server().public().fingerprint());
        let config = ClientConfig { server, ask_for_key: options.ask_for_key || options.trust, record_limit: 16_408 };
        let mut connection = match channel {
            None => Connection::client(config, &seed(number)),
            Some(channel) => Connection::resume(config, channel, &seed(number)).expect("the pinned server's channel"),
        };
        if options.work {
            connection.present(&puzzle()).expect("it has not begun");
            while connection.solve() {}
        }
        let mut peer = Self::new(Role::Client, options, connection);
        peer.transmit();
        peer
    }

    /// A server's end, with the channel that it would resume.
    pub fn server(options: Options, held: Option<Channel>, number: u8) -> Self {
        let fingerprint = keys::server().public().fingerprint();
        let config = ServerConfig { id: SERVER_ID, fingerprint, record_limit: 16_408 };
        let mut connection = Connection::server(config, &seed(number));
        if options.work {
            connection.demand_work();
        }
        Self::new(Role::Server { held }, options, connection)
    }

    fn new(role: Role, options: Options, connection: Connection) -> Self {
        let (rx, tx, received) = (Vec::new(), Vec::new(), Vec::new());
        let (closed, failure, issued, was_connected) = (false, None, None, false);
        Self { role, options, connection, rx, tx, received, closed, failure, issued, was_connected }
    }

    /// Takes bytes from the peer and does what follows.
    pub fn feed(&mut self, bytes: &[u8], reached: Reached<'_>) {
        if self.failure.is_some() {
            return;
        }
        self.rx.extend_from_slice(bytes);
        let mut rx = core::mem::take(&mut self.rx);
        let mut at = 0;
        while let Some(used) = self.record(&mut rx[at..], reached) {
            at += used;
        }
        rx.drain(..at);
        self.rx = rx;
    }

    /// Opens the record at the front of `data` and returns its length; `None` if there is nothing more to do with it.
    fn record(&mut self, data: &mut [u8], reached: Reached<'_>) -> Option<usize> {
        if self.failure.is_some() {
            return None;
        }
        let available = data.len();
        let mut given = if self.options.chunked { 0 } else { available };
        loop {
            match self.connection.receive(&mut data[..given]) {
                Ok(Received::Need(len)) => {
                    assert!(len > given && (HEADER_LEN..=MAX_RECORD_LEN).contains(&len), "{len} of {given}");
                    if len > available {
                        return None;
                    }
                    given = len;
                }
                Ok(Received::Wait) => {
                    assert!(self.closed || self.failure.is_some(), "nothing is asked that was not answered");
                    return None;
                }
                Ok(Received::Record { used, event }) => {
                    assert!(used <= given && used >= HEADER_LEN);
                    let answered = self.event(event, reached);
                    if let Err(error) = answered {
                        self.fail(error, reached);
                        return None;
                    }
                    return Some(used);
                }
                Err(error) => {
                    self.fail(error, reached);
                    return None;
                }
            }
        }
    }

    fn event(&mut self, event: Event<'_>, reached: Reached<'_>) -> Result<(), Error> {
        match event {
            Event::Progress if self.was_connected => reached("key updated"),
            Event::Progress => self.transmit(),
            Event::CheckServer(claim) => {
                reached("server's claim");
                let key = keys::server().public();
                let known = claim.fingerprint == key.fingerprint();
                assert!(self.options.trust || known, "only the pinned key is put up for verification");
                assert_eq!(claim.key.is_some(), self.options.ask_for_key || self.options.trust);
                if let Some(key) = claim.key {
                    assert_eq!(key.fingerprint(), claim.fingerprint);
                    reached("server's key");
                }
                if !known || claim.signature != sign(key, &claim.statement, self.options.stub) {
                    return Err(Error::Crypto);
                }
                assert!(self.options.stub || claim.server == SERVER_ID);
                let key = keys::alice().public();
                let fingerprint = key.fingerprint();
                if self.options.login {
                    let password = Password::new(PASSWORD).expect("a password");
                    let login = Login { id: CLIENT_ID, name: NAME, key, password };
                    if self.options.trust {
                        assert!(
                            self.connection.verified_for_login(&login).is_err(),
                            "nobody is told who was not pinned"
                        );
                        return Err(Error::Crypto);
                    }
                    self.connection.verified_for_login(&login)?;
                    let Some(Ask::Sign(statement)) = self.connection.ask() else { panic!("a signature is due") };
                    let signature = sign(key, &statement, self.options.stub);
                    self.append(|connection, out| connection.sign_login(&login, &signature, out));
                    reached("logged in");
                    return Ok(());
                }
                let credentials = if self.options.other_way {
                    Credentials::Enroll { id: CLIENT_ID, name: NAME, key, token: Some(&TOKEN) }
                } else {
                    Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint }
                };
                self.connection.verified(&credentials)?;
                let Some(Ask::Sign(statement)) = self.connection.ask() else { panic!("a signature is due") };
                let signature = sign(key, &statement, self.options.stub);
                self.append(|connection, out| connection.sign_client(&credentials, &signature, out));
            }
            Event::CheckClient(claim) => return self.check_client(claim, reached),
            Event::CheckChannel(id) => {
                let Role::Server { held } = &self.role else { panic!("only servers are offered channels") };
                let held = held.clone().filter(|channel| channel.id == id);
                let len = self.append_or(|connection, out| connection.answer_offer(held.as_ref(), out))?;
                reached(if len == 0 { "offer declined" } else { "offer taken" });
            }
            Event::Resumed => {
                reached("client returned");
                self.accept_or_refuse(reached);
            }
            Event::Connected(settings) => {
                self.connected(reached);
                assert_eq!(self.issued.is_some(), settings.valid_for > 0);
            }
            Event::Message(payload) => {
                assert!(self.was_connected && !self.closed, "no message outside of a connection");
                reached(if Message::decode(payload).is_ok() { "message" } else { "message that is none" });
                self.received.push(payload.to_vec());
            }
            Event::Closed(_) => {
                reached("closed");
                self.closed = true;
            }
            _ => panic!("an event that nobody told the targets of"),
        }
        self.judge(reached)?;
        if let (Role::Server { .. }, Some(Ask::Sign(statement))) = (&self.role, self.connection.ask()) {
            reached("server signs");
            let key = keys::server().public();
            let signature = sign(key, &statement, self.options.stub);
            self.append(|connection, out| connection.sign_server(key, &signature, out));
        }
        Ok(())
    }

    /// What a stranger shows to a busy server.
    fn judge(&mut self, reached: Reached<'_>) -> Result<(), Error> {
        let Some(presented) = self.connection.presented() else { return Ok(()) };
        assert!(self.options.work && self.connection.ask().is_none(), "nothing is signed before the verdict");
        assert!(presented.cookie().len() <= 40);
        if presented.cookie() == COOKIE && presented.is_solved(BITS) {
            reached("work taken");
            return self.connection.admit();
        }
        reached("work asked for");
        self.append(|connection, out| connection.retry(COOKIE, BITS, out));
        assert!(self.connection.admit().is_err(), "a retry is the end");
        self.failure = Some(PeerError::Retry.into());
        Ok(())
    }

    fn check_client(&mut self, claim: ClientClaim<'_>, reached: Reached<'_>) -> Result<(), Error> {
        let claim = ClientClaim::decode(claim.bytes()).expect("a claim outlives its record");
        let key = keys::alice().public();
        let bound = match claim.kind() {
            ClaimKind::Key { .. } => {
                reached("claim by key");
                self.connection.bind(&claim, &key.fingerprint())
            }
            ClaimKind::Enroll { name, key, token } => {
                reached("claim by enrolment");
                assert!(!name.is_empty() && name.len() <= 64);
                let bound = self.connection.bind(&claim, &key.fingerprint());
                assert!(bound.is_ok(), "a claim with its own key was checked when it came");
                if token == Some(TOKEN.id) && self.connection.proves(&claim, token_verifier(&TOKEN.secret).expose()) {
                    reached("token proved");
                }
                bound
            }
            ClaimKind::Password { name, key, password } => {
                reached("claim by password");
                assert!(!name.is_empty() && name.len() <= 64);
                assert!((1..=128).contains(&password.expose().len()));
                let bound = self.connection.bind(&claim, &key.fingerprint());
                assert!(bound.is_ok(), "a claim with its own key was checked when it came");
                assert!(!self.connection.proves(&claim, token_verifier(&TOKEN.secret).expose()), "it has no token");
                bound
            }
            _ => panic!("a claim that nobody told the targets of"),
        };
        let valid = bound.is_ok_and(|statement| claim.signature() == sign(key, &statement, self.options.stub));
        if valid {
            assert!(self.options.stub || claim.id() == CLIENT_ID, "nobody else has this key");
            self.accept_or_refuse(reached);
        } else {
            reached("claim not proved");
            assert!(
                bound.is_ok() || self.connection.accept(&settings(), &mut [0; ROOM]).is_err(),
                "an unbound claim is not accepted"
            );
            self.refuse(Reason::Unauthorised);
        }
        Ok(())
    }

    fn accept_or_refuse(&mut self, reached: Reached<'_>) {
        if self.options.other_way {
            reached("refused");
            return self.refuse(Reason::Forbidden);
        }
        self.append(|connection, out| connection.accept(&settings(), out));
        self.connected(reached);
    }

    fn refuse(&mut self, reason: Reason) {
        self.append(|connection, out| connection.refuse(reason, 250, out));
        assert!(self.connection.send(&Message::Listening, &mut [0; ROOM]).is_err(), "a refusal is the end");
        self.failure = Some(PeerError::Refused { reason, retry_after: 250 }.into());
    }

    fn connected(&mut self, reached: Reached<'_>) {
        assert!(self.connection.is_connected() && !self.was_connected);
        self.was_connected = true;
        self.issued = self.connection.take_channel();
        assert!(self.connection.take_channel().is_none(), "a channel is issued once");
        reached(if self.connection.is_resumed() { "resumption finished" } else { "handshake finished" });
    }

    /// Sends, where the engine lets it; returns the payload that is under way.
    pub fn send(&mut self, message: &Message<'_>) -> Option<Vec<u8>> {
        let (mut out, mut payload) = ([0; ROOM], [0; ROOM]);
        let len = self.connection.send(message, &mut out).ok()?;
        self.tx.extend_from_slice(&out[..len]);
        let len = message.encode(&mut payload).expect("it was encoded before");
        Some(payload[..len].to_vec())
    }

    /// Replaces the key of this direction, where the engine lets it.
    pub fn update_key(&mut self) {
        let mut out = [0; ROOM];
        if let Ok(len) = self.connection.update_key(&mut out) {
            self.tx.extend_from_slice(&out[..len]);
        }
    }

    /// Closes, where the engine lets it.
    pub fn close(&mut self) -> bool {
        let mut out = [0; ROOM];
        let closed = self.connection.close(Some(Reason::Unavailable), &mut out);
        if let Ok(len) = closed {
            self.tx.extend_from_slice(&out[..len]);
        }
        closed.is_ok()
    }

    /// The transport has ended.
    pub fn end(&mut self, reached: Reached<'_>) {
        match self.connection.end_of_stream() {
            Ok(()) => assert!(self.closed || self.failure.is_some(), "an end without a close or a refusal is a cut"),
            Err(error) => {
                assert!(!self.closed || self.failure.is_some());
                if self.failure.is_none() {
                    assert_eq!(error, PeerError::Truncated.into());
                    self.fail(error, reached);
                }
            }
        }
    }

    /// What the engine owes.
    fn transmit(&mut self) {
        self.append(Connection::transmit);
    }

    fn append(&mut self, write: impl FnOnce(&mut Connection, &mut [u8]) -> Result<usize, Error>) {
        self.append_or(write).expect("what was asked for is taken");
    }

    fn append_or(
        &mut self,
        write: impl FnOnce(&mut Connection, &mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let mut out = [0; ROOM];
        let len = write(&mut self.connection, &mut out)?;
        self.tx.extend_from_slice(&out[..len]);
        Ok(len)
    }

    fn fail(&mut self, error: Error, reached: Reached<'_>) {
        reached(match error {
            Error::Decode => "malformed",
            Error::Crypto => "not authentic",
            Error::Peer(PeerError::Busy) => "asked again",
            Error::Peer(PeerError::Puzzle { .. }) => "asked for too much work",
            Error::Peer(PeerError::Retry) => "asked for work",
            Error::Peer(PeerError::Truncated) => "truncated",
            Error::Peer(PeerError::Refused { .. }) => "refused by the server",
            Error::Peer(PeerError::ServerKey) => "another server's key",
            Error::Peer(PeerError::UnexpectedMessage) => "out of order",
            Error::Peer(PeerError::Version) => "nothing in common",
            other => panic!("an error that no peer can cause: {other:?}"),
        });
        assert_eq!(self.connection.puzzle().is_some(), error == PeerError::Retry.into());
        self.failure = Some(error);
        // A signature that was not right is found out here and not in the engine: whoever drives it drops it.
        if let Err(sticky) = self.connection.receive(&mut [0; 8]) {
            assert_eq!(sticky, error);
            assert_eq!(self.connection.send(&Message::Listening, &mut [0; ROOM]), Err(error), "a failure is final");
            assert!(!self.connection.is_connected());
            assert!(self.connection.exporter().is_err(), "its keys are erased");
        }
    }
}

/// The settings that a server sends.
fn settings() -> Settings {
    Settings { channel: [0xdd; 16], valid_for: 604_800, heartbeat: 15, timeout: 45, ..Settings::default() }
}

/// Runs two ends against each other and returns the bytes that went up and down.
pub fn converse(client: &mut Peer, server: &mut Peer) -> (Vec<u8>, Vec<u8>) {
    let (mut up, mut down) = (Vec::new(), Vec::new());
    while !client.tx.is_empty() || !server.tx.is_empty() {
        let bytes = core::mem::take(&mut client.tx);
        server.feed(&bytes, &mut crate::ignore);
        up.extend(bytes);
        let bytes = core::mem::take(&mut server.tx);
        client.feed(&bytes, &mut crate::ignore);
        down.extend(bytes);
    }
    (up, down)
}
