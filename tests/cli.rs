//! The client's commands as people and scripts use them: the real binary, a real server, exit codes and all.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use ossicle_core::{IdentityPage, MAX_PAGE_LEN};
use ossicle_tests::cli::{Piped, Running, World, binary};
use serde_json::Value;

fn object(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

fn text(line: &str) -> String {
    object(line)["text"].as_str().unwrap_or_else(|| panic!("a text: {line}")).to_owned()
}

fn people(names: &[&str]) -> World {
    let world = World::new();
    for name in names {
        world.init(name);
    }
    world
}

#[test]
fn two_people_talk() {
    let world = people(&["alice", "bob"]);
    let (alice, bob) = (world.listen("alice", &[]), world.listen("bob", &[]));

    let sent = world.run("alice", &["send", "bob", "good morning, Zoë\u{1b}[2J"]);
    assert_eq!(sent.err, "stored\ndelivered\n");
    sent.ok();
    let line = bob.line();
    assert!(!line.contains('\u{1b}'), "{line}");
    let message = object(&line);
    assert_eq!(message["from"], "alice");
    assert_eq!(message["text"], "good morning, Zoë\u{1b}[2J");
    assert_eq!(message["signed"], true);
    let fields: Vec<&str> = message.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields.len(), 7, "{fields:?}");
    assert!(message["server_accepted"].is_string(), "{message}");

    let sent = world.run("bob", &["send", "Alice", "back", "--wait", "opened", "--json", "--no-sign"]).ok();
    let rungs: Vec<Value> = sent.lines().map(object).collect();
    let told: Vec<&str> = rungs.iter().map(|step| step["rung"].as_str().unwrap()).collect();
    assert_eq!(told, ["stored", "delivered", "opened"]);
    let reply = object(&alice.line());
    assert_eq!(reply["id"], rungs[0]["id"]);
    assert_eq!(reply["signed"], false);
    assert_eq!(reply["conversation"], message["conversation"]);
}

#[test]
fn each_line_of_the_input_is_a_message_and_bytes_are_data() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut send = world.spawn("alice", &["send", "bob", "-"]);
    for n in 0..100 {
        send.write(format!("line {n}\n").as_bytes());
    }
    send.write(b"\n\xff\xfe\nlast");
    send.end_input();
    send.wait().ok();
    for n in 0..100 {
        assert_eq!(text(&bob.line()), format!("line {n}"));
    }
    assert_eq!(text(&bob.line()), "");
    assert_eq!(object(&bob.line())["data"], "//4=");
    assert_eq!(text(&bob.line()), "last");
}

#[test]
fn what_is_too_long_is_refused_before_it_is_sent() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut send = world.spawn("alice", &["send", "bob", "-"]);
    send.write(b"first\n");
    send.write(&[b'x'; 16_281]);
    send.write(b"\nnever\n");
    send.end_input();
    send.wait().failed(1, "refused(too-large): line 2");
    assert_eq!(text(&bob.line()), "first");
    let mut send = world.spawn("alice", &["send", "bob", "-"]);
    send.write(&[b'x'; 16_280]);
    send.end_input();
    send.wait().ok();
    assert_eq!(text(&bob.line()).len(), 16_280);
    assert!(bob.is_silent());
}

#[test]
fn a_loop_answers_under_one_identity() {
    let world = people(&["alice", "bob"]);
    let alice = world.listen("alice", &[]);
    let script = format!(
        "{0} listen --json --count 3 | while read -r m; do {0} send alice \"got one\" || exit 9; done",
        binary().display()
    );
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).env("OSSICLE_HOME", world.path("bob"));
    let echo = Running::start(&mut shell);
    world.wait_online("bob", true);
    for n in 0..3 {
        // Alice's own listener holds her home: this works through it.
        world.run("alice", &["send", "bob", &format!("ping {n}")]).ok();
        assert_eq!(text(&alice.line()), "got one");
    }
    let echo = echo.wait();
    assert_eq!((echo.code, echo.err.contains("took over")), (Some(0), false), "{echo:?}");
    let mut alice = alice;
    assert!(alice.is_running(), "nobody took alice over");
}

