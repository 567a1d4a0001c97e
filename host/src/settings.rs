//! What an operator chooses, in layers: a flag wins over the environment, that over the file, that over the default.
//!
//! One row per setting, and one name for it in every layer: `mailbox-bytes` is the flag `--mailbox-bytes`, the variable
//! `OSSICLE_MAILBOX_BYTES` and the key `mailbox-bytes` of the file. [`resolve`] reads all layers, remembers where each
//! value came from, and names every mistake at once. Durations are written `30s`, sizes `16MiB`. No setting is a secret,
//! and no message repeats a value: who puts a token in the wrong place does not find it in a log.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::time::Duration;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};

use crate::gate::GateLimits;
use crate::limits::{Rate, Rates};
use crate::mailbox::MailboxLimits;
use crate::server::{Config, Policy};

/// The file in the data directory that is read where no other is named.
pub const FILE: &str = "ossicle.toml";
/// The variable that names the file.
pub const FILE_VARIABLE: &str = "OSSICLE_CONFIG";
/// Where a server's data is by default.
pub const DATA: &str = "./ossicle-data";

const MAX_FILE_LEN: u64 = 64 * 1024;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const SECOND: Duration = Duration::from_secs(1);

/// Settings that were named, and the file that was.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// The file of `--config`.
    pub file: Option<PathBuf>,
    /// Names of settings, as in [`About::name`], and their values.
    pub values: BTreeMap<String, OsString>,
}

/// What people are told about a setting.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Its name: of the flag, and of the key in the file.
    pub name: &'static str,
    /// What its value is called.
    pub value_name: &'static str,
    /// What it does.
    pub help: &'static str,
    /// A further variable that it is read from.
    pub also: Option<&'static str>,
    /// Whether it is about limits and times, which few change.
    pub limit: bool,
    /// Whether it can change while the server runs.
    pub live: bool,
}

impl About {
    /// The variable of the environment.
    pub fn variable(&self) -> String {
        format!("OSSICLE_{}", self.name.replace('-', "_").to_uppercase())
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody chose it.
    Default,
    /// This variable.
    Environment(String),
    /// This file.
    File {
        /// Its path.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// The flag.
    Flag,
    /// Whoever changed it while the server ran.
    Operator,
}

/// A value as the file would have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Shown {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
}

/// A setting as it was resolved.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The setting.
    pub about: About,
    /// Its value. `None` if there is none.
    pub value: Option<Shown>,
    /// Where it came from.
    pub origin: Origin,
    /// How the default was found, where that takes words.
    pub note: Option<&'static str>,
}

impl Chosen {
    /// Where the value came from, for people.
    pub fn origin(&self) -> String {
        match &self.origin {
            Origin::Default => self.note.map_or_else(|| "default".to_owned(), |note| format!("default: {note}")),
            Origin::Environment(variable) => variable.clone(),
            Origin::File { path, line } => format!("{}, line {line}", path.display()),
            Origin::Flag => format!("--{}", self.about.name),
            Origin::Operator => "changed while running, until the server ends".to_owned(),
        }
    }
}

/// Every setting as scripts read it, and as a server that runs tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effective {
    /// The file that was read.
    pub file: Option<String>,
    /// In the order of the documentation.
    pub settings: Vec<EffectiveSetting>,
}

/// One setting of [`Effective`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectiveSetting {
    /// Its name.
    pub key: String,
    /// Its value, if it has one.
    pub value: Option<Shown>,
    /// `operator`, `flag`, `environment`, `file` or `default`.
    pub source: String,
    /// The variable, where that is the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variable: Option<String>,
    /// The line, where a file is the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// Where it came from, for people.
    pub origin: String,
}

impl Effective {
    /// As they were resolved.
    pub fn new(settings: &Settings) -> Self {
        let file = settings.file.as_ref().map(|file| file.display().to_string());
        Self { file, settings: settings.chosen.iter().map(EffectiveSetting::new).collect() }
    }
}

impl EffectiveSetting {
    fn new(chosen: &Chosen) -> Self {
        let (source, variable, line) = match &chosen.origin {
            Origin::Default => ("default", None, None),
            Origin::Environment(variable) => ("environment", Some(variable.clone()), None),
            Origin::File { line, .. } => ("file", None, Some(*line)),
            Origin::Flag => ("flag", None, None),
            Origin::Operator => ("operator", None, None),
        };
        let (key, source) = (chosen.about.name.to_owned(), source.to_owned());
        Self { key, value: chosen.value.clone(), source, variable, line, origin: chosen.origin() }
    }
}

/// The configuration that a server starts with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The data directory.
    pub data: PathBuf,
    /// The address to listen on.
    pub bind: IpAddr,
    /// The port to listen on; 0 for any.
    pub port: u16,
    /// Bits of the server's key, where one is made.
    pub rsa: usize,
    /// What clients dial, if it was chosen.
    pub advertise: Option<String>,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// What the server itself takes, the policy included.
    pub config: Config,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// Every setting, in the order of the documentation.
    pub chosen: Vec<Chosen>,
}

impl Settings {
    /// The setting of this name.
    pub fn named(&self, name: &str) -> Option<&Chosen> {
        self.chosen.iter().find(|chosen| chosen.about.name == name)
    }

    /// These settings with other values for some of them, in the place of whatever layer they came from.
    ///
    /// # Errors
    /// [`Mistakes`] names all that is wrong: names that there are not, settings that cannot change while a server runs,
    /// values that are none or contradict others.
    pub fn changed(&self, changes: &BTreeMap<String, String>) -> Result<Self, Mistakes> {
        let stands = |chosen: &Chosen| Some((chosen.about.name.to_owned(), plain(chosen.value.as_ref()?).into()));
        let flags = Flags { file: None, values: self.chosen.iter().filter_map(stands).collect() };
        let mut layers = Layers { changes, ..Layers::new(&flags, &|_| None) };
        for name in changes.keys() {
            match self.named(name) {
                Some(chosen) if chosen.about.live => {}
                Some(_) => layers.mistakes.push(format!(
                    "{name} cannot change while the server runs: give it to the next start, as a flag, a variable or in \
                     the file of settings"
                )),
                None => {
                    let advice = self.advice(name, "see what there is with `ossicle settings`");
                    layers.mistakes.push(format!("there is no setting `{}`: {advice}", name.chars().take(64).collect::<String>().escape_default()));
                }
            }
        }
        let mut settings = layers.settings(self.file.clone());
        settings.data.clone_from(&self.data);
        for (new, old) in settings.chosen.iter_mut().zip(&self.chosen) {
            if new.value == old.value {
                new.clone_from(old);
            }
        }
        layers.contradictions(&settings);
        if layers.mistakes.is_empty() { Ok(settings) } else { Err(Mistakes(layers.mistakes)) }
    }

