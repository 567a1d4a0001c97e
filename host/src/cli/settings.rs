//! `ossicle settings`: what a server that runs was started with, and another value for what may change meanwhile.

use std::collections::BTreeMap;
use std::path::Path;

use super::serve::show;
use super::{DataArg, harmless, say};
use crate::control;
use crate::endpoint::Failure;
use crate::settings::{Effective, FILE, Mistakes};

/// Show or change the settings of a server that runs
///
/// On the server's machine, by its operator. KEY is the name that the setting has in a file of settings (`ossicle serve
/// --help` explains them all), VALUE is written as there, without quotes. All of the changes are made, or none; connected
/// clients are told of a new heartbeat or timeout. They hold until the server ends: the file of settings stays as it is.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle settings --data /var/lib/ossicle            every setting, and where it came from
  ossicle settings heartbeat                          this one
  ossicle settings heartbeat=30s timeout=90s          for whoever is connected, too
  ossicle settings enroll=closed                      nobody enrols any more
  ossicle settings --json | jq -r '.settings[] | select(.source == \"operator\") | .key'

Changes while it runs: enroll, heartbeat, timeout, hello-within, handshake-within, farewell-within, key-age, channel-age,
queue-age, message-rate, message-burst, handshake-rate, handshake-burst; and for whoever connects from then on
mailbox-messages, mailbox-bytes, mailbox-total, mailbox-owed. The others need a restart. Exit code 2 for a setting or value
that there is not, 3 if no server runs.")]
pub struct Settings {
    /// The settings to change, or only the names of those to show; without any, all are shown
    #[arg(value_name = "KEY[=VALUE]")]
    pub settings: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
    /// Print them as one line of JSON: `file`, `settings`, each with `key`, `value`, `source`, `origin`
    #[arg(long)]
    pub json: bool,
}

impl Settings {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (changes, shown) = self.parsed()?;
        let changed = !changes.is_empty();
        let data = &self.data.data;
        let mut effective = match control::settings(data, changes).await {
            Ok(Some(effective)) => effective,
            Ok(None) => {
                return Err(Failure::unreached(format!(
                    "no server runs on {}: name its directory with --data, or see what it would start with by `ossicle \
                     serve --check`",
                    data.display()
                )));
            }
            Err(error) => {
                return Err(match error.downcast::<Mistakes>() {
                    Ok(mistakes) => Failure::usage(format!("nothing was changed: {mistakes}")),
                    Err(error) => Failure::refused(format!("{error:#}")),
                });
            }
        };
        if !shown.is_empty() {
            if let Some(name) = shown.iter().find(|name| effective.settings.iter().all(|setting| setting.key != **name))
            {
                return Err(Failure::usage(format!(
                    "there is no setting `{name}`: see them all with `ossicle settings`"
                )));
            }
            effective.settings.retain(|setting| shown.contains(&setting.key));
        }
        show(&effective, self.json)?;
        if changed {
            say(&format!(
                "ossicle: this holds until the server ends; to keep it, write it into {}",
                file(&effective, data)
            ));
        }
        Ok(())
    }

    /// What is to be changed, and what to be shown.
    fn parsed(&self) -> Result<(BTreeMap<String, String>, Vec<String>), Failure> {
        let (mut changes, mut shown) = (BTreeMap::new(), Vec::new());
        for setting in &self.settings {
            let (key, value) = match setting.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (setting.as_str(), None),
            };
            // Spaces around the sign are what a line of the file has.
            let key = key.trim();
            shown.push(key.to_owned());
            let Some(value) = value else { continue };
            if changes.insert(key.to_owned(), value.trim().to_owned()).is_some() {
                return Err(Failure::usage(format!("{key} is given twice: give it once")));
            }
        }
        Ok((changes, shown))
    }
}

/// Where to write what is to be kept.
fn file(effective: &Effective, data: &Path) -> String {
    harmless(&effective.file.clone().unwrap_or_else(|| data.join(FILE).display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(settings: &[&str]) -> Result<(BTreeMap<String, String>, Vec<String>), Failure> {
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        Settings { settings, data: DataArg { data: ".".into() }, json: false }.parsed()
    }

    #[test]
    fn the_help_names_what_changes_while_the_server_runs() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            _settings: Settings,
        }
        let help = <Cli as clap::CommandFactory>::command().get_after_help().map(ToString::to_string).unwrap();
        let named =
            help.split("Changes while it runs: ").nth(1).and_then(|text| text.split(". The others").next()).unwrap();
        let named: Vec<&str> = named.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect();
        for chosen in crate::settings::defaults() {
            assert_eq!(named.contains(&chosen.about.name), chosen.about.live, "{}", chosen.about.name);
        }
    }

    #[test]
    fn a_setting_is_shown_or_changed_and_once_only() {
        let (changes, shown) = parsed(&["heartbeat", "timeout=1m 30s", "advertise = a=b"]).unwrap();
        assert_eq!(shown, ["heartbeat", "timeout", "advertise"]);
        let expected = [("advertise", "a=b"), ("timeout", "1m 30s")];
        assert_eq!(changes, expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        assert_eq!(parsed(&["timeout=1m", "timeout=2m"]).unwrap_err().code, 2);
    }
}
