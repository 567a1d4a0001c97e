//! Groups over real TCP: who is invited, who takes part, who is told what, and what bad input gets.
//!
//! Each test has its own server. The clients are raw: signatures, sealed names, envelopes and wraps are filler, because a
//! server reads none of them.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use getrandom::SysRng;
use ossicle::clock::Clock;
use ossicle::crypto::IdentityKey;
use ossicle::limits::{Rate, Rates};
use ossicle::name::Name;
use ossicle::server::Config;
use ossicle::store::{Conversation, Enrolment, QueueLimits, SqliteStore};
use ossicle_core::{
    Answer, BundleKeys, CloseConversation, Closed, Fixed, GroupFlags, Init, Invite, Member, MemberChanged, MemberState,
    Members, Message, Names, Reason, Receipt, Rung, Rungs, SEALED_NAME_LEN, ToldBy, WRAP_LEN, direct_sid,
};
use ossicle_tests::keys;
use ossicle_tests::node::{Client, Node, Published, bundle_keys, enrolled, envelope, open};
use tempfile::TempDir;

const ALICE: u8 = 1;
const BOB: u8 = 2;
const CAROL: u8 = 3;
const SID: [u8; 16] = [0x51; 16];
const WEEK: u64 = 7 * 24 * 60 * 60;

fn key(number: u8) -> IdentityKey {
    match number {
        ALICE => keys::alice(),
        BOB => keys::bob(),
        _ => keys::carol(),
    }
}

fn member(number: u8) -> Member {
    Member { id: [number; 16], key: key(number).fingerprint() }
}

fn all() -> Vec<Member> {
    [ALICE, BOB, CAROL].map(member).into()
}

fn lines(members: &[Member]) -> Vec<u8> {
    members.iter().flat_map(Member::encode).collect()
}

/// A client, and what it heard while it waited for an answer.
struct Peer {
    client: Client,
    number: u8,
    heard: VecDeque<Vec<u8>>,
}

impl Peer {
    async fn enrol(node: &Node, number: u8) -> Self {
        let client = node.enrol(number, ["alice", "bob", "carol"][usize::from(number) - 1], key(number)).await;
        Self::listen(number, client).await
    }

    async fn back(node: &Node, number: u8) -> Self {
        Self::listen(number, node.connect(number, &key(number)).await.unwrap()).await
    }

    async fn listen(number: u8, client: Client) -> Self {
        let mut peer = Self { client, number, heard: VecDeque::new() };
        peer.client.send(&Message::Listening).await;
        peer.sync().await;
        peer
    }

    /// Everything that was sent before was dealt with.
    async fn sync(&mut self) {
        self.client.send(&Message::Status { request: 77 }).await;
        loop {
            let payload = self.client.message().await;
            match Message::decode(&payload) {
                Ok(Message::StatusResponse { request: 77 }) => return,
                _ => self.heard.push_back(payload),
            }
        }
    }

    async fn ask(&mut self, message: &Message<'_>) -> Result<(), Reason> {
        self.client.send(message).await;
        loop {
            let payload = self.client.message().await;
            match Message::decode(&payload) {
                Ok(Message::Done { .. }) => return Ok(()),
                Ok(Message::Refused { reason, .. }) => return Err(reason),
                _ => self.heard.push_back(payload),
            }
        }
    }

    async fn next(&mut self) -> Vec<u8> {
        match self.heard.pop_front() {
            Some(heard) => heard,
            None => self.client.message().await,
        }
    }

    /// The next message is of this kind.
    async fn hears(&mut self, expected: &Message<'_>) {
        let payload = self.next().await;
        assert_eq!(Message::decode(&payload), Ok(expected.clone()), "client {}", self.number);
    }

    /// Nothing more has come.
    async fn hears_nothing(&mut self) {
        self.sync().await;
        let heard: Vec<_> = self.heard.iter().map(|payload| Message::decode(payload)).collect();
        assert_eq!(heard, [], "client {}", self.number);
    }

    async fn found(&mut self, sid: [u8; 16], members: &[Member]) -> Result<(), Reason> {
        self.found_by(sid, members, GroupFlags::NONE).await
    }

