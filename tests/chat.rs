//! `ossicle chat` as scripts use it, through pipes, and as people do, in a real pseudo-terminal.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::process::Command;

use ossicle_tests::cli::{Done, Running, World, binary};
use ossicle_tests::terminal::Terminal;

/// What a terminal obeys, or what hides what is there: clears the screen, writes the clipboard, sets the title, turns the
/// reading direction, makes a new line, rings.
const HOSTILE: &str = "a\u{1b}[2Jb\u{1b}]52;c;aGFoYQ==\u{7}c\u{1b}]0;title\u{7}d\u{202e}e\u{2066}f\ng\rh\u{9b}2Ji\u{8}";
/// The same, as it is shown.
const HARMLESS: &str =
    "a\\u{1b}[2Jb\\u{1b}]52;c;aGFoYQ==\\u{7}c\\u{1b}]0;title\\u{7}d\\u{202e}e\\u{2066}f\\u{a}g\\u{d}h\\u{9b}2Ji\\u{8}";

fn people(names: &[&str]) -> World {
    let world = World::new();
    for name in names {
        world.init(name);
    }
    world
}

/// `printf INPUT | ossicle chat`, to its end.
fn chat(world: &World, home: &str, input: impl AsRef<[u8]>) -> Done {
    let mut chat = world.spawn(home, &["chat"]);
    chat.write(input.as_ref());
    chat.end_input();
    chat.wait()
}

/// The text of a line of `listen --json`.
fn text(line: &str) -> String {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    line["text"].as_str().unwrap().to_owned()
}

fn terminal(world: &World, home: &str) -> Terminal {
    terminal_of(world, home, &["chat"], (24, 100))
}

fn terminal_of(world: &World, home: &str, arguments: &[&str], size: (u16, u16)) -> Terminal {
    let mut command: Command = world.command(home, arguments);
    command.env_remove("NO_COLOR");
    Terminal::start(&command, size)
}

#[test]
fn a_script_tells_and_leaves() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let done = chat(&world, "alice", "/tell bob hi\nplain text\n\n//slash\n/quit\nnever\n");
    assert_eq!(done.err, "");
    assert_eq!(done.ok(), "  ✓ delivered to bob: hi\n  ✓ delivered to bob: plain text\n  ✓ delivered to bob: /slash\n");
    for said in ["hi", "plain text", "/slash"] {
        let line = bob.line();
        assert!(line.contains("\"signed\":true"), "{line}");
        assert_eq!(text(&line), said);
    }
    // The end of the input is an end as good as /quit, and waits for what was sent, also for more than go at a time.
    let many: String = (0..100).map(|n| format!("/tell BOB line {n}\n")).collect();
    assert_eq!(chat(&world, "alice", many).ok().lines().count(), 100);
    for n in 0..100 {
        assert_eq!(text(&bob.line()), format!("line {n}"));
    }
    assert!(bob.is_silent());
    assert_eq!(chat(&world, "alice", "").ok(), "");
}

#[test]
fn each_question_is_answered_before_the_next_line() {
    let world = people(&["Zora", "alice", "Bob", "bobby"]);
    let _zora = world.listen("Zora", &[]);
    let _bobby = world.listen("bobby", &[]);
    let out = chat(&world, "alice", "/list\n").ok();
    assert_eq!(out, "alice  online\nbobby  online\nZora   online\n", "sorted, whatever the case");
    let out = chat(&world, "alice", "/who\n").ok();
    let names: Vec<&str> = out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(names, ["alice", "Bob", "bobby", "Zora"]);
    assert!(out.contains("Bob    offline, last seen 2"), "{out}");
    assert_eq!(chat(&world, "alice", "/who B*y\n/who q?\n").ok(), "bobby  online\nnobody has such a name\n");

    let out = chat(&world, "alice", "/status\n").ok();
    assert!(
        out.lines().any(|line| line.starts_with("  connected  since 2") && line.ends_with("a resumed channel")),
        "{out}"
    );
    let address = world.url.strip_prefix("ossicle://").unwrap().split('#').next().unwrap();
    assert!(out.starts_with(&format!("alice at {address}\n  connected  ")), "{out}");
    let own = out.lines().find(|line| line.starts_with("  key ")).unwrap().to_owned();
    assert!(out.contains("waiting    0 to be shown, 0 not confirmed"), "{out}");
    let out = chat(&world, "alice", "/verify\n").ok();
    assert!(out.contains(&own), "{out}");
    let out = chat(&world, "alice", "/verify Bob\n").ok();
    let shown = world.run("alice", &["verify", "Bob"]).ok();
    assert_eq!(out, shown, "as the command of that name shows it");
    assert!(chat(&world, "alice", "/verify Bob accept\n").ok().contains("nothing to accept"));

    let help = chat(&world, "alice", "/help\n").ok();
    for command in ["/tell", "/list", "/who", "/status", "/verify", "/help", "/quit"] {
        assert!(help.contains(command), "{command}");
    }
}

