//! The promises about what waits.

use super::*;

const ALL: usize = usize::MAX;

fn item(recipient: u16, sender: u16, n: u32) -> NewItem {
    let [high, low] = sender.to_be_bytes();
    NewItem {
        recipient: id(recipient),
        sender: id(sender),
        kind: ItemKind::Envelope,
        chain: [high, low, 0, 0, 0, 0, 0, 1],
        n,
        wanted: 3,
        bytes: n.to_be_bytes().repeat(25).into(),
        at: NOW,
    }
}

fn wrap(recipient: u16, sender: u16, n: u32, bytes: &[u8]) -> NewItem {
    NewItem { kind: ItemKind::Wrap, bytes: bytes.into(), ..item(recipient, sender, n) }
}

fn receipt(recipient: u16, n: u32) -> NewItem {
    NewItem { kind: ItemKind::Receipt, ..item(recipient, 9, n) }
}

/// Puts items that nothing stands against, and returns their numbers.
async fn stored(store: &SharedStore, items: Vec<NewItem>) -> Vec<u64> {
    let stored = |put| match put {
        Ok(Put::Stored { seq }) => seq,
        other => panic!("{other:?}"),
    };
    store.put(items).await.unwrap().into_iter().map(stored).collect()
}

async fn put_one(store: &SharedStore, item: NewItem) -> Result<Put, PutError> {
    let mut puts = store.put(vec![item]).await.unwrap();
    assert_eq!(puts.len(), 1);
    puts.remove(0)
}

/// Everything that waits for client `n`, after a look at what the counters say of it.
async fn queue(store: &SharedStore, n: u16) -> Vec<Item> {
    let items = store.queue(&id(n), 0, ALL, ALL).await.unwrap();
    let waiting = store.waiting(&id(n)).await.unwrap();
    let bytes: usize = items.iter().map(|item| item.bytes.len()).sum();
    assert_eq!((waiting.items, waiting.bytes), (items.len() as u64, bytes as u64));
    assert!(items.last().is_none_or(|last| last.seq <= waiting.newest));
    assert!(items.is_sorted_by(|one, next| one.seq < next.seq));
    items
}

async fn numbers(store: &SharedStore, n: u16) -> Vec<u64> {
    queue(store, n).await.into_iter().map(|item| item.seq).collect()
}

/// Tells the sender with a receipt that holds the number and the reason's stand-in.
fn refuse() -> Refuse {
    Refuse::new(|recipient, item| {
        (item.kind == ItemKind::Envelope).then(|| NewItem {
            recipient: item.sender,
            sender: *recipient,
            kind: ItemKind::Receipt,
            chain: item.chain,
            n: item.n,
            wanted: 0,
            bytes: (*b"refused").into(),
            at: NOW + 7,
        })
    })
}

/// A store with clients 1 "alice", 2 "bob" and 3 "carol".
async fn with_three(backend: &impl Backend, limits: QueueLimits) -> SharedStore {
    let store = backend.open_with(limits).await;
    for (n, text) in [(1, "alice"), (2, "bob"), (3, "carol")] {
        assert_eq!(store.enrol(enrolment(n, text)).await, Ok(Enrolled::New));
    }
    store
}

pub(crate) async fn what_waits_is_kept_whole_and_in_order(backend: &impl Backend) {
    let store = with_two(backend).await;
    assert_eq!(store.put(vec![]).await, Ok(vec![]));
    assert_eq!(store.waiting(&id(2)).await, Ok(Waiting::default()));
    assert_eq!(queue(&store, 2).await, []);
    let extreme = NewItem { n: u32::MAX, wanted: u8::MAX, at: u64::MAX >> 1, chain: [0xff; 8], ..item(2, 1, 0) };
    let empty = NewItem { bytes: Arc::new([]), ..wrap(2, 1, 0, b"") };
    let large = NewItem { bytes: vec![7; 70_000].into(), ..item(2, 1, 8) };
    let all = vec![wrap(2, 1, 7, b"wrap"), item(2, 1, 7), receipt(2, 5), extreme, empty, large, item(2, 2, 7)];
    let mut seqs = stored(&store, all[..3].to_vec()).await;
    stored(&store, vec![item(1, 2, 1), item(1, 2, 2)]).await;
    seqs.extend(stored(&store, all[3..].to_vec()).await);
    assert!(seqs.is_sorted_by(|one, next| one < next), "{seqs:?}");
    let kept: Vec<_> = all
        .into_iter()
        .zip(&seqs)
        .map(|(new, &seq)| {
            let NewItem { sender, kind, chain, n, wanted, bytes, at, .. } = new;
            Item { seq, sender, kind, chain, n, wanted, bytes, at }
        })
        .collect();
    assert_eq!(queue(&store, 2).await, kept);
    drop(store);
    let store = backend.open().await;
    assert_eq!(queue(&store, 2).await, kept, "and after a new start");
    assert_eq!(queue(&store, 1).await.len(), 2);
    assert_eq!(queue(&store, 3).await, []);
}

