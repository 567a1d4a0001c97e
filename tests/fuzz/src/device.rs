//! The whole client of a device (`Client`) under a server that says anything: what it joins, publishes, starts, opens and
//! answers, in buffers of 1 KiB.
//!
//! An input is a byte of options and a stream as in `connections`, always under the stub. Bit 1: headers and tags are put
//! around payloads. Bit 2: bytes come one by one. Bit 3: the device knows a bundle of its owner beforehand. Bit 4: when the
//! stream is at its end, the device connects again and gets the rest of it, once.

use ossicle_core::fuzzing::STUB_MAC;
use ossicle_core::{
    BufferError, Bundle, BundleKeys, Client, ClientBuffers, ClientEvent, ClientGroup, ClientIdentity, ClientStep,
    Closed, Conversation, Decision, DirectoryEntry, Drive, Error, Fixed, GroupFlags, Invite, Member, MemberChanged,
    MemberState, Members, Message, PeerConfig, PeerError, PeerStatus, Reason, Receipt, Rung, Rungs, RustCrypto,
    SendingChain, Settings, SignedBundle, ToldBy, WRAP_LEN,
};

use crate::connections::{CHUNKED, FRAMED, framed};
use crate::peers::asked;
use crate::script::{Rng, Script, Stub, long, seed};
use crate::{Reached, Target, keys};

/// See the module.
pub const TARGET: Target = Target { name: "device", run, states, seeds };

const KNOWN: u8 = 1 << 3;
const AGAIN: u8 = 1 << 4;

const DEVICE_ID: [u8; 16] = [0xb0; 16];
const OWNER_ID: [u8; 16] = [0xa1; 16];
/// What stands for every signature of an RSA key.
const SIGNATURE: [u8; 256] = [0x53; 256];
/// Bytes of a device's buffers.
const ROOM: usize = 1024;

fn states() -> Vec<&'static str> {
    vec![
        "another server",
        "asked for work",
        "busy",
        "closed",
        "connected",
        "group joined",
        "group message opened",
        "group over",
        "group ready",
        "malformed",
        "message opened",
        "not authentic",
        "out of order",
        "peer lost",
        "peer ready",
        "ready",
        "receipt",
        "refused",
        "resumed",
        "settings changed",
        "signature wrong",
        "signed message opened",
        "too long a record",
        "truncated",
    ]
}

fn owner() -> (Member, BundleKeys, Bundle) {
    let member = Member { id: OWNER_ID, key: keys::alice().public().fingerprint() };
    let keys = BundleKeys::generate(4, &mut Rng::new(4)).expect("the generator does not fail");
    let bundle = keys.bundle(&member, 3, [0; 32]);
    (member, keys, bundle)
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let mut script = Script::new(data);
    let Some(bits) = script.u8() else { return };
    let _stub = Stub::set(true);
    let stream = if bits & FRAMED != 0 {
        // Twice: a record of another connection has another number.
        let first = if bits & AGAIN != 0 { script.long().unwrap_or_default() } else { script.rest() };
        let second = if bits & AGAIN != 0 { script.rest() } else { &[] };
        [framed(&mut Script::new(first)), framed(&mut Script::new(second))]
    } else {
        [script.rest().to_vec(), Vec::new()]
    };
    let (_, _, bundle) = owner();
    let oldest = (bits & KNOWN != 0).then_some(bundle);
    let identity =
        ClientIdentity { id: DEVICE_ID, key_epoch: 0, key: keys::carol().public(), server: keys::server().public() };
    let peer = PeerConfig { id: OWNER_ID, key: keys::alice().public(), oldest };
    let (mut rx, mut tx, mut signature, mut group) = ([0; ROOM], [0; ROOM], [0; 256], ClientGroup::new());
    let buffers = ClientBuffers { rx: &mut rx, tx: &mut tx, signature: &mut signature };
    let mut client = Client::<1>::new(identity, &[peer], buffers, &seed(1)).expect("the buffers are long enough");
    client.accept_invitations(0, &mut group);
    client.start(0);
    let mut rng = Rng::new(5);
    let chunk = if bits & CHUNKED != 0 { 1 } else { usize::MAX };
    connection(&mut client, &stream[0], chunk, &mut rng, reached);
    if bits & AGAIN != 0 {
        client.reconnect(&seed(2));
        // What takes longer is as good as what does not end.
        if (0..64).all(|_| client.solve()) {
            return;
        }
        connection(&mut client, &stream[1], chunk, &mut rng, reached);
    }
}

