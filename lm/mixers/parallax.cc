// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"
#include "ops/parallax_ops.h"

namespace parallax::lm {

at::Tensor ParallaxAttention::attend(const AttentionInputs& inputs) {
  return ops::attention(inputs.q, inputs.r, inputs.k, inputs.v);
}

at::Tensor ParallaxAttention::attend_cached(const at::Tensor& q, const at::Tensor& r,
                                            CachedForward& call, std::int64_t layer) {
  KvCache& cache = call.cache;
  const at::Tensor kv_lens = cache.kv_lens(call.rows);
  if (q.size(1) < kPrefillLen) {
    ops::DecodeOptions options;
    options.page_table = cache.page_table(call.rows);
    if (q.is_cuda() && !call.schedule.defined()) {
      call.schedule = ops::decode_schedule(q, cache.k(layer), kv_lens, options);
    }
    if (call.schedule.defined()) options.schedule = call.schedule;
    return ops::decode(q, r, cache.k(layer), cache.v(layer), kv_lens, options);
  }
  ops::AttentionOptions options;
  options.kv_lens = kv_lens;
  options.page_table = cache.page_table(call.rows);
  return ops::attention(q, r, cache.k(layer), cache.v(layer), options);
}

}  // namespace parallax::lm
