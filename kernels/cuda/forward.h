// SPDX-License-Identifier: MIT
// The Hopper forward between its host half (forward_plan.cc) and its device half (forward.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "parallax/attention.h"
#include "parallax/types.h"

namespace parallax {

// The shape of a CTA's work, by padded head dim. A consumer warpgroup owns 32 queries: 64 virtual
// rows, q and r interleaved. docs/kernels.md has the budgets and the measurements behind the table.
struct ForwardTile {
  int warpgroups;          // consumers; one more warpgroup loads
  int keys;                // per key tile
  int stages;              // of the K and V rings
  int packed_stages;       // tiles of q and r in shared memory
  bool q_in_registers;     // q and r as register operands, else read from shared memory each time
  bool ping_pong;          // warpgroups take turns at the tensor cores
  int consumer_registers;  // a thread
  int producer_registers;

  PARALLAX_HOST_DEVICE constexpr int queries() const { return 32 * warpgroups; }
  PARALLAX_HOST_DEVICE constexpr int threads() const { return 128 * (warpgroups + 1); }
};

PARALLAX_HOST_DEVICE constexpr ForwardTile forward_tile(int head_dim) {
  if (head_dim <= 64) return {3, 128, 4, 2, false, true, 160, 32};
  if (head_dim <= 128) return {2, 128, 3, 1, true, true, 240, 24};
  return {2, 80, 2, 1, false, true, 240, 24};
}

PARALLAX_HOST_DEVICE constexpr int padded_head_dim(std::int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// What the kernel reads from: four-dimensional maps {head_dim, len, heads, batch}, 8 rows a box for
// q and r, a key tile for k and v, of which pages {head_dim, page_size, heads, page} have
// ForwardParams::page_box; and both of q and r interleaved, 8 rows of one and 8 of the
// other, as a whole query tile in a box of 64 columns (used where ForwardParams says so).
struct ForwardMaps {
  CUtensorMap q, r, k, v, q_and_r;
};

struct ForwardParams {
  AttentionProblem problem;
  Sequences sequences;
  View o;
  View v_bar;
  float* lse = nullptr;
  float* t_bar = nullptr;
  float scale_log2 = 0;  // scale * log2(e)
  int num_heads = 0;     // of queries
  int group = 1;         // of them to a key/value head
  // Batched: what place_tile() needs, and how many tickets there are.
  int num_tickets = 0;
  int num_q_tiles = 0;
  int num_pairs = 0;
  int section = 0;
  // Packed: the tickets follow from first_ticket below.
  int num_sequences = 0;
  int section_keys = 0;
  // In the workspace.
  int* next_ticket = nullptr;           // zero at launch
  const int* sequence_order = nullptr;  // [batch], longest first; null: batched
  const int* first_ticket = nullptr;    // [batch + 1], by place in sequence_order
  // The q_and_r map.
  bool interleaved = false;  // there is one
  bool r_first = false;      // r lies below q in memory: the 8-row halves change places
  int head_columns = 0;      // columns of the map from one head to the next
  // Paged k and v: token j of sequence b is row j % 2^page_shift of a page of the maps' last axis.
  const std::int32_t* page_table = nullptr;  // [batch, max_pages]; null: contiguous
  std::int64_t max_pages = 0;
  int page_shift = 0;
  int slot_mask = 0;  // page_size - 1
  int page_box = 0;   // rows a copy, a power of two: of one page, and of one key tile
  int box_mask = 0;   // -page_box
};

// Enqueues the kernel of one instance (instances.txt).
template <class T, int kHeadDim>
Status launch_forward(const ForwardMaps& maps, const ForwardParams& params, int blocks,
                      cudaStream_t stream);

// Packed calls: sorts the sequences (in runs of 1024) by decreasing length into `order`, counts the
// query tiles before each into `first_ticket` and sets *next_ticket to 0.
Status launch_forward_order(const AttentionProblem& problem, const Sequences& sequences,
                            int queries_per_tile, int* next_ticket, int* order, int* first_ticket,
                            cudaStream_t stream);

}  // namespace parallax