#[test]
fn what_was_said_is_shown_again_and_lies_sealed_on_the_disk() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.spawn("bob", &["chat"]);
    world.wait_online("bob", true);
    chat(&world, "alice", "/tell bob the harbour at nine\n").ok();
    assert!(bob.line().ends_with("alice: the harbour at nine"));
    let alice = world.listen("alice", &[]);
    bob.write(b"/tell alice and the lighthouse at ten\n");
    assert!(bob.line().contains("delivered to alice"));
    bob.end_input();
    bob.wait().ok();
    drop(alice);
    let said = |home: &str, input: &str| {
        let out = chat(&world, home, input).ok();
        out.lines().map(|line| line.split_once("Z ").unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(said("bob", "/history ALICE\n"), ["alice: the harbour at nine", "you: and the lighthouse at ten"]);
    for file in std::fs::read_dir(world.path("bob")).unwrap() {
        let path = file.unwrap().path();
        let bytes = if path.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        for secret in ["harbour", "lighthouse"] {
            assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret} in {path:?}");
        }
    }
    // A new identity key opens it, too.
    world.run("bob", &["init", "--rotate"]).ok();
    assert_eq!(said("bob", "/history alice\n").len(), 2);
    let erased = "what was said with alice is erased here\nnothing that was said with alice is kept here\n";
    assert_eq!(chat(&world, "bob", "/history alice erase\n/history alice\n").ok(), erased);

    let without = |home: &str, input: &str| {
        let mut chat = world.spawn(home, &["chat", "--no-history"]);
        chat.write(input.as_bytes());
        chat.end_input();
        chat.wait()
    };
    without("bob", "/tell alice not this\n").ok();
    assert!(without("bob", "/history alice\n").err.contains("--no-history"));
    assert_eq!(chat(&world, "bob", "/history alice\n").ok(), "nothing that was said with alice is kept here\n");
    assert!(chat(&world, "alice", "/history\n").err.contains("/history NAME"));
}

