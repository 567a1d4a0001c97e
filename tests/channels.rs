//! Channels at a real server over TCP: a thousand devices that come back without RSA, and everything that a channel must
//! not do for whoever recorded, stole, lost or outlived it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ossicle::resumption::ChannelKey;
use ossicle::server::Config;
use ossicle::store::{ClientId, Enrolment};
use ossicle_core::{Channel, Channels, ChannelsResponse, ExpireChannels, Message, Reason, Secret};
use ossicle_tests::cli::World;
use ossicle_tests::keys;
use ossicle_tests::node::{Client, DEADLINE, Heard, Node, enrolled, open, refused, within};

/// What RSA a server has done.
fn rsa(node: &Node) -> (u64, u64) {
    (node.pool.signs(), node.pool.verifies())
}

/// Waits until the store holds all these channels.
async fn written(node: &Node, channels: &[Channel]) {
    for channel in channels {
        let begun = Instant::now();
        while node.store.channel(&channel.id, 0).await.unwrap().is_none() {
            assert!(begun.elapsed() < DEADLINE, "channels are written within moments");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Whether the channel can be resumed; whoever cannot gets no error, but the full handshake.
async fn is_resumed(node: &Node, channel: &Channel) -> bool {
    let mut client = Client::offer(node, channel.clone()).await;
    let credentials = enrolled(channel.client[0], &keys::alice());
    if client.authenticate(&credentials, &keys::alice()).await.is_ok() {
        client.settle().await.unwrap();
        assert!(!client.is_resumed());
        return false;
    }
    Client::resume(node, channel.clone()).await.is_ok_and(|client| client.is_resumed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_come_back_to_a_killed_server_without_one_rsa_operation() {
    const CLIENTS: u32 = 1_000;
    let node = Node::start(open()).await;
    // One key serves all: what matters are their channels, which come from real connections all the same.
    let key = keys::alice();
    let mut first = node.enrol(1, "first", keys::alice()).await;
    let channel = first.take_channel();
    assert_eq!(rsa(&node), (1, 1), "a full handshake signs and verifies once");
    let sealing = ChannelKey::open(node.directory.path()).unwrap();
    // A day from now.
    let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 24 * 3600;
    let mut channels = Vec::new();
    for number in 0..CLIENTS {
        let id: ClientId = core::array::from_fn(|i| number.to_be_bytes()[i % 4] ^ 0x80);
        let mut modulus = key.modulus().to_vec();
        // Another key for each, as the store wants it; nobody ever signs with it.
        modulus[8..12].copy_from_slice(&number.to_be_bytes());
        let enrolment = Enrolment {
            id,
            name: ossicle::name::Name::parse(&format!("device-{number}")).unwrap(),
            modulus: modulus.clone(),
            token_id: None,
            enrolled_by: None,
            record_limit: 1024,
            now: 0,
        };
        node.store.enrol(enrolment).await.unwrap();
        let client_key = ossicle_core::PublicKey::from_modulus(&modulus).unwrap().fingerprint();
        let mut id_of_channel = [0; 16];
        id_of_channel[..4].copy_from_slice(&number.to_be_bytes());
        let issued = Channel {
            id: id_of_channel,
            secret: Secret::new([u8::try_from(number % 251).unwrap(); 32]),
            client: id,
            client_key,
            ..channel.clone()
        };
        let sealed = sealing.seal(&issued, expires).unwrap();
        node.store.put_channel(&id, sealed, None).await.unwrap();
        channels.push(issued);
    }
    // Each has come back once before the kill, so that what is resumed afterwards was issued by a resumption.
    let mut kept = Vec::new();
    for channel in channels {
        kept.push(Client::resume(&node, channel).await.unwrap().take_channel());
    }
    written(&node, &kept).await;
    assert_eq!(rsa(&node), (1, 1));
    let directory = node.kill().await;

    let node = Node::start_on(directory, open()).await;
    // All of them stay, as they would.
    let mut back = Vec::new();
    for channel in kept {
        let client = Client::resume(&node, channel).await.unwrap();
        assert!(client.is_resumed());
        back.push(client);
    }
    assert_eq!(back.len(), 1_000);
    assert_eq!(node.server.connected(), 1_000);
    assert_eq!(rsa(&node), (0, 0), "no signature, no verification");
}

#[tokio::test]
async fn what_cannot_be_resumed_is_one_and_the_same_full_handshake() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let mut bob = node.enrol(2, "bob", keys::bob()).await;
    let (good, of_bob) = (alice.take_channel(), bob.take_channel());
    let cases = [
        ("unknown", Channel { id: [9; 16], ..good.clone() }),
        ("a wrong secret", Channel { secret: Secret::new([9; 32]), ..good.clone() }),
        ("the secret of another channel", Channel { secret: of_bob.secret.clone(), ..good.clone() }),
        ("the id of another client's channel", Channel { id: of_bob.id, ..good.clone() }),
    ];
    for (case, channel) in cases {
        let before = rsa(&node);
        assert!(!is_resumed(&node, &channel).await, "{case}");
        assert_eq!(rsa(&node), (before.0 + 1, before.1 + 1), "{case}");
    }
    // The full handshakes above have ended it, as they must.
    assert!(!is_resumed(&node, &good).await);
    // Another id or key behind a good binder is none: both sides name them under the keys.
    for stolen in [Channel { client: [9; 16], ..of_bob.clone() }, Channel { client_key: [9; 32], ..of_bob.clone() }] {
        let mut client = Client::offer(&node, stolen).await;
        assert!(client.finish_resumption().await.is_err());
    }
    assert!(matches!(within(bob.ask_alive()).await, Heard::Message(_)), "nothing has happened to bob");
}

#[tokio::test]
async fn a_replayed_hello_throws_nobody_out_and_changes_nothing() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let channel = alice.take_channel();
    let held = node.server.channels_of(&[1; 16]).await.unwrap();
    for _ in 0..20 {
        // As much as somebody can do who recorded it, and a little more: this one even has the right secret.
        let replayed = Client::offer(&node, channel.clone()).await;
        drop(replayed);
    }
    assert!(matches!(within(alice.ask_alive()).await, Heard::Message(_)), "the live connection stands");
    assert_eq!(node.server.channels_of(&[1; 16]).await.unwrap(), held);
    // Whoever finishes takes over, and the older connection is told.
    let again = Client::resume(&node, channel).await.unwrap();
    assert_eq!(within(alice.hear()).await, Heard::Closed(Some(Reason::TakenOver)));
    drop(again);
}

#[tokio::test]
async fn a_client_that_lost_the_newest_channel_resumes_with_the_one_before_and_no_older_one() {
    let node = Node::start(open()).await;
    let first = node.enrol(1, "alice", keys::alice()).await.take_channel();
    let second = Client::resume(&node, first.clone()).await.unwrap().take_channel();
    let third = Client::resume(&node, first.clone()).await.unwrap().take_channel();
    assert_eq!(node.server.channels_of(&[1; 16]).await.unwrap().len(), 2);
    assert!(is_still_held(&node, &third).await && is_still_held(&node, &first).await);
    assert!(!is_still_held(&node, &second).await, "replaced before it was used");
    let fourth = Client::resume(&node, third.clone()).await.unwrap().take_channel();
    for (channel, held) in [(&first, false), (&third, true), (&fourth, true)] {
        assert_eq!(is_still_held(&node, channel).await, held);
    }
    // It holds on disk, too.
    written(&node, core::slice::from_ref(&fourth)).await;
    let mut stored: Vec<_> = node.store.channels(&[1; 16], 0).await.unwrap().into_iter().map(|(id, _)| id).collect();
    let mut expected = vec![third.id, fourth.id];
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected);
}

async fn is_still_held(node: &Node, channel: &Channel) -> bool {
    node.server.channels_of(&channel.client).await.unwrap().iter().any(|(id, _)| *id == channel.id)
}

#[tokio::test]
async fn two_connections_that_resume_one_channel_at_once_leave_one_and_no_harm() {
    let node = Node::start(open()).await;
    let channel = node.enrol(1, "alice", keys::alice()).await.take_channel();
    for _ in 0..10 {
        let (mut one, mut other) =
            (Client::offer(&node, channel.clone()).await, Client::offer(&node, channel.clone()).await);
        one.finish_resumption().await.unwrap();
        other.finish_resumption().await.unwrap();
        let (a, b) = tokio::join!(one.settle(), other.settle());
        a.unwrap();
        b.unwrap();
        // Both were let in, one took over from the other, and the channel that both used is still good.
        let (a, b) = tokio::join!(one.ask_alive(), other.ask_alive());
        let taken_over = |heard: &Heard| *heard == Heard::Closed(Some(Reason::TakenOver)) || *heard == Heard::Ended;
        assert!(taken_over(&a) != taken_over(&b), "{a:?} {b:?}");
        assert!(node.server.channels_of(&[1; 16]).await.unwrap().len() <= 2);
        assert!(is_still_held(&node, &channel).await);
    }
    let issued = Client::resume(&node, channel).await.unwrap().take_channel();
    assert!(Client::resume(&node, issued).await.unwrap().is_resumed());
}

#[tokio::test]
async fn an_expired_channel_is_none_and_resuming_extends_nothing() {
    let config = Config { channel_age: Duration::from_secs(1000), ..open() };
    let node = Node::start(config).await;
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let (mut channel, first) = (alice.take_channel(), alice.settings.valid_for);
    assert!(first <= 1000);
    let end = |channels: &[([u8; 16], u64)]| channels.iter().map(|(_, expires)| *expires).max().unwrap();
    let expires = end(&node.server.channels_of(&[1; 16]).await.unwrap());
    for _ in 0..3 {
        let mut client = Client::resume(&node, channel).await.unwrap();
        assert!(client.settings.valid_for <= first);
        channel = client.take_channel();
        assert_eq!(end(&node.server.channels_of(&[1; 16]).await.unwrap()), expires);
    }
    let directory = node.stop().await;

    // A server that keeps none takes none, and issues none.
    let node = Node::start_on(directory, Config { channel_age: Duration::ZERO, ..open() }).await;
    let client = Client::offer(&node, channel.clone()).await;
    assert!(resumes_not(client, &channel).await);
    let client = node.connect(1, &keys::alice()).await.unwrap();
    assert_eq!((client.settings.valid_for, client.is_resumed()), (0, false));

    // One second is over soon.
    let node = Node::start(Config { channel_age: Duration::from_secs(1), ..open() }).await;
    let channel = node.enrol(1, "alice", keys::alice()).await.take_channel();
    let begun = Instant::now();
    while !node.server.channels_of(&[1; 16]).await.unwrap().is_empty()
        && !resumes_not(Client::offer(&node, channel.clone()).await, &channel).await
    {
        assert!(begun.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether the server answers an offer with the full handshake.
async fn resumes_not(mut client: Client, channel: &Channel) -> bool {
    client.authenticate(&enrolled(channel.client[0], &keys::alice()), &keys::alice()).await.is_ok()
}

#[tokio::test]
async fn revoking_and_expiring_end_channels_at_once_even_one_under_way() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(1, "alice", keys::alice()).await;
    let channel = alice.take_channel();

    // The client itself, over its connection, which stands.
    let held = async |alice: &mut Client, request| {
        let answer = alice.ask(&Channels { request }.encode(&mut [0; 8]).unwrap()).await;
        let Ok(Message::Other(body)) = Message::decode(&answer) else { panic!("an answer") };
        let held = ChannelsResponse::decode(body).unwrap();
        assert_eq!((held.request, held.second), (request, None));
        held.first
    };
    let info = held(&mut alice, 4).await.unwrap();
    assert_eq!(info.id, channel.id);
    assert!(info.valid_for > 604_000 && info.valid_for <= 604_800);
    let answer = alice.ask(&ExpireChannels { request: 5 }.encode(&mut [0; 8]).unwrap()).await;
    assert_eq!(Message::decode(&answer), Ok(Message::Done { request: 5 }));
    assert_eq!(held(&mut alice, 6).await, None);
    assert!(resumes_not(Client::offer(&node, channel.clone()).await, &channel).await);

    // The operator, between the server's answer and the client's Finished.
    let channel = node.connect(1, &keys::alice()).await.unwrap().take_channel();
    let mut client = Client::offer(&node, channel.clone()).await;
    // The answer is there when the client can finish; the Finished is sent after the end.
    let finish = client.finish_resumption_after(async || {
        node.server.expire_channels(&[1; 16]).await.unwrap();
    });
    finish.await.unwrap();
    assert_eq!(client.settle().await, Err(refused(Reason::Unauthorised)));

    // Revoked: neither the channel nor the key.
    let channel = node.connect(1, &keys::alice()).await.unwrap().take_channel();
    written(&node, core::slice::from_ref(&channel)).await;
    let mut under_way = Client::offer(&node, channel.clone()).await;
    let finish = under_way.finish_resumption_after(async || {
        assert!(node.server.revoke(&[1; 16]).await.unwrap());
    });
    finish.await.unwrap();
    assert_eq!(under_way.settle().await, Err(refused(Reason::Unauthorised)));
    let mut client = Client::offer(&node, channel.clone()).await;
    client.authenticate(&enrolled(1, &keys::alice()), &keys::alice()).await.unwrap();
    assert_eq!(client.settle().await, Err(refused(Reason::Unauthorised)));
    assert!(node.server.channels_of(&[1; 16]).await.unwrap().is_empty());
}

#[tokio::test]
async fn channels_are_sealed_at_rest_and_end_with_their_key() {
    let node = Node::start(open()).await;
    let channel = node.enrol(1, "alice", keys::alice()).await.take_channel();
    let directory = node.stop().await;
    let holds = |path: &std::path::Path| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.windows(32).any(|window| window == channel.secret.expose())
    };
    let files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.iter().any(|file| file.ends_with("channel.key")));
    assert!(!files.iter().any(|file| holds(file)), "no file holds the secret");

    let node = Node::start_on(directory, open()).await;
    let channel = Client::resume(&node, channel).await.unwrap().take_channel();
    let directory = node.stop().await;
    // A key that is lost, or damaged, costs full handshakes and nothing else.
    let path = directory.path().join("channel.key");
    fs::remove_file(&path).unwrap();
    let node = Node::start_on(directory, open()).await;
    assert!(resumes_not(Client::offer(&node, channel.clone()).await, &channel).await);
    let channel = node.connect(1, &keys::alice()).await.unwrap().take_channel();
    let directory = node.stop().await;
    fs::write(&path, b"too short").unwrap();
    let node = Node::start_on(directory, open()).await;
    assert!(resumes_not(Client::offer(&node, channel.clone()).await, &channel).await);
    let channel = node.connect(1, &keys::alice()).await.unwrap().take_channel();
    assert!(Client::resume(&node, channel).await.unwrap().is_resumed());
}

#[tokio::test]
async fn resumptions_are_free_where_full_handshakes_are_not() {
    let mut config = open();
    config.rates.handshakes = ossicle::limits::Rate { per_second: 1, burst: 2 };
    let node = Node::start(config).await;
    let mut channel = node.enrol(1, "alice", keys::alice()).await.take_channel();
    for _ in 0..50 {
        let mut client = Client::resume(&node, channel).await.unwrap();
        channel = client.take_channel();
    }
    assert_eq!(rsa(&node).0, 1);
}

#[test]
fn every_command_resumes_and_either_side_can_end_that() {
    let world = World::new();
    world.init("alice");
    world.init("bob");
    let resumed = || world.server_log().iter().filter(|line| line.contains("resumed=true")).count();
    let full = || world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    assert_eq!((full(), resumed()), (2, 0));
    let listen = world.listen("bob", &[]);
    for text in ["one", "two", "three"] {
        world.run("alice", &["send", "bob", text]).ok();
        assert!(listen.line().contains(text));
    }
    assert_eq!(full(), 2, "send, listen and who resume");
    assert!(resumed() >= 4);

    let listed = world.run("alice", &["channel", "list", "--json"]).ok();
    assert!(!listed.is_empty() && listed.lines().count() <= 2, "{listed}");
    assert!(listed.contains("\"kept\":true"), "{listed}");
    let said = world.run("alice", &["channel", "expire"]).ok();
    assert!(said.contains("the next connection of this client makes a full handshake"), "{said}");
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 3);
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 3);

    // The operator, while the server runs and while it does not.
    let mut world = world;
    let data = world.path("server").display().to_string();
    let all = world.run("alice", &["channel", "list", "--data", &data]).ok();
    assert!(all.contains("alice") && all.contains("bob"), "{all}");
    let mine = world.run("alice", &["channel", "list", "alice", "--data", &data, "--json"]).ok();
    assert!(mine.contains("alice") && !mine.contains("bob") && !mine.contains("kept"), "{mine}");
    let said = world.run("alice", &["channel", "expire", "alice", "--data", &data]).ok();
    assert!(said.contains("the next connection of alice makes a full handshake"), "{said}");
    world.run("alice", &["who"]).ok();
    assert_eq!(world.server_log().iter().filter(|line| line.contains("resumed=false")).count(), 4);
    world.run("alice", &["channel", "list", "nobody", "--data", &data]).failed(1, "no client named nobody");
    drop(listen);
    world.end_server();
    let all = world.run("alice", &["channel", "list", "--data", &data]).ok();
    assert!(all.contains("alice") && all.contains("bob"), "a server that ends writes all: {all}");
    let said = world.run("alice", &["channel", "expire", "--data", &data, "--json"]).ok();
    assert!(said.contains("\"expired\":"), "{said}");
    assert!(world.run("alice", &["channel", "list", "--data", &data]).ok().is_empty());
    world.restart_server();
    world.run("alice", &["who"]).ok();
    assert_eq!(world.server_log().iter().filter(|line| line.contains("resumed=false")).count(), 1);
}

