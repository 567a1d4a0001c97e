//! `ossicle listen`: messages as they come, one a line.
//!
//! A message counts as opened when its line was written and flushed, not before: then its sender is told and its text is
//! erased here, also when it is interrupted or told to end in between. What was not printed (beyond `--count`, outside the pattern, after
//! the pipe was closed or the process killed) waits in the home for the next `listen`.

use core::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use super::{HomeArg, group_news, harmless, json, key_changed, key_followed, print, rfc3339, say, settled};
use crate::endpoint::{Access, Failure, KIND_TEXT, Notice, PUBLIC_LABEL, PublicPost, Request};
use crate::name::{Name, Pattern};
use crate::store::home::Waiting;

/// Messages that are read from the home at once.
const PAGE: u32 = 64;
/// How long what was begun may take once it was interrupted.
const GRACE: Duration = Duration::from_secs(1);
/// Seconds at the server after which people are told that a message waited there: most only pass through its store.
const LATE: u64 = 60;

/// Print messages as they come
///
/// This client is online while `listen` runs. With --json each line is an object with `id`, `from` (the sender's name),
/// `conversation`, `group` (what a group is called here), `signed` (false: whoever holds the conversation's key could have written it), `time` (when it came, RFC
/// 3339), `server_accepted` if it waited at the server (since when: the server's word), and `text`, or `data` in base64
/// where it is not UTF-8. What became of messages that this home sent earlier goes to standard error.
///
/// With --public what was said to everybody comes, too, from where this home last read it: signed by its author, and marked in each
/// line, in JSON by `public` ("not end-to-end encrypted"); `time` is its author's word there. What a pattern leaves out of it does not
/// wait: it is passed over.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle listen
  ossicle listen 'sensor-*' --json | jq .text
  ossicle listen --public                        with what is said to everybody
  ossicle listen --count 1                       wait for one message
  ossicle listen --json | while read -r m; do ossicle send alice \"got one\"; done")]
pub struct Listen {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Only messages of clients or in groups with such names ('*', '?' and '[...]'); the others wait
    #[arg(value_parser = Pattern::parse)]
    pub pattern: Option<Pattern>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Also what is said to everybody: signed, not end-to-end encrypted
    #[arg(long)]
    pub public: bool,
    /// End after so many messages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

#[derive(Serialize)]
struct Line<'m> {
    id: String,
    from: &'m str,
    conversation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'m str>,
    signed: bool,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_accepted: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'m str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
}

/// A line of JSON about a post.
#[derive(Serialize)]
struct PostLine<'m> {
    public: &'static str,
    id: String,
    from: &'m str,
    signed: bool,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'m str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
}

/// What ends a command from outside: the keyboard, and whoever ends processes. Not the end of the terminal, which `nohup`
/// keeps from it.
struct Interrupts([Signal; 2]);

impl Interrupts {
    fn new() -> Result<Self, Failure> {
        let unheard = |error| Failure::refused(format!("cannot hear of interrupts ({error})"));
        let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        Ok(Self([interrupt.map_err(unheard)?, terminate.map_err(unheard)?]))
    }

