//! Whole homes in a ring: each writes to the next, with the outbox and the inbox that a person has. Their readers must
//! have every message once, in order.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use ossicle::endpoint::{Access, Home, Notice, Reply, Request, ServerUrl, initialise, new_letter};
use ossicle::name::Name;
use ossicle_core::Rung;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use super::Book;

/// Messages that a home may have given and the next one not read.
const BACKLOG: u64 = 300;

/// Where homes lie: in memory, where the system has a place for that. It is not their disk that is at stake.
pub(super) fn folder() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).expect("a temporary directory")
}

pub(super) async fn prepare(book: &Book, url: &str, folder: &Path, count: usize) -> Vec<Home> {
    let url = ServerUrl::parse(url).expect("the server prints its URL");
    assert_eq!(url.port, book.address.port());
    let mut homes = Vec::new();
    for number in 0..count {
        let home = Home::new(folder.join(name(number)));
        let own = Name::parse(&name(number)).expect("a name");
        initialise(&home, &own, 2048, &url, false).await.expect("the server takes it");
        // A bundle that others can seal for.
        let mut access = Access::open_reader(&home, "listen").await.expect("a new home");
        while access.notice().await != Notice::Connected {}
        access.close().await;
        homes.push(home);
    }
    homes
}

fn name(number: usize) -> String {
    format!("home-{number}")
}

/// Reads, and writes to the next one, until the task is aborted.
pub(super) async fn home(book: Arc<Book>, me: usize, count: usize, home: Home, mut rng: Rng) {
    let to = name((me + 1) % count);
    let before = (me + count - 1) % count;
    loop {
        // An agent waits the longer, the more often it was disconnected; a command begins anew.
        book.is_up().await;
        let mut access = match Access::open_reader(&home, "listen").await {
            Ok(access) => access,
            Err(failure) => return book.fault(format!("home {me} does not open: {failure}")),
        };
        let leave = Instant::now() + Duration::from_millis(rng.u64(300..5000));
        let mut row = 0;
        loop {
            if !read(&book, before, me, &mut access, &mut row).await {
                return;
            }
            let down = !*book.up.borrow();
            if (Instant::now() > leave && !book.is_ending()) || down {
                break;
            }
            let (given, read) = &book.letters[me];
            if !book.is_ending() && given.load(Ordering::SeqCst) - read.load(Ordering::SeqCst) < BACKLOG {
                for _ in 0..rng.u8(1..16) {
                    let number = given.load(Ordering::SeqCst);
                    // Before it can be read anywhere.
                    given.store(number + 1, Ordering::SeqCst);
                    if !give(&book, me, &access, &to, number, rng.bool()).await {
                        return;
                    }
                }
            }
            let notice = timeout(Duration::from_millis(20), access.notice()).await;
            match notice {
                Ok(Notice::Ended(failure)) => return book.fault(format!("home {me} ended: {failure}")),
                Ok(Notice::Settled(settled)) if settled.outcome.is_err() => {
                    return book.fault(format!("home {me} gave up: {settled:?}"));
                }
                _ => {}
            }
        }
        access.close().await;
        if !book.is_ending() && rng.bool() {
            sleep(Duration::from_millis(rng.u64(..2000))).await;
        }
    }
}

/// Gives a letter to the home, and returns once it is kept there. What becomes of it is heard by the way.
async fn give(book: &Arc<Book>, me: usize, access: &Access, to: &str, number: u64, signed: bool) -> bool {
    let until = if signed { Rung::Delivered } else { Rung::Stored };
    let (letter, body) = (new_letter().expect("randomness"), number.to_string().into_bytes());
    let mut requested = access.request(Request::Send { letter, to: to.to_owned(), body, signed, until, keep: false });
    loop {
        match requested.next().await {
            Reply::Kept => break,
            Reply::Trouble(_) | Reply::Rung { .. } | Reply::Away { .. } => {}
            other => {
                book.fault(format!("home {me} cannot give {number}: {}", describe(&other)));
                return false;
            }
        }
    }
    let book = Arc::clone(book);
    tokio::spawn(async move {
        loop {
            match requested.next().await {
                // Done, or the command has ended before.
                Reply::Done | Reply::Gone { .. } => return,
                Reply::Kept | Reply::Trouble(_) | Reply::Rung { .. } | Reply::Away { .. } => {}
                other => return book.fault(format!("home {me}: {number}: {}", describe(&other))),
            }
        }
    });
    true
}

fn describe(reply: &Reply) -> String {
    match reply {
        Reply::Refused { reason, detail } => format!("refused({reason}) {detail:?}"),
        Reply::Failed(failure) => failure.to_string(),
        Reply::Gone { taken } => format!("gone, taken: {taken}"),
        _ => "an answer to something else".to_owned(),
    }
}

/// Hands what waits to the reader: the book.
async fn read(book: &Book, from: usize, me: usize, access: &mut Access, row: &mut i64) -> bool {
    loop {
        let waiting = match access.waiting(*row, 64).await {
            Ok(waiting) => waiting,
            Err(failure) => {
                book.fault(format!("home {me} cannot read: {failure}"));
                return false;
            }
        };
        if waiting.is_empty() {
            return true;
        }
        for message in waiting {
            *row = message.row;
            let (given, read) = &book.letters[from];
            let expected = read.load(Ordering::SeqCst);
            let number = String::from_utf8_lossy(&message.message.body).parse::<u64>();
            if number != Ok(expected) || expected >= given.load(Ordering::SeqCst) || message.from != name(from) {
                book.fault(format!("home {me} reads {number:?} of {} instead of {expected}", message.from));
                return false;
            }
            read.store(expected + 1, Ordering::SeqCst);
            if let Err(failure) = access.read(&message, false).await {
                book.fault(format!("home {me} cannot mark {expected}: {failure}"));
                return false;
            }
        }
    }
}
