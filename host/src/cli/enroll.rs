//! `ossicle enroll`: identity pages of devices.
//!
//! The devices' keys are made here, enrolled with the rights of this home, written into the pages and kept nowhere else.
//! All pages are complete on disk, under other names, before the server hears of any device, and the server enrols all of
//! them or none; they get their own names once they are enrolled. So a refusal leaves nothing, and a page that is there
//! is one that works. While the server's answer is not known nothing is thrown away.

use core::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use ossicle_core::{
    Bundle, GroupPolicy, IdentityPage, MAX_PAGE_LEN, MAX_PAGE_MODULUS_LEN, PageKey, PageOwner, PublicKey, Reason,
    Secret, enrolment_statement,
};
use serde::Serialize;
use tempfile::NamedTempFile;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::names::expand;
use super::{Asking, HomeArg, json, print, refusal, say, unexpected};
use crate::crypto::IdentityKey;
use crate::endpoint::{Failure, Home, NewDevice, PeerKeys, Reply, Request};
use crate::name::Name;
use crate::store::home::Profile;

const DEVICE_BITS: usize = 2048;
/// Signatures are bound to a connection; when that breaks in between, they are made anew.
const TRIES: usize = 3;

/// Enrol devices, and write their identity pages
///
/// A page (at most 2 KiB) is everything that makes a generic image one device: its key, which is nowhere else, the server,
/// and its owner, to whom it reports and whom it obeys. Keep it as safe as any private key.
///
/// Several devices are enrolled together: all of them, or none if one is refused.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle enroll sensor-01 --report-to alice --out sensor-01.page
  ossicle enroll 'sensor-{01..50}' --report-to alice --out pages
  ossicle enroll sensor-01 --report-to alice --out sensor-01.page --address 10.0.2.2:5150")]
pub struct Enroll {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The devices' names; '{01..50}', '{a..f}' and '{hall,roof}' stand for several, 1000 at most
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// To whom they report, and whom they obey
    #[arg(long, value_name = "OWNER", value_parser = Name::parse)]
    pub report_to: Name,
    /// The page of one device, or the directory of the pages NAME.page; no page is overwritten
    #[arg(long, value_name = "FILE|DIR")]
    pub out: PathBuf,
    /// What the devices dial [default: the address of this home's server]
    #[arg(long, value_name = "IP:PORT")]
    pub address: Option<SocketAddrV4>,
    /// Whose invitations to groups the devices accept; without an answer they expire
    #[arg(long, value_name = "WHOSE", value_enum, default_value_t = Groups::Owner)]
    pub groups: Groups,
    /// One JSON object a device and line: `name`, `id`, `dials`, `page`
    #[arg(long)]
    pub json: bool,
}

/// Whose invitations to groups a device accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Groups {
    /// Its owner's: groups of at most five, one at a time
    Owner,
    /// Nobody's; also for firmware that knows no groups
    None,
}

#[derive(Serialize)]
struct Line<'l> {
    name: &'l str,
    id: String,
    dials: SocketAddrV4,
    page: String,
}

/// What all pages have in common.
struct Common {
    server: Vec<u8>,
    address: SocketAddrV4,
    owner: PeerKeys,
    groups: GroupPolicy,
}

impl Enroll {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let names = expand(&self.names)?;
        let home = self.home.open()?;
        let profile = home.profile()?;
        short_key(&profile.server_key, "the server")?;
        let address = self.address(&profile).await?;
        let mut pages = Pages::begin(&self.out, &names)?;

        // Not held while keys are made, which takes its time.
        let owner = self.owner(&home).await?;
        let groups = match self.groups {
            Groups::Owner => GroupPolicy::Owner,
            Groups::None => GroupPolicy::None,
        };
        let common = Common { server: profile.server_key.clone(), address, owner, groups };
        pages.make(&names, &common).await?;

