// SPDX-License-Identifier: MIT
// The decode between its host half (decode_plan.cc), its schedule (decode_schedule.cu) and
// its device half (decode.cuh). docs/kernels.md has the why and the measurements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/decode_schedule.h"
#include "parallax/attention.h"

namespace parallax {

struct DecodeParams {
  AttentionProblem problem;
  Sequences sequences;
  ConstView q, r, k, v;
  const float* k_scale = nullptr;  // of an FP8 cache
  const float* v_scale = nullptr;
  const std::int32_t* page_table = nullptr;  // null: sequence b is page b
  std::int64_t max_pages = 0;
  int num_pages = 0;
  int page_shift = 0;  // key j is row j & page_mask of page j >> page_shift of the table
  int page_mask = 0;
  View o;
  float* lse = nullptr;
  float* t_bar = nullptr;
  StateView state;
  const DecodeSpan* schedule = nullptr;  // the spans; null: each CTA finds its own
  DecodeSpans spans;
  // Parts of split items, two slots a span (its first item's and its last's), and at an item's
  // first slot how many of its parts there are (decode_results.cuh).
  float* partials = nullptr;        // [width, 2 spans, rows, 2 head_dim + 4]
  std::uint64_t* counts = nullptr;  // [width, 2 spans]
  float scale_log2 = 0;             // scale * log2(e)
  int group = 1;
  int rows = 1;    // group * q_len
  int passes = 1;  // over them
  int width = 1;
  int units = 1;
  int team = 1;
  int ways = 1;          // kDecodeWarps / team
  bool settled = false;  // as run_settled() has it
};

// Enqueues the kernel of one instance (instances.txt, portable_instances.txt). Cache: T or e4m3.
template <class T, class Cache, int kHeadDim, bool kPortable>
Status launch_decode(const DecodeParams& params, DecodeShape shape, int blocks,
                     cudaStream_t stream);

// Finds all spans, where a block is block_keys keys. `early`: as in early_launch.cuh.
Status launch_decode_schedule(bool early, const AttentionProblem& problem,
                              const Sequences& sequences, int block_keys, DecodeSpans spans,
                              int units, DecodeSpan* schedule, cudaStream_t stream);

}  // namespace parallax
