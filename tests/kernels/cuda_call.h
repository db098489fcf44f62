// SPDX-License-Identifier: MIT
// Runs a case on CUDA device 0 through the public calls. Device memory starts full of NaN, outputs
// and workspace included, and the gaps between rows are checked afterwards.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "tests/kernels/oracle.h"

namespace parallax::tests {

// Whether there is a GPU that the Hopper kernels run on; tests skip themselves where not.
bool has_hopper();
Device cuda_device();

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
  bool with_statistics = true;  // v_bar, lse, t_bar
  bool r_below_q = false;       // in memory
};

// A forward call with everything it needs, ready to be enqueued any number of times.
class CudaForward {
 public:
  explicit CudaForward(const Case& c, const CudaHow& how = {});

  Status run(cudaStream_t stream);
  void poison_outputs();
  Results results() const;  // o, and v_bar, lse, t_bar if asked for

 private:
  Case case_;
  CudaHow how_;
  ForwardPlan plan_;
  DeviceTensor q_, r_, k_, v_, o_, v_bar_;
  DeviceLengths lengths_;
  DeviceMemory lse_, t_bar_, workspace_;
};

// One call on the default stream.
Results cuda_forward(const Case& c, const CudaHow& how = {});

}  // namespace parallax::tests
