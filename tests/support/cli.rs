//! The real binary, as people and scripts use it: a server and homes in a temporary directory, commands as processes.
//!
//! Nothing here sleeps to give something time: what is waited for is asked for until it is so, within a generous deadline.
//! Every process that is started is ended by its own handle.

use core::time::Duration;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, sleep};
use std::time::Instant;

use tempfile::TempDir;

/// Nothing that works takes so long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The binary, built once for all tests with the features that the tests were built with.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let here = std::env::current_exe().expect("a test knows its own path");
        let profile = here.ancestors().nth(2).expect("TARGET/PROFILE/deps/TEST").to_path_buf();
        let target = profile.parent().expect("TARGET/PROFILE");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "ossicle", "--bin", "ossicle", "--target-dir"]).arg(target);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        if core::any::type_name::<ossicle::crypto::HostAead>().starts_with("ossicle_core") {
            build.arg("--no-default-features");
        }
        let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(built.success(), "the binary is built");
        profile.join("ossicle")
    })
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Done {
    /// It succeeded; its standard output.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// It ended with this code, and this is in its one sentence on standard error.
    pub fn failed(self, code: i32, sentence: &str) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        let said: Vec<&str> = self.err.lines().filter(|line| line.starts_with("ossicle: ")).collect();
        assert!(matches!(said[..], [said] if said.contains(sentence)), "{sentence:?} in {self:?}");
        self
    }
}

/// A process that runs, with what it writes.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    out: Option<Receiver<String>>,
    err: Option<thread::JoinHandle<()>>,
    /// What it has written to its standard error so far.
    said: Arc<Mutex<String>>,
}

/// Collects what comes, line by line, while it comes.
fn collect(stderr: impl Read + Send + 'static) -> (thread::JoinHandle<()>, Arc<Mutex<String>>) {
    let said = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&said);
    let reading = thread::spawn(move || {
        let mut lines = BufReader::new(stderr);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            heard.lock().expect("nobody panics with it").push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    });
    (reading, said)
}

impl Running {
    /// Starts `command`.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (lines, out) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Whoever drops the receiver closes the pipe with it.
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        let (err, said) = collect(stderr);
        Self { stdin: child.stdin.take(), child, out: Some(out), err: Some(err), said }
    }

    /// What it has written to its standard error so far.
    pub fn said(&self) -> String {
        self.said.lock().expect("nobody panics with it").clone()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line of its standard output.
    pub fn line(&self) -> String {
        match self.out.as_ref().expect("its output is read").recv_timeout(DEADLINE) {
            Ok(line) => line,
            Err(error) => panic!("no line: {error}"),
        }
    }

    /// Whether it has nothing more to say and ends, or says nothing for a moment.
    pub fn is_silent(&self) -> bool {
        let said = self.out.as_ref().expect("its output is read").recv_timeout(Duration::from_millis(300));
        matches!(said, Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected))
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("its input is open").write_all(bytes).expect("it reads");
    }

    /// Ends its standard input.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Sends it a signal, by its id.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Kills it, as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Done {
        let status = self.status();
        let out = self.out.take().map(|out| out.into_iter().map(|line| line + "\n").collect()).unwrap_or_default();
        if let Some(err) = self.err.take() {
            let _ = err.join();
        }
        let err = self.said();
        Done { code: status.code(), out, err }
    }

    fn status(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "process {} does not end", self.child.id());
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A process whose standard output this test reads itself, so that it can close it.
pub struct Piped {
    running: Running,
    stdout: Option<BufReader<std::process::ChildStdout>>,
}

impl Piped {
    /// Starts `command`.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (err, said) = collect(stderr);
        let running = Running { child, stdin: None, out: None, err: Some(err), said };
        Self { running, stdout: Some(BufReader::new(stdout)) }
    }

    /// The next line.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.as_mut().expect("the pipe is open").read_line(&mut line).expect("a line");
        line
    }

    /// Closes the pipe, as `head -1` does, and hands back the process.
    pub fn close(mut self) -> Running {
        self.stdout = None;
        self.running
    }
}

