// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/append.cu in a build without it.
#include "parallax/attention.h"

namespace parallax {

Status append_kv(const AttentionProblem&, const AppendArgs&, const Device&, Stream) {
  return Status::unsupported("device: this build has no CUDA kernel for append_kv; use the CPU");
}

}  // namespace parallax
