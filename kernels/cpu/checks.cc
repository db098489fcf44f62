// SPDX-License-Identifier: MIT
#include "cpu/checks.h"

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "parallax/mask.h"

// Returns early with the first failure.
#define PARALLAX_RETURN_IF_ERROR(expression)                       \
  do {                                                             \
    if (Status status = (expression); !status.ok()) return status; \
  } while (false)

namespace parallax::cpu {
namespace {

std::string element(const char* array, std::int64_t index) {
  return std::string(array) + "[" + std::to_string(index) + "]";
}

Status expected(const std::string& name, const std::string& what, std::int64_t got) {
  return Status::invalid_argument(name + ": expected " + what + ", got " + std::to_string(got));
}

Status check_between(const std::string& name, std::int64_t value, std::int64_t low,
                     std::int64_t high) {
  if (low <= value && value <= high) return {};
  return expected(name, std::to_string(low) + " to " + std::to_string(high), value);
}

Status check_present(const char* name, const void* data, std::int64_t elements) {
  if (data != nullptr || elements == 0) return {};
  return Status::invalid_argument(std::string(name) + ": expected memory for " +
                                  std::to_string(elements) + " elements, got a null pointer");
}

// [batch + 1] offsets that ascend from 0 to the number of tokens.
Status check_offsets(const char* name, const std::int32_t* offsets, std::int64_t batch,
                     std::int64_t tokens) {
  if (offsets == nullptr) {
    return Status::invalid_argument(std::string(name) + ": a packed call needs it, got null");
  }
  if (offsets[0] != 0) return expected(element(name, 0), "0", offsets[0]);
  for (std::int64_t b = 0; b < batch; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      return expected(element(name, b + 1), "at least " + std::to_string(offsets[b]),
                      offsets[b + 1]);
    }
  }
  if (offsets[batch] != tokens) {
    return expected(element(name, batch), std::to_string(tokens) + ", the number of tokens",
                    offsets[batch]);
  }
  return {};
}

Status check_sequences(const AttentionProblem& problem, const Sequences& sequences) {
  if (problem.packed) {
    if (sequences.kv_lens || sequences.kv_start) {
      return Status::invalid_argument(
          "kv_lens and kv_start: a packed call takes its lengths from cu_seqlens_k alone");
    }
    PARALLAX_RETURN_IF_ERROR(
        check_offsets("cu_seqlens_q", sequences.cu_seqlens_q, problem.batch, problem.q_len));
    return check_offsets("cu_seqlens_k", sequences.cu_seqlens_k, problem.batch, problem.kv_len);
  }
  if (sequences.cu_seqlens_q || sequences.cu_seqlens_k) {
    return Status::invalid_argument(
        "cu_seqlens_q and cu_seqlens_k: only a packed call takes them (AttentionProblem::packed)");
  }
  return {};
}

// The pages that hold tokens [tokens.begin, tokens.end) of entry b.
Status check_pages(const PageTable& pages, std::int64_t b, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return {};
  for (std::int64_t i = begin / pages.page_size; i <= (end - 1) / pages.page_size; ++i) {
    const std::int32_t page = pages.table[b * pages.max_pages + i];
    if (page < 0 || page >= pages.num_pages) {
      return expected("page_table[" + std::to_string(b) + ", " + std::to_string(i) + "]",
                      "a page from 0 to " + std::to_string(pages.num_pages - 1), page);
    }
  }
  return {};
}

Status check_visible_pages(const AttentionProblem& problem, const Sequences& sequences,
                           const PageTable& pages) {
  if (pages.table == nullptr) return {};
  PARALLAX_RETURN_IF_ERROR(check_page_table(problem, pages));
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Mask mask = sequence_at(problem, sequences, b).mask;
    if (mask.q_len == 0) continue;
    const Range keys = mask.keys({0, mask.q_len});
    PARALLAX_RETURN_IF_ERROR(check_pages(pages, b, keys.begin, keys.end));
  }
  return {};
}

// Rows [first, first + q_len) of something that has `size` of them.
Status check_places(const char* name, std::int64_t b, std::int64_t first, std::int64_t q_len,
                    std::int64_t size, const char* what) {
  if (first >= 0 && first + q_len <= size) return {};
  return expected(element(name, b),
                  "0 to " + std::to_string(size - q_len) + " (" + what + " " +
                      std::to_string(size) + ", new tokens " + std::to_string(q_len) + ")",
                  first);
}

