// SPDX-License-Identifier: MIT
#include "tests/kernels/cases.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "kernels/cpu/element.h"

namespace parallax::tests {
namespace {

const std::int32_t* pointer(const std::vector<std::int32_t>& array) {
  return array.empty() ? nullptr : array.data();
}

Values normal(std::mt19937& generator, std::int64_t size, double factor, double mean) {
  std::normal_distribution<double> distribution;
  Values values(static_cast<std::size_t>(size));
  for (double& value : values) value = factor * distribution(generator) + mean;
  return values;
}

}  // namespace

Sequences Lengths::view() const {
  return {pointer(cu_seqlens_q), pointer(cu_seqlens_k), pointer(kv_lens), pointer(kv_start)};
}

AttentionProblem problem_of(DType dtype, std::int64_t batch, std::int64_t q_len,
                            std::int64_t kv_len, std::int64_t num_q_heads,
                            std::int64_t num_kv_heads, std::int64_t head_dim) {
  AttentionProblem problem;
  problem.dtype = dtype;
  problem.batch = batch;
  problem.q_len = q_len;
  problem.kv_len = kv_len;
  problem.num_q_heads = num_q_heads;
  problem.num_kv_heads = num_kv_heads;
  problem.head_dim = head_dim;
  problem.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return problem;
}

Inputs random_inputs(const AttentionProblem& problem, Data data, unsigned seed) {
  const std::int64_t batch = problem.packed ? 1 : problem.batch;
  const std::int64_t q_size = batch * problem.q_len * problem.num_q_heads * problem.head_dim;
  const std::int64_t kv_size = batch * problem.kv_len * problem.num_kv_heads * problem.head_dim;
  const bool shifted = data == Data::kShifted;
  std::mt19937 generator(seed);
  Inputs inputs;
  inputs.q = normal(generator, q_size, 1.0, 0.0);
  inputs.r = normal(generator, q_size, shifted ? 0.5 : 1.0, shifted ? 0.15 : 0.0);
  inputs.k = normal(generator, kv_size, 1.0, shifted ? 3.0 : 0.0);
  inputs.v = normal(generator, kv_size, 1.0, shifted ? 1.0 : 0.0);
  inputs.d_o = normal(generator, q_size, 1.0, 0.0);
  for (Values* values : {&inputs.q, &inputs.r, &inputs.k, &inputs.v, &inputs.d_o}) {
    *values = round_to(problem.dtype, std::move(*values));
  }
  return inputs;
}

namespace {

// One scale a head, and the values as an FP8 cache with these scales holds them.
std::vector<float> quantise(const AttentionProblem& problem, double coverage, Values* values) {
  const auto heads = static_cast<std::size_t>(problem.num_kv_heads);
  const auto head_dim = static_cast<std::size_t>(problem.head_dim);
  std::vector<float> scale(heads, 0.0f);
  const auto head_of = [&](std::size_t i) { return i / head_dim % heads; };
  for (std::size_t i = 0; i < values->size(); ++i) {
    float& largest = scale[head_of(i)];
    largest = std::max(largest, static_cast<float>(std::abs((*values)[i])));
  }
  for (std::size_t h = 0; h < heads; ++h) {
    scale[h] = scale[h] > 0 ? static_cast<float>(coverage) * scale[h] / 448.0f : 1.0f;
    if (h % 2 == 1) scale[h] = std::exp2(std::ceil(std::log2(scale[h])));
  }
  for (std::size_t i = 0; i < values->size(); ++i) {
    const float x = static_cast<float>((*values)[i]), by = scale[head_of(i)];
    (*values)[i] = round_to(DType::kFloat8E4M3, x / by) * static_cast<double>(by);
  }
  return scale;
}

}  // namespace

void quantise_cache(Case* c, double coverage) {
  c->problem.kv_dtype = DType::kFloat8E4M3;
  c->k_scale = quantise(c->problem, coverage, &c->inputs.k);
  c->v_scale = quantise(c->problem, coverage, &c->inputs.v);
  c->name += ", FP8 cache";
}

Case widened(Case c) {
  c.problem.kv_dtype.reset();
  c.k_scale.clear();
  c.v_scale.clear();
  c.inputs.k = round_to(c.problem.dtype, std::move(c.inputs.k));
  c.inputs.v = round_to(c.problem.dtype, std::move(c.inputs.v));
  return c;
}

void set_probe_constant(Case* c, double t) {
  const auto set_first = [&](Values* values, double value) {
    const auto head_dim = static_cast<std::size_t>(c->problem.head_dim);
    for (std::size_t i = 0; i < values->size(); i += head_dim) (*values)[i] = value;
  };
  set_first(&c->inputs.q, 0);
  set_first(&c->inputs.r, 2);
  set_first(&c->inputs.k, t / 2);
}

Case packed_case(AttentionProblem problem, const std::vector<std::int32_t>& q_lens,
                 const std::vector<std::int32_t>& kv_lens, Data data, unsigned seed) {
  Case packed;
  packed.name = "packed";
  const auto offsets = [](const std::vector<std::int32_t>& lens) {
    std::vector<std::int32_t> sums(lens.size() + 1, 0);
    std::partial_sum(lens.begin(), lens.end(), sums.begin() + 1);
    return sums;
  };
  packed.lengths.cu_seqlens_q = offsets(q_lens);
  packed.lengths.cu_seqlens_k = offsets(kv_lens);
  problem.packed = true;
  problem.batch = static_cast<std::int64_t>(q_lens.size());
  problem.q_len = packed.lengths.cu_seqlens_q.back();
  problem.kv_len = packed.lengths.cu_seqlens_k.back();
  packed.problem = problem;
  packed.inputs = random_inputs(problem, data, seed);
  return packed;
}

Case ragged_case(DType dtype, std::int64_t q_len, std::int64_t num_q_heads,
                 std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t window, Data data) {
  Case c;
  c.problem = problem_of(dtype, 7, q_len, 300, num_q_heads, num_kv_heads, head_dim);
  c.problem.window = window;
  c.lengths.kv_lens = {300, 0, 1, 129, 64, 256, 2};
  c.lengths.kv_start = {0, 0, 0, 100, 3, 255, 0};
  c.inputs = random_inputs(c.problem, data, 21);
  c.inputs.d_o.clear();
  c.name = std::string(name_of(dtype)) + ", q_len " + std::to_string(q_len) + ", heads " +
           std::to_string(num_q_heads) + "/" + std::to_string(num_kv_heads) + ", head_dim " +
           std::to_string(head_dim) + ", window " + std::to_string(window);
  return c;
}

std::vector<Case> cases_of(const std::vector<CaseShape>& shapes,
                           const std::vector<std::int64_t>& head_dims, unsigned seed) {
  std::vector<Case> cases;
  for (std::int64_t head_dim : head_dims) {
    for (Data data : {Data::kZeroMean, Data::kShifted}) {
      for (const CaseShape& shape : shapes) {
        Case c;
        c.problem =
            problem_of(DType::kBFloat16, 1, shape.q_len, shape.kv_len, shape.group, 1, head_dim);
        c.problem.causal = shape.causal;
        c.problem.window = shape.window;
        c.inputs = random_inputs(c.problem, data, seed);
        c.name = std::to_string(shape.q_len) + "x" + std::to_string(shape.kv_len) + ", window " +
                 std::to_string(shape.window);
        cases.push_back(std::move(c));
      }
    }
  }
  return cases;
}

std::vector<Case> all_cases(DType dtype, std::int64_t head_dim, Data data,
                            std::int64_t max_kv_len) {
  std::vector<Case> cases;
  unsigned seed = 0;
  const auto add = [&](const std::string& name, AttentionProblem problem, Lengths lengths = {}) {
    if (problem.kv_len > max_kv_len) return;
    cases.push_back(
        {name, problem, std::move(lengths), random_inputs(problem, data, ++seed), {}, {}});
  };
  const auto shape = [&](std::int64_t batch, std::int64_t q_len, std::int64_t kv_len,
                         std::int64_t num_q_heads, std::int64_t num_kv_heads) {
    return problem_of(dtype, batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim);
  };
  for (std::int64_t len : {1, 17, 63, 64, 65, 130}) {
    add("causal " + std::to_string(len), shape(1, len, len, 1, 1));
  }
  for (std::int64_t group : {1, 3, 4, 8}) {
    add("group " + std::to_string(group), shape(2, 33, 65, 2 * group, 2));
  }
  for (bool causal : {true, false}) {
    for (auto [q_len, kv_len] :
         {std::pair{113, 203}, {203, 113}, {1, 129}, {70, 1}, {1023, 1024}}) {
      AttentionProblem problem = shape(1, q_len, kv_len, 2, 1);
      problem.causal = causal;
      const std::string mask = causal ? "causal " : "full ";
      add(mask + std::to_string(q_len) + "x" + std::to_string(kv_len), problem);
    }
  }
  for (std::int64_t window : {1, 2, 63, 64, 65, 1000}) {
    AttentionProblem problem = shape(1, 97, 130, 2, 1);
    problem.window = window;
    add("window " + std::to_string(window), problem);
  }
  Lengths ragged;
  ragged.kv_lens = {100, 0, 1, 37, 90};
  for (bool causal : {true, false}) {
    AttentionProblem problem = shape(5, 40, 100, 3, 1);
    problem.causal = causal;
    add(causal ? "ragged causal" : "ragged full", problem, ragged);
  }
  Lengths padded;
  padded.kv_lens = {100, 99, 0, 50, 400, -3};
  padded.kv_start = {3, 98, 5, 50, 99, -7};  // some beyond the tensor: clamped
  for (std::int64_t window : {0, 20}) {
    AttentionProblem problem = shape(6, 40, 100, 3, 1);
    problem.window = window;
    add("left padding, window " + std::to_string(window), problem, padded);
  }
  for (std::int64_t window : {0, 9}) {
    AttentionProblem problem = shape(0, 0, 0, 4, 2);
    problem.window = window;
    Case packed = packed_case(problem, {1, 64, 0, 17, 65, 5}, {1, 64, 3, 40, 65, 0}, data, ++seed);
    packed.name += ", window " + std::to_string(window);
    if (packed.problem.kv_len <= max_kv_len) cases.push_back(std::move(packed));
  }
  AttentionProblem full = shape(0, 0, 0, 3, 3);
  full.causal = false;
  cases.push_back(packed_case(full, {9, 33}, {70, 1}, data, ++seed));
  cases.back().name += " full";
  return cases;
}

double round_to(DType dtype, double value) {
  return cpu::with_element_type(dtype, [&](auto element) -> double {
    using T = decltype(element);
    cpu::store(static_cast<cpu::RealOf<T>>(value), &element);
    return cpu::load(element);
  });
}

Values round_to(DType dtype, Values values) {
  for (double& value : values) value = round_to(dtype, value);
  return values;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat8E4M3:
      break;
  }
  return "float8_e4m3";
}

