// SPDX-License-Identifier: MIT
// The decode over FP8 (e4m3) caches for every GPU from compute capability 8.0 on.
#pragma once

#include "cuda/decode.cuh"

#undef PARALLAX_INSTANCE
#define PARALLAX_INSTANCE(type, head_dim) PARALLAX_DECODE_INSTANCE(type, e4m3, head_dim, true)
