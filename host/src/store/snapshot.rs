//! Copies of a store and of a home's state for a backup, and what a restored one must forget (PROTOCOL 8.4, 14).
//!
//! A copy holds what nobody can make again: who somebody is, whom he pinned, who was enrolled and revoked. It never holds
//! what would be dangerous twice: prekeys, chains in either direction, channels.

use std::path::Path;

use ossicle_core::Bundle;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, ffi, params};

use super::home::{HomeStore, HomeStoreError};
use super::sqlite::{KNOWN, Shared, connect, initialise, sums};
use super::{ClientId, StoreError, Verifier};

/// Copies the store of a server to `to`, without its channels: everything that was durable when it began, whether the
/// server runs or not. A server that runs is not held up, and goes on writing.
///
/// # Errors
/// [`StoreError::Busy`] while somebody who is no server of this version uses the data, and those of opening a store.
pub(crate) fn copy_store(data: &Path, to: &Path) -> Result<(), StoreError> {
    let shared = Shared::new(data);
    let lock = match shared.lock(&data.join("lock")) {
        Ok(lock) => Some(lock),
        Err(StoreError::Busy(_)) => None,
        Err(error) => return Err(error),
    };
    let copied = || -> rusqlite::Result<bool> {
        let db = connect(&data.join("store.db"))?;
        if lock.is_some() {
            if initialise(&db)?.is_none() {
                return Ok(false);
            }
        } else {
            // Whoever holds the lock has brought the tables up to date; nothing here is ours to write.
            db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
            match version(&db)? {
                (id, newer) if id == KNOWN.0 && newer > KNOWN.1 => return Ok(false),
                known if known == KNOWN => {}
                _ => return Err(busy()),
            }
        }
        db.execute("VACUUM INTO ?1", [path_text(to)?])?;
        let copy = Connection::open(to)?;
        scrub(&copy, "DELETE FROM channel")?;
        Ok(true)
    };
    match copied() {
        Ok(true) => Ok(()),
        Ok(false) => Err(StoreError::Newer(data.display().to_string())),
        Err(error) => Err(shared.classify(&error)),
    }
}

fn version(db: &Connection) -> rusqlite::Result<(i32, i32)> {
    db.query_row("SELECT application_id, user_version FROM pragma_application_id, pragma_user_version", [], |row| {
        Ok((row.get(0)?, row.get(1)?))
    })
}

fn busy() -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None)
}

/// Checks the restored store in `data`, and makes it forget: it is another store to its clients, no token admits anybody,
/// no channel is resumed.
///
/// # Errors
/// [`StoreError`] if it is damaged, of a newer version, or no store.
pub(crate) fn renew_store(data: &Path) -> Result<(), StoreError> {
    let shared = Shared::new(data);
    let renewed = || -> rusqlite::Result<Option<String>> {
        let db = connect(&data.join("store.db"))?;
        let fault: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if fault != "ok" {
            return Ok(Some(fault));
        }
        let Some(meta) = initialise(&db)? else { return Ok(None) };
        sums::check_all(&db)?;
        let mut store_epoch = meta.store_epoch;
        while store_epoch == meta.store_epoch {
            store_epoch = getrandom::u64().map_err(|_| rusqlite::Error::InvalidQuery)?.to_be_bytes();
        }
        let transaction = db.unchecked_transaction()?;
        transaction.execute("UPDATE meta SET store_epoch = ?", params![store_epoch])?;
        transaction.execute("DELETE FROM channel", [])?;
        transaction.execute("DELETE FROM token", [])?;
        transaction.commit()?;
        Ok(Some(String::new()))
    };
    match renewed() {
        Ok(Some(fault)) if fault.is_empty() => Ok(()),
        Ok(Some(fault)) => Err(StoreError::Corrupt(fault)),
        Ok(None) => Err(StoreError::Newer("the backup".into())),
        Err(error) => Err(shared.classify(&error)),
    }
}

/// Whether a client may come in, and with which key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) id: ClientId,
    pub(crate) name: String,
    pub(crate) key_epoch: u32,
    pub(crate) revoked: bool,
}

