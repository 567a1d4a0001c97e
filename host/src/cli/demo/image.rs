//! The real image, for QEMU: where it is found, how it is built, and how it is run on the story's Ethernet.
//!
//! The device's log needs a decoder and is not read: what it does is seen by its owner and its server, like that of any
//! device in the field.

use core::net::SocketAddr;
use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Story;
use crate::endpoint::Failure;

const QEMU: &str = "qemu-system-arm";
/// The name of the image, beside this binary and where cargo puts it.
const NAME: &str = "firmware-example";
/// The target of the board that is simulated.
const TARGET: &str = "thumbv7m-none-eabi";
/// Where its flash keeps the identity page.
const PAGE_ADDRESS: u32 = 0x0003_F800;
/// The machine number of Arm in an ELF header.
const ARM: [u8; 2] = [40, 0];

/// The image: the one that was named, or the one beside this binary, or one that is built now from the checkout.
pub(super) fn find(named: Option<PathBuf>, story: &Story) -> Result<PathBuf, Failure> {
    let named = named.map(|image| checked(&image)).transpose()?;
    let runs = Command::new(QEMU).arg("--version").stdin(Stdio::null()).output().is_ok_and(|out| out.status.success());
    if !runs {
        return Err(Failure::usage(format!(
            "{QEMU} does not run here: install it (on Debian: apt install qemu-system-arm), or leave out --qemu"
        )));
    }
    if let Some(image) = named {
        return Ok(image);
    }
    let beside = story.binary.with_file_name(NAME);
    if beside.is_file() {
        return checked(&beside);
    }
    let workspace = env::current_dir().map(|here| here.join(NAME)).unwrap_or_default();
    if !workspace.join("Cargo.toml").is_file() {
        return Err(Failure::usage(format!(
            "there is no image for QEMU: name one with --image, put one named {NAME} beside this binary, or run this in \
             a checkout of Ossicle"
        )));
    }
    build(&workspace, story)
}

fn build(workspace: &Path, story: &Story) -> Result<PathBuf, Failure> {
    story.say("The image for QEMU is built.");
    story.say(&format!("  $ cd {NAME} && cargo build --release --locked --target {TARGET}"));
    let target = workspace.join("target");
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked", "--quiet", "--target", TARGET, "--target-dir"]).arg(&target);
    // What cargo or a shell has set for the host must not reach the other workspace.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    if story.finish(&mut cargo, workspace).is_ok_and(|status| status.success()) {
        return checked(&target.join(TARGET).join("release").join(NAME));
    }
    Err(Failure::refused(format!(
        "cargo cannot build the image: `rustup target add {TARGET}` if that is what it lacks, or name one with --image"
    )))
}

/// The image's full path, if it is an ELF file for Arm.
fn checked(image: &Path) -> Result<PathBuf, Failure> {
    let shown = image.display();
    let unreadable = |error: io::Error| Failure::usage(format!("cannot read the image {shown}: {error}"));
    let mut head = [0; 20];
    let read = File::open(image).and_then(|mut file| file.read_exact(&mut head));
    match read {
        Ok(()) if head.starts_with(b"\x7fELF") && head.ends_with(&ARM) => image.canonicalize().map_err(unreadable),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(unreadable(error)),
        _ => Err(Failure::usage(format!(
            "{shown} is no ELF file for Arm: `cargo build --release --target {TARGET}` in {NAME} makes one"
        ))),
    }
}

/// QEMU with this image and identity page, plugged into the Ethernet at `uplink`.
pub(super) fn command(image: &Path, page: &Path, uplink: SocketAddr) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args(["-M", "lm3s6965evb", "-display", "none", "-monitor", "none", "-serial", "none"])
        .args(["-chardev", "null,id=log", "-semihosting-config", "enable=on,target=native,chardev=log"])
        .args(["-nic", &format!("socket,model=stellaris,connect={uplink}")])
        .arg("-kernel")
        .arg(image)
        .args(["-device", &format!("loader,file={},addr={PAGE_ADDRESS:#x},force-raw=on", escaped(page))]);
    command
}

/// A path inside a QEMU option, where a comma stands for the next key unless it is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
