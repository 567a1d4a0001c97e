//! The drivers over streams that do what streams do: hand over a byte at a time, give up waiting, end in the middle.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::future::Future;
use core::pin::pin;
use core::task::{Context, Poll, Waker};

use embedded_io::{ErrorKind, ErrorType, Read, Write};
use ossicle::crypto::{IdentityKey, verify};
use ossicle_core::{
    Ask, Buffers, ClientConfig, Connection, Credentials, Drive, DriverError, Endpoint, Error, Event, Message,
    PeerError, Received, ServerConfig, Step, asynch, blocking,
};
use ossicle_tests::{CLIENT_ID, SERVER_ID, keys, public, seed, settings};

/// What a stream may do to its user.
#[derive(Clone, Copy)]
struct Knobs {
    /// The most bytes that one call moves.
    chunk: usize,
    /// Every second call gives up waiting.
    times_out: bool,
    /// The stream ends after so many bytes from the server.
    ends_after: usize,
}

const HONEST: Knobs = Knobs { chunk: usize::MAX, times_out: false, ends_after: usize::MAX };

/// The server's end, answering by itself, behind a stream with knobs.
struct Stream {
    knobs: Knobs,
    calls: usize,
    server: Connection,
    server_key: IdentityKey,
    client_key: IdentityKey,
    up: Vec<u8>,
    down: Vec<u8>,
    given: usize,
}

impl Stream {
    fn new(knobs: Knobs) -> Self {
        let server_key = keys::server();
        let config =
            ServerConfig { id: SERVER_ID, fingerprint: public(&server_key).fingerprint(), record_limit: 16_408 };
        let server = Connection::server(config, &seed(9));
        Self {
            knobs,
            calls: 0,
            server,
            server_key,
            client_key: keys::alice(),
            up: Vec::new(),
            down: Vec::new(),
            given: 0,
        }
    }

    /// The server reads what is there, as far as it goes, and echoes each message.
    fn serve(&mut self) {
        let mut out = [0; 4096];
        loop {
            if let Some(Ask::Sign(statement)) = self.server.ask() {
                let signature = self.server_key.sign(&statement).unwrap();
                let len = self.server.sign_server(public(&self.server_key), &signature, &mut out).unwrap();
                self.down.extend_from_slice(&out[..len]);
            }
            let Received::Record { used, event } = self.server.receive(&mut self.up).unwrap() else { return };
            match event {
                Event::CheckClient(claim) => {
                    let statement = self.server.bind(&claim, &public(&self.client_key).fingerprint()).unwrap();
                    assert!(verify(self.client_key.modulus(), &statement, claim.signature()));
                    let len = self.server.accept(&settings(), &mut out).unwrap();
                    self.down.extend_from_slice(&out[..len]);
                }
                Event::Message(payload) => {
                    let message = Message::decode(payload).unwrap();
                    let len = self.server.send(&message, &mut out).unwrap();
                    self.down.extend_from_slice(&out[..len]);
                }
                Event::Closed(_) => {
                    let len = self.server.close(None, &mut out).unwrap();
                    self.down.extend_from_slice(&out[..len]);
                }
                _ => {}
            }
            self.up.drain(..used);
        }
    }

    fn give_up(&mut self) -> Result<(), ErrorKind> {
        self.calls += 1;
        if self.knobs.times_out && self.calls % 2 == 1 { Err(ErrorKind::TimedOut) } else { Ok(()) }
    }
}

impl ErrorType for Stream {
    type Error = ErrorKind;
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, ErrorKind> {
        assert!(!bytes.is_empty(), "a driver reads only where there is room");
        self.give_up()?;
        let left = self.knobs.ends_after.saturating_sub(self.given);
        let len = bytes.len().min(self.knobs.chunk).min(left).min(self.down.len());
        assert!(len > 0 || left == 0, "a driver reads only what is to come: it would wait for ever");
        bytes[..len].copy_from_slice(&self.down[..len]);
        self.down.drain(..len);
        self.given += len;
        Ok(len)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
        assert!(!bytes.is_empty(), "a driver writes only what is there");
        self.give_up()?;
        let len = bytes.len().min(self.knobs.chunk);
        self.up.extend_from_slice(&bytes[..len]);
        self.serve();
        Ok(len)
    }

    fn flush(&mut self) -> Result<(), ErrorKind> {
        Ok(())
    }
}

