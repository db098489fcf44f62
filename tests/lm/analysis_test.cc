// SPDX-License-Identifier: MIT
#include "lm/analysis.h"

#include <gtest/gtest.h>

#include <cmath>

#include "lm/error.h"
#include "ops/parallax_ops.h"

namespace parallax::lm {
namespace {

constexpr std::int64_t kLen = 24, kHeadDim = 8;

struct Inputs {
  at::Tensor q, r, k, v;
};

Inputs random_inputs() {
  torch::manual_seed(3);
  const auto draw = [] { return at::randn({kLen, kHeadDim}, at::kDouble); };
  return {draw(), draw(), draw() + 0.5, draw()};
}

TEST(HeadWeights, RowsSumToOneAndZero) {
  const Inputs in = random_inputs();
  const HeadWeights weights = head_weights(in.q, in.r, in.k);
  EXPECT_TRUE(at::allclose(weights.p.sum(1), at::ones(kLen, at::kDouble)));
  EXPECT_LT(weights.correction.sum(1).abs().max().item<double>(), 1e-13);
  EXPECT_EQ(weights.combined.triu(1).abs().max().item<double>(), 0);
}

TEST(HeadWeights, GiveTheOutputOfTheOperator) {
  const Inputs in = random_inputs();
  const auto as_head = [](const at::Tensor& x) { return x.view({1, kLen, 1, kHeadDim}); };
  const at::Tensor o = ops::attention(as_head(in.q), as_head(in.r), as_head(in.k), as_head(in.v));
  const HeadWeights weights = head_weights(in.q, in.r, in.k);
  EXPECT_TRUE(at::allclose(weights.combined.matmul(in.v), o.view({kLen, kHeadDim}), 1e-9, 1e-10));
}

TEST(HeadWeights, WithoutRAreSoftmax) {
  const Inputs in = random_inputs();
  const HeadWeights weights = head_weights(in.q, {}, in.k);
  EXPECT_TRUE(at::equal(weights.combined, weights.p));
  EXPECT_TRUE(
      at::allclose(head_weights(in.q, at::zeros_like(in.q), in.k).combined, weights.combined));
}

// Two keys, one query to look at: every figure follows by hand.
TEST(HeadStatistics, AgreeWithHandCalculation) {
  const at::Tensor p = at::tensor({1.0, 0.0, 0.25, 0.75}, at::kDouble).view({2, 2});
  const at::Tensor correction = at::tensor({0.0, 0.0, 1.0, -1.0}, at::kDouble).view({2, 2});
  const HeadWeights weights{p, correction, p + correction};
  const at::Tensor v = at::tensor({3.0, 0.0, 0.0, 4.0}, at::kDouble).view({2, 2});
  const HeadStatistics head = head_statistics(weights, v, 1);
  EXPECT_DOUBLE_EQ(head.sink_mass, 0.25);
  EXPECT_DOUBLE_EQ(head.combined_sink_mass, 1.25);
  EXPECT_DOUBLE_EQ(head.entropy, -(0.25 * std::log(0.25) + 0.75 * std::log(0.75)));
  EXPECT_DOUBLE_EQ(head.negativity, 0.25);
  EXPECT_DOUBLE_EQ(head.total_variation, 1.5);
  EXPECT_DOUBLE_EQ(head.cor, 5.0 / std::hypot(0.75, 3.0));  // |(3, -4)| / |(0.75, 3)|
  EXPECT_DOUBLE_EQ(head.min_weight, -0.25);
  EXPECT_DOUBLE_EQ(head.max_weight, 1.25);
}

// COR by its definition, the covariance of values and keys written out.
TEST(HeadStatistics, CorIsTheCovarianceTimesR) {
  const Inputs in = random_inputs();
  const HeadWeights weights = head_weights(in.q, in.r, in.k);
  const std::int64_t query = kLen - 1;
  const at::Tensor p = weights.p[query];
  const at::Tensor k_bar = p.matmul(in.k), v_bar = p.matmul(in.v);
  const at::Tensor covariance =  // [head_dim of v, head_dim of k]
      (p.unsqueeze(1) * (in.v - v_bar)).t().matmul(in.k - k_bar);
  const double expected =
      covariance.mv(in.r[query]).norm().item<double>() / v_bar.norm().item<double>();
  EXPECT_NEAR(head_statistics(weights, in.v, query).cor, expected, 1e-12);
}

ModelConfig small_config(const std::string& mixer) {
  ModelConfig config;
  config.mixer = mixer;
  config.hidden_size = 32;
  config.num_layers = 3;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.ffn_size = 48;
  return config;
}

TEST(AnalyzeHeads, CoversEveryHeadOfBothMixers) {
  const at::Tensor tokens = at::arange(40, at::kLong) * 7 % 256;
  for (const std::string mixer : {"parallax", "softmax"}) {
    CausalLm model(small_config(mixer), 1);
    const std::vector<HeadStatistics> heads = analyze_heads(model, tokens);
    ASSERT_EQ(heads.size(), 12u);
    EXPECT_EQ(heads[7].layer, 1);
    EXPECT_EQ(heads[7].head, 3);
    for (const HeadStatistics& head : heads) {
      EXPECT_GE(head.total_variation, 1 - 1e-12);
      EXPECT_EQ(head.cor > 0, mixer == "parallax");
    }
  }
}

TEST(AnalyzeHeads, RefusesTextsAndHeadsThatCannotBe) {
  CausalLm model(small_config("parallax"), 1);
  const auto text = [](std::int64_t len) { return at::zeros({len}, at::kLong); };
  EXPECT_THROW(analyze_heads(model, text(1)), Error);
  EXPECT_THROW(analyze_heads(model, text(kMaxAnalyzedTokens + 1)), Error);
  EXPECT_THROW(weights_of_head(model, text(4), 3, 0), Error);
  EXPECT_THROW(weights_of_head(model, text(4), 0, -1), Error);
}

TEST(TellingHeads, TakesTheLargestOfEachLayerFirst) {
  std::vector<HeadStatistics> heads(6);
  const double cor[] = {1, 9, 8, 2, 3, 4};
  for (std::int64_t i = 0; i < 6; ++i) {
    heads[i].layer = i / 3;
    heads[i].head = i % 3;
    heads[i].cor = cor[i];
  }
  const auto places = [](const std::vector<HeadStatistics>& chosen) {
    std::vector<std::pair<std::int64_t, std::int64_t>> result;
    for (const HeadStatistics& head : chosen) result.emplace_back(head.layer, head.head);
    return result;
  };
  using Places = std::vector<std::pair<std::int64_t, std::int64_t>>;
  EXPECT_EQ(places(telling_heads(heads, 2)), (Places{{0, 1}, {1, 2}}));
  EXPECT_EQ(places(telling_heads(heads, 3)), (Places{{0, 1}, {0, 2}, {1, 2}}));
  EXPECT_EQ(telling_heads(heads, 99).size(), 6u);
  EXPECT_TRUE(telling_heads(heads, 0).empty());
}

}  // namespace
}  // namespace parallax::lm
