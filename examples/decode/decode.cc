// SPDX-License-Identifier: MIT
// Decoding in an engine without torch: two sequences of different lengths over one paged cache,
// filled by append_kv, read by decode, on the CPU and, where there is one, on a GPU. Every result
// is compared with the definition (docs/math.md section 1). Exits 1 where one is off.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "parallax/attention.h"

#ifdef PARALLAX_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

using parallax::Status;

constexpr std::int64_t kBatch = 2, kQueryHeads = 8, kKeyHeads = 2, kHeadDim = 64;
constexpr std::int64_t kMaxPages = 8, kNumPages = 20;
constexpr int kPageSize = 16;
constexpr std::int64_t kPromptLen = 40, kSteps = 3;

void check(const Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.message());
}

// ---- Where memory lies and work is enqueued. An engine has these things already.

struct Cpu {
  static constexpr const char* kName = "CPU";
  parallax::Device device;  // one thread

  static void* allocate(std::size_t bytes) {
    return std::aligned_alloc(64, (std::max<std::size_t>(bytes, 1) + 63) / 64 * 64);
  }
  static void release(void* memory) { std::free(memory); }
  static void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

  // An engine hands over its thread pool here.
  static void each_task(std::int64_t num_tasks, const parallax::TaskBody& body) {
    for (std::int64_t task = 0; task < num_tasks; ++task) body(task, /*worker=*/0);
  }
  Status append(const parallax::AttentionProblem& problem, const parallax::AppendArgs& args) const {
    return parallax::append_kv(problem, args, each_task);
  }
  Status decode(const parallax::DecodePlan& plan, const parallax::DecodeArgs& args,
                void* workspace) const {
    return parallax::run(plan, args, workspace, each_task);
  }
  // Only a GPU needs one.
  Status schedule(const parallax::DecodePlan&, const parallax::Sequences&, void*) const {
    return {};
  }
};

#ifdef PARALLAX_CUDA
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

struct Gpu {
  static constexpr const char* kName = "GPU";
  parallax::Device device;
  cudaStream_t stream = nullptr;

  static void* allocate(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    return memory;
  }
  static void release(void* memory) { cudaFree(memory); }
  static void copy(void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
  }

  Status append(const parallax::AttentionProblem& problem, const parallax::AppendArgs& args) const {
    return parallax::append_kv(problem, args, device, stream);
  }
  Status decode(const parallax::DecodePlan& plan, const parallax::DecodeArgs& args,
                void* workspace) const {
    return parallax::run(plan, args, workspace, stream);
  }
  Status schedule(const parallax::DecodePlan& plan, const parallax::Sequences& sequences,
                  void* memory) const {
    return parallax::schedule(plan, sequences, memory, stream);
  }
};
#endif

// Memory of a place.
template <class Place>
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(Place::allocate(bytes)) {}
  template <class T>
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size() * sizeof(T)) {
    set(host);
  }
  ~Buffer() { Place::release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  void set(const std::vector<T>& host) {
    Place::copy(data_, host.data(), host.size() * sizeof(T));
  }
  template <class T>
  std::vector<T> get(std::size_t size) const {
    std::vector<T> host(size);
    Place::copy(host.data(), data_, size * sizeof(T));
    return host;
  }

 private:
  void* data_;
};

