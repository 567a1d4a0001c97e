//! The story: what happens, in which order, and which promises it holds against what was seen.
//!
//! It is told in plain words, each step with the command that anyone could type. A promise is broken the moment that
//! something speaks against it; the story ends there and names it. Who embeds the story can interfere with it at the
//! moments that matter, which is how its tests know that it would notice.

use core::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Instant;

use super::image;
use super::process::{Process, moment};
use super::sensor::{Balance, Body, Mark, Sensor, word};
use crate::device::{Device, Led, say_in_clear};
use crate::endpoint::Failure;
use crate::ethernet::{DEVICES, FRAMES, HOST, Network, Tap};
use crate::search::Search;

/// What Bob writes to Alice.
const LETTER: &str = "the harbour lights are green tonight";
/// What is searched for afterwards, wherever a server or a wire could keep it: the letter, the commands, the readings.
const SECRETS: [&str; 4] = [LETTER, "led on", "led off", "C led="];
/// Goes over each wire unsealed, for the search to find.
const CONTROL: &str = "this line was sealed by nobody, so that the search can prove its eyes";
/// In findings: the traffic of Alice and Bob.
const PEOPLE: &str = "a person's connection";
/// Bits of the people's keys and the server's: enough for a story that ends in half a minute.
const BITS: &str = "2048";
/// The group of the two and a sensor, and what is asked there.
const GROUP: &str = "harbour";
const QUESTION: &str = "reading?";
/// Simulated sensors.
const SENSORS: usize = 3;
/// Readings after which an obeyed command has to show.
const OBEYS_WITHIN: u64 = 5;
/// Nothing that works takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a story is told: each line once, from any thread.
pub type Said = Arc<dyn Fn(&str) + Send + Sync>;

/// What the story holds against what was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Promise {
    /// Every reading that was sealed for the owner was opened by the owner.
    Opened,
    /// Each LED obeyed the owner.
    Obeys,
    /// No LED obeyed anybody else.
    Refuses,
    /// Everybody in a group read what everybody said there.
    Gathers,
    /// A killed server came back to channels that were resumed.
    Resumes,
    /// Nothing that was said lies in the server's files or passed on a wire.
    Sealed,
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opened => "every reading is opened by the owner",
            Self::Obeys => "an LED obeys its owner",
            Self::Refuses => "an LED obeys nobody else",
            Self::Gathers => "a group hears its people and its device",
            Self::Resumes => "a killed server comes back to resumed channels",
            Self::Sealed => "neither files nor traffic hold what was said",
        })
    }
}

impl Promise {
    fn broken(self, how: impl fmt::Display) -> Failure {
        Failure::refused(format!("broken promise «{self}»: {how}"))
    }
}

/// When somebody can interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Moment {
    /// Everybody reports, and the owner is about to switch the LEDs on.
    Reporting,
    /// The second person has tried the LEDs, and was refused.
    StrangerRefused,
    /// The server is dead, and not back yet.
    ServerKilled,
}

/// What can be interfered with.
#[non_exhaustive]
pub struct Scene<'s> {
    /// The server's data.
    pub data: &'s Path,
    /// Where people dial the server.
    pub people: SocketAddr,
    /// The LEDs of the simulated sensors.
    pub leds: Vec<&'s Led>,
}

/// Somebody who interferes with a story that is told. `()` does not.
pub trait Interference: Send {
    /// This moment has come.
    fn at(&mut self, moment: Moment, scene: &Scene<'_>) {
        let _ = (moment, scene);
    }

    /// Whether the story hears this line of the owner's `ossicle listen --json`.
    fn hears(&mut self, line: &str) -> bool {
        let _ = line;
        true
    }
}

impl Interference for () {}

/// A story that is still to be told.
pub struct Story {
    /// The binary that the commands are run with.
    pub binary: PathBuf,
    /// How long the sensors report before the server is killed.
    pub lasting: Duration,
    /// The image that runs in QEMU beside the simulated sensors, if one does.
    pub image: Option<PathBuf>,
    /// Set when it should end early.
    pub interrupted: Arc<AtomicBool>,
    /// Who interferes.
    pub interference: Box<dyn Interference>,
    said: Said,
}

