//! The doors of the house: which room names which foreign crate, and who imports whom. Read from the sources, so that a
//! wall cannot be broken by accident.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every Rust source below `folder`: its path relative to the repository, and its code without comments and tests.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().unwrap() != "target" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                // Tests go where they like.
                let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
                let of_tests = ["tests.rs", "testing.rs", "conformance.rs", "wycheproof.rs"];
                if of_tests.iter().any(|file| name.ends_with(file)) {
                    continue;
                }
                let code: String =
                    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
                found.push((name, code));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} has no sources");
    found.sort();
    found
}

/// Whether `code` names the crate `name`: as the head of a path.
fn names(code: &str, name: &str) -> bool {
    let mut rest = code;
    while let Some(at) = rest.find(name) {
        let before = rest[..at].chars().next_back();
        let after = &rest[at + name.len()..];
        let word = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':' && c != '"' && c != '.');
        if word && after.trim_start().starts_with("::") {
            return true;
        }
        rest = after;
    }
    false
}

fn only(folder: &str, crates: &[&str], rooms: &[&str]) {
    for (path, code) in sources(folder) {
        for name in crates {
            let allowed = rooms.iter().any(|room| path.starts_with(room));
            assert!(allowed || !names(&code, name), "{path} names {name}; only {rooms:?} may");
        }
    }
}

#[test]
fn foreign_crates_of_the_core_stay_in_their_rooms() {
    let crypto = ["core/src/crypto", "core/src/rsa.rs"];
    only("core/src", &["aes_gcm", "hkdf", "hmac", "x25519_dalek", "ed25519_dalek", "hpke", "subtle", "sha2"], &crypto);
    // The root says `pub use rsa::`, which is the room and not the crate.
    only("core/src", &["rsa", "alloc"], &["core/src/rsa.rs", "core/src/lib.rs"]);
    only("core/src", &["postcard", "serde"], &["core/src/wire/"]);
    only("core/src", &["embedded_io", "embedded_io_async"], &["core/src/driver.rs"]);
    only("core/src", &["heapless"], &["core/src/client"]);
    only("core/src", &["crc"], &["core/src/page.rs"]);
    for (path, code) in sources("core/src") {
        assert!(!names(&code, "std"), "{path} names std");
    }
}

/// Which rooms of the core may import which.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("crypto", &["error"]),
    ("rsa", &["crypto", "error"]),
    ("wire", &["crypto", "error"]),
    ("config", &["crypto", "wire", "error"]),
    ("record", &["wire", "crypto", "error"]),
    ("handshake", &["record", "wire", "crypto", "config", "error"]),
    ("envelope", &["wire", "crypto", "error"]),
    ("page", &["envelope", "wire", "crypto", "error"]),
    ("connection", &["handshake", "record", "wire", "crypto", "config", "error"]),
    ("endpoint", &["connection", "wire", "crypto", "config", "error"]),
    ("client", &["endpoint", "connection", "envelope", "wire", "crypto", "config", "error"]),
    ("driver", &["endpoint", "error"]),
    // Hands out what fuzzers need of the rooms, and is not built for anybody else.
    ("fuzzing", &["record", "page", "crypto"]),
];

#[test]
fn rooms_of_the_core_import_downwards_only() {
    let mut seen = BTreeSet::new();
    for (path, code) in sources("core/src") {
        let room = path.trim_start_matches("core/src/").trim_end_matches(".rs").split('/').next().unwrap().to_owned();
        if room == "lib" {
            continue;
        }
        let (_, may) =
            MAY_IMPORT.iter().find(|(name, _)| *name == room).unwrap_or_else(|| panic!("{path}: no such room"));
        seen.insert(room.clone());
        for (other, _) in MAY_IMPORT {
            let import = format!("crate::{other}::");
            // `crate::error::{...}` and `crate::rsa::...` alike; tests of a room may use their own room only.
            if code.contains(&import) && *other != room {
                assert!(may.contains(other), "{path} imports {other}; {room} may import {may:?}");
            }
        }
    }
    assert_eq!(seen.len(), MAY_IMPORT.len(), "a room of the drawing is gone: {seen:?}");
}

