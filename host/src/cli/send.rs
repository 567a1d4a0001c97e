//! `ossicle send`: one message, or one per line of standard input, and what became of them.
//!
//! Several lines are under way at a time, in order. The first refusal ends it: what was given after that line may have
//! arrived. What did not come as far as it must when this ends stays in the home's outbox, and is settled by whichever
//! process holds the home next. Whoever asks another process and loses it sends nothing twice.

use core::time::Duration;
use std::collections::{HashSet, VecDeque};
use std::ffi::OsString;
use std::io::{self, BufRead, Read};
use std::os::unix::ffi::OsStringExt;

use clap::ValueEnum;
use ossicle_core::{Reason, Rung};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{HomeArg, away, harmless, json, print, refusal, say, too_late};
use crate::endpoint::{
    Access, Failure, Home, LetterId, MAX_TEXT_LEN, PUBLIC_LABEL, PUBLIC_NAME, Reply, Request, Requested, new_letter,
};
use crate::name::{Name, NameError};
use crate::store::home::groups::NUMBER_SIGN;

/// Lines under way at a time.
const WINDOW: usize = 32;

/// Send a message to one client, or to a group
///
/// Ends when the message has come as far as --wait says, or is refused. Each step goes to standard error as it comes, with
/// --json to standard output. A message that did not come so far in time is not lost: it stays in this home's outbox and
/// goes its way at the home's next connection.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle send bob 'good morning'
  ossicle send --wait opened --timeout 10m bob 'call me'
  make 2>&1 | ossicle send bob -                 one message per line
  ossicle send --wait stored bob 'read this'     bob may be offline: the server keeps it for him
  ossicle send sensor-01 'led on'                messages are signed: an actuator asks for that
  ossicle send plans 'at eight'                  a group of this home; each member confirms for himself
  ossicle send /all 'the lab is open'            everybody: signed, not end-to-end encrypted; done when it is stored
  ossicle send @plans hi                         the client of that name, where a group has it, too

A refusal ends it with exit code 1 and its reason, as in refused(queue-full); a timeout with 3: the message is in the
outbox then, and must not be sent again.")]
pub struct Send {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// To whom: a client, a group that this home is in, or /all
    #[arg(value_parser = recipient)]
    pub name: String,
    /// The message; `-` sends each line of standard input
    #[arg(allow_hyphen_values = true)]
    pub text: OsString,
    /// How far the message must come
    #[arg(long, value_name = "RUNG", default_value = "delivered")]
    pub wait: Wait,
    /// How long that may take, for each message
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// Say how far it came as one JSON object a line, on standard output
    #[arg(long)]
    pub json: bool,
    /// Do not sign: shorter, and deniable
    #[arg(long)]
    pub no_sign: bool,
}

/// How far a message must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// The server passed it on
    Accepted,
    /// The server has it on its disk until the recipient comes
    Stored,
    /// The recipient's client has it
    Delivered,
    /// The recipient has seen it
    Opened,
}

impl Wait {
    const fn rung(self) -> Rung {
        match self {
            Self::Accepted => Rung::Accepted,
            Self::Stored => Rung::Stored,
            Self::Delivered => Rung::Delivered,
            Self::Opened => Rung::Opened,
        }
    }
}

/// A client's name, with or without `@`, what a group is called here, or everybody.
pub(super) fn recipient(given: &str) -> Result<String, NameError> {
    if given == PUBLIC_NAME {
        return Ok(given.to_owned());
    }
    let is_number = |number: &str| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    // Of a group of a name that several have, with its number.
    let name = match given.rsplit_once(NUMBER_SIGN) {
        Some(("", number)) if is_number(number) => return Ok(given.to_owned()),
        Some((name, number)) if is_number(number) => name,
        _ => given.strip_prefix('@').unwrap_or(given),
    };
    Name::parse(name).map(|_| given.to_owned())
}

#[derive(Serialize)]
struct Step<'s> {
    to: &'s str,
    /// What everybody can read is marked.
    #[serde(skip_serializing_if = "Option::is_none")]
    public: Option<&'static str>,
    /// The member of the group that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    member: Option<&'s str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'s str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    rung: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

