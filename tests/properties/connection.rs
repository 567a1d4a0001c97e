//! Two honest ends, and between them somebody who cuts, holds back, changes, drops, repeats, swaps, reflects and makes up.
//!
//! The model keeps of each direction the records as they were sealed, and reads what arrives by PROTOCOL 2.4 with nothing
//! but these: header, length, number, and then whether the bytes are those of the record that is due. So it knows the one
//! right answer to every call, the refusals of the caller's mistakes included.

use std::collections::VecDeque;

use ossicle_core::{
    ApiMisuse, BufferError, Channel, ClientConfig, Connection, Error, Event, HEADER_LEN, Message, PeerError,
    RECORD_OVERHEAD, Reason, Received, Rungs, Secret, ServerConfig,
};
use ossicle_tests::{CLIENT_ID, SERVER_ID, seed, settings};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::Reached;

/// Which end does something, or to which end something happens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Client,
    Server,
}

/// A number that is chosen where its bounds are known.
#[derive(Clone, Debug)]
enum Size {
    /// This many.
    Of(usize),
    /// Around the most, or the least, that does it.
    About(isize),
    /// More than enough.
    Ample,
}

impl Size {
    fn around(&self, edge: usize, ample: usize) -> usize {
        match *self {
            Self::Of(size) => size,
            Self::About(delta) => edge.saturating_add_signed(delta),
            Self::Ample => ample,
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Sends an envelope of that length, into a buffer with that room; or has it sealed where the record will stand.
    Send(Side, Size, Size),
    SendSealed(Side, Size, Size, bool),
    UpdateKey(Side, Size),
    Close(Side, Option<Reason>, Size),
    Transmit(Side),
    /// Up to so many bytes come to this side, in records or not.
    Deliver(Side, usize),
    DeliverAll(Side),
    /// The stream to this side ends.
    End(Side),
    Change(Side, Index, u8),
    Drop(Side, Index),
    Repeat(Side, Index),
    Swap(Side, Index, Index),
    Reflect(Side, Index),
    MakeUp(Side, Index, Vec<u8>),
    /// Only the header is honest: of the record that is due, with another length.
    MakeUpLength(Side, u16),
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Client), Just(Side::Server)]
}

fn len() -> impl Strategy<Value = Size> {
    prop_oneof![8 => (0_usize..200).prop_map(Size::Of), 1 => (-2_isize..3).prop_map(Size::About)]
}

fn room() -> impl Strategy<Value = Size> {
    prop_oneof![
        12 => Just(Size::Ample),
        1 => (-3_isize..3).prop_map(Size::About),
        1 => (0_usize..64).prop_map(Size::Of),
    ]
}

fn honest() -> impl Strategy<Value = Step> {
    let reason = prop_oneof![Just(None), Just(Some(Reason::TakenOver)), Just(Some(Reason::Unavailable))];
    prop_oneof![
        24 => (side(), len(), room()).prop_map(|(side, len, room)| Step::Send(side, len, room)),
        8 => (side(), len(), room(), prop::bool::weighted(0.2))
            .prop_map(|(side, len, room, fails)| Step::SendSealed(side, len, room, fails)),
        6 => (side(), room()).prop_map(|(side, room)| Step::UpdateKey(side, room)),
        1 => (side(), reason, room()).prop_map(|(side, reason, room)| Step::Close(side, reason, room)),
        2 => side().prop_map(Step::Transmit),
        16 => (side(), 0_usize..400).prop_map(|(side, bytes)| Step::Deliver(side, bytes)),
        8 => side().prop_map(Step::DeliverAll),
    ]
}

fn hostile() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    prop_oneof![
        (side(), index(), 0_u8..8).prop_map(|(side, at, bit)| Step::Change(side, at, bit)),
        (side(), index()).prop_map(|(side, which)| Step::Drop(side, which)),
        (side(), index()).prop_map(|(side, which)| Step::Repeat(side, which)),
        (side(), index(), index()).prop_map(|(side, a, b)| Step::Swap(side, a, b)),
        (side(), index()).prop_map(|(side, which)| Step::Reflect(side, which)),
        (side(), index(), vec(any::<u8>(), 1..40)).prop_map(|(side, at, bytes)| Step::MakeUp(side, at, bytes)),
        (side(), any::<u16>()).prop_map(|(side, len)| Step::MakeUpLength(side, len)),
        side().prop_map(Step::End),
    ]
}

