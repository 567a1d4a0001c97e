//! `ossicle serve`: a server on this machine, from its flags to its exit code.
//!
//! Makes what is missing (data directory, key, token), says on standard output how to reach it, and nothing else there;
//! the log goes to standard error. Whatever stands in the way of a start is one sentence that says what to do.

use core::net::SocketAddr;
use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches, ValueEnum, ValueHint};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::{JoinSet, spawn_blocking};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

use super::{harmless, is_harmless, json, print, say, supervised};
use crate::bus::Local;
use crate::clock::system_date;
use crate::control::{self, Fresh, Operated, dialled, url};
use crate::crypto::{CryptoPool, IdentityKey};
use crate::endpoint::Failure;
use crate::metrics::{self, Monitor};
use crate::resumption::ChannelKey;
use crate::server::{self, Parts, Policy, Server};
use crate::settings::{self, Chosen, Effective, Flags, Mistakes, Settings, Shown};
use crate::store::{SharedStore, SqliteStore, Token, Tokens};
use crate::world::World;

/// The exit code after a second signal.
const IMPATIENT: i32 = 130;
/// Seconds for which the token in the printed URL admits clients.
const TOKEN_AGE: u64 = 24 * 60 * 60;

/// Run a server
///
/// The first line on standard output is the URL that clients need; everything else goes to standard error. Each setting is
/// taken from its flag, else from its variable, else from the file of settings, else it has its default.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle serve                                   on port 5150, for everybody who has the printed URL
  ossicle serve --bind 127.0.0.1 --port 0         for this machine only, on any free port
  ossicle serve --data /var/lib/ossicle --advertise chat.example.org
  ossicle serve --config /etc/ossicle.toml --check
                                                  what it would start with, and where each value came from
  OSSICLE_HEARTBEAT=30s ossicle serve --check > ossicle.toml
                                                  the same as a file of settings

Durations are 30s, 10m, 24h; sizes 64KiB, 16MiB. In a file of settings, each is a line: heartbeat = \"30s\"")]
pub struct Serve {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub settings: SettingFlags,
    /// Print the effective configuration and where each value came from, and start nothing
    #[arg(long)]
    pub check: bool,
    /// Print it as one line of JSON
    #[arg(long, requires = "check")]
    pub json: bool,
}

/// A flag for each setting, and the one that names the file. Their values are read where all layers are.
#[derive(Clone, Debug, Default)]
pub struct SettingFlags(pub Flags);

impl clap::Args for SettingFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let file = Arg::new("config").long("config").value_name("FILE").env(settings::FILE_VARIABLE);
        let file = file.help("File of settings [default: ossicle.toml in the data directory, if it is there]");
        let command = command.arg(plain(file).value_hint(ValueHint::FilePath));
        settings::defaults().into_iter().fold(command, |command, Chosen { about, value, note, .. }| {
            let help = match (value, note) {
                (Some(Shown::Number(number)), _) => format!("{} [default: {number}]", about.help),
                (Some(Shown::Text(text)), None) => format!("{} [default: {text}]", about.help),
                (Some(_), Some(_)) => format!("{} [default: open when bound to loopback only, else token]", about.help),
                (None, note) => format!("{} [default: {}]", about.help, note.unwrap_or("none")),
            };
            let hint = if about.value_name == "DIR" { ValueHint::DirPath } else { ValueHint::Other };
            let heading = about.limit.then_some("Limits and times");
            let arg =
                Arg::new(about.name).long(about.name).value_name(about.value_name).env(about.variable()).help(help);
            command.arg(plain(arg).help_heading(heading).value_hint(hint))
        })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// A value that is taken as it comes.