/// A message that was given and did not come as far as it must.
struct UnderWay {
    line: u64,
    body: Vec<u8>,
    requested: Requested,
    /// What was said before `requested` is listened to.
    said: VecDeque<Reply>,
    deadline: Instant,
    /// What the home's outbox calls it.
    letter: LetterId,
    /// Whether it is there.
    kept: bool,
    reached: Option<Rung>,
    /// Why it takes longer.
    trouble: Option<String>,
    /// Why its recipient does not confirm it.
    away: Option<String>,
    /// Why members of the group do not have it.
    refused: Vec<String>,
    /// What was said of members of the group: another process says it again.
    members: HashSet<(String, Rung)>,
    /// Whether anything was said of members.
    is_to_group: bool,
}

impl UnderWay {
    async fn next(&mut self) -> Reply {
        match self.said.pop_front() {
            Some(reply) => reply,
            None => self.requested.next().await,
        }
    }
}

impl Send {
    pub(super) async fn run(self) -> Result<(), Failure> {
        if self.is_public() && self.no_sign {
            return Err(Failure::usage("what is said to everybody is always signed: leave out --no-sign"));
        }
        let home = self.home.open()?;
        let mut access = Some(Access::open(&home, "send").await?);
        let (bodies, mut lines) = mpsc::channel(WINDOW);
        if self.text == "-" {
            // A thread of its own: a read of standard input cannot be called off.
            std::thread::spawn(move || read_lines(&bodies));
        } else {
            let text = self.text.clone().into_vec();
            let checked = if text.len() > MAX_TEXT_LEN { Err(too_large(text.len(), None)) } else { Ok(text) };
            let _ = bodies.send(checked).await;
            drop(bodies);
        }
        let done = match (&access, self.is_public()) {
            (Some(access), true) => self.say_all(access, &mut lines).await,
            _ => self.send_all(&home, &mut access, &mut lines).await,
        };
        if let Some(access) = access {
            access.close().await;
        }
        done
    }

    fn is_public(&self) -> bool {
        self.name == PUBLIC_NAME
    }

    /// Says each line to everybody, one behind the other: it is done when the server has it on its disk.
    async fn say_all(
        &self,
        access: &Access,
        lines: &mut mpsc::Receiver<Result<Vec<u8>, Failure>>,
    ) -> Result<(), Failure> {
        let mut number = 0;
        while let Some(body) = lines.recv().await {
            number += 1;
            let mut requested = access.request(Request::Say { body: body?, keep: false });
            let (deadline, mut trouble) = (Instant::now() + self.timeout, None);
            loop {
                let kept = "it stays in this home and goes at the next connection: do not send it again";
                let reply = tokio::select! {
                    reply = requested.next() => reply,
                    () = sleep_until(deadline) => {
                        let trouble: String = trouble.unwrap_or_else(|| "the server did not confirm it".to_owned());
                        return Err(too_late(self.timeout, Some(format!("{trouble}; {kept}"))));
                    }
                };
                match reply {
                    Reply::Trouble(what) => trouble = Some(what),
                    Reply::Done => break,
                    Reply::Refused { reason, detail } => {
                        self.show(number, None, None, Rung::Refused.as_str(), Some(reason.as_str()))?;
                        return Err(refusal(reason, "everybody", detail.as_deref()));
                    }
                    Reply::Failed(failure) => return Err(failure),
                    Reply::Gone { taken: false } => {
                        return Err(Failure::unreached("the process that held this home has ended: send it again"));
                    }
                    Reply::Gone { .. } => {
                        return Err(Failure::unreached(format!("the process that held this home has ended; {kept}")));
                    }
                    _ => {}
                }
            }
            self.show(number, None, None, Rung::Stored.as_str(), None)?;
        }
        Ok(())
    }

