//! The cryptography that the protocol is made of: one suite, wrapped so that no other room names a foreign crate.
//!
//! Bytes come in and bytes go out; labels and what is hashed are decided by the rooms above. RSA is not here: the engine
//! asks for it ([`Statement`] says over what), and `rsa.rs` answers on devices. Secrets are zeroized when dropped and
//! have no `Debug`.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, KeyInit};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use hpke::{Deserializable, OpModeR, OpModeS, Serializable};
use rand_core::{TryCryptoRng, TryRng};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::error::{ApiMisuse, Error};

#[cfg(fuzzing)]
pub(crate) mod stub;

/// Returns early with what the stub gives, in a fuzzer that asked for it. Nothing at all in any other build.
macro_rules! stubbed {
    ($stub:expr) => {
        #[cfg(fuzzing)]
        if stub::is_on() {
            return $stub;
        }
    };
}

/// Bytes of an AEAD tag. Always all sixteen (PROTOCOL 2).
pub const TAG_LEN: usize = 16;
/// Bytes of an AEAD nonce.
pub const NONCE_LEN: usize = 12;
/// Bytes of a SHA-256 digest, an X25519 or Ed25519 public key, and of every symmetric secret here.
pub const HASH_LEN: usize = 32;
/// Bytes of an Ed25519 signature.
pub const SIGNATURE_LEN: usize = 64;

/// SHA-256 over the concatenation of `parts`.
pub(crate) fn hash(parts: &[&[u8]]) -> [u8; HASH_LEN] {
    let mut state = Sha256::new();
    for part in parts {
        state.update(part);
    }
    state.finalize().into()
}

/// HMAC-SHA-256 under `key` over the concatenation of `parts`.
pub(crate) fn mac(key: &[u8; HASH_LEN], parts: &[&[u8]]) -> [u8; HASH_LEN] {
    stubbed!(stub::MAC);
    // HMAC pads a short key with zeros to a block (RFC 2104); doing it here leaves no error to handle.
    let mut block = Secret([0; 64]);
    for (to, from) in block.0.iter_mut().zip(key) {
        *to = *from;
    }
    let mut state = <Hmac<Sha256> as KeyInit>::new(block.expose().into());
    for part in parts {
        state.update(part);
    }
    state.finalize().into_bytes().into()
}

/// HKDF-Extract (RFC 5869) with SHA-256.
pub(crate) fn extract(salt: &[u8; HASH_LEN], input: &Secret<HASH_LEN>) -> Secret<HASH_LEN> {
    stubbed!(Secret([stub::SHARED; HASH_LEN]));
    let (prk, _) = Hkdf::<Sha256>::extract(Some(salt), input.expose());
    Secret(prk.into())
}

/// HKDF-Expand (RFC 5869) with SHA-256 over the concatenation of `info`. `N` is at most 255 * 32.
pub(crate) fn expand<const N: usize>(prk: &Secret<HASH_LEN>, info: &[&[u8]]) -> Secret<N> {
    const { assert!(N <= 255 * HASH_LEN, "HKDF cannot expand to so much") };
    stubbed!(Secret([stub::SHARED; N]));
    let mut output = Secret([0; N]);
    // Neither call can fail: the key is as long as the hash, and the length was checked at compile time.
    if let Ok(hkdf) = Hkdf::<Sha256>::from_prk(prk.expose()) {
        let expanded = hkdf.expand_multi_info(info, &mut output.0);
        debug_assert!(expanded.is_ok(), "the length was checked at compile time");
    }
    output
}

/// A seed for a deterministic generator, from fresh entropy and a secret that stays: where one can be guessed, the other
/// cannot (PROTOCOL 8.4).
pub fn generator_seed(entropy: &[u8], secret: &[u8]) -> Secret<HASH_LEN> {
    let entropy = Secret(hash(&[b"ossicle entropy\0", entropy]));
    Secret(mac(entropy.expose(), &[b"ossicle generator\0", secret]))
}

