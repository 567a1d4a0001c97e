//! Sender chains: one per sender and conversation, wrapped once to each recipient, then one hash step per message.
//!
//! Plaintext comes into a [`SendingChain`] and goes out as envelopes; envelopes come into a [`ReceivingChain`] and go out
//! as plaintext with its number; receipts go the other way. Every call is all or nothing: state changes when the result is
//! certain. Refused are wraps that the sender did not announce or that were seen before, envelopes too far ahead (before
//! anything is hashed), and receipts that the recipient did not make. Sending chains are never stored: after a restart, a
//! new one begins (PROTOCOL 9).

use core::fmt;

use rand_core::TryCryptoRng;

use super::bundle::{Bundle, BundleKeys, Conversation, Prekey, join};
use crate::crypto::{
    Aead, HASH_LEN, NONCE_LEN, SIGNATURE_LEN, Secret, TAG_LEN, equal, expand, hash, hpke_open, hpke_seal, mac, sign,
    verify, verifying_key,
};
use crate::error::{ApiMisuse, BufferError, Error, Reason};
use crate::wire::{ID_LEN, Member, Reader, Receipt, Rung, Writer};

/// Bytes of a wrap.
pub const WRAP_LEN: usize = WRAP_HEAD_LEN + HASH_LEN + WRAP_TEXT_LEN + TAG_LEN;
/// Bytes that an envelope adds to a body: chain id, number, salt, kind and tag.
pub const ENVELOPE_OVERHEAD: usize = ENVELOPE_HEAD_LEN + 1 + TAG_LEN;
/// Bytes that a signed envelope adds to a body.
pub const SIGNED_OVERHEAD: usize = ENVELOPE_OVERHEAD + SIGNATURE_LEN;
/// Messages of one chain. The next one needs a new chain.
pub const MAX_MESSAGES: u32 = 65_536;
/// The highest kind that an application may give a message; the bit above says that it is signed.
pub const MAX_KIND: u8 = 0x7f;
/// Bytes of an encoded [`ReceiptVerifier`].
pub const RECEIPT_VERIFIER_LEN: usize = 1 + CHAIN_ID_LEN + 2 * HASH_LEN;

const CHAIN_ID_LEN: usize = 8;
const SALT_LEN: usize = 8;
const RECEIPT_TAG_LEN: usize = 16;
const WRAP_HEAD_LEN: usize = ID_LEN + CHAIN_ID_LEN + 4 + 4;
const WRAP_TEXT_LEN: usize = 4 + 3 * HASH_LEN + SIGNATURE_LEN;
const WRAP_INFO_LEN: usize = 13 + 3 * HASH_LEN + 4;
const ANNOUNCEMENT_LEN: usize = 17 + 3 * HASH_LEN + 2 * 4;
const ENVELOPE_HEAD_LEN: usize = CHAIN_ID_LEN + 4 + SALT_LEN;
/// Set in the kind of a message that carries its sender's signature.
const SIGNED: u8 = 0x80;
/// Salts that a receiver remembers, to tell a duplicate from a chain that went back.
const SALTS: usize = 16;
/// The number of no message: marks a free place.
const FREE: u32 = u32::MAX;
const SNAPSHOT_VERSION: u8 = 1;
const VERIFIER_VERSION: u8 = 1;

/// The clear fields at the front of a wrap. Nothing in them is true before the wrap was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrapHeader {
    /// The conversation.
    pub sid: [u8; ID_LEN],
    /// The chain that the wrap brings.
    pub chain_id: [u8; CHAIN_ID_LEN],
    /// One more than that of the sender's chain before, in this conversation.
    pub chain_epoch: u32,
    /// The recipient's prekey that opens it.
    pub prekey_id: u32,
}

impl WrapHeader {
    /// Reads the header of a wrap.
    ///
    /// # Errors
    /// [`Error::Decode`] unless `wrap` has exactly [`WRAP_LEN`] bytes.
    pub fn decode(wrap: &[u8]) -> Result<Self, Error> {
        if wrap.len() != WRAP_LEN {
            return Err(Error::Decode);
        }
        let mut reader = Reader::new(wrap);
        Ok(Self {
            sid: reader.array()?,
            chain_id: reader.array()?,
            chain_epoch: reader.u32()?,
            prekey_id: reader.u32()?,
        })
    }

    fn encode(&self) -> [u8; WRAP_HEAD_LEN] {
        join(&[&self.sid, &self.chain_id, &self.chain_epoch.to_be_bytes(), &self.prekey_id.to_be_bytes()])
    }
}

/// The clear fields at the front of an envelope: with its sender, they are the name of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvelopeHeader {
    /// The chain, which names sender and conversation.
    pub chain_id: [u8; CHAIN_ID_LEN],
    /// The message's number in its chain.
    pub n: u32,
    /// Depends on the text: another text under the same number has another salt.
    pub salt: [u8; SALT_LEN],
}

impl EnvelopeHeader {
    /// Reads the header of an envelope.
    ///
    /// # Errors
    /// [`Error::Decode`] if `envelope` is shorter than an empty message.
    pub fn decode(envelope: &[u8]) -> Result<Self, Error> {
        if envelope.len() < ENVELOPE_OVERHEAD {
            return Err(Error::Decode);
        }
        let mut reader = Reader::new(envelope);
        Ok(Self { chain_id: reader.array()?, n: reader.u32()?, salt: reader.array()? })
    }

    fn encode(&self) -> [u8; ENVELOPE_HEAD_LEN] {
        join(&[&self.chain_id, &self.n.to_be_bytes(), &self.salt])
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        join(&[&self.salt, &self.n.to_be_bytes()])
    }
}

/// What the sender learns about a message that it sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its number.
    pub n: u32,
    /// Its salt, which the sender keeps until the receipts have come: they are verified with it.
    pub salt: [u8; SALT_LEN],
    /// Bytes of the envelope.
    pub len: usize,
}

/// A message as its recipient sees it. The body lies in the buffer that the envelope came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened<'d> {
    /// Its number.
    pub n: u32,
    /// Whether its sender signed it. Otherwise it comes from somebody who holds the chain's keys ("shared key").
    pub signed: bool,
    /// What the application on the other side called it, at most [`MAX_KIND`].
    pub kind: u8,
    /// What the application on the other side wrote.
    pub body: &'d [u8],
    /// Its salt, by which a duplicate is known.
    pub salt: [u8; SALT_LEN],
}

