// SPDX-License-Identifier: MIT
// What decode multiplies and adds: one query row against a few tokens (decode_block.h).
#pragma once

#include <math.h>

#include "cpu/forward_block.h"
#include "cpu/rows.h"

namespace parallax::cpu::PARALLAX_TARGET {

// Half the lanes: s and t of a step's tokens fill one vector.
constexpr int kStep = kLanes / 2;
constexpr int kTileSteps = kDecodeTokens / kStep;
// Elements that are loaded together: two vectors.
constexpr int kUnit = 2 * kLanes;

// What a row knows about a tile: s, then p, at [0, kDecodeTokens); t, then p (t - c), at kProbe;
// the factor that o1 and o2 shrink by before the tile is added, at kShrink.
constexpr int kProbe = kDecodeTokens;
constexpr int kShrink = 2 * kDecodeTokens;

// Elements [d, d + kUnit) of a row: in order, or, for bf16, the even ones and then the odd ones.
template <DType kType>
PARALLAX_INLINE void load_unit(const char* row, int d, Vec (&unit)[2]) {
  if constexpr (kType == DType::kBFloat16) {
    load_bf16_pairs(reinterpret_cast<const std::uint16_t*>(row) + d, &unit[0], &unit[1]);
  } else {
    unit[0] = load_elements<kType>(row, d);
    unit[1] = load_elements<kType>(row, d + kLanes);
  }
  hold(&unit[0]);
  hold(&unit[1]);
}

// Lane i of the result is the sum of the lanes of rows[i].
#if defined(__AVX512F__)
// Shuffles within 128 bits, which are the cheap ones, as far as they go.
PARALLAX_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    rows[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]) + _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const __m512d a = _mm512_castps_pd(rows[i]), b = _mm512_castps_pd(rows[i + 2]);
    rows[i] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  // Each 128 bits of rows[4 n] now hold a part of the sums 4 n to 4 n + 3.
  const auto halve = [](Vec a, Vec b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return halve(halve(rows[0], rows[4]), halve(rows[8], rows[12]));
}
#else
// Adds rows [kSize, 2 kSize) to the first kSize, lanes of the two interleaved.
template <int kSize>
PARALLAX_INLINE void fold(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSize; ++i) {
    Vec low, high;
    interleave(rows[i], rows[i + kSize], &low, &high);
    rows[i] = low + high;
  }
  if constexpr (kSize > 1) fold<kSize / 2>(rows);
}

PARALLAX_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
  fold<kLanes / 2>(rows);
  return rows[0];
}
#endif

PARALLAX_INLINE float first_lane(Vec x) {
  float lane;
  std::memcpy(&lane, &x, sizeof lane);
  return lane;
}

PARALLAX_INLINE float lane_sum(Vec x) {
  for (int n = kLanes; n > 1; n /= 2) {
    Vec low, high;
    interleave(x, x, &low, &high);
    x = low + high;
  }
  return first_lane(x);
}

PARALLAX_INLINE float largest_lane(Vec x) {
  for (int n = kLanes; n > 1; n /= 2) {
    Vec low, high;
    interleave(x, x, &low, &high);
    x = max(low, high);
  }
  return first_lane(x);
}

// Whether keys of a type meet queries as they are, two bf16 to a word, instead of as floats.
template <DType kType>
constexpr bool kDots =
#if defined(__AVX512BF16__)
    kType == DType::kBFloat16;
#else
    false;
#endif

// Rows that share the loads of keys and values.
constexpr int kMaxRows = 2;

// s and t of kRows rows and kStep / kRows tokens. A row's q and r lie one stride apart, rows two;
// factors: scale for the lanes of s, 1 for those of t. acc[(2 i + is_t) * kTokens + token].
template <DType kType, int kRows>
PARALLAX_INLINE void multiply_keys(const char* const* keys, const float* q, int stride,
                                   const float* factors, float* scores) {
  constexpr int kTokens = kStep / kRows;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = zero();
  for (int d = 0; d < stride; d += kUnit) {
    if constexpr (kDots<kType>) {
#if defined(__AVX512BF16__)
      Vec words[2 * kRows];
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kRows; ++i) words[i] = load(q + i * stride + d / 2);
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) {
        Vec key = load(reinterpret_cast<const float*>(keys[j]) + d / 2);
        hold(&key);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kRows; ++i) {
          Vec& sum = acc[i * kTokens + j];
          sum = BFloat16Words::multiply_add(words[i], key, sum);
        }
      }
