//! A device's client against a server, and a peer behind it, that do what each test says. No bytes are moved but in
//! memory, and no RSA is computed: the client asks for it, and the tests answer.

use std::collections::VecDeque;
use std::vec::Vec;

use super::*;
use crate::config::ServerConfig;
use crate::connection::Connection;
use crate::envelope::testing::TestRng;
use crate::error::PeerError;
use crate::handshake::server::ClientClaim;
use crate::wire::testing::printed;
use crate::wire::{PeerStatus, RECORD_OVERHEAD};

const SERVER: [u8; ID_LEN] = [0x5e; ID_LEN];
const DEVICE: [u8; ID_LEN] = [0xde; ID_LEN];
const OWNER: [u8; ID_LEN] = [0xa1; ID_LEN];
const STORE: [u8; 8] = [1; 8];
const SIGNATURE: [u8; 256] = [0xc5; 256];
/// The last number of the directory's that a request of the client's may have had.
const NO_REQUEST: u16 = 0xffff;

fn leaked(bytes: Vec<u8>) -> &'static mut [u8] {
    Vec::leak(bytes)
}

fn key(section: &str, name: &str) -> PublicKey<'static> {
    PublicKey::from_modulus(leaked(printed(section, name))).unwrap()
}

fn server_key() -> PublicKey<'static> {
    key("15.1", "modulus_S")
}

fn device_key() -> PublicKey<'static> {
    key("15.2", "modulus_C")
}

fn owner_key() -> PublicKey<'static> {
    key("15.1", "modulus_C")
}

fn identity() -> ClientIdentity<'static> {
    ClientIdentity { id: DEVICE, key_epoch: 2, key: device_key(), server: server_key() }
}

/// What the client came to, without what it borrowed.
#[derive(Clone, Debug, PartialEq)]
enum Came {
    Connected { resumed: bool },
    Ready,
    PeerReady(usize),
    PeerLost(usize, Reason),
    Message { n: u32, signed: bool, kind: u8, body: Vec<u8> },
    Receipt(Rung, Option<Reason>, u32),
    GroupJoined,
    GroupReady,
    GroupMessage { from: [u8; ID_LEN], n: u32, kind: u8, body: Vec<u8> },
    GroupReceipt(Option<[u8; ID_LEN]>, Rung, Option<Reason>, u32),
    GroupMemberLost([u8; ID_LEN], Reason),
    GroupLost(Reason),
    GroupOver,
    Settings(u16),
    Closed(Option<Reason>),
}

impl From<ClientEvent<'_>> for Came {
    fn from(event: ClientEvent<'_>) -> Self {
        match event {
            ClientEvent::Connected { resumed, .. } => Self::Connected { resumed },
            ClientEvent::Ready => Self::Ready,
            ClientEvent::PeerReady(peer) => Self::PeerReady(peer),
            ClientEvent::PeerLost { peer, reason } => Self::PeerLost(peer, reason),
            ClientEvent::Message { n, signed, kind, body, .. } => {
                Self::Message { n, signed, kind, body: body.to_vec() }
            }
            ClientEvent::Receipt { receipt, .. } => Self::Receipt(receipt.rung, receipt.reason, receipt.to),
            ClientEvent::GroupJoined => Self::GroupJoined,
            ClientEvent::GroupReady => Self::GroupReady,
            ClientEvent::GroupMessage { from, n, kind, body } => {
                Self::GroupMessage { from, n, kind, body: body.to_vec() }
            }
            ClientEvent::GroupReceipt { from, receipt } => {
                Self::GroupReceipt(from, receipt.rung, receipt.reason, receipt.to)
            }
            ClientEvent::GroupMemberLost { member, reason } => Self::GroupMemberLost(member, reason),
            ClientEvent::GroupLost(reason) => Self::GroupLost(reason),
            ClientEvent::GroupOver => Self::GroupOver,
            ClientEvent::Settings(settings) => Self::Settings(settings.heartbeat),
            ClientEvent::Closed(reason) => Self::Closed(reason),
        }
    }
}

/// The peer: its keys, and both directions of its conversation.
struct Owner {
    keys: BundleKeys,
    bundle: Bundle,
    conversation: Conversation,
    chain_epoch: u32,
    readings: Option<ReceivingChain<8>>,
}

impl Owner {
    fn new() -> Self {
        let member = Member { id: OWNER, key: owner_key().fingerprint() };
        let keys = BundleKeys::generate(7, &mut TestRng::new(7)).unwrap();
        let bundle = keys.bundle(&member, 3, [0; HASH_LEN]);
        let device = Member { id: DEVICE, key: device_key().fingerprint() };
        Self { keys, bundle, conversation: Conversation::direct(&member, &device, 0), chain_epoch: 0, readings: None }
    }

    /// A chain to the device with this bundle: the wrap, and the chain.
    fn chain(&mut self, device: &Bundle) -> ([u8; WRAP_LEN], SendingChain) {
        let mut rng = TestRng::new(u64::from(self.chain_epoch) + 1_000);
        let chain = SendingChain::start(&self.bundle.member(), &self.conversation, self.chain_epoch, &mut rng).unwrap();
        self.chain_epoch += 1;
        let mut wrap = [0; WRAP_LEN];
        chain.wrap(&self.keys, &self.bundle, &device.member(), device, &mut rng, &mut wrap).unwrap();
        (wrap, chain)
    }