#[test]
fn a_home_restored_from_an_old_copy_comes_back_without_harm() {
    let world = World::new();
    world.init("alice");
    let kept = world.path("alice").join("channel");
    let old = fs::read(&kept).unwrap();
    for _ in 0..3 {
        world.run("alice", &["who"]).ok();
    }
    let full = || world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    assert_eq!(full(), 1);
    // Replaced long ago: a full handshake, and on from there.
    fs::write(&kept, &old).unwrap();
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 2);
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 2);
    // Rubbish, another's, and one that others could read.
    fs::write(&kept, vec![7; old.len()]).unwrap();
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 3);
    world.init("bob");
    fs::copy(world.path("bob").join("channel"), &kept).unwrap();
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 5, "bob's, and alice's own again");
    world.run("bob", &["who"]).ok();
    assert_eq!(full(), 5, "bob's channel was never offered");
}

#[test]
fn a_home_makes_a_full_handshake_a_week_after_the_last_whatever_a_server_would_resume() {
    let world = World::new();
    world.init("alice");
    let kept = world.path("alice").join("channel");
    let full = || world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    let since = || {
        let bytes = fs::read(&kept).unwrap();
        u64::from_be_bytes(bytes[bytes.len() - 8..].try_into().unwrap())
    };
    let age = |seconds: u64| {
        let mut bytes = fs::read(&kept).unwrap();
        let at = bytes.len() - 8;
        bytes[at..].copy_from_slice(&(since() - seconds).to_be_bytes());
        fs::write(&kept, bytes).unwrap();
    };
    let begun = since();
    world.run("alice", &["who"]).ok();
    assert_eq!((full(), since()), (1, begun), "resumed, and no younger for it");
    age(6 * 24 * 3600);
    world.run("alice", &["who"]).ok();
    assert_eq!((full(), since()), (1, begun - 6 * 24 * 3600));
    age(24 * 3600 + 1);
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 2, "the server would have resumed it: it counts from another day");
    assert!(since() >= begun);
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 2);
}

