//! The example device in QEMU, as a test sees it: started from an image and an identity page, heard through
//! its log, gone when the value is dropped.
//!
//! The device logs defmt frames through semihosting; QEMU writes them to its standard output, and a thread
//! decodes them with the strings that only the ELF image has. Nothing here knows what the firmware does.
//! It refuses to share a QEMU between tests: each has its own, with its own user network, in which the
//! host's loopback is 10.0.2.2.

use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use defmt_decoder::{DecodeError, Table};

/// The boards that the example runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Board {
    /// Cortex-M3, 256 KiB of flash, 64 KiB of RAM, an Ethernet controller on the chip.
    #[default]
    Lm3s6965evb,
    /// Cortex-M4, 4 MiB of each, an Ethernet controller beside the chip.
    Mps2An386,
}

impl Board {
    /// The target that stands for this board in the firmware's workspace.
    pub fn target(self) -> &'static str {
        match self {
            Self::Lm3s6965evb => "thumbv7m-none-eabi",
            Self::Mps2An386 => "thumbv7em-none-eabi",
        }
    }

    /// The machine and its network card, as QEMU calls them.
    fn machine(self) -> (&'static str, &'static str) {
        match self {
            Self::Lm3s6965evb => ("lm3s6965evb", "stellaris"),
            Self::Mps2An386 => ("mps2-an386", "lan9118"),
        }
    }

    /// Where its flash keeps the identity page.
    fn page_address(self) -> u32 {
        match self {
            Self::Lm3s6965evb => 0x0003_F800,
            Self::Mps2An386 => 0x003F_F800,
        }
    }
}

/// How a device is run, beside its image and page. The default is as fast as the host can, with a network.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The board that the image is for.
    pub board: Board,
    /// Each instruction takes one nanosecond of the device's time, so that its `instructions()` counts
    /// instructions. Slower, and time no longer passes as on the wall.
    pub icount: bool,
    /// Who listens here for QEMU shares the device's wire: each frame, in both directions, is preceded by its length in four
    /// bytes, big endian.
    pub wire: Option<SocketAddr>,
    /// A file that gets all frames on the device's wire, in pcap format.
    pub capture: Option<PathBuf>,
    /// More arguments for QEMU, as they are.
    pub arguments: Vec<String>,
}

/// One line of the device's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `trace`, `debug`, `info`, `warn` or `error`; `print` for a line without a level.
    pub level: &'static str,
    /// The device's time, as its image formats it; empty if it does not.
    pub time: String,
    /// The text.
    pub message: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.time, self.level, self.message)
    }
}

/// A running device. Dropping it ends its QEMU.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    incoming: Receiver<Line>,
    lines: Vec<Line>,
    /// How many of `lines` a `wait_for` has passed over.
    seen: usize,
}

impl Qemu {
    /// Starts `image`, an ELF file with defmt strings, with `page` in the identity page's place; without
    /// one that flash is all zeros.
    ///
    /// # Panics
    ///
    /// When QEMU or one of the files is missing, or the image holds no defmt strings: the test cannot run.
    pub fn start(image: &Path, page: Option<&Path>, options: &Options) -> Self {
        let elf = std::fs::read(image).unwrap_or_else(|error| panic!("no image {}: {error}", image.display()));
        let table =
            Table::parse(&elf).expect("the image's defmt strings can be read").expect("the image has defmt strings");

        let mut child = command(image, page, options)
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-system-arm cannot be started: {error}"));
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (sender, incoming) = mpsc::channel();
        thread::spawn(move || {
            // An error is the end of the pipe, and so is a receiver that has gone.
            let _ = decode(stdout, &table, |line| sender.send(line).is_ok());
        });
        Self { child, incoming, lines: Vec::new(), seen: 0 }
    }

    /// All that the device has logged so far.
    pub fn lines(&mut self) -> &[Line] {
        self.lines.extend(self.incoming.try_iter());
        &self.lines
    }

    /// Waits for the next line that `predicate` accepts, after the one the last call returned.
    ///
    /// # Errors
    ///
    /// [`NotSeen`], with the whole log for the test's message, when the deadline passes or the log ends.
    /// The lines passed over count as not seen yet.
    pub fn wait_for(&mut self, mut predicate: impl FnMut(&Line) -> bool, deadline: Instant) -> Result<Line, NotSeen> {
        let mut next = self.seen;
        let why = loop {
            if let Some(line) = self.lines.get(next) {
                next += 1;
                if predicate(line) {
                    self.seen = next;
                    return Ok(line.clone());
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.incoming.recv_timeout(left) {
                Ok(line) => self.lines.push(line),
                Err(RecvTimeoutError::Timeout) => break "not in time",
                Err(RecvTimeoutError::Disconnected) => break "the log has ended",
            }
        };
        Err(NotSeen { why, lines: self.lines.clone() })
    }

    /// Waits until the device has ended the simulation by itself. `None`: it was still running at the
    /// deadline.
    pub fn wait_exit(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// The process id of this device's QEMU.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line was not logged.
#[derive(Clone)]
pub struct NotSeen {
    why: &'static str,
    lines: Vec<Line>,
}

impl fmt::Display for NotSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; the device logged:", self.why)?;
        self.lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl fmt::Debug for NotSeen {
    /// As `Display`: this is what a test shows that unwraps it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for NotSeen {}

fn command(image: &Path, page: Option<&Path>, options: &Options) -> Command {
    let (machine, card) = options.board.machine();
    let mut command = Command::new("qemu-system-arm");
    command
        .args(["-M", machine, "-display", "none", "-monitor", "none", "-serial", "none"])
        .args(["-chardev", "stdio,id=log,signal=off"])
        .args(["-semihosting-config", "enable=on,target=native,chardev=log"])
        .arg("-kernel")
        .arg(image);
    match options.wire {
        None => command.args(["-nic", &format!("user,id=net,model={card}")]),
        Some(address) => command
            .args(["-netdev", "user,id=net", "-netdev", &format!("socket,id=wire,connect={address}")])
            .args(["-netdev", "hubport,id=hub0,hubid=0,netdev=net", "-netdev", "hubport,id=hub1,hubid=0,netdev=wire"])
            .args(["-nic", &format!("hubport,hubid=0,model={card}")]),
    };
    if let Some(page) = page {
        let address = options.board.page_address();
        command.arg("-device").arg(format!("loader,file={},addr={address:#x},force-raw=on", escaped(page)));
    }
    if options.icount {
        command.args(["-icount", "shift=0"]);
    }
    if let Some(capture) = &options.capture {
        command.arg("-object").arg(format!("filter-dump,id=capture,netdev=net,file={}", escaped(capture)));
    }
    command.args(&options.arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// A path inside a QEMU option, where a comma stands for the next key unless it is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Decodes frames until the pipe ends or nobody listens any more.
fn decode(mut stdout: ChildStdout, table: &Table, mut heard: impl FnMut(Line) -> bool) -> io::Result<()> {
    let mut decoder = table.new_stream_decoder();
    let mut buffer = [0; 1024];
    loop {
        let n = stdout.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        decoder.received(&buffer[..n]);
        loop {
            let line = match decoder.decode() {
                Ok(frame) => Line {
                    level: frame.level().map_or("print", |level| level.as_str()),
                    time: frame.display_timestamp().map(|time| time.to_string()).unwrap_or_default(),
                    message: frame.display_message().to_string(),
                },
                Err(DecodeError::UnexpectedEof) => break,
                // The next frame begins behind the next delimiter; a test that misses this line says so.
                Err(DecodeError::Malformed) => continue,
            };
            if !heard(line) {
                return Ok(());
            }
        }
    }
}
