//! Who comes and goes, as those learn it who watch: at a real server over TCP, and with the real binary.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use ossicle::server::Config;
use ossicle::store::Enrolment;
use ossicle_core::{Change, Changed, MAX_WATCHED, Message, PeerStatus, Reason, Unwatch, Watch, WatchResponse};
use ossicle_tests::cli::{DEADLINE, Running, World};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Heard, Node, enrolled, open};

const ALICE: u8 = 1;
const BOB: u8 = 2;
const CAROL: u8 = 3;

/// What a watcher knows: name and whether it is there, or `None` of who was revoked.
type Seen = (String, Option<bool>);

fn seen(line: Change<'_>) -> Seen {
    (line.name.to_owned(), line.status.map(|status| status == PeerStatus::Online))
}

fn lines(bytes: &[u8]) -> Vec<Seen> {
    Change::lines(bytes).map(|line| seen(line.expect("a whole line"))).collect()
}

fn is(name: &str, online: impl Into<Option<bool>>) -> Seen {
    (name.to_owned(), online.into())
}

async fn send_watch(client: &mut Client, pattern: &str, after: &str) {
    let mut buffer = [0; 512];
    let watch = Watch { request: 7, pattern, after };
    client.send(&watch.encode(&mut buffer).unwrap()).await;
}

/// The next page, `next` and lines; what changed meanwhile goes to `changes`.
async fn page(client: &mut Client, changes: &mut Vec<Seen>) -> (String, Vec<Seen>) {
    loop {
        let payload = client.message().await;
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        if let Ok(changed) = Changed::decode(body) {
            changes.extend(lines(changed.lines));
            continue;
        }
        let page = WatchResponse::decode(body).expect("a page");
        assert_eq!(page.request, 7);
        return (page.next.to_owned(), lines(page.lines));
    }
}

/// Watches, and returns who is there, in how many pages.
async fn watch(client: &mut Client, pattern: &str) -> (Vec<Seen>, usize) {
    let (mut all, mut after, mut pages, mut changes) = (Vec::new(), String::new(), 0, Vec::new());
    loop {
        send_watch(client, pattern, &after).await;
        let (next, lines) = page(client, &mut changes).await;
        pages += 1;
        all.extend(lines);
        if next.is_empty() {
            // Where somebody was told of meanwhile, it is nothing new, and the page leaves it out.
            for told in changes {
                assert_eq!(told, is("bob", true), "nothing changes here meanwhile");
                if !all.contains(&told) {
                    all.push(told);
                }
            }
            return (all, pages);
        }
        after = next;
    }
}

async fn refused_watch(client: &mut Client, pattern: &str, after: &str) -> Reason {
    let mut buffer = [0; 512];
    let watch = Watch { request: 7, pattern, after };
    client.refusal(&watch.encode(&mut buffer).unwrap()).await
}

async fn unwatch(client: &mut Client, pattern: &str) {
    let mut buffer = [0; 512];
    client.done(&Unwatch { request: 8, pattern }.encode(&mut buffer).unwrap()).await;
}

/// Whatever is told until `last` is, without what is said twice.
async fn until(client: &mut Client, last: Seen) -> Vec<Seen> {
    let (mut told, mut known) = (Vec::new(), HashMap::new());
    while told.last() != Some(&last) {
        let payload = client.message().await;
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        let changed = Changed::decode(body).expect("changes");
        assert!(!changed.lost);
        for (name, online) in lines(changed.lines) {
            if known.insert(name.clone(), online) != Some(online) {
                told.push((name, online));
            }
        }
    }
    told
}

/// Enters clients that never connect.
async fn enter(node: &Node, count: u16, name: impl Fn(u16) -> String) {
    for number in 0..count {
        let mut modulus = keys::carol().modulus().to_vec();
        modulus[10..12].copy_from_slice(&number.to_be_bytes());
        let enrolment = Enrolment {
            id: fake(number),
            name: name(number).parse().unwrap(),
            modulus,
            token_id: None,
            enrolled_by: None,
            record_limit: 1024,
            now: 1,
        };
        node.store.enrol(enrolment).await.unwrap();
    }
}

