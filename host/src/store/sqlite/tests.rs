//! The conformance suite over SQLite, and what only SQLite can get wrong: files, locks, full and failing disks.

use core::convert::Infallible;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use super::super::conformance::{Backend, conformance};
use super::super::{Invitation, ItemKind, Post, SharedStore, TokenRefusal};
use super::*;

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn store(&self) -> SqliteStore {
        SqliteStore::open(&self.path()).unwrap()
    }
}

impl Backend for Directory {
    async fn open_with(&self, limits: QueueLimits) -> SharedStore {
        Arc::new(SqliteStore::open_with(&self.path(), limits).unwrap())
    }
}

conformance!(Directory::new());

const NOW: u64 = 1_800_000_000;

fn enrolment(n: u8) -> Enrolment {
    Enrolment {
        id: [n; 16],
        name: Name::parse(&format!("client-{n}")).unwrap(),
        modulus: vec![n; 256],
        token_id: None,
        enrolled_by: None,
        record_limit: 1024,
        now: NOW,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Keeps the writer busy until the sender is used or dropped, so that what is queued meanwhile becomes one batch.
async fn hold(store: &Arc<SqliteStore>) -> (tokio::task::JoinHandle<()>, std::sync::mpsc::Sender<()>) {
    let (begun, has_begun) = oneshot::channel();
    let (release, released) = channel::<()>();
    let held = tokio::spawn({
        let store = Arc::clone(store);
        async move {
            let work = move |_: &Connection| {
                begun.send(()).unwrap();
                let _ = released.recv();
                // Its own transaction takes in nothing more.
                thread::sleep(BATCH_TIME);
                Ok::<_, Fault<Infallible>>(())
            };
            let _ = store.write(work).await;
        }
    });
    has_begun.await.unwrap();
    (held, release)
}

// Files

#[tokio::test]
async fn nobody_else_can_read_the_files() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    assert_eq!(mode(&directory.path()), 0o700);
    let mut names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 4, "database, its WAL and index, and the lock: {names:?}");
    for path in names {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_file_that_others_can_read_is_closed_to_them() {
    let directory = Directory::new();
    drop(directory.store());
    let path = directory.path().join("store.db");
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    drop(directory.store());
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_directory_that_is_there_is_used_as_it_is() {
    let directory = Directory::new();
    fs::create_dir(directory.path()).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    drop(directory.store());
    assert_eq!(mode(&directory.path()), 0o755);
}

#[test]
fn one_directory_has_one_server() {
    let directory = Directory::new();
    let first = directory.store();
    let refused = SqliteStore::open(&directory.path()).unwrap_err();
    assert_eq!(refused, StoreError::Busy(directory.path().display().to_string()));
    let sentence = format!(
        "{} is in use by another process: stop it, or choose another data directory with --data",
        directory.path().display()
    );
    assert_eq!(refused.to_string(), sentence);
    drop(first);
    directory.store();
}

#[test]
fn a_newer_store_is_left_alone() {
    let directory = Directory::new();
    drop(directory.store());
    let path = directory.path().join("store.db");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    let before = fs::read(&path).unwrap();
    let refused = SqliteStore::open(&directory.path()).unwrap_err();
    assert_eq!(refused, StoreError::Newer(directory.path().display().to_string()));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn another_programs_database_is_left_alone() {
    let directory = Directory::new();
    fs::create_dir(directory.path()).unwrap();
    let path = directory.path().join("store.db");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1)").unwrap();
    let before = fs::read(&path).unwrap();
    assert!(matches!(SqliteStore::open(&directory.path()), Err(StoreError::Corrupt(_))));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_is_no_database_is_refused() {
    let directory = Directory::new();
    fs::create_dir(directory.path()).unwrap();
    fs::write(directory.path().join("store.db"), [b'x'; 8192]).unwrap();
    let refused = SqliteStore::open(&directory.path()).unwrap_err();
    assert!(matches!(refused, StoreError::Corrupt(_)));
    assert!(refused.to_string().contains("restore a backup"), "{refused}");
}

#[test]
fn a_path_that_cannot_be_is_one_sentence() {
    let directory = Directory::new();
    fs::write(directory.path(), "a file").unwrap();
    let refused = SqliteStore::open(&directory.path()).unwrap_err();
    assert!(matches!(refused, StoreError::Io(_)));
    assert!(refused.to_string().contains(&format!("cannot make {}", directory.path().display())), "{refused}");
}

#[tokio::test]
async fn damage_is_an_error_and_not_a_wrong_answer() {
    let directory = Directory::new();
    let store = directory.store();
    // The look at every page would find it, too, and end the store.
    while !store.is_checked() {
        sleep(Duration::from_millis(1)).await;
    }
    store.enrol(enrolment(1)).await.unwrap();
    store
        .update(|db| {
            db.pragma_update(None, "ignore_check_constraints", true)?;
            db.execute("INSERT INTO token VALUES (zeroblob(8), zeroblob(5), NULL, NULL, 1, 1, 0, NULL)", [])?;
            db.execute("INSERT INTO token VALUES (x'0101010101010101', zeroblob(32), '[', NULL, 1, 1, 0, NULL)", [])?;
            db.execute("UPDATE client SET enrolled_at = -1", [])
        })
        .await
        .unwrap();
    assert!(matches!(store.token(&[0; 8]).await, Err(StoreError::Corrupt(_))));
    assert!(matches!(store.token(&[1; 8]).await, Err(StoreError::Corrupt(_))));
    assert!(matches!(store.client(&[1; 16]).await, Err(StoreError::Corrupt(_))));
    let refused = store.enrol(Enrolment { token_id: Some([1; 8]), ..enrolment(2) }).await;
    assert!(matches!(refused, Err(EnrolError::Store(StoreError::Corrupt(_)))));
    assert_eq!(store.enrol(enrolment(3)).await, Ok(Enrolled::New), "the rest is usable");
}

// Batches

#[tokio::test]
async fn jobs_of_one_batch_see_each_other_and_fail_alone() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    let (held, release) = hold(&store).await;
    let same_name = Enrolment { name: enrolment(1).name, ..enrolment(2) };
    let (first, second, third, fourth) = tokio::join!(
        biased;
        store.enrol(enrolment(1)),
        store.enrol(same_name),
        store.write(|db| {
            db.execute("UPDATE client SET name = 'changed'", [])?;
            db.execute("INSERT INTO meta VALUES (2, zeroblob(16), zeroblob(8), NULL)", [])?;
            Ok::<_, Fault<Infallible>>(())
        }),
        async {
            let fourth = store.enrol(enrolment(4));
            drop(release);
            fourth.await
        },
    );
    held.await.unwrap();
    assert_eq!((first, second, fourth), (Ok(Enrolled::New), Err(EnrolError::NameInUse), Ok(Enrolled::New)));
    assert!(matches!(third, Err(StoreError::Io(_))), "an operation that breaks a rule of the tables fails");
    assert_eq!(store.client(&[1; 16]).await.unwrap().unwrap().name, "client-1", "and leaves nothing behind");
}

#[tokio::test]
async fn who_left_before_his_turn_changes_nothing() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    let (held, release) = hold(&store).await;
    {
        let mut left = store.enrol(enrolment(1));
        tokio::select! {
            biased;
            _ = &mut left => panic!("the writer is busy"),
            () = core::future::ready(()) => {}
        }
    }
    drop(release);
    held.await.unwrap();
    assert_eq!(store.enrol(enrolment(2)).await, Ok(Enrolled::New));
    assert_eq!(store.client(&[1; 16]).await, Ok(None));
}

#[tokio::test]
async fn reads_do_not_wait_for_writes() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    store.enrol(enrolment(1)).await.unwrap();
    let (held, release) = hold(&store).await;
    assert!(store.client(&[1; 16]).await.unwrap().is_some());
    store.touch(&[1; 16], NOW).await.unwrap();
    assert_eq!(store.client(&[1; 16]).await.unwrap().unwrap().last_seen, Some(NOW));
    drop(release);
    held.await.unwrap();
}

#[tokio::test]
async fn what_was_seen_becomes_durable_without_any_other_write() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    store.touch(&[1; 16], NOW).await.unwrap();
    let begun = Instant::now();
    while !store.shared.seen().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is not written");
        sleep(Duration::from_millis(20)).await;
    }
    let durable =
        store.read(|db| db.query_row("SELECT last_seen FROM client", [], |row| row.get::<_, Option<i64>>(0))).await;
    assert_eq!(durable, Ok(Some(1_800_000_000)));
}

