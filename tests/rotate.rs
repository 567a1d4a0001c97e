//! Keys that follow others: identity keys by a real home at a real server, against bad input, lost answers and servers that
//! show old or unsigned keys; prekeys each week, while the connection stands.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use core::time::Duration;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use std::thread;

use ossicle::crypto::IdentityKey;
use ossicle::endpoint::{Access, Reply, Request};
use ossicle::name::Name;
use ossicle::store::home::{HomeStore, StoredChain};
use ossicle::store::{BundleRecord, NewKey, SqliteStore, Store};
use ossicle_core::{
    Bundle, BundleKeys, Conversation, Credentials, Member, Message, Reason, ReceivingChain, Rotate, Rotation, Rung,
    Rungs, RustCrypto, Secret, SendingChain, Subject, Successor, SuccessorQuery, WRAP_LEN,
};
use ossicle_tests::cli::{Running, World};
use ossicle_tests::node::{Client, Heard, Node, Published, open, refused, within, wrap};
use ossicle_tests::{Rng, keys};
use serde_json::Value;

fn object(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

fn text(line: &str) -> String {
    object(line)["text"].as_str().unwrap_or_else(|| panic!("a text: {line}")).to_owned()
}

/// What `home` sees of `name`: key and safety number.
fn seen(world: &World, home: &str, name: &str) -> (String, String) {
    let shown = object(&world.run(home, &["verify", name, "--json"]).out);
    let field = |field: &str| shown[field].as_str().unwrap_or_else(|| panic!("{field}: {shown}")).to_owned();
    (field("key"), field("safety_number"))
}

fn rotate(world: &World, home: &str) {
    let said = world.run(home, &["init", "--rotate", "--rsa", "2048"]).ok();
    assert!(said.contains("has a new identity key"), "{said}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Waits for this text. What a listener printed that was killed at once comes again before it.
fn hear(listener: &Running, expected: &str) {
    while text(&listener.line()) != expected {}
}

fn interrupted(listener: Running) -> String {
    listener.signal("INT");
    listener.wait().err
}

#[test]
fn peers_follow_a_signed_key_and_are_told() {
    let world = World::new();
    for name in ["alice", "bob", "carol"] {
        world.init(name);
    }
    let (alice, mut bob) = (world.listen("alice", &[]), world.listen("bob", &[]));
    world.run("alice", &["send", "bob", "one"]).ok();
    world.run("bob", &["send", "alice", "two"]).ok();
    assert_eq!((text(&bob.line()), text(&alice.line())), ("one".into(), "two".into()));
    let before = seen(&world, "alice", "bob");
    copy(&world.path("bob"), &world.path("thief"));

    // While `listen` has the home, which goes on under the new key.
    rotate(&world, "bob");
    assert!(!world.path("bob").join("identity.new.pem").exists());
    world.wait_online("bob", true);
    world.run("thief", &["who"]).failed(1, "does not let bob in");

    // Whoever meets the new key first follows it: by sending, or by what comes.
    world.run("bob", &["send", "alice", "three"]).ok();
    assert_eq!(text(&alice.line()), "three");
    world.run("alice", &["send", "bob", "four"]).ok();
    assert_eq!(text(&bob.line()), "four");
    let after = seen(&world, "alice", "bob");
    assert!(after.0 != before.0 && after.1 != before.1, "another key, another number");
    assert_eq!(after.1, seen(&world, "bob", "alice").1, "and both see the same one");

    // Twice more, while alice is away: she follows both steps.
    let said = interrupted(alice);
    assert!(said.contains("bob has a new identity key, which the former one signed"), "{said}");
    assert!(!said.contains("KEY CHANGED"), "{said}");
    rotate(&world, "bob");
    rotate(&world, "bob");
    let sent = world.run("alice", &["send", "bob", "five"]);
    assert!(sent.err.contains("which the former one signed") && !sent.err.contains("KEY CHANGED"), "{sent:?}");
    sent.ok();
    assert_eq!(text(&bob.line()), "five");
    // Who meets him only now has nothing to follow.
    let sent = world.run("carol", &["send", "bob", "six"]);
    assert_eq!(sent.err, "stored\ndelivered\n");
    assert_eq!(text(&bob.line()), "six");
    assert!(bob.is_running());

    // A new start finds everything in its place.
    interrupted(bob);
    bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "seven"]).ok();
    hear(&bob, "seven");
}

#[test]
fn the_command_line_says_what_does_not_go_together() {
    let world = World::new();
    world.init("alice");
    assert_eq!(world.run("alice", &["init", "--rotate", "--name", "bob"]).code, Some(2));
    assert_eq!(world.run("alice", &["init", "--rotate", &world.url]).code, Some(2));
    assert_eq!(world.run("alice", &["init", "--name", "bob"]).code, Some(2));
    world.run("nobody", &["init", "--rotate"]).failed(2, "there is no identity");
}

#[test]
fn a_server_that_goes_back_is_not_followed() {
    let mut world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "one"]).ok();
    world.stop_server();
    let (kept, server) = (world.path("kept"), world.path("server"));
    copy(&server, &kept);
    world.restart_server();
    rotate(&world, "bob");
    world.wait_online("bob", true);
    world.run("alice", &["send", "bob", "two"]).ok();
    assert_eq!((text(&bob.line()), text(&bob.line())), ("one".into(), "two".into()));

    // The directory shows the former key again, as a restored server would, or one that has stolen it.
    world.stop_server();
    fs::remove_dir_all(&server).unwrap();
    copy(&kept, &server);
    world.restart_server();
    world.run("alice", &["send", "bob", "secret"]).failed(1, "KEY CHANGED");
    world.run("alice", &["verify", "bob"]).failed(1, "KEY CHANGED");
}

