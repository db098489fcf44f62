// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"

#include <ATen/SDPBackend.h>

#include "ops/parallax_ops.h"

namespace parallax::lm {

Attention::Attention(const ModelConfig& config) : config_(config) {
  const std::int64_t q_size = config.num_q_heads * config.head_dim;
  const std::int64_t kv_size = config.num_kv_heads * config.head_dim;
  const auto weight = [this](const char* name, at::IntArrayRef shape) {
    return register_module(name, std::make_shared<Weight>(shape));
  };
  q_proj_ = weight("q_proj", {q_size, config.hidden_size});
  k_proj_ = weight("k_proj", {kv_size, config.hidden_size});
  v_proj_ = weight("v_proj", {kv_size, config.hidden_size});
  o_proj_ = weight("o_proj", {config.hidden_size, q_size});
  q_norm_ = weight("q_norm", {config.head_dim});
  k_norm_ = weight("k_norm", {config.head_dim});
  if (config.mixer == "parallax") {
    r_proj_ = weight("r_proj", {q_size, config.hidden_size});
    if (config.r_norm) r_norm_ = weight("r_norm", {config.head_dim});
  }
}

at::Tensor Attention::heads(const at::Tensor& x, const Weight* norm, const Rope* rope) const {
  at::Tensor y = x.unflatten(-1, {x.size(-1) / config_.head_dim, config_.head_dim});
  if (norm) y = rms_norm(y, norm->weight, config_.rms_norm_eps);
  return rope ? rotate(y, *rope) : y;
}

AttentionInputs Attention::attention_inputs(const at::Tensor& x, const Rope& rope) {
  const std::int64_t q_size = config_.num_q_heads * config_.head_dim;
  const std::int64_t kv_size = config_.num_kv_heads * config_.head_dim;
  AttentionInputs inputs;
  if (r_proj_) {
    const std::vector<at::Tensor> qrkv =
        project(x, {q_proj_->weight, r_proj_->weight, k_proj_->weight, v_proj_->weight})
            .split_with_sizes({q_size, q_size, kv_size, kv_size}, -1);
    inputs.q = heads(qrkv[0], q_norm_.get(), &rope);
    inputs.r = heads(qrkv[1], r_norm_.get(), config_.r_rope ? &rope : nullptr);
    inputs.k = heads(qrkv[2], k_norm_.get(), &rope);
    inputs.v = heads(qrkv[3], nullptr, nullptr);
  } else {
    const std::vector<at::Tensor> qkv =
        project(x, {q_proj_->weight, k_proj_->weight, v_proj_->weight})
            .split_with_sizes({q_size, kv_size, kv_size}, -1);
    inputs.q = heads(qkv[0], q_norm_.get(), &rope);
    inputs.k = heads(qkv[1], k_norm_.get(), &rope);
    inputs.v = heads(qkv[2], nullptr, nullptr);
  }
  return inputs;
}

at::Tensor Attention::project_output(const at::Tensor& o) const {
  return project(o.flatten(-2), {o_proj_->weight});
}

at::Tensor Attention::forward(const at::Tensor& x, const Rope& rope) {
  return project_output(attend(attention_inputs(x, rope)));
}

at::Tensor Attention::forward_cached(const at::Tensor& x, const Rope& rope, KvCache& cache,
                                     RowRange rows, std::int64_t layer) {
  const AttentionInputs inputs = attention_inputs(x, rope);
  ops::append_kv(inputs.k, inputs.v, cache.k(layer), cache.v(layer), cache.positions(rows),
                 cache.page_table(rows));
  // Where the rows hold nothing else, a prompt's keys and values are at hand in one piece.
  const std::int64_t q_len = inputs.q.size(1);
  const bool is_prompt = q_len > 1 && cache.all_have(rows, q_len);
  return project_output(is_prompt ? attend(inputs) : attend_cached(inputs, cache, rows, layer));
}

void Attention::prepare_for_inference(at::ScalarType dtype) {
  std::vector<std::shared_ptr<Weight>> inputs{q_proj_, k_proj_, v_proj_};
  if (r_proj_) inputs.insert(inputs.begin() + 1, r_proj_);
  join_weights(inputs, dtype);
  for (const auto& alone : {o_proj_, q_norm_, k_norm_, r_norm_}) {
    if (alone) join_weights({alone}, dtype);
  }
}

std::shared_ptr<Mixer> make_mixer(const ModelConfig& config) {
  if (config.mixer == "parallax") return std::make_shared<ParallaxAttention>(config);
  return std::make_shared<SoftmaxAttention>(config);
}

std::string attention_backend(const ModelConfig& config, at::TensorOptions options) {
  if (config.mixer == "parallax") {
    return std::string("parallax::attention on ") + (options.device().is_cpu() ? "CPU" : "CUDA");
  }
  constexpr std::int64_t kLen = 128;  // the choice does not hang on it
  const auto heads = [&](std::int64_t count) {
    return at::zeros({1, count, kLen, config.head_dim}, options).requires_grad_();
  };
  const at::Tensor k = heads(config.num_kv_heads);
  const auto choice = static_cast<at::SDPBackend>(
      at::_fused_sdp_choice(heads(config.num_q_heads), k, k, {}, 0.0, /*is_causal=*/true, {},
                            /*enable_gqa=*/config.num_q_heads != config.num_kv_heads));
  const std::string name = "LibTorch's scaled_dot_product_attention, ";
  switch (choice) {
    case at::SDPBackend::flash_attention:
      return name + "flash attention";
    case at::SDPBackend::efficient_attention:
      return name + "memory-efficient attention";
    case at::SDPBackend::cudnn_attention:
      return name + "cuDNN attention";
    default:
      return name + "in separate operations";
  }
}

}  // namespace parallax::lm
