// SPDX-License-Identifier: MIT
// What the CUDA decode makes of the memory around a cache's tokens: infinities where nobody looks,
// and caches of more than 2^31 elements, which append_kv fills. Skips itself on a machine without a
// GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/kernels/cuda_decode.h"

namespace parallax::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class DecodeMemoryCuda : public testing::TestWithParam<Kernels> {
 protected:
  void SetUp() override {
    if (!has_gpu_for(GetParam())) GTEST_SKIP() << "needs another GPU";
  }
  static CudaDecodeHow how() {
    CudaDecodeHow how;
    how.kernels = GetParam();
    return how;
  }
};
INSTANTIATE_TEST_SUITE_P(, DecodeMemoryCuda, testing::Values(Kernels::kHopper, Kernels::kPortable),
                         [](const auto& info) {
                           return info.param == Kernels::kHopper ? "Hopper" : "Portable";
                         });

void expect_same(const Results& a, const Results& b, const std::string& name) {
  EXPECT_EQ(a.o, b.o) << name;
  EXPECT_EQ(a.lse, b.lse) << name;
  EXPECT_EQ(a.t_bar, b.t_bar) << name;
}

// They survive a maximum, which NaN does not, and their product with zero is NaN.
TEST_P(DecodeMemoryCuda, InfinitiesThatNobodySeesChangeNoBit) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (std::int64_t head_dim : {40, 64, 128, 256}) {
      for (std::int64_t window : {0, 70}) {
        Case c = ragged_case(dtype, 3, 6, 2, head_dim, window, Data::kShifted);
        const Results expected = cuda_decode(c, how());
        for (double unseen : {kInfinity, -kInfinity}) {
          c.unseen = unseen;
          CudaDecodeHow paged = how();
          for (int page_size : {0, 16}) {
            paged.page_size = page_size;
            expect_same(cuda_decode(c, paged), expected, c.name);
          }
        }
      }
    }
  }
}

// k and v of three sequences, and a cache of more than 2^31 elements that append_kv fills.
class LargeCache {
 public:
  static constexpr std::int64_t kBatch = 3, kLen = 200, kHeads = 2, kHeadDim = 64;
  static constexpr std::int64_t kToken = kHeads * kHeadDim;
  static constexpr std::int64_t kElements = (std::int64_t{1} << 31) + 1024 * kToken;

  explicit LargeCache(Kernels kernels)
      : device_(cuda_device(kernels)),
        k_(2 * kElements),
        v_(2 * kElements),
        positions_(sizeof(std::int32_t) * kBatch) {
    case_.name = "cache beyond 2^31 elements";
    case_.problem = problem_of(DType::kBFloat16, kBatch, 1, kLen, 2 * kHeads, kHeads, kHeadDim);
    case_.lengths.kv_lens = {200, 1, 77};
    case_.inputs = random_inputs(case_.problem, Data::kShifted, 9);
    case_.inputs.d_o.clear();
    const std::vector<std::int32_t> zeros(kBatch, 0);
    positions_.upload(zeros.data(), positions_.size());
  }

  // Appends all tokens to caches of these strides and decodes.
  Results append_and_decode(std::int64_t batch_stride, const PageTable& pages) {
    AttentionProblem tokens = case_.problem;
    tokens.q_len = kLen;
    Tensor k_host(case_.problem, true), v_host(case_.problem, true);
    k_host.set(case_.inputs.k);
    v_host.set(case_.inputs.v);
    const DeviceTensor k(k_host), v(v_host);
    AppendArgs append;
    append.k = k.view();
    append.v = v.view();
    append.positions = static_cast<const std::int32_t*>(positions_.data());
    append.pages = pages;
    append.k_cache = {k_.data(), batch_stride, kToken, kHeadDim};
    append.v_cache = {v_.data(), batch_stride, kToken, kHeadDim};
    expect_ok(append_kv(tokens, append, device_, nullptr));

    DecodePlan call;
    expect_ok(plan(case_.problem, device_, &call));
    const DeviceMemory workspace(workspace_bytes(call));
    const DeviceTensor q(queries(case_, case_.inputs.q)), r(queries(case_, case_.inputs.r));
    DeviceTensor o(Tensor(case_.problem, false));
    const DeviceLengths lengths(case_.lengths);
    DecodeArgs args;
    args.q = q.view();
    args.r = r.view();
    args.k_cache = {k_.data(), batch_stride, kToken, kHeadDim};
    args.v_cache = {v_.data(), batch_stride, kToken, kHeadDim};
    args.pages = pages;
    args.sequences = lengths.view();
    args.o = o.output();
    expect_ok(run(call, args, workspace.data(), nullptr));
    Results results;
    results.o = o.download().values();
    return results;
  }

  const Case& small() const { return case_; }

 private:
  static void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

  Device device_;
  Case case_;
  DeviceMemory k_, v_, positions_;
};

TEST_P(DecodeMemoryCuda, CachesBeyond2To31Elements) {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total_bytes), cudaSuccess);
  if (free_bytes < 5 * std::size_t{LargeCache::kElements}) {
    GTEST_SKIP() << "needs 11 GB of device memory";
  }
  LargeCache cache(GetParam());
  const Values expected = cuda_decode(cache.small(), how()).o;
  // The third sequence begins at element 2^31.
  EXPECT_EQ(cache.append_and_decode(std::int64_t{1} << 30, {}).o, expected) << "contiguous";

  // The last pages of the pool, all behind element 2^31.
  constexpr int kPageSize = 16;
  constexpr std::int64_t kPage = kPageSize * LargeCache::kToken, kMaxPages = 13;
  constexpr std::int64_t kPages = LargeCache::kElements / kPage;
  std::vector<std::int32_t> entries;
  for (std::int64_t i = 0; i < LargeCache::kBatch * kMaxPages; ++i) {
    entries.push_back(static_cast<std::int32_t>(kPages - 1 - (i * 17) % 61));
  }
  DeviceMemory table(sizeof(std::int32_t) * entries.size());
  table.upload(entries.data(), table.size());
  const PageTable pages = {static_cast<const std::int32_t*>(table.data()), kMaxPages, kPages,
                           kPageSize};
  EXPECT_EQ(cache.append_and_decode(kPage, pages).o, expected) << "paged";
}

}  // namespace
}  // namespace parallax::tests
