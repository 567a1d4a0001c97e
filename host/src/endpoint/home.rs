//! A home directory: who this client is, and the lock that makes one process at a time its holder.
//!
//! ```text
//! DIR (0700)/ identity.pem   the RSA identity key, PKCS#8
//!             identity.new.pem  the one that is to follow it, until it does (`rotation`)
//!             home.db        everything else (`store::home`), with SQLite's files beside it
//!             channel        what the last connection left, so that the next needs no RSA (`kept`)
//!             lock           held while a process has the connection; "PID COMMAND" inside
//!             socket         where that process answers others
//! ```
//! All files have mode 0600. A directory that others can enter is refused.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Failure;
use super::kept::Kept;
use crate::backup::{self, Restored};
use crate::crypto::{IdentityKey, UNFINISHED};
use crate::store::home::{HomeStore, OwnKeys, Profile};

/// The longest path that the address of a unix socket holds, with something to spare.
const MAX_SOCKET_PATH: usize = 100;
const FILES: [&str; 9] = [
    "identity.pem",
    "identity.new.pem",
    "home.db",
    "home.db-wal",
    "home.db-shm",
    "lock",
    "socket",
    "channel",
    "channel.new",
];

/// A home directory.
#[derive(Clone, Debug)]
pub struct Home {
    directory: PathBuf,
}

/// What the holder of a home opens.
pub(super) struct Opened {
    pub(super) profile: Profile,
    pub(super) key: IdentityKey,
    pub(super) own: OwnKeys,
    pub(super) store: HomeStore,
    pub(super) kept: Kept,
    pub(super) home: Home,
}

