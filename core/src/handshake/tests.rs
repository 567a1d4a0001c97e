//! The handshake from both ends, one rule after the other. No RSA is computed: what must be signed is asked for, and
//! nobody looks at a signature here.

use std::vec::Vec;

use super::client::{REFUSAL_RECORD_LEN, ServerClaim};
use super::server::{ClaimKind, ClientClaim, SERVER_HELLO_LEN};
use super::*;
use crate::config::{ClientConfig, Credentials, ServerConfig, Token};
use crate::connection::{Ask, Connection, Event, Received};
use crate::crypto::RustCrypto;
use crate::error::{ApiMisuse, BufferError, PeerError, Reason};
use crate::wire::testing::printed;
use crate::wire::{HEADER_LEN, Header, MIN_RECORD_LIMIT, Message, Password, RecordType};

const SERVER: [u8; ID_LEN] = [0x5e; ID_LEN];
const CLIENT: [u8; ID_LEN] = [0xc1; ID_LEN];
const LIMIT: u16 = 4096;
const TOKEN: Token = Token { id: [7; 8], secret: Secret::new([9; 16]) };
const ISSUING: Settings = Settings {
    channel: [0xca; ID_LEN],
    valid_for: 600,
    heartbeat: 15,
    timeout: 45,
    time: 1_790_000_000,
    waiting: 0,
    store_epoch: [1; 8],
};

fn server_key() -> Vec<u8> {
    printed("15.1", "modulus_S")
}

fn client_key() -> Vec<u8> {
    printed("15.1", "modulus_C")
}

fn fingerprint(modulus: &[u8]) -> [u8; HASH_LEN] {
    PublicKey::from_modulus(modulus).unwrap().fingerprint()
}

fn pinned() -> ClientConfig {
    ClientConfig { server: Some(fingerprint(&server_key())), ask_for_key: false, record_limit: LIMIT }
}

fn by_key() -> Credentials<'static> {
    Credentials::Key { id: CLIENT, key_epoch: 3, fingerprint: fingerprint(&client_key()) }
}

/// Two ends, and nothing said yet.
struct Pair {
    client: Connection,
    server: Connection,
}

impl Pair {
    fn new(config: ClientConfig, channel: Option<&Channel>) -> Self {
        let client = match channel {
            Some(channel) => Connection::resume(config, channel.clone(), &[1; 64]).unwrap(),
            None => Connection::client(config, &[1; 64]),
        };
        let server = ServerConfig { id: SERVER, fingerprint: fingerprint(&server_key()), record_limit: LIMIT };
        Self { client, server: Connection::server(server, &[2; 64]) }
    }

    /// -> ClientHello
    fn hello(&mut self) -> Vec<u8> {
        written(|out| self.client.transmit(out)).unwrap()
    }

    /// <- ServerHello, <- {ServerAuth}, with the key of `modulus`
    fn sign(&mut self, modulus: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let key = PublicKey::from_modulus(modulus).unwrap();
        assert!(matches!(self.server.ask(), Some(Ask::Sign(_))));
        let mut hello = written(|out| self.server.sign_server(key, &[0x51; 256], out)).unwrap();
        assert_eq!(self.server.ask(), None);
        let auth = hello.split_off(SERVER_HELLO_LEN);
        (hello, auth)
    }

    /// The honest server's answer to a hello that offers nothing.
    fn answer(&mut self, hello: &mut [u8]) -> (Vec<u8>, Vec<u8>) {
        assert!(matches!(event(&mut self.server, hello), Ok(Event::Progress)));
        self.sign(&server_key())
    }

