// SPDX-License-Identifier: MIT
// The seam between the public plan() and the CUDA kernels. The problem has been checked against
// attention.h; these add what a device lacks (kUnsupported) and fill the plan.
#pragma once

#include "parallax/attention.h"

namespace parallax::cuda {

Status plan_forward(const AttentionProblem& problem, const Device& device, ForwardPlan* plan);
Status plan_backward(const AttentionProblem& problem, const Device& device, BackwardPlan* plan);
Status plan_decode(const AttentionProblem& problem, const Device& device, DecodePlan* plan);

}  // namespace parallax::cuda
