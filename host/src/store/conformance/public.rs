//! The promises about the public conversation.

use super::*;

async fn with_two(backend: &impl Backend, posts: u64) -> SharedStore {
    let store = backend.open_with(QueueLimits { posts, ..QueueLimits::default() }).await;
    for n in 1..=2 {
        assert_eq!(store.enrol(enrolment(n, &format!("client-{n}"))).await, Ok(Enrolled::New));
    }
    store
}

fn post(number: u64) -> Post {
    let low = number as u8;
    Post { number, at: number ^ 7, epoch: u32::MAX, kind: 127, signature: [low; 64], body: vec![low; 800] }
}

async fn say(store: &SharedStore, author: u16, number: u64, now: u64) -> Result<Said, SayError> {
    store.say(NewPost { author: id(author), key_epoch: 0, post: post(number), now }).await
}

fn new(seq: u64) -> Result<Said, SayError> {
    Ok(Said::New { seq })
}

async fn numbers(store: &SharedStore, after: u64) -> Vec<(u64, ClientId, u64)> {
    let posts = store.posts(after, usize::MAX).await.unwrap().posts;
    posts.into_iter().map(|kept| (kept.seq, kept.author, kept.post.number)).collect()
}

pub(crate) async fn what_is_said_is_kept_whole_and_in_order(backend: &impl Backend) {
    let store = with_two(backend, 1000).await;
    assert_eq!(store.posts(0, 10).await, Ok(Posts::default()));
    // The largest number there is, too.
    let all = [(1, 5), (2, 5), (1, u64::MAX / 2 + 9), (2, 6), (1, u64::MAX)];
    for ((author, number), seq) in all.into_iter().zip(1..) {
        assert_eq!(say(&store, author, number, NOW).await, new(seq));
    }
    drop(store);
    let store = backend.open().await;
    let posts = store.posts(0, 10).await.unwrap();
    assert_eq!(posts.newest, 5);
    let expected = |((author, number), seq)| KeptPost { seq, author: id(author), post: post(number) };
    assert_eq!(posts.posts, all.into_iter().zip(1..).map(expected).collect::<Vec<_>>());
    assert_eq!(store.posts(1, 2).await.unwrap().posts, posts.posts[1..3]);
    assert_eq!(store.posts(4, 2).await.unwrap().posts, posts.posts[4..]);
    for after in [5, 6, u64::MAX] {
        assert_eq!(store.posts(after, 2).await, Ok(Posts { newest: 5, posts: vec![] }));
    }
    assert_eq!(store.posts(0, 0).await, Ok(Posts { newest: 5, posts: vec![] }));
}

pub(crate) async fn nothing_is_said_twice_or_out_of_order(backend: &impl Backend) {
    let store = with_two(backend, 2).await;
    assert_eq!(say(&store, 1, 10, NOW).await, new(1));
    assert_eq!(say(&store, 1, 12, NOW).await, new(2));
    for _ in 0..2 {
        assert_eq!(say(&store, 1, 10, NOW).await, Ok(Said::Repeat));
        assert_eq!(say(&store, 1, 12, NOW).await, Ok(Said::Repeat));
        for number in [0, 9, 11] {
            assert_eq!(say(&store, 1, number, NOW).await, Err(SayError::Rewound));
        }
        let other = Post { signature: [7; 64], ..post(12) };
        let other = NewPost { author: id(1), key_epoch: 0, post: other, now: NOW };
        assert_eq!(store.say(other).await, Err(SayError::Rewound));
    }
    // Another author counts for himself.
    assert_eq!(say(&store, 2, 10, NOW).await, new(3));
    assert_eq!(say(&store, 2, 11, NOW).await, new(4));
    // The last one is known also when it is not kept any more, one before it is not.
    assert_eq!(store.expire_posts(NOW + 1).await, Ok(2));
    assert_eq!(say(&store, 1, 12, NOW).await, Ok(Said::Repeat));
    assert_eq!(say(&store, 1, 10, NOW).await, Err(SayError::Rewound));
    assert_eq!(store.posts(0, 0).await.unwrap().newest, 4);
}

