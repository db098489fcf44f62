// SPDX-License-Identifier: MIT
// Decode of a run of keys for a few neighbouring key/value heads: every key and value is read from
// memory once for all query rows that share it (docs/math.md sections 3, 4 and 8).
//
// Memory is the bound, so memory sets the order. The run is cut into kStep streams; a step takes
// the next token of each stream and all heads of it, so that the hardware sees a few long
// sequential reads, which it prefetches best; the next step's lines are asked for a share at a
// time, between one row's arithmetic and the next's, since a burst of them fills the miss buffers
// and stalls the core. A tile is kDecodeTokens tokens in the order in which the steps meet them;
// their scores are kept between the steps over keys and the steps over values.
#pragma once

#include "cpu/decode_product.h"

namespace parallax::cpu::PARALLAX_TARGET {

// kType: of the cache. FP8 keys and values are always packed: they become floats, and the scales of
// their heads are in q and r beforehand and go into o1 and o2 afterwards.
template <DType kType>
class Decode {
 public:
  Decode(const DecodeBlock& block, float* scratch)
      : block_(block),
        stride_(decode_stride(block.head_dim)),
        rows_of_head_(block.group * block.q_len),
        share_((kStep + rows_of_head_ - 1) / rows_of_head_),
        rows_(std::int64_t{block.num_kv_heads} * rows_of_head_),
        packs_(kIsFp8 || block.head_dim != stride_ ||
               (kType != DType::kFloat32 && !kDots<kType> && rows_of_head_ > 1)),
        queries_(scratch),
        scores_(queries_ + rows_ * 2 * stride_),
        packed_(scores_ + rows_ * kDecodeScoreRow) {
    for (int i = 0; i < kLanes; ++i) {
      factors_[0][i] = i < kStep ? block.scale : 1.0f;
      factors_[1][i] = i % kStep < kStep / 2 ? block.scale : 1.0f;
    }
  }

  void run() {
    start_rows();
    const int steps = (block_.end - block_.begin + kStep - 1) / kStep;
    for (int first = 0; first < steps; first += kTileSteps) {
      const int last = first + kTileSteps < steps ? first + kTileSteps : steps;
      for (int i = first; i < last; ++i) score_step(i, steps, scores_ + (i - first) * kStep);
      const bool ragged = update_rows(first, last, steps);
      for (int i = first; i < last; ++i) {
        value_step(i, steps, (i - first) * kStep, ragged);
      }
    }
    if (kIsFp8) scale_values();
    if (kType != DType::kBFloat16 || kDots<kType> || packs_) return;
    for (std::int64_t i = 0; i < 2 * rows_; ++i) join_pairs(block_.o + i * stride_, stride_);
  }

 private:
  static constexpr bool kIsFp8 = kType == DType::kFloat8E4M3;

  // The rows of a step's tokens, of one head.
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

  // Asks for the tokens of a step, a share of them at each of its head's rows.
  void prefetch(const Step& step, std::int64_t head_offset, int f, int rows) const {
    const int end = (f + rows) * share_ < kStep ? (f + rows) * share_ : kStep;
    for (int i = f * share_; i < end; ++i) {
      for (int at = 0; at < block_.head_dim * Element<kType>::kBytes; at += 64) {
        __builtin_prefetch(step.tokens[i] + head_offset + at, 0, 2);
      }
    }
  }

  // A step's rows in the form in which they meet the queries' rows, zeros up to whole units. As
  // floats where several rows use them (rows a multiple of 4 KiB apart would share few sets of the
  // first-level cache), or where a unit would reach behind their end; bf16 words stay words. Tokens
  // without their bit in `seen` are zero.
  Step operands(const Step& from, unsigned seen) const {
    if (!packs_ && seen == ~0u) return from;
    constexpr int kFold = kDots<kType> ? 2 : 1;
    Step packed;
    float* to = packed_;
    for (int i = 0; i < kStep; ++i, to += stride_ / kFold) {
      packed.tokens[i] = reinterpret_cast<const char*>(to);
      if (!(seen >> i & 1)) {
        clear_row(to, stride_ / kFold);
      } else if constexpr (kDots<kType>) {
        copy_words(from.tokens[i], to);
      } else {
        read_padded(Element<kType>{}, from.tokens[i], to);
      }
    }
    return packed;
  }

