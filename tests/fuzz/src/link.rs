//! Two honest parties over a hostile link: a client and a server, and between them somebody who holds back, changes,
//! repeats, swaps, cuts, reflects and makes up, record by record.
//!
//! An input is a byte of options and a script: a byte a step, with its operands. Bit 0: cryptography is the stub. Bit 1: the
//! client asks for the server's key. Bit 2: one end gets records in as few bytes as it asks for. Bit 3: the client enrols.
//! With real cryptography what arrives is what was sent, in its order and without a hole, or the connection ends.

use ossicle_core::{Channel, Message, Rungs};

use crate::peers::{Options, Peer};
use crate::script::{Script, Stub, long};
use crate::{Reached, Target};

/// See the module.
pub const TARGET: Target = Target { name: "link", run, states, seeds };

const STUB: u8 = 1;
const ASK: u8 = 1 << 1;
const CHUNKED: u8 = 1 << 2;
const ENROL: u8 = 1 << 3;
/// Connections that one script may begin.
const MAX_CONNECTIONS: u8 = 6;
/// And its steps.
const MAX_STEPS: usize = 128;

fn states() -> Vec<&'static str> {
    vec![
        "both connected",
        "both resumed",
        "bytes held back",
        "claim by enrolment",
        "claim by key",
        "client returned",
        "closed",
        "handshake finished",
        "key updated",
        "malformed",
        "message",
        "not authentic",
        "offer declined",
        "offer taken",
        "out of order",
        "record changed",
        "record dropped",
        "record made up",
        "record reflected",
        "record repeated",
        "records swapped",
        "resumption finished",
        "server signs",
        "server's claim",
        "server's key",
        "token proved",
        "truncated",
    ]
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let _stub = Stub::set(bits & STUB != 0);
    let mut link = Link::new(bits, None, None, 0);
    for _ in 0..MAX_STEPS {
        if link.step(&mut script, reached).is_none() {
            break;
        }
        link.check(reached);
    }
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What is under way, cut into records.
    records: Vec<Vec<u8>>,
    /// The payloads that were sent.
    sent: Vec<Vec<u8>>,
    /// The sender has closed.
    closed: bool,
}

struct Link {
    bits: u8,
    client: Peer,
    server: Peer,
    up: Way,
    down: Way,
    /// How many connections there were.
    number: u8,
    /// What each side kept of them.
    kept: Option<Channel>,
    held: Option<Channel>,
}

impl Link {
    fn new(bits: u8, kept: Option<Channel>, held: Option<Channel>, number: u8) -> Self {
        let options = Options { stub: bits & STUB != 0, ..Options::default() };
        let of_client = Options { ask_for_key: bits & ASK != 0, other_way: bits & ENROL != 0, ..options };
        let of_server = Options { chunked: bits & CHUNKED != 0, ..options };
        let client = Peer::client(of_client, kept.clone(), 2 * number + 1);
        let server = Peer::server(of_server, held.clone(), 2 * number + 2);
        let mut link = Self { bits, client, server, up: Way::default(), down: Way::default(), number, kept, held };
        link.collect();
        link
    }

