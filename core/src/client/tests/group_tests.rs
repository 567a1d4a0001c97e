//! The client in a group: whose invitations it takes, what must be signed, who is given its chain, and how it ends.

use super::*;
use crate::envelope::Decision;
use crate::wire::{
    Answer, Closed, Fixed, GroupFlags, Invite, MemberChanged, MemberState, Members, SEALED_NAME_LEN, ToldBy,
};

const SID: [u8; ID_LEN] = [0x77; ID_LEN];
const NAME: [u8; SEALED_NAME_LEN] = [0; SEALED_NAME_LEN];
/// Ids behind and before those of the owner and of the device.
const FRIENDS: [[u8; ID_LEN]; 3] = [[0xf1; ID_LEN], [0x11; ID_LEN], [0xb2; ID_LEN]];

/// Another member: its keys, its chain, and what it holds of the device's.
struct Friend {
    keys: BundleKeys,
    bundle: Bundle,
    key: PublicKey<'static>,
    chain: Option<SendingChain>,
    heard: Option<ReceivingChain<8>>,
}

impl Friend {
    fn new(id: [u8; ID_LEN], key: PublicKey<'static>, epoch: u32) -> Self {
        let member = Member { id, key: key.fingerprint() };
        let keys = BundleKeys::generate(epoch, &mut TestRng::new(u64::from(id[0]) + u64::from(epoch) * 256)).unwrap();
        let bundle = keys.bundle(&member, epoch, [0; HASH_LEN]);
        Self { keys, bundle, key, chain: None, heard: None }
    }

    /// With all keys new.
    fn reset(&mut self) {
        let previous = self.bundle.hash();
        *self = Self::new(self.bundle.id, self.key, self.bundle.epoch + 1);
        self.bundle.previous = previous;
    }
}

/// The group as its honest members see it. The owner is the first friend, and has founded it.
struct Group {
    friends: Vec<Friend>,
    lines: Vec<u8>,
    flags: GroupFlags,
    conversation: Conversation,
    init: [u8; 64],
    /// Answers of the device.
    accepted: Vec<[u8; 64]>,
}

/// Members' key epochs: one has replaced his key, and the device's is 2.
fn key_epoch(id: &[u8; ID_LEN]) -> u32 {
    match *id {
        DEVICE => 2,
        id if id == FRIENDS[1] => 5,
        _ => 0,
    }
}

impl Group {
    fn new(others: usize) -> Self {
        let ids = [OWNER].into_iter().chain(FRIENDS).take(others);
        let keys = [owner_key(), server_key(), owner_key(), server_key()];
        let friends: Vec<_> = ids.zip(keys).map(|(id, key)| Friend::new(id, key, 3)).collect();
        Self::of(friends)
    }

    fn of(friends: Vec<Friend>) -> Self {
        let device = Member { id: DEVICE, key: device_key().fingerprint() };
        let mut members: Vec<_> = friends.iter().map(|friend| friend.bundle.member()).chain([device]).collect();
        members.sort_unstable_by_key(|member| member.id);
        let version = members.iter().map(|member| key_epoch(&member.id)).sum();
        let conversation = Conversation::group(SID, version, &members).unwrap();
        let flags = GroupFlags::CREATOR_CLOSES;
        let init = Decision::Init(flags).sign(&friends[0].keys, &conversation);
        let lines = members.iter().flat_map(Member::encode).collect();
        Self { friends, lines, flags, conversation, init, accepted: Vec::new() }
    }