    fn accept(&mut self, device: &Bundle, wrap: &[u8]) {
        let prekey = self.keys.prekey(&self.bundle).unwrap();
        let (mut wrap, member) = (wrap.to_vec(), device.member());
        let seen = self.readings.as_ref().map(ReceivingChain::epochs);
        self.readings = ReceivingChain::accept(&mut wrap, &prekey, &member, device, &self.conversation, seen).ok();
        assert!(self.readings.is_some(), "the wrap is good");
    }
}

fn sealed(chain: &mut SendingChain, signed: bool, body: &[u8]) -> Vec<u8> {
    let mut envelope = std::vec![0; body.len() + crate::envelope::SIGNED_OVERHEAD];
    let len = chain.seal::<RustCrypto>(signed, 5, body, &mut envelope).unwrap().len;
    envelope.truncate(len);
    envelope
}

/// The client, the server's end of its connection, and what is on the way.
struct World {
    client: Client<'static, 'static, 1>,
    rng: TestRng,
    server: Connection,
    /// The channel that the server issued last, if it keeps it.
    channel: Option<Channel>,
    issues: bool,
    store: [u8; 8],
    up: Vec<u8>,
    down: VecDeque<u8>,
    /// Messages of the client's that nobody has taken up yet.
    said: VecDeque<Vec<u8>>,
    /// What the next signatures that the client wants verified are said to be.
    verdict: bool,
    bundle: Option<Bundle>,
    owner: Owner,
    seeds: u8,
}

fn server(seed: u8) -> Connection {
    let config = ServerConfig { id: SERVER, fingerprint: server_key().fingerprint(), record_limit: 2_048 };
    Connection::server(config, &[seed; 64])
}

impl World {
    fn new() -> Self {
        let buffers = ClientBuffers {
            rx: leaked(std::vec![0; 2_048]),
            tx: leaked(std::vec![0; 1_536]),
            signature: leaked(std::vec![0; 256]),
        };
        let peer = PeerConfig { id: OWNER, key: owner_key(), oldest: None };
        Self {
            client: Client::new(identity(), &[peer], buffers, &[1; 64]).unwrap(),
            rng: TestRng::new(1),
            server: server(2),
            channel: None,
            issues: true,
            store: STORE,
            up: Vec::new(),
            down: VecDeque::new(),
            said: VecDeque::new(),
            verdict: true,
            bundle: None,
            owner: Owner::new(),
            seeds: 2,
        }
    }