  template <class E>
  void read_padded(E element, const char* from, float* to) const {
    for (int d = block_.head_dim / kLanes * kLanes; d < stride_; d += kLanes) store(to + d, zero());
    read_row(element, from, block_.head_dim, to);
  }

  void copy_words(const char* from, float* to) const {
    for (int d = 0; d < stride_; d += kUnit) store(to + d / 2, read_unit(from, d));
  }

  // Elements [d, d + kUnit) of a row of 16-bit elements, zeros behind its end.
  Vec read_unit(const char* row, int d) const {
    const char* from = row + 2 * d;
    if (d + kUnit <= block_.head_dim) return load(reinterpret_cast<const float*>(from));
    alignas(64) float unit[kLanes] = {};
    std::memcpy(unit, from, 2 * (block_.head_dim - d));
    return load(unit);
  }

  // A query's row in the form in which it meets the keys.
  void read_query(const char* from, float* to) const {
    if constexpr (kIsFp8) {
      with_element(block_.dtype, [&](auto element) { read_padded(element, from, to); });
    } else if constexpr (kDots<kType>) {
      copy_words(from, to);
    } else {
      read_padded(Element<kType>{}, from, to);
      if (kType == DType::kBFloat16 && !packs_) split_pairs(to, stride_);
    }
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
      const Step whole = operands(keys, ~0u);
      for (int f = 0, rows; f < rows_of_head_; f += rows) {
        rows = f + 1 < rows_of_head_ ? kMaxRows : 1;
        prefetch(next, head * block_.k_head_bytes, f, rows);
        score(whole, rows, q, scores);
        q += rows * 2 * stride_;
        scores += rows * kDecodeScoreRow;
      }
      move_to_next_head(block_.k_head_bytes, &keys);
    }
  }

  // `ragged`: see update_rows(); a step's tokens begin at token `first` of the tile.
  void value_step(int i, int steps, int first, bool ragged) {
    Step values = step(block_.v, i, steps);
    const Step next = step(block_.v, i + 1 < steps ? i + 1 : i, steps);
    std::int64_t row = 0;
    for (int head = 0; head < block_.num_kv_heads; ++head) {
      const Step whole = operands(values, ~0u);
      const bool apart = ragged && !is_finite(whole);
      for (int f = 0, rows; f < rows_of_head_; f += rows, row += rows) {
        rows = f + 1 < rows_of_head_ && !apart ? kMaxRows : 1;
        prefetch(next, head * block_.v_head_bytes, f, rows);
        // 0 * NaN is NaN: hidden values that may be anything are zero for the row.
        add(apart ? operands(values, seen_tokens(row, i, i + 1, steps)) : whole, rows, row, first);
      }
      move_to_next_head(block_.v_head_bytes, &values);
    }
  }

  // Of operands of a step.
  bool is_finite(const Step& values) const {
    constexpr int kFold = kDots<kType> ? 2 : 1;
    const int words = stride_ / kFold;
    for (const char* row : values.tokens) {
      if (!all_finite<kFold>(reinterpret_cast<const float*>(row), 1, words, words)) return false;
    }
    return true;
  }

