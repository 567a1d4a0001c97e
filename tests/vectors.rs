//! The test vectors in `vectors/`: they are what the command writes, the engine gives every byte of them, and where
//! PROTOCOL.md prints the same example the two agree. What is compared is read from the files, as anybody would.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ossicle::crypto::verify;
use ossicle::endpoint::ServerUrl;
use ossicle_core::*;
use ossicle_tests::{keys, vectors};
use serde_json::Value;

const PROTOCOL: &str = include_str!("../core/PROTOCOL.md");

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

fn file(name: &str) -> Value {
    let text = fs::read_to_string(folder().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn cases(file: &Value) -> &[Value] {
    list(file, "cases")
}

fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    let list = value[name].as_array().unwrap_or_else(|| panic!("no list {name}"));
    assert!(!list.is_empty(), "{name} is empty");
    list
}

fn case<'v>(file: &'v Value, name: &str) -> &'v Value {
    cases(file).iter().find(|case| case["name"] == name).unwrap_or_else(|| panic!("no case {name}"))
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_else(|| panic!("no text {name} in {value:#}"))
}

fn bytes(value: &Value, name: &str) -> Vec<u8> {
    hex::decode(text(value, name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn array<const N: usize>(value: &Value, name: &str) -> [u8; N] {
    bytes(value, name).try_into().unwrap_or_else(|bytes: Vec<u8>| panic!("{name} has {} bytes", bytes.len()))
}

fn secret<const N: usize>(value: &Value, name: &str) -> Secret<N> {
    Secret::new(array(value, name))
}

fn number<T: TryFrom<u64>>(value: &Value, name: &str) -> T {
    let number = value[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {value:#}"));
    T::try_from(number).ok().unwrap_or_else(|| panic!("{name} is {number}"))
}

fn flag(value: &Value, name: &str) -> bool {
    value[name].as_bool().unwrap_or_else(|| panic!("no flag {name}"))
}

/// Compares with a field of a case.
#[track_caller]
fn gives(case: &Value, name: &str, ours: &[u8]) {
    assert_eq!(text(case, name), hex::encode(ours), "{name}");
}

/// The modulus of a fixed key.
fn modulus(name: &str) -> Vec<u8> {
    match name {
        "alice" => keys::alice(),
        "bob" => keys::bob(),
        "carol" => keys::carol(),
        "server" => keys::server(),
        "server3072" => keys::server3072(),
        "server4096" => keys::server4096(),
        other => panic!("a key named {other}"),
    }
    .modulus()
    .to_vec()
}

#[test]
fn the_files_are_what_the_command_writes() {
    let made = vectors::files();
    for (name, text) in &made {
        let committed = fs::read_to_string(folder().join(name)).unwrap_or_default();
        assert!(*text == committed, "{name} is another: `cargo run -p ossicle-tests --bin vectors` writes it anew");
    }
    let made: BTreeSet<_> = made.into_iter().map(|(name, _)| name.to_owned()).collect();
    let committed: BTreeSet<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".json"))
        .collect();
    assert_eq!(committed, made, "the files in the folder");
    let readme = fs::read_to_string(folder().join("README.md")).unwrap();
    for name in &made {
        assert!(readme.contains(name), "README.md says nothing about {name}");
    }
}

#[test]
fn keys_and_statements() {
    let file = file("keys.json");
    for case in cases(&file) {
        let modulus = modulus(text(case, "name"));
        gives(case, "modulus", &modulus);
        let key = PublicKey::from_modulus(&modulus).unwrap();
        gives(case, "SPKI", key.spki(&mut [0; MAX_SPKI_LEN]));
        gives(case, "H(SPKI)", &key.fingerprint());
        assert_eq!(key.bits(), number::<usize>(case, "bits"));
        let (d, p, q) = (bytes(case, "d"), bytes(case, "p"), bytes(case, "q"));
        let mut buffer = [0; MAX_RSA_LEN];
        assert_eq!(RsaKey::new(&d, &p, &q).unwrap().public(&mut buffer).unwrap(), key);
    }
}

// Handshakes

/// The credentials of a case, with what they borrow.
struct Client {
    modulus: Vec<u8>,
    token: Option<Token>,
}

impl Client {
    fn of(given: &Value) -> Self {
        let token = given["token"].as_object().map(|_| {
            let token = &given["token"];
            Token { id: array(token, "id"), secret: secret(token, "secret") }
        });
        Self { modulus: modulus(text(given, "client_key")), token }
    }

    fn key(&self) -> PublicKey<'_> {
        PublicKey::from_modulus(&self.modulus).unwrap()
    }

    /// Of the method `password`, which is none of the credentials that devices have.
    fn login<'c>(&'c self, given: &'c Value) -> Option<Login<'c>> {
        let password = Password::new(given["password"].as_str()?.as_bytes()).unwrap();
        Some(Login { id: array(given, "client_id"), name: text(given, "client_name"), key: self.key(), password })
    }

    fn credentials<'c>(&'c self, given: &'c Value) -> Credentials<'c> {
        let id = array(given, "client_id");
        match text(given, "method") {
            "key" => {
                Credentials::Key { id, key_epoch: number(given, "key_epoch"), fingerprint: self.key().fingerprint() }
            }
            "enroll" => Credentials::Enroll {
                id,
                name: text(given, "client_name"),
                key: self.key(),
                token: self.token.as_ref(),
            },
            other => panic!("method {other}"),
        }
    }
}

fn channel(given: &Value) -> Channel {
    Channel {
        id: array(given, "channel"),
        secret: secret(given, "CS"),
        client: array(given, "client_id"),
        client_key: array(given, "H(SPKI_C)"),
        key_epoch: number(given, "key_epoch"),
        server: array(given, "server_id"),
        server_key: array(given, "H(SPKI_S)"),
    }
}

fn settings(given: &Value) -> Settings {
    let given = &given["settings"];
    Settings {
        channel: array(given, "channel"),
        valid_for: number(given, "valid_for"),
        heartbeat: number(given, "heartbeat"),
        timeout: number(given, "timeout"),
        time: number(given, "time"),
        waiting: number(given, "waiting"),
        store_epoch: array(given, "store_epoch"),
    }
}

/// Settings or Refusal, from the server's state on, and what both sides hold then.
fn end(case: &Value, client: &mut Connection, server: &mut Connection) {
    let (given, expected) = (&case["given"], &case["gives"]);
    let mut out = [0; 2048];
    if given["refusal"].is_object() {
        let (reason, retry_after) = (number(&given["refusal"], "reason"), number(&given["refusal"], "retry_after"));
        let reason = Reason::from_code(reason).unwrap();
        let len = server.refuse(reason, retry_after, &mut out).unwrap();
        gives(expected, "Refusal", &out[..len]);
        let refused = PeerError::Refused { reason, retry_after };
        assert_eq!(client.receive(&mut out[..len]).err(), Some(refused.into()));
        return;
    }
    let settings = settings(given);
    let len = Message::Settings(settings).encode(&mut out).unwrap();
    gives(expected, "settings", &out[..len]);
    let len = server.accept(&settings, &mut out).unwrap();
    gives(expected, "Settings", &out[..len]);
    let Ok(Received::Record { event: Event::Connected(told), .. }) = client.receive(&mut out[..len]) else {
        panic!("settings");
    };
    assert_eq!(told, settings);
    for side in [client, server] {
        gives(expected, "exporter", side.exporter().unwrap().expose());
        match side.take_channel() {
            Some(channel) => {
                assert_eq!(channel.id, settings.channel);
                gives(expected, "CS", channel.secret.expose());
            }
            None => assert_eq!(settings.valid_for, 0),
        }
    }
}

/// Runs a full handshake of a case up to the claim of the client, and leaves both sides there.
fn claim(case: &Value) -> (Connection, Connection) {
    let (given, expected) = (&case["given"], &case["gives"]);
    let server_modulus = modulus(text(given, "server_key"));
    let server_key = PublicKey::from_modulus(&server_modulus).unwrap();
    let config = ClientConfig {
        server: Some(server_key.fingerprint()),
        ask_for_key: flag(given, "ask_for_key"),
        record_limit: number(given, "record_limit_C"),
    };
    let mut client = match given["offer"].is_object() {
        true => Connection::resume(config, channel(&given["offer"]), &array(given, "seed_C")).unwrap(),
        false => Connection::client(config, &array(given, "seed_C")),
    };
    let config = ServerConfig {
        id: array(given, "server_id"),
        fingerprint: server_key.fingerprint(),
        record_limit: number(given, "record_limit_S"),
    };
    let mut server: Connection = Connection::server(config, &array(given, "seed_S"));
    let mut out = [0; 4096];

    let len = client.transmit(&mut out).unwrap();
    gives(expected, "ClientHello", &out[..len]);
    let received = server.receive(&mut out[..len]).unwrap();
    if given["offer"].is_object() {
        assert!(matches!(received, Received::Record { event: Event::CheckChannel(_), .. }));
        // The channel is unknown, or the server has it and the client has not its secret.
        let accepted = file("resumption.json");
        let held = channel(&self::case(&accepted, "accepted")["given"]);
        let held = (held.id == array(&given["offer"], "channel")).then_some(held);
        assert_eq!(server.answer_offer(held.as_ref(), &mut out), Ok(0));
    }
    let Some(Ask::Sign(statement)) = server.ask() else { panic!("the server must sign") };
    gives(expected, "statement_S", statement.message(&mut [0; Statement::MAX_LEN]));
    gives(expected, "digest_S", &statement.digest());
    let signature = bytes(expected, "sig_S");
    assert!(verify(&server_modulus, &statement, &signature));
    let len = server.sign_server(server_key, &signature, &mut out).unwrap();
    let (hello, auth) = out[..len].split_at_mut(79);
    gives(expected, "ServerHello", hello);
    gives(expected, "ServerAuth", auth);

    client.receive(hello).unwrap();
    let Ok(Received::Record { event: Event::CheckServer(claim), .. }) = client.receive(auth) else {
        panic!("a claim of the server")
    };
    gives(expected, "H(SPKI_S)", &claim.fingerprint);
    assert_eq!((claim.statement, claim.signature), (statement, &signature[..]));
    assert_eq!(claim.key, flag(given, "ask_for_key").then_some(server_key));

    let who = Client::of(given);
    let login = who.login(given);
    match &login {
        Some(login) => client.verified_for_login(login).unwrap(),
        None => client.verified(&who.credentials(given)).unwrap(),
    }
    let Some(Ask::Sign(statement)) = client.ask() else { panic!("the client must sign") };
    gives(expected, "statement_C", statement.message(&mut [0; Statement::MAX_LEN]));
    let signature = bytes(expected, "sig_C");
    assert!(verify(&who.modulus, &statement, &signature));
    let len = match &login {
        Some(login) => client.sign_login(login, &signature, &mut out).unwrap(),
        None => client.sign_client(&who.credentials(given), &signature, &mut out).unwrap(),
    };
    gives(expected, "ClientAuth", &out[..len]);
    let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut out[..len]) else {
        panic!("a claim of the client")
    };
    gives(expected, "H(SPKI_C)", &who.key().fingerprint());
    assert_eq!(server.bind(&claim, &who.key().fingerprint()), Ok(statement));
    if let Some(token) = &who.token {
        let verifier = token_verifier(&token.secret);
        gives(expected, "verifier", verifier.expose());
        assert!(server.proves(&claim, verifier.expose()));
    }
    (client, server)
}

#[test]
fn full_handshakes() {
    let (full, resumed) = (file("handshake.json"), file("resumption.json"));
    for case in cases(&full).iter().chain(list(&resumed, "full_instead")) {
        let (mut client, mut server) = claim(case);
        end(case, &mut client, &mut server);
    }
}

/// What the engine's client cannot say, its server understands.
#[test]
fn handshakes_of_later_clients() {
    for case in list(&file("handshake.json"), "of_later_clients") {
        let (given, expected) = (&case["given"], &case["gives"]);
        let (mut server, mut out) = (server_of(given), [0; 4096]);
        let len = answer(case, &mut server, &mut out);
        assert_eq!(out[..len], [bytes(expected, "ServerHello"), bytes(expected, "ServerAuth")].concat());
        let mut auth = bytes(expected, "ClientAuth");
        let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut auth) else {
            panic!("a claim of the client")
        };
        let client = modulus(text(given, "client_key"));
        let fingerprint = PublicKey::from_modulus(&client).unwrap().fingerprint();
        let statement = server.bind(&claim, &fingerprint).unwrap();
        gives(expected, "digest_C", &statement.digest());
        assert!(verify(&client, &statement, claim.signature()));
        let len = server.accept(&settings(given), &mut out).unwrap();
        gives(expected, "Settings", &out[..len]);
    }
}

