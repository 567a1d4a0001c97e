//! Letters at rest: what this client has been given to send and what is not settled yet.
//!
//! A letter is durable before it leaves, together with the envelope that it leaves as, so that a later process sends the
//! same bytes again. What is kept of its chain (PROTOCOL 10.4) verifies receipts and brings the wrap again; it seals
//! nothing. A letter that came to its end is erased. Of one to a group is kept how far it came with each member, and a
//! member who has to be written to alone is sent a letter of his own, which names the one that it is for.

use ossicle_core::{Reason, ReceiptVerifier, Rung};
use rusqlite::{Connection, OptionalExtension, Row, params};
use zeroize::Zeroizing;

use super::{HomeStore, HomeStoreError, Result, seconds};

/// Letters that a home keeps until they are settled.
pub const MAX_LETTERS: u64 = 10_000;
/// Bytes of the letters that a home keeps.
pub const MAX_LETTER_BYTES: u64 = 64 * 1024 * 1024;

/// Letters whose end is remembered, for who asks again and does not know it: the latest.
pub const MAX_SETTLED: u64 = 1024;

/// What whoever gave a letter calls it, at random: given again under the same, it is the same letter.
pub type LetterId = [u8; 16];

/// How far a letter came, or why not further.
pub type Outcome = core::result::Result<Rung, Reason>;

/// A letter at rest, without its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// Its place among all letters of this home, in the order in which they were given. Never used again.
    pub row: i64,
    /// What whoever gave it calls it.
    pub id: LetterId,
    /// The recipient's name, as it was given; what the group is called, if it goes to one.
    pub to: String,
    /// The group that it goes to, or that the letter of its own goes to a member of.
    pub sid: Option<[u8; 16]>,
    /// Of one that brings a letter to a group to one member alone: the row of that letter, and the member.
    pub parent: Option<(i64, [u8; 16])>,
    /// Bytes of its text.
    pub len: u64,
    /// Whether it carries this client's signature.
    pub signed: bool,
    /// How far it must come.
    pub until: Rung,
    /// How far it came.
    pub reached: Option<Rung>,
    /// New chains that it has cost.
    pub tries: u8,
    /// When it was given, in seconds since 1970.
    pub time: u64,
    /// Chain, number and salt of the envelope that it leaves as.
    pub sealed: Option<([u8; 8], u32, [u8; 8])>,
}

/// What is kept of a chain that letters were sealed in.
#[derive(Clone)]
pub struct LetterChain {
    /// The group that receives it, all who accepted together; then there is a wrap for each, and none here.
    pub sid: Option<[u8; 16]>,
    /// Who receives it, if it is one.
    pub peer: [u8; 16],
    /// What verifies its receipts.
    pub receipts: ReceiptVerifier,
    /// What gave it to its recipient, sealed.
    pub wrap: Vec<u8>,
    /// The bundle of this client that the wrap was made under.
    pub bundle: Vec<u8>,
    /// The signature over that.
    pub signature: Vec<u8>,
}

/// How far a letter to a group came with one of its members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LetterPart {
    /// How far it came.
    pub reached: Option<Rung>,
    /// Why not further.
    pub refused: Option<Reason>,
    /// Whether a letter of its own brings it to this member.
    pub own: bool,
}