    /// What somebody may have meant who wrote this name, or else `what_to_do`.
    fn advice(&self, name: &str, what_to_do: &str) -> String {
        let near = |known: &&str| strsim::damerau_levenshtein(known, name) <= 2;
        let close = self.chosen.iter().map(|chosen| chosen.about.name).find(near);
        close.map_or_else(|| what_to_do.to_owned(), |close| format!("did you mean `{close}`?"))
    }
}

/// What is wrong with a configuration: every mistake, each one sentence that names where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl core::error::Error for Mistakes {}

/// Every setting with its default, for documentation and flags.
pub fn defaults() -> Vec<Chosen> {
    let flags = Flags::default();
    Layers::new(&flags, &|_| None).settings(None).chosen
}

/// The effective configuration: `flags`, then the variables that `environment` has, then the file, then the defaults.
///
/// The file is the one that the flag or `OSSICLE_CONFIG` names, else [`FILE`] in the data directory, if it is there. An
/// empty variable counts as none.
///
/// # Errors
/// [`Mistakes`] names all that is wrong.
pub fn resolve(flags: &Flags, environment: &dyn Fn(&str) -> Option<OsString>) -> Result<Settings, Mistakes> {
    let mut layers = Layers::new(flags, environment);
    let named = flags.file.clone().or_else(|| layers.variable(FILE_VARIABLE).map(PathBuf::from));
    let found = match named {
        Some(path) => Some((path, true)),
        None => {
            let path = layers.data_outside_the_file().join(FILE);
            let is_there = path.try_exists().or_else(|error| match error.kind() {
                io::ErrorKind::NotADirectory => Ok(false),
                _ => Err(error),
            });
            // What is there and cannot be looked at is named when it is read.
            is_there.unwrap_or(true).then_some((path, false))
        }
    };
    if let Some((path, named)) = &found {
        layers.load(path);
        if !named && let Some(Entry { line, .. }) = layers.entries.remove("data") {
            layers.mistakes.push(format!(
                "{}, line {line}: the key `data` cannot stand in a file of the data directory itself: take it out",
                path.display()
            ));
        }
    }
    let file = found.map(|(path, _)| path);
    let settings = layers.settings(file);
    layers.contradictions(&settings);
    layers.unknown_keys(&settings);
    if layers.mistakes.is_empty() { Ok(settings) } else { Err(Mistakes(layers.mistakes)) }
}

/// How a setting is written in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Number,
    /// A size: a text with a unit, or a number of bytes.
    Size,
    Text,
}

/// One setting of type `T`.
struct Key<T> {
    about: About,
    form: Form,
    /// Says what to write instead, and never what was written.
    read: fn(&str) -> Result<T, String>,
    show: fn(&T) -> Shown,
}

/// What the file says about a setting.
struct Entry {
    line: usize,
    /// As text, whatever it was; and whether it was a number. `Err` names a type that no setting has.
    value: Result<(String, bool), &'static str>,
}

struct Layers<'l> {
    /// What an operator changes while the server runs.
    changes: &'l BTreeMap<String, String>,
    flags: &'l Flags,
    environment: &'l dyn Fn(&str) -> Option<OsString>,
    /// The file that `entries` are from.
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    chosen: Vec<Chosen>,
    mistakes: Vec<String>,
}

impl<'l> Layers<'l> {
    fn new(flags: &'l Flags, environment: &'l dyn Fn(&str) -> Option<OsString>) -> Self {
        const NONE: &BTreeMap<String, String> = &BTreeMap::new();
        let (entries, chosen, mistakes) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { changes: NONE, flags, environment, path: PathBuf::new(), entries, chosen, mistakes }
    }

    fn variable(&self, name: &str) -> Option<OsString> {
        (self.environment)(name).filter(|value| !value.is_empty())
    }

    fn data_outside_the_file(&self) -> PathBuf {
        let flag = self.flags.values.get("data").cloned();
        flag.or_else(|| self.variable("OSSICLE_DATA")).map_or_else(|| PathBuf::from(DATA), PathBuf::from)
    }