// Disks

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    let token = Token {
        id: [7; 8],
        verifier: [7; 32],
        name_pattern: None,
        preset_id: None,
        expires: NOW + 60,
        uses: Some(1),
        printed: false,
    };
    store.add_token(token).await.unwrap();
    let limit = async |pages: i64| {
        let set = move |db: &Connection| db.pragma_update(None, "max_page_count", pages);
        store.update(set).await.unwrap();
    };
    // SQLite takes the present size for any smaller limit.
    limit(1).await;
    let full = StoreError::Full(directory.path().display().to_string());
    let mut refused = 0;
    for n in 2..20 {
        let big = vec![n; 100_000];
        match store.publish_bundle(&[1; 16], u32::from(n), &big, b"").await {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, PublishError::Store(full.clone()));
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    assert!(full.to_string().contains("free some space"), "{full}");
    assert!(store.client(&[1; 16]).await.unwrap().is_some(), "reading goes on");
    // An enrolment that does not fit does not use its token.
    let long = Enrolment { modulus: vec![9; 100_000], token_id: Some([7; 8]), ..enrolment(2) };
    assert_eq!(store.enrol(long.clone()).await, Err(EnrolError::Store(full)));
    assert_eq!(store.token(&[7; 8]).await.unwrap().unwrap().uses, Some(1));
    limit(1 << 30).await;
    assert_eq!(store.enrol(long).await, Ok(Enrolled::New));
    let used = store.enrol(Enrolment { token_id: Some([7; 8]), ..enrolment(3) }).await;
    assert_eq!(used, Err(EnrolError::Token(TokenRefusal::UsedUp)));
    drop(store);
    assert!(directory.store().client(&[2; 16]).await.unwrap().is_some());
}

#[tokio::test]
async fn a_full_disk_waits_for_nobody_who_looks_at_all_of_the_store() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    while !store.is_checked() {
        sleep(Duration::from_millis(1)).await;
    }
    let db = connect(&directory.path().join("store.db")).unwrap();
    *store.shared.checking() = Some(db.get_interrupt_handle());
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM meta, n";
    let looking = thread::spawn(move || db.query_row(endless, [], |_| Ok(())));
    store.update(|db| db.pragma_update(None, "max_page_count", 1)).await.unwrap();
    let mut refused = 0;
    while !looking.is_finished() {
        refused += u32::from(store.publish_bundle(&[1; 16], refused + 2, &[7; 100_000], b"").await.is_err());
        assert!(refused < 100_000, "nobody ends it");
    }
    let ended = looking.join().unwrap().unwrap_err();
    assert_eq!(ended.sqlite_error_code(), Some(ErrorCode::OperationInterrupted), "{ended}");
    assert!(refused > 0);
}

