//! Two ends of one direction, driven by a script: what was sealed opens, and nothing else does.

use super::{MAX_RECORDS, RecordKey, Traffic};
use crate::crypto::{RustCrypto, Secret, stub};
use crate::error::{Error, PeerError};
use crate::wire::{HEADER_LEN, Header, RECORD_OVERHEAD, Reader, RecordType};

/// Bytes of the longest record that a script seals.
const ROOM: usize = 1024;

/// Runs the script `data` and tells `reached` by name what it came to. Its first byte chooses the stub (bit 0); each step
/// is a byte and its operands.
pub fn run(data: &[u8], reached: &mut dyn FnMut(&'static str)) {
    let mut script = Reader::new(data);
    let Ok(mode) = script.u8() else { return };
    let is_stub = mode & 1 != 0;
    stub::danger_set(is_stub);
    let mut sealing = Traffic::<RustCrypto>::new(Secret::new([7; 32]));
    let mut opening = Traffic::<RustCrypto>::new(Secret::new([7; 32]));
    while step(&mut script, &mut sealing, &mut opening, is_stub, reached).is_ok() {}
    stub::danger_set(false);
}

fn step(
    script: &mut Reader<'_>,
    sealing: &mut Traffic<RustCrypto>,
    opening: &mut Traffic<RustCrypto>,
    is_stub: bool,
    reached: &mut dyn FnMut(&'static str),
) -> Result<(), Error> {
    match script.u8()? % 6 {
        0 => {
            let payload = script.short()?;
            let mut record = [0; ROOM];
            let Some(record) = seal(&mut sealing.key, payload, &mut record, reached) else { return Ok(()) };
            check_header(record, &opening.key);
            assert_eq!(opening.key.open(record).as_deref(), Ok(payload), "what was sealed opens");
            reached("record opened");
        }
        1 => {
            let (bit, payload) = (usize::from(script.u16()?), script.short()?);
            // Sealed again afterwards under the same number, which only a test may do: both ends stay in step.
            let counter = sealing.key.counter;
            let mut record = [0; ROOM];
            let Some(record) = seal(&mut sealing.key, payload, &mut record, reached) else { return Ok(()) };
            sealing.key.counter = counter;
            let bit = bit % (record.len() * 8);
            if let Some(byte) = record.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
            let opened = opening.key.open(record).map(|_| ());
            if is_stub {
                opening.key.counter = counter;
            } else {
                assert_eq!(opened, Err(Error::Crypto), "bit {bit} was changed");
                // Behind the header, which a payload may look like.
                let body = record.get(HEADER_LEN..).unwrap_or_default();
                assert!(payload.len() < 8 || !body.windows(payload.len()).any(|text| text == payload), "no plaintext");
                assert_eq!(opening.key.counter(), counter, "no step");
                reached("change refused");
            }
        }
        2 => {
            sealing.update();
            opening.update();
            reached("key updated");
        }
        3 => {
            let bytes = script.short()?;
            let mut record = [0; ROOM];
            let Some(record) = record.get_mut(..bytes.len()) else { return Ok(()) };
            record.copy_from_slice(bytes);
            if let Some(head) = bytes.first_chunk::<HEADER_LEN>()
                && let Ok(header) = Header::decode(*head)
            {
                assert_eq!(header.encode(), *head, "a header has one form");
                reached("header decoded");
            }
            let counter = opening.key.counter();
            match opening.key.open(record) {
                Ok(_) => {
                    assert!(is_stub, "nobody has the key");
                    sealing.key.counter = opening.key.counter;
                    reached("forgery opened under the stub");
                }
                Err(error) => {
                    assert!(matches!(error, Error::Decode | Error::Crypto | Error::Peer(PeerError::Exhausted)));
                    assert_eq!(opening.key.counter(), counter, "no step");
                    reached("forgery refused");
                }
            }
        }
        4 => {
            // Near the end, where a script would otherwise never come.
            let counter = MAX_RECORDS - u64::from(script.u8()?);
            (sealing.key.counter, opening.key.counter) = (counter, counter);
        }
        _ => {
            let (room, payload) = (usize::from(script.u8()?), script.short()?);
            let mut out = [0; ROOM];
            let Some(out) = out.get_mut(..room) else { return Ok(()) };
            let len = payload.len().saturating_add(RECORD_OVERHEAD);
            let counter = sealing.key.counter();
            if room < len && counter < MAX_RECORDS {
                let refused = sealing.key.seal(RecordType::Application, out, payload.len());
                assert!(matches!(refused, Err(Error::Buffer(_))), "{refused:?}");
                assert_eq!(sealing.key.counter(), counter, "no step");
                reached("no room");
            }
        }
    }
    Ok(())
}

/// Seals `payload`, or finds that the key has sealed all that it may.
fn seal<'r>(
    key: &mut RecordKey<RustCrypto>,
    payload: &[u8],
    room: &'r mut [u8; ROOM],
    reached: &mut dyn FnMut(&'static str),
) -> Option<&'r mut [u8]> {
    room.get_mut(HEADER_LEN..)?.get_mut(..payload.len())?.copy_from_slice(payload);
    match key.seal(RecordType::Application, room, payload.len()) {
        Ok(len) => {
            assert_eq!(len, payload.len() + RECORD_OVERHEAD);
            room.get_mut(..len)
        }
        Err(error) => {
            assert_eq!(error, Error::Peer(PeerError::Exhausted));
            assert_eq!(key.counter(), MAX_RECORDS);
            assert_eq!(key.open(&mut [0; 64]), Err(error), "nor does it open any more");
            reached("key exhausted");
            None
        }
    }
}

fn check_header(record: &[u8], key: &RecordKey<RustCrypto>) {
    let header = record.first_chunk().map(|head| Header::decode(*head));
    assert!(
        matches!(header, Some(Ok(header)) if usize::from(header.len) == record.len() && key.expects(header.sequence))
    );
}
