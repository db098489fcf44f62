// SPDX-License-Identifier: MIT
// dk and dv: a warpgroup owns 64 keys, the rows of its accumulators, and meets the queries that see
// them 64 at a time, for all query heads of the group. Everything is computed transposed, so that
// the weights it makes are register operands of the products that sum over queries:
//
//   {s, t}' = K {Q, R}'     g' = V dO'
//   p = exp(s), u = 1 + t_bar - t, e = p (g - g_bar), ds = p (u (g - g_bar) - (delta - g_bar))
//   dv += (p u)' dO         dk += (scale ds)' Q - e' R
//
// The query is a column here, its statistics come from shared memory. With p divided and u
// multiplied by the scale (BackwardParams::fold), and the gradient's statistics as prepared, ds
// comes out scaled, and p u and e as they are.
#pragma once

#include "cuda/backward_tile.cuh"

namespace parallax {

// The query tile to load next: its first row in q, r and d_o, head and batch entry, and how many
// tiles of this head are left.
struct alignas(16) NextTile {
  int row;
  int head;
  int batch_idx;
  int left;
};

template <int kHeadDim>
struct alignas(1024) KeysShared {
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPairPanel = 2 * kPanelBytes;  // q above r

  struct Stage {
    std::uint8_t q_and_r[kPanels][kPairPanel];
    std::uint8_t d_o[kPanels][kPanelBytes];
    float2 statistics[2][kBackwardRows];  // softmax, gradient
  };
  std::uint8_t k[2][kPanels][kPanelBytes];  // by warpgroup
  std::uint8_t v[2][kPanels][kPanelBytes];
  Stage stages[kBackwardStages];
  Range queries[kBackwardTile];  // that see each key
  // The block's work, here because registers are scarce.
  Sequence sequence;
  BlockPlace place;
  Range tiles;       // of queries that meet the keys, the same for every head
  Range visible[2];  // by warpgroup: query tiles that its keys meet at all,
  Range whole[2];    // and that need no mask
  NextTile next[4];  // by loading warp
  std::int64_t next_statistics;
  float scratch;  // of ptx::pin
  std::uint64_t full[kBackwardStages], empty[kBackwardStages], keys_full;
};

template <class T, int kHeadDim>
struct KeysBlock {
  using Shared = KeysShared<kHeadDim>;
  using Narrow = wgmma::Products<T, 64>;
  using Wide = wgmma::Products<T, 128>;
  using Sums = wgmma::Products<T, kHeadDim>;
  static constexpr int kPanels = Shared::kPanels;
  // Where registers allow, a warpgroup of its own loads; at head_dim 128 the sums leave none, and
  // the second warpgroup, which runs behind the first, loads between two tiles.
  static constexpr bool kOwnLoader = kHeadDim == 64;
  static constexpr int kThreads = kOwnLoader ? 384 : 256;
  static constexpr bool kTakeTurns = kOwnLoader;
  static constexpr int kAhead = kOwnLoader ? 4 : 2;  // statistics read ahead of their use
  // Whether the arithmetic of 16 queries stays behind the products of the 16 before them, where
  // ptxas would do it all first and then issue the products in one row.
  static constexpr bool kPinned = !kOwnLoader;

  const BackwardMaps& maps;
  const BackwardParams& params;
  Shared& shared;

  __device__ __forceinline__ int lane() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int warp() const { return (threadIdx.x >> 5) & 3; }

  // The first of the thread's two keys, eight apart.
  __device__ __forceinline__ int own_key(int warpgroup) const {
    return kBackwardRows * warpgroup + 16 * warp() + (lane() >> 2);
  }