Tensor::Tensor(DType dtype, std::int64_t batch, std::int64_t len, std::int64_t heads,
               std::int64_t head_dim)
    : dtype(dtype), batch(batch), len(len), heads(heads), head_dim(head_dim) {
  const std::size_t elements = static_cast<std::size_t>(batch * batch_stride() + 1);
  bytes_.assign(elements * cpu::element_bytes(dtype), 0xff);
}

Tensor::Tensor(const AttentionProblem& problem, bool of_keys)
    : Tensor(of_keys ? cache_dtype(problem) : problem.dtype, problem.packed ? 1 : problem.batch,
             of_keys ? problem.kv_len : problem.q_len,
             of_keys ? problem.num_kv_heads : problem.num_q_heads, problem.head_dim) {}

std::size_t Tensor::offset(std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) const {
  return static_cast<std::size_t>(b * batch_stride() + i * len_stride() + h * head_stride() + d) *
         cpu::element_bytes(dtype);
}

// f(position in logical order, byte offset)
template <class F>
void Tensor::for_each(const F& f) const {
  std::size_t position = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < len; ++i) {
      for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t d = 0; d < head_dim; ++d) f(position++, offset(b, i, h, d));
      }
    }
  }
}

void Tensor::set(const Values& values) {
  cpu::with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    for_each([&](std::size_t position, std::size_t offset) {
      cpu::store(static_cast<cpu::RealOf<T>>(values.at(position)), &element);
      std::memcpy(&bytes_[offset], &element, sizeof(T));
    });
  });
}

