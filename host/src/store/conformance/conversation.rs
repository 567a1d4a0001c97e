//! The promises about conversations of several.

use ossicle_core::direct_sid;

use super::*;

const SID: ConversationId = [0x51; 16];
const ALL: usize = usize::MAX;

/// A store with clients 1 to `count`.
async fn with(backend: &impl Backend, count: u16, limits: QueueLimits) -> SharedStore {
    let store = backend.open_with(limits).await;
    for n in 1..=count {
        assert_eq!(store.enrol(enrolment(n, &format!("client-{n}"))).await, Ok(Enrolled::New));
    }
    store
}

fn founding(sid: ConversationId, creator: u16, invited: impl IntoIterator<Item = u16>) -> Founding {
    let invitation =
        |n| Invitation { client: id(n), key_epoch: 0, notice: format!("invited by {creator}").into_bytes().into() };
    Founding {
        sid,
        creator: id(creator),
        key_epoch: 0,
        creator_only: false,
        signature: [creator as u8; 64],
        invited: invited.into_iter().map(invitation).collect(),
        now: NOW,
    }
}

/// Clients 1 to 4, of which 1 has invited the rest.
async fn with_group(backend: &impl Backend) -> SharedStore {
    let store = with(backend, 4, QueueLimits::default()).await;
    assert_eq!(store.found(founding(SID, 1, 2..=4)).await, Ok(Founded::New));
    store
}

fn says(n: u16, accepts: bool) -> MemberAnswer {
    MemberAnswer { sid: SID, member: id(n), accepts, signature: [n as u8; 64], oldest: NOW, now: NOW + 5 }
}

async fn accept(store: &SharedStore, n: u16) -> Vec<ClientId> {
    store.answer(says(n, true), announce()).await.unwrap()
}

async fn close(store: &SharedStore, by: u16) -> Result<Closing, CloseError> {
    store.close(&SID, &id(by), &[by as u8; 64], NOW + 9, refuse(), announce()).await
}

fn changed(member: u16, state: MemberState, signature: Option<u8>) -> String {
    let signature = signature.map(|byte| [byte; 64]);
    format!("{:?}", Notice::Changed { sid: SID, member: id(member), state, signature })
}

fn closed(by: u16) -> String {
    format!("{:?}", Notice::Closed { sid: SID, by: id(by), signature: [by as u8; 64] })
}

/// The notices that wait for a client.
async fn notices(store: &SharedStore, n: u16) -> Vec<String> {
    let items = store.queue(&id(n), 0, ALL, ALL).await.unwrap();
    let waiting = store.waiting(&id(n)).await.unwrap();
    assert_eq!(waiting.items, items.len() as u64);
    let notices = items.iter().filter(|item| item.kind == ItemKind::Notice);
    notices.map(|item| String::from_utf8(item.bytes.to_vec()).unwrap()).collect()
}

async fn states(store: &SharedStore) -> Vec<MemberState> {
    match store.conversation(&SID).await.unwrap() {
        Some(Conversation::Open { members, .. }) => members.iter().map(|member| member.state).collect(),
        other => panic!("{other:?}"),
    }
}

/// Tells the sender with a receipt.
fn refuse() -> Refuse {
    Refuse::new(|recipient, item| {
        item.kind.is_envelope().then(|| NewItem {
            recipient: item.sender,
            sender: *recipient,
            kind: ItemKind::Receipt,
            bytes: (*b"refused").into(),
            chain: item.chain,
            n: item.n,
            wanted: 0,
            at: NOW + 9,
        })
    })
}

fn envelope(recipient: u16, sender: u16, chain: u8, n: u32) -> NewItem {
    NewItem {
        recipient: id(recipient),
        sender: id(sender),
        kind: ItemKind::GroupEnvelope,
        chain: [chain; 8],
        n,
        wanted: 3,
        bytes: vec![7; 50].into(),
        at: NOW,
    }
}

