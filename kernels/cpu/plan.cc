// SPDX-License-Identifier: MIT
// plan(): checks the problem, then asks the device's kernels.
#include "cuda/plan.h"

#include "cpu/backward.h"
#include "cpu/checks.h"
#include "cpu/decode.h"
#include "cpu/forward.h"
#include "cpu/reference.h"
#include "cpu/widen.h"
#include "parallax/attention.h"

namespace parallax {
namespace {

// The plan of what is left once the cache has been widened, with room for that.
Status plan_widened(const AttentionProblem& problem, const Device& device, ForwardPlan* plan) {
  ForwardPlan result;
  Status status = parallax::plan(cpu::widened_problem(problem), device, &result);
  if (!status.ok()) return status;
  result.problem = problem;
  result.workspace_bytes += cpu::widened_bytes(problem);
  *plan = result;
  return {};
}

}  // namespace

Status plan(const AttentionProblem& problem, const Device& device, ForwardPlan* plan) {
  if (Status status = cpu::check_forward_problem(problem, device); !status.ok()) return status;
  if (cpu::widens(problem)) return plan_widened(problem, device, plan);
  if (device.kind == Device::Kind::kCuda) return cuda::plan_forward(problem, device, plan);
  if (problem.dtype != DType::kFloat64) {
    *plan = cpu::plan_forward(problem, device);
  } else {
    *plan = {problem, device, problem.batch * problem.num_q_heads, 0};
  }
  return {};
}

Status plan(const AttentionProblem& problem, const Device& device, BackwardPlan* plan) {
  if (Status status = cpu::check_backward_problem(problem, device); !status.ok()) return status;
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
