//! Hostile peers over real TCP: of the real server, of the real commands, and of the device in QEMU.
//!
//! A scenario is a row of a table: what the hostile side does, and what must be seen of it, to the exact reason or to
//! silence. What they all share is that nobody else is concerned: after each group the same server serves its honest
//! clients. The hostile side does not use the engine where the engine would not let it (`support/raw.rs`).
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::cell::{Cell, RefCell};
use core::panic::AssertUnwindSafe;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use std::collections::HashSet;
use std::panic::catch_unwind;
use std::sync::Once;
use std::time::Instant;

use ossicle::accounts::Password;
use ossicle::crypto::IdentityKey;
use ossicle::device::Device;
use ossicle::ethernet::Network;
use ossicle::limits::{Rate, Rates};
use ossicle::name::Name;
use ossicle::server::Config;
use ossicle_core::{Channel, Message, Reason, Rungs};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Node, Published, envelope, open, wrap};
use ossicle_tests::qemu::{self, Qemu};
use ossicle_tests::raw::{Auth, RawClient, Wire};
use tokio::runtime::Runtime;

#[path = "hostile/after.rs"]
mod after;
#[path = "hostile/before.rs"]
mod before;
#[path = "hostile/clients.rs"]
mod clients;
#[path = "hostile/devices.rs"]
mod devices;
#[path = "hostile/within.rs"]
mod within;

/// What one hostile peer does, and what it sees.
pub(crate) struct Scenario<P> {
    pub(crate) name: &'static str,
    pub(crate) act: fn(&Ground, &mut P),
    pub(crate) seen: &'static [Seen],
}

pub(crate) const fn scenario<P>(name: &'static str, act: fn(&Ground, &mut P), seen: &'static [Seen]) -> Scenario<P> {
    Scenario { name, act, seen }
}

/// What a hostile peer may see of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// ServerHello and ServerAuth.
    Answer,
    /// A ServerHello of this mode.
    Mode(u8),
    /// A sealed refusal of the handshake.
    Refusal(Reason),
    /// It was let in.
    In,
    /// A request with this number was refused.
    Refused(u16, Reason),
    /// An envelope was refused.
    Told(Reason),
    /// Another message, with this code.
    Message(u16),
    /// A sign of life, behind everything that was said.
    Alive,
    /// The other side's close.
    Closed(Option<Reason>),
    /// The end of the stream.
    End,
}

/// A server, its honest clients, and what the scenarios need of them.
pub(crate) struct Ground {
    pub(crate) runtime: Runtime,
    pub(crate) node: Node,
    pub(crate) server: IdentityKey,
    pub(crate) mallory: IdentityKey,
    honest: RefCell<(Client, Client)>,
    sent: Cell<u32>,
}

/// Who is at the server: two honest clients, and one that is enrolled and hostile.
pub(crate) const ALICE: u8 = 1;
pub(crate) const BOB: u8 = 2;
pub(crate) const MALLORY: u8 = 3;
/// An account that nobody has entered, and its password.
pub(crate) const ACCOUNT: &str = "walter";
pub(crate) const PASSWORD: &str = "correct horse";
/// The chain from Alice to Bob.
pub(crate) const CHAIN: u8 = 5;

/// A server that waits for hours, so that whatever ends ends because of what was said.
pub(crate) fn patient() -> Config {
    let hours = Duration::from_secs(2 * 3600);
    let fast = Rate { per_second: 1_000_000, burst: 1_000_000 };
    Config {
        heartbeat: 3600,
        timeout: 7200,
        hello_within: hours,
        handshake_within: hours,
        rates: Rates { messages: fast, handshakes: fast },
        ..open()
    }
}

thread_local! {
    /// Whether this thread is one of the hostile side, whose panics are failed assertions.
    pub(crate) static OURS: Cell<bool> = const { Cell::new(false) };
}
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts the panics of everybody but the tests.
pub(crate) fn watch_panics() {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !OURS.get() {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            hook(info);
        }));
    });
    OURS.set(true);
}

