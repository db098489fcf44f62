// SPDX-License-Identifier: MIT
#include "lm/layers_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace parallax::lm::cpu {
namespace {

constexpr std::int64_t kRowsPerTask = 64;
constexpr std::int64_t kGainParts = 32;  // partial sums of dgain: fixed, whatever the threads

// Row i of [outer, inner, size].
template <class T>
const T* row(const at::Tensor& x, std::int64_t i) {
  const std::int64_t inner = x.size(1);
  return x.const_data_ptr<T>() + (i / inner) * x.stride(0) + (i % inner) * x.stride(1);
}

template <class T>
void norm_row(const T* x, const T* gain, std::int64_t size, double eps, T* y, T* rstd) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (std::int64_t c = 0; c < size; ++c) square += x[c] * x[c];
  const T factor = 1 / std::sqrt(square / static_cast<T>(size) + static_cast<T>(eps));
#pragma omp simd
  for (std::int64_t c = 0; c < size; ++c) y[c] = x[c] * factor * gain[c];
  *rstd = factor;
}

// With n = x rstd: dx = rstd (dy gain - n mean(dy gain n)), dgain = sum over rows of dy n.
template <class T>
void norm_row_backward(const T* dy, const T* x, const T* gain, T rstd, std::int64_t size, T* dx,
                       T* dgain) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (std::int64_t c = 0; c < size; ++c) dot += dy[c] * gain[c] * x[c];
  const T along = dot * rstd * rstd / static_cast<T>(size);
#pragma omp simd
  for (std::int64_t c = 0; c < size; ++c) {
    dgain[c] += dy[c] * x[c] * rstd;
    dx[c] = rstd * (dy[c] * gain[c] - x[c] * along);
  }
}

template <class T>
void swiglu_row(const T* gate_up, const T* sigmoid, std::int64_t size, T* y) {
  const T* gate = gate_up;
  const T* up = gate_up + size;
#pragma omp simd
  for (std::int64_t c = 0; c < size; ++c) y[c] = gate[c] * sigmoid[c] * up[c];
}

template <class T>
void swiglu_row_backward(const T* dy, const T* gate_up, const T* sigmoid, std::int64_t size,
                         T* d_gate_up) {
  const T* gate = gate_up;
  const T* up = gate_up + size;
#pragma omp simd
  for (std::int64_t c = 0; c < size; ++c) {
    const T silu = gate[c] * sigmoid[c];
    d_gate_up[c] = dy[c] * up[c] * (sigmoid[c] + silu * (1 - sigmoid[c]));
    d_gate_up[c + size] = dy[c] * silu;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& gain,
                                            double eps) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor rstd = at::empty({x.size(0), x.size(1)}, x.options());
  const std::int64_t size = x.size(2);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm", [&] {
    const scalar_t* gains = gain.const_data_ptr<scalar_t>();
    scalar_t* ys = y.mutable_data_ptr<scalar_t>();
    scalar_t* factors = rstd.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rstd.numel(), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        norm_row(row<scalar_t>(x, i), gains, size, eps, ys + i * size, factors + i);
      }
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gain,
                                                     const at::Tensor& rstd) {
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor parts = at::zeros({kGainParts, x.size(2)}, x.options());
  const std::int64_t size = x.size(2), rows = rstd.numel();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm_backward", [&] {
    const scalar_t* gains = gain.const_data_ptr<scalar_t>();
    const scalar_t* dys = dy.const_data_ptr<scalar_t>();
    const scalar_t* factors = rstd.const_data_ptr<scalar_t>();
    scalar_t* dxs = dx.mutable_data_ptr<scalar_t>();
    scalar_t* dgains = parts.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, kGainParts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = begin; part < end; ++part) {
        const std::int64_t last = (part + 1) * rows / kGainParts;
        for (std::int64_t i = part * rows / kGainParts; i < last; ++i) {
          norm_row_backward(dys + i * size, row<scalar_t>(x, i), gains, factors[i], size,
                            dxs + i * size, dgains + part * size);
        }
      }
    });
  });
  return {dx, parts.sum(0)};
}

at::Tensor swiglu(const at::Tensor& gate_up, const at::Tensor& gate_sigmoid) {
  at::Tensor y = at::empty_like(gate_sigmoid);
  const std::int64_t size = y.size(1);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "swiglu", [&] {
    const scalar_t* gate_ups = gate_up.const_data_ptr<scalar_t>();
    const scalar_t* sigmoids = gate_sigmoid.const_data_ptr<scalar_t>();
    scalar_t* ys = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, y.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        swiglu_row(gate_ups + 2 * i * size, sigmoids + i * size, size, ys + i * size);
      }
    });
  });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up,
                           const at::Tensor& gate_sigmoid) {
  at::Tensor d_gate_up = at::empty_like(gate_up);
  const std::int64_t size = dy.size(1);
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "swiglu_backward", [&] {
    const scalar_t* dys = dy.const_data_ptr<scalar_t>();
    const scalar_t* gate_ups = gate_up.const_data_ptr<scalar_t>();
    const scalar_t* sigmoids = gate_sigmoid.const_data_ptr<scalar_t>();
    scalar_t* d_gate_ups = d_gate_up.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, dy.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        swiglu_row_backward(dys + i * size, gate_ups + 2 * i * size, sigmoids + i * size, size,
                            d_gate_ups + 2 * i * size);
      }
    });
  });
  return d_gate_up;
}

}  // namespace parallax::lm::cpu
