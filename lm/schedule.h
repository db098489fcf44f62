// SPDX-License-Identifier: MIT
// Learning rate and weight decay over a run, as pure functions of the step. Steps count from 0.
#pragma once

#include <cstdint>

#include "lm/config.h"

namespace parallax::lm {

// What to multiply every learning rate with at `step` of `total_steps`. Warm-up: (step + 1) /
// warmup_steps. Decay from 1 to min_lr_ratio: over x = (step - start) / (total_steps - start), so
// that the end lies one step past the last and no real step is spent at 0. WSD decays over the last
// decay_fraction of all steps (arXiv 2404.06395; 1 - sqrt: arXiv 2405.18392), cosine from the end
// of the warm-up, constant never.
double lr_scale(const ScheduleConfig& config, std::int64_t step, std::int64_t total_steps);

// What to multiply every weight decay with: (1 - x)^wd_anneal_gamma in the decay, 1 before it.
double wd_scale(const ScheduleConfig& config, std::int64_t step, std::int64_t total_steps);

}  // namespace parallax::lm
