//! Who may begin a handshake, and who has to work for one: what a stranger can cost a server.
//!
//! Connections are counted from the moment they are accepted: all of them, those in their handshake, and those of each
//! source. Where many are in their handshake newcomers are dropped at random, more of them the more there are, so that a
//! flood fills no queue that a client would stand in too. Under load, a client that brings no channel gets a cookie and a
//! puzzle instead of a signature (PROTOCOL 4.11); nothing is kept for it. What failed or stalled goes on counting against
//! its source for a while. All of it is decided on counts, a clock and a seed, so that it can be tested and simulated.

use core::hash::BuildHasher;
use core::net::IpAddr;
use core::time::Duration;
use std::collections::{HashMap, HashSet};
use std::hash::RandomState;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ossicle_core::{COOKIE_LEN, CookieKey, Presented, Secret};

use crate::clock::Clock;
use crate::limits::source_key;
use crate::world::{Random, World};

/// How many may come in at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateLimits {
    /// Connections at a time, of clients and strangers.
    pub connections: usize,
    /// Connections that may be in their handshake at a time.
    pub unauthenticated: usize,
    /// So many of them mean load: newcomers are dropped at random, and strangers asked for work.
    pub busy: usize,
    /// Connections of one source that may be in their handshake at a time.
    pub per_source: usize,
    /// Zero bits of the puzzle that is set under load, at most [`ossicle_core::MAX_PUZZLE_BITS`]; 0 sets none.
    pub puzzle: u8,
}

impl Default for GateLimits {
    fn default() -> Self {
        Self { connections: 65_536, unauthenticated: 8192, busy: 2048, per_source: 512, puzzle: 16 }
    }
}

/// Why a connection was closed before a byte was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Turned {
    /// There are as many connections as there may be.
    #[error("there are as many connections as there may be")]
    Connections,
    /// Many are in their handshake, and this one had no luck.
    #[error("many connections are in their handshake, and some are turned away")]
    Early,
    /// As many are in their handshake as there may be.
    #[error("too many connections are in their handshake")]
    Handshakes,
    /// As many of this source are in their handshake, or failed lately, as there may be.
    #[error("too many connections of this source are in their handshake, or failed lately")]
    Source,
}

impl Turned {
    /// One word for it, to be counted.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Early => "early",
            Self::Handshakes => "handshakes",
            Self::Source => "source",
        }
    }
}

/// What becomes of a hello under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may go on.
    Admit,
    /// It gets this cookie and a puzzle of so many bits.
    Retry {
        /// The cookie.
        cookie: [u8; COOKIE_LEN],
        /// Its puzzle.
        bits: u8,
    },
}

/// Sources that are remembered; beyond them, sources share places.
const MAX_SOURCES: usize = 65_536;
const SHARED: u128 = 1024;
/// After this a source that has failed as often as it may has all its places back.
const FORGIVEN_WITHIN: Duration = Duration::from_secs(60);
/// What was shown once is known again for at least so long, if there is room for it.
const REMEMBERED: Duration = Duration::from_secs(120);
const MAX_REMEMBERED: usize = 65_536;
/// Cookies are made under a key for so many minutes.
const KEY_MINUTES: u64 = 2;

/// See the module.
#[derive(Debug)]
pub struct Gate {
    limits: GateLimits,
    clock: Clock,
    random: Random,
    hasher: RandomState,
    counts: Mutex<Counts>,
    cookies: Mutex<Cookies>,
}

#[derive(Debug)]
struct Counts {
    connections: usize,
    unauthenticated: usize,
    sources: HashMap<u128, Source>,
    /// Of the generator that decides who is dropped early.
    random: u64,
}

/// What a source has at the gate.
#[derive(Clone, Copy, Debug)]
struct Source {
    unauthenticated: usize,
    /// Handshakes that failed or stalled, as of `since`; they are forgiven at a steady pace.
    faults: f64,
    since: Duration,
}

impl Source {
    /// Forgives what was forgiven by now.
    #[allow(clippy::as_conversions, clippy::cast_precision_loss, reason = "a count of connections")]
    fn forgive(&mut self, now: Duration, per_source: usize) {
        let pace = per_source as f64 / FORGIVEN_WITHIN.as_secs_f64();
        let elapsed = now.saturating_sub(self.since).as_secs_f64();
        self.faults = (self.faults - elapsed * pace).max(0.0);
        self.since = now;
    }
}

