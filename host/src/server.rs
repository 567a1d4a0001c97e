//! A server: accepts connections, gives each a task, and ends them all when it is told to.
//!
//! The caller brings the socket, the store, the identity and the reason to stop, so that a test, a demonstration and the
//! command line start the same server. Here is only what all channels share: configuration, router, limits. One peer is
//! the business of `channel`, requests are that of `directory`.

use core::future::Future;
use core::net::SocketAddr;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use ossicle_core::{MAX_RECORD_LEN, Message, PublicKey, Reason, ServerConfig, Settings};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use crate::accounts::Passwords;
use crate::bus::{self, Bus};
use crate::channel;
use crate::clock::{Ages, Clock};
use crate::crypto::{CryptoPool, IdentityKey};
use crate::directory::groups::announce;
use crate::gate::{Gate, GateLimits};
use crate::keeper::{self, Keeper, Orders};
use crate::limits::{Limits, Rates};
use crate::mailbox::{Budget, Mailbox, MailboxLimits, Owed, Shared, refuse_waiting};
use crate::metrics::Metrics;
use crate::presence::{self, Presence};
use crate::public::Followers;
use crate::resumption::{ChannelKey, Channels};
use crate::router::Router;
use crate::store::{
    ChainId, ChainRoute, ChannelId, ClientId, CloseError, ConversationId, LoggedIn, LoginEntry, LoginError,
    MemberSignature, NewKey, RotateError, SharedStore, StoreError,
};
use crate::transport::{Listener, Stream};
use crate::world::{Random, World};

/// Who may enrol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Whoever reaches the server.
    Open,
    /// Who proves to hold a token, and devices of clients.
    Token,
    /// Nobody.
    Closed,
}

/// What an operator, or a test, chooses. The default is what DESIGN promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Who may enrol.
    pub enrol: Policy,
    /// Seconds of silence after which the server asks whether a client is there.
    pub heartbeat: u16,
    /// Seconds of silence after which it gives a client up.
    pub timeout: u16,
    /// Within this a client has said hello.
    pub hello_within: Duration,
    /// Within this the whole handshake is over: a slow device signs for seconds.
    pub handshake_within: Duration,
    /// Within this a connection that ends has told its client, and the server has stopped.
    pub farewell_within: Duration,
    /// After this a server renews the key that it seals with.
    pub key_age: Duration,
    /// For so long after a full handshake a client can come back without one; at most 7 days.
    pub channel_age: Duration,
    /// How many may come in at a time, and when strangers have to work for it.
    pub gate: GateLimits,
    /// Devices of unfinished batches that are held for all enrollers together, each less than 1 KiB.
    pub held_devices: usize,
    /// So long something waits in the store for a client that does not come.
    pub queue_age: Duration,
    /// So often it is seen for every connection whether something waits in the store that nobody told of: a hint that a
    /// [`bus`] loses costs at most this.
    pub poll: Duration,
    /// How much may be in memory for a client.
    pub mailbox: MailboxLimits,
    /// How fast a client or a source may be.
    pub rates: Rates,
}

/// The longest time between two full handshakes of a client.
pub const MAX_CHANNEL_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// For so long an invitation can be accepted.
pub const INVITATION_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// For so long what was said to everybody is kept.
pub const POST_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// So often the server looks for what waited for too long, and takes so much at once.
const EXPIRE: Duration = Duration::from_secs(60);
const EXPIRED_AT_ONCE: usize = 1000;
/// What channels were issued is written so often.
const WRITE_CHANNELS: Duration = Duration::from_secs(1);

impl Default for Config {
    fn default() -> Self {
        Self {
            enrol: Policy::Token,
            heartbeat: 15,
            timeout: 45,
            hello_within: Duration::from_secs(5),
            handshake_within: Duration::from_secs(30),
            farewell_within: Duration::from_secs(5),
            key_age: Duration::from_secs(60 * 60),
            channel_age: MAX_CHANNEL_AGE,
            gate: GateLimits::default(),
            held_devices: 16_384,
            queue_age: Duration::from_secs(30 * 24 * 60 * 60),
            poll: Duration::from_secs(60),
            mailbox: MailboxLimits::default(),
            rates: Rates::default(),
        }
    }
}

