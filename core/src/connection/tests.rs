//! The worked examples of PROTOCOL 15: its formulas, computed here from nothing but the primitives, give the bytes that it
//! prints, and so does the engine. And what the engine does near the end of a key.

use std::vec::Vec;

use super::*;
use crate::config::Token;
use crate::crypto::{ExchangeKey, NONCE_LEN, expand, extract, hash, mac};
use crate::handshake::retry::CookieKey;
use crate::handshake::{enrolment_statement, token_verifier};
use crate::record::RecordKey;
use crate::wire::testing::{printed, printed_array};

const SERVER_ID: [u8; 16] = [0x5e; 16];
const DEVICE_ID: [u8; 16] = [0xb0; 16];
const CLIENT_ID: [u8; 16] = [0xc1; 16];
const LIMIT: u16 = 16_408;
const DEVICE_NAME: &str = "sensor-01";
const TOKEN: Token = Token { id: [7; 8], secret: Secret::new([9; 16]) };

fn seed(number: u8) -> [u8; 64] {
    let mut seed = [number.wrapping_mul(31); 64];
    for (byte, index) in seed.iter_mut().zip(0..) {
        *byte = byte.wrapping_add(index);
    }
    seed
}

/// The two ends of one example, and what it prints.
struct Example {
    section: &'static str,
    client: Connection,
    server: Connection,
    server_key: Vec<u8>,
    client_key: Vec<u8>,
}

impl Example {
    fn new(section: &'static str, seeds: (u8, u8), ask_for_key: bool) -> Self {
        let server_key = printed("15.1", "modulus_S");
        let fingerprint = PublicKey::from_modulus(&server_key).unwrap().fingerprint();
        let client = ClientConfig { server: Some(fingerprint), ask_for_key, record_limit: LIMIT };
        let server = ServerConfig { id: SERVER_ID, fingerprint, record_limit: LIMIT };
        Self {
            section,
            client: Connection::client(client, &seed(seeds.0)),
            server: Connection::server(server, &seed(seeds.1)),
            server_key,
            client_key: printed(section, "modulus_C"),
        }
    }

    fn print<const N: usize>(&self, name: &str) -> [u8; N] {
        printed_array(self.section, name)
    }

    fn shows(&self, name: &str, bytes: &[u8]) {
        assert_eq!(printed(self.section, name), bytes, "PROTOCOL {}: {name}", self.section);
    }

    /// Runs the handshake up to the open claim, with the signatures that are printed.
    fn claim(&mut self, credentials: &Credentials<'_>) -> Vec<u8> {
        let (server_key, client_key) = (self.server_key.clone(), self.client_key.clone());
        let server_key = PublicKey::from_modulus(&server_key).unwrap();
        let client_key = PublicKey::from_modulus(&client_key).unwrap();
        let (by_server, by_client) = (printed(self.section, "sig_S"), printed(self.section, "sig_C"));
        let mut out = [0; 2048];

        let len = self.client.transmit(&mut out).unwrap();
        self.shows("ClientHello", &out[..len]);
        self.server.receive(&mut out[..len]).unwrap();
        let Some(Ask::Sign(statement)) = self.server.ask() else { panic!("a signature is due") };
        verify(server_key, &statement, &by_server);
        let len = self.server.sign_server(server_key, &by_server, &mut out).unwrap();
        let (hello, auth) = out[..len].split_at_mut(79);
        self.shows("ServerHello", hello);
        self.shows("ServerAuth", auth);

        self.client.receive(hello).unwrap();
        let Ok(Received::Record { event: Event::CheckServer(claim), .. }) = self.client.receive(auth) else {
            panic!("a claim of the server");
        };
        assert_eq!((claim.server, claim.fingerprint), (SERVER_ID, server_key.fingerprint()));
        assert_eq!((claim.statement, claim.signature), (statement, &by_server[..]));
        self.client.verified(credentials).unwrap();
        let Some(Ask::Sign(statement)) = self.client.ask() else { panic!("a signature is due") };
        verify(client_key, &statement, &by_client);
        let len = self.client.sign_client(credentials, &by_client, &mut out).unwrap();
        self.shows("ClientAuth", &out[..len]);

        let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = self.server.receive(&mut out[..len]) else {
            panic!("a claim of the client");
        };
        assert_eq!(self.server.bind(&claim, &client_key.fingerprint()), Ok(statement));
        assert_eq!(claim.signature(), by_client);
        claim.bytes().to_vec()
    }

