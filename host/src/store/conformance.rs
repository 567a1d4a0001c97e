//! What every backend must do, one case per promise of [`Store`]. A backend lists none of it: it implements [`Backend`]
//! and calls `conformance!`, which makes a test of each case.

use std::sync::Arc;

use super::*;

mod conversation;
mod public;
mod queue;

pub(crate) use conversation::*;
pub(crate) use public::*;
pub(crate) use queue::*;

/// How the cases get at a store.
pub(crate) trait Backend {
    /// Opens the store of this test, the same one each time. What was opened before has been dropped by then.
    async fn open_with(&self, limits: QueueLimits) -> SharedStore;

    /// [`Backend::open_with`], with the usual bounds.
    async fn open(&self) -> SharedStore {
        self.open_with(QueueLimits::default()).await
    }
}

/// Makes a test of each case; the argument makes a [`Backend`] with a store of its own.
macro_rules! conformance {
    ($backend:expr) => {
        $crate::store::conformance::conformance! { $backend;
            a_new_store_knows_itself_and_nobody
            enrolled_clients_are_found
            names_are_compared_in_normalised_form
            name_id_and_key_are_each_taken_once
            a_repeat_changes_and_uses_nothing
            a_repeat_is_the_same_key_id_and_name
            tokens_admit_what_they_say
            a_refusal_tells_nothing_to_who_may_not_enrol
            a_token_of_a_refused_enrolment_is_not_used
            a_batch_is_entered_as_a_whole_or_not_at_all
            batches_that_share_a_name_are_not_mixed
            a_token_of_one_use_admits_one_of_many_at_once
            one_name_goes_to_one_of_many_at_once
            tokens_are_kept_whole
            ended_tokens_admit_nobody
            open_tokens_are_paged_and_ended_one_by_one
            devices_are_listed_under_their_owner
            a_revoked_client_loses_all_but_its_id_and_key
            revoking_nobody_is_harmless
            the_epochs_of_bundles_only_go_up
            a_replaced_key_takes_channels_routes_and_bundle_with_it
            keys_follow_each_other_once_and_in_order
            accounts_are_kept_changed_and_paged
            an_account_reserves_its_name
            a_login_makes_a_client_or_gives_it_another_key
            a_login_is_checked_against_the_account_as_it_is
            a_login_takes_no_key_or_id_of_another
            a_revoked_client_has_no_account
            chains_belong_to_one_sender
            the_oldest_chains_go_first
            chains_know_all_their_recipients
            channels_are_at_most_two
            expired_channels_are_not_there
            clients_are_paged_by_name
            last_seen_only_goes_forward
            record_limits_change
            times_and_sizes_at_their_ends
            many_at_once_are_all_durable
            a_dropped_call_harms_nothing
            what_waits_is_kept_whole_and_in_order
            queues_are_read_in_pieces
            only_what_was_acknowledged_goes
            nothing_waits_twice
            of_wraps_the_latest_waits
            full_queues_refuse_and_take_again
            the_oldest_receipts_go
            each_item_is_decided_by_itself
            what_is_too_old_is_refused_to_its_sender
            the_queue_of_a_revoked_client_is_refused_to_its_senders
            a_replaced_key_leaves_the_queue
            numbers_are_never_given_twice
            many_senders_at_once_keep_their_order
            who_reads_while_others_write_misses_nothing
            any_order_of_operations_comes_to_what_a_list_comes_to
            it_is_known_how_a_store_is
            an_invitation_waits_for_everybody_who_is_invited
            who_lost_what_it_knew_is_invited_again
            an_id_has_one_conversation_for_ever
            only_who_is_known_is_invited
            nobody_is_invited_without_end
            who_accepts_is_told_to_who_has_accepted
            an_answer_counts_once
            an_acceptance_under_another_signature_takes_the_place_of_the_former
            unanswered_invitations_expire
            who_has_not_accepted_has_no_chains
            what_two_have_between_themselves_is_theirs
            a_conversation_that_is_closed_leaves_a_tombstone
            what_was_undelivered_in_a_closed_conversation_is_refused
            only_who_takes_part_closes
            a_revoked_member_is_told_to_the_others
            notices_are_never_refused_and_never_too_old
            at_most_one_closes
            what_is_said_is_kept_whole_and_in_order
            nothing_is_said_twice_or_out_of_order
            the_oldest_posts_go
            nobody_pushes_out_what_others_have_said
            posts_go_with_the_key_that_signed_them
        }
    };
    ($backend:expr; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::store::conformance::$case(&$backend).await;
            }
        )*
    };
}
pub(crate) use conformance;

const NOW: u64 = 1_800_000_000;

fn id(n: u16) -> ClientId {
    let [high, low] = n.to_be_bytes();
    let mut id = [0x42; 16];
    (id[0], id[1]) = (high, low);
    id
}

fn modulus(n: u16) -> Vec<u8> {
    let mut modulus = vec![0xa5; 256];
    modulus[100..102].copy_from_slice(&n.to_be_bytes());
    modulus
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// Number `n` under the name `text`, with its own id and key.
fn enrolment(n: u16, text: &str) -> Enrolment {
    Enrolment {
        id: id(n),
        name: name(text),
        modulus: modulus(n),
        token_id: None,
        enrolled_by: None,
        record_limit: 16_384,
        now: NOW,
    }
}

fn with_token(n: u16, text: &str, token: u8) -> Enrolment {
    Enrolment { token_id: Some([token; 8]), ..enrolment(n, text) }
}

fn token(n: u8, uses: Option<u32>) -> Token {
    Token {
        id: [n; 8],
        verifier: [n; 32],
        name_pattern: None,
        preset_id: None,
        expires: NOW + 60,
        uses,
        printed: false,
    }
}

fn channel(n: u8) -> ChannelRecord {
    ChannelRecord { id: [n; 16], sealed: vec![n; 100], expires: NOW + 60 }
}

async fn uses(store: &SharedStore, n: u8) -> Option<u32> {
    store.token(&[n; 8]).await.unwrap().unwrap().uses
}

/// What a notice says, in letters.
fn announce() -> Announce {
    Announce::new(|notice| Some(format!("{notice:?}").into_bytes().into()))
}

/// A store with clients 1 "alice" and 2 "bob".
async fn with_two(backend: &impl Backend) -> SharedStore {
    let store = backend.open().await;
    for (n, text) in [(1, "alice"), (2, "bob")] {
        assert_eq!(store.enrol(enrolment(n, text)).await, Ok(Enrolled::New));
    }
    store
}

pub(crate) async fn a_new_store_knows_itself_and_nobody(backend: &impl Backend) {
    let store = backend.open().await;
    let meta = store.meta();
    assert_ne!(meta.server_id, [0; 16]);
    assert_ne!(meta.store_epoch, [0; 8]);
    assert_eq!(store.client(&id(1)).await, Ok(None));
    assert_eq!(store.client_by_name(&name("alice")).await, Ok(None));
    assert_eq!(store.clients(None, 10).await, Ok(vec![]));
    assert_eq!(store.bundle(&id(1)).await, Ok(None));
    assert_eq!(store.chain(&[1; 8]).await, Ok(None));
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(None));
    assert!(store.token(&[1; 8]).await.unwrap().is_none());
    drop(store);
    assert_eq!(backend.open().await.meta(), meta, "nothing of it changes when the server starts again");
}

