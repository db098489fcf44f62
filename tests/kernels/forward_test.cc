// SPDX-License-Identifier: MIT
// The forward on the CPU against the definition, and against what must be exactly so.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kEveryDType[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                 DType::kFloat16};
constexpr DType kNarrowDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

Case case_of(const AttentionProblem& problem, Data data = Data::kZeroMean, Lengths lengths = {}) {
  return {"case", problem, std::move(lengths), random_inputs(problem, data, 11)};
}

TEST(Forward, EqualsTheDefinitionInDouble) {
  for (Data data : {Data::kZeroMean, Data::kShifted}) {
    for (Case& c : all_cases(DType::kFloat64, 24, data, 1024)) {
      c.inputs.d_o.clear();
      const Results ours = cpu_forward(c), exact = oracle(c);
      EXPECT_LE(distance(ours.o, exact.o), 1e-12) << c.name;
      EXPECT_LE(distance(ours.v_bar, exact.v_bar), 1e-12) << c.name;
      EXPECT_LE(distance(ours.lse, exact.lse), 1e-12) << c.name;
      EXPECT_LE(distance(ours.t_bar, exact.t_bar), 1e-12) << c.name;
    }
  }
}

TEST(Forward, HoldsTheErrorRuleInEveryNarrowDType) {
  for (DType dtype : kNarrowDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (Case& c : all_cases(dtype, 64, data, 203)) {
        c.inputs.d_o.clear();
        EXPECT_EQ(error_rule(c, cpu_forward(c)), "");
      }
    }
  }
}

TEST(Forward, TakesEveryHeadDim) {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    const Case c = case_of(problem_of(DType::kFloat32, 1, 7, 70, 2, 1, head_dim));
    EXPECT_EQ(error_rule(c, cpu_forward(c)), "") << head_dim;
  }
}

TEST(Forward, ZeroProbeIsSoftmaxAttention) {
  for (DType dtype : kEveryDType) {
    Case c = case_of(problem_of(dtype, 2, 20, 80, 4, 2, 16));
    std::fill(c.inputs.r.begin(), c.inputs.r.end(), 0.0);
    const Results ours = cpu_forward(c);
    EXPECT_EQ(ours.o, ours.v_bar) << name_of(dtype);
    EXPECT_EQ(ours.t_bar, Values(ours.t_bar.size(), 0.0)) << name_of(dtype);
  }
}

TEST(Forward, ConstantValuesComeBack) {
  Case c = case_of(problem_of(DType::kFloat64, 1, 9, 200, 2, 1, 8), Data::kShifted);
  std::fill(c.inputs.v.begin(), c.inputs.v.end(), 1.75);
  EXPECT_LE(distance(cpu_forward(c).o, Values(c.inputs.q.size(), 1.75)), 1e-13);
}

// A vector orthogonal to every q, added to every key, moves each row's t by a constant and nothing
// else: o must not follow, t_bar must.
TEST(Forward, AConstantOnTheProbesOfARowChangesNothing) {
  Case c = case_of(problem_of(DType::kFloat64, 1, 30, 150, 1, 1, 16));
  for (std::size_t i = 0; i < c.inputs.q.size(); i += 16) c.inputs.q[i] = 0;
  for (std::size_t i = 0; i < c.inputs.r.size(); i += 16) c.inputs.r[i] = 2;
  const Results before = cpu_forward(c);
  for (std::size_t i = 0; i < c.inputs.k.size(); i += 16) c.inputs.k[i] += 50;
  const Results after = cpu_forward(c);
  EXPECT_LE(distance(before.o, after.o), 1e-11);
  for (std::size_t i = 0; i < before.t_bar.size(); ++i) {
    EXPECT_NEAR(after.t_bar[i], before.t_bar[i] + 100, 1e-11);
  }
}

TEST(Forward, ARowThatSeesOneKeyGivesItsValueExactly) {
  for (DType dtype : kEveryDType) {
    AttentionProblem problem = problem_of(dtype, 1, 20, 20, 1, 1, 32);
    problem.window = 1;
    const Case c = case_of(problem, Data::kShifted);
    const Results ours = cpu_forward(c);
    EXPECT_EQ(ours.o, c.inputs.v) << name_of(dtype);
    EXPECT_EQ(ours.v_bar, c.inputs.v) << name_of(dtype);
  }
}

