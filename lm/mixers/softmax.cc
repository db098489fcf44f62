// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"

namespace parallax::lm {
namespace {

// q [batch, len, heads, head_dim] over k, v; LibTorch wants the heads before the length.
at::Tensor sdpa(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::optional<at::Tensor>& mask, bool causal) {
  return at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                          mask, /*dropout_p=*/0.0, causal, /*scale=*/std::nullopt,
                                          /*enable_gqa=*/q.size(2) != k.size(2))
      .transpose(1, 2);
}

}  // namespace

at::Tensor SoftmaxAttention::attend(const AttentionInputs& inputs) {
  return sdpa(inputs.q, inputs.k, inputs.v, {}, /*causal=*/true);
}

at::Tensor SoftmaxAttention::attend_cached(const AttentionInputs& inputs, KvCache& cache,
                                           std::int64_t layer) {
  const std::int64_t q_len = inputs.q.size(1);
  const std::int64_t past = cache.len - q_len;
  cache.k[layer].narrow(1, past, q_len).copy_(inputs.k);
  cache.v[layer].narrow(1, past, q_len).copy_(inputs.v);
  const at::Tensor k = cache.k[layer].narrow(1, 0, cache.len);
  const at::Tensor v = cache.v[layer].narrow(1, 0, cache.len);
  if (past == 0) return sdpa(inputs.q, k, v, {}, /*causal=*/true);
  if (q_len == 1) return sdpa(inputs.q, k, v, {}, /*causal=*/false);
  // LibTorch aligns its causal mask to the first key; here the last query sees the last key.
  const at::Tensor mask =
      at::ones({q_len, cache.len}, inputs.q.options().dtype(at::kBool)).tril(past);
  return sdpa(inputs.q, k, v, mask, /*causal=*/false);
}

}  // namespace parallax::lm
