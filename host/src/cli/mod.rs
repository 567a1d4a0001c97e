//! The command line: one file per command, and here what they share.
//!
//! Results go to standard output, all else to standard error. Exit codes: 0 done, 1 refused or failed, 2 wrong usage or
//! configuration, 3 not reached in time, 130 interrupted. An error is one sentence that says what to do. What others
//! wrote is made harmless before a person sees it.

pub mod account;
pub mod backup;
pub mod channel;
pub mod chat;
pub mod completions;
pub mod demo;
pub mod doctor;
pub mod enroll;
pub mod init;
pub mod listen;
mod names;
mod password;
pub mod revoke;
pub mod send;
pub mod serve;
pub mod settings;
pub mod status;
mod supervised;
pub mod token;
pub mod verify;
pub mod who;

use core::fmt::Write as _;
use core::time::Duration;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use ossicle_core::{Reason, Rung};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, timeout_at};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

use crate::endpoint::{Access, Failure, GroupNews, Home, Reply, Request, Settled};

/// How long a command that only asks waits for the server.
const PATIENCE: Duration = Duration::from_secs(30);

/// An end-to-end encrypted message backbone for people and microcontrollers
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "ossicle", version, max_term_width = 120)]
#[command(after_help = "Examples:
  ossicle serve                                  run a server, which prints its URL
  ossicle init --name alice 'ossicle://HOST:5150#FINGERPRINT.TOKEN'
  ossicle listen                                 show messages as they come
  ossicle send bob 'good morning'                send one, and wait until bob's client has it
  ossicle chat                                   both, line by line

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or configuration, 3 not reached in time, 130 interrupted.")]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, clap::Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one of it in a process")]
pub enum Command {
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Serve(serve::Serve),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Init(init::Init),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Send(send::Send),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Listen(listen::Listen),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Chat(chat::Chat),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Who(who::Who),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Enroll(enroll::Enroll),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Revoke(revoke::Revoke),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Settings(settings::Settings),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Status(status::Status),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Backup(backup::Backup),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Restore(backup::Restore),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Channel(channel::Channel),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Token(token::Token),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Account(account::Account),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Verify(verify::Verify),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Demo(demo::Demo),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Completions(completions::Completions),
    #[allow(missing_docs, reason = "the command's own documentation is its help")]
    Doctor(doctor::Doctor),
}

/// Hears of interrupts from its making on. Who begins to listen only when he has nothing else to do is ended in the middle
/// by one that comes before: with a terminal that shows nothing of what is typed, say.
struct Interrupt(io::Result<Signal>);

impl Interrupt {
    fn new() -> Self {
        Self(signal(SignalKind::interrupt()))
    }

    async fn heard(self) {
        match self.0 {
            Ok(mut interrupt) => drop(interrupt.recv().await),
            // Then it ends as every program does.
            Err(_) => core::future::pending().await,
        }
    }
}

impl Cli {
    /// Does it, says on standard error what went wrong, and returns the exit code.
    pub async fn run(self) -> u8 {
        let failed = match self.command {
            Command::Serve(serve) => match serve.run().await {
                Ok(code) => return code,
                Err(error) => Err(Failure::refused(format!("{error:#}"))),
            },
            // It clears away what it made when it is interrupted.
            Command::Demo(demo) => demo.run().await,
            // It has more to say about its end than that it failed, and a log that does not break the line being typed.
            Command::Chat(chat) => {
                let interrupt = Interrupt::new();
                tokio::select! {
                    done = chat.run() => match done {
                        Ok(code) => return code,
                        Err(failure) => Err(failure),
                    },
                    () = interrupt.heard() => return 130,
                }
            }
            // It finishes what it has begun when it is interrupted.
            Command::Listen(listen) => {
                log(io::stderr);
                match listen.run().await {
                    Ok(true) => return 130,
                    done => done.map(drop),
                }
            }
            command => {
                log(io::stderr);
                let interrupt = Interrupt::new();
                tokio::select! {
                    done = command.run() => done,
                    () = interrupt.heard() => return 130,
                }
            }
        };
        match failed {
            Ok(()) => 0,
            Err(failure) => {
                say(&format!("ossicle: {}", harmless(&failure.sentence)));
                failure.code
            }
        }
    }
}