fn connection(client: &mut Client<'_, '_, 1>, stream: &[u8], chunk: usize, rng: &mut Rng, reached: Reached<'_>) {
    let mut rest = stream;
    // Each round moves bytes or handles something, if only one of the short records in the buffer: a device that does
    // neither would hang.
    let mut idle = 0;
    loop {
        loop {
            match client.io() {
                Ok(None) => break,
                Ok(Some(io)) if !io.write.is_empty() => {
                    let len = io.write.len().min(chunk);
                    client.written(len);
                    idle = 0;
                }
                Ok(Some(io)) => {
                    assert!(!io.read.is_empty(), "there is something to do");
                    let len = io.read.len().min(chunk).min(rest.len());
                    let (now, behind) = rest.split_at(len);
                    io.read[..len].copy_from_slice(now);
                    rest = behind;
                    if let Err(error) = client.read(len) {
                        return failed(error, reached);
                    }
                    if len == 0 {
                        // The end of the stream, behind a close.
                        return;
                    }
                    idle = 0;
                }
                Err(error) => return failed(error, reached),
            }
        }
        idle += 1;
        assert!(idle < 64, "the device hangs");
        let step = match client.poll(rng) {
            Ok(step) => step,
            Err(error) => return failed(error, reached),
        };
        match step {
            ClientStep::Io => {}
            ClientStep::Sign(_) => {
                idle = 0;
                match client.sign(&SIGNATURE) {
                    Ok(()) | Err(Error::Buffer(_)) => {}
                    Err(error) => panic!("what was asked for is taken: {error:?}"),
                }
            }
            ClientStep::Verify { signature, .. } => {
                let is_right = signature == SIGNATURE;
                if !is_right {
                    reached("signature wrong");
                }
                if let Err(error) = client.verified(is_right) {
                    assert!(!is_right);
                    return failed(error, reached);
                }
            }
            ClientStep::Event(event) => {
                idle = 0;
                let is_ready = matches!(event, ClientEvent::PeerReady(_));
                let is_lost = matches!(event, ClientEvent::PeerLost { .. });
                let is_closed = matches!(event, ClientEvent::Closed(_));
                let joins = matches!(event, ClientEvent::GroupJoined | ClientEvent::GroupLost(_));
                let speaks = matches!(event, ClientEvent::GroupReady);
                handle(event, reached);
                if joins {
                    client.start_in_group();
                }
                if speaks {
                    assert!(client.is_group_ready());
                    client.send_to_group(Rungs::NONE.with(Rung::Opened), 0, b"21.50C led=0").expect("there is room");
                }
                if is_ready {
                    assert!(client.is_ready(0));
                    client
                        .send(0, Rungs::NONE.with(Rung::Delivered), false, 0, b"21.50C led=0")
                        .expect("there is room");
                }
                if is_lost {
                    client.start(0);
                }
                if is_closed {
                    // Nothing comes behind it: whoever drives a client leaves.
                    return;
                }
            }
            _ => panic!("a step that nobody told the targets of"),
        }
    }
}

fn handle(event: ClientEvent<'_>, reached: Reached<'_>) {
    match event {
        ClientEvent::Connected { resumed, .. } => reached(if resumed { "resumed" } else { "connected" }),
        ClientEvent::Ready => reached("ready"),
        ClientEvent::PeerReady(peer) => {
            assert_eq!(peer, 0);
            reached("peer ready");
        }
        ClientEvent::PeerLost { peer, .. } => {
            assert_eq!(peer, 0);
            reached("peer lost");
        }
        ClientEvent::Message { peer, signed, body, .. } => {
            assert!(peer == 0 && body.len() < ROOM);
            reached(if signed { "signed message opened" } else { "message opened" });
        }
        ClientEvent::Receipt { receipt, .. } => {
            let theirs = matches!(receipt.rung, Rung::Delivered | Rung::Opened);
            assert!(!theirs || receipt.tag.is_some(), "the recipient's word has its tag");
            reached("receipt");
        }
        ClientEvent::GroupJoined => reached("group joined"),
        ClientEvent::GroupReady => reached("group ready"),
        ClientEvent::GroupMessage { from, body, .. } => {
            assert!(from != DEVICE_ID && body.len() < ROOM);
            reached("group message opened");
        }
        ClientEvent::GroupReceipt { receipt, .. } => {
            let theirs = matches!(receipt.rung, Rung::Delivered | Rung::Opened);
            assert!(!theirs || receipt.tag.is_some(), "the recipient's word has its tag");
            reached("group receipt");
        }
        ClientEvent::GroupMemberLost { .. } => reached("member lost"),
        ClientEvent::GroupLost(_) => reached("group lost"),
        ClientEvent::GroupOver => reached("group over"),
        ClientEvent::Settings(_) => reached("settings changed"),
        ClientEvent::Closed(_) => reached("closed"),
        _ => panic!("an event that nobody told the targets of"),
    }
}

