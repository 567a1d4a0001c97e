//! The server is blind: neither its files nor its memory hold what was said through it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use ossicle::device::{Device, Happened};
use ossicle::ethernet::{HOST, Network};
use ossicle_tests::cli::World;

/// What is looked for: the text, in hex of both cases, in base64 at each of its three alignments.
fn forms(text: &str) -> Vec<Vec<u8>> {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let mut forms = vec![text.as_bytes().to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes()];
    for skip in 0..3 {
        // Without its first and last groups, which depend on the neighbours.
        let padded = [&[0; 2][..skip.min(2)], text.as_bytes()].concat();
        for alphabet in [STANDARD, URL_SAFE] {
            let encoded = alphabet.encode(&padded);
            let inner = &encoded.as_bytes()[4..encoded.len() - 4];
            // A few letters are found in any memory.
            if inner.len() >= 8 {
                forms.push(inner.to_vec());
            }
        }
    }
    forms
}

fn holds(haystack: &[u8], text: &str) -> bool {
    forms(text).iter().any(|form| haystack.windows(form.len()).any(|window| window == form))
}

fn files(folder: &Path, found: &mut Vec<u8>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.is_file() {
            found.extend(fs::read(path).unwrap());
        }
    }
}

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
    let memory = memory(world.server_id());
    let mut disk = Vec::new();
    files(&world.path("server"), &mut disk);
    for (place, bytes) in [("memory", &memory), ("disk", &disk)] {
        for text in [to_alice, to_bob, unsigned, to_device, "C led=0"] {
            assert!(!holds(bytes, text), "the server's {place} holds «{text}»");
        }
        // The control: what the server must know is found in the same way.
        assert!(holds(bytes, "sensor-01"), "the search of the {place} is blind");
    }
    // And the search would find each form.
    for form in forms(to_alice) {
        let planted = [&[1, 2, 3][..], &form, &[4]].concat();
        assert!(holds(&planted, to_alice));
    }
    device.stop();
}
