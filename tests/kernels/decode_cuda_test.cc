// SPDX-License-Identifier: MIT
// The CUDA decode, by the Hopper and by the portable kernels, against the definition, against the
// float64 CPU kernel where that takes too long, and against what must be exactly so. Skips itself
// on a machine without a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "tests/kernels/cuda_decode.h"

namespace parallax::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};
constexpr double kLargestError = 5e-3;  // of o, relative, Frobenius

class DecodeCuda : public testing::TestWithParam<Kernels> {
 protected:
  void SetUp() override {
    if (!has_gpu_for(GetParam())) GTEST_SKIP() << "needs another GPU";
  }
  static CudaDecodeHow how() {
    CudaDecodeHow how;
    how.kernels = GetParam();
    return how;
  }
  static Results decode(const Case& c) { return cuda_decode(c, how()); }
};
INSTANTIATE_TEST_SUITE_P(, DecodeCuda, testing::Values(Kernels::kHopper, Kernels::kPortable),
                         [](const auto& info) {
                           return info.param == Kernels::kHopper ? "Hopper" : "Portable";
                         });

std::vector<Case> ragged_cases(DType dtype, Data data) {
  std::vector<Case> cases;
  for (std::int64_t head_dim : {8, 40, 64, 96, 128, 200, 256}) {
    cases.push_back(ragged_case(dtype, 1, 2, 2, head_dim, 0, data));
    cases.push_back(ragged_case(dtype, 2, 6, 2, head_dim, 0, data));
    cases.push_back(ragged_case(dtype, 5, 8, 2, head_dim, 70, data));
  }
  for (std::int64_t head_dim : {64, 128, 256}) {
    cases.push_back(ragged_case(dtype, 32, 3, 1, head_dim, 0, data));
    cases.push_back(ragged_case(dtype, 4, 17, 1, head_dim, 0, data));
    cases.push_back(ragged_case(dtype, 2, 7, 1, head_dim, 65, data));
  }
  for (std::int64_t window : {1, 64, 65}) {
    cases.push_back(ragged_case(dtype, 3, 3, 1, 128, window, data));
  }
  cases.push_back(ragged_case(dtype, 4, 2, 1, 128, 0, data));
  cases.back().problem.causal = false;
  cases.back().name += ", full";
  return cases;
}

void expect_close(const Case& c, const Results& ours, const Results& exact) {
  EXPECT_LE(relative_or_absolute_error(ours.o, exact.o), kLargestError) << c.name;
  EXPECT_LE(distance(ours.lse, exact.lse), 1e-4 * std::max(1.0, largest(exact.t_bar))) << c.name;
  EXPECT_LE(distance(ours.t_bar, exact.t_bar), 1e-4 * std::max(1.0, largest(exact.t_bar)))
      << c.name;
}

Results exact_on_cpu(Case c) {
  c.problem.dtype = DType::kFloat64;
  c.problem.kv_dtype.reset();  // its elements times their scales are in c.inputs
  c.k_scale.clear();
  c.v_scale.clear();
  return cpu_decode(c, {static_cast<int>(std::thread::hardware_concurrency()), 0});
}

void expect_same(const Results& a, const Results& b, const std::string& name) {
  EXPECT_EQ(a.o, b.o) << name;
  EXPECT_EQ(a.lse, b.lse) << name;
  EXPECT_EQ(a.t_bar, b.t_bar) << name;
}

TEST_P(DecodeCuda, HoldsTheErrorRule) {
  for (DType dtype : kDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (const Case& c : ragged_cases(dtype, data)) {
        const Expected expected(c);
        const Results ours = decode(c);
        EXPECT_EQ(error_rule(c, ours, expected), "");
        expect_close(c, ours, expected.exact);
      }
    }
  }
}

