// SPDX-License-Identifier: MIT
#include "lm/layers.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "lm/layers_cpu.h"
#include "ops/step.h"

namespace parallax::lm {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Weight::Weight(at::IntArrayRef shape) { weight = register_parameter("weight", at::empty(shape)); }

// ---- RoPE

Rope make_rope(const at::Tensor& positions, std::int64_t head_dim, double theta,
               at::ScalarType dtype) {
  const auto f32 = positions.options().dtype(at::kFloat);
  const at::Tensor exponents = at::arange(0, head_dim, 2, f32) / static_cast<double>(head_dim);
  const at::Tensor frequencies = at::pow(theta, exponents).reciprocal();
  const at::Tensor angles = (positions.to(at::kFloat).unsqueeze(-1) * frequencies).unsqueeze(-2);
  return {angles.cos().to(dtype), angles.sin().to(dtype)};
}

namespace {

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                   double direction) {
  const std::int64_t half = x.size(-1) / 2;
  const at::Tensor x1 = x.narrow(-1, 0, half), x2 = x.narrow(-1, half, half);
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor y1 = y.narrow(-1, 0, half), y2 = y.narrow(-1, half, half);
  at::mul_out(y1, x1, cos).addcmul_(x2, sin, -direction);
  at::mul_out(y2, x2, cos).addcmul_(x1, sin, direction);
  return y;
}

// The rotation is orthogonal: its backward turns the other way.
struct Rotate : Function<Rotate> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotated(grads[0], saved[0], saved[1], -1), {}, {}};
  }
};

}  // namespace

at::Tensor rotate(const at::Tensor& x, const Rope& rope) {
  return Rotate::apply(x, rope.cos, rope.sin);
}

// ---- norm, products, FFN

namespace {

bool has_cpu_kernel(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

struct CpuRmsNorm : Function<CpuRmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gain,
                            double eps) {
    // A view wherever x is a slice of a larger product.
    const at::Tensor rows = x.reshape({-1, x.size(-2), x.size(-1)});
    const auto [y, rstd] = cpu::rms_norm(rows, gain, eps);
    ctx->save_for_backward({rows, gain, rstd});
    return y.view(x.sizes());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor dy = grads[0].contiguous();
    const auto [dx, dgain] = cpu::rms_norm_backward(dy, saved[0], saved[1], saved[2]);
    return {dx.view(dy.sizes()), dgain, {}};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double eps) {
  const at::Tensor w = gain.to(x.scalar_type());
  if (has_cpu_kernel(x)) return CpuRmsNorm::apply(x, w, eps);
  return at::rms_norm(x, {x.size(-1)}, w, eps);
}

namespace {

bool lie_together(const std::vector<at::Tensor>& weights) {
  const at::Tensor* last = nullptr;
  for (const at::Tensor& w : weights) {
    if (last && !(w.is_alias_of(*last) && w.is_contiguous() &&
                  w.storage_offset() == last->storage_offset() + last->numel())) {
      return false;
    }
    last = &w;
  }
  return true;
}

at::Tensor joined(const std::vector<at::Tensor>& weights) {
  // For many rows the copy that cat makes is small: out * in against rows * out * in.
  if (!lie_together(weights)) return at::cat(weights);
  std::int64_t out = 0;
  for (const at::Tensor& w : weights) out += w.size(0);
  return weights[0].as_strided({out, weights[0].size(1)}, weights[0].strides());
}

}  // namespace

at::Tensor project(const at::Tensor& x, const std::vector<at::Tensor>& weights) {
  const at::Tensor w = weights.size() == 1 ? weights[0] : joined(weights);
  return at::linear(x, w.to(x.scalar_type()));
}

at::Tensor few_rows_weight(const at::Tensor& x, const std::vector<at::Tensor>& weights) {
  if (!x.is_cuda() || !lie_together(weights)) return {};
  const at::Tensor w = joined(weights);
  if (!ops::takes_few_rows(x, w)) return {};
  return w;
}

namespace {

ops::InputNorm input_norm(const at::Tensor& x, const Norm& norm) {
  return {norm.gain.to(x.scalar_type()), norm.eps};
}

}  // namespace

at::Tensor project_normed(const at::Tensor& x, const Norm& norm,
                          const std::vector<at::Tensor>& weights,
                          std::optional<at::ScalarType> dtype) {
  const at::ScalarType y_dtype = dtype.value_or(x.scalar_type());
  if (const at::Tensor w = few_rows_weight(x, weights); w.defined()) {
    return ops::few_rows_product(x, w, input_norm(x, norm), y_dtype);
  }
  return project(rms_norm(x, norm.gain, norm.eps), weights).to(y_dtype);
}

void argmax_normed(const at::Tensor& x, const Norm& norm, const at::Tensor& w,
                   const at::Tensor& words) {
  if (few_rows_weight(x, {w}).defined()) {
    ops::few_rows_argmax(words, x, w, input_norm(x, norm));
  } else {
    ops::argmax_rows(words, project(rms_norm(x, norm.gain, norm.eps), {w}).to(at::kFloat));
  }
}

at::Tensor swiglu_normed(const at::Tensor& x, const Norm& norm, const at::Tensor& gate,
                         const at::Tensor& up) {
  if (const at::Tensor w = few_rows_weight(x, {gate, up}); w.defined()) {
    return ops::few_rows_swiglu(x, w, input_norm(x, norm));
  }
  return swiglu(project(rms_norm(x, norm.gain, norm.eps), {gate, up}));
}

at::Tensor project_onto(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& w,
                        const at::Tensor& next) {
  if (!x.is_cuda()) return residual + project(x, {w});
  if (few_rows_weight(x, {w}).defined()) {
    ops::few_rows_add(residual, x, w, next);
    return residual;
  }
  residual.flatten(0, -2).addmm_(x.flatten(0, -2), w.to(x.scalar_type()).t());
  return residual;
}

void join_weights(const std::vector<std::shared_ptr<Weight>>& weights, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> parts;
  for (const auto& one : weights) parts.push_back(one->weight.to(dtype));
  const at::Tensor all = at::cat(parts);
  std::int64_t row = 0;
  for (const auto& one : weights) {
    const std::int64_t rows = one->weight.size(0);
    one->weight.set_requires_grad(false);
    one->weight.set_data(all.narrow(0, row, rows));
    row += rows;
  }
}

namespace {

struct CpuSwiGlu : Function<CpuSwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up) {
    const at::Tensor rows = gate_up.contiguous().flatten(0, -2);
    const at::Tensor sigmoid = at::sigmoid(rows.chunk(2, -1)[0]).contiguous();
    ctx->save_for_backward({rows, sigmoid});
    at::DimVector sizes(gate_up.sizes());
    sizes.back() /= 2;
    return cpu::swiglu(rows, sigmoid).view(sizes);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::DimVector sizes(grads[0].sizes());
    sizes.back() *= 2;
    const at::Tensor dy = grads[0].contiguous().flatten(0, -2);
    return {cpu::swiglu_backward(dy, saved[0], saved[1]).view(sizes)};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    const std::vector<at::Tensor> halves = gate_up.chunk(2, -1);
    return at::silu(halves[0]).mul_(halves[1]);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0];
    const std::vector<at::Tensor> halves = gate_up.chunk(2, -1);
    at::Tensor d_gate_up = at::empty_like(gate_up);
    std::vector<at::Tensor> d = d_gate_up.chunk(2, -1);
    at::silu_backward_out(d[0], grads[0] * halves[1], halves[0]);
    at::mul_out(d[1], at::silu(halves[0]), grads[0]);
    return {d_gate_up};
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate_up) {
  return has_cpu_kernel(gate_up) ? CpuSwiGlu::apply(gate_up) : SwiGlu::apply(gate_up);
}

