//! A terminal: a real pseudo-terminal with a process in it, and what a person sees on its screen.

use core::num::NonZero;
use core::time::Duration;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Instant;

use pty_process::Size;
use pty_process::blocking::open;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::cli::DEADLINE;

fn at_least_one(number: u16) -> NonZero<u16> {
    NonZero::new(number).unwrap_or(NonZero::<u16>::MIN)
}

/// A terminal in which a process runs.
pub struct Terminal {
    child: Child,
    side: File,
    parser: vt100::Parser,
    /// Every byte that the process wrote.
    pub raw: Vec<u8>,
}

impl Terminal {
    /// Starts `command` in a terminal of so many rows and columns.
    pub fn start(command: &Command, (rows, columns): (u16, u16)) -> Self {
        let (pty, pts) = open().expect("a pseudo-terminal");
        pty.resize(Size::new(rows, columns)).expect("it has a size");
        let mut inside = pty_process::blocking::Command::new(command.get_program())
            .args(command.get_args())
            .env("TERM", "xterm-256color");
        for (name, value) in command.get_envs() {
            inside = match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        let child = inside.spawn(pts).expect("the binary runs");
        let side = File::from(OwnedFd::from(pty));
        Self { child, side, parser: vt100::Parser::new(at_least_one(rows), at_least_one(columns), 0), raw: Vec::new() }
    }

    /// Types this.
    pub fn write(&mut self, keys: impl AsRef<[u8]>) {
        // More than the terminal takes at once waits until the process has read; what it shows meanwhile is read here.
        for keys in keys.as_ref().chunks(512) {
            self.side.write_all(keys).expect("the terminal is there");
            self.read(Duration::ZERO);
        }
    }

    /// Whether it ever wrote these bytes.
    pub fn wrote(&self, bytes: &[u8]) -> bool {
        self.raw.windows(bytes.len()).any(|raw| raw == bytes)
    }

    /// Waits until it has written these bytes, wherever they are by now.
    pub fn will_write(&mut self, bytes: &[u8]) {
        let begun = Instant::now();
        while !self.wrote(bytes) {
            let text = String::from_utf8_lossy(bytes);
            assert!(begun.elapsed() < DEADLINE, "{text:?} is not written, but:\n{}", self.screen());
            self.read(Duration::from_millis(50));
        }
    }

    /// What is on the screen.
    pub fn screen(&self) -> String {
        self.parser.screen().contents()
    }

    /// Waits until the screen shows this text.
    pub fn shows(&mut self, text: &str) {
        self.until(text, |screen| screen.contains(text));
    }

    /// Waits until the line of the cursor is this one.
    pub fn line_is(&mut self, line: &str) {
        let begun = Instant::now();
        loop {
            let screen = self.parser.screen();
            let row = usize::from(screen.cursor_position().0);
            let shown = screen.rows(0, screen.size().1.get()).nth(row).unwrap_or_default();
            if shown.trim_end() == line.trim_end() {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "{line:?} is not typed, on the screen:\n{}", self.screen());
            self.read(Duration::from_millis(50));
        }
    }

    /// Waits until the screen is as it must be.
    pub fn until(&mut self, what: &str, holds: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        while !holds(&self.screen()) {
            assert!(begun.elapsed() < DEADLINE, "{what:?} is not shown, but:\n{}", self.screen());
            self.read(Duration::from_millis(50));
        }
    }

    /// Another size of its window.
    pub fn resize(&mut self, (rows, columns): (u16, u16)) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.side, size).expect("it has a size");
        self.parser.screen_mut().set_size(at_least_one(rows), at_least_one(columns));
    }

    /// Whether what is typed is shown and read line by line, as a shell wants it.
    pub fn is_ordinary(&self) -> bool {
        let modes = tcgetattr(&self.side).expect("a terminal").local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Sends the process a signal, by its id.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Waits for the end of the process; its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            self.read(Duration::from_millis(20));
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                // What it wrote last comes in pieces.
                while self.read(Duration::ZERO) {}
                return status.code();
            }
            assert!(begun.elapsed() < DEADLINE, "it does not end:\n{}", self.screen());
        }
    }

    /// Closes the terminal, as when its window is closed; the exit code of the process.
    pub fn vanish(mut self) -> Option<i32> {
        self.side = File::open("/dev/null").expect("it is there");
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status.code();
            }
            assert!(begun.elapsed() < DEADLINE, "it does not end");
            sleep(Duration::from_millis(20));
        }
    }

    /// Whether there was anything.
    fn read(&mut self, patience: Duration) -> bool {
        let patience = Timespec { tv_sec: 0, tv_nsec: i64::from(patience.subsec_nanos()) };
        let mut bytes = [0; 65536];
        let mut ready = [PollFd::new(&self.side, PollFlags::IN)];
        if poll(&mut ready, Some(&patience)).is_ok_and(|count| count > 0) {
            // An error is the end of a process whose terminal this was.
            match self.side.read(&mut bytes) {
                Ok(len) if len > 0 => {
                    self.raw.extend_from_slice(&bytes[..len]);
                    self.parser.process(&bytes[..len]);
                    return true;
                }
                _ => sleep(Duration::from_millis(5)),
            }
        }
        false
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
