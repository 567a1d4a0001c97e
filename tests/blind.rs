//! The server is blind: neither its files nor its memory hold what was said through it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{Read, Seek, SeekFrom};

use ossicle::device::{Device, Happened};
use ossicle::ethernet::{HOST, Network};
use ossicle::search::Search;
use ossicle_tests::cli::World;

/// Everything that the process can read and write.
fn memory(process: u32) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut memory = fs::File::open(format!("/proc/{process}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut words = line.split(' ');
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        // The vector pages of the kernel cannot be read this way.
        if !rights.starts_with("rw") || line.contains("[v") {
            continue;
        }
        let (from, to) = range.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        memory.seek(SeekFrom::Start(from)).unwrap();
        if memory.read_exact(&mut bytes).is_ok() {
            found.extend(bytes);
        }
    }
    found
}

#[test]
fn neither_disk_nor_memory_of_the_server_hold_what_was_said() {
    let world = World::new();
    world.init("alice");
    world.init("bob");
    let page = world.path("sensor.page");
    let out = page.to_str().unwrap();
    let dials = format!("{HOST}:{}", world.port());
    world.run("alice", &["enroll", "sensor-01", "--report-to", "alice", "--address", &dials, "--out", out]).ok();
    let listen = world.listen("alice", &[]);
    let hears = world.listen("bob", &[]);

    let to_alice = "the heron stands in the eastern reeds";
    let to_bob = "seven barges wait below the weir tonight";
    let unsigned = "nobody keeps bees on this side of town";
    world.run("bob", &["send", "alice", to_alice, "--wait", "opened"]).ok();
    world.run("alice", &["send", "bob", to_bob, "--wait", "opened"]).ok();
    world.run("alice", &["send", "bob", unsigned, "--no-sign", "--wait", "opened"]).ok();
    assert!(listen.line().contains(to_alice));
    assert!(hears.line().contains(to_bob) && hears.line().contains(unsigned));

    let (obeyed, heard) = std::sync::mpsc::channel();
    let network = Network::start(None).unwrap();
    let device = Device::start(&network, fs::read(&page).unwrap(), move |happened| {
        if matches!(happened, Happened::Ignored { signed: true }) {
            let _ = obeyed.send(());
        }
    })
    .unwrap();
    let reading = loop {
        let line: serde_json::Value = serde_json::from_str(&listen.line()).unwrap();
        if line["from"] == "sensor-01" {
            break line["text"].as_str().unwrap().to_owned();
        }
    };
    assert!(reading.contains("C led=0"));
    let to_device = "open the sluice by the breadth of a hand";
    world.run("alice", &["send", "sensor-01", to_device, "--wait", "opened"]).ok();
    heard.recv_timeout(core::time::Duration::from_secs(60)).unwrap();

    // While everything still runs, and nobody had a reason to tidy up.
    let said = [to_alice, to_bob, unsigned, to_device, "C led="];
    let found = |texts: &[&str]| {
        let search = Search::new(texts).unwrap();
        search.place("memory").pass(&memory(world.server_id()));
        search.folder(&world.path("server")).unwrap();
        search.found()
    };
    assert_eq!(found(&said), [], "the server holds what was said");
    // The control: what the server must know is found in the same way.
    let known = found(&["sensor-01"]);
    assert!(known.iter().any(|finding| finding.place == "memory"), "the search of the memory is blind");
    assert!(known.iter().any(|finding| finding.place != "memory"), "the search of the disk is blind");
    device.stop();
}
