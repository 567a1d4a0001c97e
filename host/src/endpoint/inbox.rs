//! What this client receives: chains from peers, and messages until their reader has them.
//!
//! Wraps and envelopes come in, messages go into the home's store, receipts go out, in this order: a receipt is made only
//! after message and chain are durable, together. What came in one read is kept in one transaction. A wrap of somebody
//! unknown waits until the directory was asked, and with it what comes on its chain; what the server keeps anyway waits for
//! room here. Refused, each with a receipt that
//! says why: unknown chains (`rekey`), what does not open, what is too far ahead, what went back.

use std::collections::{HashMap, VecDeque};

use ossicle_core::{
    AcceptError, Bundle, Conversation, DirectoryEntry, EnvelopeHeader, Lookup, Message, OpenError, Reason, Receipt,
    ReceivingChain, Rung, Rungs, SignedBundle, Subject, WrapHeader,
};
use zeroize::Zeroizing;

use super::agent::{Desk, Ended, Pending};
use super::groups::present;
use super::now;
use super::peers::{Rejected, admit, check_bundle};
use crate::crypto::HostAead;
use crate::store::home::groups::{GroupMember, Membership};
use crate::store::home::{MAX_WAITING, MAX_WAITING_BYTES, Owed, Peer, Progress, Received, StoredChain};

/// Keys kept for messages that were skipped.
const SKIP: usize = 256;
/// They are kept for so many seconds after the first of them.
const SKIPPED_AGE: u64 = 7 * 24 * 3600;
/// Wraps of unknown senders that wait for the directory.
const MAX_PARKED: usize = 64;
/// Envelopes on their chains, and envelopes that wait for room: as many as a server sends before it waits itself.
const MAX_PARKED_ENVELOPES: usize = 1024;
/// Chains kept in memory; the others are read again when they are needed.
const MAX_HELD: usize = 256;

type Chain = ReceivingChain<SKIP>;

/// Number and time of something that waited at the server.
pub(super) type Waited = Option<(u64, u64)>;

pub(super) struct Inbox {
    held: HashMap<[u8; 8], Held>,
    parked: Vec<Parked>,
    parked_envelopes: Vec<Envelope>,
    /// Until their reader has made room. The server has them, too.
    stalled: VecDeque<Envelope>,
    /// Opened, and not durable yet.
    fresh: Vec<Received>,
    /// To be said once `fresh` is durable.
    owed: Vec<Receipt>,
    /// Messages that wait for their reader, and their bytes.
    backlog: (u64, u64),
    /// Whether some of them are durable and their reader was not told yet.
    news: bool,
}

struct Held {
    peer: [u8; 16],
    sid: [u8; 16],
    chain: Chain,
    changed: bool,
}

/// An envelope, the receipts that its sender wants, and whether it waited.
type Envelope = (Rungs, Vec<u8>, Waited);

struct Parked {
    waited: Waited,
    from: [u8; 16],
    /// Of whom the directory was asked and has not spoken yet.
    needs: Vec<[u8; 16]>,
    /// Whether it did not open already under the keys of its group that were known.
    again: bool,
    wrap: Vec<u8>,
    bundle: Vec<u8>,
    signature: Vec<u8>,
}

impl Held {
    fn stored(&self, id: [u8; 8]) -> Result<StoredChain, Ended> {
        let skipped = self.chain.missing().next().is_some();
        Ok(StoredChain { id, peer: self.peer, sid: self.sid, snapshot: snapshot(&self.chain)?, skipped })
    }
}

impl Inbox {
    pub(super) fn new(backlog: (u64, u64)) -> Self {
        Self {
            held: HashMap::new(),
            parked: Vec::new(),
            parked_envelopes: Vec::new(),
            stalled: VecDeque::new(),
            fresh: Vec::new(),
            owed: Vec::new(),
            backlog,
            news: false,
        }
    }

