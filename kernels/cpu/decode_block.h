// SPDX-License-Identifier: MIT
// Decode of a run of keys for a few neighbouring key/value heads: every key and value is read from
// memory once for all query rows that share it (docs/math.md sections 3, 4 and 8).
//
// Memory is the bound, so memory sets the order. The run is cut into kStep streams; a step takes
// the next token of each stream and all heads of it, so that the hardware sees a few long
// sequential reads, which it prefetches best (software prefetches of a tile ahead compete with the
// loads for the same miss buffers). A tile is kDecodeTokens tokens in the order in which the steps
// meet them; their scores are kept between the steps over keys and the steps over values.
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

// Lane i of the result is the sum of the lanes of rows[i].
PARALLAX_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
  fold<kLanes / 2>(rows);
  return rows[0];
}

PARALLAX_INLINE float lane_sum(Vec x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += lanes[i];
  return result;
}

PARALLAX_INLINE float largest_lane(Vec x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// Whether keys of a type meet queries as they are, two bf16 to a word, instead of as floats.
template <DType kType>
constexpr bool kDots =
#if defined(__AVX512BF16__)
    kType == DType::kBFloat16;
#else
    false;
#endif

// s and t of one row and kStep tokens. q and r lie one stride apart; factors: scale for the lanes
// of s, 1 for those of t.
template <DType kType>
PARALLAX_INLINE void multiply_keys(const char* const (&keys)[kStep], const float* q, int stride,
                                   const float (&factors)[kLanes], float* scores) {
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = zero();
  for (int d = 0; d < stride; d += kUnit) {
    if constexpr (kDots<kType>) {
#if defined(__AVX512BF16__)
      const Vec q_words = load(q + d / 2), r_words = load(q + stride + d / 2);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
        Vec key = load(reinterpret_cast<const float*>(keys[j]) + d / 2);
        hold(&key);
        acc[j] = BFloat16Words::multiply_add(q_words, key, acc[j]);
        acc[kStep + j] = BFloat16Words::multiply_add(r_words, key, acc[kStep + j]);
      }
#endif
    } else {
      const Vec q0 = load(q + d), q1 = load(q + d + kLanes);
      const Vec r0 = load(q + stride + d), r1 = load(q + stride + d + kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
        Vec key[2];
        load_unit<kType>(keys[j], d, key);
        acc[j] = fma(q0, key[0], acc[j]);
        acc[kStep + j] = fma(r0, key[0], acc[kStep + j]);
        acc[j] = fma(q1, key[1], acc[j]);
        acc[kStep + j] = fma(r1, key[1], acc[kStep + j]);
      }
    }
  }
  alignas(64) float sums[kLanes];
  store(sums, sum_lanes(acc) * load(factors));
  std::memcpy(scores, sums, sizeof sums / 2);
  std::memcpy(scores + kProbe, sums + kStep, sizeof sums / 2);
}

// Adds the weighted values of a step to elements [d, d + kUnits * kUnit) of one row's o1 and o2.
template <DType kType, int kUnits>
PARALLAX_INLINE void add_values(const char* const (&values)[kStep], const float* scores, int d,
                                int stride, float* o) {
  Vec acc[4 * kUnits];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kUnits; ++i) acc[i] = load(o + i % 2 * stride + d + i / 2 * kLanes);
