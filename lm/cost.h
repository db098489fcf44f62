// SPDX-License-Identifier: MIT
// What a model costs, from its shape alone. FLOPs count a multiply-add as 2; attention is causal,
// so a query sees T / 2 keys on average; a tied head counts as the product that it is; norms, RoPE,
// softmax and other elementwise work are left out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lm/config.h"

namespace parallax::lm {

struct TensorShape {
  std::string name;  // as in CausalLm::named_parameters(), in the same order
  std::vector<std::int64_t> shape;
};

std::vector<TensorShape> parameter_shapes(const ModelConfig& config);
std::int64_t parameter_count(const ModelConfig& config);

// Per token at sequence length seq_len. A tile product costs num_q_heads * head_dim * seq_len a
// layer; forward attention has 2 (softmax) or 4 (Parallax), backward 5 or 8.
double forward_flops_per_token(const ModelConfig& config, std::int64_t seq_len);
double training_flops_per_token(const ModelConfig& config, std::int64_t seq_len);

// An estimate in bytes of what training holds at once.
struct TrainingMemory {
  std::int64_t parameters = 0;       // float32
  std::int64_t gradients = 0;        // float32
  std::int64_t optimizer_state = 0;  // float32: Muon one copy, AdamW two
  std::int64_t activations = 0;      // kept for backward, of one forward pass
  std::int64_t total() const { return parameters + gradients + optimizer_state + activations; }
};
TrainingMemory training_memory(const Config& config);

}  // namespace parallax::lm
