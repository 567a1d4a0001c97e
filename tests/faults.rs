//! What stands in the way: a full disk, an interrupt, a key that no device verifies. One sentence says what to do, and
//! nothing is half done.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ossicle_tests::cli::{Piped, Running, World, binary};

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
