//! The message catalogue: what an authenticated peer may put into a record. An input is one payload.

use ossicle_core::{
    Answer, Body, Bundle, Change, Changed, ChannelInfo, Channels, ChannelsResponse, CloseConversation, Closed,
    Conversation, DirectoryEntry, DirectoryList, Enrol, Error, ExpireChannels, Fixed, Follow, FollowResponse,
    GroupFlags, Init, Invite, Lookup, MAX_MEMBERS, MAX_POST_LEN, Member, MemberChanged, MemberState, Members,
    Membership, MembershipError, Message, Names, News, PeerStatus, Post, Presence, Reason, Receipt, Rotate, Rung,
    Rungs, SEALED_NAME_LEN, Said, Say, Settings, SignedBundle, Subject, Successor, SuccessorQuery, ToldBy, Unwatch,
    Watch, WatchResponse, name_prekey_id,
};

use crate::{Reached, Target};

/// See the module.
pub const TARGET: Target = Target { name: "catalogue", run, states, seeds };

/// Every code that there is, as a test sees to.
const NAMES: &[(u16, &str)] = &[
    (0x0000, "0000 Init"),
    (0x0100, "0100 CloseConversation"),
    (0x0120, "0120 Closed"),
    (0x0200, "0200 Send"),
    (0x0201, "0201 Say"),
    (0x0202, "0202 Follow"),
    (0x0210, "0210 Told"),
    (0x0211, "0211 ToldBy"),
    (0x0212, "0212 FollowResponse"),
    (0x0220, "0220 Deliver"),
    (0x0221, "0221 Waited"),
    (0x0222, "0222 News"),
    (0x0230, "0230 Tell"),
    (0x0231, "0231 Acknowledge"),
    (0x0300, "0300 Answer"),
    (0x0320, "0320 Invite"),
    (0x0321, "0321 MemberChanged"),
    (0x0400, "0400 Status"),
    (0x0410, "0410 StatusResponse"),
    (0x0500, "0500 Lookup"),
    (0x0501, "0501 List"),
    (0x0502, "0502 Enrol"),
    (0x0503, "0503 Revoke"),
    (0x0504, "0504 Rotate"),
    (0x0505, "0505 SuccessorQuery"),
    (0x0510, "0510 LookupResponse"),
    (0x0511, "0511 ListResponse"),
    (0x0515, "0515 Successor"),
    (0x0600, "0600 Watch"),
    (0x0601, "0601 Unwatch"),
    (0x0610, "0610 WatchResponse"),
    (0x0620, "0620 Changed"),
    (0x0700, "0700 Listening"),
    (0x0701, "0701 NotListening"),
    (0x0720, "0720 Settings"),
    (0x0800, "0800 Channels"),
    (0x0801, "0801 ExpireChannels"),
    (0x0810, "0810 ChannelsResponse"),
    (0x0821, "0821 Close"),
    (0x0822, "0822 KeyUpdate"),
    (0x0b00, "0B00 Publish"),
    (0x0b01, "0B01 Wrap"),
    (0x0b20, "0B20 WrapDelivery"),
    (0x0f00, "0F00 Done"),
    (0x0f10, "0F10 Refused"),
];

fn states() -> Vec<&'static str> {
    let others = [
        "a line of a list",
        "a list with a broken line",
        "a line of changes",
        "changes with a broken line",
        "a group whose invitees have names",
        "a group whose invitees have none",
        "a post",
        "posts with a broken line",
        "an invitation to be held against pins",
        "an invitation without its creator",
        "malformed",
        "unknown code",
    ];
    NAMES.iter().map(|(_, name)| *name).chain(others).collect()
}

/// Runs one input.
pub fn run(data: &[u8], reached: Reached<'_>) {
    let message = match Message::decode(data) {
        Ok(message) => message,
        Err(error) => {
            assert_eq!(error, Error::Decode);
            return reached("malformed");
        }
    };
    // The encoding of what was read is no longer than what was read, which may have held integers with leading zeros.
    let mut again = vec![0; data.len()];
    let len = message.encode(&mut again).expect("what was read can be written");
    assert_eq!(Message::decode(&again[..len]).as_ref(), Ok(&message), "what is written can be read");
    for room in [0, 1, len / 2, len - 1] {
        assert!(message.encode(&mut vec![0; room]).is_err(), "{len} bytes do not fit into {room}");
    }
    match &message {
        Message::Other(body) => return other(*body, reached),
        Message::ListResponse(list) => lines(list, reached),
        Message::Told(receipt) | Message::Tell(receipt) => {
            assert_eq!(Rung::from_code(receipt.rung.code()), Some(receipt.rung));
            assert!(receipt.reason.is_none_or(|reason| Reason::from_code(reason.code()) == Some(reason)));
        }
        _ => {}
    }
    reached(name(message.code()));
}

