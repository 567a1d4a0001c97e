//! Who is where, and what becomes of a message: decisions without a socket, a clock or a disk.
//!
//! A client is *connected* while it holds a seat here, and *online* while its mailbox listens, or for a moment while a new
//! connection takes the place of one that did. The router reads no more of
//! an envelope than chain and number. It knows the routes of chains that were used lately; the store knows all of them,
//! and whoever calls asks it first. What cannot pass now is given back to be kept, or goes to the keeper: nothing is
//! dropped in silence.

use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ossicle_core::{EnvelopeHeader, Reason, Receipt, Rung, Rungs};
use tokio::time::Instant;

use crate::bus::{Bus, Hint};
use crate::keeper::{self, Keeper};
use crate::mailbox::{Mailbox, NotPassed, Owed, Passing, refusal};
use crate::presence::SUCCESSION;
use crate::store::{ChainId, ChainRoute, ClientId, ItemKind, NewItem};

/// Routes that are remembered at least; twice as many at most.
const REMEMBERED: usize = 32_768;

/// See the module.
#[derive(Debug)]
pub struct Router {
    keeper: Keeper,
    bus: Arc<dyn Bus>,
    /// No other node puts anything into the store: what is known here is all there is.
    alone: bool,
    seats: RwLock<HashMap<ClientId, Arc<Mailbox>>>,
    routes: Mutex<Routes>,
    /// Counts what makes a [`Way`] worthless.
    changes: AtomicU64,
}

/// The route of one chain, with the mailboxes of its recipients: most messages follow another of the same chain, and need
/// no map then, however many they are for.
#[derive(Debug)]
pub struct Way {
    chain: ChainId,
    /// It holds as long as nothing has changed since.
    changes: u64,
    route: Arc<ChainRoute>,
    /// In the order of the recipients.
    seats: Vec<Seat>,
    /// One of them has.
    unnoticed: Cell<bool>,
}

/// Where one recipient of a [`Way`] sits, if it does.
#[derive(Debug)]
struct Seat {
    mailbox: Option<Arc<Mailbox>>,
    /// The mailbox got something that its channel was not told of.
    unnoticed: Cell<bool>,
}

impl Way {
    /// Tells the recipients' channels of what went this way.
    pub fn notice(&self) {
        if self.unnoticed.replace(false) {
            for seat in &self.seats {
                if seat.unnoticed.replace(false)
                    && let Some(mailbox) = &seat.mailbox
                {
                    mailbox.notice();
                }
            }
        }
    }

    /// Takes a message to the recipient of this place, behind what it got before. `keep`: it has to wait in the store.
    fn pass(&self, place: usize, passing: Passing, keep: bool) -> Result<(), NotPassed> {
        let Some((seat, mailbox)) = self.seats.get(place).and_then(|seat| Some((seat, seat.mailbox.as_deref()?)))
        else {
            return Err(NotPassed::Keep(passing));
        };
        if keep {
            return not_by(mailbox, passing);
        }
        seat.unnoticed.set(true);
        self.unnoticed.set(true);
        mailbox.pass_unnoticed(passing)
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.notice();
    }
}

/// Two generations: when the young one is full it becomes the old one, and what was not used since is forgotten.
#[derive(Debug, Default)]
struct Routes {
    young: HashMap<ChainId, Arc<ChainRoute>>,
    old: HashMap<ChainId, Arc<ChainRoute>>,
}

/// A message as its sender gave it.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'m> {
    /// Its chain, and its number there.
    pub header: &'m EnvelopeHeader,
    /// The receipts that the sender wants.
    pub wanted: Rungs,
    /// The envelope, header included.
    pub envelope: &'m [u8],
}

/// What became of a message so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// This is what its sender is told, if anything.
    Told(Option<Receipt>),
    /// It has to wait for these recipients; another one may have refused it.
    Keep(Vec<NewItem>, Option<Reason>),
}

/// What a recipient's receipt comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The sender was told, or is told when it comes back.
    Done,
    /// The teller is no recipient of this chain, or there is no such chain.
    Forbidden,
    /// No recipient may say this.
    Malformed,
}

impl Router {
    /// A router that nobody has a seat at, and that tells others by this bus.
    pub fn new(keeper: Keeper, bus: Arc<dyn Bus>) -> Self {
        let alone = bus.alone();
        Self { keeper, bus, alone, seats: RwLock::default(), routes: Mutex::default(), changes: AtomicU64::new(0) }
    }

