//! The hop protocol once more, from PROTOCOL 2 to 4 and without the engine: keys, records and both sides of the handshake
//! as plain bytes over blocking TCP.
//!
//! The engine does not let itself be used wrongly; this does. Whoever uses it says what he likes, sealed under the right
//! keys or under wrong ones, and hears what the other side answers. Nothing here checks more than it needs.

use core::net::SocketAddr;
use core::time::Duration;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use ossicle::crypto::IdentityKey;
use ossicle_core::{Aead, MAX_SPKI_LEN, Message, RustCrypto};
use rsa::pkcs8::DecodePrivateKey;
use rsa::traits::SignatureScheme;
use sha2::{Digest, Sha256};

use crate::public;

/// Nothing that works takes so long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// `ClientHello`.
pub const CLIENT_HELLO: u16 = 0x0100;
/// `ServerHello`.
pub const SERVER_HELLO: u16 = 0x0110;
/// HelloRetry.
pub const HELLO_RETRY: u16 = 0x0120;
/// `ClientAuth`.
pub const CLIENT_AUTH: u16 = 0x0200;
/// `ServerAuth`.
pub const SERVER_AUTH: u16 = 0x0210;
/// `Refusal`.
pub const REFUSAL: u16 = 0x0220;
/// All that follows the handshake.
pub const APPLICATION: u16 = 0x0300;

/// `H`, over the concatenation.
pub fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

/// `HMAC`.
pub fn mac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("any length is a key");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

/// `Expand`.
pub fn expand(key: &[u8], info: &[u8], len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Hkdf::<Sha256>::from_prk(key).expect("long enough").expand(info, &mut out).expect("short enough");
    out
}

/// `RSA(key, context, h)`.
pub fn sign(key: &IdentityKey, context: &str, h: &[u8; 32]) -> Vec<u8> {
    let private = rsa::RsaPrivateKey::from_pkcs8_der(key.pkcs8()).expect("a fixed key is a key");
    let statement = hash(&[&[0x20; 64], context.as_bytes(), &[0], h]);
    let mut rng = getrandom::SysRng;
    rsa::Pss::<Sha256>::new_blinded().sign(Some(&mut rng), &private, &statement).expect("the key signs")
}

/// The `SPKI` of a key.
pub fn spki(key: &IdentityKey) -> Vec<u8> {
    public(key).spki(&mut [0; MAX_SPKI_LEN]).to_vec()
}

/// A record without a seal.
pub fn clear(kind: u16, body: &[u8]) -> Vec<u8> {
    [&header(kind, 8 + body.len(), 0)[..], body].concat()
}

fn header(kind: u16, len: usize, sequence: u64) -> [u8; 8] {
    let mut header = [1, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&kind.to_be_bytes());
    header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
    header[6..].copy_from_slice(&(sequence as u16).to_be_bytes());
    header
}

/// One direction's key.
#[derive(Clone)]
pub struct Keys {
    secret: Vec<u8>,
    key: [u8; 32],
    iv: [u8; 12],
    /// The number of the next record.
    pub counter: u64,
}

impl Keys {
    /// Key and IV as they are.
    pub fn new(material: &[u8], counter: u64) -> Self {
        let (key, iv) = (material[..32].try_into().expect("32"), material[32..44].try_into().expect("12"));
        Self { secret: Vec::new(), key, iv, counter }
    }

    /// Those of a traffic secret.
    pub fn traffic(secret: Vec<u8>) -> Self {
        let keys = Self::new(&expand(&secret, b"ossicle key", 44), 0);
        Self { secret, ..keys }
    }

    /// The next key of the direction.
    pub fn update(&mut self) {
        *self = Self::traffic(expand(&self.secret, b"ossicle upd", 32));
    }

    fn nonce(&self) -> [u8; 12] {
        let mut nonce = self.iv;
        for (to, from) in nonce[4..].iter_mut().zip(self.counter.to_be_bytes()) {
            *to ^= from;
        }
        nonce
    }

    /// A sealed record.
    pub fn seal(&mut self, kind: u16, payload: &[u8]) -> Vec<u8> {
        let header = header(kind, payload.len() + 24, self.counter);
        let mut text = payload.to_vec();
        let tag = RustCrypto::new(&self.key).seal(&self.nonce(), &header, &mut text).expect("it seals");
        self.counter += 1;
        [&header[..], &text, &tag].concat()
    }

