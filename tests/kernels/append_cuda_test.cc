// SPDX-License-Identifier: MIT
// append_kv on the GPU: the bits that the CPU writes, at the same places and nowhere else.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "parallax/step.h"
#include "tests/kernels/append_case.h"
#include "tests/kernels/cuda_call.h"

namespace parallax::tests {
namespace {

class AppendCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_gpu_for(Kernels::kPortable)) GTEST_SKIP() << "needs a GPU";
  }
};

// An array on the device, null where it is empty.
template <class T>
struct DeviceArray {
  explicit DeviceArray(const std::vector<T>& host) : memory(sizeof(T) * host.size()) { set(host); }
  void set(const std::vector<T>& host) { memory.upload(host.data(), sizeof(T) * host.size()); }
  const T* data() const { return static_cast<const T*>(memory.data()); }

  DeviceMemory memory;
};

// A call with everything it needs in device memory.
class CudaAppend {
 public:
  explicit CudaAppend(const AppendCase& c)
      : host_(c),
        problem_(c.problem),
        k_(host_.k),
        v_(host_.v),
        q_(host_.q),
        r_(host_.r),
        k_cache_(host_.k_cache),
        v_cache_(host_.v_cache),
        q_out_(host_.q_out),
        r_out_(host_.r_out),
        positions_(c.positions),
        angles_(c.angles),
        entries_(host_.paged ? host_.paged->entries : std::vector<std::int32_t>()),
        k_gain_(c.k_head.gain),
        q_gain_(c.q_head.gain),
        r_gain_(c.r_head.gain),
        k_scale_(c.k_scale),
        v_scale_(c.v_scale),
        cos_(c.cos),
        sin_(c.sin) {
    AppendTensors tensors(c);
    args_ = append_args(c, &tensors);
    args_.k = k_.view();
    args_.v = v_.view();
    args_.k_scale = k_scale_.data();
    args_.v_scale = v_scale_.data();
    args_.positions = positions_.data();
    args_.pages.table = entries_.data();
    args_.k_cache = k_cache_.output();
    args_.v_cache = v_cache_.output();
    AppendPrologue& prologue = args_.prologue;
    prologue.k.gain = k_gain_.data();
    if (c.with_queries) {
      prologue.q = {q_.view(), q_out_.output(), {q_gain_.data(), c.q_head.rotate}};
      prologue.r = {r_.view(), r_out_.output(), {r_gain_.data(), c.r_head.rotate}};
    }
    prologue.cos = cos_.data();
    prologue.sin = sin_.data();
    prologue.angles = angles_.data();
  }

  AppendArgs& args() { return args_; }
  AttentionProblem& problem() { return problem_; }
  AppendTensors& host() { return host_; }
  DeviceArray<std::int32_t>& positions() { return positions_; }

  Status run(cudaStream_t stream = nullptr) {
    return append_kv(problem_, args_, cuda_device(), static_cast<Stream>(stream));
  }
  Status run_settled() { return append_kv_settled(problem_, args_, cuda_device(), nullptr); }
  void poison_outputs() {
    cudaDeviceSynchronize();
    for (DeviceTensor* tensor : {&k_cache_, &v_cache_, &q_out_, &r_out_}) tensor->memory.poison();
    cudaDeviceSynchronize();
  }
  // k_cache, v_cache, q_out, r_out
  std::vector<Tensor> results() const {
    return {k_cache_.download(), v_cache_.download(), q_out_.download(), r_out_.download()};
  }

 private:
  AppendTensors host_;
  AttentionProblem problem_;
  DeviceTensor k_, v_, q_, r_, k_cache_, v_cache_, q_out_, r_out_;
  DeviceArray<std::int32_t> positions_, angles_, entries_;
  DeviceArray<float> k_gain_, q_gain_, r_gain_, k_scale_, v_scale_, cos_, sin_;
  AppendArgs args_;
};

