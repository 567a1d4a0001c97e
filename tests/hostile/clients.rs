//! Hostile servers, and the real commands.
//!
//! Each command meets a server that has the right key and lies, or that has not. What is no more than a broken connection
//! must be forgotten when the next one is honest: then the command still does what it was asked for.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use ossicle::crypto::IdentityKey;
use ossicle_core::{
    Bundle, BundleKeys, DirectoryEntry, DirectoryList, Lookup, Member, Message, PeerStatus, Presence, Reason, Receipt,
    Rung, Rungs, Settings, SignedBundle, Subject,
};
use ossicle_tests::cli::{Done, Running, binary};
use ossicle_tests::node::{envelope, wrap};
use ossicle_tests::raw::{self, Proof, RawServer, clear};
use ossicle_tests::{Rng, keys};
use tempfile::TempDir;

/// What a hostile server does to a command, and how that ends.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// The command; `URL` is the server's.
    command: &'static [&'static str],
    /// What happens on the first connection; true if it goes on honestly.
    act: fn(&Site, &mut RawServer) -> bool,
    /// The exit code.
    code: i32,
    /// What is in the one sentence of a command that fails, or in the output of one that does not.
    says: &'static str,
}

const fn row(
    name: &'static str,
    command: &'static [&'static str],
    act: fn(&Site, &mut RawServer) -> bool,
    code: i32,
    says: &'static str,
) -> Row {
    Row { name, command, act, code, says }
}

const BOB: [u8; 16] = [0xb0; 16];
const SEND: &[&str] = &["send", "bob", "hello", "--wait", "accepted", "--timeout", "30s"];
/// For what cannot succeed and is not refused either.
const IMPATIENT: &[&str] = &["send", "bob", "hello", "--timeout", "5s"];
const WHO: &[&str] = &["who"];
const INIT: &[&str] = &["init", "--name", "newcomer", "--rsa", "2048", "URL"];

/// A place for hostile servers: a port, and a home that was made there.
pub(crate) struct Site {
    directory: TempDir,
    listener: TcpListener,
    server: IdentityKey,
    /// The fingerprint of the home's key.
    client: [u8; 32],
    bob: Bundle,
    bobs_signature: Vec<u8>,
}

impl Site {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let bobs_keys = BundleKeys::generate(1, &mut Rng::new(9)).unwrap();
        let bob = bobs_keys.bundle(&Member { id: BOB, key: keys::bob().fingerprint() }, 5, [0; 32]);
        let bobs_signature = keys::bob().sign(&bob.statement()).unwrap();
        let directory = TempDir::new().unwrap();
        let server = keys::server();
        let mut site = Self { directory, listener, server, client: [0; 32], bob, bobs_signature };
        let honest = row("a home", &["init", "--name", "alice", "--rsa", "2048", "URL"], |_, _| true, 0, "alice");
        assert_eq!(site.meet(&honest, "home", |site, server| site.enter(server)), Ok(()));
        site.client = IdentityKey::load(&site.path("home/identity.pem")).unwrap().fingerprint();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn url(&self) -> String {
        let fingerprint: String = self.server.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("ossicle://{}#{fingerprint}", self.listener.local_addr().unwrap())
    }

