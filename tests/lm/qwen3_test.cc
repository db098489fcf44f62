// SPDX-License-Identifier: MIT
// The decoder and its pieces against their formulas, written again from transformers' Qwen3 and
// arXiv 2605.29157 with plain loops in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "lm/layers.h"
#include "lm/model.h"

namespace parallax::lm {
namespace {

using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;  // rows

Matrix rows_of(const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(at::kDouble).contiguous();
  const auto a = values.accessor<double, 2>();
  Matrix rows(a.size(0), Vector(a.size(1)));
  for (std::int64_t i = 0; i < a.size(0); ++i) {
    for (std::int64_t j = 0; j < a.size(1); ++j) rows[i][j] = a[i][j];
  }
  return rows;
}

// The decoder, one sequence, no cache, no batches.
class Reference {
 public:
  Reference(const CausalLm& model, const ModelConfig& config) : config_(config) {
    for (const auto& item : model.named_parameters()) {
      const at::Tensor value = item.value();
      weights_[item.key()] = rows_of(value.dim() == 1 ? value.unsqueeze(0) : value);
    }
  }

  Matrix logits(const std::vector<std::int64_t>& tokens) const {
    Matrix x;
    for (const std::int64_t token : tokens) x.push_back(weight("model.embed_tokens")[token]);
    for (std::int64_t layer = 0; layer < config_.num_layers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      add(x, attention(norm(x, prefix + "input_layernorm"), prefix + "self_attn."));
      add(x, ffn(norm(x, prefix + "post_attention_layernorm"), prefix + "mlp."));
    }
    const std::string head = config_.tie_embeddings ? "model.embed_tokens" : "lm_head";
    return project(norm(x, "model.norm"), head);
  }

 private:
  const Matrix& weight(const std::string& name) const { return weights_.at(name + ".weight"); }

  static void add(Matrix& x, const Matrix& update) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::size_t j = 0; j < x[i].size(); ++j) x[i][j] += update[i][j];
    }
  }

  Matrix project(const Matrix& x, const std::string& name) const {
    Matrix y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (const Vector& row : weight(name)) {
        double sum = 0;
        for (std::size_t j = 0; j < row.size(); ++j) sum += row[j] * x[i][j];
        y[i].push_back(sum);
      }
    }
    return y;
  }

  void norm_part(double* x, std::int64_t size, const std::string& name) const {
    double square = 0;
    for (std::int64_t i = 0; i < size; ++i) square += x[i] * x[i];
    const double factor = 1 / std::sqrt(square / static_cast<double>(size) + config_.rms_norm_eps);
    for (std::int64_t i = 0; i < size; ++i) x[i] *= factor * weight(name)[0][i];
  }

  Matrix norm(Matrix x, const std::string& name) const {
    for (Vector& row : x) norm_part(row.data(), static_cast<std::int64_t>(row.size()), name);
    return x;
  }

  // Pairs i, i + half turn by position * theta^(-2i / head_dim), an angle of float32 precision.
  void rope_part(double* x, std::size_t position) const {
    const std::int64_t half = config_.head_dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
      const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config_.head_dim);
      const float frequency = static_cast<float>(std::pow(config_.rope_theta, -exponent));
      const double angle = static_cast<float>(position) * frequency;
      const double a = x[i], b = x[i + half];
      x[i] = a * std::cos(angle) - b * std::sin(angle);
      x[i + half] = b * std::cos(angle) + a * std::sin(angle);
    }
  }

  // One projection, each head normed (where named) and turned (where asked).
  Matrix heads(const Matrix& x, const std::string& projection, const std::string& gain,
               bool rope) const {
    Matrix y = project(x, projection);
    for (std::size_t i = 0; i < y.size(); ++i) {
      for (std::size_t h = 0; h < y[i].size(); h += config_.head_dim) {
        if (!gain.empty()) norm_part(&y[i][h], config_.head_dim, gain);
        if (rope) rope_part(&y[i][h], i);
      }
    }
    return y;
  }

  double dot(const Vector& a, std::int64_t head_a, const Vector& b, std::int64_t head_b) const {
    double sum = 0;
    for (std::int64_t i = 0; i < config_.head_dim; ++i) {
      sum += a[head_a * config_.head_dim + i] * b[head_b * config_.head_dim + i];
    }
    return sum;
  }

  Matrix attention(const Matrix& x, const std::string& prefix) const {
    const Matrix q = heads(x, prefix + "q_proj", prefix + "q_norm", true);
    const Matrix k = heads(x, prefix + "k_proj", prefix + "k_norm", true);
    const Matrix v = heads(x, prefix + "v_proj", "", false);
    Matrix r;
    if (config_.mixer == "parallax") {
      r = heads(x, prefix + "r_proj", config_.r_norm ? prefix + "r_norm" : "", config_.r_rope);
    }
    Matrix o(x.size(), Vector(config_.num_q_heads * config_.head_dim, 0));
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::int64_t h = 0; h < config_.num_q_heads; ++h) {
        const std::int64_t g = h / (config_.num_q_heads / config_.num_kv_heads);
        const Vector weights = combined_weights(q, r, k, i, h, g);
        for (std::size_t j = 0; j <= i; ++j) {
          for (std::int64_t c = 0; c < config_.head_dim; ++c) {
            o[i][h * config_.head_dim + c] += weights[j] * v[j][g * config_.head_dim + c];
          }
        }
      }
    }
    return project(o, prefix + "o_proj");
  }

  // p_j (1 + t_bar - t_j) of query i; plain p where r is empty.
  Vector combined_weights(const Matrix& q, const Matrix& r, const Matrix& k, std::size_t i,
                          std::int64_t h, std::int64_t g) const {
    const double scale = 1 / std::sqrt(static_cast<double>(config_.head_dim));
    Vector p, t;
    double sum = 0;
    for (std::size_t j = 0; j <= i; ++j) {
      p.push_back(std::exp(scale * dot(q[i], h, k[j], g)));
      t.push_back(r.empty() ? 0 : dot(r[i], h, k[j], g));
      sum += p.back();
    }
    double t_bar = 0;
    for (std::size_t j = 0; j <= i; ++j) t_bar += (p[j] /= sum) * t[j];
    for (std::size_t j = 0; j <= i; ++j) p[j] *= 1 + t_bar - t[j];
    return p;
  }

  Matrix ffn(const Matrix& x, const std::string& prefix) const {
    Matrix gate = project(x, prefix + "gate_proj");
    const Matrix up = project(x, prefix + "up_proj");
    for (std::size_t i = 0; i < gate.size(); ++i) {
      for (std::size_t j = 0; j < gate[i].size(); ++j) {
        gate[i][j] *= up[i][j] / (1 + std::exp(-gate[i][j]));
      }
    }
    return project(gate, prefix + "down_proj");
  }

  ModelConfig config_;
  std::map<std::string, Matrix> weights_;
};