#endif
    } else {
      Vec low[2 * kRows], high[2 * kRows];
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kRows; ++i) {
        low[i] = load(q + i * stride + d);
        high[i] = load(q + i * stride + d + kLanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) {
        Vec key[2];
        load_unit<kType>(keys[j], d, key);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kRows; ++i) {
          Vec& sum = acc[i * kTokens + j];
          sum = fma(high[i], key[1], fma(low[i], key[0], sum));
        }
      }
    }
  }
  alignas(64) float sums[kLanes];
  store(sums, sum_lanes(acc) * load(factors));
  for (int i = 0; i < 2 * kRows; ++i) {
    std::memcpy(scores + i / 2 * kDecodeScoreRow + i % 2 * kProbe, sums + i * kTokens,
                sizeof(float) * kTokens);
  }
}

// o1 and o2 of kRows rows, elements [d, d + kNv * kLanes): acc[i][n], i = 2 row + is_o2.
template <int kRows, int kNv>
PARALLAX_INLINE void load_sums(const float* o, int stride, Vec (&acc)[2 * kRows][kNv]) {
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kRows; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < kNv; ++n) acc[i][n] = load(o + i * stride + n * kLanes);
  }
}
template <int kRows, int kNv>
PARALLAX_INLINE void store_sums(const Vec (&acc)[2 * kRows][kNv], int stride, float* o) {
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kRows; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < kNv; ++n) store(o + i * stride + n * kLanes, acc[i][n]);
  }
}

// Adds the weighted values of a step to elements [d, d + kUnits * kUnit) of kRows rows' o1 and o2.
template <DType kType, int kRows, int kUnits>
PARALLAX_INLINE void add_values(const char* const (&values)[kStep], const float* scores, int d,
                                int stride, float* o) {
  Vec acc[2 * kRows][2 * kUnits];
  load_sums<kRows>(o + d, stride, acc);
#pragma GCC unroll 8
  for (int j = 0; j < kStep; ++j) {
    Vec weights[2 * kRows];  // p, w of each row
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kRows; ++i) {
      weights[i] = broadcast(scores[i / 2 * kDecodeScoreRow + i % 2 * kProbe + j]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kUnits; ++n) {
      Vec value[2];
      load_unit<kType>(values[j], d + n * kUnit, value);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kRows; ++i) {
        acc[i][2 * n] = fma(weights[i], value[0], acc[i][2 * n]);
        acc[i][2 * n + 1] = fma(weights[i], value[1], acc[i][2 * n + 1]);
      }
    }
  }
  store_sums<kRows>(acc, stride, o + d);
}

template <DType kType, int kRows>
PARALLAX_INLINE void multiply_values(const char* const (&values)[kStep], const float* scores,
                                     int stride, float* o) {
  // As many accumulators as registers allow.
  constexpr int kUnits = (kLanes == 16 ? 4 : 2) / kRows;
  int d = 0;
  for (; d + kUnits * kUnit <= stride; d += kUnits * kUnit) {
    add_values<kType, kRows, kUnits>(values, scores, d, stride, o);
  }
  if constexpr (kUnits > 1) {
    for (; d < stride; d += kUnit) add_values<kType, kRows, 1>(values, scores, d, stride, o);
  }
}

