//! The store in one SQLite file: the default, for one server with one data directory. Alone to name `rusqlite`.
//!
//! One thread writes: it takes whatever has queued up and what comes while it runs, for 2 ms or 512 operations, runs it as
//! one transaction, and answers everybody after the commit, which is on the disk by then (WAL, `synchronous=FULL`). So
//! one flush serves as many callers as came during the one before. What need not be durable is committed without a
//! flush if nothing else waits (`synchronous=NORMAL`): it is in order, and with the next flush on the disk. Another thread
//! reads, on its own connection, and never waits for a flush. A full disk refuses what does not fit and nothing else; a
//! failing one ends the store: what a failed flush has written nobody can know, so nothing more is acknowledged. Every row
//! has a sum (`sums`), and a third thread looks at every page once, unless the disk is full. Damage that it or the writer
//! meets ends the store, too; what a reader meets is given to nobody, and shown to whoever looks after the store. A lock
//! keeps a second server out of the directory.

use core::convert::Infallible;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::{HashMap, VecDeque};
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use async_trait::async_trait;
use rusqlite::{Connection, ErrorCode, InterruptHandle, OpenFlags, OptionalExtension, Row, ToSql, ffi, params};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tracing::debug;

use super::{
    Account, AccountChange, AccountError, Announce, AnswerError, BundleRecord, ChainError, ChainId, ChainRoute,
    ChannelError, ChannelId, ChannelRecord, ClientId, ClientRecord, CloseError, Closing, Conversation, ConversationId,
    EnrolError, Enrolled, Enrolment, FoundError, Founded, Founding, Item, LoggedIn, LoginEntry, LoginError, MAX_ROUTES,
    MemberAnswer, MemberSignature, Meta, NewItem, NewKey, NewPost, Posts, PublishError, Put, PutError, QueueLimits,
    Refuse, RefusedEntry, RotateError, Said, SayError, Store, StoreError, Successor, Token, TokenError, TokenId,
    TokenRefusal, Tokens, Verifier, Waiting,
};
use crate::metrics::{StoreHealth, WriterMetrics};
use crate::name::{Name, Pattern};

mod conversation;
mod parcel;
mod public;
mod queue;
pub(super) mod sums;
#[cfg(test)]
mod tests;

use parcel::Index;
use queue::{Counts, Given, Ledger};

/// Operations that may wait for a thread; who comes later waits for room.
const QUEUE: usize = 1024;
/// Operations that share one flush at most; each item of a queue is one.
const MAX_BATCH: usize = 512;
/// For how long a transaction takes in what comes.
const BATCH_TIME: Duration = Duration::from_millis(2);
/// When a client was last seen is written within this.
const SEEN_WITHIN: Duration = Duration::from_secs(1);
/// Seconds for which ended tokens are remembered.
const TOKEN_MEMORY: u64 = 30 * 24 * 60 * 60;

/// "OSSI": tells our files from any other SQLite file.
const APPLICATION_ID: i32 = 0x4f53_5349;
/// Version of the tables. A newer one is refused, an older one is brought up to date.
const SCHEMA_VERSION: i32 = 9;

