// SPDX-License-Identifier: MIT
// The host half of the CUDA backward: what it takes, its workspace, which kernels; the Hopper
// kernels' tensor maps.

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>

#include "cuda/backward.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/portable_backward.h"

namespace parallax {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();

std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

int padded_head_dim(std::int64_t head_dim) { return head_dim <= 64 ? 64 : 128; }

// Rows of a block of the queries and keys kernels.
int tile_rows(const Device& device) {
  return takes_hopper_kernels(device) ? kBackwardTile : kPortableBackwardTile;
}

// Where things lie in the workspace, in bytes.
struct Layout {
  std::int64_t statistics_rows = 0;
  std::size_t gradient = 0;
  std::size_t reference_keys = 0;
  std::size_t bytes = 0;
};

Layout layout_of(const AttentionProblem& problem) {
  Layout layout;
  layout.statistics_rows = round_up(problem.q_len, kBackwardRows);
  if (problem.packed) layout.statistics_rows += kBackwardRows * problem.batch;
  const std::int64_t rows =
      (problem.packed ? 1 : problem.batch) * problem.num_q_heads * layout.statistics_rows;
  const std::int64_t key_floats =
      problem.batch * problem.num_kv_heads * padded_head_dim(problem.head_dim);
  layout.gradient = static_cast<std::size_t>(rows) * sizeof(float2);
  layout.reference_keys = 2 * layout.gradient;
  layout.bytes = layout.reference_keys + static_cast<std::size_t>(key_floats) * sizeof(float);
  return layout;
}

Status encode_maps(const AttentionProblem& problem, const BackwardArgs& args, BackwardMaps* maps) {
  const struct {
    const char* name;
    const ConstView& view;
    bool of_keys;
    CUtensorMap* map;
  } tensors[] = {{"q", args.q, false, &maps->q},
                 {"r", args.r, false, &maps->r},
                 {"d_o", args.d_o, false, &maps->d_o},
                 {"k", args.k, true, &maps->k},
                 {"v", args.v, true, &maps->v}};
  for (const auto& tensor : tensors) {
    const std::int64_t len = tensor.of_keys ? problem.kv_len : problem.q_len;
    if (len == 0) continue;  // nothing is loaded through it
    const std::int64_t heads = tensor.of_keys ? problem.num_kv_heads : problem.num_q_heads;
    TensorMapSpec spec = tensor_map_spec(problem, tensor.view, len, heads);
    spec.box[1] = kBackwardRows;
    if (Status s = encode_tensor_map(spec, tensor.name, tensor.map); !s.ok()) return s;
  }
  return {};
}

struct NamedView {
  const char* name;
  ConstView view;
  bool of_keys;
};

Status check_rows(const AttentionProblem& problem, std::initializer_list<NamedView> views) {
  for (const auto& [name, view, of_keys] : views) {
    const std::int64_t len = of_keys ? problem.kv_len : problem.q_len;
    const std::int64_t heads = of_keys ? problem.num_kv_heads : problem.num_q_heads;
    if (Status s = check_rows(name, view, problem, len, heads); !s.ok()) return s;
  }
  return {};
}

// What every kernel reads and writes by rows, and what only the portable ones do.
Status check_rows(const AttentionProblem& problem, const BackwardArgs& args) {
  return check_rows(problem, {{"o", args.o, false},
                              {"v_bar", args.v_bar, false},
                              {"dq", read_only(args.dq), false},
                              {"dr", read_only(args.dr), false},
                              {"dk", read_only(args.dk), true},
                              {"dv", read_only(args.dv), true}});
}

Status check_inputs(const AttentionProblem& problem, const BackwardArgs& args) {
  return check_rows(problem, {{"q", args.q, false},
                              {"r", args.r, false},
                              {"d_o", args.d_o, false},
                              {"k", args.k, true},
                              {"v", args.v, true}});
}

BackwardParams params_of(const BackwardPlan& plan, const BackwardArgs& args, void* workspace) {
  const AttentionProblem& problem = plan.problem;
  const Layout layout = layout_of(problem);
  auto* memory = static_cast<char*>(workspace);
  BackwardParams params;
  params.problem = problem;
  params.sequences = args.sequences;
  params.q = args.q;
  params.r = args.r;
  params.k = args.k;
  params.v = args.v;
  params.o = args.o;
  params.v_bar = args.v_bar;
  params.d_o = args.d_o;
  params.lse = static_cast<const float*>(args.lse);
  params.t_bar = static_cast<const float*>(args.t_bar);
  params.dq = args.dq;
  params.dr = args.dr;
  params.dk = args.dk;
  params.dv = args.dv;
  params.scale = static_cast<float>(problem.scale);
  params.scale_log2 = static_cast<float>(problem.scale * M_LOG2E);
  params.fold = std::max(params.scale, 0x1p-60f);
  params.group = static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
  params.num_statistics_tiles = static_cast<int>(num_tiles(problem, problem.q_len, kBackwardRows));
  const std::int64_t sharing = problem.packed ? problem.batch : 1;  // sequences of mean length
  const std::int64_t row_bytes = 2 * problem.head_dim;
  const int rows = tile_rows(plan.device);
  params.query_grid = tile_grid(problem, problem.q_len, problem.num_q_heads, rows,
                                2 * row_bytes * problem.kv_len / sharing / params.group);
  params.key_grid = tile_grid(problem, problem.kv_len, problem.num_kv_heads, rows,
                              3 * row_bytes * problem.q_len / sharing * params.group);
  params.statistics_rows = layout.statistics_rows;
  params.softmax = reinterpret_cast<float2*>(memory);
  params.gradient = reinterpret_cast<float2*>(memory + layout.gradient);
  params.reference_keys = reinterpret_cast<float*>(memory + layout.reference_keys);
  return params;
}

template <class T>
Status launch(const BackwardMaps& maps, const BackwardParams& params, cudaStream_t stream) {
  return params.problem.head_dim <= 64 ? launch_backward<T, 64>(maps, params, stream)
                                       : launch_backward<T, 128>(maps, params, stream);
}

template <class T>
Status launch_portable(const BackwardParams& params, cudaStream_t stream) {
  return params.problem.head_dim <= 64 ? launch_portable_backward<T, 64>(params, stream)
                                       : launch_portable_backward<T, 128>(params, stream);
}

}  // namespace