/// The same stream for the asynchronous driver: never ready at the first asking.
struct Lazy(Stream);

async fn not_at_once() {
    let mut asked = false;
    core::future::poll_fn(|_| if core::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }).await;
}

impl ErrorType for Lazy {
    type Error = ErrorKind;
}

impl embedded_io_async::Read for Lazy {
    async fn read(&mut self, bytes: &mut [u8]) -> Result<usize, ErrorKind> {
        not_at_once().await;
        self.0.read(bytes)
    }
}

impl embedded_io_async::Write for Lazy {
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
        not_at_once().await;
        self.0.write(bytes)
    }

    async fn flush(&mut self) -> Result<(), ErrorKind> {
        Ok(())
    }
}

fn endpoint<'b>(rx: &'b mut [u8], tx: &'b mut [u8]) -> Endpoint<'b> {
    let server = Some(public(&keys::server()).fingerprint());
    let config = ClientConfig { server, ask_for_key: false, record_limit: 0 };
    Endpoint::client(config, Buffers { rx, tx }, &seed(8)).unwrap()
}

/// Handshake, three messages there and back, close. `drive` moves bytes until there is something to poll for.
fn converse(
    endpoint: &mut Endpoint<'_>,
    mut drive: impl FnMut(&mut Endpoint<'_>) -> Result<(), DriverError<ErrorKind>>,
) -> Result<u16, DriverError<ErrorKind>> {
    let key = keys::alice();
    let credentials = Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint: public(&key).fingerprint() };
    let mut echoed = 0;
    loop {
        drive(endpoint)?;
        let mut verified = false;
        match endpoint.poll()? {
            Step::Ask(Ask::Sign(statement)) => {
                let signature = key.sign(&statement).unwrap();
                endpoint.sign(&credentials, &signature)?;
            }
            Step::Event(Event::CheckServer(claim)) => {
                verified = verify(keys::server().modulus(), &claim.statement, claim.signature);
                assert!(verified);
            }
            Step::Event(Event::Connected(_)) => {
                for request in 0..3 {
                    endpoint.send(&Message::Status { request })?;
                }
            }
            Step::Event(Event::Message(payload)) => {
                assert_eq!(Message::decode(payload), Ok(Message::Status { request: echoed }));
                echoed += 1;
                if echoed == 3 {
                    endpoint.close(None)?;
                }
            }
            Step::Event(Event::Closed(None)) => return Ok(echoed),
            _ => {}
        }
        if verified {
            endpoint.verified(&credentials)?;
        }
    }
}

fn over(knobs: Knobs) -> Result<u16, DriverError<ErrorKind>> {
    let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
    let mut stream = Stream::new(knobs);
    converse(&mut endpoint(&mut rx, &mut tx), |endpoint| {
        loop {
            match blocking::drive(endpoint, &mut stream) {
                // Not sticky: the next call goes on where this one stopped.
                Err(DriverError::Io(ErrorKind::TimedOut)) => {}
                result => return result,
            }
        }
    })
}

#[test]
fn a_conversation_survives_every_way_of_cutting_it() {
    for chunk in [usize::MAX, 1, 2, 3, 7, 8, 9, 100] {
        for times_out in [false, true] {
            assert_eq!(over(Knobs { chunk, times_out, ..HONEST }), Ok(3), "{chunk} bytes, {times_out}");
        }
    }
}

#[test]
fn the_asynchronous_driver_does_the_same() {
    for chunk in [usize::MAX, 1, 9] {
        let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
        let mut stream = Lazy(Stream::new(Knobs { chunk, ..HONEST }));
        let echoed = converse(&mut endpoint(&mut rx, &mut tx), |endpoint| {
            let mut driven = pin!(asynch::drive(endpoint, &mut stream));
            let mut context = Context::from_waker(Waker::noop());
            loop {
                if let Poll::Ready(result) = driven.as_mut().poll(&mut context) {
                    return result;
                }
            }
        });
        assert_eq!(echoed, Ok(3));
    }
}

#[test]
fn a_cancelled_wait_has_changed_nothing() {
    let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
    let mut stream = Lazy(Stream::new(HONEST));
    let mut calls = 0_usize;
    let echoed = converse(&mut endpoint(&mut rx, &mut tx), |endpoint| {
        loop {
            // Dropped after its first wait, over and over: only what had ended counts.
            let mut driven = pin!(asynch::drive(endpoint, &mut stream));
            let mut context = Context::from_waker(Waker::noop());
            calls += 1;
            for _ in 0..=calls % 3 {
                if let Poll::Ready(result) = driven.as_mut().poll(&mut context) {
                    return result;
                }
            }
        }
    });
    assert_eq!(echoed, Ok(3));
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
}

