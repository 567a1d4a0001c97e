//! The public conversation over real TCP: who says something, who reads it and when, what is kept, and what bad input gets.
//!
//! Each test has its own server. The clients are raw, with the keys of their bundles; what a home makes of it is tested with
//! homes.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Arc;

use ossicle::clock::Clock;
use ossicle::crypto::IdentityKey;
use ossicle_core::{Follow, FollowResponse, MAX_POST_LEN, Message, News, Reason, Rotation, Said, Say};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Node, Published, Saying, enrolled, open, post};
use tempfile::TempDir;

const ALICE: u8 = 1;
const BOB: u8 = 2;
const CAROL: u8 = 3;

fn key(number: u8) -> IdentityKey {
    match number {
        ALICE => keys::alice(),
        BOB => keys::bob(),
        _ => keys::carol(),
    }
}

fn saying(number: u8, count: u64, text: &str) -> Saying {
    post(number, &key(number), count, text.as_bytes())
}

/// A client with a bundle in the directory.
async fn enter(node: &Node, number: u8) -> Client {
    let mut client = node.enrol(number, ["alice", "bob", "carol"][usize::from(number) - 1], key(number)).await;
    publish(&mut client, 1).await;
    client
}

async fn publish(client: &mut Client, epoch: u32) {
    let number = client.id[0];
    let bundle = Published::new(number, &key(number), epoch);
    client.done(&Message::Publish { request: 1, bundle: bundle.signed() }).await;
}

async fn say(client: &mut Client, saying: &Saying) -> Result<(), Reason> {
    let mut buffer = vec![0; 2048];
    let message = Say { request: 7, post: saying.post() }.encode(&mut buffer).unwrap();
    let mut answer = client.ask(&message).await;
    if answer[..2] == News::CODE.to_be_bytes() {
        // It reads what it says like everybody.
        answer = client.message().await;
    }
    match Message::decode(&answer) {
        Ok(Message::Done { request: 7 }) => Ok(()),
        Ok(Message::Refused { request: 7, reason, .. }) => Err(reason),
        other => panic!("{other:?}"),
    }
}

async fn ask(client: &mut Client, request: u16, after: u64) {
    client.send(&Follow { request, after }.encode(&mut [0; 16]).unwrap()).await;
}

/// A page: numbers, authors and texts, and whether there is more.
async fn page(client: &mut Client, request: u16) -> Result<(Vec<(u64, u8, Saying)>, bool), Reason> {
    let payload = client.message().await;
    let body = match Message::decode(&payload) {
        Ok(Message::Other(body)) => body,
        Ok(Message::Refused { reason, .. }) => return Err(reason),
        other => panic!("{other:?}"),
    };
    let page = FollowResponse::decode(body).unwrap();
    assert_eq!(page.request, request);
    let line = |line: Result<Said<'_>, _>| {
        let Said { seq, author, post } = line.unwrap();
        let saying = Saying {
            number: post.number,
            at: post.at,
            epoch: post.epoch,
            kind: post.kind,
            signature: *post.signature.0,
            body: post.body.to_vec(),
        };
        (seq, author[0], saying)
    };
    Ok((Said::lines(page.lines).map(line).collect(), page.more))
}

async fn follow(client: &mut Client, after: u64) -> (Vec<(u64, u8, Saying)>, bool) {
    ask(client, 9, after).await;
    page(client, 9).await.unwrap()
}

async fn hears_news(client: &mut Client) {
    let payload = client.message().await;
    let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:02x?}") };
    assert_eq!(News::decode(body), Ok(News {}));
}

