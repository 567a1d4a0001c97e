//! The server's side of HS1. It signs once for whoever knocks, changes nothing before the client's Finished has
//! verified, and gives one sealed answer to every client that may not enter.

use super::client::{REFUSAL_LEN, write_clear};
use super::resume::CheckChannel;
use super::retry::Presented;
use super::{
    Ends, Finished, Schedule, Transcript, beginning, client_finished, client_identified, client_signed,
    client_statement, ephemeral, login_identified, server_identified, server_statement, token_proof,
};
use crate::config::ServerConfig;
use crate::crypto::{Aead, ExchangeKey, HASH_LEN, PublicKey, Secret, Statement, equal, hash, mac};
use crate::error::{ApiMisuse, BufferError, Error, PeerError, Reason};
use crate::wire::{
    Claimed, ClientAuth, ClientHello, HEADER_LEN, HelloRetry, ID_LEN, Login, MIN_RECORD_LIMIT, Method, Mode, Password,
    RecordType, Role, ServerHello, Writer,
};

pub(super) const SERVER_HELLO_LEN: usize = HEADER_LEN + 71;

/// What a client claims. Decodes from bytes, so that it can outlive the record it came in: nothing of it is kept in the
/// connection.
#[derive(Clone, Copy)]
pub struct ClientClaim<'d> {
    bytes: &'d [u8],
    auth: ClientAuth<'d>,
    caps: u16,
}

/// How a client wants to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClaimKind<'d> {
    /// As an enrolled identity: look up its key.
    Key {
        /// The key epoch that the client believes in.
        key_epoch: u32,
    },
    /// As a new identity.
    Enroll {
        /// The display name that it wants; any UTF-8 of 1 to 64 bytes.
        name: &'d str,
        /// Its key.
        key: PublicKey<'d>,
        /// The token that admits it, if it has one.
        token: Option<[u8; 8]>,
    },
    /// As the holder of an account, with a new key.
    Password {
        /// The account's name; any UTF-8 of 1 to 64 bytes.
        name: &'d str,
        /// The new key.
        key: PublicKey<'d>,
        /// What the holder knows.
        password: Password<'d>,
    },
}

impl<'d> ClientClaim<'d> {
    /// Reads a claim again from its [`bytes`](Self::bytes).
    ///
    /// # Errors
    /// [`Error::Decode`] if they are not those of a claim.
    pub fn decode(bytes: &'d [u8]) -> Result<Self, Error> {
        let (auth, caps) = ClientAuth::decode(bytes)?;
        Ok(Self { bytes, auth, caps })
    }

    /// The claim as it came, to be kept while its key is looked up.
    pub const fn bytes(&self) -> &'d [u8] {
        self.bytes
    }

    /// The id that is claimed.
    pub const fn id(&self) -> [u8; ID_LEN] {
        match self.auth.claimed {
            Claimed::Method(Method::Key { id, .. } | Method::Enroll { id, .. }) | Claimed::Login(Login { id, .. }) => {
                id
            }
        }
    }

    /// How the client wants to enter.
    pub fn kind(&self) -> ClaimKind<'d> {
        match self.auth.claimed {
            Claimed::Method(Method::Key { key_epoch, .. }) => ClaimKind::Key { key_epoch },
            Claimed::Method(Method::Enroll { name, key, token, .. }) => {
                ClaimKind::Enroll { name, key, token: (token != [0; 8]).then_some(token) }
            }
            Claimed::Login(Login { name, key, password, .. }) => ClaimKind::Password { name, key, password },
        }
    }

    /// The client's signature over the statement that binding the claim returns.
    pub const fn signature(&self) -> &'d [u8] {
        self.auth.signature
    }
}

pub(crate) struct ExpectClientHello {
    config: ServerConfig,
    seed: Secret<64>,
    /// Whoever brings no channel has to show work.
    pub(crate) busy: bool,
}

impl ExpectClientHello {
    pub(crate) fn new(config: ServerConfig, seed: &[u8; 64]) -> Self {
        Self { config, seed: Secret::new(*seed), busy: false }
    }

    /// -> ClientHello, header included
    pub(crate) fn handle(&self, record: &[u8]) -> Result<Greeted, Error> {
        let body = record.get(HEADER_LEN..).unwrap_or_default();
        let hello = ClientHello::decode(body)?.ok_or(PeerError::Version)?;
        if hello.role != Role::Client {
            return Err(PeerError::Version.into());
        }
        if usize::from(hello.record_limit) < MIN_RECORD_LIMIT {
            return Err(Error::Decode);
        }
        let greeting = Greeting {
            config: self.config,
            seed: self.seed.clone(),
            record_limit: hello.record_limit,
            send_key: hello.ask_for_key,
            exchange: hello.exchange,
            t1: hash(&[&beginning(), record]),
        };
        let presented = self.busy.then(|| Presented::new(hello.work, &hello.random, &hello.exchange));
        match hello.offer {
            None => match presented {
                None => Ok(Greeted::Sign(greeting.full(Mode::Full)?)),
                Some(presented) => Ok(Greeted::Work(CheckWork { greeting, mode: Mode::Full, presented })),
            },
            Some(offer) => {
                let bound = record.len().checked_sub(HASH_LEN).and_then(|end| record.get(..end));
                Ok(Greeted::Check(CheckChannel::new(greeting, presented, offer, bound.unwrap_or_default())))
            }
        }
    }
}

