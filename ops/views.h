// SPDX-License-Identifier: MIT
// at::Tensor -> the views and problems of the kernel room. Tensors have passed their checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "ops/checks.h"
#include "parallax/attention.h"

namespace parallax::ops {

// [batch, len, heads, head_dim], or packed [tokens, heads, head_dim].
template <class AnyView>
AnyView strided_view(const at::Tensor& tensor, decltype(AnyView::data) data) {
  AnyView view;
  view.data = data;
  view.batch_stride = tensor.dim() == 4 ? tensor.stride(0) : 0;
  view.len_stride = tensor.stride(-3);
  view.head_stride = tensor.stride(-2);
  return view;
}

inline ConstView const_view(const at::Tensor& tensor) {
  return strided_view<ConstView>(tensor, tensor.const_data_ptr());
}

inline View view(const at::Tensor& tensor) {
  return strided_view<View>(tensor, tensor.mutable_data_ptr());
}

// Row statistics are double for float64 and float for the rest.
inline at::TensorOptions stats_options(const at::Tensor& q) {
  return q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

inline const float* float_data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

inline const std::int32_t* index_data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<std::int32_t>() : nullptr;
}

// `keys` are the pages that the table speaks of.
inline PageTable page_table_view(const std::optional<at::Tensor>& page_table,
                                 const at::Tensor& keys) {
  PageTable pages;
  if (!page_table) return pages;
  pages.table = index_data(page_table);
  pages.max_pages = page_table->size(1);
  pages.num_pages = keys.size(0);
  pages.page_size = static_cast<int>(keys.size(1));
  return pages;
}

inline AttentionProblem problem_of(const at::Tensor& q, const CallShape& shape,
                                   std::optional<double> scale, bool causal,
                                   std::optional<std::int64_t> window) {
  AttentionProblem problem;
  problem.dtype = kernel_dtype(q);
  problem.batch = shape.batch.expect_int();
  problem.q_len = shape.q_len.expect_int();
  problem.kv_len = shape.kv_len.expect_int();
  problem.num_q_heads = shape.num_q_heads.expect_int();
  problem.num_kv_heads = shape.num_kv_heads.expect_int();
  problem.head_dim = shape.head_dim.expect_int();
  problem.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  problem.causal = causal;
  problem.window = window.value_or(0);
  problem.packed = shape.packed;
  return problem;
}

}  // namespace parallax::ops
