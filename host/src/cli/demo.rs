//! `ossicle demo`: the whole story on one machine, with the real commands and the firmware's own application.
//!
//! A server, its owner and a second person, each a process of its own as it would be elsewhere; and sensors, plugged into
//! an Ethernet that exists only in here: simulated ones, and with `--qemu` the real image beside them. `story` tells it,
//! `process` runs the commands, `sensor` keeps account of each sensor, `image` finds what QEMU runs. Here is what a person
//! sees of that: options, and an end that leaves nothing behind.

mod image;
mod process;
mod sensor;
mod story;

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use crate::endpoint::Failure;
pub use story::{Interference, Moment, Promise, Said, Scene, Story};

/// Show the whole story on this machine: a server, two people, three simulated sensors
///
/// Exits with 0 only if every promise was seen to hold: each sensor's readings were opened by their owner, each LED obeyed
/// the owner and refused the other person, a killed server came back to resumed channels, and neither its files nor the
/// traffic held a word of what was said.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  ossicle demo                          needs nothing but this binary
  ossicle demo --for 60s                let the sensors report for longer
  ossicle demo --qemu                   with the real image in QEMU beside the simulated sensors
  ossicle demo --qemu --image FILE      with this image, an ELF file for the board lm3s6965evb")]
pub struct Demo {
    /// How long the sensors report before the server is killed
    #[arg(long = "for", value_name = "DURATION", default_value = "20s", value_parser = humantime::parse_duration)]
    pub lasting: Duration,
    /// Run the real image in QEMU beside the simulated sensors
    #[arg(long)]
    pub qemu: bool,
    /// The image [default: `firmware-example` beside this binary, or else built in ./firmware-example with cargo]
    #[arg(long, value_name = "FILE", requires = "qemu")]
    pub image: Option<PathBuf>,
}

impl Demo {
    /// Tells the story.
    ///
    /// # Errors
    /// Names the first promise that did not hold.
    pub async fn run(self) -> Result<(), Failure> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&interrupted);
        let mut telling = tokio::task::spawn_blocking(move || self.tell(heard));
        let told = tokio::select! {
            told = &mut telling => told,
            () = told_to_end() => {
                // The story ends at its next line, and takes its processes and its directory with it.
                interrupted.store(true, Ordering::Relaxed);
                let _ = telling.await;
                return Err(story::interrupted());
            }
        };
        told.unwrap_or_else(|_| Err(Failure::refused("the demo itself broke: please report what stands above")))
    }

    fn tell(self, interrupted: Arc<AtomicBool>) -> Result<(), Failure> {
        let binary = std::env::current_exe()
            .map_err(|error| Failure::refused(format!("cannot find this binary: {error}: is it still there?")))?;
        let bold = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let reader = Arc::clone(&interrupted);
        let said: Said = Arc::new(move |line| {
            let line = super::harmless(line);
            let chapter = bold && !line.starts_with(' ');
            let line = if chapter { format!("\x1b[1m{line}\x1b[0m") } else { line };
            let mut out = io::stdout().lock();
            if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                // Nobody reads the story any more.
                reader.store(true, Ordering::Relaxed);
            }
        });
        let mut story = Story::new(binary, said);
        story.lasting = self.lasting;
        story.interrupted = interrupted;
        if self.qemu {
            story.image = Some(image::find(self.image, &story)?);
        }
        story.tell()
    }
}

/// An interrupt from the keyboard, the end of the terminal, or whoever ends processes.
async fn told_to_end() {
    let (Ok(mut terminated), Ok(mut hung_up)) = (signal(SignalKind::terminate()), signal(SignalKind::hangup())) else {
        return core::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated.recv() => {}
        _ = hung_up.recv() => {}
    }
}
