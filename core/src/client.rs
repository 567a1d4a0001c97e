//! What one small client does over a connection: joins, publishes its bundle, starts chains to the peers it was given,
//! sends, opens, acknowledges. Still without I/O, clock, allocator or storage.
//!
//! The application drives a [`Client`] like an endpoint: it moves bytes, answers [`ClientStep::Sign`] and
//! [`ClientStep::Verify`], and takes events. What survives a broken connection (keys, chains) stays in the client;
//! nothing survives a restart, and so every start makes new end-to-end keys (PROTOCOL 8.4). It talks to the peers it was
//! given and to nobody else. Hosts, which have storage and any number of peers, stand on `Connection` and the chains
//! themselves.

mod group;

use heapless::Vec;
use rand_core::TryCryptoRng;

pub use self::group::ClientGroup;

use crate::config::{Channel, ClientConfig, Credentials};
use crate::connection::{Ask, Event, Received};
use crate::crypto::{Aead, HASH_LEN, PublicKey, RustCrypto, Statement};
use crate::endpoint::{Buffers, Drive, Endpoint, Io, Outbox};
use crate::envelope::{
    AcceptError, Bundle, BundleKeys, BundleView, Conversation, EnvelopeHeader, OpenError, Prekey, ReceivingChain,
    SealError, SendingChain, WRAP_LEN, WrapHeader,
};
use crate::error::{ApiMisuse, BufferError, Error, Reason};
use crate::wire::{
    DirectoryEntry, ID_LEN, Lookup, Member, Message, Receipt, Rung, Rungs, SEND_HEAD_LEN, Settings, SignedBundle,
    Subject,
};

/// Messages that may be missing before a later one is opened.
const SKIP: usize = 64;
/// Messages whose receipts can still be verified.
const SENT: usize = 8;

/// Resumptions that may break in a row before a full handshake is tried.
const BROKEN: u8 = 2;

/// Bytes of the shortest transmit buffer.
const MIN_TX_LEN: usize = 1024;

/// Who the client is and where it belongs.
#[derive(Clone, Copy)]
pub struct ClientIdentity<'c> {
    /// Its id.
    pub id: [u8; ID_LEN],
    /// How often its key was replaced.
    pub key_epoch: u32,
    /// Its RSA key's public half.
    pub key: PublicKey<'c>,
    /// The server's key.
    pub server: PublicKey<'c>,
}

/// A peer that the client talks to.
#[derive(Clone, Copy)]
pub struct PeerConfig<'c> {
    /// Its id.
    pub id: [u8; ID_LEN],
    /// Its RSA key: the pin.
    pub key: PublicKey<'c>,
    /// A bundle of it whose signature was verified when it was stored: none older is taken.
    pub oldest: Option<Bundle>,
}

/// What a client came to.
#[non_exhaustive]
pub enum ClientStep<'e> {
    /// Nothing to do but to move bytes.
    Io,
    /// Sign this with the client's RSA key: [`Client::sign`].
    Sign(Statement),
    /// Verify this signature with this key: [`Client::verified`].
    Verify {
        /// The key that must have made it.
        key: PublicKey<'e>,
        /// What was signed.
        statement: Statement,
        /// The signature.
        signature: &'e [u8],
    },
    /// Something happened.
    Event(ClientEvent<'e>),
}

/// What happened. Peers are named by their place among those that the client was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ClientEvent<'e> {
    /// The server knows this client: it is connected.
    Connected {
        /// What the server decided for this connection.
        settings: Settings,
        /// A channel was resumed: neither side needed RSA.
        resumed: bool,
    },
    /// The bundle is published: messages come and chains can start.
    Ready,
    /// A chain to this peer stands: [`Client::send`] works.
    PeerReady(usize),
    /// No chain to this peer could be started, or the last one ended; the next [`Client::start`] tries again.
    PeerLost {
        /// Which peer.
        peer: usize,
        /// Why.
        reason: Reason,
    },
    /// A message, opened.
    Message {
        /// From which peer.
        peer: usize,
        /// Its number in the peer's chain.
        n: u32,
        /// Whether the peer signed it, or only shared keys speak for it. Actuators should demand a signature.
        signed: bool,
        /// The application's kind.
        kind: u8,
        /// The text.
        body: &'e [u8],
    },
    /// What became of this client's messages.
    Receipt {
        /// At which peer.
        peer: usize,
        /// The receipt. Its tag, where it has one, was verified.
        receipt: Receipt,
    },
    /// The client is a member of a group now, since its answer was taken.
    GroupJoined,
    /// Everybody who accepted has the own chain: [`Client::send_to_group`] works. Told again when another member has joined.
    GroupReady,
    /// A message in the group, opened. Every one is signed by its sender.
    GroupMessage {
        /// The id of the member who speaks.
        from: [u8; ID_LEN],
        /// Its number in his chain.
        n: u32,
        /// The application's kind.
        kind: u8,
        /// The text.
        body: &'e [u8],
    },
    /// What became of this client's messages in the group.
    GroupReceipt {
        /// At which member; `None` where the server speaks of all.
        from: Option<[u8; ID_LEN]>,
        /// The receipt. Its tag, where it has one, was verified.
        receipt: Receipt,
    },
    /// A member cannot be looked up, or given the chain; the others can.
    GroupMemberLost {
        /// The member's id.
        member: [u8; ID_LEN],
        /// Why.
        reason: Reason,
    },
    /// The own chain in the group has ended; the next [`Client::start_in_group`] begins another one.
    GroupLost(Reason),
    /// The group was closed, or this client may not join it.
    GroupOver,
    /// The server changed the settings.
    Settings(Settings),
    /// The server has closed the connection. Nothing comes behind it, and nothing is left to wait for: leave the loop, and
    /// [`reconnect`](Client::reconnect).
    Closed(Option<Reason>),
}

