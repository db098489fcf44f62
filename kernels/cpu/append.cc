// SPDX-License-Identifier: MIT
// append_kv(): new keys and values into a contiguous or paged cache.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/element.h"
#include "parallax/attention.h"
#include "parallax/paged_kv.h"

namespace parallax {
namespace {

// Copies token i of entry b, all heads.
void append_token(const AttentionProblem& problem, const ConstView& from, std::int64_t from_offset,
                  const View& to, std::int64_t to_offset) {
  const auto bytes = static_cast<std::int64_t>(cpu::element_bytes(problem.dtype));
  const auto* source = static_cast<const char*>(from.data) + from_offset * bytes;
  auto* target = static_cast<char*>(to.data) + to_offset * bytes;
  for (std::int64_t h = 0; h < problem.num_kv_heads; ++h) {
    std::memcpy(target + h * to.head_stride * bytes, source + h * from.head_stride * bytes,
                static_cast<std::size_t>(problem.head_dim * bytes));
  }
}

}  // namespace

Status append_kv(const AttentionProblem& problem, const AppendArgs& args,
                 const ParallelFor& parallel_for) {
  AttentionProblem shape = problem;  // what append does not read must not refuse it
  shape.num_q_heads = shape.num_kv_heads;
  shape.scale = 1.0;
  shape.window = 0;
  if (Status status = cpu::check_decode_problem(shape, {}); !status.ok()) return status;
  if (Status status = cpu::check_arguments(shape, args); !status.ok()) return status;
  if (shape.batch == 0) return {};
  parallel_for(shape.batch, [&](std::int64_t b, int) {
    Sequence sequence;
    sequence.batch_idx = b;
    const auto rows = [&](const View& cache) {
      return kv_rows(cache.batch_stride, cache.len_stride, args.pages, sequence);
    };
    const KvRows k_rows = rows(args.k_cache), v_rows = rows(args.v_cache);
    for (std::int64_t i = 0; i < shape.q_len; ++i) {
      const std::int64_t place = args.positions[b] + i;
      append_token(shape, args.k, b * args.k.batch_stride + i * args.k.len_stride, args.k_cache,
                   k_rows.offset(place));
      append_token(shape, args.v, b * args.v.batch_stride + i * args.v.len_stride, args.v_cache,
                   v_rows.offset(place));
    }
  });
  return {};
}

}  // namespace parallax
