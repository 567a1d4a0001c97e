//! `ossicle enroll`: a device's identity page.
//!
//! The device's key is made here, enrolled with the rights of this home, written into the page and kept nowhere else. The
//! page is complete on disk, under another name, before the server hears of the device; it gets its own name once the
//! device is enrolled. So a refusal leaves nothing, and a page that is there is one that works.

use core::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ossicle_core::{
    Bundle, IdentityPage, MAX_PAGE_LEN, MAX_PAGE_MODULUS_LEN, PageKey, PageOwner, PublicKey, Reason, Secret,
    enrolment_statement,
};
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use super::{Asking, HomeArg, print, refusal, unexpected};
use crate::crypto::IdentityKey;
use crate::endpoint::{Failure, PeerKeys, Reply, Request};
use crate::name::Name;
use crate::store::home::Profile;

const DEVICE_BITS: usize = 2048;
/// A statement is bound to a connection; when that breaks in between, it is made anew.
const TRIES: usize = 3;

/// Enrol a device, and write its identity page
///
/// The page (at most 2 KiB) is everything that makes a generic image this device: its key, which is nowhere else, the
/// server, and its owner, to whom it reports and whom it obeys. Keep it as safe as any private key.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle enroll sensor-01 --report-to alice --out sensor-01.page
  ossicle enroll sensor-01 --report-to alice --out sensor-01.page --address 10.0.2.2:5150")]
pub struct Enroll {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The device's name
    #[arg(value_parser = Name::parse)]
    pub name: Name,
    /// To whom it reports, and whom it obeys
    #[arg(long, value_name = "OWNER", value_parser = Name::parse)]
    pub report_to: Name,
    /// The page; it must not exist
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// What the device dials [default: the address of this home's server]
    #[arg(long, value_name = "IP:PORT")]
    pub address: Option<SocketAddrV4>,
}

impl Enroll {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let home = self.home.open()?;
        let profile = home.profile()?;
        let server = short_key(&profile.server_key, "the server")?;
        let address = self.address(&profile).await?;
        let mut file = create(&self.out)?;

