//! Names the board's file, and hands the linker its memory map and the linker scripts.
//!
//! For the device only: a host that imports the library builds it without any of this. It refuses to build an image
//! whose flags were replaced: such an image has no board, and is larger than the one that was measured.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=boards");
    println!("cargo::rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");

    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }

    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let Some(board) = env::var("CARGO_CFG_BOARD").ok().filter(|_| flags.contains("sha2_backend_soft")) else {
        println!(
            "cargo::error=the flags of .cargo/config.toml are missing: unset RUSTFLAGS and build inside \
             firmware-example/, for a target that it names"
        );
        return;
    };

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let driver = root.join(format!("src/board/{board}.rs"));
    fs::write(out.join("board.rs"), format!("#[path = {driver:?}]\nmod chip;\npub(crate) use chip::*;\n"))
        .expect("board.rs can be written");
    fs::copy(root.join(format!("boards/{board}.x")), out.join("memory.x")).expect("the board has a memory map");
    // The start-up code wants to hear the names of interrupt handlers; there are none.
    fs::write(out.join("device.x"), "").expect("device.x can be written");
    println!("cargo::rustc-link-search={}", out.display());
    for argument in ["--nmagic", "-Tlink.x", "-Tdefmt.x"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
