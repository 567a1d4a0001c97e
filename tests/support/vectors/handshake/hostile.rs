//! What ends a connection, state by state: records that are wrong in one thing only, sealed as they must be where somebody
//! who holds the keys could have sent them.

use super::*;

/// For comparison: what is right goes on.
const GOES_ON: &str = "goes on";
const ENDS: &str = "ends";
const ANOTHER_SERVER: &str = "another server";

/// Records that come in one state.
struct State {
    name: &'static str,
    file: &'static str,
    case: &'static str,
    rows: Vec<Fields>,
}

impl State {
    const fn new(name: &'static str, file: &'static str, case: &'static str) -> Self {
        Self { name, file, case, rows: Vec::new() }
    }

    fn then(mut self, why: &str, result: &str, record: Vec<u8>) -> Self {
        self.rows.push(Fields::new().with("why", why).hex("record", record).with("result", result));
        self
    }

    fn right(self, record: Vec<u8>) -> Self {
        self.then("nothing: the record as it must be", GOES_ON, record)
    }

    fn ends(self, why: &str, record: Vec<u8>) -> Self {
        self.then(why, ENDS, record)
    }

    fn fields(self) -> Fields {
        Fields::new()
            .with("state", self.name)
            .with("handshake", Fields::new().with("file", self.file).with("name", self.case))
            .with("records", self.rows)
    }
}

/// Bytes with others in their place.
fn with(bytes: &[u8], at: usize, others: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + others.len()].copy_from_slice(others);
    bytes
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    with(bytes, at, &[bytes[at] ^ 1])
}

/// The points that X25519 makes zero of: the neutral element, the other small orders, and spellings of them beyond the
/// prime.
fn small_points() -> Vec<[u8; 32]> {
    [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ]
    .into_iter()
    .map(|digits| array(&hex::decode(digits).expect("digits")))
    .collect()
}

pub(super) fn file(keys: &Keys, key: &Finished, enroll: &Finished, resumed: &Finished) -> Fields {
    let states = vec![
        server_wait_hello(key),
        server_wait_auth(key),
        server_wait_auth_enroll(enroll),
        server_wait_auth_resumed(resumed),
        client_wait_hello(key),
        client_wait_hello_offered(resumed),
        client_wait_auth(keys, key),
        client_wait_auth_asked(keys, enroll),
        client_wait_auth_resumed(resumed),
        client_wait_settings(key),
        connected(key, "server"),
        connected(key, "client"),
    ];
    head("Records that end the connection, by the state in which they come", &["2.4", "3", "4.4", "4.5"])
        .with("cases", states.into_iter().map(State::fields).collect::<Vec<_>>())
}

fn server_wait_hello(key: &Finished) -> State {
    let hello = &key.said.client_hello;
    let body = &hello[8..];
    let record = |body: &[u8]| clear(CLIENT_HELLO, body);
    let (front, ending) = (&body[6..], &body[..body.len() - 2]);
    let mut state = State::new("server, WAIT HELLO", "handshake.json", "key")
        .right(hello.clone())
        .ends("version 2.0 in the header", with(hello, 0, &[2]))
        .ends("ServerHello", with(hello, 2, &[1, 0x10]))
        .ends("HelloRetry", clear(HELLO_RETRY, &[16, 1, 7]))
        .ends("a type that there is not", with(hello, 2, &[1, 1]))
        .ends("a length below the header's", with(hello, 4, &[0, 7]))
        .ends("longer than 256 bytes", clear(CLIENT_HELLO, &join(&[body, &[0; 200]])))
        .ends("sqn 1", with(hello, 6, &[0, 1]))
        .ends("a byte too few", record(&body[..body.len() - 1]))
        .ends("a byte too many", record(&join(&[body, &[0]])))
        .ends("nothing behind the header", record(&[]))
        .ends("no version", record(&join(&[&[0], &body[3..]])))
        .ends("five versions", record(&join(&[&[5, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0], &body[3..]])))
        .ends("no version that there is", record(&join(&[&[1, 2, 0], &body[3..]])))
        .ends("no suite", record(&join(&[&[1, 1, 0, 0], front])))
        .ends("five suites", record(&join(&[&[1, 1, 0, 5, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5], front])))
        .ends("no suite that there is", record(&join(&[&[1, 1, 0, 1, 0, 2], front])))
        .ends("record limit 1,023", record(&with(body, 6, &[3, 0xff])))
        .ends("role server", record(&with(body, 8, &[1])))
        .ends("a role that there is not", record(&with(body, 8, &[2])))
        .ends("a flag that there is not", record(&with(body, 9, &[2])))
        .ends("a cookie of 41 bytes", record(&join(&[ending, &[41], &[7; 41], &[9; 8], &[0]])))
        .ends("a cookie without a puzzle", record(&join(&[ending, &[4], &[7; 4], &[0]])))
        .ends("an offer that is neither 0 nor 1", record(&join(&[ending, &[0, 2]])))
        .ends("an offer without a binder", record(&join(&[ending, &[0, 1], &[0xa1; 16]])));
    for point in small_points() {
        state = state.ends("E_C of small order", record(&with(body, 42, &point)));
    }
    state
}

