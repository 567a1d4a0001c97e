//! What is durable survives that the power goes, and the harness that shows it would notice if it did not.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use ossicle::store::{SqliteStore, Store};
use ossicle_tests::campaign::{self, Campaign, Place, Plan};
use ossicle_tests::cli::{Done, Running, World, binary};
use ossicle_tests::power::Power;
use ossicle_tests::writer::{CLIENTS, bytes_of};

/// What the writer has said so far, by recipient.
#[derive(Default)]
struct Said {
    stored: HashMap<u8, BTreeMap<u64, ([u8; 8], u32)>>,
    gone: HashMap<u8, u64>,
    highest: u64,
}

impl Said {
    fn hear(&mut self, line: &str, before: u64) {
        let words: Vec<&str> = line.split(' ').collect();
        match *words.as_slice() {
            ["stored", recipient, chain, n, seq] => {
                let seq: u64 = seq.parse().unwrap();
                assert!(seq > before, "the number {seq} was given before, up to {before}");
                let message = (chain.parse::<u64>().unwrap().to_be_bytes(), n.parse().unwrap());
                let former = self.stored.entry(recipient.parse().unwrap()).or_default().insert(seq, message);
                assert_eq!(former, None, "{line}");
                self.highest = self.highest.max(seq);
            }
            ["gone", recipient, seq] => {
                self.gone.insert(recipient.parse().unwrap(), seq.parse().unwrap());
            }
            _ => panic!("{line}"),
        }
    }

    /// What of it is not as it was said.
    async fn complaints(&self, store: &SqliteStore) -> Vec<String> {
        let mut complaints = Vec::new();
        for recipient in 0..CLIENTS {
            let id = [recipient; 16];
            let items = store.queue(&id, 0, usize::MAX, usize::MAX).await.unwrap();
            let mut held = BTreeMap::new();
            let mut last = HashMap::new();
            for item in items {
                if *item.bytes != *bytes_of(item.chain, item.n) {
                    complaints.push(format!("{} of {recipient} holds something else", item.seq));
                }
                if last.insert(item.chain, item.n).is_some_and(|last| last >= item.n) {
                    complaints.push(format!("{} of {recipient} is not in order", item.seq));
                }
                held.insert(item.seq, (item.chain, item.n));
            }
            let waiting = store.waiting(&id).await.unwrap();
            if waiting.items != held.len() as u64 {
                complaints.push(format!("{} wait for {recipient}, and {waiting:?}", held.len()));
            }
            // Whoever has acknowledged may get it again, the others must.
            let gone = self.gone.get(&recipient).copied().unwrap_or_default();
            for (seq, message) in self.stored.get(&recipient).into_iter().flatten().filter(|(seq, _)| **seq > gone) {
                if held.get(seq) != Some(message) {
                    complaints.push(format!("{seq} of {recipient} is lost"));
                }
            }
        }
        complaints
    }
}

/// Lets the writer write for some milliseconds, then cuts the power, and looks at what is there.
async fn round(power: &Power, said: &mut Said, number: u32, how: &[&str], written: &[&str]) -> Vec<String> {
    let mut writer = power
        .command(env!("CARGO_BIN_EXE_writer"))
        .arg(power.data())
        .arg(number.to_string())
        .args(how)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(writer.stdout.take().unwrap());
    let before = said.highest;
    let mut line = String::new();
    assert!(out.read_line(&mut line).unwrap() > 0, "the writer writes");
    said.hear(line.trim_end(), before);
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(getrandom::u64().unwrap() % 700));
        writer.kill().unwrap();
        writer.wait().unwrap()
    });
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    // A line that was cut off has said nothing: the writer goes on when it stands.
    for line in rest.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        said.hear(line, before);
    }
    assert!(!killer.join().unwrap().success(), "it was killed");
    power.cut(written);
    let store = SqliteStore::open(&power.data()).expect("the store opens after a power cut");
    let complaints = said.complaints(&store).await;
    // What it has forgotten is forgotten now.
    drop(store);
    power.settle();
    complaints
}

