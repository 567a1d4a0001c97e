//! Messages about groups: who is invited, who joined, that it is over (PROTOCOL 9.2 and 7.5).
//!
//! Lists are bytes of the record: they are checked once, when the message is read, and their lines are then read in place,
//! since nobody here owns memory for all of them. What decodes is well-formed and no more: signatures and keys are checked
//! by [`crate::Membership`]. Like what only hosts read, everything is `inline`: a device that is in no group carries none
//! of it.

use serde::{Deserialize, Serialize};

use super::bodies::bodies;
use super::message::{Body, Field, fields, next, put};
use super::{ID_LEN, Message, Receipt};
use crate::crypto::{HASH_LEN, SIGNATURE_LEN, TAG_LEN};
use crate::error::Error;

/// Members of the largest conversation.
pub const MAX_MEMBERS: usize = 64;
/// Bytes of a group's name that is sealed to one invitee: prekey id, encapsulated key, the name with its length and padded
/// to the longest one, tag (PROTOCOL 9.2).
pub const SEALED_NAME_LEN: usize = 4 + HASH_LEN + 1 + super::MAX_NAME_LEN + TAG_LEN;

bodies! {
    GROUP_CODES "The code of every message about groups.";

    /// Found a group. Answered when it is durable, before anybody answered his invitation.
    Init ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// The group's id, which its creator draws; one that was in use or closed is refused.
        sid: [u8; ID_LEN],
        /// Its rules.
        flags: GroupFlags,
        /// The creator's [`crate::Decision::Init`].
        #[serde(borrow)]
        signature: Fixed<'d, SIGNATURE_LEN>,
        /// Everybody, the creator too.
        #[serde(borrow)]
        members: Members<'d>,
        /// The name of the group, sealed to each of the others, in their order.
        #[serde(borrow)]
        names: Names<'d>,
    } = 0x0000

    /// The connected client is invited to a group. Waits for him in his queue.
    Invite ['d] from [Body<'d>] {
        /// The group's id.
        sid: [u8; ID_LEN],
        /// Who founded it, stamped by the server.
        creator: [u8; ID_LEN],
        /// Its rules.
        flags: GroupFlags,
        /// The creator's [`crate::Decision::Init`].
        #[serde(borrow)]
        signature: Fixed<'d, SIGNATURE_LEN>,
        /// Everybody, the creator and the invitee too.
        #[serde(borrow)]
        members: Members<'d>,
        /// The name of the group, sealed to the invitee.
        #[serde(borrow)]
        name: Fixed<'d, SEALED_NAME_LEN>,
    } = 0x0320

    /// The connected client accepts or declines an invitation.
    Answer ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// The group's id.
        sid: [u8; ID_LEN],
        /// Whether it joins.
        accept: bool,
        /// Its [`crate::Decision::Accept`] or [`crate::Decision::Decline`].
        #[serde(borrow)]
        signature: Fixed<'d, SIGNATURE_LEN>,
    } = 0x0300

    /// What became of a member. Waits in the queues of the creator and of all who accepted.
    MemberChanged ['d] from [Body<'d>] {
        /// The group's id.
        sid: [u8; ID_LEN],
        /// The member.
        member: [u8; ID_LEN],
        /// What it is now.
        state: MemberState,
        /// The member's decision, there where it accepted or declined.
        #[serde(borrow)]
        signature: Option<Fixed<'d, SIGNATURE_LEN>>,
    } = 0x0321

    /// End a group for everybody.
    CloseConversation ['d] from [Body<'d>] {
        /// Correlation id.
        request: u16,
        /// The group's id.
        sid: [u8; ID_LEN],
        /// The closer's [`crate::Decision::Close`].
        #[serde(borrow)]
        signature: Fixed<'d, SIGNATURE_LEN>,
    } = 0x0100

    /// A group is over. Waits in the queues of its members.
    Closed ['d] from [Body<'d>] {
        /// The group's id.
        sid: [u8; ID_LEN],
        /// Who closed it; the server itself if nobody.
        by: Option<[u8; ID_LEN]>,
        /// The closer's decision.
        #[serde(borrow)]
        signature: Option<Fixed<'d, SIGNATURE_LEN>>,
    } = 0x0120

    /// What became of messages to several recipients with one of them: his word, or the server's about him.
    ToldBy [] from [Body<'_>] {
        /// The recipient.
        from: [u8; ID_LEN],
        /// What became of them.
        receipt: Receipt,
    } = 0x0211
}

