//! A server over real TCP: who gets in, what becomes of messages, and what bad input gets.
//!
//! Each test has its own server. The clients are raw (`support/node.rs`): envelopes and wraps are filler, because a server
//! reads no more of them than their clear fields.

use core::time::Duration;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use ossicle::cli::serve::{Serve, SettingFlags};
use ossicle::control::{self, Operated};
use ossicle::gate::GateLimits;
use ossicle::limits::{Rate, Rates};
use ossicle::mailbox::MailboxLimits;
use ossicle::server::{Config, Policy};
use ossicle::settings::{self, Flags};
use ossicle::store::Store;
use ossicle_core::{
    Credentials, DirectoryEntry, ENVELOPE_OVERHEAD, Error, Lookup, Message, PeerError, PeerStatus, Reason, Receipt,
    Rung, Rungs, Secret, Subject, Token,
};
use ossicle_tests::node::{
    Client, Heard, Node, Published, RECORD_LIMIT, enrolled, envelope, open, refused, within, wrap,
};
use ossicle_tests::{keys, public};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ALICE: u8 = 1;
const BOB: u8 = 2;
const CAROL: u8 = 3;

async fn alice_and_bob(node: &Node) -> (Client, Client) {
    let alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    (alice, bob)
}

/// Gives `to` a chain of `from`.
async fn introduce(from: &mut Client, key: &ossicle::crypto::IdentityKey, to: &mut Client, chain: u8) {
    let bundle = Published::new(from.id[0], key, 0);
    from.done(&Message::Wrap { request: 9, to: to.id, wrap: &wrap(chain), bundle: bundle.signed() }).await;
    let delivered = to.message().await;
    let wrap = wrap(chain);
    let expected = Message::WrapDelivery { from: from.id, wrap: &wrap, bundle: bundle.signed() };
    assert_eq!(Message::decode(&delivered), Ok(expected));
}

fn accepted(chain: u8, from: u32, to: u32) -> Receipt {
    Receipt { rung: Rung::Accepted, reason: None, chain: [chain; 8], from, to, tag: None }
}

fn refusal(reason: Reason, chain: u8, n: u32) -> Receipt {
    Receipt { rung: Rung::Refused, reason: Some(reason), chain: [chain; 8], from: n, to: n, tag: None }
}

fn enroll<'c>(
    number: u8,
    name: &'c str,
    key: &'c ossicle::crypto::IdentityKey,
    token: Option<&'c Token>,
) -> Credentials<'c> {
    Credentials::Enroll { id: [number; 16], name, key: public(key), token }
}

fn rejected(result: Result<Client, Error>) -> Error {
    match result {
        Ok(_) => panic!("it was admitted"),
        Err(error) => error,
    }
}

// Who gets in.

#[tokio::test]
async fn an_enrolled_client_comes_back_with_its_key() {
    let node = Node::start(open()).await;
    let alice = node.enrol(ALICE, "alice", keys::alice()).await;
    assert_eq!((alice.settings.heartbeat, alice.settings.timeout), (15, 45));
    assert_eq!(alice.settings.store_epoch, node.store.meta().store_epoch);
    assert!(alice.settings.time > 1_700_000_000);
    alice.close().await;
    let again = node.connect(ALICE, &keys::alice()).await.expect("enrolled");
    again.close().await;
    let record = node.store.client(&[ALICE; 16]).await.unwrap().unwrap();
    assert_eq!((record.name.as_str(), record.record_limit), ("alice", RECORD_LIMIT));
    assert!(record.last_seen.is_some());
    node.stop().await;
}

#[tokio::test]
async fn a_lost_answer_to_an_enrolment_is_asked_for_again() {
    let node = Node::start(Config { enrol: Policy::Token, ..open() }).await;
    let token = node.token(7, Some(1)).await;
    for _ in 0..2 {
        let key = keys::alice();
        Client::connect(&node, &enroll(ALICE, "alice", &key, Some(&token)), &key)
            .await
            .expect("the same key under the same name");
    }
    let other = Client::connect(&node, &enroll(BOB, "bob", &keys::bob(), Some(&token)), &keys::bob()).await;
    assert_eq!(rejected(other), refused(Reason::Unauthorised), "the token was used once");
    node.stop().await;
}

#[tokio::test]
async fn a_token_is_asked_for_where_the_policy_says_so() {
    let node = Node::start(Config { enrol: Policy::Token, ..open() }).await;
    let token = node.token(7, None).await;
    let wrong_secret = Token { id: token.id, secret: Secret::new([8; 16]) };
    let unknown = Token { id: [9; 8], secret: Secret::new([7; 16]) };
    for token in [None, Some(&wrong_secret), Some(&unknown)] {
        let result = Client::connect(&node, &enroll(ALICE, "alice", &keys::alice(), token), &keys::alice()).await;
        assert_eq!(rejected(result), refused(Reason::Unauthorised));
    }
    assert_eq!(node.store.client(&[ALICE; 16]).await.unwrap(), None, "nothing was entered");
    for (number, name, key) in [(ALICE, "alice", keys::alice()), (BOB, "bob", keys::bob())] {
        Client::connect(&node, &enroll(number, name, &key, Some(&token)), &key).await.expect("the right token");
    }
    node.stop().await;
}

#[tokio::test]
async fn a_closed_server_lets_only_those_in_whom_it_knows() {
    let node = Node::start(Config { enrol: Policy::Closed, ..open() }).await;
    let result = Client::connect(&node, &enroll(ALICE, "alice", &keys::alice(), None), &keys::alice()).await;
    assert_eq!(rejected(result), refused(Reason::Forbidden));
    node.stop().await;
}

