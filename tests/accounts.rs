//! Accounts with passwords: made by the operator, entered by the real binary and by scripted clients, right and wrong.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Arc;

use ossicle::accounts::Password;
use ossicle::clock::Clock;
use ossicle::crypto::IdentityKey;
use ossicle::name::Name;
use ossicle::server::{Config, Policy};
use ossicle::store::AccountChange;
use ossicle_core::{Error, Login, Lookup, Message, PeerError, Reason, Rungs, Subject, SuccessorQuery};
use ossicle_tests::cli::{Done, World};
use ossicle_tests::node::{Client, Heard, Node, Published, RECORD_LIMIT, open, refused};
use ossicle_tests::terminal::Terminal;
use ossicle_tests::{keys, public};
use serde_json::Value;

const PASSWORD: &str = "correct horse";
const ALICE: u8 = 1;

/// Runs a command with this on its standard input.
fn typed(world: &World, home: &str, arguments: &[&str], input: &str) -> Done {
    let mut running = world.spawn(home, arguments);
    running.write(input.as_bytes());
    running.end_input();
    running.wait()
}

fn account(world: &World, arguments: &[&str], input: &str) -> Done {
    let data = world.path("server");
    typed(world, "nobody", &[&["account"], arguments, &["--data", data.to_str().unwrap()]].concat(), input)
}

fn log_in(world: &World, home: &str, name: &str, password: &str) -> Done {
    let url = world.url.rsplit_once('.').filter(|(_, token)| token.len() == 32).map_or(&*world.url, |(url, _)| url);
    typed(world, home, &["init", "--name", name, "--rsa", "2048", "--password", url], password)
}

fn text(line: &str) -> String {
    serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned()
}

fn id(printed: &str) -> &str {
    printed.lines().find_map(|line| line.trim().strip_prefix("id ")).unwrap().trim()
}

#[test]
fn a_password_admits_and_another_machine_takes_the_account_over() {
    // Nobody enrols here: an account is the operator's own will.
    let world = World::with(&["--enroll", "closed"]);
    account(&world, &["add", "alice"], "correct horse\n").ok();
    account(&world, &["add", "Bob"], "battery staple\r\n").ok();
    account(&world, &["add", "ALICE"], "something else\n").failed(1, "has an account already");
    log_in(&world, "alice", "alice", "correct horse").ok();
    let first = log_in(&world, "bob", "bob", "battery staple\n").ok();
    assert!(first.starts_with("Bob has entered") || first.starts_with("bob has entered"), "{first}");
    let sent = world.run("alice", &["send", "bob", "for the first machine", "--wait", "stored"]);
    sent.ok();
    let bob = world.listen("bob", &[]);
    assert_eq!(text(&bob.line()), "for the first machine");

    // The second machine keeps the id; the first is told, and does not come back.
    let second = log_in(&world, "bob2", "BOB", "battery staple").ok();
    assert_eq!(id(&second), id(&first));
    bob.wait().failed(1, "by its password, with another key");
    world.run("bob", &["who"]).failed(1, "does not let Bob in");
    // Whoever knows the former key is warned, and nothing is sent before he has looked.
    world.run("alice", &["send", "bob", "secret"]).failed(1, "KEY CHANGED");
    let verified = world.run("alice", &["verify", "bob"]);
    assert!(format!("{}{}", verified.out, verified.err).contains("KEY CHANGED"), "{verified:?}");
    world.run("alice", &["verify", "bob", "--accept"]).ok();
    let bob = world.spawn("bob2", &["listen", "--json"]);
    world.run("alice", &["send", "bob", "for the second machine"]).ok();
    assert_eq!(text(&bob.line()), "for the second machine");
    world.run("bob2", &["send", "alice", "thanks", "--wait", "stored"]).ok();
    // By the same key nothing happens to anybody.
    let listed = world.run("nobody", &["account", "list", "--json", "--data", world.path("server").to_str().unwrap()]);
    assert!(!listed.out.contains("argon2"), "{listed:?}");
    assert_eq!(listed.ok().lines().count(), 2);
    let log = world.server_log().concat();
    assert!(!log.contains("battery") && !log.contains("correct horse") && !log.contains("argon2"), "{log}");
}

