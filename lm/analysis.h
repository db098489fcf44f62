// SPDX-License-Identifier: MIT
// What the heads of a model do with a text: the weights they give and figures that sum them up.
// Symbols as in docs/math.md: p the softmax weights, t = r.k, t_bar its mean under p; Parallax
// attention gives token j the combined weight c = p (1 + t_bar - t), which sums to 1 over the keys
// but may lie below 0 or above 1. A softmax head has c = p.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "lm/model.h"

namespace parallax::lm {

inline constexpr std::int64_t kMaxAnalyzedTokens = 256;  // weights are held as len x len

// Of one head, float64 [len, len] on the CPU: row the query, column the key, 0 above the diagonal.
struct HeadWeights {
  at::Tensor p;           // softmax weights; rows sum to 1
  at::Tensor correction;  // p (t_bar - t); rows sum to 0
  at::Tensor combined;    // their sum
};

// q, r, k [len, head_dim] of one head, after norm and RoPE; r undefined: softmax. Scores are
// q.k / sqrt(head_dim); r.k is not scaled.
HeadWeights head_weights(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k);

// Medians over the queries from first_query on (a mean says little: c is heavy-tailed).
struct HeadStatistics {
  std::int64_t layer = 0, head = 0;
  double sink_mass = 0;           // p of the first key
  double combined_sink_mass = 0;  // c of the first key
  double entropy = 0;             // of p, nats
  double negativity = 0;          // sum of max(-c, 0)
  double total_variation = 0;     // sum of |c|, at least 1: how much noise in v is amplified
  // COR = |Sigma_KV r| / |o_softmax|, Sigma_KV the covariance of values and keys under p: the size
  // of the correction to the output over the softmax output (arXiv 2605.29157, score analysis).
  double cor = 0;
  double min_weight = 0, max_weight = 0;  // of c, over all these queries
};

// v [len, head_dim]. REQUIRES: 0 <= first_query < len.
HeadStatistics head_statistics(const HeadWeights& weights, const at::Tensor& v,
                               std::int64_t first_query);

// A head's first queries see too few keys to say much: the first 64, or a quarter of a short text.
std::int64_t first_analyzed_query(std::int64_t len);

// Every head of every layer, layer by layer, for a text of 2 to kMaxAnalyzedTokens tokens (int64
// [len]). Throws Error for another length.
std::vector<HeadStatistics> analyze_heads(CausalLm& model, const at::Tensor& tokens);

// The weights of one head for such a text. Throws Error for a layer or head that does not exist.
HeadWeights weights_of_head(CausalLm& model, const at::Tensor& tokens, std::int64_t layer,
                            std::int64_t head);

// At most `count` heads worth a picture: the largest COR of a layer first, each layer once before
// any twice; in the order of the model.
std::vector<HeadStatistics> telling_heads(const std::vector<HeadStatistics>& heads,
                                          std::int64_t count);

// A JSON array with an object a head, the members of HeadStatistics by name.
std::string heads_json(const std::vector<HeadStatistics>& heads);

}  // namespace parallax::lm