void Tensor::set(Values values, const std::vector<float>& scale) {
  for (std::size_t i = 0; i < values.size() && !scale.empty(); ++i) {
    const std::size_t head = i / static_cast<std::size_t>(head_dim) % scale.size();
    values[i] /= static_cast<double>(scale[head]);
  }
  set(values);
}

void Tensor::poison(std::int64_t b, std::int64_t i) {
  for (std::int64_t h = 0; h < heads; ++h) {
    std::memset(&bytes_[offset(b, i, h, 0)], 0xff,
                static_cast<std::size_t>(head_dim) * cpu::element_bytes(dtype));
  }
}

void Tensor::replace_poison(double value) {
  cpu::with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const std::vector<unsigned char> poison(sizeof(T), 0xff);
    cpu::store(static_cast<cpu::RealOf<T>>(value), &element);
    for (std::size_t at = 0; at + sizeof(T) <= bytes_.size(); at += sizeof(T)) {
      if (std::equal(poison.begin(), poison.end(), &bytes_[at])) {
        std::memcpy(&bytes_[at], &element, sizeof(T));
      }
    }
  });
}

Values Tensor::values() const {
  Values values(static_cast<std::size_t>(batch * len * heads * head_dim));
  cpu::with_element_type(dtype, [&](auto element) {
    for_each([&](std::size_t position, std::size_t offset) {
      std::memcpy(&element, &bytes_[offset], sizeof(element));
      values[position] = cpu::load(element);
    });
  });
  return values;
}

