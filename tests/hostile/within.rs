//! What comes within the handshake: claims and offers that prove nothing, or not enough.

use ossicle::crypto::IdentityKey;
use ossicle_core::{Channel, Reason};
use ossicle_tests::keys;
use ossicle_tests::raw::{self, Auth, RawClient, RawHeard, Schedule, clear, expand, hash, mac, random};

use crate::Seen::{End, In, Mode, Refusal};
use crate::before::greeted;
use crate::{ACCOUNT, ALICE, Ground, MALLORY, PASSWORD, Scenario, Seen, scenario};

type Row = Scenario<RawClient>;

/// A row that greets and then says a ClientAuth that is Mallory's but for this.
macro_rules! claim {
    ($name:literal, |$ground:pat_param, $auth:ident| $change:expr, $seen:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                greeted(ground, client);
                let $ground = ground;
                let mut claim = ground.claim();
                let $auth = &mut claim;
                $change;
                client.say_auth(&claim, &ground.mallory);
            },
            $seen,
        )
    };
}

/// A row that greets and then wants to enrol somebody new, with this change. The key is nobody's.
macro_rules! enrol {
    ($name:literal, |$auth:ident| $change:expr, $seen:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                greeted(ground, client);
                let key = keys::server3072();
                let mut claim = Auth::enroll(50, b"newcomer", &key);
                let $auth = &mut claim;
                $change;
                client.say_auth(&claim, &key);
            },
            $seen,
        )
    };
}

/// A row that greets and then enters the account with a key that nobody has, with this change.
macro_rules! login {
    ($name:literal, |$ground:pat_param, $auth:ident| $change:expr, $seen:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                greeted(ground, client);
                let $ground = ground;
                let key = keys::server3072();
                let mut claim = Auth::password(51, ACCOUNT.as_bytes(), PASSWORD.as_bytes(), &key);
                let $auth = &mut claim;
                $change;
                client.say_auth(&claim, &key);
            },
            $seen,
        )
    };
}

/// A row that greets and then says these bytes.
macro_rules! says {
    ($name:literal, |$client:ident| $bytes:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                greeted(ground, client);
                let $client = &mut *client;
                let bytes = $bytes;
                client.wire.say(&bytes);
            },
            &[End],
        )
    };
}

/// A row that greets and then says a ClientAuth with this body, sealed as it should be.
macro_rules! body {
    ($name:literal, $body:expr, $seen:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                greeted(ground, client);
                client.say_auth_body(&$body);
            },
            $seen,
        )
    };
}

/// The ClientAuth of a right claim of Mallory.
fn right(client: &mut RawClient) -> Vec<u8> {
    let key = keys::carol();
    client.auth(&Auth::key(MALLORY, &key), &key)
}

/// A right claim in a connection of its own, as it went over the wire: hello, ClientAuth.
fn recorded(ground: &Ground) -> (Vec<u8>, Vec<u8>) {
    let mut client = RawClient::connect(ground.node.address);
    greeted(ground, &mut client);
    let auth = right(&mut client);
    client.wire.say(&auth);
    assert!(matches!(client.hear(), RawHeard::Payload(payload) if payload[..2] == [7, 0x20]));
    (client.hello, auth)
}

/// The DER of a key with these numbers.
fn spki(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let len = u16::try_from(body.len()).unwrap().to_be_bytes();
        let len = if body.len() < 128 { vec![len[1]] } else { vec![0x82, len[0], len[1]] };
        [&[tag][..], &len, &body].concat()
    }
    let rsa = [0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
    let key = der(0x30, &[&der(2, &[&[0], modulus]), &der(2, &[exponent])]);
    der(0x30, &[&rsa, &der(3, &[&[0], &key])])
}

/// A modulus of so many bytes with these ends.
fn modulus(len: usize, first: u8, last: u8) -> Vec<u8> {
    let mut modulus = vec![0xa5; len];
    modulus[0] = first;
    modulus[len - 1] = last;
    modulus
}