/// One change of what is kept.
pub enum LetterChange {
    /// A new letter, which is not sealed yet, and its text.
    Keep(Letter, Zeroizing<Vec<u8>>),
    /// A chain that letters are sealed in.
    Chain(LetterChain),
    /// A letter leaves as this envelope.
    Seal {
        /// The letter.
        row: i64,
        /// Its chain.
        chain: [u8; 8],
        /// Its number there.
        n: u32,
        /// Its salt.
        salt: [u8; 8],
        /// The envelope.
        envelope: Vec<u8>,
    },
    /// How far a letter to a group came with this member.
    Part(i64, [u8; 16], LetterPart),
    /// This member of a group gets a chain that all have together, with this wrap.
    Wrap {
        /// The chain.
        chain: [u8; 8],
        /// The member.
        member: [u8; 16],
        /// The wrap.
        wrap: Vec<u8>,
    },
    /// With whom a letter to a group came how far is forgotten: it goes to all of them again.
    Whole(i64),
    /// A letter has to be sealed anew.
    Unseal {
        /// The letter.
        row: i64,
        /// New chains that it has cost.
        tries: u8,
    },
    /// A letter came so far, or (`None`) nobody knows any more whether it did. The text of one that is delivered is erased.
    Reach(i64, Option<Rung>),
    /// A letter came to its end, which is remembered.
    Settle {
        /// The letter.
        row: i64,
        /// Its name.
        id: LetterId,
        /// Its end.
        outcome: Outcome,
    },
    /// Nothing that is known of this chain is needed any more.
    Forget([u8; 8]),
}

impl HomeStore {
    /// The letters that are kept, in their order, and the row of the next one.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn letters(&self) -> Result<(Vec<Letter>, i64)> {
        let sql =
            "SELECT row, name, length(body), signed, until, reached, tries, time, chain, n, salt, id, sid, parent,
                   member FROM letter ORDER BY row";
        let mut statement = self.db.prepare(sql)?;
        let rows = statement.query_map([], read_letter)?;
        let letters = rows.collect::<rusqlite::Result<Option<Vec<_>>>>()?.ok_or(HomeStoreError::Damaged)?;
        let sql = "SELECT seq + 1 FROM sqlite_sequence WHERE name = 'letter'";
        let next = self.db.query_row(sql, [], |row| row.get(0)).optional()?;
        Ok((letters, next.unwrap_or(1)))
    }

    /// Letters that came to their end, the latest last.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn settled_letters(&self) -> Result<Vec<(LetterId, Outcome)>> {
        let mut statement = self.db.prepare("SELECT id, reached, reason FROM settled ORDER BY place")?;
        let rows = statement.query_map([], |row| {
            let (id, reached, reason) = (row.get(0)?, row.get::<_, Option<u8>>(1)?, row.get::<_, Option<u8>>(2)?);
            let outcome = match (reached.map(Rung::from_code), reason.map(Reason::from_code)) {
                (Some(Some(rung)), None) => Ok(rung),
                (None, Some(Some(reason))) => Err(reason),
                _ => return Ok(None),
            };
            Ok(Some((id, outcome)))
        })?;
        rows.collect::<rusqlite::Result<Option<Vec<_>>>>()?.ok_or(HomeStoreError::Damaged)
    }

    /// What is kept of the chains of letters. Chains of no letter are erased.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn letter_chains(&self) -> Result<Vec<LetterChain>> {
        self.db
            .execute("DELETE FROM letter_chain WHERE id NOT IN (SELECT chain FROM letter WHERE chain NOT NULL)", [])?;
        self.db.execute("DELETE FROM letter_wrap WHERE chain NOT IN (SELECT id FROM letter_chain)", [])?;
        let mut statement = self.db.prepare("SELECT peer, receipts, wrap, bundle, signature, sid FROM letter_chain")?;
        let mut rows = statement.query([])?;
        let mut chains = Vec::new();
        while let Some(row) = rows.next()? {
            let receipts = Zeroizing::new(row.get::<_, Vec<u8>>(1)?);
            let receipts = ReceiptVerifier::decode(&receipts).map_err(|_| HomeStoreError::Damaged)?;
            let (peer, wrap) = (row.get(0)?, row.get(2)?);
            let (bundle, signature, sid) = (row.get(3)?, row.get(4)?, row.get(5)?);
            chains.push(LetterChain { sid, peer, receipts, wrap, bundle, signature });
        }
        Ok(chains)
    }

    /// The wraps of a chain that the members of a group have together, by member.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn letter_wraps(&self, chain: &[u8; 8]) -> Result<Vec<([u8; 16], Vec<u8>)>> {
        let mut statement = self.db.prepare_cached("SELECT member, wrap FROM letter_wrap WHERE chain = ?1")?;
        let rows = statement.query_map([chain], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// With whom a letter to a group came how far, of those whom it was sealed for.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn letter_parts(&self, row: i64) -> Result<Vec<([u8; 16], LetterPart)>> {
        let sql = "SELECT member, reached, reason, own FROM letter_part WHERE letter = ?1";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map([row], |row| {
            let (reached, reason): (Option<u8>, Option<u8>) = (row.get(1)?, row.get(2)?);
            let (reached, refused) = match (reached.map(Rung::from_code), reason.map(Reason::from_code)) {
                (Some(None), _) | (_, Some(None)) => return Ok(None),
                (reached, refused) => (reached.flatten(), refused.flatten()),
            };
            Ok(Some((row.get(0)?, LetterPart { reached, refused, own: row.get(3)? })))
        })?;
        rows.collect::<rusqlite::Result<Option<Vec<_>>>>()?.ok_or(HomeStoreError::Damaged)
    }

    /// The text of a letter.
    ///
    /// # Errors
    /// [`HomeStoreError::Damaged`] if there is no such letter.
    pub fn letter_body(&self, row: i64) -> Result<Zeroizing<Vec<u8>>> {
        let found =
            self.db.prepare_cached("SELECT body FROM letter WHERE row = ?1")?.query_row([row], |row| row.get(0));
        found.optional()?.map(Zeroizing::new).ok_or(HomeStoreError::Damaged)
    }

    /// The envelope that a letter leaves as.
    ///
    /// # Errors
    /// [`HomeStoreError::Damaged`] if there is no such letter, or it is not sealed.
    pub fn letter_envelope(&self, row: i64) -> Result<Vec<u8>> {
        let sql = "SELECT envelope FROM letter WHERE row = ?1";
        let found = self.db.prepare_cached(sql)?.query_row([row], |row| row.get::<_, Option<Vec<u8>>>(0));
        found.optional()?.flatten().ok_or(HomeStoreError::Damaged)
    }

    /// Makes these changes durable, in their order: all or none.
    ///
    /// # Errors
    /// [`HomeStoreError`].
    pub fn change_letters(&mut self, changes: &[LetterChange]) -> Result<()> {
        let transaction = self.db.transaction()?;
        for change in changes {
            make(&transaction, change)?;
        }
        Ok(transaction.commit()?)
    }
}