#[tokio::test]
async fn a_full_disk_refuses_the_whole_batch() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    store.update(|db| db.pragma_update(None, "max_page_count", 1)).await.unwrap();
    let (held, release) = hold(&store).await;
    let long = Enrolment { modulus: vec![9; 100_000], ..enrolment(2) };
    let (small, large) = tokio::join!(
        biased;
        store.enrol(enrolment(1)),
        async {
            let large = store.enrol(long);
            let mut large = Box::pin(large);
            tokio::select! {
                biased;
                _ = &mut large => panic!("the writer is busy"),
                () = core::future::ready(()) => {}
            }
            drop(release);
            large.await
        },
    );
    held.await.unwrap();
    let full = Err(EnrolError::Store(StoreError::Full(directory.path().display().to_string())));
    assert_eq!((small, large), (full.clone(), full));
    assert_eq!(store.client(&[1; 16]).await, Ok(None), "what was refused is not there");
    assert_eq!(store.enrol(enrolment(1)).await, Ok(Enrolled::New));
}

#[tokio::test]
async fn after_a_failed_flush_nothing_is_acknowledged() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    store.enrol(enrolment(1)).await.unwrap();
    let (held, release) = hold(&store).await;
    let fail = |_: &Connection| {
        let error = ffi::Error::new(ffi::SQLITE_IOERR_FSYNC);
        Err::<(), _>(Fault::<Infallible>::Sqlite(rusqlite::Error::SqliteFailure(error, None)))
    };
    let (before, failed, after) = tokio::join!(
        biased;
        store.enrol(enrolment(2)),
        store.write(fail),
        async {
            let after = store.enrol(enrolment(3));
            drop(release);
            after.await
        },
    );
    held.await.unwrap();
    assert!(matches!(before, Err(EnrolError::Store(StoreError::Io(_)))), "its batch failed: {before:?}");
    assert!(matches!(failed, Err(StoreError::Io(_))));
    assert!(matches!(after, Err(EnrolError::Store(StoreError::Io(_)))));
    assert!(matches!(store.client(&[1; 16]).await, Err(StoreError::Io(_))));
    assert!(matches!(store.touch(&[1; 16], NOW).await, Err(StoreError::Io(_))));
    drop(store);
    let store = directory.store();
    assert!(store.client(&[1; 16]).await.unwrap().is_some(), "what was acknowledged is there");
    assert_eq!(store.client(&[2; 16]).await, Ok(None));
    assert_eq!(store.enrol(enrolment(2)).await, Ok(Enrolled::New));
}

/// Enrols clients until it is killed, and says so after each.
async fn enrol_until_killed(directory: &Path) {
    let store = SqliteStore::open(directory).unwrap();
    for n in 0_u8..=u8::MAX {
        store.enrol(enrolment(n)).await.unwrap();
        println!("\nacknowledged {n}");
    }
    // Whoever was to kill this has died; then this must not stay.
    let _ = io::Read::read(&mut io::stdin(), &mut [0]);
}

#[tokio::test]
async fn a_killed_server_loses_nothing_that_it_acknowledged() {
    const DIRECTORY: &str = "OSSICLE_TEST_KILLED";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return enrol_until_killed(Path::new(&directory)).await;
    }
    let directory = Directory::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "store::sqlite::tests::a_killed_server_loses_nothing_that_it_acknowledged"])
        .env(DIRECTORY, directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = Vec::new();
    let lines = io::BufRead::lines(io::BufReader::new(child.stdout.take().unwrap()));
    for line in lines.map_while(Result::ok) {
        if let Some(n) = line.strip_prefix("acknowledged ") {
            acknowledged.push(n.parse::<u8>().unwrap());
            if acknowledged.len() == 40 {
                child.kill().unwrap();
            }
        }
    }
    child.wait().unwrap();
    assert!(acknowledged.len() >= 40);
    let store = directory.store();
    for n in acknowledged {
        assert!(store.client(&[n; 16]).await.unwrap().is_some(), "{n}");
    }
    assert_eq!(store.enrol(enrolment(0)).await, Ok(Enrolled::Repeat));
}

/// Runs the test `name` of this binary again, with a tmpfs of 2 MiB that exists for it alone.
fn on_small_disk(name: &str) {
    let mount_point = tempfile::tempdir().unwrap();
    let script =
        "mount -t tmpfs -o size=2m tmpfs \"$1\" && cd \"$1\" && exec \"$2\" --exact --ignored --nocapture \"$3\"";
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(mount_point.path())
        .arg(std::env::current_exe().unwrap())
        .arg(name)
        .env("OSSICLE_TEST_SMALL_DISK", mount_point.path())
        .status()
        .expect("unshare (util-linux) is needed");
    assert!(status.success(), "the test on the small disk failed");
}

