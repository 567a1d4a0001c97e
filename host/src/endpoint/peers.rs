//! Who a peer is: the directory proposes, the pin decides.
//!
//! A peer is pinned when it is first met, under its id, its name and its identity key. Afterwards an answer of the
//! directory, or a wrap, that does not fit the pin is refused, and said so loudly: nothing is sent, until a person has
//! accepted the other key. Bundles count only under the signature of the pinned key, and never go back.

use std::collections::HashSet;

use ossicle_core::{
    Bundle, BundleError, BundleView, DirectoryEntry, Member, PublicKey, Reason, SafetyNumber, SignedBundle,
};
use tokio::sync::mpsc;

use super::Failure;
use super::agent::Notice;
use super::local::{PinnedKey, Verification};
use crate::crypto::verify;
use crate::name::Name;
use crate::store::home::{HomeStore, Peer};

/// Alarms that are remembered, so that each is raised once.
const MAX_RAISED: usize = 64;

/// Says to a person what he must not miss: to the reader of this home, or to the log where nobody reads.
pub(super) struct Alarm {
    notices: Option<mpsc::UnboundedSender<Notice>>,
    raised: HashSet<String>,
}

impl Alarm {
    /// Without a reader, for the log.
    pub(super) fn new(reader: Option<mpsc::UnboundedSender<Notice>>) -> Self {
        Self { notices: reader, raised: HashSet::new() }
    }

    /// The key of this peer changed, and nobody has accepted that.
    fn key_changed(&mut self, name: &str, detail: &str) {
        if self.raised.len() >= MAX_RAISED {
            self.raised.clear();
        }
        if !self.raised.insert(name.to_owned()) {
            return;
        }
        match &self.notices {
            Some(notices) => drop(notices.send(Notice::KeyChanged { name: name.to_owned() })),
            None => tracing::error!("{detail}"),
        }
    }

    /// The key of this peer changed, and the former one signed that.
    pub(super) fn key_followed(&mut self, name: &str) {
        match &self.notices {
            Some(notices) => drop(notices.send(Notice::KeyFollowed { name: name.to_owned() })),
            None => tracing::warn!(
                "{name} has a new identity key, which the former one signed: the safety number has changed, compare \
                 it with `ossicle verify`"
            ),
        }
    }

    /// A person has seen to it: should it happen again, it is said again.
    pub(super) fn settled(&mut self) {
        self.raised.clear();
    }
}

/// Why a peer, or its bundle, is not used.
pub(super) enum Rejected {
    /// Its key is not the pinned one: a person has to see that.
    Changed { name: String, detail: String },
    /// It does not fit, and this is what both sides are told.
    For { reason: Reason, detail: Option<String> },
    /// The home failed.
    Home(Failure),
}

impl Rejected {
    /// What both sides are told, after the alarm was raised where there is one.
    pub(super) fn told(self, alarm: &mut Alarm) -> Result<(Reason, Option<String>), Failure> {
        match self {
            Self::Changed { name, detail } => {
                alarm.key_changed(&name, &detail);
                Ok((Reason::KeyChanged, Some(detail)))
            }
            Self::For { reason, detail } => Ok((reason, detail)),
            Self::Home(failure) => Err(failure),
        }
    }
}

impl From<crate::store::home::HomeStoreError> for Rejected {
    fn from(error: crate::store::home::HomeStoreError) -> Self {
        Self::Home(error.into())
    }
}

fn because(reason: Reason, detail: impl Into<String>) -> Rejected {
    Rejected::For { reason, detail: Some(detail.into()) }
}

fn malformed() -> Rejected {
    because(Reason::Malformed, "the server's directory gave an answer that makes no sense")
}

/// The pinned peer that a directory entry is about; pins it if it is met for the first time.
pub(super) fn admit(store: &HomeStore, entry: &DirectoryEntry<'_>, asked: Option<&Name>) -> Result<Peer, Rejected> {
    match compare(store, entry, asked)? {
        Compared::Pinned(peer) => Ok(peer),
        Compared::New(peer) => {
            store.put_peer(&peer)?;
            Ok(peer)
        }
        Compared::Changed { shown, .. } => Err(changed(&shown.name)),
    }
}

/// What a directory entry says, beside what is pinned.
enum Compared {
    /// It is the pinned peer.
    Pinned(Peer),
    /// Nobody is pinned under this id or name.
    New(Peer),
    /// The pinned id has another key, or the pinned name another id.
    Changed { pinned: Peer, shown: Peer },
}

fn compare(store: &HomeStore, entry: &DirectoryEntry<'_>, asked: Option<&Name>) -> Result<Compared, Rejected> {
    let key = entry.modulus.and_then(|modulus| PublicKey::from_modulus(modulus).ok()).ok_or_else(malformed)?;
    let name = Name::parse(entry.name).map_err(|_| malformed())?;
    if asked.is_some_and(|asked| *asked != name) {
        return Err(malformed());
    }
    let shown = Peer {
        id: entry.id,
        name: name.as_str().to_owned(),
        name_key: name.key().to_owned(),
        modulus: key.modulus().to_vec(),
        fingerprint: key.fingerprint(),
        key_epoch: entry.key_epoch,
        bundle: None,
    };
    Ok(match store.peer(&entry.id)? {
        Some(pinned) if pinned.name_key != shown.name_key => {
            return Err(because(
                Reason::KeyChanged,
                format!("the server now calls {} {name}: ask both whether that is right", pinned.name),
            ));
        }
        Some(pinned) if pinned.fingerprint == shown.fingerprint => Compared::Pinned(pinned),
        Some(pinned) => Compared::Changed { pinned, shown },
        None => match store.peer_by_name(&shown.name_key)? {
            Some(pinned) => Compared::Changed { pinned, shown },
            None => Compared::New(shown),
        },
    })
}

