//! Backups: one file that holds what a client or a server cannot make again, and the way back.
//!
//! ```text
//! FILE (0600)  a tar archive: `manifest.json`, then the parts, each at most once; then SHA-256 of all that [32]
//!   of a home    identity.pem, home.db     never: prekeys, chains, the channel
//!   of a server  server.key, store.db, ossicle.toml if there is one     never: channels and their key
//! ```
//! What is not named here is in no backup. A file is checked to its last byte before anything is replaced; a directory is
//! made whole beside its place and then put there in one step. What is restored is another one to its peers: a home makes
//! new end-to-end keys at its next connection, a server has another store epoch, no tokens and no channels.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ossicle_core::BundleKeys;
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::crypto::{IdentityKey, KeyError};
use crate::store::StoreError;
use crate::store::home::{HomeStore, HomeStoreError};
use crate::store::snapshot;

const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const MAX_MANIFEST: u64 = 64 * 1024;
/// Everything but a database is small.
const MAX_SMALL: u64 = 1024 * 1024;
const SUM_LEN: u64 = 32;
/// What holds others off, in a home and in a server's data.
const LOCK: &str = "lock";

/// Whose backup it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A client's home.
    Home,
    /// A server's data.
    Server,
}

impl Kind {
    /// The parts that there must be, and those that there may be.
    const fn parts(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Home => (&["identity.pem", "home.db"], &[]),
            Self::Server => (&["server.key", "store.db"], &[crate::settings::FILE]),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Home => "a client's home (restore it with --home DIR)",
            Self::Server => "a server's data (restore it with --data DIR)",
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    kind: Kind,
    /// The program that made it.
    version: String,
    /// Seconds since 1970.
    made: u64,
    parts: Vec<String>,
}

/// Why there is no backup, or why it was not restored. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// Something is in the place of the backup.
    #[error("{0} exists already and is not overwritten: name another file")]
    Exists(String),
    /// The place to restore to is not empty.
    #[error(
        "{0} is not empty: restore into another directory, or put it in its place with --replace (what is there is kept beside it)"
    )]
    InTheWay(String),
    /// A process uses what is to be replaced or copied.
    #[error("{0}")]
    Busy(String),
    /// The system refused.
    #[error("cannot {doing} {path}: {error}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// The file is no backup.
    #[error("{0} is no backup of ossicle")]
    Foreign(String),
    /// The file is not what was written.
    #[error("{0} is damaged or cut off: nothing of it is used; take another copy")]
    Damaged(String),
    /// The file is of a later version.
    #[error("{0} was made by a newer version of ossicle: use that version")]
    Newer(String),
    /// The file is of another kind than the place.
    #[error("{path} is a backup of {}", kind.words())]
    Kind {
        /// The file.
        path: String,
        /// Whose it is.
        kind: Kind,
    },
    /// An identity whose key is just being replaced.
    #[error("the identity key of this home is being replaced: connect once, with `ossicle who`, and try again")]
    Rotating,
    /// A key in it or for it.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The state of a home.
    #[error(transparent)]
    Home(#[from] HomeStoreError),
    /// The store of a server.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn io_error<'e>(doing: &'static str, path: &'e Path) -> impl Fn(io::Error) -> BackupError + use<'e> {
    move |error| match error.kind() {
        io::ErrorKind::AlreadyExists if doing == "make" => BackupError::Exists(path.display().to_string()),
        _ => BackupError::Io { doing, path: path.display().to_string(), error },
    }
}

/// Backs a home up, for the holder of its lock.
///
/// # Errors
/// [`BackupError`]; there is no file then.
pub(crate) fn back_up_home(home: &Path, file: &Path) -> Result<(), BackupError> {
    let folder = beside(file)?;
    let key = IdentityKey::load(&home.join("identity.pem"))?;
    if home.join("identity.new.pem").exists() {
        return Err(BackupError::Rotating);
    }
    key.save(&folder.path().join("identity.pem"))?;
    snapshot::copy_home(&home.join("home.db"), &folder.path().join("home.db"))?;
    pack(Kind::Home, folder.path(), file)
}

