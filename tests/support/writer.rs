//! What `power/writer.rs` and who checks it agree on.

/// Clients; the last takes nothing.
pub const CLIENTS: u8 = 4;
/// Senders at once.
pub const SENDERS: u8 = 16;

/// The chain of a sender for a recipient.
pub fn chain_of(round: u32, sender: u8, recipient: u8) -> [u8; 8] {
    let [a, b, c, d] = round.to_be_bytes();
    [a, b, c, d, 0, 0, sender, recipient]
}

/// What a message of a chain holds: 256 bytes or a few more, or a few pages.
pub fn bytes_of(chain: [u8; 8], n: u32) -> Vec<u8> {
    let len = if n % 64 == 63 { 9000 } else { 256 + (n % 7) as usize };
    chain.into_iter().chain(n.to_be_bytes()).cycle().take(len).collect()
}