    /// What the client makes of an answer: the server's claim, as `see` takes it.
    fn judge<T>(&mut self, (mut hello, mut auth): (Vec<u8>, Vec<u8>), see: impl FnOnce(ServerClaim<'_>) -> T) -> T {
        assert!(matches!(event(&mut self.client, &mut hello), Ok(Event::Progress)));
        match event(&mut self.client, &mut auth) {
            Ok(Event::CheckServer(claim)) => see(claim),
            _ => panic!("a claim of the server"),
        }
    }

    /// -> {ClientAuth}, up to what the server is told of it
    fn claim(&mut self, credentials: &Credentials<'_>) -> Vec<u8> {
        let mut hello = self.hello();
        let answer = self.answer(&mut hello);
        self.judge(answer, |_| ());
        self.reveal(credentials)
    }

    fn reveal(&mut self, credentials: &Credentials<'_>) -> Vec<u8> {
        self.client.verified(credentials).unwrap();
        assert!(matches!(self.client.ask(), Some(Ask::Sign(_))));
        let mut auth = written(|out| self.client.sign_client(credentials, &[0xc5; 256], out)).unwrap();
        assert_eq!(self.client.ask(), None);
        match event(&mut self.server, &mut auth) {
            Ok(Event::CheckClient(claim)) => claim.bytes().to_vec(),
            _ => panic!("a claim of the client"),
        }
    }

    /// <- {Settings}
    fn enter(&mut self, settings: &Settings) {
        let mut record = written(|out| self.server.accept(settings, out)).unwrap();
        let told = event(&mut self.client, &mut record);
        assert!(matches!(told, Ok(Event::Connected(told)) if told == *settings));
        let exporters = [&self.client, &self.server].map(|end| *end.exporter().unwrap().expose());
        assert_eq!(exporters[0], exporters[1]);
    }

    /// The whole handshake with method key.
    fn connect(&mut self, settings: &Settings) {
        let claim = self.claim(&by_key());
        self.server.bind(&ClientClaim::decode(&claim).unwrap(), &fingerprint(&client_key())).unwrap();
        self.enter(settings);
    }
}

/// What a call appends to its buffer.
fn written<E>(seal: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<Vec<u8>, E> {
    let mut out = std::vec![0; usize::from(LIMIT)];
    let len = seal(&mut out)?;
    out.truncate(len);
    Ok(out)
}

/// What one whole record says.
fn event<'d>(end: &mut Connection, record: &'d mut [u8]) -> Result<Event<'d>, Error> {
    let len = record.len();
    match end.receive(record)? {
        Received::Record { used, event } => {
            assert_eq!(used, len);
            Ok(event)
        }
        _ => panic!("a whole record"),
    }
}

fn refused(end: &mut Connection, record: &mut [u8], error: impl Into<Error>) {
    assert_eq!(event(end, record).err(), Some(error.into()));
    assert!(!end.is_connected());
}

/// The channel that a handshake between these two issued, at both ends.
fn issued() -> (Channel, Channel) {
    let mut pair = Pair::new(pinned(), None);
    pair.connect(&ISSUING);
    (pair.client.take_channel().unwrap(), pair.server.take_channel().unwrap())
}

fn same(a: &Channel, b: &Channel) {
    assert_eq!(a.secret.expose(), b.secret.expose());
    let named = |c: &Channel| (c.id, c.client, c.client_key, c.key_epoch, c.server, c.server_key);
    assert_eq!(named(a), named(b));
}

#[test]
fn what_a_connection_says_of_itself_is_true_from_its_first_byte_to_its_close() {
    let mut pair = Pair::new(pinned(), None);
    let unready = |end: &mut Connection| {
        assert!(!end.is_connected() && !end.is_resumed() && end.take_channel().is_none());
        assert_eq!(end.exporter().err(), Some(ApiMisuse::NotConnected.into()));
        assert_eq!(end.max_payload(), Err(ApiMisuse::NotConnected.into()));
        assert_eq!(end.send(&Message::Listening, &mut [0; 64]), Err(ApiMisuse::NotConnected.into()));
        assert_eq!(end.close(None, &mut [0; 64]), Err(ApiMisuse::NotConnected.into()));
    };
    unready(&mut pair.client);
    unready(&mut pair.server);
    let claim = pair.claim(&by_key());
    unready(&mut pair.client);
    unready(&mut pair.server);
    let claim = ClientClaim::decode(&claim).unwrap();
    assert_eq!((claim.id(), claim.kind()), (CLIENT, ClaimKind::Key { key_epoch: 3 }));
    assert_eq!(claim.signature(), [0xc5; 256]);
    assert!(!pair.server.proves(&claim, &[0; HASH_LEN]), "there is no token");
    assert_eq!(pair.server.accept(&ISSUING, &mut [0; 256]), Err(ApiMisuse::NotAsked.into()), "it is not bound");
    pair.server.bind(&claim, &fingerprint(&client_key())).unwrap();
    pair.enter(&ISSUING);

    for end in [&mut pair.client, &mut pair.server] {
        assert!(end.is_connected() && !end.is_resumed());
        assert_eq!(end.max_payload(), Ok(usize::from(LIMIT) - 24));
        let channel = end.take_channel().unwrap();
        assert_eq!(
            (channel.id, channel.client, channel.key_epoch, channel.server),
            (ISSUING.channel, CLIENT, 3, SERVER)
        );
        assert_eq!(channel.client_key, fingerprint(&client_key()));
        assert_eq!(channel.server_key, fingerprint(&server_key()));
        assert!(end.take_channel().is_none(), "once");
    }
    let mut close = written(|out| pair.client.close(Some(Reason::Unavailable), out)).unwrap();
    assert!(!pair.client.is_connected());
    assert!(matches!(event(&mut pair.server, &mut close), Ok(Event::Closed(Some(Reason::Unavailable)))));
    assert!(!pair.server.is_connected());
    // The one that closed has not heard the other's last word; nothing more is received from one that has.
    assert_eq!(pair.server.end_of_stream(), Ok(()));
    assert!(matches!(pair.server.receive(&mut [0; 64]), Ok(Received::Wait)));
    assert_eq!(pair.client.end_of_stream(), Err(PeerError::Truncated.into()));
    assert_eq!(pair.client.end_of_stream(), Err(PeerError::Truncated.into()), "final");
}