    fn invite(&self) -> Invite<'_> {
        Invite {
            sid: SID,
            creator: OWNER,
            flags: self.flags,
            signature: Fixed(&self.init),
            members: Members::new(&self.lines).unwrap(),
            name: Fixed(&NAME),
        }
    }

    fn invites(&self, world: &mut World, invite: &Invite<'_>) {
        let mut buffer = [0; 1_024];
        world.say(&Message::Waited { seq: 1, at: 1 });
        world.say(&invite.encode(&mut buffer).unwrap());
    }

    fn accepts(&self, world: &mut World, friend: usize) {
        let friend = &self.friends[friend];
        let signature = Decision::Accept.sign(&friend.keys, &self.conversation);
        world.say_changed(friend.bundle.id, MemberState::Accepted, Some(&signature));
    }

    fn chain(&mut self, world: &mut World, friend: usize) {
        let device = world.bundle.unwrap();
        let friend = &mut self.friends[friend];
        let mut rng = TestRng::new(u64::from(friend.bundle.id[0]) + 9_000);
        let epoch = friend.chain.as_ref().map_or(0, |chain| chain.epoch() + 1);
        let chain = SendingChain::start(&friend.bundle.member(), &self.conversation, epoch, &mut rng).unwrap();
        let mut wrap = [0; WRAP_LEN];
        chain.wrap(&friend.keys, &friend.bundle, &device.member(), &device, &mut rng, &mut wrap).unwrap();
        friend.chain = Some(chain);
        let bundle = friend.bundle.encode();
        let bundle = SignedBundle { bundle: &bundle, signature: &SIGNATURE };
        world.say(&Message::WrapDelivery { from: friend.bundle.id, wrap: &wrap, bundle });
    }

    fn says(&mut self, world: &mut World, friend: usize, wanted: Rungs, body: &[u8]) -> Vec<u8> {
        let envelope = sealed(self.friends[friend].chain.as_mut().unwrap(), true, body);
        world.deliver(wanted, &envelope);
        envelope
    }

    fn told(&self, world: &mut World, friend: usize, receipt: Receipt) {
        let mut buffer = [0; 128];
        let told = ToldBy { from: self.friends[friend].bundle.id, receipt };
        world.say(&told.encode(&mut buffer).unwrap());
    }

    /// Answers what the client asks as an honest server and honest members do, until it asks nothing any more.
    fn serve(&mut self, world: &mut World) -> Vec<Came> {
        let mut came = world.run().unwrap();
        while let Some(payload) = world.said.pop_front() {
            match Message::decode(&payload).unwrap() {
                Message::Lookup(lookup) => self.tell_of(world, &lookup),
                Message::Wrap { request, to, wrap, .. } => {
                    let device = world.bundle.unwrap();
                    let friend = self.friends.iter_mut().find(|friend| friend.bundle.id == to).unwrap();
                    let prekey = friend.keys.prekey(&friend.bundle).unwrap();
                    let (seen, mut wrap) = (friend.heard.as_ref().map(ReceivingChain::epochs), wrap.to_vec());
                    let heard =
                        ReceivingChain::accept(&mut wrap, &prekey, &device.member(), &device, &self.conversation, seen);
                    friend.heard = Some(heard.expect("the wrap is good"));
                    world.say(&Message::Done { request });
                }
                Message::Other(body) => {
                    let answer = Answer::decode(body).unwrap();
                    let signature = *answer.signature.0;
                    assert!(answer.accept && answer.sid == SID);
                    let bundle = world.bundle.unwrap();
                    assert_eq!(Decision::Accept.verify(&bundle, &self.conversation, &signature), Ok(()));
                    self.accepted.push(signature);
                    world.say(&Message::Done { request: answer.request });
                }
                Message::Acknowledge { .. } | Message::Tell(_) | Message::Listening => {}
                other => panic!("{other:?} is not expected here"),
            }
            came.extend(world.run().unwrap());
        }
        came
    }

    fn tell_of(&self, world: &mut World, lookup: &Lookup<'_>) {
        let friend = self.friends.iter().find(|friend| lookup.subject == Subject::Id(friend.bundle.id)).unwrap();
        assert!(lookup.key && lookup.bundle, "one question is enough");
        world.tell_of_member(lookup.request, &friend.bundle, friend.key, key_epoch(&friend.bundle.id));
    }
}

impl World {
    /// A client that accepts its owner's invitations, and stands in the directory.
    fn inviting() -> Self {
        let mut world = Self::new();
        world.client.accept_invitations(0, std::boxed::Box::leak(std::boxed::Box::default()));
        world.run().unwrap();
        assert_eq!(world.answer(), [Came::Ready]);
        world
    }

    /// The same in a group of which everybody has accepted.
    fn in_group(others: usize) -> (Self, Group) {
        let (mut world, mut group) = (Self::inviting(), Group::new(others));
        group.invites(&mut world, &group.invite());
        assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
        for friend in 1..others {
            group.accepts(&mut world, friend);
        }
        assert_eq!(group.serve(&mut world), []);
        (world, group)
    }

    fn tell_of_member(&mut self, request: u16, bundle: &Bundle, key: PublicKey<'_>, key_epoch: u32) {
        let encoded = bundle.encode();
        let entry = DirectoryEntry {
            id: bundle.id,
            name: "a member with a name that is as long as the longest name there is",
            key_epoch,
            record_limit: 2_048,
            status: PeerStatus::Online,
            modulus: Some(key.modulus()),
            bundle: Some(SignedBundle { bundle: &encoded, signature: &SIGNATURE }),
        };
        self.say(&Message::LookupResponse { request, entry });
    }