#[tokio::test]
#[ignore = "needs a mount namespace"]
async fn a_really_full_disk_loses_nothing() {
    let Some(disk) = std::env::var_os("OSSICLE_TEST_SMALL_DISK").map(PathBuf::from) else {
        return on_small_disk("store::sqlite::tests::a_really_full_disk_loses_nothing");
    };
    let directory = disk.join("data");
    let full = StoreError::Full(directory.display().to_string());
    let ballast = disk.join("ballast");
    fs::write(&ballast, vec![0; 512 * 1024]).unwrap();
    let store = SqliteStore::open(&directory).unwrap();
    store.enrol(enrolment(1)).await.unwrap();
    store.enrol(enrolment(2)).await.unwrap();

    // Until nothing fits, in steps that get smaller.
    let mut published = 0;
    for size in [200_000, 20_000, 2_000, 10] {
        while store.publish_bundle(&[1; 16], published + 1, &vec![7; size], b"").await.is_ok() {
            published += 1;
            assert!(published < 10_000, "a disk of 2 MiB takes for ever");
        }
    }
    for _ in 0..3 {
        let refused = store.publish_bundle(&[2; 16], 1, &vec![8; 8_000], b"").await;
        assert_eq!(refused, Err(PublishError::Store(full.clone())));
    }
    store.touch(&[2; 16], NOW).await.unwrap();
    assert_eq!(store.bundle(&[1; 16]).await.unwrap().unwrap().epoch, published, "reading goes on");
    assert_eq!(store.bundle(&[2; 16]).await, Ok(None), "nothing refused is there");

    // A server that stops and starts on the full disk has everything, too.
    drop(store);
    let store = SqliteStore::open(&directory);
    let store = match store {
        Ok(store) => {
            assert_eq!(store.bundle(&[1; 16]).await.unwrap().unwrap().epoch, published);
            while store.publish_bundle(&[1; 16], published + 1, &vec![7; 8_000], b"").await.is_ok() {
                published += 1;
            }
            fs::remove_file(&ballast).unwrap();
            store
        }
        Err(error) => {
            assert_eq!(error, full);
            fs::remove_file(&ballast).unwrap();
            SqliteStore::open(&directory).unwrap()
        }
    };
    assert_eq!(store.bundle(&[1; 16]).await.unwrap().unwrap().epoch, published, "nothing acknowledged is lost");
    for _ in 0..10 {
        published += 1;
        store.publish_bundle(&[1; 16], published, &[7; 8_000], b"").await.unwrap();
    }
    store.publish_bundle(&[2; 16], 1, &[8; 8_000], b"").await.unwrap();
    drop(store);
    let store = SqliteStore::open(&directory).unwrap();
    assert_eq!(store.bundle(&[1; 16]).await.unwrap().unwrap().epoch, published);
    assert!(store.bundle(&[2; 16]).await.unwrap().is_some());
}

fn announce() -> Announce {
    Announce::new(|notice| Some(format!("{notice:?}").into_bytes().into()))
}

fn founding(sid: u8, creator: u8, invited: impl IntoIterator<Item = u8>) -> Founding {
    let invitation = |n| Invitation { client: [n; 16], key_epoch: 0, notice: (*b"invited").into() };
    Founding {
        sid: [sid; 16],
        creator: [creator; 16],
        key_epoch: 0,
        creator_only: false,
        signature: [creator; 64],
        invited: invited.into_iter().map(invitation).collect(),
        now: NOW,
    }
}

/// The file of a store that is closed, as version 4 would have written it.
fn fourth(directory: &Directory) -> Connection {
    let db = Connection::open(directory.path().join("store.db")).unwrap();
    let list = |sql: &str| -> Vec<String> {
        db.prepare(sql).unwrap().query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    };
    for trigger in list("SELECT name FROM sqlite_schema WHERE type = 'trigger'") {
        db.execute_batch(&format!("DROP TRIGGER {trigger}")).unwrap();
    }
    for table in list("SELECT name FROM sqlite_schema WHERE type = 'table'") {
        for column in list(&format!("SELECT name FROM pragma_table_info('{table}') WHERE name LIKE '%sum'")) {
            db.execute_batch(&format!("ALTER TABLE {table} DROP COLUMN {column}")).unwrap();
        }
    }
    db.execute_batch(
        "DROP INDEX chain_conversation; DROP TABLE invitation; DROP TABLE member; DROP TABLE conversation; DROP TABLE tombstone;
        DROP TABLE account; DROP TABLE post; DROP TABLE author; DROP TABLE public; PRAGMA user_version = 4",
    )
    .unwrap();
    db
}

#[tokio::test]
async fn a_store_of_the_sixth_version_is_brought_up_to_date() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    drop(store);
    let db = Connection::open(directory.path().join("store.db")).unwrap();
    db.execute_batch(
        "DROP TABLE account; DROP TABLE post; DROP TABLE author; DROP TABLE public; DROP TABLE invitation;
        PRAGMA user_version = 6",
    )
    .unwrap();
    drop(db);
    let name = Name::parse("client-1").unwrap();
    let store = directory.store();
    assert_eq!(store.account(&name).await, Ok(None));
    store.add_account(name.clone(), Verifier("first".into()), NOW).await.unwrap();
    drop(store);
    let db = Connection::open(directory.path().join("store.db")).unwrap();
    sums::register(&db).unwrap();
    sums::check_all(&db).unwrap();
    drop(db);
    // What a disk forgets of it is noticed.
    let db = sixth_without_triggers(&directory);
    db.execute_batch("UPDATE account SET verifier = 'other'").unwrap();
    drop(db);
    assert!(matches!(SqliteStore::open(&directory.path()), Err(StoreError::Corrupt(_))));
}

fn post(number: u64) -> NewPost {
    let post = Post { number, at: 5, epoch: 1, kind: 0, signature: [7; 64], body: vec![number as u8; 20] };
    NewPost { author: [1; 16], key_epoch: 0, post, now: NOW }
}

