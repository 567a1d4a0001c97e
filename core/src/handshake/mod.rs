//! HS1, the handshake: in which order what is said, what enters the transcript, which keys come of it (PROTOCOL 4).
//!
//! ```text
//!     client                                              server
//!     -> ClientHello        versions, suites, random, E_C, offer
//!     <- ServerHello        mode, version, suite, random, E_S
//!     <- {ServerAuth}       server id, [SPKI], signature, finished
//!     -> {ClientAuth}       kind, identity, signature, finished
//!     <- {Settings}         or {Refusal}
//! ```
//!
//! States are private structs named for what they wait for; each step returns the next one, which replaces it. They own no
//! buffer, and nothing of a claim: what must be signed or verified is asked for. Braces mean sealed. With a channel that
//! both sides still have the middle three carry MACs instead of signatures: `resume`. A server under load may first ask
//! for work: `retry`.

pub(crate) mod client;
pub(crate) mod resume;
pub(crate) mod retry;
pub(crate) mod server;

use crate::config::Channel;
use crate::crypto::{Aead, ExchangeKey, HASH_LEN, NONCE_LEN, PublicKey, Secret, Statement, expand, extract, hash, mac};
use crate::error::Error;
use crate::record::{RecordKey, Traffic};
use crate::wire::{CAPABILITIES, ID_LEN, KIND_ENROLL, KIND_KEY, KIND_PASSWORD, Login, Method, Settings};

const SERVER_CONTEXT: &str = "ossicle HS1 server auth";
const CLIENT_CONTEXT: &str = "ossicle HS1 client auth";

/// The running transcript hash, one value a step: `T' = H(T || bytes)`.
type Transcript = [u8; HASH_LEN];

/// `T0`. The prologue is empty over TCP.
fn beginning() -> Transcript {
    hash(&[b"ossicle HS1", &[0]])
}

/// What a connection's 64 random bytes become: its ephemeral key and its random.
fn ephemeral(seed: &Secret<64>) -> (ExchangeKey, [u8; HASH_LEN]) {
    let (mut secret, mut random) = ([0; HASH_LEN], [0; HASH_LEN]);
    for (to, from) in secret.iter_mut().chain(&mut random).zip(seed.expose()) {
        *to = *from;
    }
    let key = ExchangeKey::new(Secret::new(secret));
    zeroize::Zeroize::zeroize(&mut secret);
    (key, random)
}

/// Who is at the two ends of a connection, once both have proved it: what a channel is bound to.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    client: [u8; ID_LEN],
    client_key: [u8; HASH_LEN],
    key_epoch: u32,
    server: [u8; ID_LEN],
    server_key: [u8; HASH_LEN],
}

impl Ends {
    /// The channel that a finished handshake between them issues.
    pub(crate) const fn channel(&self, id: [u8; ID_LEN], secret: Secret<HASH_LEN>) -> Channel {
        let Self { client, client_key, key_epoch, server, server_key } = *self;
        Channel { id, secret, client, client_key, key_epoch, server, server_key }
    }
}

/// A handshake between the ends that are named has reached `T6`; its channel secret comes with it.
pub(crate) struct Issue {
    pub(crate) ends: Ends,
    pub(crate) secret: Secret<HASH_LEN>,
    pub(crate) resumed: bool,
}

impl Issue {
    /// The channel, if these settings issue one.
    pub(crate) fn channel(self, settings: &Settings) -> Option<Channel> {
        (settings.valid_for > 0).then(|| self.ends.channel(settings.channel, self.secret))
    }
}

/// The input secret of one handshake and all that is expanded from it.
#[derive(Clone)]
struct Schedule {
    input: Secret<HASH_LEN>,
    /// The labels of the handshake keys differ, so that neither kind of handshake can pass for the other.
    resumed: bool,
}

impl Schedule {
    /// `ES = HKDF-Extract(salt of a full handshake, dh)`; an all-zero agreement is refused.
    fn full(key: &ExchangeKey, peer: &[u8; HASH_LEN]) -> Result<Self, Error> {
        let salt = hash(&[b"ossicle HS1 x25519 sha256 aes256gcm pss"]);
        Ok(Self { input: extract(&salt, &key.agree(peer)?), resumed: false })
    }

    /// `ES = HKDF-Extract(salt = E(CS, "ch salt", 32), dh)`.
    fn resumed(channel: &Channel, key: &ExchangeKey, peer: &[u8; HASH_LEN]) -> Result<Self, Error> {
        let salt: Secret<HASH_LEN> = expand(&channel.secret, &[b"ossicle ch salt", &[0]]);
        Ok(Self { input: extract(salt.expose(), &key.agree(peer)?), resumed: true })
    }

    /// `X(label, T, N)`.
    fn expand<const N: usize>(&self, label: &str, transcript: &Transcript) -> Secret<N> {
        expand(&self.input, &[b"ossicle ", label.as_bytes(), &[0], transcript])
    }

    /// The server's handshake keys from `T2`: the record key at this counter, and the key of its Finished.
    fn server<A: Aead>(&self, t2: &Transcript, counter: u64) -> (RecordKey<A>, Secret<HASH_LEN>) {
        self.side(if self.resumed { "r s hs" } else { "s hs" }, t2, counter)
    }

    /// The client's, which seal one record only.
    fn client<A: Aead>(&self, t2: &Transcript) -> (RecordKey<A>, Secret<HASH_LEN>) {
        self.side(if self.resumed { "r c hs" } else { "c hs" }, t2, 0)
    }

