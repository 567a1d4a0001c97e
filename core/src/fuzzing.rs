//! What fuzz targets need beyond the public API: the stub in the place of cryptography, and bodies that reach into a room.
//!
//! Exists under `--cfg fuzzing` only. The targets themselves are in `tests/fuzz`, which says how to run them.

pub use crate::crypto::stub::{
    MAC as STUB_MAC, SIGNATURE as STUB_SIGNATURE, TAG as STUB_TAG, danger_set as danger_stub_crypto,
};
pub use crate::page::fuzzing::finish as finish_page;
pub use crate::record::fuzzing::run as records;
