//! What can go wrong, by blame: the bytes, the cryptography, the peer, our buffers, or the caller.
//!
//! Everything here is small, `Copy` and comparable. An error carries no detail that would help an attacker: a failed
//! decryption never says which check failed. Errors never become bytes on the wire; what a peer may be told is a
//! [`Reason`], and it travels sealed. This room imports nothing.

use core::fmt;

/// Why the engine stopped or refused a call, grouped by who is to blame.
///
/// Except for [`Error::Buffer`] and [`Error::Misuse`], an error is final: the connection has erased its keys and every
/// later call returns the same error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not a message of this protocol.
    Decode,
    /// A decryption, signature or MAC did not verify. Never says which.
    Crypto,
    /// The peer sent something well-formed that it may not send.
    Peer(PeerError),
    /// A buffer of ours is too small; give more room or run the driver, then call again.
    Buffer(BufferError),
    /// The caller used the engine out of order.
    Misuse(ApiMisuse),
}

/// What a peer did wrong with well-formed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum PeerError {
    /// The server is under load and asked for work again after it was done. Nobody vouches for that: try again later.
    Busy,
    /// The stream ended without an authenticated close.
    Truncated,
    /// A key was used for more records than the protocol allows, or a counter would wrap.
    Exhausted,
    /// The server is under load and asks for more work than a client does. Nobody vouches for that: try again later.
    Puzzle {
        /// The zero bits that it wants.
        bits: u8,
    },
    /// The server refused this client, sealed under the handshake keys.
    Refused {
        /// Why.
        reason: Reason,
        /// Milliseconds to wait before trying again; 0 where waiting does not help.
        retry_after: u32,
    },
    /// The server is under load: connect again, with the solution of the puzzle that it has set. Nobody vouches for that.
    Retry,
    /// The server presented another identity key than the pinned one.
    ServerKey,
    /// A record of a type, sequence number or length that this state does not accept.
    UnexpectedMessage,
    /// No version, suite or mode in common, or one that was never offered.
    Version,
}

/// Which of our buffers is too small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum BufferError {
    /// The message can never be sent: it is longer than the negotiated record allows.
    MessageTooLong {
        /// The longest payload of one record on this connection, in bytes.
        max: usize,
    },
    /// The receive buffer is shorter than a record that the peer may send.
    RxFull,
    /// The transmit buffer has no room now: run the driver, then try again.
    TxFull,
}

/// What the caller did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ApiMisuse {
    /// The connection is closed; make a new one.
    Closed,
    /// A key, name or argument is not of the documented form.
    InvalidArgument,
    /// The handshake has not finished.
    NotConnected,
    /// An answer was given that nobody asked for.
    NotAsked,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $text:literal;)*) => {
        /// Why a request, a message or a client was refused. One list for errors and receipts alike, one byte each on
        /// the wire (PROTOCOL 11), spelled in lower case with hyphens wherever a person or a script reads it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])* $variant = $code,)*
        }

        impl Reason {
            /// Every reason, in the order of its code.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The reason with this code, if there is one.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The byte on the wire.
            pub const fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $code,)*
                }
            }

            /// The spelling in messages, JSON and logs.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// The bytes are not a request of this protocol.
    Malformed = 1, "malformed";
    /// Well-formed, but this node does not do it.
    Unsupported = 2, "unsupported";
    /// The client may not enter: unknown, revoked, wrong signature, token or password. Never says which.
    Unauthorised = 3, "unauthorised";
    /// The client is known, but has no right to this.
    Forbidden = 4, "forbidden";
    /// Another identity holds this name, id or chain id.
    NameInUse = 5, "name-in-use";
    /// The sender is not a member of the conversation.
    NotMember = 6, "not-member";
    /// No such client, conversation or chain.
    Unknown = 7, "unknown";
    /// The recipient is not listening, and nothing stores the message.
    Offline = 8, "offline";
    /// The recipient's queue is full.
    QueueFull = 9, "queue-full";
    /// Longer than the recipient can take.
    TooLarge = 10, "too-large";
    /// The conversation is closed.
    Closed = 11, "closed";
    /// Too many requests; try again later.
    Rate = 12, "rate";
    /// The recipient does not know this chain: send a new wrap.
    Rekey = 13, "rekey";
    /// The message outlived the age of the queue.
    Expired = 14, "expired";
    /// The recipient cannot open it.
    Unreadable = 15, "unreadable";
    /// Too many messages before this one are missing.
    Gap = 16, "gap";
    /// The chain went back: another message already had this number.
    Rewound = 17, "rewound";
    /// The identity key changed and was not accepted yet.
    KeyChanged = 18, "key-changed";
    /// A newer connection of the same identity took over.
    TakenOver = 19, "taken-over";
    /// The node cannot do it now (full disk, shutting down).
    Unavailable = 20, "unavailable";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode => f.write_str("the bytes are not a message of this protocol"),
            Self::Crypto => f.write_str("a cryptographic check failed"),
            Self::Peer(error) => error.fmt(f),
            Self::Buffer(error) => error.fmt(f),
            Self::Misuse(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("the server has too much to do, and asks again for work that was done"),
            Self::Truncated => f.write_str("the connection ended without a close"),
            Self::Exhausted => f.write_str("the peer used a key for too many records"),
            Self::Puzzle { bits } => {
                write!(f, "the server has too much to do, and asks for too much work ({bits} bits)")
            }
            Self::Refused { reason, .. } => write!(f, "the server refused this client: {reason}"),
            Self::Retry => f.write_str("the server has too much to do, and asks for work first"),
            Self::ServerKey => f.write_str("the server's key is not the expected one"),
            Self::UnexpectedMessage => f.write_str("the peer sent an unexpected record"),
            Self::Version => f.write_str("no protocol version or suite in common"),
        }
    }
}