/// The server's end of a case before its first byte.
fn server_of(given: &Value) -> Connection {
    let fingerprint = match given["server_key"].as_str() {
        Some(name) => PublicKey::from_modulus(&modulus(name)).unwrap().fingerprint(),
        None => array(given, "H(SPKI_S)"),
    };
    let config =
        ServerConfig { id: array(given, "server_id"), fingerprint, record_limit: number(given, "record_limit_S") };
    Connection::server(config, &array(given, "seed_S"))
}

/// The server takes the ClientHello of a case and answers into `out`.
fn answer(case: &Value, server: &mut Connection, out: &mut [u8]) -> usize {
    let (given, expected) = (&case["given"], &case["gives"]);
    server.receive(&mut bytes(expected, "ClientHello")).unwrap();
    match given["server_key"].as_str() {
        Some(name) => {
            let modulus = modulus(name);
            server.sign_server(PublicKey::from_modulus(&modulus).unwrap(), &bytes(expected, "sig_S"), out).unwrap()
        }
        None => server.answer_offer(Some(&channel(given)), out).unwrap(),
    }
}

/// One side of a case in this state, all by the records of the file.
fn reach(case: &Value, state: &str) -> Connection {
    let (given, expected) = (&case["given"], &case["gives"]);
    let mut out = [0; 4096];
    let (side, state) = state.split_once(", ").unwrap();
    if side == "server" {
        let mut server = server_of(given);
        if state != "WAIT HELLO" {
            answer(case, &mut server, &mut out);
        }
        if state == "CONNECTED" {
            let mut auth = bytes(expected, "ClientAuth");
            let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut auth) else {
                panic!("a claim of the client")
            };
            server.bind(&claim, &array(expected, "H(SPKI_C)")).unwrap();
            server.accept(&settings(given), &mut out).unwrap();
        }
        return server;
    }
    let resumes = given["server_key"].is_null();
    let fingerprint = if resumes { array(given, "H(SPKI_S)") } else { array(expected, "H(SPKI_S)") };
    let config = ClientConfig {
        server: Some(fingerprint),
        ask_for_key: !resumes && flag(given, "ask_for_key"),
        record_limit: number(given, "record_limit_C"),
    };
    let seed = array(given, "seed_C");
    let mut client: Connection = match resumes {
        true => Connection::resume(config, channel(given), &seed).unwrap(),
        false => Connection::client(config, &seed),
    };
    client.transmit(&mut out).unwrap();
    if state != "WAIT HELLO" {
        client.receive(&mut bytes(expected, "ServerHello")).unwrap();
    }
    if matches!(state, "WAIT SETTINGS" | "CONNECTED") {
        client.receive(&mut bytes(expected, "ServerAuth")).unwrap();
        let who = Client::of(given);
        let credentials = who.credentials(given);
        client.verified(&credentials).unwrap();
        client.sign_client(&credentials, &bytes(expected, "sig_C"), &mut out).unwrap();
    }
    if state == "CONNECTED" {
        client.receive(&mut bytes(expected, "Settings")).unwrap();
    }
    client
}

#[test]
fn records_that_end_the_connection() {
    let files = [("handshake.json", file("handshake.json")), ("resumption.json", file("resumption.json"))];
    let (mut count, mut rights) = (0, 0);
    for hostile in cases(&file("hostile.json")) {
        let (state, reached) = (text(hostile, "state"), &hostile["handshake"]);
        let (_, handshakes) = files.iter().find(|(name, _)| *name == text(reached, "file")).unwrap();
        let case = case(handshakes, text(reached, "name"));
        for row in list(hostile, "records") {
            let about = format!("{state} of {}: {}", text(reached, "name"), text(row, "why"));
            let mut side = reach(case, state);
            let mut record = bytes(row, "record");
            let verdict = match side.receive(&mut record) {
                Ok(Received::Record { event: Event::CheckServer(claim), .. }) => {
                    let server = modulus(text(&case["given"], "server_key"));
                    match verify(&server, &claim.statement, claim.signature) {
                        true => "goes on",
                        false => "another server",
                    }
                }
                Ok(Received::Record { event: Event::CheckClient(claim), .. }) => {
                    let client = modulus(text(&case["given"], "client_key"));
                    match side.bind(&claim, &array(&case["gives"], "H(SPKI_C)")) {
                        Ok(statement) if verify(&client, &statement, claim.signature()) => "goes on",
                        _ => "unauthorised",
                    }
                }
                Ok(_) => "goes on",
                Err(Error::Peer(PeerError::ServerKey)) => "another server",
                Err(_) => "ends",
            };
            assert_eq!(verdict, text(row, "result"), "{about}");
            rights += usize::from(verdict == "goes on");
            if verdict == "ends" {
                // For good, and without a byte.
                assert!(side.transmit(&mut [0; 1024]).is_err(), "{about}");
            }
            count += 1;
        }
    }
    println!("{count} records in 12 states");
    assert_eq!((count, rights), (209, 12));
}

