// SPDX-License-Identifier: MIT
// Every precondition of attention.h, checked in one place: shapes by plan() on every device, and
// arguments by run() on the CPU, where lengths and page tables can be read.
#pragma once

#include "parallax/attention.h"

namespace parallax::cpu {

// What all passes ask of a problem, on every device.
Status check_problem(const AttentionProblem& problem, const Device& device);
Status check_decode_problem(const AttentionProblem& problem, const Device& device);

// Whether both scales are there where the cache is FP8, and only there: pointers alone, for every
// device. The values are the CPU's to check.
Status check_scales_present(const AttentionProblem& problem, const float* k_scale,
                            const float* v_scale);

Status check_arguments(const AttentionProblem& problem, const ForwardArgs& args);
Status check_arguments(const AttentionProblem& problem, const BackwardArgs& args);
Status check_arguments(const AttentionProblem& problem, const DecodeArgs& args);
Status check_arguments(const AttentionProblem& problem, const AppendArgs& args);

}  // namespace parallax::cpu
