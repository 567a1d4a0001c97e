//! PROTOCOL 2 to 4 and 6.4: handshakes, resumptions, what a busy server asks for, records, refusals, the enrolment of
//! devices.

mod hostile;
mod retry;

use super::json::{Fields, Json};
use super::reference::{Rsa, Signed, aead, array, exchange_public, expand, extract, hash, join, mac, x25519};
use super::{Keys, head, random, seed};

const SERVER_ID: [u8; 16] = [0x5e; 16];
const CLIENT_ID: [u8; 16] = [0xc1; 16];
const DEVICE_ID: [u8; 16] = [0xb0; 16];
const LIMIT: u16 = 16_408;

/// A record in the clear.
fn clear(kind: u16, body: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + body.len()).expect("short");
    join(&[&[1, 0], &kind.to_be_bytes(), &len.to_be_bytes(), &[0, 0], body])
}

fn nonce(iv: &[u8; 12], counter: u64) -> [u8; 12] {
    let mut nonce = *iv;
    nonce[4..].iter_mut().zip(counter.to_be_bytes()).for_each(|(byte, counter)| *byte ^= counter);
    nonce
}

/// A sealed record.
fn sealed(kind: u16, key: &[u8; 32], iv: &[u8; 12], counter: u64, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(24 + payload.len()).expect("short");
    let sequence = u16::try_from(counter & 0xffff).expect("16 bits");
    let header = join(&[&[1, 0], &kind.to_be_bytes(), &len.to_be_bytes(), &sequence.to_be_bytes()]);
    join(&[&header, &aead(key, &nonce(iv, counter), &header, payload)])
}

const CLIENT_HELLO: u16 = 0x0100;
const SERVER_HELLO: u16 = 0x0110;
const HELLO_RETRY: u16 = 0x0120;
const CLIENT_AUTH: u16 = 0x0200;
const SERVER_AUTH: u16 = 0x0210;
const REFUSAL: u16 = 0x0220;
const APPLICATION: u16 = 0x0300;

/// Key, IV and key of fin: 76 bytes.
struct HandshakeKeys {
    all: [u8; 76],
    key: [u8; 32],
    iv: [u8; 12],
    mac: [u8; 32],
}

impl HandshakeKeys {
    fn new(all: [u8; 76]) -> Self {
        Self { all, key: array(&all[..32]), iv: array(&all[32..44]), mac: array(&all[44..]) }
    }

    fn put(&self, fields: &mut Fields, side: &str) {
        fields.put_hex(&format!("{}_hs", side.to_lowercase()), self.all);
        fields.put_hex(&format!("k_{side}"), self.key);
        fields.put_hex(&format!("iv_{side}"), self.iv);
        fields.put_hex(&format!("m_{side}"), self.mac);
    }
}

/// One direction's traffic secret with its key and IV.
#[derive(Clone)]
struct Traffic {
    secret: [u8; 32],
    key: [u8; 32],
    iv: [u8; 12],
    counter: u64,
}

impl Traffic {
    fn new(secret: [u8; 32]) -> Self {
        let both: [u8; 44] = expand(&secret, &[b"ossicle key"]);
        Self { secret, key: array(&both[..32]), iv: array(&both[32..]), counter: 0 }
    }

    fn both(&self) -> Vec<u8> {
        join(&[&self.key, &self.iv])
    }

    fn seal(&mut self, payload: &[u8]) -> Vec<u8> {
        self.counter += 1;
        sealed(APPLICATION, &self.key, &self.iv, self.counter - 1, payload)
    }

    fn update(&mut self) {
        *self = Self::new(expand(&self.secret, &[b"ossicle upd"]));
    }
}

/// What a handshake ends with.
#[derive(Clone, Copy)]
enum End {
    /// The payload of Settings, with the channel that it issues and for how many seconds.
    Settings { channel: [u8; 16], valid_for: u32 },
    /// Reason and time.
    Refusal(u8, u32),
}

const NO_CHANNEL: End = End::Settings { channel: [0; 16], valid_for: 0 };

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f | 0x80).expect("a byte"));
        value >>= 7;
    }
    out.push(u8::try_from(value).expect("a byte"));
}

/// The payload of Settings: heartbeat 15, timeout 45, as in PROTOCOL 15.1.
fn settings(channel: [u8; 16], valid_for: u32) -> Vec<u8> {
    let mut payload = join(&[&[7, 0x20], &channel]);
    for number in [valid_for.into(), 15, 45, 1_790_000_000, 0] {
        varint(number, &mut payload);
    }
    payload.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    payload
}

fn refusal(reason: u8, retry_after: u32) -> Vec<u8> {
    join(&[&[reason], &retry_after.to_be_bytes()])
}

