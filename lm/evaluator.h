// SPDX-License-Identifier: MIT
// How well a model predicts text.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "lm/data.h"
#include "lm/model.h"

namespace parallax::lm {

struct Evaluation {
  double loss = 0;           // nats a token, over all targets
  double bits_per_byte = 0;  // the same loss over the bytes of text in the targets
  double perplexity = 0;     // exp(loss)
  std::int64_t tokens = 0;   // targets scored
  std::int64_t bytes = 0;
  double seconds = 0;
};

// Called after each batch with what has been scored so far and the number of targets in all.
using EvaluationProgress = std::function<void(const Evaluation& so_far, std::int64_t total_tokens)>;

// Scores every target of the batches (validation_batches of data.h) once, each sequence on its own,
// on the model's device. Sums are float64 in a fixed order.
Evaluation evaluate(CausalLm& model, const std::vector<Batch>& batches,
                    const EvaluationProgress& progress = {});

}  // namespace parallax::lm
