// SPDX-License-Identifier: MIT
// The portable forward between its host half (portable_forward.cc) and its device half
// (portable_forward.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/place.h"
#include "parallax/attention.h"

namespace parallax {

// The shape of a block's work, by padded head dim. A slab is 16 virtual rows: 8 queries. Two stages
// cost shared memory and save a barrier a tile; docs/kernels.md has what was measured.
struct PortableForwardTile {
  int warps;
  int slabs;            // a warp
  int keys;             // of a tile
  int stages;           // of K and V
  bool q_in_registers;  // else read from shared memory for every tile
  int blocks;           // a multiprocessor whose registers and shared memory are to hold so many

  PARALLAX_HOST_DEVICE constexpr int queries() const { return 8 * slabs * warps; }
  PARALLAX_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
};

PARALLAX_HOST_DEVICE constexpr PortableForwardTile portable_forward_tile(int head_dim) {
  if (head_dim <= 64) return {4, 2, 64, 2, false, 3};
  if (head_dim <= 128) return {4, 2, 64, 1, false, 2};
  return {8, 1, 48, 2, true, 1};
}

struct PortableForwardParams {
  AttentionProblem problem;
  Sequences sequences;
  PageTable pages;
  ConstView q, r, k, v;
  View o;
  View v_bar;
  float* lse = nullptr;
  float* t_bar = nullptr;
  float scale_log2 = 0;  // scale * log2(e)
  int group = 1;         // query heads to a key/value head
  TileGrid grid;
};

// Checks the views and enqueues the kernel.
Status run_portable_forward(const ForwardPlan& plan, const ForwardArgs& args, cudaStream_t stream);

// Query tiles of all sequences and heads; packed, where lengths are on the device, at most.
std::int64_t num_portable_forward_blocks(const AttentionProblem& problem);

// Enqueues the kernel of one instance (portable_instances.txt).
template <class T, int kHeadDim>
Status launch_portable_forward(const PortableForwardParams& params, cudaStream_t stream);

}  // namespace parallax
