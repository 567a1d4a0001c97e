//! The client's side of HS1. It reveals nothing of itself before the server has proved who it is.

use super::resume::{ExpectFinished, binder};
use super::retry::{Puzzle, Working};
use super::{
    CLIENT_CAPABILITIES, Ends, Finished, Schedule, Transcript, beginning, client_finished, client_identified,
    client_signed, client_statement, ephemeral, login_identified, server_identified, server_statement, token_proof,
    token_verifier,
};
use crate::config::{Channel, ClientConfig, Credentials};
use crate::crypto::{Aead, ExchangeKey, HASH_LEN, PublicKey, Secret, Statement, equal, hash, mac};
use crate::error::{ApiMisuse, BufferError, Error, PeerError, Reason};
use crate::wire::{
    ClientHello, HEADER_LEN, Header, HelloRetry, ID_LEN, KIND_ENROLL, KIND_KEY, KIND_PASSWORD, Login, MAX_NAME_LEN,
    MAX_PASSWORD_LEN, MIN_RECORD_LIMIT, Method, Mode, Offer, RECORD_OVERHEAD, RecordType, Role, ServerAuth,
    ServerHello, Writer,
};

/// What the server claims; verify `statement` and `signature` with the key of `fingerprint`.
#[derive(Clone, Copy)]
pub struct ServerClaim<'d> {
    /// The server's id, as it says and signs.
    pub server: [u8; ID_LEN],
    /// The fingerprint of the key that must verify: the pinned one, or that of `key` where none was pinned.
    pub fingerprint: [u8; HASH_LEN],
    /// The key, if it was asked for. It has the fingerprint.
    pub key: Option<PublicKey<'d>>,
    /// What the server signed.
    pub statement: Statement,
    /// Its signature.
    pub signature: &'d [u8],
}

/// Nothing was sent yet.
pub(crate) struct Start {
    config: ClientConfig,
    seed: Secret<64>,
    /// What is to be resumed.
    channel: Option<Channel>,
    /// What a server under load has asked for before.
    working: Option<Working>,
}

impl Start {
    pub(crate) const fn new(config: ClientConfig, channel: Option<Channel>, seed: &[u8; 64]) -> Self {
        Self { config, seed: Secret::new(*seed), channel, working: None }
    }

    pub(crate) fn present(&mut self, puzzle: &Puzzle) {
        self.working = Some(Working::new(puzzle, &self.seed));
    }

    /// Goes on with the puzzle, if there is one. Whether the hello can be said.
    pub(crate) fn solve(&mut self) -> bool {
        self.working.as_mut().is_none_or(Working::go_on)
    }

