//! The message catalogue: what is said inside application records once the handshake is over (PROTOCOL 7).
//!
//! A payload is a code of two bytes and a postcard body; three messages end in raw bytes that run to the end of the
//! record, so that a reading costs one byte beside its code and envelope. The second byte's high nibble says request (0),
//! response (1) or indication (2). Requests carry a correlation id that their answer repeats.

use serde::{Deserialize, Serialize};

use super::ID_LEN;
use crate::error::{Error, Reason};

macro_rules! catalogue {
    ($($(#[$doc:meta])* $variant:ident $(($body:ty))? $({ $($field:ident : $type:ty = $fdoc:literal),* $(,)? })? = $code:literal;)*) => {
        /// A decoded message. Borrows from the record it came in.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        #[non_exhaustive]
        pub enum Message<'d> {
            $($(#[$doc])* $variant $(($body))? $({ $(#[doc = $fdoc] $field: $type,)* })?,)*
            /// None of this catalogue: one that only hosts read ([`crate::Rotate`] and the others beside it), one about groups
            /// ([`crate::Invite`] and the others beside it), or an unknown one.
            Other(Body<'d>),
        }

        impl Message<'_> {
            /// The code of every message of this catalogue.
            #[cfg(fuzzing)]
            pub const CODES: &'static [u16] = &[$($code,)*];

            /// The first two bytes of the payload.
            pub const fn code(&self) -> u16 {
                match self {
                    $(Self::$variant { .. } => $code,)*
                    Self::Other(body) => body.code,
                }
            }
        }
    };
}

catalogue! {
    /// A sealed message on its way to the server.
    Send { wanted: Rungs = "The receipts that the sender wants.", envelope: &'d [u8] = "The envelope, to the end of the record." } = 0x0200;
    /// What became of messages, told to their sender by the server.
    Told(Receipt) = 0x0210;
    /// A sealed message on its way to its recipient.
    Deliver { wanted: Rungs = "The receipts that the sender wants.", envelope: &'d [u8] = "The envelope, to the end of the record." } = 0x0220;
    /// The next [`Message::Deliver`], [`Message::WrapDelivery`] or [`Message::Told`] waited in the server's store.
    Waited { seq: u64 = "Its number in the client's queue.", at: u64 = "When the server accepted it, in seconds since 1970. The server's word." } = 0x0221;
    /// What became of messages, told by their recipient.
    Tell(Receipt) = 0x0230;
    /// Everything that waited and was delivered on this connection, up to this one, need not be kept any longer.
    Acknowledge { seq: u64 = "The number that stood in [`Message::Waited`]." } = 0x0231;
    /// Are you there? Either side may ask at any time.
    Status { request: u16 = "Correlation id." } = 0x0400;
    /// I am.
    StatusResponse { request: u16 = "Correlation id." } = 0x0410;
    /// Who is this?
    Lookup(Lookup<'d>) = 0x0500;
    /// What the directory knows of one client.
    LookupResponse { request: u16 = "Correlation id.", entry: DirectoryEntry<'d> = "The client." } = 0x0510;
    /// Which clients are there?
    List { request: u16 = "Correlation id.", after: &'d str = "Only names behind this one; empty: from the start." } = 0x0501;
    /// A page of clients in the order of their normalised names.
    ListResponse(DirectoryList<'d>) = 0x0511;
    /// Revoke a client: it may not enter again.
    Revoke { request: u16 = "Correlation id.", subject: Subject<'d> = "Whom." } = 0x0503;
    /// From now on, give me messages.
    Listening = 0x0700;
    /// No more messages, please.
    NotListening = 0x0701;
    /// What the server decided for this connection; the first is the last step of the handshake.
    Settings(Settings) = 0x0720;
    /// The last record of this direction.
    Close { reason: Option<Reason> = "Why, where there is more to it than the end." } = 0x0821;
    /// The last record under this key of this direction.
    KeyUpdate = 0x0822;
    /// A new bundle of the connected client.
    Publish { request: u16 = "Correlation id.", bundle: SignedBundle<'d> = "The bundle." } = 0x0B00;
    /// A chain for one recipient.
    Wrap {
        request: u16 = "Correlation id.",
        to: [u8; ID_LEN] = "The recipient.",
        wrap: &'d [u8] = "The wrap.",
        bundle: SignedBundle<'d> = "The sender's bundle, so that the recipient need not ask.",
    } = 0x0B01;
    /// A chain from another client, whom the server stamps.
    WrapDelivery {
        from: [u8; ID_LEN] = "The authenticated sender.",
        wrap: &'d [u8] = "The wrap.",
        bundle: SignedBundle<'d> = "The sender's bundle.",
    } = 0x0B20;
    /// A request that has nothing to tell was done.
    Done { request: u16 = "Correlation id." } = 0x0F00;
    /// A request was refused.
    Refused {
        request: u16 = "Correlation id.",
        reason: Reason = "Why.",
        retry_after: Option<u32> = "Milliseconds to wait before trying again.",
    } = 0x0F10;
}

/// Bytes before the envelope in [`Message::Send`] and [`Message::Deliver`]: the code and the wanted receipts.
pub(crate) const SEND_HEAD_LEN: usize = 3;

/// Set of receipts that a sender wants, one bit a rung.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Rungs(u8);

impl Rungs {
    /// No receipt is wanted; a refusal is told all the same.
    pub const NONE: Self = Self(0);

    const MASK: u8 = 0b1111;

    /// This set and one rung more. [`Rung::Refused`] cannot be unwanted and adds nothing.
    pub const fn with(self, rung: Rung) -> Self {
        Self(self.0 | rung.bit())
    }

    /// The set as it is on the wire (PROTOCOL 7.2).
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The set that these bits stand for, if they stand for one.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits & !Self::MASK == 0 { Some(Self(bits)) } else { None }
    }

    /// Whether `rung` is wanted.
    pub const fn contains(self, rung: Rung) -> bool {
        matches!(rung, Rung::Refused) || self.0 & rung.bit() != 0
    }
}

/// How far a message came (PROTOCOL 10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Rung {
    /// The home server routed it. The server's word.
    Accepted = 1,
    /// The home server holds it durably. The server's word.
    Stored = 2,
    /// The recipient's client has it. The recipient's word, authenticated end to end.
    Delivered = 3,
    /// The recipient's application has it. The recipient's word, authenticated end to end.
    Opened = 4,
    /// It went no further; a [`Reason`] says why.
    Refused = 5,
}

impl Rung {
    /// The byte on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::Accepted => 1,
            Self::Stored => 2,
            Self::Delivered => 3,
            Self::Opened => 4,
            Self::Refused => 5,
        }
    }

    /// The rung with this code, if there is one.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Accepted),
            2 => Some(Self::Stored),
            3 => Some(Self::Delivered),
            4 => Some(Self::Opened),
            5 => Some(Self::Refused),
            _ => None,
        }
    }

    /// The spelling in messages, options, JSON and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Stored => "stored",
            Self::Delivered => "delivered",
            Self::Opened => "opened",
            Self::Refused => "refused",
        }
    }

    const fn bit(self) -> u8 {
        match self {
            Self::Accepted => 1,
            Self::Stored => 2,
            Self::Delivered => 4,
            Self::Opened => 8,
            Self::Refused => 0,
        }
    }
}

impl core::fmt::Display for Rung {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Rung {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.code())
    }
}

impl<'de> Deserialize<'de> for Rung {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_code(u8::deserialize(deserializer)?).ok_or_else(|| serde::de::Error::custom("no such rung"))
    }
}

impl Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.code())
    }
}