    fn side<A: Aead>(&self, label: &str, t2: &Transcript, counter: u64) -> (RecordKey<A>, Secret<HASH_LEN>) {
        let material = self.expand::<{ HASH_LEN + NONCE_LEN + HASH_LEN }>(label, t2);
        let (mut key, mut iv, mut finished) = ([0; HASH_LEN], [0; NONCE_LEN], [0; HASH_LEN]);
        let targets = key.iter_mut().chain(&mut iv).chain(&mut finished);
        for (to, from) in targets.zip(material.expose()) {
            *to = *from;
        }
        let record_key = RecordKey::new(&key, iv, counter);
        zeroize::Zeroize::zeroize(&mut key);
        (record_key, Secret::new(finished))
    }

    /// Everything that outlives the handshake, from `T6`.
    fn finish<A: Aead>(&self, t6: &Transcript, ends: Ends) -> Finished<A> {
        Finished {
            client: Traffic::new(self.expand("c ap", t6)),
            server: Traffic::new(self.expand("s ap", t6)),
            exporter: self.expand("exp", t6),
            issue: Issue { ends, secret: self.expand("channel", t6), resumed: self.resumed },
        }
    }
}

/// What a finished handshake leaves: proof that both sides hold the same transcript.
pub(crate) struct Finished<A> {
    /// Client to server.
    pub(crate) client: Traffic<A>,
    /// Server to client.
    pub(crate) server: Traffic<A>,
    /// Binds statements of the application to this connection.
    pub(crate) exporter: Secret<HASH_LEN>,
    /// What the channel is made of that the server may issue.
    pub(crate) issue: Issue,
}

/// `T3 = H(T2 || server_id || H(SPKI_S))`.
fn server_identified(t2: &Transcript, id: &[u8; 16], fingerprint: &[u8; HASH_LEN]) -> Transcript {
    hash(&[t2, id, fingerprint])
}

/// `T5 = H(T4 || kind || fields)`.
fn client_identified(t4: &Transcript, method: &Method<'_>, fingerprint: &[u8; HASH_LEN], caps: u16) -> Transcript {
    let caps = caps.to_be_bytes();
    match method {
        Method::Key { id, key_epoch } => hash(&[t4, &[KIND_KEY], id, fingerprint, &key_epoch.to_be_bytes(), &caps]),
        Method::Enroll { id, name, key, token, .. } => {
            let name_len = [u8::try_from(name.len()).unwrap_or(u8::MAX)];
            let mut buffer = [0; crate::crypto::MAX_SPKI_LEN];
            let spki = key.spki(&mut buffer);
            hash(&[t4, &[KIND_ENROLL], id, &name_len, name.as_bytes(), spki, token, &caps])
        }
    }
}

/// `T5` of the method `password`, apart from the others: devices do not carry it.
fn login_identified(t4: &Transcript, login: &Login<'_>, caps: u16) -> Transcript {
    let Login { id, name, key, password } = login;
    let name_len = [u8::try_from(name.len()).unwrap_or(u8::MAX)];
    let mut buffer = [0; crate::crypto::MAX_SPKI_LEN];
    let (len, password, padding) = password.padded();
    hash(&[
        t4,
        &[KIND_PASSWORD],
        id,
        &name_len,
        name.as_bytes(),
        key.spki(&mut buffer),
        &caps.to_be_bytes(),
        &[len],
        password,
        padding,
    ])
}

/// What the client's Finished covers behind `T5`: the token's proof, where there is one, and the signature.
fn client_signed(t5: &Transcript, method: &Method<'_>, signature: &[u8]) -> Transcript {
    match method {
        Method::Key { .. } => hash(&[t5, signature]),
        Method::Enroll { proof, .. } => hash(&[t5, proof, signature]),
    }
}

/// `T6`.
fn client_finished(t5: &Transcript, method: &Method<'_>, signature: &[u8], finished: &[u8; HASH_LEN]) -> Transcript {
    match method {
        Method::Key { .. } => hash(&[t5, signature, finished]),
        Method::Enroll { proof, .. } => hash(&[t5, proof, signature, finished]),
    }
}

/// The key under which a token is proved: `E(token, "enrol token", 32)`. This is all that a server keeps of a token.
pub fn token_verifier(secret: &Secret<16>) -> Secret<HASH_LEN> {
    // HKDF-Expand takes its key through HMAC, which pads it with zeros to a block: 16 bytes are as good as 32 here.
    let mut key = Secret::new([0; HASH_LEN]);
    let mut padded = *key.expose();
    for (to, from) in padded.iter_mut().zip(secret.expose()) {
        *to = *from;
    }
    key = Secret::new(padded);
    zeroize::Zeroize::zeroize(&mut padded);
    expand(&key, &[b"ossicle ", b"enrol token", &[0]])
}

fn token_proof(verifier: &[u8; HASH_LEN], t5: &Transcript) -> [u8; HASH_LEN] {
    mac(verifier, &[t5])
}

/// What an enrolled client and its server sign of a handshake.
const fn server_statement(t3: Transcript) -> Statement {
    Statement::new(SERVER_CONTEXT, t3)
}

const fn client_statement(t5: Transcript) -> Statement {
    Statement::new(CLIENT_CONTEXT, t5)
}

/// What a new key signs when a connected client enrols it: the proof that whoever asks holds it (PROTOCOL 6.4). Bound to
/// the enroller's connection, so that it is of no use anywhere else.
pub fn enrolment_statement(
    exporter: &Secret<HASH_LEN>,
    enroller: &[u8; 16],
    id: &[u8; 16],
    name: &str,
    key: PublicKey<'_>,
) -> Statement {
    let name_len = [u8::try_from(name.len()).unwrap_or(u8::MAX)];
    let fields = hash(&[exporter.expose(), enroller, id, &name_len, name.as_bytes(), &key.fingerprint()]);
    Statement::new("ossicle enrol device", fields)
}

const CLIENT_CAPABILITIES: u16 = CAPABILITIES;

#[cfg(test)]
mod tests;
