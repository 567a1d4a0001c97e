//! How much one client or one source may ask of a server: token buckets, bounded and cleaned.
//!
//! Messages are counted per client, whatever its connections; full handshakes per source, because each makes the server
//! sign once. Beyond a limit the answer is `rate` with the time to wait, as long as answering is itself affordable.

use core::hash::BuildHasher;
use core::net::IpAddr;
use core::num::NonZeroU32;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::hash::RandomState;
use std::sync::Arc;

use arc_swap::ArcSwap;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed, keyed::HashMapStateStore};
use governor::{NotUntil, Quota, RateLimiter};

use crate::clock::Clock;
use crate::name::Name;
use crate::store::ClientId;

/// So many a second, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second, in the long run.
    pub per_second: u32,
    /// At once, after a rest.
    pub burst: u32,
}

/// Every rate that a server limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Records of one client.
    pub messages: Rate,
    /// Full handshakes of one source: an IPv4 address, or a /64 of IPv6.
    pub handshakes: Rate,
}

impl Default for Rates {
    fn default() -> Self {
        Self { messages: Rate { per_second: 5_000, burst: 20_000 }, handshakes: Rate { per_second: 50, burst: 500 } }
    }
}

/// Keys that a limiter remembers; beyond them, and until the next cleaning, keys share buckets.
const MAX_KEYS: usize = 65_536;
const SHARED: u64 = 1024;
/// Refusals that cost a signature each, a second, for all sources together.
const REFUSALS: u32 = 50;

/// Lines of the log about strangers, a second and at once: a flood of them must not fill the disk.
const LINES: Rate = Rate { per_second: 10, burst: 100 };
/// Records that are counted at once where there is room for all of them.
const AHEAD: NonZeroU32 = NonZeroU32::new(16).unwrap();

type Keyed = RateLimiter<u128, HashMapStateStore<u128>, Clock, NoOpMiddleware<Duration>>;
/// Tries of the passwords of one account: so many at once, and one more in each of these times.
const TRIES: NonZeroU32 = NonZeroU32::new(5).unwrap();
const TRY_AGAIN: Duration = Duration::from_secs(10 * 60);
/// Tries of passwords from one source, whatever the accounts.
const SOURCE_TRIES: NonZeroU32 = NonZeroU32::new(30).unwrap();
const SOURCE_TRY_AGAIN: Duration = Duration::from_secs(20);

/// Posts of one client.
const POSTS: Rate = Rate { per_second: 1, burst: 30 };

type Single = RateLimiter<NotKeyed, InMemoryState, Clock, NoOpMiddleware<Duration>>;

/// See the module.
#[derive(Debug)]
pub struct Limits {
    clock: Clock,
    hasher: RandomState,
    messages: ArcSwap<Keyed>,
    handshakes: ArcSwap<Keyed>,
    /// Tries of passwords, by account and by source.
    logins: [Keyed; 2],
    posts: Keyed,
    refusals: Single,
    lines: Single,
    /// Lines that were left out since the last one.
    left_out: AtomicU64,
}

/// Whether a source may begin a full handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Admit,
    /// It may not. There is a signature to spare to tell it so.
    Refuse {
        /// Milliseconds to wait.
        retry_after: u32,
    },
    /// It may not, and gets no answer.
    Ignore,
}

impl Limits {
    /// Limits with nothing counted yet.
    pub fn new(rates: &Rates) -> Self {
        Self::with_clock(rates, Clock::system())
    }

    /// The same, by this clock.
    pub fn with_clock(rates: &Rates, clock: Clock) -> Self {
        let refusals = quota(Rate { per_second: REFUSALS, burst: REFUSALS });
        Self {
            hasher: RandomState::new(),
            messages: ArcSwap::new(keyed(rates.messages, &clock)),
            handshakes: ArcSwap::new(keyed(rates.handshakes, &clock)),
            logins: [(TRY_AGAIN, TRIES), (SOURCE_TRY_AGAIN, SOURCE_TRIES)].map(|(again, tries)| {
                let quota = Quota::with_period(again).unwrap_or_else(|| Quota::per_hour(tries)).allow_burst(tries);
                RateLimiter::hashmap_with_clock(quota, clock.clone())
            }),
            posts: RateLimiter::hashmap_with_clock(quota(POSTS), clock.clone()),
            refusals: RateLimiter::direct_with_clock(refusals, clock.clone()),
            lines: RateLimiter::direct_with_clock(quota(LINES), clock.clone()),
            left_out: AtomicU64::new(0),
            clock,
        }
    }

    /// Goes on with other rates, and with nothing counted.
    pub fn set_rates(&self, rates: &Rates) {
        self.messages.store(keyed(rates.messages, &self.clock));
        self.handshakes.store(keyed(rates.handshakes, &self.clock));
    }

    /// Counts a record of a client.
    ///
    /// # Errors
    /// The milliseconds to wait.
    pub fn message(&self, client: &ClientId) -> Result<(), u32> {
        self.count(&self.messages.load(), u128::from_be_bytes(*client))
    }

