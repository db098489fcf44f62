// SPDX-License-Identifier: MIT
// The backward for every GPU from compute capability 8.0 on (docs/kernels.md, "Portable kernels").
//
// The Hopper backward's two kernels on mma.sync, with its formulas, statistics and order of sums
// (backward_queries.cuh, backward_keys.cuh). A warp owns 16 rows, queries or keys; the other side
// arrives through two stages of asynchronous copies, one tile under the products of the other.
// Weights are made in the thread that holds them as operand of the products that accumulate.
#pragma once

#include "cuda/backward_prepare.cuh"
#include "cuda/backward_tile.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/portable_backward.h"

namespace parallax {

// What both kernels are made of.
template <class T, int kHeadDim>
struct PortableBackward {
  static constexpr int kThreads = 128;
  static constexpr int kRows = kPortableBackwardTile;
  static constexpr int kStream = portable_backward_stream(kHeadDim);
  static constexpr int kWarpRows = 16;
  using Rows = mma::Rows<kHeadDim>;
  static constexpr int kOwnBytes = kRows * Rows::kBytes;       // of one tensor
  static constexpr int kStreamBytes = kStream * Rows::kBytes;  // of one tensor
  using Weights = float[kStream / 2];  // a warp's 16 rows and the streamed tile's
  using Sums = float[kHeadDim / 2];

  static __device__ __forceinline__ int lane() { return ptx::thread_index() & 31; }
  static __device__ __forceinline__ int warp() { return ptx::uniform(ptx::thread_index() >> 5); }

  // kCount rows from `row` (in elements) on, of which `present` exist and may be read.
  template <int kCount>
  static __device__ __forceinline__ void copy(std::uint32_t to, const ConstView& view,
                                              std::int64_t row, int head, int head_dim,
                                              Range present) {
    const T* source = static_cast<const T*>(view.data) + row + head * view.head_stride;
    Rows::template copy<kCount, kThreads>(
        to, source, head_dim, present, [&](int n) { return n * view.len_stride; },
        [](int n) { return n; });
  }

  static __device__ __forceinline__ void clear(Weights& weights) {
#pragma unroll
    for (int i = 0; i < kStream / 2; ++i) weights[i] = 0.f;
  }

  // to += a b': 16 columns of both.
  static __device__ __forceinline__ void multiply(Weights& to, const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[kStream / 16][4]) {
#pragma unroll
    for (int n = 0; n < kStream / 16; ++n) {
      mma::multiply<T>(to + 8 * n, a, b[n][0], b[n][1]);
      mma::multiply<T>(to + 8 * n + 4, a, b[n][2], b[n][3]);
    }
  }

  // 16 columns of the rows of a streamed tile.
  static __device__ __forceinline__ void load(std::uint32_t (&b)[kStream / 16][4],
                                              std::uint32_t across, int k) {
#pragma unroll
    for (int n = 0; n < kStream / 16; ++n) ptx::load_matrices(b[n], Rows::at(across, 16 * n, k));
  }

  // to += a b, 16 rows of b.
  static __device__ __forceinline__ void accumulate(Sums& to, const std::uint32_t (&a)[4], int n,
                                                    const std::uint32_t (&b)[4]) {
    mma::multiply<T>(to + 8 * n, a, b[0], b[1]);
    mma::multiply<T>(to + 8 * n + 4, a, b[2], b[3]);
  }
};

// ---- dq and dr: 64 queries a block

template <class T, int kHeadDim>
struct PortableQueriesBlock : PortableBackward<T, kHeadDim> {
  using Base = PortableBackward<T, kHeadDim>;
  using Rows = typename Base::Rows;
  using Base::kOwnBytes;
  using Base::kStream;
  using Base::kStreamBytes;
  using typename Base::Sums;
  using typename Base::Weights;
  // q, r, d_o; two stages of k and v.
  static constexpr int kStagesAt = 3 * kOwnBytes;
  static constexpr int kSharedBytes = kStagesAt + 4 * kStreamBytes;

