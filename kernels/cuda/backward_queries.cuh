// SPDX-License-Identifier: MIT
// dq and dr: a warpgroup owns 64 queries, the rows of its accumulators, and meets the keys they see
// 64 at a time:
//
//   s = Q K'    g = dO V'    t = R K'
//   p = exp(s), e = p (g - g_bar), ds = (1 + t_bar - t) e - (delta - g_bar) p
//   dr -= e K   dq += ds K
//
// A query's statistics are constant over the loop. Its row sums of e and ds, which are zero in
// exact arithmetic, say how far the rounded v_bar and o put g_bar and delta off: they correct dr
// and dq by a reference key, and the statistics that the keys kernel reads next.
#pragma once

#include "cuda/backward_tile.cuh"

namespace parallax {

template <int kHeadDim>
struct alignas(1024) QueriesShared {
  static constexpr int kPanels = kHeadDim / 64;
  using Rows = std::uint8_t[kPanels][kPanelBytes];

  struct Stage {
    Rows k, v;
  };
  Rows q[2], r[2], d_o[2];     // by warpgroup
  std::uint8_t ones[2][1024];  // eight rows of 64 elements: row 0 of the first, row 1 of the second
  Stage stages[kBackwardStages];
  float4 statistics[kBackwardTile];  // of each query: its softmax and gradient
  Range keys[kBackwardTile];         // that each query sees
  // The block's work, here because registers are scarce.
  Sequence sequence;
  BlockPlace place;
  int4 source;       // of k and v: row of key 0, head, batch entry
  Range tiles;       // of keys that some query sees
  Range visible[2];  // by warpgroup: key tiles that its queries see at all,
  Range whole[2];    // and that need no mask
  Range seen;        // keys that any query of the sequence sees; others may hold anything
  std::uint64_t full[kBackwardStages], empty[kBackwardStages], queries_full;
};

template <class T, int kHeadDim>
struct QueriesBlock {
  using Shared = QueriesShared<kHeadDim>;
  using Narrow = wgmma::Products<T, 64>;
  using Sums = wgmma::Products<T, kHeadDim>;
  static constexpr int kPanels = Shared::kPanels;
  // As in the keys kernel: a warpgroup that loads where registers allow.
  static constexpr bool kOwnLoader = kHeadDim == 64;
  static constexpr int kThreads = kOwnLoader ? 384 : 256;
  static constexpr bool kTakeTurns = kOwnLoader;
  static constexpr int kLoaders = 2 * kPanels;  // warps, one a panel of k or v
  // Where registers allow, row sums are products too (add_to_sums).
  static constexpr bool kSumsByProducts = kHeadDim == 64;

  const BackwardMaps& maps;
  const BackwardParams& params;
  Shared& shared;

  __device__ __forceinline__ int lane() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int warp() const { return (threadIdx.x >> 5) & 3; }
  // The first of the thread's two queries, eight apart.
  __device__ __forceinline__ int own_query(int warpgroup) const {
    return kBackwardRows * warpgroup + 16 * warp() + (lane() >> 2);
  }

  __device__ __forceinline__ void load_queries(const Sequence& sequence,
                                               const BlockPlace& place) const {
    ptx::barrier_expect(&shared.queries_full, 6 * kPanels * kPanelBytes);
    const int row = static_cast<int>(sequence.q_offset) + place.tile * kBackwardTile;
    const int batch_idx = static_cast<int>(sequence.batch_idx);
    for (int i = 0; i < 2 * kPanels; ++i) {
      const int panel = i % kPanels;
      const int coordinates[4] = {64 * panel, row + i / kPanels * kBackwardRows, place.head,
                                  batch_idx};
      ptx::copy_box(shared.q[i / kPanels][panel], &maps.q, coordinates, &shared.queries_full);
      ptx::copy_box(shared.r[i / kPanels][panel], &maps.r, coordinates, &shared.queries_full);
      ptx::copy_box(shared.d_o[i / kPanels][panel], &maps.d_o, coordinates, &shared.queries_full);
    }
  }

