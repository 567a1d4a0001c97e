//! HelloRetry: what a server under load asks of a client that it does not know, before it signs for it (PROTOCOL 4.11).
//!
//! ```text
//!     client                                              server
//!     -> ClientHello
//!     <- HelloRetry         bits, cookie                  keeps nothing; the connection ends
//!
//!     -> ClientHello        ..., cookie, puzzle           on a new connection: a transcript of its own
//!     <- ServerHello
//! ```
//!
//! Whoever answers in the server's place can send a HelloRetry: it is clear, and nothing vouches for it. So it ends the
//! connection on which it came and changes nothing else, the work is bounded, and it is done once for an attempt.

use super::ephemeral;
use crate::crypto::{HASH_LEN, Secret, equal, hash, mac};
use crate::error::{Error, PeerError};
use crate::wire::{HelloRetry, MAX_COOKIE_LEN, Work};

/// Zero bits of the hardest puzzle that a client solves: 262,144 hashes on average.
pub const MAX_PUZZLE_BITS: u8 = 18;
/// Bytes of a cookie that a [`CookieKey`] makes.
pub const COOKIE_LEN: usize = MAC_LEN + 1;
const MAC_LEN: usize = 16;
/// Hashes of one call: some milliseconds on a small device.
const TRIES: u32 = 256;

/// What a server under load wants to see solved: a cookie, and how many zero bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Puzzle {
    cookie: [u8; MAX_COOKIE_LEN],
    len: u8,
    bits: u8,
}

impl Puzzle {
    /// Takes what a server asked for. Whether this client does so much is said here and nowhere else.
    pub(super) fn new(asked: &HelloRetry<'_>) -> Result<Self, Error> {
        if asked.bits > MAX_PUZZLE_BITS {
            return Err(PeerError::Puzzle { bits: asked.bits }.into());
        }
        let mut cookie = [0; MAX_COOKIE_LEN];
        let place = cookie.get_mut(..asked.cookie.len()).ok_or(Error::Decode)?;
        place.copy_from_slice(asked.cookie);
        Ok(Self { cookie, len: u8::try_from(asked.cookie.len()).map_err(|_| Error::Decode)?, bits: asked.bits })
    }

    /// How hard it is: each bit doubles the hashes, which are 2 to the power of this on average.
    pub const fn bits(&self) -> u8 {
        self.bits
    }

    fn cookie(&self) -> &[u8] {
        self.cookie.get(..self.len.into()).unwrap_or_default()
    }
}

/// A puzzle that is being solved for one hello.
pub(super) struct Working {
    puzzle: Puzzle,
    /// What each try is hashed behind: the cookie, and what is fresh of the hello.
    prefix: [u8; HASH_LEN],
    /// The next try, or the solution.
    solution: u64,
    solved: bool,
}

impl Working {
    pub(super) fn new(puzzle: &Puzzle, seed: &Secret<64>) -> Self {
        let (key, random) = ephemeral(seed);
        let prefix = prefix(puzzle.cookie(), &random, key.public());
        Self { puzzle: *puzzle, prefix, solution: 0, solved: false }
    }

    /// Makes a bounded number of tries. Whether it is solved.
    #[inline(never)]
    pub(super) fn go_on(&mut self) -> bool {
        for _ in 0..TRIES {
            if self.solved {
                break;
            }
            self.solved = is_solved(&proof(&self.prefix, self.solution), self.puzzle.bits);
            self.solution = self.solution.wrapping_add(u64::from(!self.solved));
        }
        self.solved
    }

    pub(super) fn work(&self) -> Work<'_> {
        Work { cookie: self.puzzle.cookie(), solution: self.solution }
    }
}

/// `P = H("ossicle puzzle" || 00 || n || cookie || random_C || E_C)`.
fn prefix(cookie: &[u8], random: &[u8; HASH_LEN], exchange: &[u8; HASH_LEN]) -> [u8; HASH_LEN] {
    let len = [u8::try_from(cookie.len()).unwrap_or(u8::MAX)];
    hash(&[b"ossicle puzzle", &[0], &len, cookie, random, exchange])
}

/// `H(P || solution)`.
fn proof(prefix: &[u8; HASH_LEN], solution: u64) -> [u8; HASH_LEN] {
    hash(&[prefix, &solution.to_be_bytes()])
}

fn is_solved(proof: &[u8; HASH_LEN], bits: u8) -> bool {
    let [a, b, c, d, ..] = *proof;
    u32::from_be_bytes([a, b, c, d]).leading_zeros() >= u32::from(bits)
}

/// What a hello shows of the work that was done for it, for the server to judge: its cookie, and the hash that must begin
/// with zeros. Both are empty where there was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presented {
    cookie: [u8; MAX_COOKIE_LEN],
    len: u8,
    proof: [u8; HASH_LEN],
}

impl Presented {
    pub(super) fn new(work: Option<Work<'_>>, random: &[u8; HASH_LEN], exchange: &[u8; HASH_LEN]) -> Self {
        let Work { cookie: bytes, solution } = work.unwrap_or(Work { cookie: &[], solution: 0 });
        let mut cookie = [0; MAX_COOKIE_LEN];
        for (to, from) in cookie.iter_mut().zip(bytes) {
            *to = *from;
        }
        let len = u8::try_from(bytes.len()).unwrap_or_default();
        Self { cookie, len, proof: proof(&prefix(bytes, random, exchange), solution) }
    }

    /// The cookie as it came back. Empty: the client was not asked yet.
    pub fn cookie(&self) -> &[u8] {
        self.cookie.get(..self.len.into()).unwrap_or_default()
    }

    /// Whether the puzzle is solved with so many bits.
    pub fn is_solved(&self, bits: u8) -> bool {
        is_solved(&self.proof, bits)
    }

    /// Names the work: the same hello, sent again, has the same. For a server that takes each but once.
    pub const fn name(&self) -> [u8; 8] {
        // The end: the beginning is zeros.
        let [.., a, b, c, d, e, f, g, h] = self.proof;
        [a, b, c, d, e, f, g, h]
    }
}

/// Under which a server makes its cookies, and knows them again without having kept anything.
///
/// A cookie holds for the source that it was given to and for the minute in which it was made: a server checks it for the
/// present minute and for the one before.
pub struct CookieKey(Secret<HASH_LEN>);

impl CookieKey {
    /// The key of these random bytes.
    pub const fn new(secret: Secret<HASH_LEN>) -> Self {
        Self(secret)
    }

    /// The cookie for a source: an address, or what the server holds to be as good as one.
    pub fn cookie(&self, source: &[u8; 16], minute: u64, bits: u8) -> [u8; COOKIE_LEN] {
        let mut cookie = [bits; COOKIE_LEN];
        let mac = mac(self.0.expose(), &[b"ossicle cookie", &[0], source, &minute.to_be_bytes(), &[bits]]);
        for (to, from) in cookie.iter_mut().take(MAC_LEN).zip(mac) {
            *to = from;
        }
        cookie
    }

    /// The bits that this cookie asked for, if it was made under this key for that source in that minute.
    pub fn bits(&self, cookie: &[u8], source: &[u8; 16], minute: u64) -> Option<u8> {
        let bits = cookie.last().copied()?;
        equal(&self.cookie(source, minute, bits), cookie).then_some(bits)
    }
}