/// What is needed to know cookies and hellos again.
#[derive(Debug)]
struct Cookies {
    /// Which [`KEY_MINUTES`] these keys are for, and their keys: of these and of the ones before.
    period: u64,
    current: Key,
    former: Key,
    worked: Seen,
    offered: Seen,
}

/// `None` if the system had no randomness: then nobody is asked, and no cookie known.
struct Key(Option<CookieKey>);

impl Key {
    fn fresh(random: &Random) -> Self {
        let mut bytes = [0; 32];
        Self(random.fill(&mut bytes).is_ok().then(|| CookieKey::new(Secret::new(bytes))))
    }
}

impl core::fmt::Debug for Key {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Key")
    }
}

/// Names that were seen in the last while: in two halves, of which the older is forgotten in turn.
#[derive(Debug, Default)]
struct Seen {
    since: Duration,
    recent: HashSet<[u8; 8]>,
    older: HashSet<[u8; 8]>,
}

impl Seen {
    fn age(&mut self, now: Duration) {
        let age = now.saturating_sub(self.since);
        if age >= REMEMBERED {
            self.older = core::mem::take(&mut self.recent);
            if age >= REMEMBERED * 2 {
                self.older = HashSet::new();
            }
            self.since = now;
        }
    }

    fn contains(&self, name: &[u8; 8]) -> bool {
        self.recent.contains(name) || self.older.contains(name)
    }

    /// Remembers it, while there is room. False if it was seen before.
    fn insert(&mut self, name: [u8; 8]) -> bool {
        if self.contains(&name) {
            return false;
        }
        if self.recent.len() < MAX_REMEMBERED {
            self.recent.insert(name);
        }
        true
    }
}

impl Gate {
    /// A gate that nobody has come to yet.
    pub fn new(limits: GateLimits, world: World) -> Self {
        let World { clock, random } = world;
        let mut seed = [0; 8];
        // Without randomness the same ones are dropped as the last time.
        let _ = random.fill(&mut seed);
        let now = clock.now();
        let seed = u64::from_le_bytes(seed);
        let counts = Counts { connections: 0, unauthenticated: 0, sources: HashMap::new(), random: seed };
        let seen = || Seen { since: now, ..Seen::default() };
        let cookies = Cookies {
            period: minute(now) / KEY_MINUTES,
            current: Key::fresh(&random),
            former: Key(None),
            worked: seen(),
            offered: seen(),
        };
        let (counts, cookies) = (Mutex::new(counts), Mutex::new(cookies));
        Self { limits, clock, random, hasher: RandomState::new(), counts, cookies }
    }

    /// Somebody has connected. The ticket counts him until it is dropped.
    ///
    /// # Errors
    /// [`Turned`]: close the connection without a word.
    pub fn knock(self: &Arc<Self>, address: IpAddr) -> Result<Ticket, Turned> {
        let now = self.clock.now();
        let mut counts = self.counts();
        if counts.connections >= self.limits.connections {
            return Err(Turned::Connections);
        }
        if counts.unauthenticated >= self.limits.unauthenticated {
            return Err(Turned::Handshakes);
        }
        let key = self.key(&counts, address);
        let per_source = self.limits.per_source;
        let fresh = Source { unauthenticated: 0, faults: 0.0, since: now };
        let source = counts.sources.entry(key).or_insert(fresh);
        source.forgive(now, per_source);
        if taken(source) >= per_source {
            return Err(Turned::Source);
        }
        let is_alone = taken(source) == 0;
        if self.is_unlucky(&mut counts, is_alone) {
            return Err(Turned::Early);
        }
        counts.connections += 1;
        counts.unauthenticated += 1;
        if let Some(source) = counts.sources.get_mut(&key) {
            source.unauthenticated += 1;
        }
        Ok(Ticket { gate: Arc::clone(self), source: key, entered: false })
    }

    /// Whether so many are in their handshake that strangers have to work, or so many signatures wait.
    pub fn is_busy(&self, signatures: usize) -> bool {
        let limits = &self.limits;
        limits.puzzle > 0 && (signatures >= BUSY_SIGNATURES || self.counts().unauthenticated >= limits.busy)
    }

