//! What each row measures. One round of a row at one server is one call.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::VecDeque;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use crate::Failure;
use crate::account::{Cpu, resident};
use crate::client::{Client, NotDone, Resume};
use crate::groups::Group;
use crate::load::{self, Measured, Poll, Shape, Talk};
use crate::people::Person;
use crate::server::{DEADLINE, Peer, Server, Site};

/// Pairs of the rows with many.
pub const PAIRS: usize = 50;
/// Those who only come and go, one a thread.
const VISITORS: usize = 16;
/// Who writes to somebody who is away, and who is away.
const KEPT: usize = 2 * PAIRS + VISITORS;
/// Who writes to many, and how many read it.
const SPEAKER: usize = KEPT + 2;
const READERS: usize = 100;
/// All but the idle.
const CREW: usize = SPEAKER + 1 + READERS;
/// A group of ours has 64 members at most, so two of them take 100 readers: what is said to all goes up twice.
const READERS_OF_A_GROUP: usize = READERS / 2;
/// Where peers of ours have readers, each of them everything.
const ROOM: usize = 10_000;
/// Members of the group that is founded, and of those that fill the server's memory.
const MEMBERS: usize = 64;
/// So many groups come first, and so many are counted.
const GROUPS_BEFORE: usize = 20;
const GROUPS: usize = 100;
/// Messages that wait for their acknowledgement.
const UNACKNOWLEDGED: u64 = 100;
/// Bytes of a message that is stored.
const STORED_LEN: usize = 256;
/// Messages that are sealed end to end before one pair sends as fast as it can: the clients of 4,000,000 a second need no
/// more, and beyond it each is sealed when it is sent.
const AHEAD: usize = 2_000_000;
/// The same for one who writes to a hundred.
const AHEAD_OF_MANY: usize = 8_000;
/// For how long such a pair sends at most, counted and before.
const BATCH_TIME: Duration = Duration::from_millis(400);
const BATCH_WARM: Duration = Duration::from_millis(100);

/// Which row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Full handshakes, from the connection to its end.
    Handshake,
    /// The same by resumption.
    Resume,
    /// 64 bytes, 50 pairs, one message a write.
    Relay64,
    /// 64 bytes, one pair, 32 messages a write.
    Batch32,
    /// 1 KiB, 50 pairs.
    Relay1k,
    /// 16,000 bytes, 50 pairs.
    Relay16k,
    /// 64 bytes, 10,000 messages a second over 50 pairs.
    Paced,
    /// 64 bytes there and back.
    RoundTrip,
    /// 256 bytes from one to a hundred.
    Fanout,
    /// A group of 64, from its foundation to the first message that all have read.
    Group,
    /// Memory of a connection that does nothing.
    Idle,
    /// Memory of a member of a group.
    Member,
    /// 256 bytes for somebody who is away, 100 unacknowledged, one message a write.
    Store,
    /// Reading that.
    Drain,
}

/// A row of the table.
pub struct About {
    /// Which.
    pub row: Row,
    /// Its name.
    pub name: &'static str,
    /// What its figures are in.
    pub unit: &'static str,
    /// The most that ours may be, as a multiple of the peer's.
    pub goals: &'static [(Peer, f64)],
    /// The most that ours may be, whatever others are.
    pub bound: Option<f64>,
}

impl About {
    const fn new(row: Row, name: &'static str, unit: &'static str, goals: &'static [(Peer, f64)]) -> Self {
        Self { row, name, unit, goals, bound: None }
    }
}

