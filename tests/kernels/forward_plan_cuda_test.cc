// SPDX-License-Identifier: MIT
// What the CUDA forward refuses, and how: before anything reaches a device, so no GPU is needed.
#include <gtest/gtest.h>

#include "tests/kernels/cases.h"

namespace parallax::tests {
namespace {

constexpr Device kHopper{Device::Kind::kCuda, 1, 0, 90, 132};

class ForwardPlanCuda : public testing::Test {
 protected:
  void SetUp() override { plan_ = planned(problem_); }

  static ForwardPlan planned(const AttentionProblem& problem) {
    ForwardPlan result;
    const Status status = plan(problem, kHopper, &result);
    EXPECT_TRUE(status.ok()) << status.message();
    return result;
  }

  // Arguments whose addresses and strides are fine; nothing is ever read from them.
  ForwardArgs good_args() {
    ForwardArgs args;
    args.q = args.r = args.k = args.v = {memory_, 64 * 128, 128, 64};
    args.o = {memory_, 64 * 128, 128, 64};
    return args;
  }

  void expect_refusal(const ForwardArgs& args, const std::string& beginning) {
    const Status status = run(plan_, args, memory_, Stream{});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().substr(0, beginning.size()), beginning) << status.message();
  }

  AttentionProblem problem_ = problem_of(DType::kBFloat16, 2, 64, 64, 2, 2, 64);
  ForwardPlan plan_;
  alignas(256) unsigned char memory_[256] = {};
};

TEST_F(ForwardPlanCuda, CountsQueryTilesAndWorkspace) {
  EXPECT_EQ(plan_.num_tasks, 2 * 2);
  EXPECT_EQ(workspace_bytes(plan_), 256u);
  AttentionProblem packed = problem_;
  packed.packed = true;
  packed.batch = 10;
  packed.q_len = 1000;
  packed.kv_len = 1000;
  // At most: every sequence may end inside a tile.
  EXPECT_EQ(planned(packed).num_tasks, (1000 / 96 + 10) * 2);
  EXPECT_EQ(workspace_bytes(planned(packed)), 256u + 4 * 21);
}

TEST_F(ForwardPlanCuda, OtherGpusTakeThePortableKernel) {
  Device ampere = kHopper;
  ampere.compute_capability = 80;
  Device asked = kHopper;
  asked.portable = true;
  for (const Device& device : {ampere, asked}) {
    ForwardPlan portable;
    ASSERT_TRUE(plan(problem_, device, &portable).ok());
    EXPECT_EQ(portable.num_tasks, 2 * 2);  // 64 queries a tile
    EXPECT_EQ(workspace_bytes(portable), 0u);
    AttentionProblem wide = problem_;
    wide.q_len = 65;
    ASSERT_TRUE(plan(wide, device, &portable).ok());
    EXPECT_EQ(portable.num_tasks, 2 * 2 * 2);
  }
}

TEST_F(ForwardPlanCuda, ThePortableKernelNamesWhatItCannotTake) {
  Device asked = kHopper;
  asked.portable = true;
  ASSERT_TRUE(plan(problem_, asked, &plan_).ok());
  ForwardArgs args = good_args();
  args.k.len_stride = 129;
  expect_refusal(args, "k: its address must be a multiple of 16 bytes and its strides");
  args = good_args();
  args.r.data = memory_ + 8;
  expect_refusal(args, "r: its address must be a multiple of 16 bytes and its strides");
  args = good_args();
  args.pages = {reinterpret_cast<const std::int32_t*>(memory_), 4, 8, 24};
  expect_refusal(args, "page_size: expected a power of two from 1 to 256, got 24");
  args.pages.page_size = 8;
  expect_refusal(args, "kv_len: expected at most max_pages * page_size = 32, got 64");
}

TEST_F(ForwardPlanCuda, RefusesWhatItHasNoKernelFor) {
  const auto refusal = [&](const AttentionProblem& problem, const Device& device) {
    ForwardPlan untouched;
    untouched.num_tasks = -1;
    const Status status = plan(problem, device, &untouched);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status.message();
    EXPECT_EQ(untouched.num_tasks, -1);
    return status.message();
  };
  Device turing = kHopper;
  turing.compute_capability = 75;
  EXPECT_EQ(refusal(problem_, turing),
            "forward: compute capability 7.5 has no kernel, 8.0 and later have");
  AttentionProblem long_keys = problem_;
  long_keys.kv_len = std::int64_t{1} << 30;
  EXPECT_EQ(refusal(long_keys, kHopper).substr(0, 31), "forward: q_len and kv_len must ");
}

TEST_F(ForwardPlanCuda, NamesTheViewThatTheCopyEngineCannotTake) {
  ForwardArgs args = good_args();
  args.k.len_stride = 129;
  expect_refusal(args, "k: a stride is 129 elements");
  args = good_args();
  args.r.batch_stride = 0;
  expect_refusal(args, "r: a stride is 0 elements");
  args = good_args();
  args.v.data = memory_ + 8;
  expect_refusal(args, "v: its address must be a multiple of 16 bytes");
  args = good_args();
  args.o.len_stride = 132;
  expect_refusal(args, "o: its address must be a multiple of 16 bytes and its strides");
}

TEST_F(ForwardPlanCuda, NamesTheMemoryThatIsMissing) {
  ForwardArgs args = good_args();
  args.v.data = nullptr;
  expect_refusal(args, "v: expected device memory");
  plan_.problem.packed = true;
  expect_refusal(good_args(), "cu_seqlens_q: expected device memory");
}

TEST_F(ForwardPlanCuda, APlanForTheCpuRunsOnTheCpu) {
  ASSERT_TRUE(plan(problem_, Device{}, &plan_).ok());
  expect_refusal(good_args(), "plan: made for the CPU");
}

}  // namespace
}  // namespace parallax::tests