/// A server and homes.
pub struct World {
    directory: TempDir,
    server: Option<Running>,
    /// What the server printed.
    pub url: String,
}

impl World {
    /// Starts a server on a free port of the loopback, to which everybody may enrol.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// Starts a server with further options.
    pub fn with(options: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut world = Self { directory, server: None, url: String::new() };
        world.start_server("0", options);
        world
    }

    /// Ends the server at once and starts it again on the same port.
    pub fn restart_server(&mut self) {
        let port = self.port();
        self.stop_server();
        self.start_server(&port, &[]);
    }

    /// Starts the server again on the same port, with these options.
    pub fn restart_server_with(&mut self, options: &[&str]) {
        let port = self.port();
        self.stop_server();
        self.start_server(&port, options);
    }

    /// The server's port, as text.
    pub fn port(&self) -> String {
        self.url.split('#').next().and_then(|address| address.rsplit(':').next()).unwrap_or_default().to_owned()
    }

    /// The server's process id.
    pub fn server_id(&self) -> u32 {
        self.server.as_ref().expect("the server runs").id()
    }

    /// The lines of the present server's log so far.
    pub fn server_log(&self) -> Vec<String> {
        self.server.as_ref().map(|server| server.said().lines().map(str::to_owned).collect()).unwrap_or_default()
    }

    /// Tells the server to stop, and waits until it has.
    pub fn end_server(&mut self) {
        let server = self.server.take().expect("the server runs");
        server.signal("TERM");
        server.wait().ok();
    }

    /// Kills the server.
    pub fn stop_server(&mut self) {
        self.server = None;
    }

    fn start_server(&mut self, port: &str, options: &[&str]) {
        let mut command = Command::new(binary());
        command.args(["serve", "--bind", "127.0.0.1", "--port", port, "--data"]);
        command.arg(self.path("server")).args(options).env("RUST_LOG", "info");
        if !options.contains(&"--rsa") {
            command.args(["--rsa", "2048"]);
        }
        let server = Running::start(&mut command);
        self.url = server.line();
        assert!(self.url.starts_with("ossicle://127.0.0.1:"), "{}", self.url);
        self.server = Some(server);
    }

    /// A path in the temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `ossicle ARGUMENTS` with this home, to be run.
    pub fn command(&self, home: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("OSSICLE_HOME", self.path(home)).env_remove("RUST_LOG");
        command
    }

    /// Runs `ossicle ARGUMENTS` with this home to its end.
    pub fn run(&self, home: &str, arguments: &[&str]) -> Done {
        let mut running = Running::start(&mut self.command(home, arguments));
        running.end_input();
        running.wait()
    }

    /// Starts `ossicle ARGUMENTS` with this home.
    pub fn spawn(&self, home: &str, arguments: &[&str]) -> Running {
        Running::start(&mut self.command(home, arguments))
    }

    /// Makes an identity in a home of the same name.
    pub fn init(&self, name: &str) {
        self.run(name, &["init", "--name", name, "--rsa", "2048", &self.url]).ok();
    }

    /// Starts `listen --json` and waits until the client is online.
    pub fn listen(&self, name: &str, arguments: &[&str]) -> Running {
        let running = self.spawn(name, &[&["listen", "--json"], arguments].concat());
        self.wait_online(name, true);
        running
    }

    /// Waits until the directory says so.
    pub fn wait_online(&self, name: &str, online: bool) {
        let begun = Instant::now();
        // Whoever asked before the listener has the home would be the one that it waits for.
        let lock = || std::fs::read_to_string(self.path(name).join("lock"));
        let holds = || lock().is_ok_and(|lock| lock.contains("listen") || lock.contains("chat"));
        while online && !holds() {
            assert!(begun.elapsed() < DEADLINE, "{name} does not listen");
            sleep(Duration::from_millis(20));
        }
        let expected = format!("\"online\":{online}");
        while !self.run(name, &["who", name, "--json"]).ok().contains(&expected) {
            assert!(begun.elapsed() < DEADLINE, "{name}: {expected}");
            sleep(Duration::from_millis(20));
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
