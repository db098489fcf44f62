// SPDX-License-Identifier: MIT
// The Hopper forward's producer, one warp: TileInfo -> q and r tile, K and V tiles.
#pragma once

#include "cuda/forward_tile.cuh"
#include "cuda/ptx.cuh"

namespace parallax {

template <int kHeadDim>
struct ForwardProducer {
  using Shared = ForwardShared<kHeadDim>;
  static constexpr ForwardTile kTile = Shared::kTile;

  const ForwardMaps& maps;
  const ForwardParams& params;
  Shared& shared;

  // Read anew where needed: this warp has few registers.
  __device__ __forceinline__ int lane() const { return ptx::thread_index() & 31; }

  // One lane waits, the others follow it: a lane that fell behind could find the phase it waits for
  // gone by, and the next not to come without it.
  __device__ __forceinline__ void wait(std::uint64_t* barrier, unsigned parity) const {
    if (lane() == 0) ptx::barrier_wait(barrier, parity);
    __syncwarp();
  }

  // The n-th q and r tile of the CTA, or an end marker to the consumers where there is none. One
  // box of 64 columns a panel where all rows of the tile exist, otherwise boxes of 8 rows, which
  // stop at the tensor's end.
  __device__ __forceinline__ void load_packed(unsigned n) {
    const TileInfo& info = shared.info[n % kTileInfos];
    const unsigned stage = n % kTile.packed_stages;
    std::uint64_t* full = &shared.packed_full[stage];
    if (n >= kTile.packed_stages) {
      wait(&shared.packed_empty[stage], (n / kTile.packed_stages - 1) & 1);
    }
    if (info.q_begin < 0) {
      if (lane() == 0) ptx::barrier_arrive(full);
      return;
    }
    const int row = info.q_offset + info.q_begin;
    if (params.interleaved && row + kTile.queries() <= params.problem.q_len) {
      if (lane() == 0) {
        ptx::barrier_expect(full, Shared::kPackedBytes);
#pragma unroll
        for (int panel = 0; panel < Shared::kPanels; ++panel) {
          ptx::copy_box(shared.packed[stage] + panel * Shared::kPackedPanel, &maps.q_and_r,
                        {info.head * params.head_columns + 64 * panel, row, 0, 0, info.batch_idx},
                        full);
        }
      }
      return;
    }
    const int slabs = ceil_div(min(info.q_len - info.q_begin, kTile.queries()), 8);
    if (lane() == 0) ptx::barrier_expect(full, slabs * Shared::kPanels * 2048);
    __syncwarp();
#pragma unroll 1
    for (int i = lane(); i < slabs * Shared::kPanels * 2; i += 32) {
      const bool is_r = i & 1;
      const int panel = (i >> 1) % Shared::kPanels;
      const int slab = (i >> 1) / Shared::kPanels;
      const int half = is_r != params.r_first ? 1 : 0;
      ptx::copy_box(
          shared.packed[stage] + panel * Shared::kPackedPanel + (2 * slab + half) * 1024,
          is_r ? &maps.r : &maps.q,
          {64 * panel, info.q_offset + info.q_begin + 8 * slab, info.head, info.batch_idx}, full);
    }
  }

  // K or V of the query tile's key tile number `left`, from 1 on, into its stage. K runs one ahead
  // of V, as the consumers do.
  template <bool kOfValues>
  __device__ __forceinline__ void load_stage(int left, const TileInfo& info) {
    if (params.page_table != nullptr) {
      load_pages<kOfValues>(left, info);
      return;
    }
    if (lane() != 0) return;
    const unsigned fill = info.first_fill + info.tiles.count - left;
    const int key = (info.tiles.first + left - 1) * kTile.keys;
    const unsigned stage = fill % kTile.stages;
    std::uint64_t* full = (kOfValues ? shared.v_full : shared.k_full) + stage;
    std::uint64_t* empty = (kOfValues ? shared.v_empty : shared.k_empty) + stage;
    if (fill >= kTile.stages) ptx::barrier_wait(empty, (fill / kTile.stages - 1) & 1);
    ptx::barrier_expect(full, Shared::kKeyBytes);
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      ptx::copy_box((kOfValues ? shared.v : shared.k)[stage] + panel * Shared::kKeyPanel,
                    kOfValues ? &maps.v : &maps.k,
                    {64 * panel, info.kv_offset + key, info.kv_head, info.batch_idx}, full);
    }
  }

