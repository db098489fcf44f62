// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/decode_plan.cc in a build without it.
#include "cuda/plan.h"

namespace parallax {
namespace {

Status no_kernel() {
  return Status::unsupported("device: this build has no CUDA kernel for decode; use the CPU");
}

}  // namespace

namespace cuda {

Status plan_decode(const AttentionProblem&, const Device&, DecodePlan*) { return no_kernel(); }

}  // namespace cuda

Status run(const DecodePlan&, const DecodeArgs&, void*, Stream) { return no_kernel(); }

Status schedule(const DecodePlan&, const Sequences&, void*, Stream) { return no_kernel(); }

}  // namespace parallax
