// SPDX-License-Identifier: MIT
#include "cpu/backward.h"

#include <algorithm>
#include <cstring>

#include "cpu/layout.h"

namespace parallax::cpu {
namespace {

// Where things lie in the workspace, in floats, and how the work is cut.
struct BackwardLayout {
  std::int64_t stride = 0;
  std::int64_t units = 0;       // (key/value head, sequence) pairs
  std::int64_t num_chunks = 1;  // of the blocks and of the tiles of a unit
  std::int64_t scratch = 0;     // of one worker
  std::int64_t sums = 0;        // of one block
  std::int64_t head_tiles = 0;  // of all sequences of a head, or of the longest sequence
  bool tiles_by_worker = false;
  std::int64_t tiles_begin = 0, sums_begin = 0, total = 0;
};

// One task per unit where that leaves less than a tenth of the threads' time idle, otherwise enough
// chunks that the ramps of the diagonals cost little.
std::int64_t choose_chunks(std::int64_t units, std::int64_t threads, std::int64_t blocks) {
  const std::int64_t rounds = (units + threads - 1) / threads;
  if (units * 10 >= rounds * threads * 9) return 1;
  return std::clamp<std::int64_t>((4 * threads + units - 1) / units, 1, blocks);
}

BackwardLayout make_layout(const AttentionProblem& problem, const Device& device) {
  const std::int64_t threads = std::max(device.num_threads, 1);
  BackwardLayout layout;
  layout.stride = row_stride(problem.head_dim);
  layout.units = problem.batch * problem.num_kv_heads;
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const std::int64_t blocks = (problem.q_len * group + kBlockRows - 1) / kBlockRows;
  layout.num_chunks = choose_chunks(std::max<std::int64_t>(layout.units, 1), threads,
                                    std::max<std::int64_t>(blocks, 1));
  layout.sums = 2 * kBlockRows * (layout.stride + 1);
  layout.scratch = static_cast<std::int64_t>(backward_scratch(problem.head_dim)) + layout.sums;

  const std::int64_t slots = problem.packed ? problem.num_kv_heads : layout.units;
  layout.tiles_by_worker = layout.num_chunks == 1 && threads < slots;
  const std::int64_t tiles = (problem.kv_len + kBlockKeys - 1) / kBlockKeys;
  if (problem.packed) {
    layout.head_tiles = problem.kv_len / kBlockKeys + problem.batch;
  } else {
    layout.head_tiles = layout.tiles_by_worker ? tiles : problem.batch * tiles;
  }
  const std::int64_t tile_floats = 2 * kBlockKeys * layout.stride;
  layout.tiles_begin = threads * layout.scratch;
  layout.sums_begin =
      layout.tiles_begin +
      tile_floats * layout.head_tiles * (layout.tiles_by_worker ? threads : problem.num_kv_heads);
  layout.total = layout.sums_begin;
  if (layout.num_chunks > 1) {
    layout.total += problem.num_kv_heads * num_block_slots(problem) * layout.sums;
  }
  return layout;
}

class Backward {
 public:
  Backward(const BackwardPlan& plan, const BackwardArgs& args, float* workspace,
           const Target& target)
      : problem_(plan.problem),
        args_(args),
        workspace_(workspace),
        target_(target),
        layout_(make_layout(plan.problem, plan.device)),
        bytes_(element_bytes(plan.problem.dtype)) {}

  void run(const ParallelFor& parallel_for) const {
    if (layout_.units == 0) return;
    const std::int64_t chunks = layout_.num_chunks;
    // Along these diagonals a key chunk meets query chunks in ascending order and a query chunk
    // key chunks in descending order, as in the single task of an uncut unit.
    for (std::int64_t diagonal = 1 - chunks; diagonal < chunks; ++diagonal) {
      const std::int64_t first = std::max<std::int64_t>(diagonal, 0);
      const std::int64_t count = chunks - std::abs(diagonal);
      parallel_for(layout_.units * count, [&](std::int64_t task, int worker) {
        const std::int64_t query_chunk = first + task % count;
        run_task(task / count, query_chunk, query_chunk - diagonal, worker);
      });
    }
  }

