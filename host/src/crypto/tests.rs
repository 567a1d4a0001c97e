//! Tests of the host's cryptography, run with and without `aws-lc`: both must behave alike, so `rsa` is the oracle.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, channel};

use ossicle_core::{Aead, Error, RustCrypto, Secret, enrolment_statement};
use rsa::signature::{RandomizedSigner, SignatureEncoding, Verifier};
use sha2::{Digest, Sha256, Sha512};

use super::*;

const RSA_2048: &str = include_str!("keys/rsa2048.pem");
const RSA_3072: &str = include_str!("keys/rsa3072.pem");
const RSA_4096: &str = include_str!("keys/rsa4096.pem");
const MESSAGE: &[u8] = b"what is signed";

fn key(pem: &str) -> IdentityKey {
    IdentityKey::from_pem(pem).unwrap()
}

fn error<T>(result: Result<T, KeyError>) -> KeyError {
    result.err().expect("this was to be refused")
}

fn statement(key: &IdentityKey, seed: u8) -> Statement {
    let public = PublicKey::from_modulus(key.modulus()).unwrap();
    enrolment_statement(&Secret::new([seed; 32]), &[1; 16], &[2; 16], "name", public)
}

fn oracle(pem: &str) -> rsa::RsaPrivateKey {
    rsa::RsaPrivateKey::from_pkcs8_pem(pem).unwrap()
}

// AEAD

#[test]
fn both_ciphers_give_the_same_bytes() {
    let nonce = [7; 12];
    for len in [0, 1, 15, 16, 17, 255, 4096, 16_384] {
        for aad in [&b""[..], b"header"] {
            let text: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let (mut ours, mut theirs) = (text.clone(), text.clone());
            let tag = HostAead::new(&[3; 32]).seal(&nonce, aad, &mut ours).unwrap();
            assert_eq!(tag, RustCrypto::new(&[3; 32]).seal(&nonce, aad, &mut theirs).unwrap());
            assert_eq!(ours, theirs);
            RustCrypto::new(&[3; 32]).open(&nonce, aad, &mut ours, &tag).unwrap();
            HostAead::new(&[3; 32]).open(&nonce, aad, &mut theirs, &tag).unwrap();
            assert_eq!((&ours, &theirs), (&text, &text));
        }
    }
}

#[test]
fn whatever_is_changed_opens_nothing_and_leaves_no_plaintext() {
    let text = *b"a text that nobody may see unchecked";
    let seal = || {
        let mut data = text;
        let tag = HostAead::new(&[3; 32]).seal(&[7; 12], b"aad", &mut data).unwrap();
        (data, tag)
    };
    let open = |key: [u8; 32], nonce: [u8; 12], aad: &[u8], (mut data, tag): ([u8; 36], [u8; 16])| {
        assert_eq!(HostAead::new(&key).open(&nonce, aad, &mut data, &tag), Err(Error::Crypto));
        assert!(!data.windows(4).any(|part| text.windows(4).any(|known| known == part)));
    };
    let (mut key, mut nonce) = ([3; 32], [7; 12]);
    key[31] ^= 1;
    open(key, nonce, b"aad", seal());
    nonce[11] ^= 0x80;
    open([3; 32], nonce, b"aad", seal());
    open([3; 32], [7; 12], b"aae", seal());
    for bit in 0..8 * 36 {
        let (mut data, tag) = seal();
        data[bit / 8] ^= 1 << (bit % 8);
        open([3; 32], [7; 12], b"aad", (data, tag));
    }
    for bit in 0..8 * 16 {
        let (data, mut tag) = seal();
        tag[bit / 8] ^= 1 << (bit % 8);
        open([3; 32], [7; 12], b"aad", (data, tag));
    }
}

// Keys

#[test]
fn keys_of_every_size_sign_and_verify() {
    for (pem, bits) in [(RSA_2048, 2048), (RSA_3072, 3072), (RSA_4096, 4096)] {
        let key = key(pem);
        assert_eq!(key.bits(), bits);
        let statement = statement(&key, 1);
        let signature = key.sign(&statement).unwrap();
        assert_eq!(signature.len(), bits / 8);
        assert!(verify(key.modulus(), &statement, &signature));

        let public = oracle(pem).to_public_key();
        let theirs = rsa::pss::Signature::try_from(&signature[..]).unwrap();
        let mut buffer = [0; Statement::MAX_LEN];
        rsa::pss::VerifyingKey::<Sha256>::new(public).verify(statement.message(&mut buffer), &theirs).unwrap();
    }
}

