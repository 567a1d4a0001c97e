//! Groups at rest: those that this client has founded or was invited to, and what is known of their members.
//!
//! Who belongs to a group is decided when it is founded and never again (PROTOCOL 9.1); what changes is what each member
//! has said. What this client has said is durable before it is sent, so that a later connection says it again. Of a closed
//! group stays that there was one: its id is never taken a second time, whatever a server offers.

use ossicle_core::Member;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{HomeStore, HomeStoreError, Result, seconds};
use crate::name::Name;

/// Groups that a home is in at a time, with those that it was invited to.
pub const MAX_GROUPS: u64 = 256;

/// Between a group's name and its number, where there are several of one name. In no name of a group.
pub const NUMBER_SIGN: char = '~';

/// Where this client stands in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It founds the group, and the server has not answered.
    Founding,
    /// It was invited, and has said nothing.
    Invited,
    /// It has accepted, and the server has not answered.
    Accepting,
    /// It has declined, and the server has not answered.
    Declining,
    /// It is a member.
    Accepted,
    /// It is not, by its own decision.
    Declined,
    /// It is not, because it said nothing for too long.
    Expired,
    /// It closes the group, and the server has not answered.
    Closing,
    /// There is no such group any more.
    Closed,
}

impl Standing {
    const ALL: [Self; 9] = [
        Self::Founding,
        Self::Invited,
        Self::Accepting,
        Self::Declining,
        Self::Accepted,
        Self::Declined,
        Self::Expired,
        Self::Closing,
        Self::Closed,
    ];

    fn code(self) -> i64 {
        Self::ALL.iter().position(|standing| *standing == self).map_or(-1, |code| i64::try_from(code).unwrap_or(-1))
    }

    fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|code| Self::ALL.get(code).copied())
    }

    /// Whether the group goes on for this client, or may.
    pub const fn is_open(self) -> bool {
        !matches!(self, Self::Declined | Self::Expired | Self::Closed)
    }
}

/// What is known of another member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// He was invited.
    Invited,
    /// He is in: his word for it was verified.
    Accepted,
    /// He is not: his word for it was verified.
    Declined,
    /// He is not, because he said nothing for too long. The server's word.
    Expired,
    /// He is no client any more. The server's word.
    Revoked,
}

impl Membership {
    const ALL: [Self; 5] = [Self::Invited, Self::Accepted, Self::Declined, Self::Expired, Self::Revoked];

    fn code(self) -> i64 {
        Self::ALL.iter().position(|membership| *membership == self).map_or(-1, |code| i64::try_from(code).unwrap_or(-1))
    }

    fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|code| Self::ALL.get(code).copied())
    }
}

/// A member as it was when the group was founded, and what it has said since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Id and key, as the founder signed them.
    pub member: Member,
    /// What is known of it.
    pub membership: Membership,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its id.
    pub sid: [u8; 16],
    /// Its name, as its founder gave it; `None` if this client cannot read it.
    pub name: Option<Name>,
    /// Which of this name it is here, from 1 on.
    pub number: u32,
    /// Who has founded it.
    pub creator: [u8; 16],
    /// What the founder signed beside the members.
    pub flags: u8,
    /// The sum of the members' key epochs then.
    pub version: u32,
    /// The founder's signature.
    pub signature: [u8; 64],
    /// Where this client stands in it.
    pub standing: Standing,
    /// When it was founded or the invitation came, in seconds since 1970.
    pub since: u64,
    /// Its name, sealed to each of the others, until the server has it.
    pub names: Option<Vec<u8>>,
    /// Who has closed it, if that is known.
    pub closed_by: Option<[u8; 16]>,
    /// Everybody, by id. Of a closed group nobody.
    pub members: Vec<GroupMember>,
}

impl Group {
    /// What a person calls it: its name, with its number where there is another one of that name; the number alone if this
    /// client knows no name of it.
    pub fn label(&self) -> String {
        label(self.name.as_ref().map_or("", Name::as_str), self.number)
    }

    /// The other members.
    pub fn others(&self, me: &[u8; 16]) -> impl Iterator<Item = &GroupMember> {
        self.members.iter().filter(move |other| other.member.id != *me)
    }
}

/// What a person calls the group with this name and number.
pub(super) fn label(name: &str, number: u32) -> String {
    match number {
        1 if !name.is_empty() => name.to_owned(),
        number => format!("{name}{NUMBER_SIGN}{number}"),
    }
}

/// Name, if any, and number that a label stands for.
fn read_label(label: &str) -> Option<(Option<Name>, u32)> {
    match label.rsplit_once(NUMBER_SIGN) {
        None => Some((Some(Name::parse(label).ok()?), 1)),
        Some((name, number)) if number.starts_with(|c: char| ('1'..='9').contains(&c)) => {
            let number = number.parse().ok()?;
            match name {
                "" => Some((None, number)),
                name => Some((Some(Name::parse(name).ok()?), number)).filter(|_| number > 1),
            }
        }
        Some(_) => None,
    }
}

