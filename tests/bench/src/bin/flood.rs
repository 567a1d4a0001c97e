//! What strangers can do to those who are let in: thousands of connections that say a byte a second, and thousands of
//! handshakes a second that end where the server has done its part, from many addresses of the loopback.
//!
//! `cargo run --release -p ossicle-bench --bin flood -- [--seconds 20] [--slow 5000] [--rate 2000] [--sources 256]`. It
//! starts `ossicle serve` with the limits that it has by default, and ends by itself. It prints how long a message takes
//! between clients before and in the flood, whether others still get in, the server's memory, and what became of the
//! strangers; and it fails where a goal is missed. See README.md.

use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use clap::Parser;
use ossicle::crypto::{HostAead, IdentityKey, verify};
use ossicle_bench::account::{Cpu, resident};
use ossicle_bench::people::text;
use ossicle_bench::{Failure, build, median, raise_file_limit};
use ossicle_core::{
    Ask, ClientConfig, Connection, Credentials, Error, Event, Message, PeerError, PublicKey, Puzzle, Received, Rungs,
};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Published, envelope, wrap};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

/// How long a message from one client to another may take, with its answer, for 99 of 100.
const GOAL: Duration = Duration::from_millis(50);
/// What a connection may cost that has proved nothing, in bytes.
const COST: u64 = 8 * 1024;
/// Logins that work take no longer.
const LOGIN_WITHIN: Duration = Duration::from_secs(5);
/// What the server may grow by in the flood, in KiB: as many strangers as it bears at their price, and 16 MiB for what it
/// remembers of those that have gone.
const GROWTH: u64 = 8192 * COST / 1024 + 16 * 1024;
/// Between two messages of a pair.
const PAUSE: Duration = Duration::from_millis(25);
const PAIRS: u8 = 8;
/// Strangers whose cost is measured: not so many that the server would turn some away.
const STRANGERS: u32 = 1500;
/// Handshakes that are under way at once.
const UNDER_WAY: usize = 4000;
/// An attempt to log in that fails is followed by another after this.
const RETRY: Duration = Duration::from_millis(500);