    /// Counts a record of a client, or one of those that were counted before they came: `ahead` has how many that are, of
    /// one connection. So most records need no look at what all clients share.
    ///
    /// # Errors
    /// The milliseconds to wait.
    pub fn message_ahead(&self, client: &ClientId, ahead: &mut u32) -> Result<(), u32> {
        if *ahead == 0 {
            let limiter = self.messages.load();
            if limiter.len() >= MAX_KEYS
                || !matches!(limiter.check_key_n(&u128::from_be_bytes(*client), AHEAD), Ok(Ok(())))
            {
                return self.message(client);
            }
            *ahead = AHEAD.get();
        }
        *ahead -= 1;
        Ok(())
    }

    /// Counts so many records of a client more: a request that costs as much.
    ///
    /// # Errors
    /// The milliseconds to wait.
    pub fn messages(&self, client: &ClientId, count: u32) -> Result<(), u32> {
        let Some(count) = NonZeroU32::new(count) else { return Ok(()) };
        let limiter = self.messages.load();
        let key = self.key(&limiter, u128::from_be_bytes(*client));
        let counted = limiter.check_key_n(&key, count).or_else(|most| match NonZeroU32::new(most.0) {
            // More than may come at once is as much as may.
            Some(most) => limiter.check_key_n(&key, most),
            None => Ok(Ok(())),
        });
        match counted {
            Ok(Err(refused)) => Err(self.wait(refused)),
            _ => Ok(()),
        }
    }

    /// Counts a full handshake of a source.
    pub fn handshake(&self, source: IpAddr) -> Admission {
        match self.count(&self.handshakes.load(), source_key(source)) {
            Ok(()) => Admission::Admit,
            Err(retry_after) if self.refusals.check().is_ok() => Admission::Refuse { retry_after },
            Err(_) => Admission::Ignore,
        }
    }

    /// Counts a try of the password of the account with this name, which need not exist.
    ///
    /// # Errors
    /// The milliseconds to wait.
    pub fn login(&self, name: &Name, source: IpAddr) -> Result<(), u32> {
        let [by_account, by_source] = &self.logins;
        // Whoever tries too many accounts is not to lock them all.
        self.count(by_source, source_key(source))?;
        self.count(by_account, self.hasher.hash_one(name.key()).into())
    }

    /// Counts a post of a client in the public conversation: what everybody reads and the server keeps for them is bounded.
    ///
    /// # Errors
    /// The milliseconds to wait.
    pub fn post(&self, client: &ClientId) -> Result<(), u32> {
        self.count(&self.posts, u128::from_be_bytes(*client))
    }

