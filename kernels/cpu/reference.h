// SPDX-License-Identifier: MIT
// The reference: forward, backward and decode in float64, written straight from docs/math.md, row
// by row with the online state, in memory that grows with the number of rows and never with q_len x
// kv_len. Read it first: the blocked kernels of the narrower dtypes compute the same lines in
// tiles. Arguments have been checked (checks.h). Each task owns the rows it writes, so results do
// not depend on threads.
#pragma once

#include <cstddef>

#include "parallax/attention.h"

namespace parallax::cpu {

void reference_forward(const AttentionProblem& problem, const ForwardArgs& args,
                       const ParallelFor& parallel_for);

void reference_decode(const AttentionProblem& problem, const DecodeArgs& args,
                      const ParallelFor& parallel_for);

// workspace: two statistics for each row (the refined ones of docs/math.md section 7.4).
std::size_t reference_backward_workspace_bytes(const AttentionProblem& problem);
void reference_backward(const AttentionProblem& problem, const BackwardArgs& args, void* workspace,
                        const ParallelFor& parallel_for);

}  // namespace parallax::cpu