/// What a group is found under: its name in one spelling; nothing if it has none here.
fn key_of(name: Option<&Name>) -> &str {
    name.map_or("", Name::key)
}

impl HomeStore {
    /// Keeps a new group, with the lowest number that is free for its name: 1, unless another group, this client or a peer
    /// is called so. False if there is or was one with this id, which stays as it is.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn put_group(&mut self, group: &mut Group) -> Result<bool> {
        let transaction = self.db.transaction()?;
        let key = key_of(group.name.as_ref());
        let sql = "SELECT EXISTS (SELECT 1 FROM peer WHERE name_key = ?1)";
        let mut taken: bool = transaction.query_row(sql, [key], |row| row.get(0))?;
        let own: Option<String> = transaction.query_row("SELECT name FROM profile", [], |row| row.get(0)).optional()?;
        taken |= own.and_then(|own| Name::parse(&own).ok()).is_some_and(|own| own.key() == key);
        let mut free = if taken { 2 } else { 1 };
        {
            let sql = "SELECT number FROM conversation WHERE name_key = ?1 AND number >= ?2 ORDER BY number";
            let mut statement = transaction.prepare_cached(sql)?;
            let mut rows = statement.query(params![key, free])?;
            while let Some(row) = rows.next()? {
                if row.get::<_, u32>(0)? != free {
                    break;
                }
                free += 1;
            }
        }
        let sql = "INSERT INTO conversation
                   (sid, name, name_key, number, creator, flags, version, signature, standing, since, names, closed_by)
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) ON CONFLICT (sid) DO NOTHING";
        let Group { sid, name, creator, flags, version, signature, names, closed_by, .. } = &*group;
        let (name, standing, since) =
            (name.as_ref().map_or("", Name::as_str), group.standing.code(), seconds(group.since));
        let values =
            params![sid, name, key, free, creator, flags, version, signature, standing, since, names, closed_by];
        if transaction.execute(sql, values)? == 0 {
            return Ok(false);
        }
        for GroupMember { member, membership } in &group.members {
            let sql = "INSERT INTO membership (sid, member, key, state) VALUES (?1, ?2, ?3, ?4)";
            transaction.execute(sql, params![sid, member.id, member.key, membership.code()])?;
        }
        transaction.commit()?;
        group.number = free;
        Ok(true)
    }

    /// All groups, the oldest first, also those that are closed.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn groups(&self) -> Result<Vec<Group>> {
        self.find_groups("ORDER BY since, name_key, number", [])
    }

    /// Groups that go on, or may, the oldest first. Of those that are over there may be any number: their founders need nobody's
    /// leave.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn groups_that_go_on(&self) -> Result<Vec<Group>> {
        self.find_groups(&format!("WHERE standing IN ({}) ORDER BY since, name_key, number", open_codes()), [])
    }

    /// The group with this id.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn group(&self, sid: &[u8; 16]) -> Result<Option<Group>> {
        Ok(self.find_groups("WHERE sid = ?1", [sid])?.pop())
    }

    /// The group that a person calls so: `NAME` or `NAME~2`, in any spelling of the name.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn group_labelled(&self, label: &str) -> Result<Option<Group>> {
        let Some((name, number)) = read_label(label) else {
            return Ok(None);
        };
        Ok(self.find_groups("WHERE name_key = ?1 AND number = ?2", params![key_of(name.as_ref()), number])?.pop())
    }

    fn find_groups(&self, which: &str, values: impl rusqlite::Params) -> Result<Vec<Group>> {
        let sql = format!(
            "SELECT sid, name, number, creator, flags, signature, standing, since, names, closed_by, version
             FROM conversation {which}"
        );
        let mut statement = self.db.prepare_cached(&sql)?;
        let groups = statement.query_map(values, read_group)?;
        let mut groups = groups.collect::<rusqlite::Result<Option<Vec<_>>>>()?.ok_or(HomeStoreError::Damaged)?;
        for group in &mut groups {
            group.members = members(&self.db, &group.sid)?;
        }
        Ok(groups)
    }

    /// Groups that go on, or may.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn open_groups(&self) -> Result<u64> {
        let sql = format!("SELECT count(*) FROM conversation WHERE standing IN ({})", open_codes());
        let count: i64 = self.db.prepare_cached(&sql)?.query_row([], |row| row.get(0))?;
        Ok(count.unsigned_abs())
    }

    /// Notes where this client stands in a group. Once the server knows the group, what was sealed for it goes.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn set_standing(&self, sid: &[u8; 16], standing: Standing) -> Result<()> {
        let sql = "UPDATE conversation SET standing = ?2, names = CASE WHEN ?3 THEN names END WHERE sid = ?1";
        let values = params![sid, standing.code(), standing == Standing::Founding];
        self.db.prepare_cached(sql)?.execute(values)?;
        Ok(())
    }

    /// The verifying key under which the server has this client's word that it is in a group, if that is known.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn said_under(&self, sid: &[u8; 16]) -> Result<Option<[u8; 32]>> {
        let sql = "SELECT said FROM conversation WHERE sid = ?1";
        Ok(self.db.prepare_cached(sql)?.query_row([sid], |row| row.get(0)).optional()?.flatten())
    }

    /// Notes under which verifying key that is.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn set_said_under(&self, sid: &[u8; 16], verifying: &[u8; 32]) -> Result<()> {
        self.db.execute("UPDATE conversation SET said = ?2 WHERE sid = ?1", params![sid, verifying])?;
        Ok(())
    }

    /// Notes what is known of a member. Whether that is new.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn set_membership(&self, sid: &[u8; 16], member: &[u8; 16], membership: Membership) -> Result<bool> {
        let sql = "UPDATE membership SET state = ?3 WHERE sid = ?1 AND member = ?2 AND state <> ?3";
        Ok(self.db.prepare_cached(sql)?.execute(params![sid, member, membership.code()])? > 0)
    }

    /// A group is closed: who was in it, its chains, and what is remembered of messages that were read go. Messages that
    /// wait for their reader stay.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn close_group(&mut self, sid: &[u8; 16], by: Option<&[u8; 16]>) -> Result<()> {
        let transaction = self.db.transaction()?;
        let sql = "UPDATE conversation SET standing = ?2, names = NULL, closed_by = ?3 WHERE sid = ?1";
        transaction.execute(sql, params![sid, Standing::Closed.code(), by])?;
        transaction.execute("DELETE FROM membership WHERE sid = ?1", [sid])?;
        transaction.execute("DELETE FROM chain WHERE sid = ?1", [sid])?;
        transaction.execute("DELETE FROM inbox WHERE sid = ?1 AND opened = 2", [sid])?;
        transaction.commit()?;
        self.flush_log()
    }
}

