//! The public conversation in SQLite: the operations inside one transaction.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::super::{ClientId, KeptPost, MemberSignature, NewPost, Post, Posts, Said, SayError};
use super::{Fault, count, to_time};

/// What version 8 adds.
pub(super) const TABLES: &str = "
CREATE TABLE post (
    seq INTEGER PRIMARY KEY,
    author BLOB NOT NULL REFERENCES client (id),
    number INTEGER NOT NULL,
    at INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    signature BLOB NOT NULL CHECK (length(signature) = 64),
    body BLOB NOT NULL,
    kept_at INTEGER NOT NULL
) STRICT;
CREATE INDEX post_author ON post (author, number);
CREATE TABLE author (
    client BLOB PRIMARY KEY REFERENCES client (id),
    number INTEGER NOT NULL,
    signature BLOB NOT NULL CHECK (length(signature) = 64)
) STRICT, WITHOUT ROWID;
CREATE TABLE public (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    newest INTEGER NOT NULL
) STRICT;
INSERT INTO public (only, newest) VALUES (1, 0);
";

/// A u64 as the bits of a number of SQLite's.
fn bits(value: u64) -> i64 {
    value.cast_signed()
}

pub(super) fn say(db: &Connection, new: &NewPost, most: u64) -> Result<Said, Fault<SayError>> {
    let NewPost { author, key_epoch, post, now } = new;
    let is_the_same = db
        .prepare_cached("SELECT 1 FROM client WHERE id = ? AND key_epoch = ? AND revoked_at IS NULL")?
        .exists(params![author, key_epoch])?;
    if !is_the_same {
        return Err(Fault::Refused(SayError::Unknown));
    }
    let last = db
        .prepare_cached("SELECT number, signature FROM author WHERE client = ?")?
        .query_row([author], |row| Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, MemberSignature>(1)?)))
        .optional()?;
    if let Some((number, signature)) = last
        && post.number <= number
    {
        let repeats = (post.number, post.signature) == (number, signature)
            || db
                .prepare_cached("SELECT 1 FROM post WHERE author = ? AND number = ? AND signature = ?")?
                .exists(params![author, bits(post.number), post.signature])?;
        return if repeats { Ok(Said::Repeat) } else { Err(Fault::Refused(SayError::Rewound)) };
    }
    let seq: i64 =
        db.prepare_cached("UPDATE public SET newest = newest + 1 RETURNING newest")?.query_row([], |row| row.get(0))?;
    db.prepare_cached(
        "INSERT INTO post (seq, author, number, at, epoch, kind, signature, body, kept_at)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![
        seq,
        author,
        bits(post.number),
        bits(post.at),
        post.epoch,
        post.kind,
        post.signature,
        post.body,
        to_time(*now),
    ])?;
    db.prepare_cached("INSERT OR REPLACE INTO author (client, number, signature) VALUES (?, ?, ?)")?
        .execute(params![author, bits(post.number), post.signature])?;
    // The oldest of whoever has the most there goes: nobody pushes out what others have said.
    let mut held = db.prepare_cached("SELECT count(*) FROM post")?;
    let mut forget = db.prepare_cached(
        "DELETE FROM post WHERE seq =
        (SELECT min(seq) FROM post GROUP BY author ORDER BY count(*) DESC, min(seq) LIMIT 1)",
    )?;
    while held.query_row([], |row| row.get::<_, i64>(0))? > to_time(most) && forget.execute([])? > 0 {}
    Ok(Said::New { seq: u64::try_from(seq).unwrap_or_default() })
}

pub(super) fn read(db: &Connection, after: u64, limit: usize) -> rusqlite::Result<Posts> {
    // One look, so that the end is that of what was found.
    let transaction = db.unchecked_transaction()?;
    let newest: i64 = db.prepare_cached("SELECT newest FROM public")?.query_row([], |row| row.get(0))?;
    let mut query = db.prepare_cached(
        "SELECT seq, author, number, at, epoch, kind, signature, body FROM post WHERE seq > ? ORDER BY seq LIMIT ?",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let posts = query.query_map(params![to_time(after), limit], kept)?.collect::<rusqlite::Result<_>>()?;
    drop(query);
    transaction.commit()?;
    Ok(Posts { newest: u64::try_from(newest).unwrap_or_default(), posts })
}

fn kept(row: &Row<'_>) -> rusqlite::Result<KeptPost> {
    let unsigned = |column| row.get::<_, i64>(column).map(i64::cast_unsigned);
    Ok(KeptPost {
        seq: unsigned(0)?,
        author: row.get(1)?,
        post: Post {
            number: unsigned(2)?,
            at: unsigned(3)?,
            epoch: row.get(4)?,
            kind: row.get(5)?,
            signature: row.get(6)?,
            body: row.get(7)?,
        },
    })
}

pub(super) fn expire(db: &Connection, before: u64) -> rusqlite::Result<u64> {
    Ok(count(db.prepare_cached("DELETE FROM post WHERE kept_at < ?")?.execute([to_time(before)])?))
}

/// Forgets what a client has said, because nobody could verify it any more.
pub(super) fn forget(db: &Connection, author: &ClientId) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM post WHERE author = ?")?.execute([author])?;
    Ok(())
}