/// All rows, in the order in which they are measured.
pub const ROWS: [About; 14] = [
    About::new(Row::Handshake, "handshake", "us", &[(Peer::Mosquitto, 0.40), (Peer::Nats, 0.28)]),
    About::new(Row::Resume, "resume", "us", &[]),
    About::new(Row::Relay64, "relay_64_p50", "us", &[(Peer::Mosquitto, 0.20), (Peer::Nats, 0.80)]),
    About::new(Row::Batch32, "relay_64_batch32", "us", &[(Peer::Mosquitto, 0.10), (Peer::Nats, 0.90)]),
    About::new(Row::Relay1k, "relay_1k", "us", &[(Peer::Mosquitto, 0.30), (Peer::Nats, 0.65)]),
    About::new(Row::Relay16k, "relay_16k", "us", &[(Peer::Mosquitto, 0.40), (Peer::Nats, 0.40)]),
    About::new(Row::Paced, "paced_64", "us", &[(Peer::Mosquitto, 0.75), (Peer::Nats, 0.55)]),
    About::new(Row::RoundTrip, "rtt_p50", "us", &[(Peer::Mosquitto, 0.60)]),
    About::new(Row::Store, "store", "us", &[(Peer::Mosquitto, 0.70), (Peer::Nats, 0.90)]),
    About::new(Row::Drain, "drain", "us", &[(Peer::Mosquitto, 0.60), (Peer::Nats, 0.80)]),
    About::new(Row::Fanout, "fanout_100", "us", &[(Peer::Mosquitto, 0.20), (Peer::Nats, 0.90)]),
    About { bound: Some(2000.0), ..About::new(Row::Group, "group_64", "ms", &[]) },
    About::new(Row::Member, "rss_member", "B", &[]),
    About::new(Row::Idle, "rss_idle", "KiB", &[(Peer::Mosquitto, 0.30), (Peer::Nats, 0.13)]),
];

/// How long everything takes.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Handshakes of a round.
    pub handshakes: usize,
    /// How long messages are counted, in each round.
    pub time: Duration,
    /// How long they flow before.
    pub warm: Duration,
    /// Round trips of a round.
    pub trips: usize,
    /// Messages that are stored in a round: for one client that is away, and our queues hold 10,000.
    pub stored: usize,
    /// Idle connections.
    pub idle: usize,
}

impl Extent {
    /// For figures.
    pub const FULL: Self = Self {
        handshakes: 500,
        time: Duration::from_secs(2),
        warm: Duration::from_millis(500),
        trips: 5000,
        stored: 9_000,
        idle: 5000,
    };
    /// For a look.
    pub const QUICK: Self = Self {
        handshakes: 150,
        time: Duration::from_millis(700),
        warm: Duration::from_millis(200),
        trips: 1500,
        stored: 5000,
        idle: 1000,
    };

    /// How many people that takes.
    pub fn people(&self, idle: bool) -> usize {
        if idle { self.idle.max(CREW) } else { CREW }
    }
}

/// One server, and those who are connected to it all the time.
pub struct Stage {
    /// The server.
    pub server: Server,
    pairs: Vec<Talk>,
    /// One who writes to many.
    speaker: Option<Talk>,
    /// What reading took, where storing was measured and reading not yet asked for.
    drained: VecDeque<Measured>,
}

impl Stage {
    /// Starts the server, and makes everybody known to it who is needed by all rows but the idle ones.
    ///
    /// # Errors
    /// If the server does not start or lets nobody in.
    pub fn new(site: &Site, peer: Peer, people: &[Arc<Person>]) -> Result<Self, Failure> {
        let server = site.start(peer, None)?;
        enrol(&server, &people[..CREW])?;
        Ok(Self { server, pairs: Vec::new(), speaker: None, drained: VecDeque::new() })
    }

    /// Pairs that stay connected.
    fn pairs(&mut self, people: &[Arc<Person>], count: usize) -> Result<(&Server, &mut [Talk]), Failure> {
        while self.pairs.len() < count {
            let number = 2 * self.pairs.len();
            let [from, to] = [&people[number], &people[number + 1]];
            let (mut sender, mut receiver) = (Client::connect(&self.server, from)?, Client::connect(&self.server, to)?);
            sender.listen()?;
            receiver.listen()?;
            sender.write_to(to, &mut receiver)?;
            receiver.write_to(from, &mut sender)?;
            self.pairs.push(Talk::new(sender, vec![receiver]));
        }
        Ok((&self.server, &mut self.pairs[..count]))
    }

