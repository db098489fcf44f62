// SPDX-License-Identifier: MIT
#include "ops/checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <ostream>
#include <string>
#include <utility>

#include "ops/options.h"

namespace parallax::ops {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kMaxPageSize = 256;

// An argument, and how an error message begins.
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  return out << "parallax::" << argument.op << ": " << argument.name << ": ";
}

std::string dtype_name(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

// What a check expects of symbolic sizes becomes a guard of the traced graph.
bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

bool at_most(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_le(b).expect_true(__FILE__, __LINE__);
}

void check_rank(const Argument& a, std::int64_t rank, const char* layout) {
  TORCH_CHECK_VALUE(a.tensor.dim() == rank, a, "expected ", layout, ", got ", a.tensor.dim(),
                    " dimensions, ", a.tensor.sym_sizes());
}

void check_last_axis(const Argument& a) {
  TORCH_CHECK_VALUE(equal(a.tensor.sym_stride(-1), 1), a,
                    "expected a contiguous last axis (stride 1), got strides ",
                    a.tensor.sym_strides(), "; pass ", a.name, ".contiguous()");
}

void check_size(const Argument& a, std::int64_t axis, const c10::SymInt& expected,
                const char* meaning) {
  TORCH_CHECK_VALUE(equal(a.tensor.sym_size(axis), expected), a, "expected size ", expected,
                    " in axis ", axis, " (", meaning, "), got ", a.tensor.sym_sizes());
}

void check_sizes(const Argument& a, c10::SymIntArrayRef expected, const char* meaning) {
  bool same = a.tensor.dim() == static_cast<std::int64_t>(expected.size());
  for (std::size_t axis = 0; same && axis < expected.size(); ++axis) {
    same = equal(a.tensor.sym_size(static_cast<std::int64_t>(axis)), expected[axis]);
  }
  TORCH_CHECK_VALUE(same, a, "expected ", expected, " (", meaning, "), got ", a.tensor.sym_sizes());
}

void check_dtype(const Argument& a, at::ScalarType expected, const char* why) {
  TORCH_CHECK_TYPE(a.tensor.scalar_type() == expected, a, "expected ", dtype_name(expected), why,
                   ", got ", dtype_name(a.tensor.scalar_type()));
}

void check_device(const Argument& a, const Argument& first) {
  TORCH_CHECK_VALUE(a.tensor.device() == first.tensor.device(), a, "expected device ",
                    first.tensor.device(), " like ", first.name, ", got ", a.tensor.device());
}

// `a` goes with `first` in dtype and device and has the same number of axes.
void check_companion(const Argument& a, const Argument& first, std::int64_t rank,
                     const char* layout) {
  check_rank(a, rank, layout);
  TORCH_CHECK_TYPE(a.tensor.scalar_type() == first.tensor.scalar_type(), a, "expected ",
                   dtype_name(first.tensor.scalar_type()), " like ", first.name, ", got ",
                   dtype_name(a.tensor.scalar_type()));
  check_device(a, first);
  check_last_axis(a);
}

bool is_fp8(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat8_e4m3fn; }

// A cache goes with `first` in all but its dtype, which may be FP8 too.
void check_cache(const Argument& a, const Argument& first, const char* layout) {
  if (!is_fp8(a.tensor)) return check_companion(a, first, 4, layout);
  TORCH_CHECK_TYPE(first.tensor.scalar_type() != at::kDouble, a, "expected float64 like ",
                   first.name, ", got float8_e4m3fn");
  check_rank(a, 4, layout);
  check_device(a, first);
  check_last_axis(a);
}

// Lengths and tables: int32, contiguous, on the device of `first`.
void check_index(const Argument& a, const Argument& first, c10::SymIntArrayRef sizes,
                 const char* meaning) {
  check_dtype(a, at::kInt, "");
  check_device(a, first);
  check_sizes(a, sizes, meaning);
  TORCH_CHECK_VALUE(a.tensor.is_contiguous(), a, "expected a contiguous tensor, got strides ",
                    a.tensor.sym_strides(), "; pass ", a.name, ".contiguous()");
}

// Scales, gains and angles: float, contiguous, on the device of `first`.
void check_floats(const Argument& a, const Argument& first, c10::SymIntArrayRef sizes,
                  const char* meaning) {
  check_dtype(a, at::kFloat, "");
  check_device(a, first);
  check_sizes(a, sizes, meaning);
  TORCH_CHECK_VALUE(a.tensor.is_contiguous(), a, "expected a contiguous tensor, got strides ",
                    a.tensor.sym_strides(), "; pass ", a.name, ".contiguous()");
}

// Both with an FP8 cache, none without.
void check_scales(const Argument& k_cache, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale) {
  const bool needed = is_fp8(k_cache.tensor);
  for (const auto& [name, scale] : {std::pair{"k_scale", &k_scale}, {"v_scale", &v_scale}}) {
    TORCH_CHECK_VALUE(!needed || *scale, "parallax::", k_cache.op, ": ", name,
                      ": expected float32 [num_kv_heads] with a float8_e4m3fn cache, got None");
    TORCH_CHECK_VALUE(needed || !*scale, "parallax::", k_cache.op, ": ", name,
                      ": expected None with a cache of ", dtype_name(k_cache.tensor.scalar_type()),
                      " (only a float8_e4m3fn cache takes one), got a tensor");
    if (*scale) {
      check_floats({k_cache.op, name, **scale}, k_cache, k_cache.tensor.sym_size(-2),
                   "[num_kv_heads]");
    }
  }
}

void check_kernel_dtype(const Argument& a) {
  const at::ScalarType dtype = a.tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat || dtype == at::kDouble,
      a, "expected bfloat16, float16, float32 or float64, got ", dtype_name(dtype));
}

