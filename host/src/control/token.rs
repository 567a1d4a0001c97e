//! Enrolment tokens as an operator makes, lists and ends them, and the URL that carries one.
//!
//! The secret of a token is in the URL and nowhere else: whoever loses that makes another token.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::net::UdpSocket;
use std::path::Path;

use anyhow::{anyhow, bail};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ossicle_core::{Secret, token_verifier};
use serde::{Deserialize, Serialize};
use tracing::info;
use zeroize::Zeroizing;

use super::{Answer, Command, Door, Operated, Page, ask, policy};
use crate::clock::system_date;
use crate::crypto::IdentityKey;
use crate::name::Pattern;
use crate::settings::{self, Flags, Settings};
use crate::store::{SharedStore, Token, TokenId, Tokens};

/// Tokens of one page: they fit into one line, with the longest patterns.
const PAGE: usize = 16;

/// What a new token is to admit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// So many clients.
    pub uses: u32,
    /// For so many seconds.
    pub ttl: u64,
    /// Under names that this pattern selects; `None` for any.
    pub name: Option<String>,
}

/// A new token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// The URL that admits, with the token in it: a secret.
    pub url: String,
    /// The token's id.
    pub id: TokenId,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// Who may enrol at this server now: `open`, `token` or `closed`.
    pub enroll: String,
}

/// Shows everything but the URL.
impl core::fmt::Debug for Issued {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { url: _, id, expires, enroll } = self;
        f.debug_struct("Issued")
            .field("id", id)
            .field("expires", expires)
            .field("enroll", enroll)
            .finish_non_exhaustive()
    }
}

/// A token that admits somebody. Nobody can enrol by what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenLine {
    /// Its id.
    pub id: TokenId,
    /// The names that it admits; `None` for any.
    pub name: Option<String>,
    /// How many clients it still admits; `None` without end.
    pub uses: Option<u32>,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// Whether it is in the URL that the server printed at its start.
    pub printed: bool,
}

impl From<Token> for TokenLine {
    fn from(token: Token) -> Self {
        let Token { id, name_pattern, uses, expires, printed, .. } = token;
        Self { id, name: name_pattern.map(|pattern| pattern.as_str().to_owned()), uses, expires, printed }
    }
}

/// Makes a token, at the server that runs on `data` or in the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn new_token(data: &Path, wanted: Wanted) -> anyhow::Result<Issued> {
    match Door::open(data).await? {
        Door::Server(data) => match ask(&data, &Command::NewToken(wanted)).await? {
            Answer::Issued(issued) => Ok(issued),
            _ => bail!("the server's answer is of another version"),
        },
        Door::Store(store) => {
            let flags = Flags { file: None, values: [("data".to_owned(), data.into())].into() };
            let settings = settings::resolve(&flags, &|name| std::env::var_os(name))?;
            if settings.port == 0 {
                bail!("this server takes another port at each start: start it, and make the token then");
            }
            let key = IdentityKey::load(&data.join("server.key"))?;
            issue(&store, &settings, SocketAddr::new(settings.bind, settings.port), &key.fingerprint(), &wanted).await
        }
    }
}

pub(super) async fn issue_here(operated: &Operated, wanted: &Wanted) -> anyhow::Result<Issued> {
    let Operated { server, address, .. } = operated;
    issue(&server.store, &operated.settings(), *address, &server.fingerprint(), wanted).await
}

async fn issue(
    store: &SharedStore,
    settings: &Settings,
    at: SocketAddr,
    fingerprint: &[u8; 32],
    wanted: &Wanted,
) -> anyhow::Result<Issued> {
    let fresh = Fresh::draw()?;
    let token = Token {
        name_pattern: wanted.name.as_deref().map(Pattern::parse).transpose()?,
        expires: system_date().saturating_add(wanted.ttl),
        uses: Some(wanted.uses),
        ..fresh.token()?
    };
    let (id, expires) = (token.id, token.expires);
    store.add_token(token).await?;
    info!(token = hex::encode(id), uses = wanted.uses, "a token was made by the operator");
    let url = url(&dialled(settings, at.ip()), at.port(), fingerprint, Some(&fresh.text()));
    Ok(Issued { url, id, expires, enroll: policy(settings.config.enrol).to_owned() })
}