#[test]
fn a_key_that_the_former_one_did_not_sign_is_not_followed() {
    let mut world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "one"]).ok();
    interrupted(bob);
    world.stop_server();

    // The server makes a key for bob, and a step to it that looks right but for the signature.
    let plant = |world: &World, key: &IdentityKey, key_epoch: u32| {
        let data = world.path("server");
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = SqliteStore::open(&data).unwrap();
            let client = store.client_by_name(&Name::parse("bob").unwrap()).await.unwrap().unwrap();
            let held = store.bundle(&client.id).await.unwrap().unwrap();
            let mut bundle = Bundle::decode(&held.bundle).unwrap();
            bundle.key = key.fingerprint();
            bundle.epoch += 1;
            let signature = key.sign(&bundle.statement()).unwrap();
            let bundle = BundleRecord { epoch: bundle.epoch, bundle: bundle.encode().to_vec(), signature };
            let former = ossicle_core::PublicKey::from_modulus(&client.modulus).unwrap().fingerprint();
            let step = Rotation { id: client.id, former, next: key.fingerprint(), key_epoch };
            let by_itself = key.sign(&step.statement()).unwrap();
            let modulus = key.modulus().to_vec();
            store.rotate(NewKey { id: client.id, key_epoch, modulus, signature: by_itself, bundle }).await.unwrap();
        });
    };
    let (key, other) = (keys::bob(), keys::carol());
    plant(&world, &key, 1);
    world.restart_server();
    let shown = world.run("alice", &["verify", "bob", "--json"]).failed(1, "KEY CHANGED");
    assert_eq!(object(&shown.out)["new_key"], hex(&key.fingerprint()));
    world.run("alice", &["send", "bob", "secret"]).failed(1, "refused(key-changed)");

    // While alice compares what she was shown, it shows another: that one is not what she accepts.
    world.stop_server();
    plant(&world, &other, 2);
    world.restart_server();
    let said = world.run("alice", &["verify", "bob", "--accept"]).failed(1, "KEY CHANGED");
    assert!(said.out.contains("NOTHING IS ACCEPTED") && said.out.contains(&hex(&other.fingerprint())), "{said:?}");
    world.run("alice", &["send", "bob", "secret"]).failed(1, "refused(key-changed)");
    let accepted = object(&world.run("alice", &["verify", "bob", "--accept", "--json"]).ok());
    assert_eq!((&accepted["accepted"], &accepted["new_key"]), (&true.into(), &hex(&other.fingerprint()).into()));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Between a client and the server: passes everything on, and once it is told to, no answer to what is long.