    /// PROTOCOL 4.3, from the records that are printed. `fields` are those of the method behind `T4`, `proof` the token's.
    /// Returns the input secret.
    fn transcript(&self, seeds: (u8, u8), fields: &[u8], proof: &[u8]) -> Secret<32> {
        let fingerprint = PublicKey::from_modulus(&self.server_key).unwrap().fingerprint();
        let private = |number| ExchangeKey::new(Secret::new(*seed(number).first_chunk().unwrap()));
        let (exchange_c, exchange_s) = (private(seeds.0), private(seeds.1));
        self.shows("E_C", exchange_c.public());
        self.shows("E_S", exchange_s.public());

        let t1 = hash(&[&hash(&[b"ossicle HS1\0"]), &printed(self.section, "ClientHello")]);
        let t2 = hash(&[&t1, &printed(self.section, "ServerHello")]);
        let dh = exchange_c.agree(exchange_s.public()).unwrap();
        let input = extract(&hash(&[b"ossicle HS1 x25519 sha256 aes256gcm pss"]), &dh);
        for (name, value) in [("T1", &t1), ("T2", &t2), ("dh", dh.expose()), ("ES", input.expose())] {
            self.shows(name, value);
        }
        let server: Secret<76> = expand(&input, &[b"ossicle s hs\0", &t2]);
        let client: Secret<76> = expand(&input, &[b"ossicle c hs\0", &t2]);
        self.shows("s_hs", server.expose());
        self.shows("c_hs", client.expose());

        let signature = printed(self.section, "sig_S");
        let t3 = hash(&[&t2, &SERVER_ID, &fingerprint]);
        let finished_s = finished(&server, &[&t3, &signature]);
        let t4 = hash(&[&t3, &signature, &finished_s]);
        for (name, value) in [("T3", &t3), ("fin_S", &finished_s), ("T4", &t4)] {
            self.shows(name, value);
        }
        let signature = printed(self.section, "sig_C");
        let t5 = hash(&[&t4, fields]);
        let finished_c = finished(&client, &[&t5, proof, &signature]);
        let t6 = hash(&[&t5, proof, &signature, &finished_c]);
        for (name, value) in [("T5", &t5), ("fin_C", &finished_c), ("T6", &t6)] {
            self.shows(name, value);
        }
        input
    }
}

#[cfg(feature = "rsa")]
fn verify(key: PublicKey<'_>, statement: &Statement, signature: &[u8]) {
    assert_eq!(crate::verify_rsa(key, statement, signature), Ok(()), "the printed signature");
}

#[cfg(not(feature = "rsa"))]
fn verify(key: PublicKey<'_>, _: &Statement, signature: &[u8]) {
    assert_eq!(signature.len(), key.signature_len());
}

/// A side's Finished over what `parts` make together.
fn finished(keys: &Secret<76>, parts: &[&[u8]]) -> [u8; 32] {
    mac(keys.expose().last_chunk().unwrap(), &[&hash(parts)])
}

fn traffic(secret: &Secret<32>) -> Secret<{ HASH_LEN + NONCE_LEN }> {
    expand(secret, &[b"ossicle key"])
}

