//! `unflushed flushed|unflushed serve OPTIONS`: as much of `ossicle serve` as a campaign needs, on a store that flushes, or
//! on one that never does. Of the options, `--data DIR` and `--port PORT` are looked at.

use std::path::PathBuf;
use std::sync::Arc;

use ossicle::bus::Local;
use ossicle::crypto::CryptoPool;
use ossicle::limits::{Rate, Rates};
use ossicle::resumption::ChannelKey;
use ossicle::server::{self, Config, Parts, Policy, Server};
use ossicle::store::SqliteStore;
use ossicle::world::World;
use ossicle_tests::keys;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name| arguments.iter().skip_while(|given| *given != name).nth(1).expect("an option");
    let (data, port) = (PathBuf::from(option("--data")), option("--port").parse().expect("a port"));
    let store = match arguments.get(1).map(String::as_str) {
        Some("flushed") => SqliteStore::open(&data),
        Some("unflushed") => SqliteStore::open_unflushed(&data),
        _ => panic!("usage: unflushed flushed|unflushed serve OPTIONS"),
    };
    let fast = Rate { per_second: 1_000_000, burst: 1_000_000 };
    #[allow(clippy::needless_update, reason = "whatever else is limited")]
    let rates = Rates { messages: fast, handshakes: fast, ..Rates::default() };
    let server = Server::new(Parts {
        config: Config { enrol: Policy::Open, rates, ..Config::default() },
        store: Arc::new(store.expect("the store opens")),
        identity: Arc::new(keys::server()),
        channel_key: ChannelKey::open(&data).expect("a key for channels"),
        pool: Arc::new(CryptoPool::start().expect("threads")),
        world: World::default(),
        bus: Arc::new(Local),
    });
    let mut terminated = signal(SignalKind::terminate()).expect("a handler");
    let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
    let fingerprint: String = server.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("ossicle://{}#{fingerprint}", listener.local_addr().expect("a bound socket has an address"));
    server::run(listener, Arc::clone(&server), async {
        terminated.recv().await;
    })
    .await;
}
