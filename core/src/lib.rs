//! The Ossicle protocol: end-to-end encrypted messages between people and microcontrollers, over servers that cannot read
//! them.
//!
//! This crate is the whole client and server side of the protocol as values that turn bytes into steps. It owns no
//! socket, clock, executor, random generator or allocator; memory is the caller's. The bytes are specified in
//! `PROTOCOL.md` beside this crate, well enough to write a client in another language.
//!
//! # Who is who
//!
//! ```text
//!    your firmware, or a host                                       |  no socket, no clock,
//!        |                                                          |  no executor, no generator,
//!        |  its own loop: many records      drivers: blocking, async|  no allocator, no unsafe
//!  ======|==========================================|===============|==============================
//!        |                              +-----------v-----------+
//!        |                              | Client   Endpoint     |  borrowed rx and tx;
//!        |                              | what one small client |  embedded-io only in the
//!        |                              | does over a connection|  drivers
//!        |                              +-----------+-----------+
//!        v                                          v
//!    +----------------------------------------------------------------------------+
//!    | Connection    receive(data) -> Need | Wait | Record { event }               |
//!    |               send(message, out)    transmit(out)    ask() ... answers      |
//!    +------+----------------------+---------------------------+-------------------+
//!           | records              | messages                  | seal, open
//!    +------v------+       +-------v--------+          +-------v--------+    +----------------+
//!    | record      |       | handshake      |--------->| crypto         |<---| envelope       |
//!    +-------------+       | Expect* states |  keys    | Aead, HKDF ... |    | bundle, chain  |
//!                          +----------------+          +----------------+    +----------------+
//!        wire (all bytes), config, error: any room may open them; rsa answers signatures on devices
//! ```
//!
//! - [`Client`] is what firmware wants: it joins, publishes its keys, sends, opens and acknowledges for a handful of peers.
//! - [`Endpoint`] is one connection with two buffers, for whoever speaks [`Message`]s by itself.
//! - [`Connection`] has no buffers at all: servers and hosts, which have many connections, stand on it.
//! - [`SendingChain`] and [`ReceivingChain`] seal and open what no server reads.
//!
//! # In firmware
//!
//! RSA signatures, the one thing that takes a small device seconds, are *asked for*: by software with the feature `rsa`
//! (which needs an allocator with an arena of 10.5 KiB), or by a secure element of yours.
//!
//! ```no_run
//! # #[cfg(feature = "rsa")]
//! # fn device<S: embedded_io::Read + embedded_io::Write, R: rand_core::TryCryptoRng>(
//! #     page: &[u8], stream: &mut S, rng: &mut R, seed: &[u8; 64],
//! # ) -> Result<(), Box<dyn core::error::Error>> where S::Error: 'static {
//! use ossicle_core::*;
//!
//! let page = IdentityPage::decode(page)?; // made by `ossicle enroll`, in a flash region of its own
//! let rsa = RsaKey::new(page.key.d, page.key.p, page.key.q)?;
//! let mut modulus = [0; MAX_RSA_LEN];
//! let identity = ClientIdentity { id: page.id, key_epoch: 0, key: rsa.public(&mut modulus)?, server: page.server };
//! let owner = PeerConfig { id: page.owner.id, key: page.owner.key, oldest: Some(page.owner.bundle) };
//! let (mut rx, mut tx, mut signature) = ([0; 1024], [0; 1024], [0; 256]);
//! let buffers = ClientBuffers { rx: &mut rx, tx: &mut tx, signature: &mut signature };
//! let mut client = Client::<1>::new(identity, &[owner], buffers, seed)?;
//! client.start(0); // a chain to the owner, as soon as we are connected
//! loop {
//!     blocking::drive(&mut client, stream)?;
//!     match client.poll(rng)? {
//!         ClientStep::Sign(statement) => {
//!             let mut signature = [0; 256];
//!             rsa.sign(&statement, rng, &mut signature)?;
//!             client.sign(&signature)?;
//!         }
//!         ClientStep::Verify { key, statement, signature } => {
//!             let valid = verify_rsa(key, &statement, signature).is_ok();
//!             client.verified(valid)?;
//!         }
//!         ClientStep::Event(ClientEvent::PeerReady(owner)) => {
//!             client.send(owner, Rungs::NONE, false, 0, b"21.50C led=0")?;
//!         }
//!         ClientStep::Event(ClientEvent::Message { signed: true, body, .. }) => println!("the owner says {body:?}"),
//!         ClientStep::Event(ClientEvent::Closed(_)) => return Ok(()), // nothing comes any more: `reconnect`
//!         _ => {}
//!     }
//! }
//! # }
//! ```
//!
//! # Features
//!
//! None by default, all additive, none changes what the others do: `rsa` (RSA in software; needs `alloc`), `async` (the
//! drivers for `embedded-io-async`), `defmt` (`defmt::Format` for public types that hold no secret).