struct Variant {
  const char* mixer;
  bool r_norm, r_rope, tie_embeddings;
};

void check(const Variant& variant) {
  ModelConfig config;
  config.mixer = variant.mixer;
  config.r_norm = variant.r_norm;
  config.r_rope = variant.r_rope;
  config.tie_embeddings = variant.tie_embeddings;
  config.vocab_size = 19;
  config.hidden_size = 20;
  config.num_layers = 2;
  config.num_q_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.ffn_size = 28;
  config.rope_theta = 100;
  config.init_std = 0.3;
  CausalLm model(config, 5);
  const at::NoGradGuard no_grad;
  at::manual_seed(2);
  for (auto& item : model.named_parameters()) {
    if (item.value().dim() == 1) item.value().uniform_(0.5, 1.5);
  }
  const std::vector<std::int64_t> tokens = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 18, 0};
  const Matrix expected = Reference(model, config).logits(tokens);
  const at::Tensor input = at::tensor(tokens, at::kLong).unsqueeze(0);
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 2e-6}, {at::kFloat, 2e-4}}) {
    model.compute_in(dtype);
    const Matrix logits = rows_of(model.logits(model.hidden(input))[0]);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      for (std::size_t j = 0; j < expected[i].size(); ++j) {
        ASSERT_NEAR(logits[i][j], expected[i][j], tolerance) << variant.mixer << " " << dtype;
      }
    }
  }
}

TEST(Qwen3, SoftmaxLogitsAreThoseOfTheFormulas) {
  check({"softmax", true, true, true});
  check({"softmax", true, true, false});
}

TEST(Qwen3, ParallaxLogitsAreThoseOfTheFormulas) {
  check({"parallax", true, true, true});
  check({"parallax", true, false, true});
  check({"parallax", false, true, true});
}