/// What a client says of itself.
#[derive(Clone, Copy)]
enum Method<'a> {
    Key { key_epoch: u32 },
    Enroll { name: &'a str, token: Option<([u8; 8], [u8; 16])> },
    Password { name: &'a str, password: &'a str },
}

/// What both sides keep.
#[derive(Clone, Copy)]
struct Channel {
    id: [u8; 16],
    secret: [u8; 32],
    client: [u8; 16],
    client_key: [u8; 32],
    key_epoch: u32,
    server: [u8; 16],
    server_key: [u8; 32],
}

impl Channel {
    fn fields(&self) -> Fields {
        Fields::new()
            .hex("channel", self.id)
            .hex("CS", self.secret)
            .hex("client_id", self.client)
            .hex("H(SPKI_C)", self.client_key)
            .with("key_epoch", self.key_epoch)
            .hex("server_id", self.server)
            .hex("H(SPKI_S)", self.server_key)
    }
}

struct Handshake<'a> {
    name: &'a str,
    about: &'a str,
    server: &'a Rsa,
    client: &'a Rsa,
    client_id: [u8; 16],
    method: Method<'a>,
    ask_for_key: bool,
    /// Record limits of client and server.
    limits: (u16, u16),
    /// Of client and server.
    seeds: (u8, u8),
    /// Salts of RSA-PSS of client and server; chapter 15 prints signatures with these.
    salts: Option<(&'a str, &'a str)>,
    /// What the client offers, in vain.
    offer: Option<Channel>,
    /// Of a client that says more than version 1.0 knows: versions, suites, cookie, capabilities.
    later: Option<Later>,
    end: End,
}

#[derive(Clone, Copy)]
struct Later {
    versions: &'static [u16],
    suites: &'static [u16],
    cookie: &'static [u8],
    caps: u16,
}

/// What outlives a handshake.
struct Finished {
    fields: Fields,
    said: Said,
    exporter: [u8; 32],
    channel_secret: [u8; 32],
    client: Traffic,
    server: Traffic,
}

/// What was said on the way, and under which keys: for what says something else there.
struct Said {
    server_keys: HandshakeKeys,
    client_keys: HandshakeKeys,
    client_hello: Vec<u8>,
    server_hello: Vec<u8>,
    t3: [u8; 32],
    /// Payloads.
    server_auth: Vec<u8>,
    client_auth: Vec<u8>,
}

impl Said {
    fn t2(&self) -> [u8; 32] {
        hash(&[&hash(&[&t0(), &self.client_hello]), &self.server_hello])
    }
}

fn t0() -> [u8; 32] {
    hash(&[b"ossicle HS1\0"])
}

/// What stands in a ClientHello before the offer.
fn hello_front(limit: u16, ask_for_key: bool, seed: &[u8; 64]) -> Vec<u8> {
    let private = array(&seed[..32]);
    join(&[
        &[1, 1, 0, 1, 0, 1],
        &limit.to_be_bytes(),
        &[0, u8::from(ask_for_key)],
        &seed[32..],
        &exchange_public(&private),
        &[0],
    ])
}

/// A whole ClientHello that offers this channel, its binder key and its binder.
fn offering(front: &[u8], channel: &Channel) -> (Vec<u8>, [u8; 32], [u8; 32]) {
    let mut hello = clear(CLIENT_HELLO, &join(&[front, &[1], &channel.id, &[0; 32]]));
    hello.truncate(hello.len() - 32);
    let key = expand(&channel.secret, &[b"ossicle ch binder\0"]);
    let binder = mac(&key, &[&hash(&[&t0(), &hello])]);
    hello.extend(binder);
    (hello, key, binder)
}

fn server_hello(mode: u8, limit: u16, seed: &[u8; 64]) -> Vec<u8> {
    let public = exchange_public(&array(&seed[..32]));
    clear(SERVER_HELLO, &join(&[&[mode, 1, 0, 0, 1], &limit.to_be_bytes(), &seed[32..], &public]))
}

/// The inputs that each handshake has.
fn randomness(given: &mut Fields, seeds: (u8, u8), limits: (u16, u16)) -> ([u8; 64], [u8; 64]) {
    let (client, server) = (seed(seeds.0), seed(seeds.1));
    given.put("record_limit_C", limits.0);
    given.put("record_limit_S", limits.1);
    for (side, seed) in [("C", &client), ("S", &server)] {
        given.put_hex(&format!("seed_{side}"), seed);
        given.put_hex(&format!("e_{side}"), &seed[..32]);
        given.put_hex(&format!("random_{side}"), &seed[32..]);
    }
    (client, server)
}

