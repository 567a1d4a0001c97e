//! HelloRetry: what a server under load asks of strangers, what it never asks of those it knows, and what somebody in its
//! place can make a client do.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Arc;

use ossicle::clock::Clock;
use ossicle::crypto::IdentityKey;
use ossicle::gate::GateLimits;
use ossicle::server::Config;
use ossicle_core::{
    ApiMisuse, Ask, BufferError, COOKIE_LEN, ClientConfig, Connection, CookieKey, Credentials, Error, Event,
    MAX_PUZZLE_BITS, Message, PeerError, Presented, Puzzle, Received, Rungs, Secret, ServerConfig,
};
use ossicle_tests::node::{Client, Node, Published, open, within, wrap};
use ossicle_tests::raw::clear;
use ossicle_tests::{Pair, SERVER_ID, keys, public, seed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// What the next tests ask for: some thousand hashes.
const BITS: u8 = 12;
const COOKIE: &[u8] = b"a cookie";

fn client_config() -> ClientConfig {
    let server = Some(public(&keys::server()).fingerprint());
    ClientConfig { server, ask_for_key: false, record_limit: 16_408 }
}

/// A server that wants work.
fn busy() -> Connection {
    let fingerprint = public(&keys::server()).fingerprint();
    let mut server = Connection::server(ServerConfig { id: SERVER_ID, fingerprint, record_limit: 16_408 }, &seed(2));
    server.demand_work();
    server
}

fn hello(client: &mut Connection) -> Vec<u8> {
    let mut out = [0; 512];
    let len = client.transmit(&mut out).unwrap();
    assert!(len > 0, "a hello, and not some tries");
    out[..len].to_vec()
}

fn retry(cookie: &[u8], bits: u8) -> Vec<u8> {
    let length = [u8::try_from(cookie.len()).unwrap()];
    clear(0x0120, &[&[bits], &length[..], cookie].concat())
}

/// A client that was asked for this.
fn asked(bits: u8) -> Puzzle {
    let mut client: Connection = Connection::client(client_config(), &seed(1));
    hello(&mut client);
    assert_eq!(client.receive(&mut retry(COOKIE, bits)).err(), Some(PeerError::Retry.into()));
    client.puzzle().unwrap()
}

/// A client that presents this, solved.
fn worked(puzzle: &Puzzle, seeded: u8) -> Connection {
    let mut client = Connection::client(client_config(), &seed(seeded));
    client.present(puzzle).unwrap();
    while client.solve() {}
    client
}

#[test]
fn a_stranger_is_asked_to_work_and_then_let_in_by_a_handshake_of_its_own() {
    let (mut client, mut server) = (Connection::client(client_config(), &seed(1)), busy());
    let mut first = hello(&mut client);
    assert!(matches!(server.receive(&mut first), Ok(Received::Record { event: Event::Progress, .. })));
    assert_eq!(server.ask(), None, "nothing is signed before the verdict");
    let presented = *server.presented().unwrap();
    assert_eq!(presented.cookie(), b"");
    let mut out = [0; 64];
    assert_eq!(server.retry(COOKIE, BITS, &mut [0; 17]), Err(BufferError::TxFull.into()));
    let len = server.retry(COOKIE, BITS, &mut out).unwrap();
    assert_eq!(out[..len], retry(COOKIE, BITS));
    assert_eq!(server.admit(), Err(ApiMisuse::Closed.into()), "the connection has ended");
    assert_eq!(client.receive(&mut out[..len]).err(), Some(PeerError::Retry.into()));
    assert_eq!(client.receive(&mut out[..len]).err(), Some(PeerError::Retry.into()), "and stays so");
    assert_eq!(client.transmit(&mut out).err(), Some(PeerError::Retry.into()));
    let puzzle = client.puzzle().unwrap();
    assert_eq!(puzzle.bits(), BITS);

    let mut pair = Pair::new();
    pair.client = Connection::client(client_config(), &seed(3));
    pair.client.present(&puzzle).unwrap();
    let mut calls = 1;
    while pair.client.solve() {
        calls += 1;
    }
    println!("{BITS} bits: {calls} calls");
    pair.server = busy();
    pair.client_hello();
    assert_eq!(pair.up.records, [84 + COOKIE.len() + 8]);
    let mut second = core::mem::take(&mut pair.up.bytes);
    pair.server.receive(&mut second).unwrap();
    let presented = *pair.server.presented().unwrap();
    assert_eq!(presented.cookie(), COOKIE);
    assert!(presented.is_solved(BITS));
    assert!(pair.server.presented().is_some(), "looked at, and not used up");
    pair.server.admit().unwrap();
    let Some(Ask::Sign(statement)) = pair.server.ask() else { panic!("a signature is due") };
    let signature = pair.server_key.sign(&statement).unwrap();
    let mut out = [0; 4096];
    let len = pair.server.sign_server(public(&pair.server_key), &signature, &mut out).unwrap();
    pair.down.bytes.extend_from_slice(&out[..len]);
    let credentials = pair.credentials();
    pair.client_auth(&credentials).unwrap();
    pair.server_accept().unwrap();
    pair.client_settings().unwrap();
}

#[test]
fn tries_are_few_at_a_time_and_a_hello_waits_for_the_solution() {
    let mut client: Connection = Connection::client(client_config(), &seed(4));
    client.present(&asked(MAX_PUZZLE_BITS)).unwrap();
    let (mut out, mut calls) = ([0; 512], 0);
    let len = loop {
        calls += 1;
        // Who does not care for the puzzle waits for the hello as for anything that is owed.
        match client.transmit(&mut out).unwrap() {
            0 => assert!(matches!(client.receive(&mut []), Ok(Received::Wait))),
            len => break len,
        }
    };
    assert!(calls > 1, "{calls}");
    let mut server = busy();
    server.receive(&mut out[..len]).unwrap();
    assert!(server.presented().unwrap().is_solved(MAX_PUZZLE_BITS));
}

#[test]
fn whoever_asks_again_or_for_too_much_gets_nothing() {
    let mut client = worked(&asked(0), 5);
    hello(&mut client);
    assert_eq!(client.receive(&mut retry(COOKIE, 0)).err(), Some(PeerError::Busy.into()));
    assert_eq!(client.puzzle(), None, "a second puzzle is not even remembered");

    for bits in [MAX_PUZZLE_BITS + 1, 64, 255] {
        let mut client: Connection = Connection::client(client_config(), &seed(1));
        hello(&mut client);
        assert_eq!(client.receive(&mut retry(COOKIE, bits)).err(), Some(PeerError::Puzzle { bits }.into()));
        assert_eq!(client.puzzle(), None);
    }
}

#[test]
fn a_retry_that_is_malformed_or_out_of_order_ends_the_connection() {
    let long = |len: usize| [&[0, u8::try_from(len).unwrap()][..], &vec![7; len]].concat();
    let decode = Error::Decode;
    let cases = [
        ("no cookie", clear(0x0120, &[0, 0]), decode),
        ("nothing", clear(0x0120, &[]), decode),
        ("a cookie of 41 bytes", clear(0x0120, &long(41)), decode),
        ("a byte behind the cookie", clear(0x0120, &[0, 1, 7, 7]), decode),
        ("a cookie that runs past the end", clear(0x0120, &[0, 9, 7, 7]), decode),
        (
            "another sequence number",
            {
                let mut record = retry(COOKIE, 0);
                record[7] = 1;
                record
            },
            PeerError::UnexpectedMessage.into(),
        ),
    ];
    for (case, mut record, error) in cases {
        let mut client: Connection = Connection::client(client_config(), &seed(1));
        hello(&mut client);
        assert_eq!(client.receive(&mut record).err(), Some(error), "{case}");
        assert_eq!(client.puzzle(), None, "{case}");
    }
    let mut client: Connection = Connection::client(client_config(), &seed(1));
    hello(&mut client);
    assert!(client.receive(&mut clear(0x0120, &long(40))).is_err_and(|error| error == PeerError::Retry.into()));

    // Behind a ServerHello, and at a server.
    let mut pair = Pair::new();
    pair.client_hello();
    pair.server_hello().unwrap();
    let Received::Record { used, .. } = pair.client.receive(&mut pair.down.bytes).unwrap() else { panic!("a hello") };
    assert_eq!(used, 79);
    let late = pair.client.receive(&mut retry(COOKIE, 0)).err();
    assert_eq!(late, Some(PeerError::UnexpectedMessage.into()));
    assert_eq!(busy().receive(&mut retry(COOKIE, 0)).err(), Some(PeerError::UnexpectedMessage.into()));
}

#[test]
fn a_solution_is_worth_nothing_for_another_hello() {
    let mut client = worked(&asked(BITS), 6);
    let good = hello(&mut client);
    let name = judged(&good).name();
    assert!(judged(&good).is_solved(BITS));
    assert_eq!(judged(&good).name(), name, "the same hello is known again");
    for (what, at) in [("random_C", 18), ("E_C", 50), ("cookie", 83), ("puzzle", 83 + COOKIE.len() + 7)] {
        let mut other = good.clone();
        other[at] ^= 1;
        let presented = judged(&other);
        assert!(!presented.is_solved(BITS), "{what}");
        assert_ne!(presented.name(), name, "{what}");
    }
}

#[test]
fn nothing_is_asked_of_whom_the_server_knows() {
    let mut pair = Pair::new();
    pair.connect();
    let (channel, held) = (pair.client.take_channel().unwrap(), pair.server.take_channel().unwrap());
    pair.reconnect(channel, (20, 21));
    pair.server.demand_work();
    assert!(pair.offer(|_| Some(held)).unwrap());
    assert_eq!(pair.server.presented(), None);
    pair.client_resumes().unwrap();
}

#[test]
fn an_offer_that_is_not_taken_has_to_work_like_any_other() {
    let mut pair = Pair::new();
    pair.connect();
    let (channel, mut held) = (pair.client.take_channel().unwrap(), pair.server.take_channel().unwrap());
    held.secret = Secret::new([1; 32]);
    for held in [None, Some(held)] {
        pair.reconnect(channel.clone(), (22, 23));
        pair.server.demand_work();
        assert!(!pair.offer(|_| held.clone()).unwrap());
        assert_eq!(pair.server.ask(), None);
        assert_eq!(pair.server.presented().unwrap().cookie(), b"");
        let mut out = [0; 64];
        let len = pair.server.retry(COOKIE, 8, &mut out).unwrap();
        assert_eq!(pair.client.receive(&mut out[..len]).err(), Some(PeerError::Retry.into()));
        let puzzle = pair.client.puzzle().unwrap();

        // It offers the channel again, whose binder covers the work.
        pair.reconnect(channel.clone(), (24, 25));
        pair.client.present(&puzzle).unwrap();
        while pair.client.solve() {}
        pair.server.demand_work();
        assert!(!pair.offer(|_| held).unwrap());
        assert!(pair.server.presented().unwrap().is_solved(8));
        pair.server.admit().unwrap();
        assert!(pair.server.ask().is_some(), "the full handshake goes on");
    }
}

#[test]
fn a_puzzle_is_for_a_connection_that_has_not_begun() {
    let puzzle = asked(0);
    assert_eq!(busy().present(&puzzle), Err(ApiMisuse::InvalidArgument.into()));
    let mut client: Connection = Connection::client(client_config(), &seed(1));
    assert!(!client.solve(), "there is nothing to solve");
    hello(&mut client);
    assert_eq!(client.present(&puzzle), Err(ApiMisuse::InvalidArgument.into()));
    let mut server = busy();
    assert_eq!(server.admit(), Err(ApiMisuse::NotAsked.into()));
    assert_eq!(server.retry(COOKIE, 0, &mut [0; 64]), Err(ApiMisuse::NotAsked.into()));
}

#[test]
fn a_cookie_holds_for_its_key_its_source_and_its_minute() {
    let (key, other) = (CookieKey::new(Secret::new([1; 32])), CookieKey::new(Secret::new([2; 32])));
    let cookie = key.cookie(&[3; 16], 4, 5);
    assert_eq!(cookie.len(), COOKIE_LEN);
    assert_eq!(key.bits(&cookie, &[3; 16], 4), Some(5));
    assert_eq!(other.bits(&cookie, &[3; 16], 4), None);
    assert_eq!(key.bits(&cookie, &[4; 16], 4), None);
    assert_eq!(key.bits(&cookie, &[3; 16], 5), None);
    assert_eq!(key.bits(&[], &[3; 16], 4), None);
    for bit in 0..COOKIE_LEN * 8 {
        let mut forged = cookie;
        forged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(key.bits(&forged, &[3; 16], 4), None, "bit {bit}");
    }
    for len in 0..COOKIE_LEN {
        assert_eq!(key.bits(&cookie[..len], &[3; 16], 4), None, "{len} bytes");
    }
    assert_eq!(key.bits(&[&cookie[..], &[5]].concat(), &[3; 16], 4), None);
}

// A server.

fn enroll(key: &IdentityKey) -> Credentials<'_> {
    Credentials::Enroll { id: [1; 16], name: "alice", key: public(key), token: None }
}

