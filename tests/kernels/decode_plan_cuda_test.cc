// SPDX-License-Identifier: MIT
// What the CUDA decode plans for each kind of GPU, and what it refuses before anything reaches a
// device: no GPU is needed.
#include <gtest/gtest.h>

#include "tests/kernels/cases.h"

namespace parallax::tests {
namespace {

constexpr int kKiB = 1024;

Device device_of(int compute_capability, int num_sms, int sm_shared_kib) {
  Device device;
  device.kind = Device::Kind::kCuda;
  device.compute_capability = compute_capability;
  device.num_sms = num_sms;
  device.sm_shared_bytes = sm_shared_kib * kKiB;
  return device;
}

DecodePlan plan_on(const Device& device, const AttentionProblem& problem) {
  DecodePlan result;
  const Status status = plan(problem, device, &result);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

// One key/value head: a span for each CTA that the GPU holds.
TEST(DecodePlanCuda, SpansFillEveryGpu) {
  struct Row {
    Device device;
    std::int64_t spans[3];  // of head_dim 64, 128, 256
  };
  Device asked = device_of(90, 132, 228);
  asked.portable = true;
  for (const Row& row : {Row{device_of(90, 132, 228), {264, 264, 132}}, Row{asked, {264, 264, 264}},
                         Row{device_of(80, 108, 164), {216, 216, 216}},   // A100
                         Row{device_of(86, 46, 100), {92, 46, 46}},       // RTX 3070
                         Row{device_of(89, 128, 100), {256, 128, 128}},   // RTX 4090
                         Row{device_of(100, 148, 228), {296, 296, 296}},  // B200
                         Row{device_of(120, 170, 100), {340, 170, 170}},  // RTX 5090
                         Row{device_of(89, 1, 0), {1, 1, 1}}}) {          // never nothing
    int n = 0;
    for (std::int64_t head_dim : {64, 128, 256}) {
      const AttentionProblem problem = problem_of(DType::kBFloat16, 1, 1, 8192, 1, 1, head_dim);
      EXPECT_EQ(plan_on(row.device, problem).num_splits, row.spans[n++])
          << row.device.compute_capability << ", head_dim " << head_dim;
    }
  }
}

// Whatever the number of multiprocessors, heads side by side leave few of them without a CTA, and
// the workspace has room for two parts a span and head.
TEST(DecodePlanCuda, HeadsSideBySideLeaveFewMultiprocessorsIdle) {
  for (int num_sms = 40; num_sms <= 170; ++num_sms) {
    for (int sm_shared_kib : {100, 164, 228}) {
      for (std::int64_t kv_heads : {1, 2, 3, 8}) {
        const Device device = device_of(80, num_sms, sm_shared_kib);
        const AttentionProblem problem =
            problem_of(DType::kBFloat16, 4, 1, 8192, 4 * kv_heads, kv_heads, 128);
        const DecodePlan result = plan_on(device, problem);
        const std::int64_t ctas = num_sms * (sm_shared_kib > 100 ? 2 : 1);
        std::int64_t width = ctas / result.num_splits;
        while (kv_heads % width != 0) --width;
        EXPECT_LE(result.num_splits * width, ctas);
        EXPECT_GE(64 * result.num_splits * width, 63 * ctas) << num_sms << ", heads " << kv_heads;
        const std::size_t part = 8 * (2 * 128 + 4) * sizeof(float);  // 8 rows of a warp
        EXPECT_GE(workspace_bytes(result),
                  static_cast<std::size_t>(2 * result.num_splits * width) * part);
      }
    }
  }
}

TEST(DecodePlanCuda, RefusesWhatItHasNoKernelFor) {
  const auto refusal = [](const AttentionProblem& problem, const Device& device) {
    DecodePlan untouched;
    untouched.num_splits = -1;
    const Status status = plan(problem, device, &untouched);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status.message();
    EXPECT_EQ(untouched.num_splits, -1);
    return status.message();
  };
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, 1, 64, 1, 1, 64);
  EXPECT_EQ(refusal(problem, device_of(75, 72, 64)),
            "decode: compute capability 7.5 has no kernel, 8.0 and later have");
  problem.dtype = DType::kFloat32;
  EXPECT_EQ(refusal(problem, device_of(80, 108, 164)), "dtype: CUDA kernels take bf16 and fp16");
}

}  // namespace
}  // namespace parallax::tests
