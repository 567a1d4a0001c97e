//! Everything in every state of both sides: each record of this session and of all others, each message of the catalogue, each
//! call. Repeats, swaps, reflections and splices are all cells of it.

use ossicle_core::{
    Aead, ApiMisuse, Body, BufferError, Changed, Channels, ChannelsResponse, Connection, DirectoryEntry, DirectoryList,
    Enrol, Error, Event, ExpireChannels, Lookup, Message, PeerError, PeerStatus, Reason, Receipt, Received, Rotate,
    Rung, Rungs, Settings, SignedBundle, Subject, SuccessorQuery, Unwatch, Watch, WatchResponse,
};
use ossicle_tests::public;

use crate::rules::{SMALL_ORDER, awaited, predict};
use crate::session::{
    ALICE, Clear, Kind, Name, Real, SERVER, Said, Session, Side, Stage, Verdict, assert_dead, receive,
};

/// Nothing has changed: the next step of this state works as if the hostile record had never come.
fn goes_on<A: Aead>(session: &Session<A>, stage: Stage, mut connection: Connection<A>, case: &dyn core::fmt::Debug) {
    let mut out = [0; 2048];
    let next = Name::ALL.into_iter().find(|name| {
        name.from() != stage.side()
            && name.awaited_in()
                == match stage {
                    Stage::Closed(side) => Stage::Established(side),
                    stage => stage,
                }
    });
    match stage {
        Stage::Start => assert_eq!(connection.transmit(&mut out), Ok(session.record(Name::ClientHello).len())),
        Stage::VerifyServer => assert_eq!(session.verified(&mut connection), Ok(()), "{case:?}"),
        Stage::SignClient => assert!(connection.ask().is_some(), "{case:?}"),
        Stage::OweFinished => assert_eq!(connection.transmit(&mut out), Ok(58), "{case:?}"),
        Stage::CheckChannel => assert!(connection.answer_offer(None, &mut out).is_ok(), "{case:?}"),
        Stage::SignServer => assert!(connection.ask().is_some(), "{case:?}"),
        Stage::CheckClient => assert_eq!(connection.refuse(Reason::Rate, 0, &mut out), Ok(29), "{case:?}"),
        Stage::Bound | Stage::Returned => {
            assert_eq!(connection.accept(&Settings::default(), &mut out).map(|len| len > 24), Ok(true), "{case:?}");
        }
        Stage::PeerClosed(_) => {
            assert!(connection.close(None, &mut out).is_ok(), "{case:?}");
            assert_eq!(connection.end_of_stream(), Ok(()), "{case:?}");
        }
        Stage::BothClosed(_) => assert_eq!(connection.end_of_stream(), Ok(()), "{case:?}"),
        _ => session.play(&mut connection, next.unwrap()),
    }
}

/// A hello of another session was taken. Whoever answers it answers somebody else: nothing of this session opens.
fn hello_ends(session: &Session<ossicle_core::RustCrypto>, stage: Stage, mut connection: Connection) {
    let own = if stage.side() == Side::Server {
        session.answer_hello(&mut connection, &mut [0; 2048]);
        Name::ClientAuth
    } else {
        Name::ServerAuth
    };
    let mut bytes = session.record(own).to_vec();
    assert_eq!(receive(&mut connection, &mut bytes), Verdict::Fails(Error::Crypto));
    assert_dead(&mut connection, Error::Crypto, &(session.kind, stage));
}

