//! Identity keys that follow others: this client's own, and those of peers.
//!
//! The new key of a home lies beside the present one, as `identity.new.pem`, and its bundle beside the present bundle,
//! until the server has said which of the two it holds: by `Done`, or by whom it lets in. The order of writing is such that
//! after a crash at any point one of them still opens the home: new key file, its bundle, `Rotate`; then the state, which
//! names the key that counts, and only then the file takes the place of the former one.

use std::sync::Arc;

use getrandom::SysRng;
use ossicle_core::{BundleKeys, DirectoryEntry, PublicKey, Rotation};

use super::agent::Pending;
use super::outbox::member;
use super::{Failure, Home};
use crate::crypto::{IdentityKey, KeyError, verify};
use crate::store::home::{HomeStore, HomeStoreError, OwnKeys, Peer, SuccessorKeys};

/// Steps that are followed at once. Who replaces his key every week needs five years for as many.
const MAX_STEPS: u32 = 256;

/// Makes the key that [`super::Request::Rotate`] is about, durably, unless an earlier attempt did.
///
/// # Errors
/// [`Failure`] if there is no identity, or the file cannot be written.
pub async fn prepare_rotation(home: &Home, bits: usize) -> Result<(), Failure> {
    home.profile()?;
    let path = home.next_identity();
    if path.exists() {
        return Ok(());
    }
    let made = tokio::task::spawn_blocking(move || match IdentityKey::generate(bits)?.save(&path) {
        // Somebody else was faster: his key is as good.
        Ok(()) | Err(KeyError::Exists { .. }) => Ok(()),
        Err(error) => Err(error),
    });
    Ok(made.await.map_err(|_| Failure::refused("the new identity key cannot be made"))??)
}

/// The key of a rotation whose outcome is not known, if there is one.
pub(super) fn pending(home: &Home, store: &HomeStore) -> Result<Option<Arc<IdentityKey>>, Failure> {
    let Some(offered) = store.successor()? else {
        return Ok(None);
    };
    let key = home.next_key()?.filter(|key| key.fingerprint() == offered.bundle.key);
    Ok(key.map(Arc::new))
}

/// The bundle under the key that is to follow, made durable; the same again for the same key, since the server may have it.
pub(super) fn successor_keys(
    store: &HomeStore,
    own: &OwnKeys,
    id: [u8; 16],
    key: &IdentityKey,
) -> Result<SuccessorKeys, Failure> {
    let next = member(id, key.fingerprint());
    let previous = own.bundle.hash();
    if let Some(offered) = store.successor()?
        && offered.bundle.member() == next
        && offered.bundle.previous == previous
    {
        return Ok(offered);
    }
    let used_up = || Failure::refused("this client has used up its epochs: make a new identity");
    let epoch = own.bundle.epoch.checked_add(1).ok_or_else(used_up)?;
    let prekey_id = own.bundle.prekey_id.checked_add(1).ok_or_else(used_up)?;
    let sick = |_| Failure::refused("no keys can be made: is there randomness on this system?");
    let keys = BundleKeys::generate(prekey_id, &mut SysRng).map_err(sick)?;
    let bundle = keys.bundle(&next, epoch, previous);
    let successor = SuccessorKeys { signature: key.sign(&bundle.statement())?, keys, bundle };
    store.put_successor(&successor)?;
    Ok(successor)
}

/// From the pinned key of a peer, step by step, to the one that the directory shows.
pub(super) struct Walk {
    /// The fingerprint of the key that was pinned when it began.
    from: [u8; 32],
    /// As it will be pinned if all goes well: its key is the last one that was proved.
    peer: Peer,
    /// The key epoch and the modulus that the directory shows.
    goal: (u32, Vec<u8>),
    /// The directory's answer, which is looked at again at the end.
    pub(super) answer: Vec<u8>,
    /// What the directory was asked for.
    pub(super) then: Pending,
}

impl Walk {
    /// Whether what the directory shows may be a later key of a pinned peer.
    pub(super) fn is_due(store: &HomeStore, entry: &DirectoryEntry<'_>) -> Result<Option<Peer>, HomeStoreError> {
        let Some(modulus) = entry.modulus else {
            return Ok(None);
        };
        let pinned = store.peer(&entry.id)?;
        Ok(pinned.filter(|pinned| {
            let steps = entry.key_epoch.checked_sub(pinned.key_epoch);
            pinned.modulus != modulus && steps.is_some_and(|steps| (1..=MAX_STEPS).contains(&steps))
        }))
    }

    pub(super) fn new(pinned: Peer, entry: &DirectoryEntry<'_>, answer: Vec<u8>, then: Pending) -> Self {
        let goal = (entry.key_epoch, entry.modulus.unwrap_or_default().to_vec());
        Self { from: pinned.fingerprint, peer: Peer { bundle: None, ..pinned }, goal, answer, then }
    }

    /// Whose successor is wanted next: id and key epoch.
    pub(super) const fn next(&self) -> ([u8; 16], u32) {
        (self.peer.id, self.peer.key_epoch)
    }

    /// Takes a step, if the key before signed it and the last one leads to the key that the directory shows.
    pub(super) fn step(&mut self, modulus: &[u8], signature: &[u8]) -> bool {
        let (Ok(key), Some(key_epoch)) = (PublicKey::from_modulus(modulus), self.peer.key_epoch.checked_add(1)) else {
            return false;
        };
        let rotation = Rotation { id: self.peer.id, former: self.peer.fingerprint, next: key.fingerprint(), key_epoch };
        if key_epoch == self.goal.0 && modulus != self.goal.1 {
            return false;
        }
        if !verify(&self.peer.modulus, &rotation.statement(), signature) {
            return false;
        }
        self.peer.modulus = modulus.to_vec();
        self.peer.fingerprint = rotation.next;
        self.peer.key_epoch = key_epoch;
        true
    }

