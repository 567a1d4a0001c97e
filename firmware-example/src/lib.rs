//! A sensor that is a full member of an Ossicle network, written once for every place it runs in.
//!
//! Here is what does not know the chip: [`net`] turns any Ethernet device into a byte stream, and the
//! application stands on any such stream. The board comes in from `main.rs`; `ossicle demo` and the tests
//! bring a host instead. It refuses `unsafe`, a heap and everything that names a chip.

#![no_std]
#![forbid(unsafe_code)]

pub mod net;
