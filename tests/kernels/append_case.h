// SPDX-License-Identifier: MIT
// Cases of append_kv: new tokens, where they go, and what happens to them on the way. Caches start
// full of poison, so that a byte too many shows.
#pragma once

#include <optional>
#include <utility>

#include "tests/kernels/cases.h"

namespace parallax::tests {

// What happens to the heads of k, q or r.
struct Head {
  std::vector<float> gain;  // empty: no norm
  bool rotate = false;
};

struct AppendCase {
  std::string name;
  AttentionProblem problem;                     // q_len new tokens, kv_len the capacity
  int page_size = 0;                            // 0: contiguous
  std::vector<std::int32_t> positions, angles;  // angles empty: the positions
  bool with_queries = false;
  Head k_head, q_head, r_head;
  std::vector<float> k_scale, v_scale;
  std::int64_t num_angles = 0;
  std::vector<float> cos, sin;
  Inputs inputs;  // k and v [batch, q_len, num_kv_heads, head_dim]

  AttentionProblem token_problem() const;  // of k and v: kv_len is q_len
};

// The tensors of a call, in host memory.
struct AppendTensors {
  explicit AppendTensors(const AppendCase& c);

  Tensor k, v, q, r, k_cache, v_cache, q_out, r_out;
  std::optional<PagedCache> paged;

  // Token `place` of sequence b in the caches, as (page, row) or (b, place).
  std::pair<std::int64_t, std::int64_t> cache_row(std::int64_t b, std::int64_t place) const;
};

// The arguments, all pointers into `c` and `tensors`.
AppendArgs append_args(const AppendCase& c, AppendTensors* tensors);

// Groups, head dims, pages, FP8, prologues whole and in part.
std::vector<AppendCase> append_cases(DType dtype);

}  // namespace parallax::tests