/// The buffers of one client.
pub struct ClientBuffers<'b> {
    /// Receives one record: at least [`MIN_RECORD_LIMIT`](crate::MIN_RECORD_LIMIT) bytes.
    pub rx: &'b mut [u8],
    /// Holds what is to be written: at least 1 KiB.
    pub tx: &'b mut [u8],
    /// Keeps the signature of the client's bundle: as long as its RSA modulus.
    pub signature: &'b mut [u8],
}

// Its large methods are not inlined: their frames must be gone when RSA or Ed25519 is computed, which take 7 KiB of stack
// themselves.
/// One client with up to `PEERS` peers.
pub struct Client<'b, 'c, const PEERS: usize, A: Aead = RustCrypto> {
    identity: ClientIdentity<'c>,
    member: Member,
    endpoint: Endpoint<'b, A>,
    stage: Stage,
    /// What the server issued last, offered at the next connection.
    channel: Option<Channel>,
    /// Resumptions in a row that broke before the server had answered, and whether this one has begun.
    broken: u8,
    begun: bool,
    own: Option<Own>,
    signature: &'b mut [u8],
    peers: Vec<Peer<'c>, PEERS>,
    /// The server's store that the bundle was published to.
    store_epoch: [u8; 8],
    /// The last correlation id.
    request: u16,
    /// What is being verified outside.
    verifying: Verifying,
    /// The payload in the receive buffer whose signature was just verified, and how that went.
    held: Option<(core::ops::Range<usize>, Verdict)>,
    /// `opened` that is owed for the message that the application was just given.
    opened: Option<Receipt>,
    waited: Waited,
    group: Option<&'b mut ClientGroup>,
}

/// What waited at the server and is not acknowledged yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waited {
    Nothing,
    /// The next delivery has this number.
    Announced(u64),
    /// It was handled, but whoever polls may be handling it still.
    Handled(u64),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Handshake,
    /// The directory was not asked yet for the newest bundle of this client.
    Ask,
    Asked(u16),
    /// The new bundle is being signed.
    SignBundle,
    Publish,
    Published(u16),
    Ready,
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verifying {
    Nothing,
    Server,
    Peer,
}

/// What is known of the signature in a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Open,
    Right,
    Wrong,
}

/// The end-to-end keys of this start.
struct Own {
    keys: BundleKeys,
    bundle: Bundle,
    prekey: Prekey,
    publication: Publication,
}

/// How far the bundle of this start has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Publication {
    Unsigned,
    /// And perhaps sent: nobody knows whether it arrived.
    Signed,
    Published,
}

struct Peer<'c> {
    member: Member,
    /// Whether its invitations to groups are accepted.
    invites: bool,
    key: PublicKey<'c>,
    conversation: Conversation,
    view: Option<BundleView>,
    start: Start,
    chain_epoch: u32,
    sending: Option<SendingChain>,
    sent: [(u32, [u8; 8]); SENT],
    /// Vacant until the peer's first wrap was accepted. In place, since it is large and devices have little stack.
    receiving: ReceivingChain<SKIP>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    Idle,
    Wanted,
    LookedUp(u16),
    Wrapped(u16),
    Done,
}

impl<'b, 'c, const PEERS: usize, A: Aead> Client<'b, 'c, PEERS, A> {
    /// A client with these peers, before its first connection. `seed` is 64 random bytes for that connection.
    ///
    /// # Errors
    /// [`BufferError`] if a buffer is too short; [`ApiMisuse::InvalidArgument`] if there are more than `PEERS`
    /// peers.
    pub fn new(
        identity: ClientIdentity<'c>,
        peers: &[PeerConfig<'c>],
        buffers: ClientBuffers<'b>,
        seed: &[u8; 64],
    ) -> Result<Self, Error> {
        if buffers.signature.len() < identity.key.signature_len() {
            return Err(BufferError::RxFull.into());
        }
        // A wrap with the bundle of the longest key: what is owed must fit into an empty buffer.
        if buffers.tx.len() < MIN_TX_LEN {
            return Err(BufferError::TxFull.into());
        }
        let member = Member { id: identity.id, key: identity.key.fingerprint() };
        let mut list = Vec::new();
        for peer in peers {
            let pinned = Member { id: peer.id, key: peer.key.fingerprint() };
            let peer = Peer {
                member: pinned,
                invites: false,
                key: peer.key,
                conversation: Conversation::direct(&member, &pinned, 0),
                view: peer.oldest.as_ref().map(BundleView::new),
                start: Start::Idle,
                chain_epoch: 0,
                sending: None,
                sent: [(u32::MAX, [0; 8]); SENT],
                receiving: ReceivingChain::vacant(),
            };
            list.push(peer).map_err(|_| ApiMisuse::InvalidArgument)?;
        }
        let buffers_of_endpoint = Buffers { rx: buffers.rx, tx: buffers.tx };
        Ok(Self {
            identity,
            member,
            endpoint: Endpoint::client(config(&identity), buffers_of_endpoint, seed)?,
            stage: Stage::Handshake,
            channel: None,
            broken: 0,
            begun: false,
            own: None,
            signature: buffers.signature,
            peers: list,
            store_epoch: [0; 8],
            request: 0,
            verifying: Verifying::Nothing,
            held: None,
            opened: None,
            waited: Waited::Nothing,
            group: None,
        })
    }

    /// Accepts from now on what `peer` invites this client to, one group at a time, and keeps it in `group`. Whatever else
    /// the client is invited to, it lets expire.
    pub fn accept_invitations(&mut self, peer: usize, group: &'b mut ClientGroup) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.invites = true;
        }
        group.prepare();
        self.group = Some(group);
    }

