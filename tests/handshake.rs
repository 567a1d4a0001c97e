//! The handshake at work: sizes, both methods, refusals, and what each side does with bytes it must not take.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use ossicle_core::{
    BufferError, ClientClaim, ClientConfig, Connection, Credentials, Error, Event, Message, PeerError, Reason,
    Received, Secret, Token, token_verifier,
};
use ossicle_tests::{CLIENT_ID, Pair, keys, public, seed, settings};

#[test]
fn a_full_handshake_fits_its_budget() {
    let mut pair = Pair::new();
    assert_eq!(pair.connect(), settings());
    let total: usize = pair.up.records.iter().chain(&pair.down.records).sum();
    println!("2048/2048: up {:?}, down {:?}, {total} bytes", pair.up.records, pair.down.records);
    assert!(total <= 900, "{total} bytes");

    let mut pair = Pair::with_keys(keys::server3072(), keys::alice(), false);
    pair.connect();
    let total: usize = pair.up.records.iter().chain(&pair.down.records).sum();
    println!("2048/3072: {total} bytes");
    assert!(total <= 1_030, "{total} bytes");
}

#[test]
fn a_first_contact_fits_its_budget() {
    let mut pair = Pair::with_keys(keys::server(), keys::alice(), true);
    let key = keys::alice();
    let token = Token { id: [7; 8], secret: Secret::new([9; 16]) };
    let credentials =
        Credentials::Enroll { id: CLIENT_ID, name: "sensor-00001", key: public(&key), token: Some(&token) };
    pair.client_hello();
    pair.server_hello().unwrap();
    pair.client_auth(&credentials).unwrap();

    let mut bytes = core::mem::take(&mut pair.up.bytes);
    let Received::Record { event: Event::CheckClient(claim), .. } = pair.server.receive(&mut bytes).unwrap() else {
        panic!("a claim to check");
    };
    // A claim outlives its record.
    let kept = claim.bytes().to_vec();
    let claim = ClientClaim::decode(&kept).unwrap();
    assert!(!pair.server.proves(&claim, token_verifier(&token.secret).expose()), "not bound yet");
    pair.server.bind(&claim, &public(&key).fingerprint()).unwrap();
    assert!(pair.server.proves(&claim, token_verifier(&token.secret).expose()));
    assert!(!pair.server.proves(&claim, token_verifier(&Secret::new([8; 16])).expose()));
    let mut out = [0; 256];
    let len = pair.server.accept(&settings(), &mut out).unwrap();
    let total: usize = pair.up.records.iter().chain(&pair.down.records).sum::<usize>() + len;
    println!("first contact: {total} bytes");
    assert!(total <= 1_550, "{total} bytes");
}

#[test]
fn messages_go_both_ways_and_across_key_updates_and_a_close() {
    let mut pair = Pair::new();
    pair.connect();
    let mut out = [0; 4096];
    for request in 0..5 {
        let len = pair.client.send(&Message::Status { request }, &mut out).unwrap();
        let updated = pair.client.update_key(&mut out[len..]).unwrap();
        let mut bytes = out[..len + updated].to_vec();
        let Received::Record { used, event: Event::Message(payload) } = pair.server.receive(&mut bytes).unwrap() else {
            panic!("a message");
        };
        assert_eq!(Message::decode(payload), Ok(Message::Status { request }));
        assert!(matches!(pair.server.receive(&mut bytes[used..]), Ok(Received::Record { event: Event::Progress, .. })));
    }
    let len = pair.server.close(Some(Reason::TakenOver), &mut out).unwrap();
    let closed = pair.client.receive(&mut out[..len]);
    assert!(matches!(closed, Ok(Received::Record { event: Event::Closed(Some(Reason::TakenOver)), .. })));
    assert_eq!(pair.client.end_of_stream(), Ok(()));
    assert_eq!(pair.server.end_of_stream(), Err(PeerError::Truncated.into()));
}

#[test]
fn a_wrong_server_key_is_named_and_nothing_of_the_client_is_sent() {
    for ask_for_key in [false, true] {
        let mut pair = Pair::with_keys(keys::server(), keys::alice(), ask_for_key);
        let fingerprint = public(&keys::bob()).fingerprint();
        let config = ClientConfig { server: Some(fingerprint), ask_for_key, record_limit: 1024 };
        pair.client = Connection::client(config, &seed(3));
        pair.client_hello();
        pair.server_hello().unwrap();
        let credentials = pair.credentials();
        assert_eq!(pair.client_auth(&credentials), Err(PeerError::ServerKey.into()));
        assert_eq!(pair.client.transmit(&mut [0; 64]), Err(PeerError::ServerKey.into()), "sticky");
        assert_eq!(pair.up.records.len(), 1, "only the hello went out");
    }
}