#[test]
fn a_handshake_is_that_of_the_specification() {
    let mut example = Example::new("15.1", (1, 2), false);
    example.shows("seed_C", &seed(1));
    example.shows("seed_S", &seed(2));
    example.shows("T0", &hash(&[b"ossicle HS1\0"]));
    example.shows("salt", &hash(&[b"ossicle HS1 x25519 sha256 aes256gcm pss"]));
    let client_key = example.client_key.clone();
    let fingerprint = PublicKey::from_modulus(&client_key).unwrap().fingerprint();
    example.shows("H(SPKI_S)", &PublicKey::from_modulus(&example.server_key).unwrap().fingerprint());
    example.shows("H(SPKI_C)", &fingerprint);

    let fields = [&[1][..], &CLIENT_ID, &fingerprint, &[0; 4], &[0; 2]].concat();
    let input = example.transcript((1, 2), &fields, &[]);
    let statement = |context: &'static str, name| Statement::new(context, example.print(name)).digest();
    example.shows("digest_S", &statement("ossicle HS1 server auth", "T3"));
    example.shows("digest_C", &statement("ossicle HS1 client auth", "T5"));
    let t6: [u8; 32] = example.print("T6");
    let mut client: Secret<32> = expand(&input, &[b"ossicle c ap\0", &t6]);
    let server: Secret<32> = expand(&input, &[b"ossicle s ap\0", &t6]);
    let exporter: Secret<32> = expand(&input, &[b"ossicle exp\0", &t6]);
    example.shows("a_C", client.expose());
    example.shows("a_S", server.expose());
    example.shows("exporter", exporter.expose());
    example.shows("key_C", traffic(&client).expose());
    example.shows("key_S", traffic(&server).expose());
    client = expand(&client, &[b"ossicle upd"]);
    example.shows("a_C1", client.expose());
    example.shows("key_C1", traffic(&client).expose());

    let credentials = Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint };
    example.claim(&credentials);
    let settings = Settings {
        heartbeat: 15,
        timeout: 45,
        time: 1_790_000_000,
        store_epoch: [1, 2, 3, 4, 5, 6, 7, 8],
        ..Settings::default()
    };
    let mut out = [0; 256];
    let len = Message::Settings(settings).encode(&mut out).unwrap();
    example.shows("settings", &out[..len]);
    let len = example.server.accept(&settings, &mut out).unwrap();
    example.shows("Settings", &out[..len]);
    let Ok(Received::Record { event: Event::Connected(told), .. }) = example.client.receive(&mut out[..len]) else {
        panic!("settings");
    };
    assert_eq!(told, settings);
    for connection in [&example.client, &example.server] {
        assert_eq!(connection.exporter().unwrap().expose(), exporter.expose());
    }

    let len = example.client.send(&Message::Status { request: 1 }, &mut out).unwrap();
    example.shows("Status", &out[..len]);
    let len = example.server.send(&Message::StatusResponse { request: 1 }, &mut out).unwrap();
    example.shows("StatusResponse", &out[..len]);
    let len = example.client.update_key(&mut out).unwrap();
    example.shows("KeyUpdate", &out[..len]);
    let len = example.client.send(&Message::Listening, &mut out).unwrap();
    example.shows("Listening", &out[..len]);
    let len = example.client.close(None, &mut out).unwrap();
    example.shows("CloseC", &out[..len]);
    let len = example.server.close(Some(Reason::TakenOver), &mut out).unwrap();
    example.shows("CloseS", &out[..len]);

    let device = printed("15.2", "modulus_C");
    let device = PublicKey::from_modulus(&device).unwrap();
    let statement = enrolment_statement(&exporter, &CLIENT_ID, &DEVICE_ID, DEVICE_NAME, device);
    let fields: [&[u8]; 6] =
        [exporter.expose(), &CLIENT_ID, &DEVICE_ID, &[9], DEVICE_NAME.as_bytes(), &device.fingerprint()];
    let fields = hash(&fields);
    example.shows("h", &fields);
    example.shows("digest", &statement.digest());
    assert_eq!(statement, Statement::new("ossicle enrol device", fields));
}

#[test]
fn a_first_contact_is_that_of_the_specification() {
    let mut example = Example::new("15.2", (3, 4), true);
    let client_key = example.client_key.clone();
    let key = PublicKey::from_modulus(&client_key).unwrap();
    example.shows("H(SPKI_C)", &key.fingerprint());

    let mut buffer = [0; crate::crypto::MAX_SPKI_LEN];
    let spki = key.spki(&mut buffer);
    let fields = [&[2][..], &DEVICE_ID, &[9], DEVICE_NAME.as_bytes(), spki, &TOKEN.id, &[0; 2]].concat();
    let verifier = token_verifier(&TOKEN.secret);
    example.shows("verifier", verifier.expose());
    let proof = mac(verifier.expose(), &[&example.print::<32>("T5")]);
    example.shows("proof", &proof);
    example.transcript((3, 4), &fields, &proof);

    let credentials = Credentials::Enroll { id: DEVICE_ID, name: DEVICE_NAME, key, token: Some(&TOKEN) };
    let claim = example.claim(&credentials);
    assert!(example.server.proves(&ClientClaim::decode(&claim).unwrap(), verifier.expose()));
    let mut out = [0; 64];
    let len = example.server.refuse(Reason::NameInUse, 0, &mut out).unwrap();
    example.shows("Refusal", &out[..len]);
    let refused = PeerError::Refused { reason: Reason::NameInUse, retry_after: 0 };
    assert_eq!(example.client.receive(&mut out[..len]).err(), Some(refused.into()));
}