#[tokio::test]
async fn a_store_of_the_seventh_version_gets_its_public_conversation() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    drop(store);
    let db = connect(&directory.path().join("store.db")).unwrap();
    db.execute_batch(
        "DROP TABLE post; DROP TABLE author; DROP TABLE public; DROP TABLE invitation; PRAGMA user_version = 7",
    )
    .unwrap();
    drop(db);
    let store = directory.store();
    assert_eq!(store.posts(0, 10).await, Ok(Posts::default()));
    assert_eq!(store.say(post(3)).await, Ok(Said::New { seq: 1 }));
    assert_eq!(store.say(post(4)).await, Ok(Said::New { seq: 2 }));
    let kept = store.posts(0, 10).await;
    drop(store);
    let store = directory.store();
    assert_eq!(store.posts(0, 10).await, kept);
    drop(store);
    let db = connect(&directory.path().join("store.db")).unwrap();
    sums::check_all(&db).unwrap();
    // What a disk forgets of it is noticed.
    for (table, change) in [
        ("post", "UPDATE post SET body = x'00' WHERE seq = 2"),
        ("author", "UPDATE author SET number = 1"),
        ("public", "UPDATE public SET newest = 1"),
    ] {
        let begun = db.unchecked_transaction().unwrap();
        begun.execute_batch(&format!("DROP TRIGGER {table}_change; {change}")).unwrap();
        assert!(sums::check(&begun).is_err(), "{table}");
        begun.rollback().unwrap();
    }
}

#[tokio::test]
async fn a_store_of_the_eighth_version_keeps_invitations_from_then_on() {
    let directory = Directory::new();
    let store = directory.store();
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    store.found(founding(1, 1, [2])).await.unwrap();
    store.acknowledge(&[2; 16], u64::MAX).await.unwrap();
    drop(store);
    let db = connect(&directory.path().join("store.db")).unwrap();
    db.execute_batch("DROP TABLE invitation; PRAGMA user_version = 8").unwrap();
    drop(db);
    let store = directory.store();
    assert_eq!(store.invite_again(&[2; 16], NOW).await, Ok(false), "nobody has kept it");
    store.found(founding(2, 1, [2])).await.unwrap();
    store.acknowledge(&[2; 16], u64::MAX).await.unwrap();
    assert_eq!(store.invite_again(&[2; 16], NOW).await, Ok(true));
    drop(store);
    sums::check_all(&connect(&directory.path().join("store.db")).unwrap()).unwrap();
}

/// The file of a store that is closed, in which changes leave sums as they are.
fn sixth_without_triggers(directory: &Directory) -> Connection {
    let db = Connection::open(directory.path().join("store.db")).unwrap();
    db.execute_batch("DROP TRIGGER account_change").unwrap();
    db
}

#[tokio::test]
async fn a_store_of_the_first_version_is_brought_up_to_date() {
    let directory = Directory::new();
    drop(directory.store());
    let db = fourth(&directory);
    db.execute_batch(
        "DROP TABLE rotation; DROP TABLE parcel; DROP TABLE gone; DROP TABLE sequence; PRAGMA user_version = 1;",
    )
    .unwrap();
    drop(db);
    let store = directory.store();
    assert_eq!(store.successor(&[1; 16], 0).await, Ok(None));
    assert_eq!(store.queue(&[1; 16], 0, 1, 1).await, Ok(vec![]));
}

#[tokio::test]
async fn a_store_of_the_second_version_is_brought_up_to_date() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(1)).await.unwrap();
    drop(store);
    let db = fourth(&directory);
    db.execute_batch("DROP TABLE parcel; DROP TABLE gone; DROP TABLE sequence; PRAGMA user_version = 2;").unwrap();
    drop(db);
    let store = directory.store();
    assert_eq!(store.client(&[1; 16]).await.unwrap().unwrap().name, "client-1");
    assert_eq!(store.queue(&[1; 16], 0, 1, 1).await, Ok(vec![]));
}

fn envelope(recipient: u8, n: u32, len: usize) -> NewItem {
    NewItem {
        recipient: [recipient; 16],
        sender: [1; 16],
        kind: ItemKind::Envelope,
        chain: [recipient; 8],
        n,
        wanted: 3,
        bytes: vec![n as u8; len].into(),
        at: NOW,
    }
}

