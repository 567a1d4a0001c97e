//! The public conversation: saying something, and reading what was said (PROTOCOL 9.9).
//!
//! A post is verified before it is kept, so that no reader has to drop what an honest server gave him; no reader relies on
//! that. Readers are given what they ask for, and one word when there is more.

use core::num::NonZeroUsize;

use ossicle_core::{Body, Bundle, Follow, FollowResponse, MAX_POST_LEN, Reason, Said as Line, Say};
use tracing::debug;
use uuid::Uuid;

use super::{Answered, Asker, Refusal, encode};
use crate::bus::Hint;
use crate::mailbox::Owed;
use crate::server::Server;
use crate::store::{KeptPost, NewPost, Post, Posts, Said, SayError};

/// Posts that are asked of the store at once.
const PAGE: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// Code, request, `more` and the length of the lines.
const HEAD: usize = 2 + 3 + 1 + 3;

/// A client says something to everybody. `Done` comes when it is durable.
pub(super) async fn say(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Say { request, post } = Say::decode(body).map_err(|_| Reason::Malformed)?;
    if post.body.len() > MAX_POST_LEN {
        return Err(Reason::TooLarge.into());
    }
    if !post.is_proper() {
        return Err(Reason::Malformed.into());
    }
    server.limits.post(&asker.id).map_err(|wait| Refusal { reason: Reason::Rate, retry_after: Some(wait) })?;
    let client = server.store.client(&asker.id).await?.filter(|client| !client.revoked).ok_or(Reason::Unauthorised)?;
    let held = server.store.bundle(&asker.id).await?.ok_or(Reason::Unauthorised)?;
    let bundle = Bundle::decode(&held.bundle).map_err(|_| Reason::Unauthorised)?;
    post.verify(&server.fingerprint(), &bundle).map_err(|_| Reason::Unauthorised)?;
    let new = NewPost {
        author: asker.id,
        key_epoch: client.key_epoch,
        post: Post {
            number: post.number,
            at: post.at,
            epoch: post.epoch,
            kind: post.kind,
            signature: *post.signature.0,
            body: post.body.to_vec(),
        },
        now: server.now(),
    };
    let said = server.store.say(new).await.map_err(|error| match error {
        SayError::Rewound => Reason::Rewound.into(),
        SayError::Unknown => Reason::Unauthorised.into(),
        SayError::Store(error) => Refusal::from(error),
    })?;
    if let Said::New { seq } = said {
        server.metrics.posts.count();
        debug!(by = %Uuid::from_bytes(asker.id), seq, "a post");
        server.followers.see(seq);
        server.bus.hint(Hint::Public);
    }
    Ok(Some(Owed::Done(request)))
}

/// What was said behind a number, as much as fits into one record.
pub(super) async fn follow(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Follow { request, after } = Follow::decode(body).map_err(|_| Reason::Malformed)?;
    server.followers.wait(&asker.mailbox);
    let Posts { newest, posts } = server.store.posts(after, PAGE.get()).await?;
    if after > newest {
        server.followers.forget(asker.mailbox.connection());
        return Err(Reason::Rewound.into());
    }
    let mut more = posts.len() == PAGE.get();
    let mut lines = vec![0; asker.mailbox.max_payload().saturating_sub(HEAD)];
    let mut len = 0;
    for kept in &posts {
        match line(kept).append(lines.get_mut(len..).unwrap_or_default()) {
            Some(line) => len += line,
            None => {
                more = true;
                break;
            }
        }
    }
    if more {
        // It asks again anyway.
        server.followers.forget(asker.mailbox.connection());
    }
    let page = FollowResponse { request, more, lines: lines.get(..len).unwrap_or_default() };
    let mut buffer = vec![0; asker.mailbox.max_payload()];
    encode(asker, &page.encode(&mut buffer).map_err(|_| Reason::Unavailable)?)
}

fn line(kept: &KeptPost) -> Line<'_> {
    let KeptPost { seq, author, post } = kept;
    let Post { number, at, epoch, kind, signature, body } = post;
    let post = ossicle_core::Post {
        number: *number,
        at: *at,
        epoch: *epoch,
        kind: *kind,
        signature: ossicle_core::Fixed(signature),
        body,
    };
    Line { seq: *seq, author: *author, post }
}
