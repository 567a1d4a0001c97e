//! The store: the source of truth about who exists on this server and what belongs to them.
//!
//! The rest of the house knows [`Store`] alone. Every `Ok` means durable (the exceptions, [`Store::touch`],
//! [`Store::acknowledge`] and [`Store::remove`], say so), every refusal is typed, and every operation is one
//! transaction, so that a backend which several servers share can keep the same promises. A backend never blocks the
//! thread of its caller. Nothing here can read a message, and no private key, token or password is kept, only what
//! verifies them. `sqlite` is the default backend, `memory` is for simulations; whatever is added must pass
//! `conformance`.

use core::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::metrics::StoreHealth;
use crate::name::{Name, Pattern};

#[cfg(test)]
mod conformance;
mod conversation;
pub mod home;
pub mod inspect;
pub mod memory;
mod public;
mod queue;
pub(crate) mod snapshot;
mod sqlite;

pub use conversation::{
    Announce, AnswerError, CloseError, Closing, Conversation, FoundError, Founded, Founding, Invitation,
    MAX_CONVERSATIONS, MAX_INVITATIONS, Member, MemberAnswer, MemberSignature, MemberState, Notice,
};
pub use public::{KeptPost, NewPost, Post, Posts, Said, SayError};
pub use queue::{Item, ItemKind, NewItem, Put, PutError, QueueLimits, Refuse, Waiting};
pub use sqlite::SqliteStore;

/// A client's id.
pub type ClientId = [u8; 16];
/// A conversation's id (`sid`).
pub type ConversationId = [u8; 16];
/// A sender chain's id.
pub type ChainId = [u8; 8];
/// A channel's id.
pub type ChannelId = [u8; 16];
/// An enrolment token's id.
pub type TokenId = [u8; 8];

/// Routes that one sender can keep to one recipient; beyond it the oldest goes.
pub const MAX_ROUTES: usize = 64;