    /// The entry of the directory for Bob.
    fn entry<'e>(&'e self, bundle: &'e [u8], modulus: &'e [u8]) -> DirectoryEntry<'e> {
        DirectoryEntry {
            id: BOB,
            name: "bob",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Online,
            modulus: Some(modulus),
            bundle: Some(SignedBundle { bundle, signature: &self.bobs_signature }),
        }
    }

    /// The right handshake.
    fn enter(&self, server: &mut RawServer) -> bool {
        self.enter_with(server, &settings())
    }

    fn enter_with(&self, server: &mut RawServer, settings: &Settings) -> bool {
        if !self.recognise(server) {
            return false;
        }
        server.say_message(&Message::Settings(*settings));
        true
    }

    /// The right handshake up to the client's claim.
    fn recognise(&self, server: &mut RawServer) -> bool {
        server.hear_hello();
        let mode = if server.is_offered() { 2 } else { 0 };
        server.prove(&Proof { mode, ..Proof::new(&self.server) }, &self.server);
        server.hear_claim(&self.client)
    }

    /// Answers this as an honest server would. False when the client has gone.
    fn answer(&self, server: &mut RawServer) -> bool {
        let Some(payload) = server.hear() else { return false };
        self.answer_to(server, &payload)
    }

    fn answer_to(&self, server: &mut RawServer, payload: &[u8]) -> bool {
        let modulus = keys::bob().modulus().to_vec();
        let bundle = self.bob.encode();
        match Message::decode(payload).expect("the client says what it may") {
            Message::Lookup(Lookup { request, subject: Subject::Name("bob") | Subject::Id(BOB), .. }) => {
                server.say_message(&Message::LookupResponse { request, entry: self.entry(&bundle, &modulus) });
            }
            Message::Lookup(Lookup { request, .. }) => {
                server.say_message(&Message::Refused { request, reason: Reason::Unknown, retry_after: None });
            }
            Message::List { request, after: "" } => page(server, request, false, &["alice", "bob"]),
            Message::List { request, .. } => page(server, request, false, &[]),
            Message::Publish { request, .. } | Message::Wrap { request, .. } => {
                server.say_message(&Message::Done { request });
            }
            Message::Send { envelope, .. } => server.say_message(&Message::Told(told(Rung::Accepted, envelope))),
            Message::Status { request } => server.say_message(&Message::StatusResponse { request }),
            Message::Close { .. } => {
                server.say_message(&Message::Close { reason: None });
                return false;
            }
            _ => {}
        }
        true
    }

    /// The payload of the next request with this code; what comes before it is answered.
    fn asked(&self, server: &mut RawServer, code: u16) -> Vec<u8> {
        loop {
            let payload = server.hear().expect("the client asks");
            if payload[..2] == code.to_be_bytes() {
                return payload;
            }
            assert!(self.answer_to(server, &payload), "the client asks");
        }
    }

    /// Runs a command in a copy of the home against a server that does this first and is honest from then on.
    fn meet(&self, row: &Row, home: &str, act: impl Fn(&Self, &mut RawServer) -> bool + Sync) -> Result<(), String> {
        let home = self.path(home);
        if row.command[0] != "init" {
            copy(&self.path("home"), &home);
        }
        let mut command = std::process::Command::new(binary());
        for word in row.command {
            match *word {
                "URL" => command.arg(self.url()),
                word => command.arg(word),
            };
        }
        command.env("OSSICLE_HOME", &home).env_remove("RUST_LOG");
        let over = AtomicBool::new(false);
        let (done, served) = thread::scope(|scope| {
            let served = scope.spawn(|| {
                crate::OURS.set(true);
                self.serve(&over, &act);
            });
            let mut running = Running::start(&mut command);
            running.end_input();
            let done = running.wait();
            over.store(true, Ordering::SeqCst);
            (done, served.join())
        });
        if served.is_err() {
            return Err(format!("{}: an assertion failed; {done:?}", row.name));
        }
        judge(row, &done)
    }

    /// A connection that is there and says something. One that connects again may be out of time before its hello.
    fn accept(&self) -> Option<RawServer> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        matches!(stream.peek(&mut [0]), Ok(1..)).then(|| RawServer::new(stream))
    }

    /// The next connection, if it comes in time.
    fn next(&self, time: Duration) -> Option<RawServer> {
        let begun = Instant::now();
        while begun.elapsed() < time {
            if let Some(server) = self.accept() {
                return Some(server);
            }
            thread::sleep(Duration::from_millis(5));
        }
        None
    }

    fn serve(&self, over: &AtomicBool, act: &(impl Fn(&Self, &mut RawServer) -> bool + Sync)) {
        let mut is_first = true;
        while !over.load(Ordering::SeqCst) {
            let Some(mut server) = self.accept() else {
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            let goes_on = if is_first { act(self, &mut server) } else { self.enter(&mut server) };
            is_first = false;
            while goes_on && self.answer(&mut server) {}
            // What the client has not read yet must not be taken back by a reset.
            server.wire.finish();
            while server.wire.record().is_some() {}
        }
    }
}

/// A command ends as its row says, with one sentence, and whatever it writes is harmless.
fn judge(row: &Row, done: &Done) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{}: {what}: {done:?}", row.name));
    if done.code != Some(row.code) {
        return wrong(&format!("not exit code {}", row.code));
    }
    let written = [done.out.as_str(), done.err.as_str()].concat();
    if written.chars().any(|c| c.is_control() && c != '\n') || written.contains('\u{202e}') {
        return wrong("something raw is printed");
    }
    if written.contains("panicked") || written.len() > 4096 {
        return wrong("a panic, or too many words");
    }
    let sentences: Vec<_> = done.err.lines().filter(|line| line.starts_with("ossicle: ")).collect();
    let as_said = if row.code == 0 {
        sentences.is_empty() && written.contains(row.says)
    } else {
        matches!(sentences[..], [sentence] if sentence.contains(row.says))
    };
    if as_said { Ok(()) } else { wrong(&format!("{:?} is not said", row.says)) }
}

fn copy(from: &Path, to: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir(to).unwrap();
    std::fs::set_permissions(to, PermissionsExt::from_mode(0o700)).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
}