#[tokio::test]
async fn a_name_an_id_and_a_key_belong_to_one_client() {
    let node = Node::start(open()).await;
    node.enrol(ALICE, "alice", keys::alice()).await.close().await;
    for (number, name, key) in [(BOB, "ALICE", keys::bob()), (ALICE, "bob", keys::bob()), (BOB, "bob", keys::alice())] {
        let result = Client::connect(&node, &enroll(number, name, &key, None), &key).await;
        assert_eq!(rejected(result), refused(Reason::NameInUse), "{number} {name}");
    }
    for name in ["b b", "b@b", "p\u{430}ypal", "\u{202e}bob"] {
        let result = Client::connect(&node, &enroll(BOB, name, &keys::bob(), None), &keys::bob()).await;
        assert_eq!(rejected(result), refused(Reason::Malformed), "{name:?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn a_stolen_public_key_enrols_nobody() {
    let node = Node::start(open()).await;
    let result = Client::connect(&node, &enroll(ALICE, "alice", &keys::alice(), None), &keys::bob()).await;
    assert_eq!(rejected(result), refused(Reason::Unauthorised));
    node.stop().await;
}

#[tokio::test]
async fn unknown_revoked_and_wrong_keys_are_refused_alike() {
    let node = Node::start(open()).await;
    node.enrol(ALICE, "alice", keys::alice()).await.close().await;
    node.enrol(BOB, "bob", keys::bob()).await.close().await;
    assert!(node.server.revoke(&[BOB; 16]).await.unwrap());
    let (alice, bob, carol) = (keys::alice(), keys::bob(), keys::carol());
    let other_epoch = Credentials::Key { id: [ALICE; 16], key_epoch: 1, fingerprint: alice.fingerprint() };
    let pretended = Credentials::Key { id: [ALICE; 16], key_epoch: 0, fingerprint: alice.fingerprint() };
    for (what, credentials, key) in [
        ("unknown", enrolled(CAROL, &carol), &carol),
        ("revoked", enrolled(BOB, &bob), &bob),
        ("another key", enrolled(ALICE, &carol), &carol),
        ("another epoch", other_epoch, &alice),
        ("a signature by another key", pretended, &carol),
        ("enrolled again after it was revoked", enroll(BOB, "bob", &bob, None), &bob),
    ] {
        let error = rejected(Client::connect(&node, &credentials, key).await);
        let expected = if what.starts_with("enrolled") { Reason::NameInUse } else { Reason::Unauthorised };
        assert_eq!(error, refused(expected), "{what}");
    }
    node.connect(ALICE, &alice).await.expect("nobody else is concerned");
    node.stop().await;
}

#[tokio::test]
async fn a_new_connection_takes_over_only_once_it_has_authenticated() {
    let node = Node::start(open()).await;
    let mut first = node.enrol(ALICE, "alice", keys::alice()).await;
    rejected(Client::connect(&node, &enrolled(ALICE, &keys::bob()), &keys::bob()).await);
    let mut half_way = Client::hello(&node, RECORD_LIMIT).await;
    first.sync().await;
    let mut second = node.connect(ALICE, &keys::alice()).await.expect("enrolled");
    assert_eq!(first.hear().await, Heard::Closed(Some(Reason::TakenOver)));
    assert_eq!(first.hear().await, Heard::Ended);
    second.sync().await;
    half_way.authenticate(&enrolled(ALICE, &keys::alice()), &keys::alice()).await.unwrap();
    half_way.settle().await.unwrap();
    assert_eq!(second.hear().await, Heard::Closed(Some(Reason::TakenOver)));
    half_way.sync().await;
    assert_eq!(node.server.connected(), 1);
    node.stop().await;
}

#[tokio::test]
async fn too_many_handshakes_are_refused_with_the_time_to_wait() {
    let rates = Rates { handshakes: Rate { per_second: 1, burst: 2 }, ..Rates::default() };
    let node = Node::start(Config { rates, ..open() }).await;
    node.enrol(ALICE, "alice", keys::alice()).await.close().await;
    let mut errors = Vec::new();
    for _ in 0..4 {
        errors.extend(node.connect(ALICE, &keys::alice()).await.err());
    }
    assert!(!errors.is_empty());
    for error in errors {
        assert!(
            matches!(error, Error::Peer(PeerError::Refused { reason: Reason::Rate, retry_after: 1.. })),
            "{error:?}"
        );
    }
    node.stop().await;
}

// What becomes of messages.

#[tokio::test]
async fn messages_arrive_in_order_and_receipts_come_back_unchanged() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let wanted = Rungs::NONE.with(Rung::Accepted).with(Rung::Delivered);
    let mut records = Vec::new();
    for n in 0..10 {
        records.extend(alice.sealed(&Message::Send { wanted, envelope: &envelope(5, n, 60) }));
    }
    alice.write(&records).await;
    for n in 0..10 {
        let payload = bob.message().await;
        assert_eq!(Message::decode(&payload), Ok(Message::Deliver { wanted, envelope: &envelope(5, n, 60) }));
    }
    let mut next = 0;
    while next < 10 {
        let receipt = alice.told().await;
        assert_eq!(receipt, accepted(5, next, receipt.to));
        next = receipt.to + 1;
    }
    for receipt in [
        Receipt { rung: Rung::Delivered, reason: None, chain: [5; 8], from: 0, to: 9, tag: Some([1; 16]) },
        Receipt { rung: Rung::Opened, reason: None, chain: [5; 8], from: 0, to: 4, tag: Some([2; 16]) },
        Receipt { rung: Rung::Refused, reason: Some(Reason::Gap), chain: [5; 8], from: 8, to: 8, tag: None },
    ] {
        bob.send(&Message::Tell(receipt)).await;
        assert_eq!(alice.told().await, receipt);
    }
    node.stop().await;
}

#[tokio::test]
async fn only_the_recipient_tells_and_only_what_is_his_to_say() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let delivered = Receipt { rung: Rung::Delivered, tag: Some([1; 16]), ..accepted(5, 0, 3) };
    assert_eq!(carol.refusal(&Message::Tell(delivered)).await, Reason::Forbidden);
    assert_eq!(alice.refusal(&Message::Tell(delivered)).await, Reason::Forbidden);
    assert_eq!(bob.refusal(&Message::Tell(Receipt { chain: [6; 8], ..delivered })).await, Reason::Forbidden);
    assert_eq!(bob.refusal(&Message::Tell(accepted(5, 0, 3))).await, Reason::Malformed);
    assert_eq!(bob.refusal(&Message::Tell(Receipt { from: 4, ..delivered })).await, Reason::Malformed);
    bob.send(&Message::Tell(delivered)).await;
    assert_eq!(alice.told().await, delivered);
    node.stop().await;
}