// Splits, items that begin and end anywhere, several passes over the rows.
std::vector<Case> long_cases(DType dtype, Data data) {
  struct Shape {
    std::int64_t batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim, window;
  };
  const Shape shapes[] = {
      {1, 1, 5000, 1, 1, 128, 0},  {1, 1, 40000, 8, 8, 64, 0}, {3, 1, 5000, 8, 2, 128, 0},
      {3, 4, 3000, 8, 1, 128, 0},  {2, 2, 3000, 5, 5, 64, 0},  {3, 9, 2000, 8, 1, 256, 700},
      {1, 1, 3000, 16, 1, 256, 0}, {2, 1, 9000, 2, 1, 256, 0}, {40, 1, 700, 6, 3, 128, 0},
      {1, 3, 5000, 11, 1, 128, 0}, {1, 5, 4000, 13, 1, 64, 0}};
  std::vector<Case> cases;
  for (const Shape& shape : shapes) {
    Case c;
    c.problem = problem_of(dtype, shape.batch, shape.q_len, shape.kv_len, shape.num_q_heads,
                           shape.num_kv_heads, shape.head_dim);
    c.problem.window = shape.window;
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      c.lengths.kv_lens.push_back(static_cast<std::int32_t>(shape.kv_len - 611 * b % shape.kv_len));
      c.lengths.kv_start.push_back(static_cast<std::int32_t>(b % 3 * 37));
    }
    c.inputs = random_inputs(c.problem, data, 31);
    c.inputs.d_o.clear();
    c.name = std::string(name_of(dtype)) + " " + std::to_string(shape.batch) + " x " +
             std::to_string(shape.kv_len) + ", " + std::to_string(shape.num_q_heads) +
             " heads of " + std::to_string(shape.head_dim);
    cases.push_back(std::move(c));
  }
  return cases;
}

TEST_P(DecodeCuda, LongCachesStayWithinTheError) {
  for (DType dtype : kDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      if (dtype == DType::kFloat16 && data == Data::kZeroMean) continue;
      for (const Case& c : long_cases(dtype, data)) {
        expect_close(c, decode(c), exact_on_cpu(c));
      }
    }
  }
}

TEST_P(DecodeCuda, Fp8CachesHoldTheErrorRule) {
  for (DType dtype : kDTypes) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      if (dtype == DType::kFloat16 && data == Data::kZeroMean) continue;
      for (Case& c : ragged_cases(dtype, data)) {
        quantise_cache(&c);
        const Expected expected(c);
        const Results ours = decode(c);
        EXPECT_EQ(error_rule(c, ours, expected), "") << "fp8, " << c.name;
        expect_close(c, ours, expected.exact);
      }
    }
  }
  for (Case& c : long_cases(DType::kBFloat16, Data::kShifted)) {
    quantise_cache(&c);
    const Results ours = decode(c);
    expect_close(c, ours, exact_on_cpu(c));
    CudaDecodeHow how = DecodeCuda::how();
    how.page_size = 16;
    expect_same(ours, cuda_decode(c, how), c.name + ", pages of 16");
  }
}

TEST_P(DecodeCuda, PagesEqualAContiguousCache) {
  std::vector<Case> cases = {ragged_case(DType::kBFloat16, 3, 6, 2, 128, 0, Data::kShifted),
                             ragged_case(DType::kFloat16, 1, 2, 1, 64, 100, Data::kShifted),
                             ragged_case(DType::kBFloat16, 2, 2, 1, 256, 0, Data::kShifted)};
  for (std::size_t i : {2, 3}) cases.push_back(long_cases(DType::kBFloat16, Data::kShifted)[i]);
  for (const Case& c : cases) {
    const Results whole = decode(c);
    for (int page_size : {1, 2, 8, 16, 64, 256}) {
      const std::string name = c.name + ", pages of " + std::to_string(page_size);
      CudaDecodeHow how = DecodeCuda::how();
      how.page_size = page_size;
      expect_same(whole, cuda_decode(c, how), name);
      how.bad_pages = true;
      expect_same(whole, cuda_decode(c, how), name);
    }
  }
}

TEST_P(DecodeCuda, AScheduleServesEveryLayer) {
  for (const Case& c : long_cases(DType::kBFloat16, Data::kZeroMean)) {
    const Results own = decode(c);
    CudaDecodeHow how = DecodeCuda::how();
    how.own_schedule = false;
    CudaDecode call(c, how);
    ASSERT_TRUE(call.schedule(nullptr).ok());
    for (int layer = 0; layer < 3; ++layer) {
      call.poison_outputs();
      ASSERT_TRUE(call.run(nullptr).ok());
      expect_same(own, call.results(), c.name);
    }
  }
}

// Keys older than the step's own are read while append_kv() is under way, its own when it has
// ended.
TEST_P(DecodeCuda, ASettledRunReadsTheNewestKeysLast) {
  for (const Case& c : long_cases(DType::kBFloat16, Data::kShifted)) {
    const Results exact = decode(c);
    CudaDecodeHow how = DecodeCuda::how();
    how.own_schedule = false;
    CudaDecode call(c, how);
    ASSERT_TRUE(call.schedule(nullptr).ok());
    for (int step = 0; step < 5; ++step) {
      call.poison_outputs();
      call.withhold_newest();
      ASSERT_TRUE(call.append(nullptr).ok());
      ASSERT_TRUE(call.run_settled(nullptr).ok());
      expect_same(exact, call.results(), c.name);
    }
  }
}

