//! The seeds: there, those of the honest runs, and enough to reach what their target is named for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{TARGETS, Target};

/// The stub is on or off for the whole process: one target at a time.
static ONE: Mutex<()> = Mutex::new(());

fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name)
}

fn committed(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder(target))
        .unwrap_or_else(|error| panic!("{}: {error}", target.name))
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
#[cfg_attr(miri, ignore = "too slow for an interpreter: RSA and curves; `interpreted` runs what needs none")]
fn the_seeds_alone_reach_what_each_target_is_named_for() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        let mut reached = BTreeSet::new();
        let seeds = committed(target);
        for (_, seed) in &seeds {
            (target.run)(seed, &mut |state| {
                reached.insert(state);
            });
        }
        let states: BTreeSet<_> = (target.states)().into_iter().collect();
        let missing: Vec<_> = states.difference(&reached).collect();
        assert!(missing.is_empty(), "the seeds of {} do not reach {missing:?}", target.name);
        let unnamed: Vec<_> = reached.difference(&states).collect();
        assert!(unnamed.is_empty(), "{} does not name {unnamed:?}", target.name);
        println!("{}: {} seeds reach {} states", target.name, seeds.len(), states.len());
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow for an interpreter: RSA and curves; `interpreted` runs what needs none")]
fn the_seeds_are_those_of_the_honest_runs() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        let mut made: Vec<_> = (target.seeds)().into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        made.sort();
        let committed = committed(target);
        let names = |seeds: &[(String, Vec<u8>)]| seeds.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&committed), names(&made), "{}: run ./run.sh --seeds", target.name);
        for (committed, made) in committed.iter().zip(&made) {
            assert!(committed == made, "{}/{}: run ./run.sh --seeds", target.name, made.0);
        }
    }
}

/// What a fuzzer tries first, on every target.
#[test]
#[cfg_attr(miri, ignore = "too slow for an interpreter: RSA and curves; `interpreted` runs what needs none")]
fn no_cut_and_no_flipped_bit_of_a_seed_breaks_its_target() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        for (_, seed) in committed(target) {
            let every = seed.len() / 64 + 1;
            for cut in (0..seed.len()).step_by(every) {
                (target.run)(&seed[..cut], &mut super::ignore);
                let mut flipped = seed.clone();
                flipped[cut] ^= 1 << (cut % 8);
                (target.run)(&flipped, &mut super::ignore);
            }
        }
    }
}

#[test]
fn every_target_has_a_binary() {
    let manifest = include_str!("../Cargo.toml");
    let binaries: BTreeSet<_> = manifest
        .split("[[bin]]")
        .skip(1)
        .filter_map(|section| section.lines().find_map(|line| line.strip_prefix("name = ")))
        .map(|name| name.trim_matches('"'))
        .collect();
    assert_eq!(binaries, TARGETS.iter().map(|target| target.name).collect());
}

/// What an interpreter can run: each target with those of its seeds that need neither RSA nor a curve.
mod interpreted {
    use super::*;

    /// Whether this seed is for the stub, or for a target that needs no cryptography but hashes.
    fn is_cheap(target: &Target, seed: &[u8]) -> bool {
        let options = seed.first().copied().unwrap_or_default();
        match target.name {
            "catalogue" | "device" => true,
            // Bit 1 asks for the verdict on a signature.
            "page" => options & 2 == 0,
            _ => options & 1 == 1,
        }
    }

    fn run(name: &str, must_reach: &[&str]) {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        let (mut reached, mut seeds) = (BTreeSet::new(), 0);
        for (_, seed) in committed(target).iter().filter(|(_, seed)| is_cheap(target, seed)) {
            (target.run)(seed, &mut |state| {
                reached.insert(state);
            });
            seeds += 1;
        }
        let missing: Vec<_> = must_reach.iter().filter(|state| !reached.contains(*state)).collect();
        assert!(missing.is_empty(), "{seeds} seeds of {name} do not reach {missing:?}");
        println!("{name}: {seeds} seeds reach {} states without RSA and curves", reached.len());
    }

    macro_rules! targets {
        ($($name:ident: $($state:literal),+;)*) => {
            $(#[test]
            fn $name() {
                run(stringify!($name), &[$($state),+]);
            })*

            #[test]
            fn no_target_is_left_out() {
                assert_eq!(BTreeSet::from([$(stringify!($name)),*]), TARGETS.iter().map(|target| target.name).collect());
            }
        };
    }

    targets! {
        bundle: "decision verified", "bundle pinned";
        catalogue: "malformed";
        client: "handshake finished", "message", "key updated", "closed";
        device: "resumed", "peer ready", "message opened", "receipt", "closed";
        envelope: "wrap accepted", "envelope opened", "late envelope opened", "chain stored and read again", "duplicate";
        link: "handshake finished", "resumption finished", "records swapped", "record made up", "key updated";
        page: "page accepted", "broken", "missing";
        record: "record opened", "forgery refused", "key exhausted";
        resumption: "resumption finished", "message", "closed";
        server: "handshake finished", "token proved", "message", "key updated", "closed";
    }
}