impl Story {
    /// A story with simulated sensors only, in which nobody interferes.
    pub fn new(binary: PathBuf, said: Said) -> Self {
        let interrupted = Arc::default();
        Self { binary, lasting: Duration::from_secs(5), image: None, interrupted, interference: Box::new(()), said }
    }

    /// Tells it. Whatever it started or wrote is gone when it returns.
    ///
    /// # Errors
    /// Names the first promise that did not hold, or what kept the story from being told.
    pub fn tell(self) -> Result<(), Failure> {
        let folder = tempfile::Builder::new().prefix("ossicle-demo-").tempdir();
        let folder = folder.map_err(|error| cannot("make a directory for the demo", &error))?;
        let search = Search::new(&[&SECRETS[..], &[CONTROL]].concat()).map_err(|error| cannot("search", &error))?;
        let network = Network::start(Some(Arc::clone(&search)));
        let network = network.map_err(|error| cannot("make an Ethernet", &error))?;
        // The actors end before the network and the directory do.
        let stage = Stage { story: self, folder: folder.path(), network: &network, search: &search };
        stage.play()
    }

    pub(super) fn say(&self, line: &str) {
        (self.said)(line);
    }

    /// Runs a command to its end, in `folder`, and shows what it wrote.
    pub(super) fn finish(&self, command: &mut Command, folder: &Path) -> Result<ExitStatus, Failure> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        let (status, written) = Process::start(command, folder)?.finish(&self.interrupted).ok_or_else(interrupted)?;
        for line in written {
            self.say(&format!("    {line}"));
        }
        Ok(status)
    }
}

/// The processes and the directory end with the story.
pub(super) fn interrupted() -> Failure {
    Failure { code: 130, sentence: "interrupted: everything was cleared away".to_owned() }
}

fn cannot(what: &str, error: &std::io::Error) -> Failure {
    Failure::refused(format!("cannot {what}: {error}"))
}

/// Where the story plays.
struct Stage<'s> {
    story: Story,
    folder: &'s Path,
    network: &'s Network,
    search: &'s Arc<Search>,
}

/// Everybody, as long as the story goes on.
struct Cast {
    // In the order in which they end, if they must.
    sensors: Vec<Sensor>,
    alice: Process,
    bob: Process,
    tap: Tap,
    server: Process,
    port: u16,
    /// Who said what in the group, as Alice has opened it.
    said: Vec<(String, String)>,
}

