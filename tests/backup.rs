//! Backups at work: an identity that is lost and comes back, a server that does, and what neither may bring with it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::future::Future;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use ossicle::crypto::IdentityKey;
use ossicle::endpoint::{Access, Home, Reply, Request, new_letter};
use ossicle::store::home::{HomeStore, Profile};
use ossicle_core::{
    Bundle, BundleKeys, Conversation, EnvelopeHeader, Member, Message, Reason, Rung, Rungs, RustCrypto, SendingChain,
    WRAP_LEN,
};
use ossicle_tests::cli::{Done, World, binary};
use ossicle_tests::node::{Client, Node, Published, open, within};
use ossicle_tests::script::Script;
use ossicle_tests::{Rng, keys};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn holds(folder: &Path, name: &str) -> bool {
    folder.join(name).exists()
}

#[test]
fn a_lost_identity_comes_back_with_new_keys_and_is_heard_and_hears() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "before"]).ok();
    assert!(listen.line().contains("before"));
    let mut listen = listen;
    let file = world.path("alice.backup");
    let backup = |name: &str, file: &Path| -> Done { world.run(name, &["backup", text(file)]) };
    backup("alice", &file).failed(1, "`ossicle listen`");
    listen.kill();
    let said = backup("alice", &file).ok();
    assert!(said.contains("whoever reads it is this client"), "{said}");
    backup("alice", &file).failed(2, "exists already");

    // Life goes on, with bundles that the backup does not know; then the disk is gone.
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "between"]).ok();
    assert!(listen.line().contains("between"));
    drop(listen);
    let home = world.path("alice");
    fs::rename(&home, world.path("gone")).unwrap();
    world.run("alice", &["restore", text(&file)]).ok();
    assert!(!holds(&home, "channel") && holds(&home, "identity.pem"));

    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "after"]).ok();
    let line = listen.line();
    assert!(line.contains("after"), "nothing comes a second time, and the next one does: {line}");
    world.run("alice", &["send", "--timeout", "1s", "bob", "nobody is there"]).failed(3, "not reached");
    let ears = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "it is still me"]).ok();
    assert!(ears.line().contains("nobody is there"), "it waited for him");
    assert!(ears.line().contains("it is still me"), "pinned, and no alarm");
    drop(listen);

    // In the place of a home only if that is said, and not while somebody uses it.
    world.run("alice", &["restore", text(&file)]).failed(2, "--replace");
    let restored = world.run("alice", &["restore", "--replace", text(&file)]);
    assert!(restored.err.contains("is kept in"), "{}", restored.err);
    restored.ok();
    world.run("bob", &["restore", "--replace", text(&file)]).failed(1, "`ossicle listen`");
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "once more"]).ok();
    assert!(listen.line().contains("once more"));
}

#[test]
fn a_backup_of_an_identity_holds_no_key_of_a_conversation() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let listen = world.listen("alice", &[]);
    world.run("bob", &["send", "alice", "a chain stands", "--wait", "opened"]).ok();
    assert!(listen.line().contains("a chain stands"));
    drop(listen);
    let file = world.path("alice.backup");
    world.run("alice", &["backup", text(&file)]).ok();
    let secret = fs::read(world.path("alice").join("channel")).unwrap();
    let bytes = fs::read(&file).unwrap();
    // The channel's secret stands behind version, count and id.
    assert!(!bytes.windows(32).any(|window| window == &secret[18..50]));
    assert!(!bytes.windows(14).any(|window| window == b"a chain stands"), "what was read stays behind");
}

