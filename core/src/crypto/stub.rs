//! Cryptography without any security, so that a fuzzer gets past it and reaches the states behind.
//!
//! It exists under `--cfg fuzzing` only, which is no feature and which the compiler refuses for images and for ordinary
//! release builds (see the root), and even there nothing uses it before a fuzz target has said so. Every tag, MAC,
//! signature and shared secret is then a constant: an input passes a check where it holds the constant, and is refused
//! where it does not, so that both ways stay open to a mutation. Hashes stay what they are.

use core::sync::atomic::{AtomicBool, Ordering};

use super::{HASH_LEN, SIGNATURE_LEN, TAG_LEN};

/// The tag of whatever is sealed.
pub const TAG: [u8; TAG_LEN] = [0x54; TAG_LEN];
/// Every MAC.
pub const MAC: [u8; HASH_LEN] = [0x4d; HASH_LEN];
/// Every Ed25519 signature.
pub const SIGNATURE: [u8; SIGNATURE_LEN] = [0x53; SIGNATURE_LEN];
/// What every agreement, extraction and expansion gives.
pub(super) const SHARED: u8 = 0x44;
/// Every encapsulated key.
pub(super) const ENCAPSULATED: [u8; HASH_LEN] = [0x45; HASH_LEN];

static ON: AtomicBool = AtomicBool::new(false);

/// Puts the stub in the place of all cryptography of this process, or takes it away.
pub fn danger_set(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

pub(super) fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}
