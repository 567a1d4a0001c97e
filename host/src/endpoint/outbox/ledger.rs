//! The book of the outbox: what its letters change on disk is gathered here, written in one piece, and only then leaves.

use std::collections::{HashMap, VecDeque};

use ossicle_core::{Rung, Rungs};
use zeroize::Zeroizing;

use super::letter::{Letter, Parent, end, length};
use super::{Replies, Settled};
use crate::endpoint::local::Reply;
use crate::store::home::{
    HomeStore, HomeStoreError, Letter as KeptLetter, LetterChange, LetterId, MAX_SETTLED, Outcome,
};

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
    /// Who is told that a letter of his is kept.
    pub(super) kept: Vec<Replies>,
    pub(super) news: Vec<(i64, Settled)>,
    /// The rows of letters that are not settled.
    pub(super) rows: HashMap<LetterId, i64>,
    /// Letters that were settled lately, the latest last; the store has the same.
    pub(super) settled: VecDeque<(LetterId, Outcome)>,
    /// What became of letters of their own, for those that they are for: how far they came, and whether that is the end.
    pub(super) parts: Vec<Word>,
}

/// What became of a letter of its own.
pub(super) struct Word {
    pub(super) parent: Parent,
    pub(super) outcome: Outcome,
    pub(super) detail: Option<String>,
    /// Whether nothing more comes.
    pub(super) last: bool,
}

impl Ledger {
    /// A letter of its own came so far.
    pub(super) fn reached(&mut self, letter: &Letter, rung: Rung) {
        if let Some(parent) = &letter.parent {
            self.parts.push(Word { parent: parent.clone(), outcome: Ok(rung), detail: None, last: false });
        }
    }

    /// Notes a new letter to somebody, or to the group that is called so, and its text.
    pub(super) fn keep(&mut self, name: &str, letter: &mut Letter) {
        let Some(body) = letter.body.take() else { return };
        let kept = KeptLetter {
            row: letter.row,
            id: letter.id,
            to: name.to_owned(),
            sid: letter.sid.or_else(|| letter.parent.as_ref().map(|parent| parent.sid)),
            parent: letter.parent.as_ref().map(|parent| (parent.row, parent.member)),
            len: length(letter.len),
            signed: letter.signed,
            until: letter.until,
            reached: None,
            tries: letter.tries,
            time: letter.time,
            sealed: None,
        };
        self.changes.push(LetterChange::Keep(kept, body));
        self.kept.extend(letter.replies.clone());
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
    pub(super) fn settle(&mut self, name: &str, mut letter: Letter, outcome: Outcome, detail: Option<String>) {
        if let Some(parent) = &letter.parent {
            self.parts.push(Word { parent: parent.clone(), outcome, detail, last: true });
        } else if letter.is_attended() {
            letter.tell(end(outcome, detail));
        } else {
            self.announce(name, &mut letter, outcome);
        }
        self.erase(&letter, outcome);
    }

    /// Nobody waits for a letter, so that its end is news.
    pub(super) fn announce(&mut self, name: &str, letter: &mut Letter, outcome: Outcome) {
        // Known by its text, which is in the ledger or in the store.
        self.keep(name, letter);
        let (to, text) = (name.to_owned(), String::new());
        self.news.push((letter.row, Settled { to, text, time: letter.time, outcome }));
    }

    /// Nobody needs it any more; its end stays known for a while.
    pub(super) fn erase(&mut self, letter: &Letter, outcome: Outcome) {
        self.rows.remove(&letter.id);
        self.letters = self.letters.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(length(letter.len));
        if letter.body.is_none() {
            self.changes.push(LetterChange::Settle { row: letter.row, id: letter.id, outcome });
            self.settled.push_back((letter.id, outcome));
            if length(self.settled.len()) > MAX_SETTLED {
                self.settled.pop_front();
            }
        }
    }

    /// There is another letter.
    pub(super) fn enter(&mut self, letter: &Letter) {
        self.rows.insert(letter.id, letter.row);
        self.next += 1;
        self.letters += 1;
        self.bytes += length(letter.len);
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
        for replies in self.kept.drain(..) {
            let _ = replies.send(Reply::Kept);
        }
        let sealed = self.changes.drain(..).filter_map(|change| match change {
            LetterChange::Seal { envelope, .. } => Some(envelope),
            _ => None,
        });
        Ok(self.wanted.drain(..).zip(sealed).collect())
    }
}
