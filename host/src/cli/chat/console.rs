//! The person's side of `chat`: a terminal with a line editor, or plain standard input and output.
//!
//! Two threads, since neither a read nor a write of a terminal can be called off: one reads lines, one at a time, the
//! other writes what is to be shown. While a line is being typed the editor itself shows what comes, above that line, when
//! it gets to it: not while it searches its history. Nobody but the writing thread waits for that, since the editor waits
//! for the rest. Whatever passes here is made harmless first.

use core::time::Duration;
use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc as sync};
use std::thread;
use std::time::Instant;

use rustix::process::{Signal, kill_current_process_group};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::completion::{Completer, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::{CmdKind, Highlighter};
use rustyline::history::MemHistory;
use rustyline::{
    Cmd, ColorMode, CompletionType, ConditionalEventHandler, Config, Context, Editor, Event, EventContext,
    EventHandler, ExternalPrinter, Helper, KeyEvent, Movement, RepeatCount,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot::error::RecvError;
use tokio::sync::{mpsc, oneshot};

use super::super::harmless;
use super::super::send::too_large;
use super::command::COMMANDS;
use crate::endpoint::{Failure, MAX_TEXT_LEN};
use crate::name::Name;

/// Bytes of a line that is read whole: the longest text, and a command and name before it.
const MAX_LINE_LEN: usize = MAX_TEXT_LEN + 256;
/// The editor begins with a line, and shows what waits for it, within this time.
const SETTLED: Duration = Duration::from_millis(300);
const BRACKETED_PASTE_OFF: &str = "\u{1b}[?2004l";
const BRACKETED_PASTE_ON: &str = "\u{1b}[?2004h";
/// A process that runs on for so long was not stopped.
const NOT_STOPPED: Duration = Duration::from_secs(1);

/// What a person, or a script, did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// A line, without its end.
    Line(String),
    /// A line that is none, and why.
    Refused(String),
    /// No more lines.
    End,
    /// The wish to leave at once.
    Interrupt,
    /// Names are being completed: the present ones are wanted.
    Names,
}

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// A message, or an answer.
    Plain,
    /// It worked.
    Good,
    /// It did not, or should be looked at.
    Bad,
    /// Nobody must miss this.
    Alarm,
}

impl Tone {
    const fn colour(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Good => "\u{1b}[32m",
            Self::Bad => "\u{1b}[31m",
            Self::Alarm => "\u{1b}[1;97;41m",
        }
    }
}

/// Names that can be completed, sorted.
pub(super) type Names = Arc<Mutex<Vec<Name>>>;

/// The two sides of a person.
pub(super) struct Console {
    pub(super) screen: Screen,
    pub(super) names: Names,
    input: mpsc::Receiver<Input>,
    typed: mpsc::Sender<Input>,
    editor: Option<Box<Editor<Typing, MemHistory>>>,
    editing: Arc<Editing>,
    prompts: Option<sync::Sender<String>>,
    terminal: Option<Restored>,
}

impl Console {
    /// A terminal, if both standard input and output are one that can edit lines; else plain.
    pub(super) fn open() -> Self {
        let (typed, input) = mpsc::channel(1);
        let names = Names::default();
        let (show, showing) = mpsc::unbounded_channel();
        let editing = Arc::new(Editing::default());
        let (printer, editor, terminal) = match editor(&typed, &names, &editing) {
            Some((editor, printer, terminal)) => (Some(printer), Some(Box::new(editor)), Some(terminal)),
            None => (None, None, None),
        };
        let screen = Screen { show, is_terminal: printer.is_some() };
        let shared = Arc::clone(&editing);
        thread::spawn(move || write_all(showing, printer, &shared));
        Self { screen, names, input, typed, editor, editing, prompts: None, terminal }
    }

    /// Whether a person is there.
    pub(super) const fn is_terminal(&self) -> bool {
        self.screen.is_terminal
    }

