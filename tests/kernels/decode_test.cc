// SPDX-License-Identifier: MIT
// Decode on the CPU: a cache, few new tokens, pages, states that merge, and append_kv.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "kernels/cpu/element.h"
#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

constexpr DType kEveryDType[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                 DType::kFloat16};

double tolerance_of(DType dtype) { return dtype == DType::kFloat64 ? 1e-12 : 1e-4; }

std::vector<Case> decode_cases(DType dtype, Data data) {
  std::vector<Case> cases;
  for (std::int64_t q_len : {1, 2, 5}) {
    cases.push_back(ragged_case(dtype, q_len, 2, 2, 16, 0, data));
    cases.push_back(ragged_case(dtype, q_len, 6, 2, 64, 0, data));
    cases.push_back(ragged_case(dtype, q_len, 8, 1, 40, 70, data));
  }
  cases.push_back(ragged_case(dtype, 32, 3, 1, 16, 0, data));
  for (std::int64_t head_dim : {8, 128, 200, 256}) {
    cases.push_back(ragged_case(dtype, 1, 4, 1, head_dim, 0, data));
  }
  for (std::int64_t window : {1, 64, 65}) {
    cases.push_back(ragged_case(dtype, 3, 3, 1, 24, window, data));
  }
  cases.push_back(ragged_case(dtype, 4, 17, 1, 24, 0, data));
  cases.push_back(ragged_case(dtype, 4, 2, 1, 24, 0, data));
  cases.back().problem.causal = false;
  cases.back().name += ", full";
  return cases;
}

TEST(Decode, EqualsTheDefinition) {
  for (DType dtype : kEveryDType) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (const Case& c : decode_cases(dtype, data)) {
        const Expected expected(c);
        const Results ours = cpu_decode(c), &exact = expected.exact;
        EXPECT_EQ(error_rule(c, ours, expected), "");
        EXPECT_LE(distance(ours.lse, exact.lse), tolerance_of(dtype)) << c.name;
        EXPECT_LE(distance(ours.t_bar, exact.t_bar),
                  tolerance_of(dtype) * std::max(1.0, largest(exact.t_bar)))
            << c.name;
      }
    }
  }
}

// Caches long enough for several splits of several blocks of heads, on every instruction set.
std::vector<Case> long_cases(DType dtype, Data data) {
  std::vector<Case> cases;
  for (auto [q_len, num_q_heads, num_kv_heads, head_dim] :
       {std::tuple{1, 8, 8, 128}, {3, 8, 4, 256}, {2, 9, 9, 120}}) {
    Case c;
    c.problem = problem_of(dtype, 2, q_len, 1600, num_q_heads, num_kv_heads, head_dim);
    c.lengths.kv_lens = {1600, 1025};
    c.lengths.kv_start = {0, 511};
    c.inputs = random_inputs(c.problem, data, 31);
    c.inputs.d_o.clear();
    c.name = std::to_string(num_q_heads) + " heads of " + std::to_string(head_dim);
    cases.push_back(std::move(c));
  }
  cases[1].problem.window = 900;
  return cases;
}

TEST(Decode, LongCachesOnEveryInstructionSet) {
  const cpu::Targets targets = cpu::supported_targets();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Case& c : long_cases(dtype, Data::kShifted)) {
      const Expected expected(c);
      const Results& exact = expected.exact;
      for (int i = 0; i < targets.size; ++i) {
        const Results ours = cpu_decode(c, {3, 0, targets.list[i]});
        EXPECT_EQ(error_rule(c, ours, expected), "") << targets.list[i]->name;
        EXPECT_LE(distance(ours.lse, exact.lse), 1e-4) << targets.list[i]->name << " " << c.name;
        EXPECT_LE(distance(ours.t_bar, exact.t_bar), 1e-4 * largest(exact.t_bar)) << c.name;
        EXPECT_EQ(ours.o, cpu_decode(c, {1, 64, targets.list[i]}).o) << "pages, " << c.name;
      }
    }
  }
}

TEST(Decode, EveryInstructionSetHoldsTheErrorRule) {
  const cpu::Targets targets = cpu::supported_targets();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Case& c : decode_cases(dtype, Data::kShifted)) {
      const Expected expected(c);
      for (int i = 1; i < targets.size; ++i) {  // the first is what run() chooses
        EXPECT_EQ(error_rule(c, cpu_decode(c, {1, 0, targets.list[i]}), expected), "")
            << targets.list[i]->name;
      }
    }
  }
}