    /// One who writes to a hundred, all connected.
    fn speaker(&mut self, people: &[Arc<Person>]) -> Result<(&Server, &mut Talk), Failure> {
        if self.speaker.is_none() {
            let (from, to) = (&people[SPEAKER], &people[SPEAKER + 1..][..READERS]);
            let mut sender = Client::connect(&self.server, from)?;
            sender.listen()?;
            let mut receivers = in_shares(to, |person| Client::connect(&self.server, person))?;
            if self.server.peer == Peer::Ossicle {
                receivers.iter_mut().try_for_each(Client::listen)?;
                let mut gathered = Vec::with_capacity(READERS);
                for invitees in to.chunks(READERS_OF_A_GROUP) {
                    let clients = receivers.drain(..invitees.len()).collect();
                    gathered.extend(Group::new(from, invitees)?.gather(&mut sender, clients)?);
                }
                receivers = gathered;
            } else {
                receivers.iter_mut().try_for_each(|receiver| receiver.listen_in(ROOM))?;
                sender.write_in(ROOM)?;
            }
            self.speaker = Some(Talk::new(sender, receivers));
        }
        Ok((&self.server, self.speaker.as_mut().ok_or("it was made")?))
    }

    fn fanout(&mut self, people: &[Arc<Person>], extent: &Extent) -> Result<Measured, Failure> {
        let shape = Shape { size: STORED_LEN, batch: 1, window: 256, rate: None };
        let (server, talk) = self.speaker(people)?;
        // As with one pair, what is between the clients only is done before and after.
        let Talk { sender, receivers, .. } = &mut *talk;
        sender.seal_ahead(&vec![b'x'; shape.size], AHEAD_OF_MANY, receivers)?;
        let (warm, time) = (extent.warm.min(BATCH_WARM), extent.time.min(BATCH_TIME));
        let measured = load::run(server, core::slice::from_mut(talk), shape, warm, time)?;
        talk.sender.settle()?;
        in_shares_mut(&mut talk.receivers, Client::settle)?;
        Ok(measured)
    }

    /// Milliseconds from the first question about a member to the first message that all have read, and groups a second.
    fn group(&mut self, people: &[Arc<Person>]) -> Result<Option<(f64, f64)>, Failure> {
        if self.server.peer != Peer::Ossicle {
            return Ok(None);
        }
        // One connection each: those of the row before end.
        self.speaker = None;
        let (from, to) = (&people[SPEAKER], &people[SPEAKER + 1..][..MEMBERS - 1]);
        let enter = |person: &Arc<Person>| {
            let mut client = Client::connect(&self.server, person)?;
            client.listen()?;
            Ok(client)
        };
        let (mut founder, mut invitees) = (enter(from)?, in_shares(to, enter)?);
        let begun = Instant::now();
        let group = Group::new(from, to)?;
        invitees = group.gather(&mut founder, invitees)?;
        founder.send(&[b'x'; STORED_LEN], 1)?;
        for member in &mut invitees {
            member.until(|heard| heard.messages > 0)?;
        }
        let took = begun.elapsed().as_secs_f64();
        for client in invitees.into_iter().chain([founder]) {
            client.close()?;
        }
        Ok(Some((took * 1e3, 1.0 / took)))
    }

