// SPDX-License-Identifier: MIT
// From a block of a grid to its work: which sequence, head and tile.
#pragma once

#include <cstdint>

#include "cuda/place.h"
#include "parallax/attention.h"

namespace parallax {

// A block's work: one tile of rows of one sequence and head.
struct BlockPlace {
  int b = -1;  // negative: nothing
  int head = 0;
  int tile = 0;
};

// The sequence that holds the n-th tile, counted through the sequences of a packed call in order,
// and its number there. Called by whole warps.
__device__ inline void find_packed_tile(const std::int32_t* cu_seqlens, int batch, int rows, int n,
                                        BlockPlace* place) {
  const int lane = threadIdx.x & 31;
  for (int first = 0; first < batch; first += 32) {
    const int b = first + lane;
    const int own = b < batch ? (cu_seqlens[b + 1] - cu_seqlens[b] + rows - 1) / rows : 0;
    int end = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, end, step);
      if (lane >= step) end += left;
    }
    const unsigned behind = __ballot_sync(0xffffffffu, end > n);
    if (behind != 0) {
      const int winner = __ffs(behind) - 1;
      place->b = first + winner;
      place->tile = n - __shfl_sync(0xffffffffu, end - own, winner);
      return;
    }
    n -= __shfl_sync(0xffffffffu, end, 31);
  }
}

// Blocks run through sections of heads, and inside a section through the tiles, all heads of one
// before the next.
__device__ inline BlockPlace place_block(const AttentionProblem& problem, const TileGrid& grid,
                                         const std::int32_t* cu_seqlens, bool last_first) {
  const int pairs = (problem.packed ? 1 : static_cast<int>(problem.batch)) * grid.num_heads;
  const int first = static_cast<int>(blockIdx.x) / (grid.section * grid.num_tiles) * grid.section;
  const int rest = static_cast<int>(blockIdx.x) - first * grid.num_tiles;
  const int width = min(grid.section, pairs - first);
  const int pair = first + rest % width;
  const int tile = last_first ? grid.num_tiles - 1 - rest / width : rest / width;
  BlockPlace place{pair / grid.num_heads, pair % grid.num_heads, tile};
  if (problem.packed) {
    place.b = -1;
    find_packed_tile(cu_seqlens, static_cast<int>(problem.batch), grid.rows, tile, &place);
  }
  return place;
}

}  // namespace parallax
