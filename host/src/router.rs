//! Who is where, and what becomes of a message: decisions without a socket, a clock or a disk.
//!
//! A client is *connected* while it holds a seat here, and *online* while its mailbox listens. The router reads no more of
//! an envelope than chain and number. It knows the routes of chains that were used lately; the store knows all of them,
//! and whoever calls asks it first. Whatever cannot go on is told to its sender: nothing is dropped in silence.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ossicle_core::{EnvelopeHeader, Reason, Receipt, Rung, Rungs};

use crate::mailbox::{Content, Delivery, Mailbox, Owed, refusal};
use crate::store::{ChainId, ChainRoute, ClientId};

/// Routes that are remembered at least; twice as many at most.
const REMEMBERED: usize = 32_768;

/// See the module.
#[derive(Debug, Default)]
pub struct Router {
    seats: RwLock<HashMap<ClientId, Arc<Mailbox>>>,
    routes: Mutex<Routes>,
}

/// Two generations: when the young one is full it becomes the old one, and what was not used since is forgotten.
#[derive(Debug, Default)]
struct Routes {
    young: HashMap<ChainId, Arc<ChainRoute>>,
    old: HashMap<ChainId, Arc<ChainRoute>>,
}

/// What a recipient's receipt comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The sender was told, or is not connected: it sends again what it needs a receipt for.
    Done,
    /// The teller is no recipient of this chain, or there is no such chain.
    Forbidden,
    /// No recipient may say this.
    Malformed,
}

impl Router {
    /// Gives the client's seat to a new connection. The mailbox of an older one is handed back, to be ended.
    pub fn enter(&self, client: ClientId, mailbox: Arc<Mailbox>) -> Option<Arc<Mailbox>> {
        self.seats_mut().insert(client, mailbox)
    }