fn make(db: &Connection, change: &LetterChange) -> Result<()> {
    match change {
        LetterChange::Keep(letter, body) => {
            let sql = "INSERT INTO letter (row, name, body, signed, until, tries, time, id, sid, parent, member)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
            let Letter { row, id, to, signed, until, tries, time, sid, parent, .. } = letter;
            let ((parent, member), time) = (parent.unzip(), seconds(*time));
            let values = params![row, to, body.as_slice(), signed, until.code(), tries, time, id, sid, parent, member];
            db.prepare_cached(sql)?.execute(values)?;
        }
        LetterChange::Chain(chain) => {
            let sql = "INSERT INTO letter_chain (id, peer, receipts, wrap, bundle, signature, sid)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
            let LetterChain { sid, peer, receipts, wrap, bundle, signature } = chain;
            let secret = receipts.encode();
            let values = params![receipts.chain_id(), peer, secret.expose(), wrap, bundle, signature, sid];
            db.prepare_cached(sql)?.execute(values)?;
        }
        LetterChange::Seal { row, chain, n, salt, envelope } => {
            let sql = "UPDATE letter SET chain = ?2, n = ?3, salt = ?4, envelope = ?5 WHERE row = ?1";
            db.prepare_cached(sql)?.execute(params![row, chain, n, salt, envelope])?;
        }
        LetterChange::Part(row, member, LetterPart { reached, refused, own }) => {
            let sql = "INSERT OR REPLACE INTO letter_part (letter, member, reached, reason, own)
                       VALUES (?1, ?2, ?3, ?4, ?5)";
            let values = params![row, member, reached.map(Rung::code), refused.map(Reason::code), own];
            db.prepare_cached(sql)?.execute(values)?;
        }
        LetterChange::Wrap { chain, member, wrap } => {
            let sql = "INSERT OR REPLACE INTO letter_wrap (chain, member, wrap) VALUES (?1, ?2, ?3)";
            db.prepare_cached(sql)?.execute(params![chain, member, wrap])?;
        }
        LetterChange::Whole(row) => {
            db.prepare_cached("DELETE FROM letter_part WHERE letter = ?1")?.execute([row])?;
        }
        LetterChange::Unseal { row, tries } => {
            let sql = "UPDATE letter SET chain = NULL, n = NULL, salt = NULL, envelope = NULL, reached = NULL,
                       tries = ?2 WHERE row = ?1";
            db.prepare_cached(sql)?.execute(params![row, tries])?;
        }
        LetterChange::Reach(row, rung) => {
            // What was delivered is not sent again, so nothing of it stays on the disk.
            let sql = "UPDATE letter SET reached = ?2, body = CASE WHEN ?2 >= 3 THEN x'' ELSE body END,
                       envelope = CASE WHEN ?2 >= 3 THEN x'' ELSE envelope END WHERE row = ?1";
            db.prepare_cached(sql)?.execute(params![row, rung.map(Rung::code)])?;
        }
        LetterChange::Settle { row, id, outcome } => {
            db.prepare_cached("DELETE FROM letter WHERE row = ?1")?.execute([row])?;
            db.prepare_cached("DELETE FROM letter_part WHERE letter = ?1")?.execute([row])?;
            let (reached, reason) = (outcome.ok().map(Rung::code), outcome.err().map(Reason::code));
            let sql = "INSERT INTO settled (id, reached, reason) VALUES (?1, ?2, ?3)";
            db.prepare_cached(sql)?.execute(params![id, reached, reason])?;
            let last = db.last_insert_rowid().saturating_sub_unsigned(MAX_SETTLED);
            db.prepare_cached("DELETE FROM settled WHERE place <= ?1")?.execute([last])?;
        }
        LetterChange::Forget(chain) => {
            db.prepare_cached("DELETE FROM letter_chain WHERE id = ?1")?.execute([chain])?;
            db.prepare_cached("DELETE FROM letter_wrap WHERE chain = ?1")?.execute([chain])?;
        }
    }
    Ok(())
}

