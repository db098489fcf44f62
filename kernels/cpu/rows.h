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
  static constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
};
template <class F>
PARALLAX_INLINE void with_element(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(Element<DType::kFloat32>{});
  if (dtype == DType::kBFloat16) return f(Element<DType::kBFloat16>{});
  f(Element<DType::kFloat16>{});
}

constexpr int padded(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// One row times `factor`, as floats, zeros up to a whole vector.
template <class E>
PARALLAX_INLINE void read_row(E, const void* from, int head_dim, float factor, float* to) {
  const Vec scale = broadcast(factor);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(to + d, load_elements<E::kValue>(from, d) * scale);
  }
  if (d < head_dim) {
    alignas(64) char rest[kLanes * E::kBytes] = {};
    std::memcpy(rest, static_cast<const char*>(from) + d * E::kBytes, (head_dim - d) * E::kBytes);
    store(to + d, load_elements<E::kValue>(rest, 0) * scale);
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

PARALLAX_INLINE void clear_row(float* to, int head_dim) {
  for (int d = 0; d < padded(head_dim); d += kLanes) store(to + d, zero());
}

// Tokens [first, first + kBlockKeys) as rows of kStride floats; tokens outside [lo, hi) are not
// read, and zero.
template <int kStride>
PARALLAX_INLINE void read_tile(DType dtype, const TokenRows& tokens, int head_dim,
                               std::int64_t first, std::int64_t lo, std::int64_t hi, float* to) {
  with_element(dtype, [&](auto element) {
    for (int j = 0; j < kBlockKeys; ++j, to += kStride) {
      if (first + j >= lo && first + j < hi) {
        read_row(element, tokens.row(first + j), head_dim, 1.0f, to);
      } else {
        clear_row(to, head_dim);
      }
    }
  });
}

// Writes kLanes rows of kStride floats as kLanes columns of a panel [head_dim, kPanel].
template <int kStride>
PARALLAX_INLINE void transpose_into_panel(const float* rows, int head_dim, float* panel) {
  for (int d = 0; d < padded(head_dim); d += kLanes) {
    Vec square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = load(rows + i * kStride + d);
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, square[i]);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
