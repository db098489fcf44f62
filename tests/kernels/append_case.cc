// SPDX-License-Identifier: MIT
#include "tests/kernels/append_case.h"

#include <cmath>
#include <random>

namespace parallax::tests {
namespace {

std::vector<float> random_floats(std::mt19937& generator, std::int64_t size, float low,
                                 float high) {
  std::uniform_real_distribution<float> distribution(low, high);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = distribution(generator);
  return values;
}

void fill_angles(AppendCase* c) {
  const std::int64_t half = c->problem.head_dim / 2;
  for (std::int64_t position = 0; position < c->num_angles; ++position) {
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) *
                           std::pow(1e4, -static_cast<double>(i) / static_cast<double>(half));
      c->cos.push_back(static_cast<float>(std::cos(angle)));
      c->sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

AppendCase make_case(const std::string& name, DType dtype, std::int64_t q_len,
                     std::int64_t num_q_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                     int page_size) {
  AppendCase c;
  c.name = name;
  c.problem = problem_of(dtype, 3, q_len, 70, num_q_heads, num_kv_heads, head_dim);
  c.page_size = page_size;
  c.positions = {0, static_cast<std::int32_t>(70 - q_len), 17};
  c.inputs = random_inputs(c.token_problem(), Data::kShifted, 17);
  c.num_angles = 90;
  fill_angles(&c);
  return c;
}

void add_scales(AppendCase* c) {
  std::mt19937 generator(5);
  c->problem.kv_dtype = DType::kFloat8E4M3;
  // Some of these saturate.
  c->k_scale = random_floats(generator, c->problem.num_kv_heads, 0.004f, 0.05f);
  c->v_scale = random_floats(generator, c->problem.num_kv_heads, 0.004f, 0.05f);
  c->name += ", FP8";
}

void add_prologue(AppendCase* c) {
  std::mt19937 generator(6);
  c->with_queries = true;
  for (Head* head : {&c->k_head, &c->q_head, &c->r_head}) {
    head->gain = random_floats(generator, c->problem.head_dim, 0.5f, 2.0f);
    head->rotate = true;
  }
  c->name += ", norm and RoPE";
}

}  // namespace

AttentionProblem AppendCase::token_problem() const {
  AttentionProblem tokens = problem;
  tokens.kv_len = problem.q_len;
  tokens.kv_dtype.reset();
  return tokens;
}

AppendTensors::AppendTensors(const AppendCase& c)
    : k(c.token_problem(), true),
      v(k),
      q(c.problem, false),
      r(q),
      k_cache(c.problem, true),
      v_cache(k_cache),
      q_out(q),
      r_out(q) {
  k.set(c.inputs.k);
  v.set(c.inputs.v);
  q.set(c.inputs.q);
  r.set(c.inputs.r);
  if (c.page_size == 0) return;
  paged.emplace(c.problem, c.page_size, 7);
  k_cache = Tensor(cache_dtype(c.problem), paged->num_pages, c.page_size, c.problem.num_kv_heads,
                   c.problem.head_dim);
  v_cache = k_cache;
}

std::pair<std::int64_t, std::int64_t> AppendTensors::cache_row(std::int64_t b,
                                                               std::int64_t place) const {
  if (!paged) return {b, place};
  const std::int64_t entry = b * paged->max_pages + place / paged->page_size;
  return {paged->entries[static_cast<std::size_t>(entry)], place % paged->page_size};
}

AppendArgs append_args(const AppendCase& c, AppendTensors* tensors) {
  const auto pointer = [](const auto& array) { return array.empty() ? nullptr : array.data(); };
  AppendArgs args;
  args.k = tensors->k.const_view();
  args.v = tensors->v.const_view();
  args.k_scale = pointer(c.k_scale);
  args.v_scale = pointer(c.v_scale);
  args.positions = c.positions.data();
  if (tensors->paged) args.pages = tensors->paged->table();
  args.k_cache = tensors->k_cache.view();
  args.v_cache = tensors->v_cache.view();
  AppendPrologue& prologue = args.prologue;
  const auto head = [&](const Head& from) { return HeadPrologue{pointer(from.gain), from.rotate}; };
  prologue.k = head(c.k_head);
  if (c.with_queries) {
    prologue.q = {tensors->q.const_view(), tensors->q_out.view(), head(c.q_head)};
    prologue.r = {tensors->r.const_view(), tensors->r_out.view(), head(c.r_head)};
  }
  prologue.cos = c.cos.data();
  prologue.sin = c.sin.data();
  prologue.num_angles = c.num_angles;
  prologue.angles = pointer(c.angles);
  return args;
}

std::vector<AppendCase> append_cases(DType dtype) {
  std::vector<AppendCase> cases;
  for (std::int64_t head_dim : {8, 24, 64, 120, 128, 256}) {
    const std::string name = "head_dim " + std::to_string(head_dim);
    cases.push_back(make_case(name, dtype, 2, 6, 2, head_dim, 16));
    cases.push_back(make_case(name, dtype, 2, 6, 2, head_dim, 16));
    add_prologue(&cases.back());
  }
  for (int page_size : {0, 1, 2, 64, 256}) {
    cases.push_back(
        make_case("pages of " + std::to_string(page_size), dtype, 19, 3, 3, 64, page_size));
  }
  cases.push_back(make_case("one token", dtype, 1, 40, 8, 128, 0));
  add_prologue(&cases.back());
  cases.push_back(make_case("norm alone", dtype, 3, 4, 4, 128, 0));
  add_prologue(&cases.back());
  cases.back().k_head.rotate = cases.back().q_head.rotate = cases.back().r_head.rotate = false;
  cases.push_back(make_case("RoPE alone, but not of r", dtype, 3, 4, 4, 128, 0));
  add_prologue(&cases.back());
  for (Head* head : {&cases.back().k_head, &cases.back().q_head, &cases.back().r_head}) {
    head->gain.clear();
  }
  cases.back().r_head.rotate = false;
  cases.push_back(make_case("left padding", dtype, 4, 4, 1, 32, 8));
  add_prologue(&cases.back());
  cases.back().angles = {0, 86, 3};
  // More than two for each SM of a GPU: there the kernel takes smaller blocks.
  cases.push_back(make_case("many tokens", dtype, 70, 6, 2, 32, 16));
  cases.back().problem.batch = 5;
  cases.back().positions.assign(5, 0);
  cases.back().inputs = random_inputs(cases.back().token_problem(), Data::kShifted, 18);
  add_prologue(&cases.back());
  if (dtype == DType::kFloat64) return cases;
  for (std::size_t i = 0, size = cases.size(); i < size; ++i) {
    cases.push_back(cases[i]);
    add_scales(&cases.back());
  }
  return cases;
}

}  // namespace parallax::tests