/// The rules of a group, which its creator signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct GroupFlags(u8);

impl GroupFlags {
    /// Any member who accepted may close the group.
    pub const NONE: Self = Self(0);
    /// Only its creator may.
    pub const CREATOR_CLOSES: Self = Self(1);

    /// The byte on the wire.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The rules that this byte stands for, if it stands for any.
    #[inline]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits & !Self::CREATOR_CLOSES.0 == 0 { Some(Self(bits)) } else { None }
    }

    /// Whether only the creator may close the group.
    #[inline]
    pub const fn only_creator_closes(self) -> bool {
        self.0 & Self::CREATOR_CLOSES.0 != 0
    }
}

impl Serialize for GroupFlags {
    #[inline]
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.0)
    }
}

impl<'de> Deserialize<'de> for GroupFlags {
    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_bits(u8::deserialize(deserializer)?).ok_or_else(|| serde::de::Error::custom("no such rule"))
    }
}

impl<'d> Field<'d> for GroupFlags {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Self::from_bits(next(rest)?).ok_or(Error::Decode)
    }
}

fields!(MemberState);

/// What became of a member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum MemberState {
    /// It joined: its signature says so.
    Accepted,
    /// It stays away: its signature says so.
    Declined,
    /// It did not answer in time. The server's word.
    Expired,
    /// It may not enter the server any more. The server's word.
    Revoked,
}

/// A member of a conversation: an id, and the identity key that it is pinned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The client's id.
    pub id: [u8; ID_LEN],
    /// SHA-256 of its SubjectPublicKeyInfo.
    pub key: [u8; HASH_LEN],
}

impl Member {
    /// Bytes of a line of [`Members`].
    pub const LEN: usize = ID_LEN + HASH_LEN;

    /// A line of [`Members`].
    #[inline]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut line = [0; Self::LEN];
        for (to, from) in line.iter_mut().zip(self.id.iter().chain(&self.key)) {
            *to = *from;
        }
        line
    }

    #[inline]
    fn decode(line: &[u8; Self::LEN]) -> Self {
        let (mut id, mut key) = ([0; ID_LEN], [0; HASH_LEN]);
        for (to, from) in id.iter_mut().chain(&mut key).zip(line) {
            *to = *from;
        }
        Self { id, key }
    }
}

/// The members of a group, in the order of their ids, each of them once, 2 to [`MAX_MEMBERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Members<'d>(&'d [[u8; Member::LEN]]);

impl<'d> Members<'d> {
    /// Takes lines, each of them [`Member::encode`]d, one after the other.
    ///
    /// # Errors
    /// [`Error::Decode`] unless they are what this type says.
    #[inline]
    pub fn new(lines: &'d [u8]) -> Result<Self, Error> {
        let (lines, rest) = lines.as_chunks();
        let sorted = lines.is_sorted_by(|a, b| id_of(a) < id_of(b));
        let good = rest.is_empty() && sorted && (2..=MAX_MEMBERS).contains(&lines.len());
        if good { Ok(Self(lines)) } else { Err(Error::Decode) }
    }

    /// The lines as they are on the wire, which is also how they are hashed.
    #[inline]
    pub const fn bytes(&self) -> &'d [u8] {
        self.0.as_flattened()
    }

    /// How many there are.
    #[inline]
    pub const fn count(&self) -> usize {
        self.0.len()
    }

    /// The members in their order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Member> + Clone + use<'d> {
        self.0.iter().map(Member::decode)
    }

    /// Who has this id.
    #[inline]
    pub fn find(&self, id: &[u8; ID_LEN]) -> Option<Member> {
        self.iter().find(|member| member.id == *id)
    }
}

