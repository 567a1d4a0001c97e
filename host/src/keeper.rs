//! Takes what has to wait into the store, in the order in which it was given, and says what became of it.
//!
//! One task for all clients: while it waits for the disk, what comes meanwhile becomes the next transaction. Its queue is
//! the one place where the order of a sender's messages to a client that comes and goes is decided: whoever gives
//! something under the lock of that client's mailbox is ahead of everybody who found the mailbox closed. The queue is as
//! long as its givers: a sender gives one batch at a time, and what a mailbox hands over counted against its limits.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use ossicle_core::{EnvelopeHeader, Reason, Receipt, Rung, Rungs};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use crate::clock::Clock;
use crate::mailbox::{Owed, Passing, refusal, told};
use crate::router::Router;
use crate::store::{ChainId, ClientId, Item, ItemKind, NewItem, Put, PutError, SharedStore, StoreError};

/// Items of one transaction.
const MAX_ITEMS: usize = 512;

/// Where to give what has to wait.
#[derive(Clone, Debug)]
pub struct Keeper {
    orders: mpsc::UnboundedSender<Work>,
    clock: Clock,
}

/// What the keeper's task has to do.
#[derive(Debug)]
pub struct Orders(mpsc::UnboundedReceiver<Work>);

#[derive(Debug)]
enum Work {
    Keep { items: Vec<NewItem>, answer: Option<oneshot::Sender<Kept>> },
    Forget { client: ClientId, seqs: Vec<u64> },
    Tell(oneshot::Sender<()>),
}

/// What became of items, in their order.
type Kept = Result<Vec<Result<Put, PutError>>, StoreError>;

impl Keeper {
    /// A keeper that dates by this clock, and what its task is to be given.
    pub fn new(clock: Clock) -> (Self, Orders) {
        let (orders, receiver) = mpsc::unbounded_channel();
        (Self { orders, clock }, Orders(receiver))
    }

    /// Keeps what did not reach `client`. Who sent it is told if that fails.
    pub fn keep_for(&self, client: ClientId, passing: Vec<Passing>) {
        if !passing.is_empty() {
            let at = self.clock.date();
            let items = passing.into_iter().map(|passing| passing.into_item(client, at)).collect();
            self.order(Work::Keep { items, answer: None });
        }
    }

    /// Keeps a receipt for a sender who is not here; in a `group` with whose it is.
    pub fn keep_receipt(&self, sender: ClientId, teller: ClientId, receipt: &Receipt, group: bool) {
        let Some(bytes) = told(group.then_some(&teller), receipt) else { return };
        let item = NewItem {
            recipient: sender,
            sender: teller,
            kind: ItemKind::Receipt,
            chain: receipt.chain,
            n: receipt.to,
            wanted: 0,
            bytes,
            at: self.clock.date(),
        };
        self.order(Work::Keep { items: vec![item], answer: None });
    }

    /// Keeps `items`, durably.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn keep(&self, items: Vec<NewItem>) -> Kept {
        let (answer, kept) = oneshot::channel();
        self.order(Work::Keep { items, answer: Some(answer) });
        kept.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Forgets what the client has. A crash may bring it back.
    pub fn forget(&self, client: ClientId, seqs: Vec<u64>) {
        if !seqs.is_empty() {
            self.order(Work::Forget { client, seqs });
        }
    }

    /// Comes back when everything that was given before is in the store and was offered to whom it is for.
    pub async fn settled(&self) {
        let (done, all) = oneshot::channel();
        self.order(Work::Tell(done));
        // It fails when the server has stopped: nothing more is settled then.
        let _ = all.await;
    }

    fn order(&self, work: Work) {
        if self.orders.send(work).is_err() {
            debug!("nothing is kept any more: the server has stopped");
        }
    }
}

#[cfg(test)]
impl Orders {
    /// What is to be kept.
    pub(crate) fn items(&mut self) -> Vec<NewItem> {
        self.take(|work| match work {
            Work::Keep { items, .. } => items,
            _ => Vec::new(),
        })
    }

