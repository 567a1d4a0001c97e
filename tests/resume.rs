//! Resumption in the core: what it costs, that it is a handshake of its own, and what each side does with an offer that it
//! must not take.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use ossicle_core::{
    ApiMisuse, Ask, Channel, ClientConfig, Connection, Error, Event, Message, PeerError, Reason, Received, Secret,
    ServerConfig, Settings,
};
use ossicle_tests::{CLIENT_ID, Pair, SERVER_ID, public, seed, settings};

fn issuing(id: u8) -> Settings {
    Settings { channel: [id; 16], store_epoch: [9; 8], ..settings() }
}

/// A pair that has had a full handshake, and its channel at both ends.
fn acquainted() -> (Pair, Channel, Channel) {
    let mut pair = Pair::new();
    pair.connect();
    let (client, server) = (pair.client.take_channel().unwrap(), pair.server.take_channel().unwrap());
    same(&client, &server);
    assert!(pair.client.take_channel().is_none() && pair.server.take_channel().is_none(), "once");
    (pair, client, server)
}

fn same(a: &Channel, b: &Channel) {
    assert_eq!(a.secret.expose(), b.secret.expose());
    assert_eq!((a.id, a.client, a.client_key, a.key_epoch), (b.id, b.client, b.client_key, b.key_epoch));
    assert_eq!((a.server, a.server_key), (b.server, b.server_key));
}

/// A message in each direction.
fn talk(pair: &mut Pair) {
    let mut out = [0; 256];
    let len = pair.client.send(&Message::Status { request: 7 }, &mut out).unwrap();
    let event = pair.server.receive(&mut out[..len]).unwrap();
    assert!(matches!(event, Received::Record { event: Event::Message(_), .. }));
    let len = pair.server.send(&Message::StatusResponse { request: 7 }, &mut out).unwrap();
    let event = pair.client.receive(&mut out[..len]).unwrap();
    assert!(matches!(event, Received::Record { event: Event::Message(_), .. }));
}

#[test]
fn a_channel_is_resumed_again_and_again_in_two_hundred_bytes_each_way() {
    let (mut pair, mut client, mut server) = acquainted();
    assert_eq!((server.client, server.server, server.key_epoch), (CLIENT_ID, SERVER_ID, 0));
    assert_eq!(server.client_key, public(&pair.client_key).fingerprint());
    assert!(!pair.client.is_resumed() && !pair.server.is_resumed());
    let mut secrets = vec![*client.secret.expose()];
    for round in 1..5 {
        pair.reconnect(client, (10 + round, 20 + round));
        assert!(pair.offer(|id| (id == server.id).then_some(server)).unwrap());
        pair.client_resumes().unwrap();
        pair.server_resumes(&issuing(round)).unwrap();
        assert_eq!(pair.client_settings().unwrap(), issuing(round));
        assert!(pair.client.is_resumed() && pair.server.is_resumed());
        talk(&mut pair);
        let (up, down): (usize, usize) = (pair.up.records.iter().sum(), pair.down.records.iter().sum());
        println!("resumption: {up} bytes up {:?}, {down} down {:?}", pair.up.records, pair.down.records);
        assert!(up <= 200 && down <= 200);
        assert_eq!(pair.client.exporter().unwrap().expose(), pair.server.exporter().unwrap().expose());
        client = pair.client.take_channel().unwrap();
        server = pair.server.take_channel().unwrap();
        same(&client, &server);
        assert_eq!(client.id, [round; 16]);
        assert!(!secrets.contains(client.secret.expose()), "each channel has a secret of its own");
        secrets.push(*client.secret.expose());
    }
}

#[test]
fn what_cannot_be_resumed_goes_on_as_a_full_handshake_on_the_same_connection() {
    let (pair, client, held) = acquainted();
    let other = |change: &dyn Fn(&mut Channel)| {
        let mut other = held.clone();
        change(&mut other);
        Some(other)
    };
    let cases = [
        ("unknown, expired or revoked", None),
        ("another secret", other(&|channel| channel.secret = Secret::new([1; 32]))),
        ("all zeros, as for none", other(&|channel| channel.secret = Secret::new([0; 32]))),
        ("another channel", other(&|channel| channel.id = [7; 16])),
        ("issued by another server", other(&|channel| channel.server = [7; 16])),
        ("issued under another key of this server", other(&|channel| channel.server_key = [7; 32])),
    ];
    let mut pair = pair;
    for (case, held) in cases {
        pair.reconnect(client.clone(), (30, 31));
        assert!(!pair.offer(|_| held).unwrap(), "{case}");
        assert!(pair.down.bytes.is_empty(), "{case}: nothing is said before the server has signed");
        let Some(Ask::Sign(statement)) = pair.server.ask() else { panic!("{case}: a signature is due") };
        let signature = pair.server_key.sign(&statement).unwrap();
        let mut out = [0; 2048];
        let len = pair.server.sign_server(public(&pair.server_key), &signature, &mut out).unwrap();
        assert_eq!(out[8], 2, "{case}: mode");
        pair.down.bytes.extend_from_slice(&out[..len]);
        let credentials = pair.credentials();
        pair.client_auth(&credentials).unwrap();
        pair.server_accept().unwrap();
        pair.client_settings().unwrap();
        assert!(!pair.client.is_resumed() && !pair.server.is_resumed(), "{case}");
        same(&pair.client.take_channel().unwrap(), &pair.server.take_channel().unwrap());
        talk(&mut pair);
    }
}

