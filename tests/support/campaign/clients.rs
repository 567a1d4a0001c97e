//! Clients that are no more than core's engine over a socket. Their envelopes are filler that says what it is: a server
//! reads no more of one than chain and number.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::collections::HashSet;
use std::sync::Arc;
use std::thread;

use fastrand::Rng;
use ossicle::crypto::{HostAead, IdentityKey, verify};
use ossicle_core::{
    Ask, Channel, ClientConfig, Connection, Credentials, EnvelopeHeader, Event, Message, Reason, Receipt, Received,
    Rung, Rungs, WRAP_LEN,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::{Body, Book, ENVELOPE_HEAD, Pair, Sent, chain, recipient_id, sender_id};
use crate::node::{Published, RECORD_LIMIT, enrolled_as};
use crate::public;

/// Messages of a pair that may be on their way without a receipt.
const WINDOW: usize = 400;
/// What a sender says of a server that cannot store anything.
const UNAVAILABLE: &str = "unavailable";

/// Somebody with an id and a key.
pub(super) struct Person {
    id: [u8; 16],
    key: IdentityKey,
}

impl Person {
    /// So many senders, then so many recipients.
    pub(super) fn all(senders: usize, recipients: usize) -> Vec<Self> {
        let ids: Vec<_> = (0..senders).map(sender_id).chain((0..recipients).map(recipient_id)).collect();
        let make = |id| thread::spawn(move || Self { id, key: IdentityKey::generate(2048).expect("a key") });
        let making: Vec<_> = ids.into_iter().map(make).collect();
        making.into_iter().map(|person| person.join().expect("a key is made")).collect()
    }
}

/// Why a connection goes no further.
type Gone = String;

/// First contact.
pub(super) async fn enrol(book: &Book, person: &Person) -> Result<(), Gone> {
    let name = format!("client-{:02x}", person.id[0]);
    let credentials = Credentials::Enroll { id: person.id, name: &name, key: public(&person.key), token: None };
    Wire::enter(book, person, &credentials, None).await.map(drop)
}

/// A connection.
struct Wire {
    stream: TcpStream,
    connection: Connection<HostAead>,
    /// Received, and how much of it was opened.
    rx: Vec<u8>,
    used: usize,
    out: Vec<u8>,
}

impl Wire {
    async fn enter(
        book: &Book,
        person: &Person,
        credentials: &Credentials<'_>,
        channel: Option<Channel>,
    ) -> Result<Self, Gone> {
        let stream = TcpStream::connect(book.address).await.map_err(text)?;
        stream.set_nodelay(true).map_err(text)?;
        let config = ClientConfig { server: Some(book.fingerprint), ask_for_key: true, record_limit: RECORD_LIMIT };
        let mut seed = [0; 64];
        getrandom::fill(&mut seed).map_err(text)?;
        let connection = match channel {
            Some(channel) => Connection::resume(config, channel, &seed).map_err(text)?,
            None => Connection::client(config, &seed),
        };
        let mut wire = Self { stream, connection, rx: Vec::new(), used: 0, out: Vec::new() };
        let mut out = vec![0; 4096];
        loop {
            let mut len = wire.connection.transmit(&mut out).map_err(text)?;
            if let Some(Ask::Sign(statement)) = wire.connection.ask() {
                let signature = person.key.sign(&statement).map_err(text)?;
                len += wire.connection.sign_client(credentials, &signature, &mut out[len..]).map_err(text)?;
            }
            wire.stream.write_all(&out[..len]).await.map_err(text)?;
            match wire.connection.receive(&mut wire.rx[wire.used..]).map_err(text)? {
                Received::Record { used, event } => {
                    let entered = matches!(event, Event::Connected(_));
                    if let Event::CheckServer(claim) = event {
                        let key = claim.key.ok_or("the server shows its key")?;
                        assert!(verify(key.modulus(), &claim.statement, claim.signature), "the server's signature");
                        wire.connection.verified(credentials).map_err(text)?;
                    }
                    wire.used += used;
                    if entered {
                        return Ok(wire);
                    }
                }
                _ => wire.read().await?,
            }
        }
    }

    /// Seals a message, to be written by the next [`Wire::flush`].
    fn say(&mut self, message: &Message<'_>) -> Result<(), Gone> {
        let start = self.out.len();
        self.out.resize(start + 8192, 0);
        let len = self.connection.send(message, &mut self.out[start..]).map_err(text)?;
        self.out.truncate(start + len);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await.map_err(text)?;
            self.out.clear();
        }
        Ok(())
    }

    /// Reads once. Cancel-safe.
    async fn read(&mut self) -> Result<(), Gone> {
        self.rx.drain(..core::mem::take(&mut self.used));
        self.rx.reserve(64 * 1024);
        match self.stream.read_buf(&mut self.rx).await.map_err(text)? {
            0 => Err("the server is gone".into()),
            _ => Ok(()),
        }
    }

    /// The next message of what was read. Signs of life are answered.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Gone> {
        loop {
            let payload = match self.connection.receive(&mut self.rx[self.used..]).map_err(text)? {
                Received::Record { used, event } => {
                    let payload = match event {
                        Event::Message(payload) => Some(payload.to_vec()),
                        Event::Closed(reason) => return Err(format!("the server has closed: {reason:?}")),
                        _ => None,
                    };
                    self.used += used;
                    payload
                }
                _ => return Ok(None),
            };
            let Some(payload) = payload else { continue };
            match Message::decode(&payload) {
                Ok(Message::Status { request }) => self.say(&Message::StatusResponse { request })?,
                Ok(Message::StatusResponse { .. } | Message::Settings(_)) => {}
                _ => return Ok(Some(payload)),
            }
        }
    }

    /// Says farewell, and waits until the server has said it, too, but not for long.
    async fn close(mut self) {
        let mut out = [0; 64];
        if let Ok(len) = self.connection.close(None, &mut out)
            && self.stream.write_all(&out[..len]).await.is_ok()
        {
            let rest = async { while self.read().await.is_ok() && self.next().is_ok() {} };
            let _ = timeout(Duration::from_secs(1), rest).await;
        }
    }
}