  __device__ __forceinline__ void load_keys(int first_key) const {
    ptx::barrier_expect(&shared.keys_full, 4 * kPanels * kPanelBytes);
    const Sequence& sequence = shared.sequence;
    const int head = shared.place.head;
    const int row = static_cast<int>(sequence.kv_offset) + first_key;
    const int batch_idx = static_cast<int>(sequence.batch_idx);
    for (int i = 0; i < 2 * kPanels; ++i) {
      const int panel = i % kPanels;
      const int coordinates[4] = {64 * panel, row + i / kPanels * kBackwardRows, head, batch_idx};
      ptx::copy_box(shared.k[i / kPanels][panel], &maps.k, coordinates, &shared.keys_full);
      ptx::copy_box(shared.v[i / kPanels][panel], &maps.v, coordinates, &shared.keys_full);
    }
  }

  // The next query tile: the four warps of the loading warpgroup take q, r, d_o, the statistics.
  __device__ __forceinline__ void load(int stage, int phase) const {
    if (lane() == 0) {
      NextTile next = shared.next[warp()];
      auto& to = shared.stages[stage];
      std::uint64_t* full = &shared.full[stage];
      ptx::barrier_wait(&shared.empty[stage], phase);
      if (warp() < 3) {
        ptx::barrier_expect(full, kPanels * kPanelBytes);
        const CUtensorMap* map = warp() == 0 ? &maps.q : warp() == 1 ? &maps.r : &maps.d_o;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          std::uint8_t* memory =
              warp() < 2 ? to.q_and_r[panel] + warp() * kPanelBytes : to.d_o[panel];
          ptx::copy_box(memory, map, {64 * panel, next.row, next.head, next.batch_idx}, full);
        }
      } else {
        constexpr int kBytes = kBackwardRows * sizeof(float2);
        ptx::barrier_expect(full, 2 * kBytes);
        const std::int64_t first = shared.next_statistics;
        ptx::copy_bytes(to.statistics[0], params.softmax + first, kBytes, full);
        ptx::copy_bytes(to.statistics[1], params.gradient + first, kBytes, full);
        shared.next_statistics = first + kBackwardRows;
      }
      next.row += kBackwardRows;
      if (--next.left == 0) {  // the same tiles of the next head
        next.left = shared.tiles.size();
        next.row -= next.left * kBackwardRows;
        ++next.head;
        if (warp() == 3) {
          shared.next_statistics += params.statistics_rows - next.left * kBackwardRows;
        }
      }
      shared.next[warp()] = next;
    }
    __syncwarp();
  }

  __device__ __forceinline__ int num_tiles() const { return shared.tiles.size() * params.group; }

  __device__ __forceinline__ void load_all() const {
    int stage = 0;
    int phase = 1;
#pragma unroll 1
    for (int left = num_tiles(); left > 0; --left) {
      load(stage, phase);
      if (++stage == kBackwardStages) stage = 0, phase ^= 1;
    }
  }

