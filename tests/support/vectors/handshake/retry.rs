//! What a server under load asks of clients that it does not know, and what they come back with: PROTOCOL 4.11.

use super::*;

/// The server's own: PROTOCOL 15.5.
const COOKIE_KEY: [u8; 32] = [12; 32];
const MINUTE: u64 = 9;

/// 192.0.2.1, and a network of IPv6.
const IPV4: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1];
const IPV6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0];

fn cookie(source: &[u8; 16], minute: u64, bits: u8) -> Vec<u8> {
    let tag = mac(&COOKIE_KEY, &[b"ossicle cookie\0", source, &minute.to_be_bytes(), &[bits]]);
    join(&[&tag[..16], &[bits]])
}

fn retry(bits: u8, cookie: &[u8]) -> Vec<u8> {
    clear(HELLO_RETRY, &join(&[&[bits, u8::try_from(cookie.len()).expect("short")], cookie]))
}

fn zeros(proof: &[u8; 32]) -> u32 {
    u32::from_be_bytes(array(&proof[..4])).leading_zeros()
}

/// What a client comes back with.
struct Work {
    public: [u8; 32],
    prefix: [u8; 32],
    puzzle: u64,
    proof: [u8; 32],
    /// The hello up to the offer.
    front: Vec<u8>,
}

fn work(cookie: &[u8], bits: u8, seed: &[u8; 64], ask_for_key: bool) -> Work {
    let public = exchange_public(&array(&seed[..32]));
    let len = [u8::try_from(cookie.len()).expect("short")];
    let prefix = hash(&[b"ossicle puzzle\0", &len, cookie, &seed[32..], &public]);
    let proof = |puzzle: u64| hash(&[&prefix, &puzzle.to_be_bytes()]);
    let puzzle = (0..).find(|puzzle| zeros(&proof(*puzzle)) >= bits.into()).expect("a solution");
    let mut front = hello_front(LIMIT, ask_for_key, seed);
    front.pop();
    let front = join(&[&front, &len, cookie, &puzzle.to_be_bytes()]);
    Work { public, prefix, puzzle, proof: proof(puzzle), front }
}

/// Whose cookie a client was given.
enum Giver<'a> {
    /// This server's, for this source.
    Us([u8; 16]),
    /// Another's, which is like this.
    Another(&'a [u8]),
}

fn case(name: &str, about: &str, giver: &Giver<'_>, bits: u8, number: u8, offer: Option<&Channel>) -> Fields {
    let seed = seed(number);
    let mut given = Fields::new();
    let (made, cookie) = match giver {
        Giver::Us(source) => {
            let made = Fields::new().hex("k_cookie", COOKIE_KEY).hex("source", source).with("minute", MINUTE);
            (Some(made.with("bits", bits)), cookie(source, MINUTE, bits))
        }
        Giver::Another(cookie) => (None, cookie.to_vec()),
    };
    given.put("cookie_of", made);
    given.put("bits", bits);
    given.put_hex("cookie", &cookie);
    given.put("record_limit_C", LIMIT);
    given.put_hex("seed_C", seed);
    given.put("ask_for_key", false);
    given.put("offer", offer.map(Channel::fields));

    let Work { public, prefix, puzzle, proof, front } = work(&cookie, bits, &seed, false);
    let mut gives = Fields::new()
        .hex("HelloRetry", retry(bits, &cookie))
        .hex("E_C", public)
        .hex("P", prefix)
        .hex("puzzle", puzzle.to_be_bytes())
        .hex("proof", proof);
    let hello = match offer {
        None => clear(CLIENT_HELLO, &join(&[&front, &[0]])),
        Some(channel) => {
            let (hello, key, binder) = offering(&front, channel);
            gives.put_hex("k_binder", key);
            gives.put_hex("binder", binder);
            hello
        }
    };
    gives.put_hex("ClientHello", &hello);
    gives.put_hex("T1", hash(&[&t0(), &hello]));
    Fields::new().with("name", name).with("about", about).with("given", given).with("gives", gives)
}

