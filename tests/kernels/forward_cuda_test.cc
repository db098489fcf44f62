// SPDX-License-Identifier: MIT
// The CUDA forward, by the Hopper and by the portable kernels, against the definition, against the
// float64 CPU kernel where that takes too long, and against what must be exactly so. Skips itself
// on a machine without a GPU for them.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "tests/kernels/cpu_call.h"
#include "tests/kernels/cuda_call.h"
#include "tests/kernels/cuda_decode.h"

namespace parallax::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};
constexpr double kLargestError = 4e-3;  // of o, relative, Frobenius

class ForwardCuda : public testing::TestWithParam<Kernels> {
 protected:
  void SetUp() override {
    if (!has_gpu_for(GetParam())) GTEST_SKIP() << "needs another GPU";
  }
  static CudaHow how() {
    CudaHow how;
    how.kernels = GetParam();
    return how;
  }
  static Results forward(const Case& c) { return cuda_forward(c, how()); }
};
INSTANTIATE_TEST_SUITE_P(, ForwardCuda, testing::Values(Kernels::kHopper, Kernels::kPortable),
                         [](const auto& info) {
                           return info.param == Kernels::kHopper ? "Hopper" : "Portable";
                         });

Case case_of(const AttentionProblem& problem, Data data = Data::kZeroMean, Lengths lengths = {}) {
  Case c{"case", problem, std::move(lengths), random_inputs(problem, data, 11)};
  c.inputs.d_o.clear();
  return c;
}

Results exact_on_cpu(Case c) {
  c.problem.dtype = DType::kFloat64;
  return cpu_forward(c, {static_cast<int>(std::thread::hardware_concurrency()), 0});
}

void expect_close(const Case& c, const Results& ours, const Results& exact) {
  const std::string name =
      c.name + ", " + name_of(c.problem.dtype) + ", head_dim " + std::to_string(c.problem.head_dim);
  EXPECT_LE(relative_or_absolute_error(ours.o, exact.o), kLargestError) << name;
  EXPECT_LE(relative_or_absolute_error(ours.v_bar, exact.v_bar), kLargestError) << name;
  EXPECT_LE(distance(ours.lse, exact.lse), 1e-4 * std::max(1.0, largest(exact.t_bar))) << name;
  EXPECT_LE(distance(ours.t_bar, exact.t_bar), 1e-4 * std::max(1.0, largest(exact.t_bar))) << name;
}

TEST_P(ForwardCuda, HoldsTheErrorRule) {
  std::vector<Case> cases;
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {8, 40, 64, 96, 128, 200, 256}) {
      for (Data data : {Data::kZeroMean, Data::kShifted}) {
        for (Case& c : all_cases(dtype, head_dim, data, 203)) {
          c.inputs.d_o.clear();
          cases.push_back(std::move(c));
        }
      }
    }
  }
  const auto expected = on_all_cores<std::unique_ptr<Expected>>(
      cases, [](const Case& c) { return std::make_unique<Expected>(c); });
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    const Results ours = forward(c);
    EXPECT_EQ(error_rule(c, ours, *expected[i]), "")
        << name_of(c.problem.dtype) << ", head_dim " << c.problem.head_dim;
    EXPECT_LE(relative_or_absolute_error(ours.o, expected[i]->exact.o), kLargestError)
        << c.name << ", " << name_of(c.problem.dtype) << ", head_dim " << c.problem.head_dim;
  }
}

TEST_P(ForwardCuda, LongRowsStayWithinTheError) {
  const std::vector<CaseShape> shapes = {{1023, 1024, 1, 0, true},   {1024, 1023, 3, 0, true},
                                         {1023, 1024, 1, 0, false},  {4097, 4097, 1, 0, true},
                                         {2000, 2000, 4, 200, true}, {700, 1900, 8, 1024, true},
                                         {64, 4097, 8, 0, true},     {4097, 640, 1, 0, false}};
  const std::vector<Case> cases = cases_of(shapes, {64, 128, 256}, 11);
  const auto exact = on_all_cores<Results>(cases, [](Case c) {
    c.problem.dtype = DType::kFloat64;
    return cpu_forward(c);
  });
  for (std::size_t i = 0; i < cases.size(); ++i) {
    expect_close(cases[i], forward(cases[i]), exact[i]);
  }
}