impl<'de> Deserialize<'de> for Reason {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_code(u8::deserialize(deserializer)?).ok_or_else(|| serde::de::Error::custom("no such reason"))
    }
}

/// What became of the messages `from..=to` of one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Receipt {
    /// How far they came.
    pub rung: Rung,
    /// Why not further; there with [`Rung::Refused`] only.
    pub reason: Option<Reason>,
    /// The chain.
    pub chain: [u8; 8],
    /// The first message.
    pub from: u32,
    /// The last message.
    pub to: u32,
    /// The recipient's tag, there where it is the recipient's word.
    pub tag: Option<[u8; 16]>,
}

/// Who is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Subject<'d> {
    /// The client with this id.
    Id([u8; ID_LEN]),
    /// The client with this name, in any of its normalised spellings.
    Name(&'d str),
}

/// A question to the directory. What is not asked for is not sent: a small record limit has room for a bundle or a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Lookup<'d> {
    /// Correlation id.
    pub request: u16,
    /// The answer should hold the RSA modulus.
    pub key: bool,
    /// The answer should hold the bundle.
    pub bundle: bool,
    /// Who.
    #[serde(borrow)]
    pub subject: Subject<'d>,
}

/// One client, as the directory knows it. Only signatures make any of it true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DirectoryEntry<'d> {
    /// The client's id.
    pub id: [u8; ID_LEN],
    /// Its display name.
    pub name: &'d str,
    /// How often its identity key was replaced.
    pub key_epoch: u32,
    /// Bytes of the longest record that it takes.
    pub record_limit: u16,
    /// Whether it is listening, and since when it is not.
    pub status: PeerStatus,
    /// Its RSA modulus, where it was asked for.
    pub modulus: Option<&'d [u8]>,
    /// Its bundle, where it was asked for and there is one.
    #[serde(borrow)]
    pub bundle: Option<SignedBundle<'d>>,
}

