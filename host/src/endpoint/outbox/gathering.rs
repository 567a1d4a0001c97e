//! All that goes to one group: the letters in their order, the chains that its members have together, and what the server
//! and each member say of them.
//!
//! ```text
//!   queue --looked up, wrapped to each who accepted, sealed once--> joint chain --each has it or refuses it--> gone
//!                                                                      |
//!                                   one member refuses, and that can be cured: a letter of his own, in a
//!                                   correspondence with him alone; nobody else sees or waits for it
//! ```
//!
//! A letter waits for those who had its chain when it was sealed. Who accepts later gets a wrap of the present chain from its
//! present number on. The chain ends with the keys that it is bound to, when somebody on it is no longer in, after 7 days or
//! 65,536 messages, with this process, and after a refusal that a new one can cure, unless too many were begun lately.

use core::mem;
use core::time::Duration;
use std::collections::{BTreeMap, HashMap, HashSet};

use getrandom::SysRng;
use ossicle_core::{
    Bundle, Conversation, DirectoryEntry, Lookup, MAX_RECORD_LEN, Message, PeerStatus, RECORD_OVERHEAD, Reason,
    Receipt, Rung, SIGNED_OVERHEAD, SendingChain, SignedBundle, Subject, WRAP_LEN,
};
use tokio::time::Instant;

use super::UNHEARD_OF;
use super::chain::{Announced, Chain, Live, remember};
use super::correspondence::{CHAIN_AGE, LULL, MAX_TRIES, RATE_PAUSE, Starts, WINDOW, millis};
use super::ledger::{Ledger, Word};
use super::letter::{Letter, Parent, Part, passes};
use crate::endpoint::agent::{Desk, Ended, Pending};
use crate::endpoint::groups::present;
use crate::endpoint::local::Reply;
use crate::endpoint::peers::{Rejected, admit, check_bundle};
use crate::endpoint::{Failure, MESSAGE_HEAD_LEN, new_letter, now};
use crate::store::home::groups::{Membership, Standing};
use crate::store::home::{HomeStoreError, LetterChain, LetterChange, Peer};

type Id = [u8; 16];

/// How long members may take to confirm what is stored before it is asked whether they are there.
const WONDER: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Gathering {
    sid: Id,
    /// What the group is called here.
    pub(super) label: String,
    /// Whether who is in it, or a key of theirs, may have changed since it was last read.
    pub(super) stale: bool,
    /// Where this client stands in it.
    standing: Option<Standing>,
    /// The group under the keys that its members have now.
    talk: Option<Conversation>,
    /// Everybody else who accepted, by id, with his name.
    accepted: BTreeMap<Id, String>,
    /// Names of others who are or were in it.
    names: HashMap<Id, String>,
    /// The newest last.
    pub(super) chains: Vec<Joint>,
    /// Letters to be sealed, in the order in which they were given.
    pub(super) queue: BTreeMap<i64, Letter>,
    /// Letters of which those who do not have them get one of their own, each.
    pub(super) apart: BTreeMap<i64, Letter>,
    /// Letters of their own, for the correspondences with those members.
    own: Vec<(String, Letter)>,
    /// Whom the directory was asked for, and what it said.
    looks: BTreeMap<Id, Look>,
    /// Nothing is sent before; nothing unless somebody gives a new letter.
    hold: Option<Instant>,
    pub(super) lull: Option<Instant>,
    /// When letters that the server had are sent again that nobody has spoken of since.
    pub(super) doubt: Option<Instant>,
    doubts: bool,
    /// When it is asked where those are who have not confirmed what is stored; and who was asked about.
    wonder: Option<Instant>,
    asked: BTreeMap<Id, Option<Place>>,
    /// How many chains may still be started, and when the next one may be that is wanted.
    starts: Starts,
    next_start: Option<Instant>,
}

/// A chain that members have together.
pub(super) struct Joint {
    pub(super) chain: Chain,
    /// What it is bound to, if this process has begun it.
    talk: Option<Conversation>,
    /// Whether a member needs a new one.
    tired: bool,
    ears: BTreeMap<Id, Ear>,
}

/// A member who has a chain, or was to get it.
struct Ear {
    wrap: Vec<u8>,
    /// Whether the store has that.
    kept: bool,
    announced: Announced,
    /// Why he does not get it, and since when.
    refused: Option<(Reason, Option<String>, Instant)>,
    /// Bytes of the longest body that he takes.
    max_body: usize,
}

/// Where a member is: the longest record that he took when he was last here, and, if he is not, when that was.
struct Place {
    record_limit: u16,
    away: Option<Option<u64>>,
}

/// What the directory says of a member.
enum Look {
    Asked,
    Found(Box<(Peer, Bundle)>, u16),
    Failed(Reason, Option<String>),
}

impl Joint {
    /// As a former process left it.
    pub(super) fn kept(parts: LetterChain, wraps: Vec<(Id, Vec<u8>)>) -> Self {
        let ear = |wrap| Ear { wrap, kept: true, announced: Announced::No, refused: None, max_body: 0 };
        let ears = wraps.into_iter().map(|(member, wrap)| (member, ear(wrap))).collect();
        Self { chain: Chain::new(parts, true, None), talk: None, tired: false, ears }
    }

    /// Those who need it before anything goes on, and have not got it over this connection. `next` is whether anything is to
    /// be sealed with it; of what was sealed, no more is looked at than is sent at a time.
    fn waiting(&self, next: bool) -> Vec<Id> {
        let lacks = |(_, ear): &(&Id, &Ear)| ear.announced != Announced::Yes && ear.refused.is_none();
        let mut lacking: Vec<Id> = self.ears.iter().filter(lacks).map(|(member, _)| *member).collect();
        let is_for_all = next && self.chain.is_current();
        if !lacking.is_empty() && !is_for_all {
            let unsent = self.chain.unsent.values().take(WINDOW);
            let needed: HashSet<&Id> = unsent.flat_map(Letter::pending).collect();
            lacking.retain(|member| needed.contains(member));
        }
        lacking
    }

    fn is_announced(&self, next: bool) -> bool {
        self.waiting(next).is_empty()
    }

    fn letters(&mut self) -> impl Iterator<Item = (&u32, &mut Letter)> {
        let Chain { unsent, under_way, resting, .. } = &mut self.chain;
        unsent.iter_mut().chain(under_way).chain(resting)
    }