// Keys are met from the last to the first, and on the way logits grow by far more than p can.
TEST_P(ForwardCuda, EarlyKeysMayOutgrowTheLaterOnes) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {64, 128, 256}) {
      for (bool causal : {true, false}) {
        AttentionProblem problem = problem_of(dtype, 1, 700, 700, 2, 1, head_dim);
        problem.causal = causal;
        Case c = case_of(problem);
        const auto early = static_cast<std::ptrdiff_t>(256 * head_dim);
        std::for_each(c.inputs.k.begin(), c.inputs.k.begin() + early, [](double& x) { x *= 32; });
        std::for_each(c.inputs.r.begin(), c.inputs.r.end(), [](double& x) { x /= 512; });
        expect_close(c, forward(c), exact_on_cpu(c));
      }
    }
  }
}

TEST_P(ForwardCuda, AnyScaleIsTaken) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {40, 64, 128, 256}) {
      for (double scale : {-0.1, 0.0, 0.1}) {
        AttentionProblem problem = problem_of(dtype, 2, 300, 420, 4, 2, head_dim);
        problem.scale = scale;
        problem.window = 200;
        const Case c = case_of(problem);
        expect_close(c, forward(c), exact_on_cpu(c));
      }
      // With few keys a row, t_bar lies far from the centre and errors grow, here to 1e-2
      // (docs/math.md section 11); the error rule holds.
      for (double scale : {-0.3, 0.3, 1.0}) {
        AttentionProblem problem = problem_of(dtype, 1, 300, 420, 2, 1, head_dim);
        problem.scale = scale;
        problem.window = 200;
        const Case c = case_of(problem);
        EXPECT_EQ(error_rule(c, forward(c), Expected(c)), "")
            << name_of(dtype) << ", head_dim " << head_dim << ", scale " << scale;
      }
    }
  }
}

// What FP8 pages hold beyond the visible tokens is NaN, and so is the workspace before the call.
TEST_P(ForwardCuda, AnFp8CacheEqualsItsWidenedSelf) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {8, 40, 64, 128, 256}) {
      for (Case& c : all_cases(dtype, head_dim, Data::kShifted, 203)) {
        if (c.problem.packed) continue;
        quantise_cache(&c);
        const Results expected = forward(widened(c));
        CudaHow paged = how();
        for (int page_size : {0, 1, 16, 256}) {
          paged.page_size = page_size;
          const Results ours = cuda_forward(c, paged);
          const std::string name = c.name + ", " + name_of(dtype) + ", head_dim " +
                                   std::to_string(head_dim) + ", pages of " +
                                   std::to_string(page_size);
          EXPECT_EQ(ours.o, expected.o) << name;
          EXPECT_EQ(ours.v_bar, expected.v_bar) << name;
          EXPECT_EQ(ours.lse, expected.lse) << name;
          EXPECT_EQ(ours.t_bar, expected.t_bar) << name;
        }
      }
    }
  }
}

// Decode reads the same cache without writing it out first.
TEST_P(ForwardCuda, AnFp8CacheIsWhatDecodeReads) {
  CudaDecodeHow decode_how;
  decode_how.kernels = GetParam();
  for (std::int64_t window : {0, 50}) {
    Case c = ragged_case(DType::kBFloat16, 6, 8, 2, 128, window, Data::kShifted);
    quantise_cache(&c);
    const Results ours = forward(c), decoded = cuda_decode(c, decode_how);
    EXPECT_LE(relative_or_absolute_error(ours.o, decoded.o), 2 * kLargestError) << c.name;
  }
}

TEST_P(ForwardCuda, PackedSequencesOfAllLengths) {
  std::vector<std::int32_t> q_lens;
  std::vector<std::int32_t> kv_lens;
  for (int i = 0; i < 40; ++i) {
    q_lens.push_back(i * 37 % 211);
    kv_lens.push_back(i * 53 % 307);
  }
  q_lens.push_back(1500);
  kv_lens.push_back(1500);
  for (std::int64_t head_dim : {64, 128, 256}) {
    const Case c = [&] {
      Case packed = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 3, 1, head_dim), q_lens,
                                kv_lens, Data::kShifted, 3);
      packed.inputs.d_o.clear();
      return packed;
    }();
    expect_close(c, forward(c), exact_on_cpu(c));
  }
}

TEST_P(ForwardCuda, ManySequencesAreSortedInRuns) {
  const std::vector<std::int32_t> q_lens(2500, 3);
  std::vector<std::int32_t> kv_lens;
  for (int i = 0; i < 2500; ++i) kv_lens.push_back(i % 17);
  Case c = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 2, 1, 64), q_lens, kv_lens,
                       Data::kZeroMean, 3);
  c.inputs.d_o.clear();
  expect_close(c, forward(c), exact_on_cpu(c));
}