/// A bundle and its RSA signature, as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct SignedBundle<'d> {
    /// The bundle (PROTOCOL 8).
    pub bundle: &'d [u8],
    /// The identity's signature over it.
    pub signature: &'d [u8],
}

/// Whether a client is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum PeerStatus {
    /// It is listening.
    Online,
    /// It is not; when it was last seen, in seconds since 1970.
    Offline {
        /// `None` if it never was.
        last_seen: Option<u64>,
    },
}

/// One line of a [`DirectoryList`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Presence<'d> {
    /// The client's id.
    pub id: [u8; ID_LEN],
    /// Its display name.
    pub name: &'d str,
    /// Whether it is there.
    pub status: PeerStatus,
}

/// A page of the directory: its lines are decoded one by one, since nobody here owns memory for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DirectoryList<'d> {
    request: u16,
    more: bool,
    lines: &'d [u8],
}

impl<'d> DirectoryList<'d> {
    /// A page of encoded lines, each made by [`DirectoryList::append`].
    pub const fn new(request: u16, more: bool, lines: &'d [u8]) -> Self {
        Self { request, more, lines }
    }

    /// Correlation id.
    pub const fn request(&self) -> u16 {
        self.request
    }

    /// Whether there are names behind the last line.
    pub const fn more(&self) -> bool {
        self.more
    }

    /// Encodes one line into `out` and returns its length, or `None` if there is no room.
    pub fn append(line: &Presence<'_>, out: &mut [u8]) -> Option<usize> {
        postcard::to_slice(line, out).ok().map(|written| written.len())
    }

    /// The lines, up to the first that is malformed, which is an [`Error::Decode`].
    pub fn lines(&self) -> impl Iterator<Item = Result<Presence<'d>, Error>> + use<'d> {
        lines(self.lines)
    }
}

/// What the server decided for this connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Settings {
    /// The channel that this handshake issued; all zeros where `valid_for` is 0.
    pub channel: [u8; ID_LEN],
    /// Seconds for which the channel can be resumed; 0: it cannot.
    pub valid_for: u32,
    /// Seconds between two signs of life that the server wants.
    pub heartbeat: u16,
    /// Seconds of silence after which either side gives the other up.
    pub timeout: u16,
    /// The server's clock, seconds since 1970. Nothing secret depends on it.
    pub time: u64,
    /// Messages that wait at the server for this client.
    pub waiting: u32,
    /// Changes when the server's store was made anew or restored.
    pub store_epoch: [u8; 8],
}

