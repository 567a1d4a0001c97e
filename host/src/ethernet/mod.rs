//! An Ethernet that exists only in this process, for simulated devices: a switch, and behind it the way to this machine.
//!
//! ```text
//!   device --- Plug ---+
//!   device --- Plug ---+--- switch --- Plug --- gateway 10.0.2.2: DHCP, and TCP to 127.0.0.1
//!   QEMU --- uplink ---+      |                                 |
//!                             +--- all frames --> Search <------+--- all streams
//!   people --- tap, a port on loopback that passes everything on ---+
//! ```
//!
//! Devices get their addresses from the gateway, and reach this machine's loopback at its address, as in QEMU's user
//! network; an identity page for one is good for the other. Frames that a port does not fetch in time are dropped, as by
//! any switch. This is the only room that names smoltcp; it knows nothing of what the bytes mean.

mod gateway;
mod tap;
mod uplink;

use core::net::{Ipv4Addr, SocketAddr};
use core::task::{Context, Poll, Waker};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::search::{Place, Search};
pub use tap::Tap;

/// Where a device finds the machine that it is simulated on: the gateway relays to its loopback.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// In findings: a frame on the Ethernet, as it is.
pub const FRAMES: &str = "a frame of the Ethernet";
/// In findings: the bytes of a connection through the gateway, however they were cut into frames.
pub const DEVICES: &str = "a device's connection";

/// The longest frame, with its header and without its checksum.
const MAX_FRAME_LEN: usize = 1514;
/// Destination and source.
const ADDRESSES_LEN: usize = 12;
/// Ports beyond which nobody gets one from outside.
const MAX_PORTS: usize = 256;
/// Frames that wait for one port.
const QUEUE: usize = 64;

type HardwareAddress = [u8; 6];

/// A running Ethernet. It ends when this is dropped.
#[derive(Debug)]
pub struct Network {
    switch: Arc<Switch>,
    /// The gateway, the uplinks and the taps. There until the end.
    runtime: Option<Runtime>,
}

impl Network {
    /// Starts a switch with a gateway. All that passes is searched, if there is a search.
    ///
    /// # Errors
    /// The system has no thread, or no randomness, for it.
    pub fn start(search: Option<Arc<Search>>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("ethernet")
            .enable_all()
            .build()?;
        let frames = search.as_ref().map(|search| Mutex::new(search.place(FRAMES)));
        let switch = Arc::new(Switch { ports: Mutex::default(), search, frames });
        let network = Self { switch, runtime: Some(runtime) };
        let gateway = gateway::Gateway::new(network.plug(), network.switch.search.clone())?;
        network.spawn(gateway.run());
        Ok(network)
    }

    /// A free port of the switch.
    pub(crate) fn plug(&self) -> Plug {
        Switch::plug(&self.switch)
    }

    /// Opens a port on loopback at which QEMU can plug a device in: `-nic socket,connect=ADDRESS`.
    ///
    /// # Errors
    /// Those of a listening socket.
    pub fn uplink(&self) -> io::Result<SocketAddr> {
        let listener = self.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        self.spawn(uplink::run(listener, Arc::clone(&self.switch)));
        Ok(address)
    }

    /// Opens a port on loopback that passes everything on to `server`, and searches it, for those who are not on the
    /// Ethernet. `name` says in findings whose traffic it is.
    ///
    /// # Errors
    /// Those of a listening socket.
    pub fn tap(&self, server: SocketAddr, name: &'static str) -> io::Result<Tap> {
        Tap::open(self, server, name)
    }

    fn bind(&self, address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let _context = self.runtime.as_ref().map(Runtime::enter);
        tokio::net::TcpListener::from_std(listener)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Option<JoinHandle<()>> {
        self.runtime.as_ref().map(|runtime| runtime.spawn(task))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for its thread would forbid whoever is asynchronous to drop a network.
            runtime.shutdown_background();
        }
    }
}

#[derive(Debug)]
struct Switch {
    ports: Mutex<Vec<Weak<Port>>>,
    search: Option<Arc<Search>>,
    frames: Option<Mutex<Place>>,
}

impl Switch {
    fn plug(switch: &Arc<Self>) -> Plug {
        let port = Arc::new(Port { switch: Arc::clone(switch), state: Mutex::default() });
        let mut ports = lock(&switch.ports);
        ports.retain(|port| port.strong_count() > 0);
        ports.push(Arc::downgrade(&port));
        Plug(port)
    }

    fn is_full(&self) -> bool {
        lock(&self.ports).iter().filter(|port| port.strong_count() > 0).count() >= MAX_PORTS
    }
}

/// One port of the switch, from outside: what a network card would be to a board. Clones are the same port.
#[derive(Clone, Debug)]
pub(crate) struct Plug(Arc<Port>);

#[derive(Debug)]
struct Port {
    switch: Arc<Switch>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whoever is behind it, once it has sent something.
    address: Option<HardwareAddress>,
    arrived: VecDeque<Vec<u8>>,
    waiting: Option<Waker>,
}

impl Plug {
    /// Ready when a frame has arrived; until then the context's waker is kept, and woken once.
    pub(crate) fn poll_arrived(&self, context: &Context<'_>) -> Poll<()> {
        let mut state = lock(&self.0.state);
        if state.arrived.is_empty() {
            state.waiting = Some(context.waker().clone());
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }

    fn fetch(&self) -> Option<Vec<u8>> {
        lock(&self.0.state).arrived.pop_front()
    }

    /// To the port behind which its destination is, or to all where nobody knows.
    fn send(&self, frame: Vec<u8>) {
        let (Some(&destination), Some(source)) = (frame.first_chunk(), frame.get(6..ADDRESSES_LEN)) else { return };
        if frame.len() > MAX_FRAME_LEN {
            return;
        }
        if let Some(frames) = &self.0.switch.frames {
            lock(frames).pass(&frame);
        }
        lock(&self.0.state).address = source.try_into().ok();
        let others: Vec<Arc<Port>> = {
            let ports = lock(&self.0.switch.ports);
            ports.iter().filter_map(Weak::upgrade).filter(|port| !Arc::ptr_eq(port, &self.0)).collect()
        };
        let known = others.iter().find(|port| lock(&port.state).address == Some(destination));
        match known {
            Some(port) => port.deliver(frame),
            None => others.iter().for_each(|port| port.deliver(frame.clone())),
        }
    }
}

impl Port {
    fn deliver(&self, frame: Vec<u8>) {
        let mut state = lock(&self.state);
        if state.arrived.len() < QUEUE {
            state.arrived.push_back(frame);
        }
        if let Some(waiting) = state.waiting.take() {
            waiting.wake();
        }
    }
}

/// Nothing under these locks can panic halfway through a change, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Plug {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Leaving<'_>)> {
        let frame = self.fetch()?;
        Some((Arrived(frame), Leaving(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        Some(Leaving(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

fn capabilities() -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ethernet;
    capabilities.max_transmission_unit = MAX_FRAME_LEN;
    capabilities
}

/// A frame that has arrived at a [`Plug`].
#[derive(Debug)]
pub(crate) struct Arrived(Vec<u8>);

/// Room for a frame that leaves a [`Plug`].
#[derive(Debug)]
pub(crate) struct Leaving<'p>(&'p Plug);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.send(frame);
        result
    }
}

/// Milliseconds, as smoltcp counts them.
fn instant(started: std::time::Instant) -> Instant {
    Instant::from_millis(i64::try_from(started.elapsed().as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
