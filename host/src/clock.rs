//! The time that limits go by. It never goes back, whatever happens to the date of the machine, and whoever simulates a
//! server brings his own.

use core::fmt;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

/// Says how long ago some moment was. Clones are the same clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// The monotonic clock of the system.
    pub fn system() -> Self {
        let started = Instant::now();
        Self::new(move || started.elapsed())
    }

    /// A clock that is read like this.
    pub fn new(read: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// How long ago it began.
    pub fn now(&self) -> Duration {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}

impl governor::clock::Clock for Clock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.now()
    }
}
