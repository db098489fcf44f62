// SPDX-License-Identifier: MIT
// The arithmetic of the forward's work: which query tile a ticket stands for, which key tiles a
// query tile visits, and which of them need masking. Pure functions, the same on host and device.
#pragma once

#include <cstdint>

#include "parallax/mask.h"
#include "parallax/types.h"

namespace parallax {

PARALLAX_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A pair is one (sequence, query head).
struct TilePlace {
  int pair = 0;
  int q_tile = 0;
};

// Ticket -> place. Pairs come in sections of `section` whose keys and values fit the L2 cache
// together; inside a section the last query tiles of all pairs come first: under a causal mask they
// are the longest, and long work first leaves a short tail.
PARALLAX_HOST_DEVICE inline TilePlace place_tile(int ticket, int num_q_tiles, int num_pairs,
                                                 int section) {
  const int first_pair = ticket / (section * num_q_tiles) * section;
  const int rest = ticket - first_pair * num_q_tiles;
  const int pairs = num_pairs - first_pair < section ? num_pairs - first_pair : section;
  return {first_pair + rest % pairs, num_q_tiles - 1 - rest / pairs};
}

// Keys whose K and V rows together take a third of the L2 cache (measured: with twice as many a
// call takes up to 3 % longer).
constexpr int section_keys(int head_dim) { return (16 << 20) / (4 * head_dim); }

// How many pairs to work on at once: query heads of one group share their keys.
PARALLAX_HOST_DEVICE inline int section_pairs(int section_keys, int kv_len, int group,
                                              int num_pairs) {
  const int kv_heads = section_keys / (kv_len > 0 ? kv_len : 1);
  const int pairs = (kv_heads > 0 ? kv_heads : 1) * group;
  return pairs < num_pairs ? pairs : num_pairs;
}

// A Mask in the form that rows ask it in, a few 32-bit operations each. Lengths and the window stay
// below 2^30.
struct RowMask {
  int kv_begin = 0;
  int kv_end = 0;
  int shift = 0;   // query i sees keys below shift + i; full masks: never less than kv_end
  int window = 0;  // and none more than this many below that
  PARALLAX_HOST_DEVICE Range keys(int query) const {
    const int reach = shift + query;
    const int end = reach < kv_end ? reach : kv_end;
    const int begin = reach - window;
    return {begin > kv_begin ? begin : kv_begin, end};
  }
};

PARALLAX_HOST_DEVICE inline RowMask row_mask(const Mask& mask) {
  RowMask rows;
  rows.kv_begin = mask.kv_begin;
  rows.kv_end = mask.kv_end;
  rows.shift = mask.causal ? mask.kv_end - mask.q_len + 1 : mask.kv_end;
  rows.window = mask.window > 0 ? static_cast<int>(mask.window) : 1 << 30;
  return rows;
}

// Key tiles [first, first + count) of `keys_per_tile` keys, counted from the sequence's key 0, that
// hold every key some query of a non-empty range sees.
struct KeyTiles {
  int first = 0;
  int count = 0;
};

PARALLAX_HOST_DEVICE inline KeyTiles key_tiles(const RowMask& mask, Range queries,
                                               int keys_per_tile) {
  const int begin = mask.keys(queries.begin).begin;
  const int end = mask.keys(queries.end - 1).end;
  if (end <= begin) return {};
  const int first = begin / keys_per_tile;
  return {first, ceil_div(end, keys_per_tile) - first};
}

// In tiles that are not interior, a row's centre follows its keys until it has met so many.
constexpr int kSettledKeys = 32;

// Key tiles [begin, end) that need no care for `queries`: each query sees all of the tile and has
// met a key in the tile above (tiles are visited from the last to the first), so that its maximum
// and centre are set; and the last query has met enough of them to be no accident of a ragged end.
PARALLAX_HOST_DEVICE inline Range interior_tiles(const RowMask& mask, Range queries,
                                                 int keys_per_tile) {
  const int lowest_end = mask.keys(queries.begin).end;
  const Range last = mask.keys(queries.end - 1);
  if (lowest_end <= 0 || last.end < kSettledKeys) return {};
  const int met = ceil_div(lowest_end, keys_per_tile) - 1;
  const int settled = (last.end - kSettledKeys) / keys_per_tile;
  return {ceil_div(last.begin, keys_per_tile), met < settled ? met : settled};
}

// Of the `width` columns 8 i + 2 quad_lane + e (e = 0, 1) that a thread holds of a key tile, in
// this order, how many lie below `column`.
PARALLAX_HOST_DEVICE inline int columns_below(int column, int quad_lane, int width) {
  const int x = column - 2 * quad_lane;
  if (x <= 0) return 0;
  const int count = 2 * (x >> 3) + ((x & 7) < 2 ? (x & 7) : 2);
  return count < width ? count : width;
}

// Bit n is set where the thread's n-th column lies in [begin, end). Word has `width` bits or more.
template <class Word>
PARALLAX_HOST_DEVICE inline Word visible_columns(int begin, int end, int quad_lane, int width) {
  constexpr int kBits = 8 * sizeof(Word);
  const int low = columns_below(begin, quad_lane, width);
  const int high = columns_below(end, quad_lane, width);
  const Word below_high = high < kBits ? (Word{1} << high) - 1 : ~Word{0};
  const Word below_low = low < kBits ? (Word{1} << low) - 1 : ~Word{0};
  return below_high & ~below_low;
}

}  // namespace parallax
