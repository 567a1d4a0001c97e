//! `ossicle revoke`: ends a client for good, by its owner or by the operator.

use std::path::PathBuf;

use super::{Asking, HomeArg, print, refusal, unexpected};
use crate::control;
use crate::endpoint::{Failure, Reply, Request};
use crate::name::Name;

/// Revoke a client: it may never connect again
///
/// With the rights of a home: the devices that it enrolled, and itself. With --data, on the server's machine: anybody.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle revoke sensor-07                       a device that this client enrolled
  ossicle revoke mallory --data ./ossicle-data   anybody, by the operator, whether the server runs or not")]
pub struct Revoke {
    /// Whom
    #[arg(value_parser = Name::parse)]
    pub name: Name,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its own documentation is its help")]
    pub home: HomeArg,
    /// The server's data directory: act as its operator
    // Not from the environment: OSSICLE_DATA is set where servers run, and must not turn a person into the operator.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

impl Revoke {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let name = self.name.as_str();
        if let Some(data) = &self.data {
            control::revoke(data, name).await.map_err(|error| Failure::refused(format!("{error:#}")))?;
        } else {
            let home = self.home.open()?;
            let mut asking = Asking::new(&home, "revoke");
            let answer = asking.ask(Request::Revoke { name: name.to_owned() }).await;
            asking.close().await;
            match answer? {
                Reply::Done => {}
                Reply::Refused { reason, detail } => return Err(refusal(reason, name, detail.as_deref())),
                _ => return Err(unexpected()),
            }
        }
        print(&format!("{name} is revoked"))?;
        Ok(())
    }
}
