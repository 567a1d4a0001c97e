//! Records and streams that are cut: every length of every record, one byte at a time, and an end at every offset.

use ossicle_core::{Aead, Error, PeerError};

use crate::session::{Clear, Kind, NAME, Name, Real, Said, Session, Side, Verdict, assert_dead, receive, refused};

const DECODE: Verdict = Verdict::Fails(Error::Decode);
const CRYPTO: Verdict = Verdict::Fails(Error::Crypto);

fn with_len(record: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = record.to_vec();
    bytes.resize(len, 0);
    bytes[4..6].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
    bytes
}

/// What the whole record comes to.
fn taken<A: Aead>(session: &Session<A>, name: Name) -> Verdict {
    crate::rules::predict(session, name.awaited_in(), session.record(name))
}

#[test]
fn every_truncation_of_every_handshake_record_is_waited_for_or_ends_in_its_error() {
    let (mut cases, mut demanded) = (0, 0);
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        for name in Name::HANDSHAKE {
            let record = session.record(name);
            let min = match name {
                Name::ClientHello | Name::ServerHello => 8,
                Name::Refusal => 29,
                _ => 24,
            };
            demanded += 2 * record.len() - 8;
            // Cut by the network: the rest is waited for, by as many bytes as there will be, and nothing has changed. One
            // victim for all of them.
            let mut victim = session.at(name.awaited_in());
            for len in 0..record.len() {
                let need = if len < 8 { 8 } else { record.len() };
                let verdict = receive(&mut victim, &mut record[..len].to_vec());
                assert_eq!(verdict, Verdict::Need(need), "{kind:?} {name:?} {len}");
                cases += 1;
            }
            assert!(matches!(taken(&session, name), Verdict::Taken(_)) || name == Name::Refusal);
            assert_eq!(receive(&mut victim, &mut record.to_vec()), taken(&session, name));
            // Cut by the peer, whose header says so; and longer than it is.
            let longer = record.len() + 1..=record.len() + 32;
            for len in (8..record.len()).chain(longer) {
                let expected = match len {
                    _ if len < min || (name == Name::Refusal && len > 29) => DECODE,
                    _ if name == Name::ClientHello && len > 256 => DECODE,
                    _ if name.is_sealed() => CRYPTO,
                    _ => DECODE,
                };
                let mut victim = session.at(name.awaited_in());
                let case = (kind, name, len);
                assert_eq!(receive(&mut victim, &mut with_len(record, len)), expected, "{case:?}");
                let Verdict::Fails(error) = expected else { panic!("an end") };
                assert_dead(&mut victim, error, &case);
                cases += 1;
            }
        }
    }
    println!("{cases} truncations under the seal");
    assert!(cases >= demanded && demanded > 9_000, "{cases} of {demanded}");
}

/// What is sealed, cut by a peer with the keys: the table is the shortest payload that has all fields (PROTOCOL 3.4 to 3.7).
#[test]
fn every_truncation_behind_the_seal_ends_in_its_error() {
    let (mut cases, mut demanded) = (0, 0);
    for kind in Kind::ALL {
        let session = Session::<Clear>::new(kind, (1, 2));
        for name in Name::HANDSHAKE.into_iter().filter(|name| name.is_sealed()) {
            let record = session.record(name);
            let payload = record.len() - 24;
            demanded += payload;
            // Where a signature takes what the other fields leave, a shorter payload is well-formed, and only wrong.
            let (whole, wrong) = match (name, kind) {
                (Name::ServerAuth | Name::ClientAuth, Kind::Resumed) => (payload, DECODE),
                (Name::ServerAuth, Kind::Asked | Kind::Enroll) => {
                    (16 + 294 + 32, Verdict::Fails(PeerError::ServerKey.into()))
                }
                (Name::ServerAuth, _) => (16 + 32, Verdict::Fails(PeerError::ServerKey.into())),
                (Name::ClientAuth, Kind::Enroll) => (1 + 16 + 1 + NAME.len() + 294 + 8 + 2 + 32 + 32, CRYPTO),
                (Name::ClientAuth, Kind::Password) => (1 + 16 + 1 + NAME.len() + 294 + 2 + 129 + 32, CRYPTO),
                (Name::ClientAuth, _) => (1 + 16 + 4 + 2 + 32, Verdict::Taken(Said::CheckClient)),
                _ => (payload, DECODE),
            };
            for len in 0..payload {
                let mut bytes = with_len(&record[..8 + len], 24 + len);
                let mut victim = session.at(name.awaited_in());
                let expected = if len < whole { DECODE } else { wrong };
                let case = (kind, name, len);
                assert_eq!(receive(&mut victim, &mut bytes), expected, "{case:?}");
                if let Verdict::Fails(error) = expected {
                    assert_dead(&mut victim, error, &case);
                }
                cases += 1;
            }
        }
    }
    println!("{cases} truncations behind the seal");
    assert!(cases >= demanded && demanded > 3_000, "{cases} of {demanded}");
}

#[test]
fn a_session_goes_through_in_chunks_of_one_byte() {
    let (mut cases, mut demanded) = (0, 0);
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        for side in [Side::Client, Side::Server] {
            let mut connection = session.listening(side);
            for name in session.stream(side.other()) {
                let record = session.record(name);
                demanded += record.len();
                for len in 0..record.len() {
                    let need = if len < 8 { 8 } else { record.len() };
                    let verdict = receive(&mut connection, &mut record[..len].to_vec());
                    assert_eq!(verdict, Verdict::Need(need), "{kind:?} {name:?} {len}");
                    cases += 1;
                }
                session.play(&mut connection, name);
            }
            assert_eq!(connection.end_of_stream(), Ok(()));
        }
    }
    println!("{cases} bytes one by one");
    assert!(cases >= demanded && demanded > 5_000, "{cases} of {demanded}");
}

#[test]
fn an_end_of_the_stream_is_a_truncation_at_every_offset_but_the_last() {
    let (mut cases, mut demanded) = (0, 0);
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        for side in [Side::Client, Side::Server] {
            let names = session.stream(side.other());
            demanded += names.iter().map(|name| session.record(*name).len()).sum::<usize>() + 1;
            for (index, name) in names.iter().enumerate() {
                for len in 0..session.record(*name).len() {
                    let mut victim = session.listening(side);
                    for name in &names[..index] {
                        session.play(&mut victim, *name);
                    }
                    let mut torn = session.record(*name)[..len].to_vec();
                    assert!(matches!(receive(&mut victim, &mut torn), Verdict::Need(_)));
                    let case = (kind, side, name, len);
                    assert_eq!(victim.end_of_stream(), Err(PeerError::Truncated.into()), "{case:?}");
                    assert_dead(&mut victim, PeerError::Truncated.into(), &case);
                    cases += 1;
                }
            }
            let mut whole = session.listening(side);
            names.iter().for_each(|name| session.play(&mut whole, *name));
            assert_eq!((whole.end_of_stream(), whole.end_of_stream()), (Ok(()), Ok(())));
            assert_eq!(receive(&mut whole, &mut session.record(Name::Answer).to_vec()), Verdict::Wait);
            cases += 1;
        }
        // Behind a refusal there is nothing to be truncated: the client knows why.
        let mut victim = session.at(Name::Refusal.awaited_in());
        assert_eq!(receive(&mut victim, &mut session.record(Name::Refusal).to_vec()), Verdict::Fails(refused()));
        assert_eq!(victim.end_of_stream(), Err(refused()));
    }
    println!("{cases} ends of the stream");
    assert!(cases >= demanded && demanded > 5_000, "{cases} of {demanded}");
}
