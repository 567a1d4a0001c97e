//! Making a home: an identity key, the first contact with a server, by enrolment or by an account's password, the first
//! bundle.
//!
//! Everything that must survive is durable before the server hears of it, and a home counts as complete only when the
//! server has admitted the identity and taken its bundle. A crash in between leaves something that the same command
//! completes; a refusal leaves nothing.

use std::sync::Arc;

use getrandom::SysRng;
use ossicle_core::{BundleKeys, Credentials, Login, Lookup, Message, PublicKey, Reason, SignedBundle, Subject};

use super::agent::describe;
use super::link::{Incoming, Link, LinkError, Server, Target, fingerprint};
use super::outbox::member;
use super::{Failure, Home, ServerUrl, now};
use crate::accounts::Password;
use crate::crypto::IdentityKey;
use crate::name::Name;
use crate::store::home::{HomeStore, HomeStoreError, Profile};

/// What a new home came to.
pub struct Initialised {
    /// Its id.
    pub id: [u8; 16],
    /// The fingerprint of its key.
    pub fingerprint: [u8; 32],
    /// The fingerprint of the server's key.
    pub server: [u8; 32],
}

/// Makes an identity of `bits` in `home` and enrols it as `name`. With `trust` the server is whoever answers.
///
/// # Errors
/// [`Failure`], with another sentence for each reason; the home is then as it was before, or can be completed by the same
/// call.
pub async fn initialise(
    home: &Home,
    name: &Name,
    bits: usize,
    url: &ServerUrl,
    trust: bool,
) -> Result<Initialised, Failure> {
    if url.fingerprint.is_none() && !trust {
        return Err(Failure::usage(
            "the URL has no fingerprint, so anybody could answer: copy the whole line that `ossicle serve` prints, \
             or say --trust-first-use",
        ));
    }
    make(home, name, bits, url, None).await
}

/// Makes an identity of `bits` in `home`, to which the account `name` is given by its password. The URL has the server's
/// fingerprint: nobody else is told the password.
///
/// # Errors
/// As for [`initialise`].
pub async fn initialise_by_password(
    home: &Home,
    name: &Name,
    bits: usize,
    url: &ServerUrl,
    password: &Password,
) -> Result<Initialised, Failure> {
    if url.fingerprint.is_none() {
        return Err(Failure::usage(
            "the URL has no fingerprint, so anybody could answer and have the password: copy the whole line that `ossicle \
             serve` prints",
        ));
    }
    make(home, name, bits, url, Some(password)).await
}

async fn make(
    home: &Home,
    name: &Name,
    bits: usize,
    url: &ServerUrl,
    password: Option<&Password>,
) -> Result<Initialised, Failure> {
    home.prepare()?;
    let Some(_lock) = home.try_lock("init")? else {
        let (pid, command) = home.holder().unwrap_or_else(|| (0, "?".into()));
        return Err(Failure::refused(format!(
            "`ossicle {command}` (pid {pid}) uses {} already: choose another directory with --home DIR",
            home.directory().display()
        )));
    };
    let mut store = HomeStore::open(&home.database())?;
    if let Some(profile) = store.profile()?.filter(|profile| profile.complete) {
        return Err(Failure::refused(format!(
            "{} is the home of {} already: choose another directory with --home DIR",
            home.directory().display(),
            profile.name
        )));
    }
    let Identity { key, id, begun } = identity(home, &store, name, bits).await?;
    let mut profile = Profile {
        host: url.host.clone(),
        port: url.port,
        server_key: Vec::new(),
        store_epoch: None,
        id,
        name: name.as_str().to_owned(),
        key_epoch: 0,
        complete: false,
    };
    store.put_profile(&profile)?;

    let public = PublicKey::from_modulus(key.modulus()).map_err(|_| HomeStoreError::Damaged)?;
    let server = url.fingerprint.map_or(Server::Anyone, Server::Fingerprint);
    let target = Target { host: url.host.clone(), port: url.port, server };
    let entered = match password {
        None => {
            let credentials = Credentials::Enroll { id, name: name.as_str(), key: public, token: url.token.as_ref() };
            Link::connect(&target, &credentials, &key, None).await
        }
        Some(password) => log_in(&mut store, &mut profile, &target, &key, password).await?,
    };
    let mut link = match entered {
        Ok(link) => link,
        Err(error) => {
            // What was begun before may be known to the server.
            let refused = matches!(error, LinkError::Refused { .. } | LinkError::OtherServer);
            if refused && !begun {
                drop(store);
                discard(home);
            }
            return Err(match password {
                Some(_) => explain_login(&error, name, url),
                None => explain(&error, name, url),
            });
        }
    };
    profile.server_key = link.server_key().to_vec();
    store.put_profile(&profile)?;
    publish(&mut store, &mut link, &profile, &key).await?;
    let server = fingerprint(&profile.server_key).map_err(|_| HomeStoreError::Damaged)?;
    if let Some(channel) = link.take_channel() {
        home.kept().keep(&channel, now());
    }
    link.close().await;
    Ok(Initialised { id: profile.id, fingerprint: key.fingerprint(), server })
}

