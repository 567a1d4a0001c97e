//! The queues in SQLite: the operations inside one transaction, over parcels.
//!
//! How much waits for whom is counted in memory ([`Ledger`]), from the tables at the start, and then by the writer alone,
//! once its transaction stands.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;

use super::super::conversation::is_told_of;
use super::super::{ClientId, Item, ItemKind, NewItem, Put, PutError, QueueLimits, Refuse, Waiting};
use super::parcel::{self, Entry, Index, Rows, Undo};
use super::{count, is_live, time, to_time};

/// The numbers, since version 3.
pub(super) const SEQUENCE: &str = "
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
    notices: u64,
    notice_bytes: u64,
    newest: u64,
    /// Nothing that waits and grows too old was accepted before.
    oldest: u64,
    /// The client was revoked.
    ended: bool,
}

impl Default for Count {
    fn default() -> Self {
        Self {
            items: 0,
            bytes: 0,
            receipts: 0,
            receipt_bytes: 0,
            notices: 0,
            notice_bytes: 0,
            newest: 0,
            oldest: u64::MAX,
            ended: false,
        }
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
            ItemKind::Envelope | ItemKind::GroupEnvelope | ItemKind::Wrap => (&mut self.items, &mut self.bytes),
            ItemKind::Receipt => (&mut self.receipts, &mut self.receipt_bytes),
            ItemKind::Notice => (&mut self.notices, &mut self.notice_bytes),
        }
    }

    fn note_age(&mut self, kind: ItemKind, at: u64) {
        if grows_too_old(kind) {
            self.oldest = self.oldest.min(at);
        }
    }

    /// All that waits, of all kinds: how much, and how many bytes.
    const fn all(&self) -> (u64, u64) {
        (
            self.items.saturating_add(self.receipts).saturating_add(self.notices),
            self.bytes.saturating_add(self.receipt_bytes).saturating_add(self.notice_bytes),
        )
    }
}

fn grows_too_old(kind: ItemKind) -> bool {
    kind != ItemKind::Notice
}

/// The first number that is not set aside.
pub(super) fn reserved(db: &Connection) -> rusqlite::Result<u64> {
    db.query_row("SELECT reserved FROM sequence", [], |row| time(row, 0))
}

/// What the writer counts, for everybody to read.
#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<HashMap<ClientId, Count>>);

impl Counts {
    /// Counts what is in the tables.
    pub(super) fn of(index: &Index) -> Self {
        let mut counts: HashMap<ClientId, Count> = HashMap::new();
        index.for_each(|client, seq, entry| {
            let count = counts.entry(*client).or_default();
            count.add(entry.kind, entry.bytes());
            count.newest = count.newest.max(seq);
            count.note_age(entry.kind, entry.at);
        });
        Self(Mutex::new(counts))
    }

    pub(super) fn waiting(&self, recipient: &ClientId) -> Waiting {
        let count = self.lock().get(recipient).copied().unwrap_or_default();
        let (items, bytes) = count.all();
        Waiting { items, bytes, newest: count.newest }
    }