/// What a server is made of.
pub struct Parts {
    /// How it is set up.
    pub config: Config,
    /// What it keeps.
    pub store: SharedStore,
    /// Its key, whose fingerprint clients pin.
    pub identity: Arc<IdentityKey>,
    /// Seals what channels are resumed with.
    pub channel_key: ChannelKey,
    /// Where its signatures are made.
    pub pool: Arc<CryptoPool>,
    /// Time, date and chance: [`World::default`] but in simulations.
    pub world: World,
    /// Joins the nodes that share the store: [`bus::Local`] if it is the only one.
    pub bus: Arc<dyn Bus>,
}

/// What all channels of a server share.
pub struct Server {
    config: ArcSwap<Config>,
    pub(crate) store: SharedStore,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) identity: Arc<IdentityKey>,
    pub(crate) pool: Arc<CryptoPool>,
    pub(crate) passwords: Passwords,
    pub(crate) router: Router,
    pub(crate) gate: Arc<Gate>,
    pub(crate) limits: Limits,
    pub(crate) followers: Followers,
    pub(crate) channels: Channels,
    pub(crate) keeper: Keeper,
    /// What all mailboxes share.
    pub(crate) mailboxes: Arc<Shared>,
    /// Room for the devices of unfinished batches.
    pub(crate) held_devices: Arc<Semaphore>,
    pub(crate) metrics: Metrics,
    started: u64,
    listening: AtomicBool,
    connections: AtomicU64,
    revocations: AtomicU64,
    stopping: Stopping,
    clock: Clock,
    pub(crate) random: Random,
    /// For the keeper's task, until it runs.
    orders: Mutex<Option<Orders>>,
}

/// Whether the server stops, and who waits for that, in the order in which they came.
#[derive(Default)]
struct Stopping {
    begun: AtomicBool,
    told: Notify,
}

