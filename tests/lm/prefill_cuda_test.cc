// SPDX-License-Identifier: MIT
// Prompts in chunks over what a cache holds already, on a GPU: needs one, skipped without.
#include <gtest/gtest.h>

#include <cmath>

#include "lm/generator.h"
#include "tests/lm/model_on_gpu.h"

namespace parallax::lm {
namespace {

class PrefillOnGpu : public ModelOnGpu {
 protected:
  // Every page full of NaN.
  KvCache poisoned_cache(const KvCacheShape& shape) const {
    KvCache cache = gpu_->make_cache(shape);
    for (std::int64_t layer = 0; layer < gpu_->config().num_layers; ++layer) {
      cache.k(layer).fill_(std::nan(""));
      cache.v(layer).fill_(std::nan(""));
    }
    return cache;
  }
};

TEST_P(PrefillOnGpu, ChunksGiveTheLogitsOfOnePass) {
  const Tokens text = tokens_from(3, 500);
  const Expected right = expected(text);
  for (const std::int64_t page_size : {1, 16, 64, 256}) {
    for (const std::int64_t chunk : {7, 16, 33, 64, 100, 256, 499, 500}) {
      SCOPED_TRACE("pages of " + std::to_string(page_size) + ", chunks of " +
                   std::to_string(chunk));
      KvCache cache = poisoned_cache({.batch = 2, .max_len = 600, .page_size = page_size});
      std::int64_t len = 0;
      for (const at::Tensor& tokens : as_tensor(text, *gpu_).split(chunk, 1)) {
        const at::Tensor logits = gpu_->forward_cached(tokens, cache, 1);
        expect_right(logits[0], right, len += tokens.size(1));
      }
    }
  }
}

// Rows that hold beginnings of different lengths in shared pages, then chunks for all of them.
TEST_P(PrefillOnGpu, ForkedBeginningsGoOnEachInItsOwnWay) {
  constexpr std::int64_t kRows = 4;
  const Tokens prefix = tokens_from(9, 300);
  const std::int64_t kept[kRows] = {300, 300, 171, 64};
  for (const std::int64_t page_size : {16, 64}) {
    for (const std::int64_t chunk : {5, 16, 50, 130}) {
      SCOPED_TRACE("pages of " + std::to_string(page_size) + ", chunks of " +
                   std::to_string(chunk));
      KvCache cache = poisoned_cache({.batch = kRows, .max_len = 500, .page_size = page_size});
      gpu_->forward_cached(as_tensor(prefix, *gpu_), cache);
      for (std::int64_t row = 1; row < kRows; ++row) cache.fork(0, row, kept[row]);
      std::vector<Tokens> texts;
      std::vector<at::Tensor> rests;
      std::vector<Expected> right;
      for (std::int64_t row = 0; row < kRows; ++row) {
        const Tokens rest = tokens_from(static_cast<std::int32_t>(20 + row), 130);
        texts.emplace_back(prefix.begin(), prefix.begin() + kept[row]);
        texts.back().insert(texts.back().end(), rest.begin(), rest.end());
        rests.push_back(as_tensor(rest, *gpu_));
        right.push_back(expected(texts.back()));
      }
      std::int64_t len = 0;
      for (const at::Tensor& tokens : at::cat(rests).split(chunk, 1)) {
        const at::Tensor logits = gpu_->forward_cached(tokens, cache);
        len += tokens.size(1);
        for (std::int64_t row = 0; row < kRows; ++row) {
          expect_right(logits[row], right[row], kept[row] + len);
        }
      }
    }
  }
}

// What is generated after shared beginnings, read in chunks, is what the model says: each greedy
// token is the likeliest one in float32, or as near to it as rounding may tell apart.
TEST_P(PrefillOnGpu, GeneratesAfterSharedBeginnings) {
  const auto tokenizer = bytes_tokenizer();
  const std::string shared(200, 'x');
  const std::vector<std::string> prompts = {
      shared + "one", "another", shared + "two, longer than one", shared, shared + "one", ""};
  GenerateOptions options;
  options.max_new_tokens = 30;
  options.sampling.temperature = 0;
  for (const std::int64_t page_size : {16, 64}) {
    for (const std::int64_t chunk : {16, 90, 4096}) {
      options.page_size = page_size;
      options.prefill_chunk = chunk;
      const Generations all = generate(*gpu_, *tokenizer, prompts, options);
      // The first reads all, the others what is not in its prompt; the last of a prompt always.
      EXPECT_EQ(all.times.prefill_tokens, 203 + 7 + 20 + 1 + 1 + 1);
      for (std::size_t i = 0; i < prompts.size(); ++i) {
        Tokens text = tokenizer->encode(prompts[i]);
        if (text.empty()) text.push_back(tokenizer->end_of_document());
        const auto begin = std::ssize(text);
        const Tokens& added = all.texts[i].tokens;
        text.insert(text.end(), added.begin(), added.end());
        const Expected right = expected(text);
        for (std::int64_t at = 0; at < std::ssize(added); ++at) {
          const at::Tensor logits = right.exact[begin + at - 1];
          const at::Tensor below = logits.max() - logits[added[at]];
          EXPECT_LE(below.item<double>(), 2 * right.allowed[begin + at - 1].item<double>())
              << "prompt " << i << ", token " << at;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Mixers, PrefillOnGpu, testing::Values("softmax", "parallax"),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace parallax::lm
