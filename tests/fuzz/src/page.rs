//! Identity pages: what firmware reads from a region of flash that anybody may have written.
//!
//! An input is a byte of options and the region. Bit 0: the head is made to fit, so that the checksum is no wall. Bit 1: the
//! owner's signature over its bundle is verified, with real cryptography.

use ossicle_core::fuzzing::finish_page;
use ossicle_core::{
    Bundle, GroupPolicy, IdentityPage, MAX_PAGE_LEN, MAX_RSA_LEN, PageError, PageKey, PageOwner, RsaKey, verify_rsa,
};

use crate::script::Script;
use crate::{Reached, Target, keys};

/// See the module.
pub const TARGET: Target = Target { name: "page", run, states, seeds };

const FINISH: u8 = 1;
const VERIFY: u8 = 2;

fn states() -> Vec<&'static str> {
    vec!["broken", "key loaded", "missing", "other version", "owner's bundle verified", "page accepted"]
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(options) = script.u8() else { return };
    let mut region = script.rest().to_vec();
    if options & FINISH != 0 {
        finish_page(&mut region);
    }
    let page = match IdentityPage::decode(&region) {
        Ok(page) => page,
        Err(PageError::Missing) => return reached("missing"),
        Err(PageError::Version) => return reached("other version"),
        Err(error) => {
            assert_eq!(error, PageError::Broken);
            return reached("broken");
        }
    };
    reached("page accepted");
    let mut again = [0; MAX_PAGE_LEN];
    let len = page.encode(&mut again).expect("what was read can be written");
    assert_eq!(again[..len], region[..len], "a page has one form");
    let key = RsaKey::new(page.key.d, page.key.p, page.key.q).expect("the lengths are those of a key");
    if key.public(&mut [0; MAX_RSA_LEN]).is_ok() {
        reached("key loaded");
    }
    if options & VERIFY != 0 && verify_rsa(page.owner.key, &page.owner.bundle.statement(), page.owner.signature).is_ok()
    {
        reached("owner's bundle verified");
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let owner = keys::alice();
    let (d, p, q) = keys::carol().parts();
    let bundle = Bundle {
        id: [0xa1; 16],
        key: owner.public().fingerprint(),
        epoch: 3,
        exchange: [4; 32],
        prekey: [5; 32],
        prekey_id: 6,
        verifying: [7; 32],
        previous: [8; 32],
    };
    let signature = owner.sign(&bundle.statement());
    let key = PageKey {
        d: d.try_into().expect("2048 bits"),
        p: p.try_into().expect("2048 bits"),
        q: q.try_into().expect("2048 bits"),
    };
    let page = IdentityPage {
        id: [0xb0; 16],
        name: "sensor-01",
        key,
        address: [10, 0, 2, 2],
        port: 5150,
        server: keys::server3072().public(),
        owner: PageOwner { id: bundle.id, name: "alice", key: owner.public(), bundle, signature: &signature },
        groups: GroupPolicy::Owner,
    };
    let mut region = [0xff; MAX_PAGE_LEN];
    let len = page.encode(&mut region).expect("a page");
    let with = |options: u8, region: &[u8]| [&[options], region].concat();
    let mut other_version = region[..64].to_vec();
    other_version[9] = 3;
    // What was written before there was a policy.
    let mut first_version = [0xff; MAX_PAGE_LEN];
    let page = IdentityPage { groups: GroupPolicy::None, ..page };
    page.encode(&mut first_version).expect("a page");
    vec![
        ("whole-region", with(0, &region)),
        ("checked", with(FINISH | VERIFY, &region[..len])),
        ("fitting", with(FINISH, &region[..len])),
        ("cut", with(0, &region[..len - 1])),
        ("erased", with(0, &[0xff; 64])),
        ("other-version", with(0, &other_version)),
        ("first-version", with(0, &first_version)),
    ]
}
