//! Recorded handshakes, and either side of them in each of its states.
//!
//! Everything repeats itself: seeds are fixed, and so is what stands for a signature. A victim is made anew for each hostile
//! case, in the time of a few curve operations.

use core::marker::PhantomData;
use std::collections::HashMap;
use std::sync::LazyLock;

use ossicle::crypto::IdentityKey;
use ossicle_core::{
    Aead, Ask, Channel, ClientConfig, Connection, Credentials, Error, Event, Login, Message, NONCE_LEN, Password,
    PeerError, PublicKey, Reason, Received, RustCrypto, Secret, ServerConfig, Settings, Statement, TAG_LEN, Token,
    generator_seed,
};
use ossicle_tests::{CLIENT_ID, SERVER_ID, keys, public, seed, settings};

/// A seal that hides nothing and checks nothing: whoever speaks through it can say what only a peer with the keys could.
/// What stands behind the decryption is reached with it.
pub(crate) struct Clear;

impl Aead for Clear {
    fn new(_: &[u8; 32]) -> Self {
        Self
    }

    fn seal(&self, _: &[u8; NONCE_LEN], _: &[u8], _: &mut [u8]) -> Result<[u8; TAG_LEN], Error> {
        Ok([0; TAG_LEN])
    }

    fn open(&self, _: &[u8; NONCE_LEN], _: &[u8], _: &mut [u8], _: &[u8; TAG_LEN]) -> Result<(), Error> {
        Ok(())
    }
}

pub(crate) static SERVER: LazyLock<IdentityKey> = LazyLock::new(keys::server);
pub(crate) static ALICE: LazyLock<IdentityKey> = LazyLock::new(keys::alice);

pub(crate) static TOKEN: Token = Token { id: [7; 8], secret: Secret::new([9; 16]) };
pub(crate) const NAME: &str = "sensor-00001";
pub(crate) const PASSWORD: &[u8] = b"correct horse";
pub(crate) const LIMIT: u16 = 16_408;
/// The channel that the sessions offer, and the one that their settings issue.
pub(crate) const OFFERED: [u8; 16] = [0xa5; 16];
pub(crate) const ISSUED: [u8; 16] = [0x3c; 16];

/// What stands for a signature of this statement: the same bytes for the same statement in each run. The engine asks for
/// signatures and for verdicts on them, and cannot tell; where the verdict matters a real one is made.
pub(crate) fn stand_in(statement: &Statement) -> Vec<u8> {
    (0..8).flat_map(|part| *generator_seed(&statement.digest(), &[part]).expose()).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// The handshakes that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// An enrolled client that holds the server's key.
    Key,
    /// An enrolled client that asks for it.
    Asked,
    /// First contact: with the server's key, a new client key and a token.
    Enroll,
    /// An account that is entered by its password.
    Password,
    /// A channel that both still have.
    Resumed,
    /// A channel that the server has no more: the full handshake, mode 2.
    Unauthorised,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Key, Self::Asked, Self::Enroll, Self::Password, Self::Resumed, Self::Unauthorised];

    pub(crate) const fn offers(self) -> bool {
        matches!(self, Self::Resumed | Self::Unauthorised)
    }

    pub(crate) const fn asks(self) -> bool {
        matches!(self, Self::Asked | Self::Enroll)
    }

    pub(crate) const fn is_full(self) -> bool {
        !matches!(self, Self::Resumed)
    }

    /// Bytes of the records of its handshake, refusal last (PROTOCOL 3).
    pub(crate) const fn lengths(self) -> [usize; 6] {
        let hello = if self.offers() { 132 } else { 84 };
        let (server, client) = match self {
            Self::Key | Self::Unauthorised => (328, 335),
            Self::Asked => (622, 335),
            Self::Enroll => (622, 24 + 1 + 16 + 1 + NAME.len() + 294 + 8 + 2 + 32 + 256 + 32),
            Self::Password => (328, 24 + 1 + 16 + 1 + NAME.len() + 294 + 2 + 1 + 128 + 256 + 32),
            Self::Resumed => (56, 58),
        };
        [hello, 79, server, client, 24 + 2 + 16 + 3 + 1 + 1 + 5 + 1 + 8, 29]
    }
}

