// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "cli/live_line.h"
#include "lm/error.h"
#include "lm/match.h"
#include "lm/trainer.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string config;
  std::vector<std::string> overrides;
  std::string out;
  bool resume = false;
  bool json = false;
};

// A signal handler has nobody to ask for the flag it is to set.
std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);

// The first Ctrl-C (or SIGTERM) asks for a stop after the step; a second has the default effect. A
// file that grows beyond its limit is an error of write(), not the end of the process.
void handle_signals() {
  struct sigaction action = {};
  action.sa_handler = [](int) { stop_requested.store(true); };
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGXFSZ, SIG_IGN);
}

class Reporter : public lm::TrainObserver {
 public:
  void on_step(const lm::Progress& progress) override {
    const lm::MetricsRecord& record = progress.record;
    char line[192];
    std::snprintf(
        line, sizeof line, "step %lld/%lld  loss %.4f  %.4f bits/byte  %.0f tokens/s  ETA %s",
        static_cast<long long>(record.step), static_cast<long long>(progress.steps), record.loss,
        record.bits_per_byte, record.tokens_per_s, format_duration(progress.eta_s).c_str());
    live_.show(line + (record.skipped > 0 ? "  skipped " + std::to_string(record.skipped) : ""),
               progress.logged);
    if (stop_requested.load()) live_.print("stopping after this step (Ctrl-C again: at once)");
  }

  void on_eval(const lm::MetricsRecord& record) override {
    char line[128];
    std::snprintf(line, sizeof line, "step %lld  held out: loss %.4f  %.4f bits/byte",
                  static_cast<long long>(record.step), record.loss, record.bits_per_byte);
    live_.print(line);
  }

  void on_checkpoint(const std::filesystem::path& path) override {
    live_.print("saved " + path.string());
  }

  void note(const std::string& line) { live_.print(line); }

 private:
  LiveLine live_;
};

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

// "model.layers.12.mlp" -> "model.layers.*.mlp"
std::string any_layer(const std::string& name) {
  constexpr std::string_view kLayers = "layers.";
  const std::size_t begin = name.find(kLayers);
  if (begin == std::string::npos) return name;
  const std::size_t number = begin + kLayers.size();
  return name.substr(0, number) + "*" + name.substr(name.find('.', number));
}

// A line for the tensors that differ in their layer alone; assignments.json has each.
void print_assignments(const std::vector<lm::Assignment>& assignments, Reporter& reporter) {
  std::vector<std::pair<std::string, int>> lines;
  for (const lm::Assignment& assignment : assignments) {
    const std::string line = assignment.group + "  " + any_layer(assignment.name) + "  " +
                             shape_text(assignment.shape) +
                             (assignment.blocks.empty() ? "" : "  " + assignment.blocks);
    const auto same =
        std::find_if(lines.begin(), lines.end(), [&](const auto& l) { return l.first == line; });
    if (same == lines.end()) {
      lines.emplace_back(line, 1);
    } else {
      ++same->second;
    }
  }
  for (const auto& [line, count] : lines) {
    reporter.note(line + (count > 1 ? "  (" + std::to_string(count) + " layers)" : ""));
  }
}

void print_text(const lm::TrainResult& result) {
  if (!result.finished) {
    std::printf("stopped at step %lld; go on with --resume\n", static_cast<long long>(result.step));
  }
  std::printf("held out: loss %.4f, %.4f bits/byte; %lld parameters, %.0f tokens/s\n",
              result.val_loss, result.val_bits_per_byte, static_cast<long long>(result.parameters),
              result.tokens_per_s);
  std::printf("checkpoint: %s\n", result.checkpoint.c_str());
}

void print_json(const Options& options, const lm::TrainResult& result) {
  const nlohmann::ordered_json json = {{"run", options.out},
                                       {"step", result.step},
                                       {"finished", result.finished},
                                       {"parameters", result.parameters},
                                       {"tokens", result.tokens},
                                       {"skipped", result.skipped},
                                       {"val_loss", result.val_loss},
                                       {"val_bits_per_byte", result.val_bits_per_byte},
                                       {"tokens_per_s", result.tokens_per_s},
                                       {"checkpoint", result.checkpoint.string()}};
  std::cout << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void run(const Options& options) {
  if (options.config.empty() && !options.resume) {
    throw CLI::ValidationError("--config is required (only --resume can do without)");
  }
  const std::string config_path =
      options.config.empty() ? (std::filesystem::path(options.out) / "config.toml").string()
                             : options.config;
  Reporter reporter;
  const lm::Match match = lm::resolve_match(lm::load_config(config_path, options.overrides));
  for (const std::string& line : match.report) reporter.note(line);

  handle_signals();
  lm::Trainer trainer(match.config, options.out, options.resume);
  for (const std::string& line : trainer.notes()) reporter.note(line);
  if (trainer.step() == 0) print_assignments(trainer.assignments(), reporter);
  const lm::TrainResult result = trainer.run(reporter, &stop_requested);
  options.json ? print_json(options, result) : print_text(result);
}

}  // namespace

void add_train(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("train", "Train a model on a dataset, in a run folder");
  command->add_option("--config", options->config,
                      "TOML file; with --resume the run's own where left out");
  command->add_option("--set", options->overrides,
                      "section.key=value, over the config; repeatable");
  command->add_option("--out", options->out, "Run folder to write")->required();
  command->add_flag("--resume", options->resume, "Go on from the newest good checkpoint");
  command->add_flag("--json", options->json, "Print the result as JSON");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
