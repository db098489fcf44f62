// SPDX-License-Identifier: MIT
// Keys and values of the tokens a model has seen, for generation. r is used where its token is the
// query and never cached, so both mixers keep the same cache.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "lm/config.h"

namespace parallax::lm {

// All sequences of a cache are equally long. Use one cache with one model; a copy shares memory.
struct KvCache {
  KvCache(const ModelConfig& config, std::int64_t batch, std::int64_t capacity,
          at::TensorOptions options = {});

  void clear();

  std::int64_t capacity = 0;
  std::int64_t len = 0;       // tokens held, of each sequence
  at::Tensor kv_lens;         // int32 [batch], each `len`
  std::vector<at::Tensor> k;  // a layer: [batch, capacity, num_kv_heads, head_dim]
  std::vector<at::Tensor> v;
};

}  // namespace parallax::lm