TEST_P(DecodeCuda, ManySequencesOfFewTokens) {
  Case c;
  c.problem = problem_of(DType::kBFloat16, 2500, 1, 40, 2, 1, 64);
  for (int i = 0; i < 2500; ++i) c.lengths.kv_lens.push_back(i % 41);
  c.inputs = random_inputs(c.problem, Data::kShifted, 3);
  c.inputs.d_o.clear();
  c.name = "many";
  expect_close(c, decode(c), exact_on_cpu(c));
}

TEST_P(DecodeCuda, ARowThatSeesOneKeyGivesItsValueExactly) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {64, 128, 256}) {
      const Case c = ragged_case(dtype, 1, 1, 1, head_dim, 1, Data::kShifted);
      const Results ours = decode(c);
      for (std::size_t b = 0; b < 7; ++b) {
        const std::int64_t last = c.lengths.kv_lens[b] - 1;
        const auto size = static_cast<std::size_t>(head_dim);
        for (std::size_t d = 0; d < size; ++d) {
          const std::size_t at =
              (b * 300 + static_cast<std::size_t>(std::max<std::int64_t>(last, 0))) * size + d;
          EXPECT_EQ(ours.o[b * size + d], last < 0 ? 0.0 : c.inputs.v[at]) << b;
        }
        if (last < 0) {
          EXPECT_EQ(ours.lse[b], -kInfinity);
          EXPECT_EQ(ours.t_bar[b], 0.0);
        }
      }
    }
  }
}

TEST_P(DecodeCuda, ANanInAVisibleKeyIsSeen) {
  for (bool fp8 : {false, true}) {
    Case c = long_cases(DType::kBFloat16, Data::kZeroMean)[0];
    if (fp8) quantise_cache(&c);
    c.inputs.k[3000 * 128 + 5] = std::nan("");
    const Results ours = decode(c);
    EXPECT_TRUE(std::all_of(ours.o.begin(), ours.o.end(), [](double x) { return std::isnan(x); }))
        << c.name;
    EXPECT_TRUE(std::isnan(ours.lse[0])) << c.name;
  }
}

TEST_P(DecodeCuda, ZeroProbeIsSoftmaxAttention) {
  for (Case c : long_cases(DType::kBFloat16, Data::kShifted)) {
    std::fill(c.inputs.r.begin(), c.inputs.r.end(), 0.0);
    CudaDecodeHow how = DecodeCuda::how();
    how.with_state = true;
    CudaDecode call(c, how);
    ASSERT_TRUE(call.run(nullptr).ok());
    const OwnedState state = call.state();
    EXPECT_TRUE(std::all_of(state.d2.begin(), state.d2.end(), [](float x) { return x == 0; }));
    EXPECT_TRUE(std::all_of(state.o2.begin(), state.o2.end(), [](float x) { return x == 0; }));
    EXPECT_EQ(cpu_finalize(c.problem, state).o, decode(c).o) << c.name;
  }
}

TEST_P(DecodeCuda, AnExportedStateFinalizesToTheOutput) {
  std::vector<Case> cases = long_cases(DType::kBFloat16, Data::kZeroMean);
  cases.push_back(ragged_case(DType::kFloat16, 3, 6, 2, 40, 0, Data::kZeroMean));
  for (const Case& c : cases) {
    CudaDecodeHow how = DecodeCuda::how();
    how.with_state = true;
    CudaDecode call(c, how);
    ASSERT_TRUE(call.run(nullptr).ok());
    const Results through = cpu_finalize(c.problem, call.state()), direct = decode(c);
    EXPECT_LE(distance(direct.o, through.o), 0x1p-7 * largest(direct.o)) << c.name;
    EXPECT_LE(distance(direct.lse, through.lse), 1e-4) << c.name;
    EXPECT_LE(distance(direct.t_bar, through.t_bar), 1e-4 * largest(direct.t_bar)) << c.name;
  }
}

TEST_P(DecodeCuda, OutputsThatNobodyAskedForChangeNothing) {
  const Case c = long_cases(DType::kBFloat16, Data::kZeroMean)[2];
  CudaDecodeHow how = DecodeCuda::how();
  how.with_statistics = false;
  EXPECT_EQ(decode(c).o, cuda_decode(c, how).o);
}

