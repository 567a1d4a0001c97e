//! THE state machine: bytes in, events out, no buffer of its own.
//!
//! A [`Connection`] owns no socket, clock, executor, generator or allocator. [`receive`](Connection::receive) opens a
//! record where it lies and lends it back as an event; [`send`](Connection::send) appends one sealed record to what the
//! caller will write; what takes long or needs a database is asked for and answered later. A failure is final and
//! silent on the wire. Records come from `record`, their order from `handshake`; nothing above is known here.

use crate::config::{Channel, ClientConfig, Credentials, ServerConfig};
use crate::crypto::{Aead, HASH_LEN, PublicKey, RustCrypto, Secret, Statement, TAG_LEN};
use crate::error::{ApiMisuse, BufferError, Error, PeerError, Reason};
use crate::handshake::Finished;
use crate::handshake::client::{Chosen, ExpectServerAuth, ExpectServerHello, ExpectSettings, REFUSAL_RECORD_LEN};
use crate::handshake::client::{ServerClaim, SignClient, Start, VerifyServer};
use crate::handshake::resume::{
    CheckChannel, Considered, ExpectClientFinished, ExpectFinished, Returned, SendFinished,
};
use crate::handshake::retry::{Presented, Puzzle};
use crate::handshake::server::{
    self, CheckClient, CheckWork, ClientClaim, ExpectClientAuth, ExpectClientHello, Greeted, SignServer,
};
use crate::record::{MAX_RECORDS, Traffic};
use crate::wire::{
    HEADER_LEN, HELLO_RETRY_LEN, Header, ID_LEN, Login, MAX_CLIENT_AUTH_LEN, MAX_CLIENT_HELLO_LEN, MAX_SERVER_AUTH_LEN,
    MIN_RECORD_LIMIT, Message, RECORD_OVERHEAD, RecordType, Rungs, SEND_HEAD_LEN, Settings,
};

/// One end of a connection, from its first byte to its close.
///
/// The methods come in the order in which a driver needs them; [`endpoint`](crate::Endpoint) and the drivers are one
/// short loop around them.
pub struct Connection<A: Aead = RustCrypto> {
    state: State<A>,
    /// Bytes of the longest record that this side takes.
    receive_limit: u16,
    failure: Option<Error>,
    /// What the server wants to see solved first. It outlives the connection, which has ended.
    puzzle: Option<Puzzle>,
}

/// What a call to [`Connection::receive`] made of the bytes.
pub enum Received<'d> {
    /// The record at the front has this many bytes, or its header has; call again when as many are there.
    Need(usize),
    /// Nothing can be received before what was asked is answered.
    Wait,
    /// One record was opened.
    Record {
        /// Bytes of the record: the next one begins behind them.
        used: usize,
        /// What it said. Borrows from the data, not from the connection.
        event: Event<'d>,
    },
}