/// `None` if no ossicle wrote that.
fn read_letter(row: &Row<'_>) -> rusqlite::Result<Option<Letter>> {
    let time: i64 = row.get(7)?;
    let (until, reached): (u8, Option<u8>) = (row.get(4)?, row.get(5)?);
    let reached = match reached.map(Rung::from_code) {
        Some(None) => return Ok(None),
        reached => reached.flatten(),
    };
    let sealed = match (row.get(8)?, row.get(9)?, row.get(10)?) {
        (Some(chain), Some(n), Some(salt)) => Some((chain, n, salt)),
        _ => None,
    };
    let (to, len, signed, tries) = (row.get(1)?, row.get::<_, i64>(2)?.unsigned_abs(), row.get(3)?, row.get(6)?);
    let parent = match (row.get(13)?, row.get(14)?) {
        (Some(parent), Some(member)) => Some((parent, member)),
        _ => None,
    };
    let (row, id, sid) = (row.get(0)?, row.get(11)?, row.get(12)?);
    let time = time.unsigned_abs();
    let letter = |until| Letter { row, id, to, sid, parent, len, signed, until, reached, tries, time, sealed };
    Ok(Rung::from_code(until).map(letter))
}

#[cfg(test)]
mod tests {
    use getrandom::SysRng;
    use ossicle_core::{Conversation, Member, SendingChain};

