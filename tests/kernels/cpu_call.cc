// SPDX-License-Identifier: MIT
#include "tests/kernels/cpu_call.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "kernels/cpu/backward.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/forward.h"

namespace parallax::tests {
Tensor queries(const Case& c, const Values& values) {
  Tensor tensor(c.problem, false);
  tensor.set(values);
  return tensor;
}

Tensor keys(const Case& c, const Values& values, const std::vector<float>& scale) {
  Tensor tensor(c.problem, true);
  tensor.set(values, scale);
  for (std::int64_t b = 0; b < c.problem.batch; ++b) {
    for (std::int64_t j = 0; j < kv_len_of(c, b); ++j) {
      bool seen = false;
      for (std::int64_t i = 0; i < q_len_of(c, b) && !seen; ++i) seen = visible(c, b, i, j);
      if (seen) continue;
      if (c.problem.packed) {
        tensor.poison(0, c.lengths.cu_seqlens_k[static_cast<std::size_t>(b)] + j);
      } else {
        tensor.poison(b, j);
      }
    }
  }
  if (!std::isnan(c.unseen)) tensor.replace_poison(c.unseen);
  return tensor;
}

namespace {

// Scratch memory aligned as run() wants it, full of NaN, with a guard behind it.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes)
      : bytes_(bytes), memory_(bytes + kGuard + 64, 0xff), start_(memory_.data()) {
    std::size_t space = memory_.size();
    void* start = start_;
    start_ = static_cast<unsigned char*>(std::align(64, bytes + kGuard, start, space));
  }
  ~Workspace() {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (start_[bytes_ + i] != 0xff) {
        ADD_FAILURE() << "run() wrote behind its workspace";
        return;
      }
    }
  }
  void* data() { return bytes_ == 0 ? nullptr : start_; }

 private:
  static constexpr std::size_t kGuard = 256;
  std::size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* start_;
};

// lse, t_bar in the type that the dtype asks for.
class Statistics {
 public:
  Statistics(const AttentionProblem& problem)
      : rows_(static_cast<std::size_t>((problem.packed ? 1 : problem.batch) * problem.q_len *
                                       problem.num_q_heads)),
        is_double_(problem.dtype == DType::kFloat64) {
    if (is_double_) {
      doubles_.assign(rows_, std::numeric_limits<double>::quiet_NaN());
    } else {
      floats_.assign(rows_, std::numeric_limits<float>::quiet_NaN());
    }
  }
  void* data() {
    return is_double_ ? static_cast<void*>(doubles_.data()) : static_cast<void*>(floats_.data());
  }
  Values values() const { return is_double_ ? doubles_ : Values(floats_.begin(), floats_.end()); }

 private:
  std::size_t rows_;
  bool is_double_;
  std::vector<float> floats_;
  Values doubles_;
};

void expect_ok(const Status& status, const Case& c) {
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
}

Device device_of(const How& how) {
  Device device;
  device.num_threads = how.num_threads;
  return device;
}

// The inputs of a case as tensors, in pages where asked.
struct Tensors {
  Tensors(const Case& c, const How& how)
      : q(queries(c, c.inputs.q)),
        r(queries(c, c.inputs.r)),
        k(keys(c, c.inputs.k, c.k_scale)),
        v(keys(c, c.inputs.v, c.v_scale)) {
    if (how.page_size == 0) return;
    paged.emplace(c.problem, how.page_size, 7);
    k = paged->scatter(k);
    v = paged->scatter(v);
  }
  PageTable table() const { return paged ? paged->table() : PageTable{}; }

  Tensor q, r, k, v;
  std::optional<PagedCache> paged;
};

// Runs the forward; keeps the tensors that the backward reads.
struct Forward {
  Forward(const Case& c, const How& how)
      : in(c, how), o(c.problem, false), v_bar(c.problem, false), lse(c.problem), t_bar(c.problem) {
    ForwardPlan forward;
    expect_ok(plan(c.problem, device_of(how), &forward), c);
    ForwardArgs args;
    args.q = in.q.const_view();
    args.r = in.r.const_view();
    args.k = in.k.const_view();
    args.v = in.v.const_view();
    if (!c.k_scale.empty()) args.k_scale = c.k_scale.data();
    if (!c.v_scale.empty()) args.v_scale = c.v_scale.data();
    args.sequences = c.lengths.view();
    args.pages = in.table();
    args.o = o.view();
    args.v_bar = v_bar.view();
    args.lse = lse.data();
    args.t_bar = t_bar.data();
    Workspace workspace(workspace_bytes(forward));
    if (how.target) {
      cpu::forward(forward, args, workspace.data(), parallel_for(how.num_threads), *how.target);
    } else {
      expect_ok(run(forward, args, workspace.data(), parallel_for(how.num_threads)), c);
    }
    EXPECT_TRUE(o.gaps_intact() && v_bar.gaps_intact()) << c.name;
  }
  Results results() const {
    Results results;
    results.o = o.values();
    results.v_bar = v_bar.values();
    results.lse = lse.values();
    results.t_bar = t_bar.values();
    return results;
  }

