//! `ossicle doctor` with the real binary: each kind of trouble gets its own sentence, and nothing is changed by looking.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::thread;

use ossicle::endpoint::{Obstacle, probe};
use ossicle_tests::cli::{Done, Running, World};
use serde_json::Value;

/// Every file below, but for the index that SQLite keeps in memory that processes share.
fn bytes(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_file());
    let files = files.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    files.filter(|(name, _)| !name.ends_with("-shm")).collect()
}

fn doctor(world: &World, home: &str, arguments: &[&str]) -> Done {
    world.run(home, &[&["doctor"], arguments].concat())
}

/// Runs it on this home, which must stay as it is; one problem at least, and one line says all of this.
fn trouble(world: &World, home: &str, parts: &[&str]) {
    let before = bytes(&world.path(home));
    troubled(doctor(world, home, &[]), parts);
    assert_eq!(bytes(&world.path(home)), before, "nothing is changed");
}

fn troubled(done: Done, parts: &[&str]) {
    assert_eq!(done.code, Some(1), "{done:?}");
    let said = |line: &str| line.starts_with("problem") && parts.iter().all(|part| line.contains(part));
    assert!(done.out.lines().any(said), "{parts:?} in {}", done.out);
    let remedied = |line: &str| line.starts_with("ok") || line.contains("; to do: ");
    assert!(done.out.lines().all(remedied), "{}", done.out);
}

/// Runs it where nothing is wrong.
fn healthy(done: Done, parts: &[&str]) -> String {
    let out = done.ok();
    assert!(!out.contains("problem") && !out.contains("BEGIN"), "{out}");
    for part in parts {
        assert!(out.contains(part), "{part:?} in {out}");
    }
    out
}

fn copy(world: &World, from: &str, to: &str) {
    fs::create_dir(world.path(to)).unwrap();
    fs::set_permissions(world.path(to), Permissions::from_mode(0o700)).unwrap();
    for (name, bytes) in bytes(&world.path(from)) {
        let path = world.path(to).join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }
}

fn port(world: &World) -> String {
    world.url.split('#').next().unwrap().rsplit(':').next().unwrap().to_owned()
}