/// What somebody does while connected.
pub(super) enum Role {
    /// Sends to every recipient, and sends again what the server has not said that it has.
    Sender,
    /// Takes what comes, and acknowledges what is on record. The chains whose wrap it has.
    Recipient(HashSet<[u8; 8]>),
}

/// Connects whenever there is a server, and leaves now and then, until the task is aborted.
pub(super) async fn live(book: Arc<Book>, me: usize, person: Arc<Person>, mut role: Role, mut rng: Rng) {
    let bundle = Published::new(person.id[0], &person.key, 0);
    let mut channel = None;
    loop {
        if book.away && matches!(role, Role::Recipient(_)) && !book.is_ending() {
            sleep(Duration::from_millis(20)).await;
            continue;
        }
        book.is_up().await;
        let credentials = enrolled_as(person.id, &person.key);
        let offered = core::mem::take(&mut channel);
        let Ok(mut wire) = Wire::enter(&book, &person, &credentials, offered).await else {
            sleep(Duration::from_millis(5)).await;
            continue;
        };
        book.connected.fetch_add(1, Ordering::SeqCst);
        channel = wire.connection.take_channel().filter(|_| rng.u8(..8) > 0);
        let done = match &mut role {
            Role::Sender => send_all(&book, me, &bundle, &mut wire, &mut rng).await,
            Role::Recipient(chains) => take_all(&book, me, chains, &mut wire, &mut rng).await,
        };
        let left = done.is_ok();
        if left && rng.bool() {
            wire.close().await;
        }
        book.connected.fetch_sub(1, Ordering::SeqCst);
        if done.is_err_and(|gone| gone == UNAVAILABLE) {
            sleep(Duration::from_millis(50)).await;
        } else if left && !book.is_ending() {
            sleep(Duration::from_millis(rng.u64(..1500))).await;
        }
    }
}

