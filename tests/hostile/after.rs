//! What a client says that was let in: messages that it may not send, requests that are none, records out of order.

use core::time::Duration;

use ossicle_core::{
    Answer, Bundle, Channels, CloseConversation, Closed as GroupClosed, DirectoryEntry, DirectoryList,
    ENVELOPE_OVERHEAD, Enrol, ExpireChannels, Fixed, Follow, FollowResponse, GroupFlags, Init, Invite, Lookup, Member,
    MemberChanged, MemberState, Members, Message, Names, PeerStatus, Post, PublicKey, Reason, Receipt, Rotate,
    Rotation, Rung, Rungs, SEALED_NAME_LEN, Say, Secret, SignedBundle, Subject, Successor, SuccessorQuery, ToldBy,
    Unwatch, Watch,
};
use ossicle_tests::node::{Published, envelope, wrap};
use ossicle_tests::raw::{self, APPLICATION, RawClient, RawHeard, clear, payload};
use ossicle_tests::{keys, public};

use crate::Seen::{Alive, Closed, End, Refused, Told};
use crate::{ALICE, BOB, Ground, MALLORY, Scenario, Seen, scenario};

type Row = Scenario<RawClient>;

const REQUEST: u16 = 9;
const MALFORMED: &[Seen] = &[Refused(0, Reason::Malformed), Alive];
const UNSUPPORTED: &[Seen] = &[Refused(0, Reason::Unsupported), Alive];
const NOT_MEMBER: &[Seen] = &[Refused(REQUEST, Reason::NotMember), Alive];
/// Nothing but the sign of life: whatever was to be heard was heard by the row itself.
const ALIVE: &[Seen] = &[Alive];
const OUT: &[Seen] = &[End];

/// Mallory, let in.
pub(crate) fn enter(ground: &Ground) -> RawClient {
    let mut client = RawClient::connect(ground.node.address);
    client.greet(&ground.server);
    client.say_auth(&ground.claim(), &ground.mallory);
    assert!(matches!(client.hear(), RawHeard::Payload(payload) if payload[..2] == [7, 0x20]), "settings");
    client
}

/// A row that says one payload.
macro_rules! word {
    ($name:literal, $payload:expr, $seen:expr) => {
        scenario($name, |_, client: &mut RawClient| client.say(&$payload), $seen)
    };
}

/// A row that says one message.
macro_rules! message {
    ($name:literal, $message:expr, $seen:expr) => {
        scenario($name, |_, client: &mut RawClient| client.say_message(&$message), $seen)
    };
}

/// A row in which each beginning of a request, from so many bytes on, and the request with a byte behind it are refused one
/// by one; `$request` is what the refusal names once it can be read.
macro_rules! cut {
    ($name:literal, $payload:expr, $from:literal, $request:expr) => {
        scenario(
            $name,
            |_, client: &mut RawClient| {
                let whole: Vec<u8> = $payload;
                let longer = [&whole[..], &[0]].concat();
                let wrong = ($from..whole.len()).map(|end| &whole[..end]).chain([&longer[..]]);
                refused(client, $request, wrong);
            },
            ALIVE,
        )
    };
}

/// Each of these is refused as malformed, once. Where the number of the request is not yet there, by 0.
fn refused<'p>(client: &mut RawClient, request: u16, payloads: impl Iterator<Item = &'p [u8]>) {
    let mut count = 0;
    for wrong in payloads {
        client.say(wrong);
        let request = if wrong.len() > 2 { request } else { 0 };
        let expected = payload(&Message::Refused { request, reason: Reason::Malformed, retry_after: None });
        assert_eq!(client.hear(), RawHeard::Payload(expected), "{wrong:02x?}");
        count += 1;
    }
    assert!(count > 0, "there are cases");
}

fn encoded<'b>(encode: impl FnOnce(&'b mut [u8]) -> Result<Message<'b>, ossicle_core::Error>) -> Vec<u8> {
    payload(&encode(Box::leak(vec![0; 16_384].into_boxed_slice())).unwrap())
}

const SID: [u8; 16] = [0x51; 16];
const SIGNATURE: Fixed<'static, 64> = Fixed(&[7; 64]);

/// A list of these; the key of Mallory alone is right.
fn members(ids: [u8; 2]) -> Vec<u8> {
    let key = |id| if id == MALLORY { keys::carol().fingerprint() } else { [8; 32] };
    ids.iter().flat_map(|id| Member { id: [*id; 16], key: key(*id) }.encode()).collect()
}

fn init(ids: [u8; 2], names: usize) -> Vec<u8> {
    let (lines, names) = (members(ids), vec![6; names * SEALED_NAME_LEN]);
    encoded(|out| {
        Init {
            request: REQUEST,
            sid: SID,
            flags: GroupFlags::NONE,
            signature: SIGNATURE,
            members: Members::new(&lines).unwrap(),
            names: Names::new(&names).unwrap(),
        }
        .encode(out)
    })
}

fn invite() -> Vec<u8> {
    let lines = members([BOB, MALLORY]);
    encoded(|out| {
        Invite {
            sid: SID,
            creator: [BOB; 16],
            flags: GroupFlags::NONE,
            signature: SIGNATURE,
            members: Members::new(&lines).unwrap(),
            name: Fixed(&[6; SEALED_NAME_LEN]),
        }
        .encode(out)
    })
}

fn saying(body: &[u8]) -> Vec<u8> {
    let post = Post { number: 7, at: 1, epoch: 1, kind: 0, signature: SIGNATURE, body };
    encoded(|out| Say { request: REQUEST, post }.encode(out))
}