TEST_P(DecodeCuda, NothingToDoIsNoError) {
  for (auto [batch, q_len, kv_len] : {std::tuple{0, 4, 4}, {2, 0, 4}, {2, 4, 0}, {0, 0, 0}}) {
    Case c;
    c.name = "nothing";
    c.problem = problem_of(DType::kBFloat16, batch, q_len, kv_len, 2, 1, 64);
    c.lengths.kv_lens.assign(static_cast<std::size_t>(batch), kv_len);
    c.inputs = random_inputs(c.problem, Data::kZeroMean, 1);
    EXPECT_EQ(decode(c).o, Values(c.inputs.q.size(), 0.0));
  }
}

TEST_P(DecodeCuda, AHundredRunsGiveTheSameBits) {
  for (const Case& c : long_cases(DType::kBFloat16, Data::kShifted)) {
    CudaDecode call(c, how());
    ASSERT_TRUE(call.run(nullptr).ok());
    const Results first = call.results();
    for (int i = 0; i < 100; ++i) {
      if (i % 10 == 0) call.poison_outputs();
      ASSERT_TRUE(call.run(nullptr).ok());
    }
    expect_same(first, call.results(), c.name);
  }
}

// Spans of every length: how many there are is the GPU's affair.
TEST_P(DecodeCuda, AnyNumberOfMultiprocessorsServes) {
  for (const Case& c : long_cases(DType::kBFloat16, Data::kShifted)) {
    const Results exact = exact_on_cpu(c);
    for (int num_sms : {1, 46, 108, 128, 170}) {
      CudaDecodeHow how = DecodeCuda::how();
      how.num_sms = num_sms;
      expect_close(c, cuda_decode(c, how), exact);
    }
  }
}

// One captured step, replayed as the sequences grow, shrink and vanish.
TEST_P(DecodeCuda, AGraphServesChangingLengths) {
  Case c = long_cases(DType::kBFloat16, Data::kShifted)[2];
  CudaDecodeHow how = DecodeCuda::how();
  how.own_schedule = false;
  CudaDecode call(c, how);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_TRUE(call.schedule(stream).ok());
  ASSERT_TRUE(call.run(stream).ok());
  ASSERT_TRUE(call.run(stream).ok());
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  const std::vector<std::vector<std::int32_t>> steps = {
      {5000, 4389, 3778}, {1, 2, 3}, {0, 0, 0}, {4000, 0, 63}, {0, 4389, 64}};
  for (const std::vector<std::int32_t>& kv_lens : steps) {
    Case now = c;
    // What the first call's lengths left out is poison in its cache: none may grow beyond them.
    now.lengths.kv_lens = kv_lens;
    call.set_lengths(now.lengths);
    call.poison_outputs();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    expect_same(decode(now), call.results(), std::to_string(kv_lens[0]));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_P(DecodeCuda, RefusesWhatItCannotRead) {
  const AttentionProblem problem = problem_of(DType::kBFloat16, 1, 1, 64, 1, 1, 64);
  DecodePlan call;
  ASSERT_TRUE(plan(problem, cuda_device(GetParam()), &call).ok());
  DeviceMemory memory(1 << 20), workspace(workspace_bytes(call));
  const auto refusal = [&](auto change) {
    DecodeArgs args;
    args.q = args.r = args.k_cache = args.v_cache = {memory.data(), 4096, 64, 64};
    args.o = {memory.data(), 4096, 64, 64};
    args.sequences.kv_lens = static_cast<const std::int32_t*>(memory.data());
    change(&args);
    const Status status = run(call, args, workspace.data(), nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_THAT(refusal([](DecodeArgs* args) { args->k_cache.len_stride = 65; }),
              testing::StartsWith("k_cache: "));
  EXPECT_THAT(refusal([](DecodeArgs* args) { args->sequences.kv_lens = nullptr; }),
              testing::StartsWith("kv_lens: "));
  EXPECT_THAT(refusal([](DecodeArgs* args) { args->o.data = nullptr; }),
              testing::StartsWith("o: "));
  EXPECT_THAT(refusal([](DecodeArgs* args) { args->state.m = static_cast<float*>(args->o.data); }),
              testing::StartsWith("state: "));
  EXPECT_THAT(refusal([](DecodeArgs* args) {
                args->pages = {args->sequences.kv_lens, 1, 1, 48};
              }),
              testing::StartsWith("page_size: "));
  EXPECT_THAT(refusal([](DecodeArgs* args) {
                args->pages = {args->sequences.kv_lens, 1, 1, 32};
              }),
              testing::StartsWith("kv_len: "));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

}  // namespace
}  // namespace parallax::tests
