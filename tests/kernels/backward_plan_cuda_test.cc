// SPDX-License-Identifier: MIT
// Which kernels the CUDA backward plans for, and what it refuses before anything reaches a device:
// no GPU is needed.
#include <gtest/gtest.h>

#include "tests/kernels/cases.h"

namespace parallax::tests {
namespace {

Device device_of(int compute_capability, bool portable = false) {
  Device device;
  device.kind = Device::Kind::kCuda;
  device.compute_capability = compute_capability;
  device.num_sms = 132;
  device.portable = portable;
  return device;
}

const AttentionProblem kProblem = problem_of(DType::kBFloat16, 2, 200, 300, 4, 2, 64);

std::int64_t tasks_on(const Device& device) {
  BackwardPlan result;
  const Status status = plan(kProblem, device, &result);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_GT(workspace_bytes(result), 0u);
  return result.num_tasks;
}

// Query tiles of 64 rows, and key tiles of 128 or 64.
TEST(BackwardPlanCuda, GpusOtherThanHopperTakeThePortableKernels) {
  EXPECT_EQ(tasks_on(device_of(90)), 2 * (4 * 4 + 2 * 3));
  for (const Device& device : {device_of(80), device_of(89), device_of(120), device_of(90, true)}) {
    EXPECT_EQ(tasks_on(device), 2 * (4 * 4 + 2 * 5)) << device.compute_capability;
  }
}

TEST(BackwardPlanCuda, RefusesWhatItHasNoKernelFor) {
  const auto refusal = [](const AttentionProblem& problem, const Device& device) {
    BackwardPlan untouched;
    untouched.num_tasks = -1;
    const Status status = plan(problem, device, &untouched);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status.message();
    EXPECT_EQ(untouched.num_tasks, -1);
    return status.message();
  };
  EXPECT_EQ(refusal(kProblem, device_of(75)),
            "backward: compute capability 7.5 has no kernel, 8.0 and later have");
  AttentionProblem wide = kProblem;
  wide.head_dim = 136;
  EXPECT_EQ(refusal(wide, device_of(80)), "head_dim: the CUDA backward takes at most 128, got 136");
}

TEST(BackwardPlanCuda, ThePortableKernelsNameTheViewTheyCannotTake) {
  BackwardPlan call;
  ASSERT_TRUE(plan(kProblem, device_of(80), &call).ok());
  alignas(256) unsigned char memory[256] = {};
  BackwardArgs args;
  args.q = args.r = args.o = args.v_bar = args.d_o = {memory, 200 * 256, 256, 64};
  args.k = args.v = {memory, 300 * 128, 128, 64};
  args.dq = args.dr = {memory, 200 * 256, 256, 64};
  args.dk = args.dv = {memory, 300 * 128, 128, 64};
  const auto expect_refusal = [&](const BackwardArgs& bad, const std::string& name) {
    const Status status = run(call, bad, memory, Stream{});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), name +
                                    ": its address must be a multiple of 16 bytes and its "
                                    "strides multiples of 8 elements");
  };
  BackwardArgs bad = args;
  bad.d_o.len_stride = 260;
  expect_refusal(bad, "d_o");
  bad = args;
  bad.k.head_stride = 4;
  expect_refusal(bad, "k");
  bad = args;
  bad.dv.data = memory + 8;
  expect_refusal(bad, "dv");
}

}  // namespace
}  // namespace parallax::tests
