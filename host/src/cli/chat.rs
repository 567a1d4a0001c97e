//! `ossicle chat`: messages as they come, and what a person types, line by line.
//!
//! ```text
//!   console: a line editor, or standard input    Access: the home's agent
//!        | Input                                     | Notice, Reply
//!        +------------------> Talk <-----------------+
//!                               | lines, each with its tone
//!                               v
//!                            console
//! ```
//!
//! In a terminal everything goes on at once: a line can be typed while others are under way. A script's lines are taken
//! one by one, a question's answer before the next line, and the end of the input waits for what was sent. As with
//! `listen`, a message counts as opened when it was shown.

mod command;
mod console;

use core::future::{Future as _, poll_fn};
use core::pin::pin;
use core::task::Poll;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::sync::PoisonError;

use ossicle_core::{Reason, Rung};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot::{self, error::RecvError};
use tokio::time::{Instant, sleep_until};

use self::command::{Command, help};
use self::console::{Console, Input, Tone};
use super::{
    HomeArg, PATIENCE, away, group_news, harmless, key_changed_but, key_followed_but, listen, log, refusal, rfc3339,
    settled, too_late, verify, who,
};
use crate::endpoint::{
    Access, Failure, GroupNews, GroupView, HistoryEntry, Notice, PUBLIC_LABEL, PUBLIC_NAME, Presence, PublicPost,
    Reply, Request, Requested, Status, new_letter,
};
use crate::name::{Name, Pattern};
use crate::store::home::Waiting;

/// Messages that are read from the home at once.
const PAGE: u32 = 16;
/// Letters of a script that are under way at a time.
const WINDOW: usize = 32;
/// How long a person who leaves waits for what was sent.
const FAREWELL: Duration = Duration::from_secs(10);
/// Entries that are shown of a history.
const SHOWN_HISTORY: u32 = 100;
/// Names are asked for again after this time.
const NAMES_AGE: Duration = Duration::from_secs(5);
/// What members of a group say within this time is shown in one line.
const TOGETHER: Duration = Duration::from_millis(300);
/// Characters that are shown of a text to tell it from others.
const SHOWN: usize = 48;

/// Talk: show messages as they come, and send what is typed
///
/// This client is online while `chat` runs. Type /help for what can be typed. What is sent to somebody who is not there
/// waits at the server, what does not reach the server in this home's outbox; what became of either is shown. Where standard
/// input is no terminal, its lines are commands all the same: what was refused goes to standard error, and the exit code is
/// the first failure's.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle chat
  printf '/msg bob hi\\n/list\\n' | ossicle chat
  printf '/init plans @bob @carol\\n' | ossicle chat

What is said is kept in the home for /history, encrypted under a key that only the identity key opens; with --no-history a message
is kept only until it is delivered. Other lines that are typed are never kept on disk. Colours appear only in a terminal, and not if NO_COLOR is set.")]
pub struct Chat {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Keep nothing of what is said, and show nothing of what was kept
    #[arg(long)]
    pub no_history: bool,
}

