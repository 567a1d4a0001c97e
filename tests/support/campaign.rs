//! Kills of a real server under load, and what must not come of them.
//!
//! Senders and recipients come and go, the server is killed at random moments and started again on its data, and a
//! [`Book`] outside of it holds it to its word: what it said is `stored` is in its store after every kill until the
//! recipient has it, every recipient gets everything once and in each sender's order, and nothing that nobody sent. The
//! mass of the load are clients that are no more than core's engine (`clients`); some are whole homes, with the outboxes
//! and inboxes that people have (`homes`). A seed decides when who comes, goes and is killed; the threads do the rest.

use core::net::SocketAddr;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use fastrand::Rng;
use ossicle::store::{ItemKind, SqliteStore, Store};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::{JoinSet, block_in_place};
use tokio::time::sleep;

use crate::cli::Running;

#[path = "campaign/clients.rs"]
mod clients;
#[path = "campaign/homes.rs"]
mod homes;

use clients::Person;

/// Nothing that works takes so long.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A campaign.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is drawn by lot is drawn from this.
    pub seed: u64,
    /// How often the server is killed, or now and then told to stop.
    pub kills: u32,
    /// Messages a second that the senders offer together.
    pub rate: u32,
    /// Senders and recipients that are no more than an engine, and whole homes.
    pub senders: usize,
    /// See `senders`.
    pub recipients: usize,
    /// See `senders`.
    pub homes: usize,
    /// How long the load lasts at most before a kill.
    pub pause: Duration,
    /// Recipients come at the end only.
    pub away: bool,
}

/// What a campaign came to.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// SIGKILLs, of which so many while the server was starting or stopping.
    pub kills: u32,
    /// See `kills`.
    pub early: u32,
    /// SIGTERMs.
    pub stops: u32,
    /// Messages that the server said are `stored`.
    pub stored: u64,
    /// Messages that recipients have, and how often one came again over the wire.
    pub given: u64,
    /// See `given`.
    pub repeated: u64,
    /// Messages between homes, each of which reached its reader once.
    pub letters: u64,
    /// Messages a second that were stored, by phase of load.
    pub rates: Vec<f64>,
    /// From the start of a process to its first line, by start, in seconds, and what waited then.
    pub restarts: Vec<(f64, u64)>,
}

impl core::fmt::Display for Figures {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { kills, early, stops, stored, given, repeated, letters, .. } = self;
        let rates = Spread::of(self.rates.iter().copied());
        let restarts = Spread::of(self.restarts.iter().map(|(seconds, _)| seconds * 1e3));
        let waiting = self.restarts.iter().map(|(_, waiting)| *waiting).max().unwrap_or_default();
        write!(
            f,
            "{kills} kills ({early} of them while it started or stopped) and {stops} stops; {stored} messages stored, {given} \
             given once, {repeated} repetitions known as such, {letters} between homes; {rates} messages stored a second \
             under load; started within {restarts} ms with up to {waiting} waiting"
        )
    }
}

/// Median, least and greatest.
struct Spread(f64, f64, f64);

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        match (values.get(values.len() / 2), values.first(), values.last()) {
            (Some(median), Some(least), Some(greatest)) => Self(*median, *least, *greatest),
            _ => Self(0.0, 0.0, 0.0),
        }
    }
}

impl core::fmt::Display for Spread {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:.0} ({:.0} to {:.0})", self.0, self.1, self.2)
    }
}

/// Messages of one sender for one recipient, by their number among them.
#[derive(Debug, Default)]
pub struct Pair {
    /// The next that is to be sent.
    next: u64,
    /// Sent, or to be sent again: nobody knows yet whether the server has them.
    open: VecDeque<Sent>,
    /// The present chain, counted, and the next number in it.
    generation: u32,
    n: u32,
    /// The server said that it has them; the recipient does not.
    stored: BTreeSet<u64>,
    /// The recipient has everything before this: the harness's own record, which is written before anything is
    /// acknowledged.
    recorded: u64,
    /// Some were refused, since nothing could be stored: those behind them may come before them.
    refused: bool,
    /// What the recipient has beyond `recorded`.
    ahead: BTreeSet<u64>,
}

/// A message as it was sent first.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    number: u64,
    generation: u32,
    n: u32,
}