    /// Judges what a stranger shows while the server is busy. Work is taken once.
    pub fn judge(&self, address: IpAddr, presented: &Presented) -> Verdict {
        let now = self.clock.now();
        let minute = minute(now);
        let source = source_key(address).to_be_bytes();
        let mut cookies = self.cookies();
        cookies.renew(now, minute / KEY_MINUTES, &self.random);
        let shown = [minute, minute.wrapping_sub(1)].into_iter().find_map(|minute| {
            let key = cookies.key(minute / KEY_MINUTES)?;
            key.bits(presented.cookie(), &source, minute)
        });
        if shown.is_some_and(|bits| presented.is_solved(bits)) && cookies.worked.insert(presented.name()) {
            return Verdict::Admit;
        }
        match cookies.key(minute / KEY_MINUTES) {
            Some(key) => {
                let bits = self.limits.puzzle;
                Verdict::Retry { cookie: key.cookie(&source, minute, bits), bits }
            }
            None => Verdict::Admit,
        }
    }

    /// Whether an offer with this name has resumed a channel lately: then it is a recording.
    pub fn is_recorded(&self, offer: &[u8; 8]) -> bool {
        let mut cookies = self.cookies();
        cookies.offered.age(self.clock.now());
        cookies.offered.contains(offer)
    }

    /// An offer with this name was right. False if one like it was before.
    pub fn resumed(&self, offer: [u8; 8]) -> bool {
        let mut cookies = self.cookies();
        cookies.offered.age(self.clock.now());
        cookies.offered.insert(offer)
    }

    /// Connections in their handshake.
    pub fn unauthenticated(&self) -> usize {
        self.counts().unauthenticated
    }

    /// All connections.
    pub fn connections(&self) -> usize {
        self.counts().connections
    }

    /// Forgets the sources that have nothing here any more. Call it every few seconds.
    pub fn clean(&self) {
        let now = self.clock.now();
        let mut counts = self.counts();
        let per_source = self.limits.per_source;
        counts.sources.retain(|_, source| {
            source.forgive(now, per_source);
            source.unauthenticated > 0 || source.faults > 0.0
        });
        if counts.sources.capacity() > 4 * counts.sources.len() {
            counts.sources.shrink_to_fit();
        }
        drop(counts);
        let mut cookies = self.cookies();
        cookies.worked.age(now);
        cookies.offered.age(now);
    }

    /// From the soft limit on, with a probability that grows to one at the hard limit. Who is alone at its source has
    /// taken nobody's place: that begins half-way.
    fn is_unlucky(&self, counts: &mut Counts, is_alone: bool) -> bool {
        let (busy, most) = (self.limits.busy, self.limits.unauthenticated);
        let range = most.saturating_sub(busy);
        let (from, range) = if is_alone { (most.saturating_sub(range / 2), range / 2) } else { (busy, range) };
        let Some(above) = counts.unauthenticated.checked_sub(from) else {
            return false;
        };
        let range = range.max(1);
        // splitmix64
        counts.random = counts.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = counts.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        let drawn = word % u64::try_from(range).unwrap_or(u64::MAX);
        drawn < u64::try_from(above).unwrap_or(u64::MAX)
    }

    /// Whose places a connection takes.
    fn key(&self, counts: &Counts, address: IpAddr) -> u128 {
        let key = source_key(address);
        // A flood of sources must not become a flood of memory.
        if counts.sources.len() < MAX_SOURCES || counts.sources.contains_key(&key) {
            key
        } else {
            u128::from(self.hasher.hash_one(key)) % SHARED
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // What panicked under it has changed one count at most.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cookies(&self) -> MutexGuard<'_, Cookies> {
        self.cookies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// So many waiting signatures mean load.
const BUSY_SIGNATURES: usize = 128;

impl Cookies {
    fn renew(&mut self, now: Duration, period: u64, random: &Random) {
        if period != self.period {
            let current = core::mem::replace(&mut self.current, Key::fresh(random));
            self.former = if period == self.period.wrapping_add(1) { current } else { Key(None) };
            self.period = period;
        }
        self.worked.age(now);
    }

    fn key(&self, period: u64) -> Option<&CookieKey> {
        if period == self.period {
            self.current.0.as_ref()
        } else if period.wrapping_add(1) == self.period {
            self.former.0.as_ref()
        } else {
            None
        }
    }
}

const fn minute(now: Duration) -> u64 {
    now.as_secs() / 60
}

/// Places that a source takes; what was not forgiven to the last counts in full.
#[allow(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and never more than a few times the limit"
)]
fn taken(source: &Source) -> usize {
    source.unauthenticated.saturating_add(source.faults.ceil() as usize)
}

/// A connection that is counted.
#[derive(Debug)]
pub struct Ticket {
    gate: Arc<Gate>,
    source: u128,
    entered: bool,
}

impl Ticket {
    /// The handshake is over, and went well.
    pub fn entered(&mut self) {
        self.leave_handshake(false);
    }

