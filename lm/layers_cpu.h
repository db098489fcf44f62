// SPDX-License-Identifier: MIT
// RMSNorm and SwiGLU on the CPU in one pass each, for float32 and float64. LibTorch has no fused
// kernel for either there: composed of its operations, the two took a quarter of a step of the
// tiny model. Results do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace parallax::lm::cpu {

// x [outer, inner, size], last axis contiguous, any other strides; gain [size].
// -> y [outer, inner, size] contiguous, and 1 / sqrt(mean(x^2) + eps) [outer, inner].
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& gain,
                                            double eps);

// dy contiguous -> dx contiguous, dgain.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gain,
                                                     const at::Tensor& rstd);

// gate_up [rows, 2 size] contiguous, gate_sigmoid [rows, size] = sigmoid(gate) -> [rows, size].
at::Tensor swiglu(const at::Tensor& gate_up, const at::Tensor& gate_sigmoid);

// dy [rows, size] contiguous -> d_gate_up [rows, 2 size].
at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up,
                           const at::Tensor& gate_sigmoid);

}  // namespace parallax::lm::cpu