    /// What is to be forgotten.
    pub(crate) fn forgotten(&mut self) -> Vec<(ClientId, Vec<u64>)> {
        self.take(|work| match work {
            Work::Forget { client, seqs } => vec![(client, seqs)],
            _ => Vec::new(),
        })
    }

    fn take<T>(&mut self, of: impl Fn(Work) -> Vec<T>) -> Vec<T> {
        core::iter::from_fn(|| self.0.try_recv().ok()).flat_map(of).collect()
    }
}

/// Works until every [`Keeper`] is gone, or it is dropped.
pub async fn run(Orders(mut orders): Orders, store: SharedStore, router: &Router) {
    let mut batch = Vec::new();
    while orders.recv_many(&mut batch, MAX_ITEMS).await > 0 {
        let mut group = Group::default();
        for work in batch.drain(..) {
            match work {
                Work::Keep { items, answer } => {
                    group.parts.push((items.len(), answer));
                    group.items.extend(items);
                    if group.items.len() >= MAX_ITEMS {
                        core::mem::take(&mut group).finish(&store, router).await;
                    }
                }
                Work::Forget { client, seqs } => group.forgotten.entry(client).or_default().extend(seqs),
                Work::Tell(done) => {
                    core::mem::take(&mut group).finish(&store, router).await;
                    // Whoever asked may have gone.
                    let _ = done.send(());
                }
            }
        }
        group.finish(&store, router).await;
    }
}

/// What goes into one transaction.
#[derive(Default)]
struct Group {
    items: Vec<NewItem>,
    /// How many of them belong together, and who waits for them.
    parts: Vec<(usize, Option<oneshot::Sender<Kept>>)>,
    /// What clients have acknowledged.
    forgotten: BTreeMap<ClientId, Vec<u64>>,
}

impl Group {
    /// All at once, so that the store can make one transaction of it.
    async fn finish(self, store: &SharedStore, router: &Router) {
        let Self { items, parts, forgotten } = self;
        let forget = join_all(forgotten.into_iter().map(async |(client, seqs)| {
            if let Err(error) = store.remove(&client, &seqs).await {
                // They are delivered once more, and are known.
                warn!(%error, "could not forget what was acknowledged");
            }
        }));
        tokio::join!(keep(items, parts, store, router), forget);
    }
}

async fn keep(
    items: Vec<NewItem>,
    parts: Vec<(usize, Option<oneshot::Sender<Kept>>)>,
    store: &SharedStore,
    router: &Router,
) {
    if parts.is_empty() {
        return;
    }
    let mut kept = match store.put(items.clone()).await {
        Ok(kept) => Ok(kept.into_iter()),
        Err(error) => {
            warn!(%error, "could not store messages: their senders are told so");
            Err(error)
        }
    };
    let mut items = items.into_iter();
    for (count, answer) in parts {
        let mut outcomes = Vec::with_capacity(count);
        for item in items.by_ref().take(count) {
            let outcome = match &mut kept {
                Ok(kept) => kept.next().unwrap_or(Err(PutError::Store(StoreError::Closed))),
                Err(error) => Err(PutError::Store(error.clone())),
            };
            match &outcome {
                Ok(Put::Stored { seq }) => router.offer(item, *seq),
                Ok(Put::Repeat { .. }) => {}
                // Who waits for the answer tells the sender.
                Err(error) if answer.is_none() => tell(router, &item, reason(error)),
                Err(_) => {}
            }
            outcomes.push(outcome);
        }
        if let Some(answer) = answer {
            // Whoever asked may have gone.
            let _ = answer.send(match &kept {
                Ok(_) => Ok(outcomes),
                Err(error) => Err(error.clone()),
            });
        }
    }
}

