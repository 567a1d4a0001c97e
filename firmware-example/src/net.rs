//! One TCP connection as a byte stream: smoltcp on one side, `embedded_io` on the other.
//!
//! An Ethernet device and a clock come in; [`Net`] asks the network for an address (DHCP) and is then a
//! blocking `Read` and `Write`, which keeps the interface going for as long as it waits. Deadlines are the
//! caller's: [`Net::set_deadline`] ends any wait with [`Error::TimedOut`], and the next call simply goes on.
//! IPv4 only. It refuses a heap, and it knows neither the chip nor what the bytes mean.

use core::net::{Ipv4Addr, SocketAddrV4};

use embedded_io::{ErrorKind, ErrorType, Read, ReadReady, Write};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::Device;
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

/// Where the ports begin that no service listens on (RFC 6335).
const FIRST_EPHEMERAL_PORT: u16 = 49_152;

/// The longest rest when the stack itself waits for nothing.
const LONGEST_REST_MS: u64 = 1_000;

/// Frames handled before the caller gets its turn.
const FRAMES_PER_POLL: usize = 8;

/// Time, as [`Net`] needs it.
pub trait Clock {
    /// Milliseconds since any fixed moment, never going back.
    fn now(&self) -> u64;

    /// Rests until a frame may have arrived or `now()` has reached `until`, whichever is first.
    ///
    /// May return early for no reason. The default does not rest at all.
    fn rest(&self, until: u64) {
        let _ = until;
    }
}

/// The memory of the sockets themselves, beside their buffers: one for TCP, one for DHCP.
#[derive(Debug)]
pub struct Sockets<'b>([SocketStorage<'b>; 2]);

impl Sockets<'_> {
    /// Room for both, and neither of them yet.
    pub const fn new() -> Self {
        Self([SocketStorage::EMPTY; 2])
    }
}

impl Default for Sockets<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// A network interface with one TCP connection, which can be opened again after it has ended.
pub struct Net<'b, D: Device, C: Clock> {
    device: D,
    clock: C,
    interface: Interface,
    sockets: SocketSet<'b>,
    dhcp: Option<SocketHandle>,
    tcp: SocketHandle,
    port: u16,
    opened: bool,
    deadline: Option<u64>,
}

impl<'b, D: Device, C: Clock> Net<'b, D, C> {
    /// Brings an interface up, without an address yet.
    ///
    /// `seed` is random: ports and sequence numbers that nobody can guess come from it. `rx` holds what has
    /// arrived and was not read yet, and its length is the window that the peer is shown; `tx` holds what
    /// was sent and not acknowledged yet.
    pub fn new(
        mut device: D,
        clock: C,
        mac: [u8; 6],
        seed: u64,
        rx: &'b mut [u8],
        tx: &'b mut [u8],
        sockets: &'b mut Sockets<'b>,
    ) -> Self {
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = seed;
        let interface = Interface::new(config, &mut device, instant(clock.now()));

        let mut sockets = SocketSet::new(&mut sockets.0[..]);
        let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(rx), tcp::SocketBuffer::new(tx));
        // A record is one write: waiting for more of it would only add a round trip.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let tcp = sockets.add(socket);

