//! Channels that clients may resume: who has which, until when (PROTOCOL 4.10).
//!
//! A channel is opened by its id, sealed at rest under a key of its own file that is in no backup. What a connection
//! changes is kept here and written a moment later by `Channels::write`, since a handshake must not wait for the disk and
//! a lost channel costs no more than a full one. What ends a channel (revocation, another key, an operator) is durable
//! before it is answered. Whose channel it is, and whether that client still has that key, is asked anew each time.

use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ossicle_core::{Aead, Channel, Secret, TAG_LEN};
use tracing::warn;
use zeroize::Zeroizing;

use crate::crypto::HostAead;
use crate::server::MAX_CHANNEL_AGE;
use crate::store::{ChannelId, ChannelRecord, ClientId, Store, StoreError};
use crate::world::Random;

/// The file of the key in a server's data directory.
pub const KEY_FILE: &str = "channel.key";
/// Clients whose channels may wait to be written; those of further ones are not kept.
const MAX_PENDING: usize = 65_536;
/// Seconds by which a date may have been put right since a channel was issued.
const TOLERANCE: u64 = 300;
/// Writes under way at once, to share the commits of the store.
const WRITES: usize = 256;

const KEY_LEN: usize = 32;
const NONCE_LEN: usize = ossicle_core::NONCE_LEN;
/// secret, client's key, key epoch, server's id, server's key
const PLAIN_LEN: usize = 32 + 32 + 4 + 16 + 32;

/// Under which channels are sealed at rest.
pub struct ChannelKey {
    aead: HostAead,
    random: Random,
}

/// Why there is no key for channels.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelKeyError {
    /// The file cannot be read or made.
    #[error("cannot use the channel key {path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// The system has no randomness.
    #[error("this system has no randomness")]
    Randomness,
    /// Others can read the file.
    #[error("others can read the channel key {path} (mode {mode:04o}): run `chmod 600 {path}`")]
    Permissions {
        /// The file.
        path: String,
        /// Its mode.
        mode: u32,
    },
}

impl ChannelKey {
    /// A key that no file holds: what is sealed under it ends with this process.
    ///
    /// # Errors
    /// [`ChannelKeyError::Randomness`].
    pub fn random() -> Result<Self, ChannelKeyError> {
        Ok(Self::from_bytes(&*fresh()?))
    }

    /// This key. Whoever keeps it takes care of it.
    pub fn from_bytes(key: &[u8; KEY_LEN]) -> Self {
        Self { aead: HostAead::new(key), random: Random::system() }
    }

    /// The same key, whose nonces are made of this.
    #[must_use]
    pub fn with_random(self, random: Random) -> Self {
        Self { random, ..self }
    }

    /// The key in the data directory of a server, made if there is none or what is there is none: then every client makes
    /// one full handshake.
    ///
    /// # Errors
    /// [`ChannelKeyError`].
    pub fn open(data: &Path) -> Result<Self, ChannelKeyError> {
        let path = data.join(KEY_FILE);
        let failed = |error| ChannelKeyError::Io { path: path.display().to_string(), error };
        match File::open(&path) {
            Ok(file) => {
                let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
                if mode & 0o077 != 0 {
                    return Err(ChannelKeyError::Permissions { path: path.display().to_string(), mode });
                }
                let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_LEN + 1));
                let limit = u64::try_from(KEY_LEN + 1).unwrap_or(u64::MAX);
                file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
                if let Ok(key) = <&[u8; KEY_LEN]>::try_from(bytes.as_slice()) {
                    return Ok(Self::from_bytes(key));
                }
                warn!(path = %path.display(), "the channel key is damaged: a new one is made, and clients make full handshakes");
                std::fs::remove_file(&path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let key = fresh()?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        file.write_all(key.as_slice()).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok(Self::from_bytes(&key))
    }

    /// Seals a channel that ends at `expires`, in seconds since 1970, for the store.
    ///
    /// # Errors
    /// [`ChannelKeyError::Randomness`].
    pub fn seal(&self, channel: &Channel, expires: u64) -> Result<ChannelRecord, ChannelKeyError> {
        let mut sealed = vec![0; NONCE_LEN + PLAIN_LEN + TAG_LEN];
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| ChannelKeyError::Randomness)?;
        let plain = [
            channel.secret.expose().as_slice(),
            &channel.client_key,
            &channel.key_epoch.to_be_bytes(),
            &channel.server,
            &channel.server_key,
        ];
        let (head, rest) = sealed.split_at_mut(NONCE_LEN);
        head.copy_from_slice(&nonce);
        let (text, place) = rest.split_at_mut(PLAIN_LEN);
        for (to, from) in text.iter_mut().zip(plain.into_iter().flatten()) {
            *to = *from;
        }
        let tag = self.aead.seal(&nonce, &bound(&channel.id, &channel.client, expires), text);
        place.copy_from_slice(&tag.map_err(|_| ChannelKeyError::Randomness)?);
        Ok(ChannelRecord { id: channel.id, sealed, expires })
    }

