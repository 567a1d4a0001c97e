//! x
mod channel;
pub mod cli;
pub mod control;
pub mod crypto;
pub mod device;
mod directory;
pub mod endpoint;
pub mod limits;
pub mod mailbox;
pub mod name;
pub mod router;
pub mod server;
pub mod store;
