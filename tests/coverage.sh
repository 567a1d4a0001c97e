#!/usr/bin/env bash
# Which lines of the core its tests reach. `tests/coverage.sh` prints the figure of each file and of all, names the lines
# that were not reached, and ends with 1 below 95 %. Lines of tests are not counted, nor is what only fuzzers compile.
#
# It needs cargo-llvm-cov and the component llvm-tools, and nothing from the network.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat >&2 <<'USAGE'
usage: tests/coverage.sh             runs the tests, then reports
       tests/coverage.sh --report    reports what the last run reached
environment: AT_LEAST (95, per cent of lines), CARGO_LLVM_COV_TARGET_DIR (target/llvm-cov-target)
USAGE
    exit 2
}

# Of all the binaries in tests/ those that drive the core and are quick.
binaries=(driver handshake resume)

run() {
    # Flags of the shell's would replace those of cargo-llvm-cov.
    unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
    export CARGO_PROFILE_DEV_DEBUG=line-tables-only
    cargo llvm-cov clean --workspace
    cargo llvm-cov --no-report --locked -p ossicle-core --all-features
    cargo llvm-cov --no-report --locked -p ossicle-tests --no-default-features "${binaries[@]/#/--test=}"
}

# The lines of an LCOV file, file by file, without what stands behind `#[cfg(test)]` at the end of each.
count() {
    awk -v at_least="$1" -v root="$PWD/" '
        function end_of_code(file,    line, at, number) {
            at = 1e9
            while ((getline line < file) > 0) {
                number++
                if (line == "#[cfg(test)]") marked = number
                if (line ~ /^mod tests( \{|;)$/ && marked == number - 1) at = marked
            }
            close(file)
            return at
        }
        /^SF:/ {
            file = substr($0, 4)
            name = file
            if (index(name, root) == 1) name = substr(name, length(root) + 1)
            counts = name ~ /^core\/src\// && name !~ /(\/tests|\/testing|\/wycheproof)\.rs$/
            if (counts) end = end_of_code(file)
            reached = lines = 0
            missed = ""
        }
        /^DA:/ && counts {
            split(substr($0, 4), part, ",")
            if (part[1] + 0 >= end) next
            lines++
            if (part[2] + 0 > 0) reached++
            else missed = missed " " part[1]
        }
        /^end_of_record/ && counts && lines > 0 {
            printf "%6.2f %%  %4d of %4d  %s%s\n", 100 * reached / lines, reached, lines, name, missed == "" ? "" : ", not" missed
            all_lines += lines
            all_reached += reached
        }
        END {
            if (all_lines == 0) { print "nothing was measured" > "/dev/stderr"; exit 1 }
            percent = 100 * all_reached / all_lines
            printf "%6.2f %%  %4d of %4d  lines of the core\n", percent, all_reached, all_lines
            if (percent < at_least) { printf "less than %s %%\n", at_least > "/dev/stderr"; exit 1 }
        }'
}

command -v cargo-llvm-cov >/dev/null || { echo "cargo-llvm-cov is missing: cargo install cargo-llvm-cov" >&2; exit 2; }
case ${1:-} in
    "") run ;;
    --report) ;;
    *) usage ;;
esac
cargo llvm-cov report --lcov | count "${AT_LEAST:-95}"
