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

use crate::crypto::{HASH_LEN, MAX_RSA_LEN, PublicKey, Statement};
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
    verify_digest(key, &statement.digest(), signature)
}

/// The same over the digest of what was signed.
pub(crate) fn verify_digest(key: PublicKey<'_>, digest: &[u8; HASH_LEN], signature: &[u8]) -> Result<(), Error> {
    if signature.len() != key.signature_len() {
        return Err(Error::Crypto);
    }
    let modulus = number(key.modulus(), key.modulus().len())?;
    let key = RsaPublicKey::new(modulus, BoxedUint::from(EXPONENT)).map_err(|_| Error::Crypto)?;
    key.verify(Pss::<Sha256>::new(), digest, signature).map_err(|_| Error::Crypto)
}

/// A big-endian number in `len` bytes of memory.
fn number(bytes: &[u8], len: usize) -> Result<BoxedUint, Error> {
    let bits = u32::try_from(len.saturating_mul(8)).map_err(|_| Error::Crypto)?;
    BoxedUint::from_be_slice(bytes, bits).map_err(|_| Error::Crypto)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::testing::{BrokenRng, TestRng, hex};

    /// A key for tests: everybody has it.
    struct DangerousKey {
        d: [u8; 256],
        p: [u8; 128],
        q: [u8; 128],
    }

    impl DangerousKey {
        fn new() -> Self {
            Self { d: hex(D), p: hex(P), q: hex(Q) }
        }

        fn key(&self) -> RsaKey<'_> {
            RsaKey::new(&self.d, &self.p, &self.q).unwrap()
        }
    }

    const D: &str = concat!(
        "01fb817316b66fd07f73ef0771ed92a91b3fb4259e714df0c6087b3afe0cb8187e8dcd1dfd464782ff7da04dd06db331015a",
        "a10f3815aaf085e3fe91575aca803f40fdae1f3bdf2efe61e92eb93846d663cc0fc43bcf12296d8b44efa8252a7a1c6c245c",
        "eb6b554edbb2129bad22cb00d026c3041b200bb7946aeca01835848917086871750f8d2ff517287cba511557fd2ecc870cbf",
        "653fcdcfe1c9fb09f0f57f5a9c6479422996b572afb6621ec28cfd6813510f8baf2f0a18ca53b4c877658b7ff93fc7922e04",
        "6baf57e42a4c492e4353bfae4492cd01fbb2fc2913411c80bef50ad75005d08a81ed753b201ef12d221cc3786050b8414b37",
        "0ab4a14af2e1",
    );
    const P: &str = concat!(
        "ff6ad76a5557fcb3793d54b4ad02056444674112955471039a7ab4aa961d293fec6a10b39a6d06b77f9064b89bdf9f096865",
        "6e6d2b0c1d02e0ca8f2550cfab3cfc4c30a5fd824876ba08561edbd5582f2ba49f1a389a9670ff0cb54fc79097d3cbf5bdbe",
        "dceeff34bffc092ecc711c03d5a5cb0af314c2142e66e8cf1784d691",
    );
    const Q: &str = concat!(
        "d1038bbed1ba1471c3f2cb6c9cccdeb4dcb4069f2aaae826d23b33256d771e240b0a94b85566c3506a91ad9c780d24d6fb1b",
        "7b0fc76f5fcf1b56a32252a9d5d156529ec04f34b11386598d6c1c70df71967b06200b14848f3b1b76aa2222f4b230a31295",
        "68b426f7b37ea9919791d8690d1d197a8cf2ea8c8801748509c2d925",
    );

    /// A bundle of 184 bytes of 7, as another implementation signed it, with the right salt and with one of 20 bytes.
    const SIGNED: &str = concat!(
        "b81c33cca64beebce64308bc8edbb122d100d7e56d4193053c697e65efab7a69f174724ec567388d4bc978b0fbd5dd24e73c",
        "e414fca6c63047c1bcf209d8945c602bd81cd3dc7f6bee2afd781a26d1a6d1757dcd77ad341b78e063dd36bfe9da93fd3f56",
        "bec4a8793f44381113862d95f40bc5100ae651046ddcf5806d1367a315575c7d3bfae65e601504521564b70bb00f57b2bf61",
        "d2064cd05397064a3d01b01b918fa2d7d6124aeecf57ab8b2308ad5bba6afcb0e65c6d7e78117544bc224e0734462d1488a1",
        "a2e4e3b22adbcb7e029da80863ba8f94a9bff49d5f02bfcf49ffa17bd7936e44f47645345f382b3281c7678c3843e391f944",
        "a6c255513541",
    );
    const SHORT_SALT: &str = concat!(
        "15c684558a3cfa3ab34a6088d6fdea529d2b0854785e47c60650a86107073f1ff09586b9d833985a42945446cb8c38d3dcf3",
        "477d45f21846334cbffc89e510d14f1385bdcb883cb01a1725de0172bb688dec73eda33c25cf08df1c46e949d442b3f7ab86",
        "42b11dd6799e6b184800a41b98845bd8242201be5a052572753e2e8e1b3556bd5b1761e9462280617ac0a1f352181c5bb96c",
        "b5710fa3f5204a6b66c2355eabce03ef34be17b41b7549a9222206360156e0251bd799bf48d25ffadce85aaedc4407d38b8d",
        "e4c128696f82e8fab18d14924b78e08890e616b30b7d3a9bd7b83361eef4b6847bdcd86b98139e25f661ba399f30d98fd4b1",
        "0f88edb1809c",
    );

    fn statement() -> Statement {
        crate::envelope::Bundle::decode(&[7; 184]).unwrap().statement()
    }

    #[test]
    fn signatures_verify_and_never_repeat() {
        let key = DangerousKey::new();
        let key = key.key();
        let mut modulus = [0; MAX_RSA_LEN];
        let public = key.public(&mut modulus).unwrap();
        assert_eq!(public.bits(), 2048);
        let (mut one, mut two) = ([0; 256], [0; 300]);
        let rng = &mut TestRng::new(1);
        assert_eq!(key.sign(&statement(), rng, &mut one), Ok(256));
        assert_eq!(key.sign(&statement(), rng, &mut two), Ok(256));
        assert_ne!(one, two[..256]);
        for signature in [&one, &two[..256]] {
            assert_eq!(verify(public, &statement(), signature), Ok(()));
        }
        let other = Statement::new("ossicle bundle", [1; 32]);
        assert_eq!(verify(public, &other, &one), Err(Error::Crypto));
        let other = Statement::new("ossicle HS1 client auth", [1; 32]);
        assert_eq!(verify(public, &other, &one), Err(Error::Crypto));
    }

    #[test]
    fn signatures_of_other_implementations_verify() {
        let key = DangerousKey::new();
        let mut modulus = [0; MAX_RSA_LEN];
        let public = key.key().public(&mut modulus).unwrap();
        let signature: [u8; 256] = hex(SIGNED);
        assert_eq!(verify(public, &statement(), &signature), Ok(()));
        assert_eq!(verify(public, &statement(), &hex::<256>(SHORT_SALT)), Err(Error::Crypto));
        for at in [0, 100, 255] {
            let mut other = signature;
            other[at] ^= 1;
            assert_eq!(verify(public, &statement(), &other), Err(Error::Crypto));
        }
        for other in
            [&signature[..255], &[&signature[..], &[0]].concat(), &[], &[0xff; 256], &[0; 256], public.modulus()]
        {
            assert_eq!(verify(public, &statement(), other), Err(Error::Crypto));
        }
        let mut changed = modulus;
        changed[9] ^= 1;
        let other = PublicKey::from_modulus(&changed[..256]).unwrap();
        assert_eq!(verify(other, &statement(), &signature), Err(Error::Crypto));
    }

    #[test]
    fn numbers_that_are_no_key_sign_nothing() {
        let good = DangerousKey::new();
        let mut out = [0; 256];
        for what in 0..5 {
            let mut key = DangerousKey::new();
            match what {
                0 => key.d[200] ^= 1,
                1 => key.p[60] ^= 1,
                2 => key.q[127] ^= 1,
                3 => (key.p, key.q) = ([0; 128], [0; 128]),
                _ => key.d = [0; 256],
            }
            assert_eq!(key.key().sign(&statement(), &mut TestRng::new(1), &mut out), Err(Error::Crypto), "{what}");
        }
        assert_eq!(good.key().sign(&statement(), &mut BrokenRng, &mut out), Err(Error::Crypto));
        let full = Err(BufferError::TxFull.into());
        assert_eq!(good.key().sign(&statement(), &mut TestRng::new(1), &mut out[..255]), full);
        assert_eq!(out, [0; 256]);
        let wrong = Err(Error::from(ApiMisuse::InvalidArgument));
        assert_eq!(RsaKey::new(&good.d, &good.p, &good.q[1..]).map(|_| ()), wrong);
        assert_eq!(RsaKey::new(&good.d, &good.p[1..], &good.q[1..]).map(|_| ()), wrong);
        assert_eq!(RsaKey::new(&[0; 257], &good.p, &good.q).map(|_| ()), wrong);
        let small = RsaKey::new(&[1], &[1; 128], &[1; 128]).unwrap();
        assert_eq!(small.public(&mut [0; MAX_RSA_LEN]).map(|_| ()), wrong);
    }
}
