//! One sending chain and the letters that were sealed with it, by how far they came.

use std::collections::BTreeMap;

use ossicle_core::{Receipt, Rung, SIGNED_OVERHEAD, SealError, SendingChain};
use tokio::time::Instant;

use super::ledger::Ledger;
use super::letter::Letter;
use super::message_id;
use crate::crypto::HostAead;
use crate::endpoint::agent::Ended;
use crate::endpoint::local::Reply;
use crate::endpoint::{Failure, KIND_TEXT};
use crate::store::home::{HomeStore, LetterChain, LetterChange};

/// Salts that are remembered of a chain beyond those of its letters, to verify cumulative receipts with.
const SALTS: usize = 1024;

pub(super) struct Chain {
    pub(super) parts: LetterChain,
    /// Whether the store has that.
    pub(super) kept: bool,
    /// Whether the server has the wrap, on this connection.
    pub(super) announced: Announced,
    /// `None` if a former process had it.
    pub(super) live: Option<Live>,
    /// Sealed, and not sent over this connection.
    pub(super) unsent: BTreeMap<u32, Letter>,
    /// Sent over this connection, and not stored.
    pub(super) under_way: BTreeMap<u32, Letter>,
    /// Stored at the server, or further.
    pub(super) resting: BTreeMap<u32, Letter>,
    /// Of letters that are settled.
    pub(super) salts: BTreeMap<u32, [u8; 8]>,
}

pub(super) struct Live {
    pub(super) sealing: SendingChain,
    /// Whether it was counted among those that were started.
    pub(super) counted: bool,
    /// Whether letters may still be sealed with it.
    pub(super) current: bool,
    /// Whether its recipient has said anything that only who has its keys can say.
    pub(super) heard: bool,
    pub(super) begun: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Announced {
    No,
    Asked,
    Yes,
}

impl Chain {
    pub(super) const fn new(parts: LetterChain, kept: bool, live: Option<Live>) -> Self {
        Self {
            parts,
            kept,
            announced: Announced::No,
            live,
            unsent: BTreeMap::new(),
            under_way: BTreeMap::new(),
            resting: BTreeMap::new(),
            salts: BTreeMap::new(),
        }
    }

    pub(super) const fn id(&self) -> &[u8; 8] {
        self.parts.receipts.chain_id()
    }

    pub(super) fn is(&self, id: &[u8; 8]) -> bool {
        self.id() == id
    }

    pub(super) fn is_current(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.current)
    }

    /// Whether none of its letters is left.
    pub(super) fn is_idle(&self) -> bool {
        self.unsent.is_empty() && self.under_way.is_empty() && self.resting.is_empty()
    }

    /// Nothing is sealed with it any more.
    pub(super) fn end(&mut self) {
        if let Some(live) = &mut self.live {
            live.current = false;
        }
    }

    /// What the server had, and was sent again over a connection that has gone or under a key that is no more, rests as
    /// before: sealed anew, it would be read twice.
    pub(super) fn rest_again(&mut self) {
        let is_stored = |_: &u32, letter: &mut Letter| letter.reached >= Some(Rung::Stored);
        for place in [&mut self.unsent, &mut self.under_way] {
            self.resting.extend(place.extract_if(.., is_stored));
        }
    }

    pub(super) fn letters(&self) -> impl Iterator<Item = &Letter> {
        self.unsent.values().chain(self.under_way.values()).chain(self.resting.values())
    }

    pub(super) fn letters_mut(&mut self) -> impl Iterator<Item = &mut Letter> {
        self.unsent.values_mut().chain(self.under_way.values_mut()).chain(self.resting.values_mut())
    }

    pub(super) fn take_letters(&mut self) -> impl Iterator<Item = Letter> {
        let places = [&mut self.unsent, &mut self.under_way, &mut self.resting];
        places.map(core::mem::take).into_iter().flat_map(BTreeMap::into_values)
    }