/// A flood of strangers, and how those fare who are let in
#[derive(Parser)]
#[command(name = "flood")]
struct Arguments {
    /// How long the flood lasts
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Connections that say a byte a second
    #[arg(long, value_name = "COUNT", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(0..=8000))]
    slow: u32,
    /// Handshakes a second
    #[arg(long, value_name = "COUNT", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(0..=20_000))]
    rate: u32,
    /// Addresses that they come from
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_024))]
    sources: u32,
    /// The binary to measure [default: it is built]
    #[arg(long, value_name = "FILE")]
    ossicle: Option<PathBuf>,
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    raise_file_limit()?;
    let ossicle = match &arguments.ossicle {
        Some(path) => path.clone(),
        None => build()?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut missed = Vec::new();

    // It waits until all were counted.
    let idle = Server::start(&ossicle, &["--hello-within", "60s", "--handshake-within", "60s"])?;
    for (name, stage) in [("says nothing but a byte", Stage::Byte), ("was answered and says nothing", Stage::Answered)]
    {
        let cost = runtime.block_on(cost(&idle, stage))?;
        println!("a connection that {name:30} {cost:6} bytes of the server's memory");
        if cost > COST {
            missed.push("the cost of a connection");
        }
    }
    drop(idle);

    let server = Server::start(&ossicle, &[])?;
    let mut talk = Talk::start(&server)?;
    let quiet = talk.measure(Duration::from_secs(5))?;
    println!("round trip before the flood              {quiet}");
    let memory = resident(server.id())?;
    let flood = Arc::new(Flood::new(server.address, arguments.sources));
    runtime.spawn(Arc::clone(&flood).handshakes(arguments.rate));
    for number in 0..arguments.slow {
        runtime.spawn(Arc::clone(&flood).slow(number));
    }
    // Until all of them are there.
    let peak = Arc::new(AtomicU64::new(0));
    let watch = watch(server.id(), Arc::clone(&flood), Arc::clone(&peak));
    thread::sleep(Duration::from_secs(6));
    flood.counts.reset();
    let (begun, cpu) = (Instant::now(), Cpu::of(server.id())?);
    let logins = runtime.spawn(logins(server.address, talk.late.take().ok_or("one is left")?, Arc::clone(&flood)));
    let loud = talk.measure(Duration::from_secs(arguments.seconds))?;
    let used = Cpu::of(server.id())?.since(&cpu).as_secs_f64() / begun.elapsed().as_secs_f64();
    let seconds = begun.elapsed().as_secs_f64();
    let Counts { slow, slow_ended, signed, asked, closed } = &flood.counts;
    let held = slow.load(Ordering::Relaxed);
    flood.over.store(true, Ordering::Relaxed);
    let mut logins = runtime.block_on(logins)?;
    let _ = watch.join();
    let peak = peak.load(Ordering::Relaxed);

    println!("round trip in the flood                  {loud}");
    println!("server's CPU                             {used:.2} cores");
    println!("server's memory                          {memory} KiB before, {peak} KiB at most");
    let each = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64 / seconds;
    println!("connections that say a byte a second     {held} at the end");
    println!("  ended by the server                    {:.0}/s", each(slow_ended));
    println!("handshakes                               {:.0}/s", each(signed) + each(asked) + each(closed));
    println!("  for which the server signed            {:.0}/s", each(signed));
    println!("  that were asked to work first          {:.0}/s", each(asked));
    println!("  that were closed without a word        {:.0}/s", each(closed));
    let (tried, within) = (logins.len(), logins.iter().filter(|time| **time <= LOGIN_WITHIN).count());
    if tried > 0 {
        println!(
            "logins of one more client                {within} of {tried} within 5 s, median {:.2?}",
            median(&mut logins)
        );
    }
    if loud.p99 > GOAL {
        missed.push("the round trip");
    }
    if peak.saturating_sub(memory) > GROWTH {
        missed.push("the server's memory");
    }
    talk.end()?;
    runtime.shutdown_timeout(Duration::from_secs(5));
    if missed.is_empty() { Ok(()) } else { Err(format!("missed: {}", missed.join(", ")).into()) }
}

/// A server as a process of its own, with the limits that it has by default.
struct Server {
    address: SocketAddr,
    process: Child,
    _data: TempDir,
}

impl Server {
    fn start(program: &Path, flags: &[&str]) -> Result<Self, Failure> {
        let data = TempDir::new()?;
        let folder = data.path().join("data");
        std::fs::create_dir(&folder)?;
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700))?;
        keys::server().save(&folder.join("server.key"))?;
        let mut command = Command::new(program);
        command
            .args(["serve", "--bind", "127.0.0.1", "--port", "0", "--enroll", "open"])
            .args(flags)
            .arg("--data")
            .arg(&folder);
        let log = std::fs::File::create(data.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut process = command.spawn()?;
        let mut url = String::new();
        BufReader::new(process.stdout.take().ok_or("standard output is piped")?).read_line(&mut url)?;
        let address = url.trim().strip_prefix("ossicle://").and_then(|rest| rest.split('#').next()?.parse().ok());
        match address {
            Some(address) => Ok(Self { address, process, _data: data }),
            None => {
                let _ = process.kill();
                let _ = process.wait();
                let log = std::fs::read_to_string(data.path().join("log")).unwrap_or_default();
                Err(format!("the server does not start: {url} {log}").into())
            }
        }
    }

    fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// How far a stranger goes whose cost is measured.
#[derive(Clone, Copy)]
enum Stage {
    Byte,
    Answered,
}

