// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/decode_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax::cuda {

Status plan_decode(const AttentionProblem&, const Device&, DecodePlan*) {
  return Status::unsupported("device: this build has no CUDA kernel for decode; use the CPU");
}

}  // namespace parallax::cuda
