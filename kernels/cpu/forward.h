// SPDX-License-Identifier: MIT
// The blocked forward of float32, bf16 and fp16 (float arithmetic inside). Arguments have been
// checked (checks.h). One task is a block of up to kBlockRows (query, head of the group) rows of
// one key/value head; every worker brings its own scratch, so memory does not grow with q_len or
// kv_len.
#pragma once

#include <cstddef>

#include "cpu/target.h"
#include "parallax/attention.h"

namespace parallax::cpu {

ForwardPlan plan_forward(const AttentionProblem& problem, const Device& device);

void forward(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
             const ParallelFor& parallel_for);

// The same on one instruction set. REQUIRES: `target` is one of supported_targets().
void forward(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
             const ParallelFor& parallel_for, const Target& target);

}  // namespace parallax::cpu