    fn letter(&mut self, n: u32) -> Option<&mut Letter> {
        let Chain { unsent, under_way, resting, .. } = &mut self.chain;
        [unsent, under_way, resting].into_iter().find_map(|place| place.get_mut(&n))
    }
}

const fn curable(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Rekey | Reason::Unknown | Reason::Gap | Reason::Rewound | Reason::Unreadable | Reason::NameInUse
    )
}

impl Gathering {
    pub(super) fn new(sid: Id, label: String) -> Self {
        Self {
            sid,
            label,
            stale: true,
            standing: None,
            talk: None,
            accepted: BTreeMap::new(),
            names: HashMap::new(),
            chains: Vec::new(),
            queue: BTreeMap::new(),
            apart: BTreeMap::new(),
            own: Vec::new(),
            looks: BTreeMap::new(),
            hold: None,
            lull: None,
            doubt: None,
            doubts: false,
            wonder: None,
            asked: BTreeMap::new(),
            starts: Starts::new(Instant::now()),
            next_start: None,
        }
    }

    /// The times before which it may not go on.
    pub(super) fn held_until(&self) -> impl Iterator<Item = Instant> {
        [self.hold, self.lull, self.next_start, self.doubt, self.wonder].into_iter().flatten()
    }

    /// All letters that are not settled.
    pub(super) fn letters(&self) -> impl Iterator<Item = &Letter> {
        let sealed = self.chains.iter().flat_map(|joint| joint.chain.letters());
        self.queue.values().chain(self.apart.values()).chain(sealed)
    }

    /// The letter in this row.
    pub(super) fn letter(&mut self, row: i64) -> Option<&mut Letter> {
        let sealed = self.chains.iter_mut().flat_map(Joint::letters).map(|(_, letter)| letter);
        let mut all = self.queue.values_mut().chain(self.apart.values_mut()).chain(sealed);
        all.find(|letter| letter.row == row)
    }

    /// Somebody waits for this letter again, and is told how it stands with everybody.
    pub(super) fn report(&self, letter: &Letter) {
        for (member, part) in &letter.parts {
            let name = self.name(member);
            match (part.kept.reached, part.kept.refused) {
                (_, Some(reason)) => letter.tell(Reply::RefusedBy { name, reason, detail: None }),
                (Some(rung), _) if rung >= Rung::Delivered => letter.tell(Reply::By { name, rung }),
                _ => {}
            }
        }
    }

    fn name(&self, member: &Id) -> String {
        let known = self.accepted.get(member).or_else(|| self.names.get(member));
        known.cloned().unwrap_or_else(|| uuid::Uuid::from_bytes(*member).to_string())
    }

    /// The connection has gone.
    pub(super) fn disconnected(&mut self) {
        self.looks.clear();
        self.asked.clear();
        (self.doubt, self.doubts, self.wonder) = (None, false, None);
        for joint in &mut self.chains {
            for ear in joint.ears.values_mut() {
                ear.announced = Announced::No;
            }
            joint.chain.rest_again();
            for (_, letter) in joint.letters() {
                letter.answered = false;
                for part in letter.parts.values_mut() {
                    part.answered = false;
                }
            }
            let Chain { unsent, under_way, .. } = &mut joint.chain;
            unsent.append(under_way);
        }
    }

    /// Nobody knows whether the server has what it said to have stored.
    pub(super) fn unstored(&mut self, ledger: &mut Ledger) {
        for joint in &mut self.chains {
            for ear in joint.ears.values_mut() {
                ear.announced = Announced::No;
            }
            let Chain { resting, unsent, .. } = &mut joint.chain;
            for (n, mut letter) in resting.extract_if(.., |_, letter| letter.reached == Some(Rung::Stored)) {
                letter.reached = None;
                ledger.changes.push(LetterChange::Reach(letter.row, None));
                unsent.insert(n, letter);
            }
        }
    }

    /// This client has another key: what was under way is sealed anew, for those who do not have it.
    pub(super) fn restart(&mut self, ledger: &mut Ledger) {
        self.stale = true;
        for mut joint in mem::take(&mut self.chains) {
            joint.chain.live = None;
            joint.chain.rest_again();
            let Chain { unsent, under_way, .. } = &mut joint.chain;
            unsent.append(under_way);
            for letter in mem::take(unsent).into_values() {
                self.anew(ledger, letter);
            }
            self.chains.push(joint);
        }
        self.retire(ledger);
    }

    /// A letter is sealed anew: for all, or, if somebody has it, for the others, each by himself.
    fn anew(&mut self, ledger: &mut Ledger, mut letter: Letter) {
        (letter.reached, letter.answered, letter.away) = (None, false, false);
        ledger.changes.push(LetterChange::Unseal { row: letter.row, tries: letter.tries });
        let has = |part: &Part| part.kept.own || part.kept.reached.is_some();
        if letter.parts.values().any(has) {
            self.apart.insert(letter.row, letter);
        } else {
            letter.parts.clear();
            ledger.changes.push(LetterChange::Whole(letter.row));
            self.queue.insert(letter.row, letter);
        }
    }

    /// This member has another key, which the former one signed. What was sent meanwhile may have reached nobody under it: it
    /// is sent again, and he says so.
    pub(super) fn followed(&mut self, member: &Id) {
        self.stale = true;
        self.looks.remove(member);
        for joint in &mut self.chains {
            let Some(ear) = joint.ears.get_mut(member) else { continue };
            ear.announced = Announced::No;
            let Chain { unsent, under_way, resting, .. } = &mut joint.chain;
            for place in [under_way, resting] {
                let is_lost = |_: &u32, letter: &mut Letter| letter.pending().any(|pending| pending == member);
                unsent.extend(place.extract_if(.., is_lost));
            }
        }
    }

    /// A person has accepted another key of this member. What was sealed for the former one is not sealed for the new one by
    /// itself.
    pub(super) fn rekeyed(&mut self, ledger: &mut Ledger, member: &Id) {
        self.stale = true;
        let detail = "it went to the former key: send it again if it is meant for the new one";
        self.give_up(ledger, member, Reason::KeyChanged, Some(detail));
    }

