// SPDX-License-Identifier: MIT
// plan(): checks the problem, then asks the device's kernels.
#include "cuda/plan.h"

#include "cpu/backward.h"
#include "cpu/checks.h"
#include "cpu/decode.h"
#include "cpu/forward.h"
#include "cpu/reference.h"
#include "parallax/attention.h"

namespace parallax {

Status plan(const AttentionProblem& problem, const Device& device, ForwardPlan* plan) {
  if (Status status = cpu::check_problem(problem, device); !status.ok()) return status;
  if (device.kind == Device::Kind::kCuda) return cuda::plan_forward(problem, device, plan);
  if (problem.dtype != DType::kFloat64) {
    *plan = cpu::plan_forward(problem, device);
  } else {
    *plan = {problem, device, problem.batch * problem.num_q_heads, 0};
  }
  return {};
}

Status plan(const AttentionProblem& problem, const Device& device, BackwardPlan* plan) {
  if (Status status = cpu::check_problem(problem, device); !status.ok()) return status;
  if (device.kind == Device::Kind::kCuda) return cuda::plan_backward(problem, device, plan);
  if (problem.dtype != DType::kFloat64) {
    *plan = cpu::plan_backward(problem, device);
  } else {
    *plan = {problem, device, problem.batch * problem.num_q_heads,
             cpu::reference_backward_workspace_bytes(problem)};
  }
  return {};
}

Status plan(const AttentionProblem& problem, const Device& device, DecodePlan* plan) {
  if (Status status = cpu::check_decode_problem(problem, device); !status.ok()) return status;
  if (device.kind == Device::Kind::kCuda) return cuda::plan_decode(problem, device, plan);
  if (problem.dtype != DType::kFloat64) {
    *plan = cpu::plan_decode(problem, device);
  } else {
    *plan = {problem, device, 1, 0};
  }
  return {};
}

}  // namespace parallax