pub(crate) async fn enrolled_clients_are_found(backend: &impl Backend) {
    let store = backend.open().await;
    let record = ClientRecord {
        id: id(1),
        name: "Alice".into(),
        modulus: modulus(1),
        key_epoch: 0,
        enrolled_by: None,
        revoked: false,
        enrolled_at: NOW,
        last_seen: None,
        record_limit: 16_384,
    };
    assert_eq!(store.enrol(enrolment(1, "Alice")).await, Ok(Enrolled::New));
    assert_eq!(store.client(&id(1)).await, Ok(Some(record.clone())), "at once");
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.client(&id(1)).await, Ok(Some(record.clone())), "and after a new start");
    assert_eq!(store.client_by_name(&name("Alice")).await, Ok(Some(record)));
    assert_eq!(store.client(&id(2)).await, Ok(None));
    assert_eq!(store.client_by_name(&name("bob")).await, Ok(None));
}

pub(crate) async fn names_are_compared_in_normalised_form(backend: &impl Backend) {
    let store = backend.open().await;
    assert_eq!(store.enrol(enrolment(1, "Zoë")).await, Ok(Enrolled::New));
    for text in ["zoë", "ZOË", "zoe\u{308}", "ｚｏë"] {
        assert_eq!(store.client_by_name(&name(text)).await.unwrap().unwrap().name, "Zoë");
        assert_eq!(store.enrol(enrolment(2, text)).await, Err(EnrolError::NameInUse));
    }
    assert_eq!(store.client_by_name(&name("zoe")).await, Ok(None));
}

pub(crate) async fn name_id_and_key_are_each_taken_once(backend: &impl Backend) {
    let store = with_two(backend).await;
    let fresh = || enrolment(3, "carol");
    let cases = [
        (Enrolment { name: name("ALICE"), ..fresh() }, EnrolError::NameInUse),
        (Enrolment { id: id(1), ..fresh() }, EnrolError::IdInUse),
        (Enrolment { modulus: modulus(1), ..fresh() }, EnrolError::KeyInUse),
        (Enrolment { id: id(1), modulus: modulus(1), ..fresh() }, EnrolError::KeyInUse),
        (Enrolment { id: id(1), modulus: modulus(2), ..fresh() }, EnrolError::IdInUse),
        (Enrolment { id: id(1), name: name("bob"), ..fresh() }, EnrolError::NameInUse),
    ];
    for (enrolment, refusal) in cases {
        assert_eq!(store.enrol(enrolment).await, Err(refusal));
    }
    assert_eq!(store.clients(None, 10).await.unwrap().len(), 2);
    assert_eq!(store.enrol(fresh()).await, Ok(Enrolled::New));
}

pub(crate) async fn a_repeat_changes_and_uses_nothing(backend: &impl Backend) {
    let store = backend.open().await;
    store.add_token(token(1, Some(2))).await.unwrap();
    assert_eq!(store.enrol(with_token(1, "alice", 1)).await, Ok(Enrolled::New));
    assert_eq!(uses(&store, 1).await, Some(1));
    let before = store.client(&id(1)).await;
    let repeat = Enrolment { name: name("Alice"), now: NOW + 5, record_limit: 9, ..with_token(1, "alice", 1) };
    assert_eq!(store.enrol(repeat).await, Ok(Enrolled::Repeat));
    assert_eq!(uses(&store, 1).await, Some(1));
    assert_eq!(store.client(&id(1)).await, before);
    // Also when the token has no use left, has expired, or was never there.
    assert_eq!(store.enrol(with_token(2, "bob", 1)).await, Ok(Enrolled::New));
    assert_eq!(uses(&store, 1).await, Some(0));
    for repeat in
        [with_token(2, "bob", 1), Enrolment { now: NOW + 600, ..with_token(1, "alice", 1) }, with_token(1, "alice", 9)]
    {
        assert_eq!(store.enrol(repeat).await, Ok(Enrolled::Repeat));
    }
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.enrol(with_token(2, "bob", 1)).await, Ok(Enrolled::Repeat));
    assert_eq!(uses(&store, 1).await, Some(0));
}

pub(crate) async fn a_repeat_is_the_same_key_id_and_name(backend: &impl Backend) {
    let store = with_two(backend).await;
    let moved = Enrolment { id: id(3), ..enrolment(1, "carol") };
    assert_eq!(store.enrol(moved).await, Err(EnrolError::KeyInUse));
    assert_eq!(store.enrol(enrolment(1, "carol")).await, Err(EnrolError::KeyInUse), "a key has one name");
    let other_key = Enrolment { modulus: modulus(3), ..enrolment(1, "alice") };
    assert_eq!(store.enrol(other_key).await, Err(EnrolError::NameInUse));
}

pub(crate) async fn tokens_admit_what_they_say(backend: &impl Backend) {
    let store = backend.open().await;
    store.add_token(token(1, None)).await.unwrap();
    store.add_token(token(2, Some(0))).await.unwrap();
    store.add_token(Token { expires: NOW, ..token(3, None) }).await.unwrap();
    let pattern = Some(Pattern::parse("Sensor-0[1-3]").unwrap());
    store.add_token(Token { name_pattern: pattern, ..token(4, None) }).await.unwrap();
    store.add_token(Token { preset_id: Some(id(77)), ..token(5, None) }).await.unwrap();
    let refusals = [
        (with_token(1, "alice", 9), TokenRefusal::Unknown),
        (with_token(1, "alice", 2), TokenRefusal::UsedUp),
        (with_token(1, "alice", 3), TokenRefusal::Expired),
        (with_token(1, "alice", 4), TokenRefusal::Name),
        (with_token(1, "sensor-04", 4), TokenRefusal::Name),
        (with_token(1, "alice", 5), TokenRefusal::Id),
    ];
    for (enrolment, refusal) in refusals {
        assert_eq!(store.enrol(enrolment).await, Err(EnrolError::Token(refusal)));
    }
    assert_eq!(store.clients(None, 10).await, Ok(vec![]));
    for n in 1..=5 {
        assert_eq!(store.enrol(with_token(n, &format!("alice-{n}"), 1)).await, Ok(Enrolled::New));
    }
    assert_eq!(uses(&store, 1).await, None, "without end");
    assert_eq!(store.enrol(with_token(6, "SENSOR-02", 4)).await, Ok(Enrolled::New));
    assert_eq!(store.enrol(with_token(77, "bob", 5)).await, Ok(Enrolled::New));
}

