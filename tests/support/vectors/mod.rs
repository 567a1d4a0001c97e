//! The test vectors in `tests/vectors/`: made here from PROTOCOL.md alone, by a second writing of its formulas over the
//! primitives, so that what the engine is compared with (in `vectors.rs`) does not come from the engine.
//!
//! All inputs are fixed: keys, randomness, salts of RSA-PSS. The files hold them, too.

pub mod json;
pub mod reference;

mod catalogue;
mod endtoend;
mod handshake;

use json::Fields;
use reference::{Rsa, hash};

use crate::keys;

/// Every file: its name and its text.
pub fn files() -> Vec<(&'static str, String)> {
    let keys = Keys::new();
    let mut files = vec![("keys.json", keys.file())];
    files.extend(handshake::files(&keys));
    files.extend(endtoend::files(&keys));
    files.extend(catalogue::files(&keys));
    files.into_iter().map(|(name, fields)| (name, fields.file())).collect()
}

/// The head of a file: what it is about and the sections of PROTOCOL.md that say so.
fn head(about: &str, sections: &[&str]) -> Fields {
    Fields::new().with("protocol", "1.0").with("about", about).with("sections", sections.to_vec())
}

/// Salt of RSA-PSS, or other random bytes, of which nothing but the name is special.
fn random(name: &str) -> [u8; 32] {
    hash(&[b"ossicle test vector", name.as_bytes()])
}

/// A seed of 64 bytes, as chapter 15 has them.
fn seed(number: u8) -> [u8; 64] {
    crate::seed(number)
}

struct Keys {
    alice: Rsa,
    bob: Rsa,
    carol: Rsa,
    server: Rsa,
    server3072: Rsa,
    server4096: Rsa,
}

impl Keys {
    fn new() -> Self {
        Self {
            alice: Rsa::new("alice", &keys::alice()),
            bob: Rsa::new("bob", &keys::bob()),
            carol: Rsa::new("carol", &keys::carol()),
            server: Rsa::new("server", &keys::server()),
            server3072: Rsa::new("server3072", &keys::server3072()),
            server4096: Rsa::new("server4096", &keys::server4096()),
        }
    }

    fn file(&self) -> Fields {
        let all = [&self.alice, &self.bob, &self.carol, &self.server, &self.server3072, &self.server4096];
        let key = |key: &Rsa| {
            let statement = key.sign("ossicle bundle", &random("statement"), &random(key.name));
            Fields::new()
                .with("name", key.name)
                .with("bits", u32::try_from(8 * key.modulus.len()).expect("few"))
                .hex("modulus", &key.modulus)
                .hex("d", &key.d)
                .hex("p", &key.p)
                .hex("q", &key.q)
                .hex("SPKI", key.spki())
                .hex("H(SPKI)", key.fingerprint())
                .with("context", "ossicle bundle")
                .hex("h", random("statement"))
                .hex("pss_salt", statement.salt)
                .hex("statement", statement.message)
                .hex("digest", statement.digest)
                .hex("signature", statement.signature)
        };
        head("RSA keys, and a statement signed by each", &["1.3", "1.5"])
            .with("cases", all.into_iter().map(key).collect::<Vec<_>>())
    }
}
