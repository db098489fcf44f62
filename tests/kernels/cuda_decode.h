// SPDX-License-Identifier: MIT
// Runs a decode on CUDA device 0 through the public calls, as cuda_call.h does a forward.
#pragma once

#include <optional>

#include "tests/kernels/cpu_call.h"
#include "tests/kernels/cuda_call.h"

namespace parallax::tests {

struct CudaDecodeHow {
  Kernels kernels = Kernels::kHopper;
  int num_sms = 0;              // of the GPU that the call is planned for; 0: of this one
  int page_size = 0;            // 0: contiguous
  bool own_schedule = true;     // else schedule() makes it, once
  bool with_statistics = true;  // lse, t_bar
  bool with_state = false;      // and no o
  bool bad_pages = false;       // table entries that no visible token needs are no pages
};

class CudaDecode {
 public:
  explicit CudaDecode(const Case& c, const CudaDecodeHow& how = {});

  Status schedule(cudaStream_t stream);
  Status run(cudaStream_t stream);
  Status run_settled(cudaStream_t stream);  // parallax/step.h
  // Of a contiguous 16-bit cache: the newest q_len keys and values of each sequence become poison
  // there, until append() enqueues writing them again.
  void withhold_newest();
  Status append(cudaStream_t stream);
  void set_lengths(const Lengths& lengths);  // of the same batch
  void poison_outputs();
  Results results() const;  // o, lse, t_bar
  OwnedState state() const;

 private:
  DecodeArgs args();

  Case case_;
  CudaDecodeHow how_;
  DecodePlan plan_;
  std::optional<PagedCache> pages_;
  DeviceTensor q_, r_, k_, v_, o_;
  DeviceLengths lengths_;
  DeviceMemory lse_, t_bar_, table_, k_scale_, v_scale_, workspace_, schedule_;
  DeviceMemory m_, d1_, d2_, o1_, o2_;
  DeviceMemory newest_k_, newest_v_, positions_;
};

// One call on the default stream.
Results cuda_decode(const Case& c, const CudaDecodeHow& how = {});

}  // namespace parallax::tests
