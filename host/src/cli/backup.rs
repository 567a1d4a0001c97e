//! `ossicle backup` and `ossicle restore`: of a client's home, or by the operator of a server's data.

use std::path::PathBuf;

use super::{HomeArg, about, harmless, print, say};
use crate::backup::{self, BackupError};
use crate::endpoint::Failure;

/// Back an identity up, or a server
///
/// The file holds private keys: whoever reads it is that client, or that server. Keep it as you keep the home itself. It
/// never holds what would be dangerous twice: keys and chains of conversations, channels. A server may run meanwhile.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle backup alice.backup                              the identity in the home, and whom it knows
  ossicle backup server.backup --data /var/lib/ossicle     the data of a server, running or not")]
pub struct Backup {
    /// The file to write; it must not exist
    pub file: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: back the server up
    // Not from the environment, as in `revoke`.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// Restore an identity or a server from a backup
///
/// The file is checked to its last byte before anything changes. A restored identity makes new end-to-end keys at its next
/// connection; stop every copy of it first. A restored server knows nobody who enrolled, and no key that changed, since the
/// backup; its tokens are void, and its accounts take the passwords that they had then.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle restore alice.backup                             into a home that is empty or not there
  ossicle restore alice.backup --home DIR --replace        in the place of another, which is kept beside it
  ossicle restore server.backup --data /var/lib/ossicle")]
pub struct Restore {
    /// The file to read
    pub file: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: restore the server
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Put it in the place of what is there, which is kept beside it
    #[arg(long)]
    pub replace: bool,
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Exists(_) | BackupError::InTheWay(_) | BackupError::Kind { .. } => {
                Self::usage(error.to_string())
            }
            error => Self::refused(error.to_string()),
        }
    }
}

impl Backup {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let file = self.file.clone();
        let what = if let Some(data) = self.data {
            let done = tokio::task::spawn_blocking(move || backup::back_up_server(&data, &file)).await;
            finished(done)??;
            "a server: whoever reads it can pose as that server"
        } else {
            let home = self.home.open()?;
            let done = tokio::task::spawn_blocking(move || home.back_up(&file)).await;
            finished(done)??;
            "an identity: whoever reads it is this client"
        };
        print(&format!(
            "{} holds {what}. Keep it as secret as its source",
            harmless(&self.file.display().to_string())
        ))?;
        Ok(())
    }
}

impl Restore {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (file, replace) = (self.file.clone(), self.replace);
        let shown = harmless(&self.file.display().to_string());
        let restored = if let Some(data) = self.data {
            let restored = finished(
                tokio::task::spawn_blocking(move || {
                    let restore = || backup::restore_server(&file, &data, replace);
                    backup::restore_behind(&data, || backup::lock_server(&data), restore)
                })
                .await,
            )??;
            print(&format!("the server of {shown} is restored: start it with `ossicle serve`"))?;
            restored
        } else {
            let home = self.home.open()?;
            let restored = finished(tokio::task::spawn_blocking(move || home.restore(&file, replace)).await)??;
            print(&format!("the identity of {shown} is restored: it makes new keys at its next connection"))?;
            restored
        };
        if let Some(former) = restored.former {
            say(&format!("what was there is kept in {}", harmless(&former.display().to_string())));
        }
        let revoke = |names: Vec<String>, why: &str| {
            if !names.is_empty() {
                say(why);
            }
            for name in names {
                say(&format!("  {}", about("ossicle revoke", &harmless(&name), " --data DIR")));
            }
        };
        if !restored.accounts.is_empty() {
            say(
                "accounts that were changed since the backup, and take their former passwords again; change or lock them \
                 anew:",
            );
        }
        for name in restored.accounts {
            say(&format!("  {}", about("ossicle account passwd", &harmless(&name), " --data DIR")));
        }
        revoke(restored.revoked, "revoked since the backup, and admitted again now; revoke them anew:");
        revoke(
            restored.rekeyed,
            "with another key since the backup: the former one is admitted again, and the present one is not; revoke \
             them, and let them enrol anew:",
        );
        Ok(())
    }
}

fn finished<T>(done: Result<T, tokio::task::JoinError>) -> Result<T, Failure> {
    done.map_err(|_| Failure::refused("the work broke off: please report it"))
}