#[test]
fn what_is_not_done_is_said_on_standard_error_and_by_the_exit_code() {
    let world = people(&["alice", "bob"]);
    let failed = |input: &[u8], code: i32, sentence: &str| {
        let done = chat(&world, "alice", input);
        assert_eq!((done.code, &*done.out), (Some(code), ""), "{done:?}");
        assert!(done.err.contains(sentence), "{sentence:?} in {done:?}");
        assert!(done.err.lines().all(|line| line.len() < 400), "{done:?}");
    };
    failed(b"/tell carol hi\n", 1, "✗ not delivered to carol: hi: refused(unknown)");
    failed(b"/tell alice hi\n", 2, "own name");
    failed(b"to nobody\n", 2, "to whom?");
    failed(b"/lsit\n", 2, "did you mean /list?");
    failed(b"/exit\n", 2, "/help");
    failed(b"/verify zoe\n", 1, "refused(unknown)");
    failed("/tell p\u{430}ypal hi\n".as_bytes(), 2, "mix scripts");
    failed("/tell bob\u{202e} hi\n".as_bytes(), 2, "\\u{202e}");
    failed("/who \u{1b}[2J*\n".as_bytes(), 2, "\\u{1b}");
    failed("/\u{1b}[2J\u{202e}\n".as_bytes(), 2, "there is no /\\u{1b}[2J\\u{202e}");
    failed(b"/who [z\n", 2, "']'");
    failed(b"/tell bob \xff\xfe\n", 1, "not UTF-8");
    failed(&[&b"/tell bob "[..], &[b'x'; 16_281], b"\n"].concat(), 1, "refused(too-large)");
    failed(&[&b"/tell "[..], &[b'x'; 5_000], b" hi\n"].concat(), 2, "at most 64 bytes");
    // One failure does not end it, and the first one counts.
    let bob = world.listen("bob", &[]);
    let done = chat(&world, "alice", b"/lsit\n\xff\n/tell bob longest\n");
    assert_eq!((done.code, &*done.out), (Some(2), "  ✓ delivered to bob: longest\n"), "{done:?}");
    assert_eq!(text(&bob.line()), "longest");
    // Unreachable is not refused.
    drop(bob);
    let mut world = world;
    world.stop_server();
    let done = chat(&world, "alice", "/tell bob hi\n");
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.err.contains("✗ not confirmed by bob: hi: not reached within 30s"), "{done:?}");
}

#[test]
fn what_is_told_to_somebody_offline_is_at_the_server_and_settled_later() {
    let world = people(&["alice", "bob"]);
    let told = chat(&world, "alice", "/tell bob are you there?\n").ok();
    assert!(told.starts_with("  … bob is offline"), "{told}");
    assert!(told.ends_with(": stored until bob comes: are you there?\n"), "{told}");
    assert_eq!(text(&world.run("bob", &["listen", "--json", "--count", "1"]).ok()), "are you there?");
    let mut alice = world.spawn("alice", &["chat"]);
    let settled = alice.line();
    assert!(settled.starts_with("  ✓ delivered to bob: are you there?, of 20"), "{settled}");
    alice.end_input();
    alice.wait().ok();
}

#[test]
fn an_enormous_line_does_not_eat_the_memory() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut chat = world.spawn("alice", &["chat"]);
    let chunk = vec![b'x'; 1_000_000];
    for _ in 0..100 {
        chat.write(&chunk);
    }
    chat.write(b"\n/tell bob short\n");
    assert_eq!(chat.line(), "  ✓ delivered to bob: short");
    let status = std::fs::read_to_string(format!("/proc/{}/status", chat.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 80_000, "{peak} kB");
    chat.end_input();
    let done = chat.wait();
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.err.contains("refused(too-large)"), "{done:?}");
    assert_eq!(text(&bob.line()), "short");
    assert!(bob.is_silent());
}

#[test]
fn what_came_while_nobody_read_is_shown_at_the_start_and_once() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.listen("bob", &["nobody"]);
    for said in ["one", HOSTILE] {
        world.run("alice", &["send", "bob", said]).ok();
    }
    bob.kill();
    let out = chat(&world, "bob", "/help\n").ok();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].ends_with("Z alice: one"), "{out}");
    assert!(lines[1].ends_with(&format!("Z alice: {HARMLESS}")), "{out}");
    assert!(lines[2].starts_with("/tell"), "{out}");
    assert_eq!(chat(&world, "bob", "").ok(), "");
}

#[test]
fn a_closed_pipe_ends_it_quietly_and_loses_nothing() {
    let world = people(&["alice", "bob"]);
    for command in ["chat", "listen"] {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("{} {command} | head -1; echo code $?", binary().display()));
        shell.env("OSSICLE_HOME", world.path("bob"));
        let mut bob = Running::start(&mut shell);
        world.wait_online("bob", true);
        world.run("alice", &["send", "bob", "first"]).ok();
        assert!(bob.line().ends_with("alice: first"));
        // It learns that nobody reads when it has something to say; its input is still open.
        world.run("alice", &["send", "bob", "second"]).ok();
        assert_eq!(bob.line(), "code 0");
        bob.end_input();
        let done = bob.wait();
        assert_eq!((done.code, &*done.err), (Some(0), ""), "{done:?}");
        let rest = world.run("bob", &["listen", "--json", "--count", "1"]).ok();
        assert_eq!(text(&rest), "second");
    }
}