#[test]
fn a_retry_is_that_of_the_specification() {
    let shows = |name: &str, bytes: &[u8]| assert_eq!(printed("15.5", name), bytes, "PROTOCOL 15.5: {name}");
    let k_cookie: [u8; 32] = printed_array("15.5", "k_cookie");
    let source = printed_array("15.5", "source");
    let fields: &[&[u8]] = &[b"ossicle cookie\0", &source, &9_u64.to_be_bytes(), &[12]];
    let cookie = [&mac(&k_cookie, fields)[..16], &[12]].concat();
    shows("cookie", &cookie);
    let key = CookieKey::new(Secret::new(k_cookie));
    shows("cookie", &key.cookie(&source, 9, 12));
    shows("seed_C", &seed(7));
    let exchange = ExchangeKey::new(Secret::new(*seed(7).first_chunk().unwrap()));
    shows("E_C", exchange.public());
    let prefix = hash(&[b"ossicle puzzle\0", &[17], &cookie, &seed(7)[32..], exchange.public()]);
    shows("P", &prefix);
    let puzzle = printed("15.5", "puzzle");
    shows("proof", &hash(&[&prefix, &puzzle]));

    let mut example = Example::new("15.1", (1, 2), false);
    let mut out = [0; 256];
    let len = example.client.transmit(&mut out).unwrap();
    example.shows("ClientHello", &out[..len]);
    example.server.demand_work();
    example.server.receive(&mut out[..len]).unwrap();
    let len = example.server.retry(&cookie, 12, &mut out).unwrap();
    shows("HelloRetry", &out[..len]);
    assert_eq!(example.client.receive(&mut out[..len]).err(), Some(PeerError::Retry.into()));
    let asked = example.client.puzzle().unwrap();

    let mut example = Example::new("15.1", (7, 8), false);
    example.client.present(&asked).unwrap();
    while example.client.solve() {}
    let len = example.client.transmit(&mut out).unwrap();
    shows("ClientHello", &out[..len]);
    shows("T1", &hash(&[&hash(&[b"ossicle HS1\0"]), &out[..len]]));
    example.server.demand_work();
    example.server.receive(&mut out[..len]).unwrap();
    let presented = example.server.presented().unwrap();
    assert_eq!(key.bits(presented.cookie(), &source, 9), Some(12));
    assert!(presented.is_solved(12) && presented.is_solved(14) && !presented.is_solved(15));
    assert_eq!(presented.name(), printed("15.5", "proof")[24..]);
}

/// The channel that 15.1 issues, as 15.4 resumes it.
fn channel() -> Channel {
    let fingerprint = |name| PublicKey::from_modulus(&printed("15.1", name)).unwrap().fingerprint();
    Channel {
        id: printed_array("15.4", "channel"),
        secret: Secret::new(printed_array("15.4", "CS")),
        client: CLIENT_ID,
        client_key: fingerprint("modulus_C"),
        key_epoch: 0,
        server: SERVER_ID,
        server_key: fingerprint("modulus_S"),
    }
}