#[test]
fn resumptions() {
    let file = file("resumption.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let held = channel(given);
        let config = ClientConfig {
            server: Some(held.server_key),
            ask_for_key: false,
            record_limit: number(given, "record_limit_C"),
        };
        let mut client: Connection = Connection::resume(config, held.clone(), &array(given, "seed_C")).unwrap();
        let config = ServerConfig {
            id: held.server,
            fingerprint: held.server_key,
            record_limit: number(given, "record_limit_S"),
        };
        let mut server: Connection = Connection::server(config, &array(given, "seed_S"));
        let mut out = [0; 256];
        let len = client.transmit(&mut out).unwrap();
        gives(expected, "ClientHello", &out[..len]);
        let offered = server.receive(&mut out[..len]);
        assert!(matches!(offered, Ok(Received::Record { event: Event::CheckChannel(id), .. }) if id == held.id));
        let len = server.answer_offer(Some(&held), &mut out).unwrap();
        let (hello, auth) = out[..len].split_at_mut(79);
        gives(expected, "ServerHello", hello);
        gives(expected, "ServerAuth", auth);
        client.receive(hello).unwrap();
        client.receive(auth).unwrap();
        let len = client.transmit(&mut out).unwrap();
        gives(expected, "ClientAuth", &out[..len]);
        assert!(matches!(server.receive(&mut out[..len]), Ok(Received::Record { event: Event::Resumed, .. })));
        end(case, &mut client, &mut server);
    }
}

/// A client's end with this seed, which presents a puzzle if it was asked for one.
fn stranger(given: &Value, puzzle: Option<&Puzzle>) -> Connection {
    let config = |server| ClientConfig {
        server: Some(server),
        ask_for_key: false,
        record_limit: number(given, "record_limit_C"),
    };
    let seed = array(given, "seed_C");
    let mut client: Connection = match &given["offer"] {
        Value::Null => Connection::client(config([7; 32]), &seed),
        offer => Connection::resume(config(array(offer, "H(SPKI_S)")), channel(offer), &seed).unwrap(),
    };
    if let Some(puzzle) = puzzle {
        client.present(puzzle).unwrap();
        while client.solve() {}
    }
    client
}

/// What a client that has said its first hello makes of this.
fn heard(given: &Value, retry: &mut [u8]) -> (Error, Option<Puzzle>) {
    let mut client = stranger(given, None);
    client.transmit(&mut [0; 256]).unwrap();
    (client.receive(retry).err().expect("it ends the connection"), client.puzzle())
}

/// A server's end that demands work, and has heard this hello.
fn judging(hello: &mut [u8]) -> Connection {
    let mut server: Connection =
        Connection::server(ServerConfig { id: [1; 16], fingerprint: [2; 32], record_limit: 16_408 }, &[3; 64]);
    server.demand_work();
    server.receive(hello).unwrap();
    server
}

#[test]
fn work_that_a_server_asks_for() {
    let file = file("retry.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let bits = number(given, "bits");
        let cookie = bytes(given, "cookie");
        if let made @ Value::Object(_) = &given["cookie_of"] {
            let key = CookieKey::new(secret(made, "k_cookie"));
            let ours = key.cookie(&array(made, "source"), number(made, "minute"), number(made, "bits"));
            gives(given, "cookie", &ours);
        }
        let (error, puzzle) = heard(given, &mut bytes(expected, "HelloRetry"));
        assert_eq!(error, PeerError::Retry.into());
        let puzzle = puzzle.unwrap();
        assert_eq!(puzzle.bits(), bits);
        let mut client = stranger(given, Some(&puzzle));
        let mut out = [0; 256];
        let len = client.transmit(&mut out).unwrap();
        gives(expected, "ClientHello", &out[..len]);
        // Asked for once more, it gives up.
        let again = client.receive(&mut bytes(expected, "HelloRetry")).err();
        assert_eq!((again, client.puzzle()), (Some(PeerError::Busy.into()), None));

        let mut server = judging(&mut out[..len]);
        if !given["offer"].is_null() {
            assert_eq!(server.answer_offer(None, &mut [0; 256]), Ok(0));
        }
        let presented = *server.presented().unwrap();
        assert_eq!(presented.cookie(), cookie);
        assert!(presented.is_solved(bits));
        gives(expected, "proof", &[&bytes(expected, "proof")[..24], &presented.name()].concat());
        if given["offer"].is_null() {
            let mut server = judging(&mut bytes(expected, "ClientHello"));
            let len = server.retry(&cookie, bits, &mut out).unwrap();
            gives(expected, "HelloRetry", &out[..len]);
        }
    }
    let given = &case(&file, "work for a full handshake")["given"];
    for view in list(&file, "views") {
        let (error, puzzle) = heard(given, &mut bytes(view, "HelloRetry"));
        let result = match error {
            Error::Peer(PeerError::Retry) => "work",
            Error::Peer(PeerError::Busy | PeerError::Puzzle { .. }) => "busy",
            _ => "ends",
        };
        assert_eq!(result, text(view, "result"), "{}", text(view, "why"));
        assert_eq!(puzzle.is_some(), result == "work", "{}", text(view, "why"));
    }
    let made = &given["cookie_of"];
    let (key, source) = (CookieKey::new(secret(made, "k_cookie")), array(made, "source"));
    for hello in list(&file, "shown") {
        let server = judging(&mut bytes(hello, "ClientHello"));
        let presented = server.presented().unwrap();
        let minute: u64 = number(hello, "minute");
        let bits = [minute, minute - 1].into_iter().find_map(|minute| key.bits(presented.cookie(), &source, minute));
        let result = match bits.is_some_and(|bits| presented.is_solved(bits)) {
            true => "let through",
            false => "asked again",
        };
        assert_eq!(result, text(hello, "result"), "{}", text(hello, "why"));
    }
}

#[test]
fn refusals() {
    let (handshakes, refusals) = (file("handshake.json"), file("refusals.json"));
    let handshake = case(&handshakes, "enroll with a token, refused");
    let mut out = [0; 64];
    assert_eq!(cases(&refusals).len(), Reason::ALL.len());
    for (case, reason) in cases(&refusals).iter().zip(Reason::ALL) {
        assert_eq!((number(case, "reason"), text(case, "spelling")), (reason.code(), reason.as_str()));
        let (mut client, mut server) = claim(handshake);
        let retry_after = number(case, "retry_after");
        let len = server.refuse(*reason, retry_after, &mut out).unwrap();
        gives(case, "Refusal", &out[..len]);
        let refused = PeerError::Refused { reason: *reason, retry_after };
        assert_eq!(client.receive(&mut out[..len]).err(), Some(refused.into()));
    }
    for case in list(&refusals, "malformed") {
        let (mut client, _) = claim(handshake);
        let error = client.receive(&mut bytes(case, "Refusal")).err();
        assert_eq!(error, Some(Error::Decode), "{}", text(case, "why"));
    }
}

#[test]
fn records() {
    let (handshakes, records) = (file("handshake.json"), file("records.json"));
    let handshake = case(&handshakes, "key");
    for case in cases(&records) {
        let (mut client, mut server) = claim(handshake);
        end(handshake, &mut client, &mut server);
        let rows = list(case, "records");
        let mut out = [0; 20_000];
        // Those that are not in the file, so that the first that is has its number.
        let client_first = rows.iter().find(|row| row["from"] == "client").map_or(0, |row| number(row, "counter"));
        for _ in 0..client_first {
            let len = client.send(&Message::Status { request: 7 }, &mut out).unwrap();
            server.receive(&mut out[..len]).unwrap();
        }
        for row in rows {
            let (sender, receiver) =
                if row["from"] == "client" { (&mut client, &mut server) } else { (&mut server, &mut client) };
            let payload = bytes(row, "payload");
            let len = match Message::decode(&payload).unwrap() {
                Message::KeyUpdate => sender.update_key(&mut out).unwrap(),
                Message::Close { reason } => sender.close(reason, &mut out).unwrap(),
                message => sender.send(&message, &mut out).unwrap(),
            };
            gives(row, "record", &out[..len]);
            let Ok(Received::Record { used, event }) = receiver.receive(&mut out[..len]) else {
                panic!("{row:#}");
            };
            assert_eq!(used, len);
            match (Message::decode(&payload).unwrap(), event) {
                (Message::KeyUpdate, Event::Progress) => {}
                (Message::Close { reason }, Event::Closed(told)) => assert_eq!(told, reason),
                (_, Event::Message(opened)) => assert_eq!(opened, payload),
                _ => panic!("{row:#}"),
            }
        }
    }
}