#[test]
fn every_record_of_every_session_in_every_state_is_taken_once_where_it_belongs() {
    let (mut cases, mut demanded, mut taken) = (0, 0, 0);
    // Two of each kind, each with seeds of its own: what belongs to the one is a splice in the other.
    let kinds = Kind::ALL.into_iter().flat_map(|kind| [kind; 2]);
    let pool: Vec<Real> = kinds.zip(0..).map(|(kind, index)| Real::new(kind, (2 * index + 1, 2 * index + 2))).collect();
    for (index, session) in pool.iter().enumerate().step_by(2) {
        let stages = Stage::of(session.kind).count();
        demanded += stages * pool.len() * Name::ALL.len() * 2;
        assert!(stages >= 20);
        for stage in Stage::of(session.kind) {
            for (from, other) in pool.iter().enumerate() {
                for name in Name::ALL {
                    for header_only in [false, true] {
                        let mut bytes = other.record(name).to_vec();
                        if header_only {
                            bytes.truncate(8);
                        }
                        let expected = predict(session, stage, &bytes);
                        let case = (session.kind, stage, other.kind, from, name, header_only);
                        let mut victim = session.at(stage);
                        assert_eq!(receive(&mut victim, &mut bytes), expected, "{case:?}");
                        match expected {
                            Verdict::Fails(error) => assert_dead(&mut victim, error, &case),
                            Verdict::Wait | Verdict::Need(_) => goes_on(session, stage, victim, &case),
                            Verdict::Taken(_) if from == index => taken += 1,
                            Verdict::Taken(_) if other.record(name) == session.record(name) => {}
                            Verdict::Taken(_) => {
                                assert!(!name.is_sealed(), "{case:?}: spliced");
                                hello_ends(session, stage, victim);
                            }
                        }
                        cases += 1;
                    }
                }
            }
        }
    }
    println!("{cases} records in states, {taken} of them where they belong");
    assert!(cases >= demanded && demanded > 20_000, "{cases} of {demanded}");
    // Two hellos, two proofs, settings and, for each side, a first message, before and after its own close.
    assert_eq!(taken, Kind::ALL.len() * (2 + 2 + 1 + 2 + 2));
}

#[test]
fn every_order_of_a_sides_records_is_taken_up_to_the_first_that_is_out_of_order() {
    let mut cases = 0;
    let session = Real::new(Kind::Key, (1, 2));
    for (side, mut names) in [
        (Side::Server, vec![Name::Question, Name::KeyUpdate, Name::Listening, Name::ClientClose]),
        (Side::Client, vec![Name::Answer, Name::ServerClose]),
    ] {
        let honest = names.clone();
        permutations(&mut names, 0, &mut |order| {
            let mut victim = session.at(Stage::Established(side));
            for (index, name) in order.iter().enumerate() {
                let mut bytes = session.record(*name).to_vec();
                let verdict = receive(&mut victim, &mut bytes);
                if *name == honest[index] {
                    assert!(matches!(verdict, Verdict::Taken(_)), "{order:?}: {name:?}");
                    continue;
                }
                // Numbers are judged first. The two records under the second key have those of the two under the first.
                let same = session.record(*name)[6..8] == session.record(honest[index])[6..8];
                let error = if same { Error::Crypto } else { PeerError::UnexpectedMessage.into() };
                assert_eq!(verdict, Verdict::Fails(error), "{order:?}: {name:?}");
                assert_dead(&mut victim, error, order);
                break;
            }
            cases += 1;
        });
    }
    println!("{cases} orders");
    assert_eq!(cases, 24 + 2);
}

fn permutations(names: &mut Vec<Name>, from: usize, then: &mut impl FnMut(&Vec<Name>)) {
    if from == names.len() {
        return then(names);
    }
    for index in from..names.len() {
        names.swap(from, index);
        permutations(names, from + 1, then);
        names.swap(from, index);
    }
}

#[test]
fn every_exchange_key_of_small_order_ends_the_connection() {
    let mut cases = 0;
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        for (name, place) in [(Name::ClientHello, 50..82), (Name::ServerHello, 47..79)] {
            for (point, high) in SMALL_ORDER.iter().flat_map(|point| [(point, 0), (point, 0x80)]) {
                let mut bytes = session.record(name).to_vec();
                bytes[place.clone()].copy_from_slice(point);
                bytes[place.end - 1] |= high;
                let mut victim = session.at(name.awaited_in());
                let verdict = receive(&mut victim, &mut bytes);
                if verdict == Verdict::Taken(Said::CheckChannel) {
                    // Its binder is wrong for these bytes, so the server goes on as for an unknown channel, with the curve.
                    let held = Some(&Session::<Clear>::channel()).cloned();
                    assert_eq!(victim.answer_offer(held.as_ref(), &mut [0; 512]), Err(Error::Crypto), "{kind:?}");
                } else {
                    assert_eq!(verdict, Verdict::Fails(Error::Crypto), "{kind:?} {name:?} {point:?}");
                }
                assert_dead(&mut victim, Error::Crypto, &(kind, name, point));
                cases += 1;
            }
        }
    }
    println!("{cases} exchange keys of small order");
    assert_eq!(cases, Kind::ALL.len() * 2 * 7 * 2);
}

