// SPDX-License-Identifier: MIT
// Generation on a GPU: needs one, skipped without.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "lm/decode_step.h"
#include "lm/device.h"
#include "lm/generator.h"

namespace parallax::lm {
namespace {

using Tokens = std::vector<std::int32_t>;

Tokens tokens_from(std::int32_t start, std::int64_t len) {
  Tokens tokens;
  for (std::int32_t i = 0; i < len; ++i) tokens.push_back((start + 7 * i * i) % 256);
  return tokens;
}

class DecodeOnGpu : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "no GPU";
    ModelConfig config;
    config.mixer = GetParam();
    config.hidden_size = 256;
    config.num_layers = 3;
    config.num_q_heads = 8;
    config.num_kv_heads = 2;
    config.head_dim = 64;
    config.ffn_size = 512;
    config.init_std = 0.1;
    exact_ = std::make_unique<CausalLm>(config, 5);
    gpu_ = std::make_unique<CausalLm>(config, 5);
    place_model(*gpu_, TrainConfig{}, "cuda");
  }

  at::Tensor as_tensor(const Tokens& tokens, const CausalLm& model) const {
    return at::tensor(tokens, at::kLong).unsqueeze(0).to(model.device());
  }
  at::Tensor uncached(CausalLm& model, const Tokens& text) const {
    return model.logits(model.hidden(as_tensor(text, model)).select(1, -1))[0].cpu();
  }
  // As near to float32 on the CPU as bfloat16 gets without a cache.
  void expect_right(const at::Tensor& logits, const Tokens& text) {
    const at::Tensor exact = uncached(*exact_, text);
    const double allowed = (uncached(*gpu_, text) - exact).abs().max().item<double>();
    EXPECT_LE((logits.cpu() - exact).abs().max().item<double>(),
              2 * allowed + 0.01 * exact.abs().max().item<double>())
        << "after " << text.size() << " tokens";
  }

  std::unique_ptr<CausalLm> exact_, gpu_;
  torch::NoGradGuard no_grad_;
};

// Prompts of different lengths; a graph replayed while lengths, pages and the number of rows
// change.
TEST_P(DecodeOnGpu, GraphsGiveWhatEagerStepsGive) {
  const KvCacheShape shape{.batch = 8, .max_len = 160, .page_size = 16};
  KvCache cache = gpu_->make_cache(shape), twin = gpu_->make_cache(shape);
  DecodeStep graph(*gpu_, cache), eager(*gpu_, twin);
  std::vector<Tokens> texts;
  for (const std::int64_t len : {1, 5, 40, 77, 16}) {
    const auto row = std::ssize(texts);
    texts.push_back(tokens_from(static_cast<std::int32_t>(len), len));
    const at::Tensor logits = gpu_->forward_cached(as_tensor(texts[row], *gpu_), cache, row);
    gpu_->forward_cached(as_tensor(texts[row], *gpu_), twin, row);
    expect_right(logits[0], texts[row]);
  }
  const auto step = [&](std::int32_t start) {
    const Tokens newest = tokens_from(start, std::ssize(texts));
    const at::Tensor logits = graph(newest);
    EXPECT_TRUE(at::equal(logits, eager.run_eager(newest)));
    for (std::size_t row = 0; row < texts.size(); ++row) {
      texts[row].push_back(newest[row]);
      if (start % 5 == 0) expect_right(logits[static_cast<std::int64_t>(row)], texts[row]);
    }
  };
  for (std::int32_t start = 0; start < 25; ++start) step(start);
  for (KvCache* each : {&cache, &twin}) {
    each->fork(2, 5);
    each->release(0);
    each->fork(5, 0);
  }
  texts.push_back(texts[2]);
  texts[0] = texts[2];
  for (std::int32_t start = 25; start < 40; ++start) step(start);
  for (KvCache* each : {&cache, &twin}) {
    for (const std::int64_t row : {5, 4, 3}) each->release(row);
  }
  texts.resize(3);
  for (std::int32_t start = 40; start < 51; ++start) step(start);
}

TEST_P(DecodeOnGpu, GeneratesTheSameTwice) {
  const auto tokenizer = bytes_tokenizer();
  std::vector<std::string> prompts;
  for (int i = 0; i < 11; ++i) prompts.push_back(std::string(1 + 9 * i, 'a' + i));
  for (const double temperature : {0.0, 0.8}) {
    GenerateOptions options;
    options.max_new_tokens = 40;
    options.max_batch = 6;
    options.sampling.temperature = temperature;
    const Generations first = generate(*gpu_, *tokenizer, prompts, options);
    const Generations again = generate(*gpu_, *tokenizer, prompts, options);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(first.texts[i].tokens, again.texts[i].tokens);
      EXPECT_TRUE(first.texts[i].ended || first.texts[i].tokens.size() == 40u);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Mixers, DecodeOnGpu, testing::Values("softmax", "parallax"),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace parallax::lm
