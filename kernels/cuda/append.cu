// SPDX-License-Identifier: MIT
// append_kv() on CUDA: new keys and values into a contiguous or paged cache, as they are or in FP8,
// and the norm and rotation of q, r and k before it. Memory is the bound.
//
// A block takes a token or some of its heads; a group of lanes, a power of two within a warp, takes
// one of its heads, eight elements a lane. Where the head is rotated, a lane holds both halves of
// four pairs, else eight neighbours: the rotation stays in a lane and the norm's sum in a warp.
// Products are not contracted (-fmad=false), so that the CPU's append.cc, which sums in the same
// order, writes the same bits. What does not depend on positions is read before what does. A few
// tokens are bound by latency: blocks of theirs are small, so that they find room beside other
// kernels, as many as give each lane a thread, and while the stream's last kernel ends they ask for
// what they will need of memory, or, where that is settled, read it. Some more, up to a few an SM,
// take one large block each, which waits once. Many are bound by memory: as many blocks as an SM
// holds.
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>

#include "cpu/checks.h"
#include "cuda/early_launch.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "parallax/paged_kv.h"
#include "parallax/step.h"

namespace parallax {
namespace {

constexpr int kFewTokensThreads = 128, kSomeTokensThreads = 1024, kManyTokensThreads = 256;
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
  int blocks;     // of a token
  bool settled;   // positions, angles and pages
};

// The token of a block: number i of sequence b.
struct Token {
  std::int64_t b, i;
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

