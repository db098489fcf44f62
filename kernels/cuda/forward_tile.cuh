// SPDX-License-Identifier: MIT
// What a CTA of the Hopper forward shares: the query tile at hand, q, r, K and V, the barriers.
#pragma once

#include "cuda/forward.h"
#include "cuda/schedule.h"

namespace parallax {

// The next query tile's ticket is drawn when so many key tiles are left to load: late enough that
// no CTA runs dry beside one with a tile in store, early enough to hide the way to the first load.
constexpr int kTicketLead = 6;
// Its q and r are loaded, where there is room, when so many are left.
constexpr int kPackedLead = 3;

constexpr int kMaxWarpgroups = 3;

// What the scheduler tells of a query tile. Rows are rows of the tensors' len axis.
struct TileInfo {
  int q_begin;  // the tile's first query in its sequence; negative: no more tiles
  int q_len;
  RowMask mask;
  KeyTiles tiles;
  unsigned first_fill;  // key tiles of the CTA before this query tile
  int keep_from;        // V rows below this and
  int clear_from;       // from this on may hold anything: cleared before use
  int head;
  int kv_head;
  int batch_idx;
  int q_offset;
  int kv_offset;
  const std::int32_t* pages;       // of the sequence, null where contiguous
  Range own[kMaxWarpgroups];       // key tiles that some query of the warpgroup sees,
  Range interior[kMaxWarpgroups];  // and that need no mask
  bool half[kMaxWarpgroups];       // of its last key tile, all that it sees lies in the first half
};
// While consumers store tile n, the scheduler may be at n + 3.
constexpr int kTileInfos = 4;

template <int kHeadDim>
struct alignas(1024) ForwardShared {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);
  static constexpr int kPanels = kHeadDim / 64;                     // of 64 columns, 128 bytes
  static constexpr int kPackedPanel = kTile.warpgroups * 64 * 128;  // bytes
  static constexpr int kKeyPanel = kTile.keys * 128;
  static constexpr int kPackedBytes = kPanels * kPackedPanel;
  static constexpr int kKeyBytes = kPanels * kKeyPanel;

  std::uint8_t packed[kTile.packed_stages]
                     [kPackedBytes];  // a panel: for each warpgroup, 8 rows of q, 8 of r, ...
  std::uint8_t k[kTile.stages][kKeyBytes];
  std::uint8_t v[kTile.stages][kKeyBytes];
  std::uint64_t packed_full[kTile.packed_stages], packed_empty[kTile.packed_stages];
  std::uint64_t k_full[kTile.stages], k_empty[kTile.stages];
  std::uint64_t v_full[kTile.stages], v_empty[kTile.stages];
  std::uint64_t info_full, info_wanted;
  TileInfo info[kTileInfos];
  float scratch;     // of ptx::pin
  unsigned loading;  // the producer's query tile, here because its warp has few registers
};

}  // namespace parallax