fn under_load(puzzle: u8) -> Config {
    // Nobody is turned away at random.
    Config { gate: GateLimits { busy: 0, unauthenticated: usize::MAX, puzzle, ..GateLimits::default() }, ..open() }
}

#[tokio::test]
async fn a_server_under_load_lets_in_who_has_worked_and_who_comes_back() {
    let node = Node::start(under_load(8)).await;
    let alice = keys::alice();
    let puzzle = Client::hello(&node, 16_408).await.puzzle().await;
    assert_eq!(puzzle.bits(), 8);
    assert_eq!(node.pool.signs(), 0);
    let mut client = Client::work(&node, &puzzle, None).await;
    client.authenticate(&enroll(&alice), &alice).await.unwrap();
    client.settle().await.unwrap();
    assert_eq!(node.pool.signs(), 1);
    let channel = client.take_channel();
    drop(client);

    let client = Client::resume(&node, channel).await.unwrap();
    assert!(client.is_resumed(), "who brings a channel is never asked");
    assert_eq!(node.pool.signs(), 1);
    node.stop().await;
}

#[tokio::test]
async fn work_is_taken_once_and_a_recorded_offer_not_at_all() {
    let node = Node::start(under_load(4)).await;
    let alice = keys::alice();
    let puzzle = Client::hello(&node, 16_408).await.puzzle().await;
    let mut client = Client::work(&node, &puzzle, None).await;
    let recorded = client.hello.clone();
    client.authenticate(&enroll(&alice), &alice).await.unwrap();
    client.settle().await.unwrap();
    let mut replayed = TcpStream::connect(node.address).await.unwrap();
    replayed.write_all(&recorded).await.unwrap();
    let mut answer = Vec::new();
    within(replayed.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer.len(), 8 + 2 + COOKIE_LEN, "a puzzle, and no signature: {answer:?}");
    assert_eq!(node.pool.signs(), 1);

    let channel = client.take_channel();
    let mut client = Client::offer(&node, channel).await;
    let recorded = client.hello.clone();
    client.finish_resumption().await.unwrap();
    client.settle().await.unwrap();
    let mut replayed = TcpStream::connect(node.address).await.unwrap();
    replayed.write_all(&recorded).await.unwrap();
    let mut answer = Vec::new();
    let _ = within(replayed.read_to_end(&mut answer)).await;
    assert!(answer.is_empty(), "nothing is computed for a hello that was heard before");
    client.sync().await;
    node.stop().await;
}