pub(crate) async fn queues_are_read_in_pieces(backend: &impl Backend) {
    let store = with_two(backend).await;
    let seqs = stored(&store, (0..10).map(|n| item(2, 1, n)).collect()).await;
    let read = async |after, items, bytes| -> Vec<u64> {
        let items = store.queue(&id(2), after, items, bytes).await.unwrap();
        items.into_iter().map(|item| item.seq).collect()
    };
    assert_eq!(read(0, 4, ALL).await, seqs[..4]);
    assert_eq!(read(seqs[3], 4, ALL).await, seqs[4..8]);
    assert_eq!(read(seqs[8], 4, ALL).await, seqs[9..]);
    assert_eq!(read(seqs[9], 4, ALL).await, vec![0; 0]);
    assert_eq!(read(u64::MAX, ALL, ALL).await, vec![0; 0]);
    assert_eq!(read(0, ALL, 300).await, seqs[..3], "each has 100 bytes");
    assert_eq!(read(0, ALL, 299).await, seqs[..2]);
    assert_eq!(read(seqs[0], ALL, 1).await, seqs[1..2], "one is always given");
    assert_eq!(read(0, 0, 0).await, seqs[..1]);
}

pub(crate) async fn only_what_was_acknowledged_goes(backend: &impl Backend) {
    let store = with_two(backend).await;
    let bobs = stored(&store, (0..6).map(|n| item(2, 1, n)).collect()).await;
    let alices = stored(&store, vec![item(1, 2, 0), receipt(1, 0)]).await;
    assert_eq!(store.acknowledge(&id(2), bobs[0] - 1).await, Ok(0));
    assert_eq!(store.acknowledge(&id(2), bobs[1]).await, Ok(2));
    assert_eq!(numbers(&store, 2).await, bobs[2..], "at once");
    assert_eq!(store.acknowledge(&id(2), bobs[1]).await, Ok(0));
    assert_eq!(store.acknowledge(&id(2), 0).await, Ok(0));
    assert_eq!(store.acknowledge(&id(1), bobs[5]).await, Ok(0), "another's numbers");
    assert_eq!(store.acknowledge(&id(99), u64::MAX).await, Ok(0));
    // Of single ones, others' and unknown ones do not count.
    let single = [bobs[3], bobs[3], bobs[0], alices[0], u64::MAX, 0];
    assert_eq!(store.remove(&id(2), &single).await, Ok(1));
    assert_eq!(store.remove(&id(2), &[]).await, Ok(0));
    let left = [bobs[2], bobs[4], bobs[5]];
    assert_eq!(numbers(&store, 2).await, left);
    drop(store);
    let store = backend.open().await;
    assert_eq!(numbers(&store, 2).await, left, "and after an orderly stop");
    assert_eq!(store.acknowledge(&id(2), u64::MAX).await, Ok(3));
    assert_eq!(queue(&store, 2).await, []);
    assert_eq!(numbers(&store, 1).await, alices);
    assert_eq!(store.acknowledge(&id(1), alices[1]).await, Ok(2));
}