void check_head_dim(const Argument& a) {
  const c10::SymInt head_dim = a.tensor.sym_size(-1);
  TORCH_CHECK_VALUE(
      equal(head_dim % 8, 0) && at_most(1, head_dim) && at_most(head_dim, kMaxHeadDim), a,
      "expected head_dim (last axis) a multiple of 8, from 8 to ", kMaxHeadDim, ", got ", head_dim);
}

void check_groups(const Argument& q, const Argument& k) {
  const c10::SymInt num_q_heads = q.tensor.sym_size(-2);
  const c10::SymInt num_kv_heads = k.tensor.sym_size(-2);
  TORCH_CHECK_VALUE(at_most(1, num_kv_heads) && equal(num_q_heads % num_kv_heads, 0), q,
                    "expected a number of heads that is a multiple of the ", num_kv_heads,
                    " heads of ", k.name, ", got ", num_q_heads);
}

void check_window(const char* op, std::optional<std::int64_t> window, bool causal) {
  if (!window) return;
  TORCH_CHECK_VALUE(*window >= 1, "parallax::", op,
                    ": window: expected at least 1 (the query's own key), got ", *window);
  TORCH_CHECK_VALUE(causal, "parallax::", op,
                    ": window: expected causal=True with a window, got causal=False");
}

// What is written needs a place for every element. Of concrete tensors.
void check_no_internal_overlap(const Argument& a) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(a.tensor) != at::MemOverlap::Yes, a,
                    "expected memory of its own for every element, got strides ",
                    a.tensor.strides());
}

// Sizes of a paged cache: its capacity is what one row of the table spans.
c10::SymInt paged_capacity(const Argument& k, const Argument& page_table) {
  const c10::SymInt page_size = k.tensor.sym_size(1);
  const std::int64_t size = page_size.guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(size >= 1 && size <= kMaxPageSize && (size & (size - 1)) == 0, k,
                    "expected page_size (axis 1) a power of two from 1 to ", kMaxPageSize,
                    " with a page_table, got ", size);
  return page_table.tensor.sym_size(1) * page_size;
}

// Keys and values, or a cache of them. Returns batch and kv_len.
std::pair<c10::SymInt, c10::SymInt> check_keys(const Argument& k, const Argument& v,
                                               const OptionalTensor& page_table,
                                               const char* layout) {
  check_companion(v, k, 4, layout);
  check_sizes(v, k.tensor.sym_sizes(), "the shape of the keys");
  if (!page_table) return {k.tensor.sym_size(0), k.tensor.sym_size(1)};
  const Argument table{k.op, "page_table", *page_table};
  check_rank(table, 2, "[batch, max_pages]");
  check_index(table, k, table.tensor.sym_sizes(), "[batch, max_pages]");
  return {table.tensor.sym_size(0), paged_capacity(k, table)};
}

constexpr const char* kQueryLayout = "[batch, q_len, num_q_heads, head_dim]";
constexpr const char* kKeyLayout = "[batch, kv_len, num_kv_heads, head_dim]";
constexpr const char* kPageLayout = "[num_pages, page_size, num_kv_heads, head_dim]";

void check_queries(const Argument& q, const Argument& r, std::int64_t rank, const char* layout) {
  check_rank(q, rank, layout);
  check_kernel_dtype(q);
  check_head_dim(q);
  check_last_axis(q);
  check_companion(r, q, rank, layout);
  check_sizes(r, q.tensor.sym_sizes(), "the shape of q");
}

