//! Groups in which people talk, with the real binary: what one says, the others read, each once and under the sender's
//! signature; what became of it is told for each member.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::thread::sleep;
use std::time::Instant;

use ossicle_tests::cli::{Done, Running, World};
use serde_json::Value;

fn people(names: &[&str]) -> World {
    let world = World::new();
    for name in names {
        world.init(name);
    }
    world
}

/// `printf INPUT | ossicle chat`, to its end.
fn chat(world: &World, home: &str, input: &str) -> Done {
    let mut chat = world.spawn(home, &["chat"]);
    chat.write(input.as_bytes());
    chat.end_input();
    chat.wait()
}

/// Repeats a command of the chat until it prints this.
fn until(world: &World, home: &str, input: &str, wanted: &str) {
    let begun = Instant::now();
    loop {
        let done = chat(world, home, input);
        if done.out.contains(wanted) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{wanted:?} in {done:?}");
        sleep(Duration::from_millis(50));
    }
}

/// The first of these has founded the group `plans`, and the others are in it, as far as each of them knows.
fn plans(world: &World, names: &[&str]) {
    let (founder, others) = names.split_first().unwrap();
    let invited: Vec<String> = others.iter().map(|name| format!(" @{name}")).collect();
    chat(world, founder, &format!("/init plans{}\n", invited.concat())).ok();
    for name in others {
        chat(world, name, "/accept plans\n").ok();
    }
    for name in names {
        let all = format!("{0} of {0} others are in", others.len());
        until(world, name, "/members plans\n", &all);
    }
}

/// The next message of somebody who listens: from whom, in which group, what; it is signed.
fn read(listening: &Running) -> (String, String, String) {
    let line = listening.line();
    let message: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(message["signed"], true, "{line}");
    let field = |name: &str| message[name].as_str().unwrap_or_default().to_owned();
    (field("from"), field("group"), field("text"))
}

fn said(from: &str, text: &str) -> (String, String, String) {
    (from.to_owned(), "plans".to_owned(), text.to_owned())
}

/// What a script learns of its message: each step, with the member that it is about.
fn steps(out: &str) -> Vec<(String, String)> {
    let steps = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let word = |step: &Value, name: &str| step[name].as_str().unwrap_or_default().to_owned();
    let mut steps: Vec<(String, String)> = steps.map(|step| (word(&step, "member"), word(&step, "rung"))).collect();
    steps.retain(|(_, rung)| rung != "accepted" && rung != "stored");
    steps.sort_unstable();
    steps
}

fn by(member: &str, rung: &str) -> (String, String) {
    (member.to_owned(), rung.to_owned())
}

#[test]
fn everybody_hears_everybody_and_confirms_for_himself() {
    let world = people(&["alice", "bob", "carol"]);
    plans(&world, &["alice", "bob", "carol"]);
    let (bob, carol) = (world.listen("bob", &[]), world.listen("carol", &[]));
    let out = world.run("alice", &["send", "--json", "plans", "at eight"]).ok();
    assert_eq!(steps(&out), [by("bob", "delivered"), by("carol", "delivered")]);
    // Sealed once: it has one id for all, and the server was given it once.
    let lines: Vec<Value> = [&bob, &carol].map(|listening| serde_json::from_str(&listening.line()).unwrap()).into();
    assert_eq!(lines[0]["id"], lines[1]["id"]);
    for line in lines {
        assert_eq!(
            (&line["from"], &line["group"], &line["text"]),
            (&"alice".into(), &"plans".into(), &"at eight".into())
        );
        assert_eq!(line["signed"], true);
    }
    // In any spelling, through the process that listens, and until everybody has read it.
    let alice = world.listen("alice", &[]);
    let out = world.run("bob", &["send", "--json", "--wait", "opened", "PLANS", "fine"]).ok();
    assert!(steps(&out).ends_with(&[by("carol", "delivered"), by("carol", "opened")]), "{out}");
    for listening in [&alice, &carol] {
        assert_eq!(read(listening), said("bob", "fine"));
    }
    bob.signal("INT");
    bob.wait();
    let mut typing = world.spawn("bob", &["chat"]);
    typing.write(b"/msg plans one\ntwo\n");
    typing.end_input();
    let done = typing.wait().ok();
    for text in ["one", "two"] {
        for listening in [&alice, &carol] {
            assert_eq!(read(listening), said("bob", text));
        }
        assert!(done.contains("✓ delivered to ") && done.contains(&format!(" in plans: {text}\n")), "{done}");
    }
    assert!(alice.is_silent() && carol.is_silent());
    // What came while nobody wrote back is counted.
    let mut reading = world.spawn("bob", &["chat"]);
    world.run("carol", &["send", "plans", "three"]).ok();
    while !reading.line().contains("carol in plans: three") {}
    reading.write(b"/list\n/msg plans four\n/list\n");
    reading.end_input();
    let done = reading.wait().ok();
    assert_eq!(done.matches("since you last wrote there: 1 from plans\n").count(), 1, "{done}");
}

