//! Sealing and opening records in place: one key, one counter and one direction each (PROTOCOL 2).
//!
//! A record's nonce is the key's IV XOR its 64-bit counter, its header is the additional data, and the header's sequence
//! number must be the low 16 bits of exactly the next counter. Whatever fails here ends the connection.

use crate::crypto::{Aead, HASH_LEN, NONCE_LEN, Secret, TAG_LEN, expand};
use crate::error::{BufferError, Error, PeerError};
use crate::wire::{HEADER_LEN, Header, RECORD_OVERHEAD, RecordType};

/// Records that one key may seal, the last of them the key update.
pub(crate) const MAX_RECORDS: u64 = 1 << 20;

/// One direction's key with its counter.
pub(crate) struct RecordKey<A> {
    aead: A,
    iv: [u8; NONCE_LEN],
    counter: u64,
}

impl<A: Aead> RecordKey<A> {
    pub(crate) fn new(key: &[u8; HASH_LEN], iv: [u8; NONCE_LEN], counter: u64) -> Self {
        Self { aead: A::new(key), iv, counter }
    }

    /// Records sealed or opened so far.
    pub(crate) const fn counter(&self) -> u64 {
        self.counter
    }

    /// Seals the `len` bytes that stand behind the room for a header, and returns the length of the whole record.
    pub(crate) fn seal(&mut self, kind: RecordType, out: &mut [u8], len: usize) -> Result<usize, Error> {
        if self.counter >= MAX_RECORDS {
            return Err(PeerError::Exhausted.into());
        }
        let total = len.saturating_add(RECORD_OVERHEAD);
        let Ok(wire_len) = u16::try_from(total) else {
            return Err(BufferError::MessageTooLong { max: usize::from(u16::MAX) - RECORD_OVERHEAD }.into());
        };
        let record = out.get_mut(..total).ok_or(BufferError::TxFull)?;
        let (head, rest) = record.split_at_mut_checked(HEADER_LEN).ok_or(BufferError::TxFull)?;
        let (payload, tag) = rest.split_at_mut_checked(len).ok_or(BufferError::TxFull)?;
        let header = Header { kind, len: wire_len, sequence: low(self.counter) }.encode();
        head.copy_from_slice(&header);
        tag.copy_from_slice(&self.aead.seal(&self.nonce(), &header, payload)?);
        self.counter += 1;
        Ok(total)
    }

    /// Whether this is the sequence number that must come next.
    pub(crate) const fn expects(&self, sequence: u16) -> bool {
        low(self.counter) == sequence
    }

    /// Opens a whole record, header included, and returns its payload.
    pub(crate) fn open<'d>(&mut self, record: &'d mut [u8]) -> Result<&'d mut [u8], Error> {
        if self.counter >= MAX_RECORDS {
            return Err(PeerError::Exhausted.into());
        }
        let (header, rest) = record.split_first_chunk_mut::<HEADER_LEN>().ok_or(Error::Decode)?;
        let (payload, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(Error::Decode)?;
        self.aead.open(&self.nonce(), header, payload, tag)?;
        self.counter += 1;
        Ok(payload)
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        for (to, from) in nonce.iter_mut().rev().zip(self.counter.to_be_bytes().iter().rev()) {
            *to ^= from;
        }
        nonce
    }
}

/// The low 16 bits of a counter.
#[allow(clippy::as_conversions, reason = "truncation is the point")]
const fn low(counter: u64) -> u16 {
    counter as u16
}

/// One direction of an established connection: its traffic secret and the key made from it.
pub(crate) struct Traffic<A> {
    secret: Secret<HASH_LEN>,
    pub(crate) key: RecordKey<A>,
}

impl<A: Aead> Traffic<A> {
    pub(crate) fn new(secret: Secret<HASH_LEN>) -> Self {
        let material = expand::<{ HASH_LEN + NONCE_LEN }>(&secret, &[b"ossicle key"]);
        let (mut key, mut iv) = ([0; HASH_LEN], [0; NONCE_LEN]);
        let (key_part, iv_part) = material.expose().split_at(HASH_LEN);
        key.copy_from_slice(key_part);
        iv.copy_from_slice(iv_part);
        let record_key = RecordKey::new(&key, iv, 0);
        zeroize::Zeroize::zeroize(&mut key);
        Self { secret, key: record_key }
    }

