#!/usr/bin/env bash
# gpu.sh [BUILD]: checks the CUDA kernels on this machine's GPU, then times them beside the best softmax
# kernels. Needs what `make build` left in BUILD (default: build) and nothing else of this checkout: both
# travel to a GPU machine as they are. The timing wants a Python with torch; PYTHON names it. Baselines
# that it cannot import are left out (FlashAttention-3: the package fa3-fwd).
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
python=${PYTHON:-python3}
failed=0

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  { echo "gpu.sh: no NVIDIA GPU on this machine" >&2; exit 1; }
tests=("$build"/tests/kernels/*_cuda_test)
[ -x "${tests[0]}" ] || { echo "gpu.sh: no CUDA tests in $build: run make build first" >&2; exit 1; }
for test in "${tests[@]}"; do
  timeout -k 5 240 "$test" --gtest_brief=1 || { echo "gpu.sh: $test failed" >&2; failed=1; }
done

example=$build/tests/install/build/decode  # where `make test` built it
if [ -x "$example" ]; then
  timeout -k 5 60 "$example" || { echo "gpu.sh: $example failed" >&2; failed=1; }
fi

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "gpu.sh: $python has no torch with CUDA: nothing timed (PYTHON=... names another)" >&2
  exit 1
fi
for bench in bench/bench_attention*.py; do
  timeout -k 5 180 "$python" "$bench" --lib "Parallax=$build/libparallax_bench.so" || failed=1
done
exit $failed