    fn say_changed(&mut self, member: [u8; ID_LEN], state: MemberState, signature: Option<&[u8; 64]>) {
        let mut buffer = [0; 128];
        let changed = MemberChanged { sid: SID, member, state, signature: signature.map(Fixed) };
        self.say(&changed.encode(&mut buffer).unwrap());
    }

    fn close_group(&mut self) {
        let mut buffer = [0; 128];
        let closed = Closed { sid: SID, by: None, signature: None };
        self.say(&closed.encode(&mut buffer).unwrap());
    }

    /// Whom the client looks up next.
    fn looks_up(&mut self) -> (u16, [u8; ID_LEN]) {
        let payload = self.next();
        match Message::decode(&payload).unwrap() {
            Message::Lookup(Lookup { request, subject: Subject::Id(id), .. }) => (request, id),
            other => panic!("{other:?} asks for nobody"),
        }
    }
}

#[test]
fn a_client_joins_hears_everybody_and_speaks_to_all_who_accepted() {
    for others in 1..=4 {
        let (mut world, mut group) = World::in_group(others);
        assert_eq!(group.accepted.len(), 1);
        for friend in 0..others {
            group.chain(&mut world, friend);
            let envelope = group.says(&mut world, friend, both(), b"reading?");
            let from = group.friends[friend].bundle.id;
            let body = b"reading?".to_vec();
            assert_eq!(world.run(), Ok(std::vec![Came::GroupMessage { from, n: 0, kind: 5, body }]));
            for rung in [Rung::Delivered, Rung::Opened] {
                let receipt = world.told();
                assert_eq!((receipt.rung, receipt.to), (rung, 0));
                assert!(is_told(&receipt, group.friends[friend].chain.as_ref().unwrap(), &envelope));
            }
            assert!(world.said.is_empty());
        }
        assert_eq!(world.client.send_to_group(both(), 5, b"early"), Err(ApiMisuse::NotConnected.into()));
        world.client.start_in_group();
        assert_eq!(group.serve(&mut world), [Came::GroupReady], "a group of {}", others + 1);
        assert!(world.client.is_group_ready());
        assert_eq!(world.client.send_to_group(both(), 6, b"21.50C"), Ok(0));
        world.run().unwrap();
        let payload = world.next();
        assert!(world.said.is_empty(), "sent once for all");
        for friend in 0..others {
            let from = group.friends[friend].bundle.id;
            let heard = group.friends[friend].heard.as_mut().unwrap();
            let mut payload = payload.clone();
            let opened = heard.open::<RustCrypto>(&mut payload[SEND_HEAD_LEN..]).unwrap();
            assert_eq!((opened.n, opened.signed, opened.kind, opened.body), (0, true, 6, &b"21.50C"[..]));
            let receipt = heard.receipt(&from, Rung::Opened, 0, 0).unwrap();
            group.told(&mut world, friend, receipt);
            assert_eq!(world.run(), Ok(std::vec![Came::GroupReceipt(Some(from), Rung::Opened, None, 0)]));
            // Another's word is not his, and nobody's is nothing.
            for forged in [Receipt { tag: Some([1; 16]), ..receipt }, Receipt { tag: None, ..receipt }] {
                group.told(&mut world, friend, forged);
            }
            group.told(&mut world, (friend + 1) % others, Receipt { to: 1, ..receipt });
            assert!(world.is_silent());
        }
    }
}

#[test]
fn an_invitation_is_acknowledged_when_it_was_answered_and_not_before() {
    let (mut world, mut group) = (World::inviting(), Group::new(2));
    group.invites(&mut world, &group.invite());
    world.run().unwrap();
    // The connection breaks before the first answer, and behind each: the invitation comes again, and is the same.
    for answers in 0..3 {
        if answers > 0 {
            let payload = world.next();
            match Message::decode(&payload).unwrap() {
                Message::Lookup(lookup) => group.tell_of(&mut world, &lookup),
                other => panic!("{other:?} after {answers}"),
            }
            world.run().unwrap();
        }
        world.reconnect();
        world.run().unwrap();
        assert_eq!(Message::decode(&world.next()), Ok(Message::Listening));
        group.invites(&mut world, &group.invite());
        world.run().unwrap();
    }
    assert_eq!(group.accepted.len(), 0);
    let mut acknowledged = false;
    while let Some(payload) = world.said.pop_front() {
        match Message::decode(&payload).unwrap() {
            Message::Lookup(lookup) => group.tell_of(&mut world, &lookup),
            Message::Acknowledge { seq } => {
                assert_eq!((seq, group.accepted.len()), (1, 1));
                acknowledged = true;
            }
            Message::Other(body) => {
                let answer = Answer::decode(body).unwrap();
                group.accepted.push(*answer.signature.0);
                assert!(world.is_silent(), "not before the server has it");
                world.say(&Message::Done { request: answer.request });
            }
            other => panic!("{other:?}"),
        }
        world.run().unwrap();
    }
    assert!(acknowledged);
}

