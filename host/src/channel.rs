//! One peer: its socket, its connection, its deadlines. One task each, from the first byte to the last.
//!
//! The task reads into its thread's scratch buffer, opens records there, and seals what waits in the client's mailbox
//! into another, so that an idle client owns no buffer: it owns bytes only while a record is torn or its socket is full.
//! RSA signatures and the store are jobs that the task awaits while it goes on writing. Before authentication every failure is
//! silent; afterwards a malformed request is refused and a bad record ends the connection. Nothing is read of an envelope
//! but its chain and number.

use core::cell::RefCell;
use core::future::{Future, pending};
use core::net::SocketAddr;
use core::pin::{Pin, pin};
use core::time::Duration;
use std::io;
use std::sync::Arc;

use ossicle_core::{
    Ask, BufferError, ClaimKind, ClientClaim, Connection, Enrol, EnvelopeHeader, Error, Event, ID_LEN, Lookup,
    MAX_RECORD_LEN, MIN_RECORD_LIMIT, Message, PublicKey, RECORD_OVERHEAD, Reason, Received, Settings, Statement,
};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

use crate::accounts::Crowded;
use crate::crypto::{HostAead, PoolError, dummy_key, has_small_factor};
use crate::directory::{Asker, REQUESTS, Unfinished, answer, enrol_reason, fingerprint, told_reason, unavailable};
use crate::gate::{Ticket, Verdict};
use crate::keeper::Batch;
use crate::limits::Admission;
use crate::mailbox::{Delivery, Mailbox, Next, Owed, RECEIPT_LEN, Wanted, refusal};
use crate::name::Name;
use crate::resumption::Held;
use crate::router::{Outgoing, Sent, Told, Way};
use crate::server::{MAX_CHANNEL_AGE, Policy, Server};
use crate::store::{ChannelId, ClientId, ClientRecord, Enrolment, Item, LoginEntry, LoginError, StoreError};
use crate::transport::Stream;

/// Bytes read at once: some records, and always room for the longest.
const READ_LEN: usize = 32 * 1024;
/// Bytes sealed for one write.
const WRITE_LEN: usize = 64 * 1024;
/// Writes in a row before others have their turn.
const WRITES: usize = 16;
/// Room for a key update, which may come before any record.
const UPDATE_ROOM: usize = 64;
/// Room for ServerHello and ServerAuth with the longest key and signature, or for the settings.
const HANDSHAKE_LEN: usize = 4096;

const _: () = assert!(READ_LEN > MAX_RECORD_LEN && WRITE_LEN > MAX_RECORD_LEN + UPDATE_ROOM);
const LINGER: Duration = Duration::from_secs(1);

thread_local! {
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_LEN]);
    static WRITE: RefCell<WriteScratch> = RefCell::new(WriteScratch { bytes: vec![0; WRITE_LEN], passed: Vec::new(), waited: 0 });
}

struct WriteScratch {
    bytes: Vec<u8>,
    /// Where in `bytes` records end that are of messages which only pass.
    passed: Vec<usize>,
    /// How many others there are which waited in the store.
    waited: u64,
}

