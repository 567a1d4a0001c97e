//! Every error by its name: each variant of the engine's error is reached by what its documentation says.

use std::collections::BTreeSet;

use ossicle_core::{
    ApiMisuse, Buffers, ClientConfig, Connection, Drive, Endpoint, Error, Message, PeerError, Reason, Rungs, RustCrypto,
};
use ossicle_tests::{public, seed};

use crate::session::{ALICE, Clear, Kind, LIMIT, Name, Real, SERVER, Session, Side, Stage, Verdict, receive};

/// The variants of an enumeration, as its source lists them.
pub(crate) fn variants(source: &str, name: &str) -> Vec<String> {
    let body = source.split(&format!("pub enum {name} {{\n")).nth(1).unwrap().split("\n}\n").next().unwrap();
    let names = body.lines().filter_map(|line| line.strip_prefix("    "));
    names
        .filter(|line| line.starts_with(|first: char| first.is_ascii_uppercase()))
        .map(|line| line.chars().take_while(|c| c.is_alphanumeric()).collect())
        .collect()
}

/// All that the source knows, in the way they are printed.
fn known() -> BTreeSet<String> {
    let source = include_str!("../../core/src/error.rs");
    let mut all = BTreeSet::new();
    for outer in variants(source, "Error") {
        match source.split(&format!("    {outer}(")).nth(1).and_then(|rest| rest.split(')').next()) {
            Some(inner) => all.extend(variants(source, inner).iter().map(|variant| format!("{outer}({variant})"))),
            None => {
                all.insert(outer);
            }
        }
    }
    all
}

fn received(stage: Stage, bytes: &[u8]) -> Error {
    let Verdict::Fails(error) = receive(&mut Real::new(Kind::Key, (1, 2)).at(stage), &mut bytes.to_vec()) else {
        panic!("an error")
    };
    error
}

/// A HelloRetry that asks for so many bits.
fn asked(bits: u8) -> Vec<u8> {
    vec![1, 0, 1, 0x20, 0, 11, 0, 0, bits, 1, 7]
}

/// What each variant needs to happen.
fn reached() -> Vec<(&'static str, Error)> {
    let session = Real::new(Kind::Key, (1, 2));
    let established = || session.at(Stage::Established(Side::Client));
    let mut out = [0; 2048];
    let mut all = vec![
        ("Decode", received(Stage::AwaitClientHello, &[0xff; 8])),
        ("Crypto", received(Stage::AwaitServerAuth, Real::new(Kind::Key, (3, 4)).record(Name::ServerAuth))),
        ("Peer(Truncated)", established().end_of_stream().unwrap_err()),
        ("Peer(Refused)", received(Stage::AwaitSettings, session.record(Name::Refusal))),
        ("Peer(UnexpectedMessage)", received(Stage::AwaitServerHello, session.record(Name::ServerAuth))),
        ("Peer(Retry)", received(Stage::AwaitServerHello, &asked(18))),
        ("Peer(Puzzle)", received(Stage::AwaitServerHello, &asked(19))),
        ("Buffer(MessageTooLong)", {
            let message = Message::Send { wanted: Rungs::NONE, envelope: &[0; 16_384] };
            established().send(&message, &mut [0; 32_768]).unwrap_err()
        }),
        ("Buffer(TxFull)", established().send(&Message::Listening, &mut [0; 25]).unwrap_err()),
        ("Misuse(NotConnected)", session.at(Stage::Start).exporter().err().unwrap()),
        ("Misuse(NotAsked)", session.at(Stage::Start).verified(&session.credentials()).unwrap_err()),
        ("Misuse(Closed)", session.at(Stage::Closed(Side::Server)).send(&Message::Listening, &mut out).unwrap_err()),
        ("Misuse(InvalidArgument)", established().send(&Message::KeyUpdate, &mut out).unwrap_err()),
    ];
    let mut suite = session.record(Name::ClientHello).to_vec();
    suite[13] = 2;
    all.push(("Peer(Version)", received(Stage::AwaitClientHello, &suite)));

    // Asked for work that was done.
    let mut client = session.at(Stage::AwaitServerHello);
    assert!(client.receive(&mut asked(0)).is_err());
    let puzzle = client.puzzle().unwrap();
    let config = ClientConfig { server: Some(public(&SERVER).fingerprint()), ask_for_key: false, record_limit: LIMIT };
    let mut client: Connection = Connection::client(config, &seed(1));
    client.present(&puzzle).unwrap();
    assert!(client.transmit(&mut out).unwrap() > 0);
    all.push(("Peer(Busy)", client.receive(&mut asked(0)).err().unwrap()));

    // Another server than the pinned one.
    let pinned = Some(public(&ALICE).fingerprint());
    let config = ClientConfig { server: pinned, ask_for_key: false, record_limit: LIMIT };
    let mut client: Connection = Connection::client(config, &seed(1));
    let len = client.transmit(&mut out).unwrap();
    assert_eq!(out[..len], *session.record(Name::ClientHello), "the hello names no server");
    assert!(client.receive(&mut session.record(Name::ServerHello).to_vec()).is_ok());
    all.push(("Peer(ServerKey)", client.receive(&mut session.record(Name::ServerAuth).to_vec()).err().unwrap()));

    // A device whose buffer is shorter than any record limit; and one that is.
    let (mut rx, mut tx) = ([0; 1_023], [0; 1_024]);
    let config = ClientConfig { server: pinned, ask_for_key: false, record_limit: LIMIT };
    let endpoint = Endpoint::<RustCrypto>::client(config, Buffers { rx: &mut rx, tx: &mut tx }, &seed(1));
    all.push(("Buffer(RxFull)", endpoint.err().unwrap()));

    let session = Session::<Clear>::new(Kind::Key, (1, 2));
    let mut receiver = session.at(Stage::Established(Side::Server));
    for number in 0..(1 << 20) - 1 {
        let [.., s1, s0] = u32::to_be_bytes(number);
        let mut record = [0; 26];
        record[..10].copy_from_slice(&[1, 0, 3, 0, 0, 26, s1, s0, 7, 0]);
        assert!(receiver.receive(&mut record).is_ok());
    }
    let mut record = [0; 26];
    record[..10].copy_from_slice(&[1, 0, 3, 0, 0, 26, 0xff, 0xff, 7, 0]);
    all.push(("Peer(Exhausted)", receiver.receive(&mut record).err().unwrap()));
    all
}

