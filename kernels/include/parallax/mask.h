// SPDX-License-Identifier: MIT
// Which keys a query sees, and where a sequence lies in the tensors (docs/math.md section 9).
// Everything is a range: masks are answered by bounds, never by a matrix. Positions within a
// sequence are 32-bit, offsets into tensors 64-bit. Usable in device code.
#pragma once

#include <cstdint>

#include "parallax/attention.h"

namespace parallax {

// [begin, end), empty where end == begin.
struct Range {
  int begin = 0;
  int end = 0;
  PARALLAX_HOST_DEVICE bool empty() const { return end <= begin; }
  PARALLAX_HOST_DEVICE int size() const { return end - begin; }
};

// The mask of one sequence: keys [kv_begin, kv_end), causal aligned to the bottom right, window.
struct Mask {
  int q_len = 0;
  int kv_begin = 0;
  int kv_end = 0;
  bool causal = true;
  std::int64_t window = 0;  // 0: none

  // The keys that one query sees.
  PARALLAX_HOST_DEVICE Range keys(int query) const { return keys({query, query + 1}); }

  // The smallest range that holds every key that some query of a non-empty range sees.
  PARALLAX_HOST_DEVICE Range keys(Range queries) const {
    std::int64_t end = kv_end;
    if (causal) end = end_of(queries.end - 1);
    if (end <= kv_begin) return {kv_begin, kv_begin};
    std::int64_t begin = kv_begin;
    if (window > 0 && end_of(queries.begin) - window > begin) {
      begin = end_of(queries.begin) - window;
    }
    return {static_cast<int>(begin), static_cast<int>(end)};
  }

  // The queries that see some key of the range (they are contiguous).
  PARALLAX_HOST_DEVICE Range queries(Range keys) const {
    const std::int64_t first = keys.begin > kv_begin ? keys.begin : kv_begin;
    const std::int64_t last = (keys.end < kv_end ? keys.end : kv_end) - std::int64_t{1};
    if (first > last) return {0, 0};
    if (!causal) return {0, q_len};
    const std::int64_t shift = std::int64_t{kv_end} - q_len;  // query i's own key is i + shift
    const std::int64_t begin = first > shift ? first - shift : 0;
    std::int64_t end = q_len;
    if (window > 0 && last - shift + window < end) end = last - shift + window;
    if (end <= begin) return {0, 0};
    return {static_cast<int>(begin), static_cast<int>(end)};
  }

  // Whether every query of a non-empty range sees every key of the other: no masking needed.
  PARALLAX_HOST_DEVICE bool covers(Range queries, Range keys) const {
    const Range first = this->keys(queries.begin);
    const Range last = this->keys(queries.end - 1);
    return last.begin <= keys.begin && keys.end <= first.end;
  }

 private:
  // One past the last key that the causal mask lets a query see; may be negative.
  PARALLAX_HOST_DEVICE std::int64_t end_of(int query) const {
    return std::int64_t{kv_end} - q_len + query + 1;
  }
};

// One sequence of a call. Row i of a packed tensor is q_offset + i (keys: kv_offset + j); of a
// batched one, row i of batch entry `batch_idx`, with both offsets 0.
struct Sequence {
  std::int64_t batch_idx = 0;
  std::int64_t q_offset = 0;
  std::int64_t kv_offset = 0;
  int kv_len = 0;  // keys that the tensors hold, visible or not
  Mask mask;

  // Offset in elements of token i's head 0 in q, r, o and their gradients.
  PARALLAX_HOST_DEVICE std::int64_t q_row(std::int64_t batch_stride, std::int64_t len_stride,
                                          int i) const {
    return batch_idx * batch_stride + (q_offset + i) * len_stride;
  }
  // The same for a contiguous k, v and their gradients (paged ones: paged_kv.h).
  PARALLAX_HOST_DEVICE std::int64_t kv_row(std::int64_t batch_stride, std::int64_t len_stride,
                                           std::int64_t j) const {
    return batch_idx * batch_stride + (kv_offset + j) * len_stride;
  }
};

namespace mask_internal {
PARALLAX_HOST_DEVICE inline int clamp(std::int64_t value, std::int64_t high) {
  return static_cast<int>(value < 0 ? 0 : value > high ? high : value);
}
}  // namespace mask_internal

// Sequence b of a call, lengths clamped as attention.h says. Packed: batch_idx is 0, since packed
// views have no batch axis.
PARALLAX_HOST_DEVICE inline Sequence sequence_at(const AttentionProblem& problem,
                                                 const Sequences& sequences, std::int64_t b) {
  Sequence sequence;
  sequence.mask.causal = problem.causal;
  sequence.mask.window = problem.window;
  if (problem.packed) {
    sequence.q_offset = sequences.cu_seqlens_q[b];
    sequence.kv_offset = sequences.cu_seqlens_k[b];
    sequence.mask.q_len = sequences.cu_seqlens_q[b + 1] - sequences.cu_seqlens_q[b];
    sequence.kv_len = sequences.cu_seqlens_k[b + 1] - sequences.cu_seqlens_k[b];
    sequence.mask.kv_end = sequence.kv_len;
    return sequence;
  }
  sequence.batch_idx = b;
  sequence.mask.q_len = static_cast<int>(problem.q_len);
  sequence.kv_len = static_cast<int>(problem.kv_len);
  sequence.mask.kv_end = sequences.kv_lens
                             ? mask_internal::clamp(sequences.kv_lens[b], problem.kv_len)
                             : sequence.kv_len;
  sequence.mask.kv_begin =
      sequences.kv_start ? mask_internal::clamp(sequences.kv_start[b], problem.kv_len) : 0;
  return sequence;
}

// Index of the statistics (lse, t_bar, ...) of query i of head h.
PARALLAX_HOST_DEVICE inline std::int64_t row_index(const AttentionProblem& problem,
                                                   const Sequence& sequence, std::int64_t h,
                                                   int i) {
  return (sequence.batch_idx * problem.num_q_heads + h) * problem.q_len + sequence.q_offset + i;
}

}  // namespace parallax