    /// Begins a new connection after the last one has ended, with the channel that the last one left. Keys and chains
    /// stay. [`solve`](Self::solve) comes next, before the transport is opened.
    #[inline(never)]
    pub fn reconnect(&mut self, seed: &[u8; 64]) {
        if self.stage == Stage::Handshake && core::mem::take(&mut self.begun) && self.channel.is_some() {
            self.broken = self.broken.saturating_add(1);
        }
        // Somebody may break every resumption, or the server may be unable to: the full handshake may still succeed. The
        // channel is kept all the same, since whoever breaks connections must not be able to end it.
        let offered = if self.broken < BROKEN { self.channel.clone() } else { None };
        self.begun = false;
        self.endpoint.reconnect(config(&self.identity), offered, seed);
        // One that was signed is published again where that was not answered, which is right whether it had arrived or not.
        // Another one under an epoch that peers know would lock this client out.
        if self.own.as_ref().is_some_and(|own| own.publication == Publication::Unsigned) {
            self.own = None;
        }
        self.stage = Stage::Handshake;
        self.verifying = Verifying::Nothing;
        self.held = None;
        self.opened = None;
        self.waited = Waited::Nothing;
        if let Some(group) = self.group.as_deref_mut() {
            group.disconnected();
        }
        for peer in &mut self.peers {
            // What was under way has no answer any more.
            match peer.start {
                Start::LookedUp(_) | Start::Wrapped(_) => peer.start = Start::Wanted,
                Start::Idle | Start::Wanted | Start::Done => {}
            }
        }
    }

    /// Makes some tries at the puzzle that a server has set that is under load, which takes milliseconds. True if it must be
    /// called again; false at once if there is none, as nearly always. A server waits for seconds only, so solve it before
    /// the transport is opened, and soon, since the server forgets what it has set within a minute or two.
    pub fn solve(&mut self) -> bool {
        self.endpoint.solve()
    }