/// What was said and done, and what of it cannot be.
pub struct Book {
    /// The server.
    pub address: SocketAddr,
    /// The fingerprint of its key.
    pub fingerprint: [u8; 32],
    rate: f64,
    /// Messages of a pair that the recipient may not have: together fewer than a queue takes.
    backlog: u64,
    recipients: usize,
    pairs: Vec<Mutex<Pair>>,
    /// By home: numbers that it gave to the next one, and that were read there.
    letters: Vec<(AtomicU64, AtomicU64)>,
    faults: Mutex<Vec<String>>,
    stored: AtomicU64,
    repeated: AtomicU64,
    /// Clients' connections that nobody has noticed the end of.
    connected: AtomicUsize,
    up: watch::Sender<bool>,
    /// See [`Plan`].
    away: bool,
    /// Nobody goes away any more, and nothing new is sent.
    ending: AtomicBool,
}

impl Book {
    fn new(plan: &Plan, address: SocketAddr, fingerprint: [u8; 32]) -> Arc<Self> {
        Arc::new(Self {
            address,
            fingerprint,
            rate: f64::from(plan.rate) / plan.senders.max(1) as f64,
            backlog: 8000 / plan.senders.max(1) as u64,
            recipients: plan.recipients,
            pairs: (0..plan.senders * plan.recipients).map(|_| Mutex::default()).collect(),
            letters: (0..plan.homes).map(|_| Default::default()).collect(),
            faults: Mutex::default(),
            stored: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            connected: AtomicUsize::new(0),
            up: watch::Sender::new(false),
            away: plan.away,
            ending: AtomicBool::new(false),
        })
    }

    fn pair(&self, sender: usize, recipient: usize) -> MutexGuard<'_, Pair> {
        self.pairs[sender * self.recipients + recipient].lock().expect("nobody panics with it")
    }

    fn pairs(&self) -> impl Iterator<Item = MutexGuard<'_, Pair>> {
        self.pairs.iter().map(|pair| pair.lock().expect("nobody panics with it"))
    }

    /// Notes what cannot be.
    fn fault(&self, what: impl Into<String>) {
        self.faults.lock().expect("nobody panics with it").push(what.into());
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Waits until there is a server: whoever dials before may reach himself.
    async fn is_up(&self) {
        let mut up = self.up.subscribe();
        up.wait_for(|up| *up).await.expect("the book outlives everybody");
    }

    /// The server has this.
    fn stored(&self, sender: usize, chain: [u8; 8], from: u32, to: u32) {
        let Some((_, recipient, generation)) = parse_chain(chain).filter(|(of, ..)| *of == sender) else {
            return self.fault(format!("sender {sender} is told of chain {chain:02x?}"));
        };
        let mut pair = self.pair(sender, recipient);
        let Pair { open, stored, recorded, ahead, .. } = &mut *pair;
        let mut count = 0;
        // A repetition is said to be stored again.
        open.retain(|sent| {
            let is_meant = sent.generation == generation && (from..=to).contains(&sent.n);
            if is_meant {
                count += 1;
                if sent.number >= *recorded && !ahead.contains(&sent.number) {
                    stored.insert(sent.number);
                }
            }
            !is_meant
        });
        drop(pair);
        self.stored.fetch_add(count, Ordering::Relaxed);
    }

    /// The recipient has this: it is on record now, or was before.
    fn given(&self, recipient: usize, body: &[u8], chain: [u8; 8]) {
        let Some(Body { sender, number }) = Body::decode(body) else {
            return self.fault(format!("recipient {recipient} is given what nobody sent: {body:02x?}"));
        };
        if parse_chain(chain).is_none_or(|(from, to, _)| (from, to) != (sender, recipient)) {
            return self.fault(format!("recipient {recipient} is given {number} of {sender} on chain {chain:02x?}"));
        }
        let mut pair = self.pair(sender, recipient);
        let Pair { recorded, next, stored, ahead, refused, .. } = &mut *pair;
        if (number > *recorded && !*refused) || number >= *next {
            let what = format!(
                "recipient {recipient} is given {number} of {sender}, who sent those before {next}, instead of {recorded}"
            );
            drop(pair);
            return self.fault(what);
        }
        if number < *recorded || !ahead.insert(number) {
            drop(pair);
            self.repeated.fetch_add(1, Ordering::Relaxed);
            return;
        }
        stored.remove(&number);
        while ahead.remove(recorded) {
            *recorded += 1;
        }
    }

    fn waiting(&self) -> u64 {
        self.pairs().map(|pair| pair.next - pair.recorded).sum()
    }

    /// What is missing until everybody has everything.
    fn left(&self) -> String {
        let (mut open, mut missing) = (0, 0);
        for pair in self.pairs() {
            open += pair.open.len();
            missing += pair.next - pair.recorded;
        }
        let letters: Vec<_> = self
            .letters
            .iter()
            .map(|(given, read)| given.load(Ordering::SeqCst) - read.load(Ordering::SeqCst))
            .collect();
        match (open, missing, letters.iter().all(|left| *left == 0)) {
            (0, 0, true) => String::new(),
            _ => format!("{open} not stored, {missing} not given, {letters:?} of homes not read"),
        }
    }

    /// Holds the store, which nobody uses, to what was said.
    async fn check(&self, store: &SqliteStore) {
        for recipient in 0..self.recipients {
            let items = store.queue(&recipient_id(recipient), 0, usize::MAX, usize::MAX).await;
            let items = items.expect("a queue is read");
            let mut held: HashMap<usize, Vec<u64>> = HashMap::new();
            for item in items.iter().filter(|item| item.kind == ItemKind::Envelope) {
                match Body::of_envelope(&item.bytes) {
                    Some(Body { sender, number }) => held.entry(sender).or_default().push(number),
                    None => self.fault(format!("item {} of recipient {recipient} holds what nobody sent", item.seq)),
                }
            }
            for sender in 0..self.pairs.len() / self.recipients {
                let mut held = held.remove(&sender).unwrap_or_default();
                let pair = self.pair(sender, recipient);
                held.retain(|number| *number >= pair.recorded);
                if !pair.refused && !held.is_sorted() {
                    let place = held.windows(2).find(|pair| pair[0] > pair[1]);
                    self.fault(format!("what waits of {sender} for {recipient} is not in order: {place:?}"));
                }
                let lost: Vec<_> = pair.stored.iter().filter(|number| !held.contains(number)).collect();
                if let [first, ..] = lost[..] {
                    let (count, last) = (lost.len(), lost[lost.len() - 1]);
                    self.fault(format!("stored, and lost: {count} of {sender} for {recipient}, {first} to {last}"));
                }
            }
        }
    }
}