    /// The handshake failed or stalled, by the peer's fault.
    pub fn failed(&mut self) {
        self.leave_handshake(true);
    }

    fn leave_handshake(&mut self, failed: bool) {
        if core::mem::replace(&mut self.entered, true) {
            return;
        }
        let now = self.gate.clock.now();
        let per_source = self.gate.limits.per_source;
        let mut counts = self.gate.counts();
        counts.unauthenticated = counts.unauthenticated.saturating_sub(1);
        if let Some(source) = counts.sources.get_mut(&self.source) {
            source.forgive(now, per_source);
            source.unauthenticated = source.unauthenticated.saturating_sub(1);
            if failed {
                source.faults += 1.0;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave_handshake(false);
        let mut counts = self.gate.counts();
        counts.connections = counts.connections.saturating_sub(1);
        // Most sources have one connection: nothing is left of them.
        let idle = |source: &Source| source.unauthenticated == 0 && source.faults <= 0.0;
        if counts.sources.get(&self.source).is_some_and(idle) {
            counts.sources.remove(&self.source);
        }
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicU64, Ordering};

    use ossicle_core::{ClientConfig, Connection, MAX_PUZZLE_BITS, PublicKey, Puzzle, ServerConfig};

    use super::*;

    /// A gate, and what its clock shows, in milliseconds.
    struct World {
        gate: Arc<Gate>,
        now: Arc<AtomicU64>,
    }

    impl World {
        fn new(limits: GateLimits) -> Self {
            let now = Arc::new(AtomicU64::new(1_000_000));
            let read = Arc::clone(&now);
            let clock = Clock::new(move || Duration::from_millis(read.load(Ordering::Relaxed)));
            // The same newcomers are dropped each time; keys are none of a test's business.
            let random = Random::new(|bytes| match bytes {
                [_, _, _, _, _, _, _, _] => {
                    bytes.copy_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0]);
                    Ok(())
                }
                key => Random::system().fill(key),
            });
            Self { gate: Arc::new(Gate::new(limits, crate::world::World { clock, random })), now }
        }

        fn pass(&self, time: Duration) {
            self.now.fetch_add(u64::try_from(time.as_millis()).unwrap(), Ordering::Relaxed);
        }

        fn knock(&self, address: &str) -> Result<Ticket, Turned> {
            self.gate.knock(address.parse().unwrap())
        }
    }

    fn limits() -> GateLimits {
        GateLimits { connections: 100, unauthenticated: 50, busy: 50, per_source: 4, puzzle: 4 }
    }

    #[test]
    fn a_source_has_so_many_places_and_shares_none() {
        let world = World::new(limits());
        let mut tickets: Vec<_> = (0..4).map(|_| world.knock("192.0.2.1").unwrap()).collect();
        assert_eq!(world.knock("192.0.2.1").unwrap_err(), Turned::Source);
        assert_eq!(world.knock("::ffff:192.0.2.1").unwrap_err(), Turned::Source);
        let other = world.knock("192.0.2.2").unwrap();
        // Whoever has entered is no stranger, nor is who has gone.
        tickets[0].entered();
        let fifth = world.knock("192.0.2.1").unwrap();
        drop(fifth);
        let again = world.knock("192.0.2.1").unwrap();
        assert_eq!((world.gate.connections(), world.gate.unauthenticated()), (6, 5));
        drop((tickets, other, again));
        assert_eq!((world.gate.connections(), world.gate.unauthenticated()), (0, 0));
        assert!(world.gate.counts().sources.is_empty(), "nothing is left of them");
    }

    #[test]
    fn what_failed_or_stalled_is_forgiven_within_a_minute() {
        let world = World::new(limits());
        for _ in 0..4 {
            world.knock("192.0.2.1").unwrap().failed();
        }
        assert_eq!(world.knock("192.0.2.1").unwrap_err(), Turned::Source);
        world.gate.clean();
        assert_eq!(world.knock("192.0.2.1").unwrap_err(), Turned::Source);
        world.pass(FORGIVEN_WITHIN / 4);
        drop(world.knock("192.0.2.1").unwrap());
        world.pass(FORGIVEN_WITHIN);
        world.gate.clean();
        assert!(world.gate.counts().sources.is_empty());
        assert!(world.knock("192.0.2.2").is_ok());
    }

