// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/backward_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax {
namespace {

Status no_kernel() {
  return Status::unsupported("device: this build has no CUDA kernel for backward; use the CPU");
}

}  // namespace

namespace cuda {

Status plan_backward(const AttentionProblem&, const Device&, BackwardPlan*) { return no_kernel(); }

}  // namespace cuda

Status run(const BackwardPlan&, const BackwardArgs&, void*, Stream) { return no_kernel(); }

}  // namespace parallax