#[tokio::test]
async fn what_waits_in_a_store_of_the_third_version_waits_on() {
    let directory = Directory::new();
    let store = directory.store();
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    drop(store);
    let db = fourth(&directory);
    db.execute_batch(
        "DROP TABLE parcel; DROP TABLE gone; PRAGMA user_version = 3; UPDATE sequence SET reserved = 4000;
        CREATE TABLE queue (
            recipient BLOB NOT NULL CHECK (length(recipient) = 16),
            seq INTEGER NOT NULL,
            sender BLOB NOT NULL CHECK (length(sender) = 16),
            kind INTEGER NOT NULL CHECK (kind BETWEEN 0 AND 2),
            chain BLOB NOT NULL CHECK (length(chain) = 8),
            n INTEGER NOT NULL,
            wanted INTEGER NOT NULL,
            at INTEGER NOT NULL,
            bytes BLOB NOT NULL,
            PRIMARY KEY (recipient, seq)
        ) STRICT, WITHOUT ROWID;
        CREATE UNIQUE INDEX queue_name ON queue (recipient, chain, n, kind) WHERE kind <> 2;
        CREATE INDEX queue_receipt ON queue (recipient, seq) WHERE kind = 2;",
    )
    .unwrap();
    let mut kept: HashMap<u8, Vec<Item>> = HashMap::new();
    for seq in 1..400_u64 {
        // Neighbours, gaps, all kinds, and more than one parcel holds.
        let recipient = if seq % 40 < 30 { 2 } else { 3 };
        let NewItem { sender, chain, wanted, bytes, at, .. } = envelope(recipient, 0, 700);
        let (kind, n) = ([ItemKind::Envelope, ItemKind::Wrap, ItemKind::Receipt][seq as usize % 3], seq as u32);
        if seq % 97 == 0 {
            continue;
        }
        db.execute(
            "INSERT INTO queue VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![[recipient; 16], to_time(seq), sender, to_time(seq % 3), chain, n, wanted, to_time(at), &*bytes],
        )
        .unwrap();
        kept.entry(recipient).or_default().push(Item { seq, sender, kind, chain, n, wanted, bytes, at });
    }
    drop(db);
    for _ in 0..2 {
        let store = directory.store();
        for (recipient, items) in &kept {
            assert_eq!(store.queue(&[*recipient; 16], 0, usize::MAX, usize::MAX).await.as_ref(), Ok(items));
        }
        let again = NewItem { kind: ItemKind::Wrap, n: 1, ..envelope(2, 0, 700) };
        assert_eq!(store.put(vec![again]).await, Ok(vec![Ok(Put::Repeat { seq: 1 })]));
    }
    let store = directory.store();
    let Ok([Ok(Put::Stored { seq })]) =
        store.put(vec![envelope(2, 5000, 1)]).await.as_deref().map(|puts| <[_; 1]>::try_from(puts.to_vec()).unwrap())
    else {
        panic!("it is not stored");
    };
    assert!(seq >= 4000, "{seq} was given before");
}

#[tokio::test]
async fn a_store_of_the_fourth_version_gets_its_sums() {
    let directory = Directory::new();
    let store = directory.store();
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    store.put((0..5).map(|n| envelope(2, n, 100)).collect()).await.unwrap();
    let items = store.queue(&[2; 16], 0, 10, 10_000).await.unwrap();
    store.remove(&[2; 16], &[items[1].seq, items[3].seq]).await.unwrap();
    let left = store.queue(&[2; 16], 0, 10, 10_000).await.unwrap();
    assert_eq!(left.len(), 3);
    // More parcels than get their sums at once.
    for n in 5..10 {
        store.put(vec![envelope(2, n, 100)]).await.unwrap();
    }
    let left = store.queue(&[2; 16], 0, 10, 10_000).await.unwrap();
    assert_eq!(left.len(), 8);
    drop(store);
    drop(fourth(&directory));
    let store = directory.store();
    assert_eq!(store.queue(&[2; 16], 0, 10, 10_000).await, Ok(left));
    assert_eq!(store.client(&[1; 16]).await.unwrap().unwrap().name, "client-1");
    drop(store);
    sums::check_all(&connect(&directory.path().join("store.db")).unwrap()).unwrap();
}

#[tokio::test]
async fn a_store_of_the_fifth_version_gets_its_conversations() {
    let directory = Directory::new();
    let store = directory.store();
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    store.register_chain(&[6; 8], &[1; 16], &[7; 16], &[2; 16]).await.unwrap();
    drop(store);
    let db = connect(&directory.path().join("store.db")).unwrap();
    db.execute_batch(
        "DROP INDEX chain_conversation; DROP TABLE invitation; DROP TABLE member; DROP TABLE conversation; DROP TABLE tombstone;
        DROP TABLE account; DROP TABLE post; DROP TABLE author; DROP TABLE public; PRAGMA user_version = 5",
    )
    .unwrap();
    drop(db);
    let store = directory.store();
    assert_eq!(store.conversation(&[7; 16]).await, Ok(None));
    assert_eq!(store.found(founding(7, 1, [2])).await, Err(FoundError::InUse));
    assert_eq!(store.found(founding(8, 1, [2, 3])).await, Ok(Founded::New));
    drop(store);
    let store = directory.store();
    assert!(store.conversation(&[8; 16]).await.unwrap().is_some());
    drop(store);
    sums::check_all(&connect(&directory.path().join("store.db")).unwrap()).unwrap();
}

