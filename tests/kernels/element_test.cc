// SPDX-License-Identifier: MIT
// bfloat16, float16 and e4m3, every bit pattern, and rounding to nearest even between all of them.
#include "kernels/cpu/element.h"

#include <gtest/gtest.h>

#include <cmath>

namespace parallax::cpu {
namespace {

// The value of a 16-bit float from its definition.
double value_of(unsigned bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000u) ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  const int implied = exponent == 0 ? 0 : 1 << fraction_bits;
  return sign * std::ldexp(fraction + implied, std::max(exponent, 1) - bias - fraction_bits);
}

template <class T>
class Half : public testing::Test {
 public:
  static constexpr int kExponentBits = std::is_same_v<T, BFloat16> ? 8 : 5;
  static constexpr int kFractionBits = 15 - kExponentBits;
  static double value(unsigned bits) { return value_of(bits, kExponentBits, kFractionBits); }
  static unsigned rounded(float x) {
    T half;
    store(x, &half);
    return half.bits;
  }
};
using Halves = testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Half, Halves);

TYPED_TEST(Half, EveryPatternLoadsAndStoresBack) {
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const float loaded = load(TypeParam{static_cast<std::uint16_t>(bits)});
    const double expected = this->value(bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(loaded)) << bits;
      ASSERT_TRUE(std::isnan(this->value(this->rounded(loaded)))) << bits;
      continue;
    }
    ASSERT_EQ(loaded, expected) << bits;
    ASSERT_EQ(this->rounded(loaded), bits);
  }
}

TYPED_TEST(Half, BetweenNeighboursRoundsToNearestEven) {
  const unsigned infinity = static_cast<unsigned>(((1 << this->kExponentBits) - 1))
                            << this->kFractionBits;
  for (unsigned bits = 0; bits + 1 < infinity; ++bits) {
    const double low = this->value(bits), high = this->value(bits + 1);
    const float middle = static_cast<float>((low + high) / 2);
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(this->rounded(middle), even) << bits;
    ASSERT_EQ(this->rounded(-middle), even | 0x8000u) << bits;
    ASSERT_EQ(this->rounded(std::nextafter(middle, 0.0f)), bits) << bits;
    ASSERT_EQ(this->rounded(std::nextafter(middle, INFINITY)), bits + 1) << bits;
  }
  // Half an ulp beyond the largest finite number starts infinity.
  const double largest = this->value(infinity - 1), ulp = largest - this->value(infinity - 2);
  const float edge = static_cast<float>(largest + ulp / 2);
  EXPECT_EQ(this->rounded(edge), infinity);
  EXPECT_EQ(this->rounded(std::nextafter(edge, 0.0f)), infinity - 1);
  EXPECT_EQ(this->rounded(INFINITY), infinity);
}

// The value of an e4m3 number from its definition; 0x7f and 0xff are NaN.
double e4m3_value(unsigned bits) {
  const int exponent = (bits >> 3) & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  const double sign = (bits & 0x80u) ? -1.0 : 1.0;
  return sign * std::ldexp(fraction + (exponent == 0 ? 0 : 8), std::max(exponent, 1) - 10);
}

unsigned e4m3_rounded(float x) {
  Float8E4M3 eight;
  store(x, &eight);
  return eight.bits;
}

TEST(Float8E4M3, EveryPatternLoadsAndStoresBack) {
  for (unsigned bits = 0; bits < 0x100u; ++bits) {
    const float loaded = load(Float8E4M3{static_cast<std::uint8_t>(bits)});
    if (std::isnan(e4m3_value(bits))) {
      EXPECT_TRUE(std::isnan(loaded)) << bits;
      EXPECT_EQ(e4m3_rounded(loaded), 0x7fu) << bits;
      continue;
    }
    EXPECT_EQ(loaded, e4m3_value(bits)) << bits;
    EXPECT_EQ(e4m3_rounded(loaded), bits);
  }
}

TEST(Float8E4M3, BetweenNeighboursRoundsToNearestEven) {
  for (unsigned bits = 0; bits < 0x7eu; ++bits) {
    const float middle = static_cast<float>((e4m3_value(bits) + e4m3_value(bits + 1)) / 2);
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    EXPECT_EQ(e4m3_rounded(middle), even) << bits;
    EXPECT_EQ(e4m3_rounded(-middle), even | 0x80u) << bits;
    EXPECT_EQ(e4m3_rounded(std::nextafter(middle, 0.0f)), bits) << bits;
    EXPECT_EQ(e4m3_rounded(std::nextafter(middle, INFINITY)), bits + 1) << bits;
  }
}

TEST(Float8E4M3, SaturatesAtTheLargestNumber) {
  for (float x : {448.0f, 449.0f, 464.0f, 480.0f, 1e30f, INFINITY}) {
    EXPECT_EQ(e4m3_rounded(x), 0x7eu) << x;
    EXPECT_EQ(e4m3_rounded(-x), 0xfeu) << x;
  }
}

}  // namespace
}  // namespace parallax::cpu