#[test]
fn others_send_through_the_chat_and_nobody_reads_beside_it() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.spawn("bob", &["chat"]);
    world.wait_online("bob", true);
    let mut alice = world.spawn("alice", &["chat"]);
    world.wait_online("alice", true);
    world.run("bob", &["send", "alice", "through the chat"]).ok();
    assert!(alice.line().ends_with("bob: through the chat"));
    for reader in ["chat", "listen"] {
        world.run("bob", &[reader]).failed(1, "another `ossicle chat`");
    }
    bob.write(b"/tell alice typed\n");
    assert!(alice.line().ends_with("bob: typed"));
    assert_eq!(bob.line(), "  ✓ delivered to alice: typed");
    world.run("alice", &["send", "bob", "deniable", "--no-sign"]).ok();
    assert!(bob.line().ends_with("alice (not signed): deniable"));
    alice.write(b"/quit\n");
    assert_eq!(alice.wait().code, Some(0));
    bob.signal("INT");
    assert_eq!(bob.wait().code, Some(130));
}

#[test]
fn a_key_that_changed_is_cried_out_and_accepted() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.listen("bob", &[]);
    chat(&world, "alice", "/tell bob hello\n").ok();
    assert_eq!(text(&bob.line()), "hello");
    bob.kill();
    let data = world.path("server");
    world.run("alice", &["revoke", "bob", "--data", data.to_str().unwrap()]).ok();
    world.run("other", &["init", "--name", "bob", "--rsa", "2048", &world.url]).ok();
    let other = world.spawn("other", &["listen", "--json"]);
    while !world.run("alice", &["who", "bob", "--json"]).ok().contains("\"online\":true") {}

    // In a terminal it stands out; nothing goes there before it is accepted.
    let mut alice = terminal(&world, "alice");
    alice.shows("> ");
    alice.write("/tell bob secret\r");
    alice.shows("KEY CHANGED: the identity key of bob");
    alice.shows("✗ not delivered to bob: secret");
    assert!(alice.wrote(b"\x1b[1;97;41mKEY CHANGED"), "in colours of its own");
    assert!(other.is_silent());
    alice.write("/quit\r");
    assert_eq!(alice.wait(), Some(0));

    let done = chat(&world, "alice", "/tell bob secret\n/verify bob\n");
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.err.contains("KEY CHANGED") && done.err.contains("/verify bob accept"), "{done:?}");
    assert!(done.err.contains("✗ not delivered to bob: secret: refused(key-changed)"), "{done:?}");
    assert!(done.out.contains("bob, the pinned key") && done.out.contains("safety number"), "{done:?}");
    assert!(other.is_silent());

    let out = chat(&world, "alice", "/verify bob accept\n/tell bob welcome\n").ok();
    assert!(out.contains("The new key is accepted."), "{out}");
    assert!(out.ends_with("  ✓ delivered to bob: welcome\n"), "{out}");
    assert_eq!(text(&other.line()), "welcome");
    assert_eq!(chat(&world, "alice", "/tell bob again\n").err, "");
}

