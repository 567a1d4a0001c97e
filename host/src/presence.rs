//! Who comes and goes, for those who watch it.
//!
//! What may change whether a client is there only notes its id here, and nothing at all while nobody watches: that costs
//! those who come and go one look at a number. One task for all works off what was noted, as it is by then: it asks
//! router and store, and puts one line into the watch of every connection with a pattern for it. A line is a state
//! and not an event, so that of several that a slow reader has not taken only the last is left; a connection that has
//! taken none of too many is told to ask anew. So a watcher costs a bounded amount of memory, and changes in quick
//! succession, however many, cost one line.

use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ossicle_core::{Change, Changed, MAX_WATCHED, Message, PeerStatus, Reason};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use crate::mailbox::Mailbox;
use crate::name::{Name, Pattern};
use crate::server::Server;
use crate::store::{ClientId, ClientRecord, StoreError};

/// A client whose connection was taken over is taken for present until the new one listens, at most so long.
pub(crate) const SUCCESSION: Duration = Duration::from_secs(5);
/// Connections that may watch at a time.
const MAX_WATCHERS: usize = 1024;
/// Lines that are held for a connection until it takes them.
const MAX_PENDING: usize = 1024;
/// What comes within this is told at once.
const PAUSE: Duration = Duration::from_millis(20);
/// The store is asked again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// What the mailboxes of a server share of it.
#[derive(Debug, Default)]
pub struct Presence {
    watching: AtomicUsize,
    watchers: Mutex<BTreeMap<u64, Weak<Mailbox>>>,
    noted: Mutex<Noted>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Noted {
    /// Who may have come or gone.
    changed: HashMap<ClientId, Note>,
    /// Notes that were made.
    notes: u64,
    /// Who was taken over, and when that will have been too long ago.
    succeeding: HashMap<ClientId, Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Note {
    /// Which it was, so that what changed last is told last.
    number: u64,
    /// Whether the client was there until then.
    left: bool,
}

impl Presence {
    /// This client may have come or gone, or was enrolled or revoked; `left`: it was there until now.
    pub(crate) fn note(&self, client: &ClientId, left: bool) {
        if self.watching.load(Ordering::SeqCst) == 0 {
            return;
        }
        self.noted().note(*client, left);
        self.wake.notify_one();
    }

    /// This client is taken for present until then, though its new connection does not listen yet.
    pub(crate) fn note_succession(&self, client: &ClientId, until: Instant) {
        // Also while nobody watches: somebody may by then.
        self.noted().succeeding.insert(*client, until);
        self.wake.notify_one();
    }

    /// From now on the connection is told of those whom the pattern selects.
    ///
    /// # Errors
    /// [`Reason::TooLarge`] for more patterns than a connection may watch, [`Reason::Unavailable`] for more connections
    /// than may watch.
    pub(crate) fn watch(&self, mailbox: &Arc<Mailbox>, pattern: Pattern) -> Result<(), Reason> {
        let mut watchers = self.watchers();
        if !watchers.contains_key(&mailbox.connection()) && watchers.len() >= MAX_WATCHERS {
            return Err(Reason::Unavailable);
        }
        mailbox.watch(pattern)?;
        watchers.insert(mailbox.connection(), Arc::downgrade(mailbox));
        self.watching.store(watchers.len(), Ordering::SeqCst);
        Ok(())
    }

    /// The connection has ended, or watches nothing any more.
    pub(crate) fn forget(&self, connection: u64) {
        if self.watching.load(Ordering::SeqCst) > 0 {
            let mut watchers = self.watchers();
            watchers.remove(&connection);
            self.watching.store(watchers.len(), Ordering::SeqCst);
        }
    }

    /// Connections that watch.
    pub(crate) fn watching(&self) -> usize {
        self.watching.load(Ordering::SeqCst)
    }

    /// Waits until something was noted, and takes it.
    async fn next(&self) -> VecDeque<(ClientId, bool)> {
        loop {
            let (changed, due) = self.noted().take(Instant::now());
            if !changed.is_empty() {
                return changed;
            }
            tokio::select! {
                () = self.wake.notified() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }

    /// Tells everybody who watches a client of this name. `id` may be in what is told already and not taken.
    fn tell(&self, id: ClientId, name: &Name, status: Option<PeerStatus>) {
        // Out of the lock: the last one who holds a mailbox ends it.
        let watchers: Vec<Arc<Mailbox>> = self.watchers().values().filter_map(Weak::upgrade).collect();
        for mailbox in watchers {
            mailbox.tell_change(id, name, status);
        }
    }

    // Nothing under these locks can panic halfway through a change.

    fn watchers(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Mailbox>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    fn note(&mut self, client: ClientId, left: bool) {
        self.notes += 1;
        let note = self.changed.entry(client).or_insert(Note { number: 0, left });
        *note = Note { number: self.notes, left: left || note.left };
    }

    /// What is due, in the order of the last change of each, and when there may be more though nothing happens.
    fn take(&mut self, at: Instant) -> (VecDeque<(ClientId, bool)>, Option<Instant>) {
        let mut late: Vec<_> = self.succeeding.extract_if(|_, until| *until <= at).collect();
        late.sort_unstable_by_key(|(client, until)| (*until, *client));
        for (client, _) in late {
            self.note(client, true);
        }
        let mut changed: Vec<_> = core::mem::take(&mut self.changed).into_iter().collect();
        changed.sort_unstable_by_key(|(_, note)| note.number);
        let due = self.succeeding.values().min().copied();
        (changed.into_iter().map(|(client, note)| (client, note.left)).collect(), due)
    }
}

/// Tells watchers of changes as long as the server runs.
pub(crate) async fn run(server: Arc<Server>) {
    let presence = Arc::clone(&server.mailboxes.presence);
    loop {
        let mut changed = presence.next().await;
        while let Some((id, left)) = changed.pop_front() {
            if presence.watching() == 0 {
                break;
            }
            if let Err(error) = look(&server, &presence, id, left).await {
                warn!(%error, "could not see who came and went: looking again");
                changed.push_front((id, left));
                sleep(AGAIN).await;
            }
        }
        // What one client does over and over costs no more than what many do once.
        sleep(PAUSE).await;
    }
}

async fn look(server: &Server, presence: &Presence, id: ClientId, left: bool) -> Result<(), StoreError> {
    let Some(client) = server.store.client(&id).await? else {
        return Ok(());
    };
    let Ok(name) = Name::parse(&client.name) else {
        return Ok(());
    };
    let status = (!client.revoked).then(|| match status(server, &client) {
        // When it left is written behind its leaving.
        PeerStatus::Offline { last_seen } => {
            PeerStatus::Offline { last_seen: last_seen.max(left.then(|| server.now())) }
        }
        PeerStatus::Online => PeerStatus::Online,
    });
    presence.tell(id, &name, status);
    Ok(())
}

/// Whether a client is there.
pub(crate) fn status(server: &Server, client: &ClientRecord) -> PeerStatus {
    if server.router.is_online(&client.id) {
        PeerStatus::Online
    } else {
        PeerStatus::Offline { last_seen: client.last_seen }
    }
}

/// What a connection watches, and what it is to be told of that.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    patterns: Vec<Pattern>,
    pending: VecDeque<Line>,
    /// More than `pending` may hold had changed.
    lost: bool,
    /// Who was told of since a page of those who are there was begun, while one is made.
    told: Option<HashSet<ClientId>>,
}

#[derive(Debug)]
struct Line {
    id: ClientId,
    name: Box<str>,
    status: Option<PeerStatus>,
}

impl Watch {
    /// # Errors
    /// [`Reason::TooLarge`].
    pub(crate) fn add(&mut self, pattern: Pattern) -> Result<(), Reason> {
        if !self.watches(&pattern) {
            if self.patterns.len() >= MAX_WATCHED {
                return Err(Reason::TooLarge);
            }
            self.patterns.push(pattern);
        }
        Ok(())
    }

    /// Whether anything is watched still.
    pub(crate) fn remove(&mut self, pattern: &Pattern) -> bool {
        self.patterns.retain(|held| held != pattern);
        !self.patterns.is_empty()
    }

    pub(crate) fn watches(&self, pattern: &Pattern) -> bool {
        self.patterns.contains(pattern)
    }

    /// Begins to make a page: who is told of from now on is not to be in it.
    pub(crate) fn begin_page(&mut self) {
        self.told = Some(HashSet::new());
    }

    /// Who was told of since.
    pub(crate) fn end_page(&mut self) -> HashSet<ClientId> {
        self.told.take().unwrap_or_default()
    }

    /// Takes a line in if a pattern selects it, and says whether there is something to be sent.
    pub(crate) fn tell(&mut self, id: ClientId, name: &Name, status: Option<PeerStatus>) -> bool {
        if !self.patterns.iter().any(|pattern| pattern.matches(name)) {
            return false;
        }
        if let Some(place) = self.pending.iter().position(|line| line.id == id) {
            self.pending.remove(place);
        }
        let many = self.told.as_ref().is_some_and(|told| told.len() >= MAX_PENDING);
        if many || self.pending.len() >= MAX_PENDING {
            self.pending = VecDeque::new();
            self.told = self.told.as_ref().map(|_| HashSet::new());
            self.lost = true;
        } else {
            if let Some(told) = &mut self.told {
                told.insert(id);
            }
            self.pending.push_back(Line { id, name: name.as_str().into(), status });
        }
        true
    }

    /// Takes out what fits into a payload of at most `max` bytes, encoded; `None` if there is nothing.
    pub(crate) fn next(&mut self, max: usize) -> Option<Vec<u8>> {
        if self.pending.is_empty() && !self.lost {
            return None;
        }
        // Code, `lost` and a length.
        let mut lines = vec![0; max.saturating_sub(6)];
        let mut len = 0;
        while let Some(line) = self.pending.front() {
            let Line { id, name, status } = line;
            let change = Change { id: *id, name, status: *status };
            let Some(written) = change.append(lines.get_mut(len..).unwrap_or_default()) else {
                break;
            };
            len += written;
            self.pending.pop_front();
        }
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
        }
        let lines = lines.get(..len).unwrap_or_default();
        let changed = Changed { lost: core::mem::take(&mut self.lost), lines };
        let (mut body, mut bytes) = (vec![0; max], vec![0; max]);
        let len = changed.encode(&mut body).and_then(|message: Message<'_>| message.encode(&mut bytes)).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ossicle_core::Body;

    const ONLINE: Option<PeerStatus> = Some(PeerStatus::Online);
    const AWAY: Option<PeerStatus> = Some(PeerStatus::Offline { last_seen: Some(7) });

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    fn watch() -> Watch {
        let mut watch = Watch::default();
        watch.add(pattern("s-*")).unwrap();
        watch
    }

    fn id(n: u32) -> ClientId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&n.to_be_bytes());
        id
    }

    type Told = (bool, Vec<(ClientId, String, Option<PeerStatus>)>);

    fn taken(watch: &mut Watch, max: usize) -> Option<Told> {
        let bytes = watch.next(max)?;
        assert!(bytes.len() <= max, "{} bytes", bytes.len());
        let Ok(Message::Other(body)) = Message::decode(&bytes) else { panic!("{bytes:?}") };
        let changed = Changed::decode(Body::clone(&body)).unwrap();
        let lines = Change::lines(changed.lines).map(|line| {
            let Change { id, name, status } = line.unwrap();
            (id, name.to_owned(), status)
        });
        Some((changed.lost, lines.collect()))
    }

    #[test]
    fn the_last_state_of_each_is_told_once_in_the_order_of_the_changes() {
        let mut watch = watch();
        assert!(!watch.tell(id(1), &name("alice"), ONLINE));
        assert_eq!(taken(&mut watch, 1000), None);
        for (n, status) in [(1, ONLINE), (2, ONLINE), (1, AWAY), (3, None), (2, ONLINE)] {
            assert!(watch.tell(id(n), &name(&format!("S-{n}")), status));
        }
        let line = |n, status| (id(n), format!("S-{n}"), status);
        let told = vec![line(1, AWAY), line(3, None), line(2, ONLINE)];
        assert_eq!(taken(&mut watch, 1000), Some((false, told)));
        assert_eq!(taken(&mut watch, 1000), None);
    }

    #[test]
    fn what_a_small_record_does_not_hold_comes_in_the_next_ones() {
        let mut watch = watch();
        let long = |n: u32| format!("s-{n:0>62}");
        for n in 0..100 {
            watch.tell(id(n), &name(&long(n)), AWAY);
        }
        let (mut records, mut lines) = (0, Vec::new());
        while let Some((lost, told)) = taken(&mut watch, 1000) {
            assert!(!lost);
            records += 1;
            lines.extend(told.into_iter().map(|(_, name, _)| name));
        }
        assert_eq!(lines, (0..100).map(long).collect::<Vec<_>>());
        // Ten of the longest at least are in each.
        assert!(records <= 10, "{records}");
    }

    #[test]
    fn a_reader_that_is_too_slow_is_told_to_ask_anew() {
        let mut watch = watch();
        let changes = u32::try_from(MAX_PENDING).unwrap();
        // The same client over and over takes one place.
        for n in 0..10 * changes {
            watch.tell(id(0), &name("s-0"), if n % 2 == 0 { ONLINE } else { AWAY });
        }
        assert_eq!(taken(&mut watch, 1000), Some((false, vec![(id(0), "s-0".to_owned(), AWAY)])));
        for n in 0..=changes {
            watch.tell(id(n), &name("s-0"), ONLINE);
        }
        assert_eq!(taken(&mut watch, 1000), Some((true, Vec::new())));
        // Afterwards all goes on.
        watch.tell(id(5), &name("s-5"), None);
        assert_eq!(taken(&mut watch, 1000), Some((false, vec![(id(5), "s-5".to_owned(), None)])));
    }

    #[test]
    fn who_was_told_of_while_a_page_was_made_is_not_in_it() {
        let mut watch = watch();
        watch.tell(id(1), &name("s-1"), ONLINE);
        watch.begin_page();
        watch.tell(id(2), &name("s-2"), ONLINE);
        watch.tell(id(3), &name("carol"), ONLINE);
        assert_eq!(watch.end_page(), HashSet::from([id(2)]));
        watch.tell(id(4), &name("s-4"), ONLINE);
        assert_eq!(watch.end_page(), HashSet::new());
        // A page cannot leave out ever more.
        watch.begin_page();
        for n in 0..2 * u32::try_from(MAX_PENDING).unwrap() {
            watch.tell(id(n), &name("s-0"), ONLINE);
            if n % 100 == 0 {
                taken(&mut watch, 16_384);
            }
        }
        let mut lost = false;
        while let Some((some, _)) = taken(&mut watch, 16_384) {
            lost |= some;
        }
        assert!(lost || watch.end_page().len() <= MAX_PENDING);
    }

    #[test]
    fn patterns_are_few_and_each_is_there_once() {
        let mut watch = watch();
        for n in 1..MAX_WATCHED {
            watch.add(pattern(&format!("x{n}"))).unwrap();
        }
        assert_eq!(watch.add(pattern("y")), Err(Reason::TooLarge));
        assert_eq!(watch.add(pattern("s-*")), Ok(()));
        assert!(watch.remove(&pattern("nothing")));
        assert!(watch.remove(&pattern("x1")));
        assert_eq!(watch.add(pattern("y")), Ok(()));
        assert!(watch.watches(&pattern("y")) && !watch.watches(&pattern("x1")));
        let mut one = self::watch();
        assert!(!one.remove(&pattern("s-*")));
        assert!(!one.tell(id(1), &name("s-1"), ONLINE));
    }

    #[tokio::test]
    async fn nothing_is_noted_for_nobody_and_who_was_taken_over_is_looked_at_in_the_end() {
        let presence = Presence::default();
        presence.note(&id(1), false);
        assert!(presence.noted().changed.is_empty());
        presence.watching.store(1, Ordering::SeqCst);
        presence.note(&id(1), true);
        presence.note(&id(1), false);
        assert_eq!(presence.next().await, [(id(1), true)]);
        // In the order of the last change of each.
        for n in [9, 5, 7, 9] {
            presence.note(&id(n), false);
        }
        assert_eq!(presence.next().await, [5, 7, 9].map(|n| (id(n), false)));
        let until = Instant::now() + Duration::from_millis(1);
        presence.note_succession(&id(2), until);
        let late = presence.next().await;
        assert_eq!(late, [(id(2), true)]);
        assert!(Instant::now() >= until);
    }
}
