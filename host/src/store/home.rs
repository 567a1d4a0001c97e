//! A home's state: one SQLite file that one client owns.
//!
//! Its profile, its bundle keys, the peers it pinned, the chains it receives on, the messages that wait for their reader,
//! what it has to send (`letters`), and the conversations of several that it is in (`groups`). Every `Ok` means durable
//! (`synchronous=FULL`), and whatever belongs together is one transaction: a chain's state and the message it opened are
//! never apart. Sending chains and channel secrets are never in here. The file has mode 0600; what is erased is overwritten.

pub mod groups;
mod history;
mod letters;
mod public;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use history::MAX_HISTORY;
pub use letters::{
    Letter, LetterChain, LetterChange, LetterId, LetterPart, MAX_LETTER_BYTES, MAX_LETTERS, MAX_SETTLED, Outcome,
};
use ossicle_core::{Bundle, BundleKeys, BundleView, ExchangeKey, FORMER, Member, Prekey, Prekeys, Secret, SigningKey};
pub use public::{MAX_OWN_POSTS, OwnPost};
use rusqlite::{Connection, OptionalExtension, Row, params};
use zeroize::Zeroizing;

/// Messages that may wait for their reader.
pub const MAX_WAITING: u64 = 10_000;
/// Bytes of messages that may wait for their reader.
pub const MAX_WAITING_BYTES: u64 = 64 * 1024 * 1024;

/// After so many seconds a former prekey is erased, even if few others followed it.
const PREKEY_AGE: u64 = 30 * 24 * 3600;
/// The current prekey and the former ones.
const PREKEYS: i64 = 1 + FORMER as i64;
/// Chains kept per sender and conversation: the present one and one that messages may still be under way on.
const KEPT_CHAINS: u32 = 2;
/// Messages, counted over all chains, for which those are remembered that were read on chains which are kept no longer: a
/// server that crashed gives again what was acknowledged, and a sender may send it again.
const REMEMBERED: i64 = if cfg!(test) { 4 } else { 65_536 };
/// What `bundle.published` says beside 0, not yet.
const PUBLISHED: i64 = 1;
const RESTORED: i64 = 2;

