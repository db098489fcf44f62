// SPDX-License-Identifier: MIT
// The host half of the decode: what it takes, how many spans, where things lie, its launch.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "cpu/checks.h"
#include "cuda/decode.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace parallax {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr std::int64_t kMaxLen = (1 << 30) - 256;  // masks add two lengths in 32 bits
constexpr std::size_t kAlignment = 256;

std::int64_t ceil_div64(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int padded_head_dim(std::int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// Everything that follows from the problem and the device.
struct Geometry {
  Geometry(const AttentionProblem& problem, const Device& device) {
    padded = padded_head_dim(problem.head_dim);
    portable = !takes_hopper_kernels(device);
    const int cache_bytes = cache_dtype(problem) == DType::kFloat8E4M3 ? 1 : 2;
    block_keys = decode_block_keys(cache_bytes);
    group = problem.num_q_heads / problem.num_kv_heads;
    rows = group * problem.q_len;
    shape = decode_shape(padded, cache_bytes, rows, portable);
    passes = std::max<std::int64_t>(ceil_div64(rows, shape.rows()), 1);
    const std::int64_t pairs = problem.num_kv_heads * passes;
    const std::int64_t ctas =
        std::int64_t{device.num_sms} * decode_ctas_per_sm(padded, portable, device.sm_shared_bytes);
    width = width_of(pairs, ctas);
    units = pairs / width;
    spans = std::max<std::int64_t>(ctas / width, 1);
    cut = decode_spans(std::max<std::int64_t>(problem.batch * units, 1), static_cast<int>(spans));
    blocks =
        problem.batch * units * std::max<std::int64_t>(ceil_div64(problem.kv_len, block_keys), 1);
    const auto slots = static_cast<std::size_t>(width * 2 * spans);
    counts_bytes = aligned(slots * sizeof(std::uint64_t));
    partials_bytes = aligned(slots * static_cast<std::size_t>(shape.rows()) *
                             static_cast<std::size_t>(2 * padded + 4) * sizeof(float));
  }

  // How many pairs run side by side: the more, the longer the pieces of memory that are read at one
  // time (the heads of a token are neighbours), as long as few CTAs stay without work.
  static std::int64_t width_of(std::int64_t pairs, std::int64_t ctas) {
    for (std::int64_t width = std::min(pairs, ctas); width > 1; --width) {
      if (pairs % width == 0 && 64 * (ctas / width * width) >= 63 * ctas) return width;
    }
    return 1;
  }

  int padded, block_keys;
  bool portable;
  DecodeShape shape;
  DecodeSpans cut;
  std::int64_t group, rows, passes, width, units, spans, blocks;
  std::size_t counts_bytes, partials_bytes;
};

Status check_plan(const DecodePlan& plan) {
  if (plan.device.kind == Device::Kind::kCuda) return {};
  return Status::invalid_argument(
      "plan: made for the CPU; run it with the overload that takes a ParallelFor");
}

Status check_present(const char* name, const void* data) {
  if (data != nullptr) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": expected device memory, got a null pointer");
}

Status check_pages(const AttentionProblem& problem, const PageTable& pages) {
  if (pages.table == nullptr) return {};
  if (pages.page_size < 1 || pages.page_size > 256 ||
      !std::has_single_bit(static_cast<unsigned>(pages.page_size))) {
    return Status::invalid_argument("page_size: expected a power of two from 1 to 256, got " +
                                    std::to_string(pages.page_size));
  }
  if (pages.num_pages < 0 || pages.num_pages > kMaxInt) {
    return Status::invalid_argument("num_pages: expected 0 to 2^31 - 1, got " +
                                    std::to_string(pages.num_pages));
  }
  if (problem.kv_len > pages.max_pages * pages.page_size) {
    return Status::invalid_argument("kv_len: expected at most max_pages * page_size = " +
                                    std::to_string(pages.max_pages * pages.page_size) + ", got " +
                                    std::to_string(problem.kv_len));
  }
  return {};
}

// Rows that are read or written `unit` elements at a time.
template <class Void>
Status check_rows(const char* name, const BasicView<Void>& view, DType dtype) {
  const int unit = dtype == DType::kFloat8E4M3 ? 16 : 8;
  const bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
                       view.batch_stride % unit == 0 && view.len_stride % unit == 0 &&
                       view.head_stride % unit == 0;
  if (aligned) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": its address must be a multiple of 16 bytes and its strides "
                                  "multiples of " +
                                  std::to_string(unit) + " elements");
}

