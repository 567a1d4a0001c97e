//! Everything that is bytes on the network: the record header, the handshake records, the message catalogue.
//!
//! Wire types know no state and states know no bytes. Nothing here opens or seals; a value that decodes is well-formed
//! and no more. All integers are big endian, except inside postcard bodies, which postcard lays out (PROTOCOL 2, 3, 7).
//! postcard lives only here.

mod bodies;
mod groups;
mod hello;
mod hosts;
mod message;
mod public;
#[cfg(test)]
pub(crate) mod testing;

pub use groups::{
    Answer, CloseConversation, Closed, Fixed, GroupFlags, Init, Invite, MAX_MEMBERS, Member, MemberChanged,
    MemberState, Members, Names, SEALED_NAME_LEN, ToldBy,
};
pub(crate) use hello::Role;
pub(crate) use hello::{
    CAPABILITIES, Claimed, ClientAuth, ClientHello, HelloRetry, KIND_ENROLL, KIND_KEY, KIND_PASSWORD, MAX_COOKIE_LEN,
    Method, Mode, Offer, ServerAuth, ServerHello, Work,
};
pub use hello::{Login, MAX_PASSWORD_LEN, Password};
pub use hosts::{
    Change, Changed, ChannelInfo, Channels, ChannelsResponse, Enrol, ExpireChannels, MAX_ENROL_BATCH, MAX_WATCHED,
    Rotate, Successor, SuccessorQuery, Unwatch, Watch, WatchResponse,
};
pub(crate) use message::SEND_HEAD_LEN;
pub use message::{
    Body, DirectoryEntry, DirectoryList, Lookup, Message, PeerStatus, Presence, Receipt, Rung, Rungs, Settings,
    SignedBundle, Subject,
};
pub use public::{Follow, FollowResponse, MAX_POST_LEN, News, Post, Said, Say};

use crate::error::Error;

/// Bytes of the clear record header.
///
/// ```text
///  0      2      4      6      8                         len-16      len
///  | ver  | typ  | len  | sqn  |  payload                | tag (16)   |
/// ```
pub const HEADER_LEN: usize = 8;
/// Bytes that a sealed record adds to its payload: header and tag.
pub const RECORD_OVERHEAD: usize = HEADER_LEN + crate::crypto::TAG_LEN;
/// Bytes of the longest record that a host offers to receive: 16 KiB of payload.
pub const MAX_RECORD_LEN: usize = 16 * 1024 + RECORD_OVERHEAD;
/// Bytes of the shortest record limit that a node may offer.
pub const MIN_RECORD_LIMIT: usize = 1024;
/// Bytes of a client, server, conversation or channel id.
pub const ID_LEN: usize = 16;
/// Bytes of the longest display name, in UTF-8.
pub const MAX_NAME_LEN: usize = 64;

/// The longest ClientHello, ServerAuth and ClientAuth record, header included: checked before a byte is buffered.
pub(crate) const MAX_CLIENT_HELLO_LEN: usize = 256;
/// A HelloRetry with the shortest cookie and with the longest.
pub(crate) const HELLO_RETRY_LEN: core::ops::RangeInclusive<usize> = HEADER_LEN + 3..=HEADER_LEN + 2 + MAX_COOKIE_LEN;
pub(crate) const MAX_SERVER_AUTH_LEN: usize = 2048;
pub(crate) const MAX_CLIENT_AUTH_LEN: usize = 1536;

/// Version 1.0, in every header and in the offer.
pub(crate) const VERSION: u16 = 0x0100;
/// X25519, HKDF-SHA-256, AES-256-GCM with a 16-byte tag, RSASSA-PSS. The only suite.
pub(crate) const SUITE: u16 = 0x0001;

/// The outer type of a record. All that follows the handshake looks alike from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum RecordType {
    ClientHello = 0x0100,
    ServerHello = 0x0110,
    HelloRetry = 0x0120,
    ClientAuth = 0x0200,
    ServerAuth = 0x0210,
    Refusal = 0x0220,
    Application = 0x0300,
}

impl RecordType {
    pub(crate) const fn code(self) -> u16 {
        match self {
            Self::ClientHello => 0x0100,
            Self::ServerHello => 0x0110,
            Self::HelloRetry => 0x0120,
            Self::ClientAuth => 0x0200,
            Self::ServerAuth => 0x0210,
            Self::Refusal => 0x0220,
            Self::Application => 0x0300,
        }
    }