#[test]
fn what_is_wrong_with_a_login_is_said_and_leaves_nothing_behind() {
    let mut world = World::with(&["--enroll", "token"]);
    account(&world, &["add", "alice"], "correct horse\n").ok();
    let refused = |world: &World, done: Done, home: &str| {
        let sentence = done.err.replace(home, "NAME");
        done.failed(1, "does not take this password");
        assert!(!world.path(home).join("identity.pem").exists(), "nothing half made");
        sentence
    };
    // A wrong password, and a name that has no account, for everybody alike.
    let wrong = refused(&world, log_in(&world, "alice", "alice", "correct horsf"), "alice");
    let unknown = refused(&world, log_in(&world, "nobody2", "nobody2", "correct horse"), "nobody2");
    assert_eq!(wrong, unknown);
    account(&world, &["lock", "alice"], "").ok();
    let locked = refused(&world, log_in(&world, "alice", "alice", "correct horse"), "alice");
    assert_eq!(locked, wrong);
    account(&world, &["unlock", "alice"], "").ok();
    log_in(&world, "alice", "alice", "correct horse").ok();

    // Only to a server that is known, and only once there is a password.
    let (address, _) = world.url.split_once('#').unwrap();
    let init = |arguments: &[&str], input: &str| {
        typed(&world, "b", &[&["init", "--name", "bob", "--rsa", "2048", "--password"], arguments].concat(), input)
    };
    init(&[address], "correct horse").failed(2, "this URL has none");
    assert_eq!(init(&["--trust-first-use", address], "correct horse").code, Some(2));
    init(&[&world.url], "").failed(2, "no password on standard input");
    init(&[&world.url], "a\tb\n").failed(2, "no control characters");
    init(&[&world.url], &"x".repeat(2000)).failed(2, "longer than any password");
    init(&[&format!("{address}#{}", "00".repeat(32))], "correct horse").failed(1, "another key than the URL says");
    assert!(!world.path("b").join("identity.pem").exists());
    // An account keeps its name.
    account(&world, &["add", "bob"], "battery staple").ok();
    world.run("b", &["init", "--name", "bob", "--rsa", "2048", &world.url]).failed(1, "the name bob is in use");

    for (arguments, input, code, sentence) in [
        (&["add", "carol"][..], "short", 2, "at least 8 characters"),
        (&["add", "carol"], "", 2, "no password on standard input"),
        (&["passwd", "carol"], "long enough", 1, "no account named carol"),
        (&["lock", "carol"], "", 1, "no account named carol"),
    ] {
        account(&world, arguments, input).failed(code, sentence);
    }
    // The same on the store of a server that does not run.
    world.end_server();
    account(&world, &["passwd", "bob"], "another battery\n").ok();
    account(&world, &["lock", "alice"], "").ok();
    account(&world, &["add", "carol"], "long enough").ok();
    account(&world, &["remove", "carol"], "").ok();
    let listed = account(&world, &["list", "--json"], "").ok();
    let listed: Vec<Value> = listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let state = |n: usize| (listed[n]["name"].as_str(), listed[n]["locked"].as_bool(), listed[n]["enrolled"].as_bool());
    assert_eq!((listed.len(), state(0)), (2, (Some("alice"), Some(true), Some(true))));
    assert_eq!(state(1), (Some("bob"), Some(false), Some(false)));
    world.restart_server_with(&["--enroll", "token"]);
    refused(&world, log_in(&world, "bob", "bob", "battery staple"), "bob");
    log_in(&world, "bob", "bob", "another battery").ok();
    // A key that is enrolled goes on, whatever becomes of the account.
    world.run("alice", &["who"]).ok();
    world.run("nobody", &["revoke", "bob", "--data", world.path("server").to_str().unwrap()]).ok();
    refused(&world, log_in(&world, "bob2", "bob", "another battery"), "bob2");
}

