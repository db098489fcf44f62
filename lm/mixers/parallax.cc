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
                                            RowRange rows, std::int64_t layer) {
  const at::Tensor& k_pages = cache.k(layer);
  const at::Tensor& v_pages = cache.v(layer);
  if (inputs.q.size(1) < kPrefillLen) {
    ops::DecodeOptions options;
    options.page_table = cache.page_table(rows);
    return ops::decode(inputs.q, inputs.r, k_pages, v_pages, cache.kv_lens(rows), options);
  }
  ops::AttentionOptions options;
  options.kv_lens = cache.kv_lens(rows);
  options.page_table = cache.page_table(rows);
  return ops::attention(inputs.q, inputs.r, k_pages, v_pages, options);
}

}  // namespace parallax::lm
