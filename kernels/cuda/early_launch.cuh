// SPDX-License-Identifier: MIT
// Programmatic dependent launch: a kernel whose CTAs may start while the stream's last kernel still
// runs, as far as that one lets them (start_next_kernel) or else as it ends. The time to launch it
// is then hidden. Devices before compute capability 9.0 have no such thing.
#pragma once

#include <cuda_runtime.h>

namespace parallax {

// Waits until all kernels before this one in its stream have ended and what they wrote is there.
__device__ __forceinline__ void wait_for_last_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Once every CTA has called this or ended, the stream's next kernel may start.
__device__ __forceinline__ void start_next_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// REQUIRES: where `early`, every CTA of `kernel` calls wait_for_last_kernel(), and before it reads
// or writes anything that another kernel may touch; and the kernel is no PTX of compute_80, which
// does not wait, so that the device takes the Hopper kernels (launch.h).
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(bool early, void (*kernel)(Parameters...), int blocks, int threads,
                          int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, arguments...);
}

}  // namespace parallax