    /// What a record says, if it opens.
    pub fn open(&mut self, record: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = record.split_at_checked(8)?;
        let (text, tag) = rest.split_last_chunk::<16>()?;
        let mut text = text.to_vec();
        RustCrypto::new(&self.key).open(&self.nonce(), header, &mut text, tag).ok()?;
        self.counter += 1;
        Some(text)
    }
}

/// What a full handshake, or a resumption, makes its keys of.
#[derive(Clone)]
pub struct Schedule {
    es: Vec<u8>,
    labels: [&'static str; 2],
}

impl Schedule {
    /// That of a full handshake.
    pub fn full(dh: &[u8; 32]) -> Self {
        let (es, _) = Hkdf::<Sha256>::extract(Some(&hash(&[b"ossicle HS1 x25519 sha256 aes256gcm pss"])), dh);
        Self { es: es.to_vec(), labels: ["s hs", "c hs"] }
    }

    /// That of a resumption.
    pub fn resumed(secret: &[u8; 32], dh: &[u8; 32]) -> Self {
        let (es, _) = Hkdf::<Sha256>::extract(Some(&expand(secret, b"ossicle ch salt\0", 32)), dh);
        Self { es: es.to_vec(), labels: ["r s hs", "r c hs"] }
    }

    fn x(&self, label: &str, t: &[u8; 32], len: usize) -> Vec<u8> {
        expand(&self.es, &[b"ossicle ", label.as_bytes(), &[0], t].concat(), len)
    }

    /// The server's handshake key at this counter, and the key of `fin_S`.
    pub fn server(&self, t2: &[u8; 32], counter: u64) -> (Keys, Vec<u8>) {
        let material = self.x(self.labels[0], t2, 76);
        (Keys::new(&material, counter), material[44..].to_vec())
    }

    /// The client's handshake key, and the key of `fin_C`.
    pub fn client(&self, t2: &[u8; 32]) -> (Keys, Vec<u8>) {
        let material = self.x(self.labels[1], t2, 76);
        (Keys::new(&material, 0), material[44..].to_vec())
    }

    /// What binds statements to the connection.
    pub fn exporter(&self, t6: &[u8; 32]) -> [u8; 32] {
        self.x("exp", t6, 32).try_into().expect("32 bytes")
    }

    /// The first keys of the connection: the client's, the server's.
    pub fn application(&self, t6: &[u8; 32]) -> (Keys, Keys) {
        (Keys::traffic(self.x("c ap", t6, 32)), Keys::traffic(self.x("s ap", t6, 32)))
    }
}

/// The fields of a ClientHello, as they are to be sent.
#[derive(Clone)]
pub struct Hello {
    /// Versions, with their count.
    pub versions: Vec<u8>,
    /// Suites, with their count.
    pub suites: Vec<u8>,
    /// Longest record that is taken.
    pub record_limit: u16,
    /// 0 client, 1 server.
    pub role: u8,
    /// 1: send your key.
    pub flags: u8,
    /// `random_C`.
    pub random: [u8; 32],
    /// `E_C`.
    pub exchange: [u8; 32],
    /// Cookie and puzzle, with the length of the former.
    pub cookie: Vec<u8>,
    /// The offer.
    pub offer: Vec<u8>,
}

impl Hello {
    /// A right one.
    pub fn new(exchange: [u8; 32]) -> Self {
        Self {
            versions: vec![1, 1, 0],
            suites: vec![1, 0, 1],
            record_limit: 16_408,
            role: 0,
            flags: 0,
            random: random(),
            exchange,
            cookie: vec![0],
            offer: vec![0],
        }
    }

    /// The record.
    pub fn record(&self) -> Vec<u8> {
        let (limit, role) = (self.record_limit.to_be_bytes(), [self.role, self.flags]);
        let fields: [&[u8]; 8] =
            [&self.versions, &self.suites, &limit, &role, &self.random, &self.exchange, &self.cookie, &self.offer];
        clear(CLIENT_HELLO, &fields.concat())
    }
}

/// The fields of a ClientAuth of a full handshake, as they are to be sent.
#[derive(Clone)]
pub struct Auth {
    /// Method.
    pub kind: u8,
    /// Id of the client.
    pub id: [u8; 16],
    /// Key epoch of the method `key`.
    pub key_epoch: u32,
    /// Name of the method `enroll`.
    pub name: Vec<u8>,
    /// SPKI of the method `enroll`; its hash is what the method `key` names.
    pub spki: Vec<u8>,
    /// Id of the token.
    pub token: [u8; 8],
    /// Capabilities.
    pub caps: u16,
    /// Proof of the token.
    pub proof: [u8; 32],
    /// The password with its length and padding, of the method `password`.
    pub password: Vec<u8>,
    /// The signature; `None` makes a right one with `key`.
    pub signature: Option<Vec<u8>>,
    /// `fin_C`; `None` makes a right one.
    pub finished: Option<Vec<u8>>,
    /// What stands behind all of it.
    pub behind: Vec<u8>,
}

impl Auth {
    /// As an enrolled client.
    pub fn key(number: u8, key: &IdentityKey) -> Self {
        Self {
            kind: 1,
            id: [number; 16],
            key_epoch: 0,
            name: Vec::new(),
            spki: spki(key),
            token: [0; 8],
            caps: 0,
            proof: [0; 32],
            password: Vec::new(),
            signature: None,
            finished: None,
            behind: Vec::new(),
        }
    }