    fn step(&mut self, script: &mut Script<'_>, reached: Reached<'_>) -> Option<()> {
        let op = script.u8()?;
        // Upwards or downwards.
        let is_up = op & 0x80 == 0;
        let (way, other) = if is_up { (&mut self.up, &self.down) } else { (&mut self.down, &self.up) };
        match op & 0x7f {
            // Everything that is under way arrives, both ways, until nothing is.
            0 => {
                for _ in 0..8 {
                    self.deliver(true, usize::MAX, reached);
                    self.deliver(false, usize::MAX, reached);
                }
            }
            1 => self.deliver(is_up, 1, reached),
            // A record arrives up to some byte, and what is left comes next.
            2 => {
                let at = usize::from(script.u16()?);
                if way.records.is_empty() {
                    return Some(());
                }
                let mut first = way.records.remove(0);
                let rest = first.split_off(at.min(first.len()));
                way.records.insert(0, rest);
                let peer = if is_up { &mut self.server } else { &mut self.client };
                peer.feed(&first, reached);
                reached("bytes held back");
            }
            3 => {
                let (index, bit) = (usize::from(script.u8()?), usize::from(script.u16()?));
                let record = way.records.get_mut(index)?;
                if !record.is_empty() {
                    let bit = bit % (record.len() * 8);
                    record[bit / 8] ^= 1 << (bit % 8);
                    reached("record changed");
                }
            }
            4 => {
                let index = usize::from(script.u8()?);
                if index < way.records.len() {
                    way.records.remove(index);
                    reached("record dropped");
                }
            }
            5 => {
                let index = usize::from(script.u8()?);
                let record = way.records.get(index)?.clone();
                way.records.insert(index, record);
                reached("record repeated");
            }
            6 => {
                let (a, b) = (usize::from(script.u8()?), usize::from(script.u8()?));
                if a != b && a.max(b) < way.records.len() {
                    way.records.swap(a, b);
                    reached("records swapped");
                }
            }
            7 => {
                let (index, bytes) = (usize::from(script.u8()?), script.long()?);
                way.records.insert(index.min(way.records.len()), bytes.to_vec());
                reached("record made up");
            }
            8 => {
                let record = other.records.get(usize::from(script.u8()?))?.clone();
                way.records.insert(0, record);
                reached("record reflected");
            }
            // The honest ends do something.
            9 => {
                let envelope = script.long()?;
                let peer = if is_up { &mut self.client } else { &mut self.server };
                let sent = peer
                    .send(&Message::Send { wanted: Rungs::NONE, envelope: envelope.get(..1024).unwrap_or(envelope) });
                let way = if is_up { &mut self.up } else { &mut self.down };
                way.sent.extend(sent);
            }
            10 => (if is_up { &mut self.client } else { &mut self.server }).update_key(),
            11 => {
                let closed = (if is_up { &mut self.client } else { &mut self.server }).close();
                let way = if is_up { &mut self.up } else { &mut self.down };
                way.closed |= closed;
            }
            // The transport ends, for both, and the client comes again: with what it kept, or as if it had nothing.
            12 | 13 => {
                self.client.end(reached);
                self.server.end(reached);
                self.check(reached);
                let number = self.number + 1;
                if number == MAX_CONNECTIONS {
                    return None;
                }
                let keeps = op & 0x7f == 12;
                let kept = self.client.issued.take().or(self.kept.take()).filter(|_| keeps);
                let held = self.server.issued.take().or(self.held.take());
                *self = Self::new(self.bits, kept, held, number);
            }
            _ => return None,
        }
        self.collect();
        Some(())
    }

    fn deliver(&mut self, is_up: bool, count: usize, reached: Reached<'_>) {
        let (way, peer) = if is_up { (&mut self.up, &mut self.server) } else { (&mut self.down, &mut self.client) };
        let count = count.min(way.records.len());
        for record in way.records.drain(..count) {
            peer.feed(&record, reached);
        }
        self.collect();
    }

    /// Takes what the ends wrote, and cuts it into records.
    fn collect(&mut self) {
        for (way, peer) in [(&mut self.up, &mut self.client), (&mut self.down, &mut self.server)] {
            let mut bytes = core::mem::take(&mut peer.tx);
            while let [_, _, _, _, l1, l0, ..] = *bytes {
                let rest = bytes.split_off(usize::from(u16::from_be_bytes([l1, l0])));
                way.records.push(bytes);
                bytes = rest;
            }
            assert!(bytes.is_empty(), "ends write whole records");
        }
    }