        let [low, high, ..] = seed.to_le_bytes();
        Self {
            device,
            clock,
            interface,
            sockets,
            dhcp: None,
            tcp,
            port: u16::from_le_bytes([low, high]),
            opened: false,
            deadline: None,
        }
    }

    /// Asks the network for an address and keeps it renewed; waits for the first one. A fixed address is
    /// given up for it.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when no server has answered by the deadline; asking goes on, so that a later
    /// call, or a connection, may succeed.
    pub fn configure(&mut self) -> Result<Ipv4Addr, Error> {
        if self.dhcp.is_none() {
            assign(&mut self.interface, None);
            self.dhcp = Some(self.sockets.add(dhcpv4::Socket::new()));
        }
        self.wait(|net| net.address().map(Ok))
    }

    /// Uses a fixed address instead of asking for one.
    pub fn set_address(&mut self, address: Ipv4Addr, prefix_len: u8, gateway: Option<Ipv4Addr>) {
        if let Some(dhcp) = self.dhcp.take() {
            self.sockets.remove(dhcp);
        }
        let cidr = Ipv4Cidr::new(address, prefix_len.min(32));
        assign(&mut self.interface, Some((cidr, gateway)));
    }

    /// The address in use, if there is one now.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.interface.ipv4_addr()
    }

    /// The clock's time, in milliseconds.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Ends every wait from now on with [`Error::TimedOut`] once the clock has reached `deadline`.
    ///
    /// What is possible without waiting is still done, deadline or not. `None` waits for ever.
    pub fn set_deadline(&mut self, deadline: Option<u64>) {
        self.deadline = deadline;
    }

    /// Opens a connection; one that is still open is aborted.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] when the peer does not want it, [`Error::TimedOut`] when nobody has answered, or
    /// no address was given to us, by the deadline.
    pub fn connect(&mut self, peer: SocketAddrV4) -> Result<(), Error> {
        self.abort();
        self.wait(|net| net.address().map(Ok))?;

        self.port = self.port.wrapping_add(1) | FIRST_EPHEMERAL_PORT;
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.tcp);
        socket.connect(self.interface.context(), peer, self.port).map_err(|_| Error::Unaddressable)?;

        let opened = self.wait(|net| match net.socket().state() {
            tcp::State::SynSent | tcp::State::SynReceived => None,
            tcp::State::Closed => Some(Err(Error::Refused)),
            _ => Some(Ok(())),
        });
        match opened {
            Ok(()) => self.opened = true,
            Err(_) => self.abort(),
        }
        opened
    }

    /// Ends the connection in order: sends what is queued, says that it was all, and waits until the peer
    /// has said the same. What the peer still sends is thrown away.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when the peer has not agreed by the deadline, [`Error::Reset`] when it broke
    /// off. The connection is over in any case.
    pub fn close(&mut self) -> Result<(), Error> {
        if !self.opened {
            return Ok(());
        }
        let peer_ended_first = self.socket().state() == tcp::State::CloseWait;
        self.socket().close();
        let closed = self.wait(|net| {
            let socket = net.socket();
            let mut scrap = [0; 64];
            while matches!(socket.recv_slice(&mut scrap), Ok(1..)) {}
            match socket.state() {
                tcp::State::TimeWait => Some(Ok(())),
                tcp::State::Closed if peer_ended_first => Some(Ok(())),
                tcp::State::Closed => Some(Err(Error::Reset)),
                _ => None,
            }
        });
        self.abort();
        closed
    }

    /// Ends the connection at once; a peer that has not closed too sees a reset.
    pub fn abort(&mut self) {
        self.opened = false;
        let socket = self.socket();
        if socket.is_open() {
            socket.abort();
            self.poll();
        }
    }

    /// Handles what has arrived and sends what is due, without waiting.
    ///
    /// The work is bounded: who floods the wire cannot keep the caller from its deadlines.
    pub fn poll(&mut self) {
        let Self { interface, device, sockets, .. } = self;
        let now = instant(self.clock.now());
        interface.poll_maintenance(now);
        for _ in 0..FRAMES_PER_POLL {
            if interface.poll_ingress_single(now, device, sockets) == PollIngressSingleResult::None {
                break;
            }
        }
        while interface.poll_egress(now, device, sockets) != PollResult::None {}

        let Some(dhcp) = self.dhcp else { return };
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll() {
            Some(dhcpv4::Event::Configured(lease)) => {
                assign(&mut self.interface, Some((lease.address, lease.router)));
            }
            Some(dhcpv4::Event::Deconfigured) => assign(&mut self.interface, None),
            None => {}
        }
    }

    /// Lets time pass until the clock has reached `until`, while the interface goes on answering.
    pub fn sleep(&mut self, until: u64) {
        let deadline = self.deadline.replace(until);
        while self.rest().is_ok() {
            self.poll();
        }
        self.deadline = deadline;
    }

    /// Polls until `done` has an answer or the deadline has passed.
    fn wait<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<Result<T, Error>>) -> Result<T, Error> {
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            self.rest()?;
        }
    }

    /// Rests until there may be something to do, but not beyond the deadline.
    fn rest(&mut self) -> Result<(), Error> {
        let now = self.clock.now();
        let deadline = self.deadline.unwrap_or(u64::MAX);
        if deadline <= now {
            return Err(Error::TimedOut);
        }
        let due = self
            .interface
            .poll_delay(instant(now), &self.sockets)
            .map_or(LONGEST_REST_MS, |delay| delay.total_millis().min(LONGEST_REST_MS));
        if due > 0 {
            self.clock.rest(deadline.min(now + due));
        }
        Ok(())
    }

    fn socket(&mut self) -> &mut tcp::Socket<'b> {
        self.sockets.get_mut(self.tcp)
    }

    /// Why nothing can be read or written any more.
    fn ended(&self) -> Error {
        if self.opened { Error::Reset } else { Error::NotConnected }
    }
}