#![no_std]
#![forbid(unsafe_code)]
#[cfg(test)]
extern crate std;

// What fuzzers need weakens everything: it cannot be built into an image, nor into a release of anybody who set the flag
// by accident. Fuzzers themselves are optimised, with debug assertions.
#[cfg(all(fuzzing, any(target_os = "none", not(debug_assertions))))]
compile_error!("`--cfg fuzzing` is for fuzzers only: it may not be shipped");

mod client;
mod config;
mod connection;
mod crypto;
mod driver;
mod endpoint;
mod envelope;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod handshake;
mod page;
mod record;
#[cfg(feature = "rsa")]
mod rsa;
mod wire;

pub use client::{Client, ClientBuffers, ClientEvent, ClientGroup, ClientIdentity, ClientStep, PeerConfig};
pub use config::{Channel, ClientConfig, Credentials, ServerConfig, Token};
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
    EnvelopeHeader, FORMER, GroupChains, MAX_KIND, MAX_MESSAGES, Membership, MembershipError, OpenError, Opened,
    Prekey, Prekeys, RECEIPT_VERIFIER_LEN, ReceiptVerifier, ReceivingChain, Rotation, SIGNED_OVERHEAD, SafetyNumber,
    SealError, Sealed, SendingChain, WRAP_LEN, WrapHeader, direct_members_hash, direct_sid, group_version,
    members_hash, name_prekey_id,
};
pub use error::{ApiMisuse, BufferError, Error, PeerError, Reason};
pub use handshake::client::ServerClaim;
pub use handshake::retry::{COOKIE_LEN, CookieKey, MAX_PUZZLE_BITS, Presented, Puzzle};
pub use handshake::server::{ClaimKind, ClientClaim};
pub use handshake::{enrolment_statement, token_verifier};
pub use page::{GroupPolicy, IdentityPage, MAX_PAGE_LEN, MAX_PAGE_MODULUS_LEN, PageError, PageKey, PageOwner};
#[cfg(feature = "rsa")]
pub use rsa::{RsaKey, verify as verify_rsa};
pub use wire::{
    Answer, Body, Change, Changed, ChannelInfo, Channels, ChannelsResponse, CloseConversation, Closed, DirectoryEntry,
    DirectoryList, Enrol, ExpireChannels, Fixed, Follow, FollowResponse, GroupFlags, HEADER_LEN, ID_LEN, Init, Invite,
    Login, Lookup, MAX_ENROL_BATCH, MAX_MEMBERS, MAX_NAME_LEN, MAX_PASSWORD_LEN, MAX_POST_LEN, MAX_RECORD_LEN,
    MAX_WATCHED, MIN_RECORD_LIMIT, Member, MemberChanged, MemberState, Members, Message, Names, News, Password,
    PeerStatus, Post, Presence, RECORD_OVERHEAD, Receipt, Rotate, Rung, Rungs, SEALED_NAME_LEN, Said, Say, Settings,
    SignedBundle, Subject, Successor, SuccessorQuery, ToldBy, Unwatch, Watch, WatchResponse,
};

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
