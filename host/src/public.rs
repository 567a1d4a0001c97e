//! Who reads the public conversation, and has all of it: whoever that is gets one word when there is more.
//!
//! What was said stays in the store, and each reader fetches it at its own pace. So a reader costs a bit and a slow one
//! holds up nobody. A word more than needed does no harm, and a lost one is made good by the next look at the store.

use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ossicle_core::{Message, News};

use crate::mailbox::{Mailbox, Owed};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Followers {
    /// By their connections, so that they are told in the order in which they came.
    waiting: Mutex<BTreeMap<u64, Weak<Mailbox>>>,
    /// The last post that they were told of.
    newest: AtomicU64,
}

impl Followers {
    /// The connection is told when there is more. Before the store is asked for what there is, so that nothing is missed.
    pub(crate) fn wait(&self, mailbox: &Arc<Mailbox>) {
        self.waiting().insert(mailbox.connection(), Arc::downgrade(mailbox));
    }

    /// It is not told any more.
    pub(crate) fn forget(&self, connection: u64) {
        self.waiting().remove(&connection);
    }

    /// There is more: everybody who waits is told, once.
    pub(crate) fn tell(&self) {
        let waiting = core::mem::take(&mut *self.waiting());
        if waiting.is_empty() {
            return;
        }
        let (mut scratch, mut bytes) = ([0; 8], [0; 8]);
        let len =
            News {}.encode(&mut scratch).and_then(|news: Message<'_>| news.encode(&mut bytes)).unwrap_or_default();
        let news = bytes.get(..len).unwrap_or_default();
        for mailbox in waiting.into_values().filter_map(|mailbox| mailbox.upgrade()) {
            mailbox.owe(Owed::Answer(news.to_vec()));
        }
    }

    /// This is the last post that there is: they are told if they were not.
    pub(crate) fn see(&self, newest: u64) {
        if self.newest.fetch_max(newest, Ordering::AcqRel) < newest {
            self.tell();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Mailbox>>> {
        // Nothing under this lock can panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::keeper::Keeper;
    use crate::mailbox::{Budget, MailboxLimits, Next, Shared};

    fn mailbox(connection: u64) -> Arc<Mailbox> {
        let (keeper, _) = Keeper::new(Clock::system());
        let shared = Arc::new(Shared { budget: Budget::default(), keeper, presence: Arc::default() });
        Arc::new(Mailbox::new([connection as u8; 16], connection, 1000, MailboxLimits::default(), shared))
    }

    #[test]
    fn who_waits_is_told_once() {
        let followers = Followers::default();
        let (alice, bob) = (mailbox(1), mailbox(2));
        let news = || Next::Owed(Owed::Answer(vec![2, 0x22]));
        followers.wait(&alice);
        followers.wait(&alice);
        followers.wait(&bob);
        followers.forget(2);
        followers.see(7);
        assert_eq!((alice.next(4096), alice.next(4096), bob.next(4096)), (news(), Next::Empty, Next::Empty));
        for _ in 0..2 {
            followers.wait(&alice);
            followers.see(7);
            followers.see(3);
            assert_eq!(alice.next(4096), Next::Empty, "it was told of that");
        }
        followers.tell();
        followers.tell();
        assert_eq!((alice.next(4096), alice.next(4096)), (news(), Next::Empty));
        followers.wait(&alice);
        drop(alice);
        followers.see(8);
        assert!(followers.waiting().is_empty());
    }
}
