//! Conversations of several in SQLite: the operations inside one transaction. What may be refused is decided before any
//! queue is touched.

use std::collections::{BTreeSet, HashSet};

use ossicle_core::direct_sid;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, ToSql, params};

use super::super::conversation::{Decision, decide, goes_with_its_conversation, invitation, is_told_of, names};
use super::super::{
    Announce, AnswerError, ChainError, ChainId, ClientId, CloseError, Closing, Conversation, ConversationId,
    FoundError, Founded, Founding, MAX_CONVERSATIONS, MAX_INVITATIONS, Member, MemberAnswer, MemberSignature,
    MemberState, NewItem, Notice, Refuse,
};
use super::queue::{self, Ledger};
use super::{Fault, time, to_time};

/// What version 6 adds to version 5.
pub(super) const TABLES: &str = "
CREATE TABLE conversation (
    sid BLOB PRIMARY KEY CHECK (length(sid) = 16),
    creator BLOB NOT NULL REFERENCES client (id),
    creator_only INTEGER NOT NULL,
    signature BLOB NOT NULL CHECK (length(signature) = 64),
    founded_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE member (
    sid BLOB NOT NULL REFERENCES conversation (sid),
    client BLOB NOT NULL REFERENCES client (id),
    state INTEGER NOT NULL CHECK (state BETWEEN 0 AND 4),
    signature BLOB CHECK (length(signature) = 64),
    PRIMARY KEY (sid, client)
) STRICT, WITHOUT ROWID;
CREATE INDEX member_client ON member (client);
CREATE INDEX member_invited ON member (sid) WHERE state = 0;
CREATE TABLE tombstone (
    sid BLOB PRIMARY KEY CHECK (length(sid) = 16),
    closed_at INTEGER NOT NULL,
    closed_by BLOB NOT NULL REFERENCES client (id)
) STRICT, WITHOUT ROWID;
CREATE INDEX chain_conversation ON chain (sid);
";

/// What version 9 adds: the invitations themselves, as long as they may be given again.
pub(super) const INVITATIONS: &str = "
CREATE TABLE invitation (
    sid BLOB NOT NULL,
    client BLOB NOT NULL,
    notice BLOB NOT NULL,
    PRIMARY KEY (sid, client),
    FOREIGN KEY (sid, client) REFERENCES member (sid, client)
) STRICT;
CREATE INDEX invitation_client ON invitation (client);
";

/// The chains of a conversation of several. Two of its members may have a chain under its id in no other: it cannot be
/// what two of them have between themselves.
const CHAINS: &str = "FROM chain WHERE sid = ?1
    AND sender IN (SELECT client FROM member WHERE sid = ?1) AND recipient IN (SELECT client FROM member WHERE sid = ?1)";

impl ToSql for MemberState {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let code: i64 = match self {
            Self::Invited => 0,
            Self::Accepted => 1,
            Self::Declined => 2,
            Self::Expired => 3,
            Self::Revoked => 4,
        };
        Ok(code.into())
    }
}

impl FromSql for MemberState {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_i64()? {
            0 => Ok(Self::Invited),
            1 => Ok(Self::Accepted),
            2 => Ok(Self::Declined),
            3 => Ok(Self::Expired),
            4 => Ok(Self::Revoked),
            other => Err(FromSqlError::OutOfRange(other)),
        }
    }
}