    /// Nothing more is expected of this member.
    fn give_up(&mut self, ledger: &mut Ledger, member: &Id, reason: Reason, detail: Option<&str>) {
        for place in 0..self.chains.len() {
            let waits = |(n, letter): (&u32, &mut Letter)| letter.pending().any(|id| id == member).then_some(*n);
            let waiting: Vec<u32> =
                self.chains.get_mut(place).into_iter().flat_map(Joint::letters).filter_map(waits).collect();
            for n in waiting {
                self.refuse(ledger, place, n, member, reason, detail);
            }
        }
    }

    /// Letters that are too old, or that only somebody's curiosity keeps.
    pub(super) fn expire(&mut self, ledger: &mut Ledger, is_old: impl Fn(&Letter) -> bool, curious: u64) {
        let is_over = |letter: &Letter| is_old(letter) || (letter.is_finished() && letter.time < curious);
        let mut over: Vec<Letter> = Vec::new();
        for place in [&mut self.queue, &mut self.apart] {
            over.extend(place.extract_if(.., |_, letter| is_over(letter)).map(|(_, letter)| letter));
        }
        for Chain { unsent, under_way, resting, salts, .. } in self.chains.iter_mut().map(|joint| &mut joint.chain) {
            for place in [unsent, under_way, resting] {
                for (n, letter) in place.extract_if(.., |_, letter| is_over(letter)) {
                    remember(salts, n, letter.salt);
                    over.push(letter);
                }
            }
        }
        for letter in over {
            match letter.is_finished() {
                true => ledger.erase(&letter, letter.remembered()),
                false => self.end(ledger, letter, Reason::Expired, None),
            }
        }
    }

    /// The letters that are over go with what is known of chains that nothing is expected of.
    pub(super) fn retire(&mut self, ledger: &mut Ledger) {
        for live in self.chains.iter_mut().filter_map(|joint| joint.chain.live.as_mut()) {
            live.current &= live.begun.elapsed() < CHAIN_AGE;
        }
        let is_over = |joint: &mut Joint| !joint.chain.is_current() && joint.chain.is_idle();
        for joint in self.chains.extract_if(.., is_over) {
            if joint.chain.kept {
                ledger.changes.push(LetterChange::Forget(*joint.chain.id()));
            }
        }
    }

    /// Nothing is lost from here on.
    pub(super) fn keep(&mut self, ledger: &mut Ledger) {
        for letter in self.queue.values_mut() {
            ledger.keep(&self.label, letter);
        }
    }

    /// Letters for members alone, with the key of the correspondence that each belongs to.
    pub(super) fn take_own(&mut self) -> Vec<(String, Letter)> {
        mem::take(&mut self.own)
    }

    /// Reads who is in the group, and under which keys. Whether it is another conversation than before.
    pub(super) fn refresh(&mut self, desk: &Desk<'_>, ledger: &mut Ledger) -> Result<bool, Ended> {
        if !mem::take(&mut self.stale) {
            return Ok(false);
        }
        let group = desk.store.group(&self.sid)?;
        let talk = group.as_ref().map(|group| present(desk, group)).transpose()?.flatten();
        let changed = mem::replace(&mut self.talk, talk) != talk;
        self.standing = group.as_ref().map(|group| group.standing);
        let former = mem::take(&mut self.accepted);
        self.names.extend(former);
        let mut revoked = Vec::new();
        for other in group.iter().flat_map(|group| group.others(&desk.me.id)) {
            let Some(peer) = desk.store.peer(&other.member.id)? else { continue };
            match other.membership {
                Membership::Accepted => drop(self.accepted.insert(peer.id, peer.name)),
                Membership::Revoked => {
                    revoked.push(peer.id);
                    self.names.insert(peer.id, peer.name);
                }
                _ => drop(self.names.insert(peer.id, peer.name)),
            }
        }
        for joint in &mut self.chains {
            let is_in = |(id, ear): (&Id, &Ear)| ear.refused.is_some() || self.accepted.contains_key(id);
            if joint.talk != talk || !joint.ears.iter().all(is_in) {
                joint.chain.end();
            }
        }
        if self.standing.is_none_or(|standing| matches!(standing, Standing::Closed)) {
            self.close(ledger);
        }
        for member in revoked {
            self.give_up(ledger, &member, Reason::Unknown, None);
        }
        Ok(changed)
    }

    pub(super) fn is_over(&self) -> bool {
        self.standing.is_none_or(|standing| standing == Standing::Closed)
    }

    /// The group is over: what was not delivered never will be.
    fn close(&mut self, ledger: &mut Ledger) {
        let mut letters: Vec<Letter> = mem::take(&mut self.queue).into_values().collect();
        letters.extend(mem::take(&mut self.apart).into_values());
        for joint in &mut self.chains {
            joint.chain.end();
            letters.extend(joint.chain.take_letters());
        }
        let detail = format!("{} is closed", self.label);
        for letter in letters {
            self.end(ledger, letter, Reason::Closed, Some(&detail));
        }
        self.looks.clear();
        self.retire(ledger);
    }

    /// A letter goes no further, with nobody whom it has not reached.
    fn end(&self, ledger: &mut Ledger, mut letter: Letter, reason: Reason, detail: Option<&str>) {
        if letter.parts.is_empty() {
            ledger.settle(&self.label, letter, Err(reason), detail.map(str::to_owned));
            return;
        }
        for member in letter.parts.keys().copied().collect::<Vec<_>>() {
            if !letter.is_finished_with(&member) {
                note_refusal(self.name(&member), ledger, &mut letter, &member, reason, detail);
            }
        }
        self.settle(ledger, letter);
    }

    /// A letter is done with, with everybody.
    fn settle(&self, ledger: &mut Ledger, mut letter: Letter) {
        let outcome = letter.outcome();
        if letter.is_attended() {
            letter.tell(Reply::Done);
        } else {
            let refused: Vec<(Id, Reason)> =
                letter.parts.iter().filter_map(|(member, part)| Some((*member, part.kept.refused?))).collect();
            if refused.len() < letter.parts.len() {
                ledger.announce(&self.label, &mut letter, outcome);
            }
            for (member, reason) in refused {
                let who = format!("{} in {}", self.name(&member), self.label);
                ledger.announce(&who, &mut letter, Err(reason));
            }
        }
        ledger.erase(&letter, letter.remembered());
    }

