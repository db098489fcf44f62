// SPDX-License-Identifier: MIT
// append_kv on the CPU against its definition in float64: what is written, where, and nothing else.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/kernels/append_case.h"

namespace parallax::tests {
namespace {

// Half a unit in the last place of a number near x, and a little for the arithmetic before it.
double tolerance(DType dtype, double x, double scale) {
  x = std::abs(x);
  switch (dtype) {
    case DType::kFloat64:
      return 1e-13 * (1 + x);
    case DType::kFloat32:
      return 1e-6 * (1 + x);
    case DType::kBFloat16:
      return 0x1p-8 * x + 1e-5;
    case DType::kFloat16:
      return 0x1p-11 * x + 1e-5;
    case DType::kFloat8E4M3:
      break;
  }
  return (0x1p-4 + 1e-5) * x + 0x1p-10 * scale;
}

// Head h of token i of sequence b of a [batch, q_len, heads, head_dim] array, normed and turned.
Values prepared(const AppendCase& c, const Head& head, const Values& values, std::int64_t heads,
                std::int64_t b, std::int64_t i, std::int64_t h) {
  const std::int64_t head_dim = c.problem.head_dim, half = head_dim / 2;
  const std::ptrdiff_t first = ((b * c.problem.q_len + i) * heads + h) * head_dim;
  Values x(values.begin() + first, values.begin() + first + head_dim);
  if (!head.gain.empty()) {
    double squares = 0;
    for (double value : x) squares += value * value;
    const double norm = std::sqrt(squares / static_cast<double>(head_dim) + 1e-6);
    for (std::size_t d = 0; d < x.size(); ++d) x[d] = x[d] / norm * head.gain[d];
  }
  if (!head.rotate) return x;
  const std::int64_t angle =
      (c.angles.empty() ? c.positions : c.angles)[static_cast<std::size_t>(b)] + i;
  Values turned = x;
  for (std::int64_t d = 0; d < half; ++d) {
    const auto low = static_cast<std::size_t>(d), high = static_cast<std::size_t>(d + half);
    const auto at = static_cast<std::size_t>(angle * half + d);
    turned[low] = x[low] * c.cos[at] - x[high] * c.sin[at];
    turned[high] = x[high] * c.cos[at] + x[low] * c.sin[at];
  }
  return turned;
}

// Compares the cache with the definition; afterwards the places that were written are poison again.
void expect_cache(const AppendCase& c, const AppendTensors& tensors, const Head& head,
                  const Values& values, const std::vector<float>& scale, Tensor* cache) {
  const Values stored = cache->values();
  const std::int64_t heads = c.problem.num_kv_heads;
  for (std::int64_t b = 0; b < c.problem.batch; ++b) {
    for (std::int64_t i = 0; i < c.problem.q_len; ++i) {
      const auto [entry, row] = tensors.cache_row(b, c.positions[static_cast<std::size_t>(b)] + i);
      for (std::int64_t h = 0; h < heads; ++h) {
        const double by = scale.empty() ? 1.0 : scale[static_cast<std::size_t>(h)];
        const Values exact = prepared(c, head, values, heads, b, i, h);
        const std::int64_t first = ((entry * cache->len + row) * heads + h) * c.problem.head_dim;
        for (std::size_t d = 0; d < exact.size(); ++d) {
          const double largest = scale.empty() ? INFINITY : 448 * by;
          const double expected = std::clamp(exact[d], -largest, largest);
          ASSERT_NEAR(stored[static_cast<std::size_t>(first) + d] * by, expected,
                      tolerance(cache->dtype, expected, by))
              << c.name << " " << name_of(c.problem.dtype) << ", token " << b << " " << i
              << ", head " << h << ", element " << d;
        }
      }
      cache->poison(entry, row);
    }
  }
  EXPECT_TRUE(std::all_of(cache->bytes().begin(), cache->bytes().end(),
                          [](unsigned char byte) { return byte == 0xff; }))
      << c.name << ": more was written than the new tokens";
}

void expect_queries(const AppendCase& c, const Head& head, const Values& values,
                    const Tensor& out) {
  const Values ours = out.values();
  const std::int64_t heads = c.problem.num_q_heads;
  std::size_t at = 0;
  for (std::int64_t b = 0; b < c.problem.batch; ++b) {
    for (std::int64_t i = 0; i < c.problem.q_len; ++i) {
      for (std::int64_t h = 0; h < heads; ++h) {
        for (double exact : prepared(c, head, values, heads, b, i, h)) {
          ASSERT_NEAR(ours[at++], exact, tolerance(out.dtype, exact, 1)) << c.name;
        }
      }
    }
  }
  EXPECT_TRUE(out.gaps_intact()) << c.name;
}

TEST(Append, WritesTheNewTokensAndNothingElse) {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const AppendCase& c : append_cases(dtype)) {
      AppendTensors tensors(c);
      const AppendArgs args = append_args(c, &tensors);
      const Status status = append_kv(c.problem, args, parallel_for(2));
      ASSERT_TRUE(status.ok()) << c.name << ": " << status.message();
      expect_cache(c, tensors, c.k_head, c.inputs.k, c.k_scale, &tensors.k_cache);
      expect_cache(c, tensors, {}, c.inputs.v, c.v_scale, &tensors.v_cache);
      if (!c.with_queries) continue;
      expect_queries(c, c.q_head, c.inputs.q, tensors.q_out);
      expect_queries(c, c.r_head, c.inputs.r, tensors.r_out);
    }
  }
}

