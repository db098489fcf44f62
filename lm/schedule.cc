// SPDX-License-Identifier: MIT
#include "lm/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace parallax::lm {
namespace {

std::int64_t warmup_steps(const ScheduleConfig& config, std::int64_t total_steps) {
  if (config.warmup_steps > 0) return config.warmup_steps;
  return std::llround(config.warmup_fraction * static_cast<double>(total_steps));
}

// x in [0, 1): how much of the decay lies behind at `step`; 0 before it.
double decay_progress(const ScheduleConfig& config, std::int64_t step, std::int64_t total_steps) {
  std::int64_t start = total_steps;
  if (config.name == "wsd") {
    start -= std::llround(config.decay_fraction * static_cast<double>(total_steps));
  } else if (config.name == "cosine") {
    start = warmup_steps(config, total_steps);
  }
  if (step <= start || step >= total_steps) return step > start ? 1.0 : 0.0;
  return static_cast<double>(step - start) / static_cast<double>(total_steps - start);
}

double half_cosine(double x) { return 0.5 * (1 + std::cos(std::numbers::pi * x)); }

double decay(const ScheduleConfig& config, double x) {
  if (config.name == "cosine" || config.decay_shape == "cosine") return half_cosine(x);
  return 1 - (config.decay_shape == "sqrt" ? std::sqrt(x) : x);
}

}  // namespace

double lr_scale(const ScheduleConfig& config, std::int64_t step, std::int64_t total_steps) {
  const std::int64_t warmup = warmup_steps(config, total_steps);
  const double warm =
      step < warmup ? static_cast<double>(step + 1) / static_cast<double>(warmup) : 1.0;
  const double left = decay(config, decay_progress(config, step, total_steps));
  return warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left);
}

double wd_scale(const ScheduleConfig& config, std::int64_t step, std::int64_t total_steps) {
  return std::pow(1 - decay_progress(config, step, total_steps), config.wd_anneal_gamma);
}

}  // namespace parallax::lm