  __device__ __forceinline__ void load(int tile, int stage, int phase) const {
    if (lane() == 0 && warp() < kLoaders) {
      const int4 source = shared.source;
      const int panel = warp() % kPanels;
      const bool of_k = warp() < kPanels;
      std::uint64_t* full = &shared.full[stage];
      ptx::barrier_wait(&shared.empty[stage], phase);
      ptx::barrier_expect(full, kPanelBytes);
      ptx::copy_box(of_k ? shared.stages[stage].k[panel] : shared.stages[stage].v[panel],
                    of_k ? &maps.k : &maps.v,
                    {64 * panel, source.x + tile * kBackwardRows, source.y, source.z}, full);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_all() const {
    int stage = 0;
    int phase = 1;
#pragma unroll 1
    for (int tile = shared.tiles.begin; tile < shared.tiles.end; ++tile) {
      load(tile, stage, phase);
      if (++stage == kBackwardStages) stage = 0, phase ^= 1;
    }
  }

  // Keys that no query of the sequence sees are rows of K in the second products, where a weight of
  // zero would not silence a NaN.
  __device__ __forceinline__ void clear_unseen(int stage, int first_key) const {
    const Range seen = shared.seen;
    if (first_key >= seen.begin && first_key + kBackwardRows <= seen.end) return;
    auto* panels = reinterpret_cast<std::uint8_t*>(&shared.stages[stage].k);
    for (int i = threadIdx.x; i < kPanels * kBackwardRows * 8; i += 256) {
      const int key = first_key + ((i >> 3) & (kBackwardRows - 1));
      if (!contains(seen, key)) {
        *reinterpret_cast<uint4*>(panels + 16 * i) = make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_async_proxy();
    ptx::named_sync(1, 256);
  }

  // Row sums of the thread's two queries: e, ds of the first, e, ds of the second. By products,
  // those of a quad's first lane are whole and the others zero; else a lane has those of its
  // columns.
  using RowSums = float[4];

  __device__ __forceinline__ void consume(int warpgroup) const {
    float s[32];
    float g[32];
    float t[32];
    float dq[kHeadDim / 2];
    float dr[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = dr[i] = 0.f;
    RowSums sums = {};
    const Range tiles = uniform(shared.tiles);
    int tile = tiles.begin;
    if (!kOwnLoader && warpgroup == 1) {
#pragma unroll 1
      for (int i = 0; i < 2 && tile + i < tiles.end; ++i) load(tile + i, i, 1);
    }
    if (!tiles.empty()) ptx::barrier_wait(&shared.queries_full, 0);
    if (kTakeTurns && warpgroup == 1) ptx::named_arrive(2, 256);
    int stage = 0;
    int phase = 0;
#pragma unroll 1
    for (; tile < tiles.end; ++tile) {
      if (!kOwnLoader && warpgroup == 1 && tile + 2 < tiles.end) {
        // Into the stage that tile - 1 has left.
        load(tile + 2, stage == 0 ? kBackwardStages - 1 : stage - 1,
             stage == 0 ? phase ^ 1 : phase);
      }
      const bool meets = contains(shared.visible[warpgroup], tile);
      // Uniform, so that the steps from one product to the next cost no lane anything; before the
      // wait, which hides how long that takes.
      const std::uint32_t q =
          ptx::uniform(wgmma::descriptor(ptx::shared_address(shared.q[warpgroup])));
      const std::uint32_t k =
          ptx::uniform(wgmma::descriptor(ptx::shared_address(shared.stages[stage].k), kPanelBytes));
      ptx::barrier_wait(&shared.full[stage], phase);
      if ((stage | phase) == 0 || tile + 1 == tiles.end) clear_unseen(stage, tile * kBackwardRows);
      if (kTakeTurns) ptx::named_sync(2 + warpgroup, 256);
      if (meets) {
        if (kOwnLoader && contains(shared.whole[warpgroup], tile)) {
          add_tile<false>(s, g, t, dq, dr, sums, warpgroup, q, k, tile);
        } else {
          add_tile<true>(s, g, t, dq, dr, sums, warpgroup, q, k, tile);
        }
      } else if (kTakeTurns) {
        ptx::named_arrive(2 + (warpgroup ^ 1), 256);
      }
      if (lane() == 0) ptx::barrier_arrive(&shared.empty[stage]);
      if (++stage == kBackwardStages) stage = 0, phase ^= 1;
    }
    if (kTakeTurns && warpgroup == 0) ptx::named_sync(2, 256);
    finish(dq, dr, sums, warpgroup);
  }

  // kMasked: some query may not see some key. Of other tiles, where registers allow, the products
  // of e are issued before t is there.
  template <bool kMasked>
  __device__ __forceinline__ void add_tile(float (&s)[32], float (&g)[32], float (&t)[32],
                                           float (&dq)[kHeadDim / 2], float (&dr)[kHeadDim / 2],
                                           RowSums& sums, int warpgroup, std::uint32_t q,
                                           std::uint32_t k, int tile) const {
    const std::uint32_t r = q + (2 * kPanels * kPanelBytes >> 4);
    const std::uint32_t d_o = r + (2 * kPanels * kPanelBytes >> 4);
    const std::uint32_t v = k + (kPanels * kPanelBytes >> 4);
    const auto issue = [&](float(&to)[32], std::uint32_t a, std::uint32_t b) {
#pragma unroll
      for (int kk = 0; kk < kHeadDim / 16; ++kk) {
        const std::uint32_t step = column_step(kk, kPanelBytes);
        Narrow::shared_a(to, a + step, b + step, kk != 0);
      }
      wgmma::commit();
    };
    const float4* own = &shared.statistics[own_query(warpgroup)];
    float lse[2];
    const auto read_lse = [&] {
      lse[0] = ptx::load_shared(&own[0].x);
      lse[1] = ptx::load_shared(&own[8].x);
    };
    // Behind the products, a read takes several times as long; before them, it takes registers.
    if (kOwnLoader) read_lse();
    wgmma::fence();
    issue(s, q, k);
    issue(g, d_o, v);
    issue(t, r, k);
    const bool masked = kMasked && !contains(shared.whole[warpgroup], tile);
    if (!kOwnLoader) read_lse();
    wgmma::wait<2>();
    wgmma::settle(s);
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // s -> p
      s[i] = ptx::exp2(fmaf(s[i], params.scale_log2, -lse[i >> 1 & 1]));
    }
    const float g_bar[2] = {ptx::load_shared(&own[0].z), ptx::load_shared(&own[8].z)};
    wgmma::wait<1>();
    wgmma::settle(g);
    if (kTakeTurns) ptx::named_arrive(2 + (warpgroup ^ 1), 256);
#pragma unroll
    for (int i = 0; i < 32; ++i) g[i] = s[i] * (g[i] - g_bar[i >> 1 & 1]);  // g -> e
    const float one_t_bar[2] = {ptx::load_shared(&own[0].y), ptx::load_shared(&own[8].y)};
    const float slope[2] = {ptx::load_shared(&own[0].w), ptx::load_shared(&own[8].w)};
    if constexpr (kMasked) {
      wgmma::wait<0>();
      wgmma::settle(t);
      if (masked) hide(s, g, t, warpgroup, tile);
    } else {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) add_e(g, dr, sums, kk, k);
      wgmma::commit();
      wgmma::wait<1>();
      wgmma::settle(t);
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      if (kMasked) add_e(g, dr, sums, kk, k);
      std::uint32_t ds[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int i = 8 * kk + 2 * word;
        const int half = word & 1;
        ds[word] =
            ptx::pack<T>(fmaf(one_t_bar[half] - t[i], g[i], -slope[half] * s[i]),
                         fmaf(one_t_bar[half] - t[i + 1], g[i + 1], -slope[half] * s[i + 1]));
      }
      wgmma::fence();
      Sums::template register_a<1>(dq, ds[0], ds[1], ds[2], ds[3], k + kk * kRowStep, true);
      add_to_sums<1>(sums, ds);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::settle(dq);
    wgmma::settle(dr);
    if (kSumsByProducts) wgmma::settle(sums);
  }

  // Adds 16 keys' e (kWhich = 0) or ds (1), rounded as they are, to the row sums. With a matrix
  // whose column kWhich is ones and all else zero it is a product 8 wide, and all four sums are one
  // accumulator.
  template <int kWhich>
  __device__ __forceinline__ static void add_to_sums(RowSums& sums,
                                                     const std::uint32_t (&weights)[4]) {
    if constexpr (kSumsByProducts) {
      extern __shared__ __align__(1024) std::uint8_t memory[];
      const std::uint32_t ones =
          wgmma::descriptor(ptx::shared_address(reinterpret_cast<Shared*>(memory)->ones[kWhich]));
      wgmma::Products<T, 8>::template register_a<0>(sums, weights[0], weights[1], weights[2],
                                                    weights[3], ones, true);
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float2 rounded = ptx::unpack<T>(weights[word]);
        sums[2 * (word & 1) + kWhich] += rounded.x + rounded.y;
      }
    }
  }

  // dr -= e K of 16 keys.
  __device__ __forceinline__ static void add_e(const float (&g)[32], float (&dr)[kHeadDim / 2],
                                               RowSums& sums, int kk, std::uint32_t k) {
    std::uint32_t e[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int i = 8 * kk + 2 * word;
      e[word] = ptx::pack<T>(g[i], g[i + 1]);
    }
    wgmma::fence();
    Sums::template register_a<1, -1>(dr, e[0], e[1], e[2], e[3], k + kk * kRowStep, true);
    add_to_sums<0>(sums, e);
  }

  // Zeros p, e and t where the query does not see the key, whatever they are.
  __device__ __forceinline__ void hide(float (&s)[32], float (&g)[32], float (&t)[32],
                                       int warpgroup, int tile) const {
    const int column = tile * kBackwardRows + 2 * (lane() & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Range seen = shared.keys[own_query(warpgroup) + 8 * half];
      seen = {seen.begin - column, seen.end - column};
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int i = 4 * (n >> 1) + 2 * half + (n & 1);
        if (!contains(seen, 8 * (n >> 1) + (n & 1))) s[i] = g[i] = t[i] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void finish(float (&dq)[kHeadDim / 2], float (&dr)[kHeadDim / 2],
                                         RowSums& sums, int warpgroup) const {
    const Sequence& sequence = shared.sequence;
    const int head = shared.place.head;
    const int own = own_query(warpgroup);
    const int query = shared.place.tile * kBackwardTile + own;
    const int rows_left = sequence.mask.q_len - query;
    const float* reference_key =
        params.reference_keys +
        (shared.place.b * params.problem.num_kv_heads + head / params.group) * kHeadDim +
        2 * (lane() & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum_e = quad_sum(sums[2 * half]);
      const float sum_ds = quad_sum(sums[2 * half + 1]);
      // Of a single key p is 1 and everything else cancels, here as on paper.
      const float keep = shared.keys[own + 8 * half].size() == 1 ? 0.f : 1.f;
#pragma unroll
      for (int i = 2 * half; i < kHeadDim / 2; i += 4) {
        const float2 key = *reinterpret_cast<const float2*>(reference_key + 8 * (i / 4));
        dr[i] = keep * fmaf(sum_e, key.x, dr[i]);
        dr[i + 1] = keep * fmaf(sum_e, key.y, dr[i + 1]);
        dq[i] = keep * fmaf(-sum_ds, key.x, dq[i]);
        dq[i + 1] = keep * fmaf(-sum_ds, key.y, dq[i + 1]);
      }
      if ((lane() & 3) == 0 && 8 * half < rows_left) {
        const float4 given = shared.statistics[own + 8 * half];
        const std::int64_t row =
            statistics_begin(params, sequence, shared.place.b, head) + query + 8 * half;
        params.softmax[row] = {given.x + log2f(params.fold), params.fold * given.y};
        params.gradient[row] = {params.fold * (given.z + sum_e),
                                params.fold * params.fold * (given.w + sum_ds - sum_e)};
      }
    }
    const auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) +
             sequence.q_row(view.batch_stride, view.len_stride, query) + head * view.head_stride;
    };
    const int head_dim = static_cast<int>(params.problem.head_dim);
    store_gradient<T>(dq, params.scale, row_of(params.dq), params.dq.len_stride, rows_left,
                      head_dim);
    store_gradient<T>(dr, 1.f, row_of(params.dr), params.dr.len_stride, rows_left, head_dim);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(QueriesBlock<T, kHeadDim>::kThreads, 1)
    backward_queries(const __grid_constant__ BackwardMaps maps,
                     const __grid_constant__ BackwardParams params) {
  using Block = QueriesBlock<T, kHeadDim>;
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<QueriesShared<kHeadDim>*>(memory);
  // A query near the end sees the most keys: last tiles first.
  const BlockPlace place =
      place_block(params.problem, params.query_grid, params.sequences.cu_seqlens_q, true);
  if (place.b < 0) return;
  const Sequence sequence = sequence_at(params.problem, params.sequences, place.b);
  const Mask& mask = sequence.mask;
  const int first = place.tile * kBackwardTile;
  const Block block{maps, params, shared};
  const Range tiles = tiles_over(mask.keys({first, min(first + kBackwardTile, mask.q_len)}));
  if (threadIdx.x == 32) {
    shared.sequence = sequence;
    shared.place = place;
    shared.source = {static_cast<int>(sequence.kv_offset), place.head / params.group,
                     static_cast<int>(sequence.batch_idx), 0};
    shared.seen = mask.keys({0, mask.q_len});
    shared.tiles = tiles;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBackwardStages; ++i) {
      ptx::barrier_init(&shared.full[i], Block::kLoaders);
      ptx::barrier_init(&shared.empty[i], 8);
    }
    ptx::barrier_init(&shared.queries_full, 1);
    ptx::fence_barrier_init();
    if (!tiles.empty()) block.load_queries(sequence, place);
  }
  if (Block::kSumsByProducts && threadIdx.x < 128) {
    const int n = static_cast<int>(threadIdx.x);
    const std::uint32_t word = (n & 63) >> 3 == n >> 6 ? ptx::pack<T>(1.f, 1.f) : 0u;
    *reinterpret_cast<uint4*>(&shared.ones[0][16 * n]) = make_uint4(word, word, word, word);
    ptx::fence_async_proxy();
  }
  if (threadIdx.x < kBackwardTile) {
    const int n = static_cast<int>(threadIdx.x);
    const int query = first + n;
    const std::int64_t row = statistics_begin(params, sequence, place.b, place.head) + query;
    shared.keys[n] = mask.keys(query);
    float4 statistics = {INFINITY, 0.f, 0.f, 0.f};
    if (query < mask.q_len) {
      const float2 softmax = params.softmax[row];
      const float2 gradient = params.gradient[row];
      statistics = {softmax.x, softmax.y, gradient.x, gradient.y};
    }
    shared.statistics[n] = statistics;
    if (n % kBackwardRows == 0) {
      const int last = min(query + kBackwardRows, mask.q_len) - 1;
      shared.visible[n / kBackwardRows] =
          query < mask.q_len ? tiles_over(mask.keys({query, last + 1})) : Range{};
      shared.whole[n / kBackwardRows] = tiles_within(mask.keys(query), mask.keys(last));
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
