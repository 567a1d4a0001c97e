//! `ossicle who`: everybody on the server, and who is there; once, or from now on.

use core::time::Duration;
use std::collections::HashMap;

use serde::Serialize;
use tokio::time::{Instant, sleep, timeout_at};

use super::{Asking, HomeArg, PATIENCE, harmless, json, print, refusal, rfc3339, say, too_late, unexpected};
use crate::endpoint::{Access, Failure, Home, Presence, Reply, Request, Seen, WATCHER, now};
use crate::name::{Name, Pattern};

/// Whoever makes room for another command asks again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// List clients, and whether they are online
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle who
  ossicle who 'sensor-*' --json
  ossicle who 'sensor-*' --watch
  ossicle who --watch --json | jq 'select(.event == \"offline\")'")]
pub struct Who {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Only clients with such names ('*', '?' and '[...]')
    #[arg(value_parser = Pattern::parse)]
    pub pattern: Option<Pattern>,
    /// Go on: first who is there now, then a line for each who comes, goes, is enrolled or revoked
    ///
    /// It goes on through broken connections: what is different afterwards is told then. Whoever reads slowly misses states
    /// that did not last.
    #[arg(long)]
    pub watch: bool,
    /// One JSON object a line: `name`, `online`, `last_seen` (RFC 3339, or null)
    ///
    /// With --watch also `event`: `present` for those who are there at first, then `online`, `offline`, `enrolled`,
    /// `revoked`, `renamed` (with `former`); and `time`, when it was learned.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    online: bool,
    last_seen: Option<String>,
}

#[derive(Serialize)]
struct Event<'l> {
    event: What,
    time: String,
    #[serde(flatten)]
    line: Line<'l>,
    #[serde(skip_serializing_if = "Option::is_none")]
    former: Option<&'l str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum What {
    Present,
    Online,
    Offline,
    Enrolled,
    Revoked,
    Renamed,
}

