#!/usr/bin/env bash
# Runs the core in Miri, which sees what no test sees by itself: undefined behaviour in the crates underneath (the core has no
# unsafe code), reads of what was never written, and, for another target, words of another size or order.
#
# RSA and curves take minutes for each handshake there. So it runs the seeds of the fuzz targets that need neither, under the
# stub in the place of cryptography, and the tests of the rooms that need no public keys. README.md says more.
#
# It needs a nightly toolchain with the components miri and rust-src, and nothing from the network once `cargo fetch` was
# run here (and in the root).
set -euo pipefail
cd "$(dirname "$0")"

case ${1:-} in
    "") ;;
    *)
        cat >&2 <<'USAGE'
usage: ./miri.sh
environment: TARGET (the host's; for example i686-unknown-linux-gnu, s390x-unknown-linux-gnu), JOBS (processes at a time, 2)
USAGE
        exit 2
        ;;
esac

toolchain=${FUZZ_TOOLCHAIN:-nightly}
jobs=${JOBS:-2}
# Flags of the shell's would replace the ones that this script is about.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS MIRIFLAGS
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
host=$(rustc +"$toolchain" -vV | sed -n 's/^host: //p')
target=${TARGET:-$host}
# Where the interpreter knows the processor's instructions, it need not compute step by step (it does not know those of AES).
case $target in
    x86_64-*) features="-C target-feature=+sse3,+ssse3,+sse4.1,+pclmulqdq,+sha" ;;
    *) features="" ;;
esac

in_miri() { CARGO_NET_OFFLINE=true cargo +"$toolchain" miri test --quiet --locked --target "$target" --lib "$@"; }
# Seeds are files: the one thing that it may see of this machine.
seeds() { RUSTFLAGS="--cfg fuzzing $features" MIRIFLAGS=-Zmiri-disable-isolation in_miri "$@"; }
rooms() { (cd ../.. && RUSTFLAGS=$features in_miri -p ossicle-core --features rsa -- "$@"); }

# Those that take longest first, so that no process is left over at the end.
runs=(device server client resumption link envelope catalogue page bundle record)
# Rooms of the core, and of others the tests that need no public keys and no long records: the ciphers are slow, too.
rooms=(error:: wire::tests page::tests::pages page::tests::erased connection::tests::nothing connection::tests::the_last)

echo "== build for $target"
seeds --no-run
(cd ../.. && RUSTFLAGS=$features in_miri -p ossicle-core --features rsa --no-run)

logs=$CARGO_TARGET_DIR/miri-logs
mkdir -p "$logs"
declare -A running=()
failed=()
reap() {
    local pid done
    wait -n -p pid || failed+=("${running[$pid]}")
    done=${running[$pid]}
    unset "running[$pid]"
    echo "$done: $(sed -n 's/^test result: //p' "$logs/$done" | tail -1)"
}
start() {
    local name=$1
    shift
    while [ ${#running[@]} -ge "$jobs" ]; do reap; done
    "$@" >"$logs/$name" 2>&1 &
    running[$!]=$name
}
echo "== seeds that need neither RSA nor curves, and rooms that need no public keys"
start rooms rooms "${rooms[@]}"
for name in "${runs[@]}"; do start "$name" seeds -- --exact --nocapture "tests::interpreted::$name"; done
start targets seeds -- --exact tests::interpreted::no_target_is_left_out
while [ ${#running[@]} -gt 0 ]; do reap; done
[ ${#failed[@]} -eq 0 ] && exit
for name in "${failed[@]}"; do
    echo "== $name failed:" >&2
    tail -40 "$logs/$name" >&2
done
exit 1