  // Rows behind a packed sequence's last query are another's: they must not reach a product.
  __device__ __forceinline__ void clear_behind(int stage, int first_query) const {
    const int kept = shared.sequence.mask.q_len - first_query;
    auto* panels = reinterpret_cast<std::uint8_t*>(&shared.stages[stage]);
    for (int i = threadIdx.x; i < 3 * kPanels * kBackwardRows * 8; i += 256) {
      const int row = (i >> 3) & (kBackwardRows - 1);
      if (row >= kept) *reinterpret_cast<uint4*>(panels + 16 * i) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_async_proxy();
    ptx::named_sync(1, 256);
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    float s_t[64];  // s of a tile's 64 queries, then t
    float g[32];
    float dk[kHeadDim / 2];
    float dv[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    int left = num_tiles();
    if (!kOwnLoader && warpgroup == 1) {
#pragma unroll 1
      for (int i = 0; i < 2 && i < left; ++i) load(i, 1);
    }
    if (left > 0) ptx::barrier_wait(&shared.keys_full, 0);
    if (kTakeTurns && warpgroup == 1) ptx::named_arrive(2, 256);
    const Range tiles = uniform(shared.tiles);
    const Range visible = uniform(shared.visible[warpgroup]);
    const Range whole = kOwnLoader ? uniform(shared.whole[warpgroup]) : Range{};
    int tile = tiles.begin;
    int stage = 0;
    int phase = 0;
    bool meets;  // the tile at hand: the warpgroup's keys see some of it,
    bool ready;  // and it was there when looked for under the last one's products
    const auto look = [&](int tile, int stage, int phase) {
      meets = contains(visible, tile);
      ready = ptx::barrier_test(&shared.full[stage], phase);
    };
    look(tile, stage, phase);
#pragma unroll 1
    for (; left > 0; --left) {
      // What is done while a tile's last products are under way.
      const auto under_products = [&] {
        if (!kOwnLoader && warpgroup == 1 && left > 2) {  // the stage that tile - 1 has left
          load(stage == 0 ? kBackwardStages - 1 : stage - 1, stage == 0 ? phase ^ 1 : phase);
        }
        const int next = stage + 1 == kBackwardStages ? 0 : stage + 1;
        look(tile + 1 == tiles.end ? tiles.begin : tile + 1, next, next == 0 ? phase ^ 1 : phase);
      };
      // Uniform, so that the steps from one product to the next cost no lane anything; before the
      // wait, which hides how long that takes.
      const std::uint32_t k =
          ptx::uniform(wgmma::descriptor(ptx::shared_address(shared.k[warpgroup])));
      const std::uint32_t q = ptx::uniform(
          wgmma::descriptor(ptx::shared_address(&shared.stages[stage]), Shared::kPairPanel));
      if (!ready) ptx::barrier_wait(&shared.full[stage], phase);
      if (params.problem.packed && (tile + 1) * kBackwardRows > shared.sequence.mask.q_len) {
        clear_behind(stage, tile * kBackwardRows);
      }
      if (kTakeTurns) ptx::named_sync(2 + warpgroup, 256);
      if (meets) {
        if (kOwnLoader && contains(whole, tile)) {
          add_tile<false>(s_t, g, dk, dv, warpgroup, k, q, stage, tile, under_products);
        } else {
          add_tile<true>(s_t, g, dk, dv, warpgroup, k, q, stage, tile, under_products);
        }
      } else {
        if (kTakeTurns) ptx::named_arrive(2 + (warpgroup ^ 1), 256);
        under_products();
      }
      if (lane() == 0) ptx::barrier_arrive(&shared.empty[stage]);
      if (++stage == kBackwardStages) stage = 0, phase ^= 1;
      if (++tile == tiles.end) tile = tiles.begin;
    }
    if (kTakeTurns && warpgroup == 0) ptx::named_sync(2, 256);
    const Sequence& sequence = shared.sequence;
    const int head = shared.place.head;
    const int key = shared.place.tile * kBackwardTile + own_key(warpgroup);
    const int rows_left = sequence.kv_len - key;
    const auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) + sequence.kv_row(view.batch_stride, view.len_stride, key) +
             head * view.head_stride;
    };
    const int head_dim = static_cast<int>(params.problem.head_dim);
    store_gradient<T>(dk, 1.f, row_of(params.dk), params.dk.len_stride, rows_left, head_dim);
    store_gradient<T>(dv, 1.f, row_of(params.dv), params.dv.len_stride, rows_left, head_dim);
  }

  // What the thread's columns need: a pair of queries' softmax, eight times, then their gradient.
  __device__ __forceinline__ static float4 statistics(const typename Shared::Stage& from, int n) {
    return ptx::load_shared(&from.statistics[n >> 3][8 * (n & 7) + 2 * (threadIdx.x & 3)]);
  }

