use super::*;

fn key() -> IdentityKey {
    IdentityKey::from_pem(include_str!("../crypto/keys/rsa2048.pem")).unwrap()
}

/// A server's data, backed up.
fn server(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    drop(crate::store::SqliteStore::open(&data).unwrap());
    key().save(&data.join("server.key")).unwrap();
    fs::write(data.join("channel.key"), [7; 32]).unwrap();
    fs::write(data.join(crate::settings::FILE), "port = 1\n").unwrap();
    let file = folder.join("backup");
    back_up_server(&data, &file).unwrap();
    file
}

#[tokio::test]
async fn what_waits_is_in_the_backup_of_a_server_that_runs() {
    use crate::store::{
        Announce, Conversation, Enrolled, Enrolment, FoundError, Founded, Founding, Invitation, Item, ItemKind,
        NewItem, Put, Refuse, SqliteStore, Store,
    };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let file = folder.path().join("backup");
    let store = SqliteStore::open(&data).unwrap();
    key().save(&data.join("server.key")).unwrap();
    for n in 1..=2 {
        let enrolment = Enrolment {
            id: [n; 16],
            name: crate::name::Name::parse(&format!("client-{n}")).unwrap(),
            modulus: vec![n; 256],
            token_id: None,
            enrolled_by: None,
            record_limit: 1024,
            now: 1,
        };
        assert_eq!(store.enrol(enrolment).await, Ok(Enrolled::New));
    }
    let item = |n, kind| NewItem {
        recipient: [2; 16],
        sender: [1; 16],
        kind,
        chain: [3; 8],
        n,
        wanted: 2,
        bytes: n.to_be_bytes().into(),
        at: 5,
    };
    let all = |store: SqliteStore| async move {
        let items: Vec<Item> = store.queue(&[2; 16], 0, 100, 1 << 20).await.unwrap();
        assert_eq!(store.waiting(&[2; 16]).await.unwrap().items, items.len() as u64);
        items
    };
    let kinds = [ItemKind::Wrap, ItemKind::Envelope, ItemKind::Receipt];
    store.put(kinds.map(|kind| item(7, kind)).to_vec()).await.unwrap();
    let founding = |sid| Founding {
        sid: [sid; 16],
        creator: [2; 16],
        key_epoch: 0,
        creator_only: false,
        signature: [sid; 64],
        invited: vec![Invitation { client: [1; 16], key_epoch: 0, notice: (*b"invited").into() }],
        now: 5,
    };
    for sid in [8, 9] {
        assert_eq!(store.found(founding(sid)).await, Ok(Founded::New));
    }
    store.close(&[9; 16], &[2; 16], &[2; 64], 6, Refuse::silently(), Announce::silently()).await.unwrap();
    // It goes on writing while it is copied, and after.
    let backup = tokio::task::spawn_blocking({
        let (data, file) = (data.clone(), file.clone());
        move || back_up_server(&data, &file)
    });
    for n in 8..40 {
        assert!(matches!(store.put(vec![item(n, ItemKind::Envelope)]).await.unwrap()[..], [Ok(Put::Stored { .. })]));
    }
    backup.await.unwrap().unwrap();
    let epoch = store.meta().store_epoch;
    let before = all(store).await;
    assert_eq!(before.len(), 35);
    let restored = folder.path().join("restored");
    restore_server(&file, &restored, false).unwrap();
    let store = SqliteStore::open(&restored).unwrap();
    assert_ne!(store.meta().store_epoch, epoch, "so that clients send again what the backup does not know");
    assert!(matches!(store.conversation(&[8; 16]).await, Ok(Some(Conversation::Open { .. }))));
    assert_eq!(store.conversation(&[9; 16]).await, Ok(Some(Conversation::Closed { at: 6, by: [2; 16] })));
    assert_eq!(store.found(founding(9)).await, Err(FoundError::Closed), "no id comes back by a backup");
    // What was sent after the backup is new there, what was sent before is a repeat.
    let puts = store.put(vec![item(7, ItemKind::Envelope), item(100, ItemKind::Envelope)]).await.unwrap();
    assert!(matches!(puts[..], [Ok(Put::Repeat { .. }), Ok(Put::Stored { .. })]), "{puts:?}");
    let held = all(store).await;
    let (last, held) = held.split_last().unwrap();
    assert!(held.len() >= 3 && *held == before[..held.len()], "{held:?}");
    assert!(last.seq > held.last().unwrap().seq);
}

