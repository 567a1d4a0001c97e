//! `ossicle init`: a new identity, enrolled at a server.

use super::{HomeArg, print};
use crate::cli::serve::Rsa;
use crate::endpoint::{Failure, ServerUrl, initialise};
use crate::name::Name;

/// Make an identity and enrol it at a server
///
/// The identity's key never leaves the home directory. The server is recognised by the fingerprint in its URL.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle init --name alice 'ossicle://chat.example.org:5150#FINGERPRINT.TOKEN'
  ossicle init --name bob --home ./bob --rsa 2048 'ossicle://127.0.0.1:5150#FINGERPRINT'
  ossicle init --name carol --trust-first-use ossicle://192.0.2.7:5150")]
pub struct Init {
    /// The name that others see: 1 to 64 bytes, without spaces, '@' and '/'
    #[arg(long, value_parser = Name::parse)]
    pub name: Name,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Bits of the new key
    #[arg(long, value_name = "BITS", default_value = "3072")]
    pub rsa: Rsa,
    /// Trust whichever server answers, if the URL has no fingerprint
    #[arg(long)]
    pub trust_first_use: bool,
    /// The line that `ossicle serve` prints
    #[arg(value_name = "URL")]
    pub url: String,
}

impl Init {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let url = ServerUrl::parse(&self.url).map_err(|error| Failure::usage(error.to_string()))?;
        let home = self.home.open()?;
        let made = initialise(&home, &self.name, self.rsa.bits(), &url, self.trust_first_use).await?;
        let trusted = if url.fingerprint.is_none() { " (trusted on first use)" } else { "" };
        print(&format!("{} is enrolled at {}", self.name, url.address()))?;
        print(&format!("  id      {}", uuid::Uuid::from_bytes(made.id)))?;
        print(&format!("  key     {}", hex::encode(made.fingerprint)))?;
        print(&format!("  server  {}{trusted}", hex::encode(made.server)))?;
        print(&format!("  home    {}", home.directory().display()))?;
        Ok(())
    }
}
