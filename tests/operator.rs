//! A server under its operator's hand and eye while it runs: settings that change, status, metrics, its supervisor, its end.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::net::SocketAddr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use ossicle::crypto::IdentityKey;
use ossicle::limits::{Rate, Rates};
use ossicle::metrics::Monitor;
use ossicle::server::{Config, Policy};
use ossicle_core::{Credentials, EnvelopeHeader, Error, Message, PeerError, Reason, Rung, Rungs, Settings};
use ossicle_tests::cli::{DEADLINE, Running, World, binary};
use ossicle_tests::node::{Client, Heard, Node, Published, open, within, wrap};
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

#[test]
fn tokens_are_made_listed_and_ended_whether_the_server_runs_or_not() {
    let mut world = World::with(&["--enroll", "token"]);
    let data = world.path("server").to_str().unwrap().to_owned();
    let run =
        |world: &World, arguments: &[&str]| world.run("nobody", &[&["token"], arguments, &["--data", &data]].concat());
    let list = |world: &World| -> Vec<Value> {
        let lines = run(world, &["list", "--json"]).ok();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let init = |world: &World, home: &str, name: &str, url: &str| {
        world.run(home, &["init", "--name", name, "--rsa", "2048", url])
    };
    let printed = list(&world);
    assert_eq!((printed.len(), &printed[0]["printed"], &printed[0]["uses"]), (1, &true.into(), &Value::Null));

    // One client, within a day, unless the operator says otherwise.
    let made = run(&world, &["new"]);
    assert!(made.err.contains("admits 1 client until "), "{made:?}");
    let url = made.ok().trim().to_owned();
    assert_eq!(url.rsplit_once('.').unwrap().0, world.url.rsplit_once('.').unwrap().0, "the same server");
    init(&world, "a", "alice", &url).ok();
    init(&world, "b", "bob", &url).failed(1, "does not take this token");
    assert_eq!(list(&world).len(), 1, "it is used up");
    let made: Value = serde_json::from_str(
        &run(&world, &["new", "--uses", "2", "--ttl", "1h", "--name", "Sensor-[0-9]*", "--json"]).ok(),
    )
    .unwrap();
    let (url, id) = (made["url"].as_str().unwrap(), made["id"].as_str().unwrap());
    assert_eq!((&made["uses"], &made["name"]), (&2.into(), &"Sensor-[0-9]*".into()));
    init(&world, "b", "bob", url).failed(1, "does not take this token");
    init(&world, "s", "sensor-1", url).ok();
    let text = run(&world, &["list"]);
    let secret = url.rsplit_once('.').unwrap().1;
    assert!(!text.out.contains(secret) && !world.server_log().concat().contains(secret), "{text:?}");
    assert!(text.ok().contains(&format!("{id}  1 client named Sensor-[0-9]* until ")));

    // On the store, and whoever is admitted by it then.
    world.end_server();
    let refused = run(&world, &["revoke", id]);
    assert_eq!(refused.ok(), format!("{id} admits nobody any more\n"));
    run(&world, &["revoke", id]).failed(1, "no token");
    let made: Value = serde_json::from_str(
        &world
            .command("nobody", &["token", "new", "--json", "--data", &data])
            .env("OSSICLE_PORT", world.port())
            .output()
            .map(|output| String::from_utf8(output.stdout).unwrap())
            .unwrap(),
    )
    .unwrap();
    let unknown =
        world.command("nobody", &["token", "new", "--data", &data]).env("OSSICLE_PORT", "0").output().unwrap();
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("start it, and make the token then"));
    world.restart_server_with(&["--enroll", "token"]);
    init(&world, "c", "carol", url).failed(1, "does not take this token");
    // What stands before `#` is what the settings say of a server that does not run.
    let fragment = made["url"].as_str().unwrap().split_once('#').unwrap().1;
    init(&world, "c", "carol", &format!("ossicle://127.0.0.1:{}#{fragment}", world.port())).ok();
    run(&world, &["revoke", "0011223344556677"]).failed(1, "see those that do with `ossicle token list`");

    for (arguments, sentence) in [
        (&["new", "--uses", "0"][..], "1..=1000000"),
        (&["new", "--ttl", "366d"], "1s to 365d"),
        (&["new", "--ttl", "0s"], "1s to 365d"),
        (&["new", "--name", "[a"], "needs its ']'"),
        (&["revoke", "0011"], "16 hex digits"),
    ] {
        let wrong = run(&world, arguments);
        assert!(wrong.code == Some(2) && wrong.err.contains(sentence), "{wrong:?}");
    }
    world.run("nobody", &["settings", "--data", &data, "enroll=closed"]).ok();
    assert!(run(&world, &["new"]).err.contains("policy is closed"));
    world.run("nobody", &["token", "list", "--data", "/nonexistent"]).failed(1, "holds no server's data");
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

fn status(world: &World, home: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&world.run(home, &[&["status", "--json"], arguments].concat()).ok()).unwrap()
}

