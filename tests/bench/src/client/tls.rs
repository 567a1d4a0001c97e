//! TLS without a socket, for those who speak over it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind};

use crate::Failure;
use crate::people::SERVER_NAME;

pub(super) struct Tls {
    session: ClientConnection,
    /// Opened, and not yet taken.
    pub(super) plain: Vec<u8>,
}

impl Tls {
    /// Runs the handshake over a blocking socket.
    pub(super) fn connect(stream: &mut TcpStream, config: &Arc<ClientConfig>) -> Result<Self, Failure> {
        let mut session = ClientConnection::new(Arc::clone(config), ServerName::try_from(SERVER_NAME)?)?;
        session.set_buffer_limit(None);
        while session.is_handshaking() {
            session.complete_io(stream)?;
        }
        // The last flight of a client.
        while session.wants_write() {
            session.write_tls(stream)?;
        }
        Ok(Self { session, plain: Vec::new() })
    }

    pub(super) fn has_resumed(&self) -> bool {
        self.session.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Seals `bytes` behind what is in `out`.
    pub(super) fn seal(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Failure> {
        self.session.writer().write_all(bytes)?;
        while self.session.wants_write() {
            self.session.write_tls(out)?;
        }
        Ok(())
    }

    /// Opens `data` into `plain`.
    pub(super) fn open(&mut self, mut data: &[u8]) -> Result<(), Failure> {
        loop {
            let len = self.session.process_new_packets()?.plaintext_bytes_to_read();
            let end = self.plain.len();
            self.plain.resize(end + len, 0);
            self.session.reader().read_exact(&mut self.plain[end..])?;
            if data.is_empty() {
                return Ok(());
            }
            self.session.read_tls(&mut data)?;
        }
    }

    pub(super) fn close(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.session.send_close_notify();
        self.seal(&[], out)
    }
}
