//! A client of our own: core's engine with aws-lc's AES, and real chains, end to end.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use getrandom::SysRng;
use ossicle::crypto::{HostAead, verify};
use ossicle_core::{
    Ask, Bundle, Channel, ClientConfig, Connection, Conversation, Credentials, ENVELOPE_OVERHEAD, Event, MAX_MESSAGES,
    MAX_RECORD_LEN, Message, PublicKey, RECORD_OVERHEAD, Reason, Receipt, Received, ReceivingChain, Rung, Rungs,
    SIGNED_OVERHEAD, SealError, SendingChain, SignedBundle, WRAP_LEN,
};

use super::{Heard, NotDone};
use crate::Failure;
use crate::people::{Person, text};
use crate::server::Server;

/// Code and wanted receipts before an envelope.
const SEND_HEAD_LEN: usize = 3;
/// Room for a key update, which may come before any record.
const UPDATE_ROOM: usize = 64;
/// Skipped messages that a host can still open.
const SKIP: usize = 256;

pub(crate) struct Ossicle {
    connection: Connection<HostAead>,
    me: Arc<Person>,
    wanted: Rungs,
    /// Where it writes. What it says goes into each of them.
    sending: Vec<Sending>,
    memory: Memory,
    /// The number of what comes next, where that has waited; and of what came last.
    waited: Option<u64>,
    taken: Option<u64>,
    /// What came and is not opened yet, where that can wait.
    unopened: Option<Vec<Unopened>>,
    /// What came beside messages, where somebody asks for it.
    overheard: Option<VecDeque<Vec<u8>>>,
}

/// Its own chain in one conversation.
struct Sending {
    conversation: Conversation,
    to: Vec<Arc<Person>>,
    chain: Option<SendingChain>,
    /// That of the next chain.
    epoch: u32,
    /// What is sealed end to end already.
    ahead: Ahead,
}

/// Envelopes of one length, sealed before they are sent.
#[derive(Default)]
struct Ahead {
    envelopes: Vec<u8>,
    /// Bytes of one of them.
    len: usize,
    /// How many were sent.
    sent: usize,
    /// Chains that begin with the envelope of this number.
    wraps: VecDeque<(usize, Wraps)>,
}

/// The wraps of one chain, in the order of those whom they are for.
type Wraps = Vec<[u8; WRAP_LEN]>;

impl Ahead {
    fn is_left(&self) -> bool {
        self.sent * self.len < self.envelopes.len()
    }

    /// The chain that begins with the next one, once.
    fn begin(&mut self) -> Option<Wraps> {
        let begins = self.wraps.front().is_some_and(|(first, _)| *first == self.sent);
        if begins { self.wraps.pop_front().map(|(_, wraps)| wraps) } else { None }
    }

    /// The next one, and the chain that begins with it.
    fn next(&mut self) -> Option<(Option<Wraps>, &[u8])> {
        if !self.is_left() {
            return None;
        }
        let wraps = self.begin();
        let start = self.sent * self.len;
        self.sent += 1;
        Some((wraps, self.envelopes.get(start..start + self.len)?))
    }
}

/// A chain that came and is not accepted yet, if there is one, and the envelopes that came behind it, each with its length.
#[derive(Default)]
struct Unopened {
    wrap: Option<(Vec<u8>, Vec<u8>)>,
    lens: Vec<usize>,
    envelopes: Vec<u8>,
}

/// What a client knows of those who write to it, beyond its connection.
#[derive(Default)]
pub struct Memory {
    /// Who writes, and where.
    from: Option<(Arc<Person>, Conversation)>,
    receiving: Option<Box<ReceivingChain<SKIP>>>,
}

impl Sending {
    const fn new(conversation: Conversation, to: Vec<Arc<Person>>) -> Self {
        let ahead = Ahead { envelopes: Vec::new(), len: 0, sent: 0, wraps: VecDeque::new() };
        Self { conversation, to, chain: None, epoch: 0, ahead }
    }