pub(crate) async fn a_refusal_tells_nothing_to_who_may_not_enrol(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.add_token(token(1, Some(0))).await.unwrap();
    for enrolment in [
        with_token(3, "alice", 1),
        Enrolment { id: id(1), ..with_token(3, "carol", 1) },
        Enrolment { modulus: modulus(1), ..with_token(3, "carol", 1) },
    ] {
        assert_eq!(store.enrol(enrolment).await, Err(EnrolError::Token(TokenRefusal::UsedUp)));
    }
    let by_nobody = Enrolment { enrolled_by: Some(id(99)), ..enrolment(3, "alice") };
    assert_eq!(store.enrol(by_nobody).await, Err(EnrolError::Enroller));
}

pub(crate) async fn a_token_of_a_refused_enrolment_is_not_used(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.add_token(token(1, Some(1))).await.unwrap();
    for refused in [
        with_token(3, "alice", 1),
        Enrolment { id: id(1), ..with_token(3, "carol", 1) },
        Enrolment { modulus: modulus(1), ..with_token(3, "carol", 1) },
        Enrolment { now: NOW + 60, ..with_token(3, "carol", 1) },
    ] {
        store.enrol(refused).await.unwrap_err();
        assert_eq!(uses(&store, 1).await, Some(1));
    }
    assert_eq!(store.enrol(with_token(3, "carol", 1)).await, Ok(Enrolled::New));
    assert_eq!(uses(&store, 1).await, Some(0));
}

pub(crate) async fn a_batch_is_entered_as_a_whole_or_not_at_all(backend: &impl Backend) {
    let store = with_two(backend).await;
    let by_alice = |n, text| Enrolment { enrolled_by: Some(id(1)), ..enrolment(n, text) };
    let batch = || vec![by_alice(10, "s-1"), by_alice(11, "s-2"), by_alice(12, "s-3")];
    let spoiled = [
        (0, Enrolment { name: name("BOB"), ..by_alice(10, "s-1") }, EnrolError::NameInUse),
        (1, Enrolment { name: name("S-1"), ..by_alice(11, "s-2") }, EnrolError::NameInUse),
        (2, Enrolment { id: id(10), ..by_alice(12, "s-3") }, EnrolError::IdInUse),
        (2, Enrolment { modulus: modulus(11), ..by_alice(12, "s-3") }, EnrolError::KeyInUse),
        (2, Enrolment { modulus: modulus(2), ..by_alice(12, "s-3") }, EnrolError::KeyInUse),
        (1, Enrolment { enrolled_by: Some(id(99)), ..by_alice(11, "s-2") }, EnrolError::Enroller),
        (2, with_token(12, "s-3", 9), EnrolError::Token(TokenRefusal::Unknown)),
    ];
    for (index, entry, error) in spoiled {
        let mut batch = batch();
        batch[index] = entry;
        assert_eq!(store.enrol_all(batch).await, Err(RefusedEntry { index, error }));
        assert_eq!(store.clients(None, 10).await.unwrap().len(), 2);
    }
    assert_eq!(store.enrol_all(batch()).await, Ok(vec![Enrolled::New; 3]));
    assert_eq!(store.enrol_all(batch()).await, Ok(vec![Enrolled::Repeat; 3]), "its answer was lost");
    assert_eq!(store.enrol_all(vec![]).await, Ok(vec![]));
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.clients(None, 10).await.unwrap().len(), 5);
    assert_eq!(store.client_by_name(&name("s-2")).await.unwrap().unwrap().enrolled_by, Some(id(1)));
    // Whoever was revoked meanwhile enrols nobody.
    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    let late = store.enrol_all(vec![by_alice(20, "t-1"), by_alice(21, "t-2")]).await;
    assert_eq!(late, Err(RefusedEntry { index: 0, error: EnrolError::Enroller }));
}

pub(crate) async fn batches_that_share_a_name_are_not_mixed(backend: &impl Backend) {
    let store = backend.open().await;
    let tasks: Vec<_> = (0..20)
        .map(|n| {
            let store = Arc::clone(&store);
            let batch = vec![
                enrolment(100 + n, &format!("own-{n}-a")),
                enrolment(200 + n, "shared"),
                enrolment(300 + n, &format!("own-{n}-b")),
            ];
            tokio::spawn(async move { store.enrol_all(batch).await })
        })
        .collect();
    let mut entered = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(all) => {
                assert_eq!(all, [Enrolled::New; 3]);
                entered += 1;
            }
            other => assert_eq!(other, Err(RefusedEntry { index: 1, error: EnrolError::NameInUse })),
        }
    }
    assert_eq!(entered, 1);
    assert_eq!(store.clients(None, 100).await.unwrap().len(), 3);
}

pub(crate) async fn a_token_of_one_use_admits_one_of_many_at_once(backend: &impl Backend) {
    let store = backend.open().await;
    store.add_token(token(1, Some(1))).await.unwrap();
    let tasks: Vec<_> = (1..=50)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.enrol(with_token(n, &format!("client-{n}"), 1)).await })
        })
        .collect();
    let mut entered = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(Enrolled::New) => entered += 1,
            other => assert_eq!(other, Err(EnrolError::Token(TokenRefusal::UsedUp))),
        }
    }
    assert_eq!(entered, 1);
    assert_eq!(store.clients(None, 100).await.unwrap().len(), 1);
}

pub(crate) async fn one_name_goes_to_one_of_many_at_once(backend: &impl Backend) {
    let store = backend.open().await;
    let tasks: Vec<_> = (1..=50)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.enrol(enrolment(n, "alice")).await })
        })
        .collect();
    let mut entered = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(Enrolled::New) => entered += 1,
            other => assert_eq!(other, Err(EnrolError::NameInUse)),
        }
    }
    assert_eq!(entered, 1);
}

