//! Passwords of accounts: how they are prepared, hashed and verified, and how many at once. Alone in the house to name
//! `argon2`.
//!
//! A password is hashed with Argon2id and the second parameters that RFC 9106 recommends: 3 passes over 64 MiB in 4 lanes.
//! That takes long on purpose, so it is never done on an I/O thread, two at once at most, and only so many wait for it. A
//! name that has no account costs as much as one that has.

use std::sync::Arc;

use argon2::password_hash::phc::{Output, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use ossicle_core::MAX_PASSWORD_LEN;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::error;
use unicode_normalization::UnicodeNormalization;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};
use zeroize::Zeroizing;

use crate::store::Verifier;

/// KiB, passes and lanes of one hash.
const MEMORY: u32 = 64 * 1024;
const PASSES: u32 = 3;
const LANES: u32 = 4;
/// Hashes that are made at once: 128 MiB.
const AT_ONCE: usize = 2;
/// Passwords that wait for one, or are being hashed. Beyond them, callers are sent away: all of these are done within the time
/// of a handshake.
const WAITING: usize = 32;
/// Characters of the shortest new password.
const MIN_CHARACTERS: usize = 8;

/// A password that a person typed, prepared as RFC 8265 has it (OpaqueString): unusual spaces are spaces, and letters are
/// composed, so that two keyboards give the same bytes. Erased when dropped, shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Zeroizing<String>);

/// Why a text is not a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordError {
    /// It has a control character.
    #[error("a password has no control characters")]
    Control,
    /// It is empty.
    #[error("a password needs at least one character")]
    Empty,
    /// It is too long.
    #[error("a password has at most {MAX_PASSWORD_LEN} bytes: take a shorter one")]
    Long,
    /// It is too short to be a new one.
    #[error("a new password needs at least {MIN_CHARACTERS} characters: take a longer one")]
    Short,
}

impl Password {
    /// Takes a password as it was typed.
    ///
    /// # Errors
    /// [`PasswordError`] says in one sentence what is wrong with it, and never repeats it.
    pub fn prepare(typed: &str) -> Result<Self, PasswordError> {
        // Room from the start: a growing text would leave copies behind. Composed, no character takes more than three times.
        let mut prepared = Zeroizing::new(String::with_capacity(typed.len().saturating_mul(3)));
        let spaced = typed.chars().map(|c| match c.general_category() {
            GeneralCategory::SpaceSeparator => ' ',
            _ => c,
        });
        for c in spaced.nfc() {
            if c.is_control() {
                return Err(PasswordError::Control);
            }
            prepared.push(c);
        }
        match prepared.len() {
            0 => Err(PasswordError::Empty),
            1..=MAX_PASSWORD_LEN => Ok(Self(prepared)),
            _ => Err(PasswordError::Long),
        }
    }

    /// Whether it is fit to be a new one.
    ///
    /// # Errors
    /// [`PasswordError::Short`].
    pub fn check_new(&self) -> Result<(), PasswordError> {
        if self.0.chars().count() < MIN_CHARACTERS { Err(PasswordError::Short) } else { Ok(()) }
    }

    /// As the protocol carries it.
    ///
    /// # Errors
    /// None: it has the right length.
    pub fn expose(&self) -> Result<ossicle_core::Password<'_>, ossicle_core::Error> {
        ossicle_core::Password::new(self.0.as_bytes())
    }

    /// What it is verified with, with a salt of its own. Takes long, and 64 MiB. `None` if the system has no randomness.
    pub fn verifier(&self) -> Option<Verifier> {
        hash(self.0.as_bytes())
    }
}

impl core::fmt::Debug for Password {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Password(..)")
    }
}

