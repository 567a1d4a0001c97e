//! `ossicle account`: names that people enter by a password, for the operator.

use serde::Serialize;
use tokio::task::spawn_blocking;

use super::{DataArg, harmless, json, password, print, rfc3339};
use crate::control::{self, AccountAction, AccountLine};
use crate::endpoint::Failure;
use crate::name::Name;
use crate::store::Verifier;

/// Make, change or list accounts: names that people enter by a password
///
/// On the server's machine, by its operator, whether the server runs or not. Whoever knows the password of an account enters
/// with `ossicle init --name NAME --password URL` and a key that he makes there; others see that the key of NAME has changed,
/// and the former key is not admitted any more. An account keeps its name for its owner, and admits him whatever the policy
/// for enrolment is. Passwords are asked for on the terminal, or read as one line of standard input.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle account add alice --data /var/lib/ossicle   a new account, or a password for the client of that name
  pwgen 16 1 | tee alice.txt | ossicle account add alice
  ossicle account passwd alice                        another password; whoever is in stays in
  ossicle account lock alice                          no password is taken; her key goes on, `ossicle revoke` ends it
  ossicle account list --json | jq -r 'select(.locked) | .name'")]
pub struct Account {
    /// What to do
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with accounts.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Action {
    /// Make an account; a client of that name gets a password by it
    Add(Which),
    /// Give an account another password, and end the channels of its client
    Passwd(Which),
    /// Take no password for an account any more; the key of its client goes on
    Lock(Which),
    /// Take the password of an account again
    Unlock(Which),
    /// Take an account away; its client stays
    Remove(Which),
    /// Show all accounts, never anything about their passwords
    List(List),
}

/// An account.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// Its name
    #[arg(value_parser = Name::parse)]
    pub name: Name,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
}

/// How to list them.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub data: DataArg,
    /// One JSON object a line: `name`, `locked`, `enrolled` (a client has that name), `changed` (RFC 3339)
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    locked: bool,
    enrolled: bool,
    changed: String,
}

impl Account {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (which, action, done) = match self.action {
            Action::List(list) => return list.run().await,
            Action::Add(which) => {
                let verifier = new_password(&which.name).await?;
                (which, AccountAction::Add(verifier), "has an account")
            }
            Action::Passwd(which) => {
                let verifier = new_password(&which.name).await?;
                (which, AccountAction::Password(verifier), "has another password")
            }
            Action::Lock(which) => (
                which,
                AccountAction::Lock,
                "enters by no password any more; an enrolled key goes on: see `ossicle revoke`",
            ),
            Action::Unlock(which) => (which, AccountAction::Unlock, "enters by the password again"),
            Action::Remove(which) => (which, AccountAction::Remove, "has no account any more"),
        };
        control::account(&which.data.data, &which.name, action).await.map_err(failed)?;
        print(&format!("{} {done}", which.name)).map(drop)
    }
}

impl List {
    async fn run(self) -> Result<(), Failure> {
        for AccountLine { name, locked, changed, enrolled } in
            control::accounts(&self.data.data).await.map_err(failed)?
        {
            let changed = rfc3339(changed);
            let is_read = if self.json {
                print(&json(&Line { name: &name, locked, enrolled, changed })?)?
            } else {
                let state = match (locked, enrolled) {
                    (true, _) => "locked",
                    (false, true) => "open",
                    (false, false) => "open, nobody has entered yet",
                };
                print(&format!("{}  {state}, changed {changed}", harmless(&name)))?
            };
            if !is_read {
                break;
            }
        }
        Ok(())
    }
}

async fn new_password(name: &Name) -> Result<Verifier, Failure> {
    let password = password::ask_new(name.as_str()).await?;
    let made = spawn_blocking(move || password.verifier()).await;
    made.ok()
        .flatten()
        .ok_or_else(|| Failure::refused("the password cannot be hashed: is there memory and randomness?"))
}

fn failed(error: anyhow::Error) -> Failure {
    Failure::refused(format!("{error:#}"))
}