fn fake(number: u16) -> [u8; 16] {
    let mut id = [200; 16];
    id[..2].copy_from_slice(&number.to_be_bytes());
    id
}

#[tokio::test]
async fn a_watcher_is_told_who_is_there_and_who_comes_and_goes() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    assert_eq!(watch(&mut alice, "*").await.0, [is("alice", false)]);
    let mut bob = node.enrol(BOB, "Bob", keys::bob()).await;
    assert_eq!(until(&mut alice, is("Bob", false)).await, [is("Bob", false)]);
    bob.listen().await;
    assert_eq!(until(&mut alice, is("Bob", true)).await, [is("Bob", true)]);
    // He says so himself, and says it again.
    bob.send(&Message::NotListening).await;
    assert_eq!(until(&mut alice, is("Bob", false)).await, [is("Bob", false)]);
    let seen = || async { node.store.client(&[BOB; 16]).await.unwrap().unwrap().last_seen };
    bob.sync().await;
    assert!(seen().await.is_some());
    bob.listen().await;
    assert_eq!(until(&mut alice, is("Bob", true)).await, [is("Bob", true)]);
    // A close, and an end without one.
    bob.close().await;
    assert_eq!(until(&mut alice, is("Bob", false)).await, [is("Bob", false)]);
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    bob.listen().await;
    assert_eq!(until(&mut alice, is("Bob", true)).await, [is("Bob", true)]);
    drop(bob);
    assert_eq!(until(&mut alice, is("Bob", false)).await, [is("Bob", false)]);
    // Who watches is told of himself, too.
    alice.send(&Message::Listening).await;
    assert_eq!(until(&mut alice, is("alice", true)).await, [is("alice", true)]);
    node.stop().await;
}

#[tokio::test]
async fn who_is_silent_for_too_long_is_told_to_have_gone_and_when() {
    let node = Node::start(Config { heartbeat: 1, timeout: 2, ..open() }).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    assert_eq!(watch(&mut alice, "b*").await.0, [is("bob", true)]);
    // The connection stands, and nobody answers any more.
    let payload = alice.message().await;
    let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
    let changed = Changed::decode(body).unwrap();
    let gone: Vec<_> = Change::lines(changed.lines).map(Result::unwrap).collect();
    let PeerStatus::Offline { last_seen: Some(at) } = gone[0].status.unwrap() else { panic!("{gone:?}") };
    assert!(at >= bob.settings.time && gone.len() == 1);
    node.stop().await;
}

#[tokio::test]
async fn a_connection_that_takes_over_is_no_absence_unless_it_never_listens() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    assert_eq!(watch(&mut alice, "*").await.0, [is("alice", false), is("bob", true)]);
    let mut last = bob;
    for number in 0..10 {
        let mut next = node.connect(BOB, &keys::bob()).await.unwrap();
        assert_eq!(last.hear().await, Heard::Closed(Some(Reason::TakenOver)));
        // Whoever looks meanwhile sees no gap either.
        let mut there = watch(&mut alice, if number % 2 == 0 { "bob" } else { "b?b" }).await.0;
        if there.is_empty() {
            // He was told of while the page was made, and that comes behind it.
            there = until(&mut alice, is("bob", true)).await;
        }
        assert_eq!(there, [is("bob", true)]);
        next.listen().await;
        last = next;
    }
    let carol = node.enrol(CAROL, "carol", keys::carol()).await;
    let told = until(&mut alice, is("carol", false)).await;
    assert!(told.iter().all(|(name, online)| name != "bob" || *online == Some(true)), "{told:?}");
    // A new connection that goes without having listened, and one that stays and does not.
    node.connect(BOB, &keys::bob()).await.unwrap().close().await;
    assert_eq!(until(&mut alice, is("bob", false)).await.last(), Some(&is("bob", false)));
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    bob.listen().await;
    until(&mut alice, is("bob", true)).await;
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    until(&mut alice, is("bob", false)).await;
    bob.sync().await;
    drop(carol);
    node.stop().await;
}

