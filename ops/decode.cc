// SPDX-License-Identifier: MIT
// decode, append_kv, merge and finalize: inference over caches. As in attention.cc, one function
// serves the CPU, CUDA and Meta keys.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/options.h"
#include "ops/views.h"

namespace parallax::ops {
namespace {

using at::Tensor;
using StateTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The inputs of a decode, checked, and what its three forms do with them.
class DecodeCall {
 public:
  DecodeCall(const Tensor& q, const Tensor& r, const Tensor& k_cache, const Tensor& v_cache,
             const Tensor& kv_lens, const DecodeOptions& options)
      : q_(q),
        r_(r),
        k_cache_(k_cache),
        v_cache_(v_cache),
        kv_lens_(kv_lens),
        options_(options),
        shape_(check_decode(kName, q, r, k_cache, v_cache, kv_lens, options)) {}

  static constexpr const char* kName = "decode";

  Tensor empty_rows(const at::TensorOptions& options) const {
    return at::empty_symint(shape_.stats(), options);
  }

  Tensor empty_vectors(at::ScalarType dtype) const {
    return at::empty_symint(q_.sym_sizes(), q_.options().dtype(dtype));
  }

  void run_into(const Tensor& o, const Tensor& lse, const Tensor& t_bar) const {
    if (q_.is_meta()) return;
    DecodeArgs args = inputs();
    args.o = view(o);
    args.lse = lse.mutable_data_ptr();
    args.t_bar = t_bar.mutable_data_ptr();
    run(args);
  }

  void run_into(const StateView& state) const {
    DecodeArgs args = inputs();
    args.state = state;
    run(args);
  }

 private:
  DecodeArgs inputs() const {
    DecodeArgs args;
    args.q = const_view(q_);
    args.r = const_view(r_);
    args.k_cache = const_view(k_cache_);
    args.v_cache = const_view(v_cache_);
    args.sequences.kv_lens = index_data(kv_lens_);
    args.sequences.kv_start = index_data(options_.kv_start);
    args.pages = page_table_view(options_.page_table, k_cache_);
    return args;
  }

  void run(const DecodeArgs& args) const {
    DecodePlan decode_plan;
    check_status(kName, plan(problem_of(q_, shape_, options_.scale, true, options_.window),
                             device_of(kName, q_), &decode_plan));
    run_decode(kName, decode_plan, args);
  }

