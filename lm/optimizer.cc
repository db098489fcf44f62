// SPDX-License-Identifier: MIT
#include "lm/optimizer.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "lm/error.h"

namespace parallax::lm {
namespace {

struct Parameter {
  std::string name;
  at::Tensor value;
};

// ---- Muon

// Where a parameter lies in a batch of equal-shaped matrices: as `count` blocks of `rows` of its
// rows each, in matrices first, first + 1, ... of the batch, from row `row_offset` there.
struct Slot {
  std::size_t parameter;
  std::int64_t first = 0, count = 1, row_offset = 0, rows = 0;
};

// Matrices [size, rows, cols] that Newton-Schulz takes at once. Stored as the wider of the two
// orientations: a layer's gate [ffn, width] and down [width, ffn] share a batch.
struct Batch {
  std::int64_t size = 0;
  std::vector<Slot> slots;
  std::vector<bool> tall;  // a slot each: stored transposed
};

// Blocks of one parameter, and the name of the stack it shares with others, if any.
struct Blocks {
  std::int64_t count = 1;
  std::string stack;  // empty: alone
};

bool ends_with_any(const std::string& name, std::initializer_list<const char*> endings) {
  return std::any_of(endings.begin(), endings.end(),
                     [&](const char* ending) { return name.ends_with(ending); });
}

Blocks blocks_of(const std::string& name, const at::Tensor& value, const std::string& orthogonalize,
                 const ModelConfig& model) {
  const bool heads =
      ends_with_any(name, {".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".r_proj.weight"});
  const bool gates = ends_with_any(name, {".gate_proj.weight", ".up_proj.weight"});
  if (orthogonalize == "head" && heads) return {value.size(0) / model.head_dim, ""};
  if (orthogonalize == "fused" && (heads || gates)) {
    const std::string layer = name.substr(0, name.rfind('.', name.size() - 8));
    return {1, layer};
  }
  return {};
}

std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return std::to_string(rows) + "x" + std::to_string(cols);
}

class Muon {
 public:
  Muon(std::vector<Parameter> parameters, const OptimizerConfig& config, const ModelConfig& model)
      : parameters_(std::move(parameters)), config_(config) {
    for (const Parameter& parameter : parameters_) {
      momentum_.push_back(at::zeros_like(parameter.value));
    }
    plan(model);
  }

  void step(double lr, double weight_decay) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const at::Tensor& grad = parameters_[i].value.grad();
      if (grad.defined()) momentum_[i].lerp_(grad, 1 - config_.momentum);
    }
    for (const auto& [shape, batch] : batches_)
      update(shape.first, shape.second, batch, lr, weight_decay);
  }

  void append_state(NamedTensors& state) const {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      state.emplace_back(parameters_[i].name + ".momentum", momentum_[i]);
    }
  }

