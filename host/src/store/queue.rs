//! What waits for clients: one durable queue per recipient, with messages, wraps, receipts and notices in one order.
//!
//! Numbers ([`Item::seq`]) ascend over the whole store and are never given twice, with gaps; so that whoever has
//! everything up to a number can say so in one word: nothing shows up later below a number that was read, whoever stored
//! it. Only the recipient's word, age, revocation and the closing of a conversation remove anything.

use core::fmt;
use std::sync::Arc;

use super::{ChainId, ClientId, StoreError};

/// What an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ItemKind {
    /// A sealed message.
    Envelope,
    /// A wrapped chain.
    Wrap,
    /// A receipt for a sender.
    Receipt,
    /// What the members of a conversation are told.
    Notice,
    /// A sealed message in a conversation of several: its receipts say whose word they are.
    GroupEnvelope,
}

impl ItemKind {
    /// The kind of a sealed message.
    pub const fn envelope(group: bool) -> Self {
        if group { Self::GroupEnvelope } else { Self::Envelope }
    }

    /// Whether it is a sealed message.
    pub const fn is_envelope(self) -> bool {
        matches!(self, Self::Envelope | Self::GroupEnvelope)
    }

    /// Whether the latest of one name waits, and not the first.
    pub(super) const fn is_replaced(self) -> bool {
        matches!(self, Self::Wrap | Self::Notice)
    }
}

/// Something that is to wait for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewItem {
    /// Whom it waits for.
    pub recipient: ClientId,
    /// Whose it is; of a receipt, whose word it is about.
    pub sender: ClientId,
    /// What it is.
    pub kind: ItemKind,
    /// Its chain, and its number there: with `recipient` and `kind` the name under which nothing waits twice. Receipts
    /// may wait as often as they were told.
    pub chain: ChainId,
    /// See `chain`.
    pub n: u32,
    /// The receipts that the sender wants, as on the wire.
    pub wanted: u8,
    /// The envelope, or the encoded message of the other kinds: opaque here.
    pub bytes: Arc<[u8]>,
    /// When it was accepted.
    pub at: u64,
}

/// Something that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its number.
    pub seq: u64,
    /// See [`NewItem`], as the rest.
    pub sender: ClientId,
    /// What it is.
    pub kind: ItemKind,
    /// Its chain.
    pub chain: ChainId,
    /// Its number there.
    pub n: u32,
    /// The receipts that the sender wants.
    pub wanted: u8,
    /// The envelope, or the encoded message.
    pub bytes: Arc<[u8]>,
    /// When it was accepted.
    pub at: u64,
}

/// What became of an item. It is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It waits under this number. A wrap took the place of an older one of its name, if there was one.
    Stored {
        /// Its number.
        seq: u64,
    },
    /// The same waits already, and nothing was changed.
    Repeat {
        /// Its number.
        seq: u64,
    },
}

/// Why an item does not wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// As much waits for the recipient as may.
    #[error("the queue of the recipient is full")]
    QueueFull,
    /// Another message of this chain waits under the same number.
    #[error("another message waits under this number")]
    Rewound,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The recipient is unknown or revoked.
    #[error("the recipient is unknown or revoked")]
    UnknownRecipient,
}

/// How much waits for a client, of all kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Items.
    pub items: u64,
    /// Their bytes.
    pub bytes: u64,
    /// No item of this client has a higher number; 0 if none has waited since the store was opened.
    pub newest: u64,
}

/// How much may wait for one client, and how much is kept for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Messages and wraps; the next is refused.
    pub items: u64,
    /// Their bytes; what does not fit is refused.
    pub bytes: u64,
    /// Receipts; the oldest goes.
    pub receipts: u64,
    /// Notices; with as many the client is not invited to another conversation, but told of those that there are.
    pub notices: u64,
    /// Posts in the public conversation, of all clients together; the oldest of whoever has the most there goes.
    pub posts: u64,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { items: 10_000, bytes: 64 << 20, receipts: 10_000, notices: 10_000, posts: 1_000 }
    }
}

/// Makes what the sender of an item is told when it is removed undelivered: gets the recipient and the item, and returns
/// what is to wait for the sender, if anything.
///
/// Called by the store in the transaction that removes the item, so that no crash comes in between; it must not block.
#[derive(Clone)]
pub struct Refuse(Arc<Refusal>);

type Refusal = dyn Fn(&ClientId, &Item) -> Option<NewItem> + Send + Sync;

impl Refuse {
    /// Tells senders what `refusal` says.
    pub fn new(refusal: impl Fn(&ClientId, &Item) -> Option<NewItem> + Send + Sync + 'static) -> Self {
        Self(Arc::new(refusal))
    }

    /// Tells nobody anything.
    pub fn silently() -> Self {
        Self::new(|_, _| None)
    }

    /// What the sender of `item` is told.
    pub fn refusal(&self, recipient: &ClientId, item: &Item) -> Option<NewItem> {
        (self.0)(recipient, item)
    }
}

impl fmt::Debug for Refuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refuse").finish_non_exhaustive()
    }
}