  // kMasked: some key may not see some query. Of other tiles, where registers allow, the products
  // of p u are issued before g is there.
  template <bool kMasked, class UnderProducts>
  __device__ __forceinline__ void add_tile(float (&s_t)[64], float (&g)[32],
                                           float (&dk)[kHeadDim / 2], float (&dv)[kHeadDim / 2],
                                           int warpgroup, std::uint32_t k, std::uint32_t q,
                                           int stage, int tile,
                                           const UnderProducts& under_products) const {
    const auto& from = shared.stages[stage];
    const std::uint32_t v = k + (2 * kPanels * kPanelBytes >> 4);
    const std::uint32_t r = q + (kPanelBytes >> 4);
    const std::uint32_t d_o =
        q + (kPanels * Shared::kPairPanel >> 4) - ((Shared::kPairPanel - kPanelBytes) >> 4 << 16);
    float4 ahead[kAhead];
    const auto read_ahead = [&] {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ahead[i] = statistics(from, i);
    };
    // Behind the products, a read takes several times as long; before them, it takes registers.
    if (kOwnLoader) read_ahead();
    wgmma::fence();
#pragma unroll
    for (int kk = 0; kk < kHeadDim / 16; ++kk) {
      Wide::shared_a(s_t, k + column_step(kk, kPanelBytes), q + column_step(kk, Shared::kPairPanel),
                     kk != 0);
    }
    wgmma::commit();
#pragma unroll
    for (int kk = 0; kk < kHeadDim / 16; ++kk) {
      Narrow::shared_a(g, v + column_step(kk, kPanelBytes), d_o + column_step(kk, kPanelBytes),
                       kk != 0);
    }
    wgmma::commit();
    const bool masked = kMasked && !contains(shared.whole[warpgroup], tile);
    if (!kOwnLoader) read_ahead();
    wgmma::wait<1>();
    wgmma::settle(s_t);
    if (kTakeTurns) ptx::named_arrive(2 + (warpgroup ^ 1), 256);
#pragma unroll
    for (int n = 0; n < 8; ++n) {  // s -> p / scale, t -> scale u
      const float4 c = ahead[n % kAhead];
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; i += 2) {
        s_t[i] = ptx::exp2(fmaf(s_t[i], params.scale_log2, -c.x));
        s_t[i + 1] = ptx::exp2(fmaf(s_t[i + 1], params.scale_log2, -c.z));
        s_t[32 + i] = fmaf(s_t[32 + i], -params.fold, c.y);
        s_t[33 + i] = fmaf(s_t[33 + i], -params.fold, c.w);
      }
      ahead[n % kAhead] = statistics(from, n + kAhead);
      if (!kMasked && n % 2 == 1) add_values(s_t, dv, n / 2, d_o);
    }
    if constexpr (kMasked) {
      wgmma::wait<0>();
      wgmma::settle(g);
      if (masked) hide(s_t, g, warpgroup, tile);
    } else {
      wgmma::commit();
      wgmma::wait<1>();
      wgmma::settle(g);
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      std::uint32_t e[4], ds[4];
#pragma unroll
      for (int n = 2 * kk; n < 2 * kk + 2; ++n) {
        const float4 c = ahead[(8 + n) % kAhead];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * n + 2 * half;
          const int word = 2 * (n & 1) + half;
          const float g0 = fmaf(g[i], params.fold, -c.x);
          const float g1 = fmaf(g[i + 1], params.fold, -c.z);
          ds[word] = ptx::pack<T>(s_t[i] * fmaf(s_t[32 + i], g0, -c.y),
                                  s_t[i + 1] * fmaf(s_t[33 + i], g1, -c.w));
          e[word] = ptx::pack<T>(s_t[i] * g0, s_t[i + 1] * g1);
        }
        if (!kPinned && n + kAhead < 8) {
          ahead[(8 + n) % kAhead] = statistics(from, 8 + n + kAhead);
        }
      }
      if (kMasked) add_values(s_t, dv, kk, d_o);
      wgmma::fence();
      Sums::template register_a<1>(dk, ds[0], ds[1], ds[2], ds[3], q + kk * kRowStep, true);
      Sums::template register_a<1, -1>(dk, e[0], e[1], e[2], e[3], r + kk * kRowStep, true);
      if (kPinned && kk < 3) {  // no read of shared memory passes a store, no store a product
        ptx::pin(s_t[8 * kk], &shared.scratch);
#pragma unroll
        for (int n = 2 * kk + 2; n < 2 * kk + 4; ++n) {
          ahead[(8 + n) % kAhead] = statistics(from, 8 + n);
        }
      }
    }
    wgmma::commit();
    under_products();
    wgmma::wait<0>();
    wgmma::settle(dk);
    wgmma::settle(dv);
  }

  // dv += (p u)' d_o of 16 queries.
  __device__ __forceinline__ static void add_values(const float (&s_t)[64],
                                                    float (&dv)[kHeadDim / 2], int kk,
                                                    std::uint32_t d_o) {
    std::uint32_t a[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int i = 8 * kk + 2 * word;
      a[word] = ptx::pack<T>(s_t[i] * s_t[32 + i], s_t[i + 1] * s_t[33 + i]);
    }
    wgmma::fence();
    Sums::template register_a<1>(dv, a[0], a[1], a[2], a[3], d_o + kk * kRowStep, true);
  }

  // Zeros p, u and g where the query does not see the key, whatever they are.
  __device__ __forceinline__ void hide(float (&s_t)[64], float (&g)[32], int warpgroup,
                                       int tile) const {
    const int column = tile * kBackwardRows + 2 * (lane() & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Range seen = shared.queries[own_key(warpgroup) + 8 * half];
      seen = {seen.begin - column, seen.end - column};
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int i = 4 * (n >> 1) + 2 * half + (n & 1);
        if (!contains(seen, 8 * (n >> 1) + (n & 1))) s_t[i] = s_t[32 + i] = g[i] = 0.f;
      }
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(KeysBlock<T, kHeadDim>::kThreads, 1)
    backward_keys(const __grid_constant__ BackwardMaps maps,
                  const __grid_constant__ BackwardParams params) {
  using Block = KeysBlock<T, kHeadDim>;
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<KeysShared<kHeadDim>*>(memory);
  // A key near the start is seen by the most queries: first tiles first.
  const BlockPlace place =
      place_block(params.problem, params.key_grid, params.sequences.cu_seqlens_k, false);
  if (place.b < 0) return;
  const Sequence sequence = sequence_at(params.problem, params.sequences, place.b);
  const Mask& mask = sequence.mask;
  const int first_key = place.tile * kBackwardTile;
  const Block block{maps, params, shared};
  if (threadIdx.x == 0) {
    shared.sequence = sequence;
    shared.place = place;
    shared.tiles = tiles_over(mask.queries({first_key, first_key + kBackwardTile}));
    const int first_head = place.head * params.group;
    const int first_row = shared.tiles.begin * kBackwardRows;
    for (NextTile& next : shared.next) {
      next = {static_cast<int>(sequence.q_offset) + first_row, first_head,
              static_cast<int>(sequence.batch_idx), shared.tiles.size()};
    }
    shared.next_statistics = statistics_begin(params, sequence, place.b, first_head) + first_row;
    for (int i = 0; i < kBackwardStages; ++i) {
      ptx::barrier_init(&shared.full[i], 4);
      ptx::barrier_init(&shared.empty[i], 8);
    }
    ptx::barrier_init(&shared.keys_full, 1);
    ptx::fence_barrier_init();
    if (!shared.tiles.empty()) block.load_keys(first_key);
  }
  if (threadIdx.x < kBackwardTile) {
    const int key = first_key + static_cast<int>(threadIdx.x);
    shared.queries[threadIdx.x] = mask.queries({key, key + 1});
    if (threadIdx.x % kBackwardRows == 0) {
      const int end = key + kBackwardRows;
      shared.visible[threadIdx.x / kBackwardRows] = tiles_over(mask.queries({key, end}));
      shared.whole[threadIdx.x / kBackwardRows] =
          tiles_within(mask.queries({key, key + 1}), mask.queries({end - 1, end}));
    }
  }
  const int warpgroup = ptx::uniform(threadIdx.x >> 7);
  __syncthreads();
  if constexpr (Block::kOwnLoader) {
    if (warpgroup == 2) {
      ptx::keep_registers<24>();
      block.load_all();
    } else {
      ptx::take_registers<240>();
      block.consume(warpgroup);
    }
  } else {
    block.consume(warpgroup);
  }
}

}  // namespace parallax
