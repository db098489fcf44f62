// SPDX-License-Identifier: MIT
// An FP8 cache in 16 bits, for the forward (cpu/widen.h). Memory is the bound: a warp takes a
// token, a lane eight elements of k and of v at a time. Blocks share the tokens that some query
// sees of a sequence; the rest of the workspace stays as it was.
#include <cuda_fp8.h>

#include <algorithm>

#include "cpu/widen.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/widen.h"
#include "parallax/mask.h"
#include "parallax/paged_kv.h"

namespace parallax {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 8;
constexpr int kUnit = 8;  // elements of a lane

struct WidenParams {
  AttentionProblem problem;
  Sequences sequences;
  PageTable pages;
  ConstView k, v;  // the cache
  const float* k_scale;
  const float* v_scale;
  void* wide_k;  // [batch, kv_len, num_kv_heads, head_dim]
  void* wide_v;
};

template <class T>
__device__ uint4 widen_unit(uint2 unit, float scale) {
  uint4 wide;
  std::uint32_t* to = &wide.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = i < 2 ? unit.x : unit.y;
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> 16 * (i & 1));
    const float2 x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    to[i] = ptx::pack<T>(x.x * scale, x.y * scale);
  }
  return wide;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(const __grid_constant__ WidenParams params) {
  const AttentionProblem& problem = params.problem;
  const int head_units = static_cast<int>(problem.head_dim) / kUnit;
  const int units = static_cast<int>(problem.num_kv_heads) * head_units;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const auto step = static_cast<int>(gridDim.x) * kWarps;
  for (std::int64_t b = blockIdx.y; b < problem.batch; b += gridDim.y) {
    const Sequence sequence = sequence_at(problem, params.sequences, b);
    const Range seen = sequence.mask.keys({0, sequence.mask.q_len});
    const KvRows k = kv_rows(params.k.batch_stride, params.k.len_stride, params.pages, sequence);
    const KvRows v = kv_rows(params.v.batch_stride, params.v.len_stride, params.pages, sequence);
    for (std::int64_t j = std::int64_t{seen.begin} + first; j < seen.end; j += step) {
      // What is no page holds zeros, as the copy engine has it.
      const bool exists = k.pages == nullptr || static_cast<unsigned>(k.pages[j >> k.page_shift]) <
                                                    static_cast<unsigned>(params.pages.num_pages);
      const auto* k_token =
          static_cast<const std::uint8_t*>(params.k.data) + (exists ? k.offset(j) : 0);
      const auto* v_token =
          static_cast<const std::uint8_t*>(params.v.data) + (exists ? v.offset(j) : 0);
      const std::int64_t to = (b * problem.kv_len + j) * units;
#pragma unroll 4
      for (int unit = lane; unit < units; unit += 32) {
        const int head = unit / head_units;
        const int column = (unit - head * head_units) * kUnit;
        uint2 of_k = make_uint2(0, 0), of_v = make_uint2(0, 0);
        if (exists) {
          of_k = *reinterpret_cast<const uint2*>(k_token + head * params.k.head_stride + column);
          of_v = *reinterpret_cast<const uint2*>(v_token + head * params.v.head_stride + column);
        }
        static_cast<uint4*>(params.wide_k)[to + unit] =
            widen_unit<T>(of_k, __ldg(params.k_scale + head));
        static_cast<uint4*>(params.wide_v)[to + unit] =
            widen_unit<T>(of_v, __ldg(params.v_scale + head));
      }
    }
  }
}

// Rows that are read eight elements, 8 bytes, at a time.
Status check_cache(const char* name, const ConstView& view) {
  if (reinterpret_cast<std::uintptr_t>(view.data) % kUnit == 0 && view.batch_stride % kUnit == 0 &&
      view.len_stride % kUnit == 0 && view.head_stride % kUnit == 0) {
    return {};
  }
  return Status::invalid_argument(std::string(name) +
                                  ": its address must be a multiple of 8 bytes and its strides "
                                  "multiples of 8 elements");
}

}  // namespace

Status launch_widen(const AttentionProblem& problem, const ForwardArgs& args, void* memory,
                    const Device& device, cudaStream_t stream) {
  if (problem.kv_len == 0) return {};
  if (Status s = check_cache("k", args.k); !s.ok()) return s;
  if (Status s = check_cache("v", args.v); !s.ok()) return s;
  if (problem.num_kv_heads * problem.head_dim > (std::int64_t{1} << 30)) {
    return Status::unsupported("forward: num_kv_heads * head_dim must not exceed 2^30");
  }
  const ForwardArgs widened = cpu::widened_args(problem, args, memory);
  const WidenParams params = {problem,
                              args.sequences,
                              args.pages,
                              args.k,
                              args.v,
                              args.k_scale,
                              args.v_scale,
                              const_cast<void*>(widened.k.data),
                              const_cast<void*>(widened.v.data)};
  // As many blocks as the GPU holds, at least one a sequence.
  const std::int64_t blocks = std::int64_t{device.num_sms} * kBlocksPerSm;
  const std::int64_t wanted = (problem.kv_len + kWarps - 1) / kWarps;
  const dim3 grid(
      static_cast<unsigned>(std::clamp<std::int64_t>(blocks / problem.batch, 1, wanted)),
      static_cast<unsigned>(std::min<std::int64_t>(problem.batch, 65535)));
  const auto kernel = problem.dtype == DType::kFloat16 ? widen_kernel<fp16> : widen_kernel<bf16>;
  kernel<<<grid, kThreads, 0, stream>>>(params);
  return check_cuda(cudaGetLastError(), "forward: launch of widen");
}

}  // namespace parallax
