//! Two whole clients of devices, a server that keeps what it took until it is acknowledged, and a link that moves any number
//! of bytes at a time and breaks at any of them.
//!
//! Applications do what the documentation says: they start what is lost, and come again where a connection ends. Then
//! nothing arrives that was not sent, nothing twice and nothing out of order; while nobody restarts, everything arrives that
//! the server took; a receipt is given by whom it is of; and however bad it was, two clients that are left in peace talk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::LazyLock;

use ossicle::crypto::{IdentityKey, verify};
use ossicle_core::{
    Ask, BufferError, Bundle, Channel, Client, ClientBuffers, ClientEvent, ClientIdentity, ClientStep, Connection,
    DirectoryEntry, Drive, EnvelopeHeader, Error, Event, Lookup, Message, PeerConfig, PeerError, PeerStatus, PublicKey,
    Reason, Receipt, Received, Rung, Rungs, ServerConfig, Settings, SignedBundle, Subject, WrapHeader,
};
use ossicle_tests::{Rng, SERVER_ID, keys, public, seed};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::Reached;

/// Bytes of a device's buffers.
const ROOM: usize = 1024;
/// What a server leaves unacknowledged at a time: a device without storage knows the last sixteen messages again, so that
/// no more may come to it twice.
const WINDOW: usize = 16;
/// Restarts of one sequence.
const RESTARTS: usize = 3;
/// How often an application starts a chain again before it waits.
const RETRIES: u8 = 4;
const IDS: [[u8; 16]; 2] = [[0xa1; 16], [0xb0; 16]];

static SERVER: LazyLock<IdentityKey> = LazyLock::new(keys::server);
static KEYS: [LazyLock<IdentityKey>; 2] = [LazyLock::new(keys::alice), LazyLock::new(keys::carol)];

fn key(device: usize) -> PublicKey<'static> {
    public(&KEYS[device])
}

#[derive(Clone, Debug)]
enum Step {
    /// This device runs until it has nothing to do, with so many bytes to a read or write.
    Run(usize, usize),
    /// The server handles what has come from this device, and gives it what waits.
    Serve(usize),
    /// Both, on both sides, until nothing moves any more.
    Settle,
    /// The application sends so many bytes.
    Send {
        device: usize,
        len: usize,
        signed: bool,
        wanted: u8,
    },
    /// The application wants a new chain.
    Renew(usize),
    /// The connection breaks; so many of the bytes that are under way still arrive, up and down.
    Break(usize, usize, usize),
    /// One end closes.
    Close(usize),
    CloseByServer(usize),
    /// The server replaces its key of the connection.
    UpdateKey(usize),
    /// The server forgets this device's channels.
    Forget(usize),
    /// The server's store is restored: it has no bundle and no channel any more.
    Restore,
    /// The device loses all that it does not keep in its identity page.
    Restart(usize),
}

/// With restarts, or without.
fn steps(restarts: bool) -> impl Strategy<Value = Vec<Step>> {
    let device = || 0_usize..2;
    let chunk = || prop_oneof![1_usize..40, Just(ROOM)];
    let step = prop_oneof![
        60 => (device(), chunk()).prop_map(|(device, chunk)| Step::Run(device, chunk)),
        60 => device().prop_map(Step::Serve),
        8 => Just(Step::Settle),
        60 => (device(), 0_usize..300, any::<bool>(), 0_u8..16)
            .prop_map(|(device, len, signed, wanted)| Step::Send { device, len, signed, wanted }),
        4 => device().prop_map(Step::Renew),
        16 => (device(), 0_usize..600, 0_usize..600).prop_map(|(device, up, down)| Step::Break(device, up, down)),
        2 => device().prop_map(Step::Close),
        2 => device().prop_map(Step::CloseByServer),
        4 => device().prop_map(Step::UpdateKey),
        2 => device().prop_map(Step::Forget),
        3 => Just(Step::Restore),
        16 => device().prop_map(move |device| if restarts { Step::Restart(device) } else { Step::Settle }),
    ];
    // Most sequences begin where both are ready: what comes before is short.
    (any::<bool>(), vec(step, 1..60)).prop_map(|(settled, mut steps)| {
        if settled {
            steps.insert(0, Step::Settle);
        }
        steps
    })
}

