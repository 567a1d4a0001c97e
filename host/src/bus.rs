//! Hints between the nodes that share a store: something in it is new for a client, or for everybody.
//!
//! The store is the truth, and a hint says only that it is worth asking: it names the recipient, or the public conversation, and carries nothing. So a
//! bus may lose hints, delay them, repeat them and tell them in any order, and still no message is lost, given twice or
//! out of order. Whoever serves a client asks the store when the client comes, when it begins to listen, when a hint
//! comes, and once in [`Config::poll`](crate::server::Config::poll) whatever it was told: **a lost hint costs at most that
//! time**. The last is one look at a number in memory for each connection, and wakes none that has everything.
//!
//! *One node* ([`Local`]) needs no hints. It knows of everything that comes into its store, and gives it to the mailbox
//! of its recipient at once; what need not be stored passes through memory.
//!
//! *Several nodes* cannot know what another one has just stored. A message that passed through memory could overtake one
//! of the same sender that another node has stored, and whose hint was lost. So nothing passes there: every message, wrap
//! and receipt for another client goes through the store, and is given in the order of its numbers. For each sender this
//! is the order in which he sent on one connection, and of two connections if he was told before the second of what he
//! sent on the first; what he was told nothing of when his connection broke may come behind what he has sent elsewhere
//! meanwhile. Of a store that is shared this asks that a number becomes visible only when every lower one is. A receipt
//! that the store cannot take is lost there, also for a sender who is connected: he is told when he sends again. Routes of
//! chains are not remembered: another node may have learnt more of them.
//!
//! What is known of one node only, so far: who is online, who takes over whose connection, and that a client that
//! was revoked elsewhere is still connected here.

use core::fmt::Debug;
use core::future::pending;
use core::time::Duration;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use crate::server::Server;
use crate::store::ClientId;

/// The connections are asked for in so many parts, one after the other, so that those which came together are not asked
/// for together.
const PARTS: u32 = 60;
/// The shortest time between two of them.
const MIN_PAUSE: Duration = Duration::from_millis(1);

/// For whom something in the store is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// For this client.
    Client(ClientId),
    /// For everybody: something was said in the public conversation.
    Public,
}

/// Takes hints to other nodes, and from them. See the module for what it need not do.
#[async_trait]
pub trait Bus: Debug + Send + Sync {
    /// Whether no other node ever puts anything into the store while this one runs. Asked once, when a server is made.
    fn alone(&self) -> bool;

    /// Takes a hint to the other nodes. Called after the commit of every single item, by tasks that others wait for: it
    /// returns at once and reports no failure. Who has given the same hint a moment ago need not do it again before
    /// the other nodes were told.
    fn hint(&self, hint: Hint);

    /// Waits for a hint of another node's; a node may hear its own. Cancel-safe.
    async fn heard(&self) -> Hint;
}

/// The bus of one node: there is nobody to take a hint to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Local;

#[async_trait]
impl Bus for Local {
    fn alone(&self) -> bool {
        true
    }

    fn hint(&self, _: Hint) {}

    async fn heard(&self) -> Hint {
        pending().await
    }
}

/// Heeds what others hint at, and what nobody has hinted at, as long as the server runs.
pub(crate) async fn run(server: Arc<Server>) {
    tokio::join!(hear(&server), poll(&server));
}

async fn hear(server: &Server) {
    loop {
        match server.bus.heard().await {
            Hint::Client(client) => server.router.heed(&client),
            Hint::Public => server.followers.tell(),
        }
    }
}

/// One task for all connections: none is woken for it but by what it was not told of.
async fn poll(server: &Server) {
    let mut due = Instant::now();
    for part in (0..PARTS).cycle() {
        due = due.max(Instant::now()) + (server.config().poll / PARTS).max(MIN_PAUSE);
        sleep_until(due).await;
        if part == 0 {
            match server.store.posts(u64::MAX, 0).await {
                Ok(posts) => server.followers.see(posts.newest),
                Err(error) => warn!(%error, "could not see whether something was said: looking again later"),
            }
        }
        let mut lacking = Vec::new();
        for mailbox in server.router.part(part, PARTS) {
            match server.store.waiting(mailbox.client()).await {
                Ok(waiting) if mailbox.lacks(&waiting) => lacking.push((mailbox, waiting)),
                Ok(_) => {}
                Err(error) => {
                    warn!(%error, "could not see whether something waits: looking again later");
                    break;
                }
            }
        }
        if !lacking.is_empty() {
            // What this node has just stored is on its way to them.
            server.keeper.settled().await;
        }
        for (mailbox, waiting) in lacking {
            mailbox.poll(&waiting);
        }
    }
}
