// SPDX-License-Identifier: MIT
// run() on the CPU: checks the arguments, then hands them to the kernels.
#include "cpu/backward.h"
#include "cpu/checks.h"
#include "cpu/decode.h"
#include "cpu/forward.h"
#include "cpu/reference.h"
#include "cpu/widen.h"
#include "parallax/attention.h"

namespace parallax {
namespace {

template <class Plan>
Status check_run(const Plan& plan, const void* workspace, const ParallelFor& parallel_for) {
  if (plan.device.kind != Device::Kind::kCpu) {
    return Status::invalid_argument(
        "plan: made for a CUDA device; run it with the overload that takes a stream");
  }
  if (plan.workspace_bytes > 0 && workspace == nullptr) {
    return Status::invalid_argument("workspace: expected " + std::to_string(plan.workspace_bytes) +
                                    " bytes, got a null pointer");
  }
  if (!parallel_for) {
    return Status::invalid_argument("parallel_for: expected a function, got none");
  }
  return {};
}

}  // namespace

Status run(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
           const ParallelFor& parallel_for) {
  if (Status status = check_run(plan, workspace, parallel_for); !status.ok()) return status;
  if (Status status = cpu::check_arguments(plan.problem, args); !status.ok()) return status;
  if (cpu::widens(plan.problem)) {
    cpu::widen(plan.problem, args, workspace, parallel_for);
    ForwardPlan rest = plan;
    rest.problem = cpu::widened_problem(plan.problem);
    cpu::forward(rest, cpu::widened_args(plan.problem, args, workspace),
                 static_cast<char*>(workspace) + cpu::widened_bytes(plan.problem), parallel_for);
  } else if (plan.problem.dtype != DType::kFloat64) {
    cpu::forward(plan, args, workspace, parallel_for);
  } else {
    cpu::reference_forward(plan.problem, args, parallel_for);
  }
  return {};
}

Status run(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
           const ParallelFor& parallel_for) {
  if (Status status = check_run(plan, workspace, parallel_for); !status.ok()) return status;
  if (Status status = cpu::check_arguments(plan.problem, args); !status.ok()) return status;
  if (plan.problem.dtype != DType::kFloat64) {
    cpu::backward(plan, args, workspace, parallel_for);
  } else {
    cpu::reference_backward(plan.problem, args, workspace, parallel_for);
  }
  return {};
}

Status run(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
           const ParallelFor& parallel_for) {
  if (Status status = check_run(plan, workspace, parallel_for); !status.ok()) return status;
  if (Status status = cpu::check_arguments(plan.problem, args); !status.ok()) return status;
  if (plan.problem.dtype != DType::kFloat64) {
    cpu::decode(plan, args, workspace, parallel_for);
  } else {
    cpu::reference_decode(plan.problem, args, parallel_for);
  }
  return {};
}

}  // namespace parallax