 private:
  struct Chunk {
    std::int64_t begin, end;
  };
  Chunk chunk(std::int64_t idx, std::int64_t size) const {
    return {idx * size / layout_.num_chunks, (idx + 1) * size / layout_.num_chunks};
  }

  void run_task(std::int64_t unit, std::int64_t query_chunk, std::int64_t key_chunk,
                int worker) const {
    const std::int64_t kv_head = unit / problem_.batch, batch_idx = unit % problem_.batch;
    const HeadRows rows = head_rows(problem_, args_.sequences, batch_idx, kv_head);
    const std::int64_t num_tiles = (rows.sequence.kv_len + kBlockKeys - 1) / kBlockKeys;
    const Chunk tiles = chunk(key_chunk, num_tiles);
    const Chunk blocks = chunk(query_chunk, rows.num_blocks());
    float* dk = key_sums(rows, kv_head, batch_idx, worker);
    float* dv = dk + num_tiles * kBlockKeys * layout_.stride;
    const std::int64_t tile_floats = kBlockKeys * layout_.stride;
    if (query_chunk == 0) {
      const std::size_t size = (tiles.end - tiles.begin) * tile_floats * sizeof(float);
      std::memset(dk + tiles.begin * tile_floats, 0, size);
      std::memset(dv + tiles.begin * tile_floats, 0, size);
    }
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
      run_block(rows, block, tiles, key_chunk, num_tiles, dk, dv, batch_idx, worker);
    }
    if (query_chunk == layout_.num_chunks - 1) {
      const std::int64_t end = std::min<std::int64_t>(tiles.end * kBlockKeys, rows.sequence.kv_len);
      for (std::int64_t j = tiles.begin * kBlockKeys; j < end; ++j) {
        write_key(args_.dk, rows, j, dk + j * layout_.stride);
        write_key(args_.dv, rows, j, dv + j * layout_.stride);
      }
    }
  }

  void run_block(const HeadRows& rows, std::int64_t block_idx, Chunk tiles, std::int64_t key_chunk,
                 std::int64_t num_tiles, float* dk, float* dv, std::int64_t batch_idx,
                 int worker) const {
    BackwardBlock block;
    fill_block(rows, block_idx * kBlockRows, &block);
    std::int64_t lowest = num_tiles, highest = 0;
    for (int i = 0; i < block.rows; ++i) {
      if (block.lo[i] >= block.hi[i]) continue;
      lowest = std::min<std::int64_t>(lowest, block.lo[i] / kBlockKeys);
      highest = std::max<std::int64_t>(highest, (block.hi[i] - 1) / kBlockKeys);
    }
    lowest = std::min(lowest, highest);
    block.tile_begin = static_cast<std::int32_t>(std::max(tiles.begin, lowest));
    block.tile_end = static_cast<std::int32_t>(std::min(tiles.end, highest + 1));
    // A block that sees nothing still has zeros to write, with the first key chunk.
    const bool empty = num_tiles == 0;
    if (empty ? key_chunk != 0 : block.tile_begin >= block.tile_end) return;
    block.first = empty || block.tile_end == highest + 1;
    block.last = empty || block.tile_begin == lowest;
    block.dk = dk;
    block.dv = dv;
    float* scratch = workspace_ + worker * layout_.scratch;
    float* sums = scratch + layout_.scratch - layout_.sums;
    if (layout_.num_chunks > 1) {
      const std::int64_t slot = first_block_slot(problem_, args_.sequences, batch_idx) + block_idx;
      sums = workspace_ + layout_.sums_begin +
             (rows.kv_head * num_block_slots(problem_) + slot) * layout_.sums;
    }
    block.sums.dq = sums;
    block.sums.dr = sums + kBlockRows * layout_.stride;
    block.sums.sum_ds = sums + 2 * kBlockRows * layout_.stride;
    block.sums.sum_e = block.sums.sum_ds + kBlockRows;
    target_.backward(block, scratch);
  }