// ---- loss

namespace {

constexpr std::int64_t kIgnored = -100;

at::ScalarType loss_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// body(first row, number of rows, log-probabilities [rows, vocab]) for every block.
void for_blocks(const at::Tensor& x, const at::Tensor& w, std::int64_t logits_at_once,
                const std::function<void(std::int64_t, std::int64_t, const at::Tensor&)>& body) {
  const std::int64_t block = std::max<std::int64_t>(1, logits_at_once / w.size(0));
  for (std::int64_t row = 0; row < x.size(0); row += block) {
    const std::int64_t rows = std::min(block, x.size(0) - row);
    const at::Tensor logits = at::linear(x.narrow(0, row, rows), w);
    body(row, rows, at::log_softmax(logits, 1, loss_dtype(x)));
  }
}

// The gradients for a unit gradient of the loss are made with the loss, block by block, so that no
// block's logits have to be made twice.
struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& master,
                            const at::Tensor& targets, std::int64_t logits_at_once) {
    const at::Tensor w = master.to(x.scalar_type());
    const at::Tensor count = targets.ne(kIgnored).sum().to(loss_dtype(x));
    const at::Tensor per_target = count.reciprocal();
    at::Tensor loss = at::zeros({}, per_target.options());
    at::Tensor dx = at::empty_like(x);
    at::Tensor dw = at::zeros_like(master);
    for_blocks(x, w, logits_at_once,
               [&](std::int64_t row, std::int64_t rows, const at::Tensor& log_p) {
                 const at::Tensor target = targets.narrow(0, row, rows);
                 const auto [sum, weight] =
                     at::nll_loss_forward(log_p, target, {}, at::Reduction::Sum, kIgnored);
                 loss.add_(sum);
                 const at::Tensor d_log_p = at::nll_loss_backward(
                     per_target, log_p, target, {}, at::Reduction::Sum, kIgnored, weight);
                 const at::Tensor d_logits =
                     at::_log_softmax_backward_data(d_log_p, log_p, 1, log_p.scalar_type())
                         .to(x.scalar_type());
                 at::Tensor dx_block = dx.narrow(0, row, rows);
                 at::mm_out(dx_block, d_logits, w);
                 dw.add_(at::mm(d_logits.t(), x.narrow(0, row, rows)));
               });
    ctx->save_for_backward({dx, dw});
    return loss.mul_(per_target);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {saved[0] * grads[0].to(saved[0].scalar_type()),
            saved[1] * grads[0].to(saved[1].scalar_type()),
            {},
            {}};
  }
};

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& w, const at::Tensor& targets,
                                std::int64_t logits_at_once) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || w.requires_grad())) {
    return LinearCrossEntropy::apply(x, w, targets, logits_at_once);
  }
  return linear_cross_entropy_rows(x, w, targets, logits_at_once).sum() /
         targets.ne(kIgnored).sum();
}

at::Tensor linear_cross_entropy_rows(const at::Tensor& x, const at::Tensor& w,
                                     const at::Tensor& targets, std::int64_t logits_at_once) {
  const at::NoGradGuard no_grad;
  at::Tensor losses = at::empty({x.size(0)}, x.options().dtype(loss_dtype(x)));
  for_blocks(x, w.to(x.scalar_type()), logits_at_once,
             [&](std::int64_t row, std::int64_t rows, const at::Tensor& log_p) {
               losses.narrow(0, row, rows)
                   .copy_(at::nll_loss(log_p, targets.narrow(0, row, rows), {}, at::Reduction::None,
                                       kIgnored));
             });
  return losses;
}

}  // namespace parallax::lm