/// How it stands with every client, by name.
///
/// # Errors
/// [`StoreError`] if there is no store that can be read.
pub(crate) fn standing(data: &Path) -> Result<Vec<Standing>, StoreError> {
    let read = || -> rusqlite::Result<_> {
        let db = Connection::open_with_flags(data.join("store.db"), OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let mut query = db.prepare("SELECT id, name, key_epoch, revoked_at IS NOT NULL FROM client ORDER BY name")?;
        let rows = query.query_map([], |row| {
            Ok(Standing { id: row.get(0)?, name: row.get(1)?, key_epoch: row.get(2)?, revoked: row.get(3)? })
        })?;
        rows.collect()
    };
    read().map_err(|error| Shared::new(data).classify(&error))
}

/// How it stands with every account: its normalised name, and what its password is verified with, unless it is locked.
///
/// # Errors
/// [`StoreError`] if there is no store that can be read, or none of this version.
pub(crate) fn accounts(data: &Path) -> Result<Vec<(String, Option<Verifier>)>, StoreError> {
    let read = || -> rusqlite::Result<_> {
        let db = Connection::open_with_flags(data.join("store.db"), OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let mut query = db.prepare("SELECT name_key, verifier, locked FROM account ORDER BY name_key")?;
        let rows = query.query_map([], |row| {
            let locked: bool = row.get(2)?;
            Ok((row.get(0)?, (!locked).then_some(Verifier(row.get(1)?))))
        })?;
        rows.collect()
    };
    read().map_err(|error| Shared::new(data).classify(&error))
}

/// Copies a home's state to `to`, for the holder of its lock: who it is, whom it pinned, what waits for its reader, and
/// what has not reached the server yet. That is sealed anew by whoever restores it.
///
/// # Errors
/// [`HomeStoreError`].
pub(crate) fn copy_home(database: &Path, to: &Path) -> Result<(), HomeStoreError> {
    // Brings older tables to the present version first.
    drop(HomeStore::open(database)?);
    let db = Connection::open(database)?;
    db.execute("VACUUM INTO ?1", [path_text(to)?])?;
    let copy = Connection::open(to)?;
    scrub(
        &copy,
        "DELETE FROM prekey; DELETE FROM chain; DELETE FROM sending; DELETE FROM successor;
         DELETE FROM inbox WHERE opened = 2; DELETE FROM letter_chain; DELETE FROM letter_wrap;
         DELETE FROM letter WHERE reached >= 2; DELETE FROM letter_part WHERE letter NOT IN (SELECT row FROM letter);
         UPDATE letter SET chain = NULL, n = NULL, salt = NULL, envelope = NULL, reached = NULL;
         UPDATE own_post SET epoch = NULL, signature = NULL;
         UPDATE bundle SET exchange = x'', signing = x'', published = 0;
         UPDATE profile SET store_epoch = NULL",
    )?;
    Ok(())
}

/// Checks the restored state of a home, and returns the last bundle that it knows of itself.
///
/// # Errors
/// [`HomeStoreError::Damaged`] if it is not whole, or no copy; [`HomeStoreError::Version`] if it is of a newer version.
pub(crate) fn check_home(database: &Path) -> Result<Bundle, HomeStoreError> {
    let store = HomeStore::open(database)?;
    let complete = store.profile()?.is_some_and(|profile| profile.complete);
    drop(store);
    let db = Connection::open(database)?;
    let sound: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    let count = "SELECT (SELECT count(*) FROM prekey) + (SELECT count(*) FROM chain)
                     + (SELECT count(*) FROM letter_chain) + (SELECT count(*) FROM letter_wrap)
                     + (SELECT count(*) FROM letter WHERE envelope NOT NULL)";
    let secrets: i64 = db.query_row(count, [], |row| row.get(0))?;
    let bundle: Vec<u8> = db.query_row("SELECT bundle FROM bundle", [], |row| row.get(0))?;
    let bundle = Bundle::decode(&bundle).map_err(|_| HomeStoreError::Damaged)?;
    if sound == "ok" && complete && secrets == 0 { Ok(bundle) } else { Err(HomeStoreError::Damaged) }
}

/// Removes what a copy must not hold, to the last free page.
fn scrub(copy: &Connection, statements: &str) -> rusqlite::Result<()> {
    copy.pragma_update_and_check(None, "secure_delete", "ON", |_| Ok(()))?;
    copy.execute_batch(statements)?;
    copy.execute_batch("VACUUM")
}

fn path_text(path: &Path) -> rusqlite::Result<&str> {
    path.to_str().ok_or_else(|| rusqlite::Error::InvalidPath(path.to_owned()))
}