#[test]
fn who_is_away_gets_it_later_and_who_joins_later_reads_from_there_on() {
    let world = people(&["alice", "bob", "carol"]);
    chat(&world, "alice", "/init plans @bob @carol\n").ok();
    let refused = world.run("alice", &["send", "plans", "hello?"]);
    refused.failed(1, "refused(not-member): nobody has joined plans yet");
    chat(&world, "bob", "/accept plans\n").ok();

    let mut alice = world.spawn("alice", &["chat"]);
    alice.write(b"/msg plans one\n");
    let heard = |running: &Running, wanted: &str| {
        while !running.line().contains(wanted) {}
    };
    heard(&alice, "bob is offline");
    let bob = world.listen("bob", &["--count", "2"]);
    assert_eq!(read(&bob), said("alice", "one"));
    heard(&alice, "✓ delivered to bob in plans: one");
    chat(&world, "carol", "/accept plans\n").ok();
    heard(&alice, "plans: carol accepted");
    alice.write(b"two\n");
    assert_eq!(read(&bob), said("alice", "two"));
    assert_eq!(bob.wait().code, Some(0));
    let carol = world.listen("carol", &[]);
    assert_eq!(read(&carol), said("alice", "two"), "what was said before she joined is not for her");
    alice.end_input();
    let done = alice.wait();
    assert_eq!((done.code, done.err.as_str()), (Some(0), ""), "{done:?}");
    assert!(carol.is_silent());
}

#[test]
fn what_a_killed_process_has_sent_is_read_once_and_heard_of_by_the_next() {
    let mut world = people(&["alice", "bob", "carol"]);
    plans(&world, &["alice", "bob", "carol"]);
    let mut sending = world.spawn("alice", &["send", "--json", "plans", "before the cut"]);
    while !sending.line().contains("stored") {}
    sending.kill();
    world.restart_server();
    let bob = world.listen("bob", &[]);
    assert_eq!(read(&bob), said("alice", "before the cut"));
    // The next process repeats what it has no receipts for, as the same bytes, and learns of both.
    let alice = world.spawn("alice", &["listen", "--json"]);
    let carol = world.listen("carol", &[]);
    assert_eq!(read(&carol), said("alice", "before the cut"));
    let begun = Instant::now();
    while !alice.said().contains("delivered to plans: before the cut") {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", alice.said());
        sleep(Duration::from_millis(50));
    }
    assert!(bob.is_silent() && carol.is_silent());
}

