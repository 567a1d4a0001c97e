//! Messages that only hosts read: about devices to be enrolled (PROTOCOL 6.4), identity keys that follow others
//! (8.6), channels (4.10) and who comes and goes (7.5). Devices carry none of this. That is why everything is `inline`: it
//! is compiled where it is used, and the catalogue is not any larger for it.

use serde::{Deserialize, Serialize};

use super::bodies::bodies;
use super::message::{Body, fields, lines, next, put};
use super::{ID_LEN, MAX_NAME_LEN, Message, PeerStatus, SignedBundle};
use crate::error::Error;

/// The most entries of one batch of [`Enrol`]s.
pub const MAX_ENROL_BATCH: usize = 1000;
/// The most patterns of names that a connection watches at a time.
pub const MAX_WATCHED: usize = 16;

bodies! {
    CODES "The code of every message that only hosts read.";

    /// A device to be enrolled on behalf of the connected client, alone or in a batch (PROTOCOL 6.4). Only a whole batch is
    /// enrolled, and answered once: `Done` to its last entry, or `Refused` to the first one that is refused.
    Enrol ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// Which entry of its batch this is, from 0 on.
        index: u16,
        /// How many entries the batch has; at most [`MAX_ENROL_BATCH`].
        count: u16,
        /// The device.
        id: [u8; ID_LEN],
        /// Its name.
        name: &'d str,
        /// The modulus of its RSA key.
        modulus: &'d [u8],
        /// That key's signature over [`crate::enrolment_statement`].
        signature: &'d [u8],
    } = 0x0502

    /// A client replaces its identity key.
    Rotate ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// That of the new key: one more than that of the present one.
        key_epoch: u32,
        /// The new key's RSA modulus.
        modulus: &'d [u8],
        /// The present key's signature over [`crate::Rotation::statement`].
        signature: &'d [u8],
        /// The new key's signature over [`crate::Rotation::possession`].
        proof: &'d [u8],
        /// The bundle under the new key.
        #[serde(borrow)]
        bundle: SignedBundle<'d>,
    } = 0x0504

    /// Which key followed this one?
    SuccessorQuery [] from [Body<'_>] {
        /// Correlation id.
        request: u16,
        /// The client.
        id: [u8; ID_LEN],
        /// That of the key which is known.
        key_epoch: u32,
    } = 0x0505

    /// The key that followed another.
    Successor ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// Its RSA modulus.
        modulus: &'d [u8],
        /// The signature of the key before it over [`crate::Rotation::statement`].
        signature: &'d [u8],
    } = 0x0515

    /// Which channels of mine could be resumed?
    Channels [] from [Body<'_>] {
        /// Correlation id.
        request: u16,
    } = 0x0800

    /// End all my channels: my next connection makes a full handshake. This connection stands.
    ExpireChannels [] from [Body<'_>] {
        /// Correlation id.
        request: u16,
    } = 0x0801

    /// The channels that could be resumed; there are at most two.
    ChannelsResponse [] from [Body<'_>] {
        /// Correlation id.
        request: u16,
        /// One, in no order.
        first: Option<ChannelInfo>,
        /// The other.
        second: Option<ChannelInfo>,
    } = 0x0810

    /// Tell me who comes and goes among the clients whose names this pattern selects, and first who is there (PROTOCOL 7.5).
    Watch ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// The pattern: a name in which `*`, `?` and `[...]` stand for others.
        pattern: &'d str,
        /// Empty: from now on, and from the first name. Otherwise further names, from the one behind this on.
        after: &'d str,
    } = 0x0600

    /// Tell me no more of this pattern.
    Unwatch ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// The pattern, as it stood in [`Watch`].
        pattern: &'d str,
    } = 0x0601

    /// A page of those whom a watched pattern selects. It may be empty and not the last one.
    WatchResponse ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// From where the next page is to be asked for; empty: this is the last one.
        next: &'d str,
        /// Who is there, read with [`Change::lines`].
        lines: &'d [u8],
    } = 0x0610

    /// Clients that a watched pattern selects came, went, were enrolled or revoked.
    Changed ['d] from [Body<'d>] {
        /// There were too many changes to be kept until they could be sent: every pattern is to be asked for anew.
        lost: bool,
        /// What holds now, read with [`Change::lines`].
        lines: &'d [u8],
    } = 0x0620
}

/// A channel that the server would resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelInfo {
    /// Its id.
    pub id: [u8; ID_LEN],
    /// Seconds for which it can still be resumed.
    pub valid_for: u32,
}

fields!(ChannelInfo);

/// What holds of one client: a line of [`WatchResponse`] and [`Changed`]. What comes later is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<'d> {
    /// The client's id.
    pub id: [u8; ID_LEN],
    /// Its display name.
    pub name: &'d str,
    /// Whether it is there; `None` if it was revoked.
    pub status: Option<PeerStatus>,
}

impl<'d> Change<'d> {
    /// Bytes of the longest line: id, the longest name with its length, status with the longest time.
    pub const MAX_LEN: usize = ID_LEN + 1 + MAX_NAME_LEN + 1 + 1 + 1 + 10;

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
    use super::*;
    use crate::wire::testing::printed;
    use std::vec::Vec;

