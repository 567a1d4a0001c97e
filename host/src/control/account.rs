//! Accounts as an operator makes, changes and lists them. A password never comes here: only what it is verified with.

use std::path::Path;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{Answer, Command, Door, Page, ask};
use crate::clock::system_date;
use crate::name::Name;
use crate::server::Server;
use crate::store::{AccountChange, AccountError, SharedStore, Verifier};

/// Accounts of one page: they fit into one line.
const PAGE: usize = 64;

/// What an operator wants of an account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccountAction {
    /// That there is one of this name, with this password.
    Add(Verifier),
    /// That it has this password, and the channels of its client end.
    Password(Verifier),
    /// That it takes no password.
    Lock,
    /// That it takes its password again.
    Unlock,
    /// That it is not there any more. Its client stays.
    Remove,
}

/// An account. Nobody can enter by what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountLine {
    /// Its name.
    pub name: String,
    /// Whether it takes no password.
    pub locked: bool,
    /// When it was made or changed, in seconds since 1970.
    pub changed: u64,
    /// Whether it has a client: somebody has entered by it, or it was added to one.
    pub enrolled: bool,
}

/// Does this with the account of this name: at the server that runs on `data`, or in the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn account(data: &Path, name: &Name, action: AccountAction) -> anyhow::Result<()> {
    match Door::open(data).await? {
        Door::Server(data) => {
            ask(&data, &Command::Account { name: name.as_str().to_owned(), action }).await.map(|_| ())
        }
        Door::Store(store) => change(&store, name, action).await,
    }
}

pub(super) async fn change_here(server: &Server, name: &str, action: AccountAction) -> anyhow::Result<()> {
    let name = Name::parse(name)?;
    let is_password = matches!(action, AccountAction::Password(_));
    change(&server.store, &name, action).await?;
    if is_password && let Some(client) = server.store.client_by_name(&name).await? {
        // Also those that are not in the store yet.
        server.expire_channels(&client.id).await?;
    }
    Ok(())
}

async fn change(store: &SharedStore, name: &Name, action: AccountAction) -> anyhow::Result<()> {
    let (change, done) = match action {
        AccountAction::Add(verifier) => {
            return match store.add_account(name.clone(), verifier, system_date()).await {
                Ok(()) => {
                    info!(%name, "an account was added by the operator");
                    Ok(())
                }
                Err(AccountError::Exists) => {
                    bail!(
                        "{name} has an account already: give it another password with `ossicle account passwd {name}`"
                    )
                }
                Err(error) => Err(error.into()),
            };
        }
        AccountAction::Password(verifier) => (AccountChange::Password(verifier), "has another password"),
        AccountAction::Lock => (AccountChange::Locked(true), "takes no password"),
        AccountAction::Unlock => (AccountChange::Locked(false), "takes its password again"),
        AccountAction::Remove => (AccountChange::Removed, "is gone"),
    };
    if !store.change_account(name, change, system_date()).await? {
        bail!("there is no account named {name} here: see them all with `ossicle account list`");
    }
    info!(%name, "an account {done}, by the operator");
    Ok(())
}

/// The accounts of the server that runs on `data`, or of the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn accounts(data: &Path) -> anyhow::Result<Vec<AccountLine>> {
    let door = Door::open(data).await?;
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = match &door {
            Door::Store(store) => list(store, after.as_deref()).await?,
            Door::Server(data) => match ask(data, &Command::Accounts { after }).await? {
                Answer::Accounts(page) => page,
                _ => bail!("the server's answer is of another version"),
            },
        };
        all.extend(page.part);
        match page.more {
            Some(more) => after = Some(more),
            None => return Ok(all),
        }
    }
}

pub(super) async fn list(store: &SharedStore, after: Option<&str>) -> anyhow::Result<Page<Vec<AccountLine>>> {
    let after = after.map(Name::parse).transpose()?;
    let accounts = store.accounts(after.as_ref(), PAGE).await?;
    let more = accounts.last().filter(|_| accounts.len() == PAGE).map(|last| last.name.clone());
    let mut part = Vec::with_capacity(accounts.len());
    for account in accounts {
        let enrolled = store.client_by_name(&Name::parse(&account.name)?).await?.is_some();
        part.push(AccountLine { name: account.name, locked: account.locked, changed: account.changed_at, enrolled });
    }
    Ok(Page { part, more })
}
