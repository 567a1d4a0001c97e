//! The group that a small client is in: what it was invited to, who has joined, and everybody's chain.
//!
//! ```text
//!  Vacant --Invite--> Checking --everybody looked up, init verified--> Answer --Answer--> Answered --Done--> Member
//!                         |--anything else--> Vacant                                               Closed--> Vacant
//! ```
//!
//! One group at a time, of five, founded by a peer whose word was declared to be enough; any other invitation is let expire
//! (PROTOCOL 9.2). Members are looked up one at a time, and what an answer leads to is one public-key operation for each
//! poll: stacks are small. The keys in the list are the pins, since its creator is believed and has signed them, and a
//! member whose key was replaced since is not followed.

use heapless::Vec;
use rand_core::TryCryptoRng;

use super::{Check, ClientEvent, ClientStep, Handling, Verdict, Verifying, check, ends_chain, next, refusal};
use crate::crypto::{Aead, HASH_LEN, PublicKey, SIGNATURE_LEN};
use crate::endpoint::{Endpoint, Outbox};
use crate::envelope::{
    AcceptError, Bundle, BundleKeys, BundleView, Conversation, Decision, EnvelopeHeader, GroupChains, Membership,
    OpenError, Prekey, SIGNED_OVERHEAD, SealError, WRAP_LEN,
};
use crate::error::{ApiMisuse, BufferError, Error, PeerError, Reason};
use crate::wire::{
    Answer, Body, Closed, DirectoryEntry, Fixed, GroupFlags, ID_LEN, Invite, Lookup, Member, MemberChanged,
    MemberState, Members, Message, Receipt, Rung, Rungs, SEND_HEAD_LEN, SignedBundle, Subject, ToldBy,
};

/// Other members that a group may have.
const OTHERS: usize = 4;
/// Bytes of the longest modulus that is verified, 3072 bits: for a longer one a device's stack is too small.
const MAX_MODULUS_LEN: usize = 384;
/// Messages whose receipts can still be verified.
const SENT: usize = 4;
/// Groups that are remembered when they are over: under the keys of this start, what was said in them would open again.
const LEFT: usize = 8;

/// Where a client keeps the group that it is in: the chains in 768 bytes (PROTOCOL 9.2), and what is known of its members.
///
/// It outlives broken connections, and ends with the program.
pub struct ClientGroup {
    stage: Stage,
    /// Complete from [`Stage::Answer`] on.
    conversation: Conversation,
    flags: GroupFlags,
    /// The sum of the key epochs of those who were looked up.
    version: Option<u32>,
    /// How many stand before this client in the list.
    before_me: usize,
    /// The creator's place.
    creator: usize,
    /// In the order of the list: in these places.
    others: Vec<Other, OTHERS>,
    chains: GroupChains<OTHERS>,
    /// The own chain is one to wrap on; otherwise the next wrap is one of a new chain.
    begun: bool,
    speech: Speech,
    /// The place that a request is about, and the request.
    asked: Option<(usize, u16)>,
    /// One more than the number, and the salt.
    sent: [(u32, [u8; 8]); SENT],
    left: Vec<[u8; ID_LEN], LEFT>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Vacant,
    /// Everybody is looked up, the creator last, who signed the sum of it.
    Checking,
    Answer,
    Answered(u16),
    Member,
}

/// Whether the application wants to speak.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speech {
    No,
    /// As soon as everybody who accepted has the chain.
    Wanted,
    Ready,
}

/// Another member.
struct Other {
    member: Member,
    /// The newest of its bundles. Of one who is a peer as well, the peer's counts.
    view: Option<BundleView>,
    /// Its last decision: the creator's first one is that he founded the group.
    decision: [u8; SIGNATURE_LEN],
    standing: Standing,
    /// A bundle of it came that is not verified yet.
    renewed: bool,
    own_chain: OwnChain,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Nothing is known that it has signed.
    Invited,
    /// Its key epoch is in the sum.
    Counted,
    /// It accepted, if its decision verifies.
    Undecided,
    Accepted,
}

/// Whether a member has this client's chain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnChain {
    Due,
    Wrapped,
    /// No way to it: not tried again before it says something, or another chain begins.
    Failed,
}