/// What a server must remember, durably.
///
/// Times are seconds since 1970. A call whose future is dropped may or may not take effect; a call that returned an
/// error other than a refusal may take effect only if the error is [`StoreError::Io`] and the server then starts anew.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// What was decided when the store was made.
    fn meta(&self) -> Meta;

    /// How it is, as far as that is known without a look at what it holds.
    fn health(&self) -> StoreHealth;

    /// Writes something that changes nothing, to see whether that works.
    ///
    /// # Errors
    /// [`StoreError`]: what everybody would be told who has something to write, or what was told to those who asked for
    /// something that is damaged.
    async fn probe(&self) -> Result<(), StoreError>;

    /// The client with this id, revoked or not.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn client(&self, id: &ClientId) -> Result<Option<ClientRecord>, StoreError>;

    /// The client that holds this name; who was revoked holds none.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn client_by_name(&self, name: &Name) -> Result<Option<ClientRecord>, StoreError>;

    /// At most `limit` clients that hold a name, by the bytes of the normalised name, from the first one after `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn clients(&self, after: Option<&Name>, limit: usize) -> Result<Vec<ClientRecord>, StoreError>;

    /// Enters a client: checks and uses the token, and takes name, id and key, all or nothing.
    ///
    /// The same key under the same id and name is a [`Enrolled::Repeat`] and uses nothing, whatever became of its token.
    /// The order of the checks is: repeat, enroller, token, name, id, key; so that only who may enrol learns what is in
    /// use. That the caller holds key and token was proved before.
    ///
    /// # Errors
    /// [`EnrolError`].
    async fn enrol(&self, enrolment: Enrolment) -> Result<Enrolled, EnrolError>;

    /// Enters all of these clients or none, in one transaction and in their order, each as [`Store::enrol`] would.
    ///
    /// # Errors
    /// [`RefusedEntry`]: the first that cannot be entered.
    async fn enrol_all(&self, batch: Vec<Enrolment>) -> Result<Vec<Enrolled>, RefusedEntry>;

    /// Ends a client for good: its bundle, channels, chain routes, queue, posts and account go, its id and key are never admitted again,
    /// its name is free for a new key. What `refuse` makes of its queue waits for the senders from then on, and in its
    /// conversations the creator and those who accepted are told by `announce`.
    ///
    /// Returns all of these, each once; `None` if there is no such client or it was revoked before.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn revoke(
        &self,
        id: &ClientId,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Option<Vec<ClientId>>, StoreError>;

    /// Replaces a client's identity key and bundle, and keeps the step for [`Store::successor`]. Its channels, chain
    /// routes and posts go, its queue stays; the former key is never admitted again. The same rotation again is fine and changes
    /// nothing.
    ///
    /// # Errors
    /// [`RotateError`].
    async fn rotate(&self, rotation: NewKey) -> Result<(), RotateError>;

    /// The key that followed the client's key of this epoch, if that key signed it.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn successor(&self, id: &ClientId, key_epoch: u32) -> Result<Option<Successor>, StoreError>;

    /// Enters an account, and reserves its name, which a client may have already.
    ///
    /// # Errors
    /// [`AccountError`].
    async fn add_account(&self, name: Name, verifier: Verifier, now: u64) -> Result<(), AccountError>;

    /// The account with this name.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn account(&self, name: &Name) -> Result<Option<Account>, StoreError>;

    /// At most `limit` accounts, by the bytes of the normalised name, from the first one after `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn accounts(&self, after: Option<&Name>, limit: usize) -> Result<Vec<Account>, StoreError>;

    /// Changes an account; false if there is none of this name. Another password ends the channels of its client.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn change_account(&self, name: &Name, change: AccountChange, now: u64) -> Result<bool, StoreError>;

    /// Gives the client of an account another key, or makes that client: checks that the account still is what the
    /// password was verified against, all or nothing. The former key's channels, routes, posts and bundle go, its queue stays; it
    /// is never admitted again, and nothing says that it gave way. The same again changes nothing.
    ///
    /// # Errors
    /// [`LoginError`].
    async fn log_in(&self, login: LoginEntry) -> Result<LoggedIn, LoginError>;

    /// Notes the largest record that the client takes.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn set_record_limit(&self, id: &ClientId, limit: u16) -> Result<(), StoreError>;

    /// Notes when the client was last seen. Every later read shows it, but it is made durable lazily: a crash may lose it.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn touch(&self, id: &ClientId, now: u64) -> Result<(), StoreError>;

    /// Replaces a client's bundle. The first may have any epoch, each further one exactly the next; the same bundle
    /// again is fine and changes nothing.
    ///
    /// # Errors
    /// [`PublishError`].
    async fn publish_bundle(
        &self,
        id: &ClientId,
        epoch: u32,
        bundle: &[u8],
        signature: &[u8],
    ) -> Result<(), PublishError>;

    /// The client's bundle.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn bundle(&self, id: &ClientId) -> Result<Option<BundleRecord>, StoreError>;

    /// Enters a token.
    ///
    /// # Errors
    /// [`TokenError`].
    async fn add_token(&self, token: Token) -> Result<(), TokenError>;

    /// The token with this id, also when it is expired or used up: what a repeat proves is verified against it.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn token(&self, id: &TokenId) -> Result<Option<Token>, StoreError>;

    /// At most `limit` tokens that still admit somebody at `now`, in the order of their ids, from the first one after
    /// `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn tokens(&self, after: Option<&TokenId>, limit: usize, now: u64) -> Result<Vec<Token>, StoreError>;

    /// Ends tokens that are still open at `now`, and returns how many.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn end_tokens(&self, which: Tokens, now: u64) -> Result<u64, StoreError>;

    /// Opens a conversation and invites its members, whose invitations wait from then on. The same founding again is a
    /// [`Founded::Repeat`]. An id that a conversation or a chain has or a closed conversation had is refused.
    ///
    /// # Errors
    /// [`FoundError`].
    async fn found(&self, founding: Founding) -> Result<Founded, FoundError>;

    /// What is known of a conversation of several.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn conversation(&self, sid: &ConversationId) -> Result<Option<Conversation>, StoreError>;

    /// Lets the invitations of a client to open conversations that it may answer, or has accepted, wait for it once more:
    /// it may have forgotten them. Those that it has accepted come first. Whether any wait now.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn invite_again(&self, client: &ClientId, now: u64) -> Result<bool, StoreError>;

    /// Notes a member's answer. The others who accepted are told by `announce`, and whoever accepts is told of all who did
    /// before and signed that. The same again changes nothing; an acceptance under another signature takes the place of the
    /// former, and is one of somebody who may have forgotten what he was told.
    ///
    /// Returns for whom something waits now, each once.
    ///
    /// # Errors
    /// [`AnswerError`].
    async fn answer(&self, answer: MemberAnswer, announce: Announce) -> Result<Vec<ClientId>, AnswerError>;

    /// Closes a conversation for good, on the word of a member who accepted. Its members, its routes and what of it waits
    /// go, and what `refuse` makes of that waits for the senders; everybody who did not decline, but `by`, is told by
    /// `announce`.
    ///
    /// # Errors
    /// [`CloseError`].
    async fn close(
        &self,
        sid: &ConversationId,
        by: &ClientId,
        signature: &MemberSignature,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Closing, CloseError>;

    /// Ends at most `limit` unanswered invitations from before `before`, tells those who accepted by `announce`, and
    /// returns how many invitations that were and for whom something waits now; with fewer than `limit`, no more are left.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn expire_invitations(
        &self,
        before: u64,
        limit: usize,
        now: u64,
        announce: Announce,
    ) -> Result<(usize, Vec<ClientId>), StoreError>;

    /// Keeps what a client says to everybody, under the next number. The same again is a [`Said::Repeat`], as long as it is
    /// kept, or the author's last. Beyond [`QueueLimits::posts`] the oldest of the author who has the most goes.
    ///
    /// # Errors
    /// [`SayError`].
    async fn say(&self, new: NewPost) -> Result<Said, SayError>;

    /// At most `limit` of the posts beyond the number `after`, in the order of their numbers.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn posts(&self, after: u64, limit: usize) -> Result<Posts, StoreError>;

    /// Removes the posts that were kept before `before`, and returns how many there were.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn expire_posts(&self, before: u64) -> Result<u64, StoreError>;

    /// Notes that `chain` is `sender`'s in the conversation `sid`, and that `recipient` has its wrap. The same again is
    /// fine. Of more than [`MAX_ROUTES`] routes from one sender to one recipient the oldest goes.
    ///
    /// In a conversation that was founded both must have accepted. What the two have between themselves alone needs none:
    /// its id is theirs, whoever founds something under it.
    ///
    /// # Errors
    /// [`ChainError`].
    async fn register_chain(
        &self,
        chain: &ChainId,
        sender: &ClientId,
        sid: &ConversationId,
        recipient: &ClientId,
    ) -> Result<(), ChainError>;

    /// Where messages of this chain go.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn chain(&self, chain: &ChainId) -> Result<Option<ChainRoute>, StoreError>;

    /// Keeps a channel of `client`, drops every other but `keep`: a client has at most two. Durable like the rest; who
    /// must not wait for the disk does not wait for this call.
    ///
    /// # Errors
    /// [`ChannelError`].
    async fn put_channel(
        &self,
        client: &ClientId,
        channel: ChannelRecord,
        keep: Option<ChannelId>,
    ) -> Result<(), ChannelError>;

    /// The channel with this id and its client, unless it has expired at `now`.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn channel(&self, id: &ChannelId, now: u64) -> Result<Option<(ClientId, ChannelRecord)>, StoreError>;

    /// The channels of `client` that have not expired at `now`, in the order of their ids, each with its end.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn channels(&self, client: &ClientId, now: u64) -> Result<Vec<(ChannelId, u64)>, StoreError>;

    /// Drops all channels of `client`, and returns how many there were.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn drop_channels(&self, client: &ClientId) -> Result<u64, StoreError>;

    /// Lets items wait for their recipients, each decided by itself and in their order; the answers have the same order.
    ///
    /// An envelope that waits already is a repeat if its bytes are the same, and is refused as rewound if not; neither
    /// sender nor time nor wanted receipts count. Of wraps of one name the latest waits: in the place of the former, or
    /// behind everything else if the former may have been given to the recipient by [`Store::queue`]; of notices as well.
    /// Receipts are never refused for want of room: the oldest goes. Nor are notices: all of them wait.
    ///
    /// # Errors
    /// [`StoreError`], for all of them; [`PutError`] for one.
    async fn put(&self, items: Vec<NewItem>) -> Result<Vec<Result<Put, PutError>>, StoreError>;

    /// What waits for `recipient` beyond the number `after`, in the order of numbers: at most `max_items` items of
    /// `max_bytes` bytes together, but at least one if there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn queue(
        &self,
        recipient: &ClientId,
        after: u64,
        max_items: usize,
        max_bytes: usize,
    ) -> Result<Vec<Item>, StoreError>;

    /// Removes what waits for `recipient` up to and with the number `up_to`, and returns how many items that were.
    ///
    /// Every later read shows it, but it is made durable lazily: a crash may bring the items back, never take others.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn acknowledge(&self, recipient: &ClientId, up_to: u64) -> Result<u64, StoreError>;

    /// Removes single items of `recipient`, and returns how many there were. As durable as [`Store::acknowledge`].
    ///
    /// # Errors
    /// [`StoreError`].
    async fn remove(&self, recipient: &ClientId, seqs: &[u64]) -> Result<u64, StoreError>;

    /// How much waits for `recipient`. Costs no look at the disk.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn waiting(&self, recipient: &ClientId) -> Result<Waiting, StoreError>;

    /// Removes at most `limit` items that were accepted before `before`, and returns them with their recipients; with
    /// fewer than `limit`, no more are left. What `refuse` makes of them waits for the senders from then on. Receipts go
    /// as well: they are returned, and refused to nobody. Notices stay.
    ///
    /// # Errors
    /// [`StoreError`].
    async fn expire(&self, before: u64, limit: usize, refuse: Refuse) -> Result<Vec<(ClientId, Item)>, StoreError>;
}

