//! What a home keeps until it is delivered: the real commands, which are killed, come too early or find nobody, at a server
//! that does what each test tells it to.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use ossicle::crypto::{HostAead, IdentityKey};
use ossicle::endpoint::{Home, ServerUrl, initialise};
use ossicle::name::Name;
use ossicle::store::home::groups::{Group, GroupMember, Membership, Standing};
use ossicle::store::home::{HomeStore, Letter, LetterChange, MAX_LETTERS, Peer, Profile};
use ossicle_core::{
    Bundle, BundleKeys, Conversation, Decision, DirectoryEntry, EnvelopeHeader, Fixed, GroupFlags, Invite, Member,
    MemberChanged, MemberState, Members, Message, PeerStatus, Reason, Receipt, ReceivingChain, Rung, Rungs,
    SEALED_NAME_LEN, SendingChain, SignedBundle, Subject, ToldBy, WRAP_LEN, WrapHeader, direct_sid,
};
use ossicle_tests::cli::{Done, Running, binary};
use ossicle_tests::node::{Node, open};
use ossicle_tests::script::{Script, Scripted};
use ossicle_tests::{Rng, keys};
use serde_json::Value;
use tempfile::TempDir;

const BOB: [u8; 16] = [0xb0; 16];
/// Who would like to listen.
const MALLORY: [u8; 16] = [0x3a; 16];
const PLANS: [u8; 16] = [0x91; 16];
const LAST_SEEN: u64 = 1_600_000_000;

/// Alice's home, and the server that it belongs to.
struct Place {
    directory: TempDir,
    script: Script,
    key: IdentityKey,
    bob: Bob,
}

/// Bob, as far as the server shows him.
struct Bob {
    keys: BundleKeys,
    bundle: Bundle,
    signature: Vec<u8>,
    is_online: bool,
    /// Whether he refuses each chain, before the server has confirmed that it passed it on.
    is_hostile: bool,
    /// What Alice has begun, by its id.
    chains: HashMap<[u8; 8], ReceivingChain<256>>,
    wraps: Vec<Vec<u8>>,
    /// The group that he is in with Alice.
    group: Option<Conversation>,
}

/// What a client says beside what every server answers alike.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Listening,
    Wrap([u8; 8]),
    Sent(Rungs, Vec<u8>),
    Tell(Rung, Option<Reason>, [u8; 8], u32),
    Acknowledge(u64),
    Published,
    Farewell,
}

impl Place {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let node = Node::start(open()).await;
            let fingerprint: String = node.server.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
            let url = ServerUrl::parse(&format!("ossicle://{}#{fingerprint}", node.address)).unwrap();
            let home = Home::new(directory.path().join("alice"));
            initialise(&home, &Name::parse("alice").unwrap(), 2048, &url, false).await.unwrap();
            node.stop().await;
        });
        let script = Script::new(keys::server());
        let key = IdentityKey::load(&directory.path().join("alice/identity.pem")).unwrap();
        let keys = BundleKeys::generate(1, &mut Rng::new(9)).unwrap();
        let bundle = keys.bundle(&Member { id: BOB, key: keys::bob().fingerprint() }, 5, [0; 32]);
        let signature = keys::bob().sign(&bundle.statement()).unwrap();
        let bob = Bob {
            keys,
            bundle,
            signature,
            is_online: false,
            is_hostile: false,
            chains: HashMap::new(),
            wraps: Vec::new(),
            group: None,
        };
        let mut place = Self { directory, script, key, bob };
        place.point(place.script.address().port());
        place
    }

    /// From now on the home's server is at this port.
    fn point(&mut self, port: u16) {
        let store = self.store();
        let profile = store.profile().unwrap().unwrap();
        store.put_profile(&Profile { port, store_epoch: Some([0; 8]), ..profile }).unwrap();
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("alice")
    }

    fn store(&self) -> HomeStore {
        HomeStore::open(&self.home().join("home.db")).unwrap()
    }

    fn letters(&self) -> Vec<Letter> {
        self.store().letters().unwrap().0
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("OSSICLE_HOME", self.home()).env_remove("RUST_LOG");
        command
    }

    fn spawn(&self, arguments: &[&str]) -> Running {
        Running::start(&mut self.command(arguments))
    }

    fn run(&self, arguments: &[&str]) -> Done {
        let mut running = self.spawn(arguments);
        running.end_input();
        running.wait()
    }

    fn accept(&mut self) -> Scripted {
        self.script.accept(&self.key)
    }

    fn alice(&self) -> (BundleKeys, Bundle, Vec<u8>) {
        let own = self.store().keys().unwrap().unwrap();
        (own.keys, own.bundle, own.signature)
    }

    /// What the client says next; what every server answers alike is answered.
    fn hear(&mut self, client: &mut Scripted) -> Heard {
        let modulus = keys::bob().modulus().to_vec();
        loop {
            let Some(payload) = client.receive_or_close() else { return Heard::Farewell };
            match Message::decode(&payload).unwrap() {
                Message::Lookup(lookup) => {
                    if lookup.subject == Subject::Id(MALLORY) {
                        let (_, bundle, signature) = mallory();
                        let (bundle, modulus) = (bundle.encode(), keys::carol().modulus().to_vec());
                        let signed = SignedBundle { bundle: &bundle, signature: &signature };
                        let entry = DirectoryEntry {
                            id: MALLORY,
                            name: "mallory",
                            key_epoch: 0,
                            record_limit: 16_408,
                            status: PeerStatus::Online,
                            modulus: lookup.key.then_some(&modulus),
                            bundle: lookup.bundle.then_some(signed),
                        };
                        client.send(&Message::LookupResponse { request: lookup.request, entry });
                        continue;
                    }
                    let bundle = self.bob.bundle.encode();
                    let signed = SignedBundle { bundle: &bundle, signature: &self.bob.signature };
                    let status = match self.bob.is_online {
                        true => PeerStatus::Online,
                        false => PeerStatus::Offline { last_seen: Some(LAST_SEEN) },
                    };
                    let entry = DirectoryEntry {
                        id: BOB,
                        name: "bob",
                        key_epoch: 0,
                        record_limit: 16_408,
                        status,
                        modulus: lookup.key.then_some(&modulus),
                        bundle: lookup.bundle.then_some(signed),
                    };
                    client.send(&Message::LookupResponse { request: lookup.request, entry });
                }
                Message::Publish { request, .. } => {
                    client.send(&Message::Done { request });
                    return Heard::Published;
                }
                Message::Wrap { request, to, wrap, .. } => {
                    assert_eq!(to, BOB, "a chain for somebody else");
                    let id = self.bob.accept(wrap, &self.alice().1);
                    if self.bob.is_hostile {
                        let reason = Some(Reason::Rekey);
                        let receipt = Receipt { rung: Rung::Refused, reason, chain: id, from: 0, to: 0, tag: None };
                        client.send(&ToldBy { from: BOB, receipt }.encode(&mut [0; 128]).unwrap());
                    }
                    client.send(&Message::Done { request });
                    return Heard::Wrap(id);
                }
                Message::Send { wanted, envelope } => return Heard::Sent(wanted, envelope.to_vec()),
                Message::Tell(receipt) => {
                    return Heard::Tell(receipt.rung, receipt.reason, receipt.chain, receipt.from);
                }
                Message::Acknowledge { seq } => return Heard::Acknowledge(seq),
                Message::Listening => return Heard::Listening,
                Message::Status { request } => client.send(&Message::StatusResponse { request }),
                Message::NotListening | Message::StatusResponse { .. } => {}
                other => panic!("the client said {other:?}"),
            }
        }
    }

    /// The next envelope, and the wraps before it.
    fn envelope(&mut self, client: &mut Scripted) -> Vec<u8> {
        loop {
            match self.hear(client) {
                Heard::Sent(_, envelope) => return envelope,
                Heard::Wrap(_) | Heard::Listening | Heard::Published => {}
                other => panic!("{other:?} instead of a message"),
            }
        }
    }

    /// Hears a command out.
    fn farewell(&mut self, client: &mut Scripted) {
        while self.hear(client) != Heard::Farewell {}
    }
}

