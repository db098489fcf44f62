// SPDX-License-Identifier: MIT
// Warpgroup matrix products of sm_90a: D[64, N] (+)= A[64, 16] B[16, N], 16-bit in, float sums.
//
// A warpgroup issues a batch between fence() and commit(); after wait() the sums are its own again.
// D: a thread holds rows g and g + 8 of its warp's 16-row slab (g = lane / 4): d[4 i + e] is row g,
// d[4 i + 2 + e] row g + 8, both of column 8 i + 2 (lane % 4) + e. An A operand from registers has
// the same mapping, two elements a word: {d[0], d[1]}, {d[2], d[3]}, {d[4], d[5]}, {d[6], d[7]}.
//
// Shared operands are named by the low word of a descriptor of 128-byte-swizzled memory: rows of 64
// elements (128 bytes) in atoms of 8 rows (1 KiB), as a tensor copy with SWIZZLE_128B leaves them.
//   K-major (the product's depth runs along rows; not transposed): + 32 bytes per 16 of depth; the
//     leading offset is not used.
//   MN-major (transposed; rows run along the depth): + 2048 bytes per 16 of depth; the leading
//     offset is the distance in bytes from one 64-column panel to the next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace parallax::wgmma {

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed batches are in flight.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the sums across a wait().
template <int kCount>
__device__ __forceinline__ void settle(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What the sums held is not needed any more: the next product starts from zero.
template <int kCount>
__device__ __forceinline__ void forget(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(sums[i]));
}

// Low word of a descriptor: the shared address and the leading offset in units of 16 bytes. The
// high word, 128-byte swizzle and 1 KiB from one 8-row atom to the next, is always the same.
__device__ __forceinline__ std::uint32_t descriptor(std::uint32_t address,
                                                    std::uint32_t leading_bytes = 16) {
  return ((address & 0x3ffff) >> 4) | ((leading_bytes >> 4) << 16);
}

// Products<T, N>: shared_a takes A from shared memory, register_a from registers. The sums start
// from zero where `accumulate` is false. kSignA = -1 subtracts the product.
template <class T, int N>
struct Products;

// clang-format off
#define PARALLAX_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PARALLAX_R1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PARALLAX_R2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PARALLAX_R3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PARALLAX_R4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PARALLAX_R5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PARALLAX_R6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PARALLAX_R7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PARALLAX_R8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PARALLAX_R9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PARALLAX_R10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PARALLAX_R11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PARALLAX_R12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PARALLAX_R13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define PARALLAX_R14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define PARALLAX_R15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PARALLAX_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]),                 \
                      "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// The sums are asm operands 0 .. N/2 - 1; i0 ..: the numbers of the operands that follow them.
#define PARALLAX_WGMMA(N, T, TYPE, i0, i1, i2, i3, i4, i5, i6, i7)                                \
  template <>                                                                                     \
  struct Products<T, N> {                                                                         \
    template <int kTransposeA = 0, int kTransposeB = 0, int kSignA = 1>                           \
    static __device__ __forceinline__ void shared_a(float (&d)[N / 2], std::uint32_t a,           \
                                                    std::uint32_t b, bool accumulate) {           \
      asm volatile(                                                                               \
          "{\n.reg .pred p;\n.reg .b64 x, y;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                      \
          "mov.b64 x, {%" #i0 ", 0x40000040};\nmov.b64 y, {%" #i1 ", 0x40000040};\n"              \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"                    \
          PARALLAX_REGISTERS_##N "}, "                                                            \
          "x, y, p, %" #i3 ", 1, %" #i4 ", %" #i5 ";\n}"                                          \
          : PARALLAX_SUMS_##N                                                                     \
          : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)), "n"(kSignA), "n"(kTransposeA),     \
            "n"(kTransposeB));                                                                    \
    }                                                                                             \
    template <int kTransposeB = 0, int kSignA = 1>                                                \
    static __device__ __forceinline__ void register_a(float (&d)[N / 2], std::uint32_t a0,        \
                                                      std::uint32_t a1, std::uint32_t a2,         \
                                                      std::uint32_t a3, std::uint32_t b,          \
                                                      bool accumulate) {                          \
      asm volatile(                                                                               \
          "{\n.reg .pred p;\n.reg .b64 y;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                         \
          "mov.b64 y, {%" #i4 ", 0x40000040};\n"                                                  \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"                    \
          PARALLAX_REGISTERS_##N "}, "                                                            \
          "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, y, p, %" #i6 ", 1, %" #i7 ";\n}"             \
          : PARALLAX_SUMS_##N                                                                     \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "r"(static_cast<int>(accumulate)),        \
            "n"(kSignA), "n"(kTransposeB));                                                       \
    }                                                                                             \
  };
