// SPDX-License-Identifier: MIT
#include "bench/cpu_decode.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "bench/fma_peak.h"
#include "kernels/cpu/element.h"
#include "parallax/attention.h"

namespace parallax::bench {
namespace {

struct Shape {
  std::int64_t batch, kv_len, num_q_heads, num_kv_heads, head_dim;
  DType dtype;
};

constexpr Shape kShapes[] = {
    {1, 16384, 8, 8, 128, DType::kFloat32},   {1, 16384, 16, 8, 128, DType::kFloat32},
    {1, 16384, 32, 8, 128, DType::kFloat32},  {8, 4096, 8, 8, 64, DType::kFloat32},
    {1, 16384, 8, 8, 128, DType::kBFloat16},  {1, 16384, 16, 8, 128, DType::kBFloat16},
    {1, 16384, 32, 8, 128, DType::kBFloat16}, {8, 4096, 8, 8, 64, DType::kBFloat16},
};

// Page-aligned memory, as large allocations of an engine are.
class Memory {
 public:
  explicit Memory(std::size_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)),
              std::free) {
    if (!data_) throw std::runtime_error("decode: not enough memory");
  }
  char* data() const { return data_.get(); }

 private:
  std::unique_ptr<char, void (*)(void*)> data_;
};

void fill(DType dtype, std::int64_t elements, unsigned seed, char* to) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  cpu::with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t i = 0; i < elements; ++i) {
      cpu::store(static_cast<cpu::RealOf<T>>(uniform(generator)), reinterpret_cast<T*>(to) + i);
    }
  });
}

// One decode with everything that it needs.
class Decode {
 public:
  Decode(const Shape& shape, int num_threads)
      : cache_elements_(shape.batch * shape.kv_len * shape.num_kv_heads * shape.head_dim),
        cache_bytes_(static_cast<std::size_t>(cache_elements_) * cpu::element_bytes(shape.dtype)),
        q_elements_(shape.batch * shape.num_q_heads * shape.head_dim),
        k_(cache_bytes_),
        v_(cache_bytes_),
        queries_(static_cast<std::size_t>(3 * q_elements_) * cpu::element_bytes(shape.dtype)),
        kv_lens_(static_cast<std::size_t>(shape.batch), static_cast<std::int32_t>(shape.kv_len)) {
    fill(shape.dtype, cache_elements_, 1, k_.data());
    fill(shape.dtype, cache_elements_, 2, v_.data());
    fill(shape.dtype, 2 * q_elements_, 3, queries_.data());
    AttentionProblem problem;
    problem.dtype = shape.dtype;
    problem.batch = shape.batch;
    problem.q_len = 1;
    problem.kv_len = shape.kv_len;
    problem.num_q_heads = shape.num_q_heads;
    problem.num_kv_heads = shape.num_kv_heads;
    problem.head_dim = shape.head_dim;
    problem.scale = 1.0 / std::sqrt(static_cast<double>(shape.head_dim));
    Device device;
    device.num_threads = num_threads;
    check(plan(problem, device, &plan_));
    workspace_ = std::make_unique<Memory>(workspace_bytes(plan_));
  }

  std::size_t bytes() const { return 2 * cache_bytes_; }
  const Memory& keys() const { return k_; }
  const Memory& values() const { return v_; }

  void run(const ParallelFor& parallel_for) const {
    const AttentionProblem& p = plan_.problem;
    const std::size_t q_bytes = static_cast<std::size_t>(q_elements_) * cpu::element_bytes(p.dtype);
    const std::int64_t q_row = p.num_q_heads * p.head_dim, kv_row = p.num_kv_heads * p.head_dim;
    DecodeArgs args;
    args.q = {queries_.data(), q_row, q_row, p.head_dim};
    args.r = {queries_.data() + q_bytes, q_row, q_row, p.head_dim};
    args.o = {queries_.data() + 2 * q_bytes, q_row, q_row, p.head_dim};
    args.k_cache = {k_.data(), p.kv_len * kv_row, kv_row, p.head_dim};
    args.v_cache = {v_.data(), p.kv_len * kv_row, kv_row, p.head_dim};
    args.sequences.kv_lens = kv_lens_.data();
    check(parallax::run(plan_, args, workspace_->data(), parallel_for));
  }

 private:
  static void check(const Status& status) {
    if (!status.ok()) throw std::runtime_error("decode: " + status.message());
  }

  std::int64_t cache_elements_;
  std::size_t cache_bytes_;
  std::int64_t q_elements_;
  Memory k_, v_, queries_;
  std::vector<std::int32_t> kv_lens_;
  DecodePlan plan_;
  std::unique_ptr<Memory> workspace_;
};

// 64 bytes, whatever vectors the processor has.
using Line = std::uint64_t __attribute__((vector_size(64)));