struct Between {
    address: String,
    cut: Arc<AtomicBool>,
    /// How often it did.
    cuts: Arc<AtomicUsize>,
}

impl Between {
    /// More than a handshake, less than `Rotate`.
    const LONG: usize = 1000;

    fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (cut, cuts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let shared = (Arc::clone(&cut), Arc::clone(&cuts));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&server) else { continue };
                let deaf = Arc::new(AtomicBool::new(false));
                let (cut, cuts) = (Arc::clone(&shared.0), Arc::clone(&shared.1));
                let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let says = Arc::clone(&deaf);
                thread::spawn(move || {
                    let (mut buffer, mut total) = ([0; 16_384], 0);
                    while let Ok(len @ 1..) = from.read(&mut buffer) {
                        total += len;
                        if total > Self::LONG && cut.swap(false, Ordering::SeqCst) {
                            says.store(true, Ordering::SeqCst);
                            cuts.fetch_add(1, Ordering::SeqCst);
                        }
                        if to.write_all(&buffer[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Both);
                });
                thread::spawn(move || {
                    let (mut server, mut client) = (server, client);
                    let mut buffer = [0; 16_384];
                    while let Ok(len @ 1..) = server.read(&mut buffer) {
                        // What answers is dropped, and with it the connection.
                        if deaf.load(Ordering::SeqCst) || client.write_all(&buffer[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = client.shutdown(Shutdown::Both);
                    let _ = server.shutdown(Shutdown::Both);
                });
            }
        });
        Self { address, cut, cuts }
    }
}

#[test]
fn a_lost_answer_leaves_the_key_that_the_server_has() {
    let world = World::new();
    let (server, secrets) = world.url.trim_start_matches("ossicle://").split_once('#').unwrap();
    let between = Between::start(server.to_owned());
    let url = format!("ossicle://{}#{secrets}", between.address);
    world.run("bob", &["init", "--name", "bob", "--rsa", "2048", &url]).ok();
    world.init("alice");
    let former = seen(&world, "alice", "bob").0;

    between.cut.store(true, Ordering::SeqCst);
    rotate(&world, "bob");
    assert_eq!(between.cuts.load(Ordering::SeqCst), 1, "the answer was lost");
    assert!(!world.path("bob").join("identity.new.pem").exists());
    world.run("bob", &["who"]).ok();
    assert_ne!(seen(&world, "alice", "bob").0, former);

    // The same, and the process dies before it knows: whatever runs next finds out.
    between.cut.store(true, Ordering::SeqCst);
    let mut dying = world.spawn("bob", &["init", "--rotate", "--rsa", "2048"]);
    while between.cuts.load(Ordering::SeqCst) < 2 {
        thread::sleep(Duration::from_millis(1));
        assert!(dying.is_running() || between.cuts.load(Ordering::SeqCst) == 2);
    }
    dying.kill();
    world.run("bob", &["who"]).ok();
    let bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "still there?"]).ok();
    hear(&bob, "still there?");
}

#[test]
fn a_crash_at_any_point_leaves_a_key_that_works() {
    let world = World::new();
    world.init("alice");
    world.init("bob");
    for round in 0..12 {
        let mut dying = world.spawn("bob", &["init", "--rotate", "--rsa", "2048"]);
        thread::sleep(Duration::from_millis(40 * round));
        dying.kill();
        world.run("bob", &["who"]).ok();
        let bob = world.listen("bob", &[]);
        world.run("alice", &["send", "bob", &round.to_string()]).ok();
        hear(&bob, &round.to_string());
    }
    // What was interrupted comes to its end.
    rotate(&world, "bob");
    assert!(!world.path("bob").join("identity.new.pem").exists());
}

