//! The book of the outbox: what its letters change on disk is gathered here, written in one piece, and only then leaves.

use std::collections::VecDeque;

use ossicle_core::{Reason, Rung, Rungs};
use zeroize::Zeroizing;

use super::letter::{Letter, end, length};
use super::{Replies, Settled};
use crate::endpoint::local::Reply;
use crate::name::Name;
use crate::store::home::{HomeStore, HomeStoreError, Letter as KeptLetter, LetterChange};

/// Settled letters whose end is remembered, for who comes a moment too late to wait for it.
const REMEMBERED: usize = 64;
/// Bytes of a text that are shown of it.
const SHOWN: usize = 256;

/// What is to be made durable, and what leaves and is said once it is.
#[derive(Default)]
pub(super) struct Ledger {
    /// The row of the next letter.
    pub(super) next: i64,
    /// Letters that are not settled, and their bytes.
    pub(super) letters: u64,
    pub(super) bytes: u64,
    pub(super) changes: Vec<LetterChange>,
    /// The rungs that the letters among `changes` want that are sealed, in their order.
    pub(super) wanted: Vec<Rungs>,
    /// Who is told which letter of his is kept.
    pub(super) kept: Vec<(Replies, i64)>,
    pub(super) news: Vec<(i64, Settled)>,
    /// Letters that were settled lately.
    pub(super) settled: VecDeque<(i64, Result<Rung, Reason>)>,
}

impl Ledger {
    /// Notes a new letter and its text.
    pub(super) fn keep(&mut self, name: &Name, letter: &mut Letter) {
        let Some(body) = letter.body.take() else { return };
        let kept = KeptLetter {
            row: letter.row,
            to: name.as_str().to_owned(),
            len: length(letter.len),
            signed: letter.signed,
            until: letter.until,
            reached: None,
            tries: letter.tries,
            time: letter.time,
            sealed: None,
        };
        self.changes.push(LetterChange::Keep(kept, body));
        self.kept.extend(letter.replies.clone().map(|replies| (replies, letter.row)));
    }

    /// The text of a letter.
    pub(super) fn body(&self, store: &HomeStore, row: i64) -> Result<Zeroizing<Vec<u8>>, HomeStoreError> {
        let pending = self.changes.iter().find_map(|change| match change {
            LetterChange::Keep(letter, body) if letter.row == row => Some(body.clone()),
            _ => None,
        });
        pending.map_or_else(|| store.letter_body(row), Ok)
    }

    /// Whoever waits for a letter learns its end; where nobody does, it is news.
    pub(super) fn settle(
        &mut self,
        name: &Name,
        mut letter: Letter,
        outcome: Result<Rung, Reason>,
        detail: Option<String>,
    ) {
        if letter.is_attended() {
            letter.tell(end(outcome, detail));
        } else {
            self.settled.truncate(REMEMBERED - 1);
            self.settled.push_front((letter.row, outcome));
            // Known by its text, which is in the ledger or in the store.
            self.keep(name, &mut letter);
            let (to, text) = (name.as_str().to_owned(), String::new());
            self.news.push((letter.row, Settled { to, text, time: letter.time, outcome }));
        }
        self.erase(&letter);
    }

    pub(super) fn erase(&mut self, letter: &Letter) {
        self.letters = self.letters.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(length(letter.len));
        if letter.body.is_none() {
            self.changes.push(LetterChange::Settle(letter.row));
        }
    }

    /// Makes everything durable, and returns what may leave then.
    pub(super) fn write(&mut self, store: &mut HomeStore) -> Result<Vec<(Rungs, Vec<u8>)>, HomeStoreError> {
        for place in 0..self.news.len() {
            let Some((row, _)) = self.news.get(place).filter(|(_, news)| news.text.is_empty()) else { continue };
            let body = self.body(store, *row)?;
            let text = String::from_utf8_lossy(body.get(..SHOWN).unwrap_or(&body)).into_owned();
            if let Some((_, news)) = self.news.get_mut(place) {
                news.text = text;
            }
        }
        if self.changes.is_empty() {
            return Ok(Vec::new());
        }
        store.change_letters(&self.changes)?;
        for (replies, letter) in self.kept.drain(..) {
            let _ = replies.send(Reply::Kept { letter });
        }
        let sealed = self.changes.drain(..).filter_map(|change| match change {
            LetterChange::Seal { envelope, .. } => Some(envelope),
            _ => None,
        });
        Ok(self.wanted.drain(..).zip(sealed).collect())
    }
}
