// SPDX-License-Identifier: MIT
// The likeliest tokens of logits, and their way into the next step and to the host.
#include <string>
#include <utility>

#include "cuda/argmax.cuh"
#include "cuda/early_launch.cuh"
#include "cuda/launch.h"
#include "cuda/schedule.h"
#include "parallax/step.h"

namespace parallax {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 16 * kThreads;  // of a CTA

struct ArgmaxParams {
  const float* logits;
  std::int64_t stride;
  int columns;
  int ctas_a_row;
  std::uint64_t* words;
};

__global__ void __launch_bounds__(kThreads)
    argmax_kernel(const __grid_constant__ ArgmaxParams params) {
  wait_for_last_kernel();
  const int row = static_cast<int>(blockIdx.x) / params.ctas_a_row;
  const int first = (static_cast<int>(blockIdx.x) - row * params.ctas_a_row) * kColumns;
  const float* logits = params.logits + row * params.stride;
  std::uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < kColumns / kThreads; ++i) {
    const int column = first + i * kThreads + static_cast<int>(threadIdx.x);
    if (column >= params.columns) continue;
    const std::uint64_t one = argmax_word(logits[column], column);
    word = word > one ? word : one;
  }
  word = largest_of_lanes<1>(word);
  std::uint64_t* const of = params.words + row;
  if (threadIdx.x % 32 == 0) raise(of, word, __ldcg(of));
}

__global__ void __launch_bounds__(kThreads)
    next_tokens_kernel(const int rows, const __grid_constant__ NextTokensArgs args) {
  wait_for_last_kernel();
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= rows) return;
  const int column = column_of(args.words[row]);
  const std::int32_t len = args.kv_lens[row];
  args.words[row] = 0;
  args.tokens[row] = max(column, 0);
  args.found[2 * row + len % 2] = column;
  if (len == 0) return;
  args.positions[row] = len;
  args.kv_lens[row] = len + 1;
}

Status check(std::int64_t rows, std::int64_t columns, const Device& device) {
  constexpr std::int64_t kMaxRows = 1 << 20, kMaxColumns = 1 << 29;
  if (rows < 1 || rows > kMaxRows) {
    return Status::invalid_argument("rows: expected 1 to 2^20, got " + std::to_string(rows));
  }
  if (columns < 1 || columns > kMaxColumns) {
    return Status::invalid_argument("columns: expected 1 to 2^29, got " + std::to_string(columns));
  }
  if (rows * columns > std::int64_t{kColumns} << 30) {
    return Status::invalid_argument("rows, columns: more than 2^42 logits");
  }
  if (device.kind != Device::Kind::kCuda || device.compute_capability < 80) {
    return Status::unsupported("argmax: it runs on GPUs of compute capability 8.0 and later");
  }
  return {};
}

Status check_present(const char* name, const void* data) {
  return data != nullptr ? Status() : Status::invalid_argument(std::string(name) + ": it is null");
}

}  // namespace

Status argmax_of_rows(std::int64_t rows, std::int64_t columns, const float* logits,
                      std::int64_t stride, std::uint64_t* words, const Device& device,
                      Stream stream) {
  if (Status s = check(rows, columns, device); !s.ok()) return s;
  if (Status s = check_present("logits", logits); !s.ok()) return s;
  if (Status s = check_present("words", words); !s.ok()) return s;
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  const int ctas_a_row = ceil_div(static_cast<int>(columns), kColumns);
  const ArgmaxParams params{logits, stride, static_cast<int>(columns), ctas_a_row, words};
  return check_cuda(launch_kernel(takes_hopper_kernels(device), argmax_kernel,
                                  ctas_a_row * static_cast<int>(rows), kThreads, 0,
                                  static_cast<cudaStream_t>(stream), params),
                    "argmax: launch");
}

Status next_tokens(std::int64_t rows, const NextTokensArgs& args, const Device& device,
                   Stream stream) {
  if (Status s = check(rows, 1, device); !s.ok()) return s;
  for (const auto& [name, data] : {std::pair<const char*, const void*>{"words", args.words},
                                   {"tokens", args.tokens},
                                   {"positions", args.positions},
                                   {"kv_lens", args.kv_lens},
                                   {"found", args.found}}) {
    if (Status s = check_present(name, data); !s.ok()) return s;
  }
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  const int count = static_cast<int>(rows);
  return check_cuda(
      launch_kernel(takes_hopper_kernels(device), next_tokens_kernel, ceil_div(count, kThreads),
                    kThreads, 0, static_cast<cudaStream_t>(stream), count, args),
      "next_tokens: launch");
}

}  // namespace parallax