pub(super) fn found(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    founding: &Founding,
) -> Result<Founded, Fault<FoundError>> {
    let Founding { sid, creator, key_epoch, creator_only, signature, now, .. } = founding;
    let refused = |error| Err(Fault::Refused(error));
    if tombstone(db, sid)?.is_some() {
        return refused(FoundError::Closed);
    }
    let held = db
        .prepare_cached("SELECT creator, signature FROM conversation WHERE sid = ?")?
        .query_row([sid], |row| Ok((row.get::<_, ClientId>(0)?, row.get::<_, MemberSignature>(1)?)))
        .optional()?;
    if let Some(held) = held {
        return if held == (*creator, *signature) { Ok(Founded::Repeat) } else { refused(FoundError::InUse) };
    }
    if db.prepare_cached("SELECT 1 FROM chain WHERE sid = ?")?.exists([sid])? {
        return refused(FoundError::InUse);
    }
    let count = |sql: &str, values: &[&dyn ToSql]| -> rusqlite::Result<usize> {
        let count: i64 = db.prepare_cached(sql)?.query_row(values, |row| row.get(0))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    };
    let invited = || founding.invited.iter().map(|invitation| (invitation.client, invitation.key_epoch));
    for (client, key_epoch) in invited().chain([(*creator, *key_epoch)]) {
        let held = db
            .prepare_cached("SELECT key_epoch FROM client WHERE id = ? AND revoked_at IS NULL")?
            .query_row([client], |row| row.get::<_, u32>(0))
            .optional()?;
        match held {
            None => return refused(FoundError::Unknown),
            Some(held) if held != key_epoch => return refused(FoundError::KeyChanged),
            Some(_) => {}
        }
        let part = count("SELECT count(*) FROM member WHERE client = ? AND state IN (0, 1)", params![client])?;
        let unanswered = count(
            "SELECT count(*) FROM member JOIN conversation USING (sid) WHERE client = ? AND state = 0 AND creator = ?",
            params![client, creator],
        )?;
        if part >= MAX_CONVERSATIONS
            || unanswered >= MAX_INVITATIONS
            || (client != *creator && ledger.is_full_of_notices(&client))
        {
            return refused(FoundError::TooMany);
        }
    }
    db.prepare_cached(
        "INSERT INTO conversation (sid, creator, creator_only, signature, founded_at) VALUES (?, ?, ?, ?, ?)",
    )?
    .execute(params![sid, creator, creator_only, signature, to_time(*now)])?;
    let members = invited().map(|(client, _)| (client, MemberState::Invited));
    for (client, state) in members.chain([(*creator, MemberState::Accepted)]) {
        db.prepare_cached("INSERT INTO member (sid, client, state) VALUES (?, ?, ?)")?
            .execute(params![sid, client, state])?;
    }
    for invitation in &founding.invited {
        db.prepare_cached("INSERT INTO invitation (sid, client, notice) VALUES (?, ?, ?)")?.execute(params![
            sid,
            invitation.client,
            &*invitation.notice
        ])?;
    }
    tell(db, ledger, &founding.items())?;
    Ok(Founded::New)
}

/// Lets the invitations of a client wait for it once more, and returns whether any do.
pub(super) fn invite_again(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    client: &ClientId,
    now: u64,
) -> rusqlite::Result<bool> {
    let mut query = db.prepare_cached(
        "SELECT sid, creator, notice FROM invitation JOIN member USING (sid, client) JOIN conversation USING (sid)
         WHERE client = ? AND state IN (0, 1) ORDER BY state DESC, founded_at, sid",
    )?;
    let item = |row: &Row<'_>| {
        let notice: Vec<u8> = row.get(2)?;
        Ok(invitation(&row.get(0)?, *client, row.get(1)?, notice.into(), now))
    };
    let items: Vec<_> = query.query_map([client], item)?.collect::<Result<_, _>>()?;
    Ok(!tell(db, ledger, &items)?.is_empty())
}

pub(super) fn look_up(db: &Connection, sid: &ConversationId) -> rusqlite::Result<Option<Conversation>> {
    // One look at all of the tables.
    let _one_look = db.unchecked_transaction()?;
    if let Some((at, by)) = tombstone(db, sid)? {
        return Ok(Some(Conversation::Closed { at, by }));
    }
    let Some((creator, creator_only, at)) = open(db, sid)? else { return Ok(None) };
    Ok(Some(Conversation::Open { creator, creator_only, at, members: members(db, sid)? }))
}

pub(super) fn answer(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    answer: &MemberAnswer,
    announce: &Announce,
) -> Result<Vec<ClientId>, Fault<AnswerError>> {
    let MemberAnswer { sid, member, signature, now, .. } = *answer;
    if tombstone(db, &sid)?.is_some() {
        return Err(Fault::Refused(AnswerError::Closed));
    }
    let (Some((_, _, invited_at)), Some((state, held))) = (open(db, &sid)?, membership(db, &sid, &member)?) else {
        return Err(Fault::Refused(AnswerError::NotMember));
    };
    let (state, joins) = match decide(answer, state, held.as_ref(), invited_at).map_err(Fault::Refused)? {
        Decision::Same => return Ok(Vec::new()),
        Decision::Now(state) => (state, false),
        Decision::Joins => (MemberState::Accepted, true),
    };
    let mut items = Vec::new();
    if joins {
        let before = members(db, &sid)?.into_iter().filter(|other| other.state == MemberState::Accepted);
        for Member { client, state, signature } in before {
            if signature.is_some() && client != member {
                items.extend(announce.item(&Notice::Changed { sid, member: client, state, signature }, member, now));
            }
        }
    }
    items.extend(change(db, &sid, &member, (state, Some(signature)), now, announce)?);
    Ok(tell(db, ledger, &items)?)
}

