//! The public conversation as people and scripts live it, with the real binary: who reads what, once, and what is shown of a
//! server that lies.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use ossicle::crypto::IdentityKey;
use ossicle::endpoint::{Access, Notice, PublicPost, Reply, Request};
use ossicle::store::home::{HomeStore, Profile};
use ossicle_core::{
    DirectoryEntry, Fixed, Follow, FollowResponse, Lookup, Member, Message, News, PeerStatus, Post, Reason, Said,
    Subject,
};
use ossicle_tests::cli::{Done, Running, World};
use ossicle_tests::node::{Node, Published, Saying, bundle_keys, open, post, within};
use ossicle_tests::script::{Script, Scripted};
use ossicle_tests::{keys, public};

const LABEL: &str = "[public, not end-to-end encrypted]";

fn people(names: &[&str]) -> World {
    let world = World::new();
    for name in names {
        world.init(name);
    }
    world
}

/// `printf INPUT | ossicle chat`, to its end.
fn chat(world: &World, home: &str, input: &str) -> Done {
    let mut chat = world.spawn(home, &["chat"]);
    chat.write(input.as_bytes());
    chat.end_input();
    chat.wait()
}

/// The next line, without its time.
fn line(of: &Running) -> String {
    let line = of.line();
    line.split_once("Z ").unwrap_or_else(|| panic!("{line}")).1.to_owned()
}

fn end(mut chat: Running) -> String {
    chat.end_input();
    chat.wait().ok()
}

