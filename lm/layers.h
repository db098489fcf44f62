// SPDX-License-Identifier: MIT
// The differentiable pieces between the matrix products of a decoder layer, and the loss. Each
// keeps the least that its backward needs and runs in its input's dtype unless it says otherwise;
// weights are float32 masters and are cast to the activations' dtype where the two meet.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace parallax::lm {

// One tensor called "weight": a linear map [out, in], a gain [size] or an embedding.
class Weight : public torch::nn::Module {
 public:
  explicit Weight(at::IntArrayRef shape);
  at::Tensor weight;
};

// cos and sin of the rotation angles of some positions, [len, 1, head_dim / 2], or of each row's
// own [batch, len, 1, head_dim / 2].
struct Rope {
  at::Tensor cos, sin;
};

// Angles of integer positions [len] or [batch, len]: position * theta^(-2i / head_dim);
// frequencies, angles, cos and sin in float32 whatever `dtype` the result shall have.
Rope make_rope(const at::Tensor& positions, std::int64_t head_dim, double theta,
               at::ScalarType dtype);

// x [batch, len, heads, head_dim] with the pairs (x_i, x_{i + head_dim/2}) rotated by their angles.
at::Tensor rotate(const at::Tensor& x, const Rope& rope);

// x / sqrt(mean(x^2) + eps) * gain over the last axis.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double eps);

// x [..., in] times several [out_i, in] weights in one product -> [..., sum of out_i]. Weights that
// lie one after another (join_weights) are read in place, others are copied together first.
at::Tensor project(const at::Tensor& x, const std::vector<at::Tensor>& weights);

// rms_norm with these.
struct Norm {
  at::Tensor gain;
  double eps;
};

// What a step of generation is made of, without gradients. On a GPU, for a few rows and weights as
// join_weights leaves them, each is one kernel (ops/step.h).

// The weights in one where these kernels take them with x, else undefined.
at::Tensor few_rows_weight(const at::Tensor& x, const std::vector<at::Tensor>& weights);

// project(rms_norm(x), weights), in x's dtype or `dtype`.
at::Tensor project_normed(const at::Tensor& x, const Norm& norm,
                          const std::vector<at::Tensor>& weights,
                          std::optional<at::ScalarType> dtype = {});

// Raises argmax words [rows] (ops/step.h) to those of project(rms_norm(x), {w}), x [rows, in].
void argmax_normed(const at::Tensor& x, const Norm& norm, const at::Tensor& w,
                   const at::Tensor& words);

// swiglu(project(rms_norm(x), {gate, up})).
at::Tensor swiglu_normed(const at::Tensor& x, const Norm& norm, const at::Tensor& gate,
                         const at::Tensor& up);

// residual + project(x, {w}); on a GPU in residual's place. `next`: weights that are read soon
// after and asked of memory meanwhile (ops/step.h), or undefined.
at::Tensor project_onto(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& w,
                        const at::Tensor& next = {});

// Lets these weights [out_i, in] lie one after another in memory of `dtype`, without gradients.
void join_weights(const std::vector<std::shared_ptr<Weight>>& weights, at::ScalarType dtype);

// gate|up [..., 2 size] -> silu(gate) * up [..., size].
at::Tensor swiglu(const at::Tensor& gate_up);

// Elements of the logits that are held at once: 256 MiB of float32.
inline constexpr std::int64_t kLogitsAtOnce = std::int64_t{1} << 26;

// Mean cross-entropy, in nats, of targets [rows] under the logits x w^T, x [rows, in], w [vocab,
// in]; rows whose target is -100 do not count. The logits are made, turned into gradients and
// dropped a block of rows at a time; softmax and loss in float32 or wider.
at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& w, const at::Tensor& targets,
                                std::int64_t logits_at_once = kLogitsAtOnce);

// The same a row, [rows], 0 where the target is -100. Not differentiable.
at::Tensor linear_cross_entropy_rows(const at::Tensor& x, const at::Tensor& w,
                                     const at::Tensor& targets,
                                     std::int64_t logits_at_once = kLogitsAtOnce);

}  // namespace parallax::lm