#[test]
fn a_resumption_is_that_of_the_specification() {
    let channel = channel();
    let shows = |name: &str, bytes: &[u8]| assert_eq!(printed("15.4", name), bytes, "PROTOCOL 15.4: {name}");
    // The secret is that of the handshake in 15.1.
    let (input, t6) = (Secret::new(printed_array("15.1", "ES")), printed("15.1", "T6"));
    let secret: Secret<32> = expand(&input, &[b"ossicle channel\0", &t6]);
    shows("CS", secret.expose());
    shows("seed_C", &seed(5));
    shows("seed_S", &seed(6));

    let private = |number| ExchangeKey::new(Secret::new(*seed(number).first_chunk().unwrap()));
    let (exchange_c, exchange_s) = (private(5), private(6));
    let hello = printed("15.4", "ClientHello");
    let (bound, binder) = hello.split_at(hello.len() - 32);
    let key: Secret<32> = expand(&secret, &[b"ossicle ch binder\0"]);
    shows("k_binder", key.expose());
    let t0 = hash(&[b"ossicle HS1\0"]);
    shows("binder", &mac(key.expose(), &[&hash(&[&t0, bound])]));
    shows("binder", binder);
    let t1 = hash(&[&t0, &hello]);
    let t2 = hash(&[&t1, &printed("15.4", "ServerHello")]);
    let dh = exchange_c.agree(exchange_s.public()).unwrap();
    let salt: Secret<32> = expand(&secret, &[b"ossicle ch salt\0"]);
    let input = extract(salt.expose(), &dh);
    let server: Secret<76> = expand(&input, &[b"ossicle r s hs\0", &t2]);
    let client: Secret<76> = expand(&input, &[b"ossicle r c hs\0", &t2]);
    let t3 = hash(&[&t2, &SERVER_ID, &channel.server_key, &CLIENT_ID, &channel.client_key, &[0; 4]]);
    let finished_s = mac(server.expose().last_chunk().unwrap(), &[&t3]);
    let t4 = hash(&[&t3, &finished_s, &[0; 2]]);
    let finished_c = mac(client.expose().last_chunk().unwrap(), &[&t4]);
    let t6 = hash(&[&t4, &finished_c]);
    let next: Secret<32> = expand(&input, &[b"ossicle channel\0", &t6]);
    let exporter: Secret<32> = expand(&input, &[b"ossicle exp\0", &t6]);
    for (name, value) in [("T1", &t1), ("T2", &t2), ("dh", dh.expose()), ("salt", salt.expose())] {
        shows(name, value);
    }
    shows("ES", input.expose());
    shows("s_hs", server.expose());
    shows("c_hs", client.expose());
    for (name, value) in [("T3", &t3), ("fin_S", &finished_s), ("T4", &t4), ("fin_C", &finished_c), ("T6", &t6)] {
        shows(name, value);
    }
    shows("CS2", next.expose());

    let config = ClientConfig { server: Some(channel.server_key), ask_for_key: false, record_limit: LIMIT };
    let mut client: Connection = Connection::resume(config, channel.clone(), &seed(5)).unwrap();
    let config = ServerConfig { id: SERVER_ID, fingerprint: channel.server_key, record_limit: LIMIT };
    let mut server: Connection = Connection::server(config, &seed(6));
    let mut out = [0; 256];
    let len = client.transmit(&mut out).unwrap();
    shows("ClientHello", &out[..len]);
    let offered = server.receive(&mut out[..len]);
    assert!(matches!(offered, Ok(Received::Record { event: Event::CheckChannel(id), .. }) if id == channel.id));
    let len = server.answer_offer(Some(&channel), &mut out).unwrap();
    let (hello, auth) = out[..len].split_at_mut(79);
    shows("ServerHello", hello);
    shows("ServerAuth", auth);
    client.receive(hello).unwrap();
    client.receive(auth).unwrap();
    let len = client.transmit(&mut out).unwrap();
    shows("ClientAuth", &out[..len]);
    assert!(matches!(server.receive(&mut out[..len]), Ok(Received::Record { event: Event::Resumed, .. })));
    let settings = Settings {
        channel: printed_array("15.4", "channel2"),
        valid_for: 604_000,
        heartbeat: 15,
        timeout: 45,
        time: 1_790_000_000,
        store_epoch: [1, 2, 3, 4, 5, 6, 7, 8],
        ..Settings::default()
    };
    let len = Message::Settings(settings).encode(&mut out).unwrap();
    shows("settings", &out[..len]);
    let len = server.accept(&settings, &mut out).unwrap();
    shows("Settings", &out[..len]);
    assert!(
        matches!(client.receive(&mut out[..len]), Ok(Received::Record { event: Event::Connected(told), .. }) if told == settings)
    );
    for connection in [&mut client, &mut server] {
        assert_eq!(connection.exporter().unwrap().expose(), exporter.expose());
        let issued = connection.take_channel().unwrap();
        assert_eq!((issued.id, issued.secret.expose()), (settings.channel, next.expose()));
    }
}

/// Two ends behind a handshake, the client's direction at this counter.
fn established_at(counter: u64) -> (Connection, Connection) {
    let end = |is_client: bool| {
        let direction = |from_client: bool| {
            let mut traffic = Traffic::new(Secret::new([from_client.into(); 32]));
            if from_client {
                traffic.key = RecordKey::new(&[7; 32], [8; NONCE_LEN], counter);
            }
            traffic
        };
        let state = State::Established(Established {
            sealing: direction(is_client),
            opening: direction(!is_client),
            exporter: Secret::new([9; 32]),
            issued: None,
            resumed: false,
            send_limit: LIMIT,
            closed: false,
            peer_closed: false,
        });
        Connection { state, receive_limit: LIMIT, failure: None, puzzle: None }
    };
    (end(true), end(false))
}

fn counter(connection: &Connection) -> u64 {
    let State::Established(established) = &connection.state else { panic!("established") };
    established.sealing.key.counter()
}

/// What the peer makes of all the records in `bytes`; the payloads' codes.
fn codes(receiver: &mut Connection, mut bytes: &mut [u8]) -> Vec<u16> {
    let mut codes = Vec::new();
    while !bytes.is_empty() {
        let Ok(Received::Record { used, event }) = receiver.receive(bytes) else { panic!("a record") };
        codes.push(match event {
            Event::Message(payload) => u16::from_be_bytes(*payload.first_chunk().unwrap()),
            Event::Progress => 0x0822,
            Event::Closed(_) => 0x0821,
            _ => panic!("nothing else is said here"),
        });
        bytes = &mut bytes[used..];
    }
    codes
}