    async fn send_all(
        &self,
        home: &Home,
        access: &mut Option<Access>,
        lines: &mut mpsc::Receiver<Result<Vec<u8>, Failure>>,
    ) -> Result<(), Failure> {
        let mut under_way = VecDeque::<UnderWay>::new();
        // What ends the input, once everything before it has arrived.
        let mut end = None;
        let mut number = 0;
        // Whether it was said that the recipient is not there.
        let mut is_away = false;
        loop {
            let room = end.is_none() && under_way.len() < WINDOW;
            let Some(front) = under_way.front_mut() else {
                if let Some(end) = end {
                    return end;
                }
                match lines.recv().await {
                    Some(Ok(body)) => {
                        number += 1;
                        under_way.push_back(self.post(access.as_ref(), number, body)?);
                    }
                    Some(Err(failure)) => end = Some(Err(failure)),
                    None => end = Some(Ok(())),
                }
                continue;
            };
            let deadline = front.deadline;
            tokio::select! {
                line = lines.recv(), if room => match line {
                    Some(Ok(body)) => {
                        number += 1;
                        under_way.push_back(self.post(access.as_ref(), number, body)?);
                    }
                    Some(Err(failure)) => end = Some(Err(failure)),
                    None => end = Some(Ok(())),
                },
                reply = front.next() => match reply {
                    // Told again by another process.
                    Reply::Rung { rung, .. } if front.reached >= Some(rung) => {}
                    Reply::Rung { rung, id } => {
                        front.reached = Some(rung);
                        if rung > Rung::Stored {
                            front.away = None;
                            is_away = false;
                        }
                        self.show(front.line, None, id.as_deref(), rung.as_str(), None)?;
                    }
                    Reply::By { name, rung } if !front.members.insert((name.clone(), rung)) => {}
                    Reply::RefusedBy { name, .. } if !front.members.insert((name.clone(), Rung::Refused)) => {}
                    Reply::By { name, rung } => {
                        if rung > Rung::Stored {
                            front.away = None;
                        }
                        self.show(front.line, Some(&name), None, rung.as_str(), None)?;
                    }
                    Reply::RefusedBy { name, reason, detail } => {
                        self.show(front.line, Some(&name), None, Rung::Refused.as_str(), Some(reason.as_str()))?;
                        front.refused.push(format!("{name}: {}", refusal(reason, &name, detail.as_deref())));
                    }
                    Reply::AwayBy { name, last_seen, .. } => {
                        front.is_to_group = true;
                        let said = away(&name, last_seen);
                        if !core::mem::replace(&mut is_away, true) {
                            say(&harmless(&format!("{said}: the server keeps it until {name} comes")));
                        }
                        front.away = Some(said);
                    }
                    Reply::Kept => front.kept = true,
                    Reply::Away { last_seen } => {
                        let said = away(&self.name, last_seen);
                        // Once, however many lines wait for the same.
                        if !core::mem::replace(&mut is_away, true) {
                            say(&harmless(&format!("{said}: the server keeps it until {} comes", self.name)));
                        }
                        front.away = Some(said);
                    }
                    Reply::Trouble(what) => front.trouble = Some(what),
                    Reply::Done => {
                        if !front.refused.is_empty() {
                            let sentence = format!("not delivered to everybody in {}: {}", self.name, front.refused.join("; "));
                            return Err(Failure::refused(sentence));
                        }
                        under_way.pop_front();
                    }
                    Reply::Refused { reason, detail } => {
                        self.show(front.line, None, None, Rung::Refused.as_str(), Some(reason.as_str()))?;
                        if reason == Reason::Forbidden && detail.is_none() {
                            return Err(Failure::refused(format!(
                                "refused(forbidden): {} takes nothing from this client: a device listens to its owner only",
                                self.name
                            )));
                        }
                        return Err(refusal(reason, &self.name, detail.as_deref()));
                    }
                    Reply::Failed(failure) => return Err(failure),
                    gone @ Reply::Gone { .. } => {
                        front.said.push_front(gone);
                        drop(access.take());
                        let reopened = access.insert(Access::open(home, "send").await?);
                        for letter in &mut under_way {
                            self.go_on(reopened, letter).await;
                        }
                    }
                    _ => {}
                },
                () = sleep_until(deadline) => return Err(self.late(front)),
            }
        }
    }

    fn post(&self, access: Option<&Access>, line: u64, body: Vec<u8>) -> Result<UnderWay, Failure> {
        let letter = new_letter()?;
        Ok(UnderWay {
            line,
            requested: self.request(access, letter, body.clone()),
            body,
            said: VecDeque::new(),
            deadline: Instant::now() + self.timeout,
            letter,
            kept: false,
            reached: None,
            trouble: None,
            away: None,
            refused: Vec::new(),
            members: HashSet::new(),
            is_to_group: false,
        })
    }