/// One payload of each message that there is, hosts' messages and unknown codes too.
pub(crate) fn catalogue() -> Vec<Vec<u8>> {
    let bundle = SignedBundle { bundle: &[1; 184], signature: &[2; 256] };
    let receipt = Receipt { rung: Rung::Delivered, reason: None, chain: [3; 8], from: 1, to: 2, tag: Some([4; 16]) };
    let subject = Subject::Name("bob");
    let entry = DirectoryEntry {
        id: [5; 16],
        name: "bob",
        key_epoch: 0,
        record_limit: 16_408,
        status: PeerStatus::Online,
        modulus: None,
        bundle: Some(bundle),
    };
    let messages = [
        Message::Send { wanted: Rungs::NONE, envelope: &[7; 40] },
        Message::Told(receipt),
        Message::Deliver { wanted: Rungs::NONE, envelope: &[7; 40] },
        Message::Waited { seq: 1, at: 1 },
        Message::Tell(receipt),
        Message::Acknowledge { seq: 1 },
        Message::Status { request: 1 },
        Message::StatusResponse { request: 1 },
        Message::Lookup(Lookup { request: 1, key: true, bundle: true, subject }),
        Message::LookupResponse { request: 1, entry },
        Message::List { request: 1, after: "" },
        Message::ListResponse(DirectoryList::new(1, false, &[])),
        Message::Revoke { request: 1, subject },
        Message::Listening,
        Message::NotListening,
        Message::Settings(Session::<Clear>::settings()),
        Message::Close { reason: None },
        Message::KeyUpdate,
        Message::Publish { request: 1, bundle },
        Message::Wrap { request: 1, to: [5; 16], wrap: &[12; 4], bundle },
        Message::WrapDelivery { from: [5; 16], wrap: &[12; 4], bundle },
        Message::Done { request: 1 },
        Message::Refused { request: 1, reason: Reason::Rate, retry_after: Some(1) },
    ];
    // One more variant is there for what only hosts read, and for what nobody does.
    let source = include_str!("../../core/src/wire/message.rs");
    let listed = source.split("catalogue! {\n    ///").nth(1).unwrap().split("\n}\n").next().unwrap();
    let listed = listed.matches(" = 0x").count();
    assert_eq!(messages.len(), listed, "each message of the catalogue is here");
    let mut payloads: Vec<Vec<u8>> = Vec::new();
    let mut push = |message: &Message<'_>| {
        let mut out = [0; 1024];
        let len = message.encode(&mut out).unwrap();
        assert_eq!(Message::decode(&out[..len]).as_ref(), Ok(message));
        payloads.push(out[..len].to_vec());
    };
    messages.iter().for_each(&mut push);
    let mut buffer = [0; 1024];
    let enrol =
        Enrol { request: 1, index: 0, count: 1, id: [6; 16], name: "s-1", modulus: &[7; 256], signature: &[8; 256] };
    push(&enrol.encode(&mut buffer).unwrap());
    payloads.extend(
        [
            Rotate::CODE,
            SuccessorQuery::CODE,
            Watch::CODE,
            Unwatch::CODE,
            WatchResponse::CODE,
            Changed::CODE,
            Channels::CODE,
            ChannelsResponse::CODE,
            ExpireChannels::CODE,
            0x0000,
            0xffff,
        ]
        .map(|code: u16| code.to_be_bytes().to_vec()),
    );
    payloads.extend([vec![], vec![0x08]]);
    payloads
}

pub(crate) fn application(payload: &[u8], sequence: u16) -> Vec<u8> {
    let len = u16::try_from(payload.len() + 24).unwrap();
    let mut bytes = [[1, 0, 3, 0], [0; 4]].concat();
    bytes[4..6].copy_from_slice(&len.to_be_bytes());
    bytes[6..8].copy_from_slice(&sequence.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&[0; 16]);
    bytes
}

