// SPDX-License-Identifier: MIT
// The Hopper forward: packed virtual rows (docs/kernels.md has the why and the numbers).
//
// A consumer warpgroup's 64-row tensor-core tile holds 32 queries: in every 16-row slab, row g is
// query g's q and row g + 8 its r. One product with K^T therefore leaves a query's logits s and
// probes t in the same thread, column by column; p = exp(s - m) and w = p (t - c) are made in place
// and are already the register operand of the product with V, whose sums hold o1 in row g and o2 in
// row g + 8. Every thread owns one query; a row's sums cross four lanes.
//
//   scheduler (a thread)  tickets -> TileInfo: which queries, which key tiles
//   producer (a warp)     the q and r tile, K and V tiles into rings of stages
//   consumer warpgroups   S/T of key tile j while o += {p, w} V of tile j + 1; from the last key
//                         tile to the first
#pragma once

#include "cuda/forward_consumer.cuh"
#include "cuda/forward_producer.cuh"
#include "cuda/forward_scheduler.cuh"
#include "cuda/launch.h"

namespace parallax {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(forward_tile(kHeadDim).threads(), 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ ForwardParams params) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim);
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<ForwardShared<kHeadDim>*>(shared_memory);
  const int warpgroup = ptx::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    ptx::barrier_init(&shared.info_full, 1);
    ptx::barrier_init(&shared.info_wanted, 1);
    for (int i = 0; i < kTile.packed_stages; ++i) {
      ptx::barrier_init(&shared.packed_full[i], 1);
      ptx::barrier_init(&shared.packed_empty[i], 4 * kTile.warpgroups);
    }
    for (int i = 0; i < kTile.stages; ++i) {
      ptx::barrier_init(&shared.k_full[i], 1);
      ptx::barrier_init(&shared.v_full[i], 1);
      ptx::barrier_init(&shared.k_empty[i], 4 * kTile.warpgroups);
      ptx::barrier_init(&shared.v_empty[i], 4 * kTile.warpgroups);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == kTile.warpgroups) {
    ptx::keep_registers<kTile.producer_registers>();
    const int thread = ptx::thread_index() & 127;
    if (thread < 32) {
      ForwardProducer<kHeadDim>{maps, params, shared}.run();
    } else if (thread == 32) {
      ForwardScheduler<kHeadDim>{params, shared}.run();
    }
  } else {
    ptx::take_registers<kTile.consumer_registers>();
    ForwardConsumer<T, kHeadDim> consumer{params, shared, warpgroup, threadIdx.x % 32 == 0};
    consumer.run();
  }
}

template <class T, int kHeadDim>
Status launch_forward(const ForwardMaps& maps, const ForwardParams& params, int blocks,
                      cudaStream_t stream) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim);
  constexpr int kSharedBytes = sizeof(ForwardShared<kHeadDim>);
  static_assert(128 * (kTile.warpgroups * kTile.consumer_registers + kTile.producer_registers) <=
                65536);
  static_assert(kSharedBytes <= 227 * 1024);
  const auto kernel = forward_kernel<T, kHeadDim>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (Status s = check_cuda(error, "forward: cudaFuncSetAttribute"); !s.ok()) return s;
  kernel<<<blocks, kTile.threads(), kSharedBytes, stream>>>(maps, params);
  return check_cuda(cudaGetLastError(), "forward: launch");
}

}  // namespace parallax

#define PARALLAX_INSTANCE(type, head_dim)                                                       \
  namespace parallax {                                                                          \
  template Status launch_forward<type, head_dim>(const ForwardMaps&, const ForwardParams&, int, \
                                                 cudaStream_t);                                 \
  }