  const BackwardParams& params;
  const Sequence& sequence;
  const BlockPlace& place;
  std::uint32_t memory;
  int query;  // the first of the thread's two, eight apart

  // Of the two queries.
  Range keys[2];
  float4 statistics[2];
  float sum_dt[2];  // of the rounded weights -e and ds
  float sum_ds[2];
  Sums dq;
  Sums dr;

  __device__ __forceinline__ int head_dim() const {
    return static_cast<int>(params.problem.head_dim);
  }

  __device__ __forceinline__ void copy_queries(int first) const {
    const Range present = {0, sequence.mask.q_len - first};
    const auto copy = [&](int at, const ConstView& view) {
      Base::template copy<Base::kRows>(memory + at * kOwnBytes, view,
                                       sequence.q_row(view.batch_stride, view.len_stride, first),
                                       place.head, head_dim(), present);
    };
    copy(0, params.q);
    copy(1, params.r);
    copy(2, params.d_o);
  }

  __device__ __forceinline__ void copy_keys(int stage, int tile, Range seen) const {
    const int first = tile * kStream;
    const auto copy = [&](int at, const ConstView& view) {
      Base::template copy<kStream>(memory + kStagesAt + (2 * stage + at) * kStreamBytes, view,
                                   sequence.kv_row(view.batch_stride, view.len_stride, first),
                                   place.head / params.group, head_dim(),
                                   {seen.begin - first, seen.end - first});
    };
    copy(0, params.k);
    copy(1, params.v);
  }

  // Zeros p, -e and t where the query does not see the key, whatever they are.
  __device__ __forceinline__ void hide(Weights& s, Weights& g, Weights& t, int tile) const {
    const int column = tile * kStream + 2 * (Base::lane() & 3);
#pragma unroll
    for (int i = 0; i < kStream / 2; ++i) {
      const int half = i >> 1 & 1;
      const int key = column + 8 * (i >> 2) + (i & 1);
      if (!contains(keys[half], key)) s[i] = g[i] = t[i] = 0.f;
    }
  }

  __device__ __forceinline__ void add_tile(int stage, int tile, bool masked) {
    const std::uint32_t own = Rows::down(memory + Base::warp() * Base::kWarpRows * Rows::kBytes);
    const std::uint32_t from = memory + kStagesAt + 2 * stage * kStreamBytes;
    const std::uint32_t k_across = Rows::across(from);
    const std::uint32_t v_across = k_across + kStreamBytes;
    Weights s, t, g;
    Base::clear(s);
    Base::clear(t);
    Base::clear(g);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      std::uint32_t a[4], b[kStream / 16][4];
      Base::load(b, k_across, k);
      ptx::load_matrices(a, Rows::at(own, 0, k));
      Base::multiply(s, a, b);
      ptx::load_matrices(a, Rows::at(own + kOwnBytes, 0, k));
      Base::multiply(t, a, b);
      Base::load(b, v_across, k);
      ptx::load_matrices(a, Rows::at(own + 2 * kOwnBytes, 0, k));
      Base::multiply(g, a, b);
    }
#pragma unroll
    for (int i = 0; i < kStream / 2; ++i) {  // s -> p, g -> -e
      const float4& given = statistics[i >> 1 & 1];
      s[i] = ptx::exp2(fmaf(s[i], params.scale_log2, -given.x));
      g[i] = s[i] * (given.z - g[i]);
    }
    if (masked) hide(s, g, t, tile);
    const std::uint32_t k_down = Rows::down(from);
#pragma unroll
    for (int k = 0; k < kStream / 16; ++k) {
      std::uint32_t dt[4], ds[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int i = 8 * k + 2 * word;
        const int half = word & 1;
        const float4& given = statistics[half];
        dt[word] = ptx::pack<T>(g[i], g[i + 1]);
        ds[word] = ptx::pack<T>(fmaf(t[i] - given.y, g[i], -given.w * s[i]),
                                fmaf(t[i + 1] - given.y, g[i + 1], -given.w * s[i + 1]));
        const float2 rounded_dt = ptx::unpack<T>(dt[word]);
        const float2 rounded_ds = ptx::unpack<T>(ds[word]);
        sum_dt[half] += rounded_dt.x + rounded_dt.y;
        sum_ds[half] += rounded_ds.x + rounded_ds.y;
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        std::uint32_t b[4];
        ptx::load_matrices_transposed(b, Rows::at(k_down, 16 * k, n));
        Base::accumulate(dr, dt, n, b);
        Base::accumulate(dq, ds, n, b);
      }
    }
  }