#[tokio::test]
async fn what_cannot_be_routed_is_refused_with_its_reason() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;

    alice.say(4, 0, Rungs::NONE).await;
    assert_eq!(alice.told().await, refusal(Reason::Rekey, 4, 0), "no such chain");
    carol.say(5, 0, Rungs::NONE).await;
    assert_eq!(carol.told().await, refusal(Reason::Rekey, 5, 0), "another's chain looks like none");
    bob.say(5, 0, Rungs::NONE).await;
    assert_eq!(bob.told().await, refusal(Reason::Rekey, 5, 0), "the recipient's is not his own");

    bob.close().await;
    let mut small = Client::connect_with(&node, &enrolled(BOB, &keys::bob()), &keys::bob(), 1024).await.unwrap();
    small.listen().await;
    let longest = 1024 - 24 - 3;
    alice.send(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(5, 2, longest + 1) }).await;
    assert_eq!(alice.told().await, refusal(Reason::TooLarge, 5, 2));
    let fits = envelope(5, 3, longest);
    alice.send(&Message::Send { wanted: Rungs::NONE, envelope: &fits }).await;
    let payload = small.message().await;
    assert_eq!(Message::decode(&payload), Ok(Message::Deliver { wanted: Rungs::NONE, envelope: &fits }));
    node.stop().await;
}

#[tokio::test]
async fn wraps_are_refused_with_their_reason_and_bind_a_chain_to_its_sender() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;

    let (of_alice, of_carol) = (Published::new(ALICE, &keys::alice(), 0), Published::new(CAROL, &keys::carol(), 0));
    let (five, six) = (wrap(5), wrap(6));
    let message = |to: u8, wrap, bundle| Message::Wrap { request: 1, to: [to; 16], wrap, bundle };
    assert_eq!(carol.refusal(&message(BOB, &five, of_carol.signed())).await, Reason::NameInUse);
    assert_eq!(carol.refusal(&message(99, &six, of_carol.signed())).await, Reason::Unknown);
    assert_eq!(carol.refusal(&message(BOB, &six, of_alice.signed())).await, Reason::Forbidden);
    assert_eq!(carol.refusal(&message(BOB, &six[1..], of_carol.signed())).await, Reason::Malformed);
    // None of these has taken the id.
    introduce(&mut alice, &keys::alice(), &mut bob, 6).await;
    node.stop().await;
}

/// What a client hears of one chain, in order, until this number has come.
async fn numbers(client: &mut Client, last: u32) -> Vec<u32> {
    let mut heard = Vec::new();
    while heard.last() != Some(&last) {
        let payload = client.message().await;
        let Ok(Message::Deliver { envelope, .. }) = Message::decode(&payload) else { panic!("a message: {payload:?}") };
        heard.push(u32::from_be_bytes(*envelope[8..].first_chunk().unwrap()));
    }
    heard
}

fn stored(chain: u8, from: u32, to: u32) -> Receipt {
    Receipt { rung: Rung::Stored, ..accepted(chain, from, to) }
}

#[tokio::test]
async fn what_a_broken_connection_did_not_get_waits_for_the_next_one() {
    const MESSAGES: u32 = 400;
    let mailbox = MailboxLimits { bytes: 1 << 20, ..MailboxLimits::default() };
    let node = Node::start(Config { mailbox, ..open() }).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    // More than any socket buffers and than may be in memory, to somebody who does not read.
    let (wanted, long) = (Rungs::NONE.with(Rung::Accepted), 16_000);
    for n in 0..MESSAGES {
        alice.send(&Message::Send { wanted, envelope: &envelope(5, n, long) }).await;
        assert_eq!(alice.told().await, accepted(5, n, n));
    }
    drop(bob);
    alice.say(5, MESSAGES, wanted).await;
    assert_eq!(alice.told().await, accepted(5, MESSAGES, MESSAGES));

    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    assert!(bob.settings.waiting > 0);
    bob.listen().await;
    let heard = numbers(&mut bob, MESSAGES).await;
    // What only the socket had is lost, as its sender wanted no word of the recipient's; nothing else is.
    assert!(heard[0] > 0);
    assert_eq!(heard, (heard[0]..=MESSAGES).collect::<Vec<_>>());
    assert_eq!(bob.waited.len(), heard.len());
    node.stop().await;
}