pub(crate) async fn an_invitation_waits_for_everybody_who_is_invited(backend: &impl Backend) {
    let store = with(backend, 4, QueueLimits::default()).await;
    assert_eq!(store.conversation(&SID).await, Ok(None));
    let founding = Founding { creator_only: true, ..founding(SID, 1, 2..=3) };
    assert_eq!(store.found(founding.clone()).await, Ok(Founded::New));
    let invited = |n| Member { client: id(n), state: MemberState::Invited, signature: None };
    let creator = Member { state: MemberState::Accepted, ..invited(1) };
    let members = vec![creator, invited(2), invited(3)];
    let open = Conversation::Open { creator: id(1), creator_only: true, at: NOW, members };
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.conversation(&SID).await, Ok(Some(open.clone())));
    assert_eq!(store.found(founding).await, Ok(Founded::Repeat), "its answer may have been lost");
    for n in 2..=3 {
        let items = store.queue(&id(n), 0, ALL, ALL).await.unwrap();
        assert_eq!(items.len(), 1);
        assert_eq!((items[0].kind, items[0].sender, items[0].at), (ItemKind::Notice, id(1), NOW));
        assert_eq!(&*items[0].bytes, b"invited by 1");
    }
    assert_eq!((notices(&store, 1).await.len(), notices(&store, 4).await.len()), (0, 0));
    assert_eq!(store.conversation(&SID).await, Ok(Some(open)));
}

pub(crate) async fn who_lost_what_it_knew_is_invited_again(backend: &impl Backend) {
    let store = with_group(backend).await;
    // 2 accepts, 3 declines; 4 has read it and not answered.
    accept(&store, 2).await;
    store.answer(says(3, false), announce()).await.unwrap();
    for n in 1..=4 {
        store.acknowledge(&id(n), u64::MAX).await.unwrap();
    }
    drop(store);
    let store = backend.open().await;
    for (n, again) in [(1, false), (2, true), (3, false), (4, true)] {
        assert_eq!(store.invite_again(&id(n), NOW + 6).await, Ok(again), "{n}");
        assert_eq!(notices(&store, n).await, ["invited by 1"; 1][..usize::from(again)], "{n}");
    }
    // Twice is once.
    store.invite_again(&id(2), NOW + 7).await.unwrap();
    assert_eq!(notices(&store, 2).await, ["invited by 1"]);
    assert_eq!(accept(&store, 4).await, [1, 2, 4].map(id));
    // Who comes back is told who is in, and the others of his new word.
    store.acknowledge(&id(2), u64::MAX).await.unwrap();
    let anew = MemberAnswer { signature: [22; 64], ..says(2, true) };
    assert_eq!(store.answer(anew, announce()).await, Ok([1, 2, 4].map(id).into()));
    assert_eq!(notices(&store, 2).await, [changed(4, MemberState::Accepted, Some(4))]);
    assert_eq!(notices(&store, 1).await.last(), Some(&changed(2, MemberState::Accepted, Some(22))));
    // What is closed invites nobody.
    close(&store, 1).await.unwrap();
    assert_eq!(store.invite_again(&id(2), NOW + 9).await, Ok(false));
    assert_eq!(store.invite_again(&id(99), NOW + 9).await, Ok(false), "nor a stranger");
}

pub(crate) async fn an_id_has_one_conversation_for_ever(backend: &impl Backend) {
    let store = with_group(backend).await;
    // The same partners, another creator; the same creator, something else.
    assert_eq!(store.found(founding(SID, 2, [1, 3, 4])).await, Err(FoundError::InUse));
    let other = Founding { signature: [9; 64], ..founding(SID, 1, 2..=4) };
    assert_eq!(store.found(other).await, Err(FoundError::InUse));
    assert_eq!(notices(&store, 3).await, ["invited by 1"]);
    // The same partners under another id are another conversation.
    assert_eq!(store.found(founding([2; 16], 2, [1, 3, 4])).await, Ok(Founded::New));
    // An id that a chain has is somebody's.
    store.register_chain(&[1; 8], &id(1), &[3; 16], &id(2)).await.unwrap();
    assert_eq!(store.found(founding([3; 16], 3, [4])).await, Err(FoundError::InUse));
    close(&store, 1).await.unwrap();
    drop(store);
    let store = backend.open().await;
    for n in [1, 2] {
        let others = (1..=4).filter(|other| *other != n);
        assert_eq!(store.found(founding(SID, n, others)).await, Err(FoundError::Closed));
    }
}