#[test]
fn nobody_who_is_not_there_gets_anything_and_the_sender_learns_it() {
    let world = people(&["alice", "bob"]);
    world.run("alice", &["send", "--timeout", "1s", "bob", "hello"]).failed(3, "not reached within 1s: bob");
    world.run("alice", &["send", "carol", "hello"]).failed(1, "refused(unknown): the server knows nobody");
    world.run("alice", &["send", "ALICE", "hello"]).failed(2, "own name");
    let usage = world.run("alice", &["send", "not a name", "hello"]);
    assert_eq!(usage.code, Some(2), "{usage:?}");
}

#[test]
fn what_a_listen_did_not_print_waits_for_the_next() {
    let world = people(&["alice", "bob"]);
    // It takes messages and prints none: the pattern selects nobody.
    let mut bob = world.listen("bob", &["nobody"]);
    let mut send = world.spawn("alice", &["send", "bob", "-"]);
    send.write(b"one\ntwo\nthree\n");
    send.end_input();
    send.wait().ok();
    assert!(bob.is_silent());
    bob.kill();

    let first = world.run("bob", &["listen", "--json", "--count", "1"]).ok();
    assert_eq!(text(&first), "one");
    let none = world.spawn("bob", &["listen", "--json", "[!a]*"]);
    assert!(none.is_silent());
    drop(none);
    let rest = world.run("bob", &["listen", "--json", "ali*", "--count", "2"]).ok();
    assert_eq!(rest.lines().map(text).collect::<Vec<_>>(), ["two", "three"]);
    let nothing = world.spawn("bob", &["listen"]);
    assert!(nothing.is_silent());
}

#[test]
fn a_closed_pipe_ends_listen_quietly_and_loses_nothing() {
    let world = people(&["alice", "bob"]);
    let mut bob = Piped::start(&mut world.command("bob", &["listen", "--json"]));
    world.wait_online("bob", true);
    world.run("alice", &["send", "bob", "one"]).ok();
    assert_eq!(text(&bob.line()), "one");
    let bob = bob.close();
    world.run("alice", &["send", "bob", "two"]).ok();
    let ended = bob.wait();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    assert_eq!(text(&world.run("bob", &["listen", "--json", "--count", "1"]).ok()), "two");
}

#[test]
fn opened_is_told_when_the_line_was_written_and_not_before() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.listen("bob", &["nobody"]);
    let mut send = world.spawn("alice", &["send", "bob", "read me", "--json", "--wait", "opened"]);
    assert_eq!(object(&send.line())["rung"], "stored");
    assert_eq!(object(&send.line())["rung"], "delivered");
    bob.kill();
    assert!(send.is_silent() && send.is_running());
    assert_eq!(text(&world.run("bob", &["listen", "--json", "--count", "1"]).ok()), "read me");
    assert_eq!(object(&send.line())["rung"], "opened");
    send.wait().ok();
}

