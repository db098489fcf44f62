#!/usr/bin/env bash
# gpu.sh [BUILD]: checks the CUDA kernels on this machine's GPU, then times them beside the best softmax
# kernels. Needs this checkout and what `make build` left in BUILD (default: build): both travel to a GPU
# machine as they are. The operators' checks and the timing want a Python with torch (and pytest); PYTHON
# names it. Baselines that it cannot import are left out (FlashAttention-3: the package fa3-fwd).
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
python=${PYTHON:-python3}
failed=0

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  { echo "gpu.sh: no NVIDIA GPU on this machine" >&2; exit 1; }
tests=("$build"/tests/kernels/*_cuda_test)
[ -x "${tests[0]}" ] || { echo "gpu.sh: no CUDA tests in $build: run make build first" >&2; exit 1; }
# The tests spend most of their time on float64 oracles on the CPU: four parts of each, all at once.
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
check() {  # PROGRAM PART
  GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$2 timeout -k 5 300 "$1" --gtest_brief=1 >"$logs/$(basename "$1").$2" 2>&1
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
  failed=1
  echo "gpu.sh: $test failed (part $part of 0 to 3)" >&2
  tail -n 40 "$logs/$(basename "$test").$part" >&2
done
echo "checked: ${#tests[@]} programs of CUDA tests in $SECONDS s"

example=$build/tests/install/build/decode  # where `make test` built it
if [ -x "$example" ]; then
  timeout -k 5 60 "$example" || { echo "gpu.sh: $example failed" >&2; failed=1; }
fi

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "gpu.sh: $python has no torch with CUDA: nothing timed (PYTHON=... names another)" >&2
  exit 1
fi
export PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH} PARALLAX_LIBRARY=$build/libparallax_ops.so
LD_LIBRARY_PATH=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')/lib:${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH
if "$python" -c 'import pytest' 2>/dev/null; then
  timeout -k 5 120 "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda.py || failed=1
fi
for bench in attention attention_backward decode; do
  timeout -k 5 180 "$python" bench/bench_$bench.py --lib "Parallax=$build/libparallax_bench.so" || failed=1
done
timeout -k 5 60 "$python" bench/bench_append.py || failed=1
if [ -x "$build/bench_generate" ]; then
  timeout -k 5 120 "$build/bench_generate" || failed=1
fi
exit $failed