/// The id at the front of a line.
#[inline]
fn id_of(line: &[u8; Member::LEN]) -> Option<&[u8; ID_LEN]> {
    line.first_chunk()
}

impl Serialize for Members<'_> {
    #[inline]
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.bytes())
    }
}

impl<'de: 'd, 'd> Deserialize<'de> for Members<'d> {
    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(<&[u8]>::deserialize(deserializer)?).map_err(|_| serde::de::Error::custom("no list of members"))
    }
}

impl<'d> Field<'d> for Members<'d> {
    #[inline]
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Self::new(next(rest)?)
    }
}

/// The name of a group, sealed to each of its members but one: 1 to 63 lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names<'d>(&'d [[u8; SEALED_NAME_LEN]]);

impl<'d> Names<'d> {
    /// Takes lines of [`SEALED_NAME_LEN`] bytes, one after the other.
    ///
    /// # Errors
    /// [`Error::Decode`] unless they are what this type says.
    #[inline]
    pub fn new(lines: &'d [u8]) -> Result<Self, Error> {
        let (lines, rest) = lines.as_chunks();
        let good = rest.is_empty() && (1..MAX_MEMBERS).contains(&lines.len());
        if good { Ok(Self(lines)) } else { Err(Error::Decode) }
    }

    /// The lines as they are on the wire.
    #[inline]
    pub const fn bytes(&self) -> &'d [u8] {
        self.0.as_flattened()
    }

    /// How many there are.
    #[inline]
    pub const fn count(&self) -> usize {
        self.0.len()
    }

    /// The sealed names in their order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'d [u8; SEALED_NAME_LEN]> + Clone + use<'d> {
        self.0.iter()
    }
}

impl Serialize for Names<'_> {
    #[inline]
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.bytes())
    }
}

impl<'de: 'd, 'd> Deserialize<'de> for Names<'d> {
    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(<&[u8]>::deserialize(deserializer)?).map_err(|_| serde::de::Error::custom("no list of names"))
    }
}

impl<'d> Field<'d> for Names<'d> {
    #[inline]
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Self::new(next(rest)?)
    }
}

impl<'d> Init<'d> {
    /// Everybody whom `creator` invites, each with the name that is sealed to him.
    ///
    /// # Errors
    /// [`Error::Decode`] unless `creator` is a member, and there is a name for each of the others and no more.
    #[inline]
    pub fn invitees(
        &self,
        creator: &[u8; ID_LEN],
    ) -> Result<impl Iterator<Item = (Member, &'d [u8; SEALED_NAME_LEN])> + use<'d>, Error> {
        let creator = *creator;
        if self.members.find(&creator).is_none() || self.names.count() + 1 != self.members.count() {
            return Err(Error::Decode);
        }
        Ok(self.members.iter().filter(move |member| member.id != creator).zip(self.names.iter()))
    }
}

/// Exactly `N` bytes of a record, of which the length stands before them; another length is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed<'d, const N: usize>(pub &'d [u8; N]);

impl<const N: usize> Serialize for Fixed<'_, N> {
    #[inline]
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'd, 'd, const N: usize> Deserialize<'de> for Fixed<'d, N> {
    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = <&[u8]>::deserialize(deserializer)?;
        bytes.try_into().map(Self).map_err(|_| serde::de::Error::custom("another length"))
    }
}