#[test]
fn what_the_policy_does_not_name_is_let_expire() {
    let group = Group::new(2);
    let ignored = |world: &mut World, group: &Group, invite: &Invite<'_>| {
        group.invites(world, invite);
        assert_eq!(world.run(), Ok(std::vec![]));
        assert_eq!(Message::decode(&world.next()), Ok(Message::Acknowledge { seq: 1 }));
        assert!(world.said.is_empty());
    };
    // Whoever was told nothing accepts nothing.
    let mut world = World::new();
    world.run().unwrap();
    world.answer();
    ignored(&mut world, &group, &group.invite());

    let mut world = World::inviting();
    let good = group.invite();
    for creator in [FRIENDS[0], DEVICE, [0; ID_LEN]] {
        ignored(&mut world, &group, &Invite { creator, ..good });
    }
    // The device, or the creator, with another key, or not there; more than five.
    let list = |members: &[Member]| -> Vec<u8> {
        let mut members = members.to_vec();
        members.sort_unstable_by_key(|member| member.id);
        members.iter().flat_map(Member::encode).collect()
    };
    let (owner, device) = (group.friends[0].bundle.member(), Member { id: DEVICE, key: device_key().fingerprint() });
    let stranger = |id| Member { id: [id; ID_LEN], key: [id; HASH_LEN] };
    let lists = [
        list(&[owner, Member { key: [1; HASH_LEN], ..device }]),
        list(&[Member { key: [1; HASH_LEN], ..owner }, device]),
        list(&[owner, stranger(1)]),
        list(&[device, stranger(1)]),
        list(&[owner, device, stranger(1), stranger(2), stranger(3), stranger(4)]),
        list(&[owner, stranger(1), stranger(2), stranger(3), stranger(4)]),
    ];
    for lines in &lists {
        ignored(&mut world, &group, &Invite { members: Members::new(lines).unwrap(), ..good });
    }
    // What two have between themselves.
    let direct = crate::envelope::direct_sid(&OWNER, &DEVICE, 0);
    ignored(&mut world, &group, &Invite { sid: direct, ..good });
    assert!(!world.client.is_group_ready());

    // Who is in one group takes no other.
    let (mut world, group) = World::in_group(2);
    ignored(&mut world, &group, &Invite { sid: [1; ID_LEN], ..group.invite() });
    ignored(&mut world, &group, &group.invite());
}

#[test]
fn an_invitation_that_its_creator_did_not_sign_like_this_is_not_answered() {
    let forged = |alter: &dyn Fn(&mut Group)| {
        let (mut world, mut group) = (World::inviting(), Group::new(3));
        alter(&mut group);
        group.invites(&mut world, &group.invite());
        assert_eq!(group.serve(&mut world), []);
        assert!(group.accepted.is_empty());
        world.client.start_in_group();
        assert!(world.is_silent());
        world
    };
    forged(&|group| group.init[7] ^= 1);
    forged(&|group| group.flags = GroupFlags::NONE);
    // Somebody else's signature, and the creator's under keys that he has no more.
    forged(&|group| group.init = Decision::Init(group.flags).sign(&group.friends[1].keys, &group.conversation));
    forged(&|group| group.friends[0].reset());
    // A member more or less than he signed.
    forged(&|group| {
        let init = group.init;
        *group = Group { init, ..Group::new(4) };
    });
    forged(&|group| {
        let init = group.init;
        *group = Group { init, ..Group::new(2) };
    });
    // A member whose key is another than that in the list.
    forged(&|group| group.friends[1].key = owner_key());
    let mut world = forged(&|group| {
        let member = Member { key: owner_key().fingerprint(), ..group.friends[1].bundle.member() };
        group.friends[1].bundle = group.friends[1].keys.bundle(&member, 3, [0; HASH_LEN]);
    });
    // The next one may be good all the same.
    let mut group = Group::new(3);
    group.invites(&mut world, &group.invite());
    assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
}