  // The same from pages: a box lies in one page, the lanes take turns. Only boxes that hold a key
  // some query of the sequence sees are read; others need not have a page.
  template <bool kOfValues>
  __device__ __forceinline__ void load_pages(int left, const TileInfo& info) {
    const unsigned fill = info.first_fill + info.tiles.count - left;
    const int key = (info.tiles.first + left - 1) * kTile.keys;
    const unsigned stage = fill % kTile.stages;
    std::uint64_t* full = (kOfValues ? shared.v_full : shared.k_full) + stage;
    if (fill >= kTile.stages) {
      wait((kOfValues ? shared.v_empty : shared.k_empty) + stage, (fill / kTile.stages - 1) & 1);
    }
    const int begin = max(info.keep_from - key, 0) & params.box_mask;
    const int end = min(info.clear_from - key, kTile.keys);
    if (lane() == 0) {
      const int boxes = ceil_div(end - begin, params.page_box);
      ptx::barrier_expect(full, boxes * params.page_box * Shared::kPanels * 128);
    }
    __syncwarp();
#pragma unroll 1
    for (int row = begin + lane() * params.page_box; row < end; row += 32 * params.page_box) {
      const int page = info.pages[(key + row) >> params.page_shift];
      const int slot = (key + row) & params.slot_mask;
#pragma unroll
      for (int panel = 0; panel < Shared::kPanels; ++panel) {
        ptx::copy_box(
            (kOfValues ? shared.v : shared.k)[stage] + panel * Shared::kKeyPanel + row * 128,
            kOfValues ? &maps.v : &maps.k, {64 * panel, slot, info.kv_head, page}, full);
      }
    }
    __syncwarp();
  }

  // The next q and r fit beside the last ones, or where they were: those sit in registers.
  static constexpr bool kEarly = kTile.q_in_registers || kTile.packed_stages > 1;

  // Knows of the n-th query tile; its q and r are on their way where they may come early.
  __device__ __forceinline__ void load_next(unsigned n) {
    wait(&shared.info_full, n & 1);
    if (kEarly || n == 0 || shared.info[n % kTileInfos].q_begin < 0) load_packed(n);
  }

  // The number of the query tile whose keys are being loaded.
  __device__ __forceinline__ unsigned loading() const {
    return *static_cast<volatile unsigned*>(&shared.loading);
  }
  __device__ __forceinline__ void set_loading(unsigned n) const {
    __syncwarp();
    if (lane() == 0) shared.loading = n;
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    set_loading(0);
    load_next(0);
#pragma unroll 1
    while (shared.info[loading() % kTileInfos].q_begin >= 0) {
      const TileInfo& info = shared.info[loading() % kTileInfos];
      int left = info.tiles.count;
      if (left > 0) load_stage<false>(left, info);
      // Otherwise they come when the last ones have met their keys.
      if (!kEarly && loading() > 0) load_packed(loading());
      if (lane() == 0 && left < kTicketLead) ptx::barrier_arrive(&shared.info_wanted);
#pragma unroll 1
      for (; left > 0; --left) {
        if (lane() == 0 && left == kTicketLead) ptx::barrier_arrive(&shared.info_wanted);
        if (left > 1) load_stage<false>(left - 1, info);
        load_stage<true>(left, info);
        if (kEarly && left == min(info.tiles.count, kPackedLead)) load_next(loading() + 1);
      }
      if (!kEarly || info.tiles.count == 0) load_next(loading() + 1);
      set_loading(loading() + 1);
    }
  }
};

}  // namespace parallax