impl ClientGroup {
    /// In no group. All of it is zeros, so that a device need not keep it in flash.
    pub const fn new() -> Self {
        Self {
            stage: Stage::Vacant,
            conversation: Conversation { sid: [0; ID_LEN], members: [0; HASH_LEN], signed: false },
            flags: GroupFlags::NONE,
            version: None,
            before_me: 0,
            creator: 0,
            others: Vec::new(),
            chains: GroupChains::blank(),
            begun: false,
            speech: Speech::No,
            asked: None,
            sent: [(0, [0; 8]); SENT],
            left: Vec::new(),
        }
    }

    /// Makes it ready for a first group.
    pub(super) fn prepare(&mut self) {
        self.leave();
    }

    /// The connection has gone: what was under way has no answer any more.
    pub(super) fn disconnected(&mut self) {
        self.asked = None;
        if let Stage::Answered(_) = self.stage {
            self.stage = Stage::Answer;
        }
    }

    /// The server, or the keys of this client, are others than before: its word is to be given anew.
    pub(super) fn accept_again(&mut self, keys: bool) {
        if matches!(self.stage, Stage::Answered(_) | Stage::Member) {
            self.stage = Stage::Answer;
        }
        if keys {
            self.end_chain();
        }
    }

    /// Whether an invitation is under consideration, which is not to be acknowledged yet.
    pub(super) fn considers(&self) -> bool {
        matches!(self.stage, Stage::Checking | Stage::Answer | Stage::Answered(_))
    }

    /// Whether this client is a member, and the server knows it.
    pub(super) fn is_member(&self) -> bool {
        self.stage == Stage::Member
    }

    /// Whether there is something to ask, to answer or to tell.
    pub(super) fn owes(&self) -> bool {
        self.stage == Stage::Answer || self.due().is_some() || self.can_begin()
    }

