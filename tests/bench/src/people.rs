//! Who the clients are: keys of 2048 bits for all, and certificates for TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use getrandom::SysRng;
use ossicle::crypto::IdentityKey;
use ossicle_core::{Bundle, BundleKeys, Member, Prekey};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_RSA_SHA256,
};
use rsa::pkcs8::EncodePrivateKey;
use rsa::{BoxedUint, RsaPrivateKey};
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::Failure;

/// The name that the servers' certificate is for.
pub const SERVER_NAME: &str = "localhost";

/// One client, at whatever server.
pub struct Person {
    /// From 0; in client ids and topics.
    pub number: usize,
    /// Its id at Ossicle's server.
    pub id: [u8; 16],
    /// Its RSA key.
    pub key: IdentityKey,
    /// Its end-to-end keys.
    pub keys: BundleKeys,
    /// Its bundle.
    pub bundle: Bundle,
    /// The RSA key's signature over the bundle.
    pub signature: Vec<u8>,
    /// What opens wraps for it.
    pub prekey: Prekey,
}

impl Person {
    /// Who it is to its peers.
    pub fn member(&self) -> Member {
        Member { id: self.id, key: self.key.fingerprint() }
    }

    /// Its name at Ossicle's server.
    pub fn name(&self) -> String {
        format!("bench-{}", self.number)
    }

    fn new(number: usize, key: IdentityKey) -> Result<Self, Failure> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        // A UUIDv4, as clients make them.
        id[6] = id[6] & 0x0f | 0x40;
        id[8] = id[8] & 0x3f | 0x80;
        let keys = BundleKeys::generate(0, &mut SysRng).map_err(text)?;
        let bundle = keys.bundle(&Member { id, key: key.fingerprint() }, 1, [0; 32]);
        let signature = key.sign(&bundle.statement())?;
        let prekey = keys.prekey(&bundle).map_err(text)?;
        Ok(Self { number, id, key, keys, bundle, signature, prekey })
    }
}

/// An error of the core, which has no allocator to be boxed with.
pub fn text(error: impl core::fmt::Display) -> Failure {
    error.to_string().into()
}

/// Makes so many people.
///
/// Each needs a key that nobody else has, and a key takes a tenth of a second to find: n primes make n (n - 1) / 2 moduli.
/// Who knows two of these keys can factor both; nobody may use them for anything else.
///
/// # Errors
/// If keys cannot be made.
pub fn people(count: usize) -> Result<Vec<Arc<Person>>, Failure> {
    let pairs = (1..).find(|pairs| 2 * pairs * (2 * pairs - 1) / 2 >= count).unwrap_or(1);
    let found = in_parallel(pairs, |_| {
        let components = IdentityKey::generate(2048)?.components()?;
        Ok([components.p, components.q].map(|prime| BoxedUint::from_be_slice(&prime, 1024)))
    })?;
    let primes: Vec<BoxedUint> = found.into_iter().flatten().collect::<Result<_, _>>()?;
    let mut chosen = (0..primes.len()).flat_map(|p| (0..p).map(move |q| (p, q)));
    let chosen: Vec<_> = chosen.by_ref().take(count).collect();
    in_parallel(count, |number| {
        let (p, q) = chosen[number];
        let key = RsaPrivateKey::from_p_q(primes[p].clone(), primes[q].clone(), BoxedUint::from(65_537_u32))?;
        Ok(Arc::new(Person::new(number, IdentityKey::from_pkcs8(key.to_pkcs8_der()?.as_bytes())?)?))
    })
}

/// Does the same for each number, on all cores, and returns the results in their order.
fn in_parallel<T: Send>(count: usize, make: impl Fn(usize) -> Result<T, Failure> + Sync) -> Result<Vec<T>, Failure> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let make = &make;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    (count * worker / threads..count * (worker + 1) / threads).map(make).collect::<Result<Vec<_>, _>>()
                })
            })
            .collect();
        let mut all = Vec::with_capacity(count);
        for worker in workers {
            all.extend(worker.join().map_err(|_| "a thread failed")??);
        }
        Ok(all)
    })
}

/// What mutual TLS needs: one authority, one certificate for the servers, one for the clients, RSA-2048 each.
pub struct Certificates {
    /// The authority, in PEM.
    pub authority: PathBuf,
    /// The servers' certificate, in PEM.
    pub certificate: PathBuf,
    /// Its key, in PEM.
    pub key: PathBuf,
    roots: Arc<RootCertStore>,
    client: CertificateDer<'static>,
    client_key: Vec<u8>,
}

impl Certificates {
    /// Makes them, with the files that servers read in `directory`.
    ///
    /// # Errors
    /// If they cannot be made or written.
    pub fn make(directory: &Path) -> Result<Self, Failure> {
        let mut params = named("Ossicle's benchmark")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate_for(&PKCS_RSA_SHA256)?)?;

        let server_key = KeyPair::generate_for(&PKCS_RSA_SHA256)?;
        let mut params = CertificateParams::new([SERVER_NAME.to_owned(), "127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, SERVER_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server = params.signed_by(&server_key, &authority)?;

        let client_key = KeyPair::generate_for(&PKCS_RSA_SHA256)?;
        let mut params = named("client")?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let client = params.signed_by(&client_key, &authority)?;

        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        let file = |name: &str, pem: String| {
            let path = directory.join(name);
            fs::write(&path, pem).map(|()| path)
        };
        Ok(Self {
            authority: file("ca.pem", authority.pem())?,
            certificate: file("server.pem", server.pem())?,
            key: file("server.key", server_key.serialize_pem())?,
            roots: Arc::new(roots),
            client: client.der().clone(),
            client_key: client_key.serialize_der(),
        })
    }

    /// What a client that resumes sessions, or never does, connects with.
    ///
    /// # Errors
    /// If TLS takes the certificate for none.
    pub fn config(&self, resumes: bool) -> Result<Arc<ClientConfig>, Failure> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.client_key.clone()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(vec![self.client.clone()], key)?;
        config.resumption = if resumes { Resumption::in_memory_sessions(64) } else { Resumption::disabled() };
        Ok(Arc::new(config))
    }
}

fn named(name: &str) -> Result<CertificateParams, Failure> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}
