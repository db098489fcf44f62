// SPDX-License-Identifier: MIT
// The forward for every GPU from compute capability 8.0 on (docs/kernels.md, "Portable kernels").
//
// The Hopper forward's packed virtual rows on mma.sync: in every 16-row slab of a warp, row g is
// query g's q and row g + 8 its r, so that logits, probes and sums of a query sit in one thread
// (packed_rows.cuh). A block owns a tile of queries and walks its key tiles from the last to the
// first. With two stages of K and V a tile arrives under the products of the one before it; with
// one, K arrives under the products with V, and V under those with K.
#pragma once

#include <cassert>

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/place.cuh"
#include "cuda/portable_forward.h"
#include "parallax/paged_kv.h"

namespace parallax {

template <class T, int kHeadDim>
struct PortableForwardBlock {
  static constexpr PortableForwardTile kTile = portable_forward_tile(kHeadDim);
  static constexpr int kKeys = kTile.keys;
  static constexpr int kSlabs = kTile.slabs;
  using Rows = mma::Rows<kHeadDim>;
  using Row = PackedRow<T, kKeys>;
  // Shared memory, in bytes: the q and r tile, then stages of a tile of K and a tile of V. q and r
  // that stay in registers leave their place to the stages.
  static constexpr int kPackedBytes = 2 * kTile.queries() * Rows::kBytes;
  static constexpr int kStagesAt = kTile.q_in_registers ? 0 : kPackedBytes;
  static constexpr int kKeyBytes = kKeys * Rows::kBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kUsedBytes = kStagesAt + kTile.stages * kStageBytes;
  static constexpr int kSharedBytes = kUsedBytes > kPackedBytes ? kUsedBytes : kPackedBytes;

  const PortableForwardParams& params;
  std::uint32_t memory;  // shared
  RowMask mask;
  int first_query;  // of this warp, and
  int q_len;

  std::uint32_t packed[kTile.q_in_registers ? kHeadDim / 16 : 1][kSlabs]
                      [4];  // q and r, as operands
  float s[kSlabs][kKeys / 2];
  float o[kSlabs][kHeadDim / 2];
  Row rows[kSlabs];

  static __device__ __forceinline__ int lane() { return ptx::thread_index() & 31; }
  __device__ __forceinline__ int query_of(int slab) const {
    return first_query + 8 * slab + (lane() >> 2);
  }

  // Queries [0, present) of q and r, interleaved by eights.
  __device__ __forceinline__ void copy_queries(const Sequence& sequence, int head, int begin,
                                               int present) const {
    const auto copy = [&](const ConstView& view, int half) {
      const T* source = static_cast<const T*>(view.data) +
                        sequence.q_row(view.batch_stride, view.len_stride, begin) +
                        head * view.head_stride;
      Rows::template copy<kTile.queries(), kTile.threads()>(
          memory + half * 8 * Rows::kBytes, source, static_cast<int>(params.problem.head_dim),
          {0, present}, [&](int n) { return n * view.len_stride; },
          [](int n) { return 2 * n - (n & 7); });
    };
    copy(params.q, 0);
    copy(params.r, 1);
  }

  // Columns [16 k, 16 k + 16) of the warp's q and r.
  __device__ __forceinline__ void load_queries(std::uint32_t (&a)[kSlabs][4], int k) const {
    const std::uint32_t own =
        Rows::down(memory + (ptx::thread_index() >> 5) * kSlabs * 16 * Rows::kBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      ptx::load_matrices(a[slab], Rows::at(own, 16 * slab, k));
    }
  }

  __device__ __forceinline__ void keep_queries() {
    mma::wait_copies();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) load_queries(packed[k], k);
    __syncthreads();
  }

  // Key tile `tile` of k or v.
  __device__ __forceinline__ void copy_keys(std::uint32_t to, const T* source, const KvRows& tokens,
                                            Range seen, int tile) const {
    const int first = tile * kKeys;
    const auto offset = [&](int n) {
      const int key = first + n;
      assert((tokens.pages == nullptr ||
              (tokens.pages[key >> tokens.page_shift] >= 0 &&
               tokens.pages[key >> tokens.page_shift] < params.pages.num_pages)) &&
             "page_table: an entry of a visible token is no page");
      return tokens.offset(key);
    };
    Rows::template copy<kKeys, kTile.threads()>(
        to, source, static_cast<int>(params.problem.head_dim),
        {seen.begin - first, seen.end - first}, offset, [](int n) { return n; });
  }

