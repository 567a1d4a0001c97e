//! What must not work: hostile bytes and calls against the core, without end and without gaps. Each test prints how many
//! cases it ran, and fails when that is less than the bits, bytes or pairs demand; each case ends in the error that a table
//! names for it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

#[path = "negative/chains.rs"]
mod chains;
#[path = "negative/counters.rs"]
mod counters;
#[path = "negative/errors.rs"]
mod errors;
#[path = "negative/flips.rs"]
mod flips;
#[path = "negative/matrix.rs"]
mod matrix;
#[path = "negative/mutations.rs"]
mod mutations;
#[path = "negative/rules.rs"]
mod rules;
#[path = "negative/session.rs"]
mod session;
#[path = "negative/streams.rs"]
mod streams;
