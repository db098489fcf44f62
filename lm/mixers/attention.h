// SPDX-License-Identifier: MIT
// Multi-head attention as Qwen3 has it, around an inner rule: projections without bias, RMSNorm per
// head on q, k (and r) before RoPE, grouped keys and values, output projection. SoftmaxAttention
// runs LibTorch's own attention; ParallaxAttention runs torch.ops.parallax with the probe r = W_R
// x.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "lm/mixers/mixer.h"

namespace parallax::lm {

class Attention : public Mixer {
 public:
  explicit Attention(const ModelConfig& config);

  at::Tensor forward(const at::Tensor& x, const Rope& rope) final;
  at::Tensor forward_cached(const at::Tensor& residual, const Norm& norm, CachedForward& call,
                            std::int64_t layer) final;
  void prepare_for_inference(at::ScalarType dtype) final;
  AttentionInputs attention_inputs(const at::Tensor& x, const Rope& rope) final;

 protected:
  // -> o [batch, len, num_q_heads, head_dim]
  virtual at::Tensor attend(const AttentionInputs& inputs) = 0;
  // The same for the newest tokens, whose keys and values are in the cache already.
  virtual at::Tensor attend_cached(const at::Tensor& q, const at::Tensor& r, CachedForward& call,
                                   std::int64_t layer) = 0;

  const ModelConfig& config() const { return config_; }

 private:
  // Their weights, as they lie: q_proj, r_proj in a Parallax model, k_proj, v_proj.
  std::vector<at::Tensor> input_weights() const;
  // q, r, k, v before norm and RoPE: views [batch, len, heads, head_dim] of one product with them.
  AttentionInputs split(const at::Tensor& product) const;
  // Normed and turned.
  AttentionInputs prepared(AttentionInputs raw, const Rope& rope) const;
  // x [batch, len, heads, head_dim] -> per-head norm (where there is one), RoPE (where asked for).
  at::Tensor prepared(const at::Tensor& x, const Weight* norm, const Rope* rope) const;
  // Writes the newest keys and values to the cache. -> q and r, normed and turned, r undefined in a
  // softmax model.
  std::pair<at::Tensor, at::Tensor> append(const AttentionInputs& raw, CachedForward& call,
                                           std::int64_t layer) const;

  ModelConfig config_;
  std::shared_ptr<Weight> q_proj_, k_proj_, v_proj_, o_proj_, r_proj_;
  std::shared_ptr<Weight> q_norm_, k_norm_, r_norm_;  // r_*: null where there is none
};

class SoftmaxAttention final : public Attention {
 public:
  using Attention::Attention;

 private:
  at::Tensor attend(const AttentionInputs& inputs) override;
  at::Tensor attend_cached(const at::Tensor& q, const at::Tensor& r, CachedForward& call,
                           std::int64_t layer) override;
};

class ParallaxAttention final : public Attention {
 public:
  using Attention::Attention;

  void begin_cached(CachedForward& call, std::int64_t len) const override;

 private:
  at::Tensor attend(const AttentionInputs& inputs) override;
  at::Tensor attend_cached(const at::Tensor& q, const at::Tensor& r, CachedForward& call,
                           std::int64_t layer) override;
};

// What such a model attends with on tensors of these options, in words for a log.
std::string attention_backend(const ModelConfig& config, at::TensorOptions options);

}  // namespace parallax::lm