const SCHEMA: &str = "
CREATE TABLE meta (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    server_id BLOB NOT NULL CHECK (length(server_id) = 16),
    store_epoch BLOB NOT NULL CHECK (length(store_epoch) = 8)
) STRICT;
CREATE TABLE client (
    id BLOB PRIMARY KEY CHECK (length(id) = 16),
    name TEXT NOT NULL,
    name_key TEXT NOT NULL,
    modulus BLOB NOT NULL UNIQUE,
    key_epoch INTEGER NOT NULL,
    enrolled_by BLOB REFERENCES client (id),
    enrolled_at INTEGER NOT NULL,
    revoked_at INTEGER,
    last_seen INTEGER,
    record_limit INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX client_name ON client (name_key) WHERE revoked_at IS NULL;
CREATE TABLE bundle (
    client BLOB PRIMARY KEY REFERENCES client (id),
    epoch INTEGER NOT NULL,
    bundle BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE token (
    id BLOB PRIMARY KEY CHECK (length(id) = 8),
    verifier BLOB NOT NULL CHECK (length(verifier) = 32),
    name_pattern TEXT,
    preset_id BLOB,
    expires INTEGER NOT NULL,
    uses INTEGER CHECK (uses >= 0),
    printed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE chain (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL CHECK (length(id) = 8),
    sender BLOB NOT NULL REFERENCES client (id),
    sid BLOB NOT NULL CHECK (length(sid) = 16),
    recipient BLOB NOT NULL REFERENCES client (id),
    UNIQUE (id, recipient)
) STRICT;
CREATE INDEX chain_pair ON chain (sender, recipient, seq);
CREATE INDEX chain_recipient ON chain (recipient);
CREATE TABLE channel (
    id BLOB PRIMARY KEY CHECK (length(id) = 16),
    client BLOB NOT NULL REFERENCES client (id),
    sealed BLOB NOT NULL,
    expires INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX channel_client ON channel (client);
";

/// What version 2 adds to version 1: keys that were replaced.
const ROTATION: &str = "
CREATE TABLE rotation (
    client BLOB NOT NULL REFERENCES client (id),
    key_epoch INTEGER NOT NULL,
    former BLOB NOT NULL UNIQUE,
    modulus BLOB NOT NULL,
    signature BLOB NOT NULL,
    PRIMARY KEY (client, key_epoch)
) STRICT, WITHOUT ROWID;
";

/// What version 7 adds: accounts with passwords. A client belongs to the account of its name.
const ACCOUNTS: &str = "
CREATE TABLE account (
    name_key TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    verifier TEXT NOT NULL,
    locked INTEGER NOT NULL,
    changed_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// A store in a data directory. Dropping it waits for what was acknowledged to be written out, then frees the directory.
pub struct SqliteStore {
    meta: Meta,
    limits: QueueLimits,
    shared: Arc<Shared>,
    queues: Arc<Queues>,
    /// `None` only while dropping, as `reader`.
    writer: Option<mpsc::Sender<Box<dyn Write>>>,
    reader: Option<mpsc::Sender<Read>>,
    /// The reader's, and the writer's.
    threads: [Option<JoinHandle<()>>; 2],
    /// Looks at every page once.
    check: Option<JoinHandle<()>>,
    /// Released last, when this is dropped.
    lock: File,
}

impl SqliteStore {
    /// Opens the store in `directory`, or makes both. Blocks for as long as the disk takes.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if another process has it open, [`StoreError::Newer`] if this version cannot read it, and the
    /// others if there is no room, no right, or no store in the file.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, QueueLimits::default())
    }

    /// [`SqliteStore::open`], with other bounds for what waits.
    ///
    /// # Errors
    /// Those of [`SqliteStore::open`].
    pub fn open_with(directory: &Path, limits: QueueLimits) -> Result<Self, StoreError> {
        Self::start(directory, limits, "FULL")
    }

    /// [`SqliteStore::open`], for tests of what a power cut does: nothing is ever flushed, so that every `Ok` is a lie.
    ///
    /// # Errors
    /// Those of [`SqliteStore::open`].
    #[doc(hidden)]
    pub fn open_unflushed(directory: &Path) -> Result<Self, StoreError> {
        Self::start(directory, QueueLimits::default(), "OFF")
    }

    fn start(directory: &Path, limits: QueueLimits, durable: &'static str) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared::new(directory));
        make_directory(directory).map_err(|error| shared.system("make", directory, &error))?;
        let lock = shared.lock(&directory.join("lock"))?;
        let path = directory.join("store.db");
        make_private(&path).map_err(|error| shared.system("open", &path, &error))?;
        let opened = || -> rusqlite::Result<_> {
            let writer = connect(&path)?;
            let meta = initialise(&writer)?;
            let read_only = || -> rusqlite::Result<_> {
                let db = connect(&path)?;
                db.pragma_update(None, "query_only", true)?;
                Ok(db)
            };
            let queues = match meta {
                Some(_) => {
                    sums::check(&writer)?;
                    (Index::of(&writer)?, queue::reserved(&writer)?)
                }
                None => Default::default(),
            };
            Ok((writer, [read_only()?, read_only()?], meta, queues))
        };
        let (writer, [reader, checker], meta, (index, reserved)) = opened().map_err(|error| shared.classify(&error))?;
        let Some(meta) = meta else {
            return Err(StoreError::Newer(shared.directory.clone()));
        };
        // The WAL has its name by now, and SQLite flushes a directory by fdatasync, which need not write names.
        sync_directory(directory).map_err(|error| shared.system("flush", directory, &error))?;
        let queues = Arc::new(Queues { counts: Counts::of(&index), index, given: Given::default() });

        let (write_jobs, write_queue) = mpsc::channel(QUEUE);
        let (read_jobs, read_queue) = mpsc::channel(QUEUE);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(name.into())
                .spawn(work)
                .map_err(|error| StoreError::Io(format!("cannot start a thread: {error}")))
        };
        let (for_writer, queues_for_writer) = (Arc::clone(&shared), Arc::clone(&queues));
        let write = move || {
            let Queues { counts, index, given } = &*queues_for_writer;
            let mut ledger = Ledger::new(limits, counts, index, given, reserved);
            let writer = Writer { db: &writer, shared: &for_writer, ledger: &mut ledger, durable, synchronous: "FULL" };
            write_all(writer, write_queue);
        };
        *shared.checking() = Some(checker.get_interrupt_handle());
        let for_checker = Arc::clone(&shared);
        let check = spawn("ossicle-check", Box::new(move || check_all(&checker, &for_checker)))?;
        let read = move || read_all(&reader, read_queue);
        let threads = [Some(spawn("ossicle-read", Box::new(read))?), Some(spawn("ossicle-write", Box::new(write))?)];
        Ok(Self {
            meta,
            limits,
            shared,
            queues,
            writer: Some(write_jobs),
            reader: Some(read_jobs),
            threads,
            check: Some(check),
            lock,
        })
    }

    /// Whether the look at every page since the start, by a thread beside all else, is over. What it finds ends the store.
    pub fn is_checked(&self) -> bool {
        self.check.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Runs `work` in the next transaction and returns once it is durable. A refusal leaves nothing of it.
    async fn write<T, E, F>(&self, work: F) -> Result<Result<T, E>, StoreError>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Fault<E>> + Send + 'static,
    {
        self.submit(Nature::ALONE, move |db, _: &mut Ledger<'_>| work(db)).await
    }

    /// [`SqliteStore::write`] for operations on queues. What is not [`Nature::ALONE`] is never refused.
    async fn submit<T, E, F>(&self, nature: Nature, work: F) -> Result<Result<T, E>, StoreError>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnOnce(&Connection, &mut Ledger<'_>) -> Result<T, Fault<E>> + Send + 'static,
    {
        self.shared.check()?;
        let (answer, answered) = oneshot::channel();
        let task = Task { nature, work: Some(work), result: None, answer };
        let writer = self.writer.as_ref().ok_or(StoreError::Closed)?;
        writer.send(Box::new(task)).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// [`SqliteStore::write`] for operations that are never refused.
    async fn update<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.update_queues(Nature::ALONE, move |db, _| work(db)).await
    }

    /// [`SqliteStore::submit`] for operations that are never refused.
    async fn update_queues<T, F>(&self, nature: Nature, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection, &mut Ledger<'_>) -> rusqlite::Result<T> + Send + 'static,
    {
        let work =
            move |db: &Connection, ledger: &mut Ledger<'_>| work(db, ledger).map_err(Fault::<Infallible>::Sqlite);
        match self.submit(nature, work).await? {
            Ok(value) => Ok(value),
            Err(never) => match never {},
        }
    }

    /// Runs `work` on what is durable now.
    async fn read<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.shared.check()?;
        let (answer, answered) = oneshot::channel();
        let job: Read = Box::new(move |db| {
            if !answer.is_closed() {
                // Nobody to tell is nobody's loss.
                let _ = answer.send(work(db));
            }
        });
        let reader = self.reader.as_ref().ok_or(StoreError::Closed)?;
        reader.send(job).await.map_err(|_| StoreError::Closed)?;
        let result = answered.await.map_err(|_| StoreError::Closed)?;
        result.map_err(|error| {
            let error = self.shared.classify(&error);
            if matches!(error, StoreError::Corrupt(_)) && self.shared.damaged.set(error.clone()).is_ok() {
                tracing::error!(%error, "what is damaged is given to nobody");
            }
            error
        })
    }

    /// Reads clients, and adds what of them is not durable yet.
    async fn read_clients<F>(&self, work: F) -> Result<Vec<ClientRecord>, StoreError>
    where
        F: FnOnce(&Connection) -> rusqlite::Result<Vec<ClientRecord>> + Send + 'static,
    {
        // Taken before the reading: what leaves it meanwhile is durable, so the reading finds it, or finds it twice.
        let seen = Arc::clone(&self.shared.seen());
        let mut records = self.read(work).await?;
        for record in &mut records {
            record.last_seen = record.last_seen.max(seen.get(&record.id).copied());
        }
        Ok(records)
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        if let Some(check) = self.check.take() {
            // What it has not begun cannot be interrupted.
            while !check.is_finished() {
                self.shared.end_check();
                thread::sleep(Duration::from_millis(1));
            }
        }
        // The writer closes the file last, and so leaves everything in it.
        let [reader, writer] = &mut self.threads;
        drop(self.reader.take());
        // A thread that panicked has nothing more to write.
        let _ = reader.take().map(JoinHandle::join);
        drop(self.writer.take());
        let _ = writer.take().map(JoinHandle::join);
        // A process that was begun meanwhile holds what this one has open, until it runs its program.
        let _ = self.lock.unlock();
    }
}

impl core::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SqliteStore").field("directory", &self.shared.directory).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for SqliteStore {
    fn meta(&self) -> Meta {
        self.meta
    }

    fn health(&self) -> StoreHealth {
        let shared = &self.shared;
        let is_full = shared.tight.load(Ordering::Relaxed);
        let refusing = shared.failed.get().or_else(|| shared.damaged.get());
        let refusing = refusing.cloned().or_else(|| is_full.then(|| StoreError::Full(shared.directory.clone())));
        let lengths = shared.files.iter().filter_map(|path| path.metadata().ok()).map(|file| file.len());
        let (waiting_clients, all) = self.queues.counts.all();
        StoreHealth {
            refusing: refusing.map(|error| error.to_string()),
            bytes: lengths.sum(),
            waiting: all.items,
            waiting_bytes: all.bytes,
            waiting_clients,
            writer: Some(Arc::clone(&shared.metrics)),
        }
    }

    async fn probe(&self) -> Result<(), StoreError> {
        // The page is written, whatever is on it.
        self.update(|db| db.execute("UPDATE meta SET server_id = server_id", []).map(|_| ())).await?;
        self.shared.damaged.get().cloned().map_or(Ok(()), Err)
    }

    async fn client(&self, id: &ClientId) -> Result<Option<ClientRecord>, StoreError> {
        let id = *id;
        let found = self.read_clients(move |db| select_clients(db, "id = ?", params![id])).await?;
        Ok(found.into_iter().next())
    }

    async fn client_by_name(&self, name: &Name) -> Result<Option<ClientRecord>, StoreError> {
        let key = name.key().to_owned();
        let condition = "name_key = ? AND revoked_at IS NULL";
        let found = self.read_clients(move |db| select_clients(db, condition, params![key])).await?;
        Ok(found.into_iter().next())
    }

    async fn clients(&self, after: Option<&Name>, limit: usize) -> Result<Vec<ClientRecord>, StoreError> {
        // Every key has at least one byte, so that the empty one stands before them all.
        let after = after.map(|name| name.key().to_owned()).unwrap_or_default();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let condition = "name_key > ? AND revoked_at IS NULL ORDER BY name_key LIMIT ?";
        self.read_clients(move |db| select_clients(db, condition, params![after, limit])).await
    }

    async fn enrol(&self, enrolment: Enrolment) -> Result<Enrolled, EnrolError> {
        self.write(move |db| enrol(db, &enrolment)).await?
    }

    async fn enrol_all(&self, batch: Vec<Enrolment>) -> Result<Vec<Enrolled>, RefusedEntry> {
        self.write(move |db| {
            let entered = batch.iter().enumerate().map(|(index, enrolment)| {
                enrol(db, enrolment).map_err(|fault| match fault {
                    Fault::Refused(error) => Fault::Refused(RefusedEntry { index, error }),
                    Fault::Sqlite(error) => Fault::Sqlite(error),
                })
            });
            entered.collect()
        })
        .await?
    }

    async fn revoke(
        &self,
        id: &ClientId,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Option<Vec<ClientId>>, StoreError> {
        let id = *id;
        self.update_queues(Nature::ALONE, move |db, ledger| {
            let revoked = db
                .prepare_cached("UPDATE client SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL")?
                .execute(params![to_time(now), id])?;
            cut_off(db, &id)?;
            if revoked > 0 {
                db.prepare_cached("DELETE FROM account WHERE name_key = (SELECT name_key FROM client WHERE id = ?)")?
                    .execute([id])?;
            }
            db.prepare_cached("DELETE FROM bundle WHERE client = ?")?.execute([id])?;
            db.prepare_cached("DELETE FROM author WHERE client = ?")?.execute([id])?;
            let mut told = queue::end(db, ledger, &id, &refuse)?;
            told.extend(conversation::revoke(db, &id, now, &announce)?);
            let told = conversation::tell(db, ledger, &told)?;
            Ok((revoked > 0).then_some(told))
        })
        .await
    }

    async fn rotate(&self, rotation: NewKey) -> Result<(), RotateError> {
        self.write(move |db| rotate(db, &rotation)).await?
    }

    async fn successor(&self, id: &ClientId, key_epoch: u32) -> Result<Option<Successor>, StoreError> {
        let id = *id;
        self.read(move |db| {
            // After a login there is no signature.
            let sql = "SELECT modulus, signature FROM rotation WHERE client = ? AND key_epoch = ? AND signature <> x''";
            db.prepare_cached(sql)?
                .query_row(params![id, i64::from(key_epoch) + 1], |row| {
                    Ok(Successor { modulus: row.get(0)?, signature: row.get(1)? })
                })
                .optional()
        })
        .await
    }

    async fn add_account(&self, name: Name, verifier: Verifier, now: u64) -> Result<(), AccountError> {
        self.write(move |db| {
            let added = db
                .prepare_cached(
                    "INSERT INTO account (name_key, name, verifier, locked, changed_at) VALUES (?, ?, ?, FALSE, ?)
                    ON CONFLICT (name_key) DO NOTHING",
                )?
                .execute(params![name.key(), name.as_str(), verifier.0, to_time(now)])?;
            if added == 0 { Err(Fault::Refused(AccountError::Exists)) } else { Ok(()) }
        })
        .await?
    }

    async fn account(&self, name: &Name) -> Result<Option<Account>, StoreError> {
        let key = name.key().to_owned();
        self.read(move |db| {
            db.prepare_cached(&format!("{SELECT_ACCOUNTS} WHERE name_key = ?"))?.query_row([key], account_of).optional()
        })
        .await
    }

    async fn accounts(&self, after: Option<&Name>, limit: usize) -> Result<Vec<Account>, StoreError> {
        let after = after.map(|name| name.key().to_owned()).unwrap_or_default();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.read(move |db| {
            let sql = format!("{SELECT_ACCOUNTS} WHERE name_key > ? ORDER BY name_key LIMIT ?");
            let mut query = db.prepare_cached(&sql)?;
            let accounts = query.query_map(params![after, limit], account_of)?;
            accounts.collect()
        })
        .await
    }

    async fn change_account(&self, name: &Name, change: AccountChange, now: u64) -> Result<bool, StoreError> {
        let key = name.key().to_owned();
        self.update(move |db| {
            let changed = match change {
                AccountChange::Password(Verifier(verifier)) => {
                    db.prepare_cached(
                        "DELETE FROM channel WHERE client = (
                            SELECT client.id FROM client JOIN account USING (name_key)
                            WHERE name_key = ? AND revoked_at IS NULL)",
                    )?
                    .execute([&key])?;
                    db.prepare_cached("UPDATE account SET verifier = ?, changed_at = ? WHERE name_key = ?")?
                        .execute(params![verifier, to_time(now), key])?
                }
                AccountChange::Locked(locked) => db
                    .prepare_cached("UPDATE account SET locked = ?, changed_at = ? WHERE name_key = ?")?
                    .execute(params![locked, to_time(now), key])?,
                AccountChange::Removed => {
                    db.prepare_cached("DELETE FROM account WHERE name_key = ?")?.execute([key])?
                }
            };
            Ok(changed > 0)
        })
        .await
    }

    async fn log_in(&self, login: LoginEntry) -> Result<LoggedIn, LoginError> {
        self.write(move |db| log_in(db, &login)).await?
    }

    async fn set_record_limit(&self, id: &ClientId, limit: u16) -> Result<(), StoreError> {
        let id = *id;
        let same = self
            .read(move |db| {
                db.prepare_cached("SELECT 1 FROM client WHERE id = ? AND record_limit = ?")?.exists(params![id, limit])
            })
            .await?;
        if same {
            return Ok(());
        }
        self.update(move |db| {
            db.prepare_cached("UPDATE client SET record_limit = ? WHERE id = ?")?.execute(params![limit, id])?;
            Ok(())
        })
        .await
    }

    async fn touch(&self, id: &ClientId, now: u64) -> Result<(), StoreError> {
        self.shared.check()?;
        {
            let mut seen = self.shared.seen();
            let last = Arc::make_mut(&mut seen).entry(*id).or_default();
            *last = now.max(*last);
        }
        if !self.shared.nudged.swap(true, Ordering::AcqRel) {
            // One transaction for all who come and go meanwhile. A store that is closed writes what was seen by itself.
            let writer = self.writer.as_ref().ok_or(StoreError::Closed)?.downgrade();
            tokio::spawn(async move {
                sleep(SEEN_WITHIN).await;
                // A full queue will be emptied soon, and every transaction takes what was seen along.
                let _ = writer.upgrade().map(|writer| writer.try_send(Box::new(Nudge)));
            });
        }
        Ok(())
    }

    async fn publish_bundle(
        &self,
        id: &ClientId,
        epoch: u32,
        bundle: &[u8],
        signature: &[u8],
    ) -> Result<(), PublishError> {
        let (id, bundle, signature) = (*id, bundle.to_vec(), signature.to_vec());
        self.write(move |db| publish(db, &id, epoch, &bundle, &signature)).await?
    }

    async fn bundle(&self, id: &ClientId) -> Result<Option<BundleRecord>, StoreError> {
        let id = *id;
        self.read(move |db| {
            db.prepare_cached("SELECT epoch, bundle, signature FROM bundle WHERE client = ?")?
                .query_row([id], |row| {
                    Ok(BundleRecord { epoch: row.get(0)?, bundle: row.get(1)?, signature: row.get(2)? })
                })
                .optional()
        })
        .await
    }

    async fn add_token(&self, token: Token) -> Result<(), TokenError> {
        self.write(move |db| {
            let added = db
                .prepare_cached(
                    "INSERT INTO token (id, verifier, name_pattern, preset_id, expires, uses, printed)
                    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                )?
                .execute(params![
                    token.id,
                    token.verifier,
                    token.name_pattern.as_ref().map(Pattern::as_str),
                    token.preset_id,
                    to_time(token.expires),
                    token.uses,
                    token.printed,
                ])?;
            if added == 0 { Err(Fault::Refused(TokenError::IdInUse)) } else { Ok(()) }
        })
        .await?
    }

    async fn token(&self, id: &TokenId) -> Result<Option<Token>, StoreError> {
        let id = *id;
        self.read(move |db| find_token(db, &id)).await
    }

    async fn tokens(&self, after: Option<&TokenId>, limit: usize, now: u64) -> Result<Vec<Token>, StoreError> {
        let after = after.copied();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.read(move |db| {
            let sql = format!(
                "{SELECT_TOKENS} WHERE (?1 IS NULL OR id > ?1) AND expires > ?2 AND (uses IS NULL OR uses > 0)
                ORDER BY id LIMIT ?3"
            );
            let mut query = db.prepare_cached(&sql)?;
            let tokens = query.query_map(params![after, to_time(now), limit], token_of)?;
            tokens.collect()
        })
        .await
    }

    async fn end_tokens(&self, which: Tokens, now: u64) -> Result<u64, StoreError> {
        let one = match which {
            Tokens::One(id) => Some(id),
            Tokens::All | Tokens::Printed => None,
        };
        self.update(move |db| {
            db.prepare_cached("DELETE FROM token WHERE expires < ?")?
                .execute([to_time(now.saturating_sub(TOKEN_MEMORY))])?;
            let ended = db
                .prepare_cached(
                    "UPDATE token SET expires = ?1
                    WHERE expires > ?1 AND (uses IS NULL OR uses > 0) AND (?2 OR (?3 AND printed) OR id IS ?4)",
                )?
                .execute(params![to_time(now), which == Tokens::All, which == Tokens::Printed, one])?;
            Ok(count(ended))
        })
        .await
    }

    async fn found(&self, founding: Founding) -> Result<Founded, FoundError> {
        self.submit(Nature::ALONE, move |db, ledger| conversation::found(db, ledger, &founding)).await?
    }

    async fn conversation(&self, sid: &ConversationId) -> Result<Option<Conversation>, StoreError> {
        let sid = *sid;
        self.read(move |db| conversation::look_up(db, &sid)).await
    }

    async fn invite_again(&self, client: &ClientId, now: u64) -> Result<bool, StoreError> {
        let client = *client;
        self.update_queues(Nature::ALONE, move |db, ledger| conversation::invite_again(db, ledger, &client, now)).await
    }

    async fn answer(&self, answer: MemberAnswer, announce: Announce) -> Result<Vec<ClientId>, AnswerError> {
        self.submit(Nature::ALONE, move |db, ledger| conversation::answer(db, ledger, &answer, &announce)).await?
    }

    async fn close(
        &self,
        sid: &ConversationId,
        by: &ClientId,
        signature: &MemberSignature,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Closing, CloseError> {
        let (sid, by, signature) = (*sid, *by, *signature);
        self.submit(Nature::ALONE, move |db, ledger| {
            conversation::close(db, ledger, (&sid, &by, &signature), now, &refuse, &announce)
        })
        .await?
    }

    async fn expire_invitations(
        &self,
        before: u64,
        limit: usize,
        now: u64,
        announce: Announce,
    ) -> Result<(usize, Vec<ClientId>), StoreError> {
        let nature = Nature { weight: limit.min(MAX_BATCH), ..Nature::ALONE };
        self.update_queues(nature, move |db, ledger| conversation::expire(db, ledger, (before, limit), now, &announce))
            .await
    }

    async fn say(&self, new: NewPost) -> Result<Said, SayError> {
        let most = self.limits.posts;
        self.write(move |db| public::say(db, &new, most)).await?
    }

    async fn posts(&self, after: u64, limit: usize) -> Result<Posts, StoreError> {
        self.read(move |db| public::read(db, after, limit)).await
    }

    async fn expire_posts(&self, before: u64) -> Result<u64, StoreError> {
        self.update(move |db| public::expire(db, before)).await
    }

    async fn register_chain(
        &self,
        chain: &ChainId,
        sender: &ClientId,
        sid: &ConversationId,
        recipient: &ClientId,
    ) -> Result<(), ChainError> {
        let (chain, sender, sid, recipient) = (*chain, *sender, *sid, *recipient);
        self.write(move |db| register_chain(db, &chain, &sender, &sid, &recipient)).await?
    }

    async fn chain(&self, chain: &ChainId) -> Result<Option<ChainRoute>, StoreError> {
        let chain = *chain;
        self.read(move |db| {
            let mut query = db.prepare_cached("SELECT sender, sid, recipient FROM chain WHERE id = ? ORDER BY seq")?;
            let mut rows = query.query([chain])?;
            let mut route: Option<ChainRoute> = None;
            while let Some(row) = rows.next()? {
                match &mut route {
                    Some(route) => route.recipients.push(row.get(2)?),
                    None => {
                        let (sender, sid, recipient) = (row.get(0)?, row.get(1)?, row.get(2)?);
                        let group = conversation::is_of_group(db, &sender, &sid, &recipient)?;
                        route = Some(ChainRoute { sender, sid, group, recipients: vec![recipient] });
                    }
                }
            }
            Ok(route)
        })
        .await
    }

    async fn put_channel(
        &self,
        client: &ClientId,
        channel: ChannelRecord,
        keep: Option<ChannelId>,
    ) -> Result<(), ChannelError> {
        let client = *client;
        self.write(move |db| {
            if !is_live(db, &client)? {
                return Err(Fault::Refused(ChannelError::Unknown));
            }
            db.prepare_cached("DELETE FROM channel WHERE client = ? AND id IS NOT ?")?
                .execute(params![client, keep])?;
            db.prepare_cached(
                "INSERT OR REPLACE INTO channel (id, client, sealed, expires, sum)
                 VALUES (?1, ?2, ?3, ?4, ossicle_sum(?1, ?2, ?3, ?4))",
            )?
            .execute(params![channel.id, client, channel.sealed, to_time(channel.expires)])?;
            Ok(())
        })
        .await?
    }

    async fn channel(&self, id: &ChannelId, now: u64) -> Result<Option<(ClientId, ChannelRecord)>, StoreError> {
        let id = *id;
        self.read(move |db| {
            db.prepare_cached("SELECT client, id, sealed, expires FROM channel WHERE id = ? AND expires > ?")?
                .query_row(params![id, to_time(now)], |row| {
                    let channel = ChannelRecord { id: row.get(1)?, sealed: row.get(2)?, expires: time(row, 3)? };
                    Ok((row.get(0)?, channel))
                })
                .optional()
        })
        .await
    }

    async fn channels(&self, client: &ClientId, now: u64) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        let client = *client;
        self.read(move |db| {
            let sql = "SELECT id, expires FROM channel WHERE client = ? AND expires > ? ORDER BY id";
            let mut query = db.prepare_cached(sql)?;
            let rows = query.query_map(params![client, to_time(now)], |row| Ok((row.get(0)?, time(row, 1)?)))?;
            rows.collect()
        })
        .await
    }

    async fn drop_channels(&self, client: &ClientId) -> Result<u64, StoreError> {
        let client = *client;
        self.update(move |db| Ok(count(db.prepare_cached("DELETE FROM channel WHERE client = ?")?.execute([client])?)))
            .await
    }

    async fn put(&self, items: Vec<NewItem>) -> Result<Vec<Result<Put, PutError>>, StoreError> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let nature = Nature { weight: items.len(), is_durable: true, needs_savepoint: false };
        let puts: Vec<_> = self.update_queues(nature, move |db, ledger| queue::put(db, ledger, &items)).await?;
        let metrics = &self.shared.metrics;
        for put in &puts {
            match put {
                Ok(Put::Stored { .. }) => metrics.stored.count(),
                Ok(Put::Repeat { .. }) => metrics.not_stored.count("repeat"),
                Err(PutError::QueueFull) => metrics.not_stored.count("queue-full"),
                Err(PutError::Rewound) => metrics.not_stored.count("rewound"),
                Err(PutError::UnknownRecipient) => metrics.not_stored.count("unknown"),
                Err(PutError::Store(_)) => metrics.not_stored.count("unavailable"),
            }
        }
        Ok(puts)
    }

    async fn queue(
        &self,
        recipient: &ClientId,
        after: u64,
        max_items: usize,
        max_bytes: usize,
    ) -> Result<Vec<Item>, StoreError> {
        let (recipient, queues) = (*recipient, Arc::clone(&self.queues));
        self.read(move |db| queue::read(db, &queues.index, &queues.given, &recipient, after, max_items, max_bytes))
            .await
    }

    async fn acknowledge(&self, recipient: &ClientId, up_to: u64) -> Result<u64, StoreError> {
        let recipient = *recipient;
        self.update_queues(Nature::LAZY, move |db, ledger| queue::acknowledge(db, ledger, &recipient, up_to)).await
    }

    async fn remove(&self, recipient: &ClientId, seqs: &[u64]) -> Result<u64, StoreError> {
        if seqs.is_empty() {
            return Ok(0);
        }
        let (recipient, seqs) = (*recipient, seqs.to_vec());
        let nature = Nature { weight: seqs.len(), ..Nature::LAZY };
        self.update_queues(nature, move |db, ledger| queue::remove(db, ledger, &recipient, seqs)).await
    }

    async fn waiting(&self, recipient: &ClientId) -> Result<Waiting, StoreError> {
        self.shared.check()?;
        Ok(self.queues.counts.waiting(recipient))
    }

    async fn expire(&self, before: u64, limit: usize, refuse: Refuse) -> Result<Vec<(ClientId, Item)>, StoreError> {
        let nature = Nature { weight: limit.min(MAX_BATCH), ..Nature::ALONE };
        self.update_queues(nature, move |db, ledger| queue::expire(db, ledger, before, limit, &refuse)).await
    }
}

// The operations that can be refused, each inside one transaction.

fn enrol(db: &Connection, enrolment: &Enrolment) -> Result<Enrolled, Fault<EnrolError>> {
    let Enrolment { id, name, modulus, .. } = enrolment;
    let same_id = db
        .prepare_cached("SELECT name_key, modulus, revoked_at IS NOT NULL FROM client WHERE id = ?")?
        .query_row([id], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, bool>(2)?)))
        .optional()?;
    if let Some((key, held, revoked)) = &same_id
        && key == name.key()
        && held == modulus
        && !revoked
    {
        return Ok(Enrolled::Repeat);
    }
    if let Some(enroller) = &enrolment.enrolled_by
        && !is_live(db, enroller)?
    {
        return Err(Fault::Refused(EnrolError::Enroller));
    }
    if let Some(token_id) = &enrolment.token_id {
        use_token(db, token_id, enrolment)?;
    }
    let named = "SELECT 1 FROM client WHERE name_key = ?1 AND revoked_at IS NULL
        UNION ALL SELECT 1 FROM account WHERE name_key = ?1 LIMIT 1";
    if db.prepare_cached(named)?.exists([name.key()])? {
        return Err(Fault::Refused(EnrolError::NameInUse));
    }
    if same_id.is_some_and(|(_, held, _)| held != *modulus) {
        return Err(Fault::Refused(EnrolError::IdInUse));
    }
    if is_known_key(db, modulus)? {
        return Err(Fault::Refused(EnrolError::KeyInUse));
    }
    insert(db, enrolment)?;
    Ok(Enrolled::New)
}

/// A client that is new in every respect.
fn insert(db: &Connection, enrolment: &Enrolment) -> rusqlite::Result<()> {
    let Enrolment { id, name, modulus, .. } = enrolment;
    db.prepare_cached(
        "INSERT INTO client (id, name, name_key, modulus, key_epoch, enrolled_by, enrolled_at, record_limit)
        VALUES (?, ?, ?, ?, 0, ?, ?, ?)",
    )?
    .execute(params![
        id,
        name.as_str(),
        name.key(),
        modulus,
        enrolment.enrolled_by,
        to_time(enrolment.now),
        enrolment.record_limit,
    ])?;
    Ok(())
}

const SELECT_ACCOUNTS: &str = "SELECT name, verifier, locked, changed_at FROM account";

/// A row of [`SELECT_ACCOUNTS`].
fn account_of(row: &Row<'_>) -> rusqlite::Result<Account> {
    Ok(Account { name: row.get(0)?, verifier: Verifier(row.get(1)?), locked: row.get(2)?, changed_at: time(row, 3)? })
}

fn log_in(db: &Connection, login: &LoginEntry) -> Result<LoggedIn, Fault<LoginError>> {
    let LoginEntry { name, id, modulus, .. } = login;
    let account = db
        .prepare_cached(&format!("{SELECT_ACCOUNTS} WHERE name_key = ?"))?
        .query_row([name.key()], account_of)
        .optional()?;
    let Some(account) = account.filter(|account| !account.locked && account.verifier == login.verifier) else {
        return Err(Fault::Refused(LoginError::Account));
    };
    let held = db
        .prepare_cached("SELECT id, modulus, key_epoch FROM client WHERE name_key = ? AND revoked_at IS NULL")?
        .query_row([name.key()], |row| {
            Ok((row.get::<_, ClientId>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, u32>(2)?))
        })
        .optional()?;
    if let Some((id, held, _)) = &held
        && held == modulus
    {
        return Ok(LoggedIn::Repeat(*id));
    }
    if is_known_key(db, modulus)? {
        return Err(Fault::Refused(LoginError::KeyInUse));
    }
    let Some((id, former, key_epoch)) = held else {
        if db.prepare_cached("SELECT 1 FROM client WHERE id = ?")?.exists([id])? {
            return Err(Fault::Refused(LoginError::IdInUse));
        }
        insert(
            db,
            &Enrolment {
                id: *id,
                // As the operator wrote it.
                name: Name::parse(&account.name).unwrap_or_else(|_| name.clone()),
                modulus: modulus.clone(),
                token_id: None,
                enrolled_by: None,
                record_limit: login.record_limit,
                now: login.now,
            },
        )?;
        return Ok(LoggedIn::New(*id));
    };
    let key_epoch = key_epoch.checked_add(1).ok_or(Fault::Refused(LoginError::Worn))?;
    replace_key(db, &id, key_epoch, &former, modulus, &[])?;
    db.prepare_cached("DELETE FROM bundle WHERE client = ?")?.execute([id])?;
    Ok(LoggedIn::Changed(id))
}

/// Puts a key in the place of the former one, which may have signed it.
fn replace_key(
    db: &Connection,
    id: &ClientId,
    key_epoch: u32,
    former: &[u8],
    modulus: &[u8],
    signature: &[u8],
) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT INTO rotation (client, key_epoch, former, modulus, signature) VALUES (?, ?, ?, ?, ?)")?
        .execute(params![id, key_epoch, former, modulus, signature])?;
    db.prepare_cached("UPDATE client SET modulus = ?, key_epoch = ? WHERE id = ?")?
        .execute(params![modulus, key_epoch, id])?;
    cut_off(db, id)
}

/// Drops channels, routes and posts of a client.
fn cut_off(db: &Connection, id: &ClientId) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM channel WHERE client = ?")?.execute([id])?;
    db.prepare_cached("DELETE FROM chain WHERE sender = ?1 OR recipient = ?1")?.execute([id])?;
    public::forget(db, id)
}

