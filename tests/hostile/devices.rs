//! Hostile servers, and the device: in a thread here, and as its image in QEMU.
//!
//! Each device is new and meets a hostile server on its first connection. It must not say who it is to a server that has
//! not proved itself, and must join as ever when the next connection is honest.

use std::net::TcpListener;
use std::thread;

use ossicle_core::{
    Bundle, BundleKeys, Closed, DirectoryEntry, Fixed, GroupFlags, GroupPolicy, IdentityPage, Invite, MAX_PAGE_LEN,
    Member, MemberChanged, MemberState, Members, Message, PageKey, PageOwner, PeerStatus, Reason, Receipt, Rung, Rungs,
    Settings, SignedBundle, Subject, ToldBy,
};
use ossicle_tests::node::envelope;
use ossicle_tests::raw::{self, Proof, RawServer, clear};
use ossicle_tests::{Rng, keys, public};

const OWNER: [u8; 16] = [0xa1; 16];
const DEVICE: [u8; 16] = [0xde; 16];

/// What a hostile server does to a device.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// What happens on the first connection; true if it goes on honestly.
    act: fn(&mut RawServer) -> bool,
}

const fn row(name: &'static str, act: fn(&mut RawServer) -> bool) -> Row {
    Row { name, act }
}

/// Something that can be a device with this page: a thread or a QEMU, gone when dropped.
pub(crate) type Start = fn(page: Vec<u8>) -> Box<dyn core::any::Any>;

/// The page of a device whose server listens on this port of the loopback.
fn page(port: u16) -> Vec<u8> {
    let (server, owner, device) = (keys::server(), keys::alice(), keys::bob());
    let owners = BundleKeys::generate(1, &mut Rng::new(7)).unwrap();
    let bundle = owners.bundle(&Member { id: OWNER, key: owner.fingerprint() }, 1, [0; 32]);
    let signature = owner.sign(&bundle.statement()).unwrap();
    let parts = device.components().unwrap();
    let mut page = vec![0; MAX_PAGE_LEN];
    let len = IdentityPage {
        id: DEVICE,
        name: "sensor-01",
        key: PageKey {
            d: parts.d.as_slice().try_into().unwrap(),
            p: parts.p.as_slice().try_into().unwrap(),
            q: parts.q.as_slice().try_into().unwrap(),
        },
        address: ossicle::ethernet::HOST.octets(),
        port,
        server: public(&server),
        owner: PageOwner { id: OWNER, name: "alice", key: public(&owner), bundle, signature: &signature },
        groups: GroupPolicy::Owner,
    }
    .encode(&mut page)
    .unwrap();
    page.truncate(len);
    page
}

fn settings() -> Settings {
    Settings { heartbeat: 15, timeout: 45, time: 1_790_000_000, store_epoch: [9; 8], ..Settings::default() }
}

/// The right handshake up to the device's claim.
fn recognise(server: &mut RawServer) {
    server.hear_hello();
    let mode = if server.is_offered() { 2 } else { 0 };
    server.prove(&Proof { mode, ..Proof::new(&keys::server()) }, &keys::server());
    assert!(server.hear_claim(&keys::bob().fingerprint()), "the device claims to be itself");
}

fn enter(server: &mut RawServer) -> bool {
    recognise(server);
    server.say_message(&Message::Settings(settings()));
    true
}

/// Answers until the device has published its bundle, as an honest server.
fn joins(server: &mut RawServer) {
    while let Some(payload) = server.hear() {
        match Message::decode(&payload).unwrap() {
            Message::Lookup(lookup) => {
                assert_eq!(lookup.subject, Subject::Id(DEVICE), "first of all it asks for its own bundle");
                server.say_message(&Message::LookupResponse { request: lookup.request, entry: entry(None) });
            }
            Message::Publish { bundle, .. } => {
                let published = Bundle::decode(bundle.bundle).unwrap();
                let key = keys::bob();
                assert!(ossicle::crypto::verify(key.modulus(), &published.statement(), bundle.signature));
                return;
            }
            Message::StatusResponse { .. }
            | Message::Status { .. }
            | Message::Tell(_)
            | Message::Acknowledge { .. } => {}
            other => panic!("the device says {other:?}"),
        }
    }
    panic!("the device goes before it has joined");
}

