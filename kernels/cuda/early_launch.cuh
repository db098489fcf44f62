// SPDX-License-Identifier: MIT
// Programmatic dependent launch: a kernel whose CTAs may start while the stream's last kernel still
// runs, as far as that one lets them (cudaTriggerProgrammaticLaunchCompletion) or else as it ends.
// The time to launch it is then hidden.
#pragma once

#include <cuda_runtime.h>

namespace parallax {

// REQUIRES: `kernel` calls cudaGridDependencySynchronize() before it reads or writes anything that
// another kernel may touch.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  launch.stream = stream;
  launch.attrs = &early;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, arguments...);
}

}  // namespace parallax
