//! Parcels: what one call let wait for one recipient lies in one row, since the price of a row is that of many messages.
//!
//! A parcel is written once and deleted when the last of its items is gone; what is gone before that is noted beside it.
//! Its items have consecutive numbers. Which parcels there are for whom, and what is in them but for the bytes, is held in
//! memory ([`Index`]): 32 bytes for an item, and no second tree on the disk. Rows lie in the order of their numbers, so that
//! messages for many recipients fill one page after the other.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::super::{ChainId, ClientId, Item, ItemKind, NewItem};
use super::sums::{self, sum};
use super::{time, to_time};

/// Bytes of a parcel that is closed before all is in: reading one item costs reading its parcel.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// Bytes of an item's head: sender, chain, n, time, length, kind, wanted receipts; integers big-endian.
const HEAD_LEN: usize = 16 + 8 + 4 + 8 + 4 + 1 + 1;

/// What version 4 has in the place of version 3's `queue`. Version 5 adds sums.
pub(super) const TABLES: &str = "
CREATE TABLE parcel (
    first INTEGER PRIMARY KEY,
    recipient BLOB NOT NULL CHECK (length(recipient) = 16),
    heads BLOB NOT NULL,
    bytes BLOB NOT NULL
) STRICT;
CREATE TABLE gone (
    seq INTEGER PRIMARY KEY,
    until INTEGER NOT NULL CHECK (until >= seq)
) STRICT;
";

/// The head of an item, as it lies in a row.
struct Head {
    sender: ClientId,
    chain: ChainId,
    n: u32,
    at: u64,
    len: u32,
    kind: ItemKind,
    wanted: u8,
}

impl Head {
    fn of(item: &NewItem) -> Self {
        let NewItem { sender, chain, n, at, kind, wanted, .. } = *item;
        // No record is as long as that.
        let len = u32::try_from(item.bytes.len()).unwrap_or(u32::MAX);
        Self { sender, chain, n, at, len, kind, wanted }
    }

    fn encode(&self, heads: &mut Vec<u8>) {
        heads.extend_from_slice(&self.sender);
        heads.extend_from_slice(&self.chain);
        heads.extend_from_slice(&self.n.to_be_bytes());
        heads.extend_from_slice(&self.at.to_be_bytes());
        heads.extend_from_slice(&self.len.to_be_bytes());
        heads.extend_from_slice(&[code(self.kind), self.wanted]);
    }

    fn decode(mut head: &[u8]) -> Option<Self> {
        fn take<const LEN: usize>(from: &mut &[u8]) -> Option<[u8; LEN]> {
            let (taken, rest) = from.split_first_chunk()?;
            *from = rest;
            Some(*taken)
        }
        let head = &mut head;
        Some(Self {
            sender: take(head)?,
            chain: take(head)?,
            n: u32::from_be_bytes(take(head)?),
            at: u64::from_be_bytes(take(head)?),
            len: u32::from_be_bytes(take(head)?),
            kind: match take(head)? {
                [0] => ItemKind::Envelope,
                [1] => ItemKind::Wrap,
                [2] => ItemKind::Receipt,
                [3] => ItemKind::Notice,
                [4] => ItemKind::GroupEnvelope,
                _ => return None,
            },
            wanted: u8::from_be_bytes(take(head)?),
        })
    }

    const fn entry(&self) -> Entry {
        Entry { chain: self.chain, at: self.at, n: self.n, len: self.len, kind: self.kind, gone: false }
    }
}

const fn code(kind: ItemKind) -> u8 {
    match kind {
        ItemKind::Envelope => 0,
        ItemKind::Wrap => 1,
        ItemKind::Receipt => 2,
        ItemKind::Notice => 3,
        ItemKind::GroupEnvelope => 4,
    }
}

/// Where the highest number of this kind on a chain is remembered. A chain has messages of one kind.
const fn place(kind: ItemKind) -> Option<usize> {
    match kind {
        ItemKind::Envelope | ItemKind::GroupEnvelope => Some(0),
        ItemKind::Wrap | ItemKind::Notice => Some(1),
        ItemKind::Receipt => None,
    }
}

/// What is known of an item without a look at the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) chain: ChainId,
    pub(super) at: u64,
    n: u32,
    len: u32,
    pub(super) kind: ItemKind,
    pub(super) gone: bool,
}

