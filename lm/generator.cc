// SPDX-License-Identifier: MIT
#include "lm/generator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "lm/decode_step.h"
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

Error not_finite() {
  return Error(
      "the model's logits are not finite: its weights are damaged, try an earlier checkpoint");
}

std::vector<Candidate> finite_candidates(const at::Tensor& logits) {
  const at::Tensor values = logits.to(at::kCPU, at::kDouble).contiguous();
  const double* value = values.const_data_ptr<double>();
  std::vector<Candidate> candidates;
  for (std::int32_t token = 0; token < values.numel(); ++token) {
    if (std::isfinite(value[token])) candidates.push_back({token, value[token]});
  }
  if (candidates.empty()) throw not_finite();
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

std::vector<std::int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view prompt) {
  std::vector<std::int32_t> tokens = tokenizer.encode(prompt);
  if (tokens.empty()) tokens.push_back(tokenizer.end_of_document());
  return tokens;
}

at::Tensor on_device(const std::vector<std::int32_t>& tokens, const CausalLm& model) {
  return at::tensor(tokens, at::kLong).to(model.device()).unsqueeze(0);  // [1, len]
}

// A model may have more rows in its head than the tokenizer has tokens (padding). logits [...,
// vocab_size].
at::Tensor of_known_tokens(const at::Tensor& logits, const Tokenizer& tokenizer) {
  return logits.narrow(-1, 0, std::min<std::int64_t>(logits.size(-1), tokenizer.vocab_size()));
}

// Where pieces and whole texts go.
struct Listener {
  const OnText& on_text;
  const OnDone& on_done;
};

// One text as it grows.
class Text {
 public:
  Text(std::size_t index, std::string_view prompt, const Tokenizer& tokenizer,
       const GenerateOptions& options, const Listener& listener)
      : index_(index),
        tokenizer_(tokenizer),
        max_new_tokens_(options.max_new_tokens),
        listener_(listener),
        sampler_(seeded(options.sampling, index)),
        prompt_(encode_prompt(tokenizer, prompt)) {
    generation_.prompt_tokens = static_cast<std::int64_t>(prompt_.size());
    generation_.seed = options.sampling.seed + index;
  }

  const std::vector<std::int32_t>& prompt() const { return prompt_; }
  // Tokens that two prompts begin with alike.
  std::int64_t common_prefix(const Text& other) const {
    const auto end =
        std::mismatch(prompt_.begin(), prompt_.end(), other.prompt_.begin(), other.prompt_.end());
    return end.first - prompt_.begin();
  }
  std::int64_t max_len() const { return generation_.prompt_tokens + max_new_tokens_; }
  std::int32_t newest() const { return generation_.tokens.back(); }
  // New tokens that it may still get.
  std::int64_t room() const {
    return max_new_tokens_ - static_cast<std::int64_t>(generation_.tokens.size());
  }
  Generation take() { return std::move(generation_); }

  std::int32_t sample(const at::Tensor& logits) { return sampler_.sample(logits); }

  // -> whether there is anything to go on from.
  bool grow(std::int32_t token) {
    generation_.ended = token == tokenizer_.end_of_document();
    if (!generation_.ended) {
      generation_.tokens.push_back(token);
      emit(characters_.push(tokenizer_.token_bytes(token)));
    }
    if (!generation_.ended && room() > 0) return true;
    emit(characters_.finish());
    if (listener_.on_done) listener_.on_done(index_, generation_);
    return false;
  }

 private:
  static SamplingOptions seeded(SamplingOptions options, std::size_t index) {
    options.seed += index;
    return options;
  }

  // Appends what is complete by now and hands it on.
  void emit(const std::string& piece) {
    if (piece.empty()) return;
    if (listener_.on_text) listener_.on_text(index_, piece);
    generation_.text += piece;
  }

  std::size_t index_;
  const Tokenizer& tokenizer_;
  std::int64_t max_new_tokens_;
  Listener listener_;
  Sampler sampler_;
  Utf8Stream characters_;
  std::vector<std::int32_t> prompt_;
  Generation generation_;
};

// Grows texts in the rows of a cache: row b holds the b-th of those that are growing.
class Batch {
 public:
  Batch(CausalLm& model, const Tokenizer& tokenizer, std::vector<Text>& texts,
        const GenerateOptions& options)
      : model_(model),
        tokenizer_(tokenizer),
        texts_(texts),
        is_greedy_(options.sampling.temperature == 0),
        prefill_chunk_(options.prefill_chunk),
        max_batch_(
            std::min<std::int64_t>(options.max_batch, static_cast<std::int64_t>(texts.size()))),
        cache_(model.make_cache(shape(options))),
        step_(model, cache_, tokenizer.vocab_size()) {}

  GenerationTimes run() {
    while (next_ < texts_.size() || !growing_.empty()) {
      auto start = Clock::now();
      while (next_ < texts_.size() && has_place()) admit();
      times_.prefill_seconds += seconds_since(start);
      if (growing_.empty()) continue;
      start = Clock::now();
      if (is_greedy_ && step_.greedy()) {
        write_on();
      } else {
        step();
      }
      times_.decode_seconds += seconds_since(start);
    }
    return times_;
  }