/// Compares in constant time.
pub(crate) fn equal(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

/// A secret of `N` bytes: erased when dropped, never printed, compared only in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret<const N: usize>([u8; N]);

impl<const N: usize> Secret<N> {
    /// Takes the bytes of a secret.
    pub const fn new(bytes: [u8; N]) -> Self {
        Self(bytes)
    }

    /// Fills a new secret from `rng`.
    ///
    /// # Errors
    /// Those of the generator.
    pub fn random<R: TryCryptoRng + ?Sized>(rng: &mut R) -> Result<Self, R::Error> {
        let mut secret = Self([0; N]);
        rng.try_fill_bytes(&mut secret.0)?;
        Ok(secret)
    }

    /// The bytes. The longer name is on purpose: it is easy to find in a review.
    pub const fn expose(&self) -> &[u8; N] {
        &self.0
    }
}

/// An authenticated cipher: AES-256-GCM with a tag of 16 bytes. The one type parameter of the engine.
///
/// [`RustCrypto`] is the default; hosts bring a faster one. Both must give the same bytes.
pub trait Aead: Sized {
    /// Expands a key.
    fn new(key: &[u8; HASH_LEN]) -> Self;

    /// Seals `data` in place and returns the tag.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the cipher refuses the length, which no record of this protocol reaches.
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], Error>;

    /// Opens `data` in place. The tag is checked first; on an error `data` holds no plaintext.
    ///
    /// # Errors
    /// [`Error::Crypto`] if anything at all is wrong.
    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), Error>;
}

/// The AES-256-GCM of the RustCrypto project: portable, without allocator, constant-time in software.
pub struct RustCrypto(aes_gcm::Aes256Gcm);

impl Aead for RustCrypto {
    fn new(key: &[u8; HASH_LEN]) -> Self {
        Self(<aes_gcm::Aes256Gcm as KeyInit>::new(key.into()))
    }

    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], Error> {
        stubbed!(Ok(stub::TAG));
        match self.0.encrypt_inout_detached(nonce.into(), aad, InOutBuf::from(data)) {
            Ok(tag) => Ok(tag.into()),
            Err(_) => Err(Error::Crypto),
        }
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), Error> {
        stubbed!(if *tag == stub::TAG { Ok(()) } else { Err(Error::Crypto) });
        match self.0.decrypt_inout_detached(nonce.into(), aad, InOutBuf::from(data), tag.into()) {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::Crypto),
        }
    }
}

/// An X25519 private key and its public half (RFC 7748).
#[derive(Clone)]
pub struct ExchangeKey {
    secret: Secret<HASH_LEN>,
    public: [u8; HASH_LEN],
}

impl ExchangeKey {
    /// The key pair of these 32 random bytes.
    pub fn new(secret: Secret<HASH_LEN>) -> Self {
        stubbed!(Self { public: secret.0, secret });
        let private = x25519_dalek::StaticSecret::from(*secret.expose());
        let public = x25519_dalek::PublicKey::from(&private).to_bytes();
        Self { secret, public }
    }

    /// The public half.
    pub const fn public(&self) -> &[u8; HASH_LEN] {
        &self.public
    }

    /// The private half, for whoever stores it.
    pub const fn secret(&self) -> &Secret<HASH_LEN> {
        &self.secret
    }

    /// The shared secret with `peer`; an all-zero result is refused (RFC 7748, 6.1).
    pub(crate) fn agree(&self, peer: &[u8; HASH_LEN]) -> Result<Secret<HASH_LEN>, Error> {
        stubbed!(if *peer == [0; HASH_LEN] { Err(Error::Crypto) } else { Ok(Secret([stub::SHARED; HASH_LEN])) });
        let private = x25519_dalek::StaticSecret::from(*self.secret.expose());
        let shared = private.diffie_hellman(&x25519_dalek::PublicKey::from(*peer));
        if shared.was_contributory() { Ok(Secret(*shared.as_bytes())) } else { Err(Error::Crypto) }
    }
}

/// An Ed25519 private key and its public half (RFC 8032).
#[derive(Clone)]
pub struct SigningKey {
    secret: Secret<HASH_LEN>,
    public: [u8; HASH_LEN],
}

impl SigningKey {
    /// The key pair of these 32 random bytes.
    pub fn new(secret: Secret<HASH_LEN>) -> Self {
        let public = verifying_key(&secret);
        Self { secret, public }
    }

    /// The public half.
    pub const fn public(&self) -> &[u8; HASH_LEN] {
        &self.public
    }

    /// The private half, for whoever stores it.
    pub const fn secret(&self) -> &Secret<HASH_LEN> {
        &self.secret
    }