const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;
const THERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// What the server says to this hello from that address, until it closes or has shown that it signs.
async fn answered(node: &Node, from: Ipv4Addr, hello: &[u8]) -> Vec<u8> {
    answered_or_not(node, from, hello).await.unwrap()
}

/// The same; `None` if the server breaks the connection off.
async fn answered_or_not(node: &Node, from: Ipv4Addr, hello: &[u8]) -> Option<Vec<u8>> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(IpAddr::V4(from), 0)).unwrap();
    let mut stream = within(socket.connect(node.address)).await.unwrap();
    stream.write_all(hello).await.ok()?;
    let mut answer = vec![0; 79];
    let mut len = 0;
    while len < answer.len() {
        match within(stream.read(&mut answer[len..])).await.ok()? {
            0 => break,
            more => len += more,
        }
    }
    answer.truncate(len);
    Some(answer)
}

/// The puzzle that the server has set for that address.
async fn set(node: &Node, from: Ipv4Addr) -> Puzzle {
    let mut client: Connection = Connection::client(client_config(), &seed(1));
    let hello = hello(&mut client);
    let mut answer = answered(node, from, &hello).await;
    assert_eq!(client.receive(&mut answer).err(), Some(PeerError::Retry.into()));
    client.puzzle().unwrap()
}

