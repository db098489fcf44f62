// SPDX-License-Identifier: MIT
// What a build with assertions (CMake preset `checked`) says of a page table that a GPU reads and
// no host looks at. Skips itself elsewhere, and on a machine without a Hopper GPU.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "tests/kernels/cuda_decode.h"

namespace parallax::tests {
namespace {

#ifdef NDEBUG
constexpr bool kHasAssertions = false;
#else
constexpr bool kHasAssertions = true;
#endif

constexpr std::int64_t kLen = 40, kHeadDim = 64;

// One sequence over pages of 16, the second of which is not in the pool of 8.
class BadTable {
 public:
  BadTable()
      : problem_(problem_of(DType::kBFloat16, 1, 1, kLen, 1, 1, kHeadDim)),
        rows_(kHeadDim * 2),
        cache_(8 * 16 * kHeadDim * 2),
        kv_lens_(sizeof(std::int32_t)),
        entries_(3 * sizeof(std::int32_t)) {
    const std::int32_t len = kLen, entries[] = {3, 8, 5};
    kv_lens_.upload(&len, sizeof(len));
    entries_.upload(entries, sizeof(entries));
  }

  void decode(Kernels kernels) {
    DecodePlan call;
    expect_ok(plan(problem_, cuda_device(kernels), &call));
    const DeviceMemory workspace(workspace_bytes(call));
    DecodeArgs args;
    args.q = args.r = {rows_.data(), kHeadDim, kHeadDim, kHeadDim};
    args.k_cache = args.v_cache = {cache_.data(), 16 * kHeadDim, kHeadDim, kHeadDim};
    args.sequences = sequences();
    args.pages = pages();
    args.o = {rows_.data(), kHeadDim, kHeadDim, kHeadDim};
    expect_ok(run(call, args, workspace.data(), nullptr));
    die_of_the_device();
  }

  void forward() {
    ForwardPlan call;
    expect_ok(plan(problem_, cuda_device(Kernels::kPortable), &call));
    ForwardArgs args;
    args.q = args.r = {rows_.data(), kHeadDim, kHeadDim, kHeadDim};
    args.k = args.v = {cache_.data(), 16 * kHeadDim, kHeadDim, kHeadDim};
    args.sequences = sequences();
    args.pages = pages();
    args.o = {rows_.data(), kHeadDim, kHeadDim, kHeadDim};
    expect_ok(run(call, args, nullptr, nullptr));
    die_of_the_device();
  }

 private:
  static void expect_ok(const Status& status) {
    if (!status.ok()) std::fprintf(stderr, "refused by the host: %s\n", status.message().c_str());
  }
  static void die_of_the_device() {
    if (cudaDeviceSynchronize() == cudaErrorAssert) std::abort();
  }
  Sequences sequences() const {
    Sequences sequences;
    sequences.kv_lens = static_cast<const std::int32_t*>(kv_lens_.data());
    return sequences;
  }
  PageTable pages() const { return {static_cast<const std::int32_t*>(entries_.data()), 3, 8, 16}; }

  AttentionProblem problem_;
  DeviceMemory rows_, cache_, kv_lens_, entries_;
};

class CheckedCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!kHasAssertions) GTEST_SKIP() << "needs a build with assertions";
    if (!has_hopper()) GTEST_SKIP() << "needs a Hopper GPU";
    GTEST_FLAG_SET(death_test_style, "threadsafe");  // a child with a CUDA context of its own
  }
};

TEST_F(CheckedCuda, DecodeRefusesAVisiblePageThatIsNone) {
  for (Kernels kernels : {Kernels::kHopper, Kernels::kPortable}) {
    EXPECT_DEATH(BadTable().decode(kernels), "page_table: an entry of a visible token is no page");
  }
}

TEST_F(CheckedCuda, ThePortableForwardRefusesAVisiblePageThatIsNone) {
  EXPECT_DEATH(BadTable().forward(), "page_table: an entry of a visible token is no page");
}

}  // namespace
}  // namespace parallax::tests
