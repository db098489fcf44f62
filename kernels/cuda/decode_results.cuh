// SPDX-License-Identifier: MIT
// The decode, second half: what the warps of a CTA gathered of an item becomes its output,
// or a part of it in the workspace; the last CTA to bring a part merges them all, in order.
#pragma once

#include "cuda/decode_state.cuh"
#include "parallax/state.h"

namespace parallax {

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
struct DecodeResults {
  using Shared = DecodeShared<T, Cache, kHeadDim, kRowTiles, kPortable>;
  static constexpr bool kIsFp8 = Shared::kIsFp8;
  static constexpr int kColumns = kHeadDim / 4;  // of a row of floats, 16 bytes each
  static constexpr float kLn2 = 0.6931471805599453f;

  const DecodeParams& params;
  Shared& shared;
  int place_in_unit;
  int warp;
  int lane;

  // Sums of four columns of the CTA's row `of` over `num_parts` that have met in shared memory,
  // in the places of every `every`-th warp.
  __device__ __forceinline__ DecodeSums collect(int of, int column, int num_parts,
                                                int every) const {
    const int local = of % Shared::kWarpRows;
    DecodeSums sum;
    sum.row = shared.meeting.totals[of];
    int from = of / Shared::kWarpRows;
#pragma unroll
    for (int i = 0; i < kDecodeWarps; ++i, from += every) {
      const auto part_of = [&](const auto& o) {
        return i < num_parts ? *reinterpret_cast<const float4*>(&o[from][local][column]) : float4{};
      };
      sum.o1 = sum.o1 + part_of(shared.meeting.o1);
      sum.o2 = sum.o2 + part_of(shared.meeting.o2);
    }
    return sum;
  }

  __device__ __forceinline__ void write(const DecodeItem& item, int of, int column,
                                        DecodeSums sum) const {
    if (column >= params.problem.head_dim) return;
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
    if (sum.row.d1 != 0) state.m = sum.row.m * kLn2;
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

  __device__ __forceinline__ int slots_before() const {
    return place_in_unit * (2 * params.spans.max_spans);
  }

  // A split item's part of row `of`, [2 head_dim + 4] floats: o1, o2, the row's scalars.
  __device__ __forceinline__ float* partial(int slot, int of) const {
    const int index = (slots_before() + slot) * (Shared::kWarpRows * params.team) + of;
    return params.partials + index * (2 * kHeadDim + 4);
  }

  __device__ __forceinline__ void write_partial(int slot, int of, int column,
                                                const DecodeSums& sum) const {
    float* to = partial(slot, of);
    *reinterpret_cast<float4*>(to + column) = sum.o1;
    *reinterpret_cast<float4*>(to + kHeadDim + column) = sum.o2;
    if (column == 0) {
      *reinterpret_cast<float4*>(to + 2 * kHeadDim) = {sum.row.m, sum.row.d1, sum.row.d2,
                                                       sum.row.c};
    }
  }

  // The slot of part i of an item.
  static __device__ __forceinline__ int slot_of(const DecodeItem& item, int i) {
    return i == 0 ? item.first_slot : item.first_slot / 2 * 2 + 2 * i;
  }
  __device__ __forceinline__ const float* partial(const DecodeItem& item, int i, int of) const {
    return partial(slot_of(item, i), of);
  }

  // Brings the scalars of 32 parts more, one a lane, to one m and centre with the sums so far.
  // Leaves in `part` what the part's vectors need: a factor in m, a shift of the centre in c.
  __device__ __forceinline__ void align(DecodeSums& sum, DecodeRow& part) const {
    const float m = fmaxf(sum.row.m, warp_max(part.m));
    const unsigned present = __ballot_sync(0xffffffffu, part.d1 != 0);
    const float c = __shfl_sync(0xffffffffu, part.c, present != 0 ? __ffs(present) - 1 : 0);
    // Where there is nothing so far, only m and c are taken.
    const bool any = __any_sync(0xffffffffu, sum.row.d1 != 0);
    const float keep = any ? ptx::exp2(sum.row.m - m) : 0.0f;
    sum.row = {m, keep * sum.row.d1, keep * sum.row.d2, any ? sum.row.c : c};
    sum.o1 = keep * sum.o1;
    sum.o2 = keep * sum.o2;
    sum.row.add(part);
    part.m = sum.row.factor(part);
    part.c -= sum.row.c;
  }

  // Merges parts `first`, `first` + `every`, ... of row `of` in four columns. The scalars are of
  // all parts where `first` is 0, and lie spread over the lanes.
  __device__ __forceinline__ DecodeSums merge(const DecodeItem& item, int of, int column, int first,
                                              int every) const {
    constexpr int kAtOnce = 8;
    DecodeSums sum;
#pragma unroll 1
    for (int base = 0; base < item.num_parts; base += 32) {
      const int count = min(32, item.num_parts - base);
      DecodeRow part;
      if (lane < count) {
        const float4 x =
            __ldcg(reinterpret_cast<const float4*>(partial(item, base + lane, of) + 2 * kHeadDim));
        part = {x.x, x.y, x.z, x.w};
      }
      if (first >= count) align(sum, part);  // all warps of a row agree on m
#pragma unroll 1
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
        if (i == first) align(sum, part);  // under the loads' latency
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int at = min(i + j * every, 31);
          const float factor = __shfl_sync(0xffffffffu, part.m, at);
          const float shift = __shfl_sync(0xffffffffu, part.c, at);
          sum.o1 = sum.o1 + factor * o1[j];
          sum.o2 = sum.o2 + factor * (o2[j] + shift * o1[j]);
        }
      }
    }
    return sum;
  }