const EXPONENT: [u8; 3] = [1, 0, 1];
const UNAUTHORISED: &[Seen] = &[Refusal(Reason::Unauthorised), End];
const MALFORMED: &[Seen] = &[Refusal(Reason::Malformed), End];

pub(crate) const CLAIMS: &[Row] = &[
    claim!("a right claim", |_, _auth| {}, &[In]),
    // Records in the wrong place.
    says!("a hello twice", |client| client.hello.clone()),
    scenario(
        "two hellos at once",
        |ground, client| {
            let hello = client.right_hello();
            client.say_hello(&hello);
            let again = client.hello.clone();
            client.wire.say(&again);
            client.hear_server(&ground.server);
        },
        &[End],
    ),
    says!("the server's hello, reflected", |client| client.answer[0].clone()),
    says!("the server's proof, reflected", |client| client.answer[1].clone()),
    says!("the server's proof, reflected as a ClientAuth", |client| {
        let mut record = client.answer[1].clone();
        record[2..4].copy_from_slice(&raw::CLIENT_AUTH.to_be_bytes());
        record
    }),
    says!("an application record instead of a claim", |client| {
        let mut record = right(client);
        record[2..4].copy_from_slice(&raw::APPLICATION.to_be_bytes());
        record
    }),
    says!("a request under the keys that a claim would make", |client| {
        right(client);
        client.sealed(&[4, 0, 1])
    }),
    says!("a refusal by the client", |client| {
        let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
        keys.seal(raw::REFUSAL, &[3, 0, 0, 0, 0])
    }),
    // Records of other sessions, and under other keys.
    scenario(
        "the claim of another session, replayed",
        |ground, client| {
            let (_, auth) = recorded(ground);
            greeted(ground, client);
            client.wire.say(&auth);
        },
        &[End],
    ),
    scenario(
        "a whole session, replayed",
        |ground, client| {
            let (hello, auth) = recorded(ground);
            client.wire.say(&hello);
            assert!(client.wire.record().is_some() && client.wire.record().is_some());
            client.wire.say(&auth);
        },
        &[End],
    ),
    says!("a claim under the server's key", |client| {
        let (mut keys, _) = client.schedule.as_ref().unwrap().server(&client.t2, 0);
        keys.seal(raw::CLIENT_AUTH, &[1; 323])
    }),
    says!("a claim under the keys of another agreement", |client| {
        client.schedule = Some(Schedule::full(&random()));
        right(client)
    }),
    says!("a claim under the keys of a resumption", |client| {
        client.schedule = Some(Schedule::resumed(&[0; 32], &random()));
        right(client)
    }),
    says!("a claim over the transcript of another hello", |client| {
        client.t2[0] ^= 1;
        right(client)
    }),
    says!("a claim as record number 1", |client| {
        let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
        keys.counter = 1;
        keys.seal(raw::CLIENT_AUTH, &[1; 323])
    }),
    says!("a claim with the sequence number 1", |client| {
        let mut record = right(client);
        record[7] = 1;
        record
    }),
    says!("a claim with a flipped bit in its tag", |client| {
        let mut record = right(client);
        *record.last_mut().unwrap() ^= 1;
        record
    }),
    says!("a claim with another version in its header", |client| {
        let mut record = right(client);
        record[1] = 1;
        record
    }),
    says!("a claim that is longer than any", |_client| clear(raw::CLIENT_AUTH, &[7; 1529])),
    says!("a claim that is shorter than any", |_client| clear(raw::CLIENT_AUTH, &[7; 15])),
    says!("64 KiB of zeros instead of a claim", |_client| vec![0; 65_536]),
    // It stops.
    scenario(
        "half a claim, then the end",
        |ground, client| {
            greeted(ground, client);
            let record = right(client);
            client.wire.say(&record[..100]);
            client.wire.finish();
        },
        &[End],
    ),
    scenario(
        "a reset instead of a claim",
        |ground, client| {
            greeted(ground, client);
            rustix::net::sockopt::set_socket_linger(&client.wire.stream, Some(core::time::Duration::ZERO)).unwrap();
            *client = RawClient::connect(ground.node.address);
            client.wire.finish();
        },
        &[End],
    ),
    scenario(
        "a right claim, and gone before its answer",
        |ground, client| {
            greeted(ground, client);
            let record = right(client);
            client.wire.say(&record);
            *client = RawClient::connect(ground.node.address);
            client.wire.finish();
        },
        &[End],
    ),
    // Claims that open and are none.
    body!("a claim of nothing", [], &[End]),
    body!("a claim of its kind alone", [1], &[End]),
    body!("a claim of kind 0", [0; 323], &[End]),
    body!("a claim by password with nothing right in it", [3; 323], &[End]),
    body!("a claim of kind 4, which is reserved", [4; 323], &[End]),
    body!("a claim of kind 255", [255; 323], &[End]),
    body!("a key's claim that ends in its id", [1; 12], &[End]),
    body!("a key's claim that ends in its Finished", [1; 50], &[End]),
    body!("a newcomer's claim that ends in its name", [&[2][..], &[7; 16], &[64], &[b'a'; 20]].concat(), &[End]),
    body!("a newcomer's claim in the form of a key's", [&[2][..], &[7; 16], &[0; 6], &[9; 288]].concat(), &[End]),
    body!(
        "a key's claim in the form of a newcomer's",
        [&[1][..], &[7; 16], b"\x03bob", &[9; 700]].concat(),
        UNAUTHORISED
    ),
    body!("the proof of a resumption where nothing was resumed", [0; 34], &[End]),
    // Whose id, key or signature is not Mallory's.
    claim!("an id that nobody has", |_, auth| auth.id = [0; 16], UNAUTHORISED),
    claim!("another's id, with the right proofs for it", |_, auth| auth.id = [ALICE; 16], UNAUTHORISED),
    claim!(
        "another's id and key, without its signature",
        |_, auth| {
            auth.id = [ALICE; 16];
            auth.spki = raw::spki(&keys::alice());
        },
        UNAUTHORISED
    ),
    claim!("the highest key epoch", |_, auth| auth.key_epoch = u32::MAX, UNAUTHORISED),
    claim!("unknown capabilities", |_, auth| auth.caps = 0xffff, &[In]),
    claim!("a signature of zeros", |_, auth| auth.signature = Some(vec![0; 256]), UNAUTHORISED),
    claim!("a signature of ones", |_, auth| auth.signature = Some(vec![0xff; 256]), UNAUTHORISED),
    claim!("no signature", |_, auth| auth.signature = Some(Vec::new()), UNAUTHORISED),
    claim!("a signature of 255 bytes", |_, auth| auth.signature = Some(vec![7; 255]), UNAUTHORISED),
    claim!("a signature of 257 bytes", |_, auth| auth.signature = Some(vec![7; 257]), UNAUTHORISED),
    claim!("a signature of the longest key", |_, auth| auth.signature = Some(vec![7; 512]), UNAUTHORISED),
    claim!(
        "the modulus as signature",
        |ground, auth| {
            auth.signature = Some(ground.mallory.modulus().to_vec());
        },
        UNAUTHORISED
    ),
    claim!(
        "a right signature over another text",
        |ground, auth| {
            auth.signature = Some(raw::sign(&ground.mallory, "ossicle HS1 client auth", &[7; 32]));
        },
        UNAUTHORISED
    ),
    claim!("a Finished of zeros", |_, auth| auth.finished = Some(vec![0; 32]), UNAUTHORISED),
    claim!("a byte behind the Finished", |_, auth| auth.behind = vec![0], UNAUTHORISED),
    scenario(
        "a right signature in the server's words",
        |ground, client| {
            greeted(ground, client);
            let claim = ground.claim();
            let t5 = hash(&[&client.t4, &[1], &claim.id, &hash(&[&claim.spki]), &[0; 4], &[0; 2]]);
            let signature = raw::sign(&ground.mallory, "ossicle HS1 server auth", &t5);
            client.say_auth(&Auth { signature: Some(signature), ..claim }, &ground.mallory);
        },
        UNAUTHORISED,
    ),
    // Whoever enters an account.
    login!("a wrong password", |_, auth| auth.password[1] ^= 1, UNAUTHORISED),
    login!("the beginning of the password", |_, auth| (auth.password[0], auth.password[13]) = (12, 0), UNAUTHORISED),
    login!("a password for a name that has no account", |_, auth| auth.name = b"nobody".to_vec(), UNAUTHORISED),
    login!("a password for a client that has no account", |_, auth| auth.name = b"alice".to_vec(), UNAUTHORISED),
    login!("the password under a name that a terminal obeys", |_, auth| auth.name = b"\x1b[2J".to_vec(), MALFORMED),
    login!("the password without a name", |_, auth| auth.name = Vec::new(), &[End]),
    login!("the password with a signature of zeros", |_, auth| auth.signature = Some(vec![0; 384]), UNAUTHORISED),
    login!("the password with another's key", |_, auth| auth.spki = raw::spki(&keys::alice()), UNAUTHORISED),
    login!("the password with a wrong Finished", |_, auth| auth.finished = Some(vec![0; 32]), &[End]),
    login!("the password with bytes behind", |_, auth| auth.behind = vec![0], &[End]),
    login!("a password of no bytes", |_, auth| auth.password = vec![0; 129], &[End]),
    login!("a password of 129 bytes", |_, auth| auth.password = vec![129; 129], &[End]),
    login!("a password that is shorter than it is", |_, auth| auth.password[0] = 12, &[End]),
    login!("a password without its padding", |_, auth| auth.password.truncate(14), &[End]),
    scenario(
        "the password with a key that is enrolled",
        |ground, client| {
            greeted(ground, client);
            let claim = Auth::password(51, ACCOUNT.as_bytes(), PASSWORD.as_bytes(), &ground.mallory);
            client.say_auth(&claim, &ground.mallory);
        },
        &[Refusal(Reason::NameInUse), End],
    ),
    enrol!(
        "a newcomer with the name of an account",
        |auth| auth.name = ACCOUNT.to_uppercase().into_bytes(),
        &[Refusal(Reason::NameInUse), End]
    ),
    // Newcomers.
    enrol!("a newcomer without a name", |auth| auth.name = Vec::new(), &[End]),
    enrol!("a newcomer with a name of 65 bytes", |auth| auth.name = vec![b'a'; 65], &[End]),
    enrol!("a newcomer with a name that is not UTF-8", |auth| auth.name = b"new\xffcomer".to_vec(), &[End]),
    enrol!("a newcomer with a surrogate in its name", |auth| auth.name = b"new\xed\xa0\x80".to_vec(), &[End]),
    enrol!("a newcomer with an overlong letter", |auth| auth.name = b"new\xc1\xa1".to_vec(), &[End]),
    enrol!("a newcomer with a name that a terminal obeys", |auth| auth.name = b"\x1b[2J\x07".to_vec(), MALFORMED),
    enrol!("a newcomer with a zero byte in its name", |auth| auth.name = b"new\0comer".to_vec(), MALFORMED),
    enrol!("a newcomer with two lines in its name", |auth| auth.name = b"new\ncomer".to_vec(), MALFORMED),
    enrol!("a newcomer whose name looks like another's", |auth| auth.name = "аlice".as_bytes().to_vec(), MALFORMED),
    enrol!(
        "a newcomer with another's name in full width",
        |auth| {
            auth.name = "ａｌｉｃｅ".as_bytes().to_vec();
        },
        &[Refusal(Reason::NameInUse), End]
    ),
    enrol!("a newcomer with another's id", |auth| auth.id = [ALICE; 16], &[Refusal(Reason::NameInUse), End]),
    enrol!("a newcomer with a wrong Finished", |auth| auth.finished = Some(vec![0; 32]), &[End]),
    enrol!("a newcomer with a signature of zeros", |auth| auth.signature = Some(vec![0; 384]), UNAUTHORISED),
    enrol!("a newcomer with bytes behind", |auth| auth.behind = vec![0; 300], &[End]),
    enrol!("a key without its last byte", |auth| auth.spki.truncate(421), &[End]),
    enrol!("a key that says it is longer than all", |auth| auth.spki[2..4].copy_from_slice(&[0xff; 2]), &[End]),
    enrol!("a key that says it is of no length", |auth| auth.spki[2..4].copy_from_slice(&[0; 2]), &[End]),
    enrol!("a key of 1024 bits", |auth| auth.spki = spki(&modulus(128, 0x80, 1), &EXPONENT), &[End]),
    enrol!("a key of 2040 bits", |auth| auth.spki = spki(&modulus(255, 0x80, 1), &EXPONENT), &[End]),
    enrol!("a key of 2047 bits", |auth| auth.spki = spki(&modulus(256, 0x7f, 1), &EXPONENT), &[End]),
    enrol!("a key of 2056 bits", |auth| auth.spki = spki(&modulus(257, 0x80, 1), &EXPONENT), &[End]),
    enrol!("a key of 8192 bits", |auth| auth.spki = spki(&modulus(1024, 0x80, 1), &EXPONENT), &[End]),
    enrol!("an even modulus", |auth| auth.spki = spki(&modulus(256, 0x80, 0xfe), &EXPONENT), &[End]),
    enrol!("the exponent 3", |auth| auth.spki = spki(&modulus(256, 0x80, 1), &[3]), &[End]),
    enrol!("the exponent 1", |auth| auth.spki = spki(&modulus(256, 0x80, 1), &[1]), &[End]),
    enrol!(
        "the exponent 65537 in four bytes",
        |auth| {
            auth.spki = spki(&modulus(256, 0x80, 1), &[0, 1, 0, 1]);
        },
        &[End]
    ),
    enrol!("a key of another algorithm", |auth| auth.spki[18] = 10, &[End]),
    enrol!("a key whose owner cannot sign", |auth| auth.spki = spki(&modulus(256, 0x80, 1), &EXPONENT), UNAUTHORISED),
    // What looks wrong and is not: the engine of an honest client waits, but the server need not care.
    scenario(
        "a right claim with requests behind it in one write",
        |ground, client| {
            let server = keys::server();
            client.greet(&server);
            let claim = client.auth(&ground.claim(), &ground.mallory);
            let request = client.sealed(&[4, 0, 7]);
            client.wire.say(&[claim, request].concat());
        },
        &[In],
    ),
];

