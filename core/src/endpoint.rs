//! A [`Connection`] with two borrowed buffers: what a device, or anything with one connection, drives.
//!
//! The receive buffer holds at most one record and the transmit buffer what was not written yet. [`Drive::io`] says
//! what to do with the transport, [`Endpoint::poll`] what has come of it; the drivers are the loop around both. No
//! transport is named here.

use crate::config::{Channel, ClientConfig, Credentials};
use crate::connection::{Ask, Connection, Event, Inspected, Received};
use crate::crypto::{Aead, HASH_LEN, RustCrypto, Secret, TAG_LEN};
use crate::error::{BufferError, Error, Reason};
use crate::wire::{HEADER_LEN, MIN_RECORD_LIMIT, Message, Rungs};

/// The buffers of one endpoint.
pub struct Buffers<'b> {
    /// Holds one received record: its length is the record limit that is offered to the peer, at least
    /// [`MIN_RECORD_LIMIT`] bytes.
    pub rx: &'b mut [u8],
    /// Holds what is to be written. Must take the longest record that is sent; more lets several share one write.
    pub tx: &'b mut [u8],
}

/// One end of a connection and its buffers.
pub struct Endpoint<'b, A: Aead = RustCrypto> {
    rx: &'b mut [u8],
    /// Bytes of `rx` that were read.
    received: usize,
    /// The record in `rx` was opened and lent out: the next poll makes room.
    opened: bool,
    out: Outbox<'b, A>,
}

/// The connection and what it has to write: the half of an endpoint that is free while a received record is lent out.
pub(crate) struct Outbox<'b, A: Aead> {
    pub(crate) connection: Connection<A>,
    tx: &'b mut [u8],
    /// Bytes of `tx` that wait to be written, and how many of them were.
    pending: usize,
    written: usize,
}

impl<A: Aead> Outbox<'_, A> {
    /// Lets the connection append to what waits to be written.
    fn append<E>(&mut self, seal: impl FnOnce(&mut Connection<A>, &mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        // What was written already makes room, without waiting for the rest.
        if self.written > 0 {
            self.tx.copy_within(self.written..self.pending, 0);
            self.pending = self.pending.saturating_sub(self.written);
            self.written = 0;
        }
        let room = self.tx.get_mut(self.pending..).unwrap_or_default();
        let len = seal(&mut self.connection, room)?;
        self.pending = self.pending.saturating_add(len);
        Ok(())
    }

    pub(crate) fn send(&mut self, message: &Message<'_>) -> Result<(), Error> {
        self.append(|connection, room| connection.send(message, room))
    }

    /// Sends an envelope that is sealed where the record will stand.
    pub(crate) fn send_sealed<T, E: From<Error>>(
        &mut self,
        wanted: Rungs,
        len: usize,
        seal: impl FnOnce(&mut [u8]) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut sealed = None;
        self.append(|connection, room| {
            connection.send_sealed(wanted, len, room, |envelope| {
                sealed = Some(seal(envelope)?);
                Ok::<_, E>(())
            })
        })?;
        // It was called, or the call above would have failed.
        sealed.ok_or_else(|| Error::Crypto.into())
    }

    /// What the protocol owes without being asked.
    pub(crate) fn transmit(&mut self) -> Result<(), Error> {
        match self.append(Connection::transmit) {
            // A key update can wait until something was written.
            Err(Error::Buffer(BufferError::TxFull)) if self.pending > 0 => Ok(()),
            result => result,
        }
    }
}

/// What the transport should do. At least one of the two is not empty.
pub struct Io<'e> {
    /// Write these bytes, or some of them, and say how many by [`Drive::written`].
    pub write: &'e [u8],
    /// Read into these, and say how many by [`Drive::read`]. Empty where nothing can be received now.
    pub read: &'e mut [u8],
}

