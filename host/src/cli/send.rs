//! `ossicle send`: one message, or one per line of standard input, and what became of them.
//!
//! Several lines are under way at a time, in order. The first refusal ends it: what was given after that line may have
//! arrived. Whoever asks another process and loses it sends nothing twice.

use core::time::Duration;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, Read};
use std::os::unix::ffi::OsStringExt;

use clap::ValueEnum;
use ossicle_core::{Reason, Rung};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{HomeArg, json, print, refusal, say, too_late};
use crate::endpoint::{Access, Failure, Home, MAX_TEXT_LEN, Reply, Request, Requested};
use crate::name::Name;

/// Lines under way at a time.
const WINDOW: usize = 32;

/// Send a message to one client
///
/// Ends when the message has come as far as --wait says, or is refused. Each step goes to standard error as it comes, with
/// --json to standard output.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle send bob 'good morning'
  ossicle send --wait opened --timeout 10m bob 'call me'
  make 2>&1 | ossicle send bob -                 one message per line
  ossicle send sensor-01 'led on'                messages are signed: an actuator asks for that

A refusal ends it with exit code 1 and its reason, as in refused(offline); a timeout with 3.")]
pub struct Send {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// To whom
    #[arg(value_parser = Name::parse)]
    pub name: Name,
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
    /// The recipient's client has it
    Delivered,
    /// The recipient has seen it
    Opened,
}

impl Wait {
    const fn rung(self) -> Rung {
        match self {
            Self::Accepted => Rung::Accepted,
            Self::Delivered => Rung::Delivered,
            Self::Opened => Rung::Opened,
        }
    }
}

#[derive(Serialize)]
struct Step<'s> {
    to: &'s str,
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
    deadline: Instant,
    trouble: Option<String>,
}

impl Send {
    pub(super) async fn run(self) -> Result<(), Failure> {
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
        let done = self.send_all(&home, &mut access, &mut lines).await;
        if let Some(access) = access {
            access.close().await;
        }
        done
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
        loop {
            let room = end.is_none() && under_way.len() < WINDOW;
            let Some(front) = under_way.front_mut() else {
                if let Some(end) = end {
                    return end;
                }
                match lines.recv().await {
                    Some(Ok(body)) => {
                        number += 1;
                        under_way.push_back(self.post(access.as_ref(), number, body, None));
                    }
                    Some(Err(failure)) => end = Some(Err(failure)),
                    None => end = Some(Ok(())),
                }
                continue;
            };
            tokio::select! {
                line = lines.recv(), if room => match line {
                    Some(Ok(body)) => {
                        number += 1;
                        under_way.push_back(self.post(access.as_ref(), number, body, None));
                    }
                    Some(Err(failure)) => end = Some(Err(failure)),
                    None => end = Some(Ok(())),
                },
                reply = front.requested.next() => match reply {
                    Reply::Rung { rung, id } => self.show(front.line, Some(&id), rung.as_str(), None)?,
                    Reply::Trouble(what) => front.trouble = Some(what),
                    Reply::Done => {
                        under_way.pop_front();
                    }
                    Reply::Refused { reason, detail } => {
                        self.show(front.line, None, Rung::Refused.as_str(), Some(reason.as_str()))?;
                        if reason == Reason::Forbidden && detail.is_none() {
                            return Err(Failure::refused(format!(
                                "refused(forbidden): {} takes nothing from this client: a device listens to its owner only",
                                self.name
                            )));
                        }
                        return Err(refusal(reason, self.name.as_str(), detail.as_deref()));
                    }
                    Reply::Failed(failure) => return Err(failure),
                    Reply::Gone { taken: true } => {
                        return Err(Failure::refused(
                            "the process that holds this home ended before the message was confirmed: it may have \
                             arrived or not, ask before you send it again",
                        ));
                    }
                    Reply::Gone { taken: false } => {
                        // Those behind were given later to the same process, which had not begun with them either.
                        drop(access.take());
                        *access = Some(Access::open(home, "send").await?);
                        for letter in &mut under_way {
                            let body = core::mem::take(&mut letter.body);
                            *letter = self.post(access.as_ref(), letter.line, body, Some(letter.deadline));
                        }
                    }
                    _ => {}
                },
                () = sleep_until(front.deadline) => {
                    return Err(too_late(self.timeout, front.trouble.take().or_else(|| {
                        Some(format!("{} did not confirm it", self.name))
                    })));
                }
            }
        }
    }

    fn post(&self, access: Option<&Access>, line: u64, body: Vec<u8>, deadline: Option<Instant>) -> UnderWay {
        let request = Request::Send {
            to: self.name.as_str().to_owned(),
            body: body.clone(),
            signed: !self.no_sign,
            until: self.wait.rung(),
        };
        let requested = access.map_or_else(Requested::gone, |access| access.request(request));
        let deadline = deadline.unwrap_or_else(|| Instant::now() + self.timeout);
        UnderWay { line, body, requested, deadline, trouble: None }
    }

    fn show(
        &self,
        line: u64,
        id: Option<&str>,
        rung: &'static str,
        reason: Option<&'static str>,
    ) -> Result<(), Failure> {
        let line = (self.text == "-").then_some(line);
        if self.json {
            let step = Step { to: self.name.as_str(), id, line, rung, reason };
            // Nobody may want to read it; the message goes its way all the same.
            print(&json(&step)?)?;
        } else if reason.is_none() {
            match line {
                Some(line) => say(&format!("line {line}: {rung}")),
                None => say(rung),
            }
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
