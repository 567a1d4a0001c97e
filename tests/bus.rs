//! Nodes that share a store, and hints between them that come, are lost, or come late and often: everything comes all the
//! same, once and in order.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use ossicle::bus::{Bus, Hint};
use ossicle::crypto::IdentityKey;
use ossicle::server::Config;
use ossicle::store::{ItemKind, NewItem, SharedStore, SqliteStore, Store};
use ossicle_core::{
    Answer, CloseConversation, Closed, Fixed, Follow, FollowResponse, GroupFlags, Init, Invite, Member, MemberChanged,
    Members, Message, Names, News, Reason, Receipt, Rung, Rungs, SEALED_NAME_LEN, Said, Say,
};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Node, Published, envelope, open, post, wrap};
use tempfile::TempDir;
use tokio::sync::{Mutex, mpsc};

const ALICE: u8 = 1;
const BOB: u8 = 2;
const CAROL: u8 = 3;
const CHAIN: u8 = 5;

/// What becomes of hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Told,
    Lost,
    /// Each comes three times, and some overtake others.
    LateAndOften,
}

impl Way {
    /// Nobody polls within a test whose hints come.
    fn config(self) -> Config {
        let poll = if self == Self::Lost { Duration::from_millis(200) } else { Duration::from_secs(24 * 60 * 60) };
        Config { poll, ..open() }
    }
}

/// One end of a bus between two nodes.
#[derive(Debug)]
struct End {
    way: Way,
    hints: AtomicU64,
    to: mpsc::UnboundedSender<Hint>,
    heard: Mutex<mpsc::UnboundedReceiver<Hint>>,
}

#[async_trait]
impl Bus for End {
    fn alone(&self) -> bool {
        false
    }

    fn hint(&self, hint: Hint) {
        let hints = self.hints.fetch_add(1, Ordering::Relaxed);
        match self.way {
            Way::Told => drop(self.to.send(hint)),
            Way::Lost => {}
            Way::LateAndOften => {
                let to = self.to.clone();
                tokio::spawn(async move {
                    for times in 1..=3 {
                        tokio::time::sleep(Duration::from_millis(hints * 7 % 20 * times)).await;
                        // The other node may have stopped.
                        let _ = to.send(hint);
                    }
                });
            }
        }
    }

    async fn heard(&self) -> Hint {
        match self.heard.lock().await.recv().await {
            Some(hint) => hint,
            None => core::future::pending().await,
        }
    }
}

/// The two ends of a bus.
fn bus(way: Way) -> [Arc<End>; 2] {
    let (here, there) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let end = |to, heard| Arc::new(End { way, hints: AtomicU64::new(0), to, heard: Mutex::new(heard) });
    [end(here.0, there.1), end(there.0, here.1)]
}

/// Two nodes on one store.
async fn two(way: Way, directory: &TempDir) -> [Node; 2] {
    let store: SharedStore = Arc::new(SqliteStore::open(directory.path()).unwrap());
    let [here, there] = bus(way);
    let a = Node::start_among(Arc::clone(&store), Arc::clone(&here) as Arc<dyn Bus>, way.config()).await;
    [a, Node::start_among(store, there, way.config()).await]
}

/// Gives a chain of `from`, who is elsewhere, to somebody who listens.
async fn introduce(from: &mut Client, key: &IdentityKey, to: &mut Client) {
    let bundle = Published::new(from.id[0], key, 0);
    let wrap = wrap(CHAIN);
    from.done(&Message::Wrap { request: 9, to: to.id, wrap: &wrap, bundle: bundle.signed() }).await;
    let delivered = to.message().await;
    let expected = Message::WrapDelivery { from: from.id, wrap: &wrap, bundle: bundle.signed() };
    assert_eq!(Message::decode(&delivered), Ok(expected));
}

/// The number of the next thing that is heard, which is a message.
async fn number(client: &mut Client) -> u32 {
    let payload = client.message().await;
    match Message::decode(&payload) {
        Ok(Message::Deliver { envelope, .. }) => u32::from_be_bytes(envelope[8..12].try_into().unwrap()),
        other => panic!("a message instead of {other:?}"),
    }
}

const fn receipt(rung: Rung, from: u32, to: u32) -> Receipt {
    Receipt { rung, reason: None, chain: [CHAIN; 8], from, to, tag: None }
}

/// What each message wants of the ladder: every kind, in turn.
fn wanted(n: u32) -> Rungs {
    let stored = Rungs::NONE.with(Rung::Stored);
    let delivered = Rungs::NONE.with(Rung::Delivered);
    [Rungs::NONE, stored, delivered, stored.with(Rung::Delivered), Rungs::NONE.with(Rung::Accepted)][n as usize % 5]
}

/// Hears receipts until each of these messages has the one that it wants most.
async fn settled(client: &mut Client, numbers: core::ops::Range<u32>) {
    let highest = |n| match (wanted(n).contains(Rung::Delivered), wanted(n).contains(Rung::Stored)) {
        (true, _) => Some(Rung::Delivered),
        (_, true) => Some(Rung::Stored),
        _ => wanted(n).contains(Rung::Accepted).then_some(Rung::Accepted),
    };
    let mut open: BTreeMap<u32, Rung> = numbers.filter_map(|n| Some((n, highest(n)?))).collect();
    while !open.is_empty() {
        let told = client.told().await;
        open.retain(|n, rung| !(told.from..=told.to).contains(n) || told.rung != *rung);
    }
}