fn rungs(bits: u8) -> Rungs {
    let all = [Rung::Accepted, Rung::Stored, Rung::Delivered, Rung::Opened];
    let wanted = all.into_iter().enumerate().filter(|(bit, _)| bits & 1 << bit != 0);
    wanted.fold(Rungs::NONE, |rungs, (_, rung)| rungs.with(rung))
}

/// Bytes under way, and whether the link is broken behind them.
#[derive(Default)]
struct Link {
    up: Vec<u8>,
    down: Vec<u8>,
    is_broken: bool,
}

/// What waits at the server.
enum Item {
    Envelope { wanted: Rungs, envelope: Vec<u8> },
    Wrap { from: usize, wrap: Vec<u8>, bundle: (Vec<u8>, Vec<u8>) },
    Told(Receipt),
}

/// What the server has of one device.
struct Account {
    /// The present connection, and how many there were.
    connection: Connection,
    connections: u8,
    rx: Vec<u8>,
    held: Vec<Channel>,
    bundle: Option<(Vec<u8>, Vec<u8>)>,
    is_listening: bool,
    queue: VecDeque<(u64, Item)>,
    last: u64,
    /// The highest number that was delivered on this connection.
    delivered: u64,
    /// Envelopes of this device that were taken.
    taken: BTreeSet<([u8; 8], u32)>,
}

struct Server {
    accounts: [Account; 2],
    /// Whose chain it is.
    chains: BTreeMap<[u8; 8], usize>,
    store_epoch: u8,
    issued: u8,
    /// Somebody made new keys.
    has_new_keys: bool,
}

fn connection(number: u8) -> Connection {
    let config = ServerConfig { id: SERVER_ID, fingerprint: public(&SERVER).fingerprint(), record_limit: 16_408 };
    Connection::server(config, &seed(number))
}

impl Server {
    fn new() -> Self {
        let account = || Account {
            connection: connection(1),
            connections: 1,
            rx: Vec::new(),
            held: Vec::new(),
            bundle: None,
            is_listening: false,
            queue: VecDeque::new(),
            last: 0,
            delivered: 0,
            taken: BTreeSet::new(),
        };
        Self {
            accounts: [account(), account()],
            chains: BTreeMap::new(),
            store_epoch: 1,
            issued: 0,
            has_new_keys: false,
        }
    }

    /// The device comes again.
    fn reconnect(&mut self, device: usize) {
        let account = &mut self.accounts[device];
        account.connections = account.connections.wrapping_add(1);
        account.connection = connection(account.connections);
        account.rx.clear();
        account.is_listening = false;
        account.delivered = 0;
    }

    /// Handles what has come, delivers what waits; true if anything was done.
    fn serve(&mut self, device: usize, link: &mut Link) -> bool {
        let mut is_busy = !link.up.is_empty();
        self.accounts[device].rx.append(&mut link.up);
        let mut rx = core::mem::take(&mut self.accounts[device].rx);
        let mut at = 0;
        loop {
            match self.accounts[device].connection.receive(&mut rx[at..]) {
                Ok(Received::Need(_) | Received::Wait) => break,
                Ok(Received::Record { used, event }) => {
                    at += used;
                    self.event(device, event, link);
                }
                Err(error) => panic!("an honest device: {error:?}"),
            }
        }
        rx.drain(..at);
        self.accounts[device].rx = rx;
        is_busy |= self.flush(device, link);
        is_busy
    }

    fn event(&mut self, device: usize, event: Event<'_>, link: &mut Link) {
        let mut out = [0; 4096];
        let account = &mut self.accounts[device];
        let connection = &mut account.connection;
        let len = match event {
            Event::Progress => 0,
            Event::CheckChannel(id) => {
                let held = account.held.iter().find(|channel| channel.id == id);
                connection.answer_offer(held, &mut out).unwrap()
            }
            Event::CheckClient(claim) => {
                let statement = connection.bind(&claim, &key(device).fingerprint()).unwrap();
                assert!(claim.id() == IDS[device] && verify(key(device).modulus(), &statement, claim.signature()));
                self.accept(device, None, &mut out)
            }
            Event::Resumed => {
                let used = account.held.iter().find(|channel| channel.client == IDS[device]).cloned();
                self.accept(device, used, &mut out)
            }
            Event::Message(payload) => {
                let payload = payload.to_vec();
                return self.message(device, Message::decode(&payload).expect("a message"), link);
            }
            Event::Closed(_) => {
                account.is_listening = false;
                connection.close(None, &mut out).unwrap_or(0)
            }
            _ => panic!("no event of a server"),
        };
        link.down.extend(&out[..len]);
        let connection = &mut self.accounts[device].connection;
        if let Some(Ask::Sign(statement)) = connection.ask() {
            let signature = SERVER.sign(&statement).unwrap();
            let len = connection.sign_server(public(&SERVER), &signature, &mut out).unwrap();
            link.down.extend(&out[..len]);
        }
    }

