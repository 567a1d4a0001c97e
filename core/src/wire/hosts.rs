//! Messages that only hosts read: about devices to be enrolled (PROTOCOL 6.4), identity keys that follow others
//! (8.6) and channels (4.10). Devices carry none of this. That is why everything is `inline`: it is compiled where it is used, and the catalogue is not any larger
//! for it.

use serde::{Deserialize, Serialize};

use super::message::{Body, put, take};
use super::{ID_LEN, Message, SignedBundle};
use crate::error::Error;

/// The most entries of one batch of [`Enrol`]s.
pub const MAX_ENROL_BATCH: usize = 1000;

macro_rules! bodies {
    ($($(#[$doc:meta])* $name:ident [$($life:lifetime)?] from [$body:ty] {
        $($(#[$field_doc:meta])* $field:ident : $type:ty,)*
    } = $code:literal)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name $(<$life>)? {
            /// Correlation id.
            pub request: u16,
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $(<$life>)? $name $(<$life>)? {
            /// The first two bytes of its payload.
            pub const CODE: u16 = $code;

            /// The message, with its body in `buffer`.
            ///
            /// # Errors
            /// [`Error::Buffer`] if `buffer` is too short.
            #[inline]
            pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<Message<'b>, Error> {
                let len = put(self, buffer)?;
                Ok(Message::Other(Body::new(Self::CODE, buffer.get(..len).unwrap_or_default())))
            }

            /// Reads the body of such a message.
            ///
            /// # Errors
            /// [`Error::Decode`] if it is none, to the last byte.
            #[inline]
            pub fn decode(body: $body) -> Result<Self, Error> {
                if body.code() == Self::CODE { take(body.bytes()) } else { Err(Error::Decode) }
            }
        }
    )*

    impl Body<'_> {
        /// The code of every message that only hosts read.
        #[cfg(fuzzing)]
        pub const CODES: &'static [u16] = &[$($code,)*];
    }
    };
}

bodies! {
    /// A device to be enrolled on behalf of the connected client, alone or in a batch (PROTOCOL 6.4). Only a whole batch is
    /// enrolled, and answered once: `Done` to its last entry, or `Refused` to the first one that is refused.
    Enrol ['d] from [Body<'d>] {
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
        /// The client.
        id: [u8; ID_LEN],
        /// That of the key which is known.
        key_epoch: u32,
    } = 0x0505

    /// The key that followed another.
    Successor ['d] from [Body<'d>] {
        /// Its RSA modulus.
        modulus: &'d [u8],
        /// The signature of the key before it over [`crate::Rotation::statement`].
        signature: &'d [u8],
    } = 0x0515

    /// Which channels of mine could be resumed?
    Channels [] from [Body<'_>] {} = 0x0800

    /// End all my channels: my next connection makes a full handshake. This connection stands.
    ExpireChannels [] from [Body<'_>] {} = 0x0801

    /// The channels that could be resumed; there are at most two.
    ChannelsResponse [] from [Body<'_>] {
        /// One, in no order.
        first: Option<ChannelInfo>,
        /// The other.
        second: Option<ChannelInfo>,
    } = 0x0810
}

/// A channel that the server would resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelInfo {
    /// Its id.
    pub id: [u8; ID_LEN],
    /// Seconds for which it can still be resumed.
    pub valid_for: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::testing::printed;

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
