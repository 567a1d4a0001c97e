//! What waits to be sealed for one connected client: a bounded queue between the router and the client's channel.
//!
//! Everybody puts in, only the client's own channel takes out. Answers and receipts go first, messages and wraps follow
//! in the order in which they came; the two have separate bounds, since a message can wait in the store and an answer
//! cannot. Two kinds of things are delivered: what only passes, and what waits in the store. The store stays ahead: as
//! long as it has something for the client that is not here, nothing passes by it, so that the order of every sender is
//! kept. Nothing is dropped: what passed and was neither taken nor answered for goes to the keeper when the client stops
//! listening, and what waits in the store stays there until the client acknowledges it.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ossicle_core::{MAX_RECORD_LEN, Message, PeerStatus, RECORD_OVERHEAD, Reason, Receipt, Rung, Rungs, ToldBy};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::keeper::Keeper;
use crate::name::{Name, Pattern};
use crate::presence::{Presence, Watch};
use crate::store::{ChainId, ClientId, Item, ItemKind, NewItem, Refuse, Waiting};

/// Bytes of answers and receipts beyond which a client is not listened to until it has read some.
const MAX_OWED_BYTES: usize = 256 * 1024;

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MailboxLimits {
    /// Messages and wraps for one client.
    pub messages: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes for all clients together.
    pub total: usize,
    /// Answers and receipts for one client. A client that lets more of them wait than this does not read, and is
    /// disconnected.
    pub owed: usize,
}

impl Default for MailboxLimits {
    fn default() -> Self {
        Self { messages: 10_000, bytes: 16 << 20, total: 256 << 20, owed: 16_384 }
    }
}

/// The bytes that wait in all mailboxes of a server.
#[derive(Debug, Default)]
pub struct Budget(AtomicUsize);

/// What the server owes a client: answers to requests, receipts, signs of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owed {
    /// An encoded message.
    Answer(Vec<u8>),
    /// A request was done.
    Done(u16),
    /// A receipt.
    Receipt(Receipt),
    /// A receipt in a conversation of several, of this recipient or about it.
    ReceiptBy(ClientId, Receipt),
    /// A request was refused.
    Refused {
        /// The request; 0 where it could not be read.
        request: u16,
        /// Why.
        reason: Reason,
        /// Milliseconds to wait.
        retry_after: Option<u32>,
    },
    /// Is the client there?
    Status(u16),
    /// The server is there.
    StatusResponse(u16),
}

impl Owed {
    /// A refusal without a time to wait.
    pub const fn refused(request: u16, reason: Reason) -> Self {
        Self::Refused { request, reason, retry_after: None }
    }

    /// The message to be sealed; some need `scratch`.
    ///
    /// # Errors
    /// Those of [`Message::decode`], which no answer that was encoded causes.
    pub fn message<'m>(&'m self, scratch: &'m mut [u8; RECEIPT_LEN]) -> Result<Message<'m>, ossicle_core::Error> {
        Ok(match self {
            Self::Answer(bytes) => Message::decode(bytes)?,
            Self::Done(request) => Message::Done { request: *request },
            Self::Receipt(receipt) => Message::Told(*receipt),
            Self::ReceiptBy(from, receipt) => ToldBy { from: *from, receipt: *receipt }.encode(scratch)?,
            Self::Refused { request, reason, retry_after } => {
                Message::Refused { request: *request, reason: *reason, retry_after: *retry_after }
            }
            Self::Status(request) => Message::Status { request: *request },
            Self::StatusResponse(request) => Message::StatusResponse { request: *request },
        })
    }

    /// Room that the sealed record takes at most.
    fn room(&self) -> usize {
        match self {
            Self::Answer(bytes) => bytes.len() + RECORD_OVERHEAD,
            // All others are a handful of integers, and at most one tag and one id.
            _ => RECEIPT_LEN + RECORD_OVERHEAD,
        }
    }

    /// Takes in a receipt that says the same of the next message, so that receipts are cumulative.
    fn merge(&mut self, next: &Self) -> bool {
        let (held, next) = match (self, next) {
            (Self::Receipt(held), Self::Receipt(next)) => (held, next),
            (Self::ReceiptBy(whose, held), Self::ReceiptBy(of, next)) if whose == of => (held, next),
            _ => return false,
        };
        let follows = held.tag.is_none()
            && next.tag.is_none()
            && (held.rung, held.reason, held.chain) == (next.rung, next.reason, next.chain)
            && held.to.checked_add(1) == Some(next.from);
        if follows {
            held.to = next.to;
        }
        follows
    }
}

/// Bytes that no receipt is longer than.
pub const RECEIPT_LEN: usize = 80;

/// A sealed message from one client to another that is in no store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passing {
    /// The authenticated sender.
    pub sender: ClientId,
    /// Its chain, and its number there: its name in receipts.
    pub chain: ChainId,
    /// See `chain`.
    pub n: u32,
    /// The receipts that the sender wants.
    pub wanted: Rungs,
    /// Whether it is for one of several recipients.
    pub group: bool,
    /// The envelope.
    pub bytes: Arc<[u8]>,
}

impl Passing {
    /// The same as something that waits for `recipient` from `at` on.
    pub fn into_item(self, recipient: ClientId, at: u64) -> NewItem {
        let Self { sender, chain, n, wanted, group, bytes } = self;
        NewItem { recipient, sender, kind: ItemKind::envelope(group), chain, n, wanted: wanted.bits(), bytes, at }
    }

    /// Whether its recipient says that it has it, or why not.
    const fn is_answered_for(&self) -> bool {
        self.wanted.contains(Rung::Delivered) || self.wanted.contains(Rung::Opened)
    }

    fn len(&self) -> usize {
        size_of::<Self>() + self.bytes.len()
    }
}

/// Something for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in no store.
    Passing(Passing),
    /// It is in the store, and stays there until the client acknowledges it.
    Waiting(Item),
}

/// Bytes of the record that says that the next one waited: two varints of ten bytes and a code.
const ANNOUNCEMENT: usize = 22 + RECORD_OVERHEAD;

impl Delivery {
    /// The message that goes before it, if it waited.
    pub const fn announcement(&self) -> Option<Message<'static>> {
        match self {
            Self::Passing(_) => None,
            Self::Waiting(item) => Some(Message::Waited { seq: item.seq, at: item.at }),
        }
    }

    /// The message to be sealed.
    ///
    /// # Errors
    /// Those of [`Message::decode`], which nothing causes that was encoded before it was stored.
    pub fn message(&self) -> Result<Message<'_>, ossicle_core::Error> {
        match self {
            Self::Passing(passing) => Ok(Message::Deliver { wanted: passing.wanted, envelope: &passing.bytes }),
            Self::Waiting(item) => match item.kind {
                ItemKind::Envelope | ItemKind::GroupEnvelope => {
                    let wanted = Rungs::from_bits(item.wanted).ok_or(ossicle_core::Error::Decode)?;
                    Ok(Message::Deliver { wanted, envelope: &item.bytes })
                }
                ItemKind::Wrap | ItemKind::Receipt | ItemKind::Notice => Message::decode(&item.bytes),
            },
        }
    }

    fn room(&self) -> usize {
        match self {
            Self::Passing(passing) => MESSAGE_HEAD + passing.bytes.len() + RECORD_OVERHEAD,
            Self::Waiting(item) => payload_len(item) + RECORD_OVERHEAD + ANNOUNCEMENT,
        }
    }
}