pub(crate) async fn tokens_are_kept_whole(backend: &impl Backend) {
    let store = backend.open().await;
    let whole = Token {
        name_pattern: Some(Pattern::parse("Sensor-[0-9]*").unwrap()),
        preset_id: Some(id(7)),
        printed: true,
        ..token(1, Some(3))
    };
    store.add_token(whole).await.unwrap();
    assert_eq!(store.add_token(token(1, None)).await, Err(TokenError::IdInUse));
    drop(store);
    let found = backend.open().await.token(&[1; 8]).await.unwrap().unwrap();
    assert_eq!((found.id, found.verifier, found.expires), ([1; 8], [1; 32], NOW + 60));
    assert_eq!(found.name_pattern.as_ref().map(Pattern::as_str), Some("Sensor-[0-9]*"));
    assert_eq!((found.preset_id, found.uses, found.printed), (Some(id(7)), Some(3), true));
    assert!(!format!("{found:?}").contains("verifier"), "what verifies is not for logs");
}

pub(crate) async fn ended_tokens_admit_nobody(backend: &impl Backend) {
    let store = backend.open().await;
    for n in 1..=2 {
        store.add_token(Token { printed: true, ..token(n, None) }).await.unwrap();
    }
    store.add_token(token(3, None)).await.unwrap();
    store.add_token(Token { printed: true, ..token(4, Some(0)) }).await.unwrap();
    assert_eq!(store.end_tokens(Tokens::Printed, NOW).await, Ok(2));
    assert_eq!(store.end_tokens(Tokens::Printed, NOW).await, Ok(0));
    assert_eq!(store.enrol(with_token(1, "alice", 1)).await, Err(EnrolError::Token(TokenRefusal::Expired)));
    assert!(store.token(&[1; 8]).await.unwrap().is_some(), "a repeat is still verified against it");
    assert_eq!(store.enrol(with_token(1, "alice", 3)).await, Ok(Enrolled::New));
    assert_eq!(store.end_tokens(Tokens::All, NOW).await, Ok(1));
    assert_eq!(store.enrol(with_token(2, "bob", 3)).await, Err(EnrolError::Token(TokenRefusal::Expired)));
    store.end_tokens(Tokens::All, NOW + 40 * 24 * 60 * 60).await.unwrap();
    assert!(store.token(&[1; 8]).await.unwrap().is_none(), "but not for ever");
}

pub(crate) async fn open_tokens_are_paged_and_ended_one_by_one(backend: &impl Backend) {
    let store = backend.open().await;
    for n in (1..=7).rev() {
        store.add_token(Token { printed: n == 2, ..token(n, Some(u32::from(n) - 1)) }).await.unwrap();
    }
    store.add_token(Token { expires: NOW, ..token(8, None) }).await.unwrap();
    let open = async |now| {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = store.tokens(after.as_ref(), 2, now).await.unwrap();
            let Some(last) = page.last() else { return found };
            after = Some(last.id);
            found.extend(page.into_iter().map(|token| token.id[0]));
        }
    };
    assert_eq!(open(NOW).await, [2, 3, 4, 5, 6, 7], "1 is used up, 8 has ended");
    assert_eq!(open(NOW + 60).await, [0; 0]);
    assert_eq!(store.end_tokens(Tokens::One([3; 8]), NOW).await, Ok(1));
    for gone in [3, 1, 8, 99] {
        assert_eq!(store.end_tokens(Tokens::One([gone; 8]), NOW).await, Ok(0));
    }
    assert_eq!(open(NOW).await, [2, 4, 5, 6, 7]);
    assert_eq!(store.end_tokens(Tokens::Printed, NOW).await, Ok(1));
    assert_eq!(open(NOW).await, [4, 5, 6, 7]);
    assert_eq!(store.tokens(Some(&[5; 8]), usize::MAX, NOW).await.unwrap().len(), 2);
    assert_eq!(store.tokens(None, 0, NOW).await.unwrap().len(), 0);
}

pub(crate) async fn devices_are_listed_under_their_owner(backend: &impl Backend) {
    let store = with_two(backend).await;
    let device = Enrolment { enrolled_by: Some(id(1)), ..enrolment(3, "sensor") };
    assert_eq!(store.enrol(device).await, Ok(Enrolled::New));
    assert_eq!(store.client(&id(3)).await.unwrap().unwrap().enrolled_by, Some(id(1)));
    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    let device = Enrolment { enrolled_by: Some(id(1)), ..enrolment(4, "sensor-2") };
    assert_eq!(store.enrol(device).await, Err(EnrolError::Enroller));
    assert!(!store.client(&id(3)).await.unwrap().unwrap().revoked, "a device stays when its owner goes");
}

pub(crate) async fn a_revoked_client_loses_all_but_its_id_and_key(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.publish_bundle(&id(1), 1, b"bundle", b"signature").await.unwrap();
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    store.put_channel(&id(2), channel(2), None).await.unwrap();
    store.register_chain(&[1; 8], &id(1), &[9; 16], &id(2)).await.unwrap();
    store.register_chain(&[2; 8], &id(2), &[9; 16], &id(1)).await.unwrap();
    store.register_chain(&[3; 8], &id(2), &[8; 16], &id(2)).await.unwrap();
    assert_eq!(store.revoke(&id(1), NOW, Refuse::silently(), announce()).await, Ok(Some(vec![])));
    drop(store);

    let store = backend.open().await;
    assert!(store.client(&id(1)).await.unwrap().unwrap().revoked);
    assert_eq!(store.client_by_name(&name("alice")).await, Ok(None));
    assert_eq!(store.clients(None, 10).await.unwrap().len(), 1);
    assert_eq!(store.bundle(&id(1)).await, Ok(None));
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(None));
    assert_eq!((store.chain(&[1; 8]).await, store.chain(&[2; 8]).await), (Ok(None), Ok(None)));
    assert!(store.channel(&[2; 16], NOW).await.unwrap().is_some());
    assert!(store.chain(&[3; 8]).await.unwrap().is_some());

    let refused = store.publish_bundle(&id(1), 2, b"bundle", b"signature").await;
    assert_eq!(refused, Err(PublishError::Unknown));
    assert_eq!(store.put_channel(&id(1), channel(3), None).await, Err(ChannelError::Unknown));
    assert_eq!(store.register_chain(&[4; 8], &id(1), &[9; 16], &id(2)).await, Err(ChainError::Unknown));
    assert_eq!(store.register_chain(&[4; 8], &id(2), &[9; 16], &id(1)).await, Err(ChainError::Unknown));

    assert_eq!(store.enrol(enrolment(1, "alice")).await, Err(EnrolError::KeyInUse), "no way back");
    let old_id = Enrolment { id: id(1), ..enrolment(3, "alice") };
    assert_eq!(store.enrol(old_id).await, Err(EnrolError::IdInUse));
    let old_key = Enrolment { modulus: modulus(1), ..enrolment(3, "alice") };
    assert_eq!(store.enrol(old_key).await, Err(EnrolError::KeyInUse));
    assert_eq!(store.enrol(enrolment(3, "alice")).await, Ok(Enrolled::New), "the name is free");
    assert_eq!(store.client_by_name(&name("alice")).await.unwrap().unwrap().id, id(3));
}

