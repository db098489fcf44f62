// SPDX-License-Identifier: MIT
// The vector operations that the blocked kernels are written in, once for each instruction set.
//
// A file target_<name>.cc is compiled with the flags of one instruction set, defines
// PARALLAX_TARGET as the namespace of its kernels and includes this header: AVX-512 (16 lanes),
// AVX2 + FMA + F16C (8 lanes), or the compiler's own 4-lane vectors for every other processor.
// Everything here has internal linkage and nothing here instantiates a template of the standard
// library, so that no code of a newer instruction set can be linked into an older one's path.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define PARALLAX_INLINE [[gnu::always_inline]] static inline

namespace parallax::cpu::PARALLAX_TARGET {

#if defined(__AVX512F__)

using Vec = __m512;
using IntVec = __m512i;
using Mask = __mmask16;
constexpr int kLanes = 16;

PARALLAX_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PARALLAX_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
PARALLAX_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
PARALLAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Both return b where either is NaN.
PARALLAX_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PARALLAX_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
PARALLAX_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
PARALLAX_INLINE bool all(Mask m) { return m == 0xffff; }
PARALLAX_INLINE IntVec load_int(const std::int32_t* p) { return _mm512_loadu_si512(p); }
// lo <= x < hi
PARALLAX_INLINE Mask within(IntVec lo, IntVec hi, std::int32_t x) {
  const IntVec v = _mm512_set1_epi32(x);
  return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(lo, v), v, hi);
}
// significand * 2^n, where `biased` holds n in its lowest bits.
PARALLAX_INLINE Vec add_exponent(Vec significand, Vec biased) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(significand),
                                              _mm512_slli_epi32(_mm512_castps_si512(biased), 23)));
}
// a0 b0 a1 b1 ... of the lower and the upper halves.
PARALLAX_INLINE void interleave(Vec a, Vec b, Vec* lo, Vec* hi) {
  const IntVec low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const IntVec high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  *lo = _mm512_permutex2var_ps(a, low, b);
  *hi = _mm512_permutex2var_ps(a, high, b);
}
PARALLAX_INLINE Vec load_bf16(const std::uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// Elements 0, 2, 4 ... and 1, 3, 5 ... of 2 * kLanes: cheaper than in order.
PARALLAX_INLINE void load_bf16_pairs(const std::uint16_t* p, Vec* even, Vec* odd) {
  const IntVec bits = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
}
PARALLAX_INLINE void store_bf16(std::uint16_t* p, Vec x) {
  const IntVec bits = _mm512_castps_si512(x);
  const IntVec odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  IntVec rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
PARALLAX_INLINE Vec load_fp16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PARALLAX_INLINE void store_fp16(std::uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The 16-bit float of e4m3's fields is 2^-8 of its value (biases 15 and 7); 0x7f is its NaN.
PARALLAX_INLINE Vec load_fp8(const std::uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i signs = _mm256_and_si256(_mm256_slli_epi16(bytes, 8), _mm256_set1_epi16(-0x8000));
  const __m256i rest = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(signs, nan), _mm256_slli_epi16(rest, 7));
  return _mm512_cvtph_ps(half) * broadcast(256.0f);
}

#elif defined(__AVX2__)

using Vec = __m256;
using IntVec = __m256i;
using Mask = __m256;
constexpr int kLanes = 8;

PARALLAX_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PARALLAX_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
PARALLAX_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
PARALLAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PARALLAX_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PARALLAX_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
PARALLAX_INLINE Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
PARALLAX_INLINE bool all(Mask m) { return _mm256_movemask_ps(m) == 0xff; }
PARALLAX_INLINE IntVec load_int(const std::int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
PARALLAX_INLINE Mask within(IntVec lo, IntVec hi, std::int32_t x) {
  const IntVec v = _mm256_set1_epi32(x);
  return _mm256_castsi256_ps(
      _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, v), _mm256_cmpgt_epi32(hi, v)));
}
PARALLAX_INLINE Vec add_exponent(Vec significand, Vec biased) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(significand),
                                              _mm256_slli_epi32(_mm256_castps_si256(biased), 23)));
}
PARALLAX_INLINE void interleave(Vec a, Vec b, Vec* lo, Vec* hi) {
  const Vec even = _mm256_unpacklo_ps(a, b);
  const Vec odd = _mm256_unpackhi_ps(a, b);
  *lo = _mm256_permute2f128_ps(even, odd, 0x20);
  *hi = _mm256_permute2f128_ps(even, odd, 0x31);
}
PARALLAX_INLINE Vec load_bf16(const std::uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PARALLAX_INLINE void load_bf16_pairs(const std::uint16_t* p, Vec* even, Vec* odd) {
  const IntVec bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)));
}
PARALLAX_INLINE void store_bf16(std::uint16_t* p, Vec x) {
  const IntVec bits = _mm256_castps_si256(x);
  const IntVec odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const IntVec rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const IntVec quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const IntVec nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const IntVec upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
PARALLAX_INLINE Vec load_fp16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PARALLAX_INLINE void store_fp16(std::uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PARALLAX_INLINE Vec load_fp8(const std::uint8_t* p) {
  const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i signs = _mm_and_si128(_mm_slli_epi16(bytes, 8), _mm_set1_epi16(-0x8000));
  const __m128i rest = _mm_and_si128(bytes, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f));
  const __m128i half = _mm_or_si128(_mm_or_si128(signs, nan), _mm_slli_epi16(rest, 7));
  return _mm256_cvtph_ps(half) * broadcast(256.0f);
}

#else

using Vec = float __attribute__((vector_size(16)));
using IntVec = std::int32_t __attribute__((vector_size(16)));
using Mask = IntVec;
constexpr int kLanes = 4;

PARALLAX_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PARALLAX_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
PARALLAX_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
PARALLAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PARALLAX_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((m & reinterpret_cast<IntVec>(yes)) |
                               (~m & reinterpret_cast<IntVec>(no)));
}
PARALLAX_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
PARALLAX_INLINE Mask equal(Vec a, Vec b) { return a == b; }
PARALLAX_INLINE bool all(Mask m) { return (m[0] & m[1] & m[2] & m[3]) != 0; }
PARALLAX_INLINE IntVec load_int(const std::int32_t* p) {
  IntVec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PARALLAX_INLINE Mask within(IntVec lo, IntVec hi, std::int32_t x) {
  const IntVec v = {x, x, x, x};
  return (lo <= v) & (v < hi);
}
PARALLAX_INLINE Vec add_exponent(Vec significand, Vec biased) {
  using Bits = std::uint32_t __attribute__((vector_size(16)));  // wraps around, unlike IntVec
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(significand) +
                               (reinterpret_cast<Bits>(biased) << 23));
}
PARALLAX_INLINE void interleave(Vec a, Vec b, Vec* lo, Vec* hi) {
  *lo = Vec{a[0], b[0], a[1], b[1]};
  *hi = Vec{a[2], b[2], a[3], b[3]};
}
PARALLAX_INLINE float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
PARALLAX_INLINE std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
PARALLAX_INLINE Vec load_bf16(const std::uint16_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = from_bits(std::uint32_t{p[i]} << 16);
  return x;
}
PARALLAX_INLINE void load_bf16_pairs(const std::uint16_t* p, Vec* even, Vec* odd) {
  Vec a = {}, b = {};
  for (int i = 0; i < kLanes; ++i) {
    a[i] = from_bits(std::uint32_t{p[2 * i]} << 16);
    b[i] = from_bits(std::uint32_t{p[2 * i + 1]} << 16);
  }
  *even = a;
  *odd = b;
}
PARALLAX_INLINE void store_bf16(std::uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t bits = to_bits(x[i]);
    const bool nan = x[i] != x[i];
    const std::uint32_t rounded = nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
    p[i] = static_cast<std::uint16_t>(rounded >> 16);
  }
}
// IEEE binary16 through float arithmetic: scaling by 2^112 moves the exponent and normalises
// subnormals; scaling back rounds to nearest even at the narrower significand.
PARALLAX_INLINE Vec load_fp16(const std::uint16_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t sign = (p[i] & 0x8000u) << 16;
    const std::uint32_t rest = p[i] & 0x7fffu;
    const float magnitude = rest >= 0x7c00 ? from_bits(0x7f800000 | rest << 13)
                                           : from_bits(rest << 13) * from_bits(0x77800000);
    x[i] = from_bits(to_bits(magnitude) | sign);
  }
  return x;
}
PARALLAX_INLINE void store_fp16(std::uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t bits = to_bits(x[i]);
    const std::uint32_t magnitude = bits & 0x7fffffff;
    std::uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {
      half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    }
    p[i] = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000));
  }
}
// e4m3: the exponent's bias is 7, subnormals are multiples of 2^-9, 0x7f is the NaN.
PARALLAX_INLINE Vec load_fp8(const std::uint8_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t sign = (p[i] & 0x80u) << 24;
    const std::uint32_t rest = p[i] & 0x7fu;
    const float magnitude = rest == 0x7f  ? from_bits(0x7fc00000)
                            : rest < 0x08 ? static_cast<float>(rest) * 0x1p-9f
                                          : from_bits((rest << 20) + 0x3c000000);
    x[i] = from_bits(to_bits(magnitude) | sign);
  }
  return x;
}

