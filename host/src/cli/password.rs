//! Passwords as people give them: typed twice where they are new and never shown, or one line of standard input. They
//! never come from an argument or a variable, where other users and logs would find them.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::{Zeroize, Zeroizing};

use crate::accounts::Password;
use crate::endpoint::Failure;

/// Bytes of the longest line that is read: more than any password has.
const MAX_LINE: u64 = 1024;

/// Asks for a password, of somebody or to enter by.
pub(super) async fn ask(whose: &str) -> Result<Password, Failure> {
    prepare(&line(&format!("Password of {whose}: ")).await?)
}

/// Asks for a new password: on a terminal twice.
pub(super) async fn ask_new(whose: &str) -> Result<Password, Failure> {
    let password = prepare(&line(&format!("New password of {whose}: ")).await?)?;
    password.check_new().map_err(|error| Failure::usage(error.to_string()))?;
    if io::stdin().is_terminal() {
        let again = line("The same again: ").await?;
        if Password::prepare(&again).ok().as_ref() != Some(&password) {
            return Err(Failure::usage("the two are not the same: nothing was changed, try again"));
        }
    }
    Ok(password)
}

fn prepare(typed: &str) -> Result<Password, Failure> {
    Password::prepare(typed).map_err(|error| Failure::usage(error.to_string()))
}

/// One line of standard input, which is not shown if it is a terminal.
async fn line(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |error: io::Error| Failure::refused(format!("cannot read the password: {error}"));
    // Here, and not where it is read: whoever interrupts this gets his terminal back, though the reading goes on.
    let _silence = if io::stdin().is_terminal() {
        let silence = Silence::begin().map_err(failed)?;
        let _ = write!(io::stderr(), "{prompt}");
        Some(silence)
    } else {
        None
    };
    let read = tokio::task::spawn_blocking(|| {
        // Room from the start: a growing vector would leave copies behind.
        let mut line = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_LINE).unwrap_or_default()));
        io::stdin().lock().take(MAX_LINE).read_until(b'\n', &mut line)?;
        io::Result::Ok(line)
    });
    let mut line = read.await.map_err(|_| Failure::refused("cannot read the password"))?.map_err(failed)?;
    if line.is_empty() {
        return Err(Failure::usage("there is no password on standard input: type it, or give it as one line"));
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    } else if line.len() == usize::try_from(MAX_LINE).unwrap_or_default() {
        return Err(Failure::usage("this line is longer than any password"));
    }
    match String::from_utf8(core::mem::take(&mut *line)) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) => {
            error.into_bytes().zeroize();
            Err(Failure::usage("a password is text in UTF-8"))
        }
    }
}

/// Nothing that is typed is shown, until this is dropped.
struct Silence(Termios);

impl Silence {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(io::stdin(), OptionalActions::Now, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