#[tokio::test]
async fn what_a_recipient_did_not_answer_for_comes_again() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let wanted = Rungs::NONE.with(Rung::Delivered);
    for n in 0..5 {
        alice.say(5, n, wanted).await;
    }
    assert_eq!(numbers(&mut bob, 4).await, [0, 1, 2, 3, 4]);
    assert_eq!(bob.waited.len(), 1, "only the wrap: the messages passed");
    let delivered = Receipt { rung: Rung::Delivered, tag: Some([1; 16]), ..accepted(5, 0, 1) };
    bob.send(&Message::Tell(delivered)).await;
    bob.send(&Message::Tell(Receipt {
        rung: Rung::Refused,
        reason: Some(Reason::Gap),
        tag: None,
        ..accepted(5, 3, 3)
    }))
    .await;
    assert_eq!(alice.told().await, delivered);
    assert_eq!(alice.told().await, refusal(Reason::Gap, 5, 3));
    drop(bob);
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    bob.listen().await;
    assert_eq!(numbers(&mut bob, 4).await, [2, 4]);
    node.stop().await;
}

#[tokio::test]
async fn messages_wait_for_whoever_is_away_through_a_kill_of_the_server() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let wanted = Rungs::NONE.with(Rung::Stored).with(Rung::Accepted);
    // Connected, but not listening.
    bob.send(&Message::NotListening).await;
    bob.sync().await;
    let mut records = Vec::new();
    for n in 0..100 {
        records.extend(alice.sealed(&Message::Send { wanted, envelope: &envelope(5, n, 60) }));
    }
    alice.write(&records).await;
    let mut next = 0;
    while next < 100 {
        let receipt = alice.told().await;
        assert_eq!(receipt, stored(5, next, receipt.to));
        next = receipt.to + 1;
    }
    // The same again is a repetition, another under the same name is not.
    alice.send(&Message::Send { wanted, envelope: &envelope(5, 7, 60) }).await;
    assert_eq!(alice.told().await, stored(5, 7, 7));
    alice.send(&Message::Send { wanted, envelope: &envelope(5, 7, 61) }).await;
    assert_eq!(alice.told().await, refusal(Reason::Rewound, 5, 7));
    let six = wrap(6);
    let bundle = Published::new(ALICE, &keys::alice(), 0);
    alice.done(&Message::Wrap { request: 9, to: [BOB; 16], wrap: &six, bundle: bundle.signed() }).await;
    drop((alice, bob));

    let node = Node::start_on(node.kill().await, open()).await;
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    assert_eq!(bob.settings.waiting, 101);
    bob.acknowledges = false;
    bob.listen().await;
    assert_eq!(numbers(&mut bob, 99).await, (0..100).collect::<Vec<_>>());
    let payload = bob.message().await;
    let expected = Message::WrapDelivery { from: [ALICE; 16], wrap: &six, bundle: bundle.signed() };
    assert_eq!(Message::decode(&payload), Ok(expected));
    assert!(bob.waited.is_sorted());
    // One word for forty of them; what was not acknowledged comes again.
    let seq = bob.waited[39];
    bob.send(&Message::Acknowledge { seq }).await;
    bob.send(&Message::Acknowledge { seq: bob.waited[3] }).await;
    bob.sync().await;
    bob.close().await;
    // What was acknowledged goes in its own time.
    within(async {
        while node.store.waiting(&[BOB; 16]).await.unwrap().items != 61 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    assert_eq!(bob.settings.waiting, 61);
    bob.listen().await;
    assert_eq!(numbers(&mut bob, 99).await, (40..100).collect::<Vec<_>>());
    bob.message().await;
    // A live message behind them.
    let mut alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    alice.say(5, 100, Rungs::NONE).await;
    assert_eq!(numbers(&mut bob, 100).await, [100]);
    node.stop().await;
}

#[tokio::test]
async fn an_acknowledgement_of_what_was_never_given_ends_the_connection() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    bob.acknowledges = false;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    // Bob's number is nothing to Carol.
    carol.send(&Message::Acknowledge { seq: bob.waited[0] }).await;
    assert_eq!(carol.hear().await, Heard::Closed(Some(Reason::Malformed)));
    bob.send(&Message::Acknowledge { seq: bob.waited[0] + 1 }).await;
    assert_eq!(bob.hear().await, Heard::Closed(Some(Reason::Malformed)));
    let bob = node.connect(BOB, &keys::bob()).await.unwrap();
    assert_eq!(bob.settings.waiting, 1);
    node.stop().await;
}

#[tokio::test]
async fn receipts_wait_for_a_sender_who_is_away_and_come_without_listening() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    alice.say(5, 0, Rungs::NONE.with(Rung::Delivered).with(Rung::Opened)).await;
    assert_eq!(numbers(&mut bob, 0).await, [0]);
    alice.close().await;
    let delivered = Receipt { rung: Rung::Delivered, tag: Some([1; 16]), ..accepted(5, 0, 0) };
    let opened = Receipt { rung: Rung::Opened, tag: Some([2; 16]), ..delivered };
    for receipt in [delivered, opened] {
        bob.send(&Message::Tell(receipt)).await;
    }
    bob.sync().await;
    bob.close().await;
    let mut alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    assert_eq!(alice.told().await, delivered);
    assert_eq!(alice.told().await, opened);
    alice.sync().await;
    alice.close().await;
    // What was acknowledged goes in its own time.
    within(async {
        while node.store.waiting(&[ALICE; 16]).await.unwrap().items != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    assert_eq!(alice.settings.waiting, 0);
    node.stop().await;
}

#[tokio::test]
async fn what_waits_for_too_long_and_for_the_revoked_is_refused_to_its_senders() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    bob.close().await;
    let wanted = Rungs::NONE.with(Rung::Stored);
    for n in 0..2 {
        alice.say(5, n, wanted).await;
        assert_eq!(alice.told().await, stored(5, n, n));
    }
    assert_eq!(node.server.revoke(&[BOB; 16]).await, Ok(true));
    for n in 0..2 {
        assert_eq!(alice.told().await, refusal(Reason::Unknown, 5, n));
    }
    alice.say(5, 2, wanted).await;
    assert_eq!(alice.told().await, refusal(Reason::Rekey, 5, 2), "his chains went with him");
    alice.close().await;

    // A server that keeps nothing for longer than no time at all looks when it starts.
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    let mut alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    carol.listen().await;
    introduce(&mut alice, &keys::alice(), &mut carol, 6).await;
    carol.close().await;
    alice.say(6, 0, wanted).await;
    assert_eq!(alice.told().await, stored(6, 0, 0));
    alice.close().await;
    let directory = node.stop().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let node = Node::start_on(directory, Config { queue_age: Duration::ZERO, ..open() }).await;
    let mut alice = node.connect(ALICE, &keys::alice()).await.unwrap();
    assert_eq!(alice.told().await, refusal(Reason::Expired, 6, 0));
    let carol = node.connect(CAROL, &keys::carol()).await.unwrap();
    assert_eq!(carol.settings.waiting, 0);
    node.stop().await;
}

