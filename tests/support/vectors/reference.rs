//! The primitives of PROTOCOL 1.3 under their names there, and nothing of the engine but its cipher, which Wycheproof's
//! cases test. What builds on them computes the protocol a second time.

use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use ed25519_dalek::Signer;
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use ossicle_core::{Aead, RustCrypto};
use sha2::{Digest, Sha256};

use super::json::Fields;

/// The bytes of all parts.
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// H.
pub fn hash(parts: &[&[u8]]) -> [u8; 32] {
    Sha256::digest(join(parts)).into()
}

/// HMAC.
pub fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut state = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("any length");
    state.update(&join(parts));
    state.finalize().into_bytes().into()
}

/// Extract.
pub fn extract(salt: &[u8], input: &[u8]) -> [u8; 32] {
    Hkdf::<Sha256>::extract(Some(salt), input).0.into()
}

/// Expand.
pub fn expand<const N: usize>(prk: &[u8; 32], info: &[&[u8]]) -> [u8; N] {
    let mut output = [0; N];
    Hkdf::<Sha256>::from_prk(prk).expect("32 bytes").expand(&join(info), &mut output).expect("short");
    output
}

/// The public half of an X25519 key.
pub fn exchange_public(private: &[u8; 32]) -> [u8; 32] {
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(*private)).to_bytes()
}

/// X25519.
pub fn x25519(private: &[u8; 32], public: &[u8; 32]) -> [u8; 32] {
    x25519_dalek::StaticSecret::from(*private).diffie_hellman(&x25519_dalek::PublicKey::from(*public)).to_bytes()
}

/// The public half of an Ed25519 key.
pub fn signing_public(seed: &[u8; 32]) -> [u8; 32] {
    ed25519_dalek::SigningKey::from_bytes(seed).verifying_key().to_bytes()
}

/// Ed25519.
pub fn ed25519(seed: &[u8; 32], message: &[u8]) -> [u8; 64] {
    ed25519_dalek::SigningKey::from_bytes(seed).sign(message).to_bytes()
}

/// AEAD: ciphertext and tag.
pub fn aead(key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], text: &[u8]) -> Vec<u8> {
    let mut sealed = text.to_vec();
    let tag = RustCrypto::new(key).seal(nonce, aad, &mut sealed).expect("short");
    sealed.extend(tag);
    sealed
}

/// CRC-32 (ISO-HDLC), bit by bit.
pub fn crc32(parts: &[&[u8]]) -> u32 {
    let mut register = u32::MAX;
    for byte in join(parts) {
        register ^= u32::from(byte);
        for _ in 0..8 {
            register = if register & 1 == 1 { register >> 1 ^ 0xedb8_8320 } else { register >> 1 };
        }
    }
    !register
}

/// An array of the bytes of a vector.
pub fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("bytes of this length")
}

/// An RSA identity key of PROTOCOL 1.5.
pub struct Rsa {
    /// Its name in the vector files.
    pub name: &'static str,
    /// The modulus.
    pub modulus: Vec<u8>,
    /// The private exponent.
    pub d: Vec<u8>,
    /// A prime.
    pub p: Vec<u8>,
    /// The other prime.
    pub q: Vec<u8>,
}

/// A statement and its signature.
pub struct Signed {
    /// What PSS signs.
    pub message: Vec<u8>,
    /// Its SHA-256.
    pub digest: [u8; 32],
    /// The salt of PSS.
    pub salt: [u8; 32],
    /// The signature.
    pub signature: Vec<u8>,
}

impl Rsa {
    /// One of the fixed keys.
    pub fn new(name: &'static str, key: &ossicle::crypto::IdentityKey) -> Self {
        let parts = key.components().expect("a fixed key is a key");
        let (d, p, q) = (parts.d.to_vec(), parts.p.to_vec(), parts.q.to_vec());
        Self { name, modulus: key.modulus().to_vec(), d, p, q }
    }

    /// SPKI: a constant head by length, the modulus, a constant tail.
    pub fn spki(&self) -> Vec<u8> {
        let head = match self.modulus.len() {
            256 => "30820122300d06092a864886f70d01010105000382010f003082010a0282010100",
            384 => "308201a2300d06092a864886f70d01010105000382018f003082018a0282018100",
            512 => "30820222300d06092a864886f70d01010105000382020f003082020a0282020100",
            other => panic!("a modulus of {other} bytes"),
        };
        join(&[&hex::decode(head).expect("digits"), &self.modulus, &[2, 3, 1, 0, 1]])
    }

    /// H(SPKI).
    pub fn fingerprint(&self) -> [u8; 32] {
        hash(&[&self.spki()])
    }

