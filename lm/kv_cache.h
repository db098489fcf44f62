// SPDX-License-Identifier: MIT
// Keys and values of the tokens a model has seen, for generation. r is used where its token is the
// query and never cached, so both mixers keep the same cache.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "lm/config.h"
#include "lm/error.h"

namespace parallax::lm {

// All sequences of a cache are equally long. A copy shares memory.
struct KvCache {
  KvCache(const ModelConfig& config, std::int64_t batch, std::int64_t capacity,
          at::TensorOptions options = {})
      : capacity(capacity),
        positions(at::zeros({batch}, options.dtype(at::kInt))),
        kv_lens(at::zeros({batch}, options.dtype(at::kInt))) {
    for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
      k.push_back(at::empty({batch, capacity, config.num_kv_heads, config.head_dim}, options));
      v.push_back(at::empty_like(k.back()));
    }
  }

  // Makes room for new_tokens of each sequence, whose keys and values a mixer then writes. Throws
  // Error where they do not fit.
  void advance(std::int64_t new_tokens) {
    if (len + new_tokens > capacity) {
      throw Error("key/value cache: room for " + std::to_string(capacity) + " tokens, " +
                  std::to_string(len + new_tokens) + " needed");
    }
    positions.copy_(kv_lens);
    kv_lens.add_(new_tokens);
    len += new_tokens;
  }

  void clear() {
    positions.zero_();
    kv_lens.zero_();
    len = 0;
  }

  std::int64_t capacity = 0;
  std::int64_t len = 0;       // tokens held, of each sequence
  at::Tensor positions;       // int32 [batch]: where the newest tokens begin
  at::Tensor kv_lens;         // int32 [batch]: where they end, each `len`
  std::vector<at::Tensor> k;  // a layer: [batch, capacity, num_kv_heads, head_dim]
  std::vector<at::Tensor> v;
};

}  // namespace parallax::lm
