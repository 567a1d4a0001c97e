//! What stands in the way: a full disk, an interrupt, a key that no device verifies. One sentence says what to do, and
//! nothing is half done.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ossicle::crypto::IdentityKey;
use ossicle::endpoint::{Access, Home, Reply, Request, ServerUrl, initialise};
use ossicle::name::Name;
use ossicle::store::SqliteStore;
use ossicle::store::home::{HomeStore, Profile};
use ossicle_core::{DirectoryList, Message, PeerStatus, Presence};
use ossicle_tests::campaign::{self, Campaign, Place, Plan};
use ossicle_tests::cli::{Piped, Running, World, binary};
use ossicle_tests::keys;
use ossicle_tests::node::{Node, open, within};
use ossicle_tests::script::{Script, Scripted};

#[test]
fn an_interrupted_server_says_farewell_and_exits_with_130() {
    let folder = tempfile::tempdir().unwrap();
    for (signal, code) in [("INT", 130), ("TERM", 0)] {
        let mut command = Command::new(binary());
        command
            .args(["serve", "--bind", "127.0.0.1", "--port", "0", "--rsa", "2048", "--data"])
            .arg(folder.path().join("data"));
        let server = Running::start(&mut command);
        assert!(server.line().starts_with("ossicle://127.0.0.1:"));
        server.signal(signal);
        assert_eq!(server.wait().code, Some(code), "SIG{signal}");
    }
}

/// The processes that work in this folder.
fn processes_in(folder: &Path) -> usize {
    let within =
        |entry: &fs::DirEntry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
    fs::read_dir("/proc").unwrap().filter_map(Result::ok).filter(within).count()
}

#[test]
fn a_demo_that_is_told_to_end_leaves_nothing_behind() {
    for signal in ["INT", "TERM"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary());
        command.args(["demo", "--for", "60s"]).env("TMPDIR", folder.path());
        let demo = Running::start(&mut command);
        while !demo.line().contains("Bob writes to Alice") {}
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(processes_in(folder.path()) >= 3, "a server and two people");
        demo.signal(signal);
        demo.wait().failed(130, "interrupted");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(processes_in(folder.path()), 0);
    }
}

#[test]
fn a_demo_that_nobody_reads_any_more_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(binary());
    let mut demo = Piped::start(command.args(["demo", "--for", "60s"]).env("TMPDIR", folder.path()));
    assert!(demo.line().contains("A server starts"));
    demo.close().wait().failed(130, "interrupted");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_server_of_4096_bits_gets_no_device_and_says_so_before_anything_is_enrolled() {
    let world = World::with(&["--rsa", "4096"]);
    world.init("alice");
    let page = world.path("sensor.page");
    let out = page.to_str().unwrap();
    let refused = world.run("alice", &["enroll", "sensor-01", "--report-to", "alice", "--out", out]);
    refused.failed(1, "4096 bits, and devices verify at most 3072");
    assert!(!page.exists());
    assert!(!world.run("alice", &["who"]).ok().contains("sensor-01"));
}

/// A server whose data lies on a disk of 4 MiB of its own, in a mount namespace that ends with it.
struct SmallDisk {
    server: Running,
    url: String,
    /// The disk as it is seen from here.
    data: PathBuf,
    homes: tempfile::TempDir,
}

impl SmallDisk {
    fn new() -> Self {
        let homes = tempfile::tempdir().unwrap();
        let disk = homes.path().join("disk");
        fs::create_dir(&disk).unwrap();
        let script = "mount -t tmpfs -o size=4m,mode=700 tmpfs \"$1\" && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(&disk).arg(binary());
        command.args(["serve", "--bind", "127.0.0.1", "--port", "0", "--rsa", "2048", "--data"]).arg(disk.join("data"));
        let server = Running::start(&mut command);
        let url = server.line();
        // Through the process, since the disk is mounted for it alone.
        let data = PathBuf::from(format!("/proc/{}/root{}", server.id(), disk.join("data").display()));
        Self { server, url, data, homes }
    }