/// A store that tasks share.
pub type SharedStore = Arc<dyn Store>;

/// What is decided once, when a store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The server's id.
    pub server_id: [u8; 16],
    /// Random, another one for each init and restore: clients that see it change publish and send again.
    pub store_epoch: [u8; 8],
}

/// A client, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRecord {
    /// Its id.
    pub id: ClientId,
    /// Its name as it was given.
    pub name: String,
    /// The modulus of its identity key.
    pub modulus: Vec<u8>,
    /// How often the identity key was changed.
    pub key_epoch: u32,
    /// The client that enrolled it, if it is somebody's device.
    pub enrolled_by: Option<ClientId>,
    /// Whether it may not enter any more.
    pub revoked: bool,
    /// When it was enrolled.
    pub enrolled_at: u64,
    /// When it was last seen, if ever.
    pub last_seen: Option<u64>,
    /// The largest record that it takes, in bytes.
    pub record_limit: u16,
}

/// A client to be entered.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Its id.
    pub id: ClientId,
    /// Its name.
    pub name: Name,
    /// The modulus of its identity key, which has been accepted.
    pub modulus: Vec<u8>,
    /// The token that it proved to hold; `None` where policy or enroller admit it without.
    pub token_id: Option<TokenId>,
    /// The client that enrols it as its device.
    pub enrolled_by: Option<ClientId>,
    /// The largest record that it takes, in bytes.
    pub record_limit: u16,
    /// The time.
    pub now: u64,
}

