// SPDX-License-Identifier: MIT
// The CUDA backward, by the Hopper and by the portable kernels, against the definition, against the
// float64 CPU kernel where that takes too long, and against what must be exactly so. The forward's
// results come from the CPU, so that a failure here is the backward's own. Skips itself on a
// machine without a GPU for them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "tests/kernels/cpu_call.h"
#include "tests/kernels/cuda_call.h"

namespace parallax::tests {
namespace {

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};
constexpr double kLargestError = 1e-2;  // of a gradient, relative, Frobenius

Case case_of(const AttentionProblem& problem, Data data = Data::kZeroMean, Lengths lengths = {}) {
  return {"case", problem, std::move(lengths), random_inputs(problem, data, 12)};
}

std::string name_of(const Case& c) {
  return c.name + ", " + parallax::tests::name_of(c.problem.dtype) + ", head_dim " +
         std::to_string(c.problem.head_dim);
}

struct Gradient {
  const char* name;
  Values Results::*values;
};
constexpr Gradient kGradients[] = {
    {"dq", &Results::dq}, {"dr", &Results::dr}, {"dk", &Results::dk}, {"dv", &Results::dv}};

// Everything in float64, from the inputs as rounded.
Results exact_on_cpu(Case c) {
  c.problem.dtype = DType::kFloat64;
  return cpu_forward_backward(c, {static_cast<int>(std::thread::hardware_concurrency()), 0});
}

DeviceTensor tensor_of(const Case& c, const Values& values) {
  return DeviceTensor(queries(c, round_to(c.problem.dtype, values)));
}

// A backward call with everything it needs, ready to be enqueued any number of times.
class CudaBackward {
 public:
  // `forward`: exact o, v_bar, lse and t_bar, which are rounded as the forward stores them.
  CudaBackward(const Case& c, Kernels kernels, const Results& forward)
      : case_(c),
        q_(queries(c, c.inputs.q)),
        r_(queries(c, c.inputs.r)),
        k_(keys(c, c.inputs.k)),
        v_(keys(c, c.inputs.v)),
        d_o_(queries(c, c.inputs.d_o)),
        o_(tensor_of(c, forward.o)),
        v_bar_(tensor_of(c, forward.v_bar)),
        dq_(Tensor(c.problem, false)),
        dr_(Tensor(c.problem, false)),
        dk_(Tensor(c.problem, true)),
        dv_(Tensor(c.problem, true)),
        lengths_(c.lengths),
        lse_(forward.lse.size() * sizeof(float)),
        t_bar_(forward.t_bar.size() * sizeof(float)),
        workspace_(planned_bytes(c, kernels, &plan_)) {
    const std::vector<float> lse(forward.lse.begin(), forward.lse.end());
    const std::vector<float> t_bar(forward.t_bar.begin(), forward.t_bar.end());
    lse_.upload(lse.data(), lse_.size());
    t_bar_.upload(t_bar.data(), t_bar_.size());
    o_values_ = round_to(c.problem.dtype, forward.o);
  }

  Status run(cudaStream_t stream) {
    BackwardArgs args;
    args.q = q_.view();
    args.r = r_.view();
    args.k = k_.view();
    args.v = v_.view();
    args.d_o = d_o_.view();
    args.o = o_.view();
    args.v_bar = v_bar_.view();
    args.lse = lse_.data();
    args.t_bar = t_bar_.data();
    args.sequences = lengths_.view();
    args.dq = dq_.output();
    args.dr = dr_.output();
    args.dk = dk_.output();
    args.dv = dv_.output();
    return parallax::run(plan_, args, workspace_.data(), static_cast<Stream>(stream));
  }

