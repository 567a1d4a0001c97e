//! `ossicle token`: what admits new clients, made, listed and ended by the operator.

use core::ops::RangeInclusive;
use core::time::Duration;

use serde::Serialize;

use super::{DataArg, harmless, json, print, rfc3339, say};
use crate::control::{self, TokenLine, Wanted};
use crate::endpoint::Failure;
use crate::name::Pattern;
use crate::store::TokenId;

/// Seconds for which a token may admit clients: up to a year.
const TTL: RangeInclusive<u64> = 1..=365 * 24 * 60 * 60;

/// Make, list or end the tokens that admit new clients
///
/// On the server's machine, by its operator, whether the server runs or not. A token is part of the URL that a new client
/// is given; a server with the policy `token` (see `ossicle serve --enroll`) admits nobody without one.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle token new                                   a URL that admits one client within 24 hours
  ossicle token new --uses 50 --ttl 1h --name 'sensor-*'
  ossicle token list --data /var/lib/ossicle
  ossicle token list --json | jq -r 'select(.uses > 10) | .id'
  ossicle token revoke 0123456789abcdef")]
pub struct Token {
    /// What to do
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with tokens.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Action {
    /// Make a token, and print the URL with it: nothing shows that URL again
    New(New),
    /// Show the tokens that admit somebody, never their secrets
    List(List),
    /// End a token: it admits nobody any more; who was admitted by it stays
    Revoke(Revoke),
}

/// A token to be made.
#[derive(Clone, Debug, clap::Args)]
pub struct New {
    /// How many clients it admits, at most 1000000
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub uses: u32,
    /// How long it admits them, at most a year: 10m, 1h, 7d
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = ttl)]
    pub ttl: Duration,
    /// The names that it admits, a glob; without it any
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::parse)]
    pub name: Option<Pattern>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
    /// Print one line of JSON: `url`, `id`, `uses`, `expires` (RFC 3339), `name`
    #[arg(long)]
    pub json: bool,
}

/// Which tokens to list.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
    /// One JSON object a line: `id`, `uses` (null: without end), `expires` (RFC 3339), `name`, `printed` (by `serve`)
    #[arg(long)]
    pub json: bool,
}

/// The token to end.
#[derive(Clone, Debug, clap::Args)]
pub struct Revoke {
    /// Its id, as `list` shows it
    #[arg(value_parser = id)]
    pub id: TokenId,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
    /// Print one line of JSON: `revoked`, its id
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Made<'m> {
    url: &'m str,
    id: String,
    uses: u32,
    expires: String,
    name: Option<&'m str>,
}

#[derive(Serialize)]
struct Line<'l> {
    id: String,
    uses: Option<u32>,
    expires: String,
    name: Option<&'l str>,
    printed: bool,
}

#[derive(Serialize)]
struct Revoked {
    revoked: String,
}

impl Token {
    pub(super) async fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::New(new) => new.run().await,
            Action::List(list) => list.run().await,
            Action::Revoke(revoke) => revoke.run().await,
        }
    }
}

impl New {
    async fn run(self) -> Result<(), Failure> {
        let name = self.name.as_ref().map(|pattern| pattern.as_str());
        let wanted = Wanted { uses: self.uses, ttl: self.ttl.as_secs(), name: name.map(str::to_owned) };
        let issued = control::new_token(&self.data.data, wanted).await.map_err(failed)?;
        if self.json {
            let (id, expires) = (hex::encode(issued.id), rfc3339(issued.expires));
            print(&json(&Made { url: &issued.url, id, uses: self.uses, expires, name })?)?;
        } else {
            print(&issued.url)?;
            say(&format!(
                "ossicle: token {} admits {} until {}",
                hex::encode(issued.id),
                admitted(Some(self.uses), name),
                rfc3339(issued.expires)
            ));
        }
        match issued.enroll.as_str() {
            "closed" => {
                say("ossicle: this server's policy is closed, so nobody can use it: `ossicle settings enroll=token`")
            }
            "open" => say("ossicle: this server's policy is open: it admits whoever has no token, too"),
            _ => {}
        }
        Ok(())
    }
}

impl List {
    async fn run(self) -> Result<(), Failure> {
        for TokenLine { id, name, uses, expires, printed } in control::tokens(&self.data.data).await.map_err(failed)? {
            let (id, expires, name) = (hex::encode(id), rfc3339(expires), name.as_deref());
            let is_read = if self.json {
                print(&json(&Line { id, uses, expires, name, printed })?)?
            } else {
                let printed = if printed { ", printed by serve" } else { "" };
                print(&format!("{id}  {} until {expires}{printed}", admitted(uses, name)))?
            };
            if !is_read {
                break;
            }
        }
        Ok(())
    }
}

impl Revoke {
    async fn run(self) -> Result<(), Failure> {
        control::end_token(&self.data.data, &self.id).await.map_err(failed)?;
        let revoked = hex::encode(self.id);
        if self.json {
            print(&json(&Revoked { revoked })?)?;
        } else {
            print(&format!("{revoked} admits nobody any more"))?;
        }
        Ok(())
    }
}

fn failed(error: anyhow::Error) -> Failure {
    Failure::refused(format!("{error:#}"))
}

/// Whom a token admits.
fn admitted(uses: Option<u32>, name: Option<&str>) -> String {
    let clients = match uses {
        None => "any number of clients".to_owned(),
        Some(1) => "1 client".to_owned(),
        Some(uses) => format!("{uses} clients"),
    };
    match name {
        Some(name) => format!("{clients} named {}", harmless(name)),
        None => clients,
    }
}

fn ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if TTL.contains(&ttl.as_secs()) { Ok(ttl) } else { Err("give 1s to 365d".to_owned()) }
}

fn id(text: &str) -> Result<TokenId, String> {
    let mut id = TokenId::default();
    let sentence = "an id has 16 hex digits: copy it from `ossicle token list`";
    hex::decode_to_slice(text, &mut id).map(|()| id).map_err(|_| sentence.to_owned())
}
