//! The device against scripted servers: what it does by itself, whom it obeys, and what a hostile server cannot make it do.
//! The application runs in a thread here; the same script meets the image in QEMU.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use ossicle::crypto::IdentityKey;
use ossicle::device::{Device, Ending, Happened};
use ossicle::ethernet::{HOST, Network};
use ossicle_core::{
    Answer, Bundle, BundleKeys, Closed, Conversation, Decision, DirectoryEntry, EnvelopeHeader, Fixed, GroupFlags,
    GroupPolicy, IdentityPage, Invite, MAX_PAGE_LEN, Member, MemberChanged, MemberState, Members, Message, PageKey,
    PageOwner, PeerStatus, Reason, Receipt, ReceivingChain, Rung, Rungs, RustCrypto, SendingChain, Settings,
    SignedBundle, Subject, WRAP_LEN,
};
use ossicle_tests::qemu::{self, Qemu};
use ossicle_tests::script::{Script, Scripted};
use ossicle_tests::{Rng, keys, public};

const OWNER: [u8; 16] = [0xa1; 16];
const DEVICE: [u8; 16] = [0xde; 16];

/// The owner: whoever plays the server plays it too, since nobody routes here.
struct Owner {
    key: IdentityKey,
    keys: BundleKeys,
    bundle: Bundle,
    signature: Vec<u8>,
    rng: Rng,
    chain_epoch: u32,
}

impl Owner {
    fn new() -> Self {
        let key = keys::alice();
        let mut rng = Rng::new(7);
        let keys = BundleKeys::generate(1, &mut rng).unwrap();
        let bundle = keys.bundle(&Member { id: OWNER, key: public(&key).fingerprint() }, 1, [0; 32]);
        let signature = key.sign(&bundle.statement()).unwrap();
        Self { key, keys, bundle, signature, rng, chain_epoch: 0 }
    }

    fn signed(&self) -> SignedBundle<'_> {
        SignedBundle { bundle: Box::leak(Box::new(self.bundle.encode())), signature: &self.signature }
    }

    fn page(&self, address: SocketAddr) -> Vec<u8> {
        let (server, device) = (keys::server(), keys::bob());
        let parts = device.components().unwrap();
        let mut page = vec![0; MAX_PAGE_LEN];
        let len = IdentityPage {
            id: DEVICE,
            name: "sensor-01",
            key: PageKey {
                d: parts.d.as_slice().try_into().unwrap(),
                p: parts.p.as_slice().try_into().unwrap(),
                q: parts.q.as_slice().try_into().unwrap(),
            },
            // In QEMU's network as in ours.
            address: HOST.octets(),
            port: address.port(),
            server: public(&server),
            owner: PageOwner {
                id: OWNER,
                name: "alice",
                key: public(&self.key),
                bundle: self.bundle,
                signature: &self.signature,
            },
            groups: GroupPolicy::Owner,
        }
        .encode(&mut page)
        .unwrap();
        page.truncate(len);
        page
    }

    /// A chain to the device with this bundle: the wrap, and the chain to send on.
    fn chain(&mut self, device: &Bundle) -> ([u8; WRAP_LEN], SendingChain) {
        let conversation = Conversation::direct(&self.bundle.member(), &device.member(), 0);
        let chain = SendingChain::start(&self.bundle.member(), &conversation, self.chain_epoch, &mut self.rng).unwrap();
        self.chain_epoch += 1;
        let mut wrap = [0; WRAP_LEN];
        chain.wrap(&self.keys, &self.bundle, &device.member(), device, &mut self.rng, &mut wrap).unwrap();
        (wrap, chain)
    }
}

fn seal(chain: &mut SendingChain, signed: bool, text: &str) -> Vec<u8> {
    let mut envelope = [0; 256];
    let sealed = chain.seal::<RustCrypto>(signed, 0, text.as_bytes(), &mut envelope).unwrap();
    envelope[..sealed.len].to_vec()
}

/// The device as it came up: its bundle is published, its chain to the owner stands, it has listened.
struct Joined {
    server: Scripted,
    bundle: Bundle,
    readings: ReceivingChain<64>,
    told: VecDeque<Receipt>,
}

