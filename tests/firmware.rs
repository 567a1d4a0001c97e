//! The image in QEMU among real commands and a real server: it joins, reports, obeys, comes back; and it costs what README
//! says it costs.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Instant;

use ossicle_tests::cli::{Running, World};
use ossicle_tests::qemu::{Board, Line, Options, Qemu};
use ossicle_tests::{Rng, embassy_image, firmware_image, firmware_image_for};
use rand_core::TryRng as _;

/// Nothing that works takes so long, even where instructions are counted.
const DEADLINE: Duration = Duration::from_secs(240);

fn deadline() -> Instant {
    Instant::now() + DEADLINE
}

/// A world with an owner, and the page of a sensor in QEMU.
fn world_with_page(server_bits: &str, owner_bits: &str) -> (World, PathBuf) {
    let world = World::with(&["--rsa", server_bits]);
    world.run("alice", &["init", "--name", "alice", "--rsa", owner_bits, &world.url]).ok();
    let port = world.url.split('#').next().unwrap().rsplit(':').next().unwrap().to_owned();
    let page = world.path("sensor.page");
    let address = format!("10.0.2.2:{port}");
    let out = page.to_str().unwrap();
    world.run("alice", &["enroll", "sensor-01", "--report-to", "alice", "--out", out, "--address", &address]).ok();
    (world, page)
}

fn reading(listen: &Running) -> String {
    loop {
        let line: serde_json::Value = serde_json::from_str(&listen.line()).unwrap();
        if line["from"] == "sensor-01" {
            return line["text"].as_str().unwrap().to_owned();
        }
    }
}

