//! `ossicle doctor`: what is in order, what is not, and what to do about it, for a client's home or a server's data.
//!
//! Each check makes one finding or a few; they are printed in one place. It only looks: no file is made or changed (but
//! for the index that SQLite keeps beside a file that is in use), no lock is kept (but for a home's while it logs in, so that
//! no two do), and a process that has the home or the data keeps its connection. Everything is bounded in time, and no secret
//! is printed.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::time::Duration;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use clap::Parser;
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{HomeArg, harmless, json, print, unexpected};
use crate::control;
use crate::crypto::IdentityKey;
use crate::endpoint::{Caller, Failure, Obstacle, now, probe};
use crate::settings::{self, Flags, Mistakes, Settings};
use crate::store::home::Profile;
use crate::store::inspect::{InspectError, Inspection, Kind, inspect};

/// How long reading a whole store may take.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(120);
/// 2026-01-01: what shows an earlier time was never set.
const EARLIEST: u64 = 1_767_225_600;
/// 2100-01-01.
const LATEST: u64 = 4_102_444_800;
/// Clocks that differ less are as good as the same.
const CLOCK_TOLERANCE: u64 = 120;
const MIB: u64 = 1 << 20;
const DAY: u64 = 24 * 60 * 60;
/// Where a home keeps the key that is to follow its present one.
const NEXT_KEY: &str = "identity.new.pem";
/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 1000;

/// Find out what is wrong, and what to do about it
///
/// Looks at a client: its home, its keys, its server. With --data at a server, on its machine: one that runs is asked how
/// it was started, for one that does not run give the flags or the environment that it is to be started with. Changes
/// nothing. Exit code 1 if there is a problem.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle doctor                                 this client, and whether its server lets it in
  ossicle doctor --data /var/lib/ossicle         the server with this data, running or not
  ossicle doctor --json | jq 'select(.verdict != \"ok\")'")]
pub struct Doctor {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: look at the server
    // Not from the environment: OSSICLE_DATA is set where servers run, and must not hide what a person's home has.
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub data: Option<PathBuf>,
    /// The file of settings that the server is started with
    #[arg(long, value_name = "FILE", requires = "data")]
    pub config: Option<PathBuf>,
    /// The address that the server is started with
    #[arg(long, value_name = "ADDR", requires = "data")]
    pub bind: Option<String>,
    /// The port that the server is started with
    #[arg(long, value_name = "PORT", requires = "data")]
    pub port: Option<String>,
    /// The host name that the server is started with
    #[arg(long, value_name = "HOST", requires = "data")]
    pub advertise: Option<String>,
    /// Print each finding as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    Warning,
    Problem,
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// What one check came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, finding: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Ok, finding: finding.into(), remedy: None });
    }

    fn warning(&mut self, check: &'static str, finding: impl Into<String>, remedy: impl Into<String>) {
        let (finding, remedy) = (finding.into(), Some(remedy.into()));
        self.0.push(Finding { check, verdict: Verdict::Warning, finding, remedy });
    }

    fn problem(&mut self, check: &'static str, finding: impl Into<String>, remedy: impl Into<String>) {
        let (finding, remedy) = (finding.into(), Some(remedy.into()));
        self.0.push(Finding { check, verdict: Verdict::Problem, finding, remedy });
    }
}