bool rotates(const AppendPrologue& prologue) {
  return prologue.k.rotate || prologue.q.head.rotate || prologue.r.head.rotate;
}

Status check_query_prologue(const char* name, std::int64_t elements, const QueryPrologue& query) {
  const bool asked = query.out.data || query.head.gain || query.head.rotate;
  const std::string field = std::string("prologue.") + name;
  if (query.in.data || asked) {
    PARALLAX_RETURN_IF_ERROR(check_present((field + ".in").c_str(), query.in.data, elements));
    PARALLAX_RETURN_IF_ERROR(check_present((field + ".out").c_str(), query.out.data, elements));
  }
  return {};
}

Status check_prologue(const AttentionProblem& problem, const AppendPrologue& prologue) {
  const std::int64_t elements =
      problem.batch * problem.q_len * problem.num_q_heads * problem.head_dim;
  PARALLAX_RETURN_IF_ERROR(check_query_prologue("q", elements, prologue.q));
  PARALLAX_RETURN_IF_ERROR(check_query_prologue("r", elements, prologue.r));
  if (!(prologue.eps >= 0 && std::isfinite(prologue.eps))) {
    return Status::invalid_argument("prologue.eps: expected a finite number of at least 0, got " +
                                    std::to_string(prologue.eps));
  }
  if (!rotates(prologue)) return {};
  const std::int64_t table = prologue.num_angles * problem.head_dim / 2;
  PARALLAX_RETURN_IF_ERROR(check_present("prologue.cos", prologue.cos, table));
  return check_present("prologue.sin", prologue.sin, table);
}

std::int64_t num_tokens(const AttentionProblem& problem, std::int64_t len) {
  return problem.packed ? len : problem.batch * len;
}

std::int64_t num_q_elements(const AttentionProblem& problem) {
  return num_tokens(problem, problem.q_len) * problem.num_q_heads * problem.head_dim;
}

std::int64_t num_kv_elements(const AttentionProblem& problem, const PageTable& pages = {}) {
  const std::int64_t tokens =
      pages.table ? pages.num_pages * pages.page_size : num_tokens(problem, problem.kv_len);
  return tokens * problem.num_kv_heads * problem.head_dim;
}

Status check_scales(const AttentionProblem& problem, const float* k_scale, const float* v_scale) {
  PARALLAX_RETURN_IF_ERROR(check_scales_present(problem, k_scale, v_scale));
  for (const auto& [name, scale] : {std::pair{"k_scale", k_scale}, {"v_scale", v_scale}}) {
    for (std::int64_t h = 0; scale != nullptr && h < problem.num_kv_heads; ++h) {
      if (std::isfinite(scale[h]) && scale[h] > 0) continue;
      return Status::invalid_argument(
          element(name, h) + ": expected a finite number above 0, got " + std::to_string(scale[h]));
    }
  }
  return {};
}

Status check_cache_dtype(const AttentionProblem& problem) {
  const DType cache = cache_dtype(problem);
  if (cache != problem.dtype && (cache != DType::kFloat8E4M3 || problem.dtype == DType::kFloat64)) {
    return expected("kv_dtype", "dtype, or kFloat8E4M3 with any dtype but float64",
                    static_cast<int>(cache));
  }
  return {};
}

Status check_shape(const AttentionProblem& problem, const Device& device) {
  constexpr std::int64_t kMaxLen = std::numeric_limits<std::int32_t>::max();
  if (problem.dtype > DType::kFloat16) {
    return expected("dtype", "float64, float32, bfloat16 or float16 (DType 0 to 3)",
                    static_cast<int>(problem.dtype));
  }
  PARALLAX_RETURN_IF_ERROR(check_between("batch", problem.batch, 0, kMaxLen));
  PARALLAX_RETURN_IF_ERROR(check_between("q_len", problem.q_len, 0, kMaxLen));
  PARALLAX_RETURN_IF_ERROR(check_between("kv_len", problem.kv_len, 0, kMaxLen));
  PARALLAX_RETURN_IF_ERROR(check_between("num_kv_heads", problem.num_kv_heads, 1, kMaxLen));
  PARALLAX_RETURN_IF_ERROR(check_between("num_q_heads", problem.num_q_heads, 1, kMaxLen));
  if (problem.num_q_heads % problem.num_kv_heads != 0) {
    return expected("num_q_heads",
                    "a multiple of num_kv_heads = " + std::to_string(problem.num_kv_heads),
                    problem.num_q_heads);
  }
  if (problem.head_dim < 8 || problem.head_dim > 256 || problem.head_dim % 8 != 0) {
    return expected("head_dim", "a multiple of 8 from 8 to 256", problem.head_dim);
  }
  if (!std::isfinite(problem.scale)) {
    return Status::invalid_argument("scale: expected a finite number, got " +
                                    std::to_string(problem.scale));
  }
  if (problem.window < 0) {
    return expected("window", "at least 1, or 0 for no window", problem.window);
  }
  if (problem.window > 0 && !problem.causal) {
    return Status::invalid_argument("window: only a causal call takes one, got window = " +
                                    std::to_string(problem.window) + " with causal = false");
  }
  if (device.kind == Device::Kind::kCpu && device.num_threads < 1) {
    return expected("num_threads", "at least 1", device.num_threads);
  }
  return {};
}

}  // namespace