#[test]
fn a_directory_that_lies_about_a_member_gets_no_answer() {
    type Lie = fn(&mut World, &Friend, u16);
    let lies: [Lie; 5] = [
        |world, friend, request| world.tell_of(request, friend.bundle.id, None, &[]),
        |world, friend, request| world.tell_of(request, friend.bundle.id, Some(&friend.bundle), &SIGNATURE),
        |world, friend, request| world.tell_of_member(request, &friend.bundle, friend.key, 77),
        |world, friend, request| {
            world.verdict = false;
            world.tell_of_member(request, &friend.bundle, friend.key, key_epoch(&friend.bundle.id));
        },
        |world, _, request| world.say(&Message::Refused { request, reason: Reason::Unknown, retry_after: None }),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (mut world, mut group) = (World::inviting(), Group::new(3));
        group.invites(&mut world, &group.invite());
        world.run().unwrap();
        let (request, id) = world.looks_up();
        assert_ne!(id, OWNER, "the creator comes last");
        let friend = group.friends.iter().position(|friend| friend.bundle.id == id).unwrap();
        lie(&mut world, &group.friends[friend], request);
        assert_eq!(world.run(), Ok(std::vec![]), "{number}");
        world.verdict = true;
        assert_eq!(group.serve(&mut world), [], "{number}");
        assert!(group.accepted.is_empty(), "{number}");
    }
    // What may pass is tried again: the connection ends, and the invitation comes again with the next one.
    let (mut world, mut group) = (World::inviting(), Group::new(2));
    group.invites(&mut world, &group.invite());
    world.run().unwrap();
    let (request, _) = world.looks_up();
    world.say(&Message::Refused { request, reason: Reason::Rate, retry_after: Some(1) });
    assert_eq!(world.run(), Err(PeerError::Refused { reason: Reason::Rate, retry_after: 0 }.into()));
    world.reconnect();
    world.run().unwrap();
    group.invites(&mut world, &group.invite());
    assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
}

#[test]
fn an_answer_that_is_refused_ends_it() {
    for reason in [Reason::Expired, Reason::Closed, Reason::NotMember] {
        let (mut world, group) = (World::inviting(), Group::new(1));
        group.invites(&mut world, &group.invite());
        world.run().unwrap();
        let (request, _) = world.looks_up();
        world.tell_of_member(request, &group.friends[0].bundle, owner_key(), 0);
        world.run().unwrap();
        let payload = world.next();
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        let request = Answer::decode(body).unwrap().request;
        world.say(&Message::Refused { request, reason, retry_after: None });
        assert_eq!(world.run(), Ok(std::vec![Came::GroupOver]));
        // What was closed once is not joined again.
        world.said.clear();
        group.invites(&mut world, &group.invite());
        world.run().unwrap();
        assert_eq!(Message::decode(&world.next()), Ok(Message::Acknowledge { seq: 1 }));
        assert!(world.is_silent());
    }
}

#[test]
fn nobody_is_given_the_chain_whose_acceptance_was_not_verified() {
    let (mut world, mut group) = (World::inviting(), Group::new(4));
    group.invites(&mut world, &group.invite());
    assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
    // One who says nothing, one who accepts with another's signature, and one who declines.
    let forged = Decision::Accept.sign(&group.friends[0].keys, &group.conversation);
    world.say_changed(FRIENDS[1], MemberState::Accepted, Some(&forged));
    world.say_changed(FRIENDS[1], MemberState::Accepted, None);
    let declined = Decision::Decline.sign(&group.friends[3].keys, &group.conversation);
    world.say_changed(FRIENDS[2], MemberState::Declined, Some(&declined));
    world.say_changed([0x44; ID_LEN], MemberState::Accepted, Some(&forged));
    world.say_changed(DEVICE, MemberState::Accepted, Some(&forged));
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    let has = |group: &Group| -> Vec<bool> { group.friends.iter().map(|friend| friend.heard.is_some()).collect() };
    assert_eq!(has(&group), [true, false, false, false], "the creator alone");
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"one"), Ok(0));
    world.run().unwrap();
    world.said.clear();

    // Who accepts later has it from the present number on.
    group.accepts(&mut world, 2);
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    assert_eq!(has(&group), [true, false, true, false]);
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"two"), Ok(1));
    world.run().unwrap();
    let mut payload = world.next();
    let opened = group.friends[2].heard.as_mut().unwrap().open::<RustCrypto>(&mut payload[SEND_HEAD_LEN..]).unwrap();
    assert_eq!((opened.n, opened.body), (1, &b"two"[..]));
    // The same again is nothing new; one with new keys gets the chain anew.
    group.accepts(&mut world, 2);
    assert!(world.is_silent());
    group.friends[2].reset();
    group.accepts(&mut world, 2);
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    assert!(group.friends[2].heard.is_some());
    // Who was revoked gets no other, and the one that he has is not spoken on any more.
    let chain = chain_of(&mut world);
    world.say_changed(FRIENDS[1], MemberState::Revoked, None);
    group.friends.iter_mut().for_each(|friend| friend.heard = None);
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    assert_eq!(has(&group), [true, false, false, false]);
    let next = chain_of(&mut world);
    assert_ne!(next, chain);
    world.say(&Message::Told(refusal(next, 0, Reason::Rekey)));
    assert_eq!(world.run(), Ok(std::vec![Came::GroupLost(Reason::Rekey)]));
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    assert_eq!(has(&group), [true, false, false, false]);
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"anew"), Ok(0));
}