#[test]
fn two_signatures_of_one_statement_differ() {
    let key = key(RSA_2048);
    assert_ne!(key.sign_message(MESSAGE).unwrap(), key.sign_message(MESSAGE).unwrap());
}

#[test]
fn a_new_key_is_of_the_size_asked_for() {
    let key = IdentityKey::generate(2048).unwrap();
    assert_eq!(key.bits(), 2048);
    let signature = key.sign_message(MESSAGE).unwrap();
    assert!(verify_message(key.modulus(), MESSAGE, &signature));
    for bits in [0, 1024, 2047, 2049, 8192] {
        assert!(matches!(error(IdentityKey::generate(bits)), KeyError::Bits { bits: named } if named == bits));
    }
}

#[test]
fn other_keys_are_refused_by_name() {
    let refused = error(IdentityKey::from_pem(include_str!("keys/rsa1024.pem")));
    assert_eq!(refused.to_string(), "an RSA key has 2048, 3072 or 4096 bits here, not 1024");
    assert!(matches!(error(IdentityKey::from_pem(include_str!("keys/rsa2048-e3.pem"))), KeyError::Exponent));
    assert!(matches!(error(IdentityKey::from_pem(include_str!("keys/ec.pem"))), KeyError::Format));
    for garbage in ["", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n", "ssh-rsa AAAA"] {
        assert!(matches!(error(IdentityKey::from_pem(garbage)), KeyError::Format));
        assert!(matches!(error(IdentityKey::from_pkcs8(garbage.as_bytes())), KeyError::Format));
    }
}

#[test]
fn a_key_with_one_wrong_bit_is_refused_or_the_same() {
    let whole = key(RSA_2048);
    for at in (40..whole.pkcs8().len()).step_by(61) {
        let mut der = whole.pkcs8().to_vec();
        der[at] ^= 4;
        if let Ok(other) = IdentityKey::from_pkcs8(&der) {
            assert_eq!(other.pkcs8(), whole.pkcs8(), "byte {at}");
        }
    }
}

#[test]
fn components_rebuild_the_key() {
    for pem in [RSA_2048, RSA_3072] {
        let key = key(pem);
        let components = key.components().unwrap();
        let len = key.modulus().len();
        assert_eq!((components.d.len(), components.p.len(), components.q.len()), (len, len / 2, len / 2));
        let number = rsa::BoxedUint::from_be_slice_vartime;
        let primes = vec![number(&components.p), number(&components.q)];
        let rebuilt = rsa::RsaPrivateKey::from_components(
            number(key.modulus()),
            number(&EXPONENT),
            number(&components.d),
            primes,
        );
        assert!(rebuilt.unwrap() == oracle(pem));
    }
}

#[test]
fn numbers_take_exactly_the_width_of_their_field() {
    let number = rsa::BoxedUint::from_be_slice_vartime(&[1, 2, 3]);
    assert_eq!(*fixed_width(&number, 5).unwrap(), [0, 0, 1, 2, 3]);
    assert_eq!(*fixed_width(&number, 3).unwrap(), [1, 2, 3]);
    assert!(matches!(error(fixed_width(&number, 2)), KeyError::Failed));
}

#[test]
fn the_fingerprint_is_that_of_the_public_key_info() {
    use rsa::pkcs8::EncodePublicKey;
    let spki = oracle(RSA_3072).to_public_key().to_public_key_der().unwrap();
    let expected: [u8; 32] = Sha256::digest(spki.as_bytes()).into();
    assert_eq!(key(RSA_3072).fingerprint(), expected);
}

// Files

#[test]
fn a_key_survives_its_file() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("identity.pem");
    let saved = key(RSA_2048);
    saved.save(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing else is left behind");
    let loaded = IdentityKey::load(&path).unwrap();
    assert_eq!((loaded.modulus(), loaded.pkcs8()), (saved.modulus(), saved.pkcs8()));

    let der = home.path().join("identity.der");
    fs::write(&der, saved.pkcs8()).unwrap();
    fs::set_permissions(&der, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(IdentityKey::load(&der).unwrap().modulus(), saved.modulus());
}

#[test]
fn a_key_file_is_never_overwritten() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("identity.pem");
    fs::write(&path, "dear").unwrap();
    let refused = error(key(RSA_2048).save(&path));
    assert!(matches!(refused, KeyError::Exists { .. }));
    assert!(refused.to_string().contains("exists already: choose another place"), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "dear");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn a_key_file_that_others_can_open_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("identity.pem");
    key(RSA_2048).save(&path).unwrap();
    for mode in [0o640, 0o604, 0o620, 0o660, 0o777] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let refused = error(IdentityKey::load(&path)).to_string();
        let expected =
            format!("others can read the private key in {0} (mode {mode:04o}): run `chmod 600 {0}`", path.display());
        assert_eq!(refused, expected);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    assert!(IdentityKey::load(&path).is_ok());
}