#[tokio::test]
async fn a_message_that_comes_too_fast_is_refused_with_the_time_to_wait() {
    let rates = Rates { messages: Rate { per_second: 1, burst: 10 }, ..Rates::default() };
    let node = Node::start(Config { rates, ..open() }).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    for n in 0..20 {
        alice.say(5, n, Rungs::NONE).await;
    }
    let mut reasons = Vec::new();
    while reasons.len() < 20 {
        let payload = alice.message().await;
        match Message::decode(&payload) {
            Ok(Message::Told(receipt)) => {
                assert_eq!(receipt.from, reasons.len() as u32);
                reasons.extend((receipt.from..=receipt.to).map(|_| receipt.reason));
            }
            Ok(Message::Refused { request: 0, reason: Reason::Rate, retry_after: Some(1..) }) => {}
            other => panic!("a receipt or the time to wait instead of {other:?}"),
        }
    }
    assert_eq!(reasons.first(), Some(&Some(Reason::Rekey)));
    assert_eq!(reasons.last(), Some(&Some(Reason::Rate)));
    let lookup = Lookup { request: 3, key: false, bundle: false, subject: Subject::Name("alice") };
    loop {
        let payload = alice.ask(&Message::Lookup(lookup)).await;
        if let Ok(Message::Refused { request: 3, reason: Reason::Rate, retry_after: Some(1..) }) =
            Message::decode(&payload)
        {
            break;
        }
    }
    node.stop().await;
}

// The directory.

fn by_name(name: &str) -> Message<'_> {
    Message::Lookup(Lookup { request: 1, key: false, bundle: false, subject: Subject::Name(name) })
}

#[tokio::test]
async fn the_directory_answers_what_is_asked_and_no_more() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let bundle = Published::new(BOB, &keys::bob(), 0);
    bob.done(&Message::Publish { request: 2, bundle: bundle.signed() }).await;

    let entry = DirectoryEntry {
        id: [BOB; 16],
        name: "bob",
        key_epoch: 0,
        record_limit: RECORD_LIMIT,
        status: PeerStatus::Online,
        modulus: None,
        bundle: None,
    };
    let answer = alice.ask(&by_name("BOB")).await;
    assert_eq!(Message::decode(&answer), Ok(Message::LookupResponse { request: 1, entry }));
    let lookup = Lookup { request: 4, key: true, bundle: true, subject: Subject::Id([BOB; 16]) };
    let answer = alice.ask(&Message::Lookup(lookup)).await;
    let key = keys::bob();
    let full = DirectoryEntry { modulus: Some(key.modulus()), bundle: Some(bundle.signed()), ..entry };
    assert_eq!(Message::decode(&answer), Ok(Message::LookupResponse { request: 4, entry: full }));

    for name in ["carol", "not a name", ""] {
        assert_eq!(alice.refusal(&by_name(name)).await, Reason::Unknown, "{name:?}");
    }
    bob.close().await;
    let answer = alice.ask(&by_name("bob")).await;
    match Message::decode(&answer) {
        Ok(Message::LookupResponse { entry, .. }) => {
            assert!(matches!(entry.status, PeerStatus::Offline { last_seen: Some(_) }), "{entry:?}");
        }
        other => panic!("an entry instead of {other:?}"),
    }
    node.stop().await;
}

#[tokio::test]
async fn an_answer_that_the_asker_cannot_take_is_refused() {
    let node = Node::start(open()).await;
    let key = keys::server4096();
    let mut big = node.enrol(BOB, "bob", keys::server4096()).await;
    let bundle = Published::new(BOB, &key, 0);
    big.done(&Message::Publish { request: 2, bundle: bundle.signed() }).await;
    let alice = keys::alice();
    let mut small = Client::connect_with(&node, &enroll(ALICE, "alice", &alice, None), &alice, 1024).await.unwrap();
    for (key, bundle) in [(true, false), (false, true)] {
        let answer =
            small.ask(&Message::Lookup(Lookup { request: 1, key, bundle, subject: Subject::Id([BOB; 16]) })).await;
        assert!(matches!(Message::decode(&answer), Ok(Message::LookupResponse { .. })));
    }
    let both = Message::Lookup(Lookup { request: 1, key: true, bundle: true, subject: Subject::Id([BOB; 16]) });
    assert_eq!(small.refusal(&both).await, Reason::TooLarge);
    node.stop().await;
}

