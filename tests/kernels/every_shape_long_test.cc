// SPDX-License-Identifier: MIT
// Odd shapes, each with every mask and several groups of heads, zero-mean and shifted data, in
// every narrow dtype, against the oracle. Minutes.
#include <gtest/gtest.h>

#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr DType kNarrowDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

struct Shape {
  std::int64_t q_len, kv_len;
};

std::vector<Case> every_mask(DType dtype, Data data, Shape shape, std::int64_t group,
                             std::int64_t head_dim) {
  const AttentionProblem causal =
      problem_of(dtype, 1, shape.q_len, shape.kv_len, group, 1, head_dim);
  AttentionProblem full = causal, window = causal, ragged = causal;
  full.causal = false;
  window.window = 50;
  ragged.batch = 4;
  const auto len = static_cast<std::int32_t>(shape.kv_len);
  Lengths lengths;  // whole, empty, padded on the left, one key
  lengths.kv_lens = {len, 0, len, len};
  lengths.kv_start = {0, 0, len / 3, len - 1};
  std::vector<Case> cases = {{"causal", causal, {}, {}, {}, {}},
                             {"full", full, {}, {}, {}, {}},
                             {"window 50", window, {}, {}, {}, {}},
                             {"ragged", ragged, lengths, {}, {}, {}}};
  unsigned seed = 40;
  for (Case& c : cases) {
    c.inputs = random_inputs(c.problem, data, ++seed);
    c.name += ", " + std::string(name_of(dtype)) + ", " + std::to_string(shape.q_len) + "x" +
              std::to_string(shape.kv_len) + ", group " + std::to_string(group) +
              (data == Data::kShifted ? ", shifted" : "");
  }
  return cases;
}

void check(const Case& c) {
  const Expected expected(c);
  const Results ours = cpu_forward_backward(c, {2, 0});
  EXPECT_EQ(error_rule(c, ours, expected), "");
  if (c.problem.dtype == DType::kFloat16) return;
  // What statistics kept in plain form would lose on keys and values with a mean.
  const double bound = c.problem.dtype == DType::kFloat32 ? 1e-4 : 1e-2;
  EXPECT_LE(relative_error(ours.dq, expected.exact.dq), bound) << c.name;
  EXPECT_LE(relative_error(ours.dr, expected.exact.dr), bound) << c.name;
}

class EveryShape : public testing::TestWithParam<Shape> {};

TEST_P(EveryShape, WithEveryMaskAndGroup) {
  const Shape shape = GetParam();
  const bool large = shape.kv_len > 1000;
  for (DType dtype : kNarrowDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (std::int64_t group : {1, 3, 4, 8}) {
        if (large && group > 3) continue;
        for (const Case& c : every_mask(dtype, data, shape, group, large ? 16 : 64)) check(c);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, EveryShape,
                         testing::Values(Shape{1, 1}, Shape{17, 17}, Shape{63, 63}, Shape{64, 64},
                                         Shape{65, 65}, Shape{113, 203}, Shape{1023, 1024}),
                         [](const auto& info) {
                           return std::to_string(info.param.q_len) + "x" +
                                  std::to_string(info.param.kv_len);
                         });

}  // namespace
}  // namespace parallax::tests