pub(crate) async fn only_who_is_known_is_invited(backend: &impl Backend) {
    let store = with(backend, 4, QueueLimits::default()).await;
    store.revoke(&id(4), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(store.found(founding(SID, 1, [2, 9])).await, Err(FoundError::Unknown));
    assert_eq!(store.found(founding(SID, 1, [2, 4])).await, Err(FoundError::Unknown));
    assert_eq!(store.found(founding(SID, 4, [2])).await, Err(FoundError::Unknown));
    store.rotate(new_key(3, 1, 100)).await.unwrap();
    assert_eq!(store.found(founding(SID, 1, [2, 3])).await, Err(FoundError::KeyChanged));
    assert_eq!(store.found(founding(SID, 3, [2])).await, Err(FoundError::KeyChanged));
    assert_eq!(
        (store.conversation(&SID).await, notices(&store, 2).await.len()),
        (Ok(None), 0),
        "nothing of it remains"
    );
    let mut founding = founding(SID, 1, [2, 3]);
    founding.invited[1].key_epoch = 1;
    assert_eq!(store.found(founding).await, Ok(Founded::New));
}

pub(crate) async fn nobody_is_invited_without_end(backend: &impl Backend) {
    let store = with(backend, 4, QueueLimits { notices: 20, ..QueueLimits::default() }).await;
    let sid = |n: usize| [n as u8; 16];
    for n in 0..MAX_INVITATIONS {
        assert_eq!(store.found(founding(sid(n), 1, [2])).await, Ok(Founded::New));
    }
    assert_eq!(store.found(founding(SID, 1, [3, 2])).await, Err(FoundError::TooMany));
    assert_eq!(store.found(founding(SID, 1, [3])).await, Ok(Founded::New), "the others can be");
    let answer = MemberAnswer { sid: sid(0), ..says(2, false) };
    store.answer(answer, announce()).await.unwrap();
    assert_eq!(store.found(founding([77; 16], 1, [2])).await, Ok(Founded::New), "one was answered");
    // What is undelivered counts as well, and nothing but a delivery makes room.
    for n in 30..33 {
        assert_eq!(store.found(founding([n; 16], 3, [2])).await, Ok(Founded::New));
    }
    assert_eq!(notices(&store, 2).await.len(), 20);
    assert_eq!(store.found(founding([33; 16], 3, [2])).await, Err(FoundError::TooMany));
    assert_eq!(store.conversation(&[33; 16]).await, Ok(None));
    store.acknowledge(&id(2), u64::MAX).await.unwrap();
    assert_eq!(store.found(founding([33; 16], 3, [2])).await, Ok(Founded::New));
    drop(store);
    // With everything accepted there is an end, too.
    let store = backend.open().await;
    let mut open = 1 + 16 + 1;
    while open < MAX_CONVERSATIONS {
        let new = founding([&[0xff; 8][..], &open.to_be_bytes()].concat().try_into().unwrap(), 1, [4]);
        let (sid, count) = (new.sid, store.found(new).await);
        assert_eq!(count, Ok(Founded::New), "{open}");
        store.answer(MemberAnswer { sid, ..says(4, true) }, announce()).await.unwrap();
        open += 1;
    }
    assert_eq!(store.found(founding([0xee; 16], 1, [4])).await, Err(FoundError::TooMany), "1 takes part in too many");
    assert_eq!(store.found(founding([0xee; 16], 3, [1])).await, Err(FoundError::TooMany));
    assert_eq!(store.found(founding([0xee; 16], 3, [4])).await, Ok(Founded::New));
}

pub(crate) async fn who_accepts_is_told_to_who_has_accepted(backend: &impl Backend) {
    let store = with_group(backend).await;
    assert_eq!(accept(&store, 2).await, [id(1)]);
    let mut told = store.answer(says(3, false), announce()).await.unwrap();
    told.sort_unstable();
    assert_eq!(told, [id(1), id(2)]);
    let mut told = accept(&store, 4).await;
    told.sort_unstable();
    assert_eq!(told, [id(1), id(2), id(4)]);
    drop(store);
    let store = backend.open().await;
    let of = |n, state| changed(n, state, Some(n as u8));
    let (two, three, four) = (of(2, MemberState::Accepted), of(3, MemberState::Declined), of(4, MemberState::Accepted));
    assert_eq!(notices(&store, 1).await, [two.clone(), three.clone(), four.clone()]);
    assert_eq!(notices(&store, 2).await, ["invited by 1".to_owned(), three, four]);
    assert_eq!(notices(&store, 3).await, ["invited by 1"], "who declined is told nothing");
    assert_eq!(notices(&store, 4).await, ["invited by 1".to_owned(), two], "who joins is told who is there");
    let accepted = MemberState::Accepted;
    assert_eq!(states(&store).await, [accepted, accepted, MemberState::Declined, accepted]);
}

pub(crate) async fn an_answer_counts_once(backend: &impl Backend) {
    let store = with_group(backend).await;
    accept(&store, 2).await;
    store.answer(says(3, false), announce()).await.unwrap();
    let before = (notices(&store, 1).await, store.conversation(&SID).await);
    assert_eq!(accept(&store, 2).await, Vec::<ClientId>::new());
    assert_eq!(store.answer(says(3, false), announce()).await, Ok(vec![]));
    assert_eq!(store.answer(says(2, false), announce()).await, Err(AnswerError::Forbidden));
    assert_eq!(store.answer(says(3, true), announce()).await, Err(AnswerError::Forbidden));
    assert_eq!(store.answer(says(1, false), announce()).await, Err(AnswerError::Forbidden), "the creator has accepted");
    for stranger in [says(9, true), MemberAnswer { sid: [1; 16], ..says(2, true) }] {
        assert_eq!(store.answer(stranger, announce()).await, Err(AnswerError::NotMember));
    }
    assert_eq!((notices(&store, 1).await, store.conversation(&SID).await), before);
    close(&store, 1).await.unwrap();
    assert_eq!(store.answer(says(4, true), announce()).await, Err(AnswerError::Closed));
}

pub(crate) async fn an_acceptance_under_another_signature_takes_the_place_of_the_former(backend: &impl Backend) {
    let store = with_group(backend).await;
    accept(&store, 2).await;
    accept(&store, 3).await;
    store.acknowledge(&id(3), u64::MAX).await.unwrap();
    for signature in [70, 71, 72] {
        let again = MemberAnswer { signature: [signature; 64], ..says(2, true) };
        let mut told = store.answer(again, announce()).await.unwrap();
        told.sort_unstable();
        // Himself, of the third: he may have forgotten him.
        assert_eq!(told, [id(1), id(2), id(3)]);
    }
    // The creator, too.
    assert_eq!(store.answer(says(1, true), announce()).await.unwrap().len(), 3);
    accept(&store, 4).await;
    let of = |n, signature| changed(n, MemberState::Accepted, Some(signature));
    assert_eq!(notices(&store, 1).await, [of(2, 72), of(3, 3), of(4, 4)], "the former is not worth telling");
    // What one may have been given comes behind it.
    let again = MemberAnswer { signature: [73; 64], ..says(2, true) };
    store.answer(again, announce()).await.unwrap();
    assert_eq!(notices(&store, 1).await, [of(3, 3), of(4, 4), of(2, 73)]);
    assert_eq!(notices(&store, 3).await, [of(2, 73), of(1, 1), of(4, 4)]);
    let mut told = notices(&store, 4).await;
    told.remove(0);
    told.sort();
    let mut expected = [of(1, 1), of(2, 73), of(3, 3)];
    expected.sort();
    assert_eq!(told, expected);
}

pub(crate) async fn unanswered_invitations_expire(backend: &impl Backend) {
    let store = with_group(backend).await;
    accept(&store, 2).await;
    let expire = async |before, limit| {
        let (count, mut told) = store.expire_invitations(before, limit, NOW + 99, announce()).await.unwrap();
        told.sort_unstable();
        (count, told)
    };
    assert_eq!(expire(NOW, 100).await, (0, vec![]));
    assert_eq!(expire(NOW + 1, 0).await, (0, vec![]));
    // Before anybody has looked, as well.
    let late = MemberAnswer { oldest: NOW + 1, ..says(3, true) };
    assert_eq!(store.answer(late, announce()).await, Err(AnswerError::Expired));
    assert_eq!(expire(NOW + 1, 1).await, (1, vec![id(1), id(2)]));
    assert_eq!(expire(NOW + 1, 5).await, (1, vec![id(1), id(2)]));
    assert_eq!(expire(NOW + 1, 5).await, (0, vec![]));
    for accepts in [true, false] {
        assert_eq!(store.answer(says(4, accepts), announce()).await, Err(AnswerError::Expired));
    }
    let accepted = MemberState::Accepted;
    assert_eq!(states(&store).await, [accepted, accepted, MemberState::Expired, MemberState::Expired]);
    let told = notices(&store, 1).await;
    let of = |n| changed(n, MemberState::Expired, None);
    assert_eq!(told, [changed(2, accepted, Some(2)), of(3), of(4)]);
}

pub(crate) async fn who_has_not_accepted_has_no_chains(backend: &impl Backend) {
    let store = with_group(backend).await;
    let register = async |n, sender, recipient| store.register_chain(&[n; 8], &id(sender), &SID, &id(recipient)).await;
    assert_eq!(register(1, 1, 2).await, Err(ChainError::NotMember));
    assert_eq!(register(1, 2, 1).await, Err(ChainError::NotMember));
    accept(&store, 2).await;
    store.answer(says(3, false), announce()).await.unwrap();
    store.enrol(enrolment(5, "stranger")).await.unwrap();
    assert_eq!(register(1, 1, 2).await, Ok(()));
    assert_eq!(register(2, 2, 1).await, Ok(()));
    for (sender, recipient) in [(1, 3), (3, 1), (1, 4), (4, 2), (5, 1), (1, 5)] {
        assert_eq!(register(3, sender, recipient).await, Err(ChainError::NotMember), "{sender} {recipient}");
    }
    accept(&store, 4).await;
    assert_eq!(register(1, 1, 4).await, Ok(()));
    let route = ChainRoute { sender: id(1), sid: SID, group: true, recipients: vec![id(2), id(4)] };
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route)));
    close(&store, 2).await.unwrap();
    assert_eq!((store.chain(&[1; 8]).await, store.chain(&[2; 8]).await), (Ok(None), Ok(None)));
    assert_eq!(register(4, 1, 2).await, Err(ChainError::Closed));
}