  void append_assignments(std::vector<Assignment>& assignments) const {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      assignments.push_back(
          {parameters_[i].name, parameters_[i].value.sizes().vec(), "muon", descriptions_[i]});
    }
  }

 private:
  // Groups all blocks into batches of one shape. A stack of several parameters is one block whose
  // rows are theirs, one below the other.
  void plan(const ModelConfig& model) {
    std::map<std::string, std::vector<std::size_t>> stacks;
    descriptions_.resize(parameters_.size());
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& parameter = parameters_[i];
      const Blocks blocks =
          blocks_of(parameter.name, parameter.value, config_.orthogonalize, model);
      if (!blocks.stack.empty()) {
        stacks[blocks.stack].push_back(i);
        continue;
      }
      const std::int64_t rows = parameter.value.size(0) / blocks.count;
      const std::int64_t cols = parameter.value.size(1);
      add_slot(rows, cols, blocks.count, {{.parameter = i, .count = blocks.count, .rows = rows}});
      descriptions_[i] = std::to_string(blocks.count) + (blocks.count == 1 ? " block" : " blocks") +
                         " of " + shape_text(rows, cols);
    }
    for (const auto& [name, members] : stacks) add_stack(members);
  }

  void add_stack(const std::vector<std::size_t>& members) {
    std::vector<Slot> slots;
    std::int64_t rows = 0;
    for (const std::size_t i : members) {
      const std::int64_t own = parameters_[i].value.size(0);
      slots.push_back({.parameter = i, .row_offset = rows, .rows = own});
      rows += own;
    }
    const std::int64_t cols = parameters_[members[0]].value.size(1);
    for (const Slot& slot : slots) {
      descriptions_[slot.parameter] = "rows " + std::to_string(slot.row_offset) + "-" +
                                      std::to_string(slot.row_offset + slot.rows - 1) + " of " +
                                      shape_text(rows, cols);
    }
    add_slot(rows, cols, 1, std::move(slots));
  }

  void add_slot(std::int64_t rows, std::int64_t cols, std::int64_t count, std::vector<Slot> slots) {
    Batch& batch = batches_[{std::min(rows, cols), std::max(rows, cols)}];
    for (Slot& slot : slots) {
      slot.first = batch.size;
      batch.slots.push_back(slot);
      batch.tall.push_back(rows > cols);
    }
    batch.size += count;
  }

  // The part of a batch that belongs to a slot, [count, rows, cols] as its parameter has them.
  static at::Tensor view(const at::Tensor& x, const Batch& batch, std::size_t index) {
    const Slot& slot = batch.slots[index];
    const at::Tensor matrices = x.narrow(0, slot.first, slot.count);
    return (batch.tall[index] ? matrices.transpose(1, 2) : matrices)
        .narrow(1, slot.row_offset, slot.rows);
  }

  void update(std::int64_t rows, std::int64_t cols, const Batch& batch, double lr,
              double weight_decay) {
    const at::Tensor& any = parameters_[batch.slots[0].parameter].value;
    at::Tensor x = at::zeros({batch.size, rows, cols}, any.options());
    for (std::size_t i = 0; i < batch.slots.size(); ++i) {
      const Slot& slot = batch.slots[i];
      const at::Tensor& grad = parameters_[slot.parameter].value.grad();
      if (!grad.defined()) continue;
      at::Tensor target = view(x, batch, i);
      const at::Tensor momentum = momentum_[slot.parameter].view(target.sizes());
      if (config_.nesterov) {
        at::lerp_out(target, grad.view(target.sizes()), momentum, config_.momentum);
      } else {
        target.copy_(momentum);
      }
    }
    const at::ScalarType dtype = config_.ns_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
    x = newton_schulz(x.to(dtype), config_.ns_steps, config_.ns_coefficients);
    for (std::size_t i = 0; i < batch.slots.size(); ++i) {
      at::Tensor value = parameters_[batch.slots[i].parameter].value;
      if (!value.grad().defined()) continue;
      const at::Tensor direction = view(x, batch, i);
      const double scale = batch.tall[i] ? scaling(cols, rows) : scaling(rows, cols);
      value.mul_(1 - lr * weight_decay);
      value.view(direction.sizes()).add_(direction, -lr * scale);
    }
  }

  // Of the orthogonal update of a rows x cols block. keller_jordan: KellerJordan/Muon; rms_matched:
  // the root mean square of AdamW's usual update (MoonshotAI/Moonlight, arXiv 2502.16982).
  double scaling(std::int64_t rows, std::int64_t cols) const {
    if (config_.scaling == "rms_matched") {
      return 0.2 * std::sqrt(static_cast<double>(std::max(rows, cols)));
    }
    return std::sqrt(std::max(1.0, static_cast<double>(rows) / static_cast<double>(cols)));
  }

  std::vector<Parameter> parameters_;
  OptimizerConfig config_;
  std::vector<at::Tensor> momentum_;
  std::vector<std::string> descriptions_;
  std::map<std::pair<std::int64_t, std::int64_t>, Batch> batches_;
};

// ---- AdamW

class AdamW {
 public:
  AdamW(std::vector<Parameter> parameters, const OptimizerConfig& config, double lr,
        double weight_decay)
      : parameters_(std::move(parameters)), config_(config), lr_(lr), weight_decay_(weight_decay) {
    for (const Parameter& parameter : parameters_) {
      exp_avg_.push_back(at::zeros_like(parameter.value));
      exp_avg_sq_.push_back(at::zeros_like(parameter.value));
    }
  }

  // `count`: updates so far, this one among them.
  void step(std::int64_t count, double lr_scale, double wd_scale) {
    std::vector<at::Tensor> values, grads, exp_avgs, exp_avg_sqs;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const at::Tensor& value = parameters_[i].value;
      if (!value.grad().defined()) continue;
      values.push_back(value);
      grads.push_back(value.grad());
      exp_avgs.push_back(exp_avg_[i]);
      exp_avg_sqs.push_back(exp_avg_sq_[i]);
    }
    if (values.empty()) return;
    const at::Tensor count_tensor = at::full({}, static_cast<double>(count), values[0].options());
    const std::vector<at::Tensor> counts(values.size(), count_tensor);
    at::_fused_adamw_(values, grads, exp_avgs, exp_avg_sqs, {}, counts, lr_ * lr_scale,
                      config_.beta1, config_.beta2, weight_decay_ * wd_scale, config_.eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  }

  void append_state(NamedTensors& state) const {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      state.emplace_back(parameters_[i].name + ".exp_avg", exp_avg_[i]);
      state.emplace_back(parameters_[i].name + ".exp_avg_sq", exp_avg_sq_[i]);
    }
  }

  void append_assignments(std::vector<Assignment>& assignments) const {
    for (const Parameter& parameter : parameters_) {
      assignments.push_back({parameter.name, parameter.value.sizes().vec(), "adamw", ""});
    }
  }

 private:
  std::vector<Parameter> parameters_;
  OptimizerConfig config_;
  double lr_, weight_decay_;
  std::vector<at::Tensor> exp_avg_, exp_avg_sq_;
};

}  // namespace

