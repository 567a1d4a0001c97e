//! Properties of the core: random sequences of steps, run against it and against a model of it that is a few lines long.
//! Whatever the sequence is, both must say the same: what arrived, what was refused and why, what changed.
//!
//! The everyday run is the same each time. The campaign draws new sequences, as many as it is told to:
//! `PROPTEST_CASES=100000 cargo test --release -p ossicle-tests --test properties`. A sequence that fails is made as short as
//! possible, printed, and its seed written to `properties/*.regressions`: commit it, it is tried first from then on.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

#[path = "properties/chain.rs"]
mod chain;
#[path = "properties/client.rs"]
mod client;
#[path = "properties/connection.rs"]
mod connection;
#[path = "properties/group.rs"]
mod group;
#[path = "properties/post.rs"]
mod post;

use core::cell::RefCell;
use core::fmt::Debug;
use std::collections::BTreeMap;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, FileFailurePersistence, RngSeed, TestRunner};

/// How often a run came to each of the things that its model names.
#[derive(Default)]
struct Reached(RefCell<BTreeMap<&'static str, u64>>);

impl Reached {
    fn note(&self, what: &'static str) {
        *self.0.borrow_mut().entry(what).or_default() += 1;
    }
}

/// Runs `test` with `cases` random values, or as many as the environment says, and fails unless they came to everything in
/// `must_reach`. `regressions` is the file in which the seeds of failures are kept.
fn check<S: Strategy<Value: Debug>>(
    regressions: &'static str,
    cases: u32,
    must_reach: &[&'static str],
    values: &S,
    test: impl Fn(S::Value, &Reached),
) {
    let persistence = FileFailurePersistence::Direct(regressions);
    let mut config = Config { failure_persistence: Some(Box::new(persistence)), ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config = Config { cases, rng_seed: RngSeed::Fixed(0x0551_c1e0), ..config };
    }
    let cases = config.cases;
    let reached = Reached::default();
    let mut runner = TestRunner::new(config);
    if let Err(error) = runner.run(values, |value| {
        test(value, &reached);
        Ok(())
    }) {
        panic!("{error}");
    }
    let reached = reached.0.into_inner();
    println!("{cases} sequences came to {reached:?}");
    let missing: Vec<_> = must_reach.iter().filter(|what| !reached.contains_key(*what)).collect();
    assert!(missing.is_empty(), "no sequence came to {missing:?}");
    let unnamed: Vec<_> = reached.keys().filter(|what| !must_reach.contains(what)).collect();
    assert!(unnamed.is_empty(), "the model does not name {unnamed:?}");
}