Status check_page_table(const AttentionProblem& problem, const PageTable& pages) {
  if (problem.packed) {
    return Status::invalid_argument("page_table: a packed call has no paged cache");
  }
  if (!std::has_single_bit(static_cast<unsigned>(pages.page_size)) || pages.page_size > 256) {
    return expected("page_size", "a power of two from 1 to 256", pages.page_size);
  }
  PARALLAX_RETURN_IF_ERROR(
      check_between("num_pages", pages.num_pages, 0, std::numeric_limits<std::int32_t>::max()));
  if (pages.max_pages < 0 || problem.kv_len > pages.max_pages * pages.page_size) {
    return expected(
        "kv_len",
        "at most max_pages * page_size = " + std::to_string(pages.max_pages * pages.page_size),
        problem.kv_len);
  }
  return {};
}

Status check_backward_problem(const AttentionProblem& problem, const Device& device) {
  PARALLAX_RETURN_IF_ERROR(check_shape(problem, device));
  if (cache_dtype(problem) != problem.dtype) {
    return expected("kv_dtype",
                    "dtype: only forward, decode and append_kv take a cache of another type",
                    static_cast<int>(cache_dtype(problem)));
  }
  return {};
}

Status check_forward_problem(const AttentionProblem& problem, const Device& device) {
  PARALLAX_RETURN_IF_ERROR(check_shape(problem, device));
  PARALLAX_RETURN_IF_ERROR(check_cache_dtype(problem));
  if (problem.packed && cache_dtype(problem) != problem.dtype) {
    return expected("kv_dtype", "dtype in a packed call, which has no cache",
                    static_cast<int>(cache_dtype(problem)));
  }
  return {};
}

Status check_decode_problem(const AttentionProblem& problem, const Device& device) {
  PARALLAX_RETURN_IF_ERROR(check_shape(problem, device));
  PARALLAX_RETURN_IF_ERROR(check_cache_dtype(problem));
  if (problem.packed) {
    return Status::invalid_argument(
        "packed: decode takes [batch, q_len, heads, head_dim]; use forward for packed sequences");
  }
  return {};
}

Status check_scales_present(const AttentionProblem& problem, const float* k_scale,
                            const float* v_scale) {
  const bool needed = cache_dtype(problem) == DType::kFloat8E4M3;
  for (const auto& [name, scale] : {std::pair{"k_scale", k_scale}, {"v_scale", v_scale}}) {
    if ((scale != nullptr) == needed) continue;
    return Status::invalid_argument(
        std::string(name) + (needed ? ": a float8_e4m3 cache needs it, [num_kv_heads], got null"
                                    : ": only a float8_e4m3 cache takes one"));
  }
  return {};
}

