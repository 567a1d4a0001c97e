//! The way from the simulated Ethernet to this machine, as a home router is one to the Internet.
//!
//! It hands out addresses (DHCP), and relays each connection that a device opens to [`HOST`] to the same port of the
//! loopback. A port where nobody listens refuses, so that a device sees a server that is down as it would elsewhere.

use core::future::poll_fn;
use core::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpCidr,
    IpEndpoint, IpProtocol, Ipv4Cidr, Ipv4Packet, TcpPacket,
};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use super::{Arrived, HOST, Leaving, Plug, capabilities, instant};
use crate::search::{Place, Search};

const ADDRESS: EthernetAddress = EthernetAddress([2, 0, 0, 0, 2, 2]);
const PREFIX_LEN: u8 = 24;
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The last byte of the first address that is handed out, and of the last.
const LEASES: core::ops::RangeInclusive<u8> = 15..=254;
const LEASE_SECONDS: u32 = 24 * 60 * 60;
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Connections at a time: more are refused.
const MAX_RELAYS: usize = 256;
/// What waits in each direction of each connection.
const WINDOW: usize = 8 * 1024;
/// The longest rest when the stack itself waits for nothing.
const LONGEST_REST: Duration = Duration::from_secs(1);
/// How long a device may be silent that has to acknowledge something.
const GIVE_UP: Duration = Duration::from_secs(60);
/// The loopback answers at once, unless the backlog of a listener is full.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

pub(super) struct Gateway {
    plug: Plug,
    started: Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    leases: BTreeMap<EthernetAddress, Ipv4Addr>,
    relays: Vec<Relay>,
    search: Option<Arc<Search>>,
}

/// A connection of a device, and its other half on loopback.
struct Relay {
    tcp: SocketHandle,
    /// Who opened it, and to which port.
    from: IpEndpoint,
    port: u16,
    stream: TcpStream,
    up: Way,
    down: Way,
}

/// One direction.
#[derive(Default)]
struct Way {
    place: Option<Place>,
    ended: bool,
}

impl Way {
    fn new(search: Option<&Arc<Search>>) -> Self {
        Self { place: search.map(|search| search.place(super::DEVICES)), ended: false }
    }

    fn pass(&mut self, bytes: &[u8]) {
        if let Some(place) = &mut self.place {
            place.pass(bytes);
        }
    }
}

