#!/usr/bin/env bash
# All checks. `./ci.sh` is the everyday run, `./ci.sh full` adds what takes longer; CI calls the latter.
#
# Tests that need a program are ignored by name ("needs qemu-system-arm"): they are run here where the program is there,
# and printed as skipped where it is not. Nothing else is left out, but for the one check that needs the open network:
# `cargo deny check advisories`.
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-everyday}
case $mode in everyday | full) ;; *) echo "usage: ./ci.sh [full]" >&2; exit 2 ;; esac

# A variable of the shell would replace the flags of the firmware's target without a word.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
bare_targets=(thumbv6m-none-eabi thumbv7m-none-eabi thumbv7em-none-eabi riscv32imac-unknown-none-elf)
# One board each.
firmware_targets=(thumbv7m-none-eabi thumbv7em-none-eabi)
host_target=$(rustc -vV | sed -n 's/^host: //p')
skipped=()
started=$SECONDS

step() { printf '\n=== %s (%d s)\n' "$*" $((SECONDS - started)); }

in_firmware() { (cd firmware-example && "$@"); }
in_embassy() { (cd firmware-embassy && "$@"); }

# Runs the tests that an earlier run ignored, program by program. $1: the log of that run; the rest: how to run them again.
run_ignored() {
    local log=$1 need names
    shift
    while IFS= read -r need; do
        mapfile -t names < <(sed -n "s/^test \(.*\) \.\.\. ignored, needs ${need}\$/\1/p" "$log")
        if is_there "$need"; then
            step "tests that need $need"
            "$@" -- --ignored --exact --test-threads 2 "${names[@]}"
        else
            skipped+=("${names[@]/%/ (needs $need)}")
        fi
    done < <(sed -n 's/^test .* \.\.\. ignored, needs \(.*\)$/\1/p' "$log" | sort -u)
    if grep -E '^test .* \.\.\. ignored$' "$log"; then
        echo "a test is ignored without saying what it needs" >&2
        exit 1
    fi
}

is_there() {
    case $1 in
        "a mount namespace") unshare -rm true 2>/dev/null || unshare -m true 2>/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

step format
cargo fmt --all --check
in_firmware cargo fmt --check
# rustfmt follows no file that build.rs names.
rustfmt --check --edition 2024 firmware-example/src/board/*.rs
in_embassy cargo fmt --check
(cd tests/no-alloc && cargo fmt --check)
(cd tests/fuzz && cargo fmt --check)

step lints
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo clippy -p ossicle --all-targets --no-default-features --locked -- -D warnings
cargo clippy -p ossicle-core --all-targets --all-features --locked -- -D warnings
for target in "${firmware_targets[@]}"; do
    in_firmware cargo clippy --locked --release --target "$target" -- -D warnings
done
in_embassy cargo clippy --locked --release -- -D warnings
in_firmware cargo clippy --locked --lib --tests --target "$host_target" -- -D warnings

step documentation
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
RUSTDOCFLAGS="-D warnings" cargo doc -p ossicle-core --no-deps --all-features --locked

step "the core on bare targets, with every feature that needs no allocator, linked without one"
for target in "${bare_targets[@]}"; do
    (cd tests/no-alloc && cargo build --release --locked --quiet --target "$target" --features async)
done
for features in "" rsa async defmt rsa,async,defmt; do
    cargo build -p ossicle-core --locked --quiet --target thumbv7em-none-eabi --features "$features"
done

step "supply chain"
if command -v cargo-deny >/dev/null; then
    cargo deny --locked check bans licenses sources
    # Not its bans: two generations of smoltcp are what it shows.
    cargo deny --locked --manifest-path firmware-embassy/Cargo.toml --config deny.toml check licenses sources
else
    skipped+=("cargo deny check bans licenses sources (needs cargo-deny)")
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT

step "the firmware's image, for each board"
for target in "${firmware_targets[@]}"; do
    in_firmware cargo build --release --locked --target "$target"
done

step "the sketch on embassy"
in_embassy cargo build --release --locked

step "tests of the workspace"
cargo test --workspace --locked 2>&1 | tee "$log"
run_ignored "$log" cargo test --workspace --locked

step "tests of the core with every feature"
cargo test -p ossicle-core --all-features --locked

step "tests of the firmware's library on this machine"
in_firmware cargo test --lib --locked --target "$host_target"

if [ "$mode" = full ]; then
    step "the same tests with cryptography in pure Rust"
    cargo test -p ossicle -p ossicle-tests --no-default-features --locked 2>&1 | tee "$log"
    run_ignored "$log" cargo test -p ossicle -p ossicle-tests --no-default-features --locked

    step "how much of the core its tests reach"
    if command -v cargo-llvm-cov >/dev/null; then
        tests/coverage.sh
    else
        skipped+=("tests/coverage.sh (needs cargo-llvm-cov)")
    fi

    step "the core in an interpreter"
    if cargo +nightly miri --version >/dev/null 2>&1; then
        tests/fuzz/miri.sh
    else
        skipped+=("tests/fuzz/miri.sh (needs a nightly toolchain with miri and rust-src)")
    fi

    step "fuzz targets, 30 s each"
    if command -v cargo-fuzz >/dev/null && command -v c++ >/dev/null && rustup run nightly rustc --version >/dev/null 2>&1; then
        (cd tests/fuzz && RUSTFLAGS="--cfg fuzzing" cargo clippy --all-targets --locked -- -D warnings)
        tests/fuzz/run.sh 30
    else
        skipped+=("fuzz targets (need cargo-fuzz, a C++ compiler and a nightly toolchain)")
    fi

    step "the story, told by the binary as it is shipped"
    cargo run --release --locked -p ossicle -- demo --for 5s
fi

step done
if [ ${#skipped[@]} -gt 0 ]; then
    printf 'skipped: %s\n' "${skipped[@]}"
fi