#[test]
fn enrolments() {
    let file = file("enrolment.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let (name, modulus) = (text(given, "device_name"), modulus(text(given, "device_key")));
        let key = PublicKey::from_modulus(&modulus).unwrap();
        let (enroller, id) = (array(given, "enroller_id"), array(given, "device_id"));
        let statement = enrolment_statement(&secret(given, "exporter"), &enroller, &id, name, key);
        gives(expected, "statement", statement.message(&mut [0; Statement::MAX_LEN]));
        gives(expected, "digest", &statement.digest());
        let signature = bytes(expected, "signature");
        assert!(verify(&modulus, &statement, &signature));
        assert_eq!(verify_rsa(key, &statement, &signature), Ok(()));
        let enrol = Enrol {
            request: number(given, "request"),
            index: number(given, "index"),
            count: number(given, "count"),
            id,
            name,
            modulus: &modulus,
            signature: &signature,
        };
        let mut buffer = [0; 1024];
        let mut out = [0; 1024];
        let len = enrol.encode(&mut buffer).unwrap().encode(&mut out).unwrap();
        gives(expected, "payload", &out[..len]);
    }
}

// End to end

fn member(value: &Value) -> Member {
    Member { id: array(value, "id"), key: array(value, "key") }
}

/// A client's keys and bundle, from its private halves.
fn bundle(given: &Value) -> (BundleKeys, Bundle) {
    let keys = BundleKeys::new(
        ExchangeKey::new(secret(given, "exchange_private")),
        ExchangeKey::new(secret(given, "prekey_private")),
        number(given, "prekey_id"),
        SigningKey::new(secret(given, "verifying_private")),
    );
    let bundle = keys.bundle(&member(given), number(given, "epoch"), array(given, "previous"));
    (keys, bundle)
}

#[test]
fn bundles() {
    let file = file("bundle.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let (_, bundle) = bundle(given);
        gives(expected, "exchange", &bundle.exchange);
        gives(expected, "prekey", &bundle.prekey);
        gives(expected, "verifying", &bundle.verifying);
        gives(expected, "bundle", &bundle.encode());
        gives(expected, "H(bundle)", &bundle.hash());
        let statement = bundle.statement();
        gives(expected, "statement", statement.message(&mut [0; Statement::MAX_LEN]));
        gives(expected, "digest", &statement.digest());
        if let Some(key) = given["identity_key"].as_str() {
            assert!(verify(&modulus(key), &statement, &bytes(expected, "signature")));
        }
    }
    let remembered = Bundle::decode(&bytes(&file, "remembered")).unwrap();
    for view in list(&file, "views") {
        let shown = Bundle::decode(&bytes(view, "shown")).unwrap();
        let then = match BundleView::new(&remembered).update(&shown) {
            Ok(()) => "used",
            Err(BundleError::Forked) => "forked",
            Err(BundleError::KeyChanged) => "key changed",
            Err(BundleError::Older | BundleError::OtherMember) => "refused",
            Err(other) => panic!("{other}"),
        };
        assert_eq!(then, text(view, "then"), "{}", text(view, "name"));
    }
}

#[test]
fn rotations() {
    let file = file("rotation.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let former = member(given);
        let (next, key_epoch) = (array(given, "new_key"), number(given, "key_epoch"));
        let rotation = Rotation { id: former.id, former: former.key, next, key_epoch };
        let possession = rotation.possession(&secret(given, "exporter"));
        gives(expected, "digest_rotate", &rotation.statement().digest());
        gives(expected, "digest_rotate_proof", &possession.digest());
        if given["present_key"].is_string() {
            let (present, next) = (modulus(text(given, "present_key")), modulus(text(given, "next_key")));
            assert_eq!(PublicKey::from_modulus(&present).unwrap().fingerprint(), rotation.former);
            assert_eq!(PublicKey::from_modulus(&next).unwrap().fingerprint(), rotation.next);
            assert!(verify(&present, &rotation.statement(), &bytes(expected, "signature")));
            assert!(verify(&next, &possession, &bytes(expected, "proof")));
        }
    }
}

#[test]
fn safety_numbers() {
    for case in cases(&file("safety_number.json")) {
        let (one, other) = (member(&case["given"]["one"]), member(&case["given"]["other"]));
        let number = text(&case["gives"], "safety_number");
        assert_eq!(SafetyNumber::new(&one, &other).to_string(), number);
        assert_eq!(SafetyNumber::new(&other, &one).to_string(), number);
    }
}

#[test]
fn conversations_and_decisions() {
    let file = file("conversation.json");
    for case in list(&file, "direct") {
        let given = &case["given"];
        let conversation =
            Conversation::direct(&member(&given["one"]), &member(&given["other"]), number(given, "counter"));
        gives(&case["gives"], "sid", &conversation.sid);
        gives(&case["gives"], "mh", &conversation.members);
    }
    for case in list(&file, "group") {
        let (given, expected) = (&case["given"], &case["gives"]);
        let members: Vec<_> = list(given, "members").iter().map(member).collect();
        let epochs = list(given, "key_epochs").iter().map(|epoch| u32::try_from(epoch.as_u64().unwrap()).unwrap());
        let version = group_version(epochs).unwrap();
        assert_eq!(version, number::<u32>(expected, "version"));
        let conversation = Conversation::group(array(given, "sid"), version, &members).unwrap();
        gives(expected, "mh", &conversation.members);
        let signing = || SigningKey::new(secret(given, "verifying_private"));
        let unused = || ExchangeKey::new(Secret::new([1; 32]));
        let keys = BundleKeys::new(unused(), unused(), 0, signing());
        let bundle = keys.bundle(&members[0], 1, [0; 32]);
        gives(expected, "verifying", &bundle.verifying);
        let decisions = list(expected, "decisions");
        let all = [
            (Decision::Init(GroupFlags::NONE), "ossicle init"),
            (Decision::Init(GroupFlags::CREATOR_CLOSES), "ossicle init"),
            (Decision::Accept, "ossicle accept"),
            (Decision::Decline, "ossicle decline"),
            (Decision::Close, "ossicle close"),
        ];
        assert_eq!(decisions.len(), all.len());
        for (row, (decision, label)) in decisions.iter().zip(all) {
            assert_eq!(text(row, "label"), label);
            gives(row, "signature", &decision.sign(&keys, &conversation));
            assert_eq!(decision.verify(&bundle, &conversation, &array(row, "signature")), Ok(()));
        }
    }
}

#[test]
fn posts() {
    let file = file("public.json");
    let unsigned = [0; 64];
    fn post<'v>(given: &Value, body: &'v [u8], signature: &'v [u8; 64]) -> Post<'v> {
        Post {
            number: number(given, "number"),
            at: number(given, "at"),
            epoch: number(given, "epoch"),
            kind: number(given, "kind"),
            signature: Fixed(signature),
            body,
        }
    }
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let author = Party::of(&given["author"]);
        let network: [u8; 32] = array(given, "network");
        let body = bytes(&given["post"], "body");
        let signature =
            post(&given["post"], &body, &unsigned).sign(&network, &author.bundle.member(), &author.keys).unwrap();
        gives(expected, "signature", &signature);
        let post = post(&given["post"], &body, &signature);
        assert_eq!(post.verify(&network, &author.bundle), Ok(()));
        let (mut scratch, mut payload) = (vec![0; 2048], vec![0; 2048]);
        let len = Say { request: 16, post }.encode(&mut scratch).unwrap().encode(&mut payload).unwrap();
        gives(expected, "Say", &payload[..len]);
    }
    for row in list(&file, "refused") {
        let (body, signature) = (bytes(&row["post"], "body"), array(row, "signature"));
        let verified =
            post(&row["post"], &body, &signature).verify(&array(row, "network"), &Party::of(&row["author"]).bundle);
        assert_eq!(verified, Err(Error::Crypto), "{}", text(row, "why"));
    }
}

