// SPDX-License-Identifier: MIT
// Parallax attention for PyTorch, from C++. Each function here calls the operator of the same name
// in torch.ops.parallax through the dispatcher, so autograd, autocast, Meta shapes and the device
// are settled there, once, for C++ and Python callers alike. Masks and lengths mean what
// kernels/include/parallax/attention.h says; wrong input raises c10::Error naming the argument,
// what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace parallax::ops {

struct AttentionOptions {
  std::optional<double> scale;  // of q.k; default head_dim^-0.5; r.k is never scaled
  bool causal = true;
  std::optional<std::int64_t> window;       // last `window` keys of a query, its own among them
  std::optional<at::Tensor> cu_seqlens_q;   // int32 [batch + 1]: the packed layout
  std::optional<at::Tensor> cu_seqlens_k;   // int32 [batch + 1]
  std::optional<at::Tensor> kv_lens;        // int32 [batch], end of the visible keys
  std::optional<at::Tensor> kv_start;       // int32 [batch], their begin
  std::optional<at::Tensor> page_table;     // int32 [batch, max_pages]; forward only
};

// q, r [batch, q_len, q_heads, head_dim], k, v [batch, kv_len, kv_heads, head_dim] (packed:
// [tokens, heads, head_dim]) -> o like q. Differentiable in q, r, k, v. The last axis of each must
// be contiguous.
at::Tensor attention(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                     const at::Tensor& v, const AttentionOptions& options = {});

// The same with the row statistics lse and t_bar [batch, q_heads, q_len] (packed [q_heads,
// tokens]), float, not differentiable.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_with_stats(
    const at::Tensor& q, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v,
    const AttentionOptions& options = {});

struct DecodeOptions {
  std::optional<double> scale;
  std::optional<std::int64_t> window;
  std::optional<at::Tensor> kv_start;
  std::optional<at::Tensor> page_table;
};

// A few new tokens (q, r [batch, q_len, q_heads, head_dim]) over a cache k, v [batch, capacity,
// kv_heads, head_dim], or pages [num_pages, page_size, kv_heads, head_dim] with a page_table.
// kv_lens int32 [batch] counts the new tokens too: append_kv first. Causal. Not differentiable.
at::Tensor decode(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                  const at::Tensor& v_cache, const at::Tensor& kv_lens,
                  const DecodeOptions& options = {});

// Writes k, v [batch, len, kv_heads, head_dim] into the caches, in place: token i of sequence b at
// positions[b] + i (int32 [batch]).
void append_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache, at::Tensor& v_cache,
               const at::Tensor& positions, const std::optional<at::Tensor>& page_table = {});

}  // namespace parallax::ops
