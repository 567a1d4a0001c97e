//! One seed: a server, its disk, three parties, the network between them, and what goes wrong.

use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use ossicle::bus::{Bus, Local};
use ossicle::clock::Clock;
use ossicle::crypto::CryptoPool;
use ossicle::gate::GateLimits;
use ossicle::mailbox::MailboxLimits;
use ossicle::resumption::ChannelKey;
use ossicle::server::{self, Config, Parts, Policy, Server};
use ossicle::store::memory::{Access, Disk, MemoryStore, Operation, Outcome};
use ossicle::store::{Meta, QueueLimits};
use ossicle::world::{Random, World};
use ossicle_core::{Rung, Rungs};
use ossicle_tests::keys;
use tokio::sync::{Notify, watch};
use turmoil::Sim;
use turmoil::net::TcpListener;

use crate::book::Book;
use crate::bus;
use crate::dice::Dice;
use crate::net::Door;
use crate::party::{self, Shared, lock};
use crate::{HEARTBEAT, PORT, TIMEOUT};

/// What can happen moves in steps of this.
const TICK: Duration = Duration::from_millis(10);
/// So long things go wrong.
const TROUBLE: Duration = Duration::from_secs(8);
/// So long after that everybody must know what became of everything.
const PATIENCE: Duration = Duration::from_secs(60);
const PARTIES: usize = 3;
const NAMES: [&str; PARTIES] = ["alice", "bob", "carol"];
/// The date at the beginning.
const DATE: i64 = 1_800_000_000;
const DAY: i64 = 24 * 60 * 60;
/// What waits for longer is refused.
const QUEUE_AGE: i64 = 30 * DAY;

/// How a seed is run.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    /// Say what happens.
    pub(crate) verbose: bool,
    /// The store says that it is done before it is.
    pub(crate) lies: bool,
}

/// What came of it.
pub(crate) struct Report {
    /// All that happened, in order.
    pub(crate) trace: Vec<String>,
    /// The promises that were broken.
    pub(crate) broken: Vec<String>,
    /// What happened how often.
    pub(crate) reached: BTreeMap<String, usize>,
    /// Simulated.
    pub(crate) time: Duration,
}

/// What the server's host is made of, each time it starts.
struct Site {
    config: Config,
    limits: QueueLimits,
    disk: Disk,
    world: World,
    stop: Notify,
    /// The servers that run, or ran last.
    servers: Mutex<Vec<Weak<Server>>>,
    /// For what becomes of hints.
    seed: u64,
}

/// How the disk is for now.
#[derive(Default)]
struct Weather {
    /// Of a hundred writes, so many find no room.
    full: AtomicU8,
    /// The next write fails, and with it the disk.
    fails: AtomicBool,
    failed: AtomicBool,
    /// Of a hundred reads, so many fail.
    unread: AtomicU8,
    slow: AtomicBool,
}

pub(crate) fn run(seed: u64, how: How) -> Report {
    let mut dice = Dice::new(seed, 2);
    let book: Shared = Arc::new(Mutex::new(Book::new(seed, PARTIES, how.verbose)));
    let mut sim = turmoil::Builder::new()
        .rng_seed(dice.next())
        .tick_duration(TICK)
        .simulation_duration(Duration::from_secs(3600))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(dice.millis(5, 120))
        .tcp_capacity(if dice.chance(50) { 64 } else { 1024 })
        .build();
    let weather = Arc::new(Weather::default());
    let date = Arc::new(AtomicI64::new(DATE));
    let short = dice.chance(30);
    lock(&book).short = short;
    lock(&book).nodes = if dice.chance(25) { 2 } else { 1 };
    let site = Arc::new(Site {
        config: Config {
            enrol: Policy::Open,
            heartbeat: HEARTBEAT.as_secs() as u16,
            timeout: TIMEOUT.as_secs() as u16,
            hello_within: Duration::from_secs(2),
            handshake_within: Duration::from_secs(5),
            farewell_within: Duration::from_secs(2),
            key_age: dice.millis(500, 5000),
            queue_age: Duration::from_secs(QUEUE_AGE as u64),
            poll: dice.millis(500, 5000),
            gate: if dice.chance(25) {
                // Under load from the first connection on.
                GateLimits { busy: 0, puzzle: 3, ..GateLimits::default() }
            } else {
                GateLimits::default()
            },
            mailbox: if dice.chance(30) {
                MailboxLimits { messages: 5, bytes: 4096, total: 6000, owed: 500 }
            } else {
                MailboxLimits::default()
            },
            ..Config::default()
        },
        limits: QueueLimits { items: if short { 10 } else { 10_000 }, ..QueueLimits::default() },
        disk: disk(seed, &weather, &book, how.lies),
        world: world(seed, &book, &date),
        stop: Notify::new(),
        servers: Mutex::default(),
        seed,
    });

    sim.host("server", {
        let (site, book) = (Arc::clone(&site), Arc::clone(&book));
        move || serve(Arc::clone(&site), Arc::clone(&book))
    });
    for (me, name) in NAMES.into_iter().enumerate() {
        let book = Arc::clone(&book);
        sim.host(name, move || party::live(me, seed, Arc::clone(&book)));
    }
    let mut run =
        Run { sim, dice, book, site, weather, date, faults: Vec::new(), restart: None, gone: BTreeMap::new() };
    run.trouble();
    run.calm();
    run.finish();
    let Run { sim, book, site, .. } = run;
    let time = sim.elapsed();
    drop(sim);
    if site.is_held() {
        lock(&book).fail("somebody holds on to the server");
    }
    let book = lock(&book);
    Report { trace: book.trace.clone(), broken: book.broken.clone(), reached: book.reached.clone(), time }
}

