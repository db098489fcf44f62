// SPDX-License-Identifier: MIT
// The element types of the CUDA kernels, as instances.txt names them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace parallax {

using bf16 = __nv_bfloat16;
using fp16 = __half;
enum class e4m3 : std::uint8_t {};  // of caches only

}  // namespace parallax