  // Logits and probes of the tile of K at `keys`.
  __device__ __forceinline__ void multiply_keys(std::uint32_t keys) {
    const std::uint32_t across = Rows::across(keys);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[slab][i] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      auto& a = packed[kTile.q_in_registers ? k : 0];
      if constexpr (!kTile.q_in_registers) load_queries(a, k);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        std::uint32_t b[4];
        ptx::load_matrices(b, Rows::at(across, 16 * n, k));
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          mma::multiply<T>(s[slab] + 8 * n, a[slab], b[0], b[1]);
          mma::multiply<T>(s[slab] + 8 * n + 4, a[slab], b[2], b[3]);
        }
      }
    }
  }

  // o += {p, w} V, the tile of V at `values`.
  __device__ __forceinline__ void multiply_values(std::uint32_t values) {
    const std::uint32_t down = Rows::down(values);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      std::uint32_t a[kSlabs][4];
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[slab][i] = ptx::pack<T>(s[slab][8 * k + 2 * i], s[slab][8 * k + 2 * i + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        std::uint32_t b[4];
        ptx::load_matrices_transposed(b, Rows::at(down, 16 * k, n));
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          mma::multiply<T>(o[slab] + 8 * n, a[slab], b[0], b[1]);
          mma::multiply<T>(o[slab] + 8 * n + 4, a[slab], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void softmax(int tile, bool interior) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      if (interior) {
        float factor;
        if (rows[slab].raise(s[slab], params.scale_log2, &factor)) scale_sums(o[slab], factor);
        rows[slab].exponentiate(s[slab], params.scale_log2);
        rows[slab].weigh_probes(s[slab]);
      } else {
        const Range keys = mask.keys(min(query_of(slab), q_len - 1));
        const auto change = rows[slab].add_edge(
            s[slab], params.scale_log2, {keys.begin - tile * kKeys, keys.end - tile * kKeys});
        scale_sums(o[slab], change.factor);
        shift_sums(o[slab], change.shift);
      }
    }
  }

  __device__ __forceinline__ void store(const Sequence& sequence, int head) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int query = query_of(slab);
      const Finalized<float> result = rows[slab].finish();
      const bool valid = query < q_len;
      const int head_dim = static_cast<int>(params.problem.head_dim);
      const auto row_of = [&](const View& view) {
        return static_cast<T*>(view.data) +
               sequence.q_row(view.batch_stride, view.len_stride, query) + head * view.head_stride;
      };
      store_row(o[slab], row_of(params.o), valid, head_dim,
                [&](float o1, float o2) { return result.o(o1, o2); });
      if (params.v_bar.data != nullptr) {
        store_row(o[slab], row_of(params.v_bar), valid, head_dim,
                  [&](float o1, float) { return result.v_bar(o1); });
      }
      if (valid && (lane() & 3) == 0) {
        const std::int64_t index = row_index(params.problem, sequence, head, query);
        if (params.lse != nullptr) params.lse[index] = result.lse;
        if (params.t_bar != nullptr) params.t_bar[index] = result.t_bar;
      }
    }
  }

  __device__ __forceinline__ void run(const Sequence& sequence, int head, int q_begin) {
    const int q_end = min(q_begin + kTile.queries(), q_len);
    const Range seen = {mask.keys(q_begin).begin, mask.keys(q_end - 1).end};
    const KeyTiles tiles = key_tiles(mask, {q_begin, q_end}, kKeys);
    // This warp's part: the tiles that it sees at all, and those that need no care.
    KeyTiles own;
    Range interior;
    if (first_query < q_len) {
      const Range queries = {first_query, min(first_query + 8 * kSlabs, q_len)};
      own = key_tiles(mask, queries, kKeys);
      interior = interior_tiles(mask, queries, kKeys);
    }
    const int kv_head = head / params.group;
    const auto* k = static_cast<const T*>(params.k.data) + kv_head * params.k.head_stride;
    const auto* v = static_cast<const T*>(params.v.data) + kv_head * params.v.head_stride;
    const KvRows k_rows =
        kv_rows(params.k.batch_stride, params.k.len_stride, params.pages, sequence);
    const KvRows v_rows =
        kv_rows(params.v.batch_stride, params.v.len_stride, params.pages, sequence);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[slab][i] = 0.0f;
    }
    constexpr bool kTwoStages = kTile.stages == 2;
    std::uint32_t stage = memory + kStagesAt;
    const auto copy_k = [&](std::uint32_t to, int tile) { copy_keys(to, k, k_rows, seen, tile); };
    const auto copy_v = [&](std::uint32_t to, int tile) {
      copy_keys(to + kKeyBytes, v, v_rows, seen, tile);
    };
    int tile = tiles.first + tiles.count - 1;
    if (tiles.count > 0) {
      copy_queries(sequence, head, q_begin, q_end - q_begin);
      if constexpr (kTile.q_in_registers) keep_queries();
      copy_k(stage, tile);
      if constexpr (kTwoStages) copy_v(stage, tile);
    }