/// What `T6` gives, and the record that it ends with.
fn finish(
    mut fields: Fields,
    given: Fields,
    (name, about): (&str, &str),
    input: &[u8; 32],
    t6: [u8; 32],
    said: Said,
    end: End,
) -> Finished {
    let x = |label: &str| expand(input, &[b"ossicle ", label.as_bytes(), &[0], &t6]);
    let (client, mut server) = (Traffic::new(x("c ap")), Traffic::new(x("s ap")));
    let (exporter, channel_secret): ([u8; 32], [u8; 32]) = (x("exp"), x("channel"));
    fields.put_hex("a_C", client.secret);
    fields.put_hex("a_S", server.secret);
    fields.put_hex("exporter", exporter);
    fields.put_hex("CS", channel_secret);
    fields.put_hex("key_C", client.both());
    fields.put_hex("key_S", server.both());
    match end {
        End::Settings { channel, valid_for } => {
            let payload = settings(channel, valid_for);
            fields.put_hex("settings", &payload);
            fields.put_hex("Settings", server.seal(&payload));
        }
        End::Refusal(reason, retry_after) => {
            let payload = refusal(reason, retry_after);
            fields.put_hex("refusal", &payload);
            fields.put_hex("Refusal", sealed(REFUSAL, &said.server_keys.key, &said.server_keys.iv, 1, &payload));
        }
    }
    let fields = Fields::new().with("name", name).with("about", about).with("given", given).with("gives", fields);
    Finished { fields, said, exporter, channel_secret, client, server }
}

fn given_end(given: &mut Fields, end: End) {
    match end {
        End::Settings { channel, valid_for } => {
            let issued = Fields::new()
                .hex("channel", channel)
                .with("valid_for", valid_for)
                .with("heartbeat", 15_u8)
                .with("timeout", 45_u8)
                .with("time", 1_790_000_000_u32)
                .with("waiting", 0_u8)
                .hex("store_epoch", [1, 2, 3, 4, 5, 6, 7, 8]);
            given.put("settings", issued);
        }
        End::Refusal(reason, retry_after) => {
            given.put("refusal", Fields::new().with("reason", reason).with("retry_after", retry_after));
        }
    }
}

