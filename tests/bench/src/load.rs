//! The generator: keeps messages of many pairs in flight, whatever protocol they speak.
//!
//! Each thread drives its share of the pairs with one epoll. Messages in flight are counted, so that no server ever has a
//! reason to drop one; when a run is over, all have arrived.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

use crate::Failure;
use crate::account::Cpu;
use crate::client::Client;
use crate::server::{DEADLINE, Server};

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of a message.
    pub size: usize,
    /// Messages of one write.
    pub batch: usize,
    /// Messages of one pair that may be on their way.
    pub window: u64,
    /// Messages a second of all pairs; `None` for as many as there is room for.
    pub rate: Option<u32>,
}

/// Somebody who writes, and somebody who reads.
pub struct Pair {
    /// Who writes.
    pub sender: Client,
    /// Who reads.
    pub receiver: Client,
    in_flight: u64,
    blocked: bool,
}

impl Pair {
    /// Two clients that know each other.
    pub const fn new(sender: Client, receiver: Client) -> Self {
        Self { sender, receiver, in_flight: 0, blocked: false }
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// The server's CPU time.
    pub cpu: Duration,
    /// What was done in that time.
    pub operations: u64,
    /// The time.
    pub wall: Duration,
}

impl Measured {
    /// Microseconds of the server's CPU for one operation.
    pub fn us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.operations.max(1) as f64
    }
}

/// Drives all pairs for `warm`, then for `time`, in which the server's CPU is counted.
///
/// # Errors
/// If a connection ends, or messages do not arrive.
pub fn run(
    server: &Server,
    pairs: &mut [Pair],
    shape: Shape,
    warm: Duration,
    time: Duration,
) -> Result<Measured, Failure> {
    // At a given rate one thread has time enough; else as many as can run.
    let threads = if shape.rate.is_some() { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let control = Control::default();
    std::thread::scope(|scope| {
        let share = pairs.len().div_ceil(threads);
        let workers: Vec<_> = pairs
            .chunks_mut(share)
            .map(|pairs| {
                let control = &control;
                scope.spawn(move || drive(pairs, shape, control).inspect_err(|_| control.stop()))
            })
            .collect();
        control.pause(warm);
        let (cpu, before, begun) = (Cpu::of(server.id()), control.received(), Instant::now());
        control.pause(time);
        let (later, after, wall) = (Cpu::of(server.id()), control.received(), begun.elapsed());
        control.stop();
        for worker in workers {
            worker.join().map_err(|_| "a thread of the generator failed")??;
        }
        Ok(Measured { cpu: later?.since(&cpu?), operations: after - before, wall })
    })
}

#[derive(Default)]
struct Control {
    stopped: AtomicBool,
    received: AtomicU64,
}

impl Control {
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sleeps, unless a thread fails meanwhile.
    fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.is_stopped()
            && let Some(left) = end.checked_duration_since(Instant::now())
        {
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }
}

/// Which sockets have something.
pub(crate) struct Poll {
    epoll: OwnedFd,
    events: Vec<Event>,
}

const READABLE: EventFlags = EventFlags::IN;
const BOTH: EventFlags = EventFlags::IN.union(EventFlags::OUT);

impl Poll {
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, events: Vec::with_capacity(256) })
    }

    pub(crate) fn add(&self, client: &Client, number: usize) -> Result<(), Failure> {
        client.set_nonblocking(true)?;
        Ok(epoll::add(&self.epoll, client, EventData::new_u64(number as u64), READABLE)?)
    }

    fn watch(&self, client: &Client, number: usize, flags: EventFlags) -> Result<(), Failure> {
        Ok(epoll::modify(&self.epoll, client, EventData::new_u64(number as u64), flags)?)
    }

    /// The numbers of those that have something, at once or within `timeout`.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<Vec<usize>, Failure> {
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        self.events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.events.iter().map(|event| event.data.u64() as usize).collect())
    }
}

/// How long a generator that has nothing to send waits for something to read.
const PATIENCE: Duration = Duration::from_millis(5);

fn drive(pairs: &mut [Pair], shape: Shape, control: &Control) -> Result<(), Failure> {
    let mut poll = Poll::new()?;
    for (index, pair) in pairs.iter().enumerate() {
        poll.add(&pair.sender, 2 * index)?;
        poll.add(&pair.receiver, 2 * index + 1)?;
    }
    let text = vec![b'x'; shape.size];
    let (begun, mut due, mut next) = (Instant::now(), 0, 0);
    let mut stopped_at = None;
    loop {
        if control.is_stopped() {
            let since = *stopped_at.get_or_insert_with(Instant::now);
            let missing: u64 = pairs.iter().map(|pair| pair.in_flight).sum();
            if missing == 0 {
                break;
            }
            if since.elapsed() > DEADLINE / 4 {
                return Err(format!("{missing} messages have not arrived").into());
            }
        }
        let mut patience = PATIENCE;
        if stopped_at.is_none() {
            match shape.rate {
                // Each pair in its turn.
                Some(rate) => {
                    let owed = begun.elapsed().as_nanos() as u64 * u64::from(rate) / 1_000_000_000;
                    while due < owed {
                        let index = next % pairs.len();
                        next += 1;
                        due += 1;
                        send(&poll, pairs, index, &text, shape)?;
                    }
                    let at = begun + Duration::from_nanos((due + 1) * 1_000_000_000 / u64::from(rate));
                    patience = at.saturating_duration_since(Instant::now());
                }
                None => {
                    for index in 0..pairs.len() {
                        if send(&poll, pairs, index, &text, shape)? {
                            patience = Duration::ZERO;
                        }
                    }
                }
            }
        }
        for number in poll.wait(patience)? {
            let pair = &mut pairs[number / 2];
            if number % 2 == 0 {
                if pair.blocked && pair.sender.flush()? {
                    pair.blocked = false;
                    poll.watch(&pair.sender, number, READABLE)?;
                }
                pair.sender.read()?;
            } else {
                let before = pair.receiver.heard.messages;
                pair.receiver.read()?;
                let new = pair.receiver.heard.messages - before;
                pair.in_flight = pair.in_flight.checked_sub(new).ok_or("a message came twice")?;
                control.received.fetch_add(new, Ordering::Relaxed);
            }
        }
    }
    for pair in pairs {
        pair.sender.set_nonblocking(false)?;
        pair.receiver.set_nonblocking(false)?;
    }
    Ok(())
}

/// Writes once, if there is room. Whether there is room for more.
fn send(poll: &Poll, pairs: &mut [Pair], index: usize, text: &[u8], shape: Shape) -> Result<bool, Failure> {
    let pair = &mut pairs[index];
    let batch = shape.batch as u64;
    if pair.blocked || pair.in_flight + batch > shape.window {
        return Ok(false);
    }
    if !pair.sender.send(text, shape.batch)? {
        pair.blocked = true;
        poll.watch(&pair.sender, 2 * index, BOTH)?;
    }
    pair.in_flight += batch;
    Ok(!pair.blocked && pair.in_flight + batch <= shape.window)
}
