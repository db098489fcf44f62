#!/usr/bin/env bash
# gpu.sh [BUILD]: checks the CUDA kernels and what stands on them on this machine's GPU, then times
# them beside the best softmax kernels and prints the tables, about five minutes in all. Needs this
# checkout and what `make test` left in BUILD (default: build): both travel to a GPU machine as they
# are, nothing is fetched or set up there. PYTHON (default: python3) names a Python with torch, and
# pytest for the operators' checks; without torch only the kernels are checked. Baselines that it
# cannot import are left out (FlashAttention-3: the package fa3-fwd). Fails if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -* ]]; then
  sed -n '2,/^set /{s/^# //p}' "tools/gpu.sh"
  [[ $1 == -h || $1 == --help ]]
  exit
fi
build=${1:-build}
python=${PYTHON:-python3}
failed=()

fail() {  # WHAT
  failed+=("$1")
  echo "gpu.sh: $1 failed" >&2
}
attempt() {  # SECONDS COMMAND...
  timeout -k 5 "$@" || fail "${*:2}"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  { echo "gpu.sh: no NVIDIA GPU on this machine" >&2; exit 1; }
tests=("$build"/tests/kernels/*_cuda_test)
[ -x "${tests[0]}" ] || { echo "gpu.sh: no CUDA tests in $build: run make test first" >&2; exit 1; }
if torch=$("$python" -c 'import os, torch; assert torch.cuda.is_available(); print(os.path.dirname(torch.__file__))' \
             2>/dev/null); then
  export LD_LIBRARY_PATH=$torch/lib:${LD_LIBRARY_PATH:-}
  tests+=("$build"/tests/lm/*_cuda_test)
else
  torch=
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# ptxas 13.0 has put the descriptor of an asynchronous copy into an odd uniform register, which is an
# illegal instruction (docs/kernels.md). Only a disassembler shows it; full CUDA toolkits have one.
check_sass() {
  cuobjdump -sass "$build/libparallax_bench.so" >"$logs/sass" 2>&1 && grep -q LDGSTS "$logs/sass" ||
    { echo "cuobjdump shows no asynchronous copy in $build/libparallax_bench.so"; return 1; }
  ! grep -E 'LDGSTS.*desc\[UR[0-9]*[13579]\]' "$logs/sass"
}
sass=
if command -v cuobjdump >/dev/null; then
  check_sass >"$logs/odd" &
  sass=$!
fi

# The tests spend most of their time on float64 oracles on the CPU: four parts of each, all at once.
check() {  # PROGRAM PART
  GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
    timeout -k 5 300 "$1" --gtest_brief=1 >"$logs/$(basename "$1").$2" 2>&1
}
checks=()
for test in "${tests[@]}"; do
  for part in 0 1 2 3; do
    check "$test" $part &
    checks+=("$!:$test:$part")
  done
done
for entry in "${checks[@]}"; do
  IFS=: read -r pid test part <<<"$entry"
  wait "$pid" && continue
  fail "$test (part $part of 0 to 3)"
  tail -n 40 "$logs/$(basename "$test").$part" >&2
done
echo "checked: ${#tests[@]} programs of CUDA tests in $SECONDS s"
if [ -n "$sass" ]; then
  wait "$sass" && echo "checked: no illegal descriptor in the machine code" ||
    { fail "the machine code"; head -n 5 "$logs/odd" >&2; }
fi

example=$build/tests/install/build/decode
if [ -x "$example" ]; then
  attempt 60 "$example"
else
  fail "examples/decode ($example is not there: make test builds it)"
fi

if [ -z "$torch" ]; then
  fail "the rest ($python has no torch with CUDA, PYTHON=... names another)"
  exit 1
fi
export PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH} PARALLAX_LIBRARY=$build/libparallax_ops.so
export PARALLAX_BINARY=$build/parallax
if "$python" -c 'import pytest' 2>/dev/null; then
  attempt 240 "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda*.py
fi
echo "checked in $SECONDS s; now the tables"
for bench in attention attention_backward decode; do
  attempt 180 "$python" bench/bench_$bench.py --lib "Parallax=$build/libparallax_bench.so"
done
attempt 60 "$python" bench/bench_append.py
attempt 120 "$build/bench_generate" --batch 1 64
if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu.sh: %s s, failed:\n' "$SECONDS" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "gpu.sh: all passed in $SECONDS s"