/// Backs the data of a server up, whether it runs or not.
///
/// # Errors
/// [`BackupError`]; there is no file then.
pub(crate) fn back_up_server(data: &Path, file: &Path) -> Result<(), BackupError> {
    if !data.join("store.db").exists() {
        return Err(BackupError::Io {
            doing: "back up",
            path: data.display().to_string(),
            error: io::Error::other("it holds no server's data: give its directory with --data"),
        });
    }
    // Who restores something there meanwhile puts another directory in its place.
    let place = || fs::metadata(data).map(|place| (place.dev(), place.ino())).map_err(io_error("read", data));
    let busy = || BackupError::Busy(format!("{} is in use: wait until that has ended, or stop it", data.display()));
    let before = place()?;
    let folder = beside(file)?;
    snapshot::copy_store(data, &folder.path().join("store.db")).map_err(|error| match error {
        StoreError::Busy(_) => busy(),
        error => error.into(),
    })?;
    IdentityKey::load(&data.join("server.key"))?.save(&folder.path().join("server.key"))?;
    let settings = data.join(crate::settings::FILE);
    if settings.exists() {
        fs::copy(&settings, folder.path().join(crate::settings::FILE)).map_err(io_error("read", &settings))?;
    }
    if place()? != before {
        return Err(busy());
    }
    pack(Kind::Server, folder.path(), file)
}

/// What the directories are called in which backups and what is restored are put together, before the rest of the name.
const UNFINISHED: &str = ".ossicle-";

/// A directory for this user alone, on the disk of `path`.
fn beside(path: &Path) -> Result<tempfile::TempDir, BackupError> {
    let parent = parent(path);
    let private = fs::Permissions::from_mode(0o700);
    let made = tempfile::Builder::new().prefix(UNFINISHED).permissions(private).tempdir_in(parent);
    made.map_err(io_error("make a file in", parent))
}

/// What a backup or restore that was killed has left beside `path`, or one that runs is at work on; of at most `most`
/// entries there. They hold keys.
pub(crate) fn unfinished(path: &Path, most: usize) -> Vec<PathBuf> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Ok(entries) = fs::read_dir(parent(&path)) else { return Vec::new() };
    let named = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let found = entries.take(most).flatten().filter(|entry| named(entry) && is_directory(entry));
    let mut found: Vec<_> = found.map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."))
}

/// Writes the parts in `folder` to `file`: whole and durable, or not at all.
fn pack(kind: Kind, folder: &Path, file: &Path) -> Result<(), BackupError> {
    if file.exists() {
        return Err(BackupError::Exists(file.display().to_string()));
    }
    let new = folder.join("backup");
    let failed = io_error("write", file);
    let write = || -> io::Result<()> {
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        let mut tar = tar::Builder::new(Summing { inner: out, sum: Sha256::new() });
        let (needed, allowed) = kind.parts();
        let parts: Vec<&str> =
            needed.iter().chain(allowed).copied().filter(|part| folder.join(part).exists()).collect();
        let manifest = Manifest {
            format: FORMAT,
            kind,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            made: crate::clock::system_date(),
            parts: parts.iter().map(|part| (*part).to_owned()).collect(),
        };
        let manifest = serde_json::to_vec_pretty(&manifest)?;
        append(&mut tar, MANIFEST, u64::try_from(manifest.len()).unwrap_or(u64::MAX), manifest.as_slice())?;
        for part in parts {
            let source = File::open(folder.join(part))?;
            append(&mut tar, part, source.metadata()?.len(), source)?;
        }
        let Summing { mut inner, sum } = tar.into_inner()?;
        inner.write_all(&sum.finalize())?;
        inner.sync_all()
    };
    write().map_err(&failed)?;
    renameat_with(CWD, &new, CWD, file, RenameFlags::NOREPLACE).map_err(|error| match error {
        rustix::io::Errno::EXIST => BackupError::Exists(file.display().to_string()),
        error => failed(error.into()),
    })?;
    File::open(parent(file)).and_then(|parent| parent.sync_all()).map_err(failed)
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, len: u64, source: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(len);
    header.set_mode(0o600);
    tar.append_data(&mut header, name, source)
}

