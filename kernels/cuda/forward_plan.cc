// SPDX-License-Identifier: MIT
// The host half of the CUDA forward: what it takes, which kernel; the Hopper kernel's tensor maps
// and launch.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/checks.h"
#include "cpu/widen.h"
#include "cuda/element.h"
#include "cuda/forward.h"
#include "cuda/launch.h"
#include "cuda/place.h"
#include "cuda/plan.h"
#include "cuda/portable_forward.h"
#include "cuda/schedule.h"
#include "cuda/widen.h"

namespace parallax {
namespace {

constexpr std::size_t kWorkspaceAlignment = 256;
constexpr std::int64_t kMaxLen = (1 << 30) - 256;  // masks add two lengths in 32 bits
constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();

// Query tiles of all sequences and heads; packed, where lengths are on the device, at most.
std::int64_t max_tickets(const AttentionProblem& problem) {
  const int queries = forward_tile(padded_head_dim(problem.head_dim)).queries();
  const std::int64_t entries = problem.packed ? 1 : problem.batch;
  return num_tiles(problem, problem.q_len, queries) * entries * problem.num_q_heads;
}

// Whether there is a key to load.
bool has_keys(const AttentionProblem& problem, const PageTable& pages) {
  return problem.kv_len > 0 && (pages.table == nullptr || pages.num_pages > 0);
}

// q and r interleaved by eights in one map, {columns of all heads, row, q | r, 8-row group, batch}:
// possible where both have the same strides and lie a multiple of 16 bytes apart. Rows of a group
// are counted from any row on, so that a packed sequence may begin anywhere; the map itself does
// not bound them, hence only tiles whose rows all exist are read through it.
bool interleave(const AttentionProblem& problem, const ForwardTile& tile, const ConstView& q,
                const ConstView& r, TensorMapSpec* spec, ForwardParams* params) {
  const int padded = padded_head_dim(problem.head_dim);
  const bool same_strides =
      q.len_stride == r.len_stride && q.head_stride == r.head_stride &&
      (problem.packed || problem.batch == 1 || q.batch_stride == r.batch_stride);
  const bool r_first = r.data < q.data;
  // Columns beyond head_dim would be the next head's; halves change places only in registers.
  if (!same_strides || problem.head_dim != padded || (r_first && !tile.q_in_registers) ||
      problem.q_len < tile.queries() || q.head_stride < 0) {
    return false;
  }
  const auto* low = static_cast<const char*>(r_first ? r.data : q.data);
  const auto* high = static_cast<const char*>(r_first ? q.data : r.data);
  *spec = tensor_map_spec(problem, q, problem.q_len, 1);
  spec->data = low;
  spec->rank = 5;
  spec->sizes[0] = (problem.num_q_heads - 1) * q.head_stride + problem.head_dim;
  spec->sizes[4] = spec->sizes[3];
  spec->strides[4] = spec->strides[3];
  spec->sizes[2] = 2;
  spec->strides[2] = (high - low) / 2;
  spec->sizes[3] = tile.queries() / 8;
  spec->strides[3] = 8 * q.len_stride;
  const int box[] = {64, 8, 2, tile.queries() / 8, 1};
  std::copy(box, box + 5, spec->box);
  if ((high - low) % 16 != 0 || spec->sizes[0] > kMaxInt || !tensor_map_obstacle(*spec).empty()) {
    return false;
  }
  params->interleaved = true;
  params->r_first = r_first;
  params->head_columns = static_cast<int>(q.head_stride);
  return true;
}

Status encode_maps(const AttentionProblem& problem, const ForwardTile& tile,
                   const ForwardArgs& args, ForwardMaps* maps, ForwardParams* params) {
  TensorMapSpec q = tensor_map_spec(problem, args.q, problem.q_len, problem.num_q_heads);
  TensorMapSpec r = tensor_map_spec(problem, args.r, problem.q_len, problem.num_q_heads);
  q.box[1] = r.box[1] = 8;
  // Without keys nothing is loaded through their maps; q stands in for tensors of no elements.
  TensorMapSpec k = q;
  TensorMapSpec v = q;
  if (has_keys(problem, args.pages)) {
    const PageTable& pages = args.pages;
    AttentionProblem keys = problem;
    if (pages.table != nullptr) {  // pages for entries of the batch
      keys.batch = pages.num_pages;
      keys.kv_len = pages.page_size;
    }
    k = tensor_map_spec(keys, args.k, keys.kv_len, keys.num_kv_heads);
    v = tensor_map_spec(keys, args.v, keys.kv_len, keys.num_kv_heads);
    k.box[1] = v.box[1] = tile.keys;
    if (pages.table != nullptr) {
      params->page_table = pages.table;
      params->max_pages = pages.max_pages;
      params->page_shift = std::countr_zero(static_cast<unsigned>(pages.page_size));
      params->slot_mask = pages.page_size - 1;
      // The largest power of two that divides both a page and a key tile.
      params->page_box = std::min(pages.page_size, tile.keys & -tile.keys);
      params->box_mask = -params->page_box;
      k.box[1] = v.box[1] = params->page_box;
    }
  }
  const struct {
    const char* name;
    const TensorMapSpec& spec;
    CUtensorMap* map;
  } all[] = {{"q", q, &maps->q}, {"r", r, &maps->r}, {"k", k, &maps->k}, {"v", v, &maps->v}};
  for (const auto& [name, spec, map] : all) {
    const std::string obstacle = tensor_map_obstacle(spec);
    if (!obstacle.empty()) return Status::invalid_argument(std::string(name) + ": " + obstacle);
  }
  for (const auto& [name, spec, map] : all) {
    if (Status s = encode_tensor_map(spec, name, map); !s.ok()) return s;
  }
  TensorMapSpec both;
  if (!interleave(problem, tile, args.q, args.r, &both, params)) return {};
  return encode_tensor_map(both, "q and r", &maps->q_and_r);
}

Status check_arguments(const ForwardPlan& plan, const ForwardArgs& args, const void* workspace) {
  if (plan.device.kind != Device::Kind::kCuda) {
    return Status::invalid_argument(
        "plan: made for the CPU; run it with the overload that takes a ParallelFor");
  }
  if (args.pages.table != nullptr) {
    if (Status s = cpu::check_page_table(plan.problem, args.pages); !s.ok()) return s;
  }
  if (Status s = cpu::check_scales_present(plan.problem, args.k_scale, args.v_scale); !s.ok()) {
    return s;
  }
  const bool keyed = has_keys(plan.problem, args.pages);
  const struct {
    const char* name;
    const void* data;
    bool needed;
  } all[] = {{"q", args.q.data, true},
             {"r", args.r.data, true},
             {"k", args.k.data, keyed},
             {"v", args.v.data, keyed},
             {"o", args.o.data, true},
             {"workspace", workspace, plan.workspace_bytes > 0},
             {"cu_seqlens_q", args.sequences.cu_seqlens_q, plan.problem.packed},
             {"cu_seqlens_k", args.sequences.cu_seqlens_k, plan.problem.packed}};
  for (const auto& [name, data, needed] : all) {
    if (needed && data == nullptr) {
      return Status::invalid_argument(std::string(name) +
                                      ": expected device memory, got a null pointer");
    }
  }
  return {};
}

template <class T>
Status launch(int padded, const ForwardMaps& maps, const ForwardParams& params, int blocks,
              cudaStream_t stream) {
  switch (padded) {
    case 64:
      return launch_forward<T, 64>(maps, params, blocks, stream);
    case 128:
      return launch_forward<T, 128>(maps, params, blocks, stream);
    default:
      return launch_forward<T, 256>(maps, params, blocks, stream);
  }
}

}  // namespace

namespace cuda {

Status plan_forward(const AttentionProblem& problem, const Device& device, ForwardPlan* plan) {
  if (Status s = check_kernels("forward", problem, device); !s.ok()) return s;
  const std::int64_t tickets =
      takes_hopper_kernels(device) ? max_tickets(problem) : num_portable_forward_blocks(problem);
  // The copy engine's coordinates and the tickets are 32-bit; offsets in memory are not.
  if (tickets > kMaxInt - device.num_sms || problem.q_len > kMaxLen || problem.kv_len > kMaxLen ||
      problem.batch >= kMaxInt) {
    return Status::unsupported(
        "forward: q_len and kv_len must stay below 2^30, batch and the number of query tiles below "
        "2^31");
  }
  plan->problem = problem;
  plan->device = device;
  plan->num_tasks = tickets;
  plan->workspace_bytes = 0;
  if (!takes_hopper_kernels(device)) return {};
  plan->workspace_bytes = kWorkspaceAlignment;
  if (problem.packed) plan->workspace_bytes += sizeof(int) * (2 * problem.batch + 1);
  return {};
}

}  // namespace cuda

namespace {

// Writes the visible part of an FP8 cache out in the problem's dtype, then runs on that.
Status run_widened(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
                   Stream stream) {
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  const Status status =
      launch_widen(plan.problem, args, workspace, plan.device, static_cast<cudaStream_t>(stream));
  if (!status.ok()) return status;
  ForwardPlan rest = plan;
  rest.problem = cpu::widened_problem(plan.problem);
  return run(rest, cpu::widened_args(plan.problem, args, workspace),
             static_cast<char*>(workspace) + cpu::widened_bytes(plan.problem), stream);
}

}  // namespace

Status run(const ForwardPlan& plan, const ForwardArgs& args, void* workspace, Stream stream) {
  const AttentionProblem& problem = plan.problem;
  if (problem.batch == 0 || problem.q_len == 0) return {};
  if (Status s = check_arguments(plan, args, workspace); !s.ok()) return s;
  if (cpu::widens(problem)) return run_widened(plan, args, workspace, stream);
  for (auto [name, view] : {std::pair{"o", &args.o}, std::pair{"v_bar", &args.v_bar}}) {
    const Status s =
        check_rows(name, read_only(*view), problem, problem.q_len, problem.num_q_heads);
    if (!s.ok()) return s;
  }
  if (!takes_hopper_kernels(plan.device)) {
    return run_portable_forward(plan, args, static_cast<cudaStream_t>(stream));
  }
  const int padded = padded_head_dim(problem.head_dim);
  const ForwardTile tile = forward_tile(padded);

  ForwardParams params;
  params.problem = problem;
  params.problem.window = std::min(problem.window, kMaxLen);  // which is no window
  params.sequences = args.sequences;
  params.o = args.o;
  params.v_bar = args.v_bar;
  params.lse = static_cast<float*>(args.lse);
  params.t_bar = static_cast<float*>(args.t_bar);
  params.scale_log2 = static_cast<float>(problem.scale * M_LOG2E);
  params.num_heads = static_cast<int>(problem.num_q_heads);
  params.group = static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
  params.section_keys = section_keys(static_cast<int>(problem.head_dim));
  auto* memory = static_cast<int*>(workspace);
  params.next_ticket = memory;

  ForwardMaps maps;
  if (Status s = encode_maps(problem, tile, args, &maps, &params); !s.ok()) return s;

  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  if (problem.packed) {
    params.num_sequences = static_cast<int>(problem.batch);
    int* order = memory + kWorkspaceAlignment / sizeof(int);
    int* first_ticket = order + problem.batch;
    params.sequence_order = order;
    params.first_ticket = first_ticket;
    if (Status s = launch_forward_order(problem, args.sequences, tile.queries(), params.next_ticket,
                                        order, first_ticket, cuda_stream);
        !s.ok()) {
      return s;
    }
  } else {
    params.num_tickets = static_cast<int>(plan.num_tasks);
    params.num_q_tiles = static_cast<int>(num_tiles(problem, problem.q_len, tile.queries()));
    params.num_pairs = static_cast<int>(problem.batch * problem.num_q_heads);
    params.section = section_pairs(params.section_keys, static_cast<int>(problem.kv_len),
                                   params.group, params.num_pairs);
    const cudaError_t error = cudaMemsetAsync(params.next_ticket, 0, sizeof(int), cuda_stream);
    if (Status s = check_cuda(error, "forward: cudaMemsetAsync"); !s.ok()) return s;
  }
  const int blocks = static_cast<int>(std::min<std::int64_t>(plan.device.num_sms, plan.num_tasks));
  return problem.dtype == DType::kFloat16 ? launch<fp16>(padded, maps, params, blocks, cuda_stream)
                                          : launch<bf16>(padded, maps, params, blocks, cuda_stream);
}

}  // namespace parallax
