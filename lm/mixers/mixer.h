// SPDX-License-Identifier: MIT
// A sequence mixer: what turns the normed residual stream of a decoder layer into its update by
// looking at other tokens. The decoder owns norms, residuals and the FFN; a mixer owns its weights.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "lm/config.h"
#include "lm/kv_cache.h"
#include "lm/layers.h"

namespace parallax::lm {

// What attention sees, after norm and RoPE: q, r [batch, len, num_q_heads, head_dim], k, v [batch,
// len, num_kv_heads, head_dim]. r is undefined in a softmax model.
struct AttentionInputs {
  at::Tensor q, r, k, v;
};

// One forward over the newest tokens of some rows of a cache, as it passes through the layers.
struct CachedForward {
  KvCache& cache;
  RowRange rows;
  Rope rope;            // of the newest tokens; undefined where they are fewer than kPrefillLen
  at::Tensor schedule;  // of ops::decode on a GPU: made before the first layer, used by all
  at::Tensor next;      // weights that are read after the mixer's (project_onto), or undefined
};

// From here on the forward kernel reads a cache faster than the decode kernel, which is made for a
// few new tokens.
inline constexpr std::int64_t kPrefillLen = 16;

class Mixer : public torch::nn::Module {
 public:
  // Makes what all layers share of a forward over `len` tokens a row: before anything else of it,
  // so that it is settled (ops/step.h) when a layer reads it.
  virtual void begin_cached(CachedForward& /*call*/, std::int64_t /*len*/) const {}

  // x [batch, len, hidden_size] -> the same shape. Causal.
  virtual at::Tensor forward(const at::Tensor& x, const Rope& rope) = 0;

  // residual (whose memory may serve) plus the same of the normed residual, for the newest tokens
  // of some rows of a cache that already counts them (KvCache::append): writes their keys and
  // values to layer `layer` of the cache and attends to all that the rows hold. Idle rows give
  // zeros or what their token alone would.
  virtual at::Tensor forward_cached(const at::Tensor& residual, const Norm& norm,
                                    CachedForward& call, std::int64_t layer) = 0;

  // Lays the weights out for inference (CausalLm::prepare_for_inference).
  virtual void prepare_for_inference(at::ScalarType dtype) = 0;

  virtual AttentionInputs attention_inputs(const at::Tensor& x, const Rope& rope) = 0;
};

// The mixer that config.mixer names. Its weights are not initialised.
std::shared_ptr<Mixer> make_mixer(const ModelConfig& config);

}  // namespace parallax::lm
