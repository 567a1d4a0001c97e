//! Every bit of every handshake record, flipped, at the side that receives it: once under the seal that is shipped, and once
//! behind it, where only a peer with the keys gets.

use ossicle::crypto::{IdentityKey, verify};
use ossicle_core::{
    Aead, ApiMisuse, Ask, ClientConfig, Connection, Error, Event, Message, PeerError, Reason, Received, Settings,
    Statement, verify_rsa,
};
use ossicle_tests::{public, seed};

use crate::rules::KNOWN;
use crate::session::{
    ALICE, Clear, Kind, LIMIT, NAME, Name, PASSWORD, Real, SERVER, Said, Session, Stage, Verdict, assert_dead, receive,
    refused,
};

const DECODE: Verdict = Verdict::Fails(Error::Decode);
const CRYPTO: Verdict = Verdict::Fails(Error::Crypto);
const UNEXPECTED: Verdict = Verdict::Fails(Error::Peer(PeerError::UnexpectedMessage));
const VERSION: Verdict = Verdict::Fails(Error::Peer(PeerError::Version));
const SERVER_KEY: Verdict = Verdict::Fails(Error::Peer(PeerError::ServerKey));
const PROGRESS: Verdict = Verdict::Taken(Said::Progress);

/// The table for headers (PROTOCOL 2.4, 2.5): a field and what its flipped bits come to. `None` behind the header.
fn of_header(name: Name, record: &[u8], bit: usize) -> Option<Verdict> {
    let (min, max) = match name {
        Name::ClientHello => (8, 256),
        Name::ServerHello => (8, 2_048),
        Name::ServerAuth => (24, 2_048),
        Name::ClientAuth => (24, 1_536),
        Name::Refusal => (29, 29),
        _ => (24, 16_408),
    };
    let field = |at: usize| {
        let mut bytes = [record[at], record[at + 1]];
        bytes[bit / 8 - at] ^= 1 << (bit % 8);
        u16::from_be_bytes(bytes)
    };
    Some(match bit / 8 {
        0..2 => DECODE,
        2..4 if KNOWN.contains(&field(2)) => UNEXPECTED,
        2..4 => DECODE,
        4..6 => match usize::from(field(4)) {
            len if len < min || len > max => DECODE,
            len if len > record.len() => Verdict::Need(len),
            _ if name.is_sealed() => CRYPTO,
            _ => DECODE,
        },
        6..8 => UNEXPECTED,
        _ => return None,
    })
}

/// The table for a whole record, under the seal that is shipped.
fn under_the_seal(kind: Kind, name: Name, record: &[u8], bit: usize) -> Verdict {
    if let Some(verdict) = of_header(name, record, bit) {
        return verdict;
    }
    let flipped = record[bit / 8] ^ 1 << (bit % 8);
    match name {
        Name::ClientHello => {
            let hello = Verdict::Taken(if kind.offers() { Said::CheckChannel } else { Said::Progress });
            match bit / 8 {
                8 | 11 => DECODE,            // how many versions, suites
                9..11 | 12..14 => VERSION,   // which
                14 if flipped < 4 => DECODE, // record limit
                14..16 => hello,
                16 if flipped == 1 => VERSION, // role
                16 => DECODE,
                17 if flipped <= 1 => hello, // flags
                17 => DECODE,
                18..82 => hello,  // random, exchange key
                82..84 => DECODE, // cookie, offer
                _ => hello,       // channel, binder
            }
        }
        Name::ServerHello => match bit / 8 {
            8 if flipped <= 2 => VERSION, // another mode
            8 => DECODE,
            9..13 => VERSION,            // version, suite
            13 if flipped < 4 => DECODE, // record limit
            _ => PROGRESS,               // random, exchange key
        },
        _ => CRYPTO,
    }
}