    /// Lets the device in. The channel that was used stays beside the new one, until that one is used.
    fn accept(&mut self, device: usize, used: Option<Channel>, out: &mut [u8]) -> usize {
        self.issued = self.issued.wrapping_add(1);
        let settings = Settings {
            channel: [self.issued; 16],
            valid_for: 604_800,
            store_epoch: [self.store_epoch; 8],
            ..ossicle_tests::settings()
        };
        let account = &mut self.accounts[device];
        let len = account.connection.accept(&settings, out).unwrap();
        let issued = account.connection.take_channel();
        account.held = used.into_iter().chain(issued).collect();
        len
    }

    fn send(&mut self, device: usize, message: &Message<'_>, link: &mut Link) {
        let mut out = [0; 4096];
        let len = self.accounts[device].connection.send(message, &mut out).unwrap();
        link.down.extend(&out[..len]);
    }

    fn message(&mut self, device: usize, message: Message<'_>, link: &mut Link) {
        match message {
            Message::Lookup(Lookup { request, bundle: true, key: false, subject: Subject::Id(id) }) => {
                let whose = IDS.iter().position(|known| *known == id).expect("one of the two");
                let bundle = self.accounts[whose].bundle.clone();
                let bundle = bundle.as_ref().map(|(bundle, signature)| SignedBundle { bundle, signature });
                let (status, modulus) = (PeerStatus::Online, None);
                let entry =
                    DirectoryEntry { id, name: "sensor-01", key_epoch: 0, record_limit: 1024, status, modulus, bundle };
                self.send(device, &Message::LookupResponse { request, entry }, link);
            }
            Message::Publish { request, bundle } => {
                let read = Bundle::decode(bundle.bundle).unwrap();
                assert!(verify(key(device).modulus(), &read.statement(), bundle.signature), "it signs its bundle");
                let account = &mut self.accounts[device];
                if let Some((former, _)) = &account.bundle {
                    let former = Bundle::decode(former).unwrap();
                    let follows = read.epoch == former.epoch + 1 && read.previous == former.hash();
                    assert!(follows || read == former, "one bundle follows another");
                    self.has_new_keys |= follows;
                }
                account.bundle = Some((bundle.bundle.to_vec(), bundle.signature.to_vec()));
                self.send(device, &Message::Done { request }, link);
            }
            Message::Listening => self.accounts[device].is_listening = true,
            Message::Wrap { request, to, wrap, bundle } => {
                assert_eq!(to, IDS[1 - device]);
                let owner = *self.chains.entry(WrapHeader::decode(wrap).unwrap().chain_id).or_insert(device);
                assert_eq!(owner, device);
                let bundle = (bundle.bundle.to_vec(), bundle.signature.to_vec());
                self.queue(1 - device, Item::Wrap { from: device, wrap: wrap.to_vec(), bundle });
                self.send(device, &Message::Done { request }, link);
            }
            Message::Send { wanted, envelope } => {
                let header = EnvelopeHeader::decode(envelope).unwrap();
                assert_eq!(self.chains.get(&header.chain_id), Some(&device), "a chain that was wrapped");
                assert!(self.accounts[device].taken.insert((header.chain_id, header.n)), "a number is used once");
                self.queue(1 - device, Item::Envelope { wanted, envelope: envelope.to_vec() });
                for rung in [Rung::Accepted, Rung::Stored].into_iter().filter(|rung| wanted.contains(*rung)) {
                    let (chain, n) = (header.chain_id, header.n);
                    self.queue(device, Item::Told(Receipt { rung, reason: None, chain, from: n, to: n, tag: None }));
                }
            }
            Message::Tell(receipt) => {
                if let Some(sender) = self.chains.get(&receipt.chain) {
                    assert_eq!(*sender, 1 - device, "a receipt for what the other has sent");
                    self.queue(*sender, Item::Told(receipt));
                }
            }
            Message::Acknowledge { seq } => {
                let account = &mut self.accounts[device];
                assert!(seq <= account.delivered, "only what was delivered is acknowledged");
                account.queue.retain(|(number, _)| *number > seq);
            }
            other => panic!("a device does not say {other:?}"),
        }
    }

