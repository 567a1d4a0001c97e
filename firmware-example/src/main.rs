//! The board brought up, and the application run.
//!
//! For now the application is an echo: it takes an address, connects to the port that the first two bytes
//! of the identity page name (little endian) on the host, sends back whatever comes, and connects again
//! when the peer has closed.

#![no_std]
#![no_main]

#[allow(unsafe_code, reason = "registers, the heap and the linker's symbols are met here, and nowhere else")]
mod board;

use core::net::{Ipv4Addr, SocketAddrV4};

use board::{Board, Clock, Ethernet};
use embedded_io::{Read, Write};
use firmware_example::net::{Error, Net, Sockets};
use static_cell::{ConstStaticCell, StaticCell};

/// The host, as QEMU's user networking shows it to its guest.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

static TCP_RX: ConstStaticCell<[u8; 1024]> = ConstStaticCell::new([0; 1024]);
static TCP_TX: ConstStaticCell<[u8; 1024]> = ConstStaticCell::new([0; 1024]);
static SOCKETS: StaticCell<Sockets<'static>> = StaticCell::new();

#[cortex_m_rt::entry]
fn main() -> ! {
    let Some(Board { clock, ethernet, mut led }) = Board::take() else {
        defmt::panic!("the board was taken twice");
    };
    let &[low, high, ..] = board::identity_page() else {
        defmt::panic!("the identity page is too short");
    };
    let port = u16::from_le_bytes([low, high]);
    if port == 0 {
        defmt::error!("no identity page: load one with -device loader");
        board::exit(1);
    }

    let seed = u64::from_le_bytes(board::simulation_only_entropy());
    let mac = ethernet.mac();
    let mut net = Net::new(ethernet, clock, mac, seed, TCP_RX.take(), TCP_TX.take(), SOCKETS.init_with(Sockets::new));
    let address = loop {
        match net.configure() {
            Ok(address) => break address,
            Err(error) => defmt::warn!("no address: {}", error),
        }
    };
    defmt::info!("address {=[u8; 4]}", address.octets());

    loop {
        let start = board::instructions();
        net.set_deadline(Some(net.now() + 5_000));
        match net.connect(SocketAddrV4::new(HOST, port)) {
            Ok(()) => {
                led.set(true);
                defmt::info!("connected, led {=bool}", led.is_on());
                let echoed = echo(&mut net);
                led.set(false);
                defmt::info!(
                    "echo {}, instructions {=u64}, stack {=usize}, heap {}, led {=bool}",
                    echoed,
                    board::instructions() - start,
                    board::stack_high_water(),
                    board::heap_high_water(),
                    led.is_on(),
                );
            }
            Err(error) => {
                defmt::warn!("connect: {}", error);
                net.sleep(net.now() + 500);
            }
        }
    }
}

/// Sends back what comes until the peer closes; returns how much came.
fn echo(net: &mut Net<'_, Ethernet, Clock>) -> Result<usize, Error> {
    let mut buffer = [0; 256];
    let mut total = 0;
    loop {
        net.set_deadline(Some(net.now() + 1_000));
        match net.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                total += n;
                net.set_deadline(None);
                net.write_all(buffer.get(..n).unwrap_or_default())?;
            }
            Err(Error::TimedOut) => defmt::info!("nothing came for a second"),
            Err(error) => return Err(error),
        }
    }
    net.set_deadline(Some(net.now() + 5_000));
    net.close()?;
    Ok(total)
}
