//! What the tests of this room share: a generator that repeats itself, and clients with keys.

use core::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};

use super::bundle::{Bundle, BundleKeys, Prekey};
use crate::crypto::hash;
use crate::wire::Member;

/// SHA-256 in counter mode: the same bytes for the same seed, every time.
pub(crate) struct TestRng {
    seed: u64,
    counter: u64,
}

impl TestRng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { seed, counter: 0 }
    }
}

impl TryRng for TestRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Infallible> {
        for chunk in target.chunks_mut(32) {
            let block = hash(&[&self.seed.to_be_bytes(), &self.counter.to_be_bytes()]);
            self.counter += 1;
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
        Ok(())
    }
}

impl TryCryptoRng for TestRng {}

/// A source that has failed.
pub(crate) struct BrokenRng;

impl TryRng for BrokenRng {
    type Error = core::fmt::Error;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        Err(core::fmt::Error)
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        Err(core::fmt::Error)
    }

    fn try_fill_bytes(&mut self, _: &mut [u8]) -> Result<(), Self::Error> {
        Err(core::fmt::Error)
    }
}

impl TryCryptoRng for BrokenRng {}

pub(crate) struct Client {
    pub(crate) member: Member,
    pub(crate) keys: BundleKeys,
    pub(crate) bundle: Bundle,
}

impl Client {
    pub(crate) fn new(id: u8) -> Self {
        let member = Member { id: [id; 16], key: hash(&[b"key of", &[id]]) };
        let keys = BundleKeys::generate(u32::from(id) * 100, &mut TestRng::new(id.into())).unwrap();
        let bundle = keys.bundle(&member, 3, [0; 32]);
        Self { member, keys, bundle }
    }

    pub(crate) fn prekey(&self) -> Prekey {
        self.keys.prekey(&self.bundle).unwrap()
    }
}

/// The bytes of a number in hexadecimal.
#[cfg(feature = "rsa")] // what is written so are keys and signatures
pub(crate) fn hex<const N: usize>(text: &str) -> [u8; N] {
    assert_eq!(text.len(), 2 * N);
    core::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
}