#[tokio::test]
#[ignore = "needs cc"]
async fn what_was_stored_survives_power_cuts() {
    let power = Power::new();
    let mut said = Said::default();
    let cuts = number("CUTS").unwrap_or(25);
    for number in 0..cuts {
        // The disk may have got at more than it was asked for.
        let written: &[&str] = match getrandom::u64().unwrap() % 5 {
            0 => &["store.db"],
            1 => &["store.db-wal"],
            _ => &[],
        };
        let complaints = round(&power, &mut said, number, &[], written).await;
        assert_eq!(complaints, Vec::<String>::new(), "round {number}, written: {written:?}");
    }
    let stored: usize = said.stored.values().map(BTreeMap::len).sum();
    println!("{stored} messages in {cuts} rounds");
    assert!(stored > 1000 && said.gone.len() == usize::from(CLIENTS) - 1, "{stored}");
}

#[tokio::test]
#[ignore = "needs cc"]
async fn the_harness_sees_what_a_store_loses_that_never_flushes() {
    let power = Power::new();
    let mut said = Said::default();
    assert_eq!(round(&power, &mut said, 0, &[], &[]).await, Vec::<String>::new());
    let complaints = round(&power, &mut said, 1, &["unflushed"], &[]).await;
    assert!(complaints.iter().any(|complaint| complaint.ends_with("is lost")), "{complaints:?}");
}

/// A server whose data directory loses its power whenever the server has ended.
async fn cut_server(program: &[&str], plan: &Plan) -> campaign::Figures {
    println!("SEED={}", plan.seed);
    let power = Arc::new(Power::new());
    let mut rng = fastrand::Rng::with_seed(plan.seed);
    let (of_place, program) = (Arc::clone(&power), program.iter().map(|&part| part.to_owned()).collect::<Vec<_>>());
    let place = Place::new(&mut rng, Some(power.data()), move || {
        let mut command = of_place.command(&program[0]);
        command.args(&program[1..]);
        command
    });
    let cut = |_: &Path| {
        // The disk may have got at more than it was asked for.
        power.cut(rng.choice(&[&["store.db"][..], &["store.db-wal"], &[], &[]]).unwrap());
        power.settle();
    };
    campaign::run(plan, place, cut, |_| {}).await
}

fn number<N: core::str::FromStr>(variable: &str) -> Option<N> {
    std::env::var(variable).ok().map(|text| text.parse().ok().expect("a number"))
}

