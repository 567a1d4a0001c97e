//! x
#![no_std]
#![forbid(unsafe_code)]
#[cfg(test)]
extern crate std;

mod client;
mod config;
mod connection;
mod crypto;
mod driver;
mod endpoint;
mod envelope;
mod error;
mod handshake;
mod page;
mod record;
#[cfg(feature = "rsa")]
mod rsa;
mod wire;

pub use client::{Client, ClientBuffers, ClientEvent, ClientIdentity, ClientStep, PeerConfig};
pub use config::{ClientConfig, Credentials, ServerConfig, Token};
pub use connection::{Ask, Connection, Event, Received};
pub use crypto::{
    Aead, ExchangeKey, HASH_LEN, MAX_RSA_LEN, MAX_SPKI_LEN, NONCE_LEN, PublicKey, RustCrypto, SIGNATURE_LEN, Secret,
    SigningKey, Statement, TAG_LEN, generator_seed,
};
#[cfg(feature = "async")]
pub use driver::asynch;
pub use driver::{DriverError, blocking};
pub use endpoint::{Buffers, Drive, Endpoint, Io, Step};
pub use envelope::{
    AcceptError, BUNDLE_LEN, Bundle, BundleError, BundleKeys, BundleView, Conversation, Decision, ENVELOPE_OVERHEAD,
    EnvelopeHeader, FORMER, MAX_KIND, MAX_MEMBERS, MAX_MESSAGES, Member, OpenError, Opened, Prekey, Prekeys,
    RECEIPT_VERIFIER_LEN, ReceiptVerifier, ReceivingChain, SIGNED_OVERHEAD, SealError, Sealed, SendingChain, WRAP_LEN,
    WrapHeader, direct_members_hash, direct_sid, members_hash,
};
pub use error::{ApiMisuse, BufferError, Error, PeerError, Reason};
pub use handshake::client::ServerClaim;
pub use handshake::server::{ClaimKind, ClientClaim};
pub use handshake::{enrolment_statement, token_verifier};
pub use page::{IdentityPage, MAX_PAGE_LEN, MAX_PAGE_MODULUS_LEN, PageError, PageKey, PageOwner};
#[cfg(feature = "rsa")]
pub use rsa::{RsaKey, verify as verify_rsa};
pub use wire::{
    DirectoryEntry, DirectoryList, HEADER_LEN, ID_LEN, Lookup, MAX_NAME_LEN, MAX_RECORD_LEN, MIN_RECORD_LIMIT, Message,
    PeerStatus, Presence, RECORD_OVERHEAD, Receipt, Rung, Rungs, Settings, SignedBundle, Subject,
};
