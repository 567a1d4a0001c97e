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
