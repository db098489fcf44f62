// SPDX-License-Identifier: MIT
// Products of a few rows: against float64, alone and in chains whose kernels overlap.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/element.h"
#include "parallax/step.h"
#include "tests/kernels/cuda_call.h"

namespace parallax::tests {
namespace {

using Bits = std::vector<std::uint16_t>;

std::uint16_t to_bits(DType dtype, float x) {
  if (dtype == DType::kFloat16) {
    cpu::Float16 y;
    cpu::store(x, &y);
    return y.bits;
  }
  cpu::BFloat16 y;
  cpu::store(x, &y);
  return y.bits;
}

double from_bits(DType dtype, std::uint16_t bits) {
  return dtype == DType::kFloat16 ? cpu::load(cpu::Float16{bits}) : cpu::load(cpu::BFloat16{bits});
}

constexpr std::int64_t kGap = 8;  // elements behind each row, not a number

// Rows of random numbers, NaN in the gaps between them.
struct Matrix {
  Matrix() = default;
  Matrix(DType type, std::int64_t num_rows, std::int64_t num_columns, double scale, int seed)
      : dtype(type), rows(num_rows), columns(num_columns), stride(num_columns + kGap) {
    std::mt19937 random(static_cast<unsigned>(seed));
    std::normal_distribution<float> normal;
    bits.assign(rows * stride, 0xffff);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        bits[i * stride + j] = to_bits(dtype, static_cast<float>(scale) * normal(random));
      }
    }
  }
  double at(std::int64_t i, std::int64_t j) const { return from_bits(dtype, bits[i * stride + j]); }

  DType dtype = DType::kBFloat16;
  std::int64_t rows = 0, columns = 0, stride = 0;
  Bits bits;
};

struct FewRowsCase {
  FewRowsProblem problem;
  bool normed = false;

  std::string name() const {
    return std::to_string(problem.rows) + " x " + std::to_string(problem.in) + " -> " +
           std::to_string(problem.out) + ", form " +
           std::to_string(static_cast<int>(problem.form)) + (normed ? ", normed" : "") +
           (problem.dtype == DType::kFloat16 ? ", fp16" : ", bf16");
  }
  std::int64_t w_rows() const {
    return problem.form == FewRowsForm::kSwiGlu ? 2 * problem.out : problem.out;
  }
};

struct Inputs {
  explicit Inputs(const FewRowsCase& c)
      : x(c.problem.dtype, c.problem.rows, c.problem.in, 1.5, 1),
        w(c.problem.dtype, c.w_rows(), c.problem.in, 1.0 / std::sqrt(c.problem.in), 2),
        gain(c.problem.dtype, 1, c.problem.in, 1, 3),
        y(c.problem.dtype, c.problem.rows, c.problem.out, 1, 4) {}
  Matrix x, w, gain, y;
};

// An element of y in float64, and how far off a result may be.
struct Expected {
  double y, allowed;
};

// Row i of x times row j of w; of the norm, with its product rounded as the kernel rounds.
Expected product(const FewRowsCase& c, const Inputs& in, std::int64_t i, std::int64_t j) {
  const double unit = c.problem.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  double sum = 0, of_squares = 0, x_squares = 0;
  for (std::int64_t k = 0; k < c.problem.in; ++k) {
    const double x = in.x.at(i, k);
    const double term = (c.normed ? x * in.gain.at(0, k) : x) * in.w.at(j, k);
    sum += term;
    of_squares += term * term;
    x_squares += x * x;
  }
  const double factor =
      c.normed ? 1 / std::sqrt(x_squares / static_cast<double>(c.problem.in) + 1e-6) : 1;
  const double noise = std::sqrt(of_squares) * factor * ((c.normed ? 4 * unit : 0) + 1e-5);
  return {sum * factor, noise};
}

