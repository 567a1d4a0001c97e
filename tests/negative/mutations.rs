//! One million mutated records: cut, stretched, spliced, renumbered, flipped, the same ones in each run.

use std::collections::BTreeMap;

use ossicle_core::{Connection, Message, RustCrypto};

use crate::matrix::{application, catalogue, said};
use crate::rules::{KNOWN, SMALL_ORDER, awaited, predict};
use crate::session::{Clear, Kind, Name, Real, Said, Session, Side, Stage, Verdict, assert_dead, receive};

/// SplitMix64: enough to choose what to break.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() % u64::try_from(end.max(1)).unwrap()).unwrap()
    }

    fn byte(&mut self) -> u8 {
        let [byte, ..] = self.roll().to_be_bytes();
        match byte & 7 {
            0 => 0,
            1 => 1,
            2 => 0x7f,
            3 => 0x80,
            4 => 0xff,
            _ => self.roll().to_be_bytes()[0],
        }
    }

    fn range(&mut self, len: usize) -> core::ops::Range<usize> {
        let start = self.below(len);
        start..start + self.below((len - start).min(40)) + usize::from(len > start)
    }
}

/// Breaks a record, or a payload if `header` is false, in one to four places.
fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>, donor: &[u8], header: bool) {
    for _ in 0..=dice.below(4) {
        let len = bytes.len();
        let mut keeps_length = false;
        match dice.below(if header { 14 } else { 9 }) {
            0 | 1 if len > 0 => {
                for _ in 0..=dice.below(8) {
                    bytes[dice.below(len)] ^= 1 << dice.below(8);
                }
                keeps_length = true;
            }
            2 if len > 0 => {
                bytes[dice.below(len)] = dice.byte();
                keeps_length = true;
            }
            3 => bytes.truncate(dice.below(len)),
            4 => {
                for _ in 0..=dice.below(40) {
                    bytes.push(dice.byte());
                }
            }
            5 => drop(bytes.drain(dice.range(len))),
            6 => {
                let at = dice.below(len);
                let part = dice.range(donor.len());
                bytes.splice(at..at, donor[part].iter().copied());
            }
            7 => {
                let part = dice.range(donor.len().min(len));
                bytes[part.clone()].copy_from_slice(&donor[part]);
                keeps_length = true;
            }
            8 => {
                let part = dice.range(len);
                bytes[part].fill(0);
                keeps_length = true;
            }
            9 if len >= 8 => {
                bytes[4 + dice.below(2)] = dice.byte();
                keeps_length = true;
            }
            10 if len >= 8 => {
                bytes[2..4].copy_from_slice(&KNOWN[dice.below(KNOWN.len())].to_be_bytes());
                keeps_length = true;
            }
            11 if len >= 8 => {
                bytes[6 + dice.below(2)] = dice.byte();
                keeps_length = true;
            }
            12 if len >= 82 => {
                let at = if dice.below(2) == 0 { 50 } else { 47 };
                bytes[at..at + 32].copy_from_slice(&SMALL_ORDER[dice.below(7)]);
                keeps_length = true;
            }
            _ => {}
        }
        // Three of four times a header tells the truth about a length that has changed.
        if header && !keeps_length && bytes.len() >= 8 && dice.below(4) > 0 {
            let len = u16::try_from(bytes.len()).unwrap();
            bytes[4..6].copy_from_slice(&len.to_be_bytes());
        }
    }
}

/// One side of a session in one state, used until it is used up.
struct Victim<'s> {
    session: &'s Real,
    stage: Stage,
    connection: Connection<RustCrypto>,
    received: usize,
}

/// Mutates records of these stages until each victim has had its share; returns what they came to.
fn mutate_records(stages: &[Stage], sessions: &[Real], seed: u64, cases: usize) -> BTreeMap<String, usize> {
    let mut dice = Dice(seed);
    let mut outcomes = BTreeMap::new();
    let mut victims = Vec::new();
    for session in sessions {
        for stage in stages.iter().filter(|stage| stage.is_of(session.kind)) {
            victims.push(Victim { session, stage: *stage, connection: session.at(*stage), received: 0 });
        }
    }
    let count = victims.len();
    let mut run = 0;
    while run < cases {
        let victim = &mut victims[run % count];
        let (session, stage) = (victim.session, victim.stage);
        // Mostly what belongs there, and now and then something else.
        let own: Vec<Name> =
            Name::ALL.into_iter().filter(|name| name.awaited_in() == stage && name.from() != stage.side()).collect();
        let name = if dice.below(16) == 0 { Name::ALL[dice.below(12)] } else { own[dice.below(own.len())] };
        let donor = &sessions[dice.below(sessions.len())];
        let mut bytes = session.record(name).to_vec();
        let donor = donor.record(Name::ALL[dice.below(12)]);
        mutate(&mut dice, &mut bytes, donor, true);
        if bytes == session.record(name) {
            continue;
        }
        run += 1;
        victim.received += 1;
        let expected = predict(session, stage, &bytes);
        let hostile = bytes.clone();
        let verdict = receive(&mut victim.connection, &mut bytes);
        assert_eq!(verdict, expected, "seed {seed:#x}, case {run}: {:?} {stage:?} {hostile:02x?}", session.kind);
        let outcome = match verdict {
            Verdict::Need(_) => "need".to_owned(),
            Verdict::Fails(error) => format!("{error:?}"),
            verdict => format!("{verdict:?}"),
        };
        *outcomes.entry(outcome).or_default() += 1;
        match verdict {
            Verdict::Need(_) => assert_eq!(bytes, hostile, "what is waited for is not touched"),
            Verdict::Fails(error) => {
                if run % 16 == 0 {
                    assert_dead(&mut victim.connection, error, &(stage, run));
                }
                victim.connection = session.at(stage);
            }
            // A clear record may be changed and still be a hello. A sealed one is what it was, if only its tail was.
            Verdict::Taken(_) => victim.connection = session.at(stage),
            Verdict::Wait => panic!("{stage:?} waits for nobody"),
        }
    }
    for victim in &victims {
        assert!(victim.received >= cases / count && !awaited(victim.stage).is_empty());
    }
    outcomes
}