    fn open_record(&self, client: &ClientId, record: &ChannelRecord) -> Option<Channel> {
        let (nonce, rest) = record.sealed.split_first_chunk::<NONCE_LEN>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        let mut text = Zeroizing::new(text.to_vec());
        self.aead.open(nonce, &bound(&record.id, client, record.expires), &mut text, tag).ok()?;
        let (secret, rest) = text.split_first_chunk()?;
        let (client_key, rest) = rest.split_first_chunk()?;
        let (key_epoch, rest) = rest.split_first_chunk()?;
        let (server, rest) = rest.split_first_chunk()?;
        Some(Channel {
            id: record.id,
            secret: Secret::new(*secret),
            client: *client,
            client_key: *client_key,
            key_epoch: u32::from_be_bytes(*key_epoch),
            server: *server,
            server_key: *rest.first_chunk()?,
        })
    }
}

fn fresh() -> Result<Zeroizing<[u8; KEY_LEN]>, ChannelKeyError> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    getrandom::fill(key.as_mut()).map_err(|_| ChannelKeyError::Randomness)?;
    Ok(key)
}

/// What a sealed channel is bound to: the clear columns of its row.
fn bound(id: &ChannelId, client: &ClientId, expires: u64) -> Vec<u8> {
    [id.as_slice(), client, &expires.to_be_bytes()].concat()
}

/// A channel that may be resumed now.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) channel: Channel,
    /// Seconds since 1970.
    pub(crate) expires: u64,
}

/// What was issued to one client and is not written yet.
#[derive(Default)]
struct Pending {
    /// The channel that was used to get there: it stays.
    used: Option<ChannelId>,
    /// It, if the store does not have it, and the newest.
    channels: Vec<ChannelRecord>,
}

#[derive(Default)]
struct Unwritten {
    /// In an order of their own: they are written in it.
    clients: BTreeMap<ClientId, Pending>,
    owners: HashMap<ChannelId, ClientId>,
}

impl Unwritten {
    fn remove(&mut self, client: &ClientId) -> Option<Pending> {
        let pending = self.clients.remove(client)?;
        for record in &pending.channels {
            self.owners.remove(&record.id);
        }
        Some(pending)
    }
}

/// See the module.
pub(crate) struct Channels {
    key: ChannelKey,
    unwritten: Mutex<Unwritten>,
    /// Held while rows are written, so that a channel that is ended does not come back behind its end.
    writing: tokio::sync::Mutex<()>,
    /// Counts what ended channels.
    endings: AtomicU64,
}

impl Channels {
    pub(crate) fn new(key: ChannelKey) -> Self {
        Self { key, unwritten: Mutex::default(), writing: tokio::sync::Mutex::default(), endings: AtomicU64::new(0) }
    }

    fn unwritten(&self) -> MutexGuard<'_, Unwritten> {
        // What panicked under it has changed one entry or none.
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever channels were ended.
    pub(crate) fn endings(&self) -> u64 {
        self.endings.load(Ordering::SeqCst)
    }

