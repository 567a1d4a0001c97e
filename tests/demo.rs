//! The demo holds what it says; and where somebody breaks one of its promises, it notices and names it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use core::time::Duration;
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex};

use ossicle::cli::demo::{Interference, Moment, Promise, Scene, Story};
use ossicle::device::Led;
use ossicle::endpoint::Failure;
use ossicle_tests::cli::{Running, binary};
use ossicle_tests::firmware_image;

const LETTER: &str = "the harbour lights are green tonight";

/// `ossicle demo`, short, with a directory of its own to leave things behind in.
fn demo(arguments: &[&str], folder: &tempfile::TempDir) -> Running {
    let mut command = Command::new(binary());
    // What a person has configured is none of its business.
    command.env("OSSICLE_HOME", "/nowhere").env("OSSICLE_PORT", "1").env("RUST_LOG", "off");
    Running::start(command.args(["demo", "--for", "1s"]).args(arguments).env("TMPDIR", folder.path()))
}

#[test]
fn the_whole_story_holds_twice_at_a_time_and_leaves_nothing_behind() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let demos = [demo(&[], &folders[0]), demo(&[], &folders[1])];
    for (demo, folder) in demos.into_iter().zip(&folders) {
        let out = demo.wait().ok();
        for promise in
            [Promise::Opened, Promise::Obeys, Promise::Refuses, Promise::Gathers, Promise::Resumes, Promise::Sealed]
        {
            assert!(out.lines().any(|line| line == format!("  {promise}")), "{promise} in {out}");
        }
        assert!(!out.contains('\u{1b}'), "no colours where there is no terminal");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
#[ignore = "needs qemu-system-arm"]
fn the_real_image_is_a_member_of_the_story() {
    let folder = tempfile::tempdir().unwrap();
    let image = firmware_image();
    let out = demo(&["--qemu", "--image", image.to_str().unwrap()], &folder).wait().ok();
    assert!(out.contains("$ qemu-system-arm -M lm3s6965evb"), "{out}");
    assert!(out.contains("sensor-04 21."), "{out}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn an_image_that_is_none_is_refused_before_the_story_begins() {
    let folder = tempfile::tempdir().unwrap();
    demo(&["--qemu", "--image", "/nowhere/image"], &folder).wait().failed(2, "cannot read the image /nowhere/image");
    let text = folder.path().join("text");
    for content in [&b""[..], b"not an image", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0 for another machine"]
    {
        fs::write(&text, content).unwrap();
        demo(&["--qemu", "--image", text.to_str().unwrap()], &folder).wait().failed(2, "is no ELF file for Arm");
    }
    assert_eq!(demo(&["--image", "alone"], &folder).wait().code, Some(2));
}

#[test]
fn without_qemu_or_an_image_it_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let demo = |sentence: &str, code| {
        let mut command = Command::new(binary());
        command.args(["demo", "--qemu"]).env("PATH", folder.path()).current_dir(folder.path());
        Running::start(&mut command).wait().failed(code, sentence);
    };
    let program = |name: &str, script: &str| {
        let path = folder.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    };
    demo("qemu-system-arm does not run here: install it", 2);
    program("qemu-system-arm", "exit 0");
    demo("there is no image for QEMU: name one with --image, put one named firmware-example beside this binary", 2);
    // A checkout, with a cargo that lacks something.
    fs::create_dir(folder.path().join("firmware-example")).unwrap();
    fs::write(folder.path().join("firmware-example/Cargo.toml"), "").unwrap();
    demo("cargo", 1);
    program("cargo", "echo the target may not be installed >&2; exit 101");
    demo("cargo cannot build the image: `rustup target add thumbv7m-none-eabi` if that is what it lacks", 1);
}

/// The story with somebody who interferes: how it ended, and what was said.
fn interfered(interference: impl Interference + 'static) -> (Result<(), Failure>, Vec<String>) {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let said = Arc::clone(&lines);
    let mut story = Story::new(binary().to_owned(), Arc::new(move |line| said.lock().unwrap().push(line.to_owned())));
    story.lasting = Duration::from_secs(1);
    story.interference = Box::new(interference);
    let told = story.tell();
    let lines = lines.lock().unwrap().clone();
    (told, lines)
}

/// The story ends with exit code 1, and says that it is this promise that was broken, and how.
fn breaks(promise: Promise, how: &str, interference: impl Interference + 'static) {
    let (told, lines) = interfered(interference);
    let failure = told.expect_err("a broken promise must be noticed");
    assert_eq!(failure.code, 1, "{failure:?}, after {lines:#?}");
    let named = failure.sentence.contains(&format!("broken promise «{promise}»"));
    assert!(named && failure.sentence.contains(how), "{failure:?}, after {lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("Everything held")), "{lines:#?}");
}

/// Interferes once, at a moment.
struct At<F>(Moment, F);

impl<F: FnMut(&Scene<'_>) + Send> Interference for At<F> {
    fn at(&mut self, moment: Moment, scene: &Scene<'_>) {
        if moment == self.0 {
            (self.1)(scene);
        }
    }
}

#[test]
fn a_word_of_the_letter_in_the_servers_data_breaks_its_promise() {
    let plant = At(Moment::ServerKilled, |scene: &Scene<'_>| {
        fs::write(scene.data.join("core.dump"), format!("xxxx{LETTER}xxxx")).unwrap();
    });
    breaks(Promise::Sealed, "core.dump holds «the harbour lights", plant);
}

#[test]
fn a_lost_channel_key_breaks_its_promise() {
    let lose = At(Moment::ServerKilled, |scene: &Scene<'_>| fs::remove_file(scene.data.join("channel.key")).unwrap());
    breaks(Promise::Resumes, "needed a full handshake", lose);
}

#[test]
fn a_command_in_hex_on_a_wire_breaks_its_promise() {
    // A member whose client leaks what it sends.
    let leak = At(Moment::Reporting, |scene: &Scene<'_>| {
        let hex: String = b"led on".iter().map(|byte| format!("{byte:02x}")).collect();
        TcpStream::connect(scene.people).unwrap().write_all(hex.as_bytes()).unwrap();
    });
    breaks(Promise::Sealed, "a person's connection held «led on»", leak);
}

#[test]
fn an_led_that_obeys_anybody_breaks_its_promise() {
    let obey = At(Moment::StrangerRefused, |scene: &Scene<'_>| scene.leds[1].set(false));
    breaks(Promise::Refuses, "the LED of sensor-02 went off without its owner's word", obey);
}

/// An owner's client that loses one reading.
struct Swallow(bool);

impl Interference for Swallow {
    fn hears(&mut self, line: &str) -> bool {
        let swallowed = !self.0 && line.contains("\"from\":\"sensor-03\"") && line.contains("led=1");
        self.0 |= swallowed;
        !swallowed
    }
}

#[test]
fn a_swallowed_reading_breaks_its_promise() {
    breaks(Promise::Opened, "of sensor-03 was sealed, and never opened", Swallow(false));
}

/// An LED that somebody holds in the dark.
#[derive(Default)]
struct Hold(Option<Led>);

impl Interference for Hold {
    fn at(&mut self, moment: Moment, scene: &Scene<'_>) {
        if moment == Moment::Reporting {
            self.0 = Some(scene.leds[0].clone());
        }
    }

    fn hears(&mut self, _: &str) -> bool {
        if let Some(led) = &self.0 {
            led.set(false);
        }
        true
    }
}

#[test]
fn an_led_that_does_not_obey_its_owner_breaks_its_promise() {
    breaks(Promise::Obeys, "the LED of sensor-01 is not on, and its owner has said so", Hold::default());
}