#[tokio::test]
async fn the_list_comes_in_pages_sorted_by_name() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let mut expected =
        vec![("alice".to_owned(), PeerStatus::Offline { last_seen: None }), ("bob".into(), PeerStatus::Online)];
    for number in 0..60 {
        let name = format!("Sensor-{number:02}-{}", "x".repeat(40));
        let modulus = {
            let mut modulus = keys::carol().modulus().to_vec();
            modulus[10] = number;
            modulus
        };
        let enrolment = ossicle::store::Enrolment {
            id: [100 + number; 16],
            name: ossicle::name::Name::parse(&name).unwrap(),
            modulus,
            token_id: None,
            enrolled_by: None,
            record_limit: 1024,
            now: 1,
        };
        node.store.enrol(enrolment).await.unwrap();
        expected.push((name, PeerStatus::Offline { last_seen: None }));
    }
    let mut small = Client::connect_with(&node, &enrolled(ALICE, &keys::alice()), &keys::alice(), 1024).await.unwrap();
    assert_eq!(alice.hear().await, Heard::Closed(Some(Reason::TakenOver)));
    for (client, at_least) in [(&mut small, 4), (&mut bob, 1)] {
        let (mut names, mut after, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let answer = client.ask(&Message::List { request: 8, after: &after }).await;
            let Ok(Message::ListResponse(list)) = Message::decode(&answer) else { panic!("a list") };
            assert_eq!(list.request(), 8);
            pages += 1;
            for line in list.lines() {
                let line = line.expect("a whole line");
                after = line.name.to_owned();
                names.push((after.clone(), line.status));
            }
            if !list.more() {
                break;
            }
        }
        // When a client that does not listen was last seen is its own matter.
        names[0].1 = PeerStatus::Offline { last_seen: None };
        assert_eq!(names, expected);
        assert!(pages >= at_least, "{pages}");
    }
    assert_eq!(bob.refusal(&Message::List { request: 8, after: "a b" }).await, Reason::Malformed);
    node.stop().await;
}

#[tokio::test]
async fn a_bundle_is_the_clients_own_and_the_next_one() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let message = |published: &Published| {
        let published = Published { bundle: published.bundle.clone(), signature: published.signature.clone() };
        Box::leak(Box::new(published))
    };
    let publish = |bundle: &'static mut Published| Message::Publish { request: 2, bundle: bundle.signed() };
    let key = keys::alice();
    let first = Published::new(ALICE, &key, 3);
    alice.done(&publish(message(&first))).await;
    alice.done(&publish(message(&first))).await;
    // Epochs may be missing: a restored server knows fewer than its clients.
    alice.done(&publish(message(&Published::new(ALICE, &key, 4)))).await;
    let mut forged = Published::new(ALICE, &key, 5);
    forged.signature[7] ^= 1;
    let mut cut = Published::new(ALICE, &key, 5);
    cut.bundle.pop();
    let other_key = ossicle_core::Bundle { key: [9; 32], ..ossicle_core::Bundle::decode(&first.bundle).unwrap() };
    for (what, published, reason) in [
        ("an older one", Published::new(ALICE, &key, 3), Reason::Rewound),
        ("another's", Published::new(BOB, &key, 5), Reason::Forbidden),
        ("another key's", Published::sign(&other_key, &key), Reason::Forbidden),
        ("forged", forged, Reason::Unauthorised),
        ("cut", cut, Reason::Malformed),
    ] {
        assert_eq!(alice.refusal(&publish(message(&published))).await, reason, "{what}");
    }
    assert_eq!(node.store.bundle(&[ALICE; 16]).await.unwrap().map(|bundle| bundle.epoch), Some(4));
    node.stop().await;
}

#[tokio::test]
async fn a_revoked_client_is_thrown_out_and_his_messages_refused() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    assert!(node.server.revoke(&[BOB; 16]).await.unwrap());
    assert_eq!(bob.hear().await, Heard::Closed(Some(Reason::Unauthorised)));
    assert_eq!(bob.hear().await, Heard::Ended);
    alice.say(5, 0, Rungs::NONE).await;
    assert_eq!(alice.told().await, refusal(Reason::Rekey, 5, 0));
    let bundle = Published::new(ALICE, &keys::alice(), 0);
    let again = Message::Wrap { request: 1, to: [BOB; 16], wrap: &wrap(6), bundle: bundle.signed() };
    assert_eq!(alice.refusal(&again).await, Reason::Unknown);
    node.stop().await;
}

// What bad input gets.

/// Asserts that the server hangs up without a byte.
async fn silence(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    // A reset is as silent as an end.
    let _ = within(stream.read_to_end(&mut bytes)).await;
    assert_eq!(bytes, b"");
}

#[tokio::test]
async fn before_authentication_every_fault_is_met_with_silence() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let first_records: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n\r\n",
        // Another version, another type, too short, too long for a hello, a hello of nothing.
        &[9, 0, 1, 0, 0, 84, 0, 0],
        &[1, 0, 3, 0, 0, 84, 0, 0],
        &[1, 0, 1, 0, 0, 7, 0, 0],
        &[1, 0, 1, 0, 0xff, 0xff, 0, 0],
        &[1, 0, 1, 0, 0, 8, 0, 0],
        &[1, 0, 1, 0, 0, 84, 0, 1],
    ];
    for first in first_records {
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        stream.write_all(first).await.unwrap();
        // What is not whole ends with the stream.
        let _ = stream.shutdown().await;
        silence(&mut stream).await;
    }
    // A forged, a cut and an oversized {ClientAuth}.
    for fault in 0..3 {
        let mut client = Client::hello(&node, RECORD_LIMIT).await;
        let mut head = [0; 8];
        within(client.stream.read_exact(&mut head)).await.unwrap();
        let rest = match fault {
            0 => [&[1, 0, 2, 0, 0, 200, 0, 0][..], &[0; 192]].concat(),
            1 => [&[1, 0, 2, 0, 0, 200, 0, 0][..], &[0; 20]].concat(),
            _ => vec![1, 0, 2, 0, 0x40, 0, 0, 0],
        };
        let mut hello = [0; 71];
        within(client.stream.read_exact(&mut hello)).await.unwrap();
        let mut auth = [0; 8];
        within(client.stream.read_exact(&mut auth)).await.unwrap();
        let mut sealed = vec![0; usize::from(u16::from_be_bytes([auth[4], auth[5]])) - 8];
        within(client.stream.read_exact(&mut sealed)).await.unwrap();
        client.write(&rest).await;
        let _ = client.stream.shutdown().await;
        silence(&mut client.stream).await;
    }
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    node.stop().await;
}

