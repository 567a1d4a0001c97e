//! The handshake as a server, and what follows it: `connections` says what an input is. Bit 3: the server refuses whoever
//! comes. Bit 4: it is busy, and strangers have to work.

use crate::connections::{self, CHUNKED, COMMON, FRAMED, STUB, honest};
use crate::peers::{Options, Peer};
use crate::script::Script;
use crate::{Reached, Target};

/// See the module.
pub const TARGET: Target = Target { name: "server", run, states, seeds };

const REFUSE: u8 = 1 << 3;
const BUSY: u8 = 1 << 4;

fn states() -> Vec<&'static str> {
    let own = [
        "claim by enrolment",
        "claim by key",
        "claim by password",
        "claim not proved",
        "handshake finished",
        "nothing in common",
        "offer declined",
        "out of order",
        "refused",
        "server signs",
        "token proved",
        "truncated",
        "work asked for",
        "work taken",
    ];
    COMMON.iter().copied().chain(own).collect()
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let options = Options { other_way: bits & REFUSE != 0, work: bits & BUSY != 0, ..connections::options(bits) };
    connections::run(bits, &mut script, || Peer::server(options, None, 2), reached);
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let up = |bits: u8, enrol: bool, offer: bool| {
        let options = Options { other_way: enrol, work: bits & BUSY != 0, ..connections::options(bits) };
        let server = Options { other_way: bits & REFUSE != 0, ..options };
        let channel = || offer.then(crate::peers::channel);
        let ends = || (Peer::client(options, channel(), 1), Peer::server(server, None, 2));
        honest(bits & STUB != 0, ends).0
    };
    let login = |bits: u8| {
        let options = Options { login: true, ..connections::options(bits) };
        let ends = || (Peer::client(options, None, 1), Peer::server(connections::options(bits), None, 2));
        connections::seed(bits, &honest(bits & STUB != 0, ends).0)
    };
    let seed = |bits, enrol, offer| connections::seed(bits, &up(bits, enrol, offer));
    let with = |bits: u8, change: &dyn Fn(&mut Vec<u8>)| {
        let mut stream = up(bits, false, false);
        change(&mut stream);
        connections::seed(bits, &stream)
    };
    let framed = STUB | FRAMED;
    vec![
        ("key", seed(0, false, false)),
        ("key-chunked", seed(CHUNKED, false, false)),
        ("key-refused", seed(REFUSE, false, false)),
        ("enrolment", seed(0, true, false)),
        ("password", login(0)),
        ("stub-password", login(STUB)),
        ("framed-password", login(framed)),
        ("channel-unknown", seed(0, false, true)),
        ("stub-key", seed(STUB, false, false)),
        ("stub-enrolment", seed(STUB, true, false)),
        ("framed-key", seed(framed, false, false)),
        ("framed-enrolment", seed(framed, true, false)),
        ("framed-enrolment-refused", seed(framed | REFUSE, true, false)),
        ("framed-channel-unknown", seed(framed, false, true)),
        ("busy-worked", seed(BUSY, false, false)),
        ("busy-worked-enrolment", seed(BUSY, true, false)),
        ("busy-channel-unknown", seed(BUSY, false, true)),
        ("framed-busy-worked", seed(framed | BUSY, false, false)),
        ("busy-stranger", [&[BUSY], &seed(0, false, false)[1..]].concat()),
        ("framed-busy-stranger", [&[framed | BUSY], &seed(framed, false, false)[1..]].concat()),
        ("cut", with(0, &|stream| stream.truncate(stream.len() - 1))),
        ("changed", with(0, &|stream| *stream.last_mut().expect("a stream") ^= 1)),
        ("twice", with(0, &|stream| *stream = [&stream[..], &stream[..]].concat())),
        ("hello-twice", with(0, &|stream| *stream = [&stream[..84], &stream[..]].concat())),
        // Version 2.0, and only that, behind the header and the length of the list.
        ("other-version", with(0, &|stream| stream[9] = 2)),
        ("no-version", with(0, &|stream| stream[8] = 0)),
        // The id that is claimed, behind the header of ClientAuth and the kind.
        ("stub-unknown-id", with(STUB, &|stream| stream[84 + 8] = 9)),
        ("stub-other-signature", with(STUB, &|stream| stream[84 + 8 + 40] ^= 1)),
        ("framed-malformed-message", connections::with_malformed_message(&seed(framed, false, false))),
    ]
}