    /// This member does not get a letter.
    fn refuse(&mut self, ledger: &mut Ledger, place: usize, n: u32, member: &Id, reason: Reason, detail: Option<&str>) {
        let name = self.name(member);
        if let Some(letter) = self.chains.get_mut(place).and_then(|joint| joint.letter(n)) {
            note_refusal(name, ledger, letter, member, reason, detail);
        }
        self.tidy(ledger, place, n);
    }

    /// Something is known of a letter that was not before: it may be done with, or have nobody who waits for it on its chain.
    fn tidy(&mut self, ledger: &mut Ledger, place: usize, n: u32) {
        let Some(joint) = self.chains.get_mut(place) else { return };
        if let Some(letter) = joint.chain.take(n, Letter::is_finished) {
            remember(&mut joint.chain.salts, n, letter.salt);
            return self.settle(ledger, letter);
        }
        if let Some(letter) = joint.chain.take(n, |letter| letter.pending().next().is_none()) {
            joint.chain.resting.insert(n, letter);
        }
    }

    pub(super) fn pump(&mut self, desk: &mut Desk<'_>, ledger: &mut Ledger, informed: bool) -> Result<(), Ended> {
        self.retire(ledger);
        let mut apart = mem::take(&mut self.apart);
        for letter in apart.values_mut() {
            for member in letter.pending().copied().collect::<Vec<_>>() {
                self.own.extend(write_alone(self.sid, desk, ledger, letter, &member)?);
            }
        }
        self.apart = apart;
        let done = self.send(desk, ledger, informed);
        self.keep(ledger);
        done
    }

    fn send(&mut self, desk: &mut Desk<'_>, ledger: &mut Ledger, informed: bool) -> Result<(), Ended> {
        self.doubts |= self.doubt.take_if(|until| *until <= Instant::now()).is_some();
        self.hold.take_if(|until| *until <= Instant::now());
        self.lull.take_if(|until| *until <= Instant::now());
        if self.hold.is_some() || self.lull.is_some() {
            return Ok(());
        }
        let next = !self.queue.is_empty() && informed;
        if next {
            self.prepare(desk, ledger)?;
        }
        self.announce(desk, next)?;
        let mut under_way: usize = self.chains.iter().map(|joint| joint.chain.under_way.len()).sum();
        for joint in self.chains.iter_mut().filter(|joint| joint.is_announced(false)) {
            while under_way < WINDOW
                && let Some((n, letter)) = joint.chain.unsent.pop_first()
            {
                let envelope = desk.store.letter_envelope(letter.row)?;
                desk.link.send(&Message::Send { wanted: letter.wanted(), envelope: &envelope })?;
                joint.chain.under_way.insert(n, letter);
                under_way += 1;
            }
        }
        let is_first = |joint: &Joint| {
            let Chain { unsent, under_way, .. } = &joint.chain;
            unsent.is_empty() && (joint.chain.is_current() || under_way.values().all(|letter| letter.answered))
        };
        if next && self.chains.iter().all(is_first) && self.looks.is_empty() {
            while under_way < WINDOW && self.seal_next(desk, ledger)? {
                under_way += 1;
            }
            // A chain that is used up is followed by the next one.
            if under_way < WINDOW && !self.queue.is_empty() {
                self.prepare(desk, ledger)?;
            }
        }
        Ok(())
    }

    /// Sees that everybody who accepted has the present chain, or gets it, or a new one.
    fn prepare(&mut self, desk: &mut Desk<'_>, ledger: &mut Ledger) -> Result<(), Ended> {
        self.next_start = None;
        match self.standing {
            Some(Standing::Accepted) => {}
            // The server has not answered yet.
            Some(Standing::Founding | Standing::Accepting | Standing::Closing) => return Ok(()),
            _ => {
                let detail = format!("this client is not in {0}: accept the invitation first", self.label);
                self.refuse_queue(ledger, Reason::NotMember, Some(&detail));
                return Ok(());
            }
        }
        if self.accepted.is_empty() {
            let detail = format!(
                "nobody has joined {} yet, as far as this home has heard: stay in `ossicle chat` or `ossicle listen` until \
                 somebody has",
                self.label
            );
            self.refuse_queue(ledger, Reason::NotMember, Some(&detail));
            return Ok(());
        }
        if self.looks.values().any(|look| matches!(look, Look::Asked)) {
            return Ok(());
        }
        let may_begin = self.starts.wait(Instant::now());
        let mut present = self.chains.last_mut().filter(|joint| joint.chain.is_current());
        if let Some(joint) = &mut present {
            if joint.tired && may_begin.is_none() {
                joint.chain.end();
                present = None;
            } else {
                // Who could not be reached is tried again after a while.
                joint.ears.retain(|_, ear| ear.refused.as_ref().is_none_or(|(_, _, at)| at.elapsed() < LULL));
            }
        }
        let is_new = present.is_none();
        let lacks = |id: &&Id| present.as_ref().is_none_or(|joint| !joint.ears.contains_key(*id));
        let missing: Vec<Id> = self.accepted.keys().filter(lacks).copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        if is_new && let Some(until) = may_begin {
            self.next_start = Some(until);
            return Ok(());
        }
        let sid = self.sid;
        let mut is_asked = false;
        for member in &missing {
            if !self.looks.contains_key(member) {
                let request = desk.requests.open(Pending::Recipients { sid, member: *member });
                let subject = Subject::Id(*member);
                desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
                self.looks.insert(*member, Look::Asked);
                is_asked = true;
            }
        }
        if !is_asked { self.wrap(desk, ledger, is_new) } else { Ok(()) }
    }

