//! `ossicle channel`: which connections can be resumed without RSA, and an end to that, by their client or the operator.

use std::path::PathBuf;

use serde::Serialize;

use super::{Asking, HomeArg, harmless, json, print, refusal, rfc3339, unexpected};
use crate::clock::system_date;
use crate::control;
use crate::endpoint::{Failure, Reply, Request};
use crate::name::Name;

/// List or expire the channels that clients resume
///
/// A channel is what a connection leaves at both ends so that the next one needs no RSA, for 7 days at most. With a home:
/// its own. With --data, on the server's machine: everybody's, or those of NAME.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle channel list
  ossicle channel expire                              the next connection makes a full handshake
  ossicle channel list --data ./ossicle-data          everybody's, by the operator, whether the server runs or not
  ossicle channel expire sensor-07 --data ./ossicle-data")]
pub struct Channel {
    /// What to do
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with channels.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Action {
    /// Show the channels that could be resumed now
    List(Which),
    /// End them: the next connection makes a full handshake, the present one stands
    Expire(Which),
}

/// Whose channels.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// Whose; without it everybody's
    #[arg(value_parser = Name::parse, requires = "data")]
    pub name: Option<Name>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: act as its operator
    // Not from the environment, as in `revoke`.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// One JSON object a line: `name`, `id`, `expires` (RFC 3339), `kept`; of `expire` one with `expired`, their number
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    id: String,
    expires: String,
    /// Whether this home has the channel; of no meaning to an operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<bool>,
}

#[derive(Serialize)]
struct Expired {
    expired: u64,
}

impl Channel {
    pub(super) async fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::List(which) => which.list().await,
            Action::Expire(which) => which.expire().await,
        }
    }
}

impl Which {
    fn show(&self, name: &str, id: &[u8; 16], expires: u64, kept: Option<bool>) -> Result<bool, Failure> {
        let (id, expires) = (hex::encode(id), rfc3339(expires));
        if self.json {
            return print(&json(&Line { name, id, expires, kept })?);
        }
        let here = if kept == Some(false) { ", not kept here" } else { "" };
        print(&format!("{}  {id}  until {expires}{here}", harmless(name)))
    }

    async fn list(&self) -> Result<(), Failure> {
        if let Some(data) = &self.data {
            let channels = control::channels(data, self.name.as_ref().map(Name::as_str)).await;
            for line in channels.map_err(|error| Failure::refused(format!("{error:#}")))? {
                if !self.show(&line.name, &line.id, line.expires, None)? {
                    break;
                }
            }
            return Ok(());
        }
        let home = self.home.open()?;
        let name = home.profile()?.name;
        match self.ask(Request::Channels).await? {
            Reply::Channels(channels) => {
                let now = system_date();
                for channel in channels {
                    let expires = now.saturating_add(channel.valid_for.into());
                    if !self.show(&name, &channel.id, expires, Some(channel.kept))? {
                        break;
                    }
                }
                Ok(())
            }
            Reply::Refused { reason, detail } => Err(refusal(reason, "the server", detail.as_deref())),
            _ => Err(unexpected()),
        }
    }

    async fn expire(&self) -> Result<(), Failure> {
        let expired = if let Some(data) = &self.data {
            let expired = control::expire_channels(data, self.name.as_ref().map(Name::as_str)).await;
            expired.map_err(|error| Failure::refused(format!("{error:#}")))?
        } else {
            let held = match self.ask(Request::Channels).await? {
                Reply::Channels(channels) => channels.len(),
                Reply::Refused { reason, detail } => return Err(refusal(reason, "the server", detail.as_deref())),
                _ => return Err(unexpected()),
            };
            match self.ask(Request::ExpireChannels).await? {
                Reply::Done => u64::try_from(held).unwrap_or(u64::MAX),
                Reply::Refused { reason, detail } => return Err(refusal(reason, "the server", detail.as_deref())),
                _ => return Err(unexpected()),
            }
        };
        if self.json {
            print(&json(&Expired { expired })?)?;
        } else {
            let whose = match (&self.data, &self.name) {
                (None, _) => "this client",
                (Some(_), Some(name)) => name.as_str(),
                (Some(_), None) => "everybody",
            };
            print(&format!("{expired} channels expired: the next connection of {whose} makes a full handshake"))?;
        }
        Ok(())
    }

    async fn ask(&self, request: Request) -> Result<Reply, Failure> {
        let home = self.home.open()?;
        let mut asking = Asking::new(&home, "channel");
        let answer = asking.ask(request).await;
        asking.close().await;
        answer
    }
}
