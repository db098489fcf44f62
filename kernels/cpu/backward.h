// SPDX-License-Identifier: MIT
// The blocked backward of float32, bf16 and fp16 (float arithmetic inside). Arguments have been
// checked (checks.h). Every product is computed once; dk and dv need no atomics and no partial
// copies: where one task per (sequence, key/value head) keeps the threads busy, it does all of it,
// and otherwise blocks and tiles are cut into chunks that meet along diagonals, one parallel_for
// each, so that no two tasks of a diagonal share a query chunk or a key chunk. Either way each sum
// is taken in the same order, so results do not depend on the number of threads.
#pragma once

#include <cstddef>

#include "cpu/target.h"
#include "parallax/attention.h"

namespace parallax::cpu {

// The workspace grows as num_threads + the smaller of (num_threads, batch x num_kv_heads) x kv_len
// x head_dim; with chunks also as q_len x num_q_heads x head_dim.
BackwardPlan plan_backward(const AttentionProblem& problem, const Device& device);

void backward(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
              const ParallelFor& parallel_for);

// The same on one instruction set. REQUIRES: `target` is one of supported_targets().
void backward(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
              const ParallelFor& parallel_for, const Target& target);

}  // namespace parallax::cpu
