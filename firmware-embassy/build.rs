//! Hands the linker the memory map of the board and the linker scripts.

use std::path::PathBuf;
use std::{env, fs};

/// The map of the board that `main.rs` takes its driver from.
const MEMORY: &str = "../firmware-example/boards/mps2_an386.x";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={MEMORY}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::copy(MEMORY, out.join("memory.x")).expect("the board has a memory map");
    // The start-up code wants to hear the names of interrupt handlers; there are none.
    fs::write(out.join("device.x"), "").expect("device.x can be written");
    println!("cargo::rustc-link-search={}", out.display());
    for argument in ["--nmagic", "-Tlink.x", "-Tdefmt.x"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