#[test]
fn status_tells_both_how_it_is() {
    let mut world = World::with(&["--metrics", "127.0.0.1:0", "--handshake-rate", "100", "--handshake-burst", "100"]);
    world.init("alice");
    let data = world.path("server").to_str().unwrap().to_owned();
    let listening = world.listen("alice", &[]);
    let of_server = status(&world, "nobody", &["--data", &data]);
    assert_eq!(of_server["address"], format!("127.0.0.1:{}", world.port()));
    assert_eq!((&of_server["connected"], &of_server["online"]), (&1.into(), &1.into()));
    assert_eq!((&of_server["enroll"], &of_server["listening"]), (&"open".into(), &true.into()));
    assert_eq!(of_server["store"]["refusing"], Value::Null);
    assert!(of_server["store"]["bytes"].as_u64() > Some(0) && of_server["handshakes"]["full"].as_u64() > Some(0));
    assert!(world.url.contains(of_server["fingerprint"].as_str().unwrap()));
    let text = world.run("nobody", &["status", "--data", &data]).ok();
    assert!(text.contains("1 connected, 1 of them online") && text.contains("is written"), "{text}");

    // Through the process that holds the home, and by itself.
    for connected in [Some(listening), None] {
        let of_client = status(&world, "alice", &[]);
        assert_eq!((&of_client["name"], &of_client["connected"]), (&"alice".into(), &true.into()));
        assert_eq!((&of_client["waiting"], &of_client["letters"]), (&0.into(), &0.into()));
        assert!(of_client["full_handshake"].is_string() && of_client["trouble"].is_null(), "{of_client}");
        drop(connected);
    }
    world.end_server();
    let done = world.run("alice", &["status"]).failed(3, "not connected");
    assert!(done.out.contains("  state     not connected"), "{done:?}");
    world.run("nobody", &["status", "--data", &data]).failed(3, "no server runs on");
}

