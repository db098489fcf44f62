// SPDX-License-Identifier: MIT
// Products of a few rows of x with a weight w that is read once (docs/kernels.md). Memory is the
// bound, and what lies between one kernel and the next.
//
// A CTA takes one or two groups of eight rows of w, its warps take the columns in turn. A lane
// holds its part of them in registers, all of it on its way at once, and asks for it before it
// waits for the kernel that makes x. The order of columns within a product is free, so its
// fragments are 16 bytes of a row of w and 16 of a row of x as they lie in memory.
//
// Tensor-core products m16n8k16: the four words of w that a lane loads are operand a as they are,
// words 0 and 2 in row g of the product, 1 and 3 in row g + 8. One product with words 0 and 2 of x
// is right in row g, one with words 1 and 3 in row g + 8, and their other halves are dropped: that
// costs products, which are idle anyway, and not one move between registers. Rows of x are the
// columns.
//
// The norm's factor is a row's own and is applied after the product: a warp needs no other warp's
// part of x before it multiplies. With SwiGLU the groups are rows of gate and of up: both sums are
// then in one thread.
#pragma once

#include <algorithm>

#include "cuda/early_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/schedule.h"
#include "parallax/step.h"

namespace parallax {

constexpr int kGroupRows = 8;     // of w
constexpr int kTileRows = 8;      // of x: columns of a tensor-core product
constexpr int kStepColumns = 32;  // of w: four lanes have 8 each
constexpr int kLoads = 16;        // of 16 bytes of w that a lane has on their way
constexpr int kMaxWarps = 8;

struct FewRowsParams {
  FewRowsArgs args;
  FewRowsForm form;
  int rows;
  int in;
  int out;
  int w_rows;
  float one_over_in;
  int rounds;        // over all warps' columns
  int advance;       // w's rows from one CTA's first group to the next one's
  int second_group;  // w's rows from a CTA's first group to its second
};

template <int kTiles, int kGroups>
struct FewRowsShape {
  static constexpr int kSteps = kLoads / kGroups;  // of a warp in a round
  static constexpr int kFinishing = kTiles;        // warps
  static constexpr int kColumns = kSteps * kStepColumns;
  static constexpr int kChunks = kColumns / (8 * 32);  // of 16 bytes of a row of x, a lane
  // An odd multiple of 64: two neighbouring rows' chunks lie in different banks.
  static constexpr int kStagedRowBytes = 2 * kColumns + 64;

  // What a CTA shares: a stage of x for each warp, sums of each, sums of squares of each; where it
  // takes turns, sums of another turn.
  __host__ __device__ static constexpr int stage_bytes(int rows) { return rows * kStagedRowBytes; }
  __host__ __device__ static constexpr int shared_bytes(int warps, int rows) {
    return warps * (stage_bytes(rows) + kTiles * (kGroups * 32 * 8 + kTileRows * 4));
  }
  __host__ __device__ static constexpr int turn_bytes(int warps) {
    return warps * kTiles * kGroups * 32 * 8;
  }
};

// 16 bytes that are read once and stay in no cache, or zeros.
__device__ __forceinline__ uint4 load_weight(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@there ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return x;
}

template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_float(fp16 x) {
  return __half2float(x);
}
template <class T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ bf16 rounded(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 rounded(float x) {
  return __float2half_rn(x);
}

// 16 bytes of a row of x in the order of operand b: words 0, 2, 1, 3.
__device__ __forceinline__ uint4 in_order(uint4 x) { return {x.x, x.z, x.y, x.w}; }

// The same of x gain. Adds x^2 to *squares.
template <class T>
__device__ __forceinline__ uint4 in_order(uint4 x, uint4 gain, float* squares) {
  const auto two = [squares](std::uint32_t word, std::uint32_t gains) {
    const float2 a = ptx::unpack<T>(word), b = ptx::unpack<T>(gains);
    *squares = fmaf(a.x, a.x, fmaf(a.y, a.y, *squares));
    return ptx::pack<T>(a.x * b.x, a.y * b.y);
  };
  return in_order({two(x.x, gain.x), two(x.y, gain.y), two(x.z, gain.z), two(x.w, gain.w)});
}

// Asks for memory, a multiple of 16 bytes and aligned to 16, into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from, std::uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// This CTA's share of what is read next; each warp asks for a part.
__device__ __forceinline__ void prefetch_next(const FewRowsArgs& args) {
  if (args.next == nullptr || threadIdx.x % 32 != 0) return;
  const unsigned warps = blockDim.x / 32;
  const std::int64_t share = (args.next_bytes / (gridDim.x * warps) + 128) / 128 * 128;
  const std::int64_t first = (blockIdx.x * warps + threadIdx.x / 32) * share;
  const std::int64_t bytes = min(share, args.next_bytes - first) / 16 * 16;
  if (bytes > 0) {
    prefetch(static_cast<const char*>(args.next) + first, static_cast<std::uint32_t>(bytes));
  }
}

// One warp's part of a CTA's work.
template <class T, int kTiles, int kGroups>
struct FewRowsWarp {
  using Shape = FewRowsShape<kTiles, kGroups>;

  const FewRowsParams& params;
  std::uint8_t* stage;
  float* squares;  // of each row of x
  int lane;
  const T* w[kGroups];  // this lane's row, at its first column

  uint4 weight[Shape::kSteps][kGroups];
  uint4 gain[Shape::kChunks];
  float sums[kTiles][kGroups][2][4];  // of products with words 0 and 2, with 1 and 3

  // Step j's part of the columns from `column` on.
  __device__ __forceinline__ void load_step(int j, int column) {
    const bool there = column + 8 * (lane % 4) + j * kStepColumns < params.in;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      weight[j][n] = load_weight(w[n] + column + j * kStepColumns, there);
    }
  }

  // What no earlier kernel writes.
  __device__ __forceinline__ void load_weights(int column) {
#pragma unroll
    for (int j = 0; j < Shape::kSteps; ++j) load_step(j, column);
    if (params.args.gain == nullptr) return;
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int k = column + 8 * (lane + 32 * i);
      gain[i] = load_weight(static_cast<const T*>(params.args.gain) + k, k < params.in);
    }
  }

