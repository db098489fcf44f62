// SPDX-License-Identifier: MIT
// The decoder: Qwen3's architecture (RMSNorm, per-head norms before RoPE, GQA, SwiGLU, explicit
// head_dim; names as in Hugging Face's Qwen3ForCausalLM), with softmax or Parallax attention.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lm/config.h"
#include "lm/kv_cache.h"
#include "lm/layers.h"
#include "lm/mixers/mixer.h"

namespace parallax::lm {

class DecoderLayer;

enum class Reduction { kMean, kNone };

// named_parameters() are the names of the safetensors file: model.embed_tokens.weight,
// model.layers.N.{input_layernorm, self_attn.{q,k,v,o}_proj, self_attn.{q,k}_norm,
// post_attention_layernorm, mlp.{gate,up,down}_proj}.weight, model.norm.weight, lm_head.weight
// where untied; Parallax adds self_attn.r_proj.weight and, with r_norm, self_attn.r_norm.weight.
// All float32; linear weights are [out, in]. Token tensors are int64 (decode() takes int32 too).
class CausalLm : public torch::nn::Module {
 public:
  // Matrices from N(0, init_std), gains 1. Each tensor is drawn from a stream of its own, keyed by
  // `seed` and its name: two models that differ in mixer start equal wherever shapes agree.
  // Throws Error where the config is not concrete (match_to is set: resolve_match first).
  CausalLm(const ModelConfig& config, std::uint64_t seed);

  // Activations, and the weights as they meet them, in `dtype` (float32, bfloat16, or float64 for
  // tests); norms' statistics, RoPE's angles and the loss stay in float32 or better.
  void compute_in(at::ScalarType dtype);

  // tokens [batch, len] -> the final-normed residual stream [batch, len, hidden_size].
  at::Tensor hidden(const at::Tensor& tokens);

  // hidden [..., hidden_size] -> [..., vocab_size], float32 or wider.
  at::Tensor logits(const at::Tensor& hidden);

  // Cross-entropy in nats of targets [batch, len] after tokens [batch, len]; targets of -100 count
  // nothing. kMean: a scalar, the mean over the counted targets; kNone: [batch, len], 0 where not
  // counted, no gradient. Large vocabularies never hold the logits of all rows at once.
  at::Tensor loss(const at::Tensor& tokens, const at::Tensor& targets,
                  Reduction reduction = Reduction::kMean);

  // tokens [count, len] that follow those in rows [first_row, first_row + count) of the cache ->
  // logits of the last position [count, vocab_size]; the cache then holds them too. Throws Error
  // where the cache is too small.
  at::Tensor forward_cached(const at::Tensor& tokens, KvCache& cache, std::int64_t first_row = 0);

  // The device's part of that, for rows that KvCache::append has counted the tokens of, or that are
  // idle (their logits mean nothing). Where len is 1 it reads nothing on the host and allocates
  // nothing that a CUDA graph could not hold.
  at::Tensor decode(const at::Tensor& tokens, KvCache& cache, RowRange rows);

  // The same on a GPU, where of the logits of ids below num_tokens only the argmax words
  // (ops/step.h) are wanted: raises words [count] to them.
  void decode_argmax(const at::Tensor& tokens, KvCache& cache, RowRange rows,
                     std::int64_t num_tokens, const at::Tensor& words);

  // Casts the weights to the dtype of compute_in and lets those that meet the same input lie one
  // after another, so that no forward does either again. Ends training.
  void prepare_for_inference();

  // What layer `layer` attends with, for tokens [batch, len].
  AttentionInputs attention_inputs(const at::Tensor& tokens, std::int64_t layer);

  // The forward pass of tokens [batch, len] once more, without gradients: each activation in the
  // order in which it arises, under the name of the module that it comes out of
  // ("model.layers.3.mlp"; attention's inputs as "model.layers.3.self_attn.q").
  using Visit = std::function<void(const std::string& name, const at::Tensor& activation)>;
  void trace(const at::Tensor& tokens, const Visit& visit);

  // An empty cache with this model's heads, compute dtype and device.
  KvCache make_cache(const KvCacheShape& shape) const;

  const ModelConfig& config() const { return config_; }
  at::Device device() const;

 private:
  const at::Tensor& head_weight() const;  // [vocab_size, hidden_size]
  at::Tensor embed(const at::Tensor& tokens) const;
  Rope rope(const at::Tensor& positions) const;
  at::Tensor final_norm(const at::Tensor& x) const;
  // decode() up to the residual stream of the last position [count, hidden_size].
  at::Tensor decode_hidden(const at::Tensor& tokens, KvCache& cache, RowRange rows);

  ModelConfig config_;
  at::ScalarType compute_dtype_ = at::kFloat;
  std::shared_ptr<Weight> embed_tokens_, norm_, lm_head_;
  std::vector<std::shared_ptr<DecoderLayer>> layers_;
};

}  // namespace parallax::lm