    /// Lets a line be typed, or read: the next one, and in a terminal only this one.
    pub(super) fn prompt(&mut self, prompt: &str) {
        let typed = &self.typed;
        if let Some(editor) = self.editor.take() {
            let (prompts, prompted) = sync::channel();
            let (typed, editing) = (typed.clone(), Arc::clone(&self.editing));
            thread::spawn(move || edit_lines(*editor, &prompted, &typed, &editing));
            self.prompts = Some(prompts);
        } else if self.prompts.is_none() {
            let (prompts, _) = sync::channel();
            let typed = typed.clone();
            thread::spawn(move || read_lines(&mut io::stdin().lock(), &typed));
            self.prompts = Some(prompts);
        }
        if let Some(prompts) = &self.prompts {
            // Where lines are read plainly, nobody wants to know.
            let _ = prompts.send(prompt.to_owned());
        }
    }

    /// No further line is wanted.
    pub(super) fn finish(&mut self) {
        self.prompts = None;
    }

    /// What was typed. Cancel-safe.
    pub(super) async fn input(&mut self) -> Input {
        // This end holds a sender, so there is always one.
        self.input.recv().await.unwrap_or(Input::End)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(terminal) = self.terminal.take() {
            terminal.restore();
        }
    }
}

/// How the terminal was, since the editor's thread may be in the middle of a line when the process ends.
struct Restored(Termios);

impl Restored {
    fn restore(&self) {
        let is_raw = tcgetattr(io::stdin()).is_ok_and(|now| !now.local_modes.contains(LocalModes::ICANON));
        // A terminal that has gone needs nothing.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
        if is_raw {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{BRACKETED_PASTE_OFF}").and_then(|()| out.flush());
        }
    }
}

/// Where lines are shown; cheap to clone.
#[derive(Clone)]
pub(super) struct Screen {
    show: mpsc::UnboundedSender<Line>,
    is_terminal: bool,
}

struct Line {
    tone: Tone,
    text: String,
    shown: Option<oneshot::Sender<io::Result<()>>>,
}

impl Screen {
    /// Shows a text of one or more lines. Whoever must know waits for the receiver.
    pub(super) fn begin(&self, tone: Tone, text: &str) -> oneshot::Receiver<io::Result<()>> {
        let (shown, done) = oneshot::channel();
        let _ = self.show.send(Line { tone, text: plain(text), shown: Some(shown) });
        done
    }

    /// What became of it: false if nobody is there to see anything any more.
    pub(super) fn end(&self, done: Result<io::Result<()>, RecvError>) -> Result<bool, Failure> {
        match done {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe && !self.is_terminal => {
                Err(Failure::refused(format!("cannot write to standard output: {error}")))
            }
            Ok(Err(_)) | Err(_) => Ok(false),
        }
    }

    /// Shows a text; through a pipe, when it has gone through.
    pub(super) async fn show(&self, tone: Tone, text: &str) -> Result<bool, Failure> {
        let done = self.begin(tone, text);
        // The editor may wait for the caller.
        if self.is_terminal { Ok(true) } else { self.end(done.await) }
    }

    /// For the log.
    pub(super) fn writer(&self) -> LogWriter {
        LogWriter(self.clone())
    }
}

/// Writes the log without breaking the line that is being typed.
pub(super) struct LogWriter(Screen);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = plain(String::from_utf8_lossy(bytes).trim_end());
        let _ = self.0.show.send(Line { tone: Tone::Bad, text, shown: None });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn plain(text: &str) -> String {
    text.split('\n').map(harmless).collect::<Vec<_>>().join("\n")
}

fn write_all(
    mut showing: mpsc::UnboundedReceiver<Line>,
    mut printer: Option<Box<dyn ExternalPrinter + Send>>,
    editing: &Editing,
) {
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    while let Some(Line { tone, text, shown }) = showing.blocking_recv() {
        let written = match &mut printer {
            Some(printer) => {
                let colour = if colours { tone.colour() } else { "" };
                let end = if colour.is_empty() { "" } else { "\u{1b}[m" };
                editing.print(printer.as_mut(), format!("{colour}{text}{end}\n"))
            }
            // What went wrong is no result.
            None if matches!(tone, Tone::Bad | Tone::Alarm) => writeln!(io::stderr().lock(), "{text}"),
            None => {
                let mut out = io::stdout().lock();
                writeln!(out, "{text}").and_then(|()| out.flush())
            }
        };
        let _ = shown.map(|shown| shown.send(written));
    }
}