    /// -> ClientHello
    pub(crate) fn hello(&self, out: &mut [u8]) -> Result<(ExpectServerHello, usize), Error> {
        // Neither a fingerprint nor a key: nobody could be verified.
        if self.config.server.is_none() && !self.config.ask_for_key {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        // No server takes it.
        if usize::from(self.config.record_limit) < MIN_RECORD_LIMIT {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let (key, random) = ephemeral(&self.seed);
        let hello = ClientHello {
            record_limit: self.config.record_limit,
            role: Role::Client,
            ask_for_key: self.config.ask_for_key,
            random,
            exchange: *key.public(),
            work: self.working.as_ref().map(Working::work),
            offer: self.channel.as_ref().map(|channel| Offer { channel: channel.id, binder: [0; HASH_LEN] }),
        };
        let len = write_clear(RecordType::ClientHello, out, |writer| hello.encode(writer))?;
        let record = out.get_mut(..len).unwrap_or_default();
        if let Some(channel) = &self.channel
            && let Some((bound, place)) = record.split_last_chunk_mut::<HASH_LEN>()
        {
            *place = binder(channel, bound);
        }
        let t1 = hash(&[&beginning(), record]);
        let (channel, worked) = (self.channel.clone(), self.working.is_some());
        Ok((ExpectServerHello { config: self.config, key, t1, channel, worked }, len))
    }
}

/// Writes a record without keys: its counter is 0.
pub(super) fn write_clear(
    kind: RecordType,
    out: &mut [u8],
    body: impl FnOnce(&mut Writer<'_>),
) -> Result<usize, Error> {
    let (head, rest) = out.split_first_chunk_mut::<HEADER_LEN>().ok_or(BufferError::TxFull)?;
    let mut writer = Writer::new(rest);
    body(&mut writer);
    let len = writer.finish().ok_or(BufferError::TxFull)?.saturating_add(HEADER_LEN);
    let wire_len = u16::try_from(len).map_err(|_| BufferError::TxFull)?;
    *head = Header { kind, len: wire_len, sequence: 0 }.encode();
    Ok(len)
}

pub(crate) struct ExpectServerHello {
    config: ClientConfig,
    key: ExchangeKey,
    t1: Transcript,
    channel: Option<Channel>,
    /// The hello has the solution of a puzzle.
    worked: bool,
}

/// How a server goes on.
pub(crate) enum Chosen {
    /// It will sign.
    Full(ExpectServerAuth),
    /// It has the channel, or says so.
    Resumed(ExpectFinished),
}

impl ExpectServerHello {
    /// <- HelloRetry, header included: what is to be done before the next connection
    #[inline(never)]
    pub(crate) fn retried(&self, record: &[u8]) -> Result<Puzzle, Error> {
        let asked = HelloRetry::decode(record.get(HEADER_LEN..).unwrap_or_default())?;
        // Whoever asks again is not to be satisfied.
        if self.worked {
            return Err(PeerError::Busy.into());
        }
        Puzzle::new(&asked)
    }

    /// <- ServerHello, header included
    pub(crate) fn handle(&self, record: &[u8]) -> Result<Chosen, Error> {
        let body = record.get(HEADER_LEN..).unwrap_or_default();
        let hello = ServerHello::decode(body)?.ok_or(PeerError::Version)?;
        if usize::from(hello.record_limit) < MIN_RECORD_LIMIT {
            return Err(Error::Decode);
        }
        let (record_limit, t2) = (hello.record_limit, hash(&[&self.t1, record]));
        match (hello.mode, &self.channel) {
            (Mode::Full, None) | (Mode::Unauthorised, Some(_)) => {
                let schedule = Schedule::full(&self.key, &hello.exchange)?;
                Ok(Chosen::Full(ExpectServerAuth { config: self.config, schedule, t2, record_limit }))
            }
            (Mode::Resumed, Some(channel)) => {
                let schedule = Schedule::resumed(channel, &self.key, &hello.exchange)?;
                Ok(Chosen::Resumed(ExpectFinished::new(schedule, t2, record_limit, channel)))
            }
            // An offer must be answered, and what was not offered cannot be.
            _ => Err(PeerError::Version.into()),
        }
    }
}

pub(crate) struct ExpectServerAuth {
    config: ClientConfig,
    schedule: Schedule,
    t2: Transcript,
    record_limit: u16,
}

impl ExpectServerAuth {
    /// <- {ServerAuth}, header included; its claim is to be verified
    pub(crate) fn handle<'d, A: Aead>(&self, record: &'d mut [u8]) -> Result<(VerifyServer, ServerClaim<'d>), Error> {
        let (mut opening, finished_key) = self.schedule.server::<A>(&self.t2, 0);
        let body = opening.open(record)?;
        let auth = ServerAuth::decode(body, self.config.ask_for_key)?;
        let sent = auth.key.map(|key| key.fingerprint());
        let fingerprint = match (self.config.server, sent) {
            (Some(pinned), Some(sent)) if pinned != sent => return Err(PeerError::ServerKey.into()),
            (Some(pinned), _) => pinned,
            (None, Some(sent)) => sent,
            (None, None) => return Err(ApiMisuse::InvalidArgument.into()),
        };
        let t3 = server_identified(&self.t2, &auth.server, &fingerprint);
        let finished = mac(finished_key.expose(), &[&hash(&[&t3, auth.signature])]);
        // The record opened, so whoever sent it holds the keys: it is another server than the one we expect.
        if !equal(&finished, &auth.finished) {
            return Err(PeerError::ServerKey.into());
        }
        let t4 = hash(&[&t3, auth.signature, &auth.finished]);
        let claim = ServerClaim {
            server: auth.server,
            fingerprint,
            key: auth.key,
            statement: server_statement(t3),
            signature: auth.signature,
        };
        let next = VerifyServer {
            schedule: self.schedule.clone(),
            t2: self.t2,
            t4,
            record_limit: self.record_limit,
            server: (auth.server, fingerprint),
            pinned: self.config.server.is_some(),
        };
        Ok((next, claim))
    }
}

/// The server's signature is being verified.
pub(crate) struct VerifyServer {
    schedule: Schedule,
    t2: Transcript,
    t4: Transcript,
    record_limit: u16,
    /// Id and fingerprint.
    server: ([u8; ID_LEN], [u8; HASH_LEN]),
    /// Whether the fingerprint was known beforehand.
    pinned: bool,
}

impl VerifyServer {
    /// The signature was right: now the client may reveal itself.
    pub(crate) fn verified(&self, credentials: &Credentials<'_>) -> SignClient {
        let t5 = identify(&self.t4, credentials).1;
        SignClient {
            schedule: self.schedule.clone(),
            t2: self.t2,
            t4: self.t4,
            t5,
            record_limit: self.record_limit,
            ends: ends(credentials, self.server),
        }
    }

    /// The same for a login. Whoever knows the password is that person to the server, so nobody gets it who was not expected.
    pub(crate) fn verified_for_login(&self, login: &Login<'_>) -> Result<SignClient, Error> {
        if !self.pinned || login.name.is_empty() || login.name.len() > MAX_NAME_LEN {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let (server, server_key) = self.server;
        Ok(SignClient {
            schedule: self.schedule.clone(),
            t2: self.t2,
            t4: self.t4,
            t5: login_identified(&self.t4, login, CLIENT_CAPABILITIES),
            record_limit: self.record_limit,
            ends: Ends { client: login.id, client_key: login.key.fingerprint(), key_epoch: 0, server, server_key },
        })
    }
}

fn ends(credentials: &Credentials<'_>, (server, server_key): ([u8; ID_LEN], [u8; HASH_LEN])) -> Ends {
    let (client, client_key, key_epoch) = match credentials {
        Credentials::Key { id, key_epoch, fingerprint } => (*id, *fingerprint, *key_epoch),
        Credentials::Enroll { id, key, .. } => (*id, key.fingerprint(), 0),
    };
    Ends { client, client_key, key_epoch, server, server_key }
}

fn identify<'c>(t4: &Transcript, credentials: &Credentials<'c>) -> (Method<'c>, Transcript) {
    let (mut method, fingerprint) = match credentials {
        Credentials::Key { id, key_epoch, fingerprint } => {
            (Method::Key { id: *id, key_epoch: *key_epoch }, *fingerprint)
        }
        Credentials::Enroll { id, name, key, token } => {
            let token = token.map_or([0; 8], |token| token.id);
            (Method::Enroll { id: *id, name, key: *key, token, proof: [0; HASH_LEN] }, [0; HASH_LEN])
        }
    };
    let t5 = client_identified(t4, &method, &fingerprint, CLIENT_CAPABILITIES);
    if let (Method::Enroll { proof, .. }, Credentials::Enroll { token: Some(token), .. }) = (&mut method, credentials) {
        *proof = token_proof(token_verifier(&token.secret).expose(), &t5);
    }
    (method, t5)
}

/// The client's signature is being made.
pub(crate) struct SignClient {
    schedule: Schedule,
    t2: Transcript,
    t4: Transcript,
    t5: Transcript,
    record_limit: u16,
    ends: Ends,
}

impl SignClient {
    pub(crate) const fn statement(&self) -> Statement {
        client_statement(self.t5)
    }

    /// -> {ClientAuth}
    pub(crate) fn auth<A: Aead>(
        &self,
        credentials: &Credentials<'_>,
        signature: &[u8],
        out: &mut [u8],
    ) -> Result<(ExpectSettings<A>, usize), Error> {
        let (method, t5) = identify(&self.t4, credentials);
        if t5 != self.t5 {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let (mut sealing, finished_key) = self.schedule.client::<A>(&self.t2);
        let finished = mac(finished_key.expose(), &[&client_signed(&t5, &method, signature)]);
        let rest = out.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?;
        let mut writer = Writer::new(rest);
        match &method {
            Method::Key { id, key_epoch } => {
                writer.u8(KIND_KEY).bytes(id).u32(*key_epoch).u16(CLIENT_CAPABILITIES);
            }
            Method::Enroll { id, name, key, token, proof } => {
                let mut buffer = [0; crate::crypto::MAX_SPKI_LEN];
                writer.u8(KIND_ENROLL).bytes(id).short(name.as_bytes()).bytes(key.spki(&mut buffer));
                writer.bytes(token).u16(CLIENT_CAPABILITIES).bytes(proof);
            }
        }
        writer.bytes(signature).bytes(&finished);
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let len = sealing.seal(RecordType::ClientAuth, out, len)?;
        let t6 = client_finished(&t5, &method, signature, &finished);
        let finished = self.schedule.finish(&t6, self.ends);
        Ok((ExpectSettings::new(finished, self.schedule.clone(), self.t2, self.record_limit), len))
    }

    /// -> {ClientAuth}, of a login
    pub(crate) fn log_in<A: Aead>(
        &self,
        login: &Login<'_>,
        signature: &[u8],
        out: &mut [u8],
    ) -> Result<(ExpectSettings<A>, usize), Error> {
        if login_identified(&self.t4, login, CLIENT_CAPABILITIES) != self.t5 {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let mut buffer = [0; crate::crypto::MAX_SPKI_LEN];
        let spki = login.key.spki(&mut buffer);
        let (password_len, password, padding) = login.password.padded();
        // Half a record would leave the password where nobody erases it.
        let fixed = RECORD_OVERHEAD + 1 + ID_LEN + 1 + 2 + 1 + MAX_PASSWORD_LEN + HASH_LEN;
        let parts = [login.name.len(), spki.len(), signature.len()];
        if out.len() < parts.into_iter().fold(fixed, usize::saturating_add) {
            return Err(BufferError::TxFull.into());
        }
        let (mut sealing, finished_key) = self.schedule.client::<A>(&self.t2);
        let finished = mac(finished_key.expose(), &[&hash(&[&self.t5, signature])]);
        let mut writer = Writer::new(out.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?);
        writer.u8(KIND_PASSWORD).bytes(&login.id).short(login.name.as_bytes());
        writer.bytes(spki).u16(CLIENT_CAPABILITIES);
        writer.u8(password_len).bytes(password).bytes(padding);
        writer.bytes(signature).bytes(&finished);
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let len = sealing.seal(RecordType::ClientAuth, out, len)?;
        let t6 = hash(&[&self.t5, signature, &finished]);
        let finished = self.schedule.finish(&t6, self.ends);
        Ok((ExpectSettings::new(finished, self.schedule.clone(), self.t2, self.record_limit), len))
    }
}

pub(crate) struct ExpectSettings<A> {
    pub(crate) finished: Finished<A>,
    /// What the key of a refusal is made from, should one come.
    schedule: Schedule,
    t2: Transcript,
    pub(crate) record_limit: u16,
}

impl<A: Aead> ExpectSettings<A> {
    pub(super) const fn new(finished: Finished<A>, schedule: Schedule, t2: Transcript, record_limit: u16) -> Self {
        Self { finished, schedule, t2, record_limit }
    }

    /// <- {Refusal}, header included: why this client may not enter
    pub(crate) fn refused(&self, record: &mut [u8]) -> Error {
        let (mut opening, _) = self.schedule.server::<A>(&self.t2, 1);
        let body = match opening.open(record) {
            Ok(body) => body,
            Err(error) => return error,
        };
        match body.split_first_chunk::<REFUSAL_LEN>() {
            Some(([reason, after @ ..], [])) => match Reason::from_code(*reason) {
                Some(reason) => PeerError::Refused { reason, retry_after: u32::from_be_bytes(*after) }.into(),
                None => Error::Decode,
            },
            _ => Error::Decode,
        }
    }
}

/// Bytes inside a Refusal: `reason u8 | retry_after u32`, the latter in milliseconds.
pub(super) const REFUSAL_LEN: usize = 5;
/// Bytes of a whole Refusal record.
pub(crate) const REFUSAL_RECORD_LEN: usize = REFUSAL_LEN + RECORD_OVERHEAD;