async fn send_all(book: &Book, me: usize, bundle: &Published, wire: &mut Wire, rng: &mut Rng) -> Result<(), Gone> {
    for recipient in 0..book.recipients {
        let again = begin(&mut book.pair(me, recipient), rng);
        for generation in again.0 {
            let mut wrap = vec![0xdd; WRAP_LEN];
            wrap[16..24].copy_from_slice(&chain(me, recipient, generation));
            let to = recipient_id(recipient);
            wire.say(&Message::Wrap { request: 1, to, wrap: &wrap, bundle: bundle.signed() })?;
        }
        for sent in again.1 {
            send(wire, me, recipient, sent)?;
        }
    }
    let (begun, mut count) = (Instant::now(), 0.0);
    let leave = begun + Duration::from_millis(rng.u64(1000..20_000));
    let mut waited = None;
    loop {
        wire.flush().await?;
        if let Ok(read) = timeout(Duration::from_millis(2), wire.read()).await {
            read?;
        }
        while let Some(payload) = wire.next()? {
            match Message::decode(&payload) {
                Ok(Message::Waited { seq, .. }) => {
                    waited = Some(seq);
                    continue;
                }
                Ok(Message::Told(receipt)) => told(book, me, &receipt)?,
                Ok(Message::Done { .. }) => {}
                other => return Err(bad(book, format!("sender {me} hears {other:?}"))),
            }
            if let Some(seq) = waited.take() {
                wire.say(&Message::Acknowledge { seq })?;
            }
        }
        if book.is_ending() {
            continue;
        }
        if Instant::now() > leave {
            return Ok(());
        }
        let due = begun.elapsed().as_secs_f64() * book.rate;
        // What nobody had room for is not made up for.
        count = f64::max(count, due - book.rate);
        while count < due {
            count += 1.0;
            let recipient = rng.usize(..book.recipients);
            let next = next(&mut book.pair(me, recipient), book.backlog);
            if let Some(sent) = next {
                send(wire, me, recipient, sent)?;
            }
        }
    }
}

fn bad(book: &Book, what: String) -> Gone {
    book.fault(what.clone());
    what
}

/// The chains that the server is to know, and what is to be sent again.
fn begin(pair: &mut Pair, rng: &mut Rng) -> (Vec<u32>, Vec<Sent>) {
    let again: Vec<_> = pair.open.iter().copied().collect();
    let mut generations: Vec<_> = again.iter().map(|sent| sent.generation).collect();
    if rng.u8(..4) == 0 {
        (pair.generation, pair.n) = (pair.generation + 1, 0);
    }
    generations.push(pair.generation);
    generations.dedup();
    (generations, again)
}

fn next(pair: &mut Pair, backlog: u64) -> Option<Sent> {
    if pair.open.len() >= WINDOW || pair.next - pair.recorded >= backlog {
        return None;
    }
    let sent = Sent { number: pair.next, generation: pair.generation, n: pair.n };
    (pair.next, pair.n) = (pair.next + 1, pair.n + 1);
    pair.open.push_back(sent);
    Some(sent)
}

/// Now and then a sender wants to know that the recipient has it.
const fn wanted(number: u64) -> Rungs {
    let wanted = Rungs::NONE.with(Rung::Stored);
    if number.is_multiple_of(16) { wanted.with(Rung::Delivered) } else { wanted }
}

fn send(wire: &mut Wire, me: usize, recipient: usize, sent: Sent) -> Result<(), Gone> {
    let Sent { number, generation, n } = sent;
    let mut envelope = vec![0xee; ENVELOPE_HEAD];
    envelope[..8].copy_from_slice(&chain(me, recipient, generation));
    envelope[8..12].copy_from_slice(&n.to_be_bytes());
    envelope.extend(Body::encode(me, number));
    wire.say(&Message::Send { wanted: wanted(number), envelope: &envelope })
}