TEST(Forward, ARowThatSeesNoKeyGivesZeros) {
  for (DType dtype : kEveryDType) {
    Lengths lengths;
    lengths.kv_lens = {3, 0};
    const Case c = case_of(problem_of(dtype, 2, 5, 8, 1, 1, 8), Data::kShifted, lengths);
    const Results ours = cpu_forward(c);
    for (std::size_t row = 0; row < 10; ++row) {
      const bool sees_none = row < 2 || row >= 5;
      EXPECT_EQ(ours.lse[row] == -kInfinity, sees_none);
      if (!sees_none) continue;
      EXPECT_EQ(ours.t_bar[row], 0.0);
      for (std::size_t d = 0; d < 8; ++d) {
        EXPECT_EQ(ours.o[row * 8 + d], 0.0);
        EXPECT_EQ(ours.v_bar[row * 8 + d], 0.0);
      }
    }
  }
}

TEST(Forward, TheOrderOfKeysDoesNotMatter) {
  AttentionProblem problem = problem_of(DType::kFloat64, 1, 5, 100, 1, 1, 8);
  problem.causal = false;
  const Case c = case_of(problem, Data::kShifted);
  Case reversed = c;
  for (std::size_t j = 0; j < 100; ++j) {
    for (std::size_t d = 0; d < 8; ++d) {
      reversed.inputs.k[j * 8 + d] = c.inputs.k[(99 - j) * 8 + d];
      reversed.inputs.v[j * 8 + d] = c.inputs.v[(99 - j) * 8 + d];
    }
  }
  EXPECT_LE(distance(cpu_forward(c).o, cpu_forward(reversed).o), 1e-12);
}

TEST(Forward, PackedEqualsEachSequenceAlone) {
  for (DType dtype : kEveryDType) {
    const Case packed = packed_case(problem_of(dtype, 0, 0, 0, 4, 2, 16), {5, 70, 1}, {9, 70, 130},
                                    Data::kShifted, 3);
    const Results together = cpu_forward(packed);
    for (std::size_t b = 0; b < 3; ++b) {
      const auto cut = [&](const Values& values, const std::vector<std::int32_t>& offsets,
                           std::int64_t row) {
        return Values(values.begin() + offsets[b] * row, values.begin() + offsets[b + 1] * row);
      };
      const Lengths& lengths = packed.lengths;
      Case alone;
      alone.problem = problem_of(dtype, 1, q_len_of(packed, static_cast<std::int64_t>(b)),
                                 kv_len_of(packed, static_cast<std::int64_t>(b)), 4, 2, 16);
      alone.inputs.q = cut(packed.inputs.q, lengths.cu_seqlens_q, 64);
      alone.inputs.r = cut(packed.inputs.r, lengths.cu_seqlens_q, 64);
      alone.inputs.k = cut(packed.inputs.k, lengths.cu_seqlens_k, 32);
      alone.inputs.v = cut(packed.inputs.v, lengths.cu_seqlens_k, 32);
      EXPECT_EQ(cpu_forward(alone).o, cut(together.o, lengths.cu_seqlens_q, 64)) << name_of(dtype);
    }
  }
}

TEST(Forward, PagesEqualAContiguousCache) {
  for (DType dtype : kEveryDType) {
    for (int page_size : {1, 2, 16, 64, 256}) {
      Lengths lengths;
      lengths.kv_lens = {100, 0, 37};
      lengths.kv_start = {0, 0, 5};
      const Case c = case_of(problem_of(dtype, 3, 20, 100, 6, 2, 16), Data::kShifted, lengths);
      EXPECT_EQ(cpu_forward(c).o, cpu_forward(c, {1, page_size}).o)
          << name_of(dtype) << ", pages of " << page_size;
    }
  }
}