fn argon2() -> Option<Argon2<'static>> {
    let params = Params::new(MEMORY, PASSES, LANES, None).ok()?;
    Some(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

fn hash(password: &[u8]) -> Option<Verifier> {
    // With a salt of 16 bytes.
    Some(Verifier(argon2()?.hash_password(password).ok()?.to_string()))
}

/// Whether `password` is that of `verifier`. Without one, or with one that is not of this program, it takes as long, and is
/// not.
fn verify(verifier: Option<&Verifier>, password: &[u8]) -> bool {
    let usable = verifier.and_then(|Verifier(text)| parse(text));
    if usable.is_none() && verifier.is_some() {
        error!("an account has no password that can be verified: give it another with `ossicle account passwd`");
    }
    let is_usable = usable.is_some();
    let (Some(argon2), Some(hash)) = (argon2(), usable.or_else(nobodys)) else { return false };
    argon2.verify_password(password, &hash).is_ok() && is_usable
}

/// What looks like the hash of a password, and is of none: drawn, since to make one takes as long as to verify it.
fn nobodys() -> Option<PasswordHash> {
    let (mut salt, mut output) = ([0; 16], [0; Params::DEFAULT_OUTPUT_LEN]);
    getrandom::fill(&mut salt).and_then(|()| getrandom::fill(&mut output)).ok()?;
    Some(PasswordHash {
        algorithm: Algorithm::Argon2id.ident(),
        version: Some(Version::V0x13.into()),
        params: argon2()?.params().try_into().ok()?,
        salt: Some(Salt::new(&salt).ok()?),
        hash: Some(Output::new(&output).ok()?),
    })
}

/// A verifier that asks for no more than this server gives.
fn parse(text: &str) -> Option<PasswordHash> {
    let hash = PasswordHash::new(text).ok()?;
    let params = Params::try_from(&hash).ok()?;
    let bounded = params.m_cost() <= MEMORY && params.t_cost() <= 4 * PASSES && params.p_cost() <= 4 * LANES;
    (bounded && hash.algorithm == Algorithm::Argon2id.ident()).then_some(hash)
}

/// Verifies passwords, few at once.
#[derive(Debug)]
pub(crate) struct Passwords {
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

/// Too many wait already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crowded;

impl Passwords {
    pub(crate) fn new() -> Self {
        Self { running: Arc::new(Semaphore::new(AT_ONCE)), waiting: Arc::new(Semaphore::new(WAITING)) }
    }

    /// Whether `password` is that of `verifier`; without one it takes as long, and is not. Whoever leaves gives up his place.
    pub(crate) async fn verify(
        &self,
        verifier: Option<Verifier>,
        password: Zeroizing<Vec<u8>>,
    ) -> Result<bool, Crowded> {
        let place = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| Crowded)?;
        let running = Arc::clone(&self.running).acquire_owned().await.map_err(|_| Crowded)?;
        let verified = spawn_blocking(move || {
            // The memory is there until the end of this, whoever waits for it.
            let _held = (place, running);
            verify(verifier.as_ref(), &password)
        });
        verified.await.map_err(|_| Crowded)
    }
}

#[cfg(test)]
mod tests {
    use core::pin::Pin;
    use core::task::{Context, Waker};

    use super::*;

    fn waits(future: Pin<&mut impl Future>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    fn password(typed: &str) -> Password {
        Password::prepare(typed).unwrap()
    }

    #[test]
    fn two_keyboards_give_the_same_password() {
        assert_eq!(password("Zoe\u{308}\u{a0}\u{3000}x"), password("Zoë  x"));
        assert_ne!(password("zoë"), password("Zoë"), "case matters");
        assert_ne!(password("①"), password("1"), "and so does form");
        assert_eq!(password(" a ").expose().unwrap().expose(), b" a ", "as do spaces at its ends");
        for (typed, error) in [
            ("", PasswordError::Empty),
            ("a\tb", PasswordError::Control),
            ("a\u{9b}b", PasswordError::Control),
            (&"x".repeat(129), PasswordError::Long),
            (&"é".repeat(65), PasswordError::Long),
        ] {
            assert_eq!(Password::prepare(typed), Err(error), "{typed:?}");
        }
        assert_eq!(password(&"é".repeat(64)).expose().unwrap().expose().len(), 128);
        assert_eq!(password("1234567").check_new(), Err(PasswordError::Short));
        assert_eq!(password("ααααββββ").check_new(), Ok(()));
    }

    #[test]
    fn nothing_shows_a_password() {
        let (typed, verifier) = (password("correct horse"), Verifier("$argon2id$v=19".into()));
        let shown = format!("{typed:?} {:?} {verifier:?}", typed.expose().unwrap());
        assert_eq!(shown, "Password(..) Password(..) Verifier(..)");
    }

    #[tokio::test]
    async fn passwords_are_verified_and_nobody_has_one_by_accident() {
        let right = password("correct horse");
        let verifier = right.verifier().unwrap();
        assert!(verifier.0.starts_with("$argon2id$v=19$m=65536,t=3,p=4$"), "{}", verifier.0);
        assert_ne!(right.verifier().unwrap(), verifier, "salted");
        let passwords = Passwords::new();
        let verify = async |verifier: Option<&Verifier>, password: &[u8]| {
            passwords.verify(verifier.cloned(), Zeroizing::new(password.to_vec())).await.unwrap()
        };
        assert!(verify(Some(&verifier), b"correct horse").await);
        assert!(!verify(Some(&verifier), b"correct horsf").await);
        assert!(!verify(Some(&verifier), b"").await);
        assert!(!verify(None, b"correct horse").await);
        // Nor by a row that is none, or that wants more than there is.
        for text in
            ["", "correct horse", "$argon2id$v=19$m=4194304,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA"]
        {
            assert!(!verify(Some(&Verifier(text.into())), b"correct horse").await, "{text}");
        }
    }

    #[test]
    fn what_stands_for_nobodys_password_asks_for_the_same_work() {
        let shape = |text: &str| -> Vec<String> {
            let fields = text.split('$').enumerate();
            fields.map(|(place, field)| if place < 4 { field.into() } else { field.len().to_string() }).collect()
        };
        let (nobodys, real) = (nobodys().unwrap().to_string(), password("correct horse").verifier().unwrap().0);
        assert_eq!(shape(&nobodys), shape(&real));
        assert!(parse(&nobodys).is_some(), "{nobodys}");
        assert_ne!(super::nobodys().unwrap().to_string(), nobodys);
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let passwords = Passwords::new();
        let held = Arc::clone(&passwords.running).acquire_many_owned(AT_ONCE as u32).await.unwrap();
        let nobody = || passwords.verify(None, Zeroizing::new(vec![1]));
        let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(nobody())).collect();
        for one in &mut waiting {
            assert!(waits(one.as_mut()));
        }
        assert_eq!(nobody().await, Err(Crowded));
        // Whoever leaves makes room, and whoever waited is served.
        waiting.truncate(1);
        let mut next = Box::pin(nobody());
        assert!(waits(next.as_mut()));
        drop(held);
        assert_eq!(waiting.pop().unwrap().await, Ok(false));
        assert_eq!(next.await, Ok(false));
    }
}