pub(crate) async fn nothing_waits_twice(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits::default()).await;
    let first = item(2, 1, 5);
    let seq = stored(&store, vec![first.clone()]).await[0];
    let other_bytes = NewItem { bytes: (*b"other").into(), ..first.clone() };
    let later = NewItem { at: NOW + 9, wanted: 0, ..first.clone() };
    for repeat in [first.clone(), later] {
        assert_eq!(put_one(&store, repeat).await, Ok(Put::Repeat { seq }));
    }
    assert_eq!(put_one(&store, other_bytes.clone()).await, Err(PutError::Rewound));
    assert_eq!(queue(&store, 2).await.len(), 1);
    drop(store);
    let store = backend.open().await;
    assert_eq!(put_one(&store, first.clone()).await, Ok(Put::Repeat { seq }), "also after a new start");
    assert_eq!(put_one(&store, other_bytes.clone()).await, Err(PutError::Rewound));
    let other_chain = NewItem { chain: [5; 8], ..first.clone() };
    let others = vec![item(3, 1, 5), item(2, 1, 6), wrap(2, 1, 5, b"wrap"), other_chain, receipt(2, 5), receipt(2, 5)];
    stored(&store, others).await;
    assert_eq!(queue(&store, 2).await.len(), 6);
    // Within one call as well.
    let twice = store.put(vec![item(1, 2, 1), item(1, 2, 1)]).await.unwrap();
    let seq = queue(&store, 1).await[0].seq;
    assert_eq!(twice, [Ok(Put::Stored { seq }), Ok(Put::Repeat { seq })]);
    // Who has it has acknowledged it: it is another delivery then.
    store.acknowledge(&id(2), u64::MAX).await.unwrap();
    stored(&store, vec![other_bytes]).await;
}

pub(crate) async fn of_wraps_the_latest_waits(backend: &impl Backend) {
    let store = with_two(backend).await;
    let seqs = stored(&store, vec![wrap(2, 1, 5, b"former"), item(2, 1, 5)]).await;
    let repeat = put_one(&store, wrap(2, 1, 5, b"former")).await;
    assert_eq!(repeat, Ok(Put::Repeat { seq: seqs[0] }));
    let newer = NewItem { at: NOW + 3, ..wrap(2, 1, 5, b"the newer") };
    assert_eq!(put_one(&store, newer).await, Ok(Put::Stored { seq: seqs[0] }), "nobody was given the former");
    let kept = queue(&store, 2).await;
    assert_eq!((kept.len(), &*kept[0].bytes, kept[0].at, kept[0].seq), (2, &b"the newer"[..], NOW + 3, seqs[0]));
    // From here on the recipient may have it, and what he says about it must not take another one away.
    let last = stored(&store, vec![wrap(2, 1, 5, b"last")]).await[0];
    assert_eq!(numbers(&store, 2).await, [seqs[1], last]);
    assert_eq!(store.acknowledge(&id(2), seqs[1]).await, Ok(1));
    let kept = queue(&store, 2).await;
    assert_eq!((kept.len(), &*kept[0].bytes), (1, &b"last"[..]));
    drop(store);
    let store = backend.open().await;
    assert_eq!(queue(&store, 2).await, kept);
}

pub(crate) async fn full_queues_refuse_and_take_again(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits { items: 3, bytes: 1000, receipts: 2, ..QueueLimits::default() }).await;
    let seqs = stored(&store, vec![item(2, 1, 0), wrap(2, 1, 0, b"wrap"), item(2, 1, 1)]).await;
    assert_eq!(put_one(&store, item(2, 1, 2)).await, Err(PutError::QueueFull));
    assert_eq!(put_one(&store, wrap(2, 1, 9, b"other")).await, Err(PutError::QueueFull));
    assert_eq!(put_one(&store, item(2, 1, 1)).await, Ok(Put::Repeat { seq: seqs[2] }), "it waits already");
    assert_eq!(put_one(&store, wrap(2, 1, 0, b"newer")).await, Ok(Put::Stored { seq: seqs[1] }));
    let rewound = NewItem { bytes: (*b"other").into(), ..item(2, 1, 1) };
    assert_eq!(put_one(&store, rewound).await, Err(PutError::Rewound));
    stored(&store, vec![item(3, 1, 2), receipt(2, 1)]).await;
    store.acknowledge(&id(2), seqs[0]).await.unwrap();
    stored(&store, vec![item(2, 1, 2)]).await;
    assert_eq!(put_one(&store, item(2, 1, 3)).await, Err(PutError::QueueFull));

    // By bytes: 900 of 1000, a receipt counts apart.
    let sized = |n, len| NewItem { bytes: vec![1; len].into(), ..item(1, 2, n) };
    let large = |len| NewItem { kind: ItemKind::Wrap, ..sized(0, len) };
    let seqs = stored(&store, vec![sized(0, 400), large(500)]).await;
    assert_eq!(put_one(&store, sized(1, 101)).await, Err(PutError::QueueFull));
    assert_eq!(put_one(&store, large(601)).await, Err(PutError::QueueFull));
    assert_eq!(put_one(&store, large(600)).await, Ok(Put::Stored { seq: seqs[1] }));
    assert_eq!(put_one(&store, sized(1, 1)).await, Err(PutError::QueueFull));
    stored(&store, vec![sized(2, 0), receipt(1, 0)]).await;
    drop(store);
    let store = backend.open_with(QueueLimits { items: 3, bytes: 1000, receipts: 2, ..QueueLimits::default() }).await;
    assert_eq!(put_one(&store, item(2, 1, 3)).await, Err(PutError::QueueFull), "also after a new start");
    assert_eq!((queue(&store, 1).await.len(), queue(&store, 2).await.len()), (4, 4));
}