/// Bytes of the server's memory for one such connection.
async fn cost(server: &Server, stage: Stage) -> Result<u64, Failure> {
    let strangers = Arc::new(Flood::new(server.address, 256));
    let before = resident(server.id())?;
    let mut held = Vec::new();
    for _ in 0..STRANGERS {
        let mut stream = strangers.connect().await?;
        match stage {
            Stage::Byte => stream.write_all(&hello()?[..1]).await?,
            Stage::Answered => {
                stream.write_all(&hello()?).await?;
                let mut answer = [0; 4096];
                if timeout(Duration::from_secs(30), stream.read(&mut answer)).await?? == 0 {
                    return Err("the server turns strangers away that it bears".into());
                }
            }
        }
        held.push(stream);
    }
    sleep(Duration::from_secs(1)).await;
    let after = resident(server.id())?;
    for stream in &mut held {
        let mut end = [0; 4096];
        if matches!(stream.try_read(&mut end), Ok(0)) {
            return Err("the server has closed a connection that was to be counted".into());
        }
    }
    Ok(after.saturating_sub(before) * 1024 / u64::from(STRANGERS))
}

/// A ClientHello of a client that knows the server's key. Whoever sends it cannot go on.
fn hello() -> Result<Vec<u8>, Failure> {
    let mut hello = vec![1, 0, 1, 0, 0, 84, 0, 0, 1, 1, 0, 1, 0, 1, 0x40, 0x18, 0, 0];
    let mut random = [0; 64];
    getrandom::fill(&mut random)?;
    hello.extend(random);
    hello.extend([0, 0]);
    Ok(hello)
}

/// What became of the strangers.
#[derive(Default)]
struct Counts {
    slow: AtomicU64,
    slow_ended: AtomicU64,
    signed: AtomicU64,
    asked: AtomicU64,
    closed: AtomicU64,
}

impl Counts {
    /// Counts events from now on.
    fn reset(&self) {
        for count in [&self.slow_ended, &self.signed, &self.asked, &self.closed] {
            count.store(0, Ordering::Relaxed);
        }
    }
}

struct Flood {
    address: SocketAddr,
    sources: u32,
    next: AtomicU64,
    over: AtomicBool,
    counts: Counts,
}