impl<'d, const N: usize> Field<'d> for Fixed<'d, N> {
    #[inline]
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        <&[u8]>::next(rest)?.try_into().map(Self).map_err(|_| Error::Decode)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::error::Reason;
    use crate::wire::Rung;
    use crate::wire::testing::printed;

    const SID: [u8; ID_LEN] = [0x0e; ID_LEN];
    const SIGNATURE: Fixed<'static, 64> = Fixed(&[0x0b; 64]);
    const NAME: [u8; SEALED_NAME_LEN] = [0x11; SEALED_NAME_LEN];

    fn list(ids: &[u8]) -> Vec<u8> {
        ids.iter().flat_map(|id| Member { id: [*id; 16], key: [id + 1; 32] }.encode()).collect()
    }

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
        let lines = list(&[5, 7]);
        let (flags, signature) = (GroupFlags::CREATOR_CLOSES, SIGNATURE);
        let (members, names) = (Members::new(&lines).unwrap(), Names::new(&NAME).unwrap());
        let mut buffer = [0; 512];
        let init = Init { request: 13, sid: SID, flags, signature, members, names };
        check(&init.encode(&mut buffer).unwrap(), "Init", |body| Init::decode(body) == Ok(init));
        let invite = Invite { sid: SID, creator: [5; 16], flags, signature, members, name: Fixed(&NAME) };
        check(&invite.encode(&mut buffer).unwrap(), "Invite", |body| Invite::decode(body) == Ok(invite));
        let answer = Answer { request: 14, sid: SID, accept: true, signature };
        check(&answer.encode(&mut buffer).unwrap(), "Answer", |body| Answer::decode(body) == Ok(answer));
        let changed =
            MemberChanged { sid: SID, member: [7; 16], state: MemberState::Accepted, signature: Some(signature) };
        check(&changed.encode(&mut buffer).unwrap(), "MemberChanged", |body| {
            MemberChanged::decode(body) == Ok(changed)
        });
        let late = MemberChanged { state: MemberState::Expired, signature: None, ..changed };
        check(&late.encode(&mut buffer).unwrap(), "MemberChanged-late", |body| MemberChanged::decode(body) == Ok(late));
        let close = CloseConversation { request: 15, sid: SID, signature };
        check(&close.encode(&mut buffer).unwrap(), "CloseConversation", |body| {
            CloseConversation::decode(body) == Ok(close)
        });
        let closed = Closed { sid: SID, by: Some([5; 16]), signature: Some(signature) };
        check(&closed.encode(&mut buffer).unwrap(), "Closed", |body| Closed::decode(body) == Ok(closed));
        let by_server = Closed { by: None, signature: None, ..closed };
        check(&by_server.encode(&mut buffer).unwrap(), "Closed-server", |body| Closed::decode(body) == Ok(by_server));
        let receipt = Receipt {
            rung: Rung::Refused,
            reason: Some(Reason::QueueFull),
            chain: [3; 8],
            from: 1,
            to: 200,
            tag: None,
        };
        let told = ToldBy { from: [7; 16], receipt };
        check(&told.encode(&mut buffer).unwrap(), "ToldBy", |body| ToldBy::decode(body) == Ok(told));
    }

    #[test]
    fn lists_are_sorted_single_and_bounded() {
        let full: Vec<_> = (0..64).collect();
        for good in [&[1, 2][..], &[0, 9, 255 - 1], &full] {
            let lines = list(good);
            let members = Members::new(&lines).unwrap();
            assert_eq!((members.count(), members.bytes()), (good.len(), &lines[..]));
            assert!(members.iter().map(|member| member.id[0]).eq(good.iter().copied()));
            for id in 0..=255 {
                let found = members.find(&[id; 16]);
                assert_eq!(found.is_some(), good.contains(&id), "{id}");
                assert!(found.is_none_or(|member| member == Member { id: [id; 16], key: [id + 1; 32] }));
            }
        }
        let more: Vec<_> = (0..65).collect();
        for bad in [&[][..], &[1], &[2, 1], &[1, 1], &[1, 3, 2], &[1, 2, 2], &more] {
            assert_eq!(Members::new(&list(bad)), Err(Error::Decode), "{bad:?}");
        }
        let two = list(&[1, 2]);
        for len in 0..2 * Member::LEN {
            assert_eq!(Members::new(&two[..len]), Err(Error::Decode), "{len} bytes");
        }
        assert_eq!(Members::new(&[&two[..], &[3]].concat()), Err(Error::Decode));

        let lines = [NAME; 64];
        for count in 0..=64 {
            let names = Names::new(lines[..count].as_flattened());
            assert_eq!(names.is_ok(), (1..64).contains(&count), "{count}");
            assert!(names.is_err() || names.is_ok_and(|names| names.iter().eq(&lines[..count])));
        }
        assert_eq!(Names::new(&NAME[..116]), Err(Error::Decode));
        assert_eq!(Names::new(&lines.as_flattened()[..118]), Err(Error::Decode));
    }

    #[test]
    fn every_invitee_has_a_name() {
        let (lines, sealed) = (list(&[1, 2, 3]), [[1; SEALED_NAME_LEN], [2; SEALED_NAME_LEN]]);
        let init = Init {
            request: 1,
            sid: SID,
            flags: GroupFlags::NONE,
            signature: SIGNATURE,
            members: Members::new(&lines).unwrap(),
            names: Names::new(sealed.as_flattened()).unwrap(),
        };
        for (creator, others) in [(1, [2, 3]), (2, [1, 3]), (3, [1, 2])] {
            let invited: Vec<_> = init.invitees(&[creator; 16]).unwrap().collect();
            assert_eq!(invited.len(), 2);
            for ((member, name), (id, sealed)) in invited.into_iter().zip(others.into_iter().zip(&sealed)) {
                assert_eq!((member.id, name), ([id; 16], sealed));
            }
        }
        assert!(init.invitees(&[4; 16]).is_err(), "its creator is none of them");
        for count in [1, 3] {
            let names = [NAME; 3];
            let other = Init { names: Names::new(names[..count].as_flattened()).unwrap(), ..init };
            assert!(other.invitees(&[1; 16]).is_err(), "{count} names for two");
        }
    }

    #[test]
    fn unknown_rules_states_and_lengths_are_malformed() {
        let mut buffer = [0; 512];
        let answer = Answer { request: 1, sid: SID, accept: true, signature: SIGNATURE };
        let Message::Other(body) = answer.encode(&mut buffer).unwrap() else { panic!("a body") };
        let bytes = body.bytes().to_vec();
        for (place, value) in [(17, 2), (18, 63), (18, 65)] {
            let mut other = bytes.clone();
            other[place] = value;
            assert_eq!(Answer::decode(Body::new(Answer::CODE, &other)), Err(Error::Decode), "{place}: {value}");
        }
        let changed = MemberChanged { sid: SID, member: SID, state: MemberState::Revoked, signature: None };
        let Message::Other(body) = changed.encode(&mut buffer).unwrap() else { panic!("a body") };
        let mut other = body.bytes().to_vec();
        other[32] = 4;
        assert_eq!(MemberChanged::decode(Body::new(MemberChanged::CODE, &other)), Err(Error::Decode));
        for bits in 0..=255 {
            assert_eq!(GroupFlags::from_bits(bits).map(GroupFlags::bits), (bits < 2).then_some(bits));
        }
        assert!(GroupFlags::CREATOR_CLOSES.only_creator_closes() && !GroupFlags::NONE.only_creator_closes());
    }

    #[test]
    fn an_invitation_of_five_fits_the_smallest_record() {
        let (mut buffer, mut payload) = ([0; 2048], [0; 2048]);
        let lengths = [5, 16, 17].map(|count: u8| {
            let ids: Vec<_> = (0..count).collect();
            let lines = list(&ids);
            let members = Members::new(&lines).unwrap();
            let (flags, name) = (GroupFlags::NONE, Fixed(&NAME));
            let invite = Invite { sid: SID, creator: SID, flags, signature: SIGNATURE, members, name };
            invite.encode(&mut buffer).unwrap().encode(&mut payload).unwrap() + crate::wire::RECORD_OVERHEAD
        });
        assert_eq!(lengths, [484, 1012, 1060], "and so does one of sixteen");
    }
}