/// The record limits of client and server, and what happens: first what is honest, then with one hostile step in ten.
fn sequences() -> impl Strategy<Value = ((u16, u16), Vec<Step>)> {
    let limit = || prop_oneof![Just(1024_u16), Just(16_408), 1024_u16..16_408];
    let steps = (vec(honest(), 0..40), vec(prop_oneof![9 => honest(), 1 => hostile()], 0..40));
    ((limit(), limit()), steps.prop_map(|(honest, all)| [honest, all].concat()))
}

/// What a record means, if it is the one that is due.
#[derive(Clone, Debug, PartialEq)]
enum Meaning {
    Payload(Vec<u8>),
    KeyUpdate,
    Close(Option<Reason>),
}

/// What a receiver must say.
#[derive(Debug, PartialEq)]
enum Answer {
    Need(usize),
    Wait,
    Opened(usize, Meaning),
    Failed(Error),
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What is under way: each a record, unless somebody was at it.
    wire: VecDeque<Vec<u8>>,
    /// What the receiver has and did not open yet.
    buffer: Vec<u8>,
    /// What was sealed and not opened yet.
    due: VecDeque<(Vec<u8>, Meaning)>,
    /// Records that the receiver has opened under the present key.
    counter: u64,
    /// Bytes of the longest record that the receiver takes.
    limit: usize,
    /// The sender has closed; the receiver knows.
    closed: bool,
    close_came: bool,
    sent: Vec<Vec<u8>>,
    arrived: Vec<Vec<u8>>,
}

impl Way {
    fn max_payload(&self) -> usize {
        self.limit - RECORD_OVERHEAD
    }

    /// PROTOCOL 2.4.
    fn answer(&self) -> Answer {
        let failed = |error: PeerError| Answer::Failed(error.into());
        if self.close_came {
            return Answer::Wait;
        }
        let Some([v1, v0, t1, t0, l1, l0, s1, s0]) = self.buffer.first_chunk() else {
            return Answer::Need(HEADER_LEN);
        };
        let len = usize::from(u16::from_be_bytes([*l1, *l0]));
        let types = [[1, 0], [1, 0x10], [2, 0], [2, 0x10], [2, 0x20], [3, 0]];
        if [*v1, *v0] != [1, 0] || !types.contains(&[*t1, *t0]) || len < HEADER_LEN {
            return Answer::Failed(Error::Decode);
        }
        if [*t1, *t0] != [3, 0] {
            return failed(PeerError::UnexpectedMessage);
        }
        if len < RECORD_OVERHEAD || len > self.limit {
            return Answer::Failed(Error::Decode);
        }
        let Some(record) = self.buffer.get(..len) else {
            return Answer::Need(len);
        };
        if u64::from(u16::from_be_bytes([*s1, *s0])) != self.counter % 65_536 {
            return failed(PeerError::UnexpectedMessage);
        }
        match self.due.front() {
            Some((sealed, meaning)) if sealed == record => Answer::Opened(len, meaning.clone()),
            _ => Answer::Failed(Error::Crypto),
        }
    }
}

struct World<'r> {
    ends: [Connection; 2],
    /// Why an end gave up.
    failures: [Option<Error>; 2],
    /// By receiver.
    ways: [Way; 2],
    reached: &'r Reached,
}

/// The one that is not this one.
const fn other(side: Side) -> Side {
    match side {
        Side::Client => Side::Server,
        Side::Server => Side::Client,
    }
}

/// An end that is connected by resumption, which costs no RSA.
fn connected(limits: (u16, u16)) -> [Connection; 2] {
    let server_key = [0x11; 32];
    let channel = Channel {
        id: [0xcc; 16],
        secret: Secret::new([0x77; 32]),
        client: CLIENT_ID,
        client_key: [0x22; 32],
        key_epoch: 0,
        server: SERVER_ID,
        server_key,
    };
    let config = ClientConfig { server: Some(server_key), ask_for_key: false, record_limit: limits.0 };
    let mut client = Connection::resume(config, channel.clone(), &seed(1)).unwrap();
    let config = ServerConfig { id: SERVER_ID, fingerprint: server_key, record_limit: limits.1 };
    let mut server: Connection = Connection::server(config, &seed(2));
    let mut out = [0; 512];
    let len = client.transmit(&mut out).unwrap();
    assert!(matches!(server.receive(&mut out[..len]), Ok(Received::Record { event: Event::CheckChannel(_), .. })));
    let len = server.answer_offer(Some(&channel), &mut out).unwrap();
    let Ok(Received::Record { used, .. }) = client.receive(&mut out[..len]) else { panic!("a hello") };
    client.receive(&mut out[used..len]).ok().unwrap();
    let len = client.transmit(&mut out).unwrap();
    assert!(matches!(server.receive(&mut out[..len]), Ok(Received::Record { event: Event::Resumed, .. })));
    let len = server.accept(&settings(), &mut out).unwrap();
    assert!(matches!(client.receive(&mut out[..len]), Ok(Received::Record { event: Event::Connected(_), .. })));
    [client, server]
}

