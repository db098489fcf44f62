// SPDX-License-Identifier: MIT
// A model on the GPU and the same in float32 on the CPU, for tests that need one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "lm/device.h"

namespace parallax::lm {

using Tokens = std::vector<std::int32_t>;

inline Tokens tokens_from(std::int32_t start, std::int64_t len) {
  Tokens tokens;
  for (std::int32_t i = 0; i < len; ++i) tokens.push_back((start + 7 * i * i) % 256);
  return tokens;
}

// The parameter: the mixer.
class ModelOnGpu : public testing::TestWithParam<std::string> {
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
    make(config);
  }

  void make(const ModelConfig& config) {
    exact_ = std::make_unique<CausalLm>(config, 5);
    gpu_ = std::make_unique<CausalLm>(config, 5);
    place_model(*gpu_, TrainConfig{}, "cuda");
  }

  static at::Tensor as_tensor(const Tokens& tokens, const CausalLm& model) {
    return at::tensor(tokens, at::kLong).unsqueeze(0).to(model.device());
  }
  // After each token, [len, vocab_size], without a cache.
  static at::Tensor uncached(CausalLm& model, const Tokens& text) {
    return model.logits(model.hidden(as_tensor(text, model)))[0].cpu();
  }

  // What a text's logits must be near: after its i-th token as near to float32 on the CPU as twice
  // what bfloat16 gets without a cache.
  struct Expected {
    at::Tensor exact, allowed;  // [len, vocab_size], [len]
  };
  Expected expected(const Tokens& text) {
    const at::Tensor exact = uncached(*exact_, text);
    const auto largest = [](const at::Tensor& x) { return x.abs().amax(-1); };
    return {exact, 2 * largest(uncached(*gpu_, text) - exact) + 0.01 * largest(exact)};
  }
  // logits [vocab_size] after the first `len` tokens.
  static void expect_right(const at::Tensor& logits, const Expected& right, std::int64_t len) {
    const at::Tensor apart = (logits.cpu() - right.exact[len - 1]).abs().max();
    EXPECT_LE(apart.item<double>(), right.allowed[len - 1].item<double>())
        << "after " << len << " tokens";
  }
  void expect_right(const at::Tensor& logits, const Tokens& text) {
    expect_right(logits, expected(text), std::ssize(text));
  }

  std::unique_ptr<CausalLm> exact_, gpu_;
  torch::NoGradGuard no_grad_;
};

}  // namespace parallax::lm