pub(crate) async fn the_oldest_posts_go(backend: &impl Backend) {
    let store = with_two(backend, 3).await;
    for n in 1..=5 {
        assert_eq!(say(&store, 1, n, NOW + n).await, new(n));
    }
    assert_eq!(numbers(&store, 0).await, [(3, id(1), 3), (4, id(1), 4), (5, id(1), 5)]);
    assert_eq!(store.expire_posts(NOW + 3).await, Ok(0));
    assert_eq!(store.expire_posts(NOW + 5).await, Ok(2));
    assert_eq!(numbers(&store, 0).await, [(5, id(1), 5)]);
    assert_eq!(store.expire_posts(NOW + 6).await, Ok(1));
    drop(store);
    // No number is given twice, though none is there any more.
    let store = backend.open().await;
    assert_eq!(store.posts(0, 10).await, Ok(Posts { newest: 5, posts: vec![] }));
    assert_eq!(say(&store, 2, 1, NOW).await, new(6));
    assert_eq!(say(&store, 1, 5, NOW).await, Ok(Said::Repeat));
    assert_eq!(say(&store, 1, 4, NOW).await, Err(SayError::Rewound));
}

pub(crate) async fn nobody_pushes_out_what_others_have_said(backend: &impl Backend) {
    let store = with_two(backend, 3).await;
    assert_eq!(say(&store, 1, 1, NOW).await, new(1));
    assert_eq!(say(&store, 2, 1, NOW).await, new(2));
    for n in 2..=9 {
        assert_eq!(say(&store, 1, n, NOW).await, new(n + 1));
    }
    assert_eq!(numbers(&store, 0).await, [(2, id(2), 1), (9, id(1), 8), (10, id(1), 9)]);
    // Where several have as many, the oldest of theirs.
    assert_eq!(say(&store, 2, 2, NOW).await, new(11));
    assert_eq!(numbers(&store, 0).await, [(9, id(1), 8), (10, id(1), 9), (11, id(2), 2)]);
    assert_eq!(say(&store, 2, 3, NOW).await, new(12));
    assert_eq!(numbers(&store, 0).await, [(10, id(1), 9), (11, id(2), 2), (12, id(2), 3)]);
}

pub(crate) async fn posts_go_with_the_key_that_signed_them(backend: &impl Backend) {
    let store = with_two(backend, 1000).await;
    assert_eq!(say(&store, 9, 1, NOW).await, Err(SayError::Unknown));
    for n in 1..=2 {
        assert_eq!(say(&store, n, 1, NOW).await, new(n.into()));
    }
    let bundle = BundleRecord { epoch: 1, bundle: vec![1], signature: vec![2] };
    let key = NewKey { id: id(1), key_epoch: 1, modulus: modulus(7), signature: vec![3], bundle };
    store.rotate(key).await.unwrap();
    assert_eq!(numbers(&store, 0).await, [(2, id(2), 1)]);
    // Whoever verified it under the former key was too slow.
    assert_eq!(say(&store, 1, 2, NOW).await, Err(SayError::Unknown));
    let with_new_key = |number| NewPost { author: id(1), key_epoch: 1, post: post(number), now: NOW };
    assert_eq!(store.say(with_new_key(1)).await, Ok(Said::Repeat));
    assert_eq!(store.say(with_new_key(2)).await, new(3));
    store.revoke(&id(1), NOW, Refuse::silently(), announce()).await.unwrap();
    assert_eq!(numbers(&store, 0).await, [(2, id(2), 1)]);
    assert_eq!(store.say(with_new_key(3)).await, Err(SayError::Unknown));
    assert_eq!(store.posts(0, 0).await.unwrap().newest, 3);
}