    /// As a new client.
    pub fn enroll(number: u8, name: &[u8], key: &IdentityKey) -> Self {
        Self { kind: 2, name: name.to_vec(), ..Self::key(number, key) }
    }

    /// As the holder of an account.
    pub fn password(number: u8, name: &[u8], password: &[u8], key: &IdentityKey) -> Self {
        let mut padded = vec![0; 129];
        padded[0] = password.len() as u8;
        padded[1..=password.len()].copy_from_slice(password);
        Self { kind: 3, name: name.to_vec(), password: padded, ..Self::key(number, key) }
    }

    fn fields(&self) -> (Vec<u8>, Vec<u8>) {
        let caps = self.caps.to_be_bytes();
        if self.kind == 2 {
            let head = [&[2][..], &self.id, &[self.name.len() as u8], &self.name, &self.spki, &self.token, &caps];
            return (head.concat(), self.proof.to_vec());
        }
        if self.kind == 3 {
            let head = [&[3][..], &self.id, &[self.name.len() as u8], &self.name, &self.spki, &caps, &self.password];
            return (head.concat(), Vec::new());
        }
        ([&[self.kind][..], &self.id, &self.key_epoch.to_be_bytes(), &caps].concat(), Vec::new())
    }

    /// `T5`.
    fn transcript(&self, t4: &[u8; 32]) -> [u8; 32] {
        if matches!(self.kind, 2 | 3) {
            return hash(&[t4, &self.fields().0]);
        }
        let epoch = self.key_epoch.to_be_bytes();
        hash(&[t4, &[self.kind], &self.id, &hash(&[&self.spki]), &epoch, &self.caps.to_be_bytes()])
    }
}

/// 32 bytes that nobody else has.
pub fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).expect("the system has randomness");
    bytes
}

/// A socket that says raw bytes and hears whole records.
pub struct Wire {
    /// The socket.
    pub stream: TcpStream,
    received: Vec<u8>,
    /// Every byte that was said.
    pub said: Vec<u8>,
}

impl Wire {
    /// Around a connected socket.
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a socket takes options");
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket takes options");
        stream.set_write_timeout(Some(DEADLINE)).expect("a socket takes options");
        Self { stream, received: Vec::new(), said: Vec::new() }
    }

    /// Connects.
    pub fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect_timeout(&address, DEADLINE).expect("the server accepts"))
    }

    /// Says these bytes. Whether the other side has gone is noticed by reading.
    pub fn say(&mut self, bytes: &[u8]) {
        self.said.extend_from_slice(bytes);
        let _ = self.stream.write_all(bytes);
    }

    /// Says no more, and still listens.
    pub fn finish(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next whole record; `None` at the end, which a reset is, too.
    ///
    /// # Panics
    /// If neither comes in time.
    pub fn record(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(len) = self.received.get(4..6).map(|len| usize::from(u16::from_be_bytes([len[0], len[1]])))
                && self.received.len() >= len.max(8)
            {
                return Some(self.received.drain(..len.max(8)).collect());
            }
            let mut bytes = [0; 16_384];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(len) => self.received.extend_from_slice(&bytes[..len]),
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    panic!("neither a record nor the end comes in time")
                }
                Err(_) => return None,
            }
        }
    }

    /// Everything up to the end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(record) = self.record() {
            all.extend(record);
        }
        all.extend(core::mem::take(&mut self.received));
        all
    }
}

