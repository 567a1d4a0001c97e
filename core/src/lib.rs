//! x
#![no_std]
mod crypto;
mod error;
#[cfg(test)]
extern crate std;