/// Sums up what passes through it.
struct Summing<T> {
    inner: T,
    sum: Sha256,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.sum.update(bytes.get(..len).unwrap_or_default());
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Checks `file` to its last byte and puts its parts into `folder`, which is empty.
fn unpack(file: &Path, kind: Kind, folder: &Path) -> Result<(), BackupError> {
    let name = || file.display().to_string();
    let failed = io_error("read", file);
    // Opening a pipe would wait for its writer.
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let mut source = OpenOptions::new().read(true).custom_flags(no_wait).open(file).map_err(&failed)?;
    let metadata = source.metadata().map_err(&failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let len = metadata.len();
    let Some(end) = len.checked_sub(SUM_LEN) else { return Err(BackupError::Foreign(name())) };
    // What it says it is comes first, so that a file of another kind is called by its name.
    let mut magic = [0; MANIFEST.len()];
    source.read_exact(&mut magic).map_err(|_| BackupError::Foreign(name()))?;
    if magic != MANIFEST.as_bytes() {
        return Err(BackupError::Foreign(name()));
    }
    source.seek(SeekFrom::Start(0)).map_err(&failed)?;
    let mut sum = Sha256::new();
    let mut all = BufReader::new(&source).take(end);
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let read = all.read(&mut chunk).map_err(&failed)?;
        if read == 0 {
            break;
        }
        sum.update(chunk.get(..read).unwrap_or_default());
    }
    source.seek(SeekFrom::Start(end)).map_err(&failed)?;
    let mut written = [0; 32];
    source.read_exact(&mut written).map_err(|_| BackupError::Damaged(name()))?;
    if written != *sum.finalize() {
        return Err(BackupError::Damaged(name()));
    }

    source.seek(SeekFrom::Start(0)).map_err(&failed)?;
    let mut archive = tar::Archive::new(BufReader::new(&source).take(end));
    let damaged = |_: io::Error| BackupError::Damaged(name());
    // Raw: no entry may rename the next one, or be read into memory as a name.
    let mut entries = archive.entries().map_err(damaged)?.raw(true);
    let manifest = match entries.next() {
        Some(entry) => {
            let mut text = Vec::new();
            entry.map_err(damaged)?.take(MAX_MANIFEST).read_to_end(&mut text).map_err(damaged)?;
            serde_json::from_slice::<serde_json::Value>(&text).map_err(|_| BackupError::Damaged(name()))?
        }
        None => return Err(BackupError::Foreign(name())),
    };
    // A later format may say more: its number is looked at before the rest.
    match manifest.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        Some(format) if format > u64::from(FORMAT) => return Err(BackupError::Newer(name())),
        _ => return Err(BackupError::Damaged(name())),
    }
    let manifest: Manifest = serde_json::from_value(manifest).map_err(|_| BackupError::Damaged(name()))?;
    if manifest.kind != kind {
        return Err(BackupError::Kind { path: name(), kind: manifest.kind });
    }
    let (needed, allowed) = kind.parts();
    let mut found = Vec::new();
    for entry in entries {
        let mut entry = entry.map_err(damaged)?;
        let path = entry.path().map_err(damaged)?.into_owned();
        let part = needed.iter().chain(allowed).find(|part| path == Path::new(part));
        let (Some(part), true) = (part, entry.header().entry_type() == tar::EntryType::Regular) else {
            return Err(BackupError::Damaged(name()));
        };
        let too_long = !part.ends_with(".db") && entry.size() > MAX_SMALL;
        if found.contains(part) || too_long {
            return Err(BackupError::Damaged(name()));
        }
        let place = folder.join(part);
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&place);
        let mut out = out.map_err(io_error("write", &place))?;
        let copied = io::copy(&mut entry, &mut out).map_err(io_error("write", &place))?;
        if copied != entry.size() {
            return Err(BackupError::Damaged(name()));
        }
        out.sync_all().map_err(io_error("write", &place))?;
        found.push(*part);
    }
    if needed.iter().all(|part| found.contains(part)) { Ok(()) } else { Err(BackupError::Damaged(name())) }
}