#[test]
fn a_home_is_made_once_and_is_for_its_owner_alone() {
    let world = people(&["alice"]);
    let again = world.run("alice", &["init", "--name", "alice2", "--rsa", "2048", &world.url]);
    again.failed(1, "is the home of alice already");
    let listen = world.listen("alice", &[]);
    assert_eq!(fs::metadata(world.path("alice")).unwrap().mode() & 0o7777, 0o700);
    let mut files = Vec::new();
    for entry in fs::read_dir(world.path("alice")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.path());
        files.push(entry.file_name().into_string().unwrap());
    }
    assert!(files.contains(&"socket".to_owned()) && files.contains(&"identity.pem".to_owned()), "{files:?}");

    let second = world.run("alice", &["listen"]);
    let holder = format!("another `ossicle listen` (pid {}) already listens with this home", listen.id());
    second.failed(1, &holder);
    listen.signal("INT");
    assert_eq!(listen.wait().code, Some(130));

    let none = world.run("nobody", &["listen"]);
    none.failed(2, "ossicle init");
    fs::set_permissions(world.path("alice"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    world.run("alice", &["who"]).failed(2, "chmod 700");
}

#[test]
fn init_says_what_stands_in_its_way_and_leaves_nothing_half_made() {
    let mut world = people(&["alice"]);
    let init = |home: &str, name: &str, url: &str| world.run(home, &["init", "--name", name, "--rsa", "2048", url]);
    init("b", "ALICE", &world.url).failed(1, "the name ALICE is in use");
    let (address, fingerprint) = world.url.split_once('#').unwrap();
    let other = format!("{address}#{}", "00".repeat(32));
    init("b", "bob", &other).failed(1, "another key than the URL says");
    init("b", "bob", &format!("{address}#{}", &fingerprint[1..])).failed(2, "64 hex digits");
    init("b", "bob", address).failed(2, "--trust-first-use");
    init("b", "bob", "ossicle://127.0.0.1:1#".replace('#', &world.url[address.len()..]).as_str())
        .failed(3, "is `ossicle serve` running there");
    // The same home after all that, and a server that nobody vouched for.
    let trusted = world.run("b", &["init", "--name", "bob", "--rsa", "2048", "--trust-first-use", address]).ok();
    assert!(trusted.contains(fingerprint), "{trusted}");
    assert!(world.run("b", &["who", "--json"]).ok().contains("\"bob\""));

    world.stop_server();
    let unreached = world.run("alice", &["send", "b", "x", "--timeout", "1s"]);
    unreached.failed(3, "cannot reach 127.0.0.1");
}

#[test]
fn tokens_admit_and_closed_servers_do_not() {
    let world = World::with(&["--enroll", "token"]);
    let (plain, token) = world.url.rsplit_once('.').unwrap();
    let init = |url: &str| world.run("alice", &["init", "--name", "alice", "--rsa", "2048", url]);
    init(plain).failed(1, "only with a token");
    let wrong: String = token.chars().rev().collect();
    init(&format!("{plain}.{wrong}")).failed(1, "does not take this token");
    init(&world.url).ok();

    let closed = World::with(&["--enroll", "closed"]);
    let refused = closed.run("alice", &["init", "--name", "alice", "--rsa", "2048", &closed.url]);
    refused.failed(1, "admits no new clients");
    assert!(!closed.path("alice").join("identity.pem").exists());
}

#[test]
fn a_copied_home_takes_over_and_the_first_is_told() {
    let world = people(&["alice"]);
    let first = world.listen("alice", &[]);
    fs::create_dir(world.path("copy")).unwrap();
    fs::set_permissions(world.path("copy"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for file in ["identity.pem", "home.db", "home.db-wal"] {
        fs::copy(world.path("alice").join(file), world.path("copy").join(file)).unwrap();
    }
    world.run("copy", &["who"]).ok();
    first.wait().failed(1, "another connection of alice took over");
}

#[test]
fn a_restarted_server_finds_everybody_again() {
    let mut world = people(&["alice", "bob"]);
    let (_alice, bob) = (world.listen("alice", &[]), world.listen("bob", &[]));
    world.run("alice", &["send", "bob", "before"]).ok();
    assert_eq!(text(&bob.line()), "before");
    world.restart_server();
    world.wait_online("bob", true);
    // Over the chain that alice's listener has had since before.
    world.run("alice", &["send", "bob", "after"]).ok();
    assert_eq!(text(&bob.line()), "after");
}

#[test]
fn what_waited_comes_in_order_and_is_shown_once_through_kills() {
    let world = people(&["alice", "bob"]);
    let mut send = world.spawn("alice", &["send", "bob", "-", "--wait", "stored"]);
    let lines: Vec<String> = (0..60).map(|n| format!("line {n}")).collect();
    send.write((lines.join("\n") + "\n").as_bytes());
    send.end_input();
    let sent = send.wait();
    assert_eq!((sent.code, sent.err.matches(": stored\n").count()), (Some(0), 60), "{sent:?}");
    // It takes what waited, and prints none of it: that waits in the home when this is killed.
    let mut silent = world.listen("bob", &["nobody"]);
    assert!(silent.is_silent());
    silent.kill();
    let mut shown = Vec::new();
    for count in ["7", "53"] {
        let printed = world.run("bob", &["listen", "--json", "--count", count]).ok();
        for line in printed.lines() {
            assert!(object(line)["server_accepted"].is_string(), "{line}");
            shown.push(text(line));
        }
    }
    assert_eq!(shown, lines);
    assert!(world.spawn("bob", &["listen"]).is_silent());
    // What became of it is heard by whoever has the sender's home next.
    let alice = world.spawn("alice", &["listen"]);
    while alice.said().matches("delivered to bob: line").count() < lines.len() {
        assert!(alice.said().len() < 100_000);
        std::thread::yield_now();
    }
}

#[test]
fn a_long_send_survives_a_kill_of_the_server() {
    let mut world = people(&["alice", "bob"]);
    let mut send = world.spawn("alice", &["send", "bob", "-", "--wait", "stored", "--json", "--timeout", "60s"]);
    send.write(b"0\n1\n2\n");
    assert_eq!(object(&send.line())["rung"], "stored");
    world.stop_server();
    send.write(b"3\n4\n");
    world.restart_server();
    send.write(b"5\n");
    send.end_input();
    send.wait().ok();
    let printed = world.run("bob", &["listen", "--json", "--count", "6"]).ok();
    assert_eq!(printed.lines().map(text).collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "5"]);
    assert!(world.spawn("bob", &["listen"]).is_silent(), "and nothing twice");
}

#[test]
fn another_server_at_the_same_address_is_told_nothing() {
    let mut world = people(&["alice", "bob"]);
    world.stop_server();
    fs::remove_dir_all(world.path("server")).unwrap();
    world.restart_server();
    world.run("alice", &["send", "bob", "secret"]).failed(1, "has another key than the pinned one");
    world.run("alice", &["listen"]).failed(1, "has another key than the pinned one");
}

#[test]
fn a_recipient_that_lost_its_chains_gets_a_new_one_unasked() {
    let world = people(&["alice", "bob"]);
    let _alice = world.listen("alice", &[]);
    let files = ["home.db", "home.db-wal"];
    let read = |file: &str| fs::read(world.path("bob").join(file)).ok();
    let before = files.map(read);
    let mut bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "one"]).ok();
    assert_eq!(text(&bob.line()), "one");
    bob.kill();
    let _ = fs::remove_file(world.path("bob/home.db-shm"));
    for (file, bytes) in files.into_iter().zip(before) {
        match bytes {
            Some(bytes) => fs::write(world.path("bob").join(file), bytes).unwrap(),
            None => drop(fs::remove_file(world.path("bob").join(file))),
        }
    }
    let bob = world.listen("bob", &[]);
    // Alice's listener still has the chain, and bob has never heard of it.
    let sent = world.run("alice", &["send", "bob", "two"]);
    assert_eq!(sent.err, "stored\ndelivered\n");
    assert_eq!(text(&bob.line()), "two");
    assert!(bob.is_silent());
}