TEST(Decode, PagesEqualAContiguousCache) {
  for (DType dtype : kEveryDType) {
    for (int page_size : {1, 2, 8, 16, 64, 256}) {
      const Case c = ragged_case(dtype, 3, 6, 2, 16, 0, Data::kShifted);
      const Results whole = cpu_decode(c), paged = cpu_decode(c, {1, page_size});
      EXPECT_EQ(whole.o, paged.o) << name_of(dtype) << ", pages of " << page_size;
      EXPECT_EQ(whole.lse, paged.lse);
      EXPECT_EQ(whole.t_bar, paged.t_bar);
    }
  }
}

TEST(Decode, ThreadsDoNotChangeABit) {
  for (DType dtype : kEveryDType) {
    for (const Case& c : decode_cases(dtype, Data::kShifted)) {
      const Results one = cpu_decode(c), four = cpu_decode(c, {4, 0});
      EXPECT_EQ(one.o, four.o) << c.name;
      EXPECT_EQ(one.lse, four.lse) << c.name;
    }
  }
}

TEST(Decode, ASequenceDoesNotDependOnItsBatch) {
  const Case together = ragged_case(DType::kFloat32, 2, 4, 2, 16, 0, Data::kShifted);
  const Results all = cpu_decode(together);
  const std::size_t q_row = 2 * 4 * 16, kv_row = 300 * 2 * 16;
  for (std::size_t b = 0; b < 7; ++b) {
    Case alone = together;
    const auto keep = [&](Values* values, std::size_t row) {
      *values = Values(values->begin() + static_cast<std::ptrdiff_t>(b * row),
                       values->begin() + static_cast<std::ptrdiff_t>((b + 1) * row));
    };
    alone.problem.batch = 1;
    alone.lengths.kv_lens = {together.lengths.kv_lens[b]};
    alone.lengths.kv_start = {together.lengths.kv_start[b]};
    keep(&alone.inputs.q, q_row);
    keep(&alone.inputs.r, q_row);
    keep(&alone.inputs.k, kv_row);
    keep(&alone.inputs.v, kv_row);
    Values expected = all.o;
    keep(&expected, q_row);
    EXPECT_EQ(cpu_decode(alone).o, expected) << b;
  }
}

TEST(Decode, ARowThatSeesOneKeyGivesItsValueExactly) {
  for (DType dtype : kEveryDType) {
    Case c = ragged_case(dtype, 1, 1, 1, 32, 1, Data::kShifted);
    const Results ours = cpu_decode(c);
    for (std::size_t b = 0; b < 7; ++b) {
      const std::int64_t last = c.lengths.kv_lens[b] - 1;
      for (std::size_t d = 0; d < 32; ++d) {
        const std::size_t at =
            (b * 300 + static_cast<std::size_t>(std::max<std::int64_t>(last, 0)));
        const double expected = last < 0 ? 0.0 : c.inputs.v[at * 32 + d];
        EXPECT_EQ(ours.o[b * 32 + d], expected) << b;
      }
    }
  }
}

TEST(Decode, AnExportedStateFinalizesToTheOutput) {
  for (DType dtype : kEveryDType) {
    for (const Case& c : decode_cases(dtype, Data::kShifted)) {
      const Results direct = cpu_decode(c);
      const Results through = cpu_finalize(c.problem, cpu_decode_state(c));
      // An uncentred state carries t as it is (docs/math.md section 5).
      const double rounding = dtype == DType::kBFloat16  ? 0x1p-7
                              : dtype == DType::kFloat16 ? 0x1p-10
                                                         : 0;
      const double tolerance =
          rounding * largest(direct.o) + 1e-6 * (1 + largest(direct.t_bar) * largest(c.inputs.v));
      EXPECT_LE(distance(direct.o, through.o), tolerance) << c.name << " " << name_of(dtype);
      EXPECT_LE(distance(direct.lse, through.lse), 1e-4) << c.name;
      EXPECT_LE(distance(direct.t_bar, through.t_bar), 1e-4) << c.name;
    }
  }
}