/// What may be changed on any sealed record.
fn spoilt(state: State, record: &[u8]) -> State {
    let last = record.len() - 1;
    state
        .right(record.to_vec())
        .ends("a changed header", with(record, 1, &[1]))
        .ends(
            "sqn of the next record",
            with(record, 6, &(u16::from_be_bytes([record[6], record[7]]) + 1).to_be_bytes()),
        )
        .ends("a changed ciphertext", flipped(record, 8))
        .ends("a changed tag", flipped(record, last))
        .ends("shorter than a header and a tag", with(&record[..23], 4, &[0, 23]))
}

fn server_wait_auth(key: &Finished) -> State {
    let HandshakeKeys { key: k, iv, .. } = &key.said.client_keys;
    let payload = &key.said.client_auth;
    let auth = |payload: &[u8]| sealed(CLIENT_AUTH, k, iv, 0, payload);
    let HandshakeKeys { key: k_s, iv: iv_s, .. } = &key.said.server_keys;
    let state = State::new("server, WAIT AUTH", "handshake.json", "key")
        .ends("ClientHello again", key.said.client_hello.clone())
        .ends("an application record", sealed(APPLICATION, k, iv, 0, payload))
        .ends("ServerAuth, under the right key", sealed(SERVER_AUTH, k, iv, 0, payload))
        .ends("sealed with the server's key", sealed(CLIENT_AUTH, k_s, iv_s, 0, payload))
        .ends("sealed as the second record", sealed(CLIENT_AUTH, k, iv, 1, payload))
        .ends("sealed as the second record, sqn 0", with(&sealed(CLIENT_AUTH, k, iv, 1, payload), 6, &[0, 0]))
        .ends("longer than 1,536 bytes", auth(&[0; 1_513]))
        .ends("no kind", auth(&[]))
        .ends("kind 0", auth(&with(payload, 0, &[0])))
        .ends("kind 3", auth(&with(payload, 0, &[3])))
        .ends("cut before fin_C", auth(&payload[..54]));
    spoilt(state, &auth(payload))
        .then("another id, and so another fin_C", "unauthorised", auth(&flipped(payload, 1)))
        .then("another key epoch", "unauthorised", auth(&flipped(payload, 20)))
        .then("a capability that was not signed", "unauthorised", auth(&flipped(payload, 22)))
        .then("another sig_C", "unauthorised", auth(&flipped(payload, 23)))
        .then("another fin_C", "unauthorised", auth(&flipped(payload, payload.len() - 1)))
}