/// The stub of all cryptography is behind `cfg(fuzzing)` wherever it is named, and nothing but the fuzzers' own script sets
/// that: no feature, no configuration of cargo, no build script.
#[test]
fn only_fuzzers_can_stub_cryptography() {
    let mut hooks = 0;
    for (path, code) in sources("core/src") {
        let lines: Vec<_> = code.lines().map(str::trim).collect();
        assert!(!code.contains("feature = \"fuzz"), "{path} has a feature for fuzzers");
        if path == "core/src/fuzzing.rs" || path.ends_with("/fuzzing.rs") || path.ends_with("/stub.rs") {
            continue;
        }
        for (index, line) in lines.iter().enumerate() {
            let names_it = ["mod stub;", "mod fuzzing;", "stub::is_on", "const CODES", "const $codes"]
                .iter()
                .any(|it| line.contains(it));
            if names_it {
                hooks += 1;
                // A comment was cut down to an empty line.
                let before = lines[..index].iter().rev().find(|line| !line.is_empty());
                assert_eq!(before, Some(&"#[cfg(fuzzing)]"), "{path}: {line}");
            } else if line.contains("stub::") {
                assert!(
                    line.starts_with("stubbed!(") || line.ends_with("=> Ok((stub::ENCAPSULATED, stub::TAG)),"),
                    "{path}: {line}"
                );
            }
        }
    }
    assert_eq!(hooks, 7, "the rooms with a hook: crypto (2), lib, record, page, wire (2)");
    let root_file = std::fs::read_to_string(root().join("core/src/lib.rs")).unwrap();
    assert!(
        root_file.contains("#[cfg(all(fuzzing, any(target_os = \"none\", not(debug_assertions))))]\ncompile_error!(")
    );

    for manifest in ["", "core/", "host/", "firmware-example/", "firmware-embassy/", "tests/", "tests/no-alloc/"] {
        for file in ["Cargo.toml", ".cargo/config.toml", "build.rs"] {
            let text = std::fs::read_to_string(root().join(manifest).join(file)).unwrap_or_default();
            // The one line that tells the compiler that the flag exists.
            let text = text.replace("check-cfg = [\"cfg(fuzzing)\"]", "");
            assert!(!text.contains("fuzzing"), "{manifest}{file} names the flag of fuzzers");
        }
    }
}

#[test]
fn foreign_crates_of_the_host_stay_in_their_rooms() {
    only("host/src", &["rusqlite"], &["host/src/store/"]);
    only("host/src", &["aws_lc_rs"], &["host/src/crypto"]);
    only("host/src", &["rsa"], &["host/src/crypto"]);
    only("host/src", &["argon2"], &["host/src/accounts.rs"]);
    only("host/src", &["firmware_example"], &["host/src/device.rs"]);
    only("host/src", &["smoltcp"], &["host/src/ethernet/"]);
    only("host/src", &["toml"], &["host/src/settings.rs"]);
    only("host/src", &["prometheus_client", "hyper", "hyper_util", "http_body_util"], &["host/src/metrics"]);
    only("host/src", &["sd_notify"], &["host/src/cli/supervised.rs"]);
}

#[test]
fn only_the_boards_of_the_firmware_are_unsafe_and_know_the_processor() {
    let below = ["firmware-example/src/board/", "firmware-example/src/runtime.rs"];
    only("firmware-example/src", &["cortex_m", "embedded_alloc", "semihosting"], &below);
    // What starts the application says where it starts.
    only("firmware-example/src", &["cortex_m_rt"], &[below[0], below[1], "firmware-example/src/main.rs"]);
    for (path, code) in sources("firmware-example/src") {
        let uses = code.lines().any(|line| line.contains("unsafe ") || line.contains("unsafe("));
        assert!(below.iter().any(|room| path.starts_with(room)) || !uses, "{path} holds unsafe code");
    }
}