// Context parallelism in small: the cache cut at random places, a state from each part, merged.
TEST(Decode, StatesOfAnySplitOfTheCacheMergeToTheWhole) {
  std::mt19937 generator(5);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (int repeat = 0; repeat < 10; ++repeat) {
      Case c;
      c.problem = problem_of(dtype, 1, 1, 200, 4, 2, 16);
      c.lengths.kv_lens = {200};
      c.inputs = random_inputs(c.problem, Data::kShifted, generator());
      c.inputs.d_o.clear();
      std::vector<std::int32_t> cuts = {0, 200};
      for (int i = 0; i < 4; ++i) cuts.push_back(static_cast<std::int32_t>(generator() % 201));
      std::sort(cuts.begin(), cuts.end());
      std::vector<OwnedState> states;
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        Case part = c;
        part.lengths.kv_start = {cuts[i]};
        part.lengths.kv_lens = {cuts[i + 1]};
        states.push_back(cpu_decode_state(part));
      }
      std::vector<StateView> views;
      for (OwnedState& state : states) views.push_back(state.view());
      OwnedState merged(c.problem);
      ASSERT_TRUE(merge_states(c.problem, views.data(), static_cast<int>(views.size()),
                               merged.view(), parallel_for(2))
                      .ok());
      const Results ours = cpu_finalize(c.problem, merged);
      EXPECT_EQ(error_rule(c, ours), "") << repeat;
      EXPECT_LE(distance(ours.lse, oracle(c).lse), 1e-4);
    }
  }
}

// A cascade: several queries over a prefix that all of them see, and over what follows it.
TEST(Decode, ASharedPrefixMergesWithWhatFollows) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Case c;
    c.problem = problem_of(dtype, 2, 4, 200, 4, 2, 16);
    c.lengths.kv_lens = {200, 131};
    c.inputs = random_inputs(c.problem, Data::kShifted, 6);
    c.inputs.d_o.clear();
    Case prefix = c, rest = c;
    prefix.problem.causal = false;
    prefix.lengths.kv_lens = rest.lengths.kv_start = {100, 100};
    OwnedState of_prefix = cpu_decode_state(prefix), of_rest = cpu_decode_state(rest);
    const StateView states[] = {of_prefix.view(), of_rest.view()};
    const StateView merged = states[0];  // in place
    ASSERT_TRUE(merge_states(c.problem, states, 2, merged, parallel_for(1)).ok());
    const Results ours = cpu_finalize(c.problem, of_prefix);
    EXPECT_EQ(error_rule(c, ours), "") << name_of(dtype);
    EXPECT_LE(distance(ours.lse, oracle(c).lse), 1e-4) << name_of(dtype);
  }
}

// What any cache of e4m3 numbers gives is as exact as what the same numbers in dtype would give.
TEST(Decode, AnFp8CacheHoldsTheErrorRuleOnEveryInstructionSet) {
  const cpu::Targets targets = cpu::supported_targets();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    std::vector<Case> cases = decode_cases(dtype, Data::kShifted);
    if (dtype == DType::kBFloat16) {
      for (Case& c : long_cases(dtype, Data::kZeroMean)) cases.push_back(std::move(c));
    }
    for (Case& c : cases) {
      quantise_cache(&c);
      const Expected expected(c);
      for (int i = 0; i < targets.size; ++i) {
        const Results ours = cpu_decode(c, {2, 0, targets.list[i]});
        EXPECT_EQ(error_rule(c, ours, expected), "") << targets.list[i]->name;
        EXPECT_LE(distance(ours.lse, expected.exact.lse), 1e-4) << c.name;
        EXPECT_EQ(ours.o, cpu_decode(c, {1, 16, targets.list[i]}).o) << "pages, " << c.name;
      }
    }
  }
}

