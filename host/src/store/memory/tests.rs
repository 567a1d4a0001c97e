//! The conformance suite over memory, and what a disk of memory can be told to do.

use super::super::SharedStore;
use super::super::conformance::{Backend, conformance};
use super::*;

const META: Meta = Meta { server_id: [1; 16], store_epoch: [2; 8] };

impl Backend for Disk {
    async fn open_with(&self, limits: QueueLimits) -> SharedStore {
        Arc::new(MemoryStore::open(self, limits).unwrap())
    }
}

conformance!(Disk::new(META, |_| Access::INSTANT));

/// A disk of which the next accesses go as these, and the later ones well.
fn disk(accesses: impl IntoIterator<Item = Access>) -> Disk {
    let mut accesses: Vec<_> = accesses.into_iter().collect();
    accesses.reverse();
    let accesses = Mutex::new(accesses);
    Disk::new(META, move |_| accesses.lock().unwrap().pop().unwrap_or(Access::INSTANT))
}

fn store(disk: &Disk) -> MemoryStore {
    MemoryStore::open(disk, QueueLimits::default()).unwrap()
}

fn enrolment(n: u8) -> Enrolment {
    Enrolment {
        id: [n; 16],
        name: Name::parse(&format!("client-{n}")).unwrap(),
        modulus: vec![n; 256],
        token_id: None,
        enrolled_by: None,
        record_limit: 1024,
        now: 1,
    }
}

async fn is_there(store: &MemoryStore, n: u8) -> bool {
    store.client(&[n; 16]).await.unwrap().is_some()
}

#[tokio::test]
async fn one_store_at_a_time() {
    let disk = disk([]);
    let first = store(&disk);
    assert!(matches!(MemoryStore::open(&disk, QueueLimits::default()), Err(StoreError::Busy(_))));
    drop(first);
    drop(store(&disk));
}

#[tokio::test]
async fn a_power_cut_leaves_what_was_flushed() {
    let disk = disk([Access::INSTANT, Access { outcome: Outcome::Unflushed, ..Access::INSTANT }]);
    let first = store(&disk);
    for n in [1, 2] {
        assert_eq!(first.enrol(enrolment(n)).await, Ok(Enrolled::New));
    }
    first.touch(&[1; 16], 9).await.unwrap();
    drop(first);
    let second = store(&disk);
    assert!(is_there(&second, 1).await && is_there(&second, 2).await, "the system has it still");
    drop(second);
    disk.cut_power();
    let third = store(&disk);
    assert!(is_there(&third, 1).await && !is_there(&third, 2).await);
    assert_eq!(third.client(&[1; 16]).await.unwrap().unwrap().last_seen, None);
    // What is flushed later takes the rest along.
    third.touch(&[1; 16], 9).await.unwrap();
    third.enrol(enrolment(3)).await.unwrap();
    drop(third);
    disk.cut_power();
    assert_eq!(store(&disk).client(&[1; 16]).await.unwrap().unwrap().last_seen, Some(9));
}

#[tokio::test]
async fn a_full_disk_has_nothing_of_it_and_a_failed_one_may() {
    let outcomes = [Outcome::Full, Outcome::Done, Outcome::Failed { kept: false }];
    let disk = disk(outcomes.map(|outcome| Access { outcome, ..Access::INSTANT }));
    let first = store(&disk);
    assert!(matches!(first.enrol(enrolment(1)).await, Err(EnrolError::Store(StoreError::Full(_)))));
    assert!(first.health().refusing.is_some());
    first.enrol(enrolment(1)).await.unwrap();
    assert_eq!(first.health().refusing, None);
    for n in [2, 3] {
        assert!(matches!(first.enrol(enrolment(n)).await, Err(EnrolError::Store(StoreError::Io(_)))));
    }
    assert!(first.client(&[1; 16]).await.is_err() && first.touch(&[1; 16], 1).await.is_err());
    drop(first);
    let second = store(&disk);
    assert!(is_there(&second, 1).await && !is_there(&second, 2).await && !is_there(&second, 3).await);

    for kept in [false, true] {
        let disk = self::disk([Access { outcome: Outcome::Failed { kept }, ..Access::INSTANT }]);
        let first = store(&disk);
        assert!(first.enrol(enrolment(1)).await.is_err());
        drop(first);
        disk.cut_power();
        assert_eq!(is_there(&store(&disk), 1).await, kept);
    }
}

#[tokio::test]
async fn who_goes_before_it_takes_effect_has_done_nothing_and_who_goes_behind_has() {
    let [none, long] = [0, 3600].map(Duration::from_secs);
    for (before, after, done) in [(none, long, true), (long, none, false)] {
        let disk = disk([Access { before, after, outcome: Outcome::Done }]);
        let first = store(&disk);
        tokio::select! {
            biased;
            _ = first.enrol(enrolment(1)) => panic!("it takes an hour"),
            () = core::future::ready(()) => {}
        }
        drop(first);
        disk.cut_power();
        assert_eq!(is_there(&store(&disk), 1).await, done);
    }
}