#[test]
fn a_channel_is_issued_where_the_settings_say_so() {
    for (valid_for, issues) in [(0, false), (1, true), (u32::MAX, true)] {
        let mut pair = Pair::new(pinned(), None);
        pair.connect(&Settings { valid_for, ..ISSUING });
        assert_eq!(pair.client.take_channel().is_some(), issues);
        assert_eq!(pair.server.take_channel().is_some(), issues);
    }
}

#[test]
fn the_ends_of_an_enrolment_are_those_that_were_claimed() {
    let modulus = client_key();
    let key = PublicKey::from_modulus(&modulus).unwrap();
    for token in [None, Some(&TOKEN)] {
        let mut pair = Pair::new(ClientConfig { ask_for_key: true, ..pinned() }, None);
        let claim = pair.claim(&Credentials::Enroll { id: CLIENT, name: "sensor-01", key, token });
        let claim = ClientClaim::decode(&claim).unwrap();
        assert_eq!(claim.id(), CLIENT);
        assert_eq!(claim.kind(), ClaimKind::Enroll { name: "sensor-01", key, token: token.map(|token| token.id) });
        let proves =
            |pair: &Pair, secret: [u8; 16]| pair.server.proves(&claim, token_verifier(&Secret::new(secret)).expose());
        assert!(!proves(&pair, [9; 16]), "it is not bound yet");
        pair.server.bind(&claim, &key.fingerprint()).unwrap();
        assert_eq!(proves(&pair, [9; 16]), token.is_some());
        assert!(!proves(&pair, [8; 16]));
        pair.enter(&ISSUING);
        for end in [&mut pair.client, &mut pair.server] {
            let channel = end.take_channel().unwrap();
            assert_eq!((channel.client, channel.client_key), (CLIENT, key.fingerprint()));
            assert_eq!((channel.key_epoch, channel.server), (0, SERVER));
        }
    }
}

/// What the owner of an account says, with the key and the transcript of PROTOCOL 15.1.
fn login<'c>(modulus: &'c [u8], password: &'c [u8]) -> Login<'c> {
    let (key, password) = (PublicKey::from_modulus(modulus).unwrap(), Password::new(password).unwrap());
    Login { id: CLIENT, name: "alice", key, password }
}

#[test]
fn a_login_is_what_is_printed() {
    let modulus = client_key();
    let login = login(&modulus, b"correct horse");
    let t4 = printed("15.1", "T4").try_into().unwrap();
    let t5 = login_identified(&t4, &login, CAPABILITIES);
    assert_eq!(t5, *printed("15.7", "T5"));
    assert_eq!(t5, hash(&[&t4, &printed("15.7", "fields")]));
    let claim = [&printed("15.7", "fields")[..], &[0xc5; 256], &[7; 32]].concat();
    let claim = ClientClaim::decode(&claim).unwrap();
    let Login { name, key, password, .. } = login;
    assert_eq!((claim.id(), claim.kind()), (CLIENT, ClaimKind::Password { name, key, password }));
    assert_eq!(password.expose(), b"correct horse");
    assert_eq!(std::format!("{:?}", claim.kind()).matches("Password(..)").count(), 1, "nobody is shown it");
    assert_ne!(password, Password::new(b"correct horsf").unwrap());
    for wrong in [&[][..], &[b'x'; 129]] {
        assert_eq!(Password::new(wrong), Err(Error::Decode));
    }
}

