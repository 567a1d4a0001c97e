//! A disk that forgets a bit: whatever it was, the store notices it or is as it was.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::fmt::Debug;
use core::time::Duration;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ossicle::name::Name;
use ossicle::store::{
    Announce, BundleRecord, ChannelRecord, ClientRecord, Enrolment, Founding, Invitation, ItemKind, MemberAnswer,
    NewItem, NewKey, NewPost, Post, Refuse, SqliteStore, Store, StoreError, Token,
};

const NOW: u64 = 1_800_000_000;
const CLIENTS: u8 = 30;

/// A store with something in every table, and what waits of every kind: some of it gone again.
async fn fill(store: &SqliteStore) {
    for n in 1..=CLIENTS {
        let token = Token {
            id: [n; 8],
            verifier: [n; 32],
            name_pattern: None,
            preset_id: None,
            expires: NOW + 1000 + u64::from(n),
            uses: Some(2),
            printed: n == 1,
        };
        store.add_token(token).await.unwrap();
        let enrolment = Enrolment {
            id: [n; 16],
            name: Name::parse(&format!("client-{n}")).unwrap(),
            modulus: (0..=255).map(|byte| byte ^ n).collect(),
            token_id: Some([n; 8]),
            enrolled_by: (n > 20).then_some([1; 16]),
            record_limit: 1024 + u16::from(n),
            now: NOW,
        };
        store.enrol(enrolment).await.unwrap();
        store.publish_bundle(&[n; 16], 1, &[n; 90], &[n; 256]).await.unwrap();
        let channel = ChannelRecord { id: [n; 16], sealed: vec![n; 80], expires: NOW + 1000 };
        store.put_channel(&[n; 16], channel, None).await.unwrap();
        if n > 1 {
            store.register_chain(&[n; 8], &[n; 16], &[n; 16], &[n - 1; 16]).await.unwrap();
        }
    }
    let bundle = BundleRecord { epoch: 2, bundle: vec![2; 90], signature: vec![7; 256] };
    let key = NewKey { id: [2; 16], key_epoch: 1, modulus: vec![9; 256], signature: vec![8; 256], bundle };
    store.rotate(key).await.unwrap();
    let announce = || Announce::new(|notice| Some(format!("{notice:?}").into_bytes().into()));
    for n in 4..=12 {
        let invitation = |client| Invitation { client: [client; 16], key_epoch: 0, notice: [n; 200].into() };
        let founding = Founding {
            sid: [100 + n; 16],
            creator: [n; 16],
            key_epoch: 0,
            creator_only: n % 2 == 0,
            signature: [n; 64],
            invited: [n + 1, n + 2].map(invitation).into(),
            now: NOW,
        };
        store.found(founding).await.unwrap();
        for (member, accepts) in [(n + 1, true), (n + 2, n % 2 == 0)] {
            let (sid, member) = ([100 + n; 16], [member; 16]);
            let answer = MemberAnswer { sid, member, accepts, signature: [n; 64], oldest: 0, now: NOW };
            store.answer(answer, announce()).await.unwrap();
        }
        if n % 3 == 0 {
            let (sid, by) = ([100 + n; 16], [n; 16]);
            store.close(&sid, &by, &[n; 64], NOW, Refuse::silently(), announce()).await.unwrap();
        }
    }
    store.revoke(&[CLIENTS; 16], NOW, Refuse::silently(), announce()).await.unwrap();
    for n in 1..=20 {
        let body = vec![n; 30 * usize::from(n)];
        let post = Post { number: n.into(), at: NOW * 1000, epoch: 1, kind: 0, signature: [n; 64], body };
        let author = 10 + n % 5;
        store.say(NewPost { author: [author; 16], key_epoch: 0, post, now: NOW }).await.unwrap();
    }
    for batch in 0..60_u32 {
        let recipient = [1 + (batch % 8) as u8; 16];
        let items = (0..1 + batch % 12).map(|place| {
            let n = batch * 100 + place;
            let kind = [ItemKind::Envelope, ItemKind::Envelope, ItemKind::Wrap, ItemKind::Receipt][(n % 4) as usize];
            let len = if n.is_multiple_of(300) { 9000 } else { 60 + 3 * place as usize };
            let bytes: Vec<u8> = n.to_be_bytes().into_iter().cycle().take(len).collect();
            NewItem { recipient, sender: [9; 16], kind, chain: [9; 8], n, wanted: 3, bytes: bytes.into(), at: NOW }
        });
        assert!(store.put(items.collect()).await.unwrap().iter().all(Result::is_ok));
    }
    for recipient in 1..=4 {
        let waiting = store.queue(&[recipient; 16], 0, usize::MAX, usize::MAX).await.unwrap();
        store.acknowledge(&[recipient; 16], waiting[3].seq).await.unwrap();
        store.remove(&[recipient; 16], &[waiting[6].seq, waiting[7].seq, waiting[20].seq]).await.unwrap();
    }
}