        let mut asking = Asking::new(&home, "enroll");
        let done = self.enrol(&mut asking, &profile, server, address, &mut file).await;
        asking.close().await;
        let id = done?;
        persist(file, &self.out)?;
        print(&format!("{} is enrolled and reports to {}", self.name, self.report_to))?;
        print(&format!("  id    {}", uuid::Uuid::from_bytes(id)))?;
        print(&format!("  dials {address}"))?;
        print(&format!("  page  {}", self.out.display()))?;
        Ok(())
    }

    async fn enrol(
        &self,
        asking: &mut Asking<'_>,
        profile: &Profile,
        server: PublicKey<'_>,
        address: SocketAddrV4,
        file: &mut NamedTempFile,
    ) -> Result<[u8; 16], Failure> {
        let owner = match asking.ask(Request::Peer { name: self.report_to.as_str().to_owned() }).await? {
            Reply::Peer(owner) => owner,
            Reply::Refused { reason, detail } => {
                return Err(refusal(reason, self.report_to.as_str(), detail.as_deref()));
            }
            _ => return Err(unexpected()),
        };
        // Asked before anything is enrolled: a device could not verify a longer key.
        short_key(&owner.modulus, self.report_to.as_str())?;

        let made = tokio::task::spawn_blocking(|| IdentityKey::generate(DEVICE_BITS)).await;
        let key = made.map_err(|_| Failure::refused("the device's key cannot be made"))??;
        let id = uuid::Uuid::new_v4().into_bytes();
        let page = self.page(&key, id, server, address, &owner)?;
        file.write_all(&page)
            .and_then(|()| file.as_file().sync_all())
            .map_err(|error| write_failed(&self.out, &error))?;

        for _ in 0..TRIES {
            let Reply::Exporter(exporter) = asking.ask(Request::Exporter).await? else {
                return Err(unexpected());
            };
            let public = PublicKey::from_modulus(key.modulus()).map_err(|_| unexpected())?;
            let statement = enrolment_statement(&Secret::new(exporter), &profile.id, &id, self.name.as_str(), public);
            let request = Request::Enrol {
                id,
                name: self.name.as_str().to_owned(),
                modulus: key.modulus().to_vec(),
                signature: key.sign(&statement)?,
            };
            match asking.ask(request).await? {
                Reply::Done => return Ok(id),
                Reply::Refused { reason: Reason::Unauthorised, .. } => {}
                Reply::Refused { reason: Reason::Forbidden, .. } => {
                    return Err(Failure::refused(
                        "refused(forbidden): the server admits no devices: ask its operator to serve with \
                         --enroll token",
                    ));
                }
                Reply::Refused { reason, detail } => {
                    return Err(refusal(reason, self.name.as_str(), detail.as_deref()));
                }
                _ => return Err(unexpected()),
            }
        }
        Err(refusal(Reason::Unauthorised, self.name.as_str(), None))
    }

    fn page(
        &self,
        key: &IdentityKey,
        id: [u8; 16],
        server: PublicKey<'_>,
        address: SocketAddrV4,
        owner: &PeerKeys,
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let parts = key.components()?;
        let exact = |_| unexpected();
        let page = IdentityPage {
            id,
            name: self.name.as_str(),
            key: PageKey {
                d: parts.d.as_slice().try_into().map_err(exact)?,
                p: parts.p.as_slice().try_into().map_err(exact)?,
                q: parts.q.as_slice().try_into().map_err(exact)?,
            },
            address: address.ip().octets(),
            port: address.port(),
            server,
            owner: PageOwner {
                id: owner.id,
                name: &owner.name,
                key: PublicKey::from_modulus(&owner.modulus).map_err(|_| unexpected())?,
                bundle: Bundle::decode(&owner.bundle).map_err(|_| unexpected())?,
                signature: &owner.signature,
            },
        };
        let mut bytes = Zeroizing::new(vec![0; MAX_PAGE_LEN]);
        let len = page.encode(&mut bytes).map_err(|error| {
            Failure::refused(format!("the page has no room for this device ({error}): choose shorter names"))
        })?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// What the device dials: it has no resolver.
    async fn address(&self, profile: &Profile) -> Result<SocketAddrV4, Failure> {
        if let Some(address) = self.address {
            return Ok(address);
        }
        if let Ok(ip) = profile.host.parse::<Ipv4Addr>() {
            return Ok(SocketAddrV4::new(ip, profile.port));
        }
        let found = tokio::net::lookup_host((profile.host.as_str(), profile.port)).await;
        let mut found = found.into_iter().flatten();
        found
            .find_map(|address| match address {
                SocketAddr::V4(address) => Some(address),
                SocketAddr::V6(_) => None,
            })
            .ok_or_else(|| {
                Failure::usage(format!(
                    "{} has no IPv4 address, and devices know no other: say what to dial with --address IP:PORT",
                    profile.host
                ))
            })
    }
}

/// A key that a device can verify.
fn short_key<'k>(modulus: &'k [u8], whose: &str) -> Result<PublicKey<'k>, Failure> {
    let key = PublicKey::from_modulus(modulus).map_err(|_| unexpected())?;
    if modulus.len() > MAX_PAGE_MODULUS_LEN {
        return Err(Failure::refused(format!(
            "the key of {whose} has {} bits, and devices verify at most {}: use one with a shorter key",
            key.bits(),
            MAX_PAGE_MODULUS_LEN * 8
        )));
    }
    Ok(key)
}

/// The page under another name, in the same directory, of mode 0600.
fn create(out: &Path) -> Result<NamedTempFile, Failure> {
    if out.symlink_metadata().is_ok() {
        return Err(exists(out));
    }
    let made = tempfile::Builder::new()
        .prefix(".page-")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(directory(out));
    made.map_err(|error| write_failed(out, &error))
}

fn persist(file: NamedTempFile, out: &Path) -> Result<(), Failure> {
    match file.persist_noclobber(out) {
        Ok(_) => File::open(directory(out))
            .and_then(|directory| directory.sync_all())
            .map_err(|error| write_failed(out, &error)),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => Err(exists(out)),
        Err(error) => Err(write_failed(out, &error.error)),
    }
}

fn directory(out: &Path) -> &Path {
    match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn exists(out: &Path) -> Failure {
    Failure::usage(format!("{} exists already: choose another --out, a page is never overwritten", out.display()))
}

fn write_failed(out: &Path, error: &std::io::Error) -> Failure {
    Failure::refused(format!("cannot write {}: {error}", out.display()))
}