#[tokio::test]
async fn who_asks_reads_what_was_said_and_hears_that_there_is_more() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = (enter(&node, ALICE).await, enter(&node, BOB).await);
    // Carol is online, has no bundle, and did not ask.
    let mut carol = node.enrol(CAROL, "carol", key(CAROL)).await;
    carol.listen().await;
    assert_eq!(follow(&mut bob, 0).await, (vec![], false));
    let said: Vec<_> = (0..5).map(|n| saying(ALICE, 10 + n, &format!("number {n}"))).collect();
    say(&mut alice, &said[0]).await.unwrap();
    say(&mut alice, &said[1]).await.unwrap();
    // One word, however much there is.
    hears_news(&mut bob).await;
    bob.sync().await;
    let line = |seq: u64| (seq, ALICE, said[seq as usize - 1].clone());
    assert_eq!(follow(&mut bob, 0).await, (vec![line(1), line(2)], false));
    // He asks twice; there is one word all the same.
    assert_eq!(follow(&mut bob, 2).await, (vec![], false));
    assert_eq!(follow(&mut bob, 1).await, (vec![line(2)], false));
    say(&mut alice, &said[2]).await.unwrap();
    hears_news(&mut bob).await;
    bob.sync().await;
    assert_eq!(follow(&mut bob, 2).await, (vec![line(3)], false));
    // The author reads it, too, and so does who says nothing.
    assert_eq!(follow(&mut alice, 0).await, (vec![line(1), line(2), line(3)], false));
    assert_eq!(follow(&mut carol, 1).await, (vec![line(2), line(3)], false));
    say(&mut bob, &saying(BOB, 1, "hello")).await.unwrap();
    hears_news(&mut alice).await;
    hears_news(&mut carol).await;
    // Who has left is told nothing, and his place is taken by nobody.
    assert_eq!(follow(&mut bob, 4).await, (vec![], false));
    bob.close().await;
    say(&mut alice, &said[3]).await.unwrap();
    carol.sync().await;
    let mut bob = node.connect(BOB, &key(BOB)).await.unwrap();
    bob.listen().await;
    say(&mut alice, &said[4]).await.unwrap();
    bob.sync().await;
    let (posts, more) = follow(&mut bob, 4).await;
    assert_eq!((posts.iter().map(|post| post.0).collect::<Vec<_>>(), more), (vec![5, 6], false));
    assert_eq!(node.server.metrics().posts.total(), 6);
    node.stop().await;
}