impl Command {
    async fn run(self) -> Result<(), Failure> {
        match self {
            Self::Serve(serve) => serve.run().await.map(|_| ()).map_err(|error| Failure::refused(format!("{error:#}"))),
            Self::Init(init) => init.run().await,
            Self::Send(send) => send.run().await,
            Self::Listen(listen) => listen.run().await.map(drop),
            Self::Chat(chat) => chat.run().await.map(drop),
            Self::Who(who) => who.run().await,
            Self::Enroll(enroll) => enroll.run().await,
            Self::Revoke(revoke) => revoke.run().await,
            Self::Settings(settings) => settings.run().await,
            Self::Status(status) => status.run().await,
            Self::Backup(backup) => backup.run().await,
            Self::Restore(restore) => restore.run().await,
            Self::Channel(channel) => channel.run().await,
            Self::Token(token) => token.run().await,
            Self::Account(account) => account.run().await,
            Self::Verify(verify) => verify.run().await,
            Self::Demo(demo) => demo.run().await,
            Self::Completions(completions) => completions.run(),
            Self::Doctor(doctor) => doctor.run().await,
        }
    }
}

/// Where a client's home is.
#[derive(Clone, Debug, clap::Args)]
pub struct HomeArg {
    /// Directory of the client's identity and state [default: $XDG_DATA_HOME/ossicle or ~/.local/share/ossicle]
    #[arg(long, value_name = "DIR", env = "OSSICLE_HOME")]
    pub home: Option<PathBuf>,
}

impl HomeArg {
    fn open(&self) -> Result<Home, Failure> {
        match &self.home {
            Some(directory) => Ok(Home::new(directory)),
            None => Home::default_directory().map(Home::new),
        }
    }
}

/// Where a server's data is, for its operator.
#[derive(Clone, Debug, clap::Args)]
pub struct DataArg {
    /// The server's data directory
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath, env = "OSSICLE_DATA")]
    #[arg(default_value = crate::settings::DATA)]
    pub data: PathBuf,
}

/// The log of a command: to `writer`, `RUST_LOG` or else warnings, without the time, since a person waits for it.
fn log(writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let format = tracing_subscriber::fmt().with_env_filter(filter).without_time().with_target(false);
    // Whoever embeds a command has a log already.
    let _ = format.with_ansi(false).with_writer(writer).try_init();
}

/// A command's way to its home, for one question after the other.
struct Asking<'h> {
    home: &'h Home,
    command: &'static str,
    access: Option<Access>,
    deadline: Instant,
}

impl<'h> Asking<'h> {
    fn new(home: &'h Home, command: &'static str) -> Self {
        Self { home, command, access: None, deadline: Instant::now() + PATIENCE }
    }

    /// The final answer to `request`.
    async fn ask(&mut self, request: Request) -> Result<Reply, Failure> {
        // Asking twice who somebody is does no harm, nor does a batch whose signatures are for one connection; the rest
        // changes something.
        let harmless = matches!(
            request,
            Request::Enrol(_)
                | Request::Exporter
                | Request::Peer { .. }
                | Request::Status
                | Request::Verify { accept: false, .. }
                | Request::Who
        );
        loop {
            let access = match self.access.take() {
                Some(access) => self.access.insert(access),
                None => self.access.insert(Access::open(self.home, self.command).await?),
            };
            let mut requested = access.request(request.clone());
            let mut trouble = None;
            let reply = loop {
                match timeout_at(self.deadline, requested.next()).await {
                    Ok(Reply::Trouble(what)) => trouble = Some(what),
                    Ok(reply) if reply.is_final() => break reply,
                    Ok(_) => {}
                    Err(_) => return Err(too_late(PATIENCE, trouble)),
                }
            };
            match reply {
                Reply::Gone { taken } if harmless || !taken => self.access = None,
                Reply::Gone { .. } => {
                    return Err(Failure::refused(
                        "the process that holds this home ended before there was an answer: it may have been done \
                         or not, look before you do it again",
                    ));
                }
                Reply::Failed(failure) => return Err(failure),
                reply => return Ok(reply),
            }
        }
    }

    async fn close(self) {
        if let Some(access) = self.access {
            access.close().await;
        }
    }
}

fn too_late(patience: Duration, trouble: Option<String>) -> Failure {
    let patience = humantime::format_duration(patience);
    Failure::unreached(match trouble {
        Some(trouble) => format!("not reached within {patience}: {trouble}"),
        None => format!("not reached within {patience}: the server does not answer"),
    })
}

