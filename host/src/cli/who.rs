//! `ossicle who`: everybody on the server, and who is there.

use serde::Serialize;

use super::{Asking, HomeArg, harmless, json, print, refusal, rfc3339, unexpected};
use crate::endpoint::{Failure, Presence, Reply, Request};
use crate::name::{Name, Pattern};

/// List clients, and whether they are online
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle who
  ossicle who 'sensor-*' --json")]
pub struct Who {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Only clients with such names ('*', '?' and '[...]')
    #[arg(value_parser = Pattern::parse)]
    pub pattern: Option<Pattern>,
    /// One JSON object a line: `name`, `online`, `last_seen` (RFC 3339, or null)
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    online: bool,
    last_seen: Option<String>,
}

impl Who {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let home = self.home.open()?;
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