/// Why a sending chain did not do its work. It is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum SealError {
    /// The chain has sealed [`MAX_MESSAGES`]: start a new one.
    Exhausted,
    /// Anything else.
    Failed(Error),
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted => f.write_str("the chain is used up: a new one is due"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for SealError {}

impl From<Error> for SealError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<ApiMisuse> for SealError {
    fn from(error: ApiMisuse) -> Self {
        Self::Failed(error.into())
    }
}

impl From<BufferError> for SealError {
    fn from(error: BufferError) -> Self {
        Self::Failed(error.into())
    }
}

/// Why a wrap was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum AcceptError {
    /// Its epochs are not higher than those seen before: it is repeated or old. Not answered with a refusal.
    Replayed,
    /// It is no wrap for this prekey, conversation and sender; answered by refusing with [`Reason::Unreadable`].
    Unreadable,
}

impl fmt::Display for AcceptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replayed => "the chain is not newer than the present one",
            Self::Unreadable => "the chain cannot be opened",
        })
    }
}

impl core::error::Error for AcceptError {}

/// Why an envelope was not opened. The chain is unchanged, and the buffer holds no plaintext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum OpenError {
    /// It was opened before: acknowledge it again, do nothing else.
    Duplicate {
        /// The message's number.
        n: u32,
    },
    /// Its number was passed longer ago than the chain remembers. Compare with what was recorded of this chain: an equal
    /// salt is a duplicate, another salt is [`Reason::Rewound`], no record at all is [`Reason::Unreadable`].
    Old {
        /// The message's number.
        n: u32,
        /// The salt that it came with.
        salt: [u8; SALT_LEN],
    },
    /// Refuse it to its sender: `Gap`, `Rewound`, `Unreadable`, or `Rekey` if it is of another chain.
    Refused(Reason),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Duplicate { n } => write!(f, "message {n} was opened before"),
            Self::Old { n, .. } => write!(f, "message {n} is older than the chain remembers"),
            Self::Refused(reason) => write!(f, "the envelope is refused: {reason}"),
        }
    }
}

impl core::error::Error for OpenError {}

const UNREADABLE: OpenError = OpenError::Refused(Reason::Unreadable);

/// The sending end of a chain.
///
/// Neither `Clone` nor storable: a copy could seal two texts under one number, and a backup could do so later.
pub struct SendingChain {
    sid: [u8; ID_LEN],
    /// Whether the conversation asks for a signature in every message.
    signed: bool,
    chain: Outgoing,
}

impl SendingChain {
    /// Starts the chain of `from` in `conversation`. `chain_epoch` is one more than that of the chain before, in this
    /// conversation, and durable before the first wrap leaves; 0 is first, and follows whenever [`BundleKeys::generate`]
    /// made the bundle's keys new.
    ///
    /// # Errors
    /// [`Error::Crypto`] if `rng` fails.
    pub fn start<R: TryCryptoRng + ?Sized>(
        from: &Member,
        conversation: &Conversation,
        chain_epoch: u32,
        rng: &mut R,
    ) -> Result<Self, Error> {
        let chain = Outgoing::start(from, conversation, chain_epoch, rng)?;
        Ok(Self { sid: conversation.sid, signed: conversation.signed, chain })
    }

    /// The chain's name. One that another sender already has is refused by the server: start again.
    pub const fn chain_id(&self) -> &[u8; CHAIN_ID_LEN] {
        &self.chain.receipts.chain_id
    }

    /// The conversation.
    pub const fn sid(&self) -> &[u8; ID_LEN] {
        &self.sid
    }

    /// The chain epoch that it was started with.
    pub const fn epoch(&self) -> u32 {
        self.chain.epoch
    }

    /// The number of the next message, which is also how many were sealed.
    pub const fn next(&self) -> u32 {
        self.chain.next
    }

    /// Wraps the chain, from its present number on, to the member with this bundle, into the first [`WRAP_LEN`] bytes of
    /// `out`. `own` is the sender's published bundle, `to` the member's pin. Returns [`WRAP_LEN`].
    ///
    /// # Errors
    /// [`SealError::Exhausted`]; [`ApiMisuse::InvalidArgument`] if `keys` are not those of `own` or `to_bundle` is not
    /// that of `to`; [`BufferError::TxFull`] if `out` is short; [`Error::Crypto`] if `rng` fails or the prekey is no key.
    pub fn wrap<R: TryCryptoRng + ?Sized>(
        &self,
        keys: &BundleKeys,
        own: &Bundle,
        to: &Member,
        to_bundle: &Bundle,
        rng: &mut R,
        out: &mut [u8],
    ) -> Result<usize, SealError> {
        self.chain.wrap(&self.sid, (keys, own), (to, to_bundle), rng, out)
    }

    /// Seals the next message into `out`, which needs `body` and [`ENVELOPE_OVERHEAD`], or [`SIGNED_OVERHEAD`] if it is
    /// to carry the sender's signature. `kind` is the application's, at most [`MAX_KIND`].
    ///
    /// # Errors
    /// [`SealError::Exhausted`]; [`ApiMisuse::InvalidArgument`] for another kind, or an unsigned message in a conversation
    /// that is signed; [`BufferError::TxFull`] if `out` is short. The number is not used up then.
    pub fn seal<A: Aead>(&mut self, signed: bool, kind: u8, body: &[u8], out: &mut [u8]) -> Result<Sealed, SealError> {
        if self.signed && !signed {
            self.chain.usable()?;
            return Err(ApiMisuse::InvalidArgument.into());
        }
        self.chain.seal::<A>(signed, kind, body, out)
    }

    /// The key that a member makes its receipts with.
    pub fn receipt_key(&self, member: &[u8; ID_LEN]) -> Secret<HASH_LEN> {
        self.chain.receipts.key_of(member)
    }

    /// Verifies that `recipient` made this receipt; `salt_of_to` is that of message `receipt.to` as it was sealed.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the receipt is not the recipient's word, or is about messages that were never sealed.
    pub fn verify_receipt(
        &self,
        recipient: &[u8; ID_LEN],
        receipt: &Receipt,
        salt_of_to: &[u8; SALT_LEN],
    ) -> Result<(), Error> {
        self.chain.verify_receipt(recipient, receipt, salt_of_to)
    }

