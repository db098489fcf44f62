// SPDX-License-Identifier: MIT
// The backward on the CPU against the definition's chain rule, finite differences, and what must be
// exactly so.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr DType kEveryDType[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                 DType::kFloat16};
constexpr DType kNarrowDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

Case case_of(const AttentionProblem& problem, Data data = Data::kZeroMean, Lengths lengths = {}) {
  return {"case", problem, std::move(lengths), random_inputs(problem, data, 12)};
}

struct Gradient {
  const char* name;
  Values Inputs::*input;
  Values Results::*output;
};
constexpr Gradient kGradients[] = {{"dq", &Inputs::q, &Results::dq},
                                   {"dr", &Inputs::r, &Results::dr},
                                   {"dk", &Inputs::k, &Results::dk},
                                   {"dv", &Inputs::v, &Results::dv}};

TEST(Backward, EqualsTheDefinitionInDouble) {
  for (Data data : {Data::kZeroMean, Data::kShifted}) {
    for (const Case& c : all_cases(DType::kFloat64, 24, data, 1024)) {
      const Results ours = cpu_forward_backward(c), exact = oracle(c);
      for (const Gradient& gradient : kGradients) {
        const double scale = std::max(1.0, largest(exact.*gradient.output));
        EXPECT_LE(distance(ours.*gradient.output, exact.*gradient.output), 1e-12 * scale)
            << c.name << " " << gradient.name;
      }
    }
  }
}

// The definition's own derivative, by differences along random directions, so that neither the
// kernel's formulas nor the oracle's chain rule are taken on trust.
TEST(Backward, EqualsDifferencesOfTheDefinition) {
  constexpr double kStep = 1e-5;
  for (const Case& c : all_cases(DType::kFloat64, 8, Data::kZeroMean, 65)) {
    const Results ours = cpu_forward_backward(c);
    unsigned seed = 100;
    for (const Gradient& gradient : kGradients) {
      const Values direction = random_inputs(c.problem, Data::kZeroMean, ++seed).*gradient.input;
      const auto loss_at = [&](double step) {
        Case moved = c;
        moved.inputs.d_o.clear();
        Values& input = moved.inputs.*gradient.input;
        for (std::size_t i = 0; i < input.size(); ++i) input[i] += step * direction[i];
        const Results results = oracle(moved);
        double loss = 0;
        for (std::size_t i = 0; i < results.o.size(); ++i) loss += results.o[i] * c.inputs.d_o[i];
        return loss;
      };
      double slope = 0;
      const Values& ours_of = ours.*gradient.output;
      for (std::size_t i = 0; i < direction.size(); ++i) slope += ours_of[i] * direction[i];
      const double difference = (loss_at(kStep) - loss_at(-kStep)) / (2 * kStep);
      EXPECT_NEAR(slope, difference, 1e-6 * std::max(1.0, std::abs(slope)))
          << c.name << " " << gradient.name;
    }
  }
}

TEST(Backward, HoldsTheErrorRuleInEveryNarrowDType) {
  for (DType dtype : kNarrowDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (const Case& c : all_cases(dtype, 32, data, 203)) {
        EXPECT_EQ(error_rule(c, cpu_forward_backward(c)), "");
      }
    }
  }
}

// Keys and values with means: where kernels that save plain statistics lose a digit or more.
TEST(Backward, ShiftedDataKeepsItsDigits) {
  const auto worst = [](DType dtype) {
    const Case c = case_of(problem_of(dtype, 1, 257, 257, 2, 1, 64), Data::kShifted);
    const Results ours = cpu_forward_backward(c), exact = oracle(c);
    double result = 0;
    for (const Gradient& gradient : kGradients) {
      result = std::max(result, relative_error(ours.*gradient.output, exact.*gradient.output));
    }
    return result;
  };
  EXPECT_LE(worst(DType::kFloat32), 1e-5);
  EXPECT_LE(worst(DType::kFloat16), 1e-3);
  EXPECT_LE(worst(DType::kBFloat16), 5e-3);
}

TEST(Backward, TakesEveryHeadDim) {
  for (std::int64_t head_dim : {8, 40, 64, 72, 128, 136, 256}) {
    const Case c = case_of(problem_of(DType::kFloat32, 1, 7, 70, 2, 1, head_dim));
    EXPECT_EQ(error_rule(c, cpu_forward_backward(c)), "") << head_dim;
  }
}