    async fn found_by(&mut self, sid: [u8; 16], members: &[Member], flags: GroupFlags) -> Result<(), Reason> {
        let lines = lines(members);
        let names: Vec<_> = (1..members.len()).map(|n| [n as u8; SEALED_NAME_LEN]).collect();
        let init = Init {
            request: 1,
            sid,
            flags,
            signature: Fixed(&[self.number; 64]),
            members: Members::new(&lines).unwrap(),
            names: Names::new(names.as_flattened()).unwrap(),
        };
        let mut buffer = vec![0; 16_000];
        self.ask(&init.encode(&mut buffer).unwrap()).await
    }

    async fn answer(&mut self, accept: bool) -> Result<(), Reason> {
        self.answer_with(SID, accept, self.number).await
    }

    async fn answer_with(&mut self, sid: [u8; 16], accept: bool, signature: u8) -> Result<(), Reason> {
        let answer = Answer { request: 2, sid, accept, signature: Fixed(&[signature; 64]) };
        self.ask(&answer.encode(&mut [0; 128]).unwrap()).await
    }

    async fn close(&mut self, sid: [u8; 16]) -> Result<(), Reason> {
        let close = CloseConversation { request: 3, sid, signature: Fixed(&[self.number; 64]) };
        self.ask(&close.encode(&mut [0; 128]).unwrap()).await
    }

    async fn publish(&mut self, bundle: &Published) -> Result<(), Reason> {
        self.ask(&Message::Publish { request: 5, bundle: bundle.signed() }).await
    }

    async fn wrap(&mut self, chain: u8, to: u8) -> Result<(), Reason> {
        let (wrap, bundle) = (wrap(chain), Published::new(self.number, &key(self.number), 0));
        self.ask(&Message::Wrap { request: 4, to: [to; 16], wrap: &wrap, bundle: bundle.signed() }).await
    }

    async fn hears_wrap(&mut self, chain: u8, from: u8) {
        let (wrap, bundle) = (wrap(chain), Published::new(from, &key(from), 0));
        let payload = self.next().await;
        let Ok(Message::WrapDelivery { from: sender, wrap: heard, bundle: signed }) = Message::decode(&payload) else {
            panic!("client {}: {:?}", self.number, Message::decode(&payload));
        };
        assert_eq!((sender, heard, signed.bundle), ([from; 16], &wrap[..], &bundle.bundle[..]));
    }

    async fn hears_changed(&mut self, number: u8, state: MemberState) {
        let signed = [number; 64];
        let signature = matches!(state, MemberState::Accepted | MemberState::Declined).then_some(Fixed(&signed));
        let changed = MemberChanged { sid: SID, member: [number; 16], state, signature };
        self.hears(&changed.encode(&mut [0; 128]).unwrap()).await;
    }

    async fn hears_closed(&mut self, by: u8) {
        let closed = Closed { sid: SID, by: Some([by; 16]), signature: Some(Fixed(&[by; 64])) };
        self.hears(&closed.encode(&mut [0; 128]).unwrap()).await;
    }

    async fn hears_invite(&mut self, sid: [u8; 16], creator: u8, members: &[Member]) {
        let lines = lines(members);
        let invitees: Vec<_> = members.iter().filter(|member| member.id != [creator; 16]).collect();
        let place = invitees.iter().position(|member| member.id == [self.number; 16]).unwrap();
        let invite = Invite {
            sid,
            creator: [creator; 16],
            flags: GroupFlags::NONE,
            signature: Fixed(&[creator; 64]),
            members: Members::new(&lines).unwrap(),
            name: Fixed(&[place as u8 + 1; SEALED_NAME_LEN]),
        };
        self.hears(&invite.encode(&mut [0; 4000]).unwrap()).await;
    }

    async fn hears_told_by(&mut self, from: u8, receipt: Receipt) {
        self.hears(&ToldBy { from: [from; 16], receipt }.encode(&mut [0; 128]).unwrap()).await;
    }

    async fn hears_message(&mut self, chain: u8, n: u32, wanted: Rungs) {
        self.hears(&Message::Deliver { wanted, envelope: &envelope(chain, n, 49) }).await;
    }

    async fn say(&mut self, chain: u8, n: u32, wanted: Rungs) {
        self.client.send(&Message::Send { wanted, envelope: &envelope(chain, n, 49) }).await;
    }

    async fn leave(self) {
        self.client.close().await;
    }
}

/// Bytes that a server takes for the wrap of a chain in the group.
fn wrap(chain: u8) -> Vec<u8> {
    let mut bytes = vec![0xdd; WRAP_LEN];
    bytes[..16].copy_from_slice(&SID);
    bytes[16..24].copy_from_slice(&[chain; 8]);
    bytes
}