fn told(book: &Book, me: usize, receipt: &Receipt) -> Result<(), Gone> {
    match *receipt {
        Receipt { rung: Rung::Stored, chain, from, to, .. } => {
            book.stored(me, chain, from, to);
            Ok(())
        }
        Receipt { rung: Rung::Delivered, chain, tag: Some(tag), .. } => {
            let number = u64::from_be_bytes(*tag.first_chunk().expect("16 bytes"));
            let recipient = usize::from(chain[1]);
            let has = |pair: &Pair| number < pair.recorded || pair.ahead.contains(&number);
            if recipient >= book.recipients || !has(&book.pair(me, recipient)) {
                return Err(bad(book, format!("sender {me} is told that {recipient} has {number}")));
            }
            Ok(())
        }
        // A server that stops, or whose disk is full.
        Receipt { rung: Rung::Refused, reason: Some(Reason::Unavailable), .. } => {
            // What is told of the others of the same batch is not waited for.
            for recipient in 0..book.recipients {
                book.pair(me, recipient).refused = true;
            }
            Err(UNAVAILABLE.into())
        }
        _ => Err(bad(book, format!("sender {me} is told {receipt:?}"))),
    }
}

async fn take_all(
    book: &Book,
    me: usize,
    chains: &mut HashSet<[u8; 8]>,
    wire: &mut Wire,
    rng: &mut Rng,
) -> Result<(), Gone> {
    wire.say(&Message::Listening)?;
    wire.flush().await?;
    let leave = Instant::now() + Duration::from_millis(rng.u64(100..4000));
    // What was left unacknowledged comes again.
    let forgets = rng.bool();
    let (mut waited, mut done) = (None, None);
    loop {
        let read = timeout(Duration::from_millis(20), wire.read()).await;
        if let Ok(read) = read {
            read?;
        }
        let leaves = Instant::now() > leave && !book.is_ending();
        while let Some(payload) = wire.next()? {
            match Message::decode(&payload) {
                Ok(Message::Waited { seq, .. }) => {
                    if waited.replace(seq).is_some() {
                        return Err(bad(book, format!("recipient {me} is told twice what comes next")));
                    }
                    continue;
                }
                Ok(Message::WrapDelivery { wrap, .. }) => {
                    chains.extend(wrap[16..24].first_chunk::<8>());
                }
                Ok(Message::Deliver { wanted, envelope }) => {
                    let Ok(EnvelopeHeader { chain_id, n, .. }) = EnvelopeHeader::decode(envelope) else {
                        return Err(bad(book, format!("recipient {me} is given {envelope:02x?}")));
                    };
                    if !chains.contains(&chain_id) {
                        return Err(bad(book, format!("recipient {me} has no wrap of {chain_id:02x?} yet")));
                    }
                    let body = &envelope[ENVELOPE_HEAD..];
                    book.given(me, body, chain_id);
                    if let Some(Body { number, .. }) = Body::decode(body).filter(|_| wanted.contains(Rung::Delivered)) {
                        let mut tag = [0; 16];
                        tag[..8].copy_from_slice(&number.to_be_bytes());
                        let (rung, reason, tag) = (Rung::Delivered, None, Some(tag));
                        wire.say(&Message::Tell(Receipt { rung, reason, chain: chain_id, from: n, to: n, tag }))?;
                    }
                }
                other => return Err(bad(book, format!("recipient {me} hears {other:?}"))),
            }
            match waited.take() {
                Some(seq) => done = Some(seq),
                None => return Err(bad(book, format!("recipient {me} is given what is in no store"))),
            }
        }
        if leaves && forgets {
            return Ok(());
        }
        if let Some(seq) = done {
            wire.say(&Message::Acknowledge { seq })?;
        }
        wire.flush().await?;
        if leaves {
            return Ok(());
        }
    }
}

fn text(error: impl core::fmt::Display) -> Gone {
    error.to_string()
}
