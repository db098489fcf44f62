// SPDX-License-Identifier: MIT
// The first kernel of the backward: a query's statistics, a sequence's reference key.
#pragma once

#include "cuda/backward_tile.cuh"
#include "cuda/launch.h"

namespace parallax {

// Eight elements of one row as floats.
template <class T>
__device__ __forceinline__ void load_row(const ConstView& view, std::int64_t row_offset, int head,
                                         int column, float (&values)[8]) {
  const T* data = static_cast<const T*>(view.data) + row_offset + head * view.head_stride + column;
  const uint4 words = *reinterpret_cast<const uint4*>(data);
  const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack<T>(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// The mean of the first 64 keys that anything of the sequence sees. Any vector near the keys' mean
// would do: what it multiplies is zero but for rounding.
template <class T, int kHeadDim>
__device__ __forceinline__ void prepare_reference_key(const BackwardParams& params, int b,
                                                      int head) {
  constexpr int kLanes = kHeadDim / 8;
  constexpr int kParts = 256 / kLanes;
  __shared__ float sums[kParts][kHeadDim];
  const Sequence sequence = sequence_at(params.problem, params.sequences, b);
  Range seen;
  if (sequence.mask.q_len > 0) seen = sequence.mask.keys({0, sequence.mask.q_len});
  const int count = min(seen.size(), 64);
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int part = static_cast<int>(threadIdx.x) / kLanes;
  float total[8] = {};
  if (column < params.problem.head_dim) {
    for (int j = part; j < count; j += kParts) {
      float key[8];
      const std::int64_t row =
          sequence.kv_row(params.k.batch_stride, params.k.len_stride, seen.begin + j);
      load_row<T>(params.k, row, head, column, key);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += key[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[part][column + i] = total[i];
  __syncthreads();
  if (threadIdx.x >= kHeadDim) return;
  float sum = 0;
  for (int i = 0; i < kParts; ++i) sum += sums[i][threadIdx.x];
  params.reference_keys[(b * params.problem.num_kv_heads + head) * kHeadDim + threadIdx.x] =
      count > 0 ? sum / static_cast<float>(count) : 0.f;
}

// Grid: {tiles of 64 queries, of all sequences, then a block a sequence; heads}.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256)
    backward_prepare(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim / 8;  // to a row
  const AttentionProblem& problem = params.problem;
  const int head = static_cast<int>(blockIdx.y);
  const int num_tiles =
      params.num_statistics_tiles * (problem.packed ? 1 : static_cast<int>(problem.batch));
  int tile = static_cast<int>(blockIdx.x);
  if (tile >= num_tiles) {
    if (head < problem.num_kv_heads) {
      prepare_reference_key<T, kHeadDim>(params, tile - num_tiles, head);
    }
    return;
  }
  BlockPlace place{tile / params.num_statistics_tiles, head, tile % params.num_statistics_tiles};
  if (problem.packed) {
    place.b = -1;
    find_packed_tile(params.sequences.cu_seqlens_q, static_cast<int>(problem.batch), kBackwardRows,
                     tile, &place);
    if (place.b < 0) return;
  }
  const Sequence sequence = sequence_at(problem, params.sequences, place.b);
  const std::int64_t statistics = statistics_begin(params, sequence, place.b, head);
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
#pragma unroll
  for (int n = 0; n < kBackwardRows; n += 256 / kLanes) {
    const int i = place.tile * kBackwardRows + n + static_cast<int>(threadIdx.x) / kLanes;
    float g_bar = 0;
    float delta = 0;
    if (i < sequence.mask.q_len && column < problem.head_dim) {
      float d_o[8], o[8], v_bar[8];
      load_row<T>(params.d_o, sequence.q_row(params.d_o.batch_stride, params.d_o.len_stride, i),
                  head, column, d_o);
      load_row<T>(params.o, sequence.q_row(params.o.batch_stride, params.o.len_stride, i), head,
                  column, o);
      load_row<T>(params.v_bar,
                  sequence.q_row(params.v_bar.batch_stride, params.v_bar.len_stride, i), head,
                  column, v_bar);
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        g_bar += d_o[d] * v_bar[d];
        delta += d_o[d] * o[d];
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      g_bar += __shfl_xor_sync(0xffffffffu, g_bar, step);
      delta += __shfl_xor_sync(0xffffffffu, delta, step);
    }
    if (column != 0) continue;
    float2 softmax = {INFINITY, 0.f};  // of a query that sees nothing: every p is 0
    float2 gradient = {0.f, 0.f};
    if (i < sequence.mask.q_len) {
      const std::int64_t row = row_index(problem, sequence, head, i);
      if (const float lse = params.lse[row]; lse != -INFINITY) {
        softmax = {lse * 1.4426950408889634f, 1.f + params.t_bar[row]};
        gradient = {g_bar, delta - g_bar};
      }
    }
    params.softmax[statistics + i] = softmax;
    params.gradient[statistics + i] = gradient;
  }
}

// Internal to each object: the Hopper kernels' and the portable ones' each launch the code compiled
// beside them.
template <class T, int kHeadDim>
static Status launch_prepare(const BackwardParams& params, cudaStream_t stream) {
  const AttentionProblem& problem = params.problem;
  const std::int64_t entries = problem.packed ? 1 : problem.batch;
  const dim3 blocks(static_cast<unsigned>(params.num_statistics_tiles * entries + problem.batch),
                    static_cast<unsigned>(problem.num_q_heads));
  backward_prepare<T, kHeadDim><<<blocks, 256, 0, stream>>>(params);
  return check_cuda(cudaGetLastError(), "backward: prepare");
}

}  // namespace parallax