    /// Every setting, in the order in which they are documented.
    fn settings(&mut self, file: Option<PathBuf>) -> Settings {
        let usual = Config::default();
        let data = self.take(&DATA_KEY, PathBuf::from(DATA));
        let data = match self.chosen.last_mut() {
            // Wherever the process was started, a file means the same directory.
            Some(chosen) if matches!(chosen.origin, Origin::File { .. }) => {
                let data = self.path.parent().unwrap_or_else(|| Path::new("")).join(data);
                chosen.value = Some((DATA_KEY.show)(&data));
                data
            }
            _ => data,
        };
        let bind = self.take(&BIND, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let port = self.take(&PORT, 5150);
        let local = bind.to_canonical().is_loopback();
        let enrol = self.take(&ENROLL, if local { Policy::Open } else { Policy::Token });
        self.note(if local { "bound to loopback only" } else { "bound to more than loopback" });
        let rsa = self.take(&RSA, 3072);
        let advertise = self.take_or_none(&ADVERTISE);
        self.note("the bound address, or that of the default route");
        let metrics = self.take_or_none(&METRICS);
        let rates = usual.rates;
        let config = Config {
            enrol,
            heartbeat: self.take(&HEARTBEAT, usual.heartbeat),
            timeout: self.take(&TIMEOUT, usual.timeout),
            hello_within: self.take(&HELLO_WITHIN, usual.hello_within),
            handshake_within: self.take(&HANDSHAKE_WITHIN, usual.handshake_within),
            farewell_within: self.take(&FAREWELL_WITHIN, usual.farewell_within),
            key_age: self.take(&KEY_AGE, usual.key_age),
            channel_age: self.take(&CHANNEL_AGE, usual.channel_age),
            gate: GateLimits {
                connections: self.take(&MAX_CONNECTIONS, usual.gate.connections),
                unauthenticated: self.take(&MAX_HANDSHAKES, usual.gate.unauthenticated),
                busy: self.take(&BUSY_HANDSHAKES, usual.gate.busy),
                per_source: self.take(&SOURCE_HANDSHAKES, usual.gate.per_source),
                puzzle: self.take(&PUZZLE_BITS, usual.gate.puzzle),
            },
            // No operator has a reason to choose.
            held_devices: usual.held_devices,
            poll: usual.poll,
            queue_age: self.take(&QUEUE_AGE, usual.queue_age),
            mailbox: MailboxLimits {
                messages: self.take(&MAILBOX_MESSAGES, usual.mailbox.messages),
                bytes: self.take(&MAILBOX_BYTES, usual.mailbox.bytes),
                total: self.take(&MAILBOX_TOTAL, usual.mailbox.total),
                owed: self.take(&MAILBOX_OWED, usual.mailbox.owed),
            },
            rates: Rates {
                messages: Rate {
                    per_second: self.take(&MESSAGE_RATE, rates.messages.per_second),
                    burst: self.take(&MESSAGE_BURST, rates.messages.burst),
                },
                handshakes: Rate {
                    per_second: self.take(&HANDSHAKE_RATE, rates.handshakes.per_second),
                    burst: self.take(&HANDSHAKE_BURST, rates.handshakes.burst),
                },
            },
        };
        let chosen = core::mem::take(&mut self.chosen);
        Settings { data, bind, port, rsa, advertise, metrics, config, file, chosen }
    }

    fn take<T: Clone>(&mut self, key: &Key<T>, default: T) -> T {
        self.choose(key, Some(default.clone())).unwrap_or(default)
    }

    fn take_or_none<T>(&mut self, key: &Key<T>) -> Option<T> {
        self.choose(key, None)
    }

    fn choose<T>(&mut self, key: &Key<T>, default: Option<T>) -> Option<T> {
        // Read also where another layer wins: a mistake in the file is one whoever overrides it.
        let in_file = self.in_file(key);
        let (value, origin) = self
            .change(key)
            .or_else(|| self.flag(key))
            .or_else(|| self.in_environment(key))
            .or(in_file)
            .map_or((default, Origin::Default), |(value, origin)| (Some(value), origin));
        let shown = value.as_ref().map(key.show);
        self.chosen.push(Chosen { about: key.about, value: shown, origin, note: None });
        value
    }

    /// Explains the default of the setting that was just taken.
    fn note(&mut self, note: &'static str) {
        if let Some(chosen) = self.chosen.last_mut().filter(|chosen| chosen.origin == Origin::Default) {
            chosen.note = Some(note);
        }
    }

    fn change<T>(&mut self, key: &Key<T>) -> Option<(T, Origin)> {
        let value = self.changes.get(key.about.name)?.clone();
        let value = self.read(key, OsStr::new(&value), key.about.name)?;
        Some((value, Origin::Operator))
    }

    fn flag<T>(&mut self, key: &Key<T>) -> Option<(T, Origin)> {
        let value = self.flags.values.get(key.about.name)?.clone();
        let value = self.read(key, &value, &format!("--{}", key.about.name))?;
        Some((value, Origin::Flag))
    }

    fn in_environment<T>(&mut self, key: &Key<T>) -> Option<(T, Origin)> {
        let own = key.about.variable();
        let (variable, value) = match (self.variable(&own), key.about.also) {
            (Some(value), Some(also)) if self.variable(also).is_some_and(|other| other != value) => {
                self.mistakes.push(format!("{own} and {also} are the same setting and differ: unset one of them"));
                (own, value)
            }
            (Some(value), _) => (own, value),
            (None, also) => also.and_then(|also| Some((also.to_owned(), self.variable(also)?)))?,
        };
        let value = self.read(key, &value, &variable)?;
        Some((value, Origin::Environment(variable)))
    }

    fn read<T>(&mut self, key: &Key<T>, value: &OsStr, place: &str) -> Option<T> {
        let read = match value.to_str() {
            Some(text) => (key.read)(text),
            None => Err("this is not UTF-8".into()),
        };
        read.map_err(|advice| self.mistakes.push(format!("{place}: {advice}"))).ok()
    }

    fn in_file<T>(&mut self, key: &Key<T>) -> Option<(T, Origin)> {
        let Entry { line, value } = self.entries.remove(key.about.name)?;
        let read = match (value, key.form) {
            (Ok((_, true)), Form::Text) => Err("is a number, and must be a text in quotes".to_owned()),
            (Ok((_, false)), Form::Number) => Err("is a text, and must be a number without quotes".to_owned()),
            (Ok((text, _)), _) => (key.read)(&text),
            (Err(kind), Form::Number) => Err(format!("is {kind}, and must be a number")),
            (Err(kind), _) => Err(format!("is {kind}, and must be a text in quotes")),
        };
        let path = self.path.clone();
        match read {
            Ok(value) => Some((value, Origin::File { path, line })),
            Err(advice) => {
                self.mistakes.push(format!("{}, line {line}: {}: {advice}", path.display(), key.about.name));
                None
            }
        }
    }
}

// The file.

impl Layers<'_> {
    /// Reads the file at `path` into `entries`.
    fn load(&mut self, path: &Path) {
        self.path = path.to_owned();
        let shown = path.display();
        let text = match read_file(path) {
            Ok(text) => text,
            Err(sentence) => {
                self.mistakes.push(format!("{shown}: {sentence}"));
                return;
            }
        };
        let (table, errors) = DeTable::parse_recoverable(&text);
        if !errors.is_empty() {
            for error in errors {
                let line = line_at(&text, error.span().map_or(0, |span| span.start));
                self.mistakes.push(format!("{shown}, line {line}: {}", error.message().replace('\n', ", ")));
            }
            return;
        }
        for (key, value) in table.into_inner() {
            let line = line_at(&text, key.span().start);
            let value = match value.into_inner() {
                DeValue::Array(_) => Err("a list"),
                DeValue::Boolean(_) => Err("true or false"),
                DeValue::Datetime(_) => Err("a date"),
                DeValue::Float(_) => Err("a number with a fraction"),
                DeValue::Integer(number) => Ok((decimal(number.as_str(), number.radix()), true)),
                DeValue::String(text) => Ok((text.into_owned(), false)),
                DeValue::Table(_) => Err("a table"),
            };
            self.entries.insert(key.into_inner().into_owned(), Entry { line, value });
        }
    }