    /// What is needed to verify receipts after this chain has ended. It seals and opens nothing, so it may be stored.
    pub const fn receipts(&self) -> &ReceiptVerifier {
        &self.chain.receipts
    }
}

/// The sending end without what the conversation says: what is kept of each chain, in few bytes.
struct Outgoing {
    epoch: u32,
    /// The number of the next message.
    next: u32,
    /// `CK_next`; those before are erased.
    key: Secret<HASH_LEN>,
    /// The private half alone: the public one is computed for each wrap, where it costs little beside the rest.
    signing: Secret<HASH_LEN>,
    receipts: ReceiptVerifier,
}

impl Outgoing {
    fn start<R: TryCryptoRng + ?Sized>(
        from: &Member,
        conversation: &Conversation,
        epoch: u32,
        rng: &mut R,
    ) -> Result<Self, Error> {
        let mut chain_id = [0; CHAIN_ID_LEN];
        rng.try_fill_bytes(&mut chain_id).map_err(|_| Error::Crypto)?;
        let mut draw = || Secret::random(&mut *rng).map_err(|_| Error::Crypto);
        let (key, signing, master) = (draw()?, draw()?, draw()?);
        let context = context(from, conversation, &chain_id, epoch);
        Ok(Self { epoch, next: 0, key, signing, receipts: ReceiptVerifier { chain_id, context, master } })
    }

    /// Whether there is a number left to be sealed.
    const fn usable(&self) -> Result<(), SealError> {
        if self.next < MAX_MESSAGES { Ok(()) } else { Err(SealError::Exhausted) }
    }

    /// [`SendingChain::wrap`], of a chain in the conversation of this `sid`.
    fn wrap<R: TryCryptoRng + ?Sized>(
        &self,
        sid: &[u8; ID_LEN],
        (keys, own): (&BundleKeys, &Bundle),
        (to, to_bundle): (&Member, &Bundle),
        rng: &mut R,
        out: &mut [u8],
    ) -> Result<usize, SealError> {
        self.usable()?;
        if !keys.wraps_for(own) || to_bundle.member() != *to {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let (head, rest) = out.split_first_chunk_mut::<WRAP_HEAD_LEN>().ok_or(BufferError::TxFull)?;
        let (enc, rest) = rest.split_first_chunk_mut::<HASH_LEN>().ok_or(BufferError::TxFull)?;
        let (text, rest) = rest.split_first_chunk_mut::<WRAP_TEXT_LEN>().ok_or(BufferError::TxFull)?;
        let (tag, _) = rest.split_first_chunk_mut::<TAG_LEN>().ok_or(BufferError::TxFull)?;

        let receipts = &self.receipts;
        let verifying = verifying_key(&self.signing);
        // PROTOCOL 9.3: the signature keeps the thief of a prekey from announcing chains in another's name.
        let announced = announcement(&receipts.context, own.epoch, self.next, self.key.expose(), &verifying);
        let signature = keys.signing_key().sign(&announced);
        let receipt_key = receipts.key_of(&to.id);
        Writer::new(text)
            .u32(self.next)
            .bytes(self.key.expose())
            .bytes(&verifying)
            .bytes(receipt_key.expose())
            .bytes(&signature);
        let info = wrap_info(&receipts.context, &own.hash(), &to_bundle.hash(), to_bundle.prekey_id);
        match hpke_seal(keys.exchange_key(), &to_bundle.prekey, &info, text, rng) {
            Ok(sealed) => (*enc, *tag) = sealed,
            Err(error) => {
                text.fill(0);
                return Err(error.into());
            }
        }
        let prekey_id = to_bundle.prekey_id;
        *head = WrapHeader { sid: *sid, chain_id: receipts.chain_id, chain_epoch: self.epoch, prekey_id }.encode();
        Ok(WRAP_LEN)
    }

    /// [`SendingChain::seal`], whatever the conversation asks for.
    fn seal<A: Aead>(&mut self, signed: bool, kind: u8, body: &[u8], out: &mut [u8]) -> Result<Sealed, SealError> {
        self.usable()?;
        if kind > MAX_KIND {
            return Err(ApiMisuse::InvalidArgument.into());
        }
        let overhead = if signed { SIGNED_OVERHEAD } else { ENVELOPE_OVERHEAD };
        let len = body.len().checked_add(overhead).ok_or(BufferError::TxFull)?;
        let out = out.get_mut(..len).ok_or(BufferError::TxFull)?;
        let (head, rest) = out.split_first_chunk_mut::<ENVELOPE_HEAD_LEN>().ok_or(BufferError::TxFull)?;
        let (text, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(BufferError::TxFull)?;

        let kind = if signed { kind | SIGNED } else { kind };
        let aad = message_context(&self.receipts.context, self.next);
        let step = Step::after(&self.key)?;
        let mut writer = Writer::new(text);
        writer.u8(kind).bytes(body);
        if signed {
            writer.bytes(&sign(&self.signing, &signed_message(&aad, kind, body)));
        }
        // The salt makes the nonce depend on the text: a state that went back cannot seal two texts under one nonce.
        let salt = truncate(&mac(step.salt.expose(), &[&aad, text]));
        let header = EnvelopeHeader { chain_id: self.receipts.chain_id, n: self.next, salt };
        match A::new(step.message.expose()).seal(&header.nonce(), &aad, text) {
            Ok(sealed) => *tag = sealed,
            Err(error) => {
                text.fill(0);
                return Err(error.into());
            }
        }
        *head = header.encode();
        self.key = step.next;
        self.next += 1;
        Ok(Sealed { n: header.n, salt, len })
    }

    /// [`SendingChain::verify_receipt`].
    fn verify_receipt(
        &self,
        recipient: &[u8; ID_LEN],
        receipt: &Receipt,
        salt_of_to: &[u8; SALT_LEN],
    ) -> Result<(), Error> {
        if receipt.to >= self.next {
            return Err(Error::Crypto);
        }
        self.receipts.verify(recipient, receipt, salt_of_to)
    }
}

/// Verifies the receipts of one chain, also after it was replaced.
#[derive(Clone)]
pub struct ReceiptVerifier {
    chain_id: [u8; CHAIN_ID_LEN],
    context: [u8; HASH_LEN],
    master: Secret<HASH_LEN>,
}

impl ReceiptVerifier {
    /// The chain whose receipts these are.
    pub const fn chain_id(&self) -> &[u8; CHAIN_ID_LEN] {
        &self.chain_id
    }

    /// Verifies that `recipient` made this receipt; `salt_of_to` is that of message `receipt.to` as it was sealed.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it is not the recipient's word. The home server's `accepted` and `stored` never are.
    pub fn verify(
        &self,
        recipient: &[u8; ID_LEN],
        receipt: &Receipt,
        salt_of_to: &[u8; SALT_LEN],
    ) -> Result<(), Error> {
        let Some(tag) = receipt.tag else {
            return Err(Error::Crypto);
        };
        if receipt.chain != self.chain_id || receipt.from > receipt.to || !is_recipients_word(receipt) {
            return Err(Error::Crypto);
        }
        let expected = receipt_tag(&self.key_of(recipient), &self.context, recipient, receipt, salt_of_to);
        if equal(&expected, &tag) { Ok(()) } else { Err(Error::Crypto) }
    }

    /// The bytes to store. They are secret: with them receipts can be forged, though nothing read.
    pub fn encode(&self) -> Secret<RECEIPT_VERIFIER_LEN> {
        Secret::new(join(&[&[VERIFIER_VERSION], &self.chain_id, &self.context, self.master.expose()]))
    }

    /// Reads what [`ReceiptVerifier::encode`] wrote.
    ///
    /// # Errors
    /// [`Error::Decode`] if it was not that.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        if reader.u8()? != VERIFIER_VERSION {
            return Err(Error::Decode);
        }
        let verifier =
            Self { chain_id: reader.array()?, context: reader.array()?, master: Secret::new(reader.array()?) };
        reader.end()?;
        Ok(verifier)
    }