    /// The letters that a receipt is about.
    pub(super) fn numbers(&self, receipt: &Receipt) -> Vec<u32> {
        let range = receipt.from..=receipt.to;
        let places = [&self.unsent, &self.under_way, &self.resting];
        places.into_iter().flat_map(|place| place.range(range.clone()).map(|(n, _)| *n)).collect()
    }

    pub(super) fn take(&mut self, n: u32, which: impl Fn(&Letter) -> bool) -> Option<Letter> {
        let places = [&mut self.unsent, &mut self.under_way, &mut self.resting];
        let place = places.into_iter().find(|place| place.get(&n).is_some_and(&which))?;
        place.remove(&n)
    }

    pub(super) fn salt(&self, n: u32) -> Option<[u8; 8]> {
        let places = [&self.unsent, &self.under_way, &self.resting];
        let letter = places.into_iter().find_map(|place| place.get(&n));
        letter.map(|letter| letter.salt).or_else(|| self.salts.get(&n).copied())
    }

    /// Seals a letter, which leaves when that is durable; gives it back if the chain is used up.
    pub(super) fn seal(
        &mut self,
        name: &str,
        store: &HomeStore,
        ledger: &mut Ledger,
        mut letter: Letter,
    ) -> Result<Option<Letter>, Ended> {
        let Some(live) = &mut self.live else {
            return Ok(Some(letter));
        };
        ledger.keep(name, &mut letter);
        let body = ledger.body(store, letter.row)?;
        let mut envelope = vec![0; body.len() + SIGNED_OVERHEAD];
        match live.sealing.seal::<HostAead>(letter.signed, KIND_TEXT, &body, &mut envelope) {
            Ok(sealed) => {
                envelope.truncate(sealed.len);
                if !core::mem::replace(&mut self.kept, true) {
                    ledger.changes.push(LetterChange::Chain(self.parts.clone()));
                }
                let (row, chain, n, salt) = (letter.row, *self.parts.receipts.chain_id(), sealed.n, sealed.salt);
                ledger.changes.push(LetterChange::Seal { row, chain, n, salt, envelope });
                ledger.wanted.push(letter.wanted());
                letter.salt = salt;
                self.under_way.insert(n, letter);
                Ok(None)
            }
            Err(SealError::Exhausted) => Ok(Some(letter)),
            Err(error) => Err(Failure::refused(format!("a message cannot be sealed: {error}")).into()),
        }
    }

    /// A letter came so far. Whether whoever waits for more may want to know where the recipient is.
    pub(super) fn reach(&mut self, name: &str, ledger: &mut Ledger, n: u32, rung: Rung) -> bool {
        let Some(mut letter) = self.take(n, |_| true) else {
            return false;
        };
        letter.answered = true;
        if letter.reached < Some(rung) {
            letter.reached = Some(rung);
            ledger.reached(&letter, rung);
            letter.tell(Reply::Rung { rung, id: Some(message_id(self.id(), n)) });
            if rung >= letter.until && letter.is_attended() && !letter.is_finished() {
                // It goes on without anybody.
                letter.tell(Reply::Done);
                letter.replies = None;
            }
        }
        if letter.is_finished() {
            remember(&mut self.salts, n, letter.salt);
            ledger.settle(name, letter, Ok(rung), None);
            return false;
        }
        if letter.reached < Some(Rung::Stored) {
            self.under_way.insert(n, letter);
            return false;
        }
        ledger.changes.push(LetterChange::Reach(letter.row, letter.reached));
        let wonders = letter.reached == Some(Rung::Stored) && letter.is_attended();
        self.resting.insert(n, letter);
        wonders
    }
}

pub(super) fn remember(salts: &mut BTreeMap<u32, [u8; 8]>, n: u32, salt: [u8; 8]) {
    salts.insert(n, salt);
    if salts.len() > SALTS {
        salts.pop_first();
    }
}
