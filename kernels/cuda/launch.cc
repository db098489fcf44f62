// SPDX-License-Identifier: MIT
#include "cuda/launch.h"

#include "parallax/attention.h"

namespace parallax {

Status check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::device_error(std::string(what) + ": " + cudaGetErrorString(error));
}

Status query_device(int index, Device* device) {
  int count = 0;
  if (Status s = check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount"); !s.ok()) return s;
  if (index < 0 || index >= count) {
    return Status::invalid_argument("device index " + std::to_string(index) + ": expected 0 to " +
                                    std::to_string(count - 1));
  }
  int major = 0;
  int minor = 0;
  int num_sms = 0;
  int sm_shared_bytes = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor},
                {cudaDevAttrMultiProcessorCount, &num_sms},
                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &sm_shared_bytes}};
  for (const auto& item : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(item.value, item.attribute, index);
    if (Status s = check_cuda(error, "cudaDeviceGetAttribute"); !s.ok()) return s;
  }
  *device = Device{Device::Kind::kCuda, 1, index, 10 * major + minor, num_sms, sm_shared_bytes};
  return {};
}

DeviceScope::DeviceScope(int index) {
  status_ = check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (status_.ok() && previous_ != index) {
    status_ = check_cuda(cudaSetDevice(index), "cudaSetDevice");
  }
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

std::string tensor_map_obstacle(const TensorMapSpec& spec) {
  if (reinterpret_cast<std::uintptr_t>(spec.data) % 16 != 0) {
    return "its address must be a multiple of 16 bytes";
  }
  for (int i = 0; i < spec.rank; ++i) {
    if (spec.sizes[i] < 1 || spec.sizes[i] > (std::int64_t{1} << 32)) {
      return "an axis has " + std::to_string(spec.sizes[i]) + " elements: expected 1 to 2^32";
    }
    if (i == 0) continue;
    const std::int64_t bytes = spec.strides[i] * 2;
    if (bytes <= 0 || bytes % 16 != 0 || bytes >= (std::int64_t{1} << 40)) {
      return "a stride is " + std::to_string(spec.strides[i]) +
             " elements: expected a positive multiple of 8 below 2^39";
    }
  }
  return "";
}

TensorMapSpec tensor_map_spec(const AttentionProblem& problem, const ConstView& view,
                              std::int64_t len, std::int64_t heads) {
  TensorMapSpec spec;
  spec.dtype = problem.dtype;
  spec.data = view.data;
  spec.rank = 4;
  const std::int64_t sizes[] = {problem.head_dim, len, heads, problem.packed ? 1 : problem.batch};
  const std::int64_t strides[] = {1, view.len_stride, view.head_stride, view.batch_stride};
  for (int i = 0; i < 4; ++i) {
    spec.sizes[i] = sizes[i];
    spec.strides[i] = sizes[i] == 1 ? 8 : strides[i];
    spec.box[i] = 1;
  }
  spec.box[0] = 64;
  return spec;
}

Status check_rows(const char* name, const ConstView& view, const AttentionProblem& problem,
                  std::int64_t len, std::int64_t heads) {
  const auto fits = [](std::int64_t size, std::int64_t stride) {
    return size <= 1 || stride % 8 == 0;
  };
  const bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
                       fits(problem.packed ? 1 : problem.batch, view.batch_stride) &&
                       fits(len, view.len_stride) && fits(heads, view.head_stride);
  if (aligned) return {};
  return Status::invalid_argument(std::string(name) +
                                  ": its address must be a multiple of 16 bytes and its strides "
                                  "multiples of 8 elements");
}

Status check_kernels(const char* pass, const AttentionProblem& problem, const Device& device) {
  if (device.compute_capability < 80) {
    return Status::unsupported(std::string(pass) + ": compute capability " +
                               std::to_string(device.compute_capability / 10) + "." +
                               std::to_string(device.compute_capability % 10) +
                               " has no kernel, 8.0 and later have");
  }
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return Status::unsupported("dtype: CUDA kernels take bf16 and fp16");
  }
  return {};
}

Status encode_tensor_map(const TensorMapSpec& spec, const char* name, CUtensorMap* map) {
  if (const std::string obstacle = tensor_map_obstacle(spec); !obstacle.empty()) {
    return Status::invalid_argument(std::string(name) + ": " + obstacle);
  }
  // The driver's entry point through the runtime: nothing links libcuda.
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(entry)
               : nullptr;
  }();
  if (encode == nullptr) {
    return Status::device_error("cuTensorMapEncodeTiled: the driver is older than CUDA 12");
  }
  cuuint64_t sizes[TensorMapSpec::kMaxRank];
  cuuint64_t strides[TensorMapSpec::kMaxRank];  // bytes, without the innermost axis
  cuuint32_t box[TensorMapSpec::kMaxRank];
  cuuint32_t steps[TensorMapSpec::kMaxRank];
  for (int i = 0; i < spec.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(spec.sizes[i]);
    box[i] = static_cast<cuuint32_t>(spec.box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(spec.strides[i]) * 2;
  }
  const CUtensorMapDataType type = spec.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, static_cast<cuuint32_t>(spec.rank), const_cast<void*>(spec.data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return Status::device_error(std::string(name) + ": cuTensorMapEncodeTiled returned error " +
                                std::to_string(static_cast<int>(result)));
  }
  return {};
}

}  // namespace parallax