/// Between a client and the server: passes everything on, but once it is told to, nothing behind the client's hello before
/// it is told to go on.
struct Gate {
    address: String,
    armed: Arc<AtomicBool>,
    held: Receiver<()>,
    go: Sender<()>,
}

impl Gate {
    fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (armed, (holds, held), (go, goes)) = (Arc::new(AtomicBool::new(false)), channel(), channel());
        let is_armed = Arc::clone(&armed);
        thread::spawn(move || {
            for mut client in listener.incoming().map_while(Result::ok) {
                let Ok(mut server) = TcpStream::connect(&server) else { continue };
                let (mut says, mut hears) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let answers = thread::spawn(move || {
                    let _ = std::io::copy(&mut says, &mut hears);
                    let _ = hears.shutdown(Shutdown::Write);
                });
                let mut hello = [0; 512];
                let len = client.read(&mut hello).unwrap_or_default();
                let _ = server.write_all(&hello[..len]);
                if is_armed.swap(false, Ordering::SeqCst) {
                    holds.send(()).unwrap();
                    goes.recv().unwrap();
                }
                let _ = std::io::copy(&mut client, &mut server);
                let _ = server.shutdown(Shutdown::Write);
                answers.join().unwrap();
            }
        });
        Self { address, armed, held, go }
    }
}

