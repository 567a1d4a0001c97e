//! What a receiver must make of bytes, written down a second time from the specification and from nothing else: PROTOCOL 2.4
//! and 2.5 for headers, 3.2, 3.3 and 3.8 for the clear records. The seal decides on everything else: a record opens if it is the very
//! one that comes next, and otherwise does not.

use ossicle_core::{Aead, Error, PeerError};

use crate::session::{Kind, LIMIT, Name, Said, Session, Side, Stage, Verdict, refused};

pub(crate) const KNOWN: [u16; 7] = [0x0100, 0x0110, 0x0120, 0x0200, 0x0210, 0x0220, 0x0300];

/// Type, shortest and longest record of all that may come in this state; nothing where nothing is read.
pub(crate) const fn awaited(stage: Stage) -> &'static [(u16, usize, usize)] {
    const LONGEST: usize = LIMIT as usize;
    match stage {
        Stage::AwaitServerHello => &[(0x0110, 8, 2_048), (0x0120, 11, 50)],
        Stage::AwaitServerAuth => &[(0x0210, 24, 2_048)],
        Stage::AwaitSettings => &[(0x0300, 24, LONGEST), (0x0220, 29, 29)],
        Stage::AwaitClientHello => &[(0x0100, 8, 256)],
        Stage::AwaitClientAuth => &[(0x0200, 24, 1_536)],
        Stage::Established(_) | Stage::Closed(_) => &[(0x0300, 24, LONGEST)],
        _ => &[],
    }
}

/// The records that open in this state, and what they say.
pub(crate) fn welcome(kind: Kind, stage: Stage) -> &'static [(Name, Verdict)] {
    const CHECK: Verdict = Verdict::Taken(Said::CheckServer);
    match stage {
        Stage::AwaitServerHello => &[(Name::ServerHello, Verdict::Taken(Said::Progress))],
        Stage::AwaitServerAuth if kind.is_full() => &[(Name::ServerAuth, CHECK)],
        Stage::AwaitServerAuth => &[(Name::ServerAuth, Verdict::Taken(Said::Progress))],
        Stage::AwaitSettings => &[
            (Name::Settings, Verdict::Taken(Said::Connected)),
            (
                Name::Refusal,
                Verdict::Fails(Error::Peer(PeerError::Refused {
                    reason: ossicle_core::Reason::Unauthorised,
                    retry_after: 0x0102_0304,
                })),
            ),
        ],
        Stage::AwaitClientHello if kind.offers() => &[(Name::ClientHello, Verdict::Taken(Said::CheckChannel))],
        Stage::AwaitClientHello => &[(Name::ClientHello, Verdict::Taken(Said::Progress))],
        Stage::AwaitClientAuth if kind.is_full() => &[(Name::ClientAuth, Verdict::Taken(Said::CheckClient))],
        Stage::AwaitClientAuth => &[(Name::ClientAuth, Verdict::Taken(Said::Resumed))],
        Stage::Established(Side::Server) | Stage::Closed(Side::Server) => {
            &[(Name::Question, Verdict::Taken(Said::Message))]
        }
        Stage::Established(Side::Client) | Stage::Closed(Side::Client) => {
            &[(Name::Answer, Verdict::Taken(Said::Message))]
        }
        _ => &[],
    }
}

/// What a side of this session must make of `data` in this state.
pub(crate) fn predict<A: Aead>(session: &Session<A>, stage: Stage, data: &[u8]) -> Verdict {
    const DECODE: Verdict = Verdict::Fails(Error::Decode);
    let unexpected = Verdict::Fails(PeerError::UnexpectedMessage.into());
    if let Some(error) = stage.ended() {
        return Verdict::Fails(error);
    }
    let awaited = awaited(stage);
    if awaited.is_empty() {
        return Verdict::Wait;
    }
    let Some(header) = data.first_chunk::<8>() else { return Verdict::Need(8) };
    let [version, code, len, sequence] =
        core::array::from_fn(|field| u16::from_be_bytes([header[2 * field], header[2 * field + 1]]));
    let len = usize::from(len);
    if version != 0x0100 || !KNOWN.contains(&code) || len < 8 {
        return DECODE;
    }
    let Some((_, min, max)) = awaited.iter().find(|(kind, ..)| *kind == code) else { return unexpected };
    if len < *min || len > *max {
        return DECODE;
    }
    let Some(record) = data.get(..len) else { return Verdict::Need(len) };
    let welcome = welcome(session.kind, stage);
    let counter = match (code, stage) {
        (0x0220, _) => 1,
        (_, Stage::Established(Side::Client) | Stage::Closed(Side::Client)) => 1,
        _ => 0,
    };
    if sequence != counter {
        return unexpected;
    }
    match code {
        0x0100 => match client_hello(&record[8..]) {
            Ok(true) => Verdict::Taken(Said::CheckChannel),
            Ok(false) => Verdict::Taken(Said::Progress),
            Err(error) => Verdict::Fails(error),
        },
        0x0110 => match server_hello(&record[8..], session.kind.offers()) {
            Ok(()) => Verdict::Taken(Said::Progress),
            Err(error) => Verdict::Fails(error),
        },
        0x0120 => Verdict::Fails(hello_retry(&record[8..])),
        _ => match welcome.iter().find(|(name, _)| session.record(*name) == record) {
            Some((_, verdict)) => *verdict,
            None => Verdict::Fails(Error::Crypto),
        },
    }
}