TEST(Backward, ARowThatSeesOneKeyHasNoQueryGradients) {
  for (DType dtype : kEveryDType) {
    AttentionProblem problem = problem_of(dtype, 1, 20, 20, 1, 1, 32);
    problem.window = 1;
    const Case c = case_of(problem, Data::kShifted);
    const Results ours = cpu_forward_backward(c);
    const Values zeros(c.inputs.q.size(), 0.0);
    EXPECT_EQ(ours.dq, zeros) << name_of(dtype);
    EXPECT_EQ(ours.dr, zeros) << name_of(dtype);
    EXPECT_EQ(ours.dk, zeros) << name_of(dtype);
    EXPECT_LE(distance(ours.dv, c.inputs.d_o), 1e-5) << name_of(dtype);
  }
}

TEST(Backward, WhatSeesNothingAndWhatIsNotSeenGetsZeros) {
  for (DType dtype : kEveryDType) {
    Lengths lengths;
    lengths.kv_lens = {3, 0};
    lengths.kv_start = {1, 0};
    const Case c = case_of(problem_of(dtype, 2, 5, 8, 1, 1, 8), Data::kShifted, lengths);
    const Results ours = cpu_forward_backward(c);
    const auto is_zero = [](const Values& values, std::size_t row) {
      return std::all_of(values.begin() + static_cast<std::ptrdiff_t>(row * 8),
                         values.begin() + static_cast<std::ptrdiff_t>(row * 8 + 8),
                         [](double value) { return value == 0.0; });
    };
    for (std::size_t row = 0; row < 10; ++row) {
      // Queries 3 and 4 of the first sequence see keys 1 and 1, 2.
      EXPECT_EQ(is_zero(ours.dq, row), row != 4) << row;
      EXPECT_EQ(is_zero(ours.dr, row), row != 4) << row;
    }
    for (std::size_t row = 0; row < 16; ++row) {
      const bool unseen = row != 1 && row != 2;
      EXPECT_EQ(is_zero(ours.dk, row), unseen) << row;
      EXPECT_EQ(is_zero(ours.dv, row), unseen) << row;
    }
  }
}

// Softmax attention's gradients come out of the general formula where r = 0.
TEST(Backward, ZeroProbeHasSoftmaxGradients) {
  Case c = case_of(problem_of(DType::kFloat64, 1, 30, 40, 2, 1, 8));
  std::fill(c.inputs.r.begin(), c.inputs.r.end(), 0.0);
  const Results ours = cpu_forward_backward(c), exact = oracle(c);
  EXPECT_LE(distance(ours.dq, exact.dq), 1e-13);
  EXPECT_LE(distance(ours.dk, exact.dk), 1e-13);
  EXPECT_LE(distance(ours.dv, exact.dv), 1e-13);
  EXPECT_GT(largest(ours.dr), 0.01);
}

TEST(Backward, PackedEqualsBatched) {
  for (DType dtype : kEveryDType) {
    const AttentionProblem problem = problem_of(dtype, 3, 40, 40, 6, 2, 16);
    const Case batched = case_of(problem, Data::kShifted);
    Case packed = packed_case(problem, {40, 40, 40}, {40, 40, 40}, Data::kShifted, 1);
    packed.inputs = batched.inputs;
    const Results a = cpu_forward_backward(batched), b = cpu_forward_backward(packed);
    EXPECT_EQ(a.o, b.o) << name_of(dtype);
    for (const Gradient& gradient : kGradients) {
      EXPECT_EQ(a.*gradient.output, b.*gradient.output) << name_of(dtype) << gradient.name;
    }
  }
}

TEST(Backward, ThreadsDoNotChangeABit) {
  for (DType dtype : kEveryDType) {
    for (const Case& c : all_cases(dtype, 16, Data::kShifted, 203)) {
      const Results one = cpu_forward_backward(c), four = cpu_forward_backward(c, {4, 0});
      for (const Gradient& gradient : kGradients) {
        EXPECT_EQ(one.*gradient.output, four.*gradient.output) << c.name << " " << gradient.name;
      }
    }
  }
}

TEST(Backward, NothingToDoIsNoError) {
  for (auto [batch, q_len, kv_len] : {std::tuple{0, 4, 4}, {2, 0, 4}, {2, 4, 0}, {0, 0, 0}}) {
    const Case c = case_of(problem_of(DType::kFloat32, batch, q_len, kv_len, 2, 1, 8));
    const Results ours = cpu_forward_backward(c);
    EXPECT_EQ(ours.dq, Values(c.inputs.q.size(), 0.0));
    EXPECT_EQ(ours.dv, Values(c.inputs.v.size(), 0.0));
  }
}

}  // namespace
}  // namespace parallax::tests