    /// What holds at all times.
    fn check(&mut self, reached: Reached<'_>) {
        let (client, server) = (&self.client, &self.server);
        if self.bits & STUB != 0 {
            return;
        }
        for (way, receiver) in [(&self.up, server), (&self.down, client)] {
            assert!(way.sent.starts_with(&receiver.received), "what arrives is what was sent, from the first on");
            if receiver.closed {
                assert!(way.closed, "nobody else can close");
                assert_eq!(way.sent.len(), receiver.received.len(), "a close comes behind all that was sent");
            }
        }
        assert!(!client.was_connected || server.was_connected, "the server finishes first");
        if let (Ok(of_client), Ok(of_server)) = (client.connection.exporter(), server.connection.exporter()) {
            assert_eq!(of_client.expose(), of_server.expose(), "one connection");
            assert_eq!(client.connection.is_resumed(), server.connection.is_resumed());
            reached("both connected");
            if client.connection.is_resumed() {
                reached("both resumed");
            }
            if let (Some(kept), Some(held)) = (&client.issued, &server.issued) {
                assert_eq!((kept.id, kept.secret.expose()), (held.id, held.secret.expose()), "one channel");
            }
        }
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let script = |bits: u8, steps: &[&[u8]]| [&[bits][..], &steps.concat()].concat();
    let all: &[u8] = &[0];
    let say = |is_up: bool, text: &[u8]| [&[if is_up { 9 } else { 0x89 }][..], &long(text)].concat();
    let (up, down) = (say(true, b"21.50C led=0"), say(false, b"led=1"));
    let (again, anew): (&[u8], &[u8]) = (&[12], &[13]);
    let (update_up, update_down, close_up, close_down): (&[u8], &[u8], &[u8], &[u8]) = (&[10], &[0x8a], &[11], &[0x8b]);

    let honest: &[&[u8]] = &[
        all,
        &up,
        &down,
        all,
        update_up,
        update_down,
        &up,
        &down,
        all,
        close_up,
        close_down,
        all,
        again,
        all,
        &up,
        all,
    ];
    let handshake_only: &[&[u8]] = &[&[1], &[0x81], &[0x81], &[1], &[0x81], &up, &[1]];
    let changed: &[&[u8]] = &[all, &up, &up, &[3, 1, 0, 99], all, again, all, &down, &[0x83, 0, 1, 0], all];
    let changed_hello: &[&[u8]] = &[&[3, 0, 1, 0], all, again, &[3, 0, 0, 33], all];
    let order: &[&[u8]] = &[
        all,
        &up,
        &up,
        &up,
        &[6, 0, 2],
        all,
        anew,
        all,
        &up,
        &[5, 0],
        all,
        anew,
        all,
        &down,
        &down,
        &[0x84, 0],
        all,
        anew,
        all,
        &up,
        &down,
        &[8, 0],
        all,
    ];
    let pieces: &[&[u8]] =
        &[&[2, 0, 3], &[2, 0, 20], all, &up, &[2, 0, 9], &[2, 0, 0], all, close_up, all, &[2, 0, 1], again, all];
    let cut: &[&[u8]] = &[all, &up, again, &[1], again, &[1], &[0x81], again, all, anew, all];
    let made_up = [&[7, 0][..], &long(&[1, 0, 3, 0, 0, 30, 0, 0, 1, 2, 3, 4])].concat();
    let forged: &[&[u8]] = &[&made_up, all, again, all, &made_up, all];
    let lost: &[&[u8]] = &[all, again, &[1], &[0x81], &[0x81], &[1], &[0x84, 0], again, all, &up, &down, all];
    vec![
        ("honest", script(0, honest)),
        ("honest-chunked", script(CHUNKED, honest)),
        ("honest-enrolment", script(ENROL | ASK, honest)),
        ("step-by-step", script(0, handshake_only)),
        ("changed", script(0, changed)),
        ("changed-hello", script(0, changed_hello)),
        ("order", script(0, order)),
        ("pieces", script(CHUNKED, pieces)),
        ("cut", script(0, cut)),
        ("forged", script(0, forged)),
        ("lost-settings", script(0, lost)),
        ("stub-honest", script(STUB, honest)),
        ("stub-order", script(STUB, order)),
        ("stub-forged", script(STUB, forged)),
    ]
}
