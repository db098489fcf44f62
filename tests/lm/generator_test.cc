// SPDX-License-Identifier: MIT
#include "lm/generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "lm/error.h"
#include "lm/utf8.h"

namespace parallax::lm {
namespace {

at::Tensor logits_of(std::vector<double> probabilities) {
  return at::tensor(probabilities, at::kDouble).log();
}

std::map<std::int32_t, int> draw_many(const SamplingOptions& options, const at::Tensor& logits,
                                      int count) {
  Sampler sampler(options);
  std::map<std::int32_t, int> counts;
  for (int i = 0; i < count; ++i) ++counts[sampler.sample(logits)];
  return counts;
}

TEST(Sampler, TemperatureZeroTakesTheLikeliestAndTheSmallerOfEqualOnes) {
  SamplingOptions options;
  options.temperature = 0;
  EXPECT_EQ(Sampler(options).sample(logits_of({0.1, 0.6, 0.3})), 1);
  EXPECT_EQ(Sampler(options).sample(logits_of({0.2, 0.4, 0.4})), 1);
}

TEST(Sampler, FollowsTheProbabilities) {
  const int count = 20000;
  auto counts = draw_many({}, logits_of({0.5, 0.3, 0.2}), count);
  for (const auto& [token, probability] : {std::pair{0, 0.5}, {1, 0.3}, {2, 0.2}}) {
    const double deviation = std::sqrt(count * probability * (1 - probability));
    EXPECT_NEAR(counts[token], count * probability, 4 * deviation);
  }
}

TEST(Sampler, TemperatureSharpens) {
  SamplingOptions options;
  options.temperature = 0.5;  // probabilities squared: 25 : 9 : 4
  EXPECT_NEAR(draw_many(options, logits_of({0.5, 0.3, 0.2}), 20000)[0], 20000 * 25 / 38.0, 300);
}

TEST(Sampler, TopKAndTopPLeaveOutTheUnlikely) {
  const at::Tensor logits = logits_of({0.1, 0.4, 0.2, 0.3});
  SamplingOptions top_k;
  top_k.top_k = 2;
  EXPECT_THAT(draw_many(top_k, logits, 500),
              testing::UnorderedElementsAre(testing::Pair(1, testing::Gt(0)),
                                            testing::Pair(3, testing::Gt(0))));
  SamplingOptions top_p;
  top_p.top_p = 0.71;  // 0.4 + 0.3 is not enough
  EXPECT_EQ(draw_many(top_p, logits, 500).size(), 3u);
  top_p.top_p = 1e-9;
  EXPECT_EQ(draw_many(top_p, logits, 50).size(), 1u);
}

TEST(Sampler, NeverDrawsWhatIsNotFinite) {
  const double inf = std::numeric_limits<double>::infinity();
  const at::Tensor logits = at::tensor({-inf, 0.0, std::nan("")}, at::kDouble);
  EXPECT_EQ(draw_many({}, logits, 50)[1], 50);
  EXPECT_THROW(Sampler({}).sample(at::full({3}, std::nan(""))), Error);
}

TEST(Sampler, RefusesOptionsOutOfRange) {
  const auto refuses = [](auto set) {
    SamplingOptions options;
    set(options);
    EXPECT_THROW(Sampler{options}, Error);
  };
  refuses([](SamplingOptions& options) { options.temperature = -1; });
  refuses([](SamplingOptions& options) { options.temperature = std::nan(""); });
  refuses([](SamplingOptions& options) { options.top_k = -1; });
  refuses([](SamplingOptions& options) { options.top_p = 0; });
  refuses([](SamplingOptions& options) { options.top_p = 1.5; });
}

ModelConfig small_config(const std::string& mixer) {
  ModelConfig config;
  config.mixer = mixer;
  config.hidden_size = 48;
  config.num_layers = 2;
  config.num_q_heads = 6;  // three query heads to a key head
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.ffn_size = 64;
  config.init_std = 0.3;  // distributions with something to choose from
  return config;
}

class Generate : public testing::TestWithParam<std::string> {
 protected:
  Generation write(GenerateOptions options, const OnText& on_text = {}) {
    CausalLm model(small_config(GetParam()), 5);
    return generate(model, *bytes_tokenizer(), "def parallax(", options, on_text);
  }
};

TEST_P(Generate, WithAndWithoutCacheAgree) {
  for (const double temperature : {0.0, 0.7}) {
    GenerateOptions options;
    options.max_new_tokens = 60;
    options.sampling.temperature = temperature;
    const Generation cached = write(options);
    options.use_cache = false;
    EXPECT_EQ(cached.tokens, write(options).tokens);
    EXPECT_EQ(cached.prompt_tokens, 13);
  }
}

// Argmax could hide differences: the logits themselves agree to float32 rounding.
TEST_P(Generate, CachedLogitsEqualThoseOfTheWholeText) {
  const torch::NoGradGuard no_grad;
  CausalLm model(small_config(GetParam()), 5);
  const at::Tensor tokens = at::arange(33, at::kLong).unsqueeze(0) * 5 % 256;
  const at::Tensor whole = model.logits(model.hidden(tokens));  // [1, 33, vocab_size]
  KvCache cache = model.make_cache({.batch = 1, .max_len = 33, .page_size = 8});
  std::int64_t seen = 0;
  for (const std::int64_t len : {7, 1, 1, 20, 1, 1, 1, 1}) {
    const at::Tensor last = model.forward_cached(tokens.slice(1, seen, seen + len), cache);
    seen += len;
    const double difference = (last - whole.select(1, seen - 1)).abs().max().item<double>();
    EXPECT_LT(difference, 2e-5 * whole.abs().max().item<double>()) << "after " << seen << " tokens";
  }
}

TEST_P(Generate, APromptInChunksIsTheWholePrompt) {
  GenerateOptions options;
  options.max_new_tokens = 60;
  options.page_size = 4;
  options.sampling.temperature = 0;
  const Generation whole = write(options);
  for (const std::int64_t chunk : {1, 4, 5, 12, 13}) {
    options.prefill_chunk = chunk;
    EXPECT_EQ(write(options).tokens, whole.tokens) << "chunks of " << chunk;
  }
}

TEST_P(Generate, IsTheSameForASeedAndAnotherForAnother) {
  GenerateOptions options;
  options.max_new_tokens = 40;
  const Generation first = write(options);
  EXPECT_EQ(first.tokens, write(options).tokens);
  options.sampling.seed = 1;
  EXPECT_NE(first.tokens, write(options).tokens);
}

TEST_P(Generate, StreamsTheWholeTextInValidPieces) {
  std::string streamed;
  GenerateOptions options;
  options.max_new_tokens = 120;
  const Generation result = write(options, [&](std::size_t, std::string_view piece) {
    EXPECT_EQ(to_utf8(piece), piece);
    streamed += piece;
  });
  EXPECT_EQ(streamed, result.text);
  EXPECT_EQ(result.text, to_utf8(bytes_tokenizer()->decode(result.tokens)));
  EXPECT_TRUE(result.ended || result.tokens.size() == 120u);
}

// Twenty texts of different lengths, some of which end early, some of whose prompts are equal.
TEST_P(Generate, ManyAtOnceAreThoseWrittenAlone) {
  CausalLm model(small_config(GetParam()), 5);
  const auto tokenizer = bytes_tokenizer();
  std::vector<std::string> prompts;
  for (int i = 0; i < 20; ++i) {
    prompts.push_back(i % 5 == 4 ? prompts.back() : std::string(1 + i * 7 % 40, 'a' + i));
  }
  GenerateOptions options;
  options.max_new_tokens = 90;
  options.page_size = 8;
  options.sampling.seed = 3;
  std::vector<Generation> alone;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    GenerateOptions own = options;
    own.sampling.seed += i;
    alone.push_back(generate(model, *tokenizer, prompts[i], own));
  }
  int ended = 0;
  for (const std::int64_t max_batch : {1, 3, 7, 64}) {
    options.max_batch = max_batch;
    std::vector<int> done(prompts.size());
    std::vector<std::string> streamed(prompts.size());
    const Generations all = generate(
        model, *tokenizer, prompts, options,
        [&](std::size_t index, std::string_view piece) { streamed[index] += piece; },
        [&](std::size_t index, const Generation&) { ++done[index]; });
    ASSERT_EQ(all.texts.size(), prompts.size());
    std::int64_t decoded = 0;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(all.texts[i].tokens, alone[i].tokens) << i << " of " << max_batch << " at once";
      EXPECT_EQ(all.texts[i].ended, alone[i].ended);
      EXPECT_EQ(all.texts[i].prompt_tokens, std::ssize(prompts[i]));
      EXPECT_EQ(all.texts[i].seed, 3 + i);
      EXPECT_EQ(streamed[i], all.texts[i].text);
      EXPECT_EQ(done[i], 1);
      ended += all.texts[i].ended;
      decoded += std::ssize(alone[i].tokens) - (alone[i].ended ? 0 : 1);
    }
    EXPECT_EQ(all.times.decode_tokens, decoded);
  }
  EXPECT_GT(ended, 0);
  EXPECT_LT(ended, 80);
}

INSTANTIATE_TEST_SUITE_P(BothMixers, Generate, testing::Values("parallax", "softmax"));

TEST(GenerateOnce, AnEmptyPromptStartsADocument) {
  CausalLm model(small_config("parallax"), 5);
  GenerateOptions options;
  options.max_new_tokens = 4;
  EXPECT_EQ(generate(model, *bytes_tokenizer(), "", options).prompt_tokens, 1);
}

TEST(GenerateOnce, RefusesOptionsOutOfRange) {
  CausalLm model(small_config("parallax"), 5);
  GenerateOptions options;
  options.max_new_tokens = 0;
  EXPECT_THROW(generate(model, *bytes_tokenizer(), "a", options), Error);
  options = {};
  options.max_batch = 0;
  EXPECT_THROW(generate(model, *bytes_tokenizer(), "a", options), Error);
  options = {};
  options.prefill_chunk = 0;
  EXPECT_THROW(generate(model, *bytes_tokenizer(), "a", options), Error);
  EXPECT_TRUE(generate(model, *bytes_tokenizer(), std::vector<std::string>{}, {}).texts.empty());
}

}  // namespace
}  // namespace parallax::lm