/// A key that takes the place of a client's present one. Everything that can be verified was.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The client.
    pub id: ClientId,
    /// One more than that of the present key.
    pub key_epoch: u32,
    /// Its modulus, which has been accepted.
    pub modulus: Vec<u8>,
    /// The present key's signature over the rotation.
    pub signature: Vec<u8>,
    /// The bundle under the new key.
    pub bundle: BundleRecord,
}

/// A key that followed another, and what the other signed about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Successor {
    /// The modulus of the key.
    pub modulus: Vec<u8>,
    /// The signature of the key before it.
    pub signature: Vec<u8>,
}

/// What an account's password is verified with: its Argon2id hash, in the form that names the parameters.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verifier(pub String);

/// Shows nothing: whoever has it can guess passwords at his leisure.
impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier(..)")
    }
}

/// A name whose holder enters by a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The name as it was given.
    pub name: String,
    /// What its password is verified with.
    pub verifier: Verifier,
    /// Whether it takes no password now.
    pub locked: bool,
    /// When it was made or changed.
    pub changed_at: u64,
}

/// What becomes of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccountChange {
    /// It has another password.
    Password(Verifier),
    /// It takes no password any more, or takes it again.
    Locked(bool),
    /// It goes; its client stays.
    Removed,
}

/// A key that enters an account, whose password was verified.
#[derive(Clone, Debug)]
pub struct LoginEntry {
    /// The account's name.
    pub name: Name,
    /// What the password was verified against.
    pub verifier: Verifier,
    /// The id of the client, if it has none yet.
    pub id: ClientId,
    /// The modulus of the key, which has been accepted.
    pub modulus: Vec<u8>,
    /// The largest record that it takes, in bytes.
    pub record_limit: u16,
    /// The time.
    pub now: u64,
}

