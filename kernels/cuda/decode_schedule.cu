// SPDX-License-Identifier: MIT
// The spans of a step, found once for all its layers.
#include "cuda/decode_schedule.cuh"
#include "cuda/early_launch.cuh"
#include "cuda/launch.h"

namespace parallax {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    decode_schedule_kernel(const AttentionProblem problem, const Sequences sequences,
                           int block_keys, const DecodeSpans spans, int units,
                           DecodeSpan* schedule) {
  wait_for_last_kernel();
  const int span = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (span >= spans.max_spans) return;
  const DecodeSpan found = find_span(problem, sequences, block_keys, spans, units, span);
  if (threadIdx.x % 32 == 0) schedule[span] = found;
}

}  // namespace

Status launch_decode_schedule(bool early, const AttentionProblem& problem,
                              const Sequences& sequences, int block_keys, DecodeSpans spans,
                              int units, DecodeSpan* schedule, cudaStream_t stream) {
  const int blocks = ceil_div(32 * spans.max_spans, kThreads);
  return check_cuda(launch_kernel(early, decode_schedule_kernel, blocks, kThreads, 0, stream,
                                  problem, sequences, block_keys, spans, units, schedule),
                    "decode: making the schedule");
}

}  // namespace parallax
