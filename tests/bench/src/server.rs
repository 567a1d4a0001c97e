//! The servers as processes of their own, each with a data directory that goes with it.

use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::Instant;

use rustls::ClientConfig;
use serde::Serialize;
use tempfile::TempDir;

use crate::Failure;
use crate::people::Certificates;

/// Nothing that works takes so long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// `ossicle serve`
    Ossicle,
    /// `mosquitto`, MQTT 3.1.1
    Mosquitto,
    /// `nats-server`, with JetStream
    Nats,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ossicle, Self::Mosquitto, Self::Nats];

    /// Its name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ossicle => "ossicle",
            Self::Mosquitto => "mosquitto",
            Self::Nats => "nats",
        }
    }

    const fn program(self) -> &'static str {
        match self {
            Self::Ossicle => "ossicle",
            Self::Mosquitto => "mosquitto",
            Self::Nats => "nats-server",
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What servers are started with.
pub struct Site {
    programs: Vec<(Peer, PathBuf)>,
    certificates: Certificates,
    directory: TempDir,
    fresh: Arc<ClientConfig>,
}

impl Site {
    /// Finds the programs and makes the certificates. `ossicle` is the binary to be measured.
    ///
    /// # Errors
    /// If the certificates cannot be made.
    pub fn new(ossicle: PathBuf) -> Result<Self, Failure> {
        let directory = TempDir::new()?;
        let certificates = Certificates::make(directory.path())?;
        let mut programs = vec![(Peer::Ossicle, ossicle)];
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Debian installs servers where the path of ordinary users does not lead.
        let places: Vec<_> =
            std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]).collect();
        for peer in [Peer::Mosquitto, Peer::Nats] {
            let found = places.iter().map(|place| place.join(peer.program())).find(|program| program.is_file());
            programs.extend(found.map(|program| (peer, program)));
        }
        let fresh = certificates.config(false)?;
        Ok(Self { programs, certificates, directory, fresh })
    }

    /// Whether this server is installed here.
    pub fn has(&self, peer: Peer) -> bool {
        self.program(peer).is_some()
    }

    /// What a TLS client that never resumes connects with.
    pub fn fresh(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.fresh)
    }

    /// What a TLS client that resumes its sessions connects with.
    ///
    /// # Errors
    /// Those of [`Certificates::config`].
    pub fn resuming(&self) -> Result<Arc<ClientConfig>, Failure> {
        self.certificates.config(true)
    }

    /// What the program calls its version.
    pub fn version(&self, peer: Peer) -> String {
        let asked = self.program(peer).map(|program| {
            let flag = if peer == Peer::Mosquitto { "-h" } else { "--version" };
            Command::new(program).arg(flag).output()
        });
        let said = asked.and_then(Result::ok).map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        said.and_then(|said| said.lines().next().map(str::to_owned)).unwrap_or_default()
    }

    fn program(&self, peer: Peer) -> Option<&Path> {
        self.programs.iter().find(|(held, _)| *held == peer).map(|(_, program)| program.as_path())
    }

    /// Starts a server. `heartbeat` is how often an idle client is asked whether it is there; `None` for practically never.
    ///
    /// # Errors
    /// If it does not answer in time.
    pub fn start(&self, peer: Peer, heartbeat: Option<Duration>) -> Result<Server, Failure> {
        let program = self.program(peer).ok_or_else(|| format!("{peer} is not installed"))?;
        let directory = TempDir::new_in(self.directory.path())?;
        let log = fs::File::create(directory.path().join("log"))?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        match peer {
            Peer::Ossicle => self.start_ossicle(command, directory, heartbeat),
            Peer::Mosquitto => self.start_mosquitto(command, directory),
            Peer::Nats => self.start_nats(command, directory, heartbeat),
        }
    }

    /// Kills a server of ours, and starts it on what it left behind. How long it took until it listened.
    ///
    /// # Errors
    /// As [`Site::start`].
    pub fn restart(&self, server: Server) -> Result<(Server, Duration), Failure> {
        let Server { mut process, directory, .. } = server;
        process.0.kill()?;
        process.0.wait()?;
        let program = self.program(Peer::Ossicle).ok_or("it was started before")?;
        let log = fs::File::create(directory.path().join("log"))?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stderr(log);
        let begun = Instant::now();
        let server = self.start_ossicle(command, directory, None)?;
        Ok((server, begun.elapsed()))
    }

    fn start_ossicle(
        &self,
        mut command: Command,
        directory: TempDir,
        heartbeat: Option<Duration>,
    ) -> Result<Server, Failure> {
        let (heartbeat, timeout) = match heartbeat {
            Some(heartbeat) => (heartbeat.as_secs(), 3 * heartbeat.as_secs()),
            None => (3600, 4 * 3600),
        };
        command.args(["serve", "--bind", "127.0.0.1", "--port", "0", "--rsa", "2048", "--enroll", "open"]);
        for rate in ["--message-rate", "--message-burst", "--handshake-rate", "--handshake-burst"] {
            command.args([rate, "1000000000"]);
        }
        command.args(["--heartbeat", &format!("{heartbeat}s"), "--timeout", &format!("{timeout}s")]);
        command.arg("--data").arg(directory.path().join("data")).stdout(Stdio::piped());
        let mut child = Process(command.spawn()?);
        let mut url = String::new();
        BufReader::new(child.0.stdout.take().ok_or("standard output is piped")?).read_line(&mut url)?;
        let said = url.trim().strip_prefix("ossicle://").and_then(|rest| rest.split_once('#'));
        let (address, fingerprint) = said.ok_or_else(|| format!("no URL, but {url:?}: {}", log_of(&directory)))?;
        let mut fingerprint_bytes = [0; 32];
        for (byte, digits) in fingerprint_bytes.iter_mut().zip(fingerprint.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(core::str::from_utf8(digits)?, 16)?;
        }
        let (address, fingerprint) = (address.parse()?, fingerprint_bytes);
        let (peer, key, tls) = (Peer::Ossicle, OnceLock::new(), self.fresh());
        Ok(Server { peer, address, fingerprint, key, tls, process: child, directory })
    }

    fn start_mosquitto(&self, command: Command, directory: TempDir) -> Result<Server, Failure> {
        let Certificates { authority, certificate, key, .. } = &self.certificates;
        let [authority, certificate, key] = [authority, certificate, key].map(|path| path.display());
        // Started by root, it would become somebody who may not write here. What waits is written every second: by default
        // that is every half an hour, and what the others acknowledge is in a file.
        let config = format!(
            "user root\nallow_anonymous false\nuse_identity_as_username true\nrequire_certificate true\n\
             cafile {authority}\ncertfile {certificate}\nkeyfile {key}\nset_tcp_nodelay true\n\
             max_queued_messages 0\nmax_inflight_messages 100\npersistence true\nautosave_interval 1\n\
             persistence_location {}/\n",
            directory.path().display(),
        );
        self.start_with_port(Peer::Mosquitto, command, directory, |port| format!("listener {port} 127.0.0.1\n{config}"))
    }

    fn start_nats(&self, command: Command, directory: TempDir, heartbeat: Option<Duration>) -> Result<Server, Failure> {
        let Certificates { authority, certificate, key, .. } = &self.certificates;
        let [authority, certificate, key] = [authority, certificate, key].map(|path| path.display());
        let config = format!(
            "tls {{\n cert_file: \"{certificate}\"\n key_file: \"{key}\"\n ca_file: \"{authority}\"\n verify: true\n}}\n\
             ping_interval: \"{}s\"\nping_max: 3\njetstream {{ store_dir: \"{}\" }}\n",
            heartbeat.map_or(3600, |heartbeat| heartbeat.as_secs()),
            directory.path().join("jetstream").display(),
        );
        self.start_with_port(Peer::Nats, command, directory, |port| format!("{config}listen: \"127.0.0.1:{port}\"\n"))
    }

    /// Starts a server that cannot be given port 0, on one that was free a moment ago.
    fn start_with_port(
        &self,
        peer: Peer,
        mut command: Command,
        directory: TempDir,
        config: impl Fn(u16) -> String,
    ) -> Result<Server, Failure> {
        let file = directory.path().join("config");
        command.arg("-c").arg(&file);
        for _ in 0..5 {
            let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
            fs::write(&file, config(address.port()))?;
            let mut process = Process(command.spawn()?);
            let begun = Instant::now();
            while begun.elapsed() < DEADLINE && process.0.try_wait()?.is_none() {
                if TcpStream::connect(address).is_ok() {
                    let (fingerprint, key, tls) = ([0; 32], OnceLock::new(), self.fresh());
                    return Ok(Server { peer, address, fingerprint, key, tls, process, directory });
                }
                sleep(Duration::from_millis(20));
            }
        }
        Err(format!("{peer} does not start: {}", log_of(&directory)).into())
    }
}

/// The last lines of what a server has logged.
fn log_of(directory: &TempDir) -> String {
    let said = fs::read_to_string(directory.path().join("log")).unwrap_or_default();
    let lines: Vec<_> = said.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A running server. Dropping it ends it and removes its data.
pub struct Server {
    /// Which one.
    pub peer: Peer,
    /// Where it listens.
    pub address: SocketAddr,
    /// Of Ossicle's key.
    pub fingerprint: [u8; 32],
    /// Ossicle's key itself, once somebody has asked for it.
    pub key: OnceLock<Vec<u8>>,
    /// What TLS clients connect with.
    pub tls: Arc<ClientConfig>,
    process: Process,
    directory: TempDir,
}

impl Server {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.0.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        log_of(&self.directory)
    }
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself is only waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