    /// Bytes of the envelope of a message.
    const fn envelope_len(&self, body: &[u8]) -> usize {
        body.len() + if self.conversation.signed { SIGNED_OVERHEAD } else { ENVELOPE_OVERHEAD }
    }

    fn next_chain(&mut self, me: &Person) -> Result<Wraps, Failure> {
        let chain = SendingChain::start(&me.member(), &self.conversation, self.epoch, &mut SysRng).map_err(text)?;
        self.epoch += 1;
        let wrap = |to: &Arc<Person>| {
            let mut wrap = [0; WRAP_LEN];
            chain.wrap(&me.keys, &me.bundle, &to.member(), &to.bundle, &mut SysRng, &mut wrap).map_err(text)?;
            Ok(wrap)
        };
        let wraps = self.to.iter().map(wrap).collect::<Result<_, Failure>>()?;
        self.chain = Some(chain);
        Ok(wraps)
    }

    fn is_used_up(&self) -> bool {
        self.chain.as_ref().is_none_or(|chain| chain.next() >= MAX_MESSAGES)
    }

    fn seal(&mut self, body: &[u8], envelope: &mut [u8]) -> Result<(), SealError> {
        let signed = self.conversation.signed;
        let chain = self.chain.as_mut().ok_or(SealError::Exhausted)?;
        chain.seal::<HostAead>(signed, 0, body, envelope).map(drop)
    }

    fn seal_ahead(&mut self, me: &Person, body: &[u8], count: usize) -> Result<(), Failure> {
        let len = self.envelope_len(body);
        let mut ahead = Ahead { envelopes: vec![0; len * count], len, ..Ahead::default() };
        for (number, envelope) in ahead.envelopes.chunks_exact_mut(len).enumerate() {
            if number == 0 || self.is_used_up() {
                ahead.wraps.push_back((number, self.next_chain(me)?));
            }
            self.seal(body, envelope).map_err(text)?;
        }
        self.ahead = ahead;
        Ok(())
    }
}

impl Ossicle {
    /// First contact.
    pub(super) fn enrol(stream: &TcpStream, server: &Server, person: &Arc<Person>) -> Result<(Self, Vec<u8>), Failure> {
        let name = person.name();
        let key = PublicKey::from_modulus(person.key.modulus()).map_err(text)?;
        let credentials = Credentials::Enroll { id: person.id, name: &name, key, token: None };
        Self::authenticate(stream, server, person, &credentials, None, Rungs::NONE)
    }

    /// A connection of somebody who was enrolled. Returned with it is what was received beyond the handshake.
    pub(super) fn enter(
        stream: &TcpStream,
        server: &Server,
        person: &Arc<Person>,
        channel: Option<Channel>,
        stores: bool,
    ) -> Result<(Self, Vec<u8>), Failure> {
        let credentials = Credentials::Key { id: person.id, key_epoch: 0, fingerprint: person.key.fingerprint() };
        let wanted = if stores { Rungs::NONE.with(Rung::Stored) } else { Rungs::NONE };
        Self::authenticate(stream, server, person, &credentials, channel, wanted)
    }