pub(crate) async fn what_two_have_between_themselves_is_theirs(backend: &impl Backend) {
    let store = with(backend, 4, QueueLimits::default()).await;
    // Somebody has found out what id two others will have, and founds something under it, with one of them.
    let sid = direct_sid(&id(1), &id(2), 0);
    assert_eq!(store.found(founding(sid, 3, [1, 4])).await, Ok(Founded::New));
    assert_eq!(store.register_chain(&[1; 8], &id(1), &sid, &id(2)).await, Ok(()));
    let route = ChainRoute { sender: id(1), sid, group: false, recipients: vec![id(2)] };
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route.clone())));
    let closing = store.close(&sid, &id(3), &[3; 64], NOW, refuse(), announce()).await.unwrap();
    assert_eq!(closing.chains, Vec::<ChainId>::new());
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route)));
    assert_eq!(store.register_chain(&[2; 8], &id(2), &sid, &id(1)).await, Ok(()));
}

pub(crate) async fn a_conversation_that_is_closed_leaves_a_tombstone(backend: &impl Backend) {
    let store = with_group(backend).await;
    accept(&store, 2).await;
    store.answer(says(3, false), announce()).await.unwrap();
    store.acknowledge(&id(2), u64::MAX).await.unwrap();
    let mut told = close(&store, 2).await.unwrap().told;
    told.sort_unstable();
    assert_eq!(told, [id(1), id(4)]);
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.conversation(&SID).await, Ok(Some(Conversation::Closed { at: NOW + 9, by: id(2) })));
    assert_eq!(notices(&store, 1).await, [closed(2)], "the rest of it is gone");
    assert_eq!(notices(&store, 4).await, [closed(2)]);
    assert_eq!(notices(&store, 2).await, Vec::<String>::new());
    assert_eq!(notices(&store, 3).await, Vec::<String>::new(), "who declined is not told");
}

