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
    for listening in [&bob, &carol] {
        assert_eq!(read(listening), said("alice", "at eight"));
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
}
