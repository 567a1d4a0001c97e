//! The Ethernet, with devices that speak TCP through it to real sockets.

use core::net::SocketAddrV4;
use core::time::Duration;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::device::say_in_clear;
use crate::search::Finding;

const TEXT: &str = "whoever listens on the wire can read this";

/// A server that sends back what it gets until its peer has said all.
fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        }
    });
    port
}

fn places(search: &Search) -> Vec<String> {
    let mut places: Vec<_> = search.found().into_iter().map(|found| found.place).collect();
    places.sort();
    places
}

#[test]
fn many_devices_get_addresses_and_reach_the_loopback_at_the_gateway() {
    let search = Search::new(&[TEXT]).unwrap();
    let network = Network::start(Some(Arc::clone(&search))).unwrap();
    let port = echo();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                say_in_clear(&network, SocketAddrV4::new(HOST, port), TEXT).map_err(|e| e.to_string()).unwrap()
            });
        }
    });
    assert_eq!(places(&search), ["a device's connection", "a frame of the Ethernet"]);
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let network = Network::start(None).unwrap();
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let refused = say_in_clear(&network, SocketAddrV4::new(HOST, closed), TEXT).map_err(|error| error.to_string());
    assert_eq!(refused, Err("connection refused by the peer".to_owned()));
}

#[test]
fn a_tap_passes_everything_on_and_finds_what_is_in_it() {
    let search = Search::new(&[TEXT]).unwrap();
    let network = Network::start(Some(Arc::clone(&search))).unwrap();
    let mut tap = network.tap(SocketAddr::from((Ipv4Addr::LOCALHOST, echo())), "the people's connections").unwrap();
    let say = |address: SocketAddr| {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(TEXT.as_bytes())?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut back = String::new();
        stream.read_to_string(&mut back)?;
        Ok::<_, io::Error>(back)
    };
    assert_eq!(say(tap.address).unwrap(), TEXT);
    assert_eq!(search.found(), [Finding { text: TEXT.into(), place: "the people's connections".into() }]);
    tap.shut();
    assert_eq!(say(tap.address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    tap.reopen(&network).unwrap();
    assert_eq!(say(tap.address).unwrap(), TEXT);
}

/// A frame as QEMU sends it.
fn framed(destination: HardwareAddress, source: HardwareAddress, len: usize) -> Vec<u8> {
    let frame = [&destination[..], &source, &vec![0x5a; len - ADDRESSES_LEN]].concat();
    [&u32::try_from(len).unwrap().to_be_bytes()[..], &frame].concat()
}

#[test]
fn an_uplink_is_a_port_until_it_makes_no_sense() {
    let network = Network::start(None).unwrap();
    let address = network.uplink().unwrap();
    let (mut left, mut right) = (TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap());
    right.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // Until the switch has learned who is where, everybody hears everything; there is no waiting for a port to be there.
    right.write_all(&framed([0xff; 6], [2; 6], 60)).unwrap();
    let mut first = [0; 64];
    left.read_exact(&mut first).unwrap();
    assert_eq!(first[4..16], [[0xff; 6], [2; 6]].concat());
    let sent = framed([2; 6], [4; 6], 1514);
    left.write_all(&sent).unwrap();
    let mut heard = vec![0; sent.len()];
    right.read_exact(&mut heard).unwrap();
    assert_eq!(heard, sent);
    for nonsense in [&[0xff; 4][..], &[0, 0, 5, 0xeb]] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(nonsense).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    }
    // Too short to have addresses: goes nowhere, harms nobody.
    left.write_all(&[0, 0, 0, 3, 1, 2, 3]).unwrap();
    left.write_all(&sent).unwrap();
    right.read_exact(&mut heard).unwrap();
    assert_eq!(heard, sent);
}

#[test]
fn frames_that_nobody_fetches_do_not_pile_up() {
    let network = Network::start(None).unwrap();
    let (loud, deaf) = (network.plug(), network.plug());
    for _ in 0..10 * QUEUE {
        loud.send(framed([0xff; 6], [2; 6], 60)[4..].to_vec());
    }
    assert_eq!(lock(&deaf.0.state).arrived.len(), QUEUE);
    drop(deaf);
    let _another = network.plug();
    assert_eq!(lock(&network.switch.ports).len(), 3, "the gateway's, the loud one's and the new one's");
}

#[test]
fn rubbish_on_the_wire_harms_nobody() {
    let network = Network::start(None).unwrap();
    let plug = network.plug();
    let mut rubbish = vec![0; 4096];
    for round in 0..2_000_usize {
        getrandom::fill(&mut rubbish).unwrap();
        let mut frame = rubbish[..round % 1_700].to_vec();
        // Often enough what looks like a beginning: to the gateway, IPv4, TCP or a question for an address.
        let gateway = [2, 0, 0, 0, 2, 2];
        let heads = [
            [&gateway[..], &[4; 6], &[8, 0], &[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6]].concat(),
            [&[0xff; 6][..], &[4; 6], &[8, 0], &[0x45, 0, 1, 0, 0, 0, 0, 0, 64, 17]].concat(),
            [&[0xff; 6][..], &[4; 6], &[8, 6]].concat(),
            Vec::new(),
        ];
        let head = &heads[round % heads.len()];
        let len = head.len().min(frame.len());
        frame[..len].copy_from_slice(&head[..len]);
        plug.send(frame);
        // All of it is read: what a full queue drops harms nobody anyway.
        let gateway = lock(&network.switch.ports)[0].upgrade().unwrap();
        while lock(&gateway.state).arrived.len() >= QUEUE / 2 {
            std::thread::yield_now();
        }
    }
    say_in_clear(&network, SocketAddrV4::new(HOST, echo()), TEXT).map_err(|error| error.to_string()).unwrap();
}