    /// Signs `message`. Costs two scalar multiplications: the expanded key is not kept.
    pub(crate) fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        sign(&self.secret, message)
    }
}

/// The public half of an Ed25519 private key.
pub(crate) fn verifying_key(secret: &Secret<HASH_LEN>) -> [u8; HASH_LEN] {
    stubbed!(secret.0);
    ed25519_dalek::SigningKey::from_bytes(secret.expose()).verifying_key().to_bytes()
}

/// [`SigningKey::sign`], for who keeps the private half alone.
pub(crate) fn sign(secret: &Secret<HASH_LEN>, message: &[u8]) -> [u8; SIGNATURE_LEN] {
    use ed25519_dalek::ed25519::signature::Signer;
    stubbed!(stub::SIGNATURE);
    ed25519_dalek::SigningKey::from_bytes(secret.expose()).sign(message).to_bytes()
}

/// Verifies an Ed25519 signature strictly: no small-order keys, no malleable signatures.
pub(crate) fn verify(key: &[u8; HASH_LEN], message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> Result<(), Error> {
    stubbed!(if *signature == stub::SIGNATURE { Ok(()) } else { Err(Error::Crypto) });
    let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(key) else {
        return Err(Error::Crypto);
    };
    match key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(signature)) {
        Ok(()) => Ok(()),
        Err(_) => Err(Error::Crypto),
    }
}

type Kem = hpke::kem::X25519HkdfSha256;
type Kdf = hpke::kdf::HkdfSha256;
type HpkeAead = hpke::aead::AesGcm256;

/// HPKE seal in mode Auth (RFC 9180; DHKEM(X25519), HKDF-SHA256, AES-256-GCM), `text` in place, one message per context.
/// Returns the encapsulated key and the tag.
pub(crate) fn hpke_seal<R: TryCryptoRng + ?Sized>(
    sender: &ExchangeKey,
    recipient: &[u8; HASH_LEN],
    info: &[u8],
    text: &mut [u8],
    rng: &mut R,
) -> Result<([u8; HASH_LEN], [u8; TAG_LEN]), Error> {
    stubbed!(match Secret::<HASH_LEN>::random(rng) {
        Ok(_) => Ok((stub::ENCAPSULATED, stub::TAG)),
        Err(_) => Err(Error::Crypto),
    });
    let mode = OpModeS::<Kem>::Auth((hpke_private(sender.secret.expose())?, hpke_public(&sender.public)?));
    // HPKE takes an infallible generator and draws 32 bytes; they are drawn here so that a failing source is an error.
    let mut drawn = Drawn(Secret::random(rng).map_err(|_| Error::Crypto)?);
    let sealed = hpke::single_shot_seal_inout_detached_with_rng::<HpkeAead, Kdf, Kem>(
        &mode,
        &hpke_public(recipient)?,
        info,
        InOutBuf::from(text),
        &[],
        &mut drawn,
    );
    let (key, tag) = sealed.map_err(|_| Error::Crypto)?;
    let mut tag_bytes = [0; TAG_LEN];
    tag.write_exact(&mut tag_bytes);
    Ok((key.to_bytes().into(), tag_bytes))
}

/// HPKE open in mode Auth, `text` in place; the counterpart of [`hpke_seal`].
pub(crate) fn hpke_open(
    recipient: &ExchangeKey,
    sender: &[u8; HASH_LEN],
    info: &[u8],
    key: &[u8; HASH_LEN],
    text: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), Error> {
    stubbed!(if *tag == stub::TAG { Ok(()) } else { Err(Error::Crypto) });
    let mode = OpModeR::<Kem>::Auth(hpke_public(sender)?);
    let key = <Kem as hpke::Kem>::EncappedKey::from_bytes(key).map_err(|_| Error::Crypto)?;
    let tag = hpke::aead::AeadTag::<HpkeAead>::from_bytes(tag).map_err(|_| Error::Crypto)?;
    let private = hpke_private(recipient.secret.expose())?;
    hpke::single_shot_open_inout_detached::<HpkeAead, Kdf, Kem>(
        &mode,
        &private,
        &key,
        info,
        InOutBuf::from(text),
        &[],
        &tag,
    )
    .map_err(|_| Error::Crypto)
}

fn hpke_public(key: &[u8; HASH_LEN]) -> Result<<Kem as hpke::Kem>::PublicKey, Error> {
    <Kem as hpke::Kem>::PublicKey::from_bytes(key).map_err(|_| Error::Crypto)
}