#[tokio::test]
async fn the_revoked_go_at_once_from_connections_listings_and_watchers() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    bob.listen().await;
    enter(&node, 1, |_| "away".into()).await;
    assert_eq!(watch(&mut alice, "*").await.0, [is("alice", false), is("away", false), is("bob", true)]);
    node.server.revoke(&[BOB; 16]).await.unwrap();
    assert_eq!(bob.hear().await, Heard::Closed(Some(Reason::Unauthorised)));
    assert_eq!(until(&mut alice, is("bob", None)).await.last(), Some(&is("bob", None)));
    node.server.revoke(&fake(0)).await.unwrap();
    assert_eq!(until(&mut alice, is("away", None)).await, [is("away", None)]);
    assert_eq!(watch(&mut alice, "*").await.0, [is("alice", false)]);
    let answer = alice.ask(&Message::List { request: 8, after: "" }).await;
    let Ok(Message::ListResponse(list)) = Message::decode(&answer) else { panic!("a list") };
    assert_eq!(list.lines().map(|line| line.unwrap().name).collect::<Vec<_>>(), ["alice"]);
    assert!(node.connect(BOB, &keys::bob()).await.is_err());
    // The watcher himself.
    node.server.revoke(&[ALICE; 16]).await.unwrap();
    while let Heard::Message(_) = alice.hear().await {}
    node.stop().await;
}

#[tokio::test]
async fn patterns_are_checked_counted_and_taken_back() {
    let node = Node::start(open()).await;
    let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
    for pattern in ["", "[a", "a b", "\u{1b}[2J", &"x".repeat(257)] {
        assert_eq!(refused_watch(&mut alice, pattern, "").await, Reason::Malformed, "{pattern:?}");
    }
    assert_eq!(refused_watch(&mut alice, "*", "alice").await, Reason::Unknown, "nothing is watched yet");
    for number in 0..MAX_WATCHED {
        watch(&mut alice, &format!("B*{number}")).await;
    }
    assert_eq!(refused_watch(&mut alice, "one more", "").await, Reason::Malformed);
    assert_eq!(refused_watch(&mut alice, "one-more", "").await, Reason::TooLarge);
    watch(&mut alice, "B*0").await;
    assert_eq!(refused_watch(&mut alice, "*", "alice").await, Reason::Unknown);
    unwatch(&mut alice, "B*0").await;
    unwatch(&mut alice, "never-watched").await;
    watch(&mut alice, "bo[a-f]*").await;
    // Compared as names are, whatever the case; and what is watched no more is not told.
    let bob = node.enrol(BOB, "BOBBY", keys::bob()).await;
    assert_eq!(until(&mut alice, is("BOBBY", false)).await, [is("BOBBY", false)]);
    unwatch(&mut alice, "bo[a-f]*").await;
    bob.close().await;
    for number in 1..MAX_WATCHED {
        unwatch(&mut alice, &format!("B*{number}")).await;
    }
    let mut bob = node.connect(BOB, &keys::bob()).await.unwrap();
    bob.listen().await;
    watch(&mut alice, "*").await;
    alice.sync().await;
    node.stop().await;
}

#[tokio::test]
async fn a_device_with_short_records_gets_pages_and_changes_that_fit() {
    let node = Node::start(open()).await;
    node.enrol(ALICE, "alice", keys::alice()).await.close().await;
    let long = |number: u16| format!("sensor-{number:03}-{}", "x".repeat(53));
    enter(&node, 100, long).await;
    let mut small = Client::connect_with(&node, &enrolled(ALICE, &keys::alice()), &keys::alice(), 1024).await.unwrap();
    let (all, pages) = watch(&mut small, "sensor-*").await;
    assert_eq!(all, (0..100).map(|number| is(&long(number), false)).collect::<Vec<_>>());
    assert!((8..=11).contains(&pages), "{pages}");
    // A pattern that selects few takes few pages.
    let (few, pages) = watch(&mut small, "sensor-0?0-*").await;
    assert_eq!((few.len(), pages), (10, 1));
    for number in 0..100 {
        node.server.revoke(&fake(number)).await.unwrap();
    }
    let told = until(&mut small, is(&long(99), None)).await;
    assert_eq!(told.len(), 100);
    node.stop().await;
}