    fn unknown_keys(&mut self, settings: &Settings) {
        for (key, Entry { line, .. }) in core::mem::take(&mut self.entries) {
            let shown: String = key.chars().take(64).collect();
            let advice = settings.advice(&key, "see what there is with `ossicle serve --check`");
            let path = self.path.display();
            self.mistakes.push(format!("{path}, line {line}: there is no key `{shown}`: {advice}"));
        }
    }

    /// Values that cannot stand beside each other.
    fn contradictions(&mut self, settings: &Settings) {
        let config = &settings.config;
        let place = |name: &str| {
            let shown = settings.named(name).and_then(|chosen| Some((chosen.value.as_ref()?, chosen.origin())));
            shown.map_or_else(|| name.to_owned(), |(value, origin)| format!("{name} ({}; {origin})", plain(value)))
        };
        for (wrong, long, word, short) in [
            (config.timeout <= config.heartbeat, "timeout", "longer", "heartbeat"),
            (config.handshake_within < config.hello_within, "handshake-within", "no shorter", "hello-within"),
            (config.mailbox.total < config.mailbox.bytes, "mailbox-total", "no smaller", "mailbox-bytes"),
        ] {
            if wrong {
                self.mistakes.push(format!("{} must be {word} than {}", place(long), place(short)));
            }
        }
    }
}