/// Flips each bit of `record` in turn, at a new victim in the state that waits for it, and compares with the table. Returns
/// the number of cases. `then` sees what a table takes, to say what becomes of it.
fn flip<A: Aead>(
    session: &Session<A>,
    name: Name,
    bits: core::ops::Range<usize>,
    table: impl Fn(&[u8], usize) -> Verdict,
    then: impl Fn(Connection<A>, Said, &[u8]),
) -> usize {
    let record = session.record(name);
    let mut cases = 0;
    for bit in bits {
        let case = (session.kind, name, bit / 8, bit % 8);
        let mut bytes = record.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let hostile = bytes.clone();
        let expected = table(record, bit);
        let mut victim = session.at(name.awaited_in());
        assert_eq!(receive(&mut victim, &mut bytes), expected, "{case:?}");
        match expected {
            Verdict::Fails(error) => assert_dead(&mut victim, error, &case),
            Verdict::Need(len) => {
                // It waits, and nothing has changed: the honest record is still taken.
                let honest = receive(&mut victim, &mut record.to_vec());
                let expected = if name == Name::Refusal { Verdict::Fails(refused()) } else { honest };
                assert!(matches!(honest, Verdict::Taken(_)) || honest == expected, "{case:?}: {honest:?}");
                // What it waits for does not come: whatever fills the length is none of it.
                let mut victim = session.at(name.awaited_in());
                bytes.resize(len, 0);
                let filled = if name.is_sealed() { CRYPTO } else { DECODE };
                assert_eq!(receive(&mut victim, &mut bytes), filled, "{case:?}, filled");
            }
            Verdict::Taken(said) => then(victim, said, &hostile),
            Verdict::Wait => panic!("{case:?}: it waits for this record"),
        }
        cases += 1;
    }
    cases
}

/// A hello that the other side never sent was taken. Its sender finds out by the first sealed record, which is to end so.
fn hello_ends<A: Aead>(session: &Session<A>, name: Name, mut victim: Connection<A>, found: Verdict) {
    let mut out = [0; 2048];
    let mut auth = session.record(Name::ServerAuth).to_vec();
    let mut client = if name == Name::ClientHello {
        let len = session.answer_hello(&mut victim, &mut out);
        let mut client = session.at(Stage::AwaitServerHello);
        assert_eq!(receive(&mut client, &mut out[..79]), PROGRESS);
        auth = out[79..len].to_vec();
        client
    } else {
        victim
    };
    assert_eq!(receive(&mut client, &mut auth), found);
    let Verdict::Fails(error) = found else { panic!("an end") };
    assert_dead(&mut client, error, &(session.kind, name));
}

fn flip_under_the_seal(kind: Kind) {
    let session = Real::new(kind, (1, 2));
    let (mut cases, mut demanded) = (0, 0);
    for name in Name::HANDSHAKE {
        let bits = session.record(name).len() * 8;
        demanded += bits;
        let table = |record: &[u8], bit| under_the_seal(kind, name, record, bit);
        cases += flip(&session, name, 0..bits, table, |victim, _, _| hello_ends(&session, name, victim, CRYPTO));
    }
    println!("{kind:?}: {cases} flipped bits under the seal");
    assert_eq!(demanded, kind.lengths().iter().sum::<usize>() * 8);
    assert!(cases >= demanded, "{cases} of {demanded}");
}

#[test]
fn every_flipped_bit_of_method_key_ends_in_its_error() {
    flip_under_the_seal(Kind::Key);
}

#[test]
fn every_flipped_bit_of_a_handshake_that_asks_for_the_key_ends_in_its_error() {
    flip_under_the_seal(Kind::Asked);
}

#[test]
fn every_flipped_bit_of_a_first_contact_ends_in_its_error() {
    flip_under_the_seal(Kind::Enroll);
}

#[test]
fn every_flipped_bit_of_a_login_ends_in_its_error() {
    flip_under_the_seal(Kind::Password);
}

#[test]
fn every_flipped_bit_of_a_resumption_ends_in_its_error() {
    flip_under_the_seal(Kind::Resumed);
}

#[test]
fn every_flipped_bit_of_a_handshake_of_mode_two_ends_in_its_error() {
    flip_under_the_seal(Kind::Unauthorised);
}