    /// The connection has gone: what waited for the directory will come again.
    pub(super) fn disconnected(&mut self) {
        self.parked.clear();
        self.parked_envelopes.clear();
        self.stalled.clear();
    }

    /// Whether what waited at the server under this number is not done with here.
    pub(super) fn holds(&self, seq: u64) -> bool {
        let parked = self.parked.iter().map(|parked| parked.waited);
        let envelopes = self.parked_envelopes.iter().chain(&self.stalled).map(|(_, _, waited)| *waited);
        parked.chain(envelopes).flatten().any(|(held, _)| held == seq)
    }

    /// Somebody begins a chain.
    pub(super) fn wrap(
        &mut self,
        desk: &mut Desk<'_>,
        from: [u8; 16],
        wrap: &[u8],
        bundle: &SignedBundle<'_>,
        waited: Waited,
    ) -> Result<(), Ended> {
        if from == desk.me.id {
            return refuse_wrap(desk, wrap, Reason::Unreadable);
        }
        // The sender repeats it with what he sends again. Refused because keys have changed since, the message would be sealed
        // anew, and read twice; one that did not arrive is refused by itself.
        if let Ok(header) = WrapHeader::decode(wrap)
            && desk.store.whose_chain(&header.chain_id)? == Some(from)
        {
            return Ok(());
        }
        // A bundle under another key than the pinned one may be that of a later key: the directory knows.
        let fits = |peer: &Peer| Bundle::decode(bundle.bundle).map_or(true, |bundle| bundle.key == peer.fingerprint);
        if let Some(peer) = desk.store.peer(&from)?.filter(fits) {
            return self.accept(desk, peer, wrap, bundle, waited, false);
        }
        if self.parked.len() >= MAX_PARKED {
            return refuse_wrap(desk, wrap, Reason::Rate);
        }
        if !self.parked.iter().any(|parked| parked.needs.contains(&from)) {
            let request = desk.requests.open(Pending::Sender { id: from });
            let subject = Subject::Id(from);
            desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: false, subject }))?;
        }
        self.parked.push(Parked {
            waited,
            from,
            needs: vec![from],
            again: false,
            wrap: wrap.to_vec(),
            bundle: bundle.bundle.to_vec(),
            signature: bundle.signature.to_vec(),
        });
        Ok(())
    }

    /// The directory has answered who `id` is.
    pub(super) fn found(
        &mut self,
        desk: &mut Desk<'_>,
        id: &[u8; 16],
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let admitted = match answer {
            Ok(entry) if entry.id == *id => admit(desk.store, &entry, None),
            Ok(_) => Err(Rejected::For { reason: Reason::Malformed, detail: None }),
            Err(reason) => Err(Rejected::For { reason, detail: None }),
        };
        let rejected = match admitted {
            Ok(_) => None,
            Err(rejected) => {
                let (reason, _) = rejected.told(desk.alarm)?;
                Some(if reason == Reason::KeyChanged { reason } else { Reason::Unreadable })
            }
        };
        for parked in &mut self.parked {
            parked.needs.retain(|needed| needed != id);
        }
        let is_due = |parked: &mut Parked| parked.needs.is_empty() || (rejected.is_some() && parked.from == *id);
        for parked in self.parked.extract_if(.., is_due).collect::<Vec<_>>() {
            let Parked { waited, from, wrap, again, .. } = &parked;
            // Asked anew each time: the bundle of a wrap is noted in the pin.
            match (rejected.filter(|_| from == id), desk.store.peer(from)?) {
                (Some(reason), _) => refuse_wrap(desk, wrap, reason)?,
                (None, None) => refuse_wrap(desk, wrap, Reason::Unreadable)?,
                (None, Some(peer)) => {
                    let bundle = SignedBundle { bundle: &parked.bundle, signature: &parked.signature };
                    self.accept(desk, peer, wrap, &bundle, *waited, *again)?;
                }
            }
        }
        for (wanted, mut envelope, waited) in core::mem::take(&mut self.parked_envelopes) {
            self.deliver(desk, wanted, &mut envelope, waited)?;
        }
        Ok(())
    }

    /// There is more room than before. Whether something waited for that.
    pub(super) fn resume(&mut self, desk: &mut Desk<'_>) -> Result<bool, Ended> {
        let before = self.stalled.len();
        while self.stalled.front().is_some_and(|(_, envelope, _)| self.has_room(envelope.len()))
            && let Some((wanted, mut envelope, waited)) = self.stalled.pop_front()
        {
            let behind = core::mem::take(&mut self.stalled);
            let done = self.deliver(desk, wanted, &mut envelope, waited);
            self.stalled = behind;
            done?;
        }
        Ok(self.stalled.len() < before)
    }

    fn has_room(&self, len: usize) -> bool {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        self.backlog.0 < MAX_WAITING && self.backlog.1.saturating_add(len) <= MAX_WAITING_BYTES
    }

    fn accept(
        &mut self,
        desk: &mut Desk<'_>,
        mut peer: Peer,
        wrap: &[u8],
        signed: &SignedBundle<'_>,
        waited: Waited,
        again: bool,
    ) -> Result<(), Ended> {
        let bundle = match check_bundle(&mut peer, signed) {
            Ok(bundle) => bundle,
            Err(rejected) => {
                let (reason, detail) = rejected.told(desk.alarm)?;
                if reason != Reason::KeyChanged {
                    tracing::warn!("a chain from {} is refused: {}", peer.name, detail.unwrap_or_default());
                }
                return refuse_wrap(desk, wrap, reason);
            }
        };
        let header = WrapHeader::decode(wrap).ok();
        let conversation = match header.map(|header| conversation_with(desk, &peer, &header.sid)).transpose()? {
            Some(Shared::Not) => return refuse_wrap(desk, wrap, Reason::NotMember),
            Some(Shared::With(conversation)) => Some(conversation),
            None => None,
        };
        let prekey = header.and_then(|header| desk.own.prekeys.find(header.prekey_id));
        let (Some(conversation), Some(prekey)) = (conversation, prekey) else {
            return refuse_wrap(desk, wrap, Reason::Unreadable);
        };
        let seen = desk.store.seen(&peer, &conversation.sid)?;
        let mut copy = wrap.to_vec();
        let chain = match Chain::accept(&mut copy, prekey, &peer.member(), &bundle, &conversation, seen) {
            Ok(chain) => chain,
            // An old pair of epochs with another chain is the doing of a sender that went back, who cannot know it by himself.
            Err(AcceptError::Replayed) => return refuse_wrap(desk, wrap, Reason::Rewound),
            // Its sender may have heard of a member's new key before this client.
            Err(_) if conversation.signed && !again && self.parked.len() < MAX_PARKED => {
                let (bundle, signature) = (signed.bundle.to_vec(), signed.signature.to_vec());
                let parked = Parked {
                    waited,
                    from: peer.id,
                    needs: Vec::new(),
                    again: true,
                    wrap: wrap.to_vec(),
                    bundle,
                    signature,
                };
                return self.look_around(desk, parked, &conversation.sid);
            }
            Err(_) => return refuse_wrap(desk, wrap, Reason::Unreadable),
        };
        self.commit(desk)?;
        let id = *chain.chain_id();
        // Ids are random. One that is here already was chosen, to get between another chain and its messages.
        if desk.store.whose_chain(&id)?.is_some() {
            return refuse_wrap(desk, wrap, Reason::Unreadable);
        }
        let snapshot = snapshot(&chain)?;
        let stored = StoredChain { id, peer: peer.id, sid: conversation.sid, snapshot, skipped: false };
        desk.store.begin_chain(&peer, &stored, chain.epochs())?;
        self.held.insert(id, Held { peer: peer.id, sid: conversation.sid, chain, changed: false });
        Ok(())
    }

    /// Asks who the members of a group are now, all of them, before a wrap is tried again.
    fn look_around(&mut self, desk: &mut Desk<'_>, mut parked: Parked, sid: &[u8; 16]) -> Result<(), Ended> {
        let others: Vec<[u8; 16]> = match desk.store.group(sid)? {
            Some(group) => group.others(&desk.me.id).map(|other| other.member.id).collect(),
            None => Vec::new(),
        };
        for id in &others {
            if !self.parked.iter().any(|parked| parked.needs.contains(id)) {
                let request = desk.requests.open(Pending::Sender { id: *id });
                let subject = Subject::Id(*id);
                desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: false, subject }))?;
            }
        }
        parked.needs = others;
        self.parked.push(parked);
        Ok(())
    }

    /// An envelope has come. What is said about it is said by the next [`Inbox::commit`].
    pub(super) fn deliver(
        &mut self,
        desk: &mut Desk<'_>,
        wanted: Rungs,
        envelope: &mut [u8],
        waited: Waited,
    ) -> Result<(), Ended> {
        let Ok(header) = EnvelopeHeader::decode(envelope) else {
            tracing::warn!("the server delivered something that is no envelope");
            return Ok(());
        };
        if !self.held.contains_key(&header.chain_id) {
            match desk.store.chain(&header.chain_id)? {
                Some(stored) => self.hold(&stored),
                None if self.is_parked(&header.chain_id) && self.parked_envelopes.len() < MAX_PARKED_ENVELOPES => {
                    self.parked_envelopes.push((wanted, envelope.to_vec(), waited));
                    return Ok(());
                }
                None => {}
            }
        }
        let Some(held) = self.held.get_mut(&header.chain_id) else {
            // A message is remembered longer than its chain: sealed anew, it would come a second time.
            let known = desk.store.remembered(&header.chain_id, header.n)?;
            if known.is_some_and(|known| known.salt == header.salt) {
                return self.repeated(desk, wanted, &header, header.n);
            }
            self.owed.push(untagged(Reason::Rekey, header.chain_id, header.n));
            return Ok(());
        };
        let is_full = self.backlog.0 >= MAX_WAITING
            || self.backlog.1.saturating_add(u64::try_from(envelope.len()).unwrap_or(u64::MAX)) > MAX_WAITING_BYTES;
        if (is_full || !self.stalled.is_empty()) && waited.is_some() && self.stalled.len() < MAX_PARKED_ENVELOPES {
            self.stalled.push_back((wanted, envelope.to_vec(), waited));
            return Ok(());
        }
        if is_full {
            self.owed.push(held.chain.refusal(&desk.me.id, Reason::QueueFull, header.n, &header.salt));
            return Ok(());
        }
        match held.chain.open::<HostAead>(envelope) {
            Ok(opened) => {
                let message = Received {
                    chain: header.chain_id,
                    n: opened.n,
                    salt: opened.salt,
                    peer: held.peer,
                    sid: held.sid,
                    signed: opened.signed,
                    kind: opened.kind,
                    time: now(),
                    accepted: waited.map(|(_, at)| at),
                    body: opened.body.to_vec(),
                    delivered_tag: tag(&held.chain, &desk.me.id, Rung::Delivered, opened.n),
                    opened_tag: wanted
                        .contains(Rung::Opened)
                        .then(|| tag(&held.chain, &desk.me.id, Rung::Opened, opened.n)),
                };
                held.changed = true;
                if wanted.contains(Rung::Delivered) {
                    self.owed.push(tagged(Rung::Delivered, header.chain_id, opened.n, message.delivered_tag));
                }
                self.backlog.0 += 1;
                self.backlog.1 += u64::try_from(message.body.len()).unwrap_or(u64::MAX);
                self.fresh.push(message);
                Ok(())
            }
            Err(OpenError::Duplicate { n } | OpenError::Old { n, .. }) => self.repeated(desk, wanted, &header, n),
            Err(OpenError::Refused(reason)) => self.refuse(desk, &header, reason),
            Err(_) => self.refuse(desk, &header, Reason::Unreadable),
        }
    }

    /// Somebody sends again what is here: he is told again, and nobody sees it twice.
    fn repeated(&mut self, desk: &mut Desk<'_>, wanted: Rungs, header: &EnvelopeHeader, n: u32) -> Result<(), Ended> {
        // What is known of it may have come a moment ago.
        self.commit(desk)?;
        let known = desk.store.remembered(&header.chain_id, n)?;
        match known {
            Some(known) if known.salt != header.salt => self.refuse(desk, header, Reason::Rewound),
            Some(known) => {
                if wanted.contains(Rung::Delivered) {
                    self.owed.push(tagged(Rung::Delivered, header.chain_id, n, known.delivered_tag));
                }
                if let (true, Progress::Told, Some(opened)) =
                    (wanted.contains(Rung::Opened), known.progress, known.opened_tag)
                {
                    self.owed.push(tagged(Rung::Opened, header.chain_id, n, opened));
                }
                Ok(())
            }
            None => self.refuse(desk, header, Reason::Unreadable),
        }
    }

    fn refuse(&mut self, desk: &Desk<'_>, header: &EnvelopeHeader, reason: Reason) -> Result<(), Ended> {
        let receipt = match self.held.get(&header.chain_id) {
            Some(held) if reason != Reason::Rekey => held.chain.refusal(&desk.me.id, reason, header.n, &header.salt),
            _ => untagged(reason, header.chain_id, header.n),
        };
        self.owed.push(receipt);
        Ok(())
    }

    /// Erases the keys of messages that were skipped so long ago that nobody sends them any more.
    pub(super) fn forget_skipped(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        self.commit(desk)?;
        let now = now();
        let mut erased = Vec::new();
        for stored in desk.store.chains_with_old_gaps(now.saturating_sub(SKIPPED_AGE))? {
            self.hold(&stored);
            if let Some(held) = self.held.get_mut(&stored.id) {
                held.chain.forget_skipped();
                erased.push(held.stored(stored.id)?);
            }
        }
        if !erased.is_empty() {
            desk.store.erase_from(&erased, now)?;
        }
        Ok(())
    }

    /// Whether something came since this was last asked.
    pub(super) const fn take_news(&mut self) -> bool {
        core::mem::replace(&mut self.news, false)
    }

    /// Forgets the chains of this peer, whose key was replaced: they are erased in the store.
    pub(super) fn forget(&mut self, peer: &[u8; 16]) {
        self.held.retain(|_, held| held.peer != *peer);
    }

    /// This conversation is over: what came in it is durable before its chains go.
    pub(super) fn end_conversation(&mut self, desk: &mut Desk<'_>, sid: &[u8; 16]) -> Result<(), Ended> {
        self.commit(desk)?;
        self.held.retain(|_, held| held.sid != *sid);
        Ok(())
    }

    /// Forgets all chains: they are erased in the store.
    pub(super) fn forget_all(&mut self) {
        self.held.clear();
    }

    /// Makes durable what was opened, then says what is to be said about it.
    pub(super) fn commit(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        if !self.fresh.is_empty() {
            let mut chains = Vec::new();
            for (id, held) in self.held.iter_mut().filter(|(_, held)| held.changed) {
                chains.push(held.stored(*id)?);
                held.changed = false;
            }
            desk.store.receive(&chains, &self.fresh, now())?;
            self.fresh.clear();
            self.news = true;
        }
        for receipt in self.owed.drain(..) {
            desk.link.send(&Message::Tell(receipt))?;
        }
        if self.held.len() > MAX_HELD {
            self.held.clear();
        }
        Ok(())
    }

    /// Messages that wait for their reader.
    pub(super) const fn waiting(&self) -> u64 {
        self.backlog.0
    }

    /// Its reader has a message.
    pub(super) fn read(&mut self, len: usize) {
        self.backlog.0 = self.backlog.0.saturating_sub(1);
        self.backlog.1 = self.backlog.1.saturating_sub(u64::try_from(len).unwrap_or(u64::MAX));
    }

    fn is_parked(&self, chain_id: &[u8; 8]) -> bool {
        let names = |parked: &Parked| WrapHeader::decode(&parked.wrap).is_ok_and(|header| header.chain_id == *chain_id);
        self.parked.iter().any(names)
    }

    fn hold(&mut self, stored: &StoredChain) {
        match Chain::decode(&stored.snapshot) {
            Ok(chain) => {
                let held = Held { peer: stored.peer, sid: stored.sid, chain, changed: false };
                self.held.insert(stored.id, held);
            }
            // Without it the chain is unknown, and its sender starts a new one.
            Err(_) => tracing::warn!("a chain in the home's state is damaged"),
        }
    }
}