    /// Measures one round of a row: microseconds of the server's CPU for one operation, or what else the row's unit says;
    /// and operations a second. `None` if this server does not do that.
    ///
    /// # Errors
    /// If it fails.
    pub fn round(
        &mut self,
        site: &Site,
        row: Row,
        people: &[Arc<Person>],
        extent: &Extent,
    ) -> Result<Option<(f64, f64)>, Failure> {
        let shape = |size, batch, window, rate| Shape { size, batch, window, rate };
        let (pairs, shape) = match row {
            Row::Handshake => return self.handshakes(people, extent.handshakes).map(figure),
            Row::Resume => return Ok(self.resumptions(site, people, extent.handshakes)?.and_then(figure)),
            Row::RoundTrip => return self.round_trips(people, extent.trips).map(Some),
            Row::Store | Row::Drain => {
                return match self.kept(row, people, extent.stored) {
                    Err(error) if error.is::<NotDone>() => Ok(None),
                    measured => measured.map(figure),
                };
            }
            Row::Fanout => return self.fanout(people, extent).map(figure),
            Row::Group => return self.group(people),
            Row::Member => return member(site, self.server.peer, people),
            Row::Idle => return idle(site, self.server.peer, &people[..extent.idle]).map(Some),
            Row::Relay64 => (PAIRS, shape(64, 1, 256, None)),
            Row::Batch32 => (1, shape(64, 32, 2048, None)),
            Row::Relay1k => (PAIRS, shape(1024, 1, 128, None)),
            Row::Relay16k => (PAIRS, shape(16_000, 1, 16, None)),
            Row::Paced => (PAIRS, shape(64, 1, 1024, Some(10_000))),
        };
        let (server, pairs) = self.pairs(people, pairs)?;
        if row != Row::Batch32 {
            return load::run(server, pairs, shape, extent.warm, extent.time).map(figure);
        }
        // One thread has to drive the pair. If it sealed and opened end to end as well, which is no business of the server's,
        // the server would wait for it and be woken for each write: that would be the cost of waking up.
        let text = vec![b'x'; shape.size];
        for Talk { sender, receivers, .. } in &mut *pairs {
            sender.seal_ahead(&text, AHEAD, receivers)?;
        }
        let measured = load::run(server, pairs, shape, extent.warm.min(BATCH_WARM), extent.time.min(BATCH_TIME))?;
        for Talk { sender, receivers, .. } in &mut *pairs {
            sender.settle()?;
            receivers.iter_mut().try_for_each(Client::settle)?;
        }
        Ok(figure(measured))
    }

    fn handshakes(&self, people: &[Arc<Person>], count: usize) -> Result<Measured, Failure> {
        self.enter(people, count, |person, _: &mut ()| Client::connect(&self.server, person))
    }

    fn resumptions(&self, site: &Site, people: &[Arc<Person>], count: usize) -> Result<Option<Measured>, Failure> {
        let config = site.resuming()?;
        let resumes = AtomicBool::new(true);
        let measured = self.enter(people, count, |person, held: &mut Option<Resume>| {
            let tls = || Resume::Tls(Arc::clone(&config));
            let is_first = held.is_none();
            let mut client = match held.as_ref() {
                Some(held) => Client::connect_with(&self.server, person, held),
                None if self.server.peer == Peer::Ossicle => Client::connect(&self.server, person),
                None => Client::connect_with(&self.server, person, &tls()),
            }?;
            *held = Some(client.resume().unwrap_or_else(tls));
            if !is_first && !client.has_resumed() {
                resumes.store(false, Ordering::Relaxed);
            }
            Ok(client)
        });
        match measured {
            Ok(measured) if resumes.into_inner() => Ok(Some(measured)),
            Ok(_) => Ok(None),
            Err(error) if self.server.peer == Peer::Ossicle => Err(error),
            // A server that takes offence at a session that is offered again.
            Err(_) => Ok(None),
        }
    }