 private:
  KvCacheShape shape(const GenerateOptions& options) const {
    KvCacheShape shape;
    shape.batch = DecodeStep::rows_for(max_batch_, model_.device());
    shape.page_size = options.page_size;
    std::vector<std::int64_t> pages;
    for (const Text& text : texts_) {
      shape.max_len = std::max(shape.max_len, text.max_len());
      pages.push_back((text.max_len() + options.page_size - 1) / options.page_size);
    }
    // Enough for any max_batch of them.
    std::sort(pages.begin(), pages.end(), std::greater<>());
    shape.num_pages = std::accumulate(pages.begin(), pages.begin() + max_batch_, std::int64_t{0});
    return shape;
  }

  bool has_place() const { return static_cast<std::int64_t>(growing_.size()) < max_batch_; }

  // Prefills the next prompt, alone: what it gets does not depend on the others. Those after it
  // that are equal share its pages.
  void admit() {
    const std::vector<std::int32_t>& prompt = texts_[next_].prompt();
    const std::size_t source = growing_.size();
    const at::Tensor logits = prefill(texts_[next_], static_cast<std::int64_t>(source));
    growing_.push_back(next_++);
    while (next_ < texts_.size() && has_place() && texts_[next_].prompt() == prompt) {
      const auto row = static_cast<std::int64_t>(growing_.size());
      cache_.fork(static_cast<std::int64_t>(source), row);
      cache_.reserve(row, texts_[next_].max_len() - cache_.len(row));
      growing_.push_back(next_++);
    }
    grow(source, logits.expand({static_cast<std::int64_t>(growing_.size() - source), -1}));
  }

  // A text's prompt into an idle row, in chunks. -> logits after it [1, vocab_size].
  at::Tensor prefill(const Text& text, std::int64_t row) {
    if (model_.device().is_cuda()) share_prefix(text, row);
    cache_.reserve(row, text.max_len() - cache_.len(row));
    const auto begin = text.prompt().begin() + cache_.len(row);
    const std::vector<std::int32_t> missing(begin, text.prompt().end());
    at::Tensor logits;
    for (const at::Tensor& chunk : on_device(missing, model_).split(prefill_chunk_, 1)) {
      logits = model_.forward_cached(chunk, cache_, row);
    }
    times_.prefill_tokens += static_cast<std::int64_t>(missing.size());
    return logits;
  }

  // Where a prompt that grows already begins with a page or more of the same tokens, the row holds
  // those, but for the last of a prompt, whose logits are wanted. Not on a CPU, where no text's
  // rounding shall depend on its neighbours.
  void share_prefix(const Text& text, std::int64_t row) {
    std::int64_t longest = cache_.page_size() - 1, from = -1;
    for (std::size_t other = 0; other < growing_.size(); ++other) {
      const std::int64_t common = text.common_prefix(texts_[growing_[other]]);
      const std::int64_t usable =
          std::min(common, static_cast<std::int64_t>(text.prompt().size()) - 1);
      if (usable <= longest) continue;
      longest = usable;
      from = static_cast<std::int64_t>(other);
    }
    if (from >= 0) cache_.fork(from, row, longest);
  }

  std::vector<std::int32_t> newest() const {
    std::vector<std::int32_t> tokens;
    for (const std::size_t text : growing_) tokens.push_back(texts_[text].newest());
    return tokens;
  }

  // A token more for each.
  void step() {
    const std::vector<std::int32_t> tokens = newest();
    grow(0, step_(tokens));
    times_.decode_tokens += static_cast<std::int64_t>(tokens.size());
  }

  // Tokens for all until a text is complete, always the likeliest. A step is under way before the
  // tokens of the one before it are known here; what it finds for a text that has ended is dropped.
  void write_on() {
    std::vector<bool> complete(growing_.size());
    const auto take = [&] {
      const std::vector<std::int32_t> tokens = step_.take();
      for (std::size_t row = growing_.size(); row-- > 0;) {
        if (complete[row]) continue;
        if (tokens[row] < 0) throw not_finite();
        complete[row] = !texts_[growing_[row]].grow(tokens[row]);
        ++times_.decode_tokens;
      }
      return std::find(complete.begin(), complete.end(), true) == complete.end();
    };
    step_.start(newest());
    bool all_go_on = true;
    while (all_go_on) {
      const bool next = std::all_of(growing_.begin(), growing_.end(),
                                    [&](std::size_t text) { return texts_[text].room() > 1; });
      if (next) step_.start_next();
      all_go_on = take();
      if (!all_go_on && next) take();
    }
    for (std::size_t row = growing_.size(); row-- > 0;) {
      if (complete[row]) remove(row);
    }
  }

