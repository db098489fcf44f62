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

void place_model(CausalLm& model, const TrainConfig& train, const std::string& device) {
  const std::string usual = train.device == "cpu" ? "cpu" : "auto";
  const at::Device place = resolve_device(device.empty() ? usual : device);
  const bool needs_bfloat16 = place.is_cuda() && model.config().mixer == "parallax";
  model.compute_in(needs_bfloat16 || train.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat);
  model.to(place);
  model.prepare_for_inference();
}

}  // namespace parallax::lm
