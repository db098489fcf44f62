// SPDX-License-Identifier: MIT
// Parallax attention for PyTorch, from C++. Each function here calls the operator of the same name
// in torch.ops.parallax through the dispatcher, so autograd, autocast, Meta shapes and the device
// are settled there, once, for C++ and Python callers alike. Masks and lengths mean what
// kernels/include/parallax/attention.h says; wrong input raises c10::Error naming the argument,
// what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace parallax::ops {

struct AttentionOptions {
  std::optional<double> scale;  // of q.k; default head_dim^-0.5; r.k is never scaled
  bool causal = true;
  std::optional<std::int64_t> window;      // last `window` keys of a query, its own among them
  std::optional<at::Tensor> cu_seqlens_q;  // int32 [batch + 1]: the packed layout
  std::optional<at::Tensor> cu_seqlens_k;  // int32 [batch + 1]
  std::optional<at::Tensor> kv_lens;       // int32 [batch], end of the visible keys
  std::optional<at::Tensor> kv_start;      // int32 [batch], their begin
  std::optional<at::Tensor> page_table;    // int32 [batch, max_pages]; forward only
  std::optional<at::Tensor> k_scale;       // float [num_kv_heads]: both with an FP8 cache, and only
  std::optional<at::Tensor> v_scale;       // there, as in decode; forward only
};

// q, r [batch, q_len, num_q_heads, head_dim], k, v [batch, kv_len, num_kv_heads, head_dim] (packed:
// [tokens, heads, head_dim]) -> o like q. Differentiable in q, r, k, v, once; with a page_table or
// an FP8 cache (k, v as in decode) forward only. An FP8 cache's visible tokens are written out in
// q's dtype first, into scratch memory for kv_len tokens of each sequence. The last axis of each
// must be contiguous. Under autocast q, r, k, v are cast to its dtype, but for an FP8 cache.
at::Tensor attention(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                     const at::Tensor& v, const AttentionOptions& options = {});

// The same with the row statistics lse and t_bar [batch, num_q_heads, q_len] (packed
// [num_q_heads, tokens]), natural logarithm, float (double for float64), not differentiable.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_with_stats(
    const at::Tensor& q, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v,
    const AttentionOptions& options = {});

struct DecodeOptions {
  std::optional<double> scale;           // of q.k; default head_dim^-0.5
  std::optional<std::int64_t> window;    // last `window` keys of a query, its own among them
  std::optional<at::Tensor> kv_start;    // int32 [batch]
  std::optional<at::Tensor> page_table;  // int32 [batch, max_pages]
  std::optional<at::Tensor> k_scale;     // float [num_kv_heads]: both with an FP8 cache, and only
  std::optional<at::Tensor> v_scale;     // there; an element stands for itself times its scale
  std::optional<at::Tensor> schedule;    // of decode_schedule
};

// A few new tokens (q, r [batch, q_len, num_q_heads, head_dim]) over a cache k, v [batch, capacity,
// num_kv_heads, head_dim], or pages [num_pages, page_size, num_kv_heads, head_dim] with a
// page_table. kv_lens int32 [batch] counts the new tokens too: append_kv first. Causal. The caches
// have q's dtype or float8_e4m3fn. Neither this nor any function below is differentiable: each
// refuses an input that requires grad while grad mode is on.
at::Tensor decode(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                  const at::Tensor& v_cache, const at::Tensor& kv_lens,
                  const DecodeOptions& options = {});

// The same with lse and t_bar [batch, num_q_heads, q_len], float.
std::tuple<at::Tensor, at::Tensor, at::Tensor> decode_with_stats(
    const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& kv_lens, const DecodeOptions& options = {});

// Which part of a GPU reads which keys, uint8: made once a step from the lengths, then handed to
// the decode of every layer with the same shapes and lengths (DecodeOptions::schedule). Without it
// each decode finds its own. The CPU does not look at it.
at::Tensor decode_schedule(const at::Tensor& q, const at::Tensor& k_cache,
                           const at::Tensor& kv_lens, const DecodeOptions& options = {});

// The partial state of rows over some of their keys, float and contiguous: m (the largest logit, in
// natural units), d1, d2 [batch, num_q_heads, q_len]; o1, o2 [batch, q_len, num_q_heads, head_dim].
struct DecodeState {
  at::Tensor m, d1, d2, o1, o2;
};

// decode without its last step, for callers that hold the keys in several places.
DecodeState decode_state(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                         const at::Tensor& v_cache, const at::Tensor& kv_lens,
                         const DecodeOptions& options = {});

// The state over the union of the keys of one or more states of the same rows.
DecodeState merge(const std::vector<DecodeState>& states);

// o (in dtype), lse and t_bar of a state.
std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize(const DecodeState& state,
                                                        at::ScalarType dtype = at::kFloat);

// Writes k, v [batch, len, num_kv_heads, head_dim] into the caches, in place: token i of sequence b
// at positions[b] + i (int32 [batch]); into an FP8 cache (float8_e4m3fn) as k / k_scale and v /
// v_scale, saturating. Places and pages outside the cache are refused on the CPU, skipped on a GPU.
void append_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache, at::Tensor& v_cache,
               const at::Tensor& positions, const std::optional<at::Tensor>& page_table = {},
               const std::optional<at::Tensor>& k_scale = {},
               const std::optional<at::Tensor>& v_scale = {});

// What happens to q, r and k between their projections and attention: RMSNorm over head_dim where
// there is a gain (float [head_dim]), then RoPE of q and k, and of r where asked for: the pairs
// (x_i, x_{i + head_dim / 2}) turned by row `position` of cos and sin, float [num_angles, head_dim
// / 2]. In float (double for float64), rounded once.
struct RotaryOptions {
  std::optional<at::Tensor> q_gain, r_gain, k_gain;
  bool rotate_r = true;
  double eps = 1e-6;
  std::optional<at::Tensor> angles;  // int32 [batch]: token 0's row of cos and sin; positions
  std::optional<at::Tensor> page_table, k_scale, v_scale;
};

// append_kv with that in front, in one kernel on a GPU: -> q and r, normed and turned, ready for
// decode.
std::tuple<at::Tensor, at::Tensor> append_kv_rotary(const at::Tensor& q, const at::Tensor& r,
                                                    const at::Tensor& k, const at::Tensor& v,
                                                    at::Tensor& k_cache, at::Tensor& v_cache,
                                                    const at::Tensor& positions,
                                                    const at::Tensor& cos, const at::Tensor& sin,
                                                    const RotaryOptions& options = {});

}  // namespace parallax::ops
