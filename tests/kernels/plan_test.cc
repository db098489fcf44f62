// SPDX-License-Identifier: MIT
// Calls that contradict attention.h are refused in one line that names what was wrong, and leave
// plan and memory alone.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/kernels/cases.h"

namespace parallax::tests {
namespace {

using testing::Test;

AttentionProblem good() { return problem_of(DType::kFloat32, 2, 3, 8, 4, 2, 16); }

struct BadProblem {
  const char* message;
  std::function<void(AttentionProblem*)> spoil;
};

const BadProblem kBadProblems[] = {
    {"batch: expected 0 to 2147483647, got -1", [](auto* p) { p->batch = -1; }},
    {"q_len: expected 0 to 2147483647, got -5", [](auto* p) { p->q_len = -5; }},
    {"kv_len: expected 0 to 2147483647, got 2147483648",
     [](auto* p) { p->kv_len = std::int64_t{1} << 31; }},
    {"num_kv_heads: expected 1 to 2147483647, got 0", [](auto* p) { p->num_kv_heads = 0; }},
    {"num_q_heads: expected a multiple of num_kv_heads = 2, got 5",
     [](auto* p) { p->num_q_heads = 5; }},
    {"head_dim: expected a multiple of 8 from 8 to 256, got 12", [](auto* p) { p->head_dim = 12; }},
    {"head_dim: expected a multiple of 8 from 8 to 256, got 264",
     [](auto* p) { p->head_dim = 264; }},
    {"head_dim: expected a multiple of 8 from 8 to 256, got 0", [](auto* p) { p->head_dim = 0; }},
    {"scale: expected a finite number, got nan", [](auto* p) { p->scale = std::nan(""); }},
    {"window: expected at least 1, or 0 for no window, got -1", [](auto* p) { p->window = -1; }},
    {"window: only a causal call takes one, got window = 4 with causal = false",
     [](auto* p) {
       p->window = 4;
       p->causal = false;
     }},
    {"dtype: expected float64, float32, bfloat16 or float16 (DType 0 to 3), got 9",
     [](auto* p) { p->dtype = static_cast<DType>(9); }},
};

template <class Plan>
void expect_refused(const AttentionProblem& problem, const Device& device, const char* message,
                    StatusCode code = StatusCode::kInvalidArgument) {
  Plan untouched;
  untouched.workspace_bytes = 12345;
  const Status status = plan(problem, device, &untouched);
  EXPECT_EQ(status.code(), code);
  EXPECT_EQ(status.message(), message);
  EXPECT_EQ(untouched.workspace_bytes, 12345u);
}

TEST(Plan, RefusesWhatContradictsTheContract) {
  for (const BadProblem& bad : kBadProblems) {
    AttentionProblem problem = good();
    bad.spoil(&problem);
    expect_refused<ForwardPlan>(problem, {}, bad.message);
    expect_refused<BackwardPlan>(problem, {}, bad.message);
    expect_refused<DecodePlan>(problem, {}, bad.message);
  }
}

TEST(Plan, RefusesADeviceWithoutThreads) {
  Device device;
  device.num_threads = 0;
  expect_refused<ForwardPlan>(good(), device, "num_threads: expected at least 1, got 0");
}

TEST(Plan, RefusesPackedDecode) {
  AttentionProblem problem = good();
  problem.packed = true;
  expect_refused<DecodePlan>(
      problem, {},
      "packed: decode takes [batch, q_len, heads, head_dim]; use forward for packed sequences");
}

// A call of each pass over real memory, to be spoiled.
class Run : public Test {
 protected:
  Run() {
    for (Tensor* tensor : {&q_, &r_, &o_, &v_bar_, &d_o_, &dq_, &dr_}) {
      *tensor = Tensor(good(), false);
      tensor->set(Values(2 * 3 * 4 * 16, 1.0));
    }
    for (Tensor* tensor : {&k_, &v_, &dk_, &dv_}) {
      *tensor = Tensor(good(), true);
      tensor->set(Values(2 * 8 * 2 * 16, 1.0));
    }
    forward_.q = q_.const_view();
    forward_.r = r_.const_view();
    forward_.k = k_.const_view();
    forward_.v = v_.const_view();
    forward_.o = o_.view();
    decode_.q = forward_.q;
    decode_.r = forward_.r;
    decode_.k_cache = forward_.k;
    decode_.v_cache = forward_.v;
    decode_.o = o_.view();
    decode_.sequences.kv_lens = kv_lens_;
    backward_.q = forward_.q;
    backward_.r = forward_.r;
    backward_.k = forward_.k;
    backward_.v = forward_.v;
    backward_.o = o_.const_view();
    backward_.v_bar = v_bar_.const_view();
    backward_.d_o = d_o_.const_view();
    backward_.lse = statistics_;
    backward_.t_bar = statistics_;
    backward_.dq = dq_.view();
    backward_.dr = dr_.view();
    backward_.dk = dk_.view();
    backward_.dv = dv_.view();
  }

