#!/usr/bin/env bash
# gpu.sh [BUILD] [checks|tables]: checks the CUDA kernels and what stands on them on this machine's
# GPU, then times them beside the best softmax kernels and prints the tables, three to four minutes
# in all; or one of the two. Needs this checkout and what `make test` left in BUILD (default: build):
# both travel to a GPU machine as they are, nothing is fetched or set up there. PYTHON (default:
# python3) names a Python with torch, and pytest for the operators' checks; without torch only the
# kernels are checked. Baselines that it cannot import are left out (FlashAttention-3: the package
# fa3-fwd). Fails if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if [[ ${1:-} == -* ]]; then
  sed -n '2,/^set /{s/^# //p}' "tools/gpu.sh"
  [[ $1 == -h || $1 == --help ]]
  exit
fi
build=${1:-build}
parts=${2:-checks tables}
[[ " checks tables " == *" $parts "* ]] || { echo "gpu.sh: '$parts' is neither checks nor tables" >&2; exit 1; }
python=${PYTHON:-python3}
failed=()

fail() {  # WHAT
  failed+=("$1")
  echo "gpu.sh: $1 failed" >&2
}
attempt() {  # SECONDS COMMAND...
  timeout -k 5 "$@" || fail "${*:2}"
}

# ptxas 13.0 has put the descriptor of an asynchronous copy into an odd uniform register, which is an
# illegal instruction (docs/kernels.md). Only a disassembler shows it; full CUDA toolkits have one.
check_machine_code() {
  cuobjdump -sass "$build/libparallax_bench.so" >"$logs/sass" 2>&1 && grep -q LDGSTS "$logs/sass" ||
    { echo "cuobjdump shows no asynchronous copy in $build/libparallax_bench.so"; return 1; }
  ! grep -E 'LDGSTS.*desc\[UR[0-9]*[13579]\]' "$logs/sass"
}

check_part() {  # PROGRAM PART [ptx: not this GPU's machine code but the PTX that others take]
  [ -z "${3:-}" ] || export CUDA_FORCE_PTX_JIT=1
  GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
    timeout -k 5 300 "$1" --gtest_brief=1 >"$logs/$(basename "$1").$2${3:-}" 2>&1
}

check_from_python() {
  "$python" -c 'import pytest' || return
  OMP_NUM_THREADS=4 timeout -k 5 240 "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda*.py
}

# The tests spend most of their time on float64 oracles on the CPU: four parts of each, all at
# once, and the operators' from Python beside them.
check_programs() {  # PROGRAM...
  local running=() machine_code="" operators="" entry test part pid
  if [ -n "$torch" ]; then
    check_from_python >"$logs/operators" 2>&1 &
    operators=$!
  fi
  if command -v cuobjdump >/dev/null; then
    check_machine_code >"$logs/machine_code" &
    machine_code=$!
  fi
  for test in "$@"; do
    for part in 0 1 2 3; do
      check_part "$test" $part &
      running+=("$!:$test:$part")
      [[ $test =~ (append|few_rows|state)_cuda_test$ ]] || continue  # one source for every GPU
      check_part "$test" $part ptx &
      running+=("$!:$test:${part}ptx")
    done
  done
  for entry in "${running[@]}"; do
    IFS=: read -r pid test part <<<"$entry"
    wait "$pid" && continue
    fail "$test (part ${part/ptx/, from PTX,} of 0 to 3)"
    tail -n 40 "$logs/$(basename "$test").$part" >&2
  done
  echo "checked: $# programs of CUDA tests in $SECONDS s"
  if [ -n "$operators" ]; then
    wait "$operators" || fail "tests/python/test_cuda*.py"
    tail -n 40 "$logs/operators"
  fi
  [ -n "$machine_code" ] || return
  wait "$machine_code" && echo "checked: no illegal descriptor in the machine code" && return
  fail "the machine code"
  head -n 5 "$logs/machine_code" >&2
}

run_example() {
  local example=$build/tests/install/build/decode
  if [ -x "$example" ]; then
    attempt 60 "$example"
  else
    fail "examples/decode ($example is not there: make test builds it)"
  fi
}

print_tables() {
  local bench
  for bench in attention attention_backward decode few_rows; do
    attempt 180 "$python" bench/bench_$bench.py --lib "Parallax=$build/libparallax_bench.so"
  done
  attempt 60 "$python" bench/bench_append.py
  attempt 120 "$build/bench_generate" --batch 1 64
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  { echo "gpu.sh: no NVIDIA GPU on this machine" >&2; exit 1; }
tests=("$build"/tests/kernels/*_cuda_test)
[ -x "${tests[0]}" ] || { echo "gpu.sh: no CUDA tests in $build: run make test first" >&2; exit 1; }
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
if torch=$("$python" -c 'import os, torch; assert torch.cuda.is_available(); print(os.path.dirname(torch.__file__))' \
             2>/dev/null); then
  export LD_LIBRARY_PATH=$torch/lib:${LD_LIBRARY_PATH:-} PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}
  export PARALLAX_LIBRARY=$build/libparallax_ops.so PARALLAX_BINARY=$build/parallax
  tests+=("$build"/tests/lm/*_cuda_test)
fi
if [[ $parts == *checks* ]]; then
  check_programs "${tests[@]}"
  run_example
  echo "checked in $SECONDS s"
fi
if [ -z "$torch" ]; then
  fail "all that needs torch ($python has none with CUDA, PYTHON=... names another)"
elif [[ $parts == *tables* ]]; then
  print_tables
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu.sh: %s s, failed:\n' "$SECONDS" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "gpu.sh: all passed in $SECONDS s"
