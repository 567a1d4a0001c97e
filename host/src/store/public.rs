//! The public conversation: what was said to everybody, the last of it, in the order in which it came.
//!
//! Each post has a number that no other ever has, also after the posts before it went. Of each author the last count is
//! kept for as long as he is known, so that nothing of his comes twice or goes back.

use super::{ClientId, MemberSignature, StoreError};

/// A post to be kept. Everything that can be verified was.
#[derive(Clone, Debug)]
pub struct NewPost {
    /// Who says it.
    pub author: ClientId,
    /// How often his identity key was changed, as far as the caller knows.
    pub key_epoch: u32,
    /// What he says.
    pub post: Post,
    /// The time.
    pub now: u64,
}

/// What was said, as its author signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Post {
    /// The author's count.
    pub number: u64,
    /// When, in milliseconds, by the author's clock.
    pub at: u64,
    /// The epoch of the author's bundle.
    pub epoch: u32,
    /// The application's kind.
    pub kind: u8,
    /// The author's signature, opaque here.
    pub signature: MemberSignature,
    /// What is said.
    pub body: Vec<u8>,
}

/// A post that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptPost {
    /// Its number.
    pub seq: u64,
    /// Who said it.
    pub author: ClientId,
    /// What.
    pub post: Post,
}

/// What saying something did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is kept, under this number.
    New {
        /// The number.
        seq: u64,
    },
    /// It was kept before, and nothing was changed.
    Repeat,
}

/// Some of the posts, and where they end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Posts {
    /// The number of the last post that there ever was; 0 if there was none.
    pub newest: u64,
    /// What was asked for, in the order of the numbers.
    pub posts: Vec<KeptPost>,
}

/// Why a post was not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SayError {
    /// The author has said something under this count, or a higher one.
    #[error("its author has said something under this number, or a higher one")]
    Rewound,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The author is unknown or revoked, or has another key by now.
    #[error("its author is unknown or revoked, or has another key")]
    Unknown,
}
