// SPDX-License-Identifier: MIT
// AVX-512 with bf16 dot products: bf16 problems run on words of two bf16, all others as with plain
// AVX-512.
#define PARALLAX_TARGET avx512bf16
#include "cpu/backward_block.h"
#include "cpu/decode_block.h"

namespace parallax::cpu {
namespace avx512bf16 {

static void forward(const ForwardBlock& block, float* scratch) {
  if (block.dtype != DType::kBFloat16) return kAvx512Target.forward(block, scratch);
  forward_block<BFloat16Words>(block, scratch);
}

static void backward(const BackwardBlock& block, float* scratch) {
  if (block.dtype != DType::kBFloat16) return kAvx512Target.backward(block, scratch);
  backward_block<BFloat16Words>(block, scratch);
}

static void decode(const DecodeBlock& block, float* scratch) {
  if (block.kv_dtype != DType::kBFloat16) return kAvx512Target.decode(block, scratch);
  Decode<DType::kBFloat16>(block, scratch).run();
}

static void write_float_row(DType dtype, const float* from, int head_dim, void* to) {
  kAvx512Target.write_row(dtype, from, head_dim, to);
}

}  // namespace avx512bf16

const Target kAvx512Bf16Target = {
    .name = "avx512bf16",
    .forward = avx512bf16::forward,
    .backward = avx512bf16::backward,
    .decode = avx512bf16::decode,
    .write_row = avx512bf16::write_float_row,
};

}  // namespace parallax::cpu