/// The records of a session, in their order; the refusal comes in the place of the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Name {
    ClientHello,
    ServerHello,
    ServerAuth,
    ClientAuth,
    Settings,
    /// `Status` and its answer.
    Question,
    Answer,
    /// The client's key update, and what it says under the new key.
    KeyUpdate,
    Listening,
    ServerClose,
    ClientClose,
    Refusal,
}

impl Name {
    pub(crate) const ALL: [Self; 12] = [
        Self::ClientHello,
        Self::ServerHello,
        Self::ServerAuth,
        Self::ClientAuth,
        Self::Settings,
        Self::Question,
        Self::Answer,
        Self::KeyUpdate,
        Self::Listening,
        Self::ServerClose,
        Self::ClientClose,
        Self::Refusal,
    ];

    pub(crate) const HANDSHAKE: [Self; 6] =
        [Self::ClientHello, Self::ServerHello, Self::ServerAuth, Self::ClientAuth, Self::Settings, Self::Refusal];

    pub(crate) const fn from(self) -> Side {
        match self {
            Self::ClientHello
            | Self::ClientAuth
            | Self::Question
            | Self::KeyUpdate
            | Self::Listening
            | Self::ClientClose => Side::Client,
            _ => Side::Server,
        }
    }

    pub(crate) const fn is_sealed(self) -> bool {
        !matches!(self, Self::ClientHello | Self::ServerHello)
    }

    /// The state in which its receiver waits for it.
    pub(crate) const fn awaited_in(self) -> Stage {
        match self {
            Self::ClientHello => Stage::AwaitClientHello,
            Self::ServerHello => Stage::AwaitServerHello,
            Self::ServerAuth => Stage::AwaitServerAuth,
            Self::ClientAuth => Stage::AwaitClientAuth,
            Self::Settings | Self::Refusal => Stage::AwaitSettings,
            Self::Question | Self::KeyUpdate | Self::Listening | Self::ClientClose => Stage::Established(Side::Server),
            Self::Answer | Self::ServerClose => Stage::Established(Side::Client),
        }
    }
}

/// The states of both sides, those behind the handshake for each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    Start,
    AwaitServerHello,
    AwaitServerAuth,
    /// Full: the server's claim is open.
    VerifyServer,
    /// Full: the client's signature is asked for.
    SignClient,
    /// Resumed: the client's Finished is owed.
    OweFinished,
    AwaitSettings,
    AwaitClientHello,
    /// Offered: the channel is asked for.
    CheckChannel,
    /// Full: the server's signature is asked for.
    SignServer,
    AwaitClientAuth,
    /// Full: the client's claim is open, and then bound.
    CheckClient,
    Bound,
    /// Resumed: the client's Finished was right.
    Returned,
    Established(Side),
    /// This side has said its last; the other has; both have.
    Closed(Side),
    PeerClosed(Side),
    BothClosed(Side),
    /// Ended by a refusal.
    Refused(Side),
    /// Ended by the end of the stream.
    Failed(Side),
}

impl Stage {
    pub(crate) const ALL: [Self; 26] = [
        Self::Start,
        Self::AwaitServerHello,
        Self::AwaitServerAuth,
        Self::VerifyServer,
        Self::SignClient,
        Self::OweFinished,
        Self::AwaitSettings,
        Self::AwaitClientHello,
        Self::CheckChannel,
        Self::SignServer,
        Self::AwaitClientAuth,
        Self::CheckClient,
        Self::Bound,
        Self::Returned,
        Self::Established(Side::Client),
        Self::Established(Side::Server),
        Self::Closed(Side::Client),
        Self::Closed(Side::Server),
        Self::PeerClosed(Side::Client),
        Self::PeerClosed(Side::Server),
        Self::BothClosed(Side::Client),
        Self::BothClosed(Side::Server),
        Self::Refused(Side::Client),
        Self::Refused(Side::Server),
        Self::Failed(Side::Client),
        Self::Failed(Side::Server),
    ];