impl Who {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let home = self.home.open()?;
        if self.watch {
            return self.go_on(&home).await;
        }
        let mut asking = Asking::new(&home, "who");
        let answer = asking.ask(Request::Who).await;
        asking.close().await;
        let lines = match answer? {
            Reply::Who(lines) => lines,
            Reply::Refused { reason, detail } => return Err(refusal(reason, "the directory", detail.as_deref())),
            _ => return Err(unexpected()),
        };
        let known = select(lines, self.pattern.as_ref());
        let width = width(&known);
        for (_, line) in &known {
            let text = if self.json { object(line)? } else { plain(line, width) };
            if !print(&text)? {
                break;
            }
        }
        Ok(())
    }

    /// Through this process or whoever holds the home, whatever becomes of either.
    async fn go_on(&self, home: &Home) -> Result<(), Failure> {
        let mut known = Known::default();
        loop {
            let access = Access::open(home, WATCHER).await?;
            let ended = self.print_changes(&access, &mut known).await;
            access.close().await;
            match ended {
                // Another process holds the home now, or may do so.
                Ok(true) => sleep(AGAIN).await,
                Ok(false) => return Ok(()),
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Until nobody reads any more (false), or somebody else is to be asked (true).
    async fn print_changes(&self, access: &Access, known: &mut Known) -> Result<bool, Failure> {
        let pattern = self.pattern.as_ref().map_or("*", Pattern::as_str);
        let deadline = Instant::now() + PATIENCE;
        let mut trouble = None;
        loop {
            let Known { epoch, version, .. } = *known;
            let mut requested = access.request(Request::Watch { pattern: pattern.to_owned(), epoch, version });
            let reply = loop {
                let next = if known.is_begun {
                    requested.next().await
                } else {
                    let late = |_| too_late(PATIENCE, trouble.take());
                    timeout_at(deadline, requested.next()).await.map_err(late)?
                };
                match next {
                    Reply::Trouble(what) => {
                        if known.is_begun && trouble.as_ref() != Some(&what) {
                            say(&harmless(&format!("{what}: what changes meanwhile is told afterwards")));
                        }
                        trouble = Some(what);
                    }
                    reply if reply.is_final() => break reply,
                    _ => {}
                }
            };
            match reply {
                Reply::Watched { epoch, version, whole, lines } => {
                    (known.epoch, known.version) = (epoch, version);
                    trouble = None;
                    let lines = known.learn(whole, lines, self.json)?;
                    // A reader may be slow, and the connection must not wait for it.
                    let write = move || {
                        for line in lines {
                            if !print(&line)? {
                                return Ok::<_, Failure>(false);
                            }
                        }
                        Ok(true)
                    };
                    let written = tokio::task::spawn_blocking(write).await;
                    if !written.map_err(|_| Failure::refused("cannot write to standard output"))?? {
                        return Ok(false);
                    }
                }
                Reply::Gone { .. } | Reply::Yield => return Ok(true),
                Reply::Failed(failure) => return Err(failure),
                Reply::Refused { reason, detail } => return Err(refusal(reason, "the directory", detail.as_deref())),
                _ => return Err(unexpected()),
            }
        }
    }
}

/// What was printed so far.
#[derive(Default)]
struct Known {
    epoch: u64,
    version: u64,
    is_begun: bool,
    clients: HashMap<[u8; 16], Seen>,
}

impl Known {
    /// The lines about what is new.
    fn learn(&mut self, whole: bool, mut lines: Vec<Seen>, as_json: bool) -> Result<Vec<String>, Failure> {
        let time = rfc3339(now());
        let mut texts = Vec::new();
        let mut tell = |what, seen: &Seen, former: Option<&str>, width| {
            texts.push(if as_json {
                event(what, seen, former, &time)?
            } else {
                change(what, seen, former, &time, width)
            });
            Ok::<_, Failure>(())
        };
        if !core::mem::replace(&mut self.is_begun, true) {
            let mut first: Vec<(Name, Seen)> =
                lines.into_iter().filter_map(|seen| Some((Name::parse(&seen.name).ok()?, seen))).collect();
            first.sort_by(|(a, _), (b, _)| a.key().cmp(b.key()));
            let width = first.iter().map(|(name, _)| name.as_str().chars().count()).max().unwrap_or_default();
            for (_, seen) in first {
                tell(What::Present, &seen, None, width)?;
                self.clients.insert(seen.id, seen);
            }
            return Ok(texts);
        }
        if whole {
            let named: std::collections::HashSet<_> = lines.iter().map(|seen| seen.id).collect();
            let gone = self.clients.values().filter(|seen| !named.contains(&seen.id)).cloned();
            lines.extend(gone.map(|seen| Seen { online: false, revoked: true, ..seen }));
        }
        for seen in lines {
            if seen.revoked {
                if self.clients.remove(&seen.id).is_some() {
                    tell(What::Revoked, &seen, None, 0)?;
                }
                continue;
            }
            let former = self.clients.insert(seen.id, seen.clone());
            match &former {
                None => tell(What::Enrolled, &Seen { online: false, ..seen.clone() }, None, 0)?,
                Some(former) if former.name != seen.name => tell(What::Renamed, &seen, Some(&former.name), 0)?,
                Some(_) => {}
            }
            let was_online = former.is_some_and(|former| former.online);
            match (was_online, seen.online) {
                (false, true) => tell(What::Online, &seen, None, 0)?,
                (true, false) => tell(What::Offline, &seen, None, 0)?,
                _ => {}
            }
        }
        Ok(texts)
    }
}

fn event(event: What, seen: &Seen, former: Option<&str>, time: &str) -> Result<String, Failure> {
    let line = Line { name: &seen.name, online: seen.online, last_seen: seen.last_seen.map(rfc3339) };
    json(&Event { event, time: time.to_owned(), line, former })
}

/// As people read it. Who is there at first stands as without --watch.
fn change(what: What, seen: &Seen, former: Option<&str>, time: &str, width: usize) -> String {
    let Seen { name, online, last_seen, .. } = seen;
    let line = Presence { name: name.clone(), online: *online, last_seen: *last_seen };
    match what {
        What::Present => plain(&line, width),
        What::Online | What::Offline => format!("{time}  {}", plain(&line, 0)),
        What::Enrolled => format!("{time}  {}  enrolled", harmless(name)),
        What::Revoked => format!("{time}  {}  revoked", harmless(name)),
        What::Renamed => format!("{time}  {}  renamed, was {}", harmless(name), harmless(former.unwrap_or_default())),
    }
}

/// Those whom the pattern selects, sorted by name.
pub(super) fn select(lines: Vec<Presence>, pattern: Option<&Pattern>) -> Vec<(Name, Presence)> {
    // A name that is none would not have been admitted by an honest server.
    let mut known: Vec<(Name, Presence)> =
        lines.into_iter().filter_map(|line| Some((Name::parse(&line.name).ok()?, line))).collect();
    known.retain(|(name, _)| pattern.is_none_or(|pattern| pattern.matches(name)));
    known.sort_by(|(a, _), (b, _)| a.key().cmp(b.key()));
    known
}

/// Characters of the longest name.
pub(super) fn width(known: &[(Name, Presence)]) -> usize {
    known.iter().map(|(name, _)| name.as_str().chars().count()).max().unwrap_or_default()
}

fn object(line: &Presence) -> Result<String, Failure> {
    json(&Line { name: &line.name, online: line.online, last_seen: line.last_seen.map(rfc3339) })
}

/// One of them as people read it, the name in so many characters.
pub(super) fn plain(line: &Presence, width: usize) -> String {
    let name = harmless(&line.name);
    match (line.online, line.last_seen) {
        (true, _) => format!("{name:width$}  online"),
        (false, Some(seen)) => format!("{name:width$}  offline, last seen {}", rfc3339(seen)),
        (false, None) => format!("{name:width$}  offline, never seen"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: u8, name: &str, online: bool) -> Seen {
        let last_seen = (!online).then_some(1_700_000_000);
        Seen { id: [id; 16], name: name.to_owned(), online, last_seen, revoked: false }
    }

    #[test]
    fn changes_are_told_as_what_is_different_from_what_was_printed() {
        let mut known = Known::default();
        let learn = |known: &mut Known, whole, lines: &[Seen]| {
            let lines = known.learn(whole, lines.to_vec(), false).unwrap();
            let words = lines.iter().map(|line| line.split_once("Z  ").map_or(line.as_str(), |(_, words)| words));
            words.map(str::to_owned).collect::<Vec<_>>().join(", ")
        };
        let (bob, alice) = (seen(1, "bob", true), seen(2, "Alice", false));
        let first = known.learn(true, vec![bob.clone(), alice.clone()], false).unwrap();
        assert_eq!(first, ["Alice  offline, last seen 2023-11-14T22:13:20Z", "bob    online"]);
        assert_eq!(learn(&mut known, false, &[]), "");
        let away = Seen { online: false, last_seen: Some(1_700_000_001), ..bob.clone() };
        assert_eq!(
            learn(&mut known, false, &[away.clone(), seen(3, "carol", true), seen(4, "dora", false)]),
            "bob  offline, last seen 2023-11-14T22:13:21Z, carol  enrolled, carol  online, dora  enrolled"
        );
        // When somebody was seen who came and went at once is nothing that happened.
        assert_eq!(learn(&mut known, false, &[Seen { last_seen: Some(1_800_000_000), ..away }]), "");
        let revoked = Seen { revoked: true, ..seen(4, "dora", false) };
        assert_eq!(learn(&mut known, false, &[revoked.clone(), revoked]), "dora  revoked");
        assert_eq!(learn(&mut known, false, &[seen(3, "caroline", true)]), "caroline  renamed, was carol");
        // Everything anew, from another holder of the home or after a pause: what is different is told.
        assert_eq!(learn(&mut known, true, &[bob, seen(3, "caroline", true)]), "bob  online, Alice  revoked");
    }

    #[test]
    fn events_are_objects_that_scripts_can_select_from() {
        let mut known = Known::default();
        known.learn(true, Vec::new(), true).unwrap();
        let lines = known.learn(false, vec![seen(1, "s\u{1b}1", false)], true).unwrap();
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!((&line["event"], &line["online"]), (&"enrolled".into(), &false.into()));
        assert_eq!((&line["last_seen"], &line["former"]), (&"2023-11-14T22:13:20Z".into(), &serde_json::Value::Null));
        assert!(line["time"].is_string() && lines.len() == 1 && !lines[0].contains('\u{1b}'));
    }

    fn presence(name: &str) -> Presence {
        Presence { name: name.to_owned(), online: false, last_seen: None }
    }

    #[test]
    fn names_are_sorted_as_they_are_compared_and_what_is_none_is_left_out() {
        let lines =
            ["Zora", "bob", "\u{1b}[2J", "Ärger", "Bobby", "x\u{202e}y", "alice", "a\nb", "Ольга"].map(presence);
        let shown = |pattern: Option<&str>| {
            let pattern = pattern.map(|pattern| Pattern::parse(pattern).unwrap());
            let known = select(lines.to_vec(), pattern.as_ref());
            known.into_iter().map(|(name, _)| name.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(shown(None), ["alice", "bob", "Bobby", "Zora", "Ärger", "Ольга"]);
        assert_eq!(shown(Some("B*")), ["bob", "Bobby"]);
        assert_eq!(shown(Some("ОЛЬ[г-д]*")), ["Ольга"]);
        assert_eq!(shown(Some("ä*")), ["Ärger"]);
        assert!(!plain(&presence("\u{1b}]52;c;aGk=\u{7}"), 0).contains('\u{1b}'));
    }
}
