// SPDX-License-Identifier: MIT
// The arithmetic of the Hopper decode's work: how a CTA holds its rows, what a block of keys is,
// how the blocks of all sequences are cut into spans. Pure functions, the same on host and device.
#pragma once

#include <cstdint>

#include "cuda/schedule.h"
#include "parallax/mask.h"

namespace parallax {

constexpr int kDecodeWarps = 4;  // of a CTA

// Keys that a warp loads at a time, as many bytes in every cache dtype; and what the schedule
// counts, a slice for each warp.
PARALLAX_HOST_DEVICE constexpr int decode_slice_keys(int cache_bytes) { return 32 / cache_bytes; }
PARALLAX_HOST_DEVICE constexpr int decode_block_keys(int cache_bytes) {
  return kDecodeWarps * decode_slice_keys(cache_bytes);
}

// How a CTA holds its rows, (query token, head of the group) pairs, token by token: a warp has
// `row_tiles` tiles of 8, and `team` warps with rows of their own share every key. The other warps
// take other keys.
struct DecodeShape {
  int row_tiles;
  int team;
  PARALLAX_HOST_DEVICE constexpr int rows() const { return 8 * row_tiles * team; }
};

// Two row tiles a warp are as much as registers hold; with an FP8 cache, half as much.
PARALLAX_HOST_DEVICE constexpr int decode_row_tiles(int padded_head_dim, int cache_bytes) {
  return padded_head_dim <= 64 * cache_bytes ? 2 : 1;
}

constexpr DecodeShape decode_shape(int padded_head_dim, int cache_bytes, std::int64_t rows) {
  DecodeShape shape{rows > 8 ? decode_row_tiles(padded_head_dim, cache_bytes) : 1, 1};
  while (shape.team < kDecodeWarps && shape.rows() < rows) shape.team *= 2;
  return shape;
}

PARALLAX_HOST_DEVICE constexpr int decode_stages(int padded_head_dim) {
  return padded_head_dim <= 64 ? 5 : 3;
}
PARALLAX_HOST_DEVICE constexpr int decode_ctas_per_sm(int padded_head_dim) {
  return padded_head_dim <= 128 ? 2 : 1;
}

// The work as a line of blocks: sequence by sequence, in a sequence unit by unit (`width` pairs of
// key/value head and pass over the rows, which run side by side), in a unit block by block of keys.
// A span is a piece of the line, as long as every other to a block; a CTA takes one of it for one
// of the `width` pairs. What it finds of one unit is an item; an item that goes on in the next span
// is split.
struct alignas(16) DecodeSpan {
  int sequence;  // of the first block, and so on
  int unit;
  int block;
  int num_blocks;  // 0: this span and all after it are empty
  int kv_begin;    // of the first sequence
  int kv_end;
  // Twice the span where the first item begins, plus 1 if it is not the first item there.
  int first_slot;
  int last_span;  // where the last item ends
};

// The blocks of a sequence's keys, counted from key 0: at least one, so that a sequence without
// visible keys is an item too.
struct DecodeBlocks {
  Range keys;  // that some query sees
  int first;
  int count;
};

PARALLAX_HOST_DEVICE inline DecodeBlocks decode_blocks(const RowMask& mask, int q_len,
                                                       int block_keys) {
  const Range keys{mask.keys(0).begin, mask.keys(q_len - 1).end};
  if (keys.empty()) return {{0, 0}, 0, 1};
  const int first = keys.begin / block_keys;
  return {keys, first, ceil_div(keys.end, block_keys) - first};
}

// a / b of numbers that are not negative, in 32 bits where they fit: a tenth of the time.
PARALLAX_HOST_DEVICE inline std::int64_t decode_divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

// Of a line of `total` blocks in `spans` spans, none empty: where span `span` begins, and which one
// holds block x.
PARALLAX_HOST_DEVICE inline std::int64_t decode_span_begin(std::int64_t total, int spans,
                                                           int span) {
  return decode_divide(total * span, spans);
}
PARALLAX_HOST_DEVICE inline int decode_span_of(std::int64_t total, int spans, std::int64_t x) {
  return static_cast<int>(decode_divide((x + 1) * spans - 1, total));
}

}  // namespace parallax
