//! A server that is killed again and again under load keeps its word.
//!
//! `KILLS=1000 cargo test --release -p ossicle-tests --test campaign -- --nocapture` is the long run; `SEED` takes one up
//! again.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::path::Path;
use std::process::Command;

use ossicle::store::{SqliteStore, Store};
use ossicle_tests::campaign::{self, Place, Plan, recipient_id};
use ossicle_tests::cli::binary;
use tokio::runtime::Handle;

fn number<N: core::str::FromStr>(variable: &str) -> Option<N> {
    std::env::var(variable).ok().map(|text| text.parse().ok().expect("a number"))
}

/// The everyday run.
fn plan(seed: u64) -> Plan {
    println!("SEED={seed}");
    let pause = Duration::from_millis(800);
    Plan { seed, kills: 25, rate: 6000, senders: 5, recipients: 5, homes: 3, pause, away: false }
}

fn place(plan: &Plan) -> Place {
    Place::new(&mut fastrand::Rng::with_seed(plan.seed), None, || Command::new(binary()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_survives_kills_under_load() {
    let mut plan = plan(number("SEED").unwrap_or_else(|| getrandom::u64().unwrap()));
    plan.kills = number("KILLS").unwrap_or(plan.kills);
    let figures = campaign::run(&plan, place(&plan), |_| {}, |line| println!("{line}")).await;
    println!("{figures}");
    assert!(figures.kills + figures.stops >= plan.kills && figures.given > 0 && figures.letters > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[should_panic(expected = "stored, and lost")]
async fn the_harness_sees_what_a_server_loses() {
    let plan = Plan { homes: 0, away: true, ..plan(1) };
    // As if everybody had acknowledged everything.
    let lose = |data: &Path| {
        let store = SqliteStore::open(data).unwrap();
        Handle::current().block_on(async {
            for recipient in 0..plan.recipients {
                store.acknowledge(&recipient_id(recipient), u64::MAX >> 1).await.unwrap();
            }
        });
    };
    campaign::run(&plan, place(&plan), lose, |_| {}).await;
}
