//! Groups, as a home lives them: founding, invitations, who joins, the end.
//!
//! ```text
//!  found --keys of all--> Founding --Done--> Accepted --close--> Closing --Done--> Closed
//!  invite --keys, signature, name--> Invited --accept--> Accepting --Done--> Accepted
//!                                            --decline--> Declining --Done--> Declined
//! ```
//!
//! What the server says of others counts only under their signatures, and those only under pinned keys: what comes waits
//! here, in its order, until the directory has said whose keys those are. Until then it is not acknowledged, so that it
//! comes again if this home ends before. What this home says is durable before it leaves, and is said again over the next
//! connection if nobody answered it.

use std::collections::{HashMap, HashSet, VecDeque};

use getrandom::SysRng;
use ossicle_core::{
    Answer, Bundle, CloseConversation, Closed, Conversation, Decision, DirectoryEntry, Fixed, GroupFlags, Init, Invite,
    Lookup, MAX_MEMBERS, MAX_NAME_LEN, MAX_RECORD_LEN, Member, MemberChanged, MemberState, Members, Membership,
    MembershipError, Message, Names, Reason, Subject, direct_sid, group_version, name_prekey_id,
};
use serde::{Deserialize, Serialize};

use super::agent::{Desk, Ended, Pending};
use super::inbox::{Inbox, Waited};
use super::local::Reply;
use super::outbox::Replies;
use super::peers::{Rejected, admit, check_bundle};
use super::{Failure, now};
use crate::endpoint::link::LinkError;
use crate::name::Name;
use crate::store::home::groups::{self as kept, Group, GroupMember, MAX_GROUPS, NUMBER_SIGN, Standing};
use crate::store::home::{HomeStore, HomeStoreError, Peer};

/// What comes and cannot be judged yet; beyond it the connection ends, and the server keeps the rest.
const MAX_EVENTS: usize = 1024;

/// A group, for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    /// What it is called here: its name, with a number where there are several.
    pub label: String,
    /// Its id.
    pub sid: [u8; 16],
    /// Who has founded it.
    pub creator: String,
    /// Where this client stands: `invited`, `accepted`, `declined`, `expired`, `closed`; `founding`, `accepting`,
    /// `declining` and `closing` until the server has answered.
    pub standing: String,
    /// When it was founded or the invitation came, in seconds since 1970.
    pub since: u64,
    /// Who has closed it, if he has signed that.
    pub closed_by: Option<String>,
    /// Everybody but this client, by name, each with `invited`, `accepted`, `declined`, `expired` or `revoked`.
    pub members: Vec<(String, String)>,
}

/// What a member, or the server, has done in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupNews {
    /// This client is invited.
    Invited,
    /// An invitation came that is not to be trusted, and why.
    Doubtful(String),
    /// A member joined, or did not.
    Member {
        /// Its name.
        name: String,
        /// `accepted`, `declined`, `expired` or `revoked`.
        state: String,
    },
    /// It was closed; by whom, if he has signed that.
    Closed(Option<String>),
}

/// Where a founder is on the way to his group.
struct Draft {
    name: Name,
    flags: GroupFlags,
    /// Whom he invites, by normalised name; with their bundles once the directory has answered.
    invited: Vec<(Name, Option<(Peer, Bundle)>)>,
    replies: Replies,
}

/// Something that the server said, and whether it waited there.
struct Event {
    payload: Vec<u8>,
    waited: Waited,
    /// It did not verify under a bundle that was known already: whoever signed it may have a newer one.
    again: bool,
}

/// What becomes of an event.
enum Judged {
    /// It is done with.
    Done(Option<(String, GroupNews)>),
    /// Not before the directory has said more of these.
    Needs(Vec<[u8; 16]>),
}

/// See the module.
#[derive(Default)]
pub(super) struct Groups {
    events: VecDeque<Event>,
    drafts: HashMap<u64, Draft>,
    last_draft: u64,
    /// Verified, over this connection.
    bundles: HashMap<[u8; 16], Bundle>,
    /// What the directory says of them is under way.
    asked: HashSet<[u8; 16]>,
    /// The directory does not know them, or shows what is not to be used.
    failed: HashMap<[u8; 16], Reason>,
    /// Who waits for the server's answer about a group.
    waiting: HashMap<[u8; 16], Vec<Replies>>,
    news: Vec<(String, GroupNews)>,
}