    /// Gives the client's seat to a new connection. The mailbox of an older one is handed back, to be ended.
    pub fn enter(&self, client: ClientId, mailbox: Arc<Mailbox>) -> Option<Arc<Mailbox>> {
        let mut seats = self.seats_mut();
        if seats.get(&client).is_some_and(|older| older.is_present()) {
            mailbox.succeed(Instant::now() + SUCCESSION);
        }
        self.changes.fetch_add(1, Ordering::AcqRel);
        seats.insert(client, mailbox)
    }

    /// Frees the client's seat, if it is still this connection's.
    pub fn leave(&self, client: &ClientId, mailbox: &Mailbox) -> bool {
        let mut seats = self.seats_mut();
        let held = seats.get(client).is_some_and(|held| held.connection() == mailbox.connection());
        if held {
            self.changes.fetch_add(1, Ordering::AcqRel);
            seats.remove(client);
        }
        held
    }

    /// The mailbox of a connected client.
    pub fn mailbox(&self, client: &ClientId) -> Option<Arc<Mailbox>> {
        self.seats().get(client).cloned()
    }

    /// Connected clients.
    pub fn connected(&self) -> usize {
        self.seats().len()
    }

    /// How many clients are connected, and how many of them take messages.
    pub fn present(&self) -> (u64, u64) {
        let (mut connected, mut online) = (0, 0);
        self.for_each(|mailbox| {
            connected += 1;
            online += u64::from(mailbox.is_listening());
        });
        (connected, online)
    }

    /// Whether the client is there, as others are told.
    pub fn is_online(&self, client: &ClientId) -> bool {
        self.seats().get(client).is_some_and(|mailbox| mailbox.is_present())
    }

    /// Ends the client's connection, if there is one, and forgets every route that concerns it.
    pub fn evict(&self, client: &ClientId, reason: Reason) -> bool {
        self.forget_client(client);
        let mailbox = self.mailbox(client);
        if let Some(mailbox) = &mailbox {
            mailbox.end(Some(reason));
        }
        mailbox.is_some()
    }

    /// Ends all connections.
    pub fn end_all(&self, reason: Reason) {
        self.for_each(|mailbox| mailbox.end(Some(reason)));
    }

    /// Does something for every connected client, in the order in which they connected.
    pub fn for_each(&self, mut action: impl FnMut(&Mailbox)) {
        for mailbox in self.part(0, 1) {
            action(&mailbox);
        }
    }

    /// Every `parts`th connected client, in the order in which they connected; all of them once with each `part` from 0 on.
    pub fn part(&self, part: u32, parts: u32) -> Vec<Arc<Mailbox>> {
        let of_part = |mailbox: &&Arc<Mailbox>| mailbox.connection().checked_rem(parts.into()) == Some(part.into());
        let mut mailboxes: Vec<_> = self.seats().values().filter(of_part).cloned().collect();
        // In the order in which they came, not in that of the map.
        mailboxes.sort_unstable_by_key(|mailbox| mailbox.connection());
        mailboxes
    }

    /// The route of a chain that was used lately.
    pub fn route(&self, chain: &ChainId) -> Option<Arc<ChainRoute>> {
        let mut routes = self.routes();
        if let Some(route) = routes.young.get(chain) {
            return Some(Arc::clone(route));
        }
        let route = routes.old.remove(chain)?;
        routes.insert(*chain, Arc::clone(&route));
        Some(route)
    }