#[test]
fn a_client_and_a_server_in_order_are_told_so() {
    let world = World::new();
    world.init("alice");
    let (home, data) = (bytes(&world.path("alice")), world.path("server"));
    let in_order =
        ["whose key is the enrolled one", "lets this client in", "the server has them", "is whole, of version"];
    healthy(doctor(&world, "alice", &[]), &in_order);
    assert_eq!(bytes(&world.path("alice")), home);
    // Looking twice ends with the same: the first look did not cost the home its channel.
    healthy(doctor(&world, "alice", &[]), &["lets this client in, by its channel"]);
    healthy(doctor(&world, "alice", &[]), &["lets this client in, by its channel"]);
    // Whoever has the home meanwhile keeps it to himself: nobody logs in beside him.
    let lock = File::open(world.path("alice/lock")).unwrap();
    lock.lock().unwrap();
    healthy(doctor(&world, "alice", &[]), &["has the pinned key; not logged in"]);
    drop(lock);
    // What a killed backup or restore left beside the home, or the data, is named; a file of that name is none.
    fs::create_dir(world.path(".ossicle-Ab12Cd")).unwrap();
    fs::write(world.path(".ossicle-notes"), "").unwrap();
    let left = [".ossicle-Ab12Cd is what an", "rm -r"];
    let out = healthy(doctor(&world, "alice", &[]), &left);
    assert!(!out.contains(".ossicle-notes"), "{out}");
    healthy(doctor(&world, "alice", &["--data", data.to_str().unwrap()]), &left);
    fs::remove_dir(world.path(".ossicle-Ab12Cd")).unwrap();
    fs::remove_file(world.path("alice/channel")).unwrap();
    let full = healthy(doctor(&world, "alice", &[]), &["lets this client in"]);
    assert!(!full.contains("by its channel"), "{full}");
    let lines = doctor(&world, "alice", &["--json"]).ok();
    for line in lines.lines() {
        let finding: Value = serde_json::from_str(line).unwrap();
        assert!(finding["check"].is_string() && finding["finding"].is_string(), "{line}");
        assert_eq!(finding["verdict"] == "ok", finding["remedy"].is_null(), "{line}");
    }

    // A listener keeps its connection, which a second handshake would take over.
    let mut listener = world.listen("alice", &[]);
    let with = healthy(doctor(&world, "alice", &[]), &["not logged in, since `ossicle listen` (pid "]);
    assert!(with.contains(&format!("pid {}", listener.id())), "{with}");
    world.run("alice", &["who"]).ok();
    assert!(listener.is_running());

    let data = data.to_str().unwrap();
    let server = ["--data", data, "--bind", "127.0.0.1", "--port", &port(&world)];
    let running = format!("a server runs on it (pid {})", world.server_id());
    healthy(
        doctor(&world, "none", &server),
        &[&running, "this server answers on port", "with 1 clients", "find this server"],
    );
    // Without flags it is asked how it was started: on any free port.
    healthy(doctor(&world, "none", &["--data", data]), &["port      any free one"]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let elsewhere = doctor(&world, "none", &["--data", data, "--port", &free]);
    let not_there = format!("a server runs, and not on port {free} of 127.0.0.1");
    let elsewhere = healthy(elsewhere, &["warning  port", &not_there]);
    assert!(elsewhere.contains("the --bind and --port that the server was started with"), "{elsewhere}");
}

#[test]
fn what_a_killed_server_left_is_read_and_left_as_it_is() {
    let mut world = World::new();
    world.init("alice");
    let port = port(&world);
    world.stop_server();
    let data = world.path("server");
    let before = bytes(&data);
    assert!(before.keys().any(|name| name.ends_with("-wal")), "{:?}", before.keys());
    let arguments = ["--data", data.to_str().unwrap(), "--bind", "127.0.0.1", "--port", &port];
    let stopped = doctor(&world, "none", &arguments);
    healthy(
        stopped,
        &["one that was killed left its socket", "127.0.0.1 is free", "is whole, of version", "with 1 clients"],
    );
    assert_eq!(bytes(&data), before);
    trouble(&world, "alice", &["server", "nobody takes connections at 127.0.0.1"]);

    // Another server there.
    let strangers = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
    let strangers = thread::spawn(move || {
        let (mut stream, _) = strangers.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        // Taken, and nothing said, until the other side leaves.
        let (mut silent, _) = strangers.accept().unwrap();
        let _ = silent.read_to_end(&mut Vec::new());
    });
    trouble(&world, "alice", &["server", "is no ossicle server"]);
    trouble(&world, "alice", &["server", "takes the connection and says nothing"]);
    strangers.join().unwrap();

    fs::rename(&data, world.path("former")).unwrap();
    let mut start = world.command("none", &["serve", "--bind", "127.0.0.1", "--port", &port, "--rsa", "2048"]);
    let other = Running::start(start.arg("--data").arg(world.path("other")));
    other.line();
    trouble(&world, "alice", &["server", "has another key than the pinned one"]);
    let former = world.path("former");
    let arguments = ["--data", former.to_str().unwrap(), "--bind", "127.0.0.1", "--port", &port];
    troubled(doctor(&world, "none", &arguments), &["port", "another ossicle server has port"]);
}

#[test]
fn a_broken_home_is_named_by_what_is_broken() {
    let world = World::new();
    world.init("alice");
    world.run("alice", &["revoke", "alice"]).ok();
    trouble(&world, "alice", &["server", "does not know this client, or has revoked it"]);

    let broken = |name: &str, parts: &[&str], breaks: &dyn Fn(&Path)| {
        copy(&world, "alice", name);
        breaks(&world.path(name));
        trouble(&world, name, parts);
    };
    let cut = |name: &'static str, len: usize| {
        move |home: &Path| {
            let bytes = fs::read(home.join(name)).unwrap();
            fs::write(home.join(name), &bytes[..bytes.len().min(len)]).unwrap();
        }
    };
    let mode = |mode: u32, name: &'static str| {
        move |home: &Path| fs::set_permissions(home.join(name), Permissions::from_mode(mode)).unwrap()
    };
    broken("short-key", &["key", "not an RSA private key"], &cut("identity.pem", 200));
    broken("open-key", &["key", "chmod 600"], &mode(0o644, "identity.pem"));
    broken("no-key", &["key", "there is no "], &|home| fs::remove_file(home.join("identity.pem")).unwrap());
    broken("key-directory", &["key", "is not a file"], &|home| {
        fs::remove_file(home.join("identity.pem")).unwrap();
        fs::create_dir(home.join("identity.pem")).unwrap();
    });
    broken("other-key", &["identity", "another key than the one that was enrolled"], &|home| {
        fs::copy(world.path("server").join("server.key"), home.join("identity.pem")).unwrap();
    });
    copy(&world, "alice", "next-key");
    fs::copy(world.path("server/server.key"), world.path("next-key/identity.new.pem")).unwrap();
    let waits = doctor(&world, "next-key", &[]);
    assert!(waits.out.contains("warning  identity  a new key waits to follow"), "{}", waits.out);
    copy(&world, "next-key", "followed");
    fs::rename(world.path("followed/identity.pem"), world.path("present")).unwrap();
    fs::rename(world.path("followed/identity.new.pem"), world.path("followed/identity.pem")).unwrap();
    fs::rename(world.path("present"), world.path("followed/identity.new.pem")).unwrap();
    let followed = doctor(&world, "followed", &[]);
    assert!(followed.out.contains("warning  identity  the new key has followed the former one"), "{}", followed.out);
    let without_log = |home: &Path| {
        let _ = fs::remove_file(home.join("home.db-wal"));
    };
    broken("short-store", &["store", "is damaged"], &|home| {
        without_log(home);
        cut("home.db", 4096)(home);
    });
    broken("text-store", &["store", "is damaged"], &|home| {
        without_log(home);
        fs::write(
            home.join("home.db"),
            "no database at all, but long enough to have had a header of SQLite. ".repeat(9),
        )
        .unwrap();
    });
    broken("empty-store", &["store", "is empty"], &|home| {
        without_log(home);
        cut("home.db", 0)(home);
    });
    broken("no-store", &["store", "there is no "], &|home| fs::remove_file(home.join("home.db")).unwrap());
    broken("store-directory", &["store", "is not a file"], &|home| {
        fs::remove_file(home.join("home.db")).unwrap();
        fs::create_dir(home.join("home.db")).unwrap();
    });
    broken("open-home", &["home", "chmod 700"], &mode(0o755, ""));
    broken("linked-key", &["key", "is not a file"], &|home| {
        fs::remove_file(home.join("identity.pem")).unwrap();
        symlink("/dev/null", home.join("identity.pem")).unwrap();
    });

    troubled(doctor(&world, "nowhere\u{1b}[31m", &[]), &["home", "there is no", "\\u{1b}[31m", "ossicle init"]);
    fs::write(world.path("file"), "").unwrap();
    troubled(doctor(&world, "file", &[]), &["home", "is not a directory"]);
    assert_eq!(doctor(&world, "alice", &["--port", "1"]).code, Some(2));
}