#[test]
fn a_login_goes_to_a_pinned_server_only_and_leaves_no_channel() {
    let modulus = client_key();
    let (right, other) = (login(&modulus, b"correct horse"), login(&modulus, &[b'x'; 128]));
    let unpinned = ClientConfig { server: None, ask_for_key: true, ..pinned() };
    for (config, is_pinned) in
        [(pinned(), true), (ClientConfig { ask_for_key: true, ..pinned() }, true), (unpinned, false)]
    {
        let mut pair = Pair::new(config, None);
        let mut hello = pair.hello();
        let answer = pair.answer(&mut hello);
        pair.judge(answer, |_| ());
        assert_eq!(pair.client.sign_login(&right, &[0xc5; 256], &mut [0; 1536]), Err(ApiMisuse::NotAsked.into()));
        for name in ["", &"x".repeat(65)] {
            let refused = pair.client.verified_for_login(&Login { name, ..right });
            assert_eq!(refused, Err(ApiMisuse::InvalidArgument.into()));
        }
        let verified = pair.client.verified_for_login(&right);
        if !is_pinned {
            assert_eq!(verified, Err(ApiMisuse::InvalidArgument.into()), "nobody is told who was not expected");
            // Who is not told a password may still be told a name.
            assert_eq!(pair.client.verified(&by_key()), Ok(()));
            continue;
        }
        assert_eq!(verified, Ok(()));
        let mut out = [0; 1536];
        let len = 24 + 1 + 16 + 1 + 5 + 294 + 2 + 129 + 256 + 32;
        assert_eq!(pair.client.sign_login(&right, &[0xc5; 256], &mut out[..len - 1]), Err(BufferError::TxFull.into()));
        assert_eq!(out, [0; 1536], "not a byte of it");
        for wrong in [&other, &Login { name: "alicf", ..right }, &Login { id: SERVER, ..right }] {
            let refused = pair.client.sign_login(wrong, &[0xc5; 256], &mut out);
            assert_eq!(refused, Err(ApiMisuse::InvalidArgument.into()));
        }
        let by_key = pair.client.sign_client(&by_key(), &[0xc5; 256], &mut out);
        assert_eq!(by_key, Err(ApiMisuse::InvalidArgument.into()));
        assert_eq!(pair.client.sign_login(&right, &[0xc5; 256], &mut out[..len]), Ok(len));
        let Ok(Event::CheckClient(claim)) = event(&mut pair.server, &mut out[..len]) else { panic!("a claim") };
        let ClaimKind::Password { name, key, password } = claim.kind() else { panic!("{:?}", claim.kind()) };
        assert_eq!((name, key, password), ("alice", right.key, right.password));
        assert!(!pair.server.proves(&claim, &[0; HASH_LEN]), "it has no token");
        pair.server.bind(&claim, &key.fingerprint()).unwrap();
        pair.enter(&Settings { valid_for: 0, ..ISSUING });
        assert!(pair.client.take_channel().is_none() && pair.server.take_channel().is_none());
    }
}

#[test]
fn a_claim_for_another_key_is_refused_like_an_unknown_one() {
    let mut pair = Pair::new(pinned(), None);
    let claim = pair.claim(&by_key());
    let claim = ClientClaim::decode(&claim).unwrap();
    assert_eq!(pair.server.bind(&claim, &[1; HASH_LEN]), Err(Error::Crypto));
    assert_eq!(pair.server.accept(&ISSUING, &mut [0; 256]), Err(ApiMisuse::NotAsked.into()), "it is not bound");
    for room in 0..REFUSAL_RECORD_LEN {
        let short = pair.server.refuse(Reason::Rate, 7, &mut std::vec![0; room]);
        assert_eq!(short, Err(BufferError::TxFull.into()), "{room}");
    }
    let mut refusal = written(|out| pair.server.refuse(Reason::Rate, 0x0102_0304, out)).unwrap();
    assert_eq!(refusal.len(), REFUSAL_RECORD_LEN);
    assert_eq!(pair.server.refuse(Reason::Rate, 7, &mut [0; 64]), Err(ApiMisuse::Closed.into()), "once");
    let reason = PeerError::Refused { reason: Reason::Rate, retry_after: 0x0102_0304 };
    refused(&mut pair.client, &mut refusal, reason);
    // Who has refused waits for nothing more; who was refused has failed.
    assert_eq!(pair.server.end_of_stream(), Ok(()));
    assert_eq!(pair.client.end_of_stream(), Err(reason.into()));
}

