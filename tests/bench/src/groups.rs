//! Groups of ours: founded, joined and talked in as the specification says, every signature made and verified.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use getrandom::SysRng;
use ossicle::crypto::verify;
use ossicle_core::{
    Answer, Bundle, Conversation, Decision, DirectoryEntry, Fixed, GroupFlags, Init, Invite, Lookup, MAX_NAME_LEN,
    Member, MemberChanged, MemberState, Members, Membership, Message, Names, PublicKey, SEALED_NAME_LEN, SignedBundle,
    Subject, WRAP_LEN,
};

use crate::Failure;
use crate::client::Client;
use crate::people::{Person, text};

/// A list of members, with what its founder signs.
pub struct Group {
    sid: [u8; 16],
    founder: Arc<Person>,
    /// The others.
    invitees: Vec<Arc<Person>>,
    lines: Vec<u8>,
}

/// The bundles of others, looked up and verified.
type Known = HashMap<[u8; 16], Bundle>;

const NAME: &str = "harbour";
const FLAGS: GroupFlags = GroupFlags::NONE;
/// Room for the largest message about groups.
const ROOM: usize = 16 * 1024;

impl Group {
    /// Another group, of these.
    ///
    /// # Errors
    /// If there is no entropy.
    pub fn new(founder: &Arc<Person>, invitees: &[Arc<Person>]) -> Result<Self, Failure> {
        let mut sid = [0; 16];
        getrandom::fill(&mut sid)?;
        sid[6] = sid[6] & 0x0f | 0x40;
        sid[8] = sid[8] & 0x3f | 0x80;
        let mut invitees = invitees.to_vec();
        invitees.sort_by_key(|person| person.id);
        let mut members: Vec<_> = invitees.iter().chain([founder]).map(|person| person.member()).collect();
        members.sort_by_key(|member| member.id);
        let lines = members.iter().flat_map(Member::encode).collect();
        Ok(Self { sid, founder: Arc::clone(founder), invitees, lines })
    }