impl Flood {
    fn new(address: SocketAddr, sources: u32) -> Self {
        let (next, over) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { address, sources, next, over, counts: Counts::default() }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// A connection from the next address.
    async fn connect(&self) -> Result<TcpStream, Failure> {
        let number = u32::try_from(self.next.fetch_add(1, Ordering::Relaxed) % u64::from(self.sources))?;
        let (high, low) = (u8::try_from(number / 254 + 1)?, u8::try_from(number % 254 + 1)?);
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, high, low, 1)), 0))?;
        Ok(timeout(Duration::from_secs(5), socket.connect(self.address)).await??)
    }

    /// One that says a byte a second, and comes again when it is closed.
    async fn slow(self: Arc<Self>, number: u32) {
        sleep(Duration::from_millis(u64::from(number % 3000))).await;
        while !self.is_over() {
            if let (Ok(mut stream), Ok(hello)) = (self.connect().await, hello()) {
                self.counts.slow.fetch_add(1, Ordering::Relaxed);
                for byte in hello {
                    let ended = stream.write_all(&[byte]).await.is_err()
                        || timeout(Duration::from_secs(1), stream.read(&mut [0; 16])).await.is_ok();
                    if ended || self.is_over() {
                        break;
                    }
                }
                self.counts.slow_ended.fetch_add(1, Ordering::Relaxed);
                self.counts.slow.fetch_sub(1, Ordering::Relaxed);
            }
            // Who was turned away at once does not try a thousand times a second.
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// So many a second that go as far as costs the server a signature.
    async fn handshakes(self: Arc<Self>, rate: u32) {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        let places = Arc::new(tokio::sync::Semaphore::new(UNDER_WAY));
        let mut due = 0;
        while !self.is_over() {
            ticks.tick().await;
            due += rate;
            while due >= 100 {
                due -= 100;
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                let flood = Arc::clone(&self);
                tokio::spawn(async move {
                    flood.handshake().await;
                    drop(place);
                });
            }
        }
    }

    async fn handshake(&self) {
        let said = async {
            let mut stream = self.connect().await?;
            stream.write_all(&hello()?).await?;
            let mut answer = [0; 1024];
            let len = timeout(Duration::from_secs(10), stream.read(&mut answer)).await??;
            Ok::<_, Failure>(answer[..len].get(2..4).map(<[u8]>::to_vec))
        };
        let count = match said.await.ok().flatten().as_deref() {
            Some([1, 0x10]) => &self.counts.signed,
            Some([1, 0x20]) => &self.counts.asked,
            _ => &self.counts.closed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Keeps the most memory that the server had, until the flood is over.
fn watch(process: u32, flood: Arc<Flood>, peak: Arc<AtomicU64>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while !flood.is_over() {
            if let Ok(now) = resident(process) {
                peak.fetch_max(now, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(100));
        }
    })
}

/// How long messages took.
struct Times {
    count: usize,
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl core::fmt::Display for Times {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { count, p50, p99, max } = self;
        write!(f, "p50 {p50:.2?}, p99 {p99:.2?}, at most {max:.2?}, of {count}")
    }
}

/// Clients that were let in before the flood, two by two.
struct Talk {
    runtime: tokio::runtime::Runtime,
    pairs: Vec<Pair>,
    /// One that is enrolled and not connected.
    late: Option<(IdentityKey, u8)>,
}

struct Pair {
    ends: [Client; 2],
    next: u32,
}

impl Talk {
    fn start(server: &Server) -> Result<Self, Failure> {
        // One thread for all of them, which does nothing else.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = server.address;
        let enrol = async |number: u8| -> Result<(Client, IdentityKey), Failure> {
            let key = IdentityKey::generate(2048)?;
            let name = format!("client-{number}");
            let credentials = Credentials::Enroll {
                id: [number; 16],
                name: &name,
                key: PublicKey::from_modulus(key.modulus()).map_err(text)?,
                token: None,
            };
            let client = Client::connect_to(address, &credentials, &key).await.map_err(text)?;
            Ok((client, key))
        };
        let (pairs, late) = runtime.block_on(async {
            let mut pairs = Vec::new();
            for pair in 0..PAIRS {
                let numbers = [2 * pair + 1, 2 * pair + 2];
                let mut ends = Vec::new();
                for number in numbers {
                    let (mut client, key) = enrol(number).await?;
                    client.listen().await;
                    ends.push((client, Published::new(number, &key, 0)));
                }
                for (from, to) in [(0, 1), (1, 0)] {
                    let (client, published) = &mut ends[from];
                    let (wrap, bundle) = (wrap(numbers[from]), published.signed());
                    client.done(&Message::Wrap { request: 1, to: [numbers[to]; 16], wrap: &wrap, bundle }).await;
                    ends[to].0.message().await;
                }
                let ends = ends.into_iter().map(|(client, _)| client).collect::<Vec<_>>();
                let ends = ends.try_into().map_err(|_| "two ends")?;
                pairs.push(Pair { ends, next: 0 });
            }
            let (client, key) = enrol(2 * PAIRS + 1).await?;
            client.close().await;
            Ok::<_, Failure>((pairs, (key, 2 * PAIRS + 1)))
        })?;
        Ok(Self { runtime, pairs, late: Some(late) })
    }

    /// Lets each pair exchange messages for so long.
    fn measure(&mut self, time: Duration) -> Result<Times, Failure> {
        let pairs = core::mem::take(&mut self.pairs);
        let (pairs, mut times) = self.runtime.block_on(async {
            let begun = Instant::now();
            let talking: Vec<_> = pairs.into_iter().map(|pair| tokio::spawn(pair.talk(begun, time))).collect();
            let (mut pairs, mut all) = (Vec::new(), Vec::new());
            for pair in talking {
                let (pair, times) = pair.await?;
                pairs.push(pair);
                all.extend(times);
            }
            Ok::<_, Failure>((pairs, all))
        })?;
        self.pairs = pairs;
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100];
        Ok(Times { count: times.len(), p50: at(50), p99: at(99), max: at(100) })
    }

    fn end(self) -> Result<(), Failure> {
        self.runtime.block_on(async {
            for end in self.pairs.into_iter().flat_map(|pair| pair.ends) {
                end.close().await;
            }
        });
        Ok(())
    }
}

impl Pair {
    async fn talk(mut self, begun: Instant, time: Duration) -> (Self, Vec<Duration>) {
        let mut times = Vec::new();
        while begun.elapsed() < time {
            let sent = Instant::now();
            for (from, to) in [(0, 1), (1, 0)] {
                let chain = self.ends[from].id[0];
                let envelope = envelope(chain, self.next, 64);
                self.ends[from].send(&Message::Send { wanted: Rungs::NONE, envelope: &envelope }).await;
                let heard = self.ends[to].message().await;
                assert!(matches!(Message::decode(&heard), Ok(Message::Deliver { .. })), "{heard:?}");
            }
            times.push(sent.elapsed());
            self.next += 1;
            sleep(PAUSE).await;
        }
        (self, times)
    }
}

/// How long it takes a client to come in, once a second, until the flood is over.
async fn logins(address: SocketAddr, (key, number): (IdentityKey, u8), flood: Arc<Flood>) -> Vec<Duration> {
    let mut times = Vec::new();
    while !flood.is_over() {
        let begun = Instant::now();
        // Whoever does not come in within a minute never does.
        while begun.elapsed() < Duration::from_secs(60) && log_in(address, &key, number).await.is_err() {
            sleep(RETRY).await;
        }
        times.push(begun.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
    times
}

/// One attempt, with the work that the server asks for.
async fn log_in(address: SocketAddr, key: &IdentityKey, number: u8) -> Result<(), Failure> {
    let server = keys::server();
    let mut puzzle: Option<Puzzle> = None;
    let mut rx = Vec::new();
    'attempt: loop {
        let mut seed = [0; 64];
        getrandom::fill(&mut seed)?;
        let config = ClientConfig { server: Some(server.fingerprint()), ask_for_key: false, record_limit: 16_408 };
        let mut connection: Connection<HostAead> = Connection::client(config, &seed);
        if let Some(puzzle) = &puzzle {
            connection.present(puzzle).map_err(text)?;
            while connection.solve() {}
        }
        let credentials = Credentials::Key { id: [number; 16], key_epoch: 0, fingerprint: key.fingerprint() };
        let mut stream = timeout(Duration::from_secs(5), TcpStream::connect(address)).await??;
        rx.clear();
        let mut out = vec![0; 4096];
        loop {
            let mut len = connection.transmit(&mut out).map_err(text)?;
            if let Some(Ask::Sign(statement)) = connection.ask() {
                let signature = key.sign(&statement)?;
                len += connection.sign_client(&credentials, &signature, &mut out[len..]).map_err(text)?;
            }
            stream.write_all(&out[..len]).await?;
            match connection.receive(&mut rx) {
                Ok(Received::Record { used, event }) => {
                    let (entered, verified) = match event {
                        Event::CheckServer(claim) => {
                            (false, Some(verify(server.modulus(), &claim.statement, claim.signature)))
                        }
                        Event::Connected(_) => (true, None),
                        _ => (false, None),
                    };
                    match verified {
                        Some(true) => connection.verified(&credentials).map_err(text)?,
                        Some(false) => return Err("another server".into()),
                        None => {}
                    }
                    rx.drain(..used);
                    if entered {
                        return Ok(());
                    }
                }
                Ok(_) => {
                    let mut bytes = [0; 4096];
                    match timeout(Duration::from_secs(30), stream.read(&mut bytes)).await?? {
                        0 => return Err("the server has closed".into()),
                        len => rx.extend_from_slice(&bytes[..len]),
                    }
                }
                Err(Error::Peer(PeerError::Retry)) => {
                    puzzle = connection.puzzle();
                    continue 'attempt;
                }
                Err(error) => return Err(text(error)),
            }
        }
    }
}
