//! One letter: what is sent, how far it came, and who waits for it.

use ossicle_core::{Reason, Rung, Rungs};
use zeroize::Zeroizing;

use super::Replies;
use crate::endpoint::local::Reply;
use crate::store::home::LetterId;

pub(super) struct Letter {
    pub(super) row: i64,
    pub(super) id: LetterId,
    /// Until the ledger has it.
    pub(super) body: Option<Zeroizing<Vec<u8>>>,
    pub(super) len: usize,
    pub(super) signed: bool,
    pub(super) until: Rung,
    /// Who waits for it.
    pub(super) replies: Option<Replies>,
    pub(super) tries: u8,
    pub(super) reached: Option<Rung>,
    pub(super) time: u64,
    /// Of the envelope that it leaves as.
    pub(super) salt: [u8; 8],
    /// Whether anything was said of it over this connection.
    pub(super) answered: bool,
    /// Whether whoever waits knows that the recipient is not there.
    pub(super) away: bool,
}

impl Letter {
    pub(super) fn wanted(&self) -> Rungs {
        let wanted = Rungs::NONE.with(Rung::Accepted);
        match self.until {
            Rung::Accepted => wanted,
            // Beyond `stored` too: it is kept here until it is delivered.
            Rung::Opened => wanted.with(Rung::Stored).with(Rung::Delivered).with(Rung::Opened),
            _ => wanted.with(Rung::Stored).with(Rung::Delivered),
        }
    }

    pub(super) fn is_attended(&self) -> bool {
        self.replies.as_ref().is_some_and(|replies| !replies.is_closed())
    }

    pub(super) fn tell(&self, reply: Reply) {
        if let Some(replies) = &self.replies {
            let _ = replies.send(reply);
        }
    }

    /// Whether nothing more is to be done or heard.
    pub(super) fn is_finished(&self) -> bool {
        let end = match self.until {
            Rung::Accepted => Rung::Accepted,
            Rung::Opened if self.is_attended() => Rung::Opened,
            _ => Rung::Delivered,
        };
        self.reached.is_some_and(|reached| reached >= end)
    }
}

/// What is said last of a letter.
pub(super) fn end(outcome: Result<Rung, Reason>, detail: Option<String>) -> Reply {
    match outcome {
        Ok(_) => Reply::Done,
        Err(reason) => Reply::Refused { reason, detail },
    }
}

/// Whether a refusal may pass by itself.
pub(super) const fn passes(reason: Reason) -> bool {
    matches!(reason, Reason::Offline | Reason::QueueFull | Reason::Rate | Reason::Unavailable)
}

/// Bytes, as the store counts them.
pub(super) fn length(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
