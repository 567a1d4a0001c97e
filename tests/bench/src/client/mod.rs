//! One client of any server: a socket, and the protocol that is spoken over it.
//!
//! What is to be written is sealed first and goes into the socket with one write. A client is driven by blocking calls
//! until it has entered, and by `load` afterwards.

mod mqtt;
mod nats;
mod ossicle;
mod tls;

use core::cell::RefCell;
use core::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use ossicle_core::{Channel, Message};
use rustls::ClientConfig;

use crate::Failure;
use crate::people::Person;
use crate::server::{DEADLINE, Peer, Server};

pub use ossicle::Memory;

/// Room for several of the longest records.
const SCRATCH_LEN: usize = 128 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_LEN]);
}

/// What a client was told so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Messages for it.
    pub messages: u64,
    /// Its own messages that the server said it has stored.
    pub stored: u64,
    /// Requests that were done: it has entered, subscribed, published, introduced itself.
    pub done: u64,
}

/// The server does not do what a row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotDone;

impl fmt::Display for NotDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this server does not do that")
    }
}

impl core::error::Error for NotDone {}

enum Protocol {
    Ossicle(Box<ossicle::Ossicle>),
    Mqtt(Box<mqtt::Mqtt>),
    Nats(Box<nats::Nats>),
}

/// One client.
pub struct Client {
    stream: TcpStream,
    protocol: Protocol,
    /// Received, and not yet a whole record.
    rest: Vec<u8>,
    /// Sealed, and how much of it was written.
    out: Vec<u8>,
    written: usize,
    /// What it was told.
    pub heard: Heard,
}

/// What a client brings from its last connection.
pub enum Resume {
    /// Nothing: authenticate in full, and never again otherwise.
    No,
    /// Sessions of TLS.
    Tls(Arc<ClientConfig>),
    /// A channel of Ossicle.
    Channel(Box<Channel>),
}

impl Client {
    /// Makes this person known, where clients must be. Nothing else is left behind at the server.
    ///
    /// # Errors
    /// If it is not admitted.
    pub fn enrol(server: &Server, person: &Arc<Person>) -> Result<(), Failure> {
        if server.peer == Peer::Ossicle {
            let stream = dial(server)?;
            let (entered, rest) = ossicle::Ossicle::enrol(&stream, server, person)?;
            let mut client = Self::new(stream, Protocol::Ossicle(Box::new(entered)), rest);
            client.ask(|protocol, out| match protocol {
                Protocol::Ossicle(ossicle) => ossicle.publish_bundle(out),
                _ => Ok(()),
            })?;
            client.close()?;
        }
        Ok(())
    }

    /// Connects, authenticates and waits until the server has said that it is so.
    ///
    /// # Errors
    /// If the server does not let it in.
    pub fn connect(server: &Server, person: &Arc<Person>) -> Result<Self, Failure> {
        Self::connect_with(server, person, &Resume::No)
    }