fn failed(error: Error, reached: Reached<'_>) {
    reached(match error {
        Error::Decode => "malformed",
        Error::Crypto => "not authentic",
        Error::Peer(PeerError::Busy | PeerError::Puzzle { .. }) => "busy",
        Error::Peer(PeerError::Retry) => "asked for work",
        Error::Peer(PeerError::Truncated) => "truncated",
        Error::Peer(PeerError::Refused { .. }) => "refused",
        // A server of the longest key signs more than a device's buffer holds.
        Error::Buffer(BufferError::RxFull) => "too long a record",
        Error::Peer(PeerError::ServerKey) => "another server",
        Error::Peer(PeerError::UnexpectedMessage | PeerError::Version) => "out of order",
        other => panic!("an error that no server can cause: {other:?}"),
    });
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let _stub = Stub::set(true);
    let (owner, owner_keys, owner_bundle) = owner();
    let device = Member { id: DEVICE_ID, key: keys::carol().public().fingerprint() };
    let conversation = Conversation::direct(&owner, &device, 0);
    // What the device will make of its generator: a bundle of epoch 1, whose prekey has the same number.
    let device_keys = BundleKeys::generate(1, &mut Rng::new(5)).expect("the generator does not fail");
    let device_bundle = device_keys.bundle(&device, 1, [0; 32]);
    let mut chain = SendingChain::start(&owner, &conversation, 1, &mut Rng::new(6)).expect("a chain");
    let mut wrap = [0; WRAP_LEN];
    chain
        .wrap(&owner_keys, &owner_bundle, &device, &device_bundle, &mut Rng::new(7), &mut wrap)
        .expect("an honest wrap");
    let mut envelope = |is_signed: bool, body: &[u8]| {
        let mut out = [0; 256];
        let sealed = chain.seal::<RustCrypto>(is_signed, 3, body, &mut out).expect("an honest envelope");
        out[..sealed.len].to_vec()
    };
    let (unsigned, signed) = (envelope(false, b"led=1"), envelope(true, b"led=0"));

    let frame = |kind: u8, payload: &[u8]| [&[kind][..], &long(payload)].concat();
    let say = |message: &Message<'_>| {
        let mut out = [0; 4096];
        let len = message.encode(&mut out).expect("room");
        frame(5, &out[..len])
    };
    // The device's generator makes its keys first, and the chain to its owner next: the name of that chain is known, too.
    let hello = |mode: u8| frame(1, &[&[mode, 1, 0, 0, 1, 0x40, 0x18][..], &[3; 32], &[4; 32]].concat());
    let auth = frame(3, &[&[0x5e; 16][..], &SIGNATURE, &STUB_MAC].concat());
    let finished = frame(3, &STUB_MAC);
    let settings =
        Settings { channel: [0xdd; 16], valid_for: 604_800, heartbeat: 15, timeout: 45, ..Settings::default() };
    let connected = [hello(0), auth, say(&Message::Settings(settings))].concat();
    let signed_bundle = |bundle: &[u8]| {
        let (bundle, signature) = (bundle.to_vec(), SIGNATURE);
        move |tell: &dyn Fn(SignedBundle<'_>) -> Vec<u8>| tell(SignedBundle { bundle: &bundle, signature: &signature })
    };
    let entry = |id: [u8; 16], bundle: Option<SignedBundle<'_>>, request: u16| {
        let entry = DirectoryEntry {
            id,
            name: "somebody",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Online,
            modulus: None,
            bundle,
        };
        say(&Message::LookupResponse { request, entry })
    };
    let of_owner = owner_bundle.encode();
    let of_owner = signed_bundle(&of_owner);
    let done = |request| say(&Message::Done { request });
    let joined = [&connected[..], &entry(DEVICE_ID, None, 1), &done(2)].concat();
    let started = [&joined[..], &of_owner(&|bundle| entry(OWNER_ID, Some(bundle), 3)), &done(4)].concat();
    let delivered = |envelope: &[u8]| {
        let wanted = Rungs::NONE.with(Rung::Delivered).with(Rung::Opened);
        say(&Message::Deliver { wanted, envelope })
    };
    let wrapped = of_owner(&|bundle| say(&Message::WrapDelivery { from: OWNER_ID, wrap: &wrap, bundle }));
    let mut generator = Rng::new(5);
    let chain_id = {
        let _keys = BundleKeys::generate(1, &mut generator).expect("keys");
        *SendingChain::start(&device, &conversation, 0, &mut generator).expect("a chain").chain_id()
    };
    let told = |rung, reason, tag| say(&Message::Told(Receipt { rung, reason, chain: chain_id, from: 0, to: 0, tag }));
    let mac = STUB_MAC.first_chunk().copied();
    let receipts = [
        told(Rung::Accepted, None, None),
        told(Rung::Delivered, None, mac),
        told(Rung::Delivered, None, None),
        told(Rung::Refused, Some(Reason::Rekey), mac),
    ]
    .concat();
    let rest = [say(&Message::Status { request: 9 }), say(&Message::Settings(settings))].concat();
    let close = say(&Message::Close { reason: Some(Reason::TakenOver) });
    let update = say(&Message::KeyUpdate);
    let life = [
        &started[..],
        &wrapped,
        &delivered(&unsigned),
        &delivered(&signed),
        &delivered(&signed),
        &receipts,
        &rest,
        &update,
        &rest,
        &close,
    ]
    .concat();
    let stranger = of_owner(&|bundle| say(&Message::WrapDelivery { from: [1; 16], wrap: &wrap, bundle }));
    let unknown = [&joined[..], &entry(OWNER_ID, None, 3), &stranger, &delivered(&unsigned)].concat();
    let wrong_signature = say(&Message::LookupResponse {
        request: 3,
        entry: DirectoryEntry {
            id: OWNER_ID,
            name: "somebody",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Online,
            modulus: None,
            bundle: Some(SignedBundle { bundle: &owner_bundle.encode(), signature: &[1; 256] }),
        },
    });
    let refusal = |request| say(&Message::Refused { request, reason: Reason::Forbidden, retry_after: None });
    let own_bundle = signed_bundle(&device_bundle.encode());
    let elsewhere = [&connected[..], &own_bundle(&|bundle| entry(DEVICE_ID, Some(bundle), 1)), &done(2)].concat();
    let resumed = [hello(1), finished, say(&Message::Settings(settings)), rest.clone(), close.clone()].concat();
    let group = group(&(owner_keys, owner_bundle), &device_bundle, &say);
    let refused_in_group = [&started[..], &group[0], &group[1], &refusal(6), &group[0]].concat();
    let with = |bits: u8, script: &[u8]| [&[FRAMED | bits], script].concat();
    vec![
        ("life", with(0, &life)),
        ("life-byte-by-byte", with(CHUNKED, &life)),
        ("owner-known", with(KNOWN, &life)),
        ("stream", [&[0], &framed(&mut Script::new(&life))[..]].concat()),
        ("resumed", with(AGAIN, &[long(&started), resumed].concat())),
        ("again-in-full", with(AGAIN, &[long(&started), [hello(2), connected[74 + 3..].to_vec()].concat()].concat())),
        ("asked-for-work", with(AGAIN, &[long(&frame(6, &asked(4))), life.clone()].concat())),
        ("asked-again", with(AGAIN, &[long(&frame(6, &asked(4))), frame(6, &asked(4))].concat())),
        ("asked-for-too-much", with(0, &frame(6, &asked(19)))),
        ("owner-unknown", with(0, &unknown)),
        ("owner-unsigned", with(0, &[&joined[..], &wrong_signature].concat())),
        ("server-unsigned", with(0, &[hello(0), frame(3, &[1; 304])].concat())),
        ("publish-refused", with(0, &[&connected[..], &refusal(1)].concat())),
        ("wrap-refused", with(0, &[&joined[..], &refusal(3), &refusal(4)].concat())),
        ("own-bundle-known", with(0, &elsewhere)),
        ("not-ours", with(0, &[&connected[..], &of_owner(&|bundle| entry(DEVICE_ID, Some(bundle), 1))].concat())),
        ("too-long", with(0, &[&connected[..], &frame(5, &[0; 1100])].concat())),
        ("too-long-a-signature", with(0, &[hello(0), frame(3, &[0x53; 1100])].concat())),
        ("hello-twice", with(0, &[hello(0), hello(0)].concat())),
        ("group", with(0, &[&started[..], &group.concat(), &close].concat())),
        ("group-refused", with(0, &refused_in_group)),
        ("half-a-bundle", with(0, &[&connected[..], &short_bundle(&say)].concat())),
    ]
}

