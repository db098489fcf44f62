// SPDX-License-Identifier: MIT
#include "ops/parallax_ops.h"

#include "ops/options.h"

namespace parallax::ops {
namespace {

using at::Tensor;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using StateTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

template <class Result>
Result call_decode(const char* overload, const Tensor& q, const Tensor& r, const Tensor& k_cache,
                   const Tensor& v_cache, const Tensor& kv_lens, const DecodeOptions& options) {
  static const auto op = find<DecodeSignature<Result>>("parallax::decode", overload);
  return op.call(q, r, k_cache, v_cache, kv_lens, options.kv_start, options.page_table,
                 options.scale, options.window, options.k_scale, options.v_scale, options.schedule);
}

DecodeState as_state(const StateTensors& tensors) {
  const auto& [m, d1, d2, o1, o2] = tensors;
  return {m, d1, d2, o1, o2};
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                 const AttentionOptions& options) {
  static const AttentionOperator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>
      op("parallax::attention", "");
  return op(options, q, r, k, v);
}

ThreeTensors attention_with_stats(const Tensor& q, const Tensor& r, const Tensor& k,
                                  const Tensor& v, const AttentionOptions& options) {
  static const AttentionOperator<ThreeTensors(const Tensor&, const Tensor&, const Tensor&,
                                              const Tensor&)>
      op("parallax::attention", "stats");
  return op(options, q, r, k, v);
}

Tensor decode(const Tensor& q, const Tensor& r, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& kv_lens, const DecodeOptions& options) {
  return call_decode<Tensor>("", q, r, k_cache, v_cache, kv_lens, options);
}

ThreeTensors decode_with_stats(const Tensor& q, const Tensor& r, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& kv_lens,
                               const DecodeOptions& options) {
  return call_decode<ThreeTensors>("stats", q, r, k_cache, v_cache, kv_lens, options);
}

DecodeState decode_state(const Tensor& q, const Tensor& r, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& kv_lens,
                         const DecodeOptions& options) {
  return as_state(call_decode<StateTensors>("state", q, r, k_cache, v_cache, kv_lens, options));
}

Tensor decode_schedule(const Tensor& q, const Tensor& k_cache, const Tensor& kv_lens,
                       const DecodeOptions& options) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                  const OptionalTensor&, std::optional<std::int64_t>)>("parallax::decode_schedule",
                                                                       "");
  return op.call(q, k_cache, kv_lens, options.kv_start, options.page_table, options.window);
}

DecodeState merge(const std::vector<DecodeState>& states) {
  static const auto op = find<StateTensors(at::TensorList, at::TensorList, at::TensorList,
                                           at::TensorList, at::TensorList)>("parallax::merge", "");
  std::vector<Tensor> m, d1, d2, o1, o2;
  for (const DecodeState& state : states) {
    m.push_back(state.m);
    d1.push_back(state.d1);
    d2.push_back(state.d2);
    o1.push_back(state.o1);
    o2.push_back(state.o2);
  }
  return as_state(op.call(m, d1, d2, o1, o2));
}

ThreeTensors finalize(const DecodeState& state, at::ScalarType dtype) {
  static const auto op =
      find<ThreeTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        std::optional<at::ScalarType>)>("parallax::finalize", "");
  return op.call(state.m, state.d1, state.d2, state.o1, state.o2, dtype);
}

void append_kv(const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
               const Tensor& positions, const OptionalTensor& page_table,
               const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  static const auto op =
      find<void(const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&)>(
          "parallax::append_kv", "");
  op.call(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale);
}

std::tuple<Tensor, Tensor> append_kv_rotary(const Tensor& q, const Tensor& r, const Tensor& k,
                                            const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                                            const Tensor& positions, const Tensor& cos,
                                            const Tensor& sin, const RotaryOptions& options) {
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, bool, double, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&);
  static const auto op = find<Signature>("parallax::append_kv", "rotary");
  return op.call(q, r, k, v, k_cache, v_cache, positions, cos, sin, options.q_gain, options.r_gain,
                 options.k_gain, options.rotate_r, options.eps, options.angles, options.page_table,
                 options.k_scale, options.v_scale);
}

}  // namespace parallax::ops
