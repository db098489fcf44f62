// SPDX-License-Identifier: MIT
#include "ops/device.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

namespace parallax::ops {
namespace {

template <class Plan, class Args>
void run_on_cpu(const char* op, const Plan& plan, const Args& args) {
  const auto bytes = static_cast<std::int64_t>(workspace_bytes(plan));
  const at::Tensor workspace = bytes ? at::empty({bytes}, at::kByte) : at::Tensor();
  check_status(op,
               run(plan, args, bytes ? workspace.mutable_data_ptr() : nullptr, cpu_parallel_for()));
}

}  // namespace

Device device_of(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), "parallax::", op, ": no kernel for ",
                              tensor.device(), " in this build; move the tensors to the CPU");
  Device device;
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
  run_on_cpu(op, plan, args);
}

void run_backward(const char* op, const BackwardPlan& plan, const BackwardArgs& args) {
  run_on_cpu(op, plan, args);
}

void run_decode(const char* op, const DecodePlan& plan, const DecodeArgs& args) {
  run_on_cpu(op, plan, args);
}

}  // namespace parallax::ops