#[test]
fn a_restored_server_knows_its_clients_and_nothing_dangerous() {
    let mut world = World::with(&["--enroll", "token"]);
    let token_url = world.url.clone();
    for name in ["alice", "bob", "carol", "mallory", "oscar"] {
        world.init(name);
    }
    let data = world.path("server");
    let file = world.path("server.backup");
    let operator = |world: &World, arguments: &[&str]| {
        world.run("alice", &[arguments, &["--data", text(&world.path("server"))]].concat())
    };
    operator(&world, &["revoke", "oscar"]).ok();
    // The server runs on, and does not notice.
    operator(&world, &["backup", text(&file)]).ok();
    world.end_server();
    operator(&world, &["backup", text(&world.path("stopped.backup"))]).ok();
    world.restart_server_with(&["--enroll", "token"]);
    operator(&world, &["revoke", "mallory"]).ok();
    world.run("carol", &["init", "--rotate", "--rsa", "2048"]).ok();
    // Whom the backup does not know it admits in no way.
    for late in ["trudy", "zoe"] {
        world.init(late);
        world.run(late, &["init", "--rotate", "--rsa", "2048"]).ok();
    }
    operator(&world, &["revoke", "trudy"]).ok();
    operator(&world, &["restore", "--replace", text(&file)]).failed(1, "a server runs on");
    world.run("alice", &["who"]).ok();
    world.end_server();

    operator(&world, &["restore", text(&file)]).failed(2, "--replace");
    world
        .run("alice", &["restore", "--home", text(&world.path("elsewhere")), text(&file)])
        .failed(2, "a server's data");
    let restored = operator(&world, &["restore", "--replace", text(&file)]);
    assert!(restored.err.contains("revoke them anew") && restored.err.contains("ossicle revoke mallory"));
    assert!(!restored.err.contains("oscar"), "{}", restored.err);
    let (revoked, rekeyed) = restored.err.split_once("with another key since the backup").unwrap();
    assert!(revoked.contains("mallory") && !revoked.contains("carol"), "{revoked}");
    assert!(rekeyed.contains("ossicle revoke carol --data DIR") && !rekeyed.contains("mallory"), "{rekeyed}");
    assert!(!restored.err.contains("trudy") && !restored.err.contains("zoe"), "{}", restored.err);
    restored.ok();
    assert!(!holds(&data, "channel.key"), "made anew at the next start");

    world.restart_server_with(&["--enroll", "token"]);
    assert!(holds(&data, "channel.key"));
    // Known clients come in without a word, by a full handshake, and publish again.
    let listen = world.listen("bob", &[]);
    world.run("alice", &["send", "bob", "still here"]).ok();
    assert!(listen.line().contains("still here"));
    let full = world.server_log().iter().filter(|line| line.contains("resumed=false")).count();
    assert_eq!(full, 2);
    world.run("oscar", &["who"]).failed(1, "does not let oscar in");
    world.run("mallory", &["who"]).ok();
    world.run("carol", &["who"]).failed(1, "another key since");
    // The token of the URL that was printed before admits nobody any more.
    let former = token_url.rsplit('.').next().unwrap();
    let (address, _) = world.url.rsplit_once('.').unwrap();
    let stale = format!("{address}.{former}");
    world.run("eve", &["init", "--name", "eve", "--rsa", "2048", &stale]).failed(1, "does not take this token");
}

fn shown(node: &Node, id: [u8; 16]) -> impl Future<Output = Bundle> {
    let store = Arc::clone(&node.store);
    async move { Bundle::decode(&store.bundle(&id).await.unwrap().unwrap().bundle).unwrap() }
}

/// A sender whose every word a server, or a thief, has kept.
struct Recorded {
    client: Client,
    own: BundleKeys,
    bundle: Bundle,
    published: Published,
}

impl Recorded {
    async fn new(node: &Node) -> Self {
        let mut client = node.enrol(1, "alice", keys::alice()).await;
        let member = Member { id: client.id, key: keys::alice().fingerprint() };
        let own = BundleKeys::generate(1, &mut Rng::new(1)).unwrap();
        let bundle = own.bundle(&member, 1, [0; 32]);
        let published = Published::sign(&bundle, &keys::alice());
        client.done(&Message::Publish { request: 1, bundle: published.signed() }).await;
        Self { client, own, bundle, published }
    }

    /// The wrap of a chain of this epoch, and its first message.
    fn say(&self, to: &Bundle, epoch: u8, text: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let me = self.bundle.member();
        let conversation = Conversation::direct(&me, &to.member(), 0);
        let mut chain = SendingChain::start(&me, &conversation, epoch.into(), &mut Rng::new(10 + epoch)).unwrap();
        let (mut wrap, mut envelope) = (vec![0; WRAP_LEN], vec![0; 128]);
        let mut random = Rng::new(20 + epoch);
        chain.wrap(&self.own, &self.bundle, &to.member(), to, &mut random, &mut wrap).unwrap();
        let len = chain.seal::<RustCrypto>(true, 0, text, &mut envelope).unwrap().len;
        envelope.truncate(len);
        (wrap, envelope)
    }

