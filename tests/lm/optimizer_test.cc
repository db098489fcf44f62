// SPDX-License-Identifier: MIT
// Muon and AdamW against their formulas, written again with plain loops in float64: 20 steps on
// random gradients. Tolerance: float32 keeps 6e-8 of a weight near 1, and 20 steps add that up;
// Newton-Schulz multiplies a small singular value by up to 3.4445^5 = 485 on its way to 1, so an
// orthogonal update holds about 485 * 6e-8 = 3e-5, times the learning rate, times 20.
#include "lm/optimizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "lm/error.h"
#include "lm/model.h"

namespace parallax::lm {
namespace {

constexpr int kSteps = 20;
constexpr double kAdamWTolerance = 2e-6;
constexpr double kMuonTolerance = 2e-5;

struct Matrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<double> data = {};
  double& at(std::int64_t i, std::int64_t j) { return data[i * cols + j]; }
  double at(std::int64_t i, std::int64_t j) const { return data[i * cols + j]; }
};

Matrix zeros(std::int64_t rows, std::int64_t cols) {
  return {rows, cols, std::vector<double>(rows * cols, 0)};
}

Matrix from(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.detach().to(at::kDouble).contiguous();
  const double* data = flat.data_ptr<double>();
  const std::int64_t cols = tensor.dim() == 2 ? tensor.size(1) : tensor.numel();
  return {tensor.numel() / cols, cols, std::vector<double>(data, data + tensor.numel())};
}

Matrix transpose(const Matrix& x) {
  Matrix y = zeros(x.cols, x.rows);
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t j = 0; j < x.cols; ++j) y.at(j, i) = x.at(i, j);
  }
  return y;
}

Matrix multiply(const Matrix& a, const Matrix& b) {
  Matrix y = zeros(a.rows, b.cols);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t k = 0; k < a.cols; ++k) {
      for (std::int64_t j = 0; j < b.cols; ++j) y.at(i, j) += a.at(i, k) * b.at(k, j);
    }
  }
  return y;
}

Matrix orthogonalize(Matrix x, const OptimizerConfig& config) {
  const bool tall = x.rows > x.cols;
  if (tall) x = transpose(x);
  double square = 0;
  for (const double value : x.data) square += value * value;
  for (double& value : x.data) value /= std::sqrt(square) + 1e-7;
  for (std::int64_t step = 0; step < config.ns_steps; ++step) {
    const std::size_t first = config.ns_coefficients.size() == 3 ? 0 : 3 * step;
    const double a = config.ns_coefficients[first], b = config.ns_coefficients[first + 1],
                 c = config.ns_coefficients[first + 2];
    const Matrix gram = multiply(x, transpose(x));
    Matrix polynomial = multiply(gram, gram);
    for (std::size_t i = 0; i < gram.data.size(); ++i) {
      polynomial.data[i] = b * gram.data[i] + c * polynomial.data[i];
    }
    const Matrix product = multiply(polynomial, x);
    for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] = a * x.data[i] + product.data[i];
  }
  return tall ? transpose(x) : x;
}

double muon_scale(std::int64_t rows, std::int64_t cols, const std::string& scaling) {
  const double ratio = static_cast<double>(rows) / static_cast<double>(cols);
  if (scaling == "keller_jordan") return ratio > 1 ? std::sqrt(ratio) : 1;
  return 0.2 * std::sqrt(static_cast<double>(rows > cols ? rows : cols));
}

Matrix row_range(const Matrix& x, std::int64_t first, std::int64_t rows) {
  Matrix y = zeros(rows, x.cols);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < x.cols; ++j) y.at(i, j) = x.at(first + i, j);
  }
  return y;
}

// The tests' model: its matrices are wide, tall and square.
ModelConfig model_config() {
  ModelConfig config;
  config.vocab_size = 11;
  config.hidden_size = 16;
  config.num_layers = 2;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.ffn_size = 24;
  config.init_std = 0.5;
  return config;
}

bool is_hidden(const std::string& name, const at::Tensor& value) {
  return value.dim() == 2 && name.find("layers") != std::string::npos;
}

// One Muon matrix, or several that are orthogonalised as one, recomputed.
struct MuonReference {
  std::vector<std::string> names;
  std::int64_t blocks = 1;  // equal ranges of rows, each alone
  Matrix value = {}, momentum = {};