    /// A world in which a chain to the owner stands, and another one back.
    fn joined() -> (Self, SendingChain) {
        let mut world = Self::new();
        world.client.start(0);
        assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: false }]));
        assert_eq!(world.answer(), [Came::Ready, Came::PeerReady(0)]);
        let bundle = world.bundle.unwrap();
        let (wrap, chain) = world.owner.chain(&bundle);
        world.say_wrap(&wrap);
        assert_eq!(world.run(), Ok(std::vec![]));
        (world, chain)
    }

    fn reconnect(&mut self) {
        self.seeds += 2;
        self.client.reconnect(&[self.seeds; 64]);
        self.server = server(self.seeds + 1);
        self.up.clear();
        self.down.clear();
        self.said.clear();
    }

    fn say(&mut self, message: &Message<'_>) {
        let mut out = [0; 2_048];
        let len = self.server.send(message, &mut out).unwrap();
        self.down.extend(&out[..len]);
    }

    fn say_wrap(&mut self, wrap: &[u8]) {
        let bundle = self.owner.bundle.encode();
        let bundle = SignedBundle { bundle: &bundle, signature: &SIGNATURE };
        self.say(&Message::WrapDelivery { from: OWNER, wrap, bundle });
    }

    fn deliver(&mut self, wanted: Rungs, envelope: &[u8]) {
        self.say(&Message::Deliver { wanted, envelope });
    }

    /// Moves bytes and answers what the client asks of its key, until nothing moves any more.
    fn run(&mut self) -> Result<Vec<Came>, Error> {
        let mut came = Vec::new();
        for _ in 0..10_000 {
            match self.client.io()? {
                Some(io) if !io.write.is_empty() => {
                    // Never all at once.
                    let len = io.write.len().min(301);
                    self.up.extend_from_slice(&io.write[..len]);
                    self.client.written(len);
                    self.serve();
                }
                Some(io) => {
                    let len = io.read.len().min(self.down.len());
                    if len == 0 {
                        return Ok(came);
                    }
                    for (to, from) in io.read.iter_mut().zip(self.down.drain(..len)) {
                        *to = from;
                    }
                    self.client.read(len)?;
                }
                None => {}
            }
            match self.client.poll(&mut self.rng)? {
                ClientStep::Io => {}
                ClientStep::Sign(_) => self.client.sign(&SIGNATURE)?,
                ClientStep::Verify { key, signature, .. } => {
                    assert!([server_key(), owner_key(), device_key()].contains(&key) && signature.len() == 256);
                    self.client.verified(self.verdict)?;
                }
                ClientStep::Event(event) => {
                    let ended = matches!(event, ClientEvent::Closed(_));
                    came.push(event.into());
                    // Nothing is left to wait for.
                    if ended {
                        return Ok(came);
                    }
                }
            }
        }
        panic!("it goes round and round, after {came:?}")
    }

    /// The server's end: the handshake with whoever comes, and messages for the test to see.
    fn serve(&mut self) {
        let mut out = [0; 2_048];
        loop {
            if self.server.ask().is_some() {
                let len = self.server.sign_server(server_key(), &[0x51; 256], &mut out).unwrap();
                self.down.extend(&out[..len]);
            }
            let (used, enters) = match self.server.receive(&mut self.up).unwrap() {
                Received::Need(_) | Received::Wait => return,
                Received::Record { used, event } => {
                    let enters = match event {
                        Event::CheckClient(claim) => {
                            assert_eq!(claim.id(), DEVICE);
                            Some(Err(claim.bytes().to_vec()))
                        }
                        Event::CheckChannel(id) => Some(Ok(id)),
                        Event::Resumed => None,
                        Event::Message(payload) => {
                            self.said.push_back(payload.to_vec());
                            None
                        }
                        _ => None,
                    };
                    (used, enters)
                }
            };
            self.up.drain(..used);
            match enters {
                Some(Ok(id)) => {
                    let held = self.channel.as_ref().filter(|channel| channel.id == id);
                    let len = self.server.answer_offer(held, &mut out).unwrap();
                    self.down.extend(&out[..len]);
                    continue;
                }
                Some(Err(claim)) => {
                    let claim = ClientClaim::decode(&claim).unwrap();
                    self.server.bind(&claim, &device_key().fingerprint()).unwrap();
                }
                None if self.server.is_connected() => continue,
                None => {}
            }
            let settings = Settings {
                channel: [self.seeds; ID_LEN],
                valid_for: if self.issues { 600 } else { 0 },
                heartbeat: 15,
                timeout: 45,
                store_epoch: self.store,
                ..Settings::default()
            };
            if let Ok(len) = self.server.accept(&settings, &mut out) {
                self.down.extend(&out[..len]);
                if let Some(channel) = self.server.take_channel() {
                    self.channel = Some(channel);
                }
            }
        }
    }

    /// The next message of the client's.
    fn next(&mut self) -> Vec<u8> {
        self.said.pop_front().expect("the client has said something")
    }

    /// What the client last asked for, and how its bundle is.
    fn asked(&mut self) -> u16 {
        let payload = self.next();
        match Message::decode(&payload).unwrap() {
            Message::Lookup(Lookup { request, .. }) | Message::Wrap { request, .. } => request,
            Message::Publish { request, .. } => request,
            other => panic!("{other:?} asks for nothing"),
        }
    }

    fn tell_of(&mut self, request: u16, id: [u8; ID_LEN], bundle: Option<&Bundle>, signature: &[u8]) {
        let bundle = bundle.map(Bundle::encode);
        let bundle = bundle.as_ref().map(|bundle| SignedBundle { bundle, signature });
        let entry = DirectoryEntry {
            id,
            name: "somebody",
            key_epoch: 0,
            record_limit: 2_048,
            status: PeerStatus::Online,
            modulus: None,
            bundle,
        };
        self.say(&Message::LookupResponse { request, entry });
    }

    /// Answers what the client said first as an honest server and owner do. Whether there was anything.
    fn reply(&mut self) -> bool {
        let Some(payload) = self.said.pop_front() else { return false };
        match Message::decode(&payload).unwrap() {
            Message::Lookup(lookup) if lookup.subject == Subject::Id(DEVICE) => {
                let bundle = self.bundle;
                self.tell_of(lookup.request, DEVICE, bundle.as_ref(), &SIGNATURE);
            }
            Message::Lookup(lookup) => {
                assert!(lookup.subject == Subject::Id(OWNER) && lookup.bundle && !lookup.key);
                let bundle = self.owner.bundle;
                self.tell_of(lookup.request, OWNER, Some(&bundle), &SIGNATURE);
            }
            Message::Publish { request, bundle } => {
                assert_eq!(bundle.signature, SIGNATURE);
                self.bundle = Some(Bundle::decode(bundle.bundle).unwrap());
                self.say(&Message::Done { request });
            }
            Message::Wrap { request, to, wrap, bundle } => {
                let own = self.bundle.unwrap();
                assert_eq!((to, bundle.bundle), (OWNER, &own.encode()[..]));
                self.owner.accept(&own, wrap);
                self.say(&Message::Done { request });
            }
            Message::Listening => {}
            other => panic!("{other:?} is not expected here"),
        }
        true
    }

    /// The same until nothing is left to answer.
    fn answer(&mut self) -> Vec<Came> {
        let mut came = Vec::new();
        while self.reply() {
            came.extend(self.run().unwrap());
        }
        came
    }

    /// The receipt that the client tells next.
    fn told(&mut self) -> Receipt {
        let payload = self.next();
        match Message::decode(&payload).unwrap() {
            Message::Tell(receipt) => receipt,
            other => panic!("{other:?} is no receipt"),
        }
    }

    fn is_silent(&mut self) -> bool {
        self.run() == Ok(Vec::new()) && self.said.is_empty()
    }
}