/// A refusal with the keys of this client's server, of any content and under any number.
fn refusal(t2: &Transcript, schedule: &Schedule, counter: u64, sequence: u16, text: &[u8]) -> Vec<u8> {
    let mut record = std::vec![0; HEADER_LEN + text.len() + 16];
    record[HEADER_LEN..][..text.len()].copy_from_slice(text);
    let (mut key, _) = schedule.server::<RustCrypto>(t2, counter);
    key.seal(RecordType::Refusal, &mut record, text.len()).unwrap();
    record[6..8].copy_from_slice(&sequence.to_be_bytes());
    record
}

#[test]
fn a_refusal_is_the_second_record_of_its_key_and_names_a_reason() {
    let mut pair = Pair::new(pinned(), None);
    let mut hello = pair.hello();
    let t1 = hash(&[&beginning(), &hello]);
    let answer = pair.answer(&mut hello);
    let t2 = hash(&[&t1, &answer.0]);
    // What the client's side of the schedule is, from its seed.
    let schedule = Schedule::full(&ephemeral(&Secret::new([1; 64])).0, &answer.0[47..79].try_into().unwrap()).unwrap();
    let waiting = || {
        let mut pair = Pair::new(pinned(), None);
        pair.claim(&by_key());
        pair.client
    };
    let text = [Reason::Unauthorised.code(), 0, 0, 0, 0];
    let wrong = PeerError::UnexpectedMessage;
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 0, 0, &text), wrong);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 2, 2, &text), wrong);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 0, 1, &text), Error::Crypto);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 1, 1, &[0, 0, 0, 0, 0]), Error::Decode);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 1, 1, &[0xff, 0, 0, 0, 0]), Error::Decode);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 1, 1, &text[..4]), Error::Decode);
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 1, 1, &[3, 0, 0, 0, 0, 0]), Error::Decode);
    let reason = PeerError::Refused { reason: Reason::Unauthorised, retry_after: 0 };
    refused(&mut waiting(), &mut refusal(&t2, &schedule, 1, 1, &text), reason);
    // One of another length fails at its header, before anything is waited for.
    for len in [24, 28, 29, 30, LIMIT] {
        let header = Header { kind: RecordType::Refusal, len, sequence: 1 };
        let received = waiting().receive(&mut header.encode()).map(|received| matches!(received, Received::Need(29)));
        assert_eq!(received, if len == 29 { Ok(true) } else { Err(Error::Decode) }, "{len}");
    }
    // No other state takes one.
    refused(&mut Pair::new(pinned(), None).server, &mut refusal(&t2, &schedule, 1, 1, &text), wrong);
    let mut connected = Pair::new(pinned(), None);
    connected.connect(&ISSUING);
    refused(&mut connected.client, &mut refusal(&t2, &schedule, 1, 1, &text), wrong);
}

#[test]
fn a_server_is_the_one_that_was_pinned_or_the_one_that_showed_its_key() {
    let (ours, other) = (server_key(), client_key());
    let unpinned = ClientConfig { server: None, ask_for_key: true, ..pinned() };
    for config in [pinned(), ClientConfig { ask_for_key: true, ..pinned() }, unpinned] {
        let mut pair = Pair::new(config, None);
        let mut hello = pair.hello();
        let answer = pair.answer(&mut hello);
        let statement = pair.judge(answer, |claim| {
            assert_eq!((claim.server, claim.fingerprint), (SERVER, fingerprint(&ours)));
            assert_eq!(claim.key.map(|key| key.modulus().to_vec()), config.ask_for_key.then(server_key));
            assert_eq!(claim.signature, [0x51; 256]);
            claim.statement
        });
        let mut again = Pair::new(config, None);
        let mut hello = again.hello();
        event(&mut again.server, &mut hello).unwrap();
        assert_eq!(again.server.ask(), Some(Ask::Sign(statement)), "what the server was asked to sign");
    }
    // A server that shows another key than the pinned one, and one that was taken for it and does not show any.
    for (ask_for_key, pin) in [(true, &other), (false, &other), (true, &ours)] {
        let config = ClientConfig { server: Some(fingerprint(pin)), ask_for_key, ..pinned() };
        let mut pair = Pair::new(config, None);
        let mut hello = pair.hello();
        event(&mut pair.server, &mut hello).unwrap();
        let shown = if pin == &ours { &other } else { &ours };
        let (mut hello, mut auth) = pair.sign(shown);
        event(&mut pair.client, &mut hello).unwrap();
        refused(&mut pair.client, &mut auth, PeerError::ServerKey);
    }
    // Without a pin and without asking nobody could be verified: nothing is sent.
    let nobody = ClientConfig { server: None, ask_for_key: false, ..pinned() };
    let mut client: Connection = Connection::client(nobody, &[1; 64]);
    assert_eq!(client.transmit(&mut [0; 256]), Err(ApiMisuse::InvalidArgument.into()));
}

