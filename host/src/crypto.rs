//! The cryptography that only hosts do: a fast AEAD, RSA identity keys with their files, and the threads RSA runs on.
//!
//! Alone in the house to name `aws_lc_rs`, and alone on hosts to name `rsa`. With the feature `aws-lc` (the default) AES
//! and RSA are aws-lc's, without it RustCrypto's; both give the same bytes, verdicts and refusals, and pass the same
//! tests. RSA signs and verifies (PSS with SHA-256 and a salt of 32 bytes, strictly) and does nothing else. Private keys
//! are erased when dropped and have no `Debug`; files that others can read are refused.

use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use ossicle_core::{PublicKey, Statement};
use rsa::pkcs8::{DecodePrivateKey, EncodePrivateKey, LineEnding};
use rsa::traits::{PrivateKeyParts, PublicKeyParts};
use tokio::sync::oneshot;
use zeroize::Zeroizing;

pub use backend::HostAead;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod wycheproof;

/// Sizes of RSA keys that this protocol accepts, in bits.
pub const RSA_BITS: [usize; 3] = [2048, 3072, 4096];

/// No accepted key takes as much; whatever is longer is not read.
/// How the name of a key's file begins while it is being written.
pub(crate) const UNFINISHED: &str = ".key-";
const MAX_FILE_LEN: u64 = 16 * 1024;
const EXPONENT: [u8; 3] = [1, 0, 1];

/// The prime factors that no admitted key has are below this.
const MIN_FACTOR: u32 = 4096;

/// Whether a modulus, big endian, has a prime factor below 4,096: a key that was not made, but made up.
pub(crate) fn has_small_factor(modulus: &[u8]) -> bool {
    static PRIMES: LazyLock<Vec<u64>> = LazyLock::new(|| {
        let is_prime = |n: &u32| (2..*n).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
        (2..MIN_FACTOR).filter(is_prime).map(u64::from).collect()
    });
    let words: Vec<u64> =
        modulus.rchunks(4).rev().map(|chunk| chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))).collect();
    PRIMES.iter().any(|prime| words.iter().fold(0, |rest, word| (rest << 32 | word) % prime) == 0)
}

/// An RSA identity key: the private half of what a peer pins. It signs [`Statement`]s and nothing else.
pub struct IdentityKey {
    /// Always as this crate writes it, whatever was read.
    pkcs8: Zeroizing<Vec<u8>>,
    modulus: Vec<u8>,
    signer: backend::Signer,
}

/// The numbers of a private key that a device's identity page carries, big endian, at full width.
pub struct Components {
    /// The private exponent, as long as the modulus.
    pub d: Zeroizing<Vec<u8>>,
    /// The first prime, half as long.
    pub p: Zeroizing<Vec<u8>>,
    /// The second prime, half as long.
    pub q: Zeroizing<Vec<u8>>,
}

impl IdentityKey {
    /// Makes a new key of 2048, 3072 or 4096 bits. Takes up to seconds: never call it on an I/O thread.
    ///
    /// # Errors
    /// [`KeyError::Bits`] for any other size; [`KeyError::Failed`] if the system has no randomness.
    pub fn generate(bits: usize) -> Result<Self, KeyError> {
        if !RSA_BITS.contains(&bits) {
            return Err(KeyError::Bits { bits });
        }
        Self::from_pkcs8(&backend::generate(bits)?)
    }