impl<'r> World<'r> {
    fn new(limits: (u16, u16), reached: &'r Reached) -> Self {
        // The server's settings were the first record under its key.
        let to_client = Way { limit: limits.0.into(), counter: 1, ..Way::default() };
        let to_server = Way { limit: limits.1.into(), ..Way::default() };
        Self { ends: connected(limits), failures: [None; 2], ways: [to_client, to_server], reached }
    }

    /// The way from this side.
    fn from(&mut self, side: Side) -> &mut Way {
        self.to(other(side))
    }

    /// The way to this side.
    fn to(&mut self, side: Side) -> &mut Way {
        &mut self.ways[side as usize]
    }

    /// What keeps this side from sending anything.
    fn barred(&mut self, side: Side) -> Option<Error> {
        let closed = self.from(side).closed.then_some(ApiMisuse::Closed.into());
        self.failures[side as usize].or(closed)
    }

    /// Takes what was sealed, or sees that it was refused as it had to be.
    fn sealed(
        &mut self,
        side: Side,
        expected: Result<usize, Error>,
        sealed: Result<usize, Error>,
        out: &[u8],
        meaning: Meaning,
    ) {
        assert_eq!(sealed, expected);
        match sealed {
            Ok(len) => {
                let record = out[..len].to_vec();
                let way = self.from(side);
                match &meaning {
                    Meaning::Payload(payload) => way.sent.push(payload.clone()),
                    Meaning::Close(_) => way.closed = true,
                    Meaning::KeyUpdate => {}
                }
                way.wire.push_back(record.clone());
                way.due.push_back((record, meaning));
            }
            Err(Error::Misuse(ApiMisuse::Closed)) => self.reached.note("sending behind a close refused"),
            Err(Error::Buffer(BufferError::TxFull)) => self.reached.note("no room to send"),
            Err(Error::Buffer(BufferError::MessageTooLong { .. })) => self.reached.note("too long to send"),
            Err(_) => self.reached.note("sending on a broken connection refused"),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Send(side, len, room) => {
                let max = self.from(side).max_payload();
                let body = vec![0xab; len.around(max - 3, 0)];
                let payload = [&[2, 0, 0][..], &body].concat();
                let room = room.around(payload.len() + RECORD_OVERHEAD, 20_000);
                let place = room.checked_sub(RECORD_OVERHEAD);
                let expected = match (self.barred(side), place) {
                    (Some(error), _) => Err(error),
                    (None, None) => Err(BufferError::TxFull.into()),
                    (None, Some(place)) if payload.len() <= max.min(place) => Ok(payload.len() + RECORD_OVERHEAD),
                    // Where even the longest record would fit, waiting for room does not help.
                    (None, Some(place)) if place >= max => Err(BufferError::MessageTooLong { max }.into()),
                    (None, Some(_)) => Err(BufferError::TxFull.into()),
                };
                let mut out = vec![0; room];
                let message = Message::Send { wanted: Rungs::NONE, envelope: &body };
                let sealed = self.ends[side as usize].send(&message, &mut out);
                self.sealed(side, expected, sealed, &out, Meaning::Payload(payload));
            }
            Step::SendSealed(side, len, room, fails) => {
                let max = self.from(side).max_payload();
                let body = vec![0xcd; len.around(max - 3, 0)];
                let payload = [&[2, 0, 0][..], &body].concat();
                let room = room.around(payload.len() + RECORD_OVERHEAD, 20_000);
                let place = room.checked_sub(RECORD_OVERHEAD);
                let expected = match (self.barred(side), place) {
                    (Some(error), _) => Err(error),
                    (None, None) => Err(BufferError::TxFull.into()),
                    (None, Some(_)) if payload.len() > max => Err(BufferError::MessageTooLong { max }.into()),
                    (None, Some(place)) if payload.len() > place => Err(BufferError::TxFull.into()),
                    // Stands for whatever the caller's closure fails with.
                    (None, Some(_)) if fails => Err(ApiMisuse::InvalidArgument.into()),
                    (None, Some(_)) => Ok(payload.len() + RECORD_OVERHEAD),
                };
                let mut out = vec![0; room];
                let sealed = self.ends[side as usize].send_sealed(Rungs::NONE, body.len(), &mut out, |envelope| {
                    envelope.fill(0xcd);
                    if fails { Err(ApiMisuse::InvalidArgument.into()) } else { Ok::<_, Error>(()) }
                });
                if sealed == Err(ApiMisuse::InvalidArgument.into()) {
                    assert_eq!(sealed, expected);
                    return self.reached.note("sealing failed");
                }
                self.sealed(side, expected, sealed, &out, Meaning::Payload(payload));
            }
            Step::UpdateKey(side, room) => {
                let mut out = vec![0; room.around(RECORD_OVERHEAD + 2, 100)];
                let expected = self.expected(side, out.len(), RECORD_OVERHEAD + 2);
                let sealed = self.ends[side as usize].update_key(&mut out);
                self.sealed(side, expected, sealed, &out, Meaning::KeyUpdate);
            }
            Step::Close(side, reason, room) => {
                // The code, whether there is a reason, and the reason.
                let len = RECORD_OVERHEAD + 3 + usize::from(reason.is_some());
                let mut out = vec![0; room.around(len, 100)];
                let expected = self.expected(side, out.len(), len);
                let sealed = self.ends[side as usize].close(reason, &mut out);
                self.sealed(side, expected, sealed, &out, Meaning::Close(reason));
            }
            Step::Transmit(side) => {
                let owed = self.ends[side as usize].transmit(&mut [0; 64]);
                assert_eq!(owed, self.failures[side as usize].map_or(Ok(0), Err), "nothing is owed");
            }
            Step::Deliver(side, bytes) => self.deliver(side, bytes),
            Step::DeliverAll(side) => self.deliver(side, usize::MAX),
            Step::End(side) => {
                let expected = match self.failures[side as usize] {
                    Some(error) => Err(error),
                    None if self.ways[side as usize].close_came => Ok(()),
                    None => Err(PeerError::Truncated.into()),
                };
                assert_eq!(self.ends[side as usize].end_of_stream(), expected);
                match expected {
                    Ok(()) => self.reached.note("ended behind a close"),
                    Err(error) => self.fail(side, error),
                }
            }
            Step::Change(side, at, bit) => {
                let mut bytes: Vec<_> = self.to(side).wire.iter_mut().flatten().collect();
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    *bytes[at] ^= 1 << bit;
                }
            }
            Step::Drop(side, which) => {
                let wire = &mut self.to(side).wire;
                if !wire.is_empty() {
                    wire.remove(which.index(wire.len()));
                }
            }
            Step::Repeat(side, which) => {
                let wire = &mut self.to(side).wire;
                if !wire.is_empty() {
                    let at = which.index(wire.len());
                    wire.insert(at, wire[at].clone());
                }
            }
            Step::Swap(side, a, b) => {
                let wire = &mut self.to(side).wire;
                if !wire.is_empty() {
                    wire.swap(a.index(wire.len()), b.index(wire.len()));
                }
            }
            Step::Reflect(side, which) => {
                let wire = &self.from(side).wire;
                if !wire.is_empty() {
                    let record = wire[which.index(wire.len())].clone();
                    self.to(side).wire.push_front(record);
                }
            }
            Step::MakeUp(side, at, bytes) => {
                let wire = &mut self.to(side).wire;
                let at = at.index(wire.len() + 1);
                wire.insert(at, bytes);
            }
            Step::MakeUpLength(side, len) => {
                let way = self.to(side);
                let [l1, l0] = len.to_be_bytes();
                let [s1, s0] = [(way.counter >> 8) as u8, way.counter as u8];
                way.wire.push_front(vec![1, 0, 3, 0, l1, l0, s1, s0]);
            }
        }
        self.hold();
    }

    /// A record of `len` bytes of the protocol's own, into so much room.
    fn expected(&mut self, side: Side, room: usize, len: usize) -> Result<usize, Error> {
        match self.barred(side) {
            Some(error) => Err(error),
            None if room < len => Err(BufferError::TxFull.into()),
            None => Ok(len),
        }
    }

    fn deliver(&mut self, side: Side, bytes: usize) {
        let way = &mut self.ways[side as usize];
        let mut left = bytes;
        while let Some(mut first) = way.wire.pop_front() {
            if first.len() > left {
                way.wire.push_front(first.split_off(left));
            }
            left -= first.len();
            way.buffer.extend(first);
            if left == 0 {
                break;
            }
        }
        while self.receive(side) {}
    }

    /// One call, with all that has come; whether something was opened.
    fn receive(&mut self, side: Side) -> bool {
        let way = &mut self.ways[side as usize];
        let expected = match self.failures[side as usize] {
            Some(error) => Answer::Failed(error),
            None => way.answer(),
        };
        let answer = match self.ends[side as usize].receive(&mut way.buffer) {
            Ok(Received::Need(len)) => Answer::Need(len),
            Ok(Received::Wait) => Answer::Wait,
            Ok(Received::Record { used, event }) => Answer::Opened(
                used,
                match event {
                    Event::Message(payload) => Meaning::Payload(payload.to_vec()),
                    Event::Progress => Meaning::KeyUpdate,
                    Event::Closed(reason) => Meaning::Close(reason),
                    _ => panic!("no event of an established connection"),
                },
            ),
            Err(error) => Answer::Failed(error),
        };
        assert_eq!(answer, expected);
        match answer {
            Answer::Need(_) => self.reached.note("waits for bytes"),
            Answer::Wait => self.reached.note("nothing is read behind a close"),
            Answer::Failed(error) => self.fail(side, error),
            Answer::Opened(used, meaning) => {
                way.buffer.drain(..used);
                way.due.pop_front();
                way.counter += 1;
                match meaning {
                    Meaning::Payload(payload) => {
                        self.reached.note("message arrived");
                        way.arrived.push(payload);
                    }
                    Meaning::KeyUpdate => {
                        self.reached.note("key updated");
                        way.counter = 0;
                    }
                    Meaning::Close(_) => {
                        self.reached.note("close arrived");
                        way.close_came = true;
                    }
                }
                return true;
            }
        }
        false
    }

    fn fail(&mut self, side: Side, error: Error) {
        if self.failures[side as usize].replace(error).is_none() {
            self.reached.note(match error {
                Error::Decode => "ended: malformed",
                Error::Crypto => "ended: not authentic",
                Error::Peer(PeerError::UnexpectedMessage) => "ended: out of order",
                Error::Peer(PeerError::Truncated) => "ended: truncated",
                other => panic!("nothing between two honest ends leads to {other:?}"),
            });
        }
    }

    /// What holds at all times.
    fn hold(&mut self) {
        for side in [Side::Client, Side::Server] {
            let failure = self.failures[side as usize];
            let is_open = failure.is_none() && !self.from(side).closed && !self.to(side).close_came;
            let max = self.from(side).max_payload();
            let end = &self.ends[side as usize];
            assert_eq!(end.is_connected(), is_open);
            assert_eq!(end.exporter().is_ok(), failure.is_none(), "with a failure, the keys are gone");
            assert_eq!(end.max_payload().ok(), failure.is_none().then_some(max));
            assert_eq!(end.ask(), None);
            let way = self.to(side);
            assert!(
                way.sent.starts_with(&way.arrived),
                "what arrives is what was sent, in its order and without a hole"
            );
            assert!(!way.close_came || way.arrived.len() == way.sent.len(), "a close comes behind all that was sent");
        }
    }
}

