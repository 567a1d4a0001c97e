#!/usr/bin/env bash
# Whether the tests would notice: changes one thing at a time in the core's record, handshake, envelope and connection,
# and runs the core's own tests on each such mutant. mutants.toml says what is changed and which changes are left out, and
# why. The figure is what was killed of all that compile; below 90 % the script ends with 1.
#
# Results are kept, so that a run can be broken off and taken up again. It needs cargo-mutants, and nothing from the network.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat >&2 <<'USAGE'
usage: tests/mutants.sh [--shard K/N]           all mutants; of N shards the Kth only (0 to N-1)
       tests/mutants.sh --open [--shard K/N]    those only that survived, or that no run has reached yet
       tests/mutants.sh --report                the figure of all runs so far, and who survived
       tests/mutants.sh --list                  the mutants
environment: AT_LEAST (90, per cent), JOBS (1), MUTANTS_OUT (target/mutants)
USAGE
    exit 2
}

out=${MUTANTS_OUT:-$PWD/target/mutants}
# Tests of rooms in which nothing is changed.
others=(page:: rsa:: wire:: wycheproof::)
common=(--config tests/mutants.toml --package ossicle-core)

list() { cargo mutants "${common[@]}" --list --colors never; }

# The mutants by names that other lines above them do not change: which one of those in a file that read alike.
keyed() { list | awk '{ key = $0; sub(/:[0-9]+:[0-9]+:/, ":", key); print key " #" ++seen[key] "\t" $0 }'; }

# Runs the mutants that standard input names.
run() {
    local -a names
    mapfile -t names < <(sed 's/[][\.*^$(){}?+|]/\\&/g; s/.*/--re=^&$/')
    # A mutant's warnings interest nobody, and flags of the shell's would build everything anew.
    unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
    export CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=${MUTANTS_TARGET_DIR:-$out/build}
    rm -rf "$out/mutants.out" "$out/mutants.out.old"
    keyed >"$out/keys"
    # What a mutant does wrong may be to have no end. 2: one survived, 3: one had no end.
    cargo mutants "${common[@]}" --jobs "${JOBS:-1}" --timeout 120 --build-timeout 1200 --output "$out" \
        --colors never --no-times --cargo-arg=--lib "${names[@]}" -- -- "${others[@]/#/--skip=}" ||
        case $? in 2 | 3) ;; *) return 1 ;; esac
}

# Adds what came out of a run to the results, also when it was broken off.
collect() {
    local word file
    for word in caught:killed timeout:killed missed:survived unviable:unviable; do
        file=$out/mutants.out/${word%:*}.txt
        [ -s "$file" ] || continue
        awk -F '\t' -v word="${word#*:}" 'NR == FNR { key[$2] = $1; next } { print word "\t" key[$1] }' \
            "$out/keys" "$file" >>"$out/results"
        rm "$file"
    done
}

# The last word on each mutant that there is now; without one it is open.
verdicts() {
    keyed | awk -F '\t' 'NR == FNR { word[$2] = $1; next } { print (($1 in word) ? word[$1] : "open") "\t" $2 }' \
        "$out/results" -
}

report() {
    verdicts | awk -F '\t' -v at_least="${AT_LEAST:-90}" '
        { count[$1]++; all++ }
        $1 == "survived" { print "survived: " $2 }
        END {
            tested = count["killed"] + count["survived"]
            if (tested == 0) { print "no mutant was tested" > "/dev/stderr"; exit 1 }
            percent = 100 * count["killed"] / tested
            printf "%d mutants: %d killed, %d survived, %d do not compile, %d not run\n", all, count["killed"],
                count["survived"], count["unviable"], count["open"]
            printf "%.1f %% of those that ran are killed\n", percent
            if (percent < at_least) { printf "less than %s %%\n", at_least > "/dev/stderr"; exit 1 }
        }'
}

command -v cargo-mutants >/dev/null || { echo "cargo-mutants is missing: cargo install cargo-mutants" >&2; exit 2; }
mkdir -p "$out"
touch "$out/results"
wanted="killed|open|survived|unviable" shard=0 of=1
while [ $# -gt 0 ]; do
    case $1 in
        --open) wanted="open|survived" ;;
        --shard)
            [[ ${2:-} =~ ^([0-9]+)/([1-9][0-9]*)$ ]] || usage
            shard=${BASH_REMATCH[1]} of=${BASH_REMATCH[2]}
            shift
            ;;
        --list) list; exit ;;
        --report) wanted= ;;
        *) usage ;;
    esac
    shift
done
if [ -n "$wanted" ]; then
    trap collect EXIT
    # Every Nth, so that a shard says something about all.
    selected=$(verdicts | awk -v shard="$shard" -v of="$of" 'NR % of == shard' | sed -nE "s/^($wanted)\t//p")
    if [ -n "$selected" ]; then run <<<"$selected"; fi
    collect
    trap - EXIT
fi
report
