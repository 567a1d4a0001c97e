//! A store that fails when it is told to, before an operation takes effect or after.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use ossicle::metrics::StoreHealth;
use ossicle::name::Name;
use ossicle::store::{
    Account, AccountChange, AccountError, Announce, AnswerError, BundleRecord, ChainError, ChainId, ChainRoute,
    ChannelError, ChannelId, ChannelRecord, ClientId, ClientRecord, CloseError, Closing, Conversation, ConversationId,
    EnrolError, Enrolled, Enrolment, FoundError, Founded, Founding, Item, LoggedIn, LoginEntry, LoginError,
    MemberAnswer, MemberSignature, Meta, NewItem, NewKey, NewPost, Posts, PublishError, Put, PutError, Refuse,
    RefusedEntry, RotateError, Said, SayError, SharedStore, Store, StoreError, Successor, Token, TokenError, TokenId,
    Tokens, Verifier, Waiting,
};

/// When an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before anything was done.
    Before,
    /// After it was done: the caller is told an error all the same.
    After,
}

/// What fails.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Every so many-th call, counted from the plan's beginning.
    pub every: u64,
    /// The operations that count, by their names in [`Store`]; all if there are none.
    pub only: &'static [&'static str],
    /// When.
    pub when: When,
    /// How.
    pub error: StoreError,
}

/// See the module.
#[derive(Debug)]
pub struct Faulty {
    inner: SharedStore,
    plan: Mutex<Option<Plan>>,
    calls: AtomicU64,
    failed: AtomicU64,
}

impl Faulty {
    /// Does what `inner` does, until there is a plan.
    pub fn new(inner: SharedStore) -> Self {
        Self { inner, plan: Mutex::default(), calls: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }

    /// From now on, this fails; `None` for nothing.
    pub fn plan(&self, plan: Option<Plan>) {
        self.calls.store(0, Ordering::SeqCst);
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
    }

    /// Calls that have failed.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::SeqCst)
    }

    fn fault(&self, operation: &str) -> Option<Plan> {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        if !plan.only.is_empty() && !plan.only.contains(&operation) {
            return None;
        }
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        if !call.is_multiple_of(plan.every.max(1)) {
            return None;
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        Some(plan)
    }
}

macro_rules! operations {
    ($($name:ident($($argument:ident: $type:ty),*) -> $value:ty, $error:ty;)*) => {
        #[async_trait]
        impl Store for Faulty {
            fn meta(&self) -> Meta {
                self.inner.meta()
            }

            fn health(&self) -> StoreHealth {
                self.inner.health()
            }

            $(async fn $name(&self, $($argument: $type),*) -> Result<$value, $error> {
                let fault = self.fault(stringify!($name));
                if let Some(Plan { when: When::Before, error, .. }) = &fault {
                    return Err(error.clone().into());
                }
                let done = self.inner.$name($($argument),*).await;
                match fault {
                    Some(plan) => Err(plan.error.into()),
                    None => done,
                }
            })*
        }
    };
}

operations! {
    probe() -> (), StoreError;
    client(id: &ClientId) -> Option<ClientRecord>, StoreError;
    client_by_name(name: &Name) -> Option<ClientRecord>, StoreError;
    clients(after: Option<&Name>, limit: usize) -> Vec<ClientRecord>, StoreError;
    enrol(enrolment: Enrolment) -> Enrolled, EnrolError;
    enrol_all(batch: Vec<Enrolment>) -> Vec<Enrolled>, RefusedEntry;
    revoke(id: &ClientId, now: u64, refuse: Refuse, announce: Announce) -> Option<Vec<ClientId>>, StoreError;
    rotate(rotation: NewKey) -> (), RotateError;
    successor(id: &ClientId, key_epoch: u32) -> Option<Successor>, StoreError;
    add_account(name: Name, verifier: Verifier, now: u64) -> (), AccountError;
    account(name: &Name) -> Option<Account>, StoreError;
    accounts(after: Option<&Name>, limit: usize) -> Vec<Account>, StoreError;
    change_account(name: &Name, change: AccountChange, now: u64) -> bool, StoreError;
    log_in(login: LoginEntry) -> LoggedIn, LoginError;
    set_record_limit(id: &ClientId, limit: u16) -> (), StoreError;
    touch(id: &ClientId, now: u64) -> (), StoreError;
    publish_bundle(id: &ClientId, epoch: u32, bundle: &[u8], signature: &[u8]) -> (), PublishError;
    bundle(id: &ClientId) -> Option<BundleRecord>, StoreError;
    add_token(token: Token) -> (), TokenError;
    token(id: &TokenId) -> Option<Token>, StoreError;
    tokens(after: Option<&TokenId>, limit: usize, now: u64) -> Vec<Token>, StoreError;
    end_tokens(which: Tokens, now: u64) -> u64, StoreError;
    found(founding: Founding) -> Founded, FoundError;
    conversation(sid: &ConversationId) -> Option<Conversation>, StoreError;
    invite_again(client: &ClientId, now: u64) -> bool, StoreError;
    answer(answer: MemberAnswer, announce: Announce) -> Vec<ClientId>, AnswerError;
    close(
        sid: &ConversationId, by: &ClientId, signature: &MemberSignature, now: u64, refuse: Refuse, announce: Announce
    ) -> Closing, CloseError;
    expire_invitations(before: u64, limit: usize, now: u64, announce: Announce) -> (usize, Vec<ClientId>), StoreError;
    say(new: NewPost) -> Said, SayError;
    posts(after: u64, limit: usize) -> Posts, StoreError;
    expire_posts(before: u64) -> u64, StoreError;
    register_chain(chain: &ChainId, sender: &ClientId, sid: &ConversationId, recipient: &ClientId) -> (), ChainError;
    chain(chain: &ChainId) -> Option<ChainRoute>, StoreError;
    put_channel(client: &ClientId, channel: ChannelRecord, keep: Option<ChannelId>) -> (), ChannelError;
    channel(id: &ChannelId, now: u64) -> Option<(ClientId, ChannelRecord)>, StoreError;
    channels(client: &ClientId, now: u64) -> Vec<(ChannelId, u64)>, StoreError;
    drop_channels(client: &ClientId) -> u64, StoreError;
    put(items: Vec<NewItem>) -> Vec<Result<Put, PutError>>, StoreError;
    queue(recipient: &ClientId, after: u64, max_items: usize, max_bytes: usize) -> Vec<Item>, StoreError;
    acknowledge(recipient: &ClientId, up_to: u64) -> u64, StoreError;
    remove(recipient: &ClientId, seqs: &[u64]) -> u64, StoreError;
    waiting(recipient: &ClientId) -> Waiting, StoreError;
    expire(before: u64, limit: usize, refuse: Refuse) -> Vec<(ClientId, Item)>, StoreError;
}
