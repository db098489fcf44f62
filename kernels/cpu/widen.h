// SPDX-License-Identifier: MIT
// A forward over an FP8 cache: the tokens that its queries see are first written out in the
// problem's dtype, contiguous, at the head of the workspace; the kernels then meet these. What that
// takes is small beside the products of as many queries as a forward has (docs/kernels.md).
#pragma once

#include <cstddef>

#include "parallax/attention.h"

namespace parallax::cpu {

inline bool widens(const AttentionProblem& problem) {
  return cache_dtype(problem) != problem.dtype;
}

// The problem that is left then.
inline AttentionProblem widened_problem(AttentionProblem problem) {
  problem.kv_dtype.reset();
  return problem;
}

// Workspace for k and v of a problem that widens, else 0; what lies behind it is as aligned.
std::size_t widened_bytes(const AttentionProblem& problem);

// The arguments that are left then, k and v being in `memory`.
ForwardArgs widened_args(const AttentionProblem& problem, const ForwardArgs& args, void* memory);

// Writes k and v of widened_args(): element * scale in float, rounded once.
void widen(const AttentionProblem& problem, const ForwardArgs& args, void* memory,
           const ParallelFor& parallel_for);

}  // namespace parallax::cpu