/// Reads lines until there are no more. A line that is too long is never in memory as a whole.
fn read_lines(input: &mut impl BufRead, typed: &mpsc::Sender<Input>) {
    let limit = u64::try_from(MAX_LINE_LEN).unwrap_or(u64::MAX).saturating_add(1);
    loop {
        let mut line = Vec::new();
        let read = match (&mut *input).take(limit).read_until(b'\n', &mut line) {
            Ok(0) => Input::End,
            Ok(_) => {
                let is_whole = line.pop_if(|last| *last == b'\n').is_some();
                line.pop_if(|last| is_whole && *last == b'\r');
                if !is_whole && line.len() > MAX_LINE_LEN {
                    match input.skip_until(b'\n') {
                        Ok(_) => Input::Refused(too_large(line.len(), None).sentence),
                        Err(error) => Input::Refused(unreadable(&error)),
                    }
                } else {
                    match String::from_utf8(line) {
                        Ok(line) => Input::Line(line),
                        Err(_) => Input::Refused("the line is not UTF-8: it was not sent".to_owned()),
                    }
                }
            }
            Err(error) => {
                let _ = typed.blocking_send(Input::Refused(unreadable(&error)));
                Input::End
            }
        };
        let is_last = read == Input::End;
        if typed.blocking_send(read).is_err() || is_last {
            return;
        }
    }
}

fn unreadable(error: &io::Error) -> String {
    format!("cannot read standard input: {error}")
}

type Opened = (Editor<Typing, MemHistory>, Box<dyn ExternalPrinter + Send>, Restored);

/// What is known of the line being typed, by which a text is known to be shown: the editor only says that it will be.
#[derive(Default)]
struct Editing {
    state: Mutex<State>,
    change: Condvar,
}

#[derive(Clone, Copy, Default)]
struct State {
    /// Lines begun.
    lines: u64,
    /// Whether the editor is at work on one.
    in_line: bool,
    /// Whether it shows texts by now, and not the printer by itself.
    drawn: bool,
    /// Whether the line is about to be drawn for what was typed.
    by_key: bool,
    /// How often it was drawn for something else, which is a text that was shown above it.
    texts: u64,
    /// Whether there will be no further line.
    closed: bool,
}

impl Editing {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.change.notify_all();
    }

    fn print(&self, printer: &mut (dyn ExternalPrinter + Send), text: String) -> io::Result<()> {
        let before = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if before.closed {
            return printer.print(text).map_err(io::Error::other);
        }
        printer.print(text.clone()).map_err(io::Error::other)?;
        let begun = Instant::now();
        let mut now = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let is_direct = !before.in_line && now.lines == before.lines;
            if is_direct || now.texts != before.texts {
                return Ok(());
            }
            if now.closed {
                // The editor has gone with it, and the terminal is an ordinary one again.
                drop(now);
                return printer.print(text).map_err(io::Error::other);
            }
            // At the seams between two lines the printer may have shown it by itself; else the next line begins with it.
            let is_queued = before.drawn && now.in_line && now.lines == before.lines;
            if !is_queued && now.drawn && begun.elapsed() > SETTLED {
                return Ok(());
            }
            now = self.change.wait_timeout(now, SETTLED).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn editor(typed: &mpsc::Sender<Input>, names: &Names, editing: &Arc<Editing>) -> Option<Opened> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return None;
    }
    let restored = Restored(tcgetattr(io::stdin()).ok()?);
    // So that the editor asks how to colour each drawing, by which it is watched: it gets no colour.
    let config = Config::builder().completion_type(CompletionType::List).color_mode(ColorMode::Forced).build();
    let mut editor = Editor::with_history(config, MemHistory::new()).ok()?;
    // Refused by a terminal that cannot move its cursor.
    let printer = editor.create_external_printer().ok()?;
    let typing = Typing { typed: typed.clone(), names: Arc::clone(names), editing: Arc::clone(editing) };
    editor.set_helper(Some(typing));
    editor.bind_sequence(KeyEvent::ctrl('C'), EventHandler::Conditional(Box::new(DropLine)));
    let suspend = Suspend { ordinary: restored.0.clone(), continued: continued() };
    editor.bind_sequence(KeyEvent::ctrl('Z'), EventHandler::Conditional(Box::new(suspend)));
    Some((editor, Box::new(printer), restored))
}

