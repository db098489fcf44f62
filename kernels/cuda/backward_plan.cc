// SPDX-License-Identifier: MIT
// The host half of the Hopper backward: what it takes, its workspace, its tensor maps, its launch.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cuda/backward.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace parallax {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr std::int64_t kSectionBytes = 32 << 20;  // half of an L2 cache of 50 or 60 MB

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

int padded_head_dim(std::int64_t head_dim) { return head_dim <= 64 ? 64 : 128; }

// Tiles of `rows` rows of an entry of the batch; packed, where lengths are on the device, at most
// as many as all sequences have.
std::int64_t num_tiles(const AttentionProblem& problem, std::int64_t len, std::int64_t rows) {
  return problem.packed ? len / rows + problem.batch : ceil_div(len, rows);
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

// A view {head_dim, len, heads, batch} as the copy engine sees it. An axis of one element may have
// any stride in the caller's view.
Status encode(const AttentionProblem& problem, const ConstView& view, std::int64_t len,
              std::int64_t heads, const char* name, CUtensorMap* map) {
  TensorMapSpec spec;
  spec.dtype = problem.dtype;
  spec.data = view.data;
  spec.rank = 4;
  const std::int64_t sizes[] = {problem.head_dim, len, heads, problem.packed ? 1 : problem.batch};
  const std::int64_t strides[] = {1, view.len_stride, view.head_stride, view.batch_stride};
  for (int i = 0; i < 4; ++i) {
    spec.sizes[i] = sizes[i];
    spec.strides[i] = sizes[i] == 1 ? 8 : strides[i];
    spec.box[i] = 1;
  }
  spec.box[0] = 64;
  spec.box[1] = kBackwardRows;
  return encode_tensor_map(spec, name, map);
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
    if (Status s = encode(problem, tensor.view, len, heads, tensor.name, tensor.map); !s.ok()) {
      return s;
    }
  }
  return {};
}

// Rows that are read or written 16 bytes at a time.
template <class Void>
Status check_rows(const char* name, const BasicView<Void>& view) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
                       view.batch_stride % 8 == 0 && view.len_stride % 8 == 0 &&
                       view.head_stride % 8 == 0;
  if (aligned) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": its address must be a multiple of 16 bytes and its strides "
                                  "multiples of 8 elements");
}

Status check_rows(const BackwardArgs& args) {
  for (auto [name, view] : {std::pair{"o", &args.o}, std::pair{"v_bar", &args.v_bar}}) {
    if (Status s = check_rows(name, *view); !s.ok()) return s;
  }
  for (auto [name, view] : {std::pair{"dq", &args.dq}, std::pair{"dr", &args.dr},
                            std::pair{"dk", &args.dk}, std::pair{"dv", &args.dv}}) {
    if (Status s = check_rows(name, *view); !s.ok()) return s;
  }
  return {};
}

// How many of `num_heads` heads to work on at once, each streaming `bytes`.
int section_of(std::int64_t bytes, std::int64_t num_heads) {
  return static_cast<int>(
      std::clamp<std::int64_t>(kSectionBytes / std::max<std::int64_t>(bytes, 1), 1, num_heads));
}

BackwardParams params_of(const BackwardPlan& plan, const BackwardArgs& args, void* workspace) {
  const AttentionProblem& problem = plan.problem;
  const Layout layout = layout_of(problem);
  auto* memory = static_cast<char*>(workspace);
  BackwardParams params;
  params.problem = problem;
  params.sequences = args.sequences;
  params.k = args.k;
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
  params.num_query_tiles = static_cast<int>(num_tiles(problem, problem.q_len, kBackwardTile));
  params.num_key_tiles = static_cast<int>(num_tiles(problem, problem.kv_len, kBackwardTile));
  const std::int64_t entries = problem.packed ? 1 : problem.batch;
  const std::int64_t sharing = problem.packed ? problem.batch : 1;  // sequences of mean length
  const std::int64_t row_bytes = 2 * problem.head_dim;
  params.query_section = section_of(2 * row_bytes * problem.kv_len / sharing / params.group,
                                    entries * problem.num_q_heads);
  params.key_section = section_of(3 * row_bytes * problem.q_len / sharing * params.group,
                                  entries * problem.num_kv_heads);
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

}  // namespace

namespace cuda {

Status plan_backward(const AttentionProblem& problem, const Device& device, BackwardPlan* plan) {
  if (device.compute_capability != 90) {
    return Status::unsupported(
        "backward: compute capability " + std::to_string(device.compute_capability / 10) + "." +
        std::to_string(device.compute_capability % 10) + " has no kernel, 9.0 (Hopper) has");
  }
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return Status::unsupported("dtype: CUDA kernels take bf16 and fp16");
  }
  if (problem.head_dim > 128) {
    return Status::unsupported("head_dim: the CUDA backward takes at most 128, got " +
                               std::to_string(problem.head_dim));
  }
  if (problem.scale < 0) return Status::unsupported("scale: CUDA kernels take scale >= 0");
  const std::int64_t entries = problem.packed ? 1 : problem.batch;
  const std::int64_t query_blocks =
      num_tiles(problem, problem.q_len, kBackwardRows) * entries * problem.num_q_heads;
  const std::int64_t key_blocks =
      num_tiles(problem, problem.kv_len, kBackwardTile) * entries * problem.num_kv_heads;
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
  if (Status s = check_rows(args); !s.ok()) return s;
  BackwardMaps maps{};
  if (Status s = encode_maps(problem, args, &maps); !s.ok()) return s;
  const BackwardParams params = params_of(plan, args, workspace);
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  return problem.dtype == DType::kFloat16 ? launch<fp16>(maps, params, cuda_stream)
                                          : launch<bf16>(maps, params, cuda_stream);
}

}  // namespace parallax