fn use_token(db: &Connection, id: &TokenId, enrolment: &Enrolment) -> Result<(), Fault<EnrolError>> {
    let refused = |refusal| Err(Fault::Refused(EnrolError::Token(refusal)));
    let Some(token) = find_token(db, id)? else {
        return refused(TokenRefusal::Unknown);
    };
    if token.expires <= enrolment.now {
        return refused(TokenRefusal::Expired);
    }
    if token.uses == Some(0) {
        return refused(TokenRefusal::UsedUp);
    }
    if token.name_pattern.is_some_and(|pattern| !pattern.matches(&enrolment.name)) {
        return refused(TokenRefusal::Name);
    }
    if token.preset_id.is_some_and(|preset| preset != enrolment.id) {
        return refused(TokenRefusal::Id);
    }
    db.prepare_cached("UPDATE token SET uses = uses - 1 WHERE id = ? AND uses IS NOT NULL")?.execute([id])?;
    Ok(())
}

fn find_token(db: &Connection, id: &TokenId) -> rusqlite::Result<Option<Token>> {
    db.prepare_cached(&format!("{SELECT_TOKENS} WHERE id = ?"))?.query_row([id], token_of).optional()
}

const SELECT_TOKENS: &str = "SELECT id, verifier, name_pattern, preset_id, expires, uses, printed FROM token";