/// The codes of groups that go on, or may, as SQL lists them.
fn open_codes() -> String {
    let open = Standing::ALL.into_iter().filter(|standing| standing.is_open());
    open.map(|standing| standing.code().to_string()).collect::<Vec<_>>().join(", ")
}

fn members(db: &Connection, sid: &[u8; 16]) -> Result<Vec<GroupMember>> {
    let mut statement =
        db.prepare_cached("SELECT member, key, state FROM membership WHERE sid = ?1 ORDER BY member")?;
    let rows = statement.query_map([sid], |row| {
        let member = Member { id: row.get(0)?, key: row.get(1)? };
        Ok(Membership::from_code(row.get(2)?).map(|membership| GroupMember { member, membership }))
    })?;
    rows.collect::<rusqlite::Result<Option<Vec<_>>>>()?.ok_or(HomeStoreError::Damaged)
}

/// `None` if no ossicle wrote that. Without its members.
fn read_group(row: &Row<'_>) -> rusqlite::Result<Option<Group>> {
    let name = match row.get::<_, String>(1)?.as_str() {
        "" => Ok(None),
        name => Name::parse(name).map(Some),
    };
    let (Ok(name), Some(standing)) = (name, Standing::from_code(row.get(6)?)) else {
        return Ok(None);
    };
    let since: i64 = row.get(7)?;
    Ok(Some(Group {
        sid: row.get(0)?,
        name,
        number: row.get(2)?,
        creator: row.get(3)?,
        flags: row.get(4)?,
        signature: row.get(5)?,
        standing,
        since: since.unsigned_abs(),
        names: row.get(8)?,
        closed_by: row.get(9)?,
        version: row.get(10)?,
        members: Vec::new(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(sid: u8, name: &str) -> Group {
        let member = |id: u8, membership| GroupMember { member: Member { id: [id; 16], key: [id; 32] }, membership };
        Group {
            sid: [sid; 16],
            name: (!name.is_empty()).then(|| Name::parse(name).unwrap()),
            number: 1,
            creator: [1; 16],
            flags: 1,
            version: 3,
            signature: [sid; 64],
            standing: Standing::Founding,
            since: 1_700_000_000 + u64::from(sid),
            names: Some(vec![7; 117]),
            closed_by: None,
            members: vec![member(1, Membership::Accepted), member(2, Membership::Invited)],
        }
    }

    #[test]
    fn a_group_comes_back_as_it_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        let mut first = group(1, "Plans");
        assert!(store.put_group(&mut first).unwrap());
        assert_eq!((first.number, first.label()), (1, "Plans".to_owned()));
        drop(store);

        let mut store = HomeStore::open(&path).unwrap();
        assert_eq!(store.groups().unwrap(), [first.clone()]);
        // The same id under another name changes nothing.
        assert!(!store.put_group(&mut group(1, "others")).unwrap());
        assert_eq!(store.group(&[1; 16]).unwrap(), Some(first.clone()));

        assert!(store.set_membership(&[1; 16], &[2; 16], Membership::Accepted).unwrap());
        assert!(!store.set_membership(&[1; 16], &[2; 16], Membership::Accepted).unwrap());
        assert!(!store.set_membership(&[1; 16], &[3; 16], Membership::Accepted).unwrap(), "nobody is added");
        store.set_standing(&[1; 16], Standing::Accepted).unwrap();
        assert_eq!(store.said_under(&[1; 16]).unwrap(), None);
        store.set_said_under(&[1; 16], &[7; 32]).unwrap();
        assert_eq!(store.said_under(&[1; 16]).unwrap(), Some([7; 32]));
        let kept = store.group(&[1; 16]).unwrap().unwrap();
        assert_eq!((kept.standing, &kept.names), (Standing::Accepted, &None));
        assert_eq!(kept.others(&[1; 16]).map(|other| other.membership).collect::<Vec<_>>(), [Membership::Accepted]);
        assert_eq!(store.open_groups().unwrap(), 1);
        assert_eq!(store.groups_that_go_on().unwrap(), [kept]);
        for standing in Standing::ALL {
            store.set_standing(&[1; 16], standing).unwrap();
            let is_open = usize::from(standing.is_open());
            assert_eq!(store.groups_that_go_on().unwrap().len(), is_open, "{standing:?}");
            assert_eq!(usize::try_from(store.open_groups().unwrap()).unwrap(), is_open, "{standing:?}");
        }

        store.close_group(&[1; 16], Some(&[2; 16])).unwrap();
        let closed = store.group(&[1; 16]).unwrap().unwrap();
        assert_eq!((closed.standing, closed.closed_by, closed.members), (Standing::Closed, Some([2; 16]), vec![]));
        assert_eq!(store.open_groups().unwrap(), 0);
        assert!(!store.put_group(&mut group(1, "Plans")).unwrap(), "an id is never used again");
    }

    #[test]
    fn groups_of_one_name_are_told_apart_by_their_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let mut put = |sid, name| {
            let mut group = group(sid, name);
            assert!(store.put_group(&mut group).unwrap());
            group.label()
        };
        assert_eq!(put(1, "plans"), "plans");
        assert_eq!(put(2, "Plans"), "Plans~2");
        assert_eq!(put(3, "PLANS"), "PLANS~3");
        assert_eq!(put(4, "other"), "other");
        // Those without a name are known by their numbers alone.
        assert_eq!((put(5, ""), put(6, "")), ("~1".to_owned(), "~2".to_owned()));
        let found = |label| store.group_labelled(label).unwrap().map(|group| group.sid[0]);
        for (label, sid) in [("plans", 1), ("PLANS~2", 2), ("plans~3", 3), ("other", 4)] {
            assert_eq!(found(label), Some(sid), "{label}");
        }
        assert_eq!((found("~1"), found("~2"), found("~3")), (Some(5), Some(6), None));
        for label in ["plans~1", "plans~4", "plans~02", "plans~+2", "plans~", "~0", "~", "", "nobody"] {
            assert_eq!(found(label), None, "{label}");
        }
    }

    #[test]
    fn a_person_keeps_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let sql = "INSERT INTO peer (id, name, name_key, modulus, fingerprint) VALUES (?1, 'Bob', 'bob', ?2, ?3)";
        store.db.execute(sql, params![[2_u8; 16], [0_u8; 256], [2_u8; 32]]).unwrap();
        let mut first = group(1, "bob");
        assert!(store.put_group(&mut first).unwrap());
        assert_eq!(first.label(), "bob~2");
        let mut second = group(2, "bob");
        assert!(store.put_group(&mut second).unwrap());
        assert_eq!(second.label(), "bob~3");
    }

    #[test]
    fn what_no_ossicle_wrote_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        assert!(store.put_group(&mut group(1, "plans")).unwrap());
        for change in ["UPDATE conversation SET standing = 9", "UPDATE conversation SET name = 'a b', standing = 0"] {
            store.db.execute(change, []).unwrap();
            assert!(matches!(store.groups(), Err(HomeStoreError::Damaged)), "{change}");
        }
        store.db.execute_batch("UPDATE conversation SET name = 'plans'; UPDATE membership SET state = 5").unwrap();
        assert!(matches!(store.group(&[1; 16]), Err(HomeStoreError::Damaged)));
    }
}