#[tokio::test]
async fn what_is_no_post_of_the_asker_is_refused_and_changes_nothing() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = (node.enrol(ALICE, "alice", key(ALICE)).await, enter(&node, BOB).await);
    let good = saying(ALICE, 10, "hello");
    assert_eq!(say(&mut alice, &good).await, Err(Reason::Unauthorised), "no bundle");
    publish(&mut alice, 1).await;
    assert_eq!(say(&mut bob, &good).await, Err(Reason::Unauthorised), "another's");
    let mut broken = good.clone();
    broken.signature[5] ^= 1;
    for (why, wrong, reason) in [
        ("a broken signature", broken, Reason::Unauthorised),
        ("another text", Saying { body: b"hellO".to_vec(), ..good.clone() }, Reason::Unauthorised),
        ("another number", Saying { number: 11, ..good.clone() }, Reason::Unauthorised),
        ("another time", Saying { at: 1, ..good.clone() }, Reason::Unauthorised),
        ("another epoch", Saying { epoch: 2, ..good.clone() }, Reason::Unauthorised),
        ("nothing", Saying { body: vec![], ..good.clone() }, Reason::Malformed),
        ("no kind", Saying { kind: 128, ..good.clone() }, Reason::Malformed),
        ("too long", Saying { body: vec![7; MAX_POST_LEN + 1], ..good.clone() }, Reason::TooLarge),
    ] {
        assert_eq!(say(&mut alice, &wrong).await, Err(reason), "{why}");
    }
    assert_eq!(follow(&mut bob, 0).await, (vec![], false));
    // The longest one is taken; the same again is the same; nothing goes back.
    let longest = post(ALICE, &key(ALICE), 10, &[0xff; MAX_POST_LEN]);
    assert_eq!(say(&mut alice, &longest).await, Ok(()));
    hears_news(&mut bob).await;
    assert_eq!(follow(&mut bob, 1).await, (vec![], false));
    assert_eq!(say(&mut alice, &longest).await, Ok(()));
    assert_eq!(say(&mut alice, &good).await, Err(Reason::Rewound), "another text under this number");
    assert_eq!(say(&mut alice, &saying(ALICE, 9, "before")).await, Err(Reason::Rewound));
    bob.sync().await;
    assert_eq!(follow(&mut bob, 0).await, (vec![(1, ALICE, longest)], false));
    for after in [2, u64::MAX] {
        ask(&mut bob, 9, after).await;
        assert_eq!(page(&mut bob, 9).await, Err(Reason::Rewound), "{after}");
    }
    // Each of two that are asked for at once is answered.
    ask(&mut bob, 11, 1).await;
    ask(&mut bob, 12, 0).await;
    assert_eq!(page(&mut bob, 11).await, Ok((vec![], false)));
    assert_eq!(page(&mut bob, 12).await.unwrap().0.len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_kill() {
    let mut node = Node::start(open()).await;
    let mut alice = enter(&node, ALICE).await;
    let mut said = Vec::new();
    for round in 0..3_u64 {
        for n in 0..4 {
            let seq = 4 * round + n + 1;
            let post = saying(ALICE, 100 * seq, &format!("{round} {n}"));
            say(&mut alice, &post).await.unwrap();
            said.push((seq, ALICE, post));
        }
        drop(alice);
        let directory = node.kill().await;
        node = Node::start_on(directory, open()).await;
        alice = node.connect(ALICE, &key(ALICE)).await.unwrap();
        // Her answer might have been lost.
        say(&mut alice, &said.last().unwrap().2).await.unwrap();
        assert_eq!(follow(&mut alice, 0).await, (said.clone(), false));
    }
    node.stop().await;
}

#[tokio::test]
async fn a_small_reader_gets_one_after_the_other_and_holds_up_nobody() {
    let node = Node::start(open()).await;
    let mut alice = enter(&node, ALICE).await;
    node.enrol(BOB, "bob", key(BOB)).await.close().await;
    let credentials = enrolled(BOB, &key(BOB));
    let mut bob = Client::connect_with(&node, &credentials, &key(BOB), 1024).await.unwrap();
    let mut carol = enter(&node, CAROL).await;
    let said: Vec<_> = (1..=25).map(|n| post(ALICE, &key(ALICE), n, &[n as u8; MAX_POST_LEN])).collect();
    // He asked, and does not read.
    ask(&mut bob, 1, 0).await;
    for post in &said {
        say(&mut alice, post).await.unwrap();
    }
    let (mut after, mut read) = (0, Vec::new());
    loop {
        let (posts, more) = follow(&mut carol, after).await;
        assert!(!posts.is_empty() && posts.len() < 20, "{} in a page", posts.len());
        after = posts.last().unwrap().0;
        read.extend(posts.into_iter().map(|post| post.2));
        if !more {
            break;
        }
    }
    assert_eq!(read, said);
    assert_eq!(page(&mut bob, 1).await, Ok((vec![], false)));
    hears_news(&mut bob).await;
    for (place, post) in said.iter().enumerate() {
        let (posts, more) = follow(&mut bob, place as u64).await;
        assert_eq!((posts, more), (vec![(place as u64 + 1, ALICE, post.clone())], place < 24));
    }
    bob.sync().await;
    node.stop().await;
}

/// A clock that a test turns.
fn clock() -> (Clock, Arc<AtomicU64>) {
    let passed = Arc::new(AtomicU64::new(0));
    let seconds = Arc::clone(&passed);
    (Clock::new(move || Duration::from_secs(seconds.load(Ordering::SeqCst))), passed)
}

#[tokio::test]
async fn nobody_fills_the_conversation_alone() {
    let (clock, passed) = clock();
    let node = Node::start_by(clock, open()).await;
    let (mut alice, mut bob) = (enter(&node, ALICE).await, enter(&node, BOB).await);
    for n in 1..=30 {
        say(&mut alice, &saying(ALICE, n, "again")).await.unwrap();
    }
    let more = saying(ALICE, 31, "again");
    assert_eq!(say(&mut alice, &more).await, Err(Reason::Rate));
    say(&mut bob, &saying(BOB, 1, "and I?")).await.unwrap();
    passed.fetch_add(1, Ordering::SeqCst);
    say(&mut alice, &more).await.unwrap();
    assert_eq!(say(&mut alice, &saying(ALICE, 32, "again")).await, Err(Reason::Rate));
    node.stop().await;
}

#[tokio::test]
async fn what_nobody_could_verify_any_more_goes() {
    let node = Node::start_on(TempDir::new().unwrap(), open()).await;
    let (mut alice, mut bob) = (enter(&node, ALICE).await, enter(&node, BOB).await);
    let mut carol = enter(&node, CAROL).await;
    say(&mut alice, &saying(ALICE, 1, "I shall have another key")).await.unwrap();
    say(&mut bob, &saying(BOB, 1, "I shall be revoked")).await.unwrap();
    say(&mut carol, &saying(CAROL, 1, "I stay")).await.unwrap();
    assert_eq!(node.server.revoke(&[BOB; 16]).await, Ok(true));
    let left = |posts: &[(u64, u8, Saying)]| posts.iter().map(|post| (post.0, post.1)).collect::<Vec<_>>();
    assert_eq!(left(&follow(&mut carol, 0).await.0), [(1, ALICE), (3, CAROL)]);

    let next = keys::server3072();
    let rotation = Rotation { id: alice.id, former: key(ALICE).fingerprint(), next: next.fingerprint(), key_epoch: 1 };
    let proof = next.sign(&rotation.possession(alice.connection.exporter().unwrap())).unwrap();
    let signature = key(ALICE).sign(&rotation.statement()).unwrap();
    let bundle = Published::new(ALICE, &next, 2);
    let rotate = ossicle_core::Rotate {
        request: 3,
        key_epoch: 1,
        modulus: next.modulus(),
        signature: &signature,
        proof: &proof,
        bundle: bundle.signed(),
    };
    alice.done(&rotate.encode(&mut [0; 4096]).unwrap()).await;
    assert_eq!(left(&follow(&mut carol, 0).await.0), [(3, CAROL)]);
    node.stop().await;
}
