//! A page's checksum stands between a fuzzer and all that is behind it.

use super::{HEAD_LEN, checksum};

/// Writes the head that fits the body in `page`, so that it is the body that decides whether this is a page.
pub fn finish(page: &mut [u8]) {
    let Ok(page_len) = u16::try_from(page.len()) else { return };
    let Some((head, body)) = page.split_first_chunk_mut::<HEAD_LEN>() else { return };
    let [l1, l0] = page_len.to_be_bytes();
    let [c3, c2, c1, c0] = checksum(page_len, body).to_be_bytes();
    // Of either version; what is neither becomes the first.
    let version = if head.get(8..10) == Some(&[0, 2]) { 2 } else { 1 };
    *head = [b'O', b'S', b'S', b'I', b'C', b'L', b'E', 0, 0, version, l1, l0, c3, c2, c1, c0];
}
