// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"
#include "ops/parallax_ops.h"
#include "ops/step.h"

namespace parallax::lm {

at::Tensor ParallaxAttention::attend(const AttentionInputs& inputs) {
  return ops::attention(inputs.q, inputs.r, inputs.k, inputs.v);
}

void ParallaxAttention::begin_cached(CachedForward& call, std::int64_t len) const {
  KvCache& cache = call.cache;
  if (!cache.k(0).is_cuda() || len >= kPrefillLen) return;
  const at::Tensor like_q = at::empty(
      {call.rows.count, len, config().num_q_heads, config().head_dim}, cache.k(0).options());
  ops::DecodeOptions options;
  options.page_table = cache.page_table(call.rows);
  call.schedule = ops::decode_schedule(like_q, cache.k(0), cache.kv_lens(call.rows), options);
}

at::Tensor ParallaxAttention::attend_cached(const at::Tensor& q, const at::Tensor& r,
                                            CachedForward& call, std::int64_t layer) {
  KvCache& cache = call.cache;
  const at::Tensor kv_lens = cache.kv_lens(call.rows);
  if (q.size(1) < kPrefillLen) {
    ops::DecodeOptions options;
    options.page_table = cache.page_table(call.rows);
    if (!q.is_cuda()) return ops::decode(q, r, cache.k(layer), cache.v(layer), kv_lens, options);
    options.schedule = call.schedule;
    return ops::decode_settled(q, r, cache.k(layer), cache.v(layer), kv_lens, options);
  }
  ops::AttentionOptions options;
  options.kv_lens = kv_lens;
  options.page_table = cache.page_table(call.rows);
  return ops::attention(q, r, cache.k(layer), cache.v(layer), options);
}

}  // namespace parallax::lm