pub(crate) async fn what_was_undelivered_in_a_closed_conversation_is_refused(backend: &impl Backend) {
    let store = with_group(backend).await;
    for n in 2..=4 {
        accept(&store, n).await;
    }
    for (chain, sender) in [(1, 1), (2, 2)] {
        for recipient in (1..=4).filter(|n| *n != sender) {
            store.register_chain(&[chain; 8], &id(sender), &SID, &id(recipient)).await.unwrap();
        }
    }
    store.register_chain(&[9; 8], &id(1), &[9; 16], &id(2)).await.unwrap();
    let kinds = [ItemKind::Wrap, ItemKind::Receipt];
    let mut items = vec![envelope(2, 1, 1, 0), envelope(3, 1, 1, 0), envelope(3, 2, 2, 5), envelope(4, 1, 1, 1)];
    items.extend(kinds.map(|kind| NewItem { kind, ..envelope(2, 1, 1, 0) }));
    items.push(NewItem { kind: ItemKind::Envelope, ..envelope(2, 1, 9, 0) });
    assert!(store.put(items).await.unwrap().iter().all(Result::is_ok));
    for n in 1..=4 {
        // What they were told before is delivered.
        let items = store.queue(&id(n), 0, ALL, ALL).await.unwrap();
        let seqs: Vec<_> = items.iter().filter(|item| item.kind == ItemKind::Notice).map(|item| item.seq).collect();
        store.remove(&id(n), &seqs).await.unwrap();
    }
    let mut closing = close(&store, 4).await.unwrap();
    closing.told.sort_unstable();
    assert_eq!(closing, Closing { chains: vec![[1; 8], [2; 8]], told: vec![id(1), id(2), id(3)] });
    drop(store);
    let store = backend.open().await;
    let held = async |n| -> Vec<_> {
        let items = store.queue(&id(n), 0, ALL, ALL).await.unwrap();
        items.iter().map(|item| (item.kind, item.sender[1], item.chain[0], item.n)).collect()
    };
    let mut refused = held(1).await;
    let (kind, by, ..) = refused.pop().unwrap();
    assert_eq!((kind, by), (ItemKind::Notice, 4));
    refused.sort_unstable_by_key(|(_, by, ..)| *by);
    let receipt = ItemKind::Receipt;
    assert_eq!(refused, [(receipt, 2, 1, 0), (receipt, 3, 1, 0), (receipt, 4, 1, 1)]);
    let bobs = held(2).await;
    assert_eq!(bobs[..2], [(receipt, 1, 1, 0), (ItemKind::Envelope, 1, 9, 0)], "other conversations go on");
    assert_eq!((bobs.len(), bobs[2], bobs[3].0), (4, (receipt, 3, 2, 5), ItemKind::Notice));
    assert_eq!(held(3).await.len(), 1);
    assert_eq!(held(4).await, vec![]);
    assert!(store.chain(&[9; 8]).await.unwrap().is_some());
}

