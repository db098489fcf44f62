// SPDX-License-Identifier: MIT
// What every kernel launch needs on the host: errors as Status, the right device, tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "parallax/status.h"
#include "parallax/types.h"

namespace parallax {

// "<what>: <the runtime's words>", or ok.
Status check_cuda(cudaError_t error, const char* what);

// Makes a device current while in scope. A kernel can only be launched on a stream of the current
// device.
class DeviceScope {
 public:
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  const Status& status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_;
};

// A tensor in device memory and the box of it that one copy moves, innermost axis first. The
// innermost axis is contiguous; elements outside `sizes` read as zero.
struct TensorMapSpec {
  static constexpr int kMaxRank = 5;
  DType dtype = DType::kBFloat16;
  const void* data = nullptr;
  int rank = 0;
  std::int64_t sizes[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};  // elements; [0] is not read
  int box[kMaxRank] = {};
};

// Why the copy engine cannot take this tensor ("" if it can): addresses and strides in multiples
// of 16 bytes, strides below 2^40 bytes, sizes in [1, 2^32].
std::string tensor_map_obstacle(const TensorMapSpec& spec);

// Encodes a 128-byte-swizzled map (box[0] covers at most 64 elements of 16 bits). Errors name the
// tensor as `name`.
Status encode_tensor_map(const TensorMapSpec& spec, const char* name, CUtensorMap* map);

}  // namespace parallax
