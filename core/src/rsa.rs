//! RSA in software: what answers the engine's question for a signature, or for the verdict on one, on devices.
//!
//! A stored private key and a [`Statement`] come in, a signature goes out; or a public key and a signature, and a verdict.
//! RSASSA-PSS with SHA-256 and a salt of 32 bytes, and nothing else: there is no encryption and no decryption here. Signing
//! is always blinded, and the result is checked before it leaves, so that a fault gives no key away. The numbers live on
//! the heap for the length of a call; this is the only file that names `rsa` and `alloc`.

extern crate alloc;

use alloc::vec;

use rand_core::TryCryptoRng;
use rsa::traits::SignatureScheme;
use rsa::{BoxedUint, Pss, RsaPrivateKey, RsaPublicKey};
use sha2::Sha256;

use crate::crypto::{MAX_RSA_LEN, PublicKey, Statement};
use crate::error::{ApiMisuse, BufferError, Error};

const EXPONENT: u32 = 65_537;

/// An RSA private key as it is stored: big-endian numbers, borrowed from the identity page.
///
/// The key itself is made for each signature and dropped after it: 3.2 KB that a device needs once a week otherwise lie
/// about all the time. The crate underneath erases the key, but not every number on the way to it: the arena belongs to
/// nobody else.
#[derive(Clone, Copy)]
pub struct RsaKey<'k> {
    d: &'k [u8],
    p: &'k [u8],
    q: &'k [u8],
}

impl<'k> RsaKey<'k> {
    /// Takes the private exponent `d`, at most as long as the modulus, and the primes `p` and `q`, each of half its length.
    /// The public exponent is 65537. Whether the numbers belong together is seen when they are used.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] unless the lengths are those of a modulus of 2048, 3072 or 4096 bits.
    pub fn new(d: &'k [u8], p: &'k [u8], q: &'k [u8]) -> Result<Self, Error> {
        let half = p.len();
        if !matches!(half, 128 | 192 | 256) || q.len() != half || d.len() > 2 * half {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        Ok(Self { d, p, q })
    }

    /// Bytes of the modulus, and of a signature.
    pub const fn signature_len(&self) -> usize {
        2 * self.p.len()
    }

    /// Computes the modulus into `buffer` and returns the public key that lies there.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] if the primes do not make a modulus of full length.
    pub fn public<'b>(&self, buffer: &'b mut [u8; MAX_RSA_LEN]) -> Result<PublicKey<'b>, Error> {
        let modulus = self.modulus()?.to_be_bytes();
        let place = buffer.get_mut(..modulus.len()).ok_or(ApiMisuse::InvalidArgument)?;
        place.copy_from_slice(&modulus);
        PublicKey::from_modulus(place)
    }

    /// Signs `statement` into `out` and returns the length of the signature. `rng` gives salt and blinding.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` is shorter than [`RsaKey::signature_len`]; [`Error::Crypto`] if the numbers are no
    /// key, `rng` fails, or the computation was disturbed.
    pub fn sign<R: TryCryptoRng + ?Sized>(
        &self,
        statement: &Statement,
        rng: &mut R,
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let len = self.signature_len();
        let out = out.get_mut(..len).ok_or(BufferError::TxFull)?;
        let key = self.load()?;
        // The generator given here is what switches the blinding on: without one, this crate would sign unblinded.
        let signature =
            Pss::<Sha256>::new_blinded().sign(Some(rng), &key, &statement.digest()).map_err(|_| Error::Crypto)?;
        drop(key);
        if signature.len() != len {
            return Err(Error::Crypto);
        }
        out.copy_from_slice(&signature);
        Ok(len)
    }

    fn load(&self) -> Result<RsaPrivateKey, Error> {
        let modulus = self.modulus()?;
        let d = number(self.d, self.signature_len())?;
        let primes = vec![number(self.p, self.p.len())?, number(self.q, self.q.len())?];
        RsaPrivateKey::from_components(modulus, BoxedUint::from(EXPONENT), d, primes).map_err(|_| Error::Crypto)
    }

    fn modulus(&self) -> Result<BoxedUint, Error> {
        // Wide enough for the product, so that the multiplication that wraps does not.
        let p = number(self.p, self.signature_len())?;
        Ok(p.wrapping_mul(number(self.q, self.q.len())?))
    }
}

/// Verifies that the owner of `key` signed `statement`.
///
/// # Errors
/// [`Error::Crypto`] if he did not.
pub fn verify(key: PublicKey<'_>, statement: &Statement, signature: &[u8]) -> Result<(), Error> {
    if signature.len() != key.signature_len() {
        return Err(Error::Crypto);
    }
    let modulus = number(key.modulus(), key.modulus().len())?;
    let key = RsaPublicKey::new(modulus, BoxedUint::from(EXPONENT)).map_err(|_| Error::Crypto)?;
    key.verify(Pss::<Sha256>::new(), &statement.digest(), signature).map_err(|_| Error::Crypto)
}

/// A big-endian number in `len` bytes of memory.
fn number(bytes: &[u8], len: usize) -> Result<BoxedUint, Error> {
    let bits = u32::try_from(len.saturating_mul(8)).map_err(|_| Error::Crypto)?;
    BoxedUint::from_be_slice(bytes, bits).map_err(|_| Error::Crypto)
}
