// SPDX-License-Identifier: MIT
// The body of each target_<name>.cc: the blocked kernels compiled for one instruction set, and
// their entry in the table.
#pragma once

#include "cpu/backward_block.h"
#include "cpu/decode_block.h"

namespace parallax::cpu {
namespace PARALLAX_TARGET {

static void write_float_row(DType dtype, const float* from, int head_dim, void* to) {
  with_element(dtype, [&](auto element) { write_row(element, from, head_dim, to); });
}

}  // namespace PARALLAX_TARGET

#define PARALLAX_STRING(name) #name
#define PARALLAX_NAME(name) PARALLAX_STRING(name)

const Target PARALLAX_TARGET_TABLE = {
    .name = PARALLAX_NAME(PARALLAX_TARGET),
    .forward = PARALLAX_TARGET::forward_block<PARALLAX_TARGET::FloatWords>,
    .backward = PARALLAX_TARGET::backward_block<PARALLAX_TARGET::FloatWords>,
    .decode = PARALLAX_TARGET::decode_block,
    .write_row = PARALLAX_TARGET::write_float_row,
};

}  // namespace parallax::cpu