#[test]
fn every_error_is_reached_by_its_name() {
    let known = known();
    let reached = reached();
    for (name, error) in &reached {
        let printed = format!("{error:?}");
        let printed = printed.split(" {").next().unwrap();
        let head = name.trim_end_matches(')');
        assert!(printed == *name || printed == head, "{name} was to be reached, not {error:?}");
        assert!(!error.to_string().is_empty());
        let blame = match error {
            Error::Peer(_) => "Peer(",
            Error::Buffer(_) => "Buffer(",
            Error::Misuse(_) => "Misuse(",
            _ => "",
        };
        assert!(name.starts_with(blame));
    }
    let names: BTreeSet<String> = reached.iter().map(|(name, _)| (*name).to_owned()).collect();
    println!("{} errors reached: {names:?}", names.len());
    assert_eq!(names, known, "each variant of core/src/error.rs is reached here, and no other is named");
    assert_eq!(known.len(), 2 + 9 + 3 + 4);
}

#[test]
fn every_reason_travels_in_a_refusal_and_a_close() {
    let mut cases = 0;
    for reason in Reason::ALL {
        let session = Real::new(Kind::Key, (1, 2));
        let mut out = [0; 64];
        let len = session.at(Stage::CheckClient).refuse(*reason, cases, &mut out).unwrap();
        let refused = PeerError::Refused { reason: *reason, retry_after: cases };
        let mut client = session.at(Stage::AwaitSettings);
        assert_eq!(receive(&mut client, &mut out[..len]), Verdict::Fails(refused.into()));

        let mut server = session.at(Stage::Established(Side::Server));
        let len = server.close(Some(*reason), &mut out).unwrap();
        let mut client = session.at(Stage::Established(Side::Client));
        let closed = client.receive(&mut out[..len]);
        // The session's own answer comes first in its stream; this server said nothing but its close.
        assert!(matches!(
            closed,
            Ok(ossicle_core::Received::Record { event: ossicle_core::Event::Closed(Some(told)), .. }) if told == *reason
        ));
        cases += 1;
    }
    let known = (0..=u8::MAX).filter(|code| Reason::from_code(*code).is_some()).count();
    println!("{cases} reasons");
    assert_eq!((known, Reason::ALL.len()), (20, 20));
}

#[test]
fn an_endpoint_fails_like_its_connection() {
    let pinned = Some(public(&SERVER).fingerprint());
    let config = ClientConfig { server: pinned, ask_for_key: false, record_limit: LIMIT };
    let session = Real::new(Kind::Key, (1, 2));
    let mut cases = 0;
    // A ServerAuth that is longer than the buffer, by its header alone; one end of the stream at each byte of a hello.
    for len in 0..=79 {
        let (mut rx, mut tx) = ([0; 1_024], [0; 1_024]);
        let buffers = Buffers { rx: &mut rx, tx: &mut tx };
        let mut endpoint = Endpoint::<RustCrypto>::client(config, buffers, &seed(1)).unwrap();
        endpoint.poll().unwrap();
        let io = endpoint.io().unwrap().unwrap();
        let written = io.write.len();
        endpoint.written(written);
        for byte in &session.record(Name::ServerHello)[..len] {
            let io = endpoint.io().unwrap().unwrap();
            io.read[0] = *byte;
            endpoint.read(1).unwrap();
        }
        if len == 79 {
            endpoint.poll().unwrap();
            let header = [1, 0, 2, 0x10, 4, 1, 0, 0];
            for byte in header {
                endpoint.io().unwrap().unwrap().read[0] = byte;
                endpoint.read(1).unwrap();
            }
            assert_eq!(endpoint.io().err(), Some(ossicle_core::BufferError::RxFull.into()));
        } else {
            assert_eq!(endpoint.read(0), Err(PeerError::Truncated.into()), "{len}");
            assert_eq!(endpoint.poll().err(), Some(PeerError::Truncated.into()), "{len}");
        }
        cases += 1;
    }
    println!("{cases} endpoints");
    assert_eq!(cases, 80);
    assert_eq!(Error::from(ApiMisuse::Closed), Stage::Refused(Side::Server).ended().unwrap());
}