/// The whole answer to these bytes, or what came of it.
fn http(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // Whoever is hung up on may be so while he still writes.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

fn get(address: &str, path: &str) -> (String, String) {
    let answer = http(address, &format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[test]
fn metrics_are_served_to_whoever_asks_and_name_nobody() {
    let world = World::with(&["--metrics", "127.0.0.1:0"]);
    world.init("alice-with-a-name");
    let _listening = world.listen("alice-with-a-name", &[]);
    let of_server = status(&world, "nobody", &["--data", world.path("server").to_str().unwrap()]);
    let at = of_server["metrics"].as_str().unwrap();
    assert_eq!(get(at, "/healthz"), ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned()));
    assert_eq!(get(at, "/readyz"), ("HTTP/1.1 200 OK".to_owned(), "ready\n".to_owned()));
    let (head, text) = get(at, "/metrics");
    assert_eq!(head, "HTTP/1.1 200 OK");
    assert!(text.ends_with("# EOF\n"), "{text}");
    for line in [
        "ossicle_clients_connected 1",
        "ossicle_clients_online 1",
        "ossicle_handshakes_open 0",
        "ossicle_under_load 0",
        "ossicle_handshakes_total{kind=\"full\"} 1",
        "ossicle_rate_limited_total{limit=\"messages\"} 0",
        "ossicle_handshakes_refused_total{reason=\"unauthorised\"} 0",
        "ossicle_store_refusing 0",
        "ossicle_queue_items 0",
        "ossicle_deliveries_total{from=\"store\"} 0",
        "ossicle_messages_refused_total{reason=\"rekey\"} 0",
        "# UNIT ossicle_store_commit_seconds seconds",
        "# TYPE ossicle_store_commit_seconds histogram",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} in {text}");
    }
    // Each series belongs to a family that says what it is, and no label is a client's.
    let families: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
    assert!(families.len() > 20, "{families:?}");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let suffixes = ["", "_total", "_bucket", "_sum", "_count", "_info"];
        let known = |family: &&str| suffixes.iter().any(|suffix| name.strip_suffix(suffix) == Some(*family));
        assert!(families.iter().any(known) && name.starts_with("ossicle_"), "{line}");
    }
    let of_client = status(&world, "alice-with-a-name", &[]);
    for secret in ["alice", "127.0.0.1", of_client["id"].as_str().unwrap()] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
    let first = |request: &str| http(at, request).lines().next().unwrap_or_default().to_owned();
    assert_eq!(first("POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(first("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 404 Not Found");
    assert_eq!(first("\0\0\0 nonsense\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert!(!first(&long).contains("200"), "a head without end");
    let headers = "X: y\r\n".repeat(1000);
    assert!(!first(&format!("GET /metrics HTTP/1.1\r\n{headers}\r\n")).contains("200"), "headers without end");

    // Those who say nothing are hung up on, further ones at once; and then others are served again.
    let silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(at).unwrap()).collect();
    for mut stream in silent {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let heard = stream.read(&mut [0; 1024]);
        assert!(heard.map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionReset, |_| true));
        let _ = stream.shutdown(Shutdown::Both);
    }
    let begun = Instant::now();
    while !http(at, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 200") {
        assert!(begun.elapsed() < DEADLINE, "it serves again");
    }
}

#[tokio::test]
async fn a_server_that_stops_is_not_ready() {
    let node = Node::start(open()).await;
    let monitor = Monitor::new(node.server.clone());
    let _alice = node.enrol(ALICE, "alice", keys::alice()).await;
    assert_eq!(monitor.obstacles().await, [""; 0]);
    let server = node.server.clone();
    node.stop().await;
    assert_eq!(monitor.obstacles().await, ["the server is stopping"]);
    assert!(!server.is_listening());
    let text = monitor.text();
    assert!(text.contains("ossicle_connections_ended_total{cause=\"unavailable\"} 1"), "{text}");
}

fn serve(world: &World, data: &str, arguments: &[&str]) -> Command {
    let mut command = world.command("nobody", &["serve", "--bind", "127.0.0.1", "--port", "0", "--rsa", "2048"]);
    command.arg("--data").arg(world.path(data)).args(arguments).env("RUST_LOG", "info");
    command
}

#[test]
fn its_supervisor_hears_that_it_is_ready_lives_and_stops() {
    let world = World::new();
    let path = world.path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut command = serve(&world, "supervised", &[]);
    let server = Running::start(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000"));
    let hear = |wanted: &str| {
        let mut bytes = [0; 4096];
        loop {
            let len = socket.recv(&mut bytes).expect("it says so in time");
            let said = String::from_utf8(bytes[..len].to_vec()).unwrap();
            if said.lines().any(|line| line.starts_with(wanted)) {
                return said;
            }
        }
    };
    assert!(hear("READY=1").contains("STATUS=0 clients are connected"));
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    server.signal("TERM");
    assert!(hear("STOPPING=1").contains("STATUS="));
    server.wait().ok();
}

#[test]
fn what_stands_in_the_way_of_metrics_is_one_sentence() {
    let world = World::new();
    let taken = format!("127.0.0.1:{}", world.port());
    Running::start(&mut serve(&world, "other", &["--metrics", &taken])).wait().failed(1, "cannot serve metrics at");
    let done = Running::start(&mut serve(&world, "other", &["--metrics", "9100"])).wait();
    done.failed(2, "--metrics: give an address of this machine and a port");
}

/// The unit for systemd, with the place of this binary.
fn unit() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../host/systemd/ossicle.service");
    let unit = std::fs::read_to_string(path).unwrap();
    assert_eq!(unit.matches("/usr/local/bin/ossicle ").count(), 1);
    unit.replace("/usr/local/bin/ossicle ", &format!("{} ", binary().display()))
}

#[test]
fn the_unit_starts_what_there_is() {
    let unit = unit();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<&str> = start.split(' ').collect();
    let done = Running::start(Command::new(words[0]).args(&words[1..]).arg("--check")).wait();
    assert!(done.ok().contains("metrics = \"127.0.0.1:9515\""));
}

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_is_one_for_systemd() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ossicle.service");
    std::fs::write(&path, unit()).unwrap();
    let verified = Running::start(Command::new("systemd-analyze").arg("verify").arg(&path)).wait();
    assert!(!verified.err.contains("ossicle.service"), "{verified:?}");
    let judged =
        Command::new("systemd-analyze").args(["security", "--offline=true", "--threshold=20"]).arg(&path).output();
    let judged = judged.unwrap();
    assert!(judged.status.success(), "{}", String::from_utf8_lossy(&judged.stdout));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let world = World::new();
    let mut command = serve(&world, "impatient", &["--farewell-within", "5m", "--heartbeat", "30m", "--timeout", "1h"]);
    let server = Running::start(&mut command);
    let url = server.line();
    for name in ["alice", "bob"] {
        world.run(name, &["init", "--name", name, "--rsa", "2048", &url]).ok();
    }
    let listening = world.listen("bob", &[]);
    // It reads no more, until what is on the way to it fills every buffer between.
    listening.signal("STOP");
    let mut sending = world.spawn("alice", &["send", "bob", "-", "--wait", "accepted"]);
    let line = "x".repeat(12_000) + "\n";
    sending.write(line.repeat(900).as_bytes());
    sending.end_input();
    sending.wait().ok();
    server.signal("TERM");
    let begun = Instant::now();
    while !server.said().contains("told to stop") {
        assert!(begun.elapsed() < DEADLINE, "{}", server.said());
        std::thread::sleep(core::time::Duration::from_millis(10));
    }
    server.signal("TERM");
    let done = server.wait();
    assert_eq!(done.code, Some(130), "{done:?}");
    assert!(done.err.contains("ossicle: ended at once"), "{done:?}");
    listening.signal("CONT");
}

/// Sends messages that are to be stored, 64 at a time, until the server has said its last. Which of them were stored, and
/// how it ended.
async fn flood(mut client: Client, chain: u8, stored: &AtomicU32) -> (Vec<u32>, Heard) {
    let mut confirmed = Vec::new();
    let (mut next, mut answered) = (0, 0);
    loop {
        for _ in 0..64 {
            client.say(chain, next, Rungs::NONE.with(Rung::Stored)).await;
            next += 1;
        }
        while answered < next {
            let heard = client.hear().await;
            let Heard::Message(payload) = &heard else { return (confirmed, heard) };
            let Ok(Message::Told(receipt)) = Message::decode(payload) else { panic!("a receipt") };
            answered = receipt.to + 1;
            if receipt.rung == Rung::Stored {
                confirmed.extend(receipt.from..=receipt.to);
                stored.fetch_add(receipt.to + 1 - receipt.from, Ordering::Relaxed);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_a_stop_under_load() {
    let world = World::new();
    let data = world.path("loaded");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
    keys::server().save(&data.join("server.key")).unwrap();
    let start = || {
        let server = Running::start(&mut serve(&world, "loaded", &[]));
        let url = server.line();
        let address = url.trim_start_matches("ossicle://").split('#').next().unwrap().parse().unwrap();
        (server, address)
    };
    let (server, address): (_, SocketAddr) = start();
    let enrolled = async |number: u8, name: &str, key: &IdentityKey| {
        let credentials = Credentials::Enroll { id: [number; 16], name, key: public(key), token: None };
        Client::connect_to(address, &credentials, key).await.unwrap()
    };
    enrolled(9, "bob", &keys::bob()).await.close().await;
    let stored = Arc::new(AtomicU32::new(0));
    let mut senders = Vec::new();
    for (chain, name, key) in [(1, "alice", keys::alice()), (2, "carol", keys::carol())] {
        let mut sender = enrolled(chain, name, &key).await;
        let bundle = Published::new(chain, &key, 0);
        sender.done(&Message::Wrap { request: 9, to: [9; 16], wrap: &wrap(chain), bundle: bundle.signed() }).await;
        let stored = Arc::clone(&stored);
        senders.push(tokio::spawn(async move { flood(sender, chain, &stored).await }));
    }
    while stored.load(Ordering::Relaxed) < 1_000 {
        tokio::time::sleep(core::time::Duration::from_millis(1)).await;
    }
    server.signal("TERM");
    let mut promised = Vec::new();
    for sender in senders {
        let (confirmed, ended) = within(sender).await.unwrap();
        assert_eq!(ended, Heard::Closed(Some(Reason::Unavailable)), "everybody is told");
        promised.push(confirmed);
    }
    server.wait().ok();

    let (server, address) = start();
    let key = keys::bob();
    let bob = Credentials::Key { id: [9; 16], key_epoch: 0, fingerprint: key.fingerprint() };
    let mut bob = Client::connect_to(address, &bob, &key).await.unwrap();
    bob.send(&Message::Listening).await;
    let mut came = [Vec::new(), Vec::new()];
    while promised.iter().zip(&came).any(|(promised, came): (&Vec<u32>, &Vec<u32>)| came.last() < promised.last()) {
        let payload = bob.message().await;
        if let Ok(Message::Deliver { envelope, .. }) = Message::decode(&payload) {
            let header = EnvelopeHeader::decode(envelope).unwrap();
            came[usize::from(header.chain_id[0]) - 1].push(header.n);
        }
    }
    for (promised, came) in promised.iter().zip(&came) {
        assert!(came.is_sorted_by(|one, next| one < next), "in order, and none twice");
        assert!(promised.iter().all(|n| came.binary_search(n).is_ok()), "nothing that was promised is missing");
    }
    drop(server);
}
