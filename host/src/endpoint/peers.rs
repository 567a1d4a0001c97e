//! Who a peer is: the directory proposes, the pin decides.
//!
//! A peer is pinned when it is first met, under its id, its name and its identity key. Afterwards an answer of the
//! directory, or a wrap, that does not fit the pin is refused, and said so loudly: nothing is sent. Bundles count only
//! under the signature of the pinned key, and never go back.

use ossicle_core::{Bundle, BundleError, BundleView, DirectoryEntry, PublicKey, Reason, SignedBundle};

use super::Failure;
use crate::crypto::verify;
use crate::name::Name;
use crate::store::home::{HomeStore, Peer};

/// Why a peer, or its bundle, is not used.
pub(super) enum Rejected {
    /// It does not fit, and this is what both sides are told.
    For { reason: Reason, detail: Option<String> },
    /// The home failed.
    Home(Failure),
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
    let key = entry.modulus.and_then(|modulus| PublicKey::from_modulus(modulus).ok()).ok_or_else(malformed)?;
    let name = Name::parse(entry.name).map_err(|_| malformed())?;
    if asked.is_some_and(|asked| *asked != name) {
        return Err(malformed());
    }
    if let Some(pinned) = store.peer(&entry.id)? {
        if pinned.modulus != key.modulus() {
            return Err(changed(&name));
        }
        if pinned.name_key != name.key() {
            return Err(because(
                Reason::KeyChanged,
                format!("the server now calls {} {name}: ask both whether that is right", pinned.name),
            ));
        }
        return Ok(pinned);
    }
    if store.peer_by_name(name.key())?.is_some() {
        return Err(changed(&name));
    }
    let peer = Peer {
        id: entry.id,
        name: name.as_str().to_owned(),
        name_key: name.key().to_owned(),
        modulus: key.modulus().to_vec(),
        fingerprint: key.fingerprint(),
        bundle: None,
    };
    store.put_peer(&peer)?;
    Ok(peer)
}

fn changed(name: &Name) -> Rejected {
    let detail = format!("the identity key of {name} is not the one that was pinned: ask {name} what happened");
    tracing::error!("KEY CHANGED: {detail}");
    because(Reason::KeyChanged, detail)
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
    if bundle.id == peer.id && bundle.key != peer.fingerprint {
        let detail =
            format!("the identity key of {0} is not the one that was pinned: ask {0} what happened", peer.name);
        tracing::error!("KEY CHANGED: {detail}");
        return Err(because(Reason::KeyChanged, detail));
    }
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
