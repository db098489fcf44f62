// SPDX-License-Identifier: MIT
// What the blocked kernels are handed: blocks of query rows of one key/value head, as plain
// pointers, and the table of instruction sets that they are compiled for.
//
// The rows of a block are (query, query head of the group) pairs, query-major: all heads of a group
// share the key and value tiles, whatever the group size, and the visible ranges of consecutive
// rows only move up.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallax/types.h"

namespace parallax::cpu {

// Divisible by every vector width, panel and register block of every target.
constexpr int kBlockRows = 96;
constexpr int kBlockKeys = 96;

// Keys or values of one sequence and one head. Token j is at base + j * row_bytes, or in page
// table[j >> page_shift] at row j % page_size.
struct TokenRows {
  const char* base = nullptr;
  std::int64_t row_bytes = 0;
  const std::int32_t* table = nullptr;
  std::int64_t page_bytes = 0;
  int page_shift = 0;

  // Inlined always: a shared copy would be one of some instruction set.
  [[gnu::always_inline]] const char* row(std::int64_t j) const {
    if (table == nullptr) return base + j * row_bytes;
    const std::int64_t in_page = j & ((std::int64_t{1} << page_shift) - 1);
    return base + table[j >> page_shift] * page_bytes + in_page * row_bytes;
  }
};

struct ForwardBlock {
  DType dtype = DType::kFloat32;
  int head_dim = 0;
  float scale = 1.0f;
  int rows = 0;                                 // at most kBlockRows
  std::int32_t lo[kBlockRows], hi[kBlockRows];  // visible keys [lo, hi); 0, 0: none
  const void *q[kBlockRows], *r[kBlockRows];    // rows of head_dim elements
  void *o[kBlockRows], *v_bar[kBlockRows];      // v_bar[0] null: not asked for
  float *lse[kBlockRows], *t_bar[kBlockRows];   // lse[0], t_bar[0] null: not asked for
  TokenRows k, v;
};

// The float sums of a backward block that outlive a call: dq and dr [kBlockRows, row_stride] and
// the row sums of dS and e = -dT, dS times its scale.
struct BackwardSums {
  float *dq, *dr, *sum_ds, *sum_e;
};

struct BackwardBlock {
  DType dtype = DType::kFloat32;
  int head_dim = 0;
  float scale = 1.0f;
  int rows = 0;
  std::int32_t lo[kBlockRows], hi[kBlockRows];
  const void *q[kBlockRows], *r[kBlockRows], *o[kBlockRows], *v_bar[kBlockRows], *d_o[kBlockRows];
  float lse[kBlockRows], t_bar[kBlockRows];
  void *dq[kBlockRows], *dr[kBlockRows];
  TokenRows k, v;
  BackwardSums sums;
  float *dk, *dv;  // [tile * kBlockKeys + key, row_stride], float, accumulated into
  // Key tiles [tile_begin, tile_end) of this call; a block meets its tiles from last to first,
  // over one or more calls.
  std::int32_t tile_begin = 0, tile_end = 0;
  bool first = true, last = true;  // the block's first call zeroes its sums, its last writes dq, dr
};

// Elements between the float rows that the kernels keep: head_dim rounded up to a size that they
// are compiled for, plus one cache line, so that the rows of a tile spread over all cache sets.
constexpr int row_stride(std::int64_t head_dim) {
  return (head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256) + 16;
}

// Floats of scratch for one block.
constexpr std::size_t forward_scratch(std::int64_t head_dim) {
  return std::size_t{7} * kBlockRows * row_stride(head_dim) + 32 * kBlockKeys;
}
constexpr std::size_t backward_scratch(std::int64_t head_dim) {
  return std::size_t{10} * kBlockRows * row_stride(head_dim) +
         std::size_t{4} * kBlockRows * kBlockKeys + 8 * kBlockRows;
}

struct Target {
  const char* name;
  void (*forward)(const ForwardBlock& block, float* scratch);
  void (*backward)(const BackwardBlock& block, float* scratch);
  // Writes a float row as head_dim elements of dtype.
  void (*write_row)(DType dtype, const float* from, int head_dim, void* to);
};

extern const Target kPlainTarget;
#if defined(__x86_64__)
extern const Target kAvx2Target;
extern const Target kAvx512Target;
extern const Target kAvx512Bf16Target;  // bf16 through the processor's bf16 dot products
#endif

// Every target that this processor can run, the best first.
struct Targets {
  const Target* list[4];
  int size;
};
Targets supported_targets();

}  // namespace parallax::cpu
