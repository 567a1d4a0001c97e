//! A client that does what PROTOCOL says, over the simulated network: core's connection, and as much of a library around
//! it as keeps letters until they are settled. Envelopes and wraps are opaque to a server, and empty here.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use ossicle::crypto::{HostAead, IdentityKey, verify};
use ossicle_core::{
    Ask, Bundle, ClientConfig, Connection, Credentials, EnvelopeHeader, Error, Event, Message, PeerError, Reason,
    Received, SignedBundle, WRAP_LEN, WrapHeader,
};
use ossicle_tests::{keys, public};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use turmoil::net::TcpStream;

use crate::book::{Book, Letter, place, seal};
use crate::dice::Dice;
use crate::{HEARTBEAT, PORT, TIMEOUT};

pub(crate) static SERVER: LazyLock<IdentityKey> = LazyLock::new(keys::server);
static KEYS: [LazyLock<IdentityKey>; 3] =
    [LazyLock::new(keys::alice), LazyLock::new(keys::bob), LazyLock::new(keys::carol)];
const NAMES: [&str; 3] = ["alice", "bob", "carol"];
/// So often a session looks whether there is something to do.
const LOOK: Duration = Duration::from_millis(100);
/// After this a letter is sent again, where receipts may be lost on a connection that stands.
const REPEAT: Duration = Duration::from_secs(3);

pub(crate) type Shared = Arc<Mutex<Book>>;

pub(crate) fn lock(book: &Shared) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a session ended.
#[derive(Debug)]
enum Ended {
    Broken(&'static str),
    Closed(Option<Reason>),
    Protocol(Error),
    /// It hung up itself.
    Willing(&'static str),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Protocol(error)
    }
}

/// Runs a party until everybody is to finish, or it is crashed.
pub(crate) async fn live(me: usize, seed: u64, book: Shared) -> turmoil::Result {
    let start = {
        let mut book = lock(&book);
        book.homes[me].starts += 1;
        book.homes[me].starts
    };
    let mut dice = Dice::new(seed, 1000 * (me as u64 + 1) + start);
    while !lock(&book).finish {
        let ended = Session::run(me, &book, &mut dice).await;
        {
            let mut book = lock(&book);
            let ended = ended.unwrap_err();
            book.note(me, format_args!("is without a connection: {ended:?}"));
            match &ended {
                Ended::Protocol(Error::Peer(PeerError::Truncated)) => {}
                Ended::Protocol(Error::Peer(PeerError::Retry)) => book.reach("asked for work"),
                // The cookie was of a server that has started anew since, or too old.
                Ended::Protocol(Error::Peer(PeerError::Busy)) => book.reach("asked for work again"),
                Ended::Protocol(Error::Peer(PeerError::Refused { reason: Reason::Unavailable, .. })) => {
                    book.reach("not entered: unavailable");
                }
                // A peer that does what PROTOCOL says is told so by nobody.
                Ended::Protocol(error) => book.fail(format_args!("{me}: {error:?}")),
                Ended::Closed(None | Some(Reason::Unavailable | Reason::TakenOver)) => {
                    book.reach(format_args!("{ended:?}"))
                }
                Ended::Closed(reason) => book.fail(format_args!("the server closed on {me}: {reason:?}")),
                Ended::Broken(why) | Ended::Willing(why) => book.reach(*why),
            }
        }
        sleep(dice.millis(20, 800)).await;
    }
    Ok(())
}

struct Session<'b> {
    me: usize,
    book: &'b Shared,
    dice: &'b mut Dice,
    stream: TcpStream,
    connection: Connection<HostAead>,
    rx: Vec<u8>,
    tx: Vec<u8>,
    /// Letters before this one have left on this connection.
    next: usize,
    /// What was asked, for which recipient.
    asked: BTreeMap<u16, usize>,
    request: u16,
    /// Wraps are not tried again before this.
    retry: Instant,
    waited: Option<u64>,
    heard: Instant,
    asked_alive: bool,
}

