// SPDX-License-Identifier: MIT
#include "lm/cost.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace parallax::lm {
namespace {

std::int64_t elements(const TensorShape& tensor) {
  return std::accumulate(tensor.shape.begin(), tensor.shape.end(), std::int64_t{1},
                         std::multiplies<>());
}

// Multiply-adds of all matrix products with weights, per token. The embedding is a lookup, not a
// product; the head is one whether tied or not.
double weight_products(const ModelConfig& config) {
  std::int64_t products = config.vocab_size * config.hidden_size;
  for (const TensorShape& tensor : parameter_shapes(config)) {
    if (tensor.shape.size() == 2 && tensor.name.starts_with("model.layers.")) {
      products += elements(tensor);
    }
  }
  return static_cast<double>(products);
}

// One [queries x keys] product with head_dim on an axis, all layers, per token: 2 * head_dim *
// seq_len / 2 for each query head.
double tile_product(const ModelConfig& config, std::int64_t seq_len) {
  return static_cast<double>(config.num_layers * config.num_q_heads * config.head_dim) *
         static_cast<double>(seq_len);
}

bool is_parallax(const ModelConfig& config) { return config.mixer == "parallax"; }

// Elements a token leaves for the backward of one layer: two residual states and their norms; q, r,
// k before and after norm and RoPE; v, o and, Parallax, v_bar; gate|up and the product of both.
std::int64_t activations_per_token(const ModelConfig& config) {
  const std::int64_t q_size = config.num_q_heads * config.head_dim;
  const std::int64_t kv_size = config.num_kv_heads * config.head_dim;
  const std::int64_t attention =
      is_parallax(config) ? 6 * q_size + 3 * kv_size : 3 * q_size + 3 * kv_size;
  return 4 * config.hidden_size + attention + 3 * config.ffn_size;
}

}  // namespace

std::vector<TensorShape> parameter_shapes(const ModelConfig& config) {
  const std::int64_t width = config.hidden_size;
  const std::int64_t q_size = config.num_q_heads * config.head_dim;
  const std::int64_t kv_size = config.num_kv_heads * config.head_dim;
  std::vector<TensorShape> shapes = {{"model.embed_tokens.weight", {config.vocab_size, width}}};
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const auto add = [&, prefix = "model.layers." + std::to_string(layer) + "."](
                         const std::string& name, std::vector<std::int64_t> shape) {
      shapes.push_back({prefix + name + ".weight", std::move(shape)});
    };
    add("input_layernorm", {width});
    add("self_attn.q_proj", {q_size, width});
    add("self_attn.k_proj", {kv_size, width});
    add("self_attn.v_proj", {kv_size, width});
    add("self_attn.o_proj", {width, q_size});
    add("self_attn.q_norm", {config.head_dim});
    add("self_attn.k_norm", {config.head_dim});
    if (is_parallax(config)) {
      add("self_attn.r_proj", {q_size, width});
      if (config.r_norm) add("self_attn.r_norm", {config.head_dim});
    }
    add("post_attention_layernorm", {width});
    add("mlp.gate_proj", {config.ffn_size, width});
    add("mlp.up_proj", {config.ffn_size, width});
    add("mlp.down_proj", {width, config.ffn_size});
  }
  shapes.push_back({"model.norm.weight", {width}});
  if (!config.tie_embeddings) shapes.push_back({"lm_head.weight", {config.vocab_size, width}});
  return shapes;
}

std::int64_t parameter_count(const ModelConfig& config) {
  std::int64_t count = 0;
  for (const TensorShape& tensor : parameter_shapes(config)) count += elements(tensor);
  return count;
}

double forward_flops_per_token(const ModelConfig& config, std::int64_t seq_len) {
  const double tile_products = is_parallax(config) ? 4 : 2;
  return 2 * weight_products(config) + tile_products * tile_product(config, seq_len);
}

double training_flops_per_token(const ModelConfig& config, std::int64_t seq_len) {
  // A weight's product comes back twice in backward: for its input and for itself.
  const double tile_products = is_parallax(config) ? 4 + 8 : 2 + 5;
  return 3 * 2 * weight_products(config) + tile_products * tile_product(config, seq_len);
}

TrainingMemory training_memory(const Config& config) {
  constexpr std::int64_t kFloatBytes = 4;
  TrainingMemory memory;
  memory.parameters = kFloatBytes * parameter_count(config.model);
  memory.gradients = memory.parameters;
  for (const TensorShape& tensor : parameter_shapes(config.model)) {
    const bool muon = config.optimizer.name == "muon" && tensor.shape.size() == 2 &&
                      tensor.name.starts_with("model.layers.");
    memory.optimizer_state += kFloatBytes * elements(tensor) * (muon ? 1 : 2);
  }
  const std::int64_t tokens = config.train.batch_size * config.data.seq_len;
  const bool is_half = config.train.dtype == "bfloat16" ||
                       (config.train.dtype == "auto" && config.train.device == "cuda");
  const std::int64_t activation_bytes = is_half ? 2 : kFloatBytes;
  const std::int64_t per_token =
      config.model.num_layers * activations_per_token(config.model) + 3 * config.model.hidden_size;
  memory.activations = activation_bytes * tokens * per_token;
  return memory;
}

}  // namespace parallax::lm