#pragma unroll 1
    for (; tile >= tiles.first; --tile) {
      const bool meets = tile >= own.first && tile < own.first + own.count;
      const bool more = tile > tiles.first;
      mma::wait_copies();
      __syncthreads();  // K has landed, everyone is done with what the next copies overwrite
      const std::uint32_t current = stage;
      if constexpr (kTwoStages) {
        stage = 2 * (memory + kStagesAt) + kStageBytes - stage;
        if (more) {
          copy_k(stage, tile - 1);
          copy_v(stage, tile - 1);
        }
      } else {
        copy_v(stage, tile);
      }
      if (meets) multiply_keys(current);
      if constexpr (!kTwoStages) {
        mma::wait_copies();
        __syncthreads();  // V has landed, everyone is done with K
        if (more) copy_k(stage, tile - 1);
      }
      if (meets) {
        softmax(tile, tile >= interior.begin && tile < interior.end);
        multiply_values(current + kKeyBytes);
      }
    }
    store(sequence, head);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(portable_forward_tile(kHeadDim).threads(),
                                  portable_forward_tile(kHeadDim).blocks)
    portable_forward_kernel(const __grid_constant__ PortableForwardParams params) {
  using Block = PortableForwardBlock<T, kHeadDim>;
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  const BlockPlace place =
      place_block(params.problem, params.grid, params.sequences.cu_seqlens_q, true);
  if (place.b < 0) return;
  const Sequence sequence = sequence_at(params.problem, params.sequences, place.b);
  const int q_begin = place.tile * Block::kTile.queries();
  const int warp = ptx::uniform(threadIdx.x / 32);
  Block block{params, ptx::shared_address(shared_memory), row_mask(sequence.mask),
              q_begin + warp * 8 * Block::kSlabs, sequence.mask.q_len};
  block.run(sequence, place.head, q_begin);
}

template <class T, int kHeadDim>
Status launch_portable_forward(const PortableForwardParams& params, cudaStream_t stream) {
  using Block = PortableForwardBlock<T, kHeadDim>;
  static_assert(Block::kSharedBytes <= 99 * 1024);
  const auto kernel = portable_forward_kernel<T, kHeadDim>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Block::kSharedBytes);
  if (Status s = check_cuda(error, "forward: cudaFuncSetAttribute"); !s.ok()) return s;
  const auto blocks = static_cast<unsigned>(num_blocks(params.problem, params.grid));
  kernel<<<blocks, Block::kTile.threads(), Block::kSharedBytes, stream>>>(params);
  return check_cuda(cudaGetLastError(), "forward: launch");
}

}  // namespace parallax

#define PARALLAX_INSTANCE(type, head_dim)                                               \
  namespace parallax {                                                                  \
  template Status launch_portable_forward<type, head_dim>(const PortableForwardParams&, \
                                                          cudaStream_t);                \
  }