fn server_wait_auth_enroll(enroll: &Finished) -> State {
    let HandshakeKeys { key: k, iv, .. } = &enroll.said.client_keys;
    let payload = &enroll.said.client_auth;
    let auth = |payload: &[u8]| sealed(CLIENT_AUTH, k, iv, 0, payload);
    // kind 1, id 16, n 1, name 9, SPKI 294.
    let (named, behind) = (17, &payload[27..]);
    let name = |len: u8, name: &[u8]| auth(&join(&[&payload[..named], &[len], name, behind]));
    let spki = 27;
    let end = payload.len() - 1;
    State::new("server, WAIT AUTH", "handshake.json", "enroll with a token, refused")
        .right(auth(payload))
        .ends("an empty name", name(0, b""))
        .ends("a name of 65 bytes", name(65, &[0x61; 65]))
        .ends("a name that is not UTF-8", name(3, b"a\xffb"))
        .ends("a name longer than the record", name(255, b"abc"))
        .ends("an SPKI that begins in another way", auth(&with(payload, spki, &[0x31])))
        .ends("an SPKI of another algorithm", auth(&flipped(payload, spki + 16)))
        .ends("an SPKI longer than the record", auth(&with(payload, spki + 2, &[0x7f])))
        .ends("a modulus whose highest bit is not set", auth(&with(payload, spki + 33, &[0x7f])))
        .ends("an even modulus", auth(&flipped(payload, spki + 288)))
        .ends("exponent 3", auth(&with(payload, spki + 289, &[2, 3, 0, 0, 3])))
        .ends("another id, and so another fin_C", auth(&flipped(payload, 1)))
        .ends("another token proof, and so another fin_C", auth(&flipped(payload, spki + 294 + 10)))
        .ends("another fin_C", auth(&flipped(payload, end)))
        .ends("a byte behind fin_C", auth(&join(&[payload, &[0]])))
}

fn server_wait_auth_resumed(resumed: &Finished) -> State {
    let HandshakeKeys { key: k, iv, .. } = &resumed.said.client_keys;
    let payload = &resumed.said.client_auth;
    let auth = |payload: &[u8]| sealed(CLIENT_AUTH, k, iv, 0, payload);
    let state = State::new("server, WAIT AUTH", "resumption.json", "accepted")
        .ends("other caps, and so another fin_C", auth(&flipped(payload, 1)))
        .ends("another fin_C", auth(&flipped(payload, 33)))
        .ends("a byte too few", auth(&payload[..33]))
        .ends("a byte too many", auth(&join(&[payload, &[0]])))
        .ends("fin_S, sent back", auth(&join(&[&[0, 0], &resumed.said.server_auth])));
    spoilt(state, &auth(payload))
}

fn hellos(state: State, hello: &[u8]) -> State {
    let body = &hello[8..];
    let record = |body: &[u8]| clear(SERVER_HELLO, body);
    let mut state = state
        .right(hello.to_vec())
        .ends("another version in the header", with(hello, 0, &[2]))
        .ends("ClientHello", with(hello, 2, &[1, 0]))
        .ends("sqn 1", with(hello, 6, &[0, 1]))
        .ends("a byte too few", record(&body[..70]))
        .ends("a byte too many", record(&join(&[body, &[0]])))
        .ends("a mode that there is not", record(&with(body, 0, &[3])))
        .ends("a version that was not offered", record(&with(body, 1, &[1, 1])))
        .ends("a suite that was not offered", record(&with(body, 3, &[0, 2])))
        .ends("record limit 1,023", record(&with(body, 5, &[3, 0xff])));
    for point in small_points() {
        state = state.ends("E_S of small order", record(&with(body, 39, &point)));
    }
    state
}

fn client_wait_hello(key: &Finished) -> State {
    let hello = &key.said.server_hello;
    hellos(State::new("client, WAIT HELLO", "handshake.json", "key"), hello)
        .ends("mode 1, and nothing was offered", with(hello, 8, &[1]))
        .ends("mode 2, and nothing was offered", with(hello, 8, &[2]))
        .ends("its own ClientHello, sent back", key.said.client_hello.clone())
}

fn client_wait_hello_offered(resumed: &Finished) -> State {
    let hello = &resumed.said.server_hello;
    hellos(State::new("client, WAIT HELLO", "resumption.json", "accepted"), hello)
        .ends("mode 0, and a channel was offered", with(hello, 8, &[0]))
}