/// What each version adds to the one before; a new file goes through all of them.
const VERSIONS: [&str; 9] = [
    "
CREATE TABLE profile (
    one INTEGER PRIMARY KEY CHECK (one = 1), complete INTEGER NOT NULL,
    host TEXT NOT NULL, port INTEGER NOT NULL, server_key BLOB NOT NULL, store_epoch BLOB,
    id BLOB NOT NULL, name TEXT NOT NULL, key_epoch INTEGER NOT NULL
) STRICT;
CREATE TABLE prekey (
    id INTEGER PRIMARY KEY, secret BLOB NOT NULL, bundle BLOB NOT NULL, replaced INTEGER
) STRICT;
CREATE TABLE bundle (
    one INTEGER PRIMARY KEY CHECK (one = 1), exchange BLOB NOT NULL, signing BLOB NOT NULL,
    bundle BLOB NOT NULL, signature BLOB NOT NULL, published INTEGER NOT NULL, made INTEGER NOT NULL
) STRICT;
CREATE TABLE peer (
    id BLOB PRIMARY KEY, name TEXT NOT NULL, name_key TEXT NOT NULL UNIQUE, modulus BLOB NOT NULL,
    fingerprint BLOB NOT NULL, epoch INTEGER, bundle BLOB
) STRICT, WITHOUT ROWID;
CREATE TABLE sending (sid BLOB PRIMARY KEY, next_epoch INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE seen (
    peer BLOB NOT NULL, sid BLOB NOT NULL, bundle_epoch INTEGER NOT NULL, chain_epoch INTEGER NOT NULL,
    PRIMARY KEY (peer, sid)
) STRICT, WITHOUT ROWID;
CREATE TABLE chain (
    id BLOB PRIMARY KEY, peer BLOB NOT NULL, sid BLOB NOT NULL, number INTEGER NOT NULL, snapshot BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE inbox (
    row INTEGER PRIMARY KEY AUTOINCREMENT, chain BLOB NOT NULL, n INTEGER NOT NULL, salt BLOB NOT NULL,
    peer BLOB NOT NULL, sid BLOB NOT NULL, signed INTEGER NOT NULL, kind INTEGER NOT NULL, time INTEGER NOT NULL,
    body BLOB, delivered_tag BLOB NOT NULL, opened_tag BLOB, opened INTEGER NOT NULL, UNIQUE (chain, n)
) STRICT;
CREATE INDEX unread ON inbox (row) WHERE opened = 0;
CREATE INDEX untold ON inbox (row) WHERE opened = 1;
PRAGMA user_version = 1;
",
    "
ALTER TABLE peer ADD COLUMN key_epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chain ADD COLUMN skipped INTEGER;
CREATE TABLE seen_of_key (
    peer BLOB NOT NULL, sid BLOB NOT NULL, key BLOB NOT NULL, bundle_epoch INTEGER NOT NULL,
    chain_epoch INTEGER NOT NULL, PRIMARY KEY (peer, sid, key)
) STRICT, WITHOUT ROWID;
INSERT INTO seen_of_key SELECT peer, sid, fingerprint, bundle_epoch, chain_epoch
    FROM seen JOIN peer ON peer.id = seen.peer;
DROP TABLE seen;
ALTER TABLE seen_of_key RENAME TO seen;
CREATE TABLE successor (
    one INTEGER PRIMARY KEY CHECK (one = 1), exchange BLOB NOT NULL, prekey BLOB NOT NULL, signing BLOB NOT NULL,
    bundle BLOB NOT NULL, signature BLOB NOT NULL
) STRICT;
PRAGMA user_version = 2;
",
    "
ALTER TABLE peer ADD COLUMN shown BLOB;
PRAGMA user_version = 3;
",
    "
ALTER TABLE inbox ADD COLUMN accepted INTEGER;
CREATE TABLE letter (
    row INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, body BLOB NOT NULL, signed INTEGER NOT NULL,
    until INTEGER NOT NULL, reached INTEGER, tries INTEGER NOT NULL, time INTEGER NOT NULL,
    chain BLOB, n INTEGER, salt BLOB, envelope BLOB, UNIQUE (chain, n)
) STRICT;
CREATE TABLE letter_chain (
    id BLOB PRIMARY KEY, peer BLOB NOT NULL, receipts BLOB NOT NULL, wrap BLOB NOT NULL, bundle BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 4;
",
    "
ALTER TABLE letter ADD COLUMN id BLOB NOT NULL DEFAULT x'';
UPDATE letter SET id = randomblob(16);
CREATE UNIQUE INDEX letter_id ON letter (id);
CREATE TABLE settled (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL, reached INTEGER, reason INTEGER
) STRICT;
PRAGMA user_version = 5;
",
    "
CREATE TABLE conversation (
    sid BLOB PRIMARY KEY, name TEXT NOT NULL, name_key TEXT NOT NULL, number INTEGER NOT NULL, creator BLOB NOT NULL,
    flags INTEGER NOT NULL, version INTEGER NOT NULL, signature BLOB NOT NULL, standing INTEGER NOT NULL,
    since INTEGER NOT NULL, names BLOB, closed_by BLOB, UNIQUE (name_key, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE membership (
    sid BLOB NOT NULL, member BLOB NOT NULL, key BLOB NOT NULL, state INTEGER NOT NULL, PRIMARY KEY (sid, member)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 6;
",
    "
CREATE TABLE history_key (one INTEGER PRIMARY KEY CHECK (one = 1), sealed BLOB NOT NULL) STRICT;
CREATE TABLE history (
    place INTEGER PRIMARY KEY AUTOINCREMENT, conversation TEXT NOT NULL, sealed BLOB NOT NULL
) STRICT;
CREATE INDEX history_conversation ON history (conversation, place);
PRAGMA user_version = 7;
",
    "
ALTER TABLE letter ADD COLUMN sid BLOB;
ALTER TABLE letter ADD COLUMN parent INTEGER;
ALTER TABLE letter ADD COLUMN member BLOB;
ALTER TABLE letter_chain ADD COLUMN sid BLOB;
CREATE TABLE letter_wrap (
    chain BLOB NOT NULL, member BLOB NOT NULL, wrap BLOB NOT NULL, PRIMARY KEY (chain, member)
) STRICT, WITHOUT ROWID;
CREATE TABLE letter_part (
    letter INTEGER NOT NULL, member BLOB NOT NULL, reached INTEGER, reason INTEGER, own INTEGER NOT NULL,
    PRIMARY KEY (letter, member)
) STRICT, WITHOUT ROWID;
ALTER TABLE conversation ADD COLUMN said BLOB;
PRAGMA user_version = 8;
",
    "
CREATE TABLE public_place (
    one INTEGER PRIMARY KEY CHECK (one = 1), store_epoch BLOB NOT NULL, seq INTEGER NOT NULL
) STRICT;
CREATE TABLE public_author (id BLOB PRIMARY KEY, number INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE own_number (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER NOT NULL) STRICT;
CREATE TABLE own_post (
    number INTEGER PRIMARY KEY, at INTEGER NOT NULL, body BLOB NOT NULL, epoch INTEGER, signature BLOB
) STRICT;
PRAGMA user_version = 9;
",
];

/// Who a home is, and whose client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The server's host name or address.
    pub host: String,
    /// The server's port.
    pub port: u16,
    /// The modulus of the server's pinned key; empty before the first contact.
    pub server_key: Vec<u8>,
    /// The server's store epoch, when it was last seen.
    pub store_epoch: Option<[u8; 8]>,
    /// This client's id.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// How often its identity key was replaced.
    pub key_epoch: u32,
    /// Whether the server has admitted it and holds its bundle.
    pub complete: bool,
}

/// A client's own end-to-end keys, with what was signed about them.
pub struct OwnKeys {
    /// The secrets of the present bundle.
    pub keys: BundleKeys,
    /// The present bundle.
    pub bundle: Bundle,
    /// The identity key's signature over it.
    pub signature: Vec<u8>,
    /// Whether the server has it.
    pub published: bool,
    /// Whether it was made for a home that was restored: its epoch is not settled with the directory yet.
    pub restored: bool,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// Every prekey that still opens wraps.
    pub prekeys: Prekeys,
}

/// The bundle under an identity key that is to follow the present one, with its secrets.
pub struct SuccessorKeys {
    /// The secrets.
    pub keys: BundleKeys,
    /// The bundle.
    pub bundle: Bundle,
    /// The new key's signature over it.
    pub signature: Vec<u8>,
}

/// A peer as it was pinned on first use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub id: [u8; 16],
    /// Its name, as the directory wrote it.
    pub name: String,
    /// The normalised name.
    pub name_key: String,
    /// The modulus of its identity key.
    pub modulus: Vec<u8>,
    /// The fingerprint of that key.
    pub fingerprint: [u8; 32],
    /// How often its identity key was replaced, as far as was followed here.
    pub key_epoch: u32,
    /// The newest bundle that was seen: epoch and hash.
    pub bundle: Option<(u32, [u8; 32])>,
}

impl Peer {
    /// The peer as a member of conversations.
    pub const fn member(&self) -> Member {
        Member { id: self.id, key: self.fingerprint }
    }

    /// What is remembered of its bundles.
    pub fn view(&self) -> Option<BundleView> {
        self.bundle.map(|(epoch, hash)| BundleView { member: self.member(), epoch, hash })
    }
}

/// A receiving chain at rest.
pub struct StoredChain {
    /// The chain's id.
    pub id: [u8; 8],
    /// Who sends on it.
    pub peer: [u8; 16],
    /// The conversation.
    pub sid: [u8; 16],
    /// Its state, secrets included.
    pub snapshot: Zeroizing<Vec<u8>>,
    /// Whether keys of skipped messages are among them.
    pub skipped: bool,
}

/// A message that was opened.
#[derive(Clone, PartialEq, Eq)]
pub struct Received {
    /// The chain that it came on.
    pub chain: [u8; 8],
    /// Its number there.
    pub n: u32,
    /// Its salt, by which a repetition is known.
    pub salt: [u8; 8],
    /// Who sent it.
    pub peer: [u8; 16],
    /// The conversation.
    pub sid: [u8; 16],
    /// Whether its sender signed it.
    pub signed: bool,
    /// What its sender's application called it.
    pub kind: u8,
    /// When it came, in seconds since 1970.
    pub time: u64,
    /// When the server took it, in seconds since 1970, if it waited there: the server's word.
    pub accepted: Option<u64>,
    /// What it says.
    pub body: Vec<u8>,
    /// The tag of the receipt that it was delivered.
    pub delivered_tag: [u8; 16],
    /// The tag of the receipt that it was opened, if its sender wants one.
    pub opened_tag: Option<[u8; 16]>,
}

/// A message that waits for its reader.
#[derive(Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its place in the inbox.
    pub row: i64,
    /// The name of its sender.
    pub from: String,
    /// What the group is called here that it was said in, if it was said in one.
    pub group: Option<String>,
    /// The message.
    pub message: Received,
}

/// How far a message came here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It waits for its reader.
    Waiting,
    /// Its reader has it, but its sender was not told.
    Opened,
    /// Its reader has it, and its sender was told if he wants to know.
    Told,
}

impl Progress {
    const fn code(self) -> i64 {
        match self {
            Self::Waiting => 0,
            Self::Opened => 1,
            Self::Told => 2,
        }
    }

    const fn from_code(code: i64) -> Self {
        match code {
            0 => Self::Waiting,
            1 => Self::Opened,
            _ => Self::Told,
        }
    }
}

/// What is remembered of a message after it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The salt that it came with.
    pub salt: [u8; 8],
    /// How far it came.
    pub progress: Progress,
    /// The tag of the receipt that it was delivered.
    pub delivered_tag: [u8; 16],
    /// The tag of the receipt that it was opened.
    pub opened_tag: Option<[u8; 16]>,
}

/// A receipt that is still owed: chain, number and tag of a message that was opened, and its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// The row in the inbox.
    pub row: i64,
    /// The chain.
    pub chain: [u8; 8],
    /// The number.
    pub n: u32,
    /// The receipt's tag, if the sender wants the receipt.
    pub tag: Option<[u8; 16]>,
}

/// Why the home's state cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HomeStoreError {
    /// The file cannot be made.
    #[error("cannot make the home's state: {0}")]
    Io(#[from] io::Error),
    /// It holds something that no ossicle wrote.
    #[error("the home's state is damaged: restore a backup, or make a new home with `ossicle init`")]
    Damaged,
    /// There is no room for it.
    #[error("the disk that holds the home is full: free some space and try again, nothing was acknowledged")]
    Full,
    /// SQLite failed.
    #[error("the home's state cannot be read or written ({0}): see whether its disk and its file modes are in order")]
    Sql(rusqlite::Error),
    /// It is of another version.
    #[error("the home's state is of version {found}, which this ossicle does not know: use a newer one")]
    Version {
        /// The version found.
        found: i64,
    },
}

impl From<rusqlite::Error> for HomeStoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::Full,
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => Self::Damaged,
            _ => Self::Sql(error),
        }
    }
}