    /// So many connections, one after the other on each core, each to its end.
    fn enter<H: Default>(
        &self,
        people: &[Arc<Person>],
        count: usize,
        connect: impl Fn(&Arc<Person>, &mut H) -> Result<Client, Failure> + Sync,
    ) -> Result<Measured, Failure> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(VISITORS);
        let ready = Barrier::new(threads + 1);
        let (ready, connect) = (&ready, &connect);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|worker| {
                    scope.spawn(move || {
                        let person = &people[2 * PAIRS + worker];
                        let mut held = H::default();
                        let first = connect(person, &mut held).and_then(Client::close);
                        ready.wait();
                        ready.wait();
                        first?;
                        for _ in 0..count / threads {
                            connect(person, &mut held)?.close()?;
                        }
                        Ok::<_, Failure>(())
                    })
                })
                .collect();
            ready.wait();
            let (cpu, begun) = (Cpu::of(self.server.id()), Instant::now());
            ready.wait();
            for worker in workers {
                worker.join().map_err(|_| "a thread failed")??;
            }
            let (later, wall) = (Cpu::of(self.server.id()), begun.elapsed());
            Ok(Measured { cpu: later?.since(&cpu?), operations: (count / threads * threads) as u64, wall })
        })
    }

    /// Storing and reading what was stored are two rows of one run.
    fn kept(&mut self, row: Row, people: &[Arc<Person>], count: usize) -> Result<Measured, Failure> {
        if let Some(drained) = self.drained.pop_front().filter(|_| row == Row::Drain) {
            return Ok(drained);
        }
        let (from, to) = (&people[KEPT], &people[KEPT + 1]);
        let connect = |person| {
            let mut client = Client::reach(&self.server, person, &Resume::No, true)?;
            client.enter()?;
            Ok::<_, Failure>(client)
        };
        // They meet, and one leaves.
        let (mut sender, mut receiver) = (connect(from)?, connect(to)?);
        sender.make_room()?;
        if self.server.peer != Peer::Nats {
            receiver.listen()?;
        }
        sender.write_to(to, &mut receiver)?;
        receiver.sync()?;
        let memory = receiver.memory();
        receiver.close()?;

        let (text, count) = (vec![b'x'; STORED_LEN], count as u64);
        let mut poll = Poll::new()?;
        poll.add(&sender, 0)?;
        let (cpu, begun, mut sent) = (Cpu::of(self.server.id())?, Instant::now(), 0);
        while sender.heard.stored < count {
            while sent < count && sent - sender.heard.stored < UNACKNOWLEDGED {
                if !sender.send(&text, 1)? {
                    return Err("a hundred short messages fill the socket".into());
                }
                sent += 1;
            }
            if poll.wait(DEADLINE)?.is_empty() {
                return Err("what was sent is not acknowledged".into());
            }
            sender.read()?;
        }
        let (operations, wall) = (count, begun.elapsed());
        let stored = Measured { cpu: Cpu::of(self.server.id())?.since(&cpu), operations, wall };
        sender.close()?;

        let mut receiver = Client::reach(&self.server, to, &Resume::No, true)?;
        receiver.remember(memory);
        let (cpu, begun) = (Cpu::of(self.server.id())?, Instant::now());
        receiver.enter()?;
        receiver.fetch()?;
        receiver.until(|heard| heard.messages >= count)?;
        let wall = begun.elapsed();
        receiver.sync()?;
        let drained = Measured { cpu: Cpu::of(self.server.id())?.since(&cpu), operations, wall };
        receiver.close()?;
        if row == Row::Drain {
            return Ok(drained);
        }
        self.drained.push_back(drained);
        Ok(stored)
    }

    /// The median time of a message there and one back, and round trips a second.
    fn round_trips(&mut self, people: &[Arc<Person>], count: usize) -> Result<(f64, f64), Failure> {
        let (_, pairs) = self.pairs(people, 1)?;
        let Talk { sender, receivers, .. } = &mut pairs[0];
        let receiver = receivers.first_mut().ok_or("a pair are two")?;
        let mut poll = Poll::new()?;
        poll.add(sender, 0)?;
        poll.add(receiver, 1)?;
        let text = [b'x'; 64];
        let mut times = Vec::with_capacity(count);
        for _ in 0..count + count / 10 {
            let begun = Instant::now();
            one_way(&mut poll, sender, receiver, &text)?;
            one_way(&mut poll, receiver, sender, &text)?;
            times.push(begun.elapsed());
        }
        sender.set_nonblocking(false)?;
        receiver.set_nonblocking(false)?;
        let total: Duration = times.iter().sum();
        let median = crate::median(&mut times[count / 10..]);
        Ok((median.as_secs_f64() * 1e6, times.len() as f64 / total.as_secs_f64()))
    }
}

fn figure(measured: Measured) -> Option<(f64, f64)> {
    Some((measured.us(), measured.operations as f64 / measured.wall.as_secs_f64()))
}