fn hpke_private(key: &[u8; HASH_LEN]) -> Result<<Kem as hpke::Kem>::PrivateKey, Error> {
    <Kem as hpke::Kem>::PrivateKey::from_bytes(key).map_err(|_| Error::Crypto)
}

/// Hands out 32 bytes that were drawn beforehand, once; whatever else is asked for is derived from them, never repeated.
struct Drawn(Secret<HASH_LEN>);

impl TryRng for Drawn {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Self::Error> {
        for chunk in target.chunks_mut(HASH_LEN) {
            for (to, from) in chunk.iter_mut().zip(self.0.expose()) {
                *to = *from;
            }
            self.0 = Secret(hash(&[self.0.expose()]));
        }
        Ok(())
    }
}

impl TryCryptoRng for Drawn {}

/// What an RSA identity key signs: `0x20 * 64 || context || 0x00 || hash` (PROTOCOL 1.3), RSASSA-PSS with SHA-256, MGF1
/// with SHA-256 and a salt of 32 bytes. The engine asks for nothing else to be signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement {
    context: &'static str,
    hash: [u8; HASH_LEN],
}

impl Statement {
    /// The longest [`Statement::message`], in bytes.
    pub const MAX_LEN: usize = 128;

    pub(crate) const fn new(context: &'static str, hash: [u8; HASH_LEN]) -> Self {
        Self { context, hash }
    }

    /// The exact bytes to be signed, for a signer that hashes by itself. At most [`Statement::MAX_LEN`].
    pub fn message<'b>(&self, buffer: &'b mut [u8; Self::MAX_LEN]) -> &'b [u8] {
        let parts = [&[0x20; 64][..], self.context.as_bytes(), &[0], &self.hash];
        let bytes = parts.iter().flat_map(|part| part.iter());
        let mut len = 0;
        for (to, from) in buffer.iter_mut().zip(bytes) {
            *to = *from;
            len += 1;
        }
        buffer.get(..len).unwrap_or_default()
    }

    /// SHA-256 of [`Statement::message`], for a signer that takes a digest.
    pub fn digest(&self) -> [u8; HASH_LEN] {
        hash(&[&[0x20; 64], self.context.as_bytes(), &[0], &self.hash])
    }
}

/// Bytes of the longest RSA modulus or signature: 4096 bits.
pub const MAX_RSA_LEN: usize = 512;
/// Bytes of the longest DER SubjectPublicKeyInfo of an RSA key that this protocol accepts.
pub const MAX_SPKI_LEN: usize = SPKI_PREFIX_LEN + MAX_RSA_LEN + SPKI_SUFFIX.len();

const SPKI_PREFIX_LEN: usize = 33;
/// INTEGER 65537, the only accepted exponent.
const SPKI_SUFFIX: [u8; 5] = [0x02, 0x03, 0x01, 0x00, 0x01];

/// An RSA public key: a modulus of 2048, 3072 or 4096 bits with the exponent 65537, and nothing else.
///
/// Since only three lengths and one exponent exist, its DER SubjectPublicKeyInfo (RFC 5280, RFC 8017) is one of three
/// constant heads, the modulus and a constant tail; any other encoding is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey<'k> {
    modulus: &'k [u8],
}

impl<'k> PublicKey<'k> {
    /// Takes a big-endian modulus.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] unless it has exactly 2048, 3072 or 4096 bits and is odd.
    pub fn from_modulus(modulus: &'k [u8]) -> Result<Self, Error> {
        let odd = modulus.last().is_some_and(|last| last & 1 == 1);
        let full = modulus.first().is_some_and(|first| first & 0x80 != 0);
        if matches!(modulus.len(), 256 | 384 | 512) && odd && full {
            Ok(Self { modulus })
        } else {
            Err(ApiMisuse::InvalidArgument.into())
        }
    }

    /// Reads a DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`Error::Decode`] unless it is exactly what [`PublicKey::spki`] writes.
    pub fn from_spki(spki: &'k [u8]) -> Result<Self, Error> {
        let head_len = SPKI_PREFIX_LEN;
        let Some(modulus_len) = spki.len().checked_sub(head_len + SPKI_SUFFIX.len()) else {
            return Err(Error::Decode);
        };
        let (head, rest) = spki.split_at_checked(head_len).ok_or(Error::Decode)?;
        let (modulus, tail) = rest.split_at_checked(modulus_len).ok_or(Error::Decode)?;
        let key = Self::from_modulus(modulus).map_err(|_| Error::Decode)?;
        if head == key.spki_head() && tail == SPKI_SUFFIX { Ok(key) } else { Err(Error::Decode) }
    }