/// Why a talk ends.
enum Ended {
    /// With this exit code, and nothing to say.
    With(u8),
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Chat {
    /// Returns the exit code.
    pub(super) async fn run(self) -> Result<u8, Failure> {
        let home = self.home.open()?;
        let mut console = Console::open();
        let screen = console.screen.clone();
        if console.is_terminal() {
            log(move || screen.writer());
        } else {
            log(std::io::stderr);
        }
        let mut access = Access::open_reader(&home, "chat").await?;
        let mut talk = Talk {
            console: &mut console,
            access: &mut access,
            keeps: !self.no_history,
            open: BTreeMap::new(),
            last: 0,
            partner: None,
            unread: BTreeMap::new(),
            is_connected: None,
            names_asked: None,
            page: VecDeque::new(),
            posts: VecDeque::new(),
            showing: None,
            shown: 0,
            more: true,
            leaving: None,
            code: 0,
        };
        let ended = tokio::select! {
            ended = talk.run() => ended,
            // The terminal has vanished, or somebody wants this to end: in order, and without a word to anybody.
            () = ended_by_signal() => Ended::With(130),
        };
        drop(talk);
        access.close().await;
        match ended {
            Ended::With(code) => Ok(code),
            Ended::Failed(failure) => Err(failure),
        }
    }
}

async fn ended_by_signal() {
    let (Ok(mut hangup), Ok(mut terminate)) = (signal(SignalKind::hangup()), signal(SignalKind::terminate())) else {
        return core::future::pending().await;
    };
    tokio::select! {
        _ = hangup.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// What was asked of the agent.
struct Open {
    what: Asked,
    deadline: Option<Instant>,
    trouble: Option<String>,
    /// `None` once there is no more to come.
    requested: Option<Requested>,
}

/// What a person reads.
enum Shown {
    Message(Waiting),
    Post(PublicPost),
}

/// What is being shown.
type Showing = (Shown, oneshot::Receiver<std::io::Result<()>>);

/// What became of the message that is being shown, if there is one.
async fn shown(showing: &mut Option<Showing>) -> Result<std::io::Result<()>, RecvError> {
    match showing {
        Some((_, done)) => done.await,
        None => core::future::pending().await,
    }
}

/// The next answer to the first that has one.
async fn next_reply(open: &mut BTreeMap<u64, Open>) -> (u64, Reply) {
    poll_fn(|context| {
        for (number, open) in open.iter_mut() {
            let Some(requested) = &mut open.requested else {
                continue;
            };
            if let Poll::Ready(reply) = pin!(requested.next()).poll(context) {
                return Poll::Ready((*number, reply));
            }
        }
        Poll::Pending
    })
    .await
}

enum Asked {
    /// To be given what is said to everybody.
    Follow,
    /// Something that is said to everybody, and its beginning.
    All(String),
    /// A connection, or why there is none, to say how it stands.
    Connection,
    /// A message to somebody or to a group, and its beginning.
    Letter {
        to: String,
        text: String,
        /// Whether nobody needs to wait for more.
        is_there: bool,
        /// Those of the group who have it and of whom that was not shown yet.
        fresh: Vec<String>,
        /// When it is.
        show_at: Option<Instant>,
        /// Those of the group who have opened it; `None` until anything was said of a member.
        opened: Option<Vec<String>>,
    },
    /// To answer an invitation, found or close a group; what that is for a person, and what he is told when it is done.
    Group {
        what: String,
        done: String,
    },
    /// All groups, or this one.
    Groups(Option<String>),
    History {
        with: String,
        erase: bool,
    },
    /// Who is online.
    List,
    /// Names, to complete them.
    Names,
    Status(About),
    Verify {
        name: Name,
        accept: bool,
    },
    Who(Option<Pattern>),
}

/// What is wanted of a status.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    All,
    Greeting,
    Oneself,
}

struct Talk<'c> {
    console: &'c mut Console,
    access: &'c mut Access,
    /// Whether what is said is kept.
    keeps: bool,
    /// In the order in which they were asked.
    open: BTreeMap<u64, Open>,
    last: u64,
    /// To whom lines without a slash go.
    partner: Option<String>,
    /// Messages in conversations since this person last had to do with them.
    unread: BTreeMap<String, u64>,
    /// Unknown until the first connection, or the first trouble.
    is_connected: Option<bool>,
    names_asked: Option<Instant>,
    /// Messages to be shown, and the one that is.
    page: VecDeque<Waiting>,
    /// What was said to everybody and is to be shown.
    posts: VecDeque<PublicPost>,
    showing: Option<Showing>,
    /// The row of the last message that was shown.
    shown: i64,
    /// Whether there may be messages behind it.
    more: bool,
    /// Until when what was sent is waited for.
    leaving: Option<Instant>,
    code: u8,
}

impl Talk<'_> {
    async fn run(&mut self) -> Ended {
        match self.talk().await {
            Err(ended) => ended,
            Ok(never) => match never {},
        }
    }

    async fn talk(&mut self) -> Result<core::convert::Infallible, Ended> {
        let is_terminal = self.console.is_terminal();
        // What waited is there before the first line is typed.
        while self.more {
            self.message().await?;
            if let Some((_, done)) = &mut self.showing {
                let done = done.await;
                self.seen(done).await?;
            }
        }
        self.ask(Request::Follow, Asked::Follow);
        if is_terminal {
            self.ask(Request::Status, Asked::Status(About::Greeting));
            self.ask(Request::Who, Asked::Names);
        }
        self.prompt();
        loop {
            let is_done = self
                .open
                .values()
                .all(|open| matches!(open.what, Asked::Follow | Asked::Names | Asked::Letter { is_there: true, .. }));
            if self.leaving.is_some_and(|until| is_done || until <= Instant::now()) {
                return Err(Ended::With(self.code));
            }
            let is_letter = |open: &&Open| matches!(open.what, Asked::Letter { .. } | Asked::All(_) | Asked::Follow);
            let letters = self.open.values().filter(is_letter).count();
            let takes =
                self.leaving.is_none() && (is_terminal || (letters == self.open.len() && self.unconfirmed() < WINDOW));
            let shows = self.open.values().filter_map(|open| match &open.what {
                Asked::Letter { show_at, .. } => *show_at,
                _ => None,
            });
            let deadline = self.open.values().filter_map(|open| open.deadline).chain(shows).chain(self.leaving).min();
            tokio::select! {
                input = self.console.input(), if takes => self.typed(input).await?,
                (number, reply) = next_reply(&mut self.open) => self.answered(number, reply).await?,
                notice = self.access.notice() => self.notice(notice).await?,
                () = core::future::ready(()), if self.more && self.showing.is_none() => self.message().await?,
                () = core::future::ready(()), if !self.posts.is_empty() && !self.more && self.showing.is_none() => self.post(),
                done = shown(&mut self.showing) => self.seen(done).await?,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.late().await?,
            }
        }
    }

