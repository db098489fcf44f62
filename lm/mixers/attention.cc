// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"

#include <ATen/SDPBackend.h>

#include "ops/parallax_ops.h"
#include "ops/step.h"

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

std::vector<at::Tensor> Attention::input_weights() const {
  std::vector<at::Tensor> weights{q_proj_->weight, k_proj_->weight, v_proj_->weight};
  if (r_proj_) weights.insert(weights.begin() + 1, r_proj_->weight);
  return weights;
}

AttentionInputs Attention::split(const at::Tensor& product) const {
  const std::int64_t q_size = config_.num_q_heads * config_.head_dim;
  const std::int64_t kv_size = config_.num_kv_heads * config_.head_dim;
  std::vector<std::int64_t> sizes{q_size, kv_size, kv_size};
  if (r_proj_) sizes.insert(sizes.begin() + 1, q_size);
  std::vector<at::Tensor> parts = product.split_with_sizes(sizes, -1);
  for (at::Tensor& part : parts) {
    part = part.unflatten(-1, {part.size(-1) / config_.head_dim, config_.head_dim});
  }
  if (r_proj_) return {parts[0], parts[1], parts[2], parts[3]};
  return {parts[0], {}, parts[1], parts[2]};
}

at::Tensor Attention::prepared(const at::Tensor& x, const Weight* norm, const Rope* rope) const {
  const at::Tensor y = norm ? rms_norm(x, norm->weight, config_.rms_norm_eps) : x;
  return rope ? rotate(y, *rope) : y;
}

AttentionInputs Attention::prepared(AttentionInputs raw, const Rope& rope) const {
  raw.q = prepared(raw.q, q_norm_.get(), &rope);
  if (r_proj_) raw.r = prepared(raw.r, r_norm_.get(), config_.r_rope ? &rope : nullptr);
  raw.k = prepared(raw.k, k_norm_.get(), &rope);
  return raw;
}

AttentionInputs Attention::attention_inputs(const at::Tensor& x, const Rope& rope) {
  return prepared(split(project(x, input_weights())), rope);
}

at::Tensor Attention::forward(const at::Tensor& x, const Rope& rope) {
  return project(attend(attention_inputs(x, rope)).flatten(-2), {o_proj_->weight});
}

at::Tensor Attention::forward_cached(const at::Tensor& residual, const Norm& norm,
                                     CachedForward& call, std::int64_t layer) {
  const std::int64_t len = residual.size(1);
  const AttentionInputs raw = split(project_normed(residual, norm, input_weights()));
  at::Tensor o;
  if (len < kPrefillLen) {
    const auto [q, r] = append(raw, call, layer);
    o = attend_cached(q, r, call, layer);
  } else {
    const AttentionInputs inputs = prepared(raw, call.rope);
    KvCache& cache = call.cache;
    ops::append_kv(inputs.k, inputs.v, cache.k(layer), cache.v(layer), cache.positions(call.rows),
                   cache.page_table(call.rows));
    // Where the rows hold nothing else, the new keys and values are at hand in one piece.
    o = cache.all_have(call.rows, len) ? attend(inputs)
                                       : attend_cached(inputs.q, inputs.r, call, layer);
  }
  return project_onto(residual, o.flatten(-2), o_proj_->weight, call.next);
}

std::pair<at::Tensor, at::Tensor> Attention::append(const AttentionInputs& raw, CachedForward& call,
                                                    std::int64_t layer) const {
  KvCache& cache = call.cache;
  ops::RotaryOptions options;
  options.q_gain = q_norm_->weight;
  options.k_gain = k_norm_->weight;
  if (r_norm_) options.r_gain = r_norm_->weight;
  options.rotate_r = r_proj_ && config_.r_rope;
  options.eps = config_.rms_norm_eps;
  options.page_table = cache.page_table(call.rows);
  const auto append = [&](const auto& append_kv) -> std::pair<at::Tensor, at::Tensor> {
    // Softmax has no r; its q stands in and what comes of it is dropped.
    const auto [q, r] =
        append_kv(raw.q, r_proj_ ? raw.r : raw.q, raw.k, raw.v, cache.k(layer), cache.v(layer),
                  cache.positions(call.rows), cache.angles().cos, cache.angles().sin, options);
    return {q, r_proj_ ? r : at::Tensor()};
  };
  return raw.q.is_cuda() ? append(ops::append_kv_settled) : append(ops::append_kv_rotary);
}

// The gains of the heads stay in float32, as append_kv takes them.
void Attention::prepare_for_inference(at::ScalarType dtype) {
  std::vector<std::shared_ptr<Weight>> inputs{q_proj_, k_proj_, v_proj_};
  if (r_proj_) inputs.insert(inputs.begin() + 1, r_proj_);
  join_weights(inputs, dtype);
  join_weights({o_proj_}, dtype);
  for (const auto& gain : {q_norm_, k_norm_, r_norm_}) {
    if (gain) join_weights({gain}, at::kFloat);
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
