//! What the tests share: two connections without any I/O between them, a generator that repeats itself, fixed keys, real
//! servers on port 0.
//!
//! Everything here is for tests only: the keys are public and the generator is seeded.

use ossicle::crypto::{IdentityKey, verify};
use ossicle_core::{
    Ask, Channel, ClientConfig, Connection, Credentials, Error, Event, PublicKey, Received, ServerConfig, Settings,
    Statement,
};

#[path = "support/campaign.rs"]
pub mod campaign;
#[path = "support/cli.rs"]
pub mod cli;
#[path = "support/faulty.rs"]
pub mod faulty;
#[path = "support/node.rs"]
pub mod node;
#[path = "support/power.rs"]
pub mod power;

#[path = "qemu.rs"]
pub mod qemu;
#[path = "support/raw.rs"]
pub mod raw;
#[path = "support/script.rs"]
pub mod script;
#[path = "support/terminal.rs"]
pub mod terminal;
#[path = "support/vectors/mod.rs"]
pub mod vectors;
#[path = "support/writer.rs"]
pub mod writer;

/// The fixed keys. Made once, public for ever: never enrol one of them anywhere.
pub mod keys {
    use ossicle::crypto::IdentityKey;

    macro_rules! key {
        ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {
            $($(#[$doc])* pub fn $name() -> IdentityKey {
                IdentityKey::from_pkcs8(include_bytes!(concat!("keys/", $file, ".der"))).expect("a fixed key is a key")
            })*
        };
    }

    key! {
        /// A client's key of 2048 bits.
        alice = "alice";
        /// Another client's key of 2048 bits.
        bob = "bob";
        /// A third client's key of 2048 bits.
        carol = "carol";
        /// A server's key of 2048 bits.
        server = "server";
        /// A server's key of 3072 bits.
        server3072 = "server3072";
        /// A server's key of 4096 bits.
        server4096 = "server4096";
    }
}

/// The id of the server in a [`Pair`].
pub const SERVER_ID: [u8; 16] = [0x5e; 16];
/// The id of the client in a [`Pair`].
pub const CLIENT_ID: [u8; 16] = [0xc1; 16];

/// The public half of a fixed key.
pub fn public(key: &IdentityKey) -> PublicKey<'_> {
    PublicKey::from_modulus(key.modulus()).expect("a fixed key is acceptable")
}

/// Bytes that are different for each number and the same in each run.
pub fn seed(number: u8) -> [u8; 64] {
    let mut seed = [number; 64];
    for (index, byte) in seed.iter_mut().enumerate() {
        *byte = byte.wrapping_mul(31).wrapping_add(index as u8);
    }
    seed
}

/// A generator that repeats itself: SHA-256 of a number and a counter, by way of HMAC's own construction in the core.
pub struct Rng {
    number: u8,
    counter: u32,
}

impl Rng {
    /// The generator of this number.
    pub const fn new(number: u8) -> Self {
        Self { number, counter: 0 }
    }
}

