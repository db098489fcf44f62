// SPDX-License-Identifier: MIT
// What a query does not see reaches nothing of it, whatever it holds, and what does not see a query
// takes nothing from it: 0 * NaN is NaN, so a zero weight does not hide anything. On every
// instruction set, and on the float64 kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kLen = 150, kHeadDim = 24, kGroup = 3;

// An element type, the kernels that run it, and a mask.
struct Way {
  DType dtype;
  How how;
  std::int64_t window;  // 0: plainly causal

  bool sees(std::int64_t i, std::int64_t j) const {
    return j <= i && (window == 0 || j > i - window);
  }
  std::string name() const {
    return std::string(name_of(dtype)) + (how.target ? std::string(" ") + how.target->name : "") +
           ", window " + std::to_string(window);
  }
};

std::vector<Way> every_way() {
  std::vector<Way> ways;
  const cpu::Targets targets = cpu::supported_targets();
  for (std::int64_t window : {0, 40}) {
    ways.push_back({DType::kFloat64, {}, window});
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (int i = 0; i < targets.size; ++i)
        ways.push_back({dtype, {1, 0, targets.list[i]}, window});
    }
  }
  return ways;
}

Case case_of(const Way& way) {
  AttentionProblem problem = problem_of(way.dtype, 1, kLen, kLen, kGroup, 1, kHeadDim);
  problem.window = way.window;
  return {"case", problem, {}, random_inputs(problem, Data::kShifted, 9), {}, {}};
}

// One element of every head of token i.
void set(Values& values, std::int64_t i, std::int64_t heads, double value) {
  for (std::int64_t h = 0; h < heads; ++h) {
    values[static_cast<std::size_t>((i * heads + h) * kHeadDim + 5 + h)] = value;
  }
}

enum class Like { kSame, kNear, kNaN, kAny };

// Tokens [0, kLen) of two results, row by row as `like` says.
template <class F>
void compare(const Values& ours, const Values& clean, std::int64_t heads, const F& like,
             const std::string& what) {
  const std::int64_t width = heads * kHeadDim;
  ASSERT_EQ(ours.size(), static_cast<std::size_t>(kLen * width));
  for (std::int64_t i = 0; i < kLen; ++i) {
    const auto row = [&](const Values& values) {
      return Values(values.begin() + i * width, values.begin() + (i + 1) * width);
    };
    const Values a = row(ours), b = row(clean);
    switch (like(i)) {
      case Like::kSame:
        ASSERT_EQ(a, b) << what << " of token " << i;
        break;
      case Like::kNear:
        ASSERT_LE(distance(a, b), 1e-2 * (1 + largest(b))) << what << " of token " << i;
        break;
      case Like::kAny:
        break;
      case Like::kNaN:
        ASSERT_TRUE(std::any_of(a.begin(), a.end(), [](double x) { return !std::isfinite(x); }))
            << what << " of token " << i;
    }
  }
}

TEST(Hidden, KeysAndValuesReachNoQueryThatDoesNotSeeThem) {
  constexpr std::int64_t kBad = 70;
  for (const Way& way : every_way()) {
    SCOPED_TRACE(way.name());
    const Case clean_case = case_of(way);
    const Results clean = cpu_forward_backward(clean_case, way.how);
    for (double bad : {kNaN, kInfinity}) {
      for (Values Inputs::*input : {&Inputs::k, &Inputs::v}) {
        Case c = clean_case;
        set(c.inputs.*input, kBad, 1, bad);
        const Results ours = cpu_forward_backward(c, way.how);
        const auto same_unless_seen = [&](std::int64_t i) {
          return way.sees(i, kBad) ? Like::kNaN : Like::kSame;
        };
        compare(ours.o, clean.o, kGroup, same_unless_seen, "o");
        // The reference key of dq and dr is a mean over keys that not every query sees.
        const auto near_unless_seen = [&](std::int64_t i) {
          return way.sees(i, kBad) ? Like::kNaN : Like::kNear;
        };
        compare(ours.dq, clean.dq, kGroup, near_unless_seen, "dq");
        compare(ours.dr, clean.dr, kGroup, near_unless_seen, "dr");
        const auto same_unless_shared = [&](std::int64_t j) {
          for (std::int64_t i = kBad; i < kLen; ++i) {
            if (way.sees(i, kBad) && way.sees(i, j)) return Like::kNaN;
          }
          return Like::kSame;
        };
        compare(ours.dk, clean.dk, 1, same_unless_shared, "dk");
        if (input == &Inputs::k) compare(ours.dv, clean.dv, 1, same_unless_shared, "dv");
      }
    }
  }
}

TEST(Hidden, QueriesReachNoKeyThatTheyDoNotSee) {
  constexpr std::int64_t kBad = 70;
  for (const Way& way : every_way()) {
    SCOPED_TRACE(way.name());
    const Case clean_case = case_of(way);
    const Results clean = cpu_forward_backward(clean_case, way.how);
    for (Values Inputs::*input : {&Inputs::q, &Inputs::r, &Inputs::d_o}) {
      Case c = clean_case;
      set(c.inputs.*input, kBad, kGroup, kNaN);
      const Results ours = cpu_forward_backward(c, way.how);
      const auto like_query = [&](std::int64_t i) { return i == kBad ? Like::kAny : Like::kSame; };
      compare(ours.o, clean.o, kGroup, like_query, "o");
      compare(ours.dq, clean.dq, kGroup, like_query, "dq");
      compare(ours.dr, clean.dr, kGroup, like_query, "dr");
      const auto like_key = [&](std::int64_t j) {
        return way.sees(kBad, j) ? Like::kNaN : Like::kSame;
      };
      compare(ours.dk, clean.dk, 1, like_key, "dk");
      compare(ours.dv, clean.dv, 1, like_key, "dv");
    }
  }
}

// Several new tokens: the last of the cache are hidden from the first of them.
TEST(Hidden, DecodeSeesNothingOfLaterTokens) {
  constexpr std::int64_t kQueries = 5, kRow = 2 * kGroup * kHeadDim;
  for (const Way& way : every_way()) {
    SCOPED_TRACE(way.name());
    Case c;
    c.problem = problem_of(way.dtype, 1, kQueries, kLen, 2 * kGroup, 2, kHeadDim);
    c.problem.window = way.window;
    c.lengths.kv_lens = {static_cast<std::int32_t>(kLen)};
    c.inputs = random_inputs(c.problem, Data::kShifted, 4);
    c.inputs.d_o.clear();
    const Results clean = cpu_decode(c, way.how);
    for (std::int64_t bad = kLen - kQueries; bad < kLen; ++bad) {
      for (Values Inputs::*input : {&Inputs::k, &Inputs::v}) {
        Case poisoned = c;
        set(poisoned.inputs.*input, bad, 2, kNaN);
        const Results ours = cpu_decode(poisoned, way.how);
        for (std::int64_t i = 0; i < kQueries; ++i) {
          const auto at = static_cast<std::ptrdiff_t>(i * kRow);
          const Values a(ours.o.begin() + at, ours.o.begin() + at + kRow);
          const Values b(clean.o.begin() + at, clean.o.begin() + at + kRow);
          if (way.sees(kLen - kQueries + i, bad)) {
            EXPECT_FALSE(distance(a, b) < kInfinity) << i << " sees " << bad;
          } else {
            EXPECT_EQ(a, b) << i << " does not see " << bad;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace parallax::tests
