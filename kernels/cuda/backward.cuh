// SPDX-License-Identifier: MIT
// The Hopper backward: its three kernels, launched in order.
#pragma once

#include "cuda/backward_keys.cuh"
#include "cuda/backward_prepare.cuh"
#include "cuda/backward_queries.cuh"
#include "cuda/launch.h"

namespace parallax {

template <class Kernel>
Status launch_tiles(Kernel kernel, const char* name, std::int64_t blocks, int threads,
                    int shared_bytes, const BackwardMaps& maps, const BackwardParams& params,
                    cudaStream_t stream) {
  if (blocks == 0) return {};
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (Status s = check_cuda(error, name); !s.ok()) return s;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(maps, params);
  return check_cuda(cudaGetLastError(), name);
}

template <class T, int kHeadDim>
Status launch_backward(const BackwardMaps& maps, const BackwardParams& params,
                       cudaStream_t stream) {
  static_assert(sizeof(KeysShared<kHeadDim>) <= 227 * 1024);
  static_assert(sizeof(QueriesShared<kHeadDim>) <= 227 * 1024);
  const AttentionProblem& problem = params.problem;
  if (Status s = launch_prepare<T, kHeadDim>(params, stream); !s.ok()) return s;
  if (Status s =
          launch_tiles(backward_queries<T, kHeadDim>, "backward: queries",
                       num_blocks(problem, params.query_grid), QueriesBlock<T, kHeadDim>::kThreads,
                       sizeof(QueriesShared<kHeadDim>), maps, params, stream);
      !s.ok()) {
    return s;
  }
  return launch_tiles(backward_keys<T, kHeadDim>, "backward: keys",
                      num_blocks(problem, params.key_grid), KeysBlock<T, kHeadDim>::kThreads,
                      sizeof(KeysShared<kHeadDim>), maps, params, stream);
}

}  // namespace parallax

#define PARALLAX_INSTANCE(type, head_dim)                                                     \
  namespace parallax {                                                                        \
  template Status launch_backward<type, head_dim>(const BackwardMaps&, const BackwardParams&, \
                                                  cudaStream_t);                              \
  }
