//! Sums: every row says what was written into it, so that a disk which forgets a bit is noticed and not believed.
//!
//! A sum is a CRC-32 over the values of a row. It finds what breaks by itself, and nothing that somebody does on purpose:
//! whoever can write to the data directory is the operator. Small tables carry their sum by triggers and are read at the
//! start, all of them; a parcel has one over its heads, which the start reads anyway, and one over its bytes, which
//! whoever reads the messages compares. A channel is written with its sum, since every handshake writes one. What no sum
//! can see, since a whole row is gone or a page is in the wrong place, SQLite's own check finds beside the running server.

use rusqlite::functions::FunctionFlags;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, ffi};

/// The name of the function for SQL: `ossicle_sum(value, ...)`.
const NAME: &str = "ossicle_sum";

/// The tables that triggers keep the sums of: since which version there are such tables with sums, their keys, and what else
/// of them is summed.
const TABLES: [(i32, &str, &str, &str); 15] = [
    (5, "meta", "only", "server_id, store_epoch"),
    (5, "sequence", "only", "reserved"),
    // When a client was last seen is written all the time, and nothing rests on it.
    (5, "client", "id", "name, name_key, modulus, key_epoch, enrolled_by, enrolled_at, revoked_at, record_limit"),
    (5, "bundle", "client", "epoch, bundle, signature"),
    (5, "rotation", "client, key_epoch", "former, modulus, signature"),
    (5, "token", "id", "verifier, name_pattern, preset_id, expires, uses, printed"),
    (5, "chain", "seq", "id, sender, sid, recipient"),
    (6, "conversation", "sid", "creator, creator_only, signature, founded_at"),
    (6, "member", "sid, client", "state, signature"),
    (6, "tombstone", "sid", "closed_at, closed_by"),
    (7, "account", "name_key", "name, verifier, locked, changed_at"),
    (8, "post", "seq", "author, number, at, epoch, kind, signature, body, kept_at"),
    (8, "author", "client", "number, signature"),
    (8, "public", "only", "newest"),
    (9, "invitation", "sid, client", "notice"),
];

const CHANNEL: (&str, &str, &str) = ("channel", "sum", "id, client, sealed, expires");

/// What is written with its sum, since it is written often: the table, the column of the sum, and what is summed. The bytes of
/// a parcel have a sum of their own.
const WRITTEN: [(&str, &str, &str); 4] = [
    CHANNEL,
    ("gone", "sum", "seq, until"),
    ("parcel", "heads_sum", "first, recipient, heads"),
    ("parcel", "bytes_sum", "bytes"),
];

/// Parcels that get a sum at once where they have none: what one statement changes, SQLite holds in memory until its end.
const PIECE: i64 = if cfg!(test) { 2 } else { 256 };

/// The sum of these values, in their order.
pub(super) fn sum<'v>(values: impl IntoIterator<Item = ValueRef<'v>>) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    for value in values {
        let (tag, fixed, bytes): (u8, [u8; 8], &[u8]) = match value {
            ValueRef::Null => (0, [0; 8], &[]),
            ValueRef::Integer(value) => (1, value.to_be_bytes(), &[]),
            ValueRef::Real(value) => (2, value.to_be_bytes(), &[]),
            ValueRef::Text(text) => (3, (text.len() as u64).to_be_bytes(), text),
            ValueRef::Blob(blob) => (4, (blob.len() as u64).to_be_bytes(), blob),
        };
        hasher.update(&[tag]);
        hasher.update(&fixed);
        hasher.update(bytes);
    }
    hasher.finalize().into()
}

/// Makes `ossicle_sum` known to a connection. Every one that writes needs it.
pub(in super::super) fn register(db: &Connection) -> rusqlite::Result<()> {
    // The schema names it, and does not get at anything by it.
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC | FunctionFlags::SQLITE_INNOCUOUS;
    db.create_scalar_function(NAME, -1, flags, |values| Ok(sum((0..values.len()).map(|place| values.get_raw(place)))))
}

