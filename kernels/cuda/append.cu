// SPDX-License-Identifier: MIT
// append_kv() on CUDA: new keys and values into a contiguous or paged cache, as they are or in FP8,
// and the norm and rotation of q, r and k before it. Memory is the bound.
//
// One block takes a token; a group of lanes, a power of two within a warp, takes one of its heads,
// eight elements a lane. Where the head is rotated, a lane holds both halves of four pairs, else
// eight neighbours: the rotation stays in a lane and the norm's sum in a warp. Products are not
// contracted (-fmad=false), so that the CPU's append.cc, which sums in the same order, writes the
// same bits.
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>

#include "cpu/checks.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "parallax/paged_kv.h"

namespace parallax {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kLaneElements = 8;

// One of k, v, q and r: where its rows come from and go to, and what happens to them on the way.
struct Rows {
  ConstView from;
  View to;
  HeadPrologue head;
  const float* scale;  // of an FP8 cache
  int num_heads;       // 0: absent
  bool cached;         // `to` is a cache
};

struct AppendParams {
  Rows rows[4];
  const std::int32_t* positions;
  const std::int32_t* angles;
  PageTable pages;
  const float* cos;
  const float* sin;
  std::int64_t num_angles;
  std::int64_t capacity;
  float eps;
  int q_len;
  int head_dim;
  int num_heads;  // of all rows
  int lanes;      // of a group
};

// The token of a block.
struct Token {
  std::int64_t b, i, place, angle;
};

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Run {
  T x[kSize];
};

// What a lane holds of a row: elements [first, first + 4) and [second, second + 4).
struct LaneElements {
  __device__ LaneElements(int lane, int head_dim, bool rotate)
      : first(lane * (rotate ? 4 : 8)), second(rotate ? first + head_dim / 2 : first + 4) {}

  template <class T>
  __device__ Run<T, 8> load(const T* row) const {
    if (second == first + 4) return *reinterpret_cast<const Run<T, 8>*>(row + first);
    const auto low = *reinterpret_cast<const Run<T, 4>*>(row + first);
    const auto high = *reinterpret_cast<const Run<T, 4>*>(row + second);
    Run<T, 8> both;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      both.x[i] = low.x[i];
      both.x[4 + i] = high.x[i];
    }
    return both;
  }

  template <class T>
  __device__ void store(const Run<T, 8>& both, T* row) const {
    if (second == first + 4) {
      *reinterpret_cast<Run<T, 8>*>(row + first) = both;
      return;
    }
    Run<T, 4> low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low.x[i] = both.x[i];
      high.x[i] = both.x[4 + i];
    }
    *reinterpret_cast<Run<T, 4>*>(row + first) = low;
    *reinterpret_cast<Run<T, 4>*>(row + second) = high;
  }

  // f(index in the lane, index in the row)
  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(i, first + i);
#pragma unroll
    for (int i = 0; i < 4; ++i) f(4 + i, second + i);
  }

  int first, second;
};

__device__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ float to_float(fp16 x) { return __half2float(x); }
__device__ void round_to(float x, bf16* to) { *to = __float2bfloat16_rn(x); }
__device__ void round_to(float x, fp16* to) { *to = __float2half_rn(x); }
__device__ void round_to(float x, std::uint8_t* to) {
  *to = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// x / sqrt(mean(x^2) + eps) * gain over the lanes of a group; all of its lanes take part, those
// behind head_dim with zeros.
__device__ void normalise(const AppendParams& params, const float* gain, unsigned group,
                          const LaneElements& elements, bool active, float (&x)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
  for (int step = params.lanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(group, sum, step);
  }
  if (!active) return;
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(params.head_dim) + params.eps);
  elements.for_each([&](int i, int d) { x[i] = x[i] * factor * gain[d]; });
}

__device__ void rotate(const AppendParams& params, std::int64_t angle, int first, float (&x)[8]) {
  const std::int64_t row = angle * (params.head_dim / 2) + first;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float c = params.cos[row + i], s = params.sin[row + i];
    const float low = x[i], high = x[4 + i];
    x[i] = low * c - high * s;
    x[4 + i] = high * c + low * s;
  }
}

template <class To>
__device__ void write(const LaneElements& elements, const float (&x)[8], float scale, To* row) {
  Run<To, 8> rounded;
#pragma unroll
  for (int i = 0; i < 8; ++i) round_to(x[i] / scale, &rounded.x[i]);
  elements.store(rounded, row);
}

// Where the token's head 0 goes; negative: nowhere.
__device__ std::int64_t target_of(const AppendParams& params, const Rows& rows,
                                  const Token& token) {
  if (!rows.cached) return token.b * rows.to.batch_stride + token.i * rows.to.len_stride;
  if (token.place < 0 || token.place >= params.capacity) return -1;
  Sequence sequence;
  sequence.batch_idx = token.b;
  const KvRows places = kv_rows(rows.to.batch_stride, rows.to.len_stride, params.pages, sequence);
  if (places.pages != nullptr) {
    const std::int32_t page = places.pages[token.place >> places.page_shift];
    if (page < 0 || page >= params.pages.num_pages) return -1;
  }
  return places.offset(token.place);
}

