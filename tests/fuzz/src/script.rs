//! An input read as a script, and scripts written as inputs.

use std::convert::Infallible;

use ossicle_core::fuzzing::danger_stub_crypto;
use rand_core::{TryCryptoRng, TryRng};

/// Takes operands off the front of an input; `None` is the end of the script.
pub struct Script<'d>(&'d [u8]);

impl<'d> Script<'d> {
    /// The whole input.
    pub const fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    /// One byte.
    pub fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Two bytes, big endian.
    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    /// Bytes behind a length of two bytes; what is cut short ends where the input does.
    pub fn long(&mut self) -> Option<&'d [u8]> {
        let len = usize::from(self.u16()?).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(taken)
    }

    /// Everything that is left.
    pub const fn rest(&self) -> &'d [u8] {
        self.0
    }
}

/// Bytes behind a length of two bytes, as [`Script::long`] reads them.
pub fn long(bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).expect("an operand is short");
    [&len.to_be_bytes(), bytes].concat()
}

/// The stub in the place of cryptography, as long as it lives.
pub struct Stub(());

impl Stub {
    /// Puts the stub in place, or takes care that it is not.
    pub fn set(on: bool) -> Self {
        danger_stub_crypto(on);
        Self(())
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        danger_stub_crypto(false);
    }
}

/// Bytes that are different for each number and the same in each run.
pub fn seed(number: u8) -> [u8; 64] {
    let mut seed = [number.wrapping_mul(31); 64];
    for (byte, index) in seed.iter_mut().zip(0..) {
        *byte = byte.wrapping_add(index);
    }
    seed
}

/// A generator that repeats itself.
pub struct Rng {
    number: u8,
    counter: u32,
}

impl Rng {
    /// The generator of this number.
    pub const fn new(number: u8) -> Self {
        Self { number, counter: 0 }
    }
}

impl TryRng for Rng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Infallible> {
        for byte in target {
            // Not for secrets: cheap, and the same under the stub.
            self.counter = self.counter.wrapping_mul(1_664_525).wrapping_add(1_013_904_223 ^ u32::from(self.number));
            *byte = self.counter.to_be_bytes()[0];
        }
        Ok(())
    }
}

impl TryCryptoRng for Rng {}