fn disk(seed: u64, weather: &Arc<Weather>, book: &Shared, lies: bool) -> Disk {
    let meta = Meta { server_id: [0x5e; 16], store_epoch: [3; 8] };
    let dice = Mutex::new(Dice::new(seed, 3));
    let (weather, book) = (Arc::clone(weather), Arc::clone(book));
    Disk::new(meta, move |operation| {
        let mut dice = dice.lock().unwrap();
        let of_a_hundred = |dice: &mut Dice, chance: &AtomicU8| dice.chance(chance.load(Ordering::Relaxed).into());
        let most = if weather.slow.load(Ordering::Relaxed) { 400 } else { 12 };
        let (before, after) = (dice.millis(0, most), dice.millis(0, most / 4));
        let outcome = match operation {
            Operation::Read if of_a_hundred(&mut dice, &weather.unread) => Outcome::Failed { kept: false },
            Operation::Read => Outcome::Done,
            Operation::Write if weather.fails.swap(false, Ordering::Relaxed) => {
                weather.failed.store(true, Ordering::Relaxed);
                Outcome::Failed { kept: dice.chance(50) }
            }
            Operation::Write if of_a_hundred(&mut dice, &weather.full) => Outcome::Full,
            // Once everybody is enrolled.
            Operation::Write if lies && lock(&book).now > TROUBLE / 4 => Outcome::Unflushed,
            Operation::Write => Outcome::Done,
        };
        if matches!(outcome, Outcome::Full | Outcome::Failed { .. }) {
            // It says so a while later.
            let mut book = lock(&book);
            book.refusing = Some(book.now + before + after);
        }
        Access { before, after, outcome }
    })
}

/// Time and chance of the server, all of it from the seed. Its date is set by whoever simulates.
fn world(seed: u64, book: &Shared, date: &Arc<AtomicI64>) -> World {
    let chance = Mutex::new(Dice::new(seed, 4));
    let (time, day, date) = (Arc::clone(book), Arc::clone(book), Arc::clone(date));
    let clock = Clock::new(move || lock(&time).now).with_date(move || {
        let date = date.load(Ordering::Relaxed) + lock(&day).now.as_secs() as i64;
        date.max(0) as u64
    });
    let random = Random::new(move |bytes| {
        chance.lock().unwrap().fill(bytes);
        Ok(())
    });
    World { clock, random }
}

impl Site {
    /// Those that run.
    fn running(&self) -> Vec<Arc<Server>> {
        self.servers.lock().unwrap().iter().filter_map(Weak::upgrade).collect()
    }

    fn is_held(&self) -> bool {
        !self.running().is_empty()
    }
}

/// The server or servers of one machine, until it is told to stop or crashes.
async fn serve(site: Arc<Site>, book: Shared) -> turmoil::Result {
    if site.is_held() {
        lock(&book).fail("somebody holds on to the server that crashed");
    }
    let store = match MemoryStore::open(&site.disk, site.limits) {
        Ok(store) => Arc::new(store),
        Err(error) => {
            lock(&book).fail(format_args!("the store of a former start is still in use: {error}"));
            return Ok(());
        }
    };
    site.servers.lock().unwrap().clear();
    let (stop, stopped) = watch::channel(false);
    let stop = async {
        site.stop.notified().await;
        stop.send_replace(true);
    };
    if lock(&book).nodes == 1 {
        let (served, ()) = tokio::join!(node(&site, &book, PORT, store, Arc::new(Local), stopped), stop);
        return served;
    }
    let [here, there] = bus::new(site.seed, &book);
    let (one, other, ()) = tokio::join!(
        node(&site, &book, PORT, Arc::clone(&store), here, stopped.clone()),
        node(&site, &book, PORT + 1, store, there, stopped),
        stop
    );
    one.and(other)
}