pub(crate) async fn the_oldest_receipts_go(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits { items: 1, bytes: 1000, receipts: 3, ..QueueLimits::default() }).await;
    let mut seqs = stored(&store, vec![receipt(1, 0), item(1, 2, 0), receipt(1, 1), receipt(1, 1)]).await;
    seqs.extend(stored(&store, vec![receipt(1, 2), receipt(1, 3)]).await);
    assert_eq!(numbers(&store, 1).await, [seqs[1], seqs[3], seqs[4], seqs[5]]);
    drop(store);
    let store = backend.open_with(QueueLimits { items: 1, bytes: 1000, receipts: 1, ..QueueLimits::default() }).await;
    let last = stored(&store, vec![receipt(1, 4)]).await[0];
    assert_eq!(numbers(&store, 1).await, [seqs[1], last], "a lower bound holds from the next on");
}

pub(crate) async fn each_item_is_decided_by_itself(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits { items: 2, ..QueueLimits::default() }).await;
    store.revoke(&id(3), NOW, Refuse::silently(), announce()).await.unwrap();
    let rewound = NewItem { bytes: (*b"other").into(), ..item(2, 1, 0) };
    let batch =
        vec![item(2, 1, 0), item(77, 1, 0), rewound, item(3, 1, 0), item(2, 1, 1), item(2, 1, 2), item(1, 1, 0)];
    let puts = store.put(batch).await.unwrap();
    let (bobs, alices) = (numbers(&store, 2).await, numbers(&store, 1).await);
    let expected = [
        Ok(Put::Stored { seq: bobs[0] }),
        Err(PutError::UnknownRecipient),
        Err(PutError::Rewound),
        Err(PutError::UnknownRecipient),
        Ok(Put::Stored { seq: bobs[1] }),
        Err(PutError::QueueFull),
        Ok(Put::Stored { seq: alices[0] }),
    ];
    assert_eq!(puts, expected);
    assert_eq!((queue(&store, 3).await, queue(&store, 77).await), (vec![], vec![]));
}