fn client_wait_auth(keys: &Keys, key: &Finished) -> State {
    let HandshakeKeys { key: k, iv, mac: m, .. } = &key.said.server_keys;
    let payload = &key.said.server_auth;
    let auth = |payload: &[u8]| sealed(SERVER_AUTH, k, iv, 0, payload);
    let end = payload.len() - 1;
    // Whoever answers in the place of the server has the keys of the connection and another RSA key.
    let signed_by = |rsa: &Rsa, pinned: [u8; 32]| {
        let t3 = hash(&[&key.said.t2(), &SERVER_ID, &pinned]);
        let signature = rsa.sign("ossicle HS1 server auth", &t3, &random("another server")).signature;
        let fin = mac(m, &[&hash(&[&t3, &signature])]);
        auth(&join(&[&SERVER_ID, &signature, &fin]))
    };
    let fin_of = |signature: &[u8]| {
        let fin = mac(m, &[&hash(&[&key.said.t3, signature])]);
        auth(&join(&[&SERVER_ID, signature, &fin]))
    };
    let signature = &payload[16..end - 31];
    let state = State::new("client, WAIT AUTH", "handshake.json", "key")
        .ends("ServerHello again", key.said.server_hello.clone())
        .ends("HelloRetry, too late", clear(HELLO_RETRY, &[16, 1, 7]))
        .ends("a Refusal", sealed(REFUSAL, k, iv, 0, &refusal(3, 0)))
        .ends("an application record", sealed(APPLICATION, k, iv, 0, payload))
        .ends("sealed as the second record", sealed(SERVER_AUTH, k, iv, 1, payload))
        .ends("nothing inside", auth(&[]))
        .ends("cut before fin_S", auth(&payload[..40]));
    spoilt(state, &auth(payload))
        .then("another fin_S", ANOTHER_SERVER, auth(&flipped(payload, end)))
        .then("another server id", ANOTHER_SERVER, auth(&flipped(payload, 0)))
        .then("another sig_S", ANOTHER_SERVER, auth(&flipped(payload, 16)))
        .then("another server, as it is", ANOTHER_SERVER, signed_by(&keys.carol, keys.carol.fingerprint()))
        .then(
            "another server with fin_S of the pinned key",
            ANOTHER_SERVER,
            signed_by(&keys.carol, keys.server.fingerprint()),
        )
        .then("another sig_S with the fin_S that belongs to it", ANOTHER_SERVER, fin_of(&flipped(signature, 100)))
        .then("a shorter sig_S with the fin_S that belongs to it", ANOTHER_SERVER, fin_of(&signature[1..]))
        .then(
            "a sig_S of another length with the fin_S that belongs to it",
            ANOTHER_SERVER,
            fin_of(&join(&[signature, &[0]])),
        )
}

fn client_wait_auth_asked(keys: &Keys, enroll: &Finished) -> State {
    let HandshakeKeys { key: k, iv, mac: m, .. } = &enroll.said.server_keys;
    let payload = &enroll.said.server_auth;
    let auth = |payload: &[u8]| sealed(SERVER_AUTH, k, iv, 0, payload);
    let spki = 16;
    let other = {
        let t3 = hash(&[&enroll.said.t2(), &SERVER_ID, &keys.carol.fingerprint()]);
        let signature = keys.carol.sign("ossicle HS1 server auth", &t3, &random("another server")).signature;
        let fin = mac(m, &[&hash(&[&t3, &signature])]);
        auth(&join(&[&SERVER_ID, &keys.carol.spki(), &signature, &fin]))
    };
    State::new("client, WAIT AUTH", "handshake.json", "enroll with a token, refused")
        .right(auth(payload))
        .ends("without the key that was asked for", auth(&join(&[&payload[..16], &payload[16 + 294..]])))
        .ends("an SPKI that begins in another way", auth(&with(payload, spki, &[0x31])))
        .ends("an SPKI longer than the record", auth(&with(payload, spki + 2, &[0x7f])))
        .ends("a modulus whose highest bit is not set", auth(&with(payload, spki + 33, &[0x7f])))
        .ends("an even modulus", auth(&flipped(payload, spki + 288)))
        .ends("exponent 3", auth(&with(payload, spki + 289, &[2, 3, 0, 0, 3])))
        .then("another modulus", ANOTHER_SERVER, auth(&flipped(payload, spki + 100)))
        .then("another server, with its key, its signature and its fin_S", ANOTHER_SERVER, other)
}