impl Gateway {
    pub(super) fn new(plug: Plug, search: Option<Arc<Search>>) -> io::Result<Self> {
        let started = Instant::now();
        let mut config = Config::new(ADDRESS.into());
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        config.random_seed = u64::from_le_bytes(seed);
        let mut interface = Interface::new(config, &mut Single { frame: None, plug: &plug }, instant(started));
        interface.update_ip_addrs(|addresses| {
            // There is room for one, and none is there yet.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(HOST, PREFIX_LEN)));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut dhcp = udp::Socket::new(packets(), packets());
        dhcp.bind(DHCP_SERVER).map_err(|_| io::ErrorKind::AddrInUse)?;
        let dhcp = sockets.add(dhcp);
        Ok(Self { plug, started, interface, sockets, dhcp, leases: BTreeMap::new(), relays: Vec::new(), search })
    }

    /// Until the network ends.
    pub(super) async fn run(mut self) {
        loop {
            self.turn();
            let rest = self.interface.poll_delay(instant(self.started), &self.sockets);
            let rest = rest.map_or(LONGEST_REST, |rest| Duration::from(rest).min(LONGEST_REST));
            let something = poll_fn(|context| self.poll_something(context));
            let _ = tokio::time::timeout(rest, something).await;
        }
    }

    /// Ready when there is something to do that is not a matter of time.
    fn poll_something(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut ready = self.plug.poll_arrived(context).is_ready();
        for relay in &self.relays {
            let tcp = self.sockets.get::<tcp::Socket<'_>>(relay.tcp);
            ready |= !relay.down.ended && tcp.can_send() && relay.stream.poll_read_ready(context).is_ready();
            ready |= !relay.up.ended && tcp.can_recv() && relay.stream.poll_write_ready(context).is_ready();
        }
        if ready { Poll::Ready(()) } else { Poll::Pending }
    }

    /// All that can be done now. Bounded by the queue of the port and the windows of the connections.
    fn turn(&mut self) {
        let now = instant(self.started);
        self.interface.poll_maintenance(now);
        for _ in 0..super::QUEUE {
            let Some(frame) = self.plug.fetch() else { break };
            self.expect(&frame);
            let mut single = Single { frame: Some(frame), plug: &self.plug };
            while self.interface.poll_ingress_single(now, &mut single, &mut self.sockets)
                != PollIngressSingleResult::None
            {}
        }
        self.lease();
        for relay in &mut self.relays {
            relay.pump(self.sockets.get_mut(relay.tcp));
        }
        let mut single = Single { frame: None, plug: &self.plug };
        while self.interface.poll_egress(now, &mut single, &mut self.sockets) != PollResult::None {}
        let sockets = &mut self.sockets;
        self.relays.retain(|relay| {
            let tcp = sockets.get::<tcp::Socket<'_>>(relay.tcp);
            let over = match tcp.state() {
                tcp::State::Closed => !tcp.can_recv() || relay.up.ended,
                // What was no opening after all.
                tcp::State::Listen => true,
                tcp::State::TimeWait => relay.up.ended,
                _ => false,
            };
            if over {
                sockets.remove(relay.tcp);
            }
            !over
        });
    }

    /// If the frame opens a connection: opens its other half, and has somebody listen.
    ///
    /// Otherwise nobody listens, and the interface refuses by itself.
    fn expect(&mut self, frame: &[u8]) {
        let Some((from, port)) = opening(frame) else { return };
        // A repeated opening, or one that comes from a device that was reset.
        if self.relays.iter().any(|relay| relay.from == from && relay.port == port) || self.relays.len() >= MAX_RELAYS {
            return;
        }
        let address = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        let Ok(stream) = std::net::TcpStream::connect_timeout(&address, CONNECT_WITHIN) else { return };
        let _ = stream.set_nodelay(true);
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let Ok(stream) = TcpStream::from_std(stream) else { return };
        let mut tcp =
            tcp::Socket::new(tcp::SocketBuffer::new(vec![0; WINDOW]), tcp::SocketBuffer::new(vec![0; WINDOW]));
        tcp.set_nagle_enabled(false);
        tcp.set_ack_delay(None);
        tcp.set_timeout(Some(GIVE_UP.into()));
        if tcp.listen(port).is_err() {
            return;
        }
        let tcp = self.sockets.add(tcp);
        let (up, down) = (Way::new(self.search.as_ref()), Way::new(self.search.as_ref()));
        self.relays.push(Relay { tcp, from, port, stream, up, down });
    }

    /// Answers who asks for an address.
    fn lease(&mut self) {
        let dhcp = self.sockets.get_mut::<udp::Socket<'_>>(self.dhcp);
        while let Ok((asked, _)) = dhcp.recv() {
            let Ok(packet) = DhcpPacket::new_checked(asked) else { continue };
            let Ok(asked) = DhcpRepr::parse(&packet) else { continue };
            let who = asked.client_hardware_address;
            let next = u8::try_from(self.leases.len()).ok().and_then(|len| LEASES.start().checked_add(len));
            let Some(address) = self.leases.get(&who).copied().or_else(|| {
                let last = next.filter(|last| LEASES.contains(last))?;
                let [a, b, c, _] = HOST.octets();
                Some(Ipv4Addr::new(a, b, c, last))
            }) else {
                continue;
            };
            let message_type = match asked.message_type {
                DhcpMessageType::Discover => DhcpMessageType::Offer,
                DhcpMessageType::Request if asked.requested_ip.unwrap_or(asked.client_ip) == address => {
                    DhcpMessageType::Ack
                }
                DhcpMessageType::Request => DhcpMessageType::Nak,
                _ => continue,
            };
            self.leases.insert(who, address);
            let nak = message_type == DhcpMessageType::Nak;
            let answer = DhcpRepr {
                message_type,
                transaction_id: asked.transaction_id,
                secs: 0,
                client_hardware_address: who,
                client_ip: Ipv4Addr::UNSPECIFIED,
                your_ip: if nak { Ipv4Addr::UNSPECIFIED } else { address },
                server_ip: HOST,
                router: (!nak).then_some(HOST),
                subnet_mask: (!nak).then_some(NETMASK),
                relay_agent_ip: Ipv4Addr::UNSPECIFIED,
                broadcast: true,
                requested_ip: None,
                client_identifier: None,
                server_identifier: Some(HOST),
                parameter_request_list: None,
                dns_servers: None,
                max_size: None,
                lease_duration: (!nak).then_some(LEASE_SECONDS),
                renew_duration: None,
                rebind_duration: None,
                additional_options: &[],
            };
            let everybody = IpEndpoint::new(IpAddress::Ipv4(Ipv4Addr::BROADCAST), DHCP_CLIENT);
            // Whoever gets no answer asks again.
            if let Ok(room) = dhcp.send(answer.buffer_len(), everybody) {
                let _ = answer.emit(&mut DhcpPacket::new_unchecked(room));
            }
        }
    }
}

impl Relay {
    /// Passes on what has come, both ways, as far as there is room.
    fn pump(&mut self, tcp: &mut tcp::Socket<'_>) {
        while !self.up.ended && tcp.can_recv() {
            let (stream, up) = (&self.stream, &mut self.up);
            let passed = tcp.recv(|bytes| match stream.try_write(bytes) {
                Ok(n) => {
                    up.pass(bytes.get(..n).unwrap_or_default());
                    (n, Ok(()))
                }
                Err(error) => (0, Err(error)),
            });
            match passed {
                Ok(Ok(())) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => return self.break_off(tcp),
            }
        }
        while !self.down.ended && tcp.can_send() {
            let (stream, down) = (&self.stream, &mut self.down);
            let passed = tcp.send(|room| match stream.try_read(room) {
                Ok(n) => {
                    down.pass(room.get(..n).unwrap_or_default());
                    (n, Ok(n == 0))
                }
                Err(error) => (0, Err(error)),
            });
            match passed {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => {
                    self.down.ended = true;
                    tcp.close();
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => return self.break_off(tcp),
            }
        }
        // The device has said that it was all, and all of it is passed on.
        let said_all = matches!(tcp.state(), tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing);
        if !self.up.ended && !tcp.can_recv() && (said_all || tcp.state() == tcp::State::TimeWait) {
            self.up.ended = true;
            // Done at once: no byte waits in a stream of tokio.
            let _ = Pin::new(&mut self.stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// One half is broken: so is the other.
    fn break_off(&mut self, tcp: &mut tcp::Socket<'_>) {
        (self.up.ended, self.down.ended) = (true, true);
        tcp.abort();
    }
}

/// Who opens a connection to us with this frame, and to which port.
fn opening(frame: &[u8]) -> Option<(IpEndpoint, u16)> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 || frame.dst_addr() != ADDRESS {
        return None;
    }
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    if packet.next_header() != IpProtocol::Tcp || packet.dst_addr() != HOST || packet.frag_offset() != 0 {
        return None;
    }
    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
    // Rubbish opens nothing on this machine.
    if !packet.verify_checksum() || !segment.verify_checksum(&packet.src_addr().into(), &packet.dst_addr().into()) {
        return None;
    }
    let opens = segment.syn() && !segment.ack() && !segment.rst() && segment.dst_port() != 0;
    opens.then(|| (IpEndpoint::new(IpAddress::Ipv4(packet.src_addr()), segment.src_port()), segment.dst_port()))
}

/// Room for as many datagrams as one turn may bring, of the length that every host has to take.
fn packets() -> udp::PacketBuffer<'static> {
    udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; super::QUEUE], vec![0; super::QUEUE * 576])
}

/// The plug as the interface sees it, frame by frame.
struct Single<'p> {
    frame: Option<Vec<u8>>,
    plug: &'p Plug,
}

impl Device for Single<'_> {
    type RxToken<'a>
        = Arrived
    where
        Self: 'a;
    type TxToken<'a>
        = Leaving<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Arrived, Leaving<'_>)> {
        Some((Arrived(self.frame.take()?), Leaving(self.plug)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Leaving<'_>> {
        Some(Leaving(self.plug))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}
