// SPDX-License-Identifier: MIT
// Element types on the CPU: the narrow ones as stored bits, the type that arithmetic on each uses,
// and the one place where a DType becomes a C++ type. Rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "parallax/types.h"

namespace parallax::cpu {

struct BFloat16 {
  std::uint16_t bits = 0;
};

struct Float16 {
  std::uint16_t bits = 0;
};

struct Float8E4M3 {
  std::uint8_t bits = 0;
};

// Arithmetic on narrower elements is float arithmetic.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(BFloat16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }
inline float load(Float16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t bits = (magnitude << 13) + (112u << 23);  // the exponent's bias is 15, not 127
  if (magnitude >= 0x7c00u) {
    bits += 112u << 23;  // infinity and NaN
  } else if (magnitude < 0x0400u) {
    bits = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return std::bit_cast<float>(sign | bits);
}
inline float load(Float8E4M3 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x80u} << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  std::uint32_t bits = (magnitude << 20) + (120u << 23);  // the exponent's bias is 7, not 127
  if (magnitude == 0x7fu) {
    bits = 0x7fc00000u;  // the only NaN; there is no infinity
  } else if (magnitude < 0x08u) {
    bits = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-9f);
  }
  return std::bit_cast<float>(sign | bits);
}

inline void store(double x, double* to) { *to = x; }
inline void store(float x, float* to) { *to = x; }
inline void store(float x, BFloat16* to) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x0040u : rounded);
}
inline void store(float x, Float16* to) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and beyond round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  to->bits = static_cast<std::uint16_t>(sign | half);
}

// Saturates: what lies beyond 448, infinity too, becomes 448.
inline void store(float x, Float8E4M3* to) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    to->bits = 0x7f;
    return;
  }
  std::uint32_t eight;
  if (magnitude >= 0x43e00000u) {  // 448
    eight = 0x7eu;
  } else if (magnitude < 0x3c800000u) {  // below 2^-6: adding 2^14 rounds to multiples of 2^-9
    eight = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
  } else {
    eight = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
  }
  to->bits = static_cast<std::uint8_t>(((bits >> 24) & 0x80u) | eight);
}

inline std::size_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat8E4M3:
      break;
  }
  return 1;
}

// Calls f with a value of the dtype's element type.
template <class F>
auto with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat8E4M3:
      break;
  }
  return f(Float8E4M3{});
}

}  // namespace parallax::cpu
