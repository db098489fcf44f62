// SPDX-License-Identifier: MIT
// torch.ops.parallax.attention from C++: values, gradients, autocast, Meta.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tests/ops/formula.h"

namespace parallax::ops {
namespace {

using at::Tensor;

struct Case {
  std::string name;
  Sizes sizes;
  AttentionOptions options;
};

std::vector<Case> batched_cases() {
  std::vector<Case> cases;
  const auto add = [&](std::string name, Sizes sizes) -> AttentionOptions& {
    cases.push_back({std::move(name), sizes, {}});
    return cases.back().options;
  };
  add("causal", {2, 7, 7, 4, 4, 16});
  add("full", {2, 5, 9, 4, 2, 16}).causal = false;
  add("group of 3", {1, 6, 11, 6, 2, 8});
  add("long queries see nothing at first", {2, 6, 3, 2, 1, 8});
  add("window", {2, 9, 9, 2, 1, 24}).window = 3;
  add("window of one", {1, 4, 4, 2, 2, 8}).window = 1;
  add("scale", {1, 5, 5, 2, 1, 40}).scale = 0.12;
  add("head_dim 256", {1, 3, 5, 1, 1, 256});
  add("kv_lens", {3, 4, 8, 2, 1, 16}).kv_lens = int_tensor({8, 5, 0});
  AttentionOptions& padded = add("kv_lens, kv_start, window", {2, 4, 9, 3, 1, 16});
  padded.kv_lens = int_tensor({9, 7});
  padded.kv_start = int_tensor({2, 5});
  padded.window = 4;
  AttentionOptions& full = add("kv_lens and kv_start, not causal", {2, 3, 9, 3, 1, 16});
  full.kv_lens = int_tensor({6, 9});
  full.kv_start = int_tensor({0, 8});
  full.causal = false;
  return cases;
}

std::vector<Tensor> gradients(const Tensor& o, const Tensor& d_o, const Inputs& inputs) {
  return torch::autograd::grad({o}, inputs.list(), {d_o.to(o.dtype())});
}

TEST(Attention, AgreesWithTheFormulaInValueStatisticsAndGradients) {
  torch::manual_seed(1);
  for (const Case& c : batched_cases()) {
    SCOPED_TRACE(c.name);
    const Inputs inputs = random_inputs(c.sizes).leaves();
    const auto [o, lse, t_bar] =
        attention_with_stats(inputs.q, inputs.r, inputs.k, inputs.v, c.options);
    const auto [expected_o, expected_lse, expected_t_bar] = formula(inputs, c.options);
    EXPECT_LT(max_difference(o, expected_o), 1e-12);
    EXPECT_LT(max_difference(lse, expected_lse), 1e-12);
    EXPECT_LT(max_difference(t_bar, expected_t_bar), 1e-12);
    EXPECT_FALSE(lse.requires_grad());
    EXPECT_FALSE(t_bar.requires_grad());
    EXPECT_TRUE(at::equal(o, attention(inputs.q, inputs.r, inputs.k, inputs.v, c.options)));

    const Tensor d_o = at::randn_like(o);
    const std::vector<Tensor> ours = gradients(o, d_o, inputs);
    const std::vector<Tensor> expected = gradients(expected_o, d_o, inputs);
    for (std::size_t i = 0; i < 4; ++i) EXPECT_LT(max_difference(ours[i], expected[i]), 1e-11) << i;
  }
}

TEST(Attention, GradientsAgreeWithFiniteDifferences) {
  torch::manual_seed(2);
  const Inputs inputs = random_inputs({1, 4, 6, 3, 1, 8}, /*shifted=*/true).leaves();
  const Tensor weight = at::randn_like(inputs.q);
  const auto loss = [&](const Inputs& x) { return (attention(x.q, x.r, x.k, x.v) * weight).sum(); };
  const std::vector<Tensor> gradient = torch::autograd::grad({loss(inputs)}, inputs.list());
  at::NoGradGuard no_grad;
  const double step = 1e-5;
  for (std::size_t i = 0; i < 4; ++i) {
    const Tensor direction = at::randn_like(gradient[i]);
    const auto moved = [&](double by) {
      std::vector<Tensor> x = inputs.list();
      x[i] = x[i] + by * direction;
      return loss({x[0], x[1], x[2], x[3]}).item<double>();
    };
    const double numeric = (moved(step) - moved(-step)) / (2 * step);
    const double analytic = (gradient[i] * direction).sum().item<double>();
    EXPECT_NEAR(numeric, analytic, 1e-6 * std::max(1.0, std::abs(analytic))) << i;
  }
}

// max|ours - ref| <= 2 max|eager in the same dtype - ref| + 1e-5 max(1, max|dO| max|v| max|k|).
TEST(Attention, KeepsTheErrorRuleInEveryDtype) {
  torch::manual_seed(3);
  for (const bool shifted : {false, true}) {
    const Inputs exact = random_inputs({1, 70, 70, 6, 2, 64}, shifted);
    const Tensor d_o = at::randn_like(exact.q);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      SCOPED_TRACE(std::string(c10::toString(dtype)) + (shifted ? " shifted" : " zero-mean"));
      const Inputs low = exact.to(dtype).leaves();
      const Inputs reference = low.to(at::kDouble).leaves();
      const Tensor o = attention(low.q, low.r, low.k, low.v);
      const Tensor eager_o = std::get<0>(formula(low, {}));
      const Tensor reference_o = std::get<0>(formula(reference, {}));
      EXPECT_EQ(o.scalar_type(), dtype);
      const Tensor low_d_o = d_o.to(dtype);
      std::vector<Tensor> ours = gradients(o, low_d_o, low);
      std::vector<Tensor> eager = gradients(eager_o, low_d_o, low);
      std::vector<Tensor> expected = gradients(reference_o, low_d_o, reference);
      ours.push_back(o);
      eager.push_back(eager_o);
      expected.push_back(reference_o);
      const double product =
          (low_d_o.abs().max() * exact.v.abs().max() * exact.k.abs().max()).item<double>();
      for (std::size_t i = 0; i < ours.size(); ++i) {
        EXPECT_LE(max_difference(ours[i], expected[i]),
                  2 * max_difference(eager[i], expected[i]) + 1e-5 * std::max(1.0, product))
            << i;
      }
    }
  }
}

TEST(Attention, PackedEqualsBatched) {
  torch::manual_seed(4);
  const Sizes first{1, 5, 7, 6, 2, 16}, second{1, 3, 3, 6, 2, 16};
  const Inputs a = random_inputs(first), b = random_inputs(second);
  AttentionOptions options;
  options.window = 4;
  const auto packed = [](const Tensor& x, const Tensor& y) {
    return at::cat({x.squeeze(0), y.squeeze(0)}).requires_grad_();
  };
  const Inputs both{packed(a.q, b.q), packed(a.r, b.r), packed(a.k, b.k), packed(a.v, b.v)};
  AttentionOptions packed_options = options;
  packed_options.cu_seqlens_q = int_tensor({0, 5, 5, 8});  // an empty sequence in between
  packed_options.cu_seqlens_k = int_tensor({0, 7, 7, 10});
  const auto [o, lse, t_bar] = attention_with_stats(both.q, both.r, both.k, both.v, packed_options);
  const Tensor d_o = at::randn_like(o);
  const std::vector<Tensor> ours = gradients(o, d_o, both);

  std::int64_t q_begin = 0, k_begin = 0;
  for (const Inputs& one : {a.leaves(), b.leaves()}) {
    const std::int64_t q_end = q_begin + one.q.size(1), k_end = k_begin + one.k.size(1);
    const auto [expected_o, expected_lse, expected_t_bar] = formula(one, options);
    EXPECT_LT(max_difference(o.slice(0, q_begin, q_end), expected_o.squeeze(0)), 1e-12);
    EXPECT_LT(max_difference(lse.slice(1, q_begin, q_end), expected_lse.squeeze(0)), 1e-12);
    EXPECT_LT(max_difference(t_bar.slice(1, q_begin, q_end), expected_t_bar.squeeze(0)), 1e-12);
    const std::vector<Tensor> expected =
        gradients(expected_o, d_o.slice(0, q_begin, q_end).unsqueeze(0), one);
    for (std::size_t i = 0; i < 4; ++i) {
      const bool of_queries = i < 2;
      const Tensor part =
          ours[i].slice(0, of_queries ? q_begin : k_begin, of_queries ? q_end : k_end);
      EXPECT_LT(max_difference(part, expected[i].squeeze(0)), 1e-11) << i;
    }
    q_begin = q_end;
    k_begin = k_end;
  }
}

TEST(Attention, TakesAnyStridesWithAContiguousLastAxis) {
  torch::manual_seed(5);
  const Inputs inputs = random_inputs({2, 6, 6, 4, 2, 16});
  // [batch, heads, len, head_dim] seen as [batch, len, heads, head_dim], and slices of a fused
  // qrkv.
  const auto heads_first = [](const Tensor& x) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  };
  const Tensor fused = at::cat({inputs.q, inputs.r, inputs.k, inputs.v}, 2);
  const std::vector<Tensor> slices = fused.split_with_sizes({4, 4, 2, 2}, 2);
  const Tensor expected = attention(inputs.q, inputs.r, inputs.k, inputs.v);
  EXPECT_TRUE(at::equal(expected, attention(heads_first(inputs.q), heads_first(inputs.r),
                                            heads_first(inputs.k), heads_first(inputs.v))));
  EXPECT_TRUE(at::equal(expected, attention(slices[0], slices[1], slices[2], slices[3])));
}

