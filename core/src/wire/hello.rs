//! The handshake records: the hellos in the clear, and what is inside the sealed ones (PROTOCOL 3).
//!
//! Only layout is decided here; which fields enter the transcript is the handshake's business.

use super::{ID_LEN, MAX_NAME_LEN, Reader, SUITE, VERSION, Writer};
use crate::crypto::{HASH_LEN, PublicKey, equal};
use crate::error::Error;

/// Bytes of the longest cookie.
pub(crate) const MAX_COOKIE_LEN: usize = 40;
const MAX_LIST_LEN: usize = 4;
const ASK_FOR_KEY: u8 = 1;

/// In which role a node connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A person or a device at its home server.
    Client,
    /// A server at its peer (federation).
    Server,
}

/// ```text
/// 0        8
/// | header | n:u8 version:u16 * n | n:u8 suite:u16 * n | record_limit:u16 | role | flags |
/// | random_C [32] | E_C [32] | n:u8 cookie [n] (n > 0: puzzle u64) | 0, or 1 channel_id [16] binder [32] |
/// ```
#[derive(Clone, Copy)]
pub(crate) struct ClientHello<'d> {
    pub(crate) record_limit: u16,
    pub(crate) role: Role,
    /// The client does not know the server's key, only its fingerprint or nothing: send it.
    pub(crate) ask_for_key: bool,
    pub(crate) random: [u8; HASH_LEN],
    pub(crate) exchange: [u8; HASH_LEN],
    pub(crate) work: Option<Work<'d>>,
    pub(crate) offer: Option<Offer>,
}

/// What a [`HelloRetry`] asked for: its cookie, and the solution of its puzzle.
#[derive(Clone, Copy)]
pub(crate) struct Work<'d> {
    /// Not empty.
    pub(crate) cookie: &'d [u8],
    pub(crate) solution: u64,
}

/// A channel that the client wants to resume.
#[derive(Clone, Copy)]
pub(crate) struct Offer {
    pub(crate) channel: [u8; ID_LEN],
    pub(crate) binder: [u8; HASH_LEN],
}

impl<'d> ClientHello<'d> {
    /// Writes everything behind the header.
    pub(crate) fn encode(&self, out: &mut Writer<'_>) {
        out.u8(1).u16(VERSION).u8(1).u16(SUITE).u16(self.record_limit);
        out.u8(match self.role {
            Role::Client => 0,
            Role::Server => 1,
        });
        out.u8(if self.ask_for_key { ASK_FOR_KEY } else { 0 });
        out.bytes(&self.random).bytes(&self.exchange);
        match &self.work {
            None => out.u8(0),
            Some(work) => out.short(work.cookie).u64(work.solution),
        };
        match &self.offer {
            None => out.u8(0),
            Some(offer) => out.u8(1).bytes(&offer.channel).bytes(&offer.binder),
        };
    }

    /// Reads everything behind the header; `None` if it is well-formed but has no version or suite in common with us.
    pub(crate) fn decode(body: &'d [u8]) -> Result<Option<Self>, Error> {
        let mut reader = Reader::new(body);
        let version = list_contains(&mut reader, VERSION)?;
        let suite = list_contains(&mut reader, SUITE)?;
        let record_limit = reader.u16()?;
        let role = match reader.u8()? {
            0 => Role::Client,
            1 => Role::Server,
            _ => return Err(Error::Decode),
        };
        let ask_for_key = match reader.u8()? {
            0 => false,
            ASK_FOR_KEY => true,
            _ => return Err(Error::Decode),
        };
        let random = reader.array()?;
        let exchange = reader.array()?;
        let cookie = reader.short()?;
        if cookie.len() > MAX_COOKIE_LEN {
            return Err(Error::Decode);
        }
        let work = if cookie.is_empty() { None } else { Some(Work { cookie, solution: reader.u64()? }) };
        let offer = match reader.u8()? {
            0 => None,
            1 => Some(Offer { channel: reader.array()?, binder: reader.array()? }),
            _ => return Err(Error::Decode),
        };
        reader.end()?;
        let hello = Self { record_limit, role, ask_for_key, random, exchange, work, offer };
        Ok((version && suite).then_some(hello))
    }
}

fn list_contains(reader: &mut Reader<'_>, wanted: u16) -> Result<bool, Error> {
    let len = usize::from(reader.u8()?);
    if len == 0 || len > MAX_LIST_LEN {
        return Err(Error::Decode);
    }
    let mut found = false;
    for _ in 0..len {
        found |= reader.u16()? == wanted;
    }
    Ok(found)
}

/// ```text
/// 0        8      9   10          10+n
/// | header | bits | n | cookie [n] |
/// ```
#[derive(Clone, Copy)]
pub(crate) struct HelloRetry<'d> {
    /// Zero bits that the puzzle wants.
    pub(crate) bits: u8,
    /// 1 to [`MAX_COOKIE_LEN`] bytes.
    pub(crate) cookie: &'d [u8],
}

