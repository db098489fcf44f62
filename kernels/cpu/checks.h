// SPDX-License-Identifier: MIT
// Every precondition of attention.h, checked in one place: shapes by plan() on every device, and
// arguments by run() on the CPU, where lengths and page tables can be read.
#pragma once

#include "parallax/attention.h"

namespace parallax::cpu {

// What a pass asks of a problem, on every device.
Status check_forward_problem(const AttentionProblem& problem, const Device& device);
Status check_backward_problem(const AttentionProblem& problem, const Device& device);
Status check_decode_problem(const AttentionProblem& problem, const Device& device);

// The problem that append_kv reads: num_q_heads where the prologue has queries, what else it does
// not look at in harmless values. And what it asks of its arguments short of reading what they
// point to. For every device.
AttentionProblem append_problem(const AttentionProblem& problem, const AppendArgs& args);
Status check_pointers(const AttentionProblem& problem, const AppendArgs& args);

// Whether both scales are there where the cache is FP8, and only there: pointers alone, for every
// device. The values are the CPU's to check.
Status check_scales_present(const AttentionProblem& problem, const float* k_scale,
                            const float* v_scale);

Status check_arguments(const AttentionProblem& problem, const ForwardArgs& args);
Status check_arguments(const AttentionProblem& problem, const BackwardArgs& args);
Status check_arguments(const AttentionProblem& problem, const DecodeArgs& args);
Status check_arguments(const AttentionProblem& problem, const AppendArgs& args);

// Sizes of a page table, on every device; entries are another matter.
Status check_page_table(const AttentionProblem& problem, const PageTable& pages);

}  // namespace parallax::cpu
