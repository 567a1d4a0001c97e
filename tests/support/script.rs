//! A server that does what a test tells it to, honest or not: the server's half of the engine over one TCP connection at
//! a time, with no router behind it.

use core::net::SocketAddr;
use core::time::Duration;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use ossicle::crypto::{IdentityKey, verify};
use ossicle_core::{
    Ask, Channel, Connection, Event, MAX_RECORD_LEN, Message, PublicKey, Received, ServerConfig, Settings,
};

use crate::{SERVER_ID, public, seed};

/// How long anything in a script may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that waits for its only client.
pub struct Script {
    listener: TcpListener,
    key: IdentityKey,
    connections: u8,
    /// The channel that was issued last, the only one that is resumed. A script may forget it.
    pub channel: Option<Channel>,
    /// Seconds of silence that it wants signs of life after, and gives up after.
    pub beat: (u16, u16),
    /// What it says of its store.
    pub store_epoch: [u8; 8],
}

/// The connection of a [`Script`]'s client, after an honest handshake.
pub struct Scripted {
    stream: TcpStream,
    connection: Connection,
    data: Vec<u8>,
    /// The id that the client authenticated.
    pub client: [u8; 16],
    /// The channel that it offered.
    pub offered: Option<[u8; 16]>,
    /// Whether that was resumed.
    pub resumed: bool,
}

impl Script {
    /// A server with this key on a port of the kernel's.
    pub fn new(key: IdentityKey) -> Self {
        Self::at(0, key)
    }

    /// A server with this key on this port of the loopback.
    pub fn at(port: u16, key: IdentityKey) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
        Self { listener, key, connections: 0, channel: None, beat: (15, 45), store_epoch: [0; 8] }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound listener has an address")
    }

    /// Accepts the next connection and does the handshake with the client of this key.
    pub fn accept(&mut self, client: &IdentityKey) -> Scripted {
        let (stream, _) = self.listener.accept().expect("the client comes");
        stream.set_read_timeout(Some(PATIENCE)).expect("a deadline can be set");
        stream.set_nodelay(true).expect("delays can be switched off");
        let server: PublicKey<'_> = public(&self.key);
        self.connections += 1;
        let config = ServerConfig { id: SERVER_ID, fingerprint: server.fingerprint(), record_limit: 16_408 };
        let connection = Connection::server(config, &seed(100 + self.connections));
        let (data, client_id) = (Vec::new(), [0; 16]);
        let mut scripted = Scripted { stream, connection, data, client: client_id, offered: None, resumed: false };
        let settings = Settings {
            heartbeat: self.beat.0,
            timeout: self.beat.1,
            channel: [self.connections; 16],
            valid_for: 600,
            store_epoch: self.store_epoch,
            ..Settings::default()
        };
        scripted.handshake(&self.key, client, self.channel.as_ref(), &settings);
        self.channel = scripted.connection.take_channel();
        scripted
    }

    /// Accepts the next connection and breaks it off after the client's hello. Whether that offered a channel.
    pub fn break_off(&mut self) -> bool {
        let (mut stream, _) = self.listener.accept().expect("the client comes");
        stream.set_read_timeout(Some(PATIENCE)).expect("a deadline can be set");
        let mut hello = [0; 84];
        stream.read_exact(&mut hello).expect("a hello has as many bytes at least");
        hello[83] == 1
    }
}

impl Scripted {
    fn handshake(&mut self, server: &IdentityKey, client: &IdentityKey, held: Option<&Channel>, settings: &Settings) {
        let mut out = [0; 4096];
        loop {
            if let Some(Ask::Sign(statement)) = self.connection.ask() {
                let signature = server.sign(&statement).expect("the key signs");
                let len = self.connection.sign_server(public(server), &signature, &mut out).expect("there is room");
                self.stream.write_all(&out[..len]).expect("the client reads");
            }
            let mut record = self.record();
            let event = self.connection.receive(&mut record).expect("an honest client");
            match event {
                Received::Record { event: Event::CheckChannel(id), .. } => {
                    self.offered = Some(id);
                    let held = held.filter(|channel| channel.id == id);
                    let len = self.connection.answer_offer(held, &mut out).expect("there is room");
                    self.stream.write_all(&out[..len]).expect("the client reads");
                    self.client = held.map_or([0; 16], |channel| channel.client);
                }
                Received::Record { event: Event::CheckClient(claim), .. } => {
                    let statement =
                        self.connection.bind(&claim, &public(client).fingerprint()).expect("the client's key");
                    assert!(verify(client.modulus(), &statement, claim.signature()), "the client's signature");
                    self.client = claim.id();
                    break;
                }
                Received::Record { event: Event::Resumed, .. } => {
                    self.resumed = true;
                    break;
                }
                _ => {}
            }
        }
        let len = self.connection.accept(settings, &mut out).expect("there is room");
        self.stream.write_all(&out[..len]).expect("the client reads");
    }

    /// The bytes of the next whole record.
    fn record(&mut self) -> Vec<u8> {
        self.record_or_end().expect("the client has ended the connection")
    }

    fn record_or_end(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(len) = self.data.get(4..6).map(|len| usize::from(u16::from_be_bytes([len[0], len[1]])))
                && self.data.len() >= len
            {
                return Some(self.data.drain(..len).collect());
            }
            let mut bytes = [0; 4096];
            let len = self.stream.read(&mut bytes).expect("the client writes in time");
            if len == 0 {
                return None;
            }
            assert!(self.data.len() < MAX_RECORD_LEN, "no record is as long as that");
            self.data.extend_from_slice(&bytes[..len]);
        }
    }

    /// The payloads of what the client says until it ends the connection.
    pub fn last_words(mut self) -> Vec<Vec<u8>> {
        let mut said = Vec::new();
        while let Some(mut record) = self.record_or_end() {
            if let Received::Record { event: Event::Message(payload), .. } =
                self.connection.receive(&mut record).expect("a good record")
            {
                said.push(payload.to_vec());
            }
        }
        said
    }

    /// The payload of the next message.
    pub fn receive(&mut self) -> Vec<u8> {
        self.receive_or_close().expect("another event than a message")
    }

    /// The payload of the next message; `None` if the client closes instead.
    pub fn receive_or_close(&mut self) -> Option<Vec<u8>> {
        loop {
            let mut record = self.record();
            match self.connection.receive(&mut record).expect("a good record") {
                Received::Record { event: Event::Message(payload), .. } => return Some(payload.to_vec()),
                Received::Record { event: Event::Closed(_), .. } => return None,
                Received::Record { event: Event::Progress, .. } => {}
                _ => panic!("another event than a message"),
            }
        }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Message<'_>) {
        let mut out = vec![0; MAX_RECORD_LEN];
        let len = self.connection.send(message, &mut out).expect("there is room");
        self.stream.write_all(&out[..len]).expect("the client reads");
    }

    /// Sends raw bytes in the place of a record.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the client reads");
    }

    /// Ends the connection without a word.
    pub fn cut(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("it stands");
    }

    /// Whether the client has ended the connection; waits for it.
    pub fn is_ended(mut self) -> bool {
        loop {
            match self.stream.read(&mut [0; 4096]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}
