// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/forward_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax::cuda {

Status plan_forward(const AttentionProblem&, const Device&, ForwardPlan*) {
  return Status::unsupported("device: this build has no CUDA kernel for forward; use the CPU");
}

}  // namespace parallax::cuda
