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

// The keys and values [begin, end) of one sequence, for a few neighbouring key/value heads and all
// their query rows. Row f of a key/value head is (query f / group, head f % group of its group).
struct DecodeBlock {
  DType dtype = DType::kFloat32;     // of q and r
  DType kv_dtype = DType::kFloat32;  // of k and v: dtype or kFloat8E4M3
  int head_dim = 0;
  float scale = 1.0f;
  int num_kv_heads = 0;
  int group = 1;
  int q_len = 0;
  const std::int32_t *lo = nullptr, *hi = nullptr;  // [q_len]: keys that each query sees
  std::int32_t begin = 0, end = 0;                  // all seen by some query
  const char *q = nullptr, *r = nullptr;            // query 0 of the first head
  std::int64_t q_row_bytes = 0, q_head_bytes = 0, r_row_bytes = 0, r_head_bytes = 0;
  TokenRows k, v;  // of the first key/value head
  std::int64_t k_head_bytes = 0, v_head_bytes = 0;
  const float *k_scale = nullptr, *v_scale = nullptr;  // of the key/value heads; FP8 only
  // The state of row num_kv_head * (q_len * group) + f: m in natural units, d2 and o2 centred at c;
  // o1 and o2 at o + row * 2 * decode_stride(head_dim) and one stride behind it.
  float *m = nullptr, *d1 = nullptr, *d2 = nullptr, *c = nullptr, *o = nullptr;
};

// Tokens whose scores the decode kernel holds at once.
constexpr int kDecodeTokens = 32;
constexpr int kDecodeScoreRow = 2 * kDecodeTokens + 16;

// Elements between the float rows of a decode: pairs of vectors on every target.
constexpr int decode_stride(std::int64_t head_dim) {
  return (static_cast<int>(head_dim) + 31) / 32 * 32;
}

// Floats of scratch for one block of so many query rows: their q, r and scores, and a tile.
constexpr std::size_t decode_scratch(std::int64_t head_dim, std::int64_t rows) {
  return static_cast<std::size_t>(rows) * (2 * decode_stride(head_dim) + kDecodeScoreRow) +
         std::size_t{kDecodeTokens} * decode_stride(head_dim);
}

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
  void (*decode)(const DecodeBlock& block, float* scratch);
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