impl<'d> Message<'d> {
    /// Writes code and body into `out` and returns their length.
    ///
    /// # Errors
    /// [`Error::Buffer`] if `out` is too short.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, Error> {
        use crate::error::BufferError::TxFull;

        let (code, body) = out.split_first_chunk_mut::<2>().ok_or(TxFull)?;
        *code = self.code().to_be_bytes();
        let len = match self {
            Self::Send { wanted, envelope } | Self::Deliver { wanted, envelope } => {
                let (first, rest) = body.split_first_mut().ok_or(TxFull)?;
                *first = wanted.0;
                rest.get_mut(..envelope.len()).ok_or(TxFull)?.copy_from_slice(envelope);
                1 + envelope.len()
            }
            Self::Told(receipt) | Self::Tell(receipt) => put(receipt, body)?,
            Self::Waited { seq, at } => put(&(seq, at), body)?,
            Self::Acknowledge { seq } => put(seq, body)?,
            Self::Status { request } | Self::StatusResponse { request } | Self::Done { request } => put(request, body)?,
            Self::Lookup(lookup) => put(lookup, body)?,
            Self::LookupResponse { request, entry } => put(&(request, entry), body)?,
            Self::List { request, after } => put(&(request, after), body)?,
            Self::ListResponse(list) => {
                let len = put(&(list.request, list.more), body)?;
                let room = body.get_mut(len..).and_then(|rest| rest.get_mut(..list.lines.len())).ok_or(TxFull)?;
                room.copy_from_slice(list.lines);
                len + list.lines.len()
            }
            Self::Revoke { request, subject } => put(&(request, subject), body)?,
            Self::Other(Body { bytes, .. }) => {
                body.get_mut(..bytes.len()).ok_or(TxFull)?.copy_from_slice(bytes);
                bytes.len()
            }
            Self::Listening | Self::NotListening | Self::KeyUpdate => 0,
            Self::Settings(settings) => put(settings, body)?,
            Self::Close { reason } => put(reason, body)?,
            Self::Publish { request, bundle } => put(&(request, bundle), body)?,
            Self::Wrap { request, to, wrap, bundle } => put(&(request, to, wrap, bundle), body)?,
            Self::WrapDelivery { from, wrap, bundle } => put(&(from, wrap, bundle), body)?,
            Self::Refused { request, reason, retry_after } => put(&(request, reason, retry_after), body)?,
        };
        Ok(2 + len)
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`Error::Decode`] if it is not a message of this catalogue, to the last byte.
    pub fn decode(payload: &'d [u8]) -> Result<Self, Error> {
        let told = Self::decode_told(payload)?;
        let Self::Other(Body { code, bytes: body }) = told else { return Ok(told) };
        Ok(match code {
            0x0200 => {
                let (wanted, envelope) = tail(body)?;
                Self::Send { wanted, envelope }
            }
            0x0230 => Self::Tell(take(body)?),
            0x0231 => Self::Acknowledge { seq: take(body)? },
            0x0500 => Self::Lookup(take(body)?),
            0x0501 => {
                let (request, after) = take(body)?;
                Self::List { request, after }
            }
            0x0511 => {
                let ((request, more), lines) = postcard::take_from_bytes(body).map_err(|_| Error::Decode)?;
                Self::ListResponse(DirectoryList { request, more, lines })
            }
            0x0503 => {
                let (request, subject) = take(body)?;
                Self::Revoke { request, subject }
            }
            0x0700 => bare(body, Self::Listening)?,
            0x0701 => bare(body, Self::NotListening)?,
            0x0B00 => {
                let (request, bundle) = take(body)?;
                Self::Publish { request, bundle }
            }
            0x0B01 => {
                let (request, to, wrap, bundle) = take(body)?;
                Self::Wrap { request, to, wrap, bundle }
            }
            code => Self::Other(Body { code, bytes: body }),
        })
    }

    /// Reads a payload as a small client does, who is told no others: what servers are told, and pages of the directory, is
    /// [`Message::Other`] here, so that a device does not carry what reads it.
    ///
    /// # Errors
    /// As [`Message::decode`].
    pub(crate) fn decode_told(payload: &'d [u8]) -> Result<Self, Error> {
        let (code, body) = payload.split_first_chunk::<2>().ok_or(Error::Decode)?;
        let mut rest = body;
        let rest = &mut rest;
        let message = match u16::from_be_bytes(*code) {
            0x0210 => Self::Told(next(rest)?),
            0x0220 => {
                let (wanted, envelope) = tail(core::mem::take(rest))?;
                Self::Deliver { wanted, envelope }
            }
            0x0221 => Self::Waited { seq: next(rest)?, at: next(rest)? },
            0x0400 => Self::Status { request: next(rest)? },
            0x0410 => Self::StatusResponse { request: next(rest)? },
            0x0510 => Self::LookupResponse { request: next(rest)?, entry: next(rest)? },
            0x0720 => Self::Settings(Settings {
                channel: next(rest)?,
                valid_for: next(rest)?,
                heartbeat: next(rest)?,
                timeout: next(rest)?,
                time: next(rest)?,
                waiting: next(rest)?,
                store_epoch: next(rest)?,
            }),
            0x0821 => Self::Close { reason: next(rest)? },
            0x0822 => Self::KeyUpdate,
            0x0B20 => Self::WrapDelivery { from: next(rest)?, wrap: next(rest)?, bundle: next(rest)? },
            0x0F00 => Self::Done { request: next(rest)? },
            0x0F10 => Self::Refused { request: next(rest)?, reason: next(rest)?, retry_after: next(rest)? },
            code => Self::Other(Body { code, bytes: core::mem::take(rest) }),
        };
        if rest.is_empty() { Ok(message) } else { Err(Error::Decode) }
    }
}

