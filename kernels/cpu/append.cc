// SPDX-License-Identifier: MIT
// append_kv(): new keys and values into a contiguous or paged cache, as they are or in FP8.
#include <algorithm>

#include "cpu/checks.h"
#include "cpu/element.h"
#include "parallax/attention.h"
#include "parallax/paged_kv.h"

namespace parallax {
namespace {

// One of k and v: its new tokens, its cache, and its scales (null unless the cache is FP8).
struct Pair {
  ConstView from;
  View to;
  const float* scale;
};

// The token at element `from` of the new ones to element `to` of the cache, all heads.
void append_token(const AttentionProblem& problem, const Pair& pair, std::int64_t from,
                  std::int64_t to) {
  cpu::with_element_type(problem.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t h = 0; h < problem.num_kv_heads; ++h) {
      const T* source = static_cast<const T*>(pair.from.data) + from + h * pair.from.head_stride;
      const std::int64_t target = to + h * pair.to.head_stride;
      if (pair.scale == nullptr) {
        std::copy_n(source, problem.head_dim, static_cast<T*>(pair.to.data) + target);
        continue;
      }
      auto* quantised = static_cast<cpu::Float8E4M3*>(pair.to.data) + target;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        cpu::store(static_cast<float>(cpu::load(source[d])) / pair.scale[h], quantised + d);
      }
    }
  });
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
    for (const Pair& pair :
         {Pair{args.k, args.k_cache, args.k_scale}, Pair{args.v, args.v_cache, args.v_scale}}) {
      const KvRows rows = kv_rows(pair.to.batch_stride, pair.to.len_stride, args.pages, sequence);
      for (std::int64_t i = 0; i < shape.q_len; ++i) {
        append_token(shape, pair, b * pair.from.batch_stride + i * pair.from.len_stride,
                     rows.offset(args.positions[b] + i));
      }
    }
  });
  return {};
}

}  // namespace parallax
