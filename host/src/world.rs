//! What a server takes from the world around it and cannot compute: time, date, chance. Whoever simulates a server brings
//! his own, and the same of them gives the same server.
//!
//! Two more things could differ from run to run, and do not: no decision depends on the order in which a hash map is
//! walked through, and RSA is computed by the pool that a server is given, which may do so at once.

use core::fmt;
use std::sync::Arc;

use crate::clock::Clock;

/// See the module. The default is the system's.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Time and date.
    pub clock: Clock,
    /// Chance.
    pub random: Random,
}

/// Where random bytes come from. Clones share their source.
#[derive(Clone)]
pub struct Random(Arc<Fill>);

type Fill = dyn Fn(&mut [u8]) -> Result<(), NoRandomness> + Send + Sync;

/// There are no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this system has no randomness")]
pub struct NoRandomness;

impl Random {
    /// The generator of the system.
    pub fn system() -> Self {
        Self::new(|bytes| getrandom::fill(bytes).map_err(|_| NoRandomness))
    }

    /// Another source. Keys are made of it: nobody may guess what a server is given that serves anybody.
    pub fn new(fill: impl Fn(&mut [u8]) -> Result<(), NoRandomness> + Send + Sync + 'static) -> Self {
        Self(Arc::new(fill))
    }

    /// Fills `bytes` with random ones.
    ///
    /// # Errors
    /// [`NoRandomness`].
    pub fn fill(&self, bytes: &mut [u8]) -> Result<(), NoRandomness> {
        (self.0)(bytes)
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Random").finish_non_exhaustive()
    }
}