    /// The directory has answered for everybody: whom it knows gets the chain.
    fn wrap(&mut self, desk: &mut Desk<'_>, ledger: &mut Ledger, is_new: bool) -> Result<(), Ended> {
        let may_pass = |look: &Look| matches!(look, Look::Failed(Reason::Rate | Reason::Unavailable, _));
        if self.looks.values().any(may_pass) {
            self.looks.retain(|_, look| !may_pass(look));
            self.hold = Some(Instant::now() + RATE_PAUSE);
            return Ok(());
        }
        let looks = mem::take(&mut self.looks);
        if is_new {
            let Some(talk) = self.talk else { return Ok(()) };
            let epoch = desk.store.next_chain_epoch(&self.sid)?;
            let sealing = SendingChain::start(desk.me, &talk, epoch, &mut SysRng)
                .map_err(|error| Failure::refused(format!("no chain can be started: {error}")))?;
            let parts = LetterChain {
                sid: Some(self.sid),
                peer: self.sid,
                receipts: sealing.receipts().clone(),
                wrap: Vec::new(),
                bundle: desk.own.bundle.encode().to_vec(),
                signature: desk.own.signature.clone(),
            };
            let live = Live { sealing, counted: false, current: true, heard: false, begun: Instant::now() };
            let chain = Chain::new(parts, false, Some(live));
            self.chains.push(Joint { chain, talk: Some(talk), tired: false, ears: BTreeMap::new() });
        }
        let Some(joint) = self.chains.last_mut() else { return Ok(()) };
        let Some(live) = &joint.chain.live else { return Ok(()) };
        for (member, look) in looks.into_iter().filter(|(member, _)| self.accepted.contains_key(member)) {
            let since = Instant::now();
            let deaf = |reason, detail| Ear {
                wrap: Vec::new(),
                kept: true,
                announced: Announced::No,
                refused: Some((reason, detail, since)),
                max_body: 0,
            };
            let ear = match look {
                Look::Asked => continue,
                Look::Failed(reason, detail) => deaf(reason, detail),
                Look::Found(found, record_limit) => {
                    let (peer, bundle) = *found;
                    let mut wrap = [0; WRAP_LEN];
                    let (own, keys) = (&desk.own.bundle, &desk.own.keys);
                    match live.sealing.wrap(keys, own, &peer.member(), &bundle, &mut SysRng, &mut wrap) {
                        Ok(_) => {
                            let limit = usize::from(record_limit).saturating_sub(RECORD_OVERHEAD);
                            let payload = desk.link.max_payload().min(limit);
                            let max_body = payload.saturating_sub(MESSAGE_HEAD_LEN + SIGNED_OVERHEAD);
                            let announced = Announced::No;
                            Ear { wrap: wrap.to_vec(), kept: false, announced, refused: None, max_body }
                        }
                        Err(error) => deaf(Reason::Unavailable, Some(format!("no chain can be wrapped: {error}"))),
                    }
                }
            };
            joint.ears.insert(member, ear);
        }
        if joint.ears.values().all(|ear| ear.refused.is_some()) {
            // Nobody is left who could have it.
            let refused = mem::take(&mut joint.ears);
            joint.chain.end();
            for letter in mem::take(&mut self.queue).into_values() {
                self.refuse_all(ledger, letter, &refused);
            }
            self.retire(ledger);
            return Ok(());
        }
        self.announce(desk, true)
    }

    /// None of those who are in gets this letter.
    fn refuse_all(&self, ledger: &mut Ledger, mut letter: Letter, refused: &BTreeMap<Id, Ear>) {
        ledger.keep(&self.label, &mut letter);
        for (member, ear) in refused {
            if let Some((reason, detail, _)) = &ear.refused {
                letter.parts.insert(*member, Part::default());
                note_refusal(self.name(member), ledger, &mut letter, member, *reason, detail.as_deref());
            }
        }
        self.settle(ledger, letter);
    }

    /// Gives the server the wraps that are needed and that it was not given over this connection.
    fn announce(&mut self, desk: &mut Desk<'_>, next: bool) -> Result<(), Ended> {
        for joint in &mut self.chains {
            for member in joint.waiting(next) {
                let chain = *joint.chain.id();
                let LetterChain { bundle, signature, .. } = &joint.chain.parts;
                let Some(ear) = joint.ears.get_mut(&member).filter(|ear| ear.announced == Announced::No) else {
                    continue;
                };
                let request = desk.requests.open(Pending::GroupWrap { chain, member });
                let bundle = SignedBundle { bundle, signature };
                desk.link.send(&Message::Wrap { request, to: member, wrap: &ear.wrap, bundle })?;
                ear.announced = Announced::Asked;
            }
        }
        Ok(())
    }

    /// Seals the next letter once for everybody who has the chain. Whether there was one, and the chain has room.
    fn seal_next(&mut self, desk: &Desk<'_>, ledger: &mut Ledger) -> Result<bool, Ended> {
        let Some(joint) = self.chains.last_mut().filter(|joint| joint.chain.is_current() && joint.is_announced(true))
        else {
            return Ok(false);
        };
        let is_everybody = self.accepted.keys().all(|member| joint.ears.contains_key(member));
        if !is_everybody {
            return Ok(false);
        }
        let Some((row, mut letter)) = self.queue.pop_first() else { return Ok(false) };
        let hearing = || joint.ears.iter().filter(|(_, ear)| ear.refused.is_none());
        let small = hearing().find(|(_, ear)| letter.len > ear.max_body).map(|(member, ear)| (*member, ear.max_body));
        if let Some((member, max_body)) = small {
            let detail = format!("{} takes at most {max_body} bytes", self.name(&member));
            ledger.settle(&self.label, letter, Err(Reason::TooLarge), Some(detail));
            return Ok(true);
        }
        letter.parts = hearing().map(|(member, _)| (*member, Part::default())).collect();
        let deaf: Vec<(Id, Reason, Option<String>)> = joint
            .ears
            .iter()
            .filter_map(|(member, ear)| {
                let (reason, detail, _) = ear.refused.clone()?;
                Some((*member, reason, detail))
            })
            .collect();
        if let Some(mut unsealed) = joint.chain.seal(&self.label, desk.store, ledger, letter)? {
            unsealed.parts.clear();
            joint.chain.end();
            self.queue.insert(row, unsealed);
            return Ok(false);
        }
        let chain = *joint.chain.id();
        for (member, ear) in joint.ears.iter_mut().filter(|(_, ear)| !ear.kept) {
            ear.kept = true;
            ledger.changes.push(LetterChange::Wrap { chain, member: *member, wrap: ear.wrap.clone() });
        }
        let place = self.chains.len().saturating_sub(1);
        let Some((n, mut letter)) = self.chains.last_mut().and_then(|joint| joint.chain.under_way.pop_last()) else {
            return Ok(false);
        };
        for (member, part) in &letter.parts {
            ledger.changes.push(LetterChange::Part(letter.row, *member, part.kept));
        }
        for (member, reason, detail) in deaf {
            letter.parts.insert(member, Part::default());
            note_refusal(self.name(&member), ledger, &mut letter, &member, reason, detail.as_deref());
        }
        if let Some(joint) = self.chains.get_mut(place) {
            joint.chain.under_way.insert(n, letter);
        }
        Ok(true)
    }

