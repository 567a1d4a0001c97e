//! All the I/O there is: one loop over any blocking `embedded-io` stream, and the same over an asynchronous one.
//!
//! Streams have no timeout of their own here: one that gives up waiting returns its own error, and the next call goes on
//! where the last one stopped. This is the only room that names embedded-io.

use crate::error::Error;

/// What ended a driver's call: the protocol or the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum DriverError<E> {
    /// The engine's error; final unless its documentation says otherwise.
    Protocol(Error),
    /// The transport's error, as it came.
    Io(E),
}

impl<E> From<Error> for DriverError<E> {
    fn from(error: Error) -> Self {
        Self::Protocol(error)
    }
}

impl<E: core::fmt::Debug> core::fmt::Display for DriverError<E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Protocol(error) => error.fmt(f),
            Self::Io(error) => write!(f, "the transport failed: {error:?}"),
        }
    }
}

impl<E: core::fmt::Debug> core::error::Error for DriverError<E> {}

/// Drivers for blocking streams.
pub mod blocking {
    use super::DriverError;
    use crate::endpoint::Drive;
    use embedded_io::{Read, Write};

    /// Writes all that waits, then reads until there is something to poll for.
    ///
    /// # Errors
    /// [`DriverError::Io`] as the stream returned it; a time-out is an ordinary one, and the next call goes on.
    pub fn drive<D: Drive, S: Read + Write>(drive: &mut D, stream: &mut S) -> Result<(), DriverError<S::Error>> {
        while let Some(io) = drive.io()? {
            if io.write.is_empty() {
                let len = stream.read(io.read).map_err(DriverError::Io)?;
                drive.read(len)?;
            } else {
                let len = stream.write(io.write).map_err(DriverError::Io)?;
                drive.written(len);
            }
        }
        Ok(())
    }

    /// Writes all that waits and reads nothing.
    ///
    /// # Errors
    /// As [`drive`].
    pub fn flush<D: Drive, S: Write>(drive: &mut D, stream: &mut S) -> Result<(), DriverError<S::Error>> {
        while let Some(io) = drive.io()? {
            if io.write.is_empty() {
                break;
            }
            let len = stream.write(io.write).map_err(DriverError::Io)?;
            drive.written(len);
        }
        stream.flush().map_err(DriverError::Io)
    }
}

/// Drivers for asynchronous streams (feature `async`).
#[cfg(feature = "async")]
pub mod asynch {
    use super::DriverError;
    use crate::endpoint::Drive;
    use embedded_io_async::{Read, Write};

    /// Writes all that waits, then reads until there is something to poll for.
    ///
    /// # Cancel safety
    /// Safe to cancel if the stream's own `read` and `write` are: nothing changes before they have returned.
    ///
    /// # Errors
    /// As [`blocking::drive`](super::blocking::drive).
    pub async fn drive<D: Drive, S: Read + Write>(drive: &mut D, stream: &mut S) -> Result<(), DriverError<S::Error>> {
        while let Some(io) = drive.io()? {
            if io.write.is_empty() {
                let len = stream.read(io.read).await.map_err(DriverError::Io)?;
                drive.read(len)?;
            } else {
                let len = stream.write(io.write).await.map_err(DriverError::Io)?;
                drive.written(len);
            }
        }
        Ok(())
    }

    /// Writes all that waits and reads nothing.
    ///
    /// # Cancel safety
    /// As [`drive`].
    ///
    /// # Errors
    /// As [`drive`].
    pub async fn flush<D: Drive, S: Write>(drive: &mut D, stream: &mut S) -> Result<(), DriverError<S::Error>> {
        while let Some(io) = drive.io()? {
            if io.write.is_empty() {
                break;
            }
            let len = stream.write(io.write).await.map_err(DriverError::Io)?;
            drive.written(len);
        }
        stream.flush().await.map_err(DriverError::Io)
    }
}