Status check_state(const DecodeArgs& args) {
  const StateView& state = args.state;
  const int parts = (state.m != nullptr) + (state.d1 != nullptr) + (state.d2 != nullptr) +
                    (state.o1 != nullptr) + (state.o2 != nullptr);
  if (parts != 0 && parts != 5) {
    return Status::invalid_argument("state: expected all of m, d1, d2, o1, o2 or none, got " +
                                    std::to_string(parts));
  }
  for (const auto& [name, data] : {std::pair{"state.o1", state.o1}, {"state.o2", state.o2}}) {
    if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) {
      return Status::invalid_argument(std::string(name) +
                                      ": its address must be a multiple of 16 bytes");
    }
  }
  return parts == 5 ? Status{} : check_present("o", args.o.data);
}

Status check_arguments(const DecodePlan& plan, const DecodeArgs& args, const void* workspace) {
  const AttentionProblem& problem = plan.problem;
  if (Status s = check_plan(plan); !s.ok()) return s;
  if (Status s = check_pages(problem, args.pages); !s.ok()) return s;
  const bool has_keys = args.pages.table != nullptr ? args.pages.num_pages > 0 : problem.kv_len > 0;
  const struct {
    const char* name;
    const ConstView& view;
    DType dtype;
    bool needed;
  } views[] = {{"q", args.q, problem.dtype, true},
               {"r", args.r, problem.dtype, true},
               {"k_cache", args.k_cache, cache_dtype(problem), has_keys},
               {"v_cache", args.v_cache, cache_dtype(problem), has_keys}};
  for (const auto& [name, view, dtype, needed] : views) {
    if (!needed) continue;
    if (Status s = check_present(name, view.data); !s.ok()) return s;
    if (Status s = check_rows(name, view, dtype); !s.ok()) return s;
  }
  if (Status s = cpu::check_scales_present(problem, args.k_scale, args.v_scale); !s.ok()) return s;
  if (Status s = check_present("kv_lens", args.sequences.kv_lens); !s.ok()) return s;
  if (Status s = check_present("workspace", workspace); !s.ok()) return s;
  if (Status s = check_rows("o", args.o, problem.dtype); !s.ok()) return s;
  return check_state(args);
}

DecodeParams params_of(const DecodePlan& plan, const Geometry& geometry, const DecodeArgs& args,
                       void* workspace) {
  DecodeParams params;
  params.problem = plan.problem;
  params.problem.window = std::min(plan.problem.window, kMaxLen);  // which is no window
  params.sequences = args.sequences;
  params.q = args.q;
  params.r = args.r;
  params.k = args.k_cache;
  params.v = args.v_cache;
  params.k_scale = args.k_scale;
  params.v_scale = args.v_scale;
  params.num_pages = static_cast<int>(kMaxInt);
  params.page_shift = 31;
  params.page_mask = static_cast<int>(kMaxInt);
  if (args.pages.table != nullptr) {
    params.page_table = args.pages.table;
    params.max_pages = args.pages.max_pages;
    params.num_pages = static_cast<int>(args.pages.num_pages);
    params.page_shift = std::countr_zero(static_cast<unsigned>(args.pages.page_size));
    params.page_mask = args.pages.page_size - 1;
  }
  params.o = args.o;
  params.lse = static_cast<float*>(args.lse);
  params.t_bar = static_cast<float*>(args.t_bar);
  params.state = args.state;
  params.scale_log2 = static_cast<float>(plan.problem.scale * 1.4426950408889634);
  params.group = static_cast<int>(geometry.group);
  params.rows = static_cast<int>(geometry.rows);
  params.passes = static_cast<int>(geometry.passes);
  params.width = static_cast<int>(geometry.width);
  params.units = static_cast<int>(geometry.units);
  params.schedule = static_cast<const DecodeSpan*>(args.schedule);
  params.spans = geometry.cut;
  params.team = geometry.shape.team;
  params.ways = kDecodeWarps / params.team;
  params.counts = static_cast<std::uint64_t*>(workspace);
  params.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + geometry.counts_bytes);
  return params;
}