fn receipt(rung: Rung, chain: u8, n: u32) -> Receipt {
    Receipt { rung, reason: None, chain: [chain; 8], from: n, to: n, tag: None }
}

fn refused(reason: Reason, chain: u8, n: u32) -> Receipt {
    Receipt { reason: Some(reason), ..receipt(Rung::Refused, chain, n) }
}

/// Three who are there, of whom Alice has founded a group that the others have joined.
async fn three(node: &Node) -> [Peer; 3] {
    let (mut alice, mut bob, mut carol) =
        (Peer::enrol(node, ALICE).await, Peer::enrol(node, BOB).await, Peer::enrol(node, CAROL).await);
    alice.found(SID, &all()).await.unwrap();
    bob.hears_invite(SID, ALICE, &all()).await;
    bob.answer(true).await.unwrap();
    alice.hears_changed(BOB, MemberState::Accepted).await;
    carol.hears_invite(SID, ALICE, &all()).await;
    carol.answer(true).await.unwrap();
    alice.hears_changed(CAROL, MemberState::Accepted).await;
    bob.hears_changed(CAROL, MemberState::Accepted).await;
    carol.hears_changed(BOB, MemberState::Accepted).await;
    [alice, bob, carol]
}

/// Alice's chain 5, for both others.
async fn with_chain([alice, bob, carol]: &mut [Peer; 3]) {
    alice.wrap(5, BOB).await.unwrap();
    alice.wrap(5, CAROL).await.unwrap();
    bob.hears_wrap(5, ALICE).await;
    carol.hears_wrap(5, ALICE).await;
}

fn only(rung: Rung) -> Rungs {
    Rungs::NONE.with(rung)
}

#[tokio::test]
async fn an_invitation_waits_for_who_is_not_there() {
    let node = Node::start(open()).await;
    let mut alice = Peer::enrol(&node, ALICE).await;
    let mut bob = Peer::enrol(&node, BOB).await;
    Peer::enrol(&node, CAROL).await.leave().await;
    alice.found(SID, &all()).await.unwrap();
    alice.found(SID, &all()).await.expect("the same again: its answer may have been lost");
    bob.hears_invite(SID, ALICE, &all()).await;
    bob.answer(true).await.unwrap();
    bob.answer(true).await.expect("the same again changes nothing");
    alice.hears_changed(BOB, MemberState::Accepted).await;
    // He accepts anew, with another key.
    bob.answer_with(SID, true, 99).await.unwrap();
    let again =
        MemberChanged { sid: SID, member: [BOB; 16], state: MemberState::Accepted, signature: Some(Fixed(&[99; 64])) };
    alice.hears(&again.encode(&mut [0; 128]).unwrap()).await;
    assert_eq!(bob.answer(false).await, Err(Reason::Forbidden));

    let mut carol = Peer::back(&node, CAROL).await;
    assert_eq!(carol.client.settings.waiting, 1);
    carol.hears_invite(SID, ALICE, &all()).await;
    carol.answer(false).await.unwrap();
    carol.answer(false).await.unwrap();
    assert_eq!(carol.answer(true).await, Err(Reason::Forbidden));
    for one in [&mut alice, &mut bob] {
        one.hears_changed(CAROL, MemberState::Declined).await;
        one.hears_nothing().await;
    }
    carol.hears_nothing().await;
    node.stop().await;
}

