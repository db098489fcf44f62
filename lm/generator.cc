// SPDX-License-Identifier: MIT
#include "lm/generator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include "lm/error.h"
#include "lm/utf8.h"

namespace parallax::lm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Candidate {
  std::int32_t token;
  double weight;  // a logit first, an unnormalised probability later
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

std::vector<Candidate> finite_candidates(const at::Tensor& logits) {
  const at::Tensor values = logits.to(at::kCPU, at::kDouble).contiguous();
  const double* value = values.const_data_ptr<double>();
  std::vector<Candidate> candidates;
  for (std::int32_t token = 0; token < values.numel(); ++token) {
    if (std::isfinite(value[token])) candidates.push_back({token, value[token]});
  }
  if (candidates.empty()) {
    throw Error(
        "the model's logits are not finite: its weights are damaged, try an earlier "
        "checkpoint");
  }
  return candidates;
}

void keep_top_k(std::vector<Candidate>& candidates, std::int64_t top_k) {
  if (top_k >= static_cast<std::int64_t>(candidates.size())) return;
  std::partial_sort(candidates.begin(), candidates.begin() + top_k, candidates.end(), likelier);
  candidates.resize(top_k);
}

double total_weight(const std::vector<Candidate>& candidates) {
  return std::accumulate(candidates.begin(), candidates.end(), 0.0,
                         [](double sum, const Candidate& one) { return sum + one.weight; });
}

void to_probabilities(std::vector<Candidate>& candidates, double temperature) {
  const double largest = std::min_element(candidates.begin(), candidates.end(), likelier)->weight;
  for (Candidate& one : candidates) one.weight = std::exp((one.weight - largest) / temperature);
}

void keep_top_p(std::vector<Candidate>& candidates, double top_p) {
  std::sort(candidates.begin(), candidates.end(), likelier);
  const double wanted = top_p * total_weight(candidates);
  double sum = 0;
  std::size_t kept = 0;
  while (kept < candidates.size() && sum < wanted) sum += candidates[kept++].weight;
  candidates.resize(std::max<std::size_t>(kept, 1));
}

std::int32_t draw(const std::vector<Candidate>& candidates, double uniform) {
  double left = uniform * total_weight(candidates);
  for (const Candidate& one : candidates) {
    left -= one.weight;
    if (left < 0) return one.token;
  }
  return candidates.back().token;
}

// The text so far as the model sees it; advance() appends tokens and returns the logits of the
// next.
class Context {
 public:
  Context(CausalLm& model, std::int64_t capacity, bool use_cache) : model_(model) {
    if (use_cache) cache_ = std::make_unique<KvCache>(model.make_cache(1, capacity));
  }

  at::Tensor advance(const std::vector<std::int32_t>& tokens) {
    const at::Tensor added =
        at::tensor(tokens, at::kLong).to(model_.device()).unsqueeze(0);  // [1, len]
    if (cache_) return model_.forward_cached(added, *cache_)[0];
    text_ = text_.defined() ? at::cat({text_, added}, 1) : added;
    return model_.logits(model_.hidden(text_).select(1, -1))[0];
  }

 private:
  CausalLm& model_;
  std::unique_ptr<KvCache> cache_;
  at::Tensor text_;  // without a cache: [1, len]
};

std::vector<std::int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view prompt) {
  std::vector<std::int32_t> tokens = tokenizer.encode(prompt);
  if (tokens.empty()) tokens.push_back(tokenizer.end_of_document());
  return tokens;
}

// A model may have more rows in its head than the tokenizer has tokens (padding).
at::Tensor known_tokens(const at::Tensor& logits, const Tokenizer& tokenizer) {
  return logits.narrow(0, 0, std::min<std::int64_t>(logits.size(0), tokenizer.vocab_size()));
}

// Appends what is complete by now to the generation and hands it on.
void emit(std::string piece, Generation& generation, const OnText& on_text) {
  if (piece.empty()) return;
  if (on_text) on_text(piece);
  generation.text += piece;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    throw Error("temperature must be 0 (greedy) or a positive number, got " +
                std::to_string(options.temperature));
  }
  if (options.top_k < 0) {
    throw Error("top_k must be 0 (off) or more, got " + std::to_string(options.top_k));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    throw Error("top_p must be above 0 and at most 1, got " + std::to_string(options.top_p));
  }
}

std::int32_t Sampler::sample(const at::Tensor& logits) {
  std::vector<Candidate> candidates = finite_candidates(logits);
  if (options_.temperature == 0) keep_top_k(candidates, 1);
  if (options_.top_k > 0) keep_top_k(candidates, options_.top_k);
  if (candidates.size() == 1) return candidates.front().token;
  to_probabilities(candidates, options_.temperature);
  if (options_.top_p < 1) keep_top_p(candidates, options_.top_p);
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;  // [0, 1)
  return draw(candidates, uniform);
}

Generation generate(CausalLm& model, const Tokenizer& tokenizer, std::string_view prompt,
                    const GenerateOptions& options, const OnText& on_text) {
  if (options.max_new_tokens < 1) {
    throw Error("max_new_tokens must be at least 1, got " + std::to_string(options.max_new_tokens));
  }
  const torch::NoGradGuard no_grad;
  const std::vector<std::int32_t> prompt_tokens = encode_prompt(tokenizer, prompt);
  Sampler sampler(options.sampling);
  Generation generation;
  generation.prompt_tokens = static_cast<std::int64_t>(prompt_tokens.size());
  Context context(model, generation.prompt_tokens + options.max_new_tokens, options.use_cache);
  Utf8Stream characters;

  auto start = Clock::now();
  at::Tensor logits = context.advance(prompt_tokens);
  generation.prefill_seconds = seconds_since(start);
  start = Clock::now();
  while (true) {
    const std::int32_t token = sampler.sample(known_tokens(logits, tokenizer));
    generation.ended = token == tokenizer.end_of_document();
    if (generation.ended) break;
    generation.tokens.push_back(token);
    emit(characters.push(tokenizer.token_bytes(token)), generation, on_text);
    if (static_cast<std::int64_t>(generation.tokens.size()) == options.max_new_tokens) break;
    logits = context.advance({token});
  }
  generation.decode_seconds = seconds_since(start);
  emit(characters.finish(), generation, on_text);
  return generation;
}

}  // namespace parallax::lm