impl Doctor {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let mut findings = Findings::default();
        findings.ok("version", format!("ossicle {}", env!("CARGO_PKG_VERSION")));
        match &self.data {
            Some(data) => self.server(data, &mut findings).await,
            None => client(self.home.open()?.directory(), &mut findings).await,
        }
        let count = |verdict| findings.0.iter().filter(|finding| finding.verdict == verdict).count();
        let (problems, warnings) = (count(Verdict::Problem), count(Verdict::Warning));
        for finding in &findings.0 {
            let line = if self.json { json(finding)? } else { line(finding) };
            if !print(&line)? {
                break;
            }
        }
        match (problems, warnings) {
            (0, _) => Ok(()),
            (1, _) => Err(Failure::refused("there is a problem, and what to do stands behind it")),
            (many, _) => Err(Failure::refused(format!("there are {many} problems: begin with the first"))),
        }
    }

    /// A server's side, from its data directory outwards.
    async fn server(&self, data: &Path, findings: &mut Findings) {
        let holder = lock_holder(&data.join("lock"));
        let settings = self.settings(data, holder, findings);
        clock(findings);
        let Some(directory) = directory(data, "data", "ossicle serve --data DIR", findings) else {
            return;
        };
        files(data, &directory, findings);
        unfinished(data, findings);
        let again = "put it back from a backup: clients refuse a server with another key";
        let key = match data.join("store.db").exists() || data.join("server.key").exists() {
            true => key(&data.join("server.key"), again, findings).await,
            false => None,
        };
        running(data, holder, findings).await;
        store(data, holder.is_some(), findings).await;
        disk(data, findings);
        open_files(holder, findings);
        if let Some(settings) = settings {
            port(&settings, holder.is_some(), key.map(|key| key.fingerprint()), findings).await;
        }
    }

    /// The settings of the server that runs, as far as they can be told, else of the next one.
    fn settings(&self, data: &Path, holder: Option<u32>, findings: &mut Findings) -> Option<Settings> {
        let (mut flags, variables) = holder.and_then(started_with).unwrap_or_else(|| {
            let variables = std::env::vars_os().collect();
            (Flags::default(), variables)
        });
        flags.file = self.config.clone().or(flags.file);
        flags.values.insert("data".into(), data.as_os_str().to_owned());
        for (name, value) in [("bind", &self.bind), ("port", &self.port), ("advertise", &self.advertise)] {
            flags.values.extend(value.as_ref().map(|value| (name.to_owned(), OsString::from(value))));
        }
        match settings::resolve(&flags, &|name| variables.get(OsStr::new(name)).cloned()) {
            Ok(settings) => {
                let file = settings.file.as_ref().map(|file| format!(", with {}", file.display())).unwrap_or_default();
                findings.ok("settings", format!("valid{file}"));
                Some(settings)
            }
            Err(Mistakes(mistakes)) => {
                for mistake in mistakes {
                    findings.problem("settings", mistake, "correct it: the server does not start with it");
                }
                None
            }
        }
    }
}

/// One line of a finding, for people.
fn line(finding: &Finding) -> String {
    let Finding { check, verdict, finding, remedy } = finding;
    let remedy = remedy.as_ref().map(|remedy| format!("; to do: {remedy}")).unwrap_or_default();
    harmless(&format!("{:<8} {check:<9} {finding}{remedy}", verdict.word()))
}

/// A client's side, from its home outwards.
async fn client(home: &Path, findings: &mut Findings) {
    clock(findings);
    let Some(directory) = directory(home, "home", "ossicle init --name NAME URL", findings) else {
        return;
    };
    files(home, &directory, findings);
    unfinished(home, findings);
    let holder = lock_holder(&home.join("lock"));
    match holder {
        Some(pid) => findings.ok("lock", format!("{} has this home", holder_name(home, pid))),
        None if is_socket(&home.join("socket")) => findings.warning(
            "lock",
            "nobody has this home; a process that was killed left its socket",
            "nothing, the next command replaces it",
        ),
        None => findings.ok("lock", "nobody has this home"),
    }
    disk(home, findings);
    let again = "restore a backup of this home, or make a new identity in another with `ossicle init --home DIR`";
    let key = key(&home.join("identity.pem"), again, findings).await;
    let Some(Inspection { home: facts, .. }) =
        database(&home.join("home.db"), Kind::Home, holder.is_some(), again, findings).await
    else {
        return;
    };
    let Some(facts) = facts else {
        findings.problem("identity", "there is none in this home", "run `ossicle init --name NAME URL`");
        return;
    };
    let profile = facts.profile;
    if !profile.complete {
        findings.problem(
            "identity",
            format!("{} was never completed", profile.name),
            "run `ossicle init` again, with the same name",
        );
        return;
    }
    let (Some(key), Some((enrolled, made, published))) = (key, facts.bundle) else {
        if facts.bundle.is_none() {
            findings.problem("identity", format!("{} has no end-to-end keys", profile.name), again);
        }
        return;
    };
    let next = home.join(NEXT_KEY);
    let following = if next.is_file() { self::key(&next, again, findings).await } else { None };
    let connect = "connect once, with `ossicle listen`";
    let key = match (key, following) {
        (key, None) if key.fingerprint() == enrolled => key,
        (key, Some(_)) if key.fingerprint() == enrolled => {
            findings.warning("identity", "a new key waits to follow the present one", connect);
            key
        }
        // A crash came between the state and the file.
        (_, Some(next)) if next.fingerprint() == enrolled => {
            findings.warning("identity", "the new key has followed the former one, and not in its file", connect);
            next
        }
        _ => {
            let finding = "identity.pem is another key than the one that was enrolled";
            findings.problem("identity", finding, "put the former file back from a backup");
            return;
        }
    };
    findings.ok("identity", format!("{}, whose key is the enrolled one", profile.name));
    bundle(u64::try_from(made).unwrap_or_default(), published, findings);
    let caller = Caller { profile: &profile, key: &key, home };
    reach(caller, holder.map(|pid| holder_name(home, pid)), findings).await;
}

