// SPDX-License-Identifier: MIT
// The small vocabulary every public kernel call is written in: element types, devices, and views
// of memory that the caller owns.
#pragma once

#include <cstdint>
#include <functional>

// Marks what device code may call too; means nothing to a host compiler.
#ifdef __CUDACC__
#define PARALLAX_HOST_DEVICE __host__ __device__
#else
#define PARALLAX_HOST_DEVICE
#endif

namespace parallax {

// kFloat8E4M3 (4 exponent bits, 3 fraction bits, largest 448, no infinity) is a type of caches
// only.
enum class DType : std::uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

// A view of [batch, len, heads, head_dim], packed [tokens, heads, head_dim] (batch_stride unused)
// or pages [num_pages, page_size, heads, head_dim] (batch_stride steps pages). Strides count
// elements; the last axis is contiguous. Offsets are computed in 64 bits.
template <class Void>
struct BasicView {
  Void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t len_stride = 0;
  std::int64_t head_stride = 0;
};
using View = BasicView<void>;
using ConstView = BasicView<const void>;

// Where a call runs. `num_threads` is the largest worker index + 1 that the caller's ParallelFor
// hands out (CPU only); the other fields describe a CUDA device and are filled by query_device().
struct Device {
  enum class Kind : std::uint8_t { kCpu, kCuda };
  Kind kind = Kind::kCpu;
  int num_threads = 1;
  int index = 0;
  int compute_capability = 0;  // 90 for sm_90
  int num_sms = 0;
  int sm_shared_bytes = 0;  // shared memory of a multiprocessor
  bool portable = false;    // take the kernels of every GPU even where a Hopper GPU has its own
};

// The caller's thread pool: runs body(task, worker) once for every task in [0, num_tasks), from any
// thread, with worker in [0, Device::num_threads) unique among the bodies running at one time.
// Returns when all are done. Results never depend on which worker ran a task.
using TaskBody = std::function<void(std::int64_t task, int worker)>;
using ParallelFor = std::function<void(std::int64_t num_tasks, const TaskBody& body)>;

// A CUDA stream without the CUDA headers: reinterpret_cast of a cudaStream_t.
using Stream = void*;

}  // namespace parallax
