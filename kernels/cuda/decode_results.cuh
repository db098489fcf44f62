// SPDX-License-Identifier: MIT
// The Hopper decode, second half: what the warps of a CTA gathered of an item becomes its output,
// or a part of it in the workspace; the last CTA to bring a part merges them all, in order.
#pragma once

#include "cuda/decode_state.cuh"
#include "parallax/state.h"

namespace parallax {

template <class T, class Cache, int kHeadDim, int kRowTiles>
struct DecodeResults {
  using Shared = DecodeShared<T, Cache, kHeadDim, kRowTiles>;
  static constexpr bool kIsFp8 = Shared::kIsFp8;
  static constexpr int kColumns = kHeadDim / 4;  // of a row of floats, 16 bytes each
  static constexpr float kLn2 = 0.6931471805599453f;

  const DecodeParams& params;
  Shared& shared;
  int span;
  int warp;
  int lane;

  // Sums of four columns of the CTA's row `of` over its warps.
  __device__ __forceinline__ DecodeSums collect(int of, int column) const {
    const int local = of % Shared::kWarpRows;
    DecodeSums sum;
    sum.row = shared.meeting.totals[of];
    for (int from = of / Shared::kWarpRows; from < kDecodeWarps; from += params.team) {
      sum.o1 = sum.o1 + *reinterpret_cast<const float4*>(&shared.meeting.o1[from][local][column]);
      sum.o2 = sum.o2 + *reinterpret_cast<const float4*>(&shared.meeting.o2[from][local][column]);
    }
    return sum;
  }

  __device__ __forceinline__ void write(const DecodeItem& item, int of, int column,
                                        DecodeSums sum) const {
    if (column >= params.problem.head_dim) return;
    if constexpr (kIsFp8) {
      sum.o1 = item.v_factor * sum.o1;
      sum.o2 = item.v_factor * sum.o2;
    }
    const int index = item.first_row + of;
    const DecodePlace place = place_of(params, index);
    const std::int64_t token = place.token;
    const std::int64_t head = item.kv_head * params.group + place.of_group;
    const std::int64_t sequence = item.sequence;
    const std::int64_t statistic =
        (sequence * params.problem.num_q_heads + head) * params.problem.q_len + token;
    RowState<float> state;
    state.d1 = sum.row.d1;
    state.d2 = sum.row.d2;
    if (sum.row.d1 > 0) state.m = sum.row.m * kLn2;
    if (params.state.m != nullptr) {
      const std::int64_t vector =
          ((sequence * params.problem.q_len + token) * params.problem.num_q_heads + head) *
              params.problem.head_dim +
          column;
      *reinterpret_cast<float4*>(params.state.o1 + vector) = sum.o1;
      *reinterpret_cast<float4*>(params.state.o2 + vector) = sum.o2 + sum.row.c * sum.o1;
      if (column == 0) {
        params.state.m[statistic] = state.m;
        params.state.d1[statistic] = state.d1;
        params.state.d2[statistic] = state.d2 + sum.row.c * state.d1;
      }
    }
    const Finalized<float> result = finalize(state, sum.row.c);
    if (params.o.data != nullptr) {
      T* o_row = static_cast<T*>(params.o.data) + sequence * params.o.batch_stride +
                 token * params.o.len_stride + head * params.o.head_stride;
      *reinterpret_cast<uint2*>(o_row + column) = {
          ptx::pack<T>(result.o(sum.o1.x, sum.o2.x), result.o(sum.o1.y, sum.o2.y)),
          ptx::pack<T>(result.o(sum.o1.z, sum.o2.z), result.o(sum.o1.w, sum.o2.w))};
    }
    if (column == 0) {
      if (params.lse != nullptr) params.lse[statistic] = result.lse;
      if (params.t_bar != nullptr) params.t_bar[statistic] = result.t_bar;
    }
  }

  // A split item's part of row `of`, [2 head_dim + 4] floats: o1, o2, the row's scalars.
  __device__ __forceinline__ float* partial(int span, int which, int of) const {
    const std::int64_t cta = span * params.width + blockIdx.x % params.width;
    const int rows = Shared::kWarpRows * params.team;
    return params.partials + ((2 * cta + which) * rows + of) * (2 * kHeadDim + 4);
  }

  __device__ __forceinline__ void write_partial(int span, int which, int of, int column,
                                                const DecodeSums& sum) const {
    float* to = partial(span, which, of);
    *reinterpret_cast<float4*>(to + column) = sum.o1;
    *reinterpret_cast<float4*>(to + kHeadDim + column) = sum.o2;
    if (column == 0) {
      *reinterpret_cast<float4*>(to + 2 * kHeadDim) = {sum.row.m, sum.row.d1, sum.row.d2,
                                                       sum.row.c};
    }
  }

  // Part i of an item.
  __device__ __forceinline__ const float* partial(const DecodeItem& item, int i, int of) const {
    return partial(item.first_slot / 2 + i, i == 0 ? item.first_slot % 2 : 0, of);
  }