    /// Waits for the next. Cancel-safe.
    async fn next(&mut self) {
        let Self([interrupt, terminate]) = self;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

impl Listen {
    /// Whether it was interrupted. What it has printed by then is marked: it comes once.
    pub(super) async fn run(self) -> Result<bool, Failure> {
        let mut interrupts = Interrupts::new()?;
        let home = self.home.open()?;
        let mut access = tokio::select! {
            opened = Access::open_reader(&home, "listen") => opened?,
            () = interrupts.next() => return Ok(true),
        };
        let done = self.print_all(&mut access, &mut interrupts).await;
        if matches!(done, Ok(true)) {
            let _ = timeout(GRACE, access.close()).await;
            return done;
        }
        tokio::select! {
            () = access.close() => done,
            () = interrupts.next() => Ok(true),
        }
    }

    async fn print_all(&self, access: &mut Access, interrupts: &mut Interrupts) -> Result<bool, Failure> {
        let (mut printed, mut after) = (0, 0);
        if self.public {
            access.request(Request::Follow).next().await;
        }
        loop {
            let waiting = access.waiting(after, PAGE).await?;
            if waiting.is_empty() {
                let notice = tokio::select! {
                    notice = access.notice() => notice,
                    () = interrupts.next() => return Ok(true),
                };
                match notice {
                    Notice::Inbox | Notice::Connected | Notice::Disconnected(_) => continue,
                    Notice::Ended(failure) => return Err(failure),
                    Notice::KeyChanged { name } => {
                        say(&harmless(&key_changed(&name)));
                        continue;
                    }
                    Notice::Public(post) => {
                        if !self.selects(&post.from) {
                            access.read_post(post, false).await?;
                            continue;
                        }
                        let line = if self.json { object_of_post(&post)? } else { plain_post(&post) };
                        let (taken, interrupted) = put(line, interrupts).await?;
                        if !taken {
                            return Ok(interrupted);
                        }
                        access.read_post(post, false).await?;
                        printed += 1;
                        if interrupted || self.count == Some(printed) {
                            return Ok(interrupted);
                        }
                        continue;
                    }
                    Notice::PublicDropped { posts } => {
                        say(&not_shown(posts));
                        continue;
                    }
                    Notice::KeyFollowed { name } => {
                        say(&harmless(&key_followed(&name)));
                        continue;
                    }
                    Notice::Settled(news) => {
                        say(&harmless(&settled(&news)));
                        continue;
                    }
                    Notice::Group { label, news } => {
                        let how = |word: &str| format!("/{word} {label} in `ossicle chat`");
                        say(&harmless(&group_news(&label, &news, how)));
                        continue;
                    }
                }
            }
            for message in waiting {
                after = message.row;
                let is_in = |group: &String| self.selects(group);
                if !self.selects(&message.from) && !message.group.as_ref().is_some_and(is_in) {
                    continue;
                }
                let line = if self.json { object(&message)? } else { plain(&message) };
                let (taken, interrupted) = put(line, interrupts).await?;
                if !taken {
                    return Ok(interrupted);
                }
                access.read(&message, false).await?;
                printed += 1;
                if interrupted || self.count == Some(printed) {
                    return Ok(interrupted);
                }
            }
        }
    }

    fn selects(&self, from: &str) -> bool {
        match &self.pattern {
            Some(pattern) => Name::parse(from).is_ok_and(|name| pattern.matches(&name)),
            None => true,
        }
    }
}

/// Prints a line, and says whether it was taken and whether somebody wants to end meanwhile.
async fn put(line: String, interrupts: &mut Interrupts) -> Result<(bool, bool), Failure> {
    // A reader may be slow, and the connection must not wait for it.
    let mut writing = tokio::task::spawn_blocking(move || print(&line));
    let mut interrupted = false;
    let written = tokio::select! {
        written = &mut writing => written,
        () = interrupts.next() => {
            interrupted = true;
            // A reader that takes nothing has not got it.
            let Ok(written) = timeout(GRACE, writing).await else { return Ok((false, true)) };
            written
        }
    };
    let taken = written.map_err(|_| Failure::refused("cannot write to standard output"))??;
    Ok((taken, interrupted))
}

fn object(waiting: &Waiting) -> Result<String, Failure> {
    let message = &waiting.message;
    let text = core::str::from_utf8(&message.body).ok();
    json(&Line {
        id: crate::endpoint::message_id(&message.chain, message.n),
        from: &waiting.from,
        conversation: hex::encode(message.sid),
        group: waiting.group.as_deref(),
        signed: message.signed,
        time: rfc3339(message.time),
        server_accepted: message.accepted.map(rfc3339),
        kind: (message.kind != KIND_TEXT).then_some(message.kind),
        text,
        data: text.is_none().then(|| STANDARD.encode(&message.body)),
    })
}

fn object_of_post(post: &PublicPost) -> Result<String, Failure> {
    let text = core::str::from_utf8(&post.body).ok();
    json(&PostLine {
        public: "not end-to-end encrypted",
        id: format!("{}-{}", hex::encode(post.author), post.number),
        from: &post.from,
        signed: true,
        time: rfc3339(post.time),
        kind: (post.kind != KIND_TEXT).then_some(post.kind),
        text,
        data: text.is_none().then(|| STANDARD.encode(&post.body)),
    })
}

/// What somebody has said to everybody, as people read it: the line says that everybody could.
pub(super) fn plain_post(post: &PublicPost) -> String {
    let text = match core::str::from_utf8(&post.body) {
        Ok(text) => harmless(text),
        Err(_) => format!("({} bytes: {})", post.body.len(), STANDARD.encode(&post.body)),
    };
    format!("{} {PUBLIC_LABEL} {}: {text}", rfc3339(post.time), harmless(&post.from))
}

/// That posts are nobody's word.
pub(super) fn not_shown(posts: u64) -> String {
    let what = if posts == 1 { "one post is".to_owned() } else { format!("{posts} posts are") };
    let why = "nobody whose key is pinned here has signed it so, or it was shown before";
    format!("{PUBLIC_LABEL} {what} not shown: {why}")
}

/// A message as people read it.
pub(super) fn plain(waiting: &Waiting) -> String {
    let message = &waiting.message;
    let text = match core::str::from_utf8(&message.body) {
        Ok(text) => harmless(text),
        Err(_) => format!("({} bytes: {})", message.body.len(), STANDARD.encode(&message.body)),
    };
    let word = if message.signed { "" } else { " (not signed)" };
    let late = message.accepted.filter(|at| message.time.saturating_sub(*at) >= LATE);
    let waited = late.map(|at| format!(" (at the server since {})", rfc3339(at))).unwrap_or_default();
    let group = waiting.group.as_ref().map(|group| format!(" in {}", harmless(group))).unwrap_or_default();
    format!("{} {}{group}{word}{waited}: {text}", rfc3339(message.time), harmless(&waiting.from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::home::Received;

    fn waiting(body: &[u8]) -> Waiting {
        let message = Received {
            chain: [1; 8],
            n: 3,
            salt: [0; 8],
            peer: [2; 16],
            sid: [3; 16],
            signed: true,
            kind: 0,
            time: 1_700_000_000,
            accepted: None,
            body: body.to_vec(),
            delivered_tag: [0; 16],
            opened_tag: None,
        };
        Waiting { row: 1, from: "alice".into(), group: None, message }
    }

    #[test]
    fn lines_hold_what_scripts_need_and_nothing_that_a_terminal_obeys() {
        let line = object(&waiting("a\u{1b}[2Jb\nc".as_bytes())).unwrap();
        assert_eq!(
            line,
            "{\"id\":\"0101010101010101-3\",\"from\":\"alice\",\"conversation\":\"03030303030303030303030303030303\",\
             \"signed\":true,\"time\":\"2023-11-14T22:13:20Z\",\"text\":\"a\\u001b[2Jb\\nc\"}"
        );
        let mut grouped = waiting(b"a");
        grouped.group = Some("plans~2".into());
        assert_eq!(plain(&grouped), "2023-11-14T22:13:20Z alice in plans~2: a");
        assert!(object(&grouped).unwrap().contains(",\"group\":\"plans~2\",\"signed\":true"));
        assert!(object(&waiting(&[0xff, 0])).unwrap().ends_with("\"data\":\"/wA=\"}"));
        assert_eq!(plain(&waiting(b"a\nb\x1b")), "2023-11-14T22:13:20Z alice: a\\u{a}b\\u{1b}");
        assert_eq!(plain(&waiting(&[0xff, 0])), "2023-11-14T22:13:20Z alice: (2 bytes: /wA=)");
        let mut late = waiting(b"a");
        late.message.accepted = Some(1_700_000_000 - LATE + 1);
        assert_eq!(plain(&late), "2023-11-14T22:13:20Z alice: a");
        late.message.accepted = Some(1_600_000_000);
        let since = "2020-09-13T12:26:40Z";
        assert!(object(&late).unwrap().contains(&format!("\"server_accepted\":\"{since}\"")));
        assert_eq!(plain(&late), format!("2023-11-14T22:13:20Z alice (at the server since {since}): a"));
    }
}
