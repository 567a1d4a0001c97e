//! A simulated device: the firmware's own application and network stack in a thread, plugged into an Ethernet that exists
//! only in this process instead of a board's.
//!
//! `ossicle demo` and the tests run it; what it does is what the image does, down to the size of its buffers and the
//! address that it asks the network for. It is the only room that knows the firmware.

use core::fmt;
use core::net::SocketAddrV4;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Waker};
use core::time::Duration;
use std::sync::Arc;
use std::task::Wake;
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

use embedded_io::Write as _;
use firmware_example::net::{Clock, Error, Net, Sockets};
use firmware_example::{Board, Buffers, Sensor, Transport, public_key};
pub use firmware_example::{Ending, Happened};
use ossicle_core::{IdentityPage, MAX_RSA_LEN, PageError};

use crate::ethernet::{Network, Plug};

/// How often a device that waits looks whether it should end, in milliseconds.
const STOP_HEARD_WITHIN: u64 = 50;
/// How long [`say_in_clear`] waits for each step.
const PATIENCE: u64 = 30_000;

/// A device that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Device {
    led: Led,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The LED of a simulated board: what its application switches, and what anybody sees. Clones are the same LED.
#[derive(Clone, Debug, Default)]
pub struct Led(Arc<AtomicBool>);

impl Led {
    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Switches it, as the application does.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

impl Device {
    /// Starts the device of this identity page on `network`; `observe` is told of all that happens to it.
    ///
    /// # Errors
    /// [`PageError`] if the page is none, or holds no key.
    pub fn start(
        network: &Network,
        page: Vec<u8>,
        observe: impl FnMut(Happened) + Send + 'static,
    ) -> Result<Self, PageError> {
        IdentityPage::decode(&page)?;
        let (led, stop) = (Led::default(), Arc::new(AtomicBool::new(false)));
        let mut board = Simulated { led: led.clone(), samples: 0, stop: Arc::clone(&stop), observe };
        let plug = network.plug();
        let thread = std::thread::spawn(move || {
            let (mut buffers, mut modulus) = (Buffers::new(), [0; MAX_RSA_LEN]);
            let Ok(page) = IdentityPage::decode(&page) else { return };
            let Ok(key) = public_key(&page, &mut modulus) else { return };
            let Ok(mut sensor) = Sensor::new(page, key, &mut buffers, &mut board) else { return };
            let stop = Arc::clone(&board.stop);
            let mut memory = Memory::default();
            sensor.run(&mut Wired { net: memory.net(plug), stop }, &mut board);
        });
        Ok(Self { led, stop, thread: Some(thread) })
    }

    /// Its LED, as anybody sees it who stands beside it.
    pub fn led(&self) -> &Led {
        &self.led
    }

    /// Stops it; returns when its connection is closed.
    pub fn stop(mut self) {
        self.end();
    }

    /// Has it stop, and does not wait for that.
    pub fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    fn end(&mut self) {
        self.tell_to_stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends `text` from the Ethernet of simulated devices to `peer`, sealed by nobody, for a search to find.
///
/// # Errors
/// There was no address or no connection in time.
pub fn say_in_clear(network: &Network, peer: SocketAddrV4, text: &str) -> Result<(), impl fmt::Display + use<>> {
    let mut memory = Memory::default();
    let mut net = memory.net(network.plug());
    net.set_deadline(Some(net.now() + PATIENCE));
    let said = net.configure().and_then(|_| net.connect(peer)).and_then(|()| net.write_all(text.as_bytes()));
    // However the peer ends it, it has the text or has refused it.
    let _ = net.close();
    said
}

/// The memory of a network stack, of the sizes that it has on the board.
struct Memory<'m> {
    rx: [u8; 1024],
    tx: [u8; 1024],
    sockets: Sockets<'m>,
}

impl Default for Memory<'_> {
    fn default() -> Self {
        Self { rx: [0; 1024], tx: [0; 1024], sockets: Sockets::new() }
    }
}

impl<'m> Memory<'m> {
    fn net(&'m mut self, plug: Plug) -> Net<'m, Plug, Wall> {
        let [mut seed, mut mac] = [[0; 8]; 2];
        entropy(&mut seed);
        entropy(&mut mac);
        // Of an address that nobody has assigned: local, and of one device.
        let [first, rest @ ..] = mac;
        let mac = core::array::from_fn(|at| if at == 0 { first & 0xfc | 2 } else { rest[at] });
        let clock = Wall { started: Instant::now(), plug: plug.clone() };
        Net::new(plug, clock, mac, u64::from_le_bytes(seed), &mut self.rx, &mut self.tx, &mut self.sockets)
    }
}

/// Without entropy there is no device: nothing weaker takes its place.
fn entropy(bytes: &mut [u8]) {
    assert!(getrandom::fill(bytes).is_ok(), "the system has no entropy");
}

/// What stands in for a board.
struct Simulated<F> {
    led: Led,
    samples: i32,
    stop: Arc<AtomicBool>,
    observe: F,
}

impl<F: FnMut(Happened)> Board for Simulated<F> {
    fn entropy(&mut self, bytes: &mut [u8]) {
        entropy(bytes);
    }