/// What every statement that writes leaves behind has its sum.
#[tokio::test]
async fn a_row_that_is_not_what_was_written_is_found_at_the_start() {
    let directory = Directory::new();
    let store = directory.store();
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    let bundle = |epoch| BundleRecord { epoch, bundle: vec![epoch as u8; 90], signature: vec![7; 256] };
    store.publish_bundle(&[1; 16], 1, &[1; 90], &[2; 256]).await.unwrap();
    store.publish_bundle(&[1; 16], 2, &[3; 90], &[4; 256]).await.unwrap();
    let key = NewKey { id: [1; 16], key_epoch: 1, modulus: vec![9; 256], signature: vec![8; 256], bundle: bundle(3) };
    store.rotate(key).await.unwrap();
    let token = Token {
        id: [4; 8],
        verifier: [5; 32],
        name_pattern: None,
        preset_id: None,
        expires: NOW + 1000,
        uses: Some(2),
        printed: false,
    };
    store.add_token(token).await.unwrap();
    store.enrol(Enrolment { token_id: Some([4; 8]), ..enrolment(4) }).await.unwrap();
    store.register_chain(&[6; 8], &[1; 16], &[7; 16], &[2; 16]).await.unwrap();
    let channel = ChannelRecord { id: [8; 16], sealed: vec![9; 80], expires: NOW + 1000 };
    store.put_channel(&[1; 16], channel, None).await.unwrap();
    store.set_record_limit(&[1; 16], 2048).await.unwrap();
    for sid in [1, 2] {
        // The key of client 1 was replaced once.
        let founding = Founding { key_epoch: 1, ..founding(sid, 1, [2, 3, 4]) };
        store.found(founding).await.unwrap();
    }
    let answer =
        MemberAnswer { sid: [1; 16], member: [2; 16], accepts: true, signature: [2; 64], oldest: NOW, now: NOW };
    store.answer(answer, announce()).await.unwrap();
    store.close(&[2; 16], &[1; 16], &[1; 64], NOW, Refuse::silently(), announce()).await.unwrap();
    store.revoke(&[3; 16], NOW, Refuse::silently(), announce()).await.unwrap();
    store.expire_invitations(NOW + 1, 9, NOW, announce()).await.unwrap();
    store.acknowledge(&[1; 16], u64::MAX).await.unwrap();
    store.acknowledge(&[2; 16], u64::MAX).await.unwrap();
    store.acknowledge(&[4; 16], u64::MAX).await.unwrap();
    store.put((0..5).map(|n| envelope(2, n, 100)).collect()).await.unwrap();
    let items = store.queue(&[2; 16], 0, 10, 10_000).await.unwrap();
    store.remove(&[2; 16], &[items[1].seq]).await.unwrap();
    drop(store);
    drop(directory.store());
    let db = connect(&directory.path().join("store.db")).unwrap();
    sums::check_all(&db).unwrap();
    let tables = [
        "meta",
        "sequence",
        "client",
        "bundle",
        "rotation",
        "token",
        "chain",
        "conversation",
        "member",
        "tombstone",
        "invitation",
    ];
    for trigger in tables {
        db.execute_batch(&format!("DROP TRIGGER {trigger}_change")).unwrap();
    }
    for damage in [
        "meta SET server_id = randomblob(16)",
        "sequence SET reserved = reserved - 1",
        "client SET name = 'client-9' WHERE id = x'01010101010101010101010101010101'",
        "client SET revoked_at = NULL WHERE revoked_at IS NOT NULL",
        "client SET record_limit = 1025 WHERE name = 'client-2'",
        "bundle SET epoch = epoch + 1",
        "rotation SET signature = zeroblob(256)",
        "token SET uses = uses + 1",
        "chain SET recipient = sender",
        "conversation SET creator_only = 1",
        "member SET state = 1 WHERE client = x'04040404040404040404040404040404'",
        "member SET signature = zeroblob(64) WHERE client = x'02020202020202020202020202020202'",
        "tombstone SET closed_by = x'02020202020202020202020202020202'",
        "invitation SET notice = x'00'",
        "channel SET client = x'02020202020202020202020202020202'",
        "gone SET until = until + 1",
        "parcel SET recipient = x'01010101010101010101010101010101'",
        "parcel SET first = first + 1",
        "parcel SET heads = CAST(substr(heads, 1, 23) || x'ff' || substr(heads, 25) AS BLOB)",
    ] {
        let before = fs::read(directory.path().join("store.db")).unwrap();
        assert_eq!(db.execute(&format!("UPDATE {damage}"), []).unwrap(), 1, "{damage}");
        let refused = SqliteStore::open(&directory.path());
        let refused = refused.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(refused.contains("is not what was written") || refused.contains("are not what"), "{damage}: {refused}");
        sums::check_all(&db).expect_err(damage);
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        fs::write(directory.path().join("store.db"), before).unwrap();
    }
}

#[tokio::test]
async fn a_page_that_no_row_misses_is_found_beside_the_running_store() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(2)).await.unwrap();
    for n in 0..40 {
        store.put(vec![envelope(2, n, 1000)]).await.unwrap();
    }
    drop(store);
    let path = directory.path().join("store.db");
    let db = connect(&path).unwrap();
    let page: u32 =
        db.query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'parcel'", [], |row| row.get(0)).unwrap();
    drop(db);
    // The root of the tree forgets its last cell, and with it a page of messages.
    let mut bytes = fs::read(&path).unwrap();
    let root = (page as usize - 1) * 4096;
    assert_eq!(bytes[root], 5, "an inner page of a table");
    bytes[root + 4] -= 1;
    fs::write(&path, bytes).unwrap();
    let store = match SqliteStore::open(&directory.path()) {
        Ok(store) => store,
        Err(error) => panic!("it is to be found later: {error}"),
    };
    while !store.is_checked() {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(matches!(store.put(vec![envelope(2, 41, 10)]).await, Err(StoreError::Corrupt(_))));
    let refusing = store.health().refusing.unwrap();
    assert!(refusing.contains("restore a backup"), "{refusing}");
}