fn tell(router: &Router, item: &NewItem, reason: Reason) {
    match item.kind {
        ItemKind::Envelope | ItemKind::GroupEnvelope => {
            let group = item.kind == ItemKind::GroupEnvelope;
            router.tell_sender(&item.sender, &item.recipient, &refusal(item.chain, item.n, reason), group);
        }
        // The messages of its chain are told of.
        ItemKind::Wrap => {}
        // The store makes them itself.
        ItemKind::Notice => {}
        ItemKind::Receipt => debug!(%reason, "a receipt could not be kept: its message will be sent again"),
    }
}

/// What the sender is told of an item that could not be kept.
pub(crate) fn reason(error: &PutError) -> Reason {
    match error {
        PutError::QueueFull => Reason::QueueFull,
        PutError::Rewound => Reason::Rewound,
        PutError::UnknownRecipient => Reason::Unknown,
        PutError::Store(_) => Reason::Unavailable,
    }
}

/// Messages of one sender that have to wait, in their order.
#[derive(Debug, Default)]
pub struct Batch {
    items: Vec<NewItem>,
    messages: Vec<Sent>,
}

/// One message of a [`Batch`].
#[derive(Debug)]
struct Sent {
    chain: ChainId,
    n: u32,
    wanted: Rungs,
    /// Why it went no further at one recipient.
    refused: Option<Reason>,
    /// For how many recipients it waits.
    items: usize,
    /// Who they are, in a conversation of several.
    recipients: Vec<ClientId>,
}

impl Batch {
    /// Whether it holds as much as one transaction takes.
    pub const fn is_full(&self) -> bool {
        self.items.len() >= MAX_ITEMS
    }

    /// Adds a message for the recipients that `items` name. One more recipient may have `refused` it.
    pub fn push(&mut self, header: &EnvelopeHeader, wanted: Rungs, refused: Option<Reason>, items: Vec<NewItem>) {
        let (chain, n) = (header.chain_id, header.n);
        let in_group = items.iter().filter(|item| item.kind == ItemKind::GroupEnvelope);
        let recipients = in_group.map(|item| item.recipient).collect();
        self.messages.push(Sent { chain, n, wanted, refused, items: items.len(), recipients });
        self.items.extend(items);
    }

    /// Keeps it, and returns the receipts that its sender gets, in order. In a conversation of several, who does not take a
    /// message is named first; how far it came holds for all others.
    pub async fn keep(self, keeper: &Keeper) -> Vec<Owed> {
        let mut kept = keeper.keep(self.items).await.map(Vec::into_iter);
        let mut receipts = Vec::new();
        for Sent { chain, n, wanted, refused, items, recipients } in self.messages {
            let failed = match &mut kept {
                Ok(kept) if !recipients.is_empty() => {
                    let mut taken = false;
                    for (recipient, put) in recipients.into_iter().zip(kept.by_ref()) {
                        match put {
                            Ok(_) => taken = true,
                            Err(error) => {
                                receipts.push(Owed::ReceiptBy(recipient, refusal(chain, n, reason(&error))));
                            }
                        }
                    }
                    if !taken {
                        continue;
                    }
                    None
                }
                Ok(kept) => {
                    // Forwards: from behind, a part of the answer would take what is another message's.
                    kept.by_ref().take(items).fold(None, |failed, put| put.err().map(|error| reason(&error)).or(failed))
                }
                Err(_) => Some(Reason::Unavailable),
            };
            receipts.extend(outcome(chain, n, wanted, refused.or(failed), Rung::Stored).map(Owed::Receipt));
        }
        receipts
    }
}

/// What the sender of a message is told at once, if anything: why it went no further, or how far it came.
pub(crate) fn outcome(
    chain: ChainId,
    n: u32,
    wanted: Rungs,
    refused: Option<Reason>,
    reached: Rung,
) -> Option<Receipt> {
    let told = |rung| Some(Receipt { rung, reason: None, chain, from: n, to: n, tag: None });
    match refused {
        Some(reason) => Some(refusal(chain, n, reason)),
        None if reached == Rung::Stored && wanted.contains(Rung::Stored) => told(Rung::Stored),
        None if wanted.contains(Rung::Accepted) => told(Rung::Accepted),
        None => None,
    }
}