/// The age of a client's end-to-end keys.
fn bundle(made: u64, published: bool, findings: &mut Findings) {
    let days = now().saturating_sub(made) / DAY;
    let connect = "connect once, with `ossicle listen`";
    if !published {
        findings.warning("keys", "the server does not have the present end-to-end keys yet", connect);
    } else if made > now() + CLOCK_TOLERANCE {
        findings.warning("keys", "the end-to-end keys were made in the future", "set the clock of this machine");
    } else if days > 8 {
        findings.warning("keys", format!("the prekey is {days} days old, and is renewed weekly"), connect);
    } else {
        findings.ok("keys", format!("the server has them; the prekey is {days} days old"));
    }
}

/// Whether the server is there, is the right one, and lets the client in.
async fn reach(caller: Caller<'_>, holder: Option<String>, findings: &mut Findings) {
    let Profile { host, port, server_key, .. } = caller.profile;
    let at = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    // A second connection would take over that of the process which has the home, or gets it meanwhile.
    let (login, holder) = match holder.map_or_else(|| Login::begin(caller.home), Err) {
        Ok(login) => (Some(login), None),
        Err(holder) => (None, Some(holder)),
    };
    let client = login.is_some().then_some(caller);
    let probed = probe(host, *port, client).await;
    drop(login);
    let (check, operator) = ("server", "ask its operator to run `ossicle doctor --data DIR` there");
    match probed {
        Err(obstacle) => {
            let (finding, remedy) = obstructed(&obstacle, &at, operator);
            findings.problem(check, finding, remedy);
        }
        Ok(probed) => {
            let pinned = ossicle_core::PublicKey::from_modulus(server_key).map(|key| key.fingerprint());
            if pinned != Ok(probed.fingerprint) {
                let (finding, remedy) = obstructed(&Obstacle::OtherKey, &at, operator);
                findings.problem(check, finding, remedy);
                return;
            }
            match (&probed.settings, holder) {
                (Some(settings), _) => {
                    let how = if probed.resumed { ", by its channel" } else { "" };
                    let finding = format!("{at} ({}) has the pinned key and lets this client in{how}", probed.address);
                    findings.ok(check, finding);
                    clock_difference(settings.time, findings);
                }
                (None, holder) => {
                    let holder = holder.unwrap_or_default();
                    findings.ok(
                        check,
                        format!("{at} ({}) has the pinned key; not logged in, since {holder} is", probed.address),
                    );
                }
            }
        }
    }
}

/// Holds a home's lock while this process logs in with it. What stands in the lock file says who has it, for those who wait:
/// it is put back at the end.
struct Login(Option<(File, Vec<u8>)>);

impl Login {
    /// Fails with who has the lock.
    fn begin(home: &Path) -> Result<Self, String> {
        let path = home.join("lock");
        // No file is made: where there is none, nobody has ever used this home. And a pipe is not waited for.
        if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Ok(Self(None));
        }
        let Ok(mut file) = File::options().read(true).write(true).open(path) else { return Ok(Self(None)) };
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err("another process".into()),
            Err(fs::TryLockError::Error(_)) => return Ok(Self(None)),
        }
        let mut former = Vec::new();
        if Read::by_ref(&mut file).take(4096).read_to_end(&mut former).is_ok() {
            // Where there is no room for it, whoever waits is told of nobody, and waits all the same.
            let _ = write_over(&mut file, format!("{} doctor\n", std::process::id()).as_bytes());
        }
        Ok(Self(Some((file, former))))
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        if let Some((file, former)) = &mut self.0 {
            let _ = write_over(file, former);
        }
    }
}

fn write_over(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(bytes)
}