impl<'d> Field<'d> for Receipt {
    #[inline(never)]
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Ok(Self {
            rung: next(rest)?,
            reason: next(rest)?,
            chain: next(rest)?,
            from: next(rest)?,
            to: next(rest)?,
            tag: next(rest)?,
        })
    }
}

impl<'d> Field<'d> for SignedBundle<'d> {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Ok(Self { bundle: next(rest)?, signature: next(rest)? })
    }
}

impl<'d> Field<'d> for DirectoryEntry<'d> {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Ok(Self {
            id: next(rest)?,
            name: next(rest)?,
            key_epoch: next(rest)?,
            record_limit: next(rest)?,
            status: next(rest)?,
            modulus: next(rest)?,
            bundle: next(rest)?,
        })
    }
}

/// The code and the body of a message that is not in the catalogue, as they are on the wire. What decodes it is apart, so
/// that devices do not carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Body<'d> {
    code: u16,
    bytes: &'d [u8],
}

impl<'d> Body<'d> {
    #[inline]
    pub(super) const fn new(code: u16, bytes: &'d [u8]) -> Self {
        Self { code, bytes }
    }

    /// The first two bytes of the payload.
    #[inline]
    pub const fn code(self) -> u16 {
        self.code
    }

    /// What follows them.
    #[inline]
    pub const fn bytes(self) -> &'d [u8] {
        self.bytes
    }

    /// The correlation id, with which the body of every request and answer begins; 0, which belongs to no request, if it
    /// does not.
    #[inline]
    pub fn request(self) -> u16 {
        postcard::take_from_bytes(self.bytes).map_or(0, |(request, _)| request)
    }
}

pub(super) fn put<T: Serialize>(body: &T, out: &mut [u8]) -> Result<usize, Error> {
    match postcard::to_slice(body, out) {
        Ok(written) => Ok(written.len()),
        Err(_) => Err(crate::error::BufferError::TxFull.into()),
    }
}

pub(super) fn take<'d, T: Deserialize<'d>>(body: &'d [u8]) -> Result<T, Error> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(Error::Decode),
    }
}

