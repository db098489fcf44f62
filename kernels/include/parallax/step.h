// SPDX-License-Identifier: MIT
// What a step of generation is made of beside attention.h, on CUDA alone: kernels that begin with
// what is settled while the stream's last kernel still runs. Matrix products of a few rows, with
// what stands around them in a decoder layer (RMSNorm before, SwiGLU or a residual after), read a
// weight once, at the speed of memory. The likeliest token is found where its logit is made and
// goes into the next step without a way over the host.
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
  kArgmax,        // y[row] = max(y[row], argmax word of the row of x w^T)
};

// An argmax word stands for a column of a row of floats: of the largest one, of the first of equal
// ones, of what is finite; 0 for none. Words are made so that of two the larger one is right.

struct FewRowsProblem {
  DType dtype = DType::kBFloat16;  // of x, w, gain; or kFloat16
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
  // Of dtype; floats for kFloatProduct; for kArgmax one std::uint64_t a row, without a stride. It
  // may share no memory with x.
  void* y = nullptr;
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

// words[row] = max(words[row], argmax word of logits[row]), logits [rows, columns] float, `stride`
// elements from row to row.
Status argmax_of_rows(std::int64_t rows, std::int64_t columns, const float* logits,
                      std::int64_t stride, std::uint64_t* words, const Device& device,
                      Stream stream);

// What lies between a step and the next one of the same rows, which follows it without the host.
struct NextTokensArgs {
  std::uint64_t* words = nullptr;     // [rows] argmax words, 0 when it is done
  std::int32_t* tokens = nullptr;     // [rows]: their columns, 0 where there is none
  std::int32_t* positions = nullptr;  // [rows]: where the row is not empty, kv_lens as it was
  std::int32_t* kv_lens = nullptr;    // [rows]: where it is not 0, one more
  // [rows, 2], memory that the host reads: at [row, kv_lens[row] as it was, mod 2] the column, -1
  // where there is none. So the host can read a step's while the next one is under way.
  std::int32_t* found = nullptr;
};

Status next_tokens(std::int64_t rows, const NextTokensArgs& args, const Device& device,
                   Stream stream);

// append_kv() where positions, angles, gains, cos, sin, scales and the page table are not written
// by work that is still under way on the stream: they are read before it has ended.
Status append_kv_settled(const AttentionProblem& problem, const AppendArgs& args,
                         const Device& device, Stream stream);

// run() of a decode where kv_lens, kv_start, the page table, scales, the schedule and the caches,
// but for the newest q_len tokens of each sequence, are not written by work that is still under way
// on the stream: keys and values are asked for before it has ended.
Status run_settled(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream);

}  // namespace parallax