/// The life of a group of the owner's, behind a chain to him that stands: the invitation, the owner as the directory knows
/// him, its answer, the chain of the device, what he says, what became of what it says, the end.
fn group(
    (owner_keys, owner): &(BundleKeys, Bundle),
    device: &Bundle,
    say: &dyn Fn(&Message<'_>) -> Vec<u8>,
) -> Vec<Vec<u8>> {
    const SID: [u8; 16] = [0x77; 16];
    let mut members = [owner.member(), device.member()];
    members.sort_unstable_by_key(|member| member.id);
    let lines: Vec<u8> = members.iter().flat_map(Member::encode).collect();
    let conversation = Conversation::group(SID, 0, &members).expect("two members");
    let flags = GroupFlags::NONE;
    let signature = Decision::Init(flags).sign(owner_keys, &conversation);
    let mut buffer = [0; 512];
    let members = Members::new(&lines).expect("two members");
    let (creator, name) = (OWNER_ID, Fixed(&[0; 117]));
    let invite = Invite { sid: SID, creator, flags, signature: Fixed(&signature), members, name };
    let invite = say(&invite.encode(&mut buffer).expect("room"));
    let bundle = owner.encode();
    let bundle = SignedBundle { bundle: &bundle, signature: &SIGNATURE };
    let looked_up = |request| {
        let entry = DirectoryEntry {
            id: OWNER_ID,
            name: "alice",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Online,
            modulus: Some(keys::alice().public().modulus()),
            bundle: Some(bundle),
        };
        say(&Message::LookupResponse { request, entry })
    };
    let accept = Decision::Accept.sign(owner_keys, &conversation);
    let changed =
        MemberChanged { sid: SID, member: OWNER_ID, state: MemberState::Accepted, signature: Some(Fixed(&accept)) };
    let changed = say(&changed.encode(&mut buffer).expect("room"));
    let mut chain = SendingChain::start(&owner.member(), &conversation, 0, &mut Rng::new(8)).expect("a chain");
    let mut wrap = [0; WRAP_LEN];
    chain.wrap(owner_keys, owner, &device.member(), device, &mut Rng::new(9), &mut wrap).expect("an honest wrap");
    let wrapped = say(&Message::WrapDelivery { from: OWNER_ID, wrap: &wrap, bundle });
    let wanted = Rungs::NONE.with(Rung::Delivered).with(Rung::Opened);
    let mut delivered = |body: &[u8]| {
        let mut out = [0; 256];
        let sealed = chain.seal::<RustCrypto>(true, 0, body, &mut out).expect("an honest envelope");
        say(&Message::Deliver { wanted, envelope: &out[..sealed.len] })
    };
    let said = [delivered(b"reading?"), delivered(b"led on")].concat();
    let receipt =
        Receipt { rung: Rung::Refused, reason: Some(Reason::QueueFull), chain: [3; 8], from: 0, to: 0, tag: None };
    let told = say(&ToldBy { from: OWNER_ID, receipt }.encode(&mut buffer).expect("room"));
    let closed = say(&Closed { sid: SID, by: None, signature: None }.encode(&mut buffer).expect("room"));
    let done = |request| say(&Message::Done { request });
    vec![
        invite,
        looked_up(5),
        done(6),
        [looked_up(7), done(8)].concat(),
        [wrapped, said].concat(),
        [changed, looked_up(9), looked_up(10), done(11)].concat(),
        told,
        closed,
    ]
}

/// What the directory says of the device, with a bundle that is none.
fn short_bundle(say: &dyn Fn(&Message<'_>) -> Vec<u8>) -> Vec<u8> {
    let bundle = Some(SignedBundle { bundle: &[1; 9], signature: &SIGNATURE });
    let status = PeerStatus::Online;
    let entry = DirectoryEntry {
        id: DEVICE_ID,
        name: "somebody",
        key_epoch: 0,
        record_limit: 16_408,
        status,
        modulus: None,
        bundle,
    };
    say(&Message::LookupResponse { request: 1, entry })
}
