// SPDX-License-Identifier: MIT
// attention_forward and attention_backward: the two operators below autograd. One function serves
// the CPU, CUDA and Meta keys: check, allocate, and (but for Meta) run, so shapes cannot disagree.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/options.h"
#include "ops/views.h"

namespace parallax::ops {
namespace {

using at::Tensor;

Tensor empty_like_contiguous(const Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

Sequences sequences_of(const AttentionOptions& options) {
  Sequences sequences;
  sequences.cu_seqlens_q = index_data(options.cu_seqlens_q);
  sequences.cu_seqlens_k = index_data(options.cu_seqlens_k);
  sequences.kv_lens = index_data(options.kv_lens);
  sequences.kv_start = index_data(options.kv_start);
  return sequences;
}

AttentionProblem attention_problem(const Tensor& q, const CallShape& shape,
                                   const AttentionOptions& options) {
  return problem_of(q, shape, options.scale, options.causal, options.window);
}

template <class Plan>
Plan make_plan(const char* op, const AttentionProblem& problem, const Device& device) {
  Plan result;
  check_status(op, plan(problem, device, &result));
  return result;
}

// -> o, lse, t_bar and v_bar (no elements unless save_v_bar).
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(const AttentionOptions& options,
                                                             const Tensor& q, const Tensor& r,
                                                             const Tensor& k, const Tensor& v,
                                                             bool save_v_bar) {
  const char* op = "attention";
  const CallShape shape = check_attention(op, q, r, k, v, options);
  const Tensor o = empty_like_contiguous(q);
  const Tensor lse = at::empty_symint(shape.stats(), stats_options(q));
  const Tensor t_bar = at::empty_symint(shape.stats(), stats_options(q));
  const Tensor v_bar = save_v_bar ? empty_like_contiguous(q) : at::empty({0}, q.options());
  if (q.is_meta()) return {o, lse, t_bar, v_bar};

  AttentionProblem problem = attention_problem(q, shape, options);
  problem.kv_dtype = kernel_dtype(k);
  const Device device = device_of(op, q);
  // A forward whose backward cannot follow would lose its work.
  if (save_v_bar) make_plan<BackwardPlan>(op, problem, device);
  ForwardArgs args;
  args.q = const_view(q);
  args.r = const_view(r);
  args.k = const_view(k);
  args.v = const_view(v);
  args.sequences = sequences_of(options);
  args.pages = page_table_view(options.page_table, k);
  args.k_scale = float_data(options.k_scale);
  args.v_scale = float_data(options.v_scale);
  args.o = view(o);
  if (save_v_bar) args.v_bar = view(v_bar);
  args.lse = lse.mutable_data_ptr();
  args.t_bar = t_bar.mutable_data_ptr();
  run_forward(op, make_plan<ForwardPlan>(op, problem, device), args);
  return {o, lse, t_bar, v_bar};
}

// -> dq, dr, dk, dv.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const AttentionOptions& options, const Tensor& d_o, const Tensor& q, const Tensor& r,
    const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, const Tensor& t_bar,
    const Tensor& v_bar) {
  const char* op = "attention_backward";
  TORCH_CHECK_VALUE(!options.page_table,
                    "parallax::attention_backward: page_table: expected "
                    "None (a paged cache serves forward only), got a tensor");
  TORCH_CHECK_VALUE(!options.k_scale,
                    "parallax::attention_backward: k_scale: expected "
                    "None (an FP8 cache serves forward only), got a tensor");
  const CallShape shape = check_attention(op, q, r, k, v, options);
  check_saved(op, shape, q, d_o, o, v_bar, lse, t_bar);
  const Tensor dq = empty_like_contiguous(q);
  const Tensor dr = empty_like_contiguous(r);
  const Tensor dk = empty_like_contiguous(k);
  const Tensor dv = empty_like_contiguous(v);
  if (q.is_meta()) return {dq, dr, dk, dv};

  const Device device = device_of(op, q);
  BackwardArgs args;
  args.q = const_view(q);
  args.r = const_view(r);
  args.k = const_view(k);
  args.v = const_view(v);
  args.o = const_view(o);
  args.v_bar = const_view(v_bar);
  args.d_o = const_view(d_o);
  args.lse = lse.const_data_ptr();
  args.t_bar = t_bar.const_data_ptr();
  args.sequences = sequences_of(options);
  args.dq = view(dq);
  args.dr = view(dr);
  args.dk = view(dk);
  args.dv = view(dv);
  const AttentionProblem problem = attention_problem(q, shape, options);
  run_backward(op, make_plan<BackwardPlan>(op, problem, device), args);
  return {dq, dr, dk, dv};
}

void register_kernels(torch::Library& m) {
  m.impl("attention_forward", unpacked<&attention_forward>);
  m.impl("attention_backward", unpacked<&attention_backward>);
}

}  // namespace

TORCH_LIBRARY_IMPL(parallax, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, Meta, m) { register_kernels(m); }

}  // namespace parallax::ops
