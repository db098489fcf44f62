// SPDX-License-Identifier: MIT
// A consumer warpgroup of the Hopper forward: 32 queries, q and r, against all keys they see.
#pragma once

#include "cuda/forward_tile.cuh"
#include "cuda/mma.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/wgmma.cuh"

namespace parallax {

template <class T, int kHeadDim>
struct ForwardConsumer {
  using Shared = ForwardShared<kHeadDim>;
  static constexpr ForwardTile kTile = Shared::kTile;
  static constexpr int kKeys = kTile.keys;
  static constexpr bool kPinned = kHeadDim == 128;  // p and w are made before the wait for V
  static constexpr bool kHalves = kKeys == 128;     // a row's last tile may be half a tile
  static constexpr int kHalf = kHalves ? kKeys / 2 : kKeys;

  const ForwardParams& params;
  Shared& shared;
  int warpgroup;
  bool leads;               // one lane of the warp
  unsigned used = 0;        // K and V tiles consumed so far
  unsigned query_tile = 0;  // query tiles finished so far
  bool keys_ready = false;  // of the next step, asked for in time

  float s[kKeys / 2];  // logits and probes of a key tile, then p and w
  std::uint32_t p[kKeys / 4];
  float o[kHeadDim / 2];
  std::uint32_t a[kTile.q_in_registers ? kHeadDim / 4 : 1];
  PackedRow<T, kKeys> row;

  // -- turns: with ping-pong, a warpgroup's softmax runs under the other's products

  __device__ __forceinline__ int turn_barrier(int of) const { return 1 + of; }
  __device__ __forceinline__ void first_credit() const {
    if constexpr (kTile.ping_pong) {
      if (warpgroup == kTile.warpgroups - 1) ptx::named_arrive(turn_barrier(0), 256);
    }
  }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (kTile.ping_pong) ptx::named_sync(turn_barrier(warpgroup), 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kTile.ping_pong) {
      const int next = warpgroup + 1 == kTile.warpgroups ? 0 : warpgroup + 1;
      ptx::named_arrive(turn_barrier(next), 256);
    }
  }
  __device__ __forceinline__ void last_credit() const {
    if constexpr (kTile.ping_pong) {
      if (warpgroup == 0) ptx::named_sync(turn_barrier(0), 256);
    }
  }

  __device__ __forceinline__ void release(std::uint64_t* barrier) const {
    if (leads) ptx::barrier_arrive(barrier);
  }

  __device__ __forceinline__ unsigned packed_stage() const {
    return query_tile % kTile.packed_stages;
  }

  // The next q and r may be loaded: these sit in registers, or have met their last key.
  __device__ __forceinline__ void release_packed() const {
    __syncwarp();
    release(&shared.packed_empty[packed_stage()]);
  }

  // -- products

  // The k-th 16 columns of the warp's q and r as a register operand.
  __device__ __forceinline__ void load_fragment(std::uint32_t (&fragment)[4], int k) const {
    const int thread = ptx::thread_index();
    const int lane = thread & 31;
    const int flip = params.r_first ? 8 : 0;
    const int row = (thread >> 1 & 48) + ((lane & 15) ^ flip);
    const int chunk = (2 * (k & 3) + (lane >> 4)) ^ (row & 7);
    ptx::load_matrices(fragment, ptx::shared_address(shared.packed[packed_stage()]) +
                                     (k >> 2) * Shared::kPackedPanel + warpgroup * 8192 +
                                     row * 128 + chunk * 16);
  }