    /// Nothing can be sealed.
    fn refuse_queue(&mut self, ledger: &mut Ledger, reason: Reason, detail: Option<&str>) {
        for letter in mem::take(&mut self.queue).into_values() {
            ledger.settle(&self.label, letter, Err(reason), detail.map(str::to_owned));
        }
    }

    /// The directory has answered who a member is.
    pub(super) fn found(
        &mut self,
        desk: &mut Desk<'_>,
        member: &Id,
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        let Some(place) = self.looks.get_mut(member) else { return Ok(()) };
        let look = |entry: &DirectoryEntry<'_>| {
            if entry.id != *member {
                return Err(Rejected::For { reason: Reason::Malformed, detail: None });
            }
            let mut peer = admit(desk.store, entry, None)?;
            let Some(signed) = &entry.bundle else {
                let detail = format!("{} was enrolled and never came", peer.name);
                return Err(Rejected::For { reason: Reason::Offline, detail: Some(detail) });
            };
            let bundle = check_bundle(&mut peer, signed)?;
            desk.store.put_peer(&peer)?;
            Ok(Look::Found(Box::new((peer, bundle)), entry.record_limit))
        };
        let found = answer.map_err(|reason| Rejected::For { reason, detail: None }).and_then(|entry| look(&entry));
        *place = match found {
            Ok(look) => look,
            Err(rejected) => {
                let (reason, detail) = rejected.told(desk.alarm)?;
                Look::Failed(reason, detail)
            }
        };
        Ok(())
    }

    /// The server has answered a wrap.
    pub(super) fn wrapped(
        &mut self,
        desk: &Desk<'_>,
        ledger: &mut Ledger,
        (chain_id, member): (&[u8; 8], &Id),
        answer: Result<(), (Reason, Option<u32>)>,
    ) -> Result<(), Ended> {
        let Some(place) = self.chains.iter().position(|joint| joint.chain.is(chain_id)) else { return Ok(()) };
        let Some(joint) = self.chains.get_mut(place) else { return Ok(()) };
        let Some(ear) = joint.ears.get_mut(member) else { return Ok(()) };
        let pause = match answer {
            Ok(()) => {
                ear.announced = Announced::Yes;
                if let Some(live) = &mut joint.chain.live
                    && !mem::replace(&mut live.counted, true)
                {
                    self.starts.count(Instant::now());
                }
                return Ok(());
            }
            Err((Reason::Rate, pause)) => Some(pause.map_or(RATE_PAUSE, millis)),
            Err((Reason::Unavailable, Some(pause))) => Some(millis(pause)),
            Err(_) => None,
        };
        let Err((reason, _)) = answer else { return Ok(()) };
        ear.announced = Announced::No;
        if let Some(pause) = pause {
            self.hold = Some(Instant::now() + pause);
            return Ok(());
        }
        match reason {
            Reason::Closed => self.close(ledger),
            Reason::NameInUse if joint.chain.live.as_ref().is_some_and(|live| live.sealing.next() == 0) => {
                joint.chain.end();
            }
            _ => {
                ear.refused = Some((reason, None, Instant::now()));
                let waits = |(n, letter): (&u32, &mut Letter)| letter.pending().any(|id| id == member).then_some(*n);
                for n in joint.letters().filter_map(waits).collect::<Vec<_>>() {
                    self.hear_refusal(desk, ledger, place, n, (member, reason))?;
                }
            }
        }
        Ok(())
    }

    /// What the server has to say to all of it.
    pub(super) fn told(&mut self, ledger: &mut Ledger, receipt: &Receipt) {
        let Some(place) = self.chains.iter().position(|joint| joint.chain.is(&receipt.chain)) else { return };
        let Some(joint) = self.chains.get_mut(place) else { return };
        // What members have, they say themselves, each with a tag; a reason makes nothing else of that.
        let is_servers = match receipt.rung {
            Rung::Accepted | Rung::Stored => true,
            Rung::Refused => receipt.reason.is_some(),
            _ => false,
        };
        if receipt.tag.is_some() || receipt.from > receipt.to || !is_servers {
            tracing::warn!("a receipt for {} ({}) is nobody's word: ignored", self.label, receipt.rung);
            return;
        }
        let numbers = joint.chain.numbers(receipt);
        if receipt.rung != Rung::Refused {
            for n in numbers {
                if joint.chain.reach(&self.label, ledger, n, receipt.rung) {
                    self.wonder.get_or_insert_with(|| Instant::now() + WONDER);
                }
            }
            return;
        }
        let reason = receipt.reason.unwrap_or(Reason::Unavailable);
        if curable(reason) {
            joint.chain.end();
        }
        let mut refused = Vec::new();
        for n in numbers {
            let Some(mut letter) = joint.chain.take(n, |_| true) else { continue };
            let is_stored = letter.reached == Some(Rung::Stored);
            letter.answered = true;
            if passes(reason) && reason != Reason::Rate && is_stored {
                joint.chain.resting.insert(n, letter);
            } else if reason == Reason::Rate || (passes(reason) && !letter.is_attended()) {
                match reason {
                    Reason::Rate => self.hold = Some(Instant::now() + RATE_PAUSE),
                    _ => self.lull = Some(Instant::now() + LULL),
                }
                letter.answered = false;
                joint.chain.unsent.insert(n, letter);
            } else {
                remember(&mut joint.chain.salts, n, letter.salt);
                refused.push(letter);
            }
        }
        for mut letter in refused {
            if curable(reason) && letter.tries < MAX_TRIES {
                letter.tries += 1;
                self.anew(ledger, letter);
            } else {
                self.end(ledger, letter, reason, None);
            }
        }
    }

    /// What a member, or the server of him, has to say.
    pub(super) fn told_by(
        &mut self,
        desk: &Desk<'_>,
        ledger: &mut Ledger,
        member: &Id,
        receipt: &Receipt,
    ) -> Result<(), Ended> {
        let Some(place) = self.chains.iter().position(|joint| joint.chain.is(&receipt.chain)) else { return Ok(()) };
        let Some(joint) = self.chains.get_mut(place) else { return Ok(()) };
        let salt = joint.chain.salt(receipt.to);
        let word = salt.map(|salt| joint.chain.parts.receipts.verify(member, receipt, &salt));
        let is_theirs = matches!(receipt.rung, Rung::Delivered | Rung::Opened);
        let is_servers = matches!(receipt.rung, Rung::Accepted | Rung::Stored);
        let is_wrong = (is_theirs || receipt.tag.is_some()) && word != Some(Ok(()));
        if is_wrong || is_servers || receipt.from > receipt.to || !joint.ears.contains_key(member) {
            let who = self.name(member);
            tracing::warn!("a receipt for {} ({}) is not the word of {who}: ignored", self.label, receipt.rung);
            return Ok(());
        }
        if let Some(live) = &mut joint.chain.live {
            live.heard |= receipt.tag.is_some();
        }
        let mut numbers = joint.chain.numbers(receipt);
        if receipt.rung != Rung::Refused {
            for n in numbers {
                self.reach(ledger, place, n, member, receipt.rung);
            }
            return Ok(());
        }
        let reason = receipt.reason.unwrap_or(Reason::Unavailable);
        if receipt.tag.is_none() && receipt.to == 0 && curable(reason) {
            // The wrap itself, perhaps: then he opens nothing of the chain.
            joint.tired = true;
            // Nothing was sealed with it: a new one serves all alike, if one may be started now. Nobody makes the others wait.
            if let Some(live) = joint.chain.live.as_mut().filter(|live| live.sealing.next() == 0) {
                let now = Instant::now();
                if !mem::replace(&mut live.counted, true) {
                    self.starts.count(now);
                }
                if self.starts.wait(now).is_none() {
                    joint.chain.end();
                }
            }
            let waits = |(n, letter): (&u32, &mut Letter)| letter.pending().any(|id| id == member).then_some(*n);
            if reason != Reason::Unknown {
                numbers = joint.letters().filter_map(waits).collect();
                numbers.sort_unstable();
            }
        }
        for n in numbers {
            let Some(part) = joint_part(self.chains.get_mut(place), n, member) else { continue };
            part.answered = true;
            let Some(joint) = self.chains.get_mut(place) else { break };
            let Some(letter) = joint.letter(n) else { continue };
            // It has the letter, and does not take it again now.
            let repeats = letter.reached == Some(Rung::Stored) && joint.chain.resting.contains_key(&n);
            if repeats && receipt.tag.is_none() && passes(reason) && reason != Reason::Rate {
                continue;
            }
            joint.tired |= curable(reason);
            self.hear_refusal(desk, ledger, place, n, (member, reason))?;
        }
        Ok(())
    }

    /// This member refuses a letter, or somebody does for him.
    fn hear_refusal(
        &mut self,
        desk: &Desk<'_>,
        ledger: &mut Ledger,
        place: usize,
        n: u32,
        (member, reason): (&Id, Reason),
    ) -> Result<(), Ended> {
        let Some(joint) = self.chains.get_mut(place) else { return Ok(()) };
        let Some(letter) = joint.letter(n) else { return Ok(()) };
        if !letter.pending().any(|pending| pending == member) {
            return Ok(());
        }
        if !(curable(reason) || reason == Reason::Rate || (passes(reason) && !letter.is_attended())) {
            self.refuse(ledger, place, n, member, reason, None);
            return Ok(());
        }
        let own = write_alone(self.sid, desk, ledger, letter, member)?;
        self.own.extend(own);
        self.tidy(ledger, place, n);
        Ok(())
    }

    /// A letter came so far with a member.
    fn reach(&mut self, ledger: &mut Ledger, place: usize, n: u32, member: &Id, rung: Rung) {
        let name = self.name(member);
        if let Some(letter) = self.chains.get_mut(place).and_then(|joint| joint.letter(n)) {
            note(name, ledger, letter, member, rung);
        }
        self.tidy(ledger, place, n);
    }

    /// What became of a letter of its own.
    pub(super) fn word(&mut self, ledger: &mut Ledger, word: Word) {
        let Word { parent: Parent { row, member, .. }, outcome, detail, last } = word;
        let name = self.name(&member);
        let Some(letter) = self.letter(row) else { return };
        match outcome {
            Ok(rung) => note(name, ledger, letter, &member, rung),
            Err(reason) if last => note_refusal(name, ledger, letter, &member, reason, detail.as_deref()),
            Err(_) => {}
        }
        if let Some(letter) = self.apart.remove(&row) {
            match letter.is_finished() {
                true => self.settle(ledger, letter),
                false => drop(self.apart.insert(row, letter)),
            }
            return;
        }
        let found = |joint: &mut Joint| joint.letters().find(|(_, letter)| letter.row == row).map(|(n, _)| *n);
        let place = self.chains.iter_mut().enumerate().find_map(|(place, joint)| Some((place, found(joint)?)));
        if let Some((place, n)) = place {
            self.tidy(ledger, place, n);
        }
    }

    /// Asks where those are who have not confirmed what is stored, for whoever waits for that; and who takes what, before
    /// anything is sent again.
    pub(super) fn ask(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        let wonders = self.wonder.take_if(|at| *at <= Instant::now()).is_some();
        if !self.asked.is_empty() || !(wonders || self.doubts) {
            return Ok(());
        }
        let mut members: Vec<Id> = Vec::new();
        for joint in &self.chains {
            for letter in joint.chain.resting.values() {
                let waits = |member: &&Id| self.doubts || letter.parts.get(*member).is_some_and(|part| !part.away);
                if self.doubts || letter.is_attended() {
                    members.extend(letter.pending().filter(waits));
                }
            }
            if self.doubts && !joint.chain.resting.is_empty() {
                members.extend(joint.ears.keys());
            }
        }
        members.sort_unstable();
        members.dedup();
        self.doubts &= !members.is_empty();
        let sid = self.sid;
        for member in members {
            let request = desk.requests.open(Pending::Members { sid, member });
            let subject = Subject::Id(member);
            desk.link.send(&Message::Lookup(Lookup { request, key: false, bundle: false, subject }))?;
            self.asked.insert(member, None);
        }
        Ok(())
    }

    /// The directory has answered whether a member is there.
    pub(super) fn located(&mut self, member: &Id, answer: Result<DirectoryEntry<'_>, Reason>) {
        let Some(asked) = self.asked.get_mut(member) else { return };
        let away = match &answer {
            Ok(DirectoryEntry { status: PeerStatus::Offline { last_seen }, .. }) => Some(*last_seen),
            _ => None,
        };
        *asked = Some(Place { record_limit: answer.map_or(0, |entry| entry.record_limit), away });
        if self.asked.values().any(Option::is_none) {
            return;
        }
        let places = mem::take(&mut self.asked);
        self.tell_away(&places);
        let takes_all = |place: &Option<Place>| {
            place.as_ref().is_some_and(|place| usize::from(place.record_limit) >= MAX_RECORD_LEN)
        };
        // A device remembers little, and would do again what it did long ago.
        if !mem::take(&mut self.doubts) || !places.values().all(takes_all) {
            return;
        }
        let old = now().saturating_sub(UNHEARD_OF);
        for Chain { resting, unsent, .. } in self.chains.iter_mut().map(|joint| &mut joint.chain) {
            let is_doubted = |_: &u32, letter: &mut Letter| {
                let silent = letter.pending().any(|id| letter.parts.get(id).is_some_and(|part| !part.answered));
                silent && (letter.is_attended() || (letter.reached == Some(Rung::Stored) && letter.time < old))
            };
            unsent.extend(resting.extract_if(.., is_doubted));
        }
    }

    /// Whoever waits for a letter learns who is not there to confirm it.
    fn tell_away(&mut self, places: &BTreeMap<Id, Option<Place>>) {
        let names: HashMap<Id, String> = places.keys().map(|member| (*member, self.name(member))).collect();
        let letters = self.chains.iter_mut().flat_map(|joint| joint.chain.resting.values_mut());
        for letter in letters.filter(|letter| letter.is_attended()) {
            let mut told = Vec::new();
            for member in letter.pending().copied().collect::<Vec<_>>() {
                let away = places.get(&member).and_then(|place| place.as_ref()?.away);
                let (Some(last_seen), Some(part)) = (away, letter.parts.get_mut(&member)) else { continue };
                if !mem::replace(&mut part.away, true) {
                    told.extend(names.get(&member).map(|name| (name.clone(), last_seen)));
                }
            }
            let is_last = letter.parts.iter().all(|(id, part)| part.away || letter.is_finished_with(id));
            let count = told.len();
            for (place, (name, last_seen)) in told.into_iter().enumerate() {
                letter.tell(Reply::AwayBy { name, last_seen, last: is_last && place + 1 == count });
            }
        }
    }

    /// Whether letters have left whose fate is not known yet.
    pub(super) fn is_under_way(&self) -> bool {
        self.chains.iter().any(|joint| !joint.chain.under_way.is_empty())
    }

    /// Whether nobody was heard of on this chain, which is the present one.
    pub(super) fn is_unheard(&self, chain: &[u8; 8]) -> bool {
        let joint = self.chains.iter().find(|joint| joint.chain.is(chain));
        joint.and_then(|joint| joint.chain.live.as_ref()).is_some_and(|live| live.current && !live.heard)
    }

    /// The letters of a former process, in their places.
    pub(super) fn take_in(&mut self, letter: Letter, sealed: Option<([u8; 8], u32)>) -> Result<(), HomeStoreError> {
        let Some((id, n)) = sealed else {
            let place = if letter.parts.is_empty() { &mut self.queue } else { &mut self.apart };
            place.insert(letter.row, letter);
            return Ok(());
        };
        let joint = self.chains.iter_mut().find(|joint| joint.chain.is(&id)).ok_or(HomeStoreError::Damaged)?;
        let Chain { unsent, resting, .. } = &mut joint.chain;
        let rests = letter.reached >= Some(Rung::Stored) || letter.pending().next().is_none();
        if rests { resting } else { unsent }.insert(n, letter);
        Ok(())
    }
}

