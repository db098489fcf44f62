// SPDX-License-Identifier: MIT
// Muon for the hidden matrices, AdamW for the rest (or AdamW for all). Every tensor's place is
// decided once, from its name, and can be read back through assignments().
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lm/config.h"

namespace parallax::lm {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct Assignment {
  std::string name;
  std::vector<std::int64_t> shape;
  std::string group;  // "muon" | "adamw"
  // Muon: the matrices that Newton-Schulz sees, such as "4 blocks of 32x128" or "rows 0-127 of
  // 384x128 (q|r|k|v)"; AdamW: empty.
  std::string blocks;
};

class Optimizer {
 public:
  // Keeps references to the parameters (as of CausalLm::named_parameters()); their gradients are
  // read at step(). Throws Error where a value of the config is not one of its choices.
  Optimizer(const torch::OrderedDict<std::string, at::Tensor>& parameters,
            const OptimizerConfig& config, const ModelConfig& model);
  ~Optimizer();

  // One update; every learning rate times lr_scale, every weight decay times wd_scale. Parameters
  // without a gradient stay as they are. Bitwise repeatable on one device.
  void step(double lr_scale = 1.0, double wd_scale = 1.0);

  void zero_grad();  // drops the gradients

  // Everything but the parameters that the next step depends on, by name ("NAME.momentum",
  // "NAME.exp_avg", "NAME.exp_avg_sq", "step"). The tensors share memory with the optimizer.
  NamedTensors state() const;
  // Copies such a state in. Throws Error naming the tensor that is missing, unknown or misshapen,
  // before anything is changed.
  void load_state(const NamedTensors& state);

  std::vector<Assignment> assignments() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Scales all gradients so that their global 2-norm is at most max_norm (0: leaves them) and returns
// the norm before that, summed in float64 in the order given. A norm that is not finite changes
// nothing.
double clip_grad_norm(const std::vector<at::Tensor>& parameters, double max_norm);

// The orthogonal factor of each matrix of x [batch, rows, cols], roughly: `steps` Newton-Schulz
// iterations with 3 or 3 * steps coefficients, in x's dtype, after dividing by the Frobenius norm
// (https://github.com/KellerJordan/Muon).
at::Tensor newton_schulz(const at::Tensor& x, std::int64_t steps,
                         const std::vector<double>& coefficients);

}  // namespace parallax::lm