// It had answered, and started anew before it knew that the answer had arrived: the others' words wait right behind the
// invitation, and do not come again.
#[test]
fn who_accepted_before_the_invitation_was_checked_is_a_member() {
    let (mut world, mut group) = (World::inviting(), Group::new(4));
    group.invites(&mut world, &group.invite());
    for friend in 1..4 {
        group.accepts(&mut world, friend);
    }
    // One of them was revoked since, and one of the signatures is another's.
    world.say_changed(FRIENDS[0], MemberState::Revoked, None);
    let forged = Decision::Accept.sign(&group.friends[0].keys, &group.conversation);
    world.say_changed(FRIENDS[1], MemberState::Accepted, Some(&forged));
    // Nothing that is said of the creator counts more than what he has signed.
    world.say_changed(OWNER, MemberState::Accepted, Some(&forged));
    assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    let has: Vec<_> = group.friends.iter().map(|friend| friend.heard.is_some()).collect();
    assert_eq!(has, [true, false, false, true]);
}

/// The chain that the client speaks on.
fn chain_of(world: &mut World) -> [u8; 8] {
    world.client.send_to_group(Rungs::NONE, 0, b"").unwrap();
    world.run().unwrap();
    let payload = world.next();
    EnvelopeHeader::decode(&payload[SEND_HEAD_LEN..]).unwrap().chain_id
}

#[test]
fn a_member_who_cannot_be_given_the_chain_holds_nobody_up() {
    let (mut world, mut group) = World::in_group(3);
    world.client.start_in_group();
    world.run().unwrap();
    let (request, id) = world.looks_up();
    world.say(&Message::Refused { request, reason: Reason::Unknown, retry_after: None });
    assert_eq!(world.run(), Ok(std::vec![Came::GroupMemberLost(id, Reason::Unknown)]));
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    let (mut world, mut group) = World::in_group(2);
    world.client.start_in_group();
    world.run().unwrap();
    let (request, id) = world.looks_up();
    let friend = group.friends.iter().position(|friend| friend.bundle.id == id).unwrap();
    world.tell_of_member(request, &group.friends[friend].bundle, group.friends[friend].key, key_epoch(&id));
    world.run().unwrap();
    let request = world.asked();
    // Another sender's chain has this name.
    world.say(&Message::Refused { request, reason: Reason::NameInUse, retry_after: None });
    assert_eq!(world.run(), Ok(std::vec![Came::GroupLost(Reason::NameInUse)]));
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
}

#[test]
fn a_member_to_whom_there_was_no_way_is_tried_again_when_it_says_something() {
    let (mut world, mut group) = World::in_group(1);
    group.chain(&mut world, 0);
    for question in 0..3 {
        group.says(&mut world, 0, Rungs::NONE, b"reading?");
        assert_eq!(world.run().unwrap().len(), 1, "{question}");
        world.client.start_in_group();
        if question < 2 {
            world.run().unwrap();
            let (request, id) = world.looks_up();
            world.say(&Message::Refused { request, reason: Reason::QueueFull, retry_after: None });
            assert_eq!(world.run(), Ok(std::vec![Came::GroupMemberLost(id, Reason::QueueFull)]));
            assert!(world.is_silent(), "nobody is asked without end");
        }
    }
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);

    // Among others who have the chain, too.
    let (mut world, mut group) = World::in_group(3);
    world.client.start_in_group();
    world.run().unwrap();
    let (request, id) = world.looks_up();
    world.say(&Message::Refused { request, reason: Reason::QueueFull, retry_after: None });
    assert_eq!(world.run(), Ok(std::vec![Came::GroupMemberLost(id, Reason::QueueFull)]));
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    let late = group.friends.iter().position(|friend| friend.bundle.id == id).unwrap();
    assert!(group.friends[late].heard.is_none());
    group.chain(&mut world, late);
    group.says(&mut world, late, Rungs::NONE, b"reading?");
    let came = group.serve(&mut world);
    assert!(matches!(came[..], [Came::GroupMessage { .. }, Came::GroupReady]), "{came:?}");
    assert!(group.friends[late].heard.is_some());
}