/// Plays the honest server until the device reports. `newest` is what the directory says of the device.
fn join(script: &mut Script, owner: &Owner, newest: Option<&Bundle>) -> Joined {
    let mut server = script.accept(&keys::bob());
    assert_eq!(server.client, DEVICE);
    let mut bundle = None;
    let mut listening = false;
    loop {
        let payload = server.receive();
        match Message::decode(&payload).unwrap() {
            Message::Lookup(lookup) => {
                assert!(lookup.bundle && !lookup.key, "only what is needed");
                let own = lookup.subject == Subject::Id(DEVICE);
                let of_device = newest.map(|bundle| (bundle.encode(), keys::bob().sign(&bundle.statement()).unwrap()));
                let of_device = of_device.as_ref().map(|(bundle, signature)| SignedBundle { bundle, signature });
                let entry = DirectoryEntry {
                    id: if own { DEVICE } else { OWNER },
                    name: "somebody",
                    key_epoch: 0,
                    record_limit: 16_408,
                    status: PeerStatus::Online,
                    modulus: None,
                    bundle: if own { of_device } else { Some(owner.signed()) },
                };
                server.send(&Message::LookupResponse { request: lookup.request, entry });
            }
            Message::Publish { request, bundle: signed } => {
                let published = Bundle::decode(signed.bundle).unwrap();
                let statement = published.statement();
                assert!(ossicle::crypto::verify(keys::bob().modulus(), &statement, signed.signature));
                assert_eq!(published.epoch, newest.map_or(1, |newest| newest.epoch + 1));
                assert_eq!(published.previous, newest.map_or([0; 32], Bundle::hash));
                bundle = Some(published);
                server.send(&Message::Done { request });
            }
            Message::Listening => listening = true,
            Message::Wrap { request, to, wrap, bundle: signed } => {
                assert!(listening, "a chain starts only when receipts can come back");
                assert_eq!(to, OWNER);
                let bundle = bundle.expect("the bundle is published first");
                assert_eq!(signed.bundle, bundle.encode());
                let conversation = Conversation::direct(&owner.bundle.member(), &bundle.member(), 0);
                let prekey = owner.keys.prekey(&owner.bundle).unwrap();
                let mut wrap = wrap.to_vec();
                let readings =
                    ReceivingChain::accept(&mut wrap, &prekey, &bundle.member(), &bundle, &conversation, None).unwrap();
                server.send(&Message::Done { request });
                return Joined { server, bundle, readings, told: VecDeque::new() };
            }
            other => panic!("the device said {other:?}"),
        }
    }
}

impl Joined {
    /// The text of the next reading; receipts that come meanwhile wait for [`Joined::receipt`].
    fn reading(&mut self) -> String {
        loop {
            let mut payload = self.server.receive();
            match Message::decode(&payload).unwrap() {
                Message::Send { .. } => {
                    assert_eq!(payload.len() + 24, 76, "a 12-byte reading costs 76 bytes");
                    let opened = self.readings.open::<RustCrypto>(&mut payload[3..]).unwrap();
                    assert!(!opened.signed);
                    return String::from_utf8(opened.body.to_vec()).unwrap();
                }
                Message::Tell(receipt) => self.told.push_back(receipt),
                other => panic!("the device said {other:?}"),
            }
        }
    }

    /// The next receipt.
    fn receipt(&mut self) -> Receipt {
        loop {
            if let Some(receipt) = self.told.pop_front() {
                return receipt;
            }
            self.reading();
        }
    }

    fn deliver_wrap(&mut self, owner: &Owner, wrap: &[u8]) {
        self.server.send(&Message::WrapDelivery { from: OWNER, wrap, bundle: owner.signed() });
    }

    fn deliver(&mut self, envelope: &[u8]) {
        let wanted = Rungs::NONE.with(Rung::Delivered);
        self.server.send(&Message::Deliver { wanted, envelope });
    }

    /// Readings until one ends like this, at most twenty.
    fn until_reading_ends(&mut self, end: &str) {
        for _ in 0..20 {
            if self.reading().ends_with(end) {
                return;
            }
        }
        panic!("no reading ends in {end}");
    }
}

/// Something that can be the device: a thread or a QEMU, started from a page and gone when dropped.
type Start = fn(page: Vec<u8>) -> Box<dyn core::any::Any>;

/// The image, built by `ci.sh`; building it here keeps a lone `cargo test` honest.
fn image() -> PathBuf {
    ossicle_tests::firmware_image()
}

fn in_thread(page: Vec<u8>) -> Box<dyn core::any::Any> {
    let network = Network::start(None).unwrap();
    let device = Device::start(&network, page, |happened| println!("device: {happened:?}")).unwrap();
    Box::new((device, network))
}