/// What a hello led to.
pub(crate) enum Greeted {
    /// Nothing was offered.
    Sign(SignServer),
    /// A channel was.
    Check(CheckChannel),
    /// Nothing was, and the server is busy.
    Work(CheckWork),
}

/// Whether the work that a hello shows is enough is being judged. Nothing was computed for it yet.
pub(crate) struct CheckWork {
    pub(super) greeting: Greeting,
    pub(super) mode: Mode,
    pub(super) presented: Presented,
}

impl CheckWork {
    pub(crate) const fn presented(&self) -> &Presented {
        &self.presented
    }

    /// It is: the full handshake goes on.
    pub(crate) fn admit(&self) -> Result<SignServer, Error> {
        self.greeting.full(self.mode)
    }
}

/// <- HelloRetry
pub(crate) fn retry(bits: u8, cookie: &[u8], out: &mut [u8]) -> Result<usize, Error> {
    let asked = HelloRetry { bits, cookie };
    write_clear(RecordType::HelloRetry, out, |writer| asked.encode(writer))
}

/// What of a ClientHello is needed to answer it.
#[derive(Clone)]
pub(super) struct Greeting {
    pub(super) config: ServerConfig,
    seed: Secret<64>,
    pub(super) record_limit: u16,
    send_key: bool,
    exchange: [u8; HASH_LEN],
    t1: Transcript,
}

/// A ServerHello and what comes of it.
pub(super) struct Answered {
    pub(super) schedule: Schedule,
    pub(super) hello: [u8; SERVER_HELLO_LEN],
    pub(super) t2: Transcript,
}

impl Greeting {
    /// The ServerHello of this mode, and the schedule of `ES` that `agree` makes of our ephemeral key and the client's.
    pub(super) fn answer(
        &self,
        mode: Mode,
        agree: impl FnOnce(&ExchangeKey, &[u8; HASH_LEN]) -> Result<Schedule, Error>,
    ) -> Result<Answered, Error> {
        let (key, random) = ephemeral(&self.seed);
        let schedule = agree(&key, &self.exchange)?;
        let answer = ServerHello { mode, record_limit: self.config.record_limit, random, exchange: *key.public() };
        let mut hello = [0; SERVER_HELLO_LEN];
        write_clear(RecordType::ServerHello, &mut hello, |writer| answer.encode(writer))?;
        let t2 = hash(&[&self.t1, &hello]);
        Ok(Answered { schedule, hello, t2 })
    }

    /// The full handshake goes on.
    pub(super) fn full(&self, mode: Mode) -> Result<SignServer, Error> {
        let Answered { schedule, hello, t2 } = self.answer(mode, Schedule::full)?;
        let t3 = server_identified(&t2, &self.config.id, &self.config.fingerprint);
        let (config, record_limit, send_key) = (self.config, self.record_limit, self.send_key);
        Ok(SignServer { schedule, hello, send_key, config, record_limit, t2, t3 })
    }
}

/// The server's signature is being made.
pub(crate) struct SignServer {
    schedule: Schedule,
    hello: [u8; SERVER_HELLO_LEN],
    send_key: bool,
    config: ServerConfig,
    record_limit: u16,
    t2: Transcript,
    t3: Transcript,
}

impl SignServer {
    pub(crate) const fn statement(&self) -> Statement {
        server_statement(self.t3)
    }

    /// <- ServerHello, <- {ServerAuth}
    pub(crate) fn auth<A: Aead>(
        &self,
        key: PublicKey<'_>,
        signature: &[u8],
        out: &mut [u8],
    ) -> Result<(ExpectClientAuth, usize), Error> {
        let (mut sealing, finished_key) = self.schedule.server::<A>(&self.t2, 0);
        let finished = mac(finished_key.expose(), &[&hash(&[&self.t3, signature])]);
        let (head, rest) = out.split_at_mut_checked(SERVER_HELLO_LEN).ok_or(BufferError::TxFull)?;
        let mut writer = Writer::new(rest.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?);
        writer.bytes(&self.config.id);
        if self.send_key {
            writer.bytes(key.spki(&mut [0; crate::crypto::MAX_SPKI_LEN]));
        }
        writer.bytes(signature).bytes(&finished);
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let len = sealing.seal(RecordType::ServerAuth, rest, len)?;
        head.copy_from_slice(&self.hello);
        let t4 = hash(&[&self.t3, signature, &finished]);
        let next = ExpectClientAuth {
            schedule: self.schedule.clone(),
            config: self.config,
            t2: self.t2,
            t4,
            record_limit: self.record_limit,
        };
        Ok((next, SERVER_HELLO_LEN + len))
    }
}

pub(crate) struct ExpectClientAuth {
    schedule: Schedule,
    config: ServerConfig,
    t2: Transcript,
    t4: Transcript,
    record_limit: u16,
}

