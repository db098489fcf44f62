#!/usr/bin/env bash
# Builds the fuzz targets with clang and feeds each RUNS inputs (the first argument, a million where
# left out). Ends with a table; a finding stops it, with the input that shows it in build-fuzz/.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-1000000}
build=build-fuzz
if ! command -v clang++-14 >/dev/null; then
  echo "make fuzz needs clang 14: apt-get install clang-14 libclang-rt-14-dev" >&2
  exit 1
fi
mkdir -p $build
.venv/bin/cmake -S . -B $build -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
  -DCMAKE_CXX_COMPILER=clang++-14 -DPARALLAX_FUZZ=ON >$build/configure.log ||
  { cat $build/configure.log; exit 1; }
.venv/bin/cmake --build $build -j "$(nproc)"

table=
for target in $build/*_fuzz; do
  name=$(basename "$target" _fuzz)
  seeds=tests/fuzz/seeds/$name
  [ "$name" = config ] && seeds=configs
  corpus=$build/corpus-$name
  mkdir -p "$corpus"
  log=$build/$name.log
  echo "$name: $runs inputs (log: $log)"
  "$target" "$corpus" "$seeds" -runs="$runs" -seed=1 -max_len=8192 -timeout=20 -rss_limit_mb=4096 \
    -malloc_limit_mb=2048 -dict=tests/fuzz/json.dict -artifact_prefix=$build/ \
    -print_final_stats=1 >"$log" 2>&1 || { tail -40 "$log"; exit 1; }
  inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
  covered=$(sed -n 's/.*cov: \([0-9]*\).*/\1/p' "$log" | tail -1)
  table+=$(printf '%-12s %12s %12s %10s' "$name" "$inputs" "$rate" "$covered")$'\n'
done
printf '%-12s %12s %12s %10s\n%s' parser inputs inputs/s edges "$table"