#[tokio::test]
async fn who_made_all_his_keys_new_is_invited_again() {
    let node = Node::start(open()).await;
    let [mut alice, mut bob, mut carol] = three(&node).await;
    // The first bundle of all, the same again, and one in which only the prekey is new: he has what he had.
    let mut keys = bundle_keys(BOB, 1);
    let bundle = |keys: &BundleKeys, epoch| Published::sign(&keys.bundle(&member(BOB), epoch, [0; 32]), &key(BOB));
    bob.publish(&bundle(&keys, 1)).await.unwrap();
    bob.publish(&bundle(&keys, 1)).await.unwrap();
    keys.rotate(&mut SysRng).unwrap();
    bob.publish(&bundle(&keys, 2)).await.unwrap();
    bob.hears_nothing().await;
    // All of them are new, said twice since the answer was lost.
    let keys = bundle_keys(BOB + 10, 3);
    bob.publish(&bundle(&keys, 3)).await.unwrap();
    bob.publish(&bundle(&keys, 3)).await.unwrap();
    bob.hears_invite(SID, ALICE, &all()).await;
    bob.hears_nothing().await;
    assert_eq!(bob.publish(&bundle(&bundle_keys(BOB, 2), 2)).await, Err(Reason::Rewound));
    bob.hears_nothing().await;
    // He is in, as before, and is told who else is; the others hear his new word.
    alice.wrap(6, BOB).await.unwrap();
    bob.hears_wrap(6, ALICE).await;
    bob.answer_with(SID, true, 99).await.unwrap();
    bob.hears_changed(CAROL, MemberState::Accepted).await;
    let again =
        MemberChanged { sid: SID, member: [BOB; 16], state: MemberState::Accepted, signature: Some(Fixed(&[99; 64])) };
    for one in [&mut alice, &mut carol] {
        one.hears(&again.encode(&mut [0; 128]).unwrap()).await;
    }
    // The creator has no invitation.
    for epoch in 1..=2 {
        let keys = bundle_keys(ALICE + 10 * epoch as u8, epoch);
        let bundle = Published::sign(&keys.bundle(&member(ALICE), epoch, [0; 32]), &key(ALICE));
        alice.publish(&bundle).await.unwrap();
    }
    alice.hears_nothing().await;
    node.stop().await;
}

#[tokio::test]
async fn two_creators_with_the_same_partners_have_two_groups() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob, mut carol) =
        (Peer::enrol(&node, ALICE).await, Peer::enrol(&node, BOB).await, Peer::enrol(&node, CAROL).await);
    alice.found(SID, &all()).await.unwrap();
    bob.hears_invite(SID, ALICE, &all()).await;
    assert_eq!(bob.found(SID, &all()).await, Err(Reason::NameInUse));
    bob.found([8; 16], &all()).await.unwrap();
    alice.hears_invite([8; 16], BOB, &all()).await;
    carol.hears_invite(SID, ALICE, &all()).await;
    carol.hears_invite([8; 16], BOB, &all()).await;
    // What two of them have between themselves cannot be had by three.
    let theirs = direct_sid(&[BOB; 16], &[CAROL; 16], 0);
    assert_eq!(alice.found(theirs, &all()).await, Err(Reason::NameInUse));
    for one in [&mut alice, &mut bob, &mut carol] {
        one.hears_nothing().await;
    }
    node.stop().await;
}

