// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/backward_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax::cuda {

Status plan_backward(const AttentionProblem&, const Device&, BackwardPlan*) {
  return Status::unsupported("device: this build has no CUDA kernel for backward; use the CPU");
}

}  // namespace parallax::cuda
