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
    SealError, SendingChain, SignedBundle, WRAP_LEN,
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

pub(super) struct Ossicle {
    connection: Connection<HostAead>,
    me: Arc<Person>,
    wanted: Rungs,
    to: Option<Arc<Person>>,
    sending: Option<SendingChain>,
    chain_epoch: u32,
    memory: Memory,
    /// The number of what comes next, where that has waited; and of what came last.
    waited: Option<u64>,
    taken: Option<u64>,
    /// What is sealed end to end already.
    ahead: Ahead,
    /// What came and is not opened yet, where that can wait.
    unopened: Option<Vec<Unopened>>,
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
    wraps: VecDeque<(usize, Wrap)>,
}

type Wrap = Box<[u8; WRAP_LEN]>;

impl Ahead {
    fn is_left(&self) -> bool {
        self.sent * self.len < self.envelopes.len()
    }

    /// The next one, and the chain that begins with it.
    fn next(&mut self) -> Option<(Option<Wrap>, &[u8])> {
        let envelope = self.envelopes.get(self.sent * self.len..)?.get(..self.len).filter(|next| !next.is_empty())?;
        let begins = self.wraps.front().is_some_and(|(first, _)| *first == self.sent);
        let wrap = if begins { self.wraps.pop_front() } else { None };
        self.sent += 1;
        Some((wrap.map(|(_, wrap)| wrap), envelope))
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
    from: Option<Arc<Person>>,
    receiving: Option<Box<ReceivingChain<SKIP>>>,
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
            to: None,
            sending: None,
            chain_epoch: 0,
            memory: Memory::default(),
            waited: None,
            taken: None,
            ahead: Ahead::default(),
            unopened: None,
        };
        Ok((entered, rx))
    }

    pub(super) fn person(&self) -> Arc<Person> {
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

    pub(super) fn hear_from(&mut self, person: Arc<Person>) {
        self.memory.from = Some(person);
    }

    pub(super) fn write_to(&mut self, person: Arc<Person>) {
        self.to = Some(person);
    }

    /// A chain takes 65,536 messages; then the next one begins.
    pub(super) fn start_chain(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let wrap = self.next_chain()?;
        self.say_wrap(&wrap, out)
    }

    fn next_chain(&mut self) -> Result<Wrap, Failure> {
        let (me, to) = (Arc::clone(&self.me), self.to.clone().ok_or("nobody to write to")?);
        let conversation = Conversation::direct(&me.member(), &to.member(), 0);
        let chain = SendingChain::start(&me.member(), &conversation, self.chain_epoch, &mut SysRng).map_err(text)?;
        self.chain_epoch += 1;
        let mut wrap = Box::new([0; WRAP_LEN]);
        chain.wrap(&me.keys, &me.bundle, &to.member(), &to.bundle, &mut SysRng, &mut *wrap).map_err(text)?;
        self.sending = Some(chain);
        Ok(wrap)
    }

    fn say_wrap(&mut self, wrap: &[u8; WRAP_LEN], out: &mut Vec<u8>) -> Result<(), Failure> {
        let (me, to) = (Arc::clone(&self.me), self.to.clone().ok_or("nobody to write to")?);
        let (bundle, signature) = (me.bundle.encode(), &me.signature);
        let bundle = SignedBundle { bundle: &bundle, signature };
        self.say(&Message::Wrap { request: 2, to: to.id, wrap, bundle }, out)
    }

    fn is_used_up(&self) -> bool {
        self.sending.as_ref().is_none_or(|chain| chain.next() >= MAX_MESSAGES)
    }

    /// Seals so many messages end to end, to be sent later.
    pub(super) fn seal_ahead(&mut self, body: &[u8], count: usize) -> Result<(), Failure> {
        let len = body.len() + ENVELOPE_OVERHEAD;
        let mut ahead = Ahead { envelopes: vec![0; len * count], len, ..Ahead::default() };
        for (number, envelope) in ahead.envelopes.chunks_exact_mut(len).enumerate() {
            if number == 0 || self.is_used_up() {
                ahead.wraps.push_back((number, self.next_chain()?));
            }
            let chain = self.sending.as_mut().ok_or("there is a chain")?;
            chain.seal::<HostAead>(false, 0, body, envelope).map_err(text)?;
        }
        self.ahead = ahead;
        Ok(())
    }

    /// From now on what comes is kept, to be opened later.
    pub(super) fn open_later(&mut self) {
        self.unopened = Some(vec![Unopened::default()]);
    }

    /// Opens what was kept, and forgets what was sealed ahead and not sent.
    pub(super) fn settle(&mut self) -> Result<(), Failure> {
        if core::mem::take(&mut self.ahead).is_left() {
            // The other side would miss what is sealed and not sent.
            self.sending = None;
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
        let from = self.memory.from.as_ref().ok_or("a chain of a stranger")?;
        let conversation = Conversation::direct(&self.me.member(), &from.member(), 0);
        let bundle = Bundle::decode(bundle).map_err(text)?;
        let chain = ReceivingChain::accept(wrap, &self.me.prekey, &from.member(), &bundle, &conversation, None);
        self.memory.receiving = Some(Box::new(chain.map_err(text)?));
        Ok(())
    }

    fn open(&mut self, envelope: &mut [u8]) -> Result<(), Failure> {
        let chain = self.memory.receiving.as_mut().ok_or("a message without a chain")?;
        chain.open::<HostAead>(envelope).map_err(text)?;
        Ok(())
    }

    pub(super) fn send(&mut self, body: &[u8], count: usize, out: &mut Vec<u8>) -> Result<(), Failure> {
        let len = body.len() + ENVELOPE_OVERHEAD;
        for _ in 0..count {
            let mut ahead = core::mem::take(&mut self.ahead);
            if let Some((wrap, sealed)) = ahead.next() {
                if let Some(wrap) = wrap {
                    self.say_wrap(&wrap, out)?;
                }
                self.put(sealed.len(), out, |envelope| {
                    envelope[..sealed.len()].copy_from_slice(sealed);
                    Ok(())
                })?;
                self.ahead = ahead;
                continue;
            }
            if self.is_used_up() {
                self.start_chain(out)?;
            }
            let mut chain = self.sending.take().ok_or("there is a chain")?;
            self.put(len, out, |envelope| chain.seal::<HostAead>(false, 0, body, envelope).map(drop))?;
            self.sending = Some(chain);
        }
        Ok(())
    }

    /// Seals one record with an envelope of this length.
    fn put(
        &mut self,
        len: usize,
        out: &mut Vec<u8>,
        seal: impl FnOnce(&mut [u8]) -> Result<(), SealError>,
    ) -> Result<(), Failure> {
        let start = out.len();
        out.resize(start + len + SEND_HEAD_LEN + RECORD_OVERHEAD + UPDATE_ROOM, 0);
        let sealed = self.connection.send_sealed(self.wanted, len, &mut out[start..], seal);
        out.truncate(start + sealed.map_err(|error: SealError| text(error))?);
        Ok(())
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

    fn say(&mut self, message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.append(out, |connection, room| connection.send(message, room))
    }

    fn append(
        &mut self,
        out: &mut Vec<u8>,
        seal: impl FnOnce(&mut Connection<HostAead>, &mut [u8]) -> Result<usize, ossicle_core::Error>,
    ) -> Result<(), Failure> {
        let start = out.len();
        out.resize(start + 4096, 0);
        let len = seal(&mut self.connection, &mut out[start..]).map_err(text)?;
        out.truncate(start + len);
        Ok(())
    }
}