    /// The own chain is wanted.
    pub(super) fn start(&mut self) {
        if self.stage != Stage::Vacant && self.speech == Speech::No {
            self.speech = Speech::Wanted;
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.stage == Stage::Member && self.speech == Speech::Ready
    }

    /// Whether everybody who accepted has the chain, and nobody was told so.
    fn can_begin(&self) -> bool {
        let has = |other: &Other| other.own_chain == OwnChain::Wrapped;
        self.stage == Stage::Member
            && self.speech == Speech::Wanted
            && self.asked.is_none()
            && self.due().is_none()
            && self.others.iter().any(has)
    }

    /// True once, as soon as the own chain stands.
    pub(super) fn begins(&mut self) -> bool {
        let begins = self.can_begin();
        if begins {
            self.speech = Speech::Ready;
        }
        begins
    }

    /// Whom to look up next.
    fn due(&self) -> Option<usize> {
        if self.asked.is_some() {
            return None;
        }
        let speaks = self.speech == Speech::Wanted;
        let mut others = self.others.iter();
        match self.stage {
            Stage::Checking => {
                let mut places = 0..self.others.len();
                let uncounted = |other: &Other| other.standing == Standing::Invited;
                let other =
                    places.find(|place| *place != self.creator && self.others.get(*place).is_some_and(uncounted));
                Some(other.unwrap_or(self.creator))
            }
            Stage::Member => others.position(|other| {
                let wants = speaks && other.standing == Standing::Accepted && other.own_chain == OwnChain::Due;
                other.standing == Standing::Undecided || other.renewed || wants
            }),
            Stage::Vacant | Stage::Answer | Stage::Answered(_) => None,
        }
    }

    pub(super) fn place(&self, id: &[u8; ID_LEN]) -> Option<usize> {
        self.others.iter().position(|other| other.member.id == *id)
    }

    /// Whether a wrap of this conversation is one of the group's.
    pub(super) fn takes_wraps_of(&self, sid: &[u8; ID_LEN]) -> bool {
        !matches!(self.stage, Stage::Vacant | Stage::Checking) && self.conversation.sid == *sid
    }

    pub(super) fn holds(&self, place: usize, chain_id: &[u8; 8]) -> bool {
        self.chains.place_of(chain_id) == Some(place)
    }

    /// Whether a wrap came with a bundle that was verified before. If not, its sender is looked up: only the directory shows
    /// the key that verifies it.
    pub(super) fn check_wrap(&mut self, place: usize, bundle: &Bundle) -> Check {
        let Some(other) = self.others.get_mut(place) else {
            return Check::Refuse(Reason::NotMember);
        };
        let checked = check(&mut other.view, &other.member, bundle, Verdict::Open);
        other.renewed |= matches!(checked, Check::Verify);
        checked
    }

    /// Takes a wrap of the member in this place.
    pub(super) fn take(
        &mut self,
        place: usize,
        wrap: &mut [u8],
        prekey: &Prekey,
        bundle: &Bundle,
    ) -> Result<(), AcceptError> {
        self.chains.accept(place, wrap, prekey, &bundle.member(), bundle, &self.conversation)
    }

    /// Seals a message for everybody.
    pub(super) fn send<A: Aead>(
        &mut self,
        wanted: Rungs,
        kind: u8,
        body: &[u8],
        endpoint: &mut Endpoint<'_, A>,
    ) -> Result<u32, Error> {
        let len = body.len().saturating_add(SIGNED_OVERHEAD);
        let max = endpoint.max_payload()?;
        if len.saturating_add(SEND_HEAD_LEN) > max {
            return Err(BufferError::MessageTooLong { max: max.saturating_sub(SIGNED_OVERHEAD + SEND_HEAD_LEN) }.into());
        }
        let chains = &mut self.chains;
        let sealed = endpoint.outbox().send_sealed(wanted, len, |envelope| chains.seal::<A>(kind, body, envelope));
        match sealed {
            Ok(sealed) => {
                self.sent.rotate_right(1);
                if let Some(first) = self.sent.first_mut() {
                    *first = (sealed.n.saturating_add(1), sealed.salt);
                }
                Ok(sealed.n)
            }
            Err(SealError::Exhausted) => {
                self.end_chain();
                self.start();
                Err(ApiMisuse::NotConnected.into())
            }
            Err(SealError::Failed(error)) => Err(error),
        }
    }

    /// Asks about the next member, or answers the invitation.
    #[inline(never)]
    pub(super) fn owe<A: Aead>(
        &mut self,
        keys: &BundleKeys,
        requests: &mut u16,
        out: &mut Outbox<'_, A>,
    ) -> Result<(), Error> {
        if self.stage == Stage::Answer {
            let signature = Decision::Accept.sign(keys, &self.conversation);
            let mut buffer = [0; ID_LEN + SIGNATURE_LEN + 8];
            let request = next(requests);
            let answer = Answer { request, sid: self.conversation.sid, accept: true, signature: Fixed(&signature) };
            out.send(&answer.encode(&mut buffer)?)?;
            self.stage = Stage::Answered(request);
        }
        if let Some(place) = self.due()
            && let Some(other) = self.others.get(place)
        {
            let request = next(requests);
            let subject = Subject::Id(other.member.id);
            out.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
            self.asked = Some((place, request));
        }
        Ok(())
    }

    /// Takes note of an invitation that may be accepted.
    fn consider(&mut self, invite: &Invite<'_>, me: &Member, key_epoch: u32, creator: &Member) {
        if self.stage != Stage::Vacant || self.left.is_full() || self.left.contains(&invite.sid) {
            return;
        }
        self.others.clear();
        let mut places = (None, None);
        for member in invite.members.iter() {
            if member == *me {
                places.0 = Some(self.others.len());
                continue;
            }
            if member == *creator {
                places.1 = Some(self.others.len());
            }
            let other = Other {
                member,
                view: None,
                decision: *invite.signature.0,
                standing: Standing::Invited,
                renewed: false,
                own_chain: OwnChain::Due,
            };
            if self.others.push(other).is_err() {
                return;
            }
        }
        if let (Some(before_me), Some(place)) = places {
            self.before_me = before_me;
            self.creator = place;
            self.flags = invite.flags;
            self.conversation = Conversation { sid: invite.sid, members: [0; HASH_LEN], signed: true };
            self.version = Some(key_epoch);
            self.stage = Stage::Checking;
        }
    }

    /// Whether what the creator signed is this group, with these keys in their present epochs.
    #[inline(never)]
    fn is_founded(&mut self, me: &Member, creator: &Bundle) -> bool {
        let mut lines = [[0; Member::LEN]; OTHERS + 1];
        let mut others = self.others.iter().map(|other| &other.member);
        for (index, line) in lines.iter_mut().enumerate() {
            let member = if index == self.before_me { Some(me) } else { others.next() };
            *line = member.map_or([0; Member::LEN], Member::encode);
        }
        let lines = lines.get(..=self.others.len()).unwrap_or_default();
        let (Ok(members), Some(version)) = (Members::new(lines.as_flattened()), self.version) else {
            return false;
        };
        let founded = Membership::founded(self.conversation.sid, creator.member(), self.flags, members, version);
        self.conversation = *founded.conversation();
        self.others.get(self.creator).is_some_and(|other| {
            Decision::Init(self.flags).verify(creator, &self.conversation, &other.decision).is_ok()
        })
    }

    /// The group is over, or was none.
    fn leave(&mut self) {
        if !matches!(self.stage, Stage::Vacant | Stage::Checking) {
            // There is room, or it would not have been joined.
            let _ = self.left.push(self.conversation.sid);
        }
        self.stage = Stage::Vacant;
        self.asked = None;
        self.speech = Speech::No;
        self.begun = false;
        self.others.clear();
        self.chains.reset();
    }

    /// The own chain leads nowhere any more.
    fn end_chain(&mut self) {
        self.begun = false;
        self.speech = Speech::No;
        self.asked = None;
        for other in &mut self.others {
            other.own_chain = OwnChain::Due;
        }
    }

    /// The member in this place has said something: if there was no way to it, there may be one by now. Returns its id.
    fn heard(&mut self, place: usize) -> [u8; ID_LEN] {
        let Some(other) = self.others.get_mut(place) else { return [0; ID_LEN] };
        if other.own_chain == OwnChain::Failed {
            other.own_chain = OwnChain::Due;
            if self.speech == Speech::Ready && other.standing == Standing::Accepted {
                self.speech = Speech::Wanted;
            }
        }
        other.member.id
    }

    /// Keeps another member's word until the group is known to be one. Until then it stands beside the creator's.
    #[inline(never)]
    fn note(&mut self, changed: &MemberChanged<'_>) {
        let Some(&Other { member: Member { id, .. }, decision: init, .. }) = self.others.get(self.creator) else {
            return;
        };
        let others = self.others.iter_mut().filter(|other| other.member.id != id);
        for other in others.filter(|other| other.member.id == changed.member) {
            match (changed.state, changed.signature) {
                (MemberState::Accepted, Some(signature)) => other.decision = *signature.0,
                (MemberState::Revoked, _) => other.decision = init,
                _ => {}
            }
        }
    }

    /// The group is one, and this client's word is due.
    #[inline(never)]
    fn found(&mut self) {
        let Some(init) = self.others.get(self.creator).map(|creator| creator.decision) else { return };
        for (place, other) in self.others.iter_mut().enumerate() {
            if place == self.creator {
                other.standing = Standing::Accepted;
            } else if other.decision != init {
                other.standing = Standing::Undecided;
            }
        }
        self.stage = Stage::Answer;
    }

    /// What another member, or the server, has to say of one.
    fn changed(&mut self, changed: &MemberChanged<'_>) {
        let sid = self.conversation.sid;
        if self.stage == Stage::Vacant || changed.sid != sid {
            return;
        }
        // The server tells it once. Where this client started anew before it had acknowledged the invitation, that is now.
        if self.stage == Stage::Checking {
            self.note(changed);
            return;
        }
        let Some(other) = self.others.iter_mut().find(|other| other.member.id == changed.member) else {
            return;
        };
        match (changed.state, changed.signature) {
            (MemberState::Accepted, Some(signature))
                if other.standing != Standing::Accepted || other.decision != *signature.0 =>
            {
                other.decision = *signature.0;
                other.standing = Standing::Undecided;
            }
            // The server's word, but nothing is lost by it that the server could not keep back itself.
            (MemberState::Revoked, _) => {
                other.standing = Standing::Invited;
                if other.own_chain == OwnChain::Wrapped {
                    // What is said from now on is not for him, whoever helps him to it.
                    let speech = self.speech;
                    self.end_chain();
                    self.speech = if speech == Speech::No { Speech::No } else { Speech::Wanted };
                }
            }
            _ => {}
        }
    }
}

impl Default for ClientGroup {
    fn default() -> Self {
        Self::new()
    }
}

impl<const PEERS: usize> Handling<'_, '_, PEERS> {
    /// One of the messages about groups, or another one that is not in the catalogue.
    #[inline(never)]
    pub(super) fn group_message<'e>(&mut self, body: Body<'_>) -> ClientStep<'e> {
        let Some(group) = self.group.as_deref_mut() else { return ClientStep::Io };
        match body.code() {
            Invite::CODE => {
                let Ok(invite) = Invite::decode(body) else { return ClientStep::Io };
                let own = self.peers.iter().any(|peer| peer.conversation.sid == invite.sid);
                let creator = self.peers.iter().find(|peer| peer.invites && peer.member.id == invite.creator);
                if let (Some(creator), false) = (creator, own) {
                    group.consider(&invite, self.member, self.key_epoch, &creator.member);
                }
            }
            MemberChanged::CODE => {
                if let Ok(changed) = MemberChanged::decode(body) {
                    group.changed(&changed);
                }
            }
            Closed::CODE if group.stage != Stage::Vacant => {
                let sid = group.conversation.sid;
                if Closed::decode(body).is_ok_and(|closed| closed.sid == sid) {
                    group.leave();
                    return ClientStep::Event(ClientEvent::GroupOver);
                }
            }
            ToldBy::CODE => {
                if let Ok(told) = ToldBy::decode(body) {
                    return self.group_told(Some(&told.from), told.receipt);
                }
            }
            _ => {}
        }
        ClientStep::Io
    }

    /// What became of what this client said in its group: of all recipients, or of one.
    pub(super) fn group_told<'e>(&mut self, from: Option<&[u8; ID_LEN]>, receipt: Receipt) -> ClientStep<'e> {
        let Some(group) = self.group.as_deref_mut() else { return ClientStep::Io };
        if !group.is_member() || receipt.chain != *group.chains.chain_id() {
            return ClientStep::Io;
        }
        let theirs = matches!(receipt.rung, Rung::Delivered | Rung::Opened) || receipt.tag.is_some();
        if theirs {
            // As in a direct conversation: his word, or nothing at all.
            let salt = group.sent.iter().find(|(number, _)| *number == receipt.to.saturating_add(1));
            let verified = match (from.filter(|from| group.place(from).is_some()), salt) {
                (Some(from), Some((_, salt))) => group.chains.verify_receipt(from, &receipt, salt).is_ok(),
                _ => false,
            };
            if !verified {
                return ClientStep::Io;
            }
        }
        match (receipt.rung, receipt.reason) {
            (Rung::Refused, Some(reason)) if ends_chain(reason) => {
                // While others are still being given the chain, one who refuses it must not keep them from it: he could do
                // so each time.
                if let (Speech::Wanted, Some(from)) = (group.speech, from)
                    && let Some(other) = group.others.iter_mut().find(|other| other.member.id == *from)
                {
                    other.own_chain = OwnChain::Failed;
                    return ClientStep::Event(ClientEvent::GroupMemberLost { member: *from, reason });
                }
                group.end_chain();
                ClientStep::Event(ClientEvent::GroupLost(reason))
            }
            _ => ClientStep::Event(ClientEvent::GroupReceipt { from: from.copied(), receipt }),
        }
    }

    /// Whose chain in the group has this name.
    pub(super) fn place_in_group(&self, chain_id: &[u8; 8]) -> Option<usize> {
        self.group.as_ref()?.chains.place_of(chain_id)
    }

    /// As [`Handling::deliver`], of the chain of the member in this place.
    #[inline(never)]
    pub(super) fn deliver_in_group<'e, A: Aead>(
        &mut self,
        place: usize,
        header: &EnvelopeHeader,
        wanted: Rungs,
        payload: &'e mut [u8],
        out: &mut Outbox<'_, A>,
    ) -> Result<ClientStep<'e>, Error> {
        let Some(group) = self.group.as_deref_mut() else { return Ok(ClientStep::Io) };
        let (me, salt) = (&self.member.id, &header.salt);
        let opened = group.chains.open::<A>(payload.get_mut(SEND_HEAD_LEN..).unwrap_or_default());
        let step = match opened {
            Ok((_, opened)) => {
                let from = group.heard(place);
                let (n, kind, body) = (opened.n, opened.kind, opened.body);
                ClientStep::Event(ClientEvent::GroupMessage { from, n, kind, body })
            }
            // Its receipts were lost, or are on their way: the application has the message in either case.
            Err(OpenError::Duplicate { .. }) => ClientStep::Io,
            // What it was, nobody here remembers: see `Handling::deliver`.
            Err(OpenError::Old { n, .. }) => {
                out.send(&Message::Tell(refusal(header.chain_id, n, Reason::Rewound)))?;
                return Ok(ClientStep::Io);
            }
            Err(OpenError::Refused(reason)) => {
                if let Some(receipt) = group.chains.refusal(place, me, reason, header.n, salt) {
                    out.send(&Message::Tell(receipt))?;
                }
                return Ok(ClientStep::Io);
            }
        };
        if let (true, Some(receipt)) =
            (wanted.contains(Rung::Delivered), group.chains.receipt(place, me, Rung::Delivered, header.n, salt))
        {
            out.send(&Message::Tell(receipt))?;
        }
        if wanted.contains(Rung::Opened) {
            *self.opened = group.chains.receipt(place, me, Rung::Opened, header.n, salt);
        }
        Ok(step)
    }

    /// Whether this answers what was asked about a member.
    pub(super) fn is_asked_of_group(&self, request: u16) -> bool {
        self.group.as_ref().is_some_and(|group| group.asked.is_some_and(|(_, asked)| asked == request))
    }

    /// A member was looked up.
    #[inline(never)]
    pub(super) fn member_looked_up<'e, A: Aead, R: TryCryptoRng + ?Sized>(
        &mut self,
        entry: &DirectoryEntry<'e>,
        verdict: Verdict,
        out: &mut Outbox<'_, A>,
        rng: &mut R,
    ) -> Result<ClientStep<'e>, Error> {
        let Some(group) = self.group.as_deref_mut() else { return Ok(ClientStep::Io) };
        let Some((place, _)) = group.asked else { return Ok(ClientStep::Io) };
        let (Some(other), Some(signed)) = (group.others.get_mut(place), &entry.bundle) else {
            return self.member_failed(Reason::Unknown);
        };
        let Ok(bundle) = Bundle::decode(signed.bundle) else {
            return self.member_failed(Reason::Malformed);
        };
        let member = other.member;
        let view = match self.peers.iter_mut().find(|peer| peer.member == member) {
            Some(peer) => &mut peer.view,
            None => &mut other.view,
        };
        match check(view, &member, &bundle, verdict) {
            Check::Verify => {
                // Longer ones are not verified by devices. Whatever is shown here, the list says which key it must be.
                let key = entry.modulus.filter(|modulus| modulus.len() <= MAX_MODULUS_LEN);
                let key = key.and_then(|modulus| PublicKey::from_modulus(modulus).ok());
                let Some(key) = key.filter(|key| key.fingerprint() == member.key) else {
                    return self.member_failed(Reason::KeyChanged);
                };
                *self.verifying = Verifying::Peer;
                let statement = bundle.statement();
                return Ok(ClientStep::Verify { key, statement, signature: signed.signature });
            }
            Check::Refuse(reason) => return self.member_failed(reason),
            Check::Good => {}
        }
        other.renewed = false;
        group.asked = None;
        match (group.stage, other.standing) {
            (Stage::Checking, _) => {
                other.standing = Standing::Counted;
                group.version = group.version.and_then(|sum| sum.checked_add(entry.key_epoch));
                if place != group.creator {
                } else if group.is_founded(self.member, &bundle) {
                    group.found();
                } else {
                    group.leave();
                }
            }
            (Stage::Member, Standing::Undecided) => {
                let accepted = Decision::Accept.verify(&bundle, &group.conversation, &other.decision).is_ok();
                other.standing = if accepted { Standing::Accepted } else { Standing::Counted };
                other.own_chain = OwnChain::Due;
                if accepted && group.speech == Speech::Ready {
                    group.speech = Speech::Wanted;
                }
            }
            (Stage::Member, Standing::Accepted)
                if group.speech == Speech::Wanted && other.own_chain == OwnChain::Due =>
            {
                return self.wrap_to_member(place, &bundle, out, rng);
            }
            _ => {}
        }
        Ok(ClientStep::Io)
    }

    /// Wraps the own chain to a member, from its present number on.
    #[inline(never)]
    fn wrap_to_member<'e, A: Aead, R: TryCryptoRng + ?Sized>(
        &mut self,
        place: usize,
        bundle: &Bundle,
        out: &mut Outbox<'_, A>,
        rng: &mut R,
    ) -> Result<ClientStep<'e>, Error> {
        let (Some(group), Some(own)) = (self.group.as_deref_mut(), self.own.as_ref()) else {
            return Ok(ClientStep::Io);
        };
        if !group.begun {
            group.chains.start(self.member, &group.conversation, rng)?;
            group.begun = true;
        }
        let mut wrap = [0; WRAP_LEN];
        let to = bundle.member();
        let keys = (&own.keys, &own.bundle);
        let request = next(self.request);
        group.asked = Some((place, request));
        if group.chains.wrap(&group.conversation, keys, (&to, bundle), rng, &mut wrap).is_err() {
            return self.member_failed(Reason::Malformed);
        }
        let own_bundle = own.bundle.encode();
        let bundle = SignedBundle { bundle: &own_bundle, signature: self.signature };
        out.send(&Message::Wrap { request, to: to.id, wrap: &wrap, bundle })?;
        Ok(ClientStep::Io)
    }

    /// There is no way to a member, or not now.
    #[inline(never)]
    pub(super) fn member_failed<'e>(&mut self, reason: Reason) -> Result<ClientStep<'e>, Error> {
        let Some(group) = self.group.as_deref_mut() else { return Ok(ClientStep::Io) };
        // What may pass is tried again over the next connection, at which an invitation comes again.
        if matches!(reason, Reason::Rate | Reason::Unavailable) {
            return Err(PeerError::Refused { reason, retry_after: 0 }.into());
        }
        let place = group.asked.take().map_or(OTHERS, |(place, _)| place);
        if group.stage == Stage::Checking {
            group.leave();
            return Ok(ClientStep::Io);
        }
        // Another client's chain has this name: the next one has another.
        if reason == Reason::NameInUse {
            group.end_chain();
            return Ok(ClientStep::Event(ClientEvent::GroupLost(reason)));
        }
        let Some(other) = group.others.get_mut(place) else { return Ok(ClientStep::Io) };
        other.renewed = false;
        if other.standing == Standing::Undecided {
            other.standing = Standing::Counted;
        }
        other.own_chain = OwnChain::Failed;
        Ok(ClientStep::Event(ClientEvent::GroupMemberLost { member: other.member.id, reason }))
    }

    /// A request that has nothing to tell was done. True if the group was joined by it.
    pub(super) fn group_done(&mut self, request: u16) -> bool {
        let Some(group) = self.group.as_deref_mut() else { return false };
        if group.stage == Stage::Answered(request) {
            group.stage = Stage::Member;
            return true;
        }
        if let Some((place, asked)) = group.asked
            && asked == request
        {
            group.asked = None;
            // Unless it has refused it meanwhile.
            if let Some(other) = group.others.get_mut(place)
                && other.own_chain == OwnChain::Due
            {
                other.own_chain = OwnChain::Wrapped;
            }
        }
        false
    }

    /// The server refuses something about the group, if it was asked that.
    pub(super) fn group_refused<'e>(&mut self, request: u16, reason: Reason) -> Option<Result<ClientStep<'e>, Error>> {
        if self.is_asked_of_group(request) {
            return Some(self.member_failed(reason));
        }
        let group = self.group.as_deref_mut()?;
        if group.stage != Stage::Answered(request) {
            return None;
        }
        if matches!(reason, Reason::Rate | Reason::Unavailable) {
            return Some(Err(PeerError::Refused { reason, retry_after: 0 }.into()));
        }
        group.leave();
        Some(Ok(ClientStep::Event(ClientEvent::GroupOver)))
    }
}