pub(crate) async fn only_who_takes_part_closes(backend: &impl Backend) {
    let store = with_group(backend).await;
    store.answer(says(3, false), announce()).await.unwrap();
    store.expire_invitations(NOW, 9, NOW, announce()).await.unwrap();
    assert_eq!(close(&store, 9).await, Err(CloseError::NotMember));
    assert_eq!(store.close(&[1; 16], &id(1), &[1; 64], NOW, refuse(), announce()).await, Err(CloseError::NotMember));
    for n in [2, 3] {
        assert_eq!(close(&store, n).await, Err(CloseError::Forbidden));
    }
    accept(&store, 2).await;
    assert!(close(&store, 2).await.is_ok());
    for n in [1, 2, 9] {
        assert_eq!(close(&store, n).await, Err(CloseError::Closed));
    }
    // Where nobody but the creator may.
    let sid = [2; 16];
    store.found(Founding { creator_only: true, ..founding(sid, 1, [2]) }).await.unwrap();
    store.answer(MemberAnswer { sid, ..says(2, true) }, announce()).await.unwrap();
    let by = async |n| store.close(&sid, &id(n), &[1; 64], NOW, refuse(), announce()).await.map(|closing| closing.told);
    assert_eq!(by(2).await, Err(CloseError::Forbidden));
    assert_eq!(by(1).await, Ok(vec![id(2)]));
}