#[tokio::test]
async fn a_watcher_that_never_reads_holds_nobody_up_and_learns_in_the_end() {
    let node = Node::start(open()).await;
    let mut lazy = node.enrol(ALICE, "alice", keys::alice()).await;
    let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
    let mut carol = node.enrol(CAROL, "carol", keys::carol()).await;
    enter(&node, 200, |number| format!("s-{number}-{}", "y".repeat(50))).await;
    let (all, _) = watch(&mut lazy, "*").await;
    assert_eq!(all.len(), 203);
    watch(&mut carol, "bob").await;
    // From here on the lazy one reads nothing.
    for _ in 0..1000 {
        bob.send(&Message::Listening).await;
        bob.send(&Message::NotListening).await;
    }
    bob.listen().await;
    for number in 0..200 {
        node.server.revoke(&fake(number)).await.unwrap();
    }
    bob.sync().await;
    let mut told = 0;
    loop {
        let payload = carol.message().await;
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        let lines = lines(Changed::decode(body).unwrap().lines);
        told += lines.len();
        // It may have been told so in the midst of it, but not only then.
        if lines.last() == Some(&is("bob", true)) && watch(&mut carol, "bob").await.0 == [is("bob", true)] {
            break;
        }
    }
    assert!(told <= 2001, "{told}");
    // Now it reads: whatever it missed, it knows everything in the end.
    let mut known: HashMap<String, Option<bool>> = all.into_iter().collect();
    let expected = HashSet::from(["alice".to_owned(), "bob".into(), "carol".into()]);
    let there = |known: &HashMap<String, Option<bool>>| {
        known.iter().filter(|(_, status)| status.is_some()).map(|(name, _)| name.clone()).collect::<HashSet<_>>()
    };
    while there(&known) != expected || known["bob"] != Some(true) {
        let payload = lazy.message().await;
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        let changed = Changed::decode(body).unwrap();
        known.extend(lines(changed.lines));
        if changed.lost {
            known = watch_through(&mut lazy).await;
        }
    }
    node.stop().await;
}

/// As [`watch`] of everybody, while there may be changes.
async fn watch_through(client: &mut Client) -> HashMap<String, Option<bool>> {
    let (mut known, mut after) = (HashMap::new(), String::new());
    loop {
        let mut changes = Vec::new();
        send_watch(client, "*", &after).await;
        let (next, lines) = page(client, &mut changes).await;
        known.extend(changes);
        known.extend(lines);
        if next.is_empty() {
            return known;
        }
        after = next;
    }
}