    /// Whether the key from which it began is still the pinned one: another walk, or a person, may have been faster.
    pub(super) fn is_current(&self, store: &HomeStore) -> Result<bool, HomeStoreError> {
        Ok(store.peer(&self.peer.id)?.is_some_and(|pinned| pinned.fingerprint == self.from))
    }

    /// The peer under the key that it has reached, once that is the directory's.
    pub(super) fn arrived(&self) -> Option<&Peer> {
        (self.peer.key_epoch == self.goal.0).then_some(&self.peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Name;

    fn peer(key: &IdentityKey, key_epoch: u32) -> Peer {
        let (fingerprint, bundle) = (key.fingerprint(), Some((3, [3; 32])));
        Peer { fingerprint, key_epoch, bundle, ..peer_of(key.modulus().to_vec()) }
    }

    fn peer_of(modulus: Vec<u8>) -> Peer {
        let (name, name_key) = ("bob".to_owned(), "bob".to_owned());
        Peer { id: [1; 16], name, name_key, modulus, fingerprint: [0; 32], key_epoch: 0, bundle: None }
    }

    fn signed(by: &IdentityKey, next: &IdentityKey, key_epoch: u32) -> Vec<u8> {
        let rotation = Rotation { id: [1; 16], former: by.fingerprint(), next: next.fingerprint(), key_epoch };
        by.sign(&rotation.statement()).unwrap()
    }

    fn entry(id: [u8; 16], key_epoch: u32, modulus: Option<&[u8]>) -> DirectoryEntry<'_> {
        let status = ossicle_core::PeerStatus::Online;
        DirectoryEntry { id, name: "bob", key_epoch, record_limit: 1024, status, modulus, bundle: None }
    }

    fn walk(pinned: Peer, key_epoch: u32, shown: &IdentityKey) -> Walk {
        let (replies, _) = tokio::sync::mpsc::unbounded_channel();
        let then = Pending::Verify { name: Name::parse("bob").unwrap(), accept: false, replies };
        Walk::new(pinned, &entry([1; 16], key_epoch, Some(shown.modulus())), Vec::new(), then)
    }

    #[test]
    fn every_step_is_signed_by_the_key_before_it() {
        let keys: Vec<IdentityKey> = (0..3).map(|_| IdentityKey::generate(2048).unwrap()).collect();
        let [first, second, third] = &keys[..] else { unreachable!() };
        let to_second = signed(first, second, 1);
        let to_third = signed(second, third, 2);

        let mut bob = walk(peer(first, 0), 2, third);
        assert_eq!(bob.next(), ([1; 16], 0));
        assert!(bob.step(second.modulus(), &to_second));
        assert!(bob.arrived().is_none());
        assert_eq!(bob.next(), ([1; 16], 1));
        assert!(bob.step(third.modulus(), &to_third));
        assert_eq!(bob.arrived(), Some(&Peer { bundle: None, ..peer(third, 2) }));

        // A step left out, another key than the signed one, no signature, one by the new key itself.
        let from_first =
            |shown: &IdentityKey, signature: &[u8]| walk(peer(first, 0), 1, shown).step(shown.modulus(), signature);
        assert!(from_first(second, &to_second));
        assert!(!from_first(third, &to_third) && !from_first(third, &to_second));
        assert!(!from_first(second, &[]) && !from_first(second, &signed(second, second, 1)));
        // A right step to another key than the one that the directory shows.
        assert!(!walk(peer(first, 0), 1, third).step(second.modulus(), &to_second));
        // Another epoch, another client, a key that is none.
        assert!(!walk(peer(first, 1), 2, second).step(second.modulus(), &to_second));
        let other = Peer { id: [2; 16], ..peer(first, 0) };
        assert!(!walk(other, 1, second).step(second.modulus(), &to_second));
        assert!(!walk(peer(first, 0), 2, third).step(&[1; 128], &to_second));
        assert!(!walk(peer(first, u32::MAX), u32::MAX, second).step(second.modulus(), &to_second));
        // A former key again: what it once signed, or was signed, leads nowhere from the present one.
        for former in [first, second] {
            for replayed in [&to_second, &to_third] {
                assert!(!walk(peer(third, 2), 3, former).step(former.modulus(), replayed));
            }
        }
    }

    #[test]
    fn only_later_keys_of_a_pinned_peer_are_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let pinned = Peer { key_epoch: 5, ..peer_of(vec![5; 256]) };
        store.put_peer(&pinned).unwrap();
        let key = IdentityKey::generate(2048).unwrap();
        assert!(walk(pinned.clone(), 6, &key).is_current(&store).unwrap());
        let other = Peer { fingerprint: [9; 32], ..pinned };
        assert!(!walk(other, 6, &key).is_current(&store).unwrap());
        let due = |id, key_epoch, modulus: Option<&[u8]>| {
            let status = ossicle_core::PeerStatus::Online;
            let entry =
                DirectoryEntry { id, name: "bob", key_epoch, record_limit: 1024, status, modulus, bundle: None };
            Walk::is_due(&store, &entry).unwrap().is_some()
        };
        let other: Option<&[u8]> = Some(&[6; 256]);
        assert!(due([1; 16], 6, other) && due([1; 16], 5 + MAX_STEPS, other));
        // Not newer, too far, the pinned key, no key, nobody who is pinned.
        assert!(!due([1; 16], 5, other) && !due([1; 16], 4, other) && !due([1; 16], 6 + MAX_STEPS, other));
        assert!(!due([1; 16], 6, Some(&[5; 256])) && !due([1; 16], 6, None) && !due([2; 16], 6, other));
    }
}