/// A row of [`SELECT_TOKENS`].
fn token_of(row: &Row<'_>) -> rusqlite::Result<Token> {
    let pattern: Option<String> = row.get(2)?;
    let name_pattern = pattern
        .map(|text| Pattern::parse(&text))
        .transpose()
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(2, rusqlite::types::Type::Text, Box::new(error)))?;
    Ok(Token {
        id: row.get(0)?,
        verifier: row.get(1)?,
        name_pattern,
        preset_id: row.get(3)?,
        expires: time(row, 4)?,
        uses: row.get(5)?,
        printed: row.get(6)?,
    })
}

fn publish(
    db: &Connection,
    id: &ClientId,
    epoch: u32,
    bundle: &[u8],
    signature: &[u8],
) -> Result<(), Fault<PublishError>> {
    if !is_live(db, id)? {
        return Err(Fault::Refused(PublishError::Unknown));
    }
    let stored = db
        .prepare_cached("SELECT epoch, bundle FROM bundle WHERE client = ?")?
        .query_row([id], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, Vec<u8>>(1)?)))
        .optional()?;
    if let Some((stored, held)) = stored {
        // Signatures are randomised: the same bundle signed again is the same bundle.
        if stored == epoch && held == bundle {
            return Ok(());
        }
        // Gaps are fine: a restored server knows fewer epochs than its clients.
        if epoch <= stored {
            return Err(Fault::Refused(PublishError::Epoch { stored }));
        }
    }
    db.prepare_cached("INSERT OR REPLACE INTO bundle (client, epoch, bundle, signature) VALUES (?, ?, ?, ?)")?
        .execute(params![id, epoch, bundle, signature])?;
    Ok(())
}

