//! A sensor that is a full member of an Ossicle network, written once for every place it runs in.
//!
//! Here is what does not know the chip: it joins its server, reports to its owner once a second, obeys `led on` and
//! `led off` when its owner has signed them, and joins again whatever happens. It stands on any [`Transport`] and any
//! [`Board`]: the board comes in from `main.rs`, [`net`] turns any Ethernet device into a transport, and hosts bring
//! their own of both. It refuses `unsafe` and everything that names a chip; of the heap it knows nothing, but RSA does.

#![no_std]
#![forbid(unsafe_code)]

pub mod net;

use core::net::{Ipv4Addr, SocketAddrV4};

use chacha20::ChaCha20Rng;
use embedded_io::{Read, Write};
use ossicle_core::{
    ApiMisuse, BufferError, Client, ClientBuffers, ClientEvent, ClientGroup, ClientIdentity, ClientStep, DriverError,
    Error, GroupPolicy, IdentityPage, MAX_RSA_LEN, PeerConfig, PublicKey, Reason, RsaKey, Rungs, Settings, Statement,
    blocking, generator_seed, verify_rsa,
};
use rand_core::SeedableRng;

/// Milliseconds between two readings.
pub const REPORT_EVERY: u64 = 1_000;
/// The application's kind of every message here: UTF-8 text.
const TEXT: u8 = 0;
/// What anybody in its group may ask it for.
pub const QUESTION: &[u8] = b"reading?";
/// The owner is the only peer.
const OWNER: usize = 0;
const BACK_OFF: core::ops::RangeInclusive<u64> = 1_000..=60_000;
/// Until the server has said how long a silence may be: a handshake takes a slow device seconds.
const HANDSHAKE_TIMEOUT: u64 = 30_000;

/// A byte stream that can be opened again and that gives up waiting at a deadline.
pub trait Transport: Read + Write {
    /// Opens the stream. Fails at the deadline at the latest.
    ///
    /// # Errors
    /// The stream's own.
    fn connect(&mut self, peer: SocketAddrV4) -> Result<(), Self::Error>;

    /// Drops the stream at once, in any state.
    fn abort(&mut self);

    /// From when on waiting fails with an error that [`Transport::is_timeout`] knows. `None`: never.
    fn set_deadline(&mut self, deadline: Option<u64>);

    /// Milliseconds since some moment, never going back.
    fn now(&self) -> u64;

    /// Waits until then, keeping the network alive.
    fn sleep(&mut self, until: u64);

    /// Whether waiting failed only because the deadline passed.
    fn is_timeout(error: &Self::Error) -> bool;
}

/// What the application needs of the thing it runs on.
pub trait Board {
    /// Fills `bytes` from a source of entropy, or does not return.
    fn entropy(&mut self, bytes: &mut [u8]);

    /// Switches the LED.
    fn set_led(&mut self, on: bool);

    /// Whether the LED is on.
    fn led(&self) -> bool;

    /// The temperature in hundredths of a degree Celsius.
    fn temperature(&mut self) -> i32;

    /// Instructions executed so far, where something counts them.
    fn instructions(&self) -> u64 {
        0
    }

    /// Told of all that happens, for a log or a test.
    fn observe(&mut self, happened: Happened) {
        let _ = happened;
    }

    /// Whether the application should end: a device never does.
    fn stopped(&self) -> bool {
        false
    }
}

/// What happened, in the words of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Happened {
    /// The transport could not be opened.
    Unreachable,
    /// The handshake is done.
    Connected {
        /// The last channel was resumed, without RSA.
        resumed: bool,
        /// Instructions that the device computed for it.
        instructions: u64,
    },
    /// The new bundle is in the directory.
    Ready {
        /// Instructions computed since the handshake: new keys and one signature.
        instructions: u64,
    },
    /// The owner can be reported to.
    OwnerReady {
        /// Instructions computed to start the chain.
        instructions: u64,
    },
    /// The owner cannot be reported to, for this reason.
    OwnerLost(Reason),
    /// A reading was sealed.
    Reported {
        /// Its number.
        n: u32,
        /// Instructions from the text to the record.
        instructions: u64,
    },
    /// A reading was refused.
    Refused(Reason),
    /// The owner's signed command was obeyed.
    Obeyed {
        /// What it said.
        led: bool,
    },
    /// The device is a member of a group.
    Joined {
        /// Instructions computed since the last milestone: everybody was looked up.
        instructions: u64,
    },
    /// Everybody in the group can be answered.
    GroupReady {
        /// Instructions computed since the last milestone.
        instructions: u64,
    },
    /// The group was told a reading.
    Answered {
        /// Its number.
        n: u32,
    },
    /// The group is over, or the device's part in it.
    Left,
    /// The group, or one of it, cannot be answered, for this reason.
    GroupLost(Reason),
    /// A message was not obeyed: not signed, or no command.
    Ignored {
        /// Whether it was signed.
        signed: bool,
    },
    /// The connection has ended.
    Ended(Ending),
}