impl Handshake<'_> {
    /// PROTOCOL 4.3.
    fn run(&self) -> Finished {
        let mut given = Fields::new()
            .with("server_key", self.server.name)
            .hex("server_id", SERVER_ID)
            .with("client_key", self.client.name)
            .hex("client_id", self.client_id)
            .with("ask_for_key", self.ask_for_key);
        match self.method {
            Method::Key { key_epoch } => {
                given.put("method", "key");
                given.put("key_epoch", key_epoch);
            }
            Method::Enroll { name, token } => {
                given.put("method", "enroll");
                given.put("client_name", name);
                let token = token.map(|(id, secret)| Fields::new().hex("id", id).hex("secret", secret));
                given.put("token", token);
            }
            Method::Password { name, password } => {
                given.put("method", "password");
                given.put("client_name", name);
                given.put("password", password);
            }
        }
        let (seed_c, seed_s) = randomness(&mut given, self.seeds, self.limits);
        let salt = |side: &str, printed: Option<&str>| match printed {
            Some(digits) => array(&hex::decode(digits).expect("digits")),
            None => random(&format!("{} {side}", self.name)),
        };
        let salt_c = salt("C", self.salts.map(|salts| salts.0));
        let salt_s = salt("S", self.salts.map(|salts| salts.1));
        given.put_hex("pss_salt_C", salt_c);
        given.put_hex("pss_salt_S", salt_s);
        given.put("offer", self.offer.map(|channel| channel.fields()));
        given_end(&mut given, self.end);
        if let Some(Later { versions, suites, cookie, caps }) = self.later {
            let numbers = |list: &[u16]| list.iter().map(|number| format!("{number:04x}")).collect::<Vec<_>>();
            given.put("versions", numbers(versions));
            given.put("suites", numbers(suites));
            given.put_hex("cookie", cookie);
            given.put_hex("puzzle", [0x99; 8]);
            given.put("caps", format!("{caps:04x}"));
        }

        let mut fields = Fields::new();
        let mut front = hello_front(self.limits.0, self.ask_for_key, &seed_c);
        if let Some(Later { versions, suites, cookie, .. }) = self.later {
            let list = |list: &[u16]| {
                let numbers: Vec<u8> = list.iter().flat_map(|number| number.to_be_bytes()).collect();
                join(&[&[u8::try_from(list.len()).expect("few")], &numbers])
            };
            let cookie_len = [u8::try_from(cookie.len()).expect("short")];
            let puzzle: &[u8] = if cookie.is_empty() { &[] } else { &[0x99; 8] };
            let behind = front[6..front.len() - 1].to_vec();
            front = join(&[&list(versions), &list(suites), &behind, &cookie_len, cookie, puzzle]);
        }
        let caps = self.later.map_or(0, |later| later.caps).to_be_bytes();
        let (e_c, e_s) = (array(&seed_c[..32]), array(&seed_s[..32]));
        let (public_c, public_s) = (exchange_public(&e_c), exchange_public(&e_s));
        fields.put_hex("H(SPKI_S)", self.server.fingerprint());
        fields.put_hex("H(SPKI_C)", self.client.fingerprint());
        fields.put_hex("E_C", public_c);
        fields.put_hex("E_S", public_s);
        fields.put_hex("T0", t0());
        let hello = match &self.offer {
            None => clear(CLIENT_HELLO, &join(&[&front, &[0]])),
            Some(channel) => {
                let (hello, key, binder) = offering(&front, channel);
                fields.put_hex("k_binder", key);
                fields.put_hex("binder", binder);
                hello
            }
        };
        fields.put_hex("ClientHello", &hello);
        let answer = server_hello(if self.offer.is_some() { 2 } else { 0 }, self.limits.1, &seed_s);
        let t1 = hash(&[&t0(), &hello]);
        let t2 = hash(&[&t1, &answer]);
        fields.put_hex("T1", t1);
        fields.put_hex("ServerHello", &answer);
        fields.put_hex("T2", t2);
        let dh = x25519(&e_c, &public_s);
        assert_eq!(dh, x25519(&e_s, &public_c));
        let salt = hash(&[b"ossicle HS1 x25519 sha256 aes256gcm pss"]);
        let input = extract(&salt, &dh);
        fields.put_hex("dh", dh);
        fields.put_hex("salt", salt);
        fields.put_hex("ES", input);
        let keys_s = HandshakeKeys::new(expand(&input, &[b"ossicle s hs\0", &t2]));
        let keys_c = HandshakeKeys::new(expand(&input, &[b"ossicle c hs\0", &t2]));
        keys_s.put(&mut fields, "S");
        keys_c.put(&mut fields, "C");

        let t3 = hash(&[&t2, &SERVER_ID, &self.server.fingerprint()]);
        let signed = self.server.sign("ossicle HS1 server auth", &t3, &salt_s);
        let fin_s = mac(&keys_s.mac, &[&hash(&[&t3, &signed.signature])]);
        let t4 = hash(&[&t3, &signed.signature, &fin_s]);
        let spki = if self.ask_for_key { self.server.spki() } else { Vec::new() };
        let server_auth = join(&[&SERVER_ID, &spki, &signed.signature, &fin_s]);
        fields.put_hex("T3", t3);
        fields = fields.and(signed.fields("S"));
        fields.put_hex("fin_S", fin_s);
        fields.put_hex("T4", t4);
        fields.put_hex("server_auth", &server_auth);
        fields.put_hex("ServerAuth", sealed(SERVER_AUTH, &keys_s.key, &keys_s.iv, 0, &server_auth));

        let (front, t5, proof) = match self.method {
            Method::Key { key_epoch } => {
                let front = join(&[&[1], &self.client_id, &key_epoch.to_be_bytes(), &caps]);
                let fingerprint = self.client.fingerprint();
                let t5 = hash(&[&t4, &[1], &self.client_id, &fingerprint, &key_epoch.to_be_bytes(), &caps]);
                (front, t5, Vec::new())
            }
            Method::Enroll { name, token } => {
                let len = [u8::try_from(name.len()).expect("a short name")];
                let id = token.map_or([0; 8], |token| token.0);
                let said = join(&[&[2], &self.client_id, &len, name.as_bytes(), &self.client.spki(), &id, &caps]);
                let t5 = hash(&[&t4, &said]);
                let mut proof = [0; 32];
                if let Some((_, secret)) = token {
                    // The secret is the key of HMAC as it is, which is what Expand does with a PRK of 32 bytes.
                    let verifier = mac(&secret, &[b"ossicle enrol token\0", &[1]]);
                    proof = mac(&verifier, &[&t5]);
                    fields.put_hex("verifier", verifier);
                }
                (said, t5, proof.to_vec())
            }
            Method::Password { name, password } => {
                let len = |text: &str| [u8::try_from(text.len()).expect("a short text")];
                let mut padded = password.as_bytes().to_vec();
                padded.resize(128, 0);
                let (spki, name_len, password_len) = (self.client.spki(), len(name), len(password));
                let said =
                    join(&[&[3], &self.client_id, &name_len, name.as_bytes(), &spki, &caps, &password_len, &padded]);
                let t5 = hash(&[&t4, &said]);
                (said, t5, Vec::new())
            }
        };
        let signed = self.client.sign("ossicle HS1 client auth", &t5, &salt_c);
        let fin_c = mac(&keys_c.mac, &[&hash(&[&t5, &proof, &signed.signature])]);
        let t6 = hash(&[&t5, &proof, &signed.signature, &fin_c]);
        let client_auth = join(&[&front, &proof, &signed.signature, &fin_c]);
        fields.put_hex("T5", t5);
        if let Method::Enroll { .. } = self.method {
            fields.put_hex("proof", &proof);
        }
        fields = fields.and(signed.fields("C"));
        fields.put_hex("fin_C", fin_c);
        fields.put_hex("T6", t6);
        fields.put_hex("client_auth", &client_auth);
        fields.put_hex("ClientAuth", sealed(CLIENT_AUTH, &keys_c.key, &keys_c.iv, 0, &client_auth));
        let said = Said {
            server_keys: keys_s,
            client_keys: keys_c,
            client_hello: hello,
            server_hello: answer,
            t3,
            server_auth,
            client_auth,
        };
        finish(fields, given, (self.name, self.about), &input, t6, said, self.end)
    }
}