impl rand_core::TryRng for Rng {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Self::Error> {
        for chunk in target.chunks_mut(32) {
            let fresh = ossicle_core::generator_seed(&self.counter.to_be_bytes(), &[self.number]);
            chunk.copy_from_slice(&fresh.expose()[..chunk.len()]);
            self.counter += 1;
        }
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Rng {}

/// The device's image for the first board, built now if it is not there or older than its sources.
pub fn firmware_image() -> std::path::PathBuf {
    firmware_image_for(qemu::Board::default())
}

/// The device's image for this board, built now if it is not there or older than its sources.
pub fn firmware_image_for(board: qemu::Board) -> std::path::PathBuf {
    built("firmware-example", board.target())
}

/// The image of the sketch on embassy, for the second board, built now if it is not there or older than its sources.
pub fn embassy_image() -> std::path::PathBuf {
    built("firmware-embassy", qemu::Board::Mps2An386.target())
}

/// The image of the same name in a workspace of its own.
fn built(workspace: &str, target: &str) -> std::path::PathBuf {
    static BUILDING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(workspace);
    {
        // One at a time, with nothing to do for all but the first. A build that failed fails again for the next test.
        let _one = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // What cargo set for this test must not reach the other workspace: RUSTFLAGS would replace the target's.
        let status = std::process::Command::new("cargo")
            .args(["build", "--release", "--locked", "--quiet", "--target", target])
            .current_dir(&folder)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO_TARGET_DIR")
            .status()
            .expect("cargo starts");
        assert!(status.success(), "{workspace} does not build");
    }
    folder.join("target").join(target).join("release").join(workspace)
}

/// One side's bytes that the other has not seen yet.
#[derive(Default)]
pub struct Wire {
    /// What is under way.
    pub bytes: Vec<u8>,
    /// The length of each record that ever went this way.
    pub records: Vec<usize>,
}

impl Wire {
    fn push(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while rest.len() >= 8 {
            let len = usize::from(u16::from_be_bytes([rest[4], rest[5]]));
            self.records.push(len);
            rest = &rest[len.min(rest.len())..];
        }
        self.bytes.extend_from_slice(bytes);
    }
}

/// Two connections and the bytes between them, with no I/O at all.
pub struct Pair {
    /// The client's end.
    pub client: Connection,
    /// The server's end.
    pub server: Connection,
    /// The client's key.
    pub client_key: IdentityKey,
    /// The server's key.
    pub server_key: IdentityKey,
    /// Client to server.
    pub up: Wire,
    /// Server to client.
    pub down: Wire,
}

/// The settings that a [`Pair`]'s server sends.
pub fn settings() -> Settings {
    Settings { heartbeat: 15, timeout: 45, time: 1_790_000_000, valid_for: 604_800, ..Settings::default() }
}

impl Pair {
    /// A pair before its first byte, with the server's key known to the client.
    pub fn new() -> Self {
        Self::with_keys(keys::server(), keys::alice(), false)
    }

    /// A pair with these keys. `ask_for_key`: the client knows the fingerprint only.
    pub fn with_keys(server_key: IdentityKey, client_key: IdentityKey, ask_for_key: bool) -> Self {
        let fingerprint = public(&server_key).fingerprint();
        let client = ClientConfig { server: Some(fingerprint), ask_for_key, record_limit: 16_408 };
        let server = ServerConfig { id: SERVER_ID, fingerprint, record_limit: 16_408 };
        Self {
            client: Connection::client(client, &seed(1)),
            server: Connection::server(server, &seed(2)),
            client_key,
            server_key,
            up: Wire::default(),
            down: Wire::default(),
        }
    }

    /// The credentials of the enrolled client.
    pub fn credentials(&self) -> Credentials<'static> {
        Credentials::Key { id: CLIENT_ID, key_epoch: 0, fingerprint: public(&self.client_key).fingerprint() }
    }

    /// Runs the whole handshake with the method `key`.
    pub fn connect(&mut self) -> Settings {
        let credentials = self.credentials();
        self.connect_with(&credentials)
    }

    /// Runs the whole handshake with these credentials; the server accepts whatever verifies.
    pub fn connect_with(&mut self, credentials: &Credentials<'_>) -> Settings {
        self.client_hello();
        self.server_hello().expect("the hello is good");
        self.client_auth(credentials).expect("the server is the pinned one");
        self.server_accept().expect("the client holds its key");
        self.client_settings().expect("the settings open")
    }

    /// -> ClientHello
    pub fn client_hello(&mut self) {
        let mut out = [0; 2048];
        let len = self.client.transmit(&mut out).expect("there is room");
        self.up.push(&out[..len]);
    }

