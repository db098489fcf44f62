// SPDX-License-Identifier: MIT
#include "tests/ops/formula.h"

#include <cmath>
#include <limits>

namespace parallax::ops {

Inputs Inputs::to(at::ScalarType dtype) const {
  return {q.to(dtype), r.to(dtype), k.to(dtype), v.to(dtype)};
}

Inputs Inputs::leaves() const {
  const auto leaf = [](const at::Tensor& t) { return t.detach().clone().requires_grad_(); };
  return {leaf(q), leaf(r), leaf(k), leaf(v)};
}

Inputs random_inputs(const Sizes& s, bool shifted) {
  const auto options = at::TensorOptions(at::kDouble);
  Inputs inputs;
  inputs.q = at::randn({s.batch, s.q_len, s.num_q_heads, s.head_dim}, options);
  inputs.r = at::randn({s.batch, s.q_len, s.num_q_heads, s.head_dim}, options);
  inputs.k = at::randn({s.batch, s.kv_len, s.num_kv_heads, s.head_dim}, options);
  inputs.v = at::randn({s.batch, s.kv_len, s.num_kv_heads, s.head_dim}, options);
  if (shifted) {
    inputs.r = (inputs.r + 0.3) * 0.5;
    inputs.k = inputs.k + 3.0;
    inputs.v = inputs.v + 1.0;
  }
  return inputs;
}

at::Tensor visible_keys(const Sizes& s, const AttentionOptions& options) {
  const auto per_batch = [&](const std::optional<at::Tensor>& lengths, std::int64_t absent) {
    return (lengths ? lengths->to(at::kLong) : at::full({s.batch}, absent, at::kLong))
        .view({s.batch, 1, 1, 1});
  };
  const at::Tensor end = per_batch(options.kv_lens, s.kv_len);
  const at::Tensor begin = per_batch(options.kv_start, 0);
  const at::Tensor key = at::arange(s.kv_len).view({1, 1, 1, s.kv_len});
  const at::Tensor last = end - s.q_len + at::arange(s.q_len).view({1, 1, s.q_len, 1});
  at::Tensor visible =
      (key >= begin).logical_and(key < end).expand({s.batch, 1, s.q_len, s.kv_len});
  if (options.causal) visible = visible.logical_and(key <= last);
  if (options.window) visible = visible.logical_and(key > last - *options.window);
  return visible;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> formula(const Inputs& inputs,
                                                       const AttentionOptions& options) {
  const auto& [q, r, k, v] = inputs;
  const Sizes sizes{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3)};
  const std::int64_t group = sizes.num_q_heads / sizes.num_kv_heads;
  const at::Tensor keys = k.repeat_interleave(group, 2), values = v.repeat_interleave(group, 2);
  const double scale = options.scale.value_or(1.0 / std::sqrt(sizes.head_dim));
  const at::Tensor visible = visible_keys(sizes, options);
  const double lowest = -std::numeric_limits<double>::infinity();

  const at::Tensor s =
      (at::einsum("bihd,bjhd->bhij", {q, keys}) * scale).masked_fill(~visible, lowest);
  const at::Tensor t = at::einsum("bihd,bjhd->bhij", {r, keys}).masked_fill(~visible, 0.0);
  const at::Tensor empty = ~visible.any(-1, true);
  const at::Tensor m = s.detach().amax(-1, true).masked_fill(empty, 0.0);
  const at::Tensor p1 = (s - m).exp();
  const at::Tensor d1 = p1.sum(-1, true).masked_fill(empty, 1.0);
  const at::Tensor p = p1 / d1;
  const at::Tensor t_bar = (p * t).sum(-1, true);
  const at::Tensor o = at::einsum("bhij,bjhd->bihd", {p * (1 + t_bar - t), values});
  const at::Tensor lse = (m + d1.log()).masked_fill(empty, lowest);
  return {o, lse.squeeze(-1), t_bar.squeeze(-1)};
}

at::Tensor int_tensor(std::vector<std::int32_t> values) { return torch::tensor(values, at::kInt); }

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  if (x.numel() == 0) return 0;
  return (x - y).abs().masked_fill(x == y, 0.0).max().item<double>();
}

}  // namespace parallax::ops