Status check_arguments(const AttentionProblem& problem, const ForwardArgs& args) {
  const std::int64_t q_elements = num_q_elements(problem);
  const std::int64_t kv_elements = num_kv_elements(problem, args.pages);
  PARALLAX_RETURN_IF_ERROR(check_present("q", args.q.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("r", args.r.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("k", args.k.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v", args.v.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_scales(problem, args.k_scale, args.v_scale));
  PARALLAX_RETURN_IF_ERROR(check_present("o", args.o.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_sequences(problem, args.sequences));
  return check_visible_pages(problem, args.sequences, args.pages);
}

Status check_arguments(const AttentionProblem& problem, const BackwardArgs& args) {
  const std::int64_t q_elements = num_q_elements(problem);
  const std::int64_t kv_elements = num_kv_elements(problem);
  const std::int64_t rows = q_elements / problem.head_dim;
  PARALLAX_RETURN_IF_ERROR(check_present("q", args.q.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("r", args.r.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("k", args.k.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v", args.v.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("o", args.o.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v_bar", args.v_bar.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("d_o", args.d_o.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("lse", args.lse, rows));
  PARALLAX_RETURN_IF_ERROR(check_present("t_bar", args.t_bar, rows));
  PARALLAX_RETURN_IF_ERROR(check_present("dq", args.dq.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("dr", args.dr.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("dk", args.dk.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("dv", args.dv.data, kv_elements));
  return check_sequences(problem, args.sequences);
}

Status check_arguments(const AttentionProblem& problem, const DecodeArgs& args) {
  const std::int64_t q_elements = num_q_elements(problem);
  const std::int64_t kv_elements = num_kv_elements(problem, args.pages);
  PARALLAX_RETURN_IF_ERROR(check_present("q", args.q.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("r", args.r.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("k_cache", args.k_cache.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v_cache", args.v_cache.data, kv_elements));
  PARALLAX_RETURN_IF_ERROR(check_present("kv_lens", args.sequences.kv_lens, problem.batch));
  PARALLAX_RETURN_IF_ERROR(check_scales(problem, args.k_scale, args.v_scale));
  const StateView& state = args.state;
  const int num_parts = (state.m != nullptr) + (state.d1 != nullptr) + (state.d2 != nullptr) +
                        (state.o1 != nullptr) + (state.o2 != nullptr);
  if (num_parts != 0 && num_parts != 5) {
    return expected("state", "all of m, d1, d2, o1, o2 or none", num_parts);
  }
  if (num_parts == 0) PARALLAX_RETURN_IF_ERROR(check_present("o", args.o.data, q_elements));
  PARALLAX_RETURN_IF_ERROR(check_sequences(problem, args.sequences));
  return check_visible_pages(problem, args.sequences, args.pages);
}

AttentionProblem append_problem(const AttentionProblem& problem, const AppendArgs& args) {
  AttentionProblem shape = problem;
  const AppendPrologue& prologue = args.prologue;
  if (!prologue.q.in.data && !prologue.r.in.data) shape.num_q_heads = shape.num_kv_heads;
  shape.scale = 1.0;
  shape.window = 0;
  return shape;
}

Status check_pointers(const AttentionProblem& problem, const AppendArgs& args) {
  const std::int64_t elements =
      problem.batch * problem.q_len * problem.num_kv_heads * problem.head_dim;
  PARALLAX_RETURN_IF_ERROR(check_present("k", args.k.data, elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v", args.v.data, elements));
  PARALLAX_RETURN_IF_ERROR(check_present("k_cache", args.k_cache.data, elements));
  PARALLAX_RETURN_IF_ERROR(check_present("v_cache", args.v_cache.data, elements));
  PARALLAX_RETURN_IF_ERROR(check_present("positions", args.positions, problem.batch));
  PARALLAX_RETURN_IF_ERROR(check_scales_present(problem, args.k_scale, args.v_scale));
  if (args.pages.table) PARALLAX_RETURN_IF_ERROR(check_page_table(problem, args.pages));
  return check_prologue(problem, args.prologue);
}

Status check_arguments(const AttentionProblem& problem, const AppendArgs& args) {
  PARALLAX_RETURN_IF_ERROR(check_pointers(problem, args));
  PARALLAX_RETURN_IF_ERROR(check_scales(problem, args.k_scale, args.v_scale));
  for (std::int64_t b = 0; b < problem.batch && problem.q_len > 0; ++b) {
    PARALLAX_RETURN_IF_ERROR(
        check_places("positions", b, args.positions[b], problem.q_len, problem.kv_len, "capacity"));
    const std::int64_t position = args.positions[b];
    if (args.pages.table) {
      PARALLAX_RETURN_IF_ERROR(check_pages(args.pages, b, position, position + problem.q_len));
    }
    if (!rotates(args.prologue)) continue;
    const std::int32_t* angles = args.prologue.angles ? args.prologue.angles : args.positions;
    PARALLAX_RETURN_IF_ERROR(check_places(args.prologue.angles ? "angles" : "positions", b,
                                          angles[b], problem.q_len, args.prologue.num_angles,
                                          "num_angles"));
  }
  return {};
}

}  // namespace parallax::cpu