    fn key_of(&self, member: &[u8; ID_LEN]) -> Secret<HASH_LEN> {
        expand(&self.master, &[b"ossicle receipt\0", member])
    }
}

/// The first number of a vacant chain, beyond all that exist.
const VACANT: u32 = u32::MAX;

/// The receiving end of a chain, with room for the keys of `SKIP` messages that have not come yet: 64 on devices, 256 on
/// hosts.
///
/// The state must be durable before `delivered` is sent: [`ReceivingChain::encode`].
pub struct ReceivingChain<const SKIP: usize> {
    chain: Incoming,
    /// The first number that this member can open.
    first: u32,
    /// The lowest and the highest of the skipped numbers that were forgotten; in this order if there are any.
    forgotten: (u32, u32),
    /// Whether the conversation asks for a signature in every message.
    signed: bool,
    salts: Salts,
    skipped: [Skipped; SKIP],
}

impl<const SKIP: usize> ReceivingChain<SKIP> {
    /// The most bytes that [`ReceivingChain::encode`] writes.
    pub const SNAPSHOT_LEN: usize = SNAPSHOT_FIXED_LEN + SALTS * (4 + SALT_LEN) + SKIP * (4 + HASH_LEN);

    /// Accepts a wrap. `prekey` is the half that the wrap names, `from` the pinned sender, whose verified bundle came
    /// along; `conversation` is this member's own view of it, and `last_seen` what [`ReceivingChain::epochs`] said of the
    /// newest chain of this sender in this conversation, ever. The wrap is erased, whatever the outcome.
    ///
    /// # Errors
    /// [`AcceptError::Replayed`] if the epochs are not higher than `last_seen`; [`AcceptError::Unreadable`] for all else.
    pub fn accept(
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        conversation: &Conversation,
        last_seen: Option<(u32, u32)>,
    ) -> Result<Self, AcceptError> {
        let mut chain = Self::vacant();
        chain.take(wrap, prekey, from, from_bundle, conversation, last_seen)?;
        Ok(chain)
    }

    /// A chain that opens nothing, to be replaced by the first one of a sender.
    pub const fn vacant() -> Self {
        Self {
            chain: Incoming::vacant(),
            first: VACANT,
            forgotten: NONE_FORGOTTEN,
            signed: false,
            salts: Salts::new(),
            skipped: [const { Skipped::free() }; SKIP],
        }
    }

    /// Whether this is the chain of that name, and not vacant.
    pub fn is_of(&self, chain_id: &[u8; CHAIN_ID_LEN]) -> bool {
        self.chain.is_of(chain_id)
    }

    /// Accepts a wrap like [`ReceivingChain::accept`] in the place of this chain, of the same sender in the same
    /// conversation: saves a device the copy. On an error this chain is unchanged.
    ///
    /// # Errors
    /// Those of [`ReceivingChain::accept`].
    pub fn replace(
        &mut self,
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        conversation: &Conversation,
    ) -> Result<(), AcceptError> {
        self.take(wrap, prekey, from, from_bundle, conversation, Some(self.epochs()))
    }

    fn take(
        &mut self,
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        conversation: &Conversation,
        last_seen: Option<(u32, u32)>,
    ) -> Result<(), AcceptError> {
        self.chain.take(wrap, prekey, from, from_bundle, conversation, last_seen)?;
        self.first = self.chain.next;
        self.forgotten = NONE_FORGOTTEN;
        self.signed = conversation.signed;
        self.salts = Salts::new();
        for skipped in &mut self.skipped {
            *skipped = Skipped::free();
        }
        Ok(())
    }

