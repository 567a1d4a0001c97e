//! A client for people: the identity in a home directory, its connection, what it sends and what it receives.
//!
//! ```text
//!   cli (send, listen, chat, ...)         another process with the same home
//!        |                                     |  home/socket
//!     Access  --- holds the lock ---> local ---+
//!        |                              |
//!      Agent: one task per home  <------+
//!        |-- outbox: chains to peers, letters until their receipts have come, also across processes
//!        |-- inbox:  chains from peers, messages until their reader has them
//!        |-- public: what is said to everybody, and what others say
//!        |-- groups: those that this client is in, who of them is, and what each of them said of that
//!        |-- history: what was said in chats, sealed
//!        |-- rotation: identity keys that follow others, its own and those of peers
//!        +-- Link:   one TCP connection
//! ```
//!
//! Only the process that holds a home's lock has its connection and its state; others ask it through its socket. State
//! is durable before it is relied on (`store::home`). Nothing is sent to a peer whose key is not the pinned one. `probe`,
//! beside all this, asks who a server is, for `doctor`.

mod access;
mod agent;
mod groups;
mod history;
mod home;
mod inbox;
mod kept;
mod link;
mod local;
mod outbox;
mod peers;
mod probe;
mod public;
mod rotation;
mod setup;
mod url;
mod watch;

use serde::{Deserialize, Serialize};

pub use access::Access;
pub(crate) use access::WATCHER;
pub use agent::Notice;
pub use groups::{GroupNews, GroupView};
pub use history::HistoryEntry;
pub use home::{Home, HomeLock};
pub use local::{
    HeldChannel, NewDevice, PeerKeys, PinnedKey, Presence, Reply, Request, Requested, Seen, Status, Verification,
};
pub use outbox::Settled;
pub(crate) use outbox::message_id;
pub use probe::{Caller, Obstacle, Probed, probe};
pub use public::{PUBLIC_LABEL, PUBLIC_NAME, PublicPost};
pub use rotation::prepare_rotation;
pub use setup::{Initialised, initialise, initialise_by_password};
pub use url::{ServerUrl, UrlError};

pub use crate::store::home::LetterId;

/// Bytes of the longest text that any recipient takes; a recipient may take less.
pub const MAX_TEXT_LEN: usize =
    ossicle_core::MAX_RECORD_LEN - ossicle_core::RECORD_OVERHEAD - MESSAGE_HEAD_LEN - ossicle_core::SIGNED_OVERHEAD;

/// Code and wanted rungs, before the envelope.
const MESSAGE_HEAD_LEN: usize = 3;

/// The kind of a message that is text or data without more to say about it.
pub const KIND_TEXT: u8 = 0;

/// Why a command ends without success: one sentence for a person, and the exit code that tells scripts what it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{sentence}")]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What happened, and what to do.
    pub sentence: String,
}

impl Failure {
    /// It was refused, or failed.
    pub fn refused(sentence: impl Into<String>) -> Self {
        Self { code: 1, sentence: sentence.into() }
    }

    /// It was asked for in a wrong way, or something has to be set up first.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self { code: 2, sentence: sentence.into() }
    }

    /// Something was not reached in time.
    pub fn unreached(sentence: impl Into<String>) -> Self {
        Self { code: 3, sentence: sentence.into() }
    }
}

impl From<crate::store::home::HomeStoreError> for Failure {
    fn from(error: crate::store::home::HomeStoreError) -> Self {
        Self::refused(error.to_string())
    }
}

impl From<crate::crypto::KeyError> for Failure {
    fn from(error: crate::crypto::KeyError) -> Self {
        Self::refused(error.to_string())
    }
}

/// A name for a new letter.
///
/// # Errors
/// [`Failure`] if this system has no randomness.
pub fn new_letter() -> Result<LetterId, Failure> {
    let mut id = LetterId::default();
    getrandom::fill(&mut id).map_err(|error| Failure::refused(format!("this system has no randomness ({error})")))?;
    Ok(id)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