bool Tensor::gaps_intact() const {
  std::vector<unsigned char> bytes = bytes_;
  for_each([&](std::size_t, std::size_t offset) {
    std::memset(&bytes[offset], 0xff, cpu::element_bytes(dtype));
  });
  return std::all_of(bytes.begin(), bytes.end(), [](unsigned char byte) { return byte == 0xff; });
}

View Tensor::view() { return {bytes_.data(), batch_stride(), len_stride(), head_stride()}; }

ConstView Tensor::const_view() const {
  return {bytes_.data(), batch_stride(), len_stride(), head_stride()};
}

PagedCache::PagedCache(const AttentionProblem& problem, int page_size, unsigned seed)
    : max_pages((problem.kv_len + page_size - 1) / page_size + 1),
      num_pages(problem.batch * max_pages + 3),
      page_size(page_size) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(num_pages));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  entries.assign(order.begin(), order.begin() + problem.batch * max_pages);
}

PageTable PagedCache::table() const { return {entries.data(), max_pages, num_pages, page_size}; }

Tensor PagedCache::scatter(const Tensor& contiguous) const {
  Tensor pages(contiguous.dtype, num_pages, page_size, contiguous.heads, contiguous.head_dim);
  Tensor source = contiguous;
  const std::size_t bytes =
      static_cast<std::size_t>(contiguous.head_dim) * cpu::element_bytes(contiguous.dtype);
  for (std::int64_t b = 0; b < contiguous.batch; ++b) {
    for (std::int64_t j = 0; j < contiguous.len; ++j) {
      const std::int32_t page = entries[static_cast<std::size_t>(b * max_pages + j / page_size)];
      for (std::int64_t h = 0; h < contiguous.heads; ++h) {
        std::memcpy(&pages.bytes()[pages.offset(page, j % page_size, h, 0)],
                    &source.bytes()[source.offset(b, j, h, 0)], bytes);
      }
    }
  }
  return pages;
}

ParallelFor parallel_for(int num_threads) {
  if (num_threads == 1) {
    return [](std::int64_t num_tasks, const TaskBody& body) {
      for (std::int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    };
  }
  return [num_threads](std::int64_t num_tasks, const TaskBody& body) {
    std::atomic<std::int64_t> next{0};
    std::vector<std::thread> threads;
    for (int worker = 0; worker < num_threads; ++worker) {
      threads.emplace_back([&, worker] {
        for (std::int64_t task = next++; task < num_tasks; task = next++) body(task, worker);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
}

}  // namespace parallax::tests