    fn request(&self, access: Option<&Access>, letter: LetterId, body: Vec<u8>) -> Requested {
        let (to, signed, until) = (self.name.clone(), !self.no_sign, self.wait.rung());
        let request = Request::Send { letter, to, body, signed, until, keep: false };
        access.map_or_else(Requested::gone, |access| access.request(request))
    }

    /// The process that was asked has gone: the next one is asked the same, and knows whether it has been done.
    async fn go_on(&self, access: &Access, letter: &mut UnderWay) {
        let mut said = VecDeque::new();
        // A process that has gone says no more, so this ends.
        loop {
            match letter.next().await {
                Reply::Gone { .. } => break,
                reply => {
                    let is_final = reply.is_final();
                    said.push_back(reply);
                    if is_final {
                        letter.said = said;
                        return;
                    }
                }
            }
        }
        letter.said = said;
        letter.requested = self.request(Some(access), letter.letter, letter.body.clone());
    }

    /// It did not come so far in time, and is not lost.
    fn late(&self, letter: &UnderWay) -> Failure {
        let name = &self.name;
        let line = if self.text == "-" { format!("line {}: ", letter.line) } else { String::new() };
        let trouble = match (&letter.away, &letter.trouble) {
            (Some(away), _) => away.clone(),
            (None, Some(trouble)) => trouble.clone(),
            (None, None) => format!("{name} did not confirm it"),
        };
        let rest = match (letter.reached, letter.kept) {
            (Some(Rung::Delivered), _) => format!("; {name} has it"),
            (Some(Rung::Stored), _) if letter.is_to_group => {
                format!("; the server keeps it until everybody in {name} has come: do not send it again")
            }
            (Some(Rung::Stored), _) => format!("; the server keeps it until {name} comes: do not send it again"),
            (_, true) => {
                "; it stays in this home's outbox and goes at the next connection: do not send it again".to_owned()
            }
            (_, false) => String::new(),
        };
        too_late(self.timeout, Some(format!("{line}{trouble}{rest}")))
    }

    fn show(
        &self,
        line: u64,
        member: Option<&str>,
        id: Option<&str>,
        rung: &'static str,
        reason: Option<&'static str>,
    ) -> Result<(), Failure> {
        let line = (self.text == "-").then_some(line);
        if self.json {
            let step = Step {
                to: &self.name,
                public: self.is_public().then_some("not end-to-end encrypted"),
                member,
                id,
                line,
                rung,
                reason,
            };
            // Nobody may want to read it; the message goes its way all the same.
            print(&json(&step)?)?;
        } else if reason.is_none() {
            let line = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            let how = if rung == Rung::Opened.as_str() { "by" } else { "to" };
            let whose = member.map(|member| format!(" {how} {}", harmless(member))).unwrap_or_default();
            let label = if self.is_public() { format!("{PUBLIC_LABEL} ") } else { String::new() };
            say(&format!("{label}{line}{rung}{whose}"));
        }
        Ok(())
    }
}

fn read_lines(bodies: &mpsc::Sender<Result<Vec<u8>, Failure>>) {
    let mut input = io::stdin().lock();
    for number in 1_u64.. {
        let mut line = Vec::new();
        // Two bytes more than the longest: its end, and one that is too many.
        let limit = u64::try_from(MAX_TEXT_LEN).unwrap_or(u64::MAX).saturating_add(2);
        let read = (&mut input).take(limit).read_until(b'\n', &mut line);
        let body = match read {
            Ok(0) => return,
            Ok(_) => {
                if line.last() == Some(&b'\n') {
                    line.pop();
                }
                if line.len() > MAX_TEXT_LEN { Err(too_large(line.len(), Some(number))) } else { Ok(line) }
            }
            Err(error) => Err(Failure::refused(format!("cannot read standard input: {error}"))),
        };
        let last = body.is_err();
        if bodies.blocking_send(body).is_err() || last {
            return;
        }
    }
}

pub(super) fn too_large(len: usize, line: Option<u64>) -> Failure {
    let what = match line {
        Some(line) => format!("line {line} has more than {MAX_TEXT_LEN} bytes"),
        None => format!("the message has {len} bytes and can have {MAX_TEXT_LEN}"),
    };
    Failure::refused(format!("refused(too-large): {what}: send less, or in parts"))
}
