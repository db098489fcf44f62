// SPDX-License-Identifier: MIT
// The Hopper backward between its host half (backward_plan.cc) and its device half (backward.cuh).
//
// Three kernels, in this order (docs/kernels.md has the why and the numbers):
//   prepare   per query: lse, t_bar and the dot products of d_o with o and v_bar; per sequence and
//             key/value head: a reference key
//   queries   dq, dr: a CTA owns 128 queries and streams the keys they see, 5 products
//   keys      dk, dv: a CTA owns 128 keys and streams the queries that see them, 6 products
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/place.h"
#include "parallax/attention.h"
#include "parallax/mask.h"

namespace parallax {

constexpr int kBackwardRows = 64;   // of a warpgroup, and of a streamed tile
constexpr int kBackwardTile = 128;  // rows of a CTA: two warpgroups
constexpr int kBackwardStages = 3;  // streamed tiles in shared memory

// Four-dimensional maps {head_dim, len, heads, batch}, boxes of 64 columns and 64 rows.
struct BackwardMaps {
  CUtensorMap q, r, d_o, k, v;
};

// What the kernels need to know of a query, for the product at hand:
//   softmax   {lse log2(e), 1 + t_bar}           then  {lse log2(e) + log2(fold), fold (1 + t_bar)}
//   gradient  {g_bar, delta - g_bar}             then  {fold g_bar, fold^2 (delta - g_bar)}
// with g_bar = d_o . v_bar and delta = d_o . o. The queries kernel turns the first form into the
// second, with g_bar and delta as its own row sums say, which are exact where v_bar and o were
// rounded.
struct BackwardParams {
  AttentionProblem problem;
  Sequences sequences;
  ConstView q, r, k, v, o, v_bar, d_o;
  const float* lse = nullptr;
  const float* t_bar = nullptr;
  View dq, dr, dk, dv;
  float scale = 0;
  float scale_log2 = 0;  // scale log2(e)
  float fold = 0;        // scale, or something tiny in place of 0
  int group = 1;         // query heads to a key/value head
  // Work.
  int num_statistics_tiles = 0;  // of 64 queries
  TileGrid query_grid;
  TileGrid key_grid;
  // In the workspace. Statistics are [batch, num_q_heads, statistics_rows], packed [num_q_heads,
  // statistics_rows], each sequence from a multiple of 64 rows on; rows behind a sequence's last
  // query read as queries that see nothing.
  std::int64_t statistics_rows = 0;
  float2* softmax = nullptr;
  float2* gradient = nullptr;
  float* reference_keys = nullptr;  // [batch, num_kv_heads, padded head_dim]
};

// Index of the statistics of query 0 of sequence b.
PARALLAX_HOST_DEVICE inline std::int64_t statistics_begin(const BackwardParams& params,
                                                          const Sequence& sequence, int b,
                                                          int head) {
  if (params.problem.packed) {
    return head * params.statistics_rows +
           (sequence.q_offset + kBackwardRows * b) / kBackwardRows * kBackwardRows;
  }
  return (b * params.problem.num_q_heads + head) * params.statistics_rows;
}

// Enqueues the three kernels of one instance (instances.txt).
template <class T, int kHeadDim>
Status launch_backward(const BackwardMaps& maps, const BackwardParams& params, cudaStream_t stream);

}  // namespace parallax