/// One server.
async fn node(
    site: &Site,
    book: &Shared,
    port: u16,
    store: Arc<MemoryStore>,
    bus: Arc<dyn Bus>,
    mut stop: watch::Receiver<bool>,
) -> turmoil::Result {
    let server = Server::new(Parts {
        config: site.config.clone(),
        store,
        identity: Arc::new(keys::server()),
        channel_key: ChannelKey::from_bytes(&[0x77; 32]),
        pool: Arc::new(CryptoPool::inline()),
        world: site.world.clone(),
        bus,
    });
    site.servers.lock().unwrap().push(Arc::downgrade(&server));
    let door = Door(TcpListener::bind(("0.0.0.0", port)).await?);
    lock(book).note("server", "listens");
    let stopped = async {
        // It fails when nobody can tell any more.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    server::run(door, Arc::clone(&server), stopped).await;
    let mut book = lock(book);
    book.note("server", "has stopped");
    let left = (server.connected(), server.connections(), server.mailbox_bytes(), Arc::strong_count(&server));
    if left != (0, 0, 0, 1) {
        book.fail(format_args!("a server that stopped left seats, connections, bytes, holders: {left:?}"));
    }
    Ok(())
}

/// What is wrong, and until when.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Nothing comes through between this party and the server.
    Apart(usize),
    /// Nothing comes through to the server.
    Mute(usize),
    /// Nothing comes through from the server.
    Deaf(usize),
    /// Everything waits.
    Held(usize),
    /// Everything takes long.
    Distant(usize),
    /// Of a hundred writes, so many find no room.
    Full(u8),
    /// Many reads fail.
    Unread,
    /// The disk takes long.
    Slow,
}

struct Run<'s> {
    sim: Sim<'s>,
    dice: Dice,
    book: Shared,
    site: Arc<Site>,
    weather: Arc<Weather>,
    date: Arc<AtomicI64>,
    faults: Vec<(Duration, Fault)>,
    /// When the server starts again.
    restart: Option<Duration>,
    /// Parties that crashed, and when they start again.
    gone: BTreeMap<usize, Duration>,
}