/// What a login did, and to which client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoggedIn {
    /// The account has a client now.
    New(ClientId),
    /// Its client has another key now.
    Changed(ClientId),
    /// Its client had this key already.
    Repeat(ClientId),
}

impl LoggedIn {
    /// The client.
    pub const fn client(&self) -> ClientId {
        match self {
            Self::New(id) | Self::Changed(id) | Self::Repeat(id) => *id,
        }
    }
}

/// What an enrolment did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrolled {
    /// The client was entered.
    New,
    /// It was there before, and nothing was used or changed.
    Repeat,
}

/// An enrolment token, as the server keeps it: enough to verify a proof, not enough to make one out of.
#[derive(Clone)]
pub struct Token {
    /// Its id, which is public.
    pub id: TokenId,
    /// What verifies that a client holds it.
    pub verifier: [u8; 32],
    /// The names that it admits; `None` for any.
    pub name_pattern: Option<Pattern>,
    /// The id that it admits; `None` for any.
    pub preset_id: Option<ClientId>,
    /// When it ends.
    pub expires: u64,
    /// How many clients it still admits; `None` without end.
    pub uses: Option<u32>,
    /// Whether it is in the URL that the server printed at its start.
    pub printed: bool,
}

/// Shows everything but the verifier.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("id", &self.id)
            .field("name_pattern", &self.name_pattern)
            .field("preset_id", &self.preset_id)
            .field("expires", &self.expires)
            .field("uses", &self.uses)
            .field("printed", &self.printed)
            .finish_non_exhaustive()
    }
}

/// Which tokens to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// All of them, as a restored server must.
    All,
    /// The one with this id.
    One(TokenId),
    /// Those of URLs that the server printed, at its next start.
    Printed,
}

/// A client's bundle and the signature of its identity key over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleRecord {
    /// The bundle's epoch.
    pub epoch: u32,
    /// The bundle, encoded.
    pub bundle: Vec<u8>,
    /// The signature.
    pub signature: Vec<u8>,
}

/// Where messages of a chain go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRoute {
    /// The only client that may use it.
    pub sender: ClientId,
    /// The conversation that it belongs to.
    pub sid: ConversationId,
    /// Whether that was founded: then receipts say whose word they are.
    pub group: bool,
    /// Who has a wrap of it, in the order in which they got it.
    pub recipients: Vec<ClientId>,
}

/// A channel, sealed under a key that the store does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelRecord {
    /// Its id.
    pub id: ChannelId,
    /// The secret and what it is bound to, opaque here.
    pub sealed: Vec<u8>,
    /// When it ends.
    pub expires: u64,
}

/// Why a client was not entered. Only the log may say so in full; a peer is told less.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// The client that enrols it is unknown or revoked.
    #[error("who enrols it is unknown or revoked")]
    Enroller,
    /// Another key has this id, or had it before it was revoked.
    #[error("another client has this id")]
    IdInUse,
    /// This key has another id or name, or was revoked.
    #[error("this key belongs to another or a revoked client")]
    KeyInUse,
    /// Another client has this name, or an account reserves it.
    #[error("another client has this name, or an account reserves it")]
    NameInUse,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The token does not admit it.
    #[error("the token {0}")]
    Token(TokenRefusal),
}

