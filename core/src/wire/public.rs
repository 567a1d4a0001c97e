//! Messages about the public conversation: what a client says to everybody, and what was said (PROTOCOL 9.9 and 7.5).
//!
//! What decodes is well-formed and no more: signatures are verified by [`Post::verify`]. Nothing of this goes to a client
//! that does not ask for it. Like what only hosts read, everything is `inline`: whoever does not follow carries none of it.

use serde::{Deserialize, Serialize};

use super::bodies::bodies;
use super::groups::Fixed;
use super::message::{Body, fields, lines, next, put};
use super::{ID_LEN, Message};
use crate::crypto::SIGNATURE_LEN;
use crate::error::Error;

/// Bytes of the longest post: with all that stands around it, it fits into the shortest record that anybody may offer.
pub const MAX_POST_LEN: usize = 800;

bodies! {
    PUBLIC_CODES "The code of every message about the public conversation.";

    /// The connected client says something to everybody. Answered when it is durable.
    Say ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// What it says.
        #[serde(borrow)]
        post: Post<'d>,
    } = 0x0201

    /// What was said behind this number? Where this gives the last there is, [`News`] comes when there is more.
    Follow [] from [Body<'_>] {
        /// Correlation id.
        request: u16,
        /// The number; 0: from the oldest that is kept.
        after: u64,
    } = 0x0202

    /// What was said, in the order of its numbers.
    FollowResponse ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// There is more behind the last of these.
        more: bool,
        /// What was said, read with [`Said::lines`].
        lines: &'d [u8],
    } = 0x0212

    /// Something was said since the client was given the last there was. Comes once for each [`Follow`] at most.
    News [] from [Body<'_>] {} = 0x0222
}

/// What a client says to everybody, under its signature. Readable by every member of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Post<'d> {
    /// The author's count: higher than that of any post of his before.
    pub number: u64,
    /// When, in milliseconds since 1970, as the author says.
    pub at: u64,
    /// The epoch of the author's bundle.
    pub epoch: u32,
    /// The application's kind, 0 to [`crate::MAX_KIND`].
    pub kind: u8,
    /// By the `verifying` key of that bundle.
    #[serde(borrow)]
    pub signature: Fixed<'d, SIGNATURE_LEN>,
    /// What is said, 1 to [`MAX_POST_LEN`] bytes.
    pub body: &'d [u8],
}

fields!(Post<'d>);

/// A post and its place: a line of [`FollowResponse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said<'d> {
    /// Its number at the server. The server's word.
    pub seq: u64,
    /// Who said it, stamped by the server.
    pub author: [u8; ID_LEN],
    /// What.
    #[serde(borrow)]
    pub post: Post<'d>,
}

impl<'d> Said<'d> {
    /// Bytes of the longest line.
    pub const MAX_LEN: usize = 10 + ID_LEN + 10 + 10 + 5 + 1 + 1 + SIGNATURE_LEN + 2 + MAX_POST_LEN;

    /// Encodes this line to the front of `out` and returns its length, or `None` if there is no room.
    #[inline]
    pub fn append(&self, out: &mut [u8]) -> Option<usize> {
        put(self, out).ok()
    }

    /// The lines one after the other, up to the first that is malformed, which is an [`Error::Decode`].
    #[inline]
    pub fn lines(bytes: &'d [u8]) -> impl Iterator<Item = Result<Self, Error>> + use<'d> {
        lines(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::wire::testing::printed;
    use crate::wire::{MIN_RECORD_LIMIT, RECORD_OVERHEAD};

    const POST: Post<'static> = Post {
        number: 1_790_000_000_123,
        at: 1_790_000_000_123,
        epoch: 3,
        kind: 0,
        signature: Fixed(&[11; 64]),
        body: b"hello, all",
    };
    const SAID: Said<'static> = Said { seq: 300, author: [5; 16], post: POST };

    /// Encodes and decodes through the catalogue, cut and lengthened too.
    fn check(message: &Message<'_>, name: &str, decode: impl Fn(Body<'_>) -> bool) {
        let mut bytes = [0; 512];
        let len = message.encode(&mut bytes).unwrap();
        assert_eq!(printed("7.1", name), bytes[..len], "{name}");
        for end in 2..=len + 1 {
            let body = match Message::decode(&bytes[..end]) {
                Ok(Message::Other(body)) => body,
                other => panic!("{other:?}"),
            };
            assert_eq!(decode(body), end == len, "{name}: {end} of {len} bytes");
        }
        for room in 0..len {
            assert!(message.encode(&mut bytes[..room]).is_err(), "{name} in {room} bytes");
        }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let mut buffer = [0; 512];
        let say = Say { request: 16, post: POST };
        check(&say.encode(&mut buffer).unwrap(), "Say", |body| Say::decode(body) == Ok(say));
        let follow = Follow { request: 17, after: 299 };
        check(&follow.encode(&mut buffer).unwrap(), "Follow", |body| Follow::decode(body) == Ok(follow));
        let mut lines = [0; Said::MAX_LEN];
        let len = SAID.append(&mut lines).unwrap();
        let page = FollowResponse { request: 17, more: false, lines: &lines[..len] };
        check(&page.encode(&mut buffer).unwrap(), "FollowResponse", |body| FollowResponse::decode(body) == Ok(page));
        check(&News {}.encode(&mut buffer).unwrap(), "News", |body| News::decode(body) == Ok(News {}));
    }

    #[test]
    fn the_longest_post_fits_into_the_shortest_record() {
        let body = [0xff; MAX_POST_LEN];
        let post = Post { number: u64::MAX, at: u64::MAX, epoch: u32::MAX, body: &body, ..POST };
        let said = Said { seq: u64::MAX, post, ..SAID };
        let mut line = [0; Said::MAX_LEN];
        assert_eq!(said.append(&mut line), Some(Said::MAX_LEN));
        assert_eq!(said.append(&mut line[1..]), None);
        let page = FollowResponse { request: u16::MAX, more: true, lines: &line };
        let say = Say { request: u16::MAX, post };
        let (mut buffer, mut record) = ([0; 1024], [0; MIN_RECORD_LIMIT - RECORD_OVERHEAD]);
        assert!(page.encode(&mut buffer).unwrap().encode(&mut record).is_ok());
        assert!(say.encode(&mut buffer).unwrap().encode(&mut record).is_ok());
    }

    #[test]
    fn lines_end_at_the_first_malformed_one() {
        let mut bytes = Vec::new();
        let all = [SAID, Said { seq: 301, post: Post { body: b"", ..POST }, ..SAID }];
        for line in all {
            let mut room = [0; Said::MAX_LEN];
            let len = line.append(&mut room).unwrap();
            bytes.extend_from_slice(&room[..len]);
        }
        assert!(Said::lines(&bytes).eq(all.map(Ok)));
        let cut = Said::lines(&bytes[..bytes.len() - 1]).collect::<Vec<_>>();
        assert_eq!(cut, [Ok(SAID), Err(Error::Decode)]);
        assert_eq!(Said::lines(&[]).next(), None);
    }
}
