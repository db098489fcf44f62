// SPDX-License-Identifier: MIT
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/step.h"
#include "parallax/step.h"

namespace parallax::ops {
namespace {

constexpr const char* kName = "few_rows";

bool is_aligned(const at::Tensor& rows) {
  return rows.size(-1) % 8 == 0 && rows.stride(0) % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(rows.const_data_ptr()) % 16 == 0;
}

at::Tensor rows_of(const at::Tensor& x) { return x.dim() == 2 ? x : x.flatten(0, -2); }

void check_input(const at::Tensor& x, const at::Tensor& w, const std::optional<InputNorm>& norm) {
  TORCH_CHECK_VALUE(takes_few_rows(x, w), "parallax::", kName, ": x, w: expected 1 to ",
                    kMaxFewRows,
                    " rows [..., in] and a weight [out, in] on one GPU, both bfloat16 or both "
                    "float16, in a multiple of 8, aligned to 16 bytes, got ",
                    x.sizes(), " ", x.dtype(), " and ", w.sizes(), " ", w.dtype());
  TORCH_CHECK_VALUE(!c10::GradMode::is_enabled() || !(x.requires_grad() || w.requires_grad()),
                    "parallax::", kName,
                    ": x, w: not differentiable, but one requires grad; use torch.no_grad()");
  if (!norm) return;
  const at::Tensor& gain = norm->gain;
  TORCH_CHECK_VALUE(gain.dim() == 1 && gain.size(0) == x.size(-1) && gain.is_contiguous() &&
                        gain.scalar_type() == x.scalar_type() && gain.device() == x.device(),
                    "parallax::", kName, ": norm.gain: expected [", x.size(-1), "] ", x.dtype(),
                    " on ", x.device(), ", got ", gain.sizes(), " ", gain.dtype(), " on ",
                    gain.device());
}

FewRowsArgs input_args(const at::Tensor& x_rows, const at::Tensor& w,
                       const std::optional<InputNorm>& norm) {
  FewRowsArgs args;
  args.x = x_rows.const_data_ptr();
  args.x_stride = x_rows.stride(0);
  args.w = w.const_data_ptr();
  args.w_stride = w.stride(0);
  if (norm) {
    args.gain = norm->gain.const_data_ptr();
    args.eps = norm->eps;
  }
  return args;
}

void run(const at::Tensor& x, const at::Tensor& w, const std::optional<InputNorm>& norm,
         const at::Tensor& y, FewRowsForm form, const at::Tensor& next = {}) {
  const at::Tensor x_rows = rows_of(x), y_rows = y.view({-1, y.size(-1)});
  const FewRowsProblem problem{kernel_dtype(x), x_rows.size(0), x_rows.size(1), y_rows.size(1),
                               form};
  FewRowsArgs args = input_args(x_rows, w, norm);
  args.y = y_rows.mutable_data_ptr();
  args.y_stride = y_rows.stride(0);
  if (next.defined() && next.is_contiguous() && next.device() == x.device()) {
    args.next = next.const_data_ptr();
    args.next_bytes = static_cast<std::int64_t>(next.nbytes());
  }
  run_few_rows(kName, x, problem, args);
}

std::uint64_t* words_of(const at::Tensor& words) {
  return reinterpret_cast<std::uint64_t*>(words.mutable_data_ptr<std::int64_t>());
}

void check_words(const at::Tensor& words, const at::Tensor& rows, const char* op) {
  TORCH_CHECK_VALUE(words.scalar_type() == at::kLong && words.dim() == 1 && words.is_contiguous() &&
                        words.size(0) == rows.size(0) && words.device() == rows.device(),
                    "parallax::", op, ": words: expected int64 [", rows.size(0), "] on ",
                    rows.device(), ", got ", words.sizes(), " ", words.dtype(), " on ",
                    words.device());
}

at::Tensor empty_like_rows(const at::Tensor& x, std::int64_t out, at::ScalarType dtype) {
  at::DimVector sizes(x.sizes());
  sizes.back() = out;
  return at::empty(sizes, x.options().dtype(dtype));
}

}  // namespace

bool takes_few_rows(const at::Tensor& x, const at::Tensor& w) {
  const at::ScalarType dtype = x.scalar_type();
  if (!x.is_cuda() || x.dim() < 2 || w.dim() != 2 || w.device() != x.device()) return false;
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (w.scalar_type() != dtype || w.size(1) != x.size(-1)) return false;
  if (w.size(0) < 1 || x.size(-1) < 8 || x.stride(-1) != 1 || w.stride(1) != 1) return false;
  const std::int64_t rows = x.numel() / x.size(-1);
  return rows >= 1 && rows <= kMaxFewRows && is_aligned(rows_of(x)) && is_aligned(w);
}

at::Tensor few_rows_product(const at::Tensor& x, const at::Tensor& w,
                            const std::optional<InputNorm>& norm, at::ScalarType dtype) {
  check_input(x, w, norm);
  TORCH_CHECK_VALUE(dtype == x.scalar_type() || dtype == at::kFloat, "parallax::", kName,
                    ": dtype: expected that of x or float, got ", dtype);
  const at::Tensor y = empty_like_rows(x, w.size(0), dtype);
  run(x, w, norm, y, dtype == at::kFloat ? FewRowsForm::kFloatProduct : FewRowsForm::kProduct);
  return y;
}

at::Tensor few_rows_swiglu(const at::Tensor& x, const at::Tensor& w,
                           const std::optional<InputNorm>& norm) {
  check_input(x, w, norm);
  TORCH_CHECK_VALUE(w.size(0) % 2 == 0, "parallax::", kName,
                    ": w: expected gate above up, an even number of rows, got ", w.sizes());
  const at::Tensor y = empty_like_rows(x, w.size(0) / 2, x.scalar_type());
  run(x, w, norm, y, FewRowsForm::kSwiGlu);
  return y;
}

void few_rows_add(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                  const at::Tensor& next) {
  check_input(x, w, {});
  TORCH_CHECK_VALUE(y.is_contiguous() && y.scalar_type() == x.scalar_type() &&
                        y.device() == x.device() && y.dim() >= 1 && y.size(-1) == w.size(0) &&
                        y.numel() / w.size(0) == x.numel() / x.size(-1),
                    "parallax::", kName, ": y: expected as many contiguous rows as x has, of ",
                    w.size(0), " elements, ", x.dtype(), ", got ", y.sizes(), " ", y.dtype());
  run(x, w, {}, y, FewRowsForm::kAdd, next);
}

void few_rows_argmax(const at::Tensor& words, const at::Tensor& x, const at::Tensor& w,
                     const std::optional<InputNorm>& norm) {
  check_input(x, w, norm);
  const at::Tensor x_rows = rows_of(x);
  check_words(words, x_rows, kName);
  FewRowsArgs args = input_args(x_rows, w, norm);
  args.y = words_of(words);
  run_few_rows(kName, x,
               {kernel_dtype(x), x_rows.size(0), x_rows.size(1), w.size(0), FewRowsForm::kArgmax},
               args);
}

void argmax_rows(const at::Tensor& words, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.is_cuda() && logits.dim() == 2 && logits.scalar_type() == at::kFloat &&
                        logits.stride(1) == 1,
                    "parallax::argmax: logits: expected float [rows, columns] on a GPU, got ",
                    logits.sizes(), " ", logits.dtype(), " on ", logits.device());
  check_words(words, logits, "argmax");
  run_argmax("argmax", logits, words_of(words));
}