  // The texts in the rows from `first` on get a token each, by their logits [rows, vocab_size].
  void grow(std::size_t first, const at::Tensor& logits) {
    const std::vector<std::int32_t> tokens = choose(first, of_known_tokens(logits, tokenizer_));
    for (std::size_t row = growing_.size(); row-- > first;) {
      if (!texts_[growing_[row]].grow(tokens[row - first])) remove(row);
    }
  }

  std::vector<std::int32_t> choose(std::size_t first, const at::Tensor& logits) {
    std::vector<std::int32_t> tokens;
    if (is_greedy_ && logits.is_cuda()) {  // the whole logits need not leave the GPU
      const auto [largest, token] = logits.max(1);
      const at::Tensor both = at::stack({largest.to(at::kDouble), token.to(at::kDouble)}).cpu();
      if (both.isfinite().all().item<bool>()) {
        const double* chosen = both[1].const_data_ptr<double>();
        tokens.assign(chosen, chosen + logits.size(0));
        return tokens;
      }
    }
    const at::Tensor on_host = logits.to(at::kCPU);
    for (std::int64_t row = 0; row < on_host.size(0); ++row) {
      tokens.push_back(texts_[growing_[first + row]].sample(on_host[row]));
    }
    return tokens;
  }

  // The last row moves to the place that becomes free. Rows behind `row` have all grown.
  void remove(std::size_t row) {
    const auto last = static_cast<std::int64_t>(growing_.size()) - 1;
    const auto place = static_cast<std::int64_t>(row);
    cache_.release(place);
    if (place != last) {
      cache_.fork(last, place);
      cache_.release(last);
    }
    growing_[row] = growing_.back();
    growing_.pop_back();
  }

  CausalLm& model_;
  const Tokenizer& tokenizer_;
  std::vector<Text>& texts_;
  bool is_greedy_;
  std::int64_t prefill_chunk_;
  std::int64_t max_batch_;
  KvCache cache_;
  DecodeStep step_;
  std::vector<std::size_t> growing_;  // the text in each row
  std::size_t next_ = 0;              // the first that waits
  GenerationTimes times_;
};

// Recomputes the whole text for every token.
GenerationTimes grow_without_cache(CausalLm& model, const Tokenizer& tokenizer, Text& text) {
  GenerationTimes times;
  at::Tensor tokens = on_device(text.prompt(), model);
  times.prefill_tokens = tokens.size(1);
  const auto choose = [&] {
    const at::Tensor logits = model.logits(model.hidden(tokens).select(1, -1))[0];
    return text.sample(of_known_tokens(logits, tokenizer));
  };
  auto start = Clock::now();
  std::int32_t token = choose();
  times.prefill_seconds = seconds_since(start);
  start = Clock::now();
  while (text.grow(token)) {
    tokens = at::cat({tokens, on_device({token}, model)}, 1);
    token = choose();
    ++times.decode_tokens;
  }
  times.decode_seconds = seconds_since(start);
  return times;
}

void check(const GenerateOptions& options) {
  const auto at_least_1 = [](const char* name, std::int64_t value) {
    if (value >= 1) return;
    throw Error(std::string(name) + " must be at least 1, got " + std::to_string(value));
  };
  at_least_1("max_new_tokens", options.max_new_tokens);
  at_least_1("max_batch", options.max_batch);
  at_least_1("prefill_chunk", options.prefill_chunk);
}

double per_second(std::int64_t count, double seconds) {
  return count > 0 && seconds > 0 ? static_cast<double>(count) / seconds : 0;
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

GenerationTimes& GenerationTimes::operator+=(const GenerationTimes& other) {
  prefill_tokens += other.prefill_tokens;
  prefill_seconds += other.prefill_seconds;
  decode_tokens += other.decode_tokens;
  decode_seconds += other.decode_seconds;
  return *this;
}

double GenerationTimes::prefill_tokens_per_s() const {
  return per_second(prefill_tokens, prefill_seconds);
}

double GenerationTimes::decode_tokens_per_s() const {
  return per_second(decode_tokens, decode_seconds);
}

Generations generate(CausalLm& model, const Tokenizer& tokenizer,
                     const std::vector<std::string>& prompts, const GenerateOptions& options,
                     const OnText& on_text, const OnDone& on_done) {
  check(options);
  const torch::NoGradGuard no_grad;
  std::vector<Text> texts;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    texts.emplace_back(i, prompts[i], tokenizer, options, Listener{on_text, on_done});
  }
  Generations result;
  if (options.use_cache && !texts.empty()) {
    result.times = Batch(model, tokenizer, texts, options).run();
  } else {
    for (Text& text : texts) result.times += grow_without_cache(model, tokenizer, text);
  }
  for (Text& text : texts) result.texts.push_back(text.take());
  return result;
}

Generation generate(CausalLm& model, const Tokenizer& tokenizer, std::string_view prompt,
                    const GenerateOptions& options, const OnText& on_text) {
  return generate(model, tokenizer, std::vector<std::string>{std::string(prompt)}, options, on_text)
      .texts.front();
}

}  // namespace parallax::lm