    fn authenticate(
        mut stream: &TcpStream,
        server: &Server,
        person: &Arc<Person>,
        credentials: &Credentials<'_>,
        channel: Option<Channel>,
        wanted: Rungs,
    ) -> Result<(Self, Vec<u8>), Failure> {
        let known = server.key.get();
        let record_limit = u16::try_from(MAX_RECORD_LEN)?;
        let config = ClientConfig { server: Some(server.fingerprint), ask_for_key: known.is_none(), record_limit };
        let mut seed = [0; 64];
        getrandom::fill(&mut seed)?;
        let mut connection: Connection<HostAead> = match channel {
            Some(channel) => Connection::resume(config, channel, &seed).map_err(text)?,
            None => Connection::client(config, &seed),
        };
        let (mut rx, mut out) = (Vec::new(), vec![0; 4096]);
        loop {
            let mut len = connection.transmit(&mut out).map_err(text)?;
            if let Some(Ask::Sign(statement)) = connection.ask() {
                let signature = person.key.sign(&statement)?;
                len += connection.sign_client(credentials, &signature, &mut out[len..]).map_err(text)?;
            }
            stream.write_all(&out[..len])?;
            match connection.receive(&mut rx).map_err(text)? {
                Received::Record { used, event } => {
                    let entered = match event {
                        Event::CheckServer(claim) => {
                            let modulus = match claim.key {
                                Some(key) => server.key.get_or_init(|| key.modulus().to_vec()),
                                None => known.ok_or("the server shows its key")?,
                            };
                            if !verify(modulus, &claim.statement, claim.signature) {
                                return Err("another server".into());
                            }
                            connection.verified(credentials).map_err(text)?;
                            false
                        }
                        Event::Connected(_) => true,
                        _ => false,
                    };
                    rx.drain(..used);
                    if entered {
                        break;
                    }
                }
                _ => {
                    let mut bytes = [0; 4096];
                    match stream.read(&mut bytes)? {
                        0 => return Err("the server has closed in the handshake".into()),
                        len => rx.extend_from_slice(&bytes[..len]),
                    }
                }
            }
        }
        let entered = Self {
            connection,
            me: Arc::clone(person),
            wanted,
            sending: Vec::new(),
            memory: Memory::default(),
            waited: None,
            taken: None,
            unopened: None,
            overheard: None,
        };
        Ok((entered, rx))
    }

    pub(crate) fn person(&self) -> Arc<Person> {
        Arc::clone(&self.me)
    }

    pub(super) fn remember(&mut self, memory: Memory) {
        self.memory = memory;
    }

    pub(super) fn memory(&mut self) -> Memory {
        core::mem::take(&mut self.memory)
    }

    pub(super) const fn has_resumed(&self) -> bool {
        self.connection.is_resumed()
    }

    pub(super) const fn take_channel(&mut self) -> Option<Channel> {
        self.connection.take_channel()
    }

    pub(super) fn publish_bundle(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let me = Arc::clone(&self.me);
        let (bundle, signature) = (me.bundle.encode(), &me.signature);
        self.say(&Message::Publish { request: 1, bundle: SignedBundle { bundle: &bundle, signature } }, out)
    }

    /// Ends with an answer, as the requests of the others.
    pub(super) fn listen(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.say(&Message::Listening, out)?;
        self.sync(out)
    }

    pub(super) fn sync(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.say(&Message::Status { request: 1 }, out)
    }

    /// The conversation with this one alone.
    pub(super) fn direct(&self, other: &Person) -> Conversation {
        Conversation::direct(&self.me.member(), &other.member(), 0)
    }

    pub(crate) fn hear_from(&mut self, person: Arc<Person>, conversation: Conversation) {
        self.memory.from = Some((person, conversation));
    }

    /// From now on it writes in this conversation. In several groups it writes at a time, to one person alone only to him.
    pub(crate) fn write_in(&mut self, conversation: Conversation, to: Vec<Arc<Person>>) {
        self.sending.retain(|held| held.conversation.signed && conversation.signed);
        self.sending.push(Sending::new(conversation, to));
    }

    /// A chain takes 65,536 messages; then the next one begins.
    pub(super) fn start_chain(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let Self { connection, me, sending, .. } = self;
        let sending = sending.last_mut().ok_or("nobody to write to")?;
        let wraps = sending.next_chain(me)?;
        say_wraps(connection, me, &sending.to, &wraps, out)
    }

    /// Seals so many messages end to end, to be sent later.
    pub(super) fn seal_ahead(&mut self, body: &[u8], count: usize) -> Result<(), Failure> {
        self.sending.iter_mut().try_for_each(|sending| sending.seal_ahead(&self.me, body, count))
    }

    /// Announces the first chains that were sealed ahead in. How many wraps that takes.
    pub(super) fn announce(&mut self, out: &mut Vec<u8>) -> Result<u64, Failure> {
        let Self { connection, me, sending, .. } = self;
        let mut count = 0;
        for Sending { to, ahead, .. } in sending {
            if let Some(wraps) = ahead.begin() {
                say_wraps(connection, me, to, &wraps, out)?;
                count += wraps.len() as u64;
            }
        }
        Ok(count)
    }