/// Says a hello that offers this channel, with a binder under this secret.
fn offer(client: &mut RawClient, id: &[u8; 16], secret: &[u8; 32]) {
    offer_but(client, id, secret, |_| {});
}

/// The same, with a hello that is changed once it is bound.
fn offer_but(client: &mut RawClient, id: &[u8; 16], secret: &[u8; 32], change: impl Fn(&mut [u8])) {
    let mut hello = client.right_hello();
    hello.offer = [&[1][..], id, &[0; 32]].concat();
    let mut record = hello.record();
    let bound = record.len() - 32;
    let key = expand(secret, b"ossicle ch binder\0", 32);
    let binder = mac(&key, &hash(&[&hash(&[b"ossicle HS1\0"]), &record[..bound]]));
    record[bound..].copy_from_slice(&binder);
    change(&mut record);
    client.hello = record.clone();
    client.wire.say(&record);
}

/// Takes the server's two records of a resumption and makes the ClientAuth to it, with these capabilities.
fn finish(client: &mut RawClient, channel: &Channel, caps: u16) -> Vec<u8> {
    let (hello, auth) = (client.wire.record().expect("a ServerHello"), client.wire.record().expect("a ServerAuth"));
    assert_eq!((hello[8], auth.len()), (1, 56), "it was resumed");
    let theirs: [u8; 32] = hello[47..79].try_into().unwrap();
    let schedule = Schedule::resumed(channel.secret.expose(), &x25519_dalek::x25519(client.ephemeral, theirs));
    let t1 = hash(&[&hash(&[b"ossicle HS1\0"]), &client.hello]);
    client.t2 = hash(&[&t1, &hello]);
    let (mut keys, fin_key) = schedule.server(&client.t2, 0);
    let finished = keys.open(&auth).expect("ServerAuth opens");
    let Channel { client: id, client_key, key_epoch, server, server_key, .. } = channel;
    let t3 = hash(&[&client.t2, server, server_key, id, client_key, &key_epoch.to_be_bytes()]);
    assert_eq!(mac(&fin_key, &t3)[..], finished, "fin_S");
    let caps = caps.to_be_bytes();
    let t4 = hash(&[&t3, &finished, &caps]);
    let (mut keys, fin_key) = schedule.client(&client.t2);
    let finished = mac(&fin_key, &t4);
    client.keys = Some(schedule.application(&hash(&[&t4, &finished])));
    client.schedule = Some(schedule);
    client.answer = vec![hello, auth];
    keys.seal(raw::CLIENT_AUTH, &[&caps[..], &finished].concat())
}