/// Enters the account that `profile` names, learns who its client is, and connects as that with the key.
async fn log_in(
    store: &mut HomeStore,
    profile: &mut Profile,
    target: &Target,
    key: &Arc<IdentityKey>,
    password: &Password,
) -> Result<Result<Link, LinkError>, Failure> {
    let public = PublicKey::from_modulus(key.modulus()).map_err(|_| HomeStoreError::Damaged)?;
    let wrong = |_| Failure::usage("this is not a password");
    let login = Login { id: profile.id, name: &profile.name, key: public, password: password.expose().map_err(wrong)? };
    let mut link = match Link::log_in(target, &login, key).await {
        Ok(link) => link,
        Err(error) => return Ok(Err(error)),
    };
    let subject = Subject::Name(&profile.name);
    let asked = Message::Lookup(Lookup { request: 1, subject, key: true, bundle: false });
    let answered = ask(&mut link, &asked, |message| match message {
        Message::LookupResponse { request: 1, entry } => {
            // What a server says of a key that is not this one is none of this client's business.
            let is_own = entry.modulus == Some(key.modulus());
            Some(is_own.then(|| (entry.id, entry.key_epoch, entry.name.to_owned())))
        }
        Message::Refused { request: 1, .. } => Some(None),
        _ => None,
    });
    let strange = || {
        Failure::refused(format!(
            "the server let {} in, but its directory shows another key under that name: nothing was published; ask its \
             operator",
            profile.name
        ))
    };
    let (id, key_epoch, name) = answered.await?.ok_or_else(strange)?;
    link.close().await;
    if Name::parse(&name).ok() != Name::parse(&profile.name).ok() {
        return Err(strange());
    }
    (profile.id, profile.key_epoch, profile.name) = (id, key_epoch, name);
    store.put_profile(profile)?;
    let credentials = Credentials::Key { id, key_epoch, fingerprint: key.fingerprint() };
    // From here on the server knows this key: it is not thrown away.
    Ok(Ok(Link::connect(target, &credentials, key, None).await.map_err(|error| broken(&error))?))
}

/// What to do after a connection that broke off.
const AGAIN: &str = "run the same `ossicle init` again";

fn broken(error: &LinkError) -> Failure {
    Failure::unreached(format!("{}: {AGAIN}", describe(error)))
}

/// Says something, and waits for the answer that `taken` takes.
async fn ask<T>(
    link: &mut Link,
    message: &Message<'_>,
    taken: impl Fn(Message<'_>) -> Option<T>,
) -> Result<T, Failure> {
    link.send(message).map_err(|error| broken(&error))?;
    let answered = tokio::time::timeout(core::time::Duration::from_secs(30), async {
        loop {
            while let Some(incoming) = link.next()? {
                let Incoming::Message(payload) = incoming else {
                    return Err(LinkError::Broken("the server closed the connection".into()));
                };
                if let Some(answer) = Message::decode(&payload).ok().and_then(&taken) {
                    return Ok(answer);
                }
            }
            link.io().await?;
        }
    });
    match answered.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(broken(&error)),
        Err(_) => Err(Failure::unreached(format!("the server did not answer in time: {AGAIN}"))),
    }
}

struct Identity {
    key: Arc<IdentityKey>,
    id: [u8; 16],
    /// Whether it is that of an earlier attempt.
    begun: bool,
}

/// The key and id of an attempt that did not come to its end under this name, or new ones.
async fn identity(home: &Home, store: &HomeStore, name: &Name, bits: usize) -> Result<Identity, Failure> {
    let path = home.identity();
    let begun = store.profile()?.filter(|profile| Name::parse(&profile.name).is_ok_and(|begun| begun == *name));
    if let (Some(profile), true) = (begun, path.exists()) {
        return Ok(Identity { key: Arc::new(IdentityKey::load(&path)?), id: profile.id, begun: true });
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::refused(format!("cannot remove {}: {error}", path.display())));
        }
        _ => {}
    }
    let made = tokio::task::spawn_blocking(move || IdentityKey::generate(bits)).await;
    let key = made.map_err(|_| Failure::refused("the identity key cannot be made"))??;
    key.save(&path)?;
    Ok(Identity { key: Arc::new(key), id: uuid::Uuid::new_v4().into_bytes(), begun: false })
}