type Seals = fn(&mut Connection, &mut [u8]) -> Result<usize, Error>;

#[test]
fn whatever_is_sealed_near_the_end_of_a_key_is_opened_and_the_key_is_replaced_in_time() {
    // What seals, what it says, and from which counter on.
    let seals: [(Seals, u16, u64); 5] = [
        (|sender, out| sender.send(&Message::Listening, out), 0x0700, 0),
        (|sender, out| sender.send_sealed(Rungs::NONE, 1, out, |_| Ok::<_, Error>(())), 0x0200, 0),
        (|sender, out| sender.close(None, out), 0x0821, 0),
        (|sender, out| sender.update_key(out), 0x0822, 0),
        (|sender, out| sender.transmit(out), 0x0822, UPDATE_AT),
    ];
    let len_of = |code: &u16| match code {
        0x0200 => RECORD_OVERHEAD + SEND_HEAD_LEN + 1,
        0x0821 => RECORD_OVERHEAD + 3,
        _ => RECORD_OVERHEAD + 2,
    };
    let mut cases = 0;
    for (seal, code, from) in seals {
        let (mut sender, mut receiver) = established_at(UPDATE_AT - 4);
        for at in UPDATE_AT - 4..MAX_RECORDS {
            // Behind a close or a key update it begins anew; everything else goes on from record to record.
            if counter(&sender) != at || !sender.is_connected() {
                (sender, receiver) = established_at(at);
            }
            let is_last = at == MAX_RECORDS - 1;
            let expected = match code {
                _ if at < from => std::vec![],
                0x0822 => std::vec![0x0822],
                code if is_last => std::vec![0x0822, code],
                code => std::vec![code],
            };
            // Not a byte less than it needs.
            let mut out = [0; 128];
            let len = expected.iter().map(len_of).sum::<usize>();
            for room in if is_last { 0..len } else { len.saturating_sub(1)..len } {
                assert_eq!(seal(&mut sender, &mut out[..room]), Err(BufferError::TxFull.into()), "{at} {room}");
                assert_eq!(counter(&sender), at, "nothing has changed");
                cases += 1;
            }
            assert_eq!(seal(&mut sender, &mut out), Ok(len), "{at}");
            assert_eq!(codes(&mut receiver, &mut out[..len]), expected, "{at}");
            assert!(counter(&sender) < MAX_RECORDS, "{at}: no key is ever used up");
            cases += 1;
        }
    }
    std::println!("{cases} records near the end of a key");
    assert!(cases >= 5 * 2 * 1_024, "{cases}");
}

#[test]
fn a_record_limit_that_no_peer_takes_is_the_callers_mistake_and_no_byte_leaves() {
    let wrong = Error::from(ApiMisuse::InvalidArgument);
    let mut hello = [0; 256];
    for (limit, taken) in [(0, false), (1_023, false), (1_024, true), (u16::MAX, true)] {
        let config = ClientConfig { server: Some([1; 32]), ask_for_key: false, record_limit: limit };
        let mut client: Connection = Connection::client(config, &seed(1));
        let mut out = [0; 256];
        let sent = client.transmit(&mut out);
        assert_eq!(sent, if taken { Ok(84) } else { Err(wrong) }, "{limit}");
        assert_eq!(out == [0; 256], !taken, "{limit}");
        assert_eq!(client.transmit(&mut out).is_ok(), taken, "{limit}: nothing has changed");
        if limit == 1_024 {
            hello = out;
        }
    }
    for (limit, taken) in [(0, false), (1_023, false), (1_024, true)] {
        let config = ServerConfig { id: SERVER_ID, fingerprint: [1; 32], record_limit: limit };
        let mut server: Connection = Connection::server(config, &seed(2));
        for _ in 0..2 {
            let received = server.receive(&mut hello[..84].to_vec()).map(|_| ());
            assert_eq!(received, if taken { Ok(()) } else { Err(wrong) }, "{limit}");
        }
        assert_eq!(server.ask().is_some(), taken, "{limit}");
    }
}

#[test]
fn nothing_is_owed_behind_a_close_however_old_the_key_is() {
    for at in [UPDATE_AT, MAX_RECORDS - 2, MAX_RECORDS - 1] {
        let (mut sender, mut receiver) = established_at(at);
        let mut out = [0; 128];
        let len = sender.close(None, &mut out).unwrap();
        assert_eq!(codes(&mut receiver, &mut out[..len]).pop(), Some(0x0821));
        assert_eq!(sender.transmit(&mut out), Ok(0), "a close is the last record");
    }
}