/// Porting touches one source file: nothing but a board's own file can tell one board from another.
#[test]
fn only_its_own_file_knows_a_board() {
    let boards = "firmware-example/src/board/";
    let (drivers, rest): (Vec<_>, Vec<_>) =
        sources("firmware-example/src").into_iter().partition(|(path, _)| path.starts_with(boards));
    assert!(drivers.len() >= 2, "{drivers:?}");
    let rest_of = |path: &str| rest.iter().any(|(other, _)| other.ends_with(path));
    assert!(["src/lib.rs", "src/net.rs", "src/main.rs", "src/runtime.rs"].into_iter().all(rest_of));

    let mut foreign = vec!["stellaris", "lm3s", "mps2", "an386", "lan9118", "cmsdk", "fpga", "systick", "syst", "nvic"];
    let names: Vec<&str> =
        drivers.iter().map(|(path, _)| path.trim_start_matches(boards).trim_end_matches(".rs")).collect();
    foreign.extend(&names);
    for (path, _) in &rest {
        // Comments too: what only one board needs is said where it is.
        let text = std::fs::read_to_string(root().join(path)).unwrap().to_lowercase();
        for word in text.split(|c: char| !c.is_alphanumeric()) {
            assert!(!foreign.iter().any(|name| word.starts_with(name)), "{path} knows a board: {word}");
            // Every register of a Cortex-M and of what stands around it is at 0x4000_0000 or above.
            let address = word.strip_prefix("0x").unwrap_or_default();
            assert!(address.len() < 4 || address == "ffff", "{path} holds an address: {word}");
        }
        for condition in ["target_arch", "target_feature", "target_pointer", "cfg(board", "board =", "feature ="] {
            assert!(!text.contains(condition), "{path} asks for its target: {condition}");
        }
    }
    for (path, code) in &drivers {
        for other in names.iter().filter(|name| !path.contains(*name)) {
            assert!(!code.contains(other), "{path} knows {other}");
        }
    }
    // README says how many lines each has, to two digits or so.
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    for (path, code) in rest.iter().chain(&drivers) {
        let file = path.trim_start_matches("firmware-example/");
        let row = readme.lines().find_map(|line| line.strip_prefix(&format!("| `{file}` | ")));
        let stated = row.unwrap_or_else(|| panic!("README does not name {file}")).split(' ').next().unwrap();
        let (stated, counted) =
            (stated.parse::<usize>().unwrap(), code.lines().filter(|line| !line.trim().is_empty()).count());
        assert!(stated.abs_diff(counted) <= counted / 10, "{file} has {counted} lines of code; README says {stated}");
    }
    // And each has what lies aside: a memory map and a target.
    let config = std::fs::read_to_string(root().join("firmware-example/.cargo/config.toml")).unwrap();
    for name in names {
        assert!(root().join(format!("firmware-example/boards/{name}.x")).is_file(), "{name} has no memory map");
        assert!(config.contains(&format!("board=\\\"{name}\\\"")), "{name} has no target");
    }
}

#[test]
fn the_cores_arithmetic_is_checked_in_release_builds_too() {
    // And that of whoever compiles its generic parts, where that is ours.
    for (workspace, package) in [
        ("", "ossicle-core"),
        ("", "ossicle"),
        ("firmware-example", "ossicle-core"),
        ("firmware-example", "firmware-example"),
        ("firmware-embassy", "ossicle-core"),
    ] {
        let manifest = std::fs::read_to_string(root().join(workspace).join("Cargo.toml")).unwrap();
        let profile = manifest.split(&format!("[profile.release.package.{package}]\n")).nth(1).unwrap_or_default();
        let profile = profile.split("\n[").next().unwrap_or_default();
        assert!(profile.lines().any(|line| line == "overflow-checks = true"), "{package} in {workspace:?}");
    }
}

#[test]
fn nothing_in_core_or_host_is_unsafe_and_the_public_api_names_no_inner_crate() {
    for (path, code) in sources("core/src").into_iter().chain(sources("host/src")) {
        assert!(!code.contains("unsafe {") && !code.contains("unsafe fn"), "{path} holds unsafe code");
    }
    // What a foreign firmware sees: no signature with a type of heapless, postcard or rsa.
    for (path, code) in sources("core/src") {
        for line in code.lines().filter(|line| line.trim_start().starts_with("pub fn")) {
            for inner in ["heapless", "postcard", "rsa::", "hpke::", "aes_gcm"] {
                assert!(!line.contains(inner), "{path}: {line}");
            }
        }
    }
}