at::Tensor newton_schulz(const at::Tensor& x, std::int64_t steps,
                         const std::vector<double>& coefficients) {
  const bool tall = x.size(1) > x.size(2);
  at::Tensor y = tall ? x.transpose(1, 2) : x;
  y = y / (at::linalg_vector_norm(y, 2, {1, 2}, /*keepdim=*/true) + 1e-7);
  for (std::int64_t step = 0; step < steps; ++step) {
    const double* abc = coefficients.data() + (coefficients.size() > 3 ? 3 * step : 0);
    const at::Tensor a = at::bmm(y, y.transpose(1, 2));
    const at::Tensor b = at::baddbmm(a, a, a, abc[1], abc[2]);
    y = at::baddbmm(y, b, y, abc[0], 1);
  }
  return tall ? y.transpose(1, 2) : y;
}

struct Optimizer::Impl {
  OptimizerConfig config;
  std::vector<Parameter> parameters;  // all, in the model's order
  std::unique_ptr<Muon> muon;
  std::vector<AdamW> adamw;
  at::Tensor step = at::zeros({1}, at::kLong);
};

Optimizer::Optimizer(const torch::OrderedDict<std::string, at::Tensor>& parameters,
                     const OptimizerConfig& config, const ModelConfig& model)
    : impl_(std::make_unique<Impl>()) {
  std::vector<Parameter> hidden, tables, gains;
  for (const auto& item : parameters) {
    const Parameter parameter{item.key(), item.value()};
    impl_->parameters.push_back(parameter);
    if (parameter.value.dim() < 2) {
      gains.push_back(parameter);
    } else if (ends_with_any(parameter.name, {"embed_tokens.weight", "lm_head.weight"})) {
      tables.push_back(parameter);
    } else {
      hidden.push_back(parameter);
    }
  }
  impl_->config = config;
  if (config.name == "muon") {
    impl_->muon = std::make_unique<Muon>(std::move(hidden), config, model);
  } else if (config.name == "adamw") {
    impl_->adamw.emplace_back(std::move(hidden), config, config.lr, config.weight_decay);
  } else {
    throw Error("optimizer.name: expected \"muon\" or \"adamw\", got \"" + config.name + "\"");
  }
  impl_->adamw.emplace_back(std::move(tables), config, config.adamw_lr, config.adamw_weight_decay);
  impl_->adamw.emplace_back(std::move(gains), config, config.adamw_lr, /*weight_decay=*/0.0);
}

Optimizer::~Optimizer() = default;

void Optimizer::step(double lr_scale, double wd_scale) {
  const at::NoGradGuard no_grad;
  impl_->step.add_(1);
  const OptimizerConfig& config = impl_->config;
  if (impl_->muon) impl_->muon->step(config.lr * lr_scale, config.weight_decay * wd_scale);
  const std::int64_t count = impl_->step.item<std::int64_t>();
  for (AdamW& group : impl_->adamw) group.step(count, lr_scale, wd_scale);
}

void Optimizer::zero_grad() {
  for (Parameter& parameter : impl_->parameters) parameter.value.mutable_grad().reset();
}

NamedTensors Optimizer::state() const {
  NamedTensors state = {{"step", impl_->step}};
  if (impl_->muon) impl_->muon->append_state(state);
  for (const AdamW& group : impl_->adamw) group.append_state(state);
  return state;
}

void Optimizer::load_state(const NamedTensors& state) {
  const NamedTensors own = this->state();
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  for (const auto& [name, tensor] : own) {
    const auto found = given.find(name);
    if (found == given.end()) throw Error("optimizer state: " + name + " is missing");
    if (found->second.sizes() != tensor.sizes()) {
      throw Error("optimizer state: " + name + ": expected shape " + c10::str(tensor.sizes()) +
                  ", got " + c10::str(found->second.sizes()));
    }
  }
  if (given.size() != own.size()) {
    for (const auto& [name, tensor] : own) given.erase(name);
    throw Error("optimizer state: " + given.begin()->first + " belongs to no parameter here");
  }
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : own) at::Tensor(tensor).copy_(given.at(name));
}

std::vector<Assignment> Optimizer::assignments() const {
  std::vector<Assignment> assignments;
  if (impl_->muon) impl_->muon->append_assignments(assignments);
  for (const AdamW& group : impl_->adamw) group.append_assignments(assignments);
  return assignments;
}

double clip_grad_norm(const std::vector<at::Tensor>& parameters, double max_norm) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> grads;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) grads.push_back(parameter.grad());
  }
  if (grads.empty()) return 0;
  const at::Tensor norms = at::stack(at::_foreach_norm(grads, 2)).to(at::kDouble);
  const double norm = norms.square().sum().sqrt().item<double>();
  if (max_norm > 0 && std::isfinite(norm) && norm > max_norm) {
    at::_foreach_mul_(grads, max_norm / norm);
  }
  return norm;
}

}  // namespace parallax::lm
