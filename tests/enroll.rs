//! Devices enrolled by a client: batches at the server, and `ossicle enroll`.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use ossicle::crypto::IdentityKey;
use ossicle::server::{Config, Policy};
use ossicle_core::{
    Enrol, IdentityPage, Lookup, MAX_PAGE_LEN, MAX_RECORD_LEN, Message, Reason, Subject, enrolment_statement,
};
use ossicle_tests::cli::{DEADLINE, World};
use ossicle_tests::node::{Client, Heard, Node, RECORD_LIMIT, enrolled, open, refused};
use ossicle_tests::terminal::Terminal;
use ossicle_tests::{keys, public};

const ALICE: u8 = 1;
const BOB: u8 = 2;

// --- at the server --------------------------------------------------------------------------------------------------

/// A device: its number, name and key.
type Device<'d> = (u8, &'d str, fn() -> IdentityKey);

const FLEET: [Device<'_>; 3] = [(11, "s-1", keys::carol), (12, "s-2", keys::server), (13, "s-3", keys::server3072)];

/// One entry, as it is sent.
struct Entry {
    request: u16,
    index: u16,
    count: u16,
    id: [u8; 16],
    name: String,
    modulus: Vec<u8>,
    signature: Vec<u8>,
}

impl Entry {
    async fn send(&self, to: &mut Client) {
        let mut buffer = vec![0; MAX_RECORD_LEN];
        let Self { request, index, count, id, name, modulus, signature } = self;
        let entry = Enrol { request: *request, index: *index, count: *count, id: *id, name, modulus, signature };
        to.send(&entry.encode(&mut buffer).unwrap()).await;
    }
}

/// The entries of a batch, each signed by its device for this connection. Requests count from `first`.
fn batch(client: &Client, first: u16, devices: &[Device<'_>]) -> Vec<Entry> {
    let count = u16::try_from(devices.len()).unwrap();
    let entry = |(index, (number, name, key)): (u16, &Device<'_>)| {
        let (id, key) = ([*number; 16], key());
        let exporter = client.connection.exporter().unwrap();
        let statement = enrolment_statement(exporter, &client.id, &id, name, public(&key));
        let signature = key.sign(&statement).unwrap();
        let modulus = key.modulus().to_vec();
        Entry { request: first + index, index, count, id, name: (*name).to_owned(), modulus, signature }
    };
    (0..).zip(devices).map(entry).collect()
}

/// Sends these and returns the one answer to them: whose request, and why not.
async fn offer(client: &mut Client, entries: &[Entry]) -> (u16, Option<Reason>) {
    for entry in entries {
        entry.send(client).await;
    }
    let answer = client.message().await;
    // There is no second one.
    client.sync().await;
    match Message::decode(&answer) {
        Ok(Message::Done { request }) => (request, None),
        Ok(Message::Refused { request, reason, .. }) => (request, Some(reason)),
        other => panic!("{other:?}"),
    }
}

async fn is_there(client: &mut Client, name: &str) -> bool {
    let subject = Subject::Name(name);
    let answer = client.ask(&Message::Lookup(Lookup { request: 1, key: false, bundle: false, subject })).await;
    match Message::decode(&answer) {
        Ok(Message::LookupResponse { entry, .. }) => entry.name == name,
        Ok(Message::Refused { reason: Reason::Unknown, .. }) => false,
        other => panic!("{other:?}"),
    }
}

async fn are_there(client: &mut Client) -> [bool; 3] {
    let mut there = [false; 3];
    for (there, (_, name, _)) in there.iter_mut().zip(FLEET) {
        *there = is_there(client, name).await;
    }
    there
}

async fn alice_and_bob() -> (Node, Client, Client) {
    let node = Node::start(open()).await;
    let alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let bob = node.enrol(BOB, "bob", keys::bob()).await;
    (node, alice, bob)
}

#[tokio::test]
async fn a_client_enrols_devices_and_revokes_them_and_itself() {
    let (node, mut alice, mut bob) = alice_and_bob().await;
    let entries = batch(&alice, 100, &FLEET);
    assert_eq!(offer(&mut alice, &entries).await, (102, None), "one answer, to the last");
    assert_eq!(are_there(&mut alice).await, [true; 3]);
    assert_eq!(offer(&mut alice, &entries).await, (102, None), "the same again is done again");
    let mut sensor = node.connect(11, &keys::carol()).await.expect("the device has its key");
    node.connect(13, &keys::server3072()).await.expect("and the last one, too").close().await;

    let revoke = |subject| Message::Revoke { request: 6, subject };
    assert_eq!(bob.refusal(&revoke(Subject::Name("s-1"))).await, Reason::Forbidden);
    assert_eq!(bob.refusal(&revoke(Subject::Name("nobody"))).await, Reason::Unknown);
    alice.done(&revoke(Subject::Name("s-1"))).await;
    assert_eq!(sensor.hear().await, Heard::Closed(Some(Reason::Unauthorised)));
    assert!(matches!(node.connect(11, &keys::carol()).await, Err(error) if error == refused(Reason::Unauthorised)));
    assert_eq!(are_there(&mut alice).await, [false, true, true]);
    // A revoked key never comes back, and takes nobody along.
    let again = batch(&alice, 110, &[(14, "s-4", keys::server4096), (11, "s-1", keys::carol)]);
    assert_eq!(offer(&mut alice, &again).await, (111, Some(Reason::NameInUse)));
    assert!(!is_there(&mut alice, "s-4").await);

    alice.done(&revoke(Subject::Id([ALICE; 16]))).await;
    assert_eq!(alice.hear().await, Heard::Closed(Some(Reason::Unauthorised)));
    bob.sync().await;
    node.stop().await;
}

#[tokio::test]
async fn one_wrong_entry_keeps_the_whole_batch_out() {
    let (node, mut alice, mut bob) = alice_and_bob().await;
    // What only the transaction finds, in the middle too.
    for (index, name) in [(0, "BOB"), (1, "alice"), (2, "bob")] {
        let mut fleet = FLEET;
        fleet[index].1 = name;
        let entries = batch(&alice, 100, &fleet);
        let request = 100 + u16::try_from(index).unwrap();
        assert_eq!(offer(&mut alice, &entries).await, (request, Some(Reason::NameInUse)), "{name}");
        assert_eq!(are_there(&mut alice).await, [false; 3], "{name}");
    }
    let mut stolen = FLEET;
    stolen[1].2 = keys::bob;
    let entries = batch(&alice, 100, &stolen);
    assert_eq!(offer(&mut alice, &entries).await, (101, Some(Reason::NameInUse)), "somebody's key");

    let of_bob = batch(&bob, 100, &FLEET);
    type Spoil = fn(&mut Vec<Entry>, &[Entry]);
    let cases: [(&str, u16, Reason, Spoil); 18] = [
        ("no beginning", 101, Reason::Malformed, |entries, _| drop(entries.remove(0))),
        ("signed for another name", 101, Reason::Unauthorised, |entries, _| entries[1].name = "s-9".into()),
        ("signed for another id", 102, Reason::Unauthorised, |entries, _| entries[2].id = [99; 16]),
        ("signed on another connection", 101, Reason::Unauthorised, |entries, of_bob| {
            entries[1].signature.clone_from(&of_bob[1].signature);
        }),
        ("of another key's signature", 102, Reason::Unauthorised, |entries, _| {
            entries[2].signature = entries[1].signature.clone();
        }),
        ("no signature", 100, Reason::Unauthorised, |entries, _| entries[0].signature.clear()),
        ("a name that is none", 101, Reason::Malformed, |entries, _| entries[1].name = "a b".into()),
        ("a key that is none", 101, Reason::Malformed, |entries, _| entries[1].modulus.truncate(255)),
        ("an even key", 101, Reason::Malformed, |entries, _| entries[1].modulus[255] &= 0xfe),
        ("a key with the factor 3", 101, Reason::Malformed, |entries, _| {
            // Of the even numbers that can be added to an odd one, one of three makes a multiple of three.
            let rest = entries[1].modulus.iter().fold(0_u16, |rest, byte| (rest * 256 + u16::from(*byte)) % 3);
            let last = entries[1].modulus.last_mut().unwrap();
            *last = (*last & 0x0f) | 1;
            let now = entries[1].modulus.iter().fold(0_u16, |rest, byte| (rest * 256 + u16::from(*byte)) % 3);
            // 2 is -1 modulo 3, so adding 2 `now` times takes `now` away.
            *entries[1].modulus.last_mut().unwrap() += 2 * u8::try_from(now).unwrap();
            assert!(rest > 0, "the key itself has no such factor");
        }),
        ("the same name twice", 102, Reason::NameInUse, |entries, _| entries[2].name = "S-1".into()),
        ("the same id twice", 102, Reason::NameInUse, |entries, _| entries[2].id = entries[0].id),
        ("the same key twice", 102, Reason::NameInUse, |entries, _| entries[2].modulus = entries[0].modulus.clone()),
        ("an entry left out", 102, Reason::Malformed, |entries, _| drop(entries.remove(1))),
        ("an entry twice", 101, Reason::Malformed, |entries, _| entries[2].index = 1),
        ("another count", 101, Reason::Malformed, |entries, _| entries[1].count = 4),
        ("more than it counts", 100, Reason::Malformed, |entries, _| {
            entries.iter_mut().for_each(|entry| entry.count = 0)
        }),
        ("more than a batch has", 100, Reason::TooLarge, |entries, _| {
            entries.iter_mut().for_each(|entry| entry.count = 1001);
        }),
    ];
    for (what, request, reason, spoil) in cases {
        let mut entries = batch(&alice, 100, &FLEET);
        spoil(&mut entries, &of_bob);
        // "an entry twice" names the second of that index.
        let request = if what == "an entry twice" { 102 } else { request };
        assert_eq!(offer(&mut alice, &entries).await, (request, Some(reason)), "{what}");
        assert_eq!(are_there(&mut alice).await, [false; 3], "{what}");
    }
    // None of that stands in the way of what is right.
    let entries = batch(&alice, 200, &FLEET);
    assert_eq!(offer(&mut alice, &entries).await, (202, None));
    assert_eq!(are_there(&mut bob).await, [true; 3]);
    node.stop().await;
}

#[tokio::test]
async fn an_unreadable_entry_is_no_way_into_half_a_batch() {
    let (node, mut alice, _bob) = alice_and_bob().await;
    for spoiled in 0..3 {
        let entries = batch(&alice, 100, &FLEET);
        let (before, rest) = entries.split_at(spoiled);
        for entry in before {
            entry.send(&mut alice).await;
        }
        // A byte too many.
        let mut buffer = vec![0; MAX_RECORD_LEN];
        let Entry { request, index, count, id, name, modulus, signature } = &rest[0];
        let entry = Enrol { request: *request, index: *index, count: *count, id: *id, name, modulus, signature };
        let len = entry.encode(&mut buffer).unwrap().encode(&mut [0; MAX_RECORD_LEN]).unwrap();
        let mut longer = vec![0; len + 1];
        entry.encode(&mut buffer).unwrap().encode(&mut longer).unwrap();
        alice.send(&Message::decode(&longer).unwrap()).await;
        for entry in &rest[1..] {
            entry.send(&mut alice).await;
        }
        // The answer to it, and to what no longer belongs to anything at most one more.
        let mut refusals = 0;
        alice.send(&Message::Status { request: 0xbeef }).await;
        loop {
            let payload = alice.message().await;
            match Message::decode(&payload) {
                Ok(Message::Refused { reason: Reason::Malformed, .. }) => refusals += 1,
                Ok(Message::StatusResponse { request: 0xbeef }) => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(refusals, 1, "entry {spoiled}");
        assert_eq!(are_there(&mut alice).await, [false; 3]);
    }
    node.stop().await;
}

#[tokio::test]
async fn what_is_unfinished_goes_when_another_batch_begins_and_with_its_connection() {
    let (node, mut alice, mut bob) = alice_and_bob().await;
    let entries = batch(&alice, 100, &FLEET);
    entries[0].send(&mut alice).await;
    entries[1].send(&mut alice).await;
    alice.sync().await;
    assert_eq!(are_there(&mut bob).await, [false; 3], "nothing was said, and nothing done");
    let other = batch(&alice, 200, &[(14, "s-4", keys::server4096)]);
    assert_eq!(offer(&mut alice, &other).await, (200, None));
    assert_eq!(offer(&mut alice, &entries[2..]).await, (102, Some(Reason::Malformed)), "its beginning is gone");
    assert_eq!(are_there(&mut bob).await, [false; 3]);

    entries[0].send(&mut alice).await;
    entries[1].send(&mut alice).await;
    alice.sync().await;
    drop(alice);
    let mut alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    let entries = batch(&alice, 100, &FLEET);
    assert_eq!(offer(&mut alice, &entries[2..]).await, (102, Some(Reason::Malformed)));
    assert_eq!(are_there(&mut bob).await, [false; 3]);
    node.stop().await;
}

#[tokio::test]
async fn of_two_batches_at_once_that_share_a_name_one_is_enrolled() {
    let (node, mut alice, mut bob) = alice_and_bob().await;
    let of_alice = batch(&alice, 100, &[(11, "a-1", keys::carol), (12, "shared", keys::server)]);
    let of_bob = batch(&bob, 100, &[(13, "Shared", keys::server3072), (14, "b-1", keys::server4096)]);
    let (first, second) = tokio::join!(offer(&mut alice, &of_alice), offer(&mut bob, &of_bob));
    let there = (is_there(&mut alice, "a-1").await, is_there(&mut alice, "b-1").await);
    match there {
        (true, false) => assert_eq!((first, second), ((101, None), (100, Some(Reason::NameInUse)))),
        (false, true) => assert_eq!((first, second), ((101, Some(Reason::NameInUse)), (101, None))),
        both => panic!("{both:?}"),
    }
    node.stop().await;
}

#[tokio::test]
async fn a_closed_server_enrols_no_devices() {
    let node = Node::start(Config { enrol: Policy::Closed, ..open() }).await;
    let enrolment = ossicle::store::Enrolment {
        id: [ALICE; 16],
        name: ossicle::name::Name::parse("alice").unwrap(),
        modulus: keys::alice().modulus().to_vec(),
        token_id: None,
        enrolled_by: None,
        record_limit: RECORD_LIMIT,
        now: 1,
    };
    node.store.enrol(enrolment).await.unwrap();
    let mut alice = Client::connect(&node, &enrolled(ALICE, &keys::alice()), &keys::alice()).await.expect("enrolled");
    let entries = batch(&alice, 100, &FLEET);
    assert_eq!(offer(&mut alice, &entries).await, (100, Some(Reason::Forbidden)));
    assert_eq!(are_there(&mut alice).await, [false; 3]);
    node.stop().await;
}

#[tokio::test]
async fn devices_are_held_for_as_many_as_there_is_room_for() {
    let node = Node::start(Config { held_devices: 4, ..open() }).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    let unfinished = batch(&alice, 100, &FLEET);
    unfinished[0].send(&mut alice).await;
    unfinished[1].send(&mut alice).await;
    alice.sync().await;
    let entries = batch(&bob, 200, &FLEET);
    assert_eq!(offer(&mut bob, &entries).await, (202, Some(Reason::Unavailable)));
    // What a refused batch held is free at once, and so is what went with a connection.
    let two = batch(&bob, 300, &FLEET[..2]);
    assert_eq!(offer(&mut bob, &two).await, (301, None));
    alice.close().await;
    let entries = batch(&bob, 400, &[(14, "s-4", keys::server4096), FLEET[2], FLEET[0], FLEET[1]]);
    assert_eq!(offer(&mut bob, &entries).await, (403, None));
    node.stop().await;
}

#[tokio::test]
async fn haste_slows_a_batch_down_and_does_not_break_it() {
    let mut config = open();
    // alice's own handshake, bob's, and one to begin a batch with.
    config.rates.handshakes = ossicle::limits::Rate { per_second: 5, burst: 3 };
    config.rates.messages = ossicle::limits::Rate { per_second: 5, burst: 3 };
    let node = Node::start(config).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let entries = batch(&alice, 100, &FLEET);
    for entry in &entries {
        entry.send(&mut alice).await;
    }
    let answer = alice.message().await;
    assert_eq!(Message::decode(&answer), Ok(Message::Done { request: 102 }));
    node.stop().await;
}

// --- the command ----------------------------------------------------------------------------------------------------

fn people(names: &[&str]) -> World {
    let world = World::new();
    for name in names {
        world.init(name);
    }
    world
}

/// The names of what is in a directory, hidden or not, in their order.
fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until it is so.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_fleet_gets_its_pages() {
    let world = people(&["alice"]);
    let out = world.path("pages");
    let pages = out.to_str().unwrap();
    let enroll = |arguments: &[&str]| {
        world.run("alice", &[&["enroll", "--report-to", "alice", "--out", pages], arguments].concat())
    };
    let told = enroll(&["sensor-{01..05}", "--address", "10.0.2.2:5150"]);
    assert_eq!(told.err, "", "no bar where nobody looks");
    let told = told.ok();
    assert!(told.starts_with("5 devices are enrolled and report to alice\n"), "{told}");
    assert_eq!(
        names_in(&out),
        ["sensor-01.page", "sensor-02.page", "sensor-03.page", "sensor-04.page", "sensor-05.page"]
    );
    let mut seen = HashSet::new();
    for number in 1..=5 {
        let file = out.join(format!("sensor-{number:02}.page"));
        let bytes = fs::read(&file).unwrap();
        assert!(bytes.len() <= MAX_PAGE_LEN);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
        let page = IdentityPage::decode(&bytes).unwrap();
        assert_eq!((page.name, page.owner.name), (format!("sensor-{number:02}").as_str(), "alice"));
        assert_eq!((page.address, page.port), ([10, 0, 2, 2], 5150));
        assert!(seen.insert(page.id.to_vec()) && seen.insert(page.key.p.to_vec()), "each is another one");
    }
    assert_eq!(world.run("alice", &["who", "sensor-*"]).ok().lines().count(), 5);

    // Names from the shell, into a directory that is there; through a process that holds the home.
    let listen = world.listen("alice", &[]);
    let told = enroll(&["hall", "roof-{a,b}", "--json"]).ok();
    drop(listen);
    let lines: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        lines.iter().map(|line| line["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["hall", "roof-a", "roof-b"]
    );
    for line in lines {
        let page = fs::read(line["page"].as_str().unwrap()).unwrap();
        let id: String = IdentityPage::decode(&page).unwrap().id.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(line["id"].as_str().unwrap().replace('-', ""), id);
        assert!(line["dials"].as_str().unwrap().starts_with("127.0.0.1:"));
    }
    // One name and a directory: there.
    enroll(&["door"]).ok();
    assert!(out.join("door.page").exists());
}

#[test]
fn a_refused_fleet_leaves_nothing() {
    let world = people(&["alice", "bob"]);
    let out = world.path("pages");
    let pages = out.to_str().unwrap();
    let enroll =
        |names: &[&str]| world.run("alice", &[&["enroll", "--report-to", "alice", "--out", pages], names].concat());
    enroll(&["s-1", "BOB", "s-2"]).failed(1, "refused(name-in-use): another client has the name BOB");
    assert!(!out.exists(), "the directory was made for nothing");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("s-3.page"), "mine").unwrap();
    enroll(&["s-{1..2}", "bob"]).failed(1, "none of the devices was enrolled");
    enroll(&["s-{1..3}"]).failed(2, "s-3.page exists already");
    assert_eq!(names_in(&out), ["s-3.page"]);
    assert_eq!(fs::read(out.join("s-3.page")).unwrap(), b"mine");

    enroll(&["s-1", "S-1"]).failed(2, "S-1 is there twice");
    enroll(&["s-{1..5000}"]).failed(2, "these are 5000 names, and at most 1000");
    enroll(&["s-{5"]).failed(2, "braces come in pairs");
    assert_eq!(enroll(&[]).code, Some(2));
    let into_a_file = world.path("file");
    fs::write(&into_a_file, "").unwrap();
    let into = into_a_file.to_str().unwrap();
    let refused = world.run("alice", &["enroll", "s-1", "s-2", "--report-to", "alice", "--out", into]);
    refused.failed(2, "is a file: several pages go into a directory");
    let below = into_a_file.join("pages");
    let below = below.to_str().unwrap();
    world.run("alice", &["enroll", "s-1", "s-2", "--report-to", "alice", "--out", below]).failed(1, "cannot write");
    world.run("alice", &["enroll", "s-1", "s-2", "--report-to", "nobody", "--out", pages]).failed(1, "knows nobody");
    assert_eq!(names_in(&out), ["s-3.page"]);
    assert_eq!(world.run("alice", &["who", "s-*"]).ok(), "", "and nobody is enrolled");
}

#[test]
fn an_interrupted_fleet_leaves_nothing() {
    let world = people(&["alice"]);
    let out = world.path("pages");
    let pages = out.to_str().unwrap();
    let running = world.spawn("alice", &["enroll", "s-{1..900}", "--report-to", "alice", "--out", pages]);
    wait_until("a page is written", || out.exists() && !names_in(&out).is_empty());
    assert!(names_in(&out)[0].starts_with(".s-"), "under another name");
    running.signal("INT");
    let done = running.wait();
    assert_eq!((done.code, done.err.as_str()), (Some(130), ""));
    assert!(!out.exists());
    assert_eq!(world.run("alice", &["who", "s-*"]).ok(), "");
}

#[test]
fn a_page_whose_name_was_taken_meanwhile_is_not_lost() {
    let world = people(&["alice"]);
    let out = world.path("pages");
    let pages = out.to_str().unwrap();
    let running = world.spawn("alice", &["enroll", "s-{01..20}", "--report-to", "alice", "--out", pages]);
    wait_until("a page is written", || out.exists() && !names_in(&out).is_empty());
    fs::write(out.join("s-20.page"), "mine").unwrap();
    let done = running.wait();
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.err.contains("s-20 is enrolled, but "), "{done:?}");
    assert_eq!(fs::read(out.join("s-20.page")).unwrap(), b"mine");
    let kept = names_in(&out).into_iter().find(|name| name.starts_with(".s-20.page-")).expect("it is kept");
    assert!(done.err.contains(&kept), "{done:?}");
    assert_eq!(IdentityPage::decode(&fs::read(out.join(kept)).unwrap()).unwrap().name, "s-20");
    assert_eq!(names_in(&out).len(), 21);
    assert_eq!(world.run("alice", &["who", "s-*"]).ok().lines().count(), 20);
}

#[test]
fn a_bar_shows_on_a_terminal_how_far_it_is() {
    let world = people(&["alice"]);
    let pages = world.path("pages");
    let pages = pages.to_str().unwrap();
    let command = world.command("alice", &["enroll", "s-{1..8}", "--report-to", "alice", "--out", pages]);
    let mut terminal = Terminal::start(&command, (24, 80));
    terminal.will_write(b"making keys ");
    terminal.will_write(b"/8");
    terminal.shows("8 devices are enrolled and report to alice");
    assert_eq!(terminal.wait(), Some(0));
    assert!(!terminal.screen().contains("making keys"), "it is gone when it is done:\n{}", terminal.screen());
}

/// A way to the server that can be told to lose the answer to the next batch: it ends the connection instead.
struct Lossy {
    port: u16,
    armed: Arc<AtomicBool>,
    /// Whether connections are let through after that.
    comes_back: Arc<AtomicBool>,
    lost: Arc<AtomicBool>,
}

impl Lossy {
    /// More than a handshake and a bundle take upwards, and less than a batch of four.
    const BATCH: usize = 2200;

    fn before(port: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let lossy = Self {
            port: listener.local_addr().unwrap().port(),
            armed: Arc::default(),
            comes_back: Arc::new(AtomicBool::new(true)),
            lost: Arc::default(),
        };
        let (armed, lost) = (Arc::clone(&lossy.armed), Arc::clone(&lossy.lost));
        let comes_back = Arc::clone(&lossy.comes_back);
        let server = format!("127.0.0.1:{port}");
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { continue };
                if lost.load(Ordering::SeqCst) && !comes_back.load(Ordering::SeqCst) {
                    continue;
                }
                let server = TcpStream::connect(&server).unwrap();
                let up = Arc::new(Mutex::new(0));
                let counted = Arc::clone(&up);
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || {
                    pump(from, to, |len| {
                        *counted.lock().unwrap() += len;
                        true
                    })
                });
                let (armed, lost) = (Arc::clone(&armed), Arc::clone(&lost));
                thread::spawn(move || {
                    pump(server, client, |_| {
                        if *up.lock().unwrap() < Self::BATCH || !armed.swap(false, Ordering::SeqCst) {
                            return true;
                        }
                        lost.store(true, Ordering::SeqCst);
                        false
                    })
                });
            }
        });
        lossy
    }
}