Expected expected(const FewRowsCase& c, const Inputs& in, std::int64_t i, std::int64_t j) {
  const double unit = c.problem.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  Expected e = product(c, in, i, j);
  if (c.problem.form == FewRowsForm::kSwiGlu) {
    const Expected up = product(c, in, i, j + c.problem.out);
    const double silu = e.y / (1 + std::exp(-e.y));
    e.allowed = 1.1 * e.allowed * std::abs(up.y) + std::abs(silu) * up.allowed;
    e.allowed += 1e-5 * std::abs(silu * up.y);
    e.y = silu * up.y;
  }
  if (c.problem.form == FewRowsForm::kAdd) e.y += in.y.at(i, j);
  if (c.problem.form != FewRowsForm::kFloatProduct) e.allowed += unit * std::abs(e.y);
  e.allowed += 1e-6;
  return e;
}

struct OnDevice {
  explicit OnDevice(const Bits& bits) : memory(2 * bits.size()) {
    memory.upload(bits.data(), memory.size());
  }
  DeviceMemory memory;
};

// A call with its tensors in device memory; y in twice the room, for floats.
struct FewRowsCall {
  FewRowsCall(const FewRowsCase& c, const Device& on)
      : device(on),
        problem(c.problem),
        host(c),
        x(host.x.bits),
        w(host.w.bits),
        gain(host.gain.bits),
        y(4 * host.y.bits.size()) {
    args.x = x.memory.data();
    args.x_stride = host.x.stride;
    args.w = w.memory.data();
    args.w_stride = host.w.stride;
    if (c.normed) args.gain = gain.memory.data();
    args.y = y.data();
    args.y_stride = host.y.stride;
    args.next = w.memory.data();
    args.next_bytes = static_cast<std::int64_t>(w.memory.size());
  }
  Status run(cudaStream_t stream = nullptr) {
    return few_rows(problem, args, device, static_cast<Stream>(stream));
  }
  // y before a run: random where it is added to, NaN where it is not.
  void reset() {
    y.poison();
    if (problem.form == FewRowsForm::kAdd) y.upload(host.y.bits.data(), 2 * host.y.bits.size());
  }
  // The bytes of y, and its elements as numbers.
  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> result(y.size());
    y.download(result.data(), result.size());
    return result;
  }
  std::vector<double> numbers() const {
    const std::vector<std::uint8_t> raw = bytes();
    std::vector<double> result(problem.rows * host.y.stride);
    for (std::size_t i = 0; i < result.size(); ++i) {
      if (problem.form == FewRowsForm::kFloatProduct) {
        result[i] = reinterpret_cast<const float*>(raw.data())[i];
      } else {
        result[i] = from_bits(problem.dtype, reinterpret_cast<const std::uint16_t*>(raw.data())[i]);
      }
    }
    return result;
  }

  Device device;
  FewRowsProblem problem;
  Inputs host;
  OnDevice x, w, gain;
  DeviceMemory y;
  FewRowsArgs args;
};

std::vector<FewRowsCase> few_rows_cases() {
  std::vector<FewRowsCase> cases;
  const auto add = [&](std::int64_t rows, std::int64_t in, std::int64_t out) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (auto form : {FewRowsForm::kProduct, FewRowsForm::kFloatProduct, FewRowsForm::kSwiGlu,
                        FewRowsForm::kAdd}) {
        for (bool normed : {false, true}) {
          cases.push_back({{dtype, rows, in, out, form}, normed});
        }
      }
    }
  };
  add(1, 8, 1);
  add(3, 40, 7);
  add(1, 1024, 64);
  add(8, 1000, 17);
  add(9, 264, 33);
  add(16, 3080, 24);
  add(5, 512, 2217);   // two groups of rows a block, on a GPU of 132 multiprocessors
  add(13, 12296, 9);   // several rounds
  add(2, 2056, 2200);  // the same
  return cases;
}