fn in_qemu(page: Vec<u8>) -> Box<dyn core::any::Any> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("page");
    std::fs::write(&path, page).unwrap();
    let qemu = Qemu::start(&image(), Some(&path), &qemu::Options::default());
    Box::new((qemu, folder))
}

/// It obeys its owner's signature and nothing else, says what it took and what not, and shows the LED in its readings.
fn obeys_its_owner_only(start: Start) {
    let mut owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = start(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);
    assert_eq!(joined.reading().get(5..), Some("C led=0"));

    let (wrap, mut chain) = owner.chain(&joined.bundle);
    joined.deliver_wrap(&owner, &wrap);
    joined.deliver(&seal(&mut chain, false, "led on"));
    let delivered = joined.receipt();
    assert_eq!(delivered.rung, Rung::Delivered, "the message came, it was only not obeyed");
    assert!(joined.reading().ends_with("led=0"), "an unsigned command is not obeyed");
    joined.deliver(&seal(&mut chain, true, "led up"));
    assert_eq!(joined.receipt().rung, Rung::Delivered);
    let command = seal(&mut chain, true, "led on");
    joined.deliver(&command);
    let receipt = joined.receipt();
    let salt = EnvelopeHeader::decode(&command).unwrap().salt;
    assert_eq!(chain.verify_receipt(&DEVICE, &receipt, &salt), Ok(()), "delivered is the device's own word");
    joined.until_reading_ends("led=1");

    // A repeated message is acknowledged again and not obeyed again.
    joined.deliver(&seal(&mut chain, true, "led off"));
    joined.until_reading_ends("led=0");
    assert_eq!(joined.receipt().rung, Rung::Delivered);
    joined.deliver(&command);
    assert_eq!(joined.receipt().rung, Rung::Delivered);
    assert!(joined.reading().ends_with("led=0"));

    // An unknown chain asks for a new wrap; a stranger is refused; a heartbeat is answered.
    let mut unknown = seal(&mut chain, true, "led on");
    unknown[0] ^= 1;
    joined.deliver(&unknown);
    assert_eq!(joined.receipt().reason, Some(Reason::Rekey));
    joined.server.send(&Message::WrapDelivery { from: [0x33; 16], wrap: &wrap, bundle: owner.signed() });
    assert_eq!(joined.receipt().reason, Some(Reason::Forbidden));
    joined.server.send(&Message::Status { request: 4711 });
    loop {
        match Message::decode(&joined.server.receive()).unwrap() {
            Message::StatusResponse { request } => break assert_eq!(request, 4711),
            Message::Send { .. } => {}
            other => panic!("the device said {other:?}"),
        }
    }
}

/// After a reset it has forgotten everything; a server that has not must gain nothing by that.
fn a_replayed_wrap_is_not_obeyed_after_a_reset(start: Start, directory_lies: bool) {
    let mut owner = Owner::new();
    let mut script = Script::new(keys::server());
    let page = owner.page(script.address());
    let device = start(page.clone());
    let mut joined = join(&mut script, &owner, None);
    let first = joined.bundle;
    let (wrap, mut chain) = owner.chain(&first);
    let command = seal(&mut chain, true, "led on");
    joined.deliver_wrap(&owner, &wrap);
    joined.deliver(&command);
    joined.until_reading_ends("led=1");
    assert_eq!(joined.receipt().rung, Rung::Delivered);
    drop(joined);
    drop(device);

    let _device = start(page);
    // A lying directory says that there never was a bundle, so that the device might use its first keys again.
    let mut joined = join(&mut script, &owner, if directory_lies { None } else { Some(&first) });
    assert_ne!(joined.bundle.exchange, first.exchange);
    assert_ne!(joined.bundle.prekey, first.prekey);
    assert_ne!(joined.bundle.verifying, first.verifying);
    joined.deliver_wrap(&owner, &wrap);
    assert_eq!(joined.receipt().reason, Some(Reason::Unreadable));
    joined.deliver(&command);
    assert_eq!(joined.receipt().reason, Some(Reason::Rekey));
    for _ in 0..3 {
        assert!(joined.reading().ends_with("led=0"), "a replayed command was obeyed");
    }
    // And the owner's new chain is taken.
    let (wrap, mut chain) = owner.chain(&joined.bundle);
    joined.deliver_wrap(&owner, &wrap);
    joined.deliver(&seal(&mut chain, true, "led on"));
    joined.until_reading_ends("led=1");
}

