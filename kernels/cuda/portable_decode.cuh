// SPDX-License-Identifier: MIT
// The decode for every GPU from compute capability 8.0 on.
#pragma once

#include "cuda/decode.cuh"

#undef PARALLAX_INSTANCE
#define PARALLAX_INSTANCE(type, head_dim) PARALLAX_DECODE_INSTANCE(type, type, head_dim, true)
