//! x
pub mod crypto;
pub mod name;
pub mod store;