#[test]
fn what_comes_does_not_break_the_line_being_typed() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut alice = terminal(&world, "alice");
    alice.shows("alice at 127.0.0.1:");
    alice.write("/tell bob first\r");
    alice.shows("✓ delivered to bob: first");
    alice.line_is("bob> ");
    alice.write("half a li");
    alice.line_is("bob> half a li");
    world.run("bob", &["send", "alice", "in between"]).ok();
    alice.shows("bob: in between\nbob> half a li");
    alice.write("ne\u{1b}[D\u{1b}[D");
    world.run("bob", &["send", "alice", HOSTILE]).ok();
    alice.until("the whole line, harmless", |screen| screen.contains("bob: a\\u{1b}[2J"));
    alice.line_is("bob> half a line");
    alice.write("\r");
    alice.shows("✓ delivered to bob: half a line");
    for said in ["first", "half a line"] {
        assert_eq!(text(&bob.line()), said);
    }
    for hostile in
        [&b"\x1b[2J"[..], b"\x1b]52", b"\x1b]0;", "\u{202e}".as_bytes(), "\u{2066}".as_bytes(), "\u{9b}".as_bytes()]
    {
        assert!(!alice.wrote(hostile), "{hostile:?}");
    }
    // What a person types ahead is not lost: several lines at once, and the end.
    alice.write("one\r/lsit\rtwo\r/quit\r");
    assert_eq!(alice.wait(), Some(0));
    let screen = alice.screen();
    for shown in ["✓ delivered to bob: one", "did you mean /list?", "✓ delivered to bob: two"] {
        assert!(screen.contains(shown), "{shown:?} on\n{screen}");
    }
    assert_eq!((text(&bob.line()), text(&bob.line())), ("one".to_owned(), "two".to_owned()));
    assert!(alice.is_ordinary());
}

#[test]
fn names_are_completed_and_lines_come_back() {
    let world = people(&["alice", "bob", "Боб"]);
    let bob = world.listen("bob", &[]);
    let mut alice = terminal(&world, "alice");
    alice.shows("alice at ");
    // Names are known once the server has told them.
    alice.write("/who\r");
    alice.shows("Боб    offline");
    alice.write("/te\t");
    alice.line_is("> /tell ");
    alice.write("BO\tthere you are");
    alice.line_is("> /tell bob there you are");
    alice.write("\r");
    alice.shows("✓ delivered to bob: there you are");
    alice.write("/ver\tбо\tacc\t");
    alice.line_is("bob> /verify Боб accept ");
    // The line is dropped, and not kept.
    alice.write("\u{3}");
    alice.line_is("bob> ");
    alice.write("\u{1b}[A");
    alice.line_is("bob> /tell bob there you are");
    alice.write("\u{1b}[A");
    alice.line_is("bob> /who");
    alice.write("\u{1b}[B\r");
    assert_eq!((text(&bob.line()), text(&bob.line())), ("there you are".to_owned(), "there you are".to_owned()));
    // Nothing of it is on disk.
    alice.write("/quit\r");
    assert_eq!(alice.wait(), Some(0));
    for file in std::fs::read_dir(world.path("alice")).unwrap() {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap_or_default();
        assert!(!bytes.windows(13).any(|bytes| bytes == b"there you are"), "{}", path.display());
    }
}

#[test]
fn control_keys_and_signals_leave_an_ordinary_terminal() {
    let world = people(&["alice"]);
    let started = || {
        let mut alice = terminal(&world, "alice");
        alice.shows("alice at ");
        alice.line_is("> ");
        alice
    };
    let mut alice = started();
    alice.write("\u{4}");
    assert_eq!(alice.wait(), Some(0));
    assert!(alice.is_ordinary());

    let mut alice = started();
    alice.write("not sent");
    alice.line_is("> not sent");
    alice.write("\u{3}");
    alice.line_is("> ");
    alice.write("\u{3}");
    assert_eq!(alice.wait(), Some(130));
    assert!(alice.is_ordinary());

    for signal in ["INT", "TERM", "HUP"] {
        let mut alice = started();
        assert!(!alice.is_ordinary(), "a line is being edited");
        alice.write("half");
        alice.line_is("> half");
        alice.signal(signal);
        assert_eq!(alice.wait(), Some(130), "{signal}");
        assert!(alice.is_ordinary(), "{signal}");
    }

    // The window is closed: it ends, and the home is free.
    let mut alice = started();
    alice.write("half");
    alice.line_is("> half");
    assert!(matches!(alice.vanish(), Some(0 | 130)));
    world.run("alice", &["who"]).ok();
}