#[test]
fn the_last_record_under_a_key_ends_it_or_the_connection() {
    for (code, expected) in
        [(0x0821, Ok(())), (0x0822, Ok(())), (0x0700, Err(PeerError::Exhausted)), (0x0f77, Err(PeerError::Exhausted))]
    {
        let (mut sender, mut receiver) = established_at(MAX_RECORDS - 1);
        let mut out = [0; 64];
        out[8..10].copy_from_slice(&u16::to_be_bytes(code));
        // A sender that does not keep the rule.
        let State::Established(established) = &mut sender.state else { panic!("established") };
        let payload_len = if code == 0x0821 { 3 } else { 2 };
        let len = established.sealing.key.seal(RecordType::Application, &mut out, payload_len).unwrap();
        let received = receiver.receive(&mut out[..len]).map(|_| ());
        assert_eq!(received, expected.map_err(Error::from), "{code:04x}");
        // One more there never is, on either side.
        assert_eq!(sender.send(&Message::Listening, &mut out), Err(PeerError::Exhausted.into()));
    }
    for at in [MAX_RECORDS, u64::MAX - 1, u64::MAX] {
        let mut key = RecordKey::<RustCrypto>::new(&[7; 32], [8; NONCE_LEN], at);
        assert_eq!(key.seal(RecordType::Application, &mut [0; 64], 4), Err(PeerError::Exhausted.into()));
        assert_eq!(key.open(&mut [0; 64]), Err(PeerError::Exhausted.into()));
        assert_eq!(key.counter(), at);
    }
}

#[test]
fn a_record_is_as_long_as_the_peer_takes_it_and_no_longer() {
    let max = usize::from(LIMIT) - RECORD_OVERHEAD;
    let too_long = Err(BufferError::MessageTooLong { max }.into());
    let text = std::vec![7; max];
    let message = |len: usize| Message::Send { wanted: Rungs::NONE, envelope: &text[..len - SEND_HEAD_LEN] };
    let (mut sender, mut receiver) = established_at(0);
    // With room for exactly the longest record, and with more.
    for room in [usize::from(LIMIT), usize::from(LIMIT) + 1, 2 * usize::from(LIMIT)] {
        let mut out = std::vec![0; room];
        for longer in [1, 2, SEND_HEAD_LEN] {
            assert_eq!(sender.send(&message(max + longer), &mut out), too_long, "{room}");
            let sealed =
                sender.send_sealed(Rungs::NONE, max - SEND_HEAD_LEN + longer, &mut out, |_| -> Result<(), Error> {
                    panic!("it is too long")
                });
            assert_eq!(sealed, too_long, "{room}");
        }
        assert_eq!(sender.send(&message(max), &mut out), Ok(LIMIT.into()));
        assert_eq!(codes(&mut receiver, &mut out[..LIMIT.into()]), [0x0200]);
        let seal = |envelope: &mut [u8]| {
            assert_eq!(envelope.len(), max - SEND_HEAD_LEN);
            Ok::<_, Error>(())
        };
        assert_eq!(sender.send_sealed(Rungs::NONE, max - SEND_HEAD_LEN, &mut out, seal), Ok(LIMIT.into()));
        assert_eq!(codes(&mut receiver, &mut out[..LIMIT.into()]), [0x0200]);
    }
    // With less room only the buffer is to blame, for as long as it is the shorter of the two.
    let mut out = std::vec![0; usize::from(LIMIT) - 1];
    assert_eq!(sender.send(&message(max), &mut out), Err(BufferError::TxFull.into()));
    assert_eq!(sender.send(&message(max - 1), &mut out), Ok(usize::from(LIMIT) - 1));
}

/// What the header of a record with this type, length and number comes to where it is received.
fn header(connection: &mut Connection, kind: RecordType, len: usize, sequence: u16) -> Result<usize, Error> {
    let len = u16::try_from(len).unwrap();
    match connection.receive(&mut Header { kind, len, sequence }.encode())? {
        Received::Need(len) => Ok(len),
        _ => panic!("a header alone is no record"),
    }
}

