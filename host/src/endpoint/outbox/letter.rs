//! One letter: what is sent, how far it came, and who waits for it.

use std::collections::BTreeMap;

use ossicle_core::{Reason, Rung, Rungs};
use zeroize::Zeroizing;

use super::Replies;
use crate::endpoint::local::Reply;
use crate::store::home::{LetterId, LetterPart};

pub(super) struct Letter {
    pub(super) row: i64,
    pub(super) id: LetterId,
    /// The group that it goes to.
    pub(super) sid: Option<[u8; 16]>,
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
    /// Of one that goes to a group: how far it came with each member whom it was sealed for.
    pub(super) parts: BTreeMap<[u8; 16], Part>,
    /// Of one that brings another one to a member alone.
    pub(super) parent: Option<Parent>,
}

/// How far a letter to a group came with one of its members.
#[derive(Clone, Copy, Default)]
pub(super) struct Part {
    pub(super) kept: LetterPart,
    /// Whether anything was said of it over this connection.
    pub(super) answered: bool,
    /// Whether whoever waits knows that this member is not there.
    pub(super) away: bool,
}

/// The letter that another one is for.
#[derive(Clone)]
pub(super) struct Parent {
    pub(super) sid: [u8; 16],
    pub(super) row: i64,
    pub(super) member: [u8; 16],
    /// Who waits for that one.
    pub(super) replies: Option<Replies>,
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
        let parents = self.parent.as_ref().and_then(|parent| parent.replies.as_ref());
        self.replies.as_ref().or(parents).is_some_and(|replies| !replies.is_closed())
    }

    pub(super) fn tell(&self, reply: Reply) {
        if let Some(replies) = &self.replies {
            let _ = replies.send(reply);
        }
    }

    /// Whether nothing more is to be done or heard.
    pub(super) fn is_finished(&self) -> bool {
        let end = self.end();
        match self.parts.is_empty() || end == Rung::Accepted {
            true => self.reached.is_some_and(|reached| reached >= end),
            false => self.parts.keys().all(|member| self.is_finished_with(member)),
        }
    }

    /// Whether nothing more is to be done or heard of a member of the group that it goes to.
    pub(super) fn is_finished_with(&self, member: &[u8; 16]) -> bool {
        let end = self.end();
        self.parts.get(member).is_none_or(|part| {
            let LetterPart { reached, refused, .. } = part.kept;
            refused.is_some() || reached.is_some_and(|reached| reached >= end)
        })
    }

    fn end(&self) -> Rung {
        match self.until {
            Rung::Accepted => Rung::Accepted,
            Rung::Opened if self.is_attended() => Rung::Opened,
            _ => Rung::Delivered,
        }
    }

    /// Members who do not have it, and to whom it is on its way together with the others.
    pub(super) fn pending(&self) -> impl Iterator<Item = &[u8; 16]> {
        let waits = |part: &Part| {
            part.kept.refused.is_none() && !part.kept.own && part.kept.reached.is_none_or(|rung| rung < Rung::Delivered)
        };
        self.parts.iter().filter(move |(_, part)| waits(part)).map(|(member, _)| member)
    }

    /// What became of it with all members together.
    pub(super) fn outcome(&self) -> Result<Rung, Reason> {
        let reached = self.parts.values().filter_map(|part| part.kept.reached).min();
        let refused = self.parts.values().find_map(|part| part.kept.refused);
        match (reached.or(self.reached), refused) {
            (None, Some(reason)) => Err(reason),
            (reached, _) => Ok(reached.unwrap_or(Rung::Accepted)),
        }
    }

    /// What is remembered of it for who asks again: that one member did not get it is not passed over.
    pub(super) fn remembered(&self) -> Result<Rung, Reason> {
        let refused = self.parts.values().find_map(|part| part.kept.refused);
        refused.map_or_else(|| self.outcome(), Err)
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