mod group_tests;

fn both() -> Rungs {
    Rungs::NONE.with(Rung::Delivered).with(Rung::Opened)
}

fn is_told(receipt: &Receipt, chain: &SendingChain, envelope: &[u8]) -> bool {
    let salt = EnvelopeHeader::decode(envelope).unwrap().salt;
    chain.verify_receipt(&DEVICE, receipt, &salt).is_ok()
}

#[test]
fn a_client_joins_and_sends_and_learns_what_became_of_it() {
    let (mut world, _) = World::joined();
    assert!(world.client.is_ready(0) && !world.client.is_ready(1));
    let wanted = both();
    let n = world.client.send(0, wanted, false, 5, b"21.50C").unwrap();
    let signed = world.client.send(0, wanted, true, 6, b"signed").unwrap();
    assert_eq!((n, signed), (0, 1));
    assert!(world.run().unwrap().is_empty());
    let mut receipts = Vec::new();
    for (n, (kind, body)) in (0..).zip([(5, &b"21.50C"[..]), (6, b"signed")]) {
        let mut payload = world.next();
        assert!(matches!(Message::decode(&payload), Ok(Message::Send { wanted: rungs, .. }) if rungs == wanted));
        let readings = world.owner.readings.as_mut().unwrap();
        let opened = readings.open::<RustCrypto>(&mut payload[SEND_HEAD_LEN..]).unwrap();
        assert_eq!((opened.n, opened.signed, opened.kind, opened.body), (n, n == 1, kind, body));
        receipts.push(readings.receipt(&OWNER, Rung::Delivered, n, n).unwrap());
    }
    let chain = receipts[0].chain;
    let servers = |rung, reason| Receipt { rung, reason, chain, from: 0, to: 0, tag: None };
    let mut forged = receipts[1];
    forged.tag = Some([0; 16]);
    for (receipt, expected) in [
        (servers(Rung::Accepted, None), Some((Rung::Accepted, None, 0))),
        (receipts[0], Some((Rung::Delivered, None, 0))),
        (servers(Rung::Refused, Some(Reason::QueueFull)), Some((Rung::Refused, Some(Reason::QueueFull), 0))),
        // The recipient's word, or nothing at all; of this chain, or of none; of what was sent.
        (servers(Rung::Delivered, None), None),
        (servers(Rung::Opened, None), None),
        (forged, None),
        (Receipt { rung: Rung::Opened, ..receipts[0] }, None),
        (Receipt { chain: [0; 8], ..servers(Rung::Accepted, None) }, None),
        (Receipt { to: 77, ..receipts[1] }, None),
        (receipts[1], Some((Rung::Delivered, None, 1))),
    ] {
        world.say(&Message::Told(receipt));
        let expected = expected.map(|(rung, reason, to)| Came::Receipt(rung, reason, to));
        assert_eq!(world.run(), Ok(Vec::from_iter(expected)), "{receipt:?}");
    }
    // The owner has forgotten the chain: another one has to start.
    world.say(&Message::Told(servers(Rung::Refused, Some(Reason::Rekey))));
    assert_eq!(world.run(), Ok(std::vec![Came::PeerLost(0, Reason::Rekey)]));
    assert!(!world.client.is_ready(0));
    assert_eq!(world.client.send(0, wanted, false, 5, b"lost"), Err(ApiMisuse::NotConnected.into()));
    world.client.start(0);
    world.client.start(7);
    assert!(world.run().unwrap().is_empty());
    assert_eq!(world.answer(), [Came::PeerReady(0)]);
    assert_eq!(world.owner.readings.as_ref().unwrap().epochs(), (1, 1));
    assert_eq!(world.client.send(0, wanted, false, 5, b"again"), Ok(0));
}

#[test]
fn a_chain_is_renewed_where_one_stands() {
    let mut world = World::new();
    world.client.renew(0);
    world.client.renew(1);
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::Ready], "there was nothing to renew");
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, b""), Err(ApiMisuse::NotConnected.into()));
    world.client.start(0);
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::PeerReady(0)]);
    world.client.start(0);
    assert!(world.is_silent(), "it stands already");
    world.client.renew(0);
    assert!(!world.client.is_ready(0));
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::PeerReady(0)]);
    assert_eq!(world.owner.readings.as_ref().unwrap().epochs(), (1, 1));
}