#[test]
fn a_key_that_changed_gets_nothing() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "hello"]).ok();
    assert_eq!(text(&bob.line()), "hello");
    let before = number("alice", "bob", &world);
    assert_eq!(before, number("bob", "alice", &world), "both see the same");
    let data = world.path("server");
    world.run("alice", &["revoke", "bob"]).failed(1, "refused(forbidden)");
    world.run("alice", &["revoke", "bob", "--data", data.to_str().unwrap()]).ok();
    bob.end_input();
    bob.wait().failed(1, "was revoked");
    world.run("bob", &["who"]).failed(1, "does not let bob in");

    // Another key under the same name, as a thief or a careless owner would bring.
    world.run("other", &["init", "--name", "bob", "--rsa", "2048", &world.url]).ok();
    let other = world.spawn("other", &["listen", "--json"]);
    while !world.run("alice", &["who", "bob", "--json"]).ok().contains("\"online\":true") {}
    let refused = world.run("alice", &["send", "bob", "secret"]).failed(1, "refused(key-changed)");
    assert!(refused.err.contains("KEY CHANGED"), "{refused:?}");
    assert!(other.is_silent());
    // And the other way round: alice does not take messages from it either.
    let alice = world.listen("alice", &[]);
    world.run("other", &["send", "alice", "it is me"]).failed(1, "refused(key-changed)");
    assert!(alice.is_silent());

    // Both keys are shown, by whoever holds the home; looking changes nothing.
    let shown = world.run("alice", &["verify", "bob", "--json"]).failed(1, "KEY CHANGED");
    let shown = object(&shown.out);
    assert_eq!(shown["accepted"], false);
    assert_ne!(shown["key"], shown["new_key"]);
    assert_ne!(shown["safety_number"], shown["new_safety_number"]);
    assert_eq!(shown["safety_number"], before);
    world.run("alice", &["send", "bob", "secret"]).failed(1, "refused(key-changed)");
    assert!(other.is_silent());

    // Accepted, it is bob: what was refused goes again, both ways, and what bob sends is shown as his.
    let accepted = object(&world.run("alice", &["verify", "bob", "--accept", "--json"]).ok());
    assert_eq!(accepted["accepted"], true);
    assert_eq!(accepted["new_key"], shown["new_key"]);
    world.run("alice", &["send", "bob", "welcome"]).ok();
    assert_eq!(text(&other.line()), "welcome");
    world.run("other", &["send", "alice", "it is me"]).ok();
    let message = object(&alice.line());
    assert_eq!((&message["from"], &message["text"]), (&Value::from("bob"), &Value::from("it is me")));
    let now = object(&world.run("alice", &["verify", "bob", "--json"]).ok());
    assert_eq!(now["key"], shown["new_key"]);
    assert_eq!(now["safety_number"], number("other", "alice", &world), "both see the same");
    assert!(world.run("alice", &["verify", "bob", "--accept"]).ok().contains("nothing to accept"));
    alice.signal("INT");
    let said = alice.wait().err;
    assert_eq!(said.matches("KEY CHANGED").count(), 1, "loud, and once: {said}");
    // What nobody has is nobody's number.
    world.run("alice", &["verify", "zoe"]).failed(1, "refused(unknown)");
    world.run("alice", &["verify", "Alice"]).failed(2, "own name");
}