impl Bob {
    fn accept(&mut self, wrap: &[u8], alice: &Bundle) -> [u8; 8] {
        self.wraps.push(wrap.to_vec());
        let id = WrapHeader::decode(wrap).unwrap().chain_id;
        let is_groups = |group: &Conversation| WrapHeader::decode(wrap).unwrap().sid == group.sid;
        let direct = Conversation::direct(&self.bundle.member(), &alice.member(), 0);
        let conversation = self.group.filter(is_groups).unwrap_or(direct);
        let prekey = self.keys.prekey(&self.bundle).unwrap();
        let mut wrap = wrap.to_vec();
        let mut accept = || ReceivingChain::accept(&mut wrap, &prekey, &alice.member(), alice, &conversation, None);
        self.chains.entry(id).or_insert_with_key(|_| accept().unwrap());
        id
    }

    /// What an envelope says, and its receipt that it came so far.
    fn open(&mut self, envelope: &[u8], rung: Rung) -> (String, Receipt) {
        let header = EnvelopeHeader::decode(envelope).unwrap();
        let chain = self.chains.get_mut(&header.chain_id).unwrap();
        let mut bytes = envelope.to_vec();
        let text = String::from_utf8(chain.open::<HostAead>(&mut bytes).unwrap().body.to_vec()).unwrap();
        (text, chain.receipt(&BOB, rung, header.n, header.n).unwrap())
    }
}

/// What a server, or a recipient without keys, says of an envelope.
fn word(rung: Rung, reason: Option<Reason>, envelope: &[u8]) -> Message<'static> {
    let EnvelopeHeader { chain_id, n, .. } = EnvelopeHeader::decode(envelope).unwrap();
    Message::Told(Receipt { rung, reason, chain: chain_id, from: n, to: n, tag: None })
}

#[test]
fn what_a_killed_send_left_goes_again_as_the_same_bytes() {
    let mut place = Place::new();
    let mut send = place.spawn(&["send", "bob", "hello"]);
    let mut client = place.accept();
    let first = place.envelope(&mut client);
    send.kill();
    let kept = place.letters();
    assert_eq!((kept.len(), kept[0].to.as_str(), kept[0].reached), (1, "bob", None));

    // Whoever has the home next sends it: the same wrap, the same envelope.
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), first);
    assert_eq!(place.bob.wraps.len(), 2);
    assert_eq!(place.bob.wraps[0], place.bob.wraps[1]);
    let (text, receipt) = place.bob.open(&first, Rung::Delivered);
    assert_eq!(text, "hello");
    // Nobody but Bob can say that he has it, also to a process that did not seal it.
    client.send(&Message::Told(Receipt { tag: Some([7; 16]), ..receipt }));
    client.send(&word(Rung::Stored, None, &first));
    client.send(&Message::Told(receipt));
    while !listen.said().contains("delivered to bob: hello, of 20") {
        assert!(listen.said().len() < 10_000);
        std::thread::yield_now();
    }
    listen.signal("INT");
    listen.wait();
    assert!(place.letters().is_empty());
    assert!(place.store().letter_chains().unwrap().is_empty());
}

