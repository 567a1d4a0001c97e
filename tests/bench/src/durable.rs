//! How much can wait: messages stored after an fsync each, a kill, a restart on all of them, and their delivery.

use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use crate::Failure;
use crate::account::resident;
use crate::client::{Client, Memory, Resume};
use crate::load::Poll;
use crate::people::Person;
use crate::rows::enrol;
use crate::server::{DEADLINE, Peer, Server, Site};

/// Messages for each recipient: a queue takes 10,000.
pub const EACH: u64 = 9_900;
/// Bytes of a message.
const LEN: usize = 256;
/// Messages of one write, and those of one sender that may be unacknowledged.
const BATCH: u64 = 32;
const WINDOW: u64 = 512;

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Durable {
    /// Messages.
    pub messages: u64,
    /// Until the last of them was acknowledged as stored.
    pub stored: Duration,
    /// From the start of the killed server until it listened.
    pub restarted: Duration,
    /// KiB of memory that the restarted server had.
    pub resident: u64,
    /// Until the last of them was delivered and acknowledged.
    pub drained: Duration,
}

/// Each of the first half of `people` writes [`EACH`] messages to one of the other half, who is away until the server was
/// killed and started again.
///
/// # Errors
/// If a message is lost, or comes twice, or nothing goes on.
pub fn run(site: &Site, people: &[Arc<Person>]) -> Result<Durable, Failure> {
    let server = site.start(Peer::Ossicle, None)?;
    enrol(&server, people)?;
    let (writers, readers) = people.split_at(people.len() / 2);
    let (mut senders, mut memories) = (Vec::new(), Vec::new());
    for (from, to) in writers.iter().zip(readers) {
        let connect = |person| Client::reach(&server, person, &Resume::No, true);
        let (mut sender, mut receiver) = (connect(from)?, connect(to)?);
        receiver.listen()?;
        sender.write_to(to, &mut receiver)?;
        receiver.sync()?;
        memories.push(receiver.memory());
        receiver.close()?;
        senders.push(sender);
    }
    let messages = EACH * readers.len() as u64;

    let begun = Instant::now();
    store(&mut senders)?;
    let stored = begun.elapsed();
    // Killed with everybody connected.
    let (server, restarted) = site.restart(server)?;
    drop(senders);
    let resident = resident(server.id())?;

    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all: Vec<_> = readers.iter().zip(memories).collect();
    let share = all.len().div_ceil(threads);
    let mut shares = Vec::new();
    while !all.is_empty() {
        shares.push(all.split_off(all.len().saturating_sub(share)));
    }
    let (server, begun) = (&server, Instant::now());
    std::thread::scope(|scope| {
        let workers: Vec<_> = shares.into_iter().map(|share| scope.spawn(move || drain(server, share))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a thread failed")?)
    })?;
    Ok(Durable { messages, stored, restarted, resident, drained: begun.elapsed() })
}

fn store(senders: &mut [Client]) -> Result<(), Failure> {
    let mut poll = Poll::new()?;
    for (number, sender) in senders.iter().enumerate() {
        poll.add(sender, number)?;
    }
    let text = [b'x'; LEN];
    let mut sent = vec![0; senders.len()];
    let (mut last, mut left) = (Instant::now(), senders.len());
    while left > 0 {
        for (sender, sent) in senders.iter_mut().zip(&mut sent) {
            while *sent < EACH && *sent - sender.heard.stored < WINDOW && sender.flush()? {
                let count = BATCH.min(EACH - *sent);
                sender.send(&text, count as usize)?;
                *sent += count;
            }
        }
        for number in poll.wait(Duration::from_millis(5))? {
            let before = senders[number].heard.stored;
            senders[number].read()?;
            if senders[number].heard.stored > before {
                last = Instant::now();
                left -= usize::from(senders[number].heard.stored == EACH);
            }
        }
        if last.elapsed() > DEADLINE {
            return Err("what was sent is not acknowledged".into());
        }
    }
    Ok(())
}

fn drain(server: &Server, share: Vec<(&Arc<Person>, Memory)>) -> Result<(), Failure> {
    let mut poll = Poll::new()?;
    let mut receivers = Vec::with_capacity(share.len());
    for (number, (person, memory)) in share.into_iter().enumerate() {
        let mut receiver = Client::reach(server, person, &Resume::No, true)?;
        receiver.remember(memory);
        receiver.fetch()?;
        poll.add(&receiver, number)?;
        receivers.push(receiver);
    }
    let (mut last, mut left) = (Instant::now(), receivers.len());
    while left > 0 {
        for number in poll.wait(Duration::from_millis(5))? {
            let receiver = &mut receivers[number];
            let before = receiver.heard.messages;
            receiver.read()?;
            last = if receiver.heard.messages > before { Instant::now() } else { last };
            left -= usize::from(before < EACH && receiver.heard.messages >= EACH);
        }
        if last.elapsed() > DEADLINE {
            return Err("messages that were acknowledged as stored are lost".into());
        }
    }
    for receiver in receivers {
        receiver.set_nonblocking(false)?;
        let mut receiver = receiver;
        receiver.sync()?;
        if receiver.heard.messages != EACH {
            return Err("a message came twice".into());
        }
    }
    Ok(())
}