type Result<T> = core::result::Result<T, HomeStoreError>;

/// The newest version of its tables.
pub(super) const NEWEST: usize = VERSIONS.len();

/// The state of one home.
pub struct HomeStore {
    db: Connection,
}

impl HomeStore {
    /// Opens the state at `path`, or makes it, empty.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn open(path: &Path) -> Result<Self> {
        // Made before SQLite would, so that nobody else can ever open it; the files beside it take over its mode.
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => file.sync_all()?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
        let mut db = Connection::open(path)?;
        db.busy_timeout(core::time::Duration::from_secs(5))?;
        db.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update_and_check(None, "secure_delete", "ON", |_| Ok(()))?;
        let transaction = db.transaction()?;
        let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let missing = usize::try_from(found).ok().and_then(|found| VERSIONS.get(found..));
        for version in missing.ok_or(HomeStoreError::Version { found })? {
            transaction.execute_batch(version)?;
        }
        transaction.commit()?;
        if let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(Self { db })
    }

    /// Who this home is, if it was begun.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn profile(&self) -> Result<Option<Profile>> {
        let sql = "SELECT host, port, server_key, store_epoch, id, name, key_epoch, complete FROM profile";
        let profile = self.db.query_row(sql, [], |row| {
            Ok(Profile {
                host: row.get(0)?,
                port: row.get(1)?,
                server_key: row.get(2)?,
                store_epoch: row.get(3)?,
                id: row.get(4)?,
                name: row.get(5)?,
                key_epoch: row.get(6)?,
                complete: row.get(7)?,
            })
        });
        Ok(profile.optional()?)
    }

    /// Writes who this home is.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_profile(&self, profile: &Profile) -> Result<()> {
        self.db.execute(
            "INSERT OR REPLACE INTO profile
             (one, host, port, server_key, store_epoch, id, name, key_epoch, complete)
             VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                profile.host,
                profile.port,
                profile.server_key,
                profile.store_epoch,
                profile.id,
                profile.name,
                profile.key_epoch,
                profile.complete
            ],
        )?;
        Ok(())
    }

    /// This client's end-to-end keys, if there are any.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn keys(&self) -> Result<Option<OwnKeys>> {
        let sql = "SELECT exchange, signing, bundle, signature, published, made FROM bundle";
        let found = self.db.query_row(sql, [], |row| {
            let (exchange, signing): ([u8; 32], [u8; 32]) = (row.get(0)?, row.get(1)?);
            let (bundle, signature): (Vec<u8>, Vec<u8>) = (row.get(2)?, row.get(3)?);
            let made: i64 = row.get(5)?;
            let (exchange, signing) = (Secret::new(exchange), Secret::new(signing));
            Ok((exchange, signing, bundle, signature, row.get::<_, i64>(4)?, made.unsigned_abs()))
        });
        let Some((exchange, signing, bundle, signature, published, made)) = found.optional()? else {
            return Ok(None);
        };
        let bundle = Bundle::decode(&bundle).map_err(|_| HomeStoreError::Damaged)?;
        let mut prekeys = Prekeys::new();
        let mut statement = self.db.prepare_cached("SELECT id, secret, bundle FROM prekey ORDER BY id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            prekeys.insert(Prekey::new(ExchangeKey::new(Secret::new(row.get(1)?)), row.get(0)?, row.get(2)?));
        }
        let current = prekeys.find(bundle.prekey_id).ok_or(HomeStoreError::Damaged)?.key().clone();
        let keys = BundleKeys::new(ExchangeKey::new(exchange), current, bundle.prekey_id, SigningKey::new(signing));
        let (published, restored) = (published == PUBLISHED, published == RESTORED);
        Ok(Some(OwnKeys { keys, bundle, signature, published, restored, made, prekeys }))
    }

    /// Makes the secrets of a new bundle durable, as they must be before it is published, and erases prekeys that have
    /// served long enough.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_keys(&mut self, keys: &BundleKeys, bundle: &Bundle, signature: &[u8], now: u64) -> Result<()> {
        let transaction = self.db.transaction()?;
        put_keys(&transaction, keys, bundle, signature, now)?;
        transaction.commit()?;
        // Forward secrecy begins when a prekey is gone.
        self.flush_log()
    }

    /// Erases former prekeys that were replaced 30 days ago, and returns their ids.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn expire_prekeys(&mut self, now: u64) -> Result<Vec<u32>> {
        let sql = "DELETE FROM prekey WHERE replaced < ?1 RETURNING id";
        let expired = {
            let mut statement = self.db.prepare_cached(sql)?;
            let rows = statement.query_map([seconds(now.saturating_sub(PREKEY_AGE))], |row| row.get(0))?;
            rows.collect::<rusqlite::Result<Vec<u32>>>()?
        };
        if !expired.is_empty() {
            self.flush_log()?;
        }
        Ok(expired)
    }

    /// Makes the bundle of a new identity key durable, beside the present one, as it must be before the server hears of it.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_successor(&self, successor: &SuccessorKeys) -> Result<()> {
        let SuccessorKeys { keys, bundle, signature } = successor;
        self.db.execute(
            "INSERT OR REPLACE INTO successor (one, exchange, prekey, signing, bundle, signature)
             VALUES (1, ?1, ?2, ?3, ?4, ?5)",
            params![
                keys.exchange_key().secret().expose(),
                keys.prekey_pair().secret().expose(),
                keys.signing_key().secret().expose(),
                bundle.encode(),
                signature
            ],
        )?;
        Ok(())
    }

    /// The bundle of a new identity key, if the present one is to be replaced.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn successor(&self) -> Result<Option<SuccessorKeys>> {
        let sql = "SELECT exchange, prekey, signing, bundle, signature FROM successor";
        let found = self.db.query_row(sql, [], |row| {
            let secrets = (Secret::new(row.get(0)?), Secret::new(row.get(1)?), Secret::new(row.get(2)?));
            Ok((secrets, row.get::<_, Vec<u8>>(3)?, row.get(4)?))
        });
        let Some(((exchange, prekey, signing), bundle, signature)) = found.optional()? else {
            return Ok(None);
        };
        let bundle = Bundle::decode(&bundle).map_err(|_| HomeStoreError::Damaged)?;
        let (exchange, prekey) = (ExchangeKey::new(exchange), ExchangeKey::new(prekey));
        let keys = BundleKeys::new(exchange, prekey, bundle.prekey_id, SigningKey::new(signing));
        Ok(Some(SuccessorKeys { keys, bundle, signature }))
    }

    /// Gives up a new identity key that the server does not take.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn drop_successor(&self) -> Result<()> {
        self.db.execute("DELETE FROM successor", [])?;
        Ok(())
    }

    /// The server has replaced the identity key: its bundle is the present one from now on. Prekeys and chains of the
    /// former key are erased; messages that wait for their reader stay.
    ///
    /// # Errors
    /// [`HomeStoreError`]; [`HomeStoreError::Damaged`] if there is no successor.
    pub fn succeed(&mut self, key_epoch: u32, now: u64) -> Result<OwnKeys> {
        let SuccessorKeys { keys, bundle, signature } = self.successor()?.ok_or(HomeStoreError::Damaged)?;
        let transaction = self.db.transaction()?;
        transaction.execute_batch("DELETE FROM prekey; DELETE FROM chain; DELETE FROM inbox WHERE opened = 2;")?;
        put_keys(&transaction, &keys, &bundle, &signature, now)?;
        transaction.execute("UPDATE bundle SET published = 1", [])?;
        transaction.execute("UPDATE profile SET key_epoch = ?1", [key_epoch])?;
        transaction.execute("DELETE FROM successor", [])?;
        transaction.commit()?;
        self.flush_log()?;
        self.keys()?.ok_or(HomeStoreError::Damaged)
    }

    /// What was erased stands in the log until that is written out.
    fn flush_log(&self) -> Result<()> {
        Ok(self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?)
    }

    /// Notes that this home was restored and its keys were made for that: the directory knows better which epoch is next.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn restored(&mut self) -> Result<()> {
        self.db.execute("UPDATE bundle SET published = ?1", [RESTORED])?;
        self.flush_log()
    }

    /// This home went back to an earlier state without being restored: puts new keys in the place of all prekeys and chains, as
    /// if it were restored now. Messages that wait for their reader stay.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn begin_anew(&mut self, keys: &BundleKeys, bundle: &Bundle, signature: &[u8], now: u64) -> Result<OwnKeys> {
        let transaction = self.db.transaction()?;
        transaction.execute_batch("DELETE FROM prekey; DELETE FROM chain; DELETE FROM inbox WHERE opened = 2;")?;
        put_keys(&transaction, keys, bundle, signature, now)?;
        transaction.execute("UPDATE bundle SET published = ?1", [RESTORED])?;
        transaction.commit()?;
        self.flush_log()?;
        self.keys()?.ok_or(HomeStoreError::Damaged)
    }

    /// Notes that the server has the present bundle, and its store's epoch.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn published(&mut self, store_epoch: &[u8; 8]) -> Result<()> {
        let transaction = self.db.transaction()?;
        transaction.execute("UPDATE bundle SET published = 1", [])?;
        transaction.execute("UPDATE profile SET store_epoch = ?1, complete = 1", [store_epoch])?;
        Ok(transaction.commit()?)
    }

    /// The pinned peer with this id.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn peer(&self, id: &[u8; 16]) -> Result<Option<Peer>> {
        self.find_peer(
            "SELECT id, name, name_key, modulus, fingerprint, key_epoch, epoch, bundle FROM peer WHERE id = ?1",
            id,
        )
    }

    /// The ids of all pinned peers.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn peer_ids(&self) -> Result<Vec<[u8; 16]>> {
        let mut statement = self.db.prepare_cached("SELECT id FROM peer")?;
        let rows = statement.query_map([], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// The pinned peer with this normalised name.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn peer_by_name(&self, key: &str) -> Result<Option<Peer>> {
        self.find_peer(
            "SELECT id, name, name_key, modulus, fingerprint, key_epoch, epoch, bundle FROM peer WHERE name_key = ?1",
            key,
        )
    }

    fn find_peer(&self, sql: &str, by: impl rusqlite::ToSql) -> Result<Option<Peer>> {
        let found = self.db.prepare_cached(sql)?.query_row([by], |row| {
            let bundle = match (row.get(6)?, row.get(7)?) {
                (Some(epoch), Some(hash)) => Some((epoch, hash)),
                _ => None,
            };
            Ok(Peer {
                id: row.get(0)?,
                name: row.get(1)?,
                name_key: row.get(2)?,
                modulus: row.get(3)?,
                fingerprint: row.get(4)?,
                key_epoch: row.get(5)?,
                bundle,
            })
        });
        Ok(found.optional()?)
    }

    /// Pins a peer, or notes its newest bundle. Its key is not changed by this: a changed key has to be accepted.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_peer(&self, peer: &Peer) -> Result<()> {
        put_peer(&self.db, peer)
    }

    /// Pins `new` in the place of the peer with the id `old`, which may be another or the same, and erases the chains of
    /// both. Messages that wait stay, under the name that they came with.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn replace_peer(&mut self, old: &[u8; 16], new: &Peer) -> Result<()> {
        let transaction = self.db.transaction()?;
        if *old == new.id {
            transaction.execute(
                "UPDATE peer SET modulus = ?2, fingerprint = ?3, key_epoch = ?4, shown = NULL WHERE id = ?1",
                params![new.id, new.modulus, new.fingerprint, new.key_epoch],
            )?;
        } else {
            // No name has a space, so this one never is in anybody's way.
            transaction.execute("UPDATE peer SET name_key = name_key || ' ' || lower(hex(id)) WHERE id = ?1", [old])?;
        }
        put_peer(&transaction, new)?;
        transaction.execute("DELETE FROM chain WHERE peer IN (?1, ?2)", params![old, new.id])?;
        transaction.execute("DELETE FROM inbox WHERE opened = 2 AND chain NOT IN (SELECT id FROM chain)", [])?;
        Ok(transaction.commit()?)
    }

    /// Who was last shown to a person in the place of this peer, if somebody was since it was pinned.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn shown(&self, peer: &[u8; 16]) -> Result<Option<Member>> {
        let sql = "SELECT shown FROM peer WHERE id = ?1";
        let found = self.db.query_row(sql, [peer], |row| row.get::<_, Option<Vec<u8>>>(0)).optional()?.flatten();
        let Some(found) = found else { return Ok(None) };
        let (id, key) = found.split_first_chunk().ok_or(HomeStoreError::Damaged)?;
        Ok(Some(Member { id: *id, key: key.try_into().map_err(|_| HomeStoreError::Damaged)? }))
    }

    /// Notes who is shown to a person in the place of this peer.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_shown(&self, peer: &[u8; 16], shown: &Member) -> Result<()> {
        let bytes = [shown.id.as_slice(), &shown.key].concat();
        self.db.execute("UPDATE peer SET shown = ?2 WHERE id = ?1", params![peer, bytes])?;
        Ok(())
    }

    /// Takes the next chain epoch of a conversation: it is used up when this returns.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn next_chain_epoch(&self, sid: &[u8; 16]) -> Result<u32> {
        let sql = "INSERT INTO sending (sid, next_epoch) VALUES (?1, 1)
                   ON CONFLICT (sid) DO UPDATE SET next_epoch = next_epoch + 1 RETURNING next_epoch - 1";
        Ok(self.db.query_row(sql, [sid], |row| row.get(0))?)
    }

    /// The highest epochs (of bundle and chain) that were ever accepted of this sender, under its present key, in this
    /// conversation.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn seen(&self, peer: &Peer, sid: &[u8; 16]) -> Result<Option<(u32, u32)>> {
        let sql = "SELECT bundle_epoch, chain_epoch FROM seen WHERE peer = ?1 AND sid = ?2 AND key = ?3";
        let of_these = params![peer.id, sid, peer.fingerprint];
        let found = self.db.query_row(sql, of_these, |row| Ok((row.get(0)?, row.get(1)?)));
        Ok(found.optional()?)
    }

    /// Begins a chain, with what its wrap taught about its sender.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn begin_chain(&mut self, peer: &Peer, chain: &StoredChain, epochs: (u32, u32)) -> Result<()> {
        let transaction = self.db.transaction()?;
        put_peer(&transaction, peer)?;
        transaction.execute(
            "INSERT OR REPLACE INTO seen (peer, sid, key, bundle_epoch, chain_epoch) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![chain.peer, chain.sid, peer.fingerprint, epochs.0, epochs.1],
        )?;
        let of_these = params![chain.peer, chain.sid];
        let last: u32 = transaction.query_row(
            "SELECT coalesce(max(number), 0) FROM chain WHERE peer = ?1 AND sid = ?2",
            of_these,
            |row| row.get(0),
        )?;
        transaction.execute(
            "INSERT OR REPLACE INTO chain (id, peer, sid, number, snapshot) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![chain.id, chain.peer, chain.sid, last + 1, chain.snapshot.as_slice()],
        )?;
        transaction.execute(
            "DELETE FROM chain WHERE peer = ?1 AND sid = ?2 AND number <= ?3",
            params![chain.peer, chain.sid, (last + 1).saturating_sub(KEPT_CHAINS)],
        )?;
        // What was read is remembered to know repetitions, also beyond its chain; a message that waits stays.
        transaction.execute(
            "DELETE FROM inbox WHERE opened = 2 AND row <= (SELECT max(row) FROM inbox) - ?1
                 AND chain NOT IN (SELECT id FROM chain)",
            [REMEMBERED],
        )?;
        Ok(transaction.commit()?)
    }

    /// The chain with this id.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn chain(&self, id: &[u8; 8]) -> Result<Option<StoredChain>> {
        let sql = "SELECT id, peer, sid, snapshot, skipped IS NOT NULL FROM chain WHERE id = ?1";
        Ok(self.db.prepare_cached(sql)?.query_row([id], read_chain).optional()?)
    }

    /// Chains that have held keys of skipped messages since before this time.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn chains_with_old_gaps(&self, before: u64) -> Result<Vec<StoredChain>> {
        let sql = "SELECT id, peer, sid, snapshot, skipped IS NOT NULL FROM chain WHERE skipped < ?1";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map([seconds(before)], read_chain)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Keeps the state of chains from which keys were erased: what they were is gone when this returns.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn erase_from(&mut self, chains: &[StoredChain], now: u64) -> Result<()> {
        self.receive(chains, &[], now)?;
        self.flush_log()
    }

    /// Who began the chain with this id, if there is one, or was one whose messages are remembered.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn whose_chain(&self, id: &[u8; 8]) -> Result<Option<[u8; 16]>> {
        let sql = "SELECT peer FROM chain WHERE id = ?1 UNION ALL SELECT peer FROM inbox WHERE chain = ?1 LIMIT 1";
        Ok(self.db.prepare_cached(sql)?.query_row([id], |row| row.get(0)).optional()?)
    }

    /// Keeps messages together with the state of the chains that opened them: all or nothing. A chain that holds keys of
    /// skipped messages does so since the first time that this was said of it.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn receive(&mut self, chains: &[StoredChain], messages: &[Received], now: u64) -> Result<()> {
        let transaction = self.db.transaction()?;
        for chain in chains {
            let sql = "UPDATE chain SET snapshot = ?2, skipped = CASE WHEN ?3 THEN coalesce(skipped, ?4) END
                       WHERE id = ?1";
            let state = params![chain.id, chain.snapshot.as_slice(), chain.skipped, seconds(now)];
            transaction.prepare_cached(sql)?.execute(state)?;
        }
        for message in messages {
            let sql = "INSERT INTO inbox (chain, n, salt, peer, sid, signed, kind, time, body, delivered_tag,
                       opened_tag, accepted, opened) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 0)";
            transaction.prepare_cached(sql)?.execute(params![
                message.chain,
                message.n,
                message.salt,
                message.peer,
                message.sid,
                message.signed,
                message.kind,
                seconds(message.time),
                message.body,
                message.delivered_tag,
                message.opened_tag,
                message.accepted.map(seconds)
            ])?;
        }
        Ok(transaction.commit()?)
    }

    /// What is remembered of a message.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn remembered(&self, chain: &[u8; 8], n: u32) -> Result<Option<Remembered>> {
        let sql = "SELECT salt, opened, opened_tag, delivered_tag FROM inbox WHERE chain = ?1 AND n = ?2";
        let found = self.db.prepare_cached(sql)?.query_row(params![chain, n], |row| {
            Ok(Remembered {
                salt: row.get(0)?,
                progress: Progress::from_code(row.get(1)?),
                opened_tag: row.get(2)?,
                delivered_tag: row.get(3)?,
            })
        });
        Ok(found.optional()?)
    }

    /// Messages that wait for their reader, in the order in which they came: at most `limit`, behind row `after`.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn waiting(&self, after: i64, limit: u32) -> Result<Vec<Waiting>> {
        let sql =
            "SELECT row, peer.name, chain, n, salt, peer, inbox.sid, signed, kind, time, body, opened_tag, delivered_tag,
                          accepted, conversation.name, conversation.number
                   FROM inbox JOIN peer ON peer.id = inbox.peer LEFT JOIN conversation ON conversation.sid = inbox.sid
                   WHERE opened = 0 AND row > ?1 ORDER BY row LIMIT ?2";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map(params![after, limit], |row| {
            let group = match (row.get::<_, Option<String>>(14)?, row.get(15)?) {
                (Some(name), Some(number)) => Some(groups::label(&name, number)),
                _ => None,
            };
            Ok(Waiting { row: row.get(0)?, from: row.get(1)?, group, message: read_message(row)? })
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// How many messages wait for their reader, and their bytes.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn backlog(&self) -> Result<(u64, u64)> {
        let sql = "SELECT count(*), coalesce(sum(length(body)), 0) FROM inbox WHERE opened = 0";
        let (count, bytes): (i64, i64) = self.db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok((count.unsigned_abs(), bytes.unsigned_abs()))
    }

    /// Notes how far a message came. Once its reader has it, the text is erased.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn mark(&self, row: i64, progress: Progress) -> Result<()> {
        let sql = "UPDATE inbox SET opened = ?2, body = CASE WHEN ?2 = 0 THEN body END WHERE row = ?1";
        self.db.prepare_cached(sql)?.execute(params![row, progress.code()])?;
        Ok(())
    }

    /// What is owed for a message: its receipt, or only the note that there is none.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn owed(&self, row: i64) -> Result<Option<Owed>> {
        let sql = "SELECT row, chain, n, opened_tag FROM inbox WHERE row = ?1";
        Ok(self.db.prepare_cached(sql)?.query_row([row], read_owed).optional()?)
    }

    /// Receipts of messages that were read while there was no connection.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn untold(&self) -> Result<Vec<Owed>> {
        let sql = "SELECT row, chain, n, opened_tag FROM inbox WHERE opened = 1 ORDER BY row";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map([], read_owed)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}

