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

// The newest tokens' queries over all keys: the last query sees the last key, where LibTorch would
// align its causal mask to the first.
at::Tensor newest_over_all(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const std::int64_t q_len = q.size(1), kv_len = k.size(1);
  if (q_len == 1) return sdpa(q, k, v, {}, /*causal=*/false);
  const at::Tensor mask =
      at::ones({q_len, kv_len}, q.options().dtype(at::kBool)).tril(kv_len - q_len);
  return sdpa(q, k, v, mask, /*causal=*/false);
}

}  // namespace

at::Tensor SoftmaxAttention::attend(const AttentionInputs& inputs) {
  return sdpa(inputs.q, inputs.k, inputs.v, {}, /*causal=*/true);
}

at::Tensor SoftmaxAttention::attend_cached(const AttentionInputs& inputs, KvCache& cache,
                                           RowRange rows, std::int64_t layer) {
  at::Tensor o = at::zeros_like(inputs.q, at::MemoryFormat::Contiguous);
  for (std::int64_t i = 0; i < rows.count; ++i) {
    const std::int64_t row = rows.first + i;
    if (cache.len(row) == 0) continue;
    o.narrow(0, i, 1).copy_(newest_over_all(inputs.q.narrow(0, i, 1),
                                            cache.row_of(cache.k(layer), row),
                                            cache.row_of(cache.v(layer), row)));
  }
  return o;
}

}  // namespace parallax::lm
