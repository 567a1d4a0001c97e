//! `writer DIR ROUND [unflushed]`: a store that many use at once, until it is killed. Says what it was told to be durable:
//!
//! - `stored RECIPIENT CHAIN N SEQ`, after the store has said so;
//! - `gone RECIPIENT SEQ`, before everything up to this number is acknowledged.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use ossicle::name::Name;
use ossicle::store::{Enrolment, ItemKind, NewItem, Put, PutError, SqliteStore, Store};
use ossicle_tests::writer::{CLIENTS, SENDERS, bytes_of, chain_of};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, directory, round, how @ ..] = arguments.as_slice() else {
        panic!("usage: writer DIR ROUND [unflushed]");
    };
    let (directory, round) = (Path::new(directory), round.parse().expect("a number"));
    let opened = if how.is_empty() { SqliteStore::open(directory) } else { SqliteStore::open_unflushed(directory) };
    let store = Arc::new(opened.expect("the store opens"));
    for n in 0..CLIENTS {
        let enrolment = Enrolment {
            id: [n; 16],
            name: Name::parse(&format!("client-{n}")).expect("a name"),
            modulus: vec![n; 256],
            token_id: None,
            enrolled_by: None,
            record_limit: 1024,
            now: 1,
        };
        store.enrol(enrolment).await.expect("who is there stays, who is new is entered");
    }
    let mut tasks = Vec::new();
    for sender in 0..SENDERS {
        tasks.push(tokio::spawn(send(Arc::clone(&store), round, sender)));
    }
    // The last never takes anything.
    for recipient in 0..CLIENTS - 1 {
        tasks.push(tokio::spawn(receive(Arc::clone(&store), recipient)));
    }
    for task in tasks {
        task.await.expect("a task goes on until the process is killed");
    }
}

/// Whoever was to read it has gone: then this must not stay.
fn say(line: &str) {
    if std::io::stdout().lock().write_all(line.as_bytes()).is_err() {
        std::process::exit(0);
    }
}

async fn send(store: Arc<SqliteStore>, round: u32, sender: u8) {
    let mut next = [0_u32; CLIENTS as usize];
    loop {
        for recipient in 0..CLIENTS {
            let from = next[usize::from(recipient)];
            let chain = chain_of(round, sender, recipient);
            // One call has one item or a few.
            let until = from + 1 + (from + u32::from(sender)) % 4;
            let items = (from..until).map(|n| NewItem {
                recipient: [recipient; 16],
                sender: [sender; 16],
                kind: if n % 16 == 0 { ItemKind::Wrap } else { ItemKind::Envelope },
                chain,
                n,
                wanted: 3,
                bytes: bytes_of(chain, n).into(),
                at: u64::from(n),
            });
            let mut lines = String::new();
            let puts = store.put(items.collect()).await.expect("the store takes it");
            for (n, put) in (from..until).zip(puts) {
                match put {
                    Ok(Put::Stored { seq }) => {
                        lines += &format!("stored {recipient} {} {n} {seq}\n", u64::from_be_bytes(chain));
                        next[usize::from(recipient)] = n + 1;
                    }
                    Err(PutError::QueueFull) => break,
                    other => panic!("{other:?}"),
                }
            }
            say(&lines);
        }
    }
}

async fn receive(store: Arc<SqliteStore>, recipient: u8) {
    let mut after = 0;
    loop {
        let items = store.queue(&[recipient; 16], after, 64, 64 * 1024).await.expect("the queue is read");
        let Some(last) = items.last() else {
            tokio::task::yield_now().await;
            continue;
        };
        after = last.seq;
        say(&format!("gone {recipient} {after}\n"));
        store.acknowledge(&[recipient; 16], after).await.expect("the store forgets it");
    }
}