#[tokio::test]
async fn an_all_zero_agreement_is_met_with_silence() {
    let node = Node::start(open()).await;
    // A right hello, but for its X25519 key.
    let mut hello = vec![1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0x40, 0x18, 0, 0];
    hello.extend([7; 32]);
    hello.extend([0; 32]);
    hello.extend([0, 0]);
    hello[5] = u8::try_from(hello.len()).unwrap();
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    silence(&mut stream).await;
    // With another key the same hello is answered: it was the key.
    hello[50] = 9;
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut answer = [0; 8];
    within(stream.read_exact(&mut answer)).await.expect("a ServerHello");
    node.stop().await;
}

#[tokio::test]
async fn afterwards_a_bad_record_ends_its_connection_and_no_other() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    for fault in ["forged", "replayed", "reordered", "typed", "long", "short"] {
        let mut carol = match node.connect(CAROL, &keys::carol()).await {
            Ok(carol) => carol,
            Err(_) => node.enrol(CAROL, "carol", keys::carol()).await,
        };
        let status = Message::Status { request: 1 };
        let good = carol.sealed(&status);
        let next = carol.sealed(&status);
        let bad = match fault {
            "forged" => good.iter().enumerate().map(|(i, byte)| if i == 9 { byte ^ 1 } else { *byte }).collect(),
            "replayed" => {
                carol.write(&good).await;
                carol.message().await;
                good
            }
            "reordered" => next,
            "typed" => good.iter().enumerate().map(|(i, byte)| if i == 2 { 2 } else { *byte }).collect(),
            "long" => vec![1, 0, 3, 0, 0x40, 0x19, 0, 0],
            _ => vec![1, 0, 3, 0, 0, 23, 0, 0],
        };
        carol.write(&bad).await;
        assert_eq!(carol.hear().await, Heard::Ended, "{fault}");
    }
    alice.say(5, 0, Rungs::NONE).await;
    bob.message().await;
    node.stop().await;
}

#[tokio::test]
async fn a_torn_record_is_put_together() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let mut records = Vec::new();
    for n in 0..3 {
        records.extend(alice.sealed(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(5, n, 100) }));
    }
    for byte in records.chunks(7) {
        alice.write(byte).await;
        tokio::task::yield_now().await;
    }
    for n in 0..3 {
        let payload = bob.message().await;
        assert_eq!(
            Message::decode(&payload),
            Ok(Message::Deliver { wanted: Rungs::NONE, envelope: &envelope(5, n, 100) })
        );
    }
    // A record that never becomes whole ends with its connection.
    let record = alice.sealed(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(5, 3, 100) });
    alice.write(&record[..50]).await;
    drop(alice);
    bob.sync().await;
    node.stop().await;
}

#[tokio::test]
async fn a_malformed_request_gets_one_refusal_and_the_connection_stays() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    // An envelope without a number, answers that nobody asked for, a delivery by a client.
    let receipt = accepted(5, 0, 0);
    for (message, reason) in [
        (Message::Send { wanted: Rungs::NONE, envelope: &[0; ENVELOPE_OVERHEAD - 1] }, Reason::Malformed),
        (Message::Send { wanted: Rungs::NONE, envelope: &[] }, Reason::Malformed),
        (Message::Done { request: 4 }, Reason::Unsupported),
        (Message::Told(receipt), Reason::Unsupported),
        (Message::Deliver { wanted: Rungs::NONE, envelope: &envelope(5, 0, 60) }, Reason::Unsupported),
        (Message::Settings(alice.settings), Reason::Unsupported),
    ] {
        assert_eq!(alice.refusal(&message).await, reason, "{message:?}");
    }
    alice.sync().await;
    alice.say(5, 0, Rungs::NONE).await;
    bob.message().await;
    node.stop().await;
}

#[tokio::test]
async fn a_half_said_hello_is_given_up() {
    let node = Node::start(Config { hello_within: Duration::from_millis(100), ..open() }).await;
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&[1]).await.unwrap();
    silence(&mut stream).await;
    let config = Config { handshake_within: Duration::from_millis(500), ..open() };
    let node = Node::start(config).await;
    let mut client = Client::hello(&node, RECORD_LIMIT).await;
    let mut bytes = Vec::new();
    let _ = within(client.stream.read_to_end(&mut bytes)).await;
    assert!(!bytes.is_empty(), "the server has answered, then given up");
    node.stop().await;
}