    /// The way of messages of this chain, if it was used lately; `last` is the one of the message before.
    pub fn way<'w>(&self, chain: &ChainId, last: &'w mut Option<Way>) -> Option<&'w Way> {
        // Looked at before the maps are: who changes one of them afterwards counts on.
        let changes = self.changes.load(Ordering::Acquire);
        if last.as_ref().is_none_or(|way| way.chain != *chain || way.changes != changes) {
            *last = self.route(chain).map(|route| {
                let seats = self.seats();
                let seat = |recipient| Seat { mailbox: seats.get(recipient).cloned(), unnoticed: Cell::new(false) };
                let seats = route.recipients.iter().map(seat).collect();
                Way { chain: *chain, changes, route, seats, unnoticed: Cell::new(false) }
            });
        }
        last.as_ref()
    }

    /// Remembers what the store knows of a chain, where no other node may tell it more.
    pub fn remember(&self, chain: ChainId, route: Arc<ChainRoute>) {
        if self.alone {
            self.routes().insert(chain, route);
        }
    }

    /// Forgets a chain's route, because the store knows more by now.
    pub fn forget_chain(&self, chain: &ChainId) {
        let mut routes = self.routes();
        self.changes.fetch_add(1, Ordering::AcqRel);
        routes.young.remove(chain);
        routes.old.remove(chain);
    }

    /// Forgets the routes of these chains, because the store knows none any more.
    pub fn forget_chains(&self, chains: &[ChainId]) {
        for chain in chains {
            self.forget_chain(chain);
        }
    }

    /// Takes back from these members of a conversation that was closed what they have not got of its chains: who sent what
    /// only passed is told. `chains` are in order.
    pub fn withdraw<'c>(&self, chains: &[ChainId], members: impl Iterator<Item = &'c ClientId>) {
        for member in members {
            let Some(mailbox) = self.mailbox(member) else { continue };
            for passing in mailbox.withdraw(chains) {
                let receipt = refusal(passing.chain, passing.n, Reason::Closed);
                self.tell_sender(&passing.sender, member, &receipt, true);
            }
        }
    }

    /// Forgets every route that concerns this client, because the store knows none any more.
    pub fn forget_client(&self, client: &ClientId) {
        let concerns = |route: &ChainRoute| route.sender == *client || route.recipients.contains(client);
        let mut routes = self.routes();
        self.changes.fetch_add(1, Ordering::AcqRel);
        routes.young.retain(|_, route| !concerns(route));
        routes.old.retain(|_, route| !concerns(route));
    }

    /// Takes a message to the mailboxes of its recipients, where it can pass. `behind_others`: what this sender sent
    /// before has to wait, and this with it. `at` is now.
    ///
    /// A chain that the store does not know, and one that is another client's, are answered alike with `rekey`: the
    /// sender's library starts a new chain, and nobody learns which chains exist.
    pub fn send(
        &self,
        sender: &ClientId,
        route: Option<&ChainRoute>,
        message: Outgoing<'_>,
        behind_others: bool,
        at: impl Fn() -> u64,
    ) -> Sent {
        self.carry(sender, route, None, message, behind_others, at)
    }

    /// The same for a message whose way is known. The recipient's channel may learn of it only by [`Way::notice`].
    pub fn send_by(
        &self,
        way: &Way,
        sender: &ClientId,
        message: Outgoing<'_>,
        behind_others: bool,
        at: impl Fn() -> u64,
    ) -> Sent {
        self.carry(sender, Some(&way.route), Some(way), message, behind_others, at)
    }

    /// `way` knows the mailboxes of the recipients, if there is one.
    fn carry(
        &self,
        sender: &ClientId,
        route: Option<&ChainRoute>,
        way: Option<&Way>,
        message: Outgoing<'_>,
        behind_others: bool,
        at: impl Fn() -> u64,
    ) -> Sent {
        let Outgoing { header: &EnvelopeHeader { chain_id: chain, n, .. }, wanted, envelope } = message;
        let Some(route) = route.filter(|route| route.sender == *sender && !route.recipients.is_empty()) else {
            return Sent::Told(Some(refusal(chain, n, Reason::Rekey)));
        };
        // What another node has stored before this has to come before it.
        let keep_all = behind_others || wanted.contains(Rung::Stored) || !self.alone;
        let bytes: Arc<[u8]> = envelope.into();
        let group = route.group;
        let mut refused = None;
        let mut has_passed = false;
        let mut keep = Vec::new();
        for (place, recipient) in route.recipients.iter().enumerate() {
            let passing = Passing { sender: *sender, chain, n, wanted, group, bytes: Arc::clone(&bytes) };
            let passed = match way {
                Some(way) => way.pass(place, passing, keep_all),
                None => match self.mailbox(recipient) {
                    Some(mailbox) if !keep_all => mailbox.pass(passing),
                    Some(mailbox) => not_by(&mailbox, passing),
                    None => Err(NotPassed::Keep(passing)),
                },
            };
            match passed {
                Ok(()) => has_passed = true,
                // The others have it all the same.
                Err(NotPassed::TooLarge) if group => {
                    self.tell_sender(sender, recipient, &refusal(chain, n, Reason::TooLarge), true);
                }
                Err(NotPassed::TooLarge) => {
                    refused.get_or_insert(Reason::TooLarge);
                }
                Err(NotPassed::Keep(passing)) => keep.push(passing.into_item(*recipient, at())),
            }
        }
        if keep.is_empty() && group && !has_passed {
            Sent::Told(None)
        } else if keep.is_empty() {
            Sent::Told(keeper::outcome(chain, n, wanted, refused, Rung::Accepted))
        } else {
            Sent::Keep(keep, refused)
        }
    }

    /// Something of a client's is in the store by now under this number: it is put into its mailbox if it is here. Among
    /// several nodes that is a hint like others, so that the order is the store's.
    pub fn offer(&self, new: NewItem, seq: u64) {
        if !self.alone {
            return self.greet([&new.recipient]);
        }
        let Some(mailbox) = self.mailbox(&new.recipient) else {
            return;
        };
        let recipient = new.recipient;
        if let Err(item) = mailbox.offer(keeper::item(new, seq)) {
            self.too_large(&recipient, [(item.seq, item.kind, item.sender, item.chain, item.n)]);
        }
    }

    /// Something waits in the store for these clients: who is here gets it, and other nodes are told.
    pub fn greet<'c>(&self, clients: impl IntoIterator<Item = &'c ClientId>) {
        for client in clients {
            self.heed(client);
            self.bus.hint(Hint::Client(*client));
        }
    }

    /// Something waits in the store for this client, another node says.
    pub fn heed(&self, client: &ClientId) {
        if let Some(mailbox) = self.mailbox(client) {
            mailbox.greet();
        }
    }

    /// These items are too long for their recipient, who takes shorter records than it did: their senders are told, and
    /// they are forgotten.
    pub fn too_large(
        &self,
        recipient: &ClientId,
        items: impl IntoIterator<Item = (u64, ItemKind, ClientId, ChainId, u32)>,
    ) {
        let mut seqs = Vec::new();
        for (seq, kind, sender, chain, n) in items {
            if kind.is_envelope() {
                let group = kind == ItemKind::GroupEnvelope;
                self.tell_sender(&sender, recipient, &refusal(chain, n, Reason::TooLarge), group);
            }
            seqs.push(seq);
        }
        self.keeper.forget(*recipient, seqs);
    }

    /// Tells a sender what became of a message for `recipient`, now or when it comes back; in a `group` with whose word it
    /// is.
    pub fn tell_sender(&self, sender: &ClientId, recipient: &ClientId, receipt: &Receipt, group: bool) {
        // Among several nodes he may have come back at another one, and his connection here not have ended yet.
        match self.mailbox(sender).filter(|_| self.alone) {
            Some(mailbox) => {
                mailbox.owe(match group {
                    true => Owed::ReceiptBy(*recipient, *receipt),
                    false => Owed::Receipt(*receipt),
                });
            }
            None => self.keeper.keep_receipt(*sender, *recipient, receipt, group),
        }
    }

    /// Takes a recipient's receipt, unchanged, to the sender of the chain.
    pub fn tell(&self, teller: &ClientId, route: Option<&ChainRoute>, receipt: &Receipt) -> Told {
        // `accepted` and `stored` are the server's word; `delivered` and `opened` are worth nothing without their tag.
        let sane = receipt.from <= receipt.to
            && match receipt.rung {
                Rung::Delivered | Rung::Opened => receipt.reason.is_none() && receipt.tag.is_some(),
                Rung::Refused => receipt.reason.is_some(),
                _ => false,
            };
        if !sane {
            return Told::Malformed;
        }
        match route {
            Some(route) if route.recipients.contains(teller) => {
                self.tell_sender(&route.sender, teller, receipt, route.group);
                Told::Done
            }
            _ => Told::Forbidden,
        }
    }

    // Nothing under these locks can panic halfway through a change, so a poisoned one is as good as any.

    fn seats(&self) -> RwLockReadGuard<'_, HashMap<ClientId, Arc<Mailbox>>> {
        self.seats.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn seats_mut(&self) -> RwLockWriteGuard<'_, HashMap<ClientId, Arc<Mailbox>>> {
        self.seats.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Routes {
    fn insert(&mut self, chain: ChainId, route: Arc<ChainRoute>) {
        if self.young.len() >= REMEMBERED {
            self.old = core::mem::take(&mut self.young);
        }
        self.young.insert(chain, route);
    }
}

