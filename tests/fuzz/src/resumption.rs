//! Resumption on both sides: `connections` says what an input is. Bit 3: the server refuses, or the client would enrol if it
//! came to a full handshake. Bit 4: the server is busy, and strangers have to work. Bit 6: the server holds another secret
//! under the channel's id. Bit 7: the end under test is the client, which offers the channel.

use ossicle_core::{Channel, Secret};

use crate::connections::{self, CHUNKED, COMMON, FRAMED, STUB, honest};
use crate::peers::{Options, Peer, asked, channel};
use crate::script::Script;
use crate::{Reached, Target};

/// See the module.
pub const TARGET: Target = Target { name: "resumption", run, states, seeds };

const OTHER_WAY: u8 = 1 << 3;
const BUSY: u8 = 1 << 4;
const OTHER_SECRET: u8 = 1 << 6;
const CLIENT: u8 = 1 << 7;

fn states() -> Vec<&'static str> {
    let own = [
        "asked for work",
        "claim by enrolment",
        "claim by key",
        "client returned",
        "handshake finished",
        "nothing in common",
        "offer declined",
        "offer taken",
        "out of order",
        "refused",
        "refused by the server",
        "resumption finished",
        "server signs",
        "server's claim",
        "token proved",
        "truncated",
        "work asked for",
    ];
    COMMON.iter().copied().chain(own).collect()
}

fn held(bits: u8) -> Channel {
    match bits & OTHER_SECRET {
        0 => channel(),
        _ => Channel { secret: Secret::new([0x78; 32]), ..channel() },
    }
}

fn options(bits: u8) -> Options {
    Options { other_way: bits & OTHER_WAY != 0, ..connections::options(bits) }
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let peer = || match bits & CLIENT {
        0 => Peer::server(Options { work: bits & BUSY != 0, ..options(bits) }, Some(held(bits)), 2),
        _ => Peer::client(options(bits), Some(channel()), 1),
    };
    connections::run(bits, &mut script, peer, reached);
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let streams = |bits: u8, held: Option<Channel>, enrol: bool, refuse: bool| {
        let (client, server) =
            (Options { other_way: enrol, ..options(bits) }, Options { other_way: refuse, ..options(bits) });
        let ends = || (Peer::client(client, Some(channel()), 1), Peer::server(server, held, 2));
        let (up, down) = honest(bits & STUB != 0, ends);
        if bits & CLIENT == 0 { up } else { down }
    };
    let resumed = |bits| connections::seed(bits, &streams(bits, Some(channel()), false, false));
    let refused = |bits| connections::seed(bits, &streams(bits, Some(channel()), false, true));
    let declined = |bits, enrol| connections::seed(bits, &streams(bits, Some(held(bits | OTHER_SECRET)), enrol, false));
    let with = |bits: u8, change: &dyn Fn(&mut Vec<u8>)| {
        let mut stream = streams(bits, Some(channel()), false, false);
        change(&mut stream);
        connections::seed(bits, &stream)
    };
    let framed = STUB | FRAMED;
    vec![
        ("server", resumed(0)),
        ("server-chunked", resumed(CHUNKED)),
        ("server-refuses", refused(OTHER_WAY)),
        ("server-declines", declined(OTHER_SECRET, false)),
        ("server-declines-enrolment", declined(OTHER_SECRET, true)),
        ("server-stub", resumed(STUB)),
        ("server-framed", resumed(framed)),
        ("server-framed-refuses", refused(framed | OTHER_WAY)),
        ("client", resumed(CLIENT)),
        ("client-chunked", resumed(CLIENT | CHUNKED)),
        ("client-refused", refused(CLIENT)),
        ("client-declined", declined(CLIENT, false)),
        ("client-stub", resumed(CLIENT | STUB)),
        ("client-framed", resumed(CLIENT | framed)),
        ("client-framed-refused", refused(CLIENT | framed)),
        ("server-framed-malformed-message", connections::with_malformed_message(&resumed(framed))),
        ("server-busy", [&[BUSY], &resumed(0)[1..]].concat()),
        ("server-busy-declines", [&[BUSY | OTHER_SECRET], &resumed(0)[1..]].concat()),
        ("client-asked", connections::seed(CLIENT, &[&[1, 0, 1, 0x20, 0, 18, 0, 0][..], &asked(4)].concat())),
        ("server-cut", with(0, &|stream| stream.truncate(stream.len() - 1))),
        ("server-other-finished", with(0, &|stream| stream[84 + 48 + 20] ^= 1)),
        ("server-twice", with(0, &|stream| *stream = [&stream[..], &stream[..]].concat())),
        ("server-hello-twice", with(0, &|stream| *stream = [&stream[..132], &stream[..]].concat())),
        ("server-no-offer", with(0, &|stream| stream[83] = 9)),
        ("server-other-version", with(0, &|stream| stream[9] = 2)),
        ("client-full-unasked", with(CLIENT, &|stream| stream[8] = 0)),
        ("client-other-finished", with(CLIENT, &|stream| stream[79 + 20] ^= 1)),
    ]
}