impl Run<'_> {
    fn step(&mut self) {
        let now = self.sim.elapsed();
        lock(&self.book).now = now;
        if let Err(error) = self.sim.step() {
            lock(&self.book).fail(format_args!("a task failed: {error}"));
        }
        for server in self.site.running() {
            let (held, total) = (server.mailbox_bytes(), self.site.config.mailbox.total);
            if held > total {
                lock(&self.book).fail(format_args!("mailboxes hold {held} bytes of {total}"));
            }
        }
        if self.restart.is_some_and(|at| at <= now) {
            self.restart = None;
            lock(&self.book).note("server", "starts");
            self.sim.bounce("server");
        }
        let back: Vec<_> = self.gone.iter().filter(|(_, at)| **at <= now).map(|(who, _)| *who).collect();
        for who in back {
            self.gone.remove(&who);
            lock(&self.book).note(who, "starts");
            self.sim.bounce(NAMES[who]);
        }
        // An operator looks after a store that has failed.
        if self.restart.is_none() && self.weather.failed.swap(false, Ordering::Relaxed) {
            lock(&self.book).note("disk", "has failed");
            let after = self.dice.millis(100, 1500);
            self.crash(false, after);
        }
    }

    /// Things go wrong.
    fn trouble(&mut self) {
        let mut next_letter = [Duration::ZERO; PARTIES];
        let stored = [(); PARTIES].map(|()| self.dice.chance(40));
        let mut next_fault = self.dice.millis(200, 1500);
        while self.sim.elapsed() < TROUBLE {
            let now = self.sim.elapsed();
            for (from, next) in next_letter.iter_mut().enumerate() {
                if *next <= now {
                    *next = now + self.dice.millis(20, 1200);
                    let to = (from + 1 + self.dice.below(PARTIES - 1)) % PARTIES;
                    let many = if self.dice.chance(10) { 12 } else { 1 + self.dice.below(3) };
                    for _ in 0..many {
                        let (wanted, len) = (wanted(&mut self.dice, stored[from]), 37 + self.dice.below(300));
                        lock(&self.book).write(from, to, wanted, len);
                    }
                }
            }
            let over: Vec<_> = self.faults.iter().filter(|(until, _)| *until <= now).map(|(_, fault)| *fault).collect();
            self.faults.retain(|(until, _)| *until > now);
            for fault in over {
                self.end(fault);
            }
            if next_fault <= now {
                next_fault = now + self.dice.millis(50, 1500);
                self.happen();
            }
            self.step();
        }
    }

    /// Everything works again; whoever waits for something gets it.
    fn calm(&mut self) {
        for (_, fault) in core::mem::take(&mut self.faults) {
            self.end(fault);
        }
        self.weather.fails.store(false, Ordering::Relaxed);
        {
            let mut book = lock(&self.book);
            book.note("world", "is calm");
            book.calm = true;
        }
        let until = self.sim.elapsed() + PATIENCE;
        while self.sim.elapsed() < until {
            for _ in 0..50 {
                self.step();
            }
            if lock(&self.book).open().is_empty() && self.site.disk.waiting() == 0 {
                return;
            }
        }
        let mut book = lock(&self.book);
        let open = book.open();
        for one in open.iter().take(5) {
            book.fail(one);
        }
        if open.len() > 5 {
            book.fail(format_args!("and so on, {} times", open.len()));
        }
        let waiting = self.site.disk.waiting();
        if waiting > 0 {
            book.fail(format_args!("{waiting} items still wait, though everybody listens"));
        }
    }

    /// Everybody goes home.
    fn finish(&mut self) {
        lock(&self.book).finish = true;
        for _ in 0..400 {
            self.step();
        }
        {
            let book = lock(&self.book);
            let running = NAMES.iter().filter(|name| self.sim.is_host_running(**name)).count();
            drop(book);
            if running > 0 {
                lock(&self.book).fail(format_args!("{running} parties do not end"));
            }
        }
        let servers = self.site.running();
        for server in &servers {
            let left = (server.connected(), server.connections(), server.mailbox_bytes());
            if left != (0, 0, 0) {
                lock(&self.book)
                    .fail(format_args!("everybody has gone, and there are seats, connections, bytes: {left:?}"));
            }
        }
        let mut book = lock(&self.book);
        if servers.len() != usize::from(book.nodes) {
            book.fail("the server does not run");
        }
        drop((servers, book));
        self.site.stop.notify_one();
        for _ in 0..600 {
            self.step();
        }
        if self.sim.is_host_running("server") {
            lock(&self.book).fail("the server does not stop");
        }
    }

    /// Something goes wrong.
    fn happen(&mut self) {
        let now = self.sim.elapsed();
        let who = self.dice.below(PARTIES);
        let fault = match self.dice.below(15) {
            0 => Fault::Apart(who),
            1 => Fault::Mute(who),
            2 => Fault::Deaf(who),
            3 => Fault::Held(who),
            4 => Fault::Distant(who),
            5 => Fault::Full(if self.dice.chance(50) { 100 } else { 30 }),
            6 => Fault::Unread,
            7 => Fault::Slow,
            8 => {
                lock(&self.book).may_lose_receipts();
                return self.weather.fails.store(true, Ordering::Relaxed);
            }
            9 | 10 => {
                let after = self.dice.millis(50, 2500);
                return self.crash(false, after);
            }
            11 | 12 => {
                let after = self.dice.millis(50, 2500);
                return self.crash(true, after);
            }
            13 => {
                if self.restart.is_none() && self.sim.is_host_running("server") {
                    lock(&self.book).note("server", "is told to stop");
                    lock(&self.book).reach("stopped");
                    self.site.stop.notify_one();
                    self.restart = Some(now + self.dice.millis(2000, 4500));
                }
                return;
            }
            _ => return self.something_else(who),
        };
        lock(&self.book).note("world", format_args!("{fault:?}"));
        lock(&self.book).reach(format_args!("{fault:?}").to_string().split('(').next().unwrap_or_default());
        self.begin(fault);
        self.faults.push((now + self.dice.millis(50, 4000), fault));
    }

    /// Whether what the server says to this party comes through, and without being held.
    fn is_heard(&self, who: usize) -> bool {
        let stops =
            |fault: &Fault| matches!(*fault, Fault::Apart(one) | Fault::Deaf(one) | Fault::Held(one) if one == who);
        !self.faults.iter().any(|(_, fault)| stops(fault))
    }

    fn begin(&mut self, fault: Fault) {
        match fault {
            Fault::Apart(who) => self.sim.partition(NAMES[who], "server"),
            Fault::Mute(who) => self.sim.partition_oneway(NAMES[who], "server"),
            Fault::Deaf(who) => self.sim.partition_oneway("server", NAMES[who]),
            Fault::Held(who) => self.sim.hold(NAMES[who], "server"),
            Fault::Distant(who) => {
                self.sim.set_link_max_message_latency(NAMES[who], "server", Duration::from_millis(1000));
            }
            Fault::Full(share) => {
                lock(&self.book).may_lose_receipts();
                self.weather.full.store(share, Ordering::Relaxed);
            }
            Fault::Unread => {
                lock(&self.book).unread = true;
                self.weather.unread.store(40, Ordering::Relaxed);
            }
            Fault::Slow => self.weather.slow.store(true, Ordering::Relaxed),
        }
    }

    fn something_else(&mut self, who: usize) {
        let now = self.sim.elapsed();
        if self.dice.chance(60) {
            if !self.gone.contains_key(&who) && self.sim.is_host_running(NAMES[who]) {
                lock(&self.book).note(who, "crashes");
                lock(&self.book).reach("a party crashed");
                self.sim.crash(NAMES[who]);
                self.gone.insert(who, now + self.dice.millis(20, 2000));
            }
            return;
        }
        let days = self.dice.below(80) as i64 - 40;
        lock(&self.book).note("world", format_args!("the date jumps by {days} days"));
        lock(&self.book).reach("the date jumped");
        self.date.fetch_add(days * DAY, Ordering::Relaxed);
        // Whoever was dated before a step forward, or by a clock that was behind, may be older than it was.
        lock(&self.book).may_expire = true;
        lock(&self.book).jumps += 1;
        lock(&self.book).may_lose_receipts();
    }

    fn end(&mut self, fault: Fault) {
        lock(&self.book).note("world", format_args!("no longer {fault:?}"));
        match fault {
            Fault::Apart(who) => self.sim.repair(NAMES[who], "server"),
            Fault::Mute(who) => self.sim.repair_oneway(NAMES[who], "server"),
            Fault::Deaf(who) => self.sim.repair_oneway("server", NAMES[who]),
            Fault::Held(who) => self.sim.release(NAMES[who], "server"),
            Fault::Distant(who) => {
                self.sim.set_link_max_message_latency(NAMES[who], "server", Duration::from_millis(50));
            }
            Fault::Full(_) => self.weather.full.store(0, Ordering::Relaxed),
            Fault::Unread => self.weather.unread.store(0, Ordering::Relaxed),
            Fault::Slow => self.weather.slow.store(false, Ordering::Relaxed),
        }
    }

    /// The server is killed, or its machine loses power, and starts again after a while.
    fn crash(&mut self, power: bool, after: Duration) {
        if self.restart.is_some() || !self.sim.is_host_running("server") {
            return;
        }
        lock(&self.book).note("server", if power { "loses power" } else { "is killed" });
        lock(&self.book).reach(if power { "lost power" } else { "killed" });
        // The order in which a runtime drops its tasks is not made of the seed, and so nothing that it says then may draw
        // lots: it waits, or it is lost.
        let links: Vec<_> = (0..PARTIES).filter(|who| power || self.is_heard(*who)).collect();
        for who in &links {
            if power {
                self.sim.partition(NAMES[*who], "server");
            } else {
                self.sim.hold(NAMES[*who], "server");
            }
        }
        self.sim.crash("server");
        for who in &links {
            if power {
                self.sim.repair(NAMES[*who], "server");
            } else {
                self.sim.release(NAMES[*who], "server");
            }
        }
        for (_, fault) in self.faults.clone() {
            self.begin(fault);
        }
        if power {
            self.site.disk.cut_power();
        }
        self.weather.failed.store(false, Ordering::Relaxed);
        self.restart = Some(self.sim.elapsed() + after);
    }
}

/// The receipts that a sender wants. What is to be stored never passes through memory alone, and nothing passes by it: so
/// there are parties that want it never.
fn wanted(dice: &mut Dice, stored: bool) -> Rungs {
    let none = Rungs::NONE;
    match dice.below(8) {
        0 | 1 if !stored => none,
        2 if !stored => none.with(Rung::Accepted),
        3..=5 if !stored => none.with(Rung::Delivered),
        6 if !stored => none.with(Rung::Accepted).with(Rung::Delivered),
        7 if !stored => none.with(Rung::Opened),
        0 => none,
        1 => none.with(Rung::Accepted),
        2 | 3 => none.with(Rung::Stored),
        4 => none.with(Rung::Delivered),
        5 => none.with(Rung::Accepted).with(Rung::Opened),
        6 => none.with(Rung::Stored).with(Rung::Delivered),
        _ => none.with(Rung::Accepted).with(Rung::Stored).with(Rung::Delivered).with(Rung::Opened),
    }
}