#[test]
fn a_client_takes_no_other_mode_than_its_offer_allows() {
    let (mut pair, client, held) = acquainted();
    pair.reconnect(client, (40, 41));
    pair.offer(|_| Some(held)).unwrap();
    for (mode, expected) in [(0, PeerError::Version.into()), (3, Error::Decode)] {
        let config = ClientConfig {
            server: Some(public(&pair.server_key).fingerprint()),
            ask_for_key: false,
            record_limit: 16_408,
        };
        let (_, channel, _) = acquainted();
        let mut connection: Connection = Connection::resume(config, channel, &seed(40)).unwrap();
        connection.transmit(&mut [0; 256]).unwrap();
        let mut hello = pair.down.bytes[..79].to_vec();
        hello[8] = mode;
        assert!(matches!(connection.receive(&mut hello), Err(error) if error == expected), "{mode}");
        // Modes 1 and 2 answer an offer, and here there is none.
        if mode == 0 {
            for mode in [1, 2] {
                let mut connection: Connection = Connection::client(config, &seed(40));
                connection.transmit(&mut [0; 256]).unwrap();
                hello[8] = mode;
                let refused = connection.receive(&mut hello);
                assert!(matches!(refused, Err(error) if error == PeerError::Version.into()), "{mode}");
            }
        }
    }
    // Mode 2 where the server answered 1: the keys differ, and the record behind it does not open.
    let mut bytes = pair.down.bytes.clone();
    bytes[8] = 2;
    pair.client.receive(&mut bytes[..79]).unwrap();
    assert!(matches!(pair.client.receive(&mut bytes[79..]), Err(Error::Crypto)));
}

#[test]
fn every_flipped_bit_of_a_resumption_ends_it() {
    let mut cases = 0;
    let (mut pair, client, held) = acquainted();
    for record in 0..4 {
        for bit in 0.. {
            pair.reconnect(client.clone(), (50, 51));
            let held = held.clone();
            let flip = |bytes: &mut Vec<u8>, offset: usize, end: usize| {
                let place = bytes[offset..end].get_mut(bit / 8)?;
                *place ^= 1 << (bit % 8);
                Some(())
            };
            // A flipped bit of the hello makes its binder wrong, or the hello malformed: no channel is resumed with it.
            if record == 0 {
                let mut out = [0; 256];
                let len = pair.client.transmit(&mut out).unwrap();
                let mut hello = out[..len].to_vec();
                if flip(&mut hello, 0, len).is_none() {
                    assert_eq!(bit, 132 * 8);
                    break;
                }
                cases += 1;
                match pair.server.receive(&mut hello) {
                    Ok(Received::Record { event: Event::CheckChannel(id), .. }) => {
                        let held = (id == held.id).then_some(held);
                        assert_eq!(pair.server.answer_offer(held.as_ref(), &mut [0; 512]), Ok(0), "bit {bit}");
                    }
                    Ok(Received::Record { event, .. }) => {
                        panic!("bit {bit}: an offer, or an error, not {:?}", core::mem::discriminant(&event))
                    }
                    // A length field that names more than there is waits for it; in vain, and not for long.
                    Ok(Received::Need(len)) => assert!(len > hello.len(), "bit {bit}"),
                    Ok(Received::Wait) => panic!("bit {bit}"),
                    Err(error) => assert!(matches!(error, Error::Decode | Error::Peer(_)), "bit {bit}: {error}"),
                }
                continue;
            }
            assert!(pair.offer(|_| Some(held)).unwrap());
            if record < 3 {
                let (offset, end) = if record == 1 { (0, 79) } else { (79, 79 + 56) };
                if flip(&mut pair.down.bytes, offset, end).is_none() {
                    break;
                }
                cases += 1;
                let mut bytes = pair.down.bytes.clone();
                let ended = match pair.client.receive(&mut bytes[..79]) {
                    Err(_) => true,
                    Ok(Received::Need(_)) => true,
                    Ok(_) => matches!(pair.client.receive(&mut bytes[79..]), Err(_) | Ok(Received::Need(_))),
                };
                assert!(ended, "record {record}, bit {bit}");
                assert_eq!(pair.client.transmit(&mut [0; 256]).unwrap_or_default(), 0, "nothing is proved to it");
            } else {
                pair.client_resumes().unwrap();
                let end = pair.up.bytes.len();
                if flip(&mut pair.up.bytes, 0, end).is_none() {
                    assert_eq!(bit, 58 * 8);
                    break;
                }
                cases += 1;
                let mut bytes = pair.up.bytes.clone();
                assert!(
                    matches!(pair.server.receive(&mut bytes), Err(_) | Ok(Received::Need(_))),
                    "record {record}, bit {bit}"
                );
                assert!(pair.server.accept(&settings(), &mut [0; 256]).is_err());
            }
        }
    }
    println!("{cases} flipped bits");
    assert_eq!(cases, (132 + 79 + 56 + 58) * 8);
}