#[test]
fn what_a_new_chain_cures_is_sealed_anew_by_the_next_command() {
    for reason in [Reason::Rekey, Reason::Gap, Reason::Rewound, Reason::Unreadable] {
        let mut place = Place::new();
        let mut send = place.spawn(&["send", "bob", "hello", "--no-sign"]);
        let mut client = place.accept();
        let first = place.envelope(&mut client);
        send.kill();
        let mut again = place.spawn(&["send", "bob", "and this"]);
        let mut client = place.accept();
        assert_eq!(place.envelope(&mut client), first);
        client.send(&word(Rung::Refused, Some(reason), &first));
        // In their order, in the new chain.
        for expected in ["hello", "and this"] {
            let anew = place.envelope(&mut client);
            assert_ne!(anew[..8], first[..8], "{reason}");
            let (text, receipt) = place.bob.open(&anew, Rung::Delivered);
            assert_eq!(text, expected);
            client.send(&Message::Told(receipt));
        }
        place.farewell(&mut client);
        again.end_input();
        again.wait().ok();
        assert!(place.letters().is_empty(), "{reason}");
    }
}

#[test]
fn whoever_waits_for_somebody_offline_is_told_at_once_and_loses_nothing() {
    let mut place = Place::new();
    let send = place.spawn(&["send", "bob", "call me", "--timeout", "3s", "--json"]);
    let mut client = place.accept();
    let Heard::Wrap(_) = place.hear(&mut client) else { panic!("a chain first") };
    let Heard::Sent(wanted, envelope) = place.hear(&mut client) else { panic!("then the message") };
    assert!([Rung::Accepted, Rung::Stored, Rung::Delivered].into_iter().all(|rung| wanted.contains(rung)));
    assert!(!wanted.contains(Rung::Opened));
    client.send(&word(Rung::Accepted, None, &envelope));
    client.send(&word(Rung::Stored, None, &envelope));
    place.farewell(&mut client);
    let done = send.wait().failed(3, "not reached within 3s: bob is offline, last seen 2020-09-13T12:26:40Z");
    assert!(done.err.contains("the server keeps it until bob comes: do not send it again"), "{done:?}");
    let said = "bob is offline, last seen 2020-09-13T12:26:40Z: the server keeps it until bob comes\n";
    assert!(done.err.starts_with(said), "{done:?}");
    let rungs: Vec<Value> = done.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<&str> = rungs.iter().map(|step| step["rung"].as_str().unwrap()).collect();
    assert_eq!(told, ["accepted", "stored"]);
    let kept = place.letters();
    assert_eq!((kept.len(), kept[0].reached), (1, Some(Rung::Stored)));

    // The server has it: nobody sends it again. The receipt that waited settles it, and is acknowledged.
    let who = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    let (_, receipt) = place.bob.open(&envelope, Rung::Delivered);
    client.send(&Message::Waited { seq: 9, at: LAST_SEEN });
    client.send(&Message::Told(receipt));
    assert_eq!(place.hear(&mut client), Heard::Acknowledge(9));
    assert!(place.letters().is_empty(), "durable before it is acknowledged");
    who.signal("INT");
}

#[test]
fn what_a_server_forgot_to_pass_on_is_asked_for_again() {
    let mut place = Place::new();
    let send = place.spawn(&["send", "bob", "hello", "--timeout", "90s"]);
    let mut client = place.accept();
    let first = place.envelope(&mut client);
    client.send(&word(Rung::Accepted, None, &first));
    client.send(&word(Rung::Stored, None, &first));
    while place.letters()[0].reached != Some(Rung::Stored) {
        std::thread::yield_now();
    }
    // Bob has it by now and said so, which died with the server.
    drop(client);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), first);
    let (text, receipt) = place.bob.open(&first, Rung::Delivered);
    assert_eq!(text, "hello");
    // It had the message: that it cannot take it again is no reason to give it up.
    client.send(&word(Rung::Refused, Some(Reason::QueueFull), &first));
    client.send(&word(Rung::Accepted, None, &first));
    client.send(&Message::Told(receipt));
    place.farewell(&mut client);
    let done = send.wait();
    assert!(done.err.matches("stored").count() <= 1, "{done:?}");
    done.ok();
    assert!(place.letters().is_empty());
}

