// SPDX-License-Identifier: MIT
// What the backward kernels share: the tile in shared memory, gradients out of registers.
#pragma once

#include "cuda/backward.h"
#include "cuda/place.cuh"
#include "cuda/ptx.cuh"
#include "cuda/quad.cuh"
#include "cuda/wgmma.cuh"

namespace parallax {

// 64 rows of 64 columns, as one tensor copy leaves them: the unit of everything in shared memory.
constexpr int kPanelBytes = kBackwardRows * 128;

__device__ __forceinline__ bool contains(const Range& range, int n) {
  return n >= range.begin && n < range.end;
}

__device__ __forceinline__ Range uniform(const Range& range) {
  return {ptx::uniform(range.begin), ptx::uniform(range.end)};
}

// The tiles of `tile` rows that hold a row of the range.
__device__ __forceinline__ Range tiles_over(const Range& rows, int tile = kBackwardRows) {
  if (rows.empty()) return {};
  return {rows.begin / tile, (rows.end + tile - 1) / tile};
}

// The tiles of `tile` rows that both ranges hold whole.
__device__ __forceinline__ Range tiles_within(const Range& a, const Range& b,
                                              int tile = kBackwardRows) {
  return {(max(a.begin, b.begin) + tile - 1) / tile, min(a.end, b.end) / tile};
}

// Descriptor offsets (units of 16 bytes) of step `kk` of 16 columns in panels `stride` bytes apart.
__device__ __forceinline__ constexpr std::uint32_t column_step(int kk, int stride) {
  return static_cast<std::uint32_t>((kk >> 2) * stride + (kk & 3) * 32) >> 4;
}
// The same of 16 rows, read transposed.
constexpr std::uint32_t kRowStep = 2048 >> 4;

// Writes `factor` times a 64 x kHeadDim accumulator, of which a thread holds rows 0 and 8 from
// `row` on: four lanes turn their words into 16 bytes each.
template <class T, int kCount>
__device__ __forceinline__ void store_gradient(const float (&sums)[kCount], float factor, T* row,
                                               std::int64_t row_stride, int rows_left,
                                               int head_dim) {
  const int quad_lane = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < kCount / 16; ++block) {
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 4 * (4 * block + i) + 2 * half;
        words[i] = ptx::pack<T>(sums[n] * factor, sums[n + 1] * factor);
      }
      const uint4 whole = transpose_quad(words);
      const int column = 8 * (4 * block + quad_lane);
      if (8 * half < rows_left && column < head_dim) {
        *reinterpret_cast<uint4*>(row + 8 * half * row_stride + column) = whole;
      }
    }
  }
}

}  // namespace parallax