// What the cache itself loses, against attention over the numbers that were there before: the table
// in docs/math.md section 11.
TEST(Decode, AnFp8CacheCostsWhatTheDocumentsSay) {
  struct Row {
    std::int64_t kv_len;
    Data data;
    double bf16, fp8, fp8_softmax;  // relative errors of o, Frobenius
  };
  const Row rows[] = {{256, Data::kZeroMean, 2.4e-3, 5.0e-2, 3.7e-2},
                      {256, Data::kShifted, 1.9e-3, 7.0e-2, 1.1e-2},
                      {4096, Data::kZeroMean, 2.4e-3, 4.6e-2, 3.8e-2},
                      {4096, Data::kShifted, 1.8e-3, 2.0e-2, 3.1e-3}};
  for (const Row& row : rows) {
    Case c;
    c.name = std::to_string(row.kv_len) + " keys";
    c.problem = problem_of(DType::kBFloat16, 4, 1, row.kv_len, 4, 4, 128);
    c.lengths.kv_lens.assign(4, static_cast<std::int32_t>(row.kv_len));
    c.inputs = random_inputs(c.problem, row.data, 17);
    c.inputs.d_o.clear();
    const auto errors = [](const Case& plain) {
      Case fp8 = plain;
      quantise_cache(&fp8);
      const Values exact = oracle(plain).o;
      return std::pair(relative_error(cpu_decode(plain).o, exact),
                       relative_error(cpu_decode(fp8).o, exact));
    };
    Case softmax = c;
    std::fill(softmax.inputs.r.begin(), softmax.inputs.r.end(), 0.0);
    const auto [bf16, fp8] = errors(c);
    const double fp8_softmax = errors(softmax).second;
    EXPECT_LE(bf16, 1.1 * row.bf16) << c.name;
    EXPECT_NEAR(fp8 / row.fp8, 1, 0.1) << c.name;
    EXPECT_NEAR(fp8_softmax / row.fp8_softmax, 1, 0.1) << c.name;
  }
}

TEST(Decode, EveryE4M3NumberMeansTheSameOnEveryInstructionSet) {
  // One visible key each: o is its value, exactly.
  const cpu::Targets targets = cpu::supported_targets();
  Case c;
  c.problem = problem_of(DType::kFloat32, 8, 1, 1, 1, 1, 32);
  c.lengths.kv_lens.assign(8, 1);
  c.inputs = random_inputs(c.problem, Data::kZeroMean, 3);
  for (unsigned bits = 0; bits < 256; ++bits) {
    const bool nan = (bits & 0x7fu) == 0x7fu;
    c.inputs.v[bits] = nan ? 0 : cpu::load(cpu::Float8E4M3{static_cast<std::uint8_t>(bits)});
  }
  c.problem.kv_dtype = DType::kFloat8E4M3;
  c.k_scale = {1.0f};
  c.v_scale = {3.0f};
  Values expected = c.inputs.v;
  for (double& value : c.inputs.v) value *= 3;
  for (double& value : expected) value *= 3;
  for (int i = 0; i < targets.size; ++i) {
    EXPECT_EQ(cpu_decode(c, {1, 0, targets.list[i]}).o, expected) << targets.list[i]->name;
  }
}

TEST(Decode, ANanInAVisibleFp8KeyIsSeen) {
  const cpu::Targets targets = cpu::supported_targets();
  Case c;
  c.problem = problem_of(DType::kBFloat16, 1, 1, 40, 1, 1, 32);
  c.lengths.kv_lens = {40};
  c.inputs = random_inputs(c.problem, Data::kZeroMean, 3);
  quantise_cache(&c);
  c.inputs.v[39 * 32 + 5] = std::nan("");
  for (int i = 0; i < targets.size; ++i) {
    const Values o = cpu_decode(c, {1, 0, targets.list[i]}).o;
    for (std::size_t d = 0; d < 32; ++d) EXPECT_EQ(std::isnan(o[d]), d == 5) << d;
  }
}

TEST(Decode, RefusesScalesThatDoNotFitTheCache) {
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, 1, 4, 2, 2, 16);
  Tensor q(problem, false), o(problem, false), k(problem, true);
  const std::int32_t kv_lens[] = {4};
  float scale[] = {1.0f, 1.0f};
  DecodeArgs args;
  args.q = args.r = q.const_view();
  args.k_cache = args.v_cache = k.const_view();
  args.o = o.view();
  args.sequences.kv_lens = kv_lens;
  const auto refusal = [&] {
    DecodePlan decode;
    if (Status status = plan(problem, {}, &decode); !status.ok()) return status.message();
    std::vector<std::byte> workspace(workspace_bytes(decode) + 64);
    void* aligned = workspace.data();
    std::size_t space = workspace.size();
    std::align(64, workspace_bytes(decode), aligned, space);
    return run(decode, args, aligned, parallel_for(1)).message();
  };
  args.k_scale = scale;
  EXPECT_EQ(refusal(), "k_scale: only a float8_e4m3 cache takes one");
  args.k_scale = nullptr;
  problem.kv_dtype = DType::kFloat8E4M3;
  EXPECT_EQ(refusal(), "k_scale: a float8_e4m3 cache needs it, [num_kv_heads], got null");
  args.k_scale = scale;
  EXPECT_EQ(refusal(), "v_scale: a float8_e4m3 cache needs it, [num_kv_heads], got null");
  args.v_scale = scale;
  scale[1] = 0.0f;
  EXPECT_EQ(refusal().rfind("k_scale[1]: expected a finite number above 0", 0), 0u);
  scale[1] = INFINITY;
  EXPECT_EQ(refusal().rfind("k_scale[1]: expected a finite number above 0", 0), 0u);
  problem.kv_dtype = DType::kFloat32;
  EXPECT_EQ(refusal().rfind("kv_dtype: ", 0), 0u);
  problem.kv_dtype = DType::kFloat8E4M3;
  problem.dtype = DType::kFloat64;
  EXPECT_EQ(refusal().rfind("kv_dtype: ", 0), 0u);
  problem.dtype = DType::kFloat8E4M3;
  EXPECT_EQ(refusal().rfind("dtype: ", 0), 0u);
  BackwardPlan backward;
  problem.dtype = DType::kBFloat16;
  EXPECT_EQ(plan(problem, {}, &backward).message().rfind("kv_dtype: ", 0), 0u);
}