/// Why a connection ended. For the log: a peer is told a [`Reason`] or nothing.
#[derive(Debug, thiserror::Error)]
enum Exit {
    #[error("closed")]
    Closed,
    #[error("ended: {0}")]
    Ended(Reason),
    #[error("no whole hello came in time")]
    Hello,
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    #[error("it does not read what it is owed")]
    Overrun,
    #[error("{0}")]
    Pool(#[from] PoolError),
    #[error("{0}")]
    Protocol(#[from] Error),
    #[error("too many handshakes from this source")]
    Rate,
    #[error("refused: {0}")]
    Refused(Reason),
    #[error("a recorded hello")]
    Replayed,
    #[error("asked to work first")]
    Retry,
    #[error("it was silent for too long")]
    Silent,
    #[error("the server is stopping")]
    Stopping,
    #[error("the handshake took too long")]
    Timeout,
    #[error("it stopped without a close")]
    Truncated,
}

impl Exit {
    /// Whether a stranger has used up a place for nothing, as no client does that the server lets in. Whoever hangs up or
    /// is refused may be one.
    const fn is_a_fault(&self) -> bool {
        matches!(self, Self::Hello | Self::Protocol(_) | Self::Replayed | Self::Timeout)
    }

    /// One of a few words for it, to be counted.
    const fn word(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Ended(reason) | Self::Refused(reason) => reason.as_str(),
            Self::Hello => "hello-timeout",
            Self::Io(_) => "socket",
            Self::Overrun => "overrun",
            Self::Pool(_) => "pool",
            Self::Protocol(_) => "protocol",
            Self::Rate => "rate",
            Self::Replayed => "replayed",
            Self::Retry => "asked-for-work",
            Self::Silent => "silent",
            Self::Stopping => "stopping",
            Self::Timeout => "timeout",
            Self::Truncated => "truncated",
        }
    }
}

/// Serves one peer until it or the server is done. Logs how it ended.
pub(crate) async fn run<S: Stream>(server: Arc<Server>, stream: S, address: SocketAddr, mut ticket: Ticket) {
    // Boxed, so that the handshake's buffers and keys are gone once it is over.
    let entered = Box::pin(async {
        tokio::select! {
            biased;
            entered = timeout(server.config().handshake_within, enter(&server, stream, address)) => {
                entered.unwrap_or(Err(Exit::Timeout))
            }
            () = server.stopped() => Err(Exit::Stopping),
        }
    })
    .await;
    match entered {
        Ok(peer) => {
            ticket.entered();
            peer.serve().await;
        }
        Err(why) => {
            if why.is_a_fault() {
                ticket.failed();
            }
            server.metrics.not_entered.count(why.word());
            if let Exit::Refused(reason) = why {
                server.metrics.handshakes_refused.count(reason);
            }
            match server.limits.line() {
                Some(0) => info!(%address, %why, "did not enter"),
                Some(others) => info!(%address, %why, others, "did not enter, nor did others before"),
                None => debug!(%address, %why, "did not enter"),
            }
        }
    }
}

/// The server's side of the handshake, to a seated client whose settings wait to be written.
async fn enter<S: Stream>(server: &Arc<Server>, stream: S, address: SocketAddr) -> Result<Box<Peer<S>>, Exit> {
    // Small records must not wait for each other: what belongs together is written together already.
    stream.set_nodelay()?;
    let mut seed = Zeroizing::new([0; 64]);
    server.random.fill(seed.as_mut()).map_err(|_| Error::Crypto)?;
    let mut connection = Box::new(Connection::<HostAead>::server(server.core_config(), &seed));
    let mut buffer = Vec::new();

    // -> ClientHello
    // Whether it has to is decided when the hello is there.
    connection.demand_work();
    let hello = read_record(&stream, &mut connection, &mut buffer);
    let hello = timeout(server.config().hello_within, hello).await.map_err(|_| Exit::Hello)??;
    let mut out = vec![0; HANDSHAKE_LEN];
    let revocations = server.revocations();
    let resumed = match hello {
        Heard::Offer(id) => resume(server, &stream, &mut connection, &mut buffer, id, &mut out).await?,
        _ => None,
    };
    let (client, used, by_password) = match resumed {
        Some((client, held)) => (client, Some(held), false),
        None => {
            let entered = authenticate(server, &stream, address, &mut connection, &mut buffer, &mut out).await?;
            (entered.client, None, entered.by_password)
        }
    };

    // <- {Settings}
    let meta = server.store.meta();
    let now = server.now();
    let config = server.config();
    // What a login proves is worth no channel: its client does not know its own id yet.
    let full = if by_password { 0 } else { config.channel_age.min(MAX_CHANNEL_AGE).as_secs() };
    let expires = used.as_ref().map_or_else(|| now.saturating_add(full), |used| used.expires);
    // It is only said: a store that cannot tell says so when it is asked for them.
    let waiting = server.store.waiting(&client.id).await.unwrap_or_default();
    let mut channel = [0; ID_LEN];
    if !by_password {
        server.random.fill(&mut channel).map_err(|_| Error::Crypto)?;
    }
    let settings = Settings {
        channel,
        valid_for: u32::try_from(expires.saturating_sub(now)).unwrap_or(u32::MAX),
        heartbeat: config.heartbeat,
        timeout: config.timeout,
        time: now,
        waiting: u32::try_from(waiting.items).unwrap_or(u32::MAX),
        store_epoch: meta.store_epoch,
    };
    let len = connection.accept(&settings, &mut out)?;
    out.truncate(len);
    out.shrink_to_fit();
    let resumed = connection.is_resumed();
    if let Some(issued) = connection.take_channel() {
        server.channels.issue(&issued, expires, used.map(|used| used.channel.id));
    }

    // No record of ours is longer than those we take ourselves.
    let max_payload = connection.max_payload()?.min(MAX_RECORD_LEN - RECORD_OVERHEAD);
    let number = server.next_connection();
    let shared = Arc::clone(&server.mailboxes);
    let mailbox = Mailbox::new(client.id, number, max_payload, config.mailbox, shared);
    let mut peer = Box::new(Peer {
        server: Arc::clone(server),
        stream,
        address,
        connection: *connection,
        id: client.id,
        mailbox: Arc::new(mailbox),
        job: None,
        batch: None,
        fetch: None,
        refetch: None,
        failures: 0,
        unfinished: None,
        rest: buffer,
        out,
        written: 0,
        passed: Vec::new(),
        sent: 0,
        heard: Instant::now(),
        paused_until: None,
        asked: false,
        way: None,
        ahead: 0,
        renewed: Instant::now(),
        renew: false,
        closed: None,
        farewell: None,
    });
    if resumed { &server.metrics.resumed } else { &server.metrics.full }.count();
    // Only now, with the client's Finished verified, does anything change for anybody.
    if let Some(older) = server.router.enter(client.id, Arc::clone(&peer.mailbox)) {
        info!(%address, client = %Uuid::from_bytes(client.id), name = client.name, "took over an older connection");
        older.end(Some(Reason::TakenOver));
    }
    let now = server.config();
    if (now.heartbeat, now.timeout) != (settings.heartbeat, settings.timeout) {
        // They changed while it entered.
        server.tell_settings(&peer.mailbox);
    }
    info!(%address, client = %Uuid::from_bytes(client.id), name = client.name, resumed, "connected");
    peer.settle_in(&client, revocations).await;
    Ok(peer)
}

/// Answers an offer. Who resumed a channel is returned with it; `None` leaves the connection at the full handshake.
async fn resume(
    server: &Server,
    stream: &impl Stream,
    connection: &mut Connection<HostAead>,
    buffer: &mut Vec<u8>,
    id: ChannelId,
    out: &mut [u8],
) -> Result<Option<(ClientRecord, Held)>, Exit> {
    let offer = connection.offered().unwrap_or_default();
    if server.gate.is_recorded(&offer) {
        return Err(Exit::Replayed);
    }
    let mut endings = server.channels.endings();
    let held = resumable(server, &id).await;

    // <- ServerHello, <- {ServerAuth}
    let len = connection.answer_offer(held.as_ref().map(|(_, held)| &held.channel), out)?;
    let Some(mut held) = held.filter(|_| len > 0) else { return Ok(None) };
    // Nobody says the same hello twice but who has recorded it: it would cost two curve operations each time.
    if !server.gate.resumed(offer) {
        return Err(Exit::Replayed);
    }
    write_all(stream, out.get(..len).unwrap_or_default()).await?;

    // -> {ClientAuth}
    let Heard::Resumed = read_record(stream, connection, buffer).await? else {
        return Err(Error::Decode.into());
    };
    // What was true when it was offered may have ended since.
    loop {
        let now_ended = server.channels.endings();
        if now_ended == endings {
            return Ok(Some(held));
        }
        endings = now_ended;
        match resumable(server, &id).await {
            Some(again) => held = again,
            None => {
                // <- {Refusal}
                let len = connection.refuse(Reason::Unauthorised, 0, out)?;
                write_all(stream, out.get(..len).unwrap_or_default()).await?;
                return Err(Exit::Refused(Reason::Unauthorised));
            }
        }
    }
}

/// The channel with this id and its client, if that client may still enter by it.
async fn resumable(server: &Server, id: &ChannelId) -> Option<(ClientRecord, Held)> {
    if server.config().channel_age.is_zero() {
        return None;
    }
    let failed = |error: &StoreError| warn!(%error, "the store could not look a channel up");
    let held = server.channels.find(&*server.store, id, server.now()).await.inspect_err(failed).ok()??;
    let client = server.store.client(&held.channel.client).await.inspect_err(failed).ok()??;
    let fits = !client.revoked
        && client.key_epoch == held.channel.key_epoch
        && fingerprint(&client) == Some(held.channel.client_key);
    fits.then_some((client, held))
}

/// The full handshake, from the server's signature to a client that may enter.
async fn authenticate(
    server: &Server,
    stream: &impl Stream,
    address: SocketAddr,
    connection: &mut Connection<HostAead>,
    buffer: &mut Vec<u8>,
    out: &mut [u8],
) -> Result<Entered, Exit> {
    if let Some(presented) = connection.presented() {
        if server.gate.is_busy(server.pool.waiting())
            && let Verdict::Retry { cookie, bits } = server.gate.judge(address.ip(), presented)
        {
            // <- HelloRetry
            let len = connection.retry(&cookie, bits, out)?;
            write_all(stream, out.get(..len).unwrap_or_default()).await?;
            return Err(Exit::Retry);
        }
        connection.admit()?;
    }
    // Here only: who has resumed has cost no signature.
    let admission = server.limits.handshake(address.ip());
    if admission != Admission::Admit {
        server.metrics.hasty_handshakes.count();
    }
    if admission == Admission::Ignore {
        return Err(Exit::Rate);
    }

    // <- ServerHello, <- {ServerAuth}
    let Some(Ask::Sign(statement)) = connection.ask() else {
        return Err(Error::Decode.into());
    };
    let signature = server.pool.sign(Arc::clone(&server.identity), statement).await?;
    let len = connection.sign_server(server.key()?, &signature, out)?;
    write_all(stream, out.get(..len).unwrap_or_default()).await?;

    // -> {ClientAuth}
    let Heard::Claim(claim) = read_record(stream, connection, buffer).await? else {
        return Err(Error::Decode.into());
    };
    let claim = ClientClaim::decode(&claim)?;
    let checked = match admission {
        Admission::Refuse { retry_after } => Err((Reason::Rate, retry_after)),
        _ => check(server, address, connection, &claim, statement).await,
    };
    match checked {
        Ok(client) => Ok(Entered { client, by_password: matches!(claim.kind(), ClaimKind::Password { .. }) }),
        Err((reason, retry_after)) => {
            // <- {Refusal}
            let len = connection.refuse(reason, retry_after, out)?;
            write_all(stream, out.get(..len).unwrap_or_default()).await?;
            Err(Exit::Refused(reason))
        }
    }
}

/// Who has authenticated, by a signature and perhaps a password.
struct Entered {
    client: ClientRecord,
    by_password: bool,
}

/// Whether the claim holds, and whose it is; otherwise what the client is told, with the milliseconds to wait.
///
/// An unknown id, a revoked client, another key and a wrong signature take one path and cost the same. `dummy` is any
/// statement, to be verified where there is none to verify.
async fn check(
    server: &Server,
    address: SocketAddr,
    connection: &mut Connection<HostAead>,
    claim: &ClientClaim<'_>,
    dummy: Statement,
) -> Result<ClientRecord, (Reason, u32)> {
    let failed = |error| (unavailable(&error), 1000);
    let unauthorised = (Reason::Unauthorised, 0);

    let held = server.store.client(&claim.id()).await.map_err(failed)?;
    match claim.kind() {
        ClaimKind::Key { key_epoch } => {
            let client = held.filter(|client| !client.revoked && client.key_epoch == key_epoch);
            let modulus = client.as_ref().map_or_else(|| dummy_key(), |client| client.modulus.as_slice());
            let key = PublicKey::from_modulus(modulus).map(|key| key.fingerprint());
            let bound = connection.bind(claim, &key.unwrap_or_default());
            let (modulus, statement) = match (&client, bound) {
                (Some(client), Ok(statement)) => (client.modulus.as_slice(), statement),
                _ => (dummy_key(), dummy),
            };
            let verified = server.pool.verify_here(modulus, &statement, claim.signature());
            client.filter(|_| verified).ok_or(unauthorised)
        }
        ClaimKind::Enroll { name, key, token } => {
            let statement = connection.bind(claim, &key.fingerprint()).map_err(|_| unauthorised)?;
            if !server.pool.verify_here(key.modulus(), &statement, claim.signature()) {
                return Err(unauthorised);
            }
            let name = Name::parse(name).map_err(|_| (Reason::Malformed, 0));
            // Who was enrolled so already is let in, whatever the policy is now: his first answer was lost.
            let repeats = |client: &ClientRecord| {
                let same_name = Name::parse(&client.name).ok().as_ref() == name.as_ref().ok();
                client.modulus == key.modulus() && same_name && !client.revoked
            };
            if let Some(client) = held.filter(repeats) {
                return Ok(client);
            }
            if has_small_factor(key.modulus()) {
                return Err((Reason::Malformed, 0));
            }
            let token_id = match server.config().enrol {
                Policy::Closed => return Err((Reason::Forbidden, 0)),
                Policy::Open => None,
                Policy::Token => {
                    let id = token.unwrap_or_default();
                    let held = server.store.token(&id).await.map_err(failed)?;
                    let verifier = held.as_ref().map(|token| token.verifier).unwrap_or_default();
                    if !connection.proves(claim, &verifier) || held.is_none() {
                        return Err(unauthorised);
                    }
                    Some(id)
                }
            };
            let enrolment = Enrolment {
                id: claim.id(),
                name: name?,
                modulus: key.modulus().to_vec(),
                token_id,
                enrolled_by: None,
                // Known once the connection is accepted.
                record_limit: u16::try_from(MIN_RECORD_LIMIT).unwrap_or(u16::MAX),
                now: server.now(),
            };
            if let Err(error) = server.store.enrol(enrolment).await {
                info!(client = %Uuid::from_bytes(claim.id()), %error, "not enrolled");
                return Err((enrol_reason(&error), 0));
            }
            server.presence().note(&claim.id(), false);
            server.store.client(&claim.id()).await.map_err(failed)?.ok_or(unauthorised)
        }
        // Whatever the policy is: an account is there because the operator wants it.
        ClaimKind::Password { name, key, password } => {
            let statement = connection.bind(claim, &key.fingerprint()).map_err(|_| unauthorised)?;
            if !server.pool.verify_here(key.modulus(), &statement, claim.signature()) {
                return Err(unauthorised);
            }
            let name = Name::parse(name).map_err(|_| (Reason::Malformed, 0))?;
            if has_small_factor(key.modulus()) {
                return Err((Reason::Malformed, 0));
            }
            server.limits.login(&name, address.ip()).map_err(|wait| (Reason::Rate, wait))?;
            // A name without account and a locked one go the same way to the same answer.
            let account = server.store.account(&name).await.map_err(failed)?;
            let verifier = account.as_ref().map(|account| account.verifier.clone());
            let password = Zeroizing::new(password.expose().to_vec());
            let right = server.passwords.verify(verifier, password).await.map_err(|Crowded| (Reason::Rate, 1000))?;
            let account = account.filter(|account| right && !account.locked).ok_or(unauthorised)?;
            let login = LoginEntry {
                name,
                verifier: account.verifier,
                id: claim.id(),
                modulus: key.modulus().to_vec(),
                record_limit: u16::try_from(MIN_RECORD_LIMIT).unwrap_or(u16::MAX),
                now: server.now(),
            };
            let client = match server.log_in(login).await {
                Ok(done) => {
                    info!(client = %Uuid::from_bytes(done.client()), name = account.name, "entered by password");
                    done.client()
                }
                Err(error) => {
                    info!(name = account.name, %error, "the password is right, but did not let in");
                    return Err(match error {
                        LoginError::IdInUse | LoginError::KeyInUse => (Reason::NameInUse, 0),
                        LoginError::Store(error) => failed(error),
                        _ => unauthorised,
                    });
                }
            };
            server.store.client(&client).await.map_err(failed)?.ok_or(unauthorised)
        }
        _ => Err((Reason::Unsupported, 0)),
    }
}

/// What a record of the handshake said.
enum Heard {
    /// A hello that offers nothing.
    Hello,
    /// A hello that offers this channel.
    Offer(ChannelId),
    /// The bytes of a claim.
    Claim(Zeroizing<Vec<u8>>),
    /// That the client holds the channel.
    Resumed,
}

/// Reads until one record was opened, never beyond it.
async fn read_record(
    stream: &impl Stream,
    connection: &mut Connection<HostAead>,
    buffer: &mut Vec<u8>,
) -> Result<Heard, Exit> {
    loop {
        let wanted = match connection.receive(buffer)? {
            Received::Need(len) => len,
            Received::Wait => return Err(Error::Decode.into()),
            Received::Record { event, .. } => {
                let heard = match event {
                    Event::Progress => Heard::Hello,
                    Event::CheckChannel(id) => Heard::Offer(id),
                    Event::CheckClient(claim) => Heard::Claim(Zeroizing::new(claim.bytes().to_vec())),
                    Event::Resumed => Heard::Resumed,
                    _ => return Err(Error::Decode.into()),
                };
                // A claim may hold a password, and was opened in place.
                buffer.zeroize();
                *buffer = Vec::new();
                return Ok(heard);
            }
        };
        stream.readable().await?;
        let missing = wanted.saturating_sub(buffer.len());
        let read = READ.with_borrow_mut(|scratch| {
            let room = scratch.get_mut(..missing).unwrap_or_default();
            let len = stream.try_read(room)?;
            buffer.extend_from_slice(room.get(..len).unwrap_or_default());
            Ok(len)
        });
        match read {
            Ok(0) => return Err(Exit::Truncated),
            Ok(_) => {}
            Err(error) if is_blocked(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn write_all(stream: &impl Stream, mut bytes: &[u8]) -> Result<(), Exit> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(error) if is_blocked(&error) => stream.writable().await?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_blocked(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// After this the store is asked again for what waits; twice as long after each failure, up to the longest. What is damaged
/// stays so, and is not to fill the log.
const REFETCH: Duration = Duration::from_secs(1);
const LONGEST_REFETCH: Duration = Duration::from_secs(60);

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;
type Fetch = Pin<Box<dyn Future<Output = (Wanted, Result<Vec<Item>, StoreError>)> + Send>>;

/// An authenticated client's connection.
struct Peer<S: Stream> {
    server: Arc<Server>,
    stream: S,
    address: SocketAddr,
    connection: Connection<HostAead>,
    id: ClientId,
    mailbox: Arc<Mailbox>,
    /// A request that needs the disk or RSA. While it runs nothing is read.
    job: Option<Job>,
    /// What of the data that is being read has to wait in the store, until the job that takes it there.
    batch: Option<Box<Batch>>,
    /// The store is being asked for what waits for this client, or will be at this time, since it failed.
    fetch: Option<Fetch>,
    refetch: Option<Instant>,
    /// How often in a row it has failed.
    failures: u8,
    /// Where its batches of devices are held, if it enrols any.
    unfinished: Option<Arc<Unfinished>>,
    /// Bytes that were read and not yet opened: a torn record, or what a job keeps waiting.
    rest: Vec<u8>,
    /// Sealed bytes that the socket had no room for, and how many of them it took since.
    out: Vec<u8>,
    written: usize,
    /// Where in `out` records end that are of messages which only pass.
    passed: Vec<usize>,
    /// Messages that it sent and that are not counted yet.
    sent: u64,
    /// When the last record was opened.
    heard: Instant,
    /// Nothing is read before this.
    paused_until: Option<Instant>,
    /// The peer was asked whether it is there.
    asked: bool,
    /// Where its last message went.
    way: Option<Way>,
    /// How many of its next records are counted already.
    ahead: u32,
    /// When the key of this side was last renewed, and whether it is time again.
    renewed: Instant,
    renew: bool,
    /// The close was sealed, with this reason.
    closed: Option<Option<Reason>>,
    /// By then the close has been written.
    farewell: Option<Instant>,
}

impl<S: Stream> Peer<S> {
    /// What follows from the client's being here, and what may have happened while it entered.
    async fn settle_in(&mut self, client: &ClientRecord, revocations: u64) {
        let server = &self.server;
        // What came into the store before the client had its seat was offered to nobody.
        if server.store.waiting(&self.id).await.is_ok_and(|waiting| waiting.items > 0) {
            self.mailbox.greet();
        }
        if server.is_stopping() {
            self.mailbox.end(Some(Reason::Unavailable));
        }
        if server.revocations() != revocations {
            let now = server.store.client(&self.id).await;
            let same = |now: &ClientRecord| !now.revoked && now.key_epoch == client.key_epoch;
            if !now.is_ok_and(|now| now.as_ref().is_some_and(same)) {
                self.mailbox.end(Some(Reason::Unauthorised));
            }
        }
        let limit = self.mailbox.max_payload() + RECORD_OVERHEAD;
        let limit = u16::try_from(limit).unwrap_or(u16::MAX);
        if limit != client.record_limit {
            note(self.id, server.store.set_record_limit(&self.id, limit).await);
        }
        note(self.id, server.store.touch(&self.id, server.now()).await);
    }

    async fn serve(mut self: Box<Self>) {
        let why = match self.drive().await {
            Ok(why) | Err(why) => why,
        };
        self.leave();
        self.server.metrics.ended.count(why.word());
        info!(address = %self.address, client = %Uuid::from_bytes(self.id), %why, "disconnected");
        note(self.id, self.server.store.touch(&self.id, self.server.now()).await);
        if matches!(why, Exit::Closed | Exit::Ended(_)) {
            // Unread bytes here would become a reset there, which takes back what the peer has not read yet.
            let lingered = timeout(LINGER, self.linger()).await;
            debug!(address = %self.address, in_time = lingered.is_ok(), "hung up");
        }
    }

    /// Reads, does, writes, until one side closes.
    async fn drive(&mut self) -> Result<Exit, Exit> {
        let mut timer = pin!(sleep_until(self.due()));
        let mut more = false;
        loop {
            more |= self.flush()?;
            if core::mem::take(&mut more) {
                // Others on this thread come first, above all those whom this peer has written to.
                yield_now().await;
                continue;
            }
            self.fetch();
            let blocked = !self.out.is_empty();
            if let Some(reason) = self.closed.filter(|_| !blocked) {
                return Ok(reason.map_or(Exit::Closed, Exit::Ended));
            }
            let pressure = self.mailbox.pressure();
            if pressure.ending && self.farewell.is_none() {
                self.farewell = Some(Instant::now() + self.server.config().farewell_within);
            }
            let reading = self.job.is_none() && self.paused_until.is_none() && !pressure.behind && !pressure.ending;
            // A deadline that moved away is noticed when the old one comes: most never do.
            if self.due() < timer.deadline() {
                timer.as_mut().reset(self.due());
            }
            // What is rare comes first. Nothing waits for the rest: each turn asks the store and writes what there is.
            tokio::select! {
                biased;
                () = &mut timer => {
                    self.tick()?;
                    timer.as_mut().reset(self.due());
                }
                () = finish(&mut self.job), if self.job.is_some() => {
                    self.job = None;
                    more = self.open(false)?;
                }
                (wanted, answer) = fetched(&mut self.fetch), if self.fetch.is_some() => {
                    self.fetch = None;
                    self.fetched(wanted, answer);
                }
                readable = self.stream.readable(), if reading => {
                    readable?;
                    more = self.open(true)?;
                }
                writable = self.stream.writable(), if blocked => writable?,
                () = self.mailbox.changed() => {}
            }
        }
    }

    /// When something must be done though nothing happens.
    fn due(&self) -> Instant {
        let config = self.server.config();
        let silence =
            self.heard + Duration::from_secs(if self.asked { config.timeout } else { config.heartbeat }.into());
        [self.farewell, self.paused_until, self.refetch].into_iter().flatten().fold(silence, Instant::min)
    }

    fn tick(&mut self) -> Result<(), Exit> {
        let now = Instant::now();
        let config = self.server.config();
        let silent = |seconds: u16| self.heard + Duration::from_secs(seconds.into()) <= now;
        if self.farewell.is_some_and(|farewell| farewell <= now) {
            return Err(Exit::Overrun);
        }
        if self.asked && silent(config.timeout) {
            return Err(Exit::Silent);
        }
        if !self.asked && silent(config.heartbeat) {
            self.asked = true;
            self.mailbox.owe(Owed::Status(0));
        }
        self.renew |= self.renewed + config.key_age <= now;
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            // What the socket has is read in its turn.
            self.open(false)?;
        }
        Ok(())
    }

    /// Asks the store for what waits for the client, if there is room for it.
    fn fetch(&mut self) {
        if self.fetch.is_some() || self.refetch.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.refetch = None;
        if let Some(wanted) = self.mailbox.wanted() {
            let (store, id) = (Arc::clone(&self.server.store), self.id);
            self.fetch =
                Some(Box::pin(
                    async move { (wanted, store.queue(&id, wanted.after, wanted.items, wanted.bytes).await) },
                ));
        }
    }

    fn fetched(&mut self, wanted: Wanted, answer: Result<Vec<Item>, StoreError>) {
        match &answer {
            Ok(_) => self.failures = 0,
            Err(error) => {
                warn!(client = %Uuid::from_bytes(self.id), %error, "could not read what waits for a client");
                let pause = REFETCH.saturating_mul(1 << self.failures.min(6)).min(LONGEST_REFETCH);
                self.refetch = Some(Instant::now() + pause);
                self.failures = self.failures.saturating_add(1);
            }
        }
        let too_large = self.mailbox.answered(wanted, answer.ok());
        let too_large = too_large.into_iter().map(|item| (item.seq, item.kind, item.sender, item.chain, item.n));
        self.server.router.too_large(&self.id, too_large);
    }

    /// Opens what is there, and what the socket has if it is to be `read`. Whether the socket may have more.
    fn open(&mut self, read: bool) -> Result<bool, Exit> {
        READ.with_borrow_mut(|scratch| {
            let mut len = self.rest.len();
            let (held, room) = scratch.split_at_mut_checked(len).ok_or(BufferError::RxFull).map_err(Error::from)?;
            held.copy_from_slice(&self.rest);
            if read {
                match self.stream.read(room) {
                    Ok(0) => return Err(Exit::Truncated),
                    Ok(read) => len += read,
                    Err(error) if is_blocked(&error) => return Ok(false),
                    Err(error) => return Err(error.into()),
                }
            }
            let data = scratch.get_mut(..len).unwrap_or_default();
            let used = self.receive(data)?;
            let rest = data.get(used..).unwrap_or_default();
            if rest.len() != self.rest.len() || used > 0 {
                self.rest = rest.to_vec();
            }
            Ok(len == READ_LEN)
        })
    }

    /// Opens records until the data ends or one of them needs time, and returns how many bytes they had.
    fn receive(&mut self, data: &mut [u8]) -> Result<usize, Exit> {
        let received = self.receive_all(data);
        if let Some(way) = &self.way {
            way.notice();
        }
        received
    }

    fn receive_all(&mut self, data: &mut [u8]) -> Result<usize, Exit> {
        let (mut used, mut records) = (0, 0);
        // Whoever was revoked a moment ago has nothing more to ask.
        while self.job.is_none() && self.paused_until.is_none() && !self.mailbox.is_ending() {
            let rest = data.get_mut(used..).unwrap_or_default();
            let Received::Record { used: len, event } = self.connection.receive(rest)? else {
                break;
            };
            used += len;
            records += 1;
            match event {
                Event::Progress => {}
                Event::Message(payload) => self.handle(payload)?,
                Event::Closed(_) => self.mailbox.end(None),
                _ => return Err(Error::Decode.into()),
            }
        }
        if self.job.is_none() && self.batch.is_some() {
            self.keep(None)?;
        }
        if used > 0 {
            // Once for all of them: others count, too.
            self.server.metrics.records.add(records);
            self.server.metrics.messages.add(core::mem::take(&mut self.sent));
            self.server.metrics.received_bytes.add(u64::try_from(used).unwrap_or_default());
            self.heard = Instant::now();
            self.asked = false;
        }
        Ok(used)
    }

    /// Does what the client says, or begins to.
    fn handle(&mut self, payload: &[u8]) -> Result<(), Exit> {
        let message = Message::decode(payload);
        if let Err(wait) = self.server.limits.message_ahead(&self.id, &mut self.ahead) {
            self.server.metrics.hasty_records.count();
            match message.as_ref().ok().and_then(|message| refused_for_haste(message, wait)) {
                Some(owed) => {
                    let is_receipt = matches!(owed, Owed::Receipt(_));
                    // A receipt has no time to wait, so the first of a run is followed by one.
                    if !self.mailbox.owe(owed) && is_receipt {
                        let retry_after = Some(wait);
                        self.mailbox.owe(Owed::Refused { request: 0, reason: Reason::Rate, retry_after });
                    }
                    return Ok(());
                }
                // What cannot be refused, such as a receipt, is done; but the client is listened to more slowly.
                None => self.paused_until = Some(Instant::now() + Duration::from_millis(wait.into())),
            }
        }
        let router = &self.server.router;
        self.sent += u64::from(matches!(message, Ok(Message::Send { .. })));
        let owed = match message {
            Ok(Message::Send { wanted, envelope }) => match EnvelopeHeader::decode(envelope) {
                Ok(header) => match router.way(&header.chain_id, &mut self.way) {
                    Some(way) => {
                        let behind = self.batch.is_some();
                        let message = Outgoing { header: &header, wanted, envelope };
                        match router.send_by(way, &self.id, message, behind, || self.server.now()) {
                            Sent::Told(receipt) => {
                                if let Some(reason) = receipt.and_then(|receipt| receipt.reason) {
                                    self.server.metrics.messages_refused.count(reason);
                                }
                                receipt.map(Owed::Receipt)
                            }
                            Sent::Keep(items, refused) => {
                                let batch = self.batch.get_or_insert_default();
                                batch.push(&header, wanted, refused, items);
                                if batch.is_full() {
                                    self.keep(None)?;
                                }
                                None
                            }
                        }
                    }
                    None => return self.begin(payload),
                },
                Err(_) => Some(Owed::refused(0, Reason::Malformed)),
            },
            Ok(Message::Tell(receipt)) => match router.route(&receipt.chain) {
                Some(route) => {
                    let told = router.tell(&self.id, Some(&route), &receipt);
                    if told == Told::Done {
                        self.mailbox.settle(&receipt.chain, receipt.from, receipt.to);
                    }
                    told_reason(told).map(|reason| Owed::refused(0, reason))
                }
                None => return self.begin(payload),
            },
            Ok(Message::Listening) => return self.begin(payload),
            Ok(Message::NotListening) => match self.mailbox.stop_listening() {
                // When it was last seen is noted.
                true => return self.begin(payload),
                false => None,
            },
            Ok(Message::Acknowledge { seq }) => {
                match self.mailbox.acknowledge(seq) {
                    Ok(seqs) => self.server.keeper.forget(self.id, seqs),
                    Err(reason) => self.mailbox.end(Some(reason)),
                }
                None
            }
            Ok(Message::Status { request }) => Some(Owed::StatusResponse(request)),
            Ok(Message::StatusResponse { .. }) => None,
            Ok(message) if request_id(&message).is_some() => return self.begin(payload),
            Ok(Message::Other(_)) | Err(_) => Some(Owed::refused(0, Reason::Malformed)),
            Ok(_) => Some(Owed::refused(0, Reason::Unsupported)),
        };
        if let Some(owed) = owed {
            self.mailbox.owe(owed);
        }
        Ok(())
    }

    /// Begins a job. Nothing more is read until it is done, so that a client's requests stay in order and few.
    fn begin(&mut self, payload: &[u8]) -> Result<(), Exit> {
        self.keep(Some(payload))
    }

    /// The same, behind the messages that have to wait in the store.
    fn keep(&mut self, payload: Option<&[u8]>) -> Result<(), Exit> {
        let server = Arc::clone(&self.server);
        let mailbox = Arc::clone(&self.mailbox);
        let batch = self.batch.take();
        let request = match payload {
            None => None,
            Some(payload) => {
                let asker = Asker {
                    id: self.id,
                    source: self.address.ip(),
                    mailbox: Arc::clone(&self.mailbox),
                    exporter: self.connection.exporter()?.clone(),
                    unfinished: payload
                        .starts_with(&Enrol::CODE.to_be_bytes())
                        .then(|| Arc::clone(self.unfinished.get_or_insert_default())),
                };
                Some((asker, payload.to_vec()))
            }
        };
        self.job = Some(Box::pin(async move {
            if let Some(batch) = batch {
                for receipt in batch.keep(&server.keeper).await {
                    mailbox.owe(receipt);
                }
            }
            if let Some((asker, payload)) = request {
                answer(server, asker, payload).await;
            }
        }));
        Ok(())
    }

    /// Seals and writes what waits, until nothing does or the socket is full, or it is somebody else's turn: then true.
    fn flush(&mut self) -> Result<bool, Exit> {
        while self.written < self.out.len() {
            let rest = self.out.get(self.written..).unwrap_or_default();
            match self.stream.try_write(rest) {
                Ok(len) => {
                    self.server.metrics.sent_bytes.add(u64::try_from(len).unwrap_or_default());
                    self.written += len;
                }
                Err(error) if is_blocked(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        if !self.out.is_empty() {
            self.out = Vec::new();
            self.written = 0;
            self.mailbox.written(core::mem::take(&mut self.passed).len());
        }
        WRITE.with_borrow_mut(|scratch| {
            for _ in 0..WRITES {
                if self.closed.is_some() {
                    return Ok(false);
                }
                scratch.passed.clear();
                scratch.waited = 0;
                let len = self.seal(scratch)?;
                let metrics = &self.server.metrics;
                metrics.delivered_passing.add(u64::try_from(scratch.passed.len()).unwrap_or_default());
                metrics.delivered_waiting.add(scratch.waited);
                let Some(bytes) = scratch.bytes.get(..len).filter(|bytes| !bytes.is_empty()) else {
                    return Ok(false);
                };
                let (written, failed) = match self.stream.try_write(bytes) {
                    Ok(written) => (written, None),
                    Err(error) if is_blocked(&error) => (0, None),
                    Err(error) => (0, Some(error)),
                };
                let whole = scratch.passed.partition_point(|end| *end <= written);
                self.mailbox.written(whole);
                self.server.metrics.sent_bytes.add(u64::try_from(written).unwrap_or_default());
                if let Some(error) = failed {
                    return Err(error.into());
                }
                if written < len {
                    self.out = bytes.get(written..).unwrap_or_default().to_vec();
                    self.passed = scratch.passed.get(whole..).unwrap_or_default().to_vec();
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Seals as much of the mailbox as one write takes, and returns its length.
    fn seal(&mut self, scratch: &mut WriteScratch) -> Result<usize, Exit> {
        let bytes = &mut scratch.bytes;
        let mut len = self.connection.transmit(bytes)?;
        if core::mem::take(&mut self.renew) {
            len += self.connection.update_key(bytes.get_mut(len..).unwrap_or_default())?;
            self.renewed = Instant::now();
        }
        loop {
            let room = bytes.get_mut(len..).unwrap_or_default();
            match self.mailbox.next(room.len().saturating_sub(UPDATE_ROOM)) {
                Next::Owed(owed) => match self.connection.send(&owed.message(&mut [0; RECEIPT_LEN])?, room) {
                    Ok(sealed) => len += sealed,
                    // Answers are made to measure, so this is a fault of ours; the client's request stays unanswered.
                    Err(Error::Buffer(error)) => {
                        debug!(client = %Uuid::from_bytes(self.id), %error, "an answer was too long")
                    }
                    Err(error) => return Err(error.into()),
                },
                Next::Delivery(delivery) => {
                    // The mailbox knows how long they are.
                    if let Some(announcement) = delivery.announcement() {
                        len += self.connection.send(&announcement, room)?;
                    }
                    let room = bytes.get_mut(len..).unwrap_or_default();
                    len += self.connection.send(&delivery.message()?, room)?;
                    match delivery {
                        Delivery::Passing(_) => scratch.passed.push(len),
                        Delivery::Waiting(_) => scratch.waited += 1,
                    }
                }
                Next::Close(reason) => {
                    len += self.connection.close(reason, room)?;
                    self.closed = Some(reason);
                    return Ok(len);
                }
                Next::Full | Next::Empty => return Ok(len),
                Next::Overrun => return Err(Exit::Overrun),
            }
        }
    }

    /// Frees the seat; what was not handed over is kept. The second call does nothing.
    fn leave(&mut self) {
        self.server.router.leave(&self.id, &self.mailbox);
        self.mailbox.end(None);
        self.server.presence().forget(self.mailbox.connection());
        self.server.followers.forget(self.mailbox.connection());
        self.job = None;
        self.fetch = None;
    }

    /// Reads without looking, until the peer hangs up.
    async fn linger(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        loop {
            self.stream.readable().await?;
            match READ.with_borrow_mut(|scratch| self.stream.try_read(scratch)) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if is_blocked(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl<S: Stream> Drop for Peer<S> {
    fn drop(&mut self) {
        // Also when the task is aborted: a seat without a connection would swallow messages.
        self.leave();
    }
}

/// What others learn of a client's being here is not worth its connection.
pub(crate) fn note(client: ClientId, stored: Result<(), StoreError>) {
    if let Err(error) = stored {
        warn!(client = %Uuid::from_bytes(client), %error, "could not note when a client was here");
    }
}

async fn fetched(fetch: &mut Option<Fetch>) -> (Wanted, Result<Vec<Item>, StoreError>) {
    match fetch {
        Some(fetch) => fetch.await,
        None => pending().await,
    }
}

async fn finish(job: &mut Option<Job>) {
    match job {
        Some(job) => job.await,
        None => pending().await,
    }
}

/// The answer to what came too fast, where there is one.
fn refused_for_haste(message: &Message<'_>, wait: u32) -> Option<Owed> {
    if let Message::Send { envelope, .. } = message {
        let header = EnvelopeHeader::decode(envelope).ok()?;
        return Some(Owed::Receipt(refusal(header.chain_id, header.n, Reason::Rate)));
    }
    // A batch with a hole would be lost.
    if matches!(message, Message::Other(body) if body.code() == Enrol::CODE) {
        return None;
    }
    request_id(message).map(|request| Owed::Refused { request, reason: Reason::Rate, retry_after: Some(wait) })
}

/// The correlation id of a request that needs the store.
fn request_id(message: &Message<'_>) -> Option<u16> {
    match message {
        Message::Lookup(Lookup { request, .. })
        | Message::List { request, .. }
        | Message::Revoke { request, .. }
        | Message::Publish { request, .. }
        | Message::Wrap { request, .. } => Some(*request),
        Message::Other(body) => REQUESTS.contains(&body.code()).then(|| body.request()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    /// The size of what an async function returns.
    const fn future_len<A, B, C, D, F>(_: &impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_client_costs_little() {
        assert!(size_of::<Peer<TcpStream>>() <= 2560, "{}", size_of::<Peer<TcpStream>>());
        assert!(future_len(&run::<TcpStream>) <= 1024, "{}", future_len(&run::<TcpStream>));
    }
}
