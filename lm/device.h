// SPDX-License-Identifier: MIT
// Where a model runs.
#pragma once

#include <torch/torch.h>

#include <string>

#include "lm/config.h"
#include "lm/model.h"

namespace parallax::lm {

// "cpu", "cuda", "cuda:N", or "auto": the first GPU, or the CPU where there is none. Throws Error
// for another name and for a GPU that is not there.
at::Device resolve_device(const std::string& name);

// The dtype that a run computes in on `device` (TrainConfig::dtype). Throws Error for a Parallax
// model in float32 on a GPU, whose kernels take nothing wider than bfloat16.
at::ScalarType compute_dtype(const Config& config, at::Device device);

// Moves a model that was read, and shall not be trained, to where it shall compute: the device of
// that name, or, where it is empty, the CPU if it was trained there, else as "auto". It computes in
// the dtype of its training; a Parallax model on a GPU in bfloat16, since the kernels there take
// nothing wider.
void place_model(CausalLm& model, const TrainConfig& train, const std::string& device);

}  // namespace parallax::lm