/// The safety number that `home` sees with `name`.
fn number(home: &str, name: &str, world: &World) -> Value {
    let shown = world.run(home, &["verify", name, "--json"]);
    object(&shown.out)["safety_number"].clone()
}

#[test]
fn a_short_holder_finishes_what_others_asked_of_it() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.listen("bob", &["nobody"]);
    let mut holder = world.spawn("alice", &["send", "bob", "-", "--json"]);
    holder.write(b"from the holder\n");
    holder.line();
    holder.line();
    let follower = world.spawn("alice", &["send", "bob", "from the follower", "--wait", "opened", "--json"]);
    follower.line();
    follower.line();
    holder.end_input();
    assert!(follower.is_silent());
    assert!(holder.is_running(), "the follower is not done");
    bob.kill();
    world.run("bob", &["listen", "--count", "2"]).ok();
    assert_eq!(object(&follower.line())["rung"], "opened");
    follower.wait().ok();
    holder.wait().ok();
    world.listen("bob", &[]);
}

#[test]
fn whoever_loses_its_holder_goes_on_alone_and_sends_nothing_twice() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &["nobody"]);
    let mut holder = world.listen("alice", &[]);
    // Taken by the holder, and never confirmed: it is in the home, so whoever waits for it takes it from there.
    let taken = world.spawn("alice", &["send", "bob", "once", "--wait", "opened", "--json", "--timeout", "60s"]);
    taken.line();
    taken.line();
    holder.kill();
    // Either of the two holds the home now, and waits for the other before it ends.
    let next = world.spawn("alice", &["send", "bob", "twice"]);
    drop(bob);
    let got = world.run("bob", &["listen", "--json", "--count", "2"]).ok();
    assert_eq!(got.lines().map(text).collect::<Vec<_>>(), ["once", "twice"]);
    assert!(taken.wait().ok().contains("\"rung\":\"opened\""));
    next.wait().ok();
    assert!(world.spawn("bob", &["listen"]).is_silent());
}