impl Server {
    /// A server that nobody is connected to yet.
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { config, store, identity, channel_key, pool, world, bus } = parts;
        let World { clock, random } = world.clone();
        let (keeper, orders) = Keeper::new(clock.clone());
        Arc::new(Self {
            channels: Channels::new(channel_key.with_random(random.clone())),
            gate: Arc::new(Gate::new(config.gate, world)),
            limits: Limits::with_clock(&config.rates, clock.clone()),
            followers: Followers::default(),
            held_devices: Arc::new(Semaphore::new(config.held_devices)),
            config: ArcSwap::from_pointee(config),
            store,
            identity,
            pool,
            passwords: Passwords::new(),
            router: Router::new(keeper.clone(), Arc::clone(&bus)),
            bus,
            mailboxes: Arc::new(Shared { budget: Budget::default(), keeper: keeper.clone(), presence: Arc::default() }),
            keeper,
            orders: Mutex::new(Some(orders)),
            metrics: Metrics::default(),
            started: clock.date(),
            clock,
            random,
            listening: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            revocations: AtomicU64::new(0),
            stopping: Stopping::default(),
        })
    }

    /// The fingerprint that clients pin.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.identity.fingerprint()
    }

    /// Ends a client for good: durably, then its connection. False if there is no such client or it was revoked before.
    ///
    /// # Errors
    /// Those of the store; the client may still enter then.
    pub async fn revoke(&self, client: &ClientId) -> Result<bool, StoreError> {
        self.revoke_telling(client, || ()).await
    }

    /// Calls `tell` between the two: whoever revokes itself hears that it is done before its connection ends.
    pub(crate) async fn revoke_telling(
        &self,
        client: &ClientId,
        tell: impl FnOnce() + Send,
    ) -> Result<bool, StoreError> {
        let at = self.now();
        let told = self.store.revoke(client, at, refuse_waiting(Reason::Unknown, at), announce()).await?;
        let revoked = told.is_some();
        tell();
        // Whoever is entering on what the store said before sees this number change, or is seated and evicted here.
        self.revocations.fetch_add(1, Ordering::SeqCst);
        // At once, and whatever becomes of the channels: nobody revoked resumes one.
        if self.router.evict(client, Reason::Unauthorised) {
            info!(client = %uuid::Uuid::from_bytes(*client), "revoked while connected");
        }
        self.presence().note(client, false);
        self.greet(told.as_deref().unwrap_or_default()).await;
        self.channels.end(&*self.store, client).await?;
        Ok(revoked)
    }

    /// Closes a group for good, on the word of a member: durably; then everybody is told.
    pub(crate) async fn close(
        &self,
        sid: &ConversationId,
        by: &ClientId,
        signature: &MemberSignature,
    ) -> Result<(), CloseError> {
        // What was acknowledged is not refused.
        self.keeper.settled().await;
        let at = self.now();
        let refuse = refuse_waiting(Reason::Closed, at);
        let closing = self.store.close(sid, by, signature, at, refuse, announce()).await?;
        // First nothing more comes to the members; then what did is taken back.
        self.router.forget_chains(&closing.chains);
        self.keeper.settled().await;
        self.router.withdraw(&closing.chains, closing.told.iter().chain([by]));
        self.greet(&closing.told).await;
        Ok(())
    }

    /// Something waits in the store for these clients, which was not offered to anybody. Whoever is here is not given again
    /// what he has acknowledged.
    pub(crate) async fn greet(&self, clients: &[ClientId]) {
        if !clients.is_empty() {
            self.keeper.settled().await;
            self.router.greet(clients);
        }
    }

    /// Invitations from before this have expired at `now`.
    pub(crate) const fn oldest_invitation(&self, now: u64) -> u64 {
        now.saturating_sub(INVITATION_AGE.as_secs())
    }

    /// Ends all channels of a client, durably, and returns how many there were: its next connection is a full handshake.
    /// The one that stands is not touched.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn expire_channels(&self, client: &ClientId) -> Result<u64, StoreError> {
        let ended = self.channels.end(&*self.store, client).await?;
        info!(client = %uuid::Uuid::from_bytes(*client), ended, "channels expired");
        Ok(ended)
    }

    /// The channels of a client, in no order, each with its end in seconds since 1970.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn channels_of(&self, client: &ClientId) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        self.channels.of(&*self.store, client, self.now()).await
    }

    /// Replaces a client's identity key: durably; then its connections end, but for the one on which it asked, if that is
    /// still its connection: whoever asked for it answers and ends it.
    pub(crate) async fn rotate(&self, key: NewKey, asker: &Mailbox) -> Result<(), RotateError> {
        let client = key.id;
        self.store.rotate(key).await?;
        // As for a revocation.
        self.revocations.fetch_add(1, Ordering::SeqCst);
        if let Some(mailbox) = self.router.mailbox(&client)
            && mailbox.connection() == asker.connection()
        {
            self.router.forget_client(&client);
        } else {
            self.router.evict(&client, Reason::Unauthorised);
        }
        self.channels.end(&*self.store, &client).await?;
        Ok(())
    }

    /// Gives the client of an account another key, or makes that client: durably; then the connections of the former key
    /// end.
    pub(crate) async fn log_in(&self, login: LoginEntry) -> Result<LoggedIn, LoginError> {
        let done = self.store.log_in(login).await?;
        let client = done.client();
        match done {
            LoggedIn::Changed(_) => {
                // As for a revocation.
                self.revocations.fetch_add(1, Ordering::SeqCst);
                if self.router.evict(&client, Reason::KeyChanged) {
                    info!(client = %uuid::Uuid::from_bytes(client), "another key has entered its account");
                }
            }
            LoggedIn::New(_) => self.presence().note(&client, false),
            LoggedIn::Repeat(_) => {}
        }
        self.channels.end(&*self.store, &client).await?;
        Ok(done)
    }

    /// What was chosen, as it is now: it may change while the server runs.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Goes on with another configuration. What it says of times, rates and enrolment holds at once, and connected clients
    /// are told of a new heartbeat or timeout; what it says of room holds for what is made from now on, and how many may
    /// come in stays what it was.
    pub fn reconfigure(&self, config: Config) {
        let old = self.config.swap(Arc::new(config.clone()));
        if old.rates != config.rates {
            self.limits.set_rates(&config.rates);
        }
        if (old.heartbeat, old.timeout) != (config.heartbeat, config.timeout) {
            // Whoever is not seated yet looks again once it is.
            self.router.for_each(|mailbox| self.tell_settings(mailbox));
        }
    }

    /// Tells a client the present heartbeat and timeout.
    pub(crate) fn tell_settings(&self, mailbox: &Mailbox) {
        let config = self.config.load();
        let settings = Settings {
            heartbeat: config.heartbeat,
            timeout: config.timeout,
            time: self.now(),
            store_epoch: self.store.meta().store_epoch,
            ..Settings::default()
        };
        let mut message = [0; 64];
        match Message::Settings(settings).encode(&mut message) {
            Ok(len) => drop(mailbox.owe(Owed::Answer(message.get(..len).unwrap_or_default().to_vec()))),
            Err(error) => error!(%error, "settings have become longer than expected"),
        }
    }

    /// When it was made, in seconds since 1970.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// What it has counted so far.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Whether it takes connections.
    pub fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Relaxed)
    }

    /// Where it is noted who comes and goes.
    pub(crate) fn presence(&self) -> &Presence {
        &self.mailboxes.presence
    }

    /// Connected clients.
    pub fn connected(&self) -> usize {
        self.router.connected()
    }

    /// Connections, of clients and strangers.
    pub fn connections(&self) -> usize {
        self.gate.connections()
    }

    /// Bytes of messages that all mailboxes hold, of which there are never more than
    /// [`total`](MailboxLimits::total).
    pub fn mailbox_bytes(&self) -> usize {
        self.mailboxes.budget.held()
    }

    pub(crate) fn key(&self) -> Result<PublicKey<'_>, ossicle_core::Error> {
        PublicKey::from_modulus(self.identity.modulus())
    }

    pub(crate) fn core_config(&self) -> ServerConfig {
        ServerConfig {
            id: self.store.meta().server_id,
            fingerprint: self.identity.fingerprint(),
            record_limit: u16::try_from(MAX_RECORD_LEN).unwrap_or(u16::MAX),
        }
    }

    /// A number that no other connection has.
    pub(crate) fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }

    /// Changes whenever a client was revoked or its key replaced.
    pub(crate) fn revocations(&self) -> u64 {
        self.revocations.load(Ordering::SeqCst)
    }

    /// Whether it was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping.begun.load(Ordering::SeqCst)
    }

    /// The date, in seconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        self.clock.date()
    }

    /// Ends when the server stops. Cancel-safe.
    pub(crate) async fn stopped(&self) {
        // From here on a call is heard, so that none comes between the look and the waiting.
        let mut told = pin!(self.stopping.told.notified());
        told.as_mut().enable();
        if !self.is_stopping() {
            told.await;
        }
    }

    /// Where messages of this chain go, by the router's memory or else by the store.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn route(&self, chain: &ChainId) -> Result<Option<Arc<ChainRoute>>, StoreError> {
        if let Some(route) = self.router.route(chain) {
            return Ok(Some(route));
        }
        let route = self.store.chain(chain).await?.map(Arc::new);
        if let Some(route) = &route {
            self.router.remember(*chain, Arc::clone(route));
        }
        Ok(route)
    }
}