    /// <- ServerHello, {ServerAuth}
    pub fn server_hello(&mut self) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.up.bytes);
        self.server.receive(&mut bytes)?;
        let Some(Ask::Sign(statement)) = self.server.ask() else { panic!("the server must sign") };
        let signature = self.server_key.sign(&statement).expect("the key signs");
        let mut out = [0; 4096];
        let len = self.server.sign_server(public(&self.server_key), &signature, &mut out)?;
        self.down.push(&out[..len]);
        Ok(())
    }

    /// -> {ClientAuth}
    pub fn client_auth(&mut self, credentials: &Credentials<'_>) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.down.bytes);
        let Received::Record { used, .. } = self.client.receive(&mut bytes)? else { panic!("a whole ServerHello") };
        match self.client.receive(&mut bytes[used..])? {
            Received::Record { event: Event::CheckServer(claim), .. } => {
                assert!(verify(self.server_key.modulus(), &claim.statement, claim.signature), "the server's signature");
            }
            _ => panic!("a claim to verify"),
        }
        self.client.verified(credentials)?;
        let Some(Ask::Sign(statement)) = self.client.ask() else { panic!("the client must sign") };
        let signature = self.client_key.sign(&statement).expect("the key signs");
        let mut out = [0; 4096];
        let len = self.client.sign_client(credentials, &signature, &mut out)?;
        self.up.push(&out[..len]);
        Ok(())
    }

    /// <- {Settings}
    pub fn server_accept(&mut self) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.up.bytes);
        let event = self.server.receive(&mut bytes)?;
        let Received::Record { event: Event::CheckClient(claim), .. } = event else { panic!("a claim to check") };
        let statement: Statement = self.server.bind(&claim, &public(&self.client_key).fingerprint())?;
        assert!(verify(self.client_key.modulus(), &statement, claim.signature()), "the client's signature");
        let mut out = [0; 1024];
        let len = self.server.accept(&settings(), &mut out)?;
        self.down.push(&out[..len]);
        Ok(())
    }

    /// New connections at both ends; the client offers `channel`.
    pub fn reconnect(&mut self, channel: Channel, seeds: (u8, u8)) {
        let fingerprint = public(&self.server_key).fingerprint();
        let client = ClientConfig { server: Some(fingerprint), ask_for_key: false, record_limit: 16_408 };
        let server = ServerConfig { id: SERVER_ID, fingerprint, record_limit: 16_408 };
        self.client = Connection::resume(client, channel, &seed(seeds.0)).expect("the channel is that server's");
        self.server = Connection::server(server, &seed(seeds.1));
        (self.up, self.down) = (Wire::default(), Wire::default());
    }

    /// -> ClientHello, to the server's question for the channel; `held` answers it. True if it was resumed, and the answer
    /// is under way.
    pub fn offer(&mut self, held: impl FnOnce([u8; 16]) -> Option<Channel>) -> Result<bool, Error> {
        self.client_hello();
        let mut bytes = core::mem::take(&mut self.up.bytes);
        let Received::Record { event: Event::CheckChannel(id), .. } = self.server.receive(&mut bytes)? else {
            panic!("an offer to answer")
        };
        let mut out = [0; 1024];
        let len = self.server.answer_offer(held(id).as_ref(), &mut out)?;
        self.down.push(&out[..len]);
        Ok(len > 0)
    }

    /// <- ServerHello, {ServerAuth}; -> {ClientAuth}; both of a resumption.
    pub fn client_resumes(&mut self) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.down.bytes);
        let Received::Record { used, .. } = self.client.receive(&mut bytes)? else { panic!("a whole ServerHello") };
        let received = self.client.receive(&mut bytes[used..])?;
        assert!(matches!(received, Received::Record { event: Event::Progress, .. }), "nobody is asked for anything");
        assert_eq!(self.client.ask(), None);
        let mut out = [0; 256];
        let len = self.client.transmit(&mut out)?;
        self.up.push(&out[..len]);
        Ok(())
    }

    /// The server takes the client's Finished, and lets it in.
    pub fn server_resumes(&mut self, settings: &Settings) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.up.bytes);
        let Received::Record { event: Event::Resumed, .. } = self.server.receive(&mut bytes)? else {
            panic!("a resumption")
        };
        let mut out = [0; 256];
        let len = self.server.accept(settings, &mut out)?;
        self.down.push(&out[..len]);
        Ok(())
    }

    /// The client's last step.
    pub fn client_settings(&mut self) -> Result<Settings, Error> {
        let mut bytes = core::mem::take(&mut self.down.bytes);
        match self.client.receive(&mut bytes)? {
            Received::Record { event: Event::Connected(settings), .. } => Ok(settings),
            _ => panic!("settings"),
        }
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}