#[test]
fn a_message_is_opened_once_and_acknowledged_each_time() {
    let (mut world, mut chain) = World::joined();
    let unsigned = sealed(&mut chain, false, b"report");
    world.deliver(Rungs::NONE, &unsigned);
    let message = |n, signed, body: &[u8]| Came::Message { n, signed, kind: 5, body: body.to_vec() };
    assert_eq!(world.run(), Ok(std::vec![message(0, false, b"report")]));
    assert!(world.said.is_empty(), "no receipt was wanted");

    let signed = sealed(&mut chain, true, b"led on");
    world.deliver(both(), &signed);
    assert_eq!(world.run(), Ok(std::vec![message(1, true, b"led on")]));
    for rung in [Rung::Delivered, Rung::Opened] {
        let receipt = world.told();
        assert_eq!((receipt.rung, receipt.from, receipt.to), (rung, 1, 1));
        assert!(is_told(&receipt, &chain, &signed));
    }
    // Again: the same receipts, and nothing for the application.
    world.deliver(Rungs::NONE.with(Rung::Opened), &signed);
    assert_eq!(world.run(), Ok(std::vec![]));
    let receipt = world.told();
    assert!(receipt.rung == Rung::Opened && is_told(&receipt, &chain, &signed) && world.said.is_empty());

    // Another text under the same number, and one that is too far ahead: both refused in the device's own word.
    let mut rewound = signed.clone();
    rewound[12] ^= 1;
    let mut ahead = signed.clone();
    ahead[8..12].copy_from_slice(&1_000_u32.to_be_bytes());
    for (envelope, reason) in [(rewound, Reason::Rewound), (ahead, Reason::Gap)] {
        world.deliver(both(), &envelope);
        assert_eq!(world.run(), Ok(std::vec![]));
        let receipt = world.told();
        assert_eq!((receipt.rung, receipt.reason), (Rung::Refused, Some(reason)));
        assert_eq!(is_told(&receipt, &chain, &envelope), reason == Reason::Rewound, "a number that was sealed");
    }
    // Of a chain that is not here; and no envelope at all.
    let mut unknown = signed.clone();
    unknown[0] ^= 1;
    world.deliver(both(), &unknown);
    assert_eq!(world.run(), Ok(std::vec![]));
    let receipt = world.told();
    assert_eq!((receipt.reason, receipt.to, receipt.tag), (Some(Reason::Rekey), 1, None));
    world.deliver(both(), &signed[..20]);
    assert!(world.is_silent());

    // So long ago that its salt is forgotten: nobody can tell a repetition from a rewind, and nothing is vouched for.
    for _ in 0..20 {
        let envelope = sealed(&mut chain, false, b"");
        world.deliver(Rungs::NONE, &envelope);
    }
    assert_eq!(world.run().unwrap().len(), 20);
    world.deliver(both(), &signed);
    assert_eq!(world.run(), Ok(std::vec![]));
    let receipt = world.told();
    assert_eq!((receipt.reason, receipt.to, receipt.tag), (Some(Reason::Rewound), 1, None));
    assert!(world.said.is_empty());
}

#[test]
fn what_waited_is_acknowledged_when_the_application_has_had_it() {
    let (mut world, mut chain) = World::joined();
    let acknowledged = |world: &mut World| {
        let payload = world.next();
        match Message::decode(&payload) {
            Ok(Message::Acknowledge { seq }) => seq,
            other => panic!("{other:?} acknowledges nothing"),
        }
    };
    let envelope = sealed(&mut chain, false, b"waited");
    world.say(&Message::Waited { seq: 9, at: 1 });
    assert!(world.is_silent(), "nothing has come yet");
    world.deliver(Rungs::NONE, &envelope);
    assert_eq!(world.run().unwrap().len(), 1);
    assert_eq!(acknowledged(&mut world), 9);
    // A wrap, whether it is taken or not, and a receipt wait, too.
    let bundle = world.bundle.unwrap();
    let (wrap, _) = world.owner.chain(&bundle);
    for seq in [10, 11] {
        world.say(&Message::Waited { seq, at: 1 });
        world.say_wrap(&wrap);
        assert_eq!(world.run(), Ok(std::vec![]));
        assert_eq!(acknowledged(&mut world), seq);
    }
    world.say(&Message::Waited { seq: 12, at: 1 });
    world.say(&Message::Told(refusal([0; 8], 0, Reason::Expired)));
    assert_eq!(world.run(), Ok(std::vec![]));
    assert_eq!(acknowledged(&mut world), 12);
    assert!(world.is_silent());
}