pub(super) fn close(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    (sid, by, signature): (&ConversationId, &ClientId, &MemberSignature),
    now: u64,
    refuse: &Refuse,
    announce: &Announce,
) -> Result<Closing, Fault<CloseError>> {
    if tombstone(db, sid)?.is_some() {
        return Err(Fault::Refused(CloseError::Closed));
    }
    let (Some((creator, creator_only, _)), Some((state, _))) = (open(db, sid)?, membership(db, sid, by)?) else {
        return Err(Fault::Refused(CloseError::NotMember));
    };
    if state != MemberState::Accepted || (creator_only && creator != *by) {
        return Err(Fault::Refused(CloseError::Forbidden));
    }
    let members = members(db, sid)?;
    let mut query = db.prepare_cached(&format!("SELECT DISTINCT id {CHAINS} ORDER BY id"))?;
    let chains: Vec<ChainId> = query.query_map([sid], |row| row.get(0))?.collect::<Result<_, _>>()?;
    drop(query);
    db.prepare_cached(&format!("DELETE {CHAINS}"))?.execute([sid])?;
    db.prepare_cached("DELETE FROM invitation WHERE sid = ?")?.execute([sid])?;
    db.prepare_cached("DELETE FROM member WHERE sid = ?")?.execute([sid])?;
    db.prepare_cached("DELETE FROM conversation WHERE sid = ?")?.execute([sid])?;
    db.prepare_cached("INSERT INTO tombstone (sid, closed_at, closed_by) VALUES (?, ?, ?)")?.execute(params![
        sid,
        to_time(now),
        by
    ])?;

    let ids = members.iter().map(|member| &member.client);
    let gone: HashSet<_> = chains.iter().copied().chain(names(sid, ids)).collect();
    let notice = Notice::Closed { sid: *sid, by: *by, signature: *signature };
    let (mut refusals, mut notices) = (Vec::new(), Vec::new());
    for Member { client, state, .. } in &members {
        let withdrawn = queue::withdraw(db, ledger, client, |entry| {
            goes_with_its_conversation(entry.kind) && gone.contains(&entry.chain)
        })?;
        refusals
            .extend(withdrawn.iter().filter(|item| is_told_of(item)).filter_map(|item| refuse.refusal(client, item)));
        if *state != MemberState::Declined && client != by {
            notices.extend(announce.item(&notice, *client, now));
        }
    }
    refusals.append(&mut notices);
    Ok(Closing { chains, told: tell(db, ledger, &refusals)? })
}

