//! Keys, nonces and counters: never the same pair twice, over ten thousand connections; and what happens where a counter ends.

use core::cell::RefCell;
use std::collections::{HashMap, HashSet};

use ossicle_core::{
    Aead, Ask, BufferError, Channel, ClientConfig, Connection, Credentials, Error, Event, Message, NONCE_LEN,
    PeerError, Reason, Received, RustCrypto, ServerConfig, Settings, TAG_LEN, generator_seed,
};
use ossicle_tests::{CLIENT_ID, SERVER_ID, public};

use crate::session::{
    ALICE, Clear, Kind, LIMIT, Real, SERVER, Said, Session, Side, Stage, Verdict, assert_dead, receive,
};

type Pair = ([u8; 32], [u8; NONCE_LEN]);

/// What was sealed and opened on this thread.
#[derive(Default)]
struct Log {
    sealed: HashMap<Pair, Vec<u8>>,
    seals: usize,
    opened: HashSet<Pair>,
    opens: usize,
}

thread_local! {
    static LOG: RefCell<Log> = RefCell::default();
}

/// A seal that hides nothing, and remembers every key and nonce that it was used with.
pub(crate) struct Witness([u8; 32]);

impl Aead for Witness {
    fn new(key: &[u8; 32]) -> Self {
        Self(*key)
    }

    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], Error> {
        LOG.with_borrow_mut(|log| {
            log.seals += 1;
            if let Some(before) = log.sealed.insert((self.0, *nonce), [aad, data].concat()) {
                panic!("one key and nonce for {before:02x?} and {aad:02x?} {data:02x?}");
            }
        });
        Ok([0; TAG_LEN])
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8], _: &[u8; TAG_LEN]) -> Result<(), Error> {
        LOG.with_borrow_mut(|log| {
            log.opens += 1;
            if log.sealed.get(&(self.0, *nonce)) != Some(&[aad, data].concat()) {
                return Err(Error::Crypto);
            }
            assert!(log.opened.insert((self.0, *nonce)), "a record is opened once");
            Ok(())
        })
    }
}

/// What becomes of one connection of many.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Full,
    /// The server has lost the channel: mode 2.
    Forgotten,
    Resumed,
    /// Resumed, and the settings never arrive: the client comes back with the same channel.
    Lost,
    /// Resumed or not, the client is refused.
    Refused,
}

/// Calls it twice: first without room, which must seal nothing, then with.
fn append(out: &mut Vec<u8>, mut call: impl FnMut(&mut [u8]) -> Result<usize, Error>) {
    let before = LOG.with_borrow(|log| log.seals);
    assert_eq!(call(&mut [0; 20]), Err(BufferError::TxFull.into()));
    assert_eq!(LOG.with_borrow(|log| log.seals), before, "nothing is sealed where there is no room");
    let mut room = [0; 2048];
    let len = call(&mut room).unwrap();
    out.extend_from_slice(&room[..len]);
}

fn deliver(connection: &mut Connection<Witness>, bytes: &mut Vec<u8>) -> Verdict {
    let len = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
    let verdict = receive(connection, bytes);
    bytes.drain(..len);
    verdict
}

fn unpredictable(number: u32, side: u8) -> [u8; 64] {
    let mut seed = [0; 64];
    for (half, part) in seed.chunks_mut(32).zip(0..) {
        half.copy_from_slice(generator_seed(&number.to_be_bytes(), &[side, part]).expose());
    }
    seed
}

