//! `Net` on a host, against a peer on the other end of an Ethernet cable that exists only in memory.
//!
//! The clock is the peer's motor: whenever `Net` rests, a millisecond passes, and the peer takes its turn.
//! Nothing sleeps, so a minute of silence is over at once.

extern crate std;

use core::cell::{Cell, RefCell};
use std::boxed::Box;
use std::collections::VecDeque;
use std::rc::Rc;
use std::vec::Vec;
use std::{format, vec};

use smoltcp::phy::{DeviceCapabilities, Medium, RxToken, TxToken};

use super::*;

const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEERS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const PORT: u16 = 5150;

type Queue = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of the cable.
struct Plug {
    incoming: Queue,
    outgoing: Queue,
}

struct Arrived(Vec<u8>);
struct Leaving(Queue);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Leaving {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.borrow_mut().push_back(frame);
        result
    }
}

impl Device for Plug {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Leaving)> {
        let frame = self.incoming.borrow_mut().pop_front()?;
        Some((Arrived(frame), Leaving(self.outgoing.clone())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving> {
        Some(Leaving(self.outgoing.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// What the peer does with a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    /// Sends back what it gets, and closes when its peer has.
    Echo,
    /// Reads nothing and says nothing.
    Deaf,
    /// Says hello and closes.
    Greet,
    /// Breaks off when something comes.
    Reset,
}

struct Peer {
    plug: Plug,
    interface: Interface,
    sockets: SocketSet<'static>,
    tcp: SocketHandle,
    manner: Manner,
    listening: bool,
    cable_cut: bool,
}

impl Peer {
    fn turn(&mut self, now: u64) {
        if self.cable_cut {
            self.plug.incoming.borrow_mut().clear();
            return;
        }
        self.interface.poll(instant(now), &mut self.plug, &mut self.sockets);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.tcp);
        if !socket.is_open() && self.listening {
            socket.listen(PORT).unwrap();
        }
        let state = socket.state();
        match self.manner {
            Manner::Echo => {
                while socket.can_send() && socket.can_recv() {
                    let mut byte = [0];
                    socket.recv_slice(&mut byte).unwrap();
                    socket.send_slice(&byte).unwrap();
                }
                if state == tcp::State::CloseWait && !socket.can_recv() {
                    socket.close();
                }
            }
            Manner::Deaf => {}
            Manner::Greet => {
                if state == tcp::State::Established {
                    socket.send_slice(b"hello").unwrap();
                    socket.close();
                }
            }
            Manner::Reset => {
                if socket.can_recv() {
                    socket.abort();
                }
            }
        }
        if state == tcp::State::TimeWait {
            socket.abort();
        }
        self.interface.poll(instant(now), &mut self.plug, &mut self.sockets);
    }
}

/// A clock that only goes while somebody rests.
struct Motor {
    now: Cell<u64>,
    peer: Rc<RefCell<Peer>>,
}

impl Clock for Motor {
    fn now(&self) -> u64 {
        self.now.get()
    }

    fn rest(&self, until: u64) {
        assert!(until > self.now.get(), "a rest that is none");
        self.now.set(self.now.get() + 1);
        self.peer.borrow_mut().turn(self.now.get());
    }
}

fn buffer(len: usize) -> &'static mut [u8] {
    Box::leak(vec![0; len].into_boxed_slice())
}

fn pair(manner: Manner) -> (Net<'static, Plug, Motor>, Rc<RefCell<Peer>>) {
    let (there, back) = (Queue::default(), Queue::default());
    let ours = Plug { incoming: back.clone(), outgoing: there.clone() };
    let mut plug = Plug { incoming: there, outgoing: back };
    let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 2]).into());
    let mut interface = Interface::new(config, &mut plug, instant(0));
    assign(&mut interface, Some((Ipv4Cidr::new(PEERS, 24), None)));
    let mut sockets = SocketSet::new(vec![]);
    let socket = tcp::Socket::new(tcp::SocketBuffer::new(buffer(700)), tcp::SocketBuffer::new(buffer(700)));
    let tcp = sockets.add(socket);
    let peer = Rc::new(RefCell::new(Peer { plug, interface, sockets, tcp, manner, listening: true, cable_cut: false }));
    peer.borrow_mut().turn(0);
    let clock = Motor { now: Cell::new(0), peer: peer.clone() };
    let sockets = Box::leak(Box::new(Sockets::new()));
    let mac = [2, 0, 0, 0, 0, 1];
    let mut net = Net::new(ours, clock, mac, 7, buffer(1024), buffer(1024), sockets);
    net.set_address(OURS, 24, None);
    (net, peer)
}

fn connected(manner: Manner) -> (Net<'static, Plug, Motor>, Rc<RefCell<Peer>>) {
    let (mut net, peer) = pair(manner);
    net.set_deadline(Some(5_000));
    net.connect(SocketAddrV4::new(PEERS, PORT)).unwrap();
    net.set_deadline(None);
    (net, peer)
}

#[test]
fn bytes_come_back_over_many_connections() {
    let (mut net, _peer) = connected(Manner::Echo);
    for round in 0..20u8 {
        let sent: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8 ^ round).collect();
        let mut back = vec![];
        for piece in sent.chunks(333) {
            net.write_all(piece).unwrap();
            let mut echoed = [0; 333];
            net.read_exact(&mut echoed[..piece.len()]).unwrap();
            back.extend_from_slice(&echoed[..piece.len()]);
        }
        assert_eq!(sent, back);
        net.close().unwrap();
        assert_eq!(net.write(b"x"), Err(Error::NotConnected));
        assert_eq!(net.read(&mut [0]), Err(Error::NotConnected));
        // The peer has one socket, and listens again at its next turn.
        net.sleep(net.now() + 5);
        net.connect(SocketAddrV4::new(PEERS, PORT)).unwrap();
    }
}