TEST(Append, QueriesMayBeTurnedInPlace) {
  for (const AppendCase& c : append_cases(DType::kBFloat16)) {
    if (!c.with_queries) continue;
    AppendTensors apart(c), in_place(c);
    ASSERT_TRUE(append_kv(c.problem, append_args(c, &apart), parallel_for(1)).ok());
    AppendArgs args = append_args(c, &in_place);
    args.prologue.q.out = in_place.q.view();
    args.prologue.r.out = in_place.r.view();
    ASSERT_TRUE(append_kv(c.problem, args, parallel_for(1)).ok());
    EXPECT_EQ(in_place.q.values(), apart.q_out.values()) << c.name;
    EXPECT_EQ(in_place.r.values(), apart.r_out.values()) << c.name;
  }
}

TEST(Append, RefusesBeforeItWrites) {
  const std::vector<AppendCase> cases = append_cases(DType::kBFloat16);
  const AppendCase& c = *std::find_if(cases.begin(), cases.end(), [](const AppendCase& c) {
    return c.with_queries && !c.k_scale.empty() && c.page_size == 16;
  });
  const auto refusal = [&](const auto& change) {
    AppendTensors tensors(c);
    AppendArgs args = append_args(c, &tensors);
    AttentionProblem problem = c.problem;
    const Tensor before = tensors.k_cache;
    change(&problem, &args, &tensors);
    const Status status = append_kv(problem, args, parallel_for(1));
    EXPECT_EQ(tensors.k_cache.bytes(), Tensor(before).bytes());
    EXPECT_TRUE(tensors.q_out.gaps_intact());
    return status.message();
  };
  const std::vector<std::int32_t> beyond = {0, 69, 0}, negative = {0, -1, 0}, late = {0, 0, 89};
  std::vector<float> zero(c.k_scale.size(), 0.0f);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) { args->positions = beyond.data(); }),
            "positions[1]: expected 0 to 68 (capacity 70, new tokens 2), got 69");
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) { args->positions = negative.data(); }),
            "positions[1]: expected 0 to 68 (capacity 70, new tokens 2), got -1");
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) { args->prologue.angles = late.data(); }),
            "angles[2]: expected 0 to 88 (num_angles 90, new tokens 2), got 89");
  EXPECT_EQ(refusal([&](auto*, auto*, auto* tensors) {
              tensors->paged->entries[0] = -1;
            }).rfind("page_table[0, 0]: expected a page from 0 to ", 0),
            0u);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) {
              args->k_scale = zero.data();
            }).rfind("k_scale[0]: expected a finite number above 0", 0),
            0u);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) { args->v_scale = nullptr; }),
            "v_scale: a float8_e4m3 cache needs it, [num_kv_heads], got null");
  EXPECT_EQ(refusal([&](auto* problem, auto*, auto*) { problem->kv_dtype.reset(); }),
            "k_scale: only a float8_e4m3 cache takes one");
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) {
              args->prologue.q.out = {};
            }).rfind("prologue.q.out: expected memory", 0),
            0u);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) {
              args->prologue.r.in = {};
            }).rfind("prologue.r.in: expected memory", 0),
            0u);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) {
              args->prologue.cos = nullptr;
            }).rfind("prologue.cos: expected memory", 0),
            0u);
  EXPECT_EQ(refusal([&](auto*, auto* args, auto*) {
              args->prologue.eps = -1;
            }).rfind("prologue.eps: expected", 0),
            0u);
  EXPECT_EQ(refusal([&](auto* problem, auto*, auto*) {
              problem->num_q_heads = 5;
            }).rfind("num_q_heads: expected a multiple of num_kv_heads", 0),
            0u);
}

}  // namespace
}  // namespace parallax::tests
