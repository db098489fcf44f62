// SPDX-License-Identifier: MIT
#include "cpu/forward.h"

#include <algorithm>

#include "cpu/layout.h"

namespace parallax::cpu {
namespace {

std::size_t scratch_bytes(const AttentionProblem& problem) {
  return (forward_scratch(problem.head_dim) * sizeof(float) + 63) / 64 * 64;
}

void fill_block(const AttentionProblem& problem, const ForwardArgs& args, const HeadRows& rows,
                std::int64_t first_row, ForwardBlock* block) {
  const std::size_t bytes = element_bytes(problem.dtype);
  block->dtype = problem.dtype;
  block->head_dim = static_cast<int>(problem.head_dim);
  block->scale = static_cast<float>(problem.scale);
  block->rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, rows.num_rows() - first_row));
  block->k = token_rows(args.k, bytes, args.pages, rows);
  block->v = token_rows(args.v, bytes, args.pages, rows);
  block->v_bar[0] = nullptr;
  block->lse[0] = block->t_bar[0] = nullptr;
  for (int i = 0; i < block->rows; ++i) {
    const std::int64_t row = first_row + i;
    const Range keys = rows.sequence.mask.keys(rows.query(row));
    block->lo[i] = keys.empty() ? 0 : keys.begin;
    block->hi[i] = keys.empty() ? 0 : keys.end;
    block->q[i] = query_row(args.q, bytes, rows, row);
    block->r[i] = query_row(args.r, bytes, rows, row);
    block->o[i] = query_row(args.o, bytes, rows, row);
    if (args.v_bar.data) block->v_bar[i] = query_row(args.v_bar, bytes, rows, row);
    const std::int64_t idx = row_index(problem, rows.sequence, rows.head(row), rows.query(row));
    if (args.lse) block->lse[i] = static_cast<float*>(args.lse) + idx;
    if (args.t_bar) block->t_bar[i] = static_cast<float*>(args.t_bar) + idx;
  }
}

}  // namespace

ForwardPlan plan_forward(const AttentionProblem& problem, const Device& device) {
  const int threads = std::max(device.num_threads, 1);
  return {problem, device, problem.num_kv_heads * num_block_slots(problem),
          scratch_bytes(problem) * static_cast<std::size_t>(threads)};
}

void forward(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
             const ParallelFor& parallel_for) {
  forward(plan, args, workspace, parallel_for, *supported_targets().list[0]);
}

void forward(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
             const ParallelFor& parallel_for, const Target& target) {
  const AttentionProblem& problem = plan.problem;
  const std::int64_t slots = num_block_slots(problem);
  const std::size_t bytes = scratch_bytes(problem);
  const auto body = [&](std::int64_t task, int worker) {
    const BlockSlot slot = block_slot(problem, args.sequences, task % slots);
    const HeadRows rows = head_rows(problem, args.sequences, slot.batch_idx, task / slots);
    const std::int64_t blocks = rows.num_blocks();
    if (slot.block_idx >= blocks) return;
    // Last and first blocks in turns: with a causal mask they cost the most and the least, and
    // neither a static nor a dynamic schedule is left with a heavy end.
    const std::int64_t turn = slot.block_idx;
    const std::int64_t block_idx = turn % 2 == 0 ? blocks - 1 - turn / 2 : turn / 2;
    ForwardBlock block;
    fill_block(problem, args, rows, block_idx * kBlockRows, &block);
    target.forward(block, reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes * worker));
  };
  if (plan.num_tasks > 0) parallel_for(plan.num_tasks, body);
}

}  // namespace parallax::cpu