  // Merges parts `first`, `first` + `every`, ... of row `of` in four columns; the scalars are of
  // all parts. The lanes hold the scalars of 32 parts at a time.
  __device__ __forceinline__ DecodeSums merge(const DecodeItem& item, int of, int column, int first,
                                              int every) const {
    constexpr int kAtOnce = 8;
    DecodeSums sum;
    for (int base = 0; base < item.num_parts; base += 32) {
      const int count = min(32, item.num_parts - base);
      DecodeRow part;
      if (lane < count) {
        const float4 x =
            __ldcg(reinterpret_cast<const float4*>(partial(item, base + lane, of) + 2 * kHeadDim));
        part = {x.x, x.y, x.z, x.w};
      }
      const float m = fmaxf(sum.row.m, warp_max(part.m));
      const unsigned present = __ballot_sync(0xffffffffu, part.d1 > 0);
      const float c = __shfl_sync(0xffffffffu, part.c, present != 0 ? __ffs(present) - 1 : 0);
      // Sums so far come first; where there are none, only m and c are taken.
      const bool any = __any_sync(0xffffffffu, sum.row.d1 > 0);
      const float keep = any ? ptx::exp2(sum.row.m - m) : 0.0f;
      sum.row = {m, keep * sum.row.d1, keep * sum.row.d2, any ? sum.row.c : c};
      sum.o1 = keep * sum.o1;
      sum.o2 = keep * sum.o2;
      sum.row.add(part);
      const float factor = sum.row.factor(part);
      const float shift = part.c - sum.row.c;
      for (int i = first; i < count; i += kAtOnce * every) {
        float4 o1[kAtOnce];
        float4 o2[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int at = i + j * every;
          const bool exists = at < count && column < kHeadDim;
          const float* from = partial(item, base + (exists ? at : 0), of) + column;
          o1[j] = exists ? __ldcg(reinterpret_cast<const float4*>(from)) : float4{};
          o2[j] = exists ? __ldcg(reinterpret_cast<const float4*>(from + kHeadDim)) : float4{};
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int at = min(i + j * every, 31);
          const float f = __shfl_sync(0xffffffffu, factor, at);
          const float moved = __shfl_sync(0xffffffffu, shift, at);
          sum.o1 = sum.o1 + f * o1[j];
          sum.o2 = sum.o2 + f * (o2[j] + moved * o1[j]);
        }
      }
    }
    sum.row.d1 = warp_sum(sum.row.d1);
    sum.row.d2 = warp_sum(sum.row.d2);
    return sum;
  }

  __device__ __forceinline__ void merge_item(const DecodeItem& item) {
    int crew = kDecodeWarps;  // warps to a row
    while (crew > 1 && kDecodeWarps / crew < item.rows) crew /= 2;
    for (int first = 0; first < item.rows; first += kDecodeWarps / crew) {
      const int of = first + warp / crew;
      const bool exists = of < item.rows;
      for (int column = 4 * lane; column < max(kHeadDim, 128); column += 128) {
        DecodeSums sum = merge(item, exists ? of : 0, column, warp % crew, crew);
        const bool leads = exists && column < kHeadDim && warp % crew == 0;
        if (crew > 1) {
          __syncthreads();
          if (column < kHeadDim) {
            *reinterpret_cast<float4*>(&shared.meeting.o1[warp][0][column]) = sum.o1;
            *reinterpret_cast<float4*>(&shared.meeting.o2[warp][0][column]) = sum.o2;
          }
          __syncthreads();
        }
        if (!leads) continue;
        for (int i = 1; i < crew; ++i) {
          sum.o1 = sum.o1 + *reinterpret_cast<float4*>(&shared.meeting.o1[warp + i][0][column]);
          sum.o2 = sum.o2 + *reinterpret_cast<float4*>(&shared.meeting.o2[warp + i][0][column]);
        }
        write(item, of, column, sum);
      }
    }
  }

  // Whether this CTA's part of a split item is the last to come; then all are in memory.
  __device__ __forceinline__ bool is_last_part(const DecodeItem& item) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      int* counter = params.schedule.counters + item.first_slot / 2 * params.width +
                     static_cast<int>(blockIdx.x) % params.width;
      shared.is_last = atomicAdd(counter, 1) == item.num_parts - 1;
      if (shared.is_last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    return shared.is_last;
  }

  __device__ __forceinline__ void finish(const DecodeItem& item) {
#pragma unroll 1
    for (int i = threadIdx.x; i < item.rows * kColumns; i += 32 * kDecodeWarps) {
      const int of = i / kColumns;
      const int column = i % kColumns * 4;
      const DecodeSums sum = collect(of, column);
      if (item.is_whole) {
        write(item, of, column, sum);
      } else {
        write_partial(span, item.slot, of, column, sum);
      }
    }
    if (!item.is_whole && is_last_part(item)) merge_item(item);
  }
};

}  // namespace parallax