/// The table for what is sealed in a record (PROTOCOL 3.4 to 3.7), at its receiver. `record` is the whole of it, in the clear.
fn behind_the_seal(kind: Kind, name: Name, record: &[u8], bit: usize) -> Verdict {
    let flipped = record[bit / 8] ^ 1 << (bit % 8);
    match (name, kind) {
        (Name::ServerAuth, Kind::Resumed) | (Name::ClientAuth, Kind::Resumed) => CRYPTO, // the Finished, caps under it
        (Name::ServerAuth, _) => match bit / 8 {
            24.. if kind.asks() => of_key(bit - 24 * 8).unwrap_or(SERVER_KEY),
            _ => SERVER_KEY, // id, signature, Finished: not the server that we expect
        },
        (Name::ClientAuth, Kind::Enroll) => {
            let key = 8 + 1 + 16 + 1 + NAME.len();
            match bit / 8 {
                8 | 25 => DECODE, // kind, length of the name
                at if (26..key).contains(&at) && !flipped.is_ascii() => DECODE,
                at if at >= key => of_key(bit - key * 8).unwrap_or(CRYPTO),
                _ => CRYPTO, // the Finished is over all of it, and judged at once
            }
        }
        (Name::ClientAuth, Kind::Password) => {
            let key = 8 + 1 + 16 + 1 + NAME.len();
            let password = key + 294 + 2;
            match bit / 8 {
                8 if flipped == 1 => Verdict::Taken(Said::CheckClient), // method key, to be looked up
                8 if flipped == 2 => CRYPTO,                            // method enroll, all of it
                8 | 25 => DECODE,                                       // no kind, length of the name
                at if (26..key).contains(&at) && !flipped.is_ascii() => DECODE,
                at if (key..key + 294).contains(&at) => of_key(bit - key * 8).unwrap_or(CRYPTO),
                // A longer one may end in zeros; padding is nothing else.
                at if at == password && !(PASSWORD.len()..=128).contains(&usize::from(flipped)) => DECODE,
                at if (password + 1 + PASSWORD.len()..password + 129).contains(&at) => DECODE,
                _ => CRYPTO,
            }
        }
        (Name::ClientAuth, _) if bit / 8 == 8 => DECODE, // kind
        (Name::ClientAuth, _) => Verdict::Taken(Said::CheckClient),
        (Name::Refusal, _) => {
            let mut body: [u8; 5] = record[8..13].try_into().unwrap();
            body[bit / 8 - 8] = flipped;
            let [reason, after @ ..] = body;
            match Reason::from_code(reason) {
                Some(reason) => {
                    Verdict::Fails(PeerError::Refused { reason, retry_after: u32::from_be_bytes(after) }.into())
                }
                None => DECODE,
            }
        }
        (Name::Settings, _) => match bit / 8 {
            // Every other code is another message, and none may come here.
            8..10 => UNEXPECTED,
            // Numbers of seven bits a byte: the last byte of one must not ask for another one, that ends too late or is too
            // large. In the order of the fields: channel, valid_for (3), heartbeat, timeout, time (5), waiting, store epoch.
            at if (10..26).contains(&at) || at >= 37 => Verdict::Taken(Said::Connected),
            at => {
                let mut body = record[26..record.len() - 16].to_vec();
                body[at - 26] = flipped;
                if settings(&body) { Verdict::Taken(Said::Connected) } else { DECODE }
            }
        },
        _ => panic!("{name:?} is not sealed"),
    }
}

/// Whether these are numbers of at most 32, 16, 16, 64 and 32 bits (PROTOCOL 7.1) and eight bytes.
fn settings(mut body: &[u8]) -> bool {
    for bits in [32, 16, 16, 64, 32_u32] {
        let (mut value, mut shift) = (0_u128, 0);
        loop {
            let Some((byte, rest)) = body.split_first() else { return false };
            body = rest;
            value |= u128::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift >= 7 * bits.div_ceil(7) {
                return false;
            }
        }
        if value >> bits != 0 {
            return false;
        }
    }
    body.len() == 8
}

/// A bit of a SubjectPublicKeyInfo (PROTOCOL 1.5): its head and tail are constant, and a modulus is long and odd. `None` if
/// it is still a key, another one.
fn of_key(bit: usize) -> Option<Verdict> {
    match (bit / 8, bit % 8) {
        (0..33, _) | (289..294, _) => Some(DECODE),
        (33, 7) | (288, 0) => Some(DECODE),
        _ => None,
    }
}

