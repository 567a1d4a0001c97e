//! An Ossicle device on embassy: a sketch to start from.
//!
//! It joins its server over [`embassy_net`], reports to its owner once a second, obeys what he has signed, and joins again
//! whatever happens. The client is the core's, and so is the loop that moves bytes ([`asynch::drive`]); what is left is when to
//! wait for what. Whoever runs it brings a network [`Stack`], a [`Thing`] and a [`SecureElement`]: [`InSoftware`] is one for
//! chips that have none, and wants a heap of 10.5 KiB. `main.rs` runs it on a board.
#![no_std]
#![forbid(unsafe_code)]

use core::convert::Infallible;
use core::future::Future;
use core::net::SocketAddrV4;

use embassy_futures::select::{Either, select};
use embassy_futures::yield_now;
use embassy_net::Stack;
use embassy_net::tcp::TcpSocket;
use embassy_time::{Duration, Instant, Timer, with_timeout};
use ossicle_core::{
    ApiMisuse, BufferError, Client, ClientBuffers, ClientEvent, ClientIdentity, ClientStep, DriverError, Error,
    IdentityPage, PeerConfig, PublicKey, Reason, RsaKey, Rungs, Settings, Statement, asynch, verify_rsa,
};
use rand_core::{Rng, TryCryptoRng};

/// The owner is the only peer.
const OWNER: usize = 0;
/// The application's kind of every message here: UTF-8 text.
const TEXT: u8 = 0;
const REPORT_EVERY: Duration = Duration::from_secs(1);
const SHORTEST_BACK_OFF: Duration = Duration::from_secs(1);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);
/// Until the server has said how long a silence may be.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the device is for.
pub trait Thing {
    /// 64 bytes from a source of entropy, for each connection.
    fn seed(&mut self) -> [u8; 64];

    /// What to report now.
    fn reading(&mut self) -> [u8; 12];

    /// The owner's command, signed by him.
    fn obey(&mut self, command: &[u8]);
}

/// What holds the device's RSA key of 2048 bits, and knows RSA.
pub trait SecureElement {
    /// The signature of `statement`, RSA-PSS over [`Statement::digest`].
    ///
    /// # Errors
    /// [`Error`] as the element has it; it ends the connection.
    fn sign(&mut self, statement: &Statement) -> impl Future<Output = Result<[u8; 256], Error>>;

    /// Whether `signature` is `key`'s for `statement`.
    fn verify(&mut self, key: PublicKey<'_>, statement: &Statement, signature: &[u8]) -> impl Future<Output = bool>;
}

/// RSA in software, with the key of the identity page.
///
/// It holds up its executor while it computes, a second or so for a signature: where that is too long for other tasks, run
/// it on an executor of lower priority.
pub struct InSoftware<'p, R> {
    page: IdentityPage<'p>,
    rng: R,
}

impl<'p, R: TryCryptoRng> InSoftware<'p, R> {
    /// The element of this page; `rng` blinds the private key while it signs.
    pub fn new(page: IdentityPage<'p>, rng: R) -> Self {
        Self { page, rng }
    }
}

impl<R: TryCryptoRng> SecureElement for InSoftware<'_, R> {
    async fn sign(&mut self, statement: &Statement) -> Result<[u8; 256], Error> {
        let mut signature = [0; 256];
        RsaKey::new(self.page.key.d, self.page.key.p, self.page.key.q)?.sign(
            statement,
            &mut self.rng,
            &mut signature,
        )?;
        Ok(signature)
    }

    async fn verify(&mut self, key: PublicKey<'_>, statement: &Statement, signature: &[u8]) -> bool {
        verify_rsa(key, statement, signature).is_ok()
    }
}

