//! A store on a disk that is only memory, for simulations: it does what the disk is told to do, and says when.
//!
//! The [`Disk`] outlives the store, as a disk does: a store that is dropped and opened again finds what was written. What
//! of it survives a power cut is what was flushed, and the cut is [`Disk::cut_power`]. How long an operation takes, and
//! whether it succeeds, is decided by a function of the caller's, so that the same decisions give the same run. A server
//! that serves anybody has [`SqliteStore`](super::SqliteStore).

use core::cmp::Reverse;
use core::fmt;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use ossicle_core::direct_sid;
use tokio::time::sleep;

use super::conversation::{Decision, decide, goes_with_its_conversation, invitation, is_told_of, names};
use super::{
    Account, AccountChange, AccountError, Announce, AnswerError, BundleRecord, ChainError, ChainId, ChainRoute,
    ChannelError, ChannelId, ChannelRecord, ClientId, ClientRecord, CloseError, Closing, Conversation, ConversationId,
    EnrolError, Enrolled, Enrolment, FoundError, Founded, Founding, Item, ItemKind, KeptPost, LoggedIn, LoginEntry,
    LoginError, MAX_CONVERSATIONS, MAX_INVITATIONS, MAX_ROUTES, Member, MemberAnswer, MemberSignature, MemberState,
    Meta, NewItem, NewKey, NewPost, Notice, Posts, PublishError, Put, PutError, QueueLimits, Refuse, RefusedEntry,
    RotateError, Said, SayError, Store, StoreError, Successor, Token, TokenError, TokenId, TokenRefusal, Tokens,
    Verifier, Waiting,
};
use crate::metrics::StoreHealth;
use crate::name::Name;

/// Seconds for which ended tokens are remembered.
const TOKEN_MEMORY: u64 = 30 * 24 * 60 * 60;

/// What a store asks of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To read something.
    Read,
    /// To write something and flush it.
    Write,
}

/// How an operation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The time before it takes effect: a store that is dropped meanwhile has done nothing.
    pub before: Duration,
    /// The time after that, before the caller is told: a store that is dropped meanwhile has done it.
    pub after: Duration,
    /// What comes of it.
    pub outcome: Outcome,
}

/// What comes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeds; what was written is flushed.
    Done,
    /// It fails for want of room, and has no effect.
    Full,
    /// The disk fails. A write is on it, or not, and every later one fails until the store is opened anew.
    Failed {
        /// Whether the disk has it all the same.
        kept: bool,
    },
    /// It succeeds, they say; what was written is flushed with the next write that is. This is a lie: for tests of tests.
    Unflushed,
}

impl Access {
    /// At once, and without a fault.
    pub const INSTANT: Self = Self { before: Duration::ZERO, after: Duration::ZERO, outcome: Outcome::Done };
}

/// A disk. Clones are the same one.
#[derive(Clone)]
pub struct Disk(Arc<DiskState>);

struct DiskState {
    meta: Meta,
    access: Box<dyn Fn(Operation) -> Access + Send + Sync>,
    data: Mutex<Data>,
}

#[derive(Default)]
struct Data {
    /// What whoever opens it finds.
    written: Arc<State>,
    /// What a power cut leaves of that.
    flushed: Arc<State>,
    in_use: bool,
}

impl Disk {
    /// An empty disk, on which every operation goes as `access` says.
    pub fn new(meta: Meta, access: impl Fn(Operation) -> Access + Send + Sync + 'static) -> Self {
        Self(Arc::new(DiskState { meta, access: Box::new(access), data: Mutex::default() }))
    }

    /// Forgets what was not flushed. Drop the store first: it goes on otherwise, on what is left.
    pub fn cut_power(&self) {
        let mut data = self.data();
        data.written = Arc::clone(&data.flushed);
    }

