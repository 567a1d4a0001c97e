//! See the module of the same name in `ossicle_fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ossicle_fuzz::device::run(data, &mut ossicle_fuzz::ignore));