/// Copies what comes while `pass` agrees; then both ends are cut.
fn pump(mut from: TcpStream, mut to: TcpStream, mut pass: impl FnMut(usize) -> bool) {
    let mut buffer = [0; 16_384];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if !pass(len) || to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    for end in [&from, &to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}

fn lossy_world() -> (World, Lossy) {
    let world = World::new();
    let lossy = Lossy::before(&world.port());
    let url = world.url.replace(&format!(":{}#", world.port()), &format!(":{}#", lossy.port));
    world.run("alice", &["init", "--name", "alice", "--rsa", "2048", &url]).ok();
    // The bundle is published, so that what goes up later is a handshake and the batch.
    world.run("alice", &["who"]).ok();
    (world, lossy)
}

#[test]
fn a_lost_answer_is_asked_for_again() {
    let (world, lossy) = lossy_world();
    let out = world.path("pages");
    lossy.armed.store(true, Ordering::SeqCst);
    let pages = out.to_str().unwrap();
    world.run("alice", &["enroll", "s-{1..4}", "--report-to", "alice", "--out", pages]).ok();
    assert!(lossy.lost.load(Ordering::SeqCst), "the answer was lost");
    assert_eq!(names_in(&out), ["s-1.page", "s-2.page", "s-3.page", "s-4.page"]);
    assert_eq!(world.run("alice", &["who", "s-*"]).ok().lines().count(), 4);
}

#[test]
fn what_may_be_enrolled_is_kept() {
    let (world, lossy) = lossy_world();
    let out = world.path("pages");
    lossy.comes_back.store(false, Ordering::SeqCst);
    lossy.armed.store(true, Ordering::SeqCst);
    let pages = out.to_str().unwrap();
    let running = world.spawn("alice", &["enroll", "s-{1..4}", "--report-to", "alice", "--out", pages]);
    wait_until("the answer is lost", || lossy.lost.load(Ordering::SeqCst));
    running.signal("INT");
    let done = running.wait();
    assert_eq!(done.code, Some(130), "{done:?}");
    assert!(done.err.contains("the server did not say whether it enrolled"), "{done:?}");
    let kept = names_in(&out);
    assert_eq!(kept.len(), 4, "{kept:?}");
    for (kept, name) in kept.iter().zip(["s-1", "s-2", "s-3", "s-4"]) {
        assert!(kept.starts_with(&format!(".{name}.page-")) && done.err.contains(kept), "{kept}: {done:?}");
        assert_eq!(IdentityPage::decode(&fs::read(out.join(kept)).unwrap()).unwrap().name, name);
    }
}