  void fill_block(const HeadRows& rows, std::int64_t first_row, BackwardBlock* block) const {
    block->dtype = problem_.dtype;
    block->head_dim = static_cast<int>(problem_.head_dim);
    block->scale = static_cast<float>(problem_.scale);
    block->rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, rows.num_rows() - first_row));
    block->k = token_rows(args_.k, bytes_, {}, rows);
    block->v = token_rows(args_.v, bytes_, {}, rows);
    for (int i = 0; i < block->rows; ++i) {
      const std::int64_t row = first_row + i;
      const Range keys = rows.sequence.mask.keys(rows.query(row));
      block->lo[i] = keys.empty() ? 0 : keys.begin;
      block->hi[i] = keys.empty() ? 0 : keys.end;
      block->q[i] = query_row(args_.q, bytes_, rows, row);
      block->r[i] = query_row(args_.r, bytes_, rows, row);
      block->o[i] = query_row(args_.o, bytes_, rows, row);
      block->v_bar[i] = query_row(args_.v_bar, bytes_, rows, row);
      block->d_o[i] = query_row(args_.d_o, bytes_, rows, row);
      block->dq[i] = query_row(args_.dq, bytes_, rows, row);
      block->dr[i] = query_row(args_.dr, bytes_, rows, row);
      const std::int64_t idx = row_index(problem_, rows.sequence, rows.head(row), rows.query(row));
      block->lse[i] = static_cast<const float*>(args_.lse)[idx];
      block->t_bar[i] = static_cast<const float*>(args_.t_bar)[idx];
    }
  }

  // dk, then dv, of the tiles of one unit.
  float* key_sums(const HeadRows& rows, std::int64_t kv_head, std::int64_t batch_idx,
                  int worker) const {
    const std::int64_t tile_floats = 2 * kBlockKeys * layout_.stride;
    float* tiles = workspace_ + layout_.tiles_begin;
    if (layout_.tiles_by_worker) return tiles + worker * layout_.head_tiles * tile_floats;
    std::int64_t tile = kv_head * layout_.head_tiles;
    tile += problem_.packed ? rows.sequence.kv_offset / kBlockKeys + batch_idx
                            : batch_idx * (layout_.head_tiles / problem_.batch);
    return tiles + tile * tile_floats;
  }

  void write_key(const View& view, const HeadRows& rows, std::int64_t j, const float* from) const {
    const std::int64_t offset = rows.sequence.kv_row(view.batch_stride, view.len_stride, j) +
                                rows.kv_head * view.head_stride;
    target_.write_row(problem_.dtype, from, static_cast<int>(problem_.head_dim),
                      static_cast<char*>(view.data) + offset * static_cast<std::int64_t>(bytes_));
  }

  const AttentionProblem& problem_;
  const BackwardArgs& args_;
  float* workspace_;
  const Target& target_;
  BackwardLayout layout_;
  std::size_t bytes_;
};

}  // namespace

BackwardPlan plan_backward(const AttentionProblem& problem, const Device& device) {
  const BackwardLayout layout = make_layout(problem, device);
  return {problem, device, layout.units * layout.num_chunks * layout.num_chunks,
          static_cast<std::size_t>(layout.total) * sizeof(float)};
}

void backward(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
              const ParallelFor& parallel_for) {
  backward(plan, args, workspace, parallel_for, *supported_targets().list[0]);
}

void backward(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
              const ParallelFor& parallel_for, const Target& target) {
  Backward(plan, args, static_cast<float*>(workspace), target).run(parallel_for);
}

}  // namespace parallax::cpu