  Tensors in;
  Tensor o, v_bar;
  Statistics lse, t_bar;
};

// A decode's arguments, less where its results go.
DecodeArgs decode_args(const Case& c, const Tensors& in) {
  DecodeArgs args;
  args.q = in.q.const_view();
  args.r = in.r.const_view();
  args.k_cache = in.k.const_view();
  args.v_cache = in.v.const_view();
  if (!c.k_scale.empty()) args.k_scale = c.k_scale.data();
  if (!c.v_scale.empty()) args.v_scale = c.v_scale.data();
  args.sequences = c.lengths.view();
  args.pages = in.table();
  return args;
}

void run_decode(const Case& c, const How& how, const DecodeArgs& args) {
  DecodePlan decode;
  expect_ok(plan(c.problem, device_of(how), &decode), c);
  Workspace workspace(workspace_bytes(decode));
  if (how.target) {
    cpu::decode(decode, args, workspace.data(), parallel_for(how.num_threads), *how.target);
  } else {
    expect_ok(run(decode, args, workspace.data(), parallel_for(how.num_threads)), c);
  }
}

}  // namespace

Results cpu_forward(const Case& c, const How& how) { return Forward(c, how).results(); }

Results cpu_forward_backward(const Case& c, const How& how) {
  Forward forward(c, how);
  const Tensor d_o = queries(c, c.inputs.d_o);
  Tensor dq(c.problem, false), dr(c.problem, false), dk(c.problem, true), dv(c.problem, true);
  BackwardPlan backward;
  expect_ok(plan(c.problem, device_of(how), &backward), c);
  BackwardArgs args;
  args.q = forward.in.q.const_view();
  args.r = forward.in.r.const_view();
  args.k = forward.in.k.const_view();
  args.v = forward.in.v.const_view();
  args.o = forward.o.const_view();
  args.v_bar = forward.v_bar.const_view();
  args.d_o = d_o.const_view();
  args.lse = forward.lse.data();
  args.t_bar = forward.t_bar.data();
  args.sequences = c.lengths.view();
  args.dq = dq.view();
  args.dr = dr.view();
  args.dk = dk.view();
  args.dv = dv.view();
  Workspace workspace(workspace_bytes(backward));
  if (how.target) {
    cpu::backward(backward, args, workspace.data(), parallel_for(how.num_threads), *how.target);
  } else {
    expect_ok(run(backward, args, workspace.data(), parallel_for(how.num_threads)), c);
  }
  EXPECT_TRUE(dq.gaps_intact() && dr.gaps_intact() && dk.gaps_intact() && dv.gaps_intact());
  Results results = forward.results();
  results.dq = dq.values();
  results.dr = dr.values();
  results.dk = dk.values();
  results.dv = dv.values();
  return results;
}

Results cpu_decode(const Case& c, const How& how) {
  const Tensors in(c, how);
  Tensor o(c.problem, false);
  Statistics lse(c.problem), t_bar(c.problem);
  DecodeArgs args = decode_args(c, in);
  args.o = o.view();
  args.lse = lse.data();
  args.t_bar = t_bar.data();
  run_decode(c, how, args);
  EXPECT_TRUE(o.gaps_intact()) << c.name;
  Results results;
  results.o = o.values();
  results.lse = lse.values();
  results.t_bar = t_bar.values();
  return results;
}

OwnedState::OwnedState(const AttentionProblem& problem) {
  const auto rows = static_cast<std::size_t>(problem.batch * problem.q_len * problem.num_q_heads);
  const auto elements = rows * static_cast<std::size_t>(problem.head_dim);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  m.assign(rows, nan);
  d1 = d2 = m;
  o1.assign(elements, nan);
  o2 = o1;
}

StateView OwnedState::view() { return {m.data(), d1.data(), d2.data(), o1.data(), o2.data()}; }

OwnedState cpu_decode_state(const Case& c, const How& how) {
  const Tensors in(c, how);
  OwnedState state(c.problem);
  DecodeArgs args = decode_args(c, in);
  args.state = state.view();
  run_decode(c, how, args);
  return state;
}

Results cpu_finalize(const AttentionProblem& problem, OwnedState state) {
  Tensor o(problem, false);
  std::vector<float> lse(state.m.size()), t_bar(state.m.size());
  const Status status =
      finalize_state(problem, state.view(), o.view(), lse.data(), t_bar.data(), parallel_for(1));
  EXPECT_TRUE(status.ok()) << status.message();
  Results results;
  results.o = o.values();
  results.lse.assign(lse.begin(), lse.end());
  results.t_bar.assign(t_bar.begin(), t_bar.end());
  return results;
}

}  // namespace parallax::tests
