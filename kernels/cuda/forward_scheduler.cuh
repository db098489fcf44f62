// SPDX-License-Identifier: MIT
// The Hopper forward's scheduler, one thread: tickets -> TileInfo.
#pragma once

#include "cuda/forward_tile.cuh"
#include "cuda/ptx.cuh"

namespace parallax {

template <int kHeadDim>
struct ForwardScheduler {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);

  const ForwardParams& params;
  ForwardShared<kHeadDim>& shared;

  // The ticket's sequence, head and query tile, the latter as info.q_begin. This warp has few
  // registers: what is known goes to shared memory at once, and comes back where it is needed.
  __device__ __forceinline__ int locate(int ticket, TileInfo& info) const {
    const int heads = params.num_heads;
    if (params.first_ticket == nullptr) {
      const TilePlace place =
          place_tile(ticket, params.num_q_tiles, params.num_pairs, params.section);
      const int index = place.pair / heads;
      info.head = place.pair - index * heads;
      info.q_begin = place.q_tile * kTile.queries();
      return index;
    }
    int low = 0;
    int high = params.num_sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      const bool above = params.first_ticket[middle] <= ticket;
      low = above ? middle : low;
      high = above ? high : middle;
    }
    const int index = params.sequence_order[low];
    const Sequence sequence = sequence_at(params.problem, params.sequences, index);
    const int section = section_pairs(params.section_keys, sequence.kv_len, params.group, heads);
    const TilePlace place =
        place_tile(ticket - params.first_ticket[low],
                   ceil_div(sequence.mask.q_len, kTile.queries()), heads, section);
    info.head = place.pair;
    info.q_begin = place.q_tile * kTile.queries();
    return index;
  }

  __device__ __forceinline__ int num_tickets() const {
    return params.first_ticket == nullptr ? params.num_tickets
                                          : params.first_ticket[params.num_sequences];
  }

  __device__ __forceinline__ void run() {
    unsigned fills = 0;
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      // Asked for when a few key tiles of the last are left to load (kTicketLead).
      if (n > 0) ptx::barrier_wait(&shared.info_wanted, (n - 1) & 1);
      TileInfo& info = shared.info[n % kTileInfos];
      const int ticket = atomicAdd(params.next_ticket, 1);
      if (ticket >= num_tickets()) {
        info.q_begin = -1;
        ptx::barrier_arrive(&shared.info_full);
        return;
      }
      const int index = locate(ticket, info);
      asm volatile("" ::: "memory");
      const Sequence sequence = sequence_at(params.problem, params.sequences, index);
      info.batch_idx = static_cast<int>(sequence.batch_idx);
      info.q_offset = static_cast<int>(sequence.q_offset);
      info.kv_offset = static_cast<int>(sequence.kv_offset);
      info.q_len = sequence.mask.q_len;
      info.mask = row_mask(sequence.mask);
      // Beyond the end of a batched tensor the copy engine itself writes zeros.
      const bool ends_tensor = params.first_ticket == nullptr && params.page_table == nullptr &&
                               sequence.mask.kv_end == sequence.kv_len;
      info.clear_from = ends_tensor ? 0x7fffffff : sequence.mask.kv_end;
      asm volatile("" ::: "memory");
      info.keep_from = info.mask.keys(0).begin;
      info.pages = params.page_table + info.batch_idx * params.max_pages;
      info.kv_head = info.head / params.group;
      const int q_end = min(info.q_begin + kTile.queries(), info.q_len);
      info.tiles = key_tiles(info.mask, {info.q_begin, q_end}, kTile.keys);
      info.first_fill = fills;
      fills += info.tiles.count;
#pragma unroll 1
      for (int i = 0; i < kTile.warpgroups; ++i) {
        const int begin = min(info.q_begin + 32 * i, info.q_len - 1);
        const int end = min(info.q_begin + 32 * i + 32, info.q_len);
        const KeyTiles own =
            begin < end ? key_tiles(info.mask, {begin, end}, kTile.keys) : KeyTiles{};
        info.own[i] = {own.first, own.first + own.count};
        info.half[i] = info.mask.keys(end - 1).end <= info.own[i].end * kTile.keys - kTile.keys / 2;
        info.interior[i] = interior_tiles(info.mask, {begin, end}, kTile.keys);
      }
      ptx::barrier_arrive(&shared.info_full);
    }
  }
};

}  // namespace parallax
