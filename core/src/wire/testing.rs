//! The bytes that PROTOCOL.md prints, for the tests that hold it true.

use std::vec::Vec;

const TEXT: &str = include_str!("../../PROTOCOL.md");

/// The value of this name in the section of this number.
pub(crate) fn printed(section: &str, name: &str) -> Vec<u8> {
    let mut lines = TEXT
        .lines()
        .skip_while(|line| !(line.starts_with('#') && line.split(' ').nth(1) == Some(section)))
        .skip(1)
        .take_while(|line| !line.starts_with('#'))
        .skip_while(|line| line.split(' ').next() != Some(name));
    let first = lines.next().unwrap_or_else(|| panic!("PROTOCOL {section} has no {name}"));
    let more = lines.take_while(|line| line.starts_with(' ')).map(str::trim);
    let digits: Vec<_> = first.split_whitespace().skip(1).chain(more).flat_map(str::bytes).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).expect("hexadecimal"))
        .collect()
}

/// The same, of a length that is known.
pub(crate) fn printed_array<const N: usize>(section: &str, name: &str) -> [u8; N] {
    printed(section, name).try_into().unwrap_or_else(|_| panic!("PROTOCOL {section}: {name} has another length"))
}