// An FP8 cache is one of the problem's dtype that holds its elements times their scales.
TEST(Forward, AnFp8CacheEqualsItsWidenedSelf) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (std::int64_t head_dim : {8, 40}) {
      for (Case& c : all_cases(dtype, head_dim, Data::kShifted, 203)) {
        if (c.problem.packed) continue;
        quantise_cache(&c);
        const Results expected = cpu_forward(widened(c));
        for (const How& how : {How{1, 0}, How{4, 0}, How{1, 1}, How{4, 16}, How{1, 256}}) {
          const Results ours = cpu_forward(c, how);
          EXPECT_EQ(ours.o, expected.o) << c.name << ", pages of " << how.page_size;
          EXPECT_EQ(ours.v_bar, expected.v_bar) << c.name << ", pages of " << how.page_size;
          EXPECT_EQ(ours.lse, expected.lse) << c.name << ", pages of " << how.page_size;
          EXPECT_EQ(ours.t_bar, expected.t_bar) << c.name << ", pages of " << how.page_size;
        }
      }
    }
  }
}

TEST(Forward, Fp8CachesAndTheirScalesAreRefusedByName) {
  AttentionProblem problem = problem_of(DType::kFloat32, 1, 20, 20, 2, 1, 16);
  problem.kv_dtype = DType::kFloat8E4M3;
  ForwardPlan forward;
  ASSERT_TRUE(plan(problem, {}, &forward).ok());
  std::vector<float> memory(4096, 1.0f);
  const ConstView view{memory.data(), 640, 32, 16};
  ForwardArgs args;
  args.q = args.r = args.k = args.v = view;
  args.o = {memory.data(), 640, 32, 16};
  std::vector<std::max_align_t> workspace(workspace_bytes(forward) / sizeof(std::max_align_t) + 8);
  const auto refusal = [&](const ForwardPlan& of) {
    void* start = workspace.data();
    std::size_t space = workspace.size() * sizeof(std::max_align_t);
    return run(of, args, std::align(64, workspace_bytes(of), start, space), parallel_for(1))
        .message();
  };
  EXPECT_EQ(refusal(forward).rfind("k_scale: ", 0), 0u) << refusal(forward);
  const float good = 0.5f, bad = 0.0f;
  args.k_scale = &good;
  EXPECT_EQ(refusal(forward).rfind("v_scale: ", 0), 0u) << refusal(forward);
  args.v_scale = &bad;
  EXPECT_EQ(refusal(forward).rfind("v_scale[0]: ", 0), 0u) << refusal(forward);
  problem.kv_dtype.reset();
  ForwardPlan plain;
  ASSERT_TRUE(plan(problem, {}, &plain).ok());
  EXPECT_EQ(refusal(plain).rfind("k_scale: ", 0), 0u) << refusal(plain);
  problem.kv_dtype = DType::kFloat8E4M3;
  problem.packed = true;
  EXPECT_EQ(plan(problem, {}, &plain).message().rfind("kv_dtype: ", 0), 0u);
  problem.packed = false;
  problem.dtype = DType::kFloat64;
  EXPECT_EQ(plan(problem, {}, &plain).message().rfind("kv_dtype: ", 0), 0u);
}

TEST(Forward, ThreadsDoNotChangeABit) {
  for (DType dtype : kEveryDType) {
    for (const Case& c : all_cases(dtype, 16, Data::kShifted, 203)) {
      const Results one = cpu_forward(c), four = cpu_forward(c, {4, 0});
      EXPECT_EQ(one.o, four.o) << c.name;
      EXPECT_EQ(one.lse, four.lse) << c.name;
      EXPECT_EQ(one.t_bar, four.t_bar) << c.name;
    }
  }
}

TEST(Forward, NothingToDoIsNoError) {
  for (auto [batch, q_len, kv_len] : {std::tuple{0, 4, 4}, {2, 0, 4}, {2, 4, 0}, {0, 0, 0}}) {
    const Case c = case_of(problem_of(DType::kFloat32, batch, q_len, kv_len, 2, 1, 8));
    const Results ours = cpu_forward(c);
    EXPECT_EQ(ours.o, Values(c.inputs.q.size(), 0.0));
  }
}

}  // namespace
}  // namespace parallax::tests
