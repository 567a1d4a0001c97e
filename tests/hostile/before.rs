//! What comes before a hello, in its place, or as a wrong one: all of it is met with silence.

use core::time::Duration;

use ossicle_tests::raw::{self, Hello, RawClient, Wire, clear};

use crate::Seen::{Answer, End};
use crate::{Ground, Scenario, Seen, scenario};

type Row = Scenario<Wire>;

/// A row that says these bytes and waits.
macro_rules! says {
    ($name:literal, $bytes:expr) => {
        scenario($name, |_, wire: &mut Wire| wire.say(&$bytes), &[End])
    };
}

/// A row that says a hello which is right but for this.
macro_rules! hello {
    ($name:literal, |$hello:ident| $change:expr) => {
        scenario(
            $name,
            |_, wire: &mut Wire| {
                let mut right = hello();
                let $hello = &mut right;
                $change;
                wire.say(&right.record());
            },
            &[End],
        )
    };
}

/// A row with a public key on which nobody can agree.
macro_rules! point {
    ($name:literal, $first:literal, $rest:literal, $last:literal) => {
        hello!($name, |hello| {
            hello.exchange = [$rest; 32];
            hello.exchange[0] = $first;
            hello.exchange[31] = $last;
        })
    };
}

fn hello() -> Hello {
    Hello::new(x25519_dalek::x25519(raw::random(), x25519_dalek::X25519_BASEPOINT_BYTES))
}

/// A hello with another header.
fn headed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut record = hello().record();
    record[at..at + bytes.len()].copy_from_slice(bytes);
    record
}

/// The first bytes of a hello, and then the end.
fn cut(wire: &mut Wire, len: usize) {
    let record = hello().record();
    wire.say(&record[..len]);
    wire.finish();
}

/// Breaks the connection off, so that the other side hears of an error and not of an end.
fn reset(wire: &Wire) {
    rustix::net::sockopt::set_socket_linger(&wire.stream, Some(Duration::ZERO)).unwrap();
}

const ORDER_8: [u8; 32] = [
    0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d,
    0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
];
const OTHER_ORDER_8: [u8; 32] = [
    0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c,
    0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
];

/// An offer of a channel that there is not.
fn offer(tag: u8, len: usize) -> Vec<u8> {
    [&[tag][..], &vec![7; len]].concat()
}