#[test]
fn who_refuses_the_chain_keeps_it_from_nobody_else() {
    let (mut world, mut group) = World::in_group(3);
    world.client.start_in_group();
    world.run().unwrap();
    let (request, id) = world.looks_up();
    let first = group.friends.iter().position(|friend| friend.bundle.id == id).unwrap();
    group.tell_of(&mut world, &Lookup { request, key: true, bundle: true, subject: Subject::Id(id) });
    world.run().unwrap();
    let payload = world.next();
    let Ok(Message::Wrap { request, wrap, .. }) = Message::decode(&payload) else { panic!("{payload:?}") };
    let chain = WrapHeader::decode(wrap).unwrap().chain_id;
    // Before and after the server has confirmed it.
    group.told(&mut world, first, refusal(chain, 0, Reason::Rekey));
    world.say(&Message::Done { request });
    group.told(&mut world, first, refusal(chain, 0, Reason::Rekey));
    let came = group.serve(&mut world);
    let lost = Came::GroupMemberLost(id, Reason::Rekey);
    assert_eq!(came, [lost.clone(), lost, Came::GroupReady]);
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"21.50C"), Ok(0));
    assert_eq!(group.friends.iter().filter(|friend| friend.heard.is_some()).count(), 2);
    // Once everybody has it, the next one is for him as well.
    world.run().unwrap();
    world.said.clear();
    group.told(&mut world, first, refusal(chain, 0, Reason::Rekey));
    assert_eq!(world.run(), Ok(std::vec![Came::GroupLost(Reason::Rekey)]));
    group.friends.iter_mut().for_each(|friend| friend.heard = None);
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    assert!(group.friends.iter().all(|friend| friend.heard.is_some()));
}

#[test]
fn a_wrap_of_who_is_no_member_and_one_of_a_bundle_that_nobody_verified_are_refused() {
    let (mut world, mut group) = World::in_group(2);
    let device = world.bundle.unwrap();
    let refused = |world: &mut World, reason| {
        assert_eq!(world.run(), Ok(std::vec![]));
        let receipt = world.told();
        assert_eq!((receipt.rung, receipt.reason, receipt.tag), (Rung::Refused, Some(reason), None));
    };
    let mut stranger = Group::of(std::vec![Friend::new(OWNER, owner_key(), 3), Friend::new([9; 16], owner_key(), 3)]);
    stranger.chain(&mut world, 1);
    refused(&mut world, Reason::NotMember);
    // Of another conversation, or of another list of the same.
    stranger.conversation.sid = [3; ID_LEN];
    stranger.chain(&mut world, 1);
    refused(&mut world, Reason::Forbidden);
    stranger.chain(&mut world, 0);
    refused(&mut world, Reason::NotMember);
    let good = group.conversation;
    group.conversation.members = [1; HASH_LEN];
    group.chain(&mut world, 1);
    refused(&mut world, Reason::Unreadable);
    group.conversation = good;

    // His keys are new: he is looked up, and his next chain is taken.
    group.friends[1].reset();
    group.chain(&mut world, 1);
    world.run().unwrap();
    let receipt = world.told();
    assert_eq!((receipt.rung, receipt.reason), (Rung::Refused, Some(Reason::Rekey)));
    assert_eq!(group.serve(&mut world), []);
    group.chain(&mut world, 1);
    assert!(world.is_silent());
    group.says(&mut world, 1, Rungs::NONE, b"new keys");
    assert!(matches!(world.run().unwrap()[..], [Came::GroupMessage { n: 0, .. }]));
    assert_eq!(world.bundle, Some(device));
}

#[test]
fn of_a_group_each_message_must_be_the_next_and_signed() {
    let (mut world, mut group) = World::in_group(2);
    group.chain(&mut world, 1);
    world.run().unwrap();
    let first = group.says(&mut world, 1, Rungs::NONE, b"first");
    assert_eq!(world.run().unwrap().len(), 1);
    let told = |world: &mut World, reason| {
        assert_eq!(world.run(), Ok(std::vec![]));
        let receipt = world.told();
        assert_eq!((receipt.rung, receipt.reason), (Rung::Refused, Some(reason)));
        receipt
    };
    // Again: the same receipts, nothing for the application. Another text under its number; one that is spoilt.
    world.deliver(both(), &first);
    assert_eq!(world.run(), Ok(std::vec![]));
    assert_eq!((world.told().rung, world.told().rung), (Rung::Delivered, Rung::Opened));
    let mut other = first.clone();
    other[12] ^= 1;
    world.deliver(both(), &other);
    assert!(told(&mut world, Reason::Rewound).tag.is_some());
    let second = sealed(group.friends[1].chain.as_mut().unwrap(), true, b"second");
    let third = sealed(group.friends[1].chain.as_mut().unwrap(), true, b"third");
    let mut spoilt = second.clone();
    spoilt[25] ^= 1;
    world.deliver(both(), &spoilt);
    told(&mut world, Reason::Unreadable);
    world.deliver(both(), &third);
    let gap = told(&mut world, Reason::Gap);
    assert!(is_told(&gap, group.friends[1].chain.as_ref().unwrap(), &third), "a chain that is here: the member's word");
    world.deliver(Rungs::NONE, &second);
    world.deliver(Rungs::NONE, &third);
    assert_eq!(world.run().unwrap().len(), 2);
    world.deliver(both(), &first);
    assert_eq!(told(&mut world, Reason::Rewound).tag, None, "longer ago than anybody remembers");
}