#[test]
fn a_wrap_is_taken_from_a_peer_only_and_refused_with_its_reason() {
    let (mut world, _) = World::joined();
    let (bundle, other) = (world.bundle.unwrap(), Owner::new());
    let (wrap, _) = world.owner.chain(&bundle);
    let owner = world.owner.bundle;
    let refused = |world: &mut World, from, wrap: &[u8], bundle: &[u8], reason: Option<Reason>| {
        world.say(&Message::WrapDelivery { from, wrap, bundle: SignedBundle { bundle, signature: &SIGNATURE } });
        assert_eq!(world.run(), Ok(std::vec![]));
        match reason {
            Some(reason) => {
                let receipt = world.told();
                assert_eq!((receipt.rung, receipt.reason, receipt.tag), (Rung::Refused, Some(reason), None));
                assert_eq!(receipt.chain, WrapHeader::decode(wrap).unwrap().chain_id);
            }
            None => assert!(world.said.is_empty()),
        }
    };
    refused(&mut world, [0x33; ID_LEN], &wrap, &owner.encode(), Some(Reason::Forbidden));
    refused(&mut world, OWNER, &wrap, &owner.encode()[1..], Some(Reason::Malformed));
    refused(&mut world, OWNER, &wrap[1..], &owner.encode(), None);
    let changed = Bundle { key: [9; HASH_LEN], ..owner };
    refused(&mut world, OWNER, &wrap, &changed.encode(), Some(Reason::KeyChanged));
    // Another bundle of his: its signature decides, then whether it goes back.
    let newer = other.keys.bundle(&owner.member(), 4, owner.hash());
    world.verdict = false;
    refused(&mut world, OWNER, &wrap, &newer.encode(), Some(Reason::Unauthorised));
    world.verdict = true;
    let older = other.keys.bundle(&owner.member(), 2, [0; HASH_LEN]);
    refused(&mut world, OWNER, &wrap, &older.encode(), Some(Reason::Rewound));
    // Made for another bundle of the sender's, for another prekey, or spoilt.
    refused(&mut world, OWNER, &wrap, &newer.encode(), Some(Reason::Unreadable));
    let mut other_prekey = wrap;
    other_prekey[31] ^= 1;
    refused(&mut world, OWNER, &other_prekey, &newer.encode(), Some(Reason::Unreadable));
    // The one that stands, and what was taken before, are not answered.
    world.owner.keys = other.keys;
    world.owner.bundle = newer;
    let (wrap, mut chain) = world.owner.chain(&bundle);
    refused(&mut world, OWNER, &wrap, &newer.encode(), None);
    refused(&mut world, OWNER, &wrap, &newer.encode(), None);
    // Nor if a newer bundle was seen since.
    let newest = Owner::new().keys.bundle(&owner.member(), 5, newer.hash());
    refused(&mut world, OWNER, &other_prekey, &newest.encode(), Some(Reason::Unreadable));
    refused(&mut world, OWNER, &wrap, &newer.encode(), None);
    world.deliver(Rungs::NONE, &sealed(&mut chain, true, b"led on"));
    assert!(matches!(world.run().unwrap()[..], [Came::Message { n: 0, signed: true, .. }]));
}

#[test]
fn a_chain_that_cannot_start_is_told_with_its_reason_and_may_start_again() {
    let owner = Owner::new();
    let bundle = owner.bundle;
    let no_point = Bundle { prekey: [0; HASH_LEN], ..bundle };
    let changed = Bundle { key: [9; HASH_LEN], ..bundle };
    let mut world = World::new();
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::Ready]);
    let cases: [(Option<&Bundle>, bool, Reason); 4] = [
        (None, true, Reason::Unknown),
        (Some(&changed), true, Reason::KeyChanged),
        (Some(&bundle), false, Reason::Unauthorised),
        (Some(&no_point), true, Reason::Malformed),
    ];
    for (found, verdict, reason) in cases {
        world.client.start(0);
        assert!(world.run().unwrap().is_empty());
        let request = world.asked();
        world.verdict = verdict;
        // What nobody asked for changes nothing.
        world.tell_of(NO_REQUEST, OWNER, Some(&bundle), &SIGNATURE);
        world.say(&Message::Done { request: NO_REQUEST });
        world.say(&Message::Refused { request: NO_REQUEST, reason: Reason::Rate, retry_after: None });
        assert!(world.is_silent());
        world.tell_of(request, OWNER, found, &SIGNATURE);
        assert_eq!(world.run(), Ok(std::vec![Came::PeerLost(0, reason)]));
    }
    world.verdict = true;
    // Half a bundle.
    world.client.start(0);
    world.run().unwrap();
    let request = world.asked();
    let half = bundle.encode();
    let entry = DirectoryEntry {
        id: OWNER,
        name: "alice",
        key_epoch: 0,
        record_limit: 2_048,
        status: PeerStatus::Online,
        modulus: None,
        bundle: Some(SignedBundle { bundle: &half[..100], signature: &SIGNATURE }),
    };
    world.say(&Message::LookupResponse { request, entry });
    assert_eq!(world.run(), Ok(std::vec![Came::PeerLost(0, Reason::Malformed)]));
    // Refused by the server: the question, and then the wrap.
    world.client.start(0);
    world.run().unwrap();
    let request = world.asked();
    world.say(&Message::Refused { request, reason: Reason::Rate, retry_after: Some(9) });
    assert_eq!(world.run(), Ok(std::vec![Came::PeerLost(0, Reason::Rate)]));
    world.client.start(0);
    world.run().unwrap();
    let request = world.asked();
    // The bundle whose prekey was no point is the newest that was seen: this one is not older, and another.
    let next = owner.keys.bundle(&bundle.member(), 4, no_point.hash());
    world.tell_of(request, OWNER, Some(&next), &SIGNATURE);
    assert_eq!(world.run(), Ok(std::vec![]));
    let request = world.asked();
    world.say(&Message::Refused { request, reason: Reason::Offline, retry_after: None });
    assert_eq!(world.run(), Ok(std::vec![Came::PeerLost(0, Reason::Offline)]));
    assert!(!world.client.is_ready(0));
}