fn put_keys(db: &Connection, keys: &BundleKeys, bundle: &Bundle, signature: &[u8], now: u64) -> Result<()> {
    db.execute("UPDATE prekey SET replaced = ?1 WHERE replaced IS NULL", [seconds(now)])?;
    db.execute(
        "INSERT INTO prekey (id, secret, bundle, replaced) VALUES (?1, ?2, ?3, NULL)",
        params![keys.prekey_id(), keys.prekey_pair().secret().expose(), bundle.hash()],
    )?;
    db.execute(
        "DELETE FROM prekey WHERE replaced < ?1
             OR id NOT IN (SELECT id FROM prekey ORDER BY id DESC LIMIT ?2)",
        params![seconds(now.saturating_sub(PREKEY_AGE)), PREKEYS],
    )?;
    db.execute(
        "INSERT OR REPLACE INTO bundle (one, exchange, signing, bundle, signature, published, made)
             VALUES (1, ?1, ?2, ?3, ?4, 0, ?5)",
        params![
            keys.exchange_key().secret().expose(),
            keys.signing_key().secret().expose(),
            bundle.encode(),
            signature,
            seconds(now)
        ],
    )?;
    Ok(())
}

fn put_peer(db: &Connection, peer: &Peer) -> Result<()> {
    let (epoch, hash) = peer.bundle.unzip();
    db.execute(
        "INSERT INTO peer (id, name, name_key, modulus, fingerprint, key_epoch, epoch, bundle)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch, bundle = excluded.bundle",
        params![peer.id, peer.name, peer.name_key, peer.modulus, peer.fingerprint, peer.key_epoch, epoch, hash],
    )?;
    Ok(())
}