/// The claim of a hostile client was taken. It is bound to no key, and so let in by nobody; it can only be refused.
fn claim_ends(session: &Session<Clear>, mut victim: Connection<Clear>, hostile: &[u8]) {
    let mut server = session.at(Stage::AwaitClientAuth);
    let mut bytes = hostile.to_vec();
    let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut bytes) else {
        panic!("a claim")
    };
    let mut out = [0; 256];
    assert_eq!(victim.bind(&claim, &public(&ALICE).fingerprint()), Err(Error::Crypto));
    assert_eq!(victim.accept(&Settings::default(), &mut out), Err(ApiMisuse::NotAsked.into()));
    assert_eq!(victim.refuse(Reason::Unauthorised, 0x0102_0304, &mut out), Ok(29));
    assert_eq!(&out[..29], session.record(Name::Refusal));
}

fn flip_behind_the_seal(kind: Kind) {
    let session = Session::<Clear>::new(kind, (1, 2));
    let (mut cases, mut demanded) = (0, 0);
    for name in Name::HANDSHAKE {
        let len = session.record(name).len();
        if !name.is_sealed() {
            // Here a wrong hello is found by the Finished alone.
            demanded += len * 8;
            let table = |record: &[u8], bit| match under_the_seal(kind, name, record, bit) {
                CRYPTO => panic!("{name:?} is not sealed"),
                verdict => verdict,
            };
            cases += flip(&session, name, 0..len * 8, table, |victim, _, hostile| {
                let found = match kind {
                    // A client that asked for the key is told none, and reads the signature as one.
                    Kind::Asked | Kind::Enroll if name == Name::ClientHello && hostile[17] == 0 => DECODE,
                    // A client that the server takes for unknown gets a signature instead of a Finished: two lengths.
                    Kind::Resumed if name == Name::ServerHello => CRYPTO,
                    _ => SERVER_KEY,
                };
                hello_ends(&session, name, victim, found);
            });
            continue;
        }
        demanded += (len - 24) * 8;
        let bits = 8 * 8..(len - 16) * 8;
        let table = |record: &[u8], bit| behind_the_seal(kind, name, record, bit);
        cases += flip(&session, name, bits, table, |mut victim, said, hostile| match said {
            Said::CheckClient => claim_ends(&session, victim, hostile),
            Said::Connected => {
                // Whatever settings a server sends are its own; it is the right server.
                let Ok(Message::Settings(settings)) = Message::decode(&hostile[8..len - 16]) else {
                    panic!("settings")
                };
                assert!(settings != Session::<Clear>::settings());
                assert!(victim.is_connected());
                let issued = victim.take_channel().map(|channel| channel.id);
                assert_eq!(issued, (settings.valid_for > 0).then_some(settings.channel));
            }
            _ => panic!("{name:?} says {said:?}"),
        });
    }
    println!("{kind:?}: {cases} flipped bits behind the seal");
    assert!(cases >= demanded, "{cases} of {demanded}");
}

#[test]
fn every_bit_that_a_peer_with_the_keys_flips_ends_in_its_error() {
    for kind in Kind::ALL {
        flip_behind_the_seal(kind);
    }
}

/// Every bit of both signatures, by a peer that has everything but the key: its record opens, its Finished is right, and
/// RSA says no. The real signatures, and the real verification, in software for both sides too.
#[test]
fn every_flipped_bit_of_a_signature_is_found_by_its_verification() {
    let mut cases = 0;
    for kind in [Kind::Key, Kind::Asked, Kind::Enroll, Kind::Password, Kind::Unauthorised] {
        let session = Real::new(kind, (1, 2));
        let by_server = SERVER.sign(&asked(&session.at(Stage::SignServer))).unwrap();
        let by_client = ALICE.sign(&asked(&session.at(Stage::SignClient))).unwrap();
        let step = if kind == Kind::Key { 1 } else { 67 };
        for bit in (0..2_048).step_by(step).map(Some).chain([None]) {
            let forged = |signature: &[u8]| {
                let mut signature = signature.to_vec();
                if let Some(bit) = bit {
                    signature[bit / 8] ^= 1 << (bit % 8);
                }
                signature
            };
            server_signs(&session, &forged(&by_server), bit);
            client_signs(&session, &forged(&by_client), bit);
            cases += 2;
        }
    }
    println!("{cases} signatures, with each bit flipped and with none");
    assert!(cases >= 2 * (2_049 + 4 * (2_048 / 67 + 1)), "{cases}");
}

fn asked(connection: &Connection) -> Statement {
    let Some(Ask::Sign(statement)) = connection.ask() else { panic!("a signature is due") };
    statement
}

