// SPDX-License-Identifier: MIT
// The decode: a few queries over a long cache, at the speed of memory (docs/kernels.md).
//
// A CTA walks its span of the schedule item by item. Of few rows, each warp streams its own keys
// through its own ring in shared memory (decode_keys.cuh), and nothing in that loop waits for the
// whole CTA; of more, all warps share a ring and multiply as a warpgroup, each with rows of its
// own. Then the warps' states become one (decode_results.cuh).
#pragma once

#include "cuda/decode_keys.cuh"
#include "cuda/decode_results.cuh"
#include "cuda/decode_schedule.cuh"
#include "cuda/early_launch.cuh"
#include "cuda/launch.h"

namespace parallax {

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
struct DecodeCta {
  using Shared = DecodeShared<T, Cache, kHeadDim, kRowTiles, kPortable>;
  static constexpr bool kIsFp8 = Shared::kIsFp8;

  static constexpr int kBlockKeys = decode_block_keys(sizeof(Cache));

  const DecodeParams& params;
  Shared& shared;
  int span;
  int place_in_unit;  // which of a unit's pairs is this CTA's

  // The first warp.
  __device__ __forceinline__ void begin() const {
    const DecodeSpan begun = params.schedule != nullptr
                                 ? params.schedule[span]
                                 : find_span(params.problem, params.sequences, kBlockKeys,
                                             params.spans, params.units, span);
    if (threadIdx.x != 0) return;
    const RowMask mask = row_mask({static_cast<int>(params.problem.q_len), begun.kv_begin,
                                   begun.kv_end, params.problem.causal, params.problem.window});
    const int at = begun.cut.begin(span);
    shared.walk = {begun, mask, at, begun.cut.begin(span + 1) - at};
  }

  // One thread: the item at shared.walk (no blocks: there is none), and the walk to the next.
  __device__ __forceinline__ void next_item() const {
    DecodeWalk& walk = shared.walk;
    DecodeSpan& place = walk.place;
    DecodeItem& item = shared.item;
    item.num_blocks = 0;
    if (walk.left == 0) return;
    const DecodeBlocks blocks =
        decode_blocks(walk.mask, static_cast<int>(params.problem.q_len), kBlockKeys);
    const int pair = place.unit * params.width + place_in_unit;
    const int rows = Shared::kWarpRows * params.team;
    item.sequence = place.sequence;
    item.kv_head = params.passes == 1 ? pair : pair / params.passes;
    item.first_row = (pair - item.kv_head * params.passes) * rows;
    item.rows = min(rows, params.rows - item.first_row);
    item.mask = walk.mask;
    item.keys = blocks.keys;
    const DecodePlace first = place_of(params, item.first_row);
    const DecodePlace last = place_of(params, item.first_row + item.rows - 1);
    item.interior = {walk.mask.keys(last.token).begin, walk.mask.keys(first.token).end};
    item.first_key = (blocks.first + place.block) * kBlockKeys;
    item.num_blocks = min(walk.left, blocks.count - place.block);
    item.is_whole = item.num_blocks == blocks.count;
    item.line = {walk.at - place.block, walk.at - place.block + blocks.count};

    walk.at += item.num_blocks;
    walk.left -= item.num_blocks;
    place.block = 0;
    if (walk.left == 0 || ++place.unit < params.units) return;
    place.unit = 0;
    ++place.sequence;
    walk.mask = decode_mask(params.problem, params.sequences, place.sequence);
  }

  // One thread, where the item is split: which parts there are. It divides a lot: not before the
  // first keys have been asked for.
  __device__ __forceinline__ void find_parts() const {
    DecodeItem& item = shared.item;
    const DecodeCut& cut = shared.walk.place.cut;
    const Range line = item.line;
    const int first_span = cut.span_of(line.begin);
    item.slot = 2 * span + (line.begin > cut.begin(span));
    item.first_slot = 2 * first_span + (line.begin > cut.begin(first_span));
    item.num_parts = cut.span_of(line.end - 1) - first_span + 1;
  }

  __device__ __forceinline__ void run() const {
    const int warp = ptx::uniform(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    DecodeKeys<T, Cache, kHeadDim, kRowTiles, kPortable> keys{
        params, shared, warp, lane, warp % params.team, warp / params.team};
    if (warp == 0) begin();
#pragma unroll 1
    while (true) {
      if (threadIdx.x == 0) next_item();
      __syncthreads();
      const DecodeItem& item = shared.item;
      if (item.num_blocks == 0) return;
      keys.stream(item, [&] {
        if (threadIdx.x == 0 && !item.is_whole) find_parts();
      });
      keys.publish(item);
      DecodeResults<T, Cache, kHeadDim, kRowTiles, kPortable>{params, shared, place_in_unit, warp,
                                                              lane}
          .finish(item);
      __syncthreads();
    }
  }
};

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
__global__ void __launch_bounds__(32 * kDecodeWarps, decode_ctas_per_sm(kHeadDim, kPortable))
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  auto& shared =
      *reinterpret_cast<DecodeShared<T, Cache, kHeadDim, kRowTiles, kPortable>*>(shared_memory);
  start_next_kernel();
  if (!params.settled) wait_for_last_kernel();
  const int span = static_cast<int>(blockIdx.x) / params.width;
  const int place_in_unit = static_cast<int>(blockIdx.x) - span * params.width;
  DecodeCta<T, Cache, kHeadDim, kRowTiles, kPortable>{params, shared, span, place_in_unit}.run();
  // Where there was nothing to read: what comes after this kernel comes after the last one too.
  wait_for_last_kernel();
}

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
Status launch_decode_tiles(const DecodeParams& params, int blocks, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(DecodeShared<T, Cache, kHeadDim, kRowTiles, kPortable>);
  static_assert(kSharedBytes <= decode_shared_bytes(kHeadDim, kPortable));
  const auto kernel = decode_kernel<T, Cache, kHeadDim, kRowTiles, kPortable>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (Status s = check_cuda(error, "decode: cudaFuncSetAttribute"); !s.ok()) return s;
  return check_cuda(
      launch_kernel(!kPortable, kernel, blocks, 32 * kDecodeWarps, kSharedBytes, stream, params),
      "decode: launch");
}

template <class T, class Cache, int kHeadDim, bool kPortable>
Status launch_decode(const DecodeParams& params, DecodeShape shape, int blocks,
                     cudaStream_t stream) {
  if constexpr (!kPortable && sizeof(Cache) == 2) {
    if (shape.is_warpgroup) {
      return launch_decode_tiles<T, Cache, kHeadDim, kDecodeWarpgroup, kPortable>(params, blocks,
                                                                                  stream);
    }
  } else if constexpr (decode_row_tiles(kHeadDim, sizeof(Cache)) == 2) {
    if (shape.row_tiles == 2) {
      return launch_decode_tiles<T, Cache, kHeadDim, 2, kPortable>(params, blocks, stream);
    }
  }
  return launch_decode_tiles<T, Cache, kHeadDim, 1, kPortable>(params, blocks, stream);
}

}  // namespace parallax

#define PARALLAX_DECODE_INSTANCE(type, cache, head_dim, portable)                                  \
  namespace parallax {                                                                             \
  template Status launch_decode<type, cache, head_dim, portable>(const DecodeParams&, DecodeShape, \
                                                                 int, cudaStream_t);               \
  }
#define PARALLAX_INSTANCE(type, head_dim) PARALLAX_DECODE_INSTANCE(type, type, head_dim, false)