    /// Opens an envelope in place.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing has changed then, and `envelope` holds no plaintext.
    pub fn open<'d, A: Aead>(&mut self, envelope: &'d mut [u8]) -> Result<Opened<'d>, OpenError> {
        let header = EnvelopeHeader::decode(envelope).map_err(|_| UNREADABLE)?;
        self.check(&header)?;
        let (text, tag) = sealed_parts(envelope).ok_or(UNREADABLE)?;

        let parts = if header.n < self.chain.next {
            self.open_skipped::<A>(&header, text, tag)?
        } else {
            self.open_ahead::<A>(&header, text, tag)?
        };
        self.salts.remember(header.n, header.salt);
        Ok(parts.opened(&header, text))
    }

    /// The chain's name.
    pub const fn chain_id(&self) -> &[u8; CHAIN_ID_LEN] {
        &self.chain.chain_id
    }

    /// The epochs of the sender's bundle and of the chain: remember the highest of each sender and conversation for ever,
    /// so that no old wrap is accepted again.
    pub const fn epochs(&self) -> (u32, u32) {
        self.chain.epochs()
    }

    /// The number after the highest one that was opened.
    pub const fn next(&self) -> u32 {
        self.chain.next
    }

    /// The numbers that were skipped and can still be opened, in no order: to tell the user what is missing.
    pub fn missing(&self) -> impl Iterator<Item = u32> {
        self.skipped.iter().filter(|skipped| !skipped.is_free()).map(|skipped| skipped.n)
    }

    /// Erases the keys of skipped messages: after 7 days, or to go on past a gap that is too wide for them.
    pub fn forget_skipped(&mut self) {
        for skipped in self.skipped.iter_mut().filter(|skipped| !skipped.is_free()) {
            let (low, high) = self.forgotten;
            self.forgotten =
                if low > high { (skipped.n, skipped.n) } else { (low.min(skipped.n), high.max(skipped.n)) };
            *skipped = Skipped::free();
        }
    }

    /// The receipt of `me` that the messages `from..=to` were `delivered` or `opened`. `None` for another rung, if `to` is
    /// not among the last 16 that were opened, or if one of the others was never opened.
    pub fn receipt(&self, me: &[u8; ID_LEN], rung: Rung, from: u32, to: u32) -> Option<Receipt> {
        self.receipt_recorded(me, rung, from, to, self.salts.find(to)?)
    }

    /// Like [`ReceivingChain::receipt`], for a message `to` that may have been opened long ago: the caller recorded that it
    /// was, with this salt. So an old duplicate is acknowledged again, and `opened` can follow when the user has looked.
    pub fn receipt_recorded(
        &self,
        me: &[u8; ID_LEN],
        rung: Rung,
        from: u32,
        to: u32,
        salt_of_to: &[u8; SALT_LEN],
    ) -> Option<Receipt> {
        let rung_is_ours = matches!(rung, Rung::Delivered | Rung::Opened);
        if !rung_is_ours || from > to || from < self.first || to >= self.chain.next {
            return None;
        }
        let (low, high) = self.forgotten;
        let forgotten = from != to && low <= high && from <= high && low <= to;
        if forgotten || self.missing().any(|n| (from..=to).contains(&n)) {
            return None;
        }
        Some(self.chain.receipt(me, rung, from, to, salt_of_to))
    }

    /// The refusal of `me` of one message, as [`ReceivingChain::open`] said: the salt is the one that it came with.
    pub fn refusal(&self, me: &[u8; ID_LEN], reason: Reason, n: u32, salt: &[u8; SALT_LEN]) -> Receipt {
        self.chain.refusal(me, reason, n, salt)
    }

    /// Writes the whole state, secrets included, for [`ReceivingChain::decode`]. Returns its length, at most
    /// [`ReceivingChain::SNAPSHOT_LEN`].
    ///
    /// # Errors
    /// [`BufferError::TxFull`] if `out` is short.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, Error> {
        let mut writer = Writer::new(out);
        writer
            .u8(SNAPSHOT_VERSION)
            .u8(self.signed.into())
            .bytes(&self.chain.context)
            .bytes(&self.chain.chain_id)
            .u32(self.chain.bundle_epoch)
            .u32(self.chain.chain_epoch)
            .u32(self.first)
            .u32(self.chain.next)
            .u32(self.forgotten.0)
            .u32(self.forgotten.1)
            .bytes(self.chain.key.expose())
            .bytes(&self.chain.verifying)
            .bytes(self.chain.receipt_key.expose());
        let held = self.salts.oldest_first();
        writer.u8(u8::try_from(held.clone().count()).unwrap_or(u8::MAX));
        for (n, salt) in held {
            writer.u32(*n).bytes(salt);
        }
        writer.u16(u16::try_from(self.missing().count()).unwrap_or(u16::MAX));
        for skipped in self.skipped.iter().filter(|skipped| !skipped.is_free()) {
            writer.u32(skipped.n).bytes(skipped.key.expose());
        }
        writer.finish().ok_or_else(|| BufferError::TxFull.into())
    }

    /// Reads what [`ReceivingChain::encode`] wrote, with the same or a smaller `SKIP`.
    ///
    /// # Errors
    /// [`Error::Decode`] if it was not that, or holds more skipped keys than fit.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        if reader.u8()? != SNAPSHOT_VERSION {
            return Err(Error::Decode);
        }
        let signed = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Error::Decode),
        };
        let (context, chain_id) = (reader.array()?, reader.array()?);
        let (bundle_epoch, chain_epoch, first, next) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        let forgotten = (reader.u32()?, reader.u32()?);
        let (key, verifying, receipt_key) =
            (Secret::new(reader.array()?), reader.array()?, Secret::new(reader.array()?));
        let chain = Incoming { context, chain_id, bundle_epoch, chain_epoch, next, key, verifying, receipt_key };
        let mut chain = Self { chain, first, forgotten, signed, ..Self::vacant() };
        if first > next || next > MAX_MESSAGES {
            return Err(Error::Decode);
        }
        let salts = reader.u8()?;
        if usize::from(salts) > SALTS {
            return Err(Error::Decode);
        }
        for _ in 0..salts {
            let (n, salt) = (reader.u32()?, reader.array()?);
            if !(first..next).contains(&n) || chain.salts.find(n).is_some() {
                return Err(Error::Decode);
            }
            chain.salts.remember(n, salt);
        }
        for _ in 0..reader.u16()? {
            let (n, key) = (reader.u32()?, Secret::new(reader.array()?));
            let known = chain.salts.find(n).is_some() || chain.missing().any(|missing| missing == n);
            let free = chain.skipped.iter_mut().find(|skipped| skipped.is_free());
            match free {
                Some(skipped) if !known && (first..next).contains(&n) => *skipped = Skipped { n, key },
                _ => return Err(Error::Decode),
            }
        }
        reader.end()?;
        Ok(chain)
    }

    /// Whether the message with this header can be opened at all. Costs no cryptography: a number from the network must
    /// not decide how much is hashed.
    fn check(&self, header: &EnvelopeHeader) -> Result<(), OpenError> {
        let n = header.n;
        if !self.is_of(&header.chain_id) {
            return Err(OpenError::Refused(Reason::Rekey));
        }
        if n < self.first {
            return Err(UNREADABLE);
        }
        let Some(ahead) = n.checked_sub(self.chain.next) else {
            return match self.salts.find(n) {
                Some(salt) if *salt == header.salt => Err(OpenError::Duplicate { n }),
                Some(_) => Err(OpenError::Refused(Reason::Rewound)),
                None if self.missing().any(|missing| missing == n) => Ok(()),
                None => Err(OpenError::Old { n, salt: header.salt }),
            };
        };
        let room = self.skipped.iter().filter(|skipped| skipped.is_free()).count();
        if usize::try_from(ahead).map_or(true, |ahead| ahead > room) {
            return Err(OpenError::Refused(Reason::Gap));
        }
        if n >= MAX_MESSAGES { Err(UNREADABLE) } else { Ok(()) }
    }

    fn open_skipped<A: Aead>(
        &mut self,
        header: &EnvelopeHeader,
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<Parts, OpenError> {
        let (chain, signed) = (&self.chain, self.signed);
        let skipped = self.skipped.iter_mut().find(|skipped| skipped.n == header.n).ok_or(UNREADABLE)?;
        let parts = chain.open_text::<A>(signed, &skipped.key, header, text, tag)?;
        *skipped = Skipped::free();
        Ok(parts)
    }

    fn open_ahead<A: Aead>(
        &mut self,
        header: &EnvelopeHeader,
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<Parts, OpenError> {
        // The keys on the way are put into free places, which stay free until the message has proved itself.
        match self.try_ahead::<A>(header, text, tag) {
            Ok((parts, key)) => {
                for (skipped, n) in free(&mut self.skipped).zip(self.chain.next..header.n) {
                    skipped.n = n;
                }
                self.chain.key = key;
                self.chain.next = header.n + 1;
                Ok(parts)
            }
            Err(error) => {
                for (skipped, _) in free(&mut self.skipped).zip(self.chain.next..header.n) {
                    *skipped = Skipped::free();
                }
                Err(error)
            }
        }
    }

    fn try_ahead<A: Aead>(
        &mut self,
        header: &EnvelopeHeader,
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(Parts, Secret<HASH_LEN>), OpenError> {
        let mut key = self.chain.key.clone();
        for (skipped, _) in free(&mut self.skipped).zip(self.chain.next..header.n) {
            let step = Step::after(&key).map_err(|_| UNREADABLE)?;
            skipped.key = step.message;
            key = step.next;
        }
        let step = Step::after(&key).map_err(|_| UNREADABLE)?;
        let parts = self.chain.open_text::<A>(self.signed, &step.message, header, text, tag)?;
        Ok((parts, step.next))
    }
}

/// The receiving end without what depends on how much its holder remembers.
struct Incoming {
    context: [u8; HASH_LEN],
    chain_id: [u8; CHAIN_ID_LEN],
    bundle_epoch: u32,
    chain_epoch: u32,
    /// The number after the highest one opened; [`VACANT`] where there is no chain.
    next: u32,
    /// `CK_next`.
    key: Secret<HASH_LEN>,
    verifying: [u8; HASH_LEN],
    receipt_key: Secret<HASH_LEN>,
}

impl Incoming {
    const fn vacant() -> Self {
        Self {
            context: [0; HASH_LEN],
            chain_id: [0; CHAIN_ID_LEN],
            // Bundles begin with epoch 1, so that the first wrap is newer.
            bundle_epoch: 0,
            chain_epoch: 0,
            // Beyond the last number: its keys, which everybody knows, are never used.
            next: VACANT,
            key: Secret::new([0; HASH_LEN]),
            verifying: [0; HASH_LEN],
            receipt_key: Secret::new([0; HASH_LEN]),
        }
    }

    fn is_of(&self, chain_id: &[u8; CHAIN_ID_LEN]) -> bool {
        self.next != VACANT && self.chain_id == *chain_id
    }

    const fn epochs(&self) -> (u32, u32) {
        (self.bundle_epoch, self.chain_epoch)
    }

    /// Accepts a wrap, which is erased, whatever the outcome. On an error this chain is unchanged.
    ///
    /// No frame of its own: below it signatures are verified, which is the deepest that a device's stack goes.
    #[inline(always)]
    fn take(
        &mut self,
        wrap: &mut [u8],
        prekey: &Prekey,
        from: &Member,
        from_bundle: &Bundle,
        conversation: &Conversation,
        last_seen: Option<(u32, u32)>,
    ) -> Result<(), AcceptError> {
        let context = open_wrap(wrap, prekey, from, from_bundle, conversation, last_seen)?;
        // Both were readable when it was opened. If ever not, nothing must pass for a chain that was taken.
        let (Ok(header), Some(text)) = (WrapHeader::decode(wrap), WrapText::read(wrap)) else {
            wrap.fill(0);
            return Err(AcceptError::Unreadable);
        };
        self.context = context;
        self.chain_id = header.chain_id;
        self.bundle_epoch = from_bundle.epoch;
        self.chain_epoch = header.chain_epoch;
        self.next = text.first;
        self.key = Secret::new(*text.key);
        self.verifying = *text.verifying;
        self.receipt_key = Secret::new(*text.receipt_key);
        wrap.fill(0);
        Ok(())
    }

    /// Opens a text of this chain in place. On an error it is erased.
    fn open_text<A: Aead>(
        &self,
        must_be_signed: bool,
        key: &Secret<HASH_LEN>,
        header: &EnvelopeHeader,
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<Parts, OpenError> {
        let aad = message_context(&self.context, header.n);
        let opened = match decrypt::<A>(key, header, &aad, text, tag) {
            Ok(()) => parts(&aad, &self.verifying, must_be_signed, text),
            Err(_) => None,
        };
        if opened.is_none() {
            text.fill(0);
        }
        opened.ok_or(UNREADABLE)
    }

    fn receipt(&self, me: &[u8; ID_LEN], rung: Rung, from: u32, to: u32, salt: &[u8; SALT_LEN]) -> Receipt {
        self.tagged(me, Receipt { rung, reason: None, chain: self.chain_id, from, to, tag: None }, salt)
    }

    fn refusal(&self, me: &[u8; ID_LEN], reason: Reason, n: u32, salt: &[u8; SALT_LEN]) -> Receipt {
        let refused =
            Receipt { rung: Rung::Refused, reason: Some(reason), chain: self.chain_id, from: n, to: n, tag: None };
        self.tagged(me, refused, salt)
    }

    fn tagged(&self, me: &[u8; ID_LEN], receipt: Receipt, salt: &[u8; SALT_LEN]) -> Receipt {
        Receipt { tag: Some(receipt_tag(&self.receipt_key, &self.context, me, &receipt, salt)), ..receipt }
    }
}

const SNAPSHOT_FIXED_LEN: usize = 2 + HASH_LEN + CHAIN_ID_LEN + 6 * 4 + 3 * HASH_LEN + 1 + 2;
const NONE_FORGOTTEN: (u32, u32) = (FREE, 0);

/// One message key that waits for its message.
struct Skipped {
    /// [`FREE`] if the place is free.
    n: u32,
    key: Secret<HASH_LEN>,
}

impl Skipped {
    const fn free() -> Self {
        Self { n: FREE, key: Secret::new([0; HASH_LEN]) }
    }

    const fn is_free(&self) -> bool {
        self.n == FREE
    }
}

fn free(skipped: &mut [Skipped]) -> impl Iterator<Item = &mut Skipped> {
    skipped.iter_mut().filter(|skipped| skipped.is_free())
}

/// The numbers and salts of the last messages that were opened, in a ring.
struct Salts {
    held: [(u32, [u8; SALT_LEN]); SALTS],
    /// Where the oldest is.
    oldest: usize,
}

impl Salts {
    const fn new() -> Self {
        Self { held: [(FREE, [0; SALT_LEN]); SALTS], oldest: 0 }
    }

    fn remember(&mut self, n: u32, salt: [u8; SALT_LEN]) {
        if let Some(place) = self.held.get_mut(self.oldest) {
            *place = (n, salt);
        }
        self.oldest = (self.oldest + 1) % SALTS;
    }

    fn find(&self, n: u32) -> Option<&[u8; SALT_LEN]> {
        self.held.iter().find(|(held, _)| *held == n && n != FREE).map(|(_, salt)| salt)
    }

    fn oldest_first(&self) -> impl Iterator<Item = &(u32, [u8; SALT_LEN])> + Clone {
        let (newer, older) = self.held.split_at_checked(self.oldest).unwrap_or_default();
        older.iter().chain(newer).filter(|(n, _)| *n != FREE)
    }
}

/// One step of the ratchet: `MK || SK || CK` (PROTOCOL 9.4).
struct Step {
    message: Secret<HASH_LEN>,
    salt: Secret<HASH_LEN>,
    next: Secret<HASH_LEN>,
}

impl Step {
    /// # Errors
    /// None: the length is constant.
    fn after(key: &Secret<HASH_LEN>) -> Result<Self, Error> {
        let keys: Secret<{ 3 * HASH_LEN }> = expand(key, &[b"ossicle step\0"]);
        let ([message, salt, next], []) = keys.expose().as_chunks() else {
            return Err(Error::Crypto);
        };
        Ok(Self { message: Secret::new(*message), salt: Secret::new(*salt), next: Secret::new(*next) })
    }
}

/// What an opened text consists of.
struct Parts {
    signed: bool,
    kind: u8,
    body_len: usize,
}

impl Parts {
    /// The message with this header, of an opened text.
    fn opened<'d>(&self, header: &EnvelopeHeader, text: &'d [u8]) -> Opened<'d> {
        let body = text.get(1..).and_then(|rest| rest.get(..self.body_len)).unwrap_or_default();
        Opened { n: header.n, signed: self.signed, kind: self.kind, body, salt: header.salt }
    }
}

/// Text and tag of an envelope.
fn sealed_parts(envelope: &mut [u8]) -> Option<(&mut [u8], &mut [u8; TAG_LEN])> {
    let (_, rest) = envelope.split_first_chunk_mut::<ENVELOPE_HEAD_LEN>()?;
    rest.split_last_chunk_mut::<TAG_LEN>()
}

/// Apart, so that the cipher's state has left a device's stack before a signature is verified on it.
#[inline(never)]
fn decrypt<A: Aead>(
    key: &Secret<HASH_LEN>,
    header: &EnvelopeHeader,
    aad: &[u8],
    text: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), Error> {
    A::new(key.expose()).open(&header.nonce(), aad, text, tag)
}

fn parts(aad: &[u8; HASH_LEN + 4], verifying: &[u8; HASH_LEN], must_be_signed: bool, text: &[u8]) -> Option<Parts> {
    let (&kind, rest) = text.split_first()?;
    if kind & SIGNED == 0 {
        return (!must_be_signed).then_some(Parts { signed: false, kind, body_len: rest.len() });
    }
    let (body, signature) = rest.split_last_chunk()?;
    verify(verifying, &signed_message(aad, kind, body), signature).ok()?;
    Some(Parts { signed: true, kind: kind & MAX_KIND, body_len: body.len() })
}

/// Opens a wrap in place and checks everything about it. On an error it is erased; else its text is for
/// [`WrapText::read`], and to be erased then.
///
/// In two steps that are each gone when the next one begins: both compute on curves, which is the deepest that a
/// device's stack goes.
#[inline(always)]
fn open_wrap(
    wrap: &mut [u8],
    prekey: &Prekey,
    from: &Member,
    from_bundle: &Bundle,
    conversation: &Conversation,
    last_seen: Option<(u32, u32)>,
) -> Result<[u8; HASH_LEN], AcceptError> {
    let opened = decrypt_wrap(wrap, prekey, from, from_bundle, conversation, last_seen).and_then(|context| {
        match is_announced(&context, from_bundle, wrap) {
            true => Ok(context),
            false => Err(AcceptError::Unreadable),
        }
    });
    if opened.is_err() {
        wrap.fill(0);
    }
    opened
}

/// Decrypts a wrap in place and returns its `CTX`.
#[inline(never)]
fn decrypt_wrap(
    wrap: &mut [u8],
    prekey: &Prekey,
    from: &Member,
    from_bundle: &Bundle,
    conversation: &Conversation,
    last_seen: Option<(u32, u32)>,
) -> Result<[u8; HASH_LEN], AcceptError> {
    let header = WrapHeader::decode(wrap).map_err(|_| AcceptError::Unreadable)?;
    if last_seen.is_some_and(|seen| (from_bundle.epoch, header.chain_epoch) <= seen) {
        return Err(AcceptError::Replayed);
    }
    if header.sid != conversation.sid || header.prekey_id != prekey.id() || from_bundle.member() != *from {
        return Err(AcceptError::Unreadable);
    }
    let context = context(&from_bundle.member(), conversation, &header.chain_id, header.chain_epoch);
    let info = wrap_info(&context, &from_bundle.hash(), prekey.bundle(), prekey.id());
    let (enc, text, tag) = wrap_parts(wrap).ok_or(AcceptError::Unreadable)?;
    hpke_open(prekey.key(), &from_bundle.exchange, &info, enc, text, tag).map_err(|_| AcceptError::Unreadable)?;
    Ok(context)
}

/// Encapsulated key, text and tag of a wrap.
fn wrap_parts(wrap: &mut [u8]) -> Option<(&mut [u8; HASH_LEN], &mut [u8; WRAP_TEXT_LEN], &mut [u8; TAG_LEN])> {
    let (_, rest) = wrap.split_first_chunk_mut::<WRAP_HEAD_LEN>()?;
    let (enc, rest) = rest.split_first_chunk_mut::<HASH_LEN>()?;
    let (text, rest) = rest.split_first_chunk_mut::<WRAP_TEXT_LEN>()?;
    let (tag, _) = rest.split_first_chunk_mut::<TAG_LEN>()?;
    Some((enc, text, tag))
}

/// Whether an opened wrap announces a chain with its sender's signature.
#[inline(never)]
fn is_announced(context: &[u8; HASH_LEN], from_bundle: &Bundle, wrap: &[u8]) -> bool {
    let Some(text) = WrapText::read(wrap) else { return false };
    let announced = announcement(context, from_bundle.epoch, text.first, text.key, text.verifying);
    text.first < MAX_MESSAGES && verify(&from_bundle.verifying, &announced, text.signature).is_ok()
}

/// What an opened wrap says, in place.
struct WrapText<'w> {
    first: u32,
    key: &'w [u8; HASH_LEN],
    verifying: &'w [u8; HASH_LEN],
    receipt_key: &'w [u8; HASH_LEN],
    signature: &'w [u8; SIGNATURE_LEN],
}