    use super::*;

    fn name(row: i64) -> LetterId {
        [u8::try_from(row).unwrap(); 16]
    }

    fn settle(row: i64) -> LetterChange {
        LetterChange::Settle { row, id: name(row), outcome: Ok(Rung::Delivered) }
    }

    fn letter(row: i64) -> Letter {
        Letter {
            row,
            id: name(row),
            to: "bob".into(),
            sid: None,
            parent: None,
            len: 4,
            signed: true,
            until: Rung::Delivered,
            reached: None,
            tries: 0,
            time: 1_700_000_000,
            sealed: None,
        }
    }

    fn keep(row: i64) -> LetterChange {
        LetterChange::Keep(letter(row), Zeroizing::new(b"text".to_vec()))
    }

    fn chain() -> LetterChain {
        let (alice, bob) = (Member { id: [1; 16], key: [1; 32] }, Member { id: [2; 16], key: [2; 32] });
        let sealing = SendingChain::start(&alice, &Conversation::direct(&alice, &bob, 0), 0, &mut SysRng).unwrap();
        let (wrap, bundle, signature) = (vec![3; 244], vec![4; 184], vec![5; 256]);
        LetterChain { sid: None, peer: bob.id, receipts: sealing.receipts().clone(), wrap, bundle, signature }
    }

    fn seal(row: i64, chain: [u8; 8], n: u32) -> LetterChange {
        LetterChange::Seal { row, chain, n, salt: [7; 8], envelope: vec![8; 41] }
    }

    #[test]
    fn letters_come_back_as_they_were_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        assert_eq!(store.letters().unwrap(), (vec![], 1));
        let chain = chain();
        let id = *chain.receipts.chain_id();
        let changes = [keep(1), keep(2), LetterChange::Chain(chain.clone()), seal(2, id, 9)];
        store.change_letters(&changes).unwrap();
        store.change_letters(&[LetterChange::Reach(2, Some(Rung::Stored))]).unwrap();
        drop(store);

        let mut store = HomeStore::open(&path).unwrap();
        let sealed = Letter { sealed: Some((id, 9, [7; 8])), reached: Some(Rung::Stored), ..letter(2) };
        assert_eq!(store.letters().unwrap(), (vec![letter(1), sealed], 3));
        assert_eq!(
            (store.letter_body(1).unwrap().as_slice(), store.letter_envelope(2).unwrap()),
            (&b"text"[..], vec![8; 41])
        );
        assert!(matches!(store.letter_envelope(1), Err(HomeStoreError::Damaged)));
        assert!(matches!(store.letter_body(4), Err(HomeStoreError::Damaged)));
        let chains = store.letter_chains().unwrap();
        assert_eq!((chains.len(), chains[0].peer, *chains[0].receipts.chain_id()), (1, [2; 16], id));
        assert_eq!(chains[0].receipts.encode().expose(), chain.receipts.encode().expose());

        store.change_letters(&[keep(3), seal(3, id, 10), LetterChange::Reach(3, Some(Rung::Delivered))]).unwrap();
        assert!(store.letter_body(3).unwrap().is_empty() && store.letter_envelope(3).unwrap().is_empty());
        store.change_letters(&[settle(3)]).unwrap();

