//! Groups as people and scripts live them, with the real binary: founding, invitations that wait, answers, the end.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::thread::sleep;
use std::time::Instant;

use ossicle_tests::cli::{Done, World};

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

fn refused(world: &World, home: &str, input: &str, code: i32, sentence: &str) {
    let done = chat(world, home, input);
    assert!(done.code == Some(code) && done.err.contains(sentence), "{sentence:?} in {done:?}");
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

#[test]
fn a_group_is_founded_joined_and_closed() {
    let world = people(&["alice", "bob", "carol"]);
    let out = chat(&world, "alice", "/init plans @bob carol @alice\n").ok();
    let founded = "plans  accepted, founded by alice, 0 of 2 others are in\n  bob    invited\n  carol  invited\n";
    assert_eq!(out, founded);
    // They were away, and are told when they come.
    let out = chat(&world, "bob", "/accept plans\n").ok();
    let joined = "plans  accepted, founded by alice, 1 of 2 others are in\n  alice  accepted\n  carol  invited\n";
    assert!(out.contains(joined), "{out}");
    assert!(chat(&world, "carol", "/decline PLANS\n").ok().contains("you stay away from PLANS\n"));
    until(&world, "alice", "/members plans\n", "plans  accepted, founded by alice, 1 of 2 others are in\n");
    until(&world, "alice", "/members plans\n", "  bob    accepted\n  carol  declined\n");
    until(&world, "bob", "/members plans\n", "  carol  declined\n");

    // A closed group is over for everybody, now and later, and its name is free for another one.
    assert!(chat(&world, "bob", "/close plans\n").ok().contains("plans is closed\n"));
    until(&world, "alice", "/members\n", "plans  closed by bob\n");
    refused(&world, "alice", "/close plans\n", 1, "refused(closed): plans is closed here");
    refused(&world, "bob", "/accept plans\n", 1, "refused(closed): plans is closed here");
    let out = chat(&world, "alice", "/init Plans @carol\n").ok();
    assert!(out.starts_with("Plans~2  accepted, founded by alice, 0 of 1 others are in\n"), "{out}");
    assert!(chat(&world, "carol", "/accept plans~2\n").ok().contains("Plans~2  accepted, founded by alice"));
    until(&world, "alice", "/members plans~2\n", "  carol  accepted\n");
}

#[test]
fn what_cannot_be_is_said_before_anybody_is_invited() {
    let world = people(&["alice", "bob"]);
    let failed = |input: &str, code, sentence| refused(&world, "alice", input, code, sentence);
    failed("/init plans @alice\n", 2, "at least one other member");
    failed("/init plans @bob @nobody\n", 1, "refused(unknown)");
    failed("/init a@b @bob\n", 2, "'@'");
    for name in ["plans~2", "plans\u{ff5e}2"] {
        failed(&format!("/init {name} @bob\n"), 2, "no '~'");
    }
    let many: String = (0..64).map(|n| format!(" @n{n}")).collect();
    failed(&format!("/init plans{many}\n"), 2, "at most 64 members");
    failed("/close plans\n", 1, "refused(not-member)");
    assert_eq!(chat(&world, "alice", "/members\n").ok(), "you are in no group: /init GROUP @NAME ... founds one\n");
    assert_eq!(chat(&world, "bob", "/members\n").ok(), "you are in no group: /init GROUP @NAME ... founds one\n");
}

#[test]
fn a_restarted_server_knows_every_group() {
    let mut world = people(&["alice", "bob"]);
    chat(&world, "alice", "/init plans @bob\n").ok();
    world.restart_server();
    chat(&world, "bob", "/accept plans\n").ok();
    world.restart_server();
    until(&world, "alice", "/members plans\n", "  bob  accepted\n");
    chat(&world, "alice", "/close plans\n").ok();
    world.restart_server();
    until(&world, "bob", "/members\n", "plans  closed by alice\n");
}