  __device__ __forceinline__ void load_operand() {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      std::uint32_t fragment[4];
      load_fragment(fragment, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * k + i] = fragment[i];
    }
  }

  __device__ __forceinline__ void multiply_keys(unsigned stage) {
    const std::uint32_t keys =
        wgmma::descriptor(ptx::shared_address(shared.k[0])) + stage * (Shared::kKeyBytes >> 4);
    const std::uint32_t rows =
        wgmma::descriptor(ptx::shared_address(shared.packed[0]) + warpgroup * 8192) +
        packed_stage() * (Shared::kPackedBytes >> 4);
    wgmma::forget(s);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int key_step = ((k >> 2) * Shared::kKeyPanel + (k & 3) * 32) >> 4;
      const int row_step = ((k >> 2) * Shared::kPackedPanel + (k & 3) * 32) >> 4;
      if constexpr (kTile.q_in_registers) {
        wgmma::Products<T, kKeys>::register_a(s, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                              keys + key_step, k != 0);
      } else {
        wgmma::Products<T, kKeys>::shared_a(s, rows + row_step, keys + key_step, k != 0);
      }
    }
  }

  // s once more, by this warp alone.
  __device__ __forceinline__ void repeat_keys(unsigned stage) {
    const int lane = ptx::thread_index() & 31;
    const int row = (lane & 7) + (lane >> 4 << 3);
    const std::uint32_t keys = ptx::shared_address(shared.k[stage]) + row * 128;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = (2 * (k & 3) + (lane >> 3 & 1)) ^ (row & 7);
      std::uint32_t rows[4];
      if constexpr (kTile.q_in_registers) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = a[4 * k + i];
      } else {
        load_fragment(rows, k);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        std::uint32_t pair[4];
        ptx::load_matrices(pair, keys + (k >> 2) * Shared::kKeyPanel + n * 2048 + chunk * 16);
        mma::multiply<T>(s + 8 * n, rows, pair[0], pair[1]);
        mma::multiply<T>(s + 8 * n + 4, rows, pair[2], pair[3]);
      }
    }
  }

  // Of the first kCount keys of the tile.
  template <int kCount>
  __device__ __forceinline__ void multiply_values(unsigned stage) {
    const std::uint32_t values =
        wgmma::descriptor(ptx::shared_address(shared.v[0]), Shared::kKeyPanel) +
        stage * (Shared::kKeyBytes >> 4);
#pragma unroll
    for (int k = 0; k < kCount / 16; ++k) {
      wgmma::Products<T, kHeadDim>::template register_a<1>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2],
                                                           p[4 * k + 3], values + k * 128, true);
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // -- one query tile

  __device__ __forceinline__ int query_of(const TileInfo& info) const {
    return info.q_begin + (ptx::thread_index() >> 2);
  }

  // What this thread's row sees, relative to the key tile. Rows beyond the sequence see what its
  // last row does; nothing of them is stored.
  __device__ __forceinline__ Range visible(const TileInfo& info, int tile) const {
    const Range keys = info.mask.keys(min(query_of(info), info.q_len - 1));
    return {keys.begin - tile * kKeys, keys.end - tile * kKeys};
  }

  // Clears the rows of a V stage that no query may see and that may hold anything: 0 * NaN is NaN.
  __device__ __forceinline__ void clear_values(const TileInfo& info, int tile) {
    const int tile_begin = tile * kKeys;
    const int keep_from = info.keep_from;
    const int clear_from = info.clear_from;
    if (tile_begin >= keep_from && tile_begin + kKeys <= clear_from) return;
    const unsigned stage = used % kTile.stages;
    ptx::barrier_wait(&shared.v_full[stage], (used / kTile.stages) & 1);
    for (int i = ptx::thread_index() & 127; i < kKeys * 8; i += 128) {
      const int row = tile_begin + i / 8;
      if (row >= keep_from && row < clear_from) continue;
#pragma unroll
      for (int panel = 0; panel < Shared::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(shared.v[stage] + panel * Shared::kKeyPanel + i * 16) =
            make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_async_proxy();
    ptx::named_sync(1 + kTile.warpgroups + warpgroup, 128);
  }

  __device__ __forceinline__ void finish_values(unsigned stage) {
    wgmma::wait<0>();
    wgmma::settle(o);
    release(&shared.v_empty[stage]);
  }

  // The first key tile of a query tile: its logits and probes alone.
  __device__ __forceinline__ void first_products() {
    const unsigned stage = used % kTile.stages;
    ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    take_turn();
    wgmma::fence();
    multiply_keys(stage);
    wgmma::commit();
    pass_turn();
    wgmma::wait<0>();
    wgmma::settle(s);
    release(&shared.k_empty[stage]);
  }

  // A key tile that only other warpgroups see.
  __device__ __forceinline__ void skip_tile() {
    const unsigned stage = used % kTile.stages;
    const unsigned parity = (used / kTile.stages) & 1;
    take_turn();
    pass_turn();
    ptx::barrier_wait(&shared.k_full[stage], parity);
    release(&shared.k_empty[stage]);
    ptx::barrier_wait(&shared.v_full[stage], parity);
    release(&shared.v_empty[stage]);
    ++used;
  }

  // Logits and probes of this key tile and the products of the last one's p and w with V, issued
  // together; of that one only the first kLastKeys keys.
  template <int kLastKeys>
  __device__ __forceinline__ void issue_step() {
    const unsigned stage = used % kTile.stages;
    const unsigned last = (used - 1) % kTile.stages;
    if (!keys_ready) ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    keys_ready = false;
    take_turn();
    wgmma::fence();
    multiply_keys(stage);
    wgmma::commit();
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values<kLastKeys>(last);
    wgmma::commit();
    pass_turn();
    wgmma::wait<1>();
    wgmma::settle(s);
  }

  // A key tile that every row sees whole. The softmax runs under the products of the other
  // warpgroups and, pinned, of this one (docs/kernels.md). False: the row's maximum was too small,
  // and outgrown_step() must follow.
  template <int kLastKeys = kKeys>
  __device__ __forceinline__ bool interior_step() {
    issue_step<kLastKeys>();
    const auto sums = row.weigh(s, params.scale_log2);
    if constexpr (kPinned) ptx::pin(sums.w, &shared.scratch);
    finish_values((used - 1) % kTile.stages);
    wgmma::settle(s);
    if (!row.fits(sums)) return false;
    release(&shared.k_empty[used % kTile.stages]);
    row.add(sums);
    const unsigned next = used + 1;
    keys_ready = ptx::barrier_test(&shared.k_full[next % kTile.stages], (next / kTile.stages) & 1);
    round_weights();
    return true;
  }

  // The same key tile once more, with a maximum that holds.
  __device__ __forceinline__ void outgrown_step() {
    repeat_keys(used % kTile.stages);
    release(&shared.k_empty[used % kTile.stages]);
    scale_sums(o, row.raise_to(row.tile_max(s, params.scale_log2)));
    row.add(row.weigh(s, params.scale_log2));
    round_weights();
  }

  // A key tile of which some row does not see all, or that may hold a row's first keys.
  __device__ __forceinline__ void edge_step(const TileInfo& info, int tile) {
    issue_step<kKeys>();
    release(&shared.k_empty[used % kTile.stages]);
    finish_values((used - 1) % kTile.stages);
    const auto change = row.add_edge(s, params.scale_log2, visible(info, tile));
    scale_sums(o, change.factor);
    shift_sums(o, change.shift);
    round_weights();
    clear_values(info, tile);
  }

  __device__ __forceinline__ void last_step(const TileInfo& info) {
    const unsigned last = (used - 1) % kTile.stages;
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values<kKeys>(last);
    wgmma::commit();
    const Ending ending = end(info);
    finish_values(last);
    store(info, ending);
  }

  // What a row yields and where it goes.
  struct Ending {
    Finalized<float> row;
    T* o;
    bool valid;
  };

  __device__ __forceinline__ T* row_of(const View& view, const TileInfo& info) const {
    const std::int64_t token = static_cast<std::int64_t>(info.q_offset) + query_of(info);
    return static_cast<T*>(view.data) + info.batch_idx * view.batch_stride +
           token * view.len_stride + info.head * view.head_stride;
  }

  __device__ __forceinline__ Ending end(const TileInfo& info) const {
    return {row.finish(), row_of(params.o, info), query_of(info) < info.q_len};
  }

  __device__ __forceinline__ void store(const TileInfo& info, const Ending& ending) const {
    const int head_dim = static_cast<int>(params.problem.head_dim);
    store_row(o, ending.o, ending.valid, head_dim,
              [&](float o1, float o2) { return ending.row.o(o1, o2); });
    if (params.v_bar.data != nullptr) {
      store_row(o, row_of(params.v_bar, info), ending.valid, head_dim,
                [&](float o1, float) { return ending.row.v_bar(o1); });
    }
    if (ending.valid && (ptx::thread_index() & 3) == 0) {
      const std::int64_t index =
          (info.batch_idx * params.problem.num_q_heads + info.head) * params.problem.q_len +
          info.q_offset + query_of(info);
      if (params.lse != nullptr) params.lse[index] = ending.row.lse;
      if (params.t_bar != nullptr) params.t_bar[index] = ending.row.t_bar;
    }
  }

  __device__ __forceinline__ const TileInfo& info_of(unsigned n) const {
    return shared.info[n % kTileInfos];
  }

  // Waits for the q and r of the n-th query tile; false where there is none.
  __device__ __forceinline__ bool await_packed(unsigned n) const {
    ptx::barrier_wait(&shared.packed_full[n % kTile.packed_stages], n / kTile.packed_stages & 1);
    return ptx::uniform(info_of(n).q_begin) >= 0;
  }

  __device__ __forceinline__ void take_packed() {
    if constexpr (kTile.q_in_registers) {
      load_operand();
      release_packed();
    }
  }

  // Key tiles of the CTA above those that this warpgroup sees, and below.
  __device__ __forceinline__ int tiles_above(const TileInfo& info) const {
    return ptx::uniform(info.tiles.first + info.tiles.count -
                        max(info.own[warpgroup].end, info.tiles.first));
  }
  __device__ __forceinline__ int tiles_below(const TileInfo& info) const {
    return ptx::uniform(info.own[warpgroup].begin - info.tiles.first);
  }
  __device__ __forceinline__ bool sees_keys(const TileInfo& info) const {
    return ptx::uniform(info.own[warpgroup].size() > 0);
  }
  __device__ __forceinline__ bool sees_half(const TileInfo& info) const {
    return kHalves && ptx::uniform(info.half[warpgroup]);
  }

  __device__ __forceinline__ void skip_tiles(int count) {
#pragma unroll 1
    for (; count > 0; --count) skip_tile();
  }

  // All of a query tile's key tiles but the last products with V.
  __device__ __forceinline__ void meet_keys(const TileInfo& info) {
    const int own_begin = ptx::uniform(info.own[warpgroup].begin);
    const int interior_begin = ptx::uniform(info.interior[warpgroup].begin);
    const int interior_end = ptx::uniform(info.interior[warpgroup].end);
    int tile = ptx::uniform(info.own[warpgroup].end) - 1;
    row = {};
    row.add_first(s, params.scale_log2, visible(info, tile));
    round_weights();
    clear_values(info, tile);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    keys_ready = false;
    ++used;
    --tile;
    if (sees_half(info) && tile >= interior_begin && tile < interior_end) {
      if (!interior_step<kHalf>()) outgrown_step();
      --tile;
      ++used;
    }
#pragma unroll 1
    for (;; --tile, ++used) {
      const int stop = tile < interior_end ? interior_begin : tile + 1;
#pragma unroll 1
      for (; tile >= stop && interior_step(); --tile) ++used;
      if (tile >= stop) {
        outgrown_step();
      } else if (tile >= own_begin) {
        edge_step(info, tile);
      } else {
        break;
      }
    }
  }

  // A query tile none of whose keys this warpgroup sees.
  __device__ __forceinline__ void pass_by(const TileInfo& info) {
    if constexpr (!kTile.q_in_registers) release_packed();
    skip_tiles(ptx::uniform(info.tiles.count));
    row = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    store(info, end(info));
  }

  __device__ __forceinline__ void run() {
    first_credit();
#pragma unroll 1
    for (; await_packed(query_tile); ++query_tile) {
      take_packed();
      if (!sees_keys(info_of(query_tile))) {
        pass_by(info_of(query_tile));
        continue;
      }
      skip_tiles(tiles_above(info_of(query_tile)));
      first_products();
      meet_keys(info_of(query_tile));
      if constexpr (!kTile.q_in_registers) release_packed();
      last_step(info_of(query_tile));
      skip_tiles(tiles_below(info_of(query_tile)));
    }
    last_credit();
  }
};

}  // namespace parallax
