// SPDX-License-Identifier: MIT
// merge_states() and finalize_state() on CUDA (docs/math.md sections 5 and 6). A group of lanes of
// one warp takes a row, four elements of o1 and of o2 a lane and step; states are read once.
#include <algorithm>

#include "cpu/checks.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "parallax/state.h"

namespace parallax {
namespace {

constexpr int kThreads = 128;
// States that one launch merges: as many as its parameters hold. More follow in further launches,
// which start from what the first ones merged: the order stays, and so does every bit.
constexpr int kMaxStates = 64;

struct Shape {
  unsigned num_rows;  // rows in memory order of o1: [batch, q_len, num_q_heads]
  unsigned num_heads;
  unsigned q_len;
  int head_dim;
  int lanes;
};

struct MergeParams {
  Shape shape;
  StateView states[kMaxStates];
  StateView merged;
  int num_states;
};

struct FinalizeParams {
  Shape shape;
  StateView state;
  View o;
  float* lse;
  float* t_bar;
};

// A row of states: where its scalars and its vectors lie, and which lane of its group this is.
struct Row {
  __device__ explicit Row(const Shape& shape)
      : lane(static_cast<int>(threadIdx.x) & (shape.lanes - 1)),
        group((0xffffffffu >> (32 - shape.lanes)) << ((threadIdx.x & 31) - lane)),
        index((blockIdx.x * kThreads + threadIdx.x) / static_cast<unsigned>(shape.lanes)),
        h(index % shape.num_heads),
        i(index / shape.num_heads % shape.q_len),
        b(index / shape.num_heads / shape.q_len),
        scalar((b * shape.num_heads + h) * shape.q_len + i),
        vector(static_cast<std::int64_t>(index) * shape.head_dim) {}

  __device__ RowState<float> scalars(const StateView& state) const {
    return {state.m[scalar], state.d1[scalar], state.d2[scalar]};
  }

  int lane;
  unsigned group;
  std::int64_t index, h, i, b, scalar, vector;
};

__device__ void add_scaled(float left, float right, const float* from, float4* sum) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  sum->x = left * sum->x + right * x.x;
  sum->y = left * sum->y + right * x.y;
  sum->z = left * sum->z + right * x.z;
  sum->w = left * sum->w + right * x.w;
}

// Lane l holds elements [8 l, 8 l + 8) of o1 and o2. All of a row is read before any is written:
// `merged` may be the first state.
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeParams params) {
  const Row row(params.shape);
  if (row.index >= params.shape.num_rows) return;
  const int d = 8 * row.lane;
  const bool active = d < params.shape.head_dim;
  RowState<float> merged;
  float4 o1[2] = {}, o2[2] = {};
  for (int n = 0; n < params.num_states; ++n) {
    const StateView& state = params.states[n];
    const Merged<float> step = merge(merged, row.scalars(state));
    merged = step.state;
    if (!active) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = row.vector + d + 4 * half;
      add_scaled(step.left, step.right, state.o1 + at, &o1[half]);
      add_scaled(step.left, step.right, state.o2 + at, &o2[half]);
    }
  }
  __syncwarp(row.group);
  const StateView& out = params.merged;
  if (row.lane == 0) {
    out.m[row.scalar] = merged.m;
    out.d1[row.scalar] = merged.d1;
    out.d2[row.scalar] = merged.d2;
  }
  if (!active) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t at = row.vector + d + 4 * half;
    *reinterpret_cast<float4*>(out.o1 + at) = o1[half];
    *reinterpret_cast<float4*>(out.o2 + at) = o2[half];
  }
}

__device__ void store(float x, float* to) { *to = x; }
__device__ void store(float x, bf16* to) { *to = __float2bfloat16_rn(x); }
__device__ void store(float x, fp16* to) { *to = __float2half_rn(x); }