/// PROTOCOL 4.10, mode 1.
fn resume(name: &str, about: &str, channel: &Channel, seeds: (u8, u8), limits: (u16, u16), end: End) -> Finished {
    let mut given = channel.fields();
    let (seed_c, seed_s) = randomness(&mut given, seeds, limits);
    given_end(&mut given, end);

    let mut fields = Fields::new();
    let (e_c, e_s) = (array(&seed_c[..32]), array(&seed_s[..32]));
    let (public_c, public_s) = (exchange_public(&e_c), exchange_public(&e_s));
    let (hello, key, binder) = offering(&hello_front(limits.0, false, &seed_c), channel);
    let answer = server_hello(1, limits.1, &seed_s);
    let t1 = hash(&[&t0(), &hello]);
    let t2 = hash(&[&t1, &answer]);
    let dh = x25519(&e_c, &public_s);
    let salt: [u8; 32] = expand(&channel.secret, &[b"ossicle ch salt\0"]);
    let input = extract(&salt, &dh);
    fields.put_hex("E_C", public_c);
    fields.put_hex("E_S", public_s);
    fields.put_hex("T0", t0());
    fields.put_hex("k_binder", key);
    fields.put_hex("binder", binder);
    fields.put_hex("ClientHello", &hello);
    fields.put_hex("T1", t1);
    fields.put_hex("ServerHello", &answer);
    fields.put_hex("T2", t2);
    fields.put_hex("dh", dh);
    fields.put_hex("salt", salt);
    fields.put_hex("ES", input);
    let keys_s = HandshakeKeys::new(expand(&input, &[b"ossicle r s hs\0", &t2]));
    let keys_c = HandshakeKeys::new(expand(&input, &[b"ossicle r c hs\0", &t2]));
    keys_s.put(&mut fields, "S");
    keys_c.put(&mut fields, "C");
    let t3 = hash(&[
        &t2,
        &channel.server,
        &channel.server_key,
        &channel.client,
        &channel.client_key,
        &channel.key_epoch.to_be_bytes(),
    ]);
    let fin_s = mac(&keys_s.mac, &[&t3]);
    let t4 = hash(&[&t3, &fin_s, &[0, 0]]);
    let fin_c = mac(&keys_c.mac, &[&t4]);
    let t6 = hash(&[&t4, &fin_c]);
    let payload = join(&[&[0, 0], &fin_c]);
    fields.put_hex("T3", t3);
    fields.put_hex("fin_S", fin_s);
    fields.put_hex("T4", t4);
    fields.put_hex("server_auth", fin_s);
    fields.put_hex("ServerAuth", sealed(SERVER_AUTH, &keys_s.key, &keys_s.iv, 0, &fin_s));
    fields.put_hex("fin_C", fin_c);
    fields.put_hex("T6", t6);
    fields.put_hex("client_auth", &payload);
    fields.put_hex("ClientAuth", sealed(CLIENT_AUTH, &keys_c.key, &keys_c.iv, 0, &payload));
    let said = Said {
        server_keys: keys_s,
        client_keys: keys_c,
        client_hello: hello,
        server_hello: answer,
        t3,
        server_auth: fin_s.to_vec(),
        client_auth: payload,
    };
    finish(fields, given, (name, about), &input, t6, said, end)
}

fn first(keys: &Keys) -> Handshake<'_> {
    Handshake {
        name: "key",
        about: "method key, the server's key known; PROTOCOL 15.1",
        server: &keys.server,
        client: &keys.alice,
        client_id: CLIENT_ID,
        method: Method::Key { key_epoch: 0 },
        ask_for_key: false,
        limits: (LIMIT, LIMIT),
        seeds: (1, 2),
        salts: Some((
            "47529d4be657791542d6fab8341d935cce8b1240561cdcf0d61a72b80e04aa2e",
            "ff3317f3aa49440cd9be08383e40b0ac0fd5e2d42b5c1e426b734764ac4d7e37",
        )),
        offer: None,
        later: None,
        end: NO_CHANNEL,
    }
}

