// SPDX-License-Identifier: MIT
// What a run folder holds besides checkpoints and metrics, and when a run in it may go on.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "lm/config.h"
#include "lm/optimizer.h"

namespace parallax::lm {

// Whether a run was started in the folder.
bool holds_run(const std::filesystem::path& run);

// config.toml and assignments.json (which tensor went to which optimizer).
void write_run_files(const std::filesystem::path& run, const Config& config,
                     const std::vector<Assignment>& assignments);

// What `after` changes about a run that was started as `before`, a line "key: old -> new" each.
// Throws Error where the weights, the optimizer's state or the order of the data would not fit.
std::vector<std::string> resumable_changes(const Config& before, const Config& after);

}  // namespace parallax::lm