#[test]
fn a_replayed_hello_proves_nothing() {
    let (mut pair, client, held) = acquainted();
    pair.reconnect(client, (60, 61));
    let mut out = [0; 256];
    let len = pair.client.transmit(&mut out).unwrap();
    let hello = out[..len].to_vec();
    let mut answers = Vec::new();
    for round in 0..2 {
        let mut server: Connection = Connection::server(server_config(&pair), &seed(62 + round));
        server.receive(&mut hello.clone()).unwrap();
        let mut out = [0; 512];
        let len = server.answer_offer(Some(&held), &mut out).unwrap();
        assert!(len > 0, "the binder is right, and that is all");
        assert!(server.accept(&settings(), &mut [0; 256]).is_err(), "not before the Finished");
        assert!(server.take_channel().is_none());
        answers.push((server, out[..len].to_vec()));
    }
    // The Finished for one of the two is none for the other.
    let (first, mut second) = (answers.remove(0), answers.remove(0));
    pair.client.receive(&mut first.1.clone()).unwrap();
    pair.client.receive(&mut first.1.clone()[79..]).unwrap();
    let len = pair.client.transmit(&mut out).unwrap();
    assert!(matches!(second.0.receive(&mut out[..len]), Err(Error::Crypto)), "spliced");
}

#[test]
fn what_one_side_said_is_not_taken_back_by_it() {
    let (mut pair, client, held) = acquainted();
    pair.reconnect(client, (70, 71));
    pair.offer(|_| Some(held)).unwrap();
    let answer = pair.down.bytes.clone();
    pair.client_resumes().unwrap();
    let finished = pair.up.bytes.clone();
    // The server's own Finished, and the client's, each back to its sender.
    assert!(pair.server.receive(&mut answer.clone()[79..]).is_err());
    assert!(pair.client.receive(&mut finished.clone()).is_err());
}

#[test]
fn a_resumed_client_can_still_be_refused() {
    let (mut pair, client, held) = acquainted();
    pair.reconnect(client, (80, 81));
    pair.offer(|_| Some(held)).unwrap();
    pair.client_resumes().unwrap();
    let mut bytes = core::mem::take(&mut pair.up.bytes);
    assert!(matches!(pair.server.receive(&mut bytes), Ok(Received::Record { event: Event::Resumed, .. })));
    let mut out = [0; 64];
    let len = pair.server.refuse(Reason::Unauthorised, 0, &mut out).unwrap();
    let refused = PeerError::Refused { reason: Reason::Unauthorised, retry_after: 0 };
    assert!(matches!(pair.client.receive(&mut out[..len]), Err(error) if error == refused.into()));
}

#[test]
fn ends_that_think_of_other_ends_have_a_broken_resumption_and_no_other_server() {
    type Change = fn(&mut Channel);
    let changes: [(&str, Change); 4] = [
        ("client", |channel| channel.client[0] ^= 1),
        ("client's key", |channel| channel.client_key[31] ^= 1),
        ("key epoch", |channel| channel.key_epoch += 1),
        ("server", |channel| channel.server[0] ^= 1),
    ];
    for (what, change) in changes {
        let (mut pair, mut client, held) = acquainted();
        change(&mut client);
        pair.reconnect(client, (70, 71));
        pair.offer(|_| Some(held)).unwrap();
        // Who has the secret of the channel opens the record; that says nothing about whose key is the pinned one.
        assert_eq!(pair.client_resumes().err(), Some(Error::Crypto), "{what}");
        assert_eq!(pair.client.transmit(&mut [0; 64]), Err(Error::Crypto), "{what}: not a byte");
    }
}

#[test]
fn a_channel_is_offered_to_its_own_server_only_and_issued_only_by_settings() {
    let (mut pair, client, held) = acquainted();
    for server in [None, Some([1; 32])] {
        let config = ClientConfig { server, ask_for_key: true, record_limit: 1024 };
        let refused = Connection::<ossicle_core::RustCrypto>::resume(config, client.clone(), &seed(90));
        assert_eq!(refused.err(), Some(ApiMisuse::InvalidArgument.into()));
    }
    pair.reconnect(client, (91, 92));
    assert_eq!(pair.server.answer_offer(None, &mut [0; 256]), Err(ApiMisuse::NotAsked.into()));
    pair.offer(|_| Some(held)).unwrap();
    pair.client_resumes().unwrap();
    pair.server_resumes(&Settings { valid_for: 0, ..settings() }).unwrap();
    pair.client_settings().unwrap();
    assert!(pair.client.take_channel().is_none() && pair.server.take_channel().is_none());
    assert!(pair.client.is_resumed());
}

fn server_config(pair: &Pair) -> ServerConfig {
    ServerConfig { id: SERVER_ID, fingerprint: public(&pair.server_key).fingerprint(), record_limit: 16_408 }
}
