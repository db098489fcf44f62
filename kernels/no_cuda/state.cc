// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/state.cu in a build without it.
#include "parallax/attention.h"

namespace parallax {
namespace {

Status no_kernel() {
  return Status::unsupported("device: this build has no CUDA kernel for states; use the CPU");
}

}  // namespace

Status merge_states(const AttentionProblem&, const StateView*, int, const StateView&, const Device&,
                    Stream) {
  return no_kernel();
}

Status finalize_state(const AttentionProblem&, const StateView&, const View&, float*, float*,
                      const Device&, Stream) {
  return no_kernel();
}

}  // namespace parallax
