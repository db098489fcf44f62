// SPDX-License-Identifier: MIT
// What a step of generation is made of beside attention.h, on CUDA alone: kernels that begin with
// what is settled while the stream's last kernel still runs. Matrix products of a few rows, with
// what stands around them in a decoder layer (RMSNorm before, SwiGLU or a residual after), read a
// weight once, at the speed of memory.
#pragma once

#include <cstdint>

#include "parallax/attention.h"
#include "parallax/status.h"
#include "parallax/types.h"

namespace parallax {

// Rows of x that one call takes.
inline constexpr std::int64_t kMaxFewRows = 16;

enum class FewRowsForm : std::uint8_t {
  kProduct,       // y = x w^T
  kFloatProduct,  // the same, y in float
  kSwiGlu,        // y = silu(x gate^T) * (x up^T), w being gate above up
  kAdd,           // y += x w^T
};

struct FewRowsProblem {
  DType dtype = DType::kBFloat16;  // of x, w, gain and, but for kFloatProduct, y; or kFloat16
  std::int64_t rows = 0;           // from 1 to kMaxFewRows
  std::int64_t in = 0;             // columns of x and w, a multiple of 8
  std::int64_t out = 0;            // columns of y; w has as many rows, with kSwiGlu twice as many
  FewRowsForm form = FewRowsForm::kProduct;
};

// Strides count elements and step rows, whose elements are contiguous; x's and w's are multiples of
// 8, and x, w and gain are aligned to 16 bytes.
struct FewRowsArgs {
  const void* x = nullptr;
  std::int64_t x_stride = 0;
  const void* w = nullptr;
  std::int64_t w_stride = 0;
  // Where there is one, [in], x is first multiplied by it and divided by sqrt(mean(x^2) + eps), the
  // latter after the product: x gain, rounded to dtype, must be within its range.
  const void* gain = nullptr;
  double eps = 1e-6;
  void* y = nullptr;  // may share no memory with x
  std::int64_t y_stride = 0;
  // Memory that kernels after this one will read, aligned to 16 bytes: it is asked into the L2
  // cache meanwhile (compute capability 9.0). Only speed hangs on it.
  const void* next = nullptr;
  std::int64_t next_bytes = 0;
};

// Sums in float, in an order that `in` and `out` settle: a row of y does not depend on the other
// rows or on how many they are. `w` and `gain` must not be written by work that is still under way
// on the stream: they are read before it has ended.
Status few_rows(const FewRowsProblem& problem, const FewRowsArgs& args, const Device& device,
                Stream stream);

// run() of a decode where kv_lens, kv_start, the page table, scales, the schedule and the caches,
// but for the newest q_len tokens of each sequence, are not written by work that is still under way
// on the stream: keys and values are asked for before it has ended.
Status run_settled(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream);

}  // namespace parallax
