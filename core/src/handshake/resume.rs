//! Resumption: the handshake of two nodes that kept a channel (PROTOCOL 4.10). A fresh X25519 agreement under the channel's
//! secret, two MACs, no RSA.
//!
//! ```text
//!     client                                              server
//!     -> ClientHello        …, offer: channel id, binder
//!     <- ServerHello        mode 1, version, suite, random, E_S
//!     <- {ServerAuth}       finished
//!     -> {ClientAuth}       capabilities, finished
//!     <- {Settings}         or {Refusal}
//! ```
//!
//! Both sides are here, since they are short and mirror each other. The server looks the channel up and checks its binder
//! before any curve operation; a channel that is unknown, expired or revoked and a binder that is wrong take one path, to
//! the full handshake on the same connection. Nothing changes for anybody before the client's Finished has verified.

use super::client::ExpectSettings;
use super::retry::Presented;
use super::server::{Answered, CheckWork, Greeting, SERVER_HELLO_LEN, SignServer, refusal};
use super::{CLIENT_CAPABILITIES, Ends, Finished, Schedule, Transcript, beginning};
use crate::config::Channel;
use crate::crypto::{Aead, HASH_LEN, Secret, equal, expand, hash, mac};
use crate::error::{BufferError, Error, Reason};
use crate::wire::{HEADER_LEN, ID_LEN, Mode, Offer, Reader, RecordType, Writer};

/// `binder = HMAC(E(CS, "ch binder", 32), H(T0 || ClientHello up to the binder))`.
pub(super) fn binder(channel: &Channel, bound: &[u8]) -> [u8; HASH_LEN] {
    offered(&channel.secret, &hash(&[&beginning(), bound]))
}

fn offered(secret: &Secret<HASH_LEN>, bound: &Transcript) -> [u8; HASH_LEN] {
    let key: Secret<HASH_LEN> = expand(secret, &[b"ossicle ch binder", &[0]]);
    mac(key.expose(), &[bound])
}

impl Channel {
    const fn ends(&self) -> Ends {
        let Self { client, client_key, key_epoch, server, server_key, .. } = self;
        let (client, client_key, key_epoch) = (*client, *client_key, *key_epoch);
        Ends { client, client_key, key_epoch, server: *server, server_key: *server_key }
    }
}

impl Ends {
    /// `T3 = H(T2 || server_id || H(SPKI_S) || client_id || H(SPKI_C) || key_epoch)`.
    fn identified(&self, t2: &Transcript) -> Transcript {
        hash(&[t2, &self.server, &self.server_key, &self.client, &self.client_key, &self.key_epoch.to_be_bytes()])
    }
}

/// `T4 = H(T3 || fin_S || caps)`.
fn server_finished(t3: &Transcript, finished: &[u8; HASH_LEN], caps: u16) -> Transcript {
    hash(&[t3, finished, &caps.to_be_bytes()])
}

/// `T6 = H(T4 || fin_C)`.
fn client_finished(t4: &Transcript, finished: &[u8; HASH_LEN]) -> Transcript {
    hash(&[t4, finished])
}

/// Client: the server says that it has the channel.
pub(crate) struct ExpectFinished {
    schedule: Schedule,
    t2: Transcript,
    ends: Ends,
    record_limit: u16,
}

impl ExpectFinished {
    pub(super) const fn new(schedule: Schedule, t2: Transcript, record_limit: u16, channel: &Channel) -> Self {
        Self { schedule, t2, ends: channel.ends(), record_limit }
    }

    /// <- {ServerAuth}, header included: it has
    pub(crate) fn handle<A: Aead>(&self, record: &mut [u8]) -> Result<SendFinished, Error> {
        let (mut opening, finished_key) = self.schedule.server::<A>(&self.t2, 0);
        let body = &*opening.open(record)?;
        let theirs: &[u8; HASH_LEN] = body.try_into().map_err(|_| Error::Decode)?;
        let t3 = self.ends.identified(&self.t2);
        if !equal(&mac(finished_key.expose(), &[&t3]), theirs) {
            return Err(Error::Crypto);
        }
        Ok(SendFinished {
            schedule: self.schedule.clone(),
            t2: self.t2,
            t4: server_finished(&t3, theirs, CLIENT_CAPABILITIES),
            ends: self.ends,
            record_limit: self.record_limit,
        })
    }
}

/// Client: the server has proved itself.
pub(crate) struct SendFinished {
    schedule: Schedule,
    t2: Transcript,
    t4: Transcript,
    ends: Ends,
    record_limit: u16,
}

impl SendFinished {
    /// -> {ClientAuth}
    pub(crate) fn auth<A: Aead>(&self, out: &mut [u8]) -> Result<(ExpectSettings<A>, usize), Error> {
        let (mut sealing, finished_key) = self.schedule.client::<A>(&self.t2);
        let finished = mac(finished_key.expose(), &[&self.t4]);
        let mut writer = Writer::new(out.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?);
        writer.u16(CLIENT_CAPABILITIES).bytes(&finished);
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let len = sealing.seal(RecordType::ClientAuth, out, len)?;
        let finished = self.schedule.finish(&client_finished(&self.t4, &finished), self.ends);
        Ok((ExpectSettings::new(finished, self.schedule.clone(), self.t2, self.record_limit), len))
    }
}