/// What is in an envelope, readable for the harness: whose it is, and which.
struct Body {
    sender: usize,
    number: u64,
}

/// Chain, number and salt.
const ENVELOPE_HEAD: usize = 20;

impl Body {
    /// 256 bytes or a few more, now and then a page, and nothing in them by chance.
    fn encode(sender: usize, number: u64) -> Vec<u8> {
        let len = if number % 64 == 63 { 4096 } else { 240 + (number % 7) as usize };
        let mut body = vec![u8::try_from(sender).expect("few senders")];
        body.extend(number.to_be_bytes());
        let mut noise = Rng::with_seed(number ^ (sender as u64) << 56);
        body.resize_with(len, || noise.u8(..));
        body
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (sender, rest) = body.split_first()?;
        let number = u64::from_be_bytes(*rest.first_chunk()?);
        let sender = usize::from(*sender);
        (Self::encode(sender, number) == body).then_some(Self { sender, number })
    }

    fn of_envelope(envelope: &[u8]) -> Option<Self> {
        Self::decode(envelope.get(ENVELOPE_HEAD..)?)
    }
}

fn sender_id(sender: usize) -> [u8; 16] {
    [0x10 + u8::try_from(sender).expect("few senders"); 16]
}

/// The id of a recipient.
pub fn recipient_id(recipient: usize) -> [u8; 16] {
    [0x80 + u8::try_from(recipient).expect("few recipients"); 16]
}

fn chain(sender: usize, recipient: usize, generation: u32) -> [u8; 8] {
    let [a, b, c, d] = generation.to_be_bytes();
    let number = |number| u8::try_from(number).expect("few clients");
    [number(sender), number(recipient), a, b, c, d, 0x0c, 0x4a]
}

fn parse_chain(chain: [u8; 8]) -> Option<(usize, usize, u32)> {
    let [sender, recipient, a, b, c, d, 0x0c, 0x4a] = chain else { return None };
    Some((sender.into(), recipient.into(), u32::from_be_bytes([a, b, c, d])))
}

/// The server's process, again and again on the same data and port.
pub struct Place {
    folder: TempDir,
    port: u16,
    server: Option<Running>,
    /// Makes the command that is to be run with the arguments of a server.
    command: Box<dyn Fn() -> Command + Send>,
    data: PathBuf,
}