#define PARALLAX_WGMMA_N(N, ...)                                                                  \
  PARALLAX_WGMMA(N, __nv_bfloat16, "bf16", __VA_ARGS__)                                           \
  PARALLAX_WGMMA(N, __half, "f16", __VA_ARGS__)

#define PARALLAX_REGISTERS_8 "%0, %1, %2, %3"
#define PARALLAX_SUMS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PARALLAX_REGISTERS_32 PARALLAX_R0 PARALLAX_R1
#define PARALLAX_SUMS_32 PARALLAX_D(0), PARALLAX_D(8)
#define PARALLAX_REGISTERS_48 PARALLAX_REGISTERS_32 PARALLAX_R2
#define PARALLAX_SUMS_48 PARALLAX_SUMS_32, PARALLAX_D(16)
#define PARALLAX_REGISTERS_64 PARALLAX_REGISTERS_48 PARALLAX_R3
#define PARALLAX_SUMS_64 PARALLAX_SUMS_48, PARALLAX_D(24)
#define PARALLAX_REGISTERS_80 PARALLAX_REGISTERS_64 PARALLAX_R4
#define PARALLAX_SUMS_80 PARALLAX_SUMS_64, PARALLAX_D(32)
#define PARALLAX_REGISTERS_96 PARALLAX_REGISTERS_80 PARALLAX_R5
#define PARALLAX_SUMS_96 PARALLAX_SUMS_80, PARALLAX_D(40)
#define PARALLAX_REGISTERS_128 PARALLAX_REGISTERS_96 PARALLAX_R6 PARALLAX_R7
#define PARALLAX_SUMS_128 PARALLAX_SUMS_96, PARALLAX_D(48), PARALLAX_D(56)
#define PARALLAX_REGISTERS_160 PARALLAX_REGISTERS_128 PARALLAX_R8 PARALLAX_R9
#define PARALLAX_SUMS_160 PARALLAX_SUMS_128, PARALLAX_D(64), PARALLAX_D(72)
#define PARALLAX_REGISTERS_192 PARALLAX_REGISTERS_160 PARALLAX_R10 PARALLAX_R11
#define PARALLAX_SUMS_192 PARALLAX_SUMS_160, PARALLAX_D(80), PARALLAX_D(88)
#define PARALLAX_REGISTERS_256 PARALLAX_REGISTERS_192                                             \
  PARALLAX_R12 PARALLAX_R13 PARALLAX_R14 PARALLAX_R15
#define PARALLAX_SUMS_256 PARALLAX_SUMS_192,                                                      \
  PARALLAX_D(96), PARALLAX_D(104), PARALLAX_D(112), PARALLAX_D(120)

PARALLAX_WGMMA_N(8, 4, 5, 6, 7, 8, 9, 10, 11)
PARALLAX_WGMMA_N(32, 16, 17, 18, 19, 20, 21, 22, 23)
PARALLAX_WGMMA_N(48, 24, 25, 26, 27, 28, 29, 30, 31)
PARALLAX_WGMMA_N(64, 32, 33, 34, 35, 36, 37, 38, 39)
PARALLAX_WGMMA_N(80, 40, 41, 42, 43, 44, 45, 46, 47)
PARALLAX_WGMMA_N(96, 48, 49, 50, 51, 52, 53, 54, 55)
PARALLAX_WGMMA_N(128, 64, 65, 66, 67, 68, 69, 70, 71)
PARALLAX_WGMMA_N(160, 80, 81, 82, 83, 84, 85, 86, 87)
PARALLAX_WGMMA_N(192, 96, 97, 98, 99, 100, 101, 102, 103)
PARALLAX_WGMMA_N(256, 128, 129, 130, 131, 132, 133, 134, 135)
// clang-format on

}  // namespace parallax::wgmma
