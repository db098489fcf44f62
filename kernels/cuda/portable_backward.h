// SPDX-License-Identifier: MIT
// The portable backward between its host half (backward_plan.cc) and its device half
// (portable_backward.cuh). Parameters, workspace and the first kernel are the Hopper backward's.
#pragma once

#include "cuda/backward.h"

namespace parallax {

constexpr int kPortableBackwardTile = 64;  // rows of a block: 16 a warp

// Rows of a streamed tile, by padded head dim.
PARALLAX_HOST_DEVICE constexpr int portable_backward_stream(int head_dim) {
  return head_dim <= 64 ? 64 : 32;
}

// Enqueues the three kernels of one instance (portable_instances.txt). Grids of 64 rows a tile.
template <class T, int kHeadDim>
Status launch_portable_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace parallax
