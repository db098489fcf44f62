// SPDX-License-Identifier: MIT
// The register-blocked product that every matrix product of the blocked kernels is made of.
//
//   acc[i][n] += sum_k a(i, k) b(k, n)      i < kMr rows, n < kNv vectors
//
// Each element of A is broadcast against kNv vectors of a row of B. A is read as
// a[i * kARow + k * kAStep] (so transposed operands cost nothing), B as b[k * kBStep + lane]; the
// steps are compile-time constants, so that one pointer each serves all rows. With AVX-512, 12 x 2
// accumulators, two vectors of B and one broadcast fill 27 of 32 registers, and 14 loads feed 24
// fused multiply-adds; AVX2 and the 4-lane vectors have 16 registers and take 6 x 2.
#pragma once

#include "cpu/simd.h"

namespace parallax::cpu::PARALLAX_TARGET {

#if defined(__AVX512F__)
constexpr int kMr = 12;
#else
constexpr int kMr = 6;
#endif
// Rows of one query panel (kLanes of q or p, kLanes of r or p t) that kMr does not divide.
constexpr int kPanel = 2 * kLanes;
constexpr int kMrTail = kPanel % kMr;

template <int kRows, int kNv>
PARALLAX_INLINE void clear(Vec (&acc)[kRows][kNv]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) acc[i][n] = zero();
  }
}

template <int kARow, int kAStep, int kBStep, int kRows, int kNv>
PARALLAX_INLINE void multiply(Vec (&acc)[kRows][kNv], const float* a, const float* b, int depth) {
  for (int k = 0; k < depth; ++k) {
    Vec row[kNv];
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(a[i * kARow]);
#pragma GCC unroll 2
      for (int n = 0; n < kNv; ++n) acc[i][n] = fma(x, row[n], acc[i][n]);
    }
    a += kAStep;
    b += kBStep;
  }
}

template <int kRows, int kNv>
PARALLAX_INLINE void load_block(Vec (&acc)[kRows][kNv], const float* c, int c_row) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) acc[i][n] = load(c + i * c_row + n * kLanes);
  }
}

template <int kRows, int kNv>
PARALLAX_INLINE void store_block(const Vec (&acc)[kRows][kNv], float* c, int c_row) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) store(c + i * c_row + n * kLanes, acc[i][n]);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