/// Why none of a batch was entered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index}: {error}")]
pub struct RefusedEntry {
    /// The entry, counted from 0; if the store failed it is nobody's fault, and this is the first.
    pub index: usize,
    /// Why it was not entered.
    pub error: EnrolError,
}

impl From<StoreError> for RefusedEntry {
    fn from(error: StoreError) -> Self {
        Self { index: 0, error: error.into() }
    }
}

/// Why a token does not admit a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenRefusal {
    /// Its time is over.
    #[error("has expired")]
    Expired,
    /// It is for another id.
    #[error("is for another id")]
    Id,
    /// It is for other names.
    #[error("is for other names")]
    Name,
    /// There is none with this id.
    #[error("is unknown")]
    Unknown,
    /// It has admitted as many clients as it may.
    #[error("is used up")]
    UsedUp,
}

/// Why an account was not entered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccountError {
    /// There is one of this name.
    #[error("there is an account of this name")]
    Exists,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a login changed nothing. Only the log may say so in full; a peer is told less.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoginError {
    /// The account is gone, locked, or has another password by now.
    #[error("the account changed meanwhile")]
    Account,
    /// Another client has this id, or had it before it was revoked.
    #[error("another client has this id")]
    IdInUse,
    /// It is or was the key of a client.
    #[error("the key was used before")]
    KeyInUse,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its key was replaced as often as can be counted.
    #[error("the key cannot be replaced once more")]
    Worn,
}

/// Why a token was not entered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// There is another one with this id.
    #[error("another token has this id")]
    IdInUse,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a bundle was not published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// It is older than the stored one, or another one of the same epoch.
    #[error("the epoch must be higher than {stored}")]
    Epoch {
        /// The epoch of the stored bundle.
        stored: u32,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The client is unknown or revoked.
    #[error("the client is unknown or revoked")]
    Unknown,
}

/// Why a key was not replaced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RotateError {
    /// The bundle is not newer than the stored one.
    #[error("the epoch of the bundle must be higher than {stored}")]
    BundleEpoch {
        /// The epoch of the stored bundle.
        stored: u32,
    },
    /// It is or was the key of this or another client.
    #[error("the key was used before")]
    KeyInUse,
    /// It does not follow the present one.
    #[error("the key epoch must be one more than {present}")]
    KeyEpoch {
        /// The key epoch of the present key.
        present: u32,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The client is unknown or revoked.
    #[error("the client is unknown or revoked")]
    Unknown,
}

/// Why a chain was not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The conversation was closed.
    #[error("the conversation was closed")]
    Closed,
    /// The id is another sender's, or the same sender's in another conversation.
    #[error("the chain id is in use")]
    InUse,
    /// Sender or recipient has not accepted the conversation.
    #[error("sender or recipient takes no part in the conversation")]
    NotMember,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Sender or recipient is unknown or revoked.
    #[error("sender or recipient is unknown or revoked")]
    Unknown,
}

/// Why a channel was not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The client is unknown or revoked.
    #[error("the client is unknown or revoked")]
    Unknown,
}

/// What is wrong with the store itself. Each says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Somebody else is using it.
    #[error("{0} is in use by another process: stop it, or choose another data directory with --data")]
    Busy(String),
    /// It is shut.
    #[error("the store is closed: the server is stopping")]
    Closed,
    /// It holds what it cannot hold. Nothing that could be read wrongly is used.
    #[error("the store is damaged ({0}): stop the server, keep a copy of its data directory, and restore a backup")]
    Corrupt(String),
    /// No room. What was acknowledged is safe, and the store goes on by itself once there is room.
    #[error("the disk that holds {0} is full: free some space; a server that runs goes on by itself")]
    Full(String),
    /// The system or its disk failed. After a failed write nothing more is accepted, because nobody can tell what of it
    /// the disk has: only a new start can.
    #[error("the store failed ({0}): look at the disk and its permissions, then start the server again")]
    Io(String),
    /// It was made by a newer version.
    #[error("{0} was written by a newer version of ossicle: use that version, or choose another directory with --data")]
    Newer(String),
}