impl<'d> HelloRetry<'d> {
    pub(crate) fn encode(&self, out: &mut Writer<'_>) {
        out.u8(self.bits).short(self.cookie);
    }

    pub(crate) fn decode(body: &'d [u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(body);
        let (bits, cookie) = (reader.u8()?, reader.short()?);
        reader.end()?;
        if cookie.is_empty() || cookie.len() > MAX_COOKIE_LEN {
            return Err(Error::Decode);
        }
        Ok(Self { bits, cookie })
    }
}

/// How the server goes on (PROTOCOL 3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Full handshake; nothing was offered.
    Full,
    /// The offered channel was resumed.
    Resumed,
    /// Full handshake; the offered channel is unknown, expired, revoked or its binder is wrong.
    Unauthorised,
}

/// ```text
/// 0        8      9         11      13             15            47        79
/// | header | mode | version | suite | record_limit | random_S    | E_S     |
/// ```
#[derive(Clone, Copy)]
pub(crate) struct ServerHello {
    pub(crate) mode: Mode,
    pub(crate) record_limit: u16,
    pub(crate) random: [u8; HASH_LEN],
    pub(crate) exchange: [u8; HASH_LEN],
}

impl ServerHello {
    pub(crate) fn encode(&self, out: &mut Writer<'_>) {
        out.u8(match self.mode {
            Mode::Full => 0,
            Mode::Resumed => 1,
            Mode::Unauthorised => 2,
        });
        out.u16(VERSION).u16(SUITE).u16(self.record_limit).bytes(&self.random).bytes(&self.exchange);
    }

    /// `None` if it is well-formed but chose what we never offer.
    pub(crate) fn decode(body: &[u8]) -> Result<Option<Self>, Error> {
        let mut reader = Reader::new(body);
        let mode = match reader.u8()? {
            0 => Mode::Full,
            1 => Mode::Resumed,
            2 => Mode::Unauthorised,
            _ => return Err(Error::Decode),
        };
        let offered = reader.u16()? == VERSION;
        let offered = (reader.u16()? == SUITE) && offered;
        let hello = Self { mode, record_limit: reader.u16()?, random: reader.array()?, exchange: reader.array()? };
        reader.end()?;
        Ok(offered.then_some(hello))
    }
}

/// Inside ServerAuth, full handshake: `server_id [16] | SPKI_S, if asked for | sig_S | fin_S [32]`.
///
/// The SPKI tells its own length, and the signature takes what is left.
pub(crate) struct ServerAuth<'d> {
    pub(crate) server: [u8; ID_LEN],
    pub(crate) key: Option<PublicKey<'d>>,
    pub(crate) signature: &'d [u8],
    pub(crate) finished: [u8; HASH_LEN],
}

impl<'d> ServerAuth<'d> {
    pub(crate) fn decode(body: &'d [u8], asked_for_key: bool) -> Result<Self, Error> {
        let mut reader = Reader::new(body);
        let server = reader.array()?;
        let key = if asked_for_key { Some(spki(&mut reader)?) } else { None };
        let signature = reader.rest(HASH_LEN)?;
        Ok(Self { server, key, signature, finished: reader.array()? })
    }
}

/// Takes a SubjectPublicKeyInfo off the front: a DER SEQUENCE with a length of two bytes.
fn spki<'d>(reader: &mut Reader<'d>) -> Result<PublicKey<'d>, Error> {
    let [_, _, high, low] = reader.peek()?;
    let len = usize::from(u16::from_be_bytes([high, low])).saturating_add(4);
    PublicKey::from_spki(reader.bytes(len)?)
}

impl Reader<'_> {
    fn peek<const N: usize>(&self) -> Result<[u8; N], Error> {
        self.0.first_chunk().copied().ok_or(Error::Decode)
    }
}

/// How a client authenticates: the fields of each kind that enter T5, in their order.
#[derive(Clone, Copy)]
pub(crate) enum Method<'d> {
    /// `kind 1 | client_id [16] | key_epoch u32 | caps u16`; T5 has `H(SPKI_C)` behind the id.
    Key { id: [u8; ID_LEN], key_epoch: u32 },
    /// `kind 2 | client_id [16] | n:u8 name [n] | SPKI_C | token_id [8] | caps u16 | token_proof [32]`.
    Enroll { id: [u8; ID_LEN], name: &'d str, key: PublicKey<'d>, token: [u8; 8], proof: [u8; HASH_LEN] },
}

/// Bytes of the longest password.
pub const MAX_PASSWORD_LEN: usize = 128;
const PADDING: [u8; MAX_PASSWORD_LEN] = [0; MAX_PASSWORD_LEN];

