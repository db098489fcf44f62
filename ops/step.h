// SPDX-License-Identifier: MIT
// What a step of generation calls beside the operators. No operators of PyTorch's: no autograd, no
// Meta. On a GPU they read what is settled before the stream's last kernel has ended.
//
// Matrix products of a few rows, CUDA alone: in one kernel with the RMSNorm before them and with
// SwiGLU or the residual after them (docs/kernels.md). Weights and gains are settled: no kernel
// that is still under way writes them. Sums in float, rounded once; a row's result depends on no
// other row.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "ops/parallax_ops.h"

namespace parallax::ops {

// x / sqrt(mean(x^2) + eps) * gain over the last axis, in front of a product.
struct InputNorm {
  at::Tensor gain;  // [in], of x's dtype
  double eps = 1e-6;
};

// Whether the functions below take x [..., in] and w [out, in]: 1 to 16 rows in all on a GPU, both
// bfloat16 or both float16, rows aligned to 16 bytes.
bool takes_few_rows(const at::Tensor& x, const at::Tensor& w);

// x w^T [..., out] in x's dtype or in float.
at::Tensor few_rows_product(const at::Tensor& x, const at::Tensor& w,
                            const std::optional<InputNorm>& norm, at::ScalarType dtype);

// silu(x gate^T) * (x up^T) [..., size], w [2 size, in] being gate above up.
at::Tensor few_rows_swiglu(const at::Tensor& x, const at::Tensor& w,
                           const std::optional<InputNorm>& norm);

// y += x w^T, y [..., out] contiguous. `next`: weights that kernels after this one read, asked into
// the L2 cache meanwhile, or undefined.
void few_rows_add(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                  const at::Tensor& next = {});

// The likeliest tokens, without a way over the host. An argmax word stands for a column
// (parallax/step.h); `words` int64 [rows], 0 before the first call of a step, becomes those of x
// w^T, or of logits float [rows, columns], whose elements are contiguous.
void few_rows_argmax(const at::Tensor& words, const at::Tensor& x, const at::Tensor& w,
                     const std::optional<InputNorm>& norm);
void argmax_rows(const at::Tensor& words, const at::Tensor& logits);

// Ends a step whose next one follows without the host: NextTokensArgs of parallax/step.h, int32
// and contiguous but for words; `found` is pinned memory of the host.
struct NextTokens {
  at::Tensor words, tokens, positions, kv_lens;  // [rows]
  at::Tensor found;                              // [rows, 2]
};
void next_tokens(const NextTokens& next);

// append_kv_rotary (parallax_ops.h), on a GPU, where positions, angles, page table and all that
// options name are settled.
std::tuple<at::Tensor, at::Tensor> append_kv_settled(
    const at::Tensor& q, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& positions,
    const at::Tensor& cos, const at::Tensor& sin, const RotaryOptions& options);

// decode (parallax_ops.h) where kv_lens, kv_start, page table, scales, schedule and caches are
// settled, but for the newest q_len tokens of each sequence.
at::Tensor decode_settled(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                          const at::Tensor& v_cache, const at::Tensor& kv_lens,
                          const DecodeOptions& options);

}  // namespace parallax::ops