    async fn show(&self, tone: Tone, text: &str) -> Result<(), Ended> {
        let screen = &self.console.screen;
        // At the end nobody types any more, and what is said last must be seen.
        let shown = match self.leaving {
            Some(_) => screen.end(screen.begin(tone, text).await)?,
            None => screen.show(tone, text).await?,
        };
        // Nobody who reads: the end of a pipe, as others end with it.
        if shown { Ok(()) } else { Err(Ended::With(self.code)) }
    }

    /// Says what went wrong, and remembers it for the exit code of a script.
    async fn fail(&mut self, code: u8, text: &str) -> Result<(), Ended> {
        if self.code == 0 && !self.console.is_terminal() {
            self.code = code;
        }
        self.show(Tone::Bad, text).await
    }

    fn prompt(&mut self) {
        let prompt = self.partner.as_ref().map_or_else(|| "> ".to_owned(), |name| format!("{name}> "));
        self.console.prompt(&prompt);
    }

    fn ask(&mut self, request: Request, what: Asked) {
        let requested = Some(self.access.request(request));
        self.last += 1;
        let deadline = (!matches!(what, Asked::Names)).then(|| Instant::now() + PATIENCE);
        self.open.insert(self.last, Open { what, deadline, trouble: None, requested });
    }

    /// Begins to show the next message, if there is one.
    async fn message(&mut self) -> Result<(), Ended> {
        if self.page.is_empty() {
            self.page = self.access.waiting(self.shown, PAGE).await?.into();
        }
        match self.page.pop_front() {
            Some(message) => {
                self.shown = message.row;
                let done = self.console.screen.begin(Tone::Plain, &listen::plain(&message));
                self.showing = Some((Shown::Message(message), done));
            }
            None => self.more = false,
        }
        Ok(())
    }

    /// Begins to show what somebody has said to everybody.
    fn post(&mut self) {
        if let Some(post) = self.posts.pop_front() {
            let done = self.console.screen.begin(Tone::Plain, &listen::plain_post(&post));
            self.showing = Some((Shown::Post(post), done));
        }
    }

    /// A message was shown, or nobody is there to see it.
    async fn seen(&mut self, done: Result<std::io::Result<()>, RecvError>) -> Result<(), Ended> {
        let message = self.showing.take();
        if !self.console.screen.end(done)? {
            return Err(Ended::With(self.code));
        }
        match message {
            Some((Shown::Message(message), _)) => {
                let conversation = message.group.as_ref().unwrap_or(&message.from);
                if self.partner.as_ref().is_none_or(|partner| !is_same(partner, conversation)) {
                    *self.unread.entry(conversation.clone()).or_default() += 1;
                }
                self.access.read(&message, self.keeps).await?;
            }
            Some((Shown::Post(post), _)) => self.access.read_post(post, self.keeps).await?,
            None => {}
        }
        Ok(())
    }

    async fn typed(&mut self, input: Input) -> Result<(), Ended> {
        match input {
            Input::Line(line) => match Command::parse(&line) {
                Ok(command) => self.obey(command).await?,
                Err(failure) => self.fail(failure.code, &failure.sentence).await?,
            },
            Input::Refused(why) => self.fail(1, &why).await?,
            Input::End => self.leave().await?,
            Input::Interrupt => return Err(Ended::With(130)),
            Input::Names => {
                if self.names_asked.is_none_or(|asked| asked.elapsed() > NAMES_AGE) {
                    self.names_asked = Some(Instant::now());
                    self.ask(Request::Who, Asked::Names);
                }
                return Ok(());
            }
        }
        if self.leaving.is_none() {
            self.prompt();
        }
        Ok(())
    }