  void poison_outputs() {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (DeviceTensor* tensor : {&dq_, &dr_, &dk_, &dv_}) tensor->memory.poison();
    workspace_.poison();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  Results results() const {  // o as given, for the error rule
    Results results;
    results.o = o_values_;
    results.dq = dq_.download().values();
    results.dr = dr_.download().values();
    results.dk = dk_.download().values();
    results.dv = dv_.download().values();
    return results;
  }

 private:
  static std::size_t planned_bytes(const Case& c, Kernels kernels, BackwardPlan* result) {
    const Status status = plan(c.problem, cuda_device(kernels), result);
    EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
    return workspace_bytes(*result);
  }

  Case case_;
  BackwardPlan plan_;
  DeviceTensor q_, r_, k_, v_, d_o_, o_, v_bar_, dq_, dr_, dk_, dv_;
  DeviceLengths lengths_;
  DeviceMemory lse_, t_bar_, workspace_;
  Values o_values_;
};

class BackwardCuda : public testing::TestWithParam<Kernels> {
 protected:
  void SetUp() override {
    if (!has_gpu_for(GetParam())) GTEST_SKIP() << "needs another GPU";
  }
  static Results backward(const Case& c, const Results& forward) {
    CudaBackward call(c, GetParam(), forward);
    const Status status = call.run(nullptr);
    EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
    return call.results();
  }
  static Results backward(const Case& c) { return backward(c, exact_on_cpu(c)); }
};
INSTANTIATE_TEST_SUITE_P(, BackwardCuda, testing::Values(Kernels::kHopper, Kernels::kPortable),
                         [](const auto& info) {
                           return info.param == Kernels::kHopper ? "Hopper" : "Portable";
                         });

void expect_close(const Case& c, const Results& ours, const Results& exact) {
  for (const Gradient& gradient : kGradients) {
    EXPECT_LE(relative_or_absolute_error(ours.*gradient.values, exact.*gradient.values),
              kLargestError)
        << name_of(c) << ", " << gradient.name;
  }
}

void expect_same_bits(const Results& a, const Results& b) {
  for (const Gradient& gradient : kGradients) {
    EXPECT_EQ(a.*gradient.values, b.*gradient.values) << gradient.name;
  }
}

TEST_P(BackwardCuda, HoldsTheErrorRule) {
  std::vector<Case> cases;
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {8, 64, 96, 128}) {
      for (Data data : {Data::kZeroMean, Data::kShifted}) {
        for (Case& c : all_cases(dtype, head_dim, data, 203)) cases.push_back(std::move(c));
      }
    }
  }
  const auto expected = on_all_cores<std::unique_ptr<Expected>>(
      cases, [](const Case& c) { return std::make_unique<Expected>(c); });
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Results ours = backward(cases[i], expected[i]->exact);
    EXPECT_EQ(error_rule(cases[i], ours, *expected[i]), "") << name_of(cases[i]);
    expect_close(cases[i], ours, expected[i]->exact);
  }
}

TEST_P(BackwardCuda, LongRowsStayWithinTheError) {
  const std::vector<CaseShape> shapes = {{1023, 1024, 1, 0, true},   {1024, 1023, 3, 0, true},
                                         {1023, 1024, 1, 0, false},  {2049, 2049, 1, 0, true},
                                         {1000, 1000, 4, 200, true}, {300, 1900, 8, 1024, true},
                                         {64, 2100, 8, 0, true},     {2100, 64, 1, 0, false}};
  const std::vector<Case> cases = cases_of(shapes, {64, 128}, 12);
  const auto exact = on_all_cores<Results>(cases, [](Case c) {
    c.problem.dtype = DType::kFloat64;
    return cpu_forward_backward(c);
  });
  for (std::size_t i = 0; i < cases.size(); ++i) {
    expect_close(cases[i], backward(cases[i], exact[i]), exact[i]);
  }
}

// The exact results come from the CPU's float32 kernels: float64 would take minutes.
TEST_P(BackwardCuda, TheLongestRowsStayWithinTheError) {
  for (Case& c : cases_of({{4097, 4097, 1, 0, true}, {4097, 4097, 3, 200, true}}, {64, 128}, 12)) {
    Case exact = c;
    exact.problem.dtype = DType::kFloat32;
    const Results forward =
        cpu_forward_backward(exact, {static_cast<int>(std::thread::hardware_concurrency()), 0});
    expect_close(c, backward(c, forward), forward);
  }
}

TEST_P(BackwardCuda, PackedSequencesOfAllLengths) {
  std::vector<std::int32_t> q_lens;
  std::vector<std::int32_t> kv_lens;
  for (int i = 0; i < 70; ++i) {
    q_lens.push_back(i * 37 % 211);
    kv_lens.push_back(i * 53 % 307);
  }
  q_lens.push_back(900);
  kv_lens.push_back(900);
  for (std::int64_t head_dim : {64, 128}) {
    const Case c = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 3, 1, head_dim), q_lens,
                               kv_lens, Data::kShifted, 3);
    const Results exact = exact_on_cpu(c);
    expect_close(c, backward(c, exact), exact);
  }
}