#[test]
fn the_length_of_a_record_is_judged_by_its_header() {
    let fingerprint = [7; HASH_LEN];
    let config = ClientConfig { server: Some(fingerprint), ask_for_key: false, record_limit: LIMIT };
    let started = || {
        let mut client: Connection = Connection::client(config, &seed(1));
        client.transmit(&mut [0; 256]).unwrap();
        client
    };
    let listening = || Connection::server(ServerConfig { id: SERVER_ID, fingerprint, record_limit: LIMIT }, &seed(2));
    let authenticating = || {
        let modulus = printed("15.1", "modulus_S");
        let mut server = listening();
        server.receive(&mut printed("15.1", "ClientHello")).unwrap();
        server.sign_server(PublicKey::from_modulus(&modulus).unwrap(), &[0; 256], &mut [0; 1024]).unwrap();
        server
    };
    let identified = || {
        let mut client = started();
        client.receive(&mut printed("15.1", "ServerHello")).unwrap();
        client
    };
    type Makes<'m> = &'m dyn Fn() -> Connection;
    let waiting: [(Makes<'_>, RecordType, usize, usize); 5] = [
        (&listening, RecordType::ClientHello, 8, 256),
        (&started, RecordType::ServerHello, 8, 2048),
        (&identified, RecordType::ServerAuth, 24, 2048),
        (&authenticating, RecordType::ClientAuth, 24, 1536),
        (&|| established_at(0).0, RecordType::Application, 24, LIMIT.into()),
    ];
    for (make, kind, min, max) in waiting {
        for (len, fits) in [(min - 1, false), (min, true), (min + 9, true), (max, true), (max + 1, false)] {
            // A header that is a whole record is not waited for.
            if len == HEADER_LEN {
                continue;
            }
            let expected = if fits { Ok(len) } else { Err(Error::Decode) };
            assert_eq!(header(&mut make(), kind, len, 0), expected, "{kind:?} of {len} bytes");
        }
        for other in [RecordType::ClientHello, RecordType::ServerAuth, RecordType::Refusal, RecordType::Application] {
            if other != kind {
                assert_eq!(header(&mut make(), other, 29, 0), Err(PeerError::UnexpectedMessage.into()), "{other:?}");
            }
        }
        // Nothing is judged before its header is there, and nothing twice: a failure is final.
        let mut connection = make();
        assert!(matches!(connection.receive(&mut [0; HEADER_LEN - 1]), Ok(Received::Need(HEADER_LEN))));
        assert_eq!(header(&mut connection, kind, max + 1, 0), Err(Error::Decode));
        assert_eq!(header(&mut connection, kind, max, 0), Err(Error::Decode));
    }
}

#[test]
fn a_record_of_the_handshake_is_number_zero() {
    let fingerprint = [7; HASH_LEN];
    let mut server: Connection =
        Connection::server(ServerConfig { id: SERVER_ID, fingerprint, record_limit: LIMIT }, &seed(2));
    let mut hello = printed("15.1", "ClientHello");
    hello[7] = 1;
    assert_eq!(server.receive(&mut hello).err(), Some(PeerError::UnexpectedMessage.into()));
}

#[test]
fn what_a_close_or_an_update_says_is_read_to_its_end() {
    for (payload, expected) in [
        (&[0x08, 0x21, 0][..], Ok(())),
        (&[0x08, 0x21, 1, 20], Ok(())),
        (&[0x08, 0x22], Ok(())),
        (&[0x08, 0x21], Err(Error::Decode)),
        (&[0x08, 0x21, 0, 0], Err(Error::Decode)),
        (&[0x08, 0x21, 1, 99], Err(Error::Decode)),
        (&[0x08, 0x22, 0], Err(Error::Decode)),
    ] {
        let (mut sender, mut receiver) = established_at(0);
        let mut out = [0; 64];
        out[8..][..payload.len()].copy_from_slice(payload);
        let State::Established(established) = &mut sender.state else { panic!("established") };
        let len = established.sealing.key.seal(RecordType::Application, &mut out, payload.len()).unwrap();
        assert_eq!(receiver.receive(&mut out[..len]).map(|_| ()), expected, "{payload:02x?}");
    }
    // Neither is sent as a message of somebody's.
    let (mut sender, _) = established_at(0);
    for message in [Message::Close { reason: None }, Message::KeyUpdate] {
        assert_eq!(sender.send(&message, &mut [0; 64]), Err(ApiMisuse::InvalidArgument.into()));
    }
    // Behind a close there is nothing.
    sender.close(None, &mut [0; 64]).unwrap();
    let closed = Err(ApiMisuse::Closed.into());
    assert_eq!(sender.send(&Message::Listening, &mut [0; 64]), closed);
    assert_eq!(sender.send_sealed(Rungs::NONE, 1, &mut [0; 64], |_| Ok::<_, Error>(())), closed);
    assert_eq!(sender.update_key(&mut [0; 64]), closed);
    assert_eq!(sender.close(None, &mut [0; 64]), closed);
}