    async fn obey(&mut self, command: Command) -> Result<(), Ended> {
        match command {
            Command::Nothing => {}
            Command::All(text) => {
                if self.is_connected == Some(false) {
                    self.show(Tone::Plain, "  … there is no connection: it goes as soon as there is one").await?;
                }
                let request = Request::Say { body: text.clone().into_bytes(), keep: self.keeps };
                self.ask(request, Asked::All(beginning(&text)));
            }
            Command::Help => self.show(Tone::Plain, &help()).await?,
            Command::Quit => self.leave().await?,
            Command::Answer(group, accept) => {
                let done = if accept { format!("you are in {group}") } else { format!("you stay away from {group}") };
                self.decide(group.clone(), done, Request::Answer { group, accept });
            }
            Command::Close(group) => {
                let done = format!("{group} is closed");
                self.decide(group.clone(), done, Request::CloseGroup { group });
            }
            Command::Init(name, members) => {
                let what = name.clone();
                let request = Request::Found { name, members, creator_closes: false };
                self.decide(what, String::new(), request);
            }
            Command::History(..) if !self.keeps => {
                self.fail(2, "this chat keeps no history: leave out --no-history").await?;
            }
            Command::History(with, erase) => match with.or_else(|| self.partner.clone()) {
                Some(with) => {
                    let limit = SHOWN_HISTORY;
                    self.ask(Request::History { with: with.clone(), limit, erase }, Asked::History { with, erase });
                }
                None => self.fail(2, "with whom? /history NAME").await?,
            },
            Command::Members(group) => self.ask(Request::Groups, Asked::Groups(group)),
            Command::List => self.ask(Request::Who, Asked::List),
            Command::Who(pattern) => self.ask(Request::Who, Asked::Who(pattern)),
            Command::Status => self.ask(Request::Status, Asked::Status(About::All)),
            Command::Verify(None, _) => self.ask(Request::Status, Asked::Status(About::Oneself)),
            Command::Verify(Some(name), accept) => {
                let request = Request::Verify { name: name.as_str().to_owned(), accept };
                self.ask(request, Asked::Verify { name, accept });
            }
            Command::Tell(name, text) => {
                self.unread.retain(|conversation, _| !is_same(&name, conversation));
                self.partner = Some(name.clone());
                match text {
                    Some(text) => self.tell(name, text).await?,
                    None => self.show(Tone::Plain, &format!("what you type goes to {name} now")).await?,
                }
            }
            Command::Text(text) => match self.partner.clone() {
                Some(name) => self.tell(name, text).await?,
                None => self.fail(2, "to whom? /msg NAME TEXT; after that a line without a slash goes there").await?,
            },
        }
        Ok(())
    }

    fn decide(&mut self, what: String, done: String, request: Request) {
        self.ask(request, Asked::Group { what, done });
    }

    async fn tell(&mut self, to: String, text: String) -> Result<(), Ended> {
        if self.is_connected == Some(false) {
            self.show(Tone::Plain, "  … there is no connection: it goes as soon as there is one").await?;
        }
        // Who reads sees also when it was read; a script ends before that.
        let until = if self.console.is_terminal() { Rung::Opened } else { Rung::Delivered };
        let body = text.clone().into_bytes();
        let (letter, name, keep) = (new_letter()?, to.clone(), self.keeps);
        let request = Request::Send { letter, to: name, body, signed: true, until, keep };
        let to = to.strip_prefix('@').unwrap_or(&to).to_owned();
        self.ask(
            request,
            Asked::Letter {
                to,
                text: beginning(&text),
                is_there: false,
                fresh: Vec::new(),
                show_at: None,
                opened: None,
            },
        );
        Ok(())
    }

    /// Messages that are neither delivered nor at the server for somebody who is not there.
    fn unconfirmed(&self) -> usize {
        let waits = |open: &&Open| matches!(open.what, Asked::Letter { is_there: false, .. } | Asked::All(_));
        self.open.values().filter(waits).count()
    }

    async fn leave(&mut self) -> Result<(), Ended> {
        let letters = self.unconfirmed();
        self.console.finish();
        if self.console.is_terminal() {
            // What is not shown yet waits for the next time.
            self.more = false;
            self.leaving = Some(Instant::now() + FAREWELL);
            if letters > 0 {
                let what = if letters == 1 { "a message".to_owned() } else { format!("{letters} messages") };
                self.show(Tone::Plain, &format!("{what} not confirmed yet: waiting, Ctrl-C leaves at once")).await?;
            }
        } else {
            // Each letter has its own deadline, and says so when it passes.
            self.leaving = Some(Instant::now() + PATIENCE * 2);
        }
        Ok(())
    }

    /// Shows which members of a group have a message by now; `all` also if more may come in a moment.
    async fn show_fresh(&mut self, number: u64, all: bool) -> Result<(), Ended> {
        let Some(Open { what: Asked::Letter { to, text, fresh, show_at, .. }, .. }) = self.open.get_mut(&number) else {
            return Ok(());
        };
        if fresh.is_empty() || !(all || show_at.is_some_and(|at| at <= Instant::now())) {
            return Ok(());
        }
        *show_at = None;
        let who = core::mem::take(fresh).join(", ");
        let said = format!("  ✓ delivered to {who} in {to}: {text}");
        self.show(Tone::Good, &said).await
    }