/// Serves whoever connects to `listener` until `shutdown` is done; then tells all clients, waits for a bounded time and
/// returns.
pub async fn run(listener: impl Listener, server: Arc<Server>, shutdown: impl Future<Output = ()>) {
    let mut tasks = JoinSet::new();
    let writer = Arc::clone(&server);
    // Ends with this call, however that ends.
    let mut background = JoinSet::new();
    background.spawn(async move {
        let mut due = interval(WRITE_CHANNELS);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            writer.channels.write(&*writer.store).await;
        }
    });
    let orders = server.orders.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(orders) = orders {
        let server = Arc::clone(&server);
        background.spawn(async move { keeper::run(orders, Arc::clone(&server.store), &server.router).await });
    }
    background.spawn(expire(Arc::clone(&server)));
    background.spawn(bus::run(Arc::clone(&server)));
    background.spawn(presence::run(Arc::clone(&server)));
    server.listening.store(true, Ordering::Relaxed);
    accept_all(listener, &server, &mut tasks, shutdown).await;
    server.listening.store(false, Ordering::Relaxed);

    server.stopping.begun.store(true, Ordering::SeqCst);
    server.stopping.told.notify_waiters();
    server.router.end_all(Reason::Unavailable);
    let farewell = async {
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    };
    if timeout(server.config().farewell_within, farewell).await.is_err() {
        warn!(connections = tasks.len(), "some clients did not take their leave in time");
    }
    tasks.shutdown().await;
    // What the clients left behind.
    if timeout(server.config().farewell_within, server.keeper.settled()).await.is_err() {
        warn!("the store did not take in time what clients left behind: their senders will send it again");
    }
    background.shutdown().await;
    server.channels.write(&*server.store).await;
}