fn answer() -> Vec<u8> {
    encoded(|out| Answer { request: REQUEST, sid: SID, accept: true, signature: SIGNATURE }.encode(out))
}

fn closing() -> Vec<u8> {
    encoded(|out| CloseConversation { request: REQUEST, sid: SID, signature: SIGNATURE }.encode(out))
}

fn by_name(name: &str) -> Message<'_> {
    Message::Lookup(Lookup { request: REQUEST, key: false, bundle: false, subject: Subject::Name(name) })
}

fn receipt(rung: Rung) -> Receipt {
    Receipt { rung, reason: None, chain: [0x77; 8], from: 0, to: u32::MAX, tag: Some([7; 16]) }
}

fn entry() -> DirectoryEntry<'static> {
    DirectoryEntry {
        id: [ALICE; 16],
        name: "alice",
        key_epoch: 0,
        record_limit: 1024,
        status: PeerStatus::Online,
        modulus: None,
        bundle: None,
    }
}

/// Mallory's wrap for somebody.
fn say_wrap(client: &mut RawClient, to: u8, wrap: &[u8], bundle: &[u8], signature: &[u8]) {
    let bundle = SignedBundle { bundle, signature };
    client.say_message(&Message::Wrap { request: REQUEST, to: [to; 16], wrap, bundle });
}

fn mallorys(epoch: u32) -> Published {
    Published::new(MALLORY, &keys::carol(), epoch)
}

fn publish(client: &mut RawClient, bundle: &[u8], signature: &[u8]) {
    client.say_message(&Message::Publish { request: REQUEST, bundle: SignedBundle { bundle, signature } });
}