impl Entry {
    pub(super) fn bytes(&self) -> u64 {
        self.len.into()
    }
}

/// A row, or what is to become one.
#[derive(Debug, Default)]
pub(super) struct Rows {
    heads: Vec<u8>,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Rows {
    pub(super) fn add(&mut self, item: &NewItem) {
        let head = Head::of(item);
        head.encode(&mut self.heads);
        self.bytes.extend_from_slice(&item.bytes);
        self.entries.push(head.entry());
    }

    pub(super) const fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) const fn is_full(&self) -> bool {
        self.bytes.len() >= MAX_BYTES
    }

    /// The sums of this row.
    fn sums(&self, recipient: &ClientId, first: u64) -> (i64, i64) {
        (sum_of_heads(first, recipient, &self.heads), sum([ValueRef::Blob(&self.bytes)]))
    }

    /// Writes it under this number.
    pub(super) fn write(self, db: &Connection, recipient: &ClientId, first: u64) -> rusqlite::Result<Parcel> {
        let (heads_sum, bytes_sum) = self.sums(recipient, first);
        db.prepare_cached(
            "INSERT INTO parcel (first, recipient, heads, bytes, heads_sum, bytes_sum) VALUES (?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![to_time(first), recipient, self.heads, self.bytes, heads_sum, bytes_sum])?;
        let live = self.entries.len();
        Ok(Parcel { first, entries: self.entries, live })
    }
}

/// What is known of a row.
#[derive(Clone, Debug)]
pub(super) struct Parcel {
    pub(super) first: u64,
    entries: Vec<Entry>,
    /// How many of them are not gone.
    live: usize,
}

impl Parcel {
    const fn end(&self) -> u64 {
        self.first.saturating_add(self.entries.len() as u64)
    }

    /// Numbers and entries of what is not gone.
    pub(super) fn live(&self) -> impl Iterator<Item = (u64, &Entry)> {
        (self.first..).zip(&self.entries).filter(|(_, entry)| !entry.gone)
    }
}

/// What waits for one recipient.
#[derive(Debug, Default)]
struct Line {
    /// By ascending numbers.
    parcels: VecDeque<Parcel>,
    /// Of chains with items here: no envelope, and no wrap or notice, has a higher number. Some of it may be gone by now.
    highest: HashMap<ChainId, [Option<u32>; 2]>,
    items: usize,
}

impl Line {
    fn note(&mut self, entry: &Entry) {
        let Some(place) = place(entry.kind) else { return };
        if let Some(place) = self.highest.entry(entry.chain).or_default().get_mut(place) {
            *place = (*place).max(Some(entry.n));
        }
    }

    fn place(&self, seq: u64) -> Option<usize> {
        let place = self.parcels.partition_point(|parcel| parcel.first <= seq).checked_sub(1)?;
        self.parcels.get(place).filter(|parcel| seq < parcel.end()).map(|_| place)
    }

    /// Puts a parcel where it belongs, for whatever has its number.
    fn put(&mut self, parcel: Parcel) {
        for entry in &parcel.entries {
            self.note(entry);
        }
        self.items += parcel.live;
        let place = self.parcels.partition_point(|held| held.first < parcel.first);
        match self.parcels.get_mut(place).filter(|held| held.first == parcel.first) {
            Some(held) => {
                self.items -= held.live;
                *held = parcel;
            }
            None => self.parcels.insert(place, parcel),
        }
    }