impl<'w> WrapText<'w> {
    fn read(wrap: &'w [u8]) -> Option<Self> {
        let text = wrap.get(WRAP_HEAD_LEN + HASH_LEN..)?;
        let (first, text) = text.split_first_chunk()?;
        let (key, text) = text.split_first_chunk()?;
        let (verifying, text) = text.split_first_chunk()?;
        let (receipt_key, text) = text.split_first_chunk()?;
        let signature = text.first_chunk()?;
        Some(Self { first: u32::from_be_bytes(*first), key, verifying, receipt_key, signature })
    }
}

/// `CTX`: who speaks to whom, where, in which chain. Everything in a chain is bound to it.
fn context(
    from: &Member,
    conversation: &Conversation,
    chain_id: &[u8; CHAIN_ID_LEN],
    chain_epoch: u32,
) -> [u8; HASH_LEN] {
    hash(&[
        b"ossicle chain\0",
        &from.id,
        &from.key,
        &conversation.sid,
        &conversation.members,
        chain_id,
        &chain_epoch.to_be_bytes(),
    ])
}

/// What the sender signs to announce a chain. It holds the epoch of his bundle, so that who opened an old wrap cannot pass
/// its chain off as one of a newer bundle.
fn announcement(
    context: &[u8; HASH_LEN],
    bundle_epoch: u32,
    first: u32,
    key: &[u8; HASH_LEN],
    verifying: &[u8; HASH_LEN],
) -> [u8; ANNOUNCEMENT_LEN] {
    let (bundle_epoch, first) = (bundle_epoch.to_be_bytes(), first.to_be_bytes());
    join(&[b"ossicle announce\0", context, &bundle_epoch, &first, &hash(&[key]), verifying])
}