/// Server: a channel is being looked up.
pub(crate) struct CheckChannel {
    greeting: Greeting,
    /// What else the client has done, where the server is busy.
    presented: Option<Presented>,
    offer: Offer,
    /// What the binder covers.
    bound: Transcript,
}

/// What an offer led to.
pub(crate) enum Considered {
    /// It was taken: what was written, and what comes next.
    Resumed(ExpectClientFinished, usize),
    /// It was not.
    Full(SignServer),
    /// It was not, and the server is busy.
    Work(CheckWork),
}

impl CheckChannel {
    pub(super) fn new(greeting: Greeting, presented: Option<Presented>, offer: Offer, bound: &[u8]) -> Self {
        Self { greeting, presented, offer, bound: hash(&[&beginning(), bound]) }
    }

    /// The end of its binder.
    pub(crate) const fn name(&self) -> [u8; 8] {
        let [.., a, b, c, d, e, f, g, h] = self.offer.binder;
        [a, b, c, d, e, f, g, h]
    }

    pub(crate) const fn channel(&self) -> [u8; ID_LEN] {
        self.offer.channel
    }

    /// <- ServerHello, and <- {ServerAuth} if `held` is the channel that was offered and the client has its secret
    pub(crate) fn answer<A: Aead>(&self, held: Option<&Channel>, out: &mut [u8]) -> Result<Considered, Error> {
        // What is not there is checked all the same, so that nobody can time which channels there are.
        let nothing = Secret::new([0; HASH_LEN]);
        let secret = held.map_or(&nothing, |channel| &channel.secret);
        let is_bound = equal(&offered(secret, &self.bound), &self.offer.binder);
        let config = &self.greeting.config;
        let fits = |channel: &&Channel| {
            channel.id == self.offer.channel && channel.server == config.id && channel.server_key == config.fingerprint
        };
        match held.filter(fits) {
            Some(channel) if is_bound => self.resume::<A>(channel, out),
            _ => match self.presented {
                None => Ok(Considered::Full(self.greeting.full(Mode::Unauthorised)?)),
                Some(presented) => {
                    let (greeting, mode) = (self.greeting.clone(), Mode::Unauthorised);
                    Ok(Considered::Work(CheckWork { greeting, mode, presented }))
                }
            },
        }
    }

    fn resume<A: Aead>(&self, channel: &Channel, out: &mut [u8]) -> Result<Considered, Error> {
        let agree = |key: &_, peer: &_| Schedule::resumed(channel, key, peer);
        let Answered { schedule, hello, t2 } = self.greeting.answer(Mode::Resumed, agree)?;
        let ends = channel.ends();
        let t3 = ends.identified(&t2);
        let (mut sealing, finished_key) = schedule.server::<A>(&t2, 0);
        let finished = mac(finished_key.expose(), &[&t3]);
        let (head, rest) = out.split_at_mut_checked(SERVER_HELLO_LEN).ok_or(BufferError::TxFull)?;
        let mut writer = Writer::new(rest.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?);
        writer.bytes(&finished);
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let len = sealing.seal(RecordType::ServerAuth, rest, len)?;
        head.copy_from_slice(&hello);
        let record_limit = self.greeting.record_limit;
        Ok(Considered::Resumed(
            ExpectClientFinished { schedule, t2, t3, finished, ends, record_limit },
            SERVER_HELLO_LEN + len,
        ))
    }
}

/// Server: the client is to prove that it has the channel now, and not only once.
pub(crate) struct ExpectClientFinished {
    schedule: Schedule,
    t2: Transcript,
    t3: Transcript,
    finished: [u8; HASH_LEN],
    ends: Ends,
    record_limit: u16,
}

impl ExpectClientFinished {
    /// -> {ClientAuth}, header included
    pub(crate) fn handle<A: Aead>(&self, record: &mut [u8]) -> Result<Returned, Error> {
        let (mut opening, finished_key) = self.schedule.client::<A>(&self.t2);
        let mut reader = Reader::new(opening.open(record)?);
        let (caps, theirs) = (reader.u16()?, reader.array()?);
        reader.end()?;
        let t4 = server_finished(&self.t3, &self.finished, caps);
        if !equal(&mac(finished_key.expose(), &[&t4]), &theirs) {
            return Err(Error::Crypto);
        }
        Ok(Returned {
            schedule: self.schedule.clone(),
            t2: self.t2,
            t6: client_finished(&t4, &theirs),
            ends: self.ends,
            record_limit: self.record_limit,
        })
    }
}

/// Server: the client is who the channel says, and may be let in.
pub(crate) struct Returned {
    schedule: Schedule,
    t2: Transcript,
    t6: Transcript,
    ends: Ends,
    pub(crate) record_limit: u16,
}

impl Returned {
    pub(crate) fn finish<A: Aead>(&self) -> Finished<A> {
        self.schedule.finish(&self.t6, self.ends)
    }

    /// <- {Refusal}
    pub(crate) fn refuse<A: Aead>(&self, reason: Reason, retry_after: u32, out: &mut [u8]) -> Result<usize, Error> {
        refusal::<A>(&self.schedule, &self.t2, reason, retry_after, out)
    }
}