TEST(Attention, TakesAnExpandedGradient) {
  torch::manual_seed(6);
  const Inputs inputs = random_inputs({1, 4, 4, 2, 1, 8}).leaves();
  attention(inputs.q, inputs.r, inputs.k, inputs.v).sum().backward();
  const Inputs other = inputs.leaves();
  std::get<0>(formula(other, {})).sum().backward();
  EXPECT_LT(max_difference(inputs.v.grad(), other.v.grad()), 1e-12);
}

TEST(Attention, IsBitwiseTheSameOnAnyNumberOfThreads) {
  torch::manual_seed(7);
  const int before = at::get_num_threads();
  const Inputs inputs = random_inputs({3, 33, 33, 6, 2, 32}).to(at::kFloat).leaves();
  const Tensor d_o = at::randn_like(inputs.q);
  std::vector<std::vector<Tensor>> results;
  for (const int threads : {1, 2, 5}) {
    at::set_num_threads(threads);
    const Tensor o = attention(inputs.q, inputs.r, inputs.k, inputs.v);
    results.push_back(gradients(o, d_o, inputs));
    results.back().push_back(o);
  }
  at::set_num_threads(before);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_TRUE(at::equal(results[0][i], results[1][i])) << i;
    EXPECT_TRUE(at::equal(results[0][i], results[2][i])) << i;
  }
}

