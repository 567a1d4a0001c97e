//! One end of a connection against a stream of bytes: what the targets `server`, `client` and `resumption` share.
//!
//! An input is a byte of options and the stream that the hostile peer sends. Bit 0: cryptography is the stub. Bit 1, with
//! the stub: the stream is a list of records without their headers and tags (a byte for the kind, a length of two bytes, the
//! payload), which are put around them, so that a mutation changes what a record says and not whether it is one. Bit 2:
//! records come in as few bytes as the engine asks for. Bits 3 to 7 are those of each target.

use ossicle_core::fuzzing::STUB_TAG;
use ossicle_core::{HEADER_LEN, Message, Reason, Rungs, TAG_LEN};

use crate::Reached;
use crate::peers::{Options, Peer, converse};
use crate::script::{Script, Stub, long};

/// Cryptography is the stub.
pub const STUB: u8 = 1;
/// Headers and tags are put around payloads.
pub const FRAMED: u8 = 1 << 1;
/// Records come in as few bytes as the engine asks for.
pub const CHUNKED: u8 = 1 << 2;

const APPLICATION: u16 = 0x0300;
/// Every kind of record, and whether it is sealed.
const KINDS: [(u16, bool); 7] = [
    (0x0100, false),
    (0x0110, false),
    (0x0200, true),
    (0x0210, true),
    (0x0220, true),
    (APPLICATION, true),
    (0x0120, false),
];

/// What every target of this kind can come to.
pub const COMMON: &[&str] = &["closed", "key updated", "malformed", "message", "message that is none", "not authentic"];

/// What these options mean for both ends.
pub fn options(bits: u8) -> Options {
    Options { stub: bits & STUB != 0, chunked: bits & CHUNKED != 0, ..Options::default() }
}

/// Feeds the stream of this script to the end that `peer` makes, and lets that end do what it still can.
pub fn run(bits: u8, script: &mut Script<'_>, peer: impl FnOnce() -> Peer, reached: Reached<'_>) {
    let _stub = Stub::set(bits & STUB != 0);
    let mut peer = peer();
    if bits & STUB != 0 && bits & FRAMED != 0 {
        peer.feed(&framed(script), reached);
    } else {
        peer.feed(script.rest(), reached);
    }
    if peer.was_connected && peer.failure.is_none() {
        assert!(peer.send(&Message::Status { request: 1 }).is_some(), "this side has not closed");
        peer.update_key();
        assert!(peer.close());
        assert!(peer.send(&Message::Listening).is_none(), "nothing follows a close");
    }
    peer.end(reached);
}

/// The stream of records that these payloads make.
pub fn framed(script: &mut Script<'_>) -> Vec<u8> {
    let (mut stream, mut counter) = (Vec::new(), 0_u16);
    while let (Some(kind), Some(payload)) = (script.u8(), script.long()) {
        let (code, is_sealed) = KINDS[usize::from(kind) % KINDS.len()];
        let tag: &[u8] = if is_sealed { &STUB_TAG } else { &[] };
        let Ok(len) = u16::try_from(HEADER_LEN + payload.len() + tag.len()) else { break };
        let sequence = match code {
            APPLICATION => counter,
            0x0220 => 1,
            _ => 0,
        };
        if code == APPLICATION {
            counter = if payload.starts_with(&[0x08, 0x22]) { 0 } else { counter.wrapping_add(1) };
        }
        stream.extend([1, 0]);
        stream.extend([code, len, sequence].iter().flat_map(|field| field.to_be_bytes()));
        stream.extend_from_slice(payload);
        stream.extend_from_slice(tag);
    }
    stream
}

/// The script of a stream: what [`framed`] makes the stream of.
pub fn unframed(stream: &[u8]) -> Vec<u8> {
    let (mut script, mut rest) = (Vec::new(), stream);
    while let Some(header) = rest.first_chunk::<HEADER_LEN>() {
        let [_, _, t1, t0, l1, l0, ..] = *header;
        let (record, behind) = rest.split_at(u16::from_be_bytes([l1, l0]).into());
        let kind = KINDS.iter().position(|(code, _)| *code == u16::from_be_bytes([t1, t0])).expect("a record of ours");
        let end = record.len() - if KINDS[kind].1 { TAG_LEN } else { 0 };
        script.push(u8::try_from(kind).expect("seven kinds"));
        script.extend(long(&record[HEADER_LEN..end]));
        rest = behind;
    }
    script
}

/// Runs an honest client and an honest server against each other, with a few messages each way, a key update and a close,
/// and returns what went up and down.
pub fn honest(is_stub: bool, ends: impl FnOnce() -> (Peer, Peer)) -> (Vec<u8>, Vec<u8>) {
    let _stub = Stub::set(is_stub);
    let (mut client, mut server) = ends();
    let (mut up, mut down) = converse(&mut client, &mut server);
    for peer in [&mut client, &mut server] {
        peer.send(&Message::Status { request: 1 });
        peer.update_key();
        peer.send(&Message::Send { wanted: Rungs::NONE, envelope: &[7; 49] });
        peer.send(&Message::Refused { request: 2, reason: Reason::Rate, retry_after: Some(1000) });
        peer.close();
    }
    let (more_up, more_down) = converse(&mut client, &mut server);
    up.extend(more_up);
    down.extend(more_down);
    (up, down)
}

/// The seed of these options and this stream.
pub fn seed(bits: u8, stream: &[u8]) -> Vec<u8> {
    let is_framed = bits & (STUB | FRAMED) == STUB | FRAMED;
    let rest = if is_framed { unframed(stream) } else { stream.to_vec() };
    [&[bits], &rest[..]].concat()
}

/// The same framed seed with a payload before its close that is no message.
pub fn with_malformed_message(seed: &[u8]) -> Vec<u8> {
    // The close: a kind, a length of two bytes, a code of two bytes, a reason of two.
    let (before, close) = seed.split_at(seed.len() - 7);
    [before, &[5, 0, 2, 4, 0], close].concat()
}
