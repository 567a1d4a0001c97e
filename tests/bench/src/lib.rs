//! What the benchmarks share: clocks of the kernel's accounting and medians; servers as processes, clients of all three
//! protocols, and the one generator that drives them.
//!
//! ```text
//!   main: rows, rounds, ratios, JSON
//!     |
//!   rows: what a row measures -----> account: CPU and memory of a process
//!     |                     \
//!   load: messages in flight  \----> server: ossicle, mosquitto, nats-server as processes
//!     |                                 |
//!   client: one socket                  +--> people: keys and certificates
//!     ossicle | mqtt | nats over tls
//! ```

use core::time::Duration;

pub mod account;
pub mod client;
pub mod load;
pub mod people;
pub mod rows;
pub mod server;

/// Why a benchmark ended without a figure.
pub type Failure = Box<dyn core::error::Error + Send + Sync>;

/// CPU time that this thread has used.
pub fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// The median of a list that is not empty.
pub fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