pub(crate) async fn what_is_too_old_is_refused_to_its_sender(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits::default()).await;
    let aged = |item, at| NewItem { at, ..item };
    // Clocks jump: numbers need not have the order of times.
    let bobs = vec![aged(item(2, 1, 0), 20), aged(item(2, 1, 1), 10), aged(wrap(2, 1, 1, b"wrap"), 11), item(2, 3, 2)];
    let bobs = stored(&store, bobs).await;
    let carols = stored(&store, vec![aged(item(3, 1, 5), 15), aged(receipt(3, 1), 16), aged(item(3, 77, 5), 17)]).await;
    assert_eq!(store.expire(10, 100, refuse()).await, Ok(vec![]));
    assert_eq!(store.expire(100, 0, refuse()).await, Ok(vec![]));

    let mut seqs = Vec::new();
    for _ in 0..3 {
        let expired = store.expire(20, 2, refuse()).await.unwrap();
        seqs.extend(expired.iter().map(|(recipient, item)| (recipient[1], item.seq)));
        if expired.len() < 2 {
            break;
        }
    }
    seqs.sort_unstable();
    let expected = [(2, bobs[1]), (2, bobs[2]), (3, carols[0]), (3, carols[1]), (3, carols[2])];
    assert_eq!(seqs, expected);
    drop(store);
    let store = backend.open().await;
    assert_eq!(numbers(&store, 2).await, [bobs[0], bobs[3]]);
    assert_eq!(queue(&store, 3).await, []);
    // Only envelopes are refused by these tests, and only to somebody who is there.
    let told = queue(&store, 1).await;
    let mut refused: Vec<_> = told.iter().map(|item| (item.n, item.sender[1], item.at)).collect();
    refused.sort_unstable();
    assert_eq!(refused, [(1, 2, NOW + 7), (5, 3, NOW + 7)]);
    assert!(told.iter().all(|item| item.kind == ItemKind::Receipt && *item.bytes == *b"refused"));
    // The same message again is none that waits.
    stored(&store, vec![item(2, 1, 1)]).await;
    let rest = store.expire(u64::MAX, ALL, Refuse::silently()).await.unwrap();
    assert_eq!(rest.len(), 5);
    assert_eq!((queue(&store, 1).await, queue(&store, 2).await), (vec![], vec![]));
    assert_eq!(store.expire(u64::MAX, ALL, refuse()).await, Ok(vec![]));
}

pub(crate) async fn the_queue_of_a_revoked_client_is_refused_to_its_senders(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits::default()).await;
    let items = vec![item(2, 1, 0), wrap(2, 1, 0, b"wrap"), item(2, 3, 4), item(2, 1, 1), item(2, 2, 9), receipt(2, 1)];
    stored(&store, items).await;
    let carols = stored(&store, vec![item(3, 2, 0)]).await;
    let mut told = store.revoke(&id(2), NOW, refuse(), announce()).await.unwrap().unwrap();
    told.sort_unstable();
    assert_eq!(told, [id(1), id(3)]);
    assert_eq!(store.revoke(&id(2), NOW, refuse(), announce()).await, Ok(None));
    assert_eq!(queue(&store, 2).await, []);
    drop(store);
    let store = backend.open().await;
    assert_eq!(queue(&store, 2).await, []);
    let alices: Vec<_> = queue(&store, 1).await.into_iter().map(|item| (item.kind, item.n)).collect();
    assert_eq!(alices, [(ItemKind::Receipt, 0), (ItemKind::Receipt, 1)]);
    let rest = queue(&store, 3).await;
    assert_eq!((rest[0].seq, rest.len(), rest[1].n), (carols[0], 2, 4), "what a revoked client sent stays");
    assert_eq!(put_one(&store, item(2, 1, 5)).await, Err(PutError::UnknownRecipient));
}

pub(crate) async fn a_replaced_key_leaves_the_queue(backend: &impl Backend) {
    let store = with_two(backend).await;
    let seqs = stored(&store, vec![item(1, 2, 0), receipt(1, 1)]).await;
    store.rotate(new_key(1, 1, 100)).await.unwrap();
    assert_eq!(numbers(&store, 1).await, seqs);
}

pub(crate) async fn numbers_are_never_given_twice(backend: &impl Backend) {
    let mut highest = 0;
    let mut store = with_two(backend).await;
    for n in 0..4 {
        let seqs = stored(&store, vec![item(2, 1, 2 * n), item(2, 1, 2 * n + 1)]).await;
        assert!(seqs[0] > highest, "{seqs:?} after {highest}");
        highest = seqs[1];
        assert_eq!(store.waiting(&id(2)).await.unwrap().newest, highest);
        assert_eq!(store.acknowledge(&id(2), highest).await, Ok(2));
        if n % 2 == 1 {
            drop(store);
            store = backend.open().await;
        }
    }
}