#pragma GCC unroll 8
  for (int j = 0; j < kStep; ++j) {
    const Vec p = broadcast(scores[j]), w = broadcast(scores[kProbe + j]);
#pragma GCC unroll 4
    for (int n = 0; n < kUnits; ++n) {
      Vec value[2];
      load_unit<kType>(values[j], d + n * kUnit, value);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Vec* to = acc + 4 * n + 2 * half;
        to[0] = fma(p, value[half], to[0]);
        to[1] = fma(w, value[half], to[1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kUnits; ++i) store(o + i % 2 * stride + d + i / 2 * kLanes, acc[i]);
}

template <DType kType>
PARALLAX_INLINE void multiply_values(const char* const (&values)[kStep], const float* scores,
                                     int stride, float* o) {
  constexpr int kUnits = kLanes == 16 ? 4 : 2;  // as many accumulators as registers allow
  int d = 0;
  for (; d + kUnits * kUnit <= stride; d += kUnits * kUnit) {
    add_values<kType, kUnits>(values, scores, d, stride, o);
  }
  for (; d < stride; d += kUnit) add_values<kType, 1>(values, scores, d, stride, o);
}

// s and t of a tile become p and p (t - c), and the row's state moves on. `visible`: how many of
// the tile's tokens the row sees (at least one), the others have s = -inf and t = 0; `first`: it
// saw none before.
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
    store(scores + j, p);
    store(scores + kProbe + j, w);
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

// kType: of the cache. FP8 keys and values are always packed: they become floats, and the scales of
// their heads are in q and r beforehand and go into o1 and o2 afterwards.
template <DType kType>
class Decode {
 public:
  Decode(const DecodeBlock& block, float* scratch)
      : block_(block),
        stride_(decode_stride(block.head_dim)),
        rows_of_head_(block.group * block.q_len),
        rows_(std::int64_t{block.num_kv_heads} * rows_of_head_),
        packs_values_(kIsFp8 || block.head_dim != stride_ ||
                      (kType != DType::kFloat32 && rows_of_head_ > 1)),
        packs_keys_(kDots<kType> ? block.head_dim != stride_ : packs_values_),
        queries_(scratch),
        scores_(queries_ + rows_ * 2 * stride_),
        packed_(scores_ + rows_ * kDecodeScoreRow) {
    for (int i = 0; i < kLanes; ++i) factors_[i] = i < kStep ? block.scale : 1.0f;
  }

  void run() {
    start_rows();
    const int steps = (block_.end - block_.begin + kStep - 1) / kStep;
    for (int first = 0; first < steps; first += kTileSteps) {
      const int last = first + kTileSteps < steps ? first + kTileSteps : steps;
      for (int i = first; i < last; ++i) score_step(i, steps, scores_ + (i - first) * kStep);
      update_rows(first, last, steps);
      for (int i = first; i < last; ++i) value_step(i, steps, scores_ + (i - first) * kStep);
    }
    if (kIsFp8) scale_values();
    if (kType != DType::kBFloat16 || packs_values_) return;
    for (std::int64_t i = 0; i < 2 * rows_; ++i) join_pairs(block_.o + i * stride_, stride_);
  }

 private:
  static constexpr bool kIsFp8 = kType == DType::kFloat8E4M3;

  // The rows of a step's tokens, of the first head.
  struct Step {
    const char* tokens[kStep];
  };

  // Token i of each stream; streams are `steps` tokens long. May lie at or behind the end.
  std::int64_t token(int stream, int i, int steps) const {
    return block_.begin + std::int64_t{stream} * steps + i;
  }

  Step step(const TokenRows& rows, int i, int steps) const {
    Step step;
    for (int stream = 0; stream < kStep; ++stream) {
      // A token behind the end stands for the last one; its weight is zero.
      const std::int64_t j = token(stream, i, steps);
      step.tokens[stream] = rows.row(j < block_.end ? j : block_.end - 1);
    }
    return step;
  }

  void move_to_next_head(std::int64_t head_bytes, Step* step) const {
    for (int i = 0; i < kStep; ++i) step->tokens[i] += head_bytes;
  }

  void prefetch_head(const Step& step, std::int64_t head_offset) const {
    for (const char* token : step.tokens) {
      for (int at = 0; at < block_.head_dim * Element<kType>::kBytes; at += 64) {
        __builtin_prefetch(token + head_offset + at, 0, 2);
      }
    }
  }

  // The same rows as floats, zeros up to whole units: worth it where several rows use them, and
  // needed where a unit would reach behind their end.
  Step pack(const Step& from) const {
    Step packed;
    for (int i = 0; i < kStep; ++i) {
      float* to = packed_ + i * stride_;
      packed.tokens[i] = reinterpret_cast<const char*>(to);
      read_padded(Element<kType>{}, from.tokens[i], to);
    }
    return packed;
  }

  template <class E>
  void read_padded(E element, const char* from, float* to) const {
    for (int d = block_.head_dim / kLanes * kLanes; d < stride_; d += kLanes) store(to + d, zero());
    read_row(element, from, block_.head_dim, to);
  }

  // A query's row in the form in which it meets the keys.
  void read_query(const char* from, float* to) const {
    if constexpr (kIsFp8) {
      with_element(block_.dtype, [&](auto element) { read_padded(element, from, to); });
      return;
    }
    if (kDots<kType> && !packs_keys_) {
      std::memcpy(to, from, block_.head_dim * Element<kType>::kBytes);
      return;
    }
    read_padded(Element<kType>{}, from, to);
    if (kType == DType::kBFloat16 && !packs_keys_) split_pairs(to, stride_);
  }

  void start_rows() {
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t f = row % rows_of_head_, i = f / block_.group;
      const std::int64_t h = row / rows_of_head_ * block_.group + f % block_.group;
      float* q = queries_ + row * 2 * stride_;
      read_query(block_.q + i * block_.q_row_bytes + h * block_.q_head_bytes, q);
      read_query(block_.r + i * block_.r_row_bytes + h * block_.r_head_bytes, q + stride_);
      if (kIsFp8) scale_row(block_.k_scale[row / rows_of_head_], q);
      clear_row(block_.o + row * 2 * stride_, 2 * stride_);
      block_.m[row] = -INFINITY;
      block_.d1[row] = block_.d2[row] = block_.c[row] = 0.0f;
    }
  }

  void score_step(int i, int steps, float* scores) {
    Step keys = step(block_.k, i, steps);
    const Step next = step(block_.k, i + 1 < steps ? i + 1 : i, steps);
    const float* q = queries_;
    for (int head = 0; head < block_.num_kv_heads; ++head) {
      prefetch_head(next, head * block_.k_head_bytes);
      const Step floats = packs_keys_ ? pack(keys) : keys;
      for (int f = 0; f < rows_of_head_; ++f, q += 2 * stride_, scores += kDecodeScoreRow) {
        if (packs_keys_) {
          multiply_keys<DType::kFloat32>(floats.tokens, q, stride_, factors_, scores);
        } else {
          multiply_keys<kType>(keys.tokens, q, stride_, factors_, scores);
        }
      }
      move_to_next_head(block_.k_head_bytes, &keys);
    }
  }

  void update_rows(int first, int last, int steps) {
    for (std::int64_t row = 0; row < rows_; ++row) {
      float* scores = scores_ + row * kDecodeScoreRow;
      const int visible = mask_row(row, first, last, steps, scores);
      if (visible > 0) {
        update_row(block_, row, visible, block_.d1[row] == 0.0f, scores);
        scale_row(scores[kShrink], block_.o + row * 2 * stride_);
      } else {
        for (int j = 0; j < kShrink; j += kLanes) store(scores + j, zero());
      }
    }
  }

  // Gives the tokens that a row does not see s = -inf and t = 0; returns how many it sees.
  int mask_row(std::int64_t row, int first, int last, int steps, float* scores) const {
    const std::int64_t query = row % rows_of_head_ / block_.group;
    const std::int64_t lo = block_.lo[query];
    const std::int64_t hi = block_.hi[query] < block_.end ? block_.hi[query] : block_.end;
    if (lo <= block_.begin && token(kStep - 1, last - 1, steps) < hi &&
        last - first == kTileSteps) {
      return kDecodeTokens;
    }
    int visible = 0;
    for (int i = 0; i < kTileSteps; ++i) {
      for (int stream = 0; stream < kStep; ++stream) {
        const std::int64_t j = token(stream, first + i, steps);
        if (first + i < last && lo <= j && j < hi) {
          ++visible;
        } else {
          scores[i * kStep + stream] = -INFINITY;
          scores[kProbe + i * kStep + stream] = 0.0f;
        }
      }
    }
    return visible;
  }

  // Multiplies q and r, or o1 and o2, of one row.
  void scale_row(float factor, float* row) const {
    if (factor == 1.0f) return;
    const Vec x = broadcast(factor);
    for (int d = 0; d < 2 * stride_; d += kLanes) store(row + d, load(row + d) * x);
  }

  void scale_values() const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      scale_row(block_.v_scale[row / rows_of_head_], block_.o + row * 2 * stride_);
    }
  }

  void value_step(int i, int steps, const float* scores) {
    Step values = step(block_.v, i, steps);
    const Step next = step(block_.v, i + 1 < steps ? i + 1 : i, steps);
    float* o = block_.o;
    for (int head = 0; head < block_.num_kv_heads; ++head) {
      prefetch_head(next, head * block_.v_head_bytes);
      const Step floats = packs_values_ ? pack(values) : values;
      for (int f = 0; f < rows_of_head_; ++f, o += 2 * stride_, scores += kDecodeScoreRow) {
        if (packs_values_) {
          multiply_values<DType::kFloat32>(floats.tokens, scores, stride_, o);
        } else {
          multiply_values<kType>(values.tokens, scores, stride_, o);
        }
      }
      move_to_next_head(block_.v_head_bytes, &values);
    }
  }

  const DecodeBlock& block_;
  const int stride_, rows_of_head_;
  const std::int64_t rows_;  // of all heads
  const bool packs_values_, packs_keys_;
  alignas(64) float factors_[kLanes];
  float *const queries_, *const scores_, *const packed_;
};

[[maybe_unused]] static void decode_block(const DecodeBlock& block, float* scratch) {
  if (block.kv_dtype == DType::kFloat8E4M3) {
    return Decode<DType::kFloat8E4M3>(block, scratch).run();
  }
  with_element(block.dtype,
               [&](auto element) { Decode<decltype(element)::kValue>(block, scratch).run(); });
}

}  // namespace parallax::cpu::PARALLAX_TARGET