#[test]
fn a_record_limit_is_at_least_what_every_node_takes() {
    let least = u16::try_from(MIN_RECORD_LIMIT).unwrap();
    for (limit, fits) in [(0, false), (least - 1, false), (least, true), (u16::MAX, true)] {
        let mut pair = Pair::new(pinned(), None);
        let mut hello = pair.hello();
        hello[14..16].copy_from_slice(&limit.to_be_bytes());
        assert_eq!(event(&mut pair.server, &mut hello).err(), (!fits).then_some(Error::Decode), "{limit}");

        let mut pair = Pair::new(pinned(), None);
        let mut hello = pair.hello();
        let (mut hello, _) = pair.answer(&mut hello);
        hello[13..15].copy_from_slice(&limit.to_be_bytes());
        assert_eq!(event(&mut pair.client, &mut hello).err(), (!fits).then_some(Error::Decode), "{limit}");
    }
    // Each side keeps to the other's.
    let mut pair = Pair::new(ClientConfig { record_limit: least, ..pinned() }, None);
    pair.connect(&ISSUING);
    assert_eq!(pair.server.max_payload(), Ok(MIN_RECORD_LIMIT - 24));
    assert_eq!(pair.client.max_payload(), Ok(usize::from(LIMIT) - 24));
}

#[test]
fn hellos_of_another_role_version_or_mode_are_refused() {
    // Offset and value in the client's hello: role of a server, another version, another suite.
    for (at, value) in [(16, 1), (9, 2), (12, 2)] {
        let mut pair = Pair::new(pinned(), None);
        let mut hello = pair.hello();
        hello[at] = value;
        refused(&mut pair.server, &mut hello, PeerError::Version);
    }
    // Modes 1 and 2 answer an offer; mode 0 answers none.
    let (channel, _) = issued();
    for (offered, mode) in [(None, 1), (None, 2), (Some(&channel), 0)] {
        let mut pair = Pair::new(pinned(), None);
        let mut hello = pair.hello();
        let (mut hello, _) = pair.answer(&mut hello);
        hello[8] = mode;
        let mut pair = Pair::new(pinned(), offered);
        pair.hello();
        refused(&mut pair.client, &mut hello, PeerError::Version);
    }
}

#[test]
fn answers_that_nobody_asked_for_change_nothing() {
    let not_asked = |result: Result<usize, Error>| assert_eq!(result, Err(ApiMisuse::NotAsked.into()));
    let (modulus, mut out) = (server_key(), [0; 1024]);
    let key = PublicKey::from_modulus(&modulus).unwrap();
    let mut pair = Pair::new(pinned(), None);
    not_asked(pair.server.sign_server(key, &[0; 256], &mut out));
    not_asked(pair.server.answer_offer(None, &mut out));
    not_asked(pair.server.accept(&ISSUING, &mut out));
    not_asked(pair.server.refuse(Reason::Rate, 0, &mut out));
    not_asked(pair.client.sign_client(&by_key(), &[0; 256], &mut out));
    assert_eq!(pair.client.verified(&by_key()), Err(ApiMisuse::NotAsked.into()));
    let mut elsewhere = Pair::new(pinned(), None);
    let claim = elsewhere.claim(&by_key());
    let claim = ClientClaim::decode(&claim).unwrap();
    assert_eq!(pair.server.bind(&claim, &fingerprint(&client_key())), Err(ApiMisuse::NotAsked.into()));
    assert!(!pair.server.proves(&claim, &[0; HASH_LEN]));
    // The credentials that are signed are those that were revealed.
    let mut hello = pair.hello();
    let answer = pair.answer(&mut hello);
    pair.judge(answer, |_| ());
    pair.client.verified(&by_key()).unwrap();
    let others = Credentials::Key { id: CLIENT, key_epoch: 4, fingerprint: fingerprint(&client_key()) };
    assert_eq!(pair.client.sign_client(&others, &[0; 256], &mut out), Err(ApiMisuse::InvalidArgument.into()));
    assert_eq!(out, [0; 1024]);
    let mut auth = written(|out| pair.client.sign_client(&by_key(), &[0xc5; 256], out)).unwrap();
    assert!(matches!(event(&mut pair.server, &mut auth), Ok(Event::CheckClient(_))));
}