/// The text of a file of settings, or what is in the way.
fn read_file(path: &Path) -> Result<String, String> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => "there is no such file: name another with --config FILE".to_owned(),
        _ => format!("cannot be read ({error}): look at its permissions"),
    };
    // Asked before it is opened: opening a pipe waits for a writer.
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err("this is not a file: name another with --config FILE".into());
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_FILE_LEN + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_LEN {
        return Err(format!(
            "more than {} is no configuration: name another with --config FILE",
            size_text(MAX_FILE_LEN)
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let lines = error.as_bytes().iter().take(error.utf8_error().valid_up_to()).filter(|byte| **byte == b'\n');
        format!("line {} is not UTF-8: write it again as plain text", lines.count() + 1)
    })
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// An integer as people write it; what is too large for any setting stays what it is.
fn decimal(digits: &str, radix: u32) -> String {
    i64::from_str_radix(digits, radix).map_or_else(|_| digits.to_owned(), |number| number.to_string())
}

// The rows.

const fn about(name: &'static str, value_name: &'static str, help: &'static str) -> About {
    About { name, value_name, help, also: None, limit: false, live: false }
}

const fn limit(name: &'static str, value_name: &'static str, help: &'static str) -> About {
    About { name, value_name, help, also: None, limit: true, live: false }
}

const fn live(about: About) -> About {
    About { live: true, ..about }
}

const fn also(about: About, also: &'static str) -> About {
    About { also: Some(also), ..about }
}

const DATA_KEY: Key<PathBuf> = Key {
    about: about("data", "DIR", "Directory of the server's data, made if it is not there"),
    form: Form::Text,
    read: |text| if text.is_empty() { Err("name a directory".into()) } else { Ok(text.into()) },
    show: |path| Shown::Text(path.display().to_string()),
};
const BIND: Key<IpAddr> = Key {
    about: also(about("bind", "ADDR", "Address to listen on"), "OSSICLE_HOST"),
    form: Form::Text,
    read: |text| text.parse().map_err(|_| "give an address of this machine, such as 0.0.0.0 or 127.0.0.1".into()),
    show: |address| Shown::Text(address.to_string()),
};
const PORT: Key<u16> = Key {
    about: about("port", "PORT", "Port to listen on; 0 takes any free one"),
    form: Form::Number,
    read: |text| number(text, 0, 65_535),
    show: |port| Shown::Number((*port).into()),
};
const ENROLL: Key<Policy> = Key {
    about: live(about(
        "enroll",
        "POLICY",
        "Who may enrol: open (whoever reaches the server), token (who has the printed URL), closed",
    )),
    form: Form::Text,
    read: |text| match text {
        "open" => Ok(Policy::Open),
        "token" => Ok(Policy::Token),
        "closed" => Ok(Policy::Closed),
        _ => Err("give open, token or closed".into()),
    },
    show: |policy| {
        let word = match policy {
            Policy::Open => "open",
            Policy::Token => "token",
            Policy::Closed => "closed",
        };
        Shown::Text(word.into())
    },
};
const RSA: Key<usize> = Key {
    about: about(
        "rsa",
        "BITS",
        "Bits of the server's key, where a new one is made: 2048, 3072, or 4096 (too long for devices)",
    ),
    form: Form::Number,
    read: |text| match text {
        "2048" => Ok(2048),
        "3072" => Ok(3072),
        "4096" => Ok(4096),
        _ => Err("give 2048, 3072 or 4096".into()),
    },
    show: count_shown,
};
const ADVERTISE: Key<String> = Key {
    about: about("advertise", "HOST", "Host name or address for the printed URL"),
    form: Form::Text,
    read: host,
    show: |host| Shown::Text(host.clone()),
};
const METRICS: Key<SocketAddr> = Key {
    about: about("metrics", "ADDR:PORT", "Serve /metrics, /healthz and /readyz here, over HTTP; anybody may read them"),
    form: Form::Text,
    read: |text| text.parse().map_err(|_| "give an address of this machine and a port, such as 127.0.0.1:9515".into()),
    show: |address| Shown::Text(address.to_string()),
};
const HEARTBEAT: Key<u16> = Key {
    about: also(
        live(limit("heartbeat", "TIME", "Silence after which the server asks whether a client is there")),
        "OSSICLE_HEARTBEAT_INTERVAL",
    ),
    form: Form::Text,
    read: |text| seconds(text, 1, 3600),
    show: |seconds| time_shown(&Duration::from_secs((*seconds).into())),
};
const TIMEOUT: Key<u16> = Key {
    about: also(
        live(limit("timeout", "TIME", "Silence after which it gives a client up; longer than heartbeat")),
        "OSSICLE_TIMEOUT_THRESHOLD",
    ),
    form: Form::Text,
    read: |text| seconds(text, 2, 4 * 3600),
    show: |seconds| time_shown(&Duration::from_secs((*seconds).into())),
};
const HELLO_WITHIN: Key<Duration> = Key {
    about: live(limit("hello-within", "TIME", "Within this a client has said hello")),
    form: Form::Text,
    read: |text| duration(text, Duration::from_millis(100), Duration::from_secs(300)),
    show: time_shown,
};
const HANDSHAKE_WITHIN: Key<Duration> = Key {
    about: live(limit("handshake-within", "TIME", "Within this the handshake is over; slow devices sign for seconds")),
    form: Form::Text,
    read: |text| duration(text, Duration::from_millis(100), Duration::from_secs(600)),
    show: time_shown,
};
const FAREWELL_WITHIN: Key<Duration> = Key {
    about: live(limit("farewell-within", "TIME", "Within this clients take their leave when the server stops")),
    form: Form::Text,
    read: |text| duration(text, Duration::from_millis(100), Duration::from_secs(300)),
    show: time_shown,
};
const KEY_AGE: Key<Duration> = Key {
    about: live(limit("key-age", "TIME", "Age at which a connection's sealing key is renewed")),
    form: Form::Text,
    read: |text| duration(text, SECOND, 7 * DAY),
    show: time_shown,
};
const CHANNEL_AGE: Key<Duration> = Key {
    about: live(limit("channel-age", "TIME", "Time after a full handshake in which a client comes back without one")),
    form: Form::Text,
    read: |text| duration(text, Duration::ZERO, 7 * DAY),
    show: time_shown,
};
const MAX_CONNECTIONS: Key<usize> = Key {
    about: limit("max-connections", "COUNT", "Connections at a time, whoever they are; further ones are closed"),
    form: Form::Number,
    read: |text| number(text, 1, 10_000_000),
    show: count_shown,
};
const MAX_HANDSHAKES: Key<usize> = Key {
    about: limit("max-handshakes", "COUNT", "Connections that may be in their handshake at a time"),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000),
    show: count_shown,
};
const QUEUE_AGE: Key<Duration> = Key {
    about: live(limit("queue-age", "TIME", "Time that a message waits in the store for a client that does not come")),
    form: Form::Text,
    read: |text| duration(text, Duration::from_secs(60), 10 * 365 * DAY),
    show: time_shown,
};
const BUSY_HANDSHAKES: Key<usize> = Key {
    about: limit(
        "busy-handshakes",
        "COUNT",
        "From so many handshakes on newcomers are turned away at random, and strangers have to work",
    ),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000),
    show: count_shown,
};
const SOURCE_HANDSHAKES: Key<usize> = Key {
    about: limit(
        "source-handshakes",
        "COUNT",
        "Connections of one address that may be in their handshake, or failed lately",
    ),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000),
    show: count_shown,
};
const PUZZLE_BITS: Key<u8> = Key {
    about: limit(
        "puzzle-bits",
        "BITS",
        "Work of a stranger under load, doubled by each bit; 16 is 2 s of a slow device, 0 is none",
    ),
    form: Form::Number,
    read: |text| number(text, 0, ossicle_core::MAX_PUZZLE_BITS.into()),
    show: |bits| Shown::Number((*bits).into()),
};
const MAILBOX_MESSAGES: Key<usize> = Key {
    about: live(limit(
        "mailbox-messages",
        "COUNT",
        "Messages that may be in memory for one client; what comes beyond it waits in the store",
    )),
    form: Form::Number,
    read: |text| number(text, 1, 10_000_000),
    show: count_shown,
};
const MAILBOX_BYTES: Key<usize> = Key {
    about: live(limit("mailbox-bytes", "SIZE", "Their bytes")),
    form: Form::Size,
    // Less does not hold a handful of the longest messages.
    read: |text| size(text, 64 << 10, 1 << 40),
    show: size_shown,
};
const MAILBOX_TOTAL: Key<usize> = Key {
    about: live(limit("mailbox-total", "SIZE", "Bytes that may be in memory for all clients together")),
    form: Form::Size,
    read: |text| size(text, 64 << 10, 1 << 44),
    show: size_shown,
};
const MAILBOX_OWED: Key<usize> = Key {
    about: live(limit(
        "mailbox-owed",
        "COUNT",
        "Answers and receipts that may wait for one client; beyond it, it is disconnected",
    )),
    form: Form::Number,
    read: |text| number(text, 16, 10_000_000),
    show: count_shown,
};
const MESSAGE_RATE: Key<u32> = Key {
    about: live(limit("message-rate", "COUNT", "Messages a second of one client, in the long run")),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000_000),
    show: rate_shown,
};
const MESSAGE_BURST: Key<u32> = Key {
    about: live(limit("message-burst", "COUNT", "Messages of one client at once, after a rest")),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000_000),
    show: rate_shown,
};
const HANDSHAKE_RATE: Key<u32> = Key {
    about: live(limit("handshake-rate", "COUNT", "Full handshakes a second from one address, in the long run")),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000_000),
    show: rate_shown,
};
const HANDSHAKE_BURST: Key<u32> = Key {
    about: live(limit("handshake-burst", "COUNT", "Full handshakes from one address at once, after a rest")),
    form: Form::Number,
    read: |text| number(text, 1, 1_000_000_000),
    show: rate_shown,
};