#[test]
fn stored_is_enough_where_that_was_asked_and_delivered_is_heard_of_later() {
    let mut place = Place::new();
    let send = place.spawn(&["send", "bob", "-", "--wait", "stored"]);
    let mut send = send;
    send.write(b"one\ntwo\n");
    send.end_input();
    let mut client = place.accept();
    let envelopes = [place.envelope(&mut client), place.envelope(&mut client)];
    for envelope in &envelopes {
        client.send(&word(Rung::Accepted, None, envelope));
        client.send(&word(Rung::Stored, None, envelope));
    }
    place.farewell(&mut client);
    assert_eq!(send.wait().err, "line 1: accepted\nline 1: stored\nline 2: accepted\nline 2: stored\n");
    assert_eq!(place.letters().len(), 2, "until they are delivered");

    // Another store: what the former one had is sent again, after the bundle; the bytes are the same.
    place.script.store_epoch = [1; 8];
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Published);
    for (envelope, expected) in envelopes.iter().zip(["one", "two"]) {
        assert_eq!(place.envelope(&mut client), *envelope);
        let (text, receipt) = place.bob.open(envelope, Rung::Delivered);
        assert_eq!(text, expected);
        client.send(&Message::Told(receipt));
    }
    while listen.said().matches("delivered to bob").count() < 2 {
        assert!(listen.said().len() < 10_000);
        std::thread::yield_now();
    }
    listen.signal("INT");
    listen.wait();
    assert!(place.letters().is_empty());
}

#[test]
fn a_message_that_never_reached_a_server_goes_with_the_next_connection() {
    let mut place = Place::new();
    let port = place.script.address().port();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = nobody.local_addr().unwrap().port();
    drop(nobody);
    place.point(closed);
    let done = place.run(&["send", "bob", "patience", "--timeout", "1s"]);
    let done = done.failed(3, "it stays in this home's outbox and goes at the next connection: do not send it again");
    assert!(done.err.contains("not reached within 1s: "), "{done:?}");
    assert_eq!(place.letters().len(), 1);
    // Nor is it lost with a process that is killed before it could do anything.
    let mut killed = place.spawn(&["send", "bob", "more", "--timeout", "60s"]);
    while place.letters().len() < 2 {
        assert!(killed.is_running());
    }
    killed.kill();

    place.point(port);
    let mut send = place.spawn(&["send", "bob", "now"]);
    let mut client = place.accept();
    for expected in ["patience", "more", "now"] {
        let envelope = place.envelope(&mut client);
        let (text, receipt) = place.bob.open(&envelope, Rung::Delivered);
        assert_eq!(text, expected);
        client.send(&Message::Told(receipt));
    }
    place.farewell(&mut client);
    send.end_input();
    send.wait().ok();
    assert!(place.letters().is_empty());
}

#[test]
fn a_refusal_that_may_pass_leaves_what_nobody_waits_for() {
    let mut place = Place::new();
    let mut send = place.spawn(&["send", "bob", "hello"]);
    let mut client = place.accept();
    let first = place.envelope(&mut client);
    send.kill();
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), first);
    client.send(&word(Rung::Refused, Some(Reason::QueueFull), &first));
    client.send(&Message::Status { request: 5 });
    // It is heard when its answer is.
    while !matches!(Message::decode(&client.receive()), Ok(Message::StatusResponse { request: 5 })) {}
    listen.signal("INT");
    listen.wait();
    assert_eq!(place.letters().len(), 1);

    // Whoever waits has it back instead.
    let send = place.spawn(&["send", "bob", "second"]);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), first);
    client.send(&word(Rung::Accepted, None, &first));
    let second = place.envelope(&mut client);
    client.send(&word(Rung::Refused, Some(Reason::QueueFull), &second));
    place.farewell(&mut client);
    send.wait().failed(1, "refused(queue-full): too many messages wait for bob");
    let kept = place.letters();
    assert_eq!((kept.len(), kept[0].sealed.map(|(_, n, _)| n)), (1, Some(0)));
    // What will not pass is said to whoever has the home.
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), first);
    client.send(&word(Rung::Refused, Some(Reason::Expired), &first));
    while !listen.said().contains("not delivered to bob: hello, of 20") {
        assert!(listen.said().len() < 10_000);
        std::thread::yield_now();
    }
    assert!(listen.said().contains("refused(expired)"), "{}", listen.said());
    listen.signal("INT");
    listen.wait();
    assert!(place.letters().is_empty());
}

#[test]
fn a_full_outbox_takes_nothing_more_and_says_so() {
    let place = Place::new();
    let mut store = place.store();
    let letter = |row| Letter {
        row,
        id: i128::from(row).to_be_bytes(),
        to: "bob".into(),
        sid: None,
        parent: None,
        len: 1,
        signed: true,
        until: Rung::Delivered,
        reached: None,
        tries: 0,
        time: u64::MAX >> 1,
        sealed: None,
    };
    let rows = 1..=i64::try_from(MAX_LETTERS).unwrap();
    let letters: Vec<LetterChange> = rows.map(|row| LetterChange::Keep(letter(row), b"x".to_vec().into())).collect();
    store.change_letters(&letters).unwrap();
    place
        .run(&["send", "bob", "one more"])
        .failed(1, "refused(queue-full): the outbox of this home is full (10000 messages");
    assert_eq!(place.letters().len(), letters.len());
}

#[test]
fn whoever_loses_its_holder_goes_on_with_the_same_message() {
    let mut place = Place::new();
    let mut holder = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    let mut send = place.spawn(&["send", "bob", "-", "--json"]);
    send.write(b"one\ntwo\n");
    send.end_input();
    let envelopes = [place.envelope(&mut client), place.envelope(&mut client)];
    holder.kill();
    let mut client = place.accept();
    for (envelope, expected) in envelopes.iter().zip(["one", "two"]) {
        assert_eq!(place.envelope(&mut client), *envelope, "once");
        let (text, receipt) = place.bob.open(envelope, Rung::Delivered);
        assert_eq!(text, expected);
        client.send(&Message::Told(receipt));
    }
    place.farewell(&mut client);
    let out = send.wait().ok();
    assert_eq!(out.matches("\"rung\":\"delivered\"").count(), 2, "{out}");
    assert!(place.letters().is_empty());
}