    pub(crate) const fn side(self) -> Side {
        match self {
            Self::Start
            | Self::AwaitServerHello
            | Self::AwaitServerAuth
            | Self::VerifyServer
            | Self::SignClient
            | Self::OweFinished
            | Self::AwaitSettings => Side::Client,
            Self::AwaitClientHello
            | Self::CheckChannel
            | Self::SignServer
            | Self::AwaitClientAuth
            | Self::CheckClient
            | Self::Bound
            | Self::Returned => Side::Server,
            Self::Established(side)
            | Self::Closed(side)
            | Self::PeerClosed(side)
            | Self::BothClosed(side)
            | Self::Refused(side)
            | Self::Failed(side) => side,
        }
    }

    /// Whether handshakes of this kind come by it.
    pub(crate) const fn is_of(self, kind: Kind) -> bool {
        match self {
            Self::VerifyServer | Self::SignClient | Self::SignServer | Self::CheckClient | Self::Bound => {
                kind.is_full()
            }
            Self::OweFinished | Self::Returned => !kind.is_full(),
            Self::CheckChannel => kind.offers(),
            _ => true,
        }
    }

    pub(crate) fn of(kind: Kind) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |stage| stage.is_of(kind))
    }

    /// The error that an ended connection answers everything with.
    pub(crate) fn ended(self) -> Option<Error> {
        match self {
            Self::Refused(Side::Client) => Some(refused()),
            Self::Refused(Side::Server) => Some(ossicle_core::ApiMisuse::Closed.into()),
            Self::Failed(_) => Some(PeerError::Truncated.into()),
            _ => None,
        }
    }
}

pub(crate) fn refused() -> Error {
    PeerError::Refused { reason: Reason::Unauthorised, retry_after: 0x0102_0304 }.into()
}

/// What a call to `receive` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Need(usize),
    Wait,
    Fails(Error),
    Taken(Said),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Progress,
    CheckServer,
    CheckClient,
    CheckChannel,
    Resumed,
    Connected,
    Message,
    Closed,
}

pub(crate) fn receive<A: Aead>(connection: &mut Connection<A>, data: &mut [u8]) -> Verdict {
    let said = match connection.receive(data) {
        Err(error) => return Verdict::Fails(error),
        Ok(Received::Need(len)) => return Verdict::Need(len),
        Ok(Received::Wait) => return Verdict::Wait,
        Ok(Received::Record { event, .. }) => event,
    };
    Verdict::Taken(match said {
        Event::Progress => Said::Progress,
        Event::CheckServer(_) => Said::CheckServer,
        Event::CheckClient(_) => Said::CheckClient,
        Event::CheckChannel(_) => Said::CheckChannel,
        Event::Resumed => Said::Resumed,
        Event::Connected(_) => Said::Connected,
        Event::Message(_) => Said::Message,
        Event::Closed(_) => Said::Closed,
        _ => panic!("an event that these tests do not know"),
    })
}

/// A connection that has failed says the same to everything, and has nothing any more.
pub(crate) fn assert_dead<A: Aead>(connection: &mut Connection<A>, error: Error, case: &dyn core::fmt::Debug) {
    let mut out = [0; 64];
    assert_eq!(connection.transmit(&mut out), Err(error), "{case:?}");
    assert_eq!(receive(connection, &mut []), Verdict::Fails(error), "{case:?}");
    assert_eq!(connection.send(&Message::Listening, &mut out), Err(error), "{case:?}");
    // Where a server has refused, the stream's end is what is to come.
    let ends = if error == ossicle_core::ApiMisuse::Closed.into() { Ok(()) } else { Err(error) };
    assert_eq!(connection.end_of_stream(), ends, "{case:?}");
    assert_eq!(out, [0; 64], "{case:?}: not a byte for the peer");
    assert!(connection.ask().is_none() && !connection.is_connected(), "{case:?}");
    assert!(connection.exporter().is_err() && connection.take_channel().is_none(), "{case:?}");
}

/// One session as it went, and what is needed to play either side again.
pub(crate) struct Session<A> {
    pub(crate) kind: Kind,
    seeds: (u8, u8),
    /// By [`Name`].
    records: HashMap<Name, Vec<u8>>,
    sealed_by: PhantomData<A>,
}

