//! x
pub mod crypto;
pub mod name;
pub mod store;
mod channel;
mod directory;
pub mod endpoint;
pub mod limits;
pub mod mailbox;
pub mod router;
pub mod server;
pub mod cli;
pub mod control;