// The interleaved map, the same with q and r exchanged, and boxes of eight rows load the same tile.
TEST_P(ForwardCuda, WhereQAndRLieDoesNotChangeABit) {
  CudaHow r_below_q = how();
  r_below_q.r_below_q = true;
  for (std::int64_t head_dim : {64, 128, 256}) {
    const Case c = case_of(problem_of(DType::kBFloat16, 2, 200, 200, 2, 1, head_dim));
    const Results above = forward(c), below = cuda_forward(c, r_below_q);
    EXPECT_EQ(above.o, below.o) << head_dim;
    EXPECT_EQ(above.t_bar, below.t_bar) << head_dim;
  }
}

// Where a row lies changes no bit. Pages that nothing sees hold NaN and are not in the table.
TEST_P(ForwardCuda, PagesChangeNoBit) {
  for (std::int64_t head_dim : {40, 64, 128, 256}) {
    for (const Case& c : all_cases(DType::kBFloat16, head_dim, Data::kShifted, 203)) {
      if (c.problem.packed) continue;
      const Results expected = forward(c);
      CudaHow paged = how();
      for (int page_size : {1, 2, 8, 16, 64, 256}) {
        paged.page_size = page_size;
        const Results ours = cuda_forward(c, paged);
        EXPECT_EQ(ours.o, expected.o)
            << c.name << ", head_dim " << head_dim << ", pages of " << page_size;
        EXPECT_EQ(ours.lse, expected.lse) << c.name << ", pages of " << page_size;
      }
    }
  }
}

// Infinities beyond a sequence instead of NaN: they survive a maximum, and their product with zero
// is NaN.
TEST_P(ForwardCuda, InfinitiesThatNobodySeesChangeNoBit) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {40, 64, 128, 256}) {
      for (Case& c : all_cases(dtype, head_dim, Data::kShifted, 203)) {
        if (c.lengths.kv_lens.empty() && !c.problem.packed) continue;
        const Results expected = forward(c);
        for (double unseen : {kInfinity, -kInfinity}) {
          c.unseen = unseen;
          CudaHow paged = how();
          for (int page_size : {0, 16}) {
            if (page_size > 0 && c.problem.packed) continue;
            paged.page_size = page_size;
            const Results ours = cuda_forward(c, paged);
            EXPECT_EQ(ours.o, expected.o) << c.name << ", head_dim " << head_dim;
            EXPECT_EQ(ours.lse, expected.lse) << c.name << ", head_dim " << head_dim;
          }
        }
      }
    }
  }
}

// A chunk of a long prompt over what is cached of it.
TEST_P(ForwardCuda, AChunkOverPagesHoldsTheError) {
  Lengths lengths;
  lengths.kv_lens = {1700, 133};
  const Case c =
      case_of(problem_of(DType::kBFloat16, 2, 130, 2048, 8, 2, 128), Data::kShifted, lengths);
  CudaHow paged = how();
  paged.page_size = 16;
  expect_close(c, cuda_forward(c, paged), exact_on_cpu(c));
}

TEST_P(ForwardCuda, PackedEqualsEachSequenceAlone) {
  const Case packed = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 2, 1, 128), {5, 170, 1},
                                  {9, 170, 130}, Data::kShifted, 3);
  const Results together = forward(packed);
  for (std::size_t b = 0; b < 3; ++b) {
    const auto cut = [&](const Values& values, const std::vector<std::int32_t>& offsets,
                         std::int64_t row) {
      return Values(values.begin() + offsets[b] * row, values.begin() + offsets[b + 1] * row);
    };
    const Lengths& lengths = packed.lengths;
    Case alone;
    alone.problem = problem_of(DType::kBFloat16, 1, q_len_of(packed, static_cast<std::int64_t>(b)),
                               kv_len_of(packed, static_cast<std::int64_t>(b)), 2, 1, 128);
    alone.inputs.q = cut(packed.inputs.q, lengths.cu_seqlens_q, 256);
    alone.inputs.r = cut(packed.inputs.r, lengths.cu_seqlens_q, 256);
    alone.inputs.k = cut(packed.inputs.k, lengths.cu_seqlens_k, 128);
    alone.inputs.v = cut(packed.inputs.v, lengths.cu_seqlens_k, 128);
    EXPECT_EQ(forward(alone).o, cut(together.o, lengths.cu_seqlens_q, 256));
  }
}

TEST_P(ForwardCuda, ZeroProbeIsSoftmaxAttention) {
  for (std::int64_t head_dim : {64, 128, 256}) {
    Case c = case_of(problem_of(DType::kBFloat16, 2, 200, 300, 4, 2, head_dim));
    std::fill(c.inputs.r.begin(), c.inputs.r.end(), 0.0);
    const Results ours = forward(c);
    EXPECT_EQ(ours.o, ours.v_bar) << head_dim;
    EXPECT_EQ(ours.t_bar, Values(ours.t_bar.size(), 0.0)) << head_dim;
  }
}