    /// Whether a stranger is worth a line of the log: then with how many were not since the last one.
    pub fn line(&self) -> Option<u64> {
        if self.lines.check().is_ok() {
            return Some(self.left_out.swap(0, Ordering::Relaxed));
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Forgets whose bucket is full again: all but the busy after a moment. Call it every few seconds.
    pub fn clean(&self) {
        for limiter in [self.messages.load(), self.handshakes.load()] {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
        for limiter in self.logins.iter().chain([&self.posts]) {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }

    fn count(&self, limiter: &Keyed, key: u128) -> Result<(), u32> {
        limiter.check_key(&self.key(limiter, key)).map_err(|refused| self.wait(refused))
    }

    /// The bucket of a key: a flood of keys must not become a flood of memory.
    fn key(&self, limiter: &Keyed, key: u128) -> u128 {
        if limiter.len() < MAX_KEYS { key } else { u128::from(self.hasher.hash_one(key) % SHARED) }
    }

    fn wait(&self, refused: NotUntil<Duration>) -> u32 {
        let wait = refused.wait_time_from(self.clock.now()).max(Duration::from_millis(1));
        u32::try_from(wait.as_millis()).unwrap_or(u32::MAX)
    }
}

fn keyed(rate: Rate, clock: &Clock) -> Arc<Keyed> {
    Arc::new(RateLimiter::hashmap_with_clock(quota(rate), clock.clone()))
}

fn quota(rate: Rate) -> Quota {
    let positive = |count| NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN);
    Quota::per_second(positive(rate.per_second)).allow_burst(positive(rate.burst))
}

/// One bucket for an IPv4 address, one for a /64 of IPv6: who has one address there has all of them.
pub(crate) fn source_key(source: IpAddr) -> u128 {
    match source.to_canonical() {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits() >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(per_second: u32, burst: u32) -> Limits {
        let rate = Rate { per_second, burst };
        Limits::new(&Rates { messages: rate, handshakes: rate })
    }

    #[test]
    fn each_client_has_its_own_burst() {
        let limits = limits(1, 3);
        for client in [[1; 16], [2; 16]] {
            for _ in 0..3 {
                assert_eq!(limits.message(&client), Ok(()));
            }
            assert!(limits.message(&client).is_err_and(|wait| (1..=1000).contains(&wait)));
        }
    }

    #[test]
    fn a_flood_of_strangers_is_no_flood_of_lines() {
        let seconds = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&seconds);
        let clock = Clock::new(move || Duration::from_secs(read.load(Ordering::Relaxed)));
        let limits = Limits::with_clock(&Rates::default(), clock);
        let lines = || (0..2000).filter_map(|_| limits.line()).collect::<Vec<_>>();
        assert_eq!(lines(), vec![0; 100]);
        for _ in 0..3 {
            seconds.fetch_add(1, Ordering::Relaxed);
            let told = lines();
            assert_eq!(
                (told.len(), told.iter().sum::<u64>()),
                (10, if seconds.load(Ordering::Relaxed) == 1 { 1900 } else { 1990 })
            );
        }
    }

    #[test]
    fn what_is_counted_ahead_is_counted_once() {
        let limits = limits(1, 50);
        let (mut one, mut other) = (0, 0);
        let mut taken = 0;
        while limits.message_ahead(&[1; 16], &mut one).is_ok() {
            taken += 1;
            taken += u32::from(taken < 10 && limits.message_ahead(&[1; 16], &mut other).is_ok());
        }
        assert_eq!((one, taken + other), (0, 50), "what another connection has not used is lost");
        assert!(limits.message(&[1; 16]).is_err());
        // Fewer than are counted at once.
        let limits = self::limits(1, 3);
        assert_eq!((0..9).filter(|_| limits.message_ahead(&[1; 16], &mut one).is_ok()).count(), 3);
    }

    #[test]
    fn what_costs_as_much_as_several_counts_as_several() {
        let limits = limits(1, 10);
        assert_eq!(limits.messages(&[1; 16], 0), Ok(()));
        assert_eq!(limits.messages(&[1; 16], 7), Ok(()));
        assert!(limits.messages(&[1; 16], 4).is_err_and(|wait| (1..=1000).contains(&wait)));
        assert_eq!(limits.messages(&[1; 16], 3), Ok(()));
        // More than may ever come at once has to be possible after a rest.
        assert_eq!(limits.messages(&[2; 16], 63), Ok(()));
        assert!(limits.messages(&[2; 16], 1).is_err());
    }

    #[test]
    fn a_source_is_an_address_or_a_64_of_ipv6() {
        let limits = limits(1, 1);
        let admitted = |address: &str| limits.handshake(address.parse().unwrap()) == Admission::Admit;
        assert!(admitted("192.0.2.1"));
        assert!(!admitted("::ffff:192.0.2.1"));
        assert!(admitted("192.0.2.2"));
        assert!(admitted("2001:db8::1"));
        assert!(!admitted("2001:db8::2"));
        assert!(admitted("2001:db8:0:1::1"));
    }

    #[test]
    fn refusals_themselves_are_limited() {
        let limits = limits(1, 1);
        let source = "192.0.2.1".parse().unwrap();
        assert_eq!(limits.handshake(source), Admission::Admit);
        for _ in 0..REFUSALS {
            assert!(matches!(limits.handshake(source), Admission::Refuse { retry_after: 1..=1000 }));
        }
        assert_eq!(limits.handshake(source), Admission::Ignore);
    }

    #[test]
    fn a_password_is_tried_five_times_and_then_every_ten_minutes() {
        let seconds = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&seconds);
        let clock = Clock::new(move || Duration::from_secs(read.load(Ordering::Relaxed)));
        let limits = Limits::with_clock(&Rates::default(), clock);
        let tried = |name: &str, source: u32| {
            limits.login(&Name::parse(name).unwrap(), core::net::Ipv4Addr::from_bits(source).into())
        };
        // From wherever, and however the name is written.
        for source in 0..5 {
            assert_eq!(tried(if source % 2 == 0 { "alice" } else { "ALICE" }, source), Ok(()));
        }
        assert!(tried("Alice", 9).is_err_and(|wait| (590_000..=600_000).contains(&wait)));
        assert_eq!(tried("bob", 9), Ok(()), "another account");
        seconds.fetch_add(600, Ordering::Relaxed);
        assert_eq!(tried("alice", 9), Ok(()));
        assert!(tried("alice", 9).is_err());
        // From one source, whatever the names.
        for n in 0..30 {
            assert_eq!(tried(&format!("nobody-{n}"), 77), Ok(()));
        }
        assert!(tried("somebody", 77).is_err_and(|wait| wait <= 20_000));
        assert_eq!(tried("somebody", 78), Ok(()), "and it has locked nobody");
        // Names that somebody makes up take no more memory than others.
        for n in 0..MAX_KEYS as u32 + 5000 {
            let _ = tried(&format!("x{n}"), 0x0a00_0000 + n);
        }
        assert!(limits.logins.iter().all(|limiter| limiter.len() <= MAX_KEYS + SHARED as usize));
        seconds.fetch_add(3600, Ordering::Relaxed);
        limits.clean();
        assert!(limits.logins.iter().all(|limiter| limiter.is_empty()));
    }

    #[test]
    fn keys_are_bounded() {
        let limits = limits(1, 2);
        for i in 0..MAX_KEYS as u128 + 5000 {
            let _ = limits.message(&i.to_be_bytes());
        }
        assert!(limits.messages.load().len() <= MAX_KEYS + SHARED as usize);
    }
}
