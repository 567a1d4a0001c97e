//! The server's URL, which is all that a person gets from an operator: `ossicle://HOST:PORT#FINGERPRINT[.TOKEN]`.
//!
//! FINGERPRINT is the SHA-256 of the server's SubjectPublicKeyInfo in 64 hex digits, TOKEN an enrolment token's id and
//! secret (24 bytes) in base64url without padding. What stands behind `#` is for the client alone and is never sent.

use core::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ossicle_core::{Secret, Token};
use zeroize::Zeroizing;

const SCHEME: &str = "ossicle://";
const DEFAULT_PORT: u16 = 5150;

/// Where a server is, by what it is recognised, and what admits a new client.
#[derive(Clone)]
pub struct ServerUrl {
    /// Its host name or address, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The fingerprint of its key.
    pub fingerprint: Option<[u8; 32]>,
    /// The enrolment token.
    pub token: Option<Token>,
}

impl ServerUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`UrlError`] says in one sentence what is wrong with it. It never repeats the token.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let rest = text.trim().strip_prefix(SCHEME).ok_or(UrlError::Scheme)?;
        let (address, fragment) = match rest.split_once('#') {
            Some((address, fragment)) => (address, Some(fragment)),
            None => (rest, None),
        };
        let (host, port) = split_address(address.trim_end_matches('/'))?;
        let (fingerprint, token) = match fragment {
            None => (None, None),
            Some(fragment) => {
                let (fingerprint, token) = match fragment.split_once('.') {
                    Some((fingerprint, token)) => (fingerprint, Some(token)),
                    None => (fragment, None),
                };
                let mut bytes = [0; 32];
                hex::decode_to_slice(fingerprint, &mut bytes).map_err(|_| UrlError::Fingerprint)?;
                (Some(bytes), token.map(parse_token).transpose()?)
            }
        };
        Ok(Self { host: host.to_owned(), port, fingerprint, token })
    }

    /// `HOST:PORT`, for people and logs.
    pub fn address(&self) -> String {
        address(&self.host, self.port)
    }
}

impl core::str::FromStr for ServerUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        Self::parse(text)
    }
}

/// `HOST:PORT`, with brackets around an IPv6 address.
pub(super) fn address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn split_address(address: &str) -> Result<(&str, u16), UrlError> {
    let (host, port) = match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some(""))),
        None => match address.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, Some("")),
        },
    };
    let port = match port.ok_or(UrlError::Address)? {
        "" => DEFAULT_PORT,
        port => port.parse().ok().filter(|port| *port != 0).ok_or(UrlError::Port)?,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || !host.chars().all(plain) {
        return Err(UrlError::Address);
    }
    Ok((host, port))
}

fn parse_token(token: &str) -> Result<Token, UrlError> {
    let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(token).map_err(|_| UrlError::Token)?);
    let (id, secret) = bytes.split_first_chunk().ok_or(UrlError::Token)?;
    let secret = <[u8; 16]>::try_from(secret).map_err(|_| UrlError::Token)?;
    Ok(Token { id: *id, secret: Secret::new(secret) })
}

/// Why a text is not a server's URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UrlError {
    /// There is no host.
    Address,
    /// The fingerprint is not 64 hex digits.
    Fingerprint,
    /// The port is no port.
    Port,
    /// It does not begin as it must.
    Scheme,
    /// The token is not one.
    Token,
}

impl fmt::Display for UrlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self {
            Self::Address => "it names no host",
            Self::Fingerprint => "the fingerprint behind '#' is not 64 hex digits",
            Self::Port => "the port is not a number from 1 to 65535",
            Self::Scheme => "it does not begin with ossicle://",
            Self::Token => "the token behind the fingerprint is cut or mistyped",
        };
        write!(f, "this is not a server's URL ({what}): copy the whole line that `ossicle serve` prints")
    }
}

impl core::error::Error for UrlError {}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINT: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn parse(text: &str) -> ServerUrl {
        ServerUrl::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn urls_have_an_address_a_fingerprint_and_a_token() {
        let token = URL_SAFE_NO_PAD.encode([7; 24]);
        let url = parse(&format!("ossicle://example.org:5151#{PRINT}.{token}"));
        assert_eq!((url.host.as_str(), url.port), ("example.org", 5151));
        assert_eq!(url.fingerprint.map(hex::encode).as_deref(), Some(PRINT));
        let token = url.token.unwrap_or_else(|| panic!("a token"));
        assert_eq!((token.id, *token.secret.expose()), ([7; 8], [7; 16]));

        let url = parse("ossicle://[::1]:5000");
        assert_eq!((url.host.as_str(), url.port, url.address().as_str()), ("::1", 5000, "[::1]:5000"));
        assert!(url.fingerprint.is_none() && url.token.is_none());
        assert_eq!(parse("ossicle://10.0.0.1/").port, 5150);
    }

    #[test]
    fn what_is_cut_or_mistyped_is_refused() {
        for (text, expected) in [
            ("http://a:1", UrlError::Scheme),
            ("ossicle://", UrlError::Address),
            ("ossicle://a b:1", UrlError::Address),
            ("ossicle://[::1", UrlError::Address),
            ("ossicle://a:0", UrlError::Port),
            ("ossicle://a:65536", UrlError::Port),
            ("ossicle://a:1#", UrlError::Fingerprint),
            ("ossicle://a:1#0011", UrlError::Fingerprint),
            (&format!("ossicle://a:1#{PRINT}."), UrlError::Token),
            (&format!("ossicle://a:1#{PRINT}.AAAA"), UrlError::Token),
            (&format!("ossicle://a:1#{PRINT}.{}=", URL_SAFE_NO_PAD.encode([7; 24])), UrlError::Token),
        ] {
            assert_eq!(ServerUrl::parse(text).err(), Some(expected), "{text}");
        }
    }
}
