// SPDX-License-Identifier: MIT
// Runs a case on the CPU through the public calls: plan, workspace, run. Every buffer starts full
// of NaN, keys that no query sees stay NaN, and the gaps between rows are checked afterwards.
#pragma once

#include "kernels/cpu/target.h"
#include "tests/kernels/oracle.h"

namespace parallax::tests {

struct How {
  int num_threads = 1;
  int page_size = 0;  // 0: contiguous
  const cpu::Target* target =
      nullptr;  // instruction set of the blocked kernels; null: run() chooses
};

// The tensors of a call, gaps poisoned: q, r or d_o; k or v, poisoned where no query looks too,
// over the scale of an FP8 cache.
Tensor queries(const Case& c, const Values& values);
Tensor keys(const Case& c, const Values& values, const std::vector<float>& scale = {});

// o, v_bar, lse, t_bar
Results cpu_forward(const Case& c, const How& how = {});
// The same and the gradients.
Results cpu_forward_backward(const Case& c, const How& how = {});
// o, lse, t_bar. The case needs kv_lens.
Results cpu_decode(const Case& c, const How& how = {});

// An exported state that owns its memory, and the view of it.
struct OwnedState {
  explicit OwnedState(const AttentionProblem& problem);
  StateView view();
  std::vector<float> m, d1, d2, o1, o2;
};
OwnedState cpu_decode_state(const Case& c, const How& how = {});
// o, lse, t_bar of a state.
Results cpu_finalize(const AttentionProblem& problem, OwnedState state);

}  // namespace parallax::tests