/// What a driver moves bytes for: an [`Endpoint`], or a [`Client`](crate::Client) around one.
pub trait Drive {
    /// What to write and read now, or `None` if there is something to poll for first.
    ///
    /// # Errors
    /// [`BufferError::RxFull`] if the peer's record does not fit into the receive buffer.
    fn io(&mut self) -> Result<Option<Io<'_>>, Error>;

    /// The transport took this many bytes of [`Io::write`].
    fn written(&mut self, len: usize);

    /// The transport put this many bytes into [`Io::read`]; 0 is the end of the stream.
    ///
    /// # Errors
    /// [`PeerError::Truncated`](crate::PeerError::Truncated) at an end of the stream without a close.
    fn read(&mut self, len: usize) -> Result<(), Error>;
}

/// What an endpoint came to.
#[non_exhaustive]
pub enum Step<'e> {
    /// The engine needs a signature: answer with [`Endpoint::sign`].
    Ask(Ask),
    /// A record said this.
    Event(Event<'e>),
    /// Nothing to do but to move bytes.
    Io,
}

impl<'b, A: Aead> Endpoint<'b, A> {
    /// A client's end. The record limit of `config` is replaced by the length of the receive buffer.
    ///
    /// # Errors
    /// [`BufferError::RxFull`] if the receive buffer is shorter than [`MIN_RECORD_LIMIT`].
    pub fn client(mut config: ClientConfig, buffers: Buffers<'b>, seed: &[u8; 64]) -> Result<Self, Error> {
        if buffers.rx.len() < MIN_RECORD_LIMIT {
            return Err(BufferError::RxFull.into());
        }
        config.record_limit = u16::try_from(buffers.rx.len()).unwrap_or(u16::MAX);
        let connection = Connection::client(config, seed);
        let out = Outbox { connection, tx: buffers.tx, pending: 0, written: 0 };
        Ok(Self { rx: buffers.rx, received: 0, opened: false, out })
    }

    /// Begins anew in the same buffers, after the transport has ended. Offers to resume `channel`, unless it is that of
    /// another server. After [`PeerError::Retry`](crate::PeerError::Retry) the puzzle of the connection that has ended is
    /// presented: [`solve`](Self::solve) it before the transport is opened.
    pub fn reconnect(&mut self, mut config: ClientConfig, channel: Option<Channel>, seed: &[u8; 64]) {
        config.record_limit = u16::try_from(self.rx.len()).unwrap_or(u16::MAX);
        let puzzle = self.out.connection.puzzle();
        self.out.connection = match channel.map(|channel| Connection::resume(config, channel, seed)) {
            Some(Ok(connection)) => connection,
            Some(Err(_)) | None => Connection::client(config, seed),
        };
        if let Some(puzzle) = puzzle {
            // It has not begun.
            let _ = self.out.connection.present(&puzzle);
        }
        self.received = 0;
        self.opened = false;
        self.out.pending = 0;
        self.out.written = 0;
    }

    /// Makes some tries at the puzzle that a busy server has set: see [`Connection::solve`]. True if it must be called
    /// again.
    pub fn solve(&mut self) -> bool {
        self.out.connection.solve()
    }