TEST(Attention, GivesNothingForRowsThatSeeNothing) {
  const Inputs inputs = random_inputs({2, 3, 0, 2, 1, 8}).leaves();
  const auto [o, lse, t_bar] = attention_with_stats(inputs.q, inputs.r, inputs.k, inputs.v);
  EXPECT_TRUE(at::equal(o, at::zeros_like(o)));
  EXPECT_TRUE(at::equal(lse, at::full_like(lse, -std::numeric_limits<double>::infinity())));
  EXPECT_TRUE(at::equal(t_bar, at::zeros_like(t_bar)));
  const std::vector<Tensor> zero = gradients(o, at::ones_like(o), inputs);
  EXPECT_TRUE(at::equal(zero[0], at::zeros_like(inputs.q)));
  EXPECT_TRUE(at::equal(zero[1], at::zeros_like(inputs.r)));
  for (const Sizes& sizes : {Sizes{0, 3, 4, 2, 1, 8}, Sizes{2, 0, 4, 2, 1, 8}}) {
    const Inputs none = random_inputs(sizes).leaves();
    const Tensor empty = attention(none.q, none.r, none.k, none.v);
    EXPECT_EQ(empty.sizes(), none.q.sizes());
    EXPECT_TRUE(at::equal(gradients(empty, empty, none)[2], at::zeros_like(none.k)));
  }
}