// Batched queries over batched keys, a cache or pages.
CallShape check_batched(const Argument& q, const Argument& r, const Argument& k, const Argument& v,
                        const OptionalTensor& page_table) {
  check_queries(q, r, 4, kQueryLayout);
  const char* layout = page_table ? kPageLayout : kKeyLayout;
  check_cache(k, q, layout);
  auto [batch, kv_len] = check_keys(k, v, page_table, layout);
  const Argument rows = page_table ? Argument{q.op, "page_table", *page_table} : k;
  check_size(rows, 0, q.tensor.sym_size(0), "the batch of q");
  check_size(k, -1, q.tensor.sym_size(-1), "the head_dim of q");
  check_groups(q, k);
  return {q.tensor.sym_size(0),  q.tensor.sym_size(1),  kv_len, q.tensor.sym_size(-2),
          k.tensor.sym_size(-2), q.tensor.sym_size(-1), false};
}

CallShape check_packed(const Argument& q, const Argument& r, const Argument& k, const Argument& v,
                       const Argument& cu_seqlens_q, const Argument& cu_seqlens_k) {
  check_queries(q, r, 3, "packed [tokens, num_q_heads, head_dim] with cu_seqlens");
  const char* layout = "packed [tokens, num_kv_heads, head_dim] with cu_seqlens";
  check_companion(k, q, 3, layout);
  check_companion(v, k, 3, layout);
  check_sizes(v, k.tensor.sym_sizes(), "the shape of the keys");
  check_size(k, -1, q.tensor.sym_size(-1), "the head_dim of q");
  check_groups(q, k);
  check_rank(cu_seqlens_q, 1, "[batch + 1]");
  TORCH_CHECK_VALUE(at_most(1, cu_seqlens_q.tensor.sym_size(0)), cu_seqlens_q,
                    "expected [batch + 1] offsets, got none");
  check_index(cu_seqlens_q, q, cu_seqlens_q.tensor.sym_sizes(), "[batch + 1]");
  check_index(cu_seqlens_k, q, cu_seqlens_q.tensor.sym_sizes(), "[batch + 1] like cu_seqlens_q");
  return {cu_seqlens_q.tensor.sym_size(0) - 1,
          q.tensor.sym_size(0),
          k.tensor.sym_size(0),
          q.tensor.sym_size(-2),
          k.tensor.sym_size(-2),
          q.tensor.sym_size(-1),
          true};
}

void check_packed_alone(const char* op, const AttentionOptions& options) {
  TORCH_CHECK_VALUE(options.cu_seqlens_q && options.cu_seqlens_k, "parallax::", op, ": ",
                    options.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
                    ": expected together with ",
                    options.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k", ", got None");
  const std::array<std::pair<const char*, const OptionalTensor*>, 5> others{
      {{"kv_lens", &options.kv_lens},
       {"kv_start", &options.kv_start},
       {"page_table", &options.page_table},
       {"k_scale", &options.k_scale},
       {"v_scale", &options.v_scale}}};
  for (const auto& [name, tensor] : others) {
    TORCH_CHECK_VALUE(!*tensor, "parallax::", op, ": ", name,
                      ": expected None in the packed layout (cu_seqlens), got a tensor");
  }
}

void check_lengths(const Argument& q, const OptionalTensor& lengths, const char* name) {
  if (!lengths) return;
  const c10::SymInt batch = q.tensor.sym_size(0);
  check_index({q.op, name, *lengths}, q, batch, "[batch]");
}

}  // namespace

c10::SymDimVector CallShape::stats() const {
  if (packed) return {num_q_heads, q_len};
  return {batch, num_q_heads, q_len};
}

CallShape check_attention(const char* op, const at::Tensor& q, const at::Tensor& r,
                          const at::Tensor& k, const at::Tensor& v,
                          const AttentionOptions& options) {
  const Argument query{op, "q", q}, probe{op, "r", r}, key{op, "k", k}, value{op, "v", v};
  check_window(op, options.window, options.causal);
  if (options.cu_seqlens_q || options.cu_seqlens_k) {
    check_packed_alone(op, options);
    return check_packed(query, probe, key, value, {op, "cu_seqlens_q", *options.cu_seqlens_q},
                        {op, "cu_seqlens_k", *options.cu_seqlens_k});
  }
  CallShape shape = check_batched(query, probe, key, value, options.page_table);
  check_scales(key, options.k_scale, options.v_scale);
  check_lengths(query, options.kv_lens, "kv_lens");
  check_lengths(query, options.kv_start, "kv_start");
  return shape;
}

