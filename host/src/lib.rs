//! The host side of Ossicle: one binary, `ossicle`, and this library, which the tests embed.
//!
//! ```text
//!                      cli (one file per command)
//!   serve: settings|                     | send, listen, chat, init, enroll, ...  | demo
//!        +---------v--------+   +--------v---------+                       +------v------+
//!        | server           |   | endpoint         |                       | device      |
//!        |  gate: strangers |   |  agent: one home |                       | the firmware|
//!        |  channel: a peer |   |  inbox, outbox   |                       | in a thread |
//!        |  router, mailbox,|   |  link: one TCP   |                       +------v------+
//!        |  resumption      |   |  local: a local  |                       | ethernet    |
//!        |  control: a local|   |  process's door  |                       | search      |
//!        |  operator's door |   |                  |                       +-------------+
//!        |  directory,limits|   |                  |
//!        |  presence, bus,  |   |                  |
//!        |  public: readers,|   |                  |
//!        |  accounts,       |   |                  |
//!        |  metrics         |   |                  |
//!        +---+---------+----+   +----+--------+----+
//!            |         |             |        |
//!        +---v---+  +--v-------------v--+  +--v----------+
//!        | store |  | crypto: aws-lc-rs |  | store::home |      name: display names and patterns
//!        +-------+  +-------------------+  +-------------+
//! ```
//!
//! The protocol itself is `ossicle-core`; nothing here knows what a record looks like inside. rusqlite is named under
//! `store` only, aws-lc-rs and rsa in `crypto` only, argon2 in `accounts` only, the firmware in `device` only, smoltcp under `ethernet` only:
//! `tests/doors.rs` holds that. `settings` (flags, environment, file, defaults) knows what a server can be told, and no
//! command line; toml is named there only.

pub mod accounts;
pub mod backup;
pub mod bus;
mod channel;
pub mod cli;
pub mod clock;
pub mod control;
pub mod crypto;
pub mod device;
mod directory;
pub mod endpoint;
pub mod ethernet;
pub mod gate;
pub mod keeper;
pub mod limits;
pub mod mailbox;
pub mod metrics;
pub mod name;
pub mod presence;
mod public;
pub mod resumption;
pub mod router;
pub mod search;
pub mod server;
pub mod settings;
pub mod store;
pub mod transport;
pub mod world;
