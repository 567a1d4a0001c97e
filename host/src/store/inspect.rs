//! A look at a store or a home's state that changes nothing, for `doctor`: its version, its integrity, what it says.
//!
//! Where nobody has the file open it is read as it lies there, and SQLite makes no file beside it. Where a process has it
//! open, or left a write-ahead log behind, it is read as one reader more, which disturbs no writer.

use core::fmt::Write as _;
use core::time::Duration;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ossicle_core::Bundle;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};

use super::home::Profile;
use super::sqlite::sums;
use super::{home, sqlite};

/// Faults that are named; more say no more.
const MAX_FAULTS: u32 = 3;

/// Whose file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `home.db` of a client.
    Home,
    /// `store.db` of a server.
    Store,
}

impl Kind {
    /// The newest version that this program knows.
    pub fn newest(self) -> i64 {
        match self {
            Self::Home => i64::try_from(home::NEWEST).unwrap_or(i64::MAX),
            Self::Store => sqlite::KNOWN.1.into(),
        }
    }
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The version of its tables. 0 where there are none.
    pub version: i64,
    /// What SQLite's check found to be broken.
    pub faults: Vec<String>,
    /// What a home says of itself, if it says anything.
    pub home: Option<HomeFacts>,
    /// Clients that a server's store knows and that are not revoked.
    pub clients: Option<i64>,
}

/// What a home says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HomeFacts {
    /// Who it is.
    pub profile: Profile,
    /// The fingerprint of the identity key that its bundle was signed with, when that was made in seconds since 1970, whether the server has it.
    pub bundle: Option<([u8; 32], i64, bool)>,
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// It is no database, or not a whole one.
    #[error("{0}")]
    Damaged(String),
    /// It is a database of another program.
    #[error("it is a database of another program")]
    Foreign,
    /// It cannot be read.
    #[error("{0}")]
    Io(String),
}

impl From<rusqlite::Error> for InspectError {
    fn from(error: rusqlite::Error) -> Self {
        match error {
            rusqlite::Error::SqliteFailure(failure, _)
                if !matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) =>
            {
                Self::Io(error.to_string())
            }
            _ => Self::Damaged(error.to_string()),
        }
    }
}

/// Looks at the file at `path`. `live` says that a process has it open. Blocks for as long as reading all of it takes.
///
/// # Errors
/// [`InspectError`].
pub fn inspect(path: &Path, kind: Kind, live: bool) -> Result<Inspection, InspectError> {
    let db = open(path, live)?;
    let number = |pragma| db.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let version = number("user_version")?;
    let empty = db.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get::<_, bool>(0))?;
    if kind == Kind::Store && !empty && number("application_id")? != i64::from(sqlite::KNOWN.0) {
        return Err(InspectError::Foreign);
    }
    let check = if live { "quick_check" } else { "integrity_check" };
    let mut faults = Vec::new();
    db.pragma(None, check, MAX_FAULTS, |row| {
        faults.push(row.get::<_, String>(0)?);
        Ok(())
    })?;
    faults.retain(|fault| fault != "ok");
    let known = !empty && (1..=kind.newest()).contains(&version);
    let (mut facts, mut clients) = (None, None);
    match kind {
        Kind::Home if known => facts = home_facts(&db)?,
        Kind::Store if known => {
            if version == kind.newest() && faults.is_empty() {
                sums::register(&db)?;
                match sums::check_all(&db).map_err(InspectError::from) {
                    Ok(()) => {}
                    Err(InspectError::Damaged(fault)) => faults.push(fault),
                    Err(error) => return Err(error),
                }
            }
            let sql = "SELECT count(*) FROM client WHERE revoked_at IS NULL";
            clients = Some(db.query_row(sql, [], |row| row.get(0))?);
        }
        _ => {}
    }
    Ok(Inspection { version: if empty { 0 } else { version }, faults, home: facts, clients })
}

fn home_facts(db: &Connection) -> rusqlite::Result<Option<HomeFacts>> {
    let sql = "SELECT host, port, server_key, store_epoch, id, name, key_epoch, complete FROM profile";
    let profile = db.query_row(sql, [], |row| {
        Ok(Profile {
            host: row.get(0)?,
            port: row.get(1)?,
            server_key: row.get(2)?,
            store_epoch: row.get(3)?,
            id: row.get(4)?,
            name: row.get(5)?,
            key_epoch: row.get(6)?,
            complete: row.get(7)?,
        })
    });
    let Some(profile) = profile.optional()? else {
        return Ok(None);
    };
    let bundle = db.query_row("SELECT bundle, made, published = 1 FROM bundle", [], |row| {
        Ok((row.get::<_, Vec<u8>>(0)?, row.get(1)?, row.get(2)?))
    });
    let bundle = bundle.optional()?.and_then(|(bytes, made, published)| {
        let bundle = Bundle::decode(&bytes).ok()?;
        Some((bundle.key, made, published))
    });
    Ok(Some(HomeFacts { profile, bundle }))
}

fn open(path: &Path, live: bool) -> rusqlite::Result<Connection> {
    let read_only = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let has_log = Path::new(&log).metadata().is_ok_and(|log| log.len() > 0);
    let db = if live || has_log {
        Connection::open_with_flags(path, read_only)?
    } else {
        let mut uri = String::from("file:");
        for byte in path.as_os_str().as_bytes() {
            match byte {
                b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => uri.push(char::from(*byte)),
                byte => {
                    let _ = write!(uri, "%{byte:02x}");
                }
            }
        }
        uri.push_str("?immutable=1");
        Connection::open_with_flags(uri, read_only | OpenFlags::SQLITE_OPEN_URI)?
    };
    db.busy_timeout(Duration::from_secs(5))?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    db.pragma_update(None, "query_only", true)?;
    db.pragma_update(None, "trusted_schema", false)?;
    Ok(db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SqliteStore;
    use crate::store::home::HomeStore;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn looking_at_what_nobody_has_open_makes_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a ?%25#home.db");
        drop(HomeStore::open(&path).unwrap());
        let before = names(directory.path());
        let seen = inspect(&path, Kind::Home, false).unwrap();
        assert_eq!((seen.version, seen.faults.len(), seen.home), (Kind::Home.newest(), 0, None));
        assert_eq!(names(directory.path()), before);
    }

    #[test]
    fn a_store_that_is_in_use_is_read_beside_its_server() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(directory.path()).unwrap();
        let before = names(directory.path());
        let seen = inspect(&directory.path().join("store.db"), Kind::Store, true).unwrap();
        assert_eq!((seen.version, seen.faults.len(), seen.clients), (Kind::Store.newest(), 0, Some(0)));
        assert_eq!(names(directory.path()), before);
        drop(store);
    }

    #[test]
    fn newer_foreign_and_damaged_files_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        drop(SqliteStore::open(directory.path()).unwrap());
        let path = directory.path().join("store.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let newer = inspect(&path, Kind::Store, false).unwrap();
        assert_eq!((newer.version, newer.clients), (99, None));
        Connection::open(&path).unwrap().pragma_update(None, "application_id", 1).unwrap();
        assert!(matches!(inspect(&path, Kind::Store, false), Err(InspectError::Foreign)));
        std::fs::write(&path, [7; 8192]).unwrap();
        assert!(matches!(inspect(&path, Kind::Store, false), Err(InspectError::Damaged(_))));
        let absent = inspect(&directory.path().join("absent.db"), Kind::Store, false);
        assert!(matches!(absent, Err(InspectError::Io(_))), "{absent:?}");
    }
}