    /// Reads PKCS#8 in DER.
    ///
    /// # Errors
    /// [`KeyError::Format`], or [`KeyError::Bits`] and [`KeyError::Exponent`] for a key that this protocol does not accept.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        Self::accept(&rsa::RsaPrivateKey::from_pkcs8_der(der).map_err(|_| KeyError::Format)?)
    }

    /// Reads PKCS#8 in PEM (`-----BEGIN PRIVATE KEY-----`).
    ///
    /// # Errors
    /// As [`IdentityKey::from_pkcs8`].
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        Self::accept(&rsa::RsaPrivateKey::from_pkcs8_pem(pem).map_err(|_| KeyError::Format)?)
    }

    fn accept(key: &rsa::RsaPrivateKey) -> Result<Self, KeyError> {
        let bits = usize::try_from(key.n().bits()).unwrap_or(usize::MAX);
        if !RSA_BITS.contains(&bits) {
            return Err(KeyError::Bits { bits });
        }
        if *key.e().to_be_bytes_trimmed_vartime() != EXPONENT {
            return Err(KeyError::Exponent);
        }
        let pkcs8 = key.to_pkcs8_der().map_err(|_| KeyError::Format)?.to_bytes();
        let signer = backend::Signer::new(&pkcs8)?;
        Ok(Self { pkcs8, modulus: key.n().to_be_bytes_trimmed_vartime().into_vec(), signer })
    }

    /// Reads a key file, PEM or DER.
    ///
    /// # Errors
    /// [`KeyError::Permissions`] if anybody but its owner can open it; [`KeyError::Io`]; and as [`IdentityKey::from_pkcs8`].
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Io { doing: "read", path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        // Asked of the open file, so that nobody can swap it between the question and the reading.
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Permissions { path: path.to_owned(), mode });
        }
        // Room from the start: a growing vector would leave copies of the secret behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_FILE_LEN).unwrap_or_default() + 1));
        file.take(MAX_FILE_LEN).read_to_end(&mut bytes).map_err(failed)?;
        match core::str::from_utf8(&bytes) {
            Ok(pem) if pem.trim_start().starts_with("-----BEGIN") => Self::from_pem(pem.trim_start()),
            _ => Self::from_pkcs8(&bytes),
        }
    }

    /// Writes the key as PEM into a new file of mode 0600: either the whole file appears, durably, or none.
    ///
    /// # Errors
    /// [`KeyError::Exists`] if there is a file already, which is left as it is; [`KeyError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let failed = |source| KeyError::Io { doing: "write", path: path.to_owned(), source };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let pem = self.to_pem()?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(directory).map_err(failed)?;
        file.write_all(pem.as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        match file.persist_noclobber(path) {
            Ok(_) => File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(KeyError::Exists { path: path.to_owned() })
            }
            Err(error) => Err(failed(error.error)),
        }
    }

    /// The key as PKCS#8 in PEM.
    ///
    /// # Errors
    /// [`KeyError::Failed`], which no accepted key causes.
    pub fn to_pem(&self) -> Result<Zeroizing<String>, KeyError> {
        self.parsed()?.to_pkcs8_pem(LineEnding::LF).map_err(|_| KeyError::Failed)
    }

    /// The key as PKCS#8 in DER.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public half: the modulus, big endian, without leading zeros. The exponent is always 65537.
    pub fn modulus(&self) -> &[u8] {
        &self.modulus
    }

    /// Bits of the modulus: 2048, 3072 or 4096.
    pub const fn bits(&self) -> usize {
        self.modulus.len() * 8
    }

    /// SHA-256 of the SubjectPublicKeyInfo, which is what peers pin.
    pub fn fingerprint(&self) -> [u8; 32] {
        PublicKey::from_modulus(&self.modulus).map(|key| key.fingerprint()).unwrap_or_default()
    }

    /// The private numbers, for a device's identity page and nothing else.
    ///
    /// # Errors
    /// [`KeyError::Failed`], which no accepted key causes.
    pub fn components(&self) -> Result<Components, KeyError> {
        let key = self.parsed()?;
        let [p, q] = key.primes() else {
            return Err(KeyError::Failed);
        };
        let half = self.modulus.len() / 2;
        Ok(Components {
            d: fixed_width(key.d(), self.modulus.len())?,
            p: fixed_width(p, half)?,
            q: fixed_width(q, half)?,
        })
    }

    /// Signs `statement`. Takes a millisecond or so: on a server, through [`CryptoPool::sign`].
    ///
    /// # Errors
    /// [`KeyError::Failed`] if the library refuses, for want of randomness or because its own check of the result failed.
    pub fn sign(&self, statement: &Statement) -> Result<Vec<u8>, KeyError> {
        self.sign_message(statement.message(&mut [0; Statement::MAX_LEN]))
    }

    fn sign_message(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.signer.sign(message, self.modulus.len())
    }

    fn parsed(&self) -> Result<rsa::RsaPrivateKey, KeyError> {
        rsa::RsaPrivateKey::from_pkcs8_der(&self.pkcs8).map_err(|_| KeyError::Failed)
    }
}

/// A number at exactly `len` bytes, whatever the width of its limbs.
fn fixed_width(number: &rsa::BoxedUint, len: usize) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let bytes = Zeroizing::new(number.to_be_bytes().into_vec());
    let mut fixed = Zeroizing::new(vec![0; len]);
    for (to, from) in fixed.iter_mut().rev().zip(bytes.iter().rev()) {
        *to = *from;
    }
    if bytes.iter().rev().skip(len).all(|&byte| byte == 0) { Ok(fixed) } else { Err(KeyError::Failed) }
}