    /// RSA(key, context, h), RFC 8017 with this salt.
    pub fn sign(&self, context: &str, h: &[u8; 32], salt: &[u8; 32]) -> Signed {
        let message = join(&[&[0x20; 64], context.as_bytes(), &[0], h]);
        let digest = hash(&[&message]);
        // EMSA-PSS-ENCODE; the modulus has all its bits, so that one bit on the left stays free.
        let len = self.modulus.len();
        let masked_hash = hash(&[&[0; 8], &digest, salt]);
        let mut block = vec![0; len - 33];
        block[len - 66] = 1;
        block[len - 65..].copy_from_slice(salt);
        for (i, chunk) in (0_u32..).zip(block.chunks_mut(32)) {
            let mask = hash(&[&masked_hash, &i.to_be_bytes()]);
            chunk.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
        }
        block[0] &= 0x7f;
        let encoded = join(&[&block, &masked_hash, &[0xbc]]);
        Signed { message, digest, salt: *salt, signature: self.private(&encoded) }
    }

    fn private(&self, message: &[u8]) -> Vec<u8> {
        let bits = u32::try_from(8 * self.modulus.len()).expect("a short key");
        let number = |bytes: &[u8]| BoxedUint::from_be_slice(bytes, bits).expect("no longer than the modulus");
        let params = BoxedMontyParams::new_vartime(Odd::new(number(&self.modulus)).expect("a modulus is odd"));
        BoxedMontyForm::new(number(message), &params).pow(&number(&self.d)).retrieve().to_be_bytes().into_vec()
    }
}

impl Signed {
    /// The fields of a statement, each name followed by `_` and this.
    pub fn fields(&self, of: &str) -> Fields {
        Fields::new()
            .hex(&format!("statement_{of}"), &self.message)
            .hex(&format!("digest_{of}"), self.digest)
            .hex(&format!("sig_{of}"), &self.signature)
    }
}

/// What HPKE in mode Auth makes (RFC 9180, 4 and 5), with the values between.
pub struct Hpke {
    /// The encapsulated key.
    pub enc: [u8; 32],
    /// The secret of the KEM.
    pub shared_secret: [u8; 32],
    /// The key of the AEAD.
    pub key: [u8; 32],
    /// Its nonce.
    pub nonce: [u8; 12],
    /// Ciphertext and tag.
    pub sealed: Vec<u8>,
}

const KEM_ID: &[u8] = b"KEM\0\x20";
const SUITE_ID: &[u8] = b"HPKE\0\x20\0\x01\0\x02";

fn labeled_extract(suite: &[u8], salt: &[u8], label: &str, input: &[u8]) -> [u8; 32] {
    extract(salt, &join(&[b"HPKE-v1", suite, label.as_bytes(), input]))
}

fn labeled_expand<const N: usize>(suite: &[u8], prk: &[u8; 32], label: &str, info: &[u8]) -> [u8; N] {
    let len = u16::try_from(N).expect("short");
    expand(prk, &[&len.to_be_bytes(), b"HPKE-v1", suite, label.as_bytes(), info])
}

/// DeriveKeyPair of the KEM: the private half.
pub fn hpke_derive(seed: &[u8; 32]) -> [u8; 32] {
    labeled_expand(KEM_ID, &labeled_extract(KEM_ID, b"", "dkp_prk", seed), "sk", b"")
}

/// Seals `text` to `recipient` from `sender`, both halves as named, with an empty AAD.
pub fn hpke_seal(ephemeral: &[u8; 32], sender: &[u8; 32], recipient: &[u8; 32], info: &[u8], text: &[u8]) -> Hpke {
    let enc = exchange_public(ephemeral);
    let dh = join(&[&x25519(ephemeral, recipient), &x25519(sender, recipient)]);
    let context = join(&[&enc, recipient, &exchange_public(sender)]);
    let prk = labeled_extract(KEM_ID, b"", "eae_prk", &dh);
    let shared_secret = labeled_expand(KEM_ID, &prk, "shared_secret", &context);
    let psk_id = labeled_extract(SUITE_ID, b"", "psk_id_hash", b"");
    let info = labeled_extract(SUITE_ID, b"", "info_hash", info);
    let schedule = join(&[&[2], &psk_id, &info]);
    let secret = labeled_extract(SUITE_ID, &shared_secret, "secret", b"");
    let key = labeled_expand(SUITE_ID, &secret, "key", &schedule);
    let nonce = labeled_expand(SUITE_ID, &secret, "base_nonce", &schedule);
    Hpke { enc, shared_secret, key, nonce, sealed: aead(&key, &nonce, b"", text) }
}