    fn queue(&mut self, device: usize, item: Item) {
        let account = &mut self.accounts[device];
        account.last += 1;
        account.queue.push_back((account.last, item));
    }

    /// Delivers what waits, as far as it may; true if there was anything.
    fn flush(&mut self, device: usize, link: &mut Link) -> bool {
        let account = &mut self.accounts[device];
        if !account.is_listening || !account.connection.is_connected() {
            return false;
        }
        let mut is_busy = false;
        let mut out = [0; 4096];
        for (seq, item) in account.queue.iter().take(WINDOW).filter(|(seq, _)| *seq > account.delivered) {
            let message = match item {
                Item::Envelope { wanted, envelope } => Message::Deliver { wanted: *wanted, envelope },
                Item::Wrap { from, wrap, bundle: (bundle, signature) } => {
                    Message::WrapDelivery { from: IDS[*from], wrap, bundle: SignedBundle { bundle, signature } }
                }
                Item::Told(receipt) => Message::Told(*receipt),
            };
            for message in [Message::Waited { seq: *seq, at: 1_790_000_000 }, message] {
                let len = account.connection.send(&message, &mut out).unwrap();
                link.down.extend(&out[..len]);
            }
            is_busy = true;
        }
        account.delivered =
            account.delivered.max(account.queue.iter().take(WINDOW).map(|(seq, _)| *seq).max().unwrap_or(0));
        is_busy
    }
}

/// What an application sent.
struct Sent {
    chain: usize,
    n: u32,
    signed: bool,
    body: Vec<u8>,
}

struct Buffers {
    rx: [u8; ROOM],
    tx: [u8; ROOM],
    signature: [u8; 256],
}

impl Buffers {
    const fn new() -> Self {
        Self { rx: [0; ROOM], tx: [0; ROOM], signature: [0; 256] }
    }
}

struct Device<'b> {
    client: Client<'b, 'static, 1>,
    rng: Rng,
    /// Numbers the seeds of its connections.
    connections: u8,
    is_closed: bool,
    /// The bundle of this start is published.
    is_ready: bool,
    /// It had a connection since it started.
    was_connected: bool,
    resumed: bool,
    /// How often its application starts what is lost.
    retries: u8,
    /// Chains that its application was told of.
    chains: usize,
    sent: Vec<Sent>,
    /// Places in what the other has sent.
    received: Vec<usize>,
    /// The best that was told of each message.
    told: BTreeMap<(usize, u32), Rung>,
}

struct World<'b, 'r> {
    devices: [Device<'b>; 2],
    links: [Link; 2],
    server: Server,
    spare: Vec<&'b mut Buffers>,
    starts: u8,
    reached: &'r Reached,
}

fn client<'b>(device: usize, buffers: &'b mut Buffers, number: u8) -> Client<'b, 'static, 1> {
    let identity = ClientIdentity { id: IDS[device], key_epoch: 0, key: key(device), server: public(&SERVER) };
    let peer = PeerConfig { id: IDS[1 - device], key: key(1 - device), oldest: None };
    let buffers = ClientBuffers { rx: &mut buffers.rx, tx: &mut buffers.tx, signature: &mut buffers.signature };
    let mut client = Client::new(identity, &[peer], buffers, &seed(number)).unwrap();
    client.start(0);
    client
}