#[tokio::test]
async fn what_a_transaction_that_failed_did_to_queues_is_taken_back() {
    let directory = Directory::new();
    let store = Arc::new(directory.store());
    for n in 1..=3 {
        store.enrol(enrolment(n)).await.unwrap();
    }
    let all = async |recipient: u8| -> Vec<(u64, u32)> {
        let items = store.queue(&[recipient; 16], 0, usize::MAX, usize::MAX).await.unwrap();
        items.iter().map(|item| (item.seq, item.n)).collect()
    };
    store.put((0..10).map(|n| envelope(2, n, 100)).collect()).await.unwrap();
    store.put((0..10).map(|n| envelope(3, n, 100)).collect()).await.unwrap();
    let (bobs, carols) = (all(2).await, all(3).await);
    let seqs: Vec<_> = bobs.iter().map(|(seq, _)| *seq).collect();
    store.update(|db| db.pragma_update(None, "max_page_count", 1)).await.unwrap();

    let (held, release) = hold(&store).await;
    // The last of them does not fit.
    let (one, rest, whole, put) = tokio::join!(
        biased;
        store.remove(&[2; 16], &seqs[4..5]),
        store.acknowledge(&[2; 16], seqs[6]),
        store.acknowledge(&[3; 16], u64::MAX),
        async {
            let put = store.put(vec![envelope(2, 10, 60_000), envelope(3, 11, 60_000)]);
            let mut put = Box::pin(put);
            tokio::select! {
                biased;
                _ = &mut put => panic!("the writer is busy"),
                () = core::future::ready(()) => {}
            }
            drop(release);
            put.await
        },
    );
    held.await.unwrap();
    let full = StoreError::Full(directory.path().display().to_string());
    assert_eq!(put, Err(full.clone()));
    assert_eq!((one, rest, whole), (Err(full.clone()), Err(full.clone()), Err(full)));
    assert_eq!((all(2).await, all(3).await), (bobs.clone(), carols), "nothing of it remains");
    assert_eq!(store.put(vec![envelope(2, 3, 100)]).await, Ok(vec![Ok(Put::Repeat { seq: seqs[3] })]));

    store.update(|db| db.pragma_update(None, "max_page_count", 1 << 30)).await.unwrap();
    assert_eq!(store.remove(&[2; 16], &seqs[4..5]).await, Ok(1));
    assert!(store.put(vec![envelope(2, 10, 60_000)]).await.unwrap()[0].is_ok());
    let now = all(2).await;
    assert_eq!(now.len(), 10);
    drop(store);
    let items = directory.store().queue(&[2; 16], 0, usize::MAX, usize::MAX).await.unwrap();
    assert_eq!(items.iter().map(|item| (item.seq, item.n)).collect::<Vec<_>>(), now);
}

#[tokio::test]
async fn a_damaged_parcel_is_an_error_and_not_a_wrong_message() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(2)).await.unwrap();
    store.put(vec![envelope(2, 0, 100), envelope(2, 1, 100)]).await.unwrap();
    for damage in [
        "UPDATE parcel SET bytes = substr(bytes, 1, 199)",
        "UPDATE parcel SET heads = substr(heads, 1, 83)",
        "UPDATE parcel SET heads = x'', bytes = x''",
        "UPDATE parcel SET heads = CAST(substr(heads, 1, 40) || x'0900' || substr(heads, 43) AS BLOB)",
    ] {
        let db = Connection::open(directory.path().join("store.db")).unwrap();
        db.execute_batch(&format!("BEGIN; CREATE TABLE whole AS SELECT * FROM parcel; {damage}; COMMIT")).unwrap();
        let read = store.queue(&[2; 16], 0, 10, 10_000).await;
        assert!(matches!(read, Err(StoreError::Corrupt(_))), "{damage}: {read:?}");
        assert!(store.health().refusing.is_some_and(|why| why.contains("restore a backup")));
        db.execute_batch("BEGIN; DELETE FROM parcel; INSERT INTO parcel SELECT * FROM whole; DROP TABLE whole; COMMIT")
            .unwrap();
    }
    assert_eq!(store.queue(&[2; 16], 0, 10, 10_000).await.unwrap().len(), 2);
    store.update(|db| db.execute("UPDATE parcel SET bytes = x''", [])).await.unwrap();
    drop(store);
    let refused = SqliteStore::open(&directory.path()).unwrap_err();
    assert!(matches!(refused, StoreError::Corrupt(_)), "{refused}");
}

#[tokio::test]
async fn parcels_go_when_the_last_of_them_does() {
    let directory = Directory::new();
    let store = directory.store();
    store.enrol(enrolment(2)).await.unwrap();
    let rows = async |store: &SqliteStore| {
        let sql = "SELECT (SELECT count(*) FROM parcel), (SELECT count(*) FROM gone)";
        let count = |db: &Connection| db.query_row(sql, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)));
        store.read(count).await.unwrap()
    };
    let put = store.put((0..100).map(|n| envelope(2, n, 2000)).collect()).await.unwrap();
    let seqs: Vec<_> = put
        .into_iter()
        .map(|put| match put {
            Ok(Put::Stored { seq }) => seq,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(rows(&store).await, (4, 0), "65,536 bytes and less than another item");
    // One after the other, as clients acknowledge.
    for seq in &seqs[..20] {
        assert_eq!(store.remove(&[2; 16], &[*seq]).await, Ok(1));
    }
    assert_eq!(rows(&store).await, (4, 1), "the beginning is one range");
    assert_eq!(store.remove(&[2; 16], &[seqs[22], seqs[24], seqs[25]]).await, Ok(3));
    assert_eq!(rows(&store).await, (4, 3));
    drop(store);
    let store = directory.store();
    assert_eq!(store.waiting(&[2; 16]).await.unwrap().items, 77);
    assert_eq!(store.acknowledge(&[2; 16], seqs[40]).await, Ok(18));
    assert_eq!(rows(&store).await, (3, 1));
    assert_eq!(store.remove(&[2; 16], &seqs[..99]).await, Ok(58));
    assert_eq!(rows(&store).await, (1, 0));
    assert_eq!(store.acknowledge(&[2; 16], u64::MAX).await, Ok(1));
    assert_eq!(rows(&store).await, (0, 0));
}