pub(crate) async fn revoking_nobody_is_harmless(backend: &impl Backend) {
    let store = with_two(backend).await;
    assert_eq!(store.revoke(&id(3), NOW, Refuse::silently(), announce()).await, Ok(None));
    assert_eq!(store.revoke(&id(1), NOW, Refuse::silently(), announce()).await, Ok(Some(vec![])));
    assert_eq!(store.revoke(&id(1), NOW, Refuse::silently(), announce()).await, Ok(None));
    assert_eq!(store.clients(None, 10).await.unwrap().len(), 1);
}

pub(crate) async fn the_epochs_of_bundles_only_go_up(backend: &impl Backend) {
    let store = with_two(backend).await;
    let publish = async |epoch, bundle: &[u8]| store.publish_bundle(&id(1), epoch, bundle, b"signature").await;
    assert_eq!(publish(7, b"seven").await, Ok(()), "the first may have any epoch");
    assert_eq!(publish(7, b"seven").await, Ok(()));
    assert_eq!(publish(7, b"other").await, Err(PublishError::Epoch { stored: 7 }));
    for epoch in [0, 6] {
        assert_eq!(publish(epoch, b"seven").await, Err(PublishError::Epoch { stored: 7 }));
    }
    assert_eq!(publish(8, b"eight").await, Ok(()));
    let again = store.publish_bundle(&id(1), 8, b"eight", b"signed anew").await;
    assert_eq!(again, Ok(()), "a signature is different each time");
    let expected = BundleRecord { epoch: 8, bundle: b"eight".into(), signature: b"signature".into() };
    assert_eq!(store.bundle(&id(1)).await, Ok(Some(expected.clone())));
    assert_eq!(store.bundle(&id(2)).await, Ok(None));
    assert_eq!(store.publish_bundle(&id(3), 1, b"", b"").await, Err(PublishError::Unknown));
    assert_eq!(store.publish_bundle(&id(2), u32::MAX, b"last", b"").await, Ok(()));
    let refused = store.publish_bundle(&id(2), 0, b"next", b"").await;
    assert_eq!(refused, Err(PublishError::Epoch { stored: u32::MAX }));
    drop(store);
    assert_eq!(backend.open().await.bundle(&id(1)).await, Ok(Some(expected)));
}

fn new_key(n: u16, key_epoch: u32, key: u16) -> NewKey {
    let bundle = BundleRecord { epoch: key_epoch.saturating_add(10), bundle: vec![9; 184], signature: vec![8; 256] };
    NewKey { id: id(n), key_epoch, modulus: modulus(key), signature: vec![7; 256], bundle }
}

pub(crate) async fn a_replaced_key_takes_channels_routes_and_bundle_with_it(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.publish_bundle(&id(1), 3, &[1; 184], &[2; 256]).await.unwrap();
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    store.put_channel(&id(2), channel(2), None).await.unwrap();
    store.register_chain(&[1; 8], &id(1), &[1; 16], &id(2)).await.unwrap();
    store.register_chain(&[2; 8], &id(2), &[1; 16], &id(1)).await.unwrap();
    assert_eq!(store.successor(&id(1), 0).await, Ok(None));

    assert_eq!(store.rotate(new_key(1, 1, 100)).await, Ok(()));
    drop(store);
    let store = backend.open().await;
    let client = store.client(&id(1)).await.unwrap().unwrap();
    assert_eq!((client.key_epoch, client.modulus, client.name), (1, modulus(100), "alice".to_owned()));
    assert_eq!(store.bundle(&id(1)).await, Ok(Some(new_key(1, 1, 100).bundle)));
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(None));
    assert!(store.channel(&[2; 16], NOW).await.unwrap().is_some(), "another's");
    assert_eq!((store.chain(&[1; 8]).await, store.chain(&[2; 8]).await), (Ok(None), Ok(None)));
    let step = Successor { modulus: modulus(100), signature: vec![7; 256] };
    assert_eq!(store.successor(&id(1), 0).await, Ok(Some(step)));
    for (n, key_epoch) in [(1, 1), (2, 0), (3, 0), (1, u32::MAX)] {
        assert_eq!(store.successor(&id(n), key_epoch).await, Ok(None), "{n} {key_epoch}");
    }
}

pub(crate) async fn keys_follow_each_other_once_and_in_order(backend: &impl Backend) {
    let store = with_two(backend).await;
    let present = |present| Err(RotateError::KeyEpoch { present });
    assert_eq!(store.rotate(new_key(3, 1, 100)).await, Err(RotateError::Unknown));
    for key_epoch in [0, 2, u32::MAX] {
        assert_eq!(store.rotate(new_key(1, key_epoch, 100)).await, present(0));
    }
    for used in [1, 2] {
        assert_eq!(store.rotate(new_key(1, 1, used)).await, Err(RotateError::KeyInUse));
    }
    store.publish_bundle(&id(1), 11, &[1; 184], &[2; 256]).await.unwrap();
    assert_eq!(store.rotate(new_key(1, 1, 100)).await, Err(RotateError::BundleEpoch { stored: 11 }));
    assert_eq!(store.client(&id(1)).await.unwrap().unwrap().modulus, modulus(1), "a refusal leaves nothing");

    let first = NewKey { bundle: BundleRecord { epoch: 12, ..new_key(1, 1, 100).bundle }, ..new_key(1, 1, 100) };
    assert_eq!(store.rotate(first.clone()).await, Ok(()));
    // The answer was lost: the same again is done, and nothing else of that epoch is.
    assert_eq!(store.rotate(first).await, Ok(()));
    assert_eq!(store.rotate(new_key(1, 1, 101)).await, present(1));
    let second = NewKey { bundle: BundleRecord { epoch: 13, ..new_key(1, 2, 102).bundle }, ..new_key(1, 2, 102) };
    // Never back, neither for itself nor for others, nor for who comes new.
    for (n, key_epoch) in [(1, 2), (2, 1)] {
        for used in [1, 100] {
            assert_eq!(store.rotate(new_key(n, key_epoch, used)).await, Err(RotateError::KeyInUse));
        }
    }
    assert_eq!(store.rotate(second).await, Ok(()));
    let newcomer = Enrolment { modulus: modulus(1), ..enrolment(3, "carol") };
    assert_eq!(store.enrol(newcomer).await, Err(EnrolError::KeyInUse));
    assert_eq!(store.enrol(enrolment(1, "alice")).await, Err(EnrolError::NameInUse));

    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(store.rotate(new_key(1, 3, 103)).await, Err(RotateError::Unknown));
}

fn verifier(n: u16) -> Verifier {
    Verifier(format!("$argon2id${n}"))
}