impl<'b, 'r> World<'b, 'r> {
    fn new(mut spare: Vec<&'b mut Buffers>, reached: &'r Reached) -> Self {
        let devices = [0, 1].map(|device| Device {
            client: client(device, spare.pop().unwrap(), 10 + device as u8),
            rng: Rng::new(10 + device as u8),
            connections: 100 * device as u8,
            is_closed: false,
            is_ready: false,
            was_connected: false,
            resumed: false,
            retries: RETRIES,
            chains: 0,
            sent: Vec::new(),
            received: Vec::new(),
            told: BTreeMap::new(),
        });
        let links = [Link::default(), Link::default()];
        Self { devices, links, server: Server::new(), spare, starts: 12, reached }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Run(device, chunk) => {
                self.run(device, chunk);
            }
            Step::Serve(device) => {
                self.serve(device);
            }
            Step::Settle => self.settle(),
            Step::Send { device, len, signed, wanted } => {
                self.send(device, len, signed, rungs(wanted));
            }
            Step::Renew(device) => self.devices[device].client.renew(0),
            Step::Break(device, up, down) => self.cut(device, up, down),
            Step::Close(device) => {
                let device = &mut self.devices[device];
                match device.client.close(Some(Reason::Unavailable)) {
                    Ok(()) => self.reached.note("closed by the device"),
                    Err(Error::Misuse(_) | Error::Buffer(BufferError::TxFull)) => {}
                    Err(error) => panic!("{error:?}"),
                }
                device.is_closed = true;
            }
            Step::CloseByServer(device) if !self.links[device].is_broken => {
                let mut out = [0; 64];
                let reason = Some(Reason::TakenOver);
                if let Ok(len) = self.server.accounts[device].connection.close(reason, &mut out) {
                    self.links[device].down.extend(&out[..len]);
                }
            }
            Step::UpdateKey(device) if !self.links[device].is_broken => {
                let mut out = [0; 64];
                if let Ok(len) = self.server.accounts[device].connection.update_key(&mut out) {
                    self.links[device].down.extend(&out[..len]);
                    self.reached.note("key updated");
                }
            }
            Step::Forget(device) => self.server.accounts[device].held.clear(),
            // A device whose bundle is not published yet would publish one that its peer takes for an old one: what it
            // needs then is a person (PROTOCOL 8.5).
            Step::Restore if self.devices.iter().all(|device| device.is_ready) => {
                self.server.store_epoch += 1;
                for device in [0, 1] {
                    self.cut(device, 0, 0);
                    self.server.accounts[device].bundle = None;
                    self.server.accounts[device].held.clear();
                    self.devices[device].is_ready = false;
                }
                self.reached.note("store restored");
            }
            Step::Restart(device) if self.devices[device].is_ready => {
                let Some(buffers) = self.spare.pop() else { return };
                self.starts += 1;
                let former = &mut self.devices[device];
                former.client = client(device, buffers, self.starts);
                former.rng = Rng::new(self.starts);
                former.is_closed = false;
                former.is_ready = false;
                former.was_connected = false;
                self.links[device] = Link::default();
                self.server.reconnect(device);
                self.reached.note("restarted");
            }
            Step::CloseByServer(_) | Step::UpdateKey(_) | Step::Restore | Step::Restart(_) => {}
        }
    }

    fn cut(&mut self, device: usize, up: usize, down: usize) {
        let link = &mut self.links[device];
        link.up.truncate(up);
        link.down.truncate(down);
        link.is_broken = true;
        // What still arrives is handled, and nobody gets the answer.
        self.server.serve(device, &mut Link { up: core::mem::take(&mut link.up), ..Link::default() });
    }

    fn serve(&mut self, device: usize) -> bool {
        !self.links[device].is_broken && self.server.serve(device, &mut self.links[device])
    }

    /// The connection has ended, and the device comes again.
    fn reconnect(&mut self, device: usize) {
        self.links[device] = Link::default();
        self.server.reconnect(device);
        let device = &mut self.devices[device];
        device.connections = device.connections.wrapping_add(1);
        device.client.reconnect(&seed(device.connections));
        device.is_closed = false;
    }

    /// Runs the device until there is nothing for it to do; true if it did anything.
    fn run(&mut self, device: usize, chunk: usize) -> bool {
        let mut is_busy = false;
        // More than any sequence needs: a device that goes on for so long goes on for ever.
        for _ in 0..100_000 {
            match self.turn(device, chunk) {
                Ok(true) => is_busy = true,
                Ok(false) => return is_busy,
                Err(error) => {
                    assert_eq!(error, PeerError::Truncated.into(), "an honest server, and a link that breaks");
                    self.reached.note("broken");
                    self.reconnect(device);
                    is_busy = true;
                }
            }
        }
        panic!("the device goes on for ever");
    }

    /// Moves bytes once, or handles something; false if there was neither.
    fn turn(&mut self, device: usize, chunk: usize) -> Result<bool, Error> {
        let (link, end) = (&mut self.links[device], &mut self.devices[device]);
        if let Some(io) = end.client.io()? {
            if !io.write.is_empty() {
                let len = io.write.len().min(chunk);
                // A broken link takes bytes as well, for a while.
                link.up.extend(&io.write[..if link.is_broken { 0 } else { len }]);
                end.client.written(len);
                return Ok(true);
            }
            let len = io.read.len().min(chunk).min(link.down.len());
            if len > 0 {
                io.read[..len].copy_from_slice(&link.down[..len]);
                link.down.drain(..len);
                end.client.read(len)?;
                return Ok(true);
            }
            if link.is_broken {
                end.client.read(0)?;
            } else if !end.is_closed {
                return Ok(false);
            }
        }
        if end.is_closed {
            self.reconnect(device);
            return Ok(true);
        }
        self.poll(device)?;
        Ok(true)
    }

    fn poll(&mut self, device: usize) -> Result<(), Error> {
        let [a, b] = &mut self.devices;
        let (end, other) = if device == 0 { (a, b) } else { (b, a) };
        match end.client.poll(&mut end.rng)? {
            ClientStep::Io => {}
            ClientStep::Sign(statement) => {
                let signature = KEYS[device].sign(&statement).unwrap();
                match end.client.sign(&signature) {
                    Ok(()) | Err(Error::Buffer(BufferError::TxFull)) => {}
                    Err(error) => panic!("what was asked for is taken: {error:?}"),
                }
            }
            ClientStep::Verify { key, statement, signature } => {
                let is_right = verify(key.modulus(), &statement, signature);
                assert!(is_right, "everybody signs honestly");
                end.client.verified(true)?;
            }
            ClientStep::Event(event) => match event {
                ClientEvent::Connected { resumed, .. } => {
                    assert_eq!(resumed, self.server.accounts[device].connection.is_resumed());
                    assert!(end.was_connected || !resumed, "nothing is left of an earlier start");
                    end.was_connected = true;
                    end.resumed = resumed;
                    // Its bundle stood already, or is published next.
                    end.is_ready |= self.server.accounts[device].bundle.is_some() && resumed;
                    self.reached.note(if resumed { "resumed" } else { "connected" });
                }
                ClientEvent::Ready => {
                    end.is_ready = true;
                    self.reached.note("ready");
                }
                ClientEvent::PeerReady(0) => {
                    end.chains += 1;
                    self.reached.note("peer ready");
                }
                ClientEvent::PeerLost { peer: 0, reason } => {
                    // Before it has published, nobody knows it; with new keys, it cannot read what was wrapped before.
                    let expected = reason == Reason::Unknown || self.server.has_new_keys;
                    assert!(expected, "lost without a reason: {reason:?}");
                    self.reached.note(if reason == Reason::Unknown { "peer unknown" } else { "peer lost" });
                    // Not for ever: an application waits before it tries again.
                    if end.retries > 0 {
                        end.retries -= 1;
                        end.client.start(0);
                    }
                }
                ClientEvent::Message { peer: 0, n, signed, kind: 5, body } => {
                    let place = other.sent.iter().position(|sent| sent.body == body).expect("nobody sent that");
                    let sent = &other.sent[place];
                    assert_eq!((n, signed), (sent.n, sent.signed));
                    let newest = end.received.last().copied();
                    assert!(newest.is_none_or(|newest| newest < place), "nothing twice, nothing out of order");
                    end.received.push(place);
                    self.reached.note("message arrived");
                }
                ClientEvent::Receipt { peer: 0, receipt } => {
                    let Receipt { rung, reason, from, to, .. } = receipt;
                    assert!(rung != Rung::Refused || self.server.has_new_keys, "refused without a reason: {reason:?}");
                    for n in from..=to {
                        let place = end.sent.iter().position(|sent| (sent.chain, sent.n) == (end.chains, n));
                        let place = place.expect("a receipt for what was never sent");
                        if matches!(rung, Rung::Delivered | Rung::Opened) {
                            assert!(other.received.contains(&place), "it says so before it was true");
                        }
                        let told = end.told.entry((end.chains, n)).or_insert(rung);
                        *told = (*told).max(rung);
                    }
                    self.reached.note("receipt");
                }
                ClientEvent::Closed(_) => {
                    self.reached.note("closed by the server");
                    end.is_closed = true;
                }
                other => panic!("{other:?}"),
            },
            _ => panic!("no step of a client"),
        }
        Ok(())
    }

    /// The application sends, if it can; returns the place of what it sent.
    fn send(&mut self, device: usize, len: usize, signed: bool, wanted: Rungs) -> Option<usize> {
        let end = &mut self.devices[device];
        // No two bodies are alike.
        let mut body = format!("{device}, {:05}.", end.sent.len()).into_bytes();
        body.resize(body.len() + len, b'.');
        let is_ready = end.client.is_ready(0);
        match end.client.send(0, wanted, signed, 5, &body) {
            Ok(n) => {
                assert!(is_ready);
                end.sent.push(Sent { chain: end.chains, n, signed, body });
                self.reached.note("sent");
                return Some(end.sent.len() - 1);
            }
            Err(Error::Buffer(BufferError::TxFull)) => self.reached.note("no room to send"),
            Err(Error::Misuse(_)) => assert!(!is_ready),
            Err(error) => panic!("{error:?}"),
        }
        None
    }

    /// Everybody does what there is to do, until nothing moves any more.
    fn settle(&mut self) {
        for device in &mut self.devices {
            device.retries = RETRIES;
        }
        for _ in 0..1000 {
            let mut is_busy = false;
            for device in [0, 1] {
                is_busy |= self.run(device, ROOM);
                is_busy |= self.serve(device);
            }
            if !is_busy {
                return;
            }
        }
        panic!("it never comes to rest");
    }

    /// Everybody is left in peace: then they talk, and the next connection needs no RSA.
    fn end(&mut self) {
        for device in [0, 1] {
            self.cut(device, 0, 0);
        }
        self.settle();
        for device in [0, 1] {
            let wanted = rungs(0b1111);
            // A chain to somebody who restarted is found out by its first message.
            let opened = (0..3).any(|_| {
                self.devices[device].client.start(0);
                self.settle();
                let Some(place) = self.send(device, 20, true, wanted) else { return false };
                let chain = self.devices[device].chains;
                self.settle();
                let sent = &self.devices[device].sent[place];
                let opened = self.devices[device].told.get(&(chain, sent.n)) == Some(&Rung::Opened);
                assert_eq!(opened, self.devices[1 - device].received.contains(&place));
                opened
            });
            assert!(opened, "two that are left in peace talk");
        }
        for device in [0, 1] {
            let account = &self.server.accounts[device];
            assert!(account.queue.is_empty(), "everything is acknowledged");
            if !self.server.has_new_keys {
                let other = &self.devices[1 - device];
                assert_eq!(account.taken.len(), other.received.len(), "what the server took has arrived");
            }
            self.cut(device, 0, 0);
        }
        self.settle();
        for device in &self.devices {
            assert!(device.resumed && device.client.is_ready(0), "nothing is lost with a connection");
        }
    }
}

