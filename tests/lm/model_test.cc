// SPDX-License-Identifier: MIT
#include "lm/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "lm/error.h"
#include "lm/mixers/attention.h"
#include "lm/optimizer.h"

namespace parallax::lm {
namespace {

ModelConfig small_config(const std::string& mixer) {
  ModelConfig config;
  config.mixer = mixer;
  config.vocab_size = 31;
  config.hidden_size = 24;
  config.num_layers = 2;
  config.num_q_heads = 6;
  config.num_kv_heads = 2;  // groups of 3
  config.head_dim = 8;      // 6 * 8 != hidden_size
  config.ffn_size = 40;
  config.init_std = 0.2;
  return config;
}

at::Tensor random_tokens(std::int64_t batch, std::int64_t len, std::int64_t vocab_size) {
  at::manual_seed(1);
  return at::randint(vocab_size, {batch, len}, at::kLong);
}

class BothMixers : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(, BothMixers, testing::Values("softmax", "parallax"),
                         [](const auto& param) { return std::string(param.param); });

TEST(CausalLm, HasTheNamesOfHuggingFacesQwen3) {
  ModelConfig config = small_config("parallax");
  config.num_layers = 1;
  config.tie_embeddings = false;
  std::vector<std::string> names;
  for (const auto& item : CausalLm(config, 0).named_parameters()) names.push_back(item.key());
  EXPECT_THAT(
      names, testing::UnorderedElementsAre(
                 "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                 "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
                 "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight",
                 "model.layers.0.self_attn.r_proj.weight", "model.layers.0.self_attn.q_norm.weight",
                 "model.layers.0.self_attn.k_norm.weight", "model.layers.0.self_attn.r_norm.weight",
                 "model.layers.0.post_attention_layernorm.weight",
                 "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
                 "model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"));
}

TEST_P(BothMixers, TraceGivesEachActivationWhereItArises) {
  CausalLm model(small_config(GetParam()), 3);
  const at::Tensor tokens = random_tokens(1, 9, 31);
  at::Tensor last;
  model.trace(tokens, [&](const std::string&, const at::Tensor& x) { last = x; });
  EXPECT_TRUE(at::equal(last, model.logits(model.hidden(tokens))[0]));

  const auto first_bad = [&](const std::string& weight) {
    const at::NoGradGuard no_grad;
    at::Tensor tensor = model.named_parameters()[weight];
    const at::Tensor before = tensor.clone();
    tensor.flatten()[5] = std::nan("");
    std::string first;
    model.trace(tokens, [&](const std::string& name, const at::Tensor& x) {
      if (first.empty() && !at::isfinite(x).all().item<bool>()) first = name;
    });
    tensor.copy_(before);
    return first;
  };
  EXPECT_EQ(first_bad("model.layers.0.input_layernorm.weight"), "model.layers.0.input_layernorm");
  EXPECT_EQ(first_bad("model.layers.0.self_attn.k_proj.weight"), "model.layers.0.self_attn.k");
  EXPECT_EQ(first_bad("model.layers.1.self_attn.o_proj.weight"), "model.layers.1.self_attn");
  EXPECT_EQ(first_bad("model.layers.1.mlp.down_proj.weight"), "model.layers.1.mlp");
  EXPECT_EQ(first_bad("model.norm.weight"), "model.norm");
}

TEST(CausalLm, ArmsStartEqualWhereShapesAgree) {
  const auto parallax = CausalLm(small_config("parallax"), 7).named_parameters();
  const auto softmax = CausalLm(small_config("softmax"), 7).named_parameters();
  const auto other_seed = CausalLm(small_config("softmax"), 8).named_parameters();
  std::set<std::string> own;
  for (const auto& item : parallax) {
    const at::Tensor* twin = softmax.find(item.key());
    if (!twin) {
      own.insert(item.key().substr(item.key().find("self_attn")));
      continue;
    }
    EXPECT_TRUE(at::equal(item.value(), *twin)) << item.key();
    if (twin->dim() == 2) {
      EXPECT_FALSE(at::equal(*twin, other_seed[item.key()])) << item.key();
    }
  }
  EXPECT_THAT(own, testing::ElementsAre("self_attn.r_norm.weight", "self_attn.r_proj.weight"));
}

TEST(CausalLm, InitialisesMatricesNormalAndGainsOne) {
  ModelConfig config;  // the defaults: large enough to measure
  config.num_layers = 1;
  for (const auto& item : CausalLm(config, 0).named_parameters()) {
    const at::Tensor w = item.value();
    if (w.dim() == 1) {
      EXPECT_TRUE(at::equal(w, at::ones_like(w))) << item.key();
      continue;
    }
    const double count = static_cast<double>(w.numel());
    EXPECT_NEAR(w.mean().item<double>(), 0, 5 * 0.02 / std::sqrt(count)) << item.key();
    EXPECT_NEAR(w.std().item<double>(), 0.02, 5 * 0.02 / std::sqrt(2 * count)) << item.key();
  }
}

TEST_P(BothMixers, LossStartsAtTheLogarithmOfTheVocabulary) {
  ModelConfig config;
  config.mixer = GetParam();
  config.num_layers = 2;
  CausalLm model(config, 0);
  const at::Tensor tokens = random_tokens(4, 33, config.vocab_size);
  const double loss = model.loss(tokens.narrow(1, 0, 32), tokens.narrow(1, 1, 32)).item<double>();
  EXPECT_NEAR(loss, std::log(257.0), 0.1);
}

TEST_P(BothMixers, TheFutureDoesNotChangeThePast) {
  const ModelConfig config = small_config(GetParam());
  CausalLm model(config, 0);
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = random_tokens(2, 40, config.vocab_size);
  at::Tensor changed = tokens.clone();
  changed.narrow(1, 25, 15).add_(1).remainder_(config.vocab_size);
  const at::Tensor a = model.logits(model.hidden(tokens));
  const at::Tensor b = model.logits(model.hidden(changed));
  EXPECT_TRUE(at::equal(a.narrow(1, 0, 25), b.narrow(1, 0, 25)));
  EXPECT_FALSE(at::equal(a.select(1, 25), b.select(1, 25)));
}

TEST_P(BothMixers, CachedLogitsAreTheUncachedOnes) {
  const ModelConfig config = small_config(GetParam());
  CausalLm model(config, 0);
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = random_tokens(2, 60, config.vocab_size);
  const at::Tensor full = model.logits(model.hidden(tokens));
  KvCache cache = model.make_cache({.batch = 2, .max_len = 64, .page_size = 16});
  for (int round = 0; round < 2; ++round) {  // the second on a cleared cache
    std::int64_t done = 0;
    for (const std::int64_t len : {19, 1, 1, 3, 25, 11}) {
      const at::Tensor logits = model.forward_cached(tokens.narrow(1, done, len), cache);
      done += len;
      EXPECT_EQ(cache.len(1), done);
      const double gap = (logits - full.select(1, done - 1)).abs().max().item<double>();
      EXPECT_LT(gap, 2e-5) << "after " << done;
    }
    EXPECT_THROW(model.forward_cached(tokens.narrow(1, 0, 5), cache), Error);
    EXPECT_EQ(cache.len(1), done);
    for (const std::int64_t row : {0, 1}) cache.release(row);
  }
}

TEST_P(BothMixers, OverfitsOneBatch) {
  ModelConfig config = small_config(GetParam());
  config.init_std = 0.02;
  config.hidden_size = 64;
  CausalLm model(config, 0);
  OptimizerConfig options;
  options.adamw_lr = 0.01;
  Optimizer optimizer(model.named_parameters(), options, config);
  const at::Tensor tokens = random_tokens(2, 33, config.vocab_size);
  double loss = 0;
  for (int step = 0; step < 100; ++step) {
    const at::Tensor value = model.loss(tokens.narrow(1, 0, 32), tokens.narrow(1, 1, 32));
    value.backward();
    optimizer.step();
    optimizer.zero_grad();
    loss = value.item<double>();
  }
  EXPECT_LT(loss, 0.05);
}

TEST(CausalLm, ParallaxWithoutAProbeIsSoftmax) {
  ModelConfig config = small_config("parallax");
  config.r_norm = false;  // its Jacobian at r = 0 is what this test is not about
  CausalLm parallax(config, 3);
  CausalLm softmax(small_config("softmax"), 3);
  {
    const at::NoGradGuard no_grad;
    for (auto& item : parallax.named_parameters()) {
      if (item.key().ends_with("r_proj.weight")) item.value().zero_();
    }
  }
  const at::Tensor tokens = random_tokens(2, 33, config.vocab_size);
  const at::Tensor x = tokens.narrow(1, 0, 32), y = tokens.narrow(1, 1, 32);
  const at::Tensor a = parallax.loss(x, y), b = softmax.loss(x, y);
  EXPECT_NEAR(a.item<double>(), b.item<double>(), 1e-5);
  a.backward();
  b.backward();
  const auto twins = softmax.named_parameters();
  for (const auto& item : parallax.named_parameters()) {
    if (const at::Tensor* twin = twins.find(item.key())) {
      const double gap = (item.value().grad() - twin->grad()).abs().max().item<double>();
      EXPECT_LT(gap, 1e-5) << item.key();
    }
  }
}

TEST_P(BothMixers, ComputesInBfloat16) {
  const ModelConfig config = small_config(GetParam());
  CausalLm model(config, 0);
  const at::Tensor tokens = random_tokens(2, 33, config.vocab_size);
  const at::Tensor x = tokens.narrow(1, 0, 32), y = tokens.narrow(1, 1, 32);
  const double exact = model.loss(x, y).item<double>();
  model.compute_in(at::kBFloat16);
  EXPECT_EQ(model.hidden(x).scalar_type(), at::kBFloat16);
  const at::Tensor loss = model.loss(x, y);
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  EXPECT_NEAR(loss.item<double>(), exact, 0.02 * exact);
  loss.backward();
  for (const auto& item : model.named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_EQ(item.value().grad().scalar_type(), at::kFloat) << item.key();
  }
}

TEST_P(BothMixers, LossByRowIsTheMeanTakenApart) {
  const ModelConfig config = small_config(GetParam());
  CausalLm model(config, 0);
  const at::Tensor tokens = random_tokens(2, 33, config.vocab_size);
  const at::Tensor x = tokens.narrow(1, 0, 32);
  at::Tensor y = tokens.narrow(1, 1, 32).clone();
  y.narrow(1, 0, 5).fill_(-100);
  const at::Tensor rows = model.loss(x, y, Reduction::kNone);
  EXPECT_EQ(rows.sizes(), y.sizes());
  EXPECT_EQ(rows.narrow(1, 0, 5).abs().max().item<double>(), 0);
  EXPECT_NEAR(rows.sum().item<double>() / (2 * 27), model.loss(x, y).item<double>(), 1e-5);
  const at::Tensor log_p = at::log_softmax(model.logits(model.hidden(x)), -1);
  const double expected = -log_p[1][9][y[1][9].item<std::int64_t>()].item<double>();
  EXPECT_NEAR(rows[1][9].item<double>(), expected, 1e-5);
}

TEST_P(BothMixers, SaysWhatRunsAttention) {
  const bool softmax = std::string(GetParam()) == "softmax";
  EXPECT_EQ(attention_backend(small_config(GetParam()), at::kFloat),
            softmax ? "LibTorch's scaled_dot_product_attention, flash attention"
                    : "parallax::attention on CPU");
}

TEST_P(BothMixers, AttentionInputsAreThoseOfTheLayer) {
  const ModelConfig config = small_config(GetParam());
  CausalLm model(config, 0);
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = random_tokens(2, 12, config.vocab_size);
  const AttentionInputs inputs = model.attention_inputs(tokens, 1);
  KvCache cache = model.make_cache({.batch = 2, .max_len = 12, .page_size = 4});
  model.forward_cached(tokens, cache);
  for (const std::int64_t row : {0, 1}) {
    EXPECT_TRUE(at::allclose(inputs.k[row], cache.row_of(cache.k(1), row)[0], 1e-5, 1e-6));
    EXPECT_TRUE(at::allclose(inputs.v[row], cache.row_of(cache.v(1), row)[0], 1e-5, 1e-6));
  }
  EXPECT_EQ(inputs.q.sizes(), (at::IntArrayRef{2, 12, 6, 8}));
  EXPECT_EQ(inputs.r.defined(), std::string(GetParam()) == "parallax");
}

}  // namespace
}  // namespace parallax::lm