#[tokio::test]
async fn accounts_come_back_and_those_are_named_that_had_changed() {
    use crate::name::Name;
    use crate::store::{AccountChange, SqliteStore, Store, Verifier};
    let folder = tempfile::tempdir().unwrap();
    let (data, file) = (folder.path().join("data"), folder.path().join("backup"));
    let store = SqliteStore::open(&data).unwrap();
    key().save(&data.join("server.key")).unwrap();
    let name = |text: &str| Name::parse(text).unwrap();
    for text in ["same", "other", "locked", "removed", "was-locked"] {
        store.add_account(name(text), Verifier(text.into()), 1).await.unwrap();
    }
    store.change_account(&name("was-locked"), AccountChange::Locked(true), 1).await.unwrap();
    drop(store);
    back_up_server(&data, &file).unwrap();
    let store = SqliteStore::open(&data).unwrap();
    for (text, change) in [
        ("other", AccountChange::Password(Verifier("another".into()))),
        ("locked", AccountChange::Locked(true)),
        ("removed", AccountChange::Removed),
        ("was-locked", AccountChange::Locked(false)),
    ] {
        assert_eq!(store.change_account(&name(text), change, 2).await, Ok(true));
    }
    store.add_account(name("later"), Verifier("later".into()), 2).await.unwrap();
    drop(store);
    let restored = restore_server(&file, &data, true).unwrap();
    assert_eq!(restored.accounts, ["locked", "other", "removed"]);
    let store = SqliteStore::open(&data).unwrap();
    let held = store.accounts(None, 10).await.unwrap();
    let held: Vec<_> = held.iter().map(|account| (account.name.as_str(), account.locked)).collect();
    let open = |name| (name, false);
    assert_eq!(held, [open("locked"), open("other"), open("removed"), open("same"), ("was-locked", true)]);
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_backup_holds_what_is_named_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let file = server(folder.path());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let restored = folder.path().join("restored");
    assert_eq!(restore_server(&file, &restored, false).unwrap(), Restored::default());
    assert_eq!(names(&restored), ["ossicle.toml", "server.key", "store.db"]);
    assert_eq!(fs::metadata(&restored).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(names(folder.path()), ["backup", "data", "restored"], "nothing is left behind");
    // Others read it as a tar archive, too.
    let mut archive = tar::Archive::new(File::open(&file).unwrap());
    let found: Vec<_> =
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect();
    assert_eq!(found, ["manifest.json", "server.key", "store.db", "ossicle.toml"]);
}

#[test]
fn nothing_is_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let file = server(folder.path());
    let before = fs::read(&file).unwrap();
    let data = folder.path().join("data");
    assert!(matches!(back_up_server(&data, &file), Err(BackupError::Exists(_))));
    assert_eq!(fs::read(&file).unwrap(), before);
    assert!(matches!(restore_server(&file, &data, false), Err(BackupError::InTheWay(_))));
    assert!(data.join("channel.key").exists());
    let restored = restore_server(&file, &data, true).unwrap();
    let former = restored.former.unwrap();
    assert!(former.join("channel.key").exists() && !data.join("channel.key").exists());
    // An empty directory is nothing to keep.
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    fs::write(empty.join("lock"), "").unwrap();
    assert_eq!(restore_server(&file, &empty, false).unwrap().former, None);
    assert!(empty.join("store.db").exists());
}