/// Why a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(target_os = "none", derive(defmt::Format))]
#[non_exhaustive]
pub enum Ending {
    /// The server closed it.
    Closed(Option<Reason>),
    /// The engine ended it.
    Protocol(Error),
    /// The server was silent for too long.
    Silence,
    /// The application was stopped.
    Stopped,
    /// The transport broke.
    Transport,
}

/// The buffers of a [`Sensor`], to be put where there is room for them.
pub struct Buffers {
    /// Takes a member's key of 3072 bits and its bundle at once.
    rx: [u8; 1152],
    tx: [u8; 1024],
    signature: [u8; 256],
    group: ClientGroup,
}

impl Buffers {
    /// Empty buffers.
    pub const fn new() -> Self {
        Self { rx: [0; 1152], tx: [0; 1024], signature: [0; 256], group: ClientGroup::new() }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// The device's own public key, which the page's primes make, in `modulus`.
///
/// # Errors
/// Those of [`RsaKey`] if the page's key is none.
#[inline(never)]
pub fn public_key<'p>(page: &IdentityPage<'_>, modulus: &'p mut [u8; MAX_RSA_LEN]) -> Result<PublicKey<'p>, Error> {
    RsaKey::new(page.key.d, page.key.p, page.key.q)?.public(modulus)
}

/// The application: everything that survives a broken connection.
pub struct Sensor<'b, 'p> {
    page: IdentityPage<'p>,
    client: Client<'b, 'p, 1>,
    rng: ChaCha20Rng,
    /// Instructions computed since the last milestone.
    computed: u64,
    settings: Settings,
    /// Somebody in the group wants to know.
    asked: bool,
}

impl<'b, 'p> Sensor<'b, 'p> {
    /// The sensor of this page; `key` is what [`public_key`] makes of it.
    ///
    /// # Errors
    /// Those of [`Client::new`].
    pub fn new<B: Board>(
        page: IdentityPage<'p>,
        key: PublicKey<'p>,
        buffers: &'b mut Buffers,
        board: &mut B,
    ) -> Result<Self, Error> {
        let identity = ClientIdentity { id: page.id, key_epoch: 0, key, server: page.server };
        let owner = PeerConfig { id: page.owner.id, key: page.owner.key, oldest: Some(page.owner.bundle) };
        let Buffers { rx, tx, signature, group } = buffers;
        let buffers = ClientBuffers { rx, tx, signature };
        let mut entropy = [0; 64];
        board.entropy(&mut entropy);
        // The device's own secret makes the seed unpredictable to whoever can predict the entropy (PROTOCOL 8.4).
        let rng = ChaCha20Rng::from_seed(*generator_seed(&entropy, page.key.d).expose());
        let mut client = Client::new(identity, &[owner], buffers, &seed(board))?;
        if page.groups == GroupPolicy::Owner {
            client.accept_invitations(OWNER, group);
        }
        Ok(Self { page, client, rng, computed: 0, settings: Settings::default(), asked: false })
    }

    /// Joins, reports, obeys and joins again, until the board says stop.
    pub fn run<T: Transport, B: Board>(&mut self, transport: &mut T, board: &mut B) {
        let peer = SocketAddrV4::new(Ipv4Addr::from(self.page.address), self.page.port);
        let mut back_off = *BACK_OFF.start();
        while !board.stopped() {
            transport.set_deadline(Some(transport.now() + HANDSHAKE_TIMEOUT));
            if transport.connect(peer).is_ok() {
                let connected_at = transport.now();
                let ending = self.converse(transport, board);
                board.observe(Happened::Ended(ending));
                if transport.now() - connected_at > *BACK_OFF.end() {
                    back_off = *BACK_OFF.start();
                }
            } else {
                board.observe(Happened::Unreachable);
            }
            transport.abort();
            if board.stopped() {
                break;
            }
            self.client.reconnect(&seed(board));
            if self.work(transport, board) {
                continue;
            }
            // Half of it at random, so that a thousand devices do not come back together.
            let jitter = u64::from(rand_core::Rng::next_u32(&mut self.rng)) % (back_off / 2 + 1);
            transport.sleep(transport.now() + back_off / 2 + jitter);
            back_off = (back_off * 2).min(*BACK_OFF.end());
        }
    }

    /// Solves the puzzle of a server that is under load, if it has set one: that is wait enough, and it does not wait for
    /// long itself. Whether there was one.
    #[inline(never)]
    fn work<T: Transport, B: Board>(&mut self, transport: &mut T, board: &B) -> bool {
        let asked = self.client.solve();
        while !board.stopped() && self.client.solve() {
            // The network is kept alive.
            transport.sleep(transport.now() + 1);
        }
        asked
    }

    /// One connection, from its first byte to its end.
    #[inline(never)]
    fn converse<T: Transport, B: Board>(&mut self, transport: &mut T, board: &mut B) -> Ending {
        let mut heard = transport.now();
        let mut next_report = heard;
        let mut next_start = heard;
        let mut start_back_off = *BACK_OFF.start();
        self.settings = Settings::default();
        loop {
            if board.stopped() {
                let _ = self.client.close(None);
                let _ = blocking::flush(&mut self.client, transport);
                return Ending::Stopped;
            }
            let silence = match self.settings.timeout {
                0 => HANDSHAKE_TIMEOUT,
                seconds => u64::from(seconds) * 1_000,
            };
            transport.set_deadline(Some(next_report.min(heard + silence).max(transport.now() + 1)));
            let received = match blocking::drive(&mut self.client, transport) {
                Ok(()) => true,
                Err(DriverError::Io(error)) if T::is_timeout(&error) => false,
                Err(DriverError::Io(_)) => return Ending::Transport,
                Err(DriverError::Protocol(error)) => return Ending::Protocol(error),
                Err(_) => return Ending::Transport,
            };
            let now = transport.now();
            if received {
                heard = now;
                match self.step(board) {
                    Ok(None) => {}
                    Ok(Some(ending)) => return ending,
                    Err(error) => return Ending::Protocol(error),
                }
            } else if now >= heard + silence {
                return Ending::Silence;
            }
            if self.asked
                && self.client.is_group_ready()
                && let Err(error) = self.answer(board)
            {
                return Ending::Protocol(error);
            }
            if now >= next_report {
                next_report = now + REPORT_EVERY;
                if self.client.is_ready(OWNER) {
                    if let Err(error) = self.report(board) {
                        return Ending::Protocol(error);
                    }
                } else if now >= next_start {
                    // Each start costs public-key operations on both sides: not every second to one who is away, nor as
                    // often as somebody says that a chain is unknown. A chain that stood for a while starts anew.
                    if now >= next_start + *BACK_OFF.end() {
                        start_back_off = *BACK_OFF.start();
                    }
                    self.client.start(OWNER);
                    next_start = now + start_back_off;
                    start_back_off = (start_back_off * 2).min(*BACK_OFF.end());
                }
            }
        }
    }

    /// Whatever the engine came to.
    #[inline(never)]
    fn step<B: Board>(&mut self, board: &mut B) -> Result<Option<Ending>, Error> {
        let begun = board.instructions();
        let step = self.client.poll(&mut self.rng)?;
        match step {
            ClientStep::Sign(statement) => {
                self.sign(&statement)?;
                self.computed += board.instructions() - begun;
            }
            ClientStep::Verify { key, statement, signature } => {
                let valid = verify(key, &statement, signature);
                self.client.verified(valid)?;
                self.computed += board.instructions() - begun;
            }
            ClientStep::Event(event) => {
                self.computed += board.instructions() - begun;
                let instructions = core::mem::take(&mut self.computed);
                match event {
                    ClientEvent::Connected { settings, resumed } => {
                        self.settings = settings;
                        board.observe(Happened::Connected { resumed, instructions });
                    }
                    ClientEvent::Ready => board.observe(Happened::Ready { instructions }),
                    ClientEvent::PeerReady(_) => board.observe(Happened::OwnerReady { instructions }),
                    ClientEvent::PeerLost { reason, .. } => board.observe(Happened::OwnerLost(reason)),
                    ClientEvent::Message { signed, kind, body, .. } => match command(body) {
                        Some(led) if signed && kind == TEXT => {
                            board.set_led(led);
                            board.observe(Happened::Obeyed { led });
                        }
                        _ => board.observe(Happened::Ignored { signed }),
                    },
                    ClientEvent::Receipt { receipt, .. } | ClientEvent::GroupReceipt { receipt, .. } => {
                        if let Some(reason) = receipt.reason {
                            board.observe(Happened::Refused(reason));
                        }
                    }
                    ClientEvent::GroupJoined => board.observe(Happened::Joined { instructions }),
                    ClientEvent::GroupReady => board.observe(Happened::GroupReady { instructions }),
                    ClientEvent::GroupMessage { from, kind, body, .. } => match command(body) {
                        Some(led) if from == self.page.owner.id && kind == TEXT => {
                            board.set_led(led);
                            board.observe(Happened::Obeyed { led });
                        }
                        _ if body == QUESTION && kind == TEXT => {
                            self.asked = true;
                            self.client.start_in_group();
                        }
                        _ => board.observe(Happened::Ignored { signed: true }),
                    },
                    ClientEvent::GroupMemberLost { reason, .. } | ClientEvent::GroupLost(reason) => {
                        board.observe(Happened::GroupLost(reason));
                    }
                    ClientEvent::GroupOver => board.observe(Happened::Left),
                    ClientEvent::Settings(settings) => self.settings = settings,
                    ClientEvent::Closed(reason) => return Ok(Some(Ending::Closed(reason))),
                    _ => {}
                }
            }
            _ => self.computed += board.instructions() - begun,
        }
        Ok(None)
    }

    /// In a frame of its own, like the other large steps: what RSA needs of the stack comes on top of it.
    #[inline(never)]
    fn sign(&mut self, statement: &Statement) -> Result<(), Error> {
        let mut signature = [0; 256];
        let key = RsaKey::new(self.page.key.d, self.page.key.p, self.page.key.q)?;
        key.sign(statement, &mut self.rng, &mut signature)?;
        self.client.sign(&signature)
    }

    /// Tells the group a reading, now or, where there is no room for it or no chain any more, later.
    fn answer<B: Board>(&mut self, board: &mut B) -> Result<(), Error> {
        let text = reading(board.temperature(), board.led());
        match self.client.send_to_group(Rungs::NONE, TEXT, &text) {
            Ok(n) => {
                self.asked = false;
                board.observe(Happened::Answered { n });
                Ok(())
            }
            Err(Error::Buffer(BufferError::TxFull) | Error::Misuse(ApiMisuse::NotConnected)) => Ok(()),
            Err(error) => {
                self.asked = false;
                Err(error)
            }
        }
    }

    /// Seals one reading of 12 bytes, such as `21.50C led=1`.
    fn report<B: Board>(&mut self, board: &mut B) -> Result<(), Error> {
        let text = reading(board.temperature(), board.led());
        let begun = board.instructions();
        match self.client.send(OWNER, Rungs::NONE, false, TEXT, &text) {
            Ok(n) => {
                let instructions = board.instructions() - begun;
                board.observe(Happened::Reported { n, instructions });
                Ok(())
            }
            // A reading that finds no room is not worth waiting for: the next one is newer.
            Err(Error::Buffer(BufferError::TxFull) | Error::Misuse(ApiMisuse::NotConnected)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// In a frame of its own, like [`Sensor::sign`].
#[inline(never)]
fn verify(key: PublicKey<'_>, statement: &Statement, signature: &[u8]) -> bool {
    verify_rsa(key, statement, signature).is_ok()
}

fn seed<B: Board>(board: &mut B) -> [u8; 64] {
    let mut seed = [0; 64];
    board.entropy(&mut seed);
    seed
}

/// What a command says of the LED, if it is one.
fn command(body: &[u8]) -> Option<bool> {
    match body {
        b"led on" => Some(true),
        b"led off" => Some(false),
        _ => None,
    }
}

/// `21.50C led=1`: five digits with their point, the unit, the LED. Temperatures below zero or above 99.99 are clamped.
fn reading(hundredths: i32, led: bool) -> [u8; 12] {
    let value = u32::try_from(hundredths).unwrap_or(0).min(9_999);
    let digit = |unit: u32| b'0' + u8::try_from(value / unit % 10).unwrap_or(0);
    let led = if led { b'1' } else { b'0' };
    [digit(1_000), digit(100), b'.', digit(10), digit(1), b'C', b' ', b'l', b'e', b'd', b'=', led]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_have_twelve_bytes() {
        assert_eq!(&reading(2_150, true), b"21.50C led=1");
        assert_eq!(&reading(-5, false), b"00.00C led=0");
        assert_eq!(&reading(123_456, false), b"99.99C led=0");
    }

    #[test]
    fn only_two_commands_exist() {
        assert_eq!(command(b"led on"), Some(true));
        assert_eq!(command(b"led off"), Some(false));
        for other in [&b"led on "[..], b"LED ON", b"", b"led"] {
            assert_eq!(command(other), None);
        }
    }
}