/// A client of the raw kind, as far as it has come.
pub struct RawClient {
    /// Its socket.
    pub wire: Wire,
    /// Its ephemeral private key.
    pub ephemeral: [u8; 32],
    /// The hello that it said.
    pub hello: Vec<u8>,
    /// The server's two records, once they have come.
    pub answer: Vec<Vec<u8>>,
    /// Known once they have.
    pub schedule: Option<Schedule>,
    /// `T2`.
    pub t2: [u8; 32],
    /// `T4`.
    pub t4: [u8; 32],
    /// Its keys and the server's, once it has said `ClientAuth`.
    pub keys: Option<(Keys, Keys)>,
    /// Its exporter, known since then, too.
    pub exporter: [u8; 32],
}

impl RawClient {
    /// A client that has said nothing.
    pub fn connect(address: SocketAddr) -> Self {
        Self {
            wire: Wire::connect(address),
            ephemeral: random(),
            hello: Vec::new(),
            answer: Vec::new(),
            schedule: None,
            t2: [0; 32],
            t4: [0; 32],
            keys: None,
            exporter: [0; 32],
        }
    }

    /// The right hello.
    pub fn right_hello(&self) -> Hello {
        Hello::new(x25519_dalek::x25519(self.ephemeral, x25519_dalek::X25519_BASEPOINT_BYTES))
    }

    /// Says a hello.
    pub fn say_hello(&mut self, hello: &Hello) {
        self.hello = hello.record();
        let hello = self.hello.clone();
        self.wire.say(&hello);
    }

    /// Hears ServerHello and ServerAuth of a full handshake, by a server that did not send its key.
    ///
    /// # Panics
    /// If it hears something else.
    pub fn hear_server(&mut self, server: &IdentityKey) {
        let hello = self.wire.record().expect("a ServerHello");
        let auth = self.wire.record().expect("a ServerAuth");
        assert_eq!((hello.len(), &hello[2..4]), (79, &[1, 0x10][..]), "a ServerHello");
        let theirs: [u8; 32] = hello[47..79].try_into().expect("32 bytes");
        let schedule = Schedule::full(&x25519_dalek::x25519(self.ephemeral, theirs));
        let t1 = hash(&[&hash(&[b"ossicle HS1\0"]), &self.hello]);
        self.t2 = hash(&[&t1, &hello]);
        let (mut keys, fin_key) = schedule.server(&self.t2, 0);
        let body = keys.open(&auth).expect("ServerAuth opens");
        let (head, finished) = body.split_at(body.len() - 32);
        let (id, signature) = head.split_at(16);
        let t3 = hash(&[&self.t2, id, &server.fingerprint()]);
        assert_eq!(mac(&fin_key, &hash(&[&t3, signature])), finished, "fin_S");
        self.t4 = hash(&[&t3, signature, finished]);
        self.schedule = Some(schedule);
        self.answer = vec![hello, auth];
    }

    /// The hello, and the server's answer to it.
    pub fn greet(&mut self, server: &IdentityKey) {
        let hello = self.right_hello();
        self.say_hello(&hello);
        self.hear_server(server);
    }

    /// The record of a ClientAuth with these fields. The connection's keys are made of it, right or wrong.
    pub fn auth(&mut self, auth: &Auth, key: &IdentityKey) -> Vec<u8> {
        let schedule = self.schedule.clone().expect("the server has answered");
        let (head, proof) = auth.fields();
        let t5 = auth.transcript(&self.t4);
        let right = || sign(key, "ossicle HS1 client auth", &t5);
        let signature = auth.signature.clone().unwrap_or_else(right);
        let (mut keys, fin_key) = schedule.client(&self.t2);
        let right = || mac(&fin_key, &hash(&[&t5, &proof, &signature])).to_vec();
        let finished = auth.finished.clone().unwrap_or_else(right);
        let t6 = hash(&[&t5, &proof, &signature, &finished]);
        self.keys = Some(schedule.application(&t6));
        self.exporter = schedule.exporter(&t6);
        keys.seal(CLIENT_AUTH, &[&head, &proof, &signature, &finished, &auth.behind].map(Vec::as_slice).concat())
    }

    /// Says a ClientAuth with these fields.
    pub fn say_auth(&mut self, auth: &Auth, key: &IdentityKey) {
        let record = self.auth(auth, key);
        self.wire.say(&record);
    }

    /// Says any body as a ClientAuth, rightly sealed.
    pub fn say_auth_body(&mut self, body: &[u8]) {
        let (mut keys, _) = self.schedule.as_ref().expect("the server has answered").client(&self.t2);
        let record = keys.seal(CLIENT_AUTH, body);
        self.wire.say(&record);
    }

