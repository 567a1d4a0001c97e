//! A server under its operator's hand while it runs: settings that change, and everybody whom they concern.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt;

use ossicle::crypto::IdentityKey;
use ossicle::limits::{Rate, Rates};
use ossicle::server::{Config, Policy};
use ossicle_core::{Credentials, Error, Message, PeerError, Reason, Settings};
use ossicle_tests::cli::World;
use ossicle_tests::node::{Client, Heard, Node, open};
use ossicle_tests::script::Script;
use ossicle_tests::{keys, public};
use serde_json::Value;

const ALICE: u8 = 1;

/// Settings that a server sends while connected.
fn beat(heartbeat: u16, timeout: u16) -> Message<'static> {
    Message::Settings(Settings { heartbeat, timeout, ..Settings::default() })
}

fn world_settings(world: &World, arguments: &[&str]) -> Value {
    let data = world.path("server");
    let arguments = [&["settings", "--json", "--data", data.to_str().unwrap()], arguments].concat();
    serde_json::from_str(&world.run("nobody", &arguments).ok()).unwrap()
}

fn setting<'s>(settings: &'s Value, key: &str) -> (&'s Value, &'s str) {
    let found = settings["settings"].as_array().unwrap().iter().find(|setting| setting["key"] == key).unwrap();
    (&found["value"], found["source"].as_str().unwrap())
}

#[test]
fn settings_are_shown_and_changed_on_a_server_that_runs() {
    let mut world = World::with(&["--heartbeat", "20s"]);
    let data = world.path("server").to_str().unwrap().to_owned();
    let shown = world_settings(&world, &[]);
    assert_eq!(setting(&shown, "heartbeat"), (&"20s".into(), "flag"));
    assert_eq!(setting(&shown, "timeout"), (&"45s".into(), "default"));

    let changed = world.run("nobody", &["settings", "--data", &data, "heartbeat=30s", "message-rate = 7"]);
    assert!(changed.err.contains("until the server ends"), "{changed:?}");
    let changed = changed.ok();
    assert!(changed.contains("heartbeat = \"30s\""), "{changed}");
    assert!(changed.contains("message-rate = 7"), "{changed}");
    assert_eq!(changed.lines().count(), 3, "the file, and what was changed: {changed}");
    let shown = world_settings(&world, &["heartbeat", "rsa"]);
    assert_eq!(setting(&shown, "heartbeat"), (&"30s".into(), "operator"));
    assert_eq!(shown["settings"].as_array().unwrap().len(), 2);

    // All or nothing, and each mistake is named.
    for (arguments, sentences) in [
        (&["heartbeat=1m", "timeout=10s"][..], &["nothing was changed", "must be longer than heartbeat (1m"][..]),
        (&["timeout=1h", "port=1", "hartbeat=1s"], &["port cannot change", "did you mean `heartbeat`?"]),
        (&["timeout=soon"], &["timeout: give a duration"]),
        (&["timeout=1h", "timeout=2h"], &["given twice"]),
        (&["nonsense"], &["there is no setting `nonsense`"]),
    ] {
        let done = world.run("nobody", &[&["settings", "--data", &data], arguments].concat());
        for sentence in sentences {
            assert!(done.err.contains(sentence), "{sentence:?} in {done:?}");
        }
        assert_eq!(done.code, Some(2), "{done:?}");
    }
    let shown = world_settings(&world, &[]);
    assert_eq!(setting(&shown, "timeout"), (&"45s".into(), "default"));

    // They end with the server; and where none runs, nobody has settings.
    world.end_server();
    world.run("nobody", &["settings", "--data", &data]).failed(3, "no server runs on");
    world.restart_server();
    assert_eq!(setting(&world_settings(&world, &[]), "heartbeat"), (&"15s".into(), "default"));
    let mode = world.path("server").join("control").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn whoever_is_connected_is_told_and_given_up_by_the_new_times() {
    let node = Node::start(Config { heartbeat: 3600, timeout: 7200, ..open() }).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let channel = alice.take_channel();
    assert_eq!((alice.settings.heartbeat, alice.settings.timeout), (3600, 7200));
    node.server.reconfigure(Config { heartbeat: 1, timeout: 2, ..open() });
    let told = alice.message().await;
    let Ok(Message::Settings(settings)) = Message::decode(&told) else { panic!("settings") };
    assert_eq!((settings.heartbeat, settings.timeout), (1, 2));
    assert_eq!((settings.channel, settings.valid_for), ([0; 16], 0), "no channel is issued by the way");
    // It is asked after the new heartbeat, and then given up, though it came in when there was an hour.
    let asked = alice.hear_next().await;
    assert!(matches!(&asked, Heard::Message(asked) if matches!(Message::decode(asked), Ok(Message::Status { .. }))));
    assert_eq!(alice.hear_next().await, Heard::Ended);
    // The channel that was issued before stands.
    assert!(Client::resume(&node, channel).await.unwrap().is_resumed());
}

#[tokio::test]
async fn rates_and_enrolment_hold_for_the_next_request() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let slow = Rate { per_second: 1, burst: 1 };
    let rates = Rates { messages: slow, ..Rates::default() };
    node.server.reconfigure(Config { enrol: Policy::Closed, rates, ..open() });
    alice.sync().await;
    alice.send(&Message::List { request: 7, after: "" }).await;
    assert!(matches!(
        Message::decode(&alice.message().await),
        Ok(Message::Refused { request: 7, reason: Reason::Rate, retry_after: Some(_) })
    ));
    let key = keys::bob();
    let bob = Credentials::Enroll { id: [2; 16], name: "bob", key: public(&key), token: None };
    let refusal = Client::connect(&node, &bob, &key).await.err();
    assert!(matches!(refusal, Some(Error::Peer(PeerError::Refused { reason: Reason::Forbidden, .. }))), "{refusal:?}");
    node.server.reconfigure(open());
    alice.sync().await;
    assert!(Client::connect(&node, &bob, &key).await.is_ok());
}

#[test]
fn a_clients_command_takes_new_times_from_its_server() {
    let mut world = World::new();
    world.init("alice");
    world.end_server();
    // The same server, which says from now on what the test says.
    let server = IdentityKey::load(&world.path("server").join("server.key")).unwrap();
    let alice = IdentityKey::load(&world.path("alice").join("identity.pem")).unwrap();
    let mut script = Script::at(world.port().parse().unwrap(), server);
    script.beat = (3600, 7200);
    let listening = world.spawn("alice", &["listen", "--json"]);
    let mut server = script.accept(&alice);
    server.send(&beat(1, 3));
    // A sign of life, hours before the first settings wanted one; and nobody answers it.
    loop {
        match Message::decode(&server.receive()).unwrap() {
            Message::Status { .. } => break,
            Message::Publish { request, .. } => server.send(&Message::Done { request }),
            _ => {}
        }
    }
    assert!(server.is_ended());
    drop(listening);
}
