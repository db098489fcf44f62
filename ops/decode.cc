// SPDX-License-Identifier: MIT
// decode, append_kv, merge and finalize: inference over caches. As in attention.cc, one function
// serves the CPU, CUDA and Meta keys.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/options.h"
#include "ops/step.h"
#include "ops/views.h"

namespace parallax::ops {
namespace {

using at::Tensor;
using StateTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

DecodePlan plan_decode(const char* op, const Tensor& q, const Tensor& k_cache,
                       const CallShape& shape, const DecodeOptions& options) {
  AttentionProblem problem = problem_of(q, shape, options.scale, true, options.window);
  problem.kv_dtype = kernel_dtype(k_cache);
  DecodePlan result;
  check_status(op, plan(problem, device_of(op, q), &result));
  return result;
}

// The inputs of a decode, checked, and what its three forms do with them.
class DecodeCall {
 public:
  explicit DecodeCall(const DecodeInputs& in, bool settled = false)
      : in_(in),
        settled_(settled),
        shape_(check_decode(kName, in.q, in.r, in.k_cache, in.v_cache, in.kv_lens, in.options)) {}

  static constexpr const char* kName = "decode";

  Tensor empty_rows(const at::TensorOptions& options) const {
    return at::empty_symint(shape_.stats(), options);
  }

  Tensor empty_vectors(at::ScalarType dtype) const {
    return at::empty_symint(in_.q.sym_sizes(), in_.q.options().dtype(dtype));
  }

  void run_into(const Tensor& o, const Tensor& lse, const Tensor& t_bar) const {
    if (in_.q.is_meta()) return;
    DecodeArgs args = arguments();
    args.o = view(o);
    args.lse = lse.mutable_data_ptr();
    args.t_bar = t_bar.mutable_data_ptr();
    run(&args);
  }

  void run_into(const StateView& state) const {
    DecodeArgs args = arguments();
    args.state = state;
    run(&args);
  }

 private:
  DecodeArgs arguments() const {
    DecodeArgs args;
    args.q = const_view(in_.q);
    args.r = const_view(in_.r);
    args.k_cache = const_view(in_.k_cache);
    args.v_cache = const_view(in_.v_cache);
    args.k_scale = float_data(in_.options.k_scale);
    args.v_scale = float_data(in_.options.v_scale);
    args.sequences.kv_lens = index_data(in_.kv_lens);
    args.sequences.kv_start = index_data(in_.options.kv_start);
    args.pages = page_table_view(in_.options.page_table, in_.k_cache);
    return args;
  }

  void run(DecodeArgs* args) const {
    const DecodePlan plan = plan_decode(kName, in_.q, in_.k_cache, shape_, in_.options);
    if (in_.options.schedule && plan.device.kind == Device::Kind::kCuda) {
      check_schedule_fits(kName, *in_.options.schedule, plan);
      args->schedule = const_cast<void*>(in_.options.schedule->const_data_ptr());
    }
    run_decode(kName, plan, *args, settled_);
  }