  const Tensor& q_;
  const Tensor& r_;
  const Tensor& k_cache_;
  const Tensor& v_cache_;
  const Tensor& kv_lens_;
  const DecodeOptions& options_;
  CallShape shape_;
};

DecodeOptions decode_options(const OptionalTensor& kv_start, const OptionalTensor& page_table,
                             std::optional<double> scale, std::optional<std::int64_t> window) {
  DecodeOptions options;
  options.scale = scale;
  options.window = window;
  options.kv_start = kv_start;
  options.page_table = page_table;
  return options;
}

// StateView serves states that are read and states that are written.
StateView state_view(const DecodeState& state) {
  StateView result;
  result.m = const_cast<float*>(state.m.const_data_ptr<float>());
  result.d1 = const_cast<float*>(state.d1.const_data_ptr<float>());
  result.d2 = const_cast<float*>(state.d2.const_data_ptr<float>());
  result.o1 = const_cast<float*>(state.o1.const_data_ptr<float>());
  result.o2 = const_cast<float*>(state.o2.const_data_ptr<float>());
  return result;
}

StateTensors as_tuple(const DecodeState& state) {
  return {state.m, state.d1, state.d2, state.o1, state.o2};
}

std::tuple<Tensor, Tensor, Tensor> decode_stats(
    const Tensor& q, const Tensor& r, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& kv_lens, const OptionalTensor& kv_start, const OptionalTensor& page_table,
    std::optional<double> scale, std::optional<std::int64_t> window) {
  const DecodeOptions options = decode_options(kv_start, page_table, scale, window);
  const DecodeCall call(q, r, k_cache, v_cache, kv_lens, options);
  const Tensor o = call.empty_vectors(q.scalar_type());
  const Tensor lse = call.empty_rows(stats_options(q));
  const Tensor t_bar = call.empty_rows(stats_options(q));
  call.run_into(o, lse, t_bar);
  return {o, lse, t_bar};
}

std::tuple<Tensor, Tensor> decode_out(const Tensor& q, const Tensor& r, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& kv_lens,
                                      const OptionalTensor& kv_start,
                                      const OptionalTensor& page_table, std::optional<double> scale,
                                      std::optional<std::int64_t> window, Tensor& out) {
  const DecodeOptions options = decode_options(kv_start, page_table, scale, window);
  const DecodeCall call(q, r, k_cache, v_cache, kv_lens, options);
  check_out(DecodeCall::kName, out, q, r, k_cache, v_cache);
  const Tensor lse = call.empty_rows(stats_options(q));
  const Tensor t_bar = call.empty_rows(stats_options(q));
  call.run_into(out, lse, t_bar);
  return {lse, t_bar};
}

StateTensors decode_state(const Tensor& q, const Tensor& r, const Tensor& k_cache,
                          const Tensor& v_cache, const Tensor& kv_lens,
                          const OptionalTensor& kv_start, const OptionalTensor& page_table,
                          std::optional<double> scale, std::optional<std::int64_t> window) {
  const DecodeOptions options = decode_options(kv_start, page_table, scale, window);
  const DecodeCall call(q, r, k_cache, v_cache, kv_lens, options);
  const at::TensorOptions rows = q.options().dtype(at::kFloat);
  const DecodeState state{call.empty_rows(rows), call.empty_rows(rows), call.empty_rows(rows),
                          call.empty_vectors(at::kFloat), call.empty_vectors(at::kFloat)};
  if (!q.is_meta()) call.run_into(state_view(state));
  return as_tuple(state);
}

void append_kv(const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
               const Tensor& positions, const OptionalTensor& page_table) {
  const char* op = "append_kv";
  const CallShape shape = check_append_kv(op, k, v, k_cache, v_cache, positions, page_table);
  if (k.is_meta()) return;
  require_cpu(op, k);
  AppendArgs args;
  args.k = const_view(k);
  args.v = const_view(v);
  args.positions = positions.const_data_ptr<std::int32_t>();
  args.pages = page_table_view(page_table, k_cache);
  args.k_cache = view(k_cache);
  args.v_cache = view(v_cache);
  check_status(op,
               parallax::append_kv(problem_of(k, shape, {}, true, {}), args, cpu_parallel_for()));
}

AttentionProblem state_problem(const DecodeState& state, const CallShape& shape) {
  return problem_of(state.o1, shape, {}, true, {});
}

StateTensors merge(at::TensorList m, at::TensorList d1, at::TensorList d2, at::TensorList o1,
                   at::TensorList o2) {
  const char* op = "merge";
  for (const auto& [name, list] : {std::pair{"d1", d1}, {"d2", d2}, {"o1", o1}, {"o2", o2}}) {
    TORCH_CHECK_VALUE(list.size() == m.size(), "parallax::merge: ", name, ": expected ", m.size(),
                      " tensors like m, got ", list.size());
  }
  std::vector<StateView> views;
  CallShape shape;
  const DecodeState first{m[0], d1[0], d2[0], o1[0], o2[0]};
  for (std::size_t i = 0; i < m.size(); ++i) {
    const DecodeState state{m[i], d1[i], d2[i], o1[i], o2[i]};
    shape = check_state(op, state, first);
    if (!first.m.is_meta()) views.push_back(state_view(state));
  }
  const DecodeState merged{at::empty_symint(m[0].sym_sizes(), m[0].options()),
                           at::empty_symint(m[0].sym_sizes(), m[0].options()),
                           at::empty_symint(m[0].sym_sizes(), m[0].options()),
                           at::empty_symint(o1[0].sym_sizes(), o1[0].options()),
                           at::empty_symint(o1[0].sym_sizes(), o1[0].options())};
  if (first.m.is_meta()) return as_tuple(merged);
  require_cpu(op, first.m);
  check_status(
      op, merge_states(state_problem(first, shape), views.data(), static_cast<int>(views.size()),
                       state_view(merged), cpu_parallel_for()));
  return as_tuple(merged);
}

std::tuple<Tensor, Tensor, Tensor> finalize(const Tensor& m, const Tensor& d1, const Tensor& d2,
                                            const Tensor& o1, const Tensor& o2,
                                            std::optional<at::ScalarType> dtype) {
  const char* op = "finalize";
  const DecodeState state{m, d1, d2, o1, o2};
  const CallShape shape = check_state(op, state, state);
  const Tensor o = at::empty_symint(o1.sym_sizes(), o1.options().dtype(dtype.value_or(at::kFloat)));
  check_output_dtype(op, o);
  const Tensor lse = at::empty_symint(m.sym_sizes(), m.options());
  const Tensor t_bar = at::empty_symint(m.sym_sizes(), m.options());
  if (m.is_meta()) return {o, lse, t_bar};
  require_cpu(op, m);
  AttentionProblem problem = state_problem(state, shape);
  problem.dtype = kernel_dtype(o);
  check_status(op,
               finalize_state(problem, state_view(state), view(o), lse.mutable_data_ptr<float>(),
                              t_bar.mutable_data_ptr<float>(), cpu_parallel_for()));
  return {o, lse, t_bar};
}

void refuse_no_states(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  const c10::IValue& m =
      *(stack->end() - static_cast<std::ptrdiff_t>(op.schema().arguments().size()));
  TORCH_CHECK_VALUE(!m.toListRef().empty(),
                    "parallax::merge: states: expected at least one, got none");
  op.redispatchBoxed(
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect),
      stack);
}

void register_kernels(torch::Library& m) {
  m.impl("decode.stats", &decode_stats);
  m.impl("decode.out", &decode_out);
  m.impl("decode.state", &decode_state);
  m.impl("append_kv", &append_kv);
  m.impl("merge", &merge);
  m.impl("finalize", &finalize);
}

}  // namespace

TORCH_LIBRARY_IMPL(parallax, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, Meta, m) { register_kernels(m); }
// Runs before a device is chosen, which an empty list would leave open.
TORCH_LIBRARY_IMPL(parallax, BackendSelect, m) {
  m.impl("merge", torch::CppFunction::makeFromBoxedFunction<&refuse_no_states>());
}

}  // namespace parallax::ops