#[test]
fn a_terminal_shows_nothing_of_a_password_and_is_itself_again_after_an_interrupt() {
    let world = World::new();
    let data = world.path("server");
    let add = world.command("nobody", &["account", "add", "alice", "--data", data.to_str().unwrap()]);
    let mut terminal = Terminal::start(&add, (10, 80));
    terminal.will_write(b"New password of alice: ");
    terminal.write("correct horse\r");
    terminal.will_write(b"The same again: ");
    terminal.write("correct horsf\r");
    terminal.will_write(b"the two are not the same");
    assert!(!terminal.wrote(b"correct"), "{}", terminal.screen());
    assert_eq!((terminal.wait(), terminal.is_ordinary()), (Some(2), true));
    let mut terminal = Terminal::start(&add, (10, 80));
    terminal.will_write(b"New password of alice: ");
    assert!(!terminal.is_ordinary());
    terminal.write("correct\x03");
    assert_eq!((terminal.wait(), terminal.is_ordinary()), (Some(130), true));
    assert!(!terminal.wrote(b"correct"), "{}", terminal.screen());
    let mut terminal = Terminal::start(&add, (10, 80));
    terminal.will_write(b"New password of alice: ");
    terminal.write("correct horse\r");
    terminal.will_write(b"The same again: ");
    terminal.write("correct horse\r");
    terminal.will_write(b"alice has an account");

    let init = world.command("alice", &["init", "--name", "alice", "--rsa", "2048", "--password", &world.url]);
    let mut terminal = Terminal::start(&init, (10, 80));
    terminal.will_write(b"Password of alice: ");
    terminal.write("correct horse\r");
    terminal.will_write(b"alice has entered");
    assert!(!terminal.wrote(b"correct"), "{}", terminal.screen());
}

/// A server with an account for alice, who is enrolled by key.
async fn with_account(config: Config) -> Node {
    let node = Node::start(config).await;
    add(&node, "alice").await;
    node
}

async fn add(node: &Node, name: &str) {
    let verifier = Password::prepare(PASSWORD).unwrap().verifier().unwrap();
    node.store.add_account(Name::parse(name).unwrap(), verifier, 1).await.unwrap();
}

fn login<'c>(number: u8, name: &'c str, key: &'c IdentityKey, password: &'c str) -> Login<'c> {
    let password = ossicle_core::Password::new(password.as_bytes()).unwrap();
    Login { id: [number; 16], name, key: public(key), password }
}

async fn enter(node: &Node, login: &Login<'_>, key: &IdentityKey) -> Result<Client, Error> {
    let mut client = Client::hello(node, RECORD_LIMIT).await;
    client.log_in(login, key).await?;
    client.settle().await?;
    Ok(client)
}