/// Mallory offers this key as its next one, with signatures that are right as far as it has the keys.
fn rotate(
    client: &mut RawClient,
    key: &ossicle::crypto::IdentityKey,
    key_epoch: u32,
    change: impl Fn(&mut Rotate<'_>),
) {
    let (present, next) = (keys::carol().fingerprint(), key.fingerprint());
    let step = Rotation { id: [MALLORY; 16], former: present, next, key_epoch };
    let signature = keys::carol().sign(&step.statement()).unwrap();
    let proof = key.sign(&step.possession(&Secret::new(client.exporter))).unwrap();
    let bundle = Published::new(MALLORY, key, 1 << 30);
    let mut offer = Rotate {
        request: REQUEST,
        key_epoch,
        modulus: key.modulus(),
        signature: &signature,
        proof: &proof,
        bundle: bundle.signed(),
    };
    change(&mut offer);
    let mut buffer = vec![0; 8192];
    let offer = payload(&offer.encode(&mut buffer).unwrap());
    client.say(&offer);
}

/// An entry of a batch, signed for this connection.
fn enrol(client: &mut RawClient, index: u16, count: u16, change: impl Fn(&mut Enrol<'_>)) {
    let key = keys::server4096();
    let (id, name) = ([70; 16], "device");
    let exporter = Secret::new(client.exporter);
    let signature =
        key.sign(&ossicle_core::enrolment_statement(&exporter, &[MALLORY; 16], &id, name, public(&key))).unwrap();
    let mut entry = Enrol { request: REQUEST, index, count, id, name, modulus: key.modulus(), signature: &signature };
    change(&mut entry);
    let mut buffer = vec![0; 8192];
    let entry = payload(&entry.encode(&mut buffer).unwrap());
    client.say(&entry);
}

/// A body with strings and numbers as they should not be.
fn raw_body(code: u16, parts: &[&[u8]]) -> Vec<u8> {
    [&code.to_be_bytes()[..], &parts.concat()].concat()
}

/// 2^64 - 1 as a length.
const ENDLESS: [u8; 10] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];

pub(crate) const WORDS: &[Row] = &[
    // What only a server says.
    message!(
        "an entry of the directory, by a client",
        Message::LookupResponse { request: 1, entry: entry() },
        UNSUPPORTED
    ),
    message!(
        "a page of the directory, by a client",
        Message::ListResponse(DirectoryList::new(1, true, &[])),
        UNSUPPORTED
    ),
    message!(
        "a refusal, by a client",
        Message::Refused { request: 1, reason: Reason::Rate, retry_after: Some(u32::MAX) },
        UNSUPPORTED
    ),
    scenario(
        "a wrap's delivery, by a client",
        |_, client| {
            let bundle = mallorys(0);
            let wrap = wrap(0x55);
            client.say_message(&Message::WrapDelivery { from: [ALICE; 16], wrap: &wrap, bundle: bundle.signed() });
        },
        UNSUPPORTED,
    ),
    word!(
        "a successor, by a client",
        encoded(|out| Successor { request: 1, modulus: &[7; 256], signature: &[7; 256] }.encode(out)),
        MALFORMED
    ),
    word!("channels, by a client", [8, 0x10, 1, 0, 0], MALFORMED),
    word!("an invitation, by a client", invite(), MALFORMED),
    word!(
        "what became of a member, by a client",
        encoded(|out| {
            let (member, state) = ([BOB; 16], MemberState::Revoked);
            MemberChanged { sid: SID, member, state, signature: None }.encode(out)
        }),
        MALFORMED
    ),
    word!(
        "a closing by the server, by a client",
        encoded(|out| GroupClosed { sid: SID, by: None, signature: None }.encode(out)),
        MALFORMED
    ),
    word!(
        "a receipt in another's name",
        encoded(|out| ToldBy { from: [BOB; 16], receipt: receipt(Rung::Delivered) }.encode(out)),
        MALFORMED
    ),
    // Groups.
    word!("an answer to an invitation that there is not", answer(), NOT_MEMBER),
    word!("the closing of a group that there is not", closing(), NOT_MEMBER),
    word!(
        "a group that its founder is no member of",
        init([ALICE, BOB], 1),
        &[Refused(REQUEST, Reason::Malformed), Alive]
    ),
    word!("a group with a name too many", init([BOB, MALLORY], 2), &[Refused(REQUEST, Reason::Malformed), Alive]),
    word!("a group with somebody's wrong key", init([BOB, MALLORY], 1), &[Refused(REQUEST, Reason::KeyChanged), Alive]),
    word!("a group with somebody unknown", init([MALLORY, 0xfe], 1), &[Refused(REQUEST, Reason::Unknown), Alive]),
    // The public conversation.
    word!("a post without a bundle", saying(b"hello"), &[Refused(REQUEST, Reason::Unauthorised), Alive]),
    word!("a post that is empty", saying(b""), &[Refused(REQUEST, Reason::Malformed), Alive]),
    word!("a post that is too long", saying(&[7; 801]), &[Refused(REQUEST, Reason::TooLarge), Alive]),
    word!(
        "a post with half a signature",
        raw_body(0x0201, &[&[9, 1, 1, 1, 0, 32], &[7; 32], &[1, 7]]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!(
        "a post of endless length",
        raw_body(0x0201, &[&[9, 1, 1, 1, 0, 64], &[7; 64], &ENDLESS]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!(
        "posts behind a number that there is not",
        encoded(|out| Follow { request: REQUEST, after: u64::MAX }.encode(out)),
        &[Refused(REQUEST, Reason::Rewound), Alive]
    ),
    word!("posts from the beginning", [2, 2, 9, 0], &[Seen::Message(0x0212), Alive]),
    word!(
        "posts, by a client",
        encoded(|out| FollowResponse { request: 1, more: false, lines: &[] }.encode(out)),
        MALFORMED
    ),
    word!("news, by a client", [2, 0x22], MALFORMED),
    // What nobody says.
    word!("an empty payload", [], MALFORMED),
    word!("half a code", [4], MALFORMED),
    word!("code 0000", [0, 0], MALFORMED),
    word!("what presence does not have", [6, 2, 1], MALFORMED),
    word!("the reserved join of a server", [9, 0, 1], MALFORMED),
    word!("a reserved relay", [10, 0, 1], MALFORMED),
    word!("a code of a family's other half", [4, 0x20, 1], MALFORMED),
    word!("code ffff", [0xff, 0xff, 1, 2, 3], MALFORMED),
    scenario(
        "every code that there is not, one after the other",
        |_, client| {
            let known: &[u16] = &[
                0x0200, 0x0210, 0x0220, 0x0221, 0x0230, 0x0231, 0x0400, 0x0410, 0x0500, 0x0501, 0x0502, 0x0503, 0x0504,
                0x0505, 0x0510, 0x0511, 0x0700, 0x0701, 0x0720, 0x0800, 0x0801, 0x0821, 0x0822, 0x0b00, 0x0b01, 0x0b20,
                0x0f00, 0x0f10,
            ];
            let unknown: Vec<_> = (0_u16..0x1000).filter(|code| !known.contains(code)).map(u16::to_be_bytes).collect();
            assert_eq!(unknown.len(), 4096 - 28);
            refused(client, 0, unknown.iter().map(|code| &code[..]));
        },
        ALIVE,
    ),
    // Requests that are cut, and requests with a byte behind them.
    cut!("Status, cut", vec![4, 0, 1], 2, 0),
    cut!("StatusResponse, cut", vec![4, 0x10, 1], 2, 0),
    cut!("Tell, cut", payload(&Message::Tell(receipt(Rung::Opened))), 2, 0),
    cut!("Lookup, cut", payload(&by_name("alice")), 2, 0),
    cut!("List, cut", payload(&Message::List { request: REQUEST, after: "alice" }), 2, 0),
    cut!("Revoke, cut", payload(&Message::Revoke { request: REQUEST, subject: Subject::Id([ALICE; 16]) }), 2, 0),
    cut!("Publish, cut", payload(&Message::Publish { request: REQUEST, bundle: mallorys(1).signed() }), 2, 0),
    cut!(
        "Wrap, cut",
        payload(&Message::Wrap { request: REQUEST, to: [BOB; 16], wrap: &wrap(0x56), bundle: mallorys(1).signed() }),
        2,
        0
    ),
    cut!(
        "Enrol, cut",
        encoded(|out| {
            Enrol {
                request: REQUEST,
                index: 0,
                count: 1,
                id: [7; 16],
                name: "device",
                modulus: &[7; 256],
                signature: &[7; 256],
            }
            .encode(out)
        }),
        2,
        REQUEST
    ),
    cut!(
        "Rotate, cut",
        encoded(|out| {
            let bundle = SignedBundle { bundle: &[1; 184], signature: &[2; 256] };
            Rotate {
                request: REQUEST,
                key_epoch: 1,
                modulus: &[7; 256],
                signature: &[7; 256],
                proof: &[7; 256],
                bundle,
            }
            .encode(out)
        }),
        2,
        REQUEST
    ),
    cut!(
        "Successor, cut",
        encoded(|out| SuccessorQuery { request: REQUEST, id: [ALICE; 16], key_epoch: 300 }.encode(out)),
        2,
        REQUEST
    ),
    cut!("Watch, cut", encoded(|out| Watch { request: REQUEST, pattern: "s-*", after: "bob" }.encode(out)), 2, REQUEST),
    cut!("Unwatch, cut", encoded(|out| Unwatch { request: REQUEST, pattern: "s-*" }.encode(out)), 2, REQUEST),
    cut!("Init, cut", init([BOB, MALLORY], 1), 2, REQUEST),
    cut!("Answer, cut", answer(), 2, REQUEST),
    cut!("CloseConversation, cut", closing(), 2, REQUEST),
    cut!("Say, cut", saying(b"hello"), 2, REQUEST),
    cut!("Follow, cut", encoded(|out| Follow { request: REQUEST, after: 300 }.encode(out)), 2, REQUEST),
    cut!("Channels, cut", encoded(|out| Channels { request: REQUEST }.encode(out)), 2, REQUEST),
    cut!("ExpireChannels, cut", encoded(|out| ExpireChannels { request: REQUEST }.encode(out)), 2, REQUEST),
    cut!("Listening, lengthened", vec![7, 0], 2, 0),
    cut!("NotListening, lengthened", vec![7, 1], 2, 0),
    scenario(
        "Send, cut within its envelope's head",
        |_, client| {
            let whole = payload(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(0x77, 0, 60) });
            refused(client, 0, (2..3 + ENVELOPE_OVERHEAD).map(|end| &whole[..end]));
        },
        ALIVE,
    ),
    // Fields that are none.
    word!("a flag that is neither true nor false", raw_body(0x0500, &[&[9, 2, 0, 0], &[1; 16]]), MALFORMED),
    word!("a subject of a third kind", raw_body(0x0500, &[&[9, 0, 0, 2], &[1; 16]]), MALFORMED),
    word!("a number too large for its field", [4, 0, 0xff, 0xff, 0x7f], MALFORMED),
    word!("a number that does not end", [&[4, 0][..], &[0x80; 40]].concat(), MALFORMED),
    word!("a number in a longer form", [4, 0, 0x81, 0x80, 0], &[Seen::Message(0x0410), Alive]),
    word!("a name of endless length", raw_body(0x0501, &[&[9], &ENDLESS]), MALFORMED),
    word!("a bundle of endless length", raw_body(0x0b00, &[&[9], &ENDLESS, &[7; 300]]), MALFORMED),
    word!("a wrap of endless length", raw_body(0x0b01, &[&[9], &[1; 16], &ENDLESS, &[7; 300]]), MALFORMED),
    word!("a name to look up that is not UTF-8", raw_body(0x0500, &[&[9, 0, 0, 1, 2, 0xc3, 0x28]]), MALFORMED),
    word!("a name to list behind that is not UTF-8", raw_body(0x0501, &[&[9, 2, 0xff, 0xfe]]), MALFORMED),
    word!("a pattern of endless length", raw_body(0x0600, &[&[9], &ENDLESS]), &[Refused(9, Reason::Malformed), Alive]),
    word!(
        "a pattern that is not UTF-8",
        raw_body(0x0600, &[&[9, 2, 0xff, 0xfe, 0]]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!("a pattern that is empty", raw_body(0x0600, &[&[9, 0, 0]]), &[Refused(9, Reason::Malformed), Alive]),
    word!(
        "a pattern whose class does not end",
        raw_body(0x0600, &[&[9, 2, b'[', b'a', 0]]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!(
        "a pattern that is longer than any",
        raw_body(0x0600, &[&[9, 0x81, 2], &[b'a'; 257], &[0]]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!(
        "a name to watch behind that is none",
        raw_body(0x0600, &[&[9, 1, b'*', 1, b'@']]),
        &[Refused(9, Reason::Malformed), Alive]
    ),
    word!(
        "a page of a pattern that is not watched",
        raw_body(0x0600, &[&[9, 1, b'*', 1, b'a']]),
        &[Refused(9, Reason::Unknown), Alive]
    ),
    word!("an end to what is not watched", raw_body(0x0601, &[&[9, 1, b'*']]), &[Seen::Message(0x0f00), Alive]),
    word!("a name to revoke that is not UTF-8", raw_body(0x0503, &[&[9, 1, 3, 0xed, 0xa0, 0x80]]), MALFORMED),
    word!(
        "a name to enrol that is not UTF-8",
        raw_body(0x0502, &[&[9, 0, 1], &[7; 16], &[2, 0xff, 0xfe], &[1, 7, 1, 7]]),
        &[Refused(REQUEST, Reason::Malformed), Alive]
    ),
    message!(
        "a name of 16,000 bytes to look up",
        by_name(&"a".repeat(16_000)),
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    message!(
        "a name that grows when it is normalised",
        by_name(&"\u{fdfa}".repeat(5_000)),
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    message!(
        "a name that only terminals understand",
        by_name("\u{1b}[2J\u{202e}"),
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    message!(
        "a name of 16,000 bytes to list behind",
        Message::List { request: REQUEST, after: &"a".repeat(16_000) },
        &[Refused(REQUEST, Reason::Malformed), Alive]
    ),
    message!(
        "a name of 16,000 bytes to revoke",
        Message::Revoke { request: REQUEST, subject: Subject::Name(&"a".repeat(16_000)) },
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    message!(
        "somebody else to revoke",
        Message::Revoke { request: REQUEST, subject: Subject::Id([ALICE; 16]) },
        &[Refused(REQUEST, Reason::Forbidden), Alive]
    ),
    message!(
        "a list from behind the last of all names",
        Message::List { request: REQUEST, after: "\u{10ffff}" },
        &[Refused(REQUEST, Reason::Malformed), Alive]
    ),
    // Numbers of requests.
    word!("a request by the number 0", raw_body(0x0501, &[&[0, 1, b' ']]), &[Refused(0, Reason::Malformed), Alive]),
    scenario(
        "three requests by one number",
        |_, client| {
            let name = payload(&by_name("nobody-at-all"));
            let records: Vec<u8> = (0..3).flat_map(|_| client.sealed(&name)).collect();
            client.wire.say(&records);
            let expected = payload(&Message::Refused { request: REQUEST, reason: Reason::Unknown, retry_after: None });
            for _ in 0..3 {
                assert_eq!(client.hear(), RawHeard::Payload(expected.clone()));
            }
        },
        ALIVE,
    ),
    // Envelopes and receipts.
    word!("an envelope that wants what there is not", [&[2, 0, 0x10][..], &envelope(0x77, 0, 60)].concat(), MALFORMED),
    word!("an envelope that wants everything", [&[2, 0, 0xff][..], &envelope(0x77, 0, 60)].concat(), MALFORMED),
    message!(
        "the longest envelope, on a chain that there is not",
        Message::Send { wanted: Rungs::NONE, envelope: &envelope(0x77, u32::MAX, 16_381) },
        &[Told(Reason::Rekey), Alive]
    ),
    message!(
        "an envelope on another's chain",
        Message::Send { wanted: Rungs::NONE, envelope: &envelope(crate::CHAIN, 1 << 20, 60) },
        &[Told(Reason::Rekey), Alive]
    ),
    scenario(
        "a thousand envelopes on as many chains that there are not",
        |_, client| {
            for n in 0..1000_u32 {
                let mut bytes = envelope(0, n, 60);
                bytes[..4].copy_from_slice(&n.to_be_bytes());
                client.say_message(&Message::Send { wanted: Rungs::NONE.with(Rung::Accepted), envelope: &bytes });
            }
            for n in 0..1000_u32 {
                let RawHeard::Payload(told) = client.hear() else { panic!("a receipt") };
                let Ok(Message::Told(receipt)) = Message::decode(&told) else { panic!("a receipt") };
                assert_eq!((receipt.from, receipt.reason), (n, Some(Reason::Rekey)));
            }
        },
        ALIVE,
    ),
    word!("a receipt of the rung 0", raw_body(0x0230, &[&[0, 0], &[7; 8], &[0, 0, 0]]), MALFORMED),
    word!("a receipt of the rung 6", raw_body(0x0230, &[&[6, 0], &[7; 8], &[0, 0, 0]]), MALFORMED),
    word!("a receipt with a reason of 0", raw_body(0x0230, &[&[5, 1, 0], &[7; 8], &[0, 0, 0]]), MALFORMED),
    word!(
        "a receipt with a reason that there is not",
        raw_body(0x0230, &[&[5, 1, 21], &[7; 8], &[0, 0, 0]]),
        MALFORMED
    ),
    message!(
        "a receipt for all messages of a chain that there is not",
        Message::Tell(receipt(Rung::Opened)),
        &[Refused(0, Reason::Forbidden), Alive]
    ),
    message!(
        "a receipt for another's chain",
        Message::Tell(Receipt { chain: [crate::CHAIN; 8], ..receipt(Rung::Delivered) }),
        &[Refused(0, Reason::Forbidden), Alive]
    ),
    message!(
        "a server's receipt, by a client",
        Message::Tell(Receipt { tag: None, ..receipt(Rung::Accepted) }),
        &[Refused(0, Reason::Malformed), Alive]
    ),
    // Wraps.
    scenario(
        "wraps of all wrong lengths",
        |_, client| {
            let bundle = mallorys(1);
            for len in [0, 1, 23, 24, 243, 245, 488, 15_000] {
                say_wrap(client, BOB, &vec![7; len], &bundle.bundle, &bundle.signature);
                let expected =
                    payload(&Message::Refused { request: REQUEST, reason: Reason::Malformed, retry_after: None });
                assert_eq!(client.hear(), RawHeard::Payload(expected), "{len}");
            }
        },
        ALIVE,
    ),
    scenario(
        "wraps with bundles of all wrong lengths",
        |_, client| {
            for len in [0, 1, 183, 185, 368, 15_000] {
                say_wrap(client, BOB, &wrap(0x57), &vec![MALLORY; len], &[7; 256]);
                let expected =
                    payload(&Message::Refused { request: REQUEST, reason: Reason::Malformed, retry_after: None });
                assert_eq!(client.hear(), RawHeard::Payload(expected), "{len}");
            }
        },
        ALIVE,
    ),
    scenario(
        "a wrap with another's bundle",
        |_, client| {
            let bundle = Published::new(ALICE, &keys::alice(), 0);
            say_wrap(client, BOB, &wrap(0x58), &bundle.bundle, &bundle.signature);
        },
        &[Refused(REQUEST, Reason::Forbidden), Alive],
    ),
    scenario(
        "a wrap that takes another's chain",
        |_, client| {
            let bundle = mallorys(1);
            say_wrap(client, BOB, &wrap(crate::CHAIN), &bundle.bundle, &bundle.signature);
        },
        &[Refused(REQUEST, Reason::NameInUse), Alive],
    ),
    scenario(
        "a wrap to nobody",
        |_, client| {
            let bundle = mallorys(1);
            say_wrap(client, 0, &wrap(0x59), &bundle.bundle, &bundle.signature);
        },
        &[Refused(REQUEST, Reason::Unknown), Alive],
    ),
    scenario(
        "a wrap to oneself, who does not listen",
        |_, client| {
            let bundle = mallorys(1);
            say_wrap(client, MALLORY, &wrap(0x5a), &bundle.bundle, &bundle.signature);
        },
        &[Seen::Message(0x0f00), Alive],
    ),
    scenario(
        "a wrap and an envelope to oneself, who listens",
        |_, client| {
            client.say_message(&Message::Listening);
            let bundle = mallorys(1);
            say_wrap(client, MALLORY, &wrap(0x5b), &bundle.bundle, &bundle.signature);
            client.say_message(&Message::Send { wanted: Rungs::NONE, envelope: &envelope(0x5b, 0, 60) });
            // The wrap of before waits for it, too; the envelope comes last.
            let mut codes = Vec::new();
            while codes.last() != Some(&[2, 0x20]) {
                match client.hear() {
                    RawHeard::Payload(payload) => codes.push([payload[0], payload[1]]),
                    other => panic!("{other:?}"),
                }
            }
            let count = |code| codes.iter().filter(|heard| **heard == code).count();
            assert_eq!([[0x0b, 0x20], [0x0f, 0], [2, 0x20]].map(count), [2, 1, 1], "{codes:?}");
            // What waited is announced: both wraps, and the envelope unless it passed.
            assert_eq!(codes.len() - 4, count([2, 0x21]), "{codes:?}");
            assert!((2..=3).contains(&count([2, 0x21])), "{codes:?}");
        },
        ALIVE,
    ),
    scenario(
        "a wrap with a signature that fills the record, which is the recipient's to judge",
        |_, client| {
            say_wrap(client, BOB, &wrap(0x5c), &mallorys(1).bundle, &[7; 15_900]);
            // When the recipient's socket has it.
            assert_eq!(client.hear(), RawHeard::Payload(payload(&Message::Done { request: REQUEST })));
        },
        ALIVE,
    ),
    scenario(
        "a hundred chains for one recipient",
        |_, client| {
            let bundle = mallorys(1);
            for chain in 0x80..0xe4 {
                say_wrap(client, BOB, &wrap(chain), &bundle.bundle, &bundle.signature);
            }
            for _ in 0x80..0xe4 {
                assert_eq!(client.hear(), RawHeard::Payload(payload(&Message::Done { request: REQUEST })));
            }
        },
        ALIVE,
    ),
    // Bundles.
    scenario(
        "a bundle without a signature",
        |_, client| publish(client, &mallorys(1).bundle, &[]),
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "a bundle with a signature that fills the record",
        |_, client| {
            publish(client, &mallorys(1).bundle, &[7; 16_000]);
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "a bundle of zeros",
        |_, client| publish(client, &[0; 184], &[0; 256]),
        &[Refused(REQUEST, Reason::Forbidden), Alive],
    ),
    scenario(
        "a bundle of 185 bytes",
        |_, client| publish(client, &[MALLORY; 185], &[0; 256]),
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "another's bundle with its right signature",
        |_, client| {
            let bundle = Published::new(ALICE, &keys::alice(), 7);
            publish(client, &bundle.bundle, &bundle.signature);
        },
        &[Refused(REQUEST, Reason::Forbidden), Alive],
    ),
    scenario(
        "one's own bundle with another's signature",
        |_, client| {
            let bundle = Bundle::decode(&mallorys(1).bundle).unwrap();
            let bundle = Published::sign(&bundle, &keys::alice());
            publish(client, &bundle.bundle, &bundle.signature);
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "another bundle of the present epoch",
        |_, client| {
            let bundle = mallorys(2);
            publish(client, &bundle.bundle, &bundle.signature);
            assert_eq!(client.hear(), RawHeard::Payload(payload(&Message::Done { request: REQUEST })));
            let other = Bundle { prekey_id: 77, ..Bundle::decode(&bundle.bundle).unwrap() };
            let other = Published::sign(&other, &keys::carol());
            publish(client, &other.bundle, &other.signature);
        },
        &[Refused(REQUEST, Reason::Rewound), Alive],
    ),
    // Enrolling devices.
    scenario("a batch of none", |_, client| enrol(client, 0, 0, |_| {}), &[Refused(REQUEST, Reason::Malformed), Alive]),
    scenario(
        "a batch of 1,001",
        |_, client| enrol(client, 0, 1001, |_| {}),
        &[Refused(REQUEST, Reason::TooLarge), Alive],
    ),
    scenario(
        "the last of 65,535 first",
        |_, client| enrol(client, 65_534, 65_535, |_| {}),
        &[Refused(REQUEST, Reason::TooLarge), Alive],
    ),
    scenario(
        "an entry behind the end of its batch",
        |_, client| enrol(client, 1, 1, |_| {}),
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device without a name",
        |_, client| enrol(client, 0, 1, |entry| entry.name = ""),
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device with a name that a terminal obeys",
        |_, client| {
            enrol(client, 0, 1, |entry| entry.name = "\u{1b}]0;owned\u{7}");
        },
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device without a key",
        |_, client| enrol(client, 0, 1, |entry| entry.modulus = &[]),
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device with an even key",
        |_, client| {
            enrol(client, 0, 1, |entry| entry.modulus = Box::leak(Box::new([0xfe; 256])));
        },
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device whose key is divisible by 3",
        |_, client| {
            // As each of its bytes is.
            enrol(client, 0, 1, |entry| entry.modulus = Box::leak(Box::new([0xff; 256])));
        },
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a device that another connection has signed",
        |_, client| {
            client.exporter = [7; 32];
            enrol(client, 0, 1, |_| {});
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "a device with the id of a client",
        |_, client| {
            enrol(client, 0, 1, |entry| entry.id = [ALICE; 16]);
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    // Identity keys.
    scenario(
        "an even key to follow",
        |_, client| {
            rotate(client, &keys::server3072(), 1, |offer| offer.modulus = Box::leak(Box::new([0xfe; 384])));
        },
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a key to follow whose bundle is another's",
        |_, client| {
            rotate(client, &keys::server3072(), 1, |offer| offer.bundle.bundle = Box::leak(Box::new([7; 184])));
        },
        &[Refused(REQUEST, Reason::Malformed), Alive],
    ),
    scenario(
        "a key to follow that the present one did not sign",
        |_, client| {
            rotate(client, &keys::server3072(), 1, |offer| offer.signature = &[7; 256]);
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "a key to follow that nobody holds",
        |_, client| {
            rotate(client, &keys::server3072(), 1, |offer| offer.proof = &[7; 384]);
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    scenario(
        "a key to follow in two steps",
        |_, client| rotate(client, &keys::server3072(), 2, |_| {}),
        &[Refused(REQUEST, Reason::Rewound), Alive],
    ),
    scenario(
        "the present key to follow itself",
        |_, client| rotate(client, &keys::carol(), 1, |_| {}),
        &[Refused(REQUEST, Reason::NameInUse), Alive],
    ),
    scenario(
        "the present key as if it had followed",
        |_, client| {
            rotate(client, &keys::carol(), 0, |offer| {
                offer.signature = &[7; 256];
                offer.proof = &[7; 256];
            });
        },
        &[Refused(REQUEST, Reason::Rewound), Alive],
    ),
    scenario(
        "another's key to follow",
        |_, client| {
            let modulus: &'static [u8] = Box::leak(keys::alice().modulus().to_vec().into_boxed_slice());
            let bundle = Bundle {
                key: PublicKey::from_modulus(modulus).unwrap().fingerprint(),
                ..Bundle::decode(&mallorys(9).bundle).unwrap()
            };
            let bundle: &'static [u8] = Box::leak(Box::new(bundle.encode()));
            rotate(client, &keys::carol(), 1, |offer| {
                offer.modulus = modulus;
                offer.bundle.bundle = bundle;
            });
        },
        &[Refused(REQUEST, Reason::Unauthorised), Alive],
    ),
    word!(
        "a successor of nobody",
        encoded(|out| SuccessorQuery { request: REQUEST, id: [0; 16], key_epoch: u32::MAX }.encode(out)),
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    word!(
        "the successor of the last of all keys",
        encoded(|out| SuccessorQuery { request: REQUEST, id: [ALICE; 16], key_epoch: u32::MAX }.encode(out)),
        &[Refused(REQUEST, Reason::Unknown), Alive]
    ),
    scenario(
        "a bundle of the last of all epochs, which locks its owner out and nobody else",
        |_, client| {
            let bundle = mallorys(u32::MAX);
            publish(client, &bundle.bundle, &bundle.signature);
            assert_eq!(client.hear(), RawHeard::Payload(payload(&Message::Done { request: REQUEST })));
            let next = mallorys(0);
            publish(client, &next.bundle, &next.signature);
        },
        &[Refused(REQUEST, Reason::Rewound), Alive],
    ),
];

/// A record of Mallory's with another type.
fn typed(client: &mut RawClient, kind: u16) -> Vec<u8> {
    let (keys, _) = client.keys.as_mut().unwrap();
    keys.seal(kind, &[4, 0, 1])
}

/// A row that says this record.
macro_rules! record {
    ($name:literal, |$client:ident| $record:expr) => {
        scenario(
            $name,
            |_, client: &mut RawClient| {
                let $client = &mut *client;
                let record = $record;
                client.wire.say(&record);
            },
            OUT,
        )
    };
}

pub(crate) const RECORDS: &[Row] = &[
    record!("a hello on an established connection", |client| client.hello.clone()),
    record!("a sealed hello on an established connection", |client| typed(client, raw::CLIENT_HELLO)),
    record!("a ServerHello from a client that was let in", |client| typed(client, raw::SERVER_HELLO)),
    record!("a second claim", |client| typed(client, raw::CLIENT_AUTH)),
    record!("a ServerAuth from a client that was let in", |client| typed(client, raw::SERVER_AUTH)),
    record!("a Refusal from a client that was let in", |client| typed(client, raw::REFUSAL)),
    record!("a record of a type that there is not", |client| typed(client, 0x0400)),
    record!("a record in the clear", |_client| clear(
        APPLICATION,
        &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    )),
    record!("the server's settings, reflected", |client| {
        let (_, keys) = client.keys.as_mut().unwrap();
        keys.counter = 0;
        keys.seal(APPLICATION, &[4, 0, 1])
    }),
    record!("a record that is 65,536 records ahead, with the right sequence number", |client| {
        client.keys.as_mut().unwrap().0.counter = 65_536;
        client.sealed(&[4, 0, 1])
    }),
    record!("the record behind the next", |client| {
        client.sealed(&[4, 0, 1]);
        client.sealed(&[4, 0, 1])
    }),
    record!("a record under the key of the handshake", |client| {
        let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
        keys.seal(APPLICATION, &[4, 0, 1])
    }),
    record!("a record under a key that is not used yet", |client| {
        client.keys.as_mut().unwrap().0.update();
        client.sealed(&[4, 0, 1])
    }),
    scenario(
        "a record under the key before the present one",
        |_, client| {
            let mut former = client.keys.as_ref().unwrap().0.clone();
            client.update_key();
            former.counter = 1;
            client.wire.say(&former.seal(APPLICATION, &[4, 0, 1]));
        },
        OUT,
    ),
    scenario("a key update that is not followed", |_, client| client.say(&[8, 0x22]), OUT),
    record!("a key update with something behind it", |client| client.sealed(&[8, 0x22, 0])),
    record!("a close with a reason that there is not", |client| client.sealed(&[8, 0x21, 1, 99])),
    record!("a close without all of its body", |client| client.sealed(&[8, 0x21])),
    record!("a close with something behind it", |client| client.sealed(&[8, 0x21, 0, 0])),
    record!("64 KiB of zeros from a client that was let in", |_client| vec![0; 65_536]),
    record!("64 KiB of a right header, and nothing right behind it", |_client| clear(APPLICATION, &[7; 16_000])),
    scenario(
        "half a record, and gone",
        |_, client| {
            let record = client.sealed(&[7; 1000]);
            client.wire.say(&record[..500]);
            client.wire.finish();
        },
        OUT,
    ),
    scenario(
        "a request and no more, with an ear for its answer",
        |_, client| {
            client.say_message(&by_name("nobody-at-all"));
            client.wire.finish();
        },
        &[Refused(REQUEST, Reason::Unknown), End],
    ),
    scenario(
        "a reset in the middle of requests",
        |ground, client| {
            for _ in 0..50 {
                client.say_message(&by_name("alice"));
            }
            rustix::net::sockopt::set_socket_linger(&client.wire.stream, Some(Duration::ZERO)).unwrap();
            *client = enter(ground);
        },
        ALIVE,
    ),
    // A close, and what comes behind it.
    scenario("a close with the server's reason", |_, client| client.say(&[8, 0x21, 1, 19]), &[Closed(None), End]),
    scenario(
        "requests behind a close",
        |_, client| {
            client.say(&[8, 0x21, 0]);
            for _ in 0..10 {
                client.say_message(&by_name("alice"));
            }
        },
        &[Closed(None), End],
    ),
    scenario(
        "requests in front of a close, which are answered before it",
        |_, client| {
            client.say_message(&by_name("nobody-at-all"));
            client.say(&[8, 0x21, 0]);
        },
        &[Refused(REQUEST, Reason::Unknown), Closed(None), End],
    ),
    scenario(
        "rubbish behind a close",
        |_, client| {
            client.say(&[8, 0x21, 0]);
            client.wire.say(&[0xff; 30_000]);
        },
        &[Closed(None), End],
    ),
    // Much of what is allowed.
    scenario(
        "two thousand key updates, with a request under each tenth key",
        |_, client| {
            for round in 0..2000 {
                client.update_key();
                if round % 10 == 0 {
                    client.say(&[4, 0, 3]);
                }
            }
            for _ in 0..200 {
                assert_eq!(client.hear(), RawHeard::Payload(vec![4, 0x10, 3]));
            }
        },
        ALIVE,
    ),
    scenario(
        "ten thousand signs of life in one breath, heard afterwards",
        |_, client| {
            let records: Vec<u8> = (0..10_000).flat_map(|_| client.sealed(&[4, 0, 3])).collect();
            let mut stream = client.wire.stream.try_clone().unwrap();
            let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stream, &records));
            writer.join().unwrap().unwrap();
            for _ in 0..10_000 {
                assert_eq!(client.hear(), RawHeard::Payload(vec![4, 0x10, 3]));
            }
        },
        ALIVE,
    ),
    scenario(
        "five thousand questions whose answers nobody reads",
        |ground, client| {
            rustix::net::sockopt::set_socket_recv_buffer_size(&client.wire.stream, 2048).unwrap();
            let subject = Subject::Id([ALICE; 16]);
            let question = Message::Lookup(Lookup { request: 1, key: true, bundle: true, subject });
            let records: Vec<u8> = (0..5000).flat_map(|_| client.sealed(&payload(&question))).collect();
            let mut stream = client.wire.stream.try_clone().unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            // As many as the server lets stand.
            let _ = std::io::Write::write_all(&mut stream, &records);
            *client = enter(ground);
        },
        ALIVE,
    ),
    scenario(
        "a hundred takeovers in a row",
        |ground, client| {
            let mut crowd: Vec<_> = (0..100).map(|_| enter(ground)).collect();
            core::mem::swap(client, crowd.last_mut().unwrap());
            let first = crowd.first_mut().unwrap();
            assert_eq!(first.hear(), RawHeard::Payload(vec![8, 0x21, 1, 19]), "taken over");
            assert_eq!(first.hear(), RawHeard::End);
        },
        ALIVE,
    ),
    scenario(
        "listening and not, a thousand times",
        |_, client| {
            for _ in 0..1000 {
                client.say_message(&Message::Listening);
                client.say_message(&Message::NotListening);
            }
        },
        ALIVE,
    ),
];

/// What a client hears, up to the answer to a sign of life that it asks for now, or to the end.
pub(crate) fn look(_: &Ground, mut client: RawClient) -> Vec<Seen> {
    const LAST: u16 = 0xbeef;
    client.say_message(&Message::Status { request: LAST });
    let mut seen = Vec::new();
    loop {
        seen.push(match client.hear() {
            RawHeard::Payload(payload) => match Message::decode(&payload).expect("an honest server") {
                Message::StatusResponse { request: LAST } => {
                    seen.push(Alive);
                    return seen;
                }
                Message::Refused { request, reason, .. } => Refused(request, reason),
                Message::Told(Receipt { reason: Some(reason), .. }) => Told(reason),
                Message::Close { reason } => Closed(reason),
                message => Seen::Message(message.code()),
            },
            RawHeard::Refusal(reason) => Seen::Refusal(Reason::from_code(reason).unwrap()),
            RawHeard::End => {
                seen.push(End);
                return seen;
            }
        });
    }
}
