#!/usr/bin/env bash
# Runs the fuzz targets under libFuzzer: `fuzz/run.sh [--merge] [target…]`, all targets without names.
#
# FUZZ_SECONDS  how long each runs (60)
# --merge       afterwards, keep in fuzz/corpus/ a smallest set of inputs that reaches what was reached
#
# The toolchain is the stable one: RUSTC_BOOTSTRAP lets it use its own AddressSanitizer, and the coverage pass needs
# flags of the code generator only. Libraries of the workspace are built with both, build scripts are not.
set -euo pipefail
cd "$(dirname "$0")/.."

merge=
if [ "${1:-}" = --merge ]; then merge=1; shift; fi
seconds=${FUZZ_SECONDS:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
finds=$target_dir/finds

coverage="-Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    coverage+=" -Cllvm-args=-sanitizer-coverage-$option"
done
RUSTC_BOOTSTRAP=1 RUSTFLAGS="$coverage -Zsanitizer=address" CARGO_TARGET_DIR=$target_dir CARGO_INCREMENTAL=0 \
    ${CARGO:-cargo} build --package ambit-fuzz --bin ambit-fuzz --features libfuzzer --profile fuzz --target "$host"
fuzzer=$target_dir/$host/fuzz/ambit-fuzz

# A byte more memory, a second more time, or a leak, is a find. 5 s are thousands of times what an input takes.
limits="-timeout=5 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=16384 -print_funcs=0"
mkdir -p "$finds"
failed=()
[ $# -gt 0 ] || set -- $(ls fuzz/corpus)
for target in "$@"; do
    export AMBIT_FUZZ_TARGET=$target
    reached=$target_dir/reached/$target
    mkdir -p "$reached"
    log=$finds/$target.log
    if ! "$fuzzer" $limits -max_total_time="$seconds" -artifact_prefix="$finds/$target-" -print_final_stats=1 \
        "$reached" "fuzz/corpus/$target" >"$log" 2>&1; then
        failed+=("$target")
        tail -n 40 "$log"
    fi
    printf '%-20s %s\n' "$target" "$(awk '/ cov: /{line=$0} /number_of_executed_units|peak_rss_mb|slowest_unit/{stats=stats" "$1" "$2} END{match(line,/cov: [0-9]+ ft: [0-9]+/); print substr(line,RSTART,RLENGTH)stats}' "$log")"
    if [ -n "$merge" ]; then
        "$fuzzer" $limits -max_len=2048 -set_cover_merge=1 "fuzz/corpus/$target" "$reached" >"$log" 2>&1 || failed+=("$target")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "something was found: ${failed[*]}; the inputs are in $finds" >&2
    exit 1
fi
