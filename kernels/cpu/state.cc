// SPDX-License-Identifier: MIT
// Partial states as tensors: merge_states() and finalize_state() (docs/math.md sections 5 and 6).
#include "parallax/state.h"

#include "cpu/checks.h"
#include "cpu/element.h"
#include "parallax/attention.h"

namespace parallax {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;

Status check_state(const char* name, const StateView& state) {
  if (state.m && state.d1 && state.d2 && state.o1 && state.o2) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": expected all of m, d1, d2, o1, o2, got a null pointer");
}

// One row of a StateView: `row` counts [batch, num_q_heads, q_len], the vector half lies at
// [batch, q_len, num_q_heads, head_dim].
struct RowPlace {
  std::int64_t row;
  std::int64_t vector;
};

RowPlace place_of(const AttentionProblem& problem, std::int64_t b, std::int64_t h, std::int64_t i) {
  return {(b * problem.num_q_heads + h) * problem.q_len + i,
          ((b * problem.q_len + i) * problem.num_q_heads + h) * problem.head_dim};
}

RowState<float> scalars_of(const StateView& state, std::int64_t row) {
  return {state.m[row], state.d1[row], state.d2[row]};
}

void merge_row(const AttentionProblem& problem, const StateView* states, int num_states,
               RowPlace place, const StateView& out) {
  const std::int64_t head_dim = problem.head_dim;
  RowState<float> merged;
  float o1[kMaxHeadDim] = {}, o2[kMaxHeadDim] = {};
  for (const StateView* state = states; state != states + num_states; ++state) {
    const Merged<float> step = merge(merged, scalars_of(*state, place.row));
    merged = step.state;
    const float* right1 = state->o1 + place.vector;
    const float* right2 = state->o2 + place.vector;
    for (std::int64_t d = 0; d < head_dim; ++d) {
      o1[d] = step.left * o1[d] + step.right * right1[d];
      o2[d] = step.left * o2[d] + step.right * right2[d];
    }
  }
  out.m[place.row] = merged.m;
  out.d1[place.row] = merged.d1;
  out.d2[place.row] = merged.d2;
  std::copy_n(o1, head_dim, out.o1 + place.vector);
  std::copy_n(o2, head_dim, out.o2 + place.vector);
}

template <class T>
void finalize_row(const AttentionProblem& problem, const StateView& state, RowPlace place, T* o,
                  float* lse, float* t_bar) {
  const Finalized<float> result = finalize(scalars_of(state, place.row));
  if (lse) lse[place.row] = result.lse;
  if (t_bar) t_bar[place.row] = result.t_bar;
  if (!o) return;
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    const float value = result.o(state.o1[place.vector + d], state.o2[place.vector + d]);
    cpu::store(cpu::RealOf<T>(value), o + d);
  }
}

// Calls body(b, h, i) for every row, in parallel over (b, h).
template <class Body>
void for_each_row(const AttentionProblem& problem, const ParallelFor& parallel_for,
                  const Body& body) {
  const std::int64_t num_tasks = problem.batch * problem.num_q_heads;
  if (num_tasks == 0) return;
  parallel_for(num_tasks, [&](std::int64_t task, int) {
    const std::int64_t b = task / problem.num_q_heads, h = task % problem.num_q_heads;
    for (std::int64_t i = 0; i < problem.q_len; ++i) body(b, h, i);
  });
}

}  // namespace

Status merge_states(const AttentionProblem& problem, const StateView* states, int num_states,
                    const StateView& merged, const ParallelFor& parallel_for) {
  if (Status status = cpu::check_decode_problem(problem, {}); !status.ok()) return status;
  if (num_states < 0) {
    return Status::invalid_argument("num_states: expected at least 0, got " +
                                    std::to_string(num_states));
  }
  if (problem.batch * problem.q_len == 0) return {};
  if (Status status = check_state("merged", merged); !status.ok()) return status;
  for (int i = 0; i < num_states; ++i) {
    const std::string name = "states[" + std::to_string(i) + "]";
    if (Status status = check_state(name.c_str(), states[i]); !status.ok()) return status;
  }
  for_each_row(problem, parallel_for, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    merge_row(problem, states, num_states, place_of(problem, b, h, i), merged);
  });
  return {};
}

Status finalize_state(const AttentionProblem& problem, const StateView& state, const View& o,
                      float* lse, float* t_bar, const ParallelFor& parallel_for) {
  if (Status status = cpu::check_decode_problem(problem, {}); !status.ok()) return status;
  if (problem.batch * problem.q_len == 0) return {};
  if (Status status = check_state("state", state); !status.ok()) return status;
  cpu::with_element_type(problem.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_row(problem, parallel_for, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      T* row = o.data ? static_cast<T*>(o.data) + b * o.batch_stride + i * o.len_stride +
                            h * o.head_stride
                      : nullptr;
      finalize_row(problem, state, place_of(problem, b, h, i), row, lse, t_bar);
    });
  });
  return {};
}

}  // namespace parallax