/// What an application payload comes to, sealed as it should be, where application records may come.
pub(crate) fn said(stage: Stage, payload: &[u8]) -> Verdict {
    let decoded = Message::decode(payload);
    let unexpected = Verdict::Fails(PeerError::UnexpectedMessage.into());
    match (stage, payload.first_chunk()) {
        (Stage::AwaitSettings, Some(code)) if *code != [0x07, 0x20] => unexpected,
        (Stage::AwaitSettings, _) => match decoded {
            Ok(Message::Settings(_)) => Verdict::Taken(Said::Connected),
            Ok(_) => unexpected,
            Err(error) => Verdict::Fails(error),
        },
        (_, Some([8, 0x21])) if decoded.is_ok() => Verdict::Taken(Said::Closed),
        (_, Some([8, 0x22])) if decoded.is_ok() => Verdict::Taken(Said::Progress),
        (_, Some([8, 0x21 | 0x22])) => Verdict::Fails(Error::Decode),
        // Whether it is a message that this side takes is for whoever reads it.
        _ => Verdict::Taken(Said::Message),
    }
}

#[test]
fn every_message_in_every_state_by_a_peer_with_the_keys() {
    let (mut cases, mut demanded) = (0, 0);
    let payloads = catalogue();
    for kind in Kind::ALL {
        let session = Session::<Clear>::new(kind, (1, 2));
        for stage in Stage::of(kind) {
            // Each as it is, without its last byte, and with one more.
            demanded += 3 * payloads.len();
            for payload in &payloads {
                let shorter = &payload[..payload.len().saturating_sub(1)];
                let longer = [&payload[..], &[0xff]].concat();
                for payload in [payload, shorter, &longer] {
                    let sequence =
                        u16::from(matches!(stage, Stage::Established(Side::Client) | Stage::Closed(Side::Client)));
                    let mut bytes = application(payload, sequence);
                    let expected = match stage.ended() {
                        Some(error) => Verdict::Fails(error),
                        None if awaited(stage).is_empty() => Verdict::Wait,
                        None if awaited(stage).iter().all(|(code, ..)| *code != 0x0300) => {
                            Verdict::Fails(PeerError::UnexpectedMessage.into())
                        }
                        None => said(stage, payload),
                    };
                    let case = (kind, stage, payload);
                    let mut victim = session.at(stage);
                    assert_eq!(receive(&mut victim, &mut bytes), expected, "{case:?}");
                    match expected {
                        Verdict::Fails(error) => assert_dead(&mut victim, error, &case),
                        Verdict::Wait => goes_on(&session, stage, victim, &case),
                        // The payload as it was sent, and the connection has gone on by one record.
                        Verdict::Taken(Said::Message) => {
                            let mut again = application(payload, sequence + 1);
                            let Ok(Received::Record { used, event: Event::Message(told) }) = victim.receive(&mut again)
                            else {
                                panic!("{case:?}: a message")
                            };
                            assert_eq!((used, &*told), (payload.len() + 24, payload), "{case:?}");
                        }
                        _ => {}
                    }
                    cases += 1;
                }
            }
        }
    }
    println!("{cases} messages in states");
    assert!(cases >= demanded && demanded > 9_000, "{cases} of {demanded}");
}

#[test]
fn every_code_is_passed_on_or_refused() {
    let session = Session::<Clear>::new(Kind::Key, (1, 2));
    let mut victim = session.at(Stage::Established(Side::Server));
    let mut sequence = 0;
    let mut cases = 0;
    for code in 0..=u16::MAX {
        cases += 1;
        if matches!(code, 0x0821 | 0x0822) {
            continue;
        }
        let mut bytes = application(&code.to_be_bytes(), sequence);
        assert_eq!(receive(&mut victim, &mut bytes), Verdict::Taken(Said::Message), "{code:04x}");
        let known = Message::decode(&code.to_be_bytes()).map(|message| message.code());
        assert!(matches!(known, Ok(told) if told == code) || known == Err(Error::Decode), "{code:04x}");
        sequence = sequence.wrapping_add(1);
    }
    println!("{cases} codes");
    assert_eq!(cases, 65_536);
}