// The parameter: KiB of shared memory that a multiprocessor has at most; some GPUs' have 100.
class FewRowsCuda : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_gpu_for(Kernels::kPortable)) GTEST_SKIP() << "needs a GPU";
    device_ = cuda_device();
    device_.sm_shared_bytes = std::min(device_.sm_shared_bytes, GetParam() * 1024);
  }

  Device device_;
};
INSTANTIATE_TEST_SUITE_P(, FewRowsCuda, testing::Values(100, 228),
                         testing::PrintToStringParamName());

TEST_P(FewRowsCuda, MatchesFloat64AndWritesNothingElse) {
  for (const FewRowsCase& c : few_rows_cases()) {
    FewRowsCall call(c, device_);
    call.reset();
    const Status status = call.run();
    ASSERT_TRUE(status.ok()) << c.name() << ": " << status.message();
    const std::vector<double> y = call.numbers();
    double worst = 0;
    for (std::int64_t i = 0; i < c.problem.rows; ++i) {
      for (std::int64_t j = 0; j < call.host.y.stride; ++j) {
        const double ours = y[i * call.host.y.stride + j];
        if (j >= c.problem.out) {
          ASSERT_TRUE(std::isnan(ours)) << c.name() << ": wrote behind row " << i;
          continue;
        }
        const Expected e = expected(c, call.host, i, j);
        const double off = std::abs(ours - e.y) / e.allowed;
        worst = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(worst, off);
      }
    }
    EXPECT_LE(worst, 1) << c.name();
  }
}

TEST_P(FewRowsCuda, ARowDoesNotDependOnTheOthers) {
  for (const auto& [out, normed] : {std::pair{2217, false}, {2217, true}, {528, true}}) {
    for (auto form : {FewRowsForm::kProduct, FewRowsForm::kSwiGlu, FewRowsForm::kAdd}) {
      FewRowsCall call({{DType::kBFloat16, 16, 3080, out, form}, normed}, device_);
      call.reset();
      ASSERT_TRUE(call.run().ok());
      const std::vector<std::uint8_t> together = call.bytes();
      for (const std::int64_t rows : {1, 5, 8, 9}) {
        call.reset();
        call.problem.rows = rows;
        ASSERT_TRUE(call.run().ok());
        const std::vector<std::uint8_t> fewer = call.bytes();
        const auto used = static_cast<std::ptrdiff_t>(2 * rows * call.host.y.stride);
        EXPECT_TRUE(std::equal(fewer.begin(), fewer.begin() + used, together.begin())) << rows;
      }
      call.problem.rows = 16;
    }
  }
}

// So many groups of w's rows that CTAs take turns give the bits that they give in calls of their
// own.
TEST_P(FewRowsCuda, ManyGroupsGiveTheBitsOfFew) {
  constexpr std::int64_t kOut = 70001, kPiece = 20000;
  for (const std::int64_t rows : {2, 8, 9, 16}) {
    for (auto form : {FewRowsForm::kProduct, FewRowsForm::kFloatProduct}) {
      FewRowsCall call({{DType::kBFloat16, rows, 264, kOut, form}, form == FewRowsForm::kProduct},
                       device_);
      call.reset();
      ASSERT_TRUE(call.run().ok());
      const std::vector<std::uint8_t> together = call.bytes();
      call.reset();
      const FewRowsArgs whole = call.args;
      const std::int64_t element = form == FewRowsForm::kProduct ? 2 : 4;
      for (std::int64_t begin = 0; begin < kOut; begin += kPiece) {
        call.problem.out = std::min(kPiece, kOut - begin);
        call.args.w = static_cast<const std::uint16_t*>(whole.w) + begin * whole.w_stride;
        call.args.y = static_cast<std::uint8_t*>(whole.y) + begin * element;
        ASSERT_TRUE(call.run().ok());
      }
      EXPECT_TRUE(call.bytes() == together) << rows << " rows";
    }
  }
}