    /// Frees the client's seat, if it is still this connection's.
    pub fn leave(&self, client: &ClientId, mailbox: &Mailbox) -> bool {
        let mut seats = self.seats_mut();
        let held = seats.get(client).is_some_and(|held| held.connection() == mailbox.connection());
        if held {
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

    /// Whether the client is connected and takes messages.
    pub fn is_online(&self, client: &ClientId) -> bool {
        self.seats().get(client).is_some_and(|mailbox| mailbox.is_listening())
    }

    /// Ends the client's connection, if there is one, and forgets every route that concerns it.
    pub fn evict(&self, client: &ClientId, reason: Reason) -> bool {
        self.forget_client(client);
        let mailbox = self.mailbox(client);
        if let Some(mailbox) = &mailbox {
            self.end(mailbox, Some(reason));
        }
        mailbox.is_some()
    }

    /// Ends all connections.
    pub fn end_all(&self, reason: Reason) {
        self.for_each(|mailbox| self.end(mailbox, Some(reason)));
    }

    /// Does something for every connected client.
    pub fn for_each(&self, mut action: impl FnMut(&Mailbox)) {
        let mailboxes: Vec<_> = self.seats().values().cloned().collect();
        for mailbox in mailboxes {
            action(&mailbox);
        }
    }

    /// Ends one connection. Whose messages it did not get any more is told.
    pub fn end(&self, mailbox: &Mailbox, reason: Option<Reason>) {
        self.hand_back(mailbox.end(reason), Reason::Offline);
    }

    /// Tells the senders of `deliveries` that they went no further.
    pub fn hand_back(&self, deliveries: impl IntoIterator<Item = Delivery>, reason: Reason) {
        for delivery in deliveries {
            self.refuse(&delivery, reason);
        }
    }

    /// Tells the sender of `delivery` that it went no further.
    pub fn refuse(&self, delivery: &Delivery, reason: Reason) {
        match &delivery.content {
            Content::Envelope { .. } => self.owe(&delivery.sender, delivery.refusal(reason)),
            Content::Wrap { connection, .. } => {
                self.answer(&delivery.sender, *connection, delivery.refusal(reason));
            }
        }
    }

    /// A recipient's socket has taken `delivery`: a wrap is answered only now, so that `Done` is never a lie.
    pub fn handed_over(&self, delivery: &Handed) {
        if let Handed { sender, wrap: Some((connection, request)), .. } = delivery {
            self.answer(sender, *connection, Owed::Done(*request));
        }
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

    /// Remembers what the store knows of a chain.
    pub fn remember(&self, chain: ChainId, route: Arc<ChainRoute>) {
        self.routes().insert(chain, route);
    }

    /// Forgets a chain's route, because the store knows more by now.
    pub fn forget_chain(&self, chain: &ChainId) {
        let mut routes = self.routes();
        routes.young.remove(chain);
        routes.old.remove(chain);
    }

    /// Forgets every route that concerns this client, because the store knows none any more.
    pub fn forget_client(&self, client: &ClientId) {
        let concerns = |route: &ChainRoute| route.sender == *client || route.recipients.contains(client);
        let mut routes = self.routes();
        routes.young.retain(|_, route| !concerns(route));
        routes.old.retain(|_, route| !concerns(route));
    }

    /// Takes a message to the mailboxes of its recipients, and returns the receipt that its sender gets, if any.
    ///
    /// A chain that the store does not know, and one that is another client's, are answered alike with `rekey`: the
    /// sender's library starts a new chain, and nobody learns which chains exist.
    pub fn send(
        &self,
        sender: &ClientId,
        route: Option<&ChainRoute>,
        header: &EnvelopeHeader,
        wanted: Rungs,
        envelope: &[u8],
    ) -> Option<Receipt> {
        let (chain, n) = (header.chain_id, header.n);
        let Some(route) = route.filter(|route| route.sender == *sender && !route.recipients.is_empty()) else {
            return Some(refusal(chain, n, Reason::Rekey));
        };
        let mut refused = None;
        for recipient in &route.recipients {
            let content = Content::Envelope { chain, n, wanted, bytes: envelope.to_vec() };
            if let Err(reason) = self.deliver(recipient, Delivery { sender: *sender, content }) {
                refused.get_or_insert(reason);
            }
        }
        match refused {
            Some(reason) => Some(refusal(chain, n, reason)),
            None if wanted.contains(Rung::Accepted) => {
                Some(Receipt { rung: Rung::Accepted, reason: None, chain, from: n, to: n, tag: None })
            }
            None => None,
        }
    }

    /// Puts something into a recipient's mailbox.
    ///
    /// # Errors
    /// Why it is not there: offline, queue-full or too-large.
    pub fn deliver(&self, recipient: &ClientId, delivery: Delivery) -> Result<(), Reason> {
        match self.mailbox(recipient) {
            Some(mailbox) => mailbox.deliver(delivery).map_err(|(reason, _)| reason),
            None => Err(Reason::Offline),
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
                self.owe(&route.sender, Owed::Receipt(*receipt));
                Told::Done
            }
            _ => Told::Forbidden,
        }
    }

    /// Puts something into the mailbox of a client, if it is connected.
    fn owe(&self, client: &ClientId, owed: Owed) {
        if let Some(mailbox) = self.mailbox(client) {
            mailbox.owe(owed);
        }
    }

    /// Answers a request, if the connection that it came on is still there.
    fn answer(&self, client: &ClientId, connection: u64, owed: Owed) {
        if let Some(mailbox) = self.mailbox(client).filter(|mailbox| mailbox.connection() == connection) {
            mailbox.owe(owed);
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

/// What remains to be known of a delivery while its record is on its way into the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handed {
    sender: ClientId,
    chain: ChainId,
    n: u32,
    /// Connection and request of a wrap.
    wrap: Option<(u64, u16)>,
}

impl Handed {
    /// Keeps what must be known of `delivery`.
    pub const fn new(delivery: &Delivery) -> Self {
        match &delivery.content {
            Content::Envelope { chain, n, .. } => Self { sender: delivery.sender, chain: *chain, n: *n, wrap: None },
            Content::Wrap { connection, request, .. } => {
                Self { sender: delivery.sender, chain: [0; 8], n: 0, wrap: Some((*connection, *request)) }
            }
        }
    }

    /// The same as a delivery without its bytes, to be refused.
    pub const fn into_delivery(self) -> Delivery {
        let content = match self.wrap {
            Some((connection, request)) => Content::Wrap { connection, request, bytes: Vec::new() },
            None => Content::Envelope { chain: self.chain, n: self.n, wanted: Rungs::NONE, bytes: Vec::new() },
        };
        Delivery { sender: self.sender, content }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::{MailboxLimits, Next};

    const ALICE: ClientId = [1; 16];
    const BOB: ClientId = [2; 16];
    const CAROL: ClientId = [3; 16];
    const HEADER: EnvelopeHeader = EnvelopeHeader { chain_id: [4; 8], n: 7, salt: [5; 8] };

    fn route() -> ChainRoute {
        ChainRoute { sender: ALICE, sid: [6; 16], recipients: vec![BOB] }
    }

    fn seat(router: &Router, client: ClientId, connection: u64) -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox::new(connection, 1000, MailboxLimits::default(), Arc::default()));
        router.enter(client, Arc::clone(&mailbox));
        mailbox
    }

    fn send(router: &Router, sender: &ClientId, route: Option<&ChainRoute>, wanted: Rungs) -> Option<Receipt> {
        router.send(sender, route, &HEADER, wanted, &[0; 37])
    }

    fn receipt(rung: Rung, reason: Option<Reason>, tag: Option<[u8; 16]>) -> Receipt {
        Receipt { rung, reason, chain: HEADER.chain_id, from: 7, to: 7, tag }
    }

    #[test]
    fn a_message_goes_to_who_listens_and_nobody_else() {
        let router = Router::default();
        let route = route();
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), Some(refusal([4; 8], 7, Reason::Offline)));
        let bob = seat(&router, BOB, 1);
        assert!(!router.is_online(&BOB));
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), Some(refusal([4; 8], 7, Reason::Offline)));
        bob.listen();
        assert!(router.is_online(&BOB));
        assert_eq!(send(&router, &ALICE, Some(&route), Rungs::NONE), None);
        let wanted = Rungs::NONE.with(Rung::Accepted);
        assert_eq!(send(&router, &ALICE, Some(&route), wanted), Some(receipt(Rung::Accepted, None, None)));
        assert!(matches!(bob.next(4096), Next::Delivery(Delivery { sender: ALICE, .. })));
        assert!(matches!(bob.next(4096), Next::Delivery(Delivery { sender: ALICE, .. })));
        assert_eq!(bob.next(4096), Next::Empty);
    }

    #[test]
    fn unknown_chains_and_those_of_others_are_answered_alike() {
        let router = Router::default();
        seat(&router, BOB, 1).listen();
        let rekey = Some(refusal([4; 8], 7, Reason::Rekey));
        assert_eq!(send(&router, &ALICE, None, Rungs::NONE), rekey);
        assert_eq!(send(&router, &CAROL, Some(&route()), Rungs::NONE), rekey);
        assert_eq!(send(&router, &BOB, Some(&route()), Rungs::NONE), rekey);
    }

    #[test]
    fn a_message_longer_than_the_recipient_takes_is_refused() {
        let router = Router::default();
        seat(&router, BOB, 1).listen();
        let told = router.send(&ALICE, Some(&route()), &HEADER, Rungs::NONE, &[0; 998]);
        assert_eq!(told, Some(refusal([4; 8], 7, Reason::TooLarge)));
        assert_eq!(router.send(&ALICE, Some(&route()), &HEADER, Rungs::NONE, &[0; 997]), None);
    }

    #[test]
    fn what_a_connection_did_not_get_any_more_is_told_to_its_sender() {
        let router = Router::default();
        let alice = seat(&router, ALICE, 1);
        let bob = seat(&router, BOB, 2);
        bob.listen();
        assert_eq!(send(&router, &ALICE, Some(&route()), Rungs::NONE), None);
        let wrap = Content::Wrap { connection: 1, request: 9, bytes: vec![0; 8] };
        assert_eq!(router.deliver(&BOB, Delivery { sender: ALICE, content: wrap.clone() }), Ok(()));
        assert!(router.evict(&BOB, Reason::Unauthorised));
        assert_eq!(alice.next(4096), Next::Owed(Owed::Receipt(refusal([4; 8], 7, Reason::Offline))));
        assert_eq!(alice.next(4096), Next::Owed(Owed::refused(9, Reason::Offline)));
        assert_eq!(bob.next(4096), Next::Close(Some(Reason::Unauthorised)));

        // A later connection of the sender never gets answers to requests of an earlier one.
        let again = seat(&router, ALICE, 3);
        router.refuse(&Delivery { sender: ALICE, content: wrap }, Reason::Offline);
        assert_eq!(again.next(4096), Next::Empty);
    }

    #[test]
    fn a_wrap_is_answered_when_it_was_handed_over() {
        let router = Router::default();
        let alice = seat(&router, ALICE, 1);
        let wrap = Content::Wrap { connection: 1, request: 9, bytes: vec![0; 8] };
        let handed = Handed::new(&Delivery { sender: ALICE, content: wrap });
        router.handed_over(&handed);
        assert_eq!(alice.next(4096), Next::Owed(Owed::Done(9)));
        router.refuse(&handed.into_delivery(), Reason::Offline);
        assert_eq!(alice.next(4096), Next::Owed(Owed::refused(9, Reason::Offline)));
    }

    #[test]
    fn only_a_recipient_tells_and_only_what_is_his_to_say() {
        let router = Router::default();
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
        let router = Router::default();
        let first = seat(&router, ALICE, 1);
        let second = Arc::new(Mailbox::new(2, 1000, MailboxLimits::default(), Arc::default()));
        let taken = router.enter(ALICE, Arc::clone(&second)).map(|mailbox| mailbox.connection());
        assert_eq!(taken, Some(1));
        assert!(!router.leave(&ALICE, &first));
        assert!(router.leave(&ALICE, &second));
        assert_eq!(router.connected(), 0);
    }

    #[test]
    fn routes_are_bounded_and_those_in_use_stay() {
        let router = Router::default();
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
}