    fn remove(&mut self, first: u64) -> Option<Parcel> {
        let place = self.place(first)?;
        let parcel = self.parcels.remove(place)?;
        self.items -= parcel.live;
        // What is remembered of chains must not outgrow what waits.
        if self.highest.len() > 2 * self.items + 64 {
            self.highest.clear();
            let entries: Vec<_> = self.parcels.iter().flat_map(Parcel::live).map(|(_, entry)| *entry).collect();
            for entry in &entries {
                self.note(entry);
            }
        }
        Some(parcel)
    }
}

/// How to take back what a transaction did to the index.
#[derive(Debug)]
pub(super) enum Undo {
    /// This parcel was added.
    Added(ClientId, u64),
    /// This parcel was so.
    Was(ClientId, Parcel),
}

/// What was taken out of a parcel.
pub(super) struct Taken {
    first: u64,
    /// The number behind its last.
    end: u64,
    /// Nothing of it is left, and whether something of it was gone before.
    whole: Option<bool>,
    /// Runs of numbers that are gone now, with what was gone around them: the first and the last of each.
    runs: Vec<(u64, u64)>,
    /// What is gone now.
    pub(super) entries: Vec<Entry>,
}

/// All parcels. The writer changes it within its transaction, and takes back what did not come to stand; so a reader may
/// find here what is not in its tables yet or not any more, and passes over it.
#[derive(Debug, Default)]
pub(super) struct Index(Mutex<HashMap<ClientId, Line>>);

impl Index {
    fn lock(&self) -> MutexGuard<'_, HashMap<ClientId, Line>> {
        // Nothing under this lock can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all heads.
    pub(super) fn of(db: &Connection) -> rusqlite::Result<Self> {
        let mut gone = BTreeMap::new();
        let mut query = db.prepare("SELECT seq, until, sum FROM gone")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            if row.get::<_, i64>(2)? != sum([row.get_ref(0)?, row.get_ref(1)?]) {
                return Err(sums::broken("a row of gone is not what was written"));
            }
            gone.insert(time(row, 0)?, time(row, 1)?);
        }
        let mut lines: HashMap<ClientId, Line> = HashMap::new();
        let mut query =
            db.prepare("SELECT first, heads, length(bytes), recipient, heads_sum FROM parcel ORDER BY first")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let first = time(row, 0)?;
            if row.get::<_, i64>(4)? != sum_of_heads(first, row.get_ref(3)?.as_blob()?, row.get_ref(1)?.as_blob()?) {
                return Err(sums::broken("the heads of a parcel are not what was written"));
            }
            let heads = heads(row.get_ref(1)?.as_blob()?, time(row, 2)?)?;
            let entries: Vec<_> = heads.iter().map(Head::entry).collect();
            let live = entries.len();
            let mut parcel = Parcel { first, entries, live };
            if !gone.is_empty() {
                for (&seq, &until) in gone.range(first..parcel.end()) {
                    for (_, entry) in (first..=until).zip(&mut parcel.entries).filter(|(n, _)| *n >= seq) {
                        entry.gone = true;
                    }
                }
                parcel.live = parcel.entries.iter().filter(|entry| !entry.gone).count();
            }
            lines.entry(row.get(3)?).or_default().put(parcel);
        }
        Ok(Self(Mutex::new(lines)))
    }

    /// Does something with everything that waits.
    pub(super) fn for_each(&self, mut action: impl FnMut(&ClientId, u64, &Entry)) {
        for (client, line) in &*self.lock() {
            for (seq, entry) in line.parcels.iter().flat_map(Parcel::live) {
                action(client, seq, entry);
            }
        }
    }

    /// Looks at what waits for one recipient, in order, until there is something to return.
    pub(super) fn find<T>(&self, recipient: &ClientId, mut of: impl FnMut(u64, &Entry) -> Option<T>) -> Option<T> {
        let lines = self.lock();
        let line = lines.get(recipient)?;
        line.parcels.iter().flat_map(Parcel::live).find_map(|(seq, entry)| of(seq, entry))
    }

    /// Whether something with the name of `item` may wait. It is told at once in whatever order but that of the numbers.
    pub(super) fn may_hold(&self, item: &NewItem) -> bool {
        let lines = self.lock();
        let highest = lines.get(&item.recipient).and_then(|line| line.highest.get(&item.chain));
        highest.and_then(|highest| highest.get(place(item.kind)?)?.as_ref()).is_some_and(|n| *n >= item.n)
    }

    /// Notes the name of an item that is going to be added.
    pub(super) fn note(&self, item: &NewItem) {
        self.lock().entry(item.recipient).or_default().note(&Head::of(item).entry());
    }

    /// What waits under the name of `item`.
    pub(super) fn same_name(&self, item: &NewItem) -> Option<(u64, Entry)> {
        let is_same = |entry: &Entry| (entry.chain, entry.n, entry.kind) == (item.chain, item.n, item.kind);
        self.find(&item.recipient, |seq, entry| is_same(entry).then_some((seq, *entry)))
    }

    /// The first parcel with something beyond this number that waits: its number, the numbers of that, and the next
    /// parcel's.
    fn piece(&self, recipient: &ClientId, after: u64) -> Option<(u64, Vec<u64>, u64)> {
        let lines = self.lock();
        let parcels = &lines.get(recipient)?.parcels;
        let place = parcels.partition_point(|parcel| parcel.end() <= after.saturating_add(1));
        parcels.range(place..).find_map(|parcel| {
            let seqs: Vec<_> = parcel.live().map(|(seq, _)| seq).filter(|seq| *seq > after).collect();
            (!seqs.is_empty()).then(|| (parcel.first, seqs, parcel.end()))
        })
    }

    /// The numbers of all parcels of one recipient.
    pub(super) fn parcels(&self, recipient: &ClientId) -> Vec<u64> {
        let lines = self.lock();
        lines.get(recipient).map(|line| line.parcels.iter().map(|parcel| parcel.first).collect()).unwrap_or_default()
    }

    /// The parcel with the item of this number.
    pub(super) fn parcel_of(&self, recipient: &ClientId, seq: u64) -> Option<u64> {
        self.with(recipient, seq, |parcel| parcel.first)
    }

    /// The number behind the last of the same parcel.
    pub(super) fn end_of(&self, recipient: &ClientId, seq: u64) -> Option<u64> {
        self.with(recipient, seq, Parcel::end)
    }

    /// The numbers of what waits in this parcel.
    pub(super) fn live(&self, recipient: &ClientId, first: u64) -> Vec<u64> {
        self.with(recipient, first, |parcel| parcel.live().map(|(seq, _)| seq).collect()).unwrap_or_default()
    }

    /// The numbers of what waits in this parcel and is one of these.
    pub(super) fn which(&self, recipient: &ClientId, first: u64, of: impl Fn(&Entry) -> bool) -> Vec<u64> {
        let those =
            |parcel: &Parcel| parcel.live().filter(|(_, entry)| of(entry)).map(|(seq, _)| seq).collect::<Vec<_>>();
        self.with(recipient, first, those).unwrap_or_default()
    }

    fn with<T>(&self, recipient: &ClientId, seq: u64, of: impl FnOnce(&Parcel) -> T) -> Option<T> {
        let lines = self.lock();
        let line = lines.get(recipient)?;
        line.parcels.get(line.place(seq)?).map(of)
    }

    pub(super) fn add(&self, recipient: &ClientId, parcel: Parcel) -> Undo {
        let undo = Undo::Added(*recipient, parcel.first);
        self.lock().entry(*recipient).or_default().put(parcel);
        undo
    }

    /// Takes out of the parcel with `seq` what `goes`.
    pub(super) fn take(&self, recipient: &ClientId, seq: u64, goes: impl Fn(u64) -> bool) -> Option<(Taken, Undo)> {
        let mut lines = self.lock();
        let line = lines.get_mut(recipient)?;
        let place = line.place(seq)?;
        let parcel = line.parcels.get_mut(place)?;
        let (first, end, before) = (parcel.first, parcel.end(), parcel.live);
        let going = parcel.live().filter(|(seq, _)| goes(*seq)).map(|(_, entry)| *entry);
        let entries: Vec<_> = going.collect();
        if entries.is_empty() {
            return None;
        }
        if entries.len() == before {
            let whole = Some(before < parcel.entries.len());
            let parcel = line.remove(first)?;
            if line.parcels.is_empty() {
                lines.remove(recipient);
            }
            return Some((Taken { first, end, whole, runs: Vec::new(), entries }, Undo::Was(*recipient, parcel)));
        }
        let was = parcel.clone();
        let (mut runs, mut run): (Vec<_>, Option<(u64, u64, bool)>) = (Vec::new(), None);
        for (seq, entry) in (first..).zip(&mut parcel.entries) {
            let is_new = !entry.gone && goes(seq);
            entry.gone |= is_new;
            run = match (run, entry.gone) {
                (Some((begin, _, some_new)), true) => Some((begin, seq, some_new || is_new)),
                (None, true) => Some((seq, seq, is_new)),
                (held, false) => {
                    runs.extend(held.filter(|(.., some_new)| *some_new).map(|(begin, last, _)| (begin, last)));
                    None
                }
            };
        }
        runs.extend(run.filter(|(.., some_new)| *some_new).map(|(begin, last, _)| (begin, last)));
        parcel.live -= entries.len();
        line.items -= entries.len();
        Some((Taken { first, end, whole: None, runs, entries }, Undo::Was(*recipient, was)))
    }

    /// Another item has taken the place of the one with its number, in its row as well.
    pub(super) fn replace(&self, item: &NewItem, seq: u64) -> Option<Undo> {
        let mut lines = self.lock();
        let line = lines.get_mut(&item.recipient)?;
        let place = line.place(seq)?;
        let parcel = line.parcels.get_mut(place)?;
        let was = parcel.clone();
        let offset = usize::try_from(seq.saturating_sub(parcel.first)).ok()?;
        *parcel.entries.get_mut(offset)? = Head::of(item).entry();
        Some(Undo::Was(item.recipient, was))
    }

    pub(super) fn undo(&self, undo: Undo) {
        let mut lines = self.lock();
        match undo {
            Undo::Added(recipient, first) => {
                if let Some(line) = lines.get_mut(&recipient) {
                    line.remove(first);
                    if line.parcels.is_empty() {
                        lines.remove(&recipient);
                    }
                }
            }
            Undo::Was(recipient, parcel) => lines.entry(recipient).or_default().put(parcel),
        }
    }
}