fn enroll(keys: &Keys) -> Handshake<'_> {
    Handshake {
        name: "enroll with a token, refused",
        about: "method enroll with a token, the server's key asked for, refused with name-in-use; PROTOCOL 15.2",
        client: &keys.bob,
        client_id: DEVICE_ID,
        method: Method::Enroll { name: "sensor-01", token: Some(([7; 8], [9; 16])) },
        ask_for_key: true,
        seeds: (3, 4),
        salts: Some((
            "5d9e9daf579119ab28fadc5801bf8adf042d32b9e7afa019e2b1ed0b2c1699e2",
            "5900a0791b6eb66c6ddf0a0af7437f6f08a3fa8eca44f5aa1794fa63242a24ca",
        )),
        end: End::Refusal(5, 0),
        ..first(keys)
    }
}

pub(super) fn files(keys: &Keys) -> Vec<(&'static str, Fields)> {
    let key = first(keys).run();
    let (resumption, resumed) = resumption(keys, &key);
    let handshakes = [
        key.fields.clone(),
        Handshake {
            name: "key, asked for the server's key",
            about: "the client knows the fingerprint only; a server of 3072 bits, a client of 4096, a key epoch of 3",
            server: &keys.server3072,
            client: &keys.server4096,
            method: Method::Key { key_epoch: 3 },
            ask_for_key: true,
            limits: (1_024, LIMIT),
            seeds: (7, 8),
            salts: None,
            end: End::Settings { channel: [0xa3; 16], valid_for: 604_800 },
            ..first(keys)
        }
        .run()
        .fields,
        Handshake {
            name: "enroll with a token",
            about: "as in 15.2, and let in: with a channel for 7 days",
            seeds: (9, 10),
            salts: None,
            end: End::Settings { channel: [0xa4; 16], valid_for: 604_800 },
            ..enroll(keys)
        }
        .run()
        .fields,
        enroll(keys).run().fields,
        Handshake {
            name: "enroll without a token",
            about: "an open server, whose key is known; a server of 4096 bits, a client of 3072; a name with a character of two bytes",
            server: &keys.server4096,
            client: &keys.server3072,
            method: Method::Enroll { name: "Zoë-01", token: None },
            ask_for_key: false,
            seeds: (11, 12),
            salts: None,
            ..enroll(keys)
        }
        .with_end(NO_CHANNEL)
        .run()
        .fields,
        Handshake {
            name: "password",
            about: "method password, the server's key asked for: let in, without a channel; PROTOCOL 4.12",
            method: Method::Password { name: "alice", password: "correct horse" },
            seeds: (41, 42),
            salts: None,
            ..enroll(keys)
        }
        .with_end(NO_CHANNEL)
        .run()
        .fields,
        Handshake {
            name: "password, refused",
            about: "the longest name and password, with a client of 4096 bits: the longest ClientAuth; refused with unauthorised",
            client: &keys.server4096,
            method: Method::Password { name: &"é".repeat(32), password: &"0123456789abcdef".repeat(8) },
            ask_for_key: false,
            seeds: (43, 44),
            salts: None,
            end: End::Refusal(3, 0),
            ..enroll(keys)
        }
        .run()
        .fields,
        Handshake {
            name: "key, refused",
            about: "refused with rate: come again in 1,500 ms",
            seeds: (13, 14),
            salts: None,
            end: End::Refusal(12, 1_500),
            ..first(keys)
        }
        .run()
        .fields,
    ];
    let later = Handshake {
        name: "of a later client",
        about: "lists with more than version 1.0 knows, a cookie and its puzzle, capabilities: the server ignores them",
        later: Some(Later {
            versions: &[0x0200, 0x0101, 0x0100],
            suites: &[0x0011, 1, 0x0101, 2],
            cookie: &[7; 40],
            caps: 0x8001,
        }),
        seeds: (21, 22),
        salts: None,
        ..first(keys)
    }
    .run();
    vec![
        (
            "handshake.json",
            head("Full handshakes: every record and every value between", &["3", "4.3", "4.6", "4.9", "4.12"])
                .with("cases", handshakes.to_vec())
                .with("of_later_clients", vec![later.fields]),
        ),
        ("resumption.json", resumption),
        ("retry.json", retry::file(&channel(keys, &key))),
        ("hostile.json", hostile::file(keys, &key, &enroll(keys).run(), &resumed)),
        ("records.json", records(&key)),
        ("refusals.json", refusals(keys)),
        ("enrolment.json", enrolment(keys, &key)),
    ]
}