/// Runs connection `number`; returns the channel that the client has afterwards.
fn connect(number: u32, fate: Fate, channel: Option<&Channel>) -> Option<Channel> {
    let server_key = public(&SERVER).fingerprint();
    let config = ClientConfig { server: Some(server_key), ask_for_key: false, record_limit: LIMIT };
    let seed = unpredictable(number, 0);
    let mut client: Connection<Witness> = match channel {
        Some(channel) => Connection::resume(config, channel.clone(), &seed).unwrap(),
        None => Connection::client(config, &seed),
    };
    let config = ServerConfig { id: SERVER_ID, fingerprint: server_key, record_limit: LIMIT };
    let mut server: Connection<Witness> = Connection::server(config, &unpredictable(number, 1));
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let credentials = Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint: public(&ALICE).fingerprint() };

    append(&mut up, |out| client.transmit(out));
    if deliver(&mut server, &mut up) == Verdict::Taken(Said::CheckChannel) {
        if fate == Fate::Forgotten {
            assert_eq!(server.answer_offer(None, &mut []), Ok(0));
        } else {
            append(&mut down, |out| server.answer_offer(channel, out));
        }
    }
    if let Some(Ask::Sign(_)) = server.ask() {
        append(&mut down, |out| server.sign_server(public(&SERVER), &[1; 256], out));
    }
    assert_eq!(deliver(&mut client, &mut down), Verdict::Taken(Said::Progress));
    let resumed = match deliver(&mut client, &mut down) {
        Verdict::Taken(Said::CheckServer) => {
            client.verified(&credentials).unwrap();
            append(&mut up, |out| client.sign_client(&credentials, &[2; 256], out));
            false
        }
        verdict => {
            assert_eq!(verdict, Verdict::Taken(Said::Progress));
            append(&mut up, |out| client.transmit(out));
            true
        }
    };
    assert_eq!(resumed, channel.is_some() && fate != Fate::Forgotten);
    match server.receive(&mut up).unwrap() {
        Received::Record { event: Event::CheckClient(claim), .. } => {
            server.bind(&claim, &public(&ALICE).fingerprint()).unwrap();
        }
        Received::Record { event: Event::Resumed, .. } => {}
        _ => panic!("a client"),
    }
    up.clear();
    if fate == Fate::Refused {
        append(&mut down, |out| server.refuse(Reason::Rate, number, out));
        let refused = PeerError::Refused { reason: Reason::Rate, retry_after: number };
        assert_eq!(deliver(&mut client, &mut down), Verdict::Fails(refused.into()));
        return channel.cloned();
    }
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    let settings = Settings { channel: id, valid_for: 604_800, ..Settings::default() };
    append(&mut down, |out| server.accept(&settings, out));
    if fate == Fate::Lost {
        return channel.cloned();
    }
    assert_eq!(deliver(&mut client, &mut down), Verdict::Taken(Said::Connected));
    for message in [Said::Message, Said::Progress, Said::Message] {
        for (from, to) in [(true, false), (false, true)] {
            let mut bytes = Vec::new();
            let sender = if from { &mut client } else { &mut server };
            append(&mut bytes, |out| match message {
                Said::Message => sender.send(&Message::Status { request: 1 }, out),
                _ => sender.update_key(out),
            });
            let receiver = if to { &mut client } else { &mut server };
            assert_eq!(deliver(receiver, &mut bytes), Verdict::Taken(message));
        }
    }
    client.take_channel()
}

#[test]
fn no_key_seals_twice_with_one_nonce_over_ten_thousand_reconnects_and_rekeys() {
    const CONNECTIONS: u32 = 10_000;
    let mut channel = None;
    let (mut demanded, mut rekeys) = (0, 0);
    for number in 0..CONNECTIONS {
        let fate = match number % 100 {
            0 => Fate::Full,
            50 => Fate::Forgotten,
            10 | 11 | 30 => Fate::Lost,
            20 | 51 => Fate::Refused,
            _ => Fate::Resumed,
        };
        if fate == Fate::Full {
            channel = None;
        }
        // The two proofs, and one record in answer; then three each way.
        demanded += 3;
        if !matches!(fate, Fate::Lost | Fate::Refused) {
            demanded += 6;
            rekeys += 2;
        }
        channel = connect(number, fate, channel.as_ref());
    }
    LOG.with_borrow(|log| {
        println!("{CONNECTIONS} connections, {rekeys} rekeys, {} records, no key and nonce twice", log.seals);
        assert_eq!((log.seals, log.sealed.len()), (demanded, demanded));
        assert!(rekeys >= 10_000 && log.opened.len() > demanded * 9 / 10 && log.opens == log.opened.len());
    });
}

const MAX_RECORDS: u32 = 1 << 20;

fn numbered(payload: [u8; 2], sequence: u16) -> Vec<u8> {
    let [s1, s0] = sequence.to_be_bytes();
    [&[1, 0, 3, 0, 0, 26, s1, s0][..], &payload, &[0; 16]].concat()
}

/// All the records that one key may seal, really sealed and opened.
#[test]
fn a_key_ends_with_its_2_to_the_20th_record() {
    let session = Session::<Clear>::new(Kind::Key, (1, 2));
    let mut sender = session.at(Stage::Established(Side::Client));
    let mut receivers = [(); 3].map(|()| session.at(Stage::Established(Side::Server)));
    let mut out = [0; 26];
    for number in 0..MAX_RECORDS - 1 {
        assert_eq!(sender.send(&Message::Listening, &mut out), Ok(26));
        assert_eq!(out[6..8], number.to_be_bytes()[2..]);
        for receiver in &mut receivers {
            assert_eq!(receive(receiver, &mut out), Verdict::Taken(Said::Message));
        }
    }
    let [mut cheated, mut honest, mut closed] = receivers;
    // A peer that does not keep the rule.
    assert_eq!(receive(&mut cheated, &mut numbered([7, 0], 0xffff)), Verdict::Fails(PeerError::Exhausted.into()));
    assert_dead(&mut cheated, PeerError::Exhausted.into(), &"cheated");
    // Two things may be the last: the end of the key, and of the direction.
    let mut close = numbered([8, 0x21], 0xffff);
    close[5] += 1;
    close.insert(10, 0);
    assert_eq!(receive(&mut closed, &mut close), Verdict::Taken(Said::Closed));
    assert_eq!(closed.end_of_stream(), Ok(()));
    // Our own sender puts the update in front by itself, and sends neither where there is no room for both.
    assert_eq!(sender.send(&Message::Listening, &mut [0; 51]), Err(BufferError::TxFull.into()));
    let mut out = [0; 64];
    assert_eq!(sender.send(&Message::Listening, &mut out), Ok(26 + 26));
    assert_eq!(out[..26], numbered([8, 0x22], 0xffff));
    assert_eq!(out[26..52], numbered([7, 0], 0));
    assert_eq!(receive(&mut honest, &mut out), Verdict::Taken(Said::Progress));
    assert_eq!(receive(&mut honest, &mut out[26..]), Verdict::Taken(Said::Message));
    println!("{MAX_RECORDS} records under one key");
}

