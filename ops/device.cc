// SPDX-License-Identifier: MIT
#include "ops/device.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#if defined(PARALLAX_CUDA) && defined(PARALLAX_TORCH_CUDA)
#define PARALLAX_OPS_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace parallax::ops {
namespace {

// Scratch for one call, none for 0 bytes. Both allocators align more than the kernels ask for; the
// caching one hands the memory on to later work of the current stream only.
class Workspace {
 public:
  Workspace(std::size_t bytes, at::Device device) {
    if (bytes == 0) return;
    memory_ =
        at::empty({static_cast<std::int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device));
  }
  void* data() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

// On a GPU as run_settled() where that is asked for.
template <class Plan, class Args>
void run_plan(const char* op, const Plan& plan, const Args& args,
              [[maybe_unused]] bool settled = false) {
#ifdef PARALLAX_OPS_CUDA
  if (plan.device.kind == Device::Kind::kCuda) {
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(plan.device.index));
    const c10::cuda::CUDAGuard guard(device);
    const Workspace workspace(workspace_bytes(plan), device);
    const Stream stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    if constexpr (std::is_same_v<Plan, DecodePlan>) {
      if (settled) return check_status(op, run_settled(plan, args, workspace.data(), stream));
    }
    return check_status(op, run(plan, args, workspace.data(), stream));
  }
#endif
  const Workspace workspace(workspace_bytes(plan), at::kCPU);
  check_status(op, run(plan, args, workspace.data(), cpu_parallel_for()));
}

void require_cpu(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), "parallax::", op, ": this build has no kernel for ",
                              tensor.device(), "; move the tensors to the CPU");
}

// The current stream of a GPU tensor's device.
Stream stream_of([[maybe_unused]] const at::Tensor& like) {
#ifdef PARALLAX_OPS_CUDA
  return c10::cuda::getCurrentCUDAStream(like.get_device()).stream();
#else
  return nullptr;
#endif
}

// Checks call(device, stream) where `like` is on a GPU, call(parallel_for) where it is not.
template <class Call>
void run_on_device(const char* op, const at::Tensor& like, const Call& call) {
#ifdef PARALLAX_OPS_CUDA
  if (like.is_cuda()) {
    const Device device = device_of(op, like);
    const Stream stream = c10::cuda::getCurrentCUDAStream(like.get_device()).stream();
    return check_status(op, call(device, stream));
  }
#endif
  require_cpu(op, like);
  check_status(op, call(cpu_parallel_for()));
}

}  // namespace

Device device_of(const char* op, const at::Tensor& tensor) {
  Device device;
#ifdef PARALLAX_OPS_CUDA
  if (tensor.is_cuda()) {
    check_status(op, query_device(tensor.get_device(), &device));
    return device;
  }
#endif
  require_cpu(op, tensor);
  device.kind = Device::Kind::kCpu;
  device.num_threads = at::get_num_threads();
  return device;
}

ParallelFor cpu_parallel_for() {
  return [](std::int64_t num_tasks, const TaskBody& body) {
    std::atomic<std::int64_t> next{0};
    const std::int64_t workers = std::min<std::int64_t>(num_tasks, at::get_num_threads());
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) {
        for (std::int64_t task = next++; task < num_tasks; task = next++) {
          body(task, static_cast<int>(worker));
        }
      }
    });
  };
}

void run_forward(const char* op, const ForwardPlan& plan, const ForwardArgs& args) {
  run_plan(op, plan, args);
}

void run_backward(const char* op, const BackwardPlan& plan, const BackwardArgs& args) {
  run_plan(op, plan, args);
}

void run_decode(const char* op, const DecodePlan& plan, const DecodeArgs& args, bool settled) {
  run_plan(op, plan, args, settled);
}

void run_schedule(const char* op, const DecodePlan& plan, const Sequences& sequences,
                  void* schedule) {
#ifdef PARALLAX_OPS_CUDA
  const auto index = static_cast<c10::DeviceIndex>(plan.device.index);
  const Stream stream = c10::cuda::getCurrentCUDAStream(index).stream();
#else
  const Stream stream = nullptr;
#endif
  check_status(op, parallax::schedule(plan, sequences, schedule, stream));
}

void run_append_kv(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                   const AppendArgs& args) {
  run_on_device(op, like,
                [&](const auto&... where) { return parallax::append_kv(problem, args, where...); });
}

void run_append_kv_settled(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                           const AppendArgs& args) {
  check_status(op, append_kv_settled(problem, args, device_of(op, like), stream_of(like)));
}

void run_merge(const char* op, const at::Tensor& like, const AttentionProblem& problem,
               const std::vector<StateView>& states, const StateView& merged) {
  run_on_device(op, like, [&](const auto&... where) {
    return merge_states(problem, states.data(), static_cast<int>(states.size()), merged, where...);
  });
}

void run_finalize(const char* op, const at::Tensor& like, const AttentionProblem& problem,
                  const StateView& state, const View& o, float* lse, float* t_bar) {
  run_on_device(op, like, [&](const auto&... where) {
    return finalize_state(problem, state, o, lse, t_bar, where...);
  });
}

void run_few_rows(const char* op, const at::Tensor& like, const FewRowsProblem& problem,
                  const FewRowsArgs& args) {
  check_status(op, few_rows(problem, args, device_of(op, like), stream_of(like)));
}

void run_argmax(const char* op, const at::Tensor& logits, std::uint64_t* words) {
  check_status(op,
               argmax_of_rows(logits.size(0), logits.size(1), logits.const_data_ptr<float>(),
                              logits.stride(0), words, device_of(op, logits), stream_of(logits)));
}

void run_next_tokens(const char* op, const at::Tensor& like, const NextTokensArgs& args) {
  check_status(op, next_tokens(like.size(0), args, device_of(op, like), stream_of(like)));
}

}  // namespace parallax::ops