/// Code and wanted receipts.
const MESSAGE_HEAD: usize = 3;

/// Bytes of the payload that the recipient opens.
fn payload_len(item: &Item) -> usize {
    match item.kind {
        ItemKind::Envelope | ItemKind::GroupEnvelope => MESSAGE_HEAD + item.bytes.len(),
        ItemKind::Wrap | ItemKind::Receipt | ItemKind::Notice => item.bytes.len(),
    }
}

/// The receipt of a message that went no further.
pub const fn refusal(chain: ChainId, n: u32, reason: Reason) -> Receipt {
    Receipt { rung: Rung::Refused, reason: Some(reason), chain, from: n, to: n, tag: None }
}

/// Tells the senders of messages that were removed from the store why, from `at` on. Who sent a wrap needs no receipt:
/// the messages of its chain are told of.
pub fn refuse_waiting(reason: Reason, at: u64) -> Refuse {
    Refuse::new(move |recipient, item| {
        let by = (item.kind == ItemKind::GroupEnvelope).then_some(recipient);
        let bytes = told(by, &refusal(item.chain, item.n, reason))?;
        item.kind.is_envelope().then_some(NewItem {
            recipient: item.sender,
            sender: *recipient,
            kind: ItemKind::Receipt,
            chain: item.chain,
            n: item.n,
            wanted: 0,
            bytes,
            at,
        })
    })
}

/// The encoded message that tells a sender of a receipt; in a conversation of several with whose it is.
pub fn told(by: Option<&ClientId>, receipt: &Receipt) -> Option<Arc<[u8]>> {
    let (mut scratch, mut bytes) = ([0; RECEIPT_LEN], [0; RECEIPT_LEN]);
    let message = match by {
        Some(from) => ToldBy { from: *from, receipt: *receipt }.encode(&mut scratch).ok()?,
        None => Message::Told(*receipt),
    };
    let len = message.encode(&mut bytes).ok()?;
    bytes.get(..len).map(Arc::from)
}

/// Why a message did not pass.
#[derive(Debug, PartialEq, Eq)]
pub enum NotPassed {
    /// The client takes no record of this length.
    TooLarge,
    /// It has to wait in the store.
    Keep(Passing),
}

/// What a channel seals next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// This.
    Owed(Owed),
    /// This.
    Delivery(Delivery),
    /// There is more, but it needs more room.
    Full,
    /// Nothing waits.
    Empty,
    /// Nothing waits and nothing will: close, and say why.
    Close(Option<Reason>),
    /// The client does not read what it is owed: end without another word.
    Overrun,
}

/// What stands against reading on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// So many answers and receipts wait that no request should add to them.
    pub behind: bool,
    /// The connection ends.
    pub ending: bool,
}

/// What a mailbox wants of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Items beyond this number,
    pub after: u64,
    /// so many,
    pub items: usize,
    /// of so many bytes together.
    pub bytes: usize,
    /// The client takes receipts only.
    pub receipts_only: bool,
    /// What is asked for is worth nothing once this has changed.
    era: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Mailbox {
    client: ClientId,
    connection: u64,
    max_payload: usize,
    limits: MailboxLimits,
    shared: Arc<Shared>,
    queue: Mutex<Queue>,
    /// Whether the queue has an end, for whoever asks often.
    ending: AtomicBool,
    changed: Notify,
}

/// What the mailboxes of a server share.
#[derive(Debug)]
pub struct Shared {
    /// How much waits in all of them.
    pub budget: Budget,
    /// Takes what could not be handed over.
    pub keeper: Keeper,
    /// Is told who comes and goes.
    pub presence: Arc<Presence>,
}

#[derive(Debug, Default)]
struct Queue {
    owed: VecDeque<Owed>,
    owed_bytes: usize,
    deliveries: VecDeque<Delivery>,
    /// What passed and is sealed, but not all written; `None` in the place of what the keeper has by now.
    sealed: VecDeque<Option<Passing>>,
    /// What passed and was written, and for which the recipient has not answered.
    unanswered: VecDeque<Passing>,
    /// Bytes of what passes, wherever it is.
    bytes: usize,
    backlog: Backlog,
    listening: bool,
    /// The client listened on the connection that this one took over: until then it is taken for present.
    succeeds: Option<Instant>,
    /// What it wants to be told of others.
    watch: Option<Box<Watch>>,
    end: Option<End>,
}

/// Where this connection stands in the client's queue in the store.
#[derive(Debug, Default)]
struct Backlog {
    /// Everything up to here was put into the mailbox, or needs not be.
    cursor: u64,
    /// Everything up to here was in an answer of the store's. Between it and the cursor is what was offered.
    floor: u64,
    /// What the store has answered last holds everything above the one number, up to the other.
    answered: (u64, u64),
    /// The store may hold something beyond the cursor.
    behind: bool,
    /// It is being asked.
    asking: bool,
    /// Something came to it since it was asked.
    stale: bool,
    /// Something came to it while the client did not listen.
    missed: bool,
    /// Nothing up to here is asked for again because of a poll.
    polled: u64,
    /// Changes whenever the client begins or ceases to listen, or something is withdrawn.
    era: u32,
    /// What was put into the mailbox and is not acknowledged, in this order: number and bytes.
    held: VecDeque<(u64, usize)>,
    /// What of them was acknowledged while the store is asked, which may not know it yet.
    acknowledged: Vec<u64>,
    /// None of them has a higher number.
    highest: u64,
    held_bytes: usize,
    /// How many of `held`, from the front, were sealed.
    sealed: usize,
    /// The highest number that was sealed.
    newest: u64,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Close(Option<Reason>),
    Overrun,
}