#endif

PARALLAX_INLINE Vec zero() { return broadcast(0.0f); }

// Keeps a loaded vector in a register; GCC would rather load it again for each use.
PARALLAX_INLINE void hold(Vec* x) {
#if defined(__AVX512F__)
  asm("" : "+v"(*x));
#elif defined(__AVX2__)
  asm("" : "+x"(*x));
#else
  (void)x;
#endif
}

// 2^x for x < 127, relative error below 8e-8; 2^0 = 1 and 2^x = 0 for x <= -127, exactly. NaN
// stays. x = n + f with |f| <= 1/2; the polynomial is the minimax fit of 2^f with p(0) = 1.
PARALLAX_INLINE Vec exp2(Vec x) {
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits hold n
  x = max(broadcast(-127.0f), x);
  const Vec biased = x + round;
  const Vec f = x - (biased - round);
  Vec p = broadcast(0x1.41fbbcp-13f);
  p = fma(p, f, broadcast(0x1.5f3e52p-10f));
  p = fma(p, f, broadcast(0x1.3b2d4cp-7f));
  p = fma(p, f, broadcast(0x1.c6aee8p-5f));
  p = fma(p, f, broadcast(0x1.ebfbdcp-3f));
  p = fma(p, f, broadcast(0x1.62e430p-1f));
  p = fma(p, f, broadcast(1.0f));
  return add_exponent(p, biased);
}

// rows[i] is row i of a square of kLanes x kLanes; afterwards column i.
PARALLAX_INLINE void transpose(Vec (&rows)[kLanes]) {
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