TEST_P(BackwardCuda, PackedEqualsEachSequenceAlone) {
  const Case packed = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 2, 1, 128), {5, 170, 1},
                                  {9, 170, 130}, Data::kShifted, 3);
  const Results together = backward(packed);
  const Lengths& lengths = packed.lengths;
  for (std::size_t b = 0; b < 3; ++b) {
    const auto cut = [&](const Values& values, const std::vector<std::int32_t>& offsets,
                         std::int64_t row) {
      return Values(values.begin() + offsets[b] * row, values.begin() + offsets[b + 1] * row);
    };
    Case alone;
    alone.problem = problem_of(DType::kBFloat16, 1, q_len_of(packed, static_cast<std::int64_t>(b)),
                               kv_len_of(packed, static_cast<std::int64_t>(b)), 2, 1, 128);
    alone.inputs.q = cut(packed.inputs.q, lengths.cu_seqlens_q, 256);
    alone.inputs.r = cut(packed.inputs.r, lengths.cu_seqlens_q, 256);
    alone.inputs.k = cut(packed.inputs.k, lengths.cu_seqlens_k, 128);
    alone.inputs.v = cut(packed.inputs.v, lengths.cu_seqlens_k, 128);
    alone.inputs.d_o = cut(packed.inputs.d_o, lengths.cu_seqlens_q, 256);
    const Results ours = backward(alone);
    EXPECT_EQ(ours.dq, cut(together.dq, lengths.cu_seqlens_q, 256));
    EXPECT_EQ(ours.dr, cut(together.dr, lengths.cu_seqlens_q, 256));
    EXPECT_EQ(ours.dk, cut(together.dk, lengths.cu_seqlens_k, 128));
    EXPECT_EQ(ours.dv, cut(together.dv, lengths.cu_seqlens_k, 128));
  }
}

TEST_P(BackwardCuda, ARowThatSeesOneKeyHasNoQueryGradients) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {64, 128}) {
      AttentionProblem problem = problem_of(dtype, 1, 300, 300, 1, 1, head_dim);
      problem.window = 1;
      const Case c = case_of(problem, Data::kShifted);
      const Results ours = backward(c);
      const Values zeros(c.inputs.q.size(), 0.0);
      EXPECT_EQ(ours.dq, zeros) << name_of(c);
      EXPECT_EQ(ours.dr, zeros) << name_of(c);
      EXPECT_LE(largest(ours.dk), 1e-2) << name_of(c);
      EXPECT_LE(relative_error(ours.dv, c.inputs.d_o), 1e-3) << name_of(c);
    }
  }
}

// A vector orthogonal to every q, added to every key, moves each row's t by a constant and no
// gradient.
TEST_P(BackwardCuda, AConstantOnTheProbesOfARowChangesNoGradient) {
  for (std::int64_t head_dim : {64, 128}) {
    Case c = case_of(problem_of(DType::kBFloat16, 1, 150, 333, 4, 2, head_dim));
    set_probe_constant(&c, 0);
    const Results before = exact_on_cpu(c);
    set_probe_constant(&c, 100);
    expect_close(c, backward(c), before);
  }
}

// Infinities beyond a sequence instead of NaN.
TEST_P(BackwardCuda, InfinitiesThatNobodySeesChangeNoBit) {
  for (DType dtype : kDTypes) {
    for (std::int64_t head_dim : {64, 96, 128}) {
      for (Case& c : all_cases(dtype, head_dim, Data::kShifted, 203)) {
        if (c.lengths.kv_lens.empty() && !c.problem.packed) continue;
        const Results forward = exact_on_cpu(c);
        const Results expected = backward(c, forward);
        for (double unseen : {1.0, -1.0}) {
          c.unseen = unseen * std::numeric_limits<double>::infinity();
          expect_same_bits(backward(c, forward), expected);
        }
      }
    }
  }
}

TEST_P(BackwardCuda, WhatSeesNothingAndWhatIsNotSeenGetsZeros) {
  Lengths lengths;
  lengths.kv_lens = {3, 0};
  lengths.kv_start = {1, 0};
  const Case c = case_of(problem_of(DType::kBFloat16, 2, 5, 8, 1, 1, 64), Data::kShifted, lengths);
  const Results ours = backward(c);
  const auto is_zero = [](const Values& values, std::size_t row) {
    return std::all_of(values.begin() + static_cast<std::ptrdiff_t>(64 * row),
                       values.begin() + static_cast<std::ptrdiff_t>(64 * row + 64),
                       [](double x) { return x == 0; });
  };
  for (std::size_t row = 0; row < 10; ++row) {
    const bool sees_two = row == 4;
    EXPECT_EQ(is_zero(ours.dq, row), !sees_two) << row;
    EXPECT_EQ(is_zero(ours.dr, row), !sees_two) << row;
  }
  for (std::size_t row = 0; row < 16; ++row) {
    EXPECT_EQ(is_zero(ours.dv, row), row != 1 && row != 2) << row;
  }
}