#[test]
fn a_flush_writes_all_that_waits_and_reads_nothing() {
    for chunk in [usize::MAX, 5] {
        let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
        let mut stream = Lazy(Stream::new(Knobs { chunk, ..HONEST }));
        let mut connected = 0;
        let echoed = converse(&mut endpoint(&mut rx, &mut tx), |endpoint| {
            let (given, waits) = (stream.0.given, !endpoint.is_flushed());
            let written = stream.0.calls;
            match chunk {
                5 => block_on(asynch::flush(endpoint, &mut stream))?,
                _ => blocking::flush(endpoint, &mut stream.0)?,
            }
            assert_eq!((stream.0.given, endpoint.is_flushed()), (given, true));
            assert_eq!(stream.0.calls > written, waits, "it writes where something waits");
            if endpoint.is_connected() {
                connected += 1;
                assert_eq!(endpoint.exporter().unwrap().expose(), stream.0.server.exporter().unwrap().expose());
                assert_eq!(endpoint.max_payload(), Ok(16_408 - 24));
                assert!(!endpoint.is_resumed());
                assert_eq!(endpoint.take_channel().is_some(), connected == 1, "once");
            }
            block_on(asynch::drive(endpoint, &mut stream))
        });
        assert_eq!(echoed, Ok(3));
        assert!(connected > 0);
    }
    // A stream that fails says so itself.
    let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
    let mut endpoint = endpoint(&mut rx, &mut tx);
    assert!(matches!(endpoint.poll(), Ok(Step::Io)));
    let mut stream = Lazy(Stream::new(Knobs { times_out: true, ..HONEST }));
    let failed = Err(DriverError::Io(ErrorKind::TimedOut));
    assert_eq!(blocking::flush(&mut endpoint, &mut stream.0), failed);
    stream.0.calls = 0;
    assert_eq!(block_on(asynch::flush(&mut endpoint, &mut stream)), failed);
}

#[test]
fn what_ended_a_driver_is_told_from_the_transport_and_from_the_protocol() {
    let (io, protocol) = (DriverError::Io(ErrorKind::TimedOut), DriverError::from(Error::Crypto));
    assert!(io.to_string().contains("TimedOut"), "{io}");
    assert_eq!(protocol.to_string(), DriverError::<ErrorKind>::Protocol(Error::Crypto).to_string());
    assert_eq!(protocol, DriverError::<ErrorKind>::Protocol(Error::Crypto));
    assert_eq!(protocol.to_string(), Error::Crypto.to_string());
}

#[test]
fn an_end_of_the_stream_without_a_close_is_truncation_wherever_it_comes() {
    let (mut rx, mut tx) = ([0; 1024], [0; 1024]);
    let mut stream = Stream::new(HONEST);
    converse(&mut endpoint(&mut rx, &mut tx), |endpoint| blocking::drive(endpoint, &mut stream)).unwrap();
    let whole = stream.given;
    for ends_after in 0..whole {
        let ended = over(Knobs { ends_after, ..HONEST });
        assert_eq!(ended, Err(DriverError::Protocol(PeerError::Truncated.into())), "after {ends_after} of {whole}");
    }
    println!("{whole} cuts");
    assert!(whole > 500);
}

#[test]
fn buffers_that_are_too_small_are_refused_before_anything_begins() {
    let config = ClientConfig { server: Some([0; 32]), ask_for_key: false, record_limit: 0 };
    let (mut rx, mut tx) = ([0; 1023], [0; 1024]);
    let refused =
        Endpoint::<'_, ossicle_core::RustCrypto>::client(config, Buffers { rx: &mut rx, tx: &mut tx }, &seed(1));
    assert_eq!(refused.err(), Some(Error::Buffer(ossicle_core::BufferError::RxFull)));
    // A first record that finds no room says so, and goes out when there is some.
    let (mut rx, mut tx) = ([0; 1024], [0; 83]);
    let mut endpoint = endpoint(&mut rx, &mut tx);
    assert!(matches!(endpoint.poll(), Err(Error::Buffer(ossicle_core::BufferError::TxFull))));
    assert!(endpoint.io().is_ok(), "not sticky");
}