/// Mutates payloads of the whole catalogue, at both sides, by a peer with the keys.
fn mutate_payloads(seed: u64, cases: usize) -> BTreeMap<String, usize> {
    let mut dice = Dice(seed);
    let mut outcomes = BTreeMap::new();
    let session = Session::<Clear>::new(Kind::Key, (1, 2));
    let payloads = catalogue();
    let mut victims = [Side::Client, Side::Server].map(|side| {
        let stage = Stage::Established(side);
        (stage, session.at(stage), u16::from(side == Side::Client))
    });
    let mut run = 0;
    while run < cases {
        let original = &payloads[run % payloads.len()];
        let mut payload = original.clone();
        let donor = &payloads[dice.below(payloads.len())];
        mutate(&mut dice, &mut payload, donor, false);
        if payload == *original {
            continue;
        }
        run += 1;
        let (stage, victim, sequence) = &mut victims[run % 2];
        let expected = said(*stage, &payload);
        let verdict = receive(victim, &mut application(&payload, *sequence));
        assert_eq!(verdict, expected, "seed {seed:#x}, case {run}: {payload:02x?}");
        let message = Message::decode(&payload);
        *outcomes.entry(if message.is_ok() { "messages" } else { "no messages" }.to_owned()).or_default() += 1;
        // What is read can be written, and is read again.
        if let Ok(message) = message {
            let mut out = vec![0; payload.len() + 64];
            let len = message.encode(&mut out).unwrap();
            assert!(len <= payload.len(), "the shortest form");
            assert_eq!(Message::decode(&out[..len]), Ok(message));
        }
        match verdict {
            Verdict::Taken(Said::Message) => *sequence = sequence.wrapping_add(1),
            Verdict::Taken(Said::Progress) => *sequence = 0,
            _ => {
                if let Verdict::Fails(error) = verdict {
                    assert_dead(victim, error, &run);
                }
                *victim = session.at(*stage);
                *sequence = u16::from(stage.side() == Side::Client);
            }
        }
    }
    outcomes
}

#[test]
fn one_million_mutated_records_end_as_the_rules_say() {
    const HELLOS: usize = 400_000;
    const HANDSHAKES: usize = 60_000;
    const ESTABLISHED: usize = 6_000;
    const PAYLOADS: usize = 534_000;
    const { assert!(HELLOS + HANDSHAKES + ESTABLISHED + PAYLOADS >= 1_000_000) };
    let sessions: Vec<Real> =
        Kind::ALL.into_iter().zip(0..).map(|(kind, index)| Real::new(kind, (2 * index + 1, 2 * index + 2))).collect();
    let in_handshake = [Stage::AwaitServerHello, Stage::AwaitServerAuth, Stage::AwaitClientAuth, Stage::AwaitSettings];
    let behind = [Side::Client, Side::Server].map(Stage::Established);
    let areas = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            [
                ("hellos", mutate_records(&[Stage::AwaitClientHello], &sessions, 0x01, HELLOS)),
                ("payloads", mutate_payloads(0x02, PAYLOADS)),
            ]
        });
        let sealed = [
            ("handshake records", mutate_records(&in_handshake, &sessions, 0x03, HANDSHAKES)),
            ("application records", mutate_records(&behind, &sessions, 0x04, ESTABLISHED)),
        ];
        others.join().unwrap().into_iter().chain(sealed).collect::<Vec<_>>()
    });
    let mut total = 0;
    for (area, outcomes) in &areas {
        println!("{area}: {outcomes:?}");
        total += outcomes.values().sum::<usize>();
        // A mutation that always ends alike tests one thing.
        assert!(outcomes.len() >= 2, "{area}: {outcomes:?}");
    }
    for error in ["Decode", "Crypto", "Peer(UnexpectedMessage)", "Peer(Version)", "need"] {
        assert!(areas[0].1.get(error).is_some_and(|count| *count > 100), "{error}: {:?}", areas[0]);
        assert!(areas[2].1.get(error).is_some_and(|count| *count > 100), "{error}: {:?}", areas[2]);
    }
    println!("{total} mutated records");
    assert!(total >= 1_000_000, "{total}");
}