    /// The channel with this id, unless it has expired.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn find(&self, store: &dyn Store, id: &ChannelId, now: u64) -> Result<Option<Held>, StoreError> {
        let waiting = {
            let unwritten = self.unwritten();
            unwritten.owners.get(id).and_then(|client| {
                let pending = unwritten.clients.get(client)?;
                Some((*client, pending.channels.iter().find(|record| record.id == *id)?.clone()))
            })
        };
        let found = match waiting {
            Some((client, record)) => Some((client, record)).filter(|(_, record)| record.expires > now),
            // What the store still has may be replaced already by what is not written.
            None => store.channel(id, now).await?.filter(|(client, _)| {
                self.unwritten().clients.get(client).is_none_or(|pending| pending.used.as_ref() == Some(id))
            }),
        };
        // Nobody issues one that ends so late: the date was set back since.
        let latest = now.saturating_add(MAX_CHANNEL_AGE.as_secs()).saturating_add(TOLERANCE);
        let Some((client, record)) = found.filter(|(_, record)| record.expires <= latest) else { return Ok(None) };
        let opened = self.key.open_record(&client, &record);
        if opened.is_none() {
            warn!(client = %uuid::Uuid::from_bytes(client), "a channel does not open: its key was lost or its row is damaged");
        }
        Ok(opened.map(|channel| Held { channel, expires: record.expires }))
    }

    /// Keeps a channel that a connection has issued, beside the one that it used and in the place of all others.
    pub(crate) fn issue(&self, channel: &Channel, expires: u64, used: Option<ChannelId>) {
        let record = match self.key.seal(channel, expires) {
            Ok(record) => record,
            Err(error) => {
                warn!(%error, "a channel was not kept");
                return;
            }
        };
        let mut unwritten = self.unwritten();
        let former = unwritten.remove(&channel.client).unwrap_or_default();
        if unwritten.clients.len() >= MAX_PENDING {
            return;
        }
        let mut channels = former.channels;
        channels.retain(|record| Some(record.id) == used);
        channels.push(record);
        for record in &channels {
            unwritten.owners.insert(record.id, channel.client);
        }
        unwritten.clients.insert(channel.client, Pending { used, channels });
    }

    /// The channels of a client, in no order, each with its end in seconds since 1970.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn of(
        &self,
        store: &dyn Store,
        client: &ClientId,
        now: u64,
    ) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        let written = store.channels(client, now).await?;
        let unwritten = self.unwritten();
        let Some(pending) = unwritten.clients.get(client) else { return Ok(written) };
        let newest = pending.channels.iter().rev().map(|record| (record.id, record.expires));
        let used = written.into_iter().filter(|(id, _)| {
            Some(id) == pending.used.as_ref() && pending.channels.iter().all(|record| record.id != *id)
        });
        Ok(newest.chain(used).collect())
    }

    /// Ends all channels of a client, durably, and returns how many the store had.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn end(&self, store: &dyn Store, client: &ClientId) -> Result<u64, StoreError> {
        let _writing = self.writing.lock().await;
        // Whoever is entering on a channel that was looked up before sees this number change.
        self.endings.fetch_add(1, Ordering::SeqCst);
        let unwritten = self.unwritten().remove(client).map_or(0, |pending| pending.channels.len());
        let dropped = store.drop_channels(client).await?;
        Ok(dropped.max(u64::try_from(unwritten).unwrap_or(u64::MAX)))
    }

    /// Writes what was issued since the last call.
    pub(crate) async fn write(&self, store: &dyn Store) {
        let _writing = self.writing.lock().await;
        let clients: Vec<_> = self.unwritten().clients.keys().copied().collect();
        for some in clients.chunks(WRITES) {
            let writes = some.iter().map(|client| self.write_one(store, client));
            futures_util::future::join_all(writes).await;
        }
    }

    async fn write_one(&self, store: &dyn Store, client: &ClientId) {
        let (used, channels) = match self.unwritten().clients.get(client) {
            Some(pending) => (pending.used, pending.channels.clone()),
            None => return,
        };
        for record in &channels {
            // A channel that was used before it was written stands in front of the one that it led to.
            let keep = used.filter(|used| *used != record.id);
            if let Err(error) = store.put_channel(client, record.clone(), keep).await {
                warn!(client = %uuid::Uuid::from_bytes(*client), %error, "a channel was not written: its client makes a full handshake");
            }
        }
        let mut unwritten = self.unwritten();
        // A connection may have issued another one meanwhile: that is written next time.
        if unwritten.clients.get(client).is_some_and(|pending| pending.channels == channels) {
            unwritten.remove(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SqliteStore;

    #[tokio::test]
    async fn a_date_that_is_set_makes_no_channel_live_for_longer() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(directory.path()).unwrap();
        let channels = Channels::new(ChannelKey::random().unwrap());
        let channel = Channel {
            id: [1; 16],
            secret: Secret::new([2; 32]),
            client: [3; 16],
            client_key: [4; 32],
            key_epoch: 0,
            server: [5; 16],
            server_key: [6; 32],
        };
        let issued = 1_790_000_000;
        let expires = issued + MAX_CHANNEL_AGE.as_secs();
        channels.issue(&channel, expires, None);
        let is_there = async |now| channels.find(&store, &channel.id, now).await.unwrap().is_some();
        assert!(is_there(issued).await && is_there(expires - 1).await);
        assert!(is_there(issued - TOLERANCE).await, "put right");
        for now in [0, issued - TOLERANCE - 1, expires, u64::MAX] {
            assert!(!is_there(now).await, "{now}");
        }
        assert!(is_there(issued + 1).await, "and it is still there when the date is right again");
    }
}