#[test]
fn a_group_outlives_a_broken_connection_and_ends_with_its_closing() {
    let (mut world, mut group) = World::in_group(2);
    group.chain(&mut world, 1);
    world.client.start_in_group();
    assert_eq!(group.serve(&mut world), [Came::GroupReady]);
    world.reconnect();
    world.run().unwrap();
    assert_eq!(Message::decode(&world.next()), Ok(Message::Listening));
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"still"), Ok(0));
    group.says(&mut world, 1, Rungs::NONE, b"here");
    assert_eq!(world.run().unwrap().len(), 1);
    world.said.clear();
    // A server with another store is told again.
    world.store = [2; 8];
    world.reconnect();
    world.run().unwrap();
    let came = world.answer_publication();
    assert_eq!(came, [Came::Ready]);
    assert_eq!(group.serve(&mut world), [Came::GroupJoined]);
    assert!(group.accepted.len() == 2 && group.accepted[0] == group.accepted[1]);

    let envelope = sealed(group.friends[1].chain.as_mut().unwrap(), true, b"late");
    world.close_group();
    assert_eq!(world.run(), Ok(std::vec![Came::GroupOver]));
    world.close_group();
    assert!(world.is_silent());
    assert!(!world.client.is_group_ready());
    assert_eq!(world.client.send_to_group(Rungs::NONE, 0, b"late"), Err(ApiMisuse::NotConnected.into()));
    world.deliver(both(), &envelope);
    world.run().unwrap();
    assert_eq!(world.told().reason, Some(Reason::Rekey), "its chains are erased");
    // Nobody leads it back, and into seven others: then the keys of this start have seen enough.
    group.invites(&mut world, &group.invite());
    world.run().unwrap();
    assert_eq!(Message::decode(&world.next()), Ok(Message::Acknowledge { seq: 1 }));
    assert!(world.is_silent());
}

#[test]
fn a_client_leaves_eight_groups_and_joins_no_ninth() {
    let mut world = World::inviting();
    for number in 0..10_u8 {
        let mut group = Group::new(1);
        group.conversation.sid = [number; ID_LEN];
        let members: Vec<_> = Members::new(&group.lines).unwrap().iter().collect();
        group.conversation = Conversation::group([number; ID_LEN], 2, &members).unwrap();
        group.init = Decision::Init(group.flags).sign(&group.friends[0].keys, &group.conversation);
        let invite = Invite { sid: [number; ID_LEN], ..group.invite() };
        let mut buffer = [0; 1_024];
        world.say(&invite.encode(&mut buffer).unwrap());
        world.run().unwrap();
        if number >= 8 {
            assert!(world.said.is_empty(), "{number}");
            continue;
        }
        let (request, _) = world.looks_up();
        world.tell_of_member(request, &group.friends[0].bundle, owner_key(), 0);
        world.run().unwrap();
        let payload = world.next();
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("{payload:?}") };
        world.say(&Message::Done { request: Answer::decode(body).unwrap().request });
        assert_eq!(world.run(), Ok(std::vec![Came::GroupJoined]));
        let closed = Closed { sid: [number; ID_LEN], by: None, signature: None };
        world.say(&closed.encode(&mut buffer).unwrap());
        assert_eq!(world.run(), Ok(std::vec![Came::GroupOver]));
    }
}

impl World {
    /// The same bundle is published again, and the server says that it has it.
    fn answer_publication(&mut self) -> Vec<Came> {
        let payload = self.next();
        let Ok(Message::Publish { request, .. }) = Message::decode(&payload) else { panic!("{payload:?}") };
        self.say(&Message::Done { request });
        self.run().unwrap()
    }
}