/// What a body consists of, taken off its front as postcard lays it out. By hand, where that makes a device's image
/// smaller: what postcard reads is made anew for each type.
pub(super) trait Field<'d>: Sized {
    /// # Errors
    /// [`Error::Decode`] if it does not stand there.
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error>;
}

/// Takes a field off the front.
pub(super) fn next<'d, T: Field<'d>>(rest: &mut &'d [u8]) -> Result<T, Error> {
    T::next(rest)
}

/// Fields that postcard reads.
macro_rules! fields {
    ($($type:ty),*) => {$(
        impl<'d> $crate::wire::message::Field<'d> for $type {
            #[inline(never)]
            fn next(rest: &mut &'d [u8]) -> Result<Self, $crate::error::Error> {
                let (value, behind) = postcard::take_from_bytes(rest).map_err(|_| $crate::error::Error::Decode)?;
                *rest = behind;
                Ok(value)
            }
        }
    )*};
}

pub(super) use fields;

fields!(u16, u32, u64, &'d [u8], PeerStatus);

impl<'d, const N: usize> Field<'d> for [u8; N] {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        let (value, behind) = rest.split_first_chunk().ok_or(Error::Decode)?;
        *rest = behind;
        Ok(*value)
    }
}

impl<'d> Field<'d> for u8 {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        next(rest).map(|[byte]: [Self; 1]| byte)
    }
}

impl<'d> Field<'d> for bool {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        match next(rest)? {
            0_u8 => Ok(false),
            1 => Ok(true),
            _ => Err(Error::Decode),
        }
    }
}

impl<'d, T: Field<'d>> Field<'d> for Option<T> {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        if next(rest)? { T::next(rest).map(Some) } else { Ok(None) }
    }
}

impl<'d> Field<'d> for &'d str {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        core::str::from_utf8(next(rest)?).map_err(|_| Error::Decode)
    }
}

impl<'d> Field<'d> for Rung {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Self::from_code(next(rest)?).ok_or(Error::Decode)
    }
}

impl<'d> Field<'d> for Reason {
    fn next(rest: &mut &'d [u8]) -> Result<Self, Error> {
        Self::from_code(next(rest)?).ok_or(Error::Decode)
    }
}

/// Lines that stand one after the other, up to the first that is malformed, which is an [`Error::Decode`].
#[inline]
pub(super) fn lines<'d, T: Deserialize<'d>>(lines: &'d [u8]) -> impl Iterator<Item = Result<T, Error>> + use<'d, T> {
    let mut rest = lines;
    core::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        match postcard::take_from_bytes(rest) {
            Ok((line, behind)) => {
                rest = behind;
                Some(Ok(line))
            }
            Err(_) => {
                rest = &[];
                Some(Err(Error::Decode))
            }
        }
    })
}

fn bare<'d>(body: &[u8], message: Message<'d>) -> Result<Message<'d>, Error> {
    if body.is_empty() { Ok(message) } else { Err(Error::Decode) }
}

