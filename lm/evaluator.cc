// SPDX-License-Identifier: MIT
#include "lm/evaluator.h"

#include <chrono>
#include <cmath>
#include <numbers>

namespace parallax::lm {
namespace {

struct Sums {
  double nats = 0;
  std::int64_t tokens = 0;
  std::int64_t bytes = 0;
};

void score(CausalLm& model, const Batch& batch, Sums& sums) {
  const at::Device device = model.device();
  const at::Tensor losses =  // [batch, seq_len]
      model.loss(batch.tokens.to(device), batch.targets.to(device), Reduction::kNone);
  sums.nats += losses.sum(at::kDouble).item<double>();
  sums.tokens += batch.targets.numel();
  sums.bytes += batch.bytes;
}

Evaluation summarize(const Sums& sums, double seconds) {
  Evaluation result;
  result.loss = sums.nats / static_cast<double>(sums.tokens);
  result.bits_per_byte = sums.nats / std::numbers::ln2 / static_cast<double>(sums.bytes);
  result.perplexity = std::exp(result.loss);
  result.tokens = sums.tokens;
  result.bytes = sums.bytes;
  result.seconds = seconds;
  return result;
}

}  // namespace

Evaluation evaluate(CausalLm& model, const std::vector<Batch>& batches,
                    const EvaluationProgress& progress) {
  const torch::NoGradGuard no_grad;
  std::int64_t total_tokens = 0;
  for (const Batch& batch : batches) total_tokens += batch.targets.numel();
  const auto start = std::chrono::steady_clock::now();
  Sums sums;
  Evaluation result;
  for (const Batch& batch : batches) {
    score(model, batch, sums);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    result = summarize(sums, elapsed.count());
    if (progress) progress(result, total_tokens);
  }
  return result;
}

}  // namespace parallax::lm
