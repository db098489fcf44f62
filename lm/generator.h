// SPDX-License-Identifier: MIT
// Writes on from prompts: prefill, then a token at a time through the KV cache, many texts at once.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "lm/model.h"
#include "lm/tokenizer.h"

namespace parallax::lm {

struct SamplingOptions {
  double temperature = 1.0;  // 0: always the likeliest token
  std::int64_t top_k = 0;    // among the k likeliest only; 0: off
  double top_p = 1.0;        // among the likeliest that together reach this probability
  std::uint64_t seed = 0;
};

// Draws tokens. The draws depend on options and logits alone, on every platform.
class Sampler {
 public:
  // Throws Error for a temperature below 0, top_k below 0, or top_p outside (0, 1].
  explicit Sampler(const SamplingOptions& options);

  // logits [vocab_size], any float dtype and device. The order of restriction is temperature,
  // top_k, top_p; ties go to the smaller id. Throws Error where no logit is finite.
  std::int32_t sample(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 256;
  SamplingOptions sampling;     // prompt i of several has the seed `seed + i`
  std::int64_t max_batch = 64;  // texts that grow at the same time; others wait
  std::int64_t page_size = 64;  // of the cache, in tokens
  // Tokens of a prompt that go through the model at a time, over what the cache holds by then: what
  // bounds the memory of a long prompt's activations.
  std::int64_t prefill_chunk = 4096;
  bool use_cache = true;  // false recomputes the whole text for every token
};

struct Generation {
  std::vector<std::int32_t> tokens;  // the new ones, without a final end of document
  std::string text;                  // theirs, as UTF-8
  std::int64_t prompt_tokens = 0;
  std::uint64_t seed = 0;
  bool ended = false;  // the model ended the document itself
};

// How long the parts took, over all texts.
struct GenerationTimes {
  std::int64_t prefill_tokens = 0;  // those that the cache did not hold already
  double prefill_seconds = 0;       // until the logits of first new tokens
  std::int64_t decode_tokens = 0;   // those that a decode step gave
  double decode_seconds = 0;
  GenerationTimes& operator+=(const GenerationTimes& other);
  double prefill_tokens_per_s() const;  // 0 where there were none
  double decode_tokens_per_s() const;
};

struct Generations {
  std::vector<Generation> texts;  // in the order of the prompts
  GenerationTimes times;
};

// Receives the new text of prompt `index` in pieces of whole UTF-8 characters, as they come.
using OnText = std::function<void(std::size_t index, std::string_view piece)>;
// Called once a text is complete; prompts end in any order.
using OnDone = std::function<void(std::size_t index, const Generation& generation)>;

// Goes on from each prompt until its text ends or has max_new_tokens. On a CPU each text is, bit
// for bit, the one that its prompt would get alone with its seed, however many others grow beside
// it. On a GPU matrix products of other heights may round differently; there a prompt also takes
// over the keys and values of a beginning that it has in common with a text that grows already. An
// empty prompt starts a new document. Throws Error where an option is out of range.
Generations generate(CausalLm& model, const Tokenizer& tokenizer,
                     const std::vector<std::string>& prompts, const GenerateOptions& options,
                     const OnText& on_text = {}, const OnDone& on_done = {});

// The same for one prompt.
Generation generate(CausalLm& model, const Tokenizer& tokenizer, std::string_view prompt,
                    const GenerateOptions& options, const OnText& on_text = {});

}  // namespace parallax::lm