  void step(const Matrix& grad, const OptimizerConfig& config, double lr, double weight_decay) {
    Matrix update = grad;
    for (std::size_t i = 0; i < grad.data.size(); ++i) {
      double& m = momentum.data[i];
      m = config.momentum * m + (1 - config.momentum) * grad.data[i];
      update.data[i] =
          config.nesterov ? (1 - config.momentum) * grad.data[i] + config.momentum * m : m;
    }
    const std::int64_t rows = update.rows / blocks;
    for (std::int64_t block = 0; block < blocks; ++block) {
      const Matrix direction = orthogonalize(row_range(update, block * rows, rows), config);
      const double scale = muon_scale(rows, update.cols, config.scaling);
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < update.cols; ++j) {
          double& w = value.at(block * rows + i, j);
          w = w - lr * weight_decay * w - lr * scale * direction.at(i, j);
        }
      }
    }
  }
};

struct AdamWReference {
  std::vector<double> value, first, second;

  void step(const Matrix& grad, int count, const OptimizerConfig& config, double lr,
            double weight_decay) {
    for (std::size_t i = 0; i < value.size(); ++i) {
      const double g = grad.data[i];
      first[i] = config.beta1 * first[i] + (1 - config.beta1) * g;
      second[i] = config.beta2 * second[i] + (1 - config.beta2) * g * g;
      const double m = first[i] / (1 - std::pow(config.beta1, count));
      const double v = second[i] / (1 - std::pow(config.beta2, count));
      value[i] -= lr * weight_decay * value[i] + lr * m / (std::sqrt(v) + config.eps);
    }
  }
};

void set_random_grads(const torch::OrderedDict<std::string, at::Tensor>& parameters, int step) {
  at::manual_seed(100 + step);
  for (const auto& item : parameters) {
    at::Tensor value = item.value();
    // Full of directions of very different size, as real gradients are.
    at::Tensor grad = at::randn(value.sizes());
    if (value.dim() == 2) grad = grad * at::exp(at::randn({1, value.size(1)}));
    value.mutable_grad() = 0.1 * grad;
  }
}

Matrix stacked(const std::vector<std::string>& names,
               const torch::OrderedDict<std::string, at::Tensor>& parameters, bool grads) {
  Matrix all;
  for (const std::string& name : names) {
    const Matrix part = from(grads ? parameters[name].grad() : parameters[name]);
    all.cols = part.cols;
    all.rows += part.rows;
    all.data.insert(all.data.end(), part.data.begin(), part.data.end());
  }
  return all;
}

// Which matrices are orthogonalised together, spelled out.
std::vector<MuonReference> muon_references(
    const torch::OrderedDict<std::string, at::Tensor>& parameters, const std::string& mode) {
  std::vector<MuonReference> references;
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto name = [&](const std::string& leaf) { return prefix + leaf + "_proj.weight"; };
    const std::string q = name("self_attn.q"), k = name("self_attn.k"), v = name("self_attn.v"),
                      r = name("self_attn.r"), gate = name("mlp.gate"), up = name("mlp.up");
    if (mode == "fused") {
      references.push_back({{q, k, v, r}});
      references.push_back({{gate, up}});
    } else {
      const bool head = mode == "head";
      references.push_back({{q}, head ? 4 : 1});
      references.push_back({{r}, head ? 4 : 1});
      references.push_back({{k}, head ? 2 : 1});
      references.push_back({{v}, head ? 2 : 1});
      references.push_back({{gate}});
      references.push_back({{up}});
    }
    references.push_back({{name("self_attn.o")}});
    references.push_back({{name("mlp.down")}});
  }
  for (MuonReference& reference : references) {
    reference.value = stacked(reference.names, parameters, false);
    reference.momentum = zeros(reference.value.rows, reference.value.cols);
  }
  return references;
}

double largest_gap(const std::vector<double>& a, const std::vector<double>& b) {
  double gap = 0;
  for (std::size_t i = 0; i < a.size(); ++i) gap = std::max(gap, std::abs(a[i] - b[i]));
  return gap;
}

void check_muon(const OptimizerConfig& config) {
  CausalLm model(model_config(), 1);
  const auto parameters = model.named_parameters();
  std::vector<MuonReference> references = muon_references(parameters, config.orthogonalize);
  Optimizer optimizer(parameters, config, model_config());
  for (int step = 0; step < kSteps; ++step) {
    const double lr_scale = 1 - 0.03 * step, wd_scale = 1 - 0.02 * step;
    set_random_grads(parameters, step);
    for (MuonReference& reference : references) {
      reference.step(stacked(reference.names, parameters, true), config, config.lr * lr_scale,
                     config.weight_decay * wd_scale);
    }
    optimizer.step(lr_scale, wd_scale);
  }
  for (const MuonReference& reference : references) {
    const Matrix value = stacked(reference.names, parameters, false);
    EXPECT_LT(largest_gap(value.data, reference.value.data), kMuonTolerance)
        << reference.names[0] << " " << config.orthogonalize << " " << config.scaling;
  }
}

