//! The commands of the story, as processes in its directory.
//!
//! Each reads nothing of what the person has configured, and is in a process group of its own: an interrupt from the
//! keyboard is the story's to hear, which then ends them by their handles.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::endpoint::Failure;

/// Lines of a log that are kept.
const LOG: usize = 10_000;
/// How often an interrupt is looked for.
const HEARTBEAT: Duration = Duration::from_millis(20);

/// A process that ends with this value.
pub(super) struct Process {
    child: Child,
    out: mpsc::Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts `command` in `folder`.
    pub(super) fn start(command: &mut Command, folder: &Path) -> Result<Self, Failure> {
        Self::start_with(command, folder, None)
    }

    /// The same with these lines as its standard input, which ends behind them. A few: a pipe has to hold them.
    pub(super) fn start_with(command: &mut Command, folder: &Path, input: Option<&str>) -> Result<Self, Failure> {
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("OSSICLE_")) {
            command.env_remove(name);
        }
        command.env_remove("RUST_LOG").env("XDG_CONFIG_HOME", folder).env("XDG_DATA_HOME", folder);
        command.current_dir(folder).process_group(0);
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            Failure::refused(format!("cannot start `{}`: {error}", command.get_program().to_string_lossy()))
        })?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            // One that has ended already says why itself.
            let _ = stdin.write_all(input.as_bytes());
        }
        let (lines, out) = mpsc::channel();
        let log = Arc::default();
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push(read(stdout, move |line| lines.send(line).is_ok()));
        }
        if let Some(stderr) = child.stderr.take() {
            let log: Arc<Mutex<Vec<String>>> = Arc::clone(&log);
            readers.push(read(stderr, move |line| {
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                if log.len() < LOG {
                    log.push(line);
                }
                true
            }));
        }
        Ok(Self { child, out, log, readers })
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended by itself.
    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The next line of its standard output, if it comes in time.
    pub(super) fn line(&self, patience: Duration) -> Option<String> {
        self.out.recv_timeout(patience).ok()
    }

    /// What it has written to standard error so far.
    pub(super) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has ended by itself; `None` if it was interrupted. With all that it wrote, errors first.
    pub(super) fn finish(mut self, interrupted: &AtomicBool) -> Option<(ExitStatus, Vec<String>)> {
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if !interrupted.load(Ordering::Relaxed) => std::thread::sleep(HEARTBEAT),
                _ => return None,
            }
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let written = self.log().into_iter().chain(self.out.try_iter()).collect();
        Some((status, written))
    }

    /// Ends it at once, as a power cut would.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read(from: impl Read + Send + 'static, mut line: impl FnMut(String) -> bool + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for text in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            if !line(String::from_utf8_lossy(&text).into_owned()) {
                break;
            }
        }
    })
}

/// Rests for a moment of `left`, short enough to hear an interrupt.
pub(super) fn moment(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).min(HEARTBEAT)
}