pub(crate) async fn many_senders_at_once_keep_their_order(backend: &impl Backend) {
    const SENDERS: u16 = 20;
    const EACH: u32 = 30;
    let store = backend.open().await;
    for n in 1..=SENDERS {
        store.enrol(enrolment(n, &format!("client-{n}"))).await.unwrap();
    }
    let tasks: Vec<_> = (1..=SENDERS)
        .map(|sender| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..EACH {
                    let two = vec![item(sender % 2 + 1, sender, n), receipt(3, n)];
                    stored(&store, two).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    drop(store);
    let store = backend.open_with(QueueLimits { receipts: 1000, ..QueueLimits::default() }).await;
    for recipient in 1..=2 {
        let items = queue(&store, recipient).await;
        assert_eq!(items.len(), usize::from(SENDERS / 2) * EACH as usize);
        for sender in 1..=SENDERS {
            let of_one: Vec<_> = items.iter().filter(|item| item.sender == id(sender)).map(|item| item.n).collect();
            assert!(of_one.is_empty() || of_one == (0..EACH).collect::<Vec<_>>(), "{sender}: {of_one:?}");
        }
    }
    assert_eq!(queue(&store, 3).await.len(), usize::from(SENDERS) * EACH as usize);
}

pub(crate) async fn who_reads_while_others_write_misses_nothing(backend: &impl Backend) {
    const WRITERS: u16 = 4;
    const EACH: u32 = 150;
    let store = with_two(backend).await;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..EACH / 5 {
                    stored(&store, (5 * n..5 * n + 5).map(|n| item(2, writer, n)).collect()).await;
                }
            })
        })
        .collect();
    // What is read is never asked for again: nothing may show up below it.
    let (mut after, mut next) = (0, [0; WRITERS as usize]);
    while next.iter().sum::<u32>() < u32::from(WRITERS) * EACH {
        let items = store.queue(&id(2), after, 64, 64 * 1024).await.unwrap();
        for item in &items {
            let next = &mut next[usize::from(item.chain[1])];
            assert_eq!(item.n, *next);
            *next += 1;
        }
        if let Some(last) = items.last() {
            after = last.seq;
            assert_eq!(store.acknowledge(&id(2), after).await, Ok(items.len() as u64));
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(queue(&store, 2).await, []);
    drop(store);
    assert_eq!(queue(&backend.open().await, 2).await, []);
}

/// Numbers that look random, the same in every run.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

pub(crate) async fn any_order_of_operations_comes_to_what_a_list_comes_to(backend: &impl Backend) {
    const LIMITS: QueueLimits = QueueLimits { items: 60, bytes: 300_000, receipts: 20, notices: 20, posts: 20 };
    let mut dice = Dice(7);
    let mut store = with_three(backend, LIMITS).await;
    let mut lists: [Vec<(u64, NewItem)>; 3] = Default::default();
    for _ in 0..400 {
        let who = dice.throw(3) as u16;
        let list = &mut lists[usize::from(who)];
        let some = |dice: &mut Dice, list: &[(u64, NewItem)]| {
            let place = dice.throw(list.len() as u64 + 2) as usize;
            list.get(place).map_or_else(|| dice.throw(1000), |(seq, _)| *seq)
        };
        match dice.throw(10) {
            0..5 => {
                let mut items = Vec::new();
                for _ in 0..=dice.throw(12) {
                    let len = if dice.throw(9) == 0 { 30_000 } else { 10 + dice.throw(300) as usize };
                    let n = dice.throw(80) as u32;
                    // The same under the same name, but for wraps.
                    let (kind, fill) = match dice.throw(6) {
                        0 => (ItemKind::Wrap, dice.throw(3) as u8),
                        1 => (ItemKind::Receipt, 9),
                        _ => (ItemKind::Envelope, n as u8),
                    };
                    let recipient = if dice.throw(4) == 0 { dice.throw(3) as u16 } else { who } + 1;
                    let bytes = if kind == ItemKind::Envelope { vec![fill; 100] } else { vec![fill; len] };
                    items.push(NewItem { kind, bytes: bytes.into(), ..item(recipient, 2, n) });
                }
                let puts = store.put(items.clone()).await.unwrap();
                for (item, put) in items.into_iter().zip(puts) {
                    let list = &mut lists[usize::from(item.recipient[1]) - 1];
                    let count = |list: &[(u64, NewItem)], receipt| {
                        list.iter().filter(|(_, held)| (held.kind == ItemKind::Receipt) == receipt).count() as u64
                    };
                    if item.kind == ItemKind::Receipt {
                        if count(list, true) >= LIMITS.receipts {
                            let oldest = list.iter().position(|(_, held)| held.kind == ItemKind::Receipt).unwrap();
                            list.remove(oldest);
                        }
                    } else {
                        let is_same = |held: &NewItem| (held.kind, held.n) == (item.kind, item.n);
                        let same = list.iter().position(|(_, held)| is_same(held));
                        let freed = same.map_or(0, |place| list[place].1.bytes.len());
                        let held = list.iter().filter(|(_, held)| held.kind != ItemKind::Receipt);
                        let bytes: usize = held.map(|(_, held)| held.bytes.len()).sum();
                        if let Some(place) = same.filter(|place| list[*place].1.bytes == item.bytes) {
                            assert_eq!(put, Ok(Put::Repeat { seq: list[place].0 }));
                            continue;
                        }
                        let full = (bytes - freed + item.bytes.len()) as u64 > LIMITS.bytes
                            || (same.is_none() && count(list, false) >= LIMITS.items);
                        if full {
                            assert_eq!(put, Err(PutError::QueueFull));
                            continue;
                        }
                        if let Some(place) = same {
                            let Ok(Put::Stored { seq }) = put else { panic!("{put:?}") };
                            if seq == list[place].0 {
                                list[place].1 = item;
                                continue;
                            }
                            list.remove(place);
                        }
                    }
                    let Ok(Put::Stored { seq }) = put else { panic!("{put:?}") };
                    assert!(list.last().is_none_or(|(last, _)| *last < seq), "numbers ascend");
                    list.push((seq, item));
                }
            }
            5 => {
                let up_to = some(&mut dice, list);
                let before = list.len();
                list.retain(|(seq, _)| *seq > up_to);
                let gone = (before - list.len()) as u64;
                assert_eq!(store.acknowledge(&id(who + 1), up_to).await, Ok(gone));
            }
            6 | 7 => {
                let seqs: Vec<_> = (0..=dice.throw(8)).map(|_| some(&mut dice, list)).collect();
                let before = list.len();
                list.retain(|(seq, _)| !seqs.contains(seq));
                let gone = (before - list.len()) as u64;
                assert_eq!(store.remove(&id(who + 1), &seqs).await, Ok(gone));
            }
            8 => {
                let (after, max) = (some(&mut dice, list), 1 + dice.throw(20) as usize);
                let read = store.queue(&id(who + 1), after, max, ALL).await.unwrap();
                let read: Vec<_> = read.iter().map(|item| (item.seq, &*item.bytes)).collect();
                let expected = list.iter().filter(|(seq, _)| *seq > after).take(max);
                assert_eq!(read, expected.map(|(seq, item)| (*seq, &*item.bytes)).collect::<Vec<_>>());
            }
            _ => {
                drop(store);
                store = backend.open_with(LIMITS).await;
            }
        }
        let waiting = store.waiting(&id(who + 1)).await.unwrap();
        assert_eq!(waiting.items, lists[usize::from(who)].len() as u64);
    }
    for (n, list) in (1..).zip(lists) {
        let left: Vec<_> = queue(&store, n).await.into_iter().map(|item| (item.seq, item.bytes)).collect();
        assert_eq!(left, list.into_iter().map(|(seq, item)| (seq, item.bytes)).collect::<Vec<_>>());
    }
}

pub(crate) async fn it_is_known_how_a_store_is(backend: &impl Backend) {
    let store = with_three(backend, QueueLimits::default()).await;
    let health = store.health();
    assert_eq!((health.refusing, health.waiting, health.waiting_bytes, health.waiting_clients), (None, 0, 0, 0));
    assert!(health.bytes > 0);
    stored(&store, vec![item(1, 2, 1), item(1, 3, 1), wrap(2, 1, 1, b"wrap")]).await;
    let health = store.health();
    assert_eq!((health.waiting, health.waiting_bytes, health.waiting_clients), (3, 204, 2));
    // Trying to write changes nothing.
    let meta = store.meta();
    assert_eq!(store.probe().await, Ok(()));
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.meta(), meta);
    assert_eq!(store.health().waiting, 3);
    store.acknowledge(&id(1), u64::MAX).await.unwrap();
    let health = store.health();
    assert_eq!((health.waiting, health.waiting_bytes, health.waiting_clients), (1, 4, 1));
    if let Some(writer) = health.writer {
        assert!(writer.seconds.count() > 0 && writer.seconds.count() == writer.operations.count());
        assert_eq!(writer.failures.total(), 0);
    }
}
