//! The identity page: everything that makes a generic image one particular device, in one region of flash (PROTOCOL 12).
//!
//! `ossicle enroll` writes it, firmware reads it in place. It holds the device's RSA private key, which exists nowhere
//! else, the server to dial and the owner to report to. A page that is not whole and exact is refused, and says how.

use crate::crypto::{MAX_RSA_LEN, PublicKey};
use crate::envelope::{BUNDLE_LEN, Bundle};
use crate::error::BufferError;
use crate::error::Error;
use crate::wire::{ID_LEN, MAX_NAME_LEN, Reader, Writer};

/// Bytes of the flash region that a page has to itself.
pub const MAX_PAGE_LEN: usize = 2048;
/// Bytes of the longest modulus of a server or owner that a device verifies: 3072 bits.
pub const MAX_PAGE_MODULUS_LEN: usize = 384;

const MAGIC: [u8; 8] = *b"OSSICLE\0";
/// A page without a policy, which is none.
const VERSION: u16 = 1;
/// A page that ends in a policy. What does not know them refuses it, rather than obey half of it.
const POLICY_VERSION: u16 = 2;
/// The policy of [`GroupPolicy::Owner`]; [`GroupPolicy::None`] needs none, nor the version that has one.
const OWNER_INVITES: u8 = 1;
const POLICY_LEN: usize = 1;
/// Magic, version, length and checksum.
const HEAD_LEN: usize = 16;

/// A device's identity. Borrows from the page, and the key stays where it is.
#[derive(Clone, Copy)]
pub struct IdentityPage<'p> {
    /// The device's id.
    pub id: [u8; ID_LEN],
    /// Its name.
    pub name: &'p str,
    /// Its RSA key of 2048 bits.
    pub key: PageKey<'p>,
    /// The IPv4 address to dial.
    pub address: [u8; 4],
    /// The TCP port to dial.
    pub port: u16,
    /// The server's key, of 2048 or 3072 bits.
    pub server: PublicKey<'p>,
    /// To whom the device reports, and whom it obeys.
    pub owner: PageOwner<'p>,
    /// Whose invitations to groups the device accepts.
    pub groups: GroupPolicy,
}

/// Whose invitations to groups a device accepts: [`crate::Client::accept_invitations`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum GroupPolicy {
    /// Nobody's: all of them expire.
    #[default]
    None,
    /// Its owner's.
    Owner,
}

/// The raw parts of an RSA private key of 2048 bits, big endian.
#[derive(Clone, Copy)]
pub struct PageKey<'p> {
    /// The private exponent.
    pub d: &'p [u8; 256],
    /// A prime.
    pub p: &'p [u8; 128],
    /// The other prime.
    pub q: &'p [u8; 128],
}

/// A device's owner.
#[derive(Clone, Copy)]
pub struct PageOwner<'p> {
    /// The owner's id.
    pub id: [u8; ID_LEN],
    /// The owner's name.
    pub name: &'p str,
    /// The owner's key, of 2048 or 3072 bits.
    pub key: PublicKey<'p>,
    /// The owner's bundle when the page was made: the oldest one that the device takes.
    pub bundle: Bundle,
    /// The owner's signature over it.
    pub signature: &'p [u8],
}

/// Why a page is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum PageError {
    /// There is no page: erased flash, or something else.
    Missing,
    /// A page of another version.
    Version,
    /// The checksum or the layout is wrong.
    Broken,
}

impl core::fmt::Display for PageError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Missing => "there is no identity page: make one with `ossicle enroll` and load it",
            Self::Version => "the identity page is of another version: make a new one with `ossicle enroll`",
            Self::Broken => "the identity page is broken: load it again, or make a new one with `ossicle enroll`",
        })
    }
}

impl core::error::Error for PageError {}