const BOB: u8 = 2;

/// A `Rotate` with everything right, to be spoilt.
struct Offer {
    key_epoch: u32,
    modulus: Vec<u8>,
    signature: Vec<u8>,
    proof: Vec<u8>,
    bundle: Published,
}

impl Offer {
    fn new(client: &Client, former: &IdentityKey, next: &IdentityKey, key_epoch: u32, bundle_epoch: u32) -> Self {
        let step = Rotation { id: client.id, former: former.fingerprint(), next: next.fingerprint(), key_epoch };
        let exporter = client.connection.exporter().unwrap();
        Self {
            key_epoch,
            modulus: next.modulus().to_vec(),
            signature: former.sign(&step.statement()).unwrap(),
            proof: next.sign(&step.possession(exporter)).unwrap(),
            bundle: Published::new(client.id[0], next, bundle_epoch),
        }
    }

    fn message<'b>(&'b self, buffer: &'b mut [u8]) -> Message<'b> {
        let Self { key_epoch, modulus, signature, proof, bundle } = self;
        let bundle = bundle.signed();
        let key_epoch = *key_epoch;
        Rotate { request: 1, key_epoch, modulus, signature, proof, bundle }.encode(buffer).unwrap()
    }
}

fn credentials(number: u8, key: &IdentityKey, key_epoch: u32) -> Credentials<'static> {
    Credentials::Key { id: [number; 16], key_epoch, fingerprint: key.fingerprint() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_takes_a_key_only_with_everything_that_proves_it() {
    let node = Node::start(open()).await;
    let (former, next) = (keys::bob(), keys::carol());
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.done(&Message::Publish { request: 1, bundle: Published::new(BOB, &former, 5).signed() }).await;

    let right = |bob: &Client| Offer::new(bob, &former, &next, 1, 6);
    let other_exporter = Secret::new([1; 32]);
    let step = Rotation { id: [BOB; 16], former: former.fingerprint(), next: next.fingerprint(), key_epoch: 1 };
    let spoilt: Vec<(&str, Reason, Offer)> = vec![
        ("a weak key", Reason::Malformed, Offer { modulus: vec![0xff; 128], ..right(&bob) }),
        ("an even key", Reason::Malformed, Offer { modulus: vec![0xfe; 256], ..right(&bob) }),
        ("no key", Reason::Malformed, Offer { modulus: vec![], ..right(&bob) }),
        (
            "a bundle of another key",
            Reason::Malformed,
            Offer { bundle: Published::new(BOB, &former, 6), ..right(&bob) },
        ),
        ("a bundle of another client", Reason::Malformed, Offer { bundle: Published::new(1, &next, 6), ..right(&bob) }),
        ("the present epoch", Reason::Rewound, Offer::new(&bob, &former, &next, 0, 6)),
        ("an epoch left out", Reason::Rewound, Offer::new(&bob, &former, &next, 2, 6)),
        ("an old bundle", Reason::Rewound, Offer::new(&bob, &former, &next, 1, 5)),
        (
            "another epoch signed",
            Reason::Unauthorised,
            Offer { key_epoch: 1, ..Offer::new(&bob, &former, &next, 2, 6) },
        ),
        (
            "signed by the new key",
            Reason::Unauthorised,
            Offer { signature: next.sign(&step.statement()).unwrap(), ..right(&bob) },
        ),
        ("not signed", Reason::Unauthorised, Offer { signature: vec![0; 256], ..right(&bob) }),
        (
            "a proof of the former key",
            Reason::Unauthorised,
            Offer { proof: former.sign(&step.possession(bob.connection.exporter().unwrap())).unwrap(), ..right(&bob) },
        ),
        (
            "a proof from another connection",
            Reason::Unauthorised,
            Offer { proof: next.sign(&step.possession(&other_exporter)).unwrap(), ..right(&bob) },
        ),
        (
            "a bundle that is not signed",
            Reason::Unauthorised,
            Offer { bundle: Published { signature: vec![1; 256], ..right(&bob).bundle }, ..right(&bob) },
        ),
        ("the same key", Reason::NameInUse, Offer::new(&bob, &former, &former, 1, 6)),
        ("the key of another", Reason::NameInUse, Offer::new(&bob, &former, &keys::alice(), 1, 6)),
    ];
    for (what, reason, offer) in spoilt {
        assert_eq!(bob.refusal(&offer.message(&mut [0; 4096])).await, reason, "{what}");
    }
    let client = node.store.client(&[BOB; 16]).await.unwrap().unwrap();
    assert_eq!((client.key_epoch, client.modulus.as_slice()), (0, former.modulus()), "nothing changed");
    let successor = |id, key_epoch| SuccessorQuery { request: 3, id, key_epoch };
    let mut buffer = [0; 64];
    let query = successor([BOB; 16], 0).encode(&mut buffer).unwrap();
    assert_eq!(alice.refusal(&query).await, Reason::Unknown);

    // The right one: done, and the connection that the former key has authenticated ends.
    let offer = right(&bob);
    bob.done(&offer.message(&mut [0; 4096])).await;
    assert_eq!(bob.hear().await, Heard::Closed(None));
    let again = node.connect(BOB, &former).await.map(drop);
    assert_eq!(again, Err(refused(Reason::Unauthorised)));
    for key_epoch in [0, 2] {
        let wrong = Client::connect(&node, &credentials(BOB, &next, key_epoch), &next).await.map(drop);
        assert_eq!(wrong, Err(refused(Reason::Unauthorised)));
    }
    let mut bob = Client::connect(&node, &credentials(BOB, &next, 1), &next).await.unwrap();

    // The directory shows the new key with its bundle, and what leads to it.
    let lookup = ossicle_core::Lookup { request: 2, key: true, bundle: true, subject: Subject::Name("bob") };
    let answer = alice.ask(&Message::Lookup(lookup)).await;
    let Ok(Message::LookupResponse { entry, .. }) = Message::decode(&answer) else { panic!("an entry") };
    assert_eq!((entry.key_epoch, entry.modulus), (1, Some(next.modulus())));
    assert_eq!(entry.bundle.map(|bundle| bundle.bundle), Some(offer.bundle.bundle.as_slice()));
    let answer = alice.ask(&query).await;
    let Ok(Message::Other(body)) = Message::decode(&answer) else { panic!("a step") };
    let step = Successor { request: 3, modulus: next.modulus(), signature: &offer.signature };
    assert_eq!(Successor::decode(body), Ok(step));
    for (id, key_epoch) in [([BOB; 16], 1), ([BOB; 16], u32::MAX), ([9; 16], 0), ([1; 16], 0)] {
        let query = successor(id, key_epoch);
        assert_eq!(alice.refusal(&query.encode(&mut [0; 64]).unwrap()).await, Reason::Unknown);
    }

    // What is cut, or of another message, is refused by its number where that can be read.
    let mut bytes = [0; 4096];
    let len = query.encode(&mut bytes).unwrap();
    for (end, number) in [(len - 1, 3), (2, 0)] {
        let cut = Message::decode(&bytes[..end]).unwrap();
        let answer = alice.ask(&cut).await;
        let refused = Message::Refused { request: number, reason: Reason::Malformed, retry_after: None };
        assert_eq!(Message::decode(&answer), Ok(refused));
    }

    // A replay of what was said on the former connection, and the way back.
    assert_eq!(bob.refusal(&Offer { key_epoch: 2, ..offer }.message(&mut [0; 4096])).await, Reason::Unauthorised);
    assert_eq!(bob.refusal(&Offer::new(&bob, &next, &former, 2, 7).message(&mut [0; 4096])).await, Reason::NameInUse);
    assert_eq!(
        alice.refusal(&Offer::new(&alice, &keys::alice(), &former, 1, 7).message(&mut [0; 4096])).await,
        Reason::NameInUse
    );
    // Nobody comes with the former key under another name.
    let taken = Credentials::Enroll { id: [7; 16], name: "carol", key: ossicle_tests::public(&former), token: None };
    assert_eq!(Client::connect(&node, &taken, &former).await.map(drop), Err(refused(Reason::NameInUse)));
    alice.close().await;
    bob.close().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_key_ends_every_route() {
    let node = Node::start(open()).await;
    let (former, next) = (keys::bob(), keys::carol());
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    alice.listen().await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    let published = Published::new(BOB, &former, 1);
    bob.done(&Message::Publish { request: 1, bundle: published.signed() }).await;
    bob.done(&Message::Wrap { request: 2, to: [1; 16], wrap: &wrap(7), bundle: published.signed() }).await;
    bob.say(7, 0, Rungs::NONE.with(Rung::Accepted)).await;
    assert_eq!(bob.told().await.rung, Rung::Accepted);
    bob.done(&Offer::new(&bob, &former, &next, 1, 2).message(&mut [0; 4096])).await;
    assert!(node.store.chain(&[7; 8]).await.unwrap().is_none());
    let mut bob = Client::connect(&node, &credentials(BOB, &next, 1), &next).await.unwrap();
    bob.say(7, 1, Rungs::NONE).await;
    assert_eq!(bob.told().await.reason, Some(Reason::Rekey), "nobody remembers the route either");
    node.stop().await;
}

const WEEK: u64 = 7 * 24 * 3600;

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(flavor = "multi_thread")]
async fn prekeys_are_renewed_while_the_connection_stands_and_are_durable_before_they_are_shown() {
    let node = Node::start(open()).await;
    let (_directory, home, id) = node.house("bob").await;
    let database = home.directory().join("home.db");
    let durable = || HomeStore::open(&database).unwrap().keys().unwrap().unwrap();

    // As a crash leaves it: a bundle is made that the server has not got. It will be a week old in a moment.
    let first = durable().bundle;
    let mut store = HomeStore::open(&database).unwrap();
    let mut keys = store.keys().unwrap().unwrap().keys;
    keys.rotate(&mut Rng::new(9)).unwrap();
    let second = keys.bundle(&first.member(), 2, first.hash());
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();
    store.put_keys(&keys, &second, &key.sign(&second.statement()).unwrap(), now() - WEEK + 3).unwrap();
    drop(store);

    let access = Access::open_reader(&home, "listen").await.unwrap();
    let mut shown = vec![first];
    within(async {
        while shown.len() < 3 {
            let held = node.store.bundle(&id).await.unwrap().unwrap();
            let bundle = Bundle::decode(&held.bundle).unwrap();
            // What the server shows was durable before.
            assert!(durable().bundle.epoch >= bundle.epoch);
            if shown.last() != Some(&bundle) {
                shown.push(bundle);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(shown[1], second, "the one that was made is published, and no other of its epoch");
    let third = shown[2];
    assert_eq!((third.epoch, third.previous, third.prekey_id), (3, second.hash(), second.prekey_id + 1));
    assert_eq!((third.exchange, third.verifying), (first.exchange, first.verifying));
    assert_ne!(third.prekey, second.prekey);
    access.close().await;

    // The former halves still open what was wrapped to them.
    let own = durable();
    assert_eq!(own.bundle, third);
    for bundle in [first, second, third] {
        let prekey = own.prekeys.find(bundle.prekey_id).unwrap();
        assert_eq!((prekey.bundle(), prekey.key().public()), (&bundle.hash(), &bundle.prekey));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prekey_of_a_clock_that_ran_ahead_does_not_stay_for_years() {
    let node = Node::start(open()).await;
    let (_directory, home, id) = node.house("bob").await;
    let mut store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let mut own = store.keys().unwrap().unwrap();
    own.keys.rotate(&mut Rng::new(9)).unwrap();
    let ahead = own.keys.bundle(&own.bundle.member(), 2, own.bundle.hash());
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();
    store.put_keys(&own.keys, &ahead, &key.sign(&ahead.statement()).unwrap(), now() + 520 * WEEK).unwrap();
    // The first connection publishes it, a later one replaces it.
    for _ in 0..2 {
        let access = Access::open(&home, "who").await.unwrap();
        let mut who = access.request(Request::Who);
        within(async { while !who.next().await.is_final() {} }).await;
        access.close().await;
    }
    let shown = Bundle::decode(&node.store.bundle(&id).await.unwrap().unwrap().bundle).unwrap();
    assert_eq!((shown.epoch, shown.previous, shown.prekey_id), (3, ahead.hash(), ahead.prekey_id + 1));
    assert!(store.keys().unwrap().unwrap().made <= now());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_skipped_messages_are_erased_after_a_week() {
    let node = Node::start(open()).await;
    let (_directory, home, id) = node.house("bob").await;
    let access = Access::open_reader(&home, "listen").await.unwrap();

    // Of three messages the last comes.
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let member = Member { id: alice.id, key: keys::alice().fingerprint() };
    let own = BundleKeys::generate(1, &mut Rng::new(1)).unwrap();
    let bundle = own.bundle(&member, 1, [0; 32]);
    let published = Published::sign(&bundle, &keys::alice());
    alice.done(&Message::Publish { request: 1, bundle: published.signed() }).await;
    let theirs = Bundle::decode(&node.store.bundle(&id).await.unwrap().unwrap().bundle).unwrap();
    let conversation = Conversation::direct(&member, &theirs.member(), 0);
    let mut chain = SendingChain::start(&member, &conversation, 0, &mut Rng::new(2)).unwrap();
    let mut wrapped = [0; WRAP_LEN];
    chain.wrap(&own, &bundle, &theirs.member(), &theirs, &mut Rng::new(3), &mut wrapped).unwrap();
    let invite = Message::Wrap { request: 2, to: id, wrap: &wrapped, bundle: published.signed() };
    // He may not listen yet.
    while matches!(Message::decode(&alice.ask(&invite).await), Ok(Message::Refused { .. })) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut envelope = [0; 64];
    let mut len = 0;
    for _ in 0..3 {
        len = chain.seal::<RustCrypto>(false, 0, b"text", &mut envelope).unwrap().len;
    }
    let wanted = Rungs::NONE.with(Rung::Delivered);
    alice.send(&Message::Send { wanted, envelope: &envelope[..len] }).await;
    assert_eq!(alice.told().await.rung, Rung::Delivered);
    access.close().await;

    let mut store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let missing = |store: &HomeStore| {
        let stored = store.chain(chain.chain_id()).unwrap().unwrap();
        let held: Vec<u32> = ReceivingChain::<256>::decode(&stored.snapshot).unwrap().missing().collect();
        assert_eq!(stored.skipped, !held.is_empty());
        (stored, held.len())
    };
    let (gap, held) = missing(&store);
    assert_eq!(held, 2);
    // Not yet a week ago, and then a week ago.
    for (age, left) in [(WEEK - 3600, 2), (WEEK + 1, 0)] {
        let filled = StoredChain { skipped: false, snapshot: gap.snapshot.clone(), ..gap };
        store.receive(&[filled], &[], now()).unwrap();
        let since = StoredChain { skipped: true, snapshot: gap.snapshot.clone(), ..gap };
        store.receive(&[since], &[], now() - age).unwrap();
        let access = Access::open_reader(&home, "listen").await.unwrap();
        let mut who = access.request(Request::Who);
        within(async { while !who.next().await.is_final() {} }).await;
        access.close().await;
        assert_eq!(missing(&store).1, left, "{age} seconds ago");
    }
    node.stop().await;
}

/// Waits until the server knows that the client has everything: a wrap that takes the place of one which was given but is
/// not acknowledged yet is taken for the same.
async fn nothing_waits(node: &Node, client: &[u8; 16]) {
    within(async {
        while node.store.waiting(client).await.unwrap().items > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrap_under_a_key_that_the_directory_does_not_show_changes_nothing() {
    let node = Node::start(open()).await;
    let (_directory, home, id) = node.house("bob").await;
    let access = Access::open_reader(&home, "listen").await.unwrap();
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let member = Member { id: alice.id, key: keys::alice().fingerprint() };
    let own = BundleKeys::generate(1, &mut Rng::new(1)).unwrap();
    let bundle = own.bundle(&member, 1, [0; 32]);
    let published = Published::sign(&bundle, &keys::alice());
    alice.done(&Message::Publish { request: 1, bundle: published.signed() }).await;

    // Before alice is known, and when she is: her id, and a key that signs and is not hers.
    let made_up = Published::new(1, &keys::carol(), 2);
    let refused = |reason| (Rung::Refused, Some(reason));
    let wrapped = wrap(5);
    let forged = Message::Wrap { request: 2, to: id, wrap: &wrapped, bundle: made_up.signed() };
    for _ in 0..2 {
        // He may not listen yet.
        while matches!(Message::decode(&alice.ask(&forged).await), Ok(Message::Refused { .. })) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let told = alice.told().await;
        assert_eq!((told.rung, told.reason), refused(Reason::Unreadable));
        nothing_waits(&node, &id).await;
    }
    let mut verify = access.request(Request::Verify { name: "alice".to_owned(), accept: false });
    let verified = within(async {
        loop {
            let reply = verify.next().await;
            if reply.is_final() {
                break reply;
            }
        }
    });
    let Reply::Verified(verified) = verified.await else { panic!("alice is known") };
    assert_eq!((verified.pinned.fingerprint, verified.shown), (member.key, None));

    // Her own chain is taken.
    let theirs = Bundle::decode(&node.store.bundle(&id).await.unwrap().unwrap().bundle).unwrap();
    let conversation = Conversation::direct(&member, &theirs.member(), 0);
    let mut chain = SendingChain::start(&member, &conversation, 0, &mut Rng::new(2)).unwrap();
    let mut wrapped = [0; WRAP_LEN];
    chain.wrap(&own, &bundle, &theirs.member(), &theirs, &mut Rng::new(3), &mut wrapped).unwrap();
    alice.done(&Message::Wrap { request: 3, to: id, wrap: &wrapped, bundle: published.signed() }).await;
    let mut envelope = [0; 64];
    let len = chain.seal::<RustCrypto>(false, 0, b"text", &mut envelope).unwrap().len;
    let envelope = &envelope[..len];
    let (delivered, opened) = (Rungs::NONE.with(Rung::Delivered), Rungs::NONE.with(Rung::Opened));
    let both = delivered.with(Rung::Opened);
    alice.send(&Message::Send { wanted: both, envelope }).await;
    assert_eq!(alice.told().await.rung, Rung::Delivered);
    let waiting = within(access.waiting(0, 9)).await.unwrap();
    within(access.read(&waiting[0], false)).await.unwrap();
    assert_eq!(alice.told().await.rung, Rung::Opened);

    // A repetition is told what it wants, and nothing else.
    for (wanted, rungs) in [(both, &[Rung::Delivered, Rung::Opened][..]), (opened, &[Rung::Opened]), (Rungs::NONE, &[])]
    {
        alice.send(&Message::Send { wanted, envelope }).await;
        // It comes after them.
        alice.send(&Message::Wrap { request: 4, to: id, wrap: &wrap(5), bundle: made_up.signed() }).await;
        let mut told = Vec::new();
        loop {
            let payload = alice.message().await;
            match Message::decode(&payload) {
                Ok(Message::Told(receipt)) if receipt.rung == Rung::Refused => break,
                Ok(Message::Told(receipt)) => told.push(receipt.rung),
                Ok(Message::Done { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told, rungs);
        nothing_waits(&node, &id).await;
    }
    access.close().await;
    node.stop().await;
}
