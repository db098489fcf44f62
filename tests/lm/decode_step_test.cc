// SPDX-License-Identifier: MIT
#include "lm/decode_step.h"

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

namespace parallax::lm {
namespace {

ModelConfig small_config(const std::string& mixer) {
  ModelConfig config;
  config.mixer = mixer;
  config.vocab_size = 61;
  config.hidden_size = 48;
  config.num_layers = 2;
  config.num_q_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.ffn_size = 80;
  config.init_std = 0.3;
  return config;
}

using Tokens = std::vector<std::int32_t>;

Tokens tokens_from(std::int32_t start, std::int64_t len) {
  Tokens tokens;
  for (std::int32_t i = 0; i < len; ++i) tokens.push_back((start + 7 * i * i) % 61);
  return tokens;
}

at::Tensor as_tensor(const Tokens& tokens) { return at::tensor(tokens, at::kLong).unsqueeze(0); }

at::Tensor uncached(CausalLm& model, const Tokens& text) {
  return model.logits(model.hidden(as_tensor(text)).select(1, -1))[0];
}

class Decode : public testing::TestWithParam<std::tuple<std::string, std::int64_t>> {
 protected:
  CausalLm model_{small_config(std::get<0>(GetParam())), 5};
  std::int64_t page_size_ = std::get<1>(GetParam());
  torch::NoGradGuard no_grad_;
};

void expect_near(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_LT((a - b).abs().max().item<double>(), 3e-5 * b.abs().max().item<double>());
}

// Prompts of different lengths, a fork, tokens by ones, threes and a longer piece.
TEST_P(Decode, LogitsAreThoseOfTheWholeText) {
  KvCache cache = model_.make_cache({.batch = 8, .max_len = 100, .page_size = page_size_});
  DecodeStep step(model_, cache);
  std::vector<Tokens> texts;
  const auto append = [&](std::int64_t row, const Tokens& tokens) {
    texts[row].insert(texts[row].end(), tokens.begin(), tokens.end());
    expect_near(model_.forward_cached(as_tensor(tokens), cache, row)[0],
                uncached(model_, texts[row]));
  };
  const auto decode = [&](std::int32_t start) {
    const Tokens newest = tokens_from(start, std::ssize(texts));
    const at::Tensor logits = step(newest);
    for (std::size_t row = 0; row < texts.size(); ++row) {
      texts[row].push_back(newest[row]);
      expect_near(logits[static_cast<std::int64_t>(row)], uncached(model_, texts[row]));
    }
  };
  for (const std::int64_t len : {1, 5, 33, 18}) {
    texts.emplace_back();
    append(std::ssize(texts) - 1, tokens_from(static_cast<std::int32_t>(len), len));
  }
  decode(3);
  cache.fork(1, 4);
  texts.push_back(texts[1]);
  for (const std::int32_t start : {4, 5, 6}) decode(start);
  append(1, tokens_from(9, 3));
  append(4, tokens_from(8, 20));
  decode(7);
  cache.release(2);  // the last row takes its place
  cache.fork(4, 2);
  cache.release(4);
  texts[2] = texts[4];
  texts.pop_back();
  for (const std::int32_t start : {10, 11}) decode(start);
}

// Bit for bit, whoever grows beside it and wherever its row is.
TEST_P(Decode, ASequenceDoesNotSeeItsNeighbours) {
  std::vector<at::Tensor> alone;
  for (const std::int64_t neighbours : {0, 1, 7, 12}) {
    const std::int64_t rows = DecodeStep::rows_for(neighbours + 1, at::kCPU);
    KvCache cache = model_.make_cache({.batch = rows, .max_len = 60, .page_size = page_size_});
    DecodeStep step(model_, cache);
    for (std::int64_t row = 0; row < neighbours; ++row) {
      model_.forward_cached(as_tensor(tokens_from(2, 3 + 2 * row)), cache, row);
    }
    model_.forward_cached(as_tensor(tokens_from(1, 11)), cache, neighbours);
    for (std::int32_t i = 0; i < 10; ++i) {
      Tokens newest = tokens_from(i, neighbours + 1);
      newest.back() = 5 * i;
      const at::Tensor logits = step(newest)[neighbours];
      if (neighbours == 0) alone.push_back(logits.clone());
      EXPECT_TRUE(at::equal(logits, alone[i])) << neighbours << " neighbours, token " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(MixersAndPageSizes, Decode,
                         testing::Combine(testing::Values("parallax", "softmax"),
                                          testing::Values(1, 4, 256)));

TEST(DecodeStep, PreparedWeightsGiveTheSameLogits) {
  const torch::NoGradGuard no_grad;
  for (const std::string mixer : {"parallax", "softmax"}) {
    CausalLm model(small_config(mixer), 5);
    const Tokens text = tokens_from(3, 20);
    const at::Tensor before = uncached(model, text);
    model.prepare_for_inference();
    EXPECT_TRUE(at::equal(uncached(model, text), before));
    EXPECT_TRUE(at::equal(CausalLm(small_config(mixer), 5).named_parameters().back().value(),
                          model.named_parameters().back().value()));
  }
}

}  // namespace
}  // namespace parallax::lm
