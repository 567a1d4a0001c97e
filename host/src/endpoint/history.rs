//! What was said in chats, kept for later: sealed at rest under a key that only the identity key opens.
//!
//! Entries are sealed under a random key, and that key under one that is derived from the private half of the identity key:
//! whoever has the home's state and not the identity reads nothing, and a new identity key seals one key anew and not
//! everything. Without the identity key the history is lost. It protects no longer than the identity key does, which lies in
//! the same home: who needs more keeps no history.

use hkdf::Hkdf;
use ossicle_core::{Aead, NONCE_LEN, TAG_LEN};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::crypto::{HostAead, IdentityKey};
use crate::store::home::{HomeStore, HomeStoreError, Waiting};

const KEY_LEN: usize = 32;
const KEY_LABEL: &[u8] = b"ossicle history key";
const ENTRY_LABEL: &[u8] = b"ossicle history entry";

/// Something that was said.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When it came or was typed, in seconds since 1970.
    pub time: u64,
    /// Whose name it came under; `None` if this client said it.
    pub from: Option<String>,
    /// Whether its sender signed it.
    pub signed: bool,
    /// What it says.
    pub body: Vec<u8>,
}

impl HistoryEntry {
    /// A message that was read.
    pub fn read(waiting: &Waiting) -> Self {
        let message = &waiting.message;
        let from = Some(waiting.from.clone());
        Self { time: message.time, from, signed: message.signed, body: message.body.clone() }
    }
}

/// Why there is no history, or an entry of it cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum HistoryError {
    #[error(transparent)]
    Home(#[from] HomeStoreError),
    #[error(
        "the history of this home was kept under another identity key: it cannot be read, and nothing is added to it; \
         put that key back, or keep no history with --no-history"
    )]
    OtherIdentity,
    #[error("this system has no randomness")]
    Randomness,
}

/// See the module.
pub(super) struct History {
    key: Zeroizing<[u8; KEY_LEN]>,
}

impl History {
    /// The history of this identity, begun if there is none.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub(super) fn open(store: &HomeStore, identity: &IdentityKey) -> Result<Self, HistoryError> {
        let outer = outer_key(identity);
        if let Some(sealed) = store.history_key()? {
            let opened = open(&outer, KEY_LABEL, &sealed).ok_or(HistoryError::OtherIdentity)?;
            let key = <[u8; KEY_LEN]>::try_from(opened.as_slice()).map_err(|_| HistoryError::OtherIdentity)?;
            return Ok(Self { key: Zeroizing::new(key) });
        }
        let mut key = Zeroizing::new([0; KEY_LEN]);
        getrandom::fill(key.as_mut()).map_err(|_| HistoryError::Randomness)?;
        let history = Self { key };
        history.belong_to(store, identity)?;
        Ok(history)
    }

    /// From now on this identity key opens it.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub(super) fn belong_to(&self, store: &HomeStore, identity: &IdentityKey) -> Result<(), HistoryError> {
        let sealed = seal(&outer_key(identity), KEY_LABEL, self.key.as_slice())?;
        Ok(store.put_history_key(&sealed)?)
    }

    /// Keeps an entry of a conversation, durably.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub(super) fn keep(
        &self,
        store: &mut HomeStore,
        conversation: &str,
        entry: &HistoryEntry,
    ) -> Result<(), HistoryError> {
        let plain = Zeroizing::new(serde_json::to_vec(entry).map_err(|_| HomeStoreError::Damaged)?);
        let sealed = seal(&self.key, &label(conversation), &plain)?;
        Ok(store.keep_history(conversation, &sealed)?)
    }

    /// The latest entries of a conversation, in their order.
    ///
    /// # Errors
    /// [`HistoryError`]; [`HomeStoreError::Damaged`] if one of them was changed, or belongs to another conversation.
    pub(super) fn latest(
        &self,
        store: &HomeStore,
        conversation: &str,
        limit: u32,
    ) -> Result<Vec<HistoryEntry>, HistoryError> {
        let label = label(conversation);
        let read = |sealed: Vec<u8>| {
            let plain = open(&self.key, &label, &sealed)?;
            serde_json::from_slice(&plain).ok()
        };
        let entries = store.history(conversation, limit)?.into_iter().map(read).collect::<Option<Vec<_>>>();
        Ok(entries.ok_or(HomeStoreError::Damaged)?)
    }
}