impl<D: Device, C: Clock> ErrorType for Net<'_, D, C> {
    type Error = Error;
}

impl<D: Device, C: Clock> Read for Net<'_, D, C> {
    /// Waits for at least one byte; `Ok(0)` is the end of the stream.
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.wait(|net| match net.socket().recv_slice(buf) {
            Ok(0) => None,
            Ok(n) => Some(Ok(n)),
            Err(tcp::RecvError::Finished) if net.opened => Some(Ok(0)),
            Err(_) => Some(Err(net.ended())),
        })
    }
}

impl<D: Device, C: Clock> ReadReady for Net<'_, D, C> {
    /// Whether `read` would return at once, with bytes, the end of the stream or an error.
    fn read_ready(&mut self) -> Result<bool, Error> {
        self.poll();
        let socket = self.socket();
        Ok(socket.can_recv() || !socket.may_recv())
    }
}

impl<D: Device, C: Clock> Write for Net<'_, D, C> {
    /// Waits for room, and sends at once: nothing stays behind for a later `flush`.
    ///
    /// With [`Error::TimedOut`] nothing of `buf` was taken.
    fn write(&mut self, buf: &[u8]) -> Result<usize, Error> {
        if buf.is_empty() {
            return Ok(0);
        }
        let written = self.wait(|net| match net.socket().send_slice(buf) {
            Ok(0) => None,
            Ok(n) => Some(Ok(n)),
            Err(tcp::SendError::InvalidState) => Some(Err(net.ended())),
        })?;
        self.poll();
        Ok(written)
    }

    /// Hands everything to the network, as far as the peer's window allows, and does not wait for the
    /// peer to acknowledge it: an answer of the peer says more than that.
    fn flush(&mut self) -> Result<(), Error> {
        self.poll();
        Ok(())
    }
}

impl<D: Device, C: Clock> crate::Transport for Net<'_, D, C> {
    fn connect(&mut self, peer: SocketAddrV4) -> Result<(), Error> {
        if self.address().is_none() {
            self.configure()?;
        }
        Self::connect(self, peer)
    }

    fn abort(&mut self) {
        Self::abort(self);
    }

    fn set_deadline(&mut self, deadline: Option<u64>) {
        Self::set_deadline(self, deadline);
    }

    fn now(&self) -> u64 {
        Self::now(self)
    }

    fn sleep(&mut self, until: u64) {
        Self::sleep(self, until);
    }

    fn is_timeout(error: &Error) -> bool {
        *error == Error::TimedOut
    }
}

/// Why a connection did not open, or what ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(target_os = "none", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// There is no connection: none was opened, or it was closed here.
    NotConnected,
    /// The peer refused to open a connection.
    Refused,
    /// The peer broke the connection off.
    Reset,
    /// The deadline has passed. The connection is as it was; the next call goes on.
    TimedOut,
    /// No connection can lead to that address or port.
    Unaddressable,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NotConnected => "not connected",
            Self::Refused => "connection refused by the peer",
            Self::Reset => "connection reset by the peer",
            Self::TimedOut => "timed out",
            Self::Unaddressable => "not an address to connect to",
        })
    }
}

impl core::error::Error for Error {}

impl embedded_io::Error for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotConnected => ErrorKind::NotConnected,
            Self::Refused => ErrorKind::ConnectionRefused,
            Self::Reset => ErrorKind::ConnectionReset,
            Self::TimedOut => ErrorKind::TimedOut,
            Self::Unaddressable => ErrorKind::AddrNotAvailable,
        }
    }
}

/// Gives the interface an address and the way to everywhere else, or takes both away.
fn assign(interface: &mut Interface, lease: Option<(Ipv4Cidr, Option<Ipv4Addr>)>) {
    let address = lease.map(|(cidr, _)| IpCidr::Ipv4(cidr));
    interface.update_ip_addrs(|addresses| {
        addresses.clear();
        addresses.extend(address);
    });
    let routes = interface.routes_mut();
    routes.remove_default_ipv4_route();
    if let Some(gateway) = lease.and_then(|(_, gateway)| gateway) {
        // The table holds one route and was emptied just now.
        let _ = routes.add_default_ipv4_route(gateway);
    }
}

fn instant(ms: u64) -> Instant {
    Instant::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test may stop at what it did not expect")]
mod tests;
