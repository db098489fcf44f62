// SPDX-License-Identifier: MIT
// The schemas of torch.ops.parallax, and the composite operators that fill in what callers rarely
// ask for. attention_forward and attention_backward are internal: what autograd saves and
// recomputes, opaque to torch.compile.
#include <torch/library.h>

#include <tuple>

#include "ops/options.h"

namespace parallax::ops {
namespace {

using at::Tensor;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardSignature = ForwardResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       bool);

// v_bar is autograd's to ask for.
ForwardResult call_forward(const AttentionOptions& options, const Tensor& q, const Tensor& r,
                           const Tensor& k, const Tensor& v) {
  static const AttentionOperator<ForwardSignature> forward("parallax::attention_forward", "");
  return forward(options, q, r, k, v, /*save_v_bar=*/false);
}

Tensor attention_default(const AttentionOptions& options, const Tensor& q, const Tensor& r,
                         const Tensor& k, const Tensor& v) {
  return std::get<0>(call_forward(options, q, r, k, v));
}

std::tuple<Tensor, Tensor, Tensor> attention_stats(const AttentionOptions& options, const Tensor& q,
                                                   const Tensor& r, const Tensor& k,
                                                   const Tensor& v) {
  auto [o, lse, t_bar, v_bar] = call_forward(options, q, r, k, v);
  return {o, lse, t_bar};
}

Tensor decode_default(const DecodeInputs& in) {
  return std::get<0>(decode_with_stats(in.q, in.r, in.k_cache, in.v_cache, in.kv_lens, in.options));
}

#define PARALLAX_ATTENTION_OPTIONS                                               \
  "float? scale=None, bool causal=True, int? window=None, "                      \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? kv_lens=None, " \
  "Tensor? kv_start=None, Tensor? page_table=None, Tensor? k_scale=None, Tensor? v_scale=None"
#define PARALLAX_DECODE_INPUTS                                                            \
  "Tensor q, Tensor r, Tensor k_cache, Tensor v_cache, *, Tensor kv_lens, "               \
  "Tensor? kv_start=None, Tensor? page_table=None, float? scale=None, int? window=None, " \
  "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? schedule=None"
#define PARALLAX_STATE "(Tensor m, Tensor d1, Tensor d2, Tensor o1, Tensor o2)"

}  // namespace

TORCH_LIBRARY(parallax, m) {
  // Compilers must hand over the strides that eager code has: the last axis is never copied.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def("attention(Tensor q, Tensor r, Tensor k, Tensor v, *, " PARALLAX_ATTENTION_OPTIONS
        ") -> Tensor",
        tags);
  m.def("attention.stats(Tensor q, Tensor r, Tensor k, Tensor v, *, " PARALLAX_ATTENTION_OPTIONS
        ") -> (Tensor o, Tensor lse, Tensor t_bar)",
        tags);
  m.def(
      "attention_forward(Tensor q, Tensor r, Tensor k, Tensor v, bool save_v_bar=False, "
      "*, " PARALLAX_ATTENTION_OPTIONS ") -> (Tensor o, Tensor lse, Tensor t_bar, Tensor v_bar)",
      tags);
  m.def(
      "attention_backward(Tensor d_o, Tensor q, Tensor r, Tensor k, Tensor v, Tensor o, "
      "Tensor lse, Tensor t_bar, Tensor v_bar, *, " PARALLAX_ATTENTION_OPTIONS
      ") -> (Tensor dq, Tensor dr, Tensor dk, Tensor dv)",
      tags);
  m.def("decode(" PARALLAX_DECODE_INPUTS ") -> Tensor", tags);
  m.def("decode.stats(" PARALLAX_DECODE_INPUTS ") -> (Tensor o, Tensor lse, Tensor t_bar)", tags);
  m.def("decode.out(" PARALLAX_DECODE_INPUTS ", Tensor(a!) out) -> (Tensor lse, Tensor t_bar)",
        tags);
  m.def("decode.state(" PARALLAX_DECODE_INPUTS ") -> " PARALLAX_STATE, tags);
  m.def(
      "decode_schedule(Tensor q, Tensor k_cache, *, Tensor kv_lens, Tensor? kv_start=None, "
      "Tensor? page_table=None, int? window=None) -> Tensor",
      tags);
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, *, "
      "Tensor positions, Tensor? page_table=None, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> ()",
      tags);
  m.def(
      "append_kv.rotary(Tensor q, Tensor r, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, *, Tensor positions, Tensor cos, Tensor sin, Tensor? q_gain=None, "
      "Tensor? r_gain=None, Tensor? k_gain=None, bool rotate_r=True, float eps=1e-6, "
      "Tensor? angles=None, Tensor? page_table=None, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> (Tensor q, Tensor r)",
      tags);
  m.def("merge(Tensor[] m, Tensor[] d1, Tensor[] d2, Tensor[] o1, Tensor[] o2) -> " PARALLAX_STATE,
        tags);
  m.def(
      "finalize(Tensor m, Tensor d1, Tensor d2, Tensor o1, Tensor o2, *, "
      "ScalarType? dtype=None) -> (Tensor o, Tensor lse, Tensor t_bar)",
      tags);
}

TORCH_LIBRARY_IMPL(parallax, CompositeImplicitAutograd, m) {
  m.impl("attention", unpacked<&attention_default>);
  m.impl("attention.stats", unpacked<&attention_stats>);
  m.impl("decode", unpacked_decode<&decode_default>);
}

}  // namespace parallax::ops