/// A hello that presents this puzzle, solved.
fn solved(puzzle: &Puzzle, seeded: u8) -> Vec<u8> {
    hello(&mut worked(puzzle, seeded))
}

/// What a server makes of the work of a hello.
fn judged(hello: &[u8]) -> Presented {
    let mut server = busy();
    server.receive(&mut hello.to_vec()).unwrap();
    *server.presented().unwrap()
}

#[tokio::test]
async fn nobody_is_let_through_who_has_not_worked_here_and_now() {
    let passed = Arc::new(AtomicU64::new(1_000_000));
    let read = Arc::clone(&passed);
    let clock = Clock::new(move || Duration::from_secs(read.load(Ordering::SeqCst)));
    let node = Node::start_by(clock, under_load(BITS)).await;
    let puzzle = set(&node, HERE).await;
    let right = solved(&puzzle, 30);
    // Whether the server signs for it.
    let signs = async |from: Ipv4Addr, hello: &[u8]| {
        let before = node.pool.signs();
        let answer = answered(&node, from, hello).await;
        let asked = answer.len() == 8 + 2 + COOKIE_LEN && answer[2..4] == [1, 0x20];
        let signed = answer.len() == 79 && answer[2..4] == [1, 0x10];
        assert!(asked || signed, "{answer:?}");
        assert_eq!(node.pool.signs() - before, u64::from(signed));
        signed
    };

    assert!(!signs(THERE, &right).await, "from another address");
    assert!(signs(HERE, &right).await, "the work as it must be");
    for _ in 0..3 {
        assert!(!signs(HERE, &right).await, "again");
    }
    assert!(signs(HERE, &solved(&puzzle, 31)).await, "other work with the same cookie");
    assert!(!signs(HERE, &solved(&set(&node, THERE).await, 32)).await, "a cookie of another address");

    for len in [1, COOKIE_LEN, 40] {
        // It claims to have been asked for nothing.
        let mut client: Connection = Connection::client(client_config(), &seed(1));
        hello(&mut client);
        assert!(client.receive(&mut retry(&vec![0; len], 0)).is_err());
        let made_up = solved(&client.puzzle().unwrap(), 33);
        assert!(!signs(HERE, &made_up).await, "a cookie of {len} zeros");
    }
    // 82: the length of the cookie; behind it 8 bytes of puzzle and no offer.
    let mut wrong = solved(&puzzle, 34);
    let last = wrong.len() - 2;
    while judged(&wrong).is_solved(BITS) || judged(&wrong).is_solved(1) {
        wrong[last] = wrong[last].wrapping_add(1);
    }
    assert!(!signs(HERE, &wrong).await, "a wrong solution");
    let mut less = solved(&puzzle, 35);
    let bits = 83 + COOKIE_LEN - 1;
    assert_eq!(less[bits], BITS);
    less[bits] = 0;
    assert!(!signs(HERE, &less).await, "a cookie that was made cheaper");

    let stale = solved(&puzzle, 36);
    let kept = solved(&puzzle, 37);
    passed.fetch_add(59, Ordering::SeqCst);
    assert!(signs(HERE, &kept).await, "a cookie that is not yet a minute old");
    passed.fetch_add(61, Ordering::SeqCst);
    assert!(!signs(HERE, &stale).await, "a cookie of two minutes ago");
    assert!(!signs(HERE, &right).await, "what was taken before");
    assert!(signs(HERE, &solved(&set(&node, HERE).await, 38)).await, "a new one");
    node.stop().await;
}