/// Key `key` enters the account of this name; 900 is the id of a client that it has not yet.
fn login(text: &str, password: u16, key: u16) -> LoginEntry {
    LoginEntry {
        name: name(text),
        verifier: verifier(password),
        id: id(900),
        modulus: modulus(key),
        record_limit: 2048,
        now: NOW + 1,
    }
}

pub(crate) async fn accounts_are_kept_changed_and_paged(backend: &impl Backend) {
    let store = with_two(backend).await;
    for text in ["Delta", "alice", "charlie"] {
        assert_eq!(store.add_account(name(text), verifier(1), NOW).await, Ok(()));
    }
    assert_eq!(store.add_account(name("ALICE"), verifier(2), NOW).await, Err(AccountError::Exists));
    assert_eq!(store.account(&name("bob")).await, Ok(None), "a client without one");
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    store.put_channel(&id(2), channel(2), None).await.unwrap();

    let change = async |text, change| store.change_account(&name(text), change, NOW + 9).await;
    assert_eq!(change("Alice", AccountChange::Locked(true)).await, Ok(true));
    assert!(store.channel(&[1; 16], NOW).await.unwrap().is_some(), "its key goes on");
    assert_eq!(change("alice", AccountChange::Password(verifier(3))).await, Ok(true));
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(None), "another password ends channels");
    assert!(store.channel(&[2; 16], NOW).await.unwrap().is_some(), "another's");
    assert_eq!(change("charlie", AccountChange::Removed).await, Ok(true));
    for nobody in ["charlie", "bob", "nobody"] {
        for what in [AccountChange::Removed, AccountChange::Locked(false), AccountChange::Password(verifier(4))] {
            assert_eq!(change(nobody, what).await, Ok(false), "{nobody}");
        }
    }
    drop(store);
    let store = backend.open().await;
    let alice = Account { name: "alice".into(), verifier: verifier(3), locked: true, changed_at: NOW + 9 };
    assert_eq!(store.account(&name("ALICE")).await, Ok(Some(alice.clone())));
    assert!(!format!("{alice:?}").contains("argon2id"), "what verifies is not for logs");
    let delta = Account { name: "Delta".into(), verifier: verifier(1), locked: false, changed_at: NOW };
    assert_eq!(store.accounts(None, 10).await, Ok(vec![alice.clone(), delta.clone()]));
    assert_eq!(store.accounts(None, 1).await, Ok(vec![alice]));
    assert_eq!(store.accounts(Some(&name("Alice")), 10).await, Ok(vec![delta]));
    assert_eq!(store.accounts(None, 0).await, Ok(vec![]));
    assert_eq!(store.change_account(&name("alice"), AccountChange::Locked(false), NOW).await, Ok(true));
    assert!(!store.account(&name("alice")).await.unwrap().unwrap().locked);
}

pub(crate) async fn an_account_reserves_its_name(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.add_account(name("carol"), verifier(1), NOW).await.unwrap();
    assert_eq!(store.enrol(enrolment(3, "CAROL")).await, Err(EnrolError::NameInUse));
    let batch = store.enrol_all(vec![enrolment(4, "dave"), enrolment(3, "carol")]).await;
    assert_eq!(batch, Err(RefusedEntry { index: 1, error: EnrolError::NameInUse }));
    // Whoever has the name already keeps it.
    store.add_account(name("alice"), verifier(1), NOW).await.unwrap();
    assert_eq!(store.enrol(enrolment(1, "alice")).await, Ok(Enrolled::Repeat));
    store.change_account(&name("carol"), AccountChange::Removed, NOW).await.unwrap();
    assert_eq!(store.enrol(enrolment(3, "carol")).await, Ok(Enrolled::New));
}

pub(crate) async fn a_login_makes_a_client_or_gives_it_another_key(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.add_account(name("Carol"), verifier(1), NOW).await.unwrap();
    for expected in [LoggedIn::New(id(900)), LoggedIn::Repeat(id(900))] {
        assert_eq!(store.log_in(login("carol", 1, 50)).await, Ok(expected));
    }
    let made = store.client_by_name(&name("carol")).await.unwrap().unwrap();
    assert_eq!((made.name.as_str(), made.key_epoch, made.record_limit), ("Carol", 0, 2048), "as the operator wrote it");
    assert_eq!((made.id, made.enrolled_by, made.enrolled_at), (id(900), None, NOW + 1));

    // A client that is enrolled keeps its id, and loses what its key stood for.
    store.publish_bundle(&id(1), 3, &[1; 184], &[2; 256]).await.unwrap();
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    store.put_channel(&id(2), channel(2), None).await.unwrap();
    store.register_chain(&[1; 8], &id(1), &[1; 16], &id(2)).await.unwrap();
    store.register_chain(&[2; 8], &id(2), &[1; 16], &id(1)).await.unwrap();
    store.add_account(name("alice"), verifier(2), NOW).await.unwrap();
    for expected in [LoggedIn::Changed(id(1)), LoggedIn::Repeat(id(1))] {
        assert_eq!(store.log_in(login("ALICE", 2, 51)).await, Ok(expected));
    }
    drop(store);
    let store = backend.open().await;
    let alice = store.client(&id(1)).await.unwrap().unwrap();
    assert_eq!((alice.key_epoch, alice.modulus, alice.name.as_str()), (1, modulus(51), "alice"));
    assert_eq!((store.bundle(&id(1)).await, store.channel(&[1; 16], NOW).await), (Ok(None), Ok(None)));
    assert!(store.channel(&[2; 16], NOW).await.unwrap().is_some(), "another's");
    assert_eq!((store.chain(&[1; 8]).await, store.chain(&[2; 8]).await), (Ok(None), Ok(None)));
    assert_eq!(store.successor(&id(1), 0).await, Ok(None), "nobody signed");
    assert_eq!(store.publish_bundle(&id(1), 1, &[1; 184], &[2; 256]).await, Ok(()), "its first again");
    // Its key may be replaced in either way from then on.
    assert_eq!(store.rotate(new_key(1, 2, 52)).await, Ok(()));
    assert!(store.successor(&id(1), 1).await.unwrap().is_some());
    assert_eq!(store.log_in(login("alice", 2, 53)).await, Ok(LoggedIn::Changed(id(1))));
    assert_eq!(store.client(&id(1)).await.unwrap().unwrap().key_epoch, 3);
    for former in [1, 51, 52] {
        assert_eq!(store.log_in(login("alice", 2, former)).await, Err(LoginError::KeyInUse), "never again");
        let newcomer = Enrolment { modulus: modulus(former), ..enrolment(3, "dave") };
        assert_eq!(store.enrol(newcomer).await, Err(EnrolError::KeyInUse));
    }
}