/// Adds to a store of this version the sums that it lacks, and what keeps them: of everything before version 5, which has
/// none, then of the tables that came later. They are there already.
pub(super) fn add(db: &Connection, version: i32) -> rusqlite::Result<()> {
    for (_, table, key, rest) in TABLES.into_iter().filter(|(since, ..)| *since > version) {
        let same: Vec<_> = key.split(", ").map(|column| format!("{column} = NEW.{column}")).collect();
        let set = format!("UPDATE {table} SET sum = {NAME}({key}, {rest})");
        let same = same.join(" AND ");
        db.execute_batch(&format!(
            "ALTER TABLE {table} ADD COLUMN sum INTEGER;
             {set};
             CREATE TRIGGER {table}_new AFTER INSERT ON {table} BEGIN {set} WHERE {same}; END;
             CREATE TRIGGER {table}_change AFTER UPDATE OF {key}, {rest} ON {table} BEGIN {set} WHERE {same}; END;"
        ))?;
    }
    for (table, column, summed) in WRITTEN.into_iter().filter(|_| version < 5) {
        db.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column} INTEGER;"))?;
        let set = format!("UPDATE {table} SET {column} = {NAME}({summed})");
        if table == "parcel" { add_by_pieces(db, &set)? } else { db.execute_batch(&set)? }
    }
    Ok(())
}

fn add_by_pieces(db: &Connection, set: &str) -> rusqlite::Result<()> {
    let mut last =
        db.prepare("SELECT max(first) FROM (SELECT first FROM parcel WHERE first > ?1 ORDER BY first LIMIT ?2)")?;
    let mut add = db.prepare(&format!("{set} WHERE first > ?1 AND first <= ?2"))?;
    let mut after = i64::MIN;
    while let Some(until) = last.query_row([after, PIECE], |row| row.get::<_, Option<i64>>(0))? {
        add.execute([after, until])?;
        after = until;
    }
    Ok(())
}

/// Compares the sums of the small tables, and their indices with their rows. Who reads the others compares theirs.
///
/// # Errors
/// `SQLITE_CORRUPT` with the name of the table.
pub(super) fn check(db: &Connection) -> rusqlite::Result<()> {
    for (_, table, key, rest) in TABLES {
        compare(db, table, "sum", &format!("{key}, {rest}"))?;
        check_indices(db, table)?;
    }
    let (table, column, summed) = CHANNEL;
    compare(db, table, column, summed)?;
    check_indices(db, table)
}

/// Compares all sums that there are. Takes as long as reading all of the file.
///
/// # Errors
/// Those of [`check`].
pub(in super::super) fn check_all(db: &Connection) -> rusqlite::Result<()> {
    check(db)?;
    WRITTEN.iter().try_for_each(|(table, column, summed)| compare(db, table, column, summed))
}

fn compare(db: &Connection, table: &str, column: &str, summed: &str) -> rusqlite::Result<()> {
    let wrong = format!("SELECT EXISTS (SELECT 1 FROM {table} WHERE {column} IS NOT {NAME}({summed}))");
    match db.query_row(&wrong, [], |row| row.get(0))? {
        true => Err(broken(&format!("a row of {table} is not what was written"))),
        false => Ok(()),
    }
}

fn check_indices(db: &Connection, table: &str) -> rusqlite::Result<()> {
    let fault: String = db.query_row(&format!("PRAGMA integrity_check({table})"), [], |row| row.get(0))?;
    if fault == "ok" { Ok(()) } else { Err(broken(&format!("{table}: {fault}"))) }
}

/// Looks at every page. Takes as long as reading all of the file.
///
/// # Errors
/// `SQLITE_CORRUPT` with the first fault.
pub(super) fn check_pages(db: &Connection) -> rusqlite::Result<()> {
    let fault: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if fault == "ok" { Ok(()) } else { Err(broken(&fault)) }
}

/// Damage that SQLite does not know of.
pub(super) fn broken(what: &str) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CORRUPT), Some(what.to_owned()))
}