void check_saved(const char* op, const CallShape& shape, const at::Tensor& q, const at::Tensor& d_o,
                 const at::Tensor& o, const at::Tensor& v_bar, const at::Tensor& lse,
                 const at::Tensor& t_bar) {
  const Argument query{op, "q", q};
  for (const Argument& a :
       {Argument{op, "d_o", d_o}, Argument{op, "o", o}, Argument{op, "v_bar", v_bar}}) {
    check_companion(a, query, q.dim(), "the shape of q");
    check_sizes(a, q.sym_sizes(), "the shape of q");
  }
  const at::ScalarType stats_dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Argument& a : {Argument{op, "lse", lse}, Argument{op, "t_bar", t_bar}}) {
    check_dtype(a, stats_dtype, "");
    check_device(a, query);
    check_sizes(a, shape.stats(), "the row statistics");
    TORCH_CHECK_VALUE(a.tensor.is_contiguous(), a, "expected a contiguous tensor, got strides ",
                      a.tensor.sym_strides());
  }
}

CallShape check_decode(const char* op, const at::Tensor& q, const at::Tensor& r,
                       const at::Tensor& k_cache, const at::Tensor& v_cache,
                       const at::Tensor& kv_lens, const DecodeOptions& options) {
  const Argument query{op, "q", q};
  check_window(op, options.window, true);
  CallShape shape = check_batched(query, {op, "r", r}, {op, "k_cache", k_cache},
                                  {op, "v_cache", v_cache}, options.page_table);
  check_lengths(query, kv_lens, "kv_lens");
  check_lengths(query, options.kv_start, "kv_start");
  check_scales({op, "k_cache", k_cache}, options.k_scale, options.v_scale);
  if (options.schedule) {
    const Argument schedule{op, "schedule", *options.schedule};
    check_dtype(schedule, at::kByte, " (decode_schedule gives it)");
    check_device(schedule, query);
    check_sizes(schedule, schedule_size(shape.batch), "decode_schedule of this batch");
  }
  return shape;
}

CallShape check_decode_schedule(const char* op, const at::Tensor& q, const at::Tensor& k_cache,
                                const at::Tensor& kv_lens, const DecodeOptions& options) {
  const Argument query{op, "q", q}, keys{op, "k_cache", k_cache};
  check_window(op, options.window, true);
  CallShape shape = check_batched(query, query, keys, keys, options.page_table);
  check_lengths(query, kv_lens, "kv_lens");
  check_lengths(query, options.kv_start, "kv_start");
  return shape;
}

c10::SymInt schedule_size(const c10::SymInt& batch) { return batch * 8 + (1 << 16); }

void check_schedule_fits(const char* op, const at::Tensor& schedule, const DecodePlan& plan) {
  TORCH_CHECK_NOT_IMPLEMENTED(static_cast<std::size_t>(schedule.numel()) >= schedule_bytes(plan),
                              "parallax::", op, ": schedule: this GPU needs ", schedule_bytes(plan),
                              " bytes, more than the ", schedule.numel(),
                              " that fit all known ones; call decode without one");
}

void check_out(const char* op, const at::Tensor& out, const at::Tensor& q, const at::Tensor& r,
               const at::Tensor& k_cache, const at::Tensor& v_cache) {
  const Argument a{op, "out", out};
  check_companion(a, {op, "q", q}, 4, kQueryLayout);
  check_sizes(a, q.sym_sizes(), "the shape of q");
  if (out.is_meta()) return;
  check_no_internal_overlap(a);
  for (const Argument& input :
       {Argument{op, "q", q}, Argument{op, "r", r}, Argument{op, "k_cache", k_cache},
        Argument{op, "v_cache", v_cache}}) {
    const at::MemOverlapStatus overlap = at::get_overlap_status(out, input.tensor);
    TORCH_CHECK_VALUE(
        overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, a,
        "expected memory of its own, got memory shared with ", input.name);
  }
}

