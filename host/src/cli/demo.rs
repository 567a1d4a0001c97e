//! `ossicle demo`: the whole story on one machine, with the real commands and the firmware's own application.
//!
//! A server, its owner, a second person and a sensor, each a process of its own as it would be elsewhere; only the sensor
//! runs in here, over TCP on loopback instead of a board. Every step is said in plain words with the command that anyone
//! could type. It ends by itself, and with success only if every promise that it names was seen to hold.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use crate::device::{Device, Ending, Happened};
use crate::endpoint::Failure;
use crate::ethernet::Network;

/// What the second person and the owner write; searched for in the server's files afterwards.
const LETTER: &str = "the harbour lights are green tonight";
/// Bits of the people's keys and the server's: enough for a story that ends in half a minute.
const BITS: &str = "2048";

/// Show the whole story on this machine: a server, two people, a simulated sensor
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle demo                 needs nothing but this binary
  ossicle demo --for 60s       let the sensor report for longer")]
pub struct Demo {
    /// How long the sensor reports before the story ends
    #[arg(long = "for", value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    pub lasting: Duration,
}

impl Demo {
    /// Tells the story.
    ///
    /// # Errors
    /// Names the first promise that did not hold.
    pub async fn run(self) -> Result<(), Failure> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&interrupted);
        let mut telling = tokio::task::spawn_blocking(move || Story::begin(heard)?.tell(self.lasting));
        let told = tokio::select! {
            told = &mut telling => told,
            _ = tokio::signal::ctrl_c() => {
                // The story ends at its next line, and takes its processes and its directory with it.
                interrupted.store(true, Ordering::Relaxed);
                let _ = telling.await;
                return Err(Failure { code: 130, sentence: "interrupted: everything was cleared away".to_owned() });
            }
        };
        told.unwrap_or_else(|_| Err(broken("the demo itself broke: please report what stands above")))
    }
}

/// A promise that did not hold.
fn broken(promise: impl Into<String>) -> Failure {
    Failure::refused(promise)
}

struct Story {
    binary: PathBuf,
    /// Ends with the story, and everything in it.
    folder: tempfile::TempDir,
    interrupted: Arc<AtomicBool>,
}

impl Story {
    fn begin(interrupted: Arc<AtomicBool>) -> Result<Self, Failure> {
        let binary = std::env::current_exe().map_err(|error| broken(format!("cannot find this binary: {error}")))?;
        let folder = tempfile::Builder::new()
            .prefix("ossicle-demo-")
            .tempdir()
            .map_err(|error| broken(format!("cannot make a directory for the demo: {error}")))?;
        Ok(Self { binary, folder, interrupted })
    }

    fn tell(&self, lasting: Duration) -> Result<(), Failure> {
        say("A server starts. It will route what it cannot read.");
        let data = self.folder.path().join("server");
        let mut server =
            self.start(&["serve", "--bind", "127.0.0.1", "--port", "0", "--rsa", BITS, "--data"], &data)?;
        let url = server.line(Duration::from_secs(60)).ok_or_else(|| broken("the server did not start"))?;
        say(&format!("  its URL carries its fingerprint: {url}"));

        say("Alice and Bob make identities. Their keys never leave their homes.");
        let (alice, bob) = (self.folder.path().join("alice"), self.folder.path().join("bob"));
        for (name, home) in [("alice", &alice), ("bob", &bob)] {
            self.run(&["init", "--rsa", BITS, "--name", name, &url, "--home"], home)?;
        }

        say("Both listen.");
        let mut alice_hears = self.start(&["listen", "--json", "--home"], &alice)?;
        let mut bob_hears = self.start(&["listen", "--json", "--home"], &bob)?;
        self.wait_for_listeners(&alice)?;

        say("Bob writes to Alice; the receipt `opened` is hers, and no server can forge it.");
        self.run(&["send", "alice", LETTER, "--wait", "opened", "--home"], &bob)?;
        alice_hears.wait("bob's letter", |line| line.contains(LETTER) && line.contains("\"signed\":true"))?;

        say("Alice enrols a sensor: one page of flash makes a generic image this one device.");
        let page = self.folder.path().join("sensor-01.page");
        let page_text = page.to_string_lossy().into_owned();
        let port = url.split('#').next().and_then(|address| address.rsplit(':').next()).unwrap_or_default();
        let dials = format!("{}:{port}", crate::ethernet::HOST);
        let enroll =
            ["enroll", "sensor-01", "--report-to", "alice", "--address", &dials, "--out", &page_text, "--home"];
        self.run(&enroll, &alice)?;

        say("The sensor starts: the firmware's own application, with 1 KiB buffers, joins and reports every second.");
        let bytes = std::fs::read(&page).map_err(|error| broken(format!("cannot read the page: {error}")))?;
        let network = Network::start(None).map_err(|error| broken(format!("cannot make an Ethernet: {error}")))?;
        let sensor = Device::start(&network, bytes, narrate)
            .map_err(|error| broken(format!("the sensor cannot start: {error}")))?;
        alice_hears.wait("a reading of the sensor", |line| line.contains("sensor-01") && line.contains("led=0"))?;

        say("Alice switches its LED on: her message is signed, and the sensor obeys nobody else.");
        self.run(&["send", "sensor-01", "led on", "--home"], &alice)?;
        alice_hears.wait("a reading that shows the LED on", |line| line.contains("led=1"))?;

        say("Bob tries to switch it off.");
        if self.status(&["send", "sensor-01", "led off", "--home"], &bob)?.success() {
            return Err(broken("the sensor took a message of somebody who is not its owner"));
        }
        say("  the sensor refused him.");

        say(&format!("It reports on for {}.", humantime::format_duration(lasting)));
        let until = Instant::now() + lasting;
        let mut readings = 0_u32;
        while let Some(line) = alice_hears.line(until.saturating_duration_since(Instant::now())) {
            if line.contains("sensor-01") {
                readings += 1;
                if line.contains("led=0") {
                    return Err(broken("the LED went off without its owner's word"));
                }
            }
        }
        if readings == 0 {
            return Err(broken("the sensor fell silent"));
        }
        say(&format!("  {readings} readings were opened, and the LED stayed on."));
        sensor.stop();
        bob_hears.stop();
        alice_hears.stop();

        say("And what does the server's disk hold of all this?");
        for text in [LETTER, "led on", "led off", "C led="] {
            if let Some(path) = find(&data, text.as_bytes()) {
                return Err(broken(format!("the server's file {} holds the plaintext «{text}»", path.display())));
            }
        }
        if find(&data, b"alice").is_none() {
            return Err(broken("the search of the server's files is blind: it does not even find a name"));
        }
        say("  names and keys, and nothing of what was said.");
        server.stop();
        say("Everything held.");
        Ok(())
    }