fn one_way(poll: &mut Poll, from: &mut Client, to: &mut Client, text: &[u8]) -> Result<(), Failure> {
    let before = to.heard.messages;
    from.send(text, 1)?;
    let begun = Instant::now();
    while to.heard.messages == before {
        if begun.elapsed() > DEADLINE {
            return Err("a message does not arrive".into());
        }
        poll.wait(Duration::from_secs(1))?;
        to.read()?;
        from.read()?;
    }
    Ok(())
}

/// Makes everybody known to the server.
pub(crate) fn enrol(server: &Server, people: &[Arc<Person>]) -> Result<(), Failure> {
    in_shares(people, |person| Client::enrol(server, person)).map(drop)
}

fn in_shares<T: Send>(
    people: &[Arc<Person>],
    work: impl Fn(&Arc<Person>) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    // More than there are cores, since who waits for the disk needs none.
    let share = people.len().div_ceil(8).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let workers: Vec<_> = people
            .chunks(share)
            .map(|people| scope.spawn(move || people.iter().map(work).collect::<Result<Vec<_>, _>>()))
            .collect();
        let mut all = Vec::with_capacity(people.len());
        for worker in workers {
            all.extend(worker.join().map_err(|_| "a thread failed")??);
        }
        Ok(all)
    })
}

fn in_shares_mut(
    clients: &mut [Client],
    work: impl Fn(&mut Client) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let share = clients.len().div_ceil(std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let workers: Vec<_> = clients
            .chunks_mut(share)
            .map(|clients| scope.spawn(move || clients.iter_mut().try_for_each(work)))
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a thread failed")?)
    })
}

/// Heartbeats of idle connections come so often, and at least one of each is waited for.
const HEARTBEAT: Duration = Duration::from_secs(4);

/// KiB of resident memory that a connection takes, at a server of its own; and the memory of the whole server, in MiB.
fn idle(site: &Site, peer: Peer, people: &[Arc<Person>]) -> Result<(f64, f64), Failure> {
    let server = site.start(peer, Some(HEARTBEAT))?;
    enrol(&server, people)?;
    let before = resident(server.id())?;
    let mut clients = in_shares(people, |person| {
        let mut client = Client::connect(&server, person)?;
        client.listen()?;
        Ok(client)
    })?;
    let mut poll = Poll::new()?;
    for (number, client) in clients.iter().enumerate() {
        poll.add(client, number)?;
    }
    let (begun, mut beaten) = (Instant::now(), false);
    while begun.elapsed() < HEARTBEAT * 2 {
        for number in poll.wait(Duration::from_millis(100))? {
            clients[number].read()?;
        }
        if !beaten && begun.elapsed() > HEARTBEAT {
            beaten = true;
            for client in &mut clients {
                client.beat()?;
            }
        }
    }
    let after = resident(server.id())?;
    drop(clients);
    Ok((after.saturating_sub(before) as f64 / people.len() as f64, after as f64 / 1024.0))
}

/// Bytes of resident memory that a member of a group takes at a server of ours, a chain of the founder's included; and the
/// memory of the whole server, in MiB.
fn member(site: &Site, peer: Peer, people: &[Arc<Person>]) -> Result<Option<(f64, f64)>, Failure> {
    if peer != Peer::Ossicle {
        return Ok(None);
    }
    let server = site.start(peer, None)?;
    let people = &people[..MEMBERS];
    enrol(&server, people)?;
    let mut clients = in_shares(people, |person| {
        let mut client = Client::connect(&server, person)?;
        client.listen()?;
        Ok(client)
    })?;
    let (founder, invitees) = clients.split_first_mut().ok_or("there are people")?;
    let mut fill = |count| {
        (0..count).try_for_each(|_| Group::new(&people[0], &people[1..])?.fill(founder, invitees))?;
        // What waits for somebody is no part of a group.
        core::iter::once(&mut *founder).chain(&mut *invitees).try_for_each(Client::sync)
    };
    fill(GROUPS_BEFORE)?;
    let before = resident(server.id())?;
    fill(GROUPS)?;
    let after = resident(server.id())?;
    let bytes = after.saturating_sub(before) as f64 * 1024.0 / (GROUPS * MEMBERS) as f64;
    Ok(Some((bytes, after as f64 / 1024.0)))
}
