//! The queues in SQLite: their table, and the operations inside one transaction.
//!
//! What waits for one recipient lies together, in order. How much that is, is counted in memory ([`Ledger`]), from the
//! table at the start, and then by the writer alone, once its transaction stands.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, ToSql, ffi, params};

use super::super::{ClientId, Item, ItemKind, NewItem, Put, PutError, QueueLimits, Refuse, Waiting};
use super::{count, is_live, time, to_time};

/// What version 3 adds to version 2.
///
/// `queue` has no foreign key: clients are never deleted, and the writer looks for itself whether they are there.
pub(super) const TABLES: &str = "
CREATE TABLE queue (
    recipient BLOB NOT NULL CHECK (length(recipient) = 16),
    seq INTEGER NOT NULL,
    sender BLOB NOT NULL CHECK (length(sender) = 16),
    kind INTEGER NOT NULL CHECK (kind BETWEEN 0 AND 2),
    chain BLOB NOT NULL CHECK (length(chain) = 8),
    n INTEGER NOT NULL,
    wanted INTEGER NOT NULL,
    at INTEGER NOT NULL,
    bytes BLOB NOT NULL,
    PRIMARY KEY (recipient, seq)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX queue_name ON queue (recipient, chain, n, kind) WHERE kind <> 2;
CREATE INDEX queue_receipt ON queue (recipient, seq) WHERE kind = 2;
CREATE TABLE sequence (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    reserved INTEGER NOT NULL
) STRICT;
INSERT INTO sequence (only, reserved) VALUES (1, 1);
";

/// Numbers that are set aside at once; those that a stop leaves over are never used.
const RESERVATION: u64 = 1 << 20;

/// How much waits for one client.
#[derive(Clone, Copy, Debug)]
struct Count {
    /// Envelopes and wraps, and their bytes.
    items: u64,
    bytes: u64,
    receipts: u64,
    receipt_bytes: u64,
    newest: u64,
    /// Nothing that waits was accepted before.
    oldest: u64,
    /// The client was revoked.
    ended: bool,
}

impl Default for Count {
    fn default() -> Self {
        Self { items: 0, bytes: 0, receipts: 0, receipt_bytes: 0, newest: 0, oldest: u64::MAX, ended: false }
    }
}

impl Count {
    fn add(&mut self, kind: ItemKind, bytes: u64) {
        let (items, sum) = self.of(kind);
        *items = items.saturating_add(1);
        *sum = sum.saturating_add(bytes);
    }

    fn take(&mut self, kind: ItemKind, gone: u64, bytes: u64) {
        let (items, sum) = self.of(kind);
        *items = items.saturating_sub(gone);
        *sum = sum.saturating_sub(bytes);
    }

    const fn of(&mut self, kind: ItemKind) -> (&mut u64, &mut u64) {
        match kind {
            ItemKind::Envelope | ItemKind::Wrap => (&mut self.items, &mut self.bytes),
            ItemKind::Receipt => (&mut self.receipts, &mut self.receipt_bytes),
        }
    }

    const fn is_empty(&self) -> bool {
        self.items == 0 && self.receipts == 0
    }
}

/// The first number that is not set aside.
pub(super) fn reserved(db: &Connection) -> rusqlite::Result<u64> {
    db.query_row("SELECT reserved FROM sequence", [], |row| time(row, 0))
}

/// What the writer counts, for everybody to read.
#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<HashMap<ClientId, Count>>);

impl Counts {
    /// Counts what is in the table.
    pub(super) fn of(db: &Connection) -> rusqlite::Result<Self> {
        let mut counts: HashMap<ClientId, Count> = HashMap::new();
        let mut query = db.prepare(
            "SELECT recipient, kind, count(*), sum(length(bytes)), max(seq), min(at) FROM queue GROUP BY recipient, kind",
        )?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let count = counts.entry(row.get(0)?).or_default();
            let (items, bytes) = count.of(row.get(1)?);
            *items = items.saturating_add(time(row, 2)?);
            *bytes = bytes.saturating_add(time(row, 3)?);
            count.newest = count.newest.max(time(row, 4)?);
            count.oldest = count.oldest.min(time(row, 5)?);
        }
        Ok(Self(Mutex::new(counts)))
    }

    pub(super) fn waiting(&self, recipient: &ClientId) -> Waiting {
        let count = self.lock().get(recipient).copied().unwrap_or_default();
        Waiting {
            items: count.items.saturating_add(count.receipts),
            bytes: count.bytes.saturating_add(count.receipt_bytes),
            newest: count.newest,
        }
    }

    /// For how many clients something waits, and how much for all of them.
    pub(super) fn all(&self) -> (u64, Waiting) {
        let (mut clients, mut all) = (0, Waiting::default());
        for count in self.lock().values().filter(|count| count.items + count.receipts > 0) {
            clients += 1;
            all.items = all.items.saturating_add(count.items).saturating_add(count.receipts);
            all.bytes = all.bytes.saturating_add(count.bytes).saturating_add(count.receipt_bytes);
        }
        (clients, all)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ClientId, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The highest number that was given out to each recipient since the start. Held while a queue is read, and by the
/// writer from the decision to change something in its place until that stands: nobody gets the one and says that he has
/// the other.
#[derive(Debug, Default)]
pub(super) struct Given(Mutex<HashMap<ClientId, u64>>);

impl Given {
    fn lock(&self) -> MutexGuard<'_, HashMap<ClientId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writer's own account: what its transaction has changed so far.
pub(super) struct Ledger<'s> {
    limits: QueueLimits,
    counts: &'s Counts,
    changed: HashMap<ClientId, Count>,
    given: &'s Given,
    held: Option<MutexGuard<'s, HashMap<ClientId, u64>>>,
    /// The next number.
    next: u64,
    /// The first number that is not set aside for this process, in the table as it stands and as it is in this
    /// transaction.
    reserved: (u64, u64),
    touched: bool,
}

impl<'s> Ledger<'s> {
    /// For the one writer. The numbers begin behind all that were ever given.
    pub(super) fn new(limits: QueueLimits, counts: &'s Counts, given: &'s Given, reserved: u64) -> Self {
        let newest = counts.lock().values().map(|count| count.newest).max().unwrap_or_default();
        let reserved = reserved.max(newest.saturating_add(1));
        Self {
            limits,
            counts,
            changed: HashMap::new(),
            given,
            held: None,
            next: reserved,
            reserved: (reserved, reserved),
            touched: false,
        }
    }

    /// An operation begins.
    pub(super) fn begin(&mut self) {
        self.touched = false;
    }

    /// Whether the operation that runs has counted anything, so that it cannot be undone alone.
    pub(super) const fn is_touched(&self) -> bool {
        self.touched
    }

    /// The transaction stands.
    pub(super) fn commit(&mut self) {
        if !self.changed.is_empty() {
            let mut counts = self.counts.lock();
            for (client, count) in self.changed.drain() {
                if count.ended {
                    counts.remove(&client);
                } else {
                    counts.insert(client, count);
                }
            }
        }
        self.reserved.0 = self.reserved.1;
        self.held = None;
    }

    /// Nothing of the transaction remains.
    pub(super) fn roll_back(&mut self) {
        self.changed.clear();
        self.reserved.1 = self.reserved.0;
        self.held = None;
    }

    /// The account of a client that is enrolled and not revoked.
    fn count(&mut self, db: &Connection, client: &ClientId) -> rusqlite::Result<Option<&mut Count>> {
        self.touched = true;
        if !self.changed.contains_key(client) {
            let known = self.counts.lock().get(client).copied();
            let count = match known {
                Some(count) => count,
                None if is_live(db, client)? => Count::default(),
                None => return Ok(None),
            };
            self.changed.insert(*client, count);
        }
        Ok(self.changed.get_mut(client).filter(|count| !count.ended))
    }

    fn number(&mut self, db: &Connection) -> rusqlite::Result<u64> {
        let seq = self.next;
        self.next = seq.saturating_add(1);
        if seq >= self.reserved.1 {
            self.reserved.1 = seq.saturating_add(RESERVATION);
            db.prepare_cached("UPDATE sequence SET reserved = ?")?.execute([to_time(self.reserved.1)])?;
        }
        Ok(seq)
    }

    /// Whether nobody was given the item of this number, nor is before the transaction stands.
    fn is_untold(&mut self, recipient: &ClientId, seq: u64) -> bool {
        let given = self.given;
        let held = self.held.get_or_insert_with(|| given.lock());
        held.get(recipient).is_none_or(|&given| given < seq)
    }

    /// Who has something that was accepted before `before`.
    fn with_older_than(&self, before: u64) -> Vec<ClientId> {
        let counts = self.counts.lock();
        let old = |count: &Count| !count.ended && !count.is_empty() && count.oldest < before;
        let unchanged = counts.iter().filter(|(client, count)| old(count) && !self.changed.contains_key(*client));
        let changed = self.changed.iter().filter(|(_, count)| old(count));
        unchanged.chain(changed).map(|(client, _)| *client).collect()
    }
}

pub(super) fn put(db: &Connection, ledger: &mut Ledger<'_>, item: &NewItem) -> rusqlite::Result<Result<Put, PutError>> {
    let limits = ledger.limits;
    let bytes = count(item.bytes.len());
    let Some(&mut held) = ledger.count(db, &item.recipient)? else {
        return Ok(Err(PutError::UnknownRecipient));
    };
    if item.kind == ItemKind::Receipt {
        make_room_for_a_receipt(db, ledger, &item.recipient)?;
    } else {
        let full = held.items >= limits.items || held.bytes.saturating_add(bytes) > limits.bytes;
        if full && let Some(same) = same_name(db, item)? {
            return put_again(db, ledger, item, &same);
        }
        if full {
            return Ok(Err(PutError::QueueFull));
        }
    }
    let seq = ledger.number(db)?;
    if insert(db, item, seq)? {
        return Ok(Ok(noted(db, ledger, item, seq)?));
    }
    match same_name(db, item)? {
        Some(same) => put_again(db, ledger, item, &same),
        None => {
            let error = ffi::Error::new(ffi::SQLITE_CORRUPT);
            Err(rusqlite::Error::SqliteFailure(error, Some("a number of the queue is in use".into())))
        }
    }
}

/// Counts an item that was put.
fn noted(db: &Connection, ledger: &mut Ledger<'_>, item: &NewItem, seq: u64) -> rusqlite::Result<Put> {
    if let Some(held) = ledger.count(db, &item.recipient)? {
        held.add(item.kind, count(item.bytes.len()));
        held.newest = held.newest.max(seq);
        held.oldest = held.oldest.min(item.at);
    }
    Ok(Put::Stored { seq })
}

/// An item that waits under the name of another.
struct Same {
    seq: u64,
    bytes: u64,
    is_equal: bool,
}

fn same_name(db: &Connection, item: &NewItem) -> rusqlite::Result<Option<Same>> {
    db.prepare_cached(
        "SELECT seq, length(bytes), bytes = ?5 FROM queue
        WHERE recipient = ?1 AND chain = ?2 AND n = ?3 AND kind = ?4 AND kind <> 2",
    )?
    .query_row(params![item.recipient, item.chain, item.n, item.kind, &*item.bytes], |row| {
        Ok(Same { seq: time(row, 0)?, bytes: time(row, 1)?, is_equal: row.get(2)? })
    })
    .optional()
}

fn insert(db: &Connection, item: &NewItem, seq: u64) -> rusqlite::Result<bool> {
    let inserted = db
        .prepare_cached(
            "INSERT INTO queue (recipient, seq, sender, kind, chain, n, wanted, at, bytes)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )?
        .execute(params![
            item.recipient,
            to_time(seq),
            item.sender,
            item.kind,
            item.chain,
            item.n,
            item.wanted,
            to_time(item.at),
            &*item.bytes,
        ])?;
    Ok(inserted > 0)
}

fn put_again(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    item: &NewItem,
    same: &Same,
) -> rusqlite::Result<Result<Put, PutError>> {
    if same.is_equal {
        return Ok(Ok(Put::Repeat { seq: same.seq }));
    }
    if item.kind != ItemKind::Wrap {
        return Ok(Err(PutError::Rewound));
    }
    let (limit, bytes) = (ledger.limits.bytes, count(item.bytes.len()));
    let Some(held) = ledger.count(db, &item.recipient)? else {
        return Ok(Err(PutError::UnknownRecipient));
    };
    if held.bytes.saturating_sub(same.bytes).saturating_add(bytes) > limit {
        return Ok(Err(PutError::QueueFull));
    }
    if ledger.is_untold(&item.recipient, same.seq) {
        db.prepare_cached(
            "UPDATE queue SET sender = ?3, wanted = ?4, at = ?5, bytes = ?6 WHERE recipient = ?1 AND seq = ?2",
        )?
        .execute(params![
            item.recipient,
            to_time(same.seq),
            item.sender,
            item.wanted,
            to_time(item.at),
            &*item.bytes
        ])?;
        if let Some(held) = ledger.count(db, &item.recipient)? {
            held.take(item.kind, 1, same.bytes);
        }
        return Ok(Ok(noted(db, ledger, item, same.seq)?));
    }
    delete_one(db, ledger, &item.recipient, same.seq)?;
    let seq = ledger.number(db)?;
    insert(db, item, seq)?;
    Ok(Ok(noted(db, ledger, item, seq)?))
}

fn make_room_for_a_receipt(db: &Connection, ledger: &mut Ledger<'_>, recipient: &ClientId) -> rusqlite::Result<()> {
    let limit = ledger.limits.receipts.max(1);
    while ledger.count(db, recipient)?.is_some_and(|held| held.receipts >= limit) {
        let oldest = db
            .prepare_cached("SELECT seq FROM queue WHERE recipient = ? AND kind = 2 ORDER BY seq LIMIT 1")?
            .query_row([recipient], |row| time(row, 0))
            .optional()?;
        match oldest {
            Some(seq) => delete_one(db, ledger, recipient, seq)?,
            None => break,
        };
    }
    Ok(())
}

fn delete_one(db: &Connection, ledger: &mut Ledger<'_>, recipient: &ClientId, seq: u64) -> rusqlite::Result<u64> {
    let gone = db
        .prepare_cached("DELETE FROM queue WHERE recipient = ? AND seq = ? RETURNING kind, length(bytes)")?
        .query_row(params![recipient, to_time(seq)], |row| Ok((row.get::<_, ItemKind>(0)?, time(row, 1)?)))
        .optional()?;
    let Some((kind, bytes)) = gone else {
        return Ok(0);
    };
    if let Some(held) = ledger.count(db, recipient)? {
        held.take(kind, 1, bytes);
    }
    Ok(1)
}

pub(super) fn remove(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    seqs: &[u64],
) -> rusqlite::Result<u64> {
    seqs.iter().try_fold(0_u64, |gone, &seq| Ok(gone.saturating_add(delete_one(db, ledger, recipient, seq)?)))
}

pub(super) fn acknowledge(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    up_to: u64,
) -> rusqlite::Result<u64> {
    let up_to = to_time(up_to);
    let mut gone = Vec::new();
    {
        let mut query = db.prepare_cached(
            "SELECT kind, count(*), sum(length(bytes)) FROM queue WHERE recipient = ? AND seq <= ? GROUP BY kind",
        )?;
        let mut rows = query.query(params![recipient, up_to])?;
        while let Some(row) = rows.next()? {
            gone.push((row.get::<_, ItemKind>(0)?, time(row, 1)?, time(row, 2)?));
        }
    }
    if gone.is_empty() {
        return Ok(0);
    }
    db.prepare_cached("DELETE FROM queue WHERE recipient = ? AND seq <= ?")?.execute(params![recipient, up_to])?;
    let mut removed = 0_u64;
    if let Some(held) = ledger.count(db, recipient)? {
        for (kind, items, bytes) in gone {
            held.take(kind, items, bytes);
            removed = removed.saturating_add(items);
        }
    }
    Ok(removed)
}

/// Reads a queue, and notes what of it was given out.
pub(super) fn read(
    db: &Connection,
    given: &Given,
    recipient: &ClientId,
    after: u64,
    max_items: usize,
    max_bytes: usize,
) -> rusqlite::Result<Vec<Item>> {
    let mut given = given.lock();
    let mut query = db.prepare_cached(
        "SELECT seq, sender, kind, chain, n, wanted, at, bytes FROM queue WHERE recipient = ? AND seq > ? ORDER BY seq",
    )?;
    let mut rows = query.query(params![recipient, to_time(after)])?;
    let (mut items, mut sum) = (Vec::new(), 0_usize);
    while items.len() < max_items.max(1)
        && let Some(row) = rows.next()?
    {
        let item = item(row)?;
        sum = sum.saturating_add(item.bytes.len());
        if sum > max_bytes && !items.is_empty() {
            break;
        }
        items.push(item);
    }
    if let Some(last) = items.last() {
        let given = given.entry(*recipient).or_default();
        *given = last.seq.max(*given);
    }
    Ok(items)
}

fn item(row: &Row<'_>) -> rusqlite::Result<Item> {
    Ok(Item {
        seq: time(row, 0)?,
        sender: row.get(1)?,
        kind: row.get(2)?,
        chain: row.get(3)?,
        n: row.get(4)?,
        wanted: row.get(5)?,
        at: time(row, 6)?,
        bytes: Arc::from(row.get_ref(7)?.as_blob()?),
    })
}

/// Removes the queue of a client that was revoked, and returns the senders that are told so.
pub(super) fn end(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    client: &ClientId,
    refuse: &Refuse,
) -> rusqlite::Result<Vec<ClientId>> {
    ledger.touched = true;
    let mut refusals = Vec::new();
    {
        let mut query = db.prepare_cached(
            "SELECT seq, sender, kind, chain, n, wanted, at, bytes FROM queue WHERE recipient = ? ORDER BY seq",
        )?;
        let mut rows = query.query([client])?;
        while let Some(row) = rows.next()? {
            let item = item(row)?;
            if item.kind != ItemKind::Receipt {
                refusals.extend(refuse.refusal(client, &item));
            }
        }
    }
    db.prepare_cached("DELETE FROM queue WHERE recipient = ?")?.execute([client])?;
    ledger.changed.insert(*client, Count { ended: true, ..Count::default() });
    let mut told = HashSet::new();
    for refusal in refusals {
        if put(db, ledger, &refusal)?.is_ok() {
            told.insert(refusal.recipient);
        }
    }
    Ok(told.into_iter().collect())
}

pub(super) fn expire(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    before: u64,
    limit: usize,
    refuse: &Refuse,
) -> rusqlite::Result<Vec<(ClientId, Item)>> {
    let mut expired: Vec<(ClientId, Item)> = Vec::new();
    for client in ledger.with_older_than(before) {
        let room = limit.saturating_sub(expired.len());
        if room == 0 {
            break;
        }
        let mut query = db.prepare_cached(
            "SELECT seq, sender, kind, chain, n, wanted, at, bytes FROM queue
            WHERE recipient = ? AND at < ? ORDER BY seq LIMIT ?",
        )?;
        let rows = query.query_map(params![client, to_time(before), i64::try_from(room).unwrap_or(i64::MAX)], item)?;
        let items = rows.collect::<rusqlite::Result<Vec<_>>>()?;
        let all = items.len() < room;
        for item in &items {
            delete_one(db, ledger, &client, item.seq)?;
        }
        if all {
            let oldest = db
                .prepare_cached("SELECT min(at) FROM queue WHERE recipient = ?")?
                .query_row([client], |row| row.get::<_, Option<i64>>(0)?.map(|_| time(row, 0)).transpose())?;
            if let Some(held) = ledger.count(db, &client)? {
                held.oldest = oldest.unwrap_or(u64::MAX);
            }
        }
        expired.extend(items.into_iter().map(|item| (client, item)));
    }
    let told = expired.iter().filter(|(_, item)| item.kind != ItemKind::Receipt);
    let refusals: Vec<_> = told.filter_map(|(client, item)| refuse.refusal(client, item)).collect();
    for refusal in refusals {
        // Whoever was revoked meanwhile need not know.
        let _ = put(db, ledger, &refusal)?;
    }
    Ok(expired)
}

impl ToSql for ItemKind {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let code: i64 = match self {
            Self::Envelope => 0,
            Self::Wrap => 1,
            Self::Receipt => 2,
        };
        Ok(code.into())
    }
}

impl FromSql for ItemKind {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_i64()? {
            0 => Ok(Self::Envelope),
            1 => Ok(Self::Wrap),
            2 => Ok(Self::Receipt),
            other => Err(FromSqlError::OutOfRange(other)),
        }
    }
}
