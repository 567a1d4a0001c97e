//! A store that fails now and then: whoever tries again has everything once, and a server says what is the matter.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use ossicle::name::Name;
use ossicle::store::{Enrolment, ItemKind, NewItem, Put, SharedStore, SqliteStore, Store, StoreError};
use ossicle_core::{Credentials, Error, PeerError, Reason};
use ossicle_tests::faulty::{Faulty, Plan, When};
use ossicle_tests::node::{Client, Node, open};
use ossicle_tests::{keys, public};
use tempfile::TempDir;

fn plan(every: u64, only: &'static [&'static str], when: When) -> Plan {
    Plan { every, only, when, error: StoreError::Full("/a/disk".into()) }
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

fn item(n: u32) -> NewItem {
    NewItem {
        recipient: [2; 16],
        sender: [1; 16],
        kind: ItemKind::Envelope,
        chain: [3; 8],
        n,
        wanted: 3,
        bytes: n.to_be_bytes().into(),
        at: 1,
    }
}

/// Asks again until it is done, as senders do, and returns the last answer.
macro_rules! insist {
    ($call:expr) => {
        loop {
            if let Ok(done) = $call.await {
                break done;
            }
        }
    };
}

#[tokio::test]
async fn whoever_tries_again_has_everything_once_and_in_order() {
    for when in [When::Before, When::After] {
        for every in [2, 3, 7] {
            let directory = TempDir::new().unwrap();
            let inner: SharedStore = Arc::new(SqliteStore::open(directory.path()).unwrap());
            let store = Faulty::new(Arc::clone(&inner));
            store.plan(Some(plan(every, &[], when)));
            for n in [1, 2] {
                insist!(store.enrol(enrolment(n)));
            }
            let mut seqs = Vec::new();
            for n in 0..40 {
                let puts = insist!(store.put(vec![item(2 * n), item(2 * n + 1)]));
                seqs.extend(puts.into_iter().map(|put| match put.unwrap() {
                    Put::Stored { seq } | Put::Repeat { seq } => seq,
                }));
            }
            let (mut after, mut numbers) = (0, Vec::new());
            loop {
                let items = insist!(store.queue(&[2; 16], after, 7, 1 << 20));
                let Some(last) = items.last() else { break };
                after = last.seq;
                numbers.extend(items.iter().map(|item| (item.seq, item.n)));
                insist!(store.acknowledge(&[2; 16], after));
            }
            assert_eq!(numbers, seqs.into_iter().zip(0..80).collect::<Vec<_>>(), "{when:?}, every {every}");
            assert_eq!(inner.waiting(&[2; 16]).await.unwrap().items, 0);
            assert!(store.failed() > 10);
        }
    }
}

#[tokio::test]
async fn a_server_whose_store_fails_says_so_and_goes_on_when_it_does_not() {
    let directory = TempDir::new().unwrap();
    let inner: SharedStore = Arc::new(SqliteStore::open(directory.path()).unwrap());
    let store = Arc::new(Faulty::new(inner));
    let node = Node::start_with(directory, Arc::<Faulty>::clone(&store), open()).await;
    store.plan(Some(plan(1, &["enrol"], When::Before)));
    let key = keys::alice();
    let credentials = Credentials::Enroll { id: [1; 16], name: "alice", key: public(&key), token: None };
    let error = Client::connect(&node, &credentials, &key).await.err().unwrap();
    assert!(matches!(error, Error::Peer(PeerError::Refused { reason: Reason::Unavailable, .. })), "{error}");
    assert_eq!(store.failed(), 1);
    store.plan(None);
    drop(node.enrol(1, "alice", key).await);
    node.stop().await;
}
