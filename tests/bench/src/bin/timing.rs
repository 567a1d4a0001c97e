//! Whether secrets show in how long something takes: pairs of inputs that an attacker must not tell apart, timed in random
//! order and compared as in "Dude, is my code constant time?" (Reparaz, Balasch, Verbauwhede; DATE 2017).
//!
//! `cargo run --release -p ossicle-bench --bin timing [SAMPLES]`; a million samples take some minutes, and an otherwise idle
//! machine. It prints the largest |t| of each pair, over all samples and without the slowest ones, and fails if one is
//! 4.5 or more; a comparison that stops at the first difference is told apart, too, as a check of the check.

use core::hint::black_box;
use std::time::Instant;

use ossicle::crypto::{HostAead, IdentityKey};
use ossicle::limits::{Rate, Rates};
use ossicle::server::Config;
use ossicle_core::{Aead, RustCrypto};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Node, RECORD_LIMIT, enrolled, open};

type Failure = Box<dyn core::error::Error>;

/// What is told apart by chance once in 10^5 campaigns.
const LIMIT: f64 = 4.5;
/// Shares of the samples, the quickest first, that are compared: interruptions hide what is small.
const CROPS: [f64; 5] = [1.0, 0.99, 0.95, 0.8, 0.5];

fn main() -> Result<(), Failure> {
    let samples = match std::env::args().nth(1) {
        Some(samples) => samples.parse().map_err(|_| "usage: timing [SAMPLES], a number")?,
        None => 1_000_000,
    };
    // A handshake takes as long as thousands of tags.
    let refusals = samples / 50;
    let mut failed = Vec::new();
    let mut campaign = |name: &str, samples: usize, told_apart: bool, t: f64| {
        println!("{name:58} {samples:>9} samples  max |t| {t:6.2}");
        if (t >= LIMIT) != told_apart {
            failed.push(name.to_owned());
        }
    };

    campaign("a comparison that stops early (must be told apart)", samples, true, early_exit(samples)?);
    campaign("tag, first or last byte wrong, AES-GCM of hosts", samples, false, tag::<HostAead>(samples)?);
    campaign("tag, first or last byte wrong, AES-GCM of devices", samples, false, tag::<RustCrypto>(samples)?);
    // Whose id is claimed, and whose key.
    let (right, unknown, other) = ((1, keys::alice()), (2, keys::alice()), (1, keys::bob()));
    let t = refusal(refusals, [(1, keys::alice()), unknown])?;
    campaign("wrong signature or unknown id, at the server", refusals, false, t);
    campaign("wrong signature or another key, at the server", refusals, false, refusal(refusals, [right, other])?);
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("not as it must be (run it again on an idle machine): {}", failed.join("; ")).into())
}

/// Times `run` on inputs of two classes in random order.
struct Samples {
    times: [Vec<u64>; 2],
}

impl Samples {
    fn new(samples: usize) -> Self {
        Self { times: [Vec::with_capacity(samples), Vec::with_capacity(samples)] }
    }

    fn time<T>(&mut self, class: usize, run: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = black_box(run());
        self.times[class].push(begun.elapsed().as_nanos() as u64);
        result
    }

    /// The largest |t| of Welch's test over all crops.
    fn t(mut self) -> f64 {
        let mut all: Vec<u64> = self.times.iter().flatten().copied().collect();
        all.sort_unstable();
        let mut largest = 0.0_f64;
        for share in CROPS {
            let longest = all[((all.len() - 1) as f64 * share) as usize];
            let [(n, mean, variance), (m, other, spread)] = self.times.each_mut().map(|times| {
                let kept: Vec<f64> = times.iter().filter(|time| **time <= longest).map(|time| *time as f64).collect();
                let n = kept.len() as f64;
                let mean = kept.iter().sum::<f64>() / n;
                (n, mean, kept.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (n - 1.0))
            });
            let error = (variance / n + spread / m).sqrt();
            if error > 0.0 {
                largest = largest.max(((mean - other) / error).abs());
            }
        }
        largest
    }
}

/// One random bit after the other.
struct Coin {
    bytes: [u8; 4096],
    next: usize,
}

impl Coin {
    const fn new() -> Self {
        Self { bytes: [0; 4096], next: 4096 }
    }

    fn flip(&mut self) -> Result<usize, Failure> {
        if self.next == self.bytes.len() {
            getrandom::fill(&mut self.bytes)?;
            self.next = 0;
        }
        self.next += 1;
        Ok(usize::from(self.bytes[self.next - 1] & 1))
    }
}

fn early_exit(samples: usize) -> Result<f64, Failure> {
    let (mut timed, mut coin) = (Samples::new(samples), Coin::new());
    let secret = [7_u8; 4096];
    for _ in 0..samples {
        let class = coin.flip()?;
        let mut guess = secret;
        guess[if class == 0 { 0 } else { 4095 }] ^= 1;
        timed.time(class, || secret.iter().zip(black_box(&guess)).all(|(secret, guess)| black_box(secret == guess)));
    }
    Ok(timed.t())
}

fn tag<A: Aead>(samples: usize) -> Result<f64, Failure> {
    let (mut timed, mut coin) = (Samples::new(samples), Coin::new());
    let cipher = A::new(&[3; 32]);
    let mut sealed = [5; 64];
    let right = cipher.seal(&[1; 12], b"head", &mut sealed)?;
    for _ in 0..samples {
        let class = coin.flip()?;
        let (mut data, mut tag) = (sealed, right);
        tag[if class == 0 { 0 } else { 15 }] ^= 1;
        timed.time(class, || cipher.open(&[1; 12], b"head", black_box(&mut data), black_box(&tag)).is_ok());
    }
    Ok(timed.t())
}

/// From {ClientAuth} to the refusal, over loopback, of two claims that alice's key did not sign.
fn refusal(samples: usize, claims: [(u8, IdentityKey); 2]) -> Result<f64, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (mut timed, mut coin) = (Samples::new(samples), Coin::new());
    let plenty = Rate { per_second: u32::MAX, burst: u32::MAX };
    let node = runtime.block_on(async {
        let node = Node::start(Config { rates: Rates { messages: plenty, handshakes: plenty }, ..open() }).await;
        node.enrol(1, "alice", keys::alice()).await.close().await;
        node
    });
    let thief = keys::bob();
    for _ in 0..samples {
        let class = coin.flip()?;
        let (id, key) = &claims[class];
        let mut client = runtime.block_on(Client::hello(&node, RECORD_LIMIT));
        runtime.block_on(client.authenticate(&enrolled(*id, key), &thief))?;
        let refused = timed.time(class, || runtime.block_on(client.settle()).is_err());
        if !refused {
            return Err("nobody may enter here".into());
        }
    }
    let t = timed.t();
    runtime.block_on(node.stop());
    Ok(t)
}