pub(crate) async fn a_login_is_checked_against_the_account_as_it_is(backend: &impl Backend) {
    let store = with_two(backend).await;
    let refused = Err(LoginError::Account);
    assert_eq!(store.log_in(login("alice", 1, 50)).await, refused, "a client without one");
    assert_eq!(store.log_in(login("nobody", 1, 50)).await, refused);
    store.add_account(name("alice"), verifier(1), NOW).await.unwrap();
    assert_eq!(store.log_in(login("alice", 2, 50)).await, refused);
    store.change_account(&name("alice"), AccountChange::Locked(true), NOW).await.unwrap();
    assert_eq!(store.log_in(login("alice", 1, 50)).await, refused);
    assert_eq!(store.log_in(login("alice", 1, 1)).await, refused, "also with its own key");
    store.change_account(&name("alice"), AccountChange::Locked(false), NOW).await.unwrap();
    store.change_account(&name("alice"), AccountChange::Password(verifier(2)), NOW).await.unwrap();
    assert_eq!(store.log_in(login("alice", 1, 50)).await, refused, "it changed while the former was verified");
    assert_eq!(store.client(&id(1)).await.unwrap().unwrap().modulus, modulus(1));
    assert_eq!(store.log_in(login("alice", 2, 1)).await, Ok(LoggedIn::Repeat(id(1))));
    assert_eq!(store.log_in(login("alice", 2, 50)).await, Ok(LoggedIn::Changed(id(1))));
}

pub(crate) async fn a_login_takes_no_key_or_id_of_another(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.add_account(name("carol"), verifier(1), NOW).await.unwrap();
    store.add_account(name("alice"), verifier(1), NOW).await.unwrap();
    for text in ["carol", "alice"] {
        assert_eq!(store.log_in(login(text, 1, 2)).await, Err(LoginError::KeyInUse), "bob's, for {text}");
    }
    let as_bob = LoginEntry { id: id(2), ..login("carol", 1, 50) };
    assert_eq!(store.log_in(as_bob).await, Err(LoginError::IdInUse));
    // Who has a client is not asked for an id.
    let as_bob = LoginEntry { id: id(2), ..login("alice", 1, 50) };
    assert_eq!(store.log_in(as_bob).await, Ok(LoggedIn::Changed(id(1))));
    assert_eq!(store.client(&id(2)).await.unwrap().unwrap().modulus, modulus(2));
    assert_eq!(store.clients(None, 10).await.unwrap().len(), 2);
}

pub(crate) async fn a_revoked_client_has_no_account(backend: &impl Backend) {
    let store = with_two(backend).await;
    for text in ["alice", "bob"] {
        store.add_account(name(text), verifier(1), NOW).await.unwrap();
    }
    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(store.account(&name("alice")).await, Ok(None));
    assert!(store.account(&name("bob")).await.unwrap().is_some());
    assert_eq!(store.log_in(login("alice", 1, 50)).await, Err(LoginError::Account));
    // The name goes to somebody else, who is not revoked once more.
    store.add_account(name("alice"), verifier(2), NOW).await.unwrap();
    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(store.log_in(login("alice", 2, 1)).await, Err(LoginError::KeyInUse));
    assert_eq!(store.log_in(login("alice", 2, 50)).await, Ok(LoggedIn::New(id(900))));
}

pub(crate) async fn chains_belong_to_one_sender(backend: &impl Backend) {
    let store = with_two(backend).await;
    let route = ChainRoute { sender: id(1), sid: [9; 16], group: false, recipients: vec![id(2)] };
    assert_eq!(store.register_chain(&[1; 8], &id(1), &[9; 16], &id(2)).await, Ok(()));
    assert_eq!(store.register_chain(&[1; 8], &id(1), &[9; 16], &id(2)).await, Ok(()));
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route.clone())));
    assert_eq!(store.register_chain(&[1; 8], &id(2), &[9; 16], &id(1)).await, Err(ChainError::InUse));
    assert_eq!(store.register_chain(&[1; 8], &id(1), &[8; 16], &id(2)).await, Err(ChainError::InUse));
    assert_eq!(store.register_chain(&[2; 8], &id(3), &[9; 16], &id(2)).await, Err(ChainError::Unknown));
    assert_eq!(store.register_chain(&[2; 8], &id(1), &[9; 16], &id(3)).await, Err(ChainError::Unknown));
    assert_eq!(store.chain(&[2; 8]).await, Ok(None));
    drop(store);
    assert_eq!(backend.open().await.chain(&[1; 8]).await, Ok(Some(route)));
}

pub(crate) async fn the_oldest_chains_go_first(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.register_chain(&[0xff; 8], &id(2), &[9; 16], &id(1)).await.unwrap();
    for n in 0..=64 {
        store.register_chain(&[n; 8], &id(1), &[9; 16], &id(2)).await.unwrap();
    }
    assert_eq!(store.chain(&[0; 8]).await, Ok(None));
    for n in 1..=64 {
        assert!(store.chain(&[n; 8]).await.unwrap().is_some(), "{n}");
    }
    assert!(store.chain(&[0xff; 8]).await.unwrap().is_some(), "the other direction counts apart");
}

pub(crate) async fn chains_know_all_their_recipients(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.enrol(enrolment(3, "carol")).await.unwrap();
    store.register_chain(&[1; 8], &id(1), &[9; 16], &id(3)).await.unwrap();
    store.register_chain(&[1; 8], &id(1), &[9; 16], &id(2)).await.unwrap();
    let route = ChainRoute { sender: id(1), sid: [9; 16], group: false, recipients: vec![id(3), id(2)] };
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route)));
    store.revoke(&id(3), NOW, Refuse::silently(), announce()).await.unwrap();
    let route = ChainRoute { sender: id(1), sid: [9; 16], group: false, recipients: vec![id(2)] };
    assert_eq!(store.chain(&[1; 8]).await, Ok(Some(route)));
}