    /// Goes on until somebody else is needed. `rng` makes the end-to-end keys.
    ///
    /// # Errors
    /// Any error but a full buffer ends the connection: close the transport and [`reconnect`](Self::reconnect).
    #[inline(never)]
    pub fn poll<R: TryCryptoRng + ?Sized>(&mut self, rng: &mut R) -> Result<ClientStep<'_>, Error> {
        if self.verifying != Verifying::Nothing {
            return Ok(ClientStep::Io);
        }
        if self.held.is_none() {
            self.endpoint.make_room();
        }
        match self.owe() {
            // What is owed waits until something was written.
            Ok(()) | Err(Error::Buffer(BufferError::TxFull)) => {}
            Err(error) => return Err(error),
        }
        let flushed = self.endpoint.is_flushed();
        let (data, lent, out) = self.endpoint.parts();
        if let Some(Ask::Sign(statement)) = out.connection.ask() {
            return Ok(ClientStep::Sign(statement));
        }
        if let (Stage::SignBundle, Some(own)) = (self.stage, &self.own) {
            return Ok(ClientStep::Sign(own.bundle.statement()));
        }
        // A record may have to be answered, and what it changes cannot be taken back: only with all the room there is.
        if !flushed {
            return Ok(ClientStep::Io);
        }
        if self.stage == Stage::Ready && self.group.as_deref_mut().is_some_and(ClientGroup::begins) {
            return Ok(ClientStep::Event(ClientEvent::GroupReady));
        }
        let mut state = Handling {
            group: self.group.as_deref_mut(),
            key_epoch: self.identity.key_epoch,
            channel: &mut self.channel,
            broken: &mut self.broken,
            member: &self.member,
            key: self.identity.key,
            store_epoch: &mut self.store_epoch,
            stage: &mut self.stage,
            own: &mut self.own,
            signature: self.signature.get(..self.identity.key.signature_len()).unwrap_or_default(),
            peers: &mut self.peers,
            request: &mut self.request,
            verifying: &mut self.verifying,
            opened: &mut self.opened,
            waited: &mut self.waited,
        };
        if let Some((range, verdict)) = self.held.take() {
            let payload = data.get_mut(range).unwrap_or_default();
            return state.message(payload, verdict, out, rng);
        }
        match out.connection.receive(data)? {
            Received::Need(_) | Received::Wait => Ok(ClientStep::Io),
            Received::Record { event, .. } => {
                *lent = true;
                state.event(event, self.identity.server, out, rng)
            }
        }
    }

    /// Answers [`ClientStep::Sign`].
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if the transmit buffer has no room: write, then answer again. [`ApiMisuse`] if nothing was
    /// asked or the signature has another length than the key.
    #[inline(never)]
    pub fn sign(&mut self, signature: &[u8]) -> Result<(), Error> {
        if signature.len() != self.identity.key.signature_len() {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        match self.stage {
            Stage::Handshake => self.endpoint.sign(&credentials(&self.identity, &self.member), signature),
            Stage::SignBundle => {
                let place = self.signature.get_mut(..signature.len()).ok_or(BufferError::RxFull)?;
                place.copy_from_slice(signature);
                if let Some(own) = &mut self.own {
                    own.publication = Publication::Signed;
                }
                self.stage = Stage::Publish;
                Ok(())
            }
            _ => Err(ApiMisuse::NotAsked.into()),
        }
    }

    /// Answers [`ClientStep::Verify`]. A wrong signature of the server ends the connection; one of a peer's bundle loses
    /// the chain that it came for.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the server's signature was wrong; [`ApiMisuse::NotAsked`] if nothing was asked.
    #[inline(never)]
    pub fn verified(&mut self, valid: bool) -> Result<(), Error> {
        match core::mem::replace(&mut self.verifying, Verifying::Nothing) {
            Verifying::Server if valid => self.endpoint.verified(&credentials(&self.identity, &self.member)),
            Verifying::Server => Err(Error::Crypto),
            Verifying::Peer => {
                let verdict = if valid { Verdict::Right } else { Verdict::Wrong };
                self.held = Some((self.endpoint.payload(), verdict));
                Ok(())
            }
            Verifying::Nothing => Err(ApiMisuse::NotAsked.into()),
        }
    }

    /// Starts a chain to `peer`, unless one stands or starts already. A failed start is told as
    /// [`ClientEvent::PeerLost`] and costs two public-key operations on either side: wait before trying again.
    pub fn start(&mut self, peer: usize) {
        if let Some(peer) = self.peers.get_mut(peer)
            && peer.start == Start::Idle
        {
            peer.start = Start::Wanted;
        }
    }

    /// Starts a new chain to `peer` in the place of the one that stands: after 7 days, or when it should not be used on.
    pub fn renew(&mut self, peer: usize) {
        if let Some(peer) = self.peers.get_mut(peer)
            && peer.start == Start::Done
        {
            peer.sending = None;
            peer.start = Start::Wanted;
        }
    }

    /// Whether a chain to `peer` stands.
    pub fn is_ready(&self, peer: usize) -> bool {
        self.stage == Stage::Ready && self.peers.get(peer).is_some_and(|peer| peer.start == Start::Done)
    }

    /// Seals `body` for `peer` and returns the message's number. The sender's Ed25519 signature costs 64 bytes and two
    /// curve operations.
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`] while no chain stands: [`start`](Self::start) one. [`BufferError::TxFull`] while there
    /// is no room: write first. [`BufferError::MessageTooLong`] if a record cannot hold it.
    #[inline(never)]
    pub fn send(&mut self, peer: usize, wanted: Rungs, signed: bool, kind: u8, body: &[u8]) -> Result<u32, Error> {
        if !self.is_ready(peer) {
            return Err(ApiMisuse::NotConnected.into());
        }
        let peer = self.peers.get_mut(peer).ok_or(ApiMisuse::InvalidArgument)?;
        let chain = peer.sending.as_mut().ok_or(ApiMisuse::NotConnected)?;
        let overhead = if signed { crate::envelope::SIGNED_OVERHEAD } else { crate::envelope::ENVELOPE_OVERHEAD };
        let len = body.len().saturating_add(overhead);
        let max = self.endpoint.max_payload()?;
        if len.saturating_add(SEND_HEAD_LEN) > max {
            return Err(BufferError::MessageTooLong { max: max.saturating_sub(overhead + SEND_HEAD_LEN) }.into());
        }
        // The number must not be used up before it is sure that the record fits: seal where the record will stand.
        let out = self.endpoint.outbox();
        let sealed = out.send_sealed(wanted, len, |envelope| chain.seal::<A>(signed, kind, body, envelope));
        match sealed {
            Ok(sealed) => {
                peer.remember(sealed.n, sealed.salt);
                Ok(sealed.n)
            }
            Err(SealError::Exhausted) => {
                peer.sending = None;
                peer.start = Start::Wanted;
                Err(ApiMisuse::NotConnected.into())
            }
            Err(SealError::Failed(error)) => Err(error),
        }
    }

    /// Starts a chain in the group, unless one stands or starts already: [`ClientEvent::GroupReady`] tells when everybody who
    /// accepted has it. It costs two public-key operations for each of them.
    pub fn start_in_group(&mut self) {
        if let Some(group) = self.group.as_deref_mut() {
            group.start();
        }
    }

    /// Whether everybody in the group who accepted has this client's chain.
    pub fn is_group_ready(&self) -> bool {
        self.stage == Stage::Ready && self.group.as_ref().is_some_and(|group| group.is_ready())
    }

    /// Seals `body` for everybody in the group and returns the message's number. It is signed, always.
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`] while no chain stands: [`start_in_group`](Self::start_in_group) one.
    /// [`BufferError::TxFull`] while there is no room: write first. [`BufferError::MessageTooLong`] if a record cannot hold
    /// it.
    #[inline(never)]
    pub fn send_to_group(&mut self, wanted: Rungs, kind: u8, body: &[u8]) -> Result<u32, Error> {
        if !self.is_group_ready() {
            return Err(ApiMisuse::NotConnected.into());
        }
        let group = self.group.as_deref_mut().ok_or(ApiMisuse::NotConnected)?;
        group.send(wanted, kind, body, &mut self.endpoint)
    }

    /// Seals this side's last record.
    ///
    /// # Errors
    /// As [`Endpoint::close`].
    pub fn close(&mut self, reason: Option<Reason>) -> Result<(), Error> {
        self.stage = Stage::Closed;
        self.endpoint.close(reason)
    }

    /// Asks the server for a sign of life.
    ///
    /// # Errors
    /// As [`Endpoint::send`].
    pub fn heartbeat(&mut self) -> Result<(), Error> {
        let request = next(&mut self.request);
        self.endpoint.send(&Message::Status { request })
    }

    /// Whether there is something to send or to ask for that the next poll takes up.
    fn owes(&self) -> bool {
        let starts = || self.peers.iter().any(|peer| peer.start == Start::Wanted);
        let answers = self.opened.is_some() || self.acknowledges();
        let group = || self.group.as_ref().is_some_and(|group| group.owes());
        match self.stage {
            Stage::Ask | Stage::SignBundle | Stage::Publish => true,
            Stage::Ready => answers || starts() || group(),
            Stage::Handshake | Stage::Asked(_) | Stage::Published(_) | Stage::Closed => answers,
        }
    }

    /// Whether there is something to acknowledge. An invitation is, once it was answered: until then it would be lost with
    /// this client's memory.
    fn acknowledges(&self) -> bool {
        matches!(self.waited, Waited::Handled(_)) && !self.group.as_ref().is_some_and(|group| group.considers())
    }

    /// Sends what is owed and what the stages need.
    fn owe(&mut self) -> Result<(), Error> {
        let acknowledges = self.acknowledges();
        let out = self.endpoint.outbox();
        out.transmit()?;
        if let Some(receipt) = self.opened {
            out.send(&Message::Tell(receipt))?;
            self.opened = None;
        }
        if let (Waited::Handled(seq), true) = (self.waited, acknowledges) {
            out.send(&Message::Acknowledge { seq })?;
            self.waited = Waited::Nothing;
        }
        match self.stage {
            Stage::Ask => {
                let request = next(&mut self.request);
                let subject = Subject::Id(self.member.id);
                out.send(&Message::Lookup(Lookup { request, key: false, bundle: true, subject }))?;
                self.stage = Stage::Asked(request);
            }
            Stage::Publish => {
                let own = self.own.as_ref().ok_or(ApiMisuse::NotConnected)?;
                let request = next(&mut self.request);
                let bundle = own.bundle.encode();
                let signature = self.signature.get(..self.identity.key.signature_len()).unwrap_or_default();
                let bundle = SignedBundle { bundle: &bundle, signature };
                out.send(&Message::Publish { request, bundle })?;
                self.stage = Stage::Published(request);
            }
            Stage::Ready => {
                for peer in self.peers.iter_mut().filter(|peer| peer.start == Start::Wanted) {
                    let request = next(&mut self.request);
                    let subject = Subject::Id(peer.member.id);
                    out.send(&Message::Lookup(Lookup { request, key: false, bundle: true, subject }))?;
                    peer.start = Start::LookedUp(request);
                }
                if let (Some(group), Some(own)) = (self.group.as_deref_mut(), &self.own) {
                    group.owe(&own.keys, &mut self.request, out)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl<const PEERS: usize, A: Aead> Drive for Client<'_, '_, PEERS, A> {
    fn io(&mut self) -> Result<Option<Io<'_>>, Error> {
        // What is owed comes first, unless it has to wait for room.
        let owes = self.held.is_some() || self.owes();
        if owes && self.endpoint.is_flushed() { Ok(None) } else { self.endpoint.io() }
    }

    fn written(&mut self, len: usize) {
        self.begun |= len > 0;
        self.endpoint.written(len);
    }

    fn read(&mut self, len: usize) -> Result<(), Error> {
        self.endpoint.read(len)
    }
}

fn config(identity: &ClientIdentity<'_>) -> ClientConfig {
    ClientConfig { server: Some(identity.server.fingerprint()), ask_for_key: false, record_limit: 0 }
}

fn credentials(identity: &ClientIdentity<'_>, member: &Member) -> Credentials<'static> {
    Credentials::Key { id: identity.id, key_epoch: identity.key_epoch, fingerprint: member.key }
}

fn next(request: &mut u16) -> u16 {
    *request = request.wrapping_add(1);
    *request
}

/// Everything of a client but its buffers: what a received record may change.
struct Handling<'h, 'c, const PEERS: usize> {
    group: Option<&'h mut ClientGroup>,
    key_epoch: u32,
    channel: &'h mut Option<Channel>,
    broken: &'h mut u8,
    member: &'h Member,
    key: PublicKey<'c>,
    store_epoch: &'h mut [u8; 8],
    stage: &'h mut Stage,
    own: &'h mut Option<Own>,
    signature: &'h [u8],
    peers: &'h mut Vec<Peer<'c>, PEERS>,
    request: &'h mut u16,
    verifying: &'h mut Verifying,
    opened: &'h mut Option<Receipt>,
    waited: &'h mut Waited,
}

impl<'c, const PEERS: usize> Handling<'_, 'c, PEERS> {
    fn event<'e, A: Aead, R: TryCryptoRng + ?Sized>(
        &mut self,
        event: Event<'e>,
        server: PublicKey<'c>,
        out: &mut Outbox<'_, A>,
        rng: &mut R,
    ) -> Result<ClientStep<'e>, Error>
    where
        'c: 'e,
    {
        match event {
            Event::CheckServer(claim) => {
                *self.verifying = Verifying::Server;
                Ok(ClientStep::Verify { key: server, statement: claim.statement, signature: claim.signature })
            }
            Event::Connected(settings) => {
                let resumed = out.connection.is_resumed();
                // A full handshake ends every older channel; a resumption that issued none leaves the one that was used.
                match out.connection.take_channel() {
                    None if resumed => {}
                    issued => *self.channel = issued,
                }
                *self.broken = 0;
                let other_store = core::mem::replace(self.store_epoch, settings.store_epoch) != settings.store_epoch;
                if let (true, Some(group)) = (other_store, self.group.as_deref_mut()) {
                    group.accept_again(false);
                }
                *self.stage = match &mut self.own {
                    None => Stage::Ask,
                    Some(own) if other_store || own.publication != Publication::Published => {
                        // Restored or made anew: it may not know the bundle any more.
                        own.publication = Publication::Signed;
                        Stage::Publish
                    }
                    Some(_) => Stage::Ready,
                };
                if *self.stage == Stage::Ready {
                    out.send(&Message::Listening)?;
                }
                Ok(ClientStep::Event(ClientEvent::Connected { settings, resumed }))
            }
            Event::Message(payload) => self.message(payload, Verdict::Open, out, rng),
            Event::Closed(reason) => {
                *self.stage = Stage::Closed;
                Ok(ClientStep::Event(ClientEvent::Closed(reason)))
            }
            Event::Progress | Event::CheckClient(_) | Event::CheckChannel(_) | Event::Resumed => Ok(ClientStep::Io),
        }
    }

    /// Handles one message, for the second time once the signature in it was verified.
    fn message<'e, A: Aead, R: TryCryptoRng + ?Sized>(
        &mut self,
        payload: &'e mut [u8],
        verdict: Verdict,
        out: &mut Outbox<'_, A>,
        rng: &mut R,
    ) -> Result<ClientStep<'e>, Error>
    where
        'c: 'e,
    {
        if let Ok(Message::Deliver { wanted, envelope }) = Message::decode_told(payload) {
            self.handled();
            let Ok(header) = EnvelopeHeader::decode(envelope) else {
                return Ok(ClientStep::Io);
            };
            return match self.place_in_group(&header.chain_id) {
                Some(place) => self.deliver_in_group(place, &header, wanted, payload, out),
                None => self.deliver(&header, wanted, payload, out),
            };
        }
        // What this version does not know may be known to the next one: it is ignored.
        let Ok(message) = Message::decode_told(payload) else {
            return Ok(ClientStep::Io);
        };
        match message {
            Message::Status { request } => {
                out.send(&Message::StatusResponse { request })?;
                Ok(ClientStep::Io)
            }
            Message::Settings(settings) => Ok(ClientStep::Event(ClientEvent::Settings(settings))),
            Message::LookupResponse { request, entry } if self.is_asked_of_group(request) => {
                self.member_looked_up(&entry, verdict, out, rng)
            }
            Message::LookupResponse { request, entry } => self.looked_up(request, entry, verdict, out, rng),
            Message::Done { request } => self.done(request, out),
            Message::Refused { request, reason, .. } => self.refused(request, reason),
            Message::WrapDelivery { from, wrap, bundle } => {
                let step = self.wrapped(from, wrap, bundle, verdict, out)?;
                if *self.verifying == Verifying::Nothing {
                    self.handled();
                }
                Ok(step)
            }
            Message::Told(receipt) => {
                self.handled();
                Ok(self.told(receipt))
            }
            Message::Waited { seq, .. } => {
                *self.waited = Waited::Announced(seq);
                Ok(ClientStep::Io)
            }
            Message::Other(body) => {
                self.handled();
                Ok(self.group_message(body))
            }
            // Of the rest nothing was asked for and nothing is owed.
            _ => Ok(ClientStep::Io),
        }
    }

    /// What was announced has come: it is acknowledged at the next poll, when the application has had it.
    fn handled(&mut self) {
        if let Waited::Announced(seq) = *self.waited {
            *self.waited = Waited::Handled(seq);
        }
    }

    #[inline(never)]
    fn looked_up<'e, A: Aead, R: TryCryptoRng + ?Sized>(
        &mut self,
        request: u16,
        entry: DirectoryEntry<'e>,
        verdict: Verdict,
        out: &mut Outbox<'_, A>,
        rng: &mut R,
    ) -> Result<ClientStep<'e>, Error>
    where
        'c: 'e,
    {
        if *self.stage == Stage::Asked(request) {
            let newest = match entry.bundle {
                Some(signed) => Some((Bundle::decode(signed.bundle)?, signed.signature)),
                None => None,
            };
            // A directory that made one up could use up the epochs, or have this client look like two to its peers.
            if let Some((bundle, signature)) = &newest {
                match verdict {
                    Verdict::Open if bundle.member() == *self.member => {
                        *self.verifying = Verifying::Peer;
                        let statement = bundle.statement();
                        return Ok(ClientStep::Verify { key: self.key, statement, signature });
                    }
                    Verdict::Open | Verdict::Wrong => return Err(Error::Crypto),
                    Verdict::Right => {}
                }
            }
            self.make_keys(newest.map(|(bundle, _)| bundle), rng)?;
            return Ok(ClientStep::Io);
        }
        let asked = |peer: &Peer<'_>| peer.start == Start::LookedUp(request);
        let Some(index) = self.peers.iter().position(asked) else {
            return Ok(ClientStep::Io);
        };
        let Some(peer) = self.peers.get_mut(index) else {
            return Ok(ClientStep::Io);
        };
        let lost = |peer: &mut Peer<'_>, reason| {
            peer.start = Start::Idle;
            Ok(ClientStep::Event(ClientEvent::PeerLost { peer: index, reason }))
        };
        let Some(signed) = entry.bundle else {
            return lost(peer, Reason::Unknown);
        };
        let Ok(bundle) = Bundle::decode(signed.bundle) else {
            return lost(peer, Reason::Malformed);
        };
        match check(&mut peer.view, &peer.member, &bundle, verdict) {
            Check::Verify => {
                *self.verifying = Verifying::Peer;
                let statement = bundle.statement();
                return Ok(ClientStep::Verify { key: peer.key, statement, signature: signed.signature });
            }
            Check::Refuse(reason) => return lost(peer, reason),
            Check::Good => {}
        }
        let Some(own) = &self.own else {
            return lost(peer, Reason::Unavailable);
        };
        let chain = SendingChain::start(self.member, &peer.conversation, peer.chain_epoch, rng)?;
        let mut wrap = [0; WRAP_LEN];
        if chain.wrap(&own.keys, &own.bundle, &peer.member, &bundle, rng, &mut wrap).is_err() {
            return lost(peer, Reason::Malformed);
        }
        let request = next(self.request);
        let own_bundle = own.bundle.encode();
        let own_bundle = SignedBundle { bundle: &own_bundle, signature: self.signature };
        out.send(&Message::Wrap { request, to: peer.member.id, wrap: &wrap, bundle: own_bundle })?;
        peer.chain_epoch = peer.chain_epoch.saturating_add(1);
        peer.sending = Some(chain);
        peer.start = Start::Wrapped(request);
        Ok(ClientStep::Io)
    }

    /// New end-to-end keys, one epoch behind the newest that the directory knows.
    #[inline(never)]
    fn make_keys<R: TryCryptoRng + ?Sized>(&mut self, newest: Option<Bundle>, rng: &mut R) -> Result<(), Error> {
        let (epoch, previous) = match newest {
            Some(bundle) => (bundle.epoch.checked_add(1).ok_or(Error::Decode)?, bundle.hash()),
            None => (1, [0; HASH_LEN]),
        };
        let keys = BundleKeys::generate(epoch, rng)?;
        let bundle = keys.bundle(self.member, epoch, previous);
        let prekey = keys.prekey(&bundle)?;
        *self.own = Some(Own { keys, bundle, prekey, publication: Publication::Unsigned });
        if let Some(group) = self.group.as_deref_mut() {
            group.accept_again(true);
        }
        *self.stage = Stage::SignBundle;
        Ok(())
    }

    fn done<'e, A: Aead>(&mut self, request: u16, out: &mut Outbox<'_, A>) -> Result<ClientStep<'e>, Error> {
        if *self.stage == Stage::Published(request) {
            out.send(&Message::Listening)?;
            if let Some(own) = self.own {
                own.publication = Publication::Published;
            }
            *self.stage = Stage::Ready;
            return Ok(ClientStep::Event(ClientEvent::Ready));
        }
        if self.group_done(request) {
            return Ok(ClientStep::Event(ClientEvent::GroupJoined));
        }
        let wrapped = |peer: &Peer<'_>| peer.start == Start::Wrapped(request);
        match self.peers.iter().position(wrapped) {
            Some(index) => {
                if let Some(peer) = self.peers.get_mut(index) {
                    peer.start = Start::Done;
                }
                Ok(ClientStep::Event(ClientEvent::PeerReady(index)))
            }
            None => Ok(ClientStep::Io),
        }
    }

    fn refused<'e>(&mut self, request: u16, reason: Reason) -> Result<ClientStep<'e>, Error> {
        match *self.stage {
            // Without its bundle in the directory this client can do nothing: begin anew, with other keys.
            Stage::Asked(asked) | Stage::Published(asked) if asked == request => {
                *self.own = None;
                *self.stage = Stage::Closed;
                return Err(crate::error::PeerError::Refused { reason, retry_after: 0 }.into());
            }
            _ => {}
        }
        if let Some(step) = self.group_refused(request, reason) {
            return step;
        }
        let asked = |peer: &Peer<'_>| peer.start == Start::LookedUp(request) || peer.start == Start::Wrapped(request);
        match self.peers.iter().position(asked) {
            Some(index) => Ok(self.lose(index, reason)),
            None => Ok(ClientStep::Io),
        }
    }

    fn lose<'e>(&mut self, index: usize, reason: Reason) -> ClientStep<'e> {
        if let Some(peer) = self.peers.get_mut(index) {
            peer.sending = None;
            peer.start = Start::Idle;
        }
        ClientStep::Event(ClientEvent::PeerLost { peer: index, reason })
    }

    #[inline(never)]
    fn wrapped<'e, A: Aead>(
        &mut self,
        from: [u8; ID_LEN],
        wrap: &'e [u8],
        signed: SignedBundle<'e>,
        verdict: Verdict,
        out: &mut Outbox<'_, A>,
    ) -> Result<ClientStep<'e>, Error>
    where
        'c: 'e,
    {
        let Ok(header) = WrapHeader::decode(wrap) else {
            return Ok(ClientStep::Io);
        };
        let refuse = |out: &mut Outbox<'_, A>, reason| {
            out.send(&Message::Tell(refusal(header.chain_id, 0, reason)))?;
            Ok(ClientStep::Io)
        };
        let Some(own) = &self.own else {
            return refuse(out, Reason::Unavailable);
        };
        let index = self.peers.iter().position(|peer| peer.member.id == from);
        let mut peer = index.and_then(|index| self.peers.get_mut(index));
        let mut group = self.group.as_deref_mut().filter(|group| group.takes_wraps_of(&header.sid));
        // What is here comes again where its sender got no answer, whatever keys have changed since.
        let place = match (group.as_deref_mut(), peer.as_deref_mut()) {
            (Some(group), _) => match group.place(&from) {
                Some(place) if group.holds(place, &header.chain_id) => return Ok(ClientStep::Io),
                Some(place) => place,
                None => return refuse(out, Reason::NotMember),
            },
            (None, Some(peer)) if peer.conversation.sid != header.sid => return refuse(out, Reason::NotMember),
            (None, Some(peer)) if peer.receiving.is_of(&header.chain_id) => return Ok(ClientStep::Io),
            (None, Some(_)) => 0,
            (None, None) => return refuse(out, Reason::Forbidden),
        };
        let Ok(bundle) = Bundle::decode(signed.bundle) else {
            return refuse(out, Reason::Malformed);
        };
        let checked = match (peer.as_deref_mut(), group.as_deref_mut()) {
            (Some(peer), _) => check(&mut peer.view, &peer.member, &bundle, verdict),
            (None, Some(group)) => group.check_wrap(place, &bundle),
            (None, None) => Check::Refuse(Reason::Forbidden),
        };
        match (checked, peer.as_deref()) {
            (Check::Verify, Some(peer)) => {
                *self.verifying = Verifying::Peer;
                let statement = bundle.statement();
                return Ok(ClientStep::Verify { key: peer.key, statement, signature: signed.signature });
            }
            // Its sender is looked up now, and comes with another chain.
            (Check::Verify, None) => return refuse(out, Reason::Rekey),
            (Check::Refuse(reason), _) => return refuse(out, reason),
            (Check::Good, _) => {}
        }
        let mut text = [0; WRAP_LEN];
        let Some(wrap) = wrap.first_chunk::<WRAP_LEN>() else {
            return refuse(out, Reason::Malformed);
        };
        text.copy_from_slice(wrap);
        let accepted = match (group, peer) {
            _ if header.prekey_id != own.prekey.id() => Err(AcceptError::Unreadable),
            (Some(group), _) => group.take(place, &mut text, &own.prekey, &bundle),
            (None, Some(peer)) => {
                peer.receiving.replace(&mut text, &own.prekey, &peer.member, &bundle, &peer.conversation)
            }
            (None, None) => Err(AcceptError::Unreadable),
        };
        match accepted {
            Ok(()) => Ok(ClientStep::Io),
            // A chain that is older than the one that is here is that of a sender who went back.
            Err(AcceptError::Replayed) => refuse(out, Reason::Rewound),
            Err(AcceptError::Unreadable) => refuse(out, Reason::Unreadable),
        }
    }

    #[inline(never)]
    fn deliver<'e, A: Aead>(
        &mut self,
        header: &EnvelopeHeader,
        wanted: Rungs,
        payload: &'e mut [u8],
        out: &mut Outbox<'_, A>,
    ) -> Result<ClientStep<'e>, Error> {
        let of_chain = |peer: &Peer<'_>| peer.receiving.is_of(&header.chain_id);
        let index = self.peers.iter().position(of_chain);
        let Some((index, peer)) = index.and_then(|index| Some((index, self.peers.get_mut(index)?))) else {
            out.send(&Message::Tell(refusal(header.chain_id, header.n, Reason::Rekey)))?;
            return Ok(ClientStep::Io);
        };
        let me = self.member;
        let chain = &mut peer.receiving;
        let envelope = payload.get_mut(SEND_HEAD_LEN..).unwrap_or_default();
        match chain.open::<A>(envelope) {
            Ok(opened) => {
                if wanted.contains(Rung::Delivered)
                    && let Some(receipt) = chain.receipt(&me.id, Rung::Delivered, opened.n, opened.n)
                {
                    out.send(&Message::Tell(receipt))?;
                }
                if wanted.contains(Rung::Opened) {
                    *self.opened = chain.receipt(&me.id, Rung::Opened, opened.n, opened.n);
                }
                Ok(ClientStep::Event(ClientEvent::Message {
                    peer: index,
                    n: opened.n,
                    signed: opened.signed,
                    kind: opened.kind,
                    body: opened.body,
                }))
            }
            Err(OpenError::Duplicate { n }) => {
                // Its receipts were lost, or are on their way: the application has the message in either case.
                for rung in [Rung::Delivered, Rung::Opened].into_iter().filter(|rung| wanted.contains(*rung)) {
                    if let Some(receipt) = chain.receipt(&me.id, rung, n, n) {
                        out.send(&Message::Tell(receipt))?;
                    }
                }
                Ok(ClientStep::Io)
            }
            // Without records of its own, a client that forgot a message cannot tell a repetition from a rewind. Its own
            // word would be a verifiable refusal of what it may have opened, so it says so without a tag.
            Err(OpenError::Old { n, .. }) => {
                out.send(&Message::Tell(refusal(header.chain_id, n, Reason::Rewound)))?;
                Ok(ClientStep::Io)
            }
            Err(OpenError::Refused(reason)) => {
                out.send(&Message::Tell(chain.refusal(&me.id, reason, header.n, &header.salt)))?;
                Ok(ClientStep::Io)
            }
        }
    }

    #[inline(never)]
    fn told<'e>(&mut self, receipt: Receipt) -> ClientStep<'e> {
        let of_chain = |peer: &Peer<'_>| peer.sending.as_ref().is_some_and(|chain| *chain.chain_id() == receipt.chain);
        let Some(index) = self.peers.iter().position(of_chain) else {
            return self.group_told(None, receipt);
        };
        let Some(peer) = self.peers.get(index) else {
            return ClientStep::Io;
        };
        let theirs = matches!(receipt.rung, Rung::Delivered | Rung::Opened) || receipt.tag.is_some();
        if theirs {
            // PROTOCOL 10: the last two rungs are the recipient's word, or nothing at all.
            let salt = peer.sent.iter().find(|(n, _)| *n == receipt.to);
            let verified = match (&peer.sending, salt) {
                (Some(chain), Some((_, salt))) => chain.verify_receipt(&peer.member.id, &receipt, salt).is_ok(),
                _ => false,
            };
            if !verified {
                return ClientStep::Io;
            }
        }
        match (receipt.rung, receipt.reason) {
            (Rung::Refused, Some(reason)) if ends_chain(reason) => self.lose(index, reason),
            _ => ClientStep::Event(ClientEvent::Receipt { peer: index, receipt }),
        }
    }
}