    /// Waits until both people are online, as anyone could: by asking.
    fn wait_for_listeners(&self, home: &Path) -> Result<(), Failure> {
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until && !self.interrupted.load(Ordering::Relaxed) {
            let output = self
                .command(&["who", "--json", "--home"], home)
                .stderr(Stdio::null())
                .output()
                .map_err(|error| broken(format!("cannot start `ossicle who`: {error}")))?;
            let online = String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains("true")).count();
            if online >= 2 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Err(broken("alice and bob did not come online"))
    }

    fn command(&self, arguments: &[&str], last: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg(last).stdin(Stdio::null());
        command
    }

    /// Says a command as a person would type it.
    fn show(&self, arguments: &[&str], last: &Path) {
        let folder = self.folder.path();
        let last = last.strip_prefix(folder).unwrap_or(last);
        let shown: Vec<_> = arguments
            .iter()
            .map(|word| word.strip_prefix(&format!("{}/", folder.display())).unwrap_or(word))
            .map(|word| if word.contains([' ', '#']) { format!("'{word}'") } else { word.to_owned() })
            .collect();
        say(&format!("  $ ossicle {} {}", shown.join(" "), last.display()));
    }

    fn status(&self, arguments: &[&str], last: &Path) -> Result<ExitStatus, Failure> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(broken("interrupted"));
        }
        self.show(arguments, last);
        let output = self
            .command(arguments, last)
            .output()
            .map_err(|error| broken(format!("cannot start `ossicle {}`: {error}", arguments[0])))?;
        for line in
            String::from_utf8_lossy(&output.stderr).lines().chain(String::from_utf8_lossy(&output.stdout).lines())
        {
            say(&format!("    {}", super::harmless(line)));
        }
        Ok(output.status)
    }

    fn run(&self, arguments: &[&str], last: &Path) -> Result<(), Failure> {
        if self.status(arguments, last)?.success() {
            Ok(())
        } else {
            Err(broken(format!("`ossicle {}` failed, as said above", arguments[0])))
        }
    }

    fn start(&self, arguments: &[&str], last: &Path) -> Result<Actor, Failure> {
        self.show(arguments, last);
        let mut child = self
            .command(arguments, last)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| broken(format!("cannot start `ossicle {}`: {error}", arguments[0])))?;
        let (lines, heard) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if lines.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Actor { child, heard, interrupted: Arc::clone(&self.interrupted) })
    }
}

/// A process that goes on while the story does, and ends with it.
struct Actor {
    child: Child,
    heard: mpsc::Receiver<String>,
    interrupted: Arc<AtomicBool>,
}

impl Actor {
    fn line(&self, patience: Duration) -> Option<String> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.heard.recv_timeout(left.min(Duration::from_millis(100))) {
                Ok(line) => return Some(line),
                Err(mpsc::RecvTimeoutError::Timeout)
                    if !left.is_zero() && !self.interrupted.load(Ordering::Relaxed) => {}
                Err(_) => return None,
            }
        }
    }

    fn wait(&mut self, what: &str, found: impl Fn(&str) -> bool) -> Result<(), Failure> {
        let until = Instant::now() + Duration::from_secs(60);
        while let Some(line) = self.line(until.saturating_duration_since(Instant::now())) {
            if found(&line) {
                say(&format!("    {}", super::harmless(&line)));
                return Ok(());
            }
        }
        Err(broken(format!("{what} did not come")))
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The first file below `folder` that holds `text`.
fn find(folder: &Path, text: &[u8]) -> Option<PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, text) {
                return Some(found);
            }
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes.windows(text.len()).any(|window| window == text)
        {
            return Some(path);
        }
    }
    None
}

/// What the sensor lives through, as far as it belongs to the story.
fn narrate(happened: Happened) {
    match happened {
        Happened::Connected { .. } => say("    sensor: connected"),
        Happened::Obeyed { led } => say(&format!("    sensor: the LED is {}", if led { "on" } else { "off" })),
        Happened::Ignored { .. } => say("    sensor: that was not for me to obey"),
        Happened::Ended(ending) if ending != Ending::Stopped => say(&format!("    sensor: {ending:?}")),
        _ => {}
    }
}

fn say(line: &str) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}