impl<'b> Session<'b> {
    /// One connection, from its first byte to its last.
    async fn run(me: usize, book: &'b Shared, dice: &'b mut Dice) -> Result<core::convert::Infallible, Ended> {
        let nodes = lock(book).nodes;
        let port = if nodes > 1 { PORT + dice.below(nodes.into()) as u16 } else { PORT };
        let dialled = timeout(TIMEOUT, TcpStream::connect(("server", port))).await;
        let stream = dialled.map_err(|_| Ended::Broken("not connected in time"))?;
        let stream = stream.map_err(|_| Ended::Broken("not connected"))?;
        let (channel, record_limit, puzzle) = {
            let mut book = lock(book);
            let home = &mut book.homes[me];
            let channel = home.channel.clone().filter(|_| home.enrolled && home.breaks < 2);
            (channel, home.record_limit, home.puzzle.take())
        };
        let mut random = [0; 64];
        dice.fill(&mut random);
        let config = ClientConfig { server: Some(SERVER.fingerprint()), ask_for_key: false, record_limit };
        let offers = channel.is_some();
        let mut connection = match channel {
            Some(channel) => Connection::resume(config, channel, &random)?,
            None => Connection::client(config, &random),
        };
        if let Some(puzzle) = puzzle {
            connection.present(&puzzle)?;
            while connection.solve() {}
        }
        if offers {
            lock(book).homes[me].breaks += 1;
        }
        let now = Instant::now();
        let mut session = Self {
            me,
            book,
            dice,
            stream,
            connection,
            rx: Vec::new(),
            tx: Vec::new(),
            next: 0,
            asked: BTreeMap::new(),
            request: 0,
            retry: now,
            waited: None,
            heard: now,
            asked_alive: false,
        };
        let entered = timeout(Duration::from_secs(6), session.enter()).await;
        if let Ok(Err(_)) = &entered {
            lock(book).homes[me].puzzle = session.connection.puzzle();
        }
        entered.map_err(|_| Ended::Broken("not entered in time"))??;
        session.serve().await
    }

    /// The handshake.
    async fn enter(&mut self) -> Result<(), Ended> {
        let (id, enrolled) = {
            let book = lock(self.book);
            (book.homes[self.me].id, book.homes[self.me].enrolled)
        };
        let key = &KEYS[self.me];
        let credentials = if enrolled {
            Credentials::Key { id, key_epoch: 0, fingerprint: key.fingerprint() }
        } else {
            Credentials::Enroll { id, name: NAMES[self.me], key: public(key), token: None }
        };
        let mut out = [0; 2048];
        let len = self.connection.transmit(&mut out)?;
        self.write(&out[..len]).await?;
        loop {
            let used = match self.connection.receive(&mut self.rx)? {
                Received::Need(_) => {
                    self.read().await?;
                    continue;
                }
                Received::Wait => {
                    let len = self.connection.transmit(&mut out)?;
                    assert!(len > 0, "there is something to do");
                    self.write(&out[..len]).await?;
                    continue;
                }
                Received::Record { used, event: Event::Progress } => {
                    self.rx.drain(..used);
                    continue;
                }
                Received::Record { used, event: Event::CheckServer(claim) } => {
                    assert!(verify(SERVER.modulus(), &claim.statement, claim.signature), "the pinned server");
                    used
                }
                Received::Record { used, event: Event::Connected(settings) } => {
                    self.rx.drain(..used);
                    let resumed = self.connection.is_resumed();
                    let mut book = lock(self.book);
                    let home = &mut book.homes[self.me];
                    home.enrolled = true;
                    home.breaks = 0;
                    match self.connection.take_channel() {
                        None if resumed => {}
                        issued => home.channel = issued,
                    }
                    book.reach(if resumed { "resumed" } else { "entered in full" });
                    book.note(self.me, format_args!("is connected, resumed {resumed}, {} wait", settings.waiting));
                    self.heard = Instant::now();
                    return Ok(());
                }
                Received::Record { .. } => panic!("no event of a handshake"),
            };
            self.rx.drain(..used);
            self.connection.verified(&credentials)?;
            let Some(Ask::Sign(statement)) = self.connection.ask() else { panic!("the client must sign") };
            let signature = key.sign(&statement).expect("the key signs");
            let len = self.connection.sign_client(&credentials, &signature, &mut out)?;
            self.write(&out[..len]).await?;
        }
    }