impl Ground {
    pub(crate) fn new(config: Config) -> Self {
        watch_panics();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (node, honest) = runtime.block_on(async {
            let node = Node::start(config).await;
            let mut alice = node.enrol(ALICE, "alice", keys::alice()).await;
            let mut bob = node.enrol(BOB, "bob", keys::bob()).await;
            bob.listen().await;
            let bundle = Published::new(ALICE, &keys::alice(), 0);
            let wrap = wrap(CHAIN);
            alice.send(&Message::Wrap { request: 9, to: bob.id, wrap: &wrap, bundle: bundle.signed() }).await;
            bob.message().await;
            alice.message().await;
            node.enrol(MALLORY, "mallory", keys::carol()).await.close().await;
            let verifier = Password::prepare(PASSWORD).unwrap().verifier().unwrap();
            node.store.add_account(Name::parse(ACCOUNT).unwrap(), verifier, 1).await.unwrap();
            (node, (alice, bob))
        });
        let (server, mallory) = (keys::server(), keys::carol());
        Self { runtime, node, server, mallory, honest: RefCell::new(honest), sent: Cell::new(0) }
    }

    /// Mallory's claim.
    pub(crate) fn claim(&self) -> Auth {
        Auth::key(MALLORY, &self.mallory)
    }

    /// A channel that the server has issued to Mallory.
    pub(crate) fn channel(&self) -> Channel {
        self.runtime.block_on(async {
            let mut client = self.node.connect(MALLORY, &self.mallory).await.expect("it is enrolled");
            let channel = client.take_channel();
            client.close().await;
            channel
        })
    }