/// PROTOCOL 3.2. Whether a channel is offered.
fn client_hello(mut body: &[u8]) -> Result<bool, Error> {
    let mut take = |len: usize| -> Result<&[u8], Error> {
        let (taken, rest) = body.split_at_checked(len).ok_or(Error::Decode)?;
        body = rest;
        Ok(taken)
    };
    let mut common = true;
    for wanted in [[1, 0], [0, 1]] {
        let n = take(1)?[0];
        if !(1..=4).contains(&n) {
            return Err(Error::Decode);
        }
        common &= take(2 * usize::from(n))?.chunks(2).any(|value| value == wanted);
    }
    let limit = take(2)?;
    let limit = u16::from_be_bytes([limit[0], limit[1]]);
    let (role, flags) = (take(1)?[0], take(1)?[0]);
    if role > 1 || flags > 1 {
        return Err(Error::Decode);
    }
    take(32)?;
    let exchange: [u8; 32] = take(32)?.try_into().unwrap();
    let cookie = take(1)?[0];
    if cookie > 40 {
        return Err(Error::Decode);
    }
    take(cookie.into())?;
    if cookie > 0 {
        take(8)?;
    }
    let offers = match take(1)?[0] {
        0 => false,
        1 => {
            take(48)?;
            true
        }
        _ => return Err(Error::Decode),
    };
    if !body.is_empty() {
        return Err(Error::Decode);
    }
    if !common || role == 1 {
        return Err(PeerError::Version.into());
    }
    if limit < 1_024 {
        return Err(Error::Decode);
    }
    // With an offer, curves wait for its answer.
    if !offers && is_of_small_order(exchange) {
        return Err(Error::Crypto);
    }
    Ok(offers)
}

/// PROTOCOL 3.3, for a client that offered a channel or did not.
fn server_hello(body: &[u8], offered: bool) -> Result<(), Error> {
    let Some(([mode, v1, v0, s1, s0, l1, l0], rest)) = body.split_first_chunk::<7>() else {
        return Err(Error::Decode);
    };
    if *mode > 2 || rest.len() != 64 {
        return Err(Error::Decode);
    }
    if [v1, v0, s1, s0] != [&1, &0, &0, &1] {
        return Err(PeerError::Version.into());
    }
    if u16::from_be_bytes([*l1, *l0]) < 1_024 {
        return Err(Error::Decode);
    }
    if offered == (*mode == 0) {
        return Err(PeerError::Version.into());
    }
    if is_of_small_order(rest[32..].try_into().unwrap()) { Err(Error::Crypto) } else { Ok(()) }
}

/// PROTOCOL 3.8 and 4.11, for a client that was not asked before.
fn hello_retry(body: &[u8]) -> Error {
    match body {
        [bits, n, cookie @ ..] if cookie.len() == usize::from(*n) && (1..=40).contains(n) => match bits {
            0..=18 => PeerError::Retry.into(),
            _ => PeerError::Puzzle { bits: *bits }.into(),
        },
        _ => Error::Decode,
    }
}

/// The points of the curve and its twist whose order divides 8, which make an agreement of zeros (RFC 7748, 6.1): 0, 1, two of
/// order 8, and p - 1, p and p + 1, all without the highest bit, which X25519 ignores.
pub(crate) const SMALL_ORDER: [[u8; 32]; 7] = {
    let mut all = [[0; 32]; 7];
    all[1][0] = 1;
    all[2] = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];
    all[3] = [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ];
    let mut index = 4;
    while index < 7 {
        all[index] = [0xff; 32];
        all[index][0] = [0xec, 0xed, 0xee][index - 4];
        all[index][31] = 0x7f;
        index += 1;
    }
    all
};

fn is_of_small_order(mut point: [u8; 32]) -> bool {
    point[31] &= 0x7f;
    SMALL_ORDER.contains(&point)
}

#[test]
fn the_rules_know_the_refusal_of_the_sessions() {
    assert_eq!(welcome(Kind::Key, Stage::AwaitSettings)[1].1, Verdict::Fails(refused()));
}