impl Handshake<'_> {
    fn with_end(self, end: End) -> Self {
        Self { end, ..self }
    }
}

/// The channel that the handshake "key" would have issued.
fn channel(keys: &Keys, key: &Finished) -> Channel {
    Channel {
        id: [0xa1; 16],
        secret: key.channel_secret,
        client: CLIENT_ID,
        client_key: keys.alice.fingerprint(),
        key_epoch: 0,
        server: SERVER_ID,
        server_key: keys.server.fingerprint(),
    }
}

fn resumption(keys: &Keys, key: &Finished) -> (Fields, Finished) {
    let channel = channel(keys, key);
    let limits = (LIMIT, LIMIT);
    let accepted = resume(
        "accepted",
        "the channel that the handshake \"key\" would have issued; PROTOCOL 15.4",
        &channel,
        (5, 6),
        limits,
        End::Settings { channel: [0xa2; 16], valid_for: 604_000 },
    );
    let next = Channel { id: [0xa2; 16], secret: accepted.channel_secret, ..channel };
    let again = resume(
        "accepted again",
        "the channel that the case before issued; nothing is issued for another time",
        &next,
        (15, 16),
        (1_024, LIMIT),
        NO_CHANNEL,
    );
    let refused = resume(
        "resumed and refused",
        "the client was revoked between its hello and its Finished",
        &channel,
        (17, 18),
        limits,
        End::Refusal(3, 0),
    );
    let elsewhere = Channel { id: [0xa9; 16], secret: [0x77; 32], ..channel };
    let bound = Handshake {
        name: "offered with another secret",
        about: "the server holds the channel of the case \"accepted\", and the binder is wrong: mode 2",
        seeds: (23, 24),
        salts: None,
        offer: Some(Channel { secret: [0x78; 32], ..channel }),
        end: End::Settings { channel: [0xab; 16], valid_for: 604_800 },
        ..first(keys)
    }
    .run();
    let unknown = Handshake {
        name: "unknown to the server",
        about: "mode 2: the offer is not taken, and the full handshake goes on",
        seeds: (19, 20),
        salts: None,
        offer: Some(elsewhere),
        end: End::Settings { channel: [0xaa; 16], valid_for: 604_800 },
        ..first(keys)
    }
    .run();
    let fields = head("Resumptions: every record and every value between", &["4.10"])
        .with("cases", vec![accepted.fields.clone(), again.fields, refused.fields])
        .with("full_instead", vec![unknown.fields, bound.fields]);
    (fields, accepted)
}

/// Records as they follow each other, one list for both directions.
struct Log {
    client: Traffic,
    server: Traffic,
    rows: Vec<Json>,
}

impl Log {
    fn say(&mut self, from: &str, message: &str, payload: &[u8]) {
        let side = if from == "client" { &mut self.client } else { &mut self.server };
        let (counter, before) = (side.counter, side.clone());
        let record = side.seal(payload);
        let mut row = Fields::new()
            .with("from", from)
            .with("message", message)
            .hex("payload", payload)
            .hex("secret", before.secret)
            .hex("key", before.key)
            .hex("IV", before.iv)
            .with("counter", counter)
            .hex("nonce", nonce(&before.iv, counter))
            .hex("record", record);
        if message == "KeyUpdate" {
            side.update();
            row = row.hex("next_secret", side.secret).hex("next_key", side.both());
        }
        self.rows.push(row.into());
    }
}

fn records(key: &Finished) -> Fields {
    let log = || Log { client: key.client.clone(), server: key.server.clone(), rows: Vec::new() };
    let case = |name: &str, about: &str, log: Log| {
        Fields::new().with("name", name).with("about", about).with("records", Json::List(log.rows))
    };
    let mut printed = log();
    printed.say("client", "Status", &[4, 0, 1]);
    printed.say("server", "StatusResponse", &[4, 0x10, 1]);
    printed.say("client", "KeyUpdate", &[8, 0x22]);
    printed.say("client", "Listening", &[7, 0]);
    printed.say("client", "Close", &[8, 0x21, 0]);
    printed.say("server", "Close", &[8, 0x21, 1, 19]);

    let mut both = log();
    for round in 0..3 {
        both.say("server", "Status", &[4, 0, round]);
        both.say("client", "StatusResponse", &[4, 0x10, round]);
        both.say("server", "KeyUpdate", &[8, 0x22]);
        both.say("server", "Done", &[0x0f, 0, round]);
        both.say("client", "KeyUpdate", &[8, 0x22]);
        both.say("client", "KeyUpdate", &[8, 0x22]);
        both.say("client", "NotListening", &[7, 1]);
    }
    let longest = join(&[&[2, 0, 0], &vec![0x5a; usize::from(LIMIT) - 24 - 3]]);
    both.say("client", "Send", &longest);
    both.say("server", "Close", &[8, 0x21, 1, 20]);
    both.say("client", "Close", &[8, 0x21, 0]);

    let mut wrapped = log();
    wrapped.client.counter = 65_535;
    wrapped.say("client", "Status", &[4, 0, 7]);
    wrapped.say("client", "Status", &[4, 0, 8]);
    head(
        "Records behind the Settings of the handshake \"key\", whose a_C and a_S they begin with",
        &["2.1", "2.3", "2.6", "2.7"],
    )
    .with(
        "cases",
        vec![
            case("across a key update and a close", "PROTOCOL 15.1", printed),
            case("key updates of both sides", "each direction for itself; one record of the longest length", both),
            case(
                "beyond 65,536 records",
                "sqn begins anew and the counter does not; 65,535 times Status 7 stand before the first of these",
                wrapped,
            ),
        ],
    )
}