TEST(Attention, RefusesASecondDerivative) {
  const Inputs inputs = random_inputs({1, 3, 3, 2, 1, 8}).leaves();
  const Tensor o = attention(inputs.q, inputs.r, inputs.k, inputs.v);
  const std::vector<Tensor> first = torch::autograd::grad({o.sum()}, {inputs.q}, {}, {}, true);
  try {
    torch::autograd::grad({first[0].sum()}, {inputs.q});
    FAIL() << "a second derivative was given";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("double backward"), std::string::npos);
  }
}

TEST(Attention, RefusesChangedInputsInBackward) {
  const Inputs inputs = random_inputs({1, 3, 3, 2, 1, 8}).leaves();
  const Tensor k = inputs.k * 1;
  const Tensor o = attention(inputs.q, inputs.r, k, inputs.v);
  k.add_(1);
  EXPECT_THROW(o.sum().backward(), c10::Error);
}

TEST(Attention, FollowsAutocast) {
  torch::manual_seed(8);
  const Inputs inputs = random_inputs({1, 6, 6, 2, 1, 16}).to(at::kFloat).leaves();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor o = attention(inputs.q, inputs.r, inputs.k.to(at::kBFloat16), inputs.v);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  const Inputs low = inputs.to(at::kBFloat16);
  EXPECT_TRUE(at::equal(o, attention(low.q, low.r, low.k, low.v)));
  o.sum().backward();
  EXPECT_EQ(inputs.q.grad().scalar_type(), at::kFloat);
}

TEST(Attention, KnowsItsShapesOnMeta) {
  const auto meta = [](std::vector<std::int64_t> sizes) {
    return at::empty(sizes, at::TensorOptions(at::kMeta).dtype(at::kBFloat16)).requires_grad_();
  };
  const Tensor q = meta({2, 5, 6, 64}), k = meta({2, 7, 2, 64});
  const auto [o, lse, t_bar] = attention_with_stats(q, q, k, k);
  EXPECT_EQ(o.sizes(), q.sizes());
  EXPECT_EQ(o.scalar_type(), at::kBFloat16);
  EXPECT_EQ(lse.sizes(), (std::vector<std::int64_t>{2, 6, 5}));
  EXPECT_EQ(t_bar.scalar_type(), at::kFloat);
  EXPECT_EQ(torch::autograd::grad({o.sum()}, {k})[0].sizes(), k.sizes());
}

TEST(Attention, ReadsPages) {
  torch::manual_seed(9);
  const Inputs inputs = random_inputs({2, 6, 8, 4, 2, 16});
  AttentionOptions options;
  options.kv_lens = int_tensor({8, 5});
  const Tensor expected = attention(inputs.q, inputs.r, inputs.k, inputs.v, options);
  const Tensor order = torch::tensor({3, 0, 2, 1});  // page of each quarter of [2 * 8] tokens
  const Tensor nan = at::full({4, 4, 2, 16}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  const Tensor k = nan.index_copy(0, order, inputs.k.reshape({4, 4, 2, 16}));
  const Tensor v = nan.index_copy(0, order, inputs.v.reshape({4, 4, 2, 16}));
  options.page_table = order.to(at::kInt).view({2, 2});
  EXPECT_TRUE(at::equal(expected, attention(inputs.q, inputs.r, k, v, options)));
}

}  // namespace
}  // namespace parallax::ops