    /// Goes on until somebody else is needed.
    ///
    /// # Errors
    /// Those of [`Connection::receive`] and [`Connection::transmit`].
    pub fn poll(&mut self) -> Result<Step<'_>, Error> {
        self.make_room();
        self.out.transmit()?;
        if let Some(ask) = self.out.connection.ask() {
            return Ok(Step::Ask(ask));
        }
        let data = self.rx.get_mut(..self.received).unwrap_or_default();
        match self.out.connection.receive(data)? {
            Received::Record { event: Event::Progress, .. } => {
                self.received = 0;
                Ok(Step::Event(Event::Progress))
            }
            Received::Record { event, .. } => {
                self.opened = true;
                Ok(Step::Event(event))
            }
            Received::Need(_) | Received::Wait => Ok(Step::Io),
        }
    }

    /// The server's claim was verified: see [`Connection::verified`].
    ///
    /// # Errors
    /// As there.
    pub fn verified(&mut self, credentials: &Credentials<'_>) -> Result<(), Error> {
        self.out.connection.verified(credentials)
    }

    /// Answers [`Ask::Sign`]: see [`Connection::sign_client`].
    ///
    /// # Errors
    /// As there.
    pub fn sign(&mut self, credentials: &Credentials<'_>, signature: &[u8]) -> Result<(), Error> {
        self.out.append(|connection, room| connection.sign_client(credentials, signature, room))
    }

    /// Seals `message` behind what waits to be written.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), Error> {
        self.out.send(message)
    }

    /// Seals this side's last record.
    ///
    /// # Errors
    /// As [`Connection::close`].
    pub fn close(&mut self, reason: Option<Reason>) -> Result<(), Error> {
        self.out.append(|connection, room| connection.close(reason, room))
    }

    /// Whether nothing waits to be written.
    pub const fn is_flushed(&self) -> bool {
        self.out.pending == 0
    }

    /// Whether the handshake has finished and neither side has closed.
    pub const fn is_connected(&self) -> bool {
        self.out.connection.is_connected()
    }

    /// See [`Connection::is_resumed`].
    pub const fn is_resumed(&self) -> bool {
        self.out.connection.is_resumed()
    }

    /// See [`Connection::take_channel`].
    pub const fn take_channel(&mut self) -> Option<Channel> {
        self.out.connection.take_channel()
    }

    /// Bytes of the longest payload that the peer takes in one record.
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`](crate::ApiMisuse::NotConnected) before the handshake has finished.
    pub fn max_payload(&self) -> Result<usize, Error> {
        self.out.connection.max_payload()
    }

    /// See [`Connection::exporter`].
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`](crate::ApiMisuse::NotConnected) before the handshake has finished.
    pub fn exporter(&self) -> Result<&Secret<HASH_LEN>, Error> {
        self.out.connection.exporter()
    }

    /// Forgets the record that was lent out.
    pub(crate) fn make_room(&mut self) {
        if core::mem::take(&mut self.opened) {
            self.received = 0;
        }
    }

    /// The received bytes, whether they were lent out, and the outbox, apart. Whoever opens the record says so.
    pub(crate) fn parts(&mut self) -> (&mut [u8], &mut bool, &mut Outbox<'b, A>) {
        (self.rx.get_mut(..self.received).unwrap_or_default(), &mut self.opened, &mut self.out)
    }

    pub(crate) const fn outbox(&mut self) -> &mut Outbox<'b, A> {
        &mut self.out
    }

    /// Where the payload of the record lies that was opened last.
    pub(crate) fn payload(&self) -> core::ops::Range<usize> {
        HEADER_LEN..self.received.saturating_sub(TAG_LEN)
    }
}

impl<A: Aead> Drive for Endpoint<'_, A> {
    fn io(&mut self) -> Result<Option<Io<'_>>, Error> {
        let received = self.received;
        let end = match self.out.connection.inspect(self.rx.get(..received).unwrap_or_default()) {
            Ok(Inspected::Need(end)) if !self.opened => end,
            // Lent out, or waited for; `poll` finds a whole record, or its error, again and keeps it.
            Ok(_) | Err(_) => received,
        };
        let write = self.out.tx.get(self.out.written..self.out.pending).unwrap_or_default();
        let read = self.rx.get_mut(received..end).ok_or(BufferError::RxFull)?;
        if write.is_empty() && read.is_empty() { Ok(None) } else { Ok(Some(Io { write, read })) }
    }

    fn written(&mut self, len: usize) {
        self.out.written = self.out.written.saturating_add(len).min(self.out.pending);
        if self.out.written == self.out.pending {
            self.out.written = 0;
            self.out.pending = 0;
        }
    }

    fn read(&mut self, len: usize) -> Result<(), Error> {
        if len == 0 {
            return self.out.connection.end_of_stream();
        }
        self.received = self.received.saturating_add(len).min(self.rx.len());
        Ok(())
    }
}