std::vector<Tensor> cpu_results(const AppendCase& c) {
  AppendTensors tensors(c);
  const Status status = append_kv(c.problem, append_args(c, &tensors), parallel_for(1));
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  return {tensors.k_cache, tensors.v_cache, tensors.q_out, tensors.r_out};
}

void expect_same_bytes(std::vector<Tensor> ours, std::vector<Tensor> expected,
                       const std::string& name) {
  const char* names[] = {"k_cache", "v_cache", "q_out", "r_out"};
  for (std::size_t i = 0; i < ours.size(); ++i) {
    EXPECT_TRUE(ours[i].bytes() == expected[i].bytes()) << name << ": " << names[i];
  }
}

AppendCase pick(DType dtype, bool fp8, int page_size) {
  const std::vector<AppendCase> cases = append_cases(dtype);
  return *std::find_if(cases.begin(), cases.end(), [&](const AppendCase& c) {
    return c.with_queries && c.k_scale.empty() != fp8 && c.page_size == page_size;
  });
}

TEST_F(AppendCuda, WritesTheBitsOfTheCpu) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const AppendCase& c : append_cases(dtype)) {
      CudaAppend call(c);
      const Status status = call.run();
      ASSERT_TRUE(status.ok()) << c.name << ": " << status.message();
      const std::vector<Tensor> expected = cpu_results(c);
      expect_same_bytes(call.results(), expected, c.name + " " + name_of(dtype));
      CudaAppend settled(c);
      ASSERT_TRUE(settled.run_settled().ok());
      expect_same_bytes(settled.results(), expected, c.name + ", settled, " + name_of(dtype));
    }
  }
}

TEST_F(AppendCuda, EveryFloatRoundsToFp8AsOnTheCpu) {
  // Every fp16 number, infinities and NaN too, over a scale that is no power of two.
  AppendCase c;
  c.name = "every fp16 number";
  c.problem = problem_of(DType::kFloat16, 1, 256, 256, 1, 1, 256);
  c.problem.kv_dtype = DType::kFloat8E4M3;
  c.positions = {0};
  c.k_scale = {0.0173f};
  c.v_scale = {1.0f};
  c.inputs = random_inputs(c.token_problem(), Data::kZeroMean, 1);
  AppendTensors every(c);
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const std::size_t at = every.k.offset(0, i / 256, 0, i % 256);
    std::memcpy(&every.k.bytes()[at], &bits, 2);
    std::memcpy(&every.v.bytes()[at], &bits, 2);
  }
  ASSERT_TRUE(append_kv(c.problem, append_args(c, &every), parallel_for(1)).ok());
  CudaAppend call(c);
  DeviceTensor k(every.k), v(every.v);
  call.args().k = k.view();
  call.args().v = v.view();
  ASSERT_TRUE(call.run().ok());
  expect_same_bytes(call.results(), {every.k_cache, every.v_cache, every.q_out, every.r_out},
                    c.name);
}