/// Joins, reports, obeys and joins again. `key` is the public half of what the element signs with.
///
/// # Errors
/// Those of [`Client::new`], at once: nothing later ends it.
pub async fn run<T: Thing, E: SecureElement, R: Rng + TryCryptoRng>(
    stack: Stack<'_>,
    page: IdentityPage<'_>,
    key: PublicKey<'_>,
    thing: &mut T,
    element: &mut E,
    rng: &mut R,
) -> Result<Infallible, Error> {
    let identity = ClientIdentity { id: page.id, key_epoch: 0, key, server: page.server };
    let owner = PeerConfig { id: page.owner.id, key: page.owner.key, oldest: Some(page.owner.bundle) };
    let (mut rx, mut tx, mut signature) = ([0; 1024], [0; 1024], [0; 256]);
    let buffers = ClientBuffers { rx: &mut rx, tx: &mut tx, signature: &mut signature };
    let mut client = Client::<1>::new(identity, &[owner], buffers, &thing.seed())?;
    let (mut tcp_rx, mut tcp_tx) = ([0; 1024], [0; 1024]);
    let mut back_off = SHORTEST_BACK_OFF;
    loop {
        stack.wait_config_up().await;
        let mut socket = TcpSocket::new(stack, &mut tcp_rx, &mut tcp_tx);
        socket.set_nagle_enabled(false);
        let server = SocketAddrV4::new(page.address.into(), page.port);
        if let Ok(Ok(())) = with_timeout(HANDSHAKE_TIMEOUT, socket.connect(server)).await {
            let since = Instant::now();
            let Err(ending) = converse(&mut client, &mut socket, thing, element, rng).await;
            defmt::warn!("connection ended: {}", ending);
            if since.elapsed() > LONGEST_BACK_OFF {
                back_off = SHORTEST_BACK_OFF;
            }
        } else {
            defmt::warn!("server unreachable, trying again");
        }
        socket.abort();
        let _ = with_timeout(SHORTEST_BACK_OFF, socket.flush()).await;

        // Keys, chains and the resumable channel stay in the client; half of the wait is random, so that a thousand devices
        // do not come back together.
        client.reconnect(&thing.seed());
        // A server that is under load may have set a puzzle: that is wait enough.
        if client.solve() {
            while client.solve() {
                yield_now().await;
            }
            continue;
        }
        let jitter = u64::from(rng.next_u32()) % (back_off.as_millis() / 2 + 1);
        Timer::after(back_off / 2 + Duration::from_millis(jitter)).await;
        back_off = (back_off * 2).min(LONGEST_BACK_OFF);
    }
}

/// Why a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, defmt::Format)]
enum Ending {
    /// The server closed it.
    Closed(Option<Reason>),
    /// The engine, or the element, ended it.
    Protocol(Error),
    /// The server was silent for too long.
    Silence,
    /// The stream broke.
    Transport,
}

impl From<Error> for Ending {
    fn from(error: Error) -> Self {
        Self::Protocol(error)
    }
}

/// One connection, from its first byte to its end.
async fn converse<T: Thing, E: SecureElement, R: TryCryptoRng>(
    client: &mut Client<'_, '_, 1>,
    socket: &mut TcpSocket<'_>,
    thing: &mut T,
    element: &mut E,
    rng: &mut R,
) -> Result<Infallible, Ending> {
    let mut silence = HANDSHAKE_TIMEOUT;
    let mut heard = Instant::now();
    let (mut next_report, mut next_start, mut start_back_off) = (heard, heard, SHORTEST_BACK_OFF);
    loop {
        // What the timer cuts short goes on with the next call: reading and writing a socket may be cancelled.
        let wake = next_report.min(heard + silence);
        match select(asynch::drive(client, socket), Timer::at(wake)).await {
            Either::First(Ok(())) => {
                heard = Instant::now();
                match client.poll(rng)? {
                    ClientStep::Sign(statement) => {
                        let signature = element.sign(&statement).await?;
                        client.sign(&signature)?;
                    }
                    ClientStep::Verify { key, statement, signature } => {
                        let valid = element.verify(key, &statement, signature).await;
                        client.verified(valid)?;
                    }
                    ClientStep::Event(ClientEvent::Connected { settings, resumed }) => {
                        defmt::info!("connected, resumed {=bool}", resumed);
                        silence = allowed(settings);
                    }
                    ClientStep::Event(ClientEvent::Settings(settings)) => silence = allowed(settings),
                    ClientStep::Event(ClientEvent::Message { signed: true, kind: TEXT, body, .. }) => thing.obey(body),
                    ClientStep::Event(ClientEvent::Closed(reason)) => return Err(Ending::Closed(reason)),
                    _ => {}
                }
            }
            Either::First(Err(DriverError::Protocol(error))) => return Err(error.into()),
            Either::First(Err(_)) => return Err(Ending::Transport),
            Either::Second(()) if heard.elapsed() >= silence => return Err(Ending::Silence),
            Either::Second(()) => {}
        }
        let now = Instant::now();
        if now >= next_report {
            next_report = now + REPORT_EVERY;
            if client.is_ready(OWNER) {
                match client.send(OWNER, Rungs::NONE, false, TEXT, &thing.reading()) {
                    Ok(n) => defmt::info!("reported {=u32}", n),
                    // A reading that finds no room is not worth waiting for: the next one is newer.
                    Err(Error::Buffer(BufferError::TxFull) | Error::Misuse(ApiMisuse::NotConnected)) => {}
                    Err(error) => return Err(error.into()),
                }
            } else if now >= next_start {
                // Each start costs public-key operations on both sides. A chain that stood for a while starts anew.
                if now >= next_start + LONGEST_BACK_OFF {
                    start_back_off = SHORTEST_BACK_OFF;
                }
                client.start(OWNER);
                next_start = now + start_back_off;
                start_back_off = (start_back_off * 2).min(LONGEST_BACK_OFF);
            }
        }
    }
}

/// The silence that the server's settings allow.
fn allowed(settings: Settings) -> Duration {
    match settings.timeout {
        0 => HANDSHAKE_TIMEOUT,
        seconds => Duration::from_secs(seconds.into()),
    }
}
