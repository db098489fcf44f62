// SPDX-License-Identifier: MIT
// Parallax attention as docs/math.md section 1 writes it, composed from LibTorch operations: what
// every operator is held against, in value and, through LibTorch's own autograd, in gradient.
#pragma once

#include <torch/torch.h>

#include <tuple>
#include <vector>

#include "ops/parallax_ops.h"

namespace parallax::ops {

struct Inputs {
  at::Tensor q, r, k, v;

  std::vector<at::Tensor> list() const { return {q, r, k, v}; }
  Inputs to(at::ScalarType dtype) const;
  // The same values as leaves that require grad.
  Inputs leaves() const;
};

struct Sizes {
  std::int64_t batch = 2, q_len = 5, kv_len = 5, num_q_heads = 3, num_kv_heads = 1, head_dim = 16;
};

// Zero-mean values; `shifted`: keys mean 3, values mean 1, r = 0.5 (randn + 0.3).
Inputs random_inputs(const Sizes& sizes, bool shifted = false);

// Which keys a query sees: bool [batch, 1, q_len, kv_len], from the options of a batched call.
at::Tensor visible_keys(const Sizes& sizes, const AttentionOptions& options);

// o, lse and t_bar in the dtype of the inputs. Rows without a key: o = 0, lse = -inf, t_bar = 0.
std::tuple<at::Tensor, at::Tensor, at::Tensor> formula(const Inputs& inputs,
                                                       const AttentionOptions& options);

at::Tensor int_tensor(std::vector<std::int32_t> values);

// Largest absolute difference; equal infinities differ by 0.
double max_difference(const at::Tensor& a, const at::Tensor& b);

}  // namespace parallax::ops