#[test]
fn what_comes_while_former_lines_are_searched_is_not_lost() {
    let world = people(&["alice", "bob"]);
    let mut alice = terminal_of(&world, "alice", &["chat"], (50, 100));
    alice.shows("alice at ");
    world.wait_online("alice", true);
    alice.write("/help\r");
    alice.shows("/quit ");
    let search = |alice: &mut Terminal, said: [&str; 3]| {
        // A terminal that nobody edits a line on keeps this key for itself.
        alice.line_is("> ");
        alice.write("\u{12}hel");
        alice.shows("reverse-i-search)`hel'");
        for said in said {
            world.run("bob", &["send", "alice", said]).ok();
        }
    };
    search(&mut alice, ["one", "two", "three"]);
    // Nothing waits for anything else for ever.
    alice.write("\r");
    for said in ["one", "two", "three"] {
        alice.shows(&format!("bob: {said}\n"));
    }
    // Whoever leaves at once has not seen it, and sees it the next time.
    search(&mut alice, ["four", "five", "six"]);
    alice.write("\r/quit\r");
    assert_eq!(alice.wait(), Some(0));
    let next = chat(&world, "alice", "").ok();
    for said in ["four", "five", "six"] {
        let said = format!("bob: {said}");
        assert!(
            alice.screen().contains(&said) || next.contains(&said),
            "{said}: {next}, and before:\n{}",
            alice.screen()
        );
    }
    assert!(!next.contains("three"), "{next}");
}

#[test]
fn many_messages_and_many_lines_pass_each_other() {
    let world = people(&["alice", "bob"]);
    let mut bob = world.spawn("bob", &["chat"]);
    world.wait_online("bob", true);
    let mut alice = terminal(&world, "alice");
    alice.shows("alice at ");
    world.wait_online("alice", true);
    alice.write("/tell bob first\r");
    assert!(bob.line().ends_with("alice: first"));
    for n in 0..100 {
        bob.write(format!("/tell alice from bob {n}\n").as_bytes());
        alice.write(format!("from alice {n}\r"));
    }
    alice.will_write("✓ delivered to bob: from alice 99".as_bytes());
    alice.will_write(b"bob: from bob 99");
    alice.write("/quit\r");
    assert_eq!(alice.wait(), Some(0));
    for n in 0..100 {
        assert!(alice.wrote(format!("bob: from bob {n}\r\n").as_bytes()), "{n}");
        let delivered = format!("✓ delivered to bob: from alice {n}");
        assert!(alice.wrote(delivered.as_bytes()), "{n}");
    }
    let mut heard = 0;
    while heard < 100 {
        heard += usize::from(bob.line().contains("alice: from alice"));
    }
}

#[test]
fn it_is_stopped_and_continued_by_a_shell() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut shell = Command::new("sh");
    shell.args(["-i", "-m"]).env("OSSICLE_HOME", world.path("alice")).env("PS1", "shell: ").env_remove("ENV");
    let mut terminal = Terminal::start(&shell, (24, 100));
    terminal.shows("shell: ");
    terminal.write(format!("{} chat\r", binary().display()));
    terminal.shows("alice at ");
    world.wait_online("alice", true);
    for round in ["first", "second"] {
        terminal.write(format!("/tell bob {round}"));
        terminal.until("the line", |screen| screen.trim_end().ends_with(&format!("> /tell bob {round}")));
        terminal.write("\u{1a}");
        terminal.until("the shell", |screen| screen.trim_end().ends_with("shell:"));
        terminal.write("fg\r");
        terminal.until("the line again", |screen| screen.trim_end().ends_with(&format!("> /tell bob {round}")));
        terminal.write(" line\r");
        terminal.shows(&format!("✓ delivered to bob: {round} line"));
        assert_eq!(text(&bob.line()), format!("{round} line"));
        assert!(!terminal.screen().contains("\n line"), "typed once:\n{}", terminal.screen());
    }
    terminal.write("/quit\r");
    terminal.until("the shell", |screen| screen.trim_end().ends_with("shell:"));
    terminal.write("exit 7\r");
    assert_eq!(terminal.wait(), Some(7));
}

