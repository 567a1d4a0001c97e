//! A simulated device: the firmware's own application in a thread, over TCP instead of a board's Ethernet.
//!
//! `ossicle demo` and the tests run it; what it does is what the image does, down to the size of its buffers. It is the
//! only room that knows the firmware.

use core::net::SocketAddrV4;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use firmware_example::{Board, Buffers, Sensor, Transport, public_key};
pub use firmware_example::{Ending, Happened};
use ossicle_core::{IdentityPage, MAX_RSA_LEN, PageError};

/// A device that runs until it is stopped or dropped.
pub struct Device {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    /// Starts the device of this identity page; `observe` is told of all that happens to it.
    ///
    /// # Errors
    /// [`PageError`] if the page is none, or holds no key.
    pub fn start(page: Vec<u8>, observe: impl FnMut(Happened) + Send + 'static) -> Result<Self, PageError> {
        IdentityPage::decode(&page)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut board = Simulated { led: false, samples: 0, stop: stopped, observe };
            let (mut buffers, mut modulus) = (Buffers::new(), [0; MAX_RSA_LEN]);
            let Ok(page) = IdentityPage::decode(&page) else { return };
            let Ok(key) = public_key(&page, &mut modulus) else { return };
            let Ok(mut sensor) = Sensor::new(page, key, &mut buffers, &mut board) else { return };
            sensor.run(&mut Loopback { started: Instant::now(), deadline: None, stream: None }, &mut board);
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Stops it; returns when its connection is closed.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
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

/// What stands in for a board.
struct Simulated<F> {
    led: bool,
    samples: i32,
    stop: Arc<AtomicBool>,
    observe: F,
}

impl<F: FnMut(Happened)> Board for Simulated<F> {
    fn entropy(&mut self, bytes: &mut [u8]) {
        // Without entropy there is no device: nothing weaker takes its place.
        assert!(getrandom::fill(bytes).is_ok(), "the system has no entropy");
    }

    fn set_led(&mut self, on: bool) {
        self.led = on;
    }

    fn led(&self) -> bool {
        self.led
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

/// TCP on this machine, as the application knows a transport.
struct Loopback {
    started: Instant,
    deadline: Option<u64>,
    stream: Option<TcpStream>,
}

impl Loopback {
    fn stream(&mut self) -> io::Result<&mut TcpStream> {
        let now = self.now();
        let patience = self.deadline.map(|deadline| Duration::from_millis(deadline.saturating_sub(now).max(1)));
        let stream = self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        stream.set_read_timeout(patience)?;
        Ok(stream)
    }
}

impl embedded_io::ErrorType for Loopback {
    type Error = io::Error;
}

impl embedded_io::Read for Loopback {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Read::read(self.stream()?, bytes)
    }
}

impl embedded_io::Write for Loopback {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(self.stream()?, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Loopback {
    fn connect(&mut self, peer: SocketAddrV4) -> io::Result<()> {
        let stream = TcpStream::connect(peer)?;
        stream.set_nodelay(true)?;
        self.stream = Some(stream);
        Ok(())
    }

    fn abort(&mut self) {
        if let Some(stream) = self.stream.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn set_deadline(&mut self, deadline: Option<u64>) {
        self.deadline = deadline;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&mut self, until: u64) {
        // In short rests, so that a stop is heard.
        while self.now() < until {
            std::thread::sleep(Duration::from_millis((until - self.now()).min(50)));
        }
    }

    fn is_timeout(error: &io::Error) -> bool {
        matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
    }
}
