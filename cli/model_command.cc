// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "lm/cost.h"
#include "lm/match.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string config;
  std::vector<std::string> overrides;
  std::int64_t seq_len = 0;  // 0: data.seq_len
  bool json = false;
  bool fields = false;
};

// What a model costs, in the order in which it is printed.
struct Costs {
  std::int64_t parameters;
  std::int64_t embedding_parameters;
  std::int64_t forward_flops;   // per token
  std::int64_t training_flops;  // per token
  lm::TrainingMemory memory;
};

Costs costs_of(const lm::Config& config, std::int64_t seq_len) {
  const lm::ModelConfig& model = config.model;
  const std::int64_t tables = model.tie_embeddings ? 1 : 2;
  return {lm::parameter_count(model), tables * model.vocab_size * model.hidden_size,
          static_cast<std::int64_t>(lm::forward_flops_per_token(model, seq_len)),
          static_cast<std::int64_t>(lm::training_flops_per_token(model, seq_len)),
          lm::training_memory(config)};
}

void print_json(const lm::Match& match, const Costs& costs, std::int64_t seq_len) {
  const lm::ModelConfig& model = match.config.model;
  nlohmann::ordered_json json = {
      {"mixer", model.mixer},
      {"parameters", costs.parameters},
      {"embedding_parameters", costs.embedding_parameters},
      {"seq_len", seq_len},
      {"forward_flops_per_token", costs.forward_flops},
      {"training_flops_per_token", costs.training_flops},
      {"training_memory_bytes",
       {{"parameters", costs.memory.parameters},
        {"gradients", costs.memory.gradients},
        {"optimizer_state", costs.memory.optimizer_state},
        {"activations", costs.memory.activations},
        {"total", costs.memory.total()}}},
      {"sizes",
       {{"vocab_size", model.vocab_size},
        {"hidden_size", model.hidden_size},
        {"num_layers", model.num_layers},
        {"num_q_heads", model.num_q_heads},
        {"num_kv_heads", model.num_kv_heads},
        {"head_dim", model.head_dim},
        {"ffn_size", model.ffn_size}}},
      {"match", match.report},
  };
  for (const lm::TensorShape& tensor : lm::parameter_shapes(model)) {
    json["tensors"].push_back({{"name", tensor.name}, {"shape", tensor.shape}});
  }
  std::cout << json.dump(2) << "\n";
}

std::string with_layer_star(const std::string& name) {
  const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix)) return name;
  return prefix + "*" + name.substr(name.find('.', prefix.size()));
}

// One line a tensor of a layer, with the number of layers.
void print_tensors(const lm::ModelConfig& model) {
  std::map<std::string, int> layers;
  const std::vector<lm::TensorShape> tensors = lm::parameter_shapes(model);
  for (const lm::TensorShape& tensor : tensors) ++layers[with_layer_star(tensor.name)];
  for (const lm::TensorShape& tensor : tensors) {
    const std::string name = with_layer_star(tensor.name);
    const int count = std::exchange(layers[name], 0);
    if (count == 0) continue;
    std::string shape = std::to_string(tensor.shape[0]);
    if (tensor.shape.size() == 2) shape += " x " + std::to_string(tensor.shape[1]);
    const std::string times = count > 1 ? "  x" + std::to_string(count) : "";
    std::printf("  %-50s %13s%s\n", name.c_str(), shape.c_str(), times.c_str());
  }
}

void print_text(const lm::Match& match, const Costs& costs, std::int64_t seq_len) {
  const lm::ModelConfig& model = match.config.model;
  const auto megabytes = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1e6; };
  for (const std::string& line : match.report) std::printf("%s\n", line.c_str());
  std::printf("%s, %lld parameters, %lld of them embeddings\n", model.mixer.c_str(),
              static_cast<long long>(costs.parameters),
              static_cast<long long>(costs.embedding_parameters));
  print_tensors(model);
  std::printf("MFLOP a token at %lld tokens: forward %.1f, training %.1f\n",
              static_cast<long long>(seq_len), static_cast<double>(costs.forward_flops) / 1e6,
              static_cast<double>(costs.training_flops) / 1e6);
  std::printf(
      "training memory, about: %.0f MB (parameters %.0f, gradients %.0f, optimizer %.0f, "
      "activations %.0f)\n",
      megabytes(costs.memory.total()), megabytes(costs.memory.parameters),
      megabytes(costs.memory.gradients), megabytes(costs.memory.optimizer_state),
      megabytes(costs.memory.activations));
}

void print_fields() {
  for (const lm::FieldHelp& field : lm::config_fields()) {
    std::printf("%-30s %-28s %s\n", field.key.c_str(), field.default_value.c_str(),
                field.help.c_str());
  }
}

void run(const Options& options) {
  if (options.fields) return print_fields();
  if (options.config.empty()) throw CLI::RequiredError("--config");
  lm::Config config = lm::load_config(options.config, options.overrides);
  // Where a length is asked for, everything is reckoned at it, the match included.
  if (options.seq_len > 0) config.data.seq_len = options.seq_len;
  const lm::Match match = lm::resolve_match(config);
  const std::int64_t seq_len = match.config.data.seq_len;
  const Costs costs = costs_of(match.config, seq_len);
  options.json ? print_json(match, costs, seq_len) : print_text(match, costs, seq_len);
}

}  // namespace

void add_model(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "model", "Parameters, tensor shapes, FLOPs per token and memory of a configured model");
  command->add_option("--config", options->config, "Config file");
  command->add_option("--set", options->overrides, "section.key=value, overrides the config")
      ->take_all();
  command->add_option("--seq-len", options->seq_len, "Instead of data.seq_len")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 32));
  command->add_flag("--json", options->json, "As JSON");
  command->add_flag("--fields", options->fields,
                    "Instead: every field of a config, its default and what it means");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