#[test]
fn a_channel_that_ends_while_it_is_resumed_costs_its_home_no_more_than_a_full_handshake() {
    let world = World::new();
    let (server, secrets) = world.url.trim_start_matches("ossicle://").split_once('#').unwrap();
    let gate = Gate::start(server.to_owned());
    let url = format!("ossicle://{}#{secrets}", gate.address);
    world.run("alice", &["init", "--name", "alice", "--rsa", "2048", &url]).ok();
    let full = || world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    let data = world.path("server").display().to_string();
    world.run("alice", &["who"]).ok();
    assert_eq!(full(), 1);
    gate.armed.store(true, Ordering::SeqCst);
    let who = world.spawn("alice", &["who"]);
    gate.held.recv_timeout(DEADLINE).unwrap();
    world.run("alice", &["channel", "expire", "alice", "--data", &data]).ok();
    gate.go.send(()).unwrap();
    assert!(who.wait().ok().contains("alice"));
    assert_eq!(full(), 2);

    // Whoever was revoked meanwhile is told so.
    gate.armed.store(true, Ordering::SeqCst);
    let who = world.spawn("alice", &["who"]);
    gate.held.recv_timeout(DEADLINE).unwrap();
    world.run("alice", &["revoke", "alice", "--data", &data]).ok();
    gate.go.send(()).unwrap();
    who.wait().failed(1, "does not let alice in");
    assert_eq!(full(), 2);
}
