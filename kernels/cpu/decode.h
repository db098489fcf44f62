// SPDX-License-Identifier: MIT
// Decode of float32, bf16 and fp16 at the speed of memory. The cache of a sequence is cut into
// splits of a fixed number of tokens (by shape alone, never by threads), a task takes one split of
// a few key/value heads, and the splits' states are merged in order.
#pragma once

#include "cpu/target.h"
#include "parallax/attention.h"

namespace parallax::cpu {

DecodePlan plan_decode(const AttentionProblem& problem, const Device& device);

void decode(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
            const ParallelFor& parallel_for);

// The same on one instruction set. REQUIRES: `target` is one of supported_targets().
void decode(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
            const ParallelFor& parallel_for, const Target& target);

}  // namespace parallax::cpu
