#!/usr/bin/env bash
# Kernels, parsers and trainer under the address and undefined-behaviour sanitizers, then the threaded
# kernels under the thread sanitizer. Any report fails.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake=.venv/bin/cmake
common=(-G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DPARALLAX_CUDA=OFF)

# build_and_test FOLDER SANITIZERS TESTS(a regular expression) OPTIONS...
build_and_test() {
  local folder=$1 sanitizers=$2 tests=$3
  shift 3
  mkdir -p "$folder"
  $cmake -S . -B "$folder" "${common[@]}" -DPARALLAX_SANITIZE="$sanitizers" "$@" \
    >"$folder/configure.log" || { cat "$folder/configure.log"; exit 1; }
  local targets
  mapfile -t targets < <(.venv/bin/ctest --test-dir "$folder" -N -R "$tests" |
    sed -n 's|^ *Test *#[0-9]*: \([a-z]*\)/\(.*\)$|\1_\2|p')
  [ ${#targets[@]} -gt 0 ] || { echo "no tests match $tests"; exit 1; }
  $cmake --build "$folder" -j "$(nproc)" --target "${targets[@]}"
  .venv/bin/ctest --test-dir "$folder" -R "$tests" -LE long --output-on-failure
}

# LibTorch itself is not instrumented: its own leaks at exit and its containers' annotations are not
# ours to report.
export ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
build_and_test build-sanitize-lm address,undefined \
  '^lm/(files|safetensors|tokenizer|corpus|data|metrics|checkpoint|trainer|config)_test$'
export ASAN_OPTIONS=detect_leaks=1
build_and_test build-sanitize address,undefined '^kernels/' -DPARALLAX_TORCH=OFF
export TSAN_OPTIONS=halt_on_error=1
build_and_test build-sanitize-threads thread '^kernels/' -DPARALLAX_TORCH=OFF