TEST(Muon, TwentyStepsAreThoseOfTheFormulas) {
  OptimizerConfig config;
  config.weight_decay = 0.1;
  for (const char* mode : {"projection", "fused", "head"}) {
    config.orthogonalize = mode;
    config.scaling = "keller_jordan";
    check_muon(config);
    config.scaling = "rms_matched";
    check_muon(config);
  }
  config.nesterov = false;
  config.ns_steps = 2;
  config.ns_coefficients = {4, -6, 3, 2, -1.5, 0.5};  // of its own for each step
  check_muon(config);
}

void check_adamw(const OptimizerConfig& config) {
  CausalLm model(model_config(), 1);
  const auto parameters = model.named_parameters();
  std::map<std::string, AdamWReference> references;
  for (const auto& item : parameters) {
    if (config.name == "muon" && is_hidden(item.key(), item.value())) continue;
    const Matrix value = from(item.value());
    const std::vector<double> zero(value.data.size(), 0);
    references[item.key()] = {value.data, zero, zero};
  }
  Optimizer optimizer(parameters, config, model_config());
  for (int step = 0; step < kSteps; ++step) {
    set_random_grads(parameters, step);
    for (auto& [name, reference] : references) {
      const at::Tensor value = parameters[name];
      const bool hidden = is_hidden(name, value);
      const double decay = value.dim() == 1 ? 0
                           : hidden         ? config.weight_decay
                                            : config.adamw_weight_decay;
      reference.step(from(value.grad()), step + 1, config,
                     0.7 * (hidden ? config.lr : config.adamw_lr), 0.5 * decay);
    }
    optimizer.step(0.7, 0.5);
  }
  for (const auto& [name, reference] : references) {
    EXPECT_LT(largest_gap(from(parameters[name]).data, reference.value), kAdamWTolerance) << name;
  }
}

TEST(AdamW, TwentyStepsAreThoseOfTheFormulas) {
  OptimizerConfig config;
  config.adamw_lr = 0.01;
  config.adamw_weight_decay = 0.2;
  check_adamw(config);  // embedding and gains beside Muon
  config.name = "adamw";
  config.lr = 0.003;
  config.weight_decay = 0.1;
  check_adamw(config);
}

TEST(Muon, NewtonSchulzBringsSingularValuesNearOne) {
  at::manual_seed(0);
  const at::Tensor x = at::randn({3, 40, 24});
  const at::Tensor values =
      at::linalg_svdvals(newton_schulz(x, 5, OptimizerConfig{}.ns_coefficients));
  EXPECT_GT(values.min().item<double>(), 0.3);
  EXPECT_LT(values.max().item<double>(), 1.3);
}

TEST(Optimizer, SaysWhichTensorWentWhere) {
  CausalLm model(model_config(), 1);
  OptimizerConfig config;
  const auto find = [&](const std::string& mode, const std::string& ending) {
    config.orthogonalize = mode;
    const Optimizer optimizer(model.named_parameters(), config, model_config());
    const std::vector<Assignment> all = optimizer.assignments();
    EXPECT_EQ(all.size(), model.named_parameters().size());
    for (const Assignment& one : all) {
      if (one.name.ends_with(ending)) return one.group + ": " + one.blocks;
    }
    return std::string("absent");
  };
  EXPECT_EQ(find("projection", "q_proj.weight"), "muon: 1 block of 32x16");
  EXPECT_EQ(find("head", "k_proj.weight"), "muon: 2 blocks of 8x16");
  EXPECT_EQ(find("head", "o_proj.weight"), "muon: 1 block of 16x32");
  EXPECT_EQ(find("fused", "0.self_attn.r_proj.weight"), "muon: rows 64-95 of 96x16");
  EXPECT_EQ(find("fused", "1.mlp.up_proj.weight"), "muon: rows 24-47 of 48x16");
  EXPECT_EQ(find("fused", "embed_tokens.weight"), "adamw: ");
  EXPECT_EQ(find("fused", "r_norm.weight"), "adamw: ");
  config.name = "adamw";
  EXPECT_EQ(find("fused", "q_proj.weight"), "adamw: ");
  config.name = "sgd";
  EXPECT_THROW(find("fused", "q_proj.weight"), Error);
}