TEST(Layers, RopeAnglesAreFloat32WhateverTheDtype) {
  const Rope bf16 = make_rope(at::arange(1000, 1003), 8, 1e4, at::kBFloat16);
  EXPECT_EQ(bf16.cos.scalar_type(), at::kBFloat16);
  for (int p = 0; p < 3; ++p) {
    for (int i = 0; i < 4; ++i) {
      const double angle = (1000 + p) * std::pow(1e4, -2.0 * i / 8);
      EXPECT_NEAR(bf16.cos[p][0][i].item<double>(), std::cos(angle), 5e-3);
      EXPECT_NEAR(bf16.sin[p][0][i].item<double>(), std::sin(angle), 5e-3);
    }
  }
}

at::Tensor random_leaf(at::IntArrayRef shape) {
  return at::randn(shape, at::kDouble).requires_grad_(true);
}

void expect_close(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_LT((a - b).abs().max().item<double>(), 1e-12);
}

// Gradients of the fused pieces against LibTorch's own, of the same formula in separate operations.
TEST(Layers, SwiGluGradientIsThatOfTheFormula) {
  at::manual_seed(0);
  const at::Tensor x = random_leaf({3, 5, 14}), g = at::randn({3, 5, 7}, at::kDouble);
  const at::Tensor plain = at::silu(x.narrow(-1, 0, 7)) * x.narrow(-1, 7, 7);
  expect_close(swiglu(x), plain);
  expect_close(torch::autograd::grad({swiglu(x)}, {x}, {g})[0],
               torch::autograd::grad({plain}, {x}, {g})[0]);
}

TEST(Layers, RmsNormGradientIsThatOfTheFormula) {
  at::manual_seed(0);
  // Heads of a wider product: rows that do not lie end to end.
  const at::Tensor wide = random_leaf({2, 35, 40}), gain = random_leaf({8});
  const at::Tensor x = wide.narrow(-1, 8, 24).unflatten(-1, {3, 8});
  const at::Tensor g = at::randn(x.sizes(), at::kDouble);
  const at::Tensor plain = x * (x.square().mean(-1, true) + 1e-3).rsqrt() * gain;
  const at::Tensor ours = rms_norm(x, gain, 1e-3);
  expect_close(ours, plain);
  const auto grads = torch::autograd::grad({ours}, {wide, gain}, {g});
  const auto expected = torch::autograd::grad({plain}, {wide, gain}, {g});
  expect_close(grads[0], expected[0]);
  expect_close(grads[1], expected[1]);
}

TEST(Layers, RotationGradientIsThatOfTheFormula) {
  at::manual_seed(0);
  const at::Tensor x = random_leaf({2, 5, 3, 8}), g = at::randn({2, 5, 3, 8}, at::kDouble);
  const Rope rope = make_rope(at::arange(2, 7), 8, 100, at::kDouble);
  const at::Tensor x1 = x.narrow(-1, 0, 4), x2 = x.narrow(-1, 4, 4);
  const at::Tensor plain =
      at::cat({x1 * rope.cos - x2 * rope.sin, x2 * rope.cos + x1 * rope.sin}, -1);
  expect_close(rotate(x, rope), plain);
  expect_close(torch::autograd::grad({rotate(x, rope)}, {x}, {g})[0],
               torch::autograd::grad({plain}, {x}, {g})[0]);
}

TEST(Layers, CrossEntropyInBlocksIsTheWhole) {
  at::manual_seed(0);
  const at::Tensor x = random_leaf({11, 6}), w = random_leaf({9, 6});
  at::Tensor targets = at::randint(9, {11}, at::kLong);
  targets[4] = -100;
  targets[10] = -100;
  const at::Tensor whole = at::cross_entropy_loss(at::linear(x, w), targets);
  const auto expected = torch::autograd::grad({whole * 3}, {x, w});
  for (const std::int64_t logits_at_once : {1, 27, 1000}) {  // blocks of 1, 3 and all rows
    const at::Tensor loss = linear_cross_entropy(x, w, targets, logits_at_once);
    expect_close(loss, whole);
    const auto grads = torch::autograd::grad({loss * 3}, {x, w});
    expect_close(grads[0], expected[0]);
    expect_close(grads[1], expected[1]);
    const at::NoGradGuard no_grad;
    expect_close(linear_cross_entropy(x, w, targets, logits_at_once), whole);
  }
}

}  // namespace
}  // namespace parallax::lm
