//! A port on loopback that passes everything on to a server, both ways, and has it searched.
//!
//! It can be shut like the server behind it: what dials it then is refused, as it would be there.

use core::net::{Ipv4Addr, SocketAddr};
use core::time::Duration;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::Network;
use crate::search::{Place, Search};

/// What one read takes.
const PIECE: usize = 16 * 1024;

/// See the module. It is shut when it is dropped.
#[derive(Debug)]
pub struct Tap {
    /// What to dial instead of the server.
    pub address: SocketAddr,
    server: SocketAddr,
    name: &'static str,
    accepting: Option<JoinHandle<()>>,
}

impl Tap {
    pub(super) fn open(network: &Network, server: SocketAddr, name: &'static str) -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut tap = Self { address, server, name, accepting: None };
        tap.reopen(network)?;
        Ok(tap)
    }

    /// Refuses new connections. What is connected stays so, as long as both ends want it.
    pub fn shut(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            // Its port is free once it is gone: at once, unless the runtime went first.
            while !accepting.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Takes new connections again, at the same address.
    ///
    /// # Errors
    /// Those of a listening socket.
    pub fn reopen(&mut self, network: &Network) -> io::Result<()> {
        self.shut();
        let listener = network.bind(self.address)?;
        self.address = listener.local_addr()?;
        self.accepting = network.spawn(accept(listener, self.server, network.switch.search.clone(), self.name));
        Ok(())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shut();
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, search: Option<Arc<Search>>, name: &'static str) {
    while let Ok((near, _)) = listener.accept().await {
        let places = [(); 2].map(|()| search.as_ref().map(|search| search.place(name)));
        tokio::spawn(relay(near, server, places));
    }
}

async fn relay(near: TcpStream, server: SocketAddr, [up, down]: [Option<Place>; 2]) {
    let Ok(far) = TcpStream::connect(server).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
    // What one side ends, the other sees ended behind the last byte.
    let (_, _) = tokio::join!(copy(from_near, to_far, up), copy(from_far, to_near, down));
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut place: Option<Place>) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let n = from.read(&mut piece).await?;
        let passed = piece.get(..n).unwrap_or_default();
        if passed.is_empty() {
            return to.shutdown().await;
        }
        if let Some(place) = &mut place {
            place.pass(passed);
        }
        to.write_all(passed).await?;
    }
}