impl<'p> IdentityPage<'p> {
    /// Writes the page and returns its length.
    ///
    /// # Errors
    /// [`BufferError::MessageTooLong`] if a field is longer than a page has room for, or a key is not one that a device
    /// can use; [`BufferError::TxFull`] if `out` is too short.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, Error> {
        let too_long = Err(BufferError::MessageTooLong { max: MAX_PAGE_LEN }.into());
        let keys = [self.server, self.owner.key];
        let names = [self.name, self.owner.name];
        if keys.iter().any(|key| key.modulus().len() > MAX_PAGE_MODULUS_LEN)
            || names.iter().any(|name| name.is_empty() || name.len() > MAX_NAME_LEN)
            || self.owner.signature.len() != self.owner.key.signature_len()
        {
            return too_long;
        }
        let (head, body) = out.split_at_mut_checked(HEAD_LEN).ok_or(BufferError::TxFull)?;
        let mut writer = Writer::new(body);
        writer.bytes(&self.id).short(self.name.as_bytes());
        writer.bytes(self.key.d).bytes(self.key.p).bytes(self.key.q);
        writer.bytes(&self.address).u16(self.port);
        put_modulus(&mut writer, self.server);
        writer.bytes(&self.owner.id).short(self.owner.name.as_bytes());
        put_modulus(&mut writer, self.owner.key);
        writer.bytes(&self.owner.bundle.encode()).bytes(self.owner.signature);
        let version = match self.groups {
            GroupPolicy::None => VERSION,
            GroupPolicy::Owner => {
                writer.u8(OWNER_INVITES);
                POLICY_VERSION
            }
        };
        let len = writer.finish().ok_or(BufferError::TxFull)?;
        let total = len.saturating_add(HEAD_LEN);
        let Ok(page_len) = u16::try_from(total) else {
            return too_long;
        };
        if total > MAX_PAGE_LEN {
            return too_long;
        }
        let checksum = checksum(page_len, body.get(..len).unwrap_or_default());
        let mut writer = Writer::new(head);
        writer.bytes(&MAGIC).u16(version).u16(page_len).u32(checksum);
        Ok(total)
    }

    /// Reads the page at the front of `region`; what stands behind it does not matter.
    ///
    /// # Errors
    /// [`PageError`], by what is wrong.
    pub fn decode(region: &'p [u8]) -> Result<Self, PageError> {
        let mut reader = Reader::new(region);
        if reader.array() != Ok(MAGIC) {
            return Err(PageError::Missing);
        }
        let has_policy = match reader.u16() {
            Ok(VERSION) => false,
            Ok(POLICY_VERSION) => true,
            _ => return Err(PageError::Version),
        };
        Self::decode_body(region, reader, has_policy).map_err(|_| PageError::Broken)
    }

    fn decode_body(region: &'p [u8], mut reader: Reader<'p>, has_policy: bool) -> Result<Self, Error> {
        let page_len = reader.u16()?;
        let sum = reader.u32()?;
        let body = region.get(HEAD_LEN..usize::from(page_len)).ok_or(Error::Decode)?;
        if sum != checksum(page_len, body) {
            return Err(Error::Decode);
        }
        let mut reader = Reader::new(body);
        let id = reader.array()?;
        let name = name(&mut reader)?;
        let key = PageKey { d: reader.array_ref()?, p: reader.array_ref()?, q: reader.array_ref()? };
        let address = reader.array()?;
        let port = reader.u16()?;
        let server = modulus(&mut reader)?;
        let owner_id = reader.array()?;
        let owner_name = self::name(&mut reader)?;
        let owner_key = modulus(&mut reader)?;
        let bundle = Bundle::decode(reader.bytes(BUNDLE_LEN)?)?;
        let signature = reader.bytes(owner_key.signature_len())?;
        let groups = match has_policy {
            false => GroupPolicy::None,
            true if reader.u8()? == OWNER_INVITES => GroupPolicy::Owner,
            true => return Err(Error::Decode),
        };
        reader.end()?;
        let owner = PageOwner { id: owner_id, name: owner_name, key: owner_key, bundle, signature };
        Ok(Self { id, name, key, address, port, server, owner, groups })
    }
}