#[test]
fn a_broken_server_is_named_by_what_is_broken() {
    let mut world = World::new();
    let port = port(&world);
    world.stop_server();
    let look = |data: &str, parts: &[&str]| {
        let data = world.path(data);
        let before = bytes(&data);
        let arguments = ["--data", data.to_str().unwrap(), "--bind", "127.0.0.1", "--port", &port];
        troubled(doctor(&world, "none", &arguments), parts);
        assert_eq!(bytes(&data), before, "nothing is changed");
    };
    copy(&world, "server", "a");
    fs::remove_file(world.path("a/server.key")).unwrap();
    look("a", &["key", "there is no", "backup"]);
    copy(&world, "server", "b");
    let _ = fs::remove_file(world.path("b/store.db-wal"));
    fs::copy(world.path("server/server.key"), world.path("b/store.db")).unwrap();
    look("b", &["store", "is damaged"]);
    copy(&world, "server", "c");
    fs::write(world.path("c/ossicle.toml"), "port = \"x\"\nprot = 1\n").unwrap();
    look("c", &["settings", "line 1: port: is a text"]);
    look("c", &["settings", "line 2: there is no key `prot`"]);

    let taken = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
    let other = thread::spawn(move || {
        let (mut stream, _) = taken.accept().unwrap();
        stream.write_all(b"220 mail.example.org\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    look("server", &["port", "no ossicle server", "choose another with --port"]);
    other.join().unwrap();
    let data = world.path("server");
    let nowhere = doctor(&world, "none", &["--data", data.to_str().unwrap(), "--bind", "192.0.2.1", "--port", &port]);
    troubled(nowhere, &["port", "this machine does not have the address 192.0.2.1"]);
    let missing = doctor(&world, "none", &["--data", world.path("missing").to_str().unwrap()]);
    troubled(missing, &["data", "there is no", "--data DIR"]);
}

#[tokio::test]
async fn a_name_without_an_address_is_not_a_server_that_is_down() {
    let nowhere = probe("no-such-host.invalid", 5150, None).await.unwrap_err();
    assert!(matches!(nowhere, Obstacle::Resolve(_)), "{nowhere:?}");
}
