#!/usr/bin/env bash
# Runs every model and every mutant with ProVerif and compares each answer with the committed ones (answers.txt). As many at once as there
# are processors; on two of them it takes a minute and a half.
#
#   core/models/check.sh            compare; exit 0 if all answers are the committed ones, 1 if not, 77 where ProVerif is missing
#   core/models/check.sh --write    write answers.txt anew, to be read before it is committed
#
# ProVerif 2.05 is looked for in $PROVERIF, then in PATH. Each file says in its head what it is run with:
# "run: MAIN with LIBRARY...", where THIS is the file itself. The queries in mutants/*.pv are run by the mutants only: as specified, each of
# them is answered in a model.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")"

case ${1:-} in '' | --write) ;; *) echo "usage: check.sh [--write]" >&2; exit 2 ;; esac
proverif=${PROVERIF:-proverif}
if ! command -v "$proverif" >/dev/null; then
    echo "ProVerif is missing: install ProVerif 2.05 (https://proverif.inria.fr) and put it in PATH, or name it in \$PROVERIF." >&2
    exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# $1: a model or mutant. Writes its answers, one line each, without the numbers that ProVerif puts behind names.
run_one() {
    local file=$1 name=${1%.*} line word main libraries=()
    line=$(grep -m 1 -E '^   run: ' "$file" | sed -E 's/^   run: //; s/ *\*\)$//') || { echo "no run line" >"$work/${name//\//.}"; return; }
    main=${line%% with *}
    for word in ${line#* with }; do
        if [ "$word" = THIS ]; then libraries+=(-lib "$file"); else libraries+=(-lib "$word.pvl"); fi
    done
    local log="$work/${name//\//.}.log"
    if ! timeout 300 "$proverif" "${libraries[@]}" "$main" </dev/null >"$log" 2>&1; then
        { echo "ProVerif failed:"; grep -v '^$' "$log" | tail -n 3; } >"$work/${name//\//.}"
        return
    fi
    grep '^RESULT' "$log" | grep -v '^RESULT (' | sed -E 's/^RESULT //; s/([A-Za-z])_[0-9]+/\1/g' >"$work/${name//\//.}" || echo "ProVerif failed: no answer" >"$work/${name//\//.}"
}

files=(*.pv mutants/*.pvl)
# What takes longest goes first, so that no processor is left with it at the end.
slow=(group_talk.pv enroll.pv hs1.pv hs1_forward.pv hs1_identity.pv chain.pv hs1_server_key_stolen.pv resume.pv hs1_client_key_stolen.pv)
rest=()
for file in "${files[@]}"; do
    case " ${slow[*]} " in *" $file "*) ;; *) rest+=("$file") ;; esac
done
started=$SECONDS
for file in "${slow[@]}" "${rest[@]}"; do
    while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    run_one "$file" &
done
wait

for file in "${files[@]}"; do
    name=${file%.*}
    echo "$file"
    sed 's/^/    /' "$work/${name//\//.}"
done >"$work/answers"

if grep -qE 'ProVerif failed|no run line' "$work/answers"; then
    cat "$work/answers" >&2
    exit 1
fi
if [ "${1:-}" = --write ]; then
    cp "$work/answers" answers.txt
fi

printf '%-44s %s\n' "model or mutant" answers
for file in "${files[@]}"; do
    name=${file%.*}
    printf '%-44s %s\n' "$file" "$(sed -nE 's/.* (is (true|false)|cannot be proved)\.$/\1/p' "$work/${name//\//.}" | sed 's/^is //' | paste -sd ' ')"
done
echo "${#files[@]} files, $(grep -c ' is true\.$' "$work/answers") true, $(grep -c ' is false\.$' "$work/answers") false, $((SECONDS - started)) s"
if ! diff -u --label "committed" --label "now" answers.txt "$work/answers"; then
    echo "the answers differ from core/models/answers.txt" >&2
    exit 1
fi
# A mutant fails where a query is false that is true of the protocol as specified; one that does not shows nothing.
for file in *.pv; do grep ' is true\.$' "$work/${file%.*}" || true; done | sort -u >"$work/true"
for file in mutants/*.pvl; do
    name=${file%.*}
    sed -nE 's/ is false\.$/ is true./p' "$work/${name//\//.}" | grep -qxFf "$work/true" || {
        echo "$file: nothing fails" >&2
        exit 1
    }
done
echo "all answers are the committed ones"