fn name(code: u16) -> &'static str {
    NAMES.iter().find(|(known, _)| *known == code).expect("every code has a name").1
}

fn lines(list: &DirectoryList<'_>, reached: Reached<'_>) {
    let mut room = [0; 512];
    for line in list.lines() {
        let Ok(line) = line else { return reached("a list with a broken line") };
        reached("a line of a list");
        if let Some(len) = DirectoryList::append(&line, &mut room) {
            let again = DirectoryList::new(list.request(), list.more(), &room[..len]);
            assert!(again.lines().eq([Ok(line)]), "what is written can be read");
        }
    }
}

fn changes(lines: &[u8], reached: Reached<'_>) {
    let mut room = [0; 512];
    for line in Change::lines(lines) {
        let Ok(line) = line else { return reached("changes with a broken line") };
        reached("a line of changes");
        if let Some(len) = line.append(&mut room) {
            assert!(Change::lines(&room[..len]).eq([Ok(line)]), "what is written can be read");
        }
    }
}

fn said(lines: &[u8], reached: Reached<'_>) {
    let mut room = vec![0; lines.len()];
    for line in Said::lines(lines) {
        let Ok(line) = line else { return reached("posts with a broken line") };
        post(&line.post, reached);
        let len = line.append(&mut room).expect("what was read can be written");
        assert!(Said::lines(&room[..len]).eq([Ok(line)]), "what is written can be read");
        assert!(len <= Said::MAX_LEN || !line.post.is_proper());
    }
}

/// Nobody signs with filler, and what nobody may say is not looked at.
fn post(post: &Post<'_>, reached: Reached<'_>) {
    reached("a post");
    let nobody = Bundle::decode(&[1; 184]).expect("a bundle");
    let error = if post.is_proper() { Error::Crypto } else { Error::Decode };
    assert_eq!(post.verify(&[1; 32], &nobody), Err(error));
}

/// What a list of members promises.
fn members(members: Members<'_>) {
    assert!((2..=MAX_MEMBERS).contains(&members.count()));
    let all: Vec<_> = members.iter().collect();
    assert!(all.is_sorted_by(|a, b| a.id < b.id));
    assert!(all.iter().all(|member| members.find(&member.id) == Some(*member)));
    assert_eq!(all.iter().flat_map(Member::encode).collect::<Vec<_>>(), members.bytes());
}

/// Each member holds the invitation against pins that are right, and against one that is not.
fn invited(invite: &Invite<'_>, reached: Reached<'_>) {
    let all: Vec<_> = invite.members.iter().collect();
    for me in &all {
        let pin = |id: &[u8; 16]| Some((invite.members.find(id)?.key, 1));
        let membership = Membership::of(invite, &me.id, pin);
        let Ok(membership) = membership else {
            assert_eq!(membership, Err(MembershipError::NoCreator));
            assert!(invite.members.find(&invite.creator).is_none());
            return reached("an invitation without its creator");
        };
        let version = u32::try_from(all.len()).expect("few");
        assert_eq!(Ok(*membership.conversation()), Conversation::group(invite.sid, version, &all));
        assert_eq!(membership.creator().id, invite.creator);
        let changed =
            |id: &[u8; 16]| pin(id).map(|(key, epoch)| if *id == me.id { (key, epoch) } else { ([0xff; 32], 1) });
        let is_noticed = all.iter().any(|other| other.id != me.id && other.key != [0xff; 32]);
        assert_eq!(Membership::of(invite, &me.id, changed).is_err(), is_noticed);
        assert!(name_prekey_id(invite.name.0).to_be_bytes() == invite.name.0[..4]);
    }
    let stranger = [[0xee; 16], [0xef; 16]].into_iter().find(|id| invite.members.find(id).is_none());
    if let Some(stranger) = stranger {
        assert!(Membership::of(invite, &stranger, |_| None).is_err());
    }
    reached("an invitation to be held against pins");
}

