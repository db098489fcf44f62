// SPDX-License-Identifier: MIT
// The register-blocked product that every matrix product of the blocked kernels is made of.
//
//   acc[i][n] += sum_k a(i, k) b(k, n)      i < kMr rows, n < kNv vectors
//
// Operands are made of 32-bit words: one float, or two bf16 that are neighbours along k where the
// processor has their dot product (which then does twice the work of a fused multiply-add). Each
// word of A is broadcast against kNv vectors of a row of B. A is read as a[i * kARow + k * kAStep]
// (so transposed operands cost nothing), B as b[k * kBStep + lane]; the steps are compile-time
// constants, so that one pointer each serves all rows. With AVX-512, 12 x 2 accumulators, two
// vectors of B and one broadcast fill 27 of 32 registers, and 14 loads feed 24 fused multiply-adds;
// AVX2 and the 4-lane vectors have 16 registers and take 6 x 2.
#pragma once

#include "cpu/simd.h"

namespace parallax::cpu::PARALLAX_TARGET {

#if defined(__AVX512F__)
constexpr int kMr = 12;
#else
constexpr int kMr = 6;
#endif
// Rows of one query panel (kLanes of q or p, kLanes of r or w) that kMr does not divide.
constexpr int kPanel = 2 * kLanes;
constexpr int kMrTail = kPanel % kMr;

// What a word is. kFold: elements of a word, and so steps of k that one word takes.
struct FloatWords {
  static constexpr int kFold = 1;
  PARALLAX_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  // kFold consecutive steps of k, lane by lane, as words.
  PARALLAX_INLINE Vec pack(const Vec (&x)[kFold]) { return x[0]; }
  // kLanes consecutive steps of k as kLanes / kFold words.
  PARALLAX_INLINE void store_steps(float* to, Vec x) { store(to, x); }
  // x as a word holds it.
  PARALLAX_INLINE Vec round(Vec x) { return x; }
  PARALLAX_INLINE Vec negate(Vec words) { return zero() - words; }
};

#if defined(__AVX512BF16__)
struct BFloat16Words {
  static constexpr int kFold = 2;
  PARALLAX_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  PARALLAX_INLINE Vec pack(const Vec (&x)[kFold]) {
    const IntVec halves = reinterpret_cast<IntVec>(_mm512_cvtne2ps_pbh(x[1], x[0]));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(alternating(16), halves));
  }
  // Elements a0 b0 a1 b1 ... of the lower and the upper halves.
  PARALLAX_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
    const IntVec x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    const IntVec order = alternating(32);
    const IntVec upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    *low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, order, y));
    *high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, upper, y));
  }
  PARALLAX_INLINE void store_steps(float* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  PARALLAX_INLINE Vec round(Vec x) {
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  PARALLAX_INLINE Vec negate(Vec words) {
    const IntVec signs = _mm512_set1_epi16(static_cast<short>(0x8000));
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(words), signs));
  }

 private:
  // The order 0 n 1 n+1 ... of 16-bit elements.
  PARALLAX_INLINE IntVec alternating(int n) {
    const IntVec i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(n)), 16));
  }
};
#endif

template <int kRows, int kNv>
PARALLAX_INLINE void clear(Vec (&acc)[kRows][kNv]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) acc[i][n] = zero();
  }
}

template <class Words, int kARow, int kAStep, int kBStep, int kRows, int kNv>
PARALLAX_INLINE void multiply(Vec (&acc)[kRows][kNv], const float* a, const float* b, int depth) {
  for (int k = 0; k < depth; ++k) {
    Vec row[kNv];
#pragma GCC unroll 2
    for (int n = 0; n < kNv; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(a[i * kARow]);
#pragma GCC unroll 2
      for (int n = 0; n < kNv; ++n) acc[i][n] = Words::multiply_add(x, row[n], acc[i][n]);
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
