// SPDX-License-Identifier: MIT
#include "lm/match.h"

#include <cmath>
#include <cstdio>
#include <functional>

#include "lm/cost.h"
#include "lm/error.h"

namespace parallax::lm {
namespace {

// FFN widths stay multiples of this, so that every device multiplies them at full speed.
constexpr std::int64_t kFfnStep = 8;

using Measure = std::function<double(const ModelConfig&)>;

// The FFN width, at least `model`'s, whose measure comes closest to the target. Every measure here
// is linear in it.
void widen_ffn(ModelConfig& model, const Measure& measure, double target) {
  ModelConfig wider = model;
  wider.ffn_size += kFfnStep;
  const double step = measure(wider) - measure(model);
  const double steps = std::round((target - measure(model)) / step);
  if (steps > 0) model.ffn_size += kFfnStep * static_cast<std::int64_t>(steps);
}

// The target with the asked model's mixer and switches.
ModelConfig twin_of(const ModelConfig& target, const ModelConfig& asked) {
  ModelConfig twin = target;
  twin.mixer = asked.mixer;
  twin.r_norm = asked.r_norm;
  twin.r_rope = asked.r_rope;
  return twin;
}

ModelConfig softmax_twin(const ModelConfig& target, const ModelConfig& asked,
                         const Measure& measure) {
  ModelConfig twin = twin_of(target, asked);
  for (ModelConfig more = twin; measure(more) <= measure(target);
       more.num_q_heads += more.num_kv_heads) {
    twin = more;
  }
  widen_ffn(twin, measure, measure(target));
  return twin;
}

ModelConfig parallax_twin(const ModelConfig& target, const ModelConfig& asked,
                          const Measure& measure) {
  ModelConfig twin = twin_of(target, asked);
  if (twin.head_dim % 16 == 0) {
    twin.head_dim /= 2;
  } else if (twin.num_q_heads % 2 == 0) {
    twin.num_q_heads /= 2;
    if (twin.num_q_heads % twin.num_kv_heads != 0) twin.num_kv_heads /= 2;
  } else {
    throw Error(asked.match_to + ": model.match_to: neither half of head_dim " +
                std::to_string(target.head_dim) + " nor half of num_q_heads " +
                std::to_string(target.num_q_heads) + " is a legal size for the Parallax twin");
  }
  widen_ffn(twin, measure, measure(target));
  return twin;
}

std::string grouped(double value) {
  std::string digits = std::to_string(std::llround(std::abs(value)));
  for (std::size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, ",");
  return (value < 0 ? "-" : "") + digits;
}

std::string compare(const char* what, double twin, double target) {
  char percent[32];
  std::snprintf(percent, sizeof percent, "%+.3f %%", 100 * (twin - target) / target);
  return std::string("  ") + what + ": " + grouped(twin) + " against " + grouped(target) + " (" +
         percent + ")";
}

std::string change(const char* name, std::int64_t from, std::int64_t to) {
  if (from == to) return "";
  return std::string(" ") + name + " " + std::to_string(from) + " -> " + std::to_string(to) + ",";
}

std::vector<std::string> describe(const ModelConfig& twin, const ModelConfig& target,
                                  const ModelConfig& asked, std::int64_t seq_len) {
  std::string chosen = change("num_q_heads", target.num_q_heads, twin.num_q_heads) +
                       change("num_kv_heads", target.num_kv_heads, twin.num_kv_heads) +
                       change("head_dim", target.head_dim, twin.head_dim) +
                       change("ffn_size", target.ffn_size, twin.ffn_size);
  if (chosen.empty()) chosen = " no size changed,";
  chosen.pop_back();
  const std::string at = "training FLOPs per token at " + std::to_string(seq_len) + " tokens";
  return {"matched " + asked.match_to + " in " + asked.match + " with " + twin.mixer + ":" + chosen,
          compare("parameters", static_cast<double>(parameter_count(twin)),
                  static_cast<double>(parameter_count(target))),
          compare(at.c_str(), training_flops_per_token(twin, seq_len),
                  training_flops_per_token(target, seq_len))};
}

}  // namespace

Match resolve_match(const Config& config) {
  const ModelConfig& asked = config.model;
  if (asked.match_to.empty()) return {config, {}};
  const ModelConfig target = load_config(asked.match_to).model;
  const std::string& path = asked.match_to;
  if (!target.match_to.empty()) {
    throw Error(path +
                ": model.match_to: expected a config with sizes of its own to match, got one "
                "that matches another");
  }
  const bool parameters = asked.match == "parameters";
  const std::string own_mixer = parameters ? "softmax" : "parallax";
  const std::string target_mixer = parameters ? "parallax" : "softmax";
  if (asked.mixer != own_mixer || target.mixer != target_mixer) {
    throw Error(path + ": model.match = \"" + asked.match + "\": expected a " + own_mixer +
                " model matched to a " + target_mixer + " one, got " + asked.mixer + " to " +
                target.mixer);
  }
  const std::int64_t seq_len = config.data.seq_len;
  Match match{config, {}};
  if (parameters) {
    match.config.model = softmax_twin(target, asked, [](const ModelConfig& model) {
      return static_cast<double>(parameter_count(model));
    });
  } else {
    match.config.model = parallax_twin(target, asked, [=](const ModelConfig& model) {
      return training_flops_per_token(model, seq_len);
    });
  }
  match.report = describe(match.config.model, target, asked, seq_len);
  return match;
}

}  // namespace parallax::lm