impl Taken {
    /// Does the same in the tables.
    pub(super) fn write(&self, db: &Connection) -> rusqlite::Result<()> {
        if let Some(some_gone) = self.whole {
            db.prepare_cached("DELETE FROM parcel WHERE first = ?")?.execute([to_time(self.first)])?;
            if some_gone {
                db.prepare_cached("DELETE FROM gone WHERE seq >= ? AND seq < ?")?
                    .execute([to_time(self.first), to_time(self.end)])?;
            }
        }
        for (seq, until) in &self.runs {
            let (seq, until) = (to_time(*seq), to_time(*until));
            db.prepare_cached("INSERT OR REPLACE INTO gone (seq, until, sum) VALUES (?, ?, ?)")?.execute([
                seq,
                until,
                sum([ValueRef::Integer(seq), ValueRef::Integer(until)]),
            ])?;
        }
        Ok(())
    }
}

fn sum_of_heads(first: u64, recipient: &[u8], heads: &[u8]) -> i64 {
    sum([ValueRef::Integer(to_time(first)), ValueRef::Blob(recipient), ValueRef::Blob(heads)])
}

/// The heads in a row that has so many bytes.
fn heads(blob: &[u8], bytes: u64) -> rusqlite::Result<Vec<Head>> {
    let (chunks, rest) = blob.as_chunks::<HEAD_LEN>();
    let heads: Option<Vec<_>> = chunks.iter().map(|chunk| Head::decode(chunk)).collect();
    let sum = |heads: &Vec<Head>| heads.iter().fold(0_u64, |sum, head| sum.saturating_add(head.len.into()));
    heads.filter(|heads| rest.is_empty() && !heads.is_empty() && sum(heads) == bytes).ok_or_else(broken)
}

