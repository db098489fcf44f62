// SPDX-License-Identifier: MIT
// Who decodes which keys, from the lengths on the device: one block, once a step.
#include "cuda/decode.h"
#include "cuda/early_launch.cuh"
#include "cuda/launch.h"
#include "cuda/schedule.h"

namespace parallax {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// The sum of `value` over the threads before and including this one. All threads call it.
__device__ int inclusive_sum(int value) {
  __shared__ int sums[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += left;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  int before = lane < warp ? sums[lane] : 0;
  for (int step = 1; step < 32; step *= 2) before += __shfl_xor_sync(0xffffffffu, before, step);
  __syncthreads();
  return value + before;
}

__global__ void __launch_bounds__(kThreads)
    decode_schedule_kernel(const AttentionProblem problem, const Sequences sequences,
                           int block_keys, int max_spans, int width, int units, bool align,
                           const DecodeSchedule schedule) {
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  const int thread = threadIdx.x;
  const int batch = static_cast<int>(problem.batch);
  const int q_len = static_cast<int>(problem.q_len);
  __shared__ int run_total;
  const auto blocks_of = [&](int b) {
    return decode_blocks(row_mask(sequence_at(problem, sequences, b).mask), q_len, block_keys)
        .count;
  };
  // Small batches need no way through memory.
  __shared__ int first_block_here[kThreads + 1];
  int* first_block = batch <= kThreads ? first_block_here : schedule.first_block;
  const int count_of_first = blocks_of(0);
  bool are_equal = true;
  int before = 0;
  for (int run = 0; run < batch; run += kThreads) {
    const int b = run + thread;
    const int count = b < batch ? blocks_of(b) : 0;
    are_equal = are_equal && (b >= batch || count == count_of_first);
    const int end = before + inclusive_sum(count);
    if (b < batch) first_block[b + 1] = end;
    if (thread == kThreads - 1) run_total = end;
    __syncthreads();
    before = run_total;
  }
  if (thread == 0) first_block[0] = 0;
  const std::int64_t total = static_cast<std::int64_t>(before) * units;
  are_equal = __syncthreads_and(are_equal);
  __shared__ int aligned_spans;
  if (thread == 0) aligned_spans = 0;
  __syncthreads();
  // Memory is the bound, so what counts is that all spans end together, not how many there are. Of
  // equal items, up to a quarter less spans are taken where that makes whole items a span, or whole
  // spans an item.
  if (align && are_equal && 4 * thread <= max_spans && thread < max_spans) {
    const std::int64_t length = decode_divide(total, max_spans - thread);
    if (length > 0 && length * (max_spans - thread) == total &&
        (length % count_of_first == 0 || count_of_first % length == 0)) {
      atomicMax(&aligned_spans, max_spans - thread);
    }
  }
  __syncthreads();
  // Otherwise as many as there may be; short ones no more than keep all as short.
  const std::int64_t longest = (total + max_spans - 1) / max_spans;
  const int spans =
      aligned_spans > 0 ? aligned_spans : static_cast<int>((total + longest - 1) / longest);
  for (int i = thread; i < max_spans * width; i += kThreads) schedule.counters[i] = 0;
  for (int i = spans + thread; i < max_spans; i += kThreads) schedule.spans[i].num_blocks = 0;
  for (int i = thread; i < spans; i += kThreads) {
    const std::int64_t begin = decode_span_begin(total, spans, i);
    const std::int64_t end = decode_span_begin(total, spans, i + 1);
    // The last sequence that begins at or before `block`; every sequence has a block.
    const auto sequence_of = [&](std::int64_t block) {
      int low = 0;
      int high = batch;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (first_block[middle] * std::int64_t{units} <= block ? low : high) = middle;
      }
      return low;
    };
    // Of the item that holds `block`.
    struct Item {
      int sequence, unit, block, count;
    };
    const auto item_of = [&](std::int64_t block) {
      Item item;
      item.sequence = sequence_of(block);
      const int first = first_block[item.sequence];
      item.count = first_block[item.sequence + 1] - first;
      const std::int64_t rest = block - first * std::int64_t{units};
      item.unit = static_cast<int>(decode_divide(rest, item.count));
      item.block = static_cast<int>(rest - item.unit * std::int64_t{item.count});
      return item;
    };
    const Item first = item_of(begin);
    const Item last = item_of(end - 1);
    const Mask mask = sequence_at(problem, sequences, first.sequence).mask;
    const std::int64_t item_begin = begin - first.block;
    const int first_span = decode_span_of(total, spans, item_begin);
    DecodeSpan span;
    span.sequence = first.sequence;
    span.unit = first.unit;
    span.block = first.block;
    span.num_blocks = static_cast<int>(end - begin);
    span.kv_begin = mask.kv_begin;
    span.kv_end = mask.kv_end;
    span.first_slot =
        2 * first_span + (decode_span_begin(total, spans, first_span) < item_begin ? 1 : 0);
    span.last_span = decode_span_of(total, spans, end - 1 - last.block + last.count - 1);
    schedule.spans[i] = span;
  }
}

}  // namespace

Status launch_decode_schedule(const AttentionProblem& problem, const Sequences& sequences,
                              int block_keys, int max_spans, int width, int units, bool align,
                              const DecodeSchedule& schedule, cudaStream_t stream) {
  return check_cuda(launch_early(decode_schedule_kernel, 1, kThreads, 0, stream, problem, sequences,
                                 block_keys, max_spans, width, units, align, schedule),
                    "decode: making the schedule");
}

}  // namespace parallax