/// What is to be done with a peer's bundle.
enum Check {
    Good,
    Verify,
    Refuse(Reason),
}

/// PROTOCOL 8: no older epoch, no second bundle of one epoch, no other key. A bundle that was verified once is not verified
/// again.
fn check(view: &mut Option<BundleView>, pinned: &Member, bundle: &Bundle, verdict: Verdict) -> Check {
    if bundle.member() != *pinned {
        return Check::Refuse(Reason::KeyChanged);
    }
    if view.is_some_and(|view| view.hash == bundle.hash()) {
        return Check::Good;
    }
    match verdict {
        Verdict::Open => return Check::Verify,
        Verdict::Wrong => return Check::Refuse(Reason::Unauthorised),
        Verdict::Right => {}
    }
    match view {
        None => *view = Some(BundleView::new(bundle)),
        Some(view) => {
            if view.update(bundle).is_err() {
                return Check::Refuse(Reason::Rewound);
            }
        }
    }
    Check::Good
}

impl Peer<'_> {
    fn remember(&mut self, n: u32, salt: [u8; 8]) {
        self.sent.rotate_right(1);
        if let Some(first) = self.sent.first_mut() {
            *first = (n, salt);
        }
    }
}

/// A refusal of a chain whose keys are not here: nothing can authenticate it.
const fn refusal(chain: [u8; 8], n: u32, reason: Reason) -> Receipt {
    Receipt { rung: Rung::Refused, reason: Some(reason), chain, from: n, to: n, tag: None }
}

/// Whether a refused message means that its chain leads nowhere.
const fn ends_chain(reason: Reason) -> bool {
    matches!(reason, Reason::Rekey | Reason::Rewound | Reason::Gap | Reason::Unreadable | Reason::Unknown)
}

#[cfg(test)]
mod tests;
