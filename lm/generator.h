// SPDX-License-Identifier: MIT
// Writes on from a prompt: prefill, then a token at a time through the KV cache.
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
  SamplingOptions sampling;
  bool use_cache = true;  // false recomputes the whole text for every token
};

struct Generation {
  std::vector<std::int32_t> tokens;  // the new ones, without a final end of document
  std::string text;                  // theirs, as UTF-8
  std::int64_t prompt_tokens = 0;
  bool ended = false;          // the model ended the document itself
  double prefill_seconds = 0;  // until the logits of the first new token
  double decode_seconds = 0;   // of the other new tokens
};

// Receives the new text in pieces of whole UTF-8 characters, as they come.
using OnText = std::function<void(std::string_view)>;

// An empty prompt starts a new document. Throws Error where an option is out of range.
Generation generate(CausalLm& model, const Tokenizer& tokenizer, std::string_view prompt,
                    const GenerateOptions& options, const OnText& on_text = {});

}  // namespace parallax::lm