        // Sealed anew it is as it was given, but for what that cost; a number is given once.
        store.change_letters(&[LetterChange::Unseal { row: 2, tries: 1 }, settle(1)]).unwrap();
        assert_eq!(store.letters().unwrap(), (vec![Letter { tries: 1, ..letter(2) }], 4));
        assert!(store.letter_chains().unwrap().is_empty());
        store.change_letters(&[settle(2)]).unwrap();
        assert_eq!(store.letters().unwrap(), (vec![], 4));
    }

    #[test]
    fn a_letter_to_a_group_is_kept_with_what_became_of_it_with_each_member() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        let chain = LetterChain { sid: Some([9; 16]), wrap: vec![], ..chain() };
        let id = *chain.receipts.chain_id();
        let of_group = |row| Letter { sid: Some([9; 16]), to: "plans".into(), ..letter(row) };
        let own = Letter { sid: Some([9; 16]), parent: Some((1, [3; 16])), ..letter(2) };
        let text = || Zeroizing::new(b"text".to_vec());
        let wrap = |member: u8| LetterChange::Wrap { chain: id, member: [member; 16], wrap: vec![member; 244] };
        let part =
            |member, reached, refused, own| LetterChange::Part(1, [member; 16], LetterPart { reached, refused, own });
        let changes = [
            LetterChange::Keep(of_group(1), text()),
            LetterChange::Chain(chain),
            wrap(2),
            wrap(3),
            seal(1, id, 0),
            part(2, None, None, false),
            part(3, None, None, true),
            part(2, Some(Rung::Delivered), None, false),
            part(4, None, Some(Reason::QueueFull), false),
            LetterChange::Keep(own.clone(), text()),
        ];
        store.change_letters(&changes).unwrap();
        drop(store);

        let mut store = HomeStore::open(&path).unwrap();
        let sealed = Letter { sealed: Some((id, 0, [7; 8])), ..of_group(1) };
        assert_eq!(store.letters().unwrap().0, [sealed, own]);
        assert_eq!(store.letter_chains().unwrap()[0].sid, Some([9; 16]));
        assert_eq!(store.letter_wraps(&id).unwrap(), [([2; 16], vec![2; 244]), ([3; 16], vec![3; 244])]);
        let part = |reached, refused, own| LetterPart { reached, refused, own };
        let parts = [
            ([2; 16], part(Some(Rung::Delivered), None, false)),
            ([3; 16], part(None, None, true)),
            ([4; 16], part(None, Some(Reason::QueueFull), false)),
        ];
        assert_eq!(store.letter_parts(1).unwrap(), parts);
        store.change_letters(&[LetterChange::Whole(1)]).unwrap();
        assert!(store.letter_parts(1).unwrap().is_empty());
        store.change_letters(&[settle(1), LetterChange::Forget(id)]).unwrap();
        assert!(store.letter_wraps(&id).unwrap().is_empty());
        assert_eq!(store.letters().unwrap().0.len(), 1);
    }

    #[test]
    fn the_latest_ends_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("home.db");
        let mut store = HomeStore::open(&path).unwrap();
        let outcomes = [Ok(Rung::Delivered), Err(Reason::Expired)];
        let ends: Vec<(LetterId, Outcome)> =
            (0..MAX_SETTLED + 3).map(|i| (u128::from(i).to_be_bytes(), outcomes[usize::from(i % 2 == 0)])).collect();
        let changes: Vec<_> =
            ends.iter().map(|(id, outcome)| LetterChange::Settle { row: 1, id: *id, outcome: *outcome }).collect();
        store.change_letters(&changes).unwrap();
        drop(store);
        assert_eq!(HomeStore::open(&path).unwrap().settled_letters().unwrap(), ends[3..]);
    }

    #[test]
    fn changes_are_made_together_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        assert!(store.change_letters(&[keep(1), keep(1)]).is_err());
        assert!(store.letters().unwrap().0.is_empty());
        store.change_letters(&[keep(1), keep(2), seal(1, [1; 8], 0)]).unwrap();
        assert!(store.change_letters(&[settle(2), seal(2, [1; 8], 0)]).is_ok());
        let twice = [keep(3), keep(4), seal(3, [1; 8], 1), seal(4, [1; 8], 1)];
        assert!(store.change_letters(&twice).is_err(), "two letters are never one message");
        assert_eq!(store.letters().unwrap().0.len(), 1);
    }
}