/// Restores into `place` behind its lock. A place that is missing is made first, so that nobody else begins to use it
/// meanwhile, and is gone again if nothing was restored.
///
/// # Errors
/// [`BackupError`] if it cannot be made, and those of `lock` and `restore`.
pub(crate) fn restore_behind<L, E: From<BackupError>>(
    place: &Path,
    lock: impl FnOnce() -> Result<L, E>,
    restore: impl FnOnce() -> Result<Restored, E>,
) -> Result<Restored, E> {
    let parent = parent(place);
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(io_error("make", parent))?;
    let made = match DirBuilder::new().mode(0o700).create(place) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(io_error("write", place)(error).into()),
    };
    let _lock = lock()?;
    let restored = restore();
    if made && restored.is_err() {
        let _ = fs::remove_file(place.join(LOCK)).and_then(|()| fs::remove_dir(place));
    }
    restored
}

/// Holds off every server of this data while it is replaced.
///
/// # Errors
/// [`BackupError::Busy`] while a server runs there.
pub(crate) fn lock_server(data: &Path) -> Result<File, BackupError> {
    let path = data.join(LOCK);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            Err(BackupError::Busy(format!("a server runs on {}: stop it first", data.display())))
        }
        Err(fs::TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
    }
}

/// What a restored directory replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restored {
    /// Where the former directory lies now.
    pub(crate) former: Option<PathBuf>,
    /// Clients that were revoked there and may come in here.
    pub(crate) revoked: Vec<String>,
    /// Clients that had replaced a key there that counts here again.
    pub(crate) rekeyed: Vec<String>,
    /// Accounts of which a password counts here again that did not count there any more.
    pub(crate) accounts: Vec<String>,
}

/// Restores a home. Whoever replaces one holds its lock.
///
/// # Errors
/// [`BackupError`]; nothing has changed then.
pub(crate) fn restore_home(file: &Path, home: &Path, replace: bool) -> Result<Restored, BackupError> {
    let home = &real(home)?;
    let folder = prepare(home, replace)?;
    unpack(file, Kind::Home, folder.path())?;
    let damaged = || BackupError::Damaged(file.display().to_string());
    let key = IdentityKey::load(&folder.path().join("identity.pem")).map_err(|_| damaged())?;
    let database = folder.path().join("home.db");
    let last = match snapshot::check_home(&database) {
        Ok(last) => last,
        Err(HomeStoreError::Version { .. }) => return Err(BackupError::Newer(file.display().to_string())),
        Err(error @ (HomeStoreError::Full | HomeStoreError::Io(_))) => return Err(error.into()),
        Err(_) => return Err(damaged()),
    };
    if last.key != key.fingerprint() {
        return Err(damaged());
    }
    // Keys that nobody has seen; their epoch is settled with the directory at the next connection (PROTOCOL 8.4).
    let mut store = HomeStore::open(&database)?;
    let sick = |_| KeyError::Failed;
    let keys = BundleKeys::generate(last.prekey_id.wrapping_add(1), &mut getrandom::SysRng).map_err(sick)?;
    let bundle = keys.bundle(&last.member(), last.epoch.saturating_add(1), last.hash());
    let signature = key.sign(&bundle.statement())?;
    store.put_keys(&keys, &bundle, &signature, crate::clock::system_date())?;
    store.restored()?;
    drop(store);
    let former = swap(folder, home)?;
    Ok(Restored { former, ..Restored::default() })
}