/// CRC-32 as in Ethernet and zip, over the length and all that stands behind the head.
fn checksum(page_len: u16, body: &[u8]) -> u32 {
    let crc = crc::Crc::<u32, crc::NoTable>::new(&crc::CRC_32_ISO_HDLC);
    let mut digest = crc.digest();
    digest.update(&page_len.to_be_bytes());
    digest.update(body);
    digest.finalize()
}

fn put_modulus(writer: &mut Writer<'_>, key: PublicKey<'_>) {
    writer.u16(u16::try_from(key.modulus().len()).unwrap_or(0)).bytes(key.modulus());
}

fn modulus<'p>(reader: &mut Reader<'p>) -> Result<PublicKey<'p>, Error> {
    let len = usize::from(reader.u16()?);
    if len > MAX_PAGE_MODULUS_LEN {
        return Err(Error::Decode);
    }
    PublicKey::from_modulus(reader.bytes(len)?).map_err(|_| Error::Decode)
}

fn name<'p>(reader: &mut Reader<'p>) -> Result<&'p str, Error> {
    match core::str::from_utf8(reader.short()?) {
        Ok(name) if !name.is_empty() && name.len() <= MAX_NAME_LEN => Ok(name),
        _ => Err(Error::Decode),
    }
}

impl<'d> Reader<'d> {
    fn array_ref<const N: usize>(&mut self) -> Result<&'d [u8; N], Error> {
        self.bytes(N)?.first_chunk().ok_or(Error::Decode)
    }
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing;

// The longest page: both names and both keys at their limits.
const _: () = assert!(
    HEAD_LEN
        + ID_LEN
        + 1
        + MAX_NAME_LEN
        + MAX_RSA_LEN
        + 6
        + 2
        + MAX_PAGE_MODULUS_LEN
        + ID_LEN
        + 1
        + MAX_NAME_LEN
        + 2
        + MAX_PAGE_MODULUS_LEN
        + BUNDLE_LEN
        + MAX_PAGE_MODULUS_LEN
        + POLICY_LEN
        <= MAX_PAGE_LEN
);

#[cfg(test)]
mod tests {
    use super::*;

    fn example(modulus: &[u8]) -> ([u8; MAX_PAGE_LEN], usize) {
        with_policy(modulus, GroupPolicy::Owner)
    }

    fn with_policy(modulus: &[u8], groups: GroupPolicy) -> ([u8; MAX_PAGE_LEN], usize) {
        let key = PublicKey::from_modulus(modulus).unwrap();
        let bundle = Bundle {
            id: [1; 16],
            key: [2; 32],
            epoch: 3,
            exchange: [4; 32],
            prekey: [5; 32],
            prekey_id: 6,
            verifying: [7; 32],
            previous: [8; 32],
        };
        let page = IdentityPage {
            id: [9; 16],
            name: "sensor-01",
            key: PageKey { d: &[1; 256], p: &[2; 128], q: &[3; 128] },
            address: [10, 0, 2, 2],
            port: 5150,
            server: key,
            owner: PageOwner { id: [1; 16], name: "alice", key, bundle, signature: modulus },
            groups,
        };
        let mut region = [0xff; MAX_PAGE_LEN];
        let len = page.encode(&mut region).unwrap();
        (region, len)
    }