    /// The same, and resumes what there is to be resumed.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_with(server: &Server, person: &Arc<Person>, resume: &Resume) -> Result<Self, Failure> {
        let mut client = Self::reach(server, person, resume, false)?;
        client.enter()?;
        Ok(client)
    }

    /// Connects as far as the server gives it nothing yet that waits for it. `stores`: what it sends is to be stored, and
    /// what it missed was.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn reach(server: &Server, person: &Arc<Person>, resume: &Resume, stores: bool) -> Result<Self, Failure> {
        let mut stream = dial(server)?;
        let config = match resume {
            Resume::Tls(config) => config,
            _ => &server.tls,
        };
        let (protocol, rest) = match server.peer {
            Peer::Ossicle => {
                let channel = match resume {
                    Resume::Channel(channel) => Some((**channel).clone()),
                    _ => None,
                };
                let (entered, rest) = ossicle::Ossicle::enter(&stream, server, person, channel, stores)?;
                (Protocol::Ossicle(Box::new(entered)), rest)
            }
            Peer::Mosquitto => {
                let mqtt = mqtt::Mqtt::new(tls::Tls::connect(&mut stream, config)?, person.number, stores);
                (Protocol::Mqtt(Box::new(mqtt)), Vec::new())
            }
            Peer::Nats => {
                nats::Nats::greet(&mut stream)?;
                let nats = nats::Nats::new(tls::Tls::connect(&mut stream, config)?, person.number, stores);
                (Protocol::Nats(Box::new(nats)), Vec::new())
            }
        };
        Ok(Self::new(stream, protocol, rest))
    }

    /// Says who it is, where that comes behind authentication.
    ///
    /// # Errors
    /// If it is not let in.
    pub fn enter(&mut self) -> Result<(), Failure> {
        match &self.protocol {
            Protocol::Ossicle(_) => Ok(()),
            _ => self.ask(|protocol, out| match protocol {
                Protocol::Mqtt(mqtt) => mqtt.login(out),
                Protocol::Nats(nats) => nats.login(out),
                Protocol::Ossicle(_) => Ok(()),
            }),
        }
    }

    fn new(stream: TcpStream, protocol: Protocol, rest: Vec<u8>) -> Self {
        Self { stream, protocol, rest, out: Vec::new(), written: 0, heard: Heard::default() }
    }

    /// Takes messages from now on.
    ///
    /// # Errors
    /// If the server does not agree.
    pub fn listen(&mut self) -> Result<(), Failure> {
        self.ask(|protocol, out| match protocol {
            Protocol::Ossicle(ossicle) => ossicle.listen(out),
            Protocol::Mqtt(mqtt) => mqtt.subscribe(out),
            Protocol::Nats(nats) => nats.subscribe(out),
        })
    }

    /// From now on this client writes to `person`, who is `other`.
    ///
    /// # Errors
    /// If they cannot be introduced.
    pub fn write_to(&mut self, person: &Arc<Person>, other: &mut Self) -> Result<(), Failure> {
        let before = other.heard.done;
        match (&mut self.protocol, &mut other.protocol) {
            (Protocol::Mqtt(mqtt), _) => mqtt.write_to(person.number),
            (Protocol::Nats(nats), _) => nats.write_to(person.number),
            (Protocol::Ossicle(from), Protocol::Ossicle(to)) => {
                let conversation = from.direct(person);
                to.hear_from(from.person(), conversation);
                from.write_in(conversation, vec![Arc::clone(person)]);
                self.start_chain()?;
                return other.until(|heard| heard.done > before);
            }
            _ => return Err("they are at different servers".into()),
        }
        Ok(())
    }

    /// Takes what is said in this room from now on, where rooms are there by themselves.
    ///
    /// # Errors
    /// If the server does not agree.
    pub fn listen_in(&mut self, room: usize) -> Result<(), Failure> {
        match &mut self.protocol {
            Protocol::Mqtt(mqtt) => mqtt.enter(room),
            Protocol::Nats(nats) => nats.enter(room),
            Protocol::Ossicle(_) => return Err("a room of ours has members".into()),
        }
        self.listen()
    }

    /// From now on this client writes to all who listen in this room.
    ///
    /// # Errors
    /// As [`Client::listen_in`].
    pub fn write_in(&mut self, room: usize) -> Result<(), Failure> {
        match &mut self.protocol {
            Protocol::Mqtt(mqtt) => mqtt.write_to(room),
            Protocol::Nats(nats) => nats.write_to(room),
            Protocol::Ossicle(_) => return Err("a room of ours has members".into()),
        }
        Ok(())
    }

    /// Makes a place for what this client sends to those who are away, where servers need one.
    ///
    /// # Errors
    /// If the server does not agree.
    pub fn make_room(&mut self) -> Result<(), Failure> {
        match &self.protocol {
            Protocol::Nats(_) => self.ask(|protocol, out| match protocol {
                Protocol::Nats(nats) => nats.make_stream(out),
                _ => Ok(()),
            }),
            _ => Ok(()),
        }
    }

    /// Asks for what was kept, where that does not come by itself.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn fetch(&mut self) -> Result<(), Failure> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.listen(&mut self.out)?,
            Protocol::Nats(nats) => nats.consume(&mut self.out)?,
            Protocol::Mqtt(_) => {}
        }
        self.flush().map(drop)
    }

    /// Waits until the server has dealt with everything that was sent.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn sync(&mut self) -> Result<(), Failure> {
        self.ask(|protocol, out| match protocol {
            Protocol::Ossicle(ossicle) => ossicle.sync(out),
            Protocol::Mqtt(mqtt) => mqtt.beat(out),
            Protocol::Nats(nats) => nats.sync(out),
        })
    }

    /// Seals so many messages with this text, and writes them at once. False if the socket did not take all.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn send(&mut self, text: &[u8], count: usize) -> Result<bool, Failure> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.send(text, count, &mut self.out)?,
            Protocol::Mqtt(mqtt) => mqtt.send(text, count, &mut self.out)?,
            Protocol::Nats(nats) => nats.send(text, count, &mut self.out)?,
        }
        self.flush()
    }

    /// Does before the run what is between the clients only: seals so many messages end to end, and announces the chain that
    /// they begin in. What comes to `others` is opened by [`Client::settle`].
    ///
    /// # Errors
    /// If they cannot be sealed.
    pub fn seal_ahead(&mut self, text: &[u8], count: usize, others: &mut [Self]) -> Result<(), Failure> {
        let Protocol::Ossicle(from) = &mut self.protocol else { return Ok(()) };
        from.seal_ahead(text, count)?;
        let mut before = Vec::with_capacity(others.len());
        for other in &mut *others {
            other.ours()?.open_later();
            before.push(other.heard.done);
        }
        let (wraps, done) = (from.announce(&mut self.out)?, self.heard.done);
        self.flush()?;
        self.until(|heard| heard.done >= done + wraps)?;
        others.iter_mut().zip(before).try_for_each(|(other, before)| other.until(|heard| heard.done > before))
    }

    /// Opens what came to it and was not opened, and forgets what it has sealed ahead and not sent.
    ///
    /// # Errors
    /// If something does not open.
    pub fn settle(&mut self) -> Result<(), Failure> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.settle(),
            _ => Ok(()),
        }
    }

    /// Says that it is there, where that is the client's business.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn beat(&mut self) -> Result<(), Failure> {
        if let Protocol::Mqtt(mqtt) = &mut self.protocol {
            mqtt.beat(&mut self.out)?;
        }
        self.flush().map(drop)
    }

    /// Writes what is sealed. False if the socket did not take all.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn flush(&mut self) -> Result<bool, Failure> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(len) => self.written += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(true)
    }

    /// Reads once, and does what is to be done with what came. False if nothing was there.
    ///
    /// # Errors
    /// If the connection has ended, or the server refused something.
    pub fn read(&mut self) -> Result<bool, Failure> {
        SCRATCH.with_borrow_mut(|scratch| {
            let held = self.rest.len();
            scratch[..held].copy_from_slice(&self.rest);
            let len = match self.stream.read(&mut scratch[held..]) {
                Ok(0) => return Err("the server has closed the connection".into()),
                Ok(len) => held + len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            self.take(&mut scratch[..len])?;
            Ok(true)
        })
    }

    fn take(&mut self, data: &mut [u8]) -> Result<(), Failure> {
        let used = match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.receive(data, &mut self.out, &mut self.heard)?,
            Protocol::Mqtt(mqtt) => mqtt.receive(data, &mut self.out, &mut self.heard)?,
            Protocol::Nats(nats) => nats.receive(data, &mut self.out, &mut self.heard)?,
        };
        self.rest.clear();
        self.rest.extend_from_slice(&data[used..]);
        self.flush().map(drop)
    }

    /// Reads until it was told this.
    ///
    /// # Errors
    /// As [`Client::read`], and if it does not come in time.
    pub fn until(&mut self, told: impl Fn(&Heard) -> bool) -> Result<(), Failure> {
        // What came together with the end of the handshake.
        let mut rest = core::mem::take(&mut self.rest);
        self.take(&mut rest)?;
        while !told(&self.heard) {
            if !self.read()? {
                return Err("nothing comes from the server any more".into());
            }
        }
        Ok(())
    }

    /// Announces a chain to everybody in the conversation that it was last told to write in.
    pub(crate) fn start_chain(&mut self) -> Result<(), Failure> {
        self.ask(|protocol, out| match protocol {
            Protocol::Ossicle(ossicle) => ossicle.start_chain(out),
            _ => Ok(()),
        })
    }

    /// The engine, where the server is ours.
    pub(crate) fn ours(&mut self) -> Result<&mut ossicle::Ossicle, Failure> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => Ok(ossicle),
            _ => Err("this is about our own protocol".into()),
        }
    }

    /// Says something to a server of ours.
    pub(crate) fn tell(&mut self, message: &Message<'_>) -> Result<(), Failure> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.say(message, &mut self.out)?,
            _ => return Err("this is about our own protocol".into()),
        }
        self.flush().map(drop)
    }

    /// The next that a server of ours says beside messages, to who overhears that.
    pub(crate) fn overheard(&mut self) -> Result<Vec<u8>, Failure> {
        loop {
            if let Some(payload) = self.ours()?.overheard() {
                return Ok(payload);
            }
            if !self.read()? {
                return Err("nothing comes from the server any more".into());
            }
        }
    }

    fn ask(&mut self, request: impl FnOnce(&mut Protocol, &mut Vec<u8>) -> Result<(), Failure>) -> Result<(), Failure> {
        let before = self.heard.done;
        request(&mut self.protocol, &mut self.out)?;
        self.flush()?;
        self.until(|heard| heard.done > before)
    }

    /// Whether it has resumed what it brought.
    pub fn has_resumed(&self) -> bool {
        match &self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.has_resumed(),
            Protocol::Mqtt(mqtt) => mqtt.tls.has_resumed(),
            Protocol::Nats(nats) => nats.tls.has_resumed(),
        }
    }

    /// Takes out what the client knows of those who write to it.
    pub fn memory(&mut self) -> Memory {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.memory(),
            _ => Memory::default(),
        }
    }

    /// Puts it in again.
    pub fn remember(&mut self, memory: Memory) {
        if let Protocol::Ossicle(ossicle) = &mut self.protocol {
            ossicle.remember(memory);
        }
    }

    /// What the next connection can resume instead of the channel that this one came with.
    pub fn resume(&mut self) -> Option<Resume> {
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.take_channel().map(|channel| Resume::Channel(Box::new(channel))),
            _ => None,
        }
    }

    /// From now on reading and writing do not wait.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), Failure> {
        Ok(self.stream.set_nonblocking(nonblocking)?)
    }

    /// Takes its leave, and waits until the server has closed the connection.
    ///
    /// # Errors
    /// If the server does not close in time.
    pub fn close(mut self) -> Result<(), Failure> {
        self.stream.set_nonblocking(false)?;
        match &mut self.protocol {
            Protocol::Ossicle(ossicle) => ossicle.close(&mut self.out)?,
            Protocol::Mqtt(mqtt) => mqtt.close(&mut self.out)?,
            Protocol::Nats(nats) => nats.tls.close(&mut self.out)?,
        }
        self.flush()?;
        // Who has closed meanwhile has nothing to be shut down.
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn dial(server: &Server) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(server.address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}