/// Why a private key cannot be made, read, written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not a size that this protocol accepts.
    #[error("an RSA key has 2048, 3072 or 4096 bits here, not {bits}")]
    Bits {
        /// The size asked for or found.
        bits: usize,
    },
    /// There is a file where a new key should go.
    #[error("{} exists already: choose another place, or move it away if it is no longer wanted", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another public exponent than 65537.
    #[error("the key has another public exponent than 65537: use another key")]
    Exponent,
    /// The library failed.
    #[error("the RSA library failed: is there randomness on this system?")]
    Failed,
    /// Not a private key.
    #[error("this is not an RSA private key in PKCS#8 (PEM or DER)")]
    Format,
    /// The file cannot be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// "read" or "write".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Others can open the file.
    #[error("others can read the private key in {0} (mode {mode:04o}): run `chmod 600 {0}`", path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// Does `signature` verify over `statement` under the public key with this `modulus`?
///
/// The time depends on the length of the signature alone, whatever else is wrong: where the modulus cannot have made it,
/// or is [`dummy_key`], a fixed key of that length is used and the answer is no.
pub fn verify(modulus: &[u8], statement: &Statement, signature: &[u8]) -> bool {
    verify_message(modulus, statement.message(&mut [0; Statement::MAX_LEN]), signature)
}

fn verify_message(modulus: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let Some(dummy) = dummy(signature.len()) else {
        return false;
    };
    let usable = PublicKey::from_modulus(modulus).is_ok()
        && modulus.len() == signature.len()
        && signature < modulus
        && modulus != dummy;
    let verified = backend::verify(if usable { modulus } else { dummy }, message, signature);
    verified && usable
}

/// A modulus for clients that do not exist: [`verify`] takes as long with it as with a real one, and always says no.
pub fn dummy_key() -> &'static [u8] {
    dummy(256).unwrap_or_default()
}

/// The modulus of this length that nobody has a private key for.
fn dummy(len: usize) -> Option<&'static [u8]> {
    // Begins with ones, so that every signature is smaller; the rest is splitmix64, and odd as a modulus must be.
    static BYTES: LazyLock<[u8; 512]> = LazyLock::new(|| {
        let mut bytes = [0xff; 512];
        let mut state = 0_u64;
        for chunk in bytes.chunks_exact_mut(8).skip(1) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            chunk.copy_from_slice(&((word ^ (word >> 31)) | 1).to_be_bytes());
        }
        bytes
    });
    if RSA_BITS.contains(&(len * 8)) { BYTES.get(..len) } else { None }
}

/// Threads that do RSA, so that no I/O thread ever waits for it, with bounded queues before them.
///
/// Verifications come first: they are cheap, and asked for by clients and by strangers who have signed themselves. Anybody
/// can ask for signatures, so of these the oldest gives way to the newest where too many wait: its peer has waited longest
/// and is the likeliest to have gone. When the pool is dropped its threads end, after the operations that somebody still
/// waits for.
pub struct CryptoPool {
    queues: Arc<Queues>,
    threads: Vec<JoinHandle<()>>,
    done: Arc<Done>,
}

type Job = Box<dyn FnOnce(&Done) + Send>;

/// What waits for a thread.
struct Queues {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Jobs that may wait in each.
    limit: usize,
}

#[derive(Default)]
struct Waiting {
    verifications: VecDeque<Job>,
    signatures: VecDeque<Job>,
    ended: bool,
}

#[derive(Clone, Copy)]
enum Lane {
    Verifications,
    Signatures,
}