#[test]
fn end_of_stream_comes_after_the_last_byte_and_stays() {
    let (mut net, _peer) = connected(Manner::Greet);
    let mut byte = [0];
    for expected in b"hello" {
        assert_eq!(net.read(&mut byte), Ok(1));
        assert_eq!(byte[0], *expected);
    }
    assert_eq!(net.read(&mut byte), Ok(0));
    assert_eq!(net.read(&mut byte), Ok(0));
    assert_eq!(net.read_ready(), Ok(true));
    net.close().unwrap();
}

#[test]
fn a_timeout_ends_one_wait_and_nothing_else() {
    let (mut net, _peer) = connected(Manner::Echo);
    net.set_deadline(Some(net.now() + 60_000));
    let start = net.now();
    assert_eq!(net.read(&mut [0]), Err(Error::TimedOut));
    assert!(net.now() >= start + 60_000);
    assert_eq!(net.read(&mut [0]), Err(Error::TimedOut));
    assert_eq!(net.read_ready(), Ok(false));

    // What needs no waiting is done with a deadline in the past, too.
    assert_eq!(net.write(b"ping"), Ok(4));
    net.sleep(net.now() + 10);
    assert_eq!(net.read_ready(), Ok(true));
    let mut back = [0; 8];
    assert_eq!(net.read(&mut back), Ok(4));
    assert_eq!(&back[..4], b"ping");
}

#[test]
fn a_peer_that_does_not_read_holds_writes_up_until_the_deadline() {
    let (mut net, peer) = connected(Manner::Deaf);
    net.set_deadline(Some(net.now() + 1_000));
    let mut written = 0;
    let error = loop {
        match net.write(&[7; 100]) {
            Ok(n) => written += n,
            Err(error) => break error,
        }
    };
    assert_eq!(error, Error::TimedOut);
    // Both buffers are full, and no byte more was taken.
    assert_eq!(written, 1024 + 700);

    peer.borrow_mut().manner = Manner::Echo;
    net.set_deadline(None);
    let mut back = vec![0; written];
    net.read_exact(&mut back).unwrap();
    assert_eq!(back, vec![7; written]);
}

#[test]
fn refused_reset_and_unreachable_have_their_names() {
    let (mut net, peer) = connected(Manner::Reset);
    net.write_all(b"x").unwrap();
    assert_eq!(net.read(&mut [0]), Err(Error::Reset));
    assert_eq!(net.write(b"x"), Err(Error::Reset));
    assert_eq!(net.close(), Err(Error::Reset));
    assert_eq!(net.close(), Ok(()));

    peer.borrow_mut().listening = false;
    net.sleep(net.now() + 10);
    let to = SocketAddrV4::new(PEERS, PORT + 1);
    assert_eq!(net.connect(to), Err(Error::Refused));
    assert_eq!(net.read(&mut [0]), Err(Error::NotConnected));

    peer.borrow_mut().cable_cut = true;
    net.set_deadline(Some(net.now() + 5_000));
    assert_eq!(net.connect(to), Err(Error::TimedOut));
    let nowhere = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
    net.set_deadline(None);
    assert_eq!(net.connect(nowhere), Err(Error::Unaddressable));
    let closed = SocketAddrV4::new(PEERS, 0);
    assert_eq!(net.connect(closed), Err(Error::Unaddressable));
}

#[test]
fn what_a_cut_cable_lost_arrives_once_it_is_mended() {
    let (mut net, peer) = connected(Manner::Echo);
    peer.borrow_mut().cable_cut = true;
    net.write_all(b"patience").unwrap();
    net.set_deadline(Some(net.now() + 20_000));
    assert_eq!(net.read(&mut [0]), Err(Error::TimedOut));
    assert_eq!(net.close(), Err(Error::TimedOut));

    peer.borrow_mut().cable_cut = false;
    net.set_deadline(Some(net.now() + 20_000));
    // The peer still believes in the old connection, until ours says that there is none.
    while net.connect(SocketAddrV4::new(PEERS, PORT)).is_err() {}
    net.write_all(b"patience").unwrap();
    let mut back = [0; 8];
    net.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"patience");
}

#[test]
fn without_a_server_there_is_no_address_but_the_deadline_holds() {
    let (mut net, _peer) = pair(Manner::Echo);
    net.set_deadline(Some(2_000));
    assert_eq!(net.configure(), Err(Error::TimedOut));
    assert_eq!(net.address(), None);
    let to = SocketAddrV4::new(PEERS, PORT);
    assert_eq!(net.connect(to), Err(Error::TimedOut));

    net.set_address(OURS, 24, None);
    assert_eq!(net.address(), Some(OURS));
}

#[test]
fn errors_tell_embedded_io_what_they_are() {
    for (error, kind) in [
        (Error::NotConnected, ErrorKind::NotConnected),
        (Error::Refused, ErrorKind::ConnectionRefused),
        (Error::Reset, ErrorKind::ConnectionReset),
        (Error::TimedOut, ErrorKind::TimedOut),
        (Error::Unaddressable, ErrorKind::AddrNotAvailable),
    ] {
        assert_eq!(embedded_io::Error::kind(&error), kind);
        assert!(!format!("{error}").is_empty());
    }
}