#[tokio::test]
async fn masses_of_strangers_disturb_nobody_and_shut_nobody_out() {
    let long = Duration::from_secs(3600);
    // More than there are strangers: some are turned away, and there is always room for one more.
    let gate = GateLimits { unauthenticated: 256, busy: 8, per_source: 16, puzzle: 4, ..GateLimits::default() };
    let node = Node::start(Config { gate, hello_within: long, handshake_within: long, ..open() }).await;
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let mut bob = node.enrol(2, "bob", keys::bob()).await;
    bob.listen().await;
    let published = Published::new(1, &keys::alice(), 0);
    let wrap = wrap(5);
    alice.done(&Message::Wrap { request: 1, to: [2; 16], wrap: &wrap, bundle: published.signed() }).await;
    bob.message().await;
    let mut carol = node.enrol(3, "carol", keys::carol()).await;
    let channel = carol.take_channel();
    carol.close().await;

    let mut strangers = Vec::new();
    for number in 0..200_u8 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1 + number % 50)), 0)).unwrap();
        let mut stream = within(socket.connect(node.address)).await.unwrap();
        // Some are hung up on meanwhile.
        let _ = stream.write_all(&[1]).await;
        strangers.push(stream);
    }
    let mut unknown: Connection = Connection::client(client_config(), &seed(40));
    let unknown = hello(&mut unknown);
    // Newcomers are turned away by chance, and try again.
    let comes_in = async || loop {
        match answered_or_not(&node, HERE, &unknown).await {
            Some(answer) if !answer.is_empty() => break answer,
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!(within(comes_in()).await[2..4], [1, 0x20], "a stranger has to work");
    for n in 0..20 {
        alice.say(5, n, Rungs::NONE).await;
        assert!(matches!(Message::decode(&bob.message().await), Ok(Message::Deliver { .. })));
    }
    let carol = within(async {
        loop {
            match Client::resume(&node, channel.clone()).await {
                Ok(client) => break client,
                Err(error) => assert_eq!(error, PeerError::Truncated.into(), "who is known is never asked for work"),
            }
        }
    })
    .await;
    assert!(carol.is_resumed());
    drop(strangers);
    within(async { while comes_in().await[2..4] != [1, 0x10] {} }).await;
    node.stop().await;
}