/// A client of a case.
struct Party {
    keys: BundleKeys,
    bundle: Bundle,
}

impl Party {
    fn of(given: &Value) -> Self {
        let (keys, bundle) = bundle(given);
        Self { keys, bundle }
    }
}

#[test]
fn groups() {
    let file = file("group.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let (creator, invitees) = (Party::of(&given["creator"]), list(given, "invitees"));
        let [b, c] = [Party::of(&invitees[0]), Party::of(&invitees[1])];
        gives(expected, "bundle_C", &c.bundle.encode());
        let parties = [&creator, &b, &c];
        let epochs: Vec<u32> =
            list(given, "key_epochs").iter().map(|epoch| epoch.as_u64().unwrap().try_into().unwrap()).collect();
        let pin = |id: &[u8; 16]| {
            let place = parties.iter().position(|party| party.bundle.id == *id)?;
            Some((parties[place].bundle.key, epochs[place]))
        };
        let lines: Vec<u8> = parties.iter().flat_map(|party| party.bundle.member().encode()).collect();
        let flags = GroupFlags::from_bits(number(given, "flags")).unwrap();
        let members = Members::new(&lines).unwrap();
        let group =
            Membership::new(array(given, "sid"), &creator.bundle.id, flags, members, &b.bundle.id, pin).unwrap();
        gives(expected, "mh", &group.conversation().members);
        for (name, decision, party) in [
            ("init", Decision::Init(flags), &creator),
            ("accept_B", Decision::Accept, &b),
            ("decline_C", Decision::Decline, &c),
            ("close_A", Decision::Close, &creator),
        ] {
            gives(expected, name, &decision.sign(&party.keys, group.conversation()));
            assert_eq!(group.verify(decision, &party.bundle, &array(expected, name)), Ok(()));
        }
        // The engine makes key pairs by DeriveKeyPair: it opens what stands in the file, and seals what it opens itself.
        let mut names = Vec::new();
        for (name, party) in [("name_B", &b), ("name_C", &c)] {
            let mut room = [0; 65];
            let prekey = party.keys.prekey(&party.bundle).unwrap();
            let opened = group.open_name(&array(expected, name), &prekey, &creator.bundle, &mut room);
            assert_eq!(opened, Ok(text(given, "name")));
            gives(expected, "text", &room);
            let drawn = &mut ossicle_tests::Rng::new(7);
            let sealed = group.seal_name(text(given, "name"), &creator.keys, &party.bundle, drawn).unwrap();
            assert_eq!(group.open_name(&sealed, &prekey, &creator.bundle, &mut room), Ok(text(given, "name")));
            names.extend(bytes(expected, name));
        }
        let (signature, mut out, mut buffer) = (array(expected, "init"), [0; 1024], [0; 1024]);
        let (signature, names) = (Fixed(&signature), Names::new(&names).unwrap());
        let sid = group.conversation().sid;
        let init = Init { request: 1, sid, flags, signature, members, names };
        let len = init.encode(&mut buffer).unwrap().encode(&mut out).unwrap();
        gives(expected, "Init", &out[..len]);
        for (invitation, (member, name)) in
            ["Invite", "Invite_C"].into_iter().zip(init.invitees(&creator.bundle.id).unwrap())
        {
            let invite = Invite { sid, creator: creator.bundle.id, flags, signature, members, name: Fixed(name) };
            let len = invite.encode(&mut buffer).unwrap().encode(&mut out).unwrap();
            gives(expected, invitation, &out[..len]);
            assert_eq!(Membership::of(&invite, &member.id, pin), Ok(group));
        }
        let mut sending = sending(&given["chain"]);
        let sealed = sending.seal::<RustCrypto>(true, 0, b"who waters today?", &mut out).unwrap();
        gives(expected, "message", &out[..sealed.len]);
        for row in list(&file, "refused") {
            let mut room = [0; 65];
            let prekey = b.keys.prekey(&b.bundle).unwrap();
            let opened = group.open_name(&array(row, "name"), &prekey, &creator.bundle, &mut room);
            assert_eq!(opened, Err(Error::Crypto), "{}", text(row, "why"));
            assert_eq!(room, [0; 65], "{}", text(row, "why"));
        }
    }
}

/// Hands out these bytes, once.
struct Scripted(Vec<u8>);