TEST_P(BackwardCuda, NothingToDoIsNoError) {
  for (auto [batch, q_len, kv_len] : {std::tuple{0, 4, 4}, {2, 0, 4}, {2, 4, 0}, {0, 0, 0}}) {
    const Case c = case_of(problem_of(DType::kBFloat16, batch, q_len, kv_len, 2, 1, 64));
    const Results ours = backward(c);
    EXPECT_EQ(ours.dq, Values(c.inputs.q.size(), 0.0));
    EXPECT_EQ(ours.dk, Values(c.inputs.k.size(), 0.0));
  }
}

// A scale of zero weighs all keys alike; the keys still move t.
TEST_P(BackwardCuda, TakesAScaleOfZero) {
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, 100, 100, 2, 1, 64);
  problem.scale = 0;
  const Case c = case_of(problem);
  const Results exact = exact_on_cpu(c);
  expect_close(c, backward(c, exact), exact);
}

// More blocks than the GPU takes at once.
TEST_P(BackwardCuda, AHundredRunsGiveTheSameBits) {
  for (std::int64_t head_dim : {64, 128}) {
    const Case c = case_of(problem_of(DType::kBFloat16, 2, 777, 777, 16, 4, head_dim));
    CudaBackward call(c, GetParam(), exact_on_cpu(c));
    ASSERT_TRUE(call.run(nullptr).ok());
    const Results first = call.results();
    for (int i = 0; i < 100; ++i) {
      if (i % 10 == 0) call.poison_outputs();
      ASSERT_TRUE(call.run(nullptr).ok());
      if (i % 10 == 9) expect_same_bits(call.results(), first);
    }
  }
}

