//! The configuration of `serve` as operators write it, with the real binary: layers, mistakes, what `--check` says.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use ossicle_tests::cli::{Done, Piped, Running, binary};
use serde_json::Value;
use tempfile::TempDir;

/// `ossicle serve ARGUMENTS` in `directory`, with these variables and no others of ours.
fn command(directory: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(binary());
    let ours = std::env::vars_os().map(|(name, _)| name).filter(|name| name.to_string_lossy().starts_with("OSSICLE_"));
    ours.for_each(|name| {
        command.env_remove(name);
    });
    command.arg("serve").args(arguments).envs(variables.iter().copied()).current_dir(directory).env_remove("RUST_LOG");
    command
}

fn serve(directory: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Done {
    let mut running = Running::start(&mut command(directory, arguments, variables));
    running.end_input();
    running.wait()
}

fn setting<'c>(checked: &'c Value, key: &str) -> &'c Value {
    checked["settings"].as_array().unwrap().iter().find(|setting| setting["key"] == key).unwrap()
}

#[test]
fn check_says_what_it_would_start_with_and_from_where_and_starts_nothing() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("settings.toml");
    fs::write(&file, "# ours\nheartbeat = \"20s\"\ndata = \"server\"\nport = 1\nrsa = 2048\n").unwrap();
    let arguments = ["--config", "settings.toml", "--check", "--bind", "127.0.0.1"];
    let variables = [("OSSICLE_PORT", "5151"), ("OSSICLE_BIND", "0.0.0.0"), ("OSSICLE_RSA", "")];
    let checked = serve(directory.path(), &arguments, &variables);
    assert_eq!(checked.err, "");
    let text = checked.ok();
    for line in [
        "data = \"server\"                      # settings.toml, line 3",
        "bind = \"127.0.0.1\"                   # --bind",
        "port = 5151                          # OSSICLE_PORT",
        "enroll = \"open\"                      # default: bound to loopback only",
        "rsa = 2048                           # settings.toml, line 5",
        "heartbeat = \"20s\"                    # settings.toml, line 2",
        "timeout = \"45s\"                      # default",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} in {text}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");

    let json = serve(directory.path(), &[&arguments[..], &["--json"]].concat(), &variables).ok();
    let checked: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(checked["file"], "settings.toml");
    let port = setting(&checked, "port");
    assert_eq!(
        (&port["value"], &port["source"], &port["variable"]),
        (&5151.into(), &"environment".into(), &"OSSICLE_PORT".into())
    );
    let heartbeat = setting(&checked, "heartbeat");
    assert_eq!(
        (&heartbeat["value"], &heartbeat["source"], &heartbeat["line"]),
        (&"20s".into(), &"file".into(), &2.into())
    );
    assert_eq!(setting(&checked, "bind")["source"], "flag");
    assert_eq!(setting(&checked, "advertise")["value"], Value::Null);
}

#[test]
fn what_check_prints_is_a_file_of_settings() {
    let directory = TempDir::new().unwrap();
    let variables = [("OSSICLE_MAILBOX_BYTES", "1MiB"), ("OSSICLE_DATA", "a \"b\" \u{202e}")];
    let first = serve(directory.path(), &["--check"], &variables).ok();
    assert!(!first.contains('\u{202e}'), "{first}");
    fs::write(directory.path().join("saved.toml"), &first).unwrap();
    let second = serve(directory.path(), &["--check", "--config", "saved.toml"], &[]).ok();
    let values = |text: &str| -> Vec<String> {
        text.lines().skip(1).map(|line| line.split(" # ").next().unwrap().trim_end().to_owned()).collect()
    };
    assert_eq!(values(&first), values(&second));
    assert!(second.contains("saved.toml, line 17"), "{second}");
}

#[test]
fn every_mistake_is_named_with_its_place_and_nothing_is_made() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("bad.toml"), "prot = 1\ntimeout = 45\n\"x\\u001b[31m\" = 1\n").unwrap();
    let variables = [("OSSICLE_CONFIG", "bad.toml"), ("OSSICLE_RSA", "1024")];
    for arguments in [&["--port", "70000"][..], &["--port", "70000", "--check"]] {
        let done = serve(directory.path(), arguments, &variables);
        assert_eq!((done.code, done.out.as_str()), (Some(2), ""));
        let said: Vec<&str> = done.err.lines().collect();
        let expected = [
            "ossicle: --port: give a number from 0 to 65535",
            "ossicle: OSSICLE_RSA: give 2048, 3072 or 4096",
            "ossicle: bad.toml, line 2: timeout: is a number, and must be a text in quotes",
            "ossicle: bad.toml, line 1: there is no key `prot`: did you mean `port`?",
            "ossicle: bad.toml, line 3: there is no key `x\\u{1b}[31m`: see what there is with `ossicle serve --check`",
        ];
        for sentence in expected {
            assert!(said.contains(&sentence), "{sentence:?} in {said:#?}");
        }
        assert_eq!(said.len(), expected.len(), "{said:#?}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");
    serve(directory.path(), &["--timeout", "10s"], &[])
        .failed(2, "timeout (10s; --timeout) must be longer than heartbeat");
    assert_eq!(serve(directory.path(), &["--json"], &[]).code, Some(2));
    assert_eq!(serve(directory.path(), &["--prot", "1"], &[]).code, Some(2));
}

#[test]
fn a_server_starts_with_the_file_of_its_data_directory() {
    let directory = TempDir::new().unwrap();
    fs::create_dir(directory.path().join("data")).unwrap();
    let file = directory.path().join("data/ossicle.toml");
    fs::write(&file, "bind = \"127.0.0.1\"\nport = 0\nrsa = 2048\nenroll = \"token\"\nadvertise = \"localhost\"\n")
        .unwrap();
    let mut start = command(directory.path(), &["--data", "data"], &[("OSSICLE_PROT", "1")]);
    let server = Running::start(&mut start);
    let url = server.line();
    assert!(url.starts_with("ossicle://localhost:") && url.contains('.'), "{url}");
    server.signal("TERM");
    let done = server.wait();
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("no setting is called OSSICLE_PROT"), "{done:?}");
}

#[test]
fn completions_come_for_every_shell_and_end_quietly_when_nobody_reads() {
    for (shell, expected) in [("bash", "complete -F"), ("zsh", "#compdef ossicle"), ("fish", "complete -c ossicle")] {
        let mut command = Command::new(binary());
        let mut running = Running::start(command.args(["completions", shell]));
        running.end_input();
        let script = running.wait().ok();
        assert!(script.contains(expected) && script.contains("mailbox-bytes"), "{shell}: {script}");
    }
    let mut command = Command::new(binary());
    let closed = Piped::start(command.args(["completions", "zsh"])).close().wait();
    assert_eq!((closed.code, closed.err.as_str()), (Some(0), ""), "{closed:?}");
    let mut command = Command::new(binary());
    let wrong = Running::start(command.args(["completions", "tcsh"])).wait();
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
}
