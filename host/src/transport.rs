//! The streams under a server's connections: TCP, or whatever a simulation brings in its place.
//!
//! A channel moves bytes as its buffers allow and never blocks, so all it needs of a stream is to try and to be told when
//! trying again may help. WebSocket will be the next kind.

use core::future::Future;
use core::net::SocketAddr;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use std::io;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// Where connections come from.
pub trait Listener: Send + Sync + 'static {
    /// What they are.
    type Stream: Stream;

    /// The next connection, and who it is from. Cancel-safe.
    ///
    /// # Errors
    /// Those of the system. What a peer is to blame for is `ConnectionAborted` or `ConnectionReset`.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

/// A stream of bytes in both directions. One task at a time waits for each of them.
pub trait Stream: Send + Sync + 'static {
    /// From now on small writes do not wait for each other.
    ///
    /// # Errors
    /// Those of the system.
    fn set_nodelay(&self) -> io::Result<()>;

    /// Comes back when there may be something to read, if only the end. Cancel-safe.
    ///
    /// # Errors
    /// Those of the system.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Reads what is there: 0 bytes at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` while nothing is there, and those of the system.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// The same, where it can be told from the length of what was read that no more is there: then
    /// [`readable`](Self::readable) waits without another look.
    ///
    /// # Errors
    /// Those of [`Stream::try_read`].
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }

    /// Comes back when there may be room to write. Cancel-safe.
    ///
    /// # Errors
    /// Those of the system.
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` while there is none, and those of the system.
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Says that nothing more will be written.
    ///
    /// # Errors
    /// Those of the system.
    fn shutdown(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }
}

impl Stream for TcpStream {
    fn set_nodelay(&self) -> io::Result<()> {
        Self::set_nodelay(self, true)
    }

    async fn readable(&self) -> io::Result<()> {
        Self::readable(self).await
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Self::try_read(self, buffer)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut room = ReadBuf::new(buffer);
        match Pin::new(&mut *self).poll_read(&mut Context::from_waker(Waker::noop()), &mut room) {
            Poll::Ready(read) => read.map(|()| room.filled().len()),
            // Nothing is there, or this task has had its turn.
            Poll::Pending => Self::try_read(self, buffer),
        }
    }

    async fn writable(&self) -> io::Result<()> {
        Self::writable(self).await
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Self::try_write(self, bytes)
    }

    async fn shutdown(&mut self) -> io::Result<()> {
        AsyncWriteExt::shutdown(self).await
    }
}