TEST_P(ForwardCuda, ARowThatSeesOneKeyGivesItsValueExactly) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {64, 128, 256}) {
      AttentionProblem problem = problem_of(dtype, 1, 300, 300, 1, 1, head_dim);
      problem.window = 1;
      const Case c = case_of(problem, Data::kShifted);
      const Results ours = forward(c);
      EXPECT_EQ(ours.o, c.inputs.v) << name_of(dtype) << head_dim;
      EXPECT_EQ(ours.v_bar, c.inputs.v) << name_of(dtype) << head_dim;
    }
  }
}

TEST_P(ForwardCuda, ConstantValuesComeBack) {
  for (std::int64_t head_dim : {64, 128, 256}) {
    Case c = case_of(problem_of(DType::kBFloat16, 1, 70, 333, 4, 2, head_dim), Data::kShifted);
    std::fill(c.inputs.v.begin(), c.inputs.v.end(), 1.75);
    const Values expected(c.inputs.q.size(), 1.75);
    EXPECT_LE(relative_error(forward(c).o, expected), kLargestError) << head_dim;
  }
}

// A vector orthogonal to every q, added to every key, moves each row's t by a constant and nothing
// else: o must not follow, t_bar must.
TEST_P(ForwardCuda, AConstantOnTheProbesOfARowChangesNothing) {
  for (std::int64_t head_dim : {64, 128, 256}) {
    Case c = case_of(problem_of(DType::kBFloat16, 1, 150, 333, 4, 2, head_dim));
    set_probe_constant(&c, 0);
    const Results before = forward(c);
    set_probe_constant(&c, 100);
    const Results after = forward(c);
    EXPECT_LE(relative_error(after.o, before.o), kLargestError) << head_dim;
    for (std::size_t i = 0; i < before.t_bar.size(); ++i) {
      EXPECT_NEAR(after.t_bar[i], before.t_bar[i] + 100, 1e-2) << head_dim;
    }
  }
}

TEST_P(ForwardCuda, ARowThatSeesNoKeyGivesZeros) {
  Lengths lengths;
  lengths.kv_lens = {3, 0};
  const Case c = case_of(problem_of(DType::kBFloat16, 2, 5, 8, 1, 1, 64), Data::kShifted, lengths);
  const Results ours = forward(c);
  for (std::size_t row = 0; row < 10; ++row) {
    const bool sees_none = row < 2 || row >= 5;
    EXPECT_EQ(ours.lse[row] == -kInfinity, sees_none);
    if (!sees_none) continue;
    EXPECT_EQ(ours.t_bar[row], 0.0);
    for (std::size_t d = 0; d < 64; ++d) EXPECT_EQ(ours.o[row * 64 + d], 0.0);
  }
}

TEST_P(ForwardCuda, NothingToDoIsNoError) {
  for (auto [batch, q_len, kv_len] : {std::tuple{0, 4, 4}, {2, 0, 4}, {2, 4, 0}, {0, 0, 0}}) {
    const Case c = case_of(problem_of(DType::kBFloat16, batch, q_len, kv_len, 2, 1, 64));
    EXPECT_EQ(forward(c).o, Values(c.inputs.q.size(), 0.0));
  }
}

TEST_P(ForwardCuda, OutputsThatNobodyAskedForChangeNothing) {
  const Case c = case_of(problem_of(DType::kBFloat16, 1, 100, 100, 2, 1, 128));
  CudaHow bare = how();
  bare.with_statistics = false;
  EXPECT_EQ(forward(c).o, cuda_forward(c, bare).o);
}

// More tiles than the GPU takes at once, drawn by whichever CTA is free.
TEST_P(ForwardCuda, AHundredRunsGiveTheSameBits) {
  for (std::int64_t head_dim : {64, 128, 256}) {
    CudaForward call(case_of(problem_of(DType::kBFloat16, 4, 777, 777, 16, 4, head_dim)), how());
    ASSERT_TRUE(call.run(nullptr).ok());
    const Results first = call.results();
    for (int i = 0; i < 100; ++i) {
      if (i % 10 == 0) call.poison_outputs();
      ASSERT_TRUE(call.run(nullptr).ok());
    }
    const Results last = call.results();
    EXPECT_EQ(first.o, last.o);
    EXPECT_EQ(first.lse, last.lse);
    EXPECT_EQ(first.t_bar, last.t_bar);
  }
}