/// What stood in the way, and what to do.
fn obstructed(obstacle: &Obstacle, at: &str, operator: &str) -> (String, String) {
    use ossicle_core::Reason;
    match obstacle {
        Obstacle::Resolve(what) => (
            format!("the name in {at} has no address ({what})"),
            "look at the name service and the network of this machine, and at the spelling of the name".into(),
        ),
        Obstacle::Connect(what) => (
            format!("nobody takes connections at {at} ({what})"),
            format!("look at the network and at firewalls in between; if others do not reach it either, {operator}"),
        ),
        Obstacle::Silent => (
            format!("{at} takes the connection and says nothing"),
            format!("see whether another program or a proxy has this port; else {operator}"),
        ),
        Obstacle::Foreign(what) => (
            format!("what answers at {at} is no ossicle server, or refuses to talk ({what})"),
            format!("see whether another program has this port; else try again in a minute, then {operator}"),
        ),
        Obstacle::OtherKey => (
            format!("the server at {at} has another key than the pinned one"),
            "ask its operator whether the server was made anew; if not, somebody is in between".into(),
        ),
        Obstacle::Busy => (
            format!("the server at {at} has too much to do, as it says itself or somebody in between"),
            format!("try again in a minute; if it stays so, {operator}"),
        ),
        Obstacle::Refused(Reason::Unauthorised) => (
            format!("the server at {at} does not know this client, or has revoked it"),
            "ask its operator for a URL, and make a new identity with `ossicle init --home DIR`".into(),
        ),
        Obstacle::Refused(reason) => (
            format!("the server at {at} does not let this client in ({reason})"),
            format!("try again later, then {operator}"),
        ),
        Obstacle::Failed(what) => (what.clone(), "see whether this machine is in order".into()),
    }
}

// The machine.

fn clock(findings: &mut Findings) {
    let now = now();
    let shown = super::rfc3339(now);
    if (EARLIEST..LATEST).contains(&now) {
        findings.ok("clock", format!("it is {shown}"));
    } else {
        findings.problem("clock", format!("the clock says {shown}"), "set the clock of this machine");
    }
}

fn clock_difference(server: u64, findings: &mut Findings) {
    let difference = now().abs_diff(server);
    if difference <= CLOCK_TOLERANCE {
        findings.ok("clock", format!("{difference} s beside the server's"));
    } else {
        let difference = humantime::format_duration(Duration::from_secs(difference));
        let finding = format!("this clock and the server's differ by {difference}");
        findings.warning("clock", finding, "set the one that is wrong");
    }
}

fn disk(directory: &Path, findings: &mut Findings) {
    match rustix::fs::statvfs(directory) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let files = (found.f_files > 0).then_some(found.f_favail);
            let (verdict, finding) = space(free, files);
            let remedy = format!("free some space where {} is", directory.display());
            match verdict {
                Verdict::Ok => findings.ok("disk", finding),
                Verdict::Warning => findings.warning("disk", finding, remedy),
                Verdict::Problem => findings.problem("disk", finding, remedy),
            }
        }
        Err(error) => {
            let finding = format!("the free space cannot be told ({error})");
            findings.warning("disk", finding, "look at the file system");
        }
    }
}

/// Whether so many bytes and so many files, where those are counted, are enough to go on with.
fn space(free: u64, files: Option<u64>) -> (Verdict, String) {
    let mib = free / MIB;
    match files {
        Some(files) if files < 64 => {
            (Verdict::Problem, format!("{mib} MiB are free, but only {files} files can be made"))
        }
        _ if mib < 16 => (Verdict::Problem, format!("only {mib} MiB are free")),
        _ if mib < 256 => (Verdict::Warning, format!("only {mib} MiB are free")),
        _ => (Verdict::Ok, format!("{mib} MiB are free")),
    }
}

/// How many files a server may have open: each client is one.
fn open_files(running: Option<u32>, findings: &mut Findings) {
    let limits = running.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    let of_process = limits.and_then(|limits| {
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    // A server takes as many as it is granted.
    let granted = || rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = of_process.unwrap_or_else(granted);
    let finding = format!("{limit} files may be open, one for each client");
    if limit < 1024 {
        findings.warning("files", finding, "raise the limit (`ulimit -Hn`, LimitNOFILE= in a unit of systemd)");
    } else {
        findings.ok("files", finding);
    }
}

// Files.

/// A directory that is there, is one, belongs to this user and to nobody else.
fn directory(path: &Path, check: &'static str, make: &str, findings: &mut Findings) -> Option<Metadata> {
    let shown = path.display();
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            let remedy = format!("make one with `{make}`, or name another with --{check} DIR");
            findings.problem(check, format!("there is no {shown}"), remedy);
            return None;
        }
        Err(error) => {
            let remedy =
                format!("look at the permissions of the directories above, or name another with --{check} DIR");
            findings.problem(check, format!("{shown} cannot be looked at ({error})"), remedy);
            return None;
        }
    };
    if !metadata.is_dir() {
        findings.problem(check, format!("{shown} is not a directory"), format!("name another with --{check} DIR"));
        return None;
    }
    if let Some((finding, remedy)) = foreign(&metadata, rustix::process::geteuid().as_raw()) {
        findings.problem(check, format!("{shown} {finding}"), remedy);
        return Some(metadata);
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        let finding = format!("others can enter {shown} (mode {mode:04o})");
        // Clients refuse it; servers keep their files to themselves also there.
        match check {
            "home" => findings.problem(check, finding, format!("run `chmod 700 {shown}`")),
            _ => findings.warning(check, finding, format!("run `chmod 700 {shown}`")),
        }
    } else {
        findings.ok(check, format!("{shown} is its owner's alone"));
    }
    Some(metadata)
}