/// A row that offers Mallory's channel, rightly, and then says what this makes of it.
macro_rules! resumes {
    ($name:literal, |$ground:ident, $client:ident, $channel:ident| $bytes:expr, $seen:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                let $channel = ground.channel();
                offer(client, &$channel.id, $channel.secret.expose());
                let ($ground, $client) = (ground, &mut *client);
                let bytes: Vec<u8> = $bytes;
                client.wire.say(&bytes);
            },
            $seen,
        )
    };
}

/// A row whose offer must be answered by a full handshake, which then succeeds.
macro_rules! in_vain {
    ($name:literal, |$ground:ident, $client:ident| $offer:expr) => {
        scenario(
            $name,
            |ground: &Ground, client: &mut RawClient| {
                let ($ground, $client) = (ground, &mut *client);
                $offer;
                client.hear_server(&ground.server);
                client.say_auth(&ground.claim(), &ground.mallory);
            },
            &[Mode(2), In],
        )
    };
}

pub(crate) const OFFERS: &[Row] = &[
    resumes!("a right offer", |_ground, client, channel| finish(client, &channel, 0), &[Mode(1), In]),
    resumes!(
        "a right offer with unknown capabilities",
        |_ground, client, channel| { finish(client, &channel, 0xffff) },
        &[Mode(1), In]
    ),
    in_vain!("the offer of a channel that there never was", |_ground, client| offer(client, &[7; 16], &[7; 32])),
    in_vain!("the offer of the channel of zeros", |_ground, client| offer(client, &[0; 16], &[0; 32])),
    in_vain!("the offer of a channel without its secret", |ground, client| {
        offer(client, &ground.channel().id, &[0; 32]);
    }),
    in_vain!("a binder of zeros", |ground, client| {
        let channel = ground.channel();
        offer_but(client, &channel.id, channel.secret.expose(), |hello| hello[100..].fill(0));
    }),
    in_vain!("a binder with a flipped bit", |ground, client| {
        let channel = ground.channel();
        offer_but(client, &channel.id, channel.secret.expose(), |hello| hello[131] ^= 1);
    }),
    in_vain!("another's channel under one's own secret", |ground, client| {
        let of_another = ground.runtime.block_on(async {
            let mut other = ground.node.enrol(61, "somebody", keys::server3072()).await;
            other.take_channel()
        });
        offer(client, &of_another.id, ground.channel().secret.expose());
    }),
    in_vain!("a binder that covers another hello", |ground, client| {
        let channel = ground.channel();
        offer_but(client, &channel.id, channel.secret.expose(), |hello| hello[20] ^= 1);
    }),
    in_vain!("a channel that a full handshake has ended", |ground, client| {
        let channel = ground.channel();
        ground.channel();
        offer(client, &channel.id, channel.secret.expose());
    }),
    in_vain!("a channel whose owner has ended it", |ground, client| {
        let channel = ground.channel();
        let ended = ground.runtime.block_on(ground.node.server.expire_channels(&[MALLORY; 16])).unwrap();
        assert_eq!(ended, 1);
        offer(client, &channel.id, channel.secret.expose());
    }),
    scenario(
        "the offer of another session, replayed, without its proof",
        |ground, client| {
            let channel = ground.channel();
            let mut recorded = RawClient::connect(ground.node.address);
            offer(&mut recorded, &channel.id, channel.secret.expose());
            let proof = finish(&mut recorded, &channel, 0);
            // No client says a hello twice, so this one is not even answered.
            client.wire.say(&[recorded.hello, proof].concat());
        },
        &[End],
    ),
    resumes!(
        "the server's proof of a resumption, reflected",
        |_ground, client, channel| {
            finish(client, &channel, 0);
            let mut record = client.answer[1].clone();
            record[2..4].copy_from_slice(&raw::CLIENT_AUTH.to_be_bytes());
            record
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a proof with a flipped bit",
        |_ground, client, channel| {
            let mut record = finish(client, &channel, 0);
            record[20] ^= 1;
            record
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a sealed proof of zeros",
        |_ground, client, channel| {
            finish(client, &channel, 0);
            let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
            keys.seal(raw::CLIENT_AUTH, &[0; 34])
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a sealed proof without its last byte",
        |_ground, client, channel| {
            finish(client, &channel, 0);
            let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
            keys.seal(raw::CLIENT_AUTH, &[0; 33])
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a proof of nothing",
        |_ground, client, channel| {
            finish(client, &channel, 0);
            let (mut keys, _) = client.schedule.as_ref().unwrap().client(&client.t2);
            keys.seal(raw::CLIENT_AUTH, &[])
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a signature where a proof is due",
        |ground, client, channel| {
            finish(client, &channel, 0);
            let key: &IdentityKey = &ground.mallory;
            client.auth(&ground.claim(), key)
        },
        &[Mode(1), End]
    ),
    resumes!(
        "a resumption that goes on with a second offer",
        |_ground, client, channel| {
            finish(client, &channel, 0);
            client.hello.clone()
        },
        &[Mode(1), End]
    ),
    scenario(
        "a channel that is revoked with its client while it is resumed",
        |ground, client| {
            let key = keys::server4096();
            let channel = ground.runtime.block_on(async {
                let mut client = ground.node.enrol(60, "short-lived", keys::server4096()).await;
                let channel = client.take_channel();
                client.close().await;
                channel
            });
            assert_eq!(channel.client_key, key.fingerprint());
            offer(client, &channel.id, channel.secret.expose());
            let proof = finish(client, &channel, 0);
            assert!(ground.runtime.block_on(ground.node.server.revoke(&[60; 16])).unwrap());
            client.wire.say(&proof);
        },
        &[Mode(1), Refusal(Reason::Unauthorised), End],
    ),
    scenario(
        "one channel on two connections at once, of which the first to prove it is let in",
        |ground, client| {
            let channel = ground.channel();
            let mut other = RawClient::connect(ground.node.address);
            for client in [&mut *client, &mut other] {
                offer(client, &channel.id, channel.secret.expose());
            }
            let proof = finish(client, &channel, 0);
            finish(&mut other, &channel, 0);
            client.wire.say(&proof);
            // The proof of the one is none of the other.
            other.wire.say(&proof);
            assert_eq!(other.hear(), RawHeard::End);
        },
        &[Mode(1), In],
    ),
];

/// What a client hears that has made its claim.
pub(crate) fn look(_: &Ground, mut client: RawClient) -> Vec<Seen> {
    let mut seen = Vec::new();
    if client.hello.get(83) == Some(&1) || client.answer.first().is_some_and(|hello| hello[8] != 0) {
        seen.push(Mode(client.answer[0][8]));
    }
    loop {
        match client.hear() {
            RawHeard::Payload(payload) if payload[..2] == [7, 0x20] => {
                seen.push(In);
                return seen;
            }
            RawHeard::Payload(payload) => panic!("{payload:?} instead of settings"),
            RawHeard::Refusal(reason) => seen.push(Refusal(Reason::from_code(reason).unwrap())),
            RawHeard::End => {
                seen.push(End);
                return seen;
            }
        }
    }
}
