// SPDX-License-Identifier: MIT
// The decode over FP8 (e4m3) caches; `type` is that of q, r and o.
#pragma once

#include "cuda/decode.cuh"

#undef PARALLAX_INSTANCE
#define PARALLAX_INSTANCE(type, head_dim) PARALLAX_DECODE_INSTANCE(type, e4m3, head_dim, false)