    #[test]
    fn a_clock_that_goes_back_forgives_nothing_and_stops_nothing() {
        let world = World::new(limits());
        for _ in 0..4 {
            world.knock("192.0.2.1").unwrap().failed();
        }
        world.now.store(0, Ordering::Relaxed);
        assert_eq!(world.knock("192.0.2.1").unwrap_err(), Turned::Source);
        assert!(world.knock("192.0.2.2").is_ok());
        world.pass(FORGIVEN_WITHIN);
        assert!(world.knock("192.0.2.1").is_ok());
    }

    #[test]
    fn newcomers_are_dropped_at_random_and_all_of_them_at_the_end() {
        let limits = GateLimits { unauthenticated: 1000, busy: 500, per_source: 1000, connections: 2000, puzzle: 1 };
        let address = |n: u32| IpAddr::V4(n.into());
        // How many there were whenever one was dropped: all of one source, or each of its own.
        let fill = |world: &World, of_one: bool| {
            let address = |n| address(if of_one { 7 } else { n });
            let mut tickets: Vec<_> = (0..500).map(|n| world.gate.knock(address(n)).unwrap()).collect();
            let mut dropped = Vec::new();
            let mut next = 500;
            while tickets.len() < 1000 {
                match world.gate.knock(address(next)) {
                    Ok(ticket) => tickets.push(ticket),
                    Err(why) => {
                        assert_eq!(why, Turned::Early);
                        dropped.push(tickets.len());
                    }
                }
                next += 1;
            }
            (tickets, dropped)
        };
        let (tickets, dropped) = fill(&World::new(limits), false);
        assert!(dropped.iter().all(|at| *at > 750) && dropped.len() > 100, "who is alone is spared longer");
        drop(tickets);
        let world = World::new(limits);
        let (mut tickets, dropped) = fill(&world, true);
        let first_half = dropped.iter().filter(|at| **at < 750).count();
        let second_half = dropped.len() - first_half;
        // A half and another of 250 in the one, more than as many in the other.
        assert!((30..=150).contains(&first_half) && second_half > 2 * first_half, "{first_half}, {second_half}");
        assert_eq!(world.gate.knock(address(0xffff)).unwrap_err(), Turned::Handshakes);
        tickets.iter_mut().for_each(Ticket::entered);
        let more: Vec<_> = (2000..3000).filter_map(|n| world.gate.knock(address(n)).ok()).collect();
        assert!(more.len() >= 500);
        let mut entered = Vec::new();
        while let Ok(mut ticket) = world.gate.knock(address(0x10000 + entered.len() as u32)) {
            ticket.entered();
            entered.push(ticket);
        }
        drop(more);
        let mut n = 0x20000;
        let last = loop {
            n += 1;
            match world.gate.knock(address(n)) {
                Ok(mut ticket) => {
                    ticket.entered();
                    entered.push(ticket);
                }
                Err(why) => break why,
            }
        };
        assert_eq!(last, Turned::Connections);
    }

    #[test]
    fn load_is_many_handshakes_or_many_signatures() {
        let world = World::new(GateLimits { busy: 1, ..limits() });
        assert!(!world.gate.is_busy(0));
        assert!(world.gate.is_busy(BUSY_SIGNATURES));
        let mut ticket = world.knock("192.0.2.1").unwrap();
        assert!(world.gate.is_busy(0));
        ticket.entered();
        assert!(!world.gate.is_busy(0));
        let world = World::new(GateLimits { busy: 0, puzzle: 0, ..limits() });
        assert!(!world.gate.is_busy(BUSY_SIGNATURES), "where nobody is to be asked, nobody is");
    }

    #[test]
    fn a_flood_of_sources_is_no_flood_of_memory() {
        let world = World::new(GateLimits { per_source: 2, ..limits() });
        for n in 0..MAX_SOURCES as u32 + 5000 {
            if let Ok(mut ticket) = world.gate.knock(IpAddr::V4(n.into())) {
                ticket.failed();
            }
        }
        assert!(world.gate.counts().sources.len() <= MAX_SOURCES + SHARED as usize);
    }

    const MODULUS: [u8; 256] = [0xc1; 256];