fn plain(arg: Arg) -> Arg {
    arg.action(ArgAction::Set).value_parser(clap::value_parser!(OsString)).hide_env_values(true)
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // What clap found in the environment is another layer, and read there.
        let given = |name: &str| {
            let named = matches.value_source(name) == Some(ValueSource::CommandLine);
            named.then(|| matches.get_one::<OsString>(name).cloned()).flatten()
        };
        let names = settings::defaults().into_iter().map(|chosen| chosen.about.name);
        let values = names.filter_map(|name| Some((name.to_owned(), given(name)?))).collect();
        Ok(Self(Flags { file: given("config").map(PathBuf::from), values }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let Flags { file, values } = Self::from_arg_matches(matches)?.0;
        self.0.file = file.or_else(|| self.0.file.take());
        self.0.values.extend(values);
        Ok(())
    }
}

/// Bits of an RSA key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rsa {
    /// 2048
    #[value(name = "2048")]
    Bits2048,
    /// 3072
    #[value(name = "3072")]
    Bits3072,
    /// 4096: too long for devices with little memory
    #[value(name = "4096")]
    Bits4096,
}

impl Rsa {
    pub(super) const fn bits(self) -> usize {
        match self {
            Self::Bits2048 => 2048,
            Self::Bits3072 => 3072,
            Self::Bits4096 => 4096,
        }
    }
}

impl Serve {
    /// Serves until the process is told to stop, and returns its exit code: 0 after SIGTERM, 130 after an interrupt, 2 for
    /// a wrong configuration, whose every mistake was named. With `--check` 0, once what would be done is said.
    ///
    /// # Errors
    /// One sentence for the operator; the exit code is 1 then.
    pub async fn run(self) -> anyhow::Result<u8> {
        let settings = match settings::resolve(&self.settings.0, &|name| std::env::var_os(name)) {
            Ok(settings) => settings,
            Err(Mistakes(mistakes)) => {
                for mistake in mistakes {
                    say(&format!("ossicle: {}", harmless(&mistake)));
                }
                return Ok(2);
            }
        };
        for variable in unknown_variables() {
            say(&format!("ossicle: no setting is called {}: it is not used", harmless(&variable)));
        }
        if self.check {
            self.show(&settings)?;
            return Ok(0);
        }
        log();
        raise_file_limit();
        serve(settings).await
    }

    fn show(&self, settings: &Settings) -> Result<(), Failure> {
        show(&Effective::new(settings), self.json)
    }
}

/// Prints settings as a file of settings, or as one line of JSON.
pub(super) fn show(effective: &Effective, as_json: bool) -> Result<(), Failure> {
    if as_json {
        print(&json(effective)?)?;
        return Ok(());
    }
    let file = effective.file.as_deref().unwrap_or("none");
    print(&format!("# file of settings: {}", harmless(file)))?;
    for setting in &effective.settings {
        let name = &setting.key;
        let line = match &setting.value {
            Some(Shown::Number(number)) => format!("{name} = {number}"),
            Some(Shown::Text(text)) => format!("{name} = {}", toml_text(text)),
            None => format!("# {name} ="),
        };
        if !print(&format!("{line:<36} # {}", harmless(&setting.origin)))? {
            break;
        }
    }
    Ok(())
}

/// A text as TOML has it, with everything escaped that a terminal might obey.
fn toml_text(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if is_harmless(c) => quoted.push(c),
            c => quoted.push_str(&format!("\\U{:08X}", u32::from(c))),
        }
    }
    quoted.push('"');
    quoted
}

/// Variables that look like ours and that no command reads: mistyped, most likely.
fn unknown_variables() -> Vec<String> {
    let mut known: Vec<OsString> = settings::defaults().iter().filter_map(|it| it.about.also).map(Into::into).collect();
    let mut commands = vec![super::Cli::command()];
    while let Some(command) = commands.pop() {
        known.extend(command.get_arguments().filter_map(|arg| arg.get_env().map(ToOwned::to_owned)));
        commands.extend(command.get_subcommands().cloned());
    }
    let ours = std::env::vars_os().map(|(name, _)| name).filter(|name| name.to_string_lossy().starts_with("OSSICLE_"));
    ours.filter(|name| !known.contains(name)).map(|name| name.to_string_lossy().into_owned()).collect()
}