    const fn from_code(code: u16) -> Option<Self> {
        match code {
            0x0100 => Some(Self::ClientHello),
            0x0110 => Some(Self::ServerHello),
            0x0120 => Some(Self::HelloRetry),
            0x0200 => Some(Self::ClientAuth),
            0x0210 => Some(Self::ServerAuth),
            0x0220 => Some(Self::Refusal),
            0x0300 => Some(Self::Application),
            _ => None,
        }
    }
}

/// The clear header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: RecordType,
    /// Bytes of the whole record, this header included.
    pub(crate) len: u16,
    /// The low 16 bits of the record's counter.
    pub(crate) sequence: u16,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let [v1, v0] = VERSION.to_be_bytes();
        let [t1, t0] = self.kind.code().to_be_bytes();
        let [l1, l0] = self.len.to_be_bytes();
        let [s1, s0] = self.sequence.to_be_bytes();
        [v1, v0, t1, t0, l1, l0, s1, s0]
    }

    /// # Errors
    /// [`Error::Decode`] for another version, an unknown type or a length below that of the header.
    pub(crate) fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, Error> {
        let [v1, v0, t1, t0, l1, l0, s1, s0] = bytes;
        let len = u16::from_be_bytes([l1, l0]);
        match RecordType::from_code(u16::from_be_bytes([t1, t0])) {
            Some(kind) if u16::from_be_bytes([v1, v0]) == VERSION && usize::from(len) >= HEADER_LEN => {
                Ok(Self { kind, len, sequence: u16::from_be_bytes([s1, s0]) })
            }
            _ => Err(Error::Decode),
        }
    }
}

/// Takes fields off the front of a message. Every method fails alike: malformed is malformed.
pub(crate) struct Reader<'d>(&'d [u8]);

impl<'d> Reader<'d> {
    pub(crate) const fn new(bytes: &'d [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'d [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Error::Decode)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Error::Decode)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Error> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_be_bytes)
    }

    /// Bytes behind a length byte.
    pub(crate) fn short(&mut self) -> Result<&'d [u8], Error> {
        let len = self.u8()?;
        self.bytes(len.into())
    }

    /// Everything that is left, except the last `keep` bytes.
    pub(crate) fn rest(&mut self, keep: usize) -> Result<&'d [u8], Error> {
        let len = self.0.len().checked_sub(keep).ok_or(Error::Decode)?;
        self.bytes(len)
    }

    pub(crate) const fn end(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Decode) }
    }
}

/// Appends fields to a buffer. Running out of room is remembered and told at the end.
pub(crate) struct Writer<'b> {
    buffer: &'b mut [u8],
    len: usize,
    full: bool,
}

impl<'b> Writer<'b> {
    pub(crate) const fn new(buffer: &'b mut [u8]) -> Self {
        Self { buffer, len: 0, full: false }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let end = self.len.saturating_add(bytes.len());
        match self.buffer.get_mut(self.len..end) {
            Some(room) if !self.full => {
                room.copy_from_slice(bytes);
                self.len = end;
            }
            _ => self.full = true,
        }
        self
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Bytes behind a length byte; longer than 255 counts as full.
    pub(crate) fn short(&mut self, bytes: &[u8]) -> &mut Self {
        match u8::try_from(bytes.len()) {
            Ok(len) => self.u8(len).bytes(bytes),
            Err(_) => {
                self.full = true;
                self
            }
        }
    }

    /// The number of bytes written, or `None` if they did not fit.
    pub(crate) const fn finish(&self) -> Option<usize> {
        if self.full { None } else { Some(self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_refuse() {
        let header = Header { kind: RecordType::Application, len: 76, sequence: 0xfffe };
        assert_eq!(header.encode(), [1, 0, 3, 0, 0, 76, 0xff, 0xfe]);
        assert_eq!(Header::decode(header.encode()), Ok(header));
        for bytes in [[1, 1, 3, 0, 0, 76, 0, 0], [1, 0, 3, 1, 0, 76, 0, 0], [1, 0, 3, 0, 0, 7, 0, 0]] {
            assert_eq!(Header::decode(bytes), Err(Error::Decode));
        }
    }

    #[test]
    fn a_writer_remembers_that_it_was_full() {
        let mut buffer = [0; 4];
        let mut writer = Writer::new(&mut buffer);
        writer.u16(1).bytes(&[2, 3, 4]).u8(5);
        assert_eq!(writer.finish(), None);
    }
}