fn group(init: &Init<'_>, reached: Reached<'_>) {
    members(init.members);
    for creator in init.members.iter() {
        let Ok(invitees) = init.invitees(&creator.id) else {
            assert_ne!(init.names.count() + 1, init.members.count());
            return reached("a group whose invitees have none");
        };
        let all: Vec<_> = invitees.collect();
        assert_eq!(all.len() + 1, init.members.count());
        assert!(all.iter().all(|(member, _)| member.id != creator.id));
        assert!(all.iter().map(|(_, name)| *name).eq(init.names.iter()));
    }
    reached("a group whose invitees have names");
}

/// Reads a body as each of the messages beside the catalogue: exactly the one that its code names may succeed.
fn other(body: Body<'_>, reached: Reached<'_>) {
    let mut room = vec![0; body.bytes().len()];
    let mut read = Vec::new();
    macro_rules! read {
        ($($kind:ident)*) => {$(
            if let Ok(message) = $kind::decode(body) {
                read.push($kind::CODE);
                assert_eq!(message.request, body.request());
                let Ok(Message::Other(again)) = message.encode(&mut room) else { panic!("what was read can be written") };
                assert_eq!($kind::decode(again), Ok(message), "what is written can be read");
            }
        )*};
    }
    macro_rules! told {
        ($($kind:ident)*) => {$(
            if let Ok(message) = $kind::decode(body) {
                read.push($kind::CODE);
                let Ok(Message::Other(again)) = message.encode(&mut room) else { panic!("what was read can be written") };
                assert_eq!($kind::decode(again), Ok(message), "what is written can be read");
            }
        )*};
    }
    macro_rules! read_lines {
        ($($kind:ident)*) => {$(
            if let Ok(message) = $kind::decode(body) {
                read.push($kind::CODE);
                let Ok(Message::Other(again)) = message.encode(&mut room) else { panic!("what was read can be written") };
                assert_eq!($kind::decode(again), Ok(message), "what is written can be read");
                changes(message.lines, reached);
            }
        )*};
    }
    read!(Enrol Rotate SuccessorQuery Successor Watch Unwatch Channels ExpireChannels ChannelsResponse);
    read_lines!(WatchResponse Changed);
    read!(Init Answer CloseConversation);
    read!(Say Follow FollowResponse);
    told!(Invite MemberChanged Closed ToldBy News);
    if let Ok(say) = Say::decode(body) {
        post(&say.post, reached);
    }
    if let Ok(page) = FollowResponse::decode(body) {
        said(page.lines, reached);
    }
    if let Ok(init) = Init::decode(body) {
        group(&init, reached);
    }
    if let Ok(invite) = Invite::decode(body) {
        members(invite.members);
        invited(&invite, reached);
    }
    match read.as_slice() {
        [] if Body::CODES
            .iter()
            .chain(Body::GROUP_CODES)
            .chain(Body::PUBLIC_CODES)
            .any(|code| *code == body.code()) =>
        {
            reached("malformed")
        }
        [] => reached("unknown code"),
        [code] => {
            assert_eq!(*code, body.code());
            reached(name(*code));
        }
        _ => panic!("one body is two messages: {read:04x?}"),
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (modulus, signature, proof) = (&[10; 256][..], &[11; 256][..], &[13; 256][..]);
    let bundle = SignedBundle { bundle: &[1; 184], signature };
    let told = Receipt { rung: Rung::Delivered, reason: None, chain: [3; 8], from: 1, to: 200, tag: Some([4; 16]) };
    let tell = Receipt { rung: Rung::Refused, reason: Some(Reason::Rekey), from: 7, to: 7, tag: None, ..told };
    let status = PeerStatus::Offline { last_seen: Some(1_700_000_000) };
    let entry = DirectoryEntry {
        id: [5; 16],
        name: "alice",
        key_epoch: 0,
        record_limit: 16_408,
        status,
        modulus: Some(modulus),
        bundle: Some(bundle),
    };
    let mut lines = Vec::new();
    for line in [
        Presence { id: [5; 16], name: "bob", status: PeerStatus::Online },
        Presence { id: [6; 16], name: "carol", status },
    ] {
        let mut room = [0; 64];
        let len = DirectoryList::append(&line, &mut room).expect("a line");
        lines.extend_from_slice(&room[..len]);
    }
    let broken = [&lines[..], &[0xff; 3]].concat();
    let mut changed = Vec::new();
    for (id, name, status) in
        [([5; 16], "bob", Some(PeerStatus::Online)), ([6; 16], "carol", Some(status)), ([7; 16], "dora", None)]
    {
        let mut room = [0; Change::MAX_LEN];
        let len = Change { id, name, status }.append(&mut room).expect("a line");
        changed.extend_from_slice(&room[..len]);
    }
    let broken_change = [&changed[..], &[0xff; 3]].concat();
    let page = WatchResponse { request: 11, next: "dora", lines: &changed };
    let settings = Settings {
        channel: [2; 16],
        valid_for: 604_800,
        time: 1_790_000_000,
        store_epoch: [1; 8],
        ..Settings::default()
    };
    let enrol = Enrol { request: 4, index: 0, count: 2, id: [5; 16], name: "s-1", modulus, signature };
    let rotate = Rotate { request: 9, key_epoch: 1, modulus, signature, proof, bundle };
    let first = Some(ChannelInfo { id: [10; 16], valid_for: 604_800 });
    let by_name = Lookup { request: 1, key: true, bundle: true, subject: Subject::Name("alice") };
    let by_id = Lookup { subject: Subject::Id([5; 16]), key: false, ..by_name };
    let (sid, decided, name) = ([14; 16], Fixed(&[11; 64]), [17; SEALED_NAME_LEN]);
    let list: Vec<_> = [5, 6, 7].iter().flat_map(|id| Member { id: [*id; 16], key: [8; 32] }.encode()).collect();
    let everybody = Members::new(&list).expect("a list");
    let names = [name; 2];
    let init = Init {
        request: 13,
        sid,
        flags: GroupFlags::CREATOR_CLOSES,
        signature: decided,
        members: everybody,
        names: Names::new(names.as_flattened()).expect("a list"),
    };
    let nameless = Init { names: Names::new(&name).expect("a list"), ..init };
    let invite =
        Invite { sid, creator: [5; 16], flags: init.flags, signature: decided, members: everybody, name: Fixed(&name) };
    let alien = Invite { creator: [8; 16], ..invite };
    let accepted = MemberChanged { sid, member: [6; 16], state: MemberState::Accepted, signature: Some(decided) };
    let expired = MemberChanged { state: MemberState::Expired, signature: None, ..accepted };
    let by_member = Closed { sid, by: Some([5; 16]), signature: Some(decided) };
    let by_server = Closed { by: None, signature: None, ..by_member };
    let post = Post { number: 7, at: 1_790_000_000_123, epoch: 3, kind: 0, signature: decided, body: b"hello, all" };
    let mut posts = Vec::new();
    for said in [
        Said { seq: 300, author: [5; 16], post },
        Said { seq: 302, author: [6; 16], post: Post { body: &[7; MAX_POST_LEN], ..post } },
    ] {
        let mut room = [0; Said::MAX_LEN];
        let len = said.append(&mut room).expect("a line");
        posts.extend_from_slice(&room[..len]);
    }
    let broken_post = [&posts[..], &[0xff; 3]].concat();
    let page_of_posts = FollowResponse { request: 17, more: true, lines: &posts };
    let mut rooms = [const { [0; 2048] }; 29];
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z, a1, b1, c1] = &mut rooms;
    let messages = [
        ("0000-init", init.encode(m).expect("room")),
        ("0000-without-names", nameless.encode(n).expect("room")),
        (
            "0100-close-conversation",
            CloseConversation { request: 15, sid, signature: decided }.encode(o).expect("room"),
        ),
        ("0120-closed", by_member.encode(p).expect("room")),
        ("0120-by-the-server", by_server.encode(q).expect("room")),
        ("0211-told-by", ToldBy { from: [6; 16], receipt: told }.encode(r).expect("room")),
        ("0300-answer", Answer { request: 14, sid, accept: true, signature: decided }.encode(s).expect("room")),
        ("0320-invite", invite.encode(t).expect("room")),
        ("0320-without-creator", alien.encode(w).expect("room")),
        ("0321-accepted", accepted.encode(u).expect("room")),
        ("0321-expired", expired.encode(v).expect("room")),
        ("0201-say", Say { request: 16, post }.encode(x).expect("room")),
        ("0201-empty", Say { request: 16, post: Post { body: &[], ..post } }.encode(y).expect("room")),
        ("0202-follow", Follow { request: 17, after: 299 }.encode(z).expect("room")),
        ("0212-follow-response", page_of_posts.encode(a1).expect("room")),
        ("0212-broken-line", FollowResponse { lines: &broken_post, ..page_of_posts }.encode(b1).expect("room")),
        ("0222-news", News {}.encode(c1).expect("room")),
        ("0200-send", Message::Send { wanted: Rungs::NONE.with(Rung::Delivered), envelope: &[7; 49] }),
        ("0210-told", Message::Told(told)),
        ("0220-deliver", Message::Deliver { wanted: Rungs::NONE, envelope: &[7; 49] }),
        ("0221-waited", Message::Waited { seq: 300, at: 1_790_000_000 }),
        ("0230-tell", Message::Tell(tell)),
        ("0231-acknowledge", Message::Acknowledge { seq: u64::MAX }),
        ("0400-status", Message::Status { request: 300 }),
        ("0410-status-response", Message::StatusResponse { request: 300 }),
        ("0500-lookup-by-name", Message::Lookup(by_name)),
        ("0500-lookup-by-id", Message::Lookup(by_id)),
        ("0501-list", Message::List { request: 2, after: "bob" }),
        ("0502-enrol", enrol.encode(a).expect("room")),
        ("0503-revoke", Message::Revoke { request: 5, subject: Subject::Name("s-1") }),
        ("0504-rotate", rotate.encode(b).expect("room")),
        ("0505-successor-query", SuccessorQuery { request: 10, id: [5; 16], key_epoch: 0 }.encode(c).expect("room")),
        ("0510-lookup-response", Message::LookupResponse { request: 1, entry }),
        ("0511-list-response", Message::ListResponse(DirectoryList::new(2, true, &lines))),
        ("0511-broken-line", Message::ListResponse(DirectoryList::new(2, false, &broken))),
        ("0515-successor", Successor { request: 10, modulus, signature }.encode(d).expect("room")),
        ("0600-watch", Watch { request: 11, pattern: "s-*", after: "bob" }.encode(h).expect("room")),
        ("0601-unwatch", Unwatch { request: 12, pattern: "s-*" }.encode(i).expect("room")),
        ("0610-watch-response", page.encode(j).expect("room")),
        ("0620-changed", Changed { lost: false, lines: &changed }.encode(k).expect("room")),
        ("0620-broken-line", Changed { lost: true, lines: &broken_change }.encode(l).expect("room")),
        ("0700-listening", Message::Listening),
        ("0701-not-listening", Message::NotListening),
        ("0720-settings", Message::Settings(settings)),
        ("0800-channels", Channels { request: 9 }.encode(e).expect("room")),
        ("0801-expire-channels", ExpireChannels { request: 9 }.encode(f).expect("room")),
        ("0810-channels-response", ChannelsResponse { request: 9, first, second: None }.encode(g).expect("room")),
        ("0821-close", Message::Close { reason: Some(Reason::TakenOver) }),
        ("0822-key-update", Message::KeyUpdate),
        ("0b00-publish", Message::Publish { request: 5, bundle }),
        ("0b01-wrap", Message::Wrap { request: 6, to: [9; 16], wrap: &[1; 244], bundle }),
        ("0b20-wrap-delivery", Message::WrapDelivery { from: [9; 16], wrap: &[1; 244], bundle }),
        ("0f00-done", Message::Done { request: 7 }),
        ("0f10-refused", Message::Refused { request: 8, reason: Reason::Rate, retry_after: Some(1000) }),
    ];
    let mut seeds: Vec<_> = messages
        .into_iter()
        .map(|(name, message)| {
            let mut payload = vec![0; 4096];
            let len = message.encode(&mut payload).expect("room");
            (name, payload[..len].to_vec())
        })
        .collect();
    seeds.push(("long-integer", vec![0x04, 0x00, 0x80, 0x80, 0x00]));
    seeds.push(("malformed", vec![0x04, 0x00]));
    seeds.push(("unknown-code", vec![0xff, 0xff, 1, 2, 3]));
    seeds
}

#[cfg(test)]
#[test]
fn every_code_has_a_name() {
    let others = [Body::CODES, Body::GROUP_CODES, Body::PUBLIC_CODES].concat();
    let mut codes: Vec<_> = Message::CODES.iter().copied().chain(others).collect();
    codes.sort_unstable();
    assert_eq!(codes, NAMES.iter().map(|(code, _)| *code).collect::<Vec<_>>());
}