/// The item that `new` became.
pub(crate) fn item(new: NewItem, seq: u64) -> Item {
    let NewItem { recipient: _, sender, kind, chain, n, wanted, bytes, at } = new;
    Item { seq, sender, kind, chain, n, wanted, bytes, at }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAIN: ChainId = [4; 8];

    fn item(recipient: u8, n: u32) -> NewItem {
        NewItem {
            recipient: [recipient; 16],
            sender: [1; 16],
            kind: ItemKind::Envelope,
            chain: CHAIN,
            n,
            wanted: 0,
            bytes: [0; 40].into(),
            at: 1,
        }
    }

    #[tokio::test]
    async fn of_a_batch_each_message_is_told_what_became_of_it() {
        let (keeper, mut orders) = Keeper::new(Clock::system());
        let wanted = Rungs::NONE.with(Rung::Stored);
        let mut batch = Batch::default();
        for n in 0..5 {
            // The third is for two recipients.
            let items = if n == 2 { vec![item(2, n), item(3, n)] } else { vec![item(2, n)] };
            batch.push(&EnvelopeHeader { chain_id: CHAIN, n, salt: [0; 8] }, wanted, None, items);
        }
        let stored = Ok(Put::Stored { seq: 1 });
        let outcomes = [
            stored.clone(),
            Err(PutError::QueueFull),
            Err(PutError::UnknownRecipient),
            stored.clone(),
            Err(PutError::Rewound),
            stored,
        ];
        let store = async {
            let Some(Work::Keep { items, answer: Some(answer) }) = orders.0.recv().await else { panic!("no batch") };
            assert_eq!(items.len(), outcomes.len());
            answer.send(Ok(outcomes.to_vec())).unwrap();
        };
        let (receipts, ()) = tokio::join!(batch.keep(&keeper), store);
        let told = |n| Receipt { rung: Rung::Stored, reason: None, chain: CHAIN, from: n, to: n, tag: None };
        let expected = [
            told(0),
            refusal(CHAIN, 1, Reason::QueueFull),
            refusal(CHAIN, 2, Reason::Unknown),
            refusal(CHAIN, 3, Reason::Rewound),
            told(4),
        ];
        assert_eq!(receipts, expected.map(Owed::Receipt));
    }

    #[tokio::test]
    async fn in_a_group_who_does_not_take_a_message_is_named() {
        let (keeper, mut orders) = Keeper::new(Clock::system());
        let wanted = Rungs::NONE.with(Rung::Stored);
        let mut batch = Batch::default();
        for n in 0..3 {
            let to = |recipient| NewItem { kind: ItemKind::GroupEnvelope, ..item(recipient, n) };
            let header = EnvelopeHeader { chain_id: CHAIN, n, salt: [0; 8] };
            batch.push(&header, wanted, None, vec![to(2), to(3), to(4)]);
        }
        let (stored, full) = (Ok(Put::Stored { seq: 1 }), Err(PutError::QueueFull));
        let gone = Err(PutError::UnknownRecipient);
        let outcomes = [&stored, &stored, &stored, &stored, &full, &gone, &full, &full, &full].map(Clone::clone);
        let store = async {
            let Some(Work::Keep { answer: Some(answer), .. }) = orders.0.recv().await else { panic!("no batch") };
            answer.send(Ok(outcomes.to_vec())).unwrap();
        };
        let (receipts, ()) = tokio::join!(batch.keep(&keeper), store);
        let told =
            |n| Owed::Receipt(Receipt { rung: Rung::Stored, reason: None, chain: CHAIN, from: n, to: n, tag: None });
        let by = |recipient, n, reason| Owed::ReceiptBy([recipient; 16], refusal(CHAIN, n, reason));
        let expected = [
            told(0),
            by(3, 1, Reason::QueueFull),
            by(4, 1, Reason::Unknown),
            told(1),
            by(2, 2, Reason::QueueFull),
            by(3, 2, Reason::QueueFull),
            by(4, 2, Reason::QueueFull),
        ];
        assert_eq!(receipts, expected);
    }
}
