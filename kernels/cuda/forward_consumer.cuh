// SPDX-License-Identifier: MIT
// A consumer warpgroup of the Hopper forward: 32 queries, q and r, against all keys they see.
#pragma once

#include "cuda/forward_tile.cuh"
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

  __device__ __forceinline__ void load_operand() {
    const int thread = ptx::thread_index();
    const int lane = thread & 31;
    const int flip = params.r_first ? 8 : 0;
    const int row = (thread >> 1 & 48) + ((lane & 15) ^ flip);
    const std::uint32_t base = ptx::shared_address(shared.packed[0]) + warpgroup * 8192 + row * 128;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = (2 * (k & 3) + (lane >> 4)) ^ (row & 7);
      std::uint32_t fragment[4];
      ptx::load_matrices(fragment, base + (k >> 2) * Shared::kPackedPanel + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * k + i] = fragment[i];
    }
  }

  // s of the first kCount keys of the tile.
  template <int kCount>
  __device__ __forceinline__ void multiply_keys(float (&sums)[kCount / 2], unsigned stage) {
    const std::uint32_t keys =
        wgmma::descriptor(ptx::shared_address(shared.k[0])) + stage * (Shared::kKeyBytes >> 4);
    const std::uint32_t rows =
        wgmma::descriptor(ptx::shared_address(shared.packed[0]) + warpgroup * 8192) +
        packed_stage() * (Shared::kPackedBytes >> 4);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int key_step = ((k >> 2) * Shared::kKeyPanel + (k & 3) * 32) >> 4;
      const int row_step = ((k >> 2) * Shared::kPackedPanel + (k & 3) * 32) >> 4;
      if constexpr (kTile.q_in_registers) {
        wgmma::Products<T, kCount>::register_a(sums, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                                               a[4 * k + 3], keys + key_step, k != 0);
      } else {
        wgmma::Products<T, kCount>::shared_a(sums, rows + row_step, keys + key_step, k != 0);
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
  __device__ __forceinline__ void first_step(const TileInfo& info, int tile, bool half) {
    const unsigned stage = used % kTile.stages;
    ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    take_turn();
    if (kHalves && half) {
      float sums[kHalf / 2];
      wgmma::fence();
      multiply_keys<kHalf>(sums, stage);
      wgmma::commit();
      pass_turn();
      wgmma::wait<0>();
      wgmma::settle(sums);
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) s[i] = sums[i];
    } else {
      wgmma::fence();
      multiply_keys<kKeys>(s, stage);
      wgmma::commit();
      pass_turn();
      wgmma::wait<0>();
      wgmma::settle(s);
    }
    release(&shared.k_empty[stage]);
    row.add_first(s, params.scale_log2, visible(info, tile));
    round_weights();
    clear_values(info, tile);
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
  // together; of that one only the first kLastKeys keys. The softmax runs under the products of the
  // other warpgroups and, pinned, of this one (docs/kernels.md).
  template <bool kEdge, int kLastKeys = kKeys>
  __device__ __forceinline__ void step(const TileInfo& info, int tile) {
    const unsigned stage = used % kTile.stages;
    const unsigned last = (used - 1) % kTile.stages;
    if (!keys_ready) ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    keys_ready = false;
    take_turn();
    wgmma::fence();
    multiply_keys<kKeys>(s, stage);
    wgmma::commit();
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values<kLastKeys>(last);
    wgmma::commit();
    pass_turn();
    wgmma::wait<1>();
    wgmma::settle(s);
    release(&shared.k_empty[stage]);
    if constexpr (kEdge) {
      finish_values(last);
      const auto change = row.add_edge(s, params.scale_log2, visible(info, tile));
      scale_sums(o, change.factor);
      shift_sums(o, change.shift);
    } else {
      float factor = 1.0f;
      const bool grown = row.raise(s, params.scale_log2, &factor);
      row.exponentiate(s, params.scale_log2);
      row.weigh_probes(s);
      if constexpr (kPinned) ptx::pin(row.d2, &shared.scratch);
      finish_values(last);
      const unsigned next = used + 1;
      keys_ready =
          ptx::barrier_test(&shared.k_full[next % kTile.stages], (next / kTile.stages) & 1);
      wgmma::settle(s);
      if (grown) scale_sums(o, factor);
    }
    round_weights();
    if constexpr (kEdge) clear_values(info, tile);
  }

  __device__ __forceinline__ void last_step() {
    const unsigned last = (used - 1) % kTile.stages;
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values<kKeys>(last);
    wgmma::commit();
    finish_values(last);
  }

  __device__ __forceinline__ void store(const TileInfo& info) const {
    const int query = query_of(info);
    const Finalized<float> result = row.finish();
    const bool valid = query < info.q_len;
    const int head_dim = static_cast<int>(params.problem.head_dim);
    const std::int64_t batch_idx = info.batch_idx;
    const std::int64_t token = static_cast<std::int64_t>(info.q_offset) + query;
    const std::int64_t head = info.head;
    auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) + batch_idx * view.batch_stride + token * view.len_stride +
             head * view.head_stride;
    };
    store_row(o, row_of(params.o), valid, head_dim,
              [&](float o1, float o2) { return result.o(o1, o2); });
    if (params.v_bar.data != nullptr) {
      store_row(o, row_of(params.v_bar), valid, head_dim,
                [&](float o1, float) { return result.v_bar(o1); });
    }
    if (valid && (ptx::thread_index() & 3) == 0) {
      const std::int64_t index =
          (batch_idx * params.problem.num_q_heads + head) * params.problem.q_len + token;
      if (params.lse != nullptr) params.lse[index] = result.lse;
      if (params.t_bar != nullptr) params.t_bar[index] = result.t_bar;
    }
  }

  __device__ __forceinline__ void run() {
    first_credit();
#pragma unroll 1
    for (;; ++query_tile) {
      ptx::barrier_wait(&shared.packed_full[packed_stage()], query_tile / kTile.packed_stages & 1);
      const TileInfo& info = shared.info[query_tile % kTileInfos];
      const int q_begin = ptx::uniform(info.q_begin);
      if (q_begin < 0) break;
      if constexpr (kTile.q_in_registers) {
        load_operand();
        release_packed();
      }
      const int own_begin = ptx::uniform(info.own[warpgroup].begin);
      const int own_end = ptx::uniform(info.own[warpgroup].end);
      const int interior_begin = ptx::uniform(info.interior[warpgroup].begin);
      const int interior_end = ptx::uniform(info.interior[warpgroup].end);
      int skipped =
          ptx::uniform(info.tiles.first + info.tiles.count) - max(own_end, info.tiles.first);
#pragma unroll 1
      for (; skipped > 0; --skipped) skip_tile();
      int tile = own_end - 1;
      row = {};
      keys_ready = false;
      const bool half = kHalves && ptx::uniform(info.half[warpgroup]);
      if (own_begin < own_end) first_step(info, tile, half);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
      if (own_begin < own_end) {
        ++used;
        --tile;
        if (half && tile >= interior_begin && tile < interior_end) {
          step<false, kHalf>(info, tile);
          --tile;
          ++used;
        }
#pragma unroll 1
        for (; tile >= own_begin; --tile, ++used) {
          if (tile >= interior_begin && tile < interior_end) [[likely]] {
            step<false>(info, tile);
          } else {
            step<true>(info, tile);
          }
        }
      }
      if constexpr (!kTile.q_in_registers) release_packed();
      if (own_begin < own_end) {
        last_step();
#pragma unroll 1
        for (skipped = own_begin - ptx::uniform(info.tiles.first); skipped > 0; --skipped) {
          skip_tile();
        }
      }
      store(info);
    }
    last_credit();
  }
};

}  // namespace parallax