// The same with weights as words of two tokens, whose values are interleaved on the way.
#if defined(__AVX512BF16__)
template <int kRows, int kUnits>
PARALLAX_INLINE void add_pairs(const char* const (&values)[kStep], const float* scores, int d,
                               int stride, float* o) {
  Vec acc[2 * kRows][2 * kUnits];
  load_sums<kRows>(o + d, stride, acc);
#pragma GCC unroll 4
  for (int j = 0; j < kStep; j += 2) {
    Vec weights[2 * kRows];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kRows; ++i) {
      weights[i] = broadcast(scores[i / 2 * kDecodeScoreRow + i % 2 * kProbe + j / 2]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kUnits; ++n) {
      const int at = d / 2 + n * kLanes;
      Vec low, high;
      BFloat16Words::interleave(load(reinterpret_cast<const float*>(values[j]) + at),
                                load(reinterpret_cast<const float*>(values[j + 1]) + at), &low,
                                &high);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kRows; ++i) {
        acc[i][2 * n] = BFloat16Words::multiply_add(weights[i], low, acc[i][2 * n]);
        acc[i][2 * n + 1] = BFloat16Words::multiply_add(weights[i], high, acc[i][2 * n + 1]);
      }
    }
  }
  store_sums<kRows>(acc, stride, o + d);
}

template <int kRows>
PARALLAX_INLINE void multiply_pairs(const char* const (&values)[kStep], const float* scores,
                                    int stride, float* o) {
  constexpr int kUnits = 4 / kRows;
  int d = 0;
  for (; d + kUnits * kUnit <= stride; d += kUnits * kUnit) {
    add_pairs<kRows, kUnits>(values, scores, d, stride, o);
  }
  for (; d < stride; d += kUnit) add_pairs<kRows, 1>(values, scores, d, stride, o);
}
#endif

// The weights that values are multiplied by, as floats or as words of two bf16 (neighbouring
// tokens).
template <bool kAsWords>
PARALLAX_INLINE void store_weights(float* to, int j, Vec x) {
#if defined(__AVX512BF16__)
  if constexpr (kAsWords) return BFloat16Words::store_steps(to + j / 2, x);
#endif
  store(to + j, x);
}

// s and t of a tile become p and p (t - c), and the row's state moves on. `visible`: how many of
// the tile's tokens the row sees (at least one), the others have s = -inf and t = 0; `first`: it
// saw none before.
template <bool kAsWords>
PARALLAX_INLINE void update_row(const DecodeBlock& block, std::int64_t row, int visible, bool first,
                                float* scores) {
  Vec largest = load(scores), t_sum = load(scores + kProbe);
  for (int j = kLanes; j < kDecodeTokens; j += kLanes) {
    largest = max(largest, load(scores + j));
    t_sum = t_sum + load(scores + kProbe + j);
  }
  if (first) block.c[row] = lane_sum(t_sum) / static_cast<float>(visible);
  const float m = largest_lane(largest);
  const float next = block.m[row] > m ? block.m[row] : m;
  const Vec reference = broadcast(next == -INFINITY ? 0.0f : next);
  const Vec log2e = broadcast(kLog2e), c = broadcast(block.c[row]);
  Vec d1 = zero(), d2 = zero();
  for (int j = 0; j < kDecodeTokens; j += kLanes) {
    const Vec p = exp2((load(scores + j) - reference) * log2e);
    const Vec w = p * (load(scores + kProbe + j) - c);
    d1 = d1 + p;
    d2 = d2 + w;
    store_weights<kAsWords>(scores, j, p);
    store_weights<kAsWords>(scores + kProbe, j, w);
  }
  const Vec shrink = exp2((broadcast(block.m[row]) - reference) * log2e);
  store(scores + kShrink, shrink);
  block.m[row] = next;
  block.d1[row] = block.d1[row] * scores[kShrink] + lane_sum(d1);
  block.d2[row] = block.d2[row] * scores[kShrink] + lane_sum(d2);
}

// Element order of a unit of bf16 (even, then odd elements) and back.
PARALLAX_INLINE void split_pairs(float* row, int stride) {
  for (int d = 0; d < stride; d += kUnit) {
    float unit[kUnit];
    std::memcpy(unit, row + d, sizeof unit);
    for (int i = 0; i < kUnit; ++i) row[d + i % 2 * kLanes + i / 2] = unit[i];
  }
}
PARALLAX_INLINE void join_pairs(float* row, int stride) {
  for (int d = 0; d < stride; d += kUnit) {
    float unit[kUnit];
    std::memcpy(unit, row + d, sizeof unit);
    for (int i = 0; i < kUnit; ++i) row[d + i] = unit[i % 2 * kLanes + i / 2];
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
