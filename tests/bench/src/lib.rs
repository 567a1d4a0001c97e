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
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub mod account;
pub mod client;
pub mod durable;
pub mod groups;
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

/// The server's binary, built as this program was.
///
/// # Errors
/// If it cannot be built.
pub fn build() -> Result<PathBuf, Failure> {
    let here = std::env::current_exe()?;
    let profile = here.parent().ok_or("TARGET/PROFILE/ossicle-bench")?;
    let target = profile.parent().ok_or("TARGET/PROFILE")?;
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "ossicle", "--bin", "ossicle", "--target-dir"]).arg(target);
    if profile.ends_with("release") {
        build.arg("--release");
    } else {
        println!("this is no release build: its figures mean nothing");
    }
    let built = build.current_dir(Path::new(env!("CARGO_MANIFEST_DIR"))).status()?;
    if built.success() { Ok(profile.join("ossicle")) } else { Err("the server is not built".into()) }
}

/// Thousands of connections need more descriptors than a shell allows.
///
/// # Errors
/// If the system does not grant its own limit.
pub fn raise_file_limit() -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}
