//! The public conversation, as a home keeps it: up to where it was read, whose posts were shown, and what is still to be said.

use rusqlite::{OptionalExtension, params};

use super::{HomeStore, Result};

/// Posts that may wait until the server has them.
pub const MAX_OWN_POSTS: usize = 256;

/// Something that this client says to everybody and that the server has not confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPost {
    /// This client's count.
    pub number: u64,
    /// When it was said, in milliseconds since 1970.
    pub at: u64,
    /// What.
    pub body: Vec<u8>,
    /// Epoch of the bundle and signature, once it was sent: it is sent again with the same ones.
    pub signed: Option<(u32, [u8; 64])>,
}

impl HomeStore {
    /// The last post of the server's store of this epoch that this home is done with; 0 if there is none.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn public_place(&self, store_epoch: &[u8; 8]) -> Result<u64> {
        let sql = "SELECT seq FROM public_place WHERE store_epoch = ?1";
        let seq = self.db.query_row(sql, [store_epoch], |row| row.get::<_, i64>(0)).optional()?;
        Ok(seq.unwrap_or_default().cast_unsigned())
    }

    /// The count of the last post of this author that was shown.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn last_post_of(&self, author: &[u8; 16]) -> Result<Option<u64>> {
        let sql = "SELECT number FROM public_author WHERE id = ?1";
        Ok(self.db.query_row(sql, [author], |row| row.get::<_, i64>(0)).optional()?.map(i64::cast_unsigned))
    }

    /// This home is done with the posts up to `seq`; the last of them was shown, if an author and his count are given.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn done_with_post(&mut self, store_epoch: &[u8; 8], seq: u64, shown: Option<([u8; 16], u64)>) -> Result<()> {
        let transaction = self.db.transaction()?;
        let sql = "INSERT INTO public_place (one, store_epoch, seq) VALUES (1, ?1, ?2)
                   ON CONFLICT (one) DO UPDATE SET store_epoch = ?1, seq = ?2";
        transaction.prepare_cached(sql)?.execute(params![store_epoch, seq.cast_signed()])?;
        if let Some((author, number)) = shown {
            let sql = "INSERT OR REPLACE INTO public_author (id, number) VALUES (?1, ?2)";
            transaction.prepare_cached(sql)?.execute(params![author, number.cast_signed()])?;
        }
        Ok(transaction.commit()?)
    }

    /// Takes in something to be said, under a count that is higher than any before and than the milliseconds `at`. `None` if
    /// too much waits already.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn add_post(&mut self, at: u64, body: &[u8]) -> Result<Option<u64>> {
        let transaction = self.db.transaction()?;
        let count: i64 = transaction.query_row("SELECT count(*) FROM own_post", [], |row| row.get(0))?;
        if usize::try_from(count).map_or(true, |count| count >= MAX_OWN_POSTS) {
            return Ok(None);
        }
        let last: i64 =
            transaction.query_row("SELECT coalesce(max(number), 0) FROM own_number", [], |row| row.get(0))?;
        let number = last.saturating_add(1).max(i64::try_from(at).unwrap_or(i64::MAX));
        transaction.execute("INSERT OR REPLACE INTO own_number (one, number) VALUES (1, ?1)", [number])?;
        let sql = "INSERT INTO own_post (number, at, body) VALUES (?1, ?2, ?3)";
        transaction.execute(sql, params![number, at.cast_signed(), body])?;
        transaction.commit()?;
        Ok(Some(number.cast_unsigned()))
    }

    /// The first that is to be said.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn next_post(&self) -> Result<Option<OwnPost>> {
        let sql = "SELECT number, at, body, epoch, signature FROM own_post ORDER BY number LIMIT 1";
        let post = self.db.query_row(sql, [], |row| {
            let (epoch, signature): (Option<u32>, Option<[u8; 64]>) = (row.get(3)?, row.get(4)?);
            Ok(OwnPost {
                number: row.get::<_, i64>(0)?.cast_unsigned(),
                at: row.get::<_, i64>(1)?.cast_unsigned(),
                body: row.get(2)?,
                signed: epoch.zip(signature),
            })
        });
        Ok(post.optional()?)
    }

    /// How it was signed, or that it is to be signed anew.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn sign_post(&self, number: u64, signed: Option<(u32, [u8; 64])>) -> Result<()> {
        let sql = "UPDATE own_post SET epoch = ?2, signature = ?3 WHERE number = ?1";
        let (epoch, signature) = signed.unzip();
        self.db.execute(sql, params![number.cast_signed(), epoch, signature])?;
        Ok(())
    }

    /// It was said, or never will be.
    ///
    /// # Errors
    /// [`super::HomeStoreError`].
    pub fn drop_post(&self, number: u64) -> Result<()> {
        self.db.execute("DELETE FROM own_post WHERE number = ?1", [number.cast_signed()])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_belongs_to_one_store_and_the_counts_to_their_authors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        assert_eq!((store.public_place(&[1; 8]).unwrap(), store.last_post_of(&[5; 16]).unwrap()), (0, None));
        store.done_with_post(&[1; 8], 7, Some(([5; 16], u64::MAX))).unwrap();
        store.done_with_post(&[1; 8], 9, None).unwrap();
        drop(store);
        let mut store = HomeStore::open(&path).unwrap();
        assert_eq!((store.public_place(&[1; 8]).unwrap(), store.public_place(&[2; 8]).unwrap()), (9, 0));
        assert_eq!(store.last_post_of(&[5; 16]).unwrap(), Some(u64::MAX));
        store.done_with_post(&[2; 8], 1, Some(([5; 16], 3))).unwrap();
        assert_eq!((store.public_place(&[1; 8]).unwrap(), store.public_place(&[2; 8]).unwrap()), (0, 1));
    }

    #[test]
    fn what_is_to_be_said_has_a_higher_count_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        assert_eq!(store.next_post().unwrap(), None);
        assert_eq!(store.add_post(1000, b"one").unwrap(), Some(1000));
        assert_eq!(store.add_post(1000, b"two").unwrap(), Some(1001));
        // The clock was set back, and set right.
        assert_eq!(store.add_post(5, b"three").unwrap(), Some(1002));
        assert_eq!(store.add_post(2000, b"four").unwrap(), Some(2000));
        store.sign_post(1000, Some((3, [7; 64]))).unwrap();
        drop(store);
        let mut store = HomeStore::open(&path).unwrap();
        let first = OwnPost { number: 1000, at: 1000, body: b"one".to_vec(), signed: Some((3, [7; 64])) };
        assert_eq!(store.next_post().unwrap(), Some(first.clone()));
        store.sign_post(1000, None).unwrap();
        assert_eq!(store.next_post().unwrap(), Some(OwnPost { signed: None, ..first }));
        for number in [1000, 1001, 1002, 2000] {
            assert_eq!(store.next_post().unwrap().unwrap().number, number);
            store.drop_post(number).unwrap();
        }
        assert_eq!(store.next_post().unwrap(), None);
        // What was said is counted on.
        assert_eq!(store.add_post(7, b"five").unwrap(), Some(2001));
        for _ in 1..MAX_OWN_POSTS {
            assert!(store.add_post(7, b"more").unwrap().is_some());
        }
        assert_eq!(store.add_post(7, b"too much").unwrap(), None);
    }
}