TEST(AppendKv, BuildsACacheThatDecodesLikeOneMadeAtOnce) {
  for (DType dtype : kEveryDType) {
    for (int page_size : {0, 1, 16}) {
      Case c;
      c.problem = problem_of(dtype, 2, 1, 48, 2, 1, 16);
      c.lengths.kv_lens = {40, 33};
      c.inputs = random_inputs(c.problem, Data::kShifted, 8);
      c.inputs.d_o.clear();
      const PagedCache pages(c.problem, std::max(page_size, 1), 3);
      Tensor k_cache(c.problem, true), v_cache(c.problem, true);
      if (page_size > 0) {
        k_cache = Tensor(dtype, pages.num_pages, page_size, 1, 16);
        v_cache = k_cache;
      }
      AppendArgs append;
      append.pages = page_size > 0 ? pages.table() : PageTable{};
      append.k_cache = k_cache.view();
      append.v_cache = v_cache.view();
      // 30 tokens, then 7 and 3: entry 1 rewrites its tail (a rejected draft, say).
      const std::vector<std::pair<std::int64_t, std::vector<std::int32_t>>> steps = {
          {30, {0, 0}}, {7, {30, 26}}, {3, {37, 30}}};
      for (const auto& [len, positions] : steps) {
        AttentionProblem problem = c.problem;
        problem.q_len = len;
        Tensor k(dtype, 2, len, 1, 16), v(dtype, 2, len, 1, 16);
        const auto rows = [&](const Values& from) {
          Values values;
          for (std::size_t b = 0; b < 2; ++b) {
            const auto first = static_cast<std::ptrdiff_t>(
                (static_cast<std::int64_t>(b) * 48 + positions[b]) * 16);
            values.insert(values.end(), from.begin() + first, from.begin() + first + len * 16);
          }
          return values;
        };
        k.set(rows(c.inputs.k));
        v.set(rows(c.inputs.v));
        append.k = k.const_view();
        append.v = v.const_view();
        append.positions = positions.data();
        const Status status = append_kv(problem, append, parallel_for(2));
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_TRUE(k_cache.gaps_intact() && v_cache.gaps_intact());
      }
      Tensor q(c.problem, false), r(c.problem, false), o(c.problem, false);
      q.set(c.inputs.q);
      r.set(c.inputs.r);
      DecodeArgs args;
      args.q = q.const_view();
      args.r = r.const_view();
      args.k_cache = k_cache.const_view();
      args.v_cache = v_cache.const_view();
      args.pages = append.pages;
      args.sequences = c.lengths.view();
      args.o = o.view();
      DecodePlan decode;
      ASSERT_TRUE(plan(c.problem, {}, &decode).ok());
      std::vector<std::byte> workspace(workspace_bytes(decode) + 64);
      void* aligned = workspace.data();
      std::size_t space = workspace.size();
      std::align(64, workspace_bytes(decode), aligned, space);
      ASSERT_TRUE(run(decode, args, aligned, parallel_for(1)).ok());
      EXPECT_EQ(o.values(), cpu_decode(c).o) << name_of(dtype) << ", pages of " << page_size;
    }
  }
}

}  // namespace
}  // namespace parallax::tests