fn note_refusal(
    name: String,
    ledger: &mut Ledger,
    letter: &mut Letter,
    member: &Id,
    reason: Reason,
    detail: Option<&str>,
) {
    let Some(part) = letter.parts.get_mut(member).filter(|part| part.kept.refused.is_none()) else { return };
    part.kept.refused = Some(reason);
    ledger.changes.push(LetterChange::Part(letter.row, *member, part.kept));
    letter.tell(Reply::RefusedBy { name, reason, detail: detail.map(str::to_owned) });
}

fn note(name: String, ledger: &mut Ledger, letter: &mut Letter, member: &Id, rung: Rung) {
    let Some(part) = letter.parts.get_mut(member) else { return };
    part.answered = true;
    if part.kept.refused.is_some() || part.kept.reached >= Some(rung) {
        return;
    }
    part.kept.reached = Some(rung);
    ledger.changes.push(LetterChange::Part(letter.row, *member, part.kept));
    if rung >= Rung::Delivered {
        letter.tell(Reply::By { name, rung });
    }
}

/// A letter of its own that brings a letter to this member, with his name.
fn write_alone(
    sid: Id,
    desk: &Desk<'_>,
    ledger: &mut Ledger,
    letter: &mut Letter,
    member: &Id,
) -> Result<Option<(String, Letter)>, Ended> {
    let Some(peer) = desk.store.peer(member)? else { return Ok(None) };
    let body = ledger.body(desk.store, letter.row)?;
    let replies = letter.replies.clone();
    let own = Letter {
        row: ledger.next,
        id: new_letter()?,
        sid: None,
        len: body.len(),
        body: Some(body),
        signed: true,
        until: letter.until,
        replies: None,
        tries: 0,
        reached: None,
        time: letter.time,
        salt: [0; 8],
        answered: false,
        away: false,
        parts: BTreeMap::new(),
        parent: Some(Parent { sid, row: letter.row, member: *member, replies }),
    };
    ledger.enter(&own);
    if let Some(part) = letter.parts.get_mut(member) {
        part.kept.own = true;
        ledger.changes.push(LetterChange::Part(letter.row, *member, part.kept));
    }
    Ok(Some((peer.name, own)))
}

fn joint_part<'j>(joint: Option<&'j mut Joint>, n: u32, member: &Id) -> Option<&'j mut Part> {
    joint?.letter(n)?.parts.get_mut(member)
}