void next_tokens(const NextTokens& next) {
  const char* op = "next_tokens";
  const at::Tensor& tokens = next.tokens;
  for (const auto& [name, each] : {std::pair{"tokens", tokens},
                                   {"positions", next.positions},
                                   {"kv_lens", next.kv_lens},
                                   {"found", next.found}}) {
    TORCH_CHECK_VALUE(each.scalar_type() == at::kInt && each.is_contiguous() && each.dim() >= 1 &&
                          each.size(0) == tokens.size(0),
                      "parallax::", op, ": ", name, ": expected contiguous int32 of ",
                      tokens.size(0), " rows, got ", each.sizes(), " ", each.dtype());
  }
  TORCH_CHECK_VALUE(next.found.is_cpu() && next.found.numel() == 2 * tokens.size(0),
                    "parallax::", op, ": found: expected pinned memory [", tokens.size(0),
                    ", 2], got ", next.found.sizes(), " on ", next.found.device());
  check_words(next.words, tokens, op);
  NextTokensArgs args;
  args.words = words_of(next.words);
  args.tokens = tokens.mutable_data_ptr<std::int32_t>();
  args.positions = next.positions.mutable_data_ptr<std::int32_t>();
  args.kv_lens = next.kv_lens.mutable_data_ptr<std::int32_t>();
  args.found = next.found.mutable_data_ptr<std::int32_t>();
  run_next_tokens(op, tokens, args);
}

}  // namespace parallax::ops