fn client_wait_auth_resumed(resumed: &Finished) -> State {
    let HandshakeKeys { key: k, iv, .. } = &resumed.said.server_keys;
    let payload = &resumed.said.server_auth;
    let auth = |payload: &[u8]| sealed(SERVER_AUTH, k, iv, 0, payload);
    let state = State::new("client, WAIT AUTH", "resumption.json", "accepted")
        .ends("another fin_S", auth(&flipped(payload, 0)))
        .ends("a byte too few", auth(&payload[..31]))
        .ends("a byte too many", auth(&join(&[payload, &[0]])));
    spoilt(state, &auth(payload))
}

fn client_wait_settings(key: &Finished) -> State {
    let mut first = Traffic::new(key.server.secret);
    let (k, iv) = (first.key, first.iv);
    let HandshakeKeys { key: k_s, iv: iv_s, .. } = &key.said.server_keys;
    let payload = settings([0; 16], 0);
    let good = first.seal(&payload);
    let under = |payload: &[u8]| sealed(APPLICATION, &k, &iv, 0, payload);
    let state = State::new("client, WAIT SETTINGS", "handshake.json", "key")
        .ends("another message", under(&[4, 0, 1]))
        .ends("Close", under(&[8, 0x21, 0]))
        .ends("no message", under(&[]))
        .ends("Settings, cut", under(&payload[..payload.len() - 1]))
        .ends("Settings and a byte", under(&join(&[&payload, &[0]])))
        .ends("Settings as the second record", sealed(APPLICATION, &k, &iv, 1, &payload))
        .ends("Settings under the handshake key", sealed(APPLICATION, k_s, iv_s, 1, &payload))
        .ends("Settings under the client's key", sealed(APPLICATION, &key.client.key, &key.client.iv, 0, &payload))
        .ends("a Refusal with counter 0", sealed(REFUSAL, k_s, iv_s, 0, &refusal(3, 0)))
        .ends("a Refusal under the traffic key", sealed(REFUSAL, &k, &iv, 1, &refusal(3, 0)))
        .ends("ServerAuth again", sealed(SERVER_AUTH, k_s, iv_s, 0, &key.said.server_auth));
    spoilt(state, &good)
}

/// `to` takes the records; the other one could have sent them, and its next has the number that is expected.
fn connected(key: &Finished, to: &'static str) -> State {
    let (own, other) = if to == "server" { (&key.server, &key.client) } else { (&key.client, &key.server) };
    // Settings was the server's first record.
    let next = if to == "client" { 1 } else { 0 };
    let Traffic { key: k, iv, .. } = other;
    let record = |counter: u64, payload: &[u8]| sealed(APPLICATION, k, iv, counter, payload);
    let status: &[u8] = &[4, 0, 7];
    let updated: [u8; 32] = expand(&other.secret, &[b"ossicle upd"]);
    let updated = Traffic::new(updated);
    let name = if to == "server" { "server, CONNECTED" } else { "client, CONNECTED" };
    let mut state = State::new(name, "handshake.json", "key")
        .ends("one record too early", record(next + 1, status))
        .ends(
            "sealed for the next counter, sqn of this one",
            with(&record(next + 1, status), 6, &record(next, status)[6..8]),
        )
        .ends("65,536 records too early, with the right sqn", record(next + 65_536, status))
        .ends("sealed with its own key: a reflection", sealed(APPLICATION, &own.key, &own.iv, next, status))
        .ends("under the next key, without a KeyUpdate", sealed(APPLICATION, &updated.key, &updated.iv, next, status))
        .ends("longer than its record limit", record(next, &vec![0; usize::from(LIMIT) - 24 + 1]))
        .ends("ClientHello", key.said.client_hello.clone())
        .ends("a Refusal", sealed(REFUSAL, k, iv, next, &refusal(3, 0)))
        .ends("a type that there is not", sealed(0x0301, k, iv, next, status))
        .ends("KeyUpdate with a body", record(next, &[8, 0x22, 0]))
        .ends("Close with a reason that there is not", record(next, &[8, 0x21, 1, 21]));
    if to == "client" {
        state = state.ends("the record before, again", record(0, &settings([0; 16], 0)));
    }
    spoilt(state, &record(next, status))
}