TEST_P(ForwardCuda, RunsOnAnyStreamAndInGraphs) {
  const Case batched = case_of(problem_of(DType::kBFloat16, 2, 300, 300, 4, 2, 128));
  Case packed = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 3, 1, 128), {70, 0, 300},
                            {70, 5, 300}, Data::kShifted, 3);
  for (const Case& c : {batched, packed}) {
    const Results expected = forward(c);
    CudaForward call(c, how());
    cudaStream_t stream = nullptr;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_TRUE(call.run(stream).ok());
    EXPECT_EQ(call.results().o, expected.o);

    call.poison_outputs();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    ASSERT_TRUE(call.run(stream).ok());
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int i = 0; i < 3; ++i) ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    EXPECT_EQ(call.results().o, expected.o);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

// q, r and o of 2.4e9 elements each: values are all 1, so must be every row of o.
TEST_P(ForwardCuda, TensorsBeyond2To31Elements) {
  constexpr std::int64_t kLen = 262144, kHeads = 72, kHeadDim = 128;
  constexpr std::size_t kElements = std::size_t{kLen} * kHeads * kHeadDim;
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total_bytes), cudaSuccess);
  if (free_bytes < 7 * kElements) GTEST_SKIP() << "needs 17 GB of device memory";
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, kLen, kLen, kHeads, 1, kHeadDim);
  problem.window = 64;
  DeviceMemory q_and_r(4 * kElements), k(2 * kLen * kHeadDim), v(2 * kLen * kHeadDim),
      o(2 * kElements);
  ASSERT_EQ(cudaMemset(q_and_r.data(), 0, q_and_r.size()), cudaSuccess);
  ASSERT_EQ(cudaMemset(k.data(), 0, k.size()), cudaSuccess);
  ASSERT_EQ(cudaMemset(v.data(), 0x3f, v.size()), cudaSuccess);  // 0.747
  ForwardPlan call;
  ASSERT_TRUE(plan(problem, cuda_device(GetParam()), &call).ok());
  DeviceMemory workspace(workspace_bytes(call));
  const std::int64_t q_row = kHeads * kHeadDim;
  ForwardArgs args;
  args.q = {q_and_r.data(), kLen * q_row, q_row, kHeadDim};
  args.r = {static_cast<char*>(q_and_r.data()) + 2 * kElements, kLen * q_row, q_row, kHeadDim};
  args.k = {k.data(), kLen * kHeadDim, kHeadDim, kHeadDim};
  args.v = {v.data(), kLen * kHeadDim, kHeadDim, kHeadDim};
  args.o = {o.data(), kLen * q_row, q_row, kHeadDim};
  const Status status = run(call, args, workspace.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<std::uint16_t> rows(static_cast<std::size_t>(64 * q_row));
  for (std::int64_t first : {std::int64_t{0}, std::int64_t{233016}, kLen - 64}) {
    ASSERT_EQ(cudaMemcpy(rows.data(), static_cast<char*>(o.data()) + 2 * first * q_row,
                         2 * rows.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_TRUE(std::all_of(rows.begin(), rows.end(), [](auto x) { return x == 0x3f3f; })) << first;
  }
}

TEST_P(ForwardCuda, RefusesRowsThatAreNotAligned) {
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, 64, 64, 1, 1, 64);
  ForwardPlan call;
  ASSERT_TRUE(plan(problem, cuda_device(GetParam()), &call).ok());
  DeviceMemory memory(1 << 20);
  const View good{memory.data(), 4096, 64, 64};
  const auto refusal = [&](auto change) {
    ForwardArgs args;
    args.q = args.r = args.k = args.v = {memory.data(), 4096, 64, 64};
    args.o = good;
    change(&args);
    return run(call, args, memory.data(), nullptr);
  };
  EXPECT_TRUE(refusal([](ForwardArgs*) {}).ok());
  const Status odd_stride = refusal([](ForwardArgs* args) { args->k.len_stride = 65; });
  EXPECT_EQ(odd_stride.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(odd_stride.message().find("k: "), std::string::npos) << odd_stride.message();
  const Status odd_address =
      refusal([](ForwardArgs* args) { args->v.data = static_cast<const char*>(args->v.data) + 8; });
  EXPECT_EQ(odd_address.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(odd_address.message().find("v: "), std::string::npos) << odd_address.message();
  const Status odd_output = refusal([](ForwardArgs* args) { args->o.len_stride = 68; });
  EXPECT_EQ(odd_output.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(odd_output.message().find("o: "), std::string::npos) << odd_output.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

}  // namespace
}  // namespace parallax::tests