fn unexpected() -> Failure {
    Failure::refused("the answer makes no sense: does another version of ossicle hold this home?")
}

/// A refusal as people read it: the reason as scripts know it, and what to do.
fn refusal(reason: Reason, name: &str, detail: Option<&str>) -> Failure {
    let known = match reason {
        Reason::Offline => format!("{name} is not there, and nothing keeps it: send it again when {name} is"),
        Reason::Unknown => format!("the server knows nobody named {name}: see who is there with `ossicle who`"),
        Reason::KeyChanged if detail.is_some() => format!("nothing was sent: {}", accept(name)),
        Reason::KeyChanged => {
            format!("{name} has pinned another key for this client: ask {name} to compare and accept the present one")
        }
        Reason::TooLarge => "send less, or in parts".to_owned(),
        Reason::QueueFull if detail.is_some() => "wait until some of them are, and try again".to_owned(),
        Reason::QueueFull => format!("too many messages wait for {name}: try again when {name} has read some"),
        Reason::Closed => "nothing is said there any more".to_owned(),
        Reason::NotMember => "`/members` in `ossicle chat` shows how it stands".to_owned(),
        Reason::Expired => format!("{name} did not come for it in time: send it again if it still matters"),
        Reason::Rate => "too many requests: try again later".to_owned(),
        Reason::NameInUse => format!("another client has the name {name}: choose another"),
        Reason::Forbidden => "this client has no right to that: ask the server's operator".to_owned(),
        Reason::Unavailable => "the server cannot do it now: try again later".to_owned(),
        Reason::Rekey | Reason::Unreadable | Reason::Gap | Reason::Rewound => {
            format!("{name} cannot open what this client sends: try again, and ask {name} if it stays so")
        }
        _ => "ask the server's operator".to_owned(),
    };
    Failure::refused(match detail {
        Some(detail) => format!("refused({reason}): {detail}; {known}"),
        None => format!("refused({reason}): {known}"),
    })
}

/// What became of a message for which nobody waited any more.
fn settled(news: &Settled) -> String {
    let Settled { to, text, time, outcome } = news;
    let what = format!("{}, of {}", chat::beginning(text), rfc3339(*time));
    match outcome {
        Ok(Rung::Opened) => format!("opened by {to}: {what}"),
        Ok(rung) => format!("{rung} to {to}: {what}"),
        Err(reason) => format!("not delivered to {to}: {what}: {}", refusal(*reason, to, None)),
    }
}

/// What has happened in a group. `how` says what to type to `accept` or `decline`.
fn group_news(label: &str, news: &GroupNews, how: impl Fn(&str) -> String) -> String {
    match news {
        GroupNews::Invited => format!("you are invited to {label}: {} or {}", how("accept"), how("decline")),
        GroupNews::Doubtful(why) => format!("AN INVITATION IS NOT TO BE TRUSTED and was not taken: {why}"),
        GroupNews::Member { name, state } => format!("{label}: {name} {state}"),
        GroupNews::Closed(Some(by)) => format!("{label} was closed by {by}"),
        GroupNews::Closed(None) => format!("{label} was closed by the server, or by somebody who has not signed that"),
    }
}

/// Since when somebody is not there, as people read it.
fn away(name: &str, last_seen: Option<u64>) -> String {
    match last_seen {
        Some(seen) => format!("{name} is offline, last seen {}", rfc3339(seen)),
        None => format!("{name} is offline and was never seen"),
    }
}

/// What is said of a peer whose key is not the pinned one.
fn key_changed(name: &str) -> String {
    key_changed_but(name, &accept(name))
}

/// As [`key_changed`], with what to do.
fn key_changed_but(name: &str, remedy: &str) -> String {
    format!(
        "KEY CHANGED: the identity key of {name} is not the one that was pinned. Nothing is sent to {name}, and nothing \
         taken that comes with the other key: {remedy}"
    )
}

/// What is said of a peer whose new key the former one signed.
fn key_followed(name: &str) -> String {
    key_followed_but(name, &format!("`{}`", about("ossicle verify", name, "")))
}

/// As [`key_followed`], with what shows the number.
fn key_followed_but(name: &str, verify: &str) -> String {
    format!(
        "{name} has a new identity key, which the former one signed: the safety number has changed, compare it with \
         {verify}"
    )
}