  int first, second;
};

__device__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ float to_float(fp16 x) { return __half2float(x); }
__device__ void round_to(float x, bf16* to) { *to = __float2bfloat16_rn(x); }
__device__ void round_to(float x, fp16* to) { *to = __float2half_rn(x); }
__device__ void round_to(float x, std::uint8_t* to) {
  *to = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// Four floats a multiple of 16 bytes into a table.
__device__ void load_floats(const float* from, float* to) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
}

// x / sqrt(mean(x^2) + eps) * gain over the lanes of a group; all of its lanes take part, those
// behind head_dim with zeros.
__device__ void normalise(const AppendParams& params, unsigned group, const float (&gain)[8],
                          float (&x)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
  for (int step = params.lanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(group, sum, step);
  }
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(params.head_dim) + params.eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * factor * gain[i];
}

__device__ void rotate(const float (&cos)[4], const float (&sin)[4], float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = x[i], high = x[4 + i];
    x[i] = low * cos[i] - high * sin[i];
    x[4 + i] = high * cos[i] + low * sin[i];
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
  const std::int64_t place = params.positions[token.b] + token.i;
  if (place < 0 || place >= params.capacity) return -1;
  Sequence sequence;
  sequence.batch_idx = token.b;
  const KvRows places = kv_rows(rows.to.batch_stride, rows.to.len_stride, params.pages, sequence);
  if (places.pages != nullptr) {
    const std::int32_t page = places.pages[place >> places.page_shift];
    if (page < 0 || page >= params.pages.num_pages) return -1;
  }
  return places.offset(place);
}

// One head of one token. The same for all lanes of a group but `lane`.
template <class T, bool kFewTokens>
__device__ void move_head(const AppendParams& params, const Rows& rows, const Token& token, int h,
                          int lane, unsigned group) {
  const T* source = static_cast<const T*>(rows.from.data) + token.b * rows.from.batch_stride +
                    token.i * rows.from.len_stride + h * rows.from.head_stride;
  const LaneElements elements(lane, params.head_dim, rows.head.rotate);
  const bool active = lane * kLaneElements < params.head_dim;
  Run<T, 8> words = {};
  const bool settled = kFewTokens && params.settled;
  if (active && !settled) words = elements.load(source);
  float gain[8] = {}, cos[4] = {}, sin[4] = {};
  if (active && rows.head.gain != nullptr) {
    load_floats(rows.head.gain + elements.first, gain);
    load_floats(rows.head.gain + elements.second, gain + 4);
  }
  if (rows.head.rotate) {
    const std::int32_t* angles = params.angles ? params.angles : params.positions;
    const std::int64_t angle = angles[token.b] + token.i;
    if (angle < 0 || angle >= params.num_angles) return;
    const std::int64_t at = angle * (params.head_dim / 2) + elements.first;
    if (active) load_floats(params.cos + at, cos);
    if (active) load_floats(params.sin + at, sin);
  }
  std::int64_t target = target_of(params, rows, token);
  if (target < 0) return;
  target += h * rows.to.head_stride;
  if (settled) {
    wait_for_last_kernel();
    if (active) words = elements.load(source);
  }
  if (rows.head.gain == nullptr && !rows.head.rotate && rows.scale == nullptr) {
    if (active) elements.store(words, static_cast<T*>(rows.to.data) + target);
    return;
  }
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(words.x[i]);
  if (rows.head.gain != nullptr) normalise(params, group, gain, x);
  if (rows.head.rotate) rotate(cos, sin, x);
  if (!active) return;
  if (rows.scale != nullptr) {
    write(elements, x, rows.scale[h], static_cast<std::uint8_t*>(rows.to.data) + target);
  } else {
    write(elements, x, 1.0f, static_cast<T*>(rows.to.data) + target);
  }
}

__device__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Asks for gains, angles and pages; a thread for each 128 bytes of a head's floats. Before the
// stream's last kernel has ended, positions may be about to change: nothing but speed hangs on them
// here.
__device__ void prefetch_tables(const AppendParams& params) {
  const auto token = blockIdx.x / static_cast<unsigned>(params.blocks * params.q_len);
  const int half = params.head_dim / 2;
  const int line = static_cast<int>(threadIdx.x) * 32;
  const auto floats = [line](const float* from, std::int64_t count) {
    if (from != nullptr && line < count) prefetch(from + line);
  };
  for (const Rows& rows : params.rows) floats(rows.head.gain, params.head_dim);
  const std::int64_t place = __ldcg(params.positions + token);
  const std::int64_t angle = params.angles ? __ldcg(params.angles + token) : place;
  if (params.cos != nullptr && angle >= 0 && angle < params.num_angles) {
    floats(params.cos + angle * half, half);
    floats(params.sin + angle * half, half);
  }
  if (params.pages.table != nullptr && place >= 0 && place < params.capacity) {
    const int page_shift = __ffsll(params.pages.page_size) - 1;
    prefetch(params.pages.table + token * params.pages.max_pages + (place >> page_shift));
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kManyTokensThreads ? 5 : 1024 / kThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
  start_next_kernel();
  if (kThreads == kFewTokensThreads && threadIdx.x < 8) prefetch_tables(params);
  constexpr bool kFewTokens = kThreads == kFewTokensThreads;
  if (!kFewTokens || !params.settled) wait_for_last_kernel();
  Token token;
  const unsigned blocks = kThreads == kFewTokensThreads ? params.blocks : 1;
  const unsigned n = blockIdx.x / blocks;
  token.b = n / static_cast<unsigned>(params.q_len);
  token.i = n % static_cast<unsigned>(params.q_len);
  const int lane = threadIdx.x & (params.lanes - 1);
  const unsigned group = (0xffffffffu >> (32 - params.lanes)) << ((threadIdx.x & 31) - lane);
  const int first = blockIdx.x % blocks * blockDim.x + threadIdx.x;
  for (int slot = first / params.lanes; slot < params.num_heads;
       slot += blocks * blockDim.x / params.lanes) {
    int h = slot;
    const Rows* rows = params.rows;
    for (; h >= rows->num_heads; ++rows) h -= rows->num_heads;
    move_head<T, kFewTokens>(params, *rows, token, h, lane, group);
  }
  // Where nothing was moved: what comes after this kernel comes after the last one too.
  if (kFewTokens && params.settled) wait_for_last_kernel();
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
  for (const auto& [name, floats] : {std::pair{"prologue.k.gain", prologue.k.gain},
                                     {"prologue.q.head.gain", prologue.q.head.gain},
                                     {"prologue.r.head.gain", prologue.r.head.gain},
                                     {"prologue.cos", prologue.cos},
                                     {"prologue.sin", prologue.sin}}) {
    if (reinterpret_cast<std::uintptr_t>(floats) % 16 == 0) continue;
    return Status::invalid_argument(std::string(name) +
                                    ": its address must be a multiple of 16 bytes");
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
      1,
      false,
  };
  for (Rows& rows : params.rows) {
    if (rows.from.data == nullptr) rows.num_heads = 0;
    params.num_heads += rows.num_heads;
  }
  while (params.lanes * kLaneElements < params.head_dim) params.lanes *= 2;
  return params;
}

template <int kThreads>
Status launch(DType dtype, AppendParams params, int tokens, const Device& device,
              cudaStream_t stream) {
  const std::int64_t wanted = (std::int64_t{params.num_heads} * params.lanes + 31) / 32 * 32;
  const auto threads = static_cast<int>(std::min<std::int64_t>(wanted, kThreads));
  if (kThreads == kFewTokensThreads) {
    params.blocks = static_cast<int>((wanted + threads - 1) / threads);
  }
  const auto kernel =
      dtype == DType::kFloat16 ? append_kernel<fp16, kThreads> : append_kernel<bf16, kThreads>;
  return check_cuda(launch_kernel(takes_hopper_kernels(device), kernel, tokens * params.blocks,
                                  threads, 0, stream, params),
                    "append_kv: launch");
}

Status append(const AttentionProblem& problem, const AppendArgs& args, bool settled,
              const Device& device, Stream stream) {
  const AttentionProblem shape = cpu::append_problem(problem, args);
  if (Status status = cpu::check_decode_problem(shape, device); !status.ok()) return status;
  if (Status status = cpu::check_pointers(shape, args); !status.ok()) return status;
  if (shape.dtype != DType::kBFloat16 && shape.dtype != DType::kFloat16) {
    return Status::unsupported("dtype: CUDA kernels take bf16 and fp16");
  }
  if (Status status = check_views(args); !status.ok()) return status;
  const std::int64_t tokens = shape.batch * shape.q_len;
  if (tokens == 0) return {};
  if (tokens > 0x7fffffff || shape.num_q_heads > (1 << 20)) {
    return Status::unsupported("append_kv: batch * q_len must stay below 2^31, heads at most 2^20");
  }
  AppendParams params = params_of(shape, args);
  params.settled = settled;
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  const auto run = 3 * tokens <= device.num_sms   ? launch<kFewTokensThreads>
                   : tokens <= 3 * device.num_sms ? launch<kSomeTokensThreads>
                                                  : launch<kManyTokensThreads>;
  return run(shape.dtype, params, static_cast<int>(tokens), device,
             static_cast<cudaStream_t>(stream));
}

}  // namespace

Status append_kv(const AttentionProblem& problem, const AppendArgs& args, const Device& device,
                 Stream stream) {
  return append(problem, args, /*settled=*/false, device, stream);
}

Status append_kv_settled(const AttentionProblem& problem, const AppendArgs& args,
                         const Device& device, Stream stream) {
  return append(problem, args, /*settled=*/true, device, stream);
}

}  // namespace parallax