#[test]
fn a_missing_or_endless_file_is_one_sentence() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("identity.pem");
    let refused = error(IdentityKey::load(&path)).to_string();
    assert!(refused.starts_with(&format!("cannot read {}: ", path.display())), "{refused}");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(matches!(error(IdentityKey::load(&path)), KeyError::Format));
    let refused = error(key(RSA_2048).save(&home.path().join("nowhere/identity.pem"))).to_string();
    assert!(refused.starts_with("cannot write "), "{refused}");
}

// Verification

#[test]
fn only_the_right_key_message_and_signature_verify() {
    let (signer, other) = (key(RSA_2048), key(RSA_3072));
    let signature = signer.sign_message(MESSAGE).unwrap();
    assert!(verify_message(signer.modulus(), MESSAGE, &signature));
    assert!(!verify_message(signer.modulus(), b"what is not signed", &signature));
    assert!(!verify_message(other.modulus(), MESSAGE, &signature));
    for bit in (0..2048).step_by(97) {
        let mut forged = signature.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        assert!(!verify_message(signer.modulus(), MESSAGE, &forged), "bit {bit}");
    }
    for len in [0, 1, 255, 257, 384, 512, 10_000] {
        let mut forged = signature.clone();
        forged.resize(len, 0);
        assert!(!verify_message(signer.modulus(), MESSAGE, &forged), "{len} bytes");
    }
    for forged in [vec![0; 256], vec![0xff; 256], signer.modulus().to_vec()] {
        assert!(!verify_message(signer.modulus(), MESSAGE, &forged));
    }
}

#[test]
fn a_statement_verifies_only_as_itself() {
    let key = key(RSA_2048);
    let signature = key.sign(&statement(&key, 1)).unwrap();
    assert!(verify(key.modulus(), &statement(&key, 1), &signature));
    assert!(!verify(key.modulus(), &statement(&key, 2), &signature));
}

#[test]
fn the_salt_has_32_bytes_and_the_padding_is_pss() {
    let signer = key(RSA_2048);
    let mut rng = getrandom::SysRng;
    for (salt, accepted) in [(0, false), (20, false), (31, false), (32, true), (33, false), (222, false)] {
        let key = rsa::pss::SigningKey::<Sha256>::new_with_salt_len(oracle(RSA_2048), salt);
        let signature = key.try_sign_with_rng(&mut rng, MESSAGE).unwrap().to_vec();
        assert_eq!(verify_message(signer.modulus(), MESSAGE, &signature), accepted, "salt of {salt}");
    }
    let other = rsa::pkcs1v15::SigningKey::<Sha256>::new(oracle(RSA_2048));
    let signature = other.try_sign_with_rng(&mut rng, MESSAGE).unwrap().to_vec();
    assert!(!verify_message(signer.modulus(), MESSAGE, &signature));
    let other = rsa::pss::SigningKey::<Sha512>::new_with_salt_len(oracle(RSA_2048), 32);
    let signature = other.try_sign_with_rng(&mut rng, MESSAGE).unwrap().to_vec();
    assert!(!verify_message(signer.modulus(), MESSAGE, &signature));
}

#[test]
fn strange_moduli_verify_nothing() {
    let signer = key(RSA_2048);
    let signature = signer.sign_message(MESSAGE).unwrap();
    let mut even = signer.modulus().to_vec();
    even[255] &= 0xfe;
    let mut short = signer.modulus().to_vec();
    short[0] = 0;
    for modulus in [&[][..], &[0; 256], &even, &short, &signer.modulus()[..255], dummy_key()] {
        assert!(!verify_message(modulus, MESSAGE, &signature));
    }
}

#[test]
fn there_is_a_dummy_for_every_length_of_signature() {
    for len in [256, 384, 512] {
        let modulus = dummy(len).unwrap();
        let public = PublicKey::from_modulus(modulus).unwrap();
        assert_eq!(public.signature_len(), len);
        // Signatures of 1 verify the same way as others: an exponentiation and a refusal, with no early way out.
        let mut one = vec![0; len];
        one[len - 1] = 1;
        assert!(!verify_message(modulus, MESSAGE, &one));
    }
    assert_eq!(dummy(1024), None);
    assert_eq!(dummy_key().len(), 256);
}

