//! What is durable survives that the power goes, and the harness that shows it would notice if it did not.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use ossicle::store::{SqliteStore, Store};
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
    for number in 0..25 {
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
    println!("{stored} messages in 25 rounds");
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