fn run(steps: Vec<Step>, reached: &Reached) {
    let mut buffers: Vec<_> = (0..2 + RESTARTS).map(|_| Buffers::new()).collect();
    let mut world = World::new(buffers.iter_mut().collect(), reached);
    for step in steps {
        world.step(step);
    }
    world.end();
}

const REGRESSIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/properties/client.regressions");

#[test]
fn while_nobody_restarts_all_that_the_server_took_arrives_once_and_in_order() {
    let must_reach = [
        "broken",
        "closed by the device",
        "closed by the server",
        "connected",
        "key updated",
        "message arrived",
        "no room to send",
        "peer ready",
        "peer unknown",
        "ready",
        "receipt",
        "resumed",
        "sent",
        "store restored",
    ];
    crate::check(REGRESSIONS, 128, &must_reach, &steps(false), run);
}

#[test]
fn whoever_restarts_nothing_arrives_twice_and_in_the_end_they_talk() {
    let must_reach = [
        "broken",
        "closed by the device",
        "closed by the server",
        "connected",
        "key updated",
        "message arrived",
        "no room to send",
        "peer lost",
        "peer ready",
        "peer unknown",
        "ready",
        "receipt",
        "restarted",
        "resumed",
        "sent",
        "store restored",
    ];
    crate::check(REGRESSIONS, 128, &must_reach, &steps(true), run);
}