fn read_chain(row: &Row<'_>) -> rusqlite::Result<StoredChain> {
    let snapshot = Zeroizing::new(row.get(3)?);
    Ok(StoredChain { id: row.get(0)?, peer: row.get(1)?, sid: row.get(2)?, snapshot, skipped: row.get(4)? })
}

fn read_message(row: &Row<'_>) -> rusqlite::Result<Received> {
    let time: i64 = row.get(9)?;
    Ok(Received {
        chain: row.get(2)?,
        n: row.get(3)?,
        salt: row.get(4)?,
        peer: row.get(5)?,
        sid: row.get(6)?,
        signed: row.get(7)?,
        kind: row.get(8)?,
        time: time.unsigned_abs(),
        body: row.get::<_, Option<Vec<u8>>>(10)?.unwrap_or_default(),
        opened_tag: row.get(11)?,
        delivered_tag: row.get(12)?,
        accepted: row.get::<_, Option<i64>>(13)?.map(i64::unsigned_abs),
    })
}

fn read_owed(row: &Row<'_>) -> rusqlite::Result<Owed> {
    Ok(Owed { row: row.get(0)?, chain: row.get(1)?, n: row.get(2)?, tag: row.get(3)? })
}

/// SQLite's integers are signed; no clock reaches that far.
fn seconds(time: u64) -> i64 {
    i64::try_from(time).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use getrandom::SysRng;
    use std::os::unix::fs::MetadataExt;

    fn store() -> (tempfile::TempDir, HomeStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        (directory, store)
    }

    fn peer(byte: u8) -> Peer {
        let name = format!("peer{byte}");
        Peer {
            id: [byte; 16],
            name_key: name.clone(),
            name,
            modulus: vec![byte; 256],
            fingerprint: [byte; 32],
            key_epoch: 0,
            bundle: Some((1, [byte; 32])),
        }
    }

    fn message(n: u32) -> Received {
        Received {
            chain: [1; 8],
            n,
            salt: [2; 8],
            peer: [9; 16],
            sid: [3; 16],
            signed: true,
            kind: 0,
            time: 1_700_000_000,
            accepted: Some(1_600_000_000),
            body: b"text".to_vec(),
            delivered_tag: [5; 16],
            opened_tag: Some([4; 16]),
        }
    }

    fn chain(byte: u8) -> StoredChain {
        StoredChain {
            id: [byte; 8],
            peer: [9; 16],
            sid: [3; 16],
            snapshot: Zeroizing::new(vec![byte; 40]),
            skipped: false,
        }
    }

    #[test]
    fn files_are_for_their_owner_alone() {
        let (directory, store) = store();
        store.next_chain_epoch(&[1; 16]).unwrap();
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn profiles_and_epochs_survive() {
        let (directory, store) = store();
        assert_eq!(store.profile().unwrap(), None);
        let profile = Profile {
            host: "localhost".into(),
            port: 5150,
            server_key: vec![1; 384],
            store_epoch: None,
            id: [7; 16],
            name: "alice".into(),
            key_epoch: 0,
            complete: false,
        };
        store.put_profile(&profile).unwrap();
        assert_eq!(store.next_chain_epoch(&[1; 16]).unwrap(), 0);
        assert_eq!(store.next_chain_epoch(&[1; 16]).unwrap(), 1);
        assert_eq!(store.next_chain_epoch(&[2; 16]).unwrap(), 0);
        drop(store);
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        assert_eq!(store.profile().unwrap(), Some(profile));
        assert_eq!(store.next_chain_epoch(&[1; 16]).unwrap(), 2);
        store.published(&[5; 8]).unwrap();
        assert!(store.profile().unwrap().is_some_and(|profile| profile.complete));
    }

    #[test]
    fn keys_come_back_and_former_prekeys_are_counted() {
        let (_directory, mut store) = store();
        let member = Member { id: [1; 16], key: [2; 32] };
        let mut keys = BundleKeys::generate(0, &mut SysRng).unwrap();
        let mut previous = [0; 32];
        for epoch in 1..=8 {
            let bundle = keys.bundle(&member, epoch, previous);
            store.put_keys(&keys, &bundle, &[3; 256], 1_700_000_000).unwrap();
            previous = bundle.hash();
            let own = store.keys().unwrap().unwrap();
            assert_eq!(own.bundle, bundle);
            assert!(!own.published);
            assert!(own.keys.prekey(&bundle).is_ok());
            assert_eq!(own.prekeys.iter().count(), usize::try_from(epoch).unwrap().min(1 + FORMER));
            keys.rotate(&mut SysRng).unwrap();
        }
        let bundle = keys.bundle(&member, 9, previous);
        store.put_keys(&keys, &bundle, &[3; 256], 1_700_000_000 + PREKEY_AGE + 1).unwrap();
        // Those replaced a month ago are gone; the one that was replaced just now stays.
        assert_eq!(store.keys().unwrap().unwrap().prekeys.iter().count(), 2);
    }

    #[test]
    fn former_prekeys_expire_also_while_none_is_made() {
        let (_directory, mut store) = store();
        let member = Member { id: [1; 16], key: [2; 32] };
        let mut keys = BundleKeys::generate(0, &mut SysRng).unwrap();
        for epoch in 1..=3 {
            store.put_keys(&keys, &keys.bundle(&member, epoch, [0; 32]), &[3; 256], u64::from(epoch)).unwrap();
            keys.rotate(&mut SysRng).unwrap();
        }
        // The first was replaced in second 2, the second in 3, the third never.
        assert_eq!(store.expire_prekeys(PREKEY_AGE + 2).unwrap(), [0_u32; 0]);
        assert_eq!(store.expire_prekeys(PREKEY_AGE + 3).unwrap(), [0]);
        assert_eq!(store.expire_prekeys(u64::MAX).unwrap(), [1]);
        assert_eq!(store.keys().unwrap().unwrap().prekeys.iter().count(), 1);
    }

    #[test]
    fn gaps_are_as_old_as_their_first_key() {
        let (_directory, mut store) = store();
        store.begin_chain(&peer(9), &chain(1), (1, 0)).unwrap();
        let gap = || StoredChain { skipped: true, ..chain(1) };
        let old = |store: &HomeStore, before| store.chains_with_old_gaps(before).unwrap().len();
        assert_eq!(old(&store, u64::MAX), 0);
        store.receive(&[gap()], &[message(1)], 100).unwrap();
        store.receive(&[gap()], &[message(2)], 200).unwrap();
        assert_eq!((old(&store, 100), old(&store, 101)), (0, 1));
        // Filled, and open again later.
        store.receive(&[chain(1)], &[message(0)], 300).unwrap();
        assert_eq!(old(&store, u64::MAX), 0);
        store.receive(&[gap()], &[message(5)], 400).unwrap();
        assert_eq!((old(&store, 400), old(&store, 401)), (0, 1));
        store.erase_from(&[chain(1)], 500).unwrap();
        assert_eq!(old(&store, u64::MAX), 0);
    }

    #[test]
    fn a_pin_keeps_its_key() {
        let (_directory, store) = store();
        store.put_peer(&peer(9)).unwrap();
        let other = Peer { modulus: vec![1; 256], fingerprint: [1; 32], bundle: Some((2, [8; 32])), ..peer(9) };
        store.put_peer(&other).unwrap();
        let expected = Peer { bundle: Some((2, [8; 32])), ..peer(9) };
        assert_eq!(store.peer(&[9; 16]).unwrap(), Some(expected.clone()));
        assert_eq!(store.peer_by_name("peer9").unwrap(), Some(expected));
        // Another client cannot take a pinned name.
        assert!(store.put_peer(&Peer { id: [8; 16], ..peer(9) }).is_err());
    }

    #[test]
    fn a_new_identity_key_brings_new_keys_and_ends_the_chains_of_the_former_one() {
        let (directory, mut store) = store();
        let (former, next) = (Member { id: [1; 16], key: [2; 32] }, Member { id: [1; 16], key: [3; 32] });
        let mut keys = BundleKeys::generate(0, &mut SysRng).unwrap();
        for epoch in 1..=3 {
            store.put_keys(&keys, &keys.bundle(&former, epoch, [0; 32]), &[3; 256], 1_700_000_000).unwrap();
            keys.rotate(&mut SysRng).unwrap();
        }
        store.begin_chain(&peer(9), &chain(1), (1, 0)).unwrap();
        store.receive(&[], &[message(0), message(1)], 1_700_000_000).unwrap();
        store.mark(store.waiting(0, 1).unwrap()[0].row, Progress::Told).unwrap();
        let profile = Profile {
            host: "localhost".into(),
            port: 5150,
            server_key: vec![1; 384],
            store_epoch: None,
            id: [1; 16],
            name: "alice".into(),
            key_epoch: 0,
            complete: true,
        };
        store.put_profile(&profile).unwrap();
        assert!(store.successor().unwrap().is_none());
        assert!(matches!(store.succeed(1, 0), Err(HomeStoreError::Damaged)));

        let keys = BundleKeys::generate(3, &mut SysRng).unwrap();
        let bundle = keys.bundle(&next, 4, [7; 32]);
        store.put_successor(&SuccessorKeys { keys, bundle, signature: vec![4; 384] }).unwrap();
        // Nothing of the present has changed, also after a crash.
        drop(store);
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        assert_eq!(store.keys().unwrap().unwrap().bundle.key, [2; 32]);
        assert_eq!(store.successor().unwrap().unwrap().bundle, bundle);

        let own = store.succeed(1, 1_700_000_001).unwrap();
        assert_eq!((own.bundle, own.published, own.signature.len()), (bundle, true, 384));
        assert!(own.keys.prekey(&bundle).is_ok());
        assert_eq!(own.prekeys.iter().count(), 1, "former prekeys are erased");
        assert_eq!(store.profile().unwrap().unwrap(), Profile { key_epoch: 1, ..profile });
        assert!(store.chain(&[1; 8]).unwrap().is_none() && store.successor().unwrap().is_none());
        assert_eq!(store.waiting(0, 10).unwrap().len(), 1, "what was not read yet stays");
        assert_eq!(store.seen(&peer(9), &[3; 16]).unwrap(), Some((1, 0)));
    }

    #[test]
    fn an_accepted_key_takes_the_place_of_the_pinned_one() {
        let (_directory, mut store) = store();
        store.begin_chain(&peer(9), &chain(1), (4, 2)).unwrap();
        store.receive(&[], &[message(0), message(1)], 1_700_000_000).unwrap();
        store.mark(store.waiting(0, 1).unwrap()[0].row, Progress::Told).unwrap();
        let changed = Peer { modulus: vec![1; 256], fingerprint: [1; 32], key_epoch: 3, bundle: None, ..peer(9) };
        assert_eq!(store.shown(&[9; 16]).unwrap(), None);
        store.put_shown(&[9; 16], &changed.member()).unwrap();
        store.put_peer(&peer(9)).unwrap();
        assert_eq!(store.shown(&[9; 16]).unwrap(), Some(changed.member()));
        store.replace_peer(&[9; 16], &changed).unwrap();
        assert_eq!(store.shown(&[9; 16]).unwrap(), None);
        assert_eq!(store.peer(&[9; 16]).unwrap(), Some(changed.clone()));
        assert!(store.chain(&[1; 8]).unwrap().is_none());
        assert!(store.remembered(&[1; 8], 0).unwrap().is_none());
        assert_eq!(store.waiting(0, 10).unwrap().len(), 1, "what was not read yet stays");
        // What was seen of a key is seen of that key: it is known again when the key comes back.
        assert_eq!(store.seen(&changed, &[3; 16]).unwrap(), None);
        store.replace_peer(&[9; 16], &peer(9)).unwrap();
        assert_eq!(store.seen(&peer(9), &[3; 16]).unwrap(), Some((4, 2)));

        // Another id under the name: the old one keeps what came from it and loses the name.
        let other = Peer { name: "peer9".into(), name_key: "peer9".into(), ..peer(8) };
        store.replace_peer(&[9; 16], &other).unwrap();
        assert_eq!(store.peer_by_name("peer9").unwrap(), Some(other));
        assert_eq!(store.waiting(0, 10).unwrap()[0].from, "peer9");
        assert_eq!(store.peer(&[9; 16]).unwrap().map(|old| old.name_key.contains(' ')), Some(true));
    }

    #[test]
    fn a_file_of_the_first_version_is_brought_up_to_date() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch(VERSIONS[0]).unwrap();
        let Peer { id, name, modulus, fingerprint, .. } = peer(9);
        let values = params![id, name, modulus, fingerprint];
        db.execute("INSERT INTO peer VALUES (?1, ?2, ?2, ?3, ?4, 1, ?4)", values).unwrap();
        db.execute("INSERT INTO seen VALUES (?1, ?2, 4, 2)", [id, [3; 16]]).unwrap();
        drop(db);
        let store = HomeStore::open(&path).unwrap();
        assert_eq!(store.peer(&[9; 16]).unwrap(), Some(peer(9)));
        assert_eq!(store.seen(&peer(9), &[3; 16]).unwrap(), Some((4, 2)));
        drop(store);

        // And one from before letters went to groups.
        let former = directory.path().join("former.db");
        let db = Connection::open(&former).unwrap();
        for version in &VERSIONS[..7] {
            db.execute_batch(version).unwrap();
        }
        let sql =
            "INSERT INTO letter (name, body, signed, until, tries, time, id) VALUES ('bob', x'61', 1, 3, 0, 9, ?1)";
        db.execute(sql, [[7_u8; 16]]).unwrap();
        drop(db);
        let letters = HomeStore::open(&former).unwrap().letters().unwrap().0;
        let [letter] = letters.as_slice() else { panic!("{letters:?}") };
        assert_eq!((letter.to.as_str(), letter.sid, letter.parent, letter.id), ("bob", None, None, [7; 16]));

        let store = HomeStore::open(&path).unwrap();
        store.db.pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let newer = HomeStore::open(&path).err().unwrap();
        assert!(matches!(newer, HomeStoreError::Version { found: 99 }), "{newer}");
    }

    #[test]
    fn messages_wait_until_they_are_read_and_are_known_afterwards() {
        let (_directory, mut store) = store();
        store.begin_chain(&peer(9), &chain(1), (1, 0)).unwrap();
        assert_eq!(store.seen(&peer(9), &[3; 16]).unwrap(), Some((1, 0)));
        store.receive(&[chain(1)], &[message(0), message(1)], 1_700_000_000).unwrap();
        assert!(store.receive(&[chain(1)], &[message(2), message(1)], 1_700_000_000).is_err(), "a number twice");
        assert!(store.remembered(&[1; 8], 2).unwrap().is_none(), "all or nothing");
        assert_eq!(store.backlog().unwrap(), (2, 8));

        let waiting = store.waiting(0, 10).unwrap();
        assert_eq!(waiting.len(), 2);
        assert_eq!(waiting[0].from, "peer9");
        assert!(waiting[0].message == message(0));
        store.mark(waiting[0].row, Progress::Opened).unwrap();
        let owed = Owed { row: waiting[0].row, chain: [1; 8], n: 0, tag: Some([4; 16]) };
        assert_eq!(store.untold().unwrap(), [owed]);
        store.mark(waiting[0].row, Progress::Told).unwrap();
        assert!(store.untold().unwrap().is_empty());
        assert_eq!(store.waiting(0, 10).unwrap().len(), 1);
        assert_eq!(store.remembered(&[1; 8], 0).unwrap().map(|known| known.progress), Some(Progress::Told));
    }

    #[test]
    fn a_full_disk_is_said_and_nothing_is_half_kept() {
        let (directory, mut store) = store();
        store.begin_chain(&peer(9), &chain(1), (1, 0)).unwrap();
        let pages: i64 = store.db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        store.db.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
        let long = Received { body: vec![7; 100_000], ..message(0) };
        let full = store.receive(&[chain(1)], &[long], 1_700_000_000).unwrap_err();
        assert!(matches!(full, HomeStoreError::Full), "{full}");
        assert!(store.remembered(&[1; 8], 0).unwrap().is_none());
        drop(store);
        std::fs::write(directory.path().join("home.db"), [0x5a; 4096]).unwrap();
        let damaged = HomeStore::open(&directory.path().join("home.db")).err().unwrap();
        assert!(matches!(damaged, HomeStoreError::Damaged), "{damaged}");
    }

    #[test]
    fn old_chains_go_and_what_was_read_of_them_is_remembered_for_a_while() {
        let (_directory, mut store) = store();
        store.begin_chain(&peer(9), &chain(1), (1, 0)).unwrap();
        store.receive(&[], &[message(0), message(1)], 1_700_000_000).unwrap();
        let row = store.waiting(0, 1).unwrap()[0].row;
        store.mark(row, Progress::Told).unwrap();
        store.begin_chain(&peer(9), &chain(2), (1, 1)).unwrap();
        assert!(store.chain(&[1; 8]).unwrap().is_some());
        store.begin_chain(&peer(9), &chain(3), (1, 2)).unwrap();
        assert!(store.chain(&[1; 8]).unwrap().is_none());
        assert_eq!(store.remembered(&[1; 8], 0).unwrap().map(|known| known.progress), Some(Progress::Told));
        assert_eq!([1, 3].map(|id| store.whose_chain(&[id; 8]).unwrap()), [Some(peer(9).id); 2]);
        let of = |n| Received { chain: [3; 8], ..message(n) };
        store.receive(&[], &[of(0), of(1), of(2)], 1_700_000_000).unwrap();
        store.begin_chain(&peer(9), &chain(4), (1, 3)).unwrap();
        assert!(store.remembered(&[1; 8], 0).unwrap().is_none());
        assert!(store.remembered(&[1; 8], 1).unwrap().is_some(), "it was not read yet");
        assert_eq!(store.whose_chain(&[5; 8]).unwrap(), None);
        assert_eq!(store.seen(&peer(9), &[3; 16]).unwrap(), Some((1, 3)));
    }
}
