//! End to end: what one client seals for another and no server reads.
//!
//! Bundles that an identity signed come in, wraps and envelopes go out, and the other way round on the other side. The
//! room seals, opens and numbers; it stores, sends and fetches nothing, has no clock, and learns from its caller which
//! identities are pinned and which signatures of RSA keys hold. It refuses whatever is not provably the sender's, changes
//! nothing before it knows, and never gives plaintext that was not verified.
//!
//! # Two layers
//!
//! ```text
//!  identity (RSA, signs only)
//!     signs  Bundle { exchange, prekey, verifying }     bundle.rs   once per epoch, served by the directory
//!               |
//!  SendingChain --wrap--> ReceivingChain                chain.rs    HPKE Auth, once per recipient; announced under `verifying`
//!               --seal--> open                                      one hash step and one AES-256-GCM per message
//!               <-receipt                                           a MAC that only that recipient and the sender can make
//!
//!  invitation --pins--> Membership                      group.rs    who is in a group, verifies what its members decide
//!  GroupChains                                          chain/      all chains of a group on a device, in few bytes
//!
//!  Post                                                 public.rs   what one says to everybody, signed and in clear
//!
//!  two identities --> SafetyNumber                      identity.rs what two people compare
//! ```
//!
//! # What is claimed, and what is not
//!
//! - A message is read by the members of its conversation only, and opens only as what its sender sealed: sender,
//!   conversation, membership, chain and number are authenticated.
//! - A thief of a recipient's prekey cannot begin a chain in another's name: chains are announced under the sender's own
//!   signature.
//! - **Forward secrecy begins when the prekey is erased** under which the chain was wrapped (five rotations later, about
//!   37 days on hosts), not at each message. The ratchet protects the past of a *state*, not of a recorded wrap.
//! - In a conversation without signatures, who steals a receiver's state can also speak *to that receiver* as the sender,
//!   until the next chain: [`Opened::signed`] says which messages that cannot concern.
//! - Who steals a sender's state speaks as him, in that conversation, until the next chain.
//! - A state that went back in time never repeats a nonce for two texts: eight bytes of each nonce depend on the text.
//! - A group is the one that its creator founded, with the keys that the reader has pinned: whom a server adds decrypts
//!   nothing, and whom it exchanges is noticed. No member speaks, accepts or closes for another.
//! - Members together with the server can give different members different texts under one number.
//! - The server sees who talks to whom, when and how much, and may withhold the end of a stream.

mod bundle;
mod chain;
mod group;
mod identity;
mod public;

pub use bundle::{
    BUNDLE_LEN, Bundle, BundleError, BundleKeys, BundleView, Conversation, Decision, FORMER, Prekey, Prekeys,
    direct_members_hash, direct_sid, members_hash,
};
pub use chain::{
    AcceptError, ENVELOPE_OVERHEAD, EnvelopeHeader, GroupChains, MAX_KIND, MAX_MESSAGES, OpenError, Opened,
    RECEIPT_VERIFIER_LEN, ReceiptVerifier, ReceivingChain, SIGNED_OVERHEAD, SealError, Sealed, SendingChain, WRAP_LEN,
    WrapHeader,
};
pub use group::{Membership, MembershipError, group_version, name_prekey_id};
pub use identity::{Rotation, SafetyNumber};

#[cfg(test)]
pub(crate) mod testing;
