//! What was said in chats, sealed: this file knows of an entry only to which conversation it belongs and when it came there
//! among the others.

use rusqlite::{OptionalExtension, params};

use super::{HomeStore, Result};

/// Entries that are kept of a conversation: the latest.
pub const MAX_HISTORY: i64 = if cfg!(test) { 4 } else { 10_000 };

impl HomeStore {
    /// The key that entries are sealed under, itself sealed, if there is one.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn history_key(&self) -> Result<Option<Vec<u8>>> {
        Ok(self.db.query_row("SELECT sealed FROM history_key", [], |row| row.get(0)).optional()?)
    }

    /// Puts that key, sealed, in the place of any other.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn put_history_key(&self, sealed: &[u8]) -> Result<()> {
        self.db.execute("INSERT OR REPLACE INTO history_key (one, sealed) VALUES (1, ?1)", [sealed])?;
        self.flush_log()
    }

    /// Keeps a sealed entry of a conversation behind all others. Beyond [`MAX_HISTORY`] the oldest goes.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn keep_history(&mut self, conversation: &str, sealed: &[u8]) -> Result<()> {
        let transaction = self.db.transaction()?;
        let sql = "INSERT INTO history (conversation, sealed) VALUES (?1, ?2)";
        transaction.prepare_cached(sql)?.execute(params![conversation, sealed])?;
        let sql = "DELETE FROM history WHERE conversation = ?1 AND place <=
                   (SELECT place FROM history WHERE conversation = ?1 ORDER BY place DESC LIMIT 1 OFFSET ?2)";
        transaction.prepare_cached(sql)?.execute(params![conversation, MAX_HISTORY])?;
        Ok(transaction.commit()?)
    }

    /// At most `limit` sealed entries of a conversation: the latest, in their order.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn history(&self, conversation: &str, limit: u32) -> Result<Vec<Vec<u8>>> {
        let sql = "SELECT sealed FROM (SELECT place, sealed FROM history WHERE conversation = ?1
                   ORDER BY place DESC LIMIT ?2) ORDER BY place";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map(params![conversation, limit], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Erases what is kept of a conversation, and returns how many entries that were.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn erase_history(&self, conversation: &str) -> Result<usize> {
        let erased = self.db.execute("DELETE FROM history WHERE conversation = ?1", [conversation])?;
        self.flush_log()?;
        Ok(erased)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_entries_are_kept_of_each_conversation() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        for n in 0..=MAX_HISTORY {
            store.keep_history("@bob", &[u8::try_from(n).unwrap()]).unwrap();
            store.keep_history("@carol", &[9]).unwrap();
        }
        let kept = |store: &HomeStore, limit| store.history("@bob", limit).unwrap().concat();
        assert_eq!(kept(&store, 99), [1, 2, 3, 4]);
        assert_eq!(kept(&store, 2), [3, 4], "the latest, in their order");
        assert_eq!(store.erase_history("@bob").unwrap(), 4);
        assert!(kept(&store, 99).is_empty());
        assert_eq!(store.history("@carol", 99).unwrap().len(), 4);
    }

    #[test]
    fn there_is_one_key() {
        let directory = tempfile::tempdir().unwrap();
        let store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        assert_eq!(store.history_key().unwrap(), None);
        store.put_history_key(&[1; 60]).unwrap();
        store.put_history_key(&[2; 60]).unwrap();
        assert_eq!(store.history_key().unwrap(), Some(vec![2; 60]));
    }
}
