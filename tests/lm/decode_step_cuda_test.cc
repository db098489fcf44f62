// SPDX-License-Identifier: MIT
// Generation on a GPU: needs one, skipped without.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "lm/decode_step.h"
#include "lm/error.h"
#include "lm/generator.h"
#include "tests/lm/model_on_gpu.h"

namespace parallax::lm {
namespace {

class DecodeOnGpu : public ModelOnGpu {};

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

// Layers whose kernels fill the GPU, begin before one another's end and ask for what they read
// early: each step's logits are those of the whole text, and those of steps without a graph.
TEST_P(DecodeOnGpu, StepsOfWideLayersAreRight) {
  ModelConfig config;
  config.mixer = GetParam();
  config.vocab_size = 300;
  config.hidden_size = 1024;
  config.num_layers = 4;
  config.num_q_heads = 16;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.ffn_size = 3072;
  config.init_std = 0.05;
  make(config);
  constexpr std::int64_t kPrompt = 700, kSteps = 45;
  const KvCacheShape shape{.batch = 4, .max_len = kPrompt + kSteps, .page_size = 64};
  KvCache cache = gpu_->make_cache(shape), twin = gpu_->make_cache(shape);
  DecodeStep graph(*gpu_, cache), eager(*gpu_, twin);
  for (const std::int64_t count : {1, 4}) {
    std::vector<Tokens> texts;
    std::vector<Expected> right;
    for (std::int32_t row = 0; row < count; ++row) {
      texts.push_back(tokens_from(row, kPrompt + kSteps));
      right.push_back(expected(texts[row]));
      for (KvCache* each : {&cache, &twin}) {
        const Tokens prompt(texts[row].begin(), texts[row].begin() + kPrompt);
        gpu_->forward_cached(as_tensor(prompt, *gpu_), *each, row);
      }
    }
    for (std::int64_t i = kPrompt; i < kPrompt + kSteps; ++i) {
      Tokens newest;
      for (const Tokens& text : texts) newest.push_back(text[i]);
      const at::Tensor logits = graph(newest);
      EXPECT_TRUE(at::equal(logits, eager.run_eager(newest)));
      for (std::int64_t row = 0; row < count; ++row) expect_right(logits[row], right[row], i + 1);
    }
    for (std::int64_t row = 0; row < count; ++row) {
      cache.release(row);
      twin.release(row);
    }
  }
}

// Steps that feed one another find what eager steps' logits say, from tokens that the host brings
// and then from their own, while pages are taken, in few rows and in many.
TEST_P(DecodeOnGpu, GreedyStepsTakeTheLikeliestOfEagerOnes) {
  constexpr std::int64_t kTokens = 200;  // of 257: the rest is never taken
  for (const std::int64_t count : {1, 3, 16, 20}) {
    const KvCacheShape shape{
        .batch = DecodeStep::rows_for(count, gpu_->device()), .max_len = 60, .page_size = 8};
    KvCache cache = gpu_->make_cache(shape), twin = gpu_->make_cache(shape);
    DecodeStep greedy(*gpu_, cache, kTokens), eager(*gpu_, twin);
    for (std::int64_t row = 0; row < count; ++row) {
      const at::Tensor prompt =
          as_tensor(tokens_from(static_cast<std::int32_t>(row), 1 + row), *gpu_);
      gpu_->forward_cached(prompt, cache, row);
      gpu_->forward_cached(prompt, twin, row);
    }
    Tokens newest = tokens_from(9, count);
    const auto expect_next = [&](const Tokens& found) {
      const at::Tensor logits = eager.run_eager(newest).narrow(1, 0, kTokens);
      const at::Tensor likeliest = logits.argmax(1).to(at::kInt).cpu();
      newest.assign(likeliest.const_data_ptr<std::int32_t>(),
                    likeliest.const_data_ptr<std::int32_t>() + count);
      ASSERT_EQ(found, newest) << count << " rows";
    };
    for (int turn = 0; turn < 2; ++turn) {
      greedy.start(newest);
      for (int i = 0; i < 12; ++i) {
        greedy.start_next();
        expect_next(greedy.take());
      }
      expect_next(greedy.take());
      EXPECT_EQ(cache.len(0), twin.len(0));
      // A sequence that has been changed, or shall be, is one that the device has not counted.
      if (count == 1) continue;
      for (KvCache* each : {&cache, &twin}) {
        each->release(1);
        each->fork(0, 1);
      }
      newest[1] = (newest[0] + 1) % 256;
      EXPECT_THROW(greedy.start_next(), Error);
    }
  }
}

// Where nothing is finite there is no token, and the steps after it are harmless.
TEST_P(DecodeOnGpu, GreedyStepsSayWhereNothingIsFinite) {
  KvCache cache = gpu_->make_cache({.batch = 1, .max_len = 20, .page_size = 4});
  gpu_->forward_cached(as_tensor({1, 2, 3}, *gpu_), cache);
  DecodeStep step(*gpu_, cache);
  gpu_->named_parameters()["model.norm.weight"].fill_(std::nan(""));
  step.start({5});
  step.start_next();
  EXPECT_EQ(step.take(), Tokens{-1});
  EXPECT_EQ(step.take(), Tokens{-1});
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