impl ExpectClientAuth {
    /// -> {ClientAuth}, header included; its claim is to be checked
    pub(crate) fn handle<'d, A: Aead>(&self, record: &'d mut [u8]) -> Result<(CheckClient, ClientClaim<'d>), Error> {
        let (mut opening, finished_key) = self.schedule.client::<A>(&self.t2);
        let body = &*opening.open(record)?;
        let claim = ClientClaim::decode(body)?;
        let next = CheckClient {
            schedule: self.schedule.clone(),
            config: self.config,
            finished_key,
            t2: self.t2,
            t4: self.t4,
            record_limit: self.record_limit,
            bound: None,
        };
        // A claim that holds its own key shows at once whether its Finished is right. The others show it when their key
        // was looked up, and a wrong one must then look like an unknown id.
        if let Claimed::Method(Method::Enroll { .. }) | Claimed::Login(_) = claim.auth.claimed {
            let (_, _, right) = next.transcripts(&claim, &[0; HASH_LEN]);
            if !right {
                return Err(Error::Crypto);
            }
        }
        Ok((next, claim))
    }
}

/// The client's claim is being checked.
pub(crate) struct CheckClient {
    schedule: Schedule,
    config: ServerConfig,
    finished_key: Secret<HASH_LEN>,
    t2: Transcript,
    t4: Transcript,
    pub(crate) record_limit: u16,
    /// `T5`, `T6` and who the client is, once the Finished was found right.
    bound: Option<(Transcript, Transcript, Ends)>,
}

impl CheckClient {
    /// `T5`, `T6`, and whether the claim's Finished is that of this key. The time does not depend on whether it is.
    fn transcripts(&self, claim: &ClientClaim<'_>, fingerprint: &[u8; HASH_LEN]) -> (Transcript, Transcript, bool) {
        let ClientAuth { signature, finished: claimed, .. } = &claim.auth;
        let (t5, signed, t6) = match &claim.auth.claimed {
            Claimed::Method(method) => {
                let t5 = client_identified(&self.t4, method, fingerprint, claim.caps);
                (t5, client_signed(&t5, method, signature), client_finished(&t5, method, signature, claimed))
            }
            Claimed::Login(login) => {
                let t5 = login_identified(&self.t4, login, claim.caps);
                (t5, hash(&[&t5, signature]), hash(&[&t5, signature, claimed]))
            }
        };
        let finished = mac(self.finished_key.expose(), &[&signed]);
        (t5, t6, equal(&finished, claimed))
    }

    /// Binds the claim to the key with this fingerprint: from here on its signature decides.
    pub(crate) fn bind(&mut self, claim: &ClientClaim<'_>, fingerprint: &[u8; HASH_LEN]) -> Result<Statement, Error> {
        let (t5, t6, right) = self.transcripts(claim, fingerprint);
        let statement = client_statement(t5);
        let key_epoch = match claim.auth.claimed {
            Claimed::Method(Method::Key { key_epoch, .. }) => key_epoch,
            // What it is after a login only the store knows: such a connection issues no channel.
            Claimed::Method(Method::Enroll { .. }) | Claimed::Login(_) => 0,
        };
        let ends = Ends {
            client: claim.id(),
            client_key: *fingerprint,
            key_epoch,
            server: self.config.id,
            server_key: self.config.fingerprint,
        };
        if !right {
            return Err(Error::Crypto);
        }
        self.bound = Some((t5, t6, ends));
        Ok(statement)
    }

    /// Whether the claim proves the token with this verifier.
    pub(crate) fn proves(&self, claim: &ClientClaim<'_>, verifier: &[u8; HASH_LEN]) -> bool {
        match (&claim.auth.claimed, &self.bound) {
            (Claimed::Method(Method::Enroll { proof, .. }), Some((t5, ..))) => equal(&token_proof(verifier, t5), proof),
            _ => false,
        }
    }

    /// The claim holds: what comes of it.
    pub(crate) fn finish<A: Aead>(&self) -> Result<Finished<A>, Error> {
        match &self.bound {
            Some((_, t6, ends)) => Ok(self.schedule.finish(t6, *ends)),
            None => Err(ApiMisuse::NotAsked.into()),
        }
    }

    /// <- {Refusal}
    pub(crate) fn refuse<A: Aead>(&self, reason: Reason, retry_after: u32, out: &mut [u8]) -> Result<usize, Error> {
        refusal::<A>(&self.schedule, &self.t2, reason, retry_after, out)
    }
}

/// <- {Refusal}
pub(super) fn refusal<A: Aead>(
    schedule: &Schedule,
    t2: &Transcript,
    reason: Reason,
    retry_after: u32,
    out: &mut [u8],
) -> Result<usize, Error> {
    let (mut sealing, _) = schedule.server::<A>(t2, 1);
    let mut writer = Writer::new(out.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?);
    writer.u8(reason.code()).u32(retry_after);
    let len = writer.finish().ok_or(BufferError::TxFull)?;
    debug_assert_eq!(len, REFUSAL_LEN);
    sealing.seal(RecordType::Refusal, out, len)
}