CallShape check_append_kv(const char* op, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& k_cache, const at::Tensor& v_cache,
                          const at::Tensor& positions, const OptionalTensor& page_table,
                          const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const Argument key{op, "k", k}, cache{op, "k_cache", k_cache};
  const char* new_layout = "[batch, len, num_kv_heads, head_dim]";
  check_rank(key, 4, new_layout);
  check_kernel_dtype(key);
  check_head_dim(key);
  check_last_axis(key);
  check_companion({op, "v", v}, key, 4, new_layout);
  check_sizes({op, "v", v}, k.sym_sizes(), "the shape of k");
  const char* layout = page_table ? kPageLayout : "[batch, capacity, num_kv_heads, head_dim]";
  check_cache(cache, key, layout);
  auto [batch, capacity] = check_keys(cache, {op, "v_cache", v_cache}, page_table, layout);
  check_size(key, 0, batch, page_table ? "the batch of page_table" : "the batch of k_cache");
  check_size(cache, -2, k.sym_size(-2), "the num_kv_heads of k");
  check_size(cache, -1, k.sym_size(-1), "the head_dim of k");
  check_lengths(key, positions, "positions");
  check_scales(cache, k_scale, v_scale);
  if (!k_cache.is_meta()) {
    check_no_internal_overlap(cache);
    check_no_internal_overlap({op, "v_cache", v_cache});
  }
  return {batch, k.sym_size(1), capacity, k.sym_size(-2), k.sym_size(-2), k.sym_size(-1), false};
}

void check_rotary(const char* op, const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                  const at::Tensor& cos, const at::Tensor& sin, const RotaryOptions& options,
                  CallShape* shape) {
  const Argument query{op, "q", q}, key{op, "k", k};
  check_queries(query, {op, "r", r}, 4, kQueryLayout);
  check_companion(query, key, 4, kQueryLayout);
  check_size(query, 0, k.sym_size(0), "the batch of k");
  check_size(query, 1, k.sym_size(1), "the length of k");
  check_size(query, -1, k.sym_size(-1), "the head_dim of k");
  check_groups(query, key);
  const c10::SymInt head_dim = k.sym_size(-1);
  const Argument angles{op, "cos", cos};
  check_rank(angles, 2, "[num_angles, head_dim / 2]");
  const c10::SymDimVector table{cos.sym_size(0), head_dim / 2};
  check_floats(angles, key, table, "[num_angles, head_dim / 2]");
  check_floats({op, "sin", sin}, key, table, "[num_angles, head_dim / 2] like cos");
  for (const auto& [name, gain] : {std::pair{"q_gain", &options.q_gain},
                                   {"r_gain", &options.r_gain},
                                   {"k_gain", &options.k_gain}}) {
    if (*gain) check_floats({op, name, **gain}, key, head_dim, "[head_dim]");
  }
  check_lengths(key, options.angles, "angles");
  shape->num_q_heads = q.sym_size(-2);
}

CallShape check_state(const char* op, const DecodeState& state, const DecodeState& like) {
  const Argument first{op, "m", like.m}, o1{op, "o1", like.o1};
  check_rank(first, 3, "[batch, num_q_heads, q_len]");
  check_rank(o1, 4, kQueryLayout);
  check_head_dim(o1);
  const CallShape shape{like.m.sym_size(0), like.m.sym_size(2),  0,    like.m.sym_size(1),
                        like.m.sym_size(1), like.o1.sym_size(3), false};
  const c10::SymDimVector rows = shape.stats();
  const c10::SymDimVector vectors{shape.batch, shape.q_len, shape.num_q_heads, shape.head_dim};
  const std::array<std::pair<Argument, const c10::SymDimVector*>, 5> members{
      {{{op, "m", state.m}, &rows},
       {{op, "d1", state.d1}, &rows},
       {{op, "d2", state.d2}, &rows},
       {{op, "o1", state.o1}, &vectors},
       {{op, "o2", state.o2}, &vectors}}};
  for (const auto& [a, sizes] : members) {
    check_dtype(a, at::kFloat, " (a state is float)");
    check_device(a, first);
    check_sizes(a, *sizes, "the rows of m and the head_dim of o1, of the first state");
    TORCH_CHECK_VALUE(a.tensor.is_contiguous(), a, "expected a contiguous tensor, got strides ",
                      a.tensor.sym_strides(), "; pass ", a.name, ".contiguous()");
  }
  return shape;
}

void check_output_dtype(const char* op, const at::Tensor& o) {
  check_kernel_dtype({op, "dtype", o});
}

void check_status(const char* op, const Status& status) {
  TORCH_CHECK_VALUE(status.code() != StatusCode::kInvalidArgument, "parallax::", op, ": ",
                    status.message());
  TORCH_CHECK_NOT_IMPLEMENTED(status.code() != StatusCode::kUnsupported, "parallax::", op, ": ",
                              status.message());
  TORCH_CHECK(status.ok(), "parallax::", op, ": ", status.message());
}

DType kernel_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      return DType::kFloat16;
  }
}

}  // namespace parallax::ops
