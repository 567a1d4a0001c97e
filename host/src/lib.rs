//! x
pub mod crypto;
pub mod name;
pub mod store;
mod channel;
mod directory;
pub mod limits;
pub mod mailbox;
pub mod router;
pub mod server;