/// Whose it is, if it is not the user's.
fn foreign(metadata: &Metadata, user: u32) -> Option<(String, String)> {
    let owner = metadata.uid();
    (owner != user).then(|| {
        let remedy =
            format!("run this as that user (`sudo -u '#{owner}' ossicle doctor ...`), or name your own directory");
        (format!("belongs to another user ({owner}, and this is {user})"), remedy)
    })
}

/// Each file in the directory: nobody else may open it. The keys are looked at by themselves.
fn files(directory: &Path, parent: &Metadata, findings: &mut Findings) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            let finding = format!("{} cannot be listed ({error})", directory.display());
            findings.problem("modes", finding, "look at its permissions");
            return;
        }
    };
    let (mut checked, mut bad) = (0, false);
    for entry in entries.take(MAX_ENTRIES).flatten() {
        let name = entry.file_name();
        // Settings are no secret.
        if name == settings::FILE {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        checked += 1;
        let mode = metadata.mode() & 0o7777;
        let shown = entry.path().display().to_string();
        if metadata.uid() != parent.uid() {
            let finding = format!("{shown} belongs to another user ({})", metadata.uid());
            findings.warning("modes", finding, format!("run `chown {} {shown}` as root", parent.uid()));
            bad = true;
        } else if metadata.is_file() && mode & 0o077 != 0 && name != "server.key" && name != "identity.pem" {
            let finding = format!("others can open {shown} (mode {mode:04o})");
            findings.warning("modes", finding, format!("run `chmod 600 {shown}`"));
            bad = true;
        }
    }
    if !bad {
        findings.ok("modes", format!("{checked} files in it, for their owner alone"));
    }
}

/// What a backup or restore left that was killed.
fn unfinished(place: &Path, findings: &mut Findings) {
    for left in crate::backup::unfinished(place, MAX_ENTRIES) {
        let shown = left.display();
        let finding =
            format!("{shown} is what an `ossicle backup` or `restore` was at work on, and it may hold private keys");
        findings.warning("leftover", finding, format!("if none runs now, it was killed: run `rm -r {shown}`"));
    }
}

/// A private key that can be used.
async fn key(path: &Path, again: &str, findings: &mut Findings) -> Option<Arc<IdentityKey>> {
    let shown = path.display();
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            findings.problem("key", format!("there is no {shown}"), again);
            return None;
        }
        // Not opened: a pipe would wait for its writer.
        Ok(metadata) if !metadata.is_file() => {
            findings.problem(
                "key",
                format!("{shown} is not a file"),
                "move it away and put the key back from a backup",
            );
            return None;
        }
        _ => {}
    }
    let file = path.to_owned();
    match spawn_blocking(move || IdentityKey::load(&file)).await {
        Ok(Ok(key)) => {
            let fingerprint = hex::encode(key.fingerprint());
            findings.ok("key", format!("RSA of {} bits, fingerprint {fingerprint}", key.bits()));
            Some(Arc::new(key))
        }
        Ok(Err(error)) => {
            use crate::crypto::KeyError;
            let remedy = match &error {
                KeyError::Permissions { .. } => "then see who could have read it".to_owned(),
                KeyError::Io { .. } => "look at its permissions, and at whose it is".to_owned(),
                _ => "put the key back from a backup: with another one, nobody recognises it".to_owned(),
            };
            findings.problem("key", format!("{shown}: {error}"), remedy);
            None
        }
        Err(_) => {
            findings.problem("key", format!("{shown} cannot be read"), unexpected().sentence);
            None
        }
    }
}