/// Keeps a message that has to wait in the store, and before it what of its sender's waits in the mailbox.
fn not_by(mailbox: &Mailbox, passing: Passing) -> Result<(), NotPassed> {
    mailbox.keep_behind(&passing.sender);
    Err(NotPassed::Keep(passing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Local;
    use crate::clock::Clock;
    use crate::keeper::Orders;
    use crate::mailbox::{Budget, Delivery, MailboxLimits, Next, Shared};

    const ALICE: ClientId = [1; 16];
    const BOB: ClientId = [2; 16];
    const CAROL: ClientId = [3; 16];
    const HEADER: EnvelopeHeader = EnvelopeHeader { chain_id: [4; 8], n: 7, salt: [5; 8] };

    fn route() -> ChainRoute {
        ChainRoute { sender: ALICE, sid: [6; 16], group: false, recipients: vec![BOB] }
    }

    fn router() -> (Router, Orders) {
        let (keeper, orders) = Keeper::new(Clock::system());
        (Router::new(keeper, Arc::new(Local)), orders)
    }

    fn seat(router: &Router, client: ClientId, connection: u64) -> Arc<Mailbox> {
        let shared =
            Arc::new(Shared { budget: Budget::default(), keeper: router.keeper.clone(), presence: Arc::default() });
        let mailbox = Arc::new(Mailbox::new(client, connection, 1000, MailboxLimits::default(), shared));
        router.enter(client, Arc::clone(&mailbox));
        mailbox
    }

    fn send(router: &Router, sender: &ClientId, route: Option<&ChainRoute>, wanted: Rungs) -> Sent {
        router.send(sender, route, Outgoing { header: &HEADER, wanted, envelope: &[0; 37] }, false, || 99)
    }

    fn kept(wanted: Rungs) -> Sent {
        let item = NewItem {
            recipient: BOB,
            sender: ALICE,
            kind: ItemKind::Envelope,
            chain: HEADER.chain_id,
            n: 7,
            wanted: wanted.bits(),
            bytes: [0; 37].into(),
            at: 99,
        };
        Sent::Keep(vec![item], None)
    }

    fn receipt(rung: Rung, reason: Option<Reason>, tag: Option<[u8; 16]>) -> Receipt {
        Receipt { rung, reason, chain: HEADER.chain_id, from: 7, to: 7, tag }
    }

    #[test]
    fn a_message_passes_to_who_listens_and_is_kept_for_everybody_else() {
        let (router, _orders) = router();
        let route = route();
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), kept(Rungs::NONE));
        let bob = seat(&router, BOB, 1);
        assert!(!router.is_online(&BOB));
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), kept(Rungs::NONE));
        bob.listen(false);
        assert!(router.is_online(&BOB));
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), Sent::Told(None));
        let accepted = Rungs::NONE.with(Rung::Accepted);
        let told = Sent::Told(Some(receipt(Rung::Accepted, None, None)));
        assert_eq!(send(&router, &ALICE, Some(&route), accepted), told);
        for _ in 0..2 {
            assert!(matches!(bob.next(4096), Next::Delivery(Delivery::Passing(Passing { sender: ALICE, .. }))));
        }
        assert_eq!(bob.next(4096), Next::Empty);
        // Whoever wants to know that it is durable, and whoever sent something before that is on its way there.
        let stored = Rungs::NONE.with(Rung::Stored);
        assert_eq!(send(&router, &ALICE, Some(&route), stored), kept(stored));
        let message = Outgoing { header: &HEADER, wanted: Rungs::NONE, envelope: &[0; 37] };
        let behind = router.send(&ALICE, Some(&route), message, true, || 99);
        assert_eq!(behind, kept(Rungs::NONE));
        assert_eq!(bob.next(4096), Next::Empty);
    }

    #[test]
    fn unknown_chains_and_those_of_others_are_answered_alike() {
        let (router, _orders) = router();
        seat(&router, BOB, 1).listen(false);
        let rekey = || Sent::Told(Some(refusal([4; 8], 7, Reason::Rekey)));
        assert_eq!(send(&router, &ALICE, None, Rungs::NONE), rekey());
        assert_eq!(send(&router, &CAROL, Some(&route()), Rungs::NONE), rekey());
        assert_eq!(send(&router, &BOB, Some(&route()), Rungs::NONE), rekey());
    }

    /// Notes whom it hints at.
    #[derive(Debug, Default)]
    struct Others(Mutex<Vec<ClientId>>);

    #[async_trait::async_trait]
    impl Bus for Others {
        fn alone(&self) -> bool {
            false
        }

        fn hint(&self, hint: Hint) {
            let Hint::Client(client) = hint else { panic!("{hint:?}") };
            self.0.lock().unwrap().push(client);
        }

        async fn heard(&self) -> Hint {
            core::future::pending().await
        }
    }

    #[test]
    fn among_several_nodes_everything_goes_through_the_store_and_is_hinted_at() {
        let (keeper, mut orders) = Keeper::new(Clock::system());
        let others = Arc::new(Others::default());
        let router = Router::new(keeper, Arc::clone(&others) as Arc<dyn Bus>);
        let route = Arc::new(route());
        let (alice, bob) = (seat(&router, ALICE, 1), seat(&router, BOB, 2));
        bob.listen(false);
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), kept(Rungs::NONE));
        let Sent::Keep(mut items, None) = kept(Rungs::NONE) else { panic!("it is kept") };
        router.offer(items.remove(0), 9);
        assert_eq!(bob.next(4096), Next::Empty, "something may wait before it");
        assert_eq!(bob.wanted().map(|wanted| wanted.after), Some(0));
        let delivered = receipt(Rung::Delivered, None, Some([1; 16]));
        assert_eq!(router.tell(&BOB, Some(&route), &delivered), Told::Done);
        assert_eq!(alice.next(4096), Next::Empty, "she may be elsewhere by now");
        assert_eq!(orders.items().len(), 1);
        router.greet([&ALICE, &CAROL]);
        assert!(alice.wanted().is_some_and(|wanted| wanted.receipts_only));
        assert_eq!(*others.0.lock().unwrap(), [BOB, ALICE, CAROL]);
        router.heed(&CAROL);
        assert_eq!(others.0.lock().unwrap().len(), 3, "what was heard is not hinted at again");
        router.remember(HEADER.chain_id, route);
        assert_eq!(router.route(&HEADER.chain_id), None, "another node may have learnt more");
    }

    #[test]
    fn the_parts_are_everybody_once() {
        let (router, _orders) = router();
        for n in 0..10 {
            seat(&router, [n; 16], n.into());
        }
        let part = |part| router.part(part, 4).iter().map(|mailbox| mailbox.connection()).collect::<Vec<_>>();
        assert_eq!([part(0), part(1), part(2), part(3)], [vec![0, 4, 8], vec![1, 5, 9], vec![2, 6], vec![3, 7]]);
    }

    #[test]
    fn a_message_longer_than_the_recipient_takes_is_refused() {
        let (router, _orders) = router();
        seat(&router, BOB, 1).listen(false);
        let send = |len: usize| {
            let message = Outgoing { header: &HEADER, wanted: Rungs::NONE, envelope: &vec![0; len] };
            router.send(&ALICE, Some(&route()), message, false, || 99)
        };
        assert_eq!(send(998), Sent::Told(Some(refusal([4; 8], 7, Reason::TooLarge))));
        assert_eq!(send(997), Sent::Told(None));
    }

    #[test]
    fn what_a_connection_did_not_get_any_more_is_kept_for_the_next_one() {
        let (router, mut orders) = router();
        let bob = seat(&router, BOB, 2);
        bob.listen(false);
        assert_eq!(send(&router, &ALICE, Some(&route()), Rungs::NONE), Sent::Told(None));
        assert!(router.evict(&BOB, Reason::TakenOver));
        assert_eq!(bob.next(4096), Next::Close(Some(Reason::TakenOver)));
        let kept = orders.items();
        assert_eq!(kept.len(), 1);
        assert_eq!((kept[0].recipient, kept[0].sender, kept[0].chain, kept[0].n), (BOB, ALICE, HEADER.chain_id, 7));
        // Whoever comes later is behind it.
        assert!(matches!(send(&router, &ALICE, Some(&route()), Rungs::NONE), Sent::Keep(..)));
    }

    #[test]
    fn receipts_wait_for_a_sender_who_is_not_here() {
        let (router, mut orders) = router();
        let delivered = receipt(Rung::Delivered, None, Some([8; 16]));
        assert_eq!(router.tell(&BOB, Some(&route()), &delivered), Told::Done);
        let kept = orders.items();
        assert_eq!(kept.len(), 1);
        assert_eq!((kept[0].recipient, kept[0].sender, kept[0].kind), (ALICE, BOB, ItemKind::Receipt));
        assert_eq!(ossicle_core::Message::decode(&kept[0].bytes), Ok(ossicle_core::Message::Told(delivered)));
        // It is offered to a connection that does not listen, as nothing else is.
        let alice = seat(&router, ALICE, 3);
        let message = NewItem { kind: ItemKind::Envelope, ..kept[0].clone() };
        router.offer(message, 5);
        assert_eq!(alice.next(4096), Next::Empty);
        router.offer(kept[0].clone(), 6);
        let Next::Delivery(delivery) = alice.next(4096) else { panic!("a receipt") };
        assert_eq!(delivery.announcement(), Some(ossicle_core::Message::Waited { seq: 6, at: kept[0].at }));
        assert_eq!(delivery.message(), Ok(ossicle_core::Message::Told(delivered)));
    }

    #[test]
    fn what_a_client_cannot_take_any_more_is_refused_and_forgotten() {
        let (router, mut orders) = router();
        let alice = seat(&router, ALICE, 1);
        seat(&router, BOB, 2).listen(false);
        let Sent::Keep(mut items, None) = kept(Rungs::NONE) else { panic!("kept") };
        items[0].bytes = vec![0; 998].into();
        router.offer(items.remove(0), 5);
        assert_eq!(alice.next(4096), Next::Owed(Owed::Receipt(refusal([4; 8], 7, Reason::TooLarge))));
        assert_eq!(orders.forgotten(), [(BOB, vec![5])]);
    }

    #[test]
    fn only_a_recipient_tells_and_only_what_is_his_to_say() {
        let (router, _orders) = router();
        let alice = seat(&router, ALICE, 1);
        let tag = Some([8; 16]);
        let delivered = receipt(Rung::Delivered, None, tag);
        let tell = |teller, route: Option<&ChainRoute>, receipt: &Receipt| router.tell(teller, route, receipt);
        assert_eq!(tell(&BOB, Some(&route()), &delivered), Told::Done);
        assert_eq!(alice.next(4096), Next::Owed(Owed::Receipt(delivered)));
        for (rung, reason, tag) in [
            (Rung::Accepted, None, tag),
            (Rung::Stored, None, tag),
            (Rung::Delivered, None, None),
            (Rung::Opened, Some(Reason::Gap), tag),
            (Rung::Refused, None, tag),
        ] {
            assert_eq!(tell(&BOB, Some(&route()), &receipt(rung, reason, tag)), Told::Malformed, "{rung}");
        }
        assert_eq!(tell(&BOB, Some(&route()), &Receipt { from: 8, ..delivered }), Told::Malformed);
        assert_eq!(tell(&CAROL, Some(&route()), &delivered), Told::Forbidden);
        assert_eq!(tell(&ALICE, Some(&route()), &delivered), Told::Forbidden);
        assert_eq!(tell(&BOB, None, &delivered), Told::Forbidden);
        assert_eq!(alice.next(4096), Next::Empty);
        let refused = receipt(Rung::Refused, Some(Reason::Rekey), None);
        assert_eq!(tell(&BOB, Some(&route()), &refused), Told::Done);
        assert_eq!(alice.next(4096), Next::Owed(Owed::Receipt(refused)));
    }

    #[test]
    fn a_new_connection_takes_the_seat_and_the_old_one_cannot_free_it() {
        let (router, _orders) = router();
        let first = seat(&router, ALICE, 1);
        let shared =
            Arc::new(Shared { budget: Budget::default(), keeper: router.keeper.clone(), presence: Arc::default() });
        let second = Arc::new(Mailbox::new(ALICE, 2, 1000, MailboxLimits::default(), shared));
        let taken = router.enter(ALICE, Arc::clone(&second)).map(|mailbox| mailbox.connection());
        assert_eq!(taken, Some(1));
        assert!(!router.leave(&ALICE, &first));
        assert!(router.leave(&ALICE, &second));
        assert_eq!(router.connected(), 0);
    }

    #[test]
    fn a_way_holds_until_a_seat_or_its_chain_changes() {
        let (router, _orders) = router();
        let chain = HEADER.chain_id;
        router.remember(chain, Arc::new(route()));
        let mut last = None;
        let mut seated = |router: &Router, chain: &ChainId| {
            let way = router.way(chain, &mut last)?;
            Some(way.seats[0].mailbox.as_ref().map(|mailbox| mailbox.connection()))
        };
        assert_eq!(seated(&router, &chain), Some(None));
        let bob = seat(&router, BOB, 7);
        assert_eq!(seated(&router, &chain), Some(Some(7)));
        assert_eq!(seated(&router, &[9; 8]), None);
        assert_eq!(seated(&router, &chain), Some(Some(7)));
        seat(&router, BOB, 8);
        assert_eq!(seated(&router, &chain), Some(Some(8)));
        assert!(!router.leave(&BOB, &bob));
        assert_eq!(seated(&router, &chain), Some(Some(8)));
        router.forget_chain(&chain);
        assert_eq!(seated(&router, &chain), None);
        router.remember(chain, Arc::new(route()));
        assert_eq!(seated(&router, &chain), Some(Some(8)));
        router.evict(&BOB, Reason::Unauthorised);
        assert_eq!(seated(&router, &chain), None);
    }

    #[test]
    fn routes_are_bounded_and_those_in_use_stay() {
        let (router, _orders) = router();
        let route = Arc::new(route());
        router.remember([0xff; 8], Arc::clone(&route));
        for i in 0..3 * REMEMBERED as u64 {
            router.remember(i.to_be_bytes(), Arc::clone(&route));
            assert!(router.route(&[0xff; 8]).is_some());
        }
        assert!(router.route(&0_u64.to_be_bytes()).is_none());
        let routes = router.routes();
        assert!(routes.young.len() + routes.old.len() <= 2 * REMEMBERED);
        drop(routes);
        router.evict(&BOB, Reason::Unauthorised);
        assert!(router.route(&[0xff; 8]).is_none());
    }

    #[test]
    fn a_way_of_several_knows_and_wakes_all_of_them() {
        let (router, _orders) = router();
        let alice = seat(&router, ALICE, 1);
        let recipients: Vec<ClientId> = (10..30).map(|n| [n; 16]).collect();
        let route = ChainRoute { recipients: recipients.clone(), group: true, ..route() };
        router.remember(HEADER.chain_id, Arc::new(route));
        let seats: Vec<_> = (0..).zip(&recipients).map(|(n, id)| seat(&router, *id, 10 + n)).collect();
        for mailbox in &seats[1..] {
            mailbox.listen(false);
        }
        let wanted = Rungs::NONE.with(Rung::Accepted);
        let message = Outgoing { header: &HEADER, wanted, envelope: &[0; 37] };
        let mut last = None;
        let way = router.way(&HEADER.chain_id, &mut last).unwrap();
        for _ in 0..3 {
            let Sent::Keep(items, None) = router.send_by(way, &ALICE, message, false, || 99) else {
                panic!("one waits")
            };
            let waits: Vec<_> = items.iter().map(|item| (item.recipient, item.kind)).collect();
            assert_eq!(waits, [([10; 16], ItemKind::GroupEnvelope)]);
        }
        let woken = |mailbox: &Mailbox| futures_util::FutureExt::now_or_never(mailbox.changed()).is_some();
        for mailbox in &seats[1..] {
            // It was woken when it began to listen.
            assert!(woken(mailbox) && !woken(mailbox));
        }
        way.notice();
        assert!(seats[1..].iter().all(|mailbox| woken(mailbox) && !woken(mailbox)));
        let passing = |mailbox: &Mailbox| match mailbox.next(4096) {
            Next::Delivery(Delivery::Passing(passing)) => passing,
            other => panic!("{other:?}"),
        };
        let shared = passing(&seats[1]).bytes;
        assert!(
            seats[2..].iter().all(|mailbox| Arc::ptr_eq(&passing(mailbox).bytes, &shared)),
            "the body is there once"
        );
        // Whoever takes it not is named, and the others have it.
        let long = Outgoing { envelope: &[0; 998], ..message };
        assert_eq!(router.send_by(way, &ALICE, long, false, || 99), Sent::Told(None));
        for id in &recipients {
            let refused = Owed::ReceiptBy(*id, refusal(HEADER.chain_id, 7, Reason::TooLarge));
            assert_eq!(alice.next(4096), Next::Owed(refused));
        }
        // What nobody has had yet is taken back when the conversation is closed.
        router.forget_chains(&[HEADER.chain_id]);
        router.withdraw(&[HEADER.chain_id], recipients.iter());
        for id in &recipients[1..] {
            for _ in 0..2 {
                let Next::Owed(Owed::ReceiptBy(by, refused)) = alice.next(4096) else { panic!("one for each") };
                assert_eq!((by, refused.reason), (*id, Some(Reason::Closed)));
            }
        }
        assert_eq!(alice.next(4096), Next::Empty);
        assert!(router.way(&HEADER.chain_id, &mut last).is_none());
        assert!(seats.iter().all(|mailbox| mailbox.next(4096) == Next::Empty));
    }
}