template <class T, class Cache, bool kPortable>
Status launch_instance(const Geometry& geometry, const DecodeParams& params, cudaStream_t stream) {
  const int blocks = static_cast<int>(geometry.spans * geometry.width);
  switch (geometry.padded) {
    case 64:
      return launch_decode<T, Cache, 64, kPortable>(params, geometry.shape, blocks, stream);
    case 128:
      return launch_decode<T, Cache, 128, kPortable>(params, geometry.shape, blocks, stream);
    default:
      return launch_decode<T, Cache, 256, kPortable>(params, geometry.shape, blocks, stream);
  }
}

template <class T, class Cache>
Status launch(const Geometry& geometry, const DecodeParams& params, cudaStream_t stream) {
  return geometry.portable ? launch_instance<T, Cache, true>(geometry, params, stream)
                           : launch_instance<T, Cache, false>(geometry, params, stream);
}

}  // namespace

namespace cuda {

Status plan_decode(const AttentionProblem& problem, const Device& device, DecodePlan* plan) {
  if (Status s = check_kernels("decode", problem, device); !s.ok()) return s;
  const Geometry geometry(problem, device);
  if (problem.q_len > kMaxLen || problem.kv_len > kMaxLen || geometry.rows > kMaxInt ||
      problem.batch >= kMaxInt || problem.num_kv_heads * geometry.passes > kMaxInt ||
      geometry.blocks > kMaxInt) {
    return Status::unsupported(
        "decode: q_len and kv_len must stay below 2^30, q_len times the group, batch and the "
        "number of key blocks below 2^31");
  }
  plan->problem = problem;
  plan->device = device;
  plan->num_splits = geometry.spans;
  plan->schedule_bytes = static_cast<std::size_t>(geometry.spans) * sizeof(DecodeSpan);
  plan->workspace_bytes = geometry.counts_bytes + geometry.partials_bytes;
  return {};
}

}  // namespace cuda

Status schedule(const DecodePlan& plan, const Sequences& sequences, void* schedule, Stream stream) {
  if (Status s = check_plan(plan); !s.ok()) return s;
  if (plan.problem.batch == 0 || plan.problem.q_len == 0) return {};
  if (Status s = check_present("kv_lens", sequences.kv_lens); !s.ok()) return s;
  if (Status s = check_present("schedule", schedule); !s.ok()) return s;
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  const Geometry geometry(plan.problem, plan.device);
  AttentionProblem problem = plan.problem;
  problem.window = std::min(problem.window, kMaxLen);
  return launch_decode_schedule(!geometry.portable, problem, sequences, geometry.block_keys,
                                geometry.cut, static_cast<int>(geometry.units),
                                static_cast<DecodeSpan*>(schedule),
                                static_cast<cudaStream_t>(stream));
}

namespace {

Status run(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream,
           bool settled) {
  if (plan.problem.batch == 0 || plan.problem.q_len == 0) return {};
  if (Status s = check_arguments(plan, args, workspace); !s.ok()) return s;
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  const Geometry geometry(plan.problem, plan.device);
  DecodeParams params = params_of(plan, geometry, args, workspace);
  params.settled = settled && args.schedule != nullptr;  // lengths are not
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool is_bf16 = plan.problem.dtype == DType::kBFloat16;
  if (cache_dtype(plan.problem) == DType::kFloat8E4M3) {
    return is_bf16 ? launch<bf16, e4m3>(geometry, params, cuda_stream)
                   : launch<fp16, e4m3>(geometry, params, cuda_stream);
  }
  return is_bf16 ? launch<bf16, bf16>(geometry, params, cuda_stream)
                 : launch<fp16, fp16>(geometry, params, cuda_stream);
}

}  // namespace

Status run(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream) {
  return run(plan, args, workspace, stream, /*settled=*/false);
}

Status run_settled(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream) {
  return run(plan, args, workspace, stream, /*settled=*/true);
}

}  // namespace parallax