    fn set_led(&mut self, on: bool) {
        self.led.set(on);
    }

    fn led(&self) -> bool {
        self.led.is_on()
    }

    fn temperature(&mut self) -> i32 {
        self.samples += 1;
        2_100 + self.samples % 100
    }

    fn observe(&mut self, happened: Happened) {
        (self.observe)(happened);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The time of this machine, and rest until a frame comes.
struct Wall {
    started: Instant,
    plug: Plug,
}

impl Clock for Wall {
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn rest(&self, until: u64) {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        if self.plug.poll_arrived(&Context::from_waker(&waker)).is_pending() {
            std::thread::park_timeout(Duration::from_millis(until.saturating_sub(self.now())));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The firmware's transport, which here hears a stop while it waits to come back.
struct Wired<'m> {
    net: Net<'m, Plug, Wall>,
    stop: Arc<AtomicBool>,
}

impl embedded_io::ErrorType for Wired<'_> {
    type Error = Error;
}

impl embedded_io::Read for Wired<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Error> {
        self.net.read(bytes)
    }
}

impl embedded_io::Write for Wired<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        self.net.write(bytes)
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.net.flush()
    }
}

impl Transport for Wired<'_> {
    fn connect(&mut self, peer: SocketAddrV4) -> Result<(), Error> {
        Transport::connect(&mut self.net, peer)
    }

    fn abort(&mut self) {
        self.net.abort();
    }

    fn set_deadline(&mut self, deadline: Option<u64>) {
        self.net.set_deadline(deadline);
    }

    fn now(&self) -> u64 {
        self.net.now()
    }

    fn sleep(&mut self, until: u64) {
        while self.now() < until && !self.stop.load(Ordering::Relaxed) {
            self.net.sleep(until.min(self.now() + STOP_HEARD_WITHIN));
        }
    }

    fn is_timeout(error: &Error) -> bool {
        <Net<'_, Plug, Wall> as Transport>::is_timeout(error)
    }
}

#[cfg(test)]
mod tests {
    //! The firmware's network stack across the simulated Ethernet, to real sockets of this machine.

    use std::io::{self, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use embedded_io::Read as _;

    use super::*;
    use crate::ethernet::HOST;

    /// A connection of a device to `serve`, which has its other end.
    fn connected(serve: impl FnOnce(TcpStream) + Send + 'static, talk: impl FnOnce(&mut Net<'_, Plug, Wall>)) {
        let network = Network::start(None).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = SocketAddrV4::new(HOST, listener.local_addr().unwrap().port());
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let mut memory = Memory::default();
        let mut net = memory.net(network.plug());
        net.set_deadline(Some(net.now() + PATIENCE));
        Transport::connect(&mut net, peer).unwrap();
        talk(&mut net);
        server.join().unwrap();
    }

    #[test]
    fn everything_arrives_both_ways_and_the_end_behind_it() {
        let echo = |mut stream: TcpStream| {
            let mut reader = stream.try_clone().unwrap();
            io::copy(&mut reader, &mut stream).unwrap();
        };
        connected(echo, |net| {
            let sent: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
            let mut back = vec![0; sent.len()];
            for (piece, back) in sent.chunks(700).zip(back.chunks_mut(700)) {
                net.write_all(piece).unwrap();
                net.read_exact(back).unwrap();
            }
            assert!(sent == back);
            // Ends in order only if the other side sees our end, ends too, and we hear of it.
            net.close().unwrap();
        });
    }

    #[test]
    fn what_a_server_says_before_it_ends_is_heard() {
        let flood = |mut stream: TcpStream| stream.write_all(&[7; 300_000]).unwrap();
        connected(flood, |net| {
            let (mut heard, mut piece) = (0, [0; 999]);
            loop {
                match net.read(&mut piece).unwrap() {
                    0 => break,
                    n => heard += n,
                }
            }
            assert_eq!(heard, 300_000);
        });
    }

    #[test]
    fn a_server_that_breaks_off_is_heard_to() {
        // An unread byte makes the end a reset.
        let rude = |stream: TcpStream| assert_eq!(stream.peek(&mut [0]).unwrap(), 1);
        connected(rude, |net| {
            net.write_all(b"x").unwrap();
            assert_eq!(net.read(&mut [0]), Err(Error::Reset));
        });
    }

    #[test]
    fn a_device_that_breaks_off_takes_its_other_half_with_it() {
        let patient = |mut stream: TcpStream| {
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut all = Vec::new();
            // An end or a reset, as long as it is one.
            let ended = stream.read_to_end(&mut all);
            assert!(
                all == b"farewell"
                    && ended.map_or_else(|error| error.kind() == io::ErrorKind::ConnectionReset, |_| true)
            );
        };
        connected(patient, |net| {
            net.write_all(b"farewell").unwrap();
            // What was written is on its way; what comes behind it is the break.
            net.abort();
        });
    }
}
