//! Bundles, decisions, rotations and keys: what a directory says of others, and what signatures make of it.
//!
//! An input is a byte of options and a script: a byte a step, with its operands. Bit 0: cryptography is the stub, as far as
//! it is not RSA. Bit 1: signatures of identities were verified before, so that it is the rules behind them that decide.

use ossicle_core::{
    BUNDLE_LEN, Bundle, BundleError, BundleKeys, BundleView, Conversation, Decision, FORMER, GroupFlags, MAX_MEMBERS,
    MAX_SPKI_LEN, Member, Prekeys, PublicKey, Rotation, Secret, members_hash, verify_rsa,
};

use crate::script::{Rng, Script, Stub, long};
use crate::{Reached, Target, keys};

/// See the module.
pub const TARGET: Target = Target { name: "bundle", run, states, seeds };

const STUB: u8 = 1;
const VERIFIED: u8 = 1 << 1;

fn states() -> Vec<&'static str> {
    vec![
        "bundle forked",
        "bundle malformed",
        "bundle not signed",
        "bundle of another",
        "bundle older",
        "bundle pinned",
        "bundle updated",
        "bundle verified",
        "bundle with another key",
        "decision refused",
        "decision verified",
        "key decoded",
        "key refused",
        "members hashed",
        "members refused",
        "prekey rotated",
        "prekeys forgotten",
        "rotation refused",
        "rotation verified",
        "signature by a made-up key refused",
    ]
}

fn member() -> Member {
    Member { id: [0xa1; 16], key: keys::alice().public().fingerprint() }
}

fn bundle_keys() -> BundleKeys {
    BundleKeys::generate(7, &mut Rng::new(1)).expect("the generator does not fail")
}

fn conversation() -> Conversation {
    let other = Member { id: [0xb2; 16], key: [2; 32] };
    Conversation::group([9; 16], 1, &[member(), other]).expect("sorted")
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let _stub = Stub::set(bits & STUB != 0);
    let mut directory = Directory { bits, view: None, bundle: None, own: bundle_keys(), prekeys: Prekeys::new() };
    // RSA is dear: no script verifies more often than this.
    for _ in 0..32 {
        if directory.step(&mut script, reached).is_none() {
            break;
        }
    }
}

struct Directory {
    bits: u8,
    /// What is remembered of the client.
    view: Option<BundleView>,
    /// The newest bundle that was taken.
    bundle: Option<Bundle>,
    own: BundleKeys,
    prekeys: Prekeys,
}

impl Directory {
    fn step(&mut self, script: &mut Script<'_>, reached: Reached<'_>) -> Option<()> {
        match script.u8()? % 7 {
            0 => {
                let (bytes, signature) = (script.long()?, script.long()?);
                self.bundle(bytes, signature, reached);
            }
            1 => {
                let (which, signature) = (script.u8()?, script.long()?);
                let signature = signature.try_into().ok()?;
                let decisions =
                    [Decision::Init(GroupFlags::NONE), Decision::Accept, Decision::Decline, Decision::Close];
                let decision = decisions[usize::from(which) % decisions.len()];
                let verified = decision.verify(self.bundle.as_ref()?, &conversation(), signature);
                reached(if verified.is_ok() { "decision verified" } else { "decision refused" });
                if verified.is_ok() && self.bits & STUB == 0 {
                    let others = decisions.into_iter().filter(|other| *other != decision);
                    for other in others {
                        let verified = other.verify(self.bundle.as_ref()?, &conversation(), signature);
                        assert!(verified.is_err(), "a signature decides one thing");
                    }
                }
            }
            2 => {
                let (version, bytes) = (script.u16()?, script.long()?);
                let member = |bytes: &[u8; 48]| Member {
                    id: *bytes.first_chunk().expect("48 bytes"),
                    key: *bytes.last_chunk().expect("48 bytes"),
                };
                let members: Vec<_> = bytes.as_chunks::<48>().0.iter().map(member).collect();
                let is_sorted = members.windows(2).all(|pair| pair[0].id < pair[1].id);
                let hashed = members_hash(&[9; 16], version.into(), &members);
                assert_eq!(hashed.is_ok(), is_sorted && (1..=MAX_MEMBERS).contains(&members.len()));
                reached(if hashed.is_ok() { "members hashed" } else { "members refused" });
            }
            3 => {
                let (next, signature) = (script.long()?, script.long()?);
                let next = next.try_into().ok()?;
                let rotation = Rotation { id: member().id, former: member().key, next, key_epoch: 1 };
                let verified = verify_rsa(keys::alice().public(), &rotation.statement(), signature).is_ok();
                reached(if verified { "rotation verified" } else { "rotation refused" });
                let possession = rotation.possession(&Secret::new([1; 32]));
                assert!(
                    verify_rsa(keys::alice().public(), &possession, signature).is_err(),
                    "a statement is not another"
                );
            }
            4 => match PublicKey::from_spki(script.long()?) {
                Ok(key) => {
                    reached("key decoded");
                    let mut buffer = [0; MAX_SPKI_LEN];
                    assert_eq!(PublicKey::from_spki(key.spki(&mut buffer)), Ok(key), "a key has one form");
                    assert_eq!(PublicKey::from_modulus(key.modulus()), Ok(key));
                }
                Err(_) => reached("key refused"),
            },
            5 => {
                let (modulus, signature) = (script.long()?, script.long()?);
                let key = PublicKey::from_modulus(modulus).ok()?;
                let statement = Bundle::decode(&[7; BUNDLE_LEN]).expect("any bytes are a bundle").statement();
                if verify_rsa(key, &statement, signature).is_err() {
                    reached("signature by a made-up key refused");
                }
            }
            _ => {
                let forget = script.u8()?;
                let member = member();
                let bundle = self.own.bundle(&member, 1, [0; 32]);
                self.prekeys.insert(self.own.prekey(&bundle).expect("its own bundle"));
                assert!(self.prekeys.iter().count() <= 1 + FORMER);
                assert!(self.prekeys.find(self.own.prekey_id()).is_some());
                if self.own.rotate(&mut Rng::new(forget)).is_ok() {
                    assert!(self.own.prekey(&bundle).is_err(), "the prekey of a bundle that is past");
                    reached("prekey rotated");
                }
                let held = self.prekeys.iter().count();
                self.prekeys.forget(forget.into());
                if self.prekeys.iter().count() < held {
                    reached("prekeys forgotten");
                }
            }
        }
        Some(())
    }