async fn from_node_to_node(way: Way) {
    let directory = TempDir::new().unwrap();
    let [a, b] = two(way, &directory).await;
    let mut alice = a.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = b.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    introduce(&mut alice, &keys::alice(), &mut bob).await;

    // There, and receipts back to a client that does not even listen.
    for n in 0..40 {
        alice.say(CHAIN, n, wanted(n)).await;
    }
    for n in 0..40 {
        assert_eq!(number(&mut bob).await, n);
        if wanted(n).contains(Rung::Delivered) {
            bob.send(&Message::Tell(Receipt { tag: Some([1; 16]), ..receipt(Rung::Delivered, n, n) })).await;
        }
    }
    settled(&mut alice, 0..40).await;

    // What she has stored here is ahead of what she says where Bob is, though it would pass to him.
    for n in 40..45 {
        alice.say(CHAIN, n, Rungs::NONE.with(Rung::Stored)).await;
    }
    let mut stored = 40;
    while stored < 45 {
        let told = alice.told().await;
        assert_eq!((told.rung, told.from), (Rung::Stored, stored));
        stored = told.to + 1;
    }
    alice.close().await;
    let mut alice = b.connect(ALICE, &keys::alice()).await.unwrap();
    for n in 45..50 {
        alice.say(CHAIN, n, Rungs::NONE).await;
    }
    for n in 40..50 {
        assert_eq!(number(&mut bob).await, n);
    }
    alice.close().await;

    // Here the chain gets one more recipient, of whom the other node has to know.
    let mut alice = a.connect(ALICE, &keys::alice()).await.unwrap();
    let mut carol = a.enrol(CAROL, "carol", keys::carol()).await;
    carol.listen().await;
    introduce(&mut alice, &keys::alice(), &mut carol).await;
    alice.close().await;
    let mut alice = b.connect(ALICE, &keys::alice()).await.unwrap();
    alice.say(CHAIN, 50, Rungs::NONE).await;
    assert_eq!(number(&mut bob).await, 50);
    assert_eq!(number(&mut carol).await, 50);

    // Whoever is nowhere gets it where he comes next.
    bob.close().await;
    alice.say(CHAIN, 51, Rungs::NONE.with(Rung::Stored)).await;
    assert_eq!(alice.told().await, receipt(Rung::Stored, 51, 51));
    let mut bob = a.connect(BOB, &keys::bob()).await.unwrap();
    bob.listen().await;
    assert_eq!(number(&mut bob).await, 51);
    assert_eq!(number(&mut carol).await, 51);

    // Where he is, she has left a connection that nobody reads any more.
    let _left = a.connect(ALICE, &keys::alice()).await.unwrap();
    alice.say(CHAIN, 52, Rungs::NONE.with(Rung::Delivered)).await;
    assert_eq!(number(&mut bob).await, 52);
    assert_eq!(number(&mut carol).await, 52);
    let delivered = Receipt { tag: Some([1; 16]), ..receipt(Rung::Delivered, 52, 52) };
    bob.send(&Message::Tell(delivered)).await;
    assert_eq!(alice.told().await, delivered);
    bob.sync().await;
    carol.sync().await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn hints_bring_everything_from_node_to_node() {
    from_node_to_node(Way::Told).await;
}

#[tokio::test]
async fn hints_that_come_late_and_often_bring_nothing_twice_or_out_of_order() {
    from_node_to_node(Way::LateAndOften).await;
}

#[tokio::test]
async fn without_a_single_hint_everything_comes_all_the_same() {
    from_node_to_node(Way::Lost).await;
}

#[tokio::test]
async fn a_receipt_that_the_store_makes_comes_to_a_sender_at_another_node() {
    for way in [Way::Told, Way::Lost] {
        let directory = TempDir::new().unwrap();
        let [a, b] = two(way, &directory).await;
        let mut alice = a.enrol(ALICE, "alice", keys::alice()).await;
        let mut bob = b.enrol(BOB, "bob", keys::bob()).await;
        bob.listen().await;
        introduce(&mut alice, &keys::alice(), &mut bob).await;
        bob.close().await;
        alice.say(CHAIN, 0, Rungs::NONE.with(Rung::Stored)).await;
        assert_eq!(alice.told().await, receipt(Rung::Stored, 0, 0));
        // Her message went with him.
        assert_eq!(b.server.revoke(&[BOB; 16]).await, Ok(true));
        let told = alice.told().await;
        assert_eq!((told.rung, told.reason), (Rung::Refused, Some(Reason::Unknown)), "{way:?}");
        a.stop().await;
        b.stop().await;
    }
}

#[tokio::test]
async fn a_group_is_one_wherever_its_members_are() {
    for way in [Way::Told, Way::LateAndOften, Way::Lost] {
        let directory = TempDir::new().unwrap();
        let [a, b] = two(way, &directory).await;
        let mut alice = a.enrol(ALICE, "alice", keys::alice()).await;
        let mut bob = b.enrol(BOB, "bob", keys::bob()).await;
        alice.listen().await;
        bob.listen().await;
        let (sid, signature) = ([0x51; 16], Fixed(&[7; 64]));
        let member = |number, key: IdentityKey| Member { id: [number; 16], key: key.fingerprint() }.encode();
        let lines = [member(ALICE, keys::alice()), member(BOB, keys::bob())];
        let init = Init {
            request: 1,
            sid,
            flags: GroupFlags::NONE,
            signature,
            members: Members::new(lines.as_flattened()).unwrap(),
            names: Names::new(&[7; SEALED_NAME_LEN]).unwrap(),
        };
        let code = |payload: Vec<u8>| u16::from_be_bytes([payload[0], payload[1]]);
        alice.done(&init.encode(&mut [0; 512]).unwrap()).await;
        assert_eq!(code(bob.message().await), Invite::CODE, "{way:?}");
        let answer = Answer { request: 2, sid, accept: true, signature };
        bob.done(&answer.encode(&mut [0; 128]).unwrap()).await;
        assert_eq!(code(alice.message().await), MemberChanged::CODE, "{way:?}");
        let bundle = Published::new(ALICE, &keys::alice(), 0);
        let mut wrap = wrap(CHAIN);
        wrap[..16].copy_from_slice(&sid);
        alice.done(&Message::Wrap { request: 9, to: bob.id, wrap: &wrap, bundle: bundle.signed() }).await;
        assert!(matches!(Message::decode(&bob.message().await), Ok(Message::WrapDelivery { .. })));
        alice.say(CHAIN, 0, Rungs::NONE).await;
        assert_eq!(number(&mut bob).await, 0);
        // What this node knew of it is nothing that the other one has not ended.
        let close = CloseConversation { request: 3, sid, signature };
        bob.done(&close.encode(&mut [0; 128]).unwrap()).await;
        assert_eq!(code(alice.message().await), Closed::CODE, "{way:?}");
        alice.say(CHAIN, 1, Rungs::NONE).await;
        assert_eq!(alice.told().await.reason, Some(Reason::Rekey));
        assert_eq!(alice.refusal(&init.encode(&mut [0; 512]).unwrap()).await, Reason::Closed);
        a.stop().await;
        b.stop().await;
    }
}

#[tokio::test]
async fn what_is_said_to_everybody_comes_to_readers_at_every_node() {
    for way in [Way::Told, Way::LateAndOften, Way::Lost] {
        let directory = TempDir::new().unwrap();
        let [a, b] = two(way, &directory).await;
        let mut alice = a.enrol(ALICE, "alice", keys::alice()).await;
        let bundle = Published::new(ALICE, &keys::alice(), 1);
        alice.done(&Message::Publish { request: 1, bundle: bundle.signed() }).await;
        let mut bob = b.enrol(BOB, "bob", keys::bob()).await;
        let mut after = 0;
        for count in 1..=10 {
            let said = post(ALICE, &keys::alice(), count, b"hello, all");
            alice.done(&Say { request: 2, post: said.post() }.encode(&mut [0; 256]).unwrap()).await;
            // Words that come late or often cost him a question.
            while after < count {
                let payload = bob.ask(&Follow { request: 3, after }.encode(&mut [0; 16]).unwrap()).await;
                let mut page = payload;
                while page[..2] == News::CODE.to_be_bytes() {
                    page = bob.message().await;
                }
                let Ok(Message::Other(body)) = Message::decode(&page) else { panic!("{page:02x?}") };
                let page = FollowResponse::decode(body).unwrap();
                for line in Said::lines(page.lines) {
                    let line = line.unwrap();
                    assert_eq!((line.seq, line.author, line.post), (after + 1, [ALICE; 16], said.post()), "{way:?}");
                    after += 1;
                }
                if after < count {
                    assert_eq!(bob.message().await[..2], News::CODE.to_be_bytes());
                }
            }
            // He has all of it, and waits for more.
            bob.send(&Follow { request: 4, after }.encode(&mut [0; 16]).unwrap()).await;
            while bob.message().await[..2] == News::CODE.to_be_bytes() {}
        }
        a.stop().await;
        b.stop().await;
    }
}

/// Puts a message for Bob into the store behind the back of his server.
async fn put(store: &dyn Store, n: u32) {
    let item = NewItem {
        recipient: [BOB; 16],
        sender: [ALICE; 16],
        kind: ItemKind::Envelope,
        chain: [CHAIN; 8],
        n,
        wanted: 0,
        bytes: envelope(CHAIN, n, 60).into(),
        at: 1,
    };
    store.put(vec![item]).await.unwrap().remove(0).unwrap();
}

#[tokio::test]
async fn a_single_node_finds_what_nobody_told_it_of() {
    let node = Node::start(Way::Lost.config()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    for n in 0..3 {
        put(&*node.store, n).await;
        assert_eq!(number(&mut bob).await, n);
    }
    node.stop().await;
}