  // The corrections of docs/math.md sections 7.3 and 7.4, and the results.
  __device__ __forceinline__ void finish() {
    const int rows_left = sequence.mask.q_len - query;
    const int kv_head = place.head / params.group;
    const float* reference_key = params.reference_keys +
                                 (place.b * params.problem.num_kv_heads + kv_head) * kHeadDim +
                                 2 * (Base::lane() & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        sum_dt[half] += __shfl_xor_sync(0xffffffffu, sum_dt[half], step);
        sum_ds[half] += __shfl_xor_sync(0xffffffffu, sum_ds[half], step);
      }
      // Of a single key p is 1 and everything else cancels, here as on paper.
      const float keep = keys[half].size() == 1 ? 0.f : 1.f;
#pragma unroll
      for (int i = 2 * half; i < kHeadDim / 2; i += 4) {
        const float2 key = *reinterpret_cast<const float2*>(reference_key + 8 * (i / 4));
        dr[i] = keep * fmaf(-sum_dt[half], key.x, dr[i]);
        dr[i + 1] = keep * fmaf(-sum_dt[half], key.y, dr[i + 1]);
        dq[i] = keep * fmaf(-sum_ds[half], key.x, dq[i]);
        dq[i + 1] = keep * fmaf(-sum_ds[half], key.y, dq[i + 1]);
      }
      if ((Base::lane() & 3) == 0 && 8 * half < rows_left) {
        const float4& given = statistics[half];
        const std::int64_t row =
            statistics_begin(params, sequence, place.b, place.head) + query + 8 * half;
        params.softmax[row] = {given.x + log2f(params.fold), params.fold * given.y};
        params.gradient[row] = {
            params.fold * (given.z - sum_dt[half]),
            params.fold * params.fold * (given.w + sum_ds[half] + sum_dt[half])};
      }
    }
    const auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) +
             sequence.q_row(view.batch_stride, view.len_stride, query) +
             place.head * view.head_stride;
    };
    store_gradient<T>(dq, params.scale, row_of(params.dq), params.dq.len_stride, rows_left,
                      head_dim());
    store_gradient<T>(dr, 1.f, row_of(params.dr), params.dr.len_stride, rows_left, head_dim());
  }

  __device__ __forceinline__ void run() {
    const Mask& mask = sequence.mask;
    const int first = place.tile * Base::kRows;
    const Range seen = mask.keys({first, min(first + Base::kRows, mask.q_len)});
    const Range tiles = tiles_over(seen, kStream);
    if (!tiles.empty()) {
      copy_queries(first);
      copy_keys(0, tiles.begin, seen);
    }
    const int warp_first = first + Base::warp() * Base::kWarpRows;
    query = warp_first + (Base::lane() >> 2);
    Range visible;  // key tiles that the warp's queries see at all,
    Range whole;    // and that need no mask
    if (warp_first < mask.q_len) {
      const int last = min(warp_first + Base::kWarpRows, mask.q_len) - 1;
      visible = tiles_over(mask.keys({warp_first, last + 1}), kStream);
      whole = tiles_within(mask.keys(warp_first), mask.keys(last), kStream);
    }
    const std::int64_t row = statistics_begin(params, sequence, place.b, place.head) + query;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      statistics[half] = {INFINITY, 0.f, 0.f, 0.f};
      keys[half] = {};
      if (query + 8 * half < mask.q_len) {
        keys[half] = mask.keys(query + 8 * half);
        const float2 softmax = params.softmax[row + 8 * half];
        const float2 gradient = params.gradient[row + 8 * half];
        statistics[half] = {softmax.x, softmax.y, gradient.x, gradient.y};
      }
      sum_dt[half] = sum_ds[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = dr[i] = 0.f;
    int stage = 0;
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile, stage ^= 1) {
      mma::wait_copies();
      __syncthreads();  // the tile has landed, everyone is done with the other stage
      if (tile + 1 < tiles.end) copy_keys(stage ^ 1, tile + 1, seen);
      if (contains(visible, tile)) add_tile(stage, tile, !contains(whole, tile));
    }
    finish();
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(128, 2)
    portable_backward_queries(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  // A query near the end sees the most keys: last tiles first.
  const BlockPlace place =
      place_block(params.problem, params.query_grid, params.sequences.cu_seqlens_q, true);
  if (place.b < 0) return;
  const Sequence sequence = sequence_at(params.problem, params.sequences, place.b);
  PortableQueriesBlock<T, kHeadDim> block{
      {}, params, sequence, place, ptx::shared_address(shared_memory)};
  block.run();
}

// ---- dk and dv: 64 keys a block, transposed: keys are rows

template <class T, int kHeadDim>
struct PortableKeysBlock : PortableBackward<T, kHeadDim> {
  using Base = PortableBackward<T, kHeadDim>;
  using Rows = typename Base::Rows;
  using Base::kOwnBytes;
  using Base::kStream;
  using Base::kStreamBytes;
  using typename Base::Sums;
  using typename Base::Weights;
  // k, v; two stages of q, r and d_o; two of the statistics.
  static constexpr int kStagesAt = 2 * kOwnBytes;
  static constexpr int kStatisticsAt = kStagesAt + 6 * kStreamBytes;
  static constexpr int kStatisticsBytes = kStream * static_cast<int>(sizeof(float2));  // of one
  static constexpr int kSharedBytes = kStatisticsAt + 4 * kStatisticsBytes;

  const BackwardParams& params;
  const Sequence& sequence;
  const BlockPlace& place;
  std::uint32_t memory;
  const std::uint8_t* statistics;  // of stage 0: softmax of the tile's queries, then gradient

  Range queries[2];  // that see the thread's two keys, eight apart
  Sums dk;
  Sums dv;

  __device__ __forceinline__ int head_dim() const {
    return static_cast<int>(params.problem.head_dim);
  }

  __device__ __forceinline__ void copy_keys(int first) const {
    const Mask& mask = sequence.mask;
    const Range present = {mask.kv_begin - first, mask.kv_end - first};
    const auto copy = [&](int at, const ConstView& view) {
      Base::template copy<Base::kRows>(memory + at * kOwnBytes, view,
                                       sequence.kv_row(view.batch_stride, view.len_stride, first),
                                       place.head, head_dim(), present);
    };
    copy(0, params.k);
    copy(1, params.v);
  }

  __device__ __forceinline__ void copy_queries(int stage, int tile, int head) const {
    const int first = tile * kStream;
    const Range present = {0, sequence.mask.q_len - first};
    const auto copy = [&](int at, const ConstView& view) {
      Base::template copy<kStream>(memory + kStagesAt + (3 * stage + at) * kStreamBytes, view,
                                   sequence.q_row(view.batch_stride, view.len_stride, first), head,
                                   head_dim(), present);
    };
    copy(0, params.q);
    copy(1, params.r);
    copy(2, params.d_o);
    // Two queries a copy. Rows behind the last query exist: they see nothing.
    const int thread = ptx::thread_index();
    if (thread < kStream) {
      const std::int64_t row = statistics_begin(params, sequence, place.b, head) + first;
      const float2* source = thread < kStream / 2 ? params.softmax : params.gradient;
      mma::copy_or_clear(memory + kStatisticsAt + 2 * stage * kStatisticsBytes + 16 * thread,
                         source + row + 2 * (thread % (kStream / 2)), true);
    }
  }

  // Of the queries of columns 8 n + 2 (lane % 4) and the next.
  __device__ __forceinline__ float4 statistics_of(int stage, bool of_gradient, int n) const {
    const auto* from = reinterpret_cast<const float2*>(
        statistics + (2 * stage + (of_gradient ? 1 : 0)) * kStatisticsBytes);
    return ptx::load_shared(from + 8 * n + 2 * (Base::lane() & 3));
  }

  // Zeros p, u and g where the query does not see the key, whatever they are.
  __device__ __forceinline__ void hide(Weights& s, Weights& t, Weights& g, int tile) const {
    const int column = tile * kStream + 2 * (Base::lane() & 3);
#pragma unroll
    for (int i = 0; i < kStream / 2; ++i) {
      const int query = column + 8 * (i >> 2) + (i & 1);
      if (!contains(queries[i >> 1 & 1], query)) s[i] = t[i] = g[i] = 0.f;
    }
  }

  __device__ __forceinline__ void add_tile(int stage, int tile, bool masked) {
    const std::uint32_t own = Rows::down(memory + Base::warp() * Base::kWarpRows * Rows::kBytes);
    const std::uint32_t from = memory + kStagesAt + 3 * stage * kStreamBytes;
    const std::uint32_t across = Rows::across(from);
    Weights s, t, g;
    Base::clear(s);
    Base::clear(t);
    Base::clear(g);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      std::uint32_t a[4], b[kStream / 16][4];
      ptx::load_matrices(a, Rows::at(own, 0, k));
      Base::load(b, across, k);
      Base::multiply(s, a, b);
      Base::load(b, across + kStreamBytes, k);
      Base::multiply(t, a, b);
      ptx::load_matrices(a, Rows::at(own + kOwnBytes, 0, k));
      Base::load(b, across + 2 * kStreamBytes, k);
      Base::multiply(g, a, b);
    }
#pragma unroll
    for (int n = 0; n < kStream / 8; ++n) {  // s -> p / scale, t -> scale u
      const float4 c = statistics_of(stage, false, n);
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; i += 2) {
        s[i] = ptx::exp2(fmaf(s[i], params.scale_log2, -c.x));
        s[i + 1] = ptx::exp2(fmaf(s[i + 1], params.scale_log2, -c.z));
        t[i] = fmaf(t[i], -params.fold, c.y);
        t[i + 1] = fmaf(t[i + 1], -params.fold, c.w);
      }
    }
    if (masked) hide(s, t, g, tile);
    const std::uint32_t down = Rows::down(from);
#pragma unroll
    for (int k = 0; k < kStream / 16; ++k) {
      std::uint32_t a[4], dt[4], ds[4];  // p u, -e, scale ds
#pragma unroll
      for (int n = 2 * k; n < 2 * k + 2; ++n) {
        const float4 c = statistics_of(stage, true, n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * n + 2 * half;
          const int word = 2 * (n & 1) + half;
          const float dt0 = s[i] * fmaf(g[i], -params.fold, c.x);
          const float dt1 = s[i + 1] * fmaf(g[i + 1], -params.fold, c.z);
          a[word] = ptx::pack<T>(s[i] * t[i], s[i + 1] * t[i + 1]);
          ds[word] =
              ptx::pack<T>(-fmaf(t[i], dt0, c.y * s[i]), -fmaf(t[i + 1], dt1, c.w * s[i + 1]));
          dt[word] = ptx::pack<T>(dt0, dt1);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        std::uint32_t b[4];
        ptx::load_matrices_transposed(b, Rows::at(down + 2 * kStreamBytes, 16 * k, n));
        Base::accumulate(dv, a, n, b);
        ptx::load_matrices_transposed(b, Rows::at(down, 16 * k, n));
        Base::accumulate(dk, ds, n, b);
        ptx::load_matrices_transposed(b, Rows::at(down + kStreamBytes, 16 * k, n));
        Base::accumulate(dk, dt, n, b);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const Mask& mask = sequence.mask;
    const int first = place.tile * Base::kRows;
    const Range tiles = tiles_over(mask.queries({first, first + Base::kRows}), kStream);
    int next_head = place.head * params.group;
    if (!tiles.empty()) {
      copy_keys(first);
      copy_queries(0, tiles.begin, next_head);
    }
    const int warp_first = first + Base::warp() * Base::kWarpRows;
    const int warp_end = warp_first + Base::kWarpRows;
    const int key = warp_first + (Base::lane() >> 2);
    // Query tiles that the warp's keys meet at all, and that need no mask.
    const Range visible = tiles_over(mask.queries({warp_first, warp_end}), kStream);
    const Range whole = tiles_within(mask.queries({warp_first, warp_first + 1}),
                                     mask.queries({warp_end - 1, warp_end}), kStream);
    queries[0] = mask.queries({key, key + 1});
    queries[1] = mask.queries({key + 8, key + 9});
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    int tile = tiles.begin;
    int stage = 0;
#pragma unroll 1
    for (int left = tiles.size() * params.group; left > 0; --left, stage ^= 1) {
      int next = tile + 1;
      if (next == tiles.end) {
        next = tiles.begin;
        ++next_head;
      }
      mma::wait_copies();
      __syncthreads();  // the tile has landed, everyone is done with the other stage
      if (left > 1) copy_queries(stage ^ 1, next, next_head);
      if (contains(visible, tile)) add_tile(stage, tile, !contains(whole, tile));
      tile = next;
    }
    const int rows_left = sequence.kv_len - key;
    const auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) + sequence.kv_row(view.batch_stride, view.len_stride, key) +
             place.head * view.head_stride;
    };
    store_gradient<T>(dk, 1.f, row_of(params.dk), params.dk.len_stride, rows_left, head_dim());
    store_gradient<T>(dv, 1.f, row_of(params.dv), params.dv.len_stride, rows_left, head_dim());
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(128, 2)
    portable_backward_keys(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  // A key near the start is seen by the most queries: first tiles first.
  const BlockPlace place =
      place_block(params.problem, params.key_grid, params.sequences.cu_seqlens_k, false);
  if (place.b < 0) return;
  const Sequence sequence = sequence_at(params.problem, params.sequences, place.b);
  using Block = PortableKeysBlock<T, kHeadDim>;
  Block block{{},
              params,
              sequence,
              place,
              ptx::shared_address(shared_memory),
              shared_memory + Block::kStatisticsAt};
  block.run();
}

// ---- launch

template <class Kernel>
Status launch_portable_tiles(Kernel kernel, const char* name, std::int64_t blocks, int shared_bytes,
                             const BackwardParams& params, cudaStream_t stream) {
  if (blocks == 0) return {};
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (Status s = check_cuda(error, name); !s.ok()) return s;
  kernel<<<static_cast<unsigned>(blocks), 128, shared_bytes, stream>>>(params);
  return check_cuda(cudaGetLastError(), name);
}

template <class T, int kHeadDim>
Status launch_portable_backward(const BackwardParams& params, cudaStream_t stream) {
  constexpr int kQueriesBytes = PortableQueriesBlock<T, kHeadDim>::kSharedBytes;
  constexpr int kKeysBytes = PortableKeysBlock<T, kHeadDim>::kSharedBytes;
  static_assert(kQueriesBytes <= 99 * 1024 && kKeysBytes <= 99 * 1024);
  if (Status s = launch_prepare<T, kHeadDim>(params, stream); !s.ok()) return s;
  if (Status s = launch_portable_tiles(portable_backward_queries<T, kHeadDim>, "backward: queries",
                                       num_blocks(params.problem, params.query_grid), kQueriesBytes,
                                       params, stream);
      !s.ok()) {
    return s;
  }
  return launch_portable_tiles(portable_backward_keys<T, kHeadDim>, "backward: keys",
                               num_blocks(params.problem, params.key_grid), kKeysBytes, params,
                               stream);
}

}  // namespace parallax

#define PARALLAX_INSTANCE(type, head_dim)                                                        \
  namespace parallax {                                                                           \
  template Status launch_portable_backward<type, head_dim>(const BackwardParams&, cudaStream_t); \
  }