// ---- bfloat16 on the host

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- What the model made: q and r of the newest token, k and v of all tokens, [batch, len, heads,
// head_dim]

std::vector<std::uint16_t> random_heads(std::mt19937& generator, std::int64_t len,
                                        std::int64_t heads, float mean) {
  std::normal_distribution<float> normal(mean);
  std::vector<std::uint16_t> values(static_cast<std::size_t>(kBatch * len * heads * kHeadDim));
  for (std::uint16_t& value : values) value = to_bf16(normal(generator));
  return values;
}

// Tokens [first[b], first[b] + len) of sequence b.
std::vector<std::uint16_t> tokens_of(const std::vector<std::uint16_t>& all,
                                     const std::vector<std::int32_t>& first, std::int64_t len) {
  constexpr std::int64_t kToken = kKeyHeads * kHeadDim;
  const std::int64_t capacity = static_cast<std::int64_t>(all.size()) / kBatch / kToken;
  std::vector<std::uint16_t> tokens;
  for (std::int64_t b = 0; b < kBatch; ++b) {
    const auto* begin = all.data() + (b * capacity + first[static_cast<std::size_t>(b)]) * kToken;
    tokens.insert(tokens.end(), begin, begin + len * kToken);
  }
  return tokens;
}

// o of one row, by the definition.
std::vector<double> definition(const std::uint16_t* q, const std::uint16_t* r,
                               const std::uint16_t* k, const std::uint16_t* v, std::int64_t len) {
  std::vector<double> p(static_cast<std::size_t>(len)), t(p.size());
  double sum = 0, t_bar = 0;
  for (std::size_t j = 0; j < p.size(); ++j) {
    const std::uint16_t* key = k + j * kKeyHeads * kHeadDim;
    double s = 0;
    for (std::int64_t d = 0; d < kHeadDim; ++d) {
      s += static_cast<double>(from_bf16(q[d])) * from_bf16(key[d]);
      t[j] += static_cast<double>(from_bf16(r[d])) * from_bf16(key[d]);
    }
    sum += p[j] = std::exp(s / std::sqrt(static_cast<double>(kHeadDim)));
  }
  for (std::size_t j = 0; j < p.size(); ++j) t_bar += (p[j] /= sum) * t[j];
  std::vector<double> o(kHeadDim);
  for (std::size_t j = 0; j < p.size(); ++j) {
    const std::uint16_t* value = v + j * kKeyHeads * kHeadDim;
    for (std::size_t d = 0; d < o.size(); ++d) {
      o[d] += p[j] * (1 + t_bar - t[j]) * from_bf16(value[d]);
    }
  }
  return o;
}

template <class Place>
double largest_error(const Place& place) {
  std::mt19937 generator(1);
  // Sequence 0 has its whole prompt in the cache, sequence 1 starts with a shorter one.
  const std::vector<std::int32_t> prompt_lens = {kPromptLen, 17};
  const std::int64_t capacity = kMaxPages * kPageSize;
  const auto k = random_heads(generator, capacity, kKeyHeads, 1.0f);
  const auto v = random_heads(generator, capacity, kKeyHeads, 1.0f);
  // Page i of sequence b; entries that no visible token needs are never read.
  std::vector<std::int32_t> table(kBatch * kMaxPages, -1);
  for (std::size_t i = 0; i < 4; ++i) {
    table[i] = static_cast<std::int32_t>(3 * i + 2);
    table[kMaxPages + i] = static_cast<std::int32_t>(3 * i + 4);
  }

  parallax::AttentionProblem problem;
  problem.dtype = parallax::DType::kBFloat16;
  problem.batch = kBatch;
  problem.q_len = 1;                       // new tokens a step
  problem.kv_len = kMaxPages * kPageSize;  // what a row of the page table spans
  problem.num_q_heads = kQueryHeads;
  problem.num_kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
  parallax::DecodePlan plan;
  check(parallax::plan(problem, place.device, &plan), "plan");
  const Buffer<Place> workspace(parallax::workspace_bytes(plan));
  const Buffer<Place> schedule(parallax::schedule_bytes(plan));

  const Buffer<Place> pages(table);
  const std::size_t cache_bytes = kNumPages * kPageSize * kKeyHeads * kHeadDim * 2;
  const Buffer<Place> k_cache(cache_bytes), v_cache(cache_bytes);
  Buffer<Place> positions(kBatch * sizeof(std::int32_t)), kv_lens(kBatch * sizeof(std::int32_t));

  const auto view = [](auto* data, std::int64_t len, std::int64_t heads) {
    // data, then strides of batch (or page), token and head in elements
    return parallax::BasicView<std::remove_pointer_t<decltype(data)>>{data, len * heads * kHeadDim,
                                                                      heads * kHeadDim, kHeadDim};
  };
  parallax::AppendArgs append;
  append.positions = positions.template data<std::int32_t>();  // where a sequence's tokens begin
  append.pages = {pages.template data<std::int32_t>(), kMaxPages, kNumPages, kPageSize};
  append.k_cache = view(k_cache.data(), kPageSize, kKeyHeads);
  append.v_cache = view(v_cache.data(), kPageSize, kKeyHeads);
  const auto append_tokens = [&](const std::vector<std::int32_t>& first, std::int64_t len) {
    // Released at the end, for which cudaFree waits until the GPU has read them.
    const Buffer<Place> new_k(tokens_of(k, first, len)), new_v(tokens_of(v, first, len));
    parallax::AttentionProblem tokens = problem;
    tokens.q_len = len;
    append.k = view(static_cast<const void*>(new_k.data()), len, kKeyHeads);
    append.v = view(static_cast<const void*>(new_v.data()), len, kKeyHeads);
    positions.set(first);
    check(place.append(tokens, append), "append_kv");
  };
  // Both prompts at once; what is behind the shorter one is overwritten as its sequence grows.
  append_tokens({0, 0}, kPromptLen);

  double error = 0;
  std::vector<std::int32_t> lens = prompt_lens;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    const auto q = random_heads(generator, 1, kQueryHeads, 0.0f);
    const auto r = random_heads(generator, 1, kQueryHeads, 0.0f);
    append_tokens(lens, 1);
    for (std::int32_t& len : lens) ++len;
    kv_lens.set(lens);
    const Buffer<Place> q_here(q), r_here(r), o_here(q.size() * sizeof(q[0]));

    parallax::DecodeArgs args;
    args.q = view(static_cast<const void*>(q_here.data()), 1, kQueryHeads);
    args.r = view(static_cast<const void*>(r_here.data()), 1, kQueryHeads);
    args.k_cache = view(static_cast<const void*>(k_cache.data()), kPageSize, kKeyHeads);
    args.v_cache = view(static_cast<const void*>(v_cache.data()), kPageSize, kKeyHeads);
    args.pages = append.pages;
    args.sequences.kv_lens = kv_lens.template data<std::int32_t>();  // the new tokens counted
    args.o = view(o_here.data(), 1, kQueryHeads);
    args.schedule = schedule.data();
    // Once a step; every layer's run() of the step takes it.
    check(place.schedule(plan, args.sequences, schedule.data()), "schedule");
    check(place.decode(plan, args, workspace.data()), "decode");

    const auto o = o_here.template get<std::uint16_t>(q.size());
    for (std::int64_t row = 0; row < kBatch * kQueryHeads; ++row) {
      const std::int64_t b = row / kQueryHeads, head = row % kQueryHeads;
      const std::int64_t at = b * capacity * kKeyHeads + head / (kQueryHeads / kKeyHeads);
      const auto exact =
          definition(&q[static_cast<std::size_t>(row * kHeadDim)],
                     &r[static_cast<std::size_t>(row * kHeadDim)], k.data() + at * kHeadDim,
                     v.data() + at * kHeadDim, lens[static_cast<std::size_t>(b)]);
      for (std::int64_t d = 0; d < kHeadDim; ++d) {
        const float ours = from_bf16(o[static_cast<std::size_t>(row * kHeadDim + d)]);
        const double apart = std::abs(ours - exact[static_cast<std::size_t>(d)]);
        error = apart <= error ? error : apart;  // NaN stays
      }
    }
  }
  return error;
}

template <class Place>
bool passes(const Place& place) {
  constexpr double kTolerance = 0.1;  // bf16, outputs up to about 10
  const double error = largest_error(place);
  const bool good = error <= kTolerance;
  std::printf("%s: %d steps of %d sequences, largest error %.4f, %s\n", Place::kName,
              static_cast<int>(kSteps), static_cast<int>(kBatch), error, good ? "ok" : "WRONG");
  return good;
}

}  // namespace

int main() {
  try {
    bool good = passes(Cpu{});
#ifdef PARALLAX_CUDA
    Gpu gpu;
    if (const Status status = parallax::query_device(0, &gpu.device); status.ok()) {
      good = passes(gpu) && good;
    } else {
      std::printf("GPU: %s\n", status.message().c_str());
    }
#endif
    return good ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode: %s\n", error.what());
    return 1;
  }
}
