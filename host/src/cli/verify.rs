//! `ossicle verify`: the safety number with a peer, and the acceptance of a changed key.

use core::fmt::Write as _;

use serde::Serialize;

use super::{Asking, HomeArg, harmless, json, key_changed, print, refusal, unexpected};
use crate::endpoint::{Failure, Reply, Request, Verification};
use crate::name::Name;

/// Show the safety number with somebody, or accept a key that changed
///
/// The number is the same for both of you if nobody is in between: compare it with NAME by another way, by voice say.
/// Ends with exit code 1 if the key of NAME is not the pinned one; nothing is sent to NAME and nothing is taken from
/// there until --accept.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle verify bob
  ossicle verify bob --accept                    after bob has said that the new key is his
  ossicle verify bob --json | jq -r .safety_number")]
pub struct Verify {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// With whom
    #[arg(value_parser = Name::parse)]
    pub name: Name,
    /// Pin the key that the directory shows now; not if it has shown this home another one before
    #[arg(long)]
    pub accept: bool,
    /// One JSON object: `name`, `key`, `safety_number`, `accepted`, and for a changed key `new_key`, `new_safety_number`
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    key: String,
    safety_number: &'l str,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_safety_number: Option<&'l str>,
    accepted: bool,
}

impl Verify {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let home = self.home.open()?;
        let mut asking = Asking::new(&home, "verify");
        let answer = asking.ask(Request::Verify { name: self.name.as_str().to_owned(), accept: self.accept }).await;
        asking.close().await;
        let verified = match answer? {
            Reply::Verified(verified) => verified,
            Reply::Refused { reason, detail } => return Err(refusal(reason, self.name.as_str(), detail.as_deref())),
            _ => return Err(unexpected()),
        };
        print(&if self.json { object(&verified)? } else { plain(&verified, self.accept) })?;
        if verified.shown.is_some() && !verified.accepted {
            return Err(Failure::refused(key_changed(&verified.name)));
        }
        Ok(())
    }
}

fn object(verified: &Verification) -> Result<String, Failure> {
    let Verification { name, pinned, shown, accepted } = verified;
    json(&Line {
        name,
        key: hex::encode(pinned.fingerprint),
        safety_number: &pinned.safety_number,
        new_key: shown.as_ref().map(|shown| hex::encode(shown.fingerprint)),
        new_safety_number: shown.as_ref().map(|shown| shown.safety_number.as_str()),
        accepted: *accepted,
    })
}

/// What people compare, and what to do.
pub(super) fn plain(verified: &Verification, accept: bool) -> String {
    let name = harmless(&verified.name);
    let mut text = String::new();
    let mut key = |title: &str, key: &crate::endpoint::PinnedKey| {
        let (first, second) = halves(&key.safety_number);
        let fingerprint = hex::encode(key.fingerprint);
        // Writing into a string never fails.
        let _ = write!(
            text,
            "{title}\n  key            {fingerprint}\n  safety number  {first}\n                 {second}\n"
        );
    };
    let advice = match &verified.shown {
        None => {
            key(&name, &verified.pinned);
            if accept {
                "This is the key that was pinned: there is nothing to accept.".to_owned()
            } else {
                format!(
                    "Compare the safety number with {name} by another way: it is the same there if nobody is in between."
                )
            }
        }
        Some(shown) => {
            key(&format!("{name}, the pinned key"), &verified.pinned);
            key(&format!("{name}, the key that the server shows now"), shown);
            if verified.accepted {
                format!("The new key is accepted. Compare the new safety number with {name} by another way.")
            } else if accept {
                format!(
                    "NOTHING IS ACCEPTED: this is not the key that the server has shown here before. Ask {name} by \
                     another way, compare this safety number, and accept again only if it is right."
                )
            } else {
                format!("Ask {name} by another way whether the key was changed, and compare the new safety number.")
            }
        }
    };
    text.push_str(&advice);
    text
}

/// The number in two lines of six groups.
fn halves(number: &str) -> (&str, &str) {
    let middle = number.match_indices(' ').nth(5).map_or(number.len(), |(at, _)| at);
    let (first, second) = number.split_at_checked(middle).unwrap_or((number, ""));
    (first, second.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::PinnedKey;

    fn verification(changed: bool, accepted: bool) -> Verification {
        let number = "11111 22222 33333 44444 55555 66666 77777 88888 99999 00000 12345 67890".to_owned();
        let pinned = PinnedKey { id: [1; 16], fingerprint: [2; 32], safety_number: number };
        let shown =
            PinnedKey { fingerprint: [3; 32], safety_number: pinned.safety_number.replace('1', "9"), ..pinned.clone() };
        Verification { name: "bob".into(), pinned, shown: changed.then_some(shown), accepted }
    }

    #[test]
    fn people_see_old_and_new_and_what_to_do() {
        let same = plain(&verification(false, false), false);
        assert!(
            same.contains("11111 22222 33333 44444 55555 66666\n                 77777 88888 99999 00000"),
            "{same}"
        );
        assert!(same.contains("another way") && !same.contains("new"), "{same}");
        assert!(plain(&verification(false, false), true).contains("nothing to accept"));
        let changed = plain(&verification(true, false), false);
        assert!(changed.contains(&"02".repeat(32)) && changed.contains(&"03".repeat(32)), "{changed}");
        assert!(changed.contains("11111 22222") && changed.contains("99999 22222"), "{changed}");
        assert!(plain(&verification(true, true), true).contains("accepted"));
        assert!(plain(&verification(true, false), true).contains("NOTHING IS ACCEPTED"));
    }

    #[test]
    fn scripts_get_one_object() {
        let line = object(&verification(true, true)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["accepted"], true);
        assert_eq!(value["key"], "02".repeat(32));
        assert_eq!(value["new_key"], "03".repeat(32));
        assert!(!object(&verification(false, false)).unwrap().contains("new_key"));
    }
}