    /// Hands both to the server, and returns what the recipient says to each: nothing is a rung.
    async fn send(&mut self, to: [u8; 16], (wrap, envelope): &(Vec<u8>, Vec<u8>)) -> Vec<(Rung, Option<Reason>)> {
        let invite = Message::Wrap { request: 2, to, wrap, bundle: self.published.signed() };
        let n = EnvelopeHeader::decode(envelope).unwrap();
        let mut told = Vec::new();
        self.client.send(&invite).await;
        loop {
            let payload = self.client.message().await;
            match Message::decode(&payload) {
                Ok(Message::Done { .. }) => break,
                // The recipient may be quicker than the server's own answer.
                Ok(Message::Told(receipt)) => {
                    assert_eq!((receipt.chain, receipt.from), (n.chain_id, 0));
                    told.push((receipt.rung, receipt.reason));
                }
                other => panic!("done, or what the recipient says, and not {other:?}"),
            }
        }
        let wanted = Rungs::NONE.with(Rung::Delivered);
        self.client.send(&Message::Send { wanted, envelope }).await;
        while told.last().is_none_or(|(rung, reason)| *rung == Rung::Refused && *reason == Some(Reason::Unreadable)) {
            let receipt = self.client.told().await;
            assert_eq!((receipt.chain, receipt.from), (n.chain_id, 0));
            told.push((receipt.rung, receipt.reason));
        }
        told
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_opens_nothing_at_a_restored_identity() {
    let node = Node::start(open()).await;
    let (directory, home, id) = node.house("bob").await;
    let mut alice = Recorded::new(&node).await;
    let former = shown(&node, id).await;
    let heard = [(Rung::Delivered, None)];

    // One command was obeyed before the backup, one since, and a third was never delivered.
    let access = Access::open_reader(&home, "listen").await.unwrap();
    let read = async |access: &Access| {
        let waiting = within(access.waiting(0, 9)).await.unwrap();
        for message in &waiting {
            within(access.read(message, false)).await.unwrap();
        }
        waiting.into_iter().map(|waiting| waiting.message.body).collect::<Vec<_>>()
    };
    let before = alice.say(&former, 0, b"open the valve");
    assert_eq!(alice.send(id, &before).await, heard);
    assert_eq!(read(&access).await, [b"open the valve"]);
    access.close().await;
    let file = directory.path().join("bob.backup");
    home.back_up(&file).unwrap();
    let access = Access::open_reader(&home, "listen").await.unwrap();
    let since = alice.say(&former, 1, b"and once more");
    assert_eq!(alice.send(id, &since).await, heard);
    assert_eq!(read(&access).await, [b"and once more"]);
    access.close().await;
    let kept_back = alice.say(&former, 2, b"and never again");

    let mut restore = Command::new(binary());
    restore.args(["restore", "--replace", "--home"]).args([home.directory(), &file]);
    let restored = tokio::task::spawn_blocking(move || restore.output()).await.unwrap().unwrap();
    assert!(restored.status.success(), "{restored:?}");

    let access = Access::open_reader(&home, "listen").await.unwrap();
    let refused = [(Rung::Refused, Some(Reason::Unreadable)), (Rung::Refused, Some(Reason::Rekey))];
    for recorded in [&before, &since, &kept_back] {
        assert_eq!(alice.send(id, recorded).await, refused);
    }
    assert_eq!(read(&access).await, [[0; 0]; 0], "nothing is obeyed a second time");
    // Nor is it under the keys of another bundle: all of them are new, and so is what says which.
    let present = shown(&node, id).await;
    assert!(present.epoch > former.epoch && present.prekey_id > former.prekey_id);
    assert!(present.exchange != former.exchange && present.prekey != former.prekey);
    assert_ne!(present.verifying, former.verifying);
    let anew = alice.say(&present, 3, b"close it");
    assert_eq!(alice.send(id, &anew).await, heard);
    assert_eq!(read(&access).await, [b"close it"]);
    // And from here on the replays are too old as well.
    for recorded in [&before, &since, &kept_back] {
        assert_eq!(alice.send(id, recorded).await, refused);
    }
    assert_eq!(read(&access).await, [[0; 0]; 0]);
    access.close().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_identity_does_not_wait_for_ever_for_what_the_directory_knows() {
    let node = Node::start(open()).await;
    let (_directory, home, _) = node.house("bob").await;
    node.stop().await;

    // A server with the same key, which lets him in and has no more to say.
    let mut script = Script::new(keys::server());
    let mut store = HomeStore::open(&home.directory().join("home.db")).unwrap();
    let profile = store.profile().unwrap().unwrap();
    store.put_profile(&Profile { port: script.address().port(), ..profile }).unwrap();
    store.restored().unwrap();
    let key = IdentityKey::load(&home.directory().join("identity.pem")).unwrap();
    let (asked, is_asked) = tokio::sync::oneshot::channel();
    let server = tokio::task::spawn_blocking(move || {
        let mut client = script.accept(&key);
        let said = client.receive();
        assert!(matches!(Message::decode(&said), Ok(Message::Lookup(_))), "nothing is said before the directory was");
        asked.send(()).unwrap();
        assert!(client.is_ended());
    });
    let access = Access::open(&home, "who").await.unwrap();
    let mut status = access.request(Request::Status);
    within(is_asked).await.unwrap();
    // Who asks what this home knows by itself is answered, and who wants it to end is obeyed.
    assert!(matches!(within(status.next()).await, Reply::Status(_)));
    within(access.close()).await;
    within(server).await.unwrap();
    assert!(store.keys().unwrap().unwrap().restored, "the next connection asks again");
}

/// Sends bob a text; the last thing that is told of it.
async fn say(home: &Home, text: &str) -> Reply {
    let access = Access::open(home, "send").await.unwrap();
    let (to, body, until) = ("bob".to_owned(), text.as_bytes().to_vec(), Rung::Delivered);
    let mut sending =
        access.request(Request::Send { letter: new_letter().unwrap(), to, body, signed: false, until, keep: false });
    let last = within(async {
        loop {
            let reply = sending.next().await;
            if reply.is_final() {
                break reply;
            }
        }
    });
    let last = last.await;
    access.close().await;
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_that_was_put_back_by_a_plain_copy_is_heard_again() {
    let node = Node::start(open()).await;
    let (_bobs, bob, _) = node.house("bob").await;
    let (directory, alice, id) = node.house("alice").await;
    let database = alice.directory().join("home.db");
    // Her keys were not made a moment ago.
    let mut store = HomeStore::open(&database).unwrap();
    let mut own = store.keys().unwrap().unwrap();
    own.keys.rotate(&mut Rng::new(9)).unwrap();
    let bundle = own.keys.bundle(&own.bundle.member(), 2, own.bundle.hash());
    let key = IdentityKey::load(&alice.directory().join("identity.pem")).unwrap();
    store.put_keys(&own.keys, &bundle, &key.sign(&bundle.statement()).unwrap(), own.made - 7200).unwrap();
    drop(store);

    let listening = Access::open_reader(&bob, "listen").await.unwrap();
    assert!(matches!(say(&alice, "0").await, Reply::Done));
    let copy = directory.path().join("home.db.copy");
    fs::copy(&database, &copy).unwrap();
    // Each command begins a chain.
    for text in ["1", "2", "3", "4", "5", "6", "7", "8"] {
        assert!(matches!(say(&alice, text).await, Reply::Done), "{text}");
    }
    assert_eq!(shown(&node, id).await, bundle);
    for file in ["home.db-wal", "home.db-shm"] {
        let _ = fs::remove_file(alice.directory().join(file));
    }
    fs::copy(&copy, &database).unwrap();

    // What is behind by eight chains is told so by the first, and has other keys then, as if it had been restored.
    assert!(matches!(say(&alice, "9").await, Reply::Done));
    let anew = shown(&node, id).await;
    assert!(anew.epoch > bundle.epoch && anew.exchange != bundle.exchange && anew.verifying != bundle.verifying);
    assert!(matches!(say(&alice, "10").await, Reply::Done));
    assert_eq!(shown(&node, id).await, anew, "once is enough");
    let texts: Vec<_> = within(listening.waiting(0, 20)).await.unwrap();
    let texts: Vec<_> = texts.into_iter().map(|waiting| String::from_utf8(waiting.message.body).unwrap()).collect();
    assert_eq!(texts, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]);
    listening.close().await;
    node.stop().await;
}