async fn serve(settings: Settings) -> anyhow::Result<u8> {
    let data = settings.data.clone();
    let store = spawn_blocking(move || SqliteStore::open(&data)).await??;
    let store: SharedStore = Arc::new(store);
    let (key, bits) = (settings.data.join("server.key"), settings.rsa);
    let identity = spawn_blocking(move || identity(&key, bits)).await??;
    let channel_key = ChannelKey::open(&settings.data)?;
    let listener = TcpListener::bind((settings.bind, settings.port)).await;
    let listener = listener.map_err(|error| bind_sentence(&settings, &error))?;
    let address = listener.local_addr()?;
    let control = control::bind(&settings.data).map_err(|error| control_sentence(&settings, &error))?;
    let metrics = match settings.metrics {
        Some(at) => Some(TcpListener::bind(at).await.map_err(|error| metrics_sentence(at, &error))?),
        None => None,
    };
    let pool = CryptoPool::start().context("cannot start threads for RSA")?;

    let enrol = settings.config.enrol;
    let token = renew_token(&store, enrol).await?;
    let server = Server::new(Parts {
        config: settings.config.clone(),
        store,
        identity: Arc::new(identity),
        channel_key,
        pool: Arc::new(pool),
        world: World::default(),
        bus: Arc::new(Local),
    });
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let url = url(
        &dialled(&settings, address.ip()),
        address.port(),
        &server.fingerprint(),
        token.as_deref().map(String::as_str),
    );
    let mut out = io::stdout();
    if let Err(error) = writeln!(out, "{url}").and_then(|()| out.flush()) {
        warn!(%error, "nobody reads where the server is");
    }
    info!(%address, data = %settings.data.display(), policy = ?enrol, "serving");

    let metrics_at = metrics.as_ref().map(TcpListener::local_addr).transpose()?;
    let operated = Operated::new(Arc::clone(&server), settings.clone(), address, metrics_at);
    let mut aside = JoinSet::new();
    aside.spawn(control::serve(control, Arc::new(operated)));
    if let Some(listener) = metrics {
        info!(address = ?metrics_at, "serving metrics");
        aside.spawn(metrics::serve(listener, Arc::new(Monitor::new(Arc::clone(&server)))));
    }
    aside.spawn(supervised::report(Arc::clone(&server)));
    // A task of its own: this one runs on a thread that has to be woken for each connection, and would then wake another.
    let (stop, stopped) = oneshot::channel::<()>();
    let running = Arc::clone(&server);
    let mut running = tokio::spawn(async move {
        server::run(listener, running, async {
            let _ = stopped.await;
        })
        .await;
    });
    let code = tokio::select! {
        _ = terminated.recv() => {
            info!("told to stop: a second signal ends it at once");
            0
        }
        _ = interrupted.recv() => {
            info!("interrupted: a second signal ends it at once");
            130
        }
        ended = &mut running => {
            ended.context("the server has failed")?;
            return Err(anyhow!("the server has ended by itself"));
        }
    };
    supervised::stopping();
    // Whoever asks twice does not want to wait: what was acknowledged is on the disk already.
    aside.spawn(async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        say("ossicle: ended at once");
        std::process::exit(IMPATIENT)
    });
    drop(stop);
    running.await.context("the server has failed")?;
    aside.shutdown().await;
    control::remove(&settings.data);
    // The store writes out what it holds while it is dropped.
    spawn_blocking(move || drop(server)).await?;
    Ok(code)
}

fn bind_sentence(settings: &Settings, error: &io::Error) -> anyhow::Error {
    let (bind, port) = (settings.bind, settings.port);
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow!("port {port} on {bind} is in use: stop the program that uses it, or choose another with --port")
        }
        io::ErrorKind::AddrNotAvailable => {
            anyhow!("this machine does not have the address {bind}: choose one that it has with --bind")
        }
        io::ErrorKind::PermissionDenied => {
            anyhow!("port {port} needs more rights: choose one above 1023 with --port")
        }
        _ => anyhow!("cannot listen on port {port} of {bind} ({error}): choose others with --bind and --port"),
    }
}

fn metrics_sentence(at: SocketAddr, error: &io::Error) -> anyhow::Error {
    anyhow!("cannot serve metrics at {at} ({error}): choose another address or port with --metrics")
}