    /// Items that wait on it, for all clients together.
    pub fn waiting(&self) -> usize {
        self.data().written.queues.values().map(BTreeMap::len).sum()
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        // Changes are made to a copy, and put in its place in one step.
        self.0.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("meta", &self.0.meta).field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

/// See the module.
#[derive(Debug)]
pub struct MemoryStore {
    disk: Disk,
    limits: QueueLimits,
    /// Held by whoever writes.
    turn: tokio::sync::Mutex<()>,
    /// Why nothing more is written.
    failed: OnceLock<StoreError>,
    running: Mutex<Running>,
}

/// What is true of a store until it is dropped.
#[derive(Debug, Default)]
struct Running {
    /// The highest number that was given out to each recipient.
    given: BTreeMap<ClientId, u64>,
    /// The highest number that each recipient had.
    newest: BTreeMap<ClientId, u64>,
    /// The last write failed for want of room.
    tight: bool,
}

impl MemoryStore {
    /// Opens the store on `disk`.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while another one is open on it.
    pub fn open(disk: &Disk, limits: QueueLimits) -> Result<Self, StoreError> {
        let mut data = disk.data();
        if core::mem::replace(&mut data.in_use, true) {
            return Err(StoreError::Busy("this disk".into()));
        }
        let newest = data.written.queues.iter().filter_map(|(id, queue)| Some((*id, *queue.last_key_value()?.0)));
        let running = Running { newest: newest.collect(), ..Running::default() };
        drop(data);
        Ok(Self {
            disk: disk.clone(),
            limits,
            turn: tokio::sync::Mutex::default(),
            failed: OnceLock::new(),
            running: Mutex::new(running),
        })
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        // Each change is one step.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<(), StoreError> {
        self.failed.get().cloned().map_or(Ok(()), Err)
    }

    /// Reads what is there at one moment.
    async fn read<T>(&self, look: impl FnOnce(&State) -> T + Send) -> Result<T, StoreError> {
        self.check()?;
        let access = (self.disk.0.access)(Operation::Read);
        pause(access.before).await;
        let state = Arc::clone(&self.disk.data().written);
        let found = look(&state);
        drop(state);
        pause(access.after).await;
        match access.outcome {
            Outcome::Done | Outcome::Unflushed => Ok(found),
            Outcome::Full => Err(StoreError::Full("this disk".into())),
            Outcome::Failed { .. } => Err(StoreError::Io("this disk does not read".into())),
        }
    }

    /// Changes something, durably. A refusal leaves nothing of it.
    async fn write<T, E>(
        &self,
        change: impl FnOnce(&mut State, &mut Running) -> Result<T, E> + Send,
    ) -> Result<Result<T, E>, StoreError> {
        let turn = self.turn.lock().await;
        self.check()?;
        let access = (self.disk.0.access)(Operation::Write);
        pause(access.before).await;
        let result = self.apply(access.outcome, change);
        drop(turn);
        if result.is_ok() {
            pause(access.after).await;
        }
        result
    }

    fn apply<T, E>(
        &self,
        outcome: Outcome,
        change: impl FnOnce(&mut State, &mut Running) -> Result<T, E>,
    ) -> Result<Result<T, E>, StoreError> {
        let mut running = self.running();
        running.tight = outcome == Outcome::Full;
        if outcome == Outcome::Full {
            return Err(StoreError::Full("this disk".into()));
        }
        let kept = !matches!(outcome, Outcome::Failed { kept: false });
        let mut data = self.disk.data();
        let mut state = (*data.written).clone();
        let result = change(&mut state, &mut running);
        if kept && result.is_ok() {
            data.written = Arc::new(state);
            if outcome != Outcome::Unflushed {
                data.flushed = Arc::clone(&data.written);
            }
        }
        if let Outcome::Failed { .. } = outcome {
            let error = StoreError::Io("this disk does not write".into());
            // Only once: nothing is written afterwards.
            let _ = self.failed.set(error.clone());
            return Err(error);
        }
        Ok(result)
    }

    /// [`MemoryStore::write`] for what is never refused.
    async fn update<T>(&self, change: impl FnOnce(&mut State, &mut Running) -> T + Send) -> Result<T, StoreError> {
        let done = self.write(move |state, running| Ok::<_, core::convert::Infallible>(change(state, running))).await?;
        match done {
            Ok(value) => Ok(value),
            Err(never) => match never {},
        }
    }

    /// Changes something at once that a power cut may take back.
    fn lazily<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, StoreError> {
        self.check()?;
        Ok(change(Arc::make_mut(&mut self.disk.data().written)))
    }
}

impl Drop for MemoryStore {
    fn drop(&mut self) {
        self.disk.data().in_use = false;
    }
}

async fn pause(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

/// Everything that is on a disk.
#[derive(Clone, Debug, Default)]
struct State {
    clients: BTreeMap<ClientId, Client>,
    bundles: BTreeMap<ClientId, BundleRecord>,
    tokens: BTreeMap<TokenId, Token>,
    /// By their names in normalised form.
    accounts: BTreeMap<String, Account>,
    /// By the client and the epoch of the key that was replaced.
    rotations: BTreeMap<(ClientId, u32), Step>,
    /// In the order in which they came.
    chains: Vec<Route>,
    conversations: BTreeMap<ConversationId, Group>,
    tombstones: BTreeMap<ConversationId, (u64, ClientId)>,
    channels: BTreeMap<ChannelId, (ClientId, ChannelRecord)>,
    queues: BTreeMap<ClientId, BTreeMap<u64, Item>>,
    /// With the time at which each was kept.
    posts: BTreeMap<u64, (KeptPost, u64)>,
    newest_post: u64,
    /// The last post of each author: its count and its signature.
    authors: BTreeMap<ClientId, (u64, MemberSignature)>,
    /// The last number that was given to an item.
    last: u64,
}

#[derive(Clone, Debug)]
struct Client {
    record: ClientRecord,
    /// Its name in normalised form.
    key: String,
}

#[derive(Clone, Debug)]
struct Step {
    former: Vec<u8>,
    /// None after a login, which nobody signs.
    successor: Option<Successor>,
}

/// An open conversation.
#[derive(Clone, Debug)]
struct Group {
    creator: ClientId,
    creator_only: bool,
    signature: MemberSignature,
    at: u64,
    members: BTreeMap<ClientId, (MemberState, Option<MemberSignature>)>,
    invitations: BTreeMap<ClientId, Arc<[u8]>>,
}

impl Group {
    fn state(&self, client: &ClientId) -> Option<MemberState> {
        self.members.get(client).map(|(state, _)| *state)
    }

    fn accepted(&self) -> impl Iterator<Item = ClientId> {
        self.members.iter().filter(|(_, (state, _))| *state == MemberState::Accepted).map(|(client, _)| *client)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    chain: ChainId,
    sender: ClientId,
    sid: ConversationId,
    recipient: ClientId,
}

impl State {
    fn is_live(&self, id: &ClientId) -> bool {
        self.clients.get(id).is_some_and(|client| !client.record.revoked)
    }

    fn by_name(&self, key: &str) -> Option<&ClientRecord> {
        let mut named = self.clients.values().filter(|client| client.key == key && !client.record.revoked);
        named.next().map(|client| &client.record)
    }

    /// Whether this is, or ever was, the key of a client.
    fn is_known_key(&self, modulus: &[u8]) -> bool {
        self.clients.values().any(|client| client.record.modulus == modulus)
            || self.rotations.values().any(|step| step.former == modulus)
    }

    fn enrol(&mut self, enrolment: &Enrolment) -> Result<Enrolled, EnrolError> {
        let Enrolment { id, name, modulus, .. } = enrolment;
        let same_id = self.clients.get(id);
        let repeats = |held: &Client| held.key == name.key() && held.record.modulus == *modulus && !held.record.revoked;
        if same_id.is_some_and(repeats) {
            return Ok(Enrolled::Repeat);
        }
        let is_other = same_id.is_some_and(|held| held.record.modulus != *modulus);
        if enrolment.enrolled_by.is_some_and(|enroller| !self.is_live(&enroller)) {
            return Err(EnrolError::Enroller);
        }
        if let Some(token) = &enrolment.token_id {
            self.use_token(token, enrolment).map_err(EnrolError::Token)?;
        }
        if self.by_name(name.key()).is_some() || self.accounts.contains_key(name.key()) {
            return Err(EnrolError::NameInUse);
        }
        if is_other {
            return Err(EnrolError::IdInUse);
        }
        if self.is_known_key(modulus) {
            return Err(EnrolError::KeyInUse);
        }
        self.insert(enrolment);
        Ok(Enrolled::New)
    }

    /// A client that is new in every respect.
    fn insert(&mut self, enrolment: &Enrolment) {
        let Enrolment { id, name, modulus, .. } = enrolment;
        let record = ClientRecord {
            id: *id,
            name: name.as_str().to_owned(),
            modulus: modulus.clone(),
            key_epoch: 0,
            enrolled_by: enrolment.enrolled_by,
            revoked: false,
            enrolled_at: enrolment.now,
            last_seen: None,
            record_limit: enrolment.record_limit,
        };
        self.clients.insert(*id, Client { record, key: name.key().to_owned() });
    }

    fn log_in(&mut self, login: LoginEntry) -> Result<LoggedIn, LoginError> {
        let LoginEntry { name, verifier, id, modulus, record_limit, now } = login;
        let account = self.accounts.get(name.key()).filter(|account| !account.locked && account.verifier == verifier);
        let given = account.ok_or(LoginError::Account)?.name.clone();
        let held = self.by_name(name.key()).map(|held| (held.id, held.modulus.clone(), held.key_epoch));
        if let Some((id, _, _)) = held.as_ref().filter(|(_, held, _)| *held == modulus) {
            return Ok(LoggedIn::Repeat(*id));
        }
        if self.is_known_key(&modulus) {
            return Err(LoginError::KeyInUse);
        }
        let Some((id, former, present)) = held else {
            if self.clients.contains_key(&id) {
                return Err(LoginError::IdInUse);
            }
            let name = Name::parse(&given).unwrap_or(name);
            self.insert(&Enrolment { id, name, modulus, token_id: None, enrolled_by: None, record_limit, now });
            return Ok(LoggedIn::New(id));
        };
        let key_epoch = present.checked_add(1).ok_or(LoginError::Worn)?;
        if let Some(client) = self.clients.get_mut(&id) {
            client.record.modulus = modulus;
            client.record.key_epoch = key_epoch;
        }
        self.rotations.insert((id, present), Step { former, successor: None });
        self.bundles.remove(&id);
        self.cut_off(&id);
        Ok(LoggedIn::Changed(id))
    }

    fn change_account(&mut self, name: &Name, change: AccountChange, now: u64) -> bool {
        let client = self.by_name(name.key()).map(|client| client.id);
        let Some(account) = self.accounts.get_mut(name.key()) else { return false };
        account.changed_at = now;
        match change {
            AccountChange::Password(verifier) => {
                account.verifier = verifier;
                self.channels.retain(|_, (owner, _)| Some(*owner) != client);
            }
            AccountChange::Locked(locked) => account.locked = locked,
            AccountChange::Removed => drop(self.accounts.remove(name.key())),
        }
        true
    }

    fn use_token(&mut self, id: &TokenId, enrolment: &Enrolment) -> Result<(), TokenRefusal> {
        let token = self.tokens.get_mut(id).ok_or(TokenRefusal::Unknown)?;
        if token.expires <= enrolment.now {
            return Err(TokenRefusal::Expired);
        }
        if token.uses == Some(0) {
            return Err(TokenRefusal::UsedUp);
        }
        if token.name_pattern.as_ref().is_some_and(|pattern| !pattern.matches(&enrolment.name)) {
            return Err(TokenRefusal::Name);
        }
        if token.preset_id.is_some_and(|preset| preset != enrolment.id) {
            return Err(TokenRefusal::Id);
        }
        token.uses = token.uses.map(|uses| uses.saturating_sub(1));
        Ok(())
    }

    /// Drops channels and routes of a client.
    fn cut_off(&mut self, id: &ClientId) {
        self.channels.retain(|_, (client, _)| client != id);
        self.chains.retain(|route| route.sender != *id && route.recipient != *id);
        self.posts.retain(|_, (kept, _)| kept.author != *id);
    }

    fn say(&mut self, new: NewPost, most: u64) -> Result<Said, SayError> {
        let NewPost { author, key_epoch, post, now } = new;
        let client = self.clients.get(&author).filter(|client| !client.record.revoked);
        client.filter(|client| client.record.key_epoch == key_epoch).ok_or(SayError::Unknown)?;
        let name = (post.number, post.signature);
        if let Some(last) = self.authors.get(&author)
            && post.number <= last.0
        {
            let of_author = |kept: &KeptPost| kept.author == author && (kept.post.number, kept.post.signature) == name;
            let repeats = name == *last || self.posts.values().any(|(kept, _)| of_author(kept));
            return if repeats { Ok(Said::Repeat) } else { Err(SayError::Rewound) };
        }
        self.newest_post += 1;
        let seq = self.newest_post;
        self.posts.insert(seq, (KeptPost { seq, author, post }, now));
        self.authors.insert(author, name);
        while u64::try_from(self.posts.len()).is_ok_and(|len| len > most) {
            let Some(oldest) = self.dispensable_post() else { break };
            self.posts.remove(&oldest);
        }
        Ok(Said::New { seq })
    }

    /// The oldest post of whoever has the most there.
    fn dispensable_post(&self) -> Option<u64> {
        let mut authors = BTreeMap::new();
        for (kept, _) in self.posts.values() {
            let (count, _) = authors.entry(kept.author).or_insert((0_u64, kept.seq));
            *count += 1;
        }
        authors.into_values().max_by_key(|(count, oldest)| (*count, Reverse(*oldest))).map(|(_, oldest)| oldest)
    }

    fn revoke(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        id: &ClientId,
        now: u64,
        refuse: &Refuse,
        announce: &Announce,
    ) -> Option<Vec<ClientId>> {
        let client = self.clients.get_mut(id).filter(|client| !client.record.revoked)?;
        client.record.revoked = true;
        self.accounts.remove(&client.key);
        self.bundles.remove(id);
        self.authors.remove(id);
        self.cut_off(id);
        let queue = self.queues.remove(id).unwrap_or_default();
        running.newest.remove(id);
        let removed: Vec<_> = queue.into_values().map(|item| (*id, item)).collect();
        let mut told = self.refuse_all(running, limits, removed.iter(), refuse);
        let part = |group: &Group| matches!(group.state(id), Some(MemberState::Invited | MemberState::Accepted));
        let groups: Vec<_> = self.conversations.iter().filter(|(_, group)| part(group)).map(|(sid, _)| *sid).collect();
        for sid in groups {
            told.extend(self.change(running, limits, (&sid, id), (MemberState::Revoked, None), now, announce));
        }
        told.sort_unstable();
        told.dedup();
        Some(told)
    }

    /// Puts a member into another state, and tells the others who have accepted, who are returned.
    fn change(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        (sid, member): (&ConversationId, &ClientId),
        (state, signature): (MemberState, Option<MemberSignature>),
        now: u64,
        announce: &Announce,
    ) -> Vec<ClientId> {
        let Some(group) = self.conversations.get_mut(sid) else { return Vec::new() };
        group.members.insert(*member, (state, signature));
        let notice = Notice::Changed { sid: *sid, member: *member, state, signature };
        let others: Vec<_> = group.accepted().filter(|other| other != member).collect();
        self.tell_all(running, limits, others.into_iter().filter_map(|other| announce.item(&notice, other, now)))
    }

    /// Lets notices wait, and returns for whom, each once.
    fn tell_all(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        items: impl Iterator<Item = NewItem>,
    ) -> Vec<ClientId> {
        let waits = |item: NewItem| self.put(running, limits, &item).is_ok().then_some(item.recipient);
        let mut told: Vec<_> = items.filter_map(waits).collect();
        told.sort_unstable();
        told.dedup();
        told
    }

    fn found(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        founding: &Founding,
    ) -> Result<Founded, FoundError> {
        let Founding { sid, creator, key_epoch, creator_only, signature, now, .. } = *founding;
        if self.tombstones.contains_key(&sid) {
            return Err(FoundError::Closed);
        }
        if let Some(group) = self.conversations.get(&sid) {
            let same = (group.creator, group.signature) == (creator, signature);
            return if same { Ok(Founded::Repeat) } else { Err(FoundError::InUse) };
        }
        if self.chains.iter().any(|route| route.sid == sid) {
            return Err(FoundError::InUse);
        }
        let invited = founding.invited.iter().map(|invitation| (invitation.client, invitation.key_epoch));
        for (client, key_epoch) in invited.clone().chain([(creator, key_epoch)]) {
            let held = self.clients.get(&client).filter(|client| !client.record.revoked);
            if held.ok_or(FoundError::Unknown)?.record.key_epoch != key_epoch {
                return Err(FoundError::KeyChanged);
            }
            let part =
                |group: &&Group| matches!(group.state(&client), Some(MemberState::Invited | MemberState::Accepted));
            let unanswered =
                |group: &&Group| group.creator == creator && group.state(&client) == Some(MemberState::Invited);
            let groups = || self.conversations.values();
            let queue = self.queues.get(&client).into_iter().flat_map(BTreeMap::values);
            let notices = len_of(queue.filter(|item| item.kind == ItemKind::Notice));
            if groups().filter(part).count() >= MAX_CONVERSATIONS
                || groups().filter(unanswered).count() >= MAX_INVITATIONS
                || (client != creator && notices >= limits.notices)
            {
                return Err(FoundError::TooMany);
            }
        }
        let mut members: BTreeMap<_, _> = invited.map(|(client, _)| (client, (MemberState::Invited, None))).collect();
        members.insert(creator, (MemberState::Accepted, None));
        let invited = founding.invited.iter();
        let invitations = invited.map(|invitation| (invitation.client, Arc::clone(&invitation.notice))).collect();
        self.conversations.insert(sid, Group { creator, creator_only, signature, at: now, members, invitations });
        self.tell_all(running, limits, founding.items().into_iter());
        Ok(Founded::New)
    }

    fn invite_again(&mut self, running: &mut Running, limits: QueueLimits, client: &ClientId, now: u64) -> bool {
        let open = self
            .conversations
            .iter()
            .filter(|(_, group)| matches!(group.state(client), Some(MemberState::Invited | MemberState::Accepted)));
        let again = open.filter_map(|(sid, group)| {
            let notice = Arc::clone(group.invitations.get(client)?);
            let waits = group.state(client) == Some(MemberState::Invited);
            Some(((waits, group.at), invitation(sid, *client, group.creator, notice, now)))
        });
        let mut again: Vec<_> = again.collect();
        // Those of one moment are in the order of their ids already.
        again.sort_by_key(|(order, _)| *order);
        !self.tell_all(running, limits, again.into_iter().map(|(_, item)| item)).is_empty()
    }

    fn answer(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        answer: &MemberAnswer,
        announce: &Announce,
    ) -> Result<Vec<ClientId>, AnswerError> {
        let MemberAnswer { sid, member, signature, now, .. } = *answer;
        if self.tombstones.contains_key(&sid) {
            return Err(AnswerError::Closed);
        }
        let group = self.conversations.get(&sid).ok_or(AnswerError::NotMember)?;
        let (state, held) = group.members.get(&member).ok_or(AnswerError::NotMember)?;
        let (state, joins) = match decide(answer, *state, held.as_ref(), group.at)? {
            Decision::Same => return Ok(Vec::new()),
            Decision::Now(state) => (state, false),
            Decision::Joins => (MemberState::Accepted, true),
        };
        let before = group.members.iter().filter_map(|(client, (state, signature))| {
            let is_told = joins && *state == MemberState::Accepted && *client != member;
            let signature = signature.filter(|_| is_told)?;
            Some(Notice::Changed { sid, member: *client, state: *state, signature: Some(signature) })
        });
        let before: Vec<_> = before.filter_map(|notice| announce.item(&notice, member, now)).collect();
        let mut told = self.change(running, limits, (&sid, &member), (state, Some(signature)), now, announce);
        told.extend(self.tell_all(running, limits, before.into_iter()));
        told.sort_unstable();
        told.dedup();
        Ok(told)
    }

    fn close(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        (sid, by, signature): (&ConversationId, &ClientId, &MemberSignature),
        now: u64,
        refuse: &Refuse,
        announce: &Announce,
    ) -> Result<Closing, CloseError> {
        if self.tombstones.contains_key(sid) {
            return Err(CloseError::Closed);
        }
        let group = self.conversations.get(sid).ok_or(CloseError::NotMember)?;
        let state = group.state(by).ok_or(CloseError::NotMember)?;
        if state != MemberState::Accepted || (group.creator_only && group.creator != *by) {
            return Err(CloseError::Forbidden);
        }
        let Some(group) = self.conversations.remove(sid) else { return Err(CloseError::NotMember) };
        self.tombstones.insert(*sid, (now, *by));
        let of_group = |route: &Route| {
            route.sid == *sid && group.state(&route.sender).is_some() && group.state(&route.recipient).is_some()
        };
        let mut chains: Vec<_> = self.chains.iter().filter(|route| of_group(route)).map(|route| route.chain).collect();
        chains.sort_unstable();
        chains.dedup();
        self.chains.retain(|route| !of_group(route));
        let names: BTreeSet<_> = chains.iter().copied().chain(names(sid, group.members.keys())).collect();
        let mut removed = Vec::new();
        for member in group.members.keys() {
            let Some(queue) = self.queues.get_mut(member) else { continue };
            let goes = |item: &Item| goes_with_its_conversation(item.kind) && names.contains(&item.chain);
            let seqs: Vec<_> = queue.values().filter(|item| goes(item)).map(|item| item.seq).collect();
            removed.extend(seqs.iter().filter_map(|seq| Some((*member, queue.remove(seq)?))));
        }
        let mut told = self.refuse_all(running, limits, removed.iter(), refuse);
        let notice = Notice::Closed { sid: *sid, by: *by, signature: *signature };
        let others =
            group.members.iter().filter(|(member, (state, _))| *state != MemberState::Declined && *member != by);
        let others: Vec<_> = others.filter_map(|(member, _)| announce.item(&notice, *member, now)).collect();
        told.extend(self.tell_all(running, limits, others.into_iter()));
        told.sort_unstable();
        told.dedup();
        Ok(Closing { chains, told })
    }

    fn expire_invitations(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        (before, limit): (u64, usize),
        now: u64,
        announce: &Announce,
    ) -> (usize, Vec<ClientId>) {
        let old = self.conversations.iter().filter(|(_, group)| group.at < before);
        let unanswered = old.flat_map(|(sid, group)| {
            let invited = group.members.iter().filter(|(_, (state, _))| *state == MemberState::Invited);
            invited.map(|(member, _)| (*sid, *member))
        });
        let expired: Vec<_> = unanswered.take(limit).collect();
        let mut told = Vec::new();
        for (sid, member) in &expired {
            told.extend(self.change(running, limits, (sid, member), (MemberState::Expired, None), now, announce));
        }
        told.sort_unstable();
        told.dedup();
        (expired.len(), told)
    }

    /// Whether this chain is one of a conversation of several.
    fn is_of_group(&self, route: &Route) -> bool {
        let group = self.conversations.get(&route.sid);
        group.is_some_and(|group| group.state(&route.sender).is_some() && group.state(&route.recipient).is_some())
    }

    /// What becomes of items that were removed undelivered waits for their senders, who are returned, each once.
    fn refuse_all<'i>(
        &mut self,
        running: &mut Running,
        limits: QueueLimits,
        items: impl Iterator<Item = &'i (ClientId, Item)>,
        refuse: &Refuse,
    ) -> Vec<ClientId> {
        let mut told = BTreeSet::new();
        for (recipient, item) in items.filter(|(_, item)| is_told_of(item)) {
            let Some(refusal) = refuse.refusal(recipient, item) else { continue };
            if self.put(running, limits, &refusal).is_ok() {
                told.insert(refusal.recipient);
            }
        }
        told.into_iter().collect()
    }

    fn publish(&mut self, id: &ClientId, record: BundleRecord) -> Result<(), PublishError> {
        if !self.is_live(id) {
            return Err(PublishError::Unknown);
        }
        if let Some(held) = self.bundles.get(id) {
            if (held.epoch, &held.bundle) == (record.epoch, &record.bundle) {
                return Ok(());
            }
            if record.epoch <= held.epoch {
                return Err(PublishError::Epoch { stored: held.epoch });
            }
        }
        self.bundles.insert(*id, record);
        Ok(())
    }

    fn rotate(&mut self, new: NewKey) -> Result<(), RotateError> {
        let NewKey { id, key_epoch, modulus, signature, bundle } = new;
        let client = self.clients.get(&id).filter(|client| !client.record.revoked).ok_or(RotateError::Unknown)?;
        let (former, present) = (client.record.modulus.clone(), client.record.key_epoch);
        if present == key_epoch && former == modulus && present > 0 {
            return Ok(());
        }
        if present.checked_add(1) != Some(key_epoch) {
            return Err(RotateError::KeyEpoch { present });
        }
        if self.is_known_key(&modulus) {
            return Err(RotateError::KeyInUse);
        }
        self.publish(&id, bundle).map_err(|error| match error {
            PublishError::Epoch { stored } => RotateError::BundleEpoch { stored },
            _ => RotateError::Unknown,
        })?;
        if let Some(client) = self.clients.get_mut(&id) {
            client.record.modulus = modulus.clone();
            client.record.key_epoch = key_epoch;
        }
        self.rotations.insert((id, present), Step { former, successor: Some(Successor { modulus, signature }) });
        self.cut_off(&id);
        Ok(())
    }

    fn register(&mut self, new: Route) -> Result<(), ChainError> {
        if !self.is_live(&new.sender) || !self.is_live(&new.recipient) {
            return Err(ChainError::Unknown);
        }
        if new.sid != direct_sid(&new.sender, &new.recipient, 0) {
            if self.tombstones.contains_key(&new.sid) {
                return Err(ChainError::Closed);
            }
            let accepted = |group: &Group, client| group.state(client) == Some(MemberState::Accepted);
            if let Some(group) = self.conversations.get(&new.sid)
                && !(accepted(group, &new.sender) && accepted(group, &new.recipient))
            {
                return Err(ChainError::NotMember);
            }
        }
        let other = |held: &Route| held.chain == new.chain && (held.sender, held.sid) != (new.sender, new.sid);
        if self.chains.iter().any(other) {
            return Err(ChainError::InUse);
        }
        if self.chains.contains(&new) {
            return Ok(());
        }
        let pair = |held: &Route| (held.sender, held.recipient) == (new.sender, new.recipient);
        if self.chains.iter().filter(|held| pair(held)).count() >= MAX_ROUTES
            && let Some(oldest) = self.chains.iter().position(pair)
        {
            self.chains.remove(oldest);
        }
        self.chains.push(new);
        Ok(())
    }

    fn route(&self, chain: &ChainId) -> Option<ChainRoute> {
        let mut routes = self.chains.iter().filter(|route| route.chain == *chain).peekable();
        let first = routes.peek()?;
        let (sender, sid, group) = (first.sender, first.sid, self.is_of_group(first));
        Some(ChainRoute { sender, sid, group, recipients: routes.map(|route| route.recipient).collect() })
    }

    fn put(&mut self, running: &mut Running, limits: QueueLimits, new: &NewItem) -> Result<Put, PutError> {
        if !self.is_live(&new.recipient) {
            return Err(PutError::UnknownRecipient);
        }
        let queue = self.queues.entry(new.recipient).or_default();
        let is_receipt = |item: &Item| item.kind == ItemKind::Receipt;
        let is_notice = new.kind == ItemKind::Notice;
        let (items, bytes) = queue
            .values()
            .filter(|item| !is_receipt(item) && item.kind != ItemKind::Notice)
            .fold((0_u64, 0_u64), |(items, bytes), item| (items + 1, bytes + len(&item.bytes)));
        let mut seq = None;
        if new.kind == ItemKind::Receipt {
            let waiting: Vec<_> = queue.values().filter(|item| is_receipt(item)).map(|item| item.seq).collect();
            let room = usize::try_from(limits.receipts.max(1)).unwrap_or(usize::MAX);
            for oldest in waiting.iter().take((waiting.len() + 1).saturating_sub(room)) {
                queue.remove(oldest);
            }
        } else {
            let name = |item: &Item| (item.kind, item.chain, item.n);
            match queue.values().find(|item| name(item) == (new.kind, new.chain, new.n)) {
                Some(same) if same.bytes == new.bytes => return Ok(Put::Repeat { seq: same.seq }),
                Some(_) if !new.kind.is_replaced() => return Err(PutError::Rewound),
                Some(same) => {
                    if !is_notice && bytes - len(&same.bytes) + len(&new.bytes) > limits.bytes {
                        return Err(PutError::QueueFull);
                    }
                    // Nobody may have been given the one and say that he has the other.
                    let former = same.seq;
                    queue.remove(&former);
                    seq = Some(former).filter(|seq| running.given.get(&new.recipient).is_none_or(|given| given < seq));
                }
                None if !is_notice && (items >= limits.items || bytes + len(&new.bytes) > limits.bytes) => {
                    return Err(PutError::QueueFull);
                }
                None => {}
            }
        }
        let seq = seq.unwrap_or_else(|| {
            self.last += 1;
            self.last
        });
        let NewItem { recipient, sender, kind, chain, n, wanted, bytes, at } = new.clone();
        queue.insert(seq, Item { seq, sender, kind, chain, n, wanted, bytes, at });
        let newest = running.newest.entry(recipient).or_default();
        *newest = seq.max(*newest);
        Ok(Put::Stored { seq })
    }
}

fn len_of(items: impl Iterator) -> u64 {
    u64::try_from(items.count()).unwrap_or(u64::MAX)
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[async_trait]
impl Store for MemoryStore {
    fn meta(&self) -> Meta {
        self.disk.0.meta
    }

    fn health(&self) -> StoreHealth {
        let full = self.running().tight.then(|| StoreError::Full("this disk".into()));
        let state = Arc::clone(&self.disk.data().written);
        let items = || state.queues.values().flat_map(BTreeMap::values);
        StoreHealth {
            refusing: self.failed.get().cloned().or(full).map(|error| error.to_string()),
            bytes: u64::try_from(size_of::<State>()).unwrap_or(u64::MAX)
                + items().map(|item| len(&item.bytes)).sum::<u64>(),
            waiting: u64::try_from(items().count()).unwrap_or(u64::MAX),
            waiting_bytes: items().map(|item| len(&item.bytes)).sum(),
            waiting_clients: state
                .queues
                .values()
                .filter(|queue| !queue.is_empty())
                .count()
                .try_into()
                .unwrap_or(u64::MAX),
            writer: None,
        }
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.update(|_, _| ()).await
    }

    async fn client(&self, id: &ClientId) -> Result<Option<ClientRecord>, StoreError> {
        self.read(|state| state.clients.get(id).map(|client| client.record.clone())).await
    }

    async fn client_by_name(&self, name: &Name) -> Result<Option<ClientRecord>, StoreError> {
        self.read(|state| state.by_name(name.key()).cloned()).await
    }

    async fn clients(&self, after: Option<&Name>, limit: usize) -> Result<Vec<ClientRecord>, StoreError> {
        self.read(|state| {
            let after = after.map(Name::key).unwrap_or_default();
            let mut found: Vec<_> =
                state.clients.values().filter(|client| !client.record.revoked && client.key.as_str() > after).collect();
            found.sort_unstable_by(|one, other| one.key.cmp(&other.key));
            found.into_iter().take(limit).map(|client| client.record.clone()).collect()
        })
        .await
    }

    async fn enrol(&self, enrolment: Enrolment) -> Result<Enrolled, EnrolError> {
        self.write(move |state, _| state.enrol(&enrolment)).await?
    }

    async fn enrol_all(&self, batch: Vec<Enrolment>) -> Result<Vec<Enrolled>, RefusedEntry> {
        self.write(move |state, _| {
            let one = |(index, enrolment)| state.enrol(enrolment).map_err(|error| RefusedEntry { index, error });
            batch.iter().enumerate().map(one).collect()
        })
        .await?
    }

    async fn revoke(
        &self,
        id: &ClientId,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Option<Vec<ClientId>>, StoreError> {
        self.update(|state, running| state.revoke(running, self.limits, id, now, &refuse, &announce)).await
    }

    async fn rotate(&self, rotation: NewKey) -> Result<(), RotateError> {
        self.write(move |state, _| state.rotate(rotation)).await?
    }

    async fn successor(&self, id: &ClientId, key_epoch: u32) -> Result<Option<Successor>, StoreError> {
        self.read(|state| state.rotations.get(&(*id, key_epoch)).and_then(|step| step.successor.clone())).await
    }

    async fn add_account(&self, name: Name, verifier: Verifier, now: u64) -> Result<(), AccountError> {
        self.write(move |state, _| {
            if state.accounts.contains_key(name.key()) {
                return Err(AccountError::Exists);
            }
            let account = Account { name: name.as_str().to_owned(), verifier, locked: false, changed_at: now };
            state.accounts.insert(name.key().to_owned(), account);
            Ok(())
        })
        .await?
    }

    async fn account(&self, name: &Name) -> Result<Option<Account>, StoreError> {
        self.read(|state| state.accounts.get(name.key()).cloned()).await
    }

    async fn accounts(&self, after: Option<&Name>, limit: usize) -> Result<Vec<Account>, StoreError> {
        self.read(|state| {
            let after = after.map(Name::key).unwrap_or_default();
            let behind = state.accounts.iter().filter(|(key, _)| key.as_str() > after);
            behind.take(limit).map(|(_, account)| account.clone()).collect()
        })
        .await
    }

    async fn change_account(&self, name: &Name, change: AccountChange, now: u64) -> Result<bool, StoreError> {
        self.update(|state, _| state.change_account(name, change, now)).await
    }

    async fn log_in(&self, login: LoginEntry) -> Result<LoggedIn, LoginError> {
        self.write(move |state, _| state.log_in(login)).await?
    }

    async fn set_record_limit(&self, id: &ClientId, limit: u16) -> Result<(), StoreError> {
        self.update(|state, _| {
            if let Some(client) = state.clients.get_mut(id) {
                client.record.record_limit = limit;
            }
        })
        .await
    }

    async fn touch(&self, id: &ClientId, now: u64) -> Result<(), StoreError> {
        self.lazily(|state| {
            if let Some(client) = state.clients.get_mut(id) {
                client.record.last_seen = client.record.last_seen.max(Some(now));
            }
        })
    }

    async fn publish_bundle(
        &self,
        id: &ClientId,
        epoch: u32,
        bundle: &[u8],
        signature: &[u8],
    ) -> Result<(), PublishError> {
        let record = BundleRecord { epoch, bundle: bundle.to_vec(), signature: signature.to_vec() };
        self.write(move |state, _| state.publish(id, record)).await?
    }

    async fn bundle(&self, id: &ClientId) -> Result<Option<BundleRecord>, StoreError> {
        self.read(|state| state.bundles.get(id).cloned()).await
    }

    async fn add_token(&self, token: Token) -> Result<(), TokenError> {
        self.write(move |state, _| {
            if state.tokens.contains_key(&token.id) {
                return Err(TokenError::IdInUse);
            }
            state.tokens.insert(token.id, token);
            Ok(())
        })
        .await?
    }

    async fn token(&self, id: &TokenId) -> Result<Option<Token>, StoreError> {
        self.read(|state| state.tokens.get(id).cloned()).await
    }

    async fn tokens(&self, after: Option<&TokenId>, limit: usize, now: u64) -> Result<Vec<Token>, StoreError> {
        self.read(|state| {
            let open = state.tokens.values().filter(|token| token.expires > now && token.uses != Some(0));
            open.filter(|token| after.is_none_or(|after| token.id > *after)).take(limit).cloned().collect()
        })
        .await
    }

    async fn end_tokens(&self, which: Tokens, now: u64) -> Result<u64, StoreError> {
        self.update(move |state, _| {
            state.tokens.retain(|_, token| token.expires >= now.saturating_sub(TOKEN_MEMORY));
            let mut ended = 0;
            for token in state.tokens.values_mut() {
                let is_meant = match which {
                    Tokens::All => true,
                    Tokens::One(id) => token.id == id,
                    Tokens::Printed => token.printed,
                };
                if token.expires > now && token.uses != Some(0) && is_meant {
                    token.expires = now;
                    ended += 1;
                }
            }
            ended
        })
        .await
    }

    async fn found(&self, founding: Founding) -> Result<Founded, FoundError> {
        self.write(move |state, running| state.found(running, self.limits, &founding)).await?
    }

    async fn conversation(&self, sid: &ConversationId) -> Result<Option<Conversation>, StoreError> {
        self.read(|state| {
            if let Some((at, by)) = state.tombstones.get(sid) {
                return Some(Conversation::Closed { at: *at, by: *by });
            }
            let group = state.conversations.get(sid)?;
            let members = group.members.iter();
            let member = |(client, (state, signature)): (&ClientId, &(MemberState, Option<MemberSignature>))| Member {
                client: *client,
                state: *state,
                signature: *signature,
            };
            Some(Conversation::Open {
                creator: group.creator,
                creator_only: group.creator_only,
                at: group.at,
                members: members.map(member).collect(),
            })
        })
        .await
    }

    async fn invite_again(&self, client: &ClientId, now: u64) -> Result<bool, StoreError> {
        self.update(move |state, running| state.invite_again(running, self.limits, client, now)).await
    }

    async fn answer(&self, answer: MemberAnswer, announce: Announce) -> Result<Vec<ClientId>, AnswerError> {
        self.write(move |state, running| state.answer(running, self.limits, &answer, &announce)).await?
    }

    async fn close(
        &self,
        sid: &ConversationId,
        by: &ClientId,
        signature: &MemberSignature,
        now: u64,
        refuse: Refuse,
        announce: Announce,
    ) -> Result<Closing, CloseError> {
        let word = (sid, by, signature);
        self.write(move |state, running| state.close(running, self.limits, word, now, &refuse, &announce)).await?
    }

    async fn expire_invitations(
        &self,
        before: u64,
        limit: usize,
        now: u64,
        announce: Announce,
    ) -> Result<(usize, Vec<ClientId>), StoreError> {
        let which = (before, limit);
        self.update(move |state, running| state.expire_invitations(running, self.limits, which, now, &announce)).await
    }

    async fn say(&self, new: NewPost) -> Result<Said, SayError> {
        let most = self.limits.posts;
        self.write(move |state, _| state.say(new, most)).await?
    }

    async fn posts(&self, after: u64, limit: usize) -> Result<Posts, StoreError> {
        self.read(|state| {
            let behind = after.checked_add(1).map(|first| state.posts.range(first..));
            let posts = behind.into_iter().flatten().take(limit).map(|(_, (kept, _))| kept.clone()).collect();
            Posts { newest: state.newest_post, posts }
        })
        .await
    }

    async fn expire_posts(&self, before: u64) -> Result<u64, StoreError> {
        self.update(|state, _| {
            let held = state.posts.len();
            state.posts.retain(|_, (_, kept_at)| *kept_at >= before);
            u64::try_from(held - state.posts.len()).unwrap_or(u64::MAX)
        })
        .await
    }

    async fn register_chain(
        &self,
        chain: &ChainId,
        sender: &ClientId,
        sid: &ConversationId,
        recipient: &ClientId,
    ) -> Result<(), ChainError> {
        let route = Route { chain: *chain, sender: *sender, sid: *sid, recipient: *recipient };
        self.write(move |state, _| state.register(route)).await?
    }

    async fn chain(&self, chain: &ChainId) -> Result<Option<ChainRoute>, StoreError> {
        self.read(|state| state.route(chain)).await
    }

    async fn put_channel(
        &self,
        client: &ClientId,
        channel: ChannelRecord,
        keep: Option<ChannelId>,
    ) -> Result<(), ChannelError> {
        self.write(move |state, _| {
            if !state.is_live(client) {
                return Err(ChannelError::Unknown);
            }
            state.channels.retain(|id, (owner, _)| owner != client || Some(*id) == keep);
            state.channels.insert(channel.id, (*client, channel));
            Ok(())
        })
        .await?
    }

    async fn channel(&self, id: &ChannelId, now: u64) -> Result<Option<(ClientId, ChannelRecord)>, StoreError> {
        self.read(|state| state.channels.get(id).filter(|(_, channel)| channel.expires > now).cloned()).await
    }

    async fn channels(&self, client: &ClientId, now: u64) -> Result<Vec<(ChannelId, u64)>, StoreError> {
        self.read(|state| {
            let of_client = state.channels.values().filter(|(owner, channel)| owner == client && channel.expires > now);
            of_client.map(|(_, channel)| (channel.id, channel.expires)).collect()
        })
        .await
    }

    async fn drop_channels(&self, client: &ClientId) -> Result<u64, StoreError> {
        self.update(|state, _| {
            let before = state.channels.len();
            state.channels.retain(|_, (owner, _)| owner != client);
            u64::try_from(before - state.channels.len()).unwrap_or(u64::MAX)
        })
        .await
    }

    async fn put(&self, items: Vec<NewItem>) -> Result<Vec<Result<Put, PutError>>, StoreError> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        self.update(move |state, running| items.iter().map(|item| state.put(running, self.limits, item)).collect())
            .await
    }

    async fn queue(
        &self,
        recipient: &ClientId,
        after: u64,
        max_items: usize,
        max_bytes: usize,
    ) -> Result<Vec<Item>, StoreError> {
        self.read(|state| {
            let waiting = state.queues.get(recipient).into_iter().flatten();
            let (mut items, mut sum) = (Vec::new(), 0_usize);
            for (_, item) in waiting.filter(|(seq, _)| **seq > after).take(max_items.max(1)) {
                sum = sum.saturating_add(item.bytes.len());
                if sum > max_bytes && !items.is_empty() {
                    break;
                }
                items.push(item.clone());
            }
            if let Some(last) = items.last() {
                let mut running = self.running();
                let given = running.given.entry(*recipient).or_default();
                *given = last.seq.max(*given);
            }
            items
        })
        .await
    }

    async fn acknowledge(&self, recipient: &ClientId, up_to: u64) -> Result<u64, StoreError> {
        self.lazily(|state| {
            let Some(queue) = state.queues.get_mut(recipient) else { return 0 };
            let before = queue.len();
            queue.retain(|seq, _| *seq > up_to);
            u64::try_from(before - queue.len()).unwrap_or(u64::MAX)
        })
    }

    async fn remove(&self, recipient: &ClientId, seqs: &[u64]) -> Result<u64, StoreError> {
        self.lazily(|state| {
            let Some(queue) = state.queues.get_mut(recipient) else { return 0 };
            let removed = seqs.iter().filter(|seq| queue.remove(seq).is_some()).count();
            u64::try_from(removed).unwrap_or(u64::MAX)
        })
    }

    async fn waiting(&self, recipient: &ClientId) -> Result<Waiting, StoreError> {
        self.check()?;
        let state = Arc::clone(&self.disk.data().written);
        let items = || state.queues.get(recipient).into_iter().flat_map(BTreeMap::values);
        Ok(Waiting {
            items: u64::try_from(items().count()).unwrap_or(u64::MAX),
            bytes: items().map(|item| len(&item.bytes)).sum(),
            newest: self.running().newest.get(recipient).copied().unwrap_or_default(),
        })
    }

    async fn expire(&self, before: u64, limit: usize, refuse: Refuse) -> Result<Vec<(ClientId, Item)>, StoreError> {
        self.update(move |state, running| {
            let mut expired = Vec::new();
            for (recipient, queue) in &mut state.queues {
                let old = queue.values().filter(|item| item.at < before && item.kind != ItemKind::Notice);
                let old = old.take(limit.saturating_sub(expired.len()));
                let old: Vec<_> = old.map(|item| item.seq).collect();
                expired.extend(old.iter().filter_map(|seq| Some((*recipient, queue.remove(seq)?))));
            }
            state.refuse_all(running, self.limits, expired.iter(), &refuse);
            expired
        })
        .await
    }
}

#[cfg(test)]
mod tests;