// One head of one token. The same for all lanes of a group but `lane`.
template <class T>
__device__ void move_head(const AppendParams& params, const Rows& rows, const Token& token, int h,
                          int lane, unsigned group) {
  std::int64_t target = target_of(params, rows, token);
  if (target < 0) return;
  if (rows.head.rotate && (token.angle < 0 || token.angle >= params.num_angles)) return;
  target += h * rows.to.head_stride;
  const T* source = static_cast<const T*>(rows.from.data) + token.b * rows.from.batch_stride +
                    token.i * rows.from.len_stride + h * rows.from.head_stride;
  const LaneElements elements(lane, params.head_dim, rows.head.rotate);
  const bool active = lane * kLaneElements < params.head_dim;
  Run<T, 8> words = {};
  if (active) words = elements.load(source);
  if (rows.head.gain == nullptr && !rows.head.rotate && rows.scale == nullptr) {
    if (active) elements.store(words, static_cast<T*>(rows.to.data) + target);
    return;
  }
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(words.x[i]);
  if (rows.head.gain != nullptr) {
    normalise(params, rows.head.gain, group, elements, active, x);
  }
  if (!active) return;
  if (rows.head.rotate) rotate(params, token.angle, elements.first, x);
  if (rows.scale != nullptr) {
    write(elements, x, rows.scale[h], static_cast<std::uint8_t*>(rows.to.data) + target);
  } else {
    write(elements, x, 1.0f, static_cast<T*>(rows.to.data) + target);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
  Token token;
  token.b = blockIdx.x / static_cast<unsigned>(params.q_len);
  token.i = blockIdx.x % static_cast<unsigned>(params.q_len);
  token.place = params.positions[token.b] + token.i;
  token.angle = params.angles ? params.angles[token.b] + token.i : token.place;
  const int lane = threadIdx.x & (params.lanes - 1);
  const unsigned group = (0xffffffffu >> (32 - params.lanes)) << ((threadIdx.x & 31) - lane);
  for (int slot = threadIdx.x / params.lanes; slot < params.num_heads;
       slot += blockDim.x / params.lanes) {
    int h = slot;
    const Rows* rows = params.rows;
    for (; h >= rows->num_heads; ++rows) h -= rows->num_heads;
    move_head<T>(params, *rows, token, h, lane, group);
  }
}

Status check_view(const char* name, const void* data, std::int64_t batch_stride,
                  std::int64_t len_stride, std::int64_t head_stride) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && batch_stride % 8 == 0 &&
                       len_stride % 8 == 0 && head_stride % 8 == 0;
  if (aligned) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": its address must be a multiple of 16 bytes and its strides "
                                  "multiples of 8 elements");
}

template <class AnyView>
Status check_view(const char* name, const AnyView& view) {
  return check_view(name, view.data, view.batch_stride, view.len_stride, view.head_stride);
}

Status check_views(const AppendArgs& args) {
  const AppendPrologue& prologue = args.prologue;
  for (const auto& [name, view] : {std::pair{"k", args.k},
                                   {"v", args.v},
                                   {"prologue.q.in", prologue.q.in},
                                   {"prologue.r.in", prologue.r.in}}) {
    if (Status status = check_view(name, view); !status.ok()) return status;
  }
  for (const auto& [name, view] : {std::pair{"k_cache", args.k_cache},
                                   {"v_cache", args.v_cache},
                                   {"prologue.q.out", prologue.q.out},
                                   {"prologue.r.out", prologue.r.out}}) {
    if (Status status = check_view(name, view); !status.ok()) return status;
  }
  return {};
}

AppendParams params_of(const AttentionProblem& problem, const AppendArgs& args) {
  const AppendPrologue& prologue = args.prologue;
  const int q_heads = static_cast<int>(problem.num_q_heads);
  const int kv_heads = static_cast<int>(problem.num_kv_heads);
  AppendParams params = {
      {{args.k, args.k_cache, prologue.k, args.k_scale, kv_heads, true},
       {args.v, args.v_cache, {}, args.v_scale, kv_heads, true},
       {prologue.q.in, prologue.q.out, prologue.q.head, nullptr, q_heads, false},
       {prologue.r.in, prologue.r.out, prologue.r.head, nullptr, q_heads, false}},
      args.positions,
      prologue.angles,
      args.pages,
      prologue.cos,
      prologue.sin,
      prologue.num_angles,
      problem.kv_len,
      static_cast<float>(prologue.eps),
      static_cast<int>(problem.q_len),
      static_cast<int>(problem.head_dim),
      0,
      1,
  };
  for (Rows& rows : params.rows) {
    if (rows.from.data == nullptr) rows.num_heads = 0;
    params.num_heads += rows.num_heads;
  }
  while (params.lanes * kLaneElements < params.head_dim) params.lanes *= 2;
  return params;
}

}  // namespace

Status append_kv(const AttentionProblem& problem, const AppendArgs& args, const Device& device,
                 Stream stream) {
  const AttentionProblem shape = cpu::append_problem(problem, args);
  if (Status status = cpu::check_decode_problem(shape, device); !status.ok()) return status;
  if (Status status = cpu::check_pointers(shape, args); !status.ok()) return status;
  if (shape.dtype != DType::kBFloat16 && shape.dtype != DType::kFloat16) {
    return Status::unsupported("dtype: CUDA kernels take bf16 and fp16");
  }
  if (Status status = check_views(args); !status.ok()) return status;
  const std::int64_t tokens = shape.batch * shape.q_len;
  if (tokens == 0) return {};
  if (tokens > 0x7fffffff || shape.num_q_heads > (1 << 28)) {
    return Status::unsupported("append_kv: batch * q_len must stay below 2^31");
  }
  const AppendParams params = params_of(shape, args);
  const std::int64_t wanted = (std::int64_t{params.num_heads} * params.lanes + 31) / 32 * 32;
  const auto threads = static_cast<unsigned>(std::min<std::int64_t>(wanted, kMaxThreads));
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  const auto kernel = shape.dtype == DType::kFloat16 ? append_kernel<fp16> : append_kernel<bf16>;
  kernel<<<static_cast<unsigned>(tokens), threads, 0, cuda_stream>>>(params);
  return check_cuda(cudaGetLastError(), "append_kv");
}

}  // namespace parallax
