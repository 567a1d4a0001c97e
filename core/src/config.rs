//! What the user of a connection chooses before it begins. Nothing here is secret and nothing here is checked twice.

use crate::crypto::{HASH_LEN, PublicKey, Secret};
use crate::wire::ID_LEN;

/// How a client recognises its server, and what it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The fingerprint of the server's key. `None` trusts whoever answers: only for a first contact that a person asked
    /// for in so many words.
    pub server: Option<[u8; HASH_LEN]>,
    /// Ask for the server's key, where only its fingerprint is known. Costs the length of a key in one record.
    pub ask_for_key: bool,
    /// Bytes of the longest record that this client can take, header and tag included: at least
    /// [`MIN_RECORD_LIMIT`](crate::MIN_RECORD_LIMIT).
    pub record_limit: u16,
}

/// Who a server is, and what it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// The server's id.
    pub id: [u8; ID_LEN],
    /// The fingerprint of its key.
    pub fingerprint: [u8; HASH_LEN],
    /// Bytes of the longest record that it can take, header and tag included: at least
    /// [`MIN_RECORD_LIMIT`](crate::MIN_RECORD_LIMIT).
    pub record_limit: u16,
}

/// How a client authenticates.
#[derive(Clone)]
pub enum Credentials<'c> {
    /// An enrolled identity.
    Key {
        /// The id that was enrolled.
        id: [u8; ID_LEN],
        /// How often the identity's key was replaced.
        key_epoch: u32,
        /// The fingerprint of its key.
        fingerprint: [u8; HASH_LEN],
    },
    /// First contact: a new identity.
    Enroll {
        /// A fresh UUIDv4.
        id: [u8; ID_LEN],
        /// The display name it wants.
        name: &'c str,
        /// Its key.
        key: PublicKey<'c>,
        /// What admits it, where the server's policy asks for one.
        token: Option<&'c Token>,
    },
}

/// Admits a new client. The secret is never sent; a MAC over the handshake's transcript proves that it is known.
#[derive(Clone)]
pub struct Token {
    /// Names it to the server.
    pub id: [u8; 8],
    /// 128 random bits.
    pub secret: Secret<16>,
}

/// What two nodes keep of a connection so that the next one needs no RSA (PROTOCOL 4.10).
///
/// Either side may forget it at any time. It is as secret as the keys of a connection: whoever has it is the client to
/// that server, and the server to that client, until it expires.
#[derive(Clone)]
pub struct Channel {
    /// Names it to the server; random.
    pub id: [u8; ID_LEN],
    /// What both sides share.
    pub secret: Secret<HASH_LEN>,
    /// The client.
    pub client: [u8; ID_LEN],
    /// The fingerprint of the client's key.
    pub client_key: [u8; HASH_LEN],
    /// How often the client's key was replaced.
    pub key_epoch: u32,
    /// The server.
    pub server: [u8; ID_LEN],
    /// The fingerprint of the server's key.
    pub server_key: [u8; HASH_LEN],
}