#[tokio::test]
async fn what_a_list_says_must_be_so() {
    let node = Node::start(open()).await;
    let mut alice = Peer::enrol(&node, ALICE).await;
    let mut bob = Peer::enrol(&node, BOB).await;
    let stranger = Member { id: [CAROL; 16], key: keys::carol().fingerprint() };
    assert_eq!(alice.found(SID, &[member(ALICE), stranger]).await, Err(Reason::Unknown));
    let changed = Member { key: [9; 32], ..member(BOB) };
    assert_eq!(alice.found(SID, &[member(ALICE), changed]).await, Err(Reason::KeyChanged));
    let own = Member { key: [9; 32], ..member(ALICE) };
    assert_eq!(alice.found(SID, &[own, member(BOB)]).await, Err(Reason::KeyChanged));
    assert_eq!(alice.found(SID, &[member(BOB), stranger]).await, Err(Reason::Malformed), "she is none of them");
    // Too many, out of order, twice, one name too few: as bytes, since no list says so.
    let good = lines(&[member(ALICE), member(BOB)]);
    let backwards = lines(&[member(BOB), member(ALICE)]);
    let twice = lines(&[member(ALICE), member(BOB), member(BOB)]);
    let many: Vec<_> = (0..65).flat_map(|n| Member { id: [n; 16], key: [n; 32] }.encode()).collect();
    for (members, names) in
        [(&backwards, 1), (&twice, 2), (&many, 64), (&good[..48].to_vec(), 1), (&good, 0), (&good, 2)]
    {
        let mut body = [&Init::CODE.to_be_bytes()[..], &[9]].concat();
        body.extend([SID.as_slice(), &[0, 64], &[1; 64]].concat());
        for list in [members.clone(), vec![5; names * SEALED_NAME_LEN]] {
            let mut len = list.len();
            while len > 127 {
                body.push((len % 128) as u8 | 128);
                len /= 128;
            }
            body.push(len as u8);
            body.extend(list);
        }
        let refused = alice.ask(&Message::decode(&body).unwrap()).await;
        assert_eq!(refused, Err(Reason::Malformed), "{} bytes, {names} names", members.len());
    }
    assert_eq!(node.store.conversation(&SID).await, Ok(None));
    bob.hears_nothing().await;
    alice.found(SID, &[member(ALICE), member(BOB)]).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn an_invitation_has_to_fit_into_the_records_of_every_invitee() {
    let node = Node::start(open()).await;
    let mut alice = Peer::enrol(&node, ALICE).await;
    node.enrol(BOB, "bob", key(BOB)).await.close().await;
    let small = Client::connect_with(&node, &enrolled(BOB, &key(BOB)), &key(BOB), 1024).await.unwrap();
    let mut bob = Peer::listen(BOB, small).await;
    let with = |count: u8| -> Vec<_> {
        let mut members = vec![member(ALICE), member(BOB)];
        members.extend((0..count - 2).map(|n| Member { id: [100 + n; 16], key: fake_key(n) }));
        members
    };
    enter(&node, 20).await;
    assert_eq!(alice.found(SID, &with(17)).await, Err(Reason::TooLarge));
    assert_eq!(node.store.conversation(&SID).await, Ok(None));
    alice.found(SID, &with(5)).await.unwrap();
    bob.hears_invite(SID, ALICE, &with(5)).await;
    node.stop().await;
}

fn fake_modulus(number: u8) -> Vec<u8> {
    let mut modulus = keys::carol().modulus().to_vec();
    modulus[10] = number;
    modulus
}

fn fake_key(number: u8) -> [u8; 32] {
    ossicle_core::PublicKey::from_modulus(&fake_modulus(number)).unwrap().fingerprint()
}

/// Enters clients that never connect.
async fn enter(node: &Node, count: u8) {
    for number in 0..count {
        let enrolment = Enrolment {
            id: [100 + number; 16],
            name: Name::parse(&format!("nobody-{number}")).unwrap(),
            modulus: fake_modulus(number),
            token_id: None,
            enrolled_by: None,
            record_limit: 4096,
            now: 1,
        };
        node.store.enrol(enrolment).await.unwrap();
    }
}

#[tokio::test]
async fn a_group_of_64_is_founded_at_the_price_of_63_records() {
    let rates = Rates { messages: Rate { per_second: 1, burst: 100 }, ..Rates::default() };
    let node = Node::start(Config { rates, ..open() }).await;
    let mut alice = Peer::enrol(&node, ALICE).await;
    enter(&node, 64).await;
    let mut members = vec![member(ALICE)];
    members.extend((0..63).map(|n| Member { id: [100 + n; 16], key: fake_key(n) }));
    alice.found(SID, &members).await.unwrap();
    for n in 0..63 {
        assert_eq!(node.store.waiting(&[100 + n; 16]).await.unwrap().items, 1);
    }
    assert_eq!(node.store.waiting(&[163; 16]).await.unwrap().items, 0);
    assert_eq!(alice.found([8; 16], &members).await, Err(Reason::Rate));
    assert_eq!(node.store.conversation(&[8; 16]).await, Ok(None));
    alice.close(SID).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn who_is_no_member_learns_nothing_and_changes_nothing() {
    let node = Node::start(open()).await;
    let mut alice = Peer::enrol(&node, ALICE).await;
    let mut bob = Peer::enrol(&node, BOB).await;
    let mut carol = Peer::enrol(&node, CAROL).await;
    alice.found(SID, &[member(ALICE), member(BOB)]).await.unwrap();
    bob.hears_invite(SID, ALICE, &[member(ALICE), member(BOB)]).await;
    // A group that there is and one that there is not are answered alike.
    for sid in [SID, [7; 16]] {
        for accept in [true, false] {
            assert_eq!(carol.answer_with(sid, accept, CAROL).await, Err(Reason::NotMember));
        }
        assert_eq!(carol.close(sid).await, Err(Reason::NotMember));
    }
    assert_eq!(carol.wrap(6, ALICE).await, Err(Reason::NotMember));
    assert_eq!(alice.wrap(6, CAROL).await, Err(Reason::NotMember));
    // Whoever has not accepted gets nothing, sends nothing and ends nothing.
    assert_eq!(alice.wrap(6, BOB).await, Err(Reason::NotMember));
    assert_eq!(bob.wrap(6, ALICE).await, Err(Reason::NotMember));
    assert_eq!(bob.close(SID).await, Err(Reason::Forbidden));
    bob.answer(true).await.unwrap();
    alice.hears_changed(BOB, MemberState::Accepted).await;
    alice.wrap(6, BOB).await.unwrap();
    bob.hears_wrap(6, ALICE).await;
    // Nobody else speaks on her chain.
    carol.say(6, 0, Rungs::NONE).await;
    carol.hears(&Message::Told(refused(Reason::Rekey, 6, 0))).await;
    for one in [&mut alice, &mut bob, &mut carol] {
        one.hears_nothing().await;
    }
    node.stop().await;
}

#[tokio::test]
async fn a_message_goes_to_all_and_each_receipt_says_whose_it_is() {
    let node = Node::start(open()).await;
    let mut peers = three(&node).await;
    with_chain(&mut peers).await;
    let [mut alice, mut bob, mut carol] = peers;
    let wanted = only(Rung::Accepted).with(Rung::Delivered);
    alice.say(5, 0, wanted).await;
    alice.hears(&Message::Told(receipt(Rung::Accepted, 5, 0))).await;
    bob.hears_message(5, 0, wanted).await;
    carol.hears_message(5, 0, wanted).await;
    for one in [&mut carol, &mut bob] {
        let delivered = Receipt { tag: Some([one.number; 16]), ..receipt(Rung::Delivered, 5, 0) };
        one.client.send(&Message::Tell(delivered)).await;
        alice.hears_told_by(one.number, delivered).await;
    }
    // One is away: it waits for her, and is told once for all.
    carol.leave().await;
    let wanted = only(Rung::Stored).with(Rung::Delivered);
    alice.say(5, 1, wanted).await;
    alice.hears(&Message::Told(receipt(Rung::Stored, 5, 1))).await;
    bob.hears_message(5, 1, wanted).await;
    alice.say(5, 2, only(Rung::Accepted)).await;
    alice.hears(&Message::Told(receipt(Rung::Accepted, 5, 2))).await;
    bob.hears_message(5, 2, only(Rung::Accepted)).await;
    let mut carol = Peer::back(&node, CAROL).await;
    carol.hears_message(5, 1, wanted).await;
    carol.hears_message(5, 2, only(Rung::Accepted)).await;
    // What she says waits for a sender who is away.
    alice.leave().await;
    let refusal = refused(Reason::Unreadable, 5, 2);
    carol.client.send(&Message::Tell(refusal)).await;
    carol.sync().await;
    let mut alice = Peer::back(&node, ALICE).await;
    alice.hears_told_by(CAROL, refusal).await;
    for one in [&mut alice, &mut bob, &mut carol] {
        one.hears_nothing().await;
    }
    node.stop().await;
}

#[tokio::test]
async fn who_cannot_take_a_message_is_named_and_the_others_have_it() {
    let directory = TempDir::new().unwrap();
    let limits = QueueLimits { items: 2, ..QueueLimits::default() };
    let store = Arc::new(SqliteStore::open_with(directory.path(), limits).unwrap());
    let node = Node::start_with(directory, store, open()).await;
    let mut peers = three(&node).await;
    with_chain(&mut peers).await;
    let [mut alice, mut bob, carol] = peers;
    carol.leave().await;
    for n in 0..2 {
        alice.say(5, n, only(Rung::Stored)).await;
        alice.hears(&Message::Told(receipt(Rung::Stored, 5, n))).await;
        bob.hears_message(5, n, only(Rung::Stored)).await;
    }
    bob.sync().await;
    alice.say(5, 2, only(Rung::Stored)).await;
    alice.hears_told_by(CAROL, refused(Reason::QueueFull, 5, 2)).await;
    alice.hears(&Message::Told(receipt(Rung::Stored, 5, 2))).await;
    bob.hears_message(5, 2, only(Rung::Stored)).await;
    // An invitation is not refused for that.
    bob.found([9; 16], &[member(BOB), member(CAROL)]).await.unwrap();
    let mut carol = Peer::back(&node, CAROL).await;
    for n in 0..2 {
        carol.hears_message(5, n, only(Rung::Stored)).await;
    }
    carol.hears_invite([9; 16], BOB, &[member(BOB), member(CAROL)]).await;
    node.stop().await;
}

#[tokio::test]
async fn a_group_that_is_closed_is_gone_for_ever_and_for_everybody() {
    let node = Node::start(open()).await;
    let mut peers = three(&node).await;
    with_chain(&mut peers).await;
    let [mut alice, mut bob, carol] = peers;
    carol.leave().await;
    for n in 0..2 {
        alice.say(5, n, only(Rung::Stored)).await;
        alice.hears(&Message::Told(receipt(Rung::Stored, 5, n))).await;
        bob.hears_message(5, n, only(Rung::Stored)).await;
    }
    bob.sync().await;
    bob.close(SID).await.unwrap();
    // She learns what became of what Carol never got, and that it is over.
    for n in 0..2 {
        alice.hears_told_by(CAROL, refused(Reason::Closed, 5, n)).await;
    }
    alice.hears_closed(BOB).await;
    for one in [&mut alice, &mut bob] {
        assert_eq!(one.close(SID).await, Err(Reason::Closed));
        assert_eq!(one.answer(true).await, Err(Reason::Closed));
        assert_eq!(one.found(SID, &all()).await, Err(Reason::Closed));
    }
    alice.say(5, 2, only(Rung::Stored)).await;
    alice.hears(&Message::Told(refused(Reason::Rekey, 5, 2))).await;
    assert_eq!(alice.wrap(6, BOB).await, Err(Reason::Closed));
    bob.client.send(&Message::Tell(Receipt { tag: Some([1; 16]), ..receipt(Rung::Delivered, 5, 1) })).await;
    bob.sync().await;
    let told = bob.next().await;
    assert_eq!(
        Message::decode(&told),
        Ok(Message::Refused { request: 0, reason: Reason::Forbidden, retry_after: None })
    );
    alice.hears_nothing().await;

    let node = Node::start_on(node.kill().await, open()).await;
    let mut carol = Peer::back(&node, CAROL).await;
    assert_eq!(carol.client.settings.waiting, 1);
    carol.hears_closed(BOB).await;
    for number in [ALICE, BOB] {
        let mut one = Peer::back(&node, number).await;
        assert_eq!(one.found(SID, &all()).await, Err(Reason::Closed));
        assert_eq!(one.close(SID).await, Err(Reason::Closed));
        assert_eq!(one.wrap(6, CAROL).await, Err(Reason::Closed));
        one.hears_nothing().await;
    }
    assert!(
        matches!(node.store.conversation(&SID).await, Ok(Some(Conversation::Closed { by, .. })) if by == [BOB; 16])
    );
    node.stop().await;
}

#[tokio::test]
async fn a_group_may_be_its_creators_to_close() {
    let node = Node::start(open()).await;
    let (mut alice, mut bob) = (Peer::enrol(&node, ALICE).await, Peer::enrol(&node, BOB).await);
    alice.found_by(SID, &[member(ALICE), member(BOB)], GroupFlags::CREATOR_CLOSES).await.unwrap();
    bob.next().await;
    bob.answer(true).await.unwrap();
    alice.hears_changed(BOB, MemberState::Accepted).await;
    assert_eq!(bob.close(SID).await, Err(Reason::Forbidden));
    alice.close(SID).await.unwrap();
    bob.hears_closed(ALICE).await;
    node.stop().await;
}

#[tokio::test]
async fn an_invitation_can_be_accepted_for_seven_days() {
    let seconds = Arc::new(AtomicU64::new(0));
    let (passed, date) = (Arc::clone(&seconds), Arc::clone(&seconds));
    let clock = Clock::new(move || Duration::from_secs(passed.load(Ordering::SeqCst)))
        .with_date(move || 1_800_000_000 + date.load(Ordering::SeqCst));
    let node = Node::start_by(clock.clone(), open()).await;
    let (mut alice, mut bob, mut carol) =
        (Peer::enrol(&node, ALICE).await, Peer::enrol(&node, BOB).await, Peer::enrol(&node, CAROL).await);
    alice.found(SID, &all()).await.unwrap();
    seconds.store(WEEK, Ordering::SeqCst);
    bob.hears_invite(SID, ALICE, &all()).await;
    bob.answer(true).await.expect("the last moment");
    alice.hears_changed(BOB, MemberState::Accepted).await;
    seconds.store(WEEK + 1, Ordering::SeqCst);
    for accept in [true, false] {
        assert_eq!(carol.answer(accept).await, Err(Reason::Expired), "also before anybody has looked");
    }
    alice.hears_nothing().await;
    // A server looks when it starts.
    let node = Node::start_on_by(node.kill().await, clock, open()).await;
    let (mut alice, mut bob) = (Peer::back(&node, ALICE).await, Peer::back(&node, BOB).await);
    alice.hears_changed(CAROL, MemberState::Expired).await;
    bob.hears_changed(CAROL, MemberState::Expired).await;
    let mut carol = Peer::back(&node, CAROL).await;
    assert_eq!(carol.answer(true).await, Err(Reason::Expired));
    assert_eq!(alice.wrap(5, CAROL).await, Err(Reason::NotMember));
    alice.wrap(5, BOB).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn a_revoked_member_is_gone_and_the_others_go_on() {
    let node = Node::start(open()).await;
    let mut peers = three(&node).await;
    with_chain(&mut peers).await;
    let [mut alice, bob, mut carol] = peers;
    bob.leave().await;
    alice.say(5, 0, only(Rung::Stored)).await;
    alice.hears(&Message::Told(receipt(Rung::Stored, 5, 0))).await;
    carol.hears_message(5, 0, only(Rung::Stored)).await;
    assert_eq!(node.server.revoke(&[BOB; 16]).await, Ok(true));
    alice.hears_told_by(BOB, refused(Reason::Unknown, 5, 0)).await;
    alice.hears_changed(BOB, MemberState::Revoked).await;
    carol.hears_changed(BOB, MemberState::Revoked).await;
    alice.say(5, 1, only(Rung::Stored)).await;
    alice.hears(&Message::Told(receipt(Rung::Stored, 5, 1))).await;
    carol.hears_message(5, 1, only(Rung::Stored)).await;
    assert_eq!(alice.wrap(6, BOB).await, Err(Reason::Unknown));
    alice.wrap(6, CAROL).await.unwrap();
    carol.close(SID).await.unwrap();
    alice.hears_closed(CAROL).await;
    node.stop().await;
}

#[tokio::test]
async fn a_kill_between_any_two_steps_takes_nothing() {
    let mut node = Node::start(open()).await;
    for number in [ALICE, BOB, CAROL] {
        Peer::enrol(&node, number).await.leave().await;
    }
    Peer::back(&node, ALICE).await.found(SID, &all()).await.unwrap();
    node = Node::start_on(node.kill().await, open()).await;
    let mut bob = Peer::back(&node, BOB).await;
    bob.hears_invite(SID, ALICE, &all()).await;
    bob.answer(true).await.unwrap();
    node = Node::start_on(node.kill().await, open()).await;
    let mut carol = Peer::back(&node, CAROL).await;
    carol.hears_invite(SID, ALICE, &all()).await;
    carol.answer(true).await.unwrap();
    carol.hears_changed(BOB, MemberState::Accepted).await;
    carol.sync().await;
    node = Node::start_on(node.kill().await, open()).await;
    let mut alice = Peer::back(&node, ALICE).await;
    alice.hears_changed(BOB, MemberState::Accepted).await;
    alice.hears_changed(CAROL, MemberState::Accepted).await;
    alice.wrap(5, BOB).await.unwrap();
    alice.wrap(5, CAROL).await.unwrap();
    node = Node::start_on(node.kill().await, open()).await;
    let mut alice = Peer::back(&node, ALICE).await;
    alice.say(5, 0, only(Rung::Stored)).await;
    alice.hears(&Message::Told(receipt(Rung::Stored, 5, 0))).await;
    node = Node::start_on(node.kill().await, open()).await;
    let mut carol = Peer::back(&node, CAROL).await;
    // What she acknowledged last may come again.
    while Message::decode(&carol.next().await)
        != Ok(Message::Deliver { wanted: only(Rung::Stored), envelope: &envelope(5, 0, 49) })
    {}
    carol.sync().await;
    carol.close(SID).await.unwrap();
    node = Node::start_on(node.kill().await, open()).await;
    let mut alice = Peer::back(&node, ALICE).await;
    // Bob has never had it. What she was told before may come again.
    let by_bob = ToldBy { from: [BOB; 16], receipt: refused(Reason::Closed, 5, 0) };
    let closed = Closed { sid: SID, by: Some([CAROL; 16]), signature: Some(Fixed(&[CAROL; 64])) };
    let (mut one, mut other) = ([0; 128], [0; 128]);
    let (by_bob, closed) = (by_bob.encode(&mut one).unwrap(), closed.encode(&mut other).unwrap());
    let mut is_told = false;
    loop {
        let payload = alice.next().await;
        let heard = Message::decode(&payload).unwrap();
        is_told |= heard == by_bob;
        if heard == closed {
            break;
        }
    }
    assert!(is_told);
    assert_eq!(alice.found(SID, &all()).await, Err(Reason::Closed));
    node.stop().await;
}
