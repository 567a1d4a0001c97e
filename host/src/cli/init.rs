//! `ossicle init`: a new identity, enrolled at a server; or a new key for one that is.

use super::{Asking, HomeArg, password, print, refusal, say, unexpected};
use crate::cli::serve::Rsa;
use crate::endpoint::{Failure, Home, Reply, Request, ServerUrl, initialise, initialise_by_password, prepare_rotation};
use crate::name::Name;

/// Make an identity and enrol it at a server
///
/// The identity's key never leaves the home directory. The server is recognised by the fingerprint in its URL.
///
/// With --password the identity gets the account NAME that the operator made for it (`ossicle account add`): the password is
/// asked for on the terminal, or read as one line of standard input. If that account has an identity already, this one takes
/// its place: it keeps id, name and what waits, the former key is not admitted any more, and others are told that the key has
/// changed.
///
/// With --rotate the identity in the home gets a new key, which its present key signs: id and name stay, peers follow by
/// themselves and are told, and the safety numbers change. Run it again if it was interrupted.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle init --name alice 'ossicle://chat.example.org:5150#FINGERPRINT.TOKEN'
  ossicle init --name bob --home ./bob --rsa 2048 'ossicle://127.0.0.1:5150#FINGERPRINT'
  ossicle init --name carol --trust-first-use ossicle://192.0.2.7:5150
  ossicle init --name dave --password 'ossicle://chat.example.org:5150#FINGERPRINT'
  pass show chat | ossicle init --name dave --password 'ossicle://chat.example.org:5150#FINGERPRINT'
  ossicle init --rotate                          a new key for the identity that is here

Devices know their owner's key from their page: after --rotate enrol those anew that report to this identity.")]
pub struct Init {
    /// The name that others see: 1 to 64 bytes, without spaces, '@' and '/'
    #[arg(long, value_parser = Name::parse, required_unless_present = "rotate")]
    pub name: Option<Name>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// Bits of the new key
    #[arg(long, value_name = "BITS", default_value = "3072")]
    pub rsa: Rsa,
    /// Trust whichever server answers, if the URL has no fingerprint
    #[arg(long)]
    pub trust_first_use: bool,
    /// Enter the account NAME by its password, which is asked for
    #[arg(long, conflicts_with = "trust_first_use")]
    pub password: bool,
    /// The line that `ossicle serve` prints
    #[arg(value_name = "URL", required_unless_present = "rotate")]
    pub url: Option<String>,
    /// Replace the key of the identity in the home, instead of making one
    #[arg(long, conflicts_with_all = ["name", "password", "trust_first_use", "url"])]
    pub rotate: bool,
}

impl Init {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let home = self.home.open()?;
        let (Some(name), Some(url)) = (&self.name, &self.url) else {
            return self.replace_key(&home).await;
        };
        let url = ServerUrl::parse(url).map_err(|error| Failure::usage(error.to_string()))?;
        let made = if self.password {
            // Before anything is asked that nobody would be told.
            if url.fingerprint.is_none() {
                return Err(Failure::usage(
                    "a password is told to no server but the one with the fingerprint in its URL, and this URL has none: \
                     copy the whole line that `ossicle serve` prints",
                ));
            }
            let password = password::ask(name.as_str()).await?;
            initialise_by_password(&home, name, self.rsa.bits(), &url, &password).await?
        } else {
            initialise(&home, name, self.rsa.bits(), &url, self.trust_first_use).await?
        };
        let trusted = if url.fingerprint.is_none() { " (trusted on first use)" } else { "" };
        let how = if self.password { "has entered" } else { "is enrolled at" };
        print(&format!("{name} {how} {}", url.address()))?;
        print(&format!("  id      {}", uuid::Uuid::from_bytes(made.id)))?;
        print(&format!("  key     {}", hex::encode(made.fingerprint)))?;
        print(&format!("  server  {}{trusted}", hex::encode(made.server)))?;
        print(&format!("  home    {}", home.directory().display()))?;
        Ok(())
    }

    async fn replace_key(&self, home: &Home) -> Result<(), Failure> {
        prepare_rotation(home, self.rsa.bits()).await?;
        let name = home.profile()?.name;
        let mut asking = Asking::new(home, "init");
        let answer = asking.ask(Request::Rotate).await;
        asking.close().await;
        let (former, fingerprint) = match answer? {
            Reply::Rotated { former, fingerprint } => (former, fingerprint),
            Reply::Refused { reason, detail } => return Err(refusal(reason, &name, detail.as_deref())),
            _ => return Err(unexpected()),
        };
        print(&format!("{name} has a new identity key"))?;
        print(&format!("  key     {}", hex::encode(fingerprint)))?;
        print(&format!("  former  {}", hex::encode(former)))?;
        say("Peers follow by themselves and are told: the safety numbers have changed. Devices that report here know \
             the former key: enrol them anew with `ossicle enroll`.");
        Ok(())
    }
}
