// SPDX-License-Identifier: MIT
// Where a model runs.
#pragma once

#include <torch/torch.h>

#include <string>

namespace parallax::lm {

// "cpu", "cuda", "cuda:N", or "auto": the first GPU, or the CPU where there is none. Throws Error
// for another name and for a GPU that is not there.
at::Device resolve_device(const std::string& name);

}  // namespace parallax::lm