impl Place {
    /// Data in `data` if it is given, else in a directory of its own. `command` is what runs `ossicle`.
    pub fn new(rng: &mut Rng, data: Option<PathBuf>, command: impl Fn() -> Command + Send + 'static) -> Self {
        let folder = TempDir::new().expect("a temporary directory");
        // Not one of those that the system gives to whoever dials.
        let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let port = core::iter::repeat_with(|| rng.u16(10_240..32_000)).find(free).expect("a free port");
        let data = data.unwrap_or_else(|| folder.path().join("data"));
        Self { folder, port, server: None, command: Box::new(command), data }
    }

    /// Starts the server, and waits until it says where it is. Returns its URL.
    pub fn start(&mut self) -> String {
        self.spawn();
        self.server.as_ref().expect("it was started").line()
    }

    /// Starts the server.
    pub fn spawn(&mut self) {
        let mut command = (self.command)();
        command.args(["serve", "--bind", "127.0.0.1", "--rsa", "2048", "--enroll", "open", "--data"]).arg(&self.data);
        command.args(["--port", &self.port.to_string()]).env("RUST_LOG", "warn");
        for rate in ["--message-rate", "--message-burst", "--handshake-rate", "--handshake-burst"] {
            command.args([rate, "1000000000"]);
        }
        self.server = Some(Running::start(&mut command));
    }

    /// The running server.
    pub fn server(&mut self) -> &mut Running {
        self.server.as_mut().expect("it runs")
    }

    /// Ends it at once, and returns what it has logged.
    pub fn kill(&mut self) -> String {
        let mut server = self.server.take().expect("it runs");
        server.kill();
        server.wait().err
    }

    /// Tells it to stop, waits until it has, and returns what it has logged.
    pub fn stop(&mut self) -> String {
        let server = self.server.take().expect("it runs");
        server.signal("TERM");
        let done = server.wait();
        assert_eq!(done.code, Some(0), "{}", done.err);
        done.err
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A copy of the store as the server left it. What it would recover, the copy does.
    fn copy(&self) -> PathBuf {
        let copy = self.folder.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).expect("a new directory");
        for name in ["store.db", "store.db-wal"] {
            let from = self.data.join(name);
            if from.exists() {
                fs::copy(from, copy.join(name)).expect("a file is copied");
            }
        }
        copy
    }
}

/// A server, and those who use it.
pub struct Campaign {
    book: Arc<Book>,
    /// The server.
    pub place: Place,
    tasks: JoinSet<()>,
    seed: u64,
    /// Where the homes are.
    _homes: TempDir,
}

impl Campaign {
    /// Starts the server and the load.
    pub async fn begin(plan: &Plan, mut place: Place, rng: &mut Rng) -> Self {
        let url = block_in_place(|| place.start());
        let (address, fingerprint) = parse_url(&url);
        let book = Book::new(plan, address, fingerprint);
        let people = block_in_place(|| Person::all(plan.senders, plan.recipients));
        let people: Vec<_> = people.into_iter().map(Arc::new).collect();
        book.up.send_replace(true);
        for person in &people {
            clients::enrol(&book, person).await.expect("a new client is admitted");
        }
        let folder = homes::folder();
        let homes = homes::prepare(&book, &url, folder.path(), plan.homes).await;
        let mut tasks = JoinSet::new();
        for (number, person) in people.into_iter().enumerate() {
            let (number, role) = match number.checked_sub(plan.senders) {
                None => (number, clients::Role::Sender),
                Some(number) => (number, clients::Role::Recipient(HashSet::new())),
            };
            tasks.spawn(clients::live(Arc::clone(&book), number, person, role, rng.fork()));
        }
        for (number, home) in homes.into_iter().enumerate() {
            tasks.spawn(homes::home(Arc::clone(&book), number, plan.homes, home, rng.fork()));
        }
        Self { book, place, tasks, seed: plan.seed, _homes: folder }
    }

    /// How many messages were stored.
    pub fn stored(&self) -> u64 {
        self.book.stored.load(Ordering::SeqCst)
    }

    fn tell(&self) {
        let faults = self.book.faults.lock().expect("nobody panics with it");
        assert!(faults.is_empty(), "seed {}: {:#?}", self.seed, &faults[..faults.len().min(20)]);
    }

    /// Waits until it is so.
    pub async fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            let late = begun.elapsed() > DEADLINE;
            assert!(!late, "seed {}: not {what}: {}", self.seed, self.book.left());
            self.tell();
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the server has stored so many more.
    pub async fn until_stored(&mut self, more: u64) {
        let before = self.stored();
        self.until("stored", |campaign| campaign.stored() >= before + more).await;
    }