/// The calls there are, and what each comes to in each state.
#[derive(Clone, Copy, Debug)]
enum Call {
    Transmit,
    Verified,
    SignClient,
    SignServer,
    Bind,
    AnswerOffer,
    Accept,
    Refuse,
    Send,
    SendClose,
    SendSealed,
    Close,
    UpdateKey,
    EndOfStream,
    MaxPayload,
    Exporter,
}

const CALLS: [Call; 16] = [
    Call::Transmit,
    Call::Verified,
    Call::SignClient,
    Call::SignServer,
    Call::Bind,
    Call::AnswerOffer,
    Call::Accept,
    Call::Refuse,
    Call::Send,
    Call::SendClose,
    Call::SendSealed,
    Call::Close,
    Call::UpdateKey,
    Call::EndOfStream,
    Call::MaxPayload,
    Call::Exporter,
];

fn call(session: &Real, connection: &mut Connection, call: Call, out: &mut [u8]) -> Result<(), Error> {
    // A claim of this session, for the calls that want one, opened by a server of its own.
    let mut bytes = session.record(Name::ClientAuth).to_vec();
    match call {
        Call::Transmit => connection.transmit(out).map(|_| ()),
        Call::Verified => session.verified(connection),
        Call::SignClient => session.sign(connection, &[1; 256], out).map(|_| ()),
        Call::SignServer => connection.sign_server(public(&SERVER), &[1; 256], out).map(|_| ()),
        Call::Bind => {
            let mut other;
            let donor = if session.kind.is_full() { session } else { &Real::new(Kind::Key, (1, 2)) };
            if !session.kind.is_full() {
                bytes = donor.record(Name::ClientAuth).to_vec();
            }
            other = donor.at(Stage::AwaitClientAuth);
            let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = other.receive(&mut bytes) else {
                panic!("a claim")
            };
            connection.bind(&claim, &public(&ALICE).fingerprint()).map(|_| ())
        }
        Call::AnswerOffer => connection.answer_offer(None, out).map(|_| ()),
        Call::Accept => connection.accept(&Settings::default(), out).map(|_| ()),
        Call::Refuse => connection.refuse(Reason::Rate, 0, out).map(|_| ()),
        Call::Send => connection.send(&Message::Listening, out).map(|_| ()),
        Call::SendClose => connection.send(&Message::KeyUpdate, out).map(|_| ()),
        Call::SendSealed => connection.send_sealed(Rungs::NONE, 9, out, |_| Ok::<_, Error>(())).map(|_| ()),
        Call::Close => connection.close(None, out).map(|_| ()),
        Call::UpdateKey => connection.update_key(out).map(|_| ()),
        Call::EndOfStream => connection.end_of_stream(),
        Call::MaxPayload => connection.max_payload().map(|_| ()),
        Call::Exporter => connection.exporter().map(|_| ()),
    }
}

fn comes_to(call: Call, stage: Stage) -> Result<(), Error> {
    let established =
        matches!(stage, Stage::Established(_) | Stage::Closed(_) | Stage::PeerClosed(_) | Stage::BothClosed(_));
    let not_asked = Err(ApiMisuse::NotAsked.into());
    let asked_in = |stages: &[Stage]| if stages.contains(&stage) { Ok(()) } else { not_asked };
    match (call, stage.ended()) {
        (Call::MaxPayload | Call::Exporter, _) if established => Ok(()),
        (Call::MaxPayload | Call::Exporter, _) => Err(ApiMisuse::NotConnected.into()),
        (Call::EndOfStream, _) if stage == Stage::Refused(Side::Server) => Ok(()),
        (_, Some(error)) => Err(error),
        (Call::Transmit, _) => Ok(()),
        (Call::Verified, _) => asked_in(&[Stage::VerifyServer]),
        (Call::SignClient, _) => asked_in(&[Stage::SignClient]),
        (Call::SignServer, _) => asked_in(&[Stage::SignServer]),
        (Call::Bind, _) => asked_in(&[Stage::CheckClient, Stage::Bound]),
        (Call::AnswerOffer, _) => asked_in(&[Stage::CheckChannel]),
        (Call::Accept, _) => asked_in(&[Stage::Bound, Stage::Returned]),
        (Call::Refuse, _) => asked_in(&[Stage::CheckClient, Stage::Bound, Stage::Returned]),
        (Call::EndOfStream, _) => match stage {
            Stage::PeerClosed(_) | Stage::BothClosed(_) => Ok(()),
            _ => Err(PeerError::Truncated.into()),
        },
        _ if !established => Err(ApiMisuse::NotConnected.into()),
        (_, _) if matches!(stage, Stage::Closed(_) | Stage::BothClosed(_)) => Err(ApiMisuse::Closed.into()),
        (Call::SendClose, _) => Err(ApiMisuse::InvalidArgument.into()),
        _ => Ok(()),
    }
}

