//! The handshake as a client, and what follows it: `connections` says what an input is. Bit 3: the client enrols. Bit 4: it
//! asks for the server's key. Bit 5: it trusts any. Bit 6: it was asked for work, and has done it. Bit 7: it enters an account.

use crate::connections::{self, CHUNKED, COMMON, FRAMED, STUB, honest};
use crate::peers::{Options, Peer, asked};
use crate::script::Script;
use crate::{Reached, Target};

/// See the module.
pub const TARGET: Target = Target { name: "client", run, states, seeds };

const ENROL: u8 = 1 << 3;
const ASK: u8 = 1 << 4;
const TRUST: u8 = 1 << 5;
const WORKED: u8 = 1 << 6;
const LOGIN: u8 = 1 << 7;

fn states() -> Vec<&'static str> {
    let own = [
        "another server's key",
        "asked again",
        "asked for too much work",
        "asked for work",
        "handshake finished",
        "logged in",
        "nothing in common",
        "out of order",
        "refused by the server",
        "server's claim",
        "server's key",
        "truncated",
    ];
    COMMON.iter().copied().chain(own).collect()
}

fn options(bits: u8) -> Options {
    Options {
        other_way: bits & ENROL != 0,
        login: bits & LOGIN != 0,
        ask_for_key: bits & ASK != 0,
        trust: bits & TRUST != 0,
        work: bits & WORKED != 0,
        ..connections::options(bits)
    }
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    connections::run(bits, &mut script, || Peer::client(options(bits), None, 1), reached);
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let down = |bits: u8, refuse: bool| {
        let server = Options { other_way: refuse, ..connections::options(bits) };
        honest(bits & STUB != 0, || (Peer::client(options(bits), None, 1), Peer::server(server, None, 2))).1
    };
    let seed = |bits, refuse| connections::seed(bits, &down(bits, refuse));
    let with = |bits: u8, change: &dyn Fn(&mut Vec<u8>)| {
        let mut stream = down(bits, false);
        change(&mut stream);
        connections::seed(bits, &stream)
    };
    let framed = STUB | FRAMED;
    let retry = |bits: u8, zeros: u8| {
        let asked = asked(zeros);
        connections::seed(bits, &[&[1, 0, 1, 0x20, 0, 18, 0, 0][..], &asked].concat())
    };
    vec![
        ("key", seed(0, false)),
        ("key-chunked", seed(CHUNKED, false)),
        ("refused", seed(0, true)),
        ("enrolment", seed(ENROL, false)),
        ("password", seed(LOGIN, false)),
        ("password-asked-for-key", seed(LOGIN | ASK, false)),
        ("framed-password", seed(framed | LOGIN, false)),
        ("asked-for-key", seed(ASK, false)),
        ("trusted", seed(ENROL | TRUST, false)),
        ("stub-key", seed(STUB, false)),
        ("stub-trusted", seed(STUB | TRUST, false)),
        ("framed-key", seed(framed, false)),
        ("framed-enrolment", seed(framed | ENROL | ASK, false)),
        ("framed-trusted", seed(framed | ENROL | TRUST, false)),
        ("framed-refused", seed(framed, true)),
        ("worked", seed(WORKED, false)),
        ("framed-worked", seed(framed | WORKED, false)),
        ("asked", retry(0, 4)),
        ("framed-asked", retry(framed, 18)),
        ("asked-again", retry(WORKED, 4)),
        ("asked-for-too-much", retry(0, 19)),
        ("cut", with(0, &|stream| stream.truncate(stream.len() - 1))),
        ("changed", with(0, &|stream| stream[200] ^= 1)),
        ("hello-twice", with(0, &|stream| *stream = [&stream[..79], &stream[..]].concat())),
        ("resumed-unasked", with(0, &|stream| stream[8] = 1)),
        ("no-mode", with(0, &|stream| stream[8] = 9)),
        ("stub-other-key", with(STUB | ASK, &|stream| stream[79 + 8 + 16 + 100] ^= 1)),
        ("stub-other-signature", with(STUB, &|stream| stream[79 + 8 + 16 + 10] ^= 1)),
        ("framed-malformed-message", connections::with_malformed_message(&seed(framed, false))),
    ]
}