    const BUNDLE: SignedBundle<'static> = SignedBundle { bundle: &[1; 4], signature: &[2; 4] };

    /// Encodes and decodes through the catalogue, cut and lengthened too.
    fn check(message: &Message<'_>, name: &str, decode: impl Fn(Body<'_>) -> bool) {
        let mut bytes = [0; 128];
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
        let (modulus, signature, proof) = (&[10; 4][..], &[11; 4][..], &[13; 4][..]);
        let rotate = Rotate { request: 9, key_epoch: 1, modulus, signature, proof, bundle: BUNDLE };
        let mut buffer = [0; 64];
        let enrol = Enrol { request: 4, index: 0, count: 1, id: [5; 16], name: "s-1", modulus, signature };
        check(&enrol.encode(&mut buffer).unwrap(), "Enrol", |body| Enrol::decode(body) == Ok(enrol));
        check(&rotate.encode(&mut buffer).unwrap(), "Rotate", |body| Rotate::decode(body) == Ok(rotate));
        let query = SuccessorQuery { request: 10, id: [5; 16], key_epoch: 0 };
        check(&query.encode(&mut buffer).unwrap(), "Successor", |body| SuccessorQuery::decode(body) == Ok(query));
        let step = Successor { request: 10, modulus, signature };
        check(&step.encode(&mut buffer).unwrap(), "SuccessorResponse", |body| Successor::decode(body) == Ok(step));
        assert!(rotate.encode(&mut [0; 8]).is_err());
        let channels = Channels { request: 9 };
        check(&channels.encode(&mut buffer).unwrap(), "Channels", |body| Channels::decode(body) == Ok(channels));
        let expire = ExpireChannels { request: 10 };
        check(&expire.encode(&mut buffer).unwrap(), "ExpireChannels", |body| {
            ExpireChannels::decode(body) == Ok(expire)
        });
        let first = Some(ChannelInfo { id: [10; 16], valid_for: 604_800 });
        let held = ChannelsResponse { request: 9, first, second: None };
        check(&held.encode(&mut buffer).unwrap(), "ChannelsResponse", |body| {
            ChannelsResponse::decode(body) == Ok(held)
        });
        let watch = Watch { request: 11, pattern: "s-*", after: "" };
        check(&watch.encode(&mut buffer).unwrap(), "Watch", |body| Watch::decode(body) == Ok(watch));
        let unwatch = Unwatch { request: 12, pattern: "s-*" };
        check(&unwatch.encode(&mut buffer).unwrap(), "Unwatch", |body| Unwatch::decode(body) == Ok(unwatch));
        let (mut lines, mut len) = ([0; 128], 0);
        for line in [BOB, CAROL] {
            len += line.append(&mut lines[len..]).unwrap();
        }
        let (lines, gone) = lines.split_at_mut(len);
        let page = WatchResponse { request: 11, next: "carol", lines };
        let mut buffer = [0; 128];
        check(&page.encode(&mut buffer).unwrap(), "WatchResponse", |body| WatchResponse::decode(body) == Ok(page));
        let len = Change { status: None, ..BOB }.append(gone).unwrap();
        let changed = Changed { lost: false, lines: &gone[..len] };
        check(&changed.encode(&mut buffer).unwrap(), "Changed", |body| Changed::decode(body) == Ok(changed));
    }

    const BOB: Change<'static> = Change { id: [5; 16], name: "bob", status: Some(PeerStatus::Online) };
    const CAROL: Change<'static> =
        Change { id: [6; 16], name: "carol", status: Some(PeerStatus::Offline { last_seen: Some(1_700_000_000) }) };

    #[test]
    fn lines_of_changes_end_at_the_first_malformed_one() {
        let longest = "x".repeat(64);
        let all = [
            BOB,
            CAROL,
            Change { id: [7; 16], name: "dora", status: None },
            Change { name: &longest, status: Some(PeerStatus::Offline { last_seen: Some(u64::MAX) }), ..BOB },
        ];
        let mut bytes = Vec::new();
        for line in all {
            let mut room = [0; Change::MAX_LEN];
            let len = line.append(&mut room).unwrap();
            assert!(line.append(&mut room[..len - 1]).is_none());
            bytes.extend_from_slice(&room[..len]);
        }
        assert!(Change::lines(&bytes).eq(all.map(Ok)));
        let cut = Change::lines(&bytes[..bytes.len() - 1]).collect::<Vec<_>>();
        assert_eq!(cut, [Ok(all[0]), Ok(all[1]), Ok(all[2]), Err(Error::Decode)]);
        assert_eq!(Change::lines(&[]).next(), None);
    }

    #[test]
    fn the_request_is_known_also_where_the_rest_is_malformed() {
        for (payload, request) in [(&[5, 4, 0xac, 2, 0xff][..], 300), (&[5, 4, 9], 9), (&[5, 4], 0), (&[5, 4, 0xff], 0)]
        {
            let Ok(Message::Other(body)) = Message::decode(payload) else { panic!("{payload:?}") };
            assert_eq!((body.code(), body.request()), (Rotate::CODE, request));
            assert_eq!(Successor::decode(body), Err(Error::Decode));
            assert_eq!(Rotate::decode(body), Err(Error::Decode));
        }
    }
}