  // Merges all parts of an item into shared memory, a crew of warps to a row. Returns how many
  // parts of a row are left there.
  __device__ __forceinline__ int merge_item(const DecodeItem& item) {
    int crew = kDecodeWarps;
    while (crew > 1 && kDecodeWarps / crew < item.rows) crew /= 2;
    const int rank = warp % crew;
#pragma unroll 1
    for (int of = warp / crew; of < item.rows; of += kDecodeWarps / crew) {
      // More than one warp to a row is only where the first warp's places hold all rows.
      const int to = of / Shared::kWarpRows + rank;
      const int local = of % Shared::kWarpRows;
#pragma unroll 1
      for (int column = 4 * lane; column < max(kHeadDim, 128); column += 128) {
        const DecodeSums sum = merge(item, of, column, rank, crew);
        const float d1 = warp_sum(sum.row.d1);
        const float d2 = warp_sum(sum.row.d2);
        if (rank == 0 && lane == 0) {
          shared.meeting.totals[of] = {sum.row.m, d1, d2, sum.row.c};
        }
        if (column >= kHeadDim) continue;
        *reinterpret_cast<float4*>(&shared.meeting.o1[to][local][column]) = sum.o1;
        *reinterpret_cast<float4*>(&shared.meeting.o2[to][local][column]) = sum.o2;
      }
    }
    __syncthreads();
    return crew;
  }

  // Counts a part of an item that is now in memory; returns how many were before. The word to count
  // in may have held anything when the run began: a count is what lies less than 2^16 above a
  // number that depends on where it lies, and anything else (but once in 2^48) is none. Who finds
  // none counts again, from the number on if nobody else has.
  static __device__ __forceinline__ int count_part(std::uint64_t* word, std::uint64_t zero) {
    const auto is_count = [&](std::uint64_t x) { return x - zero < 0x10000; };
    const std::uint64_t before = ptx::add_in_order(word, 1);
    if (is_count(before)) return static_cast<int>(before - zero);
    std::uint64_t expected = before + 1;
#pragma unroll 1
    while (true) {
      const std::uint64_t base = is_count(expected) ? expected : zero;
      const std::uint64_t found = ptx::replace_in_order(word, expected, base + 1);
      if (found == expected) return static_cast<int>(base - zero);
      expected = found;
    }
  }

  // Whether this CTA's part of a split item is the last to come; then all are in memory.
  __device__ __forceinline__ bool is_last_part(const DecodeItem& item) {
    __syncthreads();
    if (threadIdx.x == 0) {
      std::uint64_t* word = params.counts + slots_before() + item.first_slot;
      const std::uint64_t zero = reinterpret_cast<std::uint64_t>(word) * 0x9e3779b97f4a7c15ull;
      shared.is_last = count_part(word, zero) == item.num_parts - 1;
      if (shared.is_last) *word = zero;
    }
    __syncthreads();
    return shared.is_last;
  }

  __device__ __forceinline__ void finish(const DecodeItem& item) {
    bool is_whole = item.is_whole;
    int num_parts = params.ways;
    int every = params.team;
    // Once for an item's output or part; once more for the output of merged parts.
#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (int i = threadIdx.x; i < item.rows * kColumns; i += 32 * kDecodeWarps) {
        const int of = i / kColumns;
        const int column = i % kColumns * 4;
        const DecodeSums sum = collect(of, column, num_parts, every);
        if (is_whole) {
          write(item, of, column, sum);
        } else {
          write_partial(item.slot, of, column, sum);
        }
      }
      if (is_whole || !is_last_part(item)) return;
      num_parts = merge_item(item);
      every = 1;
      is_whole = true;
    }
  }
};

}  // namespace parallax