#[test]
fn what_was_there_is_kept_beside_it_however_the_place_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = server(folder.path());
    let data = folder.path().join("data");
    let linked = folder.path().join("linked");
    std::os::unix::fs::symlink(&data, &linked).unwrap();
    for place in [folder.path().join("data/"), folder.path().join("data/."), folder.path().join("./data"), linked] {
        fs::write(data.join("channel.key"), [7; 32]).unwrap();
        let former = restore_server(&file, &place, true).unwrap().former.unwrap();
        assert!(former.join("channel.key").exists(), "{}", place.display());
        assert_eq!(former.parent(), fs::canonicalize(&data).unwrap().parent(), "{}", place.display());
        assert_eq!(names(&data), ["ossicle.toml", "server.key", "store.db"], "{}", place.display());
        fs::remove_dir_all(former).unwrap();
    }
    assert_eq!(names(folder.path()), ["backup", "data", "linked"]);
    assert!(restore_server(&file, &folder.path().join("new/"), false).unwrap().former.is_none());
}

#[test]
fn nobody_begins_to_use_a_place_that_is_being_restored() {
    let folder = tempfile::tempdir().unwrap();
    let file = server(folder.path());
    let place = folder.path().join("not/there");
    let lock = || lock_server(&place);
    let busy = || matches!(lock_server(&place), Err(BackupError::Busy(_)));
    let no_server = || crate::store::SqliteStore::open(&place).is_err();
    let failed = restore_behind(&place, lock, || {
        assert!(busy() && no_server());
        restore_server(&folder.path().join("none"), &place, false)
    });
    assert!(matches!(failed, Err(BackupError::Io { .. })));
    assert!(!place.exists());
    let restored = restore_behind(&place, lock, || {
        assert!(busy() && no_server());
        let restored = restore_server(&file, &place, false);
        assert!(!busy(), "the restored one is for whoever comes first");
        restored
    });
    assert_eq!(restored.unwrap(), Restored::default());
    assert_eq!(names(&folder.path().join("not")), ["there"]);
    // What somebody has made meanwhile is his.
    let theirs = folder.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    let failed = restore_behind(
        &theirs,
        || lock_server(&theirs),
        || restore_server(&folder.path().join("none"), &theirs, false),
    );
    assert!(failed.is_err() && theirs.exists());
}

#[test]
fn every_cut_and_every_flipped_byte_is_noticed_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = server(folder.path());
    let whole = fs::read(&file).unwrap();
    let bad = folder.path().join("bad");
    let place = folder.path().join("place");
    let refused = |bytes: &[u8], case: &str| {
        fs::write(&bad, bytes).unwrap();
        let error = restore_server(&bad, &place, false).unwrap_err();
        assert!(matches!(error, BackupError::Damaged(_) | BackupError::Foreign(_)), "{case}: {error}");
        assert!(!place.exists(), "{case}");
        assert_eq!(names(folder.path()), ["backup", "bad", "data"], "{case}");
    };
    let mut cases = 0;
    for len in (0..whole.len()).step_by(509).chain([1, 2, 511, 512, 513, whole.len() - 33, whole.len() - 1]) {
        refused(&whole[..len], &format!("{len} bytes"));
        cases += 1;
    }
    for at in (0..whole.len()).step_by(251).chain([0, 100, 124, 148, 156, 257, whole.len() - 1]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        refused(&bytes, &format!("byte {at}"));
        cases += 1;
    }
    refused(&[&whole[..], &[0]].concat(), "a byte more");
    assert!(cases > 200, "{cases}");
    assert!(matches!(restore_server(&folder.path().join("none"), &place, false), Err(BackupError::Io { .. })));
}

/// A file with a right sum around whatever is in it.
#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    for file in [&pipe, &folder.path().to_owned(), &PathBuf::from("/dev/null")] {
        let error = restore_home(file, &folder.path().join("home"), false).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        let error = restore_server(file, &folder.path().join("data"), false).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
    assert_eq!(names(folder.path()), ["pipe"], "nothing is made");
}