fn tail(body: &[u8]) -> Result<(Rungs, &[u8]), Error> {
    match body.split_first() {
        Some((wanted, envelope)) if wanted & !Rungs::MASK == 0 => Ok((Rungs(*wanted), envelope)),
        _ => Err(Error::Decode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn examples() -> Vec<Message<'static>> {
        let bundle = SignedBundle { bundle: &[1; 184], signature: &[2; 256] };
        let receipt =
            Receipt { rung: Rung::Delivered, reason: None, chain: [3; 8], from: 1, to: 200, tag: Some([4; 16]) };
        let refusal = Receipt { rung: Rung::Refused, reason: Some(Reason::Offline), tag: None, ..receipt };
        let entry = DirectoryEntry {
            id: [5; 16],
            name: "alice",
            key_epoch: 0,
            record_limit: 16408,
            status: PeerStatus::Offline { last_seen: Some(1_700_000_000) },
            modulus: Some(&[6; 256]),
            bundle: Some(bundle),
        };
        Vec::from([
            Message::Send { wanted: Rungs::NONE.with(Rung::Delivered), envelope: &[7; 49] },
            Message::Told(receipt),
            Message::Deliver { wanted: Rungs::NONE, envelope: &[7; 49] },
            Message::Waited { seq: 300, at: 1_790_000_000 },
            Message::Tell(refusal),
            Message::Acknowledge { seq: u64::MAX },
            Message::Status { request: 300 },
            Message::StatusResponse { request: 300 },
            Message::Lookup(Lookup { request: 1, key: true, bundle: true, subject: Subject::Name("alice") }),
            Message::LookupResponse { request: 1, entry },
            Message::List { request: 2, after: "" },
            Message::ListResponse(DirectoryList::new(2, true, &[])),
            Message::Revoke { request: 4, subject: Subject::Id([8; 16]) },
            Message::Listening,
            Message::NotListening,
            Message::Settings(Settings { time: 1_700_000_000, ..Settings::default() }),
            Message::Close { reason: Some(Reason::TakenOver) },
            Message::KeyUpdate,
            Message::Publish { request: 5, bundle },
            Message::Wrap { request: 6, to: [9; 16], wrap: &[1; 244], bundle },
            Message::WrapDelivery { from: [9; 16], wrap: &[1; 244], bundle },
            Message::Done { request: 7 },
            Message::Refused { request: 8, reason: Reason::Rate, retry_after: Some(1000) },
        ])
    }

    #[test]
    fn every_message_round_trips_and_refuses_what_is_cut_or_added() {
        for message in examples() {
            let mut buffer = [0; 2048];
            let len = message.encode(&mut buffer).unwrap();
            assert_eq!(Message::decode(&buffer[..len]).as_ref(), Ok(&message));
            // The three with a tail take any length; all others are exact.
            if !matches!(message, Message::Send { .. } | Message::Deliver { .. } | Message::ListResponse(_)) {
                assert_eq!(Message::decode(&buffer[..len - 1]), Err(Error::Decode), "cut: {message:?}");
                assert_eq!(Message::decode(&buffer[..len + 1]), Err(Error::Decode), "added: {message:?}");
            }
            for room in 0..len {
                assert!(message.encode(&mut buffer[..room]).is_err(), "{message:?} in {room} bytes");
            }
        }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let bundle = SignedBundle { bundle: &[1; 184], signature: &[2; 4] };
        let short = SignedBundle { bundle: &[1; 4], ..bundle };
        let told = Receipt { rung: Rung::Delivered, reason: None, chain: [3; 8], from: 1, to: 200, tag: Some([4; 16]) };
        let refused = Receipt { rung: Rung::Refused, reason: Some(Reason::Rekey), from: 7, to: 7, tag: None, ..told };
        let by_name = Lookup { request: 1, key: true, bundle: true, subject: Subject::Name("bob") };
        let by_id = Lookup { request: 2, key: false, bundle: true, subject: Subject::Id([5; 16]) };
        let entry = DirectoryEntry {
            id: [5; 16],
            name: "bob",
            key_epoch: 0,
            record_limit: 16_408,
            status: PeerStatus::Offline { last_seen: Some(1_700_000_000) },
            modulus: None,
            bundle: Some(bundle),
        };
        let mut lines = [0; 64];
        let mut len = 0;
        for line in [
            Presence { id: [5; 16], name: "bob", status: PeerStatus::Online },
            Presence { id: [6; 16], name: "carol", status: PeerStatus::Offline { last_seen: None } },
        ] {
            len += DirectoryList::append(&line, &mut lines[len..]).unwrap();
        }
        let settings = Settings {
            heartbeat: 15,
            timeout: 45,
            time: 1_790_000_000,
            store_epoch: [1, 2, 3, 4, 5, 6, 7, 8],
            ..Settings::default()
        };
        for (name, message) in [
            ("Send", Message::Send { wanted: Rungs::NONE.with(Rung::Delivered), envelope: &[7; 37] }),
            ("Told", Message::Told(told)),
            ("Waited", Message::Waited { seq: 300, at: 1_790_000_000 }),
            ("Tell", Message::Tell(refused)),
            ("Acknowledge", Message::Acknowledge { seq: 300 }),
            ("Status", Message::Status { request: 300 }),
            ("Lookup", Message::Lookup(by_name)),
            ("Lookup-id", Message::Lookup(by_id)),
            ("LookupResponse", Message::LookupResponse { request: 2, entry }),
            ("List", Message::List { request: 3, after: "" }),
            ("ListResponse", Message::ListResponse(DirectoryList::new(3, false, &lines[..len]))),
            ("Revoke", Message::Revoke { request: 5, subject: Subject::Name("s-1") }),
            ("Settings", Message::Settings(settings)),
            ("Close", Message::Close { reason: Some(Reason::TakenOver) }),
            ("Publish", Message::Publish { request: 6, bundle: short }),
            ("Wrap", Message::Wrap { request: 7, to: [5; 16], wrap: &[12; 4], bundle: short }),
            ("WrapDelivery", Message::WrapDelivery { from: [5; 16], wrap: &[12; 4], bundle: short }),
            ("Done", Message::Done { request: 7 }),
            ("Refused", Message::Refused { request: 8, reason: Reason::Rate, retry_after: Some(1000) }),
        ] {
            let mut buffer = [0; 1024];
            let len = message.encode(&mut buffer).unwrap();
            let printed = super::super::testing::printed("7.1", name);
            assert_eq!(printed, buffer[..len], "{name}");
            assert_eq!(Message::decode(&printed), Ok(message));
        }
    }

    #[test]
    fn integers_may_be_longer_than_they_need_to_be() {
        assert_eq!(Message::decode(&[4, 0, 0x80, 0x80, 0]), Ok(Message::Status { request: 0 }));
        for bad in [&[4, 0, 0xff, 0xff, 4][..], &[4, 0, 0x80, 0x80, 0x80, 0], &[8, 0x21, 2, 1], &[2, 0, 0x10]] {
            assert_eq!(Message::decode(bad), Err(Error::Decode));
        }
    }

    #[test]
    fn a_reading_costs_three_bytes_beside_its_envelope() {
        let mut buffer = [0; 128];
        let message = Message::Send { wanted: Rungs::NONE, envelope: &[0; 12 + 37] };
        assert_eq!(message.encode(&mut buffer).map(|len| len + super::super::RECORD_OVERHEAD), Ok(76));
    }

    #[test]
    fn list_lines_end_at_the_first_malformed_one() {
        let line = Presence { id: [1; 16], name: "alice", status: PeerStatus::Online };
        let mut buffer = [0xff; 64];
        let len = DirectoryList::append(&line, &mut buffer).unwrap();
        let list = DirectoryList::new(1, false, &buffer[..len + 3]);
        assert_eq!(list.lines().collect::<Vec<_>>(), [Ok(line), Err(Error::Decode)]);
    }

    #[test]
    fn rungs_are_told_apart_by_code_name_and_bit() {
        use std::string::ToString;

        let all = [Rung::Accepted, Rung::Stored, Rung::Delivered, Rung::Opened, Rung::Refused];
        for (code, rung) in (1..).zip(all) {
            assert_eq!((rung.code(), Rung::from_code(code)), (code, Some(rung)));
            assert_eq!(rung.to_string(), rung.as_str());
            // A refusal cannot be unwanted; each of the others is wanted alone.
            let wanted = Rungs::NONE.with(rung);
            for other in all {
                assert_eq!(wanted.contains(other), other == rung || other == Rung::Refused, "{rung} {other}");
            }
        }
        assert_eq!([0, 6, 0xff].map(Rung::from_code), [None; 3]);
        let names = all.map(Rung::as_str);
        assert!((1..5).all(|index| !names[..index].contains(&names[index])));
    }
}
