//! The channel that a home keeps: with it the next connection, of this process or another, needs no RSA.
//!
//! A file of its own, mode 0600, in no backup and never synced: a lost or damaged one costs one full handshake. Whoever
//! reads it is this client to the server until the channel expires, as with the identity key beside it; and could pose as
//! the server to this client, which would never know from what such a server says. So the file says when RSA was last
//! used, and seven days later the channel is offered to nobody.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ossicle_core::{Channel, Secret};
use zeroize::Zeroizing;

/// The name of the file in a home.
pub(super) const FILE: &str = "channel";
const VERSION: u8 = 2;
/// version, broken, id, secret, client, client's key, key epoch, server, server's key, time of the last full handshake
const LEN: usize = 1 + 1 + 16 + 32 + 16 + 32 + 4 + 16 + 32 + 8;
/// Seconds from one full handshake to the next.
const MAX_AGE: u64 = 7 * 24 * 3600;
/// Resumptions in a row that may break before a full handshake is made.
const BROKEN: u8 = 2;

/// Where a home keeps its channel.
pub(super) struct Kept {
    path: PathBuf,
}

struct Stored {
    channel: Channel,
    broken: u8,
    /// Seconds since 1970.
    since: u64,
}

impl Kept {
    pub(super) fn new(directory: &Path) -> Self {
        Self { path: directory.join(FILE) }
    }

    /// The channel to offer now, if there is one that has not broken twice and whose last full handshake was at most seven
    /// days ago. A clock that has gone back knows nothing of that.
    pub(super) fn offer(&self, now: u64) -> Option<Channel> {
        let is_fresh = |since| now.checked_sub(since).is_some_and(|age| age <= MAX_AGE);
        self.read().filter(|stored| stored.broken < BROKEN && is_fresh(stored.since)).map(|stored| stored.channel)
    }

    /// When the full handshake was from which the channel comes, over whatever resumptions, in seconds since 1970.
    pub(super) fn since(&self) -> Option<u64> {
        self.read().map(|stored| stored.since)
    }

    /// The channel, whether it is offered next or not.
    pub(super) fn channel(&self) -> Option<Channel> {
        self.read().map(|stored| stored.channel)
    }

    /// Keeps a channel in the place of any other, with the time of its last full handshake. That it cannot is not worth a
    /// failure.
    pub(super) fn keep(&self, channel: &Channel, since: u64) {
        self.write(&Stored { channel: channel.clone(), broken: 0, since });
    }

    /// A resumption broke before the server had answered. The channel stays: whoever breaks connections must not be able
    /// to end it.
    pub(super) fn broke(&self) {
        if let Some(stored) = self.read() {
            self.write(&Stored { broken: stored.broken.saturating_add(1), ..stored });
        }
    }

    /// Forgets it. True if there was one.
    pub(super) fn forget(&self) -> bool {
        fs::remove_file(&self.path).is_ok()
    }

    fn read(&self) -> Option<Stored> {
        let file = File::open(&self.path).ok()?;
        if file.metadata().ok()?.mode() & 0o077 != 0 {
            tracing::warn!("others can read {}: its channel is not used; run `chmod 600` on it", self.path.display());
            return None;
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(LEN + 1));
        file.take(u64::try_from(LEN + 1).unwrap_or(u64::MAX)).read_to_end(&mut bytes).ok()?;
        let bytes: &[u8; LEN] = bytes.as_slice().try_into().ok()?;
        let ([version, broken], rest) = bytes.split_first_chunk()?;
        let (id, rest) = rest.split_first_chunk()?;
        let (secret, rest) = rest.split_first_chunk()?;
        let (client, rest) = rest.split_first_chunk()?;
        let (client_key, rest) = rest.split_first_chunk()?;
        let (key_epoch, rest) = rest.split_first_chunk()?;
        let (server, rest) = rest.split_first_chunk()?;
        let (server_key, rest) = rest.split_first_chunk()?;
        let channel = Channel {
            id: *id,
            secret: Secret::new(*secret),
            client: *client,
            client_key: *client_key,
            key_epoch: u32::from_be_bytes(*key_epoch),
            server: *server,
            server_key: *server_key,
        };
        let since = u64::from_be_bytes(*rest.first_chunk()?);
        (*version == VERSION).then_some(Stored { channel, broken: *broken, since })
    }

