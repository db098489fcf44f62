#!/usr/bin/env bash
# Kernels, parsers and trainer under the address and undefined-behaviour sanitizers, then the threaded
# kernels under the thread sanitizer. Any report fails. JOBS: compilers at once (all cores).
set -euo pipefail
cd "$(dirname "$0")/.."
cmake=.venv/bin/cmake
jobs=${JOBS:-$(nproc)}
export OMP_WAIT_POLICY=passive
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1

# build FOLDER SANITIZERS TESTS(a regular expression) OPTIONS...
build() {
  local folder=$1 sanitizers=$2 tests=$3
  shift 3
  mkdir -p "$folder"
  $cmake -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DPARALLAX_CUDA=OFF \
    -DPARALLAX_SANITIZE="$sanitizers" "$@" >"$folder/configure.log" ||
    { cat "$folder/configure.log"; exit 1; }
  local targets
  mapfile -t targets < <(.venv/bin/ctest --test-dir "$folder" -N -R "$tests" -LE long |
    sed -n 's|^ *Test *#[0-9]*: \([a-z]*\)/\(.*\)$|\1_\2|p')
  [ ${#targets[@]} -gt 0 ] || { echo "no tests match $tests"; exit 1; }
  $cmake --build "$folder" -j "$jobs" --target "${targets[@]}"
}

run() { # FOLDER TESTS
  .venv/bin/ctest --test-dir "$1" -R "$2" -LE long -j "$jobs" --output-on-failure
}

kernels='^kernels/'
lm='^lm/(files|safetensors|tokenizer|corpus|data|metrics|checkpoint|trainer|config)_test$'
threaded='^kernels/(forward|backward|blocked|decode|append|state)_test$'

build build-sanitize address,undefined "$kernels|$lm"
ASAN_OPTIONS=detect_leaks=1 run build-sanitize "$kernels"
# LibTorch itself is not instrumented: its own leaks at exit and its containers' annotations are not
# ours to report.
ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0 run build-sanitize "$lm"
build build-sanitize-threads thread "$threaded" -DPARALLAX_TORCH=OFF
# What runs on several threads; the rest would only be slow.
GTEST_FILTER='*Thread*:*MergeStates*:*Append*' run build-sanitize-threads "$threaded"