#[test]
fn a_buffer_that_is_too_short_is_told_at_each_step() {
    let full = |result: Result<usize, Error>| assert_eq!(result, Err(BufferError::TxFull.into()));
    let (channel, held) = issued();
    let (modulus, mut out) = (server_key(), [0; 1024]);
    let key = PublicKey::from_modulus(&modulus).unwrap();
    for offered in [None, Some(&channel)] {
        let mut pair = Pair::new(pinned(), offered);
        let len = Pair::new(pinned(), offered).hello().len();
        for room in 0..len {
            full(pair.client.transmit(&mut out[..room]));
        }
        assert_eq!(pair.client.transmit(&mut out[..len]), Ok(len));
        event(&mut pair.server, &mut out[..len]).unwrap();
        let answer = |server: &mut Connection, out: &mut [u8]| match offered {
            None => server.sign_server(key, &[0x51; 256], out),
            Some(_) => server.answer_offer(Some(&held), out),
        };
        let len = if offered.is_some() { 79 + 56 } else { 79 + 24 + 16 + 256 + 32 };
        for room in 0..len {
            full(answer(&mut pair.server, &mut out[..room]));
        }
        assert_eq!(answer(&mut pair.server, &mut out[..len]), Ok(len));
        event(&mut pair.client, &mut out[..79]).unwrap();
        assert!(event(&mut pair.client, &mut out[79..len]).is_ok());
        if offered.is_some() {
            let len = 24 + 2 + 32;
            for room in 0..len {
                full(pair.client.transmit(&mut out[..room]));
            }
            assert_eq!(pair.client.transmit(&mut out[..len]), Ok(len));
        } else {
            pair.client.verified(&by_key()).unwrap();
            let len = 24 + 1 + 16 + 4 + 2 + 256 + 32;
            for room in 0..len {
                full(pair.client.sign_client(&by_key(), &[0xc5; 256], &mut out[..room]));
            }
            assert_eq!(pair.client.sign_client(&by_key(), &[0xc5; 256], &mut out[..len]), Ok(len));
        }
    }
}

#[test]
fn a_resumption_ends_in_a_channel_of_its_own_or_in_a_refusal() {
    let (channel, held) = issued();
    same(&channel, &held);
    let resuming = || {
        let mut pair = Pair::new(pinned(), Some(&channel));
        let mut hello = pair.hello();
        assert!(matches!(event(&mut pair.server, &mut hello), Ok(Event::CheckChannel(id)) if id == channel.id));
        let mut answer = written(|out| pair.server.answer_offer(Some(&held), out)).unwrap();
        assert_eq!(pair.server.ask(), None, "no RSA");
        assert!(matches!(event(&mut pair.client, &mut answer[..79]), Ok(Event::Progress)));
        assert!(matches!(event(&mut pair.client, &mut answer[79..]), Ok(Event::Progress)));
        let mut finished = pair.hello();
        assert!(matches!(event(&mut pair.server, &mut finished), Ok(Event::Resumed)));
        pair
    };
    let mut pair = resuming();
    pair.enter(&Settings { channel: [0xcb; ID_LEN], ..ISSUING });
    assert!(pair.client.is_resumed() && pair.server.is_resumed());
    let next = pair.client.take_channel().unwrap();
    same(&next, &pair.server.take_channel().unwrap());
    assert_eq!((next.id, next.key_epoch, next.client_key), ([0xcb; ID_LEN], 3, channel.client_key));
    assert_ne!(next.secret.expose(), channel.secret.expose());

    let mut pair = resuming();
    let mut refusal = written(|out| pair.server.refuse(Reason::TakenOver, 9, out)).unwrap();
    refused(&mut pair.client, &mut refusal, PeerError::Refused { reason: Reason::TakenOver, retry_after: 9 });
    assert_eq!(pair.server.accept(&ISSUING, &mut [0; 256]), Err(ApiMisuse::Closed.into()));
}