// The pool

#[tokio::test]
async fn the_pool_signs_verifies_and_counts() {
    let pool = CryptoPool::start().unwrap();
    let key = Arc::new(key(RSA_2048));
    let statement = statement(&key, 1);
    let signature = pool.sign(Arc::clone(&key), statement).await.unwrap();
    assert_eq!(pool.verify(key.modulus().to_vec(), statement, signature.clone()).await, Ok(true));
    assert_eq!(pool.verify(dummy_key().to_vec(), statement, signature).await, Ok(false));
    assert_eq!((pool.signs(), pool.verifies()), (1, 2));
}

/// A job that says when it has begun and waits until it is told to end.
fn blocker() -> (impl FnOnce(&Done) + Send + 'static, Receiver<()>, Sender<()>) {
    let (begun, has_begun) = channel();
    let (end, may_end) = channel::<()>();
    let job = move |_: &Done| {
        begun.send(()).unwrap();
        let _ = may_end.recv();
    };
    (job, has_begun, end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_pool_says_so_at_once_and_goes_on_later() {
    let pool = Arc::new(CryptoPool::new(1, 2).unwrap());
    let (job, has_begun, end) = blocker();
    let running = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.run(Lane::Signatures, job).await }
    });
    has_begun.recv().unwrap();
    let mut first = Box::pin(pool.run(Lane::Verifications, |_| 1));
    let mut second = Box::pin(pool.run(Lane::Verifications, |_| 2));
    tokio::select! {
        biased;
        _ = &mut first => panic!("the only thread is busy"),
        _ = &mut second => panic!("the only thread is busy"),
        () = core::future::ready(()) => {}
    }
    let key = Arc::new(key(RSA_2048));
    let statement = statement(&key, 1);
    assert_eq!(pool.verify(key.modulus().to_vec(), statement, vec![0; 256]).await, Err(PoolError::Full));
    end.send(()).unwrap();
    assert_eq!(running.await.unwrap(), Ok(()));
    assert_eq!((first.await, second.await), (Ok(1), Ok(2)));
    assert!(pool.sign(key, statement).await.is_ok());
    assert_eq!((pool.signs(), pool.verifies()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_signature_gives_way_and_verifications_come_first() {
    let pool = Arc::new(CryptoPool::new(1, 2).unwrap());
    let (job, has_begun, end) = blocker();
    let running = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.run(Lane::Signatures, job).await }
    });
    has_begun.recv().unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let said = |lane, word| {
        let order = Arc::clone(&order);
        let ran = pool.run(lane, move |_| order.lock().unwrap().push(word));
        let mut ran = Box::pin(ran);
        // In the queue, once it was polled.
        assert!(futures_util::FutureExt::now_or_never(&mut ran).is_none());
        ran
    };
    let (oldest, older) = (said(Lane::Signatures, 1), said(Lane::Signatures, 2));
    assert_eq!(pool.waiting(), 2);
    let (newest, verified) = (said(Lane::Signatures, 3), said(Lane::Verifications, 4));
    assert_eq!(pool.waiting(), 2);
    assert_eq!(oldest.await, Err(PoolError::Full));
    end.send(()).unwrap();
    assert_eq!((running.await.unwrap(), older.await, newest.await, verified.await), (Ok(()), Ok(()), Ok(()), Ok(())));
    assert_eq!(*order.lock().unwrap(), [4, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_callers_who_left_are_skipped() {
    let pool = Arc::new(CryptoPool::new(1, 8).unwrap());
    let (job, has_begun, end) = blocker();
    let running = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.run(Lane::Signatures, job).await }
    });
    has_begun.recv().unwrap();
    let key = Arc::new(key(RSA_2048));
    {
        let mut left = Box::pin(pool.sign(Arc::clone(&key), statement(&key, 1)));
        tokio::select! {
            biased;
            _ = &mut left => panic!("the only thread is busy"),
            () = core::future::ready(()) => {}
        }
    }
    end.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert_eq!(pool.run(Lane::Signatures, |_| 3).await, Ok(3), "the queue is in order, so the job left behind is over");
    assert_eq!(pool.signs(), 0);
    assert_eq!(Arc::strong_count(&key), 1, "a skipped job frees what it held");
}

#[test]
fn threads_end_with_the_pool() {
    let pool = CryptoPool::new(3, 8).unwrap();
    let done: Weak<Done> = Arc::downgrade(&pool.done);
    drop(pool);
    assert_eq!(done.strong_count(), 0);
}
