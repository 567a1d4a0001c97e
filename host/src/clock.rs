//! Time and date. The time that limits go by never goes back, whatever happens to the date of the machine, and whoever
//! simulates a server brings his own of both. And how old things are that bear a date, where that may be set.

use core::fmt;
use core::time::Duration;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Says how long ago some moment was, and what date it is. Clones are the same clock.
#[derive(Clone)]
pub struct Clock {
    time: Arc<dyn Fn() -> Duration + Send + Sync>,
    date: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl Clock {
    /// The monotonic clock of the system, and its date.
    pub fn system() -> Self {
        let started = Instant::now();
        Self::new(move || started.elapsed())
    }

    /// A clock whose time is read like this. Its date is the system's.
    pub fn new(time: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { time: Arc::new(time), date: Arc::new(system_date) }
    }

    /// The same clock with another date, in seconds since 1970.
    #[must_use]
    pub fn with_date(self, date: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { date: Arc::new(date), ..self }
    }

    /// How long ago it began.
    pub fn now(&self) -> Duration {
        (self.time)()
    }

    /// The date, in seconds since 1970. It goes back when somebody sets it.
    pub fn date(&self) -> u64 {
        (self.date)()
    }
}

/// The date of the system, in seconds since 1970.
pub(crate) fn system_date() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("now", &self.now()).field("date", &self.date()).finish()
    }
}

impl governor::clock::Clock for Clock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.now()
    }
}

/// By which date things are old that wait and bear the date of their arrival.
///
/// A machine without a battery knows the date only once somebody has told it, and some are told a wrong one. What waits is
/// not older for that: where the date is set forward, ages go by the clock from the date before, for as long as anything may
/// wait; by then, what bears a date from before has waited for so long. Where it is set back, things wait for longer.
#[derive(Debug)]
pub struct Ages {
    clock: Clock,
    /// The date when it was looked at last, in seconds since 1970, and the clock then.
    last: (u64, Duration),
    /// The date that is gone by from that moment of the clock on, while the machine's is not believed.
    instead: Option<(u64, Duration)>,
}

/// A date that is so much ahead of what the clock says, in seconds, was set.
const SET_FORWARD: u64 = 300;

impl Ages {
    /// Begins on this date, in seconds since 1970.
    pub fn new(clock: Clock, date: u64) -> Self {
        let last = (date, clock.now());
        Self { clock, last, instead: None }
    }

    /// The date to judge by where the machine's is `date` and nothing may wait for longer than `longest`.
    pub fn date(&mut self, date: u64, longest: Duration) -> u64 {
        let now = self.clock.now();
        let passed = |since: Duration| now.saturating_sub(since).as_secs();
        let (last, since) = self.last;
        let expected = last.saturating_add(passed(since));
        self.instead = self.instead.filter(|(_, since)| now.saturating_sub(*since) < longest);
        if date > expected.saturating_add(SET_FORWARD) {
            let before = self.instead.map_or(expected, |(from, since)| from.saturating_add(passed(since)));
            tracing::warn!(seconds = date - expected, "the date was set forward: what waits is not taken for older");
            self.instead = Some((before, now));
        }
        self.last = (date, now);
        self.instead.map_or(date, |(from, since)| date.min(from.saturating_add(passed(since))))
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const DAY: u64 = 24 * 3600;
    const LONGEST: Duration = Duration::from_secs(30 * DAY);

    /// A clock, and how to let time pass.
    fn clock() -> (Clock, impl Fn(u64)) {
        let seconds = Arc::new(AtomicU64::new(1000));
        let read = Arc::clone(&seconds);
        let clock = Clock::new(move || Duration::from_secs(read.load(Ordering::Relaxed)));
        let pass = move |passed| {
            seconds.fetch_add(passed, Ordering::Relaxed);
        };
        (clock, pass)
    }

    #[test]
    fn a_date_that_goes_with_the_clock_is_believed() {
        let (clock, pass) = clock();
        let mut ages = Ages::new(clock, 5000);
        for minute in 1..2000 {
            pass(60);
            // It is put right by a second now and then.
            let date = 5000 + minute * 60 + minute % 2;
            assert_eq!(ages.date(date, LONGEST), date);
        }
    }

    #[test]
    fn a_date_that_is_set_forward_makes_nothing_older_until_all_of_it_is() {
        let (clock, pass) = clock();
        let mut ages = Ages::new(clock, 0);
        pass(60);
        assert_eq!(ages.date(60, LONGEST), 60);
        pass(60);
        // From 1970 to 2026, as where there is no battery.
        let mut date = 1_790_000_000;
        assert_eq!(ages.date(date, LONGEST), 120);
        let mut gone = 120;
        for _ in 0..30 * 24 - 1 {
            pass(3600);
            date += 3600;
            gone += 3600;
            assert_eq!(ages.date(date, LONGEST), gone);
        }
        pass(3600);
        date += 3600;
        assert_eq!(ages.date(date, LONGEST), date, "what bears a date from before has waited for 30 days");
    }

    #[test]
    fn a_date_that_jumps_to_and_fro_makes_nothing_older() {
        let (clock, pass) = clock();
        let start = 1_790_000_000;
        let mut ages = Ages::new(clock, start);
        let mut passed = 0;
        for jump in [400 * DAY, 0, 900 * DAY, 3 * DAY, u64::MAX / 2, 0] {
            pass(DAY);
            passed += DAY;
            let judged = ages.date(start + jump + passed, LONGEST);
            assert!(judged <= start + passed, "{jump}: {judged} after {passed}");
        }
        // Set back, it is what it says.
        pass(60);
        assert_eq!(ages.date(7, LONGEST), 7);
        assert_eq!(ages.date(u64::MAX, LONGEST), start + passed + 60);
    }
}