    /// What the hello shows of a client that presents this.
    fn shown(puzzle: Option<&Puzzle>, seed: u8) -> Presented {
        let fingerprint = PublicKey::from_modulus(&MODULUS).unwrap().fingerprint();
        let config = ClientConfig { server: Some(fingerprint), ask_for_key: false, record_limit: 1024 };
        let mut client: Connection = Connection::client(config, &[seed; 64]);
        if let Some(puzzle) = puzzle {
            client.present(puzzle).unwrap();
            while client.solve() {}
        }
        let mut server: Connection =
            Connection::server(ServerConfig { id: [1; 16], fingerprint, record_limit: 1024 }, &[2; 64]);
        server.demand_work();
        let mut out = [0; 256];
        let len = client.transmit(&mut out).unwrap();
        server.receive(&mut out[..len]).unwrap();
        *server.presented().unwrap()
    }

    /// What a client makes of a verdict.
    fn asked(verdict: &Verdict) -> Puzzle {
        let Verdict::Retry { cookie, bits } = verdict else { panic!("{verdict:?}") };
        let fingerprint = PublicKey::from_modulus(&MODULUS).unwrap().fingerprint();
        let config = ClientConfig { server: Some(fingerprint), ask_for_key: false, record_limit: 1024 };
        let mut client: Connection = Connection::client(config, &[9; 64]);
        let mut server: Connection =
            Connection::server(ServerConfig { id: [1; 16], fingerprint, record_limit: 1024 }, &[2; 64]);
        server.demand_work();
        let mut out = [0; 256];
        let len = client.transmit(&mut out).unwrap();
        server.receive(&mut out[..len]).unwrap();
        let len = server.retry(cookie, *bits, &mut out).unwrap();
        assert!(client.receive(&mut out[..len]).is_err());
        client.puzzle().unwrap()
    }

    #[test]
    fn work_counts_once_from_its_source_and_for_a_minute_at_least() {
        let world = World::new(limits());
        let [here, there] = ["192.0.2.1", "192.0.2.2"].map(|address| address.parse().unwrap());
        let first = world.gate.judge(here, &shown(None, 1));
        let puzzle = asked(&first);
        assert_eq!(puzzle.bits(), 4);
        let work = shown(Some(&puzzle), 2);
        assert_ne!(world.gate.judge(there, &work), Verdict::Admit, "of another source");
        assert_eq!(world.gate.judge(here, &work), Verdict::Admit);
        assert_ne!(world.gate.judge(here, &work), Verdict::Admit, "once");
        assert_eq!(world.gate.judge(here, &shown(Some(&puzzle), 3)), Verdict::Admit, "another hello, other work");
        for _ in 0..60 {
            world.pass(Duration::from_secs(1));
            // From any moment a cookie is known for a minute, whatever became of the keys.
            let puzzle = asked(&world.gate.judge(here, &shown(None, 1)));
            let mut seed = 4;
            for _ in 0..6 {
                assert_eq!(world.gate.judge(here, &shown(Some(&puzzle), seed)), Verdict::Admit);
                seed += 1;
                world.pass(Duration::from_secs(10));
            }
            world.pass(Duration::from_secs(60));
            assert_ne!(world.gate.judge(here, &shown(Some(&puzzle), seed)), Verdict::Admit, "two minutes are too much");
        }
    }

    #[test]
    fn a_cookie_that_was_made_up_or_whose_puzzle_is_not_solved_is_worth_nothing() {
        let world = World::new(GateLimits { puzzle: MAX_PUZZLE_BITS, ..limits() });
        let here = "192.0.2.1".parse().unwrap();
        // Of another gate, which asks for less.
        let other = World::new(limits());
        let theirs = asked(&other.gate.judge(here, &shown(None, 1)));
        assert_ne!(world.gate.judge(here, &shown(Some(&theirs), 2)), Verdict::Admit);
        assert_ne!(world.gate.judge(here, &shown(None, 2)), Verdict::Admit);
    }

    #[test]
    fn an_offer_is_taken_once_while_it_is_remembered() {
        let world = World::new(limits());
        assert!(!world.gate.is_recorded(&[1; 8]));
        assert!(world.gate.resumed([1; 8]));
        assert!(world.gate.is_recorded(&[1; 8]));
        assert!(!world.gate.resumed([1; 8]));
        world.pass(REMEMBERED);
        assert!(world.gate.is_recorded(&[1; 8]));
        world.pass(REMEMBERED * 2);
        assert!(!world.gate.is_recorded(&[1; 8]));
        for n in 0..MAX_REMEMBERED as u64 + 10 {
            assert!(world.gate.resumed(n.to_be_bytes()));
        }
        assert!(world.gate.cookies().offered.recent.len() <= MAX_REMEMBERED);
    }
}