fn label(conversation: &str) -> Vec<u8> {
    [ENTRY_LABEL, &[0], conversation.as_bytes()].concat()
}

/// The key that the private half of an identity key opens.
fn outer_key(identity: &IdentityKey) -> Zeroizing<[u8; KEY_LEN]> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    // The length is one that is always possible.
    let _ = Hkdf::<Sha256>::new(Some(KEY_LABEL), identity.pkcs8()).expand(KEY_LABEL, key.as_mut());
    key
}

/// nonce, text, tag
fn seal(key: &[u8; KEY_LEN], label: &[u8], plain: &[u8]) -> Result<Vec<u8>, HistoryError> {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce).map_err(|_| HistoryError::Randomness)?;
    let mut text = plain.to_vec();
    let tag = HostAead::new(key).seal(&nonce, label, &mut text).map_err(|_| HistoryError::Randomness)?;
    Ok([&nonce[..], &text, &tag].concat())
}

fn open(key: &[u8; KEY_LEN], label: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
    let (text, tag) = rest.split_last_chunk::<TAG_LEN>()?;
    let mut text = Zeroizing::new(text.to_vec());
    HostAead::new(key).open(nonce, label, &mut text, tag).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn entry(body: &str) -> HistoryEntry {
        HistoryEntry { time: 1_700_000_000, from: Some("bob".into()), signed: true, body: body.into() }
    }

    fn key() -> IdentityKey {
        IdentityKey::generate(2048).unwrap()
    }

    fn store(directory: &Path) -> HomeStore {
        HomeStore::open(&directory.join("home.db")).unwrap()
    }

    #[test]
    fn what_was_said_is_read_again_with_the_identity_and_not_without() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (key(), key());
        let mut kept = store(directory.path());
        let history = History::open(&kept, &first).unwrap();
        for said in ["one", "a secret that nobody finds", "three"] {
            history.keep(&mut kept, "@bob", &entry(said)).unwrap();
        }
        assert!(matches!(History::open(&kept, &second), Err(HistoryError::OtherIdentity)));
        drop(kept);
        for file in std::fs::read_dir(directory.path()).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!bytes.windows(8).any(|window| window == b"a secret"), "on the disk it is sealed");
        }

        let kept = store(directory.path());
        let history = History::open(&kept, &first).unwrap();
        let said = |history: &History, limit| {
            let entries = history.latest(&kept, "@bob", limit).unwrap();
            entries.into_iter().map(|entry| String::from_utf8(entry.body).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(said(&history, 2), ["a secret that nobody finds", "three"]);
        // A new identity key takes it over.
        history.belong_to(&kept, &second).unwrap();
        assert!(matches!(History::open(&kept, &first), Err(HistoryError::OtherIdentity)));
        assert_eq!(said(&History::open(&kept, &second).unwrap(), 9).len(), 3);
    }

    #[test]
    fn an_entry_that_was_changed_or_moved_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let mut kept = store(directory.path());
        let history = History::open(&kept, &key()).unwrap();
        history.keep(&mut kept, "@bob", &entry("to bob")).unwrap();
        let mut sealed = kept.history("@bob", 1).unwrap().remove(0);
        kept.keep_history("@carol", &sealed).unwrap();
        let latest = |kept: &HomeStore, who| history.latest(kept, who, 9);
        assert_eq!(latest(&kept, "@bob").unwrap().len(), 1);
        assert!(matches!(latest(&kept, "@carol"), Err(HistoryError::Home(HomeStoreError::Damaged))));
        for place in [0, 20, sealed.len() - 1] {
            sealed[place] ^= 1;
            kept.erase_history("@bob").unwrap();
            kept.keep_history("@bob", &sealed).unwrap();
            assert!(latest(&kept, "@bob").is_err(), "{place}");
            sealed[place] ^= 1;
        }
        kept.keep_history("@dora", &[1; 10]).unwrap();
        assert!(latest(&kept, "@dora").is_err());
        assert!(latest(&kept, "@nobody").unwrap().is_empty());
    }
}