    /// From now on what comes is kept, to be opened later.
    pub(crate) fn open_later(&mut self) {
        self.unopened = Some(vec![Unopened::default()]);
    }

    /// Opens what was kept, and forgets what was sealed ahead and not sent.
    pub(super) fn settle(&mut self) -> Result<(), Failure> {
        for sending in &mut self.sending {
            if core::mem::take(&mut sending.ahead).is_left() {
                // The other side would miss what is sealed and not sent.
                sending.chain = None;
            }
        }
        for Unopened { wrap, lens, mut envelopes } in self.unopened.take().into_iter().flatten() {
            if let Some((mut wrap, bundle)) = wrap {
                self.accept(&mut wrap, &bundle)?;
            }
            let mut rest = &mut envelopes[..];
            for len in lens {
                let (envelope, behind) = rest.split_at_mut(len);
                rest = behind;
                self.open(envelope)?;
            }
        }
        Ok(())
    }

    fn accept(&mut self, wrap: &mut [u8], bundle: &[u8]) -> Result<(), Failure> {
        let (from, conversation) = self.memory.from.as_ref().ok_or("a chain of a stranger")?;
        let bundle = Bundle::decode(bundle).map_err(text)?;
        let chain = ReceivingChain::accept(wrap, &self.me.prekey, &from.member(), &bundle, conversation, None);
        self.memory.receiving = Some(Box::new(chain.map_err(text)?));
        Ok(())
    }

    fn open(&mut self, envelope: &mut [u8]) -> Result<(), Failure> {
        let chain = self.memory.receiving.as_mut().ok_or("a message without a chain")?;
        chain.open::<HostAead>(envelope).map_err(text)?;
        Ok(())
    }

    pub(super) fn send(&mut self, body: &[u8], count: usize, out: &mut Vec<u8>) -> Result<(), Failure> {
        let Self { connection, me, wanted, sending, .. } = self;
        if sending.is_empty() {
            return Err("nobody to write to".into());
        }
        for sending in sending {
            for _ in 0..count {
                if let Some((wraps, sealed)) = sending.ahead.next() {
                    if let Some(wraps) = wraps {
                        say_wraps(connection, me, &sending.to, &wraps, out)?;
                    }
                    put(connection, *wanted, sealed.len(), out, |envelope| {
                        envelope[..sealed.len()].copy_from_slice(sealed);
                        Ok(())
                    })?;
                    continue;
                }
                if sending.is_used_up() {
                    let wraps = sending.next_chain(me)?;
                    say_wraps(connection, me, &sending.to, &wraps, out)?;
                }
                let len = sending.envelope_len(body);
                put(connection, *wanted, len, out, |envelope| sending.seal(body, envelope))?;
            }
        }
        Ok(())
    }

    /// From now on what comes beside messages is kept for who asks.
    pub(crate) fn overhear(&mut self) {
        self.overheard.get_or_insert_default();
    }

    /// What came beside messages, in order.
    pub(super) fn overheard(&mut self) -> Option<Vec<u8>> {
        self.overheard.as_mut()?.pop_front()
    }

