// SPDX-License-Identifier: MIT
// What the halves of the decode share: a row's state, the item at hand, shared memory.
#pragma once

#include <type_traits>

#include "cuda/decode.h"
#include "cuda/element.h"
#include "cuda/ptx.cuh"

namespace parallax {

// m of a row that has met no key: finite, so that differences of two are no NaN.
constexpr float kNoMaximum = -1e30f;

// The scalars of a row's state: m in units of log2, d2 (and o2) centred at c.
struct DecodeRow {
  float m = kNoMaximum;
  float d1 = 0;
  float d2 = 0;
  float c = 0;

  // What brings the sums of a part of the row to this m. REQUIRES: this m is not below the part's.
  __device__ __forceinline__ float factor(const DecodeRow& part) const {
    return part.d1 != 0 ? ptx::exp2(part.m - m) : 0.0f;
  }
  __device__ __forceinline__ void add(const DecodeRow& part) {
    const float f = factor(part);
    d1 += f * part.d1;
    d2 += f * (part.d2 + (part.c - c) * part.d1);
  }
};

// A row's state, of its vectors four columns.
struct DecodeSums {
  DecodeRow row;
  float4 o1 = {0, 0, 0, 0};
  float4 o2 = {0, 0, 0, 0};
};

static __device__ __forceinline__ float4 operator*(float a, float4 x) {
  return {a * x.x, a * x.y, a * x.z, a * x.w};
}
static __device__ __forceinline__ float4 operator+(float4 x, float4 y) {
  return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

static __device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

static __device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

static __device__ __forceinline__ float warp_sum(float x) {
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

static __device__ __forceinline__ float warp_max(float x) {
  for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// A span's part of one unit, for this CTA's pair of key/value head and pass. It lies in shared
// memory: registers are scarce.
struct DecodeItem {
  int sequence;
  int kv_head;
  int first_row;  // of the pass, among group * q_len
  int rows;
  RowMask mask;
  Range keys;      // loaded; beyond them are zeros
  Range interior;  // seen by every row
  int first_key;   // of the part
  int num_blocks;
  Range line;     // all of the item in the line of blocks
  bool is_whole;  // else the part goes to `slot`; of all parts the first lies in `first_slot`,
  int slot;       // and the others, each the first item of its span, in every second from there
  int first_slot;
  int num_parts;
};

// Where in its span a CTA is: the next item's place.
struct DecodeWalk {
  DecodeSpan place;
  RowMask mask;  // of the place's sequence
  int at;        // the place in the line of blocks
  int left;      // blocks of the span from here on
};

// Row `index` of a call's group * q_len, token by token.
struct DecodePlace {
  int token;
  int of_group;
};

static __device__ __forceinline__ DecodePlace place_of(const DecodeParams& params, int index) {
  const int token = params.group == params.rows ? 0 : index / params.group;
  return {token, index - token * params.group};
}

// Stands for a warp's number of row tiles where all warps multiply as a warpgroup, a tile each.
constexpr int kDecodeWarpgroup = 0;

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
struct DecodeShared {
  static constexpr bool kIsFp8 = std::is_same_v<Cache, e4m3>;
  static constexpr bool kIsWarpgroup = kRowTiles == kDecodeWarpgroup;
  static constexpr int kTiles = kIsWarpgroup ? 1 : kRowTiles;
  static constexpr int kLeastTeam =
      kIsWarpgroup ? kDecodeWarps : decode_least_team(kHeadDim, kPortable);
  static constexpr int kSliceKeys =
      (kIsWarpgroup ? kDecodeWarps : 1) * decode_slice_keys(sizeof(Cache));
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Cache));
  static constexpr int kSliceBytes = kSliceKeys * kRowBytes;
  static constexpr int kStages = decode_stages(kHeadDim, kPortable);
  static constexpr int kWarpRows = 8 * kTiles;
  static constexpr int kPackedBytes = kIsWarpgroup ? 2 * kDecodeWarps * kWarpRows * kRowBytes : 16;

  // The warps' states, when they meet at the end of an item: all at one m and one centre a row.
  // Rows are padded so that what a warp writes at a time lies in different banks.
  static constexpr int kPadded = kHeadDim + (kIsFp8 ? 16 : 8);
  struct Meeting {
    float o1[kDecodeWarps][kWarpRows][kPadded];
    float o2[kDecodeWarps][kWarpRows][kPadded];
    DecodeRow parts[kDecodeWarps][kWarpRows];
    DecodeRow totals[kDecodeWarps * kWarpRows];  // by row of the CTA
  };
  union {
    std::uint8_t ring[kDecodeWarps / kLeastTeam][kStages][2 * kSliceBytes];  // K rows, V rows
    Meeting meeting;
  };
  // A warpgroup's q and r, for each warp 8 rows of q and 8 of r, in panels as K and V.
  alignas(kIsWarpgroup ? 1024 : 16) std::uint8_t rows[kPackedBytes];
  DecodeWalk walk;
  DecodeItem item;
  Range seen[kDecodeWarps][kWarpRows];  // by a warp's rows
  int is_last;
};

}  // namespace parallax