    fn run(&self, home: &str, arguments: &[&str]) -> ossicle_tests::cli::Done {
        let mut command = Command::new(binary());
        command.args(arguments).env("OSSICLE_HOME", self.homes.path().join(home)).env_remove("RUST_LOG");
        let mut running = Running::start(&mut command);
        running.end_input();
        running.wait()
    }

    fn init(&self, name: &str) -> ossicle_tests::cli::Done {
        self.run(name, &["init", "--name", name, "--rsa", "2048", &self.url])
    }
}

#[test]
#[ignore = "needs a mount namespace"]
fn a_full_disk_is_said_and_survived() {
    let mut world = SmallDisk::new();
    world.init("alice").ok();
    // Whatever is left goes to a file that stands for somebody else's data.
    let filler = world.data.join("filler");
    let mut size = 4 << 20;
    let mut filled = Vec::new();
    while size >= 512 {
        filled.resize(filled.len() + size, 7);
        if fs::write(&filler, &filled).is_err() {
            filled.truncate(filled.len() - size);
            size /= 2;
        }
    }
    let _ = fs::write(&filler, &filled);
    // A log that has room already takes a few more; then the disk is what stands in the way.
    let refused = (0..400)
        .map(|number| world.init(&format!("client-{number}")))
        .find(|done| done.code != Some(0))
        .expect("the disk becomes full");
    refused.failed(1, "unavailable");
    assert!(world.server.is_running(), "a full disk does not end the server");
    // Whoever is enrolled goes on: nothing of that needs the disk.
    world.run("alice", &["who"]).ok();
    fs::remove_file(&filler).unwrap();
    world.init("bob").ok();
    assert!(world.run("alice", &["who"]).ok().contains("bob"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a mount namespace"]
async fn a_disk_that_fills_under_load_loses_nothing_and_service_resumes() {
    let mut rng = fastrand::Rng::new();
    let pause = Duration::ZERO;
    let plan = Plan { seed: rng.u64(..), kills: 0, rate: 6000, senders: 4, recipients: 4, homes: 0, pause, away: true };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let (at, data) = (disk.clone(), disk.join("data"));
    let place = Place::new(&mut rng, Some(data.clone()), move || {
        let script = "mount -t tmpfs -o size=10m,mode=700 tmpfs \"$1\" && head -c 4m /dev/zero > \"$1/filler\" && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(&at).arg(binary());
        command
    });
    let mut campaign = Campaign::begin(&plan, place, &mut rng).await;
    let is_full = |campaign: &mut Campaign| campaign.place.server().said().contains("is full: free some space");
    campaign.until("full", is_full).await;
    assert!(campaign.place.server().is_running());
    let stored = campaign.stored();
    // As it is seen by the server, for whom alone it is mounted.
    let filler = format!("/proc/{}/root{}", campaign.place.server().id(), disk.join("filler").display());
    fs::remove_file(filler).unwrap();
    campaign.until_stored(500).await;
    let mut figures = campaign::Figures::default();
    campaign.end(&mut figures).await;
    println!("{stored} were stored when the disk was full, {figures}");
    assert!(stored > 0 && figures.stored >= stored + 500 && figures.given > 0);
}

/// A directory of files, as bytes.
fn bytes_of(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    files.filter(|path| path.is_file()).map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

#[test]
fn a_damaged_store_is_reported_with_what_to_do_and_never_overwritten() {
    let mut world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    world.listen("bob", &[]).signal("INT");
    world.wait_online("bob", false);
    for _ in 0..3 {
        world.run("alice", &["send", "bob", &"x".repeat(9000), "--wait", "stored"]).ok();
    }
    world.end_server();
    // Whoever closes it last leaves everything in one file; a server that ends may leave that to the next.
    drop(SqliteStore::open(&world.path("server")).unwrap());
    let whole = fs::read(world.path("server").join("store.db")).unwrap();
    assert!(!world.path("server").join("store.db-wal").exists());
    let set = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let damaged = "restore a backup";
    for (what, bytes, sentence) in [
        ("half of it", whole[..whole.len() / 2].to_vec(), damaged),
        ("a page and a half", whole[..6144].to_vec(), damaged),
        ("its head is something else", set(0, b"no database at all"), damaged),
        ("no tree in its first page", set(100, &[0xff; 8]), damaged),
        ("a text", b"Dear operator,\n\nthis is no database.\n".repeat(100), damaged),
        ("of another program", set(68, &[0, 0, 0, 7]), damaged),
        ("without a version", set(60, &[0; 4]), damaged),
        ("of a newer version", set(60, &[0, 0, 0, 99]), "newer version"),
    ] {
        let data = world.path(&what.replace(' ', "-"));
        fs::create_dir(&data).unwrap();
        for (name, file) in bytes_of(&world.path("server")) {
            fs::write(data.join(&name), file).unwrap();
            fs::set_permissions(data.join(name), Permissions::from_mode(0o600)).unwrap();
        }
        fs::write(data.join("store.db"), &bytes).unwrap();
        let mut serve = Command::new(binary());
        serve.args(["serve", "--bind", "127.0.0.1", "--port", "0", "--data"]).arg(&data);
        let done = Running::start(&mut serve).wait();
        assert_eq!(done.code, Some(1), "{what}: {done:?}");
        done.failed(1, sentence);
        assert!(fs::read(data.join("store.db")).unwrap() == bytes, "{what}: it was changed");
    }
}

/// Answers a page of a directory that has no end, and returns behind which name it was asked for.
fn page_without_end(client: &mut Scripted, number: u64) -> String {
    let asked = client.receive();
    let Ok(Message::List { request, after }) = Message::decode(&asked) else { panic!("a list is wanted") };
    let after = after.to_owned();
    let (mut lines, mut len) = (vec![0; 16_000], 0);
    for line in 0..700 {
        let name = format!("n{:012}", number * 700 + line);
        let line = Presence { id: [7; 16], name: &name, status: PeerStatus::Online };
        let Some(more) = DirectoryList::append(&line, &mut lines[len..]) else { break };
        len += more;
    }
    client.send(&Message::ListResponse(DirectoryList::new(request, true, &lines[..len])));
    after
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_without_end_fills_no_memory() {
    let node = Node::start(open()).await;
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path().join("bob"));
    let fingerprint: String = node.server.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    let url = ServerUrl::parse(&format!("ossicle://{}#{fingerprint}", node.address)).unwrap();
    initialise(&home, &Name::parse("bob").unwrap(), 2048, &url, false).await.unwrap();
    node.stop().await;
    let mut script = Script::new(keys::server());
    let store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let profile = store.profile().unwrap().unwrap();
    let store_epoch = Some([0; 8]);
    store.put_profile(&Profile { port: script.address().port(), store_epoch, ..profile }).unwrap();
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();
    let server = tokio::task::spawn_blocking(move || {
        let mut client = script.accept(&key);
        let mut pages = 0;
        while !page_without_end(&mut client, pages).is_empty() || pages == 0 {
            pages += 1;
            assert!(pages < 1000, "it is asked for without end");
        }
        // That was the first page of a list for which nobody waits any more: the next one begins anew.
        assert_eq!(page_without_end(&mut client, 0), "");
    });
    let access = Access::open(&home, "who").await.unwrap();
    let mut endless = access.request(Request::Who);
    let Reply::Failed(failure) = within(endless.next()).await else { panic!("it fails") };
    assert!(failure.sentence.contains("lists more than 262144 clients"), "{failure}");
    drop(access.request(Request::Who));
    drop(access.request(Request::Who));
    within(server).await.unwrap();
    access.close().await;
}