/// 16 of the counter's bits are in the header; a record that has the right ones and is 65,536 too old does not open.
#[test]
fn a_record_is_not_taken_again_when_its_number_comes_round() {
    let session = Real::new(Kind::Key, (1, 2));
    let mut sender = session.at(Stage::Established(Side::Client));
    let mut receiver = session.at(Stage::Established(Side::Server));
    let mut first = None;
    let mut out = [0; 64];
    for number in 0..=u16::MAX {
        let len = sender.send(&Message::Listening, &mut out).unwrap();
        first.get_or_insert_with(|| out[..len].to_vec());
        assert_eq!(out[6..8], number.to_be_bytes());
        assert_eq!(receive(&mut receiver, &mut out[..len]), Verdict::Taken(Said::Message));
    }
    let mut first = first.unwrap();
    let len = sender.send(&Message::Listening, &mut out).unwrap();
    assert_eq!(out[..8], first[..8], "the same header");
    assert_ne!(out[8..len], first[8..]);
    assert_eq!(receive(&mut receiver, &mut first), Verdict::Fails(Error::Crypto));
    assert_dead(&mut receiver, Error::Crypto, &"replayed");
    println!("65536 numbers, once round");
}

/// The highest key epoch is one like any other: it is signed, bound and resumed as it is.
#[test]
fn the_highest_key_epoch_is_bound_like_the_first() {
    let fingerprint = public(&ALICE).fingerprint();
    let mut transcripts = HashSet::new();
    for key_epoch in [0, 1, u32::MAX - 1, u32::MAX] {
        let channel = Channel { key_epoch, ..Session::<RustCrypto>::channel() };
        let config = ClientConfig { server: Some(channel.server_key), ask_for_key: false, record_limit: LIMIT };
        let mut client: Connection = Connection::resume(config, channel.clone(), &unpredictable(1, 0)).unwrap();
        let config = ServerConfig { id: SERVER_ID, fingerprint: channel.server_key, record_limit: LIMIT };
        let mut out = [0; 512];
        let len = client.transmit(&mut out).unwrap();
        for held in [0, 1, u32::MAX - 1, u32::MAX] {
            let mut server: Connection = Connection::server(config, &unpredictable(1, 1));
            assert_eq!(receive(&mut server, &mut out[..len].to_vec()), Verdict::Taken(Said::CheckChannel));
            let mut answer = [0; 512];
            let held = Channel { key_epoch: held, ..channel.clone() };
            let answered = server.answer_offer(Some(&held), &mut answer).unwrap();
            transcripts.insert(answer[79..answered].to_vec());
            if held.key_epoch == key_epoch {
                continue;
            }
            // The server believes in another epoch of the client's key than the client does.
            let mut client: Connection = Connection::resume(
                ClientConfig { server: Some(channel.server_key), ask_for_key: false, record_limit: LIMIT },
                channel.clone(),
                &unpredictable(1, 0),
            )
            .unwrap();
            client.transmit(&mut [0; 512]).unwrap();
            assert_eq!(receive(&mut client, &mut answer[..79]), Verdict::Taken(Said::Progress));
            assert_eq!(receive(&mut client, &mut answer[79..answered]), Verdict::Fails(Error::Crypto));
        }
        let credentials = Credentials::Key { id: CLIENT_ID, key_epoch, fingerprint };
        let session = Real::new(Kind::Key, (1, 2));
        let mut client = session.at(Stage::VerifyServer);
        client.verified(&credentials).unwrap();
        let Some(Ask::Sign(statement)) = client.ask() else { panic!("a signature is due") };
        let len = client.sign_client(&credentials, &[3; 256], &mut out).unwrap();
        let mut server = session.at(Stage::AwaitClientAuth);
        let Ok(Received::Record { event: Event::CheckClient(claim), .. }) = server.receive(&mut out[..len]) else {
            panic!("a claim")
        };
        assert_eq!(claim.kind(), ossicle_core::ClaimKind::Key { key_epoch });
        assert_eq!(server.bind(&claim, &fingerprint), Ok(statement));
    }
    println!("{} transcripts of 4 key epochs", transcripts.len());
    assert_eq!(transcripts.len(), 4);
}