impl Joined {
    /// The connection breaks; the device comes back to this server and goes on where it was, without new keys.
    fn comes_back(&mut self, script: &mut Script) {
        self.server.cut();
        self.server = script.accept(&keys::bob());
        assert_eq!(self.server.client, DEVICE);
        assert_eq!(Message::decode(&self.server.receive()), Ok(Message::Listening));
        self.reading();
    }
}

/// A broken connection costs no RSA, unless resumptions break too.
fn resumes_its_channel(start: Start) {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = start(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);
    assert!(joined.server.offered.is_none(), "a device without storage has none at its start");
    let issued = script.channel.as_ref().map(|channel| channel.id);
    joined.comes_back(&mut script);
    assert!(joined.server.resumed);
    assert_eq!(joined.server.offered, issued);
    // Two resumptions that break; then the long way, with the channel kept all the same.
    let issued = script.channel.as_ref().map(|channel| channel.id);
    assert_ne!(joined.server.offered, issued, "each resumption issues the next channel");
    drop(joined.server);
    assert!(script.break_off());
    assert!(script.break_off());
    let server = script.accept(&keys::bob());
    assert!(server.offered.is_none() && !server.resumed);
}

/// A server that has forgotten the channel is answered at once, on the same connection.
fn takes_the_long_way_when_its_channel_is_forgotten(start: Start) {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = start(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);
    script.channel = None;
    joined.comes_back(&mut script);
    assert!(joined.server.offered.is_some() && !joined.server.resumed);
    joined.comes_back(&mut script);
    assert!(joined.server.resumed, "the channel that the full handshake issued");
}

#[test]
fn a_device_resumes_its_channel_and_not_for_ever_in_vain() {
    resumes_its_channel(in_thread);
}