// Values.

fn number<T: TryFrom<u64>>(text: &str, least: u64, most: u64) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| format!("give a number from {least} to {most}"))
}

fn duration(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let found = humantime::parse_duration(text).ok().filter(|found| (least..=most).contains(found));
    found.ok_or_else(|| {
        let [least, most] = [least, most].map(humantime::format_duration);
        format!("give a duration with its unit, such as 30s or 10m, from {least} to {most}")
    })
}

fn seconds(text: &str, least: u16, most: u16) -> Result<u16, String> {
    let found = duration(text, Duration::from_secs(least.into()), Duration::from_secs(most.into()))?;
    let whole = u16::try_from(found.as_secs()).ok().filter(|_| found.subsec_nanos() == 0);
    whole.ok_or_else(|| "give whole seconds".into())
}

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

fn size(text: &str, least: u64, most: u64) -> Result<usize, String> {
    let (digits, unit) =
        UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim_end(), *unit))).unwrap_or((text, 1));
    let bytes = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(unit));
    let bytes = bytes.filter(|bytes| (least..=most).contains(bytes)).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| {
        let [least, most] = [least, most].map(size_text);
        format!("give a size with its unit, such as 64KiB or 16MiB, from {least} to {most}")
    })
}

fn size_text(bytes: u64) -> String {
    let whole = UNITS.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

/// A host name or address, without port or brackets.
fn host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let is_name = !bare.is_empty() && bare.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    if is_name || bare.parse::<Ipv6Addr>().is_ok() {
        Ok(bare.to_owned())
    } else {
        Err("give a host name or an address, without a port: the port is --port".into())
    }
}

fn count_shown(count: &usize) -> Shown {
    Shown::Number(u64::try_from(*count).unwrap_or(u64::MAX))
}

fn rate_shown(rate: &u32) -> Shown {
    Shown::Number((*rate).into())
}

fn size_shown(bytes: &usize) -> Shown {
    Shown::Text(size_text(u64::try_from(*bytes).unwrap_or(u64::MAX)))
}

fn time_shown(time: &Duration) -> Shown {
    Shown::Text(humantime::format_duration(*time).to_string())
}

