// SPDX-License-Identifier: MIT
#include "cpu/widen.h"

#include <algorithm>

#include "cpu/element.h"
#include "parallax/mask.h"
#include "parallax/paged_kv.h"

namespace parallax::cpu {
namespace {

constexpr std::int64_t kTaskTokens = 64;

std::size_t bytes_of_one(const AttentionProblem& problem) {
  constexpr std::size_t kAlignment = 256;
  const auto elements = static_cast<std::size_t>(problem.batch * problem.kv_len *
                                                 problem.num_kv_heads * problem.head_dim);
  return (elements * element_bytes(problem.dtype) + kAlignment - 1) / kAlignment * kAlignment;
}

template <class T>
void widen_token(const AttentionProblem& problem, const ConstView& from, std::int64_t offset,
                 const float* scale, T* to) {
  for (std::int64_t h = 0; h < problem.num_kv_heads; ++h) {
    const Float8E4M3* row =
        static_cast<const Float8E4M3*>(from.data) + offset + h * from.head_stride;
    for (std::int64_t d = 0; d < problem.head_dim; ++d) {
      store(load(row[d]) * scale[h], to + h * problem.head_dim + d);
    }
  }
}

}  // namespace

std::size_t widened_bytes(const AttentionProblem& problem) {
  return widens(problem) ? 2 * bytes_of_one(problem) : 0;
}

ForwardArgs widened_args(const AttentionProblem& problem, const ForwardArgs& args, void* memory) {
  ForwardArgs widened = args;
  widened.k_scale = widened.v_scale = nullptr;
  widened.pages = {};
  const std::int64_t token = problem.num_kv_heads * problem.head_dim;
  widened.k = {memory, problem.kv_len * token, token, problem.head_dim};
  widened.v = widened.k;
  widened.v.data = static_cast<char*>(memory) + bytes_of_one(problem);
  return widened;
}

void widen(const AttentionProblem& problem, const ForwardArgs& args, void* memory,
           const ParallelFor& parallel_for) {
  const ForwardArgs widened = widened_args(problem, args, memory);
  const std::int64_t tasks = (problem.kv_len + kTaskTokens - 1) / kTaskTokens;
  const struct {
    const ConstView &from, &to;
    const float* scale;
  } both[] = {{args.k, widened.k, args.k_scale}, {args.v, widened.v, args.v_scale}};
  const auto body = [&](std::int64_t task, int) {
    const Sequence sequence = sequence_at(problem, args.sequences, task / tasks);
    const Range seen = sequence.mask.keys({0, sequence.mask.q_len});
    const std::int64_t first = task % tasks * kTaskTokens;
    for (std::int64_t j = std::max<std::int64_t>(first, seen.begin);
         j < std::min<std::int64_t>(first + kTaskTokens, seen.end); ++j) {
      for (const auto& [from, to, scale] : both) {
        const KvRows rows = kv_rows(from.batch_stride, from.len_stride, args.pages, sequence);
        const std::int64_t place = sequence.batch_idx * to.batch_stride + j * to.len_stride;
        with_element_type(problem.dtype, [&, from = from, to = to, scale = scale](auto element) {
          using T = decltype(element);
          if constexpr (!std::is_same_v<T, double>) {
            T* row = static_cast<T*>(const_cast<void*>(to.data)) + place;
            widen_token(problem, from, rows.offset(j), scale, row);
          }
        });
      }
    }
  };
  if (problem.q_len > 0 && problem.batch * tasks > 0) parallel_for(problem.batch * tasks, body);
}

}  // namespace parallax::cpu
