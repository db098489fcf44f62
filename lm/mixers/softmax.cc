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
  if (q_len == 1) {  // a group's queries are as good as queries of one head: twice as fast
    const at::Tensor grouped = q.reshape({q.size(0), k.size(2), -1, q.size(3)});
    return at::scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2))
        .reshape(q.sizes());
  }
  const at::Tensor mask =
      at::ones({q_len, kv_len}, q.options().dtype(at::kBool)).tril(kv_len - q_len);
  return sdpa(q, k, v, mask, /*causal=*/false);
}

// The same for all rows at once on a GPU: flash attention over the pages where they lie, or over a
// copy where a row's pages are scattered. LibTorch's has no page table, but takes any origins and
// lengths, and its causal mask ends at the last key.
at::Tensor newest_on_gpu(const at::Tensor& q, KvCache& cache, RowRange rows, std::int64_t layer) {
  const std::int64_t capacity = cache.capacity(), q_len = q.size(1);
  const auto multiples_of = [&](std::int64_t step) {
    return at::arange(0, (rows.count + 1) * step, step, cache.kv_lens(rows).options());
  };
  at::Tensor k = cache.k(layer), v = cache.v(layer), origins = cache.origins(rows);
  if (!cache.in_one_piece(rows)) {
    const at::Tensor pages = cache.page_table(rows).flatten();
    k = k.index_select(0, pages);
    v = v.index_select(0, pages);
    origins = multiples_of(capacity);
  }
  const auto result = at::_flash_attention_forward(
      q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), multiples_of(q_len), origins, q_len,
      /*max_k=*/capacity, /*dropout_p=*/0.0, /*is_causal=*/q_len > 1, /*return_debug_mask=*/false,
      /*scale=*/std::nullopt, {}, {}, /*seqused_k=*/cache.kv_lens(rows));
  return std::get<0>(result).unflatten(0, {rows.count, q_len});
}

}  // namespace

at::Tensor SoftmaxAttention::attend(const AttentionInputs& inputs) {
  return sdpa(inputs.q, inputs.k, inputs.v, {}, /*causal=*/true);
}

at::Tensor SoftmaxAttention::attend_cached(const at::Tensor& q, const at::Tensor&,
                                           CachedForward& call, std::int64_t layer) {
  KvCache& cache = call.cache;
  if (q.is_cuda()) return newest_on_gpu(q, cache, call.rows, layer);
  at::Tensor o = at::zeros_like(q, at::MemoryFormat::Contiguous);
  for (std::int64_t i = 0; i < call.rows.count; ++i) {
    const std::int64_t row = call.rows.first + i;
    if (cache.len(row) == 0) continue;
    o.narrow(0, i, 1).copy_(newest_over_all(q.narrow(0, i, 1), cache.row_of(cache.k(layer), row),
                                            cache.row_of(cache.v(layer), row)));
  }
  return o;
}

}  // namespace parallax::lm
