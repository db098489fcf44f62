// SPDX-License-Identifier: MIT
// Who decodes which keys, from the lengths on the device: a warp finds where a span begins.
#pragma once

#include "cuda/decode.h"

namespace parallax {

static __device__ __forceinline__ RowMask decode_mask(const AttentionProblem& problem,
                                                      const Sequences& sequences, int b) {
  AttentionProblem batched = problem;
  batched.packed = false;  // never is, and code that starts out cold is better short
  return row_mask(sequence_at(batched, sequences, b).mask);
}

// The same in all lanes. A span that there is none of begins at the line's end and nowhere.
static __device__ __forceinline__ DecodeSpan find_span(const AttentionProblem& problem,
                                                       const Sequences& sequences, int block_keys,
                                                       const DecodeSpans& spans, int units,
                                                       int span) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int batch = static_cast<int>(problem.batch);
  DecodeSpan found = {};
  int least = 1 << 30;
  int most = 0;
  int begin = 0;
  // 32 sequences at a time: first all, for the cut, then up to the one that holds `begin`.
  bool is_cut = false;
  int first = 0;
  int before = 0;  // blocks in the sequences before `first`
  int count, end;
  RowMask mask;
#pragma unroll 1
  while (true) {
    count = 0;
    if (first + lane < batch) {
      mask = decode_mask(problem, sequences, first + lane);
      count = decode_blocks(mask, static_cast<int>(problem.q_len), block_keys).count;
      least = min(least, count);
      most = max(most, count);
      count *= units;
    }
    end = before + __reduce_add_sync(kAll, count);
    if (is_cut && end > begin) break;
    before = end;
    first += 32;
    if (first < batch) continue;
    found.cut = spans.cut(end, __reduce_min_sync(kAll, least), __reduce_max_sync(kAll, most));
    begin = found.cut.begin(span);
    if (begin == end) return found;
    first = before = 0;
    if (batch <= 32) break;
    is_cut = true;
  }
  end = count;
  if (batch > 1) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(kAll, end, step);
      if (lane >= step) end += left;
    }
  }
  const int winner = __ffs(__ballot_sync(kAll, before + end > begin)) - 1;
  count = __shfl_sync(kAll, count, winner);
  found.block = begin - before - __shfl_sync(kAll, end, winner) + count;
  if (units > 1) {
    count = decode_divide(count, units);
    found.unit = decode_divide(found.block, count);
    found.block -= found.unit * count;
  }
  found.sequence = first + winner;
  found.kv_begin = __shfl_sync(kAll, mask.kv_begin, winner);
  found.kv_end = __shfl_sync(kAll, mask.kv_end, winner);
  return found;
}

}  // namespace parallax