#[test]
fn a_channel_that_does_not_fit_leads_to_the_full_handshake() {
    let (channel, held) = issued();
    let other = |change: fn(&mut Channel)| {
        let mut other = held.clone();
        change(&mut other);
        Some(other)
    };
    let cases = [
        None,
        other(|channel| channel.secret = Secret::new([1; 32])),
        other(|channel| channel.id = [1; ID_LEN]),
        other(|channel| channel.server = [1; ID_LEN]),
        other(|channel| channel.server_key = [1; HASH_LEN]),
    ];
    for held in &cases {
        let mut pair = Pair::new(pinned(), Some(&channel));
        let mut hello = pair.hello();
        assert!(matches!(event(&mut pair.server, &mut hello), Ok(Event::CheckChannel(_))));
        assert_eq!(pair.server.answer_offer(held.as_ref(), &mut [0; 256]), Ok(0));
        let answer = pair.sign(&server_key());
        assert_eq!(answer.0[8], 2, "the mode says that there was an offer");
        pair.judge(answer, |_| ());
        let claim = pair.reveal(&by_key());
        pair.server.bind(&ClientClaim::decode(&claim).unwrap(), &channel.client_key).unwrap();
        pair.enter(&ISSUING);
        assert!(!pair.client.is_resumed() && !pair.server.is_resumed());
    }
    // A channel is offered to the server that issued it, and to no other.
    let config = ClientConfig { server: Some([1; HASH_LEN]), ..pinned() };
    let elsewhere = Connection::<RustCrypto>::resume(config, channel, &[1; 64]);
    assert_eq!(elsewhere.err(), Some(ApiMisuse::InvalidArgument.into()));
}

#[test]
fn both_must_show_that_they_have_the_channel_now() {
    let (channel, held) = issued();
    let mut pair = Pair::new(pinned(), Some(&channel));
    let mut hello = pair.hello();
    let t1 = hash(&[&beginning(), &hello]);
    event(&mut pair.server, &mut hello).unwrap();
    let mut answer = written(|out| pair.server.answer_offer(Some(&held), out)).unwrap();
    let t2 = hash(&[&t1, &answer[..79]]);
    let exchange = answer[47..79].try_into().unwrap();
    let schedule = Schedule::resumed(&channel, &ephemeral(&Secret::new([1; 64])).0, &exchange).unwrap();
    event(&mut pair.client, &mut answer[..79]).unwrap();
    // Records that open, and whose Finished is wrong or of another length.
    for (text, error) in [(&[7; 32][..], Error::Crypto), (&[7; 31], Error::Decode), (&[7; 33], Error::Decode)] {
        let mut client = Pair::new(pinned(), Some(&channel));
        client.hello();
        event(&mut client.client, &mut answer[..79].to_vec()).unwrap();
        let (mut key, _) = schedule.server::<RustCrypto>(&t2, 0);
        refused(&mut client.client, &mut sealed(&mut key, RecordType::ServerAuth, text), error);
    }
    for (text, error) in [(&[7; 34][..], Error::Crypto), (&[7; 33], Error::Decode), (&[7; 35], Error::Decode)] {
        let mut server = Pair::new(pinned(), Some(&channel));
        let mut hello = server.hello();
        event(&mut server.server, &mut hello).unwrap();
        server.server.answer_offer(Some(&held), &mut [0; 256]).unwrap();
        let (mut key, _) = schedule.client::<RustCrypto>(&t2);
        refused(&mut server.server, &mut sealed(&mut key, RecordType::ClientAuth, text), error);
    }
}

fn sealed(key: &mut RecordKey<RustCrypto>, kind: RecordType, text: &[u8]) -> Vec<u8> {
    let mut record = std::vec![0; HEADER_LEN + text.len() + 16];
    record[HEADER_LEN..][..text.len()].copy_from_slice(text);
    key.seal(kind, &mut record, text.len()).unwrap();
    record
}

#[test]
fn an_exchange_key_that_agrees_on_nothing_ends_the_connection() {
    let (channel, held) = issued();
    let mut pair = Pair::new(pinned(), None);
    let mut hello = pair.hello();
    hello[50..82].fill(0);
    refused(&mut pair.server, &mut hello, Error::Crypto);

    let mut pair = Pair::new(pinned(), None);
    let mut hello = pair.hello();
    let (mut hello, _) = pair.answer(&mut hello);
    hello[47..79].fill(0);
    refused(&mut pair.client, &mut hello, Error::Crypto);

    // Behind an offer it shows when the channel was looked up, and a binder that fits is the client's own.
    for held in [Some(&held), None] {
        let mut pair = Pair::new(pinned(), Some(&channel));
        let mut hello = pair.hello();
        hello[50..82].fill(0);
        let end = hello.len() - HASH_LEN;
        let binder = resume::binder(&channel, &hello[..end]);
        hello[end..].copy_from_slice(&binder);
        assert!(matches!(event(&mut pair.server, &mut hello), Ok(Event::CheckChannel(_))));
        assert_eq!(pair.server.answer_offer(held, &mut [0; 256]), Err(Error::Crypto));
        assert_eq!(pair.server.answer_offer(held, &mut [0; 256]), Err(Error::Crypto), "final");
    }
}