    async fn serve(&mut self) -> Result<core::convert::Infallible, Ended> {
        let listens = self.dice.chance(85);
        // So long it stays, and so long it does not read at a time.
        let stays = self.dice.chance(50).then(|| Instant::now() + self.dice.millis(50, 4000));
        let lazy = if self.dice.chance(25) { self.dice.millis(50, 600) } else { Duration::ZERO };
        let mut listening = false;
        loop {
            let (calm, finish) = {
                let book = lock(self.book);
                (book.calm, book.finish)
            };
            if !listening && (listens || calm) {
                listening = true;
                self.say(&Message::Listening)?;
            }
            self.do_something()?;
            if finish || (!calm && stays.is_some_and(|until| until <= Instant::now())) {
                return Err(self.leave(finish).await?);
            }
            self.flush().await?;
            if !calm && !lazy.is_zero() {
                sleep(lazy).await;
            }
            let silence = Instant::now() - self.heard;
            if silence >= TIMEOUT {
                return Err(Ended::Broken("the server is silent"));
            }
            if silence >= HEARTBEAT && !core::mem::replace(&mut self.asked_alive, true) {
                self.say(&Message::Status { request: 1 })?;
                continue;
            }
            let mut bytes = [0; 1500];
            tokio::select! {
                biased;
                read = self.stream.read(&mut bytes) => match read {
                    Ok(0) | Err(_) => return Err(Ended::Broken("the connection broke")),
                    Ok(len) => {
                        self.rx.extend_from_slice(&bytes[..len]);
                        self.open()?;
                    }
                },
                () = sleep_until(Instant::now() + LOOK) => {}
            }
        }
    }

    /// Hangs up, in one way or another.
    async fn leave(&mut self, politely: bool) -> Result<Ended, Ended> {
        let way = if politely { 0 } else { self.dice.below(4) };
        if way == 0 {
            let mut out = [0; 64];
            let len = self.connection.close(None, &mut out)?;
            self.tx.extend_from_slice(&out[..len]);
            self.flush().await?;
            // The server says its last, or not.
            let _ = timeout(Duration::from_secs(1), async { while self.read().await.is_ok() {} }).await;
            return Ok(Ended::Willing("it closed"));
        }
        if way == 1 {
            return Ok(Ended::Willing("it hung up"));
        }
        // In the middle of a record.
        self.say(&Message::Status { request: 2 })?;
        let keep = self.dice.below(self.tx.len());
        self.tx.truncate(keep);
        self.flush().await?;
        Ok(Ended::Willing("it hung up in the middle of a record"))
    }

    /// Wraps what must be wrapped, sends what can be sent.
    fn do_something(&mut self) -> Result<(), Ended> {
        let mut out = Vec::new();
        {
            let mut book = lock(self.book);
            let home = &mut book.homes[self.me];
            if self.retry <= Instant::now() {
                for (to, chain) in home.chains.iter().filter(|(_, chain)| !chain.wrapped) {
                    if !self.asked.values().any(|asked| asked == to) {
                        self.request += 1;
                        self.asked.insert(self.request, *to);
                        out.push((self.request, *to, chain.id));
                    }
                }
            }
        }
        for (request, to, chain) in out {
            let mut wrap = [0xdd; WRAP_LEN];
            wrap[16..24].copy_from_slice(&chain);
            let bundle = bundle(self.me);
            let bundle = SignedBundle { bundle: &bundle, signature: &[1; 256] };
            self.say(&Message::Wrap { request, to: [to as u8 + 1; 16], wrap: &wrap, bundle })?;
        }
        loop {
            let (wanted, envelope) = {
                let mut book = lock(self.book);
                let (now, repeats) = (book.now, book.calm && book.unread);
                let home = &mut book.homes[self.me];
                let is_late =
                    |letter: &Letter| !letter.is_settled() && letter.left.is_some_and(|(_, last)| last + REPEAT < now);
                if repeats && home.letters.iter().take(self.next).any(is_late) {
                    self.next = 0;
                }
                let Some(letter) = home.letters.get_mut(self.next) else { break };
                if !home.chains[&letter.to].wrapped {
                    break;
                }
                self.next += 1;
                if letter.is_settled() {
                    continue;
                }
                letter.left = Some((letter.left.map_or(now, |(first, _)| first), now));
                let (envelope, wanted, n, to) = (seal(letter), letter.wanted, letter.n, letter.to);
                book.note(self.me, format_args!("sends {n} to {to}"));
                (wanted, envelope)
            };
            self.say(&Message::Send { wanted, envelope: &envelope })?;
        }
        Ok(())
    }

    /// Opens what has come.
    fn open(&mut self) -> Result<(), Ended> {
        let mut rx = core::mem::take(&mut self.rx);
        let mut at = 0;
        loop {
            match self.connection.receive(&mut rx[at..])? {
                Received::Need(_) | Received::Wait => break,
                Received::Record { used, event } => {
                    at += used;
                    match event {
                        Event::Progress => {}
                        Event::Message(payload) => {
                            let payload = payload.to_vec();
                            self.handle(&payload)?;
                        }
                        Event::Closed(reason) => return Err(Ended::Closed(reason)),
                        _ => panic!("no event of a connected client"),
                    }
                }
            }
        }
        rx.drain(..at);
        self.rx = rx;
        self.heard = Instant::now();
        self.asked_alive = false;
        Ok(())
    }

