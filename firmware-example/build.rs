//! Hands the linker the memory map and the linker scripts.
//!
//! For the device only: a host that imports the library builds it without any of this. It refuses to build
//! an image whose flags were replaced: such an image runs, but is larger than the one that was measured.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=memory.x");
    println!("cargo::rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");

    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }

    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    if !flags.contains("sha2_backend_soft") {
        println!(
            "cargo::error=the flags of .cargo/config.toml are missing: unset RUSTFLAGS and build inside firmware-example/"
        );
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::copy("memory.x", out.join("memory.x")).expect("memory.x can be copied");
    // The start-up code wants to hear the names of interrupt handlers; there are none.
    fs::write(out.join("device.x"), "").expect("device.x can be written");
    println!("cargo::rustc-link-search={}", out.display());
    for argument in ["--nmagic", "-Tlink.x", "-Tdefmt.x"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
