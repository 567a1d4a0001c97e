//! The generator: keeps messages of many senders in flight, whatever protocol they speak.
//!
//! Each thread drives its share of the senders and their readers with one epoll. Messages in flight are counted, so that no server ever has a
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
    /// Messages of one sender that may be on their way.
    pub window: u64,
    /// Messages a second of all senders; `None` for as many as there is room for.
    pub rate: Option<u32>,
}

/// Somebody who writes, and those who read it.
pub struct Talk {
    /// Who writes.
    pub sender: Client,
    /// Who reads, each of them everything.
    pub receivers: Vec<Client>,
    /// Messages that have not arrived, once for each reader.
    in_flight: u64,
    blocked: bool,
}

impl Talk {
    /// Clients that know each other.
    pub const fn new(sender: Client, receivers: Vec<Client>) -> Self {
        Self { sender, receivers, in_flight: 0, blocked: false }
    }

    /// Whether so many more messages may be on their way.
    const fn has_room(&self, batch: u64, window: u64) -> bool {
        !self.blocked && self.in_flight + batch * self.readers() <= window * self.readers()
    }

    const fn readers(&self) -> u64 {
        self.receivers.len() as u64
    }

    /// All of them.
    fn clients(&self) -> impl Iterator<Item = &Client> {
        core::iter::once(&self.sender).chain(&self.receivers)
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

/// Drives all for `warm`, then for `time`, in which the server's CPU is counted.
///
/// # Errors
/// If a connection ends, or messages do not arrive.
pub fn run(
    server: &Server,
    talks: &mut [Talk],
    shape: Shape,
    warm: Duration,
    time: Duration,
) -> Result<Measured, Failure> {
    // At a given rate one thread has time enough; else as many as can run.
    let threads = if shape.rate.is_some() { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let control = Control::default();
    std::thread::scope(|scope| {
        let share = talks.len().div_ceil(threads);
        let workers: Vec<_> = talks
            .chunks_mut(share)
            .map(|talks| {
                let control = &control;
                scope.spawn(move || drive(talks, shape, control).inspect_err(|_| control.stop()))
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

fn drive(talks: &mut [Talk], shape: Shape, control: &Control) -> Result<(), Failure> {
    let mut poll = Poll::new()?;
    // Who a number of the poll is: one of a talk, of whom the sender is the first.
    let mut all = Vec::new();
    let mut senders = Vec::new();
    for (index, talk) in talks.iter().enumerate() {
        senders.push(all.len());
        for (place, client) in talk.clients().enumerate() {
            poll.add(client, all.len())?;
            all.push((index, place));
        }
    }
    let text = vec![b'x'; shape.size];
    let (begun, mut due, mut next) = (Instant::now(), 0, 0);
    let mut stopped_at = None;
    loop {
        if control.is_stopped() {
            let since = *stopped_at.get_or_insert_with(Instant::now);
            let missing: u64 = talks.iter().map(|talk| talk.in_flight).sum();
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
                // Each in its turn.
                Some(rate) => {
                    let owed = begun.elapsed().as_nanos() as u64 * u64::from(rate) / 1_000_000_000;
                    while due < owed {
                        let index = next % talks.len();
                        next += 1;
                        due += 1;
                        send(&poll, &mut talks[index], senders[index], &text, shape)?;
                    }
                    let at = begun + Duration::from_nanos((due + 1) * 1_000_000_000 / u64::from(rate));
                    patience = at.saturating_duration_since(Instant::now());
                }
                None => {
                    for (talk, sender) in talks.iter_mut().zip(&senders) {
                        if send(&poll, talk, *sender, &text, shape)? {
                            patience = Duration::ZERO;
                        }
                    }
                }
            }
        }
        for number in poll.wait(patience)? {
            let (index, place) = all[number];
            let talk = &mut talks[index];
            let Some(place) = place.checked_sub(1) else {
                if talk.blocked && talk.sender.flush()? {
                    talk.blocked = false;
                    poll.watch(&talk.sender, number, READABLE)?;
                }
                talk.sender.read()?;
                continue;
            };
            let receiver = &mut talk.receivers[place];
            let before = receiver.heard.messages;
            receiver.read()?;
            let new = receiver.heard.messages - before;
            talk.in_flight = talk.in_flight.checked_sub(new).ok_or("a message came twice")?;
            control.received.fetch_add(new, Ordering::Relaxed);
        }
    }
    for client in talks.iter().flat_map(Talk::clients) {
        client.set_nonblocking(false)?;
    }
    Ok(())
}

/// Writes once, if there is room. Whether there is room for more.
fn send(poll: &Poll, talk: &mut Talk, number: usize, text: &[u8], shape: Shape) -> Result<bool, Failure> {
    let batch = shape.batch as u64;
    if !talk.has_room(batch, shape.window) {
        return Ok(false);
    }
    if !talk.sender.send(text, shape.batch)? {
        talk.blocked = true;
        poll.watch(&talk.sender, number, BOTH)?;
    }
    talk.in_flight += batch * talk.readers();
    Ok(talk.has_room(batch, shape.window))
}
