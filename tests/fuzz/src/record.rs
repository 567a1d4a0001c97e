//! Records, sealed and opened in step, changed, forged, short of room and at the end of a key. The body is in the core,
//! beside what it drives.

use ossicle_core::fuzzing::STUB_TAG;
pub use ossicle_core::fuzzing::records as run;

use crate::Target;

/// See the module.
pub const TARGET: Target = Target { name: "record", run, states, seeds };

fn states() -> Vec<&'static str> {
    vec![
        "change refused",
        "forgery opened under the stub",
        "forgery refused",
        "header decoded",
        "key exhausted",
        "key updated",
        "no room",
        "record opened",
    ]
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let short = |bytes: &[u8]| [&[u8::try_from(bytes.len()).expect("short")], bytes].concat();
    let seal = |payload: &[u8]| [&[0][..], &short(payload)].concat();
    let change = |bit: u16, payload: &[u8]| [&[1][..], &bit.to_be_bytes(), &short(payload)].concat();
    let forge = |record: &[u8]| [&[3][..], &short(record)].concat();
    let update = vec![2];
    let near_end = |left: u8| vec![4, left];
    let no_room = |room: u8, payload: &[u8]| [&[5, room][..], &short(payload)].concat();

    let header = [1, 0, 3, 0, 0, 24 + 5, 0, 0];
    let forged = [&header[..], b"hello", &STUB_TAG].concat();
    let honest = [seal(b"one"), seal(b""), update.clone(), seal(b"a longer text than the others"), update].concat();
    let changed = [change(0, b"payload one"), change(70, b"payload two"), change(300, b"x"), seal(b"in step")].concat();
    let end = [near_end(2), seal(b"last but one"), seal(b"last"), seal(b"too late"), change(3, b"too late")].concat();
    let rest = [forge(&forged), forge(&[]), forge(&header), no_room(20, b"payload"), seal(b"goes on")].concat();
    let script = |mode: u8, steps: &[u8]| [&[mode][..], steps].concat();
    vec![
        ("honest", script(0, &honest)),
        ("changed", script(0, &changed)),
        ("end-of-key", script(0, &end)),
        ("forged", script(0, &rest)),
        ("stub", script(1, &[&rest[..], &honest, &end].concat())),
    ]
}
