// SPDX-License-Identifier: MIT
// The dispatcher takes an operator's arguments flat; this room passes them as AttentionOptions and
// DecodeOptions. The adaptors here spell the flat lists, in the order of the schemas in
// register.cc: unpacked<kernel> turns kernel(options, args...) into what the dispatcher calls, and
// AttentionOperator calls the dispatcher with options.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>

#include "ops/parallax_ops.h"

namespace parallax::ops {

using OptionalTensor = std::optional<at::Tensor>;

template <auto kernel>
struct Unpacked;

template <class Result, class... Args, Result (*kernel)(const AttentionOptions&, Args...)>
struct Unpacked<kernel> {
  static Result call(Args... args, std::optional<double> scale, bool causal,
                     std::optional<std::int64_t> window, const OptionalTensor& cu_seqlens_q,
                     const OptionalTensor& cu_seqlens_k, const OptionalTensor& kv_lens,
                     const OptionalTensor& kv_start, const OptionalTensor& page_table,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
    AttentionOptions options;
    options.scale = scale;
    options.causal = causal;
    options.window = window;
    options.cu_seqlens_q = cu_seqlens_q;
    options.cu_seqlens_k = cu_seqlens_k;
    options.kv_lens = kv_lens;
    options.kv_start = kv_start;
    options.page_table = page_table;
    options.k_scale = k_scale;
    options.v_scale = v_scale;
    return kernel(options, args...);
  }
};

template <auto kernel>
constexpr auto* unpacked = &Unpacked<kernel>::call;

template <class Signature>
class AttentionOperator;

template <class Result, class... Args>
class AttentionOperator<Result(Args...)> {
 public:
  AttentionOperator(const char* name, const char* overload)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Flat>()) {}

  Result operator()(const AttentionOptions& options, Args... args) const {
    return handle_.call(args..., options.scale, options.causal, options.window,
                        options.cu_seqlens_q, options.cu_seqlens_k, options.kv_lens,
                        options.kv_start, options.page_table, options.k_scale, options.v_scale);
  }

 private:
  using Flat = Result(Args..., std::optional<double>, bool, std::optional<std::int64_t>,
                      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&);
  c10::TypedOperatorHandle<Flat> handle_;
};

// The same for the forms of decode, which the dispatcher hands their tensors and options one by one
// and, at the end, what they write into.
struct DecodeInputs {
  const at::Tensor& q;
  const at::Tensor& r;
  const at::Tensor& k_cache;
  const at::Tensor& v_cache;
  const at::Tensor& kv_lens;
  DecodeOptions options;
};

template <class Result, class... Out>
using DecodeSignature = Result(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                               const at::Tensor& v_cache, const at::Tensor& kv_lens,
                               const OptionalTensor& kv_start, const OptionalTensor& page_table,
                               std::optional<double> scale, std::optional<std::int64_t> window,
                               const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                               const OptionalTensor& schedule, Out... out);

template <auto kernel>
struct UnpackedDecode;

template <class Result, class... Out, Result (*kernel)(const DecodeInputs&, Out...)>
struct UnpackedDecode<kernel> {
  static Result call(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k_cache,
                     const at::Tensor& v_cache, const at::Tensor& kv_lens,
                     const OptionalTensor& kv_start, const OptionalTensor& page_table,
                     std::optional<double> scale, std::optional<std::int64_t> window,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                     const OptionalTensor& schedule, Out... out) {
    const DecodeOptions options{scale, window, kv_start, page_table, k_scale, v_scale, schedule};
    return kernel({q, r, k_cache, v_cache, kv_lens, options}, out...);
  }
};

template <auto kernel>
constexpr auto* unpacked_decode = &UnpackedDecode<kernel>::call;

}  // namespace parallax::ops