    async fn late(&mut self) -> Result<(), Ended> {
        for number in self.open.keys().copied().collect::<Vec<_>>() {
            self.show_fresh(number, false).await?;
        }
        let now = Instant::now();
        let late: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, open)| open.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(number, _)| *number)
            .collect();
        for number in late {
            let Some(mut open) = self.open.remove(&number) else {
                continue;
            };
            match &open.what {
                Asked::Letter { to, text, opened, .. } => {
                    let trouble = open.trouble.take().unwrap_or_else(|| match opened {
                        Some(_) => format!("not everybody in {to} has confirmed it"),
                        None => format!("{to} does not answer"),
                    });
                    if self.console.is_terminal() {
                        let said = format!("  … not delivered to {to} yet: {text} ({trouble}; it is tried further)");
                        open.deadline = None;
                        self.open.insert(number, open);
                        self.show(Tone::Bad, &said).await?;
                    } else {
                        let rest = match opened {
                            Some(_) => "do not send it again",
                            None => "it stays in this home's outbox and goes at the next connection",
                        };
                        let trouble = format!("{trouble}; {rest}");
                        let said = format!("  ✗ not confirmed by {to}: {text}: {}", too_late(PATIENCE, Some(trouble)));
                        self.fail(3, &said).await?;
                    }
                }
                Asked::All(text) => {
                    let trouble = open.trouble.take().unwrap_or_else(|| "the server does not answer".to_owned());
                    let said = format!("not said to everybody yet: {text} ({trouble}; it is tried further)");
                    if self.console.is_terminal() {
                        open.deadline = None;
                        self.open.insert(number, open);
                        self.show(Tone::Bad, &format!("  … {said}")).await?;
                    } else {
                        self.fail(3, &format!("  ✗ {said}")).await?;
                    }
                }
                _ => {
                    self.fail(3, &too_late(PATIENCE, open.trouble.take()).sentence).await?;
                }
            }
        }
        Ok(())
    }

    async fn notice(&mut self, notice: Notice) -> Result<(), Ended> {
        match notice {
            Notice::Inbox => self.more = self.leaving.is_none() || !self.console.is_terminal(),
            Notice::Ended(failure) => return Err(Ended::Failed(failure)),
            Notice::KeyChanged { name } => {
                let remedy = format!(
                    "ask {name} by another way what happened, compare the safety number of /verify {name}, and if it is \
                     right type /verify {name} accept"
                );
                self.show(Tone::Alarm, &key_changed_but(&name, &remedy)).await?;
            }
            Notice::Settled(news) => {
                let (tone, mark) = if news.outcome.is_ok() { (Tone::Good, '✓') } else { (Tone::Bad, '✗') };
                self.show(tone, &format!("  {mark} {}", settled(&news))).await?;
            }
            Notice::Group { label, news } => {
                let tone = if matches!(news, GroupNews::Doubtful(_)) { Tone::Alarm } else { Tone::Plain };
                let answer = |word: &str| format!("/{word} {label}");
                self.show(tone, &group_news(&label, &news, answer)).await?;
            }
            Notice::Public(post) => self.posts.push_back(post),
            Notice::PublicDropped { posts } => {
                self.show(Tone::Bad, &listen::not_shown(posts)).await?;
            }
            Notice::KeyFollowed { name } => {
                self.show(Tone::Bad, &key_followed_but(&name, &format!("/verify {name}"))).await?;
            }
            Notice::Connected => {
                if self.is_connected == Some(false) && self.console.is_terminal() {
                    self.show(Tone::Good, "connected again").await?;
                }
                self.is_connected = Some(true);
                self.tell_status();
            }
            Notice::Disconnected(trouble) => {
                if self.is_connected != Some(false) && self.console.is_terminal() {
                    self.show(Tone::Bad, &format!("no connection: {trouble}; trying again")).await?;
                }
                self.is_connected = Some(false);
                self.tell_status();
            }
        }
        Ok(())
    }

    /// Answers who wanted to know how it stands before that was known.
    fn tell_status(&mut self) {
        let wanted = self.open.extract_if(.., |_, open| matches!(open.what, Asked::Connection)).count();
        for _ in 0..wanted {
            self.ask(Request::Status, Asked::Status(About::All));
        }
    }

    async fn answered(&mut self, number: u64, reply: Reply) -> Result<(), Ended> {
        let Some(open) = self.open.get_mut(&number) else {
            return Ok(());
        };
        if !reply.is_final() {
            let is_terminal = self.console.is_terminal();
            let shown = match (&mut open.what, reply) {
                (_, Reply::Trouble(trouble)) => {
                    open.trouble = Some(trouble);
                    return Ok(());
                }
                (Asked::Letter { to, text, is_there, .. }, Reply::AwayBy { name, last_seen, last }) => {
                    *is_there = last;
                    (
                        Tone::Plain,
                        format!("  … {}: stored until {name} comes: {text} (in {to})", away(&name, last_seen)),
                    )
                }
                (Asked::Letter { to, text, opened, .. }, Reply::RefusedBy { name, reason, detail }) => {
                    opened.get_or_insert_default();
                    let failure = why(&name, Reply::Refused { reason, detail });
                    let said = format!("  ✗ not delivered to {name} in {to}: {text}: {}", failure.sentence);
                    open.deadline = open.deadline.filter(|_| !is_terminal);
                    return self.fail(failure.code, &said).await;
                }
                (Asked::Letter { fresh, show_at, opened, .. }, Reply::By { name, rung }) => {
                    match rung {
                        Rung::Opened => opened.get_or_insert_default().push(name),
                        _ => fresh.push(name),
                    }
                    opened.get_or_insert_default();
                    // Others may say so in a moment.
                    show_at.get_or_insert_with(|| Instant::now() + TOGETHER);
                    // A script goes no further, and must know it, as long as somebody says nothing.
                    open.deadline = open.deadline.filter(|_| !is_terminal);
                    return Ok(());
                }
                (Asked::Letter { to, text, is_there, .. }, Reply::Away { last_seen }) => {
                    *is_there = true;
                    (Tone::Plain, format!("  … {}: stored until {to} comes: {text}", away(to, last_seen)))
                }
                // A person is told of `opened` by itself.
                (Asked::Letter { to, text, is_there, .. }, Reply::Rung { rung, .. })
                    if rung == Rung::Delivered || (rung == Rung::Opened && !is_terminal) =>
                {
                    *is_there = true;
                    (Tone::Good, format!("  ✓ delivered to {to}: {text}"))
                }
                _ => return Ok(()),
            };
            // Nothing that is still to come is late.
            if is_terminal || matches!(open.what, Asked::Letter { is_there: true, .. }) {
                open.deadline = None;
            }
            return self.show(shown.0, &shown.1).await;
        }
        self.show_fresh(number, true).await?;
        let Some(open) = self.open.remove(&number) else {
            return Ok(());
        };
        match (open.what, reply) {
            (Asked::Letter { to, text, opened: Some(opened), .. }, Reply::Done)
                if !opened.is_empty() && self.console.is_terminal() =>
            {
                let who = opened.join(", ");
                self.show(Tone::Good, &format!("  ✓ opened by {who} in {to}: {text}")).await
            }
            (Asked::Letter { to, text, opened: None, .. }, Reply::Done) if self.console.is_terminal() => {
                self.show(Tone::Good, &format!("  ✓ opened by {to}: {text}")).await
            }
            (Asked::Letter { .. }, Reply::Done) => Ok(()),
            (Asked::Letter { to, text, .. }, reply) => {
                let failure = why(&to, reply);
                self.fail(failure.code, &format!("  ✗ not delivered to {to}: {text}: {}", failure.sentence)).await
            }
            (Asked::Follow, _) => Ok(()),
            (Asked::All(text), Reply::Done) => {
                self.show(Tone::Good, &format!("  ✓ {PUBLIC_LABEL} said to everybody: {text}")).await
            }
            (Asked::All(text), Reply::Refused { reason, detail }) => {
                let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
                self.fail(1, &format!("  ✗ not said to everybody: {text}: refused({reason}){detail}")).await
            }
            (Asked::All(text), Reply::Failed(failure)) => {
                self.fail(failure.code, &format!("  ✗ not said to everybody: {text}: {}", failure.sentence)).await
            }
            (Asked::Group { .. }, Reply::Group(group)) => self.show(Tone::Good, &members_of(&group)).await,
            (Asked::Group { done, .. }, Reply::Done) => self.show(Tone::Good, &done).await,
            (Asked::Group { what, .. }, Reply::Refused { reason, detail }) => {
                let failure = why_not(&what, reason, detail.as_deref());
                self.fail(failure.code, &failure.sentence).await
            }
            (Asked::Groups(None), Reply::Groups(groups)) => {
                let lines: Vec<String> = groups.iter().map(group_line).collect();
                let none = "you are in no group: /init GROUP @NAME ... founds one";
                self.show(Tone::Plain, if lines.is_empty() { none.to_owned() } else { lines.join("\n") }.as_str()).await
            }
            (Asked::Groups(Some(label)), Reply::Groups(groups)) => {
                match groups.iter().find(|group| group.label.to_lowercase() == label.to_lowercase()) {
                    Some(group) => self.show(Tone::Plain, &members_of(group)).await,
                    None => self.fail(1, &format!("there is no group {label} here: /members shows all")).await,
                }
            }
            (Asked::History { with, erase: true }, Reply::History(_)) => {
                self.show(Tone::Good, &format!("what was said with {with} is erased here")).await
            }
            (Asked::History { with, .. }, Reply::History(entries)) => {
                let label = if with == PUBLIC_NAME { format!("{PUBLIC_LABEL} ") } else { String::new() };
                let lines: Vec<String> = entries.iter().map(|entry| label.clone() + &said(entry)).collect();
                let none = format!("nothing that was said with {with} is kept here");
                self.show(Tone::Plain, if lines.is_empty() { none } else { lines.join("\n") }.as_str()).await
            }
            (Asked::List, Reply::Who(lines)) => {
                let mut known = self.keep_names(lines, None);
                known.retain(|(_, presence)| presence.online);
                self.show_presence(&known, "nobody is online").await?;
                if self.unread.is_empty() {
                    return Ok(());
                }
                let unread: Vec<String> =
                    self.unread.iter().map(|(with, count)| format!("{count} from {with}")).collect();
                self.show(Tone::Plain, &format!("since you last wrote there: {}", unread.join(", "))).await
            }
            (Asked::Who(pattern), Reply::Who(lines)) => {
                let known = self.keep_names(lines, pattern.as_ref());
                self.show_presence(&known, "nobody has such a name").await
            }
            (Asked::Names, Reply::Who(lines)) => {
                self.keep_names(lines, None);
                Ok(())
            }
            // They are asked for again when they are wanted again.
            (Asked::Names, _) => Ok(()),
            (Asked::Status(About::All), Reply::Status(Status { connected: None, trouble: None, .. })) => {
                self.open.insert(number, Open { what: Asked::Connection, requested: None, ..open });
                Ok(())
            }
            (Asked::Status(about), Reply::Status(status)) => self.show_status(about, &status).await,
            (Asked::Verify { accept, .. }, Reply::Verified(verified)) => {
                self.show(Tone::Plain, &verify::plain(&verified, accept)).await?;
                if verified.shown.is_some() && !verified.accepted {
                    let name = &verified.name;
                    let remedy = format!("if {name} confirms the new key, type /verify {name} accept");
                    if !self.console.is_terminal() {
                        self.code = self.code.max(1);
                    }
                    self.show(Tone::Alarm, &key_changed_but(name, &remedy)).await?;
                }
                Ok(())
            }
            (Asked::Verify { name, .. }, reply) => {
                let failure = why(name.as_str(), reply);
                self.fail(failure.code, &failure.sentence).await
            }
            (_, Reply::Refused { reason, detail }) => {
                let failure = refusal(reason, "the directory", detail.as_deref());
                self.fail(failure.code, &failure.sentence).await
            }
            (_, Reply::Failed(failure)) => self.fail(failure.code, &failure.sentence).await,
            (_, _) => self.fail(1, "there is no answer: type it again").await,
        }
    }

    /// Those whom the pattern selects; all of them can be completed from now on.
    fn keep_names(&mut self, lines: Vec<Presence>, pattern: Option<&Pattern>) -> Vec<(Name, Presence)> {
        let mut known = who::select(lines, None);
        let names = known.iter().map(|(name, _)| name.clone()).collect();
        *self.console.names.lock().unwrap_or_else(PoisonError::into_inner) = names;
        known.retain(|(name, _)| pattern.is_none_or(|pattern| pattern.matches(name)));
        known
    }

    async fn show_presence(&self, known: &[(Name, Presence)], nobody: &str) -> Result<(), Ended> {
        let width = who::width(known);
        let lines: Vec<String> = known.iter().map(|(_, presence)| who::plain(presence, width)).collect();
        self.show(Tone::Plain, if lines.is_empty() { nobody.to_owned() } else { lines.join("\n") }.as_str()).await
    }

    async fn show_status(&self, about: About, status: &Status) -> Result<(), Ended> {
        let Status { name, server, .. } = status;
        let text = match about {
            About::Greeting => format!("{name} at {server}; /help says what can be typed, Ctrl-D leaves"),
            About::All | About::Oneself => {
                let mut text = format!("{name} at {server}");
                if about == About::All {
                    text.push_str(&match (status.connected, &status.trouble) {
                        (Some(since), _) => {
                            let how = if status.resumed { ", a resumed channel" } else { "" };
                            format!("\n  connected  since {}{how}", rfc3339(since))
                        }
                        (None, Some(trouble)) => format!("\n  connected  no: {trouble}"),
                        // Not asked for in this case.
                        (None, None) => "\n  connected  not yet".to_owned(),
                    });
                }
                let id = uuid::Uuid::from_bytes(status.id);
                text.push_str(&format!("\n  id         {id}\n  key        {}", hex::encode(status.key)));
                if about == About::All {
                    let Status { waiting, letters, .. } = status;
                    text.push_str(&format!("\n  waiting    {waiting} to be shown, {letters} not confirmed"));
                } else {
                    text.push_str("\n/verify NAME shows the number that is the same for NAME if nobody is in between.");
                }
                text
            }
        };
        self.show(Tone::Plain, &text).await
    }
}