    #[test]
    fn pages_round_trip_with_the_longest_keys() {
        let (region, len) = example(&[0xff; MAX_PAGE_MODULUS_LEN]);
        assert!(len <= MAX_PAGE_LEN);
        let page = IdentityPage::decode(&region).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((page.name, page.port, page.owner.name), ("sensor-01", 5150, "alice"));
        assert_eq!(page.owner.bundle.prekey_id, 6);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        for groups in [GroupPolicy::None, GroupPolicy::Owner] {
            let (region, len) = with_policy(&[0xff; 256], groups);
            for bit in 0..len * 8 {
                let mut broken = region;
                broken[bit / 8] ^= 1 << (bit % 8);
                assert!(IdentityPage::decode(&broken).is_err(), "bit {bit}");
            }
            for cut in 0..len {
                assert!(IdentityPage::decode(&region[..cut]).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_page_without_a_policy_is_of_the_first_version_and_accepts_nothing() {
        let (none, none_len) = with_policy(&[0xff; 256], GroupPolicy::None);
        let (owner, owner_len) = with_policy(&[0xff; 256], GroupPolicy::Owner);
        assert_eq!((none[9], owner[9], owner_len), (1, 2, none_len + 1));
        assert_eq!(none[HEAD_LEN..none_len], owner[HEAD_LEN..none_len]);
        let policy = |region: &[u8]| IdentityPage::decode(region).map(|page| page.groups);
        assert_eq!((policy(&none), policy(&owner)), (Ok(GroupPolicy::None), Ok(GroupPolicy::Owner)));
        // Neither version is read as the other, and no other policy as one that is known.
        for (mut region, len, version) in [(none, none_len, 2), (owner, owner_len, 1)] {
            region[9] = version;
            assert_eq!(policy(&region), Err(PageError::Broken), "{len} bytes of version {version}");
        }
        for other in [0, 2, 3, 0xff] {
            let mut region = owner;
            region[owner_len - 1] = other;
            let sum = checksum(u16::try_from(owner_len).unwrap(), &region[HEAD_LEN..owner_len]);
            region[12..16].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(policy(&region), Err(PageError::Broken), "policy {other}");
        }
        let mut region = owner;
        region[9] = 3;
        assert_eq!(policy(&region), Err(PageError::Version));
    }

    #[test]
    fn erased_flash_is_no_page_and_a_server_of_4096_bits_is_refused() {
        for erased in [0, 0xff] {
            assert_eq!(IdentityPage::decode(&[erased; MAX_PAGE_LEN]).err(), Some(PageError::Missing));
        }
        let (region, _) = example(&[0xff; 256]);
        let page = IdentityPage::decode(&region).unwrap_or_else(|error| panic!("{error}"));
        let server = PublicKey::from_modulus(&[0xff; 512]).unwrap();
        let refused = IdentityPage { server, ..page }.encode(&mut [0; MAX_PAGE_LEN]);
        assert_eq!(refused, Err(BufferError::MessageTooLong { max: MAX_PAGE_LEN }.into()));
    }

    #[test]
    fn what_does_not_fit_a_page_is_refused_and_each_error_says_what_to_do() {
        use std::string::ToString;

        let (region, len) = example(&[0xff; 256]);
        let page = IdentityPage::decode(&region).unwrap_or_else(|error| panic!("{error}"));
        for room in [0, HEAD_LEN - 1, HEAD_LEN, len - 1] {
            assert_eq!(page.encode(&mut std::vec![0; room]), Err(BufferError::TxFull.into()), "{room}");
        }
        let too_long = Err(BufferError::MessageTooLong { max: MAX_PAGE_LEN }.into());
        for name in ["", &"x".repeat(MAX_NAME_LEN + 1)] {
            assert_eq!(IdentityPage { name, ..page }.encode(&mut [0; MAX_PAGE_LEN]), too_long);
            let owner = PageOwner { name, ..page.owner };
            assert_eq!(IdentityPage { owner, ..page }.encode(&mut [0; MAX_PAGE_LEN]), too_long);
        }
        let owner = PageOwner { signature: &[1; 255], ..page.owner };
        assert_eq!(IdentityPage { owner, ..page }.encode(&mut [0; MAX_PAGE_LEN]), too_long);
        for error in [PageError::Missing, PageError::Version, PageError::Broken] {
            assert!(error.to_string().contains("ossicle enroll"), "{error}");
        }
    }
}