#[test]
fn what_is_said_to_all_is_read_by_all_once_and_by_nobody_who_does_not_ask() {
    let mut world = people(&["alice", "bob", "carol"]);
    let bob = world.spawn("bob", &["chat"]);
    let carol = world.listen("carol", &[]);
    let out = chat(&world, "alice", "/all hello everybody\n/all and  again\u{1b}[2J\n").ok();
    let told = [
        format!("  ✓ {LABEL} said to everybody: hello everybody\n"),
        format!("  ✓ {LABEL} said to everybody: and  again"),
    ];
    assert!(told.iter().all(|told| out.contains(told)), "{out}");
    assert_eq!(line(&bob), format!("{LABEL} alice: hello everybody"));
    assert_eq!(line(&bob), format!("{LABEL} alice: and  again\\u{{1b}}[2J"));
    // What was shown does not come again, what came meanwhile does; a server that was started anew changes nothing of it.
    assert_eq!(end(bob), "");
    chat(&world, "alice", "/all third\n").ok();
    world.restart_server();
    chat(&world, "alice", "/all fourth\n").ok();
    let bob = world.spawn("bob", &["chat"]);
    assert_eq!(line(&bob), format!("{LABEL} alice: third"));
    assert_eq!(line(&bob), format!("{LABEL} alice: fourth"));
    // Who listens for his own messages alone is told nothing of it; who asks reads it from the beginning, in JSON, too.
    assert!(carol.is_silent());
    drop(carol);
    let carol = world.spawn("carol", &["listen", "--public", "--json", "--count", "4"]);
    for said in ["hello everybody", "and  again\u{1b}[2J", "third", "fourth"] {
        let line: serde_json::Value = serde_json::from_str(&carol.line()).unwrap();
        let fields = ["public", "from", "text"].map(|name| line[name].as_str().unwrap());
        assert_eq!(fields, ["not end-to-end encrypted", "alice", said], "{line}");
        assert_eq!(line["signed"], true);
    }
    carol.wait().ok();
    end(bob);
    // It is kept like what was said with somebody, under its name.
    let lines = |home: &str| {
        let out = chat(&world, home, "/history /all\n").ok();
        assert!(out.lines().all(|line| line.starts_with(LABEL)), "{out}");
        out.lines().map(|line| line.split_once("Z ").unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(lines("bob")[2..], ["alice: third", "alice: fourth"]);
    assert_eq!(lines("alice")[0], "you: hello everybody");
}

#[test]
fn what_was_not_said_is_said_with_its_reason() {
    let world = people(&["alice"]);
    let failed = |input: &str, code: i32, sentence: &str| {
        let done = chat(&world, "alice", input);
        assert!(done.code == Some(code) && done.err.contains(sentence), "{sentence:?} in {done:?}");
    };
    failed("/all\n", 2, "/all TEXT");
    failed(&format!("/all {}\n", "x".repeat(801)), 1, "refused(too-large)");
    // As a command: signed, and done when it is stored.
    let done = world.run("alice", &["send", "/all", "from a script"]);
    assert!(done.err.ends_with(&format!("{LABEL} stored\n")) && done.out.is_empty(), "{done:?}");
    let out = world.run("alice", &["send", "/all", "--json", "once more"]).ok();
    assert_eq!(out, "{\"to\":\"/all\",\"public\":\"not end-to-end encrypted\",\"rung\":\"stored\"}\n");
    world.run("alice", &["send", "/all", &"x".repeat(801)]).failed(1, "refused(too-large)");
    world.run("alice", &["send", "--no-sign", "/all", "x"]).failed(2, "always signed");
    // No reader would show it.
    let mut binary = world.spawn("alice", &["send", "/all", "-"]);
    binary.write(b"\xff\xfe\n");
    binary.end_input();
    binary.wait().failed(1, "refused(malformed)");
    let done = world.run("alice", &["send", "/everybody", "x"]);
    assert!(done.code == Some(2) && done.err.contains("a name cannot contain"), "{done:?}");
    // More than the server takes at once goes when it takes more.
    let many: String = (0..32).map(|n| format!("/all {n}\n")).collect();
    assert_eq!(chat(&world, "alice", &many).ok().lines().count(), 32);
}

#[test]
fn nothing_that_was_taken_in_is_lost_or_comes_twice_by_a_kill() {
    let mut world = people(&["alice", "bob"]);
    let mut bob = world.spawn("bob", &["chat"]);
    chat(&world, "alice", "/all one\n").ok();
    assert_eq!(line(&bob), format!("{LABEL} alice: one"));
    world.stop_server();
    // There is no server: it is in the home, and the writer is killed.
    let mut alice = world.spawn("alice", &["chat"]);
    // Each line is taken in before the next is read.
    alice.write(b"/all two\n/all three\n/status\n");
    while !alice.line().starts_with("  waiting ") {}
    alice.kill();
    drop(alice);
    bob.kill();
    drop(bob);
    world.restart_server();
    let bob = world.spawn("bob", &["chat"]);
    let alice = world.spawn("alice", &["chat"]);
    assert_eq!(line(&bob), format!("{LABEL} alice: two"));
    assert_eq!(line(&bob), format!("{LABEL} alice: three"));
    assert_eq!(end(alice), "", "who said it has seen it");
    chat(&world, "alice", "/all four\n").ok();
    assert_eq!(line(&bob), format!("{LABEL} alice: four"));
    assert_eq!(end(bob), "");
}

const ALICE: u8 = 1;
const CAROL: u8 = 3;

/// A page of posts, each with the number and the author that the server gives it.
fn page(client: &mut Scripted, request: u16, posts: &[(u64, u8, Saying)]) {
    let mut lines = Vec::new();
    for (seq, author, saying) in posts {
        let mut room = [0; Said::MAX_LEN];
        let len = Said { seq: *seq, author: [*author; 16], post: saying.post() }.append(&mut room).unwrap();
        lines.extend_from_slice(&room[..len]);
    }
    let page = FollowResponse { request, more: false, lines: &lines };
    client.send(&page.encode(&mut [0; 8192]).unwrap());
}

/// Who is asked for, as the directory knows them.
fn look_up(client: &mut Scripted, request: u16, id: u8) {
    let (name, key) = match id {
        ALICE => ("alice", keys::alice()),
        CAROL => ("carol", keys::carol()),
        _ => {
            client.send(&Message::Refused { request, reason: Reason::Unknown, retry_after: None });
            return;
        }
    };
    let bundle = Published::new(id, &key, 1);
    let entry = DirectoryEntry {
        id: [id; 16],
        name,
        key_epoch: 0,
        record_limit: 16_408,
        status: PeerStatus::Online,
        modulus: Some(public(&key).modulus()),
        bundle: Some(bundle.signed()),
    };
    client.send(&Message::LookupResponse { request, entry });
}

/// Serves until posts behind the last of these are asked for, and returns after which number they were first.
fn serve(client: &mut Scripted, posts: &[(u64, u8, Saying)]) -> u64 {
    let mut first = None;
    loop {
        let payload = client.receive();
        match Message::decode(&payload) {
            Ok(Message::Publish { request, .. }) => client.send(&Message::Done { request }),
            Ok(Message::Lookup(Lookup { request, subject: Subject::Id(id), .. })) => look_up(client, request, id[0]),
            Ok(Message::Status { request }) => client.send(&Message::StatusResponse { request }),
            Ok(Message::Other(body)) if body.code() == Follow::CODE => {
                let Follow { request, after } = Follow::decode(body).unwrap();
                first.get_or_insert(after);
                let rest: Vec<_> = posts.iter().filter(|post| post.0 > after).cloned().collect();
                page(client, request, &rest);
                if rest.is_empty() {
                    return first.unwrap();
                }
                client.send(&News {}.encode(&mut [0; 8]).unwrap());
            }
            _ => {}
        }
    }
}

async fn next_post(access: &mut Access) -> Result<PublicPost, u64> {
    loop {
        match within(access.notice()).await {
            Notice::Public(post) => return Ok(post),
            Notice::PublicDropped { posts } => return Err(posts),
            Notice::Connected | Notice::Disconnected(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lying_server_says_for_others_is_not_shown() {
    let node = Node::start(open()).await;
    let (_directory, home, _) = node.house("bob").await;
    node.stop().await;
    let mut script = Script::new(keys::server());
    let store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let profile = store.profile().unwrap().unwrap();
    store.put_profile(&Profile { port: script.address().port(), ..profile }).unwrap();
    drop(store);
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();

    let by_alice = |count, text: &str| post(ALICE, &keys::alice(), count, text.as_bytes());
    let elsewhere = {
        let author = Member { id: [ALICE; 16], key: keys::alice().fingerprint() };
        let saying = by_alice(12, "said in another network");
        let unsigned = Post { signature: Fixed(&[0; 64]), ..saying.post() };
        let signature = unsigned.sign(&[9; 32], &author, &bundle_keys(ALICE, 1)).unwrap();
        Saying { signature, ..saying }
    };
    let posts = vec![
        (1, ALICE, by_alice(10, "one")),
        (2, ALICE, Saying { body: b"exchanged".to_vec(), ..by_alice(11, "true") }),
        (3, ALICE, by_alice(10, "one")),
        (4, CAROL, by_alice(11, "said by alice")),
        (5, ALICE, by_alice(9, "said before")),
        (6, 77, by_alice(11, "said by nobody")),
        (7, ALICE, elsewhere),
        (8, ALICE, Saying { body: vec![0xff], ..by_alice(11, "no text") }),
        (9, ALICE, by_alice(11, "two")),
    ];
    let server = tokio::task::spawn_blocking(move || {
        let mut client = script.accept(&key);
        assert_eq!(serve(&mut client, &posts), 0);
        drop(client);
        // It gives all of it again, under other numbers.
        let mut client = script.accept(&key);
        let again: Vec<_> = posts.into_iter().map(|(seq, author, said)| (seq + 9, author, said)).collect();
        assert_eq!(serve(&mut client, &again), 9);
        (script, client)
    });
    let mut access = Access::open_reader(&home, "chat").await.unwrap();
    assert!(access.request(Request::Follow).next().await == Reply::Done);
    for text in ["one", "two"] {
        let post = next_post(&mut access).await.unwrap();
        assert_eq!((post.from.as_str(), post.body.as_slice()), ("alice", text.as_bytes()));
        access.read_post(post, false).await.unwrap();
    }
    assert_eq!(next_post(&mut access).await, Err(7));
    assert_eq!(next_post(&mut access).await, Err(9), "and nothing of it is shown a second time");
    let (_script, client) = within(server).await.unwrap();
    drop(client);
    within(access.close()).await;
    let store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    assert_eq!(store.public_place(&[0; 8]).unwrap(), 18);
    assert_eq!(store.last_post_of(&[ALICE; 16]).unwrap(), Some(11));
}

// A server that is busy, or whose store is, gives no page and says nothing of what is new either.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_was_refused_asks_again() {
    let node = Node::start(open()).await;
    let (_directory, home, _) = node.house("bob").await;
    node.stop().await;
    let mut script = Script::new(keys::server());
    let store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let profile = store.profile().unwrap().unwrap();
    store.put_profile(&Profile { port: script.address().port(), ..profile }).unwrap();
    drop(store);
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();
    let server = tokio::task::spawn_blocking(move || {
        let mut client = script.accept(&key);
        let posts = [(1, ALICE, post(ALICE, &keys::alice(), 1, b"at last"))];
        let mut refusals = [Reason::Rate, Reason::Unavailable].into_iter();
        loop {
            let payload = client.receive();
            match Message::decode(&payload) {
                Ok(Message::Publish { request, .. }) => client.send(&Message::Done { request }),
                Ok(Message::Status { request }) => client.send(&Message::StatusResponse { request }),
                Ok(Message::Other(body)) if body.code() == Follow::CODE => {
                    let Follow { request, after } = Follow::decode(body).unwrap();
                    assert_eq!(after, 0);
                    let Some(reason) = refusals.next() else {
                        page(&mut client, request, &posts);
                        client.send(&News {}.encode(&mut [0; 8]).unwrap());
                        break;
                    };
                    client.send(&Message::Refused { request, reason, retry_after: None });
                }
                _ => {}
            }
        }
        assert_eq!(serve(&mut client, &posts), 1);
        (script, client)
    });
    let mut access = Access::open_reader(&home, "chat").await.unwrap();
    assert!(access.request(Request::Follow).next().await == Reply::Done);
    let post = next_post(&mut access).await.unwrap();
    assert_eq!(post.body, b"at last");
    access.read_post(post, false).await.unwrap();
    let (_script, client) = within(server).await.unwrap();
    drop(client);
    within(access.close()).await;
}
