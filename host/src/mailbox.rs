//! What waits to be sealed for one connected client: a bounded queue between the router and the client's channel.
//!
//! Everybody puts in, only the client's own channel takes out. Answers and receipts go first, messages and wraps follow
//! in the order in which they came; the two have separate bounds, since a message can be refused and a receipt cannot.
//! Nothing is dropped: whatever a closing mailbox still holds is handed back, so that its senders are told.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ossicle_core::{Message, RECORD_OVERHEAD, Reason, Receipt, Rung, Rungs};
use tokio::sync::Notify;

use crate::store::{ChainId, ClientId, ItemKind, NewItem, Refuse};

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

    /// The message to be sealed.
    ///
    /// # Errors
    /// Those of [`Message::decode`], which no answer that was encoded causes.
    pub fn message(&self) -> Result<Message<'_>, ossicle_core::Error> {
        Ok(match self {
            Self::Answer(bytes) => Message::decode(bytes)?,
            Self::Done(request) => Message::Done { request: *request },
            Self::Receipt(receipt) => Message::Told(*receipt),
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
            // All others are a handful of integers and at most one tag.
            _ => 64 + RECORD_OVERHEAD,
        }
    }

    /// Takes in a receipt that says the same of the next message, so that receipts are cumulative.
    fn merge(&mut self, next: &Self) -> bool {
        match (self, next) {
            (Self::Receipt(held), Self::Receipt(next))
                if held.tag.is_none()
                    && next.tag.is_none()
                    && (held.rung, held.reason, held.chain) == (next.rung, next.reason, next.chain)
                    && held.to.checked_add(1) == Some(next.from) =>
            {
                held.to = next.to;
                true
            }
            _ => false,
        }
    }
}

/// Something from one client to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The authenticated sender, who is told if it cannot be handed over.
    pub sender: ClientId,
    /// What it is.
    pub content: Content,
}

/// What one client has for another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A sealed message.
    Envelope {
        /// Its chain, and its number there: its name in receipts.
        chain: ChainId,
        /// See `chain`.
        n: u32,
        /// The receipts that the sender wants.
        wanted: Rungs,
        /// The envelope.
        bytes: Vec<u8>,
    },
    /// A wrapped chain.
    Wrap {
        /// The sender's connection, and the request there that asked for the delivery.
        connection: u64,
        /// See `connection`.
        request: u16,
        /// The encoded `WrapDelivery`.
        bytes: Vec<u8>,
    },
}

impl Delivery {
    /// The message to be sealed.
    ///
    /// # Errors
    /// Those of [`Message::decode`], which no wrap that was encoded causes.
    pub fn message(&self) -> Result<Message<'_>, ossicle_core::Error> {
        match &self.content {
            Content::Envelope { wanted, bytes, .. } => Ok(Message::Deliver { wanted: *wanted, envelope: bytes }),
            Content::Wrap { bytes, .. } => Message::decode(bytes),
        }
    }

    /// Bytes of the payload that the recipient opens.
    pub const fn payload_len(&self) -> usize {
        match &self.content {
            // Code and wanted receipts.
            Content::Envelope { bytes, .. } => 3 + bytes.len(),
            Content::Wrap { bytes, .. } => bytes.len(),
        }
    }

    const fn len(&self) -> usize {
        size_of::<Self>() + self.payload_len()
    }

    /// What the sender is told if it cannot be handed over.
    pub const fn refusal(&self, reason: Reason) -> Owed {
        match &self.content {
            Content::Envelope { chain, n, .. } => Owed::Receipt(refusal(*chain, *n, reason)),
            Content::Wrap { request, .. } => Owed::refused(*request, reason),
        }
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
        let told = Message::Told(refusal(item.chain, item.n, reason));
        let mut bytes = [0; 64];
        let len = told.encode(&mut bytes).ok()?;
        (item.kind == ItemKind::Envelope).then(|| NewItem {
            recipient: item.sender,
            sender: *recipient,
            kind: ItemKind::Receipt,
            chain: item.chain,
            n: item.n,
            wanted: 0,
            bytes: bytes.get(..len).unwrap_or_default().into(),
            at,
        })
    })
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