  // The warp's columns of all rows of x to its stage, by the gain if there is one.
  __device__ __forceinline__ void stage_rows(int column) {
    const T* x = static_cast<const T*>(params.args.x);
    std::uint8_t* const mine = stage + 16 * lane;
#pragma unroll 1
    for (int row = 0; row < params.rows; ++row) {
      const std::uint32_t to = ptx::shared_address(mine + row * Shape::kStagedRowBytes);
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        const int k = column + 8 * (lane + 32 * i);
        const bool there = k < params.in;
        mma::copy_or_clear(to + 512 * i, there ? x + row * params.args.x_stride + k : x, there);
      }
    }
    mma::wait_copies();
    const bool normed = params.args.gain != nullptr;
#pragma unroll 1
    for (int row = 0; row < params.rows; ++row) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        auto* chunk = reinterpret_cast<uint4*>(mine + row * Shape::kStagedRowBytes + 512 * i);
        *chunk = normed ? in_order<T>(*chunk, gain[i], &sum) : in_order(*chunk);
      }
      if (!normed) continue;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) squares[row] += sum;
    }
    __syncwarp();
  }

  // after_step(j): step j's weights may make way for others.
  template <class AfterStep>
  __device__ __forceinline__ void multiply(const AfterStep& after_step) {
    const int g = lane / 4;
    const std::uint8_t* row = stage + g * Shape::kStagedRowBytes + 16 * (lane % 4);
#pragma unroll
    for (int j = 0; j < Shape::kSteps; ++j) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint4 x = {0, 0, 0, 0};
        if (m * kTileRows + g < params.rows) {
          x = *reinterpret_cast<const uint4*>(row + m * kTileRows * Shape::kStagedRowBytes +
                                              64 * j);
        }
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          const uint4& w = weight[j][n];
          mma::multiply<T>(sums[m][n][0], {w.x, w.y, w.z, w.w}, x.x, x.y);
          mma::multiply<T>(sums[m][n][1], {w.x, w.y, w.z, w.w}, x.z, x.w);
        }
      }
      after_step(j);
    }
  }

  // The sums of w's row g with x's rows 2 t and 2 t + 1 of the tile.
  __device__ __forceinline__ float2 total(int m, int n) const {
    const auto& [even, odd] = sums[m][n];
    return {even[0] + odd[2], even[1] + odd[3]};
  }
};

// A CTA up to its sums.
template <class T, int kTiles, int kGroups>
struct FewRowsCta {
  using Warp = FewRowsWarp<T, kTiles, kGroups>;
  using Shape = typename Warp::Shape;