impl Stage<'_> {
    fn play(mut self) -> Result<(), Failure> {
        self.story.say("A server starts. It will route what it cannot read.");
        let (server, url) = self.serve("0")?;
        let (port, fingerprint) = parts(&url).ok_or_else(|| Failure::refused(format!("this is no URL: {url}")))?;

        self.story.say("Alice and Bob make identities. Their keys never leave their homes.");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let tap = self.network.tap(address, PEOPLE).map_err(|error| cannot("listen to the people's wire", &error))?;
        self.story.say("  (They dial a port that passes everything on, and searches it for what they say.)");
        let url = format!("ossicle://{}#{fingerprint}", tap.address);
        for name in ["alice", "bob"] {
            self.run(&["init", "--home", name, "--name", name, "--rsa", BITS, &url])?;
        }
        self.story.say("Both listen.");
        let alice = self.start(&["listen", "--home", "alice", "--json"])?;
        let bob = self.start(&["listen", "--home", "bob", "--json"])?;
        let mut cast = Cast { server, port, tap, alice, bob, sensors: Vec::new(), said: Vec::new() };
        self.all_online(&mut cast)?;

        self.story.say("Bob writes to Alice. The receipt `opened` is hers, and no server can forge it.");
        self.run(&["send", "--home", "bob", "--wait", "opened", "alice", LETTER])?;
        self.letter(&cast)?;

        self.enrol(&mut cast)?;
        self.interfere(&cast, Moment::Reporting);
        self.command(&mut cast, true)?;
        self.stranger(&mut cast)?;
        let gathered = self.gather(&mut cast)?;
        let before = self.report(&mut cast, &gathered)?;
        let back = self.kill(&mut cast, &before)?;
        self.story.say("Alice switches the LEDs off again, over the resumed channels.");
        self.command(&mut cast, false)?;
        self.curtain(cast, back)
    }

    /// Starts the server, and returns it with its URL.
    fn serve(&self, port: &str) -> Result<(Process, String), Failure> {
        let server =
            self.start(&["serve", "--data", "server", "--bind", "127.0.0.1", "--port", port, "--rsa", BITS])?;
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(url) = server.line(moment(until)) {
                self.story.say(&format!("    {url}"));
                return Ok((server, url));
            }
            self.go_on()?;
            if Instant::now() >= until {
                let why = server.log().pop().unwrap_or_default();
                return Err(Failure::refused(format!("the server did not start: {why}")));
            }
        }
    }

    /// The letter arrives, signed.
    fn letter(&self, cast: &Cast) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            self.go_on()?;
            let Some(line) = cast.alice.line(moment(until)) else {
                continue;
            };
            if line.contains(LETTER) && line.contains("\"signed\":true") {
                self.story.say(&format!("    alice opens: {line}"));
                return Ok(());
            }
        }
        Err(Promise::Opened.broken("bob's letter did not come"))
    }

    /// Alice enrols the sensors, they start, and each is heard.
    fn enrol(&mut self, cast: &mut Cast) -> Result<(), Failure> {
        let names: Vec<String> = {
            let count = SENSORS + usize::from(self.story.image.is_some());
            (1..=count).map(|number| format!("sensor-{number:02}")).collect()
        };
        self.story.say("Alice enrols sensors: one page of flash makes a generic image this one device.");
        self.story.say(&format!("  ({HOST} is this machine, as it is seen from the sensors' Ethernet.)"));
        let dials = format!("{HOST}:{}", cast.port);
        let fleet = format!("sensor-{{01..{:02}}}", names.len());
        let enroll =
            ["enroll", "--home", "alice", &fleet, "--report-to", "alice", "--address", &dials, "--out", "pages"];
        self.run(&enroll)?;

        self.story.say("Both wires are tried with a line that nobody sealed, which the search has to find.");
        say_in_clear(self.network, SocketAddrV4::new(HOST, cast.port), CONTROL)
            .map_err(|error| Failure::refused(format!("the simulated Ethernet does not work: {error}")))?;
        say_to(cast.tap.address, CONTROL).map_err(|error| cannot("reach the server", &error))?;

        self.story.say("The sensors start: the firmware's own application and network stack, with 1 KiB buffers.");
        for (number, name) in names.iter().enumerate() {
            let page = self.folder.join("pages").join(format!("{name}.page"));
            let (account, observe) = Sensor::observed(name, &self.story.said);
            let body = match &self.story.image {
                Some(image) if number >= SENSORS => {
                    let uplink = self.network.uplink().map_err(|error| cannot("open the Ethernet to QEMU", &error))?;
                    let mut command = image::command(image, &page, uplink);
                    self.story.say(&format!("  $ {}", shown(&command, self.folder)));
                    Body::Qemu(Process::start(&mut command, self.folder)?)
                }
                _ => {
                    let page = std::fs::read(&page).map_err(|error| cannot("read an identity page", &error))?;
                    let device = Device::start(self.network, page, observe);
                    Body::Simulated(device.map_err(|error| Failure::refused(format!("{name} cannot start: {error}")))?)
                }
            };
            cast.sensors.push(account.open(body));
        }
        self.until(
            cast,
            |cast| Ok(cast.sensors.iter().all(|sensor| sensor.readings > 0)),
            |cast| {
                Promise::Opened.broken(format!("no reading of {} came", name_of(cast, |sensor| sensor.readings == 0)))
            },
        )?;
        self.readings(cast);
        Ok(())
    }

    /// Alice switches every LED, and each obeys.
    fn command(&mut self, cast: &mut Cast, on: bool) -> Result<(), Failure> {
        if on {
            self.story.say("Alice switches their LEDs on. Her messages are signed.");
        }
        let text = format!("led {}", word(on));
        for number in 0..cast.sensors.len() {
            let Some(sensor) = cast.sensors.get_mut(number) else {
                continue;
            };
            sensor.held = None;
            let name = sensor.name.clone();
            if !self.status(&["send", "--home", "alice", &name, &text])?.success() {
                return Err(Promise::Obeys.broken(format!("{name} did not take the message of its owner")));
            }
        }
        let obeyed = |sensor: &Sensor| sensor.shown() == Some(on) && sensor.led().is_none_or(|led| led.is_on() == on);
        let broken = |cast: &Cast, kind: &dyn Fn(&Sensor) -> bool| {
            let name = name_of(cast, kind);
            Promise::Obeys.broken(format!("the LED of {name} is not {}, and its owner has said so", word(on)))
        };
        // A sensor that took the command and says otherwise for so many readings will not obey it any more.
        let last: Vec<_> = cast.sensors.iter().map(|sensor| sensor.readings + OBEYS_WITHIN).collect();
        self.until(
            cast,
            |cast| {
                let mut judged = cast.sensors.iter().zip(&last);
                match judged.any(|(sensor, last)| sensor.readings >= *last && !obeyed(sensor)) {
                    true => Err(broken(cast, &|sensor| !obeyed(sensor))),
                    false => Ok(cast.sensors.iter().all(obeyed)),
                }
            },
            |cast| broken(cast, &|sensor| !obeyed(sensor)),
        )?;
        for sensor in &mut cast.sensors {
            sensor.held = Some(on);
        }
        self.readings(cast);
        Ok(())
    }

    /// Bob tries to switch them.
    fn stranger(&mut self, cast: &mut Cast) -> Result<(), Failure> {
        self.story.say("Bob tries to switch them off.");
        let names: Vec<_> = cast.sensors.iter().map(|sensor| (sensor.name.clone(), sensor.readings)).collect();
        for (name, _) in &names {
            if self.status(&["send", "--home", "bob", name, "led off"])?.success() {
                return Err(Promise::Refuses.broken(format!("{name} took a message of somebody who is not its owner")));
            }
        }
        self.interfere(cast, Moment::StrangerRefused);
        // Whatever he achieved shows in the readings that come now.
        let after: Vec<_> = names.iter().map(|(_, readings)| readings + 2).collect();
        self.until(
            cast,
            |cast| Ok(cast.sensors.iter().zip(&after).all(|(sensor, after)| sensor.readings >= *after)),
            |cast| Promise::Opened.broken(format!("{} fell silent", name_of_silent(cast, &after))),
        )?;
        self.story.say("  Every sensor refused him, and every LED is still on.");
        Ok(())
    }

    /// Alice founds a group with Bob and the last sensor, which accepts by its page and answers there. Returns where the
    /// account of the readings goes on: while she founded it she did not listen.
    fn gather(&mut self, cast: &mut Cast) -> Result<Vec<Mark>, Failure> {
        let Some(device) = cast.sensors.last().map(|sensor| sensor.name.clone()) else { return Ok(Vec::new()) };
        self.settle(cast, &vec![Mark::default(); cast.sensors.len()])?;
        self.story.say(&format!(
            "Alice founds a group with Bob and {device}, which accepts by itself: its page says that it may, if its owner asks."
        ));
        self.story.say("  (A home chats or listens. What the sensors report meanwhile waits.)");
        cast.alice.kill();
        cast.bob.kill();
        self.chat("alice", &format!("/init {GROUP} @bob @{device}"))?;
        self.chat("bob", &format!("/accept {GROUP}"))?;
        for name in ["alice", "bob"] {
            self.everybody_in(name)?;
        }
        cast.alice = self.start(&["listen", "--home", "alice", "--json"])?;
        cast.bob = self.start(&["listen", "--home", "bob", "--json"])?;
        self.all_online(cast)?;

        self.story.say("Bob asks in the group. He is not the sensor's owner; as a member he gets his answer.");
        let send = ["send", "--home", "bob", "--wait", "opened", GROUP, QUESTION];
        if !self.status(&send)?.success() {
            return Err(Promise::Gathers.broken("not everybody confirms to have opened what Bob has asked"));
        }
        let after: Vec<_> = cast.sensors.iter().map(|sensor| sensor.readings + 1).collect();
        let answer = |heard: &(String, String), from: &str| heard.0 == from && heard.1.contains("C led=");
        let mut at_bob = None;
        self.until(
            cast,
            |cast| {
                if let Some(line) = cast.bob.line(Duration::ZERO)
                    && let Some(heard) = said_in_group(&line)
                    && answer(&heard, &device)
                {
                    at_bob = Some(heard.1);
                }
                let at_alice = cast.said.iter().any(|heard| answer(heard, &device));
                let reported = cast.sensors.iter().zip(&after).all(|(sensor, after)| sensor.readings >= *after);
                Ok(at_alice && at_bob.is_some() && reported)
            },
            |_| Promise::Gathers.broken(format!("{device} was asked, and not both of the people read an answer")),
        )?;
        let text = at_bob.unwrap_or_default();
        self.story.say(&format!("    alice and bob open, in {GROUP}: {device} (signed): {text}"));
        Ok(cast.sensors.iter().map(Sensor::mark).collect())
    }

    /// Waits until a person knows that both others are in the group.
    fn everybody_in(&self, name: &str) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        let input = format!("/members {GROUP}\n");
        loop {
            self.go_on()?;
            let mut command = self.ossicle(&["chat", "--home", name]);
            let asked = Process::start_with(&mut command, self.folder, Some(&input))?;
            let lines = asked.finish(&self.story.interrupted).map(|(_, lines)| lines).unwrap_or_default();
            if lines.iter().any(|line| line.contains("2 of 2 others are in")) {
                return Ok(());
            }
            if Instant::now() >= until {
                let lines = lines.join("; ");
                return Err(Promise::Gathers.broken(format!("not everybody has joined, as {name} sees it: {lines}")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A line that somebody types into a chat.
    fn chat(&self, home: &str, line: &str) -> Result<(), Failure> {
        self.go_on()?;
        let mut command = self.ossicle(&["chat", "--home", home]);
        self.story.say(&format!("  $ echo '{line}' | {}", shown(&command, self.folder)));
        let process = Process::start_with(&mut command, self.folder, Some(&format!("{line}\n")))?;
        let (status, written) = process.finish(&self.story.interrupted).ok_or_else(interrupted)?;
        for line in written {
            self.story.say(&format!("    {line}"));
        }
        if status.success() { Ok(()) } else { Err(Failure::refused("the chat failed, as said above")) }
    }

    /// They report for a while; all that they sealed is opened.
    fn report(&mut self, cast: &mut Cast, from: &[Mark]) -> Result<Vec<Mark>, Failure> {
        self.story.say(&format!("They report for {}.", humantime::format_duration(self.story.lasting)));
        let begun = Instant::now();
        let mut next = begun;
        while begun.elapsed() < self.story.lasting {
            self.hear(cast, Instant::now() + PATIENCE)?;
            if Instant::now() >= next {
                next += Duration::from_secs(5);
                self.readings(cast);
            }
        }
        let marks = self.settle(cast, from)?;
        let readings: u64 = cast.sensors.iter().map(|sensor| sensor.readings).sum();
        self.story.say(&format!("  {readings} readings were sealed so far, and Alice has opened every one."));
        Ok(marks)
    }

    /// The server is killed, and comes back to everybody's channel. Returns where the account goes on.
    fn kill(&mut self, cast: &mut Cast, before: &[Mark]) -> Result<Vec<Mark>, Failure> {
        self.story.say("The server is killed, without a chance to say farewell.");
        self.story.say(&format!("  $ kill -9 {}", cast.server.id()));
        cast.tap.shut();
        cast.server.kill();
        self.search_files()?;
        self.interfere(cast, Moment::ServerKilled);
        self.story.say("It comes back with what its disk holds. Everybody comes back by themselves.");
        (cast.server, _) = self.serve(&cast.port.to_string())?;
        cast.tap.reopen(self.network).map_err(|error| cannot("listen to the people's wire again", &error))?;
        let heard: Vec<_> = cast.sensors.iter().map(|sensor| sensor.readings + 2).collect();
        self.until(
            cast,
            |cast| Ok(cast.sensors.iter().zip(&heard).all(|(sensor, heard)| sensor.readings >= *heard)),
            |cast| Promise::Resumes.broken(format!("{} did not come back", name_of_silent(cast, &heard))),
        )?;
        self.all_online(cast)?;

        for (sensor, before) in cast.sensors.iter().zip(before) {
            if sensor.connections(*before).contains(&false) {
                let how = format!("{} needed a full handshake: its channel was lost", sensor.name);
                return Err(Promise::Resumes.broken(how));
            }
        }
        let log = cast.server.log();
        let names = ["alice", "bob"].into_iter().chain(cast.sensors.iter().map(|sensor| sensor.name.as_str()));
        for name in names {
            let mut entered = log.iter().filter(|line| line.contains(&format!("name=\"{name}\"")) && is_entry(line));
            let resumed = |line: &String| line.contains("resumed=true");
            let Some(first) = entered.next() else {
                return Err(Promise::Resumes.broken(format!("the server says nothing of {name}")));
            };
            if !resumed(first) || !entered.all(resumed) {
                let how = format!("{name} needed a full handshake: the channel was lost");
                return Err(Promise::Resumes.broken(how));
            }
        }
        self.story.say("  All of them resumed their channels: nobody computed an RSA signature, nobody checked one.");
        Ok(cast.sensors.iter().map(Sensor::mark).collect())
    }

    /// The last readings, and the search.
    fn curtain(&mut self, mut cast: Cast, back: Vec<Mark>) -> Result<(), Failure> {
        self.settle(&mut cast, &back)?;
        for sensor in &mut cast.sensors {
            sensor.tell_to_stop();
        }
        cast.sensors.clear();
        cast.alice.kill();
        cast.bob.kill();
        self.story.say("And what do the server's files hold of all this, and the wires?");
        self.search_files()?;
        let found = self.search.found();
        if let Some(finding) = found.iter().find(|finding| finding.text != CONTROL) {
            return Err(Promise::Sealed.broken(format!("{} held «{}»", finding.place, finding.text)));
        }
        for place in [FRAMES, DEVICES, PEOPLE] {
            if !found.iter().any(|finding| finding.place == place) {
                return Err(Promise::Sealed.broken(format!("the search is blind: {place} held a line in clear")));
            }
        }
        self.story.say("  Names and keys; and nothing of what was said.");
        self.story.say("Everything held:");
        let all =
            [Promise::Opened, Promise::Obeys, Promise::Refuses, Promise::Gathers, Promise::Resumes, Promise::Sealed];
        for promise in all {
            self.story.say(&format!("  {promise}"));
        }
        Ok(())
    }

    /// Waits until all readings up to now were opened, and returns where that is.
    fn settle(&mut self, cast: &mut Cast, from: &[Mark]) -> Result<Vec<Mark>, Failure> {
        let to: Vec<_> = cast.sensors.iter().map(Sensor::mark).collect();
        let lost =
            |name: &str, n: u64| Promise::Opened.broken(format!("reading {n} of {name} was sealed, and never opened"));
        self.until(
            cast,
            |cast| {
                let mut even = true;
                for ((sensor, from), to) in cast.sensors.iter().zip(from).zip(&to) {
                    match sensor.balance(*from, *to) {
                        Balance::Even => {}
                        Balance::UnderWay => even = false,
                        Balance::Lost(n) => return Err(lost(&sensor.name, n)),
                    }
                }
                Ok(even)
            },
            |_| Promise::Opened.broken("the last readings were sealed, and never opened"),
        )?;
        Ok(to)
    }

    /// Hears what the owner opens until `done`; not for ever.
    fn until(
        &mut self,
        cast: &mut Cast,
        mut done: impl FnMut(&Cast) -> Result<bool, Failure>,
        late: impl Fn(&Cast) -> Failure,
    ) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        while !done(cast)? {
            if Instant::now() >= until {
                return Err(late(cast));
            }
            self.hear(cast, until)?;
        }
        Ok(())
    }

    /// One line of what the owner opens, or a moment of silence. Watches over the LEDs and the processes.
    fn hear(&mut self, cast: &mut Cast, until: Instant) -> Result<(), Failure> {
        self.go_on()?;
        for (name, process) in [("alice", &mut cast.alice), ("bob", &mut cast.bob), ("serve", &mut cast.server)] {
            if !process.is_running() {
                let why = process.log().pop().unwrap_or_default();
                return Err(Failure::refused(format!("the process of {name} ended: {why}")));
            }
        }
        for sensor in &mut cast.sensors {
            if let Body::Qemu(process) = &mut sensor.body
                && !process.is_running()
            {
                let why = process.log().pop().unwrap_or_default();
                return Err(Failure::refused(format!("QEMU with {} ended: {why}", sensor.name)));
            }
        }
        if let Some(line) = cast.alice.line(moment(until))
            && self.story.interference.hears(&line)
        {
            cast.said.extend(said_in_group(&line));
            let heard: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            let field = |name: &str| heard.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
            let in_group = !field("group").is_empty();
            if let Some(sensor) = cast.sensors.iter_mut().find(|sensor| sensor.name == field("from") && !in_group) {
                sensor.hear(field("id"), field("text"));
            }
        }
        for sensor in &cast.sensors {
            let Some(held) = sensor.held else { continue };
            if sensor.shown() == Some(!held) || sensor.led().is_some_and(|led| led.is_on() != held) {
                let how = format!("the LED of {} went {} without its owner's word", sensor.name, word(!held));
                return Err(Promise::Refuses.broken(how));
            }
        }
        Ok(())
    }

    /// Waits until everybody is online, as anyone could: by asking.
    fn all_online(&self, cast: &mut Cast) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        let everybody = 2 + cast.sensors.len();
        loop {
            self.go_on()?;
            let asked = Process::start(&mut self.ossicle(&["who", "--home", "alice", "--json"]), self.folder)?;
            let answered = asked.finish(&self.story.interrupted);
            let lines = answered.map(|(_, lines)| lines).unwrap_or_default();
            if lines.iter().filter(|line| line.contains("\"online\":true")).count() >= everybody {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Failure::refused(format!("not everybody came online: {}", lines.join("; "))));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The server's files hold names, and none of the secrets.
    fn search_files(&self) -> Result<(), Failure> {
        let data = self.folder.join("server");
        let secrets = Search::new(&SECRETS).and_then(|search| search.folder(&data).map(|()| search.found()));
        let secrets = secrets.map_err(|error| cannot("read the server's files", &error))?;
        if let Some(finding) = secrets.first() {
            return Err(Promise::Sealed.broken(format!("the server's file {} holds «{}»", finding.place, finding.text)));
        }
        let names = Search::new(&["alice"]).and_then(|search| search.folder(&data).map(|()| search.found()));
        if names.map_err(|error| cannot("read the server's files", &error))?.is_empty() {
            return Err(Promise::Sealed.broken("the search is blind: it does not find a name in the server's files"));
        }
        Ok(())
    }

    /// Shows the last reading of each.
    fn readings(&self, cast: &Cast) {
        let of = |sensor: &Sensor| format!("{} {}", sensor.name, sensor.last.as_deref().unwrap_or("is silent"));
        let all: Vec<_> = cast.sensors.iter().map(of).collect();
        self.story.say(&format!("    alice opens: {}", all.join(", ")));
    }

    fn interfere(&mut self, cast: &Cast, moment: Moment) {
        let leds = cast.sensors.iter().filter_map(Sensor::led).collect();
        let scene = Scene { data: &self.folder.join("server"), people: cast.tap.address, leds };
        self.story.interference.at(moment, &scene);
    }

    fn go_on(&self) -> Result<(), Failure> {
        if self.story.interrupted.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        Ok(())
    }

    fn ossicle(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.story.binary);
        command.args(arguments);
        command
    }

    /// A command that goes on while the story does.
    fn start(&self, arguments: &[&str]) -> Result<Process, Failure> {
        self.go_on()?;
        let mut command = self.ossicle(arguments);
        self.story.say(&format!("  $ {}", shown(&command, self.folder)));
        Process::start(&mut command, self.folder)
    }

    /// A command that ends by itself.
    fn status(&self, arguments: &[&str]) -> Result<ExitStatus, Failure> {
        let mut command = self.ossicle(arguments);
        self.story.say(&format!("  $ {}", shown(&command, self.folder)));
        self.story.finish(&mut command, self.folder)
    }

    /// One that has to succeed.
    fn run(&self, arguments: &[&str]) -> Result<(), Failure> {
        if self.status(arguments)?.success() {
            return Ok(());
        }
        Err(Failure::refused(format!("`ossicle {}` failed, as said above", arguments.first().unwrap_or(&""))))
    }
}

/// Who said what in the group, if this line of `listen --json` tells of it, signed.
fn said_in_group(line: &str) -> Option<(String, String)> {
    let heard: serde_json::Value = serde_json::from_str(line).ok()?;
    let field = |name: &str| heard.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
    let is_ours = field("group")? == GROUP && heard.get("signed")?.as_bool()?;
    if is_ours { Some((field("from")?, field("text")?)) } else { None }
}

/// The name of the first sensor of this kind.
fn name_of(cast: &Cast, kind: impl Fn(&Sensor) -> bool) -> &str {
    cast.sensors.iter().find(|sensor| kind(sensor)).map_or("a sensor", |sensor| sensor.name.as_str())
}

/// The name of the first sensor with fewer readings than these.
fn name_of_silent<'c>(cast: &'c Cast, readings: &[u64]) -> &'c str {
    let mut wanted = cast.sensors.iter().zip(readings);
    wanted
        .find(|(sensor, readings)| sensor.readings < **readings)
        .map_or("a sensor", |(sensor, _)| sensor.name.as_str())
}

/// Whether this line of the server's log says that somebody is in.
fn is_entry(line: &str) -> bool {
    line.contains(" connected ")
}

/// Port and fingerprint of a server's URL.
fn parts(url: &str) -> Option<(u16, &str)> {
    let (address, fingerprint) = url.split_once('#')?;
    Some((address.rsplit_once(':')?.1.parse().ok()?, fingerprint))
}

/// Says something to a server that it cannot understand.
fn say_to(address: SocketAddr, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.write_all(text.as_bytes())
}

/// A command as a person would type it in the story's directory.
fn shown(command: &Command, folder: &Path) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or_else(|| command.get_program());
    let mut words = vec![name.to_string_lossy().into_owned()];
    let folder = format!("{}/", folder.display());
    for word in command.get_args().map(OsStr::to_string_lossy) {
        let word = word.replace(&folder, "");
        let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c));
        words.push(if plain && !word.is_empty() { word } else { format!("'{}'", word.replace('\'', r"'\''")) });
    }
    words.join(" ")
}
