//! The fuzz targets of `ossicle-core`: a module each, with a body that takes an input and tells what it came to, the states
//! that its seeds must reach, and the seeds themselves, made from honest runs.
//!
//! Everything here is for fuzzers only: the keys are public and the generator is seeded. README.md says how to run it.

#[cfg(not(fuzzing))]
compile_error!("this is built with `--cfg fuzzing`: see run.sh");

pub mod bundle;
pub mod catalogue;
pub mod client;
pub mod connections;
pub mod device;
pub mod envelope;
pub mod keys;
pub mod link;
pub mod page;
pub mod peers;
pub mod record;
pub mod resumption;
pub mod script;
pub mod server;

/// Told by the body of a target, by name, what an input came to.
pub type Reached<'r> = &'r mut dyn FnMut(&'static str);

/// One target.
pub struct Target {
    /// The name of its binary and of its seeds' folder.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8], Reached<'_>),
    /// What the seeds alone must reach.
    pub states: fn() -> Vec<&'static str>,
    /// File names and contents of the seeds.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    record::TARGET,
    server::TARGET,
    client::TARGET,
    resumption::TARGET,
    device::TARGET,
    envelope::TARGET,
    bundle::TARGET,
    catalogue::TARGET,
    page::TARGET,
    link::TARGET,
];

/// For fuzzers, which see by themselves where an input leads.
pub fn ignore(_: &'static str) {}

#[cfg(test)]
mod tests;
