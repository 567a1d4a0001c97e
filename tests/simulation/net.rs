//! The simulated network as the streams of a server.

use core::future::{Future, poll_fn};
use core::net::SocketAddr;
use core::pin::{Pin, pin};
use core::task::{Context, Poll};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ossicle::transport::{Listener, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

/// Bytes that one write moves at most, so that a few records are a few segments.
const SEGMENT: usize = 2048;

pub(crate) struct Door(pub(crate) TcpListener);

impl Listener for Door {
    type Stream = Wire;

    async fn accept(&self) -> io::Result<(Wire, SocketAddr)> {
        let (stream, address) = self.0.accept().await?;
        Ok((Wire(Mutex::new(Ends { stream, come: Vec::new(), end: None })), address))
    }
}

pub(crate) struct Wire(Mutex<Ends>);

struct Ends {
    stream: TcpStream,
    /// What has come and was not read.
    come: Vec<u8>,
    /// How the stream has ended behind that.
    end: Option<Option<io::ErrorKind>>,
}

impl Wire {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn poll_come(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.come.is_empty() || self.end.is_some() {
            return Poll::Ready(());
        }
        let mut bytes = [0; 4096];
        let mut buffer = ReadBuf::new(&mut bytes);
        let end = match Pin::new(&mut self.stream).poll_read(context, &mut buffer) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => Some(None),
            Poll::Ready(Ok(())) => None,
            Poll::Ready(Err(error)) => Some(Some(error.kind())),
        };
        self.come.extend_from_slice(buffer.filled());
        self.end = end;
        Poll::Ready(())
    }
}

impl Stream for Wire {
    fn set_nodelay(&self) -> io::Result<()> {
        Ok(())
    }

    async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| self.ends().poll_come(context)).await;
        Ok(())
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut ends = self.ends();
        let len = ends.come.len().min(buffer.len());
        if len > 0 {
            buffer[..len].copy_from_slice(&ends.come[..len]);
            ends.come.drain(..len);
            return Ok(len);
        }
        match ends.end {
            None => Err(io::ErrorKind::WouldBlock.into()),
            Some(None) => Ok(0),
            Some(Some(kind)) => Err(kind.into()),
        }
    }

    async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| {
            let ends = self.ends();
            let writable = pin!(ends.stream.writable());
            writable.poll(context)
        })
        .await
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.ends().stream.try_write(&bytes[..bytes.len().min(SEGMENT)])
    }

    async fn shutdown(&mut self) -> io::Result<()> {
        poll_fn(|context| Pin::new(&mut self.ends().stream).poll_shutdown(context)).await
    }
}