// gate|up into `inner`, then added back: kernels that begin before the last one has ended.
TEST_P(FewRowsCuda, AChainInAGraphGivesTheBitsOfOneCallAtATime) {
  for (const std::int64_t rows : {1, 8, 11}) {
    FewRowsCall up({{DType::kBFloat16, rows, 1024, 3072, FewRowsForm::kSwiGlu}, true}, device_);
    FewRowsCall down({{DType::kBFloat16, rows, 3072, 1024, FewRowsForm::kAdd}, false}, device_);
    DeviceMemory stream_of_x(2 * static_cast<std::size_t>(rows) * 1024);
    up.args.x = down.args.y = stream_of_x.data();
    up.args.x_stride = down.args.y_stride = 1024;
    down.args.x = up.args.y;
    down.args.x_stride = up.args.y_stride;
    const Matrix start(DType::kBFloat16, rows, 1024 - kGap, 1, 9);
    Bits first = start.bits;
    for (std::uint16_t& bits : first) bits = bits == 0xffff ? 0 : bits;
    constexpr int kLayers = 20;
    const auto result = [&] {
      Bits bits(first.size());
      stream_of_x.download(bits.data(), 2 * bits.size());
      return bits;
    };
    stream_of_x.upload(first.data(), 2 * first.size());
    for (int layer = 0; layer < kLayers; ++layer) {
      ASSERT_TRUE(up.run().ok());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_TRUE(down.run().ok());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
    const Bits one_at_a_time = result();
    EXPECT_NE(one_at_a_time, first);
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    for (int layer = 0; layer < kLayers; ++layer) {
      ASSERT_TRUE(up.run(stream).ok());
      ASSERT_TRUE(down.run(stream).ok());
    }
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int repeat = 0; repeat < 50; ++repeat) {
      stream_of_x.upload(first.data(), 2 * first.size());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      ASSERT_EQ(result(), one_at_a_time) << rows << " rows, repeat " << repeat;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

// What a greedy sampler takes: the largest of what is finite, the first of equal ones, -1 for none.
std::int32_t argmax_of(const float* row, std::int64_t columns) {
  std::int32_t best = -1;
  for (std::int32_t j = 0; j < columns; ++j) {
    if (std::isfinite(row[j]) && (best < 0 || row[j] > row[best])) best = j;
  }
  return best;
}

// The columns of argmax words, by way of next_tokens, which leaves the words 0.
std::vector<std::int32_t> columns_of(const DeviceMemory& words, std::int64_t rows) {
  std::vector<std::int32_t> lens(rows, 6), pairs(2 * rows), columns(rows);
  DeviceMemory tokens(4 * lens.size()), positions(4 * lens.size()), kv_lens(4 * lens.size()),
      found(8 * lens.size());
  kv_lens.upload(lens.data(), kv_lens.size());
  const NextTokensArgs args{
      static_cast<std::uint64_t*>(words.data()), static_cast<std::int32_t*>(tokens.data()),
      static_cast<std::int32_t*>(positions.data()), static_cast<std::int32_t*>(kv_lens.data()),
      static_cast<std::int32_t*>(found.data())};
  EXPECT_TRUE(next_tokens(rows, args, cuda_device(), nullptr).ok());
  found.download(pairs.data(), found.size());
  for (std::int64_t row = 0; row < rows; ++row) columns[row] = pairs[2 * row];
  std::vector<std::uint64_t> left(rows);
  words.download(left.data(), 8 * left.size());
  EXPECT_EQ(left, std::vector<std::uint64_t>(rows, 0));
  return columns;
}

// Rows of w are there twice, so each logit is; one column is not a number, one row of x neither.
TEST_P(FewRowsCuda, ArgmaxIsThatOfTheFloats) {
  for (const std::int64_t rows : {1, 2, 8, 9, 16}) {
    for (const auto& [in, out] : {std::pair<std::int64_t, std::int64_t>{8, 1},
                                  {40, 37},
                                  {264, 2217},
                                  {264, 70001},
                                  {1000, 9000},
                                  {12296, 9}}) {
      FewRowsCall call({{DType::kBFloat16, rows, in, out, FewRowsForm::kFloatProduct}, rows != 2},
                       device_);
      Bits& w = call.host.w.bits;
      const std::int64_t stride = call.host.w.stride;
      for (std::int64_t j = 0; j < out / 2; ++j) {
        std::copy_n(w.begin() + j * stride, in, w.begin() + (out - 1 - j) * stride);
      }
      if (out > 8) w[7 * stride + 3] = 0x7fc0;
      call.w.memory.upload(w.data(), 2 * w.size());
      if (rows > 8) call.host.x.bits[5 * call.host.x.stride] = 0x7fc0;
      call.x.memory.upload(call.host.x.bits.data(), 2 * call.host.x.bits.size());
      call.reset();
      ASSERT_TRUE(call.run().ok());
      const std::vector<std::uint8_t> raw = call.bytes();
      std::vector<std::int32_t> expected;
      for (std::int64_t i = 0; i < rows; ++i) {
        const auto* row = reinterpret_cast<const float*>(raw.data()) + i * call.host.y.stride;
        expected.push_back(argmax_of(row, out));
      }
      const std::vector<std::uint64_t> none(rows, 0);
      DeviceMemory words(8 * none.size());
      words.upload(none.data(), words.size());
      call.args.y = words.data();
      call.problem.form = FewRowsForm::kArgmax;
      ASSERT_TRUE(call.run().ok());
      EXPECT_EQ(columns_of(words, rows), expected) << rows << " x " << in << " -> " << out;
    }
  }
}

TEST_P(FewRowsCuda, ArgmaxOfRowsTakesTheFirstOfTheLargestFinite) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::nanf("");
  constexpr std::int64_t kRows = 6, kColumns = 9000, kStride = kColumns + 3;
  std::vector<float> logits(kRows * kStride, kInf);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::int64_t j = 0; j < kColumns; ++j) {
    logits[j] = normal(random);
    logits[kStride + j] = -1 - static_cast<float>(j % 7);
    logits[2 * kStride + j] = j == 8999 ? -3e38f : -kInf;
    logits[3 * kStride + j] = j % 2 ? kNaN : kInf;
    logits[4 * kStride + j] = j == 4095 ? -0.0f : j == 4096 ? 0.0f : -1.0f;
    logits[5 * kStride + j] = static_cast<float>(j % 4500);
  }
  std::vector<std::int32_t> expected;
  for (std::int64_t i = 0; i < kRows; ++i) {
    expected.push_back(argmax_of(logits.data() + i * kStride, kColumns));
  }
  EXPECT_EQ(expected[3], -1);
  EXPECT_EQ(expected[4], 4095);
  DeviceMemory data(4 * logits.size()), words(8 * kRows);
  data.upload(logits.data(), data.size());
  const std::vector<std::uint64_t> none(kRows, 0);
  for (int repeat = 0; repeat < 10; ++repeat) {
    words.upload(none.data(), words.size());
    ASSERT_TRUE(argmax_of_rows(kRows, kColumns, static_cast<const float*>(data.data()), kStride,
                               static_cast<std::uint64_t*>(words.data()), cuda_device(), nullptr)
                    .ok());
    ASSERT_EQ(columns_of(words, kRows), expected);
  }
}

// An empty row stays empty; the host finds a row's column where its length says.
TEST_P(FewRowsCuda, NextTokensCountsWhatIsNotEmpty) {
  const std::vector<std::int32_t> before{0, 5, 8, 3};
  const std::vector<std::uint64_t> argmax{~std::uint64_t{2}, ~std::uint64_t{70}, 0,
                                          ~std::uint64_t{0}};  // columns 2, 70, none, 0
  DeviceMemory words(32), tokens(16), positions(16), kv_lens(16), found(32);
  words.upload(argmax.data(), 32);
  kv_lens.upload(before.data(), 16);
  const auto ints = [](const DeviceMemory& memory) {
    return static_cast<std::int32_t*>(memory.data());
  };
  const NextTokensArgs args{static_cast<std::uint64_t*>(words.data()), ints(tokens),
                            ints(positions), ints(kv_lens), ints(found)};
  ASSERT_TRUE(next_tokens(4, args, cuda_device(), nullptr).ok());
  const auto now = [](const DeviceMemory& memory) {
    std::vector<std::int32_t> values(memory.size() / 4);
    memory.download(values.data(), memory.size());
    return values;
  };
  EXPECT_EQ(now(tokens), (std::vector<std::int32_t>{2, 70, 0, 0}));
  EXPECT_EQ(now(positions), (std::vector<std::int32_t>{-1, 5, 8, 3}));
  EXPECT_EQ(now(kv_lens), (std::vector<std::int32_t>{0, 6, 9, 4}));
  EXPECT_EQ(now(found), (std::vector<std::int32_t>{2, -1, -1, 70, -1, -1, -1, 0}));
  EXPECT_EQ(now(words), std::vector<std::int32_t>(8, 0));
}

// The checks come before anything that needs a GPU.
TEST(FewRowsRefusals, NameWhatIsWrong) {
  alignas(16) char memory[16];
  const FewRowsProblem problem{DType::kBFloat16, 1, 64, 64, FewRowsForm::kProduct};
  FewRowsArgs args;
  args.x = args.w = memory;
  args.y = memory;
  args.x_stride = args.w_stride = args.y_stride = 64;
  const auto refusal = [&](const auto& change) {
    FewRowsProblem p = problem;
    FewRowsArgs a = args;
    change(p, a);
    return few_rows(p, a, Device{}, nullptr).message();
  };
  EXPECT_EQ(refusal([](auto& p, auto&) { p.dtype = DType::kFloat32; }),
            "dtype: CUDA kernels take bf16 and fp16");
  EXPECT_EQ(refusal([](auto& p, auto&) { p.rows = 17; }), "rows: expected 1 to 16, got 17");
  EXPECT_EQ(refusal([](auto& p, auto&) { p.rows = 0; }), "rows: expected 1 to 16, got 0");
  EXPECT_EQ(refusal([](auto& p, auto&) { p.in = 20; }),
            "in: expected a multiple of 8 from 8 to 2^29, got 20");
  EXPECT_EQ(refusal([](auto& p, auto&) { p.out = 0; }), "out: expected 1 to 2^29, got 0");
  EXPECT_EQ(refusal([](auto&, auto& a) { a.w = nullptr; }), "w: it is null");
  EXPECT_EQ(refusal([&](auto&, auto& a) { a.x = memory + 2; }),
            "x: its address must be a multiple of 16 bytes");
  EXPECT_EQ(refusal([](auto&, auto& a) { a.w_stride = 68; }),
            "w: its stride must be a multiple of 8 elements, got 68");
  EXPECT_EQ(refusal([](auto&, auto& a) { a.next_bytes = -1; }),
            "next: expected an address in multiples of 16 bytes and a size of at least 0");
  EXPECT_EQ(refusal([&](auto&, auto& a) {
              a.gain = memory;
              a.eps = -1;
            }),
            "eps: expected a number of at least 0, got -1.000000");
  EXPECT_EQ(refusal([](auto&, auto&) {}),
            "few_rows: it runs on GPUs of compute capability 8.0 and later");
  EXPECT_EQ(argmax_of_rows(0, 8, nullptr, 8, nullptr, Device{}, nullptr).message(),
            "rows: expected 1 to 2^20, got 0");
  EXPECT_EQ(argmax_of_rows(1, 0, nullptr, 8, nullptr, Device{}, nullptr).message(),
            "columns: expected 1 to 2^29, got 0");
  EXPECT_EQ(next_tokens(1, {}, Device{}, nullptr).message(),
            "argmax: it runs on GPUs of compute capability 8.0 and later");
}

}  // namespace
}  // namespace parallax::tests