/// The tokens that admit somebody, at the server that runs on `data` or in the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn tokens(data: &Path) -> anyhow::Result<Vec<TokenLine>> {
    let door = Door::open(data).await?;
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = match &door {
            Door::Store(store) => list(store, after).await?,
            Door::Server(data) => match ask(data, &Command::Tokens { after }).await? {
                Answer::Tokens(page) => page,
                _ => bail!("the server's answer is of another version"),
            },
        };
        all.extend(page.part);
        match page.more {
            Some(more) => after = Some(more),
            None => return Ok(all),
        }
    }
}

pub(super) async fn list(store: &SharedStore, after: Option<TokenId>) -> anyhow::Result<Page<Vec<TokenLine>, TokenId>> {
    let tokens = store.tokens(after.as_ref(), PAGE, system_date()).await?;
    let more = tokens.last().filter(|_| tokens.len() == PAGE).map(|last| last.id);
    Ok(Page { part: tokens.into_iter().map(TokenLine::from).collect(), more })
}

/// Ends a token: at the server that runs on `data`, or in the store if none does.
///
/// # Errors
/// One sentence that says what is wrong.
pub async fn end_token(data: &Path, id: &TokenId) -> anyhow::Result<()> {
    match Door::open(data).await? {
        Door::Server(data) => ask(&data, &Command::EndToken(*id)).await.map(|_| ()),
        Door::Store(store) => end(&store, id).await,
    }
}

pub(super) async fn end(store: &SharedStore, id: &TokenId) -> anyhow::Result<()> {
    if store.end_tokens(Tokens::One(*id), system_date()).await? == 0 {
        bail!("no token {} admits anybody: see those that do with `ossicle token list`", hex::encode(id));
    }
    info!(token = hex::encode(id), "a token was ended by the operator");
    Ok(())
}

/// The id and secret of a token that nobody has yet.
pub(crate) struct Fresh(Zeroizing<[u8; 24]>);

impl Fresh {
    /// Draws one.
    pub(crate) fn draw() -> anyhow::Result<Self> {
        let mut bytes = Zeroizing::new([0; 24]);
        getrandom::fill(bytes.as_mut()).map_err(|error| anyhow!("this system has no randomness ({error})"))?;
        Ok(Self(bytes))
    }

    /// What the server keeps of it: it admits anybody, and has ended.
    pub(crate) fn token(&self) -> anyhow::Result<Token> {
        let (id, secret) = self.0.split_at(8);
        let secret = Secret::new(secret.try_into()?);
        Ok(Token {
            id: id.try_into()?,
            verifier: *token_verifier(&secret).expose(),
            name_pattern: None,
            preset_id: None,
            expires: 0,
            uses: None,
            printed: false,
        })
    }

    /// As it stands in a URL.
    pub(crate) fn text(&self) -> Zeroizing<String> {
        Zeroizing::new(URL_SAFE_NO_PAD.encode(self.0.as_slice()))
    }
}

/// The server's URL, for clients.
pub(crate) fn url(host: &str, port: u16, fingerprint: &[u8; 32], token: Option<&str>) -> String {
    let fingerprint = hex::encode(fingerprint);
    match token {
        Some(token) => format!("ossicle://{host}:{port}#{fingerprint}.{token}"),
        None => format!("ossicle://{host}:{port}#{fingerprint}"),
    }
}

/// What clients dial, as it stands in a URL.
pub(crate) fn dialled(settings: &Settings, bound: IpAddr) -> String {
    let host = match &settings.advertise {
        Some(host) => host.clone(),
        None if bound.is_unspecified() => default_route(bound).to_string(),
        None => bound.to_string(),
    };
    if host.contains(':') { format!("[{host}]") } else { host }
}

/// The address that this machine uses towards the rest of the world. Connecting a datagram socket sends nothing.
fn default_route(unspecified: IpAddr) -> IpAddr {
    let (any, far, loopback): (IpAddr, IpAddr, IpAddr) = match unspecified {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(_) => {
            let far = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
            (Ipv6Addr::UNSPECIFIED.into(), far.into(), Ipv6Addr::LOCALHOST.into())
        }
    };
    let found = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(SocketAddr::new(far, 9))?;
        socket.local_addr()
    });
    found.map(|address| address.ip()).ok().filter(|address| !address.is_unspecified()).unwrap_or(loopback)
}