    /// Replaces the key by the next one. The old secret is erased.
    pub(crate) fn update(&mut self) {
        *self = Self::new(expand(&self.secret, &[b"ossicle upd"]));
    }
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::RustCrypto;

    fn traffic() -> Traffic<RustCrypto> {
        Traffic::new(Secret::new([7; 32]))
    }

    fn sealed(traffic: &mut Traffic<RustCrypto>, payload: &[u8]) -> std::vec::Vec<u8> {
        let mut out = std::vec![0; payload.len() + RECORD_OVERHEAD];
        out[HEADER_LEN..HEADER_LEN + payload.len()].copy_from_slice(payload);
        let len = traffic.key.seal(RecordType::Application, &mut out, payload.len()).unwrap();
        assert_eq!(len, out.len());
        out
    }

    #[test]
    fn records_open_in_order_and_across_an_update() {
        let (mut here, mut there) = (traffic(), traffic());
        for round in 0..3 {
            for text in [&b"one"[..], b"", b"three"] {
                let mut record = sealed(&mut here, text);
                assert_eq!(there.key.open(&mut record).unwrap(), text, "round {round}");
            }
            here.update();
            there.update();
        }
    }

    #[test]
    fn the_counter_stops_before_it_could_repeat() {
        let mut here = traffic();
        here.key.counter = MAX_RECORDS - 1;
        sealed(&mut here, b"last");
        assert_eq!(here.key.seal(RecordType::Application, &mut [0; 64], 4), Err(PeerError::Exhausted.into()));
        assert_eq!(here.key.open(&mut [0; 64]), Err(PeerError::Exhausted.into()));
    }

    #[test]
    fn a_failed_opening_leaves_no_plaintext_and_no_step() {
        let (mut here, mut there) = (traffic(), traffic());
        let good = sealed(&mut here, b"secret text");
        for bit in 0..good.len() * 8 {
            let mut record = good.clone();
            record[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(there.key.open(&mut record), Err(Error::Crypto), "bit {bit}");
            assert!(!record.windows(6).any(|window| window == b"secret"));
        }
        assert_eq!(there.key.counter(), 0);
    }

    #[test]
    fn a_record_is_at_most_as_long_as_its_header_can_say() {
        let mut here = traffic();
        let max = usize::from(u16::MAX) - RECORD_OVERHEAD;
        let mut out = std::vec![0; usize::from(u16::MAX) + 8];
        let too_long = Err(BufferError::MessageTooLong { max }.into());
        for len in [max + 1, max + 8, usize::MAX] {
            assert_eq!(here.key.seal(RecordType::Application, &mut out, len), too_long, "{len}");
        }
        assert_eq!(here.key.counter(), 0);
        assert_eq!(here.key.seal(RecordType::Application, &mut out, max), Ok(u16::MAX.into()));
        assert_eq!(traffic().key.open(&mut out[..usize::from(u16::MAX)]).map(|payload| payload.len()), Ok(max));
        // Shorter than an empty one.
        for len in 0..RECORD_OVERHEAD {
            assert_eq!(here.key.open(&mut std::vec![0; len]), Err(Error::Decode), "{len}");
        }
    }

    #[test]
    fn the_sequence_number_is_the_low_half_of_the_counter() {
        let mut here = traffic();
        for (counter, sequence) in [(0, 0), (1, 1), (0xffff, 0xffff), (0x1_0000, 0), (0x1_0002, 2)] {
            here.key.counter = counter;
            assert!(
                here.key.expects(sequence) && !here.key.expects(sequence ^ 1) && !here.key.expects(sequence ^ 0x100)
            );
            let record = sealed(&mut here, b"");
            assert_eq!(record[6..8], sequence.to_be_bytes());
            // The nonce is made of all of the counter: the same sequence number again is another record.
            let mut later = traffic();
            later.key.counter = counter ^ 0x2_0000;
            assert_eq!(later.key.open(&mut record.clone()), Err(Error::Crypto));
            later.key.counter = counter;
            assert_eq!(later.key.open(&mut record.clone()).map(|payload| payload.len()), Ok(0));
            assert_eq!((here.key.counter(), later.key.counter()), (counter + 1, counter + 1));
        }
    }
}