template <class T>
__global__ void __launch_bounds__(kThreads)
    finalize_kernel(const __grid_constant__ FinalizeParams params) {
  const Row row(params.shape);
  if (row.index >= params.shape.num_rows) return;
  const Finalized<float> result = finalize(row.scalars(params.state));
  if (row.lane == 0 && params.lse != nullptr) params.lse[row.scalar] = result.lse;
  if (row.lane == 0 && params.t_bar != nullptr) params.t_bar[row.scalar] = result.t_bar;
  if (params.o.data == nullptr) return;
  T* o = static_cast<T*>(params.o.data) + row.b * params.o.batch_stride +
         row.i * params.o.len_stride + row.h * params.o.head_stride;
  for (int d = row.lane; d < params.shape.head_dim; d += params.shape.lanes) {
    store(result.o(params.state.o1[row.vector + d], params.state.o2[row.vector + d]), o + d);
  }
}

Status shape_of(const AttentionProblem& problem, Shape* shape) {
  const std::int64_t num_rows = problem.batch * problem.q_len * problem.num_q_heads;
  if (num_rows > (std::int64_t{1} << 26)) {
    return Status::unsupported("state: batch * q_len * num_q_heads must stay at or below 2^26");
  }
  int lanes = 1;
  while (8 * lanes < problem.head_dim) lanes *= 2;
  *shape = {static_cast<unsigned>(num_rows), static_cast<unsigned>(problem.num_q_heads),
            static_cast<unsigned>(problem.q_len), static_cast<int>(problem.head_dim), lanes};
  return {};
}

unsigned blocks_of(const Shape& shape) {
  return (shape.num_rows * static_cast<unsigned>(shape.lanes) + kThreads - 1) / kThreads;
}

Status check_state(const std::string& name, const StateView& state) {
  for (const float* part : {state.m, state.d1, state.d2, state.o1, state.o2}) {
    if (part == nullptr) {
      return Status::invalid_argument(name +
                                      ": expected all of m, d1, d2, o1, o2, got a null "
                                      "pointer");
    }
  }
  for (const float* part : {state.o1, state.o2}) {
    if (reinterpret_cast<std::uintptr_t>(part) % 16 != 0) {
      return Status::invalid_argument(name +
                                      ": o1 and o2: their addresses must be multiples of 16 bytes");
    }
  }
  return {};
}

}  // namespace

Status merge_states(const AttentionProblem& problem, const StateView* states, int num_states,
                    const StateView& merged, const Device& device, Stream stream) {
  if (Status status = cpu::check_decode_problem(problem, device); !status.ok()) return status;
  if (num_states < 0) {
    return Status::invalid_argument("num_states: expected at least 0, got " +
                                    std::to_string(num_states));
  }
  if (problem.batch * problem.q_len == 0) return {};
  if (Status status = check_state("merged", merged); !status.ok()) return status;
  for (int n = 0; n < num_states; ++n) {
    const Status status = check_state("states[" + std::to_string(n) + "]", states[n]);
    if (!status.ok()) return status;
  }
  MergeParams params;
  if (Status status = shape_of(problem, &params.shape); !status.ok()) return status;
  params.merged = merged;
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  int done = 0;
  do {
    params.num_states = 0;
    if (done > 0) params.states[params.num_states++] = merged;
    while (params.num_states < kMaxStates && done < num_states) {
      params.states[params.num_states++] = states[done++];
    }
    merge_kernel<<<blocks_of(params.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        params);
    if (Status status = check_cuda(cudaGetLastError(), "merge_states"); !status.ok()) return status;
  } while (done < num_states);
  return {};
}

Status finalize_state(const AttentionProblem& problem, const StateView& state, const View& o,
                      float* lse, float* t_bar, const Device& device, Stream stream) {
  if (Status status = cpu::check_decode_problem(problem, device); !status.ok()) return status;
  if (problem.dtype == DType::kFloat64) {
    return Status::unsupported("dtype: CUDA kernels give o in bf16, fp16 or float32");
  }
  if (problem.batch * problem.q_len == 0) return {};
  if (Status status = check_state("state", state); !status.ok()) return status;
  FinalizeParams params = {{}, state, o, lse, t_bar};
  if (Status status = shape_of(problem, &params.shape); !status.ok()) return status;
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  const auto kernel = problem.dtype == DType::kFloat16    ? finalize_kernel<fp16>
                      : problem.dtype == DType::kBFloat16 ? finalize_kernel<bf16>
                                                          : finalize_kernel<float>;
  kernel<<<blocks_of(params.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return check_cuda(cudaGetLastError(), "finalize_state");
}

}  // namespace parallax