pub(crate) async fn a_revoked_member_is_told_to_the_others(backend: &impl Backend) {
    let store = with_group(backend).await;
    for n in 2..=3 {
        accept(&store, n).await;
    }
    for recipient in [1, 3] {
        store.register_chain(&[2; 8], &id(2), &SID, &id(recipient)).await.unwrap();
        store.register_chain(&[recipient as u8 + 10; 8], &id(recipient), &SID, &id(2)).await.unwrap();
    }
    store.register_chain(&[11; 8], &id(1), &SID, &id(3)).await.unwrap();
    store.put(vec![envelope(2, 1, 11, 0), envelope(3, 1, 11, 0)]).await.unwrap();
    let mut told = store.revoke(&id(2), NOW, refuse(), announce()).await.unwrap().unwrap();
    told.sort_unstable();
    assert_eq!(told, [id(1), id(3)]);
    assert!(notices(&store, 3).await.contains(&changed(2, MemberState::Revoked, None)));
    assert_eq!(notices(&store, 4).await, ["invited by 1"]);
    assert_eq!(states(&store).await[1], MemberState::Revoked);
    let route = ChainRoute { sender: id(1), sid: SID, group: true, recipients: vec![id(3)] };
    assert_eq!(store.chain(&[11; 8]).await, Ok(Some(route)), "it goes on");
    assert_eq!(store.chain(&[2; 8]).await, Ok(None));
    assert_eq!(store.register_chain(&[5; 8], &id(1), &SID, &id(2)).await, Err(ChainError::Unknown));
    // The creator, and who has not answered.
    assert_eq!(store.revoke(&id(4), NOW, refuse(), announce()).await.unwrap().unwrap().len(), 2);
    assert_eq!(store.revoke(&id(1), NOW, refuse(), announce()).await, Ok(Some(vec![id(3)])));
    assert_eq!(store.revoke(&id(1), NOW, refuse(), announce()).await, Ok(None));
    let revoked = MemberState::Revoked;
    assert_eq!(states(&store).await, [revoked, revoked, MemberState::Accepted, revoked]);
    assert_eq!(close(&store, 3).await.unwrap().told, Vec::<ClientId>::new());
}

pub(crate) async fn notices_are_never_refused_and_never_too_old(backend: &impl Backend) {
    let limits = QueueLimits { items: 1, bytes: 60, receipts: 1, notices: 1, ..QueueLimits::default() };
    let store = with(backend, 4, limits).await;
    store.put(vec![envelope(2, 1, 1, 0)]).await.unwrap();
    assert_eq!(store.found(founding(SID, 1, 2..=4)).await, Ok(Founded::New));
    for n in 2..=4 {
        accept(&store, n).await;
    }
    assert_eq!(notices(&store, 2).await.len(), 3);
    assert_eq!(store.put(vec![envelope(2, 1, 1, 1)]).await, Ok(vec![Err(PutError::QueueFull)]));
    for _ in 0..2 {
        let expired = store.expire(u64::MAX, ALL, Refuse::silently()).await.unwrap();
        assert!(expired.len() <= 1 && expired.iter().all(|(_, item)| item.kind != ItemKind::Notice), "{expired:?}");
    }
    assert_eq!(notices(&store, 2).await.len(), 3);
    assert_eq!(store.put(vec![envelope(2, 1, 1, 1)]).await.unwrap().len(), 1);
    drop(store);
    let store = backend.open_with(limits).await;
    assert_eq!(notices(&store, 2).await.len(), 3);
    assert_eq!(store.found(founding([2; 16], 1, [2])).await, Err(FoundError::TooMany));
    store.revoke(&id(2), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(store.waiting(&id(2)).await, Ok(Waiting::default()));
}

pub(crate) async fn at_most_one_closes(backend: &impl Backend) {
    let store = with_group(backend).await;
    for n in 2..=4 {
        accept(&store, n).await;
    }
    let (one, two, three) = tokio::join!(close(&store, 1), close(&store, 2), close(&store, 3));
    let closed: Vec<_> = [one, two, three].into_iter().filter(Result::is_ok).collect();
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].as_ref().unwrap().told.len(), 3);
}