/// Hellos that come to the server of the first case, which is busy, from its address.
fn shown() -> Vec<Fields> {
    const BITS: u8 = 12;
    let right = cookie(&IPV4, MINUTE, BITS);
    let hello = |front: &[u8]| clear(CLIENT_HELLO, &join(&[front, &[0]]));
    let solved = |cookie: &[u8], bits: u8| hello(&work(cookie, bits, &seed(25), false).front);
    let first = solved(&right, BITS);
    let puzzle = 83 + right.len();
    let with = |at: usize| {
        let mut hello = first.clone();
        hello[at] ^= 1;
        hello
    };
    let row = |why: &str, minute: u64, record: Vec<u8>, result: &str| {
        Fields::new().with("why", why).with("minute", minute).hex("ClientHello", record).with("result", result)
    };
    let through = |why: &str, minute: u64, record: Vec<u8>| row(why, minute, record, "let through");
    let again = |why: &str, minute: u64, record: Vec<u8>| row(why, minute, record, "asked again");
    let mut longer = right.clone();
    longer.push(BITS);
    vec![
        through("nothing: the work as it must be", MINUTE, first.clone()),
        through("a minute later", MINUTE + 1, first.clone()),
        again("two minutes later", MINUTE + 2, first.clone()),
        again("before its minute", MINUTE - 1, first.clone()),
        again("no cookie", MINUTE, hello(&hello_front(LIMIT, false, &seed(25)))),
        again("a cookie of another address", MINUTE, solved(&cookie(&IPV6, MINUTE, BITS), BITS)),
        again("a cookie that asks for less than it says", MINUTE, {
            let mut less = right.clone();
            *less.last_mut().expect("a cookie") = 4;
            solved(&less, 4)
        }),
        again("a cookie with a byte more", MINUTE, solved(&longer, BITS)),
        again("a cookie without its last byte", MINUTE, solved(&right[..16], BITS)),
        again("a puzzle that is not solved", MINUTE, with(puzzle + 7)),
        again("the solution of another random_C", MINUTE, with(18)),
        again("the solution of another E_C", MINUTE, with(50)),
        through("less was asked for when the server had less to do", MINUTE, solved(&cookie(&IPV4, MINUTE, 4), 4)),
    ]
}

pub(super) fn file(channel: &Channel) -> Fields {
    let cases = vec![
        case(
            "work for a full handshake",
            "the second hello of a client that was asked for 12 bits; PROTOCOL 15.5",
            &Giver::Us(IPV4),
            12,
            7,
            None,
        ),
        case(
            "a channel is offered again",
            "its binder covers the work; the address is one of IPv6, of which the first 8 bytes count",
            &Giver::Us(IPV6),
            10,
            26,
            Some(channel),
        ),
        case("the longest cookie and no work", "puzzle 0 will do", &Giver::Another(&[0x6b; 40]), 0, 27, None),
        case("the shortest cookie", "of another server, as the one before", &Giver::Another(&[0x6b]), 8, 28, None),
    ];
    let row = |why: &str, result: &str, record: Vec<u8>| {
        Fields::new().with("why", why).hex("HelloRetry", record).with("result", result)
    };
    let body = |body: &[u8]| clear(HELLO_RETRY, body);
    let mut sequence = retry(8, b"cookie");
    sequence[7] = 1;
    let views = vec![
        row("nothing: as it must be", "work", retry(8, b"cookie")),
        row("18 bits", "work", retry(18, b"cookie")),
        row("19 bits", "busy", retry(19, b"cookie")),
        row("255 bits", "busy", retry(255, b"cookie")),
        row("a cookie of 40 bytes", "work", retry(8, &[7; 40])),
        row("no cookie", "ends", retry(8, b"")),
        row("a cookie of 41 bytes", "ends", retry(8, &[7; 41])),
        row("a cookie that is shorter than it says", "ends", body(&[8, 7, 1, 2, 3, 4, 5, 6])),
        row("a byte behind the cookie", "ends", body(&[8, 1, 7, 0])),
        row("nothing behind the header", "ends", body(&[])),
        row("sqn 1", "ends", sequence),
    ];
    head("What a server under load asks for, and what a client comes back with", &["3.2", "3.8", "4.11"])
        .with("cases", cases)
        .with("views", views)
        .with("shown", shown())
}