/// What a person compares to know whose key is pinned; with `accept` the key that the directory shows is pinned instead,
/// unless it has shown the person another one before: that is what was compared, and a directory may change its mind in
/// between. Returns the id of the peer that it replaced, too.
pub(super) fn verification(
    store: &mut HomeStore,
    me: &Member,
    entry: &DirectoryEntry<'_>,
    asked: &Name,
    accept: bool,
) -> Result<(Verification, Option<[u8; 16]>), Rejected> {
    let view = |peer: &Peer| PinnedKey {
        id: peer.id,
        fingerprint: peer.fingerprint,
        safety_number: SafetyNumber::new(me, &peer.member()).to_string(),
    };
    let of = |pinned: &Peer, shown: Option<&Peer>, accepted| Verification {
        name: pinned.name.clone(),
        pinned: view(pinned),
        shown: shown.map(view),
        accepted,
    };
    match compare(store, entry, Some(asked))? {
        Compared::Pinned(peer) => Ok((of(&peer, None, false), None)),
        Compared::New(peer) => {
            store.put_peer(&peer)?;
            Ok((of(&peer, None, false), None))
        }
        Compared::Changed { pinned, shown } => {
            let was_shown = store.shown(&pinned.id)?;
            let accepted = accept && was_shown.is_none_or(|former| former == shown.member());
            if accepted {
                store.replace_peer(&pinned.id, &shown)?;
            } else {
                store.put_shown(&pinned.id, &shown.member())?;
            }
            Ok((of(&pinned, Some(&shown), accepted), accepted.then_some(pinned.id)))
        }
    }
}

fn changed(name: &str) -> Rejected {
    let detail = format!("KEY CHANGED: the identity key of {name} is not the one that was pinned");
    Rejected::Changed { name: name.to_owned(), detail }
}

/// Reads a bundle, verifies it under the peer's pinned key and against what was seen before, and takes note of it in
/// `peer`, which the caller stores.
pub(super) fn check_bundle(peer: &mut Peer, signed: &SignedBundle<'_>) -> Result<Bundle, Rejected> {
    let unreadable = |what: &str| because(Reason::Unreadable, format!("the bundle of {} {what}", peer.name));
    let bundle = Bundle::decode(signed.bundle).map_err(|_| unreadable("makes no sense"))?;
    let mut view = match peer.view() {
        Some(view) if view.epoch == bundle.epoch && view.hash == bundle.hash() => return Ok(bundle),
        Some(view) => view,
        None => BundleView::new(&bundle),
    };
    if bundle.member() != peer.member() || !verify(&peer.modulus, &bundle.statement(), signed.signature) {
        return Err(unreadable("is not signed by its identity key"));
    }
    if let Err(error) = view.update(&bundle) {
        if error == BundleError::Forked {
            tracing::error!("two different bundles of {} exist for epoch {}: somebody cheats", peer.name, bundle.epoch);
        }
        return Err(unreadable(&format!("is refused: {error}")));
    }
    peer.bundle = Some((view.epoch, view.hash));
    Ok(bundle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ossicle_core::PeerStatus;

    #[test]
    fn only_the_key_that_was_shown_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = HomeStore::open(&directory.path().join("home.db")).unwrap();
        let me = Member { id: [9; 16], key: [9; 32] };
        let name = Name::parse("bob").unwrap();
        // Moduli as `PublicKey` takes them: 2048 bits, odd.
        let moduli: Vec<Vec<u8>> = (1..=3).map(|n| [&[0xc0 | n; 255][..], &[1]].concat()).collect();
        let mut ask = |id: u8, key: usize, accept| {
            let entry = DirectoryEntry {
                id: [id; 16],
                name: "bob",
                key_epoch: 0,
                record_limit: 1024,
                status: PeerStatus::Online,
                modulus: Some(&moduli[key]),
                bundle: None,
            };
            let Ok((verified, replaced)) = verification(&mut store, &me, &entry, &name, accept) else {
                panic!("a pin")
            };
            assert_eq!(verified.accepted, replaced.is_some());
            (verified.shown.is_some(), verified.accepted)
        };
        assert_eq!(ask(1, 0, false), (false, false), "pinned");
        // Looked at, and accepted; the next one was never shown.
        assert_eq!(ask(1, 1, false), (true, false));
        assert_eq!(ask(1, 1, true), (true, true));
        assert_eq!(ask(1, 2, true), (true, true));
        // One key is shown, and compared; then the directory has another.
        assert_eq!(ask(1, 0, false), (true, false));
        assert_eq!(ask(1, 1, true), (true, false));
        assert_eq!(ask(1, 2, true), (false, false), "still the pinned one");
        // That one was shown now. Under another id the same key is somebody else.
        assert_eq!(ask(2, 1, true), (true, false));
        assert_eq!(ask(2, 1, true), (true, true));
        assert_eq!(ask(2, 1, false), (false, false));
    }
}