fn broken() -> rusqlite::Error {
    sums::broken("heads and bytes of a parcel do not agree")
}

const SELECT: &str = "SELECT heads, bytes, bytes_sum FROM parcel WHERE first = ?";

/// Reads items of one parcel, as long as `wanted`: it gets their numbers and says whether they are, and `None` ends it.
fn open(row: &Row<'_>, first: u64, mut wanted: impl FnMut(u64) -> Option<bool>) -> rusqlite::Result<Vec<Item>> {
    let mut bytes = row.get_ref(1)?.as_blob()?;
    if row.get::<_, i64>(2)? != sum([ValueRef::Blob(bytes)]) {
        return Err(sums::broken("messages of a parcel are not what was written"));
    }
    let mut items = Vec::new();
    for (seq, head) in (first..).zip(heads(row.get_ref(0)?.as_blob()?, bytes.len() as u64)?) {
        let Head { sender, chain, n, at, len, kind, wanted: rungs } = head;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (own, rest) = bytes.split_at_checked(len).ok_or_else(broken)?;
        bytes = rest;
        match wanted(seq) {
            Some(true) => items.push(Item { seq, sender, kind, chain, n, wanted: rungs, bytes: Arc::from(own), at }),
            Some(false) => {}
            None => break,
        }
    }
    Ok(items)
}

