// SPDX-License-Identifier: MIT
// The CUDA calls behind a C interface, so that a Python process can time them beside other
// libraries' kernels through ctypes (bench_attention.py, bench_decode.py). Not a public interface.
#include <cstdio>
#include <cstring>

#include "parallax/attention.h"

namespace {

struct Tensor {
  void* data;
  std::int64_t batch_stride, len_stride, head_stride;
};

template <class View>
View view_of(const Tensor& tensor) {
  return {tensor.data, tensor.batch_stride, tensor.len_stride, tensor.head_stride};
}

}  // namespace

extern "C" {

struct ParallaxCall {
  std::int64_t batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim, window;
  double scale;
  std::int32_t causal, packed, fp16, portable, device;
  Tensor q, r, k, v, o, v_bar, d_o, dq, dr, dk, dv;
  const std::int32_t* cu_seqlens_q;
  const std::int32_t* cu_seqlens_k;
  void* lse;
  void* t_bar;
  void* workspace;  // null where some is needed: only workspace_bytes is written
  std::int64_t workspace_bytes;
  char message[256];
};
}

namespace {

parallax::AttentionProblem problem_of(const ParallaxCall& call) {
  parallax::AttentionProblem problem;
  problem.dtype = call.fp16 ? parallax::DType::kFloat16 : parallax::DType::kBFloat16;
  problem.batch = call.batch;
  problem.q_len = call.q_len;
  problem.kv_len = call.kv_len;
  problem.num_q_heads = call.num_q_heads;
  problem.num_kv_heads = call.num_kv_heads;
  problem.head_dim = call.head_dim;
  problem.scale = call.scale;
  problem.causal = call.causal != 0;
  problem.window = call.window;
  problem.packed = call.packed != 0;
  return problem;
}

// What the arguments of both passes have in common.
template <class Args>
Args args_of(const ParallaxCall& call) {
  Args args;
  args.q = view_of<parallax::ConstView>(call.q);
  args.r = view_of<parallax::ConstView>(call.r);
  args.k = view_of<parallax::ConstView>(call.k);
  args.v = view_of<parallax::ConstView>(call.v);
  args.sequences.cu_seqlens_q = call.cu_seqlens_q;
  args.sequences.cu_seqlens_k = call.cu_seqlens_k;
  args.lse = call.lse;
  args.t_bar = call.t_bar;
  return args;
}

// Plans, and runs if there is a workspace. 0 or, with a message, 1.
template <class Plan, class Args>
int plan_and_run(ParallaxCall* call, const Args& args, void* stream) {
  parallax::Device device;
  Plan plan;
  parallax::Status status = parallax::query_device(call->device, &device);
  device.portable = call->portable != 0;
  if (status.ok()) status = parallax::plan(problem_of(*call), device, &plan);
  if (status.ok()) {
    call->workspace_bytes = static_cast<std::int64_t>(workspace_bytes(plan));
    if (call->workspace == nullptr && call->workspace_bytes > 0) return 0;
    status = run(plan, args, call->workspace, stream);
  }
  if (status.ok()) return 0;
  std::snprintf(call->message, sizeof(call->message), "%s", status.message().c_str());
  return 1;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int parallax_forward(ParallaxCall* call, void* stream) {
  auto args = args_of<parallax::ForwardArgs>(*call);
  args.o = view_of<parallax::View>(call->o);
  args.v_bar = view_of<parallax::View>(call->v_bar);
  return plan_and_run<parallax::ForwardPlan>(call, args, stream);
}

__attribute__((visibility("default"))) int parallax_backward(ParallaxCall* call, void* stream) {
  auto args = args_of<parallax::BackwardArgs>(*call);
  args.o = view_of<parallax::ConstView>(call->o);
  args.v_bar = view_of<parallax::ConstView>(call->v_bar);
  args.d_o = view_of<parallax::ConstView>(call->d_o);
  args.dq = view_of<parallax::View>(call->dq);
  args.dr = view_of<parallax::View>(call->dr);
  args.dk = view_of<parallax::View>(call->dk);
  args.dv = view_of<parallax::View>(call->dv);
  return plan_and_run<parallax::BackwardPlan>(call, args, stream);
}
}

extern "C" {

// A decode. kv_len: capacity. With a schedule, parallax_decode_schedule() has filled it before.
struct ParallaxDecode {
  std::int64_t batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim, window;
  std::int64_t max_pages, num_pages, page_size;
  double scale;
  std::int32_t fp16, fp8, device, portable;
  Tensor q, r, k_cache, v_cache, o;
  const float* k_scale;
  const float* v_scale;
  const std::int32_t* kv_lens;
  const std::int32_t* page_table;
  void* schedule;
  void* workspace;  // null: only the two sizes are written
  std::int64_t workspace_bytes, schedule_bytes;
  char message[256];
};
}

namespace {

// The plan of a call; false with a message.
bool plan_decode(ParallaxDecode* call, parallax::DecodePlan* plan) {
  parallax::AttentionProblem problem;
  problem.dtype = call->fp16 ? parallax::DType::kFloat16 : parallax::DType::kBFloat16;
  if (call->fp8) problem.kv_dtype = parallax::DType::kFloat8E4M3;
  problem.batch = call->batch;
  problem.q_len = call->q_len;
  problem.kv_len = call->kv_len;
  problem.num_q_heads = call->num_q_heads;
  problem.num_kv_heads = call->num_kv_heads;
  problem.head_dim = call->head_dim;
  problem.scale = call->scale;
  problem.window = call->window;
  parallax::Device device;
  parallax::Status status = parallax::query_device(call->device, &device);
  device.portable = call->portable != 0;
  if (status.ok()) status = parallax::plan(problem, device, plan);
  if (status.ok()) return true;
  std::snprintf(call->message, sizeof(call->message), "%s", status.message().c_str());
  return false;
}

int finish(ParallaxDecode* call, const parallax::Status& status) {
  if (status.ok()) return 0;
  std::snprintf(call->message, sizeof(call->message), "%s", status.message().c_str());
  return 1;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int parallax_decode(ParallaxDecode* call, void* stream) {
  parallax::DecodePlan plan;
  if (!plan_decode(call, &plan)) return 1;
  call->workspace_bytes = static_cast<std::int64_t>(workspace_bytes(plan));
  call->schedule_bytes = static_cast<std::int64_t>(schedule_bytes(plan));
  if (call->workspace == nullptr) return 0;
  parallax::DecodeArgs args;
  args.q = view_of<parallax::ConstView>(call->q);
  args.r = view_of<parallax::ConstView>(call->r);
  args.k_cache = view_of<parallax::ConstView>(call->k_cache);
  args.v_cache = view_of<parallax::ConstView>(call->v_cache);
  args.o = view_of<parallax::View>(call->o);
  args.k_scale = call->k_scale;
  args.v_scale = call->v_scale;
  args.sequences.kv_lens = call->kv_lens;
  args.pages = {call->page_table, call->max_pages, call->num_pages,
                static_cast<int>(call->page_size)};
  args.schedule = call->schedule;
  return finish(call, run(plan, args, call->workspace, stream));
}

__attribute__((visibility("default"))) int parallax_decode_schedule(ParallaxDecode* call,
                                                                    void* stream) {
  parallax::DecodePlan plan;
  if (!plan_decode(call, &plan)) return 1;
  parallax::Sequences sequences;
  sequences.kv_lens = call->kv_lens;
  return finish(call, schedule(plan, sequences, call->schedule, stream));
}
}
