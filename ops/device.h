// SPDX-License-Identifier: MIT
// Where a kernel runs: on the CPU with LibTorch's intra-op threads, on a GPU on LibTorch's current
// stream of the tensor's device, with workspace from its caching allocator. Nothing here
// synchronises. All functions raise c10::Error in the name of `op` where the kernel room reports a
// failure, and refuse by name a device that this build has no kernel for.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/checks.h"
#include "parallax/attention.h"
#include "parallax/step.h"

namespace parallax::ops {

// The device of `tensor`, as plans know it.
Device device_of(const char* op, const at::Tensor& tensor);

// Tasks run on at::get_num_threads() threads, one task at a time from a shared counter: causal rows
// cost unequal work. Worker ids are stable within a call; nested calls run on one thread.
ParallelFor cpu_parallel_for();

void run_forward(const char* op, const ForwardPlan& plan, const ForwardArgs& args);
void run_backward(const char* op, const BackwardPlan& plan, const BackwardArgs& args);
void run_decode(const char* op, const DecodePlan& plan, const DecodeArgs& args, bool settled);

// REQUIRES: plan.device.kind == kCuda.
void run_schedule(const char* op, const DecodePlan& plan, const Sequences& sequences,
                  void* schedule);

// On the device of `like`.
void run_append_kv(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                   const AppendArgs& args);
// REQUIRES: `like` is on a GPU.
void run_append_kv_settled(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                           const AppendArgs& args);
void run_merge(const char* op, const at::Tensor& like, const AttentionProblem& problem,
               const std::vector<StateView>& states, const StateView& merged);
void run_finalize(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                  const StateView& state, const View& o, float* lse, float* t_bar);

// REQUIRES: `like` is on a GPU.
void run_few_rows(const char* op, const at::Tensor& like, const FewRowsProblem& problem,
                  const FewRowsArgs& args);
void run_argmax(const char* op, const at::Tensor& logits, std::uint64_t* words);
void run_next_tokens(const char* op, const at::Tensor& like, const NextTokensArgs& args);

}  // namespace parallax::ops