fn accept(name: &str) -> String {
    let (verify, accept) = (about("ossicle verify", name, ""), about("ossicle verify", name, " --accept"));
    format!(
        "ask {name} by another way what happened, compare the safety number of `{verify}`, and if it is right run \
         `{accept}`"
    )
}

/// A command about somebody, to be copied into a shell: whoever chose the name must not choose the command.
fn about(command: &str, name: &str, options: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | ',' | ':' | '%');
    let word = match name.chars().all(is_plain) {
        true => name.to_owned(),
        false => format!("'{}'", name.replace('\'', "'\\''")),
    };
    if name.starts_with('-') { format!("{command}{options} -- {word}") } else { format!("{command} {word}{options}") }
}

/// A line on standard error. Nobody is left to tell where that fails.
fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// A line on standard output, written when this returns. False if nobody reads it any more.
fn print(line: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::refused(format!("cannot write to standard output: {error}"))),
    }
}

/// One line of JSON. Characters that a terminal might obey are escaped also where JSON would allow them.
fn json(value: &impl Serialize) -> Result<String, Failure> {
    let plain = serde_json::to_string(value).map_err(|_| unexpected())?;
    let mut line = String::with_capacity(plain.len());
    for c in plain.chars() {
        if is_harmless(c) {
            line.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(line, "\\u{unit:04x}");
            }
        }
    }
    Ok(line)
}

/// The text with everything escaped that a terminal might obey, or that would hide what is there.
fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmless(c) {
            shown.push(c);
        } else {
            let _ = write!(shown, "{}", c.escape_unicode());
        }
    }
    shown
}

fn is_harmless(c: char) -> bool {
    use GeneralCategory as G;
    // Joiners hold emoji together and change nothing else.
    c == '\u{200d}'
        || !matches!(
            c.general_category(),
            G::Control | G::Format | G::LineSeparator | G::ParagraphSeparator | G::Surrogate | G::Unassigned
        )
}

/// Seconds since 1970 as RFC 3339.
fn rfc3339(seconds: u64) -> String {
    match UNIX_EPOCH.checked_add(Duration::from_secs(seconds)) {
        // The year 9999 is the last that the format has.
        Some(time) if seconds < 253_402_300_800 => humantime::format_rfc3339_seconds(time).to_string(),
        _ => "9999-12-31T23:59:59Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_a_terminal_might_obey_is_escaped() {
        assert_eq!(harmless("a\u{1b}[31mb\u{9b}\u{202e}\n"), "a\\u{1b}[31mb\\u{9b}\\u{202e}\\u{a}");
        assert_eq!(harmless("Zoë 👩‍🚀 日本"), "Zoë 👩‍🚀 日本");
        let line = json(&"a\u{1b}\u{7f}\u{9b}\u{e0041}\n").unwrap();
        assert_eq!(line, "\"a\\u001b\\u007f\\u009b\\udb40\\udc41\\n\"");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), "a\u{1b}\u{7f}\u{9b}\u{e0041}\n");
    }

    #[test]
    fn names_in_commands_are_words_for_a_shell() {
        for (name, word) in [
            ("alice", "verify alice --accept"),
            ("Zoë.2_b-c", "verify Zoë.2_b-c --accept"),
            ("$(id)", "verify '$(id)' --accept"),
            ("`id`;x", "verify '`id`;x' --accept"),
            ("it's", "verify 'it'\\''s' --accept"),
            ("~", "verify '~' --accept"),
            ("--json", "verify --accept -- --json"),
            ("-$x", "verify --accept -- '-$x'"),
        ] {
            assert_eq!(about("verify", name, " --accept"), word);
        }
        // As a shell reads it.
        for name in ["$(id)", "`id`", "a\\'b\"", "*", "!!", "#x", "\u{e9}", ">x", "a|b", "--json"] {
            let script = about("printf %s", name, "").replace("%s --", "%s");
            let read = std::process::Command::new("sh").args(["-c", &format!("set -f; {script}")]).output().unwrap();
            assert_eq!(String::from_utf8(read.stdout).unwrap(), name, "{script}");
        }
        assert!(key_changed("$(id)").contains("`ossicle verify '$(id)' --accept`"));
        assert!(key_followed("$(id)").contains("`ossicle verify '$(id)'`"));
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