        let mut asking = Asking::new(&home, "enroll");
        let done = enrol(&mut asking, &profile, &mut pages).await;
        asking.close().await;
        done?;
        pages.name()?;
        self.tell(&pages, address)
    }

    async fn owner(&self, home: &Home) -> Result<PeerKeys, Failure> {
        let mut asking = Asking::new(home, "enroll");
        let asked = asking.ask(Request::Peer { name: self.report_to.as_str().to_owned() }).await;
        asking.close().await;
        let owner = match asked? {
            Reply::Peer(owner) => owner,
            Reply::Refused { reason, detail } => {
                return Err(refusal(reason, self.report_to.as_str(), detail.as_deref()));
            }
            _ => return Err(unexpected()),
        };
        // Asked before anything is enrolled: a device could not verify a longer key.
        short_key(&owner.modulus, self.report_to.as_str())?;
        Ok(owner)
    }

    fn tell(&self, pages: &Pages, address: SocketAddrV4) -> Result<(), Failure> {
        if self.json {
            for page in &pages.pages {
                let (name, id) = (page.name.as_str(), uuid::Uuid::from_bytes(page.id).to_string());
                let line = Line { name, id, dials: address, page: page.out.display().to_string() };
                if !print(&json(&line)?)? {
                    break;
                }
            }
            return Ok(());
        }
        if let [page] = pages.pages.as_slice() {
            print(&format!("{} is enrolled and reports to {}", page.name, self.report_to))?;
            print(&format!("  id    {}", uuid::Uuid::from_bytes(page.id)))?;
            print(&format!("  dials {address}"))?;
            print(&format!("  page  {}", page.out.display()))?;
            return Ok(());
        }
        print(&format!("{} devices are enrolled and report to {}", pages.pages.len(), self.report_to))?;
        if let (Some(first), Some(last)) = (pages.pages.first(), pages.pages.last()) {
            print(&format!("  names {} to {}", first.name, last.name))?;
        }
        print(&format!("  dial  {address}"))?;
        print(&format!("  pages {}", self.out.join("NAME.page").display()))?;
        Ok(())
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

/// Enrols the devices of these pages, all or none.
async fn enrol(asking: &mut Asking<'_>, profile: &Profile, pages: &mut Pages) -> Result<(), Failure> {
    let mut tries = 0;
    loop {
        let Reply::Exporter(exporter) = asking.ask(Request::Exporter).await? else {
            return Err(unexpected());
        };
        let request = Request::Enrol(pages.signed(exporter, profile.id).await?);
        // From here on the devices may be enrolled, whatever becomes of the answer.
        let was_open = core::mem::replace(&mut pages.open, true);
        let (index, reason) = match asking.ask(request).await? {
            Reply::Done => {
                pages.open = false;
                return Ok(());
            }
            Reply::Unanswered => continue,
            Reply::NotEnrolled { index, reason } => (index, reason),
            _ => return Err(unexpected()),
        };
        tries += 1;
        if reason == Reason::Unauthorised && tries < TRIES {
            // The connection was another one than that of the exporter. An answer that was lost stays lost.
            pages.open = was_open;
            continue;
        }
        // What the same batch was refused for now it would have been refused for before, but for these.
        let passes = matches!(reason, Reason::Unauthorised | Reason::Rate | Reason::Unavailable | Reason::Forbidden);
        pages.open = was_open && passes;
        let name = pages.pages.get(index).map_or("", |page| page.name.as_str());
        let others = if pages.pages.len() > 1 { "; none of the devices was enrolled" } else { "" };
        let mut failure = match reason {
            Reason::Forbidden => Failure::refused(
                "refused(forbidden): the server admits no devices: ask its operator to serve with --enroll token",
            ),
            reason => refusal(reason, name, None),
        };
        failure.sentence.push_str(others);
        return Err(failure);
    }
}

/// One device and its page.
struct Page {
    name: Name,
    /// Where the page will be.
    out: PathBuf,
    id: [u8; 16],
    key: Arc<IdentityKey>,
    /// The page under another name, until it has its own.
    file: Option<NamedTempFile>,
}

/// The pages of one run. What has no name of its own yet goes with this, unless it may be a page that works.
struct Pages {
    pages: Vec<Page>,
    /// Where the pages will be, in the order of the names.
    outs: Vec<PathBuf>,
    /// A directory that was made for them.
    made: Option<PathBuf>,
    /// Whether the devices may be enrolled without anybody's knowing.
    open: bool,
}

impl Pages {
    /// Finds out where pages go, before there is anything to lose.
    fn begin(out: &Path, names: &[Name]) -> Result<Self, Failure> {
        let mut pages = Self { pages: Vec::new(), outs: Vec::new(), made: None, open: false };
        pages.outs = match names {
            [_] if !out.is_dir() => vec![out.to_owned()],
            _ => {
                match DirBuilder::new().mode(0o700).create(out) {
                    Ok(()) => pages.made = Some(out.to_owned()),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists && out.is_dir() => {}
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        return Err(Failure::usage(format!(
                            "{} is a file: several pages go into a directory, name one with --out",
                            out.display()
                        )));
                    }
                    Err(error) => return Err(write_failed(out, &error)),
                }
                names.iter().map(|name| out.join(format!("{name}.page"))).collect()
            }
        };
        match pages.outs.iter().find(|out| out.symlink_metadata().is_ok()) {
            Some(out) => Err(exists(out)),
            None => Ok(pages),
        }
    }

    /// Makes the keys, and writes the pages under other names.
    async fn make(&mut self, names: &[Name], common: &Common) -> Result<(), Failure> {
        let bar = match names.len() {
            1 => ProgressBar::hidden(),
            // On a terminal only.
            count => ProgressBar::new(count.try_into().unwrap_or(u64::MAX)),
        };
        if let Ok(style) = ProgressStyle::with_template("making keys {wide_bar} {pos}/{len}, {eta} left") {
            bar.set_style(style);
        }
        bar.tick();
        let mut left = 0..names.len();
        let mut making = JoinSet::new();
        let mut made = Vec::with_capacity(names.len());
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        loop {
            while making.len() < at_once
                && let Some(index) = left.next()
            {
                making.spawn_blocking(move || IdentityKey::generate(DEVICE_BITS).map(|key| (index, key)));
            }
            let Some(done) = making.join_next().await else { break };
            let (index, key) = done.map_err(|_| Failure::refused("a device's key cannot be made"))??;
            if let (Some(name), Some(out)) = (names.get(index), self.outs.get(index)) {
                made.push((index, Page::write(name, out, key, common)?));
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        made.sort_unstable_by_key(|(index, _)| *index);
        self.pages = made.into_iter().map(|(_, page)| page).collect();
        self.sync()
    }

    /// The batch, signed for the connection with this exporter.
    async fn signed(&self, exporter: [u8; 32], enroller: [u8; 16]) -> Result<Vec<NewDevice>, Failure> {
        let devices: Vec<_> =
            self.pages.iter().map(|page| (page.id, page.name.as_str().to_owned(), Arc::clone(&page.key))).collect();
        let exporter = Secret::new(exporter);
        let signing = move || {
            let sign = |(id, name, key): (_, String, Arc<IdentityKey>)| {
                let modulus = key.modulus().to_vec();
                let public = PublicKey::from_modulus(&modulus).map_err(|_| unexpected())?;
                let statement = enrolment_statement(&exporter, &enroller, &id, &name, public);
                let signature = key.sign(&statement)?;
                Ok(NewDevice { id, name, modulus, signature })
            };
            devices.into_iter().map(sign).collect()
        };
        let signed = tokio::task::spawn_blocking(signing).await;
        signed.map_err(|_| Failure::refused("a device's key does not sign"))?
    }

    /// Gives the pages their names: their devices are enrolled.
    fn name(&mut self) -> Result<(), Failure> {
        let mut failed = None;
        for page in &mut self.pages {
            let Some(file) = page.file.take() else { continue };
            let (error, file) = match file.persist_noclobber(&page.out) {
                Ok(_) => continue,
                Err(failure) => (failure.error, failure.file),
            };
            // It is the only place of its key.
            let kept = match file.keep() {
                Ok((_, kept)) => format!("its page is {}", kept.display()),
                Err(error) => format!("its page is lost ({}): revoke it", error.error),
            };
            let because = match error.kind() {
                io::ErrorKind::AlreadyExists => format!("{} was made meanwhile", page.out.display()),
                _ => format!("{} cannot be written ({error})", page.out.display()),
            };
            say(&format!("ossicle: {} is enrolled, but {because}: {kept}", page.name));
            failed = Some(Failure::refused("not every page could be given its name"));
        }
        if let Some(failure) = failed {
            return Err(failure);
        }
        self.sync()?;
        self.made = None;
        Ok(())
    }

    /// Makes what is in the directory durable, and the directory itself if it was made.
    fn sync(&self) -> Result<(), Failure> {
        let folder = self.outs.first().map(|out| directory(out));
        for folder in folder.into_iter().chain(self.made.as_deref().map(directory)) {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| write_failed(folder, &error))?;
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let files = self.pages.iter_mut().filter_map(|page| Some((page.out.clone(), page.file.take()?)));
        if !self.open {
            drop(files.collect::<Vec<_>>());
            if let Some(made) = &self.made {
                // It stays if somebody else put something there.
                let _ = fs::remove_dir(made);
            }
            return;
        }
        // The answer never came, or nobody waited for it.
        for (out, file) in files {
            let kept = file.keep().map_or_else(|error| error.to_string(), |(_, kept)| kept.display().to_string());
            say(&format!("ossicle: kept {kept}: if the device is enrolled, its page: name it {}", out.display()));
        }
        say("ossicle: the server did not say whether it enrolled: see with `ossicle who`, and delete what is no page");
    }
}

impl Page {
    /// Not in a thread, which an interrupt would leave behind with its file.
    fn write(name: &Name, out: &Path, key: IdentityKey, common: &Common) -> Result<Self, Failure> {
        let id = uuid::Uuid::new_v4().into_bytes();
        let bytes = encode(name, &key, id, common)?;
        let made = tempfile::Builder::new()
            .prefix(&format!(".{name}.page-"))
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(directory(out));
        let mut file = made.map_err(|error| write_failed(out, &error))?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(|error| write_failed(out, &error))?;
        Ok(Self { name: name.clone(), out: out.to_owned(), id, key: Arc::new(key), file: Some(file) })
    }
}

fn encode(name: &Name, key: &IdentityKey, id: [u8; 16], common: &Common) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let parts = key.components()?;
    let exact = |_| unexpected();
    let Common { server, address, owner, groups } = common;
    let page = IdentityPage {
        id,
        name: name.as_str(),
        key: PageKey {
            d: parts.d.as_slice().try_into().map_err(exact)?,
            p: parts.p.as_slice().try_into().map_err(exact)?,
            q: parts.q.as_slice().try_into().map_err(exact)?,
        },
        address: address.ip().octets(),
        port: address.port(),
        server: PublicKey::from_modulus(server).map_err(|_| unexpected())?,
        owner: PageOwner {
            id: owner.id,
            name: &owner.name,
            key: PublicKey::from_modulus(&owner.modulus).map_err(|_| unexpected())?,
            bundle: Bundle::decode(&owner.bundle).map_err(|_| unexpected())?,
            signature: &owner.signature,
        },
        groups: *groups,
    };
    let mut bytes = Zeroizing::new(vec![0; MAX_PAGE_LEN]);
    let len = page.encode(&mut bytes).map_err(|error| {
        Failure::refused(format!("the page has no room for this device ({error}): choose shorter names"))
    })?;
    bytes.truncate(len);
    Ok(bytes)
}

/// A key that a device can verify.
fn short_key(modulus: &[u8], whose: &str) -> Result<(), Failure> {
    let key = PublicKey::from_modulus(modulus).map_err(|_| unexpected())?;
    if modulus.len() > MAX_PAGE_MODULUS_LEN {
        return Err(Failure::refused(format!(
            "the key of {whose} has {} bits, and devices verify at most {}: use one with a shorter key",
            key.bits(),
            MAX_PAGE_MODULUS_LEN * 8
        )));
    }
    Ok(())
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

fn write_failed(out: &Path, error: &io::Error) -> Failure {
    Failure::refused(format!("cannot write {}: {error}", out.display()))
}