#[test]
fn every_call_in_every_state_does_its_work_or_names_the_misuse_and_changes_nothing() {
    let (mut cases, mut demanded) = (0, 0);
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        for stage in Stage::of(kind) {
            demanded += CALLS.len();
            for what in CALLS {
                let case = (kind, stage, what);
                let mut connection = session.at(stage);
                let expected = comes_to(what, stage);
                let mut out = [0; 2048];
                assert_eq!(call(&session, &mut connection, what, &mut out), expected, "{case:?}");
                match expected {
                    Err(Error::Misuse(_)) if stage.ended().is_none() => {
                        assert_eq!(out, [0; 2048], "{case:?}: not a byte");
                        goes_on(&session, stage, connection, &case);
                    }
                    Err(error) if stage.ended().is_none() => assert_dead(&mut connection, error, &case),
                    _ => {}
                }
                cases += 1;
            }
        }
    }
    println!("{cases} calls in states");
    assert!(cases >= demanded && demanded > 1_500, "{cases} of {demanded}");
}

#[test]
fn every_length_of_a_buffer_that_is_too_short_is_told_and_changes_nothing() {
    let (mut cases, mut demanded) = (0, 0);
    let full = Err(BufferError::TxFull.into());
    let established = Stage::Established(Side::Client);
    for kind in Kind::ALL {
        let session = Real::new(kind, (1, 2));
        let [client_hello, server_hello, server_auth, client_auth, _, refusal] = kind.lengths();
        let answer = server_hello + server_auth;
        let resumed = if kind.is_full() { 0 } else { answer };
        for (what, stage, needed) in [
            (Call::Transmit, Stage::Start, client_hello),
            (Call::AnswerOffer, Stage::CheckChannel, resumed),
            (Call::SignServer, Stage::SignServer, answer),
            (Call::SignClient, Stage::SignClient, client_auth),
            (Call::Transmit, Stage::OweFinished, client_auth),
            (Call::Accept, if kind.is_full() { Stage::Bound } else { Stage::Returned }, 24 + 2 + 16 + 5 + 8),
            (Call::Refuse, if kind.is_full() { Stage::CheckClient } else { Stage::Returned }, refusal),
            (Call::Send, established, 26),
            (Call::SendSealed, established, 24 + 3 + 9),
            (Call::Close, established, 27),
            (Call::UpdateKey, established, 26),
        ] {
            if !stage.is_of(kind) {
                continue;
            }
            demanded += needed;
            let mut connection = session.at(stage);
            let call = |connection: &mut Connection, out: &mut [u8]| match what {
                Call::AnswerOffer => {
                    let held = (kind == Kind::Resumed).then(Session::<Clear>::channel);
                    connection.answer_offer(held.as_ref(), out).map(|_| ())
                }
                _ => call(&session, connection, what, out),
            };
            for room in 0..needed {
                assert_eq!(call(&mut connection, &mut vec![0; room]), full, "{kind:?} {what:?} {room}");
                cases += 1;
            }
            assert_eq!(call(&mut connection, &mut vec![0; needed]), Ok(()), "{kind:?} {what:?} {needed}");
        }
    }
    println!("{cases} buffers that are too short");
    assert!(cases >= demanded && demanded > 4_000, "{cases} of {demanded}");
}

#[test]
fn the_catalogue_ends_where_it_says() {
    // What is not in it is passed on as it is.
    let Ok(Message::Other(body)) = Message::decode(&[0x7f, 0xff, 1, 2]) else { panic!("an unknown message") };
    let _: Body<'_> = body;
    assert_eq!((body.code(), body.bytes()), (0x7fff, &[1, 2][..]));
}
