#!/usr/bin/env bash
# Fuzzes the core. `./run.sh [SECONDS]` gives every target that long (30 by default), first of all shows that the seeds
# reach what the targets are named for, and ends with 1 where a target failed. README.md says more.
#
# It needs a nightly toolchain, cargo-fuzz and a C++ compiler, and nothing from the network once `cargo fetch` was run here.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat >&2 <<'USAGE'
usage: ./run.sh [SECONDS] [TARGET...]   seeds, guards, then SECONDS (30) for each target (all)
       ./run.sh --list                  the targets
       ./run.sh --seeds                 makes the seeds anew, from honest runs
       ./run.sh --check                 the seeds and the guards only: no nightly toolchain, no fuzzing
environment: SANITIZER (none; address costs half the speed), JOBS (targets at a time, 2), CORPUS (target/corpus)
USAGE
    exit 2
}

toolchain=${FUZZ_TOOLCHAIN:-nightly}
# Flags of the shell's would replace the ones that this script is about.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}

targets() { sed -n '/^\[\[bin\]\]/{n;s/^name = "\(.*\)"$/\1/p}' Cargo.toml; }
with_flag() { RUSTFLAGS="--cfg fuzzing" "$@"; }

# Whether the last command was refused by the core itself, and not by something else.
refused() {
    local log
    if log=$("$@" 2>&1); then
        echo "built, and must not: $*" >&2
        return 1
    fi
    grep -q 'fuzzing` is for fuzzers only' <<<"$log" || { echo "$log" >&2; return 1; }
}

check() {
    echo "== the stub cannot be shipped"
    # With the flag, neither in a release nor in an image; without it, there is nothing of it (tests/doors.rs).
    with_flag refused cargo check --quiet --locked --offline --release -p ossicle-core
    if rustup target list --installed 2>/dev/null | grep -qx thumbv7m-none-eabi; then
        with_flag refused cargo check --quiet --locked --offline --target thumbv7m-none-eabi -p ossicle-core
    fi
    echo "== the seeds reach what the targets are named for"
    local log
    if ! log=$(with_flag cargo test --quiet --locked --offline --lib -- --nocapture 2>&1); then
        echo "$log" >&2
        return 1
    fi
    sed -n 's/^\.*\(.* reach .*\)$/\1/p; /^test result/p' <<<"$log"
}

fuzz() {
    local target=$1 seconds=$2 corpus=$3 binary=$4 log=$5
    : >"$log"
    mkdir -p "$corpus/$target" artifacts/"$target"
    # New inputs go to the first folder; the committed seeds stay what they are.
    "$binary" "$corpus/$target" "seeds/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="artifacts/$target/" >"$log" 2>&1
}

run() {
    local seconds=$1 sanitizer=${SANITIZER:-none} jobs=${JOBS:-2} corpus=${CORPUS:-$CARGO_TARGET_DIR/corpus} triple
    shift
    local -a names=("$@") failed=()
    check
    echo "== build"
    triple=$(rustc +"$toolchain" -vV | sed -n 's/^host: //p')
    CARGO_NET_OFFLINE=true cargo +"$toolchain" fuzz build --fuzz-dir . --sanitizer "$sanitizer" \
        --target-dir "$CARGO_TARGET_DIR"
    echo "== $seconds s for each of ${names[*]}"
    local logs=$CARGO_TARGET_DIR/fuzz-logs name
    mkdir -p "$logs"
    local -A running=()
    reap() {
        local pid done execs speed covered
        wait -n -p pid || failed+=("${running[$pid]}")
        done=${running[$pid]}
        unset "running[$pid]"
        execs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$logs/$done")
        speed=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$logs/$done")
        covered=$(grep -o 'cov: [0-9]*' "$logs/$done" | tail -1 || true)
        printf '%-12s %10s runs, %7s/s, %s\n' "$done" "${execs:-?}" "${speed:-?}" "${covered:-cov: ?}"
    }
    for name in "${names[@]}"; do
        while [ ${#running[@]} -ge "$jobs" ]; do reap; done
        fuzz "$name" "$seconds" "$corpus" "$CARGO_TARGET_DIR/$triple/release/$name" "$logs/$name" &
        running[$!]=$name
    done
    while [ ${#running[@]} -gt 0 ]; do reap; done
    [ ${#failed[@]} -eq 0 ] && return
    for name in "${failed[@]}"; do
        echo "== $name failed:" >&2
        grep -A 3 'panicked at' "$logs/$name" >&2 || tail -20 "$logs/$name" >&2
        local artefact
        artefact=$(sed -n 's/.*Test unit written to //p' "$logs/$name" | tail -1)
        artefact=${artefact:+$PWD/$artefact}
        echo "artefact:  ${artefact:-none, see $logs/$name}" >&2
        echo "reproduce: cd tests/fuzz && cargo +$toolchain fuzz run --fuzz-dir . --sanitizer $sanitizer $name ${artefact:-}" >&2
    done
    return 1
}

case ${1:-} in
    --list) targets ;;
    --seeds) with_flag cargo run --quiet --locked --example seeds ;;
    --check) check ;;
    "" | [0-9]*)
        seconds=${1:-30}
        shift || true
        case $seconds in *[!0-9]*) usage ;; esac
        if [ $# -eq 0 ]; then mapfile -t all < <(targets); set -- "${all[@]}"; fi
        for name in "$@"; do targets | grep -qx "$name" || { echo "no such target: $name" >&2; usage; }; done
        run "$seconds" "$@"
        ;;
    *) usage ;;
esac
