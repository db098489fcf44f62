// SPDX-License-Identifier: MIT
// Four neighbouring lanes share a row of a tensor core's sums, two columns of every eight each:
// what they do together.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace parallax {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Four 8-column blocks of a row spread over a quad, two columns a lane: afterwards each lane holds
// the 16 bytes of one block.
__device__ __forceinline__ uint4 transpose_quad(std::uint32_t (&r)[4]) {
  const int quad_lane = ptx::thread_index() & 3;
  const bool odd = quad_lane & 1;
  std::uint32_t x0 = odd ? r[0] : r[1];
  std::uint32_t x1 = odd ? r[2] : r[3];
  x0 = __shfl_xor_sync(0xffffffffu, x0, 1);
  x1 = __shfl_xor_sync(0xffffffffu, x1, 1);
  r[0] = odd ? x0 : r[0];
  r[2] = odd ? x1 : r[2];
  r[1] = odd ? r[1] : x0;
  r[3] = odd ? r[3] : x1;
  const bool high = quad_lane & 2;
  std::uint32_t y0 = high ? r[0] : r[2];
  std::uint32_t y1 = high ? r[1] : r[3];
  y0 = __shfl_xor_sync(0xffffffffu, y0, 2);
  y1 = __shfl_xor_sync(0xffffffffu, y1, 2);
  r[0] = high ? y0 : r[0];
  r[1] = high ? y1 : r[1];
  r[2] = high ? r[2] : y0;
  r[3] = high ? r[3] : y1;
  return make_uint4(r[0], r[1], r[2], r[3]);
}

}  // namespace parallax