#[test]
fn a_script_is_told_of_a_member_who_is_there_and_says_nothing() {
    let world = people(&["alice", "bob", "carol"]);
    plans(&world, &["alice", "bob", "carol"]);
    let (bob, carol) = (world.listen("bob", &[]), world.listen("carol", &[]));
    carol.signal("STOP");
    let done = chat(&world, "alice", "/msg plans one\n");
    carol.signal("CONT");
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.out.contains("✓ delivered to bob in plans: one\n"), "{done:?}");
    assert!(done.err.contains("✗ not confirmed by plans: one: "), "{done:?}");
    assert!(done.err.contains("not everybody in plans has confirmed it; do not send it again\n"), "{done:?}");
    // And it is not lost.
    for listening in [&bob, &carol] {
        assert_eq!(read(listening), said("alice", "one"));
    }
}

#[test]
fn what_was_not_sent_fails_with_the_end_of_its_group() {
    let mut world = people(&["alice", "bob"]);
    plans(&world, &["alice", "bob"]);
    world.stop_server();
    world.run("alice", &["send", "--timeout", "1s", "plans", "too late"]).failed(3, "outbox");
    world.restart_server();
    assert!(chat(&world, "bob", "/close plans\n").ok().contains("plans is closed\n"));
    let alice = world.spawn("alice", &["listen"]);
    let begun = Instant::now();
    while !alice.said().contains("not delivered to plans: too late") {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", alice.said());
        sleep(Duration::from_millis(50));
    }
    assert!(alice.said().contains("refused(closed)"), "{}", alice.said());
    drop(alice);
    world.run("alice", &["send", "plans", "hello?"]).failed(1, "refused(closed): plans is closed");
}

#[test]
fn new_keys_bring_new_chains_and_nobody_reads_anything_twice() {
    let world = people(&["alice", "bob", "carol", "dora"]);
    plans(&world, &["alice", "bob", "carol", "dora"]);
    let carol = world.listen("carol", &[]);
    // Dora keeps an earlier state, and comes back with it.
    let copy = world.path("dora.backup");
    world.run("dora", &["backup", copy.to_str().unwrap()]).ok();
    let mut alice = world.spawn("alice", &["chat"]);
    alice.write(b"/msg plans one\n");
    assert_eq!(read(&carol), said("alice", "one"));
    let read_alone = |name: &str, text: &str| {
        let listening = world.spawn(name, &["listen", "--json", "--count", "1"]);
        assert_eq!(read(&listening), said("alice", text));
        assert_eq!(listening.wait().code, Some(0));
    };
    read_alone("bob", "one");
    read_alone("dora", "one");
    // Bob's key is replaced by another one, which the others follow.
    world.run("bob", &["init", "--rotate", "--rsa", "2048"]).ok();
    alice.write(b"two\n");
    read_alone("bob", "two");
    read_alone("dora", "two");
    assert_eq!(read(&carol), said("alice", "two"));
    world.run("dora", &["restore", "--replace", copy.to_str().unwrap()]).ok();
    alice.write(b"three\n");
    assert_eq!(read(&carol), said("alice", "three"));
    read_alone("dora", "three");
    read_alone("bob", "three");
    // Whoever may not enter any more gets nothing more, and nobody waits for him.
    world.run("nobody", &["revoke", "bob", "--data", world.path("server").to_str().unwrap()]).ok();
    alice.write(b"four\n");
    assert_eq!(read(&carol), said("alice", "four"));
    read_alone("dora", "four");
    alice.end_input();
    let done = alice.wait();
    assert!(done.out.contains("four"), "{done:?}");
    assert!(carol.is_silent());
}