#[test]
fn odd_terminals_and_odd_keys_are_borne() {
    let world = people(&["alice", "bob"]);
    let bob = world.listen("bob", &[]);
    let mut alice = terminal(&world, "alice");
    alice.shows("alice at ");
    world.wait_online("alice", true);
    alice.write("/tell bob a line that is longer than some terminals are wide");
    for size in [(24, 40), (5, 10), (1, 1), (2, 3), (200, 500), (24, 100)] {
        alice.resize(size);
        world.run("bob", &["send", "alice", "while it is resized 日本 👩‍🚀"]).ok();
    }
    alice.write("\r");
    alice.shows("✓ delivered to bob: a line that is longer");
    assert_eq!(text(&bob.line()), "a line that is longer than some terminals are wide");
    // Bytes that are no text end the line that they are in, and nothing else.
    alice.write(b"dropped \xff");
    alice.shows("not UTF-8: it was not sent");
    alice.line_is("bob> ");
    alice.write("after\r");
    alice.shows("✓ delivered to bob: after");
    // Pasted, more than a message holds.
    alice.write("\u{1b}[200~");
    alice.write("x".repeat(16_281));
    alice.write("\u{1b}[201~\r");
    alice.shows("refused(too-large)");
    alice.write("/quit\r");
    assert_eq!(alice.wait(), Some(0));

    // No terminal that can edit: as a pipe.
    let mut command = world.command("alice", &["chat"]);
    command.env("TERM", "dumb");
    let mut plain = Terminal::start(&command, (24, 100));
    plain.write("/tell bob plainly\n/quit\n");
    assert_eq!(plain.wait(), Some(0));
    assert!(plain.screen().contains("✓ delivered to bob: plainly"), "{}", plain.screen());
    assert!(!plain.raw.contains(&0x1b));
}

#[test]
fn colours_are_left_out_where_they_are_not_wanted() {
    let world = people(&["alice"]);
    for (value, coloured) in [("1", false), ("", true)] {
        let mut command = world.command("alice", &["chat"]);
        command.env("NO_COLOR", value);
        let mut alice = Terminal::start(&command, (24, 100));
        alice.shows("alice at ");
        alice.write("/lsit\r");
        alice.shows("did you mean /list?");
        assert_eq!(alice.wrote(b"\x1b[31m"), coloured);
    }
}

#[test]
fn listen_and_who_are_harmless_on_a_terminal() {
    let world = people(&["alice", "bob"]);
    let mut bob = terminal_of(&world, "bob", &["listen"], (24, 200));
    world.wait_online("bob", true);
    world.run("alice", &["send", "bob", HOSTILE]).ok();
    bob.shows(HARMLESS);
    let mut who = terminal_of(&world, "alice", &["who"], (24, 100));
    assert_eq!(who.wait(), Some(0));
    assert!(who.screen().contains("alice  offline") && who.screen().contains("bob    online"), "{}", who.screen());
    for raw in [&bob.raw, &who.raw] {
        assert!(raw.iter().all(|byte| !byte.is_ascii_control() || matches!(byte, b'\r' | b'\n')), "{raw:?}");
    }
}

#[test]
fn a_server_that_goes_and_comes_is_told() {
    let mut world = people(&["alice", "bob"]);
    let mut alice = terminal(&world, "alice");
    alice.shows("alice at ");
    alice.write("/status\r");
    alice.shows("connected  since 2");
    alice.write("half");
    world.stop_server();
    alice.shows("no connection: ");
    alice.line_is("> half");
    alice.write("\u{15}/tell bob waits\r");
    alice.shows("there is no connection: it goes as soon as there is one");
    alice.write("/status\r");
    alice.shows("connected  no: ");
    world.restart_server();
    alice.shows("connected again");
    // Bob is not there, and the letter was not forgotten.
    alice.shows("stored until bob comes: waits");
    let _bob = world.listen("bob", &[]);
    alice.shows("✓ delivered to bob: waits");
    alice.shows("✓ opened by bob: waits");
    alice.write("/quit\r");
    assert_eq!(alice.wait(), Some(0));
}