fn rotate(db: &Connection, rotation: &NewKey) -> Result<(), Fault<RotateError>> {
    let NewKey { id, key_epoch, modulus, signature, bundle } = rotation;
    let present = db
        .prepare_cached("SELECT modulus, key_epoch FROM client WHERE id = ? AND revoked_at IS NULL")?
        .query_row([id], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, u32>(1)?)))
        .optional()?;
    let Some((former, present)) = present else {
        return Err(Fault::Refused(RotateError::Unknown));
    };
    if present == *key_epoch && former == *modulus && present > 0 {
        return Ok(());
    }
    if present.checked_add(1) != Some(*key_epoch) {
        return Err(Fault::Refused(RotateError::KeyEpoch { present }));
    }
    if is_known_key(db, modulus)? {
        return Err(Fault::Refused(RotateError::KeyInUse));
    }
    match publish(db, id, bundle.epoch, &bundle.bundle, &bundle.signature) {
        Ok(()) => {}
        Err(Fault::Refused(PublishError::Epoch { stored })) => {
            return Err(Fault::Refused(RotateError::BundleEpoch { stored }));
        }
        Err(Fault::Refused(_)) => return Err(Fault::Refused(RotateError::Unknown)),
        Err(Fault::Sqlite(error)) => return Err(Fault::Sqlite(error)),
    }
    replace_key(db, id, *key_epoch, &former, modulus, signature)?;
    Ok(())
}