    /// Ends the server, waits until everybody has noticed, and holds what it left to what it said.
    pub async fn cut(&mut self, end: impl FnOnce(&mut Place) -> String, between: &mut dyn FnMut(&Path)) {
        self.book.up.send_replace(false);
        let log = block_in_place(|| end(&mut self.place));
        if log.contains("panicked") {
            self.book.fault(log);
        }
        self.until("noticed", |campaign| campaign.book.connected.load(Ordering::SeqCst) == 0).await;
        block_in_place(|| between(&self.place.data));
        match block_in_place(|| SqliteStore::open(&self.place.copy())) {
            Ok(store) => {
                self.book.check(&store).await;
                block_in_place(|| drop(store));
            }
            Err(error) => self.book.fault(format!("the store does not open any more: {error}")),
        }
        self.tell();
    }

    /// Starts the server again. Returns how long that took, and how much waited.
    pub fn restart(&mut self) -> (f64, u64) {
        let (begun, waiting) = (Instant::now(), self.book.waiting());
        block_in_place(|| self.place.start());
        let took = begun.elapsed().as_secs_f64();
        self.book.up.send_replace(true);
        (took, waiting)
    }

    /// Waits until everybody has everything, and ends all.
    pub async fn end(mut self, figures: &mut Figures) {
        self.book.ending.store(true, Ordering::SeqCst);
        self.until("given", |campaign| campaign.book.left().is_empty()).await;
        self.tell();
        self.tasks.shutdown().await;
        block_in_place(|| self.place.kill());
        let book = &self.book;
        figures.stored = self.stored();
        figures.given = book.pairs().map(|pair| pair.recorded).sum();
        figures.repeated = book.repeated.load(Ordering::SeqCst);
        figures.letters = book.letters.iter().map(|(_, read)| read.load(Ordering::SeqCst)).sum();
    }
}

/// Runs a campaign, and returns what it came to. `between` is done to the data whenever a server has ended; `say` hears
/// how it goes.
///
/// # Panics
/// If the server breaks its word, with all that is known of it.
pub async fn run(plan: &Plan, place: Place, mut between: impl FnMut(&Path), say: impl Fn(&str)) -> Figures {
    let mut rng = Rng::with_seed(plan.seed);
    let mut figures = Figures::default();
    let mut campaign = Campaign::begin(plan, place, &mut rng).await;
    for kill in 0..plan.kills {
        // Under load: some was stored since the last start.
        campaign.until_stored(200).await;
        let (before, begun) = (campaign.stored(), Instant::now());
        sleep(plan.pause.mul_f64(rng.f64())).await;
        let stored = campaign.stored() - before;
        if begun.elapsed() > Duration::from_millis(100) {
            figures.rates.push(stored as f64 / begun.elapsed().as_secs_f64());
        }
        let patience = Duration::from_millis(rng.u64(..80));
        let end = |place: &mut Place| match kill % 16 {
            5 => {
                figures.stops += 1;
                place.stop()
            }
            11 => {
                // While it stops.
                figures.early += 1;
                figures.kills += 1;
                place.server().signal("TERM");
                std::thread::sleep(patience);
                place.kill()
            }
            _ => {
                figures.kills += 1;
                place.kill()
            }
        };
        campaign.cut(end, &mut between).await;
        while rng.u8(..8) == 0 {
            // While it starts.
            figures.early += 1;
            figures.kills += 1;
            let patience = Duration::from_millis(rng.u64(..60));
            let start = |place: &mut Place| {
                place.spawn();
                std::thread::sleep(patience);
                place.kill()
            };
            campaign.cut(start, &mut between).await;
        }
        figures.restarts.push(campaign.restart());
        if kill % 50 == 49 {
            say(&format!("{} of {}: {} stored", kill + 1, plan.kills, campaign.stored()));
        }
    }
    campaign.end(&mut figures).await;
    figures
}

fn parse_url(url: &str) -> (SocketAddr, [u8; 32]) {
    let (address, fingerprint) =
        url.strip_prefix("ossicle://").and_then(|rest| rest.split_once('#')).expect("the server prints its URL");
    let fingerprint = fingerprint.split('.').next().unwrap_or_default();
    let fingerprint = hex::decode(fingerprint).ok().and_then(|bytes| bytes.try_into().ok());
    (address.parse().expect("an address"), fingerprint.expect("a fingerprint"))
}