impl Groups {
    /// The connection has gone. Who founds begins anew; the rest comes again, or is said again.
    pub(super) fn disconnected(&mut self) -> Vec<(super::local::Request, Replies)> {
        self.events.clear();
        self.asked.clear();
        self.failed.clear();
        self.bundles.clear();
        let again = self.drafts.drain().map(|(_, draft)| {
            let members = draft.invited.iter().map(|(name, _)| name.as_str().to_owned()).collect();
            let name = draft.name.as_str().to_owned();
            let creator_closes = draft.flags.only_creator_closes();
            (super::local::Request::Found { name, members, creator_closes }, draft.replies)
        });
        again.collect()
    }

    /// Whether what waited at the server under this number is not done with here.
    pub(super) fn holds(&self, seq: u64) -> bool {
        self.events.iter().any(|event| event.waited.is_some_and(|(held, _)| held == seq))
    }

    /// Tells everybody who waits for something of groups.
    pub(super) fn broadcast(&self, reply: &Reply) {
        let drafts = self.drafts.values().map(|draft| &draft.replies);
        for replies in self.waiting.values().flatten().chain(drafts) {
            let _ = replies.send(reply.clone());
        }
    }

    /// Whether everything that came is judged.
    pub(super) fn is_idle(&self) -> bool {
        self.events.is_empty()
    }

    /// What is new, for whoever reads, with the label of the group.
    pub(super) fn take_news(&mut self) -> Vec<(String, GroupNews)> {
        core::mem::take(&mut self.news)
    }

    /// There is a connection: what nobody has answered is said again.
    pub(super) fn connected(&mut self, desk: &mut Desk<'_>) -> Result<(), Ended> {
        for group in desk.store.groups_that_go_on()? {
            self.say(desk, &group)?;
        }
        Ok(())
    }

    /// All groups, for a person.
    pub(super) fn list(store: &HomeStore, me: &[u8; 16]) -> Result<Vec<GroupView>, HomeStoreError> {
        store.groups()?.iter().map(|group| view(store, me, group)).collect()
    }

    /// A person founds a group.
    pub(super) fn found(
        &mut self,
        desk: &mut Desk<'_>,
        own: &Name,
        (name, members, creator_closes): (&str, &[String], bool),
        replies: Replies,
    ) -> Result<(), Ended> {
        let flags = if creator_closes { GroupFlags::CREATOR_CLOSES } else { GroupFlags::NONE };
        let (name, invited) = match read_founding(own, name, members) {
            Ok(read) => read,
            Err(failure) => {
                let _ = replies.send(Reply::Failed(failure));
                return Ok(());
            }
        };
        if desk.store.open_groups()? >= MAX_GROUPS {
            let sentence = format!("this home is in {MAX_GROUPS} groups, which is as many as it can be: close one");
            let _ = replies.send(Reply::Failed(Failure::refused(sentence)));
            return Ok(());
        }
        self.last_draft += 1;
        for name in &invited {
            let request = desk.requests.open(Pending::Invitee { draft: self.last_draft, name: name.clone() });
            let subject = Subject::Name(name.as_str());
            desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
        }
        let invited = invited.into_iter().map(|name| (name, None)).collect();
        self.drafts.insert(self.last_draft, Draft { name, flags, invited, replies });
        Ok(())
    }

    /// The directory has answered who an invitee is.
    pub(super) fn invitee(
        &mut self,
        desk: &mut Desk<'_>,
        draft: u64,
        name: &Name,
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        // Somebody else of the same group was refused before.
        let Some(open) = self.drafts.get_mut(&draft) else { return Ok(()) };
        match known(desk.store, answer, Some(name)) {
            Ok((peer, Some(bundle))) => {
                for (_, place) in open.invited.iter_mut().filter(|(invited, _)| invited == name) {
                    *place = Some((peer.clone(), bundle));
                }
                match open.invited.iter().all(|(_, found)| found.is_some()) {
                    true => self.draw_up(desk, draft),
                    false => Ok(()),
                }
            }
            found => {
                let rejected = found.err().unwrap_or_else(|| {
                    let detail = format!("{name} was enrolled and never came: there are no keys to invite it with");
                    Rejected::For { reason: Reason::Offline, detail: Some(detail) }
                });
                let (reason, detail) = rejected.told(desk.alarm)?;
                if let Some(draft) = self.drafts.remove(&draft) {
                    let detail = Some(detail.unwrap_or_else(|| format!("{name} cannot be invited")));
                    let _ = draft.replies.send(Reply::Refused { reason, detail });
                }
                Ok(())
            }
        }
    }