/// What a client shares with a peer.
enum Shared {
    With(Conversation),
    /// A conversation of others, or one that is over.
    Not,
}

/// The conversation with this id, as far as this client shares it with the peer: the direct one, or a group of both.
fn conversation_with(desk: &Desk<'_>, peer: &Peer, sid: &[u8; 16]) -> Result<Shared, Ended> {
    let direct = Conversation::direct(desk.me, &peer.member(), 0);
    // Under any other id than its own it does not open.
    let Some(group) = desk.store.group(sid)?.filter(|_| *sid != direct.sid) else {
        return Ok(Shared::With(direct));
    };
    // The server lets nobody begin a chain who has not accepted; whether he has may be on its way to us.
    let is_in = |held: &&GroupMember| {
        held.member.id == peer.id && !matches!(held.membership, Membership::Declined | Membership::Revoked)
    };
    let present = if group.members.iter().any(|held| is_in(&held)) { present(desk, &group)? } else { None };
    Ok(present.map_or(Shared::Not, Shared::With))
}

/// The receipt that is owed for a message that its reader has.
pub(super) fn opened_receipt(owed: &Owed) -> Option<Receipt> {
    owed.tag.map(|opened| tagged(Rung::Opened, owed.chain, owed.n, opened))
}

fn snapshot(chain: &Chain) -> Result<Zeroizing<Vec<u8>>, Ended> {
    let mut bytes = Zeroizing::new(vec![0; Chain::SNAPSHOT_LEN]);
    let damaged = |_| crate::store::home::HomeStoreError::Damaged;
    let len = chain.encode(&mut bytes).map_err(damaged)?;
    bytes.truncate(len);
    Ok(bytes)
}

fn tag(chain: &Chain, me: &[u8; 16], rung: Rung, n: u32) -> [u8; 16] {
    // It was opened a moment ago, so there is a receipt for it.
    chain.receipt(me, rung, n, n).and_then(|receipt| receipt.tag).unwrap_or_default()
}

const fn tagged(rung: Rung, chain: [u8; 8], n: u32, tag: [u8; 16]) -> Receipt {
    Receipt { rung, reason: None, chain, from: n, to: n, tag: Some(tag) }
}

const fn untagged(reason: Reason, chain: [u8; 8], n: u32) -> Receipt {
    Receipt { rung: Rung::Refused, reason: Some(reason), chain, from: n, to: n, tag: None }
}

/// A wrap brings no number: its refusal names message 0, which every chain begins with.
fn refuse_wrap(desk: &mut Desk<'_>, wrap: &[u8], reason: Reason) -> Result<(), Ended> {
    if let Ok(header) = WrapHeader::decode(wrap) {
        desk.link.send(&Message::Tell(untagged(reason, header.chain_id, 0)))?;
    }
    Ok(())
}