/// Restores the data of a server that does not run.
///
/// # Errors
/// [`BackupError`]; nothing has changed then.
pub(crate) fn restore_server(file: &Path, data: &Path, replace: bool) -> Result<Restored, BackupError> {
    let data = &real(data)?;
    let folder = prepare(data, replace)?;
    unpack(file, Kind::Server, folder.path())?;
    let damaged = || BackupError::Damaged(file.display().to_string());
    IdentityKey::load(&folder.path().join("server.key")).map_err(|_| damaged())?;
    snapshot::renew_store(folder.path()).map_err(|error| match error {
        StoreError::Newer(_) => BackupError::Newer(file.display().to_string()),
        StoreError::Full(_) => error.into(),
        _ => damaged(),
    })?;
    let restored = snapshot::standing(folder.path())?;
    let restored: HashMap<_, _> = restored.into_iter().map(|client| (client.id, client)).collect();
    // What the former store says, if it can still say anything.
    let formerly =
        if data.join("store.db").exists() { snapshot::standing(data).unwrap_or_default() } else { Vec::new() };
    let (mut revoked, mut rekeyed) = (Vec::new(), Vec::new());
    for client in formerly {
        match restored.get(&client.id).filter(|now| !now.revoked) {
            Some(_) if client.revoked => revoked.push(client.name),
            Some(now) if now.key_epoch < client.key_epoch => rekeyed.push(client.name),
            _ => {}
        }
    }
    let mut accounts = Vec::new();
    if data.join("store.db").exists()
        && let (Ok(formerly), Ok(now)) = (snapshot::accounts(data), snapshot::accounts(folder.path()))
    {
        let formerly: HashMap<_, _> = formerly.into_iter().collect();
        let counts = |(name, verifier): &(String, Option<_>)| {
            verifier.is_some() && formerly.get(name).is_none_or(|former| former != verifier)
        };
        accounts.extend(now.into_iter().filter(counts).map(|(name, _)| name));
    }
    let former = swap(folder, data)?;
    Ok(Restored { former, revoked, rekeyed, accounts })
}

/// The place itself: what is kept beside `DIR/` or a link would else be in it, or on another disk.
fn real(place: &Path) -> Result<PathBuf, BackupError> {
    match fs::canonicalize(place) {
        Ok(place) => Ok(place),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(place.components().collect()),
        Err(error) => Err(io_error("read", place)(error)),
    }
}

/// A directory beside the one to restore to, which may be replaced if it is empty or the caller says so.
fn prepare(place: &Path, replace: bool) -> Result<tempfile::TempDir, BackupError> {
    match fs::read_dir(place) {
        Ok(mut entries) => {
            // A lock is all that its holder may have made there.
            let holds = entries.any(|entry| entry.is_ok_and(|entry| entry.file_name() != LOCK));
            if holds && !replace {
                return Err(BackupError::InTheWay(place.display().to_string()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = parent(place);
            DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(io_error("make", parent))?;
        }
        Err(error) => return Err(io_error("read", place)(error)),
    }
    beside(place)
}

/// Puts the directory in its place in one step. What was there, if anything, is kept beside it.
fn swap(folder: tempfile::TempDir, place: &Path) -> Result<Option<PathBuf>, BackupError> {
    let failed = io_error("replace", place);
    File::open(folder.path()).and_then(|folder| folder.sync_all()).map_err(&failed)?;
    let new = folder.keep();
    let sync = || File::open(parent(place)).and_then(|parent| parent.sync_all());
    if !place.exists() {
        fs::rename(&new, place).and_then(|()| sync()).map_err(|error| {
            let _ = fs::remove_dir_all(&new);
            failed(error)
        })?;
        return Ok(None);
    }
    if let Err(error) = renameat_with(CWD, &new, CWD, place, RenameFlags::EXCHANGE) {
        let _ = fs::remove_dir_all(&new);
        return Err(failed(error.into()));
    }
    // From here on the restored one is in its place, whatever becomes of the other.
    let _ = sync();
    let only_lock = fs::read_dir(&new)
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK)));
    if only_lock && fs::remove_dir_all(&new).is_ok() {
        return Ok(None);
    }
    let mut former = place.as_os_str().to_owned();
    former.push(format!(".before-restore-{}", crate::clock::system_date()));
    let former = PathBuf::from(former);
    let kept = if fs::rename(&new, &former).is_ok() { former } else { new };
    Ok(Some(kept))
}

#[cfg(test)]
mod tests;
