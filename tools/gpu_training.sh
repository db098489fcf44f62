#!/usr/bin/env bash
# Does training on the GPU follow training on the CPU? The tiny configs, Parallax and softmax, 200 steps on
# the same tokens in the same order: float32 on the CPU, bfloat16 on the CPU (what rounding alone does), and
# the GPU's default, bfloat16 with float32 weights. Prints how far the losses lie apart.
#   tools/gpu_training.sh DATASET OUT      (a folder of `parallax tokenize`; runs go to OUT/)
#   PARALLAX names the binary; STEPS how many steps.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 2 ] || { echo "gpu_training: usage: tools/gpu_training.sh DATASET OUT" >&2; exit 2; }

data=$1
out=$2
parallax=${PARALLAX:-build/parallax}
export OMP_WAIT_POLICY=passive
declare -A config=([parallax]=configs/tiny.toml [softmax]=configs/tiny-softmax.toml)

# train NAME MIXER DEVICE DTYPE
train() {
  "$parallax" train --config "${config[$2]}" --out "$out/$1" --set "data.path=$data" \
    "train.steps=${STEPS:-200}" train.log_every=1 train.eval_every=50 "train.device=$3" "train.dtype=$4" \
    >"$out/$1.log" 2>&1 || { tail -n 1 "$out/$1.log" >&2; return 1; }
}

mkdir -p "$out"
cpu_runs=()
for mixer in parallax softmax; do
  for dtype in float32 bfloat16; do
    OMP_NUM_THREADS=$(($(nproc) / 4 > 0 ? $(nproc) / 4 : 1)) train "cpu-$mixer-$dtype" $mixer cpu $dtype &
    cpu_runs+=($!)
  done
done
for mixer in parallax softmax; do train "gpu-$mixer" $mixer cuda auto; done
for run in "${cpu_runs[@]}"; do wait "$run"; done
for mixer in parallax softmax; do
  tools/compare_loss.py "$out/cpu-$mixer-float32" "$out/cpu-$mixer-bfloat16" "$out/gpu-$mixer"
done
