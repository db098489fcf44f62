// SPDX-License-Identifier: MIT
#include "lm/device.h"

#include <cstdint>

#include "lm/error.h"

namespace parallax::lm {
namespace {

bool is_cuda_name(const std::string& name) {
  if (name == "cuda") return true;
  return name.starts_with("cuda:") && name.size() > 5 && name.size() <= 7 &&
         name.find_first_not_of("0123456789", 5) == std::string::npos;
}

}  // namespace

at::Device resolve_device(const std::string& name) {
  const auto num_gpus = static_cast<std::int64_t>(torch::cuda::device_count());
  if (name == "cpu" || (name == "auto" && num_gpus == 0)) return at::Device(at::kCPU);
  if (name == "auto") return at::Device(at::kCUDA, 0);
  if (!is_cuda_name(name)) {
    throw Error("unknown device '" + name + "': use auto, cpu, cuda or cuda:N");
  }
  const std::int64_t index = name == "cuda" ? 0 : std::stoll(name.substr(5));
  if (index >= num_gpus) {
    throw Error("device " + name + " is not there: LibTorch sees " + std::to_string(num_gpus) +
                " GPUs; use --device cpu or auto");
  }
  return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index));
}

at::ScalarType compute_dtype(const Config& config, at::Device device) {
  const std::string& dtype = config.train.dtype;
  if (dtype == "bfloat16" || (dtype == "auto" && device.is_cuda())) return at::kBFloat16;
  if (dtype == "float32" && device.is_cuda() && config.model.mixer == "parallax") {
    throw Error(
        "train.dtype: Parallax attention on a GPU takes no float32: set \"auto\" or \"bfloat16\" "
        "(weights, gradients and optimizer stay float32)");
  }
  return at::kFloat;
}

void place_model(CausalLm& model, const TrainConfig& train, const std::string& device) {
  const std::string usual = train.device == "cpu" ? "cpu" : "auto";
  const at::Device place = resolve_device(device.empty() ? usual : device);
  Config config;
  config.model = model.config();
  config.train = train;
  // Trained in float32, a Parallax model cannot be read so on a GPU.
  if (place.is_cuda() && config.model.mixer == "parallax") config.train.dtype = "auto";
  model.compute_in(compute_dtype(config, place));
  model.to(place);
  model.prepare_for_inference();
}

}  // namespace parallax::lm
