// SPDX-License-Identifier: MIT
// Everything that decides a run, as plain values. A TOML file holds the same fields under the same
// names in the sections [model], [data], [optimizer], [schedule] and [train]. config.cc lists each
// field once, with its help; reading, writing, help and spelling suggestions come from that list.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace parallax::lm {

struct ModelConfig {
  std::string mixer = "parallax";  // "parallax" | "softmax"
  std::int64_t vocab_size = 257;
  std::int64_t hidden_size = 128;
  std::int64_t num_layers = 4;
  std::int64_t num_q_heads = 4;
  std::int64_t num_kv_heads = 2;
  std::int64_t head_dim = 32;
  std::int64_t ffn_size = 384;
  bool tie_embeddings = true;
  double rope_theta = 1e4;
  double rms_norm_eps = 1e-6;
  double init_std = 0.02;
  bool r_norm = true;  // RMSNorm on r, Parallax only
  bool r_rope = true;  // RoPE on r, Parallax only
  // The control to solve for (match.h): the config file to match, relative to the file that names
  // it, and what to match, "parameters" | "compute". Both empty in a config that is concrete.
  std::string match_to;
  std::string match;
};

struct DataConfig {
  std::string path;  // folder written by `parallax tokenize`
  std::int64_t seq_len = 256;
  std::int64_t seed = 0;  // of the order of the training sequences
};

// `lr` and `weight_decay` rule the hidden matrices, whichever optimizer they have; `adamw_lr` and
// `adamw_weight_decay` rule embeddings, head and norm gains, which AdamW always has (gains are
// never decayed).
struct OptimizerConfig {
  std::string name = "muon";  // of the hidden matrices: "muon" | "adamw"
  double lr = 0.02;
  double weight_decay = 0.0;
  double momentum = 0.95;
  bool nesterov = true;
  std::int64_t ns_steps = 5;
  // a, b, c of X <- aX + (bA + cA^2)X, A = XX^T: three numbers for every step, or three a step.
  std::vector<double> ns_coefficients = {3.4445, -4.7750, 2.0315};
  std::string ns_dtype = "float32";          // "float32" | "bfloat16"
  std::string scaling = "keller_jordan";     // "keller_jordan" | "rms_matched"
  std::string orthogonalize = "projection";  // "fused" | "projection" | "head"
  double adamw_lr = 3e-3;
  double adamw_weight_decay = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
};

struct ScheduleConfig {
  std::string name = "wsd";       // "wsd" | "cosine" | "constant"
  std::int64_t warmup_steps = 0;  // 0: warmup_fraction of all steps
  double warmup_fraction = 0.02;
  double decay_fraction = 0.2;         // wsd only: the last part of all steps
  std::string decay_shape = "linear";  // wsd only: "linear" | "sqrt" (1 - sqrt x) | "cosine"
  double min_lr_ratio = 0.0;
  double wd_anneal_gamma = 0.0;  // weight decay times (1 - x)^gamma, x the progress of the decay
};

struct TrainConfig {
  std::int64_t steps = 1000;
  std::int64_t batch_size = 8;  // sequences a forward pass
  std::int64_t accumulate = 1;  // forward passes a step
  double grad_clip = 1.0;       // global norm; 0: off
  std::int64_t seed = 0;        // of the initial weights
  std::string device = "auto";  // "auto" | "cpu" | "cuda"
  // Of activations, and of weights where they meet them: "float32" | "bfloat16" | "auto" (bfloat16
  // on a GPU, float32 on a CPU). The weights that are trained stay float32.
  std::string dtype = "auto";
  std::int64_t eval_every = 100;  // steps; 0: only at the end
  std::int64_t eval_batches = 16;
  std::int64_t checkpoint_every = 0;  // steps; 0: only at the end
  std::int64_t keep_last = 2;
  std::vector<std::int64_t> trunk_steps;  // checkpoints that are never deleted
  std::string nonfinite = "stop";         // a loss or gradient that is not finite: "stop" | "skip"
  std::int64_t log_every = 10;            // steps
};

struct Config {
  ModelConfig model;
  DataConfig data;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  TrainConfig train;
};

// Reads a config; fields that it does not name keep the defaults above. Each override is
// "section.key=value", the value in TOML (quotes around a string may be left out), applied last.
// A relative model.match_to of the file
// comes back resolved against the file's folder (one of an override: the working folder). Throws
// Error naming file, key, what was expected and what came: unreadable file, bad TOML, unknown key
// (with the nearest known one), wrong type, value out of range, impossible shape.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {});

// The same from text; `name` stands for the file in messages and, where it has a folder, resolves
// model.match_to.
Config parse_config(std::string_view text, const std::string& name,
                    const std::vector<std::string>& overrides = {});

// The whole config as TOML, every field, in the order of the structs; parse_config reads it back
// equal to the last bit.
std::string to_toml(const Config& config);

// Throws Error where a value is out of range or a shape impossible; `name` leads the message.
void validate(const Config& config, const std::string& name);

struct FieldHelp {
  std::string key;            // "model.head_dim"
  std::string default_value;  // as TOML
  std::string help;           // one line
};
std::vector<FieldHelp> config_fields();

}  // namespace parallax::lm
