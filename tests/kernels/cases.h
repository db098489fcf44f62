// SPDX-License-Identifier: MIT
// Cases for the kernel tests: random inputs as plain double arrays, lengths, tensors that carry
// poison wherever no element is, and a ParallelFor made of threads. Nothing here knows a kernel.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "parallax/attention.h"

namespace parallax::tests {

using Values = std::vector<double>;  // in logical order, [batch, len, heads, head_dim] and such

// Sequences that own their arrays; empty ones are absent.
struct Lengths {
  std::vector<std::int32_t> cu_seqlens_q, cu_seqlens_k, kv_lens, kv_start;
  Sequences view() const;
};

struct Inputs {
  Values q, r, k, v, d_o;
};

// A call as data: everything that decides its results.
struct Case {
  std::string name;
  AttentionProblem problem;
  Lengths lengths;
  Inputs inputs;
  std::vector<float> k_scale = {}, v_scale = {};  // of an FP8 cache; else empty
  // What stands in k and v, and around them, where no query looks.
  double unseen = std::numeric_limits<double>::quiet_NaN();
};

enum class Data {
  kZeroMean,  // standard normal
  kShifted,   // keys of mean 3, values of mean 1, r = 0.5 (normal + 0.3)
};

// A causal problem with scale head_dim^-0.5; change what differs.
AttentionProblem problem_of(DType dtype, std::int64_t batch, std::int64_t q_len,
                            std::int64_t kv_len, std::int64_t num_q_heads,
                            std::int64_t num_kv_heads, std::int64_t head_dim);

// Inputs of a problem's shapes, rounded to its dtype: what a kernel sees and the oracle computes
// with are the same numbers.
Inputs random_inputs(const AttentionProblem& problem, Data data, unsigned seed);

// Makes the case's cache FP8 with a scale for each head, some of them powers of two, and k and v
// what such a cache holds: e4m3 numbers times the scale. `coverage`: the largest |k| and |v| of a
// head that does not saturate, over the head's largest.
void quantise_cache(Case* c, double coverage = 1.0);

// The same with a cache of the problem's dtype, which holds the FP8 one's elements times their
// scales, rounded.
Case widened(Case c);

// Makes the first element of every head 0 in q, 2 in r and t / 2 in k. Beside t = 0 that moves all
// probes by t and no logit.
void set_probe_constant(Case* c, double t);

// A packed case of these lengths.
Case packed_case(AttentionProblem problem, const std::vector<std::int32_t>& q_lens,
                 const std::vector<std::int32_t>& kv_lens, Data data, unsigned seed);

// A decode over seven caches, some of them empty, some of one token, some padded on the left.
Case ragged_case(DType dtype, std::int64_t q_len, std::int64_t num_q_heads,
                 std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t window, Data data);

// bf16 cases of these shapes, one key/value head, with every head_dim on both kinds of data.
struct CaseShape {
  std::int64_t q_len, kv_len, group, window;
  bool causal;
};
std::vector<Case> cases_of(const std::vector<CaseShape>& shapes,
                           const std::vector<std::int64_t>& head_dims, unsigned seed);

// Masks, layouts, groups and odd shapes: the list that every kernel has to pass. max_kv_len keeps
// the slow ones away.
std::vector<Case> all_cases(DType dtype, std::int64_t head_dim, Data data, std::int64_t max_kv_len);

double round_to(DType dtype, double value);
Values round_to(DType dtype, Values values);
const char* name_of(DType dtype);

// [batch, len, heads, head_dim] of any dtype, or pages [num_pages, page_size, heads, head_dim]. All
// bytes start as 0xff, a NaN in every dtype, and elements do not touch: gaps between heads, tokens
// and entries stay poisoned.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::int64_t batch, std::int64_t len, std::int64_t heads,
         std::int64_t head_dim);
  Tensor(const AttentionProblem& problem, bool of_keys);  // q-like or k-like, nothing set

  void set(const Values& values);
  void set(Values values, const std::vector<float>& scale);  // values / the head's scale
  void poison(std::int64_t b, std::int64_t i);               // token i of entry b becomes NaN again
  void replace_poison(double value);  // in gaps too, which are not intact any more
  Values values() const;
  bool gaps_intact() const;

  View view();
  ConstView const_view() const;
  std::size_t offset(std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) const;
  std::vector<unsigned char>& bytes() { return bytes_; }

  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, len = 0, heads = 0, head_dim = 0;

 private:
  template <class F>
  void for_each(const F& f) const;

  std::int64_t head_stride() const { return (head_dim / 16 + 1) * 16; }
  std::int64_t len_stride() const { return heads * head_stride() + 16; }
  std::int64_t batch_stride() const { return len * len_stride() + 32; }

  std::vector<unsigned char> bytes_;
};

// A cache cut into pages, scattered over more pages than needed; the rest is poison.
struct PagedCache {
  PagedCache(const AttentionProblem& problem, int page_size, unsigned seed);
  PageTable table() const;
  // Copies the tokens of `contiguous` that are not poisoned into its pages.
  Tensor scatter(const Tensor& contiguous) const;

  std::int64_t max_pages, num_pages;
  int page_size;
  std::vector<std::int32_t> entries;
};

// One loop, or that many threads taking tasks in turn.
ParallelFor parallel_for(int num_threads);

}  // namespace parallax::tests