impl Mailbox {
    /// The mailbox of a new connection, whose number no other connection of this process has.
    pub fn new(
        client: ClientId,
        connection: u64,
        max_payload: usize,
        limits: MailboxLimits,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            client,
            connection,
            max_payload,
            limits,
            shared,
            queue: Mutex::default(),
            ending: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// The client.
    pub const fn client(&self) -> &ClientId {
        &self.client
    }

    /// The connection's number.
    pub const fn connection(&self) -> u64 {
        self.connection
    }

    /// Bytes of the longest payload that the client takes.
    pub const fn max_payload(&self) -> usize {
        self.max_payload
    }

    /// Waits until there may be something to take. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Puts in what the server owes the client. Whether it was taken in by a receipt that waits already.
    pub fn owe(&self, owed: Owed) -> bool {
        let mut queue = self.lock();
        if queue.owed.back_mut().is_some_and(|last| last.merge(&owed)) {
            return true;
        }
        if queue.owed.len() >= self.limits.owed {
            queue.end = Some(End::Overrun);
            self.ending.store(true, Ordering::Release);
        } else {
            queue.owed_bytes += owed.room();
            queue.owed.push_back(owed);
        }
        drop(queue);
        self.changed.notify_one();
        false
    }

    /// Puts in a message that is in no store.
    ///
    /// # Errors
    /// [`NotPassed`].
    pub fn pass(&self, passing: Passing) -> Result<(), NotPassed> {
        self.pass_unnoticed(passing)?;
        self.notice();
        Ok(())
    }

    /// The same for one of several in a row, after which the channel has to [`notice`](Self::notice) them: it is woken
    /// once, and writes them at once.
    ///
    /// # Errors
    /// [`NotPassed`].
    pub fn pass_unnoticed(&self, passing: Passing) -> Result<(), NotPassed> {
        if MESSAGE_HEAD + passing.bytes.len() > self.max_payload {
            return Err(NotPassed::TooLarge);
        }
        let mut queue = self.lock();
        let len = passing.len();
        let held = queue.deliveries.len() + queue.sealed.len() + queue.unanswered.len();
        let full = held >= self.limits.messages || queue.bytes + len > self.limits.bytes;
        let passes = queue.listening && queue.end.is_none() && !queue.backlog.behind && !full;
        if !passes || !self.shared.budget.take(len, self.limits.total) {
            self.keep_of(&mut queue, &passing.sender);
            return Err(NotPassed::Keep(passing));
        }
        queue.bytes += len;
        queue.deliveries.push_back(Delivery::Passing(passing));
        Ok(())
    }

    /// Wakes the channel.
    pub fn notice(&self) {
        self.changed.notify_one();
    }

    /// The sender's next message waits in the store: what of his only passes is given to the keeper before it. What is
    /// on its way already reaches the client twice.
    pub fn keep_behind(&self, sender: &ClientId) {
        self.keep_of(&mut self.lock(), sender);
    }

    fn keep_of(&self, queue: &mut Queue, sender: &ClientId) {
        if queue.bytes == 0 {
            return;
        }
        let is_his = |passing: &Passing| passing.sender == *sender;
        let mut kept = Vec::new();
        queue.unanswered.retain(|passing| {
            let his = is_his(passing);
            if his {
                kept.push(passing.clone());
            }
            !his
        });
        for sealed in &mut queue.sealed {
            kept.extend(sealed.take_if(|passing| is_his(passing)));
        }
        queue.deliveries.retain(|delivery| match delivery {
            Delivery::Passing(passing) if is_his(passing) => {
                kept.push(passing.clone());
                false
            }
            _ => true,
        });
        let bytes = kept.iter().map(Passing::len).sum();
        queue.bytes -= bytes;
        self.shared.budget.give(bytes);
        self.shared.keeper.keep_for(self.client, kept);
    }

    /// Takes back what of these chains was not sealed: what only passes is returned, and what waited is not in the store any
    /// more. `chains` are in order.
    pub fn withdraw(&self, chains: &[ChainId]) -> Vec<Passing> {
        let mut queue = self.lock();
        let queue = &mut *queue;
        let (mut withdrawn, mut gone) = (Vec::new(), Vec::new());
        let goes = |chain: &ChainId| chains.binary_search(chain).is_ok();
        queue.deliveries.retain(|delivery| match delivery {
            Delivery::Passing(passing) if goes(&passing.chain) => {
                withdrawn.push(passing.clone());
                false
            }
            Delivery::Waiting(item) if item.kind != ItemKind::Receipt && goes(&item.chain) => {
                gone.push(item.seq);
                false
            }
            _ => true,
        });
        let bytes = withdrawn.iter().map(Passing::len).sum();
        queue.bytes -= bytes;
        self.shared.budget.give(bytes);
        let backlog = &mut queue.backlog;
        gone.sort_unstable();
        backlog.held.retain(|(seq, len)| {
            let goes = gone.binary_search(seq).is_ok();
            if goes {
                backlog.held_bytes -= len;
            }
            !goes
        });
        if backlog.asking {
            // What is being answered may be from before.
            backlog.era = backlog.era.wrapping_add(1);
        }
        withdrawn
    }

    /// Something came into the store for the client: it is put in at once where the client has everything before it.
    ///
    /// # Errors
    /// Gives it back if the client takes no record of this length: it cannot stay in the store.
    pub fn offer(&self, item: Item) -> Result<(), Item> {
        let mut queue = self.lock();
        if !queue.listening && item.kind != ItemKind::Receipt {
            queue.backlog.missed = true;
            return Ok(());
        }
        if queue.end.is_some() {
            return Ok(());
        }
        let backlog = &mut queue.backlog;
        let (above, up_to) = backlog.answered;
        if above < item.seq && item.seq <= up_to {
            // The store was asked between the commit and this word of it: the client has it, or will.
            return Ok(());
        }
        if backlog.behind || !self.has_room(backlog, item.bytes.len()) {
            // Commits are told of by many, so a lower number may come behind a higher one.
            backlog.cursor = backlog.cursor.min(item.seq.saturating_sub(1));
            backlog.stale = true;
            backlog.behind = true;
        } else if payload_len(&item) > self.max_payload {
            return Err(item);
        } else {
            backlog.cursor = backlog.cursor.max(item.seq);
            backlog.hold(&item);
            queue.deliveries.push_back(Delivery::Waiting(item));
        }
        drop(queue);
        self.changed.notify_one();
        Ok(())
    }

    /// What the store should be asked for now. It is asked once at a time: [`answered`](Self::answered) follows.
    pub fn wanted(&self) -> Option<Wanted> {
        let mut queue = self.lock();
        let receipts_only = !queue.listening;
        let ended = queue.end.is_some();
        let backlog = &mut queue.backlog;
        let (items, bytes) = self.window();
        // Half a window at a time, so that the store is not asked for every single acknowledgement.
        if ended
            || backlog.asking
            || !backlog.behind
            || backlog.held.len() > items / 2
            || backlog.held_bytes > bytes / 2
        {
            return None;
        }
        backlog.asking = true;
        backlog.stale = false;
        Some(Wanted {
            after: backlog.cursor,
            items: items - backlog.held.len(),
            bytes: bytes - backlog.held_bytes,
            receipts_only,
            era: backlog.era,
        })
    }

    /// Puts in what the store answered; `None` if it could not. Gives back what is too long for the client.
    pub fn answered(&self, wanted: Wanted, answer: Option<Vec<Item>>) -> Vec<Item> {
        let mut too_large = Vec::new();
        let mut queue = self.lock();
        queue.backlog.asking = false;
        let Some(items) = answer.filter(|_| queue.backlog.era == wanted.era && queue.end.is_none()) else {
            return too_large;
        };
        // With room for one more of the longest, the store has given all that it had.
        let bytes: usize = items.iter().map(|item| item.bytes.len()).sum();
        let exhausted = items.is_empty() || (items.len() < wanted.items && bytes + MAX_RECORD_LEN <= wanted.bytes);
        if let Some(last) = items.last() {
            let (above, up_to) = queue.backlog.answered;
            queue.backlog.answered = (if up_to == wanted.after { above } else { wanted.after }, last.seq);
            // Where it was set back meanwhile, something is missing before all of this.
            if queue.backlog.cursor >= wanted.after {
                queue.backlog.cursor = queue.backlog.cursor.max(last.seq);
            }
            if queue.backlog.floor >= wanted.after {
                queue.backlog.floor = queue.backlog.floor.max(last.seq);
            }
        }
        for item in items {
            let backlog = &mut queue.backlog;
            if (wanted.receipts_only && item.kind != ItemKind::Receipt)
                || backlog.acknowledged.contains(&item.seq)
                || (item.seq <= backlog.highest && backlog.held.iter().any(|(seq, _)| *seq == item.seq))
            {
                continue;
            }
            if payload_len(&item) > self.max_payload {
                too_large.push(item);
            } else {
                backlog.hold(&item);
                queue.deliveries.push_back(Delivery::Waiting(item));
            }
        }
        let backlog = &mut queue.backlog;
        if exhausted && !backlog.stale {
            backlog.behind = false;
            backlog.acknowledged = Vec::new();
        } else {
            let floor = backlog.floor;
            backlog.acknowledged.retain(|seq| *seq > floor);
        }
        drop(queue);
        self.changed.notify_one();
        too_large
    }

    /// Takes the client's word that it has everything up to `seq`, and returns the numbers that the store can forget.
    ///
    /// # Errors
    /// [`Reason::Malformed`] if no such number was delivered on this connection.
    pub fn acknowledge(&self, seq: u64) -> Result<Vec<u64>, Reason> {
        let mut queue = self.lock();
        let backlog = &mut queue.backlog;
        let place = backlog.held.iter().take(backlog.sealed).position(|(held, _)| *held == seq);
        let Some(place) = place else {
            return if seq <= backlog.newest { Ok(Vec::new()) } else { Err(Reason::Malformed) };
        };
        let acknowledged: Vec<_> = backlog.held.drain(..=place).collect();
        if backlog.behind {
            backlog.acknowledged.extend(acknowledged.iter().map(|(seq, _)| *seq));
        }
        backlog.sealed -= acknowledged.len();
        backlog.held_bytes -= acknowledged.iter().map(|(_, len)| len).sum::<usize>();
        give_back(&mut backlog.held);
        drop(queue);
        // There may be room for more now.
        self.changed.notify_one();
        Ok(acknowledged.into_iter().map(|(seq, _)| seq).collect())
    }

    /// The client has said what became of these messages: they need not be kept for it any longer.
    pub fn settle(&self, chain: &ChainId, from: u32, to: u32) {
        let mut queue = self.lock();
        let queue = &mut *queue;
        let mut freed = 0;
        let mut keep = |passing: &Passing| {
            let settled = passing.chain == *chain && (from..=to).contains(&passing.n);
            if settled {
                freed += passing.len();
            }
            !settled
        };
        // They are answered in the order in which they came, mostly.
        while queue.unanswered.front().is_some_and(|first| !keep(first)) {
            queue.unanswered.pop_front();
        }
        if queue.unanswered.iter().any(|passing| passing.chain == *chain && (from..=to).contains(&passing.n)) {
            queue.unanswered.retain(&mut keep);
        }
        give_back(&mut queue.unanswered);
        queue.bytes -= freed;
        self.shared.budget.give(freed);
    }

    /// Whether the client takes messages now.
    pub fn is_listening(&self) -> bool {
        let queue = self.lock();
        queue.listening && queue.end.is_none()
    }

    /// Whether others are told that the client is there: it takes messages, or did so on the connection that this one took
    /// over a moment ago.
    pub fn is_present(&self) -> bool {
        self.lock().is_present()
    }

    /// This connection takes over one that listened: until then, others need not know.
    pub fn succeed(&self, until: Instant) {
        self.lock().succeeds = Some(until);
        self.shared.presence.note_succession(&self.client, until);
    }

    /// Watches a pattern more.
    ///
    /// # Errors
    /// [`Reason::TooLarge`].
    pub(crate) fn watch(&self, pattern: Pattern) -> Result<(), Reason> {
        self.lock().watch.get_or_insert_default().add(pattern)
    }

    /// Watches it no more, and says whether anything is watched still.
    pub(crate) fn unwatch(&self, pattern: &Pattern) -> bool {
        let mut queue = self.lock();
        let watches = queue.watch.as_mut().is_some_and(|watch| watch.remove(pattern));
        if !watches {
            queue.watch = None;
        }
        watches
    }

    /// What is watched, if anything is.
    pub(crate) fn watching<T>(&self, look: impl FnOnce(&mut Watch) -> T) -> Option<T> {
        self.lock().watch.as_deref_mut().map(look)
    }

    /// Tells the client, if it watches such names, what has become of another.
    pub(crate) fn tell_change(&self, id: ClientId, name: &Name, status: Option<PeerStatus>) {
        if self.watching(|watch| watch.tell(id, name, status)).unwrap_or_default() {
            self.changed.notify_one();
        }
    }

    /// From now on, messages come in. `waiting`: the store holds something for the client, as everything shows that
    /// the keeper was given before.
    pub fn listen(&self, waiting: bool) {
        let mut queue = self.lock();
        if !core::mem::replace(&mut queue.listening, true) {
            queue.succeeds = None;
            self.shared.presence.note(&self.client, false);
            let backlog = &mut queue.backlog;
            backlog.behind |= waiting || core::mem::take(&mut backlog.missed);
            backlog.begin_anew();
            backlog.era = backlog.era.wrapping_add(1);
        }
        drop(queue);
        self.changed.notify_one();
    }

    /// The store holds something that may not be here. Receipts come in from now on, as nothing else does until the client
    /// listens.
    pub fn greet(&self) {
        let mut queue = self.lock();
        queue.backlog.missed |= !queue.listening;
        queue.backlog.behind = true;
        // What is being answered may be from before.
        queue.backlog.stale = true;
        // Its number may be lower than that of something that was offered.
        queue.backlog.cursor = queue.backlog.floor;
        drop(queue);
        self.changed.notify_one();
    }

    /// Whether something waits for the client in the store of which nothing is known here.
    pub fn lacks(&self, waiting: &Waiting) -> bool {
        self.lock().backlog.lacks(waiting)
    }

    /// So much waits for the client in the store, and everything of it that was to be offered was: if something is
    /// unknown here all the same, the store is asked.
    pub fn poll(&self, waiting: &Waiting) {
        let mut queue = self.lock();
        if !queue.backlog.lacks(waiting) {
            return;
        }
        queue.backlog.missed |= !queue.listening;
        queue.backlog.polled = waiting.newest;
        queue.backlog.behind = true;
        queue.backlog.stale = true;
        drop(queue);
        self.changed.notify_one();
    }

    /// No more messages. What was not sealed goes to the keeper. Whether the client was present until now.
    pub fn stop_listening(&self) -> bool {
        let mut queue = self.lock();
        let queue = &mut *queue;
        let was_present = queue.is_present();
        queue.listening = false;
        queue.succeeds = None;
        if was_present {
            self.shared.presence.note(&self.client, true);
        }
        let backlog = &mut queue.backlog;
        backlog.answered = (0, 0);
        backlog.era = backlog.era.wrapping_add(1);
        // What waits in the store and was not sealed is not delivered, but for receipts.
        let is_receipt =
            |delivery: &Delivery| matches!(delivery, Delivery::Waiting(Item { kind: ItemKind::Receipt, .. }));
        if queue.deliveries.iter().any(is_receipt) {
            backlog.behind = true;
            backlog.begin_anew();
        }
        while backlog.held.len() > backlog.sealed {
            backlog.held_bytes -= backlog.held.pop_back().map_or(0, |(_, len)| len);
        }
        // The rest is on its way; the client says what became of it, or its connection ends.
        let passing = take_passing(&mut queue.deliveries);
        let bytes = passing.iter().map(Passing::len).sum();
        queue.bytes -= bytes;
        self.shared.budget.give(bytes);
        self.shared.keeper.keep_for(self.client, passing);
        was_present
    }

    /// Ends the connection once it was told all it is owed. The first reason stands. What the client did not answer for
    /// goes to the keeper, though it may have it: whatever is kept for the client later is kept behind it.
    pub fn end(&self, reason: Option<Reason>) {
        let mut queue = self.lock();
        let queue = &mut *queue;
        if queue.is_present() {
            self.shared.presence.note(&self.client, true);
        }
        if queue.end.is_none() {
            queue.end = Some(End::Close(reason));
            self.ending.store(true, Ordering::Release);
        }
        self.shared.budget.give(core::mem::take(&mut queue.bytes));
        let mut all: Vec<_> = core::mem::take(&mut queue.unanswered).into();
        all.extend(core::mem::take(&mut queue.sealed).into_iter().flatten());
        all.append(&mut take_passing(&mut queue.deliveries));
        // Under the lock: who finds this mailbox ended comes to the keeper behind this.
        self.shared.keeper.keep_for(self.client, all);
        self.changed.notify_one();
    }

    /// Whether the connection ends.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Whether the channel should go on reading.
    pub fn pressure(&self) -> Pressure {
        let queue = self.lock();
        let behind = queue.owed.len() >= self.limits.owed / 4 || queue.owed_bytes >= MAX_OWED_BYTES;
        Pressure { behind, ending: queue.end.is_some() }
    }

    /// Takes out what is next, if its record fits into `room` bytes.
    pub fn next(&self, room: usize) -> Next {
        let mut queue = self.lock();
        let queue = &mut *queue;
        if matches!(queue.end, Some(End::Overrun)) {
            return Next::Overrun;
        }
        if let Some(owed) = queue.owed.front() {
            if owed.room() > room {
                return Next::Full;
            }
            if let Some(owed) = queue.owed.pop_front() {
                queue.owed_bytes -= owed.room();
                give_back(&mut queue.owed);
                return Next::Owed(owed);
            }
        }
        if let Some(watch) = &mut queue.watch
            && queue.end.is_none()
        {
            if room < self.max_payload.min(CHANGES) + RECORD_OVERHEAD {
                return Next::Full;
            }
            if let Some(changes) = watch.next(self.max_payload.min(CHANGES)) {
                return Next::Owed(Owed::Answer(changes));
            }
        }
        if let Some(delivery) = queue.deliveries.front() {
            if delivery.room() > room {
                return Next::Full;
            }
            if let Some(delivery) = queue.deliveries.pop_front() {
                match &delivery {
                    Delivery::Passing(passing) => queue.sealed.push_back(Some(passing.clone())),
                    Delivery::Waiting(item) => {
                        queue.backlog.sealed += 1;
                        queue.backlog.newest = queue.backlog.newest.max(item.seq);
                    }
                }
                give_back(&mut queue.deliveries);
                return Next::Delivery(delivery);
            }
        }
        match queue.end {
            Some(End::Close(reason)) => Next::Close(reason),
            Some(End::Overrun) => Next::Overrun,
            None => Next::Empty,
        }
    }

    /// The socket has taken the records of so many messages that passed, in the order in which they were sealed.
    pub fn written(&self, count: usize) {
        if count == 0 {
            return;
        }
        let mut queue = self.lock();
        let queue = &mut *queue;
        let mut freed = 0;
        for _ in 0..count {
            match queue.sealed.pop_front() {
                Some(Some(passing)) if passing.is_answered_for() => queue.unanswered.push_back(passing),
                Some(Some(passing)) => freed += passing.len(),
                Some(None) => {}
                None => break,
            }
        }
        give_back(&mut queue.sealed);
        queue.bytes -= freed;
        self.shared.budget.give(freed);
    }

    /// Items and bytes from the store that the client may leave unacknowledged.
    const fn window(&self) -> (usize, usize) {
        if self.max_payload < DEVICE_PAYLOAD { (16, 16 * 1024) } else { (1024, 1024 * 1024) }
    }

    fn has_room(&self, backlog: &Backlog, len: usize) -> bool {
        let (items, bytes) = self.window();
        backlog.held.is_empty() || (backlog.held.len() < items && backlog.held_bytes + len <= bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing under this lock can panic halfway through a change.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of a record of changes at most.
const CHANGES: usize = 4096;

/// A client that takes no longer payload is a device.
const DEVICE_PAYLOAD: usize = 8 * 1024;

impl Queue {
    fn is_present(&self) -> bool {
        let succeeds = || self.succeeds.is_some_and(|until| Instant::now() < until);
        self.end.is_none() && (self.listening || succeeds())
    }
}

impl Backlog {
    fn lacks(&self, waiting: &Waiting) -> bool {
        waiting.items > 0 && waiting.newest > self.polled.max(self.highest).max(self.cursor)
    }

    /// The store is asked from its first item on.
    fn begin_anew(&mut self) {
        self.cursor = 0;
        self.floor = 0;
        self.answered = (0, 0);
    }

    fn hold(&mut self, item: &Item) {
        self.highest = self.highest.max(item.seq);
        self.held.push_back((item.seq, item.bytes.len()));
        self.held_bytes += item.bytes.len();
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.end(None);
    }
}

impl Budget {
    fn take(&self, len: usize, total: usize) -> bool {
        let before = self.0.fetch_add(len, Ordering::Relaxed);
        let fits = before.saturating_add(len) <= total;
        if !fits {
            self.give(len);
        }
        fits
    }

    /// How many they are.
    pub fn held(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn give(&self, len: usize) {
        self.0.fetch_sub(len, Ordering::Relaxed);
    }
}

fn take_passing(deliveries: &mut VecDeque<Delivery>) -> Vec<Passing> {
    core::mem::take(deliveries)
        .into_iter()
        .filter_map(|delivery| match delivery {
            Delivery::Passing(passing) => Some(passing),
            Delivery::Waiting(_) => None,
        })
        .collect()
}

/// An idle client keeps no memory of its last burst.
fn give_back<T>(queue: &mut VecDeque<T>) {
    if queue.is_empty() {
        *queue = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::keeper::Orders;

    const CHAIN: ChainId = [1; 8];
    const BOB: ClientId = [2; 16];
    const LIMITS: MailboxLimits = MailboxLimits { messages: 3, bytes: 4096, total: 8192, owed: 4 };

    fn shared() -> (Arc<Shared>, Orders) {
        let (keeper, orders) = Keeper::new(Clock::system());
        (Arc::new(Shared { budget: Budget::default(), keeper, presence: Arc::default() }), orders)
    }

    fn of(shared: &Arc<Shared>, max_payload: usize) -> Mailbox {
        Mailbox::new(BOB, 1, max_payload, LIMITS, Arc::clone(shared))
    }

    fn mailbox() -> (Mailbox, Orders) {
        let (shared, orders) = shared();
        (of(&shared, 1000), orders)
    }

    fn wanting(n: u32, len: usize, wanted: Rungs) -> Passing {
        Passing { sender: [9; 16], chain: CHAIN, n, wanted, group: false, bytes: vec![7; len].into() }
    }

    fn envelope(n: u32, len: usize) -> Passing {
        wanting(n, len, Rungs::NONE)
    }

    fn item(seq: u64) -> Item {
        item_of(seq, ItemKind::Envelope)
    }

    fn item_of(seq: u64, kind: ItemKind) -> Item {
        Item { seq, sender: [9; 16], kind, chain: CHAIN, n: 0, wanted: 0, bytes: vec![7; 40].into(), at: 5 }
    }

    fn receipt(from: u32, to: u32) -> Owed {
        Owed::Receipt(Receipt { rung: Rung::Accepted, reason: None, chain: CHAIN, from, to, tag: None })
    }

    /// The numbers of what is sealed next, as long as something is.
    fn sealed(mailbox: &Mailbox) -> Vec<u64> {
        let mut seqs = Vec::new();
        while let Next::Delivery(delivery) = mailbox.next(1 << 16) {
            seqs.push(match delivery {
                Delivery::Waiting(item) => item.seq,
                Delivery::Passing(passing) => u64::from(passing.n),
            });
        }
        seqs
    }

    fn numbers(orders: &mut Orders) -> Vec<u32> {
        orders.items().into_iter().map(|item| item.n).collect()
    }

    #[test]
    fn messages_pass_only_while_the_client_listens_and_there_is_room() {
        let (mailbox, mut orders) = mailbox();
        assert_eq!(mailbox.pass(envelope(0, 40)), Err(NotPassed::Keep(envelope(0, 40))));
        mailbox.listen(false);
        assert!(mailbox.is_listening());
        assert_eq!(mailbox.pass(envelope(0, 998)), Err(NotPassed::TooLarge));
        for n in 0..3 {
            assert_eq!(mailbox.pass(envelope(n, 40)), Ok(()));
        }
        assert_eq!(mailbox.pass(envelope(3, 40)), Err(NotPassed::Keep(envelope(3, 40))));
        mailbox.stop_listening();
        assert_eq!(numbers(&mut orders), [0, 1, 2]);
        assert_eq!(mailbox.pass(envelope(3, 40)), Err(NotPassed::Keep(envelope(3, 40))));
        assert_eq!(mailbox.shared.budget.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn all_mailboxes_share_one_budget() {
        let (shared, _orders) = shared();
        let boxes = [of(&shared, 1000), of(&shared, 1000), of(&shared, 1000)];
        let mut taken = 0;
        for mailbox in &boxes {
            mailbox.listen(false);
            // Fewer than one mailbox alone takes.
            for _ in 0..3 {
                taken += usize::from(mailbox.pass(envelope(0, 990)).is_ok());
            }
        }
        assert!(taken < 9, "three each would exceed the total");
        drop(boxes);
        assert_eq!(shared.budget.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_owed_goes_first_and_receipts_are_cumulative() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        assert_eq!(mailbox.pass(envelope(0, 40)), Ok(()));
        assert!(!mailbox.owe(receipt(5, 5)));
        assert!(mailbox.owe(receipt(6, 7)));
        assert!(!mailbox.owe(receipt(9, 9)));
        assert_eq!(mailbox.next(16), Next::Full);
        assert_eq!(mailbox.next(4096), Next::Owed(receipt(5, 7)));
        assert_eq!(mailbox.next(4096), Next::Owed(receipt(9, 9)));
        assert_eq!(mailbox.next(40 + 3 + RECORD_OVERHEAD - 1), Next::Full);
        assert_eq!(mailbox.next(40 + 3 + RECORD_OVERHEAD), Next::Delivery(Delivery::Passing(envelope(0, 40))));
        assert_eq!(mailbox.next(4096), Next::Empty);
    }

    #[test]
    fn an_ending_mailbox_keeps_what_it_owes_and_gives_the_rest_to_the_keeper() {
        let (mailbox, mut orders) = mailbox();
        mailbox.listen(false);
        assert_eq!(mailbox.pass(envelope(0, 40)), Ok(()));
        mailbox.owe(Owed::Done(4));
        mailbox.end(Some(Reason::TakenOver));
        assert_eq!(numbers(&mut orders), [0]);
        mailbox.end(Some(Reason::Unavailable));
        assert!(matches!(mailbox.pass(envelope(1, 40)), Err(NotPassed::Keep(_))));
        assert_eq!(mailbox.next(4096), Next::Owed(Owed::Done(4)));
        assert_eq!(mailbox.next(4096), Next::Close(Some(Reason::TakenOver)));
    }

    #[test]
    fn what_passed_is_held_until_it_is_written_or_answered_for() {
        let (mailbox, mut orders) = mailbox();
        let wanted = Rungs::NONE.with(Rung::Delivered);
        mailbox.listen(false);
        for passing in [wanting(0, 40, wanted), envelope(1, 40), wanting(2, 40, wanted)] {
            assert_eq!(mailbox.pass(passing), Ok(()));
        }
        assert_eq!(sealed(&mailbox), [0, 1, 2]);
        mailbox.written(2);
        // The first is unanswered, the second is done, the third is on its way.
        mailbox.end(None);
        assert_eq!(numbers(&mut orders), [0, 2]);
        assert_eq!(mailbox.shared.budget.0.load(Ordering::Relaxed), 0);
        mailbox.written(1);

        let (mailbox, mut orders) = self::mailbox();
        mailbox.listen(false);
        for n in 0..3 {
            assert_eq!(mailbox.pass(wanting(n, 40, wanted)), Ok(()));
        }
        assert_eq!(sealed(&mailbox), [0, 1, 2]);
        mailbox.written(3);
        mailbox.settle(&[8; 8], 0, 9);
        mailbox.settle(&CHAIN, 1, 1);
        mailbox.settle(&CHAIN, 0, 0);
        drop(mailbox);
        assert_eq!(numbers(&mut orders), [2]);
    }

    #[test]
    fn what_a_sender_has_kept_is_behind_what_of_his_passes() {
        let (mailbox, mut orders) = mailbox();
        let wanted = Rungs::NONE.with(Rung::Delivered);
        mailbox.listen(false);
        let of = |sender, n| Passing { sender: [sender; 16], ..wanting(n, 40, wanted) };
        assert_eq!(mailbox.pass(of(7, 0)), Ok(()));
        assert_eq!(mailbox.pass(of(9, 1)), Ok(()));
        assert_eq!(sealed(&mailbox), [0, 1]);
        mailbox.written(1);
        assert_eq!(mailbox.pass(of(7, 2)), Ok(()));
        // There is no room for the fourth: the others of its sender go ahead of it, wherever they are.
        assert_eq!(mailbox.pass(of(7, 3)), Err(NotPassed::Keep(of(7, 3))));
        assert_eq!(numbers(&mut orders), [0, 2]);
        mailbox.keep_behind(&[9; 16]);
        assert_eq!(numbers(&mut orders), [1]);
        mailbox.written(1);
        assert!(sealed(&mailbox).is_empty());
        assert_eq!(mailbox.shared.budget.0.load(Ordering::Relaxed), 0);
        drop(mailbox);
        assert!(numbers(&mut orders).is_empty());
    }

    #[test]
    fn nothing_passes_by_what_waits_in_the_store() {
        let (mailbox, mut orders) = mailbox();
        mailbox.listen(true);
        assert!(matches!(mailbox.pass(envelope(9, 40)), Err(NotPassed::Keep(_))));
        let wanted = mailbox.wanted().unwrap();
        assert_eq!((wanted.after, wanted.items, wanted.receipts_only), (0, 16, false));
        assert_eq!(mailbox.wanted(), None, "it is asked already");
        // Something comes while the store is being asked: whether the answer holds it, nobody knows.
        assert_eq!(mailbox.offer(item(8)), Ok(()));
        assert_eq!(mailbox.answered(wanted, Some(vec![item(5), item(7)])), []);
        assert_eq!(sealed(&mailbox), [5, 7]);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 7);
        assert_eq!(mailbox.answered(wanted, Some(vec![item(8)])), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        assert_eq!(mailbox.wanted(), None);
        assert_eq!(mailbox.pass(envelope(9, 40)), Ok(()));
        assert_eq!(sealed(&mailbox), [8, 9]);
        // What waits stays in the store.
        drop(mailbox);
        assert_eq!(numbers(&mut orders), [9]);
    }

    #[test]
    fn a_client_with_everything_is_offered_the_rest_at_once_in_the_order_of_commits_told() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        for seq in [11, 10, 12] {
            assert_eq!(mailbox.offer(item(seq)), Ok(()));
        }
        assert_eq!(mailbox.wanted(), None);
        assert_eq!(mailbox.acknowledge(11), Err(Reason::Malformed), "it was not sealed");
        assert_eq!(sealed(&mailbox), [11, 10, 12]);
        assert_eq!(mailbox.acknowledge(11), Ok(vec![11]), "10 came behind it");
        assert_eq!(mailbox.acknowledge(11), Ok(vec![]));
        assert_eq!(mailbox.acknowledge(13), Err(Reason::Malformed));
        assert_eq!(mailbox.acknowledge(12), Ok(vec![10, 12]));
    }

    #[test]
    fn what_the_store_has_answered_is_not_given_again_when_its_commit_is_told() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(true);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![item(5), item(7)])), []);
        assert_eq!(mailbox.offer(item(5)), Ok(()));
        assert_eq!(sealed(&mailbox), [5, 7]);
        assert_eq!(mailbox.acknowledge(7), Ok(vec![5, 7]));
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.offer(item(7)), Ok(()));
        assert_eq!(mailbox.answered(wanted, Some(vec![item(9)])), []);
        assert_eq!(sealed(&mailbox), [9]);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 9);
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        for seq in [5, 9, 11, 10] {
            assert_eq!(mailbox.offer(item(seq)), Ok(()));
        }
        assert_eq!(sealed(&mailbox), [11, 10], "what was not in an answer is given, in whatever order");
        // Whoever listens anew is given what was not acknowledged.
        mailbox.stop_listening();
        mailbox.listen(false);
        assert_eq!(mailbox.offer(item(5)), Ok(()));
        assert_eq!(sealed(&mailbox), [5]);
    }

    #[test]
    fn a_client_that_acknowledges_nothing_gets_one_window() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        for seq in 1..=20 {
            assert_eq!(mailbox.offer(item(seq)), Ok(()));
        }
        assert_eq!(sealed(&mailbox), (1..=16).collect::<Vec<_>>());
        assert_eq!(mailbox.wanted(), None);
        assert_eq!(mailbox.acknowledge(8).map(|seqs| seqs.len()), Ok(8));
        let wanted = mailbox.wanted().unwrap();
        assert_eq!((wanted.after, wanted.items), (16, 8));
        assert_eq!(mailbox.answered(wanted, Some((17..=20).map(item).collect())), []);
        assert_eq!(sealed(&mailbox), [17, 18, 19, 20]);
        assert_eq!(mailbox.acknowledge(20).map(|seqs| seqs.len()), Ok(12));
    }

    #[test]
    fn who_does_not_listen_gets_receipts_only_and_the_rest_later() {
        let (mailbox, _orders) = mailbox();
        mailbox.greet();
        let wanted = mailbox.wanted().unwrap();
        assert!(wanted.receipts_only);
        assert_eq!(mailbox.answered(wanted, Some(vec![item(1), item_of(2, ItemKind::Receipt)])), []);
        assert_eq!(mailbox.offer(item(3)), Ok(()));
        assert!(matches!(mailbox.next(4096), Next::Delivery(Delivery::Waiting(Item { seq: 2, .. }))));
        // An answer to a question that was asked before the client listened holds too little.
        let stale = mailbox.wanted().unwrap();
        mailbox.listen(false);
        assert_eq!(mailbox.answered(stale, Some(Vec::new())), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!((wanted.after, wanted.receipts_only), (0, false));
        let all = vec![item(1), item_of(2, ItemKind::Receipt), item(3)];
        assert_eq!(mailbox.answered(wanted, Some(all)), []);
        assert_eq!(sealed(&mailbox), [1, 3], "the receipt is under way already");
        // Again from the start, for whoever listens anew.
        mailbox.stop_listening();
        mailbox.listen(true);
        assert_eq!(mailbox.wanted().unwrap().after, 0);
    }

    #[test]
    fn what_came_while_the_store_was_asked_is_asked_for() {
        let (mailbox, _orders) = mailbox();
        mailbox.greet();
        let wanted = mailbox.wanted().unwrap();
        // The answer is from before.
        mailbox.greet();
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![item_of(1, ItemKind::Receipt)])), []);
        assert_eq!(sealed(&mailbox), [1]);
        assert_eq!(mailbox.answered(mailbox.wanted().unwrap(), Some(Vec::new())), []);
        assert_eq!(mailbox.wanted(), None);
    }

    #[test]
    fn what_has_a_lower_number_than_what_was_offered_is_asked_for() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(true);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![item(2)])), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        assert_eq!(mailbox.offer(item(7)), Ok(()));
        // A receipt that the store has made by itself, and told of later.
        mailbox.greet();
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 2);
        assert_eq!(mailbox.answered(wanted, Some(vec![item_of(5, ItemKind::Receipt), item(7)])), []);
        assert_eq!(sealed(&mailbox), [2, 7, 5]);
        // The same while it is being asked for something else.
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        assert_eq!(mailbox.offer(item(20)), Ok(()));
        mailbox.poll(&Waiting { items: 2, bytes: 80, newest: 22 });
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 20);
        mailbox.greet();
        assert_eq!(mailbox.answered(wanted, Some(vec![item(22)])), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 7);
        let all = vec![item_of(19, ItemKind::Receipt), item(20), item(22)];
        assert_eq!(mailbox.answered(wanted, Some(all)), []);
        assert_eq!(sealed(&mailbox), [20, 22, 19]);
        assert_eq!(mailbox.acknowledge(19).map(|seqs| seqs.len()), Ok(6));
    }

    #[test]
    fn a_poll_asks_the_store_for_what_nobody_told_of() {
        let (mailbox, mut orders) = mailbox();
        let waiting = |items, newest| Waiting { items, bytes: 40 * items, newest };
        mailbox.listen(false);
        mailbox.poll(&waiting(0, 7));
        assert_eq!(mailbox.wanted(), None, "nothing waits");
        assert_eq!(mailbox.offer(item(8)), Ok(()));
        mailbox.poll(&waiting(1, 8));
        assert_eq!(mailbox.wanted(), None, "it is here");
        assert_eq!(mailbox.pass(envelope(0, 40)), Ok(()));
        assert!(mailbox.lacks(&waiting(2, 9)));
        mailbox.poll(&waiting(2, 9));
        assert!(matches!(mailbox.pass(envelope(1, 40)), Err(NotPassed::Keep(_))), "it may belong behind that");
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 8);
        assert_eq!(mailbox.answered(wanted, None), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![item(9)])), []);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(Vec::new())), []);
        mailbox.poll(&waiting(2, 9));
        assert_eq!(mailbox.wanted(), None, "it was asked for");
        assert_eq!(numbers(&mut orders), [0], "it was behind nothing");
        assert_eq!(sealed(&mailbox), [8, 9]);
    }

    #[test]
    fn what_a_poll_finds_while_the_client_does_not_listen_is_given_when_it_does() {
        let (mailbox, _orders) = mailbox();
        let waiting = Waiting { items: 1, bytes: 40, newest: 3 };
        mailbox.poll(&waiting);
        let wanted = mailbox.wanted().unwrap();
        assert!(wanted.receipts_only);
        assert_eq!(mailbox.answered(wanted, Some(vec![item(3)])), []);
        assert_eq!(mailbox.answered(mailbox.wanted().unwrap(), Some(Vec::new())), []);
        mailbox.poll(&waiting);
        assert_eq!(mailbox.wanted(), None);
        // Whoever said that nothing waits may have asked before.
        mailbox.listen(false);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![item(3)])), []);
        assert_eq!(sealed(&mailbox), [3]);
    }

    #[test]
    fn who_ceases_to_listen_gets_the_receipts_all_the_same() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        assert_eq!(mailbox.offer(item(1)), Ok(()));
        assert_eq!(mailbox.offer(item_of(2, ItemKind::Receipt)), Ok(()));
        mailbox.stop_listening();
        assert!(sealed(&mailbox).is_empty());
        let wanted = mailbox.wanted().unwrap();
        assert_eq!((wanted.after, wanted.receipts_only), (0, true));
        assert_eq!(mailbox.answered(wanted, Some(vec![item(1), item_of(2, ItemKind::Receipt)])), []);
        assert_eq!(sealed(&mailbox), [2]);
    }

    #[test]
    fn what_was_acknowledged_is_not_given_again_by_a_store_that_does_not_know_it_yet() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        for n in 1..=3 {
            assert_eq!(mailbox.offer(item(n)), Ok(()));
        }
        assert_eq!(sealed(&mailbox), [1, 2, 3]);
        mailbox.greet();
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.acknowledge(2), Ok(vec![1, 2]));
        assert_eq!(mailbox.answered(wanted, Some(vec![item(1), item(2), item(3), item(4)])), []);
        assert_eq!(sealed(&mailbox), [4]);
        assert_eq!(mailbox.acknowledge(4), Ok(vec![3, 4]));
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(wanted.after, 4);
        assert_eq!(mailbox.answered(wanted, Some(vec![])), []);
        assert_eq!(mailbox.wanted(), None);
        assert!(mailbox.lock().backlog.acknowledged.is_empty());
    }

    #[test]
    fn what_was_withdrawn_is_not_given() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(false);
        let of = |seq, chain| Item { chain, kind: ItemKind::GroupEnvelope, ..item(seq) };
        assert_eq!(mailbox.offer(of(1, [8; 8])), Ok(()));
        assert_eq!(sealed(&mailbox), [1]);
        for (seq, chain) in [(2, [8; 8]), (3, CHAIN), (4, [8; 8])] {
            assert_eq!(mailbox.offer(of(seq, chain)), Ok(()));
        }
        mailbox.greet();
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.withdraw(&[[7; 8], [8; 8]]), []);
        // What the store has answered is from before.
        assert_eq!(mailbox.answered(wanted, Some(vec![of(2, [8; 8]), of(3, CHAIN), of(4, [8; 8])])), []);
        assert_eq!(sealed(&mailbox), [3]);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, Some(vec![of(5, CHAIN)])), []);
        assert_eq!(sealed(&mailbox), [5]);
        assert_eq!(mailbox.acknowledge(5), Ok(vec![1, 3, 5]));
        assert_eq!(mailbox.lock().backlog.held_bytes, 0);
    }

    #[test]
    fn a_store_that_fails_is_asked_again() {
        let (mailbox, _orders) = mailbox();
        mailbox.listen(true);
        let wanted = mailbox.wanted().unwrap();
        assert_eq!(mailbox.answered(wanted, None), []);
        assert!(mailbox.wanted().is_some());
    }

    #[test]
    fn a_client_that_reads_nothing_is_overrun() {
        let (mailbox, _orders) = mailbox();
        for n in 0..5 {
            mailbox.owe(Owed::Done(n));
        }
        assert_eq!(mailbox.next(4096), Next::Overrun);
    }
}