/// A password, as the person typed it after normalisation (PROTOCOL 4.12): 1 to [`MAX_PASSWORD_LEN`] bytes. It is borrowed
/// from whoever erases it, compared in constant time, and shown to nobody.
#[derive(Clone, Copy)]
pub struct Password<'p>(&'p [u8]);

impl<'p> Password<'p> {
    /// The password with these bytes.
    ///
    /// # Errors
    /// [`Error::Decode`] if they are none, or too many.
    pub const fn new(bytes: &'p [u8]) -> Result<Self, Error> {
        if bytes.is_empty() || bytes.len() > MAX_PASSWORD_LEN { Err(Error::Decode) } else { Ok(Self(bytes)) }
    }

    /// The bytes, to be verified and not to be kept.
    pub const fn expose(&self) -> &'p [u8] {
        self.0
    }

    /// Its length, and what makes it [`MAX_PASSWORD_LEN`] bytes, so that a record does not tell how long it is.
    pub(crate) fn padded(&self) -> (u8, &'p [u8], &'static [u8]) {
        let len = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        (len, self.0, PADDING.get(self.0.len()..).unwrap_or_default())
    }

    fn decode(reader: &mut Reader<'p>) -> Result<Self, Error> {
        let len = usize::from(reader.u8()?);
        let (password, padding) = reader.bytes(MAX_PASSWORD_LEN)?.split_at_checked(len).ok_or(Error::Decode)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Error::Decode);
        }
        Self::new(password)
    }
}

impl PartialEq for Password<'_> {
    fn eq(&self, other: &Self) -> bool {
        equal(self.0, other.0)
    }
}

impl Eq for Password<'_> {}

impl core::fmt::Debug for Password<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Password(..)")
    }
}

/// How a person enters who has an account: with a new key, which the account's password binds to its name (PROTOCOL 4.12).
/// `kind 3 | client_id [16] | n:u8 name [n] | SPKI_C | caps u16 | p:u8 password [128], zeros behind p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Login<'c> {
    /// A fresh UUIDv4, which an account without a client gets. Any other keeps the id that it has.
    pub id: [u8; ID_LEN],
    /// The account's name.
    pub name: &'c str,
    /// The new key.
    pub key: PublicKey<'c>,
    /// The account's password.
    pub password: Password<'c>,
}

/// What a client claims: only a server reads both, and only hosts write the second.
#[derive(Clone, Copy)]
pub(crate) enum Claimed<'d> {
    Method(Method<'d>),
    Login(Login<'d>),
}

/// Inside ClientAuth, full handshake: the method's fields, then `sig_C | fin_C [32]`.
#[derive(Clone, Copy)]
pub(crate) struct ClientAuth<'d> {
    pub(crate) claimed: Claimed<'d>,
    pub(crate) signature: &'d [u8],
    pub(crate) finished: [u8; HASH_LEN],
}

/// No capabilities are defined yet; a server ignores bits it does not know.
pub(crate) const CAPABILITIES: u16 = 0;
pub(crate) const KIND_KEY: u8 = 1;
pub(crate) const KIND_ENROLL: u8 = 2;
pub(crate) const KIND_PASSWORD: u8 = 3;

impl<'d> ClientAuth<'d> {
    /// Returns the record's fields and its capabilities.
    pub(crate) fn decode(body: &'d [u8]) -> Result<(Self, u16), Error> {
        let mut reader = Reader::new(body);
        let kind = reader.u8()?;
        let id = reader.array()?;
        let (claimed, caps) = match kind {
            KIND_KEY => {
                let method = Method::Key { id, key_epoch: reader.u32()? };
                (Claimed::Method(method), reader.u16()?)
            }
            KIND_ENROLL => {
                let (name, key) = (name(&mut reader)?, spki(&mut reader)?);
                let token = reader.array()?;
                let caps = reader.u16()?;
                (Claimed::Method(Method::Enroll { id, name, key, token, proof: reader.array()? }), caps)
            }
            KIND_PASSWORD => {
                let (name, key) = (name(&mut reader)?, spki(&mut reader)?);
                let caps = reader.u16()?;
                (Claimed::Login(Login { id, name, key, password: Password::decode(&mut reader)? }), caps)
            }
            _ => return Err(Error::Decode),
        };
        let signature = reader.rest(HASH_LEN)?;
        let finished = reader.array()?;
        reader.end()?;
        Ok((Self { claimed, signature, finished }, caps))
    }
}

/// The name that a newcomer wants, or that of an account.
fn name<'d>(reader: &mut Reader<'d>) -> Result<&'d str, Error> {
    let name = core::str::from_utf8(reader.short()?).map_err(|_| Error::Decode)?;
    if name.is_empty() || name.len() > MAX_NAME_LEN { Err(Error::Decode) } else { Ok(name) }
}