/// A database that opens and is whole.
async fn database(path: &Path, kind: Kind, live: bool, again: &str, findings: &mut Findings) -> Option<Inspection> {
    let (check, shown) = ("store", path.display());
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            findings.problem(check, format!("there is no {shown}"), again);
            return None;
        }
        Ok(metadata) if !metadata.is_file() => {
            findings.problem(check, format!("{shown} is not a file"), format!("move it away; {again}"));
            return None;
        }
        _ => {}
    }
    let file = path.to_owned();
    let inspected = timeout(INSPECT_TIMEOUT, spawn_blocking(move || inspect(&file, kind, live))).await;
    let inspection = match inspected {
        Ok(Ok(Ok(inspection))) => inspection,
        Ok(Ok(Err(InspectError::Foreign))) => {
            let finding = format!("{shown} is a database of another program");
            findings.problem(check, finding, format!("move it away; {again}"));
            return None;
        }
        Ok(Ok(Err(InspectError::Damaged(what)))) => {
            findings.problem(check, format!("{shown} is damaged ({what})"), format!("keep a copy; {again}"));
            return None;
        }
        Ok(Ok(Err(error))) => {
            let finding = format!("{shown} cannot be read ({error})");
            findings.problem(check, finding, "look at its permissions and its disk");
            return None;
        }
        Ok(Err(_)) => {
            findings.problem(check, format!("{shown} cannot be read"), unexpected().sentence);
            return None;
        }
        Err(_) => {
            let seconds = INSPECT_TIMEOUT.as_secs();
            let finding = format!("{shown} was not read to its end within {seconds} s");
            findings.warning(check, finding, "look at its disk, and try again when there is less to do");
            return None;
        }
    };
    let Inspection { version, faults, .. } = &inspection;
    let newest = kind.newest();
    if let Some(fault) = faults.first() {
        findings.problem(check, format!("{shown} is damaged ({fault})"), format!("keep a copy; {again}"));
        return None;
    } else if *version > newest {
        let finding = format!("{shown} is of version {version}, and this program knows {newest}");
        findings.problem(check, finding, "use the newer ossicle that wrote it");
        return None;
    } else if *version < 1 {
        findings.problem(check, format!("{shown} is empty"), again);
        return None;
    }
    let older = if *version < newest { format!(", brought to {newest} at the next start") } else { String::new() };
    let clients = inspection.clients.map(|clients| format!(", with {clients} clients")).unwrap_or_default();
    findings.ok(check, format!("{shown} is whole, of version {version}{older}{clients}"));
    Some(inspection)
}

// Who is there.

/// The flags and variables that a running server was started with, if the system tells them to this user.
fn started_with(pid: u32) -> Option<(Flags, BTreeMap<OsString, OsString>)> {
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok();
    let split = |bytes: Vec<u8>| -> Vec<OsString> {
        let words = bytes.strip_suffix(&[0]).unwrap_or(&bytes).split(|byte| *byte == 0);
        words.map(|word| OsStr::from_bytes(word).to_owned()).collect()
    };
    let Ok(super::Cli { command: super::Command::Serve(serve) }) = super::Cli::try_parse_from(split(read("cmdline")?))
    else {
        return None;
    };
    let variables = split(read("environ")?).into_iter().filter_map(|variable| {
        let at = variable.as_bytes().iter().position(|byte| *byte == b'=')?;
        let (name, value) = variable.as_bytes().split_at(at);
        Some((OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value.get(1..)?).to_owned()))
    });
    let mut variables: BTreeMap<OsString, OsString> = variables.collect();
    let mut flags = serve.settings.0;
    // What is relative is so from where it was started.
    let start = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    flags.file = flags.file.map(|file| start.join(file));
    if let Some(file) = variables.get_mut(OsStr::new(settings::FILE_VARIABLE)).filter(|file| !file.is_empty()) {
        *file = start.join(&file).into_os_string();
    }
    Some((flags, variables))
}

/// The process that holds the lock on this file, as the system tells; 0 where it is of another container.
fn lock_holder(path: &Path) -> Option<u32> {
    let inode = path.metadata().ok()?.ino().to_string();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = fields.as_slice() else {
            return None;
        };
        (file.rsplit(':').next() == Some(inode.as_str())).then(|| pid.parse().unwrap_or_default())
    })
}

/// The holder of a home, as it wrote itself.
fn holder_name(home: &Path, pid: u32) -> String {
    let mut text = String::new();
    // The lock is a file, since it is locked: opening it does not wait.
    let read = File::open(home.join("lock")).and_then(|file| file.take(256).read_to_string(&mut text));
    match text.trim().split_once(' ').filter(|_| read.is_ok()) {
        Some((_, command)) => format!("`ossicle {command}` (pid {pid})"),
        None => format!("a process (pid {pid})"),
    }
}

