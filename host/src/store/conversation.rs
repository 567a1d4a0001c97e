//! Conversations of several: who was invited to which, who accepted, and which were closed.
//!
//! The members are fixed when a conversation is founded. What its members are told waits in their queues as
//! [`ItemKind::Notice`], put there in the transaction that makes it true. A conversation that was closed leaves a
//! tombstone behind, so that its id is never another's.

use core::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{ChainId, ClientId, ConversationId, Item, ItemKind, NewItem, StoreError};

/// Open conversations that a client may be invited to or have accepted.
pub const MAX_CONVERSATIONS: usize = 256;
/// Invitations of one client to another that may be unanswered.
pub const MAX_INVITATIONS: usize = 16;

/// A member's signature over what he says of a conversation; opaque here.
pub type MemberSignature = [u8; 64];

/// A conversation to be opened. Everything that can be verified was.
#[derive(Clone, Debug)]
pub struct Founding {
    /// Its id, drawn by the creator.
    pub sid: ConversationId,
    /// Who founds it, and has accepted it by that.
    pub creator: ClientId,
    /// How often the creator's identity key was changed, as far as the caller knows.
    pub key_epoch: u32,
    /// Whether nobody but the creator may close it.
    pub creator_only: bool,
    /// The creator's signature: a founding under the same one is the same.
    pub signature: MemberSignature,
    /// Everybody else.
    pub invited: Vec<Invitation>,
    /// The time.
    pub now: u64,
}

/// A client that is invited.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// The client.
    pub client: ClientId,
    /// How often its identity key was changed, as far as the caller knows.
    pub key_epoch: u32,
    /// The encoded message that tells it: opaque here.
    pub notice: Arc<[u8]>,
}

/// What a founding did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Founded {
    /// The conversation is open, and everybody was invited.
    New,
    /// It was before, and nothing was changed.
    Repeat,
}

/// What a member says to an invitation.
#[derive(Clone, Copy, Debug)]
pub struct MemberAnswer {
    /// The conversation.
    pub sid: ConversationId,
    /// The member.
    pub member: ClientId,
    /// Whether it accepts.
    pub accepts: bool,
    /// Its signature over that.
    pub signature: MemberSignature,
    /// Invitations from before this have expired.
    pub oldest: u64,
    /// The time.
    pub now: u64,
}

/// How it stands with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// It has not answered.
    Invited,
    /// It takes part.
    Accepted,
    /// It does not want to.
    Declined,
    /// It did not answer in time.
    Expired,
    /// The client was revoked.
    Revoked,
}

/// A member of an open conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The client.
    pub client: ClientId,
    /// How it stands.
    pub state: MemberState,
    /// What it signed last, if it answered.
    pub signature: Option<MemberSignature>,
}

/// What is known of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conversation {
    /// It is open.
    Open {
        /// Who founded it.
        creator: ClientId,
        /// Whether nobody else may close it.
        creator_only: bool,
        /// When it was founded.
        at: u64,
        /// Everybody, the creator as well, in the order of ids.
        members: Vec<Member>,
    },
    /// It was closed.
    Closed {
        /// When.
        at: u64,
        /// By whom.
        by: ClientId,
    },
}

/// What a closing took away, and who has to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// The chains that are routed nowhere now.
    pub chains: Vec<ChainId>,
    /// For whom something waits now, each once.
    pub told: Vec<ClientId>,
}

/// What members are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// How it stands with a member now.
    Changed {
        /// The conversation.
        sid: ConversationId,
        /// The member.
        member: ClientId,
        /// How it stands.
        state: MemberState,
        /// What it signed, if it answered.
        signature: Option<MemberSignature>,
    },
    /// The conversation was closed.
    Closed {
        /// The conversation.
        sid: ConversationId,
        /// By whom.
        by: ClientId,
        /// What it signed.
        signature: MemberSignature,
    },
}

/// Encodes what members are told. Called by the store in the transaction that makes it true; it must not block.
#[derive(Clone)]
pub struct Announce(Arc<Encoder>);

type Encoder = dyn Fn(&Notice) -> Option<Arc<[u8]>> + Send + Sync;

impl Announce {
    /// Tells members what `encode` says.
    pub fn new(encode: impl Fn(&Notice) -> Option<Arc<[u8]>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(encode))
    }

    /// Tells nobody anything.
    pub fn silently() -> Self {
        Self::new(|_| None)
    }

    /// The notice for `recipient`.
    pub(super) fn item(&self, notice: &Notice, recipient: ClientId, at: u64) -> Option<NewItem> {
        let (sender, chain) = match notice {
            Notice::Changed { sid, member, .. } => (*member, name(sid, Some(member))),
            Notice::Closed { sid, by, .. } => (*by, name(sid, None)),
        };
        Some(item(recipient, sender, chain, (self.0)(notice)?, at))
    }
}

impl fmt::Debug for Announce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Announce").finish_non_exhaustive()
    }
}

