// SPDX-License-Identifier: MIT
// Runs a case on CUDA device 0 through the public calls. Device memory starts full of NaN, outputs
// and workspace included, and the gaps between rows are checked afterwards.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <optional>
#include <thread>
#include <vector>

#include "tests/kernels/oracle.h"

namespace parallax::tests {

// The two sets of CUDA kernels; a Hopper GPU runs both.
enum class Kernels { kHopper, kPortable };

// Whether there is a GPU that they run on; tests skip themselves where not.
bool has_gpu_for(Kernels kernels);
inline bool has_hopper() { return has_gpu_for(Kernels::kHopper); }
// CUDA device 0, asking for them.
Device cuda_device(Kernels kernels = Kernels::kHopper);

// f of every case, on all cores: the oracle takes far longer than the GPU.
template <class Result, class F>
std::vector<Result> on_all_cores(const std::vector<Case>& cases, const F& f) {
  std::vector<Result> results(cases.size());
  parallel_for(static_cast<int>(std::thread::hardware_concurrency()))(
      static_cast<std::int64_t>(cases.size()), [&](std::int64_t n, int) {
        const auto i = static_cast<std::size_t>(n);
        results[i] = f(cases[i]);
      });
  return results;
}

// Device memory, all bytes 0xff.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }
  void upload(const void* source, std::size_t bytes);
  void download(void* destination, std::size_t bytes) const;
  void poison();
  void swap(DeviceMemory* other);

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// A Tensor's bytes on the device.
struct DeviceTensor {
  explicit DeviceTensor(Tensor tensor);
  ConstView view() const;
  View output();
  void exchange_memory(DeviceTensor* other);  // of the same size
  Tensor download() const;                    // expects the gaps intact

  Tensor host;
  DeviceMemory memory;
};

// The arrays of Lengths on the device.
struct DeviceLengths {
  explicit DeviceLengths(const Lengths& lengths);
  Sequences view() const;

  Lengths host;
  DeviceMemory memory;
};

struct CudaHow {
  Kernels kernels = Kernels::kHopper;
  bool with_statistics = true;  // v_bar, lse, t_bar
  bool r_below_q = false;       // in memory
  int page_size = 0;            // of k and v; 0: contiguous
};

// A forward call with everything it needs, ready to be enqueued any number of times.
class CudaForward {
 public:
  CudaForward(const Case& c, const CudaHow& how);

  Status run(cudaStream_t stream);
  void poison_outputs();
  Results results() const;  // o, and v_bar, lse, t_bar if asked for

 private:
  Case case_;
  CudaHow how_;
  ForwardPlan plan_;
  std::optional<PagedCache> paged_;
  DeviceTensor q_, r_, k_, v_, o_, v_bar_;
  DeviceLengths lengths_;
  DeviceMemory lse_, t_bar_, workspace_, page_table_, k_scale_, v_scale_;
};

// One call on the default stream.
Results cuda_forward(const Case& c, const CudaHow& how);

}  // namespace parallax::tests