fn is_socket(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Whether a server runs on this data, and listens to its operator.
async fn running(data: &Path, holder: Option<u32>, findings: &mut Findings) {
    let control = data.join("control");
    let there = is_socket(&control);
    let connected = match timeout(Duration::from_secs(5), UnixStream::connect(&control)).await {
        Ok(connected) => connected.is_ok(),
        Err(_) => false,
    };
    match (holder, connected) {
        (Some(pid), true) => findings.ok("running", format!("a server runs on it (pid {pid})")),
        (Some(pid), false) => findings.warning(
            "running",
            format!("a process (pid {pid}) has this data, and no server listens to its operator"),
            "if it is a server that starts or stops, wait; else see what that process is",
        ),
        (None, true) => findings.warning(
            "running",
            "something listens on the operator's socket without having the data",
            "see what it is, with `ss -xlp`",
        ),
        (None, false) if there => findings.warning(
            "running",
            "no server runs on it; one that was killed left its socket",
            "nothing, the next `ossicle serve` replaces it",
        ),
        (None, false) => findings.ok("running", "no server runs on it"),
    }
}

async fn store(data: &Path, live: bool, findings: &mut Findings) {
    let again = "name the data directory of a server, or restore a backup of it";
    let path = data.join("store.db");
    let inspected = database(&path, Kind::Store, live, again, findings).await;
    let modified = path.metadata().and_then(|metadata| metadata.modified());
    let ahead = modified.ok().and_then(|modified| modified.duration_since(SystemTime::now()).ok());
    if inspected.is_some() && ahead.is_some_and(|ahead| ahead.as_secs() > CLOCK_TOLERANCE) {
        findings.warning("clock", "the store was written in the future: the clock went back", "set the clock");
    }
}

/// Whether the port is free or the server's, and whether clients find the server where it says it is.
async fn port(settings: &Settings, running: bool, key: Option<[u8; 32]>, findings: &mut Findings) {
    let Settings { bind, port, .. } = settings;
    let other = "stop the program that uses it, or choose another with --port";
    let flags = "give `ossicle doctor` the --bind and --port that the server was started with";
    if *port == 0 {
        findings.ok("port", "any free one");
        return;
    }
    let local = match bind {
        IpAddr::V4(address) if address.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(address) if address.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        address => *address,
    };
    let free = is_free(SocketAddr::new(*bind, *port));
    match free {
        Ok(()) if running => {
            findings.warning("port", format!("a server runs, and not on port {port} of {bind}"), flags);
            return;
        }
        Ok(()) => {
            findings.ok("port", format!("{port} of {bind} is free"));
            return;
        }
        Err(error) if error != rustix::io::Errno::ADDRINUSE => {
            let (finding, remedy) = match error {
                rustix::io::Errno::ADDRNOTAVAIL => {
                    (format!("this machine does not have the address {bind}"), "choose one that it has with --bind")
                }
                rustix::io::Errno::ACCESS => {
                    (format!("port {port} needs more rights"), "choose one above 1023 with --port")
                }
                error => {
                    (format!("port {port} of {bind} cannot be used ({error})"), "choose others with --bind and --port")
                }
            };
            findings.problem("port", finding, remedy);
            return;
        }
        Err(_) => {}
    }
    match probe(&local.to_string(), *port, None).await {
        Ok(probed) if key == Some(probed.fingerprint) => {
            findings.ok("port", format!("this server answers on port {port} of {bind}"));
        }
        Ok(probed) => {
            let finding = format!("another ossicle server has port {port} ({})", hex::encode(probed.fingerprint));
            findings.problem("port", finding, if running { flags } else { other });
            return;
        }
        Err(obstacle) => {
            let (finding, _) = obstructed(&obstacle, &format!("port {port}"), "");
            findings.problem("port", finding, if running { flags } else { other });
            return;
        }
    }
    let host = control::dialled(settings, *bind);
    let at = format!("{host}:{port}");
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match probe(bare, *port, None).await {
        Ok(probed) if key == Some(probed.fingerprint) => {
            findings.ok("reach", format!("clients that dial {at} find this server ({})", probed.address));
        }
        Ok(_) => {
            let finding = format!("clients that dial {at} find another server");
            findings.problem(
                "reach",
                finding,
                "give its own name or address with --advertise, or look at the forwarding",
            );
        }
        Err(obstacle) => {
            let (finding, _) = obstructed(&obstacle, &at, "");
            let remedy = "give the name or address that clients dial with --advertise, and look at firewalls";
            findings.warning("reach", format!("as seen from here, {finding}"), remedy);
        }
    }
}

/// Whether a server could listen there. Nobody can connect meanwhile: it does not listen.
fn is_free(address: SocketAddr) -> Result<(), rustix::io::Errno> {
    use rustix::net::{AddressFamily, SocketType, bind, socket, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ossicle_core::Reason;
    use std::collections::BTreeSet;

    #[test]
    fn each_obstacle_has_its_own_sentence_and_remedy() {
        let obstacles = [
            Obstacle::Resolve("x".into()),
            Obstacle::Connect("x".into()),
            Obstacle::Silent,
            Obstacle::Foreign("x".into()),
            Obstacle::OtherKey,
            Obstacle::Busy,
            Obstacle::Refused(Reason::Unauthorised),
            Obstacle::Refused(Reason::Rate),
            Obstacle::Failed("x".into()),
        ];
        let said: BTreeSet<_> = obstacles.iter().map(|obstacle| obstructed(obstacle, "h:1", "ask")).collect();
        assert_eq!(said.len(), obstacles.len());
        assert!(said.iter().all(|(finding, remedy)| !finding.is_empty() && !remedy.is_empty()));
    }

    #[test]
    fn a_home_of_somebody_else_is_named_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let metadata = directory.path().metadata().unwrap();
        assert_eq!(foreign(&metadata, metadata.uid()), None);
        let (finding, remedy) = foreign(&metadata, metadata.uid() + 1).unwrap();
        assert!(finding.contains("another user") && remedy.contains(&format!("sudo -u '#{}'", metadata.uid())));
    }

    #[test]
    fn little_room_is_told_before_there_is_none() {
        assert_eq!(space(1 << 30, Some(1 << 20)).0, Verdict::Ok);
        assert_eq!(space(1 << 30, None).0, Verdict::Ok);
        assert_eq!(space(100 << 20, None).0, Verdict::Warning);
        assert_eq!(space(1 << 20, None), (Verdict::Problem, "only 1 MiB are free".into()));
        assert_eq!(space(1 << 30, Some(3)).0, Verdict::Problem);
    }

    #[test]
    fn keys_that_are_old_unpublished_or_of_tomorrow_are_told() {
        let verdict = |made: u64, published: bool| {
            let mut findings = Findings::default();
            bundle(made, published, &mut findings);
            findings.0.remove(0).verdict
        };
        assert_eq!(verdict(now(), true), Verdict::Ok);
        assert_eq!(verdict(now() - 9 * DAY, true), Verdict::Warning);
        assert_eq!(verdict(now(), false), Verdict::Warning);
        assert_eq!(verdict(now() + DAY, true), Verdict::Warning);
    }

    #[test]
    fn who_logs_in_has_the_home_and_leaves_its_lock_as_it_was() {
        let home = tempfile::tempdir().unwrap();
        let lock = home.path().join("lock");
        drop(Login::begin(home.path()).unwrap());
        assert!(!lock.exists(), "no file is made");
        fs::write(&lock, "7 listen\n").unwrap();
        let login = Login::begin(home.path()).unwrap();
        assert!(Login::begin(home.path()).is_err(), "one at a time");
        assert_eq!(fs::read_to_string(&lock).unwrap(), format!("{} doctor\n", std::process::id()));
        drop(login);
        assert_eq!(fs::read_to_string(&lock).unwrap(), "7 listen\n");
        assert!(Login::begin(home.path()).is_ok());
    }

    #[test]
    fn clocks_that_differ_are_told() {
        let verdict = |server: u64| {
            let mut findings = Findings::default();
            clock_difference(server, &mut findings);
            findings.0.remove(0).verdict
        };
        assert_eq!(verdict(now()), Verdict::Ok);
        assert_eq!(verdict(now() + 3600), Verdict::Warning);
        assert_eq!(verdict(0), Verdict::Warning);
        assert_eq!(verdict(u64::MAX), Verdict::Warning);
    }

    #[test]
    fn a_finding_is_one_harmless_line() {
        let mut findings = Findings::default();
        findings.problem("home", "a\u{1b}[31m\nb", "do it");
        assert_eq!(line(&findings.0[0]), "problem  home      a\\u{1b}[31m\\u{a}b; to do: do it");
    }
}
