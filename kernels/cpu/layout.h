// SPDX-License-Identifier: MIT
// How the query rows of a call fall into blocks: for both passes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/target.h"
#include "parallax/attention.h"
#include "parallax/mask.h"
#include "parallax/paged_kv.h"

namespace parallax::cpu {

// Blocks of one sequence and one key/value head. Row f of the head is query f / group of head
// kv_head * group + f % group.
struct HeadRows {
  Sequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t group = 1;

  std::int64_t num_rows() const { return sequence.mask.q_len * group; }
  std::int64_t num_blocks() const { return (num_rows() + kBlockRows - 1) / kBlockRows; }
  int query(std::int64_t row) const { return static_cast<int>(row / group); }
  std::int64_t head(std::int64_t row) const { return kv_head * group + row % group; }
};

inline HeadRows head_rows(const AttentionProblem& problem, const Sequences& sequences,
                          std::int64_t batch_idx, std::int64_t kv_head) {
  return {sequence_at(problem, sequences, batch_idx), kv_head,
          problem.num_q_heads / problem.num_kv_heads};
}

// Blocks of all sequences of one key/value head have slots [0, num_block_slots), some of them empty
// in the packed layout, where a sequence's first slot follows from its offset alone.
inline std::int64_t num_block_slots(const AttentionProblem& problem) {
  const std::int64_t rows = problem.q_len * (problem.num_q_heads / problem.num_kv_heads);
  if (problem.packed) return rows / kBlockRows + problem.batch;
  return problem.batch * ((rows + kBlockRows - 1) / kBlockRows);
}

inline std::int64_t first_block_slot(const AttentionProblem& problem, const Sequences& sequences,
                                     std::int64_t batch_idx) {
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  if (problem.packed) return sequences.cu_seqlens_q[batch_idx] * group / kBlockRows + batch_idx;
  return batch_idx * ((problem.q_len * group + kBlockRows - 1) / kBlockRows);
}

struct BlockSlot {
  std::int64_t batch_idx = 0;
  std::int64_t block_idx = 0;  // may lie beyond the sequence's last block
};

inline BlockSlot block_slot(const AttentionProblem& problem, const Sequences& sequences,
                            std::int64_t slot) {
  std::int64_t low = 0, high = problem.batch;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (first_block_slot(problem, sequences, middle) <= slot ? low : high) = middle;
  }
  return {low, slot - first_block_slot(problem, sequences, low)};
}

// Address of a row of q, r, o or their gradients.
template <class Void>
Void* query_row(const BasicView<Void>& view, std::size_t element_bytes, const HeadRows& rows,
                std::int64_t row) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  const std::int64_t offset =
      rows.sequence.q_row(view.batch_stride, view.len_stride, rows.query(row)) +
      rows.head(row) * view.head_stride;
  return static_cast<Byte*>(view.data) + offset * static_cast<std::int64_t>(element_bytes);
}

inline TokenRows token_rows(const ConstView& view, std::size_t element_bytes,
                            const PageTable& pages, const HeadRows& rows) {
  const KvRows kv = kv_rows(view.batch_stride, view.len_stride, pages, rows.sequence);
  const std::int64_t bytes = static_cast<std::int64_t>(element_bytes);
  TokenRows tokens;
  tokens.base =
      static_cast<const char*>(view.data) + (kv.origin + rows.kv_head * view.head_stride) * bytes;
  tokens.row_bytes = kv.len_stride * bytes;
  tokens.table = kv.pages;
  tokens.page_bytes = kv.page_stride * bytes;
  tokens.page_shift = kv.page_shift;
  return tokens;
}

}  // namespace parallax::cpu