impl Founding {
    /// What waits for the invited.
    pub(super) fn items(&self) -> Vec<NewItem> {
        let Self { sid, creator, invited, now, .. } = self;
        let invited = invited.iter();
        invited
            .map(|Invitation { client, notice, .. }| invitation(sid, *client, *creator, Arc::clone(notice), *now))
            .collect()
    }
}

/// An invitation that waits.
pub(super) fn invitation(
    sid: &ConversationId,
    invited: ClientId,
    creator: ClientId,
    notice: Arc<[u8]>,
    at: u64,
) -> NewItem {
    item(invited, creator, name(sid, None), notice, at)
}

fn item(recipient: ClientId, sender: ClientId, chain: ChainId, bytes: Arc<[u8]>, at: u64) -> NewItem {
    NewItem { recipient, sender, kind: ItemKind::Notice, chain, n: 0, wanted: 0, bytes, at }
}

/// The name under which a notice waits: of several about one member the latest is worth telling, so that nobody fills
/// another's queue by saying the same again and again. Nobody can choose an id that gives the name of another's notice.
fn name(sid: &ConversationId, member: Option<&ClientId>) -> ChainId {
    let mut hash = Sha256::new();
    hash.update(b"ossicle notice\0");
    hash.update(sid);
    hash.update(member.map_or(&[][..], |member| member));
    let hash: [u8; 32] = hash.finalize().into();
    let mut name = ChainId::default();
    name.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
    name
}

/// The names of all notices that a conversation with these members may have brought forth.
pub(super) fn names<'m>(
    sid: &'m ConversationId,
    members: impl Iterator<Item = &'m ClientId>,
) -> impl Iterator<Item = ChainId> {
    members.map(Some).chain([None]).map(move |member| name(sid, member))
}

/// What a member's answer comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing changes.
    Same,
    /// The member is in this state now, and the others are told.
    Now(MemberState),
    /// The member has accepted, the others are told, and he is told who else has: he is new, or comes back without what he knew.
    Joins,
}

/// Decides what the answer of a member in `state`, which signed `held`, to an invitation of `invited_at` comes to.
///
/// # Errors
/// [`AnswerError`].
pub(super) fn decide(
    answer: &MemberAnswer,
    state: MemberState,
    held: Option<&MemberSignature>,
    invited_at: u64,
) -> Result<Decision, AnswerError> {
    match (state, answer.accepts) {
        (MemberState::Invited, _) if invited_at < answer.oldest => Err(AnswerError::Expired),
        (MemberState::Invited, true) => Ok(Decision::Joins),
        (MemberState::Invited, false) => Ok(Decision::Now(MemberState::Declined)),
        (MemberState::Accepted, true) if held == Some(&answer.signature) => Ok(Decision::Same),
        (MemberState::Accepted, true) => Ok(Decision::Joins),
        (MemberState::Declined, false) => Ok(Decision::Same),
        (MemberState::Accepted, false) | (MemberState::Declined, true) => Err(AnswerError::Forbidden),
        (MemberState::Expired, _) => Err(AnswerError::Expired),
        (MemberState::Revoked, _) => Err(AnswerError::NotMember),
    }
}

/// Whether an item is gone with the conversation that these are the chains and the names of.
pub(super) const fn goes_with_its_conversation(kind: ItemKind) -> bool {
    match kind {
        ItemKind::Envelope | ItemKind::GroupEnvelope | ItemKind::Wrap | ItemKind::Notice => true,
        ItemKind::Receipt => false,
    }
}

/// Whether the sender of this is told what became of it.
pub(super) fn is_told_of(item: &Item) -> bool {
    item.kind != ItemKind::Receipt && item.kind != ItemKind::Notice
}

/// Why a conversation was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoundError {
    /// A conversation of this id was closed.
    #[error("a conversation with this id was closed")]
    Closed,
    /// There is another conversation with this id.
    #[error("another conversation has this id")]
    InUse,
    /// The key of a member is another one.
    #[error("the key of a member is another one")]
    KeyChanged,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A member takes part in as many conversations as may be, or has as many invitations unanswered or notices
    /// undelivered.
    #[error("a member cannot be invited to any more")]
    TooMany,
    /// A member is unknown or revoked.
    #[error("a member is unknown or revoked")]
    Unknown,
}

/// Why an answer to an invitation does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// The conversation was closed.
    #[error("the conversation was closed")]
    Closed,
    /// It comes too late.
    #[error("the invitation has expired")]
    Expired,
    /// The member has answered otherwise.
    #[error("the member has answered otherwise")]
    Forbidden,
    /// There is no such conversation, or the client is none of its members.
    #[error("the client is no member of such a conversation")]
    NotMember,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a conversation was not closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseError {
    /// It was closed before.
    #[error("the conversation was closed before")]
    Closed,
    /// The member did not accept, or only the creator may.
    #[error("this member may not close the conversation")]
    Forbidden,
    /// There is no such conversation, or the client is none of its members.
    #[error("the client is no member of such a conversation")]
    NotMember,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