/// Why something about somebody was not done, in the words of a chat.
fn why(name: &str, reply: Reply) -> Failure {
    match reply {
        Reply::Refused { reason: reason @ Reason::KeyChanged, detail: Some(_) } => Failure::refused(format!(
            "refused({reason}): the key of {name} is not the one that was pinned: see /verify {name}"
        )),
        Reply::Refused { reason: reason @ (Reason::Closed | Reason::NotMember), detail } => {
            why_not(name, reason, detail.as_deref())
        }
        Reply::Refused { reason: reason @ Reason::Unknown, .. } => Failure::refused(format!(
            "refused({reason}): the server knows nobody named {name}: /who shows who is there"
        )),
        Reply::Refused { reason, detail } => refusal(reason, name, detail.as_deref()),
        Reply::Failed(failure) => failure,
        _ => Failure::refused("there is no answer: whether it was done is not known"),
    }
}

/// Whether two names are of one conversation.
fn is_same(one: &str, other: &str) -> bool {
    let key = |name: &str| {
        let name = name.strip_prefix('@').unwrap_or(name);
        Name::parse(name).map_or_else(|_| name.to_owned(), |name| name.key().to_owned())
    };
    key(one) == key(other)
}

/// Something that was said, in one line.
fn said(entry: &HistoryEntry) -> String {
    let text = match core::str::from_utf8(&entry.body) {
        Ok(text) => harmless(text),
        Err(_) => format!("({} bytes)", entry.body.len()),
    };
    let word = if entry.signed { "" } else { " (not signed)" };
    let who = entry.from.as_ref().map_or_else(|| "you".to_owned(), |name| harmless(name));
    format!("{} {who}{word}: {text}", rfc3339(entry.time))
}