#[test]
fn a_device_gets_its_page_and_its_owner_can_revoke_it() {
    let world = people(&["alice"]);
    let out = world.path("sensor.page");
    let page = out.to_str().unwrap();
    let enroll = |arguments: &[&str]| {
        world.run("alice", &[&["enroll", "sensor-01", "--report-to", "alice", "--out", page], arguments].concat())
    };
    enroll(&["--address", "10.0.2.2:5150"]).ok();
    let bytes = fs::read(&out).unwrap();
    assert!(bytes.len() <= MAX_PAGE_LEN);
    assert_eq!(fs::metadata(&out).unwrap().mode() & 0o7777, 0o600);
    let decoded = IdentityPage::decode(&bytes).unwrap();
    assert_eq!((decoded.name, decoded.owner.name), ("sensor-01", "alice"));
    assert_eq!((decoded.address, decoded.port), ([10, 0, 2, 2], 5150));
    assert_eq!(decoded.server.bits(), 2048);
    assert!(world.run("alice", &["who", "sensor-*"]).ok().contains("offline, never seen"));

    enroll(&[]).failed(2, "exists already");
    fs::remove_file(&out).unwrap();
    enroll(&[]).failed(1, "refused(name-in-use)");
    assert!(!out.exists());
    world.run("alice", &["send", "sensor-01", "led on"]).failed(1, "refused(offline)");
    world.run("alice", &["revoke", "sensor-01"]).ok();
    world.run("alice", &["send", "sensor-01", "led on"]).failed(1, "refused(unknown)");
    let listen = world.listen("alice", &[]);
    // Through the listener that holds the home.
    enroll(&[]).ok();
    assert_eq!(IdentityPage::decode(&fs::read(&out).unwrap()).unwrap().address, [127, 0, 0, 1]);
    drop(listen);

    world.run("big", &["init", "--name", "big", "--rsa", "4096", &world.url]).ok();
    let refused = world.run("alice", &["enroll", "sensor-02", "--report-to", "big", "--out", &format!("{page}2")]);
    refused.failed(1, "the key of big has 4096 bits");
    assert!(!world.run("alice", &["who"]).ok().contains("sensor-02"));
}

#[test]
fn help_has_examples_and_the_version_is_told() {
    let world = World::new();
    for command in ["serve", "init", "send", "listen", "who", "enroll", "revoke"] {
        let help = world.run("x", &[command, "--help"]).ok();
        assert!(help.contains("Examples:"), "{command}");
    }
    assert!(world.run("x", &["--version"]).ok().starts_with("ossicle 0."));
}

#[test]
fn an_interrupted_listen_has_printed_each_message_once() {
    let world = World::new();
    world.init("alice");
    world.init("bob");
    world.listen("bob", &[]).signal("INT");
    world.wait_online("bob", false);
    let mut send = world.spawn("alice", &["send", "bob", "-", "--wait", "stored"]);
    for number in 0..150 {
        send.write(format!("{number}\n").as_bytes());
    }
    send.end_input();
    send.wait().ok();
    let mut heard = Vec::new();
    while heard.len() < 150 {
        let listen = world.spawn("bob", &["listen", "--json"]);
        let first = listen.line();
        listen.signal(["INT", "TERM"][heard.len() % 2]);
        let done = listen.wait();
        assert_eq!(done.code, Some(130), "{done:?}");
        for line in core::iter::once(first.as_str()).chain(done.out.lines()) {
            let line: Value = serde_json::from_str(line).unwrap();
            heard.push(line["text"].as_str().unwrap().parse::<u32>().unwrap());
        }
    }
    assert_eq!(heard, (0..150).collect::<Vec<_>>());
}