fn refusals(keys: &Keys) -> Fields {
    let refused = enroll(keys).run();
    let reasons = [
        (1, "malformed"),
        (2, "unsupported"),
        (3, "unauthorised"),
        (4, "forbidden"),
        (5, "name-in-use"),
        (6, "not-member"),
        (7, "unknown"),
        (8, "offline"),
        (9, "queue-full"),
        (10, "too-large"),
        (11, "closed"),
        (12, "rate"),
        (13, "rekey"),
        (14, "expired"),
        (15, "unreadable"),
        (16, "gap"),
        (17, "rewound"),
        (18, "key-changed"),
        (19, "taken-over"),
        (20, "unavailable"),
    ];
    let record =
        |payload: &[u8]| sealed(REFUSAL, &refused.said.server_keys.key, &refused.said.server_keys.iv, 1, payload);
    let case = |(code, spelling): (u8, &str)| {
        let retry_after = if matches!(code, 12 | 20) { 30_000 } else { 0 };
        let payload = refusal(code, retry_after);
        Fields::new()
            .with("reason", code)
            .with("spelling", spelling)
            .with("retry_after", retry_after)
            .hex("refusal", &payload)
            .hex("Refusal", record(&payload))
    };
    let bad = [
        ("no reason has this code", refusal(0, 0)),
        ("no reason has this code", refusal(21, 0)),
        ("a byte too few", vec![3, 0, 0, 0]),
        ("a byte too many", vec![3, 0, 0, 0, 0, 0]),
    ];
    let bad = bad
        .map(|(why, payload)| Fields::new().with("why", why).hex("refusal", &payload).hex("Refusal", record(&payload)));
    head(
        "Every reason in a Refusal, in the place of the one in the handshake \"enroll with a token, refused\"",
        &["3.6", "4.9", "11"],
    )
    .with("cases", reasons.into_iter().map(case).collect::<Vec<_>>())
    .with("malformed", bad.to_vec())
}

fn enrolment(keys: &Keys, key: &Finished) -> Fields {
    let case = |name: &str, about: &str, request: u16, (index, count): (u16, u16), id: [u8; 16], rsa: &Rsa| {
        let salt = random(&format!("enrolment of {name}"));
        let len = u8::try_from(name.len()).expect("a short name");
        let h = hash(&[&key.exporter, &CLIENT_ID, &id, &[len], name.as_bytes(), &rsa.fingerprint()]);
        let signed: Signed = rsa.sign("ossicle enrol device", &h, &salt);
        let mut payload = vec![5, 2];
        for number in [request, index, count] {
            varint(number.into(), &mut payload);
        }
        payload.extend(id);
        for bytes in [name.as_bytes(), &rsa.modulus, &signed.signature] {
            varint(u64::try_from(bytes.len()).expect("short"), &mut payload);
            payload.extend(bytes);
        }
        let given = Fields::new()
            .hex("exporter", key.exporter)
            .hex("enroller_id", CLIENT_ID)
            .hex("device_id", id)
            .with("device_name", name)
            .with("device_key", rsa.name)
            .hex("pss_salt", salt)
            .with("request", request)
            .with("index", index)
            .with("count", count);
        let gives = Fields::new()
            .hex("h", h)
            .hex("statement", &signed.message)
            .hex("digest", signed.digest)
            .hex("signature", &signed.signature)
            .hex("payload", payload);
        Fields::new().with("name", name).with("about", about).with("given", given).with("gives", gives)
    };
    head("Devices enrolled by the client of the handshake \"key\", on that connection", &["6.4", "7.4"]).with(
        "cases",
        vec![
            case("sensor-01", "alone; PROTOCOL 15.1", 4, (0, 1), DEVICE_ID, &keys.bob),
            case("Zoë-01", "the last of a batch of 300", 1_000, (299, 300), [0xb1; 16], &keys.carol),
        ],
    )
}
