// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/forward_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax {
namespace {

Status no_kernel() {
  return Status::unsupported("device: this build has no CUDA kernel for forward; use the CPU");
}

}  // namespace

namespace cuda {

Status plan_forward(const AttentionProblem&, const Device&, ForwardPlan*) { return no_kernel(); }

}  // namespace cuda

Status run(const ForwardPlan&, const ForwardArgs&, void*, Stream) { return no_kernel(); }

}  // namespace parallax