impl fmt::Display for BufferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MessageTooLong { max } => write!(f, "the message is longer than {max} bytes"),
            Self::RxFull => f.write_str("the receive buffer is smaller than a record"),
            Self::TxFull => f.write_str("the transmit buffer is full"),
        }
    }
}

impl fmt::Display for ApiMisuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "the connection is closed",
            Self::InvalidArgument => "an argument is not of the documented form",
            Self::NotConnected => "the handshake has not finished",
            Self::NotAsked => "nothing was asked that this would answer",
        })
    }
}

impl core::error::Error for Error {}
impl core::error::Error for PeerError {}
impl core::error::Error for BufferError {}
impl core::error::Error for ApiMisuse {}
impl core::error::Error for Reason {}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        Self::Peer(error)
    }
}

impl From<BufferError> for Error {
    fn from(error: BufferError) -> Self {
        Self::Buffer(error)
    }
}

impl From<ApiMisuse> for Error {
    fn from(error: ApiMisuse) -> Self {
        Self::Misuse(error)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn every_error_says_what_it_is_and_no_two_say_the_same() {
        let reason = Reason::Rate;
        let errors: [Error; 15] = [
            Error::Decode,
            Error::Crypto,
            PeerError::Truncated.into(),
            PeerError::Exhausted.into(),
            PeerError::Refused { reason, retry_after: 7 }.into(),
            PeerError::ServerKey.into(),
            PeerError::UnexpectedMessage.into(),
            PeerError::Version.into(),
            BufferError::MessageTooLong { max: 4711 }.into(),
            BufferError::RxFull.into(),
            BufferError::TxFull.into(),
            ApiMisuse::Closed.into(),
            ApiMisuse::InvalidArgument.into(),
            ApiMisuse::NotConnected.into(),
            ApiMisuse::NotAsked.into(),
        ];
        let texts: Vec<_> = errors.iter().map(Error::to_string).collect();
        for (index, text) in texts.iter().enumerate() {
            assert!(!text.is_empty() && !texts[..index].contains(text), "{text}");
        }
        assert!(texts[4].contains(reason.as_str()) && texts[8].contains("4711"));
    }

    #[test]
    fn reasons_are_told_apart_by_code_and_by_name() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
            assert_eq!(reason.to_string(), reason.as_str());
            assert!(Reason::ALL[..index].iter().all(|other| other.as_str() != reason.as_str()), "{reason}");
        }
        let behind = Reason::ALL.last().unwrap().code() + 1;
        assert_eq!([0, behind, 0xff].map(Reason::from_code), [None; 3]);
    }
}