#[test]
fn a_directory_cannot_make_up_a_bundle_of_this_client() {
    let client = || {
        let mut world = World::new();
        world.run().unwrap();
        let request = world.asked();
        (world, request)
    };
    // One of the client's, from an earlier start: the next epoch names it.
    let earlier = World::joined().0.bundle.unwrap();
    let (mut world, request) = client();
    world.tell_of(request, DEVICE, Some(&earlier), &SIGNATURE);
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::Ready]);
    let bundle = world.bundle.unwrap();
    assert_eq!((bundle.epoch, bundle.previous), (2, earlier.hash()));

    let (mut world, request) = client();
    world.verdict = false;
    world.tell_of(request, DEVICE, Some(&earlier), &SIGNATURE);
    assert_eq!(world.run(), Err(Error::Crypto));
    let (mut world, request) = client();
    world.tell_of(request, DEVICE, Some(&Owner::new().bundle), &SIGNATURE);
    assert_eq!(world.run(), Err(Error::Crypto));
    let (mut world, request) = client();
    world.tell_of(request, DEVICE, Some(&Bundle { epoch: u32::MAX, ..earlier }), &SIGNATURE);
    assert_eq!(world.run(), Err(Error::Decode), "there is no epoch behind it");

    // Refused, whether to ask or to publish: nothing is left to do on this connection.
    let refused = PeerError::Refused { reason: Reason::Unavailable, retry_after: 0 };
    let (mut world, request) = client();
    world.say(&Message::Refused { request, reason: Reason::Unavailable, retry_after: None });
    assert_eq!(world.run(), Err(refused.into()));
    let (mut world, request) = client();
    world.tell_of(request, DEVICE, None, &[]);
    world.run().unwrap();
    let request = world.asked();
    world.say(&Message::Refused { request, reason: Reason::Unavailable, retry_after: None });
    assert_eq!(world.run(), Err(refused.into()));
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_was() {
    let (mut world, mut chain) = World::joined();
    let first = world.bundle.unwrap();
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, b"one"), Ok(0));
    world.reconnect();
    assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: true }]));
    assert_eq!(Message::decode(&world.next()), Ok(Message::Listening));
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, b"two"), Ok(1), "the chain goes on");
    world.deliver(Rungs::NONE, &sealed(&mut chain, false, b"still"));
    assert_eq!(world.run().unwrap().len(), 1);

    // A resumption that issues no channel leaves the one that was used.
    world.issues = false;
    for _ in 0..2 {
        world.reconnect();
        assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: true }]));
    }
    world.issues = true;
    // A server whose store is another does not know the bundle any more: it is published again, and not made anew.
    world.store = [2; 8];
    world.said.clear();
    world.reconnect();
    assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: true }]));
    assert_eq!(world.answer(), [Came::Ready]);
    assert_eq!(world.bundle, Some(first));

    // Two resumptions that break in a row, and then one without.
    for offers in [true, true, false] {
        world.reconnect();
        let hello = loop {
            match world.client.io().unwrap() {
                Some(io) => break io.write.to_vec(),
                None => assert!(matches!(world.client.poll(&mut world.rng), Ok(ClientStep::Io))),
            }
        };
        assert_eq!(hello[83] == 1, offers);
        world.client.written(hello.len());
    }
    world.reconnect();
    assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: false }]));
    world.reconnect();
    assert_eq!(world.run(), Ok(std::vec![Came::Connected { resumed: true }]), "the new one");
}

#[test]
fn what_was_under_way_when_a_connection_broke_begins_again() {
    // Broken off after so many answers of the server's: about its own bundle, the publication, the owner's bundle.
    for answers in 0..4 {
        let mut world = World::new();
        world.client.start(0);
        world.run().unwrap();
        for _ in 0..answers {
            assert!(world.reply());
            world.run().unwrap();
        }
        assert!(!world.client.is_ready(0), "{answers}");
        world.reconnect();
        world.run().unwrap();
        assert_eq!(world.answer().last(), Some(&Came::PeerReady(0)), "{answers}");
        assert!(world.client.send(0, Rungs::NONE, false, 0, b"there").is_ok());
    }
}

#[test]
fn a_bundle_whose_publication_was_not_answered_is_published_again_and_no_other() {
    let (mut world, _) = World::joined();
    let first = world.bundle.unwrap();
    // A restored server does not know it any more, and each time something comes between it and its answer.
    world.store = [2; 8];
    world.bundle = None;
    for closes in [false, true, false] {
        world.reconnect();
        world.run().unwrap();
        let payload = world.next();
        let Ok(Message::Publish { bundle, .. }) = Message::decode(&payload) else { panic!("{payload:?}") };
        assert_eq!((bundle.bundle, bundle.signature), (&first.encode()[..], &SIGNATURE[..]));
        assert!(world.is_silent(), "nothing else until it is answered");
        if closes {
            let mut out = [0; 64];
            let len = world.server.close(Some(Reason::Unavailable), &mut out).unwrap();
            world.down.extend(&out[..len]);
            assert_eq!(world.run().unwrap().len(), 1);
        }
    }
    world.reconnect();
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::Ready]);
    assert_eq!(world.bundle, Some(first));

    // One that was never signed is made anew: nobody has seen it.
    let mut world = World::new();
    world.run().unwrap();
    assert!(world.reply());
    while !matches!(world.client.poll(&mut world.rng), Ok(ClientStep::Sign(_))) {
        let Ok(Some(io)) = world.client.io() else { continue };
        let len = io.read.len().min(world.down.len());
        for (to, from) in io.read.iter_mut().zip(world.down.drain(..len)) {
            *to = from;
        }
        world.client.read(len).unwrap();
    }
    world.reconnect();
    world.run().unwrap();
    assert_eq!(world.answer(), [Came::Ready]);
    assert_eq!(world.bundle.unwrap().epoch, 1);
}