#[test]
fn a_refusal_is_sealed_and_typed() {
    let mut pair = Pair::new();
    pair.client_hello();
    pair.server_hello().unwrap();
    let credentials = pair.credentials();
    pair.client_auth(&credentials).unwrap();
    let mut bytes = core::mem::take(&mut pair.up.bytes);
    let Received::Record { event: Event::CheckClient(claim), .. } = pair.server.receive(&mut bytes).unwrap() else {
        panic!("a claim to check");
    };
    // The id is known, but under another key: from here on this is an unknown client like any other.
    assert_eq!(pair.server.bind(&claim, &[0; 32]), Err(Error::Crypto));
    let mut out = [0; 64];
    assert!(pair.server.accept(&settings(), &mut out).is_err(), "an unbound claim is never accepted");
    let len = pair.server.refuse(Reason::Unauthorised, 0, &mut out).unwrap();
    let refused = PeerError::Refused { reason: Reason::Unauthorised, retry_after: 0 };
    assert!(matches!(pair.client.receive(&mut out[..len]), Err(error) if error == refused.into()));
}

#[test]
fn an_all_zero_exchange_key_ends_the_connection() {
    let mut pair = Pair::new();
    pair.client_hello();
    let hello = pair.up.bytes.len();
    pair.up.bytes[hello - 34..hello - 2].fill(0);
    assert_eq!(pair.server_hello(), Err(Error::Crypto));
}

#[test]
fn headers_are_judged_before_anything_is_waited_for() {
    let mut pair = Pair::new();
    pair.client_hello();
    let good = pair.up.bytes.clone();
    for (index, value) in [(0, 2), (2, 3), (4, 0xff), (7, 1)] {
        let mut pair = Pair::new();
        let mut bytes = good.clone();
        bytes[index] = value;
        assert!(pair.server.receive(&mut bytes).is_err(), "byte {index}");
    }
    let mut pair = Pair::new();
    assert!(matches!(pair.server.receive(&mut [0; 3]), Ok(Received::Need(8))));
    let mut head = good[..8].to_vec();
    assert!(matches!(pair.server.receive(&mut head), Ok(Received::Need(len)) if len == good.len()));
}

#[test]
fn replayed_reordered_and_cut_records_end_the_connection() {
    let records = |pair: &mut Pair| {
        let mut records = Vec::new();
        for request in 0..3 {
            let mut out = [0; 128];
            let len = pair.client.send(&Message::Status { request }, &mut out).unwrap();
            records.push(out[..len].to_vec());
        }
        records
    };
    for (name, order) in [("replayed", [0, 0]), ("reordered", [1, 0]), ("dropped", [0, 2])] {
        let mut pair = Pair::new();
        pair.connect();
        let records = records(&mut pair);
        let results = order.map(|index| pair.server.receive(&mut records[index].clone()).map(|_| ()));
        assert!(results.iter().any(|result| *result == Err(PeerError::UnexpectedMessage.into())), "{name}");
        assert_eq!(pair.server.send(&Message::Listening, &mut [0; 64]), Err(PeerError::UnexpectedMessage.into()));
    }
    // Its own record, reflected: the other direction has another key.
    let mut pair = Pair::new();
    pair.connect();
    let mut reflected = records(&mut pair).remove(1);
    assert!(matches!(pair.client.receive(&mut reflected), Err(Error::Crypto)));
}

#[test]
fn back_pressure_is_not_failure() {
    let mut pair = Pair::new();
    pair.connect();
    let message = Message::Send { wanted: ossicle_core::Rungs::NONE, envelope: &[1; 100] };
    for room in 0..127 {
        assert_eq!(pair.client.send(&message, &mut vec![0; room]), Err(BufferError::TxFull.into()), "{room}");
    }
    assert_eq!(pair.client.send(&message, &mut [0; 127]), Ok(127));
    let huge = Message::Send { wanted: ossicle_core::Rungs::NONE, envelope: &[1; 20_000] };
    let max = pair.client.max_payload().unwrap();
    let refused = pair.client.send(&huge, &mut vec![0; 40_000]);
    assert_eq!(refused, Err(BufferError::MessageTooLong { max }.into()));
}