TEST(Optimizer, GoesOnBitForBitFromItsState) {
  CausalLm straight(model_config(), 1), stopped(model_config(), 1), resumed(model_config(), 2);
  Optimizer a(straight.named_parameters(), {}, model_config());
  for (int step = 0; step < 6; ++step) {
    set_random_grads(straight.named_parameters(), step);
    a.step(0.9);
  }
  NamedTensors saved;
  {
    Optimizer b(stopped.named_parameters(), {}, model_config());
    for (int step = 0; step < 3; ++step) {
      set_random_grads(stopped.named_parameters(), step);
      b.step(0.9);
    }
    for (const auto& [name, tensor] : b.state()) saved.emplace_back(name, tensor.clone());
  }
  const at::NoGradGuard no_grad;
  for (auto& item : resumed.named_parameters()) {
    item.value().copy_(stopped.named_parameters()[item.key()]);
  }
  Optimizer c(resumed.named_parameters(), {}, model_config());
  c.load_state(saved);
  for (int step = 3; step < 6; ++step) {
    set_random_grads(resumed.named_parameters(), step);
    c.step(0.9);
  }
  for (const auto& item : straight.named_parameters()) {
    EXPECT_TRUE(at::equal(item.value(), resumed.named_parameters()[item.key()])) << item.key();
  }
}

TEST(Optimizer, RefusesAStateThatDoesNotFit) {
  CausalLm model(model_config(), 1);
  Optimizer optimizer(model.named_parameters(), {}, model_config());
  const auto error_of = [&](const NamedTensors& state) -> std::string {
    try {
      optimizer.load_state(state);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  NamedTensors state;
  for (const auto& [name, tensor] : optimizer.state()) state.emplace_back(name, tensor.clone());
  NamedTensors missing(state.begin(), state.end() - 1);
  EXPECT_EQ(error_of(missing), "optimizer state: " + state.back().first + " is missing");
  NamedTensors extra = state;
  extra.emplace_back("model.extra.momentum", at::zeros({1}));
  EXPECT_EQ(error_of(extra), "optimizer state: model.extra.momentum belongs to no parameter here");
  NamedTensors misshapen = state;
  misshapen[1].second = at::zeros({2, 2});
  EXPECT_THAT(error_of(misshapen), testing::HasSubstr("expected shape [32, 16], got [2, 2]"));
}

TEST(Optimizer, LeavesParametersWithoutGradientAlone) {
  CausalLm model(model_config(), 1);
  const auto parameters = model.named_parameters();
  OptimizerConfig config;
  config.weight_decay = 0.1;
  Optimizer optimizer(parameters, config, model_config());
  set_random_grads(parameters, 0);
  const std::string name = "model.layers.1.self_attn.r_proj.weight";
  at::Tensor frozen = parameters[name];
  frozen.mutable_grad().reset();
  const at::Tensor before = frozen.detach().clone();
  optimizer.step();
  EXPECT_TRUE(at::equal(frozen, before));
  optimizer.zero_grad();
  for (const auto& item : parameters) EXPECT_FALSE(item.value().grad().defined());
}

TEST(ClipGradNorm, ScalesToTheGlobalNorm) {
  at::Tensor a = at::zeros({2}).requires_grad_(), b = at::zeros({1}).requires_grad_();
  const auto set = [&](double x) {
    a.mutable_grad() = at::tensor({3.0f, static_cast<float>(x)});
    b.mutable_grad() = at::tensor({12.0f});
  };
  set(4);
  EXPECT_DOUBLE_EQ(clip_grad_norm({a, b}, 0), 13);
  EXPECT_EQ(a.grad()[0].item<float>(), 3);
  EXPECT_DOUBLE_EQ(clip_grad_norm({a, b}, 26), 13);
  EXPECT_EQ(a.grad()[0].item<float>(), 3);
  EXPECT_DOUBLE_EQ(clip_grad_norm({a, b}, 6.5), 13);
  EXPECT_FLOAT_EQ(a.grad()[0].item<float>(), 1.5);
  EXPECT_FLOAT_EQ(b.grad()[0].item<float>(), 6);
  set(std::nan(""));
  EXPECT_TRUE(std::isnan(clip_grad_norm({a, b}, 1)));
  EXPECT_EQ(b.grad()[0].item<float>(), 12);
}

}  // namespace
}  // namespace parallax::lm
