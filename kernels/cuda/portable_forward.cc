// SPDX-License-Identifier: MIT
// The host half of the portable forward.
#include "cuda/portable_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cuda/element.h"
#include "cuda/forward.h"
#include "cuda/launch.h"

namespace parallax {
namespace {

TileGrid grid_of(const AttentionProblem& problem) {
  const std::int64_t sharing = problem.packed ? problem.batch : 1;  // sequences of mean length
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const int rows = portable_forward_tile(padded_head_dim(problem.head_dim)).queries();
  return tile_grid(problem, problem.q_len, problem.num_q_heads, rows,
                   4 * problem.head_dim * problem.kv_len / sharing / group);
}

Status check_inputs(const AttentionProblem& problem, const ForwardArgs& args) {
  // A paged view steps over pages and their rows as a contiguous one does over entries and tokens.
  AttentionProblem paged = problem;
  if (args.pages.table != nullptr) paged.batch = args.pages.num_pages;
  const std::int64_t kv_len = args.pages.table ? args.pages.page_size : problem.kv_len;
  for (auto [name, view] : {std::pair{"q", &args.q}, std::pair{"r", &args.r}}) {
    const Status s = check_rows(name, *view, problem, problem.q_len, problem.num_q_heads);
    if (!s.ok()) return s;
  }
  for (auto [name, view] : {std::pair{"k", &args.k}, std::pair{"v", &args.v}}) {
    const Status s = check_rows(name, *view, paged, kv_len, problem.num_kv_heads);
    if (!s.ok()) return s;
  }
  return {};
}

template <class T>
Status launch(const PortableForwardParams& params, cudaStream_t stream) {
  switch (padded_head_dim(params.problem.head_dim)) {
    case 64:
      return launch_portable_forward<T, 64>(params, stream);
    case 128:
      return launch_portable_forward<T, 128>(params, stream);
    default:
      return launch_portable_forward<T, 256>(params, stream);
  }
}

}  // namespace

std::int64_t num_portable_forward_blocks(const AttentionProblem& problem) {
  const int rows = portable_forward_tile(padded_head_dim(problem.head_dim)).queries();
  return (problem.packed ? 1 : problem.batch) * problem.num_q_heads *
         num_tiles(problem, problem.q_len, rows);
}

Status run_portable_forward(const ForwardPlan& plan, const ForwardArgs& args, cudaStream_t stream) {
  const AttentionProblem& problem = plan.problem;
  if (Status s = check_inputs(problem, args); !s.ok()) return s;
  if (num_portable_forward_blocks(problem) > std::numeric_limits<int>::max()) {
    return Status::unsupported("forward: the number of query tiles must stay below 2^31");
  }
  PortableForwardParams params;
  params.problem = problem;
  params.problem.window = std::min<std::int64_t>(problem.window, 1 << 30);  // which is no window
  params.sequences = args.sequences;
  params.pages = args.pages;
  params.q = args.q;
  params.r = args.r;
  params.k = args.k;
  params.v = args.v;
  params.o = args.o;
  params.v_bar = args.v_bar;
  params.lse = static_cast<float*>(args.lse);
  params.t_bar = static_cast<float*>(args.t_bar);
  params.scale_log2 = static_cast<float>(problem.scale * M_LOG2E);
  params.group = static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
  params.grid = grid_of(problem);
  const DeviceScope scope(plan.device.index);
  if (!scope.status().ok()) return scope.status();
  return problem.dtype == DType::kFloat16 ? launch<fp16>(params, stream)
                                          : launch<bf16>(params, stream);
}

}  // namespace parallax
