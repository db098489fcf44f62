// SPDX-License-Identifier: MIT
// The Hopper instructions the kernels speak: asynchronous barriers, tensor copies, fences, register
// reallocation, matrix loads. cuda::ptx where it has the instruction, one line of PTX where not.
// Tensor-core products are in wgmma.cuh. PTX ISA 9.0,
// https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cuda/ptx>

#include "cuda/element.h"

namespace parallax::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous barriers (mbarrier objects, 8 bytes in shared memory)

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  ::cuda::ptx::mbarrier_init(barrier, arrivals);
}

// Makes initialised barriers visible to the copy engine; follow with __syncthreads().
__device__ __forceinline__ void fence_barrier_init() {
  ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
}

__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  ::cuda::ptx::mbarrier_arrive(barrier);
}

// Arrives once and makes the phase wait for `bytes` of tensor copies as well.
__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta,
                                         ::cuda::ptx::space_shared, barrier, bytes);
}

// Returns once the phase with this parity (0 for a barrier's first) has completed.
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Whether that phase has completed, without waiting.
__device__ __forceinline__ bool barrier_test(std::uint64_t* barrier, std::uint32_t parity) {
  return ::cuda::ptx::mbarrier_test_wait_parity(barrier, parity);
}

// ---- named barriers (bar.sync): `threads` counts those that sync and those that arrive

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor copies (TMA): a box of a tensor map into shared memory, counted by `barrier`

template <int kRank>
__device__ __forceinline__ void copy_box(void* destination, const CUtensorMap* map,
                                         const std::int32_t (&coordinates)[kRank],
                                         std::uint64_t* barrier) {
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global,
                                    destination, map, coordinates, barrier);
}

// Copies bytes, a multiple of 16 and aligned to 16.
__device__ __forceinline__ void copy_bytes(void* destination, const void* source,
                                           std::uint32_t bytes, std::uint64_t* barrier) {
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, destination,
                             source, bytes, barrier);
}

// Orders this thread's ordinary shared-memory accesses before later ones of TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
}

// ---- global memory

// Adds to *counter and returns what it was. What this thread (or its CTA, before a barrier) has
// written is there for whoever counts later; what others wrote before they counted is there for it.
__device__ __forceinline__ std::uint64_t add_in_order(std::uint64_t* counter, std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(value)
               : "memory");
  return before;
}
// The same where *counter is `expected`; else it stays.
__device__ __forceinline__ std::uint64_t replace_in_order(std::uint64_t* counter,
                                                          std::uint64_t expected,
                                                          std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(counter), "l"(expected), "l"(value)
               : "memory");
  return before;
}

// ---- registers and lanes

// All warps of a warpgroup call these together; ptxas ignores them (C7508, a build error here)
// unless the kernel has __launch_bounds__(threads, 1) and roles are branches of one if/else.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// threadIdx.x, read anew at every call: a register less to keep alive across a main loop.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// A value that every lane already agrees on, in a form the compiler knows to be uniform.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// ---- matrix fragments

// Four 8x8 matrices of 16-bit elements; lane l gives the 16-byte row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&fragment)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&fragment)[4],
                                                         std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// Reads of shared memory that stay where they stand and are not repeated; of two neighbouring
// float2, and of one float.
__device__ __forceinline__ float4 load_shared(const float2* source) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared_address(source)));
  return x;
}

__device__ __forceinline__ float load_shared(const float* source) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared_address(source)));
  return x;
}

// Keeps the arithmetic behind `value` in its place: ptxas moves it across waits for the tensor
// cores, but no store. This one happens only if value is +infinity.
__device__ __forceinline__ void pin(float value, float* scratch) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.eq.f32 p, %0, 0f7F800000;\n\t@p st.shared.f32 [%1], %0;\n\t}" ::
          "f"(value),
      "r"(shared_address(scratch))
      : "memory");
}

// ---- arithmetic

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T (bf16 or fp16); `low` takes the lower half of the word.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ std::uint32_t pack<bf16>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
__device__ __forceinline__ std::uint32_t pack<fp16>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The two elements of a word that pack() made.
template <class T>
__device__ __forceinline__ float2 unpack(std::uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<bf16>(std::uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<fp16>(std::uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

}  // namespace parallax::ptx
