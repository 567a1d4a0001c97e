//! Whose identity key is whose: the number by which two people find out, and what a key signs that gives way to another.

use core::fmt;

use crate::crypto::{HASH_LEN, Secret, Statement, hash};
use crate::wire::{ID_LEN, Member};

const ROTATION_CONTEXT: &str = "ossicle rotate";
const POSSESSION_CONTEXT: &str = "ossicle rotate proof";
const SAFETY_LABEL: &[u8] = b"ossicle safety\0";
/// Further hashes over a member: whoever looks for a key with a given number pays for each of them each time.
const SAFETY_ROUNDS: u32 = 5200;
/// Groups of five digits for each of the two members.
const GROUPS: usize = 6;

/// What two people compare, by voice say, to be sure that each has pinned the other's key (PROTOCOL 8.5): 60 digits that
/// are the same for both, and others for any other pair of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SafetyNumber {
    groups: [u32; 2 * GROUPS],
}

impl SafetyNumber {
    /// The number of two members, whichever comes first.
    pub fn new(a: &Member, b: &Member) -> Self {
        let (first, second) = if a.id <= b.id { (a, b) } else { (b, a) };
        let mut groups = [0; 2 * GROUPS];
        let digits = digits_of(first).into_iter().chain(digits_of(second));
        for (to, from) in groups.iter_mut().zip(digits) {
            *to = from;
        }
        Self { groups }
    }

    /// The digits in groups of five: each is less than 100,000 and is shown with leading zeros.
    pub const fn groups(&self) -> &[u32; 2 * GROUPS] {
        &self.groups
    }
}

/// The groups with a space between them.
impl fmt::Display for SafetyNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, group) in self.groups.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            write!(f, "{space}{group:05}")?;
        }
        Ok(())
    }
}

/// One step in the life of an identity: a key and its successor (PROTOCOL 8.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// The client, whose id stays.
    pub id: [u8; ID_LEN],
    /// The fingerprint of the key that gives way.
    pub former: [u8; HASH_LEN],
    /// The fingerprint of the key that follows.
    pub next: [u8; HASH_LEN],
    /// How often the key was replaced, this time included.
    pub key_epoch: u32,
}

impl Rotation {
    /// What the *former* key signs, and peers verify who have pinned it.
    pub fn statement(&self) -> Statement {
        Statement::new(ROTATION_CONTEXT, self.hash())
    }

    /// What the *next* key signs, so that nobody takes over a key that he does not hold. Bound to the connection with this
    /// exporter, so that it is of no use anywhere else.
    pub fn possession(&self, exporter: &Secret<HASH_LEN>) -> Statement {
        Statement::new(POSSESSION_CONTEXT, hash(&[exporter.expose(), &self.hash()]))
    }

    fn hash(&self) -> [u8; HASH_LEN] {
        hash(&[&self.id, &self.former, &self.next, &self.key_epoch.to_be_bytes()])
    }
}

fn digits_of(member: &Member) -> [u32; GROUPS] {
    let mut digest: [u8; HASH_LEN] = hash(&[SAFETY_LABEL, &member.id, &member.key]);
    for _ in 0..SAFETY_ROUNDS {
        digest = hash(&[&digest, &member.key]);
    }
    let mut groups = [0; GROUPS];
    let (fives, _) = digest.as_chunks::<5>();
    for (to, from) in groups.iter_mut().zip(fives) {
        let [a, b, c, d, e] = *from;
        // Less than 100,000, so it fits.
        *to = u32::try_from(u64::from_be_bytes([0, 0, 0, a, b, c, d, e]) % 100_000).unwrap_or_default();
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec::Vec;

    use super::*;
    use crate::wire::testing::{printed, printed_array};

    const A: Member = Member { id: [1; 16], key: [2; 32] };
    const B: Member = Member { id: [3; 16], key: [4; 32] };

    // Computed apart, in another language.
    #[test]
    fn the_safety_number_is_that_of_the_specification() {
        let number = SafetyNumber::new(&A, &B).to_string();
        let groups: Vec<&str> = number.split(' ').collect();
        assert!(groups.len() == 12 && groups.iter().all(|group| group.len() == 5), "{number}");
        // The specification prints it in groups, which read as hexadecimal give their digits again.
        let digits: Vec<u8> = number.bytes().filter(u8::is_ascii_digit).collect();
        let packed: Vec<u8> = digits.chunks(2).map(|pair| (pair[0] - b'0') << 4 | (pair[1] - b'0')).collect();
        assert_eq!(packed, printed("15.3", "safety_number"));
    }

    // Computed apart, in another language.
    #[test]
    fn rotations_are_those_of_the_specification_and_every_field_counts() {
        let rotation = Rotation { id: A.id, former: A.key, next: B.key, key_epoch: 1 };
        let exporter = Secret::new([7; 32]);
        assert_eq!(rotation.statement().digest(), printed_array("15.3", "rotation_digest"));
        assert_eq!(rotation.possession(&exporter).digest(), printed_array("15.3", "possession_digest"));
        for other in [
            Rotation { id: B.id, ..rotation },
            Rotation { former: [9; 32], ..rotation },
            Rotation { next: [9; 32], ..rotation },
            Rotation { key_epoch: 2, ..rotation },
            Rotation { former: rotation.next, next: rotation.former, ..rotation },
        ] {
            assert_ne!(other.statement(), rotation.statement());
            assert_ne!(other.possession(&exporter), rotation.possession(&exporter));
        }
        assert_ne!(rotation.possession(&Secret::new([8; 32])), rotation.possession(&exporter));
    }

    #[test]
    fn both_sides_see_one_number_and_any_other_key_has_another() {
        let number = SafetyNumber::new(&A, &B);
        assert_eq!(number, SafetyNumber::new(&B, &A));
        assert!(number.groups().iter().all(|group| *group < 100_000));
        let other_key = Member { key: [5; 32], ..B };
        let other_id = Member { id: [4; 16], ..B };
        for other in [other_key, other_id] {
            let changed = SafetyNumber::new(&A, &other);
            // The own half stays as it was.
            assert_eq!(changed.groups()[..GROUPS], number.groups()[..GROUPS]);
            assert_ne!(changed.groups()[GROUPS..], number.groups()[GROUPS..]);
        }
    }
}