  // `shared`: Shape::shared_bytes(). Asks for the weights of the groups that begin at w's rows
  // first_row and first_row + params.second_group.
  __device__ __forceinline__ FewRowsCta(const FewRowsParams& p, std::uint8_t* shared, int first_row)
      : params(p),
        warp(static_cast<int>(threadIdx.x) / 32),
        warps(static_cast<int>(blockDim.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        all_sums(reinterpret_cast<float2*>(shared + warps * Shape::stage_bytes(p.rows))),
        all_squares(all_sums + warps * kTiles * kGroups * 32),
        work{p, shared + warp * Shape::stage_bytes(p.rows),
             reinterpret_cast<float*>(all_squares + warp * kTiles * kTileRows / 2), lane} {
    go_to(first_row);
    work.load_weights(warp * Shape::kColumns);
    clear_sums();
    if (lane < kTiles * kTileRows) work.squares[lane] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void go_to(int first_row) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      // Rows behind the last are read as the last; their sums are for nobody.
      const int row = min(first_row + n * params.second_group + g(), params.w_rows - 1);
      work.w[n] = static_cast<const T*>(params.args.w) + row * params.args.w_stride + 8 * t();
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kTiles * kGroups * 8; ++i) {
      work.sums[i / (8 * kGroups)][i / 8 % kGroups][i / 4 % 2][i % 4] = 0;
    }
  }

  __device__ __forceinline__ int g() const { return lane / 4; }
  __device__ __forceinline__ int t() const { return lane % 4; }
  // Warp m finishes tile m of x's rows: this lane rows x_row() and the next.
  __device__ __forceinline__ bool finishes() const { return warp < kTiles; }
  __device__ __forceinline__ int x_row() const { return warp * kTileRows + 2 * t(); }

  // Once x is there. In warps that finish, result[2 n + i] becomes the product of w's row g() of
  // group n and x's row x_row() + i.
  __device__ __forceinline__ void multiply(float (&result)[2 * kGroups]) {
#pragma unroll 1
    for (int round = 0;;) {
      work.stage_rows((round * warps + warp) * Shape::kColumns);
      work.multiply([](int) {});
      if (++round == params.rounds) break;
      __syncwarp();
      work.load_weights((round * warps + warp) * Shape::kColumns);
    }
    finish(result, all_sums);
  }

  // The same turn by turn, where one round is all: x is staged in turn 0 and stays. The weights of
  // the next turn's groups, from next_row on (below 0: there are none), are asked for as those of
  // this one are used up.
  __device__ __forceinline__ void multiply(float (&result)[2 * kGroups], int turn, int next_row) {
    const int column = warp * Shape::kColumns;
    if (turn == 0) work.stage_rows(column);
    if (turn > 0) clear_sums();
    if (next_row >= 0) go_to(next_row);
    work.multiply([&](int step) {
      if (next_row >= 0) work.load_step(step, column);
    });
    // Who reads a turn's sums comes to the next barrier after that, and then another turn's may lie
    // there.
    finish(result, turn % 2 == 0 ? all_sums : all_squares + warps * kTiles * kTileRows / 2);
  }

  // Sums over the warps, by way of `turn_sums`.
  __device__ __forceinline__ void finish(float (&result)[2 * kGroups], float2* turn_sums) {
#pragma unroll
    for (int i = 0; i < kTiles * kGroups; ++i) {
      turn_sums[(warp * kTiles * kGroups + i) * 32 + lane] = work.total(i / kGroups, i % kGroups);
    }
    __syncthreads();
    if (!finishes()) return;
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) result[i] = 0;
    float2 squares = {0, 0};
#pragma unroll 4
    for (int from = 0; from < warps; ++from) {
      const int tile = from * kTiles + warp;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const float2 part = turn_sums[(tile * kGroups + n) * 32 + lane];
        result[2 * n] += part.x;
        result[2 * n + 1] += part.y;
      }
      const float2 part = all_squares[tile * kTileRows / 2 + t()];
      squares.x += part.x;
      squares.y += part.y;
    }
    if (params.args.gain == nullptr) return;
    const float eps = static_cast<float>(params.args.eps);
    const float factors[2] = {rsqrtf(squares.x * params.one_over_in + eps),
                              rsqrtf(squares.y * params.one_over_in + eps)};
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) result[i] *= factors[i % 2];
  }

  const FewRowsParams& params;
  int warp, warps, lane;
  float2* all_sums;     // [warps][kTiles][kGroups][32]
  float2* all_squares;  // [warps][kTiles][4]
  Warp work;
};

// Shares the columns out to warps. -> how many a CTA has, of `most_warps`.
template <class Shape>
int share_columns(FewRowsParams* params, int most_warps) {
  const int slices = ceil_div(params->in, Shape::kColumns);
  params->rounds = ceil_div(slices, most_warps);
  return std::max(ceil_div(slices, params->rounds), Shape::kFinishing);
}

}  // namespace parallax