impl Home {
    /// The home at this path, which need not exist.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The home that is meant where none is named: `$XDG_DATA_HOME/ossicle`, else `~/.local/share/ossicle`.
    ///
    /// # Errors
    /// [`Failure`] if there is neither variable.
    pub fn default_directory() -> Result<PathBuf, Failure> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("ossicle"))
            .ok_or_else(|| Failure::usage("there is no home directory: say where with --home DIR"))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory if it is missing, for `init`.
    pub(super) fn prepare(&self) -> Result<(), Failure> {
        let failed = |error| Failure::refused(format!("cannot make the home {}: {error}", self.directory.display()));
        match fs::read_dir(&self.directory) {
            Ok(mut entries) => {
                let foreign = entries.find_map(|entry| {
                    let name = entry.ok()?.file_name();
                    // What a process that was killed left of a key that it was writing: nobody's key.
                    let is_ours =
                        FILES.iter().any(|file| name == *file) || name.to_string_lossy().starts_with(UNFINISHED);
                    (!is_ours).then_some(name)
                });
                if let Some(name) = foreign {
                    return Err(Failure::usage(format!(
                        "{} is not empty (it has {}): choose a directory of its own with --home DIR",
                        self.directory.display(),
                        name.display()
                    )));
                }
                fs::set_permissions(&self.directory, Permissions::from_mode(0o700)).map_err(failed)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Is there a directory that only its owner can enter?
    pub(super) fn check(&self) -> Result<(), Failure> {
        let directory = self.directory.display();
        let metadata = match fs::metadata(&self.directory) {
            Ok(metadata) if metadata.is_dir() => metadata,
            Ok(_) => return Err(Failure::usage(format!("{directory} is not a directory: choose another --home"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.missing()),
            Err(error) => return Err(Failure::refused(format!("cannot open the home {directory}: {error}"))),
        };
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(Failure::usage(format!(
                "others can enter the home {directory} (mode {mode:04o}): run `chmod 700 {directory}`"
            )));
        }
        Ok(())
    }

    fn missing(&self) -> Failure {
        Failure::usage(format!(
            "there is no identity in {}: make one with `ossicle init --name NAME URL`, or name its home with --home DIR",
            self.directory.display()
        ))
    }

    /// Who this home is. For whoever does not hold the lock, too.
    ///
    /// # Errors
    /// [`Failure`] if there is no complete identity.
    pub fn profile(&self) -> Result<Profile, Failure> {
        self.check()?;
        if !self.database().exists() {
            return Err(self.missing());
        }
        let profile = HomeStore::open(&self.database())?.profile()?;
        profile.filter(|profile| profile.complete).ok_or_else(|| self.incomplete())
    }

    fn incomplete(&self) -> Failure {
        Failure::usage(format!(
            "the identity in {} was never completed: run `ossicle init` again, with the same name",
            self.directory.display()
        ))
    }

    /// Opens everything, for the holder of the lock.
    pub(super) fn open(&self, _lock: &HomeLock) -> Result<Opened, Failure> {
        if !self.database().exists() {
            return Err(self.missing());
        }
        let store = HomeStore::open(&self.database())?;
        let Some(profile) = store.profile()?.filter(|profile| profile.complete) else {
            return Err(self.incomplete());
        };
        let own = store.keys()?.ok_or(crate::store::home::HomeStoreError::Damaged)?;
        let mut key = IdentityKey::load(&self.identity())?;
        // The state says which key counts; a crash came before the file followed.
        if key.fingerprint() != own.bundle.key
            && let Some(next) = self.next_key()?.filter(|next| next.fingerprint() == own.bundle.key)
        {
            self.adopt_next_key()?;
            key = next;
        }
        Ok(Opened { profile, key, own, store, kept: self.kept(), home: self.clone() })
    }

    /// Writes a backup of this home to `file`.
    ///
    /// # Errors
    /// [`Failure`] if there is no identity, another process uses the home, or the file cannot be written.
    pub fn back_up(&self, file: &Path) -> Result<(), Failure> {
        self.profile()?;
        let _lock = self.lock_alone("backup")?;
        Ok(backup::back_up_home(&self.directory, file)?)
    }

    /// Restores this home from `file`; with `replace` in the place of another.
    ///
    /// # Errors
    /// [`Failure`]; nothing has changed then.
    pub(crate) fn restore(&self, file: &Path, replace: bool) -> Result<Restored, Failure> {
        let restore = || Ok(backup::restore_home(file, &self.directory, replace)?);
        backup::restore_behind(&self.directory, || self.lock_alone("restore"), restore)
    }

    fn lock_alone(&self, command: &str) -> Result<HomeLock, Failure> {
        self.try_lock(command)?.ok_or_else(|| {
            let (pid, holder) = self.holder().unwrap_or_else(|| (0, "?".into()));
            Failure::refused(format!(
                "`ossicle {holder}` (pid {pid}) uses {}: end it, and try again",
                self.directory.display()
            ))
        })
    }

    /// Takes the lock for `command`, unless another process has it.
    ///
    /// # Errors
    /// [`Failure`] if the lock file cannot be used.
    pub(super) fn try_lock(&self, command: &str) -> Result<Option<HomeLock>, Failure> {
        let failed = |error| Failure::refused(format!("cannot lock the home {}: {error}", self.directory.display()));
        let path = self.directory.join("lock");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let mut file = file.map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{} {command}", std::process::id()).map_err(failed)?;
        Ok(Some(HomeLock { _file: file }))
    }

    /// Who holds the lock, as it wrote itself: process id and command.
    pub(super) fn holder(&self) -> Option<(u32, String)> {
        let mut text = String::new();
        File::open(self.directory.join("lock")).ok()?.take(256).read_to_string(&mut text).ok()?;
        let (pid, command) = text.trim().split_once(' ')?;
        Some((pid.parse().ok()?, command.to_owned()))
    }

    /// Where its channel is kept.
    pub(super) fn kept(&self) -> Kept {
        Kept::new(&self.directory)
    }

    pub(super) fn identity(&self) -> PathBuf {
        self.directory.join("identity.pem")
    }

    pub(super) fn next_identity(&self) -> PathBuf {
        self.directory.join("identity.new.pem")
    }

    /// The key that is to follow the present one, if one was made.
    pub(super) fn next_key(&self) -> Result<Option<IdentityKey>, Failure> {
        let path = self.next_identity();
        Ok(if path.exists() { Some(IdentityKey::load(&path)?) } else { None })
    }

    /// The key that was to follow is the present one from now on; the former one is gone.
    pub(super) fn adopt_next_key(&self) -> Result<(), Failure> {
        let renamed = fs::rename(self.next_identity(), self.identity()).and_then(|()| self.sync());
        renamed.map_err(|error| Failure::refused(format!("cannot replace {}: {error}", self.identity().display())))
    }

    /// Removes a key that is not to follow after all.
    pub(super) fn discard_next_key(&self) -> Result<(), Failure> {
        let path = self.next_identity();
        match fs::remove_file(&path).and_then(|()| self.sync()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::refused(format!("cannot remove {}: {error}", path.display())))
            }
            _ => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    pub(super) fn database(&self) -> PathBuf {
        self.directory.join("home.db")
    }

    /// A path to the socket that fits into an address, and what must stay open while it is used.
    pub(super) fn socket(&self) -> io::Result<(PathBuf, Option<File>)> {
        let path = self.directory.join("socket");
        if path.as_os_str().len() <= MAX_SOCKET_PATH {
            return Ok((path, None));
        }
        let directory = File::open(&self.directory)?;
        Ok((PathBuf::from(format!("/proc/self/fd/{}/socket", directory.as_raw_fd())), Some(directory)))
    }
}

/// The right to a home's connection and state; it ends with the process that has it.
pub struct HomeLock {
    _file: File,
}

#[cfg(test)]
mod tests {
    use getrandom::SysRng;
    use ossicle_core::{BundleKeys, Member};

    use super::super::rotation;
    use super::*;

    #[test]
    fn one_process_at_a_time_holds_a_home() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let lock = home.try_lock("listen").unwrap();
        assert!(lock.is_some());
        assert!(home.try_lock("send").unwrap().is_none());
        assert_eq!(home.holder(), Some((std::process::id(), "listen".to_owned())));
        drop(lock);
        assert!(home.try_lock("send").unwrap().is_some());
    }

    #[test]
    fn homes_are_for_their_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("a/b"));
        assert_eq!(home.profile().unwrap_err().code, 2);
        home.prepare().unwrap();
        assert_eq!(fs::metadata(home.directory()).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(home.directory(), Permissions::from_mode(0o750)).unwrap();
        let refused = home.check().unwrap_err();
        assert!(refused.sentence.contains("chmod 700"), "{refused}");
        // An empty directory is taken over, one with something else in it is not.
        home.prepare().unwrap();
        home.check().unwrap();
        fs::write(home.directory().join(format!("{UNFINISHED}x7Yz")), "").unwrap();
        home.prepare().unwrap();
        fs::write(home.directory().join("thesis.tex"), "").unwrap();
        assert!(home.prepare().unwrap_err().sentence.contains("thesis.tex"));
    }

    #[test]
    fn the_key_that_the_state_names_opens_the_home_wherever_a_rotation_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("home"));
        home.prepare().unwrap();
        let (present, next) = (IdentityKey::generate(2048).unwrap(), IdentityKey::generate(2048).unwrap());
        present.save(&home.identity()).unwrap();
        let mut store = HomeStore::open(&home.database()).unwrap();
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
        let keys = BundleKeys::generate(0, &mut SysRng).unwrap();
        let bundle = keys.bundle(&Member { id: [1; 16], key: present.fingerprint() }, 1, [0; 32]);
        store.put_keys(&keys, &bundle, &[3; 256], 1_700_000_000).unwrap();
        let opened = || {
            let lock = home.try_lock("test").unwrap().unwrap();
            let opened = home.open(&lock).unwrap();
            let pending = rotation::pending(&home, &opened.store).unwrap().is_some();
            (opened.key.fingerprint(), opened.own.bundle.key, pending)
        };
        let (old, new) = (present.fingerprint(), next.fingerprint());
        // Only the file: the server cannot know of it.
        next.save(&home.next_identity()).unwrap();
        assert_eq!(opened(), (old, old, false));
        // Its bundle too: the server may have it.
        let own = store.keys().unwrap().unwrap();
        let first = rotation::successor_keys(&store, &own, [1; 16], &next).unwrap();
        assert_eq!(opened(), (old, old, true));
        let again = rotation::successor_keys(&store, &own, [1; 16], &next).unwrap();
        assert_eq!(again.bundle, first.bundle, "the same again is offered the same");
        assert_eq!((first.bundle.epoch, first.bundle.previous), (2, bundle.hash()));
        // The state is that of the new key, and the file has not followed yet.
        store.succeed(1, 1_700_000_001).unwrap();
        assert!(home.next_identity().exists());
        assert_eq!(opened(), (new, new, false));
        assert!(!home.next_identity().exists());
        assert_eq!(opened(), (new, new, false));
    }

    #[test]
    fn long_paths_still_have_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("x".repeat(150)));
        home.prepare().unwrap();
        let (path, open) = home.socket().unwrap();
        assert!(open.is_some() && path.as_os_str().len() < MAX_SOCKET_PATH);
        std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(home.directory().join("socket").exists());
    }
}