/// Whether this is, or ever was, the key of a client.
fn is_known_key(db: &Connection, modulus: &[u8]) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT 1 FROM client WHERE modulus = ?1 UNION ALL SELECT 1 FROM rotation WHERE former = ?1 LIMIT 1",
    )?
    .exists([modulus])
}

fn register_chain(
    db: &Connection,
    chain: &ChainId,
    sender: &ClientId,
    sid: &ConversationId,
    recipient: &ClientId,
) -> Result<(), Fault<ChainError>> {
    if !is_live(db, sender)? || !is_live(db, recipient)? {
        return Err(Fault::Refused(ChainError::Unknown));
    }
    conversation::admit_chain(db, sender, sid, recipient)?;
    let other = db
        .prepare_cached("SELECT 1 FROM chain WHERE id = ? AND (sender <> ? OR sid <> ?)")?
        .exists(params![chain, sender, sid])?;
    if other {
        return Err(Fault::Refused(ChainError::InUse));
    }
    db.prepare_cached(
        "INSERT INTO chain (id, sender, sid, recipient) VALUES (?, ?, ?, ?) ON CONFLICT (id, recipient) DO NOTHING",
    )?
    .execute(params![chain, sender, sid, recipient])?;
    db.prepare_cached(
        "DELETE FROM chain WHERE seq IN (
            SELECT seq FROM chain WHERE sender = ? AND recipient = ? ORDER BY seq DESC LIMIT -1 OFFSET ?)",
    )?
    .execute(params![sender, recipient, i64::try_from(MAX_ROUTES).unwrap_or(i64::MAX)])?;
    Ok(())
}

fn is_live(db: &Connection, id: &ClientId) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT 1 FROM client WHERE id = ? AND revoked_at IS NULL")?.exists([id])
}

fn select_clients(db: &Connection, condition: &str, values: &[&dyn ToSql]) -> rusqlite::Result<Vec<ClientRecord>> {
    let sql = format!(
        "SELECT id, name, modulus, key_epoch, enrolled_by, revoked_at IS NOT NULL, enrolled_at, last_seen, record_limit
        FROM client WHERE {condition}"
    );
    let mut query = db.prepare_cached(&sql)?;
    let clients = query.query_map(values, |row| {
        Ok(ClientRecord {
            id: row.get(0)?,
            name: row.get(1)?,
            modulus: row.get(2)?,
            key_epoch: row.get(3)?,
            enrolled_by: row.get(4)?,
            revoked: row.get(5)?,
            enrolled_at: time(row, 6)?,
            last_seen: row.get::<_, Option<i64>>(7)?.map(|_| time(row, 7)).transpose()?,
            record_limit: row.get(8)?,
        })
    })?;
    clients.collect()
}

fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let seconds: i64 = row.get(column)?;
    u64::try_from(seconds).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, seconds))
}