#[test]
fn a_device_whose_channel_was_forgotten_takes_the_long_way_on_the_same_connection() {
    takes_the_long_way_when_its_channel_is_forgotten(in_thread);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_resumes_its_channel_and_not_for_ever_in_vain() {
    resumes_its_channel(in_qemu);
}

#[test]
fn a_device_obeys_its_owners_signature_and_nothing_else() {
    obeys_its_owner_only(in_thread);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_obeys_its_owners_signature_and_nothing_else() {
    obeys_its_owner_only(in_qemu);
}

#[test]
fn a_device_does_not_obey_a_replayed_wrap_after_a_reset() {
    a_replayed_wrap_is_not_obeyed_after_a_reset(in_thread, false);
    a_replayed_wrap_is_not_obeyed_after_a_reset(in_thread, true);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_does_not_obey_a_replayed_wrap_after_a_reset() {
    a_replayed_wrap_is_not_obeyed_after_a_reset(in_qemu, true);
}

#[test]
fn a_device_takes_no_older_bundle_of_its_owner_and_no_forged_one() {
    let mut owner = Owner::new();
    let mut script = Script::new(keys::server());
    let old = (owner.bundle, owner.signature.clone());
    // The page was made when the owner's bundle had epoch 2.
    owner.bundle = owner.keys.bundle(&owner.bundle.member(), 2, old.0.hash());
    owner.signature = owner.key.sign(&owner.bundle.statement()).unwrap();
    let _device = in_thread(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);

    let newer = owner.bundle;
    let mut refused = |bundle: Bundle, signature: &[u8]| {
        owner.bundle = bundle;
        let (wrap, _) = owner.chain(&joined.bundle);
        owner.bundle = newer;
        let signed = SignedBundle { bundle: &bundle.encode(), signature };
        joined.server.send(&Message::WrapDelivery { from: OWNER, wrap: &wrap, bundle: signed });
        joined.receipt().reason
    };
    assert_eq!(refused(old.0, &old.1), Some(Reason::Rewound), "an older epoch");
    // A forged signature loses the wrap; a message of its chain then finds no chain.
    let forged = owner.keys.bundle(&newer.member(), 3, newer.hash());
    owner.bundle = forged;
    let (wrap, mut chain) = owner.chain(&joined.bundle);
    owner.bundle = newer;
    let signed = SignedBundle { bundle: &forged.encode(), signature: &[7; 256] };
    joined.server.send(&Message::WrapDelivery { from: OWNER, wrap: &wrap, bundle: signed });
    joined.deliver(&seal(&mut chain, true, "led on"));
    assert_eq!(joined.receipt().reason, Some(Reason::Unauthorised), "the forged bundle is refused by name");
    assert_eq!(joined.receipt().reason, Some(Reason::Rekey));
}

#[test]
fn a_chain_of_an_owner_who_went_back_is_refused_and_a_repeated_one_is_not() {
    let mut owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = in_thread(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);
    let (older, _) = owner.chain(&joined.bundle);
    let (newer, mut chain) = owner.chain(&joined.bundle);
    joined.deliver_wrap(&owner, &newer);
    joined.deliver_wrap(&owner, &newer);
    joined.deliver_wrap(&owner, &older);
    let refused = joined.receipt();
    assert_eq!((refused.rung, refused.reason, refused.tag), (Rung::Refused, Some(Reason::Rewound), None));
    assert_eq!((&refused.chain[..], refused.from, refused.to), (&older[16..24], 0, 0), "and not the repeated one");
    // The newer one stands.
    joined.deliver(&seal(&mut chain, true, "led on"));
    assert_eq!(joined.receipt().rung, Rung::Delivered);
    joined.until_reading_ends("led=1");
}

#[test]
fn a_bundle_whose_publication_was_not_confirmed_is_published_again() {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = in_thread(owner.page(script.address()));
    let mut server = script.accept(&keys::bob());
    let payload = server.receive();
    let Ok(Message::Lookup(lookup)) = Message::decode(&payload) else { panic!("the device asks for its own bundle") };
    let entry = DirectoryEntry {
        id: DEVICE,
        name: "sensor-01",
        key_epoch: 0,
        record_limit: 1024,
        status: PeerStatus::Online,
        modulus: None,
        bundle: None,
    };
    server.send(&Message::LookupResponse { request: lookup.request, entry });
    let payload = server.receive();
    let Ok(Message::Publish { bundle, .. }) = Message::decode(&payload) else { panic!("the device publishes") };
    let lost = Bundle::decode(bundle.bundle).unwrap();
    // Whether the directory has it or not: its answer is lost with the connection.
    drop(server);
    let mut server = script.accept(&keys::bob());
    let payload = server.receive();
    let Ok(Message::Publish { request, bundle }) = Message::decode(&payload) else {
        panic!("it publishes, and asks nothing")
    };
    assert_eq!(bundle.bundle, lost.encode(), "the same, which is right in either case");
    assert!(ossicle::crypto::verify(keys::bob().modulus(), &lost.statement(), bundle.signature));
    server.send(&Message::Done { request });
    assert_eq!(Message::decode(&server.receive()), Ok(Message::Listening));
}

#[test]
fn a_device_ends_a_connection_with_a_bad_record_and_comes_back() {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    let (happened, seen) = mpsc::channel();
    let page = owner.page(script.address());
    let network = Network::start(None).unwrap();
    let _device = Device::start(&network, page, move |event| {
        let _ = happened.send(event);
    })
    .unwrap();
    let mut joined = join(&mut script, &owner, None);
    let bundle = joined.bundle;
    joined.server.send_raw(&[1, 0, 3, 0, 0, 24, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(joined.server.is_ended(), "a bad record is not answered");
    // It kept its keys: only a restart makes new ones.
    let mut server = script.accept(&keys::bob());
    assert_eq!(Message::decode(&server.receive()), Ok(Message::Listening));
    let mut payload = server.receive();
    assert!(matches!(Message::decode(&payload).unwrap(), Message::Send { .. }), "the chain stands");
    joined.readings.open::<RustCrypto>(&mut payload[3..]).unwrap();
    assert_eq!(bundle.id, DEVICE);
    let deadline = Instant::now() + Duration::from_secs(30);
    let ended = core::iter::from_fn(|| seen.recv_timeout(deadline - Instant::now()).ok())
        .any(|event| matches!(event, Happened::Ended(_)));
    assert!(ended);
}

#[test]
fn a_device_takes_new_times_from_its_server_while_it_is_connected() {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    script.beat = (3600, 7200);
    let (happened, seen) = mpsc::channel();
    let network = Network::start(None).unwrap();
    let _device = Device::start(&network, owner.page(script.address()), move |event| {
        let _ = happened.send(event);
    })
    .unwrap();
    let mut joined = join(&mut script, &owner, None);
    joined.server.send(&Message::Settings(Settings { heartbeat: 1, timeout: 1, ..Settings::default() }));
    // Nothing more is said: hours before the first settings wanted it, the device gives the server up and comes back.
    let again = script.accept(&keys::bob());
    assert_eq!(again.client, DEVICE);
    assert!(seen.try_iter().any(|event| matches!(event, Happened::Ended(Ending::Silence))));
}

/// The owner's group with the device and a third member, whose key is the longest that a device verifies.
struct Group {
    conversation: Conversation,
    ben: BundleKeys,
    bens: Bundle,
    signature: Vec<u8>,
    rng: Rng,
}

const SID: [u8; 16] = [0x77; 16];
const BEN: [u8; 16] = [0xf1; 16];

impl Group {
    fn new(owner: &Owner, device: &Bundle) -> (Self, Vec<u8>) {
        let (key, mut rng) = (keys::server3072(), Rng::new(8));
        let ben = BundleKeys::generate(4, &mut rng).unwrap();
        let bens = ben.bundle(&Member { id: BEN, key: public(&key).fingerprint() }, 4, [0; 32]);
        let signature = key.sign(&bens.statement()).unwrap();
        let members = [owner.bundle.member(), device.member(), bens.member()];
        let conversation = Conversation::group(SID, 0, &members).unwrap();
        let lines = members.iter().flat_map(Member::encode).collect();
        (Self { conversation, ben, bens, signature, rng }, lines)
    }

    fn entry<'e>(&'e self, owner: &'e Owner, of: [u8; 16], modulus: &'e [u8]) -> DirectoryEntry<'e> {
        let bundle = match of {
            OWNER => owner.signed(),
            _ => SignedBundle { bundle: Box::leak(Box::new(self.bens.encode())), signature: &self.signature },
        };
        DirectoryEntry {
            id: of,
            name: "a-name-that-is-as-long-as-a-name-can-be-and-so-fills-its-record-",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Online,
            modulus: Some(modulus),
            bundle: Some(bundle),
        }
    }

    /// A chain of one of the two in the group, wrapped to the device.
    fn chain(&mut self, joined: &mut Joined, owner: &Owner, of: [u8; 16]) -> SendingChain {
        let (keys, bundle) = if of == OWNER { (&owner.keys, owner.bundle) } else { (&self.ben, self.bens) };
        let device = joined.bundle;
        let chain = SendingChain::start(&bundle.member(), &self.conversation, 0, &mut self.rng).unwrap();
        let mut wrap = [0; WRAP_LEN];
        chain.wrap(keys, &bundle, &device.member(), &device, &mut self.rng, &mut wrap).unwrap();
        let bytes = bundle.encode();
        let signature = if of == OWNER { &owner.signature } else { &self.signature };
        let bundle = SignedBundle { bundle: &bytes, signature };
        joined.server.send(&Message::WrapDelivery { from: of, wrap: &wrap, bundle });
        chain
    }
}

/// It joins what its owner invites it to, answers whoever asks there, obeys its owner alone, and forgets what is closed.
fn is_a_member_of_its_owners_group(start: Start) {
    let owner = Owner::new();
    let mut script = Script::new(keys::server());
    let _device = start(owner.page(script.address()));
    let mut joined = join(&mut script, &owner, None);
    let (mut group, lines) = Group::new(&owner, &joined.bundle);
    let (flags, mut buffer) = (GroupFlags::NONE, [0; 1024]);
    let init = Decision::Init(flags).sign(&owner.keys, &group.conversation);
    let invite = Invite {
        sid: SID,
        creator: OWNER,
        flags,
        signature: Fixed(&init),
        members: Members::new(&lines).unwrap(),
        name: Fixed(&[0; 117]),
    };
    let forged = Invite { signature: Fixed(&[1; 64]), ..invite };
    let moduli = [keys::alice().modulus().to_vec(), keys::server3072().modulus().to_vec()];
    let mut answer = None;
    for (seq, invite) in [(1, &forged), (2, &invite)] {
        joined.server.send(&Message::Waited { seq, at: 1 });
        joined.server.send(&invite.encode(&mut buffer).unwrap());
        loop {
            let payload = joined.server.receive();
            match Message::decode(&payload).unwrap() {
                Message::Lookup(lookup) => {
                    assert!(lookup.key && lookup.bundle);
                    let Subject::Id(id) = lookup.subject else { panic!("by its id") };
                    let entry = group.entry(&owner, id, &moduli[usize::from(id == BEN)]);
                    joined.server.send(&Message::LookupResponse { request: lookup.request, entry });
                }
                Message::Other(body) => {
                    let given = Answer::decode(body).unwrap();
                    assert!(given.accept && given.sid == SID && seq == 2);
                    let signature = given.signature.0;
                    assert_eq!(Decision::Accept.verify(&joined.bundle, &group.conversation, signature), Ok(()));
                    answer = Some(given.request);
                    joined.server.send(&Message::Done { request: given.request });
                }
                Message::Acknowledge { seq: acknowledged } => {
                    assert_eq!((acknowledged, answer.is_some()), (seq, seq == 2), "once it is answered, or is none");
                    break;
                }
                Message::Send { .. } => {}
                other => panic!("the device said {other:?}"),
            }
        }
    }

    let accept = Decision::Accept.sign(&group.ben, &group.conversation);
    let changed =
        MemberChanged { sid: SID, member: BEN, state: MemberState::Accepted, signature: Some(Fixed(&accept)) };
    joined.server.send(&changed.encode(&mut buffer).unwrap());
    let mut bens = group.chain(&mut joined, &owner, BEN);
    let mut owners = group.chain(&mut joined, &owner, OWNER);
    joined.deliver(&seal(&mut owners, true, "led on"));
    joined.deliver(&seal(&mut bens, true, "led off"));
    joined.deliver(&seal(&mut bens, true, "reading?"));
    let mut heard: [Option<ReceivingChain<0>>; 2] = [None, None];
    let mut delivered = 0;
    let answered = loop {
        let mut payload = joined.server.receive();
        match Message::decode(&payload).unwrap() {
            Message::Lookup(lookup) => {
                let Subject::Id(id) = lookup.subject else { panic!("by its id") };
                let entry = group.entry(&owner, id, &moduli[usize::from(id == BEN)]);
                joined.server.send(&Message::LookupResponse { request: lookup.request, entry });
            }
            Message::Wrap { request, to, wrap, .. } => {
                let (keys, bundle) = if to == OWNER { (&owner.keys, owner.bundle) } else { (&group.ben, group.bens) };
                let (mut wrap, prekey, device) = (wrap.to_vec(), keys.prekey(&bundle).unwrap(), joined.bundle);
                let chain =
                    ReceivingChain::accept(&mut wrap, &prekey, &device.member(), &device, &group.conversation, None);
                heard[usize::from(to == BEN)] = Some(chain.unwrap());
                joined.server.send(&Message::Done { request });
            }
            Message::Tell(receipt) => {
                assert_eq!(receipt.rung, Rung::Delivered, "{receipt:?}");
                delivered += 1;
            }
            Message::Send { envelope, .. } => {
                let header = EnvelopeHeader::decode(envelope).unwrap();
                if let [Some(at_owner), Some(at_ben)] = &mut heard
                    && at_owner.is_of(&header.chain_id)
                {
                    let mut copy = payload.clone();
                    let text = at_owner.open::<RustCrypto>(&mut copy[3..]).unwrap().body.to_vec();
                    let opened = at_ben.open::<RustCrypto>(&mut payload[3..]).unwrap();
                    assert!(opened.signed && opened.body == text, "everybody reads the same");
                    break String::from_utf8(text).unwrap();
                }
            }
            other => panic!("the device said {other:?}"),
        }
    };
    assert_eq!(delivered, 3);
    assert!(answered.ends_with("C led=1"), "the owner was obeyed, and the other member was not: {answered}");

    let closed = Closed { sid: SID, by: None, signature: None };
    joined.server.send(&closed.encode(&mut buffer).unwrap());
    joined.told.clear();
    joined.deliver(&seal(&mut bens, true, "reading?"));
    assert_eq!(joined.receipt().reason, Some(Reason::Rekey), "what is closed is forgotten");
    let mut group = Group { rng: Rng::new(9), ..group };
    group.chain(&mut joined, &owner, BEN);
    assert_eq!(joined.receipt().reason, Some(Reason::Forbidden));
}

#[test]
fn a_device_is_a_member_of_its_owners_group() {
    is_a_member_of_its_owners_group(in_thread);
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_image_is_a_member_of_its_owners_group() {
    is_a_member_of_its_owners_group(in_qemu);
}