// Reads [0, bytes) as kStreams sequential streams, a prefetch `ahead` bytes before each load where
// that is not 0. The sum keeps the loads.
template <int kStreams>
std::uint64_t read_streams(const char* from, std::size_t bytes, std::size_t ahead) {
  constexpr std::size_t kLinesAtOnce = 8;
  const std::size_t stream_bytes = bytes / kStreams / (64 * kLinesAtOnce) * (64 * kLinesAtOnce);
  Line sums[kLinesAtOnce] = {};
  for (std::size_t at = 0; at < stream_bytes; at += 64 * kLinesAtOnce) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const char* lines = from + static_cast<std::size_t>(stream) * stream_bytes + at;
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kLinesAtOnce; ++i) {
        if (ahead) __builtin_prefetch(lines + 64 * i + ahead, 0, 2);
        sums[i] += *reinterpret_cast<const Line*>(lines + 64 * i);
      }
    }
  }
  std::uint64_t sum = 0;
  for (const Line& line : sums) sum += line[0] + line[7];
  return sum;
}

struct ReadLoop {
  std::uint64_t (*read)(const char*, std::size_t, std::size_t);
  std::size_t ahead;
};
constexpr ReadLoop kReadLoops[] = {{read_streams<1>, 0}, {read_streams<1>, 4096},
                                   {read_streams<4>, 0}, {read_streams<4>, 4096},
                                   {read_streams<8>, 0}, {read_streams<8>, 4096}};

// Each thread its part of the keys, then of the values.
void read_all(const ReadLoop& loop, const Decode& decode, int num_threads,
              const ParallelFor& parallel_for, std::uint64_t* sums) {
  const std::size_t part = decode.bytes() / 2 / static_cast<std::size_t>(num_threads);
  parallel_for(num_threads, [&](std::int64_t task, int) {
    const std::size_t first = static_cast<std::size_t>(task) * part;
    sums[task] += loop.read(decode.keys().data() + first, part, loop.ahead) +
                  loop.read(decode.values().data() + first, part, loop.ahead);
  });
}

// Keys over values and back: the bytes of a copy count twice, read and written.
void copy_all(const Decode& decode, int num_threads, const ParallelFor& parallel_for) {
  const std::size_t part = decode.bytes() / 2 / static_cast<std::size_t>(num_threads);
  parallel_for(num_threads, [&](std::int64_t task, int) {
    const std::size_t first = static_cast<std::size_t>(task) * part;
    std::memcpy(decode.values().data() + first, decode.keys().data() + first, part);
  });
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Best {
  double decode = INFINITY, read = INFINITY, copy = INFINITY;  // seconds
};

Best race(const Decode& decode, int num_threads, double budget_s, const ParallelFor& parallel_for) {
  constexpr int kMinRounds = 5, kMaxRounds = 50;
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(num_threads));
  const auto seconds_of = [&](auto f) {
    const auto now = num_threads == 1 ? thread_seconds : wall_seconds;
    const double start = now();
    f();
    return now() - start;
  };
  Best best;
  const double begin = wall_seconds();
  for (int round = 0; round < kMaxRounds; ++round) {
    if (round >= kMinRounds && wall_seconds() - begin > budget_s) break;
    best.decode = std::min(best.decode, seconds_of([&] { decode.run(parallel_for); }));
    for (const ReadLoop& loop : kReadLoops) {
      best.read = std::min(best.read, seconds_of([&] {
                             read_all(loop, decode, num_threads, parallel_for, sums.data());
                           }));
    }
    best.copy =
        std::min(best.copy, seconds_of([&] { copy_all(decode, num_threads, parallel_for); }));
  }
  return best;
}

std::string name_of(const Shape& shape) {
  return "B" + std::to_string(shape.batch) + " L" + std::to_string(shape.kv_len) + " H" +
         std::to_string(shape.num_q_heads) + "/" + std::to_string(shape.num_kv_heads) + " D" +
         std::to_string(shape.head_dim) + (shape.dtype == DType::kFloat32 ? " float32" : " bf16");
}

}  // namespace

void show_decode(const ParallelFor& parallel_for, int num_threads, double budget_s,
                 const std::function<void(const std::string&, double)>& report) {
  std::printf("\ndecode, one query token, %d thread%s; %%: of the best read loop\n", num_threads,
              num_threads == 1 ? "" : "s");
  std::printf("%-28s %9s %9s %7s %11s %9s %9s\n", "", "ms", "GB/s", "%", "useful GF/s", "read GB/s",
              "copy GB/s");
  for (const Shape& shape : kShapes) {
    const Decode decode(shape, num_threads);
    const Best best = race(decode, num_threads, budget_s, parallel_for);
    const double gigabytes = 1e-9 * static_cast<double>(decode.bytes());
    const double gigaflops =
        8e-9 * static_cast<double>(shape.batch * shape.kv_len * shape.num_q_heads * shape.head_dim);
    std::printf("%-28s %9.2f %9.1f %7.0f %11.1f %9.1f %9.1f\n", name_of(shape).c_str(),
                best.decode * 1e3, gigabytes / best.decode, 100 * best.read / best.decode,
                gigaflops / best.decode, gigabytes / best.read, gigabytes / best.copy);
    const std::string key = "decode " + name_of(shape) + " threads" + std::to_string(num_threads);
    report(key + " ms", best.decode * 1e3);
    report(key + " share of read", best.read / best.decode);
  }
}

}  // namespace parallax::bench