    /// Everybody is known: the group is signed, kept, and sent to the server.
    fn draw_up(&mut self, desk: &mut Desk<'_>, draft: u64) -> Result<(), Ended> {
        let Some(Draft { name, flags, invited, replies }) = self.drafts.remove(&draft) else { return Ok(()) };
        let mut invited: Vec<(Peer, Bundle)> = invited.into_iter().filter_map(|(_, found)| found).collect();
        invited.sort_unstable_by_key(|(peer, _)| peer.id);
        let mut all: Vec<Member> = invited.iter().map(|(peer, _)| peer.member()).chain([*desk.me]).collect();
        all.sort_unstable_by_key(|member| member.id);
        let epochs = invited.iter().map(|(peer, _)| peer.key_epoch).chain([desk.key_epoch]);
        let sick = |_| Failure::refused("no group can be founded: is there randomness on this system?");
        let lines: Vec<u8> = all.iter().flat_map(Member::encode).collect();
        let (Ok(members), Some(version)) = (Members::new(&lines), group_version(epochs)) else {
            let _ = replies.send(Reply::Refused { reason: Reason::Malformed, detail: None });
            return Ok(());
        };
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|_| Failure::refused("no group can be founded without randomness"))?;
        let sid = uuid::Builder::from_random_bytes(random).into_uuid().into_bytes();
        let founded = Membership::founded(sid, *desk.me, flags, members, version);
        let mut names = Vec::new();
        for (_, bundle) in &invited {
            names.extend(founded.seal_name(name.as_str(), &desk.own.keys, bundle, &mut SysRng).map_err(sick)?);
        }
        let signature = Decision::Init(flags).sign(&desk.own.keys, founded.conversation());
        let member = |member: Member| {
            let membership =
                if member.id == desk.me.id { kept::Membership::Accepted } else { kept::Membership::Invited };
            GroupMember { member, membership }
        };
        let mut group = Group {
            sid,
            name: Some(name),
            number: 1,
            creator: desk.me.id,
            flags: flags.bits(),
            version,
            signature,
            standing: Standing::Founding,
            since: now(),
            names: Some(names),
            closed_by: None,
            members: all.into_iter().map(member).collect(),
        };
        desk.store.put_group(&mut group)?;
        desk.store.set_said_under(&sid, &desk.own.bundle.verifying)?;
        self.waiting.entry(sid).or_default().push(replies);
        self.say(desk, &group)
    }

    /// A person answers an invitation.
    pub(super) fn answer(
        &mut self,
        desk: &mut Desk<'_>,
        label: &str,
        accept: bool,
        replies: Replies,
    ) -> Result<(), Ended> {
        let answers = |standing| {
            matches!(standing, Standing::Invited | Standing::Accepting | Standing::Declining)
                || (accept && standing == Standing::Accepted)
        };
        let standing = if accept { Standing::Accepting } else { Standing::Declining };
        self.decide(desk, label, standing, answers, replies)
    }

    /// A person closes a group.
    pub(super) fn close(&mut self, desk: &mut Desk<'_>, label: &str, replies: Replies) -> Result<(), Ended> {
        let closes = |standing| matches!(standing, Standing::Accepted | Standing::Closing);
        self.decide(desk, label, Standing::Closing, closes, replies)
    }

    fn decide(
        &mut self,
        desk: &mut Desk<'_>,
        label: &str,
        standing: Standing,
        may: impl Fn(Standing) -> bool,
        replies: Replies,
    ) -> Result<(), Ended> {
        let refused = |reason, sentence: String| {
            let _ = replies.send(Reply::Refused { reason, detail: Some(sentence) });
            Ok(())
        };
        let Some(mut group) = desk.store.group_labelled(label)? else {
            return refused(Reason::NotMember, format!("this home knows no group that is called {label}"));
        };
        let only_creator = GroupFlags::from_bits(group.flags).is_none_or(GroupFlags::only_creator_closes)
            && group.creator != desk.me.id;
        if standing == Standing::Closing && only_creator {
            return refused(Reason::Forbidden, format!("only who has founded {label} may close it"));
        }
        if !may(group.standing) {
            let reason = match group.standing {
                Standing::Closed | Standing::Closing => Reason::Closed,
                Standing::Expired => Reason::Expired,
                _ => Reason::Forbidden,
            };
            return refused(reason, format!("{label} is {} here", word(group.standing)));
        }
        group.standing = standing;
        desk.store.set_standing(&group.sid, standing)?;
        self.waiting.entry(group.sid).or_default().push(replies);
        self.say(desk, &group)
    }

    /// Says to the server what this home has decided about a group, if it has not answered yet.
    fn say(&mut self, desk: &mut Desk<'_>, group: &Group) -> Result<(), Ended> {
        let Some(lines) = Lines::of(group) else { return Ok(()) };
        let Some(founded) = lines.founded(group) else { return Ok(()) };
        let (sid, keys, conversation) = (group.sid, &desk.own.keys, founded.conversation());
        let mut buffer = vec![0; MAX_RECORD_LEN];
        let mut open = || desk.requests.open(Pending::Group { sid });
        let message = match group.standing {
            Standing::Founding => {
                let Some(names) = group.names.as_deref().and_then(|names| Names::new(names).ok()) else {
                    return Ok(());
                };
                let (flags, members, signature) = (founded.flags(), founded.members(), Fixed(&group.signature));
                Init { request: open(), sid, flags, signature, members, names }.encode(&mut buffer)
            }
            // Under new keys once more: who comes later could not verify it otherwise.
            Standing::Accepted if desk.store.said_under(&sid)? == Some(desk.own.bundle.verifying) => return Ok(()),
            Standing::Accepting | Standing::Declining | Standing::Accepted => {
                let accept = group.standing != Standing::Declining;
                let decision = if accept { Decision::Accept } else { Decision::Decline };
                let signature = decision.sign(keys, conversation);
                Answer { request: open(), sid, accept, signature: Fixed(&signature) }.encode(&mut buffer)
            }
            Standing::Closing => {
                let signature = Decision::Close.sign(keys, conversation);
                CloseConversation { request: open(), sid, signature: Fixed(&signature) }.encode(&mut buffer)
            }
            _ => return Ok(()),
        };
        Ok(desk.link.send(&message.map_err(LinkError::from)?)?)
    }

    /// The server has answered what this home said about a group.
    pub(super) fn answered(
        &mut self,
        desk: &mut Desk<'_>,
        inbox: &mut Inbox,
        sid: &[u8; 16],
        answer: Result<(), Reason>,
    ) -> Result<(), Ended> {
        let replies = self.waiting.remove(sid).unwrap_or_default();
        let tell = |reply: &Reply| replies.iter().for_each(|replies| drop(replies.send(reply.clone())));
        let Some(group) = desk.store.group(sid)? else { return Ok(()) };
        let said = group.standing;
        match (said, answer) {
            // It was founded, or closed, by what was said before and whose answer was lost: nobody else draws this id.
            (Standing::Accepted, Ok(())) => {
                desk.store.set_said_under(sid, &desk.own.bundle.verifying)?;
                tell(&Reply::Done);
            }
            (Standing::Founding, Ok(()) | Err(Reason::NameInUse)) | (Standing::Accepting, Ok(())) => {
                if said == Standing::Accepting {
                    desk.store.set_said_under(sid, &desk.own.bundle.verifying)?;
                }
                desk.store.set_standing(sid, Standing::Accepted)?;
                let group = desk.store.group(sid)?.unwrap_or(group);
                tell(&Reply::Group(view(desk.store, &desk.me.id, &group)?));
            }
            (Standing::Declining, Ok(())) => {
                desk.store.set_standing(sid, Standing::Declined)?;
                tell(&Reply::Done);
            }
            (Standing::Closing, Ok(()) | Err(Reason::Closed)) => {
                end(desk, inbox, sid, true)?;
                tell(&Reply::Done);
            }
            (_, Err(reason @ Reason::Closed)) => {
                end(desk, inbox, sid, false)?;
                tell(&Reply::Refused { reason, detail: Some(format!("{} is closed", group.label())) });
            }
            (Standing::Accepting | Standing::Declining, Err(reason @ Reason::Expired)) => {
                desk.store.set_standing(sid, Standing::Expired)?;
                tell(&Reply::Refused { reason, detail: Some(format!("{} was not answered in time", group.label())) });
            }
            // It may pass: said again over the next connection.
            (_, Err(reason @ (Reason::Rate | Reason::Unavailable))) => tell(&Reply::Refused { reason, detail: None }),
            (Standing::Founding, Err(reason)) => {
                end(desk, inbox, sid, false)?;
                tell(&Reply::Refused { reason, detail: None });
            }
            (Standing::Closing, Err(reason)) => {
                desk.store.set_standing(sid, Standing::Accepted)?;
                tell(&Reply::Refused { reason, detail: None });
            }
            (Standing::Accepting | Standing::Declining, Err(reason)) => {
                desk.store.set_standing(sid, Standing::Invited)?;
                tell(&Reply::Refused { reason, detail: None });
            }
            (_, answer) => {
                tell(&answer.map_or_else(|reason| Reply::Refused { reason, detail: None }, |()| Reply::Done))
            }
        }
        Ok(())
    }

    /// The server has said something about a group.
    pub(super) fn came(
        &mut self,
        desk: &mut Desk<'_>,
        inbox: &mut Inbox,
        payload: &[u8],
        waited: Waited,
    ) -> Result<(), Ended> {
        if self.events.len() >= MAX_EVENTS {
            return Err(LinkError::Broken("the server says more of groups than anybody can look up".into()).into());
        }
        self.events.push_back(Event { payload: payload.to_vec(), waited, again: false });
        self.judge(desk, inbox)
    }

    /// The directory has answered who somebody is.
    pub(super) fn located(
        &mut self,
        desk: &mut Desk<'_>,
        inbox: &mut Inbox,
        id: &[u8; 16],
        answer: Result<DirectoryEntry<'_>, Reason>,
    ) -> Result<(), Ended> {
        self.asked.remove(id);
        let answer = answer.and_then(|entry| if entry.id == *id { Ok(entry) } else { Err(Reason::Malformed) });
        match known(desk.store, answer, None) {
            Ok((_, Some(bundle))) => drop(self.bundles.insert(*id, bundle)),
            Ok((_, None)) => drop(self.failed.insert(*id, Reason::Offline)),
            Err(rejected) => {
                let (reason, _) = rejected.told(desk.alarm)?;
                // It passes. What was said must not be lost for that: the server keeps it for the next connection.
                if matches!(reason, Reason::Rate | Reason::Unavailable) {
                    let sentence = format!("the directory cannot say now who somebody in a group is ({reason})");
                    return Err(LinkError::Broken(sentence).into());
                }
                self.failed.insert(*id, reason);
            }
        }
        self.judge(desk, inbox)
    }

    /// Judges what came, in its order, as far as enough is known.
    fn judge(&mut self, desk: &mut Desk<'_>, inbox: &mut Inbox) -> Result<(), Ended> {
        while let Some(mut event) = self.events.pop_front() {
            match self.judge_one(desk, inbox, &mut event)? {
                Judged::Done(news) => {
                    self.failed.clear();
                    self.news.extend(news);
                }
                Judged::Needs(ids) => {
                    for id in ids {
                        if self.asked.insert(id) {
                            let request = desk.requests.open(Pending::Acquaintance { id });
                            let subject = Subject::Id(id);
                            desk.link.send(&Message::Lookup(Lookup { request, key: true, bundle: true, subject }))?;
                        }
                    }
                    self.events.push_front(event);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn judge_one(&self, desk: &mut Desk<'_>, inbox: &mut Inbox, event: &mut Event) -> Result<Judged, Ended> {
        let Ok(Message::Other(body)) = Message::decode(&event.payload) else { return Ok(Judged::Done(None)) };
        if let Ok(invite) = Invite::decode(body) {
            return self.invited(desk, &invite);
        }
        let again = &mut event.again;
        if let Ok(changed) = MemberChanged::decode(body) {
            return self.changed(desk, &changed, again);
        }
        match Closed::decode(body) {
            Ok(closed) => self.closed(desk, inbox, &closed, again),
            Err(_) => Ok(Judged::Done(None)),
        }
    }

    fn invited(&self, desk: &mut Desk<'_>, invite: &Invite<'_>) -> Result<Judged, Ended> {
        let doubtful = |label: &str, why: String| {
            tracing::warn!("an invitation is not to be trusted: {why}");
            Ok(Judged::Done(Some((label.to_owned(), GroupNews::Doubtful(why)))))
        };
        // What is known stays as it is: it comes again where its acknowledgement was lost.
        if desk.store.group(&invite.sid)?.is_some() {
            return Ok(Judged::Done(None));
        }
        // And under the id of a conversation of two nobody founds anything.
        let mut peers = desk.store.peer_ids()?;
        peers.extend(invite.members.iter().map(|member| member.id).filter(|id| *id != desk.me.id));
        if peers.iter().any(|peer| direct_sid(&desk.me.id, peer, 0) == invite.sid) {
            tracing::warn!("an invitation has the id of a conversation of two: ignored");
            return Ok(Judged::Done(None));
        }
        if desk.store.open_groups()? >= MAX_GROUPS {
            return doubtful("", format!("this home is in {MAX_GROUPS} groups already"));
        }
        let (mut pins, mut missing) = (HashMap::from([(desk.me.id, (desk.me.key, desk.key_epoch))]), Vec::new());
        for member in invite.members.iter().filter(|member| member.id != desk.me.id) {
            match desk.store.peer(&member.id)? {
                Some(peer) => drop(pins.insert(peer.id, (peer.fingerprint, peer.key_epoch))),
                None if self.failed.contains_key(&member.id) => {}
                None => missing.push(member.id),
            }
        }
        // Its creator's signature is verified under the newest keys that he has.
        if !self.bundles.contains_key(&invite.creator) && !self.failed.contains_key(&invite.creator) {
            missing.push(invite.creator);
        }
        if !missing.is_empty() {
            return Ok(Judged::Needs(missing));
        }
        let founded = match Membership::of(invite, &desk.me.id, |id| pins.get(id).copied()) {
            Ok(founded) => founded,
            Err(error @ (MembershipError::Unknown(id) | MembershipError::KeyChanged(id))) => {
                return doubtful("", format!("{error} ({})", name_of(desk.store, &id)?));
            }
            Err(error) => return doubtful("", error.to_string()),
        };
        let creator = name_of(desk.store, &invite.creator)?;
        let Some(bundle) = self.bundles.get(&invite.creator) else {
            return doubtful("", format!("the directory shows no keys of {creator}, who signed it"));
        };
        if founded.verify(Decision::Init(invite.flags), bundle, invite.signature.0).is_err() {
            return doubtful("", format!("it is not signed by {creator}, who is said to have founded the group"));
        }
        let mut room = [0; 1 + MAX_NAME_LEN];
        let opened = desk.own.prekeys.find(name_prekey_id(invite.name.0)).and_then(|prekey| {
            let name = founded.open_name(invite.name.0, prekey, bundle, &mut room).ok()?;
            group_name(name).ok()
        });
        if opened.is_none() {
            tracing::warn!("{creator} has founded a group whose name this home cannot read: it has a number here");
        }
        let member = |member: Member| {
            let is_in = member.id == invite.creator;
            let membership = if is_in { kept::Membership::Accepted } else { kept::Membership::Invited };
            GroupMember { member, membership }
        };
        let mut group = Group {
            sid: invite.sid,
            name: opened,
            number: 1,
            creator: invite.creator,
            flags: invite.flags.bits(),
            version: group_version(pins.values().map(|(_, epoch)| *epoch)).unwrap_or_default(),
            signature: *invite.signature.0,
            standing: Standing::Invited,
            since: now(),
            names: None,
            closed_by: None,
            members: invite.members.iter().map(member).collect(),
        };
        desk.store.put_group(&mut group)?;
        Ok(Judged::Done(Some((group.label(), GroupNews::Invited))))
    }

    fn changed(&self, desk: &mut Desk<'_>, changed: &MemberChanged<'_>, again: &mut bool) -> Result<Judged, Ended> {
        let MemberChanged { sid, member, state, signature } = changed;
        let Some(group) = desk.store.group(sid)?.filter(|group| group.standing.is_open()) else {
            return Ok(Judged::Done(None));
        };
        let Some(held) = group.members.iter().find(|held| held.member.id == *member && *member != desk.me.id) else {
            tracing::warn!("the server speaks of somebody in {} who is no member: ignored", group.label());
            return Ok(Judged::Done(None));
        };
        let (membership, decision) = match state {
            MemberState::Accepted => (kept::Membership::Accepted, Some(Decision::Accept)),
            MemberState::Declined => (kept::Membership::Declined, Some(Decision::Decline)),
            MemberState::Revoked => (kept::Membership::Revoked, None),
            _ => (kept::Membership::Expired, None),
        };
        // Who says again that he is in has new keys: what is sent to him is sent under those.
        let says_again = held.membership == kept::Membership::Accepted && membership == held.membership;
        if says_again && !core::mem::replace(again, true) {
            return Ok(Judged::Needs(vec![*member]));
        }
        // Who has said himself that he is in, or is not, is not talked out of it; that he is no client any more may be true.
        let is_said = matches!(held.membership, kept::Membership::Accepted | kept::Membership::Declined);
        if held.membership == membership || (membership == kept::Membership::Expired && is_said) {
            return Ok(Judged::Done(None));
        }
        if let Some(decision) = decision {
            match self.signed_by(&group, member, decision, signature.map(|signature| signature.0), again) {
                Signed::Yes => {}
                Signed::Ask => return Ok(Judged::Needs(vec![*member])),
                Signed::No => {
                    let who = name_of(desk.store, member)?;
                    tracing::warn!(
                        "what {who} is said to have answered in {} is not signed so: ignored",
                        group.label()
                    );
                    return Ok(Judged::Done(None));
                }
            }
        }
        desk.store.set_membership(sid, member, membership)?;
        let name = name_of(desk.store, member)?;
        Ok(Judged::Done(Some((group.label(), GroupNews::Member { name, state: member_word(membership).to_owned() }))))
    }

    fn closed(
        &self,
        desk: &mut Desk<'_>,
        inbox: &mut Inbox,
        closed: &Closed<'_>,
        again: &mut bool,
    ) -> Result<Judged, Ended> {
        let Some(group) = desk.store.group(&closed.sid)?.filter(|group| group.standing != Standing::Closed) else {
            return Ok(Judged::Done(None));
        };
        let signed = match (closed.by, closed.signature) {
            (Some(by), Some(signature)) => {
                match self.signed_by(&group, &by, Decision::Close, Some(signature.0), again) {
                    Signed::Yes => Some(by),
                    Signed::Ask => return Ok(Judged::Needs(vec![by])),
                    Signed::No => None,
                }
            }
            _ => None,
        };
        inbox.end_conversation(desk, &closed.sid)?;
        desk.store.close_group(&closed.sid, signed.as_ref())?;
        let by = signed.map(|by| name_of(desk.store, &by)).transpose()?;
        Ok(Judged::Done(Some((group.label(), GroupNews::Closed(by)))))
    }

    /// Whether a member has decided so, as far as is known.
    fn signed_by(
        &self,
        group: &Group,
        member: &[u8; 16],
        decision: Decision,
        signature: Option<&[u8; 64]>,
        again: &mut bool,
    ) -> Signed {
        let Some(signature) = signature else { return Signed::No };
        let Some(bundle) = self.bundles.get(member) else {
            return if self.failed.contains_key(member) { Signed::No } else { Signed::Ask };
        };
        let lines = Lines::of(group);
        let founded = lines.as_ref().and_then(|lines| lines.founded(group));
        match founded.is_some_and(|founded| founded.verify(decision, bundle, signature).is_ok()) {
            true => Signed::Yes,
            // The bundle may be older than the signature.
            false if !core::mem::replace(again, true) => Signed::Ask,
            false => Signed::No,
        }
    }
}

/// A group is over, by this home's word or the server's.
fn end(desk: &mut Desk<'_>, inbox: &mut Inbox, sid: &[u8; 16], by_us: bool) -> Result<(), Ended> {
    inbox.end_conversation(desk, sid)?;
    Ok(desk.store.close_group(sid, by_us.then_some(&desk.me.id))?)
}

/// The group as chains are bound to it: under the keys that its members have now. `None` if this client is not in it.
pub(super) fn present(desk: &Desk<'_>, group: &Group) -> Result<Option<Conversation>, HomeStoreError> {
    if !matches!(group.standing, Standing::Accepted | Standing::Accepting | Standing::Closing) {
        return Ok(None);
    }
    let (mut members, mut epochs) = (Vec::new(), Vec::new());
    for held in &group.members {
        let (member, epoch) = match held.member.id == desk.me.id {
            true => (*desk.me, desk.key_epoch),
            false => match desk.store.peer(&held.member.id)? {
                Some(peer) => (peer.member(), peer.key_epoch),
                None => return Ok(None),
            },
        };
        members.push(member);
        epochs.push(epoch);
    }
    let conversation = group_version(epochs).map(|version| Conversation::group(group.sid, version, &members));
    Ok(conversation.and_then(Result::ok))
}

enum Signed {
    Yes,
    No,
    Ask,
}

/// The list of a group's members, as it was signed.
struct Lines(Vec<u8>);

impl Lines {
    fn of(group: &Group) -> Option<Self> {
        (!group.members.is_empty()).then(|| Self(group.members.iter().flat_map(|held| held.member.encode()).collect()))
    }

    fn founded(&self, group: &Group) -> Option<Membership<'_>> {
        let members = Members::new(&self.0).ok()?;
        let creator = members.find(&group.creator)?;
        Some(Membership::founded(group.sid, creator, GroupFlags::from_bits(group.flags)?, members, group.version))
    }
}

/// The pinned peer that the directory shows, with its bundle if it has one.
fn known(
    store: &HomeStore,
    answer: Result<DirectoryEntry<'_>, Reason>,
    asked: Option<&Name>,
) -> Result<(Peer, Option<Bundle>), Rejected> {
    let entry = answer.map_err(|reason| Rejected::For { reason, detail: None })?;
    let mut peer = admit(store, &entry, asked)?;
    let Some(signed) = &entry.bundle else { return Ok((peer, None)) };
    let bundle = check_bundle(&mut peer, signed)?;
    store.put_peer(&peer)?;
    Ok((peer, Some(bundle)))
}

/// Name and invitees of a group that a person founds.
fn read_founding(own: &Name, name: &str, members: &[String]) -> Result<(Name, Vec<Name>), Failure> {
    let name = group_name(name)?;
    let mut invited: Vec<Name> = Vec::new();
    for member in members {
        let member = member.strip_prefix('@').unwrap_or(member);
        let member = Name::parse(member).map_err(|error| Failure::usage(error.to_string()))?;
        if member != *own && !invited.contains(&member) {
            invited.push(member);
        }
    }
    match invited.len() {
        0 => Err(Failure::usage("a group has at least one other member: name whom you invite")),
        count if count >= MAX_MEMBERS => {
            Err(Failure::usage(format!("a group has at most {MAX_MEMBERS} members, its founder included")))
        }
        _ => Ok((name, invited)),
    }
}

/// The name of a group: as that of a client, but without what stands before a number.
fn group_name(name: &str) -> Result<Name, Failure> {
    let parsed = Name::parse(name).map_err(|error| Failure::usage(error.to_string()))?;
    // Compatibility forms can hide it: U+FF5E becomes one.
    if [parsed.as_str(), parsed.key()].iter().any(|form| form.contains(NUMBER_SIGN)) {
        return Err(Failure::usage(format!("the name of a group has no {NUMBER_SIGN:?} in it")));
    }
    Ok(parsed)
}

fn name_of(store: &HomeStore, id: &[u8; 16]) -> Result<String, HomeStoreError> {
    let pinned = store.peer(id)?.map(|peer| peer.name);
    Ok(pinned.unwrap_or_else(|| uuid::Uuid::from_bytes(*id).to_string()))
}

pub(super) fn view(store: &HomeStore, me: &[u8; 16], group: &Group) -> Result<GroupView, HomeStoreError> {
    let whose = |id: &[u8; 16]| {
        if id != me {
            return name_of(store, id);
        }
        Ok(store.profile()?.map(|own| own.name).unwrap_or_default())
    };
    let member = |held: &GroupMember| Ok((whose(&held.member.id)?, member_word(held.membership).to_owned()));
    let mut members = group.others(me).map(member).collect::<Result<Vec<_>, HomeStoreError>>()?;
    members.sort_unstable();
    Ok(GroupView {
        label: group.label(),
        sid: group.sid,
        creator: whose(&group.creator)?,
        standing: word(group.standing).to_owned(),
        since: group.since,
        closed_by: group.closed_by.as_ref().map(whose).transpose()?,
        members,
    })
}

const fn word(standing: Standing) -> &'static str {
    match standing {
        Standing::Founding => "founding",
        Standing::Invited => "invited",
        Standing::Accepting => "accepting",
        Standing::Declining => "declining",
        Standing::Accepted => "accepted",
        Standing::Declined => "declined",
        Standing::Expired => "expired",
        Standing::Closing => "closing",
        Standing::Closed => "closed",
    }
}

const fn member_word(membership: kept::Membership) -> &'static str {
    match membership {
        kept::Membership::Invited => "invited",
        kept::Membership::Accepted => "accepted",
        kept::Membership::Declined => "declined",
        kept::Membership::Expired => "expired",
        kept::Membership::Revoked => "revoked",
    }
}