  template <class Plan, class Args>
  static std::string message_of(const AttentionProblem& problem, const Args& args) {
    Plan planned;
    if (Status status = plan(problem, {}, &planned); !status.ok()) return status.message();
    std::vector<double> workspace(planned.workspace_bytes / sizeof(double) + 1);
    return run(planned, args, workspace.data(), parallel_for(1)).message();
  }
  std::string forward() const { return message_of<ForwardPlan>(problem_, forward_); }
  std::string backward() const { return message_of<BackwardPlan>(problem_, backward_); }
  std::string decode() const { return message_of<DecodePlan>(problem_, decode_); }

  AttentionProblem problem_ = good();
  Tensor q_, r_, k_, v_, o_, v_bar_, d_o_, dq_, dr_, dk_, dv_;
  float statistics_[24] = {};
  std::int32_t kv_lens_[2] = {8, 5};
  ForwardArgs forward_;
  BackwardArgs backward_;
  DecodeArgs decode_;
};

TEST_F(Run, TakesAGoodCall) {
  EXPECT_EQ(forward(), "");
  EXPECT_EQ(backward(), "");
  EXPECT_EQ(decode(), "");
}

TEST_F(Run, NamesAMissingArgument) {
  forward_.r.data = nullptr;
  EXPECT_EQ(forward(), "r: expected memory for 384 elements, got a null pointer");
  backward_.v_bar.data = nullptr;
  EXPECT_EQ(backward(), "v_bar: expected memory for 384 elements, got a null pointer");
  decode_.sequences.kv_lens = nullptr;
  EXPECT_EQ(decode(), "kv_lens: expected memory for 2 elements, got a null pointer");
}

TEST_F(Run, NamesAMissingOutput) {
  backward_.t_bar = nullptr;
  EXPECT_EQ(backward(), "t_bar: expected memory for 24 elements, got a null pointer");
  decode_.o.data = nullptr;
  EXPECT_EQ(decode(), "o: expected memory for 384 elements, got a null pointer");
}

TEST_F(Run, RefusesHalfAState) {
  decode_.state.m = statistics_;
  decode_.state.d1 = statistics_;
  EXPECT_EQ(decode(), "state: expected all of m, d1, d2, o1, o2 or none, got 2");
}

TEST_F(Run, RefusesOffsetsInABatchedCall) {
  const std::int32_t offsets[] = {0, 3, 6};
  forward_.sequences.cu_seqlens_q = offsets;
  EXPECT_EQ(forward(),
            "cu_seqlens_q and cu_seqlens_k: only a packed call takes them "
            "(AttentionProblem::packed)");
}

TEST_F(Run, ChecksPackedOffsets) {
  problem_.packed = true;
  EXPECT_EQ(forward(), "cu_seqlens_q: a packed call needs it, got null");
  std::int32_t q_offsets[] = {0, 2, 3}, k_offsets[] = {0, 9, 8};
  forward_.sequences.cu_seqlens_q = q_offsets;
  forward_.sequences.cu_seqlens_k = k_offsets;
  EXPECT_EQ(forward(), "cu_seqlens_k[2]: expected at least 9, got 8");
  k_offsets[1] = 4;
  k_offsets[2] = 7;
  EXPECT_EQ(forward(), "cu_seqlens_k[2]: expected 8, the number of tokens, got 7");
  k_offsets[2] = 8;
  EXPECT_EQ(forward(), "");
  q_offsets[0] = 1;
  EXPECT_EQ(forward(), "cu_seqlens_q[0]: expected 0, got 1");
  q_offsets[0] = 0;
  forward_.sequences.kv_lens = kv_lens_;
  EXPECT_EQ(forward(),
            "kv_lens and kv_start: a packed call takes its lengths from cu_seqlens_k alone");
}

TEST_F(Run, ChecksThePagesThatAreRead) {
  Tensor pages(DType::kFloat32, 6, 4, 2, 16);
  pages.set(Values(6 * 4 * 2 * 16, 1.0));
  std::int32_t table[] = {0, 5, 2, 6};
  decode_.k_cache = pages.const_view();
  decode_.v_cache = pages.const_view();
  decode_.pages = {table, 2, 6, 4};
  EXPECT_EQ(decode(), "page_table[1, 1]: expected a page from 0 to 5, got 6");
  kv_lens_[1] = 4;  // the bad entry is no longer read
  EXPECT_EQ(decode(), "");
  decode_.pages.page_size = 3;
  EXPECT_EQ(decode(), "page_size: expected a power of two from 1 to 256, got 3");
  decode_.pages.page_size = 512;
  EXPECT_EQ(decode(), "page_size: expected a power of two from 1 to 256, got 512");
  decode_.pages.page_size = 2;
  EXPECT_EQ(decode(), "kv_len: expected at most max_pages * page_size = 4, got 8");
}

TEST_F(Run, AsksForItsWorkspaceAndItsThreads) {
  BackwardPlan planned;
  ASSERT_TRUE(plan(problem_, {}, &planned).ok());
  ASSERT_GT(workspace_bytes(planned), 0u);
  EXPECT_EQ(run(planned, backward_, nullptr, parallel_for(1)).message(),
            "workspace: expected " + std::to_string(workspace_bytes(planned)) +
                " bytes, got a null pointer");
  ForwardPlan forward_plan;
  ASSERT_TRUE(plan(problem_, {}, &forward_plan).ok());
  std::vector<double> workspace(forward_plan.workspace_bytes / 8 + 1);
  EXPECT_EQ(run(forward_plan, forward_, workspace.data(), ParallelFor()).message(),
            "parallel_for: expected a function, got none");
  forward_plan.device.kind = Device::Kind::kCuda;
  EXPECT_EQ(run(forward_plan, forward_, workspace.data(), parallel_for(1)).message(),
            "plan: made for a CUDA device; run it with the overload that takes a stream");
}

TEST_F(Run, AppendRefusesBeforeItWrites) {
  AttentionProblem problem = good();
  Tensor cache(problem, true), tokens(DType::kFloat32, 2, 3, 2, 16);
  tokens.set(Values(2 * 3 * 2 * 16, 2.0));
  std::int32_t positions[] = {5, 6};
  AppendArgs args;
  args.k = tokens.const_view();
  args.v = tokens.const_view();
  args.k_cache = cache.view();
  args.v_cache = cache.view();
  args.positions = positions;
  const std::vector<unsigned char> before = cache.bytes();
  EXPECT_EQ(append_kv(problem, args, parallel_for(1)).message(),
            "positions[1]: expected 0 to 5 (capacity 8, new tokens 3), got 6");
  positions[1] = -1;
  EXPECT_EQ(append_kv(problem, args, parallel_for(1)).message(),
            "positions[1]: expected 0 to 5 (capacity 8, new tokens 3), got -1");
  positions[1] = 0;
  std::int32_t table[] = {0, 1, 2, -7};
  args.pages = {table, 2, 4, 4};
  positions[1] = 3;
  EXPECT_EQ(append_kv(problem, args, parallel_for(1)).message(),
            "page_table[1, 1]: expected a page from 0 to 3, got -7");
  args.pages = {};
  args.v.data = nullptr;
  EXPECT_EQ(append_kv(problem, args, parallel_for(1)).message(),
            "v: expected memory for 192 elements, got a null pointer");
  EXPECT_EQ(cache.bytes(), before);
}

TEST_F(Run, StatesMustBeWhole) {
  StateView state;
  state.m = statistics_;
  EXPECT_EQ(finalize_state(problem_, state, o_.view(), nullptr, nullptr, parallel_for(1)).message(),
            "state: expected all of m, d1, d2, o1, o2, got a null pointer");
  EXPECT_EQ(merge_states(problem_, &state, -1, state, parallel_for(1)).message(),
            "num_states: expected at least 0, got -1");
}

}  // namespace
}  // namespace parallax::tests