/// The value without quotes.
fn plain(value: &Shown) -> String {
    match value {
        Shown::Number(number) => number.to_string(),
        Shown::Text(text) => text.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers in a temporary directory, which is the data directory.
    struct World {
        directory: tempfile::TempDir,
        flags: Flags,
        environment: BTreeMap<String, OsString>,
    }

    impl World {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let environment = BTreeMap::from([("OSSICLE_DATA".to_owned(), directory.path().into())]);
            Self { directory, flags: Flags::default(), environment }
        }

        fn flag(&mut self, name: &str, value: &str) {
            self.flags.values.insert(name.to_owned(), value.into());
        }

        fn variable(&mut self, name: &str, value: &str) {
            self.environment.insert(name.to_owned(), value.into());
        }

        fn file(&self, text: &str) -> PathBuf {
            let path = self.directory.path().join(FILE);
            std::fs::write(&path, text).unwrap();
            path
        }

        fn resolve(&self) -> Result<Settings, Mistakes> {
            resolve(&self.flags, &|name| self.environment.get(name).cloned())
        }

        fn mistakes(&self) -> Vec<String> {
            self.resolve().unwrap_err().0
        }
    }

    fn origin(settings: &Settings, name: &str) -> String {
        settings.chosen.iter().find(|chosen| chosen.about.name == name).unwrap().origin()
    }

    /// A value other than the default for each setting, the same in every layer: flag, variable, file.
    fn others() -> Vec<(&'static str, Vec<Shown>)> {
        let text = |values: [&str; 3]| values.map(|value| Shown::Text(value.into())).to_vec();
        let number = |values: [u64; 3]| values.map(Shown::Number).to_vec();
        vec![
            ("data", text(["/a", "/b", "/c"])),
            ("bind", text(["127.0.0.1", "127.0.0.2", "127.0.0.3"])),
            ("port", number([1, 2, 3])),
            ("enroll", text(["closed", "open", "closed"])),
            ("rsa", number([2048, 4096, 2048])),
            ("advertise", text(["a.example", "b.example", "c.example"])),
            ("metrics", text(["127.0.0.1:1", "[::1]:2", "127.0.0.1:3"])),
            ("heartbeat", text(["1s", "2s", "3s"])),
            ("timeout", text(["1m", "2m", "3m"])),
            ("hello-within", text(["1s", "2s", "3s"])),
            ("handshake-within", text(["10s", "11s", "12s"])),
            ("farewell-within", text(["1s", "2s", "3s"])),
            ("key-age", text(["1m", "2m", "3m"])),
            ("channel-age", text(["1m", "2m", "3m"])),
            ("max-connections", number([1, 2, 3])),
            ("max-handshakes", number([1, 2, 3])),
            ("busy-handshakes", number([1, 2, 3])),
            ("source-handshakes", number([1, 2, 3])),
            ("puzzle-bits", number([1, 2, 3])),
            ("queue-age", text(["1m", "2m", "3m"])),
            ("mailbox-messages", number([1, 2, 3])),
            ("mailbox-bytes", text(["1MiB", "2MiB", "3MiB"])),
            ("mailbox-total", text(["101MiB", "102MiB", "103MiB"])),
            ("mailbox-owed", number([16, 17, 18])),
            ("message-rate", number([1, 2, 3])),
            ("message-burst", number([1, 2, 3])),
            ("handshake-rate", number([1, 2, 3])),
            ("handshake-burst", number([1, 2, 3])),
        ]
    }

    #[test]
    fn each_layer_wins_over_those_below_it_for_every_setting() {
        let names: Vec<&str> = defaults().iter().map(|chosen| chosen.about.name).collect();
        assert_eq!(names, others().iter().map(|(name, _)| *name).collect::<Vec<_>>());
        for (name, values) in others() {
            let mut world = World::new();
            // Named, since the data directory itself is among the settings.
            let file = world.file(&match &values[2] {
                Shown::Number(number) => format!("# a comment\n{name} = {number}\n"),
                Shown::Text(text) => format!("# a comment\n{name} = \"{text}\"\n"),
            });
            world.environment.clear();
            let chosen = |world: &World| {
                let settings = world.resolve().unwrap();
                let found = settings.chosen.iter().find(|chosen| chosen.about.name == name).unwrap().clone();
                (found.value.clone(), found.origin())
            };
            let default = chosen(&world);
            assert!(default.1.starts_with("default"), "{name}: {default:?}");
            world.flags.file = Some(file.clone());
            assert_eq!(chosen(&world), (Some(values[2].clone()), format!("{}, line 2", file.display())), "{name}");
            let variable = format!("OSSICLE_{}", name.replace('-', "_").to_uppercase());
            world.variable(&variable, &plain(&values[1]));
            assert_eq!(chosen(&world), (Some(values[1].clone()), variable), "{name}");
            world.flag(name, &plain(&values[0]));
            assert_eq!(chosen(&world), (Some(values[0].clone()), format!("--{name}")), "{name}");
        }
    }

    #[test]
    fn nothing_chosen_is_what_the_server_takes_by_default() {
        let settings = World::new().resolve().unwrap();
        assert_eq!(settings.config, Config::default());
        assert_eq!((settings.bind.to_string().as_str(), settings.port, settings.rsa), ("0.0.0.0", 5150, 3072));
        assert_eq!(settings.file, None);
    }

    #[test]
    fn what_is_shown_is_read_as_the_same() {
        for chosen in defaults() {
            let Some(value) = chosen.value else { continue };
            let mut world = World::new();
            world.flag(chosen.about.name, &plain(&value));
            let settings = world.resolve().unwrap();
            assert_eq!(origin(&settings, chosen.about.name), format!("--{}", chosen.about.name));
            assert!(
                settings
                    .chosen
                    .iter()
                    .any(|other| other.about.name == chosen.about.name && other.value == Some(value.clone()))
            );
        }
    }

    #[test]
    fn values_reach_the_server() {
        let world = World::new();
        world.file(
            "bind = \"::1\"\nport = 0x10\nheartbeat = \"2s\"\ntimeout = \"1m 1s\"\nmailbox-bytes = 65536\n\
             mailbox-total = \"1 GiB\"\nhandshake-rate = 7\nmessage-burst = 9\nkey-age = \"2h\"",
        );
        let settings = world.resolve().unwrap();
        assert_eq!((settings.port, settings.config.enrol), (16, Policy::Open));
        assert_eq!((settings.config.heartbeat, settings.config.timeout), (2, 61));
        assert_eq!((settings.config.mailbox.bytes, settings.config.mailbox.total), (65_536, 1 << 30));
        assert_eq!((settings.config.rates.handshakes.per_second, settings.config.rates.messages.burst), (7, 9));
        assert_eq!(settings.config.key_age, Duration::from_secs(7200));
    }

    #[test]
    fn the_file_is_the_named_one_else_that_of_the_data_directory() {
        let mut world = World::new();
        let beside = world.file("port = 1");
        let settings = world.resolve().unwrap();
        assert_eq!((settings.port, settings.file), (1, Some(beside)));
        let other = world.directory.path().join("other.toml");
        std::fs::write(&other, "port = 2\ndata = \"below\"").unwrap();
        world.variable(FILE_VARIABLE, other.to_str().unwrap());
        world.environment.remove("OSSICLE_DATA");
        let settings = world.resolve().unwrap();
        assert_eq!((settings.port, settings.data), (2, world.directory.path().join("below")));
        world.flags.file = Some(world.directory.path().join("none.toml"));
        assert!(world.mistakes()[0].contains("none.toml: there is no such file"), "{:?}", world.mistakes());
        let world = World::new();
        world.file("data = \"/elsewhere\"");
        assert!(world.mistakes()[0].contains("line 1: the key `data` cannot stand"), "{:?}", world.mistakes());
    }

    #[test]
    fn every_mistake_is_named_at_once_and_no_value_is_repeated() {
        let mut world = World::new();
        world.file(
            "prot = 5150\nport = \"secret\"\n\nheartbeat = 15\ntimeout = \"secret\"\nrsa = 1024\nenroll = [\"secret\"]\n\
             mailbox-owed = 1.5\nmailbox-bytes = \"1\"\nmessage-rate = -1\nmessage-burst = 99999999999999999999\n\
             [server]\nport = 1",
        );
        world.variable("OSSICLE_ADVERTISE", "ossicle://secret:1");
        world.flag("bind", "secret");
        let mistakes = world.mistakes();
        let expected = [
            "--bind: give an address",
            "OSSICLE_ADVERTISE: give a host name",
            "line 1: there is no key `prot`: did you mean `port`?",
            "line 2: port: is a text, and must be a number",
            "line 4: heartbeat: is a number, and must be a text in quotes",
            "line 5: timeout: give a duration with its unit",
            "line 6: rsa: give 2048, 3072 or 4096",
            "line 7: enroll: is a list",
            "line 8: mailbox-owed: is a number with a fraction",
            "line 9: mailbox-bytes: give a size with its unit, such as 64KiB or 16MiB, from 64KiB to 1TiB",
            "line 10: message-rate: give a number from 1 to 1000000000",
            "line 11: message-burst: give a number",
            "line 12: there is no key `server`",
        ];
        for sentence in expected {
            assert!(mistakes.iter().any(|mistake| mistake.contains(sentence)), "{sentence:?} in {mistakes:#?}");
        }
        assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
        assert!(!mistakes.iter().any(|mistake| mistake.contains("secret")), "{mistakes:#?}");
    }

    #[test]
    fn a_mistake_in_the_file_is_one_also_where_a_flag_wins() {
        let mut world = World::new();
        world.file("port = -1");
        world.flag("port", "1");
        world.variable("OSSICLE_RSA", "never read");
        world.flag("rsa", "2048");
        assert_eq!(world.mistakes().len(), 1);
    }

    #[test]
    fn files_that_are_none_are_refused_by_name() {
        let world = World::new();
        let path = world.directory.path().join(FILE);
        for (text, expected) in [
            (&b"port = 1\nport = 2"[..], "line 2: duplicate key"),
            (b"port 1", "line 1: "),
            (b"port = 1\n\xff", "line 2 is not UTF-8"),
            (b"\0\0", "line 1: "),
            (&[b'#'; 70_000], "more than 64KiB"),
            (&[b'['; 60_000], "line 1: "),
        ] {
            std::fs::write(&path, text).unwrap();
            let mistakes = world.mistakes();
            assert!(mistakes[0].contains(expected), "{expected:?} in {:?}", mistakes[0]);
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(world.mistakes()[0].contains("this is not a file"));
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name_and_place() {
        let mut world = World::new();
        let file = world.file("heartbeat = \"45s\"");
        world.flag("hello-within", "31s");
        world.variable("OSSICLE_MAILBOX_TOTAL", "1MiB");
        assert_eq!(
            world.mistakes(),
            [
                format!("timeout (45s; default) must be longer than heartbeat (45s; {}, line 1)", file.display()),
                "handshake-within (30s; default) must be no shorter than hello-within (31s; --hello-within)".into(),
                "mailbox-total (1MiB; OSSICLE_MAILBOX_TOTAL) must be no smaller than mailbox-bytes (16MiB; default)"
                    .into(),
            ]
        );
    }

    fn changes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_changes_while_the_server_runs_wins_over_every_layer_and_leaves_the_rest() {
        let mut world = World::new();
        let file = world.file("heartbeat = \"5s\"\nadvertise = \"chat.example.org\"");
        world.flag("bind", "127.0.0.1");
        world.variable("OSSICLE_TIMEOUT", "20s");
        let started = world.resolve().unwrap();
        let live: Vec<&str> = started
            .chosen
            .iter()
            .map(|chosen| chosen.about)
            .filter(|about| about.live)
            .map(|about| about.name)
            .collect();
        for (name, values) in others() {
            let changed = started.changed(&changes(&[(name, &plain(&values[0]))]));
            if !live.contains(&name) {
                let mistakes = changed.unwrap_err().0;
                assert!(
                    mistakes[0].starts_with(&format!("{name} cannot change while the server runs")),
                    "{mistakes:?}"
                );
                continue;
            }
            for (old, new) in started.chosen.iter().zip(&changed.unwrap().chosen) {
                assert_eq!(old.about.name, new.about.name);
                if new.about.name == name {
                    assert_eq!((new.value.as_ref(), &new.origin), (Some(&values[0]), &Origin::Operator));
                } else {
                    assert_eq!((&new.value, new.origin()), (&old.value, old.origin()), "{name} changes nothing else");
                }
            }
        }
        let settings = started.changed(&changes(&[("heartbeat", "7s"), ("timeout", "20s")])).unwrap();
        let settings = settings.changed(&changes(&[("message-rate", "7")])).unwrap();
        let config = &settings.config;
        assert_eq!((config.heartbeat, config.timeout, config.rates.messages.per_second), (7, 20, 7));
        assert_eq!(
            (settings.bind, settings.data.clone(), settings.file.clone()),
            (started.bind, started.data, Some(file))
        );
        assert_eq!(origin(&settings, "timeout"), "OSSICLE_TIMEOUT", "it was so before");
        assert_eq!(origin(&settings, "enroll"), "default: bound to loopback only");
    }

    #[test]
    fn what_cannot_be_changed_is_named_with_all_that_is_wrong() {
        let started = World::new().resolve().unwrap();
        let wrong = changes(&[
            ("hartbeat", "1s"),
            ("\u{1b}[31m", "1"),
            ("port", "1"),
            ("enroll", "secret"),
            ("timeout", "15s"),
        ]);
        assert_eq!(
            started.changed(&wrong).unwrap_err().0,
            [
                "there is no setting `\\u{1b}[31m`: see what there is with `ossicle settings`",
                "there is no setting `hartbeat`: did you mean `heartbeat`?",
                "port cannot change while the server runs: give it to the next start, as a flag, a variable or in the file \
                 of settings",
                "enroll: give open, token or closed",
                "timeout (15s; changed while running, until the server ends) must be longer than heartbeat (15s; default)",
            ]
        );
    }

    #[test]
    fn further_variables_mean_the_same_setting() {
        let mut world = World::new();
        world.variable("OSSICLE_HOST", "127.0.0.9");
        world.variable("OSSICLE_HEARTBEAT_INTERVAL", "3s");
        world.variable("OSSICLE_TIMEOUT_THRESHOLD", "9s");
        world.variable("OSSICLE_PORT", "");
        let settings = world.resolve().unwrap();
        assert_eq!((settings.bind.to_string().as_str(), settings.port), ("127.0.0.9", 5150));
        assert_eq!((settings.config.heartbeat, settings.config.timeout), (3, 9));
        assert_eq!(origin(&settings, "heartbeat"), "OSSICLE_HEARTBEAT_INTERVAL");
        world.variable("OSSICLE_HEARTBEAT", "4s");
        assert!(world.mistakes()[0].contains("OSSICLE_HEARTBEAT and OSSICLE_HEARTBEAT_INTERVAL"));
    }

    #[test]
    fn hosts_are_names_or_addresses_without_a_port() {
        for (text, expected) in
            [("chat.example.org", "chat.example.org"), ("[2001:db8::1]", "2001:db8::1"), ("::1", "::1")]
        {
            assert_eq!(host(text).as_deref(), Ok(expected));
        }
        for text in ["", "host:5150", "a b", "ossicle://a", "a\u{1b}"] {
            assert!(host(text).is_err(), "{text:?}");
        }
    }
}