fn forged(path: &Path, manifest: &str, entries: &[(&str, tar::EntryType, &[u8])]) {
    let mut tar = tar::Builder::new(Summing { inner: File::create(path).unwrap(), sum: Sha256::new() });
    append(&mut tar, MANIFEST, manifest.len() as u64, manifest.as_bytes()).unwrap();
    for (name, kind, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        // As somebody would who does not care for what a library allows.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o4777);
        header.set_cksum();
        tar.append(&header, *bytes).unwrap();
    }
    let Summing { mut inner, sum } = tar.into_inner().unwrap();
    inner.write_all(&sum.finalize()).unwrap();
}

#[test]
fn what_somebody_else_wrote_goes_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let (bad, place) = (folder.path().join("bad"), folder.path().join("place"));
    let manifest = |format: u32, kind: &str| {
        format!("{{\"format\":{format},\"kind\":\"{kind}\",\"version\":\"9\",\"made\":0,\"parts\":[]}}")
    };
    let regular = tar::EntryType::Regular;
    let pem = key().to_pem().unwrap();
    let good = ("server.key", regular, pem.as_bytes());
    let rubbish = ("store.db", regular, &b"SQLite format 3\0 and then nothing"[..]);
    let long = vec![0; usize::try_from(MAX_SMALL).unwrap() + 1];
    for (case, entries) in [
        ("a path that climbs", vec![good, ("../escape", regular, b"x")]),
        ("an absolute path", vec![good, ("/tmp/escape", regular, b"x")]),
        ("a name that is not known", vec![good, ("channel.key", regular, b"x")]),
        ("a link", vec![good, ("store.db", tar::EntryType::Symlink, b"")]),
        ("a directory", vec![good, ("store.db", tar::EntryType::Directory, b"")]),
        ("a part twice", vec![good, good]),
        ("a part that is missing", vec![good]),
        ("a key as long as a disk", vec![("server.key", regular, &long[..])]),
        ("a key that is none", vec![("server.key", regular, b"-----BEGIN"), rubbish]),
        ("a store that is none", vec![good, rubbish]),
    ] {
        forged(&bad, &manifest(1, "server"), &entries);
        let error = restore_server(&bad, &place, false).unwrap_err();
        assert!(matches!(error, BackupError::Damaged(_)), "{case}: {error}");
        assert_eq!(names(folder.path()), ["bad"], "{case}");
    }
    // A part under another name, by an entry that says so of the next one.
    let store = fs::read({
        let data = folder.path().join("data");
        drop(crate::store::SqliteStore::open(&data).unwrap());
        data.join("store.db")
    });
    fs::remove_dir_all(folder.path().join("data")).unwrap();
    let store = store.unwrap();
    let renamed = ("x", regular, &store[..]);
    forged(
        &bad,
        &manifest(1, "server"),
        &[good, ("././@LongLink", tar::EntryType::GNULongName, b"store.db\0"), renamed],
    );
    assert!(matches!(restore_server(&bad, &place, false), Err(BackupError::Damaged(_))));
    forged(&bad, &manifest(1, "server"), &[good, ("store.db", regular, &store)]);
    restore_server(&bad, &place, false).unwrap();
    fs::remove_dir_all(&place).unwrap();
    forged(&bad, &manifest(1, "home"), &[good]);
    assert!(matches!(restore_server(&bad, &place, false), Err(BackupError::Kind { kind: Kind::Home, .. })));
    forged(&bad, &manifest(2, "server"), &[good]);
    assert!(matches!(restore_server(&bad, &place, false), Err(BackupError::Newer(_))));
    for nonsense in ["", "{}", "[]", "{\"format\":\"1\"}", &manifest(1, "else")] {
        forged(&bad, nonsense, &[good]);
        assert!(matches!(restore_server(&bad, &place, false), Err(BackupError::Damaged(_))), "{nonsense}");
    }
    assert_eq!(names(folder.path()), ["bad"]);
}
