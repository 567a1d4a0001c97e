//! The fixed RSA keys of the tests. They are public: never enrol one of them anywhere.

use std::sync::OnceLock;

use ossicle_core::{MAX_RSA_LEN, PublicKey, RsaKey, Statement};

use crate::script::Rng;

/// A fixed key.
pub struct Key {
    d: Vec<u8>,
    p: Vec<u8>,
    q: Vec<u8>,
    modulus: Vec<u8>,
}

macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {
        $($(#[$doc])* pub fn $name() -> &'static Key {
            static KEY: OnceLock<Key> = OnceLock::new();
            KEY.get_or_init(|| {
                Key::from_pkcs8(include_bytes!(concat!("../../keys/", $file, ".der"))).expect("a fixed key is a key")
            })
        })*
    };
}

keys! {
    /// A client's, of 2048 bits.
    alice = "alice";
    /// A device's, of 2048 bits.
    carol = "carol";
    /// A server's, of 2048 bits.
    server = "server";
    /// A server's, of 3072 bits.
    server3072 = "server3072";
}

impl Key {
    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        // SEQUENCE { version, algorithm, OCTET STRING { SEQUENCE { version, n, e, d, p, q, ... } } }
        let mut outer = Der(der).contents()?;
        outer.contents()?;
        outer.contents()?;
        let mut inner = outer.contents()?.contents()?;
        inner.contents()?;
        let (_modulus, _exponent) = (inner.contents()?, inner.contents()?);
        let mut number = || {
            let Der(bytes) = inner.contents()?;
            Some(bytes.strip_prefix(&[0]).unwrap_or(bytes).to_vec())
        };
        let (mut d, p, q) = (number()?, number()?, number()?);
        while d.len() < 2 * p.len() {
            d.insert(0, 0);
        }
        let mut modulus = [0; MAX_RSA_LEN];
        let modulus = RsaKey::new(&d, &p, &q).ok()?.public(&mut modulus).ok()?.modulus().to_vec();
        Some(Self { d, p, q, modulus })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey<'_> {
        PublicKey::from_modulus(&self.modulus).expect("a fixed key is acceptable")
    }

    /// The private exponent and the primes.
    pub fn parts(&self) -> (&[u8], &[u8], &[u8]) {
        (&self.d, &self.p, &self.q)
    }

    /// A real signature, the same each time.
    pub fn sign(&self, statement: &Statement) -> Vec<u8> {
        let key = RsaKey::new(&self.d, &self.p, &self.q).expect("a fixed key is a key");
        let mut signature = vec![0; key.signature_len()];
        key.sign(statement, &mut Rng::new(1), &mut signature).expect("a fixed key signs");
        signature
    }
}

/// What is left of a DER encoding.
struct Der<'d>(&'d [u8]);

impl<'d> Der<'d> {
    /// Takes the next value and returns what is in it.
    fn contents(&mut self) -> Option<Self> {
        let (_tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (len, rest) = match usize::from(*first) {
            len @ 0..0x80 => (len, rest),
            long => {
                let (digits, rest) = rest.split_at_checked(long - 0x80)?;
                (digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit)), rest)
            }
        };
        let (contents, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some(Self(contents))
    }
}