/// What a record said.
#[non_exhaustive]
pub enum Event<'d> {
    /// Something went on that needs nobody: see [`Connection::ask`].
    Progress,
    /// Client: verify this signature, then call [`Connection::verified`].
    CheckServer(ServerClaim<'d>),
    /// Server: check this claim, then call [`Connection::accept`] or [`Connection::refuse`].
    CheckClient(ClientClaim<'d>),
    /// Server: the client offers the channel with this id. Look it up, change nothing, and call
    /// [`Connection::answer_offer`].
    CheckChannel([u8; ID_LEN]),
    /// Server: the client has proved that it holds the channel. Only now may anything change: call
    /// [`Connection::accept`] or, if the channel ended meanwhile, [`Connection::refuse`].
    Resumed,
    /// Client: the server has confirmed the handshake.
    Connected(Settings),
    /// An authenticated payload, to be read by [`Message::decode`]; an envelope in it can be opened in place.
    Message(&'d mut [u8]),
    /// The peer has said its last.
    Closed(Option<Reason>),
}

/// What the engine needs from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ask {
    /// A signature by this side's RSA identity, to be given to [`Connection::sign_client`] or
    /// [`Connection::sign_server`].
    Sign(Statement),
}

#[allow(clippy::large_enum_variant, reason = "a connection owns no heap; the largest states are short")]
enum State<A: Aead> {
    Start(Start),
    ExpectServerHello(ExpectServerHello),
    ExpectServerAuth(ExpectServerAuth),
    ExpectFinished(ExpectFinished),
    SendFinished(SendFinished),
    VerifyServer(VerifyServer),
    SignClient(SignClient),
    ExpectSettings(ExpectSettings<A>),
    // A server's states bring their handlers along, so that an image in which nobody calls `Connection::server` does not
    // hold them: a microcontroller is never a server, and the linker can see that.
    ExpectClientHello(ExpectClientHello, HandleClientHello<A>),
    CheckChannel(CheckChannel),
    CheckWork(CheckWork),
    ExpectClientFinished(ExpectClientFinished, fn(&ExpectClientFinished, &mut [u8]) -> Result<Returned, Error>),
    Returned(Returned),
    SignServer(SignServer),
    ExpectClientAuth(ExpectClientAuth, HandleClientAuth),
    CheckClient(CheckClient),
    Established(Established<A>),
    Ended,
}

type HandleClientHello<A> = fn(&mut Connection<A>, &[u8]) -> Result<Event<'static>, Error>;
type HandleClientAuth = for<'d> fn(&ExpectClientAuth, &'d mut [u8]) -> Result<(CheckClient, ClientClaim<'d>), Error>;

struct Established<A> {
    sealing: Traffic<A>,
    opening: Traffic<A>,
    exporter: Secret<HASH_LEN>,
    /// The channel that this connection issued, until somebody takes it.
    issued: Option<Channel>,
    resumed: bool,
    /// Bytes of the longest record that the peer takes.
    send_limit: u16,
    /// Whether this side has sent its close, and whether the peer has.
    closed: bool,
    peer_closed: bool,
}

/// What the header of a record that may come now must look like.
struct Expected {
    kinds: [RecordType; 2],
    min: usize,
    max: usize,
}

impl<A: Aead> Connection<A> {
    /// A client's end. `seed` is 64 bytes from a cryptographic generator, used for this connection only.
    pub fn client(config: ClientConfig, seed: &[u8; 64]) -> Self {
        Self {
            state: State::Start(Start::new(config, None, seed)),
            receive_limit: config.record_limit,
            failure: None,
            puzzle: None,
        }
    }

    /// A client's end that offers to resume `channel`, which costs no RSA. A server that no longer has it goes on with the
    /// full handshake, and nothing else is different: [`is_resumed`](Self::is_resumed) tells which it was.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] if the channel is that of another server than `config` expects: it is not offered
    /// to this one.
    pub fn resume(config: ClientConfig, channel: Channel, seed: &[u8; 64]) -> Result<Self, Error> {
        if config.server != Some(channel.server_key) {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let state = State::Start(Start::new(config, Some(channel), seed));
        Ok(Self { state, receive_limit: config.record_limit, failure: None, puzzle: None })
    }

    /// A server's end. `seed` is 64 bytes from a cryptographic generator, used for this connection only.
    pub fn server(config: ServerConfig, seed: &[u8; 64]) -> Self {
        let state = State::ExpectClientHello(ExpectClientHello::new(config, seed), Self::open_client_hello);
        Self { state, receive_limit: config.record_limit, failure: None, puzzle: None }
    }

    /// Client: this connection is another attempt after one that ended with [`PeerError::Retry`], whose
    /// [`puzzle`](Self::puzzle) this is. Call it before anything else, then [`solve`](Self::solve) before the transport is
    /// opened: a server waits for seconds only.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] if the connection has begun already, or is a server's.
    pub fn present(&mut self, puzzle: &Puzzle) -> Result<(), Error> {
        match &mut self.state {
            State::Start(start) => {
                start.present(puzzle);
                Ok(())
            }
            _ => Err(ApiMisuse::InvalidArgument.into()),
        }
    }

    /// Client: makes some tries at the puzzle that this connection presents, which takes a small device milliseconds.
    /// True if it must be called again. Without a puzzle there is nothing to solve.
    pub fn solve(&mut self) -> bool {
        match &mut self.state {
            State::Start(start) => !start.solve(),
            _ => false,
        }
    }

    /// Client: what the server wants to see solved, after [`PeerError::Retry`].
    pub const fn puzzle(&self) -> Option<Puzzle> {
        self.puzzle
    }

    /// Server: whoever brings no channel must have worked for it, from here on; call it before the hello has come. Such a
    /// hello is then not answered before [`presented`](Self::presented) was looked at.
    pub const fn demand_work(&mut self) {
        if let State::ExpectClientHello(state, _) = &mut self.state {
            state.busy = true;
        }
    }

    /// Server: what a client shows whose hello waits for a verdict: [`admit`](Self::admit) it or have it
    /// [`retry`](Self::retry). Nothing but two hashes was computed for it yet.
    pub const fn presented(&self) -> Option<&Presented> {
        match &self.state {
            State::CheckWork(state) => Some(state.presented()),
            _ => None,
        }
    }

    /// Server: the work was enough, or the server is not busy any more. The full handshake goes on: see
    /// [`ask`](Self::ask).
    ///
    /// # Errors
    /// [`ApiMisuse::NotAsked`] if no hello waits. [`Error::Crypto`] if the client's ephemeral key is none; final.
    pub fn admit(&mut self) -> Result<(), Error> {
        self.check()?;
        let State::CheckWork(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        match state.admit() {
            Ok(next) => {
                self.state = State::SignServer(next);
                Ok(())
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Server: the client is to come again with this cookie (1 to 40 bytes) and a puzzle of so many zero bits solved, at
    /// most [`MAX_PUZZLE_BITS`](crate::MAX_PUZZLE_BITS). Appends the HelloRetry and ends the connection.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::NotAsked`] if no hello waits: nothing has changed.
    pub fn retry(&mut self, cookie: &[u8], bits: u8, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let State::CheckWork(_) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        let len = server::retry(bits, cookie, out)?;
        self.state = State::Ended;
        Ok(len)
    }

    /// Appends what the protocol owes without being asked, and returns its length: a client's first record (once its puzzle
    /// is solved, at which each call makes some tries), its Finished of a resumption, and a key update shortly before a key has sealed all it may.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::InvalidArgument`] if a client neither knows its server's
    /// key nor asks for it, or offers a record limit below [`MIN_RECORD_LIMIT`]: nothing has changed.
    pub fn transmit(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        match &mut self.state {
            State::Start(_) => self.begin(out),
            State::SendFinished(_) => self.finish_resumption(out),
            // Behind a close nothing is sent, however old the key is.
            State::Established(established)
                if !established.closed && established.sealing.key.counter() >= UPDATE_AT =>
            {
                established.update_key(out)
            }
            _ => Ok(0),
        }
    }

    /// -> ClientHello
    #[inline(never)] // like the next one: its states must not lie on the stack of whoever asks in vain
    fn begin(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        let State::Start(start) = &mut self.state else { return Ok(0) };
        if !start.solve() {
            return Ok(0);
        }
        let (next, len) = start.hello(out)?;
        self.state = State::ExpectServerHello(next);
        Ok(len)
    }

    /// -> {ClientAuth}, of a resumption
    #[inline(never)]
    fn finish_resumption(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        let State::SendFinished(state) = &self.state else { return Ok(0) };
        let (next, len) = state.auth(out)?;
        self.state = State::ExpectSettings(next);
        Ok(len)
    }

    /// What the engine waits for, if it waits.
    pub const fn ask(&self) -> Option<Ask> {
        match &self.state {
            State::SignClient(state) => Some(Ask::Sign(state.statement())),
            State::SignServer(state) => Some(Ask::Sign(state.statement())),
            _ => None,
        }
    }

    /// Opens the record at the front of `data` in place.
    ///
    /// Nothing is read beyond that record. Lengths are checked before anything is waited for: a record that is too long
    /// for this state fails at its header.
    ///
    /// # Errors
    /// Any error but a misuse ends the connection: close the transport without another byte.
    /// [`ApiMisuse::InvalidArgument`] if a server was given a record limit below [`MIN_RECORD_LIMIT`]: nothing has changed.
    #[inline(never)] // the states that it moves must not lie on the stack below what its events lead to
    pub fn receive<'d>(&mut self, data: &'d mut [u8]) -> Result<Received<'d>, Error> {
        self.check()?;
        // Of a server that no client takes for one. A client never gets here: it could not say hello.
        if usize::from(self.receive_limit) < MIN_RECORD_LIMIT && matches!(self.state, State::ExpectClientHello(..)) {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        match self.inspect(data) {
            Ok(Inspected::Need(len)) => Ok(Received::Need(len)),
            Ok(Inspected::Wait) => Ok(Received::Wait),
            Ok(Inspected::Ready(header)) => match self.open(header, data) {
                Ok(event) => Ok(Received::Record { used: header.len.into(), event }),
                Err(error) => Err(self.fail(error)),
            },
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Client: the signature of the [`ServerClaim`] was verified with the key of its fingerprint; reveal these
    /// credentials to that server. If it was not right, drop the connection instead.
    ///
    /// # Errors
    /// [`ApiMisuse::NotAsked`] if no claim is open.
    pub fn verified(&mut self, credentials: &Credentials<'_>) -> Result<(), Error> {
        self.check()?;
        let State::VerifyServer(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        self.state = State::SignClient(state.verified(credentials));
        Ok(())
    }

    /// Client: answers [`Ask::Sign`]. The credentials are those that were given to [`Connection::verified`].
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse`] if nothing was asked or the credentials are others:
    /// nothing has changed.
    pub fn sign_client(
        &mut self,
        credentials: &Credentials<'_>,
        signature: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        self.check()?;
        let State::SignClient(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        let (next, len) = state.auth(credentials, signature, out)?;
        self.state = State::ExpectSettings(next);
        Ok(len)
    }

    /// Client: as [`verified`](Self::verified), to enter an account by its password. Nothing of a password is said to a
    /// server that was not known beforehand.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] if the server's key was not pinned (see [`ClientConfig::server`]) or the name has not
    /// 1 to 64 bytes; [`ApiMisuse::NotAsked`] if no claim is open: nothing has changed.
    pub fn verified_for_login(&mut self, login: &Login<'_>) -> Result<(), Error> {
        self.check()?;
        let State::VerifyServer(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        self.state = State::SignClient(state.verified_for_login(login)?);
        Ok(())
    }

    /// Client: answers [`Ask::Sign`] of a login, which is the one that was given to
    /// [`verified_for_login`](Self::verified_for_login), by a signature of its key. The connection that comes of it has no
    /// channel: ask the server for the id of the account's client, and connect with the key.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse`] if nothing was asked or the login is another: nothing has
    /// changed, and nothing of the password is in `out`.
    pub fn sign_login(&mut self, login: &Login<'_>, signature: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let State::SignClient(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        let (next, len) = state.log_in(login, signature, out)?;
        self.state = State::ExpectSettings(next);
        Ok(len)
    }

    /// Server: answers [`Ask::Sign`]. `key` is sent where the client asked for it.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::NotAsked`] if nothing was asked: nothing has changed.
    pub fn sign_server(&mut self, key: PublicKey<'_>, signature: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let State::SignServer(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        let (next, len) = state.auth::<A>(key, signature, out)?;
        self.state = State::ExpectClientAuth(next, ExpectClientAuth::handle::<A>);
        Ok(len)
    }

    /// Server: names the offer that [`Event::CheckChannel`] is about. A client never makes the same twice, so one that is
    /// known was recorded.
    pub fn offered(&self) -> Option<[u8; 8]> {
        match &self.state {
            State::CheckChannel(state) => Some(state.name()),
            _ => None,
        }
    }

    /// Server: binds a claim to the key with this fingerprint (the one that was enrolled under the claimed id, or the
    /// claim's own) and returns what the claim's signature must cover.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the claim was made for another key: [`refuse`](Self::refuse) it with
    /// [`Reason::Unauthorised`], as an unknown id. [`ApiMisuse::NotAsked`] if no claim is open.
    pub fn bind(&mut self, claim: &ClientClaim<'_>, fingerprint: &[u8; HASH_LEN]) -> Result<Statement, Error> {
        self.check()?;
        match &mut self.state {
            State::CheckClient(state) => state.bind(claim, fingerprint),
            _ => Err(ApiMisuse::NotAsked.into()),
        }
    }

    /// Server: whether a bound claim proves that the client knows the token with this verifier.
    pub fn proves(&self, claim: &ClientClaim<'_>, verifier: &[u8; HASH_LEN]) -> bool {
        match &self.state {
            State::CheckClient(state) => state.proves(claim, verifier),
            _ => false,
        }
    }

    /// Server: answers [`Event::CheckChannel`] with the channel of that id, if there is one that has not expired. Appends
    /// the answer if the client has its secret. If not, the length is 0 and [`ask`](Self::ask) wants a signature: the
    /// full handshake goes on, marked as `unauthorised`. If work was demanded, [`presented`](Self::presented) comes first.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::NotAsked`] if no channel is offered: nothing has changed.
    /// [`Error::Crypto`] if the client's ephemeral key is none; final.
    pub fn answer_offer(&mut self, channel: Option<&Channel>, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let State::CheckChannel(state) = &self.state else {
            return Err(ApiMisuse::NotAsked.into());
        };
        match state.answer::<A>(channel, out) {
            Ok(Considered::Resumed(next, len)) => {
                self.state = State::ExpectClientFinished(next, ExpectClientFinished::handle::<A>);
                Ok(len)
            }
            Ok(Considered::Full(next)) => {
                self.state = State::SignServer(next);
                Ok(0)
            }
            Ok(Considered::Work(next)) => {
                self.state = State::CheckWork(next);
                Ok(0)
            }
            Err(error @ Error::Buffer(_)) => Err(error),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Server: the bound claim's signature was verified, or the client has resumed a channel, and it may enter. Appends
    /// the settings.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::NotAsked`] if no claim is bound: nothing has changed.
    pub fn accept(&mut self, settings: &Settings, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let (finished, send_limit) = match &self.state {
            State::CheckClient(state) => (state.finish::<A>()?, state.record_limit),
            State::Returned(state) => (state.finish::<A>(), state.record_limit),
            _ => return Err(ApiMisuse::NotAsked.into()),
        };
        let Finished { client, server, exporter, issue } = finished;
        let mut established = Established {
            sealing: server,
            opening: client,
            exporter,
            resumed: issue.resumed,
            issued: issue.channel(settings),
            send_limit,
            closed: false,
            peer_closed: false,
        };
        let len = established.send(&Message::Settings(*settings), out)?;
        self.state = State::Established(established);
        Ok(len)
    }

    /// Server: the client may not enter. Appends the sealed refusal and ends the connection.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room, [`ApiMisuse::NotAsked`] if no claim is open: nothing has changed.
    pub fn refuse(&mut self, reason: Reason, retry_after: u32, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let len = match &self.state {
            State::CheckClient(state) => state.refuse::<A>(reason, retry_after, out)?,
            State::Returned(state) => state.refuse::<A>(reason, retry_after, out)?,
            _ => return Err(ApiMisuse::NotAsked.into()),
        };
        self.state = State::Ended;
        Ok(len)
    }

    /// Seals `message` as one record, appends it to `out` and returns its length. Calling it again before the driver
    /// writes is how several records share one write.
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` has no room: run the driver, then try again. [`BufferError::MessageTooLong`] if
    /// the peer does not take so long a record. [`ApiMisuse`] before the handshake has finished and after a close. None
    /// of these changes anything.
    pub fn send(&mut self, message: &Message<'_>, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let established = self.established_mut()?;
        if established.closed {
            return Err(ApiMisuse::Closed.into());
        }
        if matches!(message, Message::Close { .. } | Message::KeyUpdate) {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        established.send(message, out)
    }

    /// Like [`send`](Self::send) of [`Message::Send`], with an envelope of `len` bytes that `seal` writes in place.
    ///
    /// # Errors
    /// As [`send`](Self::send), before `seal` is called; otherwise those of `seal`.
    pub fn send_sealed<E: From<Error>>(
        &mut self,
        wanted: Rungs,
        len: usize,
        out: &mut [u8],
        seal: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<usize, E> {
        self.check()?;
        let established = self.established_mut()?;
        if established.closed {
            return Err(Error::from(ApiMisuse::Closed).into());
        }
        established.seal(out, |payload, max| {
            let total = len.saturating_add(SEND_HEAD_LEN);
            if total > max {
                return Err(Error::from(BufferError::MessageTooLong { max }).into());
            }
            let payload = payload.get_mut(..total).ok_or_else(|| Error::from(BufferError::TxFull))?;
            let head_len = Message::Send { wanted, envelope: &[] }.encode(payload)?;
            seal(payload.get_mut(head_len..).unwrap_or_default())?;
            Ok(total)
        })
    }

    /// Seals this side's last record. The transport may be closed once it is written.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn close(&mut self, reason: Option<Reason>, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let established = self.established_mut()?;
        if established.closed {
            return Err(ApiMisuse::Closed.into());
        }
        let len = established.send(&Message::Close { reason }, out)?;
        established.closed = true;
        Ok(len)
    }

    /// Replaces the key of this direction now, whatever its age.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn update_key(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        self.check()?;
        let established = self.established_mut()?;
        if established.closed {
            return Err(ApiMisuse::Closed.into());
        }
        established.update_key(out)
    }

    /// The transport has ended: was that the end of the conversation?
    ///
    /// # Errors
    /// [`PeerError::Truncated`] unless the peer's close was received, or a server has refused the client.
    pub fn end_of_stream(&mut self) -> Result<(), Error> {
        match (&self.state, &self.failure) {
            (State::Established(established), _) if established.peer_closed => Ok(()),
            // What was refused has no more to say, and no other way to end without a failure.
            (State::Ended, None) => Ok(()),
            _ => {
                self.check()?;
                Err(self.fail(PeerError::Truncated.into()))
            }
        }
    }

    /// Whether the handshake has finished and neither side has closed.
    pub const fn is_connected(&self) -> bool {
        match &self.state {
            State::Established(established) => !established.closed && !established.peer_closed,
            _ => false,
        }
    }

    /// Whether the handshake has finished, and was a resumption.
    pub const fn is_resumed(&self) -> bool {
        match &self.state {
            State::Established(established) => established.resumed,
            _ => false,
        }
    }

    /// The channel that this connection's settings issued, once. A client keeps it in the place of any older one; a server
    /// beside the one that was just used, until the new one is used.
    pub const fn take_channel(&mut self) -> Option<Channel> {
        match &mut self.state {
            State::Established(established) => established.issued.take(),
            _ => None,
        }
    }

    /// Bytes of the longest payload that the peer takes in one record.
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`] before the handshake has finished.
    pub fn max_payload(&self) -> Result<usize, Error> {
        Ok(self.established()?.max_payload())
    }

    /// A secret that both sides of this connection share and nobody else: binds signatures to it.
    ///
    /// # Errors
    /// [`ApiMisuse::NotConnected`] before the handshake has finished.
    pub fn exporter(&self) -> Result<&Secret<HASH_LEN>, Error> {
        Ok(&self.established()?.exporter)
    }

    /// What must be there before `data` can be received; for whoever owns the buffer.
    pub(crate) fn inspect(&self, data: &[u8]) -> Result<Inspected, Error> {
        let Some(expected) = self.expected() else {
            return Ok(Inspected::Wait);
        };
        let Some(header) = data.first_chunk::<HEADER_LEN>() else {
            return Ok(Inspected::Need(HEADER_LEN));
        };
        let header = Header::decode(*header)?;
        let len = usize::from(header.len);
        if !expected.kinds.contains(&header.kind) {
            return Err(PeerError::UnexpectedMessage.into());
        }
        let (min, max) = match header.kind {
            RecordType::Refusal => (REFUSAL_RECORD_LEN, REFUSAL_RECORD_LEN),
            RecordType::HelloRetry => (*HELLO_RETRY_LEN.start(), *HELLO_RETRY_LEN.end()),
            _ => (expected.min, expected.max),
        };
        if len < min || len > max {
            return Err(Error::Decode);
        }
        if data.len() < len { Ok(Inspected::Need(len)) } else { Ok(Inspected::Ready(header)) }
    }

    fn expected(&self) -> Option<Expected> {
        let only = |kind, min, max| Some(Expected { kinds: [kind, kind], min, max });
        let sealed = RECORD_OVERHEAD;
        match &self.state {
            State::ExpectServerHello(_) => Some(Expected {
                kinds: [RecordType::ServerHello, RecordType::HelloRetry],
                min: HEADER_LEN,
                max: MAX_SERVER_AUTH_LEN,
            }),
            State::ExpectServerAuth(_) | State::ExpectFinished(_) => {
                only(RecordType::ServerAuth, sealed, MAX_SERVER_AUTH_LEN)
            }
            State::ExpectClientHello(..) => only(RecordType::ClientHello, HEADER_LEN, MAX_CLIENT_HELLO_LEN),
            State::ExpectClientAuth(..) | State::ExpectClientFinished(..) => {
                only(RecordType::ClientAuth, sealed, MAX_CLIENT_AUTH_LEN)
            }
            State::ExpectSettings(_) => Some(Expected {
                kinds: [RecordType::Application, RecordType::Refusal],
                min: sealed,
                max: self.receive_limit.into(),
            }),
            State::Established(established) if !established.peer_closed => {
                only(RecordType::Application, sealed, self.receive_limit.into())
            }
            _ => None,
        }
    }

    fn open<'d>(&mut self, header: Header, data: &'d mut [u8]) -> Result<Event<'d>, Error> {
        let record = data.get_mut(..header.len.into()).ok_or(Error::Decode)?;
        // The keys of the handshake seal one record each, and the clear records have none: all are number 0.
        let sequence_is_zero = header.sequence == 0;
        let out_of_order = Err(PeerError::UnexpectedMessage.into());
        match &mut self.state {
            State::Established(_) => self.open_established(header, record),
            State::ExpectSettings(state) if header.kind == RecordType::Refusal => {
                if header.sequence != 1 {
                    return out_of_order;
                }
                Err(state.refused(record))
            }
            State::ExpectSettings(_) => self.open_settings(header, record),
            _ if !sequence_is_zero => out_of_order,
            State::ExpectServerHello(_) if header.kind == RecordType::HelloRetry => Err(self.open_retry(record)),
            State::ExpectServerHello(state) => {
                self.state = match state.handle(record)? {
                    Chosen::Full(next) => State::ExpectServerAuth(next),
                    Chosen::Resumed(next) => State::ExpectFinished(next),
                };
                Ok(Event::Progress)
            }
            State::ExpectFinished(state) => {
                self.state = State::SendFinished(state.handle::<A>(record)?);
                Ok(Event::Progress)
            }
            State::ExpectServerAuth(state) => {
                let (next, claim) = state.handle::<A>(record)?;
                self.state = State::VerifyServer(next);
                Ok(Event::CheckServer(claim))
            }
            State::ExpectClientHello(_, handle) => {
                let handle = *handle;
                handle(self, record)
            }
            State::ExpectClientFinished(state, handle) => {
                self.state = State::Returned(handle(state, record)?);
                Ok(Event::Resumed)
            }
            State::ExpectClientAuth(state, handle) => {
                let (next, claim) = handle(state, record)?;
                self.state = State::CheckClient(next);
                Ok(Event::CheckClient(claim))
            }
            _ => out_of_order,
        }
    }

    /// -> ClientHello: what a server goes on with.
    fn open_client_hello(&mut self, record: &[u8]) -> Result<Event<'static>, Error> {
        let State::ExpectClientHello(state, _) = &self.state else {
            return Err(PeerError::UnexpectedMessage.into());
        };
        let (next, event) = match state.handle(record)? {
            Greeted::Sign(next) => (State::SignServer(next), Event::Progress),
            Greeted::Work(next) => (State::CheckWork(next), Event::Progress),
            Greeted::Check(next) => {
                let channel = next.channel();
                (State::CheckChannel(next), Event::CheckChannel(channel))
            }
        };
        self.state = next;
        Ok(event)
    }

    /// <- HelloRetry: why the connection ends.
    #[inline(never)]
    fn open_retry(&mut self, record: &[u8]) -> Error {
        match &self.state {
            State::ExpectServerHello(state) => match state.retried(record) {
                Ok(puzzle) => {
                    self.puzzle = Some(puzzle);
                    PeerError::Retry.into()
                }
                Err(error) => error,
            },
            _ => PeerError::UnexpectedMessage.into(),
        }
    }

    /// The first application record, under the keys that were made ready when the client signed.
    #[inline(never)]
    fn open_settings<'d>(&mut self, header: Header, record: &mut [u8]) -> Result<Event<'d>, Error> {
        let State::ExpectSettings(state) = &mut self.state else {
            return Err(PeerError::UnexpectedMessage.into());
        };
        if !state.finished.server.key.expects(header.sequence) {
            return Err(PeerError::UnexpectedMessage.into());
        }
        let payload = state.finished.server.key.open(record)?;
        // Whatever else it is, it is not looked into.
        if payload.first_chunk().is_some_and(|code| *code != [0x07, 0x20]) {
            return Err(PeerError::UnexpectedMessage.into());
        }
        let Message::Settings(settings) = Message::decode_told(payload)? else {
            return Err(PeerError::UnexpectedMessage.into());
        };
        if let State::ExpectSettings(state) = core::mem::replace(&mut self.state, State::Ended) {
            let Finished { client, server, exporter, issue } = state.finished;
            self.state = State::Established(Established {
                sealing: client,
                opening: server,
                exporter,
                resumed: issue.resumed,
                issued: issue.channel(&settings),
                send_limit: state.record_limit,
                closed: false,
                peer_closed: false,
            });
        }
        Ok(Event::Connected(settings))
    }

    fn open_established<'d>(&mut self, header: Header, record: &'d mut [u8]) -> Result<Event<'d>, Error> {
        let established = self.established_mut()?;
        if !established.opening.key.expects(header.sequence) {
            return Err(PeerError::UnexpectedMessage.into());
        }
        let payload = established.opening.key.open(record)?;
        match payload.first_chunk() {
            Some([0x08, 0x21]) => match Message::decode_told(payload)? {
                Message::Close { reason } => {
                    established.peer_closed = true;
                    Ok(Event::Closed(reason))
                }
                _ => Err(Error::Decode),
            },
            Some([0x08, 0x22]) => {
                Message::decode_told(payload)?;
                established.opening.update();
                Ok(Event::Progress)
            }
            // A key that has sealed all it may and was not replaced: the peer broke the rule.
            _ if established.opening.key.counter() >= MAX_RECORDS => Err(PeerError::Exhausted.into()),
            _ => Ok(Event::Message(payload)),
        }
    }

    fn established(&self) -> Result<&Established<A>, Error> {
        match &self.state {
            State::Established(established) => Ok(established),
            _ => Err(ApiMisuse::NotConnected.into()),
        }
    }

    fn established_mut(&mut self) -> Result<&mut Established<A>, Error> {
        match &mut self.state {
            State::Established(established) => Ok(established),
            _ => Err(ApiMisuse::NotConnected.into()),
        }
    }

    fn check(&self) -> Result<(), Error> {
        match (&self.failure, &self.state) {
            (Some(failure), _) => Err(*failure),
            (None, State::Ended) => Err(ApiMisuse::Closed.into()),
            _ => Ok(()),
        }
    }

    /// Remembers the failure and erases every key.
    fn fail(&mut self, error: Error) -> Error {
        self.state = State::Ended;
        self.failure = Some(error);
        error
    }
}

/// What [`Connection::inspect`] found.
pub(crate) enum Inspected {
    Need(usize),
    Wait,
    Ready(Header),
}

/// From this counter on, `transmit` replaces the key unasked; the rest is reserve for a caller that does not call it.
const UPDATE_AT: u64 = MAX_RECORDS - 1024;
/// Bytes of a key update: a record with nothing but its code.
const UPDATE_RECORD_LEN: usize = RECORD_OVERHEAD + 2;

impl<A: Aead> Established<A> {
    fn max_payload(&self) -> usize {
        usize::from(self.send_limit).saturating_sub(RECORD_OVERHEAD)
    }

    fn send(&mut self, message: &Message<'_>, out: &mut [u8]) -> Result<usize, Error> {
        self.seal(out, |payload, max| {
            // Encode into no more than the peer takes; if that is what was too little, waiting would not help.
            let room = payload.len();
            match message.encode(payload.get_mut(..max.min(room)).unwrap_or_default()) {
                Err(Error::Buffer(_)) if room >= max => Err(BufferError::MessageTooLong { max }.into()),
                result => result,
            }
        })
    }

    /// Seals what `fill` writes into the room for a payload; it is also told the longest payload that the peer takes.
    /// The last record under a key is its update, which is put in front where it is due.
    fn seal<E: From<Error>>(
        &mut self,
        out: &mut [u8],
        fill: impl FnOnce(&mut [u8], usize) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let max = self.max_payload();
        let full = Error::from(BufferError::TxFull);
        let update_len = if self.sealing.key.counter() >= MAX_RECORDS - 1 { UPDATE_RECORD_LEN } else { 0 };
        let (update, record) = out.split_at_mut_checked(update_len).ok_or(full)?;
        let end = record.len().saturating_sub(TAG_LEN);
        let len = fill(record.get_mut(HEADER_LEN..end).ok_or(full)?, max)?;
        if update_len > 0 {
            self.update_key(update)?;
        }
        Ok(update_len + self.sealing.key.seal(RecordType::Application, record, len)?)
    }

    fn update_key(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        let payload = out.get_mut(HEADER_LEN..).ok_or(BufferError::TxFull)?;
        let len = Message::KeyUpdate.encode(payload)?;
        let len = self.sealing.key.seal(RecordType::Application, out, len)?;
        self.sealing.update();
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