type View = BTreeMap<String, String>;

/// All that a store says.
async fn view(store: &SqliteStore) -> Result<View, StoreError> {
    let mut view = View::new();
    let mut note = |what: &str, of: u8, said: &dyn Debug| view.insert(format!("{what} {of}"), format!("{said:?}"));
    note("meta", 0, &store.meta());
    for n in 1..=CLIENTS {
        let id = [n; 16];
        // Nothing rests on when somebody was last seen.
        let whoever = |client: ClientRecord| ClientRecord { last_seen: None, ..client };
        note("client", n, &store.client(&id).await?.map(whoever));
        let name = Name::parse(&format!("client-{n}")).unwrap();
        note("name", n, &store.client_by_name(&name).await?.map(whoever));
        note("bundle", n, &store.bundle(&id).await?);
        note("successor", n, &store.successor(&id, 0).await?);
        let token = store.token(&[n; 8]).await?;
        note("token", n, &token.as_ref().map(|token| token.verifier));
        note("token's terms", n, &token);
        note("chain", n, &store.chain(&[n; 8]).await?);
        note("conversation", n, &store.conversation(&[100 + n; 16]).await?);
        note("channel", n, &store.channel(&id, NOW).await?);
        note("channels", n, &store.channels(&id, NOW).await?);
        note("waiting", n, &store.waiting(&id).await?);
        note("queue", n, &store.queue(&id, 0, usize::MAX, usize::MAX).await?);
    }
    note("posts", 0, &store.posts(0, 1000).await?);
    let all = store.clients(None, 1000).await?;
    note("names", 0, &all.into_iter().map(|client| client.name).collect::<Vec<_>>());
    Ok(view)
}

/// What became of a store in which a bit is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Refused,
    NoticedByReader,
    NoticedByCheck,
    AsItWas,
}

async fn look(data: &Path, whole: &View) -> Result<End, String> {
    let store = match SqliteStore::open(data) {
        Ok(store) => store,
        Err(StoreError::Corrupt(_)) => return Ok(End::Refused),
        Err(error) => return Err(format!("not called damaged: {error}")),
    };
    let seen = view(&store).await;
    while !store.is_checked() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let probed = store.probe().await;
    match seen {
        Err(StoreError::Corrupt(_)) if matches!(probed, Err(StoreError::Corrupt(_))) => Ok(End::NoticedByReader),
        Err(StoreError::Corrupt(_)) => Err("not shown to whoever looks after it".to_owned()),
        _ if matches!(probed, Err(StoreError::Corrupt(_))) => Ok(End::NoticedByCheck),
        Err(error) => Err(format!("not called damaged: {error}")),
        Ok(seen) if seen == *whole => Ok(End::AsItWas),
        Ok(seen) => {
            let other = whole.iter().find(|(what, said)| seen.get(*what) != Some(said));
            Err(format!("believed: {:?}, which was {other:?}", other.and_then(|(what, _)| seen.get(what))))
        }
    }
}

/// `FLIPS=1000 cargo test --release -p ossicle-tests --test damage -- --nocapture` looks at more of them; `SEED=n` at
/// the same again.
#[tokio::test]
async fn a_flipped_bit_is_noticed_or_changes_nothing() {
    let number = |variable: &str| std::env::var(variable).ok().map(|number| number.parse::<u64>().unwrap());
    let seed = number("SEED").unwrap_or_else(|| getrandom::u64().unwrap());
    println!("SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    let original = directory.path().join("original");
    let store = SqliteStore::open(&original).unwrap();
    fill(&store).await;
    drop(store);
    // Numbers that are gone are known as long as it is open.
    let store = SqliteStore::open(&original).unwrap();
    let whole = view(&store).await.unwrap();
    drop(store);
    // Whoever closes it last leaves everything in one file.
    let bytes = fs::read(original.join("store.db")).unwrap();
    assert!(!original.join("store.db-wal").exists());
    let data = directory.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("store.db"), &bytes).unwrap();
    assert_eq!(look(&data, &whole).await, Ok(End::AsItWas));
    let mut ends: BTreeMap<End, u32> = BTreeMap::new();
    for flip in 0..number("FLIPS").unwrap_or(200) {
        let place = rng.usize(..bytes.len());
        let bit = rng.u8(..8);
        fs::remove_dir_all(&data).unwrap();
        fs::create_dir(&data).unwrap();
        let mut changed = bytes.clone();
        changed[place] ^= 1 << bit;
        fs::write(data.join("store.db"), &changed).unwrap();
        let end = look(&data, &whole).await;
        let end = end.unwrap_or_else(|wrong| panic!("flip {flip}, bit {bit} of byte {place}: {wrong}"));
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?} of {} bytes", bytes.len());
    assert!(ends.get(&End::AsItWas).copied().unwrap_or_default() < ends.values().sum(), "{ends:?}");
}