    fn handle(&mut self, payload: &[u8]) -> Result<(), Ended> {
        let message = Message::decode(payload)?;
        if let Message::Waited { seq, .. } = message {
            assert!(self.waited.replace(seq).is_none(), "something stands between two announcements");
            return Ok(());
        }
        match message {
            Message::Deliver { wanted, envelope } => {
                EnvelopeHeader::decode(envelope)?;
                let receipts = lock(self.book).deliver(self.me, envelope, wanted, self.waited.is_some());
                for receipt in receipts {
                    self.say(&Message::Tell(receipt))?;
                }
            }
            Message::WrapDelivery { from, wrap, .. } => {
                let chain = WrapHeader::decode(wrap)?.chain_id;
                let mut book = lock(self.book);
                if place(&from) + 1 != usize::from(chain[0]) {
                    book.fail(format_args!("the wrap of {chain:?} came from {}", place(&from)));
                }
                book.wrap(self.me, chain);
            }
            Message::Told(receipt) => lock(self.book).told(self.me, &receipt),
            Message::Status { request } => self.say(&Message::StatusResponse { request })?,
            Message::StatusResponse { .. } | Message::Settings(_) => {}
            Message::Done { request } => {
                let to = self.asked.remove(&request).expect("it was asked");
                let mut book = lock(self.book);
                book.homes[self.me].chains.get_mut(&to).expect("a chain").wrapped = true;
                book.note(self.me, format_args!("has wrapped its chain to {to}"));
            }
            // A receipt or a message that the server could not look up.
            Message::Refused { request: 0, reason: Reason::Unavailable, .. } => {
                lock(self.book).reach("a record was refused")
            }
            Message::Refused { request, reason, .. } => {
                let to = self.asked.remove(&request).expect("it was asked");
                let mut book = lock(self.book);
                book.note(self.me, format_args!("cannot wrap its chain to {to}: {reason}"));
                book.reach(format_args!("wrap refused: {reason}"));
                if !matches!(reason, Reason::Unknown | Reason::Unavailable | Reason::QueueFull) {
                    book.fail(format_args!("the wrap of {} to {to} was refused: {reason}", self.me));
                }
                self.retry = Instant::now() + Duration::from_millis(300);
            }
            other => panic!("a server does not say {other:?}"),
        }
        if let Some(seq) =
            self.waited.take_if(|_| !matches!(message, Message::Status { .. } | Message::StatusResponse { .. }))
        {
            self.say(&Message::Acknowledge { seq })?;
        }
        Ok(())
    }

    fn say(&mut self, message: &Message<'_>) -> Result<(), Ended> {
        let mut out = [0; 4096];
        let len = self.connection.send(message, &mut out)?;
        self.tx.extend_from_slice(&out[..len]);
        Ok(())
    }

    /// Writes what was said, now and then in two pieces.
    async fn flush(&mut self) -> Result<(), Ended> {
        let bytes = core::mem::take(&mut self.tx);
        let cut = if bytes.len() > 1 && self.dice.chance(20) { self.dice.below(bytes.len()) } else { bytes.len() };
        self.write(&bytes[..cut]).await?;
        self.write(&bytes[cut..]).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        match timeout(TIMEOUT, self.stream.write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Ended::Broken("the connection broke")),
            Err(_) => Err(Ended::Broken("the server does not read")),
        }
    }

    async fn read(&mut self) -> Result<(), Ended> {
        let mut bytes = [0; 1500];
        match self.stream.read(&mut bytes).await {
            Ok(0) | Err(_) => Err(Ended::Broken("the connection broke")),
            Ok(len) => {
                self.rx.extend_from_slice(&bytes[..len]);
                Ok(())
            }
        }
    }
}

/// A bundle that nobody verifies.
fn bundle(of: usize) -> Vec<u8> {
    let bundle = Bundle {
        id: [of as u8 + 1; 16],
        key: [1; 32],
        epoch: 1,
        exchange: [9; 32],
        prekey: [9; 32],
        prekey_id: 1,
        verifying: [9; 32],
        previous: [0; 32],
    };
    bundle.encode().to_vec()
}