pub(super) fn expire(
    db: &Connection,
    ledger: &mut Ledger<'_>,
    (before, limit): (u64, usize),
    now: u64,
    announce: &Announce,
) -> rusqlite::Result<(usize, Vec<ClientId>)> {
    let mut query = db.prepare_cached(
        "SELECT sid, client FROM member JOIN conversation USING (sid) WHERE state = 0 AND founded_at < ? LIMIT ?",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let found = query.query_map([to_time(before), limit], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let expired: Vec<(ConversationId, ClientId)> = found.collect::<Result<_, _>>()?;
    drop(query);
    let mut items = Vec::new();
    for (sid, member) in &expired {
        items.extend(change(db, sid, member, (MemberState::Expired, None), now, announce)?);
    }
    Ok((expired.len(), tell(db, ledger, &items)?))
}

/// What the conversations of a revoked client are to be told.
pub(super) fn revoke(
    db: &Connection,
    client: &ClientId,
    now: u64,
    announce: &Announce,
) -> rusqlite::Result<Vec<NewItem>> {
    let mut query = db.prepare_cached("SELECT sid FROM member WHERE client = ? AND state IN (0, 1)")?;
    let sids: Vec<ConversationId> = query.query_map([client], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let mut items = Vec::new();
    for sid in &sids {
        items.extend(change(db, sid, client, (MemberState::Revoked, None), now, announce)?);
    }
    Ok(items)
}

/// Whether `sender` may have a chain to `recipient` in this conversation.
pub(super) fn admit_chain(
    db: &Connection,
    sender: &ClientId,
    sid: &ConversationId,
    recipient: &ClientId,
) -> Result<(), Fault<ChainError>> {
    if *sid == direct_sid(sender, recipient, 0) {
        return Ok(());
    }
    if tombstone(db, sid)?.is_some() {
        return Err(Fault::Refused(ChainError::Closed));
    }
    if open(db, sid)?.is_none() {
        return Ok(());
    }
    for client in [sender, recipient] {
        if !matches!(membership(db, sid, client)?, Some((MemberState::Accepted, _))) {
            return Err(Fault::Refused(ChainError::NotMember));
        }
    }
    Ok(())
}

/// Whether a chain between these two under this id is one of a conversation of several.
pub(super) fn is_of_group(
    db: &Connection,
    sender: &ClientId,
    sid: &ConversationId,
    recipient: &ClientId,
) -> rusqlite::Result<bool> {
    Ok(membership(db, sid, sender)?.is_some() && membership(db, sid, recipient)?.is_some())
}

/// Puts a member into another state, and returns what the others who accepted are to be told.
fn change(
    db: &Connection,
    sid: &ConversationId,
    member: &ClientId,
    (state, signature): (MemberState, Option<MemberSignature>),
    now: u64,
    announce: &Announce,
) -> rusqlite::Result<Vec<NewItem>> {
    db.prepare_cached("UPDATE member SET state = ?, signature = ? WHERE sid = ? AND client = ?")?
        .execute(params![state, signature, sid, member])?;
    if !matches!(state, MemberState::Invited | MemberState::Accepted) {
        db.prepare_cached("DELETE FROM invitation WHERE sid = ? AND client = ?")?.execute(params![sid, member])?;
    }
    let notice = Notice::Changed { sid: *sid, member: *member, state, signature };
    let mut query = db.prepare_cached("SELECT client FROM member WHERE sid = ? AND state = 1 AND client <> ?")?;
    let others = query.query_map([sid, member], |row| row.get(0))?;
    others.filter_map(|other| other.map(|other| announce.item(&notice, other, now)).transpose()).collect()
}

/// Lets items wait, and returns for whom, each once. Whoever was revoked meanwhile need not know.
pub(super) fn tell(db: &Connection, ledger: &mut Ledger<'_>, items: &[NewItem]) -> rusqlite::Result<Vec<ClientId>> {
    let puts = queue::put(db, ledger, items)?.into_iter().zip(items);
    let told: BTreeSet<_> = puts.filter(|(put, _)| put.is_ok()).map(|(_, item)| item.recipient).collect();
    Ok(told.into_iter().collect())
}

fn tombstone(db: &Connection, sid: &ConversationId) -> rusqlite::Result<Option<(u64, ClientId)>> {
    db.prepare_cached("SELECT closed_at, closed_by FROM tombstone WHERE sid = ?")?
        .query_row([sid], |row| Ok((time(row, 0)?, row.get(1)?)))
        .optional()
}

/// Who founded an open conversation, whether nobody else may close it, and when.
fn open(db: &Connection, sid: &ConversationId) -> rusqlite::Result<Option<(ClientId, bool, u64)>> {
    db.prepare_cached("SELECT creator, creator_only, founded_at FROM conversation WHERE sid = ?")?
        .query_row([sid], |row| Ok((row.get(0)?, row.get(1)?, time(row, 2)?)))
        .optional()
}

fn membership(
    db: &Connection,
    sid: &ConversationId,
    client: &ClientId,
) -> rusqlite::Result<Option<(MemberState, Option<MemberSignature>)>> {
    db.prepare_cached("SELECT state, signature FROM member WHERE sid = ? AND client = ?")?
        .query_row([sid, client], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

fn members(db: &Connection, sid: &ConversationId) -> rusqlite::Result<Vec<Member>> {
    let member = |row: &Row<'_>| Ok(Member { client: row.get(0)?, state: row.get(1)?, signature: row.get(2)? });
    db.prepare_cached("SELECT client, state, signature FROM member WHERE sid = ? ORDER BY client")?
        .query_map([sid], member)?
        .collect()
}
