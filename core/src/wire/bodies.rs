//! What messages beside the catalogue are made of. They are read from a [`Body`](super::Body) where they are wanted, so that
//! whoever does not want them does not carry them.

/// Defines messages with their codes, each with `encode` and `decode`, and a constant of [`Body`](super::Body) with all
/// of the codes. Where it stands, `Body`, `Message`, `Error`, `put`, `next`, `Serialize` and `Deserialize` are in scope.
macro_rules! bodies {
    ($codes:ident $codes_doc:literal; $($(#[$doc:meta])* $name:ident [$($life:lifetime)?] from [$body:ty] {
        $($(#[$field_doc:meta])* $field:ident : $type:ty,)*
    } = $code:literal)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name $(<$life>)? {
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
                if body.code() != Self::CODE {
                    return Err(Error::Decode);
                }
                // Field by field, as postcard has no more to say of a struct: what reads a field is there once for all.
                let rest = &mut body.bytes();
                let message = Self { $($field: next(rest)?,)* };
                if rest.is_empty() { Ok(message) } else { Err(Error::Decode) }
            }
        }
    )*

    impl Body<'_> {
        #[doc = $codes_doc]
        #[cfg(fuzzing)]
        pub const $codes: &'static [u16] = &[$($code,)*];
    }
    };
}

pub(super) use bodies;