async fn publish(
    store: &mut HomeStore,
    link: &mut Link,
    profile: &Profile,
    key: &Arc<IdentityKey>,
) -> Result<(), Failure> {
    let own = match store.keys()? {
        // Of an attempt that did not come to its end: the server may have this very bundle already.
        Some(own) if own.bundle.id == profile.id && own.bundle.key == key.fingerprint() => own,
        former => {
            let sick = |_| Failure::refused("no keys can be made: is there randomness on this system?");
            let prekey_id = former.map_or(0, |own| own.bundle.prekey_id.wrapping_add(1));
            let keys = BundleKeys::generate(prekey_id, &mut SysRng).map_err(sick)?;
            let bundle = keys.bundle(&member(profile.id, key.fingerprint()), 1, [0; 32]);
            let signature = key.sign(&bundle.statement())?;
            store.put_keys(&keys, &bundle, &signature, now())?;
            store.keys()?.ok_or(HomeStoreError::Damaged)?
        }
    };
    let bundle = own.bundle.encode();
    let bundle = SignedBundle { bundle: &bundle, signature: &own.signature };
    let answer = ask(link, &Message::Publish { request: 1, bundle }, |message| match message {
        Message::Done { request: 1 } => Some(None),
        Message::Refused { request: 1, reason, .. } => Some(Some(reason)),
        _ => None,
    })
    .await?;
    match answer {
        None => Ok(store.published(&link.settings().store_epoch)?),
        Some(reason) => {
            Err(Failure::refused(format!("the server did not take this identity's keys ({reason}): {AGAIN}")))
        }
    }
}

/// Removes what a refused attempt made. The directory stays, with the lock that is held.
fn discard(home: &Home) {
    for file in ["identity.pem", "home.db", "home.db-wal", "home.db-shm", "channel"] {
        // What cannot be removed is made anew next time.
        let _ = std::fs::remove_file(home.directory().join(file));
    }
}

fn explain(error: &LinkError, name: &Name, url: &ServerUrl) -> Failure {
    let server = url.address();
    match error {
        LinkError::Unreachable(what) => {
            Failure::unreached(format!("{what}: is `ossicle serve` running there, and is the address right?"))
        }
        LinkError::OtherServer => Failure::refused(format!(
            "the server at {server} has another key than the URL says, so it was told nothing: copy the URL anew \
             from the line that `ossicle serve` prints, or somebody is in between"
        )),
        LinkError::Refused { reason: Reason::NameInUse, .. } => Failure::refused(format!(
            "the name {name} is in use on {server}: choose another with --name NAME, or enter the account of that name \
                 with --password"
        )),
        LinkError::Refused { reason: Reason::Unauthorised, .. } if url.token.is_none() => Failure::refused(format!(
            "the server at {server} admits new clients only with a token: ask its operator for a URL with one"
        )),
        LinkError::Refused { reason: Reason::Unauthorised, .. } => Failure::refused(format!(
            "the server at {server} does not take this token, it may have ended or been used: ask its operator for \
             a new URL"
        )),
        LinkError::Refused { reason: Reason::Forbidden, .. } => Failure::refused(format!(
            "the server at {server} admits no new clients: ask its operator to serve with --enroll token"
        )),
        LinkError::Refused { reason: Reason::Rate, retry_after } => Failure::refused(format!(
            "the server at {server} has too much to do: try again in {} seconds",
            retry_after.div_ceil(1000).max(1)
        )),
        LinkError::Busy(_) => Failure::refused(format!(
            "the server at {server} has too much to do, as it says itself or somebody in between: try again in a minute"
        )),
        LinkError::Refused { reason, .. } => {
            Failure::refused(format!("the server at {server} refused the new identity: {reason}"))
        }
        LinkError::Broken(what) => Failure::refused(format!(
            "the connection to {server} broke during the handshake ({what}): is that an ossicle server? Try again"
        )),
        LinkError::Failed(what) => Failure::refused(format!("{what}: see whether this system is in order")),
    }
}

/// As [`explain`], for a login.
fn explain_login(error: &LinkError, name: &Name, url: &ServerUrl) -> Failure {
    let server = url.address();
    match error {
        LinkError::Refused { reason: Reason::Unauthorised, .. } => Failure::refused(format!(
            "the server at {server} does not take this password for {name}: look at both, or ask its operator whether there is \
             such an account and whether it is locked"
        )),
        LinkError::Refused { reason: Reason::Rate, retry_after } if *retry_after > 60_000 => Failure::refused(format!(
            "too many passwords were tried for {name}, by whomever: try again in {} minutes",
            retry_after.div_ceil(60_000)
        )),
        LinkError::Refused { reason: Reason::Malformed | Reason::NameInUse, .. } => Failure::refused(format!(
            "the server at {server} does not take this new key: run the same `ossicle init` again in an empty home"
        )),
        LinkError::Broken(what) => Failure::refused(format!(
            "the connection to {server} broke during the handshake ({what}): does that server know passwords? Try again"
        )),
        error => explain(error, name, url),
    }
}