impl Queues {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Jobs run outside.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, lane: Lane, job: Job) -> Result<(), PoolError> {
        let mut waiting = self.lock();
        let gave_way = match lane {
            Lane::Verifications if waiting.verifications.len() >= self.limit => return Err(PoolError::Full),
            Lane::Verifications => {
                waiting.verifications.push_back(job);
                None
            }
            Lane::Signatures => {
                let full = waiting.signatures.len() >= self.limit;
                let oldest = if full { waiting.signatures.pop_front() } else { None };
                waiting.signatures.push_back(job);
                oldest
            }
        };
        drop(waiting);
        self.changed.notify_one();
        drop(gave_way);
        Ok(())
    }

    /// The next job; `None` once the pool has ended and nothing waits.
    fn pop(&self) -> Option<Job> {
        let mut waiting = self.lock();
        loop {
            let next = waiting.verifications.pop_front().or_else(|| waiting.signatures.pop_front());
            if next.is_some() || waiting.ended {
                return next;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[derive(Default)]
struct Done {
    signs: AtomicU64,
    verifies: AtomicU64,
}

impl CryptoPool {
    /// Signatures that may wait by default, and verifications.
    pub const QUEUE: usize = 256;

    /// Starts a pool of the default size: half of the cores, at least one, and a queue of [`CryptoPool::QUEUE`].
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start() -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::new((cores / 2).max(1), Self::QUEUE)
    }

    /// Starts a pool of so many threads, before which so many jobs may wait.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn new(threads: usize, queue: usize) -> io::Result<Self> {
        let queues = Arc::new(Queues { waiting: Mutex::default(), changed: Condvar::new(), limit: queue.max(1) });
        let done = Arc::new(Done::default());
        let threads = (0..threads.max(1))
            .map(|_| {
                let (queues, done) = (Arc::clone(&queues), Arc::clone(&done));
                thread::Builder::new().name("ossicle-rsa".into()).spawn(move || work(&queues, &done))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { queues, threads, done })
    }

    /// A pool without threads, for simulations: whoever asks for an operation computes it, and so everything happens in the
    /// order in which it is asked for.
    pub fn inline() -> Self {
        let queues = Queues { waiting: Mutex::default(), changed: Condvar::new(), limit: 1 };
        Self { queues: Arc::new(queues), threads: Vec::new(), done: Arc::default() }
    }

    /// Signatures that wait.
    pub fn waiting(&self) -> usize {
        self.queues.lock().signatures.len()
    }

    /// Signs on a thread of the pool. Cancel-safe: a job whose caller has gone is skipped.
    ///
    /// # Errors
    /// [`PoolError::Full`] if so many came behind it that it gave way; [`PoolError::Failed`] as [`IdentityKey::sign`].
    pub async fn sign(&self, key: Arc<IdentityKey>, statement: Statement) -> Result<Vec<u8>, PoolError> {
        self.run(Lane::Signatures, move |done| {
            done.signs.fetch_add(1, Ordering::Relaxed);
            key.sign(&statement)
        })
        .await?
        .map_err(|_| PoolError::Failed)
    }

    /// Verifies, as [`verify`], on a thread of the pool. Cancel-safe: a job whose caller has gone is skipped.
    ///
    /// # Errors
    /// [`PoolError::Full`] at once if too many wait.
    pub async fn verify(&self, modulus: Vec<u8>, statement: Statement, signature: Vec<u8>) -> Result<bool, PoolError> {
        self.run(Lane::Verifications, move |done| {
            done.verifies.fetch_add(1, Ordering::Relaxed);
            verify(&modulus, &statement, &signature)
        })
        .await
    }

    /// Verifies, as [`verify`], on the caller's thread, in the hundredth part of a millisecond: handing it to another
    /// thread and back takes as long again.
    pub fn verify_here(&self, modulus: &[u8], statement: &Statement, signature: &[u8]) -> bool {
        self.done.verifies.fetch_add(1, Ordering::Relaxed);
        verify(modulus, statement, signature)
    }

    /// Signatures made so far.
    pub fn signs(&self) -> u64 {
        self.done.signs.load(Ordering::Relaxed)
    }

    /// Signatures verified so far, with whatever result.
    pub fn verifies(&self) -> u64 {
        self.done.verifies.load(Ordering::Relaxed)
    }

    async fn run<T, F>(&self, lane: Lane, work: F) -> Result<T, PoolError>
    where
        T: Send + 'static,
        F: FnOnce(&Done) -> T + Send + 'static,
    {
        if self.threads.is_empty() {
            return Ok(work(&self.done));
        }
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |done| {
            if !answer.is_closed() {
                // Nobody to tell is nobody's loss.
                let _ = answer.send(work(done));
            }
        });
        self.queues.push(lane, job)?;
        // A job that is dropped has given way.
        answered.await.map_err(|_| PoolError::Full)
    }
}

impl Drop for CryptoPool {
    fn drop(&mut self) {
        self.queues.lock().ended = true;
        self.queues.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

fn work(queues: &Queues, done: &Done) {
    while let Some(job) = queues.pop() {
        job(done);
    }
}

/// Why the pool has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The operation failed.
    #[error("the RSA library failed")]
    Failed,
    /// Too many operations wait: refuse, and let the peer come again.
    #[error("too many RSA operations are waiting")]
    Full,
}

#[cfg(feature = "aws-lc")]
mod backend {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{RSA_PSS_2048_8192_SHA256, RSA_PSS_SHA256, RsaKeyPair, RsaPublicKeyComponents};
    use ossicle_core::{Aead, Error, NONCE_LEN, TAG_LEN};
    use zeroize::{Zeroize, Zeroizing};

    use super::{EXPONENT, KeyError};

    /// AES-256-GCM by aws-lc, with the instructions of the processor.
    pub struct HostAead(Option<LessSafeKey>);

    impl Aead for HostAead {
        fn new(key: &[u8; 32]) -> Self {
            // A key of 32 bytes is never refused; if it were, the connection ends and nothing panics.
            Self(UnboundKey::new(&AES_256_GCM, key).ok().map(LessSafeKey::new))
        }

        fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], Error> {
            let key = self.0.as_ref().ok_or(Error::Crypto)?;
            let tag = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(*nonce), Aad::from(aad), data);
            tag.ok().and_then(|tag| tag.as_ref().try_into().ok()).ok_or(Error::Crypto)
        }

        fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), Error> {
            let key = self.0.as_ref().ok_or(Error::Crypto)?;
            let nonce = Nonce::assume_unique_for_key(*nonce);
            if key.open_in_place_separate_tag(nonce, Aad::from(aad), tag, data).is_ok() {
                return Ok(());
            }
            // aws-lc decrypts before it compares the tag.
            data.zeroize();
            Err(Error::Crypto)
        }
    }

    pub(super) struct Signer(RsaKeyPair);

    impl Signer {
        pub(super) fn new(pkcs8: &[u8]) -> Result<Self, KeyError> {
            RsaKeyPair::from_pkcs8(pkcs8).map(Self).map_err(|_| KeyError::Format)
        }

        pub(super) fn sign(&self, message: &[u8], len: usize) -> Result<Vec<u8>, KeyError> {
            let mut signature = vec![0; len];
            self.0
                .sign(&RSA_PSS_SHA256, &SystemRandom::new(), message, &mut signature)
                .map_err(|_| KeyError::Failed)?;
            Ok(signature)
        }
    }

    pub(super) fn generate(bits: usize) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let size = match bits {
            2048 => KeySize::Rsa2048,
            3072 => KeySize::Rsa3072,
            4096 => KeySize::Rsa4096,
            _ => return Err(KeyError::Bits { bits }),
        };
        let key = RsaKeyPair::generate(size).map_err(|_| KeyError::Failed)?;
        let der = key.as_der().map_err(|_| KeyError::Failed)?;
        Ok(Zeroizing::new(der.as_ref().to_vec()))
    }

    pub(super) fn verify(modulus: &[u8], message: &[u8], signature: &[u8]) -> bool {
        let key = RsaPublicKeyComponents { n: modulus, e: &EXPONENT[..] };
        key.verify(&RSA_PSS_2048_8192_SHA256, message, signature).is_ok()
    }
}