/// Runs all rows, some of them at a time. Most of them wait for a client that tries again after a second.
pub(crate) fn run(rows: &[Row]) {
    const AT_A_TIME: usize = 6;
    crate::watch_panics();
    let wrong: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME)
            .map(|worker| {
                scope.spawn(move || {
                    crate::OURS.set(true);
                    let site = Site::new();
                    let mine = rows.iter().enumerate().skip(worker).step_by(AT_A_TIME);
                    mine.filter_map(|(number, row)| site.meet(row, &number.to_string(), row.act).err())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    println!("{} scenarios", rows.len());
    assert!(wrong.is_empty(), "{} of {} scenarios: {wrong:#?}", wrong.len(), rows.len());
}

fn settings() -> Settings {
    Settings { heartbeat: 15, timeout: 45, time: 1_790_000_000, store_epoch: [9; 8], ..Settings::default() }
}

fn told(rung: Rung, envelope: &[u8]) -> Receipt {
    let n = u32::from_be_bytes(envelope[8..12].try_into().unwrap());
    Receipt { rung, reason: None, chain: envelope[..8].try_into().unwrap(), from: n, to: n, tag: None }
}

fn page(server: &mut RawServer, request: u16, more: bool, names: &[&str]) {
    let mut lines = vec![0; 16_000];
    let mut len = 0;
    for name in names {
        let line = Presence { id: [7; 16], name, status: PeerStatus::Offline { last_seen: Some(u64::MAX) } };
        match DirectoryList::append(&line, &mut lines[len..]) {
            Some(line) => len += line,
            None => break,
        }
    }
    server.say_message(&Message::ListResponse(DirectoryList::new(request, more, &lines[..len])));
}

/// The request that a payload is, by number.
fn number(payload: &[u8]) -> u16 {
    match Message::decode(payload).unwrap() {
        Message::Lookup(Lookup { request, .. })
        | Message::List { request, .. }
        | Message::Publish { request, .. }
        | Message::Wrap { request, .. } => request,
        other => panic!("{other:?}"),
    }
}

const LOOKUP: u16 = 0x0500;
const LIST: u16 = 0x0501;
const SENT: u16 = 0x0200;
const WRAP: u16 = 0x0b01;
const TELL: u16 = 0x0230;

/// What a server says that has too much to do.
fn retry(bits: u8) -> Vec<u8> {
    clear(raw::HELLO_RETRY, &[&[bits, 8][..], b"a cookie"].concat())
}

/// A row whose server wants so much work and is honest to the next connection.
macro_rules! asks {
    ($name:literal, $command:expr, $bits:literal, $code:literal, $says:literal) => {
        row(
            $name,
            $command,
            |_, server| {
                server.hear_hello();
                server.wire.say(&retry($bits));
                assert_eq!(server.wire.record(), None, "the client goes on with that");
                false
            },
            $code,
            $says,
        )
    };
}

/// A row whose server shows this proof instead of the right one. Nobody says who he is to it.
macro_rules! proves {
    ($name:literal, $command:expr, |$site:ident, $proof:ident| $change:expr, $code:literal, $says:literal) => {
        row(
            $name,
            $command,
            |$site, server| {
                server.hear_hello();
                let mut right = Proof::new(&$site.server);
                let $proof = &mut right;
                $change;
                server.prove(&right, &$site.server);
                assert_eq!(server.wire.record(), None, "the client says who it is to the wrong server");
                false
            },
            $code,
            $says,
        )
    };
}

/// A row whose server says these bytes to a hello and waits for the end. The client goes and comes again.
macro_rules! replies {
    ($name:literal, |$server:ident| $bytes:expr) => {
        row(
            $name,
            SEND,
            |site, $server| {
                $server.hear_hello();
                let _ = site;
                let bytes = $bytes;
                $server.wire.say(&bytes);
                assert_eq!($server.wire.record(), None, "the client goes on with that");
                false
            },
            0,
            "accepted",
        )
    };
}

/// A row whose server says this to a client that it has let in; then it is honest.
macro_rules! says {
    ($name:literal, |$site:ident, $server:ident| $say:expr) => {
        row(
            $name,
            SEND,
            |$site, $server| {
                let entered = $site.enter($server);
                $say;
                entered
            },
            0,
            "accepted",
        )
    };
}

/// A row whose server breaks the rules of records. The client goes and comes again.
macro_rules! breaks {
    ($name:literal, |$server:ident| $say:expr) => {
        row(
            $name,
            SEND,
            |site, $server| {
                site.enter($server);
                $say;
                while $server.wire.record().is_some() {}
                false
            },
            0,
            "accepted",
        )
    };
}

/// A row whose directory lies about Bob.
macro_rules! lies {
    ($name:literal, |$site:ident, $entry:ident| $change:expr, $says:literal) => {
        row(
            $name,
            SEND,
            |$site, server| {
                $site.enter(server);
                let request = number(&$site.asked(server, LOOKUP));
                let (bundle, modulus) = ($site.bob.encode(), keys::bob().modulus().to_vec());
                let mut right = $site.entry(&bundle, &modulus);
                let $entry = &mut right;
                $change;
                server.say_message(&Message::LookupResponse { request, entry: right });
                true
            },
            1,
            $says,
        )
    };
}

/// A row that refuses or answers the request with this code.
macro_rules! answers {
    ($name:literal, $command:expr, $code:expr, |$request:ident| $answer:expr, $exit:literal, $says:literal) => {
        row(
            $name,
            $command,
            |site, server| {
                site.enter(server);
                let $request = number(&site.asked(server, $code));
                server.say_message(&$answer);
                true
            },
            $exit,
            $says,
        )
    };
}

/// The receipt that a client makes of something that it does not take.
fn refusal(site: &Site, server: &mut RawServer, reason: Reason) {
    let payload = site.asked(server, TELL);
    let Ok(Message::Tell(receipt)) = Message::decode(&payload) else { panic!("a receipt") };
    assert_eq!((receipt.rung, receipt.reason), (Rung::Refused, Some(reason)));
}

fn leaked(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

fn bundle(site: &Site, change: impl Fn(&mut Bundle)) -> SignedBundle<'static> {
    let mut bundle = site.bob;
    change(&mut bundle);
    let signature = keys::bob().sign(&bundle.statement()).unwrap();
    SignedBundle { bundle: leaked(bundle.encode().to_vec()), signature: leaked(signature) }
}

pub(crate) const ROWS: &[Row] = &[
    // Who is not the server, or does not prove it.
    proves!(
        "another key's proof",
        SEND,
        |_site, proof| {
            proof.fingerprint = keys::server3072().fingerprint();
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "a signature over another transcript",
        SEND,
        |site, proof| {
            proof.signature = Some(raw::sign(&site.server, "ossicle HS1 server auth", &[7; 32]));
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "a signature of zeros by a server",
        SEND,
        |_site, proof| {
            proof.signature = Some(vec![0; 256]);
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "no signature by a server",
        SEND,
        |_site, proof| {
            proof.signature = Some(Vec::new());
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "a signature as long as none",
        SEND,
        |_site, proof| {
            proof.signature = Some(vec![7; 900]);
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "a Finished of zeros by a server",
        SEND,
        |_site, proof| {
            proof.finished = Some(vec![0; 32]);
        },
        1,
        "another key than the pinned one"
    ),
    proves!(
        "a key that nobody asked for",
        SEND,
        |site, proof| {
            proof.spki = Some(raw::spki(&site.server));
        },
        1,
        "another key than the pinned one"
    ),
    // A handshake that is none.
    proves!("a resumption of nothing", SEND, |_site, proof| proof.mode = 1, 0, "accepted"),
    proves!("a refusal to resume nothing", SEND, |_site, proof| proof.mode = 2, 0, "accepted"),
    proves!("a mode that there is not", SEND, |_site, proof| proof.mode = 3, 0, "accepted"),
    proves!("version 2.0 chosen", SEND, |_site, proof| proof.chosen = [2, 0, 0, 1], 0, "accepted"),
    proves!("a suite chosen that was not offered", SEND, |_site, proof| proof.chosen = [1, 0, 0, 2], 0, "accepted"),
    proves!("a server that takes no records", SEND, |_site, proof| proof.record_limit = 0, 0, "accepted"),
    proves!("a server that takes 1,023 bytes", SEND, |_site, proof| proof.record_limit = 1023, 0, "accepted"),
    proves!("a server's key of zeros", SEND, |_site, proof| proof.exchange = Some([0; 32]), 0, "accepted"),
    proves!(
        "a server's key of low order",
        SEND,
        |_site, proof| {
            proof.exchange = Some([1; 32].map(|_| 0));
            proof.exchange.as_mut().unwrap()[0] = 1;
        },
        0,
        "accepted"
    ),
    proves!("another agreement than was said", SEND, |_site, proof| proof.exchange = Some([9; 32]), 0, "accepted"),
    replies!("the client's hello, reflected", |server| server.hello.clone()),
    replies!("a web server", |_server| b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec()),
    replies!("a TLS alert", |_server| vec![0x15, 3, 1, 0, 2, 2, 40, 0]),
    replies!("an SSH server", |_server| b"SSH-2.0-OpenSSH_9.9\r\n".to_vec()),
    replies!("64 KiB of zeros from a server", |_server| vec![0; 65_536]),
    replies!("a ServerHello of 2,049 bytes", |_server| clear(raw::SERVER_HELLO, &[7; 2041])),
    replies!("a ServerHello with a byte too many", |_server| clear(raw::SERVER_HELLO, &[0; 72])),
    replies!("a ServerAuth before a ServerHello", |_server| clear(raw::SERVER_AUTH, &[0; 300])),
    replies!("settings before anything", |_server| clear(raw::APPLICATION, &[0; 60])),
    replies!("a refusal before anything", |_server| clear(raw::REFUSAL, &[0; 21])),
    row("an end instead of a hello", SEND, |_, _| false, 0, "accepted"),
    row(
        "a server that wants to see work",
        SEND,
        |site, server| {
            server.hear_hello();
            server.wire.say(&retry(10));
            assert_eq!(server.wire.record(), None);
            *server = site.next(Duration::from_secs(30)).expect("the client comes back");
            let entered = site.enter(server);
            let hello = &server.hello;
            assert_eq!(hello[82..91], *b"\x08a cookie", "the cookie");
            let prefix = raw::hash(&[b"ossicle puzzle\0", &hello[82..91], &hello[18..82]]);
            let proof = raw::hash(&[&prefix, &hello[91..99]]);
            assert!(proof[0] == 0 && proof[1] < 64, "ten zeros");
            entered
        },
        0,
        "accepted",
    ),
    row(
        "a server that wants to see work without end",
        IMPATIENT,
        |site, server| {
            let mut count = 0;
            loop {
                server.hear_hello();
                let worked = server.hello[82] > 0;
                assert_eq!(worked, count % 2 == 1, "it works once for an attempt");
                server.wire.say(&retry(8));
                server.wire.finish();
                while server.wire.record().is_some() {}
                count += 1;
                match site.next(Duration::from_secs(8)) {
                    Some(next) => *server = next,
                    None => break,
                }
            }
            // A pause of half a second at least lies between two attempts.
            assert!((2..=24).contains(&count), "{count} connections in five seconds");
            false
        },
        3,
        "not reached within 5s",
    ),
    asks!("a server that wants to see work done until the end of time", SEND, 255, 0, "accepted"),
    asks!("a server that wants to see a little more work than there is a right to", SEND, 19, 0, "accepted"),
    replies!("a server that wants work and gives no cookie", |server| clear(raw::HELLO_RETRY, &[8, 0])),
    replies!("a server that gives a cookie of 41 bytes", |server| {
        clear(raw::HELLO_RETRY, &[&[8, 41][..], &[7; 41]].concat())
    }),
    row(
        "a server that wants to see work after its hello",
        SEND,
        |site, server| {
            server.hear_hello();
            let (hello, _) = server.proof(&Proof::new(&site.server), &site.server);
            server.wire.say(&[hello, retry(8)].concat());
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "an end behind the client's hello",
        SEND,
        |_, server| {
            server.hear_hello();
            false
        },
        0,
        "accepted",
    ),
    row(
        "an end within ServerAuth",
        SEND,
        |site, server| {
            server.hear_hello();
            let (hello, auth) = server.proof(&Proof::new(&site.server), &site.server);
            server.wire.say(&[&hello[..], &auth[..100]].concat());
            false
        },
        0,
        "accepted",
    ),
    row(
        "a ServerAuth with a flipped bit",
        SEND,
        |site, server| {
            server.hear_hello();
            let (hello, mut auth) = server.proof(&Proof::new(&site.server), &site.server);
            auth[50] ^= 1;
            server.wire.say(&[hello, auth].concat());
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "a right proof, byte by byte",
        SEND,
        |site, server| {
            server.hear_hello();
            let (hello, auth) = server.proof(&Proof::new(&site.server), &site.server);
            for byte in [hello, auth].concat() {
                server.wire.say(&[byte]);
            }
            assert!(server.hear_claim(&site.client));
            server.say_message(&Message::Settings(settings()));
            true
        },
        0,
        "accepted",
    ),
    row(
        "an end behind the client's claim",
        SEND,
        |site, server| {
            site.recognise(server);
            false
        },
        0,
        "accepted",
    ),
    row(
        "another message than settings",
        SEND,
        |site, server| {
            site.recognise(server);
            server.say_message(&Message::StatusResponse { request: 1 });
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "settings without their last byte",
        SEND,
        |site, server| {
            site.recognise(server);
            let settings = raw::payload(&Message::Settings(settings()));
            server.say(&settings[..settings.len() - 1]);
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "settings as record number 1",
        SEND,
        |site, server| {
            site.recognise(server);
            server.keys.as_mut().unwrap().1.counter = 1;
            server.say_message(&Message::Settings(settings()));
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "a refusal with a reason that there is not",
        SEND,
        |site, server| {
            site.recognise(server);
            server.refuse(0, 0);
            assert_eq!(server.wire.record(), None);
            false
        },
        0,
        "accepted",
    ),
    row(
        "a refusal by name",
        SEND,
        |site, server| {
            site.recognise(server);
            server.refuse(Reason::Unauthorised.code(), 0);
            false
        },
        1,
        "does not let alice in",
    ),
    row(
        "a refusal until the end of time",
        IMPATIENT,
        |site, server| {
            site.recognise(server);
            server.refuse(Reason::Rate.code(), u32::MAX);
            false
        },
        3,
        "not reached within 5s",
    ),
    row("settings of zeros", SEND, |site, server| site.enter_with(server, &Settings::default()), 0, "accepted"),
    row(
        "settings of ones",
        SEND,
        |site, server| {
            site.enter_with(
                server,
                &Settings {
                    channel: [0xff; 16],
                    valid_for: u32::MAX,
                    heartbeat: u16::MAX,
                    timeout: u16::MAX,
                    time: u64::MAX,
                    waiting: u32::MAX,
                    store_epoch: [0xff; 8],
                },
            )
        },
        0,
        "accepted",
    ),
    row(
        "a channel that is forgotten at once",
        SEND,
        |site, server| {
            site.enter_with(server, &Settings { channel: [7; 16], valid_for: 600, ..settings() });
            // The next connection offers it and is answered by a full handshake.
            false
        },
        0,
        "accepted",
    ),
    // What no server says.
    says!("answers to questions that nobody asked", |_site, server| {
        for request in [0, 2, 7, 4711, u16::MAX] {
            server.say_message(&Message::Done { request });
            server.say_message(&Message::Refused { request, reason: Reason::KeyChanged, retry_after: Some(0) });
            page(server, request, true, &["mallory"]);
            server.say(&[5, 0x15, 9, 1, 7, 1, 7]);
            server.say(&[8, 0x10, 9, 0, 0]);
        }
    }),
    says!("requests of a client, by a server", |_site, server| {
        server.say_message(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(7, 0, 60) });
        server.say_message(&Message::List { request: 1, after: "" });
        server.say_message(&Message::Revoke { request: 1, subject: Subject::Name("alice") });
        server.say_message(&Message::Listening);
        server.say(&[5, 2, 9, 0, 1]);
        server.say(&[5, 4, 9, 1]);
    }),
    says!("codes that there are not, and nothing", |_site, server| {
        for payload in [&[][..], &[0], &[0, 0], &[0xff, 0xff, 1], &[9, 9], &[4, 0], &[7, 0x20, 1]] {
            server.say(payload);
        }
    }),
    says!("settings twice, of extremes", |_site, server| {
        server.say_message(&Message::Settings(Settings { heartbeat: 1, timeout: u16::MAX, ..Settings::default() }));
    }),
    says!("a thousand questions whether somebody is there", |_site, server| {
        for request in 0..1000 {
            server.say_message(&Message::Status { request });
        }
        for request in 0..1000 {
            let expected = raw::payload(&Message::StatusResponse { request });
            while server.hear().expect("an answer") != expected {}
        }
        // What was asked meanwhile went by unanswered; the client asks again over the next connection.
        server.wire.finish();
    }),
    says!("a message on a chain that there is not", |site, server| {
        server.say_message(&Message::Deliver { wanted: Rungs::NONE, envelope: &envelope(7, 0, 60) });
        refusal(site, server, Reason::Rekey);
    }),
    says!("messages that are no envelopes", |_site, server| {
        for len in [0, 1, 20, 36] {
            server.say(&[&[2, 0x20, 0][..], &vec![7; len]].concat());
        }
        server.say(&[&[2, 0x20, 0xff][..], &envelope(7, 0, 60)].concat());
    }),
    says!("a wrap from nobody", |site, server| {
        let signed = bundle(site, |_| {});
        server.say_message(&Message::WrapDelivery { from: [0x33; 16], wrap: &wrap(7), bundle: signed });
        refusal(site, server, Reason::Unreadable);
    }),
    says!("a wrap from Bob that does not open", |site, server| {
        let signed = bundle(site, |_| {});
        server.say_message(&Message::WrapDelivery { from: BOB, wrap: &wrap(7), bundle: signed });
        refusal(site, server, Reason::Unreadable);
    }),
    says!("wraps of all wrong lengths, by a server", |site, server| {
        let signed = bundle(site, |_| {});
        for len in [0, 23, 243, 245, 9000] {
            server.say_message(&Message::WrapDelivery { from: BOB, wrap: &vec![7; len], bundle: signed });
        }
    }),
    says!("a wrap with a forged bundle", |site, server| {
        let signed = SignedBundle { signature: &[7; 256], ..bundle(site, |bundle| bundle.epoch = 99) };
        server.say_message(&Message::WrapDelivery { from: BOB, wrap: &wrap(7), bundle: signed });
        refusal(site, server, Reason::Unreadable);
    }),
    says!("a hundred wraps from a hundred strangers", |site, server| {
        let signed = bundle(site, |_| {});
        for from in 0..100 {
            server.say_message(&Message::WrapDelivery { from: [from; 16], wrap: &wrap(from), bundle: signed });
        }
        // More than the client asks for.
        refusal(site, server, Reason::Rate);
    }),
    says!("receipts for chains that there are not", |_site, server| {
        for rung in [Rung::Accepted, Rung::Stored, Rung::Delivered, Rung::Opened, Rung::Refused] {
            let receipt = Receipt { rung, reason: None, chain: [7; 8], from: 0, to: u32::MAX, tag: Some([0; 16]) };
            server.say_message(&Message::Told(receipt));
        }
    }),
    says!("three thousand key updates by a server", |_site, server| {
        for _ in 0..3000 {
            server.update_key();
        }
    }),
    says!("a hundred records as long as can be", |_site, server| {
        for _ in 0..100 {
            server.say(&[0xee; 16_384]);
        }
    }),
    // Records out of order, and ends.
    breaks!("a record that opens under no key", |server| server.wire.say(&clear(raw::APPLICATION, &[7; 40]))),
    breaks!("a record longer than was allowed", |server| server.wire.say(&[1, 0, 3, 0, 0x40, 0x19, 0, 0])),
    breaks!("a record shorter than any", |server| server.wire.say(&[1, 0, 3, 0, 0, 23, 0, 0])),
    breaks!("a record twice", |server| {
        let record = server.sealed(&[4, 0x10, 9]);
        server.wire.say(&[record.clone(), record].concat());
    }),
    breaks!("a record in front of the one before it", |server| {
        let (first, second) = (server.sealed(&[4, 0x10, 9]), server.sealed(&[4, 0x10, 9]));
        server.wire.say(&[second, first].concat());
    }),
    breaks!("a second ServerHello", |server| server.wire.say(&clear(raw::SERVER_HELLO, &[0; 71]))),
    breaks!("a refusal of a client that was let in", |server| server.refuse(3, 0)),
    breaks!("a key update that a server does not follow", |server| {
        server.say(&[8, 0x22]);
        server.say(&[4, 0x10, 9]);
    }),
    breaks!("a key update with a body", |server| server.say(&[8, 0x22, 1])),
    breaks!("a close for a reason that there is not", |server| server.say(&[8, 0x21, 1, 0])),
    row(
        "half a record, then the end of a server",
        SEND,
        |site, server| {
            site.enter(server);
            let record = server.sealed(&[4, 0x10, 9]);
            server.wire.say(&record[..12]);
            false
        },
        0,
        "accepted",
    ),
    row(
        "a close, and records behind it",
        SEND,
        |site, server| {
            site.enter(server);
            server.say(&[8, 0x21, 0]);
            for _ in 0..20 {
                server.say(&[4, 0, 1]);
            }
            false
        },
        0,
        "accepted",
    ),
    row(
        "a close because the server goes",
        SEND,
        |site, server| {
            site.enter(server);
            server.say_message(&Message::Close { reason: Some(Reason::Unavailable) });
            false
        },
        0,
        "accepted",
    ),
    row(
        "a close because the client was revoked",
        SEND,
        |site, server| {
            site.enter(server);
            server.say_message(&Message::Close { reason: Some(Reason::Unauthorised) });
            false
        },
        1,
        "does not let alice in",
    ),
    row(
        "a close because of another connection",
        SEND,
        |site, server| {
            site.enter(server);
            server.say_message(&Message::Close { reason: Some(Reason::TakenOver) });
            false
        },
        1,
        "another connection of alice took over",
    ),
    row(
        "silence behind settings",
        IMPATIENT,
        |site, server| {
            site.enter(server);
            while server.hear().is_some() {}
            false
        },
        3,
        "not reached within 5s",
    ),
    // What a directory may say of Bob.
    answers!(
        "an answer with another number",
        IMPATIENT,
        LOOKUP,
        |request| Message::Refused { request: request.wrapping_add(1), reason: Reason::Unknown, retry_after: None },
        3,
        "not reached"
    ),
    answers!(
        "nobody of that name",
        SEND,
        LOOKUP,
        |request| Message::Refused { request, reason: Reason::Unknown, retry_after: Some(u32::MAX) },
        1,
        "refused(unknown)"
    ),
    answers!(
        "a reason that fits nothing",
        SEND,
        LOOKUP,
        |request| Message::Refused { request, reason: Reason::Expired, retry_after: None },
        1,
        "refused(expired)"
    ),
    answers!(
        "`Done` where somebody is asked for",
        SEND,
        LOOKUP,
        |request| Message::Done { request },
        1,
        "refused(malformed)"
    ),
    lies!("somebody else of another name", |_site, entry| entry.name = "carol", "refused(malformed)"),
    lies!(
        "Bob under a name that a terminal obeys",
        |_site, entry| {
            entry.name = "\u{1b}]0;owned\u{7}";
        },
        "refused(malformed)"
    ),
    lies!("Bob without a key", |_site, entry| entry.modulus = None, "refused(malformed)"),
    lies!("Bob with a key of no length", |_site, entry| entry.modulus = Some(&[]), "refused(malformed)"),
    lies!("Bob with an even key", |_site, entry| entry.modulus = Some(&[0xfe; 256]), "refused(malformed)"),
    lies!("Bob without a bundle", |_site, entry| entry.bundle = None, "refused(offline)"),
    lies!(
        "Bob with another's key",
        |_site, entry| {
            entry.modulus = Some(leaked(keys::carol().modulus().to_vec()));
        },
        "refused("
    ),
    lies!("Bob with another's id", |_site, entry| entry.id = [7; 16], "refused("),
    lies!(
        "Bob with a bundle that is cut",
        |_site, entry| {
            let signed = entry.bundle.unwrap();
            entry.bundle = Some(SignedBundle { bundle: &signed.bundle[1..], ..signed });
        },
        "refused(unreadable)"
    ),
    lies!(
        "Bob with a bundle that nobody signed",
        |_site, entry| {
            entry.bundle = Some(SignedBundle { signature: &[7; 256], ..entry.bundle.unwrap() });
        },
        "refused(unreadable)"
    ),
    lies!(
        "Bob with a bundle that is another's",
        |site, entry| {
            entry.bundle = Some(bundle(site, |bundle| bundle.id = [7; 16]));
        },
        "refused(unreadable)"
    ),
    lies!(
        "Bob with a bundle for another key",
        |site, entry| {
            entry.bundle = Some(bundle(site, |bundle| bundle.key = [7; 32]));
        },
        "refused("
    ),
    lies!(
        "Bob with a prekey of zeros",
        |site, entry| {
            entry.bundle = Some(bundle(site, |bundle| bundle.prekey = [0; 32]));
        },
        "refused("
    ),
    lies!("Bob who takes no records", |_site, entry| entry.record_limit = 0, "refused(too-large)"),
    // Wraps and letters.
    answers!(
        "a wrap that is refused for ever",
        SEND,
        WRAP,
        |request| Message::Refused { request, reason: Reason::Forbidden, retry_after: None },
        1,
        "refused(forbidden)"
    ),
    row(
        "a letter that is refused by the server's word",
        SEND,
        |site, server| {
            site.enter(server);
            let sent = site.asked(server, SENT);
            let refused = Receipt { reason: Some(Reason::TooLarge), ..told(Rung::Refused, &sent[3..]) };
            server.say_message(&Message::Told(refused));
            true
        },
        1,
        "refused(too-large)",
    ),
    row(
        "letters that are refused as unknown without end",
        IMPATIENT,
        |site, server| {
            site.enter(server);
            while let Some(payload) = server.hear() {
                match Message::decode(&payload).unwrap() {
                    Message::Send { envelope, .. } => {
                        let refused = Receipt { reason: Some(Reason::Rekey), ..told(Rung::Refused, envelope) };
                        server.say_message(&Message::Told(refused));
                    }
                    _ => drop(site.answer_to(server, &payload)),
                }
            }
            false
        },
        3,
        "bob did not confirm it",
    ),
    row(
        "delivered, says the server, in Bob's name",
        IMPATIENT,
        |site, server| {
            site.enter(server);
            let sent = site.asked(server, SENT);
            for tag in [None, Some([0; 16]), Some([7; 16])] {
                for rung in [Rung::Delivered, Rung::Opened] {
                    server.say_message(&Message::Told(Receipt { tag, ..told(rung, &sent[3..]) }));
                }
            }
            true
        },
        3,
        "bob did not confirm it",
    ),
    row(
        "receipts for all numbers that there are",
        SEND,
        |site, server| {
            site.enter(server);
            let sent = site.asked(server, SENT);
            let receipt = told(Rung::Accepted, &sent[3..]);
            server.say_message(&Message::Told(Receipt { from: 5, to: 0, ..receipt }));
            server.say_message(&Message::Told(Receipt { from: 0, to: u32::MAX, ..receipt }));
            true
        },
        0,
        "accepted",
    ),
    // The list of clients.
    row(
        "a list that does not end",
        WHO,
        |site, server| {
            site.enter(server);
            let mut next = 0_u32;
            while let Some(payload) = server.hear() {
                if payload[..2] != LIST.to_be_bytes() {
                    site.answer_to(server, &payload);
                    continue;
                }
                let names: Vec<_> = (0..700).map(|index| format!("c{:08}", next + index)).collect();
                page(server, number(&payload), true, &names.iter().map(String::as_str).collect::<Vec<_>>());
                next += 600;
            }
            false
        },
        1,
        "lists more than",
    ),
    row(
        "a list that goes in circles",
        WHO,
        |site, server| {
            site.enter(server);
            while let Some(payload) = server.hear() {
                if payload[..2] == LIST.to_be_bytes() {
                    page(server, number(&payload), true, &["alice"; 700]);
                } else {
                    site.answer_to(server, &payload);
                }
            }
            false
        },
        1,
        "lists more than",
    ),
    row(
        "a page that says there is more and has nothing",
        WHO,
        |site, server| {
            site.enter(server);
            let request = number(&site.asked(server, LIST));
            page(server, request, true, &[]);
            true
        },
        0,
        "",
    ),
    row(
        "names that a terminal obeys",
        WHO,
        |site, server| {
            site.enter(server);
            let request = number(&site.asked(server, LIST));
            page(
                server,
                request,
                false,
                &["\u{1b}[2J", "al\u{202e}ice", "x\ny", "bob", "\u{9b}31m", "a\0b", &"n".repeat(500)],
            );
            true
        },
        0,
        "bob  offline, last seen 9999",
    ),
    row(
        "a page with rubbish behind its lines",
        WHO,
        |site, server| {
            site.enter(server);
            let request = number(&site.asked(server, LIST));
            let mut lines = vec![0; 100];
            let line = Presence { id: [7; 16], name: "bob", status: PeerStatus::Online };
            let len = DirectoryList::append(&line, &mut lines).unwrap();
            lines.truncate(len);
            lines.extend([0xff; 40]);
            server.say_message(&Message::ListResponse(DirectoryList::new(request, false, &lines)));
            true
        },
        0,
        "bob  online",
    ),
    answers!(
        "a list that is refused",
        WHO,
        LIST,
        |request| Message::Refused { request, reason: Reason::Forbidden, retry_after: None },
        1,
        "refused(forbidden)"
    ),
    answers!("`Done` where a list is asked for", WHO, LIST, |request| Message::Done { request }, 1, "makes no sense"),
    row(
        "a list that is cut",
        WHO,
        |site, server| {
            site.enter(server);
            site.asked(server, LIST);
            false
        },
        0,
        "bob",
    ),
    // First contact.
    proves!(
        "a newcomer meets another key",
        INIT,
        |_site, proof| {
            proof.spki = Some(raw::spki(&keys::server3072()));
            proof.fingerprint = keys::server3072().fingerprint();
        },
        1,
        "another key than the URL says"
    ),
    proves!(
        "a newcomer meets the right key without its signature",
        INIT,
        |_site, proof| {
            proof.signature = Some(vec![7; 256]);
        },
        1,
        "another key than the URL says"
    ),
    proves!(
        "a newcomer meets half a key",
        INIT,
        |site, proof| {
            proof.spki = Some(raw::spki(&site.server)[..150].to_vec());
        },
        1,
        "broke during the handshake"
    ),
    proves!(
        "a newcomer meets no key",
        INIT,
        |_site, proof| proof.spki = Some(Vec::new()),
        1,
        "broke during the handshake"
    ),
    asks!("a newcomer is asked for work", INIT, 8, 0, "newcomer is enrolled"),
    asks!("a newcomer is asked for too much work", INIT, 200, 1, "has too much to do"),
    row(
        "a newcomer is asked for work twice",
        INIT,
        |site, server| {
            server.hear_hello();
            server.wire.say(&retry(8));
            *server = site.next(Duration::from_secs(30)).expect("the client comes back");
            server.hear_hello();
            server.wire.say(&retry(8));
            assert_eq!(server.wire.record(), None);
            assert!(site.next(Duration::from_secs(1)).is_none(), "a newcomer tries again by himself");
            false
        },
        1,
        "has too much to do",
    ),
    row("a newcomer meets nobody", INIT, |_, _| false, 1, "broke during the handshake"),
    row(
        "a newcomer meets a web server",
        INIT,
        |_, server| {
            server.hear_hello();
            server.wire.say(b"HTTP/1.1 400 Bad Request\r\n\r\n");
            false
        },
        1,
        "is that an ossicle server",
    ),
    row(
        "a newcomer is refused for no reason",
        INIT,
        |site, server| {
            site.recognise(server);
            server.refuse(99, 0);
            false
        },
        1,
        "broke during the handshake",
    ),
    row(
        "a newcomer is told to wait until the end of time",
        INIT,
        |site, server| {
            site.recognise(server);
            server.refuse(Reason::Rate.code(), u32::MAX);
            false
        },
        1,
        "try again in 4294968 seconds",
    ),
    row(
        "a newcomer is let in and cut off",
        INIT,
        |site, server| {
            site.enter(server);
            false
        },
        3,
        "run the same `ossicle init` again",
    ),
    row(
        "a newcomer whose keys are refused",
        INIT,
        |site, server| {
            site.enter(server);
            let request = number(&site.asked(server, 0x0b00));
            server.say_message(&Message::Refused { request, reason: Reason::Unavailable, retry_after: None });
            true
        },
        1,
        "did not take this identity's keys (unavailable)",
    ),
    row(
        "a newcomer hears much before its answer",
        INIT,
        |site, server| {
            site.enter(server);
            let request = number(&site.asked(server, 0x0b00));
            for other in [0, 2, u16::MAX] {
                server.say_message(&Message::Done { request: other });
                server.say_message(&Message::Refused { request: other, reason: Reason::Forbidden, retry_after: None });
            }
            server.say(&[0xff; 100]);
            server.say_message(&Message::Done { request });
            true
        },
        0,
        "newcomer is enrolled",
    ),
];