  const DecodeInputs& in_;
  bool settled_;
  CallShape shape_;
};

// Zeros where there is no GPU to make one for.
Tensor decode_schedule(const Tensor& q, const Tensor& k_cache, const Tensor& kv_lens,
                       const OptionalTensor& kv_start, const OptionalTensor& page_table,
                       std::optional<std::int64_t> window) {
  const char* op = "decode_schedule";
  DecodeOptions options;
  options.window = window;
  options.kv_start = kv_start;
  options.page_table = page_table;
  const CallShape shape = check_decode_schedule(op, q, k_cache, kv_lens, options);
  const c10::SymInt size = schedule_size(shape.batch);
  const at::TensorOptions bytes = q.options().dtype(at::kByte);
  if (!q.is_cuda()) return at::zeros_symint(size, bytes);
  const Tensor schedule = at::empty_symint(size, bytes);
  const DecodePlan plan = plan_decode(op, q, k_cache, shape, options);
  check_schedule_fits(op, schedule, plan);
  Sequences sequences;
  sequences.kv_lens = index_data(kv_lens);
  sequences.kv_start = index_data(kv_start);
  run_schedule(op, plan, sequences, schedule.mutable_data_ptr());
  return schedule;
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

std::tuple<Tensor, Tensor, Tensor> decode_stats(const DecodeInputs& in) {
  const DecodeCall call(in);
  const Tensor o = call.empty_vectors(in.q.scalar_type());
  const Tensor lse = call.empty_rows(stats_options(in.q));
  const Tensor t_bar = call.empty_rows(stats_options(in.q));
  call.run_into(o, lse, t_bar);
  return {o, lse, t_bar};
}

std::tuple<Tensor, Tensor> decode_out(const DecodeInputs& in, Tensor& out) {
  const DecodeCall call(in);
  check_out(DecodeCall::kName, out, in.q, in.r, in.k_cache, in.v_cache);
  const Tensor lse = call.empty_rows(stats_options(in.q));
  const Tensor t_bar = call.empty_rows(stats_options(in.q));
  call.run_into(out, lse, t_bar);
  return {lse, t_bar};
}

StateTensors decode_state(const DecodeInputs& in) {
  const DecodeCall call(in);
  const at::TensorOptions rows = in.q.options().dtype(at::kFloat);
  const DecodeState state{call.empty_rows(rows), call.empty_rows(rows), call.empty_rows(rows),
                          call.empty_vectors(at::kFloat), call.empty_vectors(at::kFloat)};
  if (!in.q.is_meta()) call.run_into(state_view(state));
  return as_tuple(state);
}

// The caches' half of the arguments, and the problem.
AppendArgs append_arguments(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                            const Tensor& v_cache, const Tensor& positions,
                            const OptionalTensor& page_table, const OptionalTensor& k_scale,
                            const OptionalTensor& v_scale) {
  AppendArgs args;
  args.k = const_view(k);
  args.v = const_view(v);
  args.k_scale = float_data(k_scale);
  args.v_scale = float_data(v_scale);
  args.positions = positions.const_data_ptr<std::int32_t>();
  args.pages = page_table_view(page_table, k_cache);
  args.k_cache = view(k_cache);
  args.v_cache = view(v_cache);
  return args;
}

AttentionProblem append_problem(const Tensor& k, const Tensor& k_cache, const CallShape& shape) {
  AttentionProblem problem = problem_of(k, shape, {}, true, {});
  problem.kv_dtype = kernel_dtype(k_cache);
  return problem;
}

void append_kv(const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
               const Tensor& positions, const OptionalTensor& page_table,
               const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const char* op = "append_kv";
  const CallShape shape =
      check_append_kv(op, k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale);
  if (k.is_meta()) return;
  run_append_kv(op, k, append_problem(k, k_cache, shape),
                append_arguments(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale));
}

// run(like, problem, arguments) of an append_kv_rotary. -> q and r
template <class Run>
std::tuple<Tensor, Tensor> append_rotary(const char* op, const Tensor& q, const Tensor& r,
                                         const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& positions,
                                         const Tensor& cos, const Tensor& sin,
                                         const RotaryOptions& options, const Run& run) {
  CallShape shape = check_append_kv(op, k, v, k_cache, v_cache, positions, options.page_table,
                                    options.k_scale, options.v_scale);
  check_rotary(op, q, r, k, cos, sin, options, &shape);
  const Tensor q_out = at::empty_symint(q.sym_sizes(), q.options());
  const Tensor r_out = at::empty_symint(r.sym_sizes(), r.options());
  if (k.is_meta()) return {q_out, r_out};
  AppendArgs args = append_arguments(k, v, k_cache, v_cache, positions, options.page_table,
                                     options.k_scale, options.v_scale);
  args.prologue.k = {float_data(options.k_gain), true};
  args.prologue.q = {const_view(q), view(q_out), {float_data(options.q_gain), true}};
  args.prologue.r = {const_view(r), view(r_out), {float_data(options.r_gain), options.rotate_r}};
  args.prologue.eps = options.eps;
  args.prologue.cos = cos.const_data_ptr<float>();
  args.prologue.sin = sin.const_data_ptr<float>();
  args.prologue.num_angles = cos.size(0);
  args.prologue.angles = index_data(options.angles);
  run(op, k, append_problem(k, k_cache, shape), args);
  return {q_out, r_out};
}

std::tuple<Tensor, Tensor> append_kv_rotary(
    const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v, Tensor& k_cache,
    Tensor& v_cache, const Tensor& positions, const Tensor& cos, const Tensor& sin,
    const OptionalTensor& q_gain, const OptionalTensor& r_gain, const OptionalTensor& k_gain,
    bool rotate_r, double eps, const OptionalTensor& angles, const OptionalTensor& page_table,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const RotaryOptions options{q_gain, r_gain,     k_gain,  rotate_r, eps,
                              angles, page_table, k_scale, v_scale};
  return append_rotary("append_kv", q, r, k, v, k_cache, v_cache, positions, cos, sin, options,
                       run_append_kv);
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
  run_merge(op, first.m, state_problem(first, shape), views, state_view(merged));
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
  AttentionProblem problem = state_problem(state, shape);
  problem.dtype = kernel_dtype(o);
  run_finalize(op, m, problem, state_view(state), view(o), lse.mutable_data_ptr<float>(),
               t_bar.mutable_data_ptr<float>());
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
  m.impl("decode.stats", unpacked_decode<&decode_stats>);
  m.impl("decode.out", unpacked_decode<&decode_out>);
  m.impl("decode.state", unpacked_decode<&decode_state>);
  m.impl("decode_schedule", &decode_schedule);
  m.impl("append_kv", &append_kv);
  m.impl("append_kv.rotary", &append_kv_rotary);
  m.impl("merge", &merge);
  m.impl("finalize", &finalize);
}

}  // namespace

Tensor decode_settled(const Tensor& q, const Tensor& r, const Tensor& k_cache,
                      const Tensor& v_cache, const Tensor& kv_lens, const DecodeOptions& options) {
  const DecodeInputs in{q, r, k_cache, v_cache, kv_lens, options};
  const DecodeCall call(in, /*settled=*/true);
  const Tensor o = call.empty_vectors(q.scalar_type());
  call.run_into(o, call.empty_rows(stats_options(q)), call.empty_rows(stats_options(q)));
  return o;
}

std::tuple<Tensor, Tensor> append_kv_settled(const Tensor& q, const Tensor& r, const Tensor& k,
                                             const Tensor& v, const Tensor& k_cache,
                                             const Tensor& v_cache, const Tensor& positions,
                                             const Tensor& cos, const Tensor& sin,
                                             const RotaryOptions& options) {
  return append_rotary("append_kv", q, r, k, v, k_cache, v_cache, positions, cos, sin, options,
                       run_append_kv_settled);
}

TORCH_LIBRARY_IMPL(parallax, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(parallax, Meta, m) { register_kernels(m); }
// Runs before a device is chosen, which an empty list would leave open.
TORCH_LIBRARY_IMPL(parallax, BackendSelect, m) {
  m.impl("merge", torch::CppFunction::makeFromBoxedFunction<&refuse_no_states>());
}

}  // namespace parallax::ops