/// Counts how often this process was continued.
fn continued() -> Arc<Continued> {
    let continued = Arc::new(Continued::default());
    let counting = Arc::clone(&continued);
    tokio::spawn(async move {
        let Ok(mut signals) = signal(SignalKind::from_raw(Signal::CONT.as_raw())) else {
            return;
        };
        while signals.recv().await.is_some() {
            *counting.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            counting.more.notify_all();
        }
    });
    continued
}

fn edit_lines(
    mut editor: Editor<Typing, MemHistory>,
    prompts: &sync::Receiver<String>,
    typed: &mpsc::Sender<Input>,
    editing: &Editing,
) {
    while let Ok(prompt) = prompts.recv() {
        editing.change(|state| (state.lines, state.in_line) = (state.lines.wrapping_add(1), true));
        let read = editor.readline(&prompt);
        editing.change(|state| (state.in_line, state.drawn) = (false, false));
        let input = match read {
            Ok(line) => {
                // A history that is full forgets; nothing else can go wrong with it.
                let _ = editor.add_history_entry(line.as_str());
                Input::Line(line)
            }
            Err(ReadlineError::Interrupted) => Input::Interrupt,
            Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                Input::Refused("the line is not UTF-8: it was not sent".to_owned())
            }
            // Also a terminal that has gone.
            Err(_) => Input::End,
        };
        if typed.blocking_send(input).is_err() {
            break;
        }
    }
    // What the editor has not shown goes with it.
    drop(editor);
    editing.change(|state| state.closed = true);
}

/// Ctrl-C drops the line that is being typed; without one it is what it always is.
struct DropLine;

impl ConditionalEventHandler for DropLine {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, context: &EventContext<'_>) -> Option<Cmd> {
        if context.line().is_empty() { None } else { Some(Cmd::Kill(Movement::WholeBuffer)) }
    }
}

#[derive(Default)]
struct Continued {
    count: Mutex<u64>,
    more: Condvar,
}

/// Ctrl-Z stops the process in an ordinary terminal. The editor's own way touches the terminal again before every thread
/// has stopped.
struct Suspend {
    ordinary: Termios,
    continued: Arc<Continued>,
}

impl ConditionalEventHandler for Suspend {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, _: &EventContext<'_>) -> Option<Cmd> {
        let editing = tcgetattr(io::stdin()).ok()?;
        let count = self.continued.count.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *count;
        tcsetattr(io::stdin(), OptionalActions::Now, &self.ordinary).ok()?;
        let _ = write!(io::stdout(), "{BRACKETED_PASTE_OFF}").and_then(|()| io::stdout().flush());
        if kill_current_process_group(Signal::TSTP).is_ok() {
            // Where no shell could continue it, it is not stopped either.
            let waited = self.continued.more.wait_timeout_while(count, NOT_STOPPED, |count| *count == before);
            drop(waited);
        }
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &editing);
        let _ = write!(io::stdout(), "{BRACKETED_PASTE_ON}").and_then(|()| io::stdout().flush());
        Some(Cmd::Repaint)
    }
}

/// What the editor asks while a line is typed.
struct Typing {
    typed: mpsc::Sender<Input>,
    names: Names,
    editing: Arc<Editing>,
}

impl Helper for Typing {}
impl rustyline::validate::Validator for Typing {}

/// Changes no colour, and learns by the way when and why the line is drawn.
impl Highlighter for Typing {
    fn highlight<'l>(&self, line: &'l str, _: usize) -> Cow<'l, str> {
        self.editing.change(|state| {
            state.drawn = true;
            if !core::mem::take(&mut state.by_key) {
                state.texts = state.texts.wrapping_add(1);
            }
        });
        Cow::Borrowed(line)
    }

    /// Asked before each drawing for what was typed, and for no other; the answer makes sure that it is drawn.
    fn highlight_char(&self, _: &str, _: usize, _: CmdKind) -> bool {
        self.editing.change(|state| state.by_key = true);
        true
    }
}

impl rustyline::hint::Hinter for Typing {
    type Hint = String;
}

impl Completer for Typing {
    type Candidate = Pair;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        // If it cannot be said now, it was said a moment ago.
        let _ = self.typed.try_send(Input::Names);
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(completions(line.get(..at).unwrap_or_default(), &names))
    }
}