impl<A: Aead> Session<A> {
    /// Plays a session of this kind between honest sides, and keeps what they said.
    pub(crate) fn new(kind: Kind, seeds: (u8, u8)) -> Self {
        let mut session = Self { kind, seeds, records: HashMap::new(), sealed_by: PhantomData };
        let mut out = vec![0; 4096];

        let len = session.at(Stage::Start).transmit(&mut out).unwrap();
        session.keep(Name::ClientHello, &out[..len]);
        let stage = if kind.is_full() { Stage::SignServer } else { Stage::CheckChannel };
        let mut server = session.at(stage);
        let len = session.answer_hello(&mut server, &mut out);
        session.keep(Name::ServerHello, &out[..79]);
        session.keep(Name::ServerAuth, &out[79..len]);
        let stage = if kind.is_full() { Stage::SignClient } else { Stage::OweFinished };
        let mut client = session.at(stage);
        let len = session.answer_auth(&mut client, &mut out);
        session.keep(Name::ClientAuth, &out[..len]);

        let stage = if kind.is_full() { Stage::Bound } else { Stage::Returned };
        let len = session.at(stage).refuse(Reason::Unauthorised, 0x0102_0304, &mut out).unwrap();
        session.keep(Name::Refusal, &out[..len]);
        let mut server = session.at(stage);
        let len = server.accept(&Self::settings(), &mut out).unwrap();
        session.keep(Name::Settings, &out[..len]);

        let mut client = session.at(Stage::Established(Side::Client));
        for (name, message) in [
            (Name::Question, Some(Message::Status { request: 1 })),
            (Name::KeyUpdate, None),
            (Name::Listening, Some(Message::Listening)),
        ] {
            let len = match message {
                Some(message) => client.send(&message, &mut out),
                None => client.update_key(&mut out),
            };
            session.keep(name, &out[..len.unwrap()]);
        }
        let len = client.close(None, &mut out).unwrap();
        session.keep(Name::ClientClose, &out[..len]);
        let len = server.send(&Message::StatusResponse { request: 1 }, &mut out).unwrap();
        session.keep(Name::Answer, &out[..len]);
        let len = server.close(Some(Reason::TakenOver), &mut out).unwrap();
        session.keep(Name::ServerClose, &out[..len]);

        let lengths = Name::HANDSHAKE.map(|name| session.record(name).len());
        assert_eq!(lengths, kind.lengths(), "{kind:?}: lengths are those of the specification");
        session
    }

    fn keep(&mut self, name: Name, bytes: &[u8]) {
        self.records.insert(name, bytes.to_vec());
    }

    pub(crate) fn record(&self, name: Name) -> &[u8] {
        &self.records[&name]
    }

    /// What `from` sends, in order, from its first byte to its close.
    pub(crate) fn stream(&self, from: Side) -> Vec<Name> {
        Name::ALL.into_iter().filter(|name| name.from() == from && *name != Name::Refusal).collect()
    }

    pub(crate) fn settings() -> Settings {
        Settings { channel: ISSUED, store_epoch: [9; 8], ..settings() }
    }

    /// The channel that a client of this session offers.
    pub(crate) fn channel() -> Channel {
        Channel {
            id: OFFERED,
            secret: Secret::new([0x77; 32]),
            client: CLIENT_ID,
            client_key: public(&ALICE).fingerprint(),
            key_epoch: 0,
            server: SERVER_ID,
            server_key: public(&SERVER).fingerprint(),
        }
    }