/// Who the directory says that `name` is: id, key epoch, modulus.
async fn directory(client: &mut Client, name: &str) -> ([u8; 16], u32, Vec<u8>) {
    let answer = client
        .ask(&Message::Lookup(Lookup { request: 1, key: true, bundle: false, subject: Subject::Name(name) }))
        .await;
    match Message::decode(&answer) {
        Ok(Message::LookupResponse { entry, .. }) => (entry.id, entry.key_epoch, entry.modulus.unwrap().to_vec()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_client_of_an_account_keeps_its_id_and_queue_and_loses_its_key() {
    let node = Node::start(open()).await;
    let (alice, new) = (keys::alice(), keys::carol());
    let mut old = node.enrol(ALICE, "alice", keys::alice()).await;
    let channel = old.take_channel();
    let bundle = Published::new(ALICE, &alice, 1);
    old.done(&Message::Publish { request: 1, bundle: bundle.signed() }).await;
    let mut bob = node.enrol(2, "bob", keys::bob()).await;
    let signed = Published::new(2, &keys::bob(), 1);
    let wrap = ossicle_tests::node::wrap(7);
    bob.done(&Message::Wrap { request: 2, to: [ALICE; 16], wrap: &wrap, bundle: signed.signed() }).await;
    add(&node, "alice").await;

    let mut entered = enter(&node, &login(9, "Alice", &new, PASSWORD), &new).await.unwrap();
    assert_eq!((entered.settings.valid_for, entered.settings.channel), (0, [0; 16]), "no channel");
    assert!(entered.connection.take_channel().is_none());
    loop {
        match old.hear().await {
            Heard::Closed(reason) => break assert_eq!(reason, Some(Reason::KeyChanged)),
            Heard::Message(_) => {}
            Heard::Ended => panic!("it is told why"),
        }
    }
    assert_eq!(directory(&mut entered, "ALICE").await, ([ALICE; 16], 1, new.modulus().to_vec()));
    // Nothing says that the former key gave way.
    let mut buffer = [0; 64];
    let query = SuccessorQuery { request: 3, id: [ALICE; 16], key_epoch: 0 };
    assert_eq!(bob.refusal(&query.encode(&mut buffer).unwrap()).await, Reason::Unknown);
    // Routes are gone, what waits is not.
    bob.say(7, 0, Rungs::NONE).await;
    assert!(matches!(bob.told().await, receipt if format!("{receipt:?}").contains("Rekey")));
    assert!(node.connect(ALICE, &alice).await.is_err(), "never again");
    assert!(Client::resume(&node, channel).await.is_err());
    entered.close().await;
    let mut alice = Client::connect(
        &node,
        &ossicle_core::Credentials::Key { id: [ALICE; 16], key_epoch: 1, fingerprint: new.fingerprint() },
        &new,
    )
    .await
    .unwrap();
    assert_eq!(alice.settings.waiting, 1);
    let bundle = Published::new(ALICE, &new, 1);
    alice.done(&Message::Publish { request: 4, bundle: bundle.signed() }).await;
    alice.listen().await;
    // The same login again changes nothing, and takes over like any connection.
    let again = enter(&node, &login(10, "alice", &new, PASSWORD), &new).await.unwrap();
    drop(again);
    let mut again = Client::connect(
        &node,
        &ossicle_core::Credentials::Key { id: [ALICE; 16], key_epoch: 1, fingerprint: new.fingerprint() },
        &new,
    )
    .await
    .unwrap();
    assert_eq!(directory(&mut again, "alice").await.1, 1);
    // With the former key, the password does not help.
    let former = keys::alice();
    let refusal = enter(&node, &login(11, "alice", &former, PASSWORD), &former).await.err();
    assert_eq!(refusal, Some(refused(Reason::NameInUse)));
}

#[tokio::test]
async fn unknown_names_and_locked_accounts_are_answered_like_a_wrong_password() {
    let node = with_account(Config { enrol: Policy::Closed, ..open() }).await;
    let key = keys::alice();
    let unauthorised = Some(refused(Reason::Unauthorised));
    assert_eq!(enter(&node, &login(1, "alice", &key, "wrong horse"), &key).await.err(), unauthorised);
    assert_eq!(enter(&node, &login(1, "nobody", &key, PASSWORD), &key).await.err(), unauthorised);
    let alice = Name::parse("alice").unwrap();
    node.store.change_account(&alice, AccountChange::Locked(true), 2).await.unwrap();
    assert_eq!(enter(&node, &login(1, "alice", &key, PASSWORD), &key).await.err(), unauthorised);
    node.store.change_account(&alice, AccountChange::Locked(false), 2).await.unwrap();
    // Whoever does not hold the key binds none.
    let other = keys::bob();
    assert_eq!(enter(&node, &login(1, "alice", &key, PASSWORD), &other).await.err(), unauthorised);
    assert_eq!(enter(&node, &login(1, "a b", &key, PASSWORD), &key).await.err(), Some(refused(Reason::Malformed)));
    assert!(enter(&node, &login(1, "alice", &key, PASSWORD), &key).await.is_ok());
    assert!(node.connect(1, &key).await.is_ok(), "its first key has epoch 0");
}

#[tokio::test]
async fn five_passwords_may_be_tried_and_then_one_in_ten_minutes() {
    let seconds = Arc::new(AtomicU64::new(0));
    let read = Arc::clone(&seconds);
    let node = Node::start_by(Clock::new(move || Duration::from_secs(read.load(Ordering::Relaxed))), open()).await;
    add(&node, "alice").await;
    let key = keys::alice();
    let tried = async |name: &str, password: &str| match enter(&node, &login(1, name, &key, password), &key).await {
        Ok(_) => None,
        Err(Error::Peer(PeerError::Refused { reason, retry_after })) => Some((reason, retry_after)),
        Err(error) => panic!("{error}"),
    };
    for name in ["alice", "nobody"] {
        for _ in 0..5 {
            assert_eq!(tried(name, "wrong horse").await, Some((Reason::Unauthorised, 0)));
        }
        let (reason, wait) = tried(name, PASSWORD).await.unwrap();
        assert_eq!(reason, Reason::Rate, "also with the right one, and whether there is such an account or not");
        assert!((599_000..=600_000).contains(&wait), "{wait}");
    }
    seconds.store(600, Ordering::Relaxed);
    assert_eq!(tried("alice", PASSWORD).await, None);
    assert!(tried("alice", PASSWORD).await.is_some());
}

#[tokio::test]
async fn a_password_is_not_told_to_whoever_answers() {
    let node = with_account(open()).await;
    let key = keys::alice();
    let mut client = Client::hello_to_anyone(&node).await;
    let error = client.log_in(&login(1, "alice", &key, PASSWORD), &key).await.err();
    assert_eq!(error, Some(ossicle_core::ApiMisuse::InvalidArgument.into()));
}