/// A group in one line.
fn group_line(group: &GroupView) -> String {
    let GroupView { label, standing, creator, members, .. } = group;
    let accepted = members.iter().filter(|(_, state)| state == "accepted").count();
    match standing.as_str() {
        "closed" => match &group.closed_by {
            Some(by) => format!("{label}  closed by {by}"),
            None => format!("{label}  closed"),
        },
        _ => format!("{label}  {standing}, founded by {creator}, {accepted} of {} others are in", members.len()),
    }
}

/// A group and everybody in it.
fn members_of(group: &GroupView) -> String {
    let mut lines = group_line(group);
    let width = group.members.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    for (name, state) in &group.members {
        lines.push_str(&format!("\n  {name:<width$}  {state}"));
    }
    lines
}

/// Why something about a group was not done.
fn why_not(group: &str, reason: Reason, detail: Option<&str>) -> Failure {
    let known = match reason {
        Reason::Closed => "it is over for everybody: /init founds another one".to_owned(),
        Reason::Expired => format!("ask who has founded {group} to found it anew"),
        Reason::Forbidden => format!("/members {group} shows how it stands"),
        Reason::NotMember => "/members shows your groups and invitations".to_owned(),
        Reason::Offline => "invite it when it has been here once".to_owned(),
        Reason::QueueFull => "somebody has as many groups, or unanswered invitations of yours, as can be".to_owned(),
        Reason::TooLarge => "somebody's device takes no invitation that names so many: invite fewer".to_owned(),
        Reason::Unknown => "/who shows who is there".to_owned(),
        _ => return refusal(reason, group, detail),
    };
    let detail = detail.map(|detail| format!("{detail}; ")).unwrap_or_default();
    Failure::refused(format!("refused({reason}): {detail}{known}"))
}