    /// For how many clients something waits, and how much for all of them.
    pub(super) fn all(&self) -> (u64, Waiting) {
        let (mut clients, mut all) = (0, Waiting::default());
        for (items, bytes) in self.lock().values().map(Count::all).filter(|(items, _)| *items > 0) {
            clients += 1;
            all.items = all.items.saturating_add(items);
            all.bytes = all.bytes.saturating_add(bytes);
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
    index: &'s Index,
    /// What takes back the changes of the index, the last one last.
    undo: Vec<Undo>,
    /// The next number.
    next: u64,
    /// The first number that is not set aside for this process, in the table as it stands and as it is in this
    /// transaction.
    reserved: (u64, u64),
    touched: bool,
}

impl<'s> Ledger<'s> {
    /// For the one writer. The numbers begin behind all that were ever given.
    pub(super) fn new(
        limits: QueueLimits,
        counts: &'s Counts,
        index: &'s Index,
        given: &'s Given,
        reserved: u64,
    ) -> Self {
        let newest = counts.lock().values().map(|count| count.newest).max().unwrap_or_default();
        let reserved = reserved.max(newest.saturating_add(1));
        Self {
            limits,
            counts,
            changed: HashMap::new(),
            given,
            held: None,
            index,
            undo: Vec::new(),
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
        self.undo.clear();
        self.reserved.0 = self.reserved.1;
        self.held = None;
    }

    /// Nothing of the transaction remains.
    pub(super) fn roll_back(&mut self) {
        self.changed.clear();
        for undo in self.undo.drain(..).rev() {
            self.index.undo(undo);
        }
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

    /// The first of so many numbers that nobody had.
    fn numbers(&mut self, db: &Connection, count: usize) -> rusqlite::Result<u64> {
        let seq = self.next;
        self.next = seq.saturating_add(count as u64);
        if self.next > self.reserved.1 {
            self.reserved.1 = self.next.saturating_add(RESERVATION);
            db.prepare_cached("UPDATE sequence SET reserved = ?")?.execute([to_time(self.reserved.1)])?;
        }
        Ok(seq)
    }

    /// Whether so many notices wait for the client that it is not invited to anything more. It counts nothing.
    pub(super) fn is_full_of_notices(&self, client: &ClientId) -> bool {
        let changed = self.changed.get(client).copied();
        let count = changed.or_else(|| self.counts.lock().get(client).copied()).unwrap_or_default();
        count.notices >= self.limits.notices
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
        let old = |count: &Count| !count.ended && count.all().0 > 0 && count.oldest < before;
        let unchanged = counts.iter().filter(|(client, count)| old(count) && !self.changed.contains_key(*client));
        let changed = self.changed.iter().filter(|(_, count)| old(count));
        unchanged.chain(changed).map(|(client, _)| *client).collect()
    }
}

/// Lets items wait, each decided by itself and in their order.
pub(super) fn put(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    items: &[NewItem],
) -> rusqlite::Result<Vec<Result<Put, PutError>>> {
    let mut counter = Counter { answers: Vec::with_capacity(items.len()), ..Counter::default() };
    for item in items {
        let decided = counter.decide(db, ledger, item)?;
        counter.answers.push(decided);
    }
    counter.close_all(db, ledger)?;
    Ok(counter.answers)
}

/// Where items are packed into parcels.
#[derive(Default)]
struct Counter {
    open: Vec<Open>,
    /// The place in `open`.
    places: HashMap<ClientId, usize>,
    /// What became of each item. Those that are in an open parcel have no number yet.
    answers: Vec<Result<Put, PutError>>,
}

/// A parcel that is not in the table yet.
struct Open {
    recipient: ClientId,
    rows: Rows,
    /// The places of its items in the answers.
    answers: Vec<usize>,
}

impl Counter {
    fn decide(
        &mut self,
        db: &Connection,
        ledger: &mut Ledger<'_>,
        item: &NewItem,
    ) -> rusqlite::Result<Result<Put, PutError>> {
        let limits = ledger.limits;
        let bytes = count(item.bytes.len());
        let Some(&mut held) = ledger.count(db, &item.recipient)? else {
            return Ok(Err(PutError::UnknownRecipient));
        };
        if item.kind == ItemKind::Receipt {
            if held.receipts >= limits.receipts.max(1) {
                self.close(db, ledger, &item.recipient)?;
                make_room_for_a_receipt(db, ledger, &item.recipient)?;
            }
        } else {
            if ledger.index.may_hold(item) {
                self.close(db, ledger, &item.recipient)?;
                if let Some((seq, entry)) = ledger.index.same_name(item) {
                    return self.decide_again(db, ledger, item, seq, &entry);
                }
            }
            let full = held.items >= limits.items || held.bytes.saturating_add(bytes) > limits.bytes;
            if full && item.kind != ItemKind::Notice {
                return Ok(Err(PutError::QueueFull));
            }
        }
        self.pack(db, ledger, item)
    }

    /// Decides of an item whose name waits under `seq`.
    fn decide_again(
        &mut self,
        db: &Connection,
        ledger: &mut Ledger<'_>,
        item: &NewItem,
        seq: u64,
        entry: &Entry,
    ) -> rusqlite::Result<Result<Put, PutError>> {
        let Some(first) = ledger.index.parcel_of(&item.recipient, seq) else {
            return self.pack(db, ledger, item);
        };
        let same = parcel::read(db, first, |held| held == seq)?;
        if same.first().is_some_and(|same| same.bytes == item.bytes) {
            return Ok(Ok(Put::Repeat { seq }));
        }
        if !item.kind.is_replaced() {
            return Ok(Err(PutError::Rewound));
        }
        let (limit, bytes) = (ledger.limits.bytes, count(item.bytes.len()));
        let Some(held) = ledger.count(db, &item.recipient)? else {
            return Ok(Err(PutError::UnknownRecipient));
        };
        let full = held.bytes.saturating_sub(entry.bytes()).saturating_add(bytes) > limit;
        if full && item.kind != ItemKind::Notice {
            return Ok(Err(PutError::QueueFull));
        }
        if ledger.is_untold(&item.recipient, seq) {
            ledger.undo.extend(ledger.index.replace(item, seq));
            parcel::rewrite(db, first, item, seq)?;
            if let Some(held) = ledger.count(db, &item.recipient)? {
                held.take(item.kind, 1, entry.bytes());
                held.add(item.kind, bytes);
                held.note_age(item.kind, item.at);
            }
            return Ok(Ok(Put::Stored { seq }));
        }
        take(db, ledger, &item.recipient, seq, |held| held == seq)?;
        self.pack(db, ledger, item)
    }

    /// Adds an item to its recipient's parcel. The answer has no number yet.
    fn pack(
        &mut self,
        db: &Connection,
        ledger: &mut Ledger<'_>,
        item: &NewItem,
    ) -> rusqlite::Result<Result<Put, PutError>> {
        ledger.index.note(item);
        if let Some(held) = ledger.count(db, &item.recipient)? {
            held.add(item.kind, count(item.bytes.len()));
            held.note_age(item.kind, item.at);
        }
        let place = *self.places.entry(item.recipient).or_insert(self.open.len());
        if place == self.open.len() {
            self.open.push(Open { recipient: item.recipient, rows: Rows::default(), answers: Vec::new() });
        }
        let is_full = self.open.get_mut(place).is_some_and(|open| {
            open.rows.add(item);
            open.answers.push(self.answers.len());
            open.rows.is_full()
        });
        if is_full {
            // Its last answer follows.
            self.answers.push(Ok(Put::Stored { seq: 0 }));
            self.close(db, ledger, &item.recipient)?;
            return Ok(self.answers.pop().unwrap_or(Ok(Put::Stored { seq: 0 })));
        }
        Ok(Ok(Put::Stored { seq: 0 }))
    }

    /// Writes the open parcel of this recipient, if there is one.
    fn close(&mut self, db: &Connection, ledger: &mut Ledger<'_>, recipient: &ClientId) -> rusqlite::Result<()> {
        let open = self.places.get(recipient).and_then(|place| self.open.get_mut(*place));
        open.map_or(Ok(()), |open| open.close(db, ledger, &mut self.answers))
    }

    fn close_all(&mut self, db: &Connection, ledger: &mut Ledger<'_>) -> rusqlite::Result<()> {
        self.open.iter_mut().try_for_each(|open| open.close(db, ledger, &mut self.answers))
    }
}

impl Open {
    fn close(
        &mut self,
        db: &Connection,
        ledger: &mut Ledger<'_>,
        answers: &mut [Result<Put, PutError>],
    ) -> rusqlite::Result<()> {
        let rows = core::mem::take(&mut self.rows);
        if rows.len() == 0 {
            return Ok(());
        }
        let first = ledger.numbers(db, rows.len())?;
        let mut newest = first;
        for (seq, place) in (first..).zip(self.answers.drain(..)) {
            newest = seq;
            if let Some(answer) = answers.get_mut(place) {
                *answer = Ok(Put::Stored { seq });
            }
        }
        let parcel = rows.write(db, &self.recipient, first)?;
        ledger.undo.push(ledger.index.add(&self.recipient, parcel));
        if let Some(held) = ledger.count(db, &self.recipient)? {
            held.newest = held.newest.max(newest);
        }
        Ok(())
    }
}

/// Takes what `goes` out of the parcel with `seq`, and returns how many items that were.
fn take(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    seq: u64,
    goes: impl Fn(u64) -> bool,
) -> rusqlite::Result<u64> {
    ledger.touched = true;
    let Some((taken, undo)) = ledger.index.take(recipient, seq, goes) else {
        return Ok(0);
    };
    ledger.undo.push(undo);
    taken.write(db)?;
    if let Some(held) = ledger.count(db, recipient)? {
        for entry in &taken.entries {
            held.take(entry.kind, 1, entry.bytes());
        }
    }
    Ok(count(taken.entries.len()))
}

fn make_room_for_a_receipt(db: &Connection, ledger: &mut Ledger<'_>, recipient: &ClientId) -> rusqlite::Result<()> {
    let limit = ledger.limits.receipts.max(1);
    while ledger.count(db, recipient)?.is_some_and(|held| held.receipts >= limit) {
        let is_receipt = |seq, entry: &Entry| (entry.kind == ItemKind::Receipt).then_some(seq);
        match ledger.index.find(recipient, is_receipt) {
            Some(oldest) => take(db, ledger, recipient, oldest, |seq| seq == oldest)?,
            None => break,
        };
    }
    Ok(())
}

pub(super) fn remove(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    mut seqs: Vec<u64>,
) -> rusqlite::Result<u64> {
    seqs.sort_unstable();
    let mut removed = 0_u64;
    let mut rest = seqs.as_slice();
    while let Some(&seq) = rest.first() {
        let len = match ledger.index.end_of(recipient, seq) {
            Some(end) => rest.partition_point(|seq| *seq < end),
            None => 1,
        };
        let (here, others) = rest.split_at(len);
        rest = others;
        removed += take(db, ledger, recipient, seq, |seq| here.binary_search(&seq).is_ok())?;
    }
    Ok(removed)
}

pub(super) fn acknowledge(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    up_to: u64,
) -> rusqlite::Result<u64> {
    let parcels = ledger.index.parcels(recipient);
    let up_to_here = parcels.into_iter().take_while(|first| *first <= up_to);
    up_to_here.map(|first| take(db, ledger, recipient, first, |seq| seq <= up_to)).sum()
}

/// Takes away what of the recipient's queue `goes`, and returns it.
pub(super) fn withdraw(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    recipient: &ClientId,
    goes: impl Fn(&Entry) -> bool,
) -> rusqlite::Result<Vec<Item>> {
    let mut withdrawn = Vec::new();
    for first in ledger.index.parcels(recipient) {
        let seqs = ledger.index.which(recipient, first, &goes);
        if seqs.is_empty() {
            continue;
        }
        let going = |seq: u64| seqs.binary_search(&seq).is_ok();
        withdrawn.extend(parcel::read(db, first, going)?);
        take(db, ledger, recipient, first, going)?;
    }
    Ok(withdrawn)
}

/// Reads a queue, and notes what of it was given out.
pub(super) fn read(
    db: &Connection,
    index: &Index,
    given: &Given,
    recipient: &ClientId,
    after: u64,
    max_items: usize,
    max_bytes: usize,
) -> rusqlite::Result<Vec<Item>> {
    let mut given = given.lock();
    let items = parcel::read_beyond(db, index, recipient, after, max_items.max(1), max_bytes)?;
    if let Some(last) = items.last() {
        let given = given.entry(*recipient).or_default();
        *given = last.seq.max(*given);
    }
    Ok(items)
}

/// Removes the queue of a client that was revoked, and returns what its senders are to be told.
pub(super) fn end(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    client: &ClientId,
    refuse: &Refuse,
) -> rusqlite::Result<Vec<NewItem>> {
    ledger.touched = true;
    let mut refusals = Vec::new();
    for first in ledger.index.parcels(client) {
        let live = ledger.index.live(client, first);
        let items = parcel::read(db, first, |seq| live.binary_search(&seq).is_ok())?;
        let told = items.iter().filter(|item| is_told_of(item));
        refusals.extend(told.filter_map(|item| refuse.refusal(client, item)));
        take(db, ledger, client, first, |_| true)?;
    }
    ledger.changed.insert(*client, Count { ended: true, ..Count::default() });
    Ok(refusals)
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
        let mut room = limit.saturating_sub(expired.len());
        if room == 0 {
            break;
        }
        for first in ledger.index.parcels(&client) {
            let mut old = ledger.index.which(&client, first, |entry| grows_too_old(entry.kind) && entry.at < before);
            old.truncate(room);
            if old.is_empty() {
                continue;
            }
            room -= old.len();
            let items = parcel::read(db, first, |seq| old.binary_search(&seq).is_ok())?;
            take(db, ledger, &client, first, |seq| old.binary_search(&seq).is_ok())?;
            expired.extend(items.into_iter().map(|item| (client, item)));
            if room == 0 {
                break;
            }
        }
        if room > 0 {
            let mut oldest = u64::MAX;
            ledger.index.find(&client, |_, entry| {
                oldest = if grows_too_old(entry.kind) { oldest.min(entry.at) } else { oldest };
                None::<()>
            });
            if let Some(held) = ledger.count(db, &client)? {
                held.oldest = oldest;
            }
        }
    }
    let told = expired.iter().filter(|(_, item)| is_told_of(item));
    let refusals: Vec<_> = told.filter_map(|(client, item)| refuse.refusal(client, item)).collect();
    // Whoever was revoked meanwhile need not know.
    let _ = put(db, ledger, &refusals)?;
    Ok(expired)
}
