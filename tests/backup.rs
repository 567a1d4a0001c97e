//! Backups at work: an identity that is lost and comes back, a server that does, and what neither may bring with it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;

use ossicle_tests::cli::{Done, World};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn holds(folder: &Path, name: &str) -> bool {
    folder.join(name).exists()
}

#[test]
fn a_lost_identity_comes_back_with_new_keys_and_is_heard_and_hears() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "before"]).ok();
    assert!(listen.line().contains("before"));
    let mut listen = listen;
    let file = world.path("alice.backup");
    let backup = |name: &str, file: &Path| -> Done { world.run(name, &["backup", text(file)]) };
    backup("alice", &file).failed(1, "`ossicle listen`");
    listen.kill();
    let said = backup("alice", &file).ok();
    assert!(said.contains("whoever reads it is this client"), "{said}");
    backup("alice", &file).failed(2, "exists already");

    // Life goes on, with bundles that the backup does not know; then the disk is gone.
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "between"]).ok();
    assert!(listen.line().contains("between"));
    drop(listen);
    let home = world.path("alice");
    fs::rename(&home, world.path("gone")).unwrap();
    world.run("alice", &["restore", text(&file)]).ok();
    assert!(!holds(&home, "channel") && holds(&home, "identity.pem"));

    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "after"]).ok();
    let line = listen.line();
    assert!(line.contains("after"), "nothing comes a second time, and the next one does: {line}");
    world.run("alice", &["send", "bob", "nobody is there"]).failed(1, "offline");
    let ears = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "it is still me"]).ok();
    assert!(ears.line().contains("it is still me"), "pinned, and no alarm");
    drop(listen);

    // In the place of a home only if that is said, and not while somebody uses it.
    world.run("alice", &["restore", text(&file)]).failed(2, "--replace");
    let restored = world.run("alice", &["restore", "--replace", text(&file)]);
    assert!(restored.err.contains("is kept in"), "{}", restored.err);
    restored.ok();
    world.run("bob", &["restore", "--replace", text(&file)]).failed(1, "`ossicle listen`");
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "once more"]).ok();
    assert!(listen.line().contains("once more"));
}

#[test]
fn a_backup_of_an_identity_holds_no_key_of_a_conversation() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "a chain stands"]).ok();
    assert!(listen.line().contains("a chain stands"));
    drop(listen);
    let file = world.path("alice.backup");
    world.run("alice", &["backup", text(&file)]).ok();
    let secret = fs::read(world.path("alice").join("channel")).unwrap();
    let bytes = fs::read(&file).unwrap();
    // The channel's secret stands behind version, count and id.
    assert!(!bytes.windows(32).any(|window| window == &secret[18..50]));
    assert!(!bytes.windows(14).any(|window| window == b"a chain stands"), "what was read stays behind");
}

#[test]
fn a_restored_server_knows_its_clients_and_nothing_dangerous() {
    let mut world = World::with(&["--enroll", "token"]);
    let token_url = world.url.clone();
    for name in ["alice", "bob", "mallory", "oscar"] {
        world.init(name);
    }
    let data = world.path("server");
    let file = world.path("server.backup");
    let operator = |world: &World, arguments: &[&str]| {
        world.run("alice", &[arguments, &["--data", text(&world.path("server"))]].concat())
    };
    operator(&world, &["revoke", "oscar"]).ok();
    operator(&world, &["backup", text(&file)]).failed(1, "a server runs on");
    world.end_server();
    operator(&world, &["backup", text(&file)]).ok();
    world.restart_server_with(&["--enroll", "token"]);
    operator(&world, &["revoke", "mallory"]).ok();
    operator(&world, &["restore", "--replace", text(&file)]).failed(1, "a server runs on");
    world.run("alice", &["who"]).ok();
    world.end_server();

    operator(&world, &["restore", text(&file)]).failed(2, "--replace");
    world
        .run("alice", &["restore", "--home", text(&world.path("elsewhere")), text(&file)])
        .failed(2, "a server's data");
    let restored = operator(&world, &["restore", "--replace", text(&file)]);
    assert!(restored.err.contains("revoke them anew") && restored.err.contains("ossicle revoke mallory"));
    assert!(!restored.err.contains("oscar"), "{}", restored.err);
    restored.ok();
    assert!(!holds(&data, "channel.key"), "made anew at the next start");

    world.restart_server_with(&["--enroll", "token"]);
    assert!(holds(&data, "channel.key"));
    // Known clients come in without a word, by a full handshake, and publish again.
    let listen = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "still here"]).ok();
    assert!(listen.line().contains("still here"));
    let full = world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    assert_eq!(full, 2);
    world.run("oscar", &["who"]).failed(1, "does not let oscar in");
    world.run("mallory", &["who"]).ok();
    // The token of the URL that was printed before admits nobody any more.
    let former = token_url.rsplit('.').next().unwrap();
    let (address, _) = world.url.rsplit_once('.').unwrap();
    let stale = format!("{address}.{former}");
    world.run("eve", &["init", "--name", "eve", "--rsa", "2048", &stale]).failed(1, "does not take this token");
}