    fn write(&self, stored: &Stored) {
        if let Err(error) = self.replace(stored) {
            tracing::debug!(%error, path = %self.path.display(), "the channel is not kept");
            // An older one must not stay in the place of the newer.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn replace(&self, stored: &Stored) -> std::io::Result<()> {
        let channel = &stored.channel;
        let parts: [&[u8]; 9] = [
            &[VERSION, stored.broken],
            &channel.id,
            channel.secret.expose(),
            &channel.client,
            &channel.client_key,
            &channel.key_epoch.to_be_bytes(),
            &channel.server,
            &channel.server_key,
            &stored.since.to_be_bytes(),
        ];
        let mut bytes = Zeroizing::new(Vec::with_capacity(LEN));
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        // Whole or not at all, whenever this process ends.
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&bytes)?;
        fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    const NOW: u64 = 1_800_000_000;

    fn channel(n: u8) -> Channel {
        Channel {
            id: [n; 16],
            secret: Secret::new([n + 1; 32]),
            client: [n + 2; 16],
            client_key: [n + 3; 32],
            key_epoch: u32::from(n),
            server: [n + 4; 16],
            server_key: [n + 5; 32],
        }
    }

    #[test]
    fn the_newest_channel_is_kept_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::new(directory.path());
        assert!(kept.offer(NOW).is_none() && !kept.forget());
        kept.keep(&channel(1), NOW);
        kept.keep(&channel(9), NOW);
        let read = kept.offer(NOW).unwrap();
        assert_eq!((read.id, read.client, read.key_epoch), ([9; 16], [11; 16], 9));
        assert_eq!((read.client_key, read.server, read.server_key), ([12; 32], [13; 16], [14; 32]));
        assert_eq!(read.secret.expose(), &[10; 32]);
        let path = directory.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(kept.offer(NOW).is_none(), "others could have read it");
        assert!(kept.forget());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn two_broken_resumptions_end_the_offers_and_not_the_channel() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::new(directory.path());
        kept.keep(&channel(1), NOW);
        kept.broke();
        assert!(kept.offer(NOW).is_some());
        kept.broke();
        assert!(kept.offer(NOW).is_none() && kept.channel().is_some());
        kept.keep(&channel(2), NOW);
        assert!(kept.offer(NOW).is_some());
    }

    #[test]
    fn a_channel_ends_seven_days_after_its_full_handshake_whatever_the_server_says() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::new(directory.path());
        kept.keep(&channel(1), NOW);
        kept.broke();
        assert_eq!(kept.since(), Some(NOW));
        assert!(kept.offer(NOW).is_some() && kept.offer(NOW + MAX_AGE).is_some());
        assert!(kept.offer(NOW + MAX_AGE + 1).is_none() && kept.offer(u64::MAX).is_none());
        assert!(kept.offer(NOW - 1).is_none(), "the clock was set back");
        assert!(kept.channel().is_some());
    }

    #[test]
    fn a_damaged_file_is_no_channel() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::new(directory.path());
        kept.keep(&channel(1), NOW);
        let whole = fs::read(directory.path().join(FILE)).unwrap();
        for len in 0..whole.len() {
            fs::write(directory.path().join(FILE), &whole[..len]).unwrap();
            assert!(kept.offer(NOW).is_none(), "{len} bytes");
        }
        fs::write(directory.path().join(FILE), [&whole[..], &[0]].concat()).unwrap();
        assert!(kept.offer(NOW).is_none());
        fs::write(directory.path().join(FILE), [&[1], &whole[1..]].concat()).unwrap();
        assert!(kept.offer(NOW).is_none(), "another version");
    }
}