    pub(super) fn receive(&mut self, data: &mut [u8], out: &mut Vec<u8>, heard: &mut Heard) -> Result<usize, Failure> {
        let mut used = 0;
        loop {
            let Received::Record { used: len, event } = self.connection.receive(&mut data[used..]).map_err(text)?
            else {
                // All that came together is acknowledged together.
                if let Some(seq) = self.taken.take() {
                    self.say(&Message::Acknowledge { seq }, out)?;
                }
                return Ok(used);
            };
            used += len;
            let payload = match event {
                Event::Message(payload) => payload,
                Event::Closed(reason) => return Err(format!("the server has closed: {reason:?}").into()),
                _ => continue,
            };
            let waited = self.waited.take();
            let answer = match Message::decode(payload).map_err(text)? {
                Message::Waited { seq, .. } => {
                    self.waited = Some(seq);
                    continue;
                }
                Message::Deliver { envelope, .. } => {
                    let start = payload.len() - envelope.len();
                    match self.unopened.as_mut().and_then(|unopened| unopened.last_mut()) {
                        Some(unopened) => {
                            unopened.lens.push(envelope.len());
                            unopened.envelopes.extend_from_slice(envelope);
                        }
                        None => self.open(&mut payload[start..])?,
                    }
                    heard.messages += 1;
                    None
                }
                Message::WrapDelivery { wrap, bundle, .. } => {
                    match &mut self.unopened {
                        Some(unopened) => {
                            let wrap = Some((wrap.to_vec(), bundle.bundle.to_vec()));
                            unopened.push(Unopened { wrap, ..Unopened::default() });
                        }
                        None => self.accept(&mut wrap.to_vec(), bundle.bundle)?,
                    }
                    heard.done += 1;
                    None
                }
                Message::Told(receipt) if receipt.rung == Rung::Stored => {
                    heard.stored += u64::from(receipt.to - receipt.from) + 1;
                    None
                }
                Message::Status { request } => Some(Message::StatusResponse { request }),
                Message::Done { .. } | Message::StatusResponse { .. } => {
                    heard.done += 1;
                    None
                }
                Message::Settings(_) => None,
                Message::Told(Receipt { reason: Some(Reason::Offline), .. })
                | Message::Refused { reason: Reason::Offline, .. } => return Err(NotDone.into()),
                Message::LookupResponse { .. } | Message::Other { .. } if let Some(overheard) = &mut self.overheard => {
                    overheard.push_back(payload.to_vec());
                    None
                }
                other => return Err(format!("the server said {other:?}").into()),
            };
            self.taken = waited.or(self.taken);
            if let Some(answer) = answer {
                self.say(&answer, out)?;
            }
        }
    }

    pub(super) fn close(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.append(out, |connection, room| connection.close(None, room))
    }

    pub(super) fn say(&mut self, message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), Failure> {
        say(&mut self.connection, message, out)
    }

    fn append(
        &mut self,
        out: &mut Vec<u8>,
        seal: impl FnOnce(&mut Connection<HostAead>, &mut [u8]) -> Result<usize, ossicle_core::Error>,
    ) -> Result<(), Failure> {
        append(&mut self.connection, out, seal)
    }
}

fn say_wraps(
    connection: &mut Connection<HostAead>,
    me: &Person,
    to: &[Arc<Person>],
    wraps: &Wraps,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    let (bundle, signature) = (me.bundle.encode(), &me.signature);
    let bundle = SignedBundle { bundle: &bundle, signature };
    for (to, wrap) in to.iter().zip(wraps) {
        say(connection, &Message::Wrap { request: 2, to: to.id, wrap, bundle }, out)?;
    }
    Ok(())
}

/// Seals one record with an envelope of this length.
fn put(
    connection: &mut Connection<HostAead>,
    wanted: Rungs,
    len: usize,
    out: &mut Vec<u8>,
    seal: impl FnOnce(&mut [u8]) -> Result<(), SealError>,
) -> Result<(), Failure> {
    let start = out.len();
    out.resize(start + len + SEND_HEAD_LEN + RECORD_OVERHEAD + UPDATE_ROOM, 0);
    let sealed = connection.send_sealed(wanted, len, &mut out[start..], seal);
    out.truncate(start + sealed.map_err(|error: SealError| text(error))?);
    Ok(())
}

fn say(connection: &mut Connection<HostAead>, message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), Failure> {
    append(connection, out, |connection, room| connection.send(message, room))
}

fn append(
    connection: &mut Connection<HostAead>,
    out: &mut Vec<u8>,
    seal: impl FnOnce(&mut Connection<HostAead>, &mut [u8]) -> Result<usize, ossicle_core::Error>,
) -> Result<(), Failure> {
    let start = out.len();
    out.resize(start + MAX_RECORD_LEN, 0);
    let len = seal(connection, &mut out[start..]).map_err(text)?;
    out.truncate(start + len);
    Ok(())
}