    fn members(&self) -> Result<Members<'_>, Failure> {
        Members::new(&self.lines).map_err(text)
    }

    /// Nobody here has ever replaced a key.
    fn membership(&self, me: &Person) -> Result<Membership<'_>, Failure> {
        let members = self.members()?;
        let pin = |id: &[u8; 16]| Some((members.find(id)?.key, 0));
        Membership::new(self.sid, &self.founder.id, FLAGS, members, &me.id, pin).map_err(text)
    }

    fn conversation(&self) -> Result<Conversation, Failure> {
        Ok(*self.membership(&self.founder)?.conversation())
    }

    /// Founds it, waits until everybody has joined, and announces a chain to all. The invitees, of whom each has its own
    /// thread, join, verify that everybody else did, and take the chain.
    ///
    /// # Errors
    /// If anything of that fails.
    pub fn gather(&self, founder: &mut Client, invitees: Vec<Client>) -> Result<Vec<Client>, Failure> {
        std::thread::scope(|scope| {
            let joining: Vec<_> = invitees.into_iter().map(|client| scope.spawn(move || self.join(client))).collect();
            let founded = self.found(founder);
            let joined: Vec<_> =
                joining.into_iter().map(|thread| thread.join().map_err(|_| "a thread failed")).collect();
            founded?;
            joined.into_iter().map(|joined| joined?).collect()
        })
    }

    fn found(&self, founder: &mut Client) -> Result<(), Failure> {
        founder.ours()?.overhear();
        let known = self.meet(founder, &self.founder)?;
        self.init(&self.sealed_names(&known)?, founder)?;
        self.everybody(founder, &self.founder, &known)?;
        founder.ours()?.write_in(self.conversation()?, self.invitees.clone());
        founder.start_chain()
    }

    fn join(&self, mut client: Client) -> Result<Client, Failure> {
        let me = &*client.ours()?.person();
        client.ours()?.overhear();
        let payload = client.overheard()?;
        let Message::Other(body) = Message::decode(&payload).map_err(text)? else {
            return Err("no invitation".into());
        };
        let invite = Invite::decode(body).map_err(text)?;
        if (invite.sid, invite.members.bytes()) != (self.sid, &self.lines[..]) {
            return Err("another group".into());
        }
        let known = self.meet(&mut client, me)?;
        let membership = self.membership(me)?;
        let founder = known.get(&self.founder.id).ok_or("the founder is known")?;
        membership.verify(Decision::Init(invite.flags), founder, invite.signature.0).map_err(text)?;
        let mut name = [0; MAX_NAME_LEN + 1];
        if membership.open_name(invite.name.0, &me.prekey, founder, &mut name).map_err(text)? != NAME {
            return Err("another name".into());
        }
        let signature = Decision::Accept.sign(&me.keys, membership.conversation());
        let answer = Answer { request: 1, sid: self.sid, accept: true, signature: Fixed(&signature) };
        let before = client.heard.done;
        client.ours()?.hear_from(Arc::clone(&self.founder), *membership.conversation());
        client.tell(&answer.encode(&mut [0; 256]).map_err(text)?)?;
        self.everybody(&mut client, me, &known)?;
        // The answer to the answer, and the chain.
        client.until(|heard| heard.done >= before + 2)?;
        Ok(client)
    }

    /// Looks everybody else up, and verifies what came.
    fn meet(&self, client: &mut Client, me: &Person) -> Result<Known, Failure> {
        let others = || self.invitees.iter().chain([&self.founder]).filter(|other| other.id != me.id);
        for (request, other) in (1..).zip(others()) {
            client.tell(&Message::Lookup(Lookup {
                request,
                key: true,
                bundle: true,
                subject: Subject::Id(other.id),
            }))?;
        }
        let members = self.members()?;
        let mut known = Known::new();
        while known.len() < others().count() {
            let payload = client.overheard()?;
            let Message::LookupResponse { entry, .. } = Message::decode(&payload).map_err(text)? else {
                return Err("no answer to a question".into());
            };
            let DirectoryEntry { id, modulus: Some(modulus), bundle: Some(signed), .. } = entry else {
                return Err("an answer without a key".into());
            };
            let bundle = Bundle::decode(signed.bundle).map_err(text)?;
            let key = PublicKey::from_modulus(modulus).map_err(text)?.fingerprint();
            let is_good = verify(modulus, &bundle.statement(), signed.signature);
            if !is_good || members.find(&id) != Some(bundle.member()) || bundle.key != key {
                return Err("somebody else's bundle".into());
            }
            known.insert(id, bundle);
        }
        Ok(known)
    }

    fn sealed_names(&self, known: &Known) -> Result<Vec<[u8; SEALED_NAME_LEN]>, Failure> {
        let membership = self.membership(&self.founder)?;
        let seal = |to: &Arc<Person>| {
            let bundle = known.get(&to.id).ok_or("everybody is known")?;
            membership.seal_name(NAME, &self.founder.keys, bundle, &mut SysRng).map_err(text)
        };
        self.invitees.iter().map(seal).collect()
    }

    fn init(&self, names: &[[u8; SEALED_NAME_LEN]], founder: &mut Client) -> Result<(), Failure> {
        let signature = Decision::Init(FLAGS).sign(&self.founder.keys, &self.conversation()?);
        let init = Init {
            request: 1,
            sid: self.sid,
            flags: FLAGS,
            signature: Fixed(&signature),
            members: self.members()?,
            names: Names::new(names.as_flattened()).map_err(text)?,
        };
        founder.tell(&init.encode(&mut [0; ROOM]).map_err(text)?)
    }

    /// Waits until everybody else has joined, each with his own signature.
    fn everybody(&self, client: &mut Client, me: &Person, known: &Known) -> Result<(), Failure> {
        let membership = self.membership(me)?;
        let mut missing: HashSet<_> = self.invitees.iter().map(|other| other.id).filter(|id| *id != me.id).collect();
        while !missing.is_empty() {
            let payload = client.overheard()?;
            let Message::Other(body) = Message::decode(&payload).map_err(text)? else {
                return Err("an answer to nothing".into());
            };
            let changed = MemberChanged::decode(body).map_err(text)?;
            let (MemberState::Accepted, Some(signature)) = (changed.state, changed.signature) else {
                return Err("somebody did not join".into());
            };
            let bundle = known.get(&changed.member).ok_or("he is no member")?;
            membership.verify(Decision::Accept, bundle, signature.0).map_err(text)?;
            missing.remove(&changed.member);
        }
        Ok(())
    }

    /// Founds it with filler where no server can tell, lets everybody join, and announces a chain of the founder's to all.
    ///
    /// # Errors
    /// If the server does not agree.
    pub fn fill(&self, founder: &mut Client, invitees: &mut [Client]) -> Result<(), Failure> {
        for client in core::iter::once(&mut *founder).chain(&mut *invitees) {
            client.ours()?.overhear();
        }
        let before: Vec<_> = invitees.iter().map(|client| client.heard.done).collect();
        for client in &mut *invitees {
            // A wrap that nobody could accept.
            client.ours()?.open_later();
        }
        let names = vec![[1; SEALED_NAME_LEN]; self.invitees.len()];
        done(founder, 1, |founder| self.init(&names, founder))?;
        for client in &mut *invitees {
            let answer = Answer { request: 1, sid: self.sid, accept: true, signature: Fixed(&[1; 64]) };
            done(client, 1, |client| client.tell(&answer.encode(&mut [0; 256]).map_err(text)?))?;
        }
        let mut wrap = [0; WRAP_LEN];
        wrap[..16].copy_from_slice(&self.sid);
        wrap[16..24].copy_from_slice(&self.sid[..8]);
        let (bundle, signature) = (self.founder.bundle.encode(), &self.founder.signature);
        let bundle = SignedBundle { bundle: &bundle, signature };
        done(founder, self.invitees.len() as u64, |founder| {
            let wrap = |to: &Arc<Person>| founder.tell(&Message::Wrap { request: 2, to: to.id, wrap: &wrap, bundle });
            self.invitees.iter().try_for_each(wrap)
        })?;
        // The answer to the answer, and the chain.
        invitees.iter_mut().zip(before).try_for_each(|(client, before)| client.until(|heard| heard.done >= before + 2))
    }
}

/// Says so many things to the server, and waits until all of them are done.
fn done(client: &mut Client, count: u64, say: impl FnOnce(&mut Client) -> Result<(), Failure>) -> Result<(), Failure> {
    let before = client.heard.done;
    say(client)?;
    client.until(|heard| heard.done >= before + count)
}