/// See the module.
#[derive(Debug)]
pub struct Mailbox {
    connection: u64,
    max_payload: usize,
    limits: MailboxLimits,
    budget: Arc<Budget>,
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    owed: VecDeque<Owed>,
    owed_bytes: usize,
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    listening: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Close(Option<Reason>),
    Overrun,
}

impl Mailbox {
    /// The mailbox of a new connection, whose number no other connection of this process has.
    pub fn new(connection: u64, max_payload: usize, limits: MailboxLimits, budget: Arc<Budget>) -> Self {
        Self { connection, max_payload, limits, budget, queue: Mutex::default(), changed: Notify::new() }
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
        } else {
            queue.owed_bytes += owed.room();
            queue.owed.push_back(owed);
        }
        drop(queue);
        self.changed.notify_one();
        false
    }

    /// Puts in something from another client.
    ///
    /// # Errors
    /// Gives it back with the reason: offline, queue-full or too-large.
    pub fn deliver(&self, delivery: Delivery) -> Result<(), (Reason, Delivery)> {
        if delivery.payload_len() > self.max_payload {
            return Err((Reason::TooLarge, delivery));
        }
        let mut queue = self.lock();
        if !queue.listening || queue.end.is_some() {
            return Err((Reason::Offline, delivery));
        }
        let len = delivery.len();
        let full = queue.deliveries.len() >= self.limits.messages || queue.bytes + len > self.limits.bytes;
        if full || !self.budget.take(len, self.limits.total) {
            return Err((Reason::QueueFull, delivery));
        }
        queue.bytes += len;
        queue.deliveries.push_back(delivery);
        drop(queue);
        self.changed.notify_one();
        Ok(())
    }

    /// Whether the client takes messages now.
    pub fn is_listening(&self) -> bool {
        let queue = self.lock();
        queue.listening && queue.end.is_none()
    }

    /// From now on, messages come in.
    pub fn listen(&self) {
        self.lock().listening = true;
    }

    /// No more messages. Gives back those that were not taken out.
    pub fn stop_listening(&self) -> VecDeque<Delivery> {
        let mut queue = self.lock();
        queue.listening = false;
        self.hand_back(&mut queue)
    }

    /// Ends the connection once it was told all it is owed. The first reason stands. Gives back what was for the client.
    pub fn end(&self, reason: Option<Reason>) -> VecDeque<Delivery> {
        let mut queue = self.lock();
        if queue.end.is_none() {
            queue.end = Some(End::Close(reason));
        }
        let back = self.hand_back(&mut queue);
        drop(queue);
        self.changed.notify_one();
        back
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
        if let Some(delivery) = queue.deliveries.front() {
            if delivery.payload_len() + RECORD_OVERHEAD > room {
                return Next::Full;
            }
            if let Some(delivery) = queue.deliveries.pop_front() {
                queue.bytes -= delivery.len();
                self.budget.give(delivery.len());
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

    fn hand_back(&self, queue: &mut Queue) -> VecDeque<Delivery> {
        self.budget.give(queue.bytes);
        queue.bytes = 0;
        core::mem::take(&mut queue.deliveries)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing under this lock can panic halfway through a change.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let bytes = self.lock().bytes;
        self.budget.give(bytes);
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

    fn give(&self, len: usize) {
        self.0.fetch_sub(len, Ordering::Relaxed);
    }
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

    const CHAIN: ChainId = [1; 8];
    const LIMITS: MailboxLimits = MailboxLimits { messages: 3, bytes: 4096, total: 8192, owed: 4 };

    fn mailbox(budget: &Arc<Budget>) -> Mailbox {
        Mailbox::new(1, 1000, LIMITS, Arc::clone(budget))
    }

    fn envelope(n: u32, len: usize) -> Delivery {
        let content = Content::Envelope { chain: CHAIN, n, wanted: Rungs::NONE, bytes: vec![7; len] };
        Delivery { sender: [9; 16], content }
    }

    fn receipt(from: u32, to: u32) -> Owed {
        Owed::Receipt(Receipt { rung: Rung::Accepted, reason: None, chain: CHAIN, from, to, tag: None })
    }

    fn reason(result: Result<(), (Reason, Delivery)>) -> Option<Reason> {
        result.err().map(|(reason, _)| reason)
    }

    #[test]
    fn messages_come_in_only_while_the_client_listens_and_there_is_room() {
        let budget = Arc::default();
        let mailbox = mailbox(&budget);
        assert_eq!(reason(mailbox.deliver(envelope(0, 40))), Some(Reason::Offline));
        mailbox.listen();
        assert!(mailbox.is_listening());
        assert_eq!(reason(mailbox.deliver(envelope(0, 998))), Some(Reason::TooLarge));
        for n in 0..3 {
            assert_eq!(mailbox.deliver(envelope(n, 40)), Ok(()));
        }
        assert_eq!(reason(mailbox.deliver(envelope(3, 40))), Some(Reason::QueueFull));
        assert_eq!(mailbox.stop_listening().len(), 3);
        assert_eq!(reason(mailbox.deliver(envelope(3, 40))), Some(Reason::Offline));
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn all_mailboxes_share_one_budget() {
        let budget = Arc::default();
        let boxes = [mailbox(&budget), mailbox(&budget), mailbox(&budget)];
        let mut taken = 0;
        for mailbox in &boxes {
            mailbox.listen();
            while mailbox.deliver(envelope(0, 990)).is_ok() {
                taken += 1;
            }
        }
        assert!(taken < 9, "three each would exceed the total");
        drop(boxes);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_owed_goes_first_and_receipts_are_cumulative() {
        let mailbox = mailbox(&Arc::default());
        mailbox.listen();
        assert_eq!(mailbox.deliver(envelope(0, 40)), Ok(()));
        assert!(!mailbox.owe(receipt(5, 5)));
        assert!(mailbox.owe(receipt(6, 7)));
        assert!(!mailbox.owe(receipt(9, 9)));
        assert_eq!(mailbox.next(16), Next::Full);
        assert_eq!(mailbox.next(4096), Next::Owed(receipt(5, 7)));
        assert_eq!(mailbox.next(4096), Next::Owed(receipt(9, 9)));
        assert_eq!(mailbox.next(40 + 3 + RECORD_OVERHEAD - 1), Next::Full);
        assert_eq!(mailbox.next(40 + 3 + RECORD_OVERHEAD), Next::Delivery(envelope(0, 40)));
        assert_eq!(mailbox.next(4096), Next::Empty);
    }

    #[test]
    fn an_ending_mailbox_hands_back_messages_and_keeps_what_is_owed() {
        let mailbox = mailbox(&Arc::default());
        mailbox.listen();
        assert_eq!(mailbox.deliver(envelope(0, 40)), Ok(()));
        mailbox.owe(Owed::Done(4));
        assert_eq!(mailbox.end(Some(Reason::TakenOver)).len(), 1);
        mailbox.end(Some(Reason::Unavailable));
        assert_eq!(reason(mailbox.deliver(envelope(1, 40))), Some(Reason::Offline));
        assert_eq!(mailbox.next(4096), Next::Owed(Owed::Done(4)));
        assert_eq!(mailbox.next(4096), Next::Close(Some(Reason::TakenOver)));
    }

    #[test]
    fn a_client_that_reads_nothing_is_overrun() {
        let mailbox = mailbox(&Arc::default());
        for n in 0..5 {
            mailbox.owe(Owed::Done(n));
        }
        assert_eq!(mailbox.next(4096), Next::Overrun);
    }
}