fn wrap_info(
    context: &[u8; HASH_LEN],
    from_bundle: &[u8; HASH_LEN],
    to_bundle: &[u8; HASH_LEN],
    prekey_id: u32,
) -> [u8; WRAP_INFO_LEN] {
    join(&[b"ossicle wrap\0", context, from_bundle, to_bundle, &prekey_id.to_be_bytes()])
}

/// `CTX || n`: the AAD of a message, and the head of all that is hashed for it.
fn message_context(context: &[u8; HASH_LEN], n: u32) -> [u8; HASH_LEN + 4] {
    join(&[context, &n.to_be_bytes()])
}

fn signed_message(aad: &[u8; HASH_LEN + 4], kind: u8, body: &[u8]) -> [u8; 12 + HASH_LEN] {
    join(&[b"ossicle msg\0", &hash(&[aad, &[kind], body])])
}

/// Whether this is a receipt that a recipient tags: delivered or opened, or refused with a reason.
const fn is_recipients_word(receipt: &Receipt) -> bool {
    match receipt.rung {
        Rung::Delivered | Rung::Opened => receipt.reason.is_none(),
        Rung::Refused => receipt.reason.is_some(),
        _ => false,
    }
}

/// PROTOCOL 10.3. The reason of a refusal follows its rung; the other rungs have none, so that the input is one of
/// two lengths and never ambiguous.
fn receipt_tag(
    key: &Secret<HASH_LEN>,
    context: &[u8; HASH_LEN],
    recipient: &[u8; ID_LEN],
    receipt: &Receipt,
    salt: &[u8; SALT_LEN],
) -> [u8; RECEIPT_TAG_LEN] {
    let reason = receipt.reason.map(|reason| [reason.code()]);
    let reason = reason.as_ref().map_or(&[][..], |reason| reason);
    let (from, to) = (receipt.from.to_be_bytes(), receipt.to.to_be_bytes());
    let rung = [receipt.rung.code()];
    truncate(&mac(key.expose(), &[b"ossicle rcpt\0", context, recipient, &rung, reason, &from, &to, salt]))
}

/// The first `N` bytes of a digest.
fn truncate<const N: usize>(digest: &[u8; HASH_LEN]) -> [u8; N] {
    const { assert!(N <= HASH_LEN, "a digest has no more bytes") };
    let mut first = [0; N];
    for (to, from) in first.iter_mut().zip(digest) {
        *to = *from;
    }
    first
}

mod group;

pub use group::GroupChains;

#[cfg(test)]
mod tests;