    /// A record of the established connection.
    pub fn sealed(&mut self, payload: &[u8]) -> Vec<u8> {
        self.keys.as_mut().expect("there are keys").0.seal(APPLICATION, payload)
    }

    /// Says a payload.
    pub fn say(&mut self, payload: &[u8]) {
        let record = self.sealed(payload);
        self.wire.say(&record);
    }

    /// Says a message.
    pub fn say_message(&mut self, message: &Message<'_>) {
        self.say(&payload(message));
    }

    /// Replaces its key, as the protocol has it.
    pub fn update_key(&mut self) {
        self.say(&[8, 0x22]);
        self.keys.as_mut().expect("there are keys").0.update();
    }

    /// What comes next: a payload, a refusal's reason, or the end. Key updates pass unnoticed.
    ///
    /// # Panics
    /// If a record does not open.
    pub fn hear(&mut self) -> RawHeard {
        loop {
            let Some(record) = self.wire.record() else { return RawHeard::End };
            if record[2..4] == REFUSAL.to_be_bytes() {
                let (mut keys, _) = self.schedule.as_ref().expect("the server has answered").server(&self.t2, 1);
                let body = keys.open(&record).expect("a refusal opens");
                return RawHeard::Refusal(body[0]);
            }
            assert_eq!(record[2..4], APPLICATION.to_be_bytes(), "an application record");
            let (_, keys) = self.keys.as_mut().expect("there are keys");
            let payload = keys.open(&record).expect("the server's record opens");
            if payload == [8, 0x22] {
                keys.update();
                continue;
            }
            return RawHeard::Payload(payload);
        }
    }
}

/// What a [`RawClient`] hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawHeard {
    /// A payload.
    Payload(Vec<u8>),
    /// A refusal with this reason.
    Refusal(u8),
    /// The end of the stream.
    End,
}

/// The payload of a message.
pub fn payload(message: &Message<'_>) -> Vec<u8> {
    let mut out = vec![0; 70_000];
    let len = message.encode(&mut out).expect("there is room");
    out.truncate(len);
    out
}

/// What a [`RawServer`] says of itself in ServerHello and ServerAuth.
#[derive(Clone)]
pub struct Proof {
    /// Mode.
    pub mode: u8,
    /// Version and suite.
    pub chosen: [u8; 4],
    /// Longest record that is taken.
    pub record_limit: u16,
    /// `E_S`; `None` is the right one.
    pub exchange: Option<[u8; 32]>,
    /// Its id.
    pub id: [u8; 16],
    /// What stands where its key belongs; `None` is its key if that was asked for.
    pub spki: Option<Vec<u8>>,
    /// The fingerprint that it proves to have.
    pub fingerprint: [u8; 32],
    /// The signature; `None` makes a right one.
    pub signature: Option<Vec<u8>>,
    /// `fin_S`; `None` makes a right one.
    pub finished: Option<Vec<u8>>,
}

impl Proof {
    /// A right one.
    pub fn new(key: &IdentityKey) -> Self {
        Self {
            mode: 0,
            chosen: [1, 0, 0, 1],
            record_limit: 16_408,
            exchange: None,
            id: [0x5e; 16],
            spki: None,
            fingerprint: key.fingerprint(),
            signature: None,
            finished: None,
        }
    }
}

/// A server of the raw kind, as far as it has come with one client.
pub struct RawServer {
    /// Its socket.
    pub wire: Wire,
    /// The client's hello, once it has come.
    pub hello: Vec<u8>,
    /// Known once it has answered.
    pub schedule: Option<Schedule>,
    /// `T2`.
    pub t2: [u8; 32],
    /// `T4`.
    pub t4: [u8; 32],
    /// The client's keys and its own, once the client has said who it is.
    pub keys: Option<(Keys, Keys)>,
}

impl RawServer {
    /// A server that has heard nothing.
    pub fn new(stream: TcpStream) -> Self {
        Self { wire: Wire::new(stream), hello: Vec::new(), schedule: None, t2: [0; 32], t4: [0; 32], keys: None }
    }

    /// Hears the client's hello.
    ///
    /// # Panics
    /// If none comes.
    pub fn hear_hello(&mut self) {
        self.hello = self.wire.record().expect("a client says hello");
    }

    /// Whether the client offers a channel.
    pub fn is_offered(&self) -> bool {
        // Behind the cookie, which has a puzzle behind it if it is there.
        let cookie = usize::from(self.hello[82]);
        self.hello[83 + if cookie == 0 { 0 } else { cookie + 8 }] == 1
    }