#[tokio::test]
async fn more_strangers_than_the_server_bears_are_turned_away() {
    let node = Node::start(Config { gate: GateLimits { unauthenticated: 2, ..GateLimits::default() }, ..open() }).await;
    let mut strangers = Vec::new();
    for _ in 0..2 {
        let client = Client::hello(&node, RECORD_LIMIT).await;
        within(client.stream.readable()).await.unwrap();
        strangers.push(client);
    }
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    silence(&mut stream).await;
    let mut first = strangers.remove(0);
    let key = keys::alice();
    first.authenticate(&enroll(ALICE, "alice", &key, None), &key).await.unwrap();
    first.settle().await.expect("who is authenticated is no stranger");
    Client::hello(&node, RECORD_LIMIT).await.stream.readable().await.unwrap();
    node.stop().await;
}

// While connected, and at the end.

#[tokio::test]
async fn a_silent_client_is_asked_then_given_up() {
    let node = Node::start(Config { heartbeat: 1, timeout: 2, ..open() }).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bytes = Vec::new();
    within(alice.stream.read_to_end(&mut bytes)).await.expect("an orderly end");
    assert_eq!(bytes.len(), 8 + 2 + 1 + 16, "one question after the settings, and no more");
    node.stop().await;
}

#[tokio::test]
async fn a_client_that_answers_is_kept() {
    let node = Node::start(Config { heartbeat: 1, timeout: 2, ..open() }).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    let quiet = tokio::time::timeout(Duration::from_secs(4), async { tokio::join!(alice.hear(), bob.hear()) }).await;
    assert!(quiet.is_err(), "nobody was dropped: {quiet:?}");
    alice.say(5, 0, Rungs::NONE).await;
    bob.message().await;
    node.stop().await;
}

#[tokio::test]
async fn keys_are_renewed_while_connected() {
    let node = Node::start(Config { heartbeat: 1, key_age: Duration::ZERO, ..open() }).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    introduce(&mut alice, &keys::alice(), &mut bob, 5).await;
    for n in 0..3 {
        let mut out = [0; 64];
        let len = alice.connection.update_key(&mut out).unwrap();
        alice.write(&out[..len]).await;
        alice.say(5, n, Rungs::NONE).await;
        bob.message().await;
    }
    // The server renews its own after a time, here at each sign of life.
    while bob.renewals < 2 {
        let quiet = tokio::time::timeout(Duration::from_millis(100), bob.hear()).await;
        assert!(quiet.is_err(), "nothing but signs of life: {quiet:?}");
    }
    alice.say(5, 3, Rungs::NONE).await;
    bob.message().await;
    node.stop().await;
}

#[tokio::test]
async fn a_stopping_server_tells_everybody() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let stranger = Client::hello(&node, RECORD_LIMIT).await;
    stranger.stream.readable().await.unwrap();
    node.stop().await;
    for client in [&mut alice, &mut bob] {
        assert_eq!(client.hear().await, Heard::Closed(Some(Reason::Unavailable)));
        assert_eq!(client.hear().await, Heard::Ended);
    }
}

// The operator.

#[tokio::test]
async fn the_operator_revokes_anybody_while_the_server_runs_and_while_it_does_not() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = alice_and_bob(&node).await;
    let data = node.directory.path().to_owned();
    // A dead server's socket is in the way of nobody.
    drop(control::bind(&data).unwrap());
    let listener = control::bind(&data).unwrap();
    assert_eq!(data.join("control").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let settings = settings::resolve(&Flags::default(), &|_| None).unwrap();
    let operated = Arc::new(Operated::new(node.server.clone(), settings, node.address, None));
    let operators = tokio::spawn(control::serve(listener, operated));
    let error = control::revoke(&data, "nobody").await.unwrap_err();
    assert_eq!(error.to_string(), "there is no client named nobody here");
    control::revoke(&data, "BOB").await.unwrap();
    assert_eq!(bob.hear().await, Heard::Closed(Some(Reason::Unauthorised)));
    alice.sync().await;
    operators.abort();
    let _ = operators.await;

    let directory = node.stop().await;
    assert_eq!(alice.hear().await, Heard::Closed(Some(Reason::Unavailable)));
    control::revoke(directory.path(), "alice").await.unwrap();
    let store = ossicle::store::SqliteStore::open(directory.path()).unwrap();
    assert!(store.client(&[ALICE; 16]).await.unwrap().unwrap().revoked);
}

fn serve(data: &std::path::Path, port: u16) -> Serve {
    let port = port.to_string();
    let settings = [("bind", "127.0.0.1"), ("port", &port), ("enroll", "closed"), ("rsa", "2048")];
    let mut flags = Flags::default();
    flags.values.extend(settings.map(|(name, value)| (name.to_owned(), value.into())));
    flags.values.insert("data".to_owned(), data.into());
    Serve { settings: SettingFlags(flags), check: false, json: false }
}

#[tokio::test]
async fn what_prevents_a_start_is_one_sentence_that_says_what_to_do() {
    let node = Node::start(open()).await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let data = tempfile::tempdir().unwrap();
    let error = serve(&data.path().join("data"), port).run().await.unwrap_err();
    let expected =
        format!("port {port} on 127.0.0.1 is in use: stop the program that uses it, or choose another with --port");
    assert_eq!(format!("{error:#}"), expected);

    let error = serve(node.directory.path(), 0).run().await.unwrap_err();
    assert!(format!("{error:#}").contains("is in use by another process: stop it"), "{error:#}");

    let file = data.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = serve(&file.join("data"), 0).run().await.unwrap_err();
    assert!(format!("{error:#}").contains("data"), "{error:#}");
    assert!(!format!("{error:#}").contains('\n'));

    let readable = data.path().join("readable");
    std::fs::create_dir(&readable).unwrap();
    std::fs::write(readable.join("server.key"), "no key").unwrap();
    let error = serve(&readable, 0).run().await.unwrap_err();
    assert!(format!("{error:#}").contains("chmod 600"), "{error:#}");
    node.stop().await;
}
