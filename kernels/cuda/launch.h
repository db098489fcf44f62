// SPDX-License-Identifier: MIT
// What every kernel launch needs on the host: errors as Status, the right device, views, tensor
// maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "parallax/attention.h"
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

// A view {head_dim, len, heads, batch} as the copy engine sees it, in boxes of 64 columns of one
// row. An axis of one element may have any stride in the caller's view.
TensorMapSpec tensor_map_spec(const AttentionProblem& problem, const ConstView& view,
                              std::int64_t len, std::int64_t heads);

// Whether the rows of a view [batch, len, heads, head_dim] can be read and written 16 bytes at a
// time. An axis of one element may have any stride.
Status check_rows(const char* name, const ConstView& view, const AttentionProblem& problem,
                  std::int64_t len, std::int64_t heads);
inline ConstView read_only(const View& view) {
  return {view.data, view.batch_stride, view.len_stride, view.head_stride};
}

// Whether a device takes the Hopper kernels, or the portable ones.
inline bool takes_hopper_kernels(const Device& device) {
  return device.compute_capability == 90 && !device.portable;
}

// What every kernel of a pass ("forward", "backward") asks of device and problem.
Status check_kernels(const char* pass, const AttentionProblem& problem, const Device& device);

// Encodes a 128-byte-swizzled map (box[0] covers at most 64 elements of 16 bits). Errors name the
// tensor as `name`.
Status encode_tensor_map(const TensorMapSpec& spec, const char* name, CUtensorMap* map);

}  // namespace parallax
