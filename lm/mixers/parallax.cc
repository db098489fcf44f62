// SPDX-License-Identifier: MIT
#include "lm/mixers/attention.h"
#include "ops/parallax_ops.h"

namespace parallax::lm {

// From here on, the forward kernel reads the cache faster than the decode kernel, which is made for
// a few new tokens.
constexpr std::int64_t kPrefillLen = 16;

at::Tensor ParallaxAttention::attend(const AttentionInputs& inputs) {
  return ops::attention(inputs.q, inputs.r, inputs.k, inputs.v);
}

at::Tensor ParallaxAttention::attend_cached(const AttentionInputs& inputs, KvCache& cache,
                                            std::int64_t layer) {
  at::Tensor& k_cache = cache.k[layer];
  at::Tensor& v_cache = cache.v[layer];
  ops::append_kv(inputs.k, inputs.v, k_cache, v_cache, cache.positions);
  if (inputs.q.size(1) < kPrefillLen) {
    return ops::decode(inputs.q, inputs.r, k_cache, v_cache, cache.kv_lens);
  }
  return ops::attention(inputs.q, inputs.r, k_cache.narrow(1, 0, cache.len),
                        v_cache.narrow(1, 0, cache.len));
}

}  // namespace parallax::lm