pub(crate) const FIRST: &[Row] = &[
    // It stops.
    scenario("nothing, then the end", |_, wire| wire.finish(), &[End]),
    scenario("one byte, then the end", |_, wire| cut(wire, 1), &[End]),
    scenario("half a header, then the end", |_, wire| cut(wire, 4), &[End]),
    scenario("a header, then the end", |_, wire| cut(wire, 8), &[End]),
    scenario("half a hello, then the end", |_, wire| cut(wire, 40), &[End]),
    scenario("a hello without its last byte, then the end", |_, wire| cut(wire, 83), &[End]),
    scenario(
        "a hello, then the end",
        |_, wire| {
            wire.say(&hello().record());
            wire.finish();
        },
        &[Answer, End],
    ),
    scenario(
        "a reset before the first byte",
        |_, wire| {
            reset(wire);
            wire.stream = std::net::TcpStream::connect(wire.stream.peer_addr().unwrap()).unwrap();
            wire.finish();
        },
        &[End],
    ),
    scenario(
        "a reset within a hello",
        |_, wire| {
            wire.say(&hello().record()[..50]);
            reset(wire);
            wire.stream = std::net::TcpStream::connect(wire.stream.peer_addr().unwrap()).unwrap();
            wire.finish();
        },
        &[End],
    ),
    scenario(
        "a reset behind a hello, while the server signs",
        |_, wire| {
            wire.say(&hello().record());
            reset(wire);
            wire.stream = std::net::TcpStream::connect(wire.stream.peer_addr().unwrap()).unwrap();
            wire.finish();
        },
        &[End],
    ),
    scenario(
        "three hundred connections that say nothing and go",
        |_, wire| {
            let address = wire.stream.peer_addr().unwrap();
            let crowd: Vec<_> = (0..300).map(|_| Wire::connect(address)).collect();
            drop(crowd);
            wire.finish();
        },
        &[End],
    ),
    // It speaks another language, and does not go by itself.
    says!("an HTTP request", *b"POST /messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"),
    says!("an HTTP/2 preface", *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    says!("a WebSocket upgrade", *b"GET /chat HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
    says!("a TLS ClientHello", *b"\x16\x03\x01\x00\xc5\x01\x00\x00\xc1\x03\x03\x11\x22\x33\x44\x55\x66\x77\x88"),
    says!("an SSH banner", *b"SSH-2.0-OpenSSH_9.9\r\n"),
    says!("a mail client's greeting", *b"EHLO localhost\r\n"),
    says!("line ends", *b"\r\n\r\n\r\n\r\n"),
    says!("64 KiB of zeros", [0; 65_536]),
    says!("64 KiB of ones", [0xff; 65_536]),
    says!("a hello, little endian", headed(0, &[0, 1, 0, 1, 84, 0, 0, 0])),
    // Other headers.
    says!("version 0.0", headed(0, &[0, 0])),
    says!("version 1.1", headed(0, &[1, 1])),
    says!("version 2.0", headed(0, &[2, 0])),
    says!("a ServerHello comes first", headed(2, &[1, 0x10])),
    says!("a HelloRetry comes first", clear(raw::HELLO_RETRY, &[8, 1, 7])),
    says!("a ClientAuth comes first", clear(raw::CLIENT_AUTH, &[7; 300])),
    says!("a ServerAuth comes first", clear(raw::SERVER_AUTH, &[7; 300])),
    says!("a Refusal comes first", clear(raw::REFUSAL, &[7; 21])),
    says!("an application record comes first", clear(raw::APPLICATION, &[7; 40])),
    says!("type 0", headed(2, &[0, 0])),
    says!("length 0", headed(4, &[0, 0])),
    says!("a length below that of the header", headed(4, &[0, 7])),
    says!("a hello of 257 bytes", headed(4, &[1, 1])),
    says!("a hello of 65,535 bytes", headed(4, &[0xff, 0xff])),
    says!("a hello with sequence number 1", headed(6, &[0, 1])),
    // Other fields.
    hello!("a hello that offers no version", |hello| hello.versions = vec![0]),
    hello!("a hello that offers other versions only", |hello| hello.versions = vec![2, 0, 9, 2, 0]),
    hello!("a hello that offers five versions", |hello| hello.versions = vec![5, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    hello!("a hello whose versions run past its end", |hello| hello.versions = vec![255, 1, 0]),
    hello!("a hello that offers no suite", |hello| hello.suites = vec![0]),
    hello!("a hello that offers reserved suites only", |hello| hello.suites = vec![4, 0, 2, 0, 0x11, 0, 0x21, 1, 1]),
    hello!("a hello that offers five suites", |hello| hello.suites = vec![5, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
    hello!("a record limit of 0", |hello| hello.record_limit = 0),
    hello!("a record limit of 1,023", |hello| hello.record_limit = 1023),
    hello!("the role of a server", |hello| hello.role = 1),
    hello!("a role that nobody has", |hello| hello.role = 2),
    hello!("an unknown flag", |hello| hello.flags = 2),
    hello!("all flags", |hello| hello.flags = 0xff),
    hello!("a cookie of 41 bytes", |hello| hello.cookie = [&[41][..], &[7; 49]].concat()),
    hello!("a cookie that runs past the end", |hello| hello.cookie = vec![40, 7]),
    hello!("a cookie without a puzzle", |hello| hello.cookie = vec![1, 7]),
    hello!("an offer of an unknown kind", |hello| hello.offer = offer(2, 48)),
    hello!("an offer without its last byte", |hello| hello.offer = offer(1, 47)),
    hello!("two offers", |hello| hello.offer = [offer(1, 48), offer(1, 48)].concat()),
    hello!("a byte behind the offer", |hello| hello.offer = vec![0, 0]),
    hello!("no offer and no byte that says so", |hello| hello.offer = Vec::new()),
    // Points of low order.
    point!("the point 1", 1, 0, 0),
    point!("the point p - 1", 0xec, 0xff, 0x7f),
    point!("the point p, which is 0", 0xed, 0xff, 0x7f),
    point!("the point p + 1, which is 1", 0xee, 0xff, 0x7f),
    hello!("a point of order 8", |hello| hello.exchange = ORDER_8),
    hello!("the other point of order 8", |hello| hello.exchange = OTHER_ORDER_8),
    hello!("the point 0 with its highest bit set", |hello| {
        hello.exchange = [0; 32];
        hello.exchange[31] = 0x80;
    }),
    hello!("the point 0 with an offer", |hello| {
        hello.exchange = [0; 32];
        hello.offer = offer(1, 48);
    }),
    // What looks wrong and is not.
    scenario(
        "a right hello, byte by byte",
        |_, wire| {
            for byte in hello().record() {
                wire.say(&[byte]);
                std::thread::yield_now();
            }
            wire.finish();
        },
        &[Answer, End],
    ),
    scenario(
        "a hello with more versions and suites than we know",
        |_, wire| {
            let hello = Hello {
                versions: vec![4, 9, 9, 2, 0, 1, 0, 0, 0],
                suites: vec![4, 0, 2, 0xff, 0xff, 0, 1, 0, 0],
                ..hello()
            };
            wire.say(&hello.record());
            wire.finish();
        },
        &[Answer, End],
    ),
    scenario(
        "a hello with a cookie and a puzzle that nobody asked for",
        |_, wire| {
            wire.say(&Hello { cookie: [&[40][..], &[7; 48]].concat(), ..hello() }.record());
            wire.finish();
        },
        &[Answer, End],
    ),
];

/// Says these one after the other, slowly, until it is not heard any more.
fn drip(wire: &mut Wire, bytes: &[u8]) {
    for byte in bytes {
        wire.say(&[*byte]);
        std::thread::sleep(Duration::from_millis(40));
    }
}

/// Of a server that waits for a moment only. None of these goes by itself.
pub(crate) const SLOW: &[Row] = &[
    scenario("nothing at all", |_, _| {}, &[End]),
    scenario("one byte and no more", |_, wire| wire.say(&[1]), &[End]),
    scenario("a header and no more", |_, wire| wire.say(&hello().record()[..8]), &[End]),
    scenario("a hello without its last byte and no more", |_, wire| wire.say(&hello().record()[..83]), &[End]),
    scenario("a hello, a byte at a time and too slowly", |_, wire| drip(wire, &hello().record()[..40]), &[End]),
    scenario("a hello and no more", |_, wire| wire.say(&hello().record()), &[Answer, End]),
    scenario(
        "a hello and half a ClientAuth",
        |_, wire| wire.say(&[hello().record(), clear(raw::CLIENT_AUTH, &[7; 300])[..100].to_vec()].concat()),
        &[Answer, End],
    ),
    scenario(
        "a hello, and a ClientAuth a byte at a time and too slowly",
        |_, wire| {
            wire.say(&hello().record());
            drip(wire, &clear(raw::CLIENT_AUTH, &[7; 300])[..80]);
        },
        &[Answer, End],
    ),
];

/// What a peer hears that has said what it had to say.
pub(crate) fn look(_: &Ground, mut wire: Wire) -> Vec<Seen> {
    let heard = wire.rest();
    let mut seen = Vec::new();
    if !heard.is_empty() {
        assert_eq!((heard.len(), &heard[..4]), (79 + 328, &[1, 0, 1, 0x10][..]), "a ServerHello and a ServerAuth");
        seen.push(Answer);
    }
    seen.push(End);
    seen
}

/// A client that has greeted.
pub(crate) fn greeted(ground: &Ground, client: &mut RawClient) {
    client.greet(&ground.server);
}