/// SQLite has no unsigned numbers; no clock comes near the difference.
fn to_time(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

fn count(rows: usize) -> u64 {
    u64::try_from(rows).unwrap_or(u64::MAX)
}

// The threads.

/// What the two threads and the callers share.
pub(super) struct Shared {
    /// For sentences.
    directory: String,
    /// Set once by a failed write, and the answer to everything from then on.
    failed: OnceLock<StoreError>,
    /// What a reader met first. The rest can be used, and whoever looks after the store is told.
    damaged: OnceLock<StoreError>,
    /// Who was seen when, not durable yet.
    seen: Mutex<Arc<HashMap<ClientId, u64>>>,
    /// Whether the writer has been told about `seen`.
    nudged: AtomicBool,
    /// Whether the last transaction found the disk full.
    tight: AtomicBool,
    /// How to end the look at every page.
    check: Mutex<Option<InterruptHandle>>,
    metrics: Arc<WriterMetrics>,
    /// Its own file, and that of what was written last.
    files: [PathBuf; 2],
}

/// What is known of the queues without a look at the disk.
struct Queues {
    counts: Counts,
    index: Index,
    given: Given,
}

type Read = Box<dyn FnOnce(&Connection) + Send>;

/// What the writer has to know of an operation.
#[derive(Clone, Copy)]
struct Nature {
    /// How many operations it counts for.
    weight: usize,
    /// Whether the caller waits for the disk.
    is_durable: bool,
    /// Whether something may have to be taken back when it ends before its time.
    needs_savepoint: bool,
}

impl Nature {
    const ALONE: Self = Self { weight: 1, is_durable: true, needs_savepoint: true };
    const LAZY: Self = Self { weight: 1, is_durable: false, needs_savepoint: false };
}

/// Why an operation did not happen.
enum Fault<E> {
    Refused(E),
    Sqlite(rusqlite::Error),
}

impl<E> From<rusqlite::Error> for Fault<E> {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// An operation in the writer's queue.
trait Write: Send {
    fn nature(&self) -> Nature;

    /// Does it. `false` if nothing of it may remain.
    fn run(&mut self, db: &Connection, ledger: &mut Ledger<'_>) -> rusqlite::Result<bool>;

    /// Tells the caller, once it is known whether the transaction is durable.
    fn answer(self: Box<Self>, outcome: Result<(), StoreError>);
}

struct Task<T, E, F> {
    nature: Nature,
    /// Until it has run.
    work: Option<F>,
    result: Option<Result<T, E>>,
    answer: oneshot::Sender<Result<Result<T, E>, StoreError>>,
}

impl<T, E, F> Write for Task<T, E, F>
where
    T: Send,
    E: Send,
    F: FnOnce(&Connection, &mut Ledger<'_>) -> Result<T, Fault<E>> + Send,
{
    fn nature(&self) -> Nature {
        self.nature
    }

    fn run(&mut self, db: &Connection, ledger: &mut Ledger<'_>) -> rusqlite::Result<bool> {
        // Whoever left before it began does not want it any more.
        if self.answer.is_closed() {
            return Ok(false);
        }
        let Some(work) = self.work.take() else {
            return Ok(false);
        };
        match work(db, ledger) {
            Ok(value) => {
                self.result = Some(Ok(value));
                Ok(true)
            }
            Err(Fault::Refused(refusal)) => {
                self.result = Some(Err(refusal));
                Ok(false)
            }
            Err(Fault::Sqlite(error)) => Err(error),
        }
    }

    fn answer(self: Box<Self>, outcome: Result<(), StoreError>) {
        let answer = match (outcome, self.result) {
            (Ok(()), Some(result)) => Ok(result),
            (Ok(()), None) => return,
            (Err(error), _) => Err(error),
        };
        // Who left meanwhile cannot be told; the operation stands.
        let _ = self.answer.send(answer);
    }
}

/// Wakes the writer for what was seen.
struct Nudge;

impl Write for Nudge {
    fn nature(&self) -> Nature {
        Nature::LAZY
    }

    fn run(&mut self, _: &Connection, _: &mut Ledger<'_>) -> rusqlite::Result<bool> {
        Ok(true)
    }

    fn answer(self: Box<Self>, _: Result<(), StoreError>) {}
}

fn read_all(db: &Connection, mut queue: mpsc::Receiver<Read>) {
    while let Some(job) = queue.blocking_recv() {
        job(db);
    }
}

fn check_all(db: &Connection, shared: &Shared) {
    let Err(error) = sums::check_pages(db) else { return };
    match shared.classify(&error) {
        error @ StoreError::Corrupt(_) => shared.fail(error),
        // It was interrupted, or the disk does not let itself be read: who needs what is there will hear of it.
        error => debug!(directory = %shared.directory, %error, "not every page was looked at"),
    }
}

fn write_all(mut writer: Writer<'_, '_>, mut queue: mpsc::Receiver<Box<dyn Write>>) {
    let (mut came, mut jobs) = (Vec::new(), VecDeque::new());
    while !jobs.is_empty() || queue.blocking_recv_many(&mut came, MAX_BATCH) > 0 {
        jobs.extend(came.drain(..));
        writer.write_batch(&mut jobs, || queue.try_recv().ok());
    }
    writer.write_batch(&mut jobs, || None);
}

/// The thread that writes.
struct Writer<'a, 's> {
    db: &'a Connection,
    shared: &'a Shared,
    ledger: &'a mut Ledger<'s>,
    /// How what is to be durable is committed, and how the next transaction is: values of `synchronous`.
    durable: &'static str,
    synchronous: &'static str,
}

type Outcome = (Box<dyn Write>, Result<(), StoreError>);

impl Writer<'_, '_> {
    /// Does the first of `jobs`, and what `more` brings meanwhile, in one transaction, then answers them all: also a
    /// refusal may rest on what another job of the batch did.
    fn write_batch(&mut self, jobs: &mut VecDeque<Box<dyn Write>>, more: impl FnMut() -> Option<Box<dyn Write>>) {
        if let Some(error) = self.shared.failed.get() {
            for job in jobs.drain(..) {
                job.answer(Err(error.clone()));
            }
            return;
        }
        // First this, then the look at `seen`: whoever adds something later nudges again.
        self.shared.nudged.store(false, Ordering::Release);
        let seen = Arc::clone(&self.shared.seen());
        let mut done = Vec::with_capacity(jobs.len());
        match self.transact(jobs, more, &seen, &mut done) {
            Ok(()) => {
                self.ledger.commit();
                self.shared.tight.store(false, Ordering::Relaxed);
                if !seen.is_empty() {
                    Arc::make_mut(&mut self.shared.seen()).retain(|id, now| seen.get(id) != Some(now));
                }
                for (job, outcome) in done {
                    job.answer(outcome);
                }
            }
            Err(error) => {
                let mut error = self.shared.classify(&error);
                if !self.db.is_autocommit()
                    && let Err(worse) = self.db.execute_batch("ROLLBACK")
                {
                    error = StoreError::Io(worse.to_string());
                }
                self.ledger.roll_back();
                self.shared.tight.store(matches!(error, StoreError::Full(_)), Ordering::Relaxed);
                self.shared.metrics.failures.count();
                if matches!(error, StoreError::Io(_) | StoreError::Corrupt(_)) {
                    self.shared.fail(error.clone());
                }
                for (job, _) in done {
                    job.answer(Err(error.clone()));
                }
            }
        }
    }

    fn transact(
        &mut self,
        jobs: &mut VecDeque<Box<dyn Write>>,
        mut more: impl FnMut() -> Option<Box<dyn Write>>,
        seen: &HashMap<ClientId, u64>,
        done: &mut Vec<Outcome>,
    ) -> rusqlite::Result<()> {
        let db = self.db;
        let run = |sql: &str| db.prepare_cached(sql)?.execute([]).map(|_| ());
        if jobs.is_empty() && seen.is_empty() {
            return Ok(());
        }
        // The last jobs are done, and whoever opens the store next finds them, as far as it is for this thread.
        let is_flushing = jobs.is_empty() || jobs.iter().any(|job| job.nature().is_durable);
        let synchronous = if is_flushing { self.durable } else { "NORMAL" };
        if synchronous != self.synchronous {
            db.pragma_update(None, "synchronous", synchronous)?;
            self.synchronous = synchronous;
        }
        if self.shared.tight.load(Ordering::Relaxed) {
            // Nothing of the WAL is given back while somebody looks at all there is, and the next start looks again.
            self.shared.end_check();
            if self.shared.has_room_for_all(db)? {
                shrink(db)?;
            }
        }
        run("BEGIN IMMEDIATE")?;
        let begun = Instant::now();
        let mut weight = 0_usize;
        loop {
            let next = jobs.pop_front().or_else(|| {
                // What comes now may wait for the disk.
                if is_flushing && begun.elapsed() < BATCH_TIME { more() } else { None }
            });
            let Some(job) = next else { break };
            let add = job.nature().weight;
            if weight > 0 && weight.saturating_add(add) > MAX_BATCH {
                jobs.push_front(job);
                break;
            }
            weight = weight.saturating_add(add);
            done.push((job, Ok(())));
            if let Some((job, outcome)) = done.last_mut() {
                self.run_one(job.as_mut(), outcome)?;
            }
        }
        for (id, now) in seen {
            db.prepare_cached(
                "UPDATE client SET last_seen = ?2 WHERE id = ?1 AND (last_seen IS NULL OR last_seen < ?2)",
            )?
            .execute(params![id, to_time(*now)])?;
        }
        run("COMMIT")?;
        if weight > 0 {
            self.shared.metrics.seconds.took(begun.elapsed());
            self.shared.metrics.operations.were(u32::try_from(weight).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    fn run_one(&mut self, job: &mut dyn Write, outcome: &mut Result<(), StoreError>) -> rusqlite::Result<()> {
        let db = self.db;
        let run = |sql: &str| db.prepare_cached(sql)?.execute([]).map(|_| ());
        let is_undoable = job.nature().needs_savepoint;
        if is_undoable {
            run("SAVEPOINT job")?;
        }
        self.ledger.begin();
        match job.run(db, self.ledger) {
            Ok(true) => {}
            Ok(false) if is_undoable => run("ROLLBACK TO job")?,
            Ok(false) => {}
            Err(error) if !is_undoable || self.ledger.is_touched() || spoils_all(db, &error) => return Err(error),
            Err(error) => {
                *outcome = Err(self.shared.classify(&error));
                run("ROLLBACK TO job")?;
            }
        }
        if is_undoable { run("RELEASE job") } else { Ok(()) }
    }
}

/// Gives back what the WAL holds more than once: on a full disk that may be all the room there is.
fn shrink(db: &Connection) -> rusqlite::Result<()> {
    match db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
        Err(rusqlite::Error::SqliteFailure(failure, _)) if failure.code == ErrorCode::DiskFull => Ok(()),
        done => done,
    }
}

/// Some errors end the whole transaction by themselves; after others the rest of it can still be had.
fn spoils_all(db: &Connection, error: &rusqlite::Error) -> bool {
    let job_only = match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(failure.code, ErrorCode::ConstraintViolation | ErrorCode::TooBig | ErrorCode::TypeMismatch)
        }
        _ => true,
    };
    db.is_autocommit() || !job_only
}

impl Shared {
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.display().to_string(),
            failed: OnceLock::new(),
            damaged: OnceLock::new(),
            seen: Mutex::default(),
            nudged: AtomicBool::new(false),
            tight: AtomicBool::new(false),
            check: Mutex::default(),
            metrics: Arc::default(),
            files: ["store.db", "store.db-wal"].map(|name| directory.join(name)),
        }
    }

    /// Whether the disk has room for what the WAL holds in the file of the store. Where it has not, to try would take what
    /// room there is, and give nothing back.
    fn has_room_for_all(&self, db: &Connection) -> rusqlite::Result<bool> {
        let number = |pragma| db.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
        let needed = u64::try_from(number("page_count")?.saturating_mul(number("page_size")?)).unwrap_or(u64::MAX);
        let [file, _] = &self.files;
        let held = file.metadata().map_or(0, |file| file.len());
        let free = rustix::fs::statvfs(file).map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
        Ok(needed.saturating_sub(held) <= free)
    }

    fn seen(&self) -> MutexGuard<'_, Arc<HashMap<ClientId, u64>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checking(&self) -> MutexGuard<'_, Option<InterruptHandle>> {
        self.check.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the look at every page, if it has begun.
    fn end_check(&self) {
        if let Some(check) = &*self.checking() {
            check.interrupt();
        }
    }

    /// Nothing more is read or written.
    fn fail(&self, error: StoreError) {
        tracing::error!(directory = %self.directory, %error, "nothing more is stored");
        // The first reason is the one to know.
        let _ = self.failed.set(error);
    }

    fn check(&self) -> Result<(), StoreError> {
        self.failed.get().cloned().map_or(Ok(()), Err)
    }

    /// A lock that ends with the process, whatever ends it.
    pub(super) fn lock(&self, path: &Path) -> Result<File, StoreError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| self.system("open", path, &error))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(StoreError::Busy(self.directory.clone())),
            Err(TryLockError::Error(error)) => Err(self.system("lock", path, &error)),
        }
    }

    fn system(&self, doing: &str, path: &Path, error: &io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(self.directory.clone()),
            _ => StoreError::Io(format!("cannot {doing} {}: {error}", path.display())),
        }
    }

    pub(super) fn classify(&self, error: &rusqlite::Error) -> StoreError {
        match error {
            rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DiskFull => StoreError::Full(self.directory.clone()),
                // The index beside the WAL is extended before anything is written.
                ErrorCode::SystemIoFailure if failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE => {
                    StoreError::Full(self.directory.clone())
                }
                ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => StoreError::Busy(self.directory.clone()),
                ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => {
                    StoreError::Corrupt(format!("{}: {error}", self.directory))
                }
                _ => StoreError::Io(format!("{}: {error}", self.directory)),
            },
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)
            // What is asked is always the same, so the tables are not ours any more.
            | rusqlite::Error::SqlInputError { .. }
            | rusqlite::Error::Utf8Error(..) => StoreError::Corrupt(format!("{}: {error}", self.directory)),
            _ => StoreError::Io(format!("{}: {error}", self.directory)),
        }
    }
}

