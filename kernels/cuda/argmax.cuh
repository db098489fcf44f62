// SPDX-License-Identifier: MIT
// Argmax words (parallax/step.h): a float in an order of whole numbers above the column's
// complement. The largest of many is found in any order, by atomics too, and is the same always.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace parallax {

__device__ __forceinline__ std::uint64_t argmax_word(float x, int column) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  if ((bits & 0x7f800000u) == 0x7f800000u) return 0;
  const std::uint32_t order = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<std::uint64_t>(order) << 32 | ~static_cast<std::uint32_t>(column);
}

// -1: none.
__device__ __forceinline__ int column_of(std::uint64_t word) {
  return word == 0 ? -1 : static_cast<int>(~static_cast<std::uint32_t>(word));
}

// The largest of the words of lanes whose numbers differ in bits from kFirstStep on.
template <int kFirstStep>
__device__ __forceinline__ std::uint64_t largest_of_lanes(std::uint64_t word) {
#pragma unroll
  for (int step = kFirstStep; step < 32; step *= 2) {
    const std::uint64_t other = __shfl_xor_sync(0xffffffffu, word, step);
    word = word > other ? word : other;
  }
  return word;
}

// `seen`: what *of was earlier. Most find nothing larger and need no atomic.
__device__ __forceinline__ void raise(std::uint64_t* of, std::uint64_t word, std::uint64_t seen) {
  if (word > seen) {
    atomicMax(reinterpret_cast<unsigned long long*>(of), static_cast<unsigned long long>(word));
  }
}

}  // namespace parallax