fn control_sentence(settings: &Settings, error: &io::Error) -> anyhow::Error {
    let data = settings.data.display();
    match error.kind() {
        io::ErrorKind::InvalidInput => {
            anyhow!("the path of {data} is too long for a socket: choose a shorter one with --data")
        }
        _ => anyhow!("cannot make the operator's socket in {data} ({error}): look at its permissions"),
    }
}

/// The server's key, made if it is not there yet.
fn identity(path: &Path, bits: usize) -> anyhow::Result<IdentityKey> {
    if fs::exists(path).with_context(|| format!("cannot look for the server's key {}", path.display()))? {
        return Ok(IdentityKey::load(path)?);
    }
    info!(bits, path = %path.display(), "making the server's key");
    let key = IdentityKey::generate(bits)?;
    key.save(path)?;
    Ok(key)
}

/// Ends the token of the former URL, and makes that of the next one where the policy wants one.
async fn renew_token(store: &SharedStore, policy: Policy) -> anyhow::Result<Option<Zeroizing<String>>> {
    store.end_tokens(Tokens::Printed, system_date()).await?;
    if policy != Policy::Token {
        return Ok(None);
    }
    let fresh = Fresh::draw()?;
    store.add_token(Token { expires: system_date() + TOKEN_AGE, printed: true, ..fresh.token()? }).await?;
    Ok(Some(fresh.text()))
}

/// Each client is an open file, and the usual limit is 1024: take what the system grants without asking.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        warn!(%error, limit = limit.current, "cannot raise the number of open files");
    }
}

/// The log of a server: standard error, `RUST_LOG` or else `info`, colours only on a terminal.
fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // Whoever embeds a server has a log already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(io::stderr).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        serve: Serve,
    }

    fn resolved(arguments: &[&str]) -> Result<Settings, Mistakes> {
        let flags = Cli::try_parse_from([&["serve"], arguments].concat()).unwrap().serve.settings;
        settings::resolve(&flags.0, &|_| None)
    }

    fn settings(arguments: &[&str]) -> Settings {
        resolved(arguments).unwrap()
    }

    #[test]
    fn the_policy_follows_the_address() {
        let policy = |arguments: &[&str]| settings(arguments).config.enrol;
        assert_eq!(policy(&[]), Policy::Token);
        assert_eq!(policy(&["--bind", "127.0.0.1"]), Policy::Open);
        assert_eq!(policy(&["--bind", "::1"]), Policy::Open);
        assert_eq!(policy(&["--bind", "127.0.0.1", "--enroll", "token"]), Policy::Token);
        assert_eq!(policy(&["--enroll", "closed"]), Policy::Closed);
    }

    #[test]
    fn the_url_names_a_host_that_can_be_dialled() {
        let host = |arguments: &[&str], bound: &str| dialled(&settings(arguments), bound.parse().unwrap());
        assert_eq!(host(&[], "127.0.0.1"), "127.0.0.1");
        assert_eq!(host(&[], "::1"), "[::1]");
        assert_ne!(host(&[], "0.0.0.0"), "0.0.0.0");
        assert_eq!(host(&["--advertise", "chat.example.org"], "0.0.0.0"), "chat.example.org");
        assert_eq!(host(&["--advertise", "[2001:db8::1]"], "::"), "[2001:db8::1]");
        assert!(resolved(&["--advertise", "host:5150"]).is_err());
        let fingerprint = "ab".repeat(32);
        assert_eq!(url("h", 5150, &[0xab; 32], None), format!("ossicle://h:5150#{fingerprint}"));
        assert_eq!(url("h", 5150, &[0xab; 32], Some("t")), format!("ossicle://h:5150#{fingerprint}.t"));
    }

    #[test]
    fn a_text_is_toml_and_harmless() {
        let text = "a \"b\" \\ \u{1b}[31m \u{202e}\n";
        let quoted = toml_text(text);
        assert!(quoted.chars().all(is_harmless), "{quoted}");
        let line = format!("x = {quoted}");
        let table = toml::de::DeTable::parse(&line).unwrap().into_inner();
        assert_eq!(table.values().next().and_then(|value| value.get_ref().as_str()), Some(text));
    }
}