  void score(const Step& keys, int rows, const float* q, float* scores) const {
    constexpr DType kOperand = kDots<kType> ? kType : DType::kFloat32;
    if (rows == kMaxRows) {
      score<kOperand, kMaxRows>(keys, q, scores);
    } else if (packs_) {
      score<kOperand, 1>(keys, q, scores);
    } else {
      score<kType, 1>(keys, q, scores);
    }
  }
  template <DType kOperand, int kRows>
  void score(const Step& keys, const float* q, float* scores) const {
    constexpr int kTokens = kStep / kRows;
    for (int j = 0; j < kStep; j += kTokens) {
      multiply_keys<kOperand, kRows>(keys.tokens + j, q, stride_, factors_[kRows - 1], scores + j);
    }
  }

  // A step's values, the tile's tokens from `first` on, meet `rows` rows.
  void add(const Step& values, int rows, std::int64_t row, int first) const {
    const float* scores = scores_ + row * kDecodeScoreRow;
    float* o = block_.o + row * 2 * stride_;
    if constexpr (kDots<kType>) {
#if defined(__AVX512BF16__)
      if (rows == kMaxRows) {
        multiply_pairs<kMaxRows>(values.tokens, scores + first / 2, stride_, o);
      } else {
        multiply_pairs<1>(values.tokens, scores + first / 2, stride_, o);
      }
#endif
    } else if (rows == kMaxRows) {
      multiply_values<DType::kFloat32, kMaxRows>(values.tokens, scores + first, stride_, o);
    } else if (packs_) {
      multiply_values<DType::kFloat32, 1>(values.tokens, scores + first, stride_, o);
    } else {
      multiply_values<kType, 1>(values.tokens, scores + first, stride_, o);
    }
  }

  // Returns whether some row does not see all that the tile holds for others.
  bool update_rows(int first, int last, int steps) {
    bool ragged = false;
    for (std::int64_t row = 0; row < rows_; ++row) {
      float* scores = scores_ + row * kDecodeScoreRow;
      const int visible = mask_row(row, first, last, steps, scores);
      if (visible < kDecodeTokens) ragged = block_.q_len > 1;
      if (visible > 0) {
        update_row<kDots<kType>>(block_, row, visible, block_.d1[row] == 0.0f, scores);
        scale_row(scores[kShrink], block_.o + row * 2 * stride_);
      } else {
        for (int j = 0; j < kShrink; j += kLanes) store(scores + j, zero());
      }
    }
    return ragged;
  }

  // The tokens of steps [first, last) that a row sees, a bit each.
  std::uint32_t seen_tokens(std::int64_t row, int first, int last, int steps) const {
    static_assert(kDecodeTokens == 32);
    const std::int64_t query = row % rows_of_head_ / block_.group;
    const std::int64_t lo = block_.lo[query];
    const std::int64_t hi = block_.hi[query] < block_.end ? block_.hi[query] : block_.end;
    if (lo <= block_.begin && token(kStep - 1, last - 1, steps) < hi &&
        last - first == kTileSteps) {
      return ~std::uint32_t{0};
    }
    std::uint32_t seen = 0;
    for (int i = 0; i < last - first; ++i) {
      for (int stream = 0; stream < kStep; ++stream) {
        const std::int64_t j = token(stream, first + i, steps);
        if (lo <= j && j < hi) seen |= std::uint32_t{1} << (i * kStep + stream);
      }
    }
    return seen;
  }

  // Gives the tokens that a row does not see s = -inf and t = 0; returns how many it sees.
  int mask_row(std::int64_t row, int first, int last, int steps, float* scores) const {
    const std::uint32_t seen = seen_tokens(row, first, last, steps);
    if (seen == ~std::uint32_t{0}) return kDecodeTokens;
    for (int j = 0; j < kDecodeTokens; ++j) {
      if (seen >> j & 1) continue;
      scores[j] = -INFINITY;
      scores[kProbe + j] = 0.0f;
    }
    return __builtin_popcount(seen);
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

  const DecodeBlock& block_;
  const int stride_, rows_of_head_, share_;
  const std::int64_t rows_;  // of all heads
  const bool packs_;
  alignas(64) float factors_[kMaxRows][kLanes];  // see multiply_keys
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