/// What those who are asked say of a signature, of which this bit is wrong.
fn judge(key: &'static IdentityKey, statement: &Statement, signature: &[u8], bit: Option<usize>) {
    assert_eq!(verify(key.modulus(), statement, signature), bit.is_none(), "{bit:?}");
    if bit.is_none_or(|bit| bit % 64 == 0) {
        let verdict = verify_rsa(public(key), statement, signature);
        assert_eq!(verdict, if bit.is_none() { Ok(()) } else { Err(Error::Crypto) }, "{bit:?}");
    }
}

fn server_signs(session: &Real, signature: &[u8], bit: Option<usize>) {
    let mut out = [0; 2048];
    let len = session.at(Stage::SignServer).sign_server(public(&SERVER), signature, &mut out).unwrap();
    let mut client = session.at(Stage::AwaitServerHello);
    assert_eq!(receive(&mut client, &mut out[..79]), PROGRESS);
    let Ok(Received::Record { event: Event::CheckServer(claim), .. }) = client.receive(&mut out[79..len]) else {
        panic!("a claim")
    };
    judge(&SERVER, &claim.statement, claim.signature, bit);
    // Until its user has said that the signature is right, the client says nothing of itself.
    assert_eq!((client.transmit(&mut [0; 64]), client.ask()), (Ok(0), None));
}

fn client_signs(session: &Real, signature: &[u8], bit: Option<usize>) {
    let mut out = [0; 2048];
    let mut client = session.at(Stage::SignClient);
    let len = session.sign(&mut client, signature, &mut out).unwrap();
    let mut server = session.at(Stage::AwaitClientAuth);
    let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut out[..len]) else {
        panic!("a claim")
    };
    let statement = server.bind(&claim, &public(&ALICE).fingerprint()).unwrap();
    judge(&ALICE, &statement, claim.signature(), bit);
    let mut refusal = [0; 64];
    let len = server.refuse(Reason::Unauthorised, 0x0102_0304, &mut refusal).unwrap();
    assert_eq!(receive(&mut client, &mut refusal[..len]), Verdict::Fails(refused()));
    assert_dead(&mut server, ApiMisuse::Closed.into(), &bit);
}

/// A client that trusts whoever answers: the server's key is what came, and every bit of the record is under its Finished.
#[test]
fn every_bit_of_a_key_that_is_trusted_on_first_use_is_under_the_finished() {
    let session = Session::<Clear>::new(Kind::Asked, (1, 2));
    let config = ClientConfig { server: None, ask_for_key: true, record_limit: LIMIT };
    let record = session.record(Name::ServerAuth);
    let mut cases = 0;
    let client = || {
        let mut client: Connection<Clear> = Connection::client(config, &seed(1));
        client.transmit(&mut [0; 128]).unwrap();
        assert_eq!(receive(&mut client, &mut session.record(Name::ServerHello).to_vec()), PROGRESS);
        client
    };
    for bit in 8 * 8..(record.len() - 16) * 8 {
        let mut bytes = record.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let expected = behind_the_seal(Kind::Asked, Name::ServerAuth, record, bit);
        let mut victim = client();
        assert_eq!(receive(&mut victim, &mut bytes), expected, "{} {}", bit / 8, bit % 8);
        let Verdict::Fails(error) = expected else { panic!("an end") };
        assert_dead(&mut victim, error, &bit);
        cases += 1;
    }
    let mut bytes = record.to_vec();
    let Ok(Received::Record { event: Event::CheckServer(claim), .. }) = client().receive(&mut bytes) else {
        panic!("a claim")
    };
    assert_eq!((claim.fingerprint, claim.key), (public(&SERVER).fingerprint(), Some(public(&SERVER))));
    println!("{cases} flipped bits of a key that is trusted on first use");
    assert!(cases >= (record.len() - 24) * 8);

    // Who neither knows the server nor asks for its key can verify nobody: said before a byte is sent, and not final.
    let config = ClientConfig { ask_for_key: false, ..config };
    let mut client: Connection = Connection::client(config, &seed(1));
    for _ in 0..2 {
        let mut out = [0; 128];
        assert_eq!(client.transmit(&mut out), Err(ApiMisuse::InvalidArgument.into()));
        assert_eq!(out, [0; 128]);
    }
}