#[test]
fn a_backup_holds_letters_and_nothing_that_they_were_sealed_with() {
    let mut place = Place::new();
    let mut send = place.spawn(&["send", "bob", "hello"]);
    let mut client = place.accept();
    let first = place.envelope(&mut client);
    send.kill();
    let file = place.directory.path().join("alice.backup");
    place.run(&["backup", file.to_str().unwrap()]).ok();
    place.run(&["restore", "--replace", file.to_str().unwrap()]).ok();
    let kept = place.letters();
    assert_eq!((kept.len(), kept[0].sealed), (1, None));
    assert!(place.store().letter_chains().unwrap().is_empty());
    assert_eq!(*place.store().letter_body(kept[0].row).unwrap(), b"hello");
    let bytes = std::fs::read(&file).unwrap();
    for secret in [&first[..], &place.bob.wraps[0]] {
        assert!(!bytes.windows(16).any(|window| window == &secret[20..36]));
    }
}

#[test]
fn what_waited_is_acknowledged_once_it_is_durable_and_shown_once() {
    let mut place = Place::new();
    let (alice, alices_bundle, _) = place.alice();
    let bob = place.bob.bundle;
    let conversation = Conversation::direct(&bob.member(), &alices_bundle.member(), 0);
    let mut chain = SendingChain::start(&bob.member(), &conversation, 0, &mut Rng::new(3)).unwrap();
    let mut wrap = [0; WRAP_LEN];
    let to = alices_bundle.member();
    chain.wrap(&place.bob.keys, &bob, &to, &alices_bundle, &mut Rng::new(4), &mut wrap).unwrap();
    drop(alice);
    let mut seal = |text: &str| {
        let mut envelope = vec![0; text.len() + ossicle_core::SIGNED_OVERHEAD];
        chain.seal::<HostAead>(true, 0, text.as_bytes(), &mut envelope).unwrap();
        envelope
    };
    let envelopes = ["one", "two", "three"].map(&mut seal);
    let encoded = bob.encode();
    let signature = place.bob.signature.clone();
    let bundle = SignedBundle { bundle: &encoded, signature: &signature };
    let wanted = Rungs::NONE.with(Rung::Stored).with(Rung::Delivered);
    let id = WrapHeader::decode(&wrap).unwrap().chain_id;
    let waited = |client: &mut Scripted, seq| client.send(&Message::Waited { seq, at: LAST_SEEN + seq });

    // The sender is unknown, so what came waits for the directory and is not acknowledged before.
    let mut listen = place.spawn(&["listen", "--json", "nobody"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    waited(&mut client, 3);
    client.send(&Message::WrapDelivery { from: BOB, wrap: &wrap, bundle });
    for (seq, envelope) in [5, 8].into_iter().zip(&envelopes) {
        waited(&mut client, seq);
        client.send(&Message::Deliver { wanted, envelope });
    }
    let mut told = Vec::new();
    let acknowledged = loop {
        match place.hear(&mut client) {
            Heard::Tell(Rung::Delivered, None, chain, n) if chain == id => told.push(n),
            Heard::Acknowledge(8) => break told,
            // What came in several reads.
            Heard::Acknowledge(3 | 5) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(acknowledged, [0, 1], "receipts first: they are not stored here");
    // The acknowledgement is lost, and everything comes again: told again, and kept once.
    listen.kill();
    let listen = place.spawn(&["listen", "--json", "--count", "3"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    waited(&mut client, 3);
    client.send(&Message::WrapDelivery { from: BOB, wrap: &wrap, bundle });
    for (seq, envelope) in [5, 8, 9].into_iter().zip(&envelopes) {
        waited(&mut client, seq);
        client.send(&Message::Deliver { wanted, envelope });
    }
    while place.hear(&mut client) != Heard::Acknowledge(9) {}
    for (text, seq) in [("one", 5), ("two", 8), ("three", 9)] {
        let line: Value = serde_json::from_str(&listen.line()).unwrap();
        assert_eq!(line["text"], text);
        assert_eq!(line["server_accepted"], format!("2020-09-13T12:26:4{}Z", seq % 10), "{line}");
    }
    place.farewell(&mut client);
    listen.wait().ok();
}

#[test]
fn what_is_repeated_after_keys_have_changed_is_told_again_and_read_once() {
    let mut place = Place::new();
    let (_, alices, _) = place.alice();
    let bob = keys::bob();
    let wanted = Rungs::NONE.with(Rung::Stored).with(Rung::Delivered);
    let conversation = Conversation::direct(&place.bob.bundle.member(), &alices.member(), 0);
    // A message of Bob's, with the wrap and the bundle that it comes with.
    let begin = |keys: &BundleKeys, bundle: &Bundle, epoch: u8| {
        let me = bundle.member();
        let mut chain = SendingChain::start(&me, &conversation, epoch.into(), &mut Rng::new(epoch)).unwrap();
        let mut wrap = [0; WRAP_LEN];
        chain.wrap(keys, bundle, &alices.member(), &alices, &mut Rng::new(7), &mut wrap).unwrap();
        let mut envelope = vec![0; 3 + ossicle_core::SIGNED_OVERHEAD];
        chain.seal::<HostAead>(true, 0, b"one", &mut envelope).unwrap();
        (wrap, bundle.encode(), bob.sign(&bundle.statement()).unwrap(), envelope)
    };
    let former = place.bob.bundle;
    let later_keys = BundleKeys::generate(2, &mut Rng::new(10)).unwrap();
    let later = later_keys.bundle(&former.member(), former.epoch + 1, former.hash());
    let first = begin(&place.bob.keys, &former, 0);
    let second = begin(&later_keys, &later, 1);
    let give = |client: &mut Scripted, (wrap, bundle, signature, envelope): &(_, _, Vec<u8>, Vec<u8>)| {
        let wrap: &[u8; WRAP_LEN] = wrap;
        let bundle: &[u8; ossicle_core::BUNDLE_LEN] = bundle;
        client.send(&Message::WrapDelivery { from: BOB, wrap, bundle: SignedBundle { bundle, signature } });
        client.send(&Message::Deliver { wanted, envelope });
        let id = WrapHeader::decode(wrap).unwrap().chain_id;
        Heard::Tell(Rung::Delivered, None, id, 0)
    };

    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    for message in [&first, &second] {
        let told = give(&mut client, message);
        assert_eq!(place.hear(&mut client), told);
    }
    // Bob has another bundle by now.
    let told = give(&mut client, &first);
    assert_eq!(place.hear(&mut client), told);
    let read = [listen.line(), listen.line()];
    assert!(read.iter().all(|line| line.contains("one")), "{read:?}");
    listen.signal("INT");
    place.farewell(&mut client);
    assert_eq!(listen.wait().out, "");
    // And Alice has other prekeys, none of which opens the wrap.
    let mut bundle = alices;
    let mut store = place.store();
    for id in 100..110_u8 {
        let keys = BundleKeys::generate(id.into(), &mut Rng::new(id)).unwrap();
        bundle = keys.bundle(&bundle.member(), bundle.epoch + 1, bundle.hash());
        let signature = place.key.sign(&bundle.statement()).unwrap();
        store.put_keys(&keys, &bundle, &signature, LAST_SEEN + 1_000_000_000).unwrap();
    }
    drop(store);
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    while place.hear(&mut client) != Heard::Listening {}
    let told = give(&mut client, &second);
    loop {
        match place.hear(&mut client) {
            Heard::Published | Heard::Listening => {}
            said => break assert_eq!(said, told),
        }
    }
    listen.signal("INT");
    place.farewell(&mut client);
    assert_eq!(listen.wait().out, "");
}

/// The keys of somebody whom the server shows around.
fn mallory() -> (BundleKeys, Bundle, Vec<u8>) {
    let keys = BundleKeys::generate(1, &mut Rng::new(10)).unwrap();
    let bundle = keys.bundle(&Member { id: MALLORY, key: keys::carol().fingerprint() }, 1, [0; 32]);
    let signature = keys::carol().sign(&bundle.statement()).unwrap();
    (keys, bundle, signature)
}

/// The list of a group's members.
fn sorted(mut members: Vec<Member>) -> Vec<Member> {
    members.sort_unstable_by_key(|member| member.id);
    members
}

impl Place {
    fn me(&self) -> Member {
        Member { id: self.store().profile().unwrap().unwrap().id, key: self.key.fingerprint() }
    }

    fn know_bob(&self) -> Member {
        let member = self.bob.bundle.member();
        let modulus = keys::bob().modulus().to_vec();
        let (name, name_key) = ("bob".to_owned(), "bob".to_owned());
        let peer = Peer { id: BOB, name, name_key, modulus, fingerprint: member.key, key_epoch: 0, bundle: None };
        self.store().put_peer(&peer).unwrap();
        member
    }

    /// Alice and Bob are in the group `plans`.
    fn found_plans(&mut self) -> Vec<Member> {
        let both = sorted(vec![self.me(), self.know_bob()]);
        let in_it = |member: &Member| GroupMember { member: *member, membership: Membership::Accepted };
        let mut store = self.store();
        let mut group = Group {
            sid: PLANS,
            name: Some(Name::parse("plans").unwrap()),
            number: 1,
            creator: BOB,
            flags: 0,
            version: 0,
            signature: [0; 64],
            standing: Standing::Accepted,
            since: 1,
            names: None,
            closed_by: None,
            members: both.iter().map(in_it).collect(),
        };
        store.put_group(&mut group).unwrap();
        store.set_said_under(&PLANS, &self.alice().1.verifying).unwrap();
        self.bob.group = Some(Conversation::group(PLANS, 0, &both).unwrap());
        both
    }
}

#[test]
fn a_listener_whom_the_server_adds_to_a_group_hears_and_says_nothing() {
    let mut place = Place::new();
    let both = place.found_plans();
    let (keys, bundle, signature) = mallory();
    let three = sorted([both.as_slice(), &[bundle.member()]].concat());
    let wider = Conversation::group(PLANS, 0, &three).unwrap();
    let listen = place.spawn(&["listen", "--json"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    let mut buffer = [0; 16_384];

    // She is a member, says the server, and she says so, too; and there is a longer list, with Bob's name on it.
    let accept = Decision::Accept.sign(&keys, &wider);
    let changed =
        MemberChanged { sid: PLANS, member: MALLORY, state: MemberState::Accepted, signature: Some(Fixed(&accept)) };
    client.send(&changed.encode(&mut buffer).unwrap());
    let lines: Vec<u8> = three.iter().flat_map(Member::encode).collect();
    let init = Decision::Init(GroupFlags::NONE).sign(&keys, &wider);
    let invite = Invite {
        sid: PLANS,
        creator: BOB,
        flags: GroupFlags::NONE,
        signature: Fixed(&init),
        members: Members::new(&lines).unwrap(),
        name: Fixed(&[0; SEALED_NAME_LEN]),
    };
    client.send(&invite.encode(&mut buffer).unwrap());
    // What she says is refused, whatever she takes for the group.
    for conversation in [wider, place.bob.group.unwrap()] {
        let sealing = SendingChain::start(&bundle.member(), &conversation, 0, &mut Rng::new(11)).unwrap();
        let alice = place.alice().1;
        let mut wrap = [0; WRAP_LEN];
        sealing.wrap(&keys, &bundle, &alice.member(), &alice, &mut Rng::new(12), &mut wrap).unwrap();
        let bytes = bundle.encode();
        let signed = SignedBundle { bundle: &bytes, signature: &signature };
        client.send(&Message::WrapDelivery { from: MALLORY, wrap: &wrap, bundle: signed });
        let refused = Heard::Tell(Rung::Refused, Some(Reason::NotMember), *sealing.chain_id(), 0);
        assert_eq!(place.hear(&mut client), refused);
    }
    assert_eq!(place.store().group(&PLANS).unwrap().unwrap().members.len(), 2);

    // What Alice says goes to Bob alone, and only he can say that he has it.
    let send = place.spawn(&["send", "plans", "a secret", "--json", "--timeout", "90s"]);
    let Heard::Wrap(_) = place.hear(&mut client) else { panic!("a chain, for Bob") };
    let Heard::Sent(_, envelope) = place.hear(&mut client) else { panic!("then the message") };
    let (text, receipt) = place.bob.open(&envelope, Rung::Delivered);
    assert_eq!(text, "a secret");
    client.send(&word(Rung::Stored, None, &envelope));
    // Nor can the server, whatever it writes beside that.
    for rung in [Rung::Delivered, Rung::Opened] {
        client.send(&word(rung, None, &envelope));
        client.send(&word(rung, Some(Reason::Rate), &envelope));
    }
    let by = |from, receipt| ToldBy { from, receipt };
    let forged = Receipt { tag: Some([7; 16]), ..receipt };
    for told in [by(MALLORY, receipt), by(MALLORY, forged), by(BOB, forged)] {
        client.send(&told.encode(&mut buffer).unwrap());
    }
    client.send(&Message::Told(receipt));
    let refused = Receipt { rung: Rung::Refused, reason: Some(Reason::Rekey), tag: None, ..receipt };
    client.send(&by(MALLORY, refused).encode(&mut buffer).unwrap());
    client.send(&by(BOB, receipt).encode(&mut buffer).unwrap());
    let done = send.wait().ok();
    let steps: Vec<Value> = done.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said: Vec<(&str, Option<&str>)> =
        steps.iter().map(|step| (step["rung"].as_str().unwrap(), step["member"].as_str())).collect();
    assert_eq!(said, [("stored", None), ("delivered", Some("bob"))]);
    assert!(listen.is_silent() && place.letters().is_empty());
}

#[test]
fn an_invitation_needs_an_id_of_its_own_and_no_name() {
    let mut place = Place::new();
    let members = sorted(vec![place.me(), place.know_bob()]);
    let lines: Vec<u8> = members.iter().flat_map(Member::encode).collect();
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    let direct = direct_sid(&members[0].id, &members[1].id, 0);
    for (seq, sid) in [(1, direct), (2, PLANS)] {
        let conversation = Conversation::group(sid, 0, &members).unwrap();
        let signature = Decision::Init(GroupFlags::NONE).sign(&place.bob.keys, &conversation);
        let invite = Invite {
            sid,
            creator: BOB,
            flags: GroupFlags::NONE,
            signature: Fixed(&signature),
            members: Members::new(&lines).unwrap(),
            name: Fixed(&[7; SEALED_NAME_LEN]),
        };
        client.send(&Message::Waited { seq, at: LAST_SEEN });
        client.send(&invite.encode(&mut [0; 1024]).unwrap());
        assert_eq!(place.hear(&mut client), Heard::Acknowledge(seq));
    }
    // The first has the id of what Alice and Bob say to each other; of the second nobody can read the name.
    assert!(place.store().group(&direct).unwrap().is_none());
    let group = place.store().group_labelled("~1").unwrap().unwrap();
    assert_eq!((group.sid, group.name, group.standing), (PLANS, None, Standing::Invited));
    while !listen.said().contains("you are invited to ~1: /accept ~1") {
        assert!(listen.said().len() < 10_000);
        std::thread::yield_now();
    }
}

#[test]
fn what_a_member_refuses_is_cured_with_him_alone_across_processes() {
    let mut place = Place::new();
    place.found_plans();
    let mut send = place.spawn(&["send", "plans", "hello", "--timeout", "90s"]);
    let mut client = place.accept();
    let joint = place.envelope(&mut client);
    client.send(&word(Rung::Stored, None, &joint));
    let EnvelopeHeader { chain_id, n, .. } = EnvelopeHeader::decode(&joint).unwrap();
    let refusal =
        |reason| Receipt { rung: Rung::Refused, reason: Some(reason), chain: chain_id, from: n, to: n, tag: None };
    let mut buffer = [0; 128];
    let mut by_bob = |client: &mut Scripted, receipt| {
        client.send(&ToldBy { from: BOB, receipt }.encode(&mut buffer).unwrap());
    };
    by_bob(&mut client, refusal(Reason::Rekey));
    let own = place.envelope(&mut client);
    assert_ne!(own[..8], joint[..8], "on a chain of his own");
    send.kill();
    let kept = place.letters();
    assert_eq!(kept.len(), 2);
    assert_eq!((kept[0].to.as_str(), kept[0].sid, kept[0].parent), ("plans", Some(PLANS), None));
    assert_eq!((kept[1].to.as_str(), kept[1].sid, kept[1].parent), ("bob", Some(PLANS), Some((kept[0].row, BOB))));

    // The next process goes on with that one, as the same bytes, and repeats nothing for the others.
    let listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.envelope(&mut client), own);
    let (text, receipt) = place.bob.open(&own, Rung::Delivered);
    assert_eq!(text, "hello");
    by_bob(&mut client, receipt);
    while !listen.said().contains("delivered to plans: hello, of 20") {
        assert!(listen.said().len() < 10_000);
        std::thread::yield_now();
    }
    listen.signal("INT");
    listen.wait();
    assert!(place.letters().is_empty());
    assert!(place.store().letter_chains().unwrap().is_empty());
}

#[test]
fn a_member_whose_queue_is_full_is_named() {
    let mut place = Place::new();
    place.found_plans();
    let send = place.spawn(&["send", "plans", "hello", "--json", "--timeout", "90s"]);
    let mut client = place.accept();
    let envelope = place.envelope(&mut client);
    let EnvelopeHeader { chain_id, n, .. } = EnvelopeHeader::decode(&envelope).unwrap();
    let reason = Some(Reason::QueueFull);
    let receipt = Receipt { rung: Rung::Refused, reason, chain: chain_id, from: n, to: n, tag: None };
    client.send(&ToldBy { from: BOB, receipt }.encode(&mut [0; 128]).unwrap());
    place.farewell(&mut client);
    let done = send.wait().failed(1, "not delivered to everybody in plans: bob: refused(queue-full)");
    assert!(done.out.contains("\"member\":\"bob\",\"rung\":\"refused\",\"reason\":\"queue-full\""), "{done:?}");
    assert!(place.letters().is_empty());
}

#[test]
fn a_member_who_refuses_every_chain_makes_nobody_wait() {
    let mut place = Place::new();
    place.found_plans();
    place.bob.is_hostile = true;
    let send = place.spawn(&["send", "plans", "hello", "--timeout", "90s"]);
    let mut client = place.accept();
    let envelope = place.envelope(&mut client);
    // New ones are tried as long as they may be started at once, and then the last one is taken.
    assert_eq!(place.bob.wraps.len(), 3);
    let (text, receipt) = place.bob.open(&envelope, Rung::Delivered);
    assert_eq!(text, "hello");
    client.send(&ToldBy { from: BOB, receipt }.encode(&mut [0; 128]).unwrap());
    place.farewell(&mut client);
    send.wait().ok();
    assert!(place.letters().is_empty());
}

#[test]
fn an_invitation_outlasts_a_directory_that_has_no_answer_now() {
    let mut place = Place::new();
    let members = sorted(vec![place.me(), place.know_bob()]);
    let lines: Vec<u8> = members.iter().flat_map(Member::encode).collect();
    let conversation = Conversation::group(PLANS, 0, &members).unwrap();
    let signature = Decision::Init(GroupFlags::NONE).sign(&place.bob.keys, &conversation);
    let invite = Invite {
        sid: PLANS,
        creator: BOB,
        flags: GroupFlags::NONE,
        signature: Fixed(&signature),
        members: Members::new(&lines).unwrap(),
        name: Fixed(&[7; SEALED_NAME_LEN]),
    };
    let give = |client: &mut Scripted| {
        client.send(&Message::Waited { seq: 1, at: LAST_SEEN });
        client.send(&invite.encode(&mut [0; 1024]).unwrap());
    };
    let _listen = place.spawn(&["listen"]);
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    give(&mut client);
    let asked = client.receive();
    let Message::Lookup(lookup) = Message::decode(&asked).unwrap() else { panic!("who has founded it") };
    let reason = Reason::Unavailable;
    client.send(&Message::Refused { request: lookup.request, reason, retry_after: None });
    let said = client.last_words();
    let is_acknowledgement = |said: &Vec<u8>| matches!(Message::decode(said), Ok(Message::Acknowledge { .. }));
    assert!(!said.iter().any(is_acknowledgement), "{said:?}");
    // It comes again.
    let mut client = place.accept();
    assert_eq!(place.hear(&mut client), Heard::Listening);
    give(&mut client);
    assert_eq!(place.hear(&mut client), Heard::Acknowledge(1));
    assert_eq!(place.store().group(&PLANS).unwrap().unwrap().standing, Standing::Invited);
}