    /// The records of this proof, by this key.
    pub fn proof(&mut self, proof: &Proof, key: &IdentityKey) -> (Vec<u8>, Vec<u8>) {
        let ephemeral = random();
        let right = x25519_dalek::x25519(ephemeral, x25519_dalek::X25519_BASEPOINT_BYTES);
        let Proof { mode, chosen, record_limit, exchange, id, spki, fingerprint, signature, finished } = proof;
        let exchange = exchange.unwrap_or(right);
        let body = [&[*mode][..], chosen, &record_limit.to_be_bytes(), &random(), &exchange].concat();
        let hello = clear(SERVER_HELLO, &body);
        let theirs: [u8; 32] = self.hello[50..82].try_into().expect("a hello");
        let schedule = Schedule::full(&x25519_dalek::x25519(ephemeral, theirs));
        self.t2 = hash(&[&hash(&[&hash(&[b"ossicle HS1\0"]), &self.hello]), &hello]);
        let t3 = hash(&[&self.t2, id, fingerprint]);
        let signature = signature.clone().unwrap_or_else(|| sign(key, "ossicle HS1 server auth", &t3));
        let (mut keys, fin_key) = schedule.server(&self.t2, 0);
        let finished = finished.clone().unwrap_or_else(|| mac(&fin_key, &hash(&[&t3, &signature])).to_vec());
        let asked = self.hello[17] == 1;
        let spki = spki.clone().unwrap_or_else(|| if asked { self::spki(key) } else { Vec::new() });
        self.t4 = hash(&[&t3, &signature, &finished]);
        self.schedule = Some(schedule);
        (hello, keys.seal(SERVER_AUTH, &[&id[..], &spki, &signature, &finished].concat()))
    }

    /// Says this proof.
    pub fn prove(&mut self, proof: &Proof, key: &IdentityKey) {
        let (hello, auth) = self.proof(proof, key);
        self.wire.say(&[hello, auth].concat());
    }

    /// Hears the claim of the client with this fingerprint, and believes it. False if it has gone instead.
    pub fn hear_claim(&mut self, client: &[u8; 32]) -> bool {
        let Some(record) = self.wire.record() else { return false };
        let schedule = self.schedule.clone().expect("the server has answered");
        let body = schedule.client(&self.t2).0.open(&record).expect("the claim opens");
        let (t5, behind) = if body[0] == 1 {
            (hash(&[&self.t4, &[1], &body[1..17], client, &body[17..23]]), 23)
        } else {
            let key = 18 + usize::from(body[17]);
            let len = usize::from(u16::from_be_bytes([body[key + 2], body[key + 3]])) + 4;
            let end = key + len + 8 + 2;
            (hash(&[&self.t4, &body[..end]]), end)
        };
        self.keys = Some(schedule.application(&hash(&[&t5, &body[behind..]])));
        true
    }

    /// A refusal with this reason, which may be none.
    pub fn refuse(&mut self, reason: u8, retry_after: u32) {
        let (mut keys, _) = self.schedule.as_ref().expect("the server has answered").server(&self.t2, 1);
        let record = keys.seal(REFUSAL, &[&[reason][..], &retry_after.to_be_bytes()].concat());
        self.wire.say(&record);
    }

    /// A record of the established connection.
    pub fn sealed(&mut self, payload: &[u8]) -> Vec<u8> {
        self.keys.as_mut().expect("there are keys").1.seal(APPLICATION, payload)
    }

    /// Says a payload.
    pub fn say(&mut self, payload: &[u8]) {
        let record = self.sealed(payload);
        self.wire.say(&record);
    }

    /// Says a message.
    pub fn say_message(&mut self, message: &Message<'_>) {
        self.say(&payload(message));
    }

    /// Replaces its key, as the protocol has it.
    pub fn update_key(&mut self) {
        self.say(&[8, 0x22]);
        self.keys.as_mut().expect("there are keys").1.update();
    }

    /// The client's next payload; `None` at the end. Key updates pass unnoticed.
    ///
    /// # Panics
    /// If a record does not open.
    pub fn hear(&mut self) -> Option<Vec<u8>> {
        loop {
            let record = self.wire.record()?;
            let (keys, _) = self.keys.as_mut().expect("there are keys");
            let payload = keys.open(&record).expect("the client's record opens");
            if payload != [8, 0x22] {
                return Some(payload);
            }
            keys.update();
        }
    }
}