// Opening.

/// The mark of our files, and the newest version of their tables.
pub(super) const KNOWN: (i32, i32) = (APPLICATION_ID, SCHEMA_VERSION);

fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    match directory.parent() {
        Some(parent) if parent != Path::new("") => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// Whatever has a name in it keeps that.
fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// An empty file is an empty database, and what SQLite puts beside it gets the same mode.
fn make_private(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    path.parent().map_or(Ok(()), sync_directory)
}

pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    db.busy_timeout(Duration::from_secs(5))?;
    db.set_prepared_statement_cache_capacity(64);
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "foreign_keys", true)?;
    db.pragma_update(None, "trusted_schema", false)?;
    db.pragma_update(None, "cell_size_check", true)?;
    // Nothing of a transaction may need room elsewhere.
    db.pragma_update(None, "temp_store", "MEMORY")?;
    db.pragma_update(None, "journal_size_limit", 16 * 1024 * 1024)?;
    sums::register(&db)?;
    Ok(db)
}

/// Checks whose file this is, and makes the tables in an empty one, in one transaction. `None` if a newer version did.
pub(super) fn initialise(db: &Connection) -> rusqlite::Result<Option<Meta>> {
    let failure = |code, text: &str| rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(text.into()));
    let number = |pragma| db.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let is_new = db.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get::<_, bool>(0))?;
    if !is_new {
        if number("application_id")? != APPLICATION_ID {
            return Err(failure(ffi::SQLITE_NOTADB, "store.db is a database of another program"));
        }
        match number("user_version")? {
            1..=SCHEMA_VERSION => {}
            newer if newer > SCHEMA_VERSION => return Ok(None),
            _ => return Err(failure(ffi::SQLITE_CORRUPT, "store.db has no version")),
        }
    }
    // Only now is anything written, if only a mark in the header.
    let mode: String = db.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode != "wal" {
        return Err(failure(ffi::SQLITE_CANTOPEN, "this file system cannot hold a store: use a local disk"));
    }
    if is_new {
        let (mut id, mut store_epoch) = ([0; 16], [0; 8]);
        getrandom::fill(&mut id)
            .and_then(|()| getrandom::fill(&mut store_epoch))
            .map_err(|_| failure(ffi::SQLITE_ERROR, "this system has no randomness"))?;
        let server_id = uuid::Builder::from_random_bytes(id).into_uuid().into_bytes();
        let transaction = db.unchecked_transaction()?;
        transaction.execute_batch(SCHEMA)?;
        transaction.execute_batch(ROTATION)?;
        transaction.execute_batch(queue::SEQUENCE)?;
        transaction.execute_batch(parcel::TABLES)?;
        transaction.execute_batch(conversation::TABLES)?;
        transaction.execute_batch(ACCOUNTS)?;
        transaction.execute_batch(public::TABLES)?;
        transaction.execute_batch(conversation::INVITATIONS)?;
        sums::add(&transaction, 0)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        transaction.execute(
            "INSERT INTO meta (only, server_id, store_epoch) VALUES (1, ?, ?)",
            params![server_id, store_epoch],
        )?;
        transaction.commit()?;
    } else if number("user_version")? < SCHEMA_VERSION {
        let transaction = db.unchecked_transaction()?;
        let version = number("user_version")?;
        if version < 2 {
            transaction.execute_batch(ROTATION)?;
        }
        if version < 3 {
            transaction.execute_batch(queue::SEQUENCE)?;
        }
        if version < 4 {
            transaction.execute_batch(parcel::TABLES)?;
        }
        if version < 6 {
            transaction.execute_batch(conversation::TABLES)?;
        }
        if version < 7 {
            transaction.execute_batch(ACCOUNTS)?;
        }
        if version < 8 {
            transaction.execute_batch(public::TABLES)?;
        }
        if version < 9 {
            transaction.execute_batch(conversation::INVITATIONS)?;
        }
        sums::add(&transaction, version)?;
        if version == 3 {
            parcel::migrate(&transaction)?;
        }
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        transaction.commit()?;
    }
    let meta = db.query_row("SELECT server_id, store_epoch FROM meta", [], |row| {
        Ok(Meta { server_id: row.get(0)?, store_epoch: row.get(1)? })
    })?;
    Ok(Some(meta))
}