/// The next event: what, who, and whether online.
fn event(running: &Running) -> (String, String, bool) {
    let line = running.line();
    let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"));
    let text = |key: &str| value[key].as_str().unwrap_or_else(|| panic!("{key} in {line}")).to_owned();
    assert!(value["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
    (text("event"), text("name"), value["online"].as_bool().unwrap())
}

/// Events up to this one.
fn events_until(running: &Running, what: &str, name: &str) -> Vec<(String, String)> {
    let mut events = Vec::new();
    loop {
        let (event, who, _) = event(running);
        events.push((event.clone(), who.clone()));
        if (event.as_str(), who.as_str()) == (what, name) {
            return events;
        }
    }
}

fn expect(running: &Running, what: &str, name: &str, online: bool) {
    assert_eq!(event(running), (what.to_owned(), name.to_owned(), online));
}

#[test]
fn who_goes_on_through_everything_that_happens_to_others() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let watching = world.spawn("alice", &["who", "[!a]*", "--watch", "--json"]);
    expect(&watching, "present", "bob", false);
    let mut listening = world.spawn("bob", &["listen"]);
    expect(&watching, "online", "bob", true);
    // A second one, for people, through the first one's connection.
    let plain = world.spawn("alice", &["who", "--watch"]);
    let first = [plain.line(), plain.line()];
    assert!(first[0].starts_with("alice  offline, ") && first[1] == "bob    online", "{first:?}");
    listening.kill();
    expect(&watching, "offline", "bob", false);
    let line = plain.line();
    assert!(line.contains("Z  bob  offline, last seen 2"), "{line}");
    world.init("carol");
    expect(&watching, "enrolled", "carol", false);
    assert!(plain.line().ends_with("Z  carol  enrolled"));
    // One that ends in good order; another process of the same home is no absence of bob's.
    let listening = world.spawn("bob", &["listen"]);
    expect(&watching, "online", "bob", true);
    assert!(plain.line().ends_with("Z  bob  online"));
    world.run("bob", &["who"]).ok();
    world.run("bob", &["send", "carol", "hello", "--wait", "stored"]).ok();
    listening.signal("INT");
    listening.wait();
    expect(&watching, "offline", "bob", false);
    let data = world.path("server");
    world.run("alice", &["revoke", "carol", "--data", data.to_str().unwrap()]).ok();
    expect(&watching, "revoked", "carol", false);
    for running in [watching, plain] {
        running.signal("INT");
        assert_eq!(running.wait().code, Some(130));
    }
}

#[test]
fn who_goes_on_through_a_restart_of_the_server_and_tells_what_is_different() {
    let mut world = World::new();
    for name in ["alice", "bob", "carol"] {
        world.init(name);
    }
    let listening = world.listen("bob", &[]);
    let watching = world.spawn("alice", &["who", "--watch", "--json"]);
    for (name, online) in [("alice", false), ("bob", true), ("carol", false)] {
        expect(&watching, "present", name, online);
    }
    world.restart_server();
    // While he is not back, he is told to be away, or he was quicker.
    let carol = world.spawn("carol", &["listen"]);
    let events = events_until(&watching, "online", "carol");
    let of_bob = |events: &[(String, String)]| {
        events.iter().filter(|(_, name)| name == "bob").map(|(event, _)| event.clone()).collect::<Vec<_>>()
    };
    let mut bob = of_bob(&events);
    while bob.len() % 2 == 1 {
        bob.push(event(&watching).0);
    }
    assert!(bob.is_empty() || bob == ["offline", "online"], "{bob:?}");
    // Revoked while there is no server to be asked.
    world.stop_server();
    let data = world.path("server");
    world.run("alice", &["revoke", "carol", "--data", data.to_str().unwrap()]).ok();
    world.restart_server();
    events_until(&watching, "revoked", "carol");
    let said = watching.said();
    assert!(said.contains("what changes meanwhile is told afterwards"), "{said}");
    carol.wait().failed(1, "does not let carol in");
    for running in [watching, listening] {
        running.signal("INT");
        running.wait();
    }
}

#[test]
fn whoever_watches_makes_room_for_a_reader_and_goes_on_through_him() {
    let world = World::new();
    for name in ["alice", "bob"] {
        world.init(name);
    }
    let watching = world.spawn("alice", &["who", "--watch", "--json"]);
    expect(&watching, "present", "alice", false);
    expect(&watching, "present", "bob", false);
    let mut listening = world.spawn("alice", &["listen"]);
    expect(&watching, "online", "alice", true);
    let bob = world.spawn("bob", &["listen"]);
    expect(&watching, "online", "bob", true);
    // The reader leaves in good order at once, though somebody watches through him.
    let begun = Instant::now();
    listening.signal("INT");
    while listening.is_running() {
        assert!(begun.elapsed() < DEADLINE, "it does not end");
        std::thread::sleep(core::time::Duration::from_millis(20));
    }
    expect(&watching, "offline", "alice", false);
    // And one that is killed.
    let mut listening = world.spawn("alice", &["listen"]);
    expect(&watching, "online", "alice", true);
    listening.kill();
    expect(&watching, "offline", "alice", false);
    bob.signal("INT");
    bob.wait();
    expect(&watching, "offline", "bob", false);
    watching.signal("INT");
    watching.wait();
}

#[test]
fn what_cannot_be_watched_is_refused_in_one_sentence() {
    let world = World::new();
    world.init("alice");
    let wrong = world.run("alice", &["who", "[z", "--watch"]);
    assert!(wrong.code == Some(2) && wrong.err.contains("needs its ']'"), "{wrong:?}");
    world.run("nobody", &["who", "--watch"]).failed(2, "ossicle init");
    let data = world.path("server");
    world.run("alice", &["revoke", "alice", "--data", data.to_str().unwrap()]).ok();
    world.run("alice", &["who", "--watch"]).failed(1, "does not let alice in");
}