/// Where the word begins that ends this text, and what it may become.
fn completions(typed: &str, names: &[Name]) -> (usize, Vec<Pair>) {
    let pair = |display: String| Pair { replacement: format!("{display} "), display };
    let Some(command) = typed.strip_prefix('/') else {
        return (typed.len(), Vec::new());
    };
    let Some((command, rest)) = command.split_once(' ') else {
        let known = COMMANDS.iter().filter(|(name, ..)| name.starts_with(command));
        return (0, known.map(|(name, ..)| pair(format!("/{name}"))).collect());
    };
    let (before, word) = rest.rsplit_once(' ').unwrap_or(("", rest));
    let start = typed.len() - word.len();
    let found = match (command, before.trim().is_empty()) {
        ("tell" | "verify" | "who", true) => {
            let wanted = Name::parse(word).map_or_else(|_| word.to_lowercase(), |name| name.key().to_owned());
            let found = names.iter().filter(|name| name.key().starts_with(&wanted));
            found.map(|name| pair(name.as_str().to_owned())).collect()
        }
        ("verify", false) if before.split_whitespace().count() == 1 && "accept".starts_with(word) => {
            vec![pair("accept".to_owned())]
        }
        _ => Vec::new(),
    };
    (start, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &[u8]) -> Vec<Input> {
        let (typed, mut lines) = mpsc::channel(64);
        read_lines(&mut io::BufReader::with_capacity(4096, input), &typed);
        drop(typed);
        core::iter::from_fn(|| lines.blocking_recv()).collect()
    }

    #[test]
    fn lines_end_with_the_input_and_are_text() {
        let line = |text: &str| Input::Line(text.to_owned());
        assert_eq!(read(b""), [Input::End]);
        assert_eq!(read(b"a\n\nb\r\nc"), [line("a"), line(""), line("b"), line("c"), Input::End]);
        let odd = read(b"\xff\xfe\nb\n");
        assert!(
            matches!(&odd[..], [Input::Refused(why), Input::Line(_), Input::End] if why.contains("UTF-8")),
            "{odd:?}"
        );
        assert_eq!(read("\u{0}\u{1b}\n".as_bytes()), [line("\u{0}\u{1b}"), Input::End]);
    }

    #[test]
    fn a_line_without_end_is_refused_and_not_kept() {
        // So many bytes, without memory for them.
        let endless = |len: u64| io::BufReader::new(io::repeat(b'x').take(len).chain(&b"\nnext\n"[..]));
        let (typed, mut lines) = mpsc::channel(8);
        read_lines(&mut endless(100_000_000), &typed);
        assert!(matches!(lines.try_recv(), Ok(Input::Refused(why)) if why.starts_with("refused(too-large)")));
        assert_eq!(lines.try_recv(), Ok(Input::Line("next".to_owned())));
        // The longest that is read whole.
        let (typed, mut lines) = mpsc::channel(8);
        read_lines(&mut endless(MAX_LINE_LEN as u64), &typed);
        assert!(matches!(lines.try_recv(), Ok(Input::Line(line)) if line.len() == MAX_LINE_LEN));
        assert_eq!(lines.try_recv(), Ok(Input::Line("next".to_owned())));
    }

    #[test]
    fn commands_and_names_are_completed() {
        let names: Vec<Name> =
            ["alice", "Bob", "bobby", "Ольга"].iter().map(|name| Name::parse(name).unwrap()).collect();
        let complete = |typed: &str| {
            let (start, found) = completions(typed, &names);
            (start, found.into_iter().map(|pair| pair.replacement).collect::<Vec<_>>())
        };
        assert_eq!(complete("/te"), (0, vec!["/tell ".to_owned()]));
        assert_eq!(complete("/").1.len(), COMMANDS.len());
        assert_eq!(complete("/tell b"), (6, vec!["Bob ".to_owned(), "bobby ".to_owned()]));
        assert_eq!(complete("/tell BOBB"), (6, vec!["bobby ".to_owned()]));
        assert_eq!(complete("/verify ол").1, ["Ольга "]);
        assert_eq!(complete("/verify bob ac"), (12, vec!["accept ".to_owned()]));
        assert_eq!(complete("/who ").1.len(), 4);
        for nothing in ["", "bo", "/tell bob al", "/list b", "/verify bob accept a", "/tell \u{1b}", "/tell b@"] {
            assert_eq!(complete(nothing).1, [""; 0], "{nothing:?}");
        }
    }
}