TEST_P(BackwardCuda, RunsOnAnyStreamAndInGraphs) {
  const Case batched = case_of(problem_of(DType::kBFloat16, 2, 300, 300, 4, 2, 128));
  const Case packed = packed_case(problem_of(DType::kBFloat16, 0, 0, 0, 3, 1, 128), {70, 0, 300},
                                  {70, 5, 300}, Data::kShifted, 3);
  for (const Case& c : {batched, packed}) {
    const Results forward = exact_on_cpu(c);
    const Results expected = backward(c, forward);
    CudaBackward call(c, GetParam(), forward);
    cudaStream_t stream = nullptr;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_TRUE(call.run(stream).ok());
    expect_same_bits(call.results(), expected);

    call.poison_outputs();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    ASSERT_TRUE(call.run(stream).ok());
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int i = 0; i < 3; ++i) ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    expect_same_bits(call.results(), expected);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

// Tensors of 2.4e9 elements: constant values and d_o, keys and queries of 0, a window of 64. Then
// every weight is 1/64, dq and dr are 0, and a key's dv is d_o once for each of its heads.
TEST_P(BackwardCuda, TensorsBeyond2To31Elements) {
  constexpr std::int64_t kLen = 262144, kHeads = 72, kHeadDim = 128, kWindow = 64;
  constexpr std::size_t kBytes = 2 * std::size_t{kLen} * kHeads * kHeadDim;
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total_bytes), cudaSuccess);
  if (free_bytes < 5 * kBytes) GTEST_SKIP() << "needs 24 GB of device memory";
  AttentionProblem problem = problem_of(DType::kBFloat16, 1, kLen, kLen, kHeads, 1, kHeadDim);
  problem.window = kWindow;
  BackwardPlan call;
  ASSERT_TRUE(plan(problem, cuda_device(GetParam()), &call).ok());
  DeviceMemory zeros(kBytes), constants(kBytes), dq(kBytes), dr(kBytes);
  DeviceMemory dk(2 * kLen * kHeadDim), dv(2 * kLen * kHeadDim), workspace(workspace_bytes(call));
  DeviceMemory lse(sizeof(float) * kLen * kHeads), t_bar(sizeof(float) * kLen * kHeads);
  ASSERT_EQ(cudaMemset(zeros.data(), 0, zeros.size()), cudaSuccess);
  ASSERT_EQ(cudaMemset(constants.data(), 0x3f, constants.size()), cudaSuccess);  // 0.747
  ASSERT_EQ(cudaMemset(t_bar.data(), 0, t_bar.size()), cudaSuccess);
  const std::vector<float> uniform(kLen * kHeads, std::log(static_cast<float>(kWindow)));
  lse.upload(uniform.data(), lse.size());
  const auto of_queries = [](const DeviceMemory& memory) {
    return View{memory.data(), kLen * kHeads * kHeadDim, kHeads * kHeadDim, kHeadDim};
  };
  const auto of_keys = [](const DeviceMemory& memory) {
    return View{memory.data(), kLen * kHeadDim, kHeadDim, kHeadDim};
  };
  const auto read_only = [](const View& view) {
    return ConstView{view.data, view.batch_stride, view.len_stride, view.head_stride};
  };
  BackwardArgs args;
  args.q = args.r = read_only(of_queries(zeros));
  args.o = args.v_bar = args.d_o = read_only(of_queries(constants));
  args.k = read_only(of_keys(zeros));
  args.v = read_only(of_keys(constants));
  args.lse = lse.data();
  args.t_bar = t_bar.data();
  args.dq = of_queries(dq);
  args.dr = of_queries(dr);
  args.dk = of_keys(dk);
  args.dv = of_keys(dv);
  const Status status = run(call, args, workspace.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<std::uint16_t> rows(kWindow * kHeads * kHeadDim);
  for (std::int64_t first : {std::int64_t{0}, std::int64_t{233016}, kLen - kWindow}) {
    for (const DeviceMemory* memory : {&dq, &dr}) {
      ASSERT_EQ(cudaMemcpy(rows.data(),
                           static_cast<char*>(memory->data()) + 2 * first * kHeads * kHeadDim,
                           2 * rows.size(), cudaMemcpyDeviceToHost),
                cudaSuccess);
      EXPECT_TRUE(std::all_of(rows.begin(), rows.end(), [](auto x) { return (x & 0x7fff) == 0; }))
          << first;
    }
  }
  const std::uint16_t expected = 0x4257;  // 72 x 0.747 = 53.77
  for (std::int64_t key : {std::int64_t{kWindow}, std::int64_t{233016}, kLen - kWindow - 1}) {
    ASSERT_EQ(cudaMemcpy(rows.data(), static_cast<char*>(dv.data()) + 2 * key * kHeadDim,
                         2 * kHeadDim, cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_TRUE(std::all_of(rows.begin(), rows.begin() + kHeadDim,
                            [&](auto x) { return std::abs(x - expected) <= 1; }))
        << key << ": " << rows[0];
  }
}

TEST_P(BackwardCuda, RefusesWhatItCannotTake) {
  BackwardPlan call;
  const Device device = cuda_device(GetParam());
  const auto refused = [&](auto change) {
    AttentionProblem problem = problem_of(DType::kBFloat16, 1, 64, 64, 1, 1, 64);
    change(&problem);
    const Status status = plan(problem, device, &call);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported);
    return status.message();
  };
  EXPECT_EQ(
      refused([](AttentionProblem* problem) { problem->head_dim = 136; }).rfind("head_dim", 0), 0u);
  EXPECT_EQ(refused([](AttentionProblem* problem) { problem->scale = -1; }).rfind("scale", 0), 0u);
  ASSERT_TRUE(plan(problem_of(DType::kBFloat16, 1, 64, 64, 2, 2, 64), device, &call).ok());
  DeviceMemory memory(1 << 20);
  const auto refusal = [&](auto change) {
    BackwardArgs args;
    args.q = args.r = args.k = args.v = args.o = args.v_bar =
        args.d_o = {memory.data(), 8192, 128, 64};
    args.dq = args.dr = args.dk = args.dv = {memory.data(), 8192, 128, 64};
    args.lse = args.t_bar = memory.data();
    change(&args);
    const Status status = run(call, args, memory.data(), nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(refusal([](BackwardArgs* args) { args->k.len_stride = 129; }).rfind("k: ", 0), 0u);
  EXPECT_EQ(refusal([](BackwardArgs* args) { args->v_bar.len_stride = 132; }).rfind("v_bar: ", 0),
            0u);
  EXPECT_EQ(refusal([](BackwardArgs* args) { args->dv.head_stride = 4; }).rfind("dv: ", 0), 0u);
}

}  // namespace
}  // namespace parallax::tests