impl rand_core::TryRng for Scripted {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        unreachable!("bytes are drawn")
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        unreachable!("bytes are drawn")
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Self::Error> {
        let rest = self.0.split_off(target.len());
        target.copy_from_slice(&self.0);
        self.0 = rest;
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Scripted {}

fn conversation(chain: &Value) -> Conversation {
    Conversation { sid: array(chain, "sid"), members: array(chain, "mh"), signed: flag(chain, "group") }
}

/// The sending end of a chain: the engine draws its id, CK_0, sk_c and RM in this order.
fn sending(chain: &Value) -> SendingChain {
    let drawn = ["chain_id", "CK_0", "sk_c", "RM"].map(|name| bytes(chain, name)).concat();
    let mut rng = Scripted(drawn);
    let (from, epoch) = (member(&chain["from"]), number(chain, "chain_epoch"));
    let sender = SendingChain::start(&from, &conversation(chain), epoch, &mut rng).unwrap();
    assert!(rng.0.is_empty());
    sender
}

type Receiver = ReceivingChain<64>;

/// The recipient of a case accepts a wrap.
fn accept(given: &Value, wrap: &[u8], last_seen: Option<(u32, u32)>) -> Result<Receiver, AcceptError> {
    let ((_, from), (keys, own)) = (bundle(&given["sender"]), bundle(&given["recipient"]));
    let prekey = keys.prekey(&own).unwrap();
    let conversation = conversation(&given["chain"]);
    Receiver::accept(&mut wrap.to_vec(), &prekey, &from.member(), &from, &conversation, last_seen)
}

#[test]
fn wraps() {
    let file = file("wrap.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let ((keys, own), (_, to)) = (bundle(&given["sender"]), bundle(&given["recipient"]));
        let mut sender = sending(&given["chain"]);
        for _ in 0..number(given, "n") {
            sender.seal::<RustCrypto>(true, 0, b"", &mut [0; 128]).unwrap();
        }
        gives(expected, "RK", sender.receipt_key(&to.id).expose());
        let wrap = bytes(expected, "wrap");
        let header = WrapHeader::decode(&wrap).unwrap();
        assert_eq!((&header.sid, &header.chain_id), (sender.sid(), sender.chain_id()));
        assert_eq!((header.chain_epoch, header.prekey_id), (sender.epoch(), to.prekey_id));
        if given["ikm_E"].is_string() {
            let mut out = [0; WRAP_LEN];
            let mut rng = Scripted(bytes(given, "ikm_E"));
            sender.wrap(&keys, &own, &to.member(), &to, &mut rng, &mut out).unwrap();
            gives(expected, "wrap", &out);
        }
        let receiver = accept(given, &wrap, None).unwrap();
        assert_eq!(receiver.epochs(), (own.epoch, sender.epoch()));
        assert_eq!(receiver.next(), number::<u32>(given, "n"));
    }
    let given = &cases(&file)[0]["given"];
    for case in list(&file, "refused") {
        let refused = match accept(given, &bytes(case, "wrap"), Some((9, 6))) {
            Ok(_) => "accepted",
            Err(AcceptError::Replayed) => "replayed",
            Err(AcceptError::Unreadable) => "unreadable",
            Err(other) => panic!("{other}"),
        };
        assert_eq!(refused, text(case, "result"), "{}", text(case, "name"));
    }
}

#[test]
fn chains() {
    let mut results = BTreeSet::new();
    for case in cases(&file("chain.json")) {
        assert_eq!(number::<u32>(case, "S"), 64);
        let mut receiver = accept(case, &bytes(case, "wrap"), None).unwrap();
        assert_eq!(receiver.next(), number::<u32>(case, "first"));
        for row in list(case, "envelopes") {
            let about = text(row, "about");
            let envelope = bytes(row, "envelope");
            let mut data = envelope.clone();
            let result = match receiver.open::<RustCrypto>(&mut data) {
                Ok(opened) => {
                    let expected = &row["opened"];
                    assert_eq!(opened.n, number::<u32>(expected, "n"), "{about}");
                    assert_eq!(opened.kind, number::<u8>(expected, "kind"), "{about}");
                    assert_eq!(opened.signed, flag(expected, "signed"), "{about}");
                    gives(expected, "body", opened.body);
                    gives(expected, "salt", &opened.salt);
                    gives(expected, "envelope", &envelope);
                    // The sender makes the same bytes of it.
                    let mut sender = sending(&case["chain"]);
                    let mut out = [0; 2048];
                    for _ in 0..opened.n {
                        sender.seal::<RustCrypto>(flag(&case["chain"], "group"), 0, b"", &mut out).unwrap();
                    }
                    let sealed = sender.seal::<RustCrypto>(opened.signed, opened.kind, opened.body, &mut out).unwrap();
                    assert_eq!(out[..sealed.len], envelope, "{about}");
                    "opened"
                }
                Err(OpenError::Duplicate { .. }) => "duplicate",
                Err(OpenError::Old { .. }) => "old",
                Err(OpenError::Refused(_)) if envelope.len() < ENVELOPE_OVERHEAD => "dropped",
                Err(OpenError::Refused(reason)) => reason.as_str(),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(result, text(row, "result"), "{about}");
            assert_eq!(receiver.next(), number::<u32>(row, "next"), "{about}");
            let held: BTreeSet<u32> = receiver.missing().collect();
            let expected: BTreeSet<u32> =
                row["held"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap().try_into().unwrap()).collect();
            assert_eq!(held, expected, "{about}");
            results.insert(result);
        }
    }
    let all = ["opened", "duplicate", "old", "dropped", "rekey", "gap", "rewound", "unreadable"];
    assert_eq!(results, BTreeSet::from(all), "every answer of 9.6 stands in the file");
}

#[test]
fn receipts() {
    let file = file("receipt.json");
    let (_, own) = bundle(&file["recipient"]);
    let mut receiver = accept(&file, &bytes(&file, "wrap"), None).unwrap();
    let mut sender = sending(&file["chain"]);
    gives(&file, "RK", sender.receipt_key(&own.id).expose());
    let mut salts = Vec::new();
    for (envelope, message) in list(&file, "envelopes").iter().zip(list(&file, "messages")) {
        let mut data = hex::decode(envelope.as_str().unwrap()).unwrap();
        salts.push(receiver.open::<RustCrypto>(&mut data).unwrap().salt);
        let (signed, kind) = (flag(message, "signed"), number(message, "kind"));
        sender.seal::<RustCrypto>(signed, kind, &bytes(message, "body"), &mut [0; 256]).unwrap();
    }
    for case in cases(&file) {
        let given = &case["given"];
        let rung = Rung::from_code(number(given, "rung")).unwrap();
        let (from, to, salt) = (number(given, "from"), number(given, "to"), array(given, "salt_of_to"));
        let receipt = match given["reason"].as_u64() {
            None => receiver.receipt(&own.id, rung, from, to).unwrap(),
            Some(_) => receiver.refusal(&own.id, Reason::from_code(number(given, "reason")).unwrap(), to, &salt),
        };
        gives(&case["gives"], "tag", &receipt.tag.unwrap());
        assert_eq!(salts[usize::try_from(to).unwrap()], salt);
        assert_eq!(sender.verify_receipt(&own.id, &receipt, &salt), Ok(()));
    }
    for verdict in list(&file, "verdicts") {
        let to = number(verdict, "to");
        let reason = verdict["reason"].as_u64().map(|_| Reason::from_code(number(verdict, "reason")).unwrap());
        let receipt = Receipt {
            rung: Rung::from_code(number(verdict, "rung")).unwrap(),
            reason,
            chain: array(verdict, "chain"),
            from: number(verdict, "from"),
            to,
            tag: verdict["tag"].is_string().then(|| array(verdict, "tag")),
        };
        // Of what was never sealed there is no salt; that of the last message is as good as any.
        let salt = salts.get(usize::try_from(to).unwrap()).unwrap_or(&salts[1]);
        let is_word = sender.verify_receipt(&own.id, &receipt, salt).is_ok();
        assert_eq!(is_word, flag(verdict, "recipients_word"), "{}", text(verdict, "name"));
    }
}

// Catalogue and page

#[test]
fn messages() {
    let file = file("messages.json");
    let mut codes = BTreeSet::new();
    for case in cases(&file) {
        let payload = bytes(case, "payload");
        let message = Message::decode(&payload).unwrap();
        assert_eq!(text(case, "code"), format!("{:04x}", message.code()));
        assert_eq!(fields(&message), case["body"], "{}", text(case, "case"));
        let mut out = [0; MAX_RECORD_LEN];
        let len = message.encode(&mut out).unwrap();
        gives(case, "payload", &out[..len]);
        codes.insert(text(case, "code").to_owned());
    }
    // The table of 7.4.
    let catalogue: BTreeSet<_> = PROTOCOL
        .lines()
        .skip_while(|line| !line.starts_with("### 7.4 "))
        .skip(1)
        .take_while(|line| !line.starts_with('#'))
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()?.split_once(' '))
        .filter(|(family, rest)| family.len() == 2 && rest.len() == 2)
        .map(|(family, rest)| format!("{family}{rest}").to_lowercase())
        .collect();
    assert_eq!(catalogue.len(), 45);
    assert_eq!(codes, catalogue, "every message of the catalogue, and no other");
    for case in list(&file, "malformed") {
        assert_eq!(Message::decode(&bytes(case, "payload")), Err(Error::Decode), "{}", text(case, "why"));
    }
    for case in list(&file, "longer_than_needed") {
        let request = number(case, "request");
        assert_eq!(Message::decode(&bytes(case, "payload")), Ok(Message::Status { request }));
    }
}

/// The body of a message as the file has it.
fn fields(message: &Message<'_>) -> Value {
    use hex::encode;
    use serde_json::json;

    let signed =
        |bundle: &SignedBundle<'_>| json!({"bundle": encode(bundle.bundle), "signature": encode(bundle.signature)});
    let status = |status: PeerStatus| match status {
        PeerStatus::Online => json!({"online": true}),
        PeerStatus::Offline { last_seen } => json!({"online": false, "last_seen": last_seen}),
    };
    let changes = |lines: &[u8]| {
        let line = |line: Result<Change<'_>, Error>| {
            let line = line.unwrap();
            json!({"id": encode(line.id), "name": line.name, "status": line.status.map(status)})
        };
        Change::lines(lines).map(line).collect::<Vec<_>>()
    };
    let receipt = |receipt: &Receipt| {
        json!({
            "rung": receipt.rung.code(), "reason": receipt.reason.map(Reason::code), "chain": encode(receipt.chain),
            "from": receipt.from, "to": receipt.to, "tag": receipt.tag.map(encode),
        })
    };
    let post = |post: &Post<'_>| {
        json!({
            "number": post.number, "at": post.at, "epoch": post.epoch, "kind": post.kind,
            "signature": encode(post.signature.0), "body": encode(post.body),
        })
    };
    let subject = |subject: &Subject<'_>| match subject {
        Subject::Id(id) => json!({"id": encode(id)}),
        Subject::Name(name) => json!({"name": name}),
    };
    let members = |members: Members<'_>| members.iter().map(|member| encode(member.encode())).collect::<Vec<_>>();
    let wanted = |wanted: &Rungs| {
        let bits = [(Rung::Accepted, 1), (Rung::Stored, 2), (Rung::Delivered, 4), (Rung::Opened, 8)];
        bits.iter().filter(|(rung, _)| wanted.contains(*rung)).map(|(_, bit)| bit).sum::<u8>()
    };
    let channel = |channel: Option<ChannelInfo>| {
        channel.map(|channel| json!({"channel": encode(channel.id), "valid_for": channel.valid_for}))
    };
    match message {
        Message::Send { wanted: rungs, envelope } | Message::Deliver { wanted: rungs, envelope } => {
            json!({"wanted": wanted(rungs), "envelope": encode(envelope)})
        }
        Message::Told(told) | Message::Tell(told) => receipt(told),
        Message::Waited { seq, at } => json!({"seq": seq, "at": at}),
        Message::Acknowledge { seq } => json!({"seq": seq}),
        Message::Status { request } | Message::StatusResponse { request } | Message::Done { request } => {
            json!({"request": request})
        }
        Message::Lookup(lookup) => json!({
            "request": lookup.request, "key": lookup.key, "bundle": lookup.bundle, "subject": subject(&lookup.subject),
        }),
        Message::LookupResponse { request, entry } => {
            let mut fields = json!({
                "id": encode(entry.id), "name": entry.name, "key_epoch": entry.key_epoch,
                "record_limit": entry.record_limit, "status": status(entry.status),
                "modulus": entry.modulus.map(encode), "bundle": entry.bundle.as_ref().map(signed),
            });
            if entry.bundle.is_none() {
                fields["bundle"] = Value::Null;
            }
            json!({"request": request, "entry": fields})
        }
        Message::List { request, after } => json!({"request": request, "after": after}),
        Message::ListResponse(page) => {
            let lines: Vec<_> = page
                .lines()
                .map(|line| line.unwrap())
                .map(|line| json!({"id": encode(line.id), "name": line.name, "status": status(line.status)}))
                .collect();
            json!({"request": page.request(), "more": page.more(), "lines": lines})
        }
        Message::Revoke { request, subject: whom } => json!({"request": request, "subject": subject(whom)}),
        Message::Listening | Message::NotListening | Message::KeyUpdate => json!({}),
        Message::Settings(settings) => json!({
            "channel": encode(settings.channel), "valid_for": settings.valid_for, "heartbeat": settings.heartbeat,
            "timeout": settings.timeout, "time": settings.time, "waiting": settings.waiting,
            "store_epoch": encode(settings.store_epoch),
        }),
        Message::Close { reason } => json!({"reason": reason.map(Reason::code)}),
        Message::Publish { request, bundle } => json!({"request": request, "bundle": signed(bundle)}),
        Message::Wrap { request, to, wrap, bundle } => {
            json!({"request": request, "to": encode(to), "wrap": encode(wrap), "bundle": signed(bundle)})
        }
        Message::WrapDelivery { from, wrap, bundle } => {
            json!({"from": encode(from), "wrap": encode(wrap), "bundle": signed(bundle)})
        }
        Message::Refused { request, reason, retry_after } => {
            json!({"request": request, "reason": reason.code(), "retry_after": retry_after})
        }
        Message::Other(body) => match body.code() {
            Enrol::CODE => {
                let enrol = Enrol::decode(*body).unwrap();
                json!({
                    "request": enrol.request, "index": enrol.index, "count": enrol.count, "id": encode(enrol.id),
                    "name": enrol.name, "modulus": encode(enrol.modulus), "signature": encode(enrol.signature),
                })
            }
            Rotate::CODE => {
                let rotate = Rotate::decode(*body).unwrap();
                json!({
                    "request": rotate.request, "key_epoch": rotate.key_epoch, "modulus": encode(rotate.modulus),
                    "signature": encode(rotate.signature), "proof": encode(rotate.proof),
                    "bundle": signed(&rotate.bundle),
                })
            }
            SuccessorQuery::CODE => {
                let query = SuccessorQuery::decode(*body).unwrap();
                json!({"request": query.request, "id": encode(query.id), "key_epoch": query.key_epoch})
            }
            Successor::CODE => {
                let step = Successor::decode(*body).unwrap();
                json!({
                    "request": step.request, "modulus": encode(step.modulus), "signature": encode(step.signature),
                })
            }
            Channels::CODE => json!({"request": Channels::decode(*body).unwrap().request}),
            ExpireChannels::CODE => json!({"request": ExpireChannels::decode(*body).unwrap().request}),
            Watch::CODE => {
                let watch = Watch::decode(*body).unwrap();
                json!({"request": watch.request, "pattern": watch.pattern, "after": watch.after})
            }
            Unwatch::CODE => {
                let unwatch = Unwatch::decode(*body).unwrap();
                json!({"request": unwatch.request, "pattern": unwatch.pattern})
            }
            WatchResponse::CODE => {
                let page = WatchResponse::decode(*body).unwrap();
                json!({"request": page.request, "next": page.next, "lines": changes(page.lines)})
            }
            Changed::CODE => {
                let changed = Changed::decode(*body).unwrap();
                json!({"lost": changed.lost, "lines": changes(changed.lines)})
            }
            ChannelsResponse::CODE => {
                let held = ChannelsResponse::decode(*body).unwrap();
                json!({"request": held.request, "first": channel(held.first), "second": channel(held.second)})
            }
            Init::CODE => {
                let init = Init::decode(*body).unwrap();
                json!({
                    "request": init.request, "sid": encode(init.sid), "flags": init.flags.bits(),
                    "signature": encode(init.signature.0), "members": members(init.members),
                    "names": init.names.iter().map(encode).collect::<Vec<_>>(),
                })
            }
            Invite::CODE => {
                let invite = Invite::decode(*body).unwrap();
                json!({
                    "sid": encode(invite.sid), "creator": encode(invite.creator), "flags": invite.flags.bits(),
                    "signature": encode(invite.signature.0), "members": members(invite.members),
                    "name": encode(invite.name.0),
                })
            }
            Answer::CODE => {
                let answer = Answer::decode(*body).unwrap();
                json!({
                    "request": answer.request, "sid": encode(answer.sid), "accept": answer.accept,
                    "signature": encode(answer.signature.0),
                })
            }
            MemberChanged::CODE => {
                let changed = MemberChanged::decode(*body).unwrap();
                let state = match changed.state {
                    MemberState::Accepted => 0,
                    MemberState::Declined => 1,
                    MemberState::Expired => 2,
                    MemberState::Revoked => 3,
                    other => panic!("{other:?}"),
                };
                json!({
                    "sid": encode(changed.sid), "member": encode(changed.member), "state": state,
                    "signature": changed.signature.map(|signature| encode(signature.0)),
                })
            }
            CloseConversation::CODE => {
                let close = CloseConversation::decode(*body).unwrap();
                json!({"request": close.request, "sid": encode(close.sid), "signature": encode(close.signature.0)})
            }
            Closed::CODE => {
                let closed = Closed::decode(*body).unwrap();
                json!({
                    "sid": encode(closed.sid), "by": closed.by.map(encode),
                    "signature": closed.signature.map(|signature| encode(signature.0)),
                })
            }
            ToldBy::CODE => {
                let told = ToldBy::decode(*body).unwrap();
                json!({"from": encode(told.from), "receipt": receipt(&told.receipt)})
            }
            Say::CODE => {
                let say = Say::decode(*body).unwrap();
                json!({"request": say.request, "post": post(&say.post)})
            }
            Follow::CODE => {
                let follow = Follow::decode(*body).unwrap();
                json!({"request": follow.request, "after": follow.after})
            }
            FollowResponse::CODE => {
                let page = FollowResponse::decode(*body).unwrap();
                let line = |said: Result<Said<'_>, Error>| {
                    let said = said.unwrap();
                    json!({"seq": said.seq, "author": encode(said.author), "post": post(&said.post)})
                };
                let lines: Vec<_> = Said::lines(page.lines).map(line).collect();
                json!({"request": page.request, "more": page.more, "lines": lines})
            }
            News::CODE => {
                News::decode(*body).unwrap();
                json!({})
            }
            code => panic!("{code:04x}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn identity_pages() {
    let file = file("page.json");
    for case in cases(&file) {
        let (given, expected) = (&case["given"], &case["gives"]);
        let bytes_of_page = bytes(expected, "page");
        let page = IdentityPage::decode(&bytes_of_page).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((page.id, page.name), (array(given, "id"), text(given, "name")));
        assert_eq!(page.address.map(|byte| byte.to_string()).join("."), text(given, "address"));
        assert_eq!(page.port, number::<u16>(given, "port"));
        assert_eq!(page.server.modulus(), modulus(text(given, "server_key")));
        assert_eq!((page.owner.id, page.owner.name), (array(given, "owner_id"), text(given, "owner_name")));
        assert_eq!(page.owner.key.modulus(), modulus(text(given, "owner_key")));
        gives(given, "owner_bundle", &page.owner.bundle.encode());
        gives(given, "owner_signature", page.owner.signature);
        assert_eq!(page.groups == GroupPolicy::Owner, text(given, "groups") == "owner");
        assert_eq!(verify_rsa(page.owner.key, &page.owner.bundle.statement(), page.owner.signature), Ok(()));
        let mut buffer = [0; MAX_RSA_LEN];
        let key = RsaKey::new(page.key.d, page.key.p, page.key.q).unwrap();
        assert_eq!(key.public(&mut buffer).unwrap().modulus(), modulus(text(given, "key")));
        let mut out = [0; MAX_PAGE_LEN];
        let len = page.encode(&mut out).unwrap();
        assert_eq!(len, number::<usize>(expected, "length"));
        gives(expected, "page", &out[..len]);
    }
    for case in list(&file, "refused") {
        let result = match IdentityPage::decode(&bytes(case, "page")) {
            Ok(_) => "read",
            Err(PageError::Missing) => "missing",
            Err(PageError::Version) => "version",
            Err(PageError::Broken) => "broken",
            Err(other) => panic!("{other}"),
        };
        assert_eq!(result, text(case, "result"), "{}", text(case, "why"));
    }
}

#[test]
fn urls() {
    let file = file("url.json");
    for case in cases(&file) {
        let url = ServerUrl::parse(text(case, "url")).unwrap();
        assert_eq!((url.host.as_str(), url.port), (text(case, "host"), number(case, "port")));
        assert_eq!(url.fingerprint.map(hex::encode).as_deref(), case["fingerprint"].as_str());
        assert_eq!(url.token.is_some(), case["token"].is_object());
        if let Some(token) = url.token {
            gives(&case["token"], "id", &token.id);
            gives(&case["token"], "secret", token.secret.expose());
        }
    }
    for case in list(&file, "refused") {
        assert!(ServerUrl::parse(text(case, "url")).is_err(), "{}", text(case, "why"));
    }
}

#[test]
fn seeds_of_generators() {
    for case in cases(&file("randomness.json")) {
        let seed = generator_seed(&bytes(case, "entropy"), &bytes(case, "secret"));
        gives(case, "seed", seed.expose());
    }
}

// PROTOCOL.md

/// Every name that a section of PROTOCOL.md prints, with its value: digits with no space between them.
fn printed(section: &str) -> Vec<(String, String)> {
    let mut values: Vec<(String, String)> = Vec::new();
    let mut in_code = false;
    let lines = PROTOCOL
        .lines()
        .skip_while(|line| !(line.starts_with('#') && line.split(' ').nth(1) == Some(section)))
        .skip(1)
        .take_while(|line| !line.starts_with('#'));
    for line in lines {
        if line.starts_with("```") {
            in_code = !in_code;
        } else if in_code && line.starts_with(' ') {
            values.last_mut().unwrap().1.push_str(line.trim());
        } else if in_code {
            let (name, value) = line.split_once(' ').unwrap_or_else(|| panic!("PROTOCOL {section}: {line}"));
            values.push((name.to_owned(), value.split_whitespace().collect()));
        }
    }
    assert!(!values.is_empty(), "PROTOCOL {section} prints nothing");
    values
}

/// Every value that chapter 15 prints stands in the files, under the name that is given here where it is another.
#[test]
fn chapter_15_prints_the_same() {
    let (handshakes, resumptions) = (file("handshake.json"), file("resumption.json"));
    let (records, enrolments) = (file("records.json"), file("enrolment.json"));
    let (keys, bundles, conversations) = (file("keys.json"), file("bundle.json"), file("conversation.json"));
    let (wraps, chains, receipts) = (file("wrap.json"), file("chain.json"), file("receipt.json"));
    let (rotations, numbers) = (file("rotation.json"), file("safety_number.json"));
    let (retries, groups) = (file("retry.json"), file("group.json"));
    let posts = file("public.json");
    let said = &case(&posts, "A")["gives"];
    let founded = &case(&groups, "three")["gives"];
    let asked = case(&retries, "work for a full handshake");
    let key = case(&handshakes, "key");
    let enroll = case(&handshakes, "enroll with a token, refused");
    let accepted = case(&resumptions, "accepted");
    let device = case(&enrolments, "sensor-01");
    let rows = list(case(&records, "across a key update and a close"), "records");
    let row =
        |from: &str, message: &str| rows.iter().find(|row| row["from"] == from && row["message"] == message).unwrap();
    let (bundle_a, bundle_b) = (case(&bundles, "A"), case(&bundles, "B"));
    let direct = &list(&conversations, "direct")[0]["gives"];
    let wrap = &case(&wraps, "direct")["gives"];
    let envelopes = list(case(&chains, "in order"), "envelopes");
    let rotation = &case(&rotations, "digests")["gives"];
    let joined = |value: &Value, name: &str| text(value, name).replace(' ', "");

    let mut count = 0;
    for section in ["15.1", "15.2", "15.3", "15.4", "15.5", "15.6", "15.8"] {
        for (name, value) in printed(section) {
            let handshake = match section {
                "15.1" => key,
                "15.2" => enroll,
                "15.5" => asked,
                _ => accepted,
            };
            let ours = match (section, name.as_str()) {
                (_, "modulus_S") => text(case(&keys, text(&key["given"], "server_key")), "modulus").to_owned(),
                ("15.1" | "15.2", "modulus_C") => {
                    text(case(&keys, text(&handshake["given"], "client_key")), "modulus").to_owned()
                }
                ("15.1", "Status" | "KeyUpdate" | "Listening") => text(row("client", &name), "record").to_owned(),
                ("15.1", "StatusResponse") => text(row("server", &name), "record").to_owned(),
                ("15.1", "CloseC") => text(row("client", "Close"), "record").to_owned(),
                ("15.1", "CloseS") => text(row("server", "Close"), "record").to_owned(),
                ("15.1", "a_C1") => text(row("client", "KeyUpdate"), "next_secret").to_owned(),
                ("15.1", "key_C1") => text(row("client", "KeyUpdate"), "next_key").to_owned(),
                ("15.1", "h" | "digest") => text(&device["gives"], &name).to_owned(),
                ("15.3", "sid" | "mh") => text(direct, &name).to_owned(),
                ("15.3", "bundle_A") => text(&bundle_a["gives"], "bundle").to_owned(),
                ("15.3", "bundle_B") => text(&bundle_b["gives"], "bundle").to_owned(),
                ("15.3", "H(bundle_A)") => text(&bundle_a["gives"], "H(bundle)").to_owned(),
                ("15.3", "H(bundle_B)") => text(&bundle_b["gives"], "H(bundle)").to_owned(),
                ("15.3", "MK_0") => text(&envelopes[0]["opened"], "MK").to_owned(),
                ("15.3", "SK_0") => text(&envelopes[0]["opened"], "SK").to_owned(),
                ("15.3", "CK_1") => text(&envelopes[0]["opened"], "next_CK").to_owned(),
                ("15.3", "message_0") => text(&envelopes[0], "envelope").to_owned(),
                ("15.3", "message_1") => text(&envelopes[1], "envelope").to_owned(),
                ("15.3", "tag_delivered") => text(&case(&receipts, "delivered")["gives"], "tag").to_owned(),
                ("15.3", "tag_refused") => text(&case(&receipts, "refused")["gives"], "tag").to_owned(),
                ("15.3", "safety_number") => joined(&case(&numbers, "A and B")["gives"], &name),
                ("15.3", "rotation_digest") => text(rotation, "digest_rotate").to_owned(),
                ("15.3", "possession_digest") => text(rotation, "digest_rotate_proof").to_owned(),
                // A bundle of no keys: the fields are its own bytes.
                ("15.3", "bundle_hash" | "bundle_digest") => {
                    let bundle = Bundle {
                        id: [1; 16],
                        key: [2; 32],
                        epoch: 9,
                        exchange: [5; 32],
                        prekey: [6; 32],
                        prekey_id: 10,
                        verifying: [7; 32],
                        previous: [8; 32],
                    };
                    hex::encode(if name == "bundle_hash" { bundle.hash() } else { bundle.statement().digest() })
                }
                ("15.3", _) => text(wrap, &name).to_owned(),
                ("15.8", _) => text(said, &name).to_owned(),
                ("15.6", _) => text(founded, &name).to_owned(),
                ("15.4", "channel") => text(&accepted["given"], "channel").to_owned(),
                ("15.4", "CS") => text(&accepted["given"], "CS").to_owned(),
                ("15.4", "channel2") => text(&accepted["given"]["settings"], "channel").to_owned(),
                ("15.4", "CS2") => text(&accepted["gives"], "CS").to_owned(),
                ("15.5", "k_cookie" | "source") => text(&asked["given"]["cookie_of"], &name).to_owned(),
                ("15.5", "cookie") => text(&asked["given"], &name).to_owned(),
                (_, "seed_C" | "seed_S") => text(&handshake["given"], &name).to_owned(),
                _ => text(&handshake["gives"], &name).to_owned(),
            };
            assert_eq!(ours, value, "PROTOCOL {section}: {name}");
            count += 1;
        }
    }
    println!("{count} values of chapter 15");
    assert_eq!(count, 152, "the values that were found");
    gives(&accepted["given"], "CS", &bytes(&key["gives"], "CS"));
}

#[test]
fn section_7_1_prints_the_same() {
    let file = file("messages.json");
    let printed = printed("7.1");
    assert_eq!(printed.len(), 43, "the messages that were found");
    for (name, value) in printed {
        let case = cases(&file).iter().find(|case| case["case"] == name.as_str());
        assert_eq!(text(case.unwrap_or_else(|| panic!("no case {name}")), "payload"), value, "{name}");
    }
}