    /// The modulus, big endian.
    pub const fn modulus(&self) -> &'k [u8] {
        self.modulus
    }

    /// Bits of the modulus: 2048, 3072 or 4096.
    pub const fn bits(&self) -> usize {
        self.modulus.len() * 8
    }

    /// Bytes of a signature by this key.
    pub const fn signature_len(&self) -> usize {
        self.modulus.len()
    }

    /// Writes the DER SubjectPublicKeyInfo into `buffer` and returns it.
    pub fn spki<'b>(&self, buffer: &'b mut [u8; MAX_SPKI_LEN]) -> &'b [u8] {
        let head = self.spki_head();
        let bytes = head.iter().chain(self.modulus).chain(&SPKI_SUFFIX);
        let mut len = 0;
        for (to, from) in buffer.iter_mut().zip(bytes) {
            *to = *from;
            len += 1;
        }
        buffer.get(..len).unwrap_or_default()
    }

    /// SHA-256 of the SubjectPublicKeyInfo: the key's fingerprint, `H(SPKI)` throughout PROTOCOL (1.5).
    pub fn fingerprint(&self) -> [u8; HASH_LEN] {
        hash(&[&self.spki_head(), self.modulus, &SPKI_SUFFIX])
    }

    /// SEQUENCE { SEQUENCE { OID rsaEncryption, NULL }, BIT STRING { SEQUENCE { INTEGER modulus,
    const fn spki_head(&self) -> [u8; SPKI_PREFIX_LEN] {
        // The modulus with its leading zero, then what encloses it. All lengths take two bytes at these sizes.
        let [m1, m0] = high_low(self.modulus.len() + 1);
        let [k1, k0] = high_low(self.modulus.len() + 1 + 4 + 5);
        let [b1, b0] = high_low(self.modulus.len() + 1 + 4 + 5 + 4 + 1);
        let [s1, s0] = high_low(self.modulus.len() + 1 + 4 + 5 + 4 + 1 + 4 + 15);
        [
            0x30, 0x82, s1, s0, 0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05,
            0x00, 0x03, 0x82, b1, b0, 0x00, 0x30, 0x82, k1, k0, 0x02, 0x82, m1, m0, 0x00,
        ]
    }
}

/// A DER length below 65,536 in two bytes.
#[allow(clippy::as_conversions, reason = "both halves of a length of at most 554 are bytes; const fn has no From")]
const fn high_low(len: usize) -> [u8; 2] {
    [(len >> 8) as u8, (len & 0xff) as u8]
}

// An interpreter would take hours for the curves and RSA, and looks for what other tests reach as well.
#[cfg(all(test, not(miri)))]
mod wycheproof;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spki_lengths_are_those_of_der() {
        for (bits, len) in [(2048, 294), (3072, 422), (4096, 550)] {
            let mut modulus = [0x5a; MAX_RSA_LEN];
            modulus[0] = 0x80;
            modulus[bits / 8 - 1] = 1;
            let key = PublicKey::from_modulus(&modulus[..bits / 8]).unwrap();
            let mut buffer = [0; MAX_SPKI_LEN];
            let spki = key.spki(&mut buffer);
            assert_eq!(spki.len(), len);
            assert_eq!(PublicKey::from_spki(spki), Ok(key));
            assert_eq!(key.fingerprint(), hash(&[spki]));
        }
    }

    #[test]
    fn an_all_zero_agreement_is_refused() {
        let key = ExchangeKey::new(Secret::new([7; 32]));
        assert!(matches!(key.agree(&[0; 32]), Err(Error::Crypto)));
    }

    #[test]
    fn statements_are_padded_and_separated() {
        let statement = Statement::new("ossicle HS1 server auth", [9; 32]);
        let mut buffer = [0; Statement::MAX_LEN];
        let message = statement.message(&mut buffer);
        assert_eq!(message.len(), 64 + 23 + 1 + 32);
        assert_eq!(hash(&[message]), statement.digest());
    }
}
