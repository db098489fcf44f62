// SPDX-License-Identifier: MIT
// The grid of a kernel whose blocks each own one tile of rows of one sequence and head; place.cuh
// finds a block's tile on the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallax/attention.h"

namespace parallax {

struct TileGrid {
  int num_heads = 0;
  int num_tiles = 0;  // of a head; packed, where lengths are on the device, at most
  int section = 1;    // (sequence, head) pairs to work on at once
  int rows = 0;       // of a tile
};

// Tiles of `rows` rows of an entry of the batch; packed, at most as many as all sequences have.
inline std::int64_t num_tiles(const AttentionProblem& problem, std::int64_t len,
                              std::int64_t rows) {
  return problem.packed ? len / rows + problem.batch : (len + rows - 1) / rows;
}

inline std::int64_t num_blocks(const AttentionProblem& problem, const TileGrid& grid) {
  return (problem.packed ? 1 : problem.batch) * std::int64_t{grid.num_heads} * grid.num_tiles;
}

// The grid over tensors of `len` rows and `num_heads` heads, a head streaming `bytes` of the other
// side: a section's streams fill a third of an L2 cache of 50 or 60 MB together, but there are
// blocks in it for half the multiprocessors of a large GPU.
inline TileGrid tile_grid(const AttentionProblem& problem, std::int64_t len, std::int64_t num_heads,
                          int rows, std::int64_t bytes) {
  constexpr std::int64_t kSectionBytes = 16 << 20;
  constexpr std::int64_t kSectionTiles = 64;
  const std::int64_t pairs = (problem.packed ? 1 : problem.batch) * num_heads;
  TileGrid grid;
  grid.num_heads = static_cast<int>(num_heads);
  grid.num_tiles = static_cast<int>(num_tiles(problem, len, rows));
  const std::int64_t wanted =
      std::max(kSectionBytes / std::max<std::int64_t>(bytes, 1),
               (kSectionTiles + grid.num_tiles - 1) / std::max<std::int64_t>(grid.num_tiles, 1));
  grid.section =
      static_cast<int>(std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(pairs, 1)));
  grid.rows = rows;
  return grid;
}

}  // namespace parallax
