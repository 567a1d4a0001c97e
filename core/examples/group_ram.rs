//! How much memory the chains of a group take: `cargo run -p ossicle-core --example group_ram`.
//!
//! The figures are those of a device: nothing in the types is a pointer, and nothing is on the heap.

use std::io::{self, Write};

use ossicle_core::{ClientGroup, GroupChains, Member, SendingChain};

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    let own = GroupChains::<0>::LEN;
    let other = GroupChains::<1>::LEN - own;
    writeln!(out, "own chain: {own} B (chain, signing and receipt keys, context, id, number, epoch)")?;
    writeln!(
        out,
        "another's: {other} B (chain, verification and receipt keys, context, id, number, epochs, last salt)"
    )?;
    for (members, len) in [
        (3, GroupChains::<2>::LEN),
        (5, GroupChains::<4>::LEN),
        (16, GroupChains::<15>::LEN),
        (64, GroupChains::<63>::LEN),
    ] {
        writeln!(out, "a group of {members}: {len} B")?;
    }
    writeln!(out, "beside it, for each other member: {} B (id and pinned key)", size_of::<Member>())?;
    writeln!(
        out,
        "all of a device's group of five, with what is known of its members: {} B",
        size_of::<ClientGroup>()
    )?;
    writeln!(out, "for comparison, the sending end of a direct conversation: {} B", size_of::<SendingChain>())
}