/// The items of a parcel that are `wanted`.
pub(super) fn read(db: &Connection, first: u64, wanted: impl Fn(u64) -> bool) -> rusqlite::Result<Vec<Item>> {
    let read = db
        .prepare_cached(SELECT)?
        .query_row([to_time(first)], |row| open(row, first, |seq| Some(wanted(seq))))
        .optional()?;
    Ok(read.unwrap_or_default())
}

/// What waits beyond `after`, in order: at most so many items and bytes, but one if there is one.
pub(super) fn read_beyond(
    db: &Connection,
    index: &Index,
    recipient: &ClientId,
    mut after: u64,
    max_items: usize,
    max_bytes: usize,
) -> rusqlite::Result<Vec<Item>> {
    // One look at the tables for all parcels: one that is not there yet is followed by none that is.
    let _one_look = db.unchecked_transaction()?;
    let mut query = db.prepare_cached(SELECT)?;
    let (mut items, mut sum) = (Vec::new(), 0_usize);
    while items.len() < max_items
        && let Some((first, seqs, end)) = index.piece(recipient, after)
    {
        after = end.saturating_sub(1);
        let mut waiting = seqs.iter().peekable();
        let mut room = max_items - items.len();
        let of_parcel = query.query_row([to_time(first)], |row| {
            open(row, first, |seq| {
                waiting.peek().filter(|_| room > 0)?;
                let is_wanted = waiting.next_if_eq(&&seq).is_some();
                room -= usize::from(is_wanted);
                Some(is_wanted)
            })
        });
        for item in of_parcel.optional()?.unwrap_or_default() {
            sum = sum.saturating_add(item.bytes.len());
            if sum > max_bytes && !items.is_empty() {
                return Ok(items);
            }
            items.push(item);
        }
    }
    Ok(items)
}

/// Puts another item in the place of the one with its number, in its row.
pub(super) fn rewrite(db: &Connection, first: u64, item: &NewItem, seq: u64) -> rusqlite::Result<()> {
    let mut rows = Rows::default();
    for old in read(db, first, |_| true)? {
        let Item { sender, kind, chain, n, wanted, bytes, at, .. } = old;
        rows.add(&match old.seq == seq {
            true => item.clone(),
            false => NewItem { recipient: item.recipient, sender, kind, chain, n, wanted, bytes, at },
        });
    }
    let (heads_sum, bytes_sum) = rows.sums(&item.recipient, first);
    db.prepare_cached("UPDATE parcel SET heads = ?2, bytes = ?3, heads_sum = ?4, bytes_sum = ?5 WHERE first = ?1")?
        .execute(params![to_time(first), rows.heads, rows.bytes, heads_sum, bytes_sum])?;
    Ok(())
}

/// Brings what version 3 has in `queue` into parcels, under the same numbers.
pub(super) fn migrate(db: &Connection) -> rusqlite::Result<()> {
    let kind = |row: &Row<'_>| match row.get(3)? {
        0 => Ok(ItemKind::Envelope),
        1 => Ok(ItemKind::Wrap),
        2 => Ok(ItemKind::Receipt),
        other => Err(rusqlite::Error::IntegralValueOutOfRange(3, other)),
    };
    let mut query = db.prepare(
        "SELECT recipient, seq, sender, kind, chain, n, wanted, at, bytes FROM queue ORDER BY recipient, seq",
    )?;
    let mut found = query.query([])?;
    let mut open: Option<(ClientId, u64, Rows)> = None;
    while let Some(row) = found.next()? {
        let (recipient, seq) = (row.get(0)?, time(row, 1)?);
        let item = NewItem {
            recipient,
            sender: row.get(2)?,
            kind: kind(row)?,
            chain: row.get(4)?,
            n: row.get(5)?,
            wanted: row.get(6)?,
            at: time(row, 7)?,
            bytes: Arc::from(row.get_ref(8)?.as_blob()?),
        };
        let follows = |(held, first, rows): &(ClientId, u64, Rows)| {
            *held == recipient && first.saturating_add(rows.len() as u64) == seq && !rows.is_full()
        };
        if let Some((recipient, first, rows)) = open.take_if(|open| !follows(open)) {
            rows.write(db, &recipient, first)?;
        }
        open.get_or_insert_with(|| (recipient, seq, Rows::default())).2.add(&item);
    }
    if let Some((recipient, first, rows)) = open {
        rows.write(db, &recipient, first)?;
    }
    drop(found);
    drop(query);
    db.execute_batch("DROP TABLE queue;")
}