fn plan() -> Plan {
    let seed = number("SEED").unwrap_or_else(|| getrandom::u64().unwrap());
    let pause = Duration::from_millis(800);
    Plan {
        seed,
        kills: number("KILLS").unwrap_or(25),
        rate: 3000,
        senders: 4,
        recipients: 4,
        homes: 2,
        pause,
        away: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs cc"]
async fn what_a_server_said_is_stored_survives_power_cuts_under_load() {
    let figures = cut_server(&[binary().to_str().unwrap()], &plan()).await;
    println!("{figures}");
    assert!(figures.kills >= 20 && figures.stored > 1000 && figures.letters > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs cc"]
async fn a_disk_that_fails_to_flush_ends_what_is_promised_until_the_next_start() {
    let plan = Plan { homes: 0, ..plan() };
    println!("SEED={}", plan.seed);
    let power = Arc::new(Power::new());
    let mut rng = fastrand::Rng::with_seed(plan.seed);
    let (of_place, fails) = (Arc::clone(&power), power.folder().join("fails"));
    let of_command = fails.clone();
    let place = Place::new(&mut rng, Some(power.data()), move || {
        let mut command = of_place.command(binary());
        command.env("POWER_FAILS", &of_command);
        command
    });
    let mut campaign = Campaign::begin(&plan, place, &mut rng).await;
    campaign.until_stored(500).await;
    std::fs::write(&fails, "").unwrap();
    campaign.until("said", |campaign| campaign.place.server().said().contains("nothing more is stored")).await;
    std::fs::remove_file(&fails).unwrap();
    // The disk is well again, and nobody knows what it has: nothing is promised before the next start.
    // What was said before that is on its way for a moment.
    let (mut stored, mut since) = (campaign.stored(), Instant::now());
    let is_silent = |campaign: &mut Campaign| {
        if core::mem::replace(&mut stored, campaign.stored()) != stored {
            since = Instant::now();
        }
        since.elapsed() > Duration::from_millis(500)
    };
    campaign.until("silent", is_silent).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(campaign.place.server().is_running());
    assert_eq!(campaign.stored(), stored);
    let cut = |_: &Path| {
        power.cut(&[]);
        power.settle();
    };
    campaign.cut(Place::kill, &mut { cut }).await;
    campaign.restart();
    campaign.until_stored(500).await;
    campaign.end(&mut campaign::Figures::default()).await;
}

const UNFLUSHED: &str = env!("CARGO_BIN_EXE_unflushed");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs cc"]
async fn the_same_server_without_the_switch_loses_nothing() {
    cut_server(&[UNFLUSHED, "flushed"], &Plan { kills: 3, homes: 0, away: true, ..plan() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs cc"]
#[should_panic(expected = "stored, and lost")]
async fn the_harness_sees_what_a_server_loses_whose_store_never_flushes() {
    cut_server(&[UNFLUSHED, "unflushed"], &Plan { kills: 3, homes: 0, away: true, ..plan() }).await;
}

#[test]
#[ignore = "needs cc"]
fn a_home_keeps_through_power_cuts_what_it_said_and_sends_nothing_twice() {
    let world = World::new();
    world.init("bob");
    let power = Power::new();
    let at_home = |arguments: &[&str]| {
        let mut command = power.command(binary());
        command.args(arguments).env("OSSICLE_HOME", power.data()).env_remove("RUST_LOG");
        Running::start(&mut command)
    };
    at_home(&["init", "--name", "alice", "--rsa", "2048", &world.url]).wait().ok();
    power.cut(&[]);
    power.settle();
    let (mut said, mut heard) = (Vec::new(), Vec::new());
    let hear = |done: Done, heard: &mut Vec<String>| {
        heard.extend(done.out.lines().filter_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["text"].as_str().map(str::to_owned)
        }));
    };
    for round in 0..10 {
        // Every other time, Bob is there.
        let listen = (round % 2 == 0).then(|| world.listen("bob", &[]));
        let mut send = at_home(&["send", "bob", "-", "--wait", "stored", "--timeout", "60s"]);
        for line in 0..200 {
            send.write(format!("{round} {line}\n").as_bytes());
        }
        let wanted = 1 + getrandom::u64().unwrap() as usize % 120;
        while send.said().matches(": stored").count() < wanted {
            assert!(send.is_running(), "{}", send.said());
            std::thread::sleep(Duration::from_millis(1));
        }
        send.kill();
        let told = send.said();
        power.cut(if round % 3 == 0 { &["home.db-wal"] } else { &[] });
        power.settle();
        for line in told.lines().filter_map(|line| line.strip_suffix(": stored")) {
            let line: u32 = line.strip_prefix("line ").unwrap().parse().unwrap();
            said.push(format!("{round} {}", line - 1));
        }
        if let Some(listen) = listen {
            listen.signal("INT");
            hear(listen.wait(), &mut heard);
        }
    }
    // Whatever the home has of it goes with the next command, before that one's own.
    at_home(&["send", "bob", "the last", "--wait", "stored", "--timeout", "60s"]).wait().ok();
    let listen = world.listen("bob", &[]);
    loop {
        let line: serde_json::Value = serde_json::from_str(&listen.line()).unwrap();
        let text = line["text"].as_str().unwrap_or_default().to_owned();
        if text == "the last" {
            break;
        }
        heard.push(text);
    }
    let numbers: Vec<(u32, u32)> = heard
        .iter()
        .map(|text| text.split_once(' ').unwrap())
        .map(|(round, line)| (round.parse().unwrap(), line.parse().unwrap()))
        .collect();
    let place = numbers.windows(2).find(|pair| pair[0] >= pair[1]);
    assert_eq!(place, None, "each once, in order: {numbers:?}");
    let lost: Vec<_> = said.iter().filter(|text| !heard.contains(text)).collect();
    assert!(lost.is_empty() && said.len() >= 10, "{lost:?} of {}", said.len());
}