    pub(crate) fn credentials(&self) -> Credentials<'static> {
        let key: PublicKey<'static> = public(&ALICE);
        match self.kind {
            Kind::Enroll => Credentials::Enroll { id: CLIENT_ID, name: NAME, key, token: Some(&TOKEN) },
            _ => Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint: key.fingerprint() },
        }
    }

    fn login() -> Login<'static> {
        let password = Password::new(PASSWORD).unwrap();
        Login { id: CLIENT_ID, name: NAME, key: public(&ALICE), password }
    }

    /// The server's claim was verified.
    pub(crate) fn verified(&self, client: &mut Connection<A>) -> Result<(), Error> {
        match self.kind {
            Kind::Password => client.verified_for_login(&Self::login()),
            _ => client.verified(&self.credentials()),
        }
    }

    /// The client's signature is there.
    pub(crate) fn sign(&self, client: &mut Connection<A>, signature: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        match self.kind {
            Kind::Password => client.sign_login(&Self::login(), signature, out),
            _ => client.sign_client(&self.credentials(), signature, out),
        }
    }

    fn client(&self) -> Connection<A> {
        let server = Some(public(&SERVER).fingerprint());
        let config = ClientConfig { server, ask_for_key: self.kind.asks(), record_limit: LIMIT };
        let seed = seed(self.seeds.0);
        if self.kind.offers() {
            Connection::resume(config, Self::channel(), &seed).unwrap()
        } else {
            Connection::client(config, &seed)
        }
    }

    fn server(&self) -> Connection<A> {
        let config = ServerConfig { id: SERVER_ID, fingerprint: public(&SERVER).fingerprint(), record_limit: LIMIT };
        Connection::server(config, &seed(self.seeds.1))
    }

    /// The answer of an honest user of the server to whatever hello it has taken.
    pub(crate) fn answer_hello(&self, server: &mut Connection<A>, out: &mut [u8]) -> usize {
        if server.ask().is_none() {
            let held = (self.kind == Kind::Resumed).then(Self::channel);
            let len = server.answer_offer(held.as_ref(), out).unwrap();
            if len > 0 {
                return len;
            }
        }
        let Some(Ask::Sign(statement)) = server.ask() else { panic!("the server must sign") };
        // A hello that the client never sent: no signature is ever looked at, since no record opens.
        let own = self.records.contains_key(&Name::ServerAuth);
        let signature = if own { vec![0x55; 256] } else { stand_in(&statement) };
        server.sign_server(public(&SERVER), &signature, out).unwrap()
    }

    /// The answer of an honest user of the client to the server's proof.
    fn answer_auth(&self, client: &mut Connection<A>, out: &mut [u8]) -> usize {
        match client.ask() {
            Some(Ask::Sign(statement)) => self.sign(client, &stand_in(&statement), out).unwrap(),
            _ => client.transmit(out).unwrap(),
        }
    }

    /// Hands the next record to its receiver, whose honest user does what it is asked.
    pub(crate) fn play(&self, connection: &mut Connection<A>, name: Name) {
        let mut out = [0; 2048];
        let mut bytes = self.record(name).to_vec();
        let Ok(Received::Record { used, event }) = connection.receive(&mut bytes) else {
            panic!("{:?}: {name:?} is taken", self.kind)
        };
        assert_eq!(used, self.record(name).len());
        match event {
            Event::CheckServer(_) => self.verified(connection).unwrap(),
            Event::CheckClient(claim) => {
                connection.bind(&claim, &public(&ALICE).fingerprint()).unwrap();
                connection.accept(&Self::settings(), &mut out).unwrap();
            }
            Event::Resumed => {
                connection.accept(&Self::settings(), &mut out).unwrap();
            }
            Event::CheckChannel(_) => {
                let held = (self.kind == Kind::Resumed).then(Self::channel);
                connection.answer_offer(held.as_ref(), &mut out).unwrap();
            }
            _ => {}
        }
        match (connection.ask(), name.from()) {
            (Some(Ask::Sign(statement)), Side::Client) => {
                connection.sign_server(public(&SERVER), &stand_in(&statement), &mut out).unwrap();
            }
            (Some(_), Side::Server) => {
                self.answer_auth(connection, &mut out);
            }
            _ => {
                connection.transmit(&mut out).unwrap();
            }
        }
    }

    /// One side before its first byte from the other.
    pub(crate) fn listening(&self, side: Side) -> Connection<A> {
        self.at(match side {
            Side::Client => Stage::AwaitServerHello,
            Side::Server => Stage::AwaitClientHello,
        })
    }

    /// One side in this state, made anew.
    pub(crate) fn at(&self, stage: Stage) -> Connection<A> {
        assert!(stage.is_of(self.kind), "{:?} never comes by {stage:?}", self.kind);
        match stage.side() {
            Side::Client => self.client_at(stage),
            Side::Server => self.server_at(stage),
        }
    }

    fn take(&self, connection: &mut Connection<A>, name: Name, said: Said) {
        let mut bytes = self.record(name).to_vec();
        assert_eq!(receive(connection, &mut bytes), Verdict::Taken(said), "{:?}: {name:?}", self.kind);
    }

    fn client_at(&self, stage: Stage) -> Connection<A> {
        let mut out = [0; 2048];
        let mut client = self.client();
        if stage == Stage::Start {
            return client;
        }
        client.transmit(&mut out).unwrap();
        if stage == Stage::AwaitServerHello {
            return client;
        }
        self.take(&mut client, Name::ServerHello, Said::Progress);
        if stage == Stage::AwaitServerAuth {
            return client;
        }
        if self.kind.is_full() {
            self.take(&mut client, Name::ServerAuth, Said::CheckServer);
            if stage == Stage::VerifyServer {
                return client;
            }
            self.verified(&mut client).unwrap();
        } else {
            self.take(&mut client, Name::ServerAuth, Said::Progress);
        }
        if matches!(stage, Stage::SignClient | Stage::OweFinished) {
            return client;
        }
        self.answer_auth(&mut client, &mut out);
        match stage {
            Stage::AwaitSettings => return client,
            Stage::Refused(_) => {
                let mut bytes = self.record(Name::Refusal).to_vec();
                assert_eq!(receive(&mut client, &mut bytes), Verdict::Fails(refused()));
                return client;
            }
            _ => self.take(&mut client, Name::Settings, Said::Connected),
        }
        if matches!(stage, Stage::PeerClosed(_) | Stage::BothClosed(_)) {
            self.take(&mut client, Name::Answer, Said::Message);
            self.take(&mut client, Name::ServerClose, Said::Closed);
        }
        self.end(client, stage)
    }

    fn server_at(&self, stage: Stage) -> Connection<A> {
        let mut out = [0; 2048];
        let mut server = self.server();
        if stage == Stage::AwaitClientHello {
            return server;
        }
        let said = if self.kind.offers() { Said::CheckChannel } else { Said::Progress };
        self.take(&mut server, Name::ClientHello, said);
        if stage == Stage::CheckChannel {
            return server;
        }
        if self.kind.offers() {
            let held = (self.kind == Kind::Resumed).then(Self::channel);
            server.answer_offer(held.as_ref(), &mut out).unwrap();
        }
        if stage == Stage::SignServer {
            return server;
        }
        if let Some(Ask::Sign(statement)) = server.ask() {
            server.sign_server(public(&SERVER), &stand_in(&statement), &mut out).unwrap();
        }
        if stage == Stage::AwaitClientAuth {
            return server;
        }
        if self.kind.is_full() {
            if stage == Stage::CheckClient {
                self.take(&mut server, Name::ClientAuth, Said::CheckClient);
                return server;
            }
            let mut bytes = self.record(Name::ClientAuth).to_vec();
            let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut bytes) else {
                panic!("a claim")
            };
            server.bind(&claim, &public(&ALICE).fingerprint()).unwrap();
        } else {
            self.take(&mut server, Name::ClientAuth, Said::Resumed);
        }
        match stage {
            Stage::Bound | Stage::Returned => return server,
            Stage::Refused(_) => {
                server.refuse(Reason::Unauthorised, 0x0102_0304, &mut out).unwrap();
                return server;
            }
            _ => server.accept(&Self::settings(), &mut out).unwrap(),
        };
        if matches!(stage, Stage::PeerClosed(_) | Stage::BothClosed(_)) {
            self.take(&mut server, Name::Question, Said::Message);
            self.take(&mut server, Name::KeyUpdate, Said::Progress);
            self.take(&mut server, Name::Listening, Said::Message);
            self.take(&mut server, Name::ClientClose, Said::Closed);
        }
        self.end(server, stage)
    }

    fn end(&self, mut connection: Connection<A>, stage: Stage) -> Connection<A> {
        match stage {
            Stage::Closed(_) | Stage::BothClosed(_) => {
                connection.close(None, &mut [0; 64]).unwrap();
            }
            Stage::Failed(_) => assert_eq!(connection.end_of_stream(), Err(PeerError::Truncated.into())),
            _ => {}
        }
        connection
    }
}

/// Sessions under the seal that is shipped.
pub(crate) type Real = Session<RustCrypto>;