    fn bundle(&mut self, bytes: &[u8], signature: &[u8], reached: Reached<'_>) {
        let Ok(bundle) = Bundle::decode(bytes) else {
            assert_ne!(bytes.len(), BUNDLE_LEN);
            return reached("bundle malformed");
        };
        assert_eq!(bundle.encode()[..], *bytes, "a bundle has one form");
        if self.bits & VERIFIED == 0 {
            if verify_rsa(keys::alice().public(), &bundle.statement(), signature).is_err() {
                return reached("bundle not signed");
            }
            reached("bundle verified");
        }
        let Some(view) = &mut self.view else {
            self.view = Some(BundleView::new(&bundle));
            self.bundle = Some(bundle);
            return reached("bundle pinned");
        };
        let before = *view;
        match view.update(&bundle) {
            Ok(()) => {
                assert_eq!(view.member, before.member, "a pin does not change");
                assert!(view.epoch > before.epoch || *view == before, "a view goes forward or stays");
                assert_eq!(view.update(&bundle), Ok(()), "the same bundle again is no news");
                self.bundle = Some(bundle);
                reached("bundle updated");
            }
            Err(error) => {
                assert_eq!(*view, before, "a refused bundle changes nothing");
                reached(match error {
                    BundleError::Forked => "bundle forked",
                    BundleError::KeyChanged => "bundle with another key",
                    BundleError::Older => "bundle older",
                    BundleError::OtherMember => "bundle of another",
                    other => panic!("a refusal that nobody told the targets of: {other:?}"),
                });
            }
        }
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let alice = keys::alice();
    let own = bundle_keys();
    let first = own.bundle(&member(), 3, [0; 32]);
    let second = own.bundle(&member(), 4, first.hash());
    let publish = |bundle: &Bundle, signature: &[u8]| [&[0][..], &long(&bundle.encode()), &long(signature)].concat();
    let signed = |bundle: &Bundle| publish(bundle, &alice.sign(&bundle.statement()));
    let unsigned = |bundle: &Bundle| publish(bundle, &[]);
    let decide =
        |which: u8, decision: Decision| [&[1, which][..], &long(&decision.sign(&own, &conversation()))].concat();
    let members = |ids: &[u8]| {
        let fields: Vec<u8> = ids.iter().flat_map(|id| [*id; 48]).collect();
        [&[2, 0, 1][..], &long(&fields)].concat()
    };
    let rotation = Rotation { id: member().id, former: member().key, next: [5; 32], key_epoch: 1 };
    let rotate = |signature: &[u8]| [&[3][..], &long(&[5; 32]), &long(signature)].concat();
    let key = |spki: &[u8]| [&[4][..], &long(spki)].concat();
    let made_up = |modulus: &[u8], signature: &[u8]| [&[5][..], &long(modulus), &long(signature)].concat();
    let script = |bits: u8, steps: &[Vec<u8>]| [&[bits][..], &steps.concat()].concat();
    let mut spki = [0; MAX_SPKI_LEN];
    let spki = alice.public().spki(&mut spki).to_vec();
    let signature = alice.sign(&rotation.statement());

    let forked = Bundle { prekey: [1; 32], ..second };
    let skipping = Bundle { epoch: 9, previous: [3; 32], ..second };
    let rules = [&first, &second, &second, &first, &forked, &skipping, &Bundle { epoch: 10, ..skipping }];
    let strangers = [&first, &Bundle { id: [1; 16], ..second }, &Bundle { key: [1; 32], ..second }];
    vec![
        (
            "verified",
            script(
                0,
                &[
                    signed(&first),
                    signed(&second),
                    decide(0, Decision::Init(GroupFlags::NONE)),
                    decide(1, Decision::Close),
                ],
            ),
        ),
        (
            "not-signed",
            script(0, &[publish(&first, &[1; 256]), vec![0, 0, 1, 7, 0, 0], signed(&first), signed(&forked)]),
        ),
        ("rules", script(VERIFIED, &rules.map(unsigned))),
        ("strangers", script(VERIFIED, &strangers.map(unsigned))),
        (
            "decisions-stub",
            script(
                STUB | VERIFIED,
                &[unsigned(&first), [&[1, 2][..], &long(&[0x53; 64])].concat(), decide(3, Decision::Close)],
            ),
        ),
        ("members", script(0, &[members(&[1, 2, 3]), members(&[2, 1]), members(&[])])),
        ("rotation", script(0, &[rotate(&signature), rotate(&signature[1..])])),
        ("keys", script(0, &[key(&spki), key(&spki[1..]), made_up(alice.public().modulus(), &[1; 256])])),
        ("made-up-key", script(0, &[made_up(&[0xff; 384], &[1; 384]), made_up(&[0x81; 512], &[0x80; 512])])),
        (
            "prekeys",
            script(
                0,
                &[vec![6, 0], vec![6, 7], vec![6, 8], vec![6, 1], vec![6, 2], vec![6, 3], vec![6, 4], vec![6, 5]],
            ),
        ),
    ]
}
