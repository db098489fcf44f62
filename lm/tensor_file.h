// SPDX-License-Identifier: MIT
// Tensors in safetensors files.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <map>
#include <string>

#include "lm/optimizer.h"
#include "lm/run_state.h"

namespace parallax::lm {

// Writes tensors of any strides, on any device, and syncs. Throws Error where a dtype has no name
// in the format, a name is there twice, or a write fails.
FileSeal save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata = {});

// Reads all tensors into memory of their own, on the CPU, by position in the file. Where `seal` is
// given, size and checksum are verified first. Throws Error naming the file.
NamedTensors load_tensors(const std::filesystem::path& path, const FileSeal* seal = nullptr);

}  // namespace parallax::lm