#[cfg(not(feature = "aws-lc"))]
mod backend {
    use getrandom::SysRng;
    use rsa::pkcs8::{DecodePrivateKey, EncodePrivateKey};
    use rsa::pss::{Signature, SigningKey, VerifyingKey};
    use rsa::rand_core::{TryRng, UnwrapErr};
    use rsa::sha2::Sha256;
    use rsa::signature::{RandomizedSigner, SignatureEncoding, Verifier};
    use rsa::{BoxedUint, RsaPrivateKey, RsaPublicKey};
    use zeroize::Zeroizing;

    use super::{EXPONENT, KeyError};

    pub use ossicle_core::RustCrypto as HostAead;

    pub(super) struct Signer(SigningKey<Sha256>);

    impl Signer {
        pub(super) fn new(pkcs8: &[u8]) -> Result<Self, KeyError> {
            let key = RsaPrivateKey::from_pkcs8_der(pkcs8).map_err(|_| KeyError::Format)?;
            Ok(Self(SigningKey::new(key)))
        }

        pub(super) fn sign(&self, message: &[u8], _len: usize) -> Result<Vec<u8>, KeyError> {
            // The generator draws the salt and blinds the private operation.
            let signature = self.0.try_sign_with_rng(&mut SysRng, message).map_err(|_| KeyError::Failed)?;
            Ok(signature.to_vec())
        }
    }

    pub(super) fn generate(bits: usize) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        // The search for primes takes no failing generator, so ask once whether there is randomness at all.
        SysRng.try_next_u64().map_err(|_| KeyError::Failed)?;
        let key = RsaPrivateKey::new(&mut UnwrapErr(SysRng), bits).map_err(|_| KeyError::Failed)?;
        Ok(key.to_pkcs8_der().map_err(|_| KeyError::Failed)?.to_bytes())
    }

    pub(super) fn verify(modulus: &[u8], message: &[u8], signature: &[u8]) -> bool {
        let modulus = BoxedUint::from_be_slice_vartime(modulus);
        let Ok(key) = RsaPublicKey::new(modulus, BoxedUint::from_be_slice_vartime(&EXPONENT)) else {
            return false;
        };
        let Ok(signature) = Signature::try_from(signature) else {
            return false;
        };
        VerifyingKey::<Sha256>::new(key).verify(message, &signature).is_ok()
    }
}
