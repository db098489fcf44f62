// SPDX-License-Identifier: MIT
// The arithmetic of the decode's work: how a CTA holds its rows, what a block of keys is,
// how the blocks of all sequences are cut into spans. Pure functions, the same on host and device.
#pragma once

#include <algorithm>
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
// take other keys. A warpgroup is a team of all warps that multiplies a block of keys at once; an
// FP8 cache, whose elements are widened in registers, has none.
struct DecodeShape {
  int row_tiles;
  int team;
  bool is_warpgroup = false;
  PARALLAX_HOST_DEVICE constexpr int rows() const { return 8 * row_tiles * team; }
};

// Two row tiles a warp are as much as registers hold; with an FP8 cache, half as much.
PARALLAX_HOST_DEVICE constexpr int decode_row_tiles(int padded_head_dim, int cache_bytes) {
  return padded_head_dim <= 64 * cache_bytes ? 2 : 1;
}

// The Hopper kernels fill an SM's 228 KiB of shared memory; the portable ones fit in 99 KiB. There
// two warps at least share a ring of head_dim 256, for which four are too large.
PARALLAX_HOST_DEVICE constexpr int decode_stages(int padded_head_dim, bool portable) {
  return (padded_head_dim <= 64 ? 5 : 3) - (portable ? padded_head_dim <= 64 ? 2 : 1 : 0);
}
PARALLAX_HOST_DEVICE constexpr int decode_least_team(int padded_head_dim, bool portable) {
  return portable && padded_head_dim > 128 ? 2 : 1;
}

// CTAs that an SM's registers and, of a Hopper GPU, shared memory hold; and how much of the latter
// one may take. The hardware adds 1 KiB a CTA.
PARALLAX_HOST_DEVICE constexpr int decode_ctas_per_sm(int padded_head_dim, bool portable) {
  return portable || padded_head_dim <= 128 ? 2 : 1;
}
constexpr int decode_shared_bytes(int padded_head_dim, bool portable) {
  if (portable) return (padded_head_dim <= 64 ? 49 : 71) * 1024;
  return 228 * 1024 / decode_ctas_per_sm(padded_head_dim, portable) - 1024;
}
constexpr int decode_ctas_per_sm(int padded_head_dim, bool portable, int sm_shared_bytes) {
  const int fit = sm_shared_bytes / (decode_shared_bytes(padded_head_dim, portable) + 1024);
  return std::clamp(fit, 1, decode_ctas_per_sm(padded_head_dim, portable));
}

constexpr DecodeShape decode_shape(int padded_head_dim, int cache_bytes, std::int64_t rows,
                                   bool portable) {
  if (!portable && cache_bytes == 2 && rows > 8) return {1, kDecodeWarps, true};
  DecodeShape shape{rows > 8 ? decode_row_tiles(padded_head_dim, cache_bytes) : 1,
                    decode_least_team(padded_head_dim, portable)};
  while (shape.team < kDecodeWarps && shape.rows() < rows) shape.team *= 2;
  return shape;
}

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

// a / b of numbers that are not negative: a little less code than with signs.
PARALLAX_HOST_DEVICE inline int decode_divide(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}

// The work as a line of blocks: sequence by sequence, in a sequence unit by unit (`width` pairs of
// key/value head and pass over the rows, which run side by side), in a unit block by block of keys.
// What one unit has of the line is an item. The line is cut into spans of `length` blocks, the
// first `longer` of them of one more, the last of what is left; an item that goes on in the next
// span is split.
struct DecodeCut {
  int total;  // blocks
  int length;
  int longer;

  // Where a span begins (beyond the last: at the line's end), and which one holds a block.
  PARALLAX_HOST_DEVICE int begin(int span) const {
    const std::int64_t at = std::int64_t{span} * length + (span < longer ? span : longer);
    return at < total ? static_cast<int>(at) : total;
  }
  PARALLAX_HOST_DEVICE int span_of(int block) const {
    const int rest = block - longer * length - longer;  // length + 1 may be too large for an int
    return rest < 0 ? decode_divide(block, length + 1) : longer + decode_divide(rest, length);
  }
};

// How the line is cut into at most `max_spans` spans. Memory is the bound, so what counts is that
// all spans end together, not how many there are: where all items are as long, up to a quarter less
// are taken if each is then `whole` items; and of short ones no more than keep all as short.
struct DecodeSpans {
  int max_spans = 1;
  int whole = 0;  // 0: never

  // Each item has between `least` and `most` of the `total` blocks.
  PARALLAX_HOST_DEVICE DecodeCut cut(int total, int least, int most) const {
    constexpr int kShort = 8;
    if (whole > 0 && least == most) return {total, whole * least, 0};
    const int length = decode_divide(total, max_spans);
    const int longer = total - length * max_spans;
    if (length < kShort && longer > 0) return {total, length + 1, 0};
    return {total, length, longer};
  }
};

constexpr DecodeSpans decode_spans(std::int64_t items, int max_spans) {
  constexpr std::int64_t kMany = 64;  // of them a split one is not noticed
  std::int64_t whole = (items - 1) / max_spans + 1;
  for (; whole <= kMany && 4 * items >= 3 * max_spans * whole; ++whole) {
    if (items % whole == 0) return {max_spans, static_cast<int>(whole)};
  }
  return {max_spans, 0};
}

// Where a span begins; where it ends, the cut says.
struct alignas(16) DecodeSpan {
  int sequence;
  int unit;
  int block;     // of the unit's
  int kv_begin;  // of the sequence
  int kv_end;
  DecodeCut cut;
};

}  // namespace parallax