TEST_F(AppendCuda, SkipsPlacesPagesAndAnglesOutOfRange) {
  for (bool fp8 : {false, true}) {
    for (int page_size : {0, 16}) {
      AppendCase c = pick(DType::kBFloat16, fp8, page_size);
      std::vector<Tensor> expected = cpu_results(c);
      AppendTensors tensors(c);
      // Sequence 0 lies before the cache, the last token of sequence 1 behind it.
      CudaAppend call(c);
      c.positions = {static_cast<std::int32_t>(-c.problem.q_len), c.positions[1] + 1,
                     c.positions[2]};
      call.positions().set(c.positions);
      const std::vector<std::int32_t> angles = {0, 70 - static_cast<std::int32_t>(c.problem.q_len),
                                                17};
      DeviceArray<std::int32_t> device_angles(angles);
      call.args().prologue.angles = device_angles.data();
      ASSERT_TRUE(call.run().ok());
      std::vector<Tensor> ours = call.results();
      EXPECT_TRUE(ours[2].bytes() == expected[2].bytes());  // queries have no place to be out of
      for (std::size_t cache : {0, 1}) {
        const auto poison = [&](Tensor* tensor, std::int64_t b, std::int64_t place) {
          const auto [entry, row] = tensors.cache_row(b, place);
          tensor->poison(entry, row);
        };
        for (std::int64_t i = 0; i < c.problem.q_len; ++i) {
          poison(&expected[cache], 0, i);
          poison(&expected[cache], 1, 70 - c.problem.q_len + i);
          if (i > 0) poison(&ours[cache], 1, 70 - c.problem.q_len + i);
        }
        EXPECT_TRUE(ours[cache].bytes() == expected[cache].bytes()) << c.name;
      }
      // Pages outside the cache, angles outside the table: nothing of these tokens is written.
      if (page_size > 0) {
        CudaAppend pages(c);
        const auto entries = pages.host().paged->entries.size();
        DeviceArray<std::int32_t> bad(std::vector<std::int32_t>(
            entries, static_cast<std::int32_t>(pages.host().paged->num_pages)));
        pages.args().pages.table = bad.data();
        ASSERT_TRUE(pages.run().ok());
        AppendTensors untouched(c);
        EXPECT_TRUE(pages.results()[0].bytes() == untouched.k_cache.bytes());
        EXPECT_TRUE(pages.results()[1].bytes() == untouched.v_cache.bytes());
      }
      CudaAppend turned(c);
      DeviceArray<std::int32_t> late(std::vector<std::int32_t>(3, 90));
      turned.args().prologue.angles = late.data();
      ASSERT_TRUE(turned.run().ok());
      AppendTensors untouched(c);
      EXPECT_TRUE(turned.results()[0].bytes() == untouched.k_cache.bytes());
      EXPECT_TRUE(turned.results()[2].bytes() == untouched.q_out.bytes());
    }
  }
}

TEST_F(AppendCuda, AGraphFollowsChangedPositionsOnASecondStream) {
  AppendCase c = pick(DType::kFloat16, true, 0);
  CudaAppend call(c);
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_TRUE(call.run(stream).ok());
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (std::int32_t position : {0, 3, 50}) {
    std::fill(c.positions.begin(), c.positions.end(), position);
    call.positions().set(c.positions);
    call.poison_outputs();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    expect_same_bytes(call.results(), cpu_results(c), "positions " + std::to_string(position));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(AppendCuda, RefusesWhatItCannotTake) {
  const AppendCase c = pick(DType::kBFloat16, false, 0);
  CudaAppend call(c);
  const auto refusal = [&](const auto& change) {
    const AppendArgs args = call.args();
    const AttentionProblem problem = call.problem();
    change();
    const std::string message = call.run().message();
    call.args() = args;
    call.problem() = problem;
    return message;
  };
  const std::string rule =
      ": its address must be a multiple of 16 bytes and its strides multiples of 8 elements";
  EXPECT_EQ(
      refusal([&] { call.args().k_cache.data = static_cast<char*>(call.args().k_cache.data) + 2; }),
      "k_cache" + rule);
  EXPECT_EQ(refusal([&] { call.args().v.head_stride += 4; }), "v" + rule);
  EXPECT_EQ(refusal([&] { call.args().prologue.q.out.len_stride += 1; }), "prologue.q.out" + rule);
  EXPECT_EQ(refusal([&] { call.args().prologue.cos += 1; }),
            "prologue.cos: its address must be a multiple of 16 bytes");
  EXPECT_EQ(refusal([&] { call.problem().dtype = DType::kFloat32; }),
            "dtype: CUDA kernels take bf16 and fp16");
  EXPECT_EQ(refusal([&] { call.args().positions = nullptr; }).rfind("positions: ", 0), 0u);
}

}  // namespace
}  // namespace parallax::tests
