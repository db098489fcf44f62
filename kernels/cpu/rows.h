// SPDX-License-Identifier: MIT
// Rows of any element type to float and back, and the transposed panels of the query side.
#pragma once

#include "cpu/product.h"
#include "cpu/target.h"

namespace parallax::cpu::PARALLAX_TARGET {

template <DType kType>
PARALLAX_INLINE Vec load_elements(const void* from, int d) {
  if constexpr (kType == DType::kFloat32) return load(static_cast<const float*>(from) + d);
  if constexpr (kType == DType::kBFloat16)
    return load_bf16(static_cast<const std::uint16_t*>(from) + d);
  if constexpr (kType == DType::kFloat16)
    return load_fp16(static_cast<const std::uint16_t*>(from) + d);
  if constexpr (kType == DType::kFloat8E4M3)
    return load_fp8(static_cast<const std::uint8_t*>(from) + d);
}

template <DType kType>
PARALLAX_INLINE void store_elements(void* to, int d, Vec x) {
  if constexpr (kType == DType::kFloat32) store(static_cast<float*>(to) + d, x);
  if constexpr (kType == DType::kBFloat16) store_bf16(static_cast<std::uint16_t*>(to) + d, x);
  if constexpr (kType == DType::kFloat16) store_fp16(static_cast<std::uint16_t*>(to) + d, x);
}

// Calls f(type) with the element type as a compile-time constant.
template <DType kType>
struct Element {
  static constexpr DType kValue = kType;
  static constexpr int kBytes = kType == DType::kFloat32 ? 4 : kType == DType::kFloat8E4M3 ? 1 : 2;
};
// The dtypes of problems; FP8 is a cache's alone (decode_block.h).
template <class F>
PARALLAX_INLINE void with_element(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(Element<DType::kFloat32>{});
  if (dtype == DType::kBFloat16) return f(Element<DType::kBFloat16>{});
  f(Element<DType::kFloat16>{});
}

constexpr int padded(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// One row as floats, zeros up to a whole vector.
template <class E>
PARALLAX_INLINE void read_row(E, const void* from, int head_dim, float* to) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(to + d, load_elements<E::kValue>(from, d));
  }
  if (d < head_dim) {
    alignas(64) char rest[kLanes * E::kBytes] = {};
    std::memcpy(rest, static_cast<const char*>(from) + d * E::kBytes, (head_dim - d) * E::kBytes);
    store(to + d, load_elements<E::kValue>(rest, 0));
  }
}

template <class E>
PARALLAX_INLINE void write_row(E, const float* from, int head_dim, void* to) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store_elements<E::kValue>(to, d, load(from + d));
  if (d < head_dim) {
    alignas(64) char rest[kLanes * E::kBytes];
    store_elements<E::kValue>(rest, 0, load(from + d));
    std::memcpy(static_cast<char*>(to) + d * E::kBytes, rest, (head_dim - d) * E::kBytes);
  }
}

// Whether n rows of words hold neither infinity nor NaN. Rows lie `stride` apart, zeros up to whole
// vectors.
template <int kFold>
PARALLAX_INLINE bool all_finite(const float* rows, int n, int stride, int words) {
  Vec sum = zero();  // of x * 0
  for (int j = 0; j < n; ++j, rows += stride) {
    for (int d = 0; d < words; d += kLanes) {
      if constexpr (kFold == 1) {
        sum = fma(load(rows + d), zero(), sum);
      } else {
        Vec even, odd;
        load_bf16_pairs(reinterpret_cast<const std::uint16_t*>(rows + d), &even, &odd);
        sum = fma(odd, zero(), fma(even, zero(), sum));
      }
    }
  }
  return all(equal(sum, zero()));
}

PARALLAX_INLINE void clear_row(float* to, int head_dim) {
  for (int d = 0; d < padded(head_dim); d += kLanes) store(to + d, zero());
}

// One row as words along head_dim, zeros up to a whole vector.
template <class Words, class E>
PARALLAX_INLINE void read_words(E element, const void* from, int head_dim, float* to) {
  if constexpr (Words::kFold == 1) {
    read_row(element, from, head_dim, to);
  } else {
    clear_row(to, head_dim / Words::kFold);
    std::memcpy(to, from, head_dim * E::kBytes);
  }
}

// Tokens [first, first + kBlockKeys) as rows of words; tokens outside [lo, hi) are not read, and
// zero.
template <class Words, int kStride>
PARALLAX_INLINE void read_tile(DType dtype, const TokenRows& tokens, int head_dim,
                               std::int64_t first, std::int64_t lo, std::int64_t hi, float* to) {
  with_element(dtype, [&](auto element) {
    for (int j = 0; j < kBlockKeys; ++j, to += kStride) {
      if (first + j >= lo && first + j < hi) {
        read_words<Words>(element, tokens.row(first + j), head_dim, to);
      } else {
        clear_row(to, head_dim / Words::kFold);
      }
    }
  });
}

// Rows of words along head_dim, n of them, as words along the rows: [n / kFold, head_dim]. Floats
// are both: the rows themselves are returned, and `to` stays as it was.
template <class Words, int kStride>
PARALLAX_INLINE float* fold_rows(float* rows, [[maybe_unused]] int n, [[maybe_unused]] int head_dim,
                                 [[maybe_unused]] float* to) {
  if constexpr (Words::kFold == 1) {
    return rows;
  } else {
    for (int j = 0; j < n; j += 2) {
      const float *a = rows + j * kStride, *b = a + kStride;
      float* folded = to + j / 2 * kStride;
      for (int d = 0; d < head_dim; d += 2 * kLanes) {
        Vec low, high;
        Words::interleave(load(a + d / 2), load(b + d / 2), &low, &high);
        store(folded + d, low);
        if (d + kLanes < head_dim) store(folded + d + kLanes, high);
      }
    }
    return to;
  }
}

// Writes kLanes rows of `words` words as kLanes columns of a panel [words, kPanel].
template <int kStride>
PARALLAX_INLINE void transpose_into_panel(const float* rows, int words, float* panel) {
  for (int d = 0; d < padded(words); d += kLanes) {
    Vec square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = load(rows + i * kStride + d);
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, square[i]);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
