// SPDX-License-Identifier: MIT
// What the portable kernels are made of, on every GPU from compute capability 8.0 on: tiles of rows
// in shared memory, filled by asynchronous copies, read as fragments of mma.sync m16n8k16, and the
// products themselves. PTX ISA 9.0, https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/element.h"
#include "cuda/ptx.cuh"
#include "parallax/mask.h"

namespace parallax::mma {

// Copies 16 bytes to shared memory, or writes zeros and reads nothing.
__device__ __forceinline__ void copy_or_clear(std::uint32_t destination, const void* source,
                                              bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(there ? 16 : 0)
               : "memory");
}

// Copies 16 bytes, or zeros where `there` is false, by a predicate instead of by a size: no cache
// policy beside it, for which ptxas 13.0 writes instructions that do not exist.
__device__ __forceinline__ void copy_if(std::uint32_t destination, const void* source, bool there) {
  asm volatile(
      "{\n\t.reg .pred absent;\n\tsetp.eq.s32 absent, %2, 0;\n\t"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;\n\t}" ::"r"(destination),
      "l"(source), "r"(static_cast<int>(there))
      : "memory");
}

// Copies the first `bytes` of 16, and zeros for the rest.
__device__ __forceinline__ void copy_async(std::uint32_t destination, const void* source,
                                           int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(bytes)
               : "memory");
}

// Copies of a thread since the last call are a group; waits for all but its kOpen youngest groups.
__device__ __forceinline__ void close_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wait_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Waits for all copies of this thread.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sums += a b, a of 16 x 16 and b of 16 x 8 elements. Lane l holds rows l / 4 (sums 0, 1) and
// l / 4 + 8 (sums 2, 3) of columns 2 (l % 4) and the next.
template <class T>
__device__ __forceinline__ void multiply(float* sums, const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
// Two e4m3 numbers, each the upper byte of a half word, as fp16: bits in place are 2^-8 of it.
__device__ __forceinline__ std::uint32_t widen_two(std::uint32_t word) {
  const std::uint32_t bits = (word & 0x80008000u) | (word >> 1 & 0x3f803f80u);
  const __half2 x = *reinterpret_cast<const __half2*>(&bits);
  // Of the NaN, 480, and of no number (448 at most) the product is infinity, and its zeroth is NaN.
  const __half2 beyond = __hmul2(x, __float2half2_rn(146.0f * 256.0f));
  const __half2 wide =
      __hfma2(beyond, __float2half2_rn(0.0f), __hmul2(x, __float2half2_rn(256.0f)));
  return *reinterpret_cast<const std::uint32_t*>(&wide);
}

// Four e4m3 numbers as two words of two fp16 numbers each, exactly.
__device__ __forceinline__ uint2 widen(std::uint32_t word) {
  return {widen_two(__byte_perm(word, 0, 0x1404)), widen_two(__byte_perm(word, 0, 0x3424))};
}
#else
// Four e4m3 numbers as two words of two fp16 numbers each, exactly.
__device__ __forceinline__ uint2 widen(std::uint32_t word) {
  uint2 wide;
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
      : "=r"(wide.x), "=r"(wide.y)
      : "r"(word));
  return wide;
}
#endif

// Rows of kHeadDim elements in shared memory, aligned to 1024 bytes. The 16-byte chunks of a row
// change places with the row's last three bits, so that a column of eight rows meets no bank twice.
template <int kHeadDim>
struct Rows {
  static constexpr int kBytes = 2 * kHeadDim;
  static constexpr int kChunks = kHeadDim / 8;

  // Where this lane's row begins in a fragment at `tile`, by the order of its four 8x8 matrices:
  // below each other first (operand a, or a transposed b), or beside each other first (b).
  static __device__ __forceinline__ std::uint32_t down(std::uint32_t tile) {
    const int lane = ptx::thread_index() & 31;
    return tile + (lane & 15) * kBytes + (((lane >> 4) ^ (lane & 7)) << 4);
  }
  static __device__ __forceinline__ std::uint32_t across(std::uint32_t tile) {
    const int lane = ptx::thread_index() & 31;
    const int row = (lane & 7) + (lane >> 4 << 3);
    return tile + row * kBytes + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
  }
  // The same, `rows` rows (a multiple of 8) and 16 `columns` further.
  static __device__ __forceinline__ std::uint32_t at(std::uint32_t start, int rows, int columns) {
    return (start ^ (columns << 5)) + rows * kBytes;
  }

  // Copies kRows rows. Row n comes from source + offset(n) and lies in row place(n), which shares
  // its last three bits; rows outside `present` and columns from head_dim on become zeros.
  template <int kRows, int kThreads, class T, class Offset, class Place>
  static __device__ __forceinline__ void copy(std::uint32_t tile, const T* source, int head_dim,
                                              Range present, const Offset& offset,
                                              const Place& place) {
    static_assert(kThreads % kChunks == 0 && kRows * kChunks % kThreads == 0);
    const int thread = ptx::thread_index();
    const int chunk = thread % kChunks;
    const int first = thread / kChunks;
    if (8 * chunk >= head_dim) present = {};
#pragma unroll
    for (int n = first; n < kRows + first; n += kThreads / kChunks) {
      const bool there = n >= present.begin && n < present.end;
      const T* from = there ? source + offset(n) + 8 * chunk : source;
      copy_or_clear(tile + place(n) * kBytes + ((chunk ^ (n & 7)) << 4), from, there);
    }
  }
};

}  // namespace parallax::mma