/// Readings until one shows the LED like this.
fn until(listen: &Running, led: &str) {
    for _ in 0..60 {
        if reading(listen).ends_with(led) {
            return;
        }
    }
    panic!("no reading ends in {led}");
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_reports_to_its_owner_obeys_him_and_comes_back() {
    let (mut world, page) = world_with_page("2048", "2048");
    world.init("bob");
    let listen = world.listen("alice", &[]);
    let mut qemu = Qemu::start(&firmware_image(), Some(&page), &Options::default());
    until(&listen, "led=0");
    assert!(world.run("alice", &["who", "sensor-01"]).ok().contains("online"));

    world.run("alice", &["send", "sensor-01", "led on"]).ok();
    until(&listen, "led=1");
    world.run("alice", &["send", "--no-sign", "sensor-01", "led off"]).ok();
    qemu.wait_for(|line| line.message == "ignored, signed false", deadline()).unwrap();
    world.run("bob", &["send", "sensor-01", "led off"]).failed(1, "refused(forbidden)");
    until(&listen, "led=1");

    // The server goes and comes back: the same channel, the same keys, the same chain, no RSA and no new bundle.
    world.restart_server();
    qemu.wait_for(|line| line.message.starts_with("connection ended"), deadline()).unwrap();
    qemu.wait_for(|line| line.message.starts_with("resumed"), deadline()).unwrap();
    qemu.wait_for(|line| line.message.starts_with("reported"), deadline()).unwrap();
    until(&listen, "led=1");

    // A reset: everything is forgotten, new keys, a new chain that the owner takes.
    drop(qemu);
    let mut qemu = Qemu::start(&firmware_image(), Some(&page), &Options::default());
    qemu.wait_for(|line| line.message.starts_with("bundle published"), deadline()).unwrap();
    until(&listen, "led=0");
    world.run("alice", &["send", "sensor-01", "led on", "--wait", "opened"]).ok();
    until(&listen, "led=1");

    // Revoked: out at once, and not let in again.
    world.run("alice", &["revoke", "sensor-01"]).ok();
    qemu.wait_for(|line| line.message.contains("Unauthorised"), deadline()).unwrap();
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_comes_back_into_its_group_after_a_reset() {
    let (world, page) = world_with_page("2048", "2048");
    world.init("bob");
    let say = |home: &str, line: &str| {
        let mut chat = world.spawn(home, &["chat"]);
        chat.write(line.as_bytes());
        chat.end_input();
        chat.wait().ok()
    };
    let mut qemu = Qemu::start(&firmware_image(), Some(&page), &Options::default());
    qemu.wait_for(|line| line.message.starts_with("reported"), deadline()).unwrap();
    say("alice", "/init plans @bob @sensor-01\n");
    say("bob", "/accept plans\n");
    qemu.wait_for(|line| line.message.starts_with("joined a group"), deadline()).unwrap();
    let answers = || {
        let listen = world.listen("bob", &["plans"]);
        world.run("bob", &["send", "plans", "reading?", "--wait", "stored"]).ok();
        let line: serde_json::Value = serde_json::from_str(&listen.line()).unwrap();
        assert_eq!(
            (&line["from"], &line["group"], &line["signed"]),
            (&"sensor-01".into(), &"plans".into(), &true.into())
        );
    };
    answers();
    // A reset: everything is forgotten, and the server knows of what.
    drop(qemu);
    let mut qemu = Qemu::start(&firmware_image(), Some(&page), &Options::default());
    qemu.wait_for(|line| line.message.starts_with("joined a group"), deadline()).unwrap();
    answers();
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_same_application_does_the_same_on_another_board() {
    let (mut world, page) = world_with_page("3072", "2048");
    world.init("bob");
    let listen = world.listen("alice", &[]);
    let options = Options { board: Board::Mps2An386, ..Options::default() };
    let image = firmware_image_for(Board::Mps2An386);
    let mut qemu = Qemu::start(&image, Some(&page), &options);
    until(&listen, "led=0");

    world.run("alice", &["send", "sensor-01", "led on", "--wait", "opened"]).ok();
    until(&listen, "led=1");
    world.run("bob", &["send", "sensor-01", "led off"]).failed(1, "refused(forbidden)");
    until(&listen, "led=1");

    world.restart_server();
    qemu.wait_for(|line| line.message.starts_with("connection ended"), deadline()).unwrap();
    // With or without RSA: that is between this server and its memory.
    let again = |line: &Line| line.message.starts_with("connected") || line.message.starts_with("resumed");
    qemu.wait_for(again, deadline()).unwrap();
    qemu.wait_for(|line| line.message.starts_with("reported"), deadline()).unwrap();
    until(&listen, "led=1");
    world.run("alice", &["send", "sensor-01", "led off"]).ok();
    until(&listen, "led=0");
    drop(qemu);

    // Its identity page has an address of its own, and is missed in the same words.
    let mut qemu = Qemu::start(&image, None, &options);
    qemu.wait_for(|line| line.message.starts_with("no identity page"), deadline()).unwrap();
    assert_eq!(qemu.wait_exit(deadline()).and_then(|status| status.code()), Some(1));
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_sketch_on_embassy_is_a_member_too() {
    let (mut world, page) = world_with_page("2048", "2048");
    let listen = world.listen("alice", &[]);
    let options = Options { board: Board::Mps2An386, ..Options::default() };
    let mut qemu = Qemu::start(&embassy_image(), Some(&page), &options);
    until(&listen, "led=0");
    world.run("alice", &["send", "sensor-01", "led on", "--wait", "opened"]).ok();
    until(&listen, "led=1");
    world.run("alice", &["send", "--no-sign", "sensor-01", "led off"]).ok();
    until(&listen, "led=1");

    world.restart_server();
    qemu.wait_for(|line| line.message.starts_with("connection ended"), deadline()).unwrap();
    qemu.wait_for(|line| line.message.starts_with("connected"), deadline()).unwrap();
    until(&listen, "led=1");
    world.run("alice", &["send", "sensor-01", "led off"]).ok();
    until(&listen, "led=0");
}

/// QEMU's end of the wire. It fails rather than waits for ever.
fn accepted(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = deadline();
    loop {
        match listener.accept() {
            Ok((wire, _)) => {
                wire.set_nonblocking(false).unwrap();
                wire.set_read_timeout(Some(DEADLINE)).unwrap();
                wire.set_write_timeout(Some(DEADLINE)).unwrap();
                return wire;
            }
            Err(error) => assert!(Instant::now() < deadline, "QEMU has not come to its wire: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Frames that nobody should send: too short (but not empty, which QEMU itself does not take), too long, random, or nearly right; `to` is the device's address.
fn rubbish(to: [u8; 6]) -> impl Iterator<Item = Vec<u8>> {
    let mut rng = Rng::new(7);
    (0..4_000_usize).map(move |index| {
        let len = match index % 8 {
            0 => 1 + index % 60,
            1 => 1_515 + index % 500,
            2 => 2_040 + index % 20,
            3 => 4_000,
            _ => 14 + index % 1_501,
        };
        let mut frame = vec![0; len];
        rng.try_fill_bytes(&mut frame).unwrap();
        if len >= 40 {
            frame[..6].copy_from_slice(if index % 3 == 0 { &[0xff; 6] } else { &to });
            // Of a station that nobody is; half of them claim to be IPv4 or ARP.
            frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
            match index % 4 {
                0 => frame[12..15].copy_from_slice(&[8, 0, 0x45]),
                1 => frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
                _ => {}
            }
        }
        frame
    })
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn a_wire_full_of_rubbish_stops_no_board() {
    for board in [Board::Lm3s6965evb, Board::Mps2An386] {
        let (world, page) = world_with_page("2048", "2048");
        let listen = world.listen("alice", &[]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let options = Options { board, wire: Some(listener.local_addr().unwrap()), ..Options::default() };
        let mut qemu = Qemu::start(&firmware_image_for(board), Some(&page), &options);
        let mut wire = accepted(&listener);
        // The device asks for an address, which tells its own.
        let mut head = [0; 16];
        wire.read_exact(&mut head).unwrap();
        let to: [u8; 6] = head[10..].try_into().unwrap();
        let mut deaf = wire.try_clone().unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut deaf, &mut std::io::sink()));
        // While it joins, while it computes, while it reports.
        for frame in rubbish(to) {
            wire.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
            wire.write_all(&frame).unwrap();
        }
        until(&listen, "led=0");
        world.run("alice", &["send", "sensor-01", "led on", "--wait", "opened"]).ok();
        for frame in rubbish(to) {
            wire.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
            wire.write_all(&frame).unwrap();
        }
        until(&listen, "led=1");
        world.run("alice", &["send", "sensor-01", "led off", "--wait", "opened"]).ok();
        until(&listen, "led=0");
        assert!(!qemu.lines().iter().any(|line| line.level == "error"), "{:?}", qemu.lines());
        drop(qemu);
        // A QEMU that was ended leaves its end of the wire as it is, with what it had not read.
        let _ = reader.join().unwrap();
    }
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn an_image_without_a_page_or_with_a_broken_one_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.page");
    std::fs::write(&broken, [&b"OSSICLE\0"[..], &[0, 1, 0, 100], &[7; 200]].concat()).unwrap();
    let newer = folder.path().join("newer.page");
    std::fs::write(&newer, [&b"OSSICLE\0"[..], &[0, 3, 0, 100], &[7; 200]].concat()).unwrap();
    for (page, sentence) in [
        (None, "no identity page: make one with `ossicle enroll` and load it"),
        (Some(&broken), "broken identity page: load it again, or make a new one with `ossicle enroll`"),
        (Some(&newer), "identity page of another version: make a new one"),
    ] {
        let mut qemu = Qemu::start(&firmware_image(), page.map(PathBuf::as_path), &Options::default());
        qemu.wait_for(|line| line.level == "error" && line.message == sentence, deadline()).unwrap();
        assert_eq!(qemu.wait_exit(deadline()).and_then(|status| status.code()), Some(1));
    }
}

/// The number behind `word` in a log line.
fn number(line: &Line, word: &str) -> u64 {
    let rest = line.message.split(word).nth(1).unwrap_or_else(|| panic!("{word} in {line}"));
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("{word} in {line}"))
}

/// Instructions of one device's start: handshake, new keys, first message, a message; and its stack.
struct Costs {
    handshake: u64,
    resumption: u64,
    keys: u64,
    first: u64,
    message: u64,
    stack: u64,
    heap: u64,
}

fn measure(board: Board, server_bits: &str) -> Costs {
    let (mut world, page) = world_with_page(server_bits, "3072");
    let listen = world.listen("alice", &[]);
    let options = Options { board, icount: true, ..Options::default() };
    let mut qemu = Qemu::start(&firmware_image_for(board), Some(&page), &options);
    let mut wait = |begin: &str| qemu.wait_for(|line| line.message.starts_with(begin), deadline()).unwrap();
    let handshake = number(&wait("connected"), "instructions");
    let keys = number(&wait("bundle published"), "instructions");
    let first = number(&wait("chain to the owner"), "instructions");
    let message = number(&wait("reported"), "instructions");
    // A signed command makes the device verify, which is the deepest that it goes besides RSA.
    world.run("alice", &["send", "sensor-01", "led on"]).ok();
    wait("obeyed");
    let last = wait("reported");
    assert!(number(&last, "reported") > 0);
    until(&listen, "led=1");
    drop(listen);
    // A group of three: the device looks everybody up, and verifies what they have signed.
    world.init("bob");
    let mut chat = world.spawn("alice", &["chat"]);
    chat.write(b"/init plans @bob @sensor-01\n");
    chat.end_input();
    chat.wait().ok();
    wait("joined a group");
    world.restart_server();
    let resumption = number(&wait("resumed"), "instructions");
    wait("reported");
    drop(world);
    let ended = qemu.wait_for(|line| line.message.starts_with("connection ended"), deadline());
    assert!(ended.is_ok());
    let measured = qemu.lines().iter().rev().find(|line| line.message.starts_with("stack")).unwrap().clone();
    Costs {
        handshake,
        resumption,
        keys,
        first,
        message,
        stack: number(&measured, "stack"),
        heap: number(&measured, "reach:"),
    }
}

/// Bytes of the sections that stand in flash, and of those in RAM.
fn sizes(board: Board) -> (u64, u64) {
    let elf = std::fs::read(firmware_image_for(board)).unwrap();
    let word =
        |at: usize, len: usize| elf[at..at + len].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let at = |value: u64| usize::try_from(value).unwrap();
    // ELF32, little endian: the section headers say which sections are loaded, and where.
    let (table, count) = (at(word(0x20, 4)), at(word(0x30, 2)));
    let (mut flash, mut ram) = (0, 0);
    for header in (0..count).map(|index| table + index * 40) {
        let (kind, flags, address, size) =
            (word(header + 4, 4), word(header + 8, 4), word(header + 12, 4), word(header + 20, 4));
        let (allocated, nobits, in_ram) = (flags & 2 != 0, kind == 8, address >= 0x2000_0000);
        if allocated && !nobits {
            flash += size;
        }
        if allocated && in_ram {
            ram += size;
        }
    }
    (flash, ram)
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_device_costs_what_readme_says_and_no_more_than_its_budget() {
    let (flash, statics) = sizes(Board::default());
    let large = measure(Board::default(), "3072");
    let small = measure(Board::default(), "2048");
    let stack = large.stack.max(small.stack);
    // Name in README's table, measured, budget.
    let rows = [
        ("image: vectors, code, constants", flash, 180_000),
        ("RAM in all: statics, 10.5 KiB for RSA, deepest stack", statics + stack, 34_816),
        ("of which stack, at its deepest", stack, 10_240),
        ("full handshake, server of 3072 bits", large.handshake, 84_000_000),
        ("full handshake, server of 2048 bits", small.handshake, 80_000_000),
        ("resumption", large.resumption, 4_200_000),
        ("new end-to-end keys after a reset", large.keys, 78_000_000),
        ("first message to a new peer", large.first, 18_000_000),
        ("a message, from text to record", large.message, 160_000),
    ];
    println!("heap for RSA: {} of 10752 bytes", large.heap.max(small.heap));
    as_readme_says(&rows);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_second_board_costs_what_readme_says_too() {
    let (flash, statics) = sizes(Board::Mps2An386);
    let costs = measure(Board::Mps2An386, "3072");
    as_readme_says(&[
        ("`mps2-an386`: image", flash, 190_000),
        ("`mps2-an386`: RAM in all", statics + costs.stack, 34_816),
        ("`mps2-an386`: full handshake, server of 3072 bits", costs.handshake, 84_000_000),
        ("`mps2-an386`: a message, from text to record", costs.message, 160_000),
    ]);
}

/// Holds rows of README's tables (name, measured, budget) to their budgets and to what README says.
fn as_readme_says(rows: &[(&str, u64, u64)]) {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let mut wrong = Vec::new();
    for &(name, measured, budget) in rows {
        println!("| {name} | {measured} | {budget} |");
        if measured > budget {
            wrong.push(format!("{name}: {measured} is more than {budget}"));
        }
        let stated = readme
            .lines()
            .find_map(|line| line.strip_prefix(&format!("| {name} | ")))
            .and_then(|rest| rest.split(' ').next())
            .map(|digits| digits.replace(',', "").parse::<u64>().unwrap());
        // Keys are random, so counts move a little; README must be neither better nor much worse than the truth.
        if !stated.is_some_and(|stated| measured <= stated + stated / 50 && stated <= measured + measured / 50) {
            wrong.push(format!("{name}: README says {stated:?}, measured {measured}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_image_has_no_rsa_decryption() {
    // Needs nothing but the symbols: RSA signs and does nothing else.
    let image = firmware_image();
    let bytes = std::fs::read(image).unwrap();
    for symbol in ["oaep", "pkcs1v15"] {
        assert!(!bytes.windows(symbol.len()).any(|window| window == symbol.as_bytes()), "{symbol} is linked");
    }
    assert!(bytes.windows(3).any(|window| window == b"pss"), "the search is blind");
}
