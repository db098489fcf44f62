// SPDX-License-Identifier: MIT
// Controls are computed, not typed. A config with model.match_to names another config and what it
// shall equal; the sizes of the twin are solved for.
#pragma once

#include <string>
#include <vector>

#include "lm/config.h"

namespace parallax::lm {

struct Match {
  Config config;  // concrete: match_to and match are empty
  // What was chosen and by how much it misses, ready to print; empty where nothing was asked for.
  std::vector<std::string> report;
};

// match = "parameters": the softmax twin of a Parallax model gets extra query heads (in whole
// groups), then whatever FFN width still brings the count closer. match = "compute": the Parallax
// twin of a softmax model gets half the head_dim (or, where that is not a multiple of 8, half the
// heads), then the FFN width that brings training FLOPs per token at data.seq_len closest. Every
// other size is taken from the config matched. A config without match_to comes back as it is.
// Throws Error where the pair is not one of these, or the target cannot be reached.
Match resolve_match(const Config& config);

}  // namespace parallax::lm