fn entry(bundle: Option<SignedBundle<'_>>) -> DirectoryEntry<'_> {
    DirectoryEntry {
        id: DEVICE,
        name: "sensor-01",
        key_epoch: 0,
        record_limit: 1024,
        status: PeerStatus::Online,
        modulus: None,
        bundle,
    }
}

/// Runs all rows, some of them at a time, each with a device of its own.
pub(crate) fn run(start: Start, at_a_time: usize) {
    crate::watch_panics();
    let wrong: Vec<&str> = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_a_time)
            .map(|worker| {
                scope.spawn(move || {
                    crate::OURS.set(true);
                    let mine = ROWS.iter().skip(worker).step_by(at_a_time);
                    mine.filter(|row| crate::acted(|| meet(row, start)).is_err())
                        .map(|row| row.name)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    println!("{} scenarios", ROWS.len());
    assert!(wrong.is_empty(), "{} of {} scenarios: {wrong:#?}", wrong.len(), ROWS.len());
}

fn meet(row: &Row, start: Start) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _device = start(page(listener.local_addr().unwrap().port()));
    let mut first = RawServer::new(listener.accept().unwrap().0);
    if (row.act)(&mut first) {
        return joins(&mut first);
    }
    first.wire.finish();
    while first.wire.record().is_some() {}
    let mut next = RawServer::new(listener.accept().unwrap().0);
    enter(&mut next);
    joins(&mut next);
}

/// A row whose server shows this proof instead of the right one: the device says nothing to it.
macro_rules! proves {
    ($name:literal, |$proof:ident| $change:expr) => {
        row($name, |server| {
            server.hear_hello();
            let mut right = Proof::new(&keys::server());
            let $proof = &mut right;
            $change;
            server.prove(&right, &keys::server());
            assert_eq!(server.wire.record(), None, "the device says who it is to the wrong server");
            false
        })
    };
}

/// A row whose server says these bytes to a hello.
macro_rules! replies {
    ($name:literal, $bytes:expr) => {
        row($name, |server| {
            server.hear_hello();
            server.wire.say(&$bytes);
            assert_eq!(server.wire.record(), None, "the device goes on with that");
            false
        })
    };
}

/// A row whose server lets the device in and then says something after which there is no going on.
macro_rules! breaks {
    ($name:literal, |$server:ident| $say:expr) => {
        row($name, |$server| {
            enter($server);
            $say;
            while $server.wire.record().is_some() {}
            false
        })
    };
}

pub(crate) const ROWS: &[Row] = &[
    proves!("a device meets another key", |proof| proof.fingerprint = keys::server3072().fingerprint()),
    proves!("a device meets a signature over another transcript", |proof| {
        proof.signature = Some(raw::sign(&keys::server(), "ossicle HS1 server auth", &[7; 32]));
    }),
    proves!("a device meets a signature of zeros", |proof| proof.signature = Some(vec![0; 256])),
    proves!("a device meets no signature", |proof| proof.signature = Some(Vec::new())),
    proves!("a device meets a resumption of nothing", |proof| proof.mode = 1),
    proves!("a device meets a key exchange of zeros", |proof| proof.exchange = Some([0; 32])),
    proves!("a device meets a suite that it did not offer", |proof| proof.chosen = [1, 0, 0, 2]),
    replies!("a device meets a web server", *b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    replies!("a device meets 64 KiB of zeros", [0; 65_536]),
    replies!("a device meets a ServerHello longer than any", clear(raw::SERVER_HELLO, &[7; 3000])),
    replies!("a device is asked for work, and does it", clear(raw::HELLO_RETRY, &[8, 1, 7])),
    replies!("a device is asked for work until the end of time", clear(raw::HELLO_RETRY, &[255, 1, 7])),
    replies!("a device is asked for work without a cookie", clear(raw::HELLO_RETRY, &[8, 0])),
    row("a device is asked for work after a hello", |server| {
        server.hear_hello();
        let (hello, _) = server.proof(&Proof::new(&keys::server()), &keys::server());
        server.wire.say(&[hello, clear(raw::HELLO_RETRY, &[8, 1, 7])].concat());
        assert_eq!(server.wire.record(), None);
        false
    }),
    row("a device meets nobody behind an open port", |_| false),
    row("a device meets half a proof", |server| {
        server.hear_hello();
        let (hello, auth) = server.proof(&Proof::new(&keys::server()), &keys::server());
        server.wire.say(&[&hello[..], &auth[..100]].concat());
        false
    }),
    row("a device is refused for a reason that there is not", |server| {
        recognise(server);
        server.refuse(99, 0);
        false
    }),
    row("a device gets half its settings", |server| {
        recognise(server);
        let settings = raw::payload(&Message::Settings(settings()));
        server.say(&settings[..settings.len() - 1]);
        assert_eq!(server.wire.record(), None);
        false
    }),
    breaks!("a device gets a record longer than it takes", |server| server.wire.say(&[1, 0, 3, 0, 0x40, 0, 0, 0])),
    breaks!("a device gets a record twice", |server| {
        let record = server.sealed(&[4, 0x10, 9]);
        server.wire.say(&[record.clone(), record].concat());
    }),
    breaks!("a device gets a key update that is not followed", |server| {
        server.say(&[8, 0x22]);
        server.say(&[4, 0x10, 9]);
    }),
    row("a device hears answers that it did not ask for", |server| {
        enter(server);
        for request in [0, 77, u16::MAX] {
            server.say_message(&Message::Done { request });
            server.say_message(&Message::Refused { request, reason: Reason::KeyChanged, retry_after: Some(1) });
        }
        let receipt = Receipt { rung: Rung::Opened, reason: None, chain: [7; 8], from: 0, to: u32::MAX, tag: None };
        server.say_message(&Message::Told(receipt));
        true
    }),
    row("a device hears codes that there are not, and nothing", |server| {
        enter(server);
        for payload in [&[][..], &[0], &[0, 0], &[0xff, 0xff, 1], &[9, 9], &[4, 0]] {
            server.say(payload);
        }
        true
    }),
    row("a device gets messages on chains that there are not", |server| {
        enter(server);
        for chain in 0..5 {
            let envelope = envelope(chain, u32::MAX, 200);
            server.say_message(&Message::Deliver { wanted: Rungs::NONE, envelope: &envelope });
        }
        true
    }),
    row("a device hears of groups that are none", |server| {
        enter(server);
        let (mut buffer, signature) = ([0; 512], [7; 64]);
        let owner = Member { id: OWNER, key: keys::alice().fingerprint() };
        let device = Member { id: DEVICE, key: keys::bob().fingerprint() };
        let lines = [owner.encode(), device.encode()].concat();
        let members = Members::new(&lines).unwrap();
        let (sid, flags, signature) = ([7; 16], GroupFlags::NONE, Fixed(&signature));
        let invite = Invite { sid, creator: OWNER, flags, signature, members, name: Fixed(&[0; 117]) };
        let invite = raw::payload(&invite.encode(&mut buffer).unwrap());
        let (state, member) = (MemberState::Accepted, OWNER);
        let changed = MemberChanged { sid, member, state, signature: Some(signature) };
        let changed = raw::payload(&changed.encode(&mut buffer).unwrap());
        let closed = Closed { sid, by: Some(OWNER), signature: Some(signature) };
        let closed = raw::payload(&closed.encode(&mut buffer).unwrap());
        let receipt = Receipt { rung: Rung::Opened, reason: None, chain: [7; 8], from: 0, to: u32::MAX, tag: None };
        let told = raw::payload(&ToldBy { from: OWNER, receipt }.encode(&mut buffer).unwrap());
        for payload in [&changed, &closed, &told, &invite, &invite, &changed, &told, &closed, &closed, &invite] {
            server.say(&payload[..payload.len() / 2]);
            server.say(&[&payload[..], &[0]].concat());
            server.say_message(&Message::Waited { seq: 1, at: 1 });
            server.say(payload);
        }
        true
    }),
    row("a device gets three hundred key updates", |server| {
        enter(server);
        for _ in 0..300 {
            server.update_key();
        }
        true
    }),
];