pub(crate) async fn channels_are_at_most_two(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.put_channel(&id(2), channel(20), None).await.unwrap();
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    store.put_channel(&id(1), channel(2), Some([1; 16])).await.unwrap();
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(Some((id(1), channel(1)))));
    assert_eq!(store.channel(&[2; 16], NOW).await, Ok(Some((id(1), channel(2)))));
    assert_eq!(store.channels(&id(1), NOW).await, Ok(vec![([1; 16], NOW + 60), ([2; 16], NOW + 60)]));
    assert_eq!(store.channels(&id(1), NOW + 60).await, Ok(vec![]));
    store.put_channel(&id(1), channel(3), Some([2; 16])).await.unwrap();
    assert_eq!(store.channel(&[1; 16], NOW).await, Ok(None));
    assert!(store.channel(&[2; 16], NOW).await.unwrap().is_some());
    // Another client's channel cannot be kept, nor is it lost.
    store.put_channel(&id(1), channel(4), Some([20; 16])).await.unwrap();
    assert_eq!(store.channel(&[2; 16], NOW).await, Ok(None));
    assert_eq!(store.channel(&[3; 16], NOW).await, Ok(None));
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.channel(&[4; 16], NOW).await, Ok(Some((id(1), channel(4)))));
    assert_eq!(store.channel(&[20; 16], NOW).await, Ok(Some((id(2), channel(20)))));
    assert_eq!(store.drop_channels(&id(1)).await, Ok(1));
    assert_eq!(store.drop_channels(&id(1)).await, Ok(0));
    assert_eq!(store.channel(&[4; 16], NOW).await, Ok(None));
    assert!(store.channel(&[20; 16], NOW).await.unwrap().is_some());
    assert_eq!(store.put_channel(&id(3), channel(5), None).await, Err(ChannelError::Unknown));
}

pub(crate) async fn expired_channels_are_not_there(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.put_channel(&id(1), channel(1), None).await.unwrap();
    assert!(store.channel(&[1; 16], NOW + 59).await.unwrap().is_some());
    assert_eq!(store.channel(&[1; 16], NOW + 60).await, Ok(None));
}

pub(crate) async fn clients_are_paged_by_name(backend: &impl Backend) {
    let store = backend.open().await;
    for (n, text) in [(1, "delta"), (2, "Alpha"), (3, "charlie"), (4, "BRAVO"), (5, "ольга"), (6, "alpha-2")] {
        store.enrol(enrolment(n, text)).await.unwrap();
    }
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = store.clients(after.as_ref(), 2).await.unwrap();
        let Some(last) = page.last() else {
            break;
        };
        after = Some(name(&last.name));
        found.extend(page.into_iter().map(|client| client.name));
    }
    assert_eq!(found, ["Alpha", "alpha-2", "BRAVO", "charlie", "delta", "ольга"]);
    assert_eq!(store.clients(None, 0).await, Ok(vec![]));
    let rest = store.clients(Some(&name("bz")), usize::MAX).await.unwrap();
    assert_eq!(rest.len(), 3, "who pages may begin anywhere");
}

pub(crate) async fn last_seen_only_goes_forward(backend: &impl Backend) {
    let store = with_two(backend).await;
    store.touch(&id(1), NOW + 10).await.unwrap();
    store.touch(&id(1), NOW + 5).await.unwrap();
    store.touch(&id(99), NOW).await.unwrap();
    let seen = async |store: &SharedStore| store.client(&id(1)).await.unwrap().unwrap().last_seen;
    assert_eq!(seen(&store).await, Some(NOW + 10), "at once");
    assert_eq!(store.client_by_name(&name("alice")).await.unwrap().unwrap().last_seen, Some(NOW + 10));
    assert_eq!(store.clients(None, 1).await.unwrap()[0].last_seen, Some(NOW + 10));
    assert_eq!(store.client(&id(2)).await.unwrap().unwrap().last_seen, None);
    drop(store);
    let store = backend.open().await;
    assert_eq!(seen(&store).await, Some(NOW + 10), "and after an orderly stop");
    store.touch(&id(1), NOW + 7).await.unwrap();
    assert_eq!(seen(&store).await, Some(NOW + 10));
    drop(store);
    assert_eq!(seen(&backend.open().await).await, Some(NOW + 10));
}

pub(crate) async fn record_limits_change(backend: &impl Backend) {
    let store = with_two(backend).await;
    for limit in [1024, 1024, u16::MAX, 0] {
        store.set_record_limit(&id(1), limit).await.unwrap();
        assert_eq!(store.client(&id(1)).await.unwrap().unwrap().record_limit, limit);
    }
    assert_eq!(store.client(&id(2)).await.unwrap().unwrap().record_limit, 16_384);
    store.set_record_limit(&id(99), 1).await.unwrap();
}

pub(crate) async fn times_and_sizes_at_their_ends(backend: &impl Backend) {
    let store = backend.open().await;
    let longest = "é".repeat(32);
    let extreme = Enrolment { now: u64::MAX, modulus: vec![0xff; 512], ..enrolment(1, &longest) };
    assert_eq!(store.enrol(extreme).await, Ok(Enrolled::New));
    store.add_token(Token { expires: u64::MAX, uses: Some(u32::MAX), ..token(1, None) }).await.unwrap();
    assert_eq!(
        store.enrol(with_token(2, "'; DROP TABLE client; --".replace(' ', "_").as_str(), 1)).await,
        Ok(Enrolled::New)
    );
    assert_eq!(uses(&store, 1).await, Some(u32::MAX - 1));
    store.publish_bundle(&id(1), 0, &[], &[]).await.unwrap();
    store.publish_bundle(&id(2), 0, &vec![7; 1 << 20], &[]).await.unwrap();
    assert_eq!(store.bundle(&id(2)).await.unwrap().unwrap().bundle.len(), 1 << 20);
    let client = store.client(&id(1)).await.unwrap().unwrap();
    assert_eq!((client.name, client.modulus), (longest, vec![0xff; 512]));
    assert!(client.enrolled_at > u64::MAX / 4, "no clock comes near what is lost here");
}

pub(crate) async fn many_at_once_are_all_durable(backend: &impl Backend) {
    let store = backend.open().await;
    let tasks: Vec<_> = (0..300)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                assert_eq!(store.enrol(enrolment(n, &format!("client-{n:03}"))).await, Ok(Enrolled::New));
                assert!(store.client(&id(n)).await.unwrap().is_some(), "who wrote can read it");
                store.publish_bundle(&id(n), 1, &n.to_be_bytes(), b"").await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    drop(store);
    let store = backend.open().await;
    let clients = store.clients(None, 1000).await.unwrap();
    assert_eq!(clients.len(), 300);
    for client in clients {
        assert!(store.bundle(&client.id).await.unwrap().is_some());
    }
}

pub(crate) async fn a_dropped_call_harms_nothing(backend: &impl Backend) {
    let store = with_two(backend).await;
    for n in 10..60 {
        let mut call = store.enrol(enrolment(n, &format!("client-{n}")));
        tokio::select! {
            biased;
            _ = &mut call => {}
            () = core::future::ready(()) => {}
        }
    }
    assert_eq!(store.enrol(enrolment(3, "carol")).await, Ok(Enrolled::New));
    for client in store.clients(None, 100).await.unwrap() {
        assert_eq!(store.client_by_name(&name(&client.name)).await, Ok(Some(client)), "whole or not at all");
    }
}