namespace cuda {

Status plan_backward(const AttentionProblem& problem, const Device& device, BackwardPlan* plan) {
  if (Status s = check_kernels("backward", problem, device); !s.ok()) return s;
  if (problem.scale < 0) return Status::unsupported("scale: the CUDA backward takes scale >= 0");
  if (problem.head_dim > 128) {
    return Status::unsupported("head_dim: the CUDA backward takes at most 128, got " +
                               std::to_string(problem.head_dim));
  }
  const std::int64_t entries = problem.packed ? 1 : problem.batch;
  const std::int64_t query_blocks =
      num_tiles(problem, problem.q_len, kBackwardRows) * entries * problem.num_q_heads;
  const std::int64_t key_blocks =
      num_tiles(problem, problem.kv_len, tile_rows(device)) * entries * problem.num_kv_heads;
  // Blocks, positions and the copy engine's coordinates are 32-bit; offsets in memory are not.
  if (query_blocks + problem.batch > kMaxInt || key_blocks > kMaxInt ||
      problem.num_q_heads > 65535 || problem.q_len > kMaxInt - 256 ||
      problem.kv_len > kMaxInt - 256) {
    return Status::unsupported(
        "backward: q_len, kv_len and the number of tiles must stay below 2^31, num_q_heads below "
        "2^16");
  }
  plan->problem = problem;
  plan->device = device;
  plan->num_tasks = query_blocks + key_blocks;
  plan->workspace_bytes = layout_of(problem).bytes;
  return {};
}

}  // namespace cuda

Status run(const BackwardPlan& plan, const BackwardArgs& args, void* workspace, Stream stream) {
  const AttentionProblem& problem = plan.problem;
  if (problem.batch == 0 || (problem.q_len == 0 && problem.kv_len == 0)) return {};
  if (Status s = check_rows(problem, args); !s.ok()) return s;
  const bool on_hopper = takes_hopper_kernels(plan.device);
  BackwardMaps maps{};
  if (Status s = on_hopper ? encode_maps(problem, args, &maps) : check_inputs(problem, args);
      !s.ok()) {
    return s;
  }
  const BackwardParams params = params_of(plan, args, workspace);
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  if (!on_hopper) {
    return problem.dtype == DType::kFloat16 ? launch_portable<fp16>(params, cuda_stream)
                                            : launch_portable<bf16>(params, cuda_stream);
  }
  return problem.dtype == DType::kFloat16 ? launch<fp16>(maps, params, cuda_stream)
                                          : launch<bf16>(maps, params, cuda_stream);
}

}  // namespace parallax