/// The beginning of a text, in one line.
pub(super) fn beginning(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).map(|c| if c == '\n' { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_known_by_its_beginning() {
        assert_eq!(beginning("hi there"), "hi there");
        assert_eq!(beginning("two\nlines"), "two lines");
        assert_eq!(beginning(&"ü".repeat(SHOWN)), "ü".repeat(SHOWN));
        assert_eq!(beginning(&"ü".repeat(SHOWN + 1)), format!("{}…", "ü".repeat(SHOWN)));
    }

    #[test]
    fn refusals_name_commands_of_the_chat() {
        let refused = |reason| why("bob", Reply::Refused { reason, detail: Some(String::new()) }).sentence;
        assert!(refused(Reason::KeyChanged).contains("/verify bob"));
        assert!(refused(Reason::Unknown).contains("/who"));
        assert!(refused(Reason::Offline).starts_with("refused(offline)"));
        for (reason, how) in [
            (Reason::Closed, "/init"),
            (Reason::NotMember, "/members"),
            (Reason::Unknown, "/who"),
            (Reason::TooLarge, "fewer"),
        ] {
            let sentence = why_not("plans", reason, Some("so it is")).sentence;
            assert!(
                sentence.starts_with(&format!("refused({reason}): so it is; ")) && sentence.contains(how),
                "{sentence}"
            );
        }
    }
}
