// SPDX-License-Identifier: MIT
// The blocked kernels of every instruction set that this processor has, against the oracle: what
// run() would choose elsewhere is tested here too.
#include <gtest/gtest.h>

#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr DType kNarrowDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

struct Output {
  const char* name;
  Values Results::*values;
};
constexpr Output kOutputs[] = {{"o", &Results::o},     {"v_bar", &Results::v_bar},
                               {"lse", &Results::lse}, {"t_bar", &Results::t_bar},
                               {"dq", &Results::dq},   {"dr", &Results::dr},
                               {"dk", &Results::dk},   {"dv", &Results::dv}};

class Blocked : public testing::TestWithParam<const cpu::Target*> {
 protected:
  How how(int num_threads = 1) const { return {num_threads, 0, GetParam()}; }
};

std::vector<const cpu::Target*> every_target() {
  const cpu::Targets targets = cpu::supported_targets();
  return {targets.list, targets.list + targets.size};
}

INSTANTIATE_TEST_SUITE_P(Targets, Blocked, testing::ValuesIn(every_target()),
                         [](const auto& info) { return std::string(info.param->name); });

Case case_of(const AttentionProblem& problem, Data data = Data::kZeroMean, Lengths lengths = {}) {
  return {"case", problem, std::move(lengths), random_inputs(problem, data, 5)};
}

TEST_P(Blocked, HoldsTheErrorRule) {
  for (DType dtype : kNarrowDTypes) {
    for (const Case& c : all_cases(dtype, 24, Data::kShifted, 203)) {
      EXPECT_EQ(error_rule(c, cpu_forward_backward(c, how())), "");
    }
  }
}

TEST_P(Blocked, HoldsTheErrorRuleAtTheSizesOfBlocksAndTiles) {
  for (std::int64_t len : {95, 96, 97, 191, 193, 300}) {
    for (std::int64_t group : {1, 5}) {
      const Case c = case_of(problem_of(DType::kFloat32, 1, len, len, group, 1, 8));
      EXPECT_EQ(error_rule(c, cpu_forward_backward(c, how())), "") << len << " " << group;
    }
  }
  // Windows narrower and wider than a tile, over several tiles.
  for (std::int64_t window : {3, 96, 100, 250}) {
    AttentionProblem problem = problem_of(DType::kFloat32, 1, 300, 420, 2, 1, 8);
    problem.window = window;
    const Case c = case_of(problem, Data::kShifted);
    EXPECT_EQ(error_rule(c, cpu_forward_backward(c, how())), "") << window;
  }
}

// A group of heads wider than a block of rows.
TEST_P(Blocked, TakesAnyGroup) {
  for (std::int64_t group : {3, 100}) {
    const Case c = case_of(problem_of(DType::kFloat32, 1, 5, 20, group, 1, 16), Data::kShifted);
    EXPECT_EQ(error_rule(c, cpu_forward_backward(c, how())), "") << group;
  }
}

TEST_P(Blocked, TakesEveryHeadDim) {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    const Case c = case_of(problem_of(DType::kFloat32, 1, 9, 40, 1, 1, head_dim));
    EXPECT_EQ(error_rule(c, cpu_forward_backward(c, how())), "") << head_dim;
  }
}

TEST_P(Blocked, ShiftedDataKeepsItsDigits) {
  for (std::int64_t head_dim : {64, 128}) {
    for (auto [dtype, bound] :
         {std::pair{DType::kFloat32, 1e-5}, {DType::kFloat16, 1e-3}, {DType::kBFloat16, 5e-3}}) {
      const Case c = case_of(problem_of(dtype, 1, 257, 257, 1, 1, head_dim), Data::kShifted);
      const Results ours = cpu_forward_backward(c, how()), exact = oracle(c);
      for (const Output& output : kOutputs) {
        EXPECT_LE(relative_error(ours.*output.values, exact.*output.values), bound)
            << output.name << " " << name_of(dtype) << " " << head_dim;
      }
    }
  }
}

// One task per unit, several units per thread, and units cut into chunks along diagonals.
TEST_P(Blocked, ThreadsDoNotChangeABit) {
  std::vector<Case> cases;
  for (bool causal : {true, false}) {
    AttentionProblem problem = problem_of(DType::kFloat32, 2, 500, 700, 3, 1, 8);
    problem.causal = causal;
    Lengths lengths;
    lengths.kv_lens = {700, 431};
    lengths.kv_start = {0, 100};
    cases.push_back(case_of(problem, Data::kShifted, lengths));
  }
  AttentionProblem windowed = problem_of(DType::kBFloat16, 1, 900, 1100, 2, 2, 8);
  windowed.window = 150;
  cases.push_back(case_of(windowed));
  cases.push_back(packed_case(problem_of(DType::kFloat32, 0, 0, 0, 4, 2, 8), {400, 1, 0, 250},
                              {400, 1, 7, 300}, Data::kShifted, 3));
  for (const Case& c : cases) {
    const Results one = cpu_forward_backward(c, how());
    for (int num_threads : {2, 3, 16}) {
      const Results many = cpu_forward_backward(c, how(num_threads));
      for (const Output& output : kOutputs) {
        EXPECT_EQ(one.*output.values, many.*output.values) << output.name << " " << num_threads;
      }
    }
  }
}

TEST_P(Blocked, OneVisibleKeyIsExact) {
  for (DType dtype : kNarrowDTypes) {
    AttentionProblem problem = problem_of(dtype, 1, 120, 120, 2, 1, 40);
    problem.window = 1;
    const Case c = case_of(problem, Data::kShifted);
    const Results ours = cpu_forward_backward(c, how());
    EXPECT_EQ(ours.o, ours.v_bar);
    for (std::size_t i = 0; i < ours.o.size(); ++i) {
      ASSERT_EQ(ours.o[i], c.inputs.v[i / 80 * 40 + i % 40]);
    }
    const Values zeros(ours.dq.size(), 0.0);
    EXPECT_EQ(ours.dq, zeros);
    EXPECT_EQ(ours.dr, zeros);
  }
}

// Logits of several thousand: p underflows to zero and never to something small and wrong. (lse is
// one float, so p itself keeps four digits in the backward; the error rule asks for more.)
TEST_P(Blocked, LargeLogits) {
  Case c = case_of(problem_of(DType::kFloat32, 1, 130, 130, 1, 1, 16));
  for (double& q : c.inputs.q) q *= 1000;
  for (double& q : c.inputs.q) q = round_to(DType::kFloat32, q);
  const Results ours = cpu_forward_backward(c, how()), exact = oracle(c);
  for (const Output& output : kOutputs) {
    EXPECT_LE(relative_error(ours.*output.values, exact.*output.values), 1e-4) << output.name;
  }
}

}  // namespace
}  // namespace parallax::tests