/// Refuses to its senders what waited for too long, as long as the server runs.
async fn expire(server: Arc<Server>) {
    let mut due = interval(EXPIRE);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ages = Ages::new(server.clock.clone(), server.now());
    let mut invitation_ages = Ages::new(server.clock.clone(), server.now());
    let mut post_ages = Ages::new(server.clock.clone(), server.now());
    loop {
        due.tick().await;
        let (at, queue_age) = (server.now(), server.config().queue_age);
        let before = ages.date(at, queue_age).saturating_sub(queue_age.as_secs());
        match server.store.expire(before, EXPIRED_AT_ONCE, refuse_waiting(Reason::Expired, at)).await {
            Ok(expired) => {
                if !expired.is_empty() {
                    info!(items = expired.len(), "refused what waited for too long");
                }
                if expired.len() == EXPIRED_AT_ONCE {
                    due.reset_immediately();
                }
                let mut senders: Vec<_> = expired.iter().map(|(_, item)| item.sender).collect();
                senders.sort_unstable();
                senders.dedup();
                server.greet(&senders).await;
            }
            Err(error) => warn!(%error, "could not look for what waited for too long"),
        }
        let before = server.oldest_invitation(invitation_ages.date(at, INVITATION_AGE));
        match server.store.expire_invitations(before, EXPIRED_AT_ONCE, at, announce()).await {
            Ok((expired, told)) => {
                if expired > 0 {
                    info!(invitations = expired, "nobody has answered in time");
                }
                if expired == EXPIRED_AT_ONCE {
                    due.reset_immediately();
                }
                server.greet(&told).await;
            }
            Err(error) => warn!(%error, "could not look for invitations that nobody has answered"),
        }
        let before = post_ages.date(at, POST_AGE).saturating_sub(POST_AGE.as_secs());
        match server.store.expire_posts(before).await {
            Ok(0) => {}
            Ok(posts) => debug!(posts, "forgot what was said long ago"),
            Err(error) => warn!(%error, "could not look for what was said long ago"),
        }
    }
}

async fn accept_all(
    listener: impl Listener,
    server: &Arc<Server>,
    tasks: &mut JoinSet<()>,
    shutdown: impl Future<Output = ()>,
) {
    let mut shutdown = pin!(shutdown);
    let mut cleaning = interval(Duration::from_secs(5));
    cleaning.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut back_off = BACK_OFF_MIN;
    let mut paused_until = None;
    loop {
        // What is rare comes first: a flood of newcomers keeps none of it waiting.
        tokio::select! {
            biased;
            () = &mut shutdown => return,
            _ = cleaning.tick() => {
                server.limits.clean();
                server.gate.clean();
            }
            () = sleep_until(paused_until.unwrap_or_else(Instant::now)), if paused_until.is_some() => paused_until = None,
            Some(ended) = tasks.join_next() => report(ended),
            accepted = listener.accept(), if paused_until.is_none() => match accepted {
                Ok((stream, address)) => {
                    back_off = BACK_OFF_MIN;
                    server.listening.store(true, Ordering::Relaxed);
                    begin(server, stream, address, tasks);
                }
                Err(error) if is_the_peers_fault(&error) => debug!(%error, "a connection was gone before it was accepted"),
                Err(error) => {
                    error!(%error, seconds = back_off.as_secs(), "cannot accept connections: trying again after a pause");
                    server.listening.store(false, Ordering::Relaxed);
                    paused_until = Some(Instant::now() + back_off);
                    back_off = (back_off * 2).min(BACK_OFF_MAX);
                }
            },
        }
    }
}

const BACK_OFF_MIN: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(64);

fn is_the_peers_fault(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

fn begin(server: &Arc<Server>, stream: impl Stream, address: SocketAddr, tasks: &mut JoinSet<()>) {
    server.metrics.connections.count();
    match server.gate.knock(address.ip()) {
        Ok(ticket) => {
            tasks.spawn(channel::run(Arc::clone(server), stream, address, ticket));
        }
        Err(why) => {
            debug!(%address, %why, "turned away");
            server.metrics.turned_away.count(why.word());
        }
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a channel's task failed");
    }
}