#[test]
fn what_arrives_is_what_was_sent_or_the_connection_ends_in_the_named_error() {
    let must_reach = [
        "close arrived",
        "ended behind a close",
        "ended: malformed",
        "ended: not authentic",
        "ended: out of order",
        "ended: truncated",
        "key updated",
        "message arrived",
        "no room to send",
        "nothing is read behind a close",
        "sealing failed",
        "sending behind a close refused",
        "sending on a broken connection refused",
        "too long to send",
        "waits for bytes",
    ];
    let regressions = concat!(env!("CARGO_MANIFEST_DIR"), "/properties/connection.regressions");
    crate::check(regressions, 512, &must_reach, &sequences(), |(limits, steps), reached| {
        let mut world = World::new(limits, reached);
        for step in steps {
            world.step(step);
        }
    });
}

/// Nobody in between: then all of it arrives, in whatever pieces.
#[test]
fn between_honest_ends_everything_arrives() {
    let limit = || prop_oneof![Just(1024_u16), 1024_u16..16_408];
    let sequences = ((limit(), limit()), vec(honest(), 0..60));
    let must_reach = [
        "close arrived",
        "key updated",
        "message arrived",
        "no room to send",
        "nothing is read behind a close",
        "sealing failed",
        "sending behind a close refused",
        "too long to send",
        "waits for bytes",
    ];
    let regressions = concat!(env!("CARGO_MANIFEST_DIR"), "/properties/connection.regressions");
    crate::check(regressions, 256, &must_reach, &sequences, |(limits, steps), reached| {
        let mut world = World::new(limits, reached);
        for step in steps.into_iter().chain([Step::DeliverAll(Side::Client), Step::DeliverAll(Side::Server)]) {
            world.step(step);
        }
        for way in &world.ways {
            assert_eq!(way.arrived, way.sent);
            assert_eq!(way.close_came, way.closed);
            assert!(way.due.is_empty() && way.buffer.is_empty());
        }
        assert_eq!(world.failures, [None; 2]);
    });
}