#[test]
fn signs_of_life_settings_and_what_a_later_version_says() {
    let (mut world, _) = World::joined();
    world.client.heartbeat().unwrap();
    world.run().unwrap();
    assert!(matches!(Message::decode(&world.next()), Ok(Message::Status { .. })));
    world.say(&Message::Status { request: 4711 });
    assert_eq!(world.run(), Ok(std::vec![]));
    assert_eq!(Message::decode(&world.next()), Ok(Message::StatusResponse { request: 4711 }));
    world.say(&Message::Settings(Settings { heartbeat: 99, ..Settings::default() }));
    assert_eq!(world.run(), Ok(std::vec![Came::Settings(99)]));
    // A code that does not exist, and one that only clients say: both are passed over.
    let mut out = [0; 64];
    let len = world.server.send_sealed(Rungs::NONE, 8, &mut out, |_| Ok::<_, Error>(())).unwrap();
    world.down.extend(&out[..len]);
    world.say(&Message::Listening);
    assert!(world.is_silent());
}

#[test]
fn either_side_may_end_it() {
    let (mut world, _) = World::joined();
    world.client.close(Some(Reason::Unavailable)).unwrap();
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, b"late"), Err(ApiMisuse::NotConnected.into()));
    let Ok(Some(io)) = world.client.io() else { panic!("there is something to write") };
    let mut bytes = io.write.to_vec();
    let closed = world.server.receive(&mut bytes);
    assert!(matches!(closed, Ok(Received::Record { event: Event::Closed(Some(Reason::Unavailable)), .. })));
    assert_eq!(world.client.close(None), Err(ApiMisuse::Closed.into()));

    let (mut world, _) = World::joined();
    let mut out = [0; 64];
    let len = world.server.close(Some(Reason::TakenOver), &mut out).unwrap();
    world.down.extend(&out[..len]);
    assert_eq!(world.run(), Ok(std::vec![Came::Closed(Some(Reason::TakenOver))]));
    assert_eq!(world.client.read(0), Ok(()), "the end was said");
    let (mut world, _) = World::joined();
    assert_eq!(world.client.read(0), Err(PeerError::Truncated.into()), "the end was not said");
}

#[test]
fn what_was_not_asked_is_not_answered() {
    let mut world = World::new();
    let not_asked = Err(ApiMisuse::NotAsked.into());
    assert_eq!(world.client.sign(&SIGNATURE), not_asked);
    assert_eq!(world.client.sign(&SIGNATURE[1..]), Err(ApiMisuse::InvalidArgument.into()));
    assert_eq!(world.client.verified(true), not_asked);
    // While a signature is being verified nothing goes on; a wrong one of the server's ends it.
    world.verdict = false;
    assert_eq!(world.run(), Err(Error::Crypto));
    let (mut world, _) = World::joined();
    assert_eq!(world.client.sign(&SIGNATURE), not_asked);
    assert_eq!(world.client.verified(false), not_asked);
}

#[test]
fn a_message_that_no_record_holds_is_not_sealed() {
    let (mut world, _) = World::joined();
    let max = 2_048 - RECORD_OVERHEAD - SEND_HEAD_LEN;
    for (signed, overhead) in [(false, 37), (true, 101)] {
        let too_long = Err(BufferError::MessageTooLong { max: max - overhead }.into());
        assert_eq!(world.client.send(0, Rungs::NONE, signed, 0, &std::vec![7; max - overhead + 1]), too_long);
    }
    // One that a record holds and the buffer does not: there is no waiting for that much room, but the number is not lost.
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, &[7; 1_500]), Err(BufferError::TxFull.into()));
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, &[7; 1_400]), Ok(0));
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, &[7; 1_000]), Err(BufferError::TxFull.into()));
    world.run().unwrap();
    assert_eq!(world.client.send(0, Rungs::NONE, false, 0, &[7; 1_000]), Ok(1));
}

#[test]
fn a_client_needs_its_buffers_and_a_place_for_each_peer() {
    let new = |rx: usize, tx: usize, signature: usize, peers: usize| {
        let buffers = ClientBuffers {
            rx: leaked(std::vec![0; rx]),
            tx: leaked(std::vec![0; tx]),
            signature: leaked(std::vec![0; signature]),
        };
        let peer = PeerConfig { id: OWNER, key: owner_key(), oldest: Some(Owner::new().bundle) };
        Client::<1>::new(identity(), &std::vec![peer; peers], buffers, &[1; 64]).err()
    };
    assert_eq!(new(1_024, 1_024, 256, 1), None);
    assert_eq!(new(1_024, 1_024, 256, 0), None);
    assert_eq!(new(1_023, 1_024, 256, 1), Some(BufferError::RxFull.into()));
    assert_eq!(new(1_024, 1_023, 256, 1), Some(BufferError::TxFull.into()));
    assert_eq!(new(1_024, 1_024, 255, 1), Some(BufferError::RxFull.into()));
    assert_eq!(new(1_024, 1_024, 256, 2), Some(ApiMisuse::InvalidArgument.into()));
}