#[test]
fn who_restores_an_old_state_is_in_the_group_again() {
    let world = people(&["alice", "bob", "carol"]);
    let [before, after] = ["before.backup", "after.backup"].map(|name| world.path(name).to_str().unwrap().to_owned());
    world.run("carol", &["backup", &before]).ok();
    plans(&world, &["alice", "bob", "carol"]);
    world.run("carol", &["backup", &after]).ok();
    let say = |home: &str, group: &str, text: &str| {
        world.run(home, &["send", group, text, "--wait", "stored"]).ok();
    };
    let bob = world.listen("bob", &[]);
    let carol = world.listen("carol", &["--count", "1"]);
    say("alice", "plans", "one");
    assert_eq!(read(&bob), said("alice", "one"));
    assert_eq!(read(&carol), said("alice", "one"));
    assert_eq!(carol.wait().code, Some(0));
    // One that knows of the group; and one that does not, and that has no key for its name.
    for (backup, group, text) in [(&after, "plans", "two"), (&before, "~1", "three")] {
        world.run("carol", &["restore", "--replace", backup]).ok();
        if group == "~1" {
            until(&world, "carol", "/accept ~1\n", "2 of 2 others are in");
        }
        let carol = world.listen("carol", &[]);
        say("alice", "plans", text);
        assert_eq!(read(&bob), said("alice", text));
        assert_eq!(read(&carol), ("alice".to_owned(), group.to_owned(), text.to_owned()));
        say("carol", group, "here I am");
        assert_eq!(read(&bob), said("carol", "here I am"));
        assert!(carol.is_silent());
    }
    assert!(bob.is_silent());
}

#[test]
fn groups_of_one_name_and_a_client_of_that_name_are_told_apart() {
    let world = people(&["alice", "bob", "plans"]);
    chat(&world, "alice", "/init plans @bob\n").ok();
    chat(&world, "bob", "/accept plans\n").ok();
    chat(&world, "bob", "/init plans @alice\n").ok();
    chat(&world, "alice", "/accept plans~2\n").ok();
    until(&world, "alice", "/members plans\n", "1 of 1 others are in");
    until(&world, "bob", "/members plans~2\n", "1 of 1 others are in");
    let bob = world.listen("bob", &[]);
    let plans = world.listen("plans", &[]);
    for (to, text) in [("plans", "first"), ("plans~2", "second"), ("@plans", "third")] {
        world.run("alice", &["send", to, text]).ok();
    }
    let of = |group: &str, text: &str| ("alice".to_owned(), group.to_owned(), text.to_owned());
    assert_eq!([read(&bob), read(&bob)], [of("plans", "first"), of("plans~2", "second")]);
    assert_eq!(read(&plans), of("", "third"));
    world.run("alice", &["send", "--no-sign", "plans", "x"]).failed(2, "always signed");
    let history = chat(&world, "alice", "/msg plans fourth\n/history plans\n/history plans~2\n").ok();
    assert!(history.contains(" you: fourth\n") && history.contains("nothing that was said with plans~2"), "{history}");
    let history = chat(&world, "alice", "/msg @plans fifth\n/history\n/history plans\n").ok();
    assert_eq!(
        (history.matches(" you: fifth\n").count(), history.matches(" you: fourth\n").count()),
        (1, 1),
        "{history}"
    );
}

#[test]
fn who_comes_later_believes_a_member_with_a_newer_key() {
    let world = people(&["alice", "bob", "carol"]);
    chat(&world, "alice", "/init plans @bob @carol\n").ok();
    chat(&world, "bob", "/accept plans\n").ok();
    // Carol knows both by the time that Bob's key is replaced.
    until(&world, "carol", "/members plans\n", "plans  invited, founded by alice");
    world.run("bob", &["init", "--rotate", "--rsa", "2048"]).ok();
    world.run("bob", &["who"]).ok();
    chat(&world, "carol", "/accept plans\n").ok();
    until(&world, "carol", "/members plans\n", "  bob    accepted\n");
    until(&world, "bob", "/members plans\n", "  carol  accepted\n");
    let bob = world.listen("bob", &[]);
    let out = world.run("carol", &["send", "--json", "--wait", "stored", "plans", "hello"]).ok();
    assert!(out.contains("stored"), "{out}");
    assert_eq!(read(&bob), said("carol", "hello"));
    drop(bob);
    let alice = world.listen("alice", &[]);
    assert_eq!(read(&alice), said("carol", "hello"));
    assert!(alice.is_silent());
}