    /// The honest clients are served as ever: on the connections that they have, and on a new one.
    fn serves(&self) {
        let n = self.sent.get();
        self.sent.set(n + 2);
        let (alice, bob) = &mut *self.honest.borrow_mut();
        self.runtime.block_on(async {
            for n in [n, n + 1] {
                let sent = envelope(CHAIN, n, 60);
                alice.send(&Message::Send { wanted: Rungs::NONE, envelope: &sent }).await;
                let expected = Message::Deliver { wanted: Rungs::NONE, envelope: &sent };
                // What Mallory has for Bob is passed on, too.
                while Message::decode(&bob.message().await) != Ok(expected.clone()) {}
                *alice = self.node.connect(ALICE, &keys::alice()).await.expect("an honest client comes back");
            }
        });
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "nothing of the server panics");
    }

    /// Everybody else has gone, and the server knows it.
    fn is_left(&self) {
        let begun = Instant::now();
        while self.node.server.connected() > 2 {
            assert!(begun.elapsed() < Duration::from_secs(60), "somebody is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a group: each peer is made, acts, and must then have seen what its row says.
    pub(crate) fn run<P>(&self, scenarios: &[Scenario<P>], peer: impl Fn() -> P, look: impl Fn(&Self, P) -> Vec<Seen>) {
        let act = |scenario: &Scenario<P>| acted(|| self.act(scenario, &peer));
        let look = |acted: Result<P, ()>| acted.and_then(|peer| self::acted(|| look(self, peer)));
        self.judge(scenarios, scenarios.iter().map(|scenario| look(act(scenario))));
    }

    /// The same, where waiting is what takes time: all act before the first one looks.
    pub(crate) fn run_together<P>(
        &self,
        scenarios: &[Scenario<P>],
        peer: impl Fn() -> P,
        look: impl Fn(&Self, P) -> Vec<Seen>,
    ) {
        let peers: Vec<_> = scenarios.iter().map(|scenario| acted(|| self.act(scenario, &peer))).collect();
        self.judge(scenarios, peers.into_iter().map(|peer| peer.and_then(|peer| acted(|| look(self, peer)))));
    }

    fn act<P>(&self, scenario: &Scenario<P>, peer: &impl Fn() -> P) -> P {
        let mut peer = peer();
        (scenario.act)(self, &mut peer);
        peer
    }

    fn judge<P>(&self, scenarios: &[Scenario<P>], found: impl Iterator<Item = Result<Vec<Seen>, ()>>) {
        let mut wrong = Vec::new();
        for (Scenario { name, seen, .. }, found) in scenarios.iter().zip(found) {
            match found {
                Ok(found) if found == *seen => {}
                Ok(found) => wrong.push(format!("{name}: {found:?} instead of {seen:?}")),
                Err(()) => wrong.push(format!("{name}: an assertion failed")),
            }
        }
        println!("{} scenarios", scenarios.len());
        assert!(wrong.is_empty(), "{} of {} scenarios: {wrong:#?}", wrong.len(), scenarios.len());
        self.is_left();
        self.serves();
    }
}

/// So that one failed assertion does not hide what becomes of the other scenarios.
pub(crate) fn acted<T>(act: impl FnOnce() -> T) -> Result<T, ()> {
    catch_unwind(AssertUnwindSafe(act)).map_err(drop)
}

#[test]
fn before_the_handshake_nothing_is_said_to_anybody() {
    let ground = Ground::new(patient());
    ground.run(before::FIRST, || Wire::connect(ground.node.address), before::look);
}

#[test]
fn nobody_is_waited_for_without_end() {
    let config =
        Config { hello_within: Duration::from_millis(700), handshake_within: Duration::from_millis(2500), ..patient() };
    let ground = Ground::new(config);
    ground.run_together(before::SLOW, || Wire::connect(ground.node.address), before::look);
}

#[test]
fn within_the_handshake_only_who_proves_something_is_answered() {
    let ground = Ground::new(patient());
    ground.run(within::CLAIMS, || RawClient::connect(ground.node.address), within::look);
}

#[test]
fn an_offer_proves_nothing_by_itself() {
    let ground = Ground::new(patient());
    ground.run(within::OFFERS, || RawClient::connect(ground.node.address), within::look);
}

#[test]
fn a_client_that_was_let_in_gets_one_answer_to_each_wrong_word() {
    let ground = Ground::new(patient());
    ground.run(after::WORDS, || after::enter(&ground), after::look);
}

#[test]
fn a_client_that_breaks_the_rules_of_records_is_out() {
    let ground = Ground::new(patient());
    ground.run(after::RECORDS, || after::enter(&ground), after::look);
}

#[test]
fn a_command_survives_every_server() {
    clients::run(clients::ROWS);
}

fn in_thread(page: Vec<u8>) -> Box<dyn core::any::Any> {
    let network = Network::start(None).unwrap();
    let device = Device::start(&network, page, |_| {}).unwrap();
    Box::new((device, network))
}

fn in_qemu(page: Vec<u8>) -> Box<dyn core::any::Any> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("page");
    std::fs::write(&path, page).unwrap();
    let qemu = Qemu::start(&ossicle_tests::firmware_image(), Some(&path), &qemu::Options::default());
    Box::new((qemu, folder))
}

#[test]
fn a_device_survives_every_server() {
    devices::run(in_thread, 4);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_survives_every_server() {
    devices::run(in_qemu, 4);
}

/// The names of all scenarios.
fn names() -> Vec<&'static str> {
    fn of<P>(scenarios: &'static [Scenario<P>]) -> impl Iterator<Item = &'static str> {
        scenarios.iter().map(|scenario| scenario.name)
    }
    of(before::FIRST)
        .chain(of(before::SLOW))
        .chain(of(within::CLAIMS))
        .chain(of(within::OFFERS))
        .chain(of(after::WORDS))
        .chain(of(after::RECORDS))
        .chain(clients::ROWS.iter().map(|row| row.name))
        .chain(devices::ROWS.iter().map(|row| row.name))
        .collect()
}

#[test]
fn there_are_enough_scenarios_and_each_has_its_own_name() {
    watch_panics();
    let names = names();
    println!("{} scenarios", names.len());
    let mut unique = HashSet::new();
    let twice: Vec<_> = names.iter().filter(|name| !unique.insert(**name)).collect();
    assert!(twice.is_empty(), "{twice:?}");
    assert!(names.len() >= 100, "{}", names.len());
}
